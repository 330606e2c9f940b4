"""Reward models: train them on human labels, load any by path or hub id, and score texts.

Three rewards that share nothing but the text: `bag_of_words` (TF-IDF and logistic regression), `classifier` (a
fine-tuned encoder, or any sequence-classification model), `vader` (a lexicon and rules). None ever is a pickle.
`Scorer` lives in a child process (`launch.Worker("beyond_dpo.rewards", ...)`).
"""

import argparse
import json
from functools import lru_cache
from pathlib import Path

import numpy as np

from beyond_dpo import launch, scoring, shards, templates
from beyond_dpo.files import share_weights, write_file


def train_bag_of_words(texts: list[str], labels: list[int], out: Path, *, held_out: tuple, seed: int) -> dict:
    """Fit TF-IDF over words and word pairs with logistic regression, and write it to `out` as JSON and .npz.

    labels: 0 or 1 by people. held_out: (texts, labels) never trained on. Returns its accuracy and AUC there.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    vectorizer = TfidfVectorizer(ngram_range=(1, 2), min_df=2, max_features=200_000, sublinear_tf=True)
    model = LogisticRegression(C=4.0, max_iter=400, random_state=seed).fit(vectorizer.fit_transform(texts), labels)
    words = sorted(vectorizer.vocabulary_, key=vectorizer.vocabulary_.get)
    (out / "words.json").write_text(json.dumps(words), encoding="utf-8")
    np.savez(out / "weights.npz", idf=vectorizer.idf_, coef=model.coef_[0], intercept=model.intercept_)
    return held_out_facts(BagOfWords(out), *held_out) | {"trained_on": len(texts), "features": len(words)}


def held_out_facts(reward, texts: list[str], labels: list[int]) -> dict:
    """Return a reward's accuracy (score > 0 against the human label) and AUC on texts it was not trained on."""
    from sklearn.metrics import roc_auc_score

    scores, labels = reward.score(texts), np.asarray(labels)
    accuracy = float(((scores > 0) == labels).mean())
    auc = float(roc_auc_score(labels, scores))
    return {"held_out": len(texts), "accuracy": round(accuracy, 4), "auc": round(auc, 4)}


class BagOfWords:
    """The classifier that `train_bag_of_words` wrote; scores are logits of "positive"."""

    def __init__(self, folder: Path):
        from sklearn.feature_extraction.text import TfidfVectorizer

        words = json.loads(Path(folder, "words.json").read_text(encoding="utf-8"))
        with np.load(Path(folder, "weights.npz"), allow_pickle=False) as arrays:
            self.coef, self.intercept, idf = arrays["coef"], arrays["intercept"], arrays["idf"]
        self.vectorizer = TfidfVectorizer(ngram_range=(1, 2), vocabulary=words, sublinear_tf=True)
        self.vectorizer.idf_ = idf

    def score(self, texts: list[str]) -> np.ndarray:
        return self.vectorizer.transform(texts) @ self.coef + self.intercept


def train_classifier(
    encoder: str, texts: list[str], labels: list[int], out: Path, *,
    held_out: tuple, seed: int, lr: float = 5e-5, batch: int = 32, max_tokens: int = 64, frozen: int = 2,
    precision: str = "bf16",
) -> dict:  # fmt: skip
    """Fine-tune an encoder with a one-logit head on human labels (0 or 1), and write a transformers folder to `out`.

    One epoch, AdamW, linear decay. precision: "bf16" is autocast over float32 weights, "fp32" is
    float32 throughout. The embeddings and the first `frozen` layers stay as they are: a third of
    the time for less than a point of accuracy. Texts are cut to max_tokens, or to what the encoder
    reads. Returns the accuracy and AUC on `held_out` (texts, labels).
    Raises ValueError for fewer texts than a batch, and for "bf16" on a CPU that would emulate it;
    OSError for an encoder without safetensors.
    """
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    precision.require_precision(precision)
    if len(texts) < batch:
        raise ValueError(f"{len(texts)} texts are fewer than one batch of {batch}: nothing would be trained")
    torch.manual_seed(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    options = {"num_labels": 1, "dtype": torch.float32, "use_safetensors": True}
    model = AutoModelForSequenceClassification.from_pretrained(encoder, **options).to(device).train()
    max_tokens = min(max_tokens, readable_tokens(model) or max_tokens)
    for part in (model.base_model.embeddings, *model.base_model.encoder.layer[:frozen]):
        part.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed)).tolist()
    targets, steps = torch.tensor(labels, dtype=torch.float32), len(texts) // batch
    for step in range(steps):
        picked = order[step * batch : (step + 1) * batch]
        part = [texts[i] for i in picked]
        inputs = tokenizer(part, truncation=True, max_length=max_tokens, padding=True, return_tensors="pt")
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            logits = model(**inputs.to(device)).logits[:, 0].float()
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, targets[picked].to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        optimizer.step()
        launch.progress(step + 1, steps)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    share_weights(Path(out))
    return held_out_facts(Classifier(out, max_tokens=max_tokens), *held_out) | {"trained_on": steps * batch}


def readable_tokens(model) -> int | None:
    """Return how many tokens a transformers model reads at most, None where nothing limits them.

    RoBERTa and its relatives number positions from their padding_idx + 1 on, so that
    max_position_embeddings = 514 are 512 tokens.
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is None or limit < 1:  # XLNet's configuration says -1
        return None
    for name, module in model.named_modules():
        if name.rpartition(".")[2] == "position_embeddings":
            padding = getattr(module, "padding_idx", None)
            return limit if padding is None else limit - padding - 1
    return limit


class Classifier:
    """Any sequence-classification model from a folder or the hub; scores are raw logits in float32.

    One label: its logit. Two labels: logit of the second minus the first. More: name the label's index. max_tokens is
    lowered to what the model reads; longer texts lose their end. Only safetensors are read (OSError), and remote code
    only runs if trust_remote_code says so; ArmoRM needs none. A score depends on its text alone, not on batch, budget
    or order. On a GPU the model has its checkpoint's precision, else float32.
    """

    def __init__(self, folder, *, label=None, max_tokens=4096, token_budget=8192, trust_remote_code: bool = False):
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        from beyond_dpo import armorm

        dtype = "auto" if torch.cuda.is_available() else torch.float32
        options = {"use_safetensors": True, "trust_remote_code": trust_remote_code, "dtype": dtype}
        self.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        self.tokenizer.truncation_side = "right"  # some were saved with "left", for their training
        if armorm.is_gated(folder):
            model, loaded = armorm.ArmoRM(folder, self.tokenizer, dtype), {"missing_keys": ()}
        else:
            options["output_loading_info"] = True
            model, loaded = AutoModelForSequenceClassification.from_pretrained(folder, **options)
        if loaded["missing_keys"]:  # transformers would only warn, and score with random numbers
            raise ValueError(f"{folder} is no finished reward model, it lacks {sorted(loaded['missing_keys'])[:3]}")
        self.model = model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
        self.label, labels = label, self.model.config.num_labels
        if labels > 2 if label is None else not 0 <= label < labels:
            raise ValueError(f"{folder} has {labels} labels, numbered from 0; say which one is the reward, not {label}")
        reads = readable_tokens(self.model) or max_tokens
        self.max_tokens = min(max_tokens, reads, self.tokenizer.model_max_length)
        text_config = self.model.config.get_text_config()
        if text_config.pad_token_id is not None and text_config.pad_token_id < 0:
            text_config.pad_token_id = None  # the first Llama's -1 says that there is none
        self.pad, self.token_budget = text_config.pad_token_id, token_budget
        # A decoder is read where the padding begins. Where it knows no padding token, or reads the
        # last position whatever stands there (XLNet), texts go one by one.
        if self.pad is None or getattr(text_config, "summary_type", "") == "last":
            self.token_budget = 0

    def score(self, texts: list) -> np.ndarray:
        """Return one reward per text (or per list of chat turns), in input order; batches hold similar lengths."""
        import torch
        from torch.nn.utils.rnn import pad_sequence

        ids, scores = [self._ids(text) for text in texts], np.full(len(texts), np.nan)
        with torch.no_grad():
            for batch in token_batches([len(i) for i in ids], self.token_budget):
                rows = [torch.tensor(ids[i], device=self.model.device) for i in batch]
                mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
                padded = pad_sequence(rows, batch_first=True, padding_value=self.pad or 0)
                logits = self.model(input_ids=padded, attention_mask=mask).logits.float()
                two = self.label is None and logits.shape[1] == 2
                scores[batch] = (logits[:, 1] - logits[:, 0] if two else logits[:, self.label or 0]).cpu().numpy()
        if not np.isfinite(scores).all():
            raise ValueError(f"the reward of text {np.flatnonzero(~np.isfinite(scores))[0]} is not finite")
        return scores

    def _ids(self, text: str | list[dict]) -> list[int]:
        cut = {"truncation": True, "max_length": self.max_tokens}
        if isinstance(text, str):
            return self.tokenizer(text, **cut)["input_ids"]

        ids, bos = templates.chat_ids(self.tokenizer, text), self.tokenizer.bos_token_id
        front = [bos] * (bos in (*ids[:1], *self.tokenizer("a")["input_ids"][:1]))  # one, whoever puts it there
        while front and ids[:1] == front:
            ids = ids[1:]
        return [*front, *ids][: self.max_tokens]


def token_batches(lengths: list[int], budget: int) -> list[list[int]]:
    """Return batches of indices, longest texts first, each of at most `budget` tokens when padded (or one text)."""
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= budget:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


class Vader:
    """The lexicon and rules of VADER (Hutto & Gilbert 2014): compound sentiment in −1…1."""

    def __init__(self):
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

        self.analyzer = SentimentIntensityAnalyzer()

    def score(self, texts: list[str]) -> np.ndarray:
        return np.array([self.analyzer.polarity_scores(t)["compound"] for t in texts])


def distinct_n(texts_ids: list[list[int]], n: int = 2) -> float:
    """Return distinct n-grams over all n-grams of a set of token lists, in 0…1 (Li et al. 2016, arXiv 1510.03055)."""
    grams = [tuple(ids[i : i + n]) for ids in texts_ids for i in range(len(ids) - n + 1)]
    return len(set(grams)) / len(grams) if grams else float("nan")


def repetition(ids: list[int], n: int = 3) -> float:
    """Return the share of a response's n-grams that it has said before, in 0…1; 0 for one shorter than n tokens."""
    return 1 - distinct_n([ids], n) if len(ids) >= n else 0.0


@lru_cache(maxsize=3)  # a profile's judges
def load(kind: str, **arguments):
    """Return a reward; one that was asked for lately is not loaded again."""
    kinds = {"bag_of_words": BagOfWords, "classifier": Classifier, "finished": Classifier, "vader": Vader}
    return kinds[kind](**arguments)


def chat(prompt: str | list[dict], answer: str) -> list[dict]:
    """Return the turns of a prompt (one user's text, or turns) and its answer."""
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return [*turns, {"role": "assistant", "content": answer}]


class Scorer:
    """Score response files with named rewards, and the log-probability of each response by `target`, the SFT model."""

    def __init__(self, target: str, precision: str = "bf16"):
        """Take the SFT model's folder, and the precision of its pass.

        Raises ValueError for "bf16" on a CPU that would emulate it.
        """
        precision.require_precision(precision)
        self.target, self.precision, self._reference = target, precision, None

    def score(
        self, rewards: dict, prompts: str, responses: str, out: str, reference_prompts: int = 0, shard: int = 512,
        rank: int = 0, world: int = 1,
    ) -> dict | None:  # fmt: skip
        """Write one JSON line per response: id, sample, length, each reward, repetition, logp, and logp_sft.

        rewards: name -> {"kind": "bag_of_words" | "classifier" | "finished" | "vader", …arguments}. A reward reads
        prompt and response together, as its training texts are whole openings; a finished one with a chat template
        reads turns where the prompts have a "text" (one user's, or turns). logp_sft is given for the first
        `reference_prompts` prompts (else null): logp − logp_sft estimates the KL to the SFT model in nats.
        shard, rank, world: as for Engine.generate(). Returns {"distinct_2"} of all responses together.
        """
        asked = {r["id"]: r for r in json.loads(Path(prompts).read_text(encoding="utf-8"))}
        lines = [json.loads(line) for line in Path(responses).read_text(encoding="utf-8").splitlines()]
        place, files = {name: i // shard for i, name in enumerate(asked)}, shards.parts(out, len(asked), shard)
        referenced = set(list(asked)[:reference_prompts])
        for k in shards.left(files, rank, world):
            part = self._scored(rewards, asked, [r for r in lines if place[r["id"]] == k], referenced)
            write_file(files[k], "".join(json.dumps(entry) + "\n" for entry in part))
        if world > 1:
            return None
        shards.merge(out, files)
        return {"distinct_2": round(distinct_n([r["response_ids"] for r in lines]), 4)}

    def _scored(self, rewards: dict, asked: dict, lines: list[dict], referenced: set) -> list[dict]:
        tokenizer = templates.load_tokenizer(self.target)
        whole = [asked[r["id"]]["prompt_ids"] + r["response_ids"] for r in lines]
        texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in whole]
        chats, table = texts, {}
        if all("text" in row for row in asked.values()):
            said = [tokenizer.decode(r["response_ids"], skip_special_tokens=True) for r in lines]
            chats = [chat(asked[r["id"]]["text"], answer) for r, answer in zip(lines, said, strict=True)]
        for name, given in rewards.items():
            spoken = given["kind"] == "finished" and load(**given).tokenizer.chat_template
            table[name] = load(**given).score(chats if spoken else texts)
        rows, logps, scored = {}, {}, []
        for i, r in enumerate(lines):
            if r["id"] in referenced and r["response_ids"]:
                prompt = asked[r["id"]]["prompt_ids"]
                rows[i] = {"id": r["id"], "prompt_ids": prompt, "responses": {"said": r["response_ids"]}}
        if rows:
            self._reference = self._reference or scoring.load_scorer(self.target, self.precision)
            found = scoring.score_rows(self._reference, [*rows.values()], ["said"], pad_id=tokenizer.pad_token_id)
            logps = dict(zip(rows, found["logps"][:, 0].tolist(), strict=True))
        for i, r in enumerate(lines):
            said = r["response_ids"]
            entry = {"id": r["id"], "sample": r["sample"], "length": len(said)}
            entry |= {name: round(float(scores[i]), 5) for name, scores in table.items()}
            entry |= {"repetition": round(repetition(said), 5), "logp": r["logp"], "logp_sft": logps.get(i)}
            scored.append(entry)
        return scored


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
        judge = Vader() if name == "vader" else Classifier(job["encoder"], trust_remote_code=job["trust_remote_code"])
        facts = held_out_facts(judge, *job["held_out"])
    elif name == "gold":
        facts = train_bag_of_words(**job | {"out": out})
    else:
        facts = train_classifier(**job | {"out": out, "precision": precision})
    Path(job["out"], "facts.json").write_text(json.dumps(facts), encoding="utf-8")


if __name__ == "__main__":
    name = "python -m beyond_dpo.rewards"
    parser = argparse.ArgumentParser(prog=name, description=main.__doc__)
    parser.add_argument("job", nargs="?", help="the job file (JSON)")
    serves = "score responses for a launch.Worker at this end of a pipe"
    parser.add_argument("--serve", type=int, metavar="FD", help=serves)
    arguments = parser.parse_args()
    if arguments.serve is not None:
        launch.serve(Scorer)
    elif arguments.job:
        launch.follow_parent()
        main(arguments.job)
    else:
        parser.error("give a job file")
