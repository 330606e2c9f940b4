"""Reward models on tiny real models: saved and loaded without a pickle, scores that depend on their text alone."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from beyond_dpo import assets, data, launch, paths, rewards
from beyond_dpo.rewards import Classifier, Scorer, Vader

ROWS = [json.loads(line) for line in (paths.FIXTURES / "reviews.jsonl").read_text().splitlines()]
TEXTS, LABELS = [r["text"] for r in ROWS], [r["label"] for r in ROWS]
HELD_OUT = (TEXTS[64:], LABELS[64:])


def real(name):
    try:
        return assets.model_dir(name)
    except assets.AssetError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def bag(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bag")
    facts = rewards.train_bag_of_words(TEXTS[:64], LABELS[:64], folder, held_out=HELD_OUT, seed=0)
    return folder, facts


@pytest.fixture
def head(tmp_path):
    """Write a random sequence-classification model with the tiny tokenizer; return its folder."""

    def build(kind="bert", labels=1, **changes):
        folder, config = tmp_path / f"{kind}{labels}{len(changes)}", {"num_labels": labels, "pad_token_id": 2} | changes
        source = assets.model_dir("tiny-encoder" if kind == "bert" else "tiny")
        with torch.random.fork_rng():
            torch.manual_seed(1)
            config = transformers.AutoConfig.from_pretrained(source, **config)
            model = transformers.AutoModelForSequenceClassification.from_config(config)
            for parameter in model.parameters():
                parameter.data.mul_(12 if parameter.ndim == 2 else 1)  # so that scores differ visibly
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
    """The loaded reward is the trained one: same facts from its own scores, and scikit-learn's own logits."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    folder, facts = bag
    reward = rewards.BagOfWords(folder)
    scores = reward.score(TEXTS)
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), min_df=2, max_features=200_000, sublinear_tf=True)
    trained = LogisticRegression(C=4.0, max_iter=400, random_state=0).fit(
        vectorizer.fit_transform(TEXTS[:64]), LABELS[:64]
    )
    assert scores == pytest.approx(trained.decision_function(vectorizer.transform(TEXTS)), abs=1e-9)
    assert rewards.held_out_facts(reward, *HELD_OUT) == {k: facts[k] for k in ("held_out", "accuracy", "auc")}
    assert facts["trained_on"] == 64 and facts["features"] == len(reward.coef) and facts["held_out"] == 32
    assert facts["accuracy"] > 0.75 and facts["auc"] > 0.8, "word counts tell these reviews apart"
    assert reward.score(TEXTS[5:6])[0] == pytest.approx(scores[5], abs=1e-12)


def test_bag_of_words_holds_no_pickle(bag):
    folder, _ = bag
    assert sorted(p.name for p in folder.iterdir()) == ["weights.npz", "words.json"]
    with np.load(folder / "weights.npz", allow_pickle=False) as arrays:
        assert {name: arrays[name].dtype.kind for name in arrays} == {"idf": "f", "coef": "f", "intercept": "f"}
    np.savez(folder / "bad.npz", idf=np.array([{}], dtype=object))
    bad = folder / "copy"
    bad.mkdir()
    (bad / "words.json").write_bytes((folder / "words.json").read_bytes())
    (folder / "bad.npz").rename(bad / "weights.npz")
    with pytest.raises((ValueError, KeyError), match="allow_pickle=False|coef"):
        rewards.BagOfWords(bad)


def test_held_out_facts_by_hand():
    """Scores 2, −1, 1, −3 for labels 1, 1, 0, 0: the signs of two are right; of the four (1, 0) pairs three are in
    order: 2 > 1, 2 > −3, −1 > −3, not −1 > 1.
    """

    class Fixed:
        def score(self, texts):
            return np.array([2.0, -1.0, 1.0, -3.0])

    assert rewards.held_out_facts(Fixed(), ["a", "b", "c", "d"], [1, 1, 0, 0]) == {
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
    ],
    ids=["encoder", "decoder", "decoder without pad", "decoder with pad = end"],
)
def test_scores_are_those_of_each_text_alone(shape, budget, head):
    folder = head(**shape)
    texts = [" ".join(text.split()[: 3 + 5 * i]) + "</s>" * (i % 2) for i, text in enumerate(TEXTS[:7])]
    random.Random(0).shuffle(texts)
    reward = Classifier(folder, token_budget=budget)
    ids = [reward.tokenizer(text)["input_ids"] for text in texts]
    assert len({len(i) for i in ids}) > 4 and any(i[-1] == 1 for i in ids)
    expected = [alone(folder, i)[0] for i in ids]
    assert reward.score(texts) == pytest.approx(expected, abs=1e-4)
    assert np.ptp(expected) > 0.05, "too alike to tell"
    assert reward.score([]).shape == (0,)


def test_labels(head):
    """Two labels: the second logit minus the first; of more, or on request, the one that is named."""
    two, three = head(labels=2), head(labels=3)
    text = TEXTS[0]
    ids = Classifier(two).tokenizer(text)["input_ids"]
    logits = alone(two, ids)
    assert Classifier(two).score([text]) == pytest.approx([logits[1] - logits[0]], abs=1e-5)
    assert Classifier(two, label=0).score([text]) == pytest.approx([logits[0]], abs=1e-5)
    for label in range(3):
        assert Classifier(three, label=label).score([text]) == pytest.approx([alone(three, ids)[label]], abs=1e-5)
    for folder, label in ((three, None), (three, 3), (two, 2), (two, -1), (head(), 1)):
        with pytest.raises(ValueError, match=f"labels, numbered from 0; say which one is the reward, not {label}"):
            Classifier(folder, label=label)


def test_chat_turns_are_rendered_once_with_one_bos(head):
    folder = head("llama")
    turns = [{"role": "user", "content": "A good film?"}, {"role": "assistant", "content": "A dull one."}]
    reward = Classifier(folder)
    ids = reward.tokenizer.apply_chat_template(turns, return_dict=False)
    assert ids.count(0) == 1
    scores = reward.score([turns, "A dull one."])
    assert scores[0] == pytest.approx(alone(folder, ids)[0], abs=1e-4)
    assert scores[1] == pytest.approx(alone(folder, reward.tokenizer("A dull one.")["input_ids"])[0], abs=1e-4)


@pytest.mark.parametrize("bos", ["", "{{ bos_token }}{{ bos_token }}"], ids=["none", "two"])
def test_a_chat_has_one_bos_whatever_its_template_does(head, bos):
    """Published reward models are scored by text without BOS to which the tokenizer adds one, or by the template's."""
    turns, reward = rewards.chat("A good film?", "A dull one."), Classifier(head("llama"))
    wanted = reward._ids(turns)
    assert wanted == reward.tokenizer.apply_chat_template(turns, return_dict=False) and wanted.count(0) == 1
    reward.tokenizer.chat_template = reward.tokenizer.chat_template.replace("{{ bos_token }}", bos)
    assert reward.tokenizer.apply_chat_template(turns, return_dict=False).count(0) == len(bos) // 15
    assert reward._ids(turns) == wanted


def test_empty_fields_and_the_day_do_not_change_a_chats_reward(head):
    """Through Arrow every turn has the fields of all turns, as None; some templates write today's date."""
    reward = Classifier(head("llama"))
    named = "{% if messages[0].name is defined %}{{ messages[0].name }}{% endif %}{{ strftime_now('%d %b %Y') }}"
    reward.tokenizer.chat_template = named + reward.tokenizer.chat_template
    turns = rewards.chat("A good film?", "A dull one.")
    ids = reward._ids([turn | {"name": None} for turn in turns])
    assert ids == reward._ids(turns) and "26 Jul 2024" in reward.tokenizer.decode(ids)


def test_a_long_chat_loses_its_end(head):
    """Also where the tokenizer was saved with another side, as by some trainings of reward models."""
    folder = head("llama")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, truncation_side="left")
    tokenizer.save_pretrained(folder)
    assert transformers.AutoTokenizer.from_pretrained(folder).truncation_side == "left"
    reward, whole = Classifier(folder, max_tokens=20), Classifier(folder)
    for text in (rewards.chat("A good film?", TEXTS[0]), TEXTS[0]):
        assert reward._ids(text) == whole._ids(text)[:20] != whole._ids(text)


def test_long_texts_are_cut_to_what_the_model_reads(head):
    """The tiny encoder has 512 positions: what comes after them has no effect, and is no index error."""
    reward = Classifier(head())
    assert reward.max_tokens == 512 and Classifier(head(), max_tokens=64).max_tokens == 64
    long = " ".join(TEXTS)
    assert reward.score([long])[0] == reward.score([long + " awful"])[0]
    assert len(reward._ids(long)) == 512


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
        rewards.train_classifier(str(folder), TEXTS, LABELS, tmp_path, held_out=HELD_OUT, seed=0)


def easy(n, seed):
    """Reviews of unrelated words; positive if they hold the word "film"."""
    draw = random.Random(seed)
    words = sorted({w for text in TEXTS for w in text.lower().split() if w.isalpha() and w != "film"})
    texts, labels = [], [i % 2 for i in range(n)]
    for label in labels:
        picked = draw.sample(words, 8)
        texts.append(" ".join(picked[:4] + ["film"] * label + picked[4:]))
    return texts, labels


def test_classifier_learns_a_word(tmp_path):
    """AUC far above chance after one epoch, and the saved folder is what was judged; the same seed, the same model."""
    encoder, (texts, labels), held_out = str(assets.model_dir("tiny-encoder")), easy(1536, 0), easy(200, 1)
    options = {"held_out": held_out, "seed": 0, "lr": 1e-2, "batch": 32, "frozen": 0}
    facts = rewards.train_classifier(encoder, texts, labels, tmp_path / "a", **options)
    assert facts["auc"] > 0.9 and facts["accuracy"] > 0.75 and facts["trained_on"] == 1536
    judged = rewards.held_out_facts(Classifier(tmp_path / "a"), *held_out)
    assert judged == {k: facts[k] for k in judged}
    assert not list((tmp_path / "a").glob("*.bin"))


def test_frozen_layers_stay_and_a_seed_fixes_the_rest(tmp_path):
    encoder, (texts, labels) = assets.model_dir("tiny-encoder"), easy(32, 0)
    weights = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        options = {"held_out": easy(8, 1), "seed": seed, "batch": 8, "frozen": 1}
        rewards.train_classifier(str(encoder), texts, labels, tmp_path / name, **options)
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
        rewards.train_classifier("unread", TEXTS[:3], LABELS[:3], tmp_path, held_out=HELD_OUT, seed=0)


def test_minilm_tells_the_reviews_apart(tmp_path):
    options = {"held_out": HELD_OUT, "seed": 0, "batch": 8, "lr": 2e-4}
    facts = rewards.train_classifier(str(real("minilm")), TEXTS[:64], LABELS[:64], tmp_path, **options)
    assert facts["auc"] > 0.8


@pytest.mark.parametrize("budget", [0, 1, 17, 40, 1000])
def test_token_batches(budget):
    """Every index once, longest first, no batch above the budget when padded unless it is one text."""
    lengths = np.random.default_rng(0).integers(1, 40, size=50).tolist()
    batches = rewards.token_batches(lengths, budget)
    flat = [i for batch in batches for i in batch]
    assert sorted(flat) == list(range(50)) and [lengths[i] for i in flat] == sorted(lengths, reverse=True)
    for batch, following in zip(batches, [*batches[1:], None], strict=True):
        widest = lengths[batch[0]]
        assert len(batch) == 1 or widest * len(batch) <= budget
        assert following is None or widest * (len(batch) + 1) > budget, "the next text would have fitted"


def test_token_batches_by_hand():
    assert rewards.token_batches([3, 10, 3, 2], 12) == [[1], [0, 2, 3]]
    assert rewards.token_batches([], 12) == []


# --- VADER, n-grams


def test_vader_by_hand():
    """compound = s / √(s² + 15), s the sum of valences: good 1.9, bad −2.5, great 3.1; "not" multiplies by −0.74,
    "very" adds 0.293, "!" adds 0.292; of two clauses joined by "but" the first counts half, the second 1.5 times.
    """
    cases = {
        "good": 1.9, "a good film": 1.9, "bad": -2.5, "not good": -0.74 * 1.9, "very good": 1.9 + 0.293,
        "good!": 1.9 + 0.292, "good but bad": 0.5 * 1.9 - 1.5 * 2.5, "a film": 0.0, "great and good": 3.1 + 1.9,
    }  # fmt: skip
    expected = [s / math.sqrt(s * s + 15) for s in cases.values()]
    assert Vader().score(list(cases)) == pytest.approx(expected, abs=1e-4)


def test_distinct_and_repetition_by_hand():
    """1 2 1 2 1 has the bigrams 12 21 12 21, two of them new; with 2 1 beside it, two of 5. Trigrams: 121 212 121."""
    assert rewards.distinct_n([[1, 2, 1, 2, 1]]) == 2 / 4
    assert rewards.distinct_n([[1, 2, 1, 2, 1], [2, 1], [7], []]) == 2 / 5
    assert rewards.distinct_n([[1, 2, 3]], n=1) == 1 and math.isnan(rewards.distinct_n([[1], []]))
    assert rewards.repetition([1, 2, 1, 2, 1]) == pytest.approx(1 / 3)
    assert rewards.repetition([5] * 10) == pytest.approx(7 / 8)
    assert rewards.repetition([1, 2]) == rewards.repetition([]) == rewards.repetition([1, 2, 3, 4]) == 0


# --- the scorer and the job


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """Six prompts with two responses each; one response is empty, one only ends."""
    folder = tmp_path_factory.mktemp("answers")
    tokenizer = data.load_tokenizer(assets.model_dir("tiny"))
    prompts, lines = [], []
    for i in range(6):
        ids = data.render(tokenizer, TEXTS[i], "plain")
        cut = 4 + i
        prompts.append({"id": f"B{i}", "prompt_ids": ids[:cut]})
        for sample in range(2):
            said = [*ids[cut : cut + 3 + 4 * i + sample], 1] if (i, sample) != (3, 1) else []
            lines.append({"id": f"B{i}", "sample": sample, "response_ids": said, "logp": -1.5 * i})
    lines[8]["response_ids"] = [1]
    (folder / "prompts.json").write_text(json.dumps(prompts))
    (folder / "responses.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder, prompts, lines


def test_scorer(answers, bag, head, tmp_path):
    """In a child: each reward reads prompt and response together; logp_sft is the response's, for the first prompts."""
    folder, prompts, lines = answers
    target, classifier = assets.model_dir("tiny"), head()
    kinds = {
        "words": {"kind": "bag_of_words", "folder": str(bag[0])},
        "model": {"kind": "classifier", "folder": str(classifier), "token_budget": 64},
        "vader": {"kind": "vader"},
    }
    config = {"target": str(target), "precision": "fp32"}
    given = {"rewards": kinds, "prompts": str(folder / "prompts.json"), "responses": str(folder / "responses.jsonl")}
    with launch.Worker("beyond_dpo.rewards", config, tmp_path / "log", desc="score") as worker:
        facts = worker.call("score", **given, out=str(tmp_path / "scores.jsonl"), reference_prompts=5)
        worker.call("score", **given, out=str(tmp_path / "none.jsonl"))
        worker.call("score", **given | {"rewards": {"vader": kinds["vader"]}}, out=str(tmp_path / "one.jsonl"))
    table = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    assert [(r["id"], r["sample"], r["logp"]) for r in table] == [(r["id"], r["sample"], r["logp"]) for r in lines]
    tokenizer, asked = data.load_tokenizer(target), {p["id"]: p["prompt_ids"] for p in prompts}
    texts = [tokenizer.decode(asked[r["id"]] + r["response_ids"], skip_special_tokens=True) for r in lines]
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
    """Where prompts tell what was asked: one user's words or turns; one without a chat template reads the text."""
    folder, prompts, lines = answers
    asked = {p["id"]: TEXTS[i] if i % 2 else rewards.chat("Hi", "Hello")[:1] for i, p in enumerate(prompts)}
    told = [p | {"text": asked[p["id"]]} for p in prompts]
    (tmp_path / "prompts.json").write_text(json.dumps(told))
    model, encoder = head("llama"), head()
    bare = transformers.AutoTokenizer.from_pretrained(encoder)
    bare.chat_template = None
    (encoder / "chat_template.jinja").unlink(missing_ok=True)
    bare.save_pretrained(encoder)
    kinds = {"turns": {"kind": "finished", "folder": str(model)}, "text": {"kind": "classifier", "folder": str(model)}}
    kinds |= {"bare": {"kind": "finished", "folder": str(encoder)}}
    kinds |= {"words": {"kind": "bag_of_words", "folder": str(bag[0])}}
    files = [str(tmp_path / "prompts.json"), str(folder / "responses.jsonl"), str(tmp_path / "scores.jsonl")]
    Scorer(str(assets.model_dir("tiny"))).score(kinds, *files)
    table = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    tokenizer, ids = data.load_tokenizer(assets.model_dir("tiny")), {p["id"]: p["prompt_ids"] for p in prompts}
    said = [tokenizer.decode(r["response_ids"], skip_special_tokens=True) for r in lines]
    chats = [rewards.chat(asked[r["id"]], answer) for r, answer in zip(lines, said, strict=True)]
    texts = [tokenizer.decode(ids[r["id"]] + r["response_ids"], skip_special_tokens=True) for r in lines]
    assert chats[0] == [*rewards.chat("Hi", said[0])] and chats[2][0]["content"] == TEXTS[1]
    wanted = {"turns": Classifier(model).score(chats), "text": Classifier(model).score(texts)}
    wanted |= {"bare": Classifier(encoder).score(texts), "words": rewards.BagOfWords(bag[0]).score(texts)}
    for name, scores in wanted.items():
        assert [r[name] for r in table] == pytest.approx(scores, abs=1e-4)
    assert np.abs(wanted["turns"] - wanted["text"]).max() > 0.01


def test_a_reward_of_a_world_without_labels_is_not_measured(tmp_path):
    job = {"texts": [], "labels": [], "held_out": [[], []], "seed": 0, "out": str(tmp_path), "reward": "reward"}
    (tmp_path / "job.json").write_text(json.dumps(job | {"encoder": "unread", "trust_remote_code": False}))
    rewards.main(str(tmp_path / "job.json"))
    assert json.loads((tmp_path / "facts.json").read_text()) == {}


def test_a_reward_is_loaded_once(answers, bag, tmp_path):
    folder, scorer = answers[0], Scorer(str(assets.model_dir("tiny")))
    files = [str(folder / "prompts.json"), str(folder / "responses.jsonl"), str(tmp_path / "out")]
    words, vader = {"kind": "bag_of_words", "folder": str(bag[0])}, {"kind": "vader"}
    rewards.load.cache_clear()
    for asked in ({"gold": words}, {"gold": words, "vader": vader}, {"gold": words}):
        scorer.score(asked, *files)
    assert rewards.load.cache_info().misses == 2


def test_unknown_kind_of_reward_is_named(answers, tmp_path):
    files = [str(answers[0] / name) for name in ("prompts.json", "responses.jsonl")]
    with pytest.raises(KeyError, match="vaders"):
        Scorer(str(assets.model_dir("tiny"))).score({"x": {"kind": "vaders"}}, *files, str(tmp_path / "out"))


@pytest.mark.parametrize("encoder", [False, True], ids=["bag_of_words", "classifier"])
def test_training_job_in_a_child(encoder, bag, tmp_path):
    """`python -m beyond_dpo.rewards JOB.json` leaves the reward and facts.json; the same numbers as in this process."""
    job = {"texts": TEXTS[:64], "labels": LABELS[:64], "held_out": HELD_OUT, "seed": 0, "out": str(tmp_path)}
    job["reward"] = "reward" if encoder else "gold"
    job |= {"encoder": str(assets.model_dir("tiny-encoder"))} if encoder else {}
    launch.run("beyond_dpo.rewards", job, tmp_path / "checkpoints", desc="train")
    facts = json.loads(Path(tmp_path, "facts.json").read_text())
    assert facts["trained_on"] == 64 and facts["held_out"] == 32
    if encoder:
        assert np.isfinite(Classifier(tmp_path).score(TEXTS[:2])).all()
    else:
        assert facts == bag[1]
