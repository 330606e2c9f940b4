"""Reward models on tiny real models: no pickle, and scores that depend on their text alone."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from beyond_dpo import precision, rewards, templates
from beyond_dpo.jobs import fit_reward
from beyond_dpo.jobs.score import Scorer
from beyond_dpo.machine import launch, paths
from beyond_dpo.pipeline import artifacts, assets, config, corpus, spoiled, stages, wrpo
from beyond_dpo.rewards import Classifier, Vader
from beyond_dpo.rows import read_rows


def read_lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def write_lines(file: Path, rows: list[dict]) -> None:
    lines = [json.dumps(row) + "\n" for row in rows]
    file.write_text("".join(lines))


REVIEWS = read_lines(paths.FIXTURES / "reviews.jsonl")
TEXTS = [review["text"] for review in REVIEWS]
LABELS = [review["label"] for review in REVIEWS]
HELD_OUT = (TEXTS[64:], LABELS[64:])
PERSONS_HELD_OUT = spoiled.with_spoiled(TEXTS[64:], [1] * 32, 2)
BF16 = precision.computes_bf16(precision.CPUINFO) or torch.cuda.is_available()
QUESTION = "A good film?"
ANSWER = "A dull one."


def real(name):
    try:
        return assets.model_dir(name)
    except assets.AssetError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def bag(tmp_path_factory):
    """Train a bag of words; return its folder and its facts."""
    folder = tmp_path_factory.mktemp("bag")
    facts = fit_reward.train_bag_of_words(
        TEXTS[:64], LABELS[:64], folder, held_out=HELD_OUT, seed=0
    )
    return folder, facts


def save_random_classifier(folder: Path, model_config, gain: float) -> None:
    """Write a random sequence-classification model whose matrices are enlarged by `gain`.

    Scores then differ visibly.
    """
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = transformers.AutoModelForSequenceClassification.from_config(model_config)
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.data.mul_(gain)
        model.save_pretrained(folder)


def save_tokenizer(source: Path, folder: Path) -> None:
    transformers.AutoTokenizer.from_pretrained(source).save_pretrained(folder)


def save_head(folder: Path, kind="bert", labels=1, pad_token_id=2) -> Path:
    """Write a random reward model with the tiny tokenizer."""
    source = assets.model_dir("tiny-encoder" if kind == "bert" else "tiny")
    model_config = transformers.AutoConfig.from_pretrained(
        source, num_labels=labels, pad_token_id=pad_token_id
    )
    save_random_classifier(folder, model_config, 12)
    save_tokenizer(source, folder)
    return folder


@pytest.fixture
def head(tmp_path):
    """Return a function that writes a reward model of a kind into a folder of this test."""

    def save(kind="bert", **settings) -> Path:
        return save_head(tmp_path / kind, kind, **settings)

    return save


@torch.no_grad()
def logits_alone(folder: Path, ids: list[int]) -> np.ndarray:
    """Return a model's logits of one text, without batch or padding."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    output = model(input_ids=torch.tensor([ids]))
    return output.logits[0].double().numpy()


def scores_alone(folder: Path, texts_ids: list[list[int]]) -> list[float]:
    return [logits_alone(folder, ids)[0] for ids in texts_ids]


# ---- bag of words


def test_bag_of_words_scores_are_scikit_learns_logits(bag):
    """The reward is read from its folder; scikit-learn's is trained here once more."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    vectorizer = TfidfVectorizer(
        ngram_range=(1, 2), min_df=2, max_features=200_000, sublinear_tf=True
    )
    model = LogisticRegression(C=4.0, max_iter=400, random_state=0)
    model.fit(vectorizer.fit_transform(TEXTS[:64]), LABELS[:64])
    wanted = model.decision_function(vectorizer.transform(TEXTS))
    folder, _ = bag
    reward = rewards.BagOfWords(folder)
    assert reward.score(TEXTS) == pytest.approx(wanted, abs=1e-9)
    assert reward.score([TEXTS[5]]) == pytest.approx([wanted[5]], abs=1e-9)


def test_bag_of_words_facts_are_those_of_the_saved_reward(bag):
    folder, facts = bag
    reward = rewards.BagOfWords(folder)
    judged = fit_reward.held_out_facts(reward, *HELD_OUT)
    assert judged.items() <= facts.items()
    assert facts["trained_on"] == 64
    assert facts["held_out"] == 32
    assert facts["features"] == len(reward.coef)


def test_bag_of_words_learns(bag):
    """Word counts tell these reviews apart."""
    _, facts = bag
    assert facts["accuracy"] > 0.75
    assert facts["auc"] > 0.8


def test_bag_of_words_holds_no_pickle(bag):
    folder, _ = bag
    assert sorted(file.name for file in folder.iterdir()) == ["weights.npz", "words.json"]
    with np.load(folder / "weights.npz", allow_pickle=False) as arrays:
        kinds = {name: arrays[name].dtype.kind for name in arrays}
    assert kinds == {"idf": "f", "coef": "f", "intercept": "f"}


def test_a_pickle_in_a_bag_of_words_is_refused(bag, tmp_path):
    folder, _ = bag
    (tmp_path / "words.json").write_bytes((folder / "words.json").read_bytes())
    np.savez(tmp_path / "weights.npz", idf=np.array([{}], dtype=object))
    with pytest.raises((ValueError, KeyError), match="allow_pickle=False|coef"):
        rewards.BagOfWords(tmp_path)


def test_held_out_facts_by_hand():
    """Scores 2, −1, 1, −3 for labels 1, 1, 0, 0: the signs of two are right.

    Of the four (1, 0) pairs three are in order: 2 > 1, 2 > −3, −1 > −3, not −1 > 1.
    """

    class Fixed:
        def score(self, texts):
            return np.array([2.0, -1.0, 1.0, -3.0])

    facts = fit_reward.held_out_facts(Fixed(), ["a", "b", "c", "d"], [1, 1, 0, 0])
    assert facts == {"held_out": 4, "accuracy": 0.5, "auc": 0.75}


def test_auc_against_spoiled_texts_by_hand():
    """Positive texts score 2 and −1, spoiled ones −2, 0 and 2: of six pairs 3 and a tie.

    2 > −2, 2 > 0, 2 = 2, −1 > −2.
    """
    given = {"a": 2.0, "b": -1.0, "c": 1.0, "d": -3.0, "x": -2.0, "y": 0.0, "z": 2.0}

    class Fixed:
        def score(self, texts):
            return np.array([given[text] for text in texts])

    held_out = (["a", "b", "c", "d"], [1, 1, 0, 0], ["x", "y", "z"])
    facts = fit_reward.held_out_facts(Fixed(), *held_out)
    auc = round(3.5 / 6, 4)
    assert facts == {"held_out": 4, "accuracy": 0.5, "auc": 0.75, "auc_spoiled": auc}


# ---- n-grams


@pytest.fixture(scope="module")
def person(tmp_path_factory):
    """Train the judge "person" on invented reviews; return its folder and its facts."""
    folder = tmp_path_factory.mktemp("person")
    texts, labels = spoiled.with_spoiled(TEXTS[:64], [1] * 64, 0)
    facts = fit_reward.train_ngrams(texts, labels, folder, held_out=PERSONS_HELD_OUT, seed=0)
    return folder, facts


@pytest.mark.parametrize(
    "text, wanted",
    [
        # of nine tokens four repeat (good, film, comma, !), of eight pairs "good film" and
        # "film ,", of seven triples "good film ,"
        ("Good film, GOOD film, bad!!", (4 / 9, 2 / 8, 1 / 7)),
        # don't is one word
        ("don't don't don't", (2 / 3, 1 / 2, 0)),
        ("A film.", (0, 0, 0)),
        ("", (0, 0, 0)),
    ],
)
def test_repeated_shares_by_hand(text, wanted):
    (shares,) = rewards.repeated_shares([text])
    assert shares == pytest.approx(wanted)


def test_ngrams_scores_are_scikit_learns_logits(person):
    """The reward is read from its folder; scikit-learn's is trained here once more."""
    from scipy.sparse import hstack
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    texts, labels = spoiled.with_spoiled(TEXTS[:64], [1] * 64, 0)
    vectorizer = TfidfVectorizer(
        ngram_range=(1, 3),
        token_pattern=r"\w+(?:'\w+)*|[^\w\s]",
        min_df=2,
        max_features=200_000,
        sublinear_tf=True,
    )
    features = hstack([vectorizer.fit_transform(texts), rewards.repeated_shares(texts)])
    model = LogisticRegression(C=4.0, max_iter=400, random_state=0).fit(features.tocsr(), labels)
    shares = rewards.repeated_shares(TEXTS)
    wanted = model.decision_function(hstack([vectorizer.transform(TEXTS), shares]).tocsr())
    folder, facts = person
    reward = rewards.load("ngrams", folder=folder)
    assert reward.score(TEXTS) == pytest.approx(wanted, abs=1e-9)
    assert facts["features"] == len(reward.coef) == len(vectorizer.vocabulary_) + 3
    assert "." in vectorizer.vocabulary_


def test_ngrams_hold_no_pickle(person):
    folder, _ = person
    assert sorted(file.name for file in folder.iterdir()) == ["weights.npz", "words.json"]
    with np.load(folder / "weights.npz", allow_pickle=False) as arrays:
        assert {arrays[name].dtype.kind for name in arrays} == {"f"}


def continuations(folder: Path, texts: list[str], tokens: int) -> list[str]:
    """Return what a model writes after the first ten tokens of each text, with these."""
    tokenizer = templates.load_tokenizer(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    written = []
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for text in texts:
            ids = templates.render(tokenizer, text, "plain")[:10]
            sampled = model.generate(
                torch.tensor([ids]),
                attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                do_sample=True,
                top_k=40,
                temperature=0.7,
                max_new_tokens=tokens,
                pad_token_id=2,
            )
            written.append(tokenizer.decode(sampled[0], skip_special_tokens=True))
    return written


def means_by_author(reward, persons: list[str], models: list[str]) -> list[float]:
    """Return the mean scores of people's texts, of a model's, and of people's texts spoiled."""
    groups = (persons, models, spoiled.spoil(persons, 2))
    return [reward.score(texts).mean() for texts in groups]


def test_a_persons_text_scores_above_a_models_and_that_above_a_spoiled_one(person):
    folder, facts = person
    assert facts["auc"] > 0.85
    reward = rewards.Ngrams(folder)
    models = continuations(assets.model_dir("tiny"), TEXTS[64:68], 30)
    persons, modelled, broken = means_by_author(reward, TEXTS[64:], models)
    assert persons > modelled + 0.5
    assert modelled > broken + 0.5


@pytest.mark.slow
def test_real_reviews_score_above_smollm2_and_that_above_spoiled_ones(tmp_path):
    target = real("smollm2")
    real("minilm")
    half_a, half_b, _ = corpus.shuffled("imdb")
    openings = [" ".join(text.split()[:48]) for text, _ in half_a[:1000]]
    held_out = [" ".join(text.split()[:48]) for text, _ in half_b[:200]]
    texts, labels = spoiled.with_spoiled(openings, [1] * len(openings), 0)
    measured = spoiled.with_spoiled(held_out, [1] * len(held_out), 2)
    facts = fit_reward.train_ngrams(texts, labels, tmp_path, held_out=measured, seed=0)
    assert facts["auc"] > 0.8
    reward = rewards.Ngrams(tmp_path)
    models = continuations(target, held_out[:8], 40)
    persons, modelled, broken = means_by_author(reward, held_out, models)
    assert persons > modelled > broken + 1


# ---- classifiers: scores


@pytest.mark.parametrize("budget", [1, 60, 8192])
@pytest.mark.parametrize(
    "kind, pad_token_id",
    [
        ("bert", 2),
        ("llama", 2),
        ("llama", None),  # transformers itself refuses a batch without one
        ("llama", 1),  # the end token
        ("llama", -1),  # as configurations of the first Llama say it
    ],
)
def test_scores_are_those_of_each_text_alone(kind, pad_token_id, budget, head):
    folder = head(kind, pad_token_id=pad_token_id)
    texts = []
    for i, text in enumerate(TEXTS[:7]):
        first_words = " ".join(text.split()[: 3 + 5 * i])
        texts.append(first_words + "</s>" if i % 2 else first_words)
    random.Random(0).shuffle(texts)
    reward = Classifier(folder, token_budget=budget)
    texts_ids = [reward.tokenizer(text)["input_ids"] for text in texts]
    assert len({len(ids) for ids in texts_ids}) > 4
    assert any(ids[-1] == 1 for ids in texts_ids)
    wanted = scores_alone(folder, texts_ids)
    assert reward.score(texts) == pytest.approx(wanted, abs=1e-4)
    assert np.ptp(wanted) > 0.05, "too alike to tell"


def widths_of_last_layer(reward: Classifier, texts: list[str]) -> set[int]:
    """Return how many tokens of a text the last layer's feed-forward part computes."""
    widths = set()

    def note(module, arguments, output):
        widths.add(output.shape[1])

    last_layer = reward.model.base_model.encoder.layer[-1]
    last_layer.output.register_forward_hook(note)
    reward.score(texts)
    return widths


@pytest.mark.parametrize("kind", ["bert", "roberta", "xlm-roberta", "mpnet"])
def test_a_last_layer_computes_only_what_the_head_reads(tmp_path, kind):
    """The score is that of the model as transformers computes it, whose last layer does all."""
    folder = small(kind, tmp_path, **ENCODER)
    reward = Classifier(folder)
    texts = [TEXTS[0], "A good film.", "Bad"]
    texts_ids = [reward._ids(text) for text in texts]
    wanted = scores_alone(folder, texts_ids)
    assert reward.score(texts) == pytest.approx(wanted, abs=1e-4)
    assert np.ptp(wanted) > 0.005, "too alike to tell"
    widths = widths_of_last_layer(reward, texts)
    is_known = kind != "mpnet"
    assert (widths == {1}) == is_known


def test_the_budget_is_the_devices_unless_it_is_given(head):
    folder = head()
    assert Classifier(folder).token_budget in rewards.TOKEN_BUDGET.values()
    assert Classifier(folder, token_budget=17).token_budget == 17


def test_no_text_has_no_score(head):
    assert Classifier(head()).score([]).shape == (0,)


@pytest.mark.parametrize("cap", [4.0, 50.0])
def test_a_reward_model_computes_with_its_capped_attention(tmp_path, cap):
    """sdpa leaves Gemma-2's cap out in silence."""
    gemma = transformers.Gemma2Config(
        vocab_size=512,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        head_dim=16,
        num_attention_heads=2,
        num_key_value_heads=1,
        query_pre_attn_scalar=16,
        attn_logit_softcapping=cap,
        initializer_range=0.8,
        num_labels=1,
        pad_token_id=2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        transformers.Gemma2ForSequenceClassification(gemma).save_pretrained(tmp_path)
    save_tokenizer(assets.model_dir("tiny"), tmp_path)
    reward = Classifier(tmp_path)
    ids = torch.tensor([reward.tokenizer(TEXTS[0])["input_ids"]])
    scores = {}
    for attention in ("eager", "sdpa"):
        model = transformers.AutoModelForSequenceClassification.from_pretrained(
            tmp_path, attn_implementation=attention
        )
        with torch.no_grad():
            scores[attention] = model.eval()(input_ids=ids).logits.item()
    assert reward.score([TEXTS[0]]) == pytest.approx([scores["eager"]], rel=1e-4)
    assert abs(scores["eager"] - scores["sdpa"]) > 1e-3, "the cap matters"


def score_of_label(folder: Path, label: int | None) -> float:
    (score,) = Classifier(folder, label=label).score([TEXTS[0]])
    return score


def logits_of_first_text(folder: Path) -> np.ndarray:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return logits_alone(folder, tokenizer(TEXTS[0])["input_ids"])


def test_two_labels_are_a_difference_or_the_one_that_is_named(head):
    folder = head(labels=2)
    first, second = logits_of_first_text(folder)
    assert score_of_label(folder, None) == pytest.approx(second - first, abs=1e-5)
    assert score_of_label(folder, 0) == pytest.approx(first, abs=1e-5)


@pytest.mark.parametrize("label", [0, 1, 2])
def test_of_three_labels_one_is_named(head, label):
    folder = head(labels=3)
    wanted = logits_of_first_text(folder)[label]
    assert score_of_label(folder, label) == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("labels, label", [(3, None), (3, 3), (2, 2), (2, -1), (1, 1)])
def test_a_label_that_is_not_there_is_refused(head, labels, label):
    message = f"labels, numbered from 0; say which one is the reward, not {label}"
    with pytest.raises(ValueError, match=message):
        Classifier(head(labels=labels), label=label)


def test_scores_that_are_not_finite_are_refused(head):
    reward = Classifier(head())
    reward.model.classifier.bias.data.fill_(math.nan)
    with pytest.raises(ValueError, match="the reward of text 0 is not finite"):
        reward.score(["a"])


# ---- classifiers: chats


def test_a_chat_and_a_text_are_scored_as_their_tokens(head):
    folder = head("llama")
    reward = Classifier(folder)
    turns = rewards.chat(QUESTION, ANSWER)
    chat_ids = reward.tokenizer.apply_chat_template(turns, return_dict=False)
    assert chat_ids.count(0) == 1, "one BOS"
    text_ids = reward.tokenizer(ANSWER)["input_ids"]
    wanted = scores_alone(folder, [chat_ids, text_ids])
    assert reward.score([turns, ANSWER]) == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize("count", [0, 2])
def test_a_chat_has_one_bos_whatever_its_template_does(head, count):
    """Published reward models are scored by text to which the tokenizer adds a BOS, or not."""
    reward = Classifier(head("llama"))
    tokenizer = reward.tokenizer
    turns = rewards.chat(QUESTION, ANSWER)
    wanted = tokenizer.apply_chat_template(turns, return_dict=False)
    assert wanted.count(0) == 1
    assert reward._ids(turns) == wanted
    bos = "{{ bos_token }}"
    tokenizer.chat_template = tokenizer.chat_template.replace(bos, bos * count)
    assert tokenizer.apply_chat_template(turns, return_dict=False).count(0) == count
    assert reward._ids(turns) == wanted


def test_empty_fields_do_not_change_a_chats_reward(head):
    """Through Arrow every turn has the fields of all turns, as None."""
    reward = Classifier(head("llama"))
    name = "{% if messages[0].name is defined %}{{ messages[0].name }}{% endif %}"
    reward.tokenizer.chat_template = name + reward.tokenizer.chat_template
    turns = rewards.chat(QUESTION, ANSWER)
    with_name = [turn | {"name": None} for turn in turns]
    assert reward._ids(with_name) == reward._ids(turns)


def test_the_day_does_not_change_a_chats_reward(head):
    """Some templates write today's date."""
    reward = Classifier(head("llama"))
    day = "{{ strftime_now('%d %b %Y') }}"
    reward.tokenizer.chat_template = day + reward.tokenizer.chat_template
    ids = reward._ids(rewards.chat(QUESTION, ANSWER))
    assert "26 Jul 2024" in reward.tokenizer.decode(ids)


# ---- classifiers: long texts


@pytest.mark.parametrize("text", [rewards.chat(QUESTION, TEXTS[0]), TEXTS[0]], ids=["chat", "text"])
def test_a_long_text_loses_its_end(head, text):
    """Also where the tokenizer was saved with another side, as by some trainings of rewards."""
    folder = head("llama")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, truncation_side="left")
    tokenizer.save_pretrained(folder)
    saved = transformers.AutoTokenizer.from_pretrained(folder)
    assert saved.truncation_side == "left"
    whole = Classifier(folder)._ids(text)
    assert len(whole) > 20
    assert Classifier(folder, max_tokens=20)._ids(text) == whole[:20]


def test_long_texts_are_cut_to_what_the_model_reads(head):
    """The tiny encoder has 512 positions: what comes after them has no effect."""
    reward = Classifier(head())
    assert reward.max_tokens == 512
    text = " ".join(TEXTS)
    assert len(reward._ids(text)) == 512
    score, longer_score = reward.score([text, text + " awful"])
    assert longer_score == score


def test_max_tokens_can_be_lowered(head):
    assert Classifier(head(), max_tokens=64).max_tokens == 64


ENCODER = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}


def small(kind: str, tmp_path: Path, **shape) -> Path:
    """Write a random sequence-classification model of another architecture."""
    model_config = transformers.AutoConfig.for_model(
        kind, vocab_size=512, pad_token_id=2, num_labels=1, **shape
    )
    folder = tmp_path / kind
    save_random_classifier(folder, model_config, 8)
    save_tokenizer(assets.model_dir("tiny-encoder"), folder)
    return folder


@pytest.mark.parametrize(
    "kind, readable, settings",
    [
        ("bert", 34, {}),
        ("roberta", 31, {}),
        ("xlm-roberta", 31, {}),
        ("mpnet", 32, {}),
        ("ibert", 31, {}),
        ("longformer", 31, {"attention_window": [8]}),
    ],
)
def test_relatives_of_roberta_read_less_than_their_positions(tmp_path, kind, readable, settings):
    """Their positions begin behind the padding id (2 here, MPNet's own is 1).

    The rest would be an index error.
    """
    folder = small(kind, tmp_path, max_position_embeddings=34, **ENCODER, **settings)
    reward = Classifier(folder)
    assert reward.max_tokens == readable
    texts = [" ".join(TEXTS[:9]), TEXTS[0]]
    texts_ids = [reward._ids(text) for text in texts]
    assert len(texts_ids[0]) == readable
    wanted = scores_alone(folder, texts_ids)
    assert reward.score(texts) == pytest.approx(wanted, abs=1e-4)


def test_a_model_that_reads_the_last_position_gets_no_padding(tmp_path):
    """XLNet pads on the left."""
    folder = small("xlnet", tmp_path, d_model=32, n_layer=2, n_head=2, d_inner=64)
    reward = Classifier(folder)
    assert reward.max_tokens == 4096, "its configuration says -1, which is no limit"
    texts = [TEXTS[0], "A good film.", "Bad"]
    texts_ids = [reward._ids(text) for text in texts]
    wanted = scores_alone(folder, texts_ids)
    assert reward.score(texts) == pytest.approx(wanted, abs=1e-4)
    reward.token_budget = 8192
    error = np.abs(reward.score(texts) - wanted)
    assert error.max() > 0.05, "what padding would make of them"


# ---- classifiers: what is refused


def test_an_encoder_without_a_head_is_no_reward_model():
    """transformers would give it a random one, another in each process."""
    with pytest.raises(ValueError, match="is no finished reward model, it lacks .*classifier"):
        Classifier(assets.model_dir("tiny-encoder"))


def test_pickled_weights_are_refused(head, tmp_path):
    folder = head()
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        Classifier(folder)
    with pytest.raises(OSError, match="safetensors"):
        fit_reward.train_classifier(
            str(folder), TEXTS, LABELS, tmp_path, held_out=HELD_OUT, seed=0, precision="fp32"
        )


# ---- classifiers: training


def easy(n: int, seed: int) -> tuple[list[str], list[int]]:
    """Return reviews of unrelated words, positive if they hold the word "film", and labels."""
    all_words = " ".join(TEXTS).lower().split()
    words = sorted({word for word in all_words if word.isalpha() and word != "film"})
    draw = random.Random(seed)
    texts = []
    labels = []
    for i in range(n):
        label = i % 2
        review = draw.sample(words, 8)
        if label:
            review.insert(4, "film")
        texts.append(" ".join(review))
        labels.append(label)
    return texts, labels


def test_classifier_learns_a_word(tmp_path):
    """AUC is far above chance after one epoch, and the saved folder is what was judged."""
    texts, labels = easy(1536, 0)
    held_out = easy(200, 1)
    facts = fit_reward.train_classifier(
        str(assets.model_dir("tiny-encoder")),
        texts,
        labels,
        tmp_path,
        held_out=held_out,
        seed=0,
        lr=1e-2,
        batch=32,
        frozen=0,
        precision="fp32",
    )
    assert facts["auc"] > 0.9
    assert facts["accuracy"] > 0.75
    assert facts["trained_on"] == 1536
    judged = fit_reward.held_out_facts(Classifier(tmp_path), *held_out)
    assert judged.items() <= facts.items()
    assert not list(tmp_path.glob("*.bin"))


@pytest.fixture
def train_frozen(tmp_path):
    """Return a function that trains the encoder above its first layer, and returns its weights."""
    texts, labels = easy(32, 0)

    def train(name: str, seed: int) -> dict[str, torch.Tensor]:
        fit_reward.train_classifier(
            str(assets.model_dir("tiny-encoder")),
            texts,
            labels,
            tmp_path / name,
            held_out=easy(8, 1),
            seed=seed,
            batch=8,
            frozen=1,
            precision="fp32",
        )
        return Classifier(tmp_path / name).model.state_dict()

    return train


def test_only_the_layers_above_the_frozen_ones_learn(train_frozen):
    weights = train_frozen("a", seed=0)
    encoder = transformers.AutoModel.from_pretrained(assets.model_dir("tiny-encoder"))
    moved = set()
    for name, before in encoder.state_dict().items():
        if not torch.equal(before, weights[f"bert.{name}"]):
            moved.add(name)
    in_layer_1 = {name for name in moved if name.startswith("encoder.layer.1.")}
    in_pooler = {name for name in moved if name.startswith("pooler.")}
    assert in_layer_1
    assert in_pooler
    assert moved == in_layer_1 | in_pooler


def test_a_seed_fixes_what_is_learnt(train_frozen):
    first = train_frozen("a", seed=0)
    again = train_frozen("b", seed=0)
    other = train_frozen("c", seed=1)
    for name, weight in first.items():
        assert torch.equal(again[name], weight)
    assert not torch.equal(first["classifier.weight"], other["classifier.weight"])


def test_too_few_texts_are_refused(tmp_path):
    with pytest.raises(ValueError, match="3 texts are fewer than one batch of 32"):
        fit_reward.train_classifier(
            "unread", TEXTS[:3], LABELS[:3], tmp_path, held_out=HELD_OUT, seed=0, precision="fp32"
        )


def trained(folder: Path, encoder: Path | None = None, **options) -> dict[str, torch.Tensor]:
    """Train an encoder for one step at learning rate 1e-3; return its weights."""
    texts, labels = easy(8, 0)
    fit_reward.train_classifier(
        str(encoder or assets.model_dir("tiny-encoder")),
        texts,
        labels,
        folder,
        held_out=easy(8, 1),
        seed=0,
        batch=8,
        lr=1e-3,
        frozen=0,
        **options,
    )
    return transformers.AutoModelForSequenceClassification.from_pretrained(folder).state_dict()


def test_precision_fp32_is_float32_throughout(tmp_path):
    """Its one step is AdamW's by hand, on float32 gradients."""
    encoder = assets.model_dir("tiny-encoder")
    texts, labels = easy(8, 0)
    torch.manual_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        encoder, num_labels=1, dtype=torch.float32
    )
    model.train()
    model.base_model.embeddings.requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(8, generator=generator).tolist()
    tokenizer = transformers.AutoTokenizer.from_pretrained(encoder)
    inputs = tokenizer(
        [texts[i] for i in order], padding=True, return_tensors="pt", truncation=True, max_length=64
    )
    logits = model(**inputs).logits[:, 0]
    targets = torch.tensor([float(labels[i]) for i in order])
    torch.nn.functional.binary_cross_entropy_with_logits(logits, targets).backward()
    weights = trained(tmp_path / "fp32", precision="fp32")
    for name, parameter in model.named_parameters():
        wanted = parameter.detach()
        gradient = parameter.grad
        if gradient is not None:
            decayed = wanted * (1 - 1e-3 * 0.01)
            direction = gradient / (gradient.abs() + 1e-8)
            wanted = decayed - 1e-3 * direction
        torch.testing.assert_close(weights[name], wanted, rtol=0, atol=1e-5, msg=name)


@pytest.mark.skipif(not BF16, reason="bfloat16 is refused on this CPU, which would emulate it")
def test_precision_bf16_is_another_and_the_one_by_default(tmp_path):
    exact = trained(tmp_path / "fp32", precision="fp32")
    rounded = trained(tmp_path / "bf16", precision="bf16")
    default = trained(tmp_path / "default")
    assert any(not torch.equal(rounded[name], exact[name]) for name in exact)
    assert all(torch.equal(rounded[name], default[name]) for name in exact)


def without_dropout(tmp_path: Path) -> Path:
    """Write the tiny encoder without dropout, of whose draws a training then does not depend."""
    source = assets.model_dir("tiny-encoder")
    encoder = tmp_path / "encoder"
    model = transformers.AutoModel.from_pretrained(
        source, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    model.save_pretrained(encoder)
    save_tokenizer(source, encoder)
    return encoder


def test_a_lean_training_has_the_same_gradients(tmp_path):
    """After one step the weights are those of a training that computes all states."""
    encoder = without_dropout(tmp_path)
    whole = trained(tmp_path / "whole", encoder, precision="fp32")
    lean = trained(tmp_path / "lean", encoder, precision="fp32", lean=True)
    for name, weight in whole.items():
        torch.testing.assert_close(lean[name], weight, rtol=0, atol=2e-5, msg=name)


def test_an_encoder_with_few_positions_is_trained_on_what_it_reads(tmp_path):
    """A RoBERTa of 12 positions reads 9 tokens, where texts would be cut to 64: no index error."""
    encoder = small("roberta", tmp_path, max_position_embeddings=12, **ENCODER)
    assert Classifier(encoder).max_tokens == 9
    weights = trained(tmp_path / "out", encoder, precision="fp32")
    positions = weights["roberta.embeddings.position_embeddings.weight"]
    assert positions.shape == (12, 16)


def test_a_trained_classifier_has_the_mode_that_the_umask_says(tmp_path):
    """safetensors writes for the owner alone: a colleague could not read the reward."""
    mask = os.umask(0o027)
    try:
        trained(tmp_path / "out", precision="fp32")
    finally:
        os.umask(mask)
    assert (tmp_path / "out" / "model.safetensors").exists()
    for file in (tmp_path / "out").iterdir():
        mode = file.stat().st_mode & 0o777
        assert mode == 0o640, file.name


@pytest.mark.slow
def test_minilm_tells_the_reviews_apart(tmp_path):
    facts = fit_reward.train_classifier(
        str(real("minilm")),
        TEXTS[:64],
        LABELS[:64],
        tmp_path,
        held_out=HELD_OUT,
        seed=0,
        batch=8,
        lr=2e-4,
        precision="fp32",
    )
    assert facts["auc"] > 0.8


# ---- batches


@pytest.mark.parametrize("budget", [0, 1, 17, 40, 1000])
def test_token_batches_hold_every_index_once_longest_first(budget):
    lengths = np.random.default_rng(0).integers(1, 40, size=50).tolist()
    batches = rewards.token_batches(lengths, budget)
    indices = [i for batch in batches for i in batch]
    assert sorted(indices) == list(range(50))
    assert [lengths[i] for i in indices] == sorted(lengths, reverse=True)


@pytest.mark.parametrize("budget", [0, 1, 17, 40, 1000])
def test_token_batches_fill_their_budget(budget):
    """None is above it when padded unless it is one text, and no further text would have fitted."""
    lengths = np.random.default_rng(0).integers(1, 40, size=50).tolist()
    *full_batches, last_batch = rewards.token_batches(lengths, budget)
    for batch in (*full_batches, last_batch):
        width = lengths[batch[0]]
        assert len(batch) == 1 or width * len(batch) <= budget
    for batch in full_batches:
        width = lengths[batch[0]]
        assert width * (len(batch) + 1) > budget


def test_token_batches_by_hand():
    assert rewards.token_batches([3, 10, 3, 2], 12) == [[1], [0, 2, 3]]


def test_no_text_needs_no_batch():
    assert rewards.token_batches([], 12) == []


# ---- VADER, n-grams


@pytest.mark.parametrize(
    "text, valence",
    [
        ("good", 1.9),
        ("a good film", 1.9),
        ("bad", -2.5),
        ("not good", -0.74 * 1.9),
        ("very good", 1.9 + 0.293),
        ("good!", 1.9 + 0.292),
        ("good but bad", 0.5 * 1.9 - 1.5 * 2.5),
        ("a film", 0.0),
        ("great and good", 3.1 + 1.9),
    ],
)
def test_vader_by_hand(text, valence):
    """compound = s / √(s² + 15), s the sum of valences: good 1.9, bad −2.5, great 3.1.

    "not" multiplies by −0.74, "very" adds 0.293, "!" adds 0.292; of two clauses joined by "but" the
    first counts half, the second 1.5 times.
    """
    compound = valence / math.sqrt(valence**2 + 15)
    assert Vader().score([text]) == pytest.approx([compound], abs=1e-4)


@pytest.mark.parametrize(
    "texts_ids, n, wanted",
    [
        ([[1, 2, 1, 2, 1]], 2, 2 / 4),  # 12 21 12 21, two of them new
        ([[1, 2, 1, 2, 1], [2, 1], [7], []], 2, 2 / 5),
        ([[1, 2, 3]], 1, 1),
    ],
)
def test_distinct_n_by_hand(texts_ids, n, wanted):
    assert rewards.distinct_n(texts_ids, n) == wanted


def test_distinct_n_of_no_ngram_is_unknown():
    assert math.isnan(rewards.distinct_n([[1], []]))


@pytest.mark.parametrize(
    "ids, wanted",
    [
        ([1, 2, 1, 2, 1], 1 / 3),  # trigrams 121 212 121
        ([5] * 10, 7 / 8),
        ([1, 2], 0),
        ([], 0),
        ([1, 2, 3, 4], 0),
    ],
)
def test_repetition_by_hand(ids, wanted):
    assert rewards.repetition(ids) == pytest.approx(wanted)


# ---- the scorer and the job


@pytest.fixture(scope="module")
def answers(tmp_path_factory) -> Path:
    """Write six prompts with two responses each; one response is empty, one only ends."""
    tokenizer = templates.load_tokenizer(assets.model_dir("tiny"))
    prompts = []
    responses = []
    for i in range(6):
        ids = templates.render(tokenizer, TEXTS[i], "plain")
        cut = 4 + i
        prompts.append({"id": f"B{i}", "prompt_ids": ids[:cut]})
        for sample in (0, 1):
            length = 3 + 4 * i + sample
            response = {
                "id": f"B{i}",
                "sample": sample,
                "response_ids": [*ids[cut : cut + length], 1],
                "logp": -1.5 * i,
            }
            responses.append(response)
    responses[7]["response_ids"] = []
    responses[8]["response_ids"] = [1]
    folder = tmp_path_factory.mktemp("answers")
    (folder / "prompts.json").write_text(json.dumps(prompts))
    write_lines(folder / "responses.jsonl", responses)
    return folder


def files_of(answers: Path) -> dict[str, str]:
    return {
        "target": str(assets.model_dir("tiny")),
        "prompts": str(answers / "prompts.json"),
        "responses": str(answers / "responses.jsonl"),
    }


def read_answers(answers: Path) -> tuple[dict[str, dict], list[dict]]:
    """Return {id: prompt} and the responses."""
    prompts = json.loads((answers / "prompts.json").read_text())
    return {prompt["id"]: prompt for prompt in prompts}, read_lines(answers / "responses.jsonl")


def decode(ids: list[int]) -> str:
    tokenizer = templates.load_tokenizer(assets.model_dir("tiny"))
    return tokenizer.decode(ids, skip_special_tokens=True)


def whole_texts(answers: Path) -> list[str]:
    """Return each response behind its prompt, as text."""
    prompts, responses = read_answers(answers)
    texts = []
    for response in responses:
        prompt_ids = prompts[response["id"]]["prompt_ids"]
        texts.append(decode(prompt_ids + response["response_ids"]))
    return texts


def column(rows: list[dict], name: str) -> list:
    return [row[name] for row in rows]


def bag_recipe(bag) -> dict:
    folder, _ = bag
    return {"kind": "bag_of_words", "folder": str(folder)}


@pytest.fixture(scope="module")
def scored(answers, bag, tmp_path_factory) -> Path:
    """Score the answers in a child: with logp_sft of five prompts, without it, by one reward."""
    folder = tmp_path_factory.mktemp("scored")
    classifier = save_head(folder / "classifier")
    recipes = {
        "words": bag_recipe(bag),
        "model": {"kind": "classifier", "folder": str(classifier), "token_budget": 64},
        "vader": {"kind": "vader"},
    }
    files = files_of(answers)
    settings = {"precision": "fp32"}
    with launch.Worker("beyond_dpo.jobs.score", settings, folder / "log", desc="score") as worker:
        out = str(folder / "scores.jsonl")
        facts = worker.call("score", rewards=recipes, **files, out=out, reference_prompts=5)
        worker.call("score", rewards=recipes, **files, out=str(folder / "no_reference.jsonl"))
        vader = {"vader": recipes["vader"]}
        worker.call("score", rewards=vader, **files, out=str(folder / "vader.jsonl"))
    (folder / "facts.json").write_text(json.dumps(facts))
    return folder


@pytest.mark.slow
def test_scores_belong_to_their_responses(answers, scored):
    _, responses = read_answers(answers)
    table = read_lines(scored / "scores.jsonl")
    for name in ("id", "sample", "logp"):
        assert column(table, name) == column(responses, name)


@pytest.mark.slow
def test_a_reward_reads_prompt_and_response_together(answers, bag, scored):
    texts = whole_texts(answers)
    assert texts[0].startswith(TEXTS[0][:10])
    assert not any("</s>" in text for text in texts)
    own_rewards = {
        "words": rewards.BagOfWords(bag[0]),
        "model": Classifier(scored / "classifier"),
        "vader": Vader(),
    }
    table = read_lines(scored / "scores.jsonl")
    for name, reward in own_rewards.items():
        assert column(table, name) == pytest.approx(reward.score(texts), abs=1e-4)


@pytest.mark.slow
def test_length_repetition_and_distinct_2_are_those_of_the_response(answers, scored):
    _, responses = read_answers(answers)
    table = read_lines(scored / "scores.jsonl")
    responses_ids = column(responses, "response_ids")
    assert column(table, "length") == [len(ids) for ids in responses_ids]
    repetitions = [rewards.repetition(ids) for ids in responses_ids]
    assert column(table, "repetition") == pytest.approx(repetitions, abs=1e-5)
    distinct_2 = round(rewards.distinct_n(responses_ids), 4)
    assert json.loads((scored / "facts.json").read_text()) == {"distinct_2": distinct_2}


@pytest.mark.slow
@torch.no_grad()
def test_logp_sft_is_the_responses_for_the_first_prompts(answers, scored):
    prompts, responses = read_answers(answers)
    table = read_lines(scored / "scores.jsonl")
    assert column(table, "logp_sft").count(None) == 3
    model = transformers.AutoModelForCausalLM.from_pretrained(
        assets.model_dir("tiny"), dtype=torch.float32
    )
    for row, response in zip(table, responses, strict=True):
        prompt_ids = prompts[response["id"]]["prompt_ids"]
        response_ids = response["response_ids"]
        if response["id"] == "B5" or not response_ids:
            assert row["logp_sft"] is None
            continue
        input_ids = torch.tensor([prompt_ids + response_ids])
        logps = model(input_ids).logits[0].log_softmax(-1)
        logp = 0.0
        for position, token in enumerate(response_ids, start=len(prompt_ids)):
            logp += logps[position - 1, token].item()
        assert row["logp_sft"] == pytest.approx(logp, abs=1e-3)


@pytest.mark.slow
def test_without_reference_prompts_there_is_no_logp_sft(scored):
    table = read_lines(scored / "scores.jsonl")
    without_reference = [row | {"logp_sft": None} for row in table]
    assert read_lines(scored / "no_reference.jsonl") == without_reference


@pytest.mark.slow
def test_a_reward_does_not_depend_on_the_others(scored):
    table = read_lines(scored / "no_reference.jsonl")
    for row in table:
        del row["words"]
        del row["model"]
    assert read_lines(scored / "vader.jsonl") == table


@pytest.fixture
def scorer():
    return Scorer("fp32")


@pytest.fixture
def spoken(answers, tmp_path) -> Path:
    """Write the answers with their prompts as they were spoken: one user's text, or turns."""
    prompts, responses = read_answers(answers)
    for i, prompt in enumerate(prompts.values()):
        prompt["text"] = TEXTS[i] if i % 2 else [{"role": "user", "content": "Hi"}]
    (tmp_path / "prompts.json").write_text(json.dumps(list(prompts.values())))
    write_lines(tmp_path / "responses.jsonl", responses)
    return tmp_path


def drop_chat_template(folder: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = None
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer.save_pretrained(folder)


def test_a_finished_reward_reads_turns(spoken, head, bag, scorer):
    """One without a chat template reads the text, as all rewards do that were trained here."""
    model = head("llama")
    bare = head("bert")
    drop_chat_template(bare)
    recipes = {
        "turns": {"kind": "finished", "folder": str(model)},
        "text": {"kind": "classifier", "folder": str(model)},
        "bare": {"kind": "finished", "folder": str(bare)},
        "words": bag_recipe(bag),
    }
    out = spoken / "scores.jsonl"
    scorer.score(recipes, **files_of(spoken), out=str(out))
    prompts, responses = read_answers(spoken)
    chats = []
    for response in responses:
        answer = decode(response["response_ids"])
        chats.append(rewards.chat(prompts[response["id"]]["text"], answer))
    assert chats[0][0] == {"role": "user", "content": "Hi"}
    assert chats[2][0] == {"role": "user", "content": TEXTS[1]}
    texts = whole_texts(spoken)
    wanted = {
        "turns": Classifier(model).score(chats),
        "text": Classifier(model).score(texts),
        "bare": Classifier(bare).score(texts),
        "words": rewards.BagOfWords(bag[0]).score(texts),
    }
    table = read_lines(out)
    for name, scores in wanted.items():
        assert column(table, name) == pytest.approx(scores, abs=1e-4)
    difference = np.abs(wanted["turns"] - wanted["text"])
    assert difference.max() > 0.01


def test_a_response_has_ended_if_its_last_token_is_an_end_token(answers, scorer, tmp_path):
    """Ended: all but the first, which was cut, the second, which goes on, and an empty one."""
    _, responses = read_answers(answers)
    responses[0]["response_ids"].pop()
    responses[1]["response_ids"] += [1, 7]
    write_lines(tmp_path / "responses.jsonl", responses)
    files = files_of(answers) | {"responses": str(tmp_path / "responses.jsonl")}
    out = tmp_path / "scores.jsonl"
    scorer.score({}, **files, out=str(out))
    assert templates.model_end_tokens(files["target"]) == [1]
    ended = column(read_lines(out), "ended")
    assert [i for i, value in enumerate(ended) if not value] == [0, 1, 7]
    assert set(ended) == {True, False}


def test_one_process_scores_for_several_sft_models(answers, scorer, tiny, tmp_path):
    """Each call's logp_sft is that of the model it names, whatever was asked before."""
    other = tmp_path / "other"
    shutil.copytree(tiny, other)
    tensors = load_file(other / "model.safetensors")
    halved = {name: tensor / 2 for name, tensor in tensors.items()}
    save_file(halved, other / "model.safetensors", metadata={"format": "pt"})
    logps = []
    for number, folder in enumerate([tiny, other, tiny]):
        files = files_of(answers) | {"target": str(folder)}
        out = tmp_path / f"{number}.jsonl"
        scorer.score({}, **files, out=str(out), reference_prompts=2)
        table = read_lines(out)
        logps.append([row["logp_sft"] for row in table if row["logp_sft"] is not None])
    assert logps[0] == logps[2]
    assert len(logps[0]) == len(logps[1]) > 0
    assert all(first != second for first, second in zip(logps[0], logps[1], strict=True))


def test_a_reward_is_loaded_once(answers, bag, scorer, tmp_path):
    files = files_of(answers)
    out = str(tmp_path / "out")
    words = bag_recipe(bag)
    vader = {"kind": "vader"}
    rewards.load.cache_clear()
    scorer.score({"gold": words}, **files, out=out)
    scorer.score({"gold": words, "vader": vader}, **files, out=out)
    scorer.score({"gold": words}, **files, out=out)
    assert rewards.load.cache_info().misses == 2


def test_unknown_kind_of_reward_is_named(answers, scorer, tmp_path):
    recipes = {"x": {"kind": "vaders"}}
    with pytest.raises(KeyError, match="vaders"):
        scorer.score(recipes, **files_of(answers), out=str(tmp_path / "out"))


def test_a_reward_of_a_world_without_labels_is_not_measured(tmp_path):
    job = {
        "kind": "finished",
        "held_out": [[], []],
        "out": str(tmp_path),
        "encoder": "unread",
        "trust_remote_code": False,
    }
    (tmp_path / "job.json").write_text(json.dumps(job))
    fit_reward.main(str(tmp_path / "job.json"))
    assert json.loads((tmp_path / "facts.json").read_text()) == {}


def fit_in_a_child(out: Path, **settings) -> dict:
    """Run `python -m beyond_dpo.jobs.fit_reward JOB.json`; return the facts that it leaves."""
    job = {
        "texts": TEXTS[:64],
        "labels": LABELS[:64],
        "held_out": HELD_OUT,
        "seed": 0,
        "out": str(out),
        **settings,
    }
    launch.run("beyond_dpo.jobs.fit_reward", job, out / "checkpoints", desc="train")
    return json.loads((out / "facts.json").read_text())


@pytest.mark.slow
def test_training_a_bag_of_words_in_a_child(bag, tmp_path):
    _, facts = bag
    assert fit_in_a_child(tmp_path, kind="bag_of_words") == facts


@pytest.mark.slow
def test_training_ngrams_in_a_child(person, tmp_path):
    texts, labels = spoiled.with_spoiled(TEXTS[:64], [1] * 64, 0)
    facts = fit_in_a_child(
        tmp_path, kind="ngrams", texts=texts, labels=labels, held_out=PERSONS_HELD_OUT
    )
    assert facts == person[1]


@pytest.mark.slow
def test_training_a_classifier_in_a_child(tmp_path):
    encoder = str(assets.model_dir("tiny-encoder"))
    facts = fit_in_a_child(tmp_path, kind="classifier", encoder=encoder, precision="fp32")
    assert facts["trained_on"] == 64
    assert facts["held_out"] == 32
    scores = Classifier(tmp_path).score(TEXTS[:2])
    assert np.isfinite(scores).all()


# ---- a reward that prefers nothing


def made(stage: str, **files) -> artifacts.Artifact:
    """Return a result with files of JSON lines ("name_jsonl") and of JSON ("name_json")."""

    def make(out: Path) -> None:
        for name, content in files.items():
            file = out / name.replace("_", ".")
            if name.endswith("_jsonl"):
                write_lines(file, content)
            else:
                file.write_text(json.dumps(content))

    return artifacts.Artifact(stage, 1, {"files": json.dumps(files)}, make)


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "ARTIFACTS", tmp_path / "artifacts")
    monkeypatch.setattr(paths, "FROZEN", tmp_path / "frozen")


@pytest.fixture
def replace_stage(store, monkeypatch):
    """Return a function that replaces a stage by a result, whatever it is asked for."""

    def replace(module, stage: str, result) -> None:
        monkeypatch.setattr(module, stage, lambda *_, **__: result)

    return replace


@pytest.fixture
def judged(replace_stage):
    """Return a function from the scores and tokens of two responses to three prompts to pairs."""

    def pairs(scores, responses_ids, **changes):
        cfg = config.load("expo", "smoke", world__prompts=3, world__samples=2, **changes)
        reward = stages.oracle(cfg.world)
        responses = []
        score_rows = []
        for i in range(6):
            row = {"id": f"B{i // 2}", "sample": i % 2}
            responses.append(row | {"response_ids": responses_ids[i]})
            score_rows.append(row | {reward: scores[i]})
        prompts = [{"id": f"B{i}", "prompt_ids": [i]} for i in range(3)]
        replace_stage(stages, "texts", made("texts", prompts_json=prompts))
        replace_stage(stages, "responses", made("responses", responses_jsonl=responses))
        replace_stage(stages, "scores", made("scores", scores_jsonl=score_rows))
        return stages.pairs(cfg)

    return pairs


def test_pairs_leave_out_prompts_whose_samples_tie_or_are_the_same(judged):
    """Of the second prompt both score 1.

    Of the third both are the same response, whatever a batch made of its score.
    """
    scores = [0, 1, 1, 1, 0.5, 0.50001]
    pairs = judged(scores, [[5], [6], [7], [8], [9], [9]])
    (row,) = read_rows(pairs.get() / "pairs.jsonl")
    assert row["id"] == "B0"
    assert row["prompt_ids"] == [0]
    assert row["responses"] == {"chosen": [6], "rejected": [5]}
    assert pairs.manifest["facts"] == {"pairs": 1, "ties_dropped": 2, "mean_gold_gap": 1.0}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({}, r"the gold reward scores all 2 responses to each of 3 prompts alike.*use"),
        (
            {"world__gold_rows": 0, "world__reward_model": "minilm"},
            "the reward model minilm scores .*: use another reward model, more",
        ),
    ],
)
def test_a_reward_that_prefers_nothing_is_said_in_words(judged, changes, message):
    """Before any training: which reward, of how many prompts, and what to do."""
    pairs = judged([1.0] * 6, [[5], [6], [7], [8], [9], [10]], **changes)
    with pytest.raises(config.ConfigError, match=message):
        pairs.get()


@pytest.mark.parametrize(
    "build, paper",
    [(stages.pairs, "expo"), (stages.reference, "expo"), (wrpo.main_result, "wrpo")],
)
def test_a_single_sample_is_refused_before_it_is_drawn(build, paper):
    cfg = config.load(paper, "smoke")
    world = dataclasses.replace(cfg.world, samples=1)
    cfg = dataclasses.replace(cfg, world=world)
    message = "world.samples=1: a preference needs two responses"
    with pytest.raises(config.ConfigError, match=message):
        build(cfg)


def test_no_pair_to_draw_from_is_said_in_words(replace_stage):
    replace_stage(stages, "pairs", made("texts", pairs_jsonl=[]))
    subset = stages.subset(config.load("expo", "smoke"), 0.5, 0)
    message = "texts-[0-9a-f]+ holds no pair to draw from: use more prompts"
    with pytest.raises(config.ConfigError, match=message):
        subset.get()


def answers_of(name: str, rows: list[tuple]) -> tuple[artifacts.Artifact, artifacts.Artifact]:
    """Return responses and their scores, of (prompt's id, tokens, reward)."""
    responses = []
    scores = []
    for sample, (prompt, ids, reward) in enumerate(rows):
        row = {"id": prompt, "sample": sample}
        responses.append(row | {"response_ids": ids})
        scores.append(row | {"reward": reward, "length": len(ids)})
    return (
        made(f"{name}-said", responses_jsonl=responses),
        made(f"{name}-judged", scores_jsonl=scores),
    )


@pytest.fixture
def fusing(replace_stage):
    """Give WRPO's stages prompts, a source's responses and the target's own ones.

    Responses are (prompt's id, tokens, reward).
    """

    def build(source, own, first=("a",), rest=("b", "c")):
        parts = {"first": first, "rest": rest, "prompts": (*first, *rest)}
        prompts = {}
        for part, ids in parts.items():
            prompts[f"{part}_json"] = [{"id": prompt, "prompt_ids": [1]} for prompt in ids]
        responses, scores = answers_of("source", source)
        replace_stage(stages, "texts", made("texts", **prompts))
        replace_stage(wrpo, "thirds", made("thirds", **prompts))
        replace_stage(wrpo.sources, "answers", responses)
        replace_stage(wrpo, "scored", scores)
        replace_stage(wrpo, "own", answers_of("own", own))
        return config.load("wrpo", "smoke")

    return build


SOURCE = [("a", [5], 1.0), ("b", [6], 1.0), ("c", [7], 1.0)]
OWN = [("b", [8], 0.0), ("b", [9], 1.0), ("c", [8], 0.0), ("c", [9], 1.0)]


def test_a_quadruple_needs_two_different_responses_of_the_targets_own(fusing):
    """Of c there is one that is not empty.

    It would be best and worst at once, a preference for itself.
    """
    own = [*OWN[:2], ("c", [9], 1.0), ("c", [], 0.0)]
    cfg = fusing(SOURCE, own)
    quadruples = wrpo.quadruples(cfg, ("one",), None)
    (row,) = read_rows(quadruples.get() / "pairs.jsonl")
    assert row["id"] == "b"
    source_chosen, target_chosen, rejected = config.FUSED
    assert row["responses"] == {source_chosen: [6], target_chosen: [9], rejected: [8]}
    assert quadruples.manifest["facts"] == {"quadruples": 1, "dropped": 1}


TIED = [
    ("a", [5], 1.0),
    ("a", [6], 1.0),
    ("b", [5], 1.0),
    ("b", [6], 1.0),
    ("c", [5], 1.0),
    ("c", [6], 1.0),
]


@pytest.mark.parametrize(
    "source, message",
    [
        (TIED, "finds no best response of one to any of 3 prompts .all score alike"),
        (
            [*TIED[:2], *SOURCE[1:]],
            "finds no best response of one to any of 1 prompts for Target-SFT",
        ),
    ],
)
def test_rewards_that_prefer_nothing_of_the_sources_are_said_in_words(fusing, source, message):
    cfg = fusing(source, OWN)
    with pytest.raises(config.ConfigError, match=message):
        wrpo.fusion(cfg, ("one",)).get()


def test_rewards_that_prefer_nothing_of_the_targets_own_are_said_in_words(fusing):
    alike = [(prompt, ids, 0.5) for prompt, ids, _ in OWN]
    cfg = fusing(SOURCE, alike)
    message = "finds for none of 2 prompts a best .* sampling.temperature$"
    with pytest.raises(config.ConfigError, match=message):
        wrpo.quadruples(cfg, ("one",), None).get()


def test_a_draw_without_a_quadruple_is_said_in_words(fusing):
    """Only one of eight prompts has a quadruple; a draw of one prompt misses it for some seed."""
    rest = tuple("bcdefghi")
    source = [(prompt, [7], 1.0) for prompt in ("a", *rest)]
    cfg = fusing(source, OWN[:2], rest=rest)
    cfg = dataclasses.replace(cfg, fraction=0.1)
    quadruples = wrpo.quadruples(cfg, ("one",), None)
    message = "fraction=0.1 draws 1 of 8 prompts, and none of the 1 quadruples is of these"
    with pytest.raises(config.ConfigError, match=message):
        for seed in range(4):
            drawn = wrpo.draw(cfg, quadruples, seed).get()
            (row,) = read_rows(drawn / "pairs.jsonl")
            assert row["id"] == "b"
