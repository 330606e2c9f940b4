"""Benchmarks' scores against hand and published numbers.

Judges are asked for real, through a gate that makes faults.
"""

import gzip
import json
import logging
import math
import os
import re
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from http.server import ThreadingHTTPServer

import numpy as np
import pandas as pd
import pytest
import torch

from beyond_dpo import templates
from beyond_dpo.judging import ask, judge, published
from beyond_dpo.machine import paths
from beyond_dpo.notebook import report
from beyond_dpo.pipeline import assets, config, endpoint, sources, stages
from conftest import KEY, ODDS, Handler, reply, wait_for

RELEASED = paths.ROOT.parent / "shared" / "released"
released = pytest.mark.skipif(
    not RELEASED.is_dir(), reason="the authors' released annotations are not here"
)
MODELS = ("zephyr-7b-sft-full", "zephyr_0.1")


def annotations(model):
    with gzip.open(RELEASED / f"annotations_{model}.json.gz") as file:
        return json.load(file)


def leaderboard(model):
    return pd.read_csv(RELEASED / "alpaca_leaderboard.csv", index_col=0).loc[model]


def archive(*names):
    try:
        assets.fetch_all(list(names))
    except assets.AssetError as error:
        pytest.skip(str(error))


# ---- AlpacaEval's scores


def test_win_rate_by_hand():
    """Shares 0, 1, 0.5, 0.5, 0.25: the mean is 0.45.

    Their variance is (0.2025 + 0.3025 + 2 · 0.0025 + 0.04) / 4 = 0.1375.
    """
    score = judge.win_rate([1, 2, 1.5, 0, None, 1.25, math.nan])
    assert score.percent == pytest.approx(45)
    assert score.standard_error == pytest.approx(100 * math.sqrt(0.1375 / 5))
    assert score.discrete == pytest.approx(40), "a win, two draws of five"
    assert score.wins == 1
    assert score.losses == 2
    assert score.draws == 2
    assert score.dropped == 2


def test_turned_preferences_turn_the_win_rate():
    score = judge.win_rate([1, 2, 1.5, 0, 1.25])
    turned = judge.win_rate([2, 1, 1.5, 1.5, 1.75])
    assert turned.percent == pytest.approx(100 - score.percent)
    assert turned.wins == score.losses


@pytest.mark.parametrize(
    "preferences", [[], [1.5], [None, 1], [1, 2.5], [1, -1], [1, 0.5], [1, math.inf]]
)
def test_preferences_that_are_too_few_or_out_of_range_are_refused(preferences):
    with pytest.raises(ValueError, match="two or more preferences in 1…2"):
        judge.win_rate(preferences)


def recorded_preference(row):
    """Return the preference that one of the released judgments comes to."""
    if not row["raw_completion"]:
        assert row["output_1"] == row["output_2"], "only equal answers were not asked about"
        return 1.5
    content = row["raw_completion"]["logprobs"]["content"][0]
    top = {entry["token"]: entry["logprob"] for entry in content["top_logprobs"]}
    return judge.preference(top, ask.swapped(row["instruction"]))


@released
@pytest.mark.parametrize("model", MODELS)
def test_released_annotations_give_the_published_numbers(model):
    """Of 805 judgments that GPT-4 made: places, log-probabilities, preferences, the leaderboard."""
    rows = annotations(model)
    published_row = leaderboard(model)
    preferences = [recorded_preference(row) for row in rows]
    assert preferences == pytest.approx([row["preference"] for row in rows], abs=1e-9)
    score = judge.win_rate(preferences)
    assert score.percent == pytest.approx(published_row["win_rate"], rel=1e-11)
    assert score.standard_error == pytest.approx(published_row["standard_error"], rel=1e-11)
    assert score.discrete == pytest.approx(published_row["discrete_win_rate"], rel=1e-14)
    assert score.wins == published_row["n_wins"]
    assert score.losses == published_row["n_wins_base"]
    assert score.draws == published_row["n_draws"]
    tables = report.published("expo_leaderboard_mapping").set_index("leaderboard_csv_row")
    printed = tables.loc[model]
    assert round(score.percent, 4) == printed["win_rate"]
    assert round(score.standard_error, 4) == printed["standard_error"]


@released
@pytest.mark.parametrize("model, off, fitted", [(MODELS[0], 0.73, 6.12), (MODELS[1], 1.09, 7.11)])
def test_the_length_controlled_estimate_is_as_far_off_as_its_docstring_says(model, off, fitted):
    rows = annotations(model)
    printed = leaderboard(model)["length_controlled_winrate"]
    score = judge.length_controlled(rows)
    assert score.estimate
    assert score.percent - printed == pytest.approx(off, abs=0.01)
    assert score.low < printed < score.high < score.percent + 5
    by_fit = judge.length_controlled(rows, slope=None, n_boot=2)
    assert by_fit.percent - printed == pytest.approx(fitted, abs=0.01)
    plain = judge.win_rate(row["preference"] for row in rows)
    assert plain.percent < printed - 3.9, "further off"


def compared(longer, preferences):
    """Return rows in which the baseline's answer is `longer` characters longer than ours."""
    rows = []
    for difference, preference in zip(longer, preferences, strict=True):
        output_1 = "x" * (100 + difference)
        rows.append({"output_1": output_1, "output_2": "x" * 100, "preference": preference})
    return rows


def log_odds(share):
    return math.log(share / (1 - share))


def test_length_controlled_by_hand():
    """Two lengths: the fitted line goes through both groups' log-odds.

    Half-way between the lengths is the mean of the log-odds.
    """
    rows = compared([-50, 50] * 20, [1.8, 1.4] * 20)
    middle = (log_odds(0.8) + log_odds(0.4)) / 2
    expected = 100 / (1 + math.exp(-middle))
    fitted = judge.length_controlled(rows, slope=None, n_boot=5)
    assert fitted.percent == pytest.approx(expected, abs=1e-3)
    spread = np.std([-50, 50] * 20, ddof=1)
    slope = (log_odds(0.4) - log_odds(0.8)) / 2 / math.tanh(50 / spread)
    given = judge.length_controlled(rows, slope=slope, n_boot=5)
    assert given.percent == pytest.approx(expected, abs=1e-6)


def test_without_differences_in_length_it_is_the_win_rate():
    rows = compared([0] * 40, [1.0, 1.9] * 19 + [0, None])
    score = judge.length_controlled(rows, n_boot=200)
    plain = judge.win_rate(row["preference"] for row in rows)
    assert score.percent == pytest.approx(plain.percent, abs=1e-6)
    standard_error = (score.high - score.low) / (2 * 1.96)
    assert standard_error == pytest.approx(plain.standard_error, rel=0.2)


def test_the_same_seed_gives_the_same_interval():
    rows = compared([0] * 40, [1.0, 1.9] * 20)
    assert judge.length_controlled(rows, n_boot=9) == judge.length_controlled(rows, n_boot=9)


def test_a_model_that_loses_all_has_a_length_controlled_rate_of_0():
    score = judge.length_controlled(compared([5, -5, 9, -9], [1] * 4), n_boot=5)
    assert score.percent == pytest.approx(0, abs=1e-4)


def test_a_steep_slope_has_a_root_beyond_50():
    rows = compared([-50, 50, 9, 70] * 5, [1.8, 1.4, 1.2, 2.0] * 5)
    steep = judge.length_controlled(rows, slope=-80.0, n_boot=9)
    assert 0 <= steep.low <= steep.percent <= steep.high <= 100


@pytest.fixture
def whole_rows():
    return compared([-50, 50, 9, 70] * 5, [1.8, 1.4, 1.2, 2.0] * 5)


@pytest.fixture
def odd_rows(whole_rows):
    """Return rows of which each lacks an output or a preference."""
    first = whole_rows[0]
    return [
        first | {"output_1": None},
        first | {"output_2": math.nan},
        first | {"preference": "?"},
        {"preference": 1.5, "output_1": "alone"},
    ]


def test_a_row_that_does_not_fit_is_dropped_and_counted(whole_rows, odd_rows):
    """One missing output or preference made the length-controlled rate NaN."""
    whole = judge.length_controlled(whole_rows, n_boot=9)
    score = judge.length_controlled(whole_rows + odd_rows, n_boot=9)
    assert whole.dropped == 0
    assert score == whole._replace(dropped=4)
    table = pd.DataFrame(whole_rows + odd_rows)
    assert judge.length_controlled(table, n_boot=9) == score
    assert judge.length_controlled(iter(whole_rows), n_boot=9) == whole


def test_rows_without_what_the_rate_is_made_of_are_refused_by_name(whole_rows):
    few = "two or more rows with output_1, output_2 and a preference"
    unjudged = [row | {"preference": None} for row in whole_rows]
    with pytest.raises(ValueError, match=f"{few}: 0 of 20"):
        judge.length_controlled(unjudged, n_boot=9)
    with pytest.raises(ValueError, match=f"{few}: 1 of 1"):
        judge.length_controlled(whole_rows[:1], n_boot=9)
    with pytest.raises(ValueError, match="rows with preference, .*: 0 r"):
        judge.length_controlled([], n_boot=9)
    wrong = whole_rows[1] | {"preference": 3}
    with pytest.raises(ValueError, match="row 1 has 3"):
        judge.length_controlled([whole_rows[0], wrong], n_boot=9)


def test_alpaca_evals_own_fit_takes_no_row_that_does_not_fit(whole_rows, odd_rows):
    with pytest.raises(ValueError, match="needs both outputs of each row: row 20 lacks one"):
        judge.length_controlled(whole_rows + odd_rows, "df_gamed.csv")
    unjudged = [row | {"preference": None} for row in whole_rows]
    with pytest.raises(ValueError, match="two or more rows with a preference"):
        judge.length_controlled(unjudged, "df_gamed.csv")


def test_alpaca_eval_itself_fits_where_its_file_is_given(tmp_path):
    """On invented rows a win by the longer answer counts for less.

    It does so by AlpacaEval's function and by our estimate.
    """
    pytest.importorskip("alpaca_eval")
    rng = np.random.default_rng(0)
    delta = rng.normal(size=805)
    longer = [-int(100 * min(value, 0.9)) for value in delta]
    preferences = 1 + 1 / (1 + np.exp(-1.5 * delta))
    names = {"generator_1": "theirs", "generator_2": "ours", "annotator": "a"}
    rows = [row | names for row in compared(longer, preferences)]
    gamed = pd.DataFrame({"model": "theirs_verbose", "index": range(805)})
    gamed["preference"] = rng.uniform(size=805)
    gamed["instruction_difficulty"] = rng.normal(size=805)
    gamed["std_delta_len"] = rng.normal(size=805)
    gamed["not_gamed_baseline"] = False
    gamed.to_csv(tmp_path / "df_gamed.csv", index=False)
    score = judge.length_controlled(rows, tmp_path / "df_gamed.csv")
    assert not score.estimate
    assert score.low < score.percent < score.high
    ours = judge.length_controlled(rows, slope=None, n_boot=2)
    assert score.percent == pytest.approx(ours.percent, abs=3)


def test_preference_by_hand():
    logps = {"m": math.log(0.6), "M": math.log(0.2), "The": 0.1}
    assert judge.preference(logps, False) == pytest.approx(1.25)
    assert judge.preference(logps, True) == pytest.approx(1.75)


def test_a_single_name_is_a_whole_preference():
    assert judge.preference({"m": -0.1}, False) == 1
    assert judge.preference({"M": -9.0}, False) == 2


def test_no_name_is_no_preference():
    assert judge.preference({"Model": 0.0, " m": -1.0}, True) is None
    assert judge.preference({}, False) is None


def test_a_token_of_probability_zero_is_a_preference():
    """Servers write it as -9999, whose exponential is 0.

    Alone or beside an equal, it was no preference.
    """
    zero = -9999.0
    assert judge.preference({"m": zero, "The": 0.0}, False) == 1
    assert judge.preference({"m": zero, "M": zero}, False) == 1.5
    assert judge.preference({"m": zero, "M": -0.1}, True) == 1
    assert judge.preference({"m": -math.inf, "M": -math.inf}, False) is None


# ---- Arena-Hard's and MT-Bench's scores


STRONG = judge.STRONG


@pytest.mark.parametrize(
    "judgment, verdict",
    [
        ("[[A>>B]]", (1, STRONG)),
        ("So: [[A>B]].", (1, 1)),
        ("[[A=B]]", (0.5, 1)),
        ("[[B>A]]", (0, 1)),
        ("[[B>>A]]", (0, STRONG)),
        ("[[A<<B]]", (0, STRONG)),
        ("[[B<A]]", (1, 1)),
        ("not [[A>B]] but [[B>>A]]", (0, STRONG)),
        ("[A>B]", (1, 1)),
        ("[[A>A]]", None),
        ("", None),
        ("[[B=A]]", (0.5, 1)),
        ("[[B<<A]]", (1, STRONG)),
        ("[[A<B]]", (0, 1)),
        ("[b>>a], no: [a>b]", (1, 1)),
        ("[[a=b]] and [B>A]", (0.5, 1)),
        ("[[A>B]], or [[A]]", None),
        ("[[A>>>B]]", None),
        ("[[ A>B ]]", None),
    ],
)
def test_verdicts_are_read_as_arena_hard_does(judgment, verdict):
    """The last label counts."""
    assert judge.verdict(judgment) == verdict


@pytest.mark.parametrize(
    "judgment, rating",
    [
        ("Rating: [[7]]", 7),
        ("[[6.5]] of [[10]]", 6.5),
        ("[8]", 8),
        ("[3], that is [[4]]", 4),
        ("[[0]]", None),
        ("[[11]]", None),
        ("[[rating]]", None),
        ("ten", None),
        ("[[7]], no: [[8]]", 7),
        ("Rating: [[7/10]]", None),
        ("as [2023] says", None),
        ("[[10.]]", 10),
    ],
)
def test_ratings_are_read_as_mt_bench_does(judgment, rating):
    """The first number counts."""
    assert judge.rating(judgment) == rating


def test_mt_bench_by_hand():
    judgments = [(1, "[[9]]"), (1, "[[6]]"), (1, "?"), (2, "[[3]]")]
    rows = [{"turn": turn, "judgment": judgment} for turn, judgment in judgments]
    score = judge.mt_bench(rows)
    assert score == (7.5, 3, 6, 1), "overall is the mean of ratings, not of turns"
    assert math.isnan(judge.mt_bench(rows[:3]).second)


def games(uid, first, second, *judgments):
    """Return a question's games, the answers changing places."""
    rows = []
    for judgment in judgments:
        rows.append({"uid": uid, "model_a": first, "model_b": second, "judgment": judgment})
        first, second = second, first
    return rows


def test_arena_hard_against_the_baseline_alone_is_the_weighted_mean():
    won = games(1, "base", "ours", "[[B>>A]]", "[[A>B]]")
    lost_and_tied = games(2, "base", "ours", "[[A>B]]", "[[A=B]]")
    unparsed = games(3, "base", "ours", "[[B>>A]]", "I cannot say")
    table = judge.arena_hard(won + lost_and_tied + unparsed, "base", n_boot=50)
    (row,) = table.to_dict("records")
    assert row["percent"] == pytest.approx(100 * (3 + 1 + 0 + 0.5) / 6, abs=1e-3)
    assert row["low"] < row["percent"] < row["high"]
    assert row["model"] == "ours"
    assert row["questions"] == 2
    assert row["unparsed"] == 1


def test_arena_hard_along_a_chain_multiplies_the_odds():
    """Each model wins three of four games against the one before: odds 3, then 3 · 3."""
    lost = ("[[A>B]]", "[[B>A]]")
    won = ("[[B>A]]", "[[A>B]]")
    rows = []
    for question in range(8):
        judgments = won if question % 4 else lost
        rows += games(question, "base", "one", *judgments)
        rows += games(question, "one", "two", *judgments)
    rates = judge.arena_hard(rows, "base", n_boot=10).set_index("model")["percent"]
    assert rates["one"] == pytest.approx(75, abs=1e-3)
    assert rates["two"] == pytest.approx(90, abs=1e-3)
    turned = judge.arena_hard(rows, "two", n_boot=10).set_index("model")["percent"]
    assert turned["base"] == pytest.approx(100 - rates["two"], abs=1e-3)


def test_models_that_no_chain_ties_to_the_baseline_are_refused():
    rows = games(1, "base", "ours", "[[B>>A]]", "[[A>B]]")
    rows += games(1, "three", "four", "[[A>B]]")
    rows += games(1, "a", "base", "?")
    message = "no chain of verdicts ties all of .*'three'.* to base; unparsed: {'a': 1"
    with pytest.raises(ValueError, match=message):
        judge.arena_hard(rows, "base")


# ---- endpoints that reply what none should


def failed(**error):
    return {"choices": None, "error": error}


def with_choice(**choice):
    return {"choices": [{"index": 0, **choice}]}


def requests(count):
    """Return requests q0, q1, …"""
    made = {}
    for number in range(count):
        made[f"q{number}"] = {
            "messages": [{"role": "user", "content": f"Say {number}."}],
            "max_tokens": 4,
            "temperature": 0,
        }
    return made


def text(reply):
    return reply.choices[0].message.content if reply else None


def ids_in(kept):
    """Return the ids of the replies in a file, in its order."""
    return [json.loads(line)[0] for line in kept.read_text().splitlines()]


def test_an_error_in_a_200_and_a_damaged_reply_are_tried_again(scripted, tmp_path):
    """They ended the run, though each would pass: routers put a 429 into a 200."""
    wrong = [
        failed(code=429),
        {"error": {"code": "502"}},
        {"error": "upstream"},
        failed(type="overloaded_error"),
        failed(code=None, type="server_error"),
        {"choices": []},
        '{"id": "1", "choi',
        "",
        "[]",
        with_choice(error={"code": 503}, message={"content": ""}),
        with_choice(message=None),
        with_choice(),
        with_choice(message={"content": 7}),
    ]
    count = len(wrong)
    server = scripted(*wrong, reply())
    model = endpoint.Endpoint("m", server.url, at_once=count)
    values, used = endpoint.ask(model, requests(count), tmp_path / "kept.jsonl", text)
    assert list(values.values()) == ["Fine."] * count
    assert used == (count, 0, 0, 0)
    assert len(server.requests) == 2 * count


@pytest.mark.parametrize(
    "error",
    [
        {"code": 401},
        {"code": "invalid_api_key", "type": "invalid_request_error"},
        {"status": 403},
        {"code": "insufficient_quota", "type": "rate"},
        {"type": "NotFoundError", "code": 404},
    ],
)
def test_an_error_in_a_200_about_the_key_or_the_model_is_raised_at_once(scripted, tmp_path, error):
    server = scripted(failed(message="No.", **error))
    model = endpoint.Endpoint("m", server.url)
    with pytest.raises(endpoint.EndpointError, match="m: replied with an error: .*No"):
        endpoint.ask(model, requests(1), tmp_path / "kept.jsonl", text)
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    "error",
    [
        {"code": 400},
        {"code": "context_length_exceeded"},
        {"type": "invalid_request_error"},
        {"code": 413},
        {"type": "BadRequestError", "code": 400},
    ],
)
def test_an_error_in_a_200_about_one_request_is_a_refusal(scripted, tmp_path, error):
    server = scripted(failed(message="No.", **error))
    model = endpoint.Endpoint("m", server.url)
    values, used = endpoint.ask(model, requests(1), tmp_path / "kept.jsonl", text)
    assert values == {"q0": None}
    assert used == (0, 1, 0, 0)
    assert len(server.requests) == 1


@pytest.mark.parametrize("status", [400, 413, 422])
def test_what_was_refused_is_asked_again_by_a_later_run(scripted, tmp_path, status):
    """An endpoint that was set up wrongly refused what it answers now: that stayed for good."""
    kept = tmp_path / "kept.jsonl"
    server = scripted((status, {}), reply("First."), reply("Mended."))
    model = endpoint.Endpoint("m", server.url, at_once=1)
    values, used = endpoint.ask(model, requests(2), kept, text)
    assert values == {"q0": None, "q1": "First."}
    assert used == (1, 1, 0, 0)
    values, used = endpoint.ask(model, requests(2), kept, text)
    assert values == {"q0": "Mended.", "q1": "First."}
    assert used == (2, 0, 0, 0)
    assert len(server.requests) == 3
    assert sorted(ids_in(kept)) == ["q0", "q1"]


def test_a_silent_endpoint_is_asked_again(scripted, tmp_path):
    """The reply follows however slow this machine is.

    A second is more than enough for it in one of six tries.
    """
    silent = threading.Event()
    server = scripted(silent, reply())
    model = endpoint.Endpoint("m", server.url, timeout=1.0)
    values, used = endpoint.ask(model, requests(1), tmp_path / "kept.jsonl", text)
    assert values == {"q0": "Fine."}
    assert used == (1, 0, 0, 0)
    assert len(server.requests) >= 2
    silent.set()


def test_a_reply_whose_tokens_are_not_counted_is_kept(scripted, tmp_path, caplog):
    """`usage` may lack, or lack numbers.

    That ended in a TypeError, also for all later runs, of what was paid for.
    """
    usages = [
        None,
        {},
        "none",
        {"total_tokens": 9},
        {"prompt_tokens": None, "completion_tokens": 2},
        {"prompt_tokens": 3},
        {"prompt_tokens": 40, "completion_tokens": 50},
    ]
    uncounted = [reply(usage=usage) for usage in usages]
    kept = tmp_path / "kept.jsonl"
    server = scripted(*uncounted, reply())
    model = endpoint.Endpoint("m", server.url, at_once=1)
    values, used = endpoint.ask(model, requests(8), kept, text)
    assert list(values.values()) == ["Fine."] * 8
    assert used == (8, 0, 43, 52)
    assert "m does not count all tokens of 7 of 8 replies" in caplog.text
    assert endpoint.ask(model, requests(8), kept, text) == (values, used)
    assert len(server.requests) == 8


def test_kept_replies_without_a_count_are_read(scripted, tmp_path):
    kept = tmp_path / "kept.jsonl"
    kept.write_text(
        '["q0", "of an older version", [null, null]]\n["q1", "that did not count", []]\n'
    )
    server = scripted(reply())
    model = endpoint.Endpoint("m", server.url)
    _, used = endpoint.ask(model, requests(2), kept, text)
    assert used == (2, 0, 0, 0)
    assert server.requests == []


def test_a_placeholder_of_a_key_changes_no_reply(scripted, tmp_path, monkeypatch, caplog):
    """With a placeholder as the key, a "local film" became another one."""
    monkeypatch.setenv("OPENAI_API_KEY", "local")
    kept = tmp_path / "kept.jsonl"
    content = "A local film of localhost. \ud800"
    refusal = {"error": {"message": "no local key at localhost"}}
    server = scripted(reply(content), (400, refusal), (401, {"detail": "of local"}))
    model = endpoint.Endpoint("m", server.url, at_once=1)
    values, _ = endpoint.ask(model, requests(2), kept, text)
    assert values == {"q0": content, "q1": None}
    assert "no <OPENAI_API_KEY> key at localhost" in caplog.text
    with pytest.raises(endpoint.EndpointError, match="of <OPENAI_API_KEY>"):
        endpoint.ask(model, requests(2), kept, text)


def test_a_reply_with_a_real_key_is_kept_out(scripted, tmp_path, monkeypatch, caplog):
    key = 'sk-"quoted"-and-long'
    beginning = key[:15]
    monkeypatch.setenv("OPENAI_API_KEY", key)
    kept = tmp_path / "kept.jsonl"
    server = scripted(reply(f"Your key is {key}."), reply(f"It begins with {beginning}"))
    model = endpoint.Endpoint("m", server.url, at_once=1)
    values, used = endpoint.ask(model, requests(2), kept, text)
    assert values == {"q0": None, "q1": f"It begins with {beginning}"}
    assert used == (1, 1, 0, 0)
    written_beginning = json.dumps(beginning)[1:-1]
    assert "quoted" not in kept.read_text().replace(written_beginning, "")
    assert key not in caplog.text


# ---- judges that reply what none should

PROMPT = "<|im_start|>user\n{output_1} {output_2}<|im_end|>"


def with_odds():
    return reply("m", logprobs=ODDS)


def compare_answers(server, names, theirs="Theirs.", **options):
    """Return the artifact of AlpacaEval's comparison of "Ours." with `theirs`, by a prompt."""
    outputs = dict.fromkeys(names, "Ours.")
    questions = [{"instruction": name, "output": theirs} for name in names]
    model = endpoint.Endpoint("m", server.url, **options)
    return ask.alpaca_eval(outputs, model, model="ours", questions=questions, prompt=PROMPT)


def check_preferences(artifact, count):
    preferences = [row["preference"] for row in ask.rows(artifact)]
    assert len(preferences) == count
    assert set(preferences) <= {1, 2}


@pytest.mark.parametrize(
    "nothing",
    [
        None,
        {},
        {"content": None},
        {"content": []},
        {"tokens": ["m"]},
        {"content": [{"token": "m", "logprob": 0, "top_logprobs": []}]},
        {"content": [{"token": "m", "logprob": 0}]},
    ],
)
def test_a_judge_without_log_probabilities_is_an_error_and_asked_again_once_mended(
    scripted, store, nothing
):
    """Every preference was null, in a finished result that stayed for good."""
    dumb = reply("m", logprobs=nothing)
    server = scripted(dumb, dumb, with_odds())
    artifact = compare_answers(server, ["a", "b"], theirs=f"Theirs, not {nothing}.")
    message = "m: none of 2 replies holds log-probabilities"
    with pytest.raises(endpoint.EndpointError, match=message):
        artifact.get()
    check_preferences(artifact, 2)
    assert len(server.requests) == 4


def test_replies_of_no_use_are_asked_again_by_a_run_that_goes_on(scripted, store):
    """A judge was mended in the middle.

    What it had said before without log-probabilities has no preference.
    """
    server = scripted(reply("m"), with_odds(), (401, {}), with_odds())
    artifact = compare_answers(server, "abc", theirs="Theirs, until mended.", at_once=1)
    with pytest.raises(endpoint.EndpointError, match="AuthenticationError"):
        artifact.get()
    check_preferences(artifact, 3)
    assert len(server.requests) == 5


@pytest.mark.parametrize("good", [1, 2])
def test_one_reply_without_log_probabilities_is_an_error_and_only_it_is_asked_again(
    scripted, store, good
):
    """With one good reply of 805 it published 804 preferences that were null."""
    good_replies = [with_odds()] * good
    server = scripted(*good_replies, reply("m"), (400, {}), with_odds())
    names = "abcd"[: good + 2]
    artifact = compare_answers(server, names, theirs=f"Theirs, {good} good.", at_once=1)
    message = (
        f"m: 1 of {good + 1} replies lack log-probabilities .*; mend the judge, .* the other "
        "replies are kept"
    )
    with pytest.raises(endpoint.EndpointError, match=message):
        artifact.get()
    check_preferences(artifact, len(names))
    assert len(server.requests) == len(names) + 2, "the useless one and the refused one"


def test_a_refused_question_has_no_preference_and_is_no_error(scripted, store):
    """One of 805 may be too long, or against a rule; it is counted."""
    server = scripted(with_odds(), (400, {}))
    artifact = compare_answers(server, "ab", theirs="Theirs; one is refused.", at_once=1)
    first, second = ask.rows(artifact)
    assert first["preference"] is not None
    assert second["preference"] is None
    assert artifact.manifest["facts"]["refused"] == 1


def test_judgments_without_a_word_are_no_result(scripted, store):
    archive("mt_bench")
    server = scripted(reply(None), reply(" \n"), reply("Rating: [[7]]"))
    question = {"question_id": 2, "category": "writing", "turns": ["Say a.", "Say b."]}
    model = endpoint.Endpoint("m", server.url)
    artifact = ask.mt_bench({2: ["a", "b"]}, model, model="ours", questions=[question])
    message = "m: none of 2 replies holds a word .*max_tokens"
    with pytest.raises(endpoint.EndpointError, match=message):
        artifact.get()
    assert judge.mt_bench(ask.rows(artifact)).overall == 7
    assert len(server.requests) == 4


@pytest.mark.parametrize(
    "prompt",
    [
        "{output_1} {output_2}",
        PROMPT.replace("{output_2}", "{output_1}"),
        "<|im_start|>user\n<|im_end|>",
    ],
)
def test_an_annotators_prompt_that_shows_no_outputs_is_refused(prompt):
    """Without turns nothing was asked, and without both outputs always the same."""
    questions = [{"instruction": "a", "output": "Theirs."}]
    model = endpoint.Endpoint("m")
    with pytest.raises(ValueError, match="the annotator's prompt lacks .*{output_2}"):
        ask.alpaca_eval({}, model, model="ours", questions=questions, prompt=prompt)


# ---- WRPO's sources behind an endpoint


def answers_of_source(server, prompt="Go on: {prompt}", model="m"):
    """Return the answers of WRPO's smoke settings with one source, which an endpoint serves."""
    source = {"kind": "endpoint", "ref": model, "url": server.url, "ask": prompt}
    cfg = config.load(
        "wrpo", "smoke", known_sources={"one": source}, sources=["one"], source_sets=[["one"]]
    )
    return sources.answers(cfg, "one")


def facts_of(artifact):
    return artifact.json("manifest.json")["facts"]


@pytest.mark.parametrize("returned, numbers_asked_for", [(1, [3, 2, 1]), (2, [3, 1]), (5, [3])])
def test_a_server_that_ignores_the_number_of_samples_is_asked_again(
    scripted, store, returned, numbers_asked_for
):
    """WRPO's pool was smaller than its recipe says.

    One or two responses a prompt came instead of three.
    """
    server = scripted(reply("it was good", samples=returned))
    artifact = answers_of_source(server, prompt=f"{returned}: {{prompt}}")
    assert facts_of(artifact) == {"responses": 48, "unanswered": 0}
    expected = []
    for prompt in set(server.prompts):
        expected += [(prompt, number) for number in numbers_asked_for]
    numbers = [request["n"] for request in server.requests]
    assert sorted(zip(server.prompts, numbers, strict=True)) == sorted(expected)


def test_samples_that_a_server_refuses_when_asked_again_are_counted(scripted, store, caplog):
    server = scripted(*[reply("it was good")] * 20, (400, {}))
    facts = facts_of(answers_of_source(server, prompt="Refused: {prompt}"))
    short = 3 * len(set(server.prompts)) - 20
    assert f"m: {short} responses fewer than asked for, also when asked again" in caplog.text
    assert facts["short"] == short, "in the manifest too: a log is gone when the result is read"


@pytest.mark.parametrize(
    "broken, error, message",
    [
        ((400, {}), config.ConfigError, "answers none of the 16 prompts"),
        (reply(""), endpoint.EndpointError, "m: no reply to .* holds a word"),
    ],
)
def test_a_source_that_was_broken_is_asked_again(scripted, store, broken, error, message):
    """It refused all, or said nothing: both stayed in what was kept, so that no later run asked."""
    server = scripted(broken)
    artifact = answers_of_source(server, prompt=f"{error.__name__}: {{prompt}}")
    with pytest.raises(error, match=message):
        artifact.get()
    server.script[:] = [reply("it was good", samples=3)]
    assert facts_of(artifact) == {"responses": 48, "unanswered": 0}


def test_words_around_a_prompt_may_hold_braces(scripted, store):
    server = scripted(reply("it was good", samples=3))
    beginning = 'As JSON {"text": ...}, {0}: '
    answers_of_source(server, prompt=beginning + "{prompt}").get()
    prompts = set(server.prompts)
    assert len(prompts) > 10
    assert all(prompt.startswith(beginning) for prompt in prompts)


# ---- a real judge, behind a gate that makes faults


class Gate(ThreadingHTTPServer):
    """A server before the real one: it passes requests on, or takes the next of `faults`.

    A fault is a status, the text of a reply, or an Event: that request gets no answer, and the
    event may be waited for; None is no fault. The other lists hold what was passed on: the requests
    and, at the same place, the host that the sender wrote, the reply's usage, and its likeliest
    first tokens where they are asked for.
    """

    def __init__(self, address):
        super().__init__(("127.0.0.1", 0), GateHandler)
        self.address = address
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        self.faults = []
        self.requests = []
        self.hosts = []
        self.usage = []
        self.first_tokens = []
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def note(self, request, host, reply):
        """Note a request that was passed on; the k-th of each list are of one request."""
        logprobs = reply["choices"][0]["logprobs"]
        with self.lock:
            self.requests.append(request)
            self.hosts.append(host)
            self.usage.append(reply["usage"])
            self.first_tokens.append(logprobs["content"][0] if logprobs else {})

    def tokens(self):
        """Return how many prompt and completion tokens the real server counted."""
        prompt = sum(usage["prompt_tokens"] for usage in self.usage)
        completion = sum(usage["completion_tokens"] for usage in self.usage)
        return prompt, completion

    @property
    def prompts(self):
        """Return the text of the last turn of each request that was passed on."""
        return [request["messages"][-1]["content"] for request in self.requests]


class GateHandler(Handler):
    def do_POST(self):
        body = self.body()
        fault = self.server.faults.pop(0) if self.server.faults else None
        if fault is None:
            self.pass_on(body)
        elif isinstance(fault, threading.Event):
            fault.wait()
        elif isinstance(fault, int):
            # A careless server sends back what it was sent, the key.
            message = {"error": {"message": self.headers["Authorization"]}}
            self.answer_or_not(fault, json.dumps(message).encode())
        else:
            self.answer_or_not(200, fault.encode())

    def pass_on(self, body):
        headers = {
            "Authorization": self.headers["Authorization"],
            "Content-Type": "application/json",
        }
        request = urllib.request.Request(self.server.address + self.path, body, headers)
        try:
            with urllib.request.urlopen(request) as response:
                content = response.read()
        except urllib.error.HTTPError as error:
            self.answer_or_not(error.code, error.read())
            return
        host = self.headers["Host"].partition(":")[0]
        self.server.note(json.loads(body), host, json.loads(content))
        self.answer_or_not(200, content)

    def answer_or_not(self, status, content):
        """Answer a request, unless its sender hung up: after a timeout, or a kill."""
        kind = "application/json" if content.startswith(b"{") else "text/html"
        try:
            self.answer(status, content, kind, Retry_After="0.1")
        except OSError:
            pass


@pytest.fixture
def gate(smollm2_server, monkeypatch):
    """Yield a Gate before the real server."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server = Gate(smollm2_server)
    yield server
    server.shutdown()
    server.server_close()


def test_an_interrupted_run_of_a_source_goes_on(gate, store, tiny):
    """Replies that were kept are not asked for again, half a line of them is; no file has a key."""
    artifact = answers_of_source(gate, prompt="Judge, go on: {prompt}", model="judge")
    tokenizer = templates.load_tokenizer(tiny)
    rows = artifact.inputs["texts"].json("prompts.json")
    prompts = [tokenizer.decode(row["prompt_ids"], skip_special_tokens=True) for row in rows]
    before = [[f"said before {i}", True] for i in range(3)]
    kept = "".join(json.dumps((prompt, before)) + "\n" for prompt in prompts[:2])
    file = paths.ARTIFACTS / f"{artifact.key}.partial" / "checkpoints" / "replies.jsonl"
    file.parent.mkdir(parents=True)
    file.write_text(kept + '["half a li')
    answers = stages.json_lines(artifact.get() / "responses.jsonl")
    # what the small model answers without a word is left out
    assert 40 < len(answers) <= 16 * 3
    assert facts_of(artifact) == {"responses": len(answers), "unanswered": 0}
    texts = [tokenizer.decode(answer["response_ids"]) for answer in answers[:6]]
    assert texts == 2 * [" said before 0</s>", " said before 1</s>", " said before 2</s>"]
    assert len({tuple(answer["response_ids"]) for answer in answers[6:]}) > 20
    asked = {prompt.removeprefix("Judge, go on: ") for prompt in gate.prompts}
    assert asked == set(prompts) - set(prompts[:2])
    contents = [path.read_bytes() for path in paths.ARTIFACTS.rglob("*") if path.is_file()]
    assert contents and not any(KEY.encode() in content for content in contents)


def test_faults_are_retried_and_tokens_are_the_servers_own(gate, tmp_path):
    """429, 500 and 503 come to a reply each; what was asked twice counts once, as in the file."""
    gate.faults += [429, 500, 503]
    kept = tmp_path / "kept.jsonl"
    model = endpoint.Endpoint("judge", gate.url, at_once=1)
    values, used = endpoint.ask(model, requests(6), kept, text)
    assert list(values) == list(requests(6))
    assert all(values.values())
    assert gate.faults == []
    assert used == (6, 0, *gate.tokens())
    assert len(gate.requests) == 6
    assert endpoint.ask(model, requests(6), kept, text) == (values, used)
    assert len(gate.requests) == 6


def test_cost_is_by_the_million_tokens():
    used = endpoint.Used(replies=6, refused=0, prompt_tokens=2_000_000, completion_tokens=500_000)
    assert used.cost((10.0, 30.0)) == pytest.approx(35)
    assert used.cost(None) is None


WITH_KEY = json.dumps({"error": {"message": f"Bearer {KEY}", "code": 401}})


@pytest.mark.parametrize(
    "faults, message",
    [
        ([None, 401], "AuthenticationError.*401.*Bearer <OPENAI_API_KEY>"),
        ([500, 502], "InternalServerError.*502"),
        (['{"choices": null}'] * 2, 'without choices: {"choices":null}'),
        (["<html>"] * 2, "without choices: <html>"),
        (["{"] * 2, "JSON"),
        ([WITH_KEY], "replied with an error.*Bearer <OPENAI_API_KEY>"),
    ],
)
def test_what_no_retry_mends_is_an_error_that_tells_no_key(gate, tmp_path, caplog, faults, message):
    caplog.set_level(logging.DEBUG)
    gate.faults += faults
    kept = tmp_path / "kept.jsonl"
    model = endpoint.Endpoint("judge", gate.url, at_once=1, retries=1)
    with pytest.raises(endpoint.EndpointError, match=f"judge.*{message}") as caught:
        endpoint.ask(model, requests(3), kept, text)
    error = caught.value
    assert KEY not in f"{error!r} {error.__cause__!r}"
    assert error.__suppress_context__ or error.__context__ is None, "no traceback shows it"
    assert KEY not in kept.read_text() + caplog.text


def test_what_came_before_an_error_is_kept(gate, tmp_path, caplog):
    kept = tmp_path / "kept.jsonl"
    model = endpoint.Endpoint("judge", gate.url, at_once=1, retries=1)
    for faults in ([None, 401], [500, 502], ["<html>"] * 2, [WITH_KEY]):
        gate.faults[:] = faults
        with pytest.raises(endpoint.EndpointError):
            endpoint.ask(model, requests(3), kept, text)
    gate.faults[:] = [400]
    values, used = endpoint.ask(model, requests(3), kept, text)
    assert (used.replies, used.refused) == (2, 1)
    assert values["q0"]
    assert values["q1"] is None
    assert values["q2"]
    assert len(gate.requests) == 2, "the first reply was kept through four errors"
    assert "refused 'q1': " in caplog.text
    assert KEY not in kept.read_text() + caplog.text


def test_a_reply_that_tells_the_key_is_left_out(gate, tmp_path, caplog):
    content = {"choices": [{"index": 0, "message": {"content": f"Bearer {KEY}"}}]}
    gate.faults += [json.dumps(content)]
    kept = tmp_path / "kept.jsonl"
    model = endpoint.Endpoint("judge", gate.url)
    values, used = endpoint.ask(model, requests(1), kept, text)
    assert values == {"q0": None}
    assert used == (0, 1, 0, 0)
    assert "left out the reply to 'q0', which holds the key" in caplog.text
    assert KEY not in kept.read_text() + caplog.text


def test_half_a_line_is_asked_again_and_a_whole_one_never(gate, tmp_path):
    kept = tmp_path / "kept.jsonl"
    kept.write_text('["q0", "kept before", [7, 3]]\n["q1", "and this", []]\n["q2", "not coun')
    model = endpoint.Endpoint("judge", gate.url)
    values, used = endpoint.ask(model, requests(3), kept, text)
    assert values["q0"] == "kept before"
    assert values["q1"] == "and this"
    assert values["q2"]
    assert gate.prompts == ["Say 2."]
    prompt_tokens, completion_tokens = gate.tokens()
    assert used == (3, 0, 7 + prompt_tokens, 3 + completion_tokens)
    assert ids_in(kept) == ["q0", "q1", "q2"]


# ---- AlpacaEval for real

NAMED = ("tree", "fish", "bird", "river", "city", "metal", "colour", "planet")
QUESTIONS = []
for name in NAMED:
    answer = f"A {name}? Of course: {name}s are many."
    QUESTIONS.append({"instruction": f"Name a {name}.", "output": answer, "generator": "gpt"})
OUTPUTS = {question["instruction"]: "I will not." for question in QUESTIONS}
TIE = "Name a fish."
OUTPUTS[TIE] = QUESTIONS[1]["output"]


def compare_outputs(model, outputs=OUTPUTS):
    return ask.alpaca_eval(outputs, model, model="ours", questions=QUESTIONS)


@pytest.fixture
def alpaca(gate, store):
    """Return (gate, artifact) of AlpacaEval's comparison of OUTPUTS, asked for once."""
    archive("alpaca_eval")
    model = endpoint.Endpoint("judge", gate.url, prices=(10.0, 30.0))
    return gate, compare_outputs(model)


def request_about(gate, instruction):
    """Return the request about an instruction, and the first tokens of its reply."""
    (place,) = [place for place, prompt in enumerate(gate.prompts) if instruction in prompt]
    return gate.requests[place], gate.first_tokens[place]


def check_preference(gate, row):
    """Compare a row's preference with the odds that the judge gave its first answer."""
    request, first_token = request_about(gate, row["instruction"])
    odds = {"m": 0.0, "M": 0.0}
    for top in first_token["top_logprobs"]:
        odds[top["token"]] = math.exp(top["logprob"])
    shown_first = odds["m"] / (odds["m"] + odds["M"])
    expected = 1 + shown_first if row["swapped"] else 2 - shown_first
    assert row["preference"] == pytest.approx(expected)
    prompt = request["messages"][-1]["content"]
    ours_first = prompt.index(row["output_2"]) < prompt.index(row["output_1"])
    assert ours_first == row["swapped"]
    assert row["swapped"] == ask.swapped(row["instruction"])


def check_alpaca_request(request):
    assert [turn["role"] for turn in request["messages"]] == ["system", "user"]
    assert "{output" not in str(request)
    assert request["max_tokens"] == 1
    assert request["temperature"] == 0
    assert request["top_logprobs"] == 5


def test_alpaca_eval_for_real(alpaca):
    """The annotator's own prompt and our loop: places, preferences, tokens, cost.

    Nothing is asked twice, and the judge's address is not in the key.
    """
    gate, artifact = alpaca
    rows = ask.rows(artifact)
    assert [row["instruction"] for row in rows] == list(OUTPUTS)
    assert {row["swapped"] for row in rows} == {True, False}
    assert len(gate.requests) == 7
    for request in gate.requests:
        check_alpaca_request(request)
    for row in rows:
        if row["instruction"] == TIE:
            assert row["preference"] == 1.5
        else:
            check_preference(gate, row)
    prompt_tokens, completion_tokens = gate.tokens()
    assert artifact.manifest["facts"] == {
        "replies": 7,
        "refused": 0,
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "cost": pytest.approx((10 * prompt_tokens + 30 * completion_tokens) / 1e6),
    }
    preferences = [row["preference"] for row in rows]
    assert judge.win_rate(preferences).dropped == 0
    assert judge.length_controlled(rows).estimate
    elsewhere = endpoint.Endpoint("judge", "http://127.0.0.1:9/v1", at_once=1)
    assert ask.rows(compare_outputs(elsewhere)) == rows
    assert len(gate.requests) == 7


def test_the_key_is_in_no_file(alpaca):
    _, artifact = alpaca
    artifact.get()
    files = [path for path in paths.ARTIFACTS.rglob("*") if path.is_file()]
    assert len(files) >= 3
    assert not [path for path in files if KEY.encode() in path.read_bytes()]


def test_another_answer_or_judge_is_another_key(alpaca):
    _, artifact = alpaca
    other_answer = compare_outputs(
        endpoint.Endpoint("judge"), outputs=OUTPUTS | {"Name a city.": "Rome."}
    )
    other_judge = compare_outputs(endpoint.Endpoint("another"))
    assert len({artifact.key, other_answer.key, other_judge.key}) == 3


def test_a_missing_answer_is_refused_by_its_question():
    archive("alpaca_eval")
    with pytest.raises(ValueError, match="no answer to 'Name a tree.': 0 answers"):
        compare_outputs(endpoint.Endpoint("judge"), outputs={})


CHILD = """
import json, sys
from beyond_dpo.judging import ask
from beyond_dpo.pipeline import endpoint
outputs, questions, prompt, url = json.loads(sys.stdin.read())
judge = endpoint.Endpoint("judge", url, at_once=2)
ask.alpaca_eval(outputs, judge, model="ours", questions=questions, prompt=prompt).get()
"""


def start_child(*job):
    """Start a process that asks a judge about a job: outputs, questions, prompt, url."""
    environment = os.environ | {"BEYOND_DPO_ARTIFACTS": str(paths.ARTIFACTS)}
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD], stdin=subprocess.PIPE, env=environment, text=True
    )
    child.stdin.write(json.dumps(job))
    child.stdin.close()
    return child


def asked_from(gate, host):
    """Return the numbers of the questions that came to a name of the gate."""
    numbers = []
    for sender, prompt in zip(gate.hosts, gate.prompts, strict=True):
        if sender == host:
            numbers.append(re.search(r"\d+", prompt)[0])
    return numbers


def test_kill_9_and_go_on(gate, store):
    """Nothing that was kept is asked again; the result is that of a run without a kill."""
    questions = [{"instruction": str(i), "output": f"Number {i}"} for i in range(24)]
    outputs = {str(i): f"No. {i}" for i in range(24)}
    model = endpoint.Endpoint("judge", gate.url)
    artifact = ask.alpaca_eval(outputs, model, model="ours", questions=questions, prompt=PROMPT)
    kept = paths.ARTIFACTS / f"{artifact.key}.partial" / "checkpoints" / "replies.jsonl"
    killed = threading.Event()
    gate.faults += [None] * 8 + [killed] * 40  # after eight replies it waits to be killed
    # By the server's name the requests of the killed process are told apart: some may be read after
    # its end.
    child = start_child(outputs, questions, PROMPT, gate.url.replace("127.0.0.1", "localhost"))

    def has_eight_replies():
        return kept.exists() and kept.read_text().count("\n") == 8

    wait_for(lambda: child.poll() is not None or has_eight_replies(), 900)
    assert child.poll() is None
    child.kill()
    assert child.wait() == -signal.SIGKILL
    before = ids_in(kept)
    assert len(before) == 8
    gate.faults.clear()
    killed.set()
    rows = ask.rows(artifact)
    assert set(before) <= set(asked_from(gate, "localhost"))
    others = set(outputs) - set(before)
    assert sorted(asked_from(gate, "127.0.0.1")) == sorted(others), "each once, none again"
    assert [row["instruction"] for row in rows] == list(outputs)
    assert artifact.manifest["facts"]["replies"] == 24


# ---- MT-Bench and Arena-Hard for real


@pytest.fixture(scope="module")
def mt_questions():
    """Return MT-Bench's first question in writing, and its first in mathematics."""
    archive("mt_bench")
    questions = ask._member_rows("mt_bench", f"{ask.MT}mt_bench/question.jsonl")
    assert len(questions) == 80
    first = {}
    for question in questions:
        first.setdefault(question["category"], question)
    return [first["writing"], first["math"]]


def rate(answers, model, **options):
    return ask.mt_bench(answers, model, model="ours", **options)


def mt_prompts(gate):
    """Return {(beside a reference, second turn): what the judge was shown}."""
    prompts = {}
    for prompt in gate.prompts:
        referenced = "Reference" in prompt or "reference" in prompt
        prompts[referenced, "Our {second}." in prompt] = prompt
    return prompts


def test_mt_bench_for_real(gate, store, mt_questions):
    """Prompts go by category, and references are where they belong.

    A judge without a judgment is counted.
    """
    writing, math_question = mt_questions
    ours = {question["question_id"]: ["Our first.", "Our {second}."] for question in mt_questions}
    model = endpoint.Endpoint("judge", gate.url)
    rows = ask.rows(rate(ours, model, questions=mt_questions, max_tokens=24))
    turns = [(row["category"], row["turn"]) for row in rows]
    assert turns == [("writing", 1), ("writing", 2), ("math", 1), ("math", 2)]
    prompts = mt_prompts(gate)
    assert set(prompts) == {(False, False), (False, True), (True, False), (True, True)}
    content = assets.member("mt_bench", f"{ask.MT}mt_bench/reference_answer/gpt-4.jsonl")
    references = ask.answers(content)[math_question["question_id"]]
    for second in (False, True):
        assert references[second] in prompts[True, second]
        assert writing["turns"][second] in prompts[False, second]
        assert "Our first." in prompts[False, second]
    ratings = [judge.rating(row["judgment"]) for row in rows]
    assert judge.mt_bench(rows).unparsed == ratings.count(None)


def test_mt_benchs_answers_that_lack_are_refused():
    archive("mt_bench")
    model = endpoint.Endpoint("judge")
    with pytest.raises(ValueError, match="no answer to 81"):
        rate({}, model)
    with pytest.raises(ValueError, match="question 81 has one answer, of two turns"):
        rate({81: "A text."}, model)


def test_a_question_of_ones_own_needs_a_reference():
    archive("mt_bench")
    model = endpoint.Endpoint("judge")
    question = {"question_id": 999, "category": "math", "turns": ["1 + 1?", "Twice?"]}
    ours = {999: ["2", "4"]}
    with pytest.raises(ValueError, match="no answer to 999"):
        rate(ours, model, questions=[question])
    digits = rate(ours, model, questions=[question | {"reference": ["2.", "4."]}])
    names = rate(ours, model, questions=[question | {"reference": ["Two.", "Four."]}])
    assert digits.key != names.key


@pytest.fixture(scope="module")
def arena_questions():
    """Return the shortest of Arena-Hard's questions of each category."""
    archive("llm_eval")
    questions = ask._member_rows("llm_eval", f"{ask.ARENA}question.jsonl")
    assert len(questions) == 750
    shortest = {}
    for question in sorted(questions, key=lambda question: len(question["prompt"])):
        shortest.setdefault(question["category"], question)
    return [shortest["hard_prompt"], shortest["creative_writing"]]


def test_arena_hard_for_real(gate, store, arena_questions):
    """Version 2.0 with its own baselines, each question in both places."""
    outputs = {question["uid"]: "Our {answer}." for question in arena_questions}
    model = endpoint.Endpoint("judge", gate.url)
    artifact = ask.arena_hard(outputs, model, model="ours", questions=arena_questions, max_tokens=8)
    assert [(row["model_a"], row["model_b"]) for row in ask.rows(artifact)] == [
        ("o3-mini-2025-01-31", "ours"),
        ("ours", "o3-mini-2025-01-31"),
        ("gemini-2.0-flash-001", "ours"),
        ("ours", "gemini-2.0-flash-001"),
    ]


def test_a_line_separator_in_an_answer_ends_no_line():
    row = {"question_id": "a", "choices": [{"turns": [{"content": "Their \u2028 answer."}]}]}
    content = json.dumps(row, ensure_ascii=False) + "\n"
    assert ask.answers(content.encode()) == {"a": "Their \u2028 answer."}


def test_arena_hard_with_rows_of_version_0_1_and_a_given_baseline(gate, store):
    archive("llm_eval")
    question = {"question_id": "a", "category": "arena-hard-v0.1", "turns": [{"content": "Why?"}]}
    artifact = ask.arena_hard(
        {"a": "Ours."},
        endpoint.Endpoint("judge", gate.url),
        model="ours",
        questions=[question],
        baseline=("gpt-4-0314", {"a": "Theirs."}),
        max_tokens=8,
    )
    assert [row["model_a"] for row in ask.rows(artifact)] == ["gpt-4-0314", "ours"]
    assert len(gate.requests) == 2
    ours_first = [prompt.index("Ours.") < prompt.index("Theirs.") for prompt in gate.prompts]
    assert sorted(ours_first) == [False, True]
    for request in gate.requests:
        assert "[[A>>B]]" in request["messages"][0]["content"]
        assert request["max_tokens"] == 8


# ---- published pairs


def save_pair_and_reward(tiny, folder):
    """Save a model near the tiny one as `aligned`, and a random reward model as `reward`."""
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
    )

    aligned = AutoModelForCausalLM.from_pretrained(tiny)
    with torch.no_grad():
        for weight in aligned.parameters():
            generator = torch.Generator().manual_seed(0)
            weight += 0.02 * torch.randn(weight.shape, generator=generator)
    reward_config = AutoConfig.from_pretrained(tiny, num_labels=1)
    reward = AutoModelForSequenceClassification.from_config(reward_config)
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    for name, model in (("aligned", aligned), ("reward", reward)):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def published_settings(tiny, folder, gate):
    """Return settings of two folders as two hub ids, with a judge behind the gate."""
    dev = folder / "dev.jsonl"
    prompts = [{"prompt": f"Say {number} words."} for number in range(4)]
    dev.write_text("".join(json.dumps(row) + "\n" for row in prompts))
    world = {
        "target": str(tiny),
        "dataset": str(dev),
        "dev_dataset": str(dev),
        "test_dataset": "alpaca_eval",
        "template": "chat",
        "pairs": "given",
        "prompts": 0,
        "sft_rows": 0,
        "dev_prompts": 4,
        "test_prompts": 4,
        "gold_rows": 0,
        "reward_rows": 0,
        "prompt_tokens": [1, 60],
        "reward_model": str(folder / "reward"),
    }
    return config.load(
        "expo",
        "smoke",
        world=world,
        pairs={"mine": [str(tiny), str(folder / "aligned")]},
        published_alphas=[0, 0.5],
        test_samples=1,
        judge="judge",
        judge_url=gate.url,
        kl_prompts=0,
    )


@pytest.mark.long
def test_published_pairs_are_extrapolated_and_judged(store, gate, tiny, tmp_path):
    """α is chosen by a reward model on dev prompts; both ends are judged on AlpacaEval's."""
    archive("llm_eval", "alpaca_eval")
    save_pair_and_reward(tiny, tmp_path)
    artifact = published.off_the_shelf(published_settings(tiny, tmp_path, gate))
    table = artifact.csv("responses.csv.gz")
    best = artifact.json("best.json")
    wins = artifact.json("wins.json")
    dev = table[table["split"] == "dev"]
    assert set(dev["alpha"]) == {0, 0.5}
    assert best["mine"] in (0, 0.5)
    assert {row["alpha"] for row in wins} == {0.0, best["mine"]}
    score = wins[0]["win_rate"]
    assert 0 < score["percent"] < 100
    assert wins[0]["length_controlled"]["estimate"]
    test = table[(table["split"] == "test") & (table["alpha"] == 0)]
    decided = score["wins"] + score["losses"]
    assert decided + score["draws"] + score["dropped"] == len(test)
    assert len(gate.requests) >= decided


def test_prompts_that_are_not_alpaca_evals_are_refused():
    archive("llm_eval")
    with pytest.raises(ValueError, match="none of 1 prompts is AlpacaEval's"):
        ask.alpaca_questions({"What?": "That."})


def test_a_judge_that_refuses_everything_gives_no_result_and_is_asked_again(gate, store):
    """HTTP 400 to all is an error, not a finished artifact without a judgement.

    Once the judge answers, it is asked anew.
    """
    archive("mt_bench")
    question = {"question_id": 1, "category": "writing", "turns": ["Say a.", "Say b."]}
    model = endpoint.Endpoint("judge", gate.url, at_once=1)
    artifact = rate({1: ["a", "b"]}, model, questions=[question], max_tokens=8)
    gate.faults += [400, 400]
    with pytest.raises(endpoint.EndpointError, match=r"judge refused all 2 requests \(HTTP 400\)"):
        artifact.get()
    assert len(ask.rows(artifact)) == 2
    assert artifact.manifest["facts"]["refused"] == 0
