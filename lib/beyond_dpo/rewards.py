"""Reward models: load any by path or hub id, and score texts.

Rewards that share nothing but the text: `bag_of_words` (TF-IDF and logistic regression), `ngrams`
(the same with longer runs of words, and how much of a text repeats), `classifier` (a fine-tuned
encoder, or any sequence-classification model), `vader` (a lexicon and rules). None ever is a
pickle.
"""

import json
import re
from functools import lru_cache
from pathlib import Path

import numpy as np

from beyond_dpo import templates

# Tokens of a batch. On a CPU smaller batches are faster: less padding, and what a layer computes
# stays in the cache.
TOKEN_BUDGET = {"cpu": 1024, "cuda": 8192}
# The encoders of transformers whose head reads the first token alone.
READ_FIRST_TOKEN = (
    "BertForSequenceClassification",
    "RobertaForSequenceClassification",
    "XLMRobertaForSequenceClassification",
)


class BagOfWords:
    """Logistic regression on TF-IDF of words and word pairs; scores are logits of "positive".

    folder: what `jobs.fit_reward.train_bag_of_words` wrote, words.json and weights.npz.
    """

    LONGEST = 2  # words of a feature
    TOKEN = r"(?u)\b\w\w+\b"  # a word of two or more letters or digits, scikit-learn's default

    def __init__(self, folder: str | Path):
        folder = Path(folder)
        vocabulary = json.loads((folder / "words.json").read_text(encoding="utf-8"))
        with np.load(folder / "weights.npz", allow_pickle=False) as arrays:
            self.coef = arrays["coef"]
            self.intercept = arrays["intercept"]
            idf = arrays["idf"]
        self.vectorizer = self.new_vectorizer(vocabulary=vocabulary)
        self.vectorizer.idf_ = idf

    @classmethod
    def new_vectorizer(cls, **settings):
        """Return a TfidfVectorizer of this reward's features; settings: more of its arguments."""
        from sklearn.feature_extraction.text import TfidfVectorizer

        return TfidfVectorizer(
            ngram_range=(1, cls.LONGEST), token_pattern=cls.TOKEN, sublinear_tf=True, **settings
        )

    @classmethod
    def features(cls, tfidf, texts: list[str]):
        """Return the features of texts, (texts, features), of their TF-IDF by new_vectorizer()."""
        return tfidf

    def score(self, texts: list[str]) -> np.ndarray:
        """Return the logit of "positive" of each text."""
        tfidf = self.vectorizer.transform(texts)
        features = self.features(tfidf, texts)
        return features @ self.coef + self.intercept


class Ngrams(BagOfWords):
    """Logistic regression on TF-IDF of one to three words, and on the shares that repeat.

    Punctuation marks count as words. Behind the TF-IDF stand three features in 0…1, see
    repeated_shares(): with spoiled texts as negatives, the reward knows a phrase in a loop whatever
    the phrase. folder: what `jobs.fit_reward.train_ngrams` wrote.
    """

    LONGEST = 3
    TOKEN = r"\w+(?:'\w+)*|[^\w\s]"

    @classmethod
    def features(cls, tfidf, texts: list[str]):
        """Return TF-IDF and repeated_shares() side by side, (texts, features)."""
        from scipy.sparse import csr_matrix, hstack

        shares = csr_matrix(repeated_shares(texts))
        return hstack([tfidf, shares], format="csr")


def repeated_shares(texts: list[str]) -> np.ndarray:
    """Return the shares of a text's words, pairs and triples that repeat earlier ones, (texts, 3).

    Each is 1 − distinct/all, in 0…1, of the tokens of Ngrams in small letters.
    """
    shares = np.zeros((len(texts), 3))
    for i, text in enumerate(texts):
        tokens = re.findall(Ngrams.TOKEN, text.lower())
        for n in (1, 2, 3):
            shares[i, n - 1] = repetition(tokens, n)
    return shares


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

    A score depends on its text alone, not on batch, budget or order. Only safetensors are read
    (OSError for others), and a model's own code only runs if trust_remote_code says so; ArmoRM
    needs none. On a GPU the model has its checkpoint's precision, else float32.

    Args:
        folder: a model folder or a hub id.
        label: index of the logit that is the reward. None takes the only one, or of two the second
            minus the first; more than two need an index.
        max_tokens: longer texts lose their end. It is lowered to what the model reads.
        token_budget: tokens of a batch, padding included; None is the device's TOKEN_BUDGET.
        trust_remote_code: as in transformers.
    Raises:
        ValueError: the model has no trained head, or `label` does not name one of its labels.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        label: int | None = None,
        max_tokens: int = 4096,
        token_budget: int | None = None,
        trust_remote_code: bool = False,
    ):
        import torch
        from transformers import AutoTokenizer

        device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = "auto" if device == "cuda" else torch.float32
        self.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        self.tokenizer.truncation_side = "right"  # some were saved with "left", for their training
        model = _load_classifier(folder, self.tokenizer, dtype, trust_remote_code)
        self.model = model.eval().to(device)
        labels = self.model.config.num_labels
        needs_label = label is None and labels > 2
        unknown_label = label is not None and not 0 <= label < labels
        if needs_label or unknown_label:
            raise ValueError(
                f"{folder} has {labels} labels, numbered from 0; say which one is the reward, not "
                f"{label}"
            )
        self.label = label
        readable = readable_tokens(self.model) or max_tokens
        self.max_tokens = min(max_tokens, readable, self.tokenizer.model_max_length)
        self.token_budget = TOKEN_BUDGET[device] if token_budget is None else token_budget
        config = self.model.config.get_text_config()
        if config.pad_token_id is not None and config.pad_token_id < 0:
            config.pad_token_id = None  # the first Llama's -1 says that there is none
        self.pad = config.pad_token_id
        # A decoder is read where the padding begins. Where it knows no padding token, or reads the
        # last position whatever stands there (XLNet), texts go one by one.
        if self.pad is None or getattr(config, "summary_type", "") == "last":
            self.token_budget = 0

    def score(self, texts: list[str] | list[list[dict]]) -> np.ndarray:
        """Return one reward for each text (or list of chat turns), in input order.

        Raises ValueError for a reward that is not finite.
        """
        import torch

        ids = [self._ids(text) for text in texts]
        lengths = [len(text_ids) for text_ids in ids]
        scores = np.full(len(texts), np.nan)
        with torch.no_grad():
            for batch in token_batches(lengths, self.token_budget):
                logits = self._logits([ids[i] for i in batch])
                scores[batch] = self._rewards(logits).cpu().numpy()
        finite = np.isfinite(scores)
        if not finite.all():
            raise ValueError(f"the reward of text {np.argmin(finite)} is not finite")
        return scores

    def _logits(self, ids: list[list[int]]):
        """Return the logits of a batch of texts, (texts, labels) in float32."""
        import torch
        from torch.nn.utils.rnn import pad_sequence

        rows = [torch.tensor(text_ids, device=self.model.device) for text_ids in ids]
        ones = [torch.ones_like(row) for row in rows]
        mask = pad_sequence(ones, batch_first=True)
        input_ids = pad_sequence(rows, batch_first=True, padding_value=self.pad or 0)
        return self.model(input_ids=input_ids, attention_mask=mask).logits.float()

    def _rewards(self, logits):
        """Return the rewards of a batch, (texts,), from its logits."""
        if self.label is not None:
            return logits[:, self.label]
        if logits.shape[1] == 2:
            return logits[:, 1] - logits[:, 0]
        return logits[:, 0]

    def _ids(self, text: str | list[dict]) -> list[int]:
        """Return the token ids of a text or of chat turns, cut at their end to what is read.

        A chat begins with one BOS if its template or the tokenizer puts one there.
        """
        if isinstance(text, str):
            encoding = self.tokenizer(text, truncation=True, max_length=self.max_tokens)
            return encoding["input_ids"]
        ids = templates.chat_ids(self.tokenizer, text)
        bos = self.tokenizer.bos_token_id
        of_template = ids[:1] == [bos]
        of_tokenizer = self.tokenizer("a")["input_ids"][:1] == [bos]
        if of_template or of_tokenizer:
            while ids[:1] == [bos]:
                ids = ids[1:]
            ids = [bos, *ids]
        return ids[: self.max_tokens]


def _load_classifier(folder, tokenizer, dtype, trust_remote_code: bool):
    """Return a sequence-classification model; raise ValueError for one without a trained head."""
    from transformers import AutoModelForSequenceClassification

    from beyond_dpo import armorm, attention

    if armorm.is_gated(folder):
        return armorm.ArmoRM(folder, tokenizer, dtype)
    model, report = AutoModelForSequenceClassification.from_pretrained(
        folder,
        use_safetensors=True,
        trust_remote_code=trust_remote_code,
        dtype=dtype,
        output_loading_info=True,
    )
    missing = sorted(report["missing_keys"])
    if missing:  # transformers would only warn, and score with random numbers
        raise ValueError(f"{folder} is no finished reward model, it lacks {missing[:3]}")
    attention.use_one_that_caps(model)
    leave_out_unread(model)
    return model


def leave_out_unread(model) -> None:
    """Let the last layer of an encoder compute the first token only, where its head reads no other.

    Of a layer's products only those of queries, keys and values are left for the other tokens: of
    six layers an eighth of all work is saved. Other models stay as they are.
    """
    is_ours = type(model).__module__.startswith("transformers.")
    if is_ours and type(model).__name__ in READ_FIRST_TOKEN:
        last_layer = model.base_model.encoder.layer[-1]
        last_layer.attention.output.register_forward_pre_hook(_first_token)


def _first_token(_, states: tuple) -> tuple:
    """Return each (texts, tokens, width) of a module's arguments as (texts, 1, width)."""
    return tuple(state[:, :1] for state in states)


def token_batches(lengths: list[int], budget: int) -> list[list[int]]:
    """Return batches of indices, longest texts first.

    A batch has at most `budget` tokens when it is padded, or is one text.
    """
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batches:
            batch = batches[-1]
            width = lengths[batch[0]]
            if (len(batch) + 1) * width <= budget:
                batch.append(i)
                continue
        batches.append([i])
    return batches


class Vader:
    """The lexicon and rules of VADER (Hutto & Gilbert 2014): compound sentiment in −1…1."""

    def __init__(self):
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

        self.analyzer = SentimentIntensityAnalyzer()

    def score(self, texts: list[str]) -> np.ndarray:
        """Return the compound sentiment of each text."""
        scores = []
        for text in texts:
            polarity = self.analyzer.polarity_scores(text)
            scores.append(polarity["compound"])
        return np.array(scores)


def distinct_n(texts_ids: list[list], n: int = 2) -> float:
    """Return distinct n-grams over all n-grams of a set of texts, in 0…1; NaN if there is none.

    Li et al. 2016, arXiv 1510.03055. texts_ids: the tokens of each text, ids or words.
    """
    ngrams = []
    for ids in texts_ids:
        for start in range(len(ids) - n + 1):
            ngrams.append(tuple(ids[start : start + n]))
    if not ngrams:
        return float("nan")
    return len(set(ngrams)) / len(ngrams)


def repetition(ids: list, n: int = 3) -> float:
    """Return the share of a response's n-grams that repeat earlier ones, in 0…1.

    It is 0 for a response that is shorter than n tokens.
    """
    if len(ids) < n:
        return 0.0
    return 1 - distinct_n([ids], n)


KINDS = {
    "bag_of_words": BagOfWords,
    "ngrams": Ngrams,
    "classifier": Classifier,
    "finished": Classifier,
    "vader": Vader,
}


@lru_cache(maxsize=5)  # as many as a world has judges
def load(kind: str, **arguments):
    """Return the reward of one of the KINDS; one that was asked for lately is not loaded again."""
    return KINDS[kind](**arguments)


def chat(prompt: str | list[dict], answer: str) -> list[dict]:
    """Return the turns of a prompt (one user's text, or turns) and its answer."""
    turns = prompt
    if isinstance(prompt, str):
        turns = [{"role": "user", "content": prompt}]
    return [*turns, {"role": "assistant", "content": answer}]
