"""WRPO: sources, what is chosen of their responses, the quadruples, and what is trained on them, at
profile smoke.
"""

import gzip
import json
import re
import shutil

import pandas as pd
import pytest
import yaml
from transformers import AutoTokenizer

from beyond_dpo import templates
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
from conftest import openai_server

SMOKE = config.load("wrpo", "smoke", seeds=[0])
KEY = "sk-not-to-be-found-anywhere"


def lines(artifact, name="responses.jsonl"):
    return [json.loads(line) for line in (artifact.get() / name).read_text().splitlines()]


def with_source(**source):
    """Return the configuration with one source only, called `one`."""
    return config.load("wrpo", "smoke", known_sources={"one": source}, sources=["one"])


def recorded(file, **source):
    return with_source(kind="recorded", ref=str(file), **source)


@pytest.fixture(scope="module")
def wording(store):
    tokenizer = templates.load_tokenizer(assets.model_dir("tiny"))
    prompts = stages.texts(SMOKE.world).json("prompts.json")
    return [tokenizer.decode(row["prompt_ids"], skip_special_tokens=True) for row in prompts]


# ---- sources


def test_people_go_on_with_their_own_review(store):
    texts, tokenizer = stages.texts(SMOKE.world), templates.load_tokenizer(assets.model_dir("tiny"))
    asked = {row["id"]: row["prompt_ids"] for row in texts.json("prompts.json")}
    written = {" ".join(text.split()) for text, _ in corpus.halves("fixtures")[0]}
    said = lines(sources.answers(SMOKE, "human"))
    assert [line["id"] for line in said] == list(asked) and {line["sample"] for line in said} == {0}
    for line in said:
        whole = tokenizer.decode(asked[line["id"]] + line["response_ids"], skip_special_tokens=True)
        assert len(line["response_ids"]) <= 16 and any(
            text.startswith(whole.strip()) for text in written
        )


def test_a_chat_model_goes_on_where_the_text_stands(store):
    asked, texts = sources._put(SMOKE, SMOKE.known_sources["chat"]), stages.texts(SMOKE.world)
    tokenizer = templates.load_tokenizer(assets.model_dir("tiny"))
    for row, prompt in zip(asked.json("prompts.json"), texts.json("prompts.json"), strict=True):
        text = tokenizer.decode(prompt["prompt_ids"], skip_special_tokens=True)
        wanted = f"<s><|user|> Go on with this film review: {text}</s><|assistant|> {text}"
        assert tokenizer.decode(row["prompt_ids"]) == wanted
    said = lines(sources.answers(SMOKE, "chat"))
    assert len(said) == 16 * 3 and {len(line["response_ids"]) for line in said} <= set(range(1, 17))


def test_recorded_answers_are_matched_by_prompt(store, tmp_path, wording):
    """As plain rows, or in the form of the data set that WRPO's authors published; unanswered
    prompts are counted.
    """
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "The best."}]
    rows = [
        {"prompt": wording[0], "response": "It is good."},
        {"prompt": wording[0], "response": wording[0] + " is long."},
        {
            "prompt": {"role": "user", "content": wording[1]},
            "chosen": [turns, "The target's."],
            "rejected": ["Bad."],
        },
        {"prompt": "asked by nobody", "response": "Nothing."},
        {"prompt": wording[2], "response": " "},
    ]
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    artifact = sources.answers(recorded(tmp_path / "answers.jsonl"), "one")
    decode = templates.load_tokenizer(assets.model_dir("tiny")).decode
    found = [decode(line["response_ids"]) for line in lines(artifact)]
    assert found == [" It is good.</s>", " is long.</s>", " The best.</s>"]
    assert artifact.manifest["facts"] == {"responses": 3, "unanswered": 14}


def test_in_a_chat_the_prompt_is_asked_as_it_is(store, tmp_path):
    """Its tokens hold the template's words too: neither a source nor a recorded prompt must see
    them.
    """
    chat = {
        "world__template": "chat",
        "known_sources": {"one": {"kind": "model", "ref": "tiny", "ask": "{prompt}"}},
    }
    cfg = config.load("wrpo", "smoke", **chat)
    rows = stages.texts(cfg.world).json("prompts.json")
    asked = sources._put(cfg, cfg.known_sources["one"]).json("prompts.json")
    decode = templates.load_tokenizer(assets.model_dir("tiny")).decode
    assert [decode(row["prompt_ids"]) for row in asked] == [
        f"<s><|user|> {r['text']}</s><|assistant|>" for r in rows
    ]
    file = tmp_path / "answers.jsonl"
    file.write_text(json.dumps({"prompt": rows[3]["text"], "response": "Yes."}))
    chat["known_sources"] = {"one": {"kind": "recorded", "ref": str(file)}}
    cfg = config.load("wrpo", "smoke", **chat)
    said = lines(sources.answers(cfg, "one"))
    assert [line["id"] for line in said] == [rows[3]["id"]] and decode(
        said[0]["response_ids"]
    ) == " Yes.</s>"


@pytest.mark.parametrize("kind", ["model", "endpoint"])
@pytest.mark.parametrize(
    "ask", ["Go on with this review.", "Go on: {Prompt}", "Go on: {}", "Go on: {prompt!r}"]
)
def test_a_source_is_not_asked_the_same_of_every_prompt(store, kind, ask):
    cfg = with_source(kind=kind, ref="tiny", url="http://127.0.0.1:9", ask=ask)
    with pytest.raises(
        config.ConfigError, match=r"known_sources.one.ask has no \{prompt\} in it, got 'Go on"
    ):
        sources.answers(cfg, "one")


def test_braces_around_a_prompt_are_text(store, wording):
    source = config.Source(
        kind="model", ref="tiny", ask='Reply as JSON {"text": ...} {0} {{x}}: {prompt}'
    )
    decode = templates.load_tokenizer(assets.model_dir("tiny")).decode
    for row, text in zip(sources._put(SMOKE, source).json("prompts.json"), wording, strict=True):
        asked = 'Reply as JSON {"text": ...} {0} {{x}}: ' + text
        assert sources.asking(source, text) == asked
        assert decode(row["prompt_ids"]) == f"<s><|user|> {asked}</s><|assistant|> {text}"
    assert sources.asking(config.Source(kind="endpoint"), "a {b}") == "a {b}"


def test_a_source_ended_where_an_end_token_stands(store, tiny):
    """Not where its last token is any special one, nor where it has none."""

    def make(out):
        rows = [
            {"id": str(i), "response_ids": ids}
            for i, ids in enumerate([[9, 1], [9, 2], [9, 0], [9], []])
        ]
        (out / "responses.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    said = artifacts.Artifact("responses", 2, {"invented": "ends"}, make)
    found = sources._decoded(tiny, [{"id": str(i), "prompt_ids": [0, 8]} for i in range(5)], said)
    assert [found[str(i)][0][1] for i in range(5)] == [True, False, False, False, False]


def test_recorded_answers_as_people_have_them(store, tmp_path, wording):
    """An array, with a byte-order mark, blank lines, gzipped; a text of bytes that are no UTF-8 is
    refused by name.
    """
    rows = [
        {"prompt": text, "response": f"It is\u2028{i}."}
        for i, text in enumerate(dict.fromkeys(wording))
    ]
    text = "\r\n\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    files = {
        "array.json": json.dumps(rows, indent=1).encode(),
        "bom.jsonl": b"\xef\xbb\xbf" + text.encode(),
    }
    files["zip.jsonl.gz"] = gzip.compress(files["bom.jsonl"])
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        assert len(
            sources._recorded(config.Source(kind="recorded", ref=str(tmp_path / name)))
        ) == len(rows)
    files = {
        "latin.jsonl": text.replace("\u2028", "é").encode("latin-1"),
        "utf16.jsonl": text.encode("utf-16"),
    }
    for name, content in (files | {"early.gz": gzip.compress(text.encode())[:-9]}).items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(config.ConfigError, match=f"{name}: row 0 is not"):
            sources._recorded(config.Source(kind="recorded", ref=str(tmp_path / name)))


def test_a_recorded_dialogue_is_not_its_last_turn(tmp_path):
    """Two dialogues that end alike have answers of their own."""
    turns = [
        [
            {"role": "user", "content": text},
            {"role": "assistant", "content": "Yes."},
            {"role": "user", "content": "Go on"},
        ]
        for text in "ab"
    ]
    rows = [
        {"prompt": prompt, "response": prompt[0]["content"]} for prompt in [*turns, turns[0][:1]]
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    found = sources._recorded(config.Source(kind="recorded", ref=str(tmp_path / "rows.json")))
    told = [*map(preferences.dialogue, turns), "a"]
    assert found == {text: [(answer, True)] for text, answer in zip(told, "aba", strict=True)}


def test_answers_that_the_targets_template_does_not_take_are_counted(store, tmp_path, tiny):
    """In a chat an answer has the tokens that it has there; reviewers go on where the user's words
    end.
    """
    chat = {
        "world__template": "chat",
        "known_sources": {"human": {"kind": "human"}},
        "sources": ["human"],
    }
    tokenizer = templates.load_tokenizer(tiny)
    written = {" ".join(text.split()) for text, _ in corpus.halves("fixtures")[0]}

    def answers(target):
        cfg = config.load(
            "wrpo",
            "smoke",
            **chat,
            source_sets=[["human"]],
            world__target=target,
            world__sft_rows=0,
        )
        return stages.texts(cfg.world).json("prompts.json"), sources.answers(cfg, "human")

    rows, artifact = answers("tiny")
    asked = {row["id"]: row for row in rows}
    assert artifact.manifest["facts"] == {"responses": 16, "unanswered": 0}
    for line in lines(artifact):
        text = tokenizer.decode(line["response_ids"]).removesuffix("</s>").removeprefix(" ")
        whole = f"<s><|user|> {asked[line['id']]['text']}</s><|assistant|> {text}"
        assert (
            tokenizer.decode(asked[line["id"]]["prompt_ids"] + line["response_ids"]).removesuffix(
                "</s>"
            )
            == whole
        )
        assert any(
            review.startswith(
                (asked[line["id"]]["text"] + text, f"{asked[line['id']]['text']} {text}")
            )
            for review in written
        )

    most = sorted(len(row["text"]) for row in rows)[8]
    refuse = "{% if messages[-1].role == 'assistant' and messages[0].content | length > MOST %}"
    refuse = refuse.replace("MOST", str(most)) + "{{ raise_exception('too long') }}{% endif %}"
    shutil.copytree(tiny, tmp_path / "strict")
    other = AutoTokenizer.from_pretrained(tmp_path / "strict")
    other.chat_template = refuse + assets.CHAT_TEMPLATE
    other.save_pretrained(tmp_path / "strict")
    rows, artifact = answers(str(tmp_path / "strict"))
    long = sum(len(row["text"]) > most for row in rows)
    assert 0 < long < 16
    assert artifact.manifest["facts"] == {
        "responses": 16 - long,
        "unanswered": long,
        "refused": long,
    }


def test_recorded_answers_that_are_none_say_so(store, tmp_path):
    file = tmp_path / "answers.jsonl"
    few = '{"prompt": "a", "response": "b"}\n'
    for text, message in [
        ('{"prompt": "a"}\n', "row 0 is not .*chosen"),
        (few + '{"pro', "row 1 is not"),
        ('{"prompt": "a", "chosen": "Good"}', "not a list of responses: .*Good"),
        (
            '{"prompt": "a", "chosen": [{"role": "user", "content": "a"}]}',
            "not a list of responses",
        ),
        (few, "source one answers none of the 16 prompts"),
    ]:
        file.write_text(text)
        with pytest.raises(config.ConfigError, match=message):
            sources.answers(recorded(file), "one").get()
    with pytest.raises(assets.AssetError, match="no such folder or file"):
        sources.answers(recorded(tmp_path / "missing.jsonl"), "one")


@pytest.fixture(scope="module")
def endpoint(tiny):
    """Start a real OpenAI-compatible server with the tiny model; yield its address."""
    with openai_server(
        tiny, "tiny", KEY, "--dtype", "float32", "--max-model-len", "256"
    ) as address:
        yield f"{address}/v1"


def test_an_endpoint_is_asked_and_an_interrupted_run_goes_on(store, endpoint, monkeypatch, wording):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    cfg = with_source(kind="endpoint", ref="tiny", url=endpoint, ask="Go on: {prompt}")
    artifact = sources.answers(cfg, "one")
    assert (
        artifact.key
        == sources.answers(
            with_source(kind="endpoint", ref="tiny", ask="Go on: {prompt}"), "one"
        ).key
    )
    kept = {text: [[f"said before {i}", True] for i in range(3)] for text in wording[:2]}
    before = paths.ARTIFACTS / f"{artifact.key}.partial" / "checkpoints" / "replies.jsonl"
    before.parent.mkdir(parents=True)
    before.write_text("".join(json.dumps(item) + "\n" for item in kept.items()) + '["half a li')
    said = lines(artifact)
    decode = templates.load_tokenizer(assets.model_dir("tiny")).decode
    assert len(said) == 16 * 3 and artifact.manifest["facts"] == {"responses": 48, "unanswered": 0}
    assert [decode(line["response_ids"]) for line in said[:6]] == [
        f" said before {i}</s>" for i in (0, 1, 2)
    ] * 2
    assert len({tuple(line["response_ids"]) for line in said[6:]}) > 20, "sampled"
    written = [path.read_bytes() for path in paths.ARTIFACTS.rglob("*") if path.is_file()]
    assert len(written) > 10 and not any(KEY.encode() in content for content in written)


def test_an_endpoint_needs_a_key_and_says_which(store, endpoint, monkeypatch):
    cfg = with_source(kind="endpoint", ref="tiny", url=endpoint, ask="Once more: {prompt}")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(Exception, match="OPENAI_API_KEY"):
        sources.answers(cfg, "one").get()
    monkeypatch.setenv("OPENAI_API_KEY", "sk-wrong")
    with pytest.raises(Exception, match="401"):
        sources.answers(cfg, "one").get()


def test_what_an_endpoint_refuses_is_unanswered(store, endpoint, monkeypatch, wording):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    cfg = with_source(
        kind="endpoint", ref="tiny", url=endpoint, ask="too long for 256 tokens " * 100 + "{prompt}"
    )
    artifact = sources.answers(cfg, "one")
    with pytest.raises(config.ConfigError, match="source one answers none of the 16 prompts"):
        artifact.get()
    kept = paths.ARTIFACTS / f"{artifact.key}.partial" / "checkpoints" / "replies.jsonl"
    assert [json.loads(line)[1] for line in kept.read_text().splitlines()] == [[]] * len(
        set(wording)
    )


# ---- what is chosen


def test_best_and_worst_by_hand():
    """Ties are broken by the seed, the same each time; no preference without a response, or among
    equals.
    """
    group = pd.DataFrame({"reward": [0.5, 2.0, -1.0, 2.0, -1.0]}, index=[10, 11, 12, 13, 14])
    found = [wrpo.best_and_worst(group, f"prompt {i}") for i in range(40)]
    assert {best for best, _ in found} == {11, 13} and {worst for _, worst in found} == {12, 14}
    assert found == [wrpo.best_and_worst(group, f"prompt {i}") for i in range(40)]
    assert wrpo.best_and_worst(group[:1], "a") == (10, 10), "one response is the best there is"
    assert (
        wrpo.best_and_worst(None, "a") is None
        and wrpo.best_and_worst(group.iloc[[1, 3]], "a") is None
    )


def test_y_ws_is_the_best_of_all_sources(store):
    best, asked = wrpo.fusion(SMOKE, SMOKE.sources), stages.texts(SMOKE.world).json("prompts.json")
    highest = {}
    for name in SMOKE.sources:
        answers = sources.answers(SMOKE, name)
        said = {(line["id"], line["sample"]): line["response_ids"] for line in lines(answers)}
        for score in lines(wrpo.scored(SMOKE, answers), "scores.jsonl"):
            new = (score["reward"], name, said[score["id"], score["sample"]])
            highest.setdefault(score["id"], []).append(new)
    rows = read_rows(best.get() / "best.jsonl")
    assert [row["id"] for row in rows] == [row["id"] for row in asked] and best.manifest["facts"][
        "dropped"
    ] == 0
    for row in rows:
        best_of = max(reward for reward, _, _ in highest[row["id"]])
        fits = [(name, ids) for reward, name, ids in highest[row["id"]] if reward == best_of]
        assert (row["source"], row["responses"]["source_chosen"]) in fits and len(
            row["responses"]
        ) == 1
    assert (
        sum(best.manifest["facts"]["wins"].values()) == 16
        and len(best.manifest["facts"]["wins"]) == 2
    )


def test_thirds_share_no_prompt(store):
    split, best = wrpo.thirds(SMOKE), wrpo.fusion(SMOKE, SMOKE.sources)
    first, rest = ({row["id"] for row in split.json(f"{name}.json")} for name in ("first", "rest"))
    assert (len(first), len(rest)) == (5, 11) and not first & rest
    assert {row["id"] for row in read_rows(best.get() / "sft.jsonl")} == first
    model = wrpo.target_sft(SMOKE, SMOKE.sources)
    assert {
        row["id"]
        for row in read_rows(wrpo.quadruples(SMOKE, SMOKE.sources, model).get() / "pairs.jsonl")
    } <= rest


def test_y_wt_and_y_l_are_target_sfts_own_best_and_worst(store):
    model = wrpo.target_sft(SMOKE, SMOKE.sources)
    answers, judged = wrpo.own(SMOKE, model)
    said = {(line["id"], line["sample"]): line["response_ids"] for line in lines(answers)}
    scores = pd.DataFrame(lines(judged, "scores.jsonl"))
    rows = read_rows(wrpo.quadruples(SMOKE, SMOKE.sources, model).get() / "pairs.jsonl")
    best = {
        row["id"]: row for row in read_rows(wrpo.fusion(SMOKE, SMOKE.sources).get() / "best.jsonl")
    }
    assert len(rows) > 5
    for row in rows:
        here = scores[scores["id"] == row["id"]].set_index("sample")["reward"]
        assert row["responses"]["source_chosen"] == best[row["id"]]["responses"]["source_chosen"]
        for name, wanted in (("target_chosen", here.max()), ("rejected", here.min())):
            assert row["responses"][name] in [
                said[row["id"], sample] for sample in here.index[here == wanted]
            ]


def test_prompts_without_a_preference_are_counted_and_dropped(store, tmp_path, wording):
    """Two responses that are the same score alike; one alone is the best there is; most prompts
    have none.
    """
    said = [
        (wording[0], "Good."),
        (wording[0], "Good."),
        (wording[1], "Good."),
        (wording[2], "Good."),
        (wording[2], "B"),
    ]
    rows = [
        json.dumps({"prompt": prompt, "response": response}) + "\n" for prompt, response in said
    ]
    (tmp_path / "few.jsonl").write_text("".join(rows))
    facts = wrpo.fusion(recorded(tmp_path / "few.jsonl"), ("one",)).manifest["facts"]
    assert facts == {"wins": {"one": 2}, "dropped": 14}


# ---- what is trained


def test_main_result_compares_all_models_on_the_same_prompts(store):
    table = wrpo.main_result(SMOKE).csv("responses.csv.gz")
    names = [
        "Target",
        "Target-SFT",
        "Target-DPO",
        "Target-IPO",
        "Target-SimPO",
        "Target-SFT-DPO",
        "Target-SFT-WRPO",
    ]
    assert table["model"].unique().tolist() == names
    assert (table.groupby("model")["prompt"].nunique() == SMOKE.world.test_prompts).all()
    assert table[["gold", "reward", "vader", "logratio", "length"]].notna().all(axis=None)
    assert table[table["model"] == "Target"]["logratio"].abs().max() < 0.02, (
        "KL is that to the target"
    )
    assert not {"prompt_ids", "response_ids", "text", "id"} & set(table.columns)
    ways = [
        wrpo.trained(SMOKE, "dpo", beta=0.1),
        wrpo.trained(SMOKE, "dpo", beta=0.1, base=stages.sft(SMOKE)),
    ]
    ways += [wrpo.fused(SMOKE), wrpo.trained(SMOKE, "dpo", beta=0.1, responses=wrpo.OFF_POLICY)]
    assert len({way.key for way in ways}) == 4 and wrpo.OFF_POLICY == ("source_chosen", "rejected")
    drawn = []
    for way in ways[:2]:
        (draw,) = [one for key, one in way.upstream.items() if key.startswith("draw")]
        drawn.append({row["id"] for row in read_rows(draw.get() / "pairs.jsonl")})
    assert len(drawn[0] & drawn[1]) >= 0.9 * max(map(len, drawn)), "but for ties the same prompts"
    shared = [key for key in ways[0].upstream if key.startswith("reference")]
    assert len(shared) == 1 and all(shared[0] in way.upstream for way in ways[2:]), (
        "one pass for all losses"
    )


def test_collected_responses_and_logs(store):
    table = wrpo.collected(SMOKE).csv("responses.csv.gz")
    assert (
        set(table["source"]) == {"human", "chat", "Target-SFT"}
        and table["overlap"].between(0, 1).all()
    )
    assert table.columns.tolist() == ["reward", "length", "source", "prompt", "overlap", "chosen"]
    chosen = table[table["chosen"]].groupby("prompt")["source"].agg(set)
    assert (chosen.map(len) == 2).all(), "the best of the sources and the best of the target's own"
    facts = wrpo.collected(SMOKE).json("facts.json")
    assert sum(facts["sources"]["wins"].values()) == 16
    log, gap = (wrpo.dynamics(SMOKE).csv(f"{name}.csv") for name in ("log", "gap"))
    fused = log[log["model"] == "Target-SFT-WRPO"]
    assert fused["alpha"].tolist() == pytest.approx(
        [0.1 * step / len(fused) for step in range(len(fused))], abs=1e-6
    )
    weighted = (
        fused["alpha"] * fused["source_chosen_reward"]
        + (1 - fused["alpha"]) * fused["target_chosen_reward"]
    )
    assert fused["chosen_reward"].tolist() == pytest.approx(weighted.tolist(), abs=1e-5)
    assert set(gap["model"]) == {"Target", "Target-SFT"} and set(gap["response"]) == set(
        config.FUSED
    )
    assert (gap["nats"] < 0).all()


def test_without_labels_the_reward_model_judges(store):
    def make(out):
        rows = [
            {"id": i, "sample": 0, "reward": i + 1, "logp": -1, "logp_sft": None} for i in range(2)
        ]
        (out / "scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    cfg = config.load("wrpo", "smoke", world__gold_rows=0)
    invented = artifacts.Artifact("scores", 2, {"invented": True}, make)
    found = gather.judged(cfg, [({"model": "only here"}, invented)]).csv("responses.csv.gz")
    assert found["gold"].tolist() == found["reward"].tolist() == [1, 2]


@pytest.mark.parametrize("profile", ["smoke", "cpu", "gpu", "paper"])
def test_the_trainings_of_each_experiment(profile, monkeypatch):
    monkeypatch.setenv("COMPUTE", "plan")
    cfg, found = config.load("wrpo", profile), {}
    for name in ("main_result", "weighted", "by_sources", "by_objective", "collected", "dynamics"):
        upstream = getattr(wrpo, name)(cfg).upstream
        found[name] = sum(key.startswith("train") for key in upstream)
        assert sum(key.startswith("reward-reward") for key in upstream) == 1
    start, seeds, losses = int(cfg.world.sft_rows > 0) + 1, len(cfg.seeds), len(cfg.objectives)
    sets = len({*cfg.source_sets, cfg.sources})
    assert found["main_result"] == start + seeds * (losses + 2) and found["collected"] == start
    assert (
        found["weighted"] == start + 4 + 2 * len(cfg.alphas) - 2
    )  # dynamic 0.1 and static 1 are there
    assert (
        found["by_sources"] == start - 1 + 2 * sets and found["by_objective"] == start + 2 * losses
    )
    assert found["dynamics"] == start + 2 * seeds + len(cfg.alphas) - 1


def test_win_rate_by_hand():
    """Of prompt 0 one sample wins and one ties, 3/4; of prompt 1 both lose: 3/8 in the mean, minus
    one half.
    """
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
    table = pd.DataFrame(rows, columns=["model", "prompt", "sample", "gold"])
    mean, low, high = wrpo.win_rate(table, "gold", "a", "b", seed=0)
    assert mean == pytest.approx(3 / 8 - 1 / 2) and (low, high) == (-0.5, 0.25)
    assert wrpo.win_rate(table, "gold", "b", "a", seed=0)[0] == pytest.approx(1 / 2 - 3 / 8)


def test_the_papers_settings():
    """papers: batch 128, SFT 7e-6, WRPO 3e-7, β 0.01, α to 0.1, a third for SFT, 5 samples of ten
    sources.
    """
    cfg = config.load("wrpo", "paper")
    assert (cfg.train.lr, cfg.train.beta, cfg.train.alpha, cfg.train.dynamic) == (
        3e-7,
        0.01,
        0.1,
        True,
    )
    assert (
        cfg.sft.lr == 7e-6
        and cfg.train.global_batch == cfg.sft.global_batch == 128
        and cfg.train.zero == 3
    )
    assert (cfg.sampling.temperature, cfg.sampling.top_p, cfg.world.samples) == (0.8, 0.95, 5)
    assert len(cfg.sources) == 10 and {cfg.known_sources[name].kind for name in cfg.sources} == {
        "model"
    }
    assert (cfg.train.max_prompt, cfg.train.max_length, cfg.train.warmup, cfg.sft_share) == (
        1800,
        2048,
        0.1,
        1 / 3,
    )
    assert (
        "gemma" not in config.load("wrpo", "cpu").sources
        and "Gemma" in config.load("wrpo", "cpu").known_sources["gemma"].terms
    )


def test_an_unknown_source_is_refused():
    with pytest.raises(config.ConfigError, match="unknown source 'chatt'; did you mean 'chat'?"):
        config.load("wrpo", "smoke", sources=["human", "chatt"])
    with pytest.raises(config.ConfigError, match="unknown source 'humans'"):
        config.load("wrpo", "smoke", source_sets=[["chat"], ["humans", "chat"]])


def test_the_readmes_sources_are_entries_of_a_profile():
    block = re.search(r"```yaml\n(.*?)```", (paths.ROOT / "README.md").read_text(), re.S)[1]
    known = yaml.safe_load(block)["known_sources"]
    cfg = config.load("wrpo", "cpu", known_sources=known, sources=list(known))
    assert {source.kind for source in cfg.known_sources.values()} == {
        "model",
        "endpoint",
        "recorded",
        "human",
    }
    assert sources.shown(cfg)["source"].tolist() == ["mine", "served", "kept"]


def test_gemma_begins_with_bos_and_brings_its_terms():
    """Its GGUF tokenizer adds none, and without it the model writes garbage (perplexity 218 in
    place of 41).
    """
    folder = paths.CACHE / f"gemma-{artifacts.digest(assets.resolve('gemma'))[:12]}"
    if not folder.is_dir():
        pytest.skip("Gemma is only downloaded where a run names it")
    tokenizer = templates.load_tokenizer(assets.model_dir("gemma"))
    ids = templates.render(tokenizer, "The film opens with", "plain")
    assert ids[0] == tokenizer.bos_token_id == 2 and ids.count(2) == 1 and len(ids) == 5
    assert {"GEMMA_TERMS.html", "NOTICE.md"} <= {path.name for path in folder.iterdir()}
