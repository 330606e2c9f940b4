"""Reward models on tiny real models: saved and loaded without a pickle, scores that depend on their
text alone.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from beyond_dpo import precision, rewards, templates
from beyond_dpo.jobs import fit_reward
from beyond_dpo.jobs.score import Scorer
from beyond_dpo.machine import launch, paths
from beyond_dpo.pipeline import artifacts, assets, config, stages, wrpo
from beyond_dpo.rewards import Classifier, Vader
from beyond_dpo.rows import read_rows

ROWS = [json.loads(line) for line in (paths.FIXTURES / "reviews.jsonl").read_text().splitlines()]
TEXTS, LABELS = [r["text"] for r in ROWS], [r["label"] for r in ROWS]
HELD_OUT = (TEXTS[64:], LABELS[64:])
BF16 = precision.computes_bf16(precision.CPUINFO) or torch.cuda.is_available()


def real(name):
    try:
        return assets.model_dir(name)
    except assets.AssetError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def bag(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bag")
    facts = fit_reward.train_bag_of_words(
        TEXTS[:64], LABELS[:64], folder, held_out=HELD_OUT, seed=0
    )
    return folder, facts


@pytest.fixture
def head(tmp_path):
    """Write a random sequence-classification model with the tiny tokenizer; return its folder."""

    def build(kind="bert", labels=1, **changes):
        folder, config = (
            tmp_path / f"{kind}{labels}{len(changes)}",
            {"num_labels": labels, "pad_token_id": 2} | changes,
        )
        source = assets.model_dir("tiny-encoder" if kind == "bert" else "tiny")
        with torch.random.fork_rng():
            torch.manual_seed(1)
            config = transformers.AutoConfig.from_pretrained(source, **config)
            model = transformers.AutoModelForSequenceClassification.from_config(config)
            for parameter in model.parameters():
                parameter.data.mul_(
                    12 if parameter.ndim == 2 else 1
                )  # so that scores differ visibly
            model.save_pretrained(folder)
        transformers.AutoTokenizer.from_pretrained(source).save_pretrained(folder)
        return folder

    return build


def alone(folder, ids):
    """A model's logits for one text, without batch or padding."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0].double().numpy()


# --- bag of words


def test_bag_of_words_learns_and_round_trips(bag):
    """The loaded reward is the trained one: same facts from its own scores, and scikit-learn's own
    logits.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    folder, facts = bag
    reward = rewards.BagOfWords(folder)
    scores = reward.score(TEXTS)
    vectorizer = TfidfVectorizer(
        ngram_range=(1, 2), min_df=2, max_features=200_000, sublinear_tf=True
    )
    trained = LogisticRegression(C=4.0, max_iter=400, random_state=0).fit(
        vectorizer.fit_transform(TEXTS[:64]), LABELS[:64]
    )
    assert scores == pytest.approx(trained.decision_function(vectorizer.transform(TEXTS)), abs=1e-9)
    assert fit_reward.held_out_facts(reward, *HELD_OUT) == {
        k: facts[k] for k in ("held_out", "accuracy", "auc")
    }
    assert (
        facts["trained_on"] == 64
        and facts["features"] == len(reward.coef)
        and facts["held_out"] == 32
    )
    assert facts["accuracy"] > 0.75 and facts["auc"] > 0.8, "word counts tell these reviews apart"
    assert reward.score(TEXTS[5:6])[0] == pytest.approx(scores[5], abs=1e-12)


def test_bag_of_words_holds_no_pickle(bag):
    folder, _ = bag
    assert sorted(p.name for p in folder.iterdir()) == ["weights.npz", "words.json"]
    with np.load(folder / "weights.npz", allow_pickle=False) as arrays:
        assert {name: arrays[name].dtype.kind for name in arrays} == {
            "idf": "f",
            "coef": "f",
            "intercept": "f",
        }
    np.savez(folder / "bad.npz", idf=np.array([{}], dtype=object))
    bad = folder / "copy"
    bad.mkdir()
    (bad / "words.json").write_bytes((folder / "words.json").read_bytes())
    (folder / "bad.npz").rename(bad / "weights.npz")
    with pytest.raises((ValueError, KeyError), match="allow_pickle=False|coef"):
        rewards.BagOfWords(bad)


def test_held_out_facts_by_hand():
    """Scores 2, −1, 1, −3 for labels 1, 1, 0, 0: the signs of two are right; of the four (1, 0)
    pairs three are in
    order: 2 > 1, 2 > −3, −1 > −3, not −1 > 1.
    """

    class Fixed:
        def score(self, texts):
            return np.array([2.0, -1.0, 1.0, -3.0])

    assert fit_reward.held_out_facts(Fixed(), ["a", "b", "c", "d"], [1, 1, 0, 0]) == {
        "held_out": 4,
        "accuracy": 0.5,
        "auc": 0.75,
    }


# --- classifiers


@pytest.mark.parametrize("budget", [1, 60, 8192])
@pytest.mark.parametrize(
    "shape",
    [
        {"kind": "bert"},
        {"kind": "llama"},
        {"kind": "llama", "pad_token_id": None},  # transformers itself refuses a batch without one
        {"kind": "llama", "pad_token_id": 1},  # the end token
        {"kind": "llama", "pad_token_id": -1},  # as configurations of the first Llama say it
    ],
    ids=[
        "encoder",
        "decoder",
        "decoder without pad",
        "decoder with pad = end",
        "decoder with pad = -1",
    ],
)
def test_scores_are_those_of_each_text_alone(shape, budget, head):
    folder = head(**shape)
    texts = []
    for i, text in enumerate(TEXTS[:7]):
        words = " ".join(text.split()[: 3 + 5 * i])
        texts.append(words + "</s>" if i % 2 else words)
    random.Random(0).shuffle(texts)
    reward = Classifier(folder, token_budget=budget)
    ids = [reward.tokenizer(text)["input_ids"] for text in texts]
    assert len({len(i) for i in ids}) > 4 and any(i[-1] == 1 for i in ids)
    expected = [alone(folder, i)[0] for i in ids]
    assert reward.score(texts) == pytest.approx(expected, abs=1e-4)
    assert np.ptp(expected) > 0.05, "too alike to tell"
    assert reward.score([]).shape == (0,)


@pytest.mark.parametrize("cap", [4.0, 50.0])
def test_a_reward_model_computes_with_its_capped_attention(tmp_path, cap):
    """sdpa leaves Gemma-2's cap out in silence."""
    shape = {
        "vocab_size": 512,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "head_dim": 16,
    }
    shape |= {"num_attention_heads": 2, "num_key_value_heads": 1, "query_pre_attn_scalar": 16}
    config = transformers.Gemma2Config(
        **shape, attn_logit_softcapping=cap, initializer_range=0.8, num_labels=1, pad_token_id=2
    )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        transformers.Gemma2ForSequenceClassification(config).save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(assets.model_dir("tiny")).save_pretrained(tmp_path)
    reward = Classifier(tmp_path)
    found = {}
    for kind in ("eager", "sdpa"):
        model = transformers.AutoModelForSequenceClassification.from_pretrained(
            tmp_path, attn_implementation=kind
        )
        ids = torch.tensor([reward.tokenizer(TEXTS[0])["input_ids"]])
        with torch.no_grad():
            found[kind] = model.eval()(input_ids=ids).logits[0, 0].item()
    assert reward.score(TEXTS[:1]) == pytest.approx([found["eager"]], rel=1e-4)
    assert abs(found["eager"] - found["sdpa"]) > 1e-3, "the cap matters"


def test_labels(head):
    """Two labels: the second logit minus the first; of more, or on request, the one that is
    named.
    """
    two, three = head(labels=2), head(labels=3)
    text = TEXTS[0]
    ids = Classifier(two).tokenizer(text)["input_ids"]
    logits = alone(two, ids)
    assert Classifier(two).score([text]) == pytest.approx([logits[1] - logits[0]], abs=1e-5)
    assert Classifier(two, label=0).score([text]) == pytest.approx([logits[0]], abs=1e-5)
    for label in range(3):
        assert Classifier(three, label=label).score([text]) == pytest.approx(
            [alone(three, ids)[label]], abs=1e-5
        )
    for folder, label in ((three, None), (three, 3), (two, 2), (two, -1), (head(), 1)):
        with pytest.raises(
            ValueError, match=f"labels, numbered from 0; say which one is the reward, not {label}"
        ):
            Classifier(folder, label=label)


def test_chat_turns_are_rendered_once_with_one_bos(head):
    folder = head("llama")
    turns = [
        {"role": "user", "content": "A good film?"},
        {"role": "assistant", "content": "A dull one."},
    ]
    reward = Classifier(folder)
    ids = reward.tokenizer.apply_chat_template(turns, return_dict=False)
    assert ids.count(0) == 1
    scores = reward.score([turns, "A dull one."])
    assert scores[0] == pytest.approx(alone(folder, ids)[0], abs=1e-4)
    assert scores[1] == pytest.approx(
        alone(folder, reward.tokenizer("A dull one.")["input_ids"])[0], abs=1e-4
    )


@pytest.mark.parametrize("bos", ["", "{{ bos_token }}{{ bos_token }}"], ids=["none", "two"])
def test_a_chat_has_one_bos_whatever_its_template_does(head, bos):
    """Published reward models are scored by text without BOS to which the tokenizer adds one, or by
    the template's.
    """
    turns, reward = rewards.chat("A good film?", "A dull one."), Classifier(head("llama"))
    wanted = reward._ids(turns)
    assert (
        wanted == reward.tokenizer.apply_chat_template(turns, return_dict=False)
        and wanted.count(0) == 1
    )
    reward.tokenizer.chat_template = reward.tokenizer.chat_template.replace("{{ bos_token }}", bos)
    assert reward.tokenizer.apply_chat_template(turns, return_dict=False).count(0) == len(bos) // 15
    assert reward._ids(turns) == wanted


def test_empty_fields_and_the_day_do_not_change_a_chats_reward(head):
    """Through Arrow every turn has the fields of all turns, as None; some templates write today's
    date.
    """
    reward = Classifier(head("llama"))
    named = (
        "{% if messages[0].name is defined %}{{ messages[0].name }}{% endif %}{{ "
        "strftime_now('%d %b %Y') }}"
    )
    reward.tokenizer.chat_template = named + reward.tokenizer.chat_template
    turns = rewards.chat("A good film?", "A dull one.")
    ids = reward._ids([turn | {"name": None} for turn in turns])
    assert ids == reward._ids(turns) and "26 Jul 2024" in reward.tokenizer.decode(ids)


def test_a_long_chat_loses_its_end(head):
    """Also where the tokenizer was saved with another side, as by some trainings of reward
    models.
    """
    folder = head("llama")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, truncation_side="left")
    tokenizer.save_pretrained(folder)
    assert transformers.AutoTokenizer.from_pretrained(folder).truncation_side == "left"
    reward, whole = Classifier(folder, max_tokens=20), Classifier(folder)
    for text in (rewards.chat("A good film?", TEXTS[0]), TEXTS[0]):
        assert reward._ids(text) == whole._ids(text)[:20] != whole._ids(text)


def test_long_texts_are_cut_to_what_the_model_reads(head):
    """The tiny encoder has 512 positions: what comes after them has no effect, and is no index
    error.
    """
    reward = Classifier(head())
    assert reward.max_tokens == 512 and Classifier(head(), max_tokens=64).max_tokens == 64
    long = " ".join(TEXTS)
    assert reward.score([long])[0] == reward.score([long + " awful"])[0]
    assert len(reward._ids(long)) == 512


def small(kind, tmp_path, **shape):
    """Write a random sequence-classification model of another architecture; return its folder and
    configuration.
    """
    shape = {"vocab_size": 512, "pad_token_id": 2, "num_labels": 1} | shape
    config, folder = transformers.AutoConfig.for_model(kind, **shape), tmp_path / kind
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForSequenceClassification.from_config(config)
        for parameter in model.parameters():
            parameter.data.mul_(8 if parameter.ndim == 2 else 1)
        model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(assets.model_dir("tiny-encoder")).save_pretrained(
        folder
    )
    return folder


ENCODER = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}


@pytest.mark.parametrize(
    "kind, reads",
    [
        ("bert", 34),
        ("roberta", 31),
        ("xlm-roberta", 31),
        ("mpnet", 32),
        ("ibert", 31),
        ("longformer", 31),
    ],
)
def test_relatives_of_roberta_read_less_than_their_positions(tmp_path, kind, reads):
    """Their positions begin behind the padding id (2 here, MPNet's own is 1): the rest would be an
    index error.
    """
    more = {"attention_window": [8]} if kind == "longformer" else {}
    folder = small(kind, tmp_path, max_position_embeddings=34, **ENCODER, **more)
    reward, texts = Classifier(folder), [" ".join(TEXTS[:9]), TEXTS[0]]
    assert reward.max_tokens == reads == len(reward._ids(texts[0]))
    expected = [alone(folder, reward._ids(text))[0] for text in texts]
    assert reward.score(texts) == pytest.approx(expected, abs=1e-4)


def test_a_model_that_reads_the_last_position_gets_no_padding(tmp_path):
    """XLNet pads on the left; it has no limit of positions either, which its configuration writes
    as -1.
    """
    folder = small("xlnet", tmp_path, d_model=32, n_layer=2, n_head=2, d_inner=64)
    reward, texts = Classifier(folder), [TEXTS[0], "A good film.", "Bad"]
    assert reward.max_tokens == 4096
    expected = [alone(folder, reward._ids(text))[0] for text in texts]
    assert reward.score(texts) == pytest.approx(expected, abs=1e-4)
    reward.token_budget = 8192
    assert np.abs(reward.score(texts) - expected).max() > 0.05, "what padding would make of them"


def test_scores_that_are_not_finite_are_refused(head):
    reward = Classifier(head())
    reward.model.classifier.bias.data.fill_(math.nan)
    with pytest.raises(ValueError, match="the reward of text 0 is not finite"):
        reward.score(["a"])


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


def easy(n, seed):
    """Reviews of unrelated words; positive if they hold the word "film"."""
    draw = random.Random(seed)
    words = sorted(
        {w for text in TEXTS for w in text.lower().split() if w.isalpha() and w != "film"}
    )
    texts, labels = [], [i % 2 for i in range(n)]
    for label in labels:
        picked = draw.sample(words, 8)
        texts.append(" ".join(picked[:4] + ["film"] * label + picked[4:]))
    return texts, labels


def test_classifier_learns_a_word(tmp_path):
    """AUC far above chance after one epoch, and the saved folder is what was judged; the same seed,
    the same model.
    """
    encoder, (texts, labels), held_out = (
        str(assets.model_dir("tiny-encoder")),
        easy(1536, 0),
        easy(200, 1),
    )
    options = {
        "held_out": held_out,
        "seed": 0,
        "lr": 1e-2,
        "batch": 32,
        "frozen": 0,
        "precision": "fp32",
    }
    facts = fit_reward.train_classifier(encoder, texts, labels, tmp_path / "a", **options)
    assert facts["auc"] > 0.9 and facts["accuracy"] > 0.75 and facts["trained_on"] == 1536
    judged = fit_reward.held_out_facts(Classifier(tmp_path / "a"), *held_out)
    assert judged == {k: facts[k] for k in judged}
    assert not list((tmp_path / "a").glob("*.bin"))


def test_frozen_layers_stay_and_a_seed_fixes_the_rest(tmp_path):
    encoder, (texts, labels) = assets.model_dir("tiny-encoder"), easy(32, 0)
    weights = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        options = {
            "held_out": easy(8, 1),
            "seed": seed,
            "batch": 8,
            "frozen": 1,
            "precision": "fp32",
        }
        fit_reward.train_classifier(str(encoder), texts, labels, tmp_path / name, **options)
        weights[name] = Classifier(tmp_path / name).model.state_dict()
    before = transformers.AutoModel.from_pretrained(encoder).state_dict()
    assert all(torch.equal(weights["a"][k], weights["b"][k]) for k in weights["a"])
    moved = {
        k.split(".")[0] + k.split("layer")[-1][:2]
        for k in before
        if not torch.equal(before[k], weights["a"][f"bert.{k}"])
    }
    assert moved == {"encoder.1", "poolerpo"}, "only the layers above the frozen ones learn"
    assert not torch.equal(weights["a"]["classifier.weight"], weights["c"]["classifier.weight"])


def test_too_few_texts_are_refused(tmp_path):
    with pytest.raises(ValueError, match="3 texts are fewer than one batch of 32"):
        options = {"held_out": HELD_OUT, "seed": 0, "precision": "fp32"}
        fit_reward.train_classifier("unread", TEXTS[:3], LABELS[:3], tmp_path, **options)


def trained(folder, precision, encoder=None):
    """Train an encoder for one step at learning rate 1e-3; return its weights."""
    texts, labels = easy(8, 0)
    encoder = encoder or assets.model_dir("tiny-encoder")
    options = {
        "held_out": easy(8, 1),
        "seed": 0,
        "batch": 8,
        "lr": 1e-3,
        "frozen": 0,
        "precision": precision,
    }
    fit_reward.train_classifier(str(encoder), texts, labels, folder, **options)
    return transformers.AutoModelForSequenceClassification.from_pretrained(folder).state_dict()


def test_precision_fp32_is_float32_throughout(tmp_path):
    """Its one step is AdamW's by hand, on float32 gradients."""
    encoder, (texts, labels) = assets.model_dir("tiny-encoder"), easy(8, 0)
    torch.manual_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        encoder, num_labels=1, dtype=torch.float32
    )
    tokenizer, model = transformers.AutoTokenizer.from_pretrained(encoder), model.train()
    model.base_model.embeddings.requires_grad_(False)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0)).tolist()
    inputs = tokenizer(
        [texts[i] for i in order], padding=True, return_tensors="pt", truncation=True, max_length=64
    )
    logits = model(**inputs).logits[:, 0]
    target = torch.tensor([float(labels[i]) for i in order])
    torch.nn.functional.binary_cross_entropy_with_logits(logits, target).backward()
    found = trained(tmp_path / "fp32", "fp32")
    for name, weight in model.named_parameters():
        wanted = weight.detach()
        if weight.grad is not None:
            wanted = wanted * (1 - 1e-3 * 0.01) - 1e-3 * weight.grad / (weight.grad.abs() + 1e-8)
        torch.testing.assert_close(found[name], wanted, rtol=0, atol=1e-5, msg=name)


@pytest.mark.skipif(not BF16, reason="bfloat16 is refused on this CPU, which would emulate it")
def test_precision_bf16_is_another_and_the_one_by_default(tmp_path):
    exact, rough = trained(tmp_path / "fp32", "fp32"), trained(tmp_path / "bf16", "bf16")
    assert rough.keys() == exact.keys() and any(
        not torch.equal(rough[name], exact[name]) for name in exact
    )
    texts, labels = easy(8, 0)
    options = {"held_out": easy(8, 1), "seed": 0, "batch": 8, "lr": 1e-3, "frozen": 0}
    fit_reward.train_classifier(
        str(assets.model_dir("tiny-encoder")), texts, labels, tmp_path / "default", **options
    )
    default = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "default"
    ).state_dict()
    assert all(torch.equal(rough[name], default[name]) for name in rough)


def test_an_encoder_with_few_positions_is_trained_on_what_it_reads(tmp_path):
    """A RoBERTa of 12 positions reads 9 tokens, where texts would be cut to 64: no index error."""
    encoder = small("roberta", tmp_path, max_position_embeddings=12, **ENCODER)
    assert Classifier(encoder).max_tokens == 9
    assert trained(tmp_path / "out", "fp32", encoder)[
        "roberta.embeddings.position_embeddings.weight"
    ].shape == (12, 16)


def test_a_trained_classifier_has_the_mode_that_the_umask_says(tmp_path):
    """safetensors writes for the owner alone: a colleague of the group could not read the
    reward.
    """
    mask = os.umask(0o027)
    try:
        trained(tmp_path / "out", "fp32")
    finally:
        os.umask(mask)
    modes = {p.name: oct(p.stat().st_mode & 0o777) for p in (tmp_path / "out").iterdir()}
    assert set(modes.values()) == {"0o640"} and "model.safetensors" in modes, modes


@pytest.mark.slow
def test_minilm_tells_the_reviews_apart(tmp_path):
    options = {"held_out": HELD_OUT, "seed": 0, "batch": 8, "lr": 2e-4, "precision": "fp32"}
    facts = fit_reward.train_classifier(
        str(real("minilm")), TEXTS[:64], LABELS[:64], tmp_path, **options
    )
    assert facts["auc"] > 0.8


@pytest.mark.parametrize("budget", [0, 1, 17, 40, 1000])
def test_token_batches(budget):
    """Every index once, longest first, no batch above the budget when padded unless it is one
    text.
    """
    lengths = np.random.default_rng(0).integers(1, 40, size=50).tolist()
    batches = rewards.token_batches(lengths, budget)
    flat = [i for batch in batches for i in batch]
    assert sorted(flat) == list(range(50)) and [lengths[i] for i in flat] == sorted(
        lengths, reverse=True
    )
    for batch, following in zip(batches, [*batches[1:], None], strict=True):
        widest = lengths[batch[0]]
        assert len(batch) == 1 or widest * len(batch) <= budget
        assert following is None or widest * (len(batch) + 1) > budget, (
            "the next text would have fitted"
        )


def test_token_batches_by_hand():
    assert rewards.token_batches([3, 10, 3, 2], 12) == [[1], [0, 2, 3]]
    assert rewards.token_batches([], 12) == []


# --- VADER, n-grams


def test_vader_by_hand():
    """compound = s / √(s² + 15), s the sum of valences: good 1.9, bad −2.5, great 3.1; "not"
    multiplies by −0.74, "very" adds 0.293, "!" adds 0.292; of two clauses joined by "but" the first
    counts half, the second 1.5 times.
    """
    cases = {
        "good": 1.9,
        "a good film": 1.9,
        "bad": -2.5,
        "not good": -0.74 * 1.9,
        "very good": 1.9 + 0.293,
        "good!": 1.9 + 0.292,
        "good but bad": 0.5 * 1.9 - 1.5 * 2.5,
        "a film": 0.0,
        "great and good": 3.1 + 1.9,
    }
    expected = [s / math.sqrt(s * s + 15) for s in cases.values()]
    assert Vader().score(list(cases)) == pytest.approx(expected, abs=1e-4)


def test_distinct_and_repetition_by_hand():
    """1 2 1 2 1 has the bigrams 12 21 12 21, two of them new; with 2 1 beside it, two of 5.
    Trigrams: 121 212 121.
    """
    assert rewards.distinct_n([[1, 2, 1, 2, 1]]) == 2 / 4
    assert rewards.distinct_n([[1, 2, 1, 2, 1], [2, 1], [7], []]) == 2 / 5
    assert rewards.distinct_n([[1, 2, 3]], n=1) == 1 and math.isnan(rewards.distinct_n([[1], []]))
    assert rewards.repetition([1, 2, 1, 2, 1]) == pytest.approx(1 / 3)
    assert rewards.repetition([5] * 10) == pytest.approx(7 / 8)
    assert (
        rewards.repetition([1, 2])
        == rewards.repetition([])
        == rewards.repetition([1, 2, 3, 4])
        == 0
    )


# --- the scorer and the job


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """Six prompts with two responses each; one response is empty, one only ends."""
    folder = tmp_path_factory.mktemp("answers")
    tokenizer = templates.load_tokenizer(assets.model_dir("tiny"))
    prompts, lines = [], []
    for i in range(6):
        ids = templates.render(tokenizer, TEXTS[i], "plain")
        cut = 4 + i
        prompts.append({"id": f"B{i}", "prompt_ids": ids[:cut]})
        for sample in range(2):
            said = [*ids[cut : cut + 3 + 4 * i + sample], 1] if (i, sample) != (3, 1) else []
            lines.append({"id": f"B{i}", "sample": sample, "response_ids": said, "logp": -1.5 * i})
    lines[8]["response_ids"] = [1]
    (folder / "prompts.json").write_text(json.dumps(prompts))
    (folder / "responses.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder, prompts, lines


@pytest.mark.slow
def test_scorer(answers, bag, head, tmp_path):
    """In a child: each reward reads prompt and response together; logp_sft is the response's, for
    the first prompts.
    """
    folder, prompts, lines = answers
    target, classifier = assets.model_dir("tiny"), head()
    kinds = {
        "words": {"kind": "bag_of_words", "folder": str(bag[0])},
        "model": {"kind": "classifier", "folder": str(classifier), "token_budget": 64},
        "vader": {"kind": "vader"},
    }
    config = {"target": str(target), "precision": "fp32"}
    given = {
        "rewards": kinds,
        "prompts": str(folder / "prompts.json"),
        "responses": str(folder / "responses.jsonl"),
    }
    with launch.Worker("beyond_dpo.jobs.score", config, tmp_path / "log", desc="score") as worker:
        facts = worker.call(
            "score", **given, out=str(tmp_path / "scores.jsonl"), reference_prompts=5
        )
        worker.call("score", **given, out=str(tmp_path / "none.jsonl"))
        worker.call(
            "score",
            **given | {"rewards": {"vader": kinds["vader"]}},
            out=str(tmp_path / "one.jsonl"),
        )
    table = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    assert [(r["id"], r["sample"], r["logp"]) for r in table] == [
        (r["id"], r["sample"], r["logp"]) for r in lines
    ]
    tokenizer, asked = templates.load_tokenizer(target), {p["id"]: p["prompt_ids"] for p in prompts}
    texts = [
        tokenizer.decode(asked[r["id"]] + r["response_ids"], skip_special_tokens=True)
        for r in lines
    ]
    assert texts[0].startswith(TEXTS[0][:10]) and "</s>" not in "".join(texts)
    own = {"words": rewards.BagOfWords(bag[0]), "model": Classifier(classifier), "vader": Vader()}
    for name, reward in own.items():
        assert [r[name] for r in table] == pytest.approx(reward.score(texts), abs=1e-4)
    assert [r["length"] for r in table] == [len(r["response_ids"]) for r in lines]
    assert [r["repetition"] for r in table] == pytest.approx(
        [rewards.repetition(r["response_ids"]) for r in lines], abs=1e-5
    )
    assert facts == {"distinct_2": round(rewards.distinct_n([r["response_ids"] for r in lines]), 4)}
    model = transformers.AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    for row, line in zip(table, lines, strict=True):
        prompt, said = asked[line["id"]], line["response_ids"]
        if line["id"] == "B5" or not said:
            assert row["logp_sft"] is None
            continue
        with torch.no_grad():
            logps = model(torch.tensor([prompt + said])).logits[0].log_softmax(-1)
        expected = sum(logps[len(prompt) + i - 1, token].item() for i, token in enumerate(said))
        assert row["logp_sft"] == pytest.approx(expected, abs=1e-3)
    assert sum(r["logp_sft"] is None for r in table) == 3
    without = [json.loads(line) for line in (tmp_path / "none.jsonl").read_text().splitlines()]
    assert without == [r | {"logp_sft": None} for r in table]
    one = [json.loads(line) for line in (tmp_path / "one.jsonl").read_text().splitlines()]
    assert one == [{k: v for k, v in r.items() if k not in ("words", "model")} for r in without]


def test_a_finished_reward_reads_turns(answers, head, bag, tmp_path):
    """Where prompts tell what was asked: one user's words or turns; one without a chat template
    reads the text.
    """
    folder, prompts, lines = answers
    asked = {
        p["id"]: TEXTS[i] if i % 2 else rewards.chat("Hi", "Hello")[:1]
        for i, p in enumerate(prompts)
    }
    told = [p | {"text": asked[p["id"]]} for p in prompts]
    (tmp_path / "prompts.json").write_text(json.dumps(told))
    model, encoder = head("llama"), head()
    bare = transformers.AutoTokenizer.from_pretrained(encoder)
    bare.chat_template = None
    (encoder / "chat_template.jinja").unlink(missing_ok=True)
    bare.save_pretrained(encoder)
    kinds = {
        "turns": {"kind": "finished", "folder": str(model)},
        "text": {"kind": "classifier", "folder": str(model)},
    }
    kinds |= {"bare": {"kind": "finished", "folder": str(encoder)}}
    kinds |= {"words": {"kind": "bag_of_words", "folder": str(bag[0])}}
    files = [
        str(tmp_path / "prompts.json"),
        str(folder / "responses.jsonl"),
        str(tmp_path / "scores.jsonl"),
    ]
    Scorer(str(assets.model_dir("tiny")), "fp32").score(kinds, *files)
    table = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    tokenizer, ids = (
        templates.load_tokenizer(assets.model_dir("tiny")),
        {p["id"]: p["prompt_ids"] for p in prompts},
    )
    said = [tokenizer.decode(r["response_ids"], skip_special_tokens=True) for r in lines]
    chats = [rewards.chat(asked[r["id"]], answer) for r, answer in zip(lines, said, strict=True)]
    texts = [
        tokenizer.decode(ids[r["id"]] + r["response_ids"], skip_special_tokens=True) for r in lines
    ]
    assert chats[0] == [*rewards.chat("Hi", said[0])] and chats[2][0]["content"] == TEXTS[1]
    wanted = {"turns": Classifier(model).score(chats), "text": Classifier(model).score(texts)}
    wanted |= {
        "bare": Classifier(encoder).score(texts),
        "words": rewards.BagOfWords(bag[0]).score(texts),
    }
    for name, scores in wanted.items():
        assert [r[name] for r in table] == pytest.approx(scores, abs=1e-4)
    assert np.abs(wanted["turns"] - wanted["text"]).max() > 0.01


def test_a_reward_of_a_world_without_labels_is_not_measured(tmp_path):
    job = {
        "texts": [],
        "labels": [],
        "held_out": [[], []],
        "seed": 0,
        "out": str(tmp_path),
        "reward": "reward",
    }
    (tmp_path / "job.json").write_text(
        json.dumps(job | {"encoder": "unread", "trust_remote_code": False})
    )
    fit_reward.main(str(tmp_path / "job.json"))
    assert json.loads((tmp_path / "facts.json").read_text()) == {}


def test_a_reward_is_loaded_once(answers, bag, tmp_path):
    folder, scorer = answers[0], Scorer(str(assets.model_dir("tiny")), "fp32")
    files = [str(folder / "prompts.json"), str(folder / "responses.jsonl"), str(tmp_path / "out")]
    words, vader = {"kind": "bag_of_words", "folder": str(bag[0])}, {"kind": "vader"}
    rewards.load.cache_clear()
    for asked in ({"gold": words}, {"gold": words, "vader": vader}, {"gold": words}):
        scorer.score(asked, *files)
    assert rewards.load.cache_info().misses == 2


def test_unknown_kind_of_reward_is_named(answers, tmp_path):
    files = [str(answers[0] / name) for name in ("prompts.json", "responses.jsonl")]
    with pytest.raises(KeyError, match="vaders"):
        Scorer(str(assets.model_dir("tiny")), "fp32").score(
            {"x": {"kind": "vaders"}}, *files, str(tmp_path / "out")
        )


@pytest.mark.slow
@pytest.mark.parametrize("encoder", [False, True], ids=["bag_of_words", "classifier"])
def test_training_job_in_a_child(encoder, bag, tmp_path):
    """`python -m beyond_dpo.jobs.fit_reward JOB.json` leaves the reward and facts.json, as in this
    process.
    """
    job = {
        "texts": TEXTS[:64],
        "labels": LABELS[:64],
        "held_out": HELD_OUT,
        "seed": 0,
        "out": str(tmp_path),
    }
    job |= {"reward": "reward" if encoder else "gold", "precision": "fp32"}
    job |= {"encoder": str(assets.model_dir("tiny-encoder"))} if encoder else {}
    launch.run("beyond_dpo.jobs.fit_reward", job, tmp_path / "checkpoints", desc="train")
    facts = json.loads(Path(tmp_path, "facts.json").read_text())
    assert facts["trained_on"] == 64 and facts["held_out"] == 32
    if encoder:
        assert np.isfinite(Classifier(tmp_path).score(TEXTS[:2])).all()
    else:
        assert facts == bag[1]


# --- a reward that prefers nothing


def made(stage, **files):
    """Return a result with these files: rows as JSON lines under a name in "_jsonl", JSON under one
    in "_json".
    """

    def make(out):
        for name, content in files.items():
            text = json.dumps(content)
            if name.endswith("_jsonl"):
                text = "".join(json.dumps(row) + "\n" for row in content)
            (out / name.replace("_", ".")).write_text(text)

    return artifacts.Artifact(stage, 1, {"files": json.dumps(files)}, make)


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "ARTIFACTS", tmp_path / "artifacts")
    monkeypatch.setattr(paths, "FROZEN", tmp_path / "frozen")


@pytest.fixture
def judged(store, monkeypatch):
    """Return the pairs of three prompts whose two responses each have these scores and tokens."""

    def pairs(scores, said, **changes):
        cfg = config.load("expo", "smoke", world__prompts=3, world__samples=2, **changes)
        name = stages.oracle(cfg.world)
        rows = [{"id": f"B{i // 2}", "sample": i % 2} for i in range(6)]
        pool = [row | {"response_ids": ids} for row, ids in zip(rows, said, strict=True)]
        given = [row | {name: score} for row, score in zip(rows, scores, strict=True)]
        prompts = [{"id": f"B{i}", "prompt_ids": [i]} for i in range(3)]
        monkeypatch.setattr(stages, "texts", lambda world: made("texts", prompts_json=prompts))
        monkeypatch.setattr(
            stages, "responses", lambda *a, **k: made("responses", responses_jsonl=pool)
        )
        monkeypatch.setattr(stages, "scores", lambda *a, **k: made("scores", scores_jsonl=given))
        return stages.pairs(cfg)

    return pairs


def test_pairs_leave_out_prompts_whose_samples_tie_or_are_the_same(judged):
    """Of the second prompt both score 1; of the third both are the same response, whatever a batch
    made of it.
    """
    pairs = judged([0, 1, 1, 1, 0.5, 0.50001], [[5], [6], [7], [8], [9], [9]])
    (row,) = read_rows(pairs.get() / "pairs.jsonl")
    assert row == {"id": "B0", "prompt_ids": [0], "responses": {"chosen": [6], "rejected": [5]}}
    assert pairs.manifest["facts"] == {"pairs": 1, "ties_dropped": 2, "mean_gold_gap": 1.0}


def test_a_reward_that_prefers_nothing_is_said_in_words(judged):
    """Before any training: which reward, of how many prompts, and what to do."""
    said = [[5], [6], [7], [8], [9], [10]]
    with pytest.raises(
        config.ConfigError,
        match=r"the gold reward scores all 2 responses to each of 3 prompts alike.*use",
    ):
        judged([1.0] * 6, said).get()
    with pytest.raises(
        config.ConfigError,
        match="the reward model minilm scores .*: use another reward model, more",
    ):
        judged([1.0] * 6, said, world__gold_rows=0, world__reward_model="minilm").get()


def test_a_single_sample_is_refused_before_it_is_drawn():
    builds = {stages.pairs: "expo", stages.reference: "expo", wrpo.main_result: "wrpo"}
    for build, paper in builds.items():
        cfg = config.load(paper, "smoke")
        cfg = dataclasses.replace(cfg, world=dataclasses.replace(cfg.world, samples=1))
        with pytest.raises(
            config.ConfigError, match="world.samples=1: a preference needs two responses"
        ):
            build(cfg)


def test_no_pair_to_draw_from_is_said_in_words(store, monkeypatch):
    monkeypatch.setattr(stages, "pairs", lambda cfg: made("texts", pairs_jsonl=[]))
    with pytest.raises(
        config.ConfigError, match="texts-[0-9a-f]+ holds no pair to draw from: use more prompts"
    ):
        stages.subset(config.load("expo", "smoke"), 0.5, 0).get()


@pytest.fixture
def fusing(store, monkeypatch):
    """Give WRPO's stages prompts, a source's responses and the target's own ones, by (prompt,
    tokens, reward).
    """
    cfg = config.load("wrpo", "smoke")

    def answers(name, rows):
        lines = [{"id": i, "sample": n, "response_ids": ids} for n, (i, ids, _) in enumerate(rows)]
        scores = [
            {"id": i, "sample": n, "reward": r, "length": len(ids)}
            for n, (i, ids, r) in enumerate(rows)
        ]
        return made(f"{name}-said", responses_jsonl=lines), made(
            f"{name}-judged", scores_jsonl=scores
        )

    def build(source, own, first=("a",), rest=("b", "c")):
        parts = {"first": first, "rest": rest, "prompts": (*first, *rest)}
        prompts = {
            f"{name}_json": [{"id": i, "prompt_ids": [1]} for i in ids]
            for name, ids in parts.items()
        }
        said, judged = answers("source", source)
        monkeypatch.setattr(stages, "texts", lambda world: made("texts", **prompts))
        monkeypatch.setattr(wrpo, "thirds", lambda cfg: made("thirds", **prompts))
        monkeypatch.setattr(wrpo.sources, "answers", lambda cfg, name: said)
        monkeypatch.setattr(wrpo, "scored", lambda *a, **k: judged)
        monkeypatch.setattr(wrpo, "own", lambda cfg, model: answers("own", own))
        return cfg

    return build


GOOD = [("a", [5], 1.0), ("b", [6], 1.0), ("c", [7], 1.0)]
OWN = [("b", [8], 0.0), ("b", [9], 1.0), ("c", [8], 0.0), ("c", [9], 1.0)]


def test_a_quadruple_needs_two_different_responses_of_the_targets_own(fusing):
    """Of c there is one that is not empty: best and worst at once, which would be a preference for
    itself.
    """
    cfg = fusing(GOOD, [*OWN[:2], ("c", [9], 1.0), ("c", [], 0.0)])
    (row,) = read_rows(wrpo.quadruples(cfg, ("one",), None).get() / "pairs.jsonl")
    assert row["id"] == "b" and row["responses"] == dict(
        zip(config.FUSED, ([6], [9], [8]), strict=True)
    )
    assert wrpo.quadruples(cfg, ("one",), None).manifest["facts"] == {"quadruples": 1, "dropped": 1}


def test_rewards_that_prefer_nothing_of_the_sources_or_the_target_are_said_in_words(fusing):
    tied = [(i, [n], 1.0) for i in "abc" for n in (5, 6)]
    with pytest.raises(
        config.ConfigError,
        match="finds no best response of one to any of 3 prompts .all score alike",
    ):
        wrpo.fusion(fusing(tied, OWN), ("one",)).get()
    with pytest.raises(
        config.ConfigError, match="finds no best response of one to any of 1 prompts for Target-SFT"
    ):
        wrpo.fusion(fusing([*tied[:2], *GOOD[1:]], OWN), ("one",)).get()
    alike = [(i, ids, 0.5) for i, ids, _ in OWN]
    with pytest.raises(
        config.ConfigError, match="finds for none of 2 prompts a best .* sampling.temperature$"
    ):
        wrpo.quadruples(fusing(GOOD, alike), ("one",), None).get()


def test_a_draw_without_a_quadruple_is_said_in_words(fusing):
    """Of eight prompts only one has a quadruple, and a draw of one prompt misses it for some
    seed.
    """
    rest = tuple("bcdefghi")
    cfg = fusing([(i, [7], 1.0) for i in ("a", *rest)], OWN[:2], rest=rest)
    cfg = dataclasses.replace(cfg, fraction=0.1)
    rows, drawn = wrpo.quadruples(cfg, ("one",), None), []
    for seed in range(4):
        try:
            drawn += read_rows(wrpo.draw(cfg, rows, seed).get() / "pairs.jsonl")
        except config.ConfigError as error:
            assert re.search(
                "fraction=0.1 draws 1 of 8 prompts, and none of the 1 quadruples is of these",
                str(error),
            )
            break
    else:
        pytest.fail("no draw was empty")
    assert all(row["id"] == "b" for row in drawn)
