"""Benchmarks' scores against hand and published numbers; judges asked for real, through a gate that
makes faults.
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
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pandas as pd
import pytest
import torch

from beyond_dpo.judging import ask, judge, published
from beyond_dpo.machine import paths
from beyond_dpo.notebook import report
from beyond_dpo.pipeline import assets, config, endpoint, sources
from conftest import openai_server, wait_for

KEY = "sk-not-to-be-found-anywhere"
RELEASED = paths.ROOT.parent / "shared" / "released"
released = pytest.mark.skipif(
    not RELEASED.is_dir(), reason="the authors' released annotations are not here"
)
MODELS = ("zephyr-7b-sft-full", "zephyr_0.1")


def annotations(model):
    with gzip.open(RELEASED / f"annotations_{model}.json.gz") as file:
        return json.load(file)


def archive(*names):
    try:
        assets.fetch_all(list(names))
    except assets.AssetError as error:
        pytest.skip(str(error))


# ---- scores


def test_win_rate_by_hand():
    """Shares 0, 1, 0.5, 0.5, 0.25: mean 0.45, variance (0.2025 + 0.3025 + 2 · 0.0025 + 0.04) / 4 =
    0.1375.
    """
    found = judge.win_rate([1, 2, 1.5, 0, None, 1.25, math.nan])
    assert found.percent == pytest.approx(45) and found.standard_error == pytest.approx(
        100 * math.sqrt(0.1375 / 5)
    )
    assert found[2:] == (pytest.approx(40), 1, 2, 2, 2), "a win, two draws of five; two dropped"
    turned = judge.win_rate([2, 1, 1.5, 1.5, 1.75])
    assert turned.percent == pytest.approx(100 - found.percent) and turned.wins == found.losses
    for wrong in ([], [1.5], [None, 1], [1, 2.5], [1, -1], [1, 0.5], [1, math.inf]):
        with pytest.raises(ValueError, match="two or more preferences in 1…2"):
            judge.win_rate(wrong)


@released
@pytest.mark.parametrize("model", MODELS)
def test_released_annotations_give_the_published_numbers(model):
    """Of 805 recorded judgments by GPT-4: places, log-probabilities, preferences, the leaderboard's
    row.
    """
    rows, row = (
        annotations(model),
        pd.read_csv(RELEASED / "alpaca_leaderboard.csv", index_col=0).loc[model],
    )
    again = []
    for one in rows:
        content = (
            one["raw_completion"]
            and one["raw_completion"]["logprobs"]["content"][0]["top_logprobs"]
        )
        top = {entry["token"]: entry["logprob"] for entry in content or []}
        assert content or one["output_1"] == one["output_2"], "equal answers were not asked about"
        again.append(judge.preference(top, ask.swapped(one["instruction"])) if content else 1.5)
    assert again == pytest.approx([one["preference"] for one in rows], abs=1e-9)
    found = judge.win_rate(again)
    assert found.percent == pytest.approx(row["win_rate"], rel=1e-11)
    assert found.standard_error == pytest.approx(row["standard_error"], rel=1e-11)
    assert found.discrete == pytest.approx(row["discrete_win_rate"], rel=1e-14)
    assert (found.wins, found.losses, found.draws) == tuple(
        row[["n_wins", "n_wins_base", "n_draws"]]
    )
    printed = (
        report.published("expo_leaderboard_mapping").set_index("leaderboard_csv_row").loc[model]
    )
    assert (round(found.percent, 4), round(found.standard_error, 4)) == (
        printed["win_rate"],
        printed["standard_error"],
    )


@released
@pytest.mark.parametrize("model, off, fitted", [(MODELS[0], 0.73, 6.12), (MODELS[1], 1.09, 7.11)])
def test_the_length_controlled_estimate_is_as_far_off_as_its_docstring_says(model, off, fitted):
    rows, board = annotations(model), pd.read_csv(RELEASED / "alpaca_leaderboard.csv", index_col=0)
    published, found = board.loc[model, "length_controlled_winrate"], judge.length_controlled(rows)
    assert found.estimate and found.percent - published == pytest.approx(off, abs=0.01)
    assert found.low < published < found.high < found.percent + 5
    assert judge.length_controlled(rows, slope=None, n_boot=2).percent - published == pytest.approx(
        fitted, abs=0.01
    )
    assert judge.win_rate(row["preference"] for row in rows).percent < published - 3.9, (
        "further off"
    )


def compared(longer, preferences):
    return [
        {"output_1": "x" * (100 + k), "output_2": "x" * 100, "preference": p}
        for k, p in zip(longer, preferences, strict=True)
    ]


def test_length_controlled_by_hand():
    """Two lengths: the fitted line goes through both groups' log-odds, and half-way is their
    mean.
    """
    rows = compared([-50, 50] * 20, [1.8, 1.4] * 20)
    logit = [math.log(p / (1 - p)) for p in (0.8, 0.4)]
    wanted = 100 / (1 + math.exp(-sum(logit) / 2))
    assert judge.length_controlled(rows, slope=None, n_boot=5).percent == pytest.approx(
        wanted, abs=1e-3
    )
    x = math.tanh(50 / np.std([-50, 50] * 20, ddof=1))
    slope = (logit[1] - logit[0]) / 2 / x
    assert judge.length_controlled(rows, slope=slope, n_boot=5).percent == pytest.approx(
        wanted, abs=1e-6
    )
    same = compared([0] * 40, [1.0, 1.9] * 19 + [0, None])
    found, plain = (
        judge.length_controlled(same, n_boot=200),
        judge.win_rate(row["preference"] for row in same),
    )
    assert found.percent == pytest.approx(plain.percent, abs=1e-6), (
        "no difference in length: the win rate"
    )
    assert (found.high - found.low) / (2 * 1.96) == pytest.approx(plain.standard_error, rel=0.2)
    assert judge.length_controlled(same, n_boot=9) == judge.length_controlled(same, n_boot=9)
    all_lost = judge.length_controlled(compared([5, -5, 9, -9], [1] * 4), n_boot=5)
    assert all_lost.percent == pytest.approx(0, abs=1e-4)


def test_a_row_that_does_not_fit_is_dropped_and_counted_or_named():
    """One missing output or preference made the length-controlled rate NaN, told in a root finder's
    words.
    """
    rows = compared([-50, 50, 9, 70] * 5, [1.8, 1.4, 1.2, 2.0] * 5)
    whole = judge.length_controlled(rows, n_boot=9)
    odd = [
        rows[0] | change
        for change in ({"output_1": None}, {"output_2": math.nan}, {"preference": "?"})
    ]
    odd.append({"preference": 1.5, "output_1": "alone"})
    found = judge.length_controlled(rows + odd, n_boot=9)
    assert (found.percent, found.low, found.high, found.dropped) == (
        *whole[:3],
        4,
    ) and whole.dropped == 0
    assert judge.length_controlled(pd.DataFrame(rows + odd), n_boot=9) == found
    assert judge.length_controlled(iter(rows), n_boot=9) == whole
    unjudged = [row | {"preference": None} for row in rows]
    few = "two or more rows with output_1, output_2 and a preference"
    for words, given in {
        few + ": 0 of 20": unjudged,
        few + ": 1 of 1": rows[:1],
        "rows with preference, .*: 0 r": [],
        "row 1 has 3": [rows[0], rows[1] | {"preference": 3}],
    }.items():
        with pytest.raises(ValueError, match=words):
            judge.length_controlled(given, n_boot=9)
    with pytest.raises(ValueError, match="needs both outputs of each row: row 20 lacks one"):
        judge.length_controlled(rows + odd, "df_gamed.csv")
    with pytest.raises(ValueError, match="two or more rows with a preference"):
        judge.length_controlled(unjudged, "df_gamed.csv")
    steep = judge.length_controlled(rows, slope=-80.0, n_boot=9)
    assert 0 <= steep.low <= steep.percent <= steep.high <= 100, "the root lies beyond 50"


def test_alpaca_eval_itself_fits_where_its_file_is_given(tmp_path):
    """On invented rows: a win by the longer answer counts for less, by its function and by our
    estimate.
    """
    pytest.importorskip("alpaca_eval")
    rng = np.random.default_rng(0)
    delta = rng.normal(size=805)
    rows = compared([-int(100 * min(d, 0.9)) for d in delta], 1 + 1 / (1 + np.exp(-1.5 * delta)))
    rows = [
        row | {"generator_1": "theirs", "generator_2": "ours", "annotator": "a"} for row in rows
    ]
    gamed = pd.DataFrame(
        {"model": "theirs_verbose", "index": range(805), "preference": rng.uniform(size=805)}
    )
    gamed["instruction_difficulty"], gamed["std_delta_len"] = (
        rng.normal(size=805),
        rng.normal(size=805),
    )
    gamed.assign(not_gamed_baseline=False).to_csv(tmp_path / "df_gamed.csv", index=False)
    found = judge.length_controlled(rows, tmp_path / "df_gamed.csv")
    assert not found.estimate and found.low < found.percent < found.high
    assert found.percent == pytest.approx(
        judge.length_controlled(rows, slope=None, n_boot=2).percent, abs=3
    )


def test_preference_by_hand():
    assert judge.preference(
        {"m": math.log(0.6), "M": math.log(0.2), "The": 0.1}, False
    ) == pytest.approx(1.25)
    assert judge.preference({"m": math.log(0.6), "M": math.log(0.2)}, True) == pytest.approx(1.75)
    assert judge.preference({"m": -0.1}, False) == 1 and judge.preference({"M": -9.0}, False) == 2
    assert (
        judge.preference({"Model": 0.0, " m": -1.0}, True) is None
        and judge.preference({}, False) is None
    )


def test_a_token_of_probability_zero_is_a_preference():
    """Servers write it as -9999, whose exponential is 0: alone or beside an equal, it was no
    preference.
    """
    assert judge.preference({"m": -9999.0, "The": 0.0}, False) == 1
    assert judge.preference({"m": -9999.0, "M": -9999.0}, False) == 1.5
    assert judge.preference({"m": -9999.0, "M": -0.1}, True) == 1
    assert judge.preference({"m": -math.inf, "M": -math.inf}, False) is None


def test_verdicts_and_ratings():
    """As the benchmarks' own parsers read them: Arena-Hard's last label, MT-Bench's first
    number.
    """
    strong, weak, tie = judge.STRONG, 1, 0.5
    for said, wanted in {
        "[[A>>B]]": (1, strong),
        "So: [[A>B]].": (1, weak),
        "[[A=B]]": (tie, weak),
        "[[B>A]]": (0, weak),
        "[[B>>A]]": (0, strong),
        "[[A<<B]]": (0, strong),
        "[[B<A]]": (1, weak),
        "not [[A>B]] but [[B>>A]]": (0, strong),
        "[A>B]": (1, weak),
        "[[A>A]]": None,
        "": None,
        "[[B=A]]": (tie, weak),
        "[[B<<A]]": (1, strong),
        "[[A<B]]": (0, weak),
        "[b>>a], no: [a>b]": (1, weak),
        "[[a=b]] and [B>A]": (tie, weak),
        "[[A>B]], or [[A]]": None,
        "[[A>>>B]]": None,
        "[[ A>B ]]": None,
    }.items():
        assert judge.verdict(said) == wanted, said
    for said, wanted in {
        "Rating: [[7]]": 7,
        "[[6.5]] of [[10]]": 6.5,
        "[8]": 8,
        "[3], that is [[4]]": 4,
        "[[0]]": None,
        "[[11]]": None,
        "[[rating]]": None,
        "ten": None,
        "[[7]], no: [[8]]": 7,
        "Rating: [[7/10]]": None,
        "as [2023] says": None,
        "[[10.]]": 10,
    }.items():
        assert judge.rating(said) == wanted, said


def test_mt_bench_by_hand():
    rows = [
        {"turn": turn, "judgment": said}
        for turn, said in ((1, "[[9]]"), (1, "[[6]]"), (1, "?"), (2, "[[3]]"))
    ]
    assert judge.mt_bench(rows) == (7.5, 3, 6, 1), "overall is the mean of ratings, not of turns"
    assert math.isnan(judge.mt_bench(rows[:3]).second)


def games(uid, first, second, *said):
    """Return a question's games, the answers changing places."""
    places = ((first, second), (second, first))
    return [
        {"uid": uid, "model_a": places[k % 2][0], "model_b": places[k % 2][1], "judgment": text}
        for k, text in enumerate(said)
    ]


def test_arena_hard_by_hand():
    """Against the baseline alone it is the weighted mean; along a chain the odds multiply."""
    ours = games(1, "base", "ours", "[[B>>A]]", "[[A>B]]") + games(
        2, "base", "ours", "[[A>B]]", "[[A=B]]"
    )
    unparsed = games(3, "base", "ours", "[[B>>A]]", "I cannot say")
    found = judge.arena_hard(ours + unparsed, "base", n_boot=50)
    assert found["percent"].tolist() == [pytest.approx(100 * (3 + 1 + 0 + 0.5) / 6, abs=1e-3)]
    assert found[["model", "questions", "unparsed"]].values.tolist() == [["ours", 2, 1]]
    assert found["low"][0] < found["percent"][0] < found["high"][0]
    lost, won = ("[[A>B]]", "[[B>A]]"), ("[[B>A]]", "[[A>B]]")
    chain = [
        game
        for k in range(8)
        for a, b in (("base", "one"), ("one", "two"))
        for game in games(k, a, b, *(won if k % 4 else lost))
    ]
    found = judge.arena_hard(chain, "base", n_boot=10).set_index("model")["percent"]
    assert found.tolist() == [pytest.approx(75, abs=1e-3), pytest.approx(90, abs=1e-3)], (
        "odds 3, then 3 · 3"
    )
    turned = judge.arena_hard(chain, "two", n_boot=10).set_index("model")["percent"]
    assert turned["base"] == pytest.approx(100 - found["two"], abs=1e-3)
    with pytest.raises(
        ValueError, match="no chain of verdicts ties all of .*'three'.* to base; unparsed: {'a': 1"
    ):
        judge.arena_hard(
            ours + games(1, "three", "four", "[[A>B]]") + games(1, "a", "base", "?"), "base"
        )


# ---- endpoints that reply what none should


class Scripted(ThreadingHTTPServer):
    """An endpoint that gives the n-th request the n-th of `script`, and all later ones the last.

    Of a script: a JSON value or a text is the body of a 200, (status, JSON value) another answer,
    an Event is waited for, and the connection then closed. asked: the requests' bodies.
    """

    def __init__(self, *script):
        super().__init__(("127.0.0.1", 0), ScriptedAnswer)
        self.script, self.asked, self.lock = list(script), [], threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()


class ScriptedAnswer(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            answer = self.server.script[min(len(self.server.asked), len(self.server.script) - 1)]
            self.server.asked.append(body)
        if isinstance(answer, threading.Event):
            answer.wait()
            return
        status, answer = answer if isinstance(answer, tuple) else (200, answer)
        content = (answer if isinstance(answer, str) else json.dumps(answer)).encode()
        self.send_response(status)
        for name, value in {
            "Content-Type": "application/json",
            "Content-Length": len(content),
        }.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def scripted(monkeypatch):
    """Return a maker of Scripted endpoints, which end with the test."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    made = []

    def make(*script) -> Scripted:
        made.append(Scripted(*script))
        return made[-1]

    yield make
    for server in made:
        server.shutdown()
        server.server_close()


def reply(content="Fine.", samples=1, **more):
    """Return the body of a reply, which counts no tokens."""
    message = {"role": "assistant", "content": content}
    choice = {"index": 0, "finish_reason": "stop", "logprobs": None, "message": message}
    return {
        "id": "1",
        "object": "chat.completion",
        "created": 1,
        "model": "m",
        "choices": [choice] * samples,
    } | more


def failed(**error):
    return {"choices": None, "error": error}


def requests(count):
    return {
        f"q{i}": {
            "messages": [{"role": "user", "content": f"Say {i}."}],
            "max_tokens": 4,
            "temperature": 0,
        }
        for i in range(count)
    }


def text(reply):
    return reply.choices[0].message.content if reply else None


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
        {"choices": [{"index": 0, "error": {"code": 503}, "message": {"content": ""}}]},
        {"choices": [{"index": 0, "message": None}]},
        {"choices": [{"index": 0}]},
        {"choices": [{"index": 0, "message": {"content": 7}}]},
    ]
    server = scripted(*wrong, reply())
    by = endpoint.Endpoint("m", server.url, at_once=len(wrong))
    found, used = endpoint.ask(by, requests(13), tmp_path / "kept.jsonl", text)
    assert list(found.values()) == ["Fine."] * 13 and used == (13, 0, 0, 0)
    assert len(server.asked) == 13 + len(wrong)


@pytest.mark.parametrize(
    "error, raised",
    [
        ({"code": 401}, True),
        ({"code": "invalid_api_key", "type": "invalid_request_error"}, True),
        ({"status": 403}, True),
        ({"code": "insufficient_quota", "type": "rate"}, True),
        ({"type": "NotFoundError", "code": 404}, True),
        ({"code": 400}, False),
        ({"code": "context_length_exceeded"}, False),
        ({"type": "invalid_request_error"}, False),
        ({"code": 413}, False),
        ({"type": "BadRequestError", "code": 400}, False),
    ],
)
def test_an_error_in_a_200_that_no_retry_mends_is_raised_or_counted(
    scripted, tmp_path, error, raised
):
    """As by HTTP: what is about the key or the model is raised at once, what is about one request
    is a refusal.
    """
    server = scripted(failed(message="No.", **error))
    by = endpoint.Endpoint("m", server.url)
    if raised:
        with pytest.raises(endpoint.EndpointError, match="m: replied with an error: .*No"):
            endpoint.ask(by, requests(1), tmp_path / "kept.jsonl", text)
    else:
        assert endpoint.ask(by, requests(1), tmp_path / "kept.jsonl", text) == (
            {"q0": None},
            (0, 1, 0, 0),
        )
    assert len(server.asked) == 1


@pytest.mark.parametrize("status", [400, 413, 422])
def test_what_was_refused_is_asked_again_by_a_later_run(scripted, tmp_path, status):
    """An endpoint that was set up wrongly refused what it answers now: that stayed for good."""
    kept, server = (
        tmp_path / "kept.jsonl",
        scripted((status, {}), reply("First."), reply("Mended.")),
    )
    by = endpoint.Endpoint("m", server.url, at_once=1)
    assert endpoint.ask(by, requests(2), kept, text) == ({"q0": None, "q1": "First."}, (1, 1, 0, 0))
    assert endpoint.ask(by, requests(2), kept, text) == (
        {"q0": "Mended.", "q1": "First."},
        (2, 0, 0, 0),
    )
    assert len(server.asked) == 3
    assert sorted(json.loads(line)[0] for line in kept.read_text().splitlines()) == ["q0", "q1"]


def test_a_silent_endpoint_is_asked_again(scripted, tmp_path):
    """However slow this machine is: a second is more than enough for the reply that follows, in one
    of six tries.
    """
    silent = threading.Event()
    server = scripted(silent, reply())
    by = endpoint.Endpoint("m", server.url, timeout=1.0)
    assert endpoint.ask(by, requests(1), tmp_path / "kept.jsonl", text) == (
        {"q0": "Fine."},
        (1, 0, 0, 0),
    )
    assert len(server.asked) >= 2
    silent.set()


def test_a_reply_whose_tokens_are_not_counted_is_kept(scripted, tmp_path, caplog):
    """`usage` may lack, or lack numbers: that ended in a TypeError, also for all later runs, of
    what was paid for.
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
    server, kept = (
        scripted(*[reply(usage=usage) for usage in usages], reply()),
        tmp_path / "kept.jsonl",
    )
    by = endpoint.Endpoint("m", server.url, at_once=1)
    found, used = endpoint.ask(by, requests(8), kept, text)
    assert list(found.values()) == ["Fine."] * 8 and used == (8, 0, 43, 52)
    assert "m does not count all tokens of 7 of 8 replies" in caplog.text
    assert endpoint.ask(by, requests(8), kept, text) == (found, used) and len(server.asked) == 8
    kept.write_text(
        '["q0", "of an older version", [null, null]]\n["q1", "that did not count", []]\n'
    )
    assert endpoint.ask(by, requests(2), kept, text)[1] == (2, 0, 0, 0) and len(server.asked) == 8


def test_a_reply_is_never_changed_and_only_a_real_key_keeps_it_out(
    scripted, tmp_path, monkeypatch, caplog
):
    """With a placeholder as the key, a "local film" became another one."""
    monkeypatch.setenv("OPENAI_API_KEY", "local")
    kept, said = tmp_path / "kept.jsonl", "A local film of localhost. \ud800"
    refusal = {"error": {"message": "no local key at localhost"}}
    server = scripted(reply(said), (400, refusal), (401, {"detail": "of local"}))
    by = endpoint.Endpoint("m", server.url, at_once=1)
    assert endpoint.ask(by, requests(2), kept, text)[0] == {"q0": said, "q1": None}
    assert "no <OPENAI_API_KEY> key at localhost" in caplog.text
    with pytest.raises(endpoint.EndpointError, match="of <OPENAI_API_KEY>"):
        endpoint.ask(by, requests(2), kept, text)
    key = 'sk-"quoted"-and-long'
    monkeypatch.setenv("OPENAI_API_KEY", key)
    server = scripted(reply(f"Your key is {key}."), reply(f"It begins with {key[:15]}"))
    by = endpoint.Endpoint("m", server.url, at_once=1)
    found, used = endpoint.ask(by, requests(3), kept, text)
    assert found == {"q0": said, "q1": None, "q2": f"It begins with {key[:15]}"} and used == (
        2,
        1,
        0,
        0,
    )
    assert (
        "quoted" not in kept.read_text().replace(json.dumps(key[:15])[1:-1], "")
        and key not in caplog.text
    )


PROMPT = "<|im_start|>user\n{output_1} {output_2}<|im_end|>"
ODDS = {
    "content": [{"token": "m", "logprob": -0.1, "top_logprobs": [{"token": "m", "logprob": -0.1}]}]
}


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
    dumb, mended = reply("m"), reply("m")
    dumb["choices"][0]["logprobs"], mended["choices"][0]["logprobs"] = nothing, ODDS
    said = {
        "questions": [{"instruction": "a", "output": f"Theirs, not {nothing}."}],
        "prompt": PROMPT,
    }
    said["questions"].append({"instruction": "b", "output": "Theirs."})
    server = scripted(dumb, dumb, mended)
    by = endpoint.Endpoint("m", server.url)
    made = ask.alpaca_eval({"a": "Ours.", "b": "Ours."}, by, model="ours", **said)
    with pytest.raises(
        endpoint.EndpointError, match="m: none of 2 replies holds log-probabilities"
    ):
        made.get()
    assert [row["preference"] in (1, 2) for row in ask.rows(made)] == [True, True] and len(
        server.asked
    ) == 4


def test_replies_of_no_use_are_asked_again_by_a_run_that_goes_on(scripted, store):
    """A judge was mended in the middle: what it had said before without log-probabilities has no
    preference.
    """
    mended = reply("m")
    mended["choices"][0]["logprobs"] = ODDS
    server = scripted(reply("m"), mended, (401, {}), mended)
    questions = [{"instruction": name, "output": "Theirs, until mended."} for name in "abc"]
    by = endpoint.Endpoint("m", server.url, at_once=1)
    made = ask.alpaca_eval(
        dict.fromkeys("abc", "Ours."), by, model="ours", questions=questions, prompt=PROMPT
    )
    with pytest.raises(endpoint.EndpointError, match="AuthenticationError"):
        made.get()
    assert [row["preference"] in (1, 2) for row in ask.rows(made)] == [True] * 3 and len(
        server.asked
    ) == 5


@pytest.mark.parametrize("good", [1, 2])
def test_one_reply_without_log_probabilities_is_an_error_and_only_it_is_asked_again(
    scripted, store, good
):
    """With one good reply of 805 it published 804 preferences that were null."""
    mended = reply("m")
    mended["choices"][0]["logprobs"] = ODDS
    server = scripted(*[mended] * good, reply("m"), (400, {}), mended)
    questions = [
        {"instruction": name, "output": f"Theirs, {good} good."} for name in "abcd"[: good + 2]
    ]
    by = endpoint.Endpoint("m", server.url, at_once=1)
    outputs = {question["instruction"]: "Ours." for question in questions}
    made = ask.alpaca_eval(outputs, by, model="ours", questions=questions, prompt=PROMPT)
    words = (
        f"m: 1 of {good + 1} replies lack log-probabilities .*; mend the judge, .* the other "
        "replies are kept"
    )
    with pytest.raises(endpoint.EndpointError, match=words):
        made.get()
    assert all(row["preference"] in (1, 2) for row in ask.rows(made))
    assert len(server.asked) == len(questions) + 2, "the useless one and the refused one"


def test_a_refused_question_has_no_preference_and_is_no_error(scripted, store):
    """One of 805 may be too long, or against a rule; it is counted."""
    fine = reply("m")
    fine["choices"][0]["logprobs"] = ODDS
    server = scripted(fine, (400, {}))
    questions = [
        {"instruction": name, "output": "Theirs, of which one is refused."} for name in "ab"
    ]
    by = endpoint.Endpoint("m", server.url, at_once=1)
    made = ask.alpaca_eval(
        {"a": "Ours.", "b": "Ours."}, by, model="ours", questions=questions, prompt=PROMPT
    )
    assert [row["preference"] is None for row in ask.rows(made)] == [False, True]
    assert made.manifest["facts"]["refused"] == 1


def test_judgments_without_a_word_are_no_result(scripted, store):
    archive("mt_bench")
    server = scripted(reply(None), reply(" \n"), reply("Rating: [[7]]"))
    question = {"question_id": 2, "category": "writing", "turns": ["Say a.", "Say b."]}
    made = ask.mt_bench(
        {2: ["a", "b"]}, endpoint.Endpoint("m", server.url), model="ours", questions=[question]
    )
    with pytest.raises(
        endpoint.EndpointError, match="m: none of 2 replies holds a word .*max_tokens"
    ):
        made.get()
    assert judge.mt_bench(ask.rows(made)).overall == 7 and len(server.asked) == 4


def test_an_annotators_prompt_that_shows_no_outputs_is_refused():
    """Without turns nothing was asked, and without both outputs always the same."""
    for prompt in (
        "{output_1} {output_2}",
        PROMPT.replace("{output_2}", "{output_1}"),
        "<|im_start|>user\n<|im_end|>",
    ):
        with pytest.raises(ValueError, match="the annotator's prompt lacks .*{output_2}"):
            ask.alpaca_eval({}, endpoint.Endpoint("m"), model="ours", questions=[], prompt=prompt)


def served_source(server, *, said="Go on: {prompt}"):
    """Return WRPO's smoke settings with one source, which an endpoint serves."""
    source = {"kind": "endpoint", "ref": "m", "url": server.url, "ask": said}
    return config.load(
        "wrpo", "smoke", known_sources={"one": source}, sources=["one"], source_sets=[["one"]]
    )


def test_a_server_that_ignores_the_number_of_samples_is_asked_again(scripted, store):
    """WRPO's pool was smaller than its recipe says: one response a prompt instead of three, or
    two.
    """
    for returned, said in (1, "One: {prompt}"), (2, "Two: {prompt}"), (5, "Five: {prompt}"):
        server = scripted(reply("it was good", samples=returned))
        made = sources.answers(served_source(server, said=said), "one")
        assert made.json("manifest.json")["facts"] == {"responses": 48, "unanswered": 0}
        asked = [(one["messages"][0]["content"], one["n"]) for one in server.asked]
        prompts = {prompt for prompt, _ in asked}
        wanted = {1: [3, 2, 1], 2: [3, 1], 5: [3]}[returned]
        assert sorted(asked) == sorted((prompt, n) for prompt in prompts for n in wanted)


def test_samples_that_a_server_refuses_when_asked_again_are_counted(scripted, store, caplog):
    server = scripted(*[reply("it was good")] * 20, (400, {}))
    made = sources.answers(served_source(server, said="Refused: {prompt}"), "one")
    facts = made.json("manifest.json")["facts"]
    prompts = len({one["messages"][0]["content"] for one in server.asked})
    assert (
        f"m: {3 * prompts - 20} responses fewer than asked for, also when asked again"
        in caplog.text
    )
    assert facts["short"] == 3 * prompts - 20, (
        "in the manifest too: a log is gone when the result is read"
    )


def test_a_source_that_was_broken_is_asked_again(scripted, store):
    """It refused all, or said nothing: both stayed in what was kept, so that no later run asked."""
    for broken, raised, words in (
        ((400, {}), config.ConfigError, "answers none of the 16 prompts"),
        (reply(""), endpoint.EndpointError, "m: no reply to .* holds a word"),
    ):
        server = scripted(broken)
        made = sources.answers(served_source(server, said=f"{raised.__name__}: {{prompt}}"), "one")
        with pytest.raises(raised, match=words):
            made.get()
        server.script[:] = [reply("it was good", samples=3)]
        assert made.json("manifest.json")["facts"] == {"responses": 48, "unanswered": 0}


def test_words_around_a_prompt_may_hold_braces(scripted, store):
    server = scripted(reply("it was good", samples=3))
    sources.answers(served_source(server, said='As JSON {"text": ...}, {0}: {prompt}'), "one").get()
    said = {one["messages"][0]["content"] for one in server.asked}
    assert len(said) > 10 and all(one.startswith('As JSON {"text": ...}, {0}: ') for one in said)


# ---- a real judge, behind a gate that makes faults


@pytest.fixture(scope="module")
def served():
    """Start a real OpenAI-compatible server with SmolLM2-135M; yield its address."""
    archive("smollm2")
    options = (
        "--max-model-len",
        "2048",
        "--dtype",
        "float32",
    )  # bfloat16 takes minutes where AVX2 is all there is
    with openai_server(assets.model_dir("smollm2"), "judge", KEY, *options) as address:
        yield address


@pytest.fixture
def gate(served, monkeypatch):
    """Yield a server before the real one: it takes the next of `faults` for each request, or passes
    it on.

    A fault is a status, the text of a reply, or an Event: that request gets no answer, and the
    event may be waited for.
    """
    monkeypatch.setenv("OPENAI_API_KEY", KEY)

    class Gate(BaseHTTPRequestHandler):
        faults, asked, usage = [], [], []
        hosts = []  # of each request in `asked`, the server's name as its sender wrote it
        one_at_a_time = threading.Lock()
        first = []  # the likeliest first tokens, where they are asked for

        def do_POST(self):
            body, fault = self.rfile.read(int(self.headers["Content-Length"])), None
            if self.faults:
                fault = self.faults.pop(0)
            if isinstance(fault, threading.Event):
                fault.wait()
                return None
            if isinstance(fault, int):  # a status, and what it was sent, as a careless server would
                return self.answer(
                    fault,
                    json.dumps({"error": {"message": self.headers["Authorization"]}}).encode(),
                )
            if isinstance(fault, str):
                return self.answer(200, fault.encode())
            headers = {
                "Authorization": self.headers["Authorization"],
                "Content-Type": "application/json",
            }
            try:
                with urllib.request.urlopen(
                    urllib.request.Request(served + self.path, body, headers)
                ) as reply:
                    content = reply.read()
            except urllib.error.HTTPError as error:
                return self.answer(error.code, error.read())
            said = json.loads(content)
            with self.one_at_a_time:  # so that the k-th of each list are of one request
                self.asked.append(json.loads(body))
                self.hosts.append(self.headers["Host"].partition(":")[0])
                self.usage.append(said["usage"])
                self.first.append(
                    (said["choices"][0]["logprobs"] or {"content": [{}]})["content"][0]
                )
            self.answer(200, content)

        def answer(self, status, content):
            kind = "application/json" if content.startswith(b"{") else "text/html"
            try:
                self.send_response(status)
                for name, value in {
                    "Content-Type": kind,
                    "Content-Length": len(content),
                    "Retry-After": "0.1",
                }.items():
                    self.send_header(name, str(value))
                self.end_headers()
                self.wfile.write(content)
            except OSError:
                pass  # it hung up: a timeout, or a kill

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Gate)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Gate.url = f"http://127.0.0.1:{server.server_port}/v1"
    yield Gate
    server.shutdown()
    server.server_close()


def test_faults_are_retried_and_tokens_are_the_servers_own(gate, tmp_path):
    """429, 500 and 503 come to a reply each; what was asked twice counts once, as in the file."""
    gate.faults += [429, 500, 503]
    by = endpoint.Endpoint("judge", gate.url, prices=(10.0, 30.0), at_once=1)
    found, used = endpoint.ask(by, requests(6), tmp_path / "kept.jsonl", text)
    assert list(found) == [f"q{i}" for i in range(6)] and all(found.values()) and not gate.faults
    tokens = [
        sum(usage[name] for usage in gate.usage) for name in ("prompt_tokens", "completion_tokens")
    ]
    assert used == (6, 0, *tokens) and len(gate.usage) == len(gate.asked) == 6
    dollars = (10 * tokens[0] + 30 * tokens[1]) / 1e6
    assert used.cost(by.prices) == pytest.approx(dollars)
    assert used.cost(None) is None
    assert (
        endpoint.ask(by, requests(6), tmp_path / "kept.jsonl", text) == (found, used)
        and len(gate.usage) == 6
    )


def test_what_no_retry_mends_is_an_error_that_keeps_what_came_and_tells_no_key(
    gate, tmp_path, caplog
):
    caplog.set_level(logging.DEBUG)
    by, kept = endpoint.Endpoint("judge", gate.url, at_once=1, retries=1), tmp_path / "kept.jsonl"
    for faults, said in [
        ([None, 401], "AuthenticationError.*401.*Bearer <OPENAI_API_KEY>"),
        ([500, 502], "InternalServerError.*502"),
        (['{"choices": null}'] * 2, 'without choices: {"choices":null}'),
        (["<html>"] * 2, "without choices: <html>"),
        (["{"] * 2, "JSON"),
        (
            ['{"error": {"message": "Bearer %s", "code": 401}}' % KEY],  # noqa: UP031
            "replied with an error.*Bearer <OPENAI_API_KEY>",
        ),
    ]:
        gate.faults[:] = faults
        with pytest.raises(endpoint.EndpointError, match=f"judge.*{said}") as caught:
            endpoint.ask(by, requests(3), kept, text)
        assert KEY not in f"{caught.value!r} {caught.value.__cause__!r}"
        assert caught.value.__suppress_context__ or caught.value.__context__ is None, (
            "no traceback shows it"
        )
    gate.faults[:] = [400]  # its message is logged
    found, used = endpoint.ask(by, requests(3), kept, text)
    assert (used.replies, used.refused) == (2, 1) and list(found.values()).count(None) == 1
    gate.faults[:] = ['{"choices": [{"index": 0, "message": {"content": "Bearer %s"}}]}' % KEY]  # noqa: UP031
    found, used = endpoint.ask(by, {"other": requests(1)["q0"]}, kept, text)
    assert used == (0, 1, 0, 0) and found["other"] is None, "it tells the key"
    assert KEY not in kept.read_text() + caplog.text and "refused 'q1': " in caplog.text
    assert "left out the reply to 'other', which holds the key" in caplog.text
    assert len(gate.asked) == 2, "the first reply was kept through six errors"


def test_half_a_line_is_asked_again_and_a_whole_one_never(gate, tmp_path):
    by, kept = endpoint.Endpoint("judge", gate.url), tmp_path / "kept.jsonl"
    kept.write_text('["q0", "kept before", [7, 3]]\n["q1", "and this", []]\n["q2", "not coun')
    found, used = endpoint.ask(by, requests(3), kept, text)
    assert found["q0"] == "kept before" and found["q1"] == "and this" and found["q2"]
    assert [one["messages"][0]["content"] for one in gate.asked] == ["Say 2."]
    assert used == (
        3,
        0,
        7 + gate.usage[0]["prompt_tokens"],
        3 + gate.usage[0]["completion_tokens"],
    )
    assert [json.loads(line)[0] for line in kept.read_text().splitlines()] == ["q0", "q1", "q2"]


QUESTIONS = [
    {
        "instruction": f"Name a {what}.",
        "output": f"A {what}? Of course: {what}s are many.",
        "generator": "gpt",
    }
    for what in "tree fish bird river city metal colour planet".split()
]
OUTPUTS = {row["instruction"]: "I will not." for row in QUESTIONS} | {
    "Name a fish.": QUESTIONS[1]["output"]
}


def test_alpaca_eval_for_real(gate, store):
    """The annotator's own prompt and our loop: places, preferences, tokens, cost; nothing is asked
    twice.
    """
    archive("alpaca_eval")
    by = endpoint.Endpoint("judge", gate.url, prices=(10.0, 30.0))
    made = ask.alpaca_eval(OUTPUTS, by, model="ours", questions=QUESTIONS)
    rows, facts = ask.rows(made), made.manifest["facts"]
    assert [row["instruction"] for row in rows] == list(OUTPUTS) and len(gate.asked) == 7
    assert rows[1]["preference"] == 1.5, "equal answers are a tie"
    assert {row["swapped"] for row in rows} == {True, False}
    for row in rows[:1] + rows[2:]:
        (k,) = [
            k
            for k, one in enumerate(gate.asked)
            if row["instruction"] in one["messages"][1]["content"]
        ]
        asked, odds = (
            gate.asked[k],
            {top["token"]: math.exp(top["logprob"]) for top in gate.first[k]["top_logprobs"]},
        )
        shown_first = odds.get("m", 0) / (odds.get("m", 0) + odds.get("M", 0))
        assert row["preference"] == pytest.approx(
            1 + shown_first if row["swapped"] else 2 - shown_first
        )
        place = [
            asked["messages"][1]["content"].index(row[name]) for name in ("output_1", "output_2")
        ]
        assert (place[0] > place[1]) == row["swapped"] == ask.swapped(row["instruction"])
        assert [turn["role"] for turn in asked["messages"]] == [
            "system",
            "user",
        ] and "{output" not in str(asked)
        assert (asked["max_tokens"], asked["temperature"], asked["top_logprobs"]) == (1, 0, 5)
    tokens = [
        sum(usage[name] for usage in gate.usage) for name in ("prompt_tokens", "completion_tokens")
    ]
    assert facts == {
        "replies": 7,
        "refused": 0,
        "prompt_tokens": tokens[0],
        "completion_tokens": tokens[1],
        "cost": pytest.approx((10 * tokens[0] + 30 * tokens[1]) / 1e6),
    }
    assert (
        judge.win_rate(row["preference"] for row in rows).dropped == 0
        and judge.length_controlled(rows).estimate
    )
    elsewhere = endpoint.Endpoint("judge", "http://127.0.0.1:9/v1", at_once=1)
    again = ask.alpaca_eval(OUTPUTS, elsewhere, model="ours", questions=QUESTIONS)
    assert ask.rows(again) == rows and len(gate.asked) == 7, "the address is not in the key"
    other = {
        ask.alpaca_eval(
            OUTPUTS | {"Name a city.": "Rome."}, by, model="ours", questions=QUESTIONS
        ).key,
        ask.alpaca_eval(
            OUTPUTS, endpoint.Endpoint("another"), model="ours", questions=QUESTIONS
        ).key,
    }
    assert len(other | {made.key}) == 3
    written = [path.read_bytes() for path in paths.ARTIFACTS.rglob("*") if path.is_file()]
    assert len(written) >= 3 and not any(KEY.encode() in content for content in written)
    with pytest.raises(ValueError, match="no answer to 'Name a tree.': 0 answers"):
        ask.alpaca_eval({}, by, model="ours", questions=QUESTIONS)


CHILD = """
import json, sys
from beyond_dpo.judging import ask
from beyond_dpo.pipeline import endpoint
outputs, questions, prompt, url = json.loads(sys.stdin.read())
by = endpoint.Endpoint("judge", url, at_once=2)
ask.alpaca_eval(outputs, by, model="ours", questions=questions, prompt=prompt).get()
"""


def test_kill_9_and_go_on(gate, store):
    """Nothing that was kept is asked again; the result is that of a run without a kill."""
    prompt = "<|im_start|>user\n{output_1} {output_2}<|im_end|>"
    questions = [{"instruction": str(i), "output": f"Number {i}"} for i in range(24)]
    outputs = {str(i): f"No. {i}" for i in range(24)}
    by = endpoint.Endpoint("judge", gate.url)
    made = ask.alpaca_eval(outputs, by, model="ours", questions=questions, prompt=prompt)
    kept = paths.ARTIFACTS / f"{made.key}.partial" / "checkpoints" / "replies.jsonl"
    killed = threading.Event()
    gate.faults += [None] * 8 + [killed] * 40  # after eight replies it waits to be killed
    environment = os.environ | {"BEYOND_DPO_ARTIFACTS": str(paths.ARTIFACTS)}
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD], stdin=subprocess.PIPE, env=environment, text=True
    )
    # by the server's name the requests of the killed process are told apart: some may be read after
    # its end
    childs_url = gate.url.replace("127.0.0.1", "localhost")
    child.stdin.write(json.dumps([outputs, questions, prompt, childs_url]))
    child.stdin.close()
    wait_for(
        lambda: child.poll() is not None or kept.exists() and kept.read_text().count("\n") == 8, 900
    )
    assert child.poll() is None
    child.kill()
    assert child.wait() == -signal.SIGKILL
    before = [json.loads(line)[0] for line in kept.read_text().splitlines()]
    assert len(before) == 8
    gate.faults.clear()
    killed.set()
    rows = ask.rows(made)
    asked = {"localhost": [], "127.0.0.1": []}
    for host, request in zip(gate.hosts, gate.asked, strict=True):
        asked[host].append(re.search(r"\d+", request["messages"][0]["content"])[0])
    assert set(before) <= set(asked["localhost"])
    assert sorted(asked["127.0.0.1"]) == sorted(set(outputs) - set(before)), (
        "each of the others once, none again"
    )
    assert [row["instruction"] for row in rows] == list(outputs) and made.manifest["facts"][
        "replies"
    ] == 24


def test_mt_bench_for_real(gate, store):
    """80 questions, prompts by category, references where they belong; a judge without judgment is
    counted.
    """
    archive("mt_bench")
    questions = ask._member_rows("mt_bench", f"{ask.MT}mt_bench/question.jsonl")
    assert len(questions) == 80
    few = [
        next(one for one in questions if one["category"] == name) for name in ("writing", "math")
    ]
    outputs = {one["question_id"]: ["Our first.", "Our {second}."] for one in few}
    made = ask.mt_bench(
        outputs, endpoint.Endpoint("judge", gate.url), model="ours", questions=few, max_tokens=24
    )
    rows, asked = ask.rows(made), {}
    assert [(row["category"], row["turn"]) for row in rows] == [
        (c, t) for c in ("writing", "math") for t in (1, 2)
    ]
    for one in gate.asked:
        said = one["messages"][1]["content"]
        asked[("Reference" in said or "reference" in said, "Our {second}." in said)] = said
    assert set(asked) == {(False, False), (False, True), (True, False), (True, True)}
    references = ask.answers(
        assets.member("mt_bench", f"{ask.MT}mt_bench/reference_answer/gpt-4.jsonl")
    )
    for second in (False, True):
        assert references[few[1]["question_id"]][second] in asked[True, second]
        assert (
            few[0]["turns"][second] in asked[False, second] and "Our first." in asked[False, second]
        )
    found = judge.mt_bench(rows)
    assert found.unparsed == sum(judge.rating(row["judgment"]) is None for row in rows)
    with pytest.raises(ValueError, match="no answer to 81"):
        ask.mt_bench({}, endpoint.Endpoint("judge", gate.url), model="ours")
    with pytest.raises(ValueError, match="question 81 has one answer, of two turns"):
        ask.mt_bench({81: "A text."}, endpoint.Endpoint("judge", gate.url), model="ours")
    added = {"question_id": 999, "category": "math", "turns": ["1 + 1?", "Twice?"]}
    with pytest.raises(ValueError, match="no answer to 999"):
        ask.mt_bench({999: ["2", "4"]}, endpoint.Endpoint("judge"), model="ours", questions=[added])
    added["reference"] = ["Two.", "Four."]
    assert (
        ask.mt_bench(
            {999: ["2", "4"]}, endpoint.Endpoint("judge"), model="ours", questions=[added]
        ).key
        != made.key
    )


def test_arena_hard_for_real(gate, store):
    """v2.0 with its own baselines, and rows as of v0.1 with a given one; each question in both
    places.
    """
    archive("llm_eval")
    questions = ask._member_rows("llm_eval", f"{ask.ARENA}question.jsonl")
    assert len(questions) == 750
    few = [
        min(
            (one for one in questions if one["category"] == name),
            key=lambda one: len(one["prompt"]),
        )
        for name in ("hard_prompt", "creative_writing")
    ]
    outputs, by = {one["uid"]: "Our {answer}." for one in few}, endpoint.Endpoint("judge", gate.url)
    rows = ask.rows(ask.arena_hard(outputs, by, model="ours", questions=few, max_tokens=8))
    baselines = ["o3-mini-2025-01-31", "gemini-2.0-flash-001"]
    pairs = [pair for name in baselines for pair in ((name, "ours"), ("ours", name))]
    assert [(row["model_a"], row["model_b"]) for row in rows] == pairs
    old = [{"question_id": "a", "category": "arena-hard-v0.1", "turns": [{"content": "Why?"}]}]
    content = (
        b'{"question_id": "a", "choices": [{"turns": [{"content": "Their \xe2\x80\xa8 '
        b'answer."}]}]}\n'
    )
    theirs = ask.answers(content)
    assert theirs == {"a": "Their \u2028 answer."}, "a line separator in a text ends no line"
    gate.asked.clear()
    given = {"questions": old, "baseline": ("gpt-4-0314", theirs), "max_tokens": 8}
    made = ask.arena_hard({"a": "Ours."}, by, model="ours", **given)
    assert [row["model_a"] for row in ask.rows(made)] == ["gpt-4-0314", "ours"]
    first, second = sorted(
        gate.asked, key=lambda one: one["messages"][1]["content"].index("Ours."), reverse=True
    )
    assert first["messages"][1]["content"].index("Their") < first["messages"][1]["content"].index(
        "Ours."
    )
    assert second["messages"][1]["content"].index("Ours.") < second["messages"][1]["content"].index(
        "Their"
    )
    assert "[[A>>B]]" in first["messages"][0]["content"] and first["max_tokens"] == 8


def test_published_pairs_are_extrapolated_and_judged(store, gate, tiny, tmp_path, monkeypatch):
    """Two folders as two hub ids: α by a reward model on dev prompts, both ends on AlpacaEval's, a
    real judge.
    """
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
    )

    archive("llm_eval")
    archive("alpaca_eval")
    model = AutoModelForCausalLM.from_pretrained(tiny)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    reward = AutoModelForSequenceClassification.from_config(
        AutoConfig.from_pretrained(tiny, num_labels=1)
    )
    for name, made in (("aligned", model), ("reward", reward)):
        made.save_pretrained(tmp_path / name)
        AutoTokenizer.from_pretrained(tiny).save_pretrained(tmp_path / name)
    dev = tmp_path / "dev.jsonl"
    dev.write_text("".join(json.dumps({"prompt": f"Say {n} words."}) + "\n" for n in range(4)))
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
        "test_prompts": 12,
        "gold_rows": 0,
        "reward_rows": 0,
        "prompt_tokens": [1, 60],
        "reward_model": str(tmp_path / "reward"),
    }
    changes = {
        "pairs": {"mine": [str(tiny), str(tmp_path / "aligned")]},
        "published_alphas": [0, 0.5],
    }
    changes["test_samples"] = 1
    where = {"judge": "judge", "judge_url": gate.url, "kl_prompts": 0}
    cfg = config.load("expo", "smoke", world=world, **changes, **where)
    found = published.off_the_shelf(cfg)
    table, best, wins = (
        found.csv("responses.csv.gz"),
        found.json("best.json"),
        found.json("wins.json"),
    )
    assert set(table[table["split"] == "dev"]["alpha"]) == {0, 0.5} and best["mine"] in (0, 0.5)
    assert {row["alpha"] for row in wins} == {0.0, best["mine"]}
    judged = wins[0]["win_rate"]
    assert judged["wins"] + judged["losses"] + judged["draws"] + judged["dropped"] == len(
        table[(table["split"] == "test") & (table["alpha"] == 0)]
    )
    assert 0 < judged["percent"] < 100 and wins[0]["length_controlled"]["estimate"]
    assert len(gate.asked) >= judged["wins"] + judged["losses"]
    with pytest.raises(ValueError, match="none of 1 prompts is AlpacaEval's"):
        ask.alpaca_questions({"What?": "That."})


def test_a_judge_that_refuses_everything_gives_no_result_and_is_asked_again(gate, store):
    """HTTP 400 to all: an error, not a finished artifact without a judgement; once it answers, it
    is asked anew.
    """
    archive("mt_bench")
    question = {"question_id": 1, "category": "writing", "turns": ["Say a.", "Say b."]}
    made = ask.mt_bench(
        {1: ["a", "b"]},
        endpoint.Endpoint("judge", gate.url, at_once=1),
        model="ours",
        questions=[question],
        max_tokens=8,
    )
    gate.faults += [400, 400]
    with pytest.raises(endpoint.EndpointError, match=r"judge refused all 2 requests \(HTTP 400\)"):
        made.get()
    assert len(ask.rows(made)) == 2 and made.manifest["facts"]["refused"] == 0
