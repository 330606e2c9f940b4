"""Train rewards on human labels: `python -m beyond_dpo.jobs.fit_reward JOB.json`."""

import argparse
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from beyond_dpo import events
from beyond_dpo.files import share_weights
from beyond_dpo.machine import launch
from beyond_dpo.precision import require_precision
from beyond_dpo.rewards import (
    BagOfWords,
    Classifier,
    Ngrams,
    Vader,
    leave_out_unread,
    readable_tokens,
)


def train_bag_of_words(
    texts: list[str], labels: list[int], out: Path, *, held_out: tuple, seed: int
) -> dict:
    """Fit a rewards.BagOfWords; write it to the folder `out`.

    It is written as JSON and .npz. labels: 0 or 1 by people. held_out: never trained on, arguments
    of held_out_facts. Returns these facts.
    """
    return _fit_words(BagOfWords, texts, labels, out, held_out, seed)


def train_ngrams(
    texts: list[str], labels: list[int], out: Path, *, held_out: tuple, seed: int
) -> dict:
    """Fit a rewards.Ngrams; arguments and result are those of train_bag_of_words."""
    return _fit_words(Ngrams, texts, labels, out, held_out, seed)


def _fit_words(
    reward_class: type[BagOfWords],
    texts: list[str],
    labels: list[int],
    out: Path,
    held_out: tuple,
    seed: int,
) -> dict:
    """Fit the logistic regression of a BagOfWords, or of a class that is derived from it."""
    from sklearn.linear_model import LogisticRegression

    vectorizer = reward_class.new_vectorizer(min_df=2, max_features=200_000)
    tfidf = vectorizer.fit_transform(texts)
    features = reward_class.features(tfidf, texts)
    model = LogisticRegression(C=4.0, max_iter=400, random_state=seed).fit(features, labels)
    vocabulary = sorted(vectorizer.vocabulary_, key=vectorizer.vocabulary_.get)
    (out / "words.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    np.savez(
        out / "weights.npz", idf=vectorizer.idf_, coef=model.coef_[0], intercept=model.intercept_
    )
    facts = held_out_facts(reward_class(out), *held_out)
    return facts | {"trained_on": len(texts), "features": features.shape[1]}


def held_out_facts(
    reward, texts: list[str], labels: list[int], spoiled: Sequence[str] = ()
) -> dict:
    """Return a reward's accuracy and AUC on texts that it was not trained on.

    Accuracy: how often a score above 0 goes with the human label 1. spoiled: texts that a reward
    should know as bad; with them "auc_spoiled" is how often a text of label 1 scores higher than
    one of them.
    """
    scores = reward.score(texts)
    positive = np.asarray(labels) == 1
    accuracy = float(((scores > 0) == positive).mean())
    auc = _auc(scores[positive], scores[~positive])
    facts = {"held_out": len(texts), "accuracy": round(accuracy, 4), "auc": auc}
    if spoiled:
        facts["auc_spoiled"] = _auc(scores[positive], reward.score(list(spoiled)))
    return facts


def _auc(better: np.ndarray, worse: np.ndarray) -> float:
    """Return how often one of the better scores is above one of the worse; ties count half."""
    from sklearn.metrics import roc_auc_score

    labels = np.repeat([1, 0], [len(better), len(worse)])
    scores = np.concatenate([better, worse])
    return round(float(roc_auc_score(labels, scores)), 4)


def train_classifier(
    encoder: str,
    texts: list[str],
    labels: list[int],
    out: Path,
    *,
    held_out: tuple,
    seed: int,
    lr: float = 5e-5,
    batch: int = 32,
    max_tokens: int = 64,
    frozen: int = 2,
    precision: str = "bf16",
    lean: bool = False,
    tell: Callable[[int, int], None] | None = None,
) -> dict:
    """Fine-tune an encoder with a one-logit head on human labels; write a transformers folder.

    labels: 0 or 1. One epoch, AdamW, linear decay. precision: "bf16" is autocast over float32
    weights, "fp32" is float32 throughout. The embeddings and the first `frozen` layers stay as they
    are: a third of the time for less than a point of accuracy. Texts are cut to max_tokens, or to
    what the encoder reads. lean: compute no state that the head does not read, which saves about a
    sixth of the time; the gradients are the same, but dropout has other draws. held_out: the
    arguments of held_out_facts, whose facts are returned. tell: called with (steps done, steps in
    all).
    Raises ValueError for fewer texts than a batch, and for "bf16" on a CPU that would emulate it;
    OSError for an encoder without safetensors.
    """
    import torch

    require_precision(precision)
    if len(texts) < batch:
        raise ValueError(
            f"{len(texts)} texts are fewer than one batch of {batch}: nothing would be trained"
        )
    torch.manual_seed(seed)
    model, tokenizer = _one_logit_model(encoder, frozen)
    if lean:
        leave_out_unread(model)
    max_tokens = min(max_tokens, readable_tokens(model) or max_tokens)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(texts), generator=generator).tolist()
    targets = torch.tensor(labels, dtype=torch.float32)
    steps = len(texts) // batch
    for step in range(steps):
        picked = order[step * batch : (step + 1) * batch]
        batch_texts = [texts[i] for i in picked]
        inputs = _tokenized(tokenizer, batch_texts, max_tokens)
        loss = _loss(model, inputs, targets[picked], bf16=precision == "bf16")
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        optimizer.step()
        if tell:
            tell(step + 1, steps)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    share_weights(Path(out))
    facts = held_out_facts(Classifier(out, max_tokens=max_tokens), *held_out)
    return facts | {"trained_on": steps * batch}


def _one_logit_model(encoder: str, frozen: int) -> tuple:
    """Return (model in training, tokenizer) of an encoder, its first `frozen` layers frozen.

    The head is drawn from torch's present state.
    """
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(encoder)
    model = AutoModelForSequenceClassification.from_pretrained(
        encoder, num_labels=1, dtype=torch.float32, use_safetensors=True
    )
    for part in (model.base_model.embeddings, *model.base_model.encoder.layer[:frozen]):
        part.requires_grad_(False)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.to(device).train(), tokenizer


def _tokenized(tokenizer, texts: list[str], max_tokens: int):
    """Return a batch of texts as tensors, cut to max_tokens and padded."""
    return tokenizer(
        texts,
        truncation=True,
        max_length=max_tokens,
        padding=True,
        return_tensors="pt",
    )


def _loss(model, inputs, targets, *, bf16: bool):
    """Return the mean cross-entropy of a batch of tokenized texts, whose targets are 0 or 1."""
    import torch

    device = model.device
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        logits = model(**inputs.to(device)).logits[:, 0].float()
    return torch.nn.functional.binary_cross_entropy_with_logits(logits, targets.to(device))


def main(path: str) -> None:
    """Train, or only measure, the reward of a job file: {kind, held_out, out, ...}.

    kind: one of rewards.KINDS. What is trained has texts, labels and seed; an encoder is trained in
    the job's "precision", else in bf16. held_out: the arguments of held_out_facts.
    """
    job = json.loads(Path(path).read_text(encoding="utf-8"))
    facts = _facts(job)
    Path(job["out"], "facts.json").write_text(json.dumps(facts), encoding="utf-8")


def _facts(job: dict) -> dict:
    """Train or only measure the reward of a job; return what is known of it on held-out texts."""
    if not job["held_out"][0]:  # preferences have no labels to measure it on
        return {}
    kind = job["kind"]
    if kind == "vader":
        return held_out_facts(Vader(), *job["held_out"])
    if kind == "finished":
        reward = Classifier(job["encoder"], trust_remote_code=job["trust_remote_code"])
        return held_out_facts(reward, *job["held_out"])
    settings = {key: value for key, value in job.items() if key != "kind"}
    settings["out"] = Path(job["out"])
    return TRAINERS[kind](**settings)


TRAINERS = {  # kind of reward -> what trains one
    "bag_of_words": train_bag_of_words,
    "ngrams": train_ngrams,
    "classifier": partial(train_classifier, tell=events.progress),
}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m beyond_dpo.jobs.fit_reward", description=main.__doc__
    )
    parser.add_argument("job", help="the job file (JSON)")
    arguments = parser.parse_args()
    launch.follow_parent()
    main(arguments.job)
