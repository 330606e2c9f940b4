"""Train rewards on human labels: `python -m beyond_dpo.jobs.fit_reward JOB.json`."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from beyond_dpo import events
from beyond_dpo.files import share_weights
from beyond_dpo.machine import launch
from beyond_dpo.precision import require_precision
from beyond_dpo.rewards import BagOfWords, Classifier, Vader, readable_tokens


def train_bag_of_words(
    texts: list[str], labels: list[int], out: Path, *, held_out: tuple, seed: int
) -> dict:
    """Fit TF-IDF over words and word pairs with logistic regression, and write it to `out` as JSON
    and .npz.

    labels: 0 or 1 by people. held_out: (texts, labels) never trained on. Returns its accuracy and
    AUC there.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    vectorizer = TfidfVectorizer(
        ngram_range=(1, 2), min_df=2, max_features=200_000, sublinear_tf=True
    )
    model = LogisticRegression(C=4.0, max_iter=400, random_state=seed).fit(
        vectorizer.fit_transform(texts), labels
    )
    words = sorted(vectorizer.vocabulary_, key=vectorizer.vocabulary_.get)
    (out / "words.json").write_text(json.dumps(words), encoding="utf-8")
    np.savez(
        out / "weights.npz", idf=vectorizer.idf_, coef=model.coef_[0], intercept=model.intercept_
    )
    return held_out_facts(BagOfWords(out), *held_out) | {
        "trained_on": len(texts),
        "features": len(words),
    }


def held_out_facts(reward, texts: list[str], labels: list[int]) -> dict:
    """Return a reward's accuracy (score > 0 against the human label) and AUC on texts it was not
    trained on.
    """
    from sklearn.metrics import roc_auc_score

    scores, labels = reward.score(texts), np.asarray(labels)
    accuracy = float(((scores > 0) == labels).mean())
    auc = float(roc_auc_score(labels, scores))
    return {"held_out": len(texts), "accuracy": round(accuracy, 4), "auc": round(auc, 4)}


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
    tell: Callable[[int, int], None] | None = None,
) -> dict:
    """Fine-tune an encoder with a one-logit head on human labels (0 or 1), and write a transformers
    folder to `out`.

    One epoch, AdamW, linear decay. precision: "bf16" is autocast over float32 weights, "fp32" is
    float32 throughout. The embeddings and the first `frozen` layers stay as they are: a third of
    the time for less than a point of accuracy. Texts are cut to max_tokens, or to what the encoder
    reads. Returns the accuracy and AUC on `held_out` (texts, labels). tell: called with (steps
    done, steps in all). Raises ValueError for fewer texts than a batch, and for "bf16" on a CPU
    that would emulate it;
    OSError for an encoder without safetensors.
    """
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    require_precision(precision)
    if len(texts) < batch:
        raise ValueError(
            f"{len(texts)} texts are fewer than one batch of {batch}: nothing would be trained"
        )
    torch.manual_seed(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    options = {"num_labels": 1, "dtype": torch.float32, "use_safetensors": True}
    model = (
        AutoModelForSequenceClassification.from_pretrained(encoder, **options).to(device).train()
    )
    max_tokens = min(max_tokens, readable_tokens(model) or max_tokens)
    for part in (model.base_model.embeddings, *model.base_model.encoder.layer[:frozen]):
        part.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed)).tolist()
    targets, steps = torch.tensor(labels, dtype=torch.float32), len(texts) // batch
    for step in range(steps):
        picked = order[step * batch : (step + 1) * batch]
        part = [texts[i] for i in picked]
        inputs = tokenizer(
            [texts[i] for i in picked],
            truncation=True,
            max_length=max_tokens,
            padding=True,
            return_tensors="pt",
        )
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
    return held_out_facts(Classifier(out, max_tokens=max_tokens), *held_out) | {
        "trained_on": steps * batch
    }


def _loss(model, inputs, targets, *, bf16: bool):
    """Return the mean cross-entropy of a batch of tokenized texts, whose targets are 0 or 1."""
    import torch

    device = model.device
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        logits = model(**inputs.to(device)).logits[:, 0].float()
    return torch.nn.functional.binary_cross_entropy_with_logits(logits, targets.to(device))


def main(path: str) -> None:
    """Train the reward of a job file: texts, labels, held_out, seed, out, reward, encoder.

    reward: gold, reward or vader. An encoder is trained in the job's "precision", else in bf16.
    """
    job = json.loads(Path(path).read_text(encoding="utf-8"))
    name, out = job.pop("reward"), Path(job["out"])
    precision = job.pop("precision", "bf16")
    if not job["held_out"][0]:  # preferences have no labels to measure it on
        facts = {}
    elif name == "vader" or not job["texts"]:  # finished as it is
        judge = (
            Vader()
            if name == "vader"
            else Classifier(job["encoder"], trust_remote_code=job["trust_remote_code"])
        )
        facts = held_out_facts(judge, *job["held_out"])
    elif name == "gold":
        facts = train_bag_of_words(**job | {"out": out})
    else:
        facts = train_classifier(
            **job | {"out": out, "precision": precision, "tell": events.progress}
        )
    Path(job["out"], "facts.json").write_text(json.dumps(facts), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m beyond_dpo.jobs.fit_reward", description=main.__doc__
    )
    parser.add_argument("job", help="the job file (JSON)")
    arguments = parser.parse_args()
    launch.follow_parent()
    main(arguments.job)
