"""WRPO: sources, what is chosen of their responses, the quadruples, and what is trained on them."""

import dataclasses
import gzip
import json
import re
import shutil

import pandas as pd
import pytest
import yaml
from transformers import AutoTokenizer

from beyond_dpo import templates
from beyond_dpo.jobs.settings import CLOCK
from beyond_dpo.machine import paths
from beyond_dpo.pipeline import (
    artifacts,
    assets,
    config,
    corpus,
    gather,
    preferences,
    sources,
    stages,
    wrpo,
)
from beyond_dpo.rows import read_rows

SMOKE = config.load("wrpo", "smoke", seeds=[0])
EXPERIMENTS = (
    "main_result",
    "weighted",
    "by_sources",
    "by_objective",
    "collected",
    "dynamics",
)


def lines(artifact, name="responses.jsonl"):
    return stages.json_lines(artifact.get() / name)


def rows_of(artifact, name="pairs.jsonl"):
    return read_rows(artifact.get() / name)


def as_lines(rows):
    """Return rows as JSON lines."""
    return "".join(json.dumps(row) + "\n" for row in rows)


def with_source(**source):
    """Return the configuration with one source only, called `one`."""
    return config.load("wrpo", "smoke", known_sources={"one": source}, sources=["one"])


def recorded(file, **source):
    return with_source(kind="recorded", ref=str(file), **source)


def read_recorded(file):
    """Return a file of recorded answers, by prompt."""
    return sources._recorded(config.Source(kind="recorded", ref=str(file)))


def in_chat(**source):
    """Return the configuration in a chat, with one source only, called `one`."""
    return config.load(
        "wrpo",
        "smoke",
        world__template="chat",
        known_sources={"one": source},
        sources=["one"],
        source_sets=[["one"]],
    )


@pytest.fixture(scope="module")
def tokenizer(tiny):
    return templates.load_tokenizer(tiny)


@pytest.fixture(scope="module")
def prompts(store):
    """Return the prompts of the configuration."""
    return stages.texts(SMOKE.world).json("prompts.json")


@pytest.fixture(scope="module")
def wording(prompts, tokenizer):
    """Return the prompts as texts."""
    return [tokenizer.decode(row["prompt_ids"], skip_special_tokens=True) for row in prompts]


@pytest.fixture(scope="module")
def reviews():
    half_a, _ = corpus.halves("fixtures")
    return {" ".join(text.split()) for text, _ in half_a}


# --- sources: people and models


def test_people_answer_each_prompt_once(store, prompts):
    answers = lines(sources.answers(SMOKE, "human"))
    assert [line["id"] for line in answers] == [row["id"] for row in prompts]
    assert {line["sample"] for line in answers} == {0}
    assert max(len(line["response_ids"]) for line in answers) <= 16


def test_people_go_on_with_their_own_review(store, prompts, reviews, tokenizer):
    prompt_ids = {row["id"]: row["prompt_ids"] for row in prompts}
    for line in lines(sources.answers(SMOKE, "human")):
        whole = prompt_ids[line["id"]] + line["response_ids"]
        text = tokenizer.decode(whole, skip_special_tokens=True).strip()
        assert any(review.startswith(text) for review in reviews), text


def test_a_chat_model_goes_on_where_the_text_stands(store, wording, tokenizer):
    asked = sources._put(SMOKE, SMOKE.known_sources["chat"], sources.every_prompt(SMOKE))
    for row, text in zip(asked.json("prompts.json"), wording, strict=True):
        wanted = f"<s><|user|> Go on with this film review: {text}</s><|assistant|> {text}"
        assert tokenizer.decode(row["prompt_ids"]) == wanted


def test_a_chat_model_answers_each_prompt_several_times(store):
    answers = lines(sources.answers(SMOKE, "chat"))
    assert len(answers) == 16 * 3
    lengths = {len(line["response_ids"]) for line in answers}
    assert lengths <= set(range(1, 17))


def test_a_chat_model_is_asked_a_chats_prompt_as_it_is(store, tokenizer):
    """The prompt's tokens hold the template's words too: a source must not see them."""
    cfg = in_chat(kind="model", ref="tiny", ask="{prompt}")
    prompts = stages.texts(cfg.world).json("prompts.json")
    asked = sources._put(cfg, cfg.known_sources["one"], sources.every_prompt(cfg)).json(
        "prompts.json"
    )
    for row, prompt in zip(asked, prompts, strict=True):
        wanted = f"<s><|user|> {prompt['text']}</s><|assistant|>"
        assert tokenizer.decode(row["prompt_ids"]) == wanted


@pytest.mark.parametrize("kind", ["model", "endpoint"])
@pytest.mark.parametrize(
    "ask",
    [
        "Go on with this review.",
        "Go on: {Prompt}",
        "Go on: {}",
        "Go on: {prompt!r}",
    ],
)
def test_a_source_is_not_asked_the_same_of_every_prompt(store, kind, ask):
    cfg = with_source(kind=kind, ref="tiny", url="http://127.0.0.1:9", ask=ask)
    message = r"known_sources.one.ask has no \{prompt\} in it, got 'Go on"
    with pytest.raises(config.ConfigError, match=message):
        sources.answers(cfg, "one")


def test_braces_around_a_prompt_are_text(store, wording, tokenizer):
    front = 'Reply as JSON {"text": ...} {0} {{x}}: '
    source = config.Source(kind="model", ref="tiny", ask=front + "{prompt}")
    asked = sources._put(SMOKE, source, sources.every_prompt(SMOKE)).json("prompts.json")
    for row, text in zip(asked, wording, strict=True):
        assert sources.asking(source, text) == front + text
        wanted = f"<s><|user|> {front}{text}</s><|assistant|> {text}"
        assert tokenizer.decode(row["prompt_ids"]) == wanted


def test_a_source_that_asks_nothing_is_given_the_prompt():
    assert sources.asking(config.Source(kind="endpoint"), "a {b}") == "a {b}"


def test_a_source_ended_where_an_end_token_stands(store, tiny):
    """Not where its last token is any special one, nor where it has none."""
    responses = [[9, 1], [9, 2], [9, 0], [9], []]

    def make(out):
        rows = [{"id": str(i), "response_ids": ids} for i, ids in enumerate(responses)]
        (out / "responses.jsonl").write_text(as_lines(rows))

    answers = artifacts.Artifact("responses", 2, {"invented": "ends"}, make)
    prompts = [{"id": str(i), "prompt_ids": [0, 8]} for i in range(5)]
    decoded = sources._decoded(tiny, prompts, answers)
    ended = []
    for prompt in prompts:
        ((_, end),) = decoded[prompt["id"]]
        ended.append(end)
    assert ended == [True, False, False, False, False]


# --- sources: recorded answers


def test_recorded_answers_are_matched_by_prompt(store, tmp_path, wording, tokenizer):
    """As plain rows, or as WRPO's authors published theirs; unanswered prompts are counted."""
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "The best."}]
    as_published = {
        "prompt": {"role": "user", "content": wording[1]},
        "chosen": [turns, "The target's."],
        "rejected": ["Bad."],
    }
    rows = [
        {"prompt": wording[0], "response": "It is good."},
        {"prompt": wording[0], "response": wording[0] + " is long."},
        as_published,
        {"prompt": "asked by nobody", "response": "Nothing."},
        {"prompt": wording[2], "response": " "},
    ]
    file = tmp_path / "answers.jsonl"
    file.write_text(as_lines(rows))
    artifact = sources.answers(recorded(file), "one")
    texts = [tokenizer.decode(line["response_ids"]) for line in lines(artifact)]
    assert texts == [" It is good.</s>", " is long.</s>", " The best.</s>"]
    assert artifact.manifest["facts"] == {"responses": 3, "unanswered": 14}


def test_recorded_answers_in_a_chat_are_matched_by_what_is_asked(store, tmp_path, tokenizer):
    file = tmp_path / "answers.jsonl"
    cfg = in_chat(kind="recorded", ref=str(file))
    prompt = stages.texts(cfg.world).json("prompts.json")[3]
    file.write_text(json.dumps({"prompt": prompt["text"], "response": "Yes."}))
    (answer,) = lines(sources.answers(cfg, "one"))
    assert answer["id"] == prompt["id"]
    assert tokenizer.decode(answer["response_ids"]) == " Yes.</s>"


@pytest.fixture(scope="module")
def recorded_rows(wording):
    """Return rows of recorded answers whose texts hold a separator that ends no line."""
    texts = dict.fromkeys(wording)
    return [{"prompt": text, "response": f"It is\u2028{i}."} for i, text in enumerate(texts)]


@pytest.fixture(scope="module")
def recorded_lines(recorded_rows):
    """Return the rows as JSON lines of another system, with blank lines between them."""
    return "\r\n\r\n".join(json.dumps(row, ensure_ascii=False) for row in recorded_rows)


def test_recorded_answers_may_be_an_array(tmp_path, recorded_rows):
    file = tmp_path / "array.json"
    file.write_text(json.dumps(recorded_rows, indent=1))
    assert len(read_recorded(file)) == len(recorded_rows)


def test_recorded_answers_may_begin_with_a_mark_and_be_gzipped(
    tmp_path, recorded_rows, recorded_lines
):
    content = b"\xef\xbb\xbf" + recorded_lines.encode()
    file = tmp_path / "bom.jsonl"
    file.write_bytes(content)
    assert len(read_recorded(file)) == len(recorded_rows)
    file = tmp_path / "zip.jsonl.gz"
    file.write_bytes(gzip.compress(content))
    assert len(read_recorded(file)) == len(recorded_rows)


def as_latin(text):
    return text.replace("\u2028", "é").encode("latin-1")


def as_utf16(text):
    return text.encode("utf-16")


def as_cut_archive(text):
    return gzip.compress(text.encode())[:-9]


@pytest.mark.parametrize(
    "name, encode",
    [
        ("latin.jsonl", as_latin),
        ("utf16.jsonl", as_utf16),
        ("early.gz", as_cut_archive),
    ],
)
def test_recorded_answers_in_another_encoding_are_refused_by_name(
    tmp_path, recorded_lines, name, encode
):
    file = tmp_path / name
    file.write_bytes(encode(recorded_lines))
    with pytest.raises(config.ConfigError, match=f"{name}: row 0 is not"):
        read_recorded(file)


def test_a_recorded_dialogue_is_not_its_last_turn(tmp_path):
    """Two dialogues that end alike have answers of their own."""
    dialogues = []
    for text in "ab":
        dialogue = [
            {"role": "user", "content": text},
            {"role": "assistant", "content": "Yes."},
            {"role": "user", "content": "Go on"},
        ]
        dialogues.append(dialogue)
    first_turn = dialogues[0][:1]
    rows = [
        {"prompt": dialogues[0], "response": "1"},
        {"prompt": dialogues[1], "response": "2"},
        {"prompt": first_turn, "response": "3"},
    ]
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(rows))
    assert read_recorded(file) == {
        preferences.dialogue(dialogues[0]): [("1", True)],
        preferences.dialogue(dialogues[1]): [("2", True)],
        "a": [("3", True)],
    }


ROW = '{"prompt": "a", "response": "b"}\n'
USERS_TURN = '[{"role": "user", "content": "a"}]'


@pytest.mark.parametrize(
    "content, message",
    [
        ('{"prompt": "a"}\n', "row 0 is not .*chosen"),
        (ROW + '{"pro', "row 1 is not"),
        ('{"prompt": "a", "chosen": "Good"}', "not a list of responses: .*Good"),
        ('{"prompt": "a", "chosen": ' + USERS_TURN + "}", "not a list of responses"),
        (ROW, "source one answers none of the 16 prompts"),
    ],
)
def test_recorded_answers_that_are_none_say_so(store, tmp_path, content, message):
    file = tmp_path / "answers.jsonl"
    file.write_text(content)
    with pytest.raises(config.ConfigError, match=message):
        sources.answers(recorded(file), "one").get()


def test_a_missing_file_of_recorded_answers_is_refused(tmp_path):
    with pytest.raises(assets.AssetError, match="no such folder or file"):
        sources.answers(recorded(tmp_path / "missing.jsonl"), "one")


# --- sources: in a chat


def reviewers_in_chat(target):
    """Return the prompts of a chat with a target, and how reviewers go on."""
    cfg = config.load(
        "wrpo",
        "smoke",
        world__template="chat",
        world__target=str(target),
        world__sft_rows=0,
        known_sources={"human": {"kind": "human"}},
        sources=["human"],
        source_sets=[["human"]],
    )
    prompts = stages.texts(cfg.world).json("prompts.json")
    return prompts, sources.answers(cfg, "human")


def test_reviewers_go_on_in_a_chat_where_the_users_words_end(store, reviews, tokenizer):
    """An answer has the tokens that it has there."""
    prompts, artifact = reviewers_in_chat("tiny")
    prompt_of = {row["id"]: row for row in prompts}
    assert artifact.manifest["facts"] == {"responses": 16, "unanswered": 0}
    for line in lines(artifact):
        prompt = prompt_of[line["id"]]
        begin = prompt["text"]
        decoded = tokenizer.decode(line["response_ids"])
        text = decoded.removesuffix("</s>").removeprefix(" ")
        whole = tokenizer.decode(prompt["prompt_ids"] + line["response_ids"])
        wanted = f"<s><|user|> {begin}</s><|assistant|> {text}"
        assert whole.removesuffix("</s>") == wanted
        continued = (begin + text, f"{begin} {text}")
        assert any(review.startswith(continued) for review in reviews)


def test_answers_that_the_targets_template_does_not_take_are_counted(store, tmp_path, tiny):
    prompts, _ = reviewers_in_chat("tiny")
    sizes = sorted(len(row["text"]) for row in prompts)
    longest = sizes[8]
    refusal = (
        "{% if messages[-1].role == 'assistant' and "
        f"messages[0].content | length > {longest} %}}"
        "{{ raise_exception('too long') }}{% endif %}"
    )
    strict = tmp_path / "strict"
    shutil.copytree(tiny, strict)
    tokenizer = AutoTokenizer.from_pretrained(strict)
    tokenizer.chat_template = refusal + assets.CHAT_TEMPLATE
    tokenizer.save_pretrained(strict)
    _, artifact = reviewers_in_chat(strict)
    refused = sum(size > longest for size in sizes)
    assert 0 < refused < 16
    assert artifact.manifest["facts"] == {
        "responses": 16 - refused,
        "unanswered": refused,
        "refused": refused,
    }


# --- sources: endpoints


def test_the_address_of_an_endpoint_is_not_in_a_key(store):
    asked = {"kind": "endpoint", "ref": "tiny", "ask": "Go on: {prompt}"}
    elsewhere = with_source(**asked, url="http://127.0.0.1:9")
    key = sources.answers(with_source(**asked), "one").key
    assert sources.answers(elsewhere, "one").key == key


# --- what is chosen


@pytest.fixture
def tied():
    """Return rewards of which two are the highest and two the lowest."""
    return pd.DataFrame({"reward": [0.5, 2.0, -1.0, 2.0, -1.0]}, index=[10, 11, 12, 13, 14])


def test_ties_are_broken_by_the_seed_the_same_each_time(tied):
    ends = [wrpo.best_and_worst(tied, f"prompt {i}") for i in range(40)]
    assert {best for best, _ in ends} == {11, 13}
    assert {worst for _, worst in ends} == {12, 14}
    again = [wrpo.best_and_worst(tied, f"prompt {i}") for i in range(40)]
    assert again == ends


def test_one_response_is_the_best_there_is(tied):
    assert wrpo.best_and_worst(tied[:1], "a") == (10, 10)


def test_there_is_no_best_of_nothing_or_of_equals(tied):
    equals = tied.iloc[[1, 3]]
    assert wrpo.best_and_worst(None, "a") is None
    assert wrpo.best_and_worst(equals, "a") is None


@pytest.fixture(scope="module")
def best(store):
    """Return the fusion of all sources."""
    return wrpo.fusion(SMOKE, SMOKE.sources)


@pytest.fixture(scope="module")
def target_sft(store):
    return wrpo.target_sft(SMOKE, SMOKE.sources)


@pytest.fixture(scope="module")
def quadruples(target_sft):
    return wrpo.quadruples(SMOKE, SMOKE.sources, target_sft)


def by_response(artifact, name="responses.jsonl"):
    """Return the lines of a file by (prompt, sample)."""
    return {(line["id"], line["sample"]): line for line in lines(artifact, name)}


def test_y_ws_is_the_best_of_all_sources(best):
    responses = {}  # (reward, source, response_ids) of every response, by prompt
    for source in SMOKE.sources:
        answers = sources.answers(SMOKE, source)
        scores = by_response(wrpo.scored(SMOKE, answers), "scores.jsonl")
        for response, line in by_response(answers).items():
            entry = (scores[response]["reward"], source, line["response_ids"])
            responses.setdefault(line["id"], []).append(entry)
    for row in rows_of(best, "best.jsonl"):
        candidates = responses[row["id"]]
        highest = max(reward for reward, _, _ in candidates)
        assert list(row["responses"]) == ["source_chosen"]
        chosen = (highest, row["source"], row["responses"]["source_chosen"])
        assert chosen in candidates


def test_every_prompt_has_a_best_response_of_some_source(best, prompts):
    rows = rows_of(best, "best.jsonl")
    assert [row["id"] for row in rows] == [prompt["id"] for prompt in prompts]
    facts = best.manifest["facts"]
    assert facts["dropped"] == 0
    assert sum(facts["wins"].values()) == 16
    assert len(facts["wins"]) == 2


def ids(rows):
    return {row["id"] for row in rows}


def test_thirds_share_no_prompt(best, quadruples):
    split = wrpo.thirds(SMOKE)
    first = ids(split.json("first.json"))
    rest = ids(split.json("rest.json"))
    assert len(first) == 5
    assert len(rest) == 11
    assert not first & rest
    assert ids(rows_of(best, "sft.jsonl")) == first
    assert ids(rows_of(quadruples)) <= rest


def test_quadruples_hold_the_sources_best_response(best, quadruples):
    chosen = {}
    for row in rows_of(best, "best.jsonl"):
        chosen[row["id"]] = row["responses"]["source_chosen"]
    rows = rows_of(quadruples)
    assert len(rows) > 5
    for row in rows:
        assert row["responses"]["source_chosen"] == chosen[row["id"]]


def test_y_wt_and_y_l_are_target_sfts_own_best_and_worst(target_sft, quadruples):
    answers, judged = wrpo.own(SMOKE, target_sft)
    responses = by_response(answers)
    scores = pd.DataFrame(lines(judged, "scores.jsonl"))
    for row in rows_of(quadruples):
        name = row["id"]
        rewards = scores[scores["id"] == name].set_index("sample")["reward"]
        ends = {"target_chosen": rewards.max(), "rejected": rewards.min()}
        for response, reward in ends.items():
            samples = rewards.index[rewards == reward]
            candidates = [responses[name, sample]["response_ids"] for sample in samples]
            assert row["responses"][response] in candidates


def test_prompts_without_a_preference_are_counted_and_dropped(store, tmp_path, wording):
    """Two responses that are the same score alike; one alone is the best there is."""
    answers = [
        (wording[0], "Good."),
        (wording[0], "Good."),
        (wording[1], "Good."),
        (wording[2], "Good."),
        (wording[2], "B"),
    ]
    rows = [{"prompt": prompt, "response": response} for prompt, response in answers]
    file = tmp_path / "few.jsonl"
    file.write_text(as_lines(rows))
    fusion = wrpo.fusion(recorded(file), ("one",))
    assert fusion.manifest["facts"] == {"wins": {"one": 2}, "dropped": 14}


# --- what is trained


@pytest.fixture(scope="module")
def main_result(store):
    """Return the table of the main result."""
    return wrpo.main_result(SMOKE).csv("responses.csv.gz")


def test_main_result_compares_all_models_on_the_same_prompts(main_result):
    names = [
        "Target",
        "Target-SFT",
        "Target-DPO",
        "Target-IPO",
        "Target-SimPO",
        "Target-SFT-DPO",
        "Target-SFT-WRPO",
    ]
    assert main_result["model"].unique().tolist() == names
    answered = main_result.groupby("model")["prompt"].nunique()
    assert (answered == SMOKE.world.test_prompts).all()


def test_main_result_has_every_score_and_no_text(main_result):
    scores = ["gold", "reward", "vader", "logratio", "length"]
    assert main_result[scores].notna().all(axis=None)
    assert not {"prompt_ids", "response_ids", "text", "id"} & set(main_result.columns)


def test_the_kl_of_the_main_result_is_that_to_the_target(main_result):
    target = main_result[main_result["model"] == "Target"]
    assert target["logratio"].abs().max() < 0.02


@pytest.fixture(scope="module")
def trainings(store):
    """Return trainings that share quadruples or prompts, none of them computed."""
    start = stages.sft(SMOKE)
    return {
        "own": wrpo.trained(SMOKE, "dpo", beta=0.1),
        "target": wrpo.trained(SMOKE, "dpo", beta=0.1, base=start),
        "fused": wrpo.fused(SMOKE),
        "off policy": wrpo.trained(SMOKE, "dpo", beta=0.1, responses=wrpo.OFF_POLICY),
    }


def test_each_way_of_training_has_a_key_of_its_own(trainings):
    keys = {training.key for training in trainings.values()}
    assert len(keys) == 4
    assert wrpo.OFF_POLICY == ("source_chosen", "rejected")


def test_models_of_one_seed_are_trained_on_the_same_prompts(trainings):
    """But for ties, which leave a prompt without a quadruple."""
    drawn = []
    for name in ("own", "target"):
        upstream = trainings[name].upstream.values()
        (draw,) = [artifact for artifact in upstream if artifact.stage == "draw"]
        drawn.append(ids(rows_of(draw)))
    largest = max(map(len, drawn))
    assert len(drawn[0] & drawn[1]) >= 0.9 * largest


def test_one_reference_pass_serves_all_losses(trainings):
    upstream = trainings["own"].upstream
    (reference,) = [key for key in upstream if key.startswith("reference")]
    assert reference in trainings["fused"].upstream
    assert reference in trainings["off policy"].upstream


@pytest.mark.parametrize("profile", ["smoke", "cpu", "gpu", "paper"])
def test_the_trainings_of_each_experiment(profile, monkeypatch):
    monkeypatch.setenv("COMPUTE", "plan")
    cfg = config.load("wrpo", profile)
    count = {}
    for name in EXPERIMENTS:
        experiment = getattr(wrpo, name)
        upstream = experiment(cfg).upstream
        count[name] = sum(key.startswith("train") for key in upstream)
        assert sum(key.startswith("reward-reward") for key in upstream) == 1
    start = int(cfg.world.sft_rows > 0) + 1  # SFT, where it is trained here, and Target-SFT
    seeds = len(cfg.seeds)
    losses = len(cfg.objectives)
    alphas = len(cfg.alphas)
    source_sets = len({*cfg.source_sets, cfg.sources})
    assert count == {
        "main_result": start + seeds * (losses + 2),
        "weighted": start + 4 + 2 * alphas - 2,  # dynamic 0.1 and static 1 are there
        "by_sources": start - 1 + 2 * source_sets,
        "by_objective": start + 2 * losses,
        "collected": start,
        "dynamics": start + 2 * seeds + alphas - 1,
    }


# --- what sources say, and what the training does


@pytest.fixture(scope="module")
def collected(store):
    return wrpo.collected(SMOKE)


def test_collected_responses_are_of_every_source(collected):
    table = collected.csv("responses.csv.gz")
    assert list(table) == ["reward", "length", "source", "prompt", "overlap", "chosen"]
    assert set(table["source"]) == {"human", "chat", "Target-SFT"}
    assert table["overlap"].between(0, 1).all()
    facts = collected.json("facts.json")
    assert sum(facts["sources"]["wins"].values()) == 16


def test_the_best_of_the_sources_and_of_the_targets_own_are_chosen(collected):
    table = collected.csv("responses.csv.gz")
    chosen = table[table["chosen"]]
    sources_of_prompt = chosen.groupby("prompt")["source"].agg(set)
    assert len(sources_of_prompt) > 5
    for names in sources_of_prompt:
        assert len(names) == 2
        assert "Target-SFT" in names


def test_overlap_is_the_share_of_token_pairs_of_another_response():
    """Of the target's two responses one pair of two is shared; the source's pairs are all there."""
    rows = [
        ("a", "Target-SFT", [1, 2, 3]),
        ("a", "Target-SFT", [1, 2, 4]),
        ("a", "source", [2, 3]),
        ("b", "source", [2, 3]),
        ("a", "source", [5]),
    ]
    table = pd.DataFrame(rows, columns=["id", "source", "response_ids"])
    assert wrpo._overlaps(table) == [0.5, 0.5, 1.0, 0.0, 0.0]


@pytest.fixture(scope="module")
def dynamics(store):
    return wrpo.dynamics(SMOKE)


def test_alpha_grows_linearly_along_the_training(dynamics):
    log = dynamics.csv("log.csv")
    assert not set(CLOCK) & set(log.columns), "what the clock decides does not repeat"
    fused = log[log["model"] == "Target-SFT-WRPO"]
    steps = len(fused)
    wanted = [0.1 * step / steps for step in range(steps)]
    assert fused["alpha"].tolist() == pytest.approx(wanted, abs=1e-6)


def test_the_chosen_reward_blends_those_of_source_and_target(dynamics):
    log = dynamics.csv("log.csv")
    fused = log[log["model"] == "Target-SFT-WRPO"]
    alpha = fused["alpha"]
    of_source = alpha * fused["source_chosen_reward"]
    of_target = (1 - alpha) * fused["target_chosen_reward"]
    wanted = of_source + of_target
    assert fused["chosen_reward"].tolist() == pytest.approx(wanted.tolist(), abs=1e-5)


def test_the_gap_is_of_every_response_under_both_references(dynamics):
    gap = dynamics.csv("gap.csv")
    assert set(gap["model"]) == {"Target", "Target-SFT"}
    assert set(gap["response"]) == set(config.FUSED)
    assert (gap["nats"] < 0).all()


def test_without_labels_the_reward_model_judges(store):
    def make(out):
        rows = []
        for prompt in (0, 1):
            row = {"id": prompt, "sample": 0, "reward": prompt + 1, "logp": -1, "logp_sft": None}
            rows.append(row)
        (out / "scores.jsonl").write_text(as_lines(rows))

    cfg = config.load("wrpo", "smoke", world__gold_rows=0)
    invented = artifacts.Artifact("scores", 2, {"invented": True}, make)
    point = gather.Point({"model": "only here"}, invented)
    table = gather.judged(cfg, [point]).csv("responses.csv.gz")
    assert table["reward"].tolist() == [1, 2]
    assert table["gold"].tolist() == [1, 2]


@pytest.fixture
def two_judged_models():
    """Return what two models scored: of prompt 0 "a" wins and ties, of prompt 1 it loses twice."""
    rows = [
        ("a", 0, 0, 2.0),
        ("a", 0, 1, 1.0),
        ("a", 1, 0, 0.0),
        ("a", 1, 1, 0.0),
        ("b", 0, 0, 1.0),
        ("b", 0, 1, 1.0),
        ("b", 1, 0, 1.0),
        ("b", 1, 1, 1.0),
    ]
    return pd.DataFrame(rows, columns=["model", "prompt", "sample", "gold"])


def test_win_rate_by_hand(two_judged_models):
    """3/4 of prompt 0 and nothing of prompt 1 are 3/8 in the mean, minus one half."""
    mean, low, high = wrpo.win_rate(two_judged_models, "gold", "a", "b", seed=0)
    assert mean == pytest.approx(3 / 8 - 1 / 2)
    assert (low, high) == (-0.5, 0.25)
    mean, _, _ = wrpo.win_rate(two_judged_models, "gold", "b", "a", seed=0)
    assert mean == pytest.approx(1 / 2 - 3 / 8)


# --- settings


def test_the_papers_training():
    cfg = config.load("wrpo", "paper")
    train = cfg.train
    assert train.lr == 3e-7
    assert train.beta == 0.01
    assert train.alpha == 0.1
    assert train.dynamic
    assert train.warmup == 0.1
    assert train.global_batch == cfg.sft.global_batch == 128
    assert train.max_prompt == 1800
    assert train.max_length == 2048
    assert train.zero == 3
    assert cfg.sft.lr == 7e-6


def test_the_papers_sources():
    cfg = config.load("wrpo", "paper")
    assert cfg.sampling.temperature == 0.8
    assert cfg.sampling.top_p == 0.95
    assert cfg.world.samples == 5
    assert cfg.sft_share == 1 / 3
    assert len(cfg.sources) == 10
    kinds = {cfg.known_sources[name].kind for name in cfg.sources}
    assert kinds == {"model"}


def test_gemma_is_only_used_where_it_is_named():
    cfg = config.load("wrpo", "cpu")
    assert "gemma" not in cfg.sources
    assert "Gemma" in cfg.known_sources["gemma"].terms


def test_an_unknown_source_is_refused():
    message = "unknown source 'chatt'; did you mean 'chat'?"
    with pytest.raises(config.ConfigError, match=message):
        config.load("wrpo", "smoke", sources=["human", "chatt"])
    with pytest.raises(config.ConfigError, match="unknown source 'humans'"):
        config.load("wrpo", "smoke", source_sets=[["chat"], ["humans", "chat"]])


def test_the_docs_sources_are_entries_of_a_profile():
    page = (paths.ROOT / "docs" / "own_code.md").read_text()
    block = re.search(r"```yaml\n(.*?)```", page, re.S)[1]
    known = yaml.safe_load(block)["known_sources"]
    cfg = config.load("wrpo", "cpu", known_sources=known, sources=list(known))
    kinds = {source.kind for source in cfg.known_sources.values()}
    assert kinds == {"model", "endpoint", "recorded", "human", "target", "expo"}
    assert sources.shown(cfg)["source"].tolist() == ["mine", "served", "kept"]


@pytest.fixture
def gemma():
    """Return the folder of Gemma."""
    digest = artifacts.digest(assets.resolve("gemma"))
    folder = paths.CACHE / f"gemma-{digest[:12]}"
    if not folder.is_dir():
        pytest.skip("Gemma is only downloaded where a run names it")
    return folder


def test_gemma_begins_with_bos(gemma):
    """Its GGUF tokenizer adds none, and without it the model writes garbage."""
    tokenizer = templates.load_tokenizer(assets.model_dir("gemma"))
    prompt_ids = templates.render(tokenizer, "The film opens with", "plain")
    assert prompt_ids[0] == tokenizer.bos_token_id == 2
    assert prompt_ids.count(2) == 1
    assert len(prompt_ids) == 5


def test_gemma_brings_its_terms(gemma):
    files = {path.name for path in gemma.iterdir()}
    assert {"GEMMA_TERMS.html", "NOTICE.md"} <= files


# --- the bandit of sources


@pytest.fixture(scope="module")
def small_bandit():
    """Return settings of a map of two sources, one of which is varied in one way each."""
    return config.load(
        "wrpo",
        "smoke",
        bandit_strengths=[2.0],
        bandit_distances=[0.0, 3.0],
        bandit_alphas=[0.0, 0.1, 1.0],
        bandit_rising=[0.1],
        bandit_seeds=2,
        bandit_varied=[[2.0, 0.0]],
        bandit_prompts=[16],
        bandit_noises=[0.0],
        bandit_kls=[0.25],
    )


def test_the_bandit_has_a_row_for_each_cell_seed_and_method(store, small_bandit):
    result = wrpo.fusion_bandit(small_bandit)
    rises = result.csv("rises.csv.gz")
    assert len(rises) == 5 * 2 * 6
    place = ["strength", "distance", "prompts", "noise", "kl"]
    cells = [list(cell) for cell in rises[place].drop_duplicates().to_numpy()]
    assert cells == [
        [2, 0, 64, 1, 1],
        [2, 3, 64, 1, 1],
        [2, 0, 16, 1, 1],
        [2, 0, 64, 0, 1],
        [2, 0, 64, 1, 0.25],
    ]
    assert set(rises["method"]) == {"constant", "rising", "better", "both"}
    assert (rises["rise"] > 0).all()
    sources_table = result.csv("sources.csv")
    assert sources_table[place].to_numpy().tolist() == cells
    assert sources_table["stronger"].iloc[0] == pytest.approx(2, abs=0.4)
    assert sources_table["gap"].iloc[1] > sources_table["gap"].iloc[0] > 0


def test_the_bandits_rises_are_those_of_its_core(store, small_bandit):
    rises = wrpo.fusion_bandit(small_bandit).csv("rises.csv.gz")
    first = rises[(rises["distance"] == 3) & (rises["seed"] == 1)]
    drawn = wrpo.bandit.draw(wrpo.bandit.World(2.0, 3.0), 1)
    schedule = wrpo.bandit.constant([0.0, 0.1, 1.0], wrpo.STEPS)
    wanted = wrpo.bandit.at_kl(drawn.quadruples, schedule, drawn.test, kl=1.0, beta=wrpo.BETA)
    measured = first[first["method"] == "constant"]
    assert measured["alpha"].tolist() == [0, 0.1, 1]
    assert measured["rise"].tolist() == pytest.approx(wanted, abs=1e-4)


def test_identities_of_the_bandit_hold_to_float_error():
    differences = wrpo.bandit_identities()
    assert set(differences) == {"own", "source", "same"}
    assert max(differences.values()) < 1e-12


def test_the_bandits_key_knows_its_settings_and_its_world(small_bandit):
    key = wrpo.fusion_bandit(small_bandit).key
    changes = {
        "bandit_strengths": (1.0,),
        "bandit_distances": (1.0,),
        "bandit_alphas": (0.0, 0.2),
        "bandit_rising": (0.2,),
        "bandit_seeds": 3,
        "bandit_varied": ((1.0, 0.0),),
        "bandit_prompts": (32,),
        "bandit_noises": (2.0,),
        "bandit_kls": (2.0,),
    }
    for name, value in changes.items():
        changed = dataclasses.replace(small_bandit, **{name: value})
        assert wrpo.fusion_bandit(changed).key != key, name
    fewer = dataclasses.replace(small_bandit, bandit_varied=())
    assert len(wrpo.bandit_cells(fewer)) == 2


def test_prompts_of_the_bandit_that_are_no_equal_batches_are_refused(small_bandit):
    odd = dataclasses.replace(small_bandit, bandit_prompts=(40,))
    with pytest.raises(config.ConfigError, match="bandit_prompts: 40 prompts are no 16 equal"):
        wrpo.fusion_bandit(odd)
