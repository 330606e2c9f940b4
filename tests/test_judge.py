"""Benchmarks' scores against hand and published numbers; judges asked for real, through a gate that makes faults."""

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
import time
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pandas as pd
import pytest
import torch

from beyond_dpo import ask, assets, config, endpoint, judge, paths, published, report
from conftest import openai_server

KEY = "sk-not-to-be-found-anywhere"
RELEASED = paths.ROOT.parent / "shared" / "released"
released = pytest.mark.skipif(not RELEASED.is_dir(), reason="the authors' released annotations are not here")
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
    """Shares 0, 1, 0.5, 0.5, 0.25: mean 0.45, variance (0.2025 + 0.3025 + 2 · 0.0025 + 0.04) / 4 = 0.1375."""
    found = judge.win_rate([1, 2, 1.5, 0, None, 1.25, math.nan])
    assert found.percent == pytest.approx(45) and found.standard_error == pytest.approx(100 * math.sqrt(0.1375 / 5))
    assert found[2:] == (pytest.approx(40), 1, 2, 2, 2), "a win, two draws of five; two dropped"
    turned = judge.win_rate([2, 1, 1.5, 1.5, 1.75])
    assert turned.percent == pytest.approx(100 - found.percent) and turned.wins == found.losses
    for wrong in ([], [1.5], [None, 1], [1, 2.5], [1, -1], [1, 0.5], [1, math.inf]):
        with pytest.raises(ValueError, match="two or more preferences in 1…2"):
            judge.win_rate(wrong)


@released
@pytest.mark.parametrize("model", MODELS)
def test_released_annotations_give_the_published_numbers(model):
    """Of 805 recorded judgments by GPT-4: places, log-probabilities, preferences, the leaderboard's row."""
    rows, row = annotations(model), pd.read_csv(RELEASED / "alpaca_leaderboard.csv", index_col=0).loc[model]
    again = []
    for one in rows:
        content = one["raw_completion"] and one["raw_completion"]["logprobs"]["content"][0]["top_logprobs"]
        top = {entry["token"]: entry["logprob"] for entry in content or []}
        assert content or one["output_1"] == one["output_2"], "equal answers were not asked about"
        again.append(judge.preference(top, ask.swapped(one["instruction"])) if content else 1.5)
    assert again == pytest.approx([one["preference"] for one in rows], abs=1e-9)
    found = judge.win_rate(again)
    assert found.percent == pytest.approx(row["win_rate"], rel=1e-11)
    assert found.standard_error == pytest.approx(row["standard_error"], rel=1e-11)
    assert found.discrete == pytest.approx(row["discrete_win_rate"], rel=1e-14)
    assert (found.wins, found.losses, found.draws) == tuple(row[["n_wins", "n_wins_base", "n_draws"]])
    printed = report.published("expo_leaderboard_mapping").set_index("leaderboard_csv_row").loc[model]
    assert (round(found.percent, 4), round(found.standard_error, 4)) == (printed["win_rate"], printed["standard_error"])


@released
@pytest.mark.parametrize("model, off, fitted", [(MODELS[0], 0.73, 6.12), (MODELS[1], 1.09, 7.11)])
def test_the_length_controlled_estimate_is_as_far_off_as_its_docstring_says(model, off, fitted):
    rows, board = annotations(model), pd.read_csv(RELEASED / "alpaca_leaderboard.csv", index_col=0)
    published, found = board.loc[model, "length_controlled_winrate"], judge.length_controlled(rows)
    assert found.estimate and found.percent - published == pytest.approx(off, abs=0.01)
    assert found.low < published < found.high < found.percent + 5
    assert judge.length_controlled(rows, slope=None, n_boot=2).percent - published == pytest.approx(fitted, abs=0.01)
    assert judge.win_rate(row["preference"] for row in rows).percent < published - 3.9, "further off"


def compared(longer, preferences):
    return [{"output_1": "x" * (100 + k), "output_2": "x" * 100, "preference": p}
            for k, p in zip(longer, preferences, strict=True)]  # fmt: skip


def test_length_controlled_by_hand():
    """Two lengths: the fitted line goes through both groups' log-odds, and half-way is their mean."""
    rows = compared([-50, 50] * 20, [1.8, 1.4] * 20)
    logit = [math.log(p / (1 - p)) for p in (0.8, 0.4)]
    wanted = 100 / (1 + math.exp(-sum(logit) / 2))
    assert judge.length_controlled(rows, slope=None, n_boot=5).percent == pytest.approx(wanted, abs=1e-3)
    x = math.tanh(50 / np.std([-50, 50] * 20, ddof=1))
    slope = (logit[1] - logit[0]) / 2 / x
    assert judge.length_controlled(rows, slope=slope, n_boot=5).percent == pytest.approx(wanted, abs=1e-6)
    same = compared([0] * 40, [1.0, 1.9] * 19 + [0, None])
    found, plain = judge.length_controlled(same, n_boot=200), judge.win_rate(row["preference"] for row in same)
    assert found.percent == pytest.approx(plain.percent, abs=1e-6), "no difference in length: the win rate"
    assert (found.high - found.low) / (2 * 1.96) == pytest.approx(plain.standard_error, rel=0.2)
    assert judge.length_controlled(same, n_boot=9) == judge.length_controlled(same, n_boot=9)
    all_lost = judge.length_controlled(compared([5, -5, 9, -9], [1] * 4), n_boot=5)
    assert all_lost.percent == pytest.approx(0, abs=1e-4)


def test_alpaca_eval_itself_fits_where_its_file_is_given(tmp_path):
    """On invented rows: a win by the longer answer counts for less, by its function and by our estimate."""
    pytest.importorskip("alpaca_eval")
    rng = np.random.default_rng(0)
    delta = rng.normal(size=805)
    rows = compared([-int(100 * min(d, 0.9)) for d in delta], 1 + 1 / (1 + np.exp(-1.5 * delta)))
    rows = [row | {"generator_1": "theirs", "generator_2": "ours", "annotator": "a"} for row in rows]
    gamed = pd.DataFrame({"model": "theirs_verbose", "index": range(805), "preference": rng.uniform(size=805)})
    gamed["instruction_difficulty"], gamed["std_delta_len"] = rng.normal(size=805), rng.normal(size=805)
    gamed.assign(not_gamed_baseline=False).to_csv(tmp_path / "df_gamed.csv", index=False)
    found = judge.length_controlled(rows, tmp_path / "df_gamed.csv")
    assert not found.estimate and found.low < found.percent < found.high
    assert found.percent == pytest.approx(judge.length_controlled(rows, slope=None, n_boot=2).percent, abs=3)


def test_preference_by_hand():
    assert judge.preference({"m": math.log(0.6), "M": math.log(0.2), "The": 0.1}, False) == pytest.approx(1.25)
    assert judge.preference({"m": math.log(0.6), "M": math.log(0.2)}, True) == pytest.approx(1.75)
    assert judge.preference({"m": -0.1}, False) == 1 and judge.preference({"M": -9.0}, False) == 2
    assert judge.preference({"Model": 0.0, " m": -1.0}, True) is None and judge.preference({}, False) is None


def test_verdicts_and_ratings():
    strong, weak, tie = judge.STRONG, 1, 0.5
    for said, wanted in {"[[A>>B]]": (1, strong), "So: [[A>B]].": (1, weak), "[[A=B]]": (tie, weak),
                         "[[B>A]]": (0, weak), "[[B>>A]]": (0, strong), "[[A<<B]]": (0, strong), "[[B<A]]": (1, weak),
                         "not [[A>B]] but [[B>>A]]": (0, strong), "[A>B]": None, "[[A>A]]": None, "": None}.items():
        assert judge.verdict(said) == wanted, said
    for said, wanted in {"Rating: [[7]]": 7, "[[6.5]] of [[10]]": 6.5, "[8]": 8, "[3], that is [[4]]": 4, "[[0]]": None,
                         "[[11]]": None, "[[rating]]": None, "ten": None}.items():  # fmt: skip
        assert judge.rating(said) == wanted, said


def test_mt_bench_by_hand():
    rows = [{"turn": turn, "judgment": said} for turn, said in ((1, "[[9]]"), (1, "[[6]]"), (1, "?"), (2, "[[3]]"))]
    assert judge.mt_bench(rows) == (7.5, 3, 6, 1), "overall is the mean of ratings, not of turns"
    assert math.isnan(judge.mt_bench(rows[:3]).second)


def games(uid, first, second, *said):
    """Return a question's games, the answers changing places."""
    places = ((first, second), (second, first))
    return [{"uid": uid, "model_a": places[k % 2][0], "model_b": places[k % 2][1], "judgment": text}
            for k, text in enumerate(said)]  # fmt: skip


def test_arena_hard_by_hand():
    """Against the baseline alone it is the weighted mean; along a chain the odds multiply."""
    ours = games(1, "base", "ours", "[[B>>A]]", "[[A>B]]") + games(2, "base", "ours", "[[A>B]]", "[[A=B]]")
    unparsed = games(3, "base", "ours", "[[B>>A]]", "I cannot say")
    found = judge.arena_hard(ours + unparsed, "base", n_boot=50)
    assert found["percent"].tolist() == [pytest.approx(100 * (3 + 1 + 0 + 0.5) / 6, abs=1e-3)]
    assert found[["model", "questions", "unparsed"]].values.tolist() == [["ours", 2, 1]]
    assert found["low"][0] < found["percent"][0] < found["high"][0]
    lost, won = ("[[A>B]]", "[[B>A]]"), ("[[B>A]]", "[[A>B]]")
    chain = [game for k in range(8) for a, b in (("base", "one"), ("one", "two"))
             for game in games(k, a, b, *(won if k % 4 else lost))]  # fmt: skip
    found = judge.arena_hard(chain, "base", n_boot=10).set_index("model")["percent"]
    assert found.tolist() == [pytest.approx(75, abs=1e-3), pytest.approx(90, abs=1e-3)], "odds 3, then 3 · 3"
    turned = judge.arena_hard(chain, "two", n_boot=10).set_index("model")["percent"]
    assert turned["base"] == pytest.approx(100 - found["two"], abs=1e-3)
    with pytest.raises(ValueError, match="no chain of verdicts ties all of .*'three'.* to base; unparsed: {'a': 1"):
        judge.arena_hard(ours + games(1, "three", "four", "[[A>B]]") + games(1, "a", "base", "?"), "base")


# ---- a real judge, behind a gate that makes faults


@pytest.fixture(scope="module")
def served():
    """Start a real OpenAI-compatible server with SmolLM2-135M; yield its address."""
    archive("smollm2")
    with openai_server(assets.model_dir("smollm2"), "judge", KEY, "--max-model-len", "2048") as address:
        yield address


@pytest.fixture
def gate(served, monkeypatch):
    """Yield a server before the real one: it takes the next of `faults` for each request, or passes it on."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)

    class Gate(BaseHTTPRequestHandler):
        faults, asked, usage, first = [], [], [], []  # first: the likeliest first tokens, where they are asked for

        def do_POST(self):
            body, fault = self.rfile.read(int(self.headers["Content-Length"])), None
            if self.faults:
                fault = self.faults.pop(0)
            if isinstance(fault, float):  # seconds
                time.sleep(fault)
            if isinstance(fault, int):  # a status, and what it was sent, as a careless server would
                return self.answer(fault, json.dumps({"error": {"message": self.headers["Authorization"]}}).encode())
            if isinstance(fault, str):
                return self.answer(200, fault.encode())
            headers = {"Authorization": self.headers["Authorization"], "Content-Type": "application/json"}
            try:
                with urllib.request.urlopen(urllib.request.Request(served + self.path, body, headers)) as reply:
                    content = reply.read()
            except urllib.error.HTTPError as error:
                return self.answer(error.code, error.read())
            self.asked.append(json.loads(body))
            if not isinstance(fault, float):  # else nobody waits for it any more
                said = json.loads(content)
                self.usage.append(said["usage"])
                self.first.append((said["choices"][0]["logprobs"] or {"content": [{}]})["content"][0])
            self.answer(200, content)

        def answer(self, status, content):
            kind = "application/json" if content.startswith(b"{") else "text/html"
            try:
                self.send_response(status)
                for name, value in {"Content-Type": kind, "Content-Length": len(content), "Retry-After": "0.1"}.items():
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


def requests(count):
    return {f"q{i}": {"messages": [{"role": "user", "content": f"Say {i}."}], "max_tokens": 4, "temperature": 0}
            for i in range(count)}  # fmt: skip


def text(reply):
    return reply.choices[0].message.content if reply else None


def test_faults_are_retried_and_tokens_are_the_servers_own(gate, tmp_path):
    """429, 500, 503 and a timeout come to a reply each; what was asked twice counts once, as in the file."""
    gate.faults += [429, 500, 503, 1.6]
    by = endpoint.Endpoint("judge", gate.url, prices=(10.0, 30.0), at_once=1, timeout=1.0)
    found, used = endpoint.ask(by, requests(6), tmp_path / "kept.jsonl", text)
    assert list(found) == [f"q{i}" for i in range(6)] and all(found.values()) and not gate.faults
    tokens = [sum(usage[name] for usage in gate.usage) for name in ("prompt_tokens", "completion_tokens")]
    assert used == (6, 0, *tokens) and len(gate.usage) == 6 and len(gate.asked) <= 7, "one went to nobody"
    assert used.cost(by.prices) == pytest.approx((10 * tokens[0] + 30 * tokens[1]) / 1e6) and used.cost(None) is None
    assert endpoint.ask(by, requests(6), tmp_path / "kept.jsonl", text) == (found, used) and len(gate.usage) == 6


def test_what_no_retry_mends_is_an_error_that_keeps_what_came_and_tells_no_key(gate, tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    by, kept = endpoint.Endpoint("judge", gate.url, at_once=1, retries=1), tmp_path / "kept.jsonl"
    for faults, said in [([None, 401], "AuthenticationError.*401.*Bearer <OPENAI_API_KEY>"),
                         ([500, 502], "InternalServerError.*502"), (['{"choices": null}'], "without choices"),
                         (["<html>"], "without choices: <html>"), (["{"], "JSON")]:  # fmt: skip
        gate.faults[:] = faults
        with pytest.raises(endpoint.EndpointError, match=f"judge.*{said}") as caught:
            endpoint.ask(by, requests(3), kept, text)
        assert KEY not in f"{caught.value!r} {caught.value.__cause__!r}"
        assert caught.value.__suppress_context__ or caught.value.__context__ is None, "no traceback shows it"
    gate.faults[:] = [400]  # its message is logged
    found, used = endpoint.ask(by, requests(3), kept, text)
    assert (used.replies, used.refused) == (2, 1) and list(found.values()).count(None) == 1
    gate.faults[:] = ['{"choices": [{"index": 0, "message": {"content": "Bearer %s"}}]}' % KEY]  # noqa: UP031
    found, used = endpoint.ask(by, {"other": requests(1)["q0"]}, kept, text)
    assert used == (1, 0, 0, 0) and found["other"] == "Bearer <OPENAI_API_KEY>", "it counts nothing, and tells the key"
    assert KEY not in kept.read_text() + caplog.text and "refused 'q1': " in caplog.text
    assert len(gate.asked) == 2, "the first reply was kept through five errors"


def test_half_a_line_is_asked_again_and_a_whole_one_never(gate, tmp_path):
    by, kept = endpoint.Endpoint("judge", gate.url), tmp_path / "kept.jsonl"
    kept.write_text('["q0", "kept before", [7, 3]]\n["q1", null, null]\n["q2", "not coun')
    found, used = endpoint.ask(by, requests(3), kept, text)
    assert found["q0"] == "kept before" and found["q1"] is None and found["q2"]
    assert [one["messages"][0]["content"] for one in gate.asked] == ["Say 2."]
    assert used == (2, 1, 7 + gate.usage[0]["prompt_tokens"], 3 + gate.usage[0]["completion_tokens"])
    assert [json.loads(line)[0] for line in kept.read_text().splitlines()] == ["q0", "q1", "q2"]


QUESTIONS = [{"instruction": f"Name a {what}.", "output": f"A {what}? Of course: {what}s are many.", "generator": "gpt"}
             for what in "tree fish bird river city metal colour planet".split()]  # fmt: skip
OUTPUTS = {row["instruction"]: "I will not." for row in QUESTIONS} | {"Name a fish.": QUESTIONS[1]["output"]}


def test_alpaca_eval_for_real(gate, store):
    """The annotator's own prompt and our loop: places, preferences, tokens, cost; nothing is asked twice."""
    archive("alpaca_eval")
    by = endpoint.Endpoint("judge", gate.url, prices=(10.0, 30.0))
    made = ask.alpaca_eval(OUTPUTS, by, model="ours", questions=QUESTIONS)
    rows, facts = ask.rows(made), made.manifest["facts"]
    assert [row["instruction"] for row in rows] == list(OUTPUTS) and len(gate.asked) == 7
    assert rows[1]["preference"] == 1.5, "equal answers are a tie"
    assert {row["swapped"] for row in rows} == {True, False}
    for row in rows[:1] + rows[2:]:
        (k,) = [k for k, one in enumerate(gate.asked) if row["instruction"] in one["messages"][1]["content"]]
        asked, odds = gate.asked[k], {top["token"]: math.exp(top["logprob"]) for top in gate.first[k]["top_logprobs"]}
        shown_first = odds.get("m", 0) / (odds.get("m", 0) + odds.get("M", 0))
        assert row["preference"] == pytest.approx(1 + shown_first if row["swapped"] else 2 - shown_first)
        place = [asked["messages"][1]["content"].index(row[name]) for name in ("output_1", "output_2")]
        assert (place[0] > place[1]) == row["swapped"] == ask.swapped(row["instruction"])
        assert [turn["role"] for turn in asked["messages"]] == ["system", "user"] and "{output" not in str(asked)
        assert (asked["max_tokens"], asked["temperature"], asked["top_logprobs"]) == (1, 0, 5)
    tokens = [sum(usage[name] for usage in gate.usage) for name in ("prompt_tokens", "completion_tokens")]
    assert facts == {"replies": 7, "refused": 0, "prompt_tokens": tokens[0], "completion_tokens": tokens[1],
                     "cost": pytest.approx((10 * tokens[0] + 30 * tokens[1]) / 1e6)}  # fmt: skip
    assert judge.win_rate(row["preference"] for row in rows).dropped == 0 and judge.length_controlled(rows).estimate
    elsewhere = endpoint.Endpoint("judge", "http://127.0.0.1:9/v1", at_once=1)
    again = ask.alpaca_eval(OUTPUTS, elsewhere, model="ours", questions=QUESTIONS)
    assert ask.rows(again) == rows and len(gate.asked) == 7, "the address is not in the key"
    other = {ask.alpaca_eval(OUTPUTS | {"Name a city.": "Rome."}, by, model="ours", questions=QUESTIONS).key,
             ask.alpaca_eval(OUTPUTS, endpoint.Endpoint("another"), model="ours", questions=QUESTIONS).key}  # fmt: skip
    assert len(other | {made.key}) == 3
    written = [path.read_bytes() for path in paths.ARTIFACTS.rglob("*") if path.is_file()]
    assert len(written) >= 3 and not any(KEY.encode() in content for content in written)
    with pytest.raises(ValueError, match="no answer to 'Name a tree.': 0 answers"):
        ask.alpaca_eval({}, by, model="ours", questions=QUESTIONS)


CHILD = """
import json, sys
from beyond_dpo import ask, endpoint
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
    gate.faults += [None] * 4 + [0.2] * 40  # slow enough to be killed in the middle
    environment = os.environ | {"BEYOND_DPO_ARTIFACTS": str(paths.ARTIFACTS)}
    child = subprocess.Popen([sys.executable, "-c", CHILD], stdin=subprocess.PIPE, env=environment, text=True)
    child.stdin.write(json.dumps([outputs, questions, prompt, gate.url]))
    child.stdin.close()
    end = time.monotonic() + 60
    while not kept.exists() or kept.read_text().count("\n") < 6:
        assert child.poll() is None and time.monotonic() < end
        time.sleep(0.02)
    child.kill()
    assert child.wait() == -signal.SIGKILL
    before = [json.loads(line)[0] for line in kept.read_text().splitlines(keepends=True) if line.endswith("\n")]
    assert 6 <= len(before) < 24
    time.sleep(0.5)  # what was under way reaches the gate
    first = len(gate.asked)
    gate.faults.clear()
    rows = ask.rows(made)
    asked = [re.search(r"\d+", one["messages"][0]["content"])[0] for one in gate.asked]
    assert sorted(asked[first:]) == sorted(set(outputs) - set(before)) and len(asked) <= 24 + 2
    assert [row["instruction"] for row in rows] == list(outputs) and made.manifest["facts"]["replies"] == 24


def test_mt_bench_for_real(gate, store):
    """80 questions, prompts by category, references where they belong; a judge without judgment is counted."""
    archive("mt_bench")
    questions = ask._lines("mt_bench", f"{ask.MT}mt_bench/question.jsonl")
    assert len(questions) == 80
    few = [next(one for one in questions if one["category"] == name) for name in ("writing", "math")]
    outputs = {one["question_id"]: ["Our first.", "Our {second}."] for one in few}
    made = ask.mt_bench(outputs, endpoint.Endpoint("judge", gate.url), model="ours", questions=few, max_tokens=24)
    rows, asked = ask.rows(made), {}
    assert [(row["category"], row["turn"]) for row in rows] == [(c, t) for c in ("writing", "math") for t in (1, 2)]
    for one in gate.asked:
        said = one["messages"][1]["content"]
        asked[("Reference" in said or "reference" in said, "Our {second}." in said)] = said
    assert set(asked) == {(False, False), (False, True), (True, False), (True, True)}
    references = ask.answers(assets.member("mt_bench", f"{ask.MT}mt_bench/reference_answer/gpt-4.jsonl"))
    for second in (False, True):
        assert references[few[1]["question_id"]][second] in asked[True, second]
        assert few[0]["turns"][second] in asked[False, second] and "Our first." in asked[False, second]
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
    assert ask.mt_bench({999: ["2", "4"]}, endpoint.Endpoint("judge"), model="ours", questions=[added]).key != made.key


def test_arena_hard_for_real(gate, store):
    """v2.0 with its own baselines, and rows as of v0.1 with a given one; each question in both places."""
    archive("llm_eval")
    questions = ask._lines("llm_eval", f"{ask.ARENA}question.jsonl")
    assert len(questions) == 750
    few = [min((one for one in questions if one["category"] == name), key=lambda one: len(one["prompt"]))
           for name in ("hard_prompt", "creative_writing")]  # fmt: skip
    outputs, by = {one["uid"]: "Our {answer}." for one in few}, endpoint.Endpoint("judge", gate.url)
    rows = ask.rows(ask.arena_hard(outputs, by, model="ours", questions=few, max_tokens=8))
    baselines = ["o3-mini-2025-01-31", "gemini-2.0-flash-001"]
    pairs = [pair for name in baselines for pair in ((name, "ours"), ("ours", name))]
    assert [(row["model_a"], row["model_b"]) for row in rows] == pairs
    old = [{"question_id": "a", "category": "arena-hard-v0.1", "turns": [{"content": "Why?"}]}]
    content = b'{"question_id": "a", "choices": [{"turns": [{"content": "Their \xe2\x80\xa8 answer."}]}]}\n'
    theirs = ask.answers(content)
    assert theirs == {"a": "Their \u2028 answer."}, "a line separator in a text ends no line"
    gate.asked.clear()
    given = {"questions": old, "baseline": ("gpt-4-0314", theirs), "max_tokens": 8}
    made = ask.arena_hard({"a": "Ours."}, by, model="ours", **given)
    assert [row["model_a"] for row in ask.rows(made)] == ["gpt-4-0314", "ours"]
    first, second = sorted(gate.asked, key=lambda one: one["messages"][1]["content"].index("Ours."), reverse=True)
    assert first["messages"][1]["content"].index("Their") < first["messages"][1]["content"].index("Ours.")
    assert second["messages"][1]["content"].index("Ours.") < second["messages"][1]["content"].index("Their")
    assert "[[A>>B]]" in first["messages"][0]["content"] and first["max_tokens"] == 8


def test_published_pairs_are_extrapolated_and_judged(store, gate, tiny, tmp_path, monkeypatch):
    """Two folders as two hub ids: α by a reward model on dev prompts, both ends on AlpacaEval's, a real judge."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    archive("llm_eval")
    archive("alpaca_eval")
    model = AutoModelForCausalLM.from_pretrained(tiny)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    reward = AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(tiny, num_labels=1))
    for name, made in (("aligned", model), ("reward", reward)):
        made.save_pretrained(tmp_path / name)
        AutoTokenizer.from_pretrained(tiny).save_pretrained(tmp_path / name)
    dev = tmp_path / "dev.jsonl"
    dev.write_text("".join(json.dumps({"prompt": f"Say {n} words."}) + "\n" for n in range(4)))
    world = {"target": str(tiny), "dataset": str(dev), "dev_dataset": str(dev), "test_dataset": "alpaca_eval",
             "template": "chat", "pairs": "given", "prompts": 0, "sft_rows": 0, "dev_prompts": 4, "test_prompts": 12,
             "gold_rows": 0, "reward_rows": 0, "prompt_tokens": [1, 60],
             "reward_model": str(tmp_path / "reward")}  # fmt: skip
    changes = {"pairs": {"mine": [str(tiny), str(tmp_path / "aligned")]}, "published_alphas": [0, 0.5]}
    changes["test_samples"] = 1
    where = {"judge": "judge", "judge_url": gate.url, "kl_prompts": 0}
    cfg = config.load("expo", "smoke", world=world, **changes, **where)
    found = published.off_the_shelf(cfg)
    table, best, wins = found.csv("responses.csv.gz"), found.json("best.json"), found.json("wins.json")
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
    """HTTP 400 to all: an error, not a finished artifact without a judgement; once it answers, it is asked anew."""
    archive("mt_bench")
    question = {"question_id": 1, "category": "writing", "turns": ["Say a.", "Say b."]}
    made = ask.mt_bench({1: ["a", "b"]}, endpoint.Endpoint("judge", gate.url, at_once=1), model="ours",
                        questions=[question], max_tokens=8)  # fmt: skip
    gate.faults += [400, 400]
    with pytest.raises(endpoint.EndpointError, match=r"judge refused all 2 requests \(HTTP 400\)"):
        made.get()
    assert len(ask.rows(made)) == 2 and made.manifest["facts"]["refused"] == 0
