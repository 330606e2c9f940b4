"""Reward models: load any by path or hub id, and score texts.

Three rewards that share nothing but the text: `bag_of_words` (TF-IDF and logistic regression),
`classifier` (a fine-tuned encoder, or any sequence-classification model), `vader` (a lexicon and
rules). None ever is a pickle.
"""

import json
from functools import lru_cache
from pathlib import Path

import numpy as np

from beyond_dpo import templates


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

    One label: its logit. Two labels: logit of the second minus the first. More: name the label's
    index. max_tokens is lowered to what the model reads; longer texts lose their end. Only
    safetensors are read (OSError), and remote code only runs if trust_remote_code says so; ArmoRM
    needs none. A score depends on its text alone, not on batch, budget or order. On a GPU the model
    has its checkpoint's precision, else float32.
    """

    def __init__(
        self,
        folder,
        *,
        label=None,
        max_tokens=4096,
        token_budget=8192,
        trust_remote_code: bool = False,
    ):
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        from beyond_dpo import armorm, scoring

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
            raise ValueError(
                f"{folder} is no finished reward model, it lacks "
                f"{sorted(loaded['missing_keys'])[:3]}"
            )
        if hasattr(
            model, "set_attn_implementation"
        ):  # armorm's own module has plain attention inside
            scoring.use_attention_that_caps(model)
        self.model = model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
        self.label, labels = label, self.model.config.num_labels
        if labels > 2 if label is None else not 0 <= label < labels:
            raise ValueError(
                f"{folder} has {labels} labels, numbered from 0; say which one is the reward, not "
                f"{label}"
            )
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
        """Return one reward per text (or per list of chat turns), in input order; batches hold
        similar lengths.
        """
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
                scores[batch] = (
                    (logits[:, 1] - logits[:, 0] if two else logits[:, self.label or 0])
                    .cpu()
                    .numpy()
                )
        if not np.isfinite(scores).all():
            raise ValueError(
                f"the reward of text {np.flatnonzero(~np.isfinite(scores))[0]} is not finite"
            )
        return scores

    def _ids(self, text: str | list[dict]) -> list[int]:
        cut = {"truncation": True, "max_length": self.max_tokens}
        if isinstance(text, str):
            return self.tokenizer(text, **cut)["input_ids"]

        ids, bos = templates.chat_ids(self.tokenizer, text), self.tokenizer.bos_token_id
        front = [bos] * (
            bos in (*ids[:1], *self.tokenizer("a")["input_ids"][:1])
        )  # one, whoever puts it there
        while front and ids[:1] == front:
            ids = ids[1:]
        return [*front, *ids][: self.max_tokens]


def token_batches(lengths: list[int], budget: int) -> list[list[int]]:
    """Return batches of indices, longest texts first, each of at most `budget` tokens when padded
    (or one text).
    """
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
    """Return distinct n-grams over all n-grams of a set of token lists, in 0…1 (Li et al. 2016,
    arXiv 1510.03055).
    """
    grams = [tuple(ids[i : i + n]) for ids in texts_ids for i in range(len(ids) - n + 1)]
    return len(set(grams)) / len(grams) if grams else float("nan")


def repetition(ids: list[int], n: int = 3) -> float:
    """Return the share of a response's n-grams that it has said before, in 0…1; 0 for one shorter
    than n tokens.
    """
    return 1 - distinct_n([ids], n) if len(ids) >= n else 0.0


@lru_cache(maxsize=3)  # a profile's judges
def load(kind: str, **arguments):
    """Return a reward; one that was asked for lately is not loaded again."""
    kinds = {
        "bag_of_words": BagOfWords,
        "classifier": Classifier,
        "finished": Classifier,
        "vader": Vader,
    }
    return kinds[kind](**arguments)


def chat(prompt: str | list[dict], answer: str) -> list[dict]:
    """Return the turns of a prompt (one user's text, or turns) and its answer."""
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return [*turns, {"role": "assistant", "content": answer}]
