"""Preference data: invented rows of the published schemas, written to files and read back."""

from __future__ import annotations

import dataclasses
import gzip
import json
import random
import re
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest

from beyond_dpo import rewards, templates
from beyond_dpo.machine import paths
from beyond_dpo.pipeline import assets, config, corpus, expo, mallows, preferences, sources, stages
from beyond_dpo.pipeline.config import ConfigError
from beyond_dpo.rows import read_rows


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)


def user(text):
    return {"role": "user", "content": text}


def system(text):
    return {"role": "system", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def jsonl(rows, name="rows.jsonl"):
    with open(name, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return name


def parquet(rows, name="rows.parquet"):
    import pyarrow
    from pyarrow import parquet as pq

    pq.write_table(pyarrow.Table.from_pylist(rows), name)
    return name


def read_back(ref):
    """Return the rows of a data set, or why they are dropped, in the order of its file."""
    by_number = dict(preferences.read(ref))
    return [by_number[number] for number in sorted(by_number)]


def with_answers(turns):
    """Return the chosen and the rejected chat of turns before the answers a and b."""
    return {"chosen": [*turns, assistant("a")], "rejected": [*turns, assistant("b")]}


def reviews():
    file = paths.FIXTURES / "reviews.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()]


PAIR = {"chosen": "Très bien\u2028— 好.", "rejected": "Bad."}
TURNS = [user("Why?"), assistant("Because."), user("How?")]
SE = {
    "qid": 7,
    "question": "<p>Is <code>a &lt; b</code> &amp; so on?</p>",
    "date": "2020/01/01",
    "metadata": ["https://a.b"],
    "answers": [
        {"answer_id": 1, "author": "x", "pm_score": 1, "selected": False, "text": "<p>Worse</p>"},
        {
            "answer_id": 2,
            "author": "y",
            "pm_score": 4,
            "selected": True,
            "text": "<p>Use <b>this</b>:</p>\n<pre>&lt;br&gt; 1 &gt; 0</pre>",
        },
        {"answer_id": 3, "author": "z", "pm_score": 0, "selected": False, "text": "<p>No é</p>"},
    ],
}
CASES = {
    "ultrafeedback": (
        {
            "prompt": "How?",
            "prompt_id": "ab",
            "chosen": [user("How?"), assistant("So.")],
            "rejected": [user("How?"), assistant("No.")],
            "messages": [user("How?"), assistant("So.")],
            "score_chosen": 8.0,
            "score_rejected": 8.0,
        },
        {"prompt": [user("How?")], "responses": {"chosen": "So.", "rejected": "No."}},
    ),
    "armorm": (
        {
            "prompt_id": "ab",
            "prompt": "How?",
            "all_generated_responses": ["So.", "No."],
            "all_rm_scores": [0.2, 0.1],
            "chosen": [user("How?"), assistant("So.")],
            "rejected": [user("How?"), assistant("No.")],
        },
        {"prompt": [user("How?")], "responses": {"chosen": "So.", "rejected": "No."}},
    ),
    "wrpo": (
        {
            "prompt": [user("How?")],
            "chosen": [[assistant("S")], [assistant("T")]],
            "rejected": [[assistant("R")]],
        },
        {
            "prompt": [user("How?")],
            "responses": {"source_chosen": "S", "target_chosen": "T", "rejected": "R"},
        },
    ),
    "wrpo, messages": (
        {
            "prompt": user("How?"),
            "chosen": [assistant("S"), assistant("T")],
            "rejected": [assistant("R")],
        },
        {
            "prompt": [user("How?")],
            "responses": {"source_chosen": "S", "target_chosen": "T", "rejected": "R"},
        },
    ),
    "hh": (
        {
            "chosen": "\n\nHuman: Why?\n\nAssistant: Because.\n\nHuman: How?\n\nAssistant: I see.",
            "rejected": (
                "\n\nHuman: Why?\n\nAssistant: Because.\n\nHuman: How?\n\nAssistant: I saw."
            ),
        },
        {"prompt": TURNS, "responses": {"chosen": "I see.", "rejected": "I saw."}},
    ),
    "shp, A": (
        {
            "post_id": "p",
            "history": "Post",
            "human_ref_A": "One",
            "human_ref_B": "Two",
            "labels": 1,
            "score_A": 9,
        },
        {"prompt": [user("Post")], "responses": {"chosen": "One", "rejected": "Two"}},
    ),
    "shp, B": (
        {"history": "Post", "human_ref_A": "One", "human_ref_B": "Two", "labels": 0},
        {"prompt": [user("Post")], "responses": {"chosen": "Two", "rejected": "One"}},
    ),
    "stack exchange": (
        SE,
        {
            "prompt": [user("Is a < b & so on?")],
            "responses": {"chosen": "Use this:\n<br> 1 > 0", "rejected": "No é"},
        },
    ),
    "imdb": (
        {"text": "Good.<br /><br />Very  good.", "label": 1},
        {"text": "Good. Very good.", "label": 1},
    ),
    "trl, texts": ({"prompt": "The sky is", **PAIR}, {"prompt": "The sky is", "responses": PAIR}),
    "trl, implicit text": (
        {"chosen": "The sky is blue.", "rejected": "The sky is black."},
        {"prompt": "The sky is", "responses": {"chosen": " blue.", "rejected": " black."}},
    ),
    "trl, implicit text, one longer": (
        {"chosen": "Go on and", "rejected": "Go on and on"},
        {"prompt": "Go on", "responses": {"chosen": " and", "rejected": " and on"}},
    ),
    "trl, turns": (
        {"prompt": TURNS, "chosen": [assistant("So.")], "rejected": [assistant("No.")]},
        {"prompt": TURNS, "responses": {"chosen": "So.", "rejected": "No."}},
    ),
    "trl, implicit turns": (
        {"chosen": [*TURNS, assistant("So.")], "rejected": [*TURNS, assistant("No.")]},
        {"prompt": TURNS, "responses": {"chosen": "So.", "rejected": "No."}},
    ),
    "prompts": ({"prompt": "Say é"}, {"prompt": "Say é", "responses": {}}),
    "alpaca_eval": (
        {"instruction": "Do it", "output": "Done", "generator": "g"},
        {"prompt": "Do it", "responses": {}},
    ),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("write", [jsonl, parquet])
def test_every_schema(name, write):
    record, row = CASES[name]
    assert read_back(write([record, record])) == [row, row]


@pytest.mark.parametrize(
    "row, use, why",
    [
        ({"prompt": "a", "chosen": "b", "rejected": "b "}, "pairs", "equal responses"),
        ({"prompt": "a", "chosen": "b", "rejected": None}, "pairs", "empty response"),
        ({"prompt": "a", "chosen": None, "rejected": "b"}, "sft", "empty response"),
        ({"prompt": "a", "chosen": "b", "rejected": " "}, "sft", ""),
        ({"prompt": "a", "chosen": None, "rejected": None}, "pairs", "no preference"),
        ({"prompt": "a", "chosen": [], "rejected": []}, "", ""),
        ({"prompt": None, "chosen": "b", "rejected": None}, "", "no question"),
        ({"prompt": "\n", "chosen": "b", "rejected": "c"}, "", "no question"),
        ({"chosen": "Yes", "rejected": "No"}, "", "no question"),
        (
            {"prompt": [user(None)], "chosen": [assistant("b")], "rejected": [assistant("c")]},
            "",
            "no question",
        ),
        (
            {"prompt": TURNS[:2], "chosen": [assistant("b")], "rejected": [assistant("c")]},
            "",
            "no question",
        ),
        (
            {"chosen": [user("a"), assistant("b")], "rejected": [user("x"), assistant("c")]},
            "pairs",
            "no shared prompt",
        ),
        ({"chosen": [user("a"), assistant("b")], "rejected": [user("a")]}, "pairs", "no answer"),
        ({"chosen": "\n\nHuman: a", "rejected": "\n\nHuman: b"}, "", "no answer"),
        (
            {"chosen": "\n\nHuman: a\n\nAssistant: x", "rejected": "\n\nHuman: b\n\nAssistant: y"},
            "",
            "no shared prompt",
        ),
        ({"chosen": "\n\nHuman: a\n\nAssistant: x", "rejected": None}, "", "no answer"),
        (SE | {"answers": [a | {"pm_score": 2} for a in SE["answers"]]}, "", "no preference"),
        (SE | {"answers": [a | {"pm_score": None} for a in SE["answers"]]}, "", "no preference"),
        (SE | {"answers": None}, "", "no preference"),
        (
            {"history": "a", "human_ref_A": "b", "human_ref_B": "c", "labels": None},
            "",
            "no preference",
        ),
        (
            {"prompt": [user("a")], "chosen": ["b", "c"], "rejected": ["b"]},
            "pairs",
            "equal responses",
        ),
        ({"text": "a", "label": -1}, "", "no label"),
        ({"text": None, "label": 1}, "", "empty prompt"),
    ],
)
def test_rows_that_teach_nothing(row, use, why):
    [read] = read_back(jsonl([row]))
    assert preferences.reason(read, use) == why


# --- columns


ANSWERS = {"chosen": "The capital is Rome.", "rejected": "The capital is Bonn."}


@pytest.mark.parametrize("column", ["prompt", "instruction", "question", "query", "input"])
def test_the_question_is_read_from_the_column_that_asks(column):
    """It is not replaced by what both answers begin with."""
    row = {column: "Which capital?", **ANSWERS}
    expected = {"prompt": "Which capital?", "responses": ANSWERS}
    assert read_back(jsonl([row])) == [expected]


@pytest.mark.parametrize("column", ["prompt", "instruction", "question", "query", "input"])
def test_columns_may_ask_the_same(column):
    row = {"input": None, "prompt": "Which capital?", "source": "x", **ANSWERS}
    row[column] = "Which capital?"
    expected = {"prompt": "Which capital?", "responses": ANSWERS}
    assert read_back(jsonl([row])) == [expected]


WITH_SYSTEM = [system("Be kind."), user("hi")]


@pytest.mark.parametrize(
    "column, prompt",
    [("system", "hi"), ("system_prompt", [user("hi")]), ("system", WITH_SYSTEM)],
)
@pytest.mark.parametrize(
    "answers",
    [
        {"chosen": "a", "rejected": "b"},
        pytest.param(with_answers([user("hi")]), id="chats that repeat the prompt"),
    ],
)
def test_the_systems_words_are_a_turn(column, prompt, answers):
    row = {column: "Be kind.", "prompt": prompt, **answers}
    expected = {"prompt": WITH_SYSTEM, "responses": {"chosen": "a", "rejected": "b"}}
    assert read_back(jsonl([row])) == [expected]
    del row["chosen"], row["rejected"]
    [prompt_alone] = read_back(jsonl([row]))
    assert prompt_alone["prompt"] == WITH_SYSTEM


def test_an_empty_system_is_no_turn():
    [row] = read_back(jsonl([{"system": "", "prompt": "hi", **ANSWERS}]))
    assert row["prompt"] == "hi"


@pytest.mark.parametrize(
    "columns, says",
    [
        (
            {"instruction": "Translate.", "input": "Ciao"},
            "the columns instruction and input ask different things",
        ),
        ({"prompt": "Which?", "context": "A map."}, "the column context would be left out"),
        ({"prompt": "Which?", "tools": [{"name": "f"}]}, "the column tools would be left out"),
        (
            {"task": "Which?", "source": "x", "n": 3},
            "no column `prompt`, and nothing reads task: rename",
        ),
        ({"source_text": "Which?"}, "nothing reads source_text: rename"),
        ({"system": "Be kind."}, "a system's words without a prompt"),
        ({"system": "Be kind.", "prompt": [system("Be rude.")]}, "its turn in the prompt differ"),
        ({"prompt": "Which?", "rejected": 3}, "`rejected` is neither a text nor turns, but 3"),
        (
            {"prompt": "Which?", "chosen": {"from": "gpt", "value": "a"}, "rejected": []},
            "a turn is .*got .'from'",
        ),
    ],
)
def test_words_that_nothing_reads_are_refused(columns, says):
    message = rf"rows.jsonl: row 0 is not as trl\(\) expects it: .*{says}"
    with pytest.raises(ConfigError, match=message):
        read_back(jsonl([{**ANSWERS, **columns}]))


@pytest.mark.parametrize(
    "columns",
    [
        {"context": "A map."},
        {"tools": [{"name": "f"}]},
        {"task": "Which?", "source": "x", "n": 3},
        {"source_text": "Which?"},
    ],
)
def test_words_beside_a_prompt_alone_are_refused(columns):
    with pytest.raises(ConfigError, match=r"row 0 is not as asked\(\) expects it"):
        read_back(jsonl([{"prompt": "Which?", **columns}]))


SUMMARISE_CHATS = {name: [user("Summarise"), assistant(text)] for name, text in ANSWERS.items()}
SUMMARISE_DIALOGUES = {
    name: f"\n\nHuman: Summarise\n\nAssistant: {text}" for name, text in ANSWERS.items()
}


@pytest.mark.parametrize(
    "column, value",
    [
        ("article", "A long one."),
        ("passage", ["First.", "Second."]),
        ("post_1", {"title": "", "body": "Words."}),
        ("response_context", "Words."),
    ],
)
@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Summarise", **ANSWERS},
        {"prompt": [user("Summarise")], **ANSWERS},
        {"prompt": "Summarise"},
        {"prompt": "Summarise", **SUMMARISE_CHATS},
        SUMMARISE_CHATS,
        SUMMARISE_DIALOGUES,
    ],
    ids=["texts", "turns", "prompt alone", "prompt and chats", "chats", "dialogues"],
)
def test_an_article_beside_a_prompt_is_refused_and_not_left_out(row, column, value):
    """A model was trained to answer "Summarise" without what it should summarise."""
    message = f"the column {column} would be left out: put it into the prompt"
    with pytest.raises(ConfigError, match=message):
        read_back(jsonl([{**row, column: value}]))


def test_an_empty_article_beside_a_prompt_is_none():
    row = {"prompt": "Summarise", "article": None, **ANSWERS}
    first, second = read_back(jsonl([row, {**row, "article": " "}]))
    assert first["prompt"] == second["prompt"] == "Summarise"


def test_columns_about_a_row_are_none_that_ask():
    about = {
        "id": "7",
        "source": "web",
        "chosen-model": "a",
        "score_rejected": "3",
        "question_type": "b",
        "n": 4,
    }
    row = {"chosen": "The sky is blue.", "rejected": "The sky is black.", **about}
    [read] = read_back(jsonl([row]))
    assert read["prompt"] == "The sky is"


def test_marks_beside_a_prompt_are_no_words():
    row = {
        "prompt": "The sky is",
        "safe": True,
        "all_rm_scores": [0.1],
        "embedding": [[0.5]],
        "marks": {"help": 4},
        **ANSWERS,
    }
    [read] = read_back(jsonl([row]))
    assert read["prompt"] == "The sky is"


BESIDE_A_PROMPT = {  # other answers, chats and marks, as public data sets have them
    "UltraFeedback": {
        "prompt_id": "ab",
        "messages": [user("a"), assistant("b")],
        "score_chosen": 8.0,
    },
    "of a rater": {
        "source": "x",
        "chosen-rating": 5.0,
        "chosen-model": "m",
        "rejected-rating": 1.0,
    },
    "ArmoRM": {
        "prompt_id": "ab",
        "all_generated_responses": ["b", "c"],
        "all_rm_scores": [0.2, 0.1],
    },
    "PKU-SafeRLHF": {
        "prompt_source": "Alpaca",
        "response_0": "b",
        "response_1": "c",
        "response_0_source": "m",
        "is_response_0_safe": True,
        "response_0_harm_category": {"Theft": False},
        "better_response_id": 1,
        "response_0_sha256": "0f",
    },
    "AlpacaEval": {"output": "b", "generator": "g", "dataset": "helpful_base"},
    "Orca pairs": {
        "generations": ["b", "c"],
        "order": ["chosen", "rejected"],
        "labelling_model": "m",
        "rating": [9.0, 1.0],
        "raw_labelling_response": "9 and 1",
        "rationale": "b is better.",
        "status": "tie",
        "original_chosen": "b",
    },
    "no_robots": {"prompt_id": "ab", "messages": [user("a"), assistant("b")], "category": "Coding"},
}


@pytest.mark.parametrize("name", BESIDE_A_PROMPT)
@pytest.mark.parametrize("answers", [ANSWERS, {}], ids=["a pair", "no pair"])
def test_other_answers_beside_a_prompt_are_no_text_to_read(name, answers):
    row = {"prompt": "Which capital?", **BESIDE_A_PROMPT[name], **answers}
    assert read_back(jsonl([row])) == [{"prompt": "Which capital?", "responses": answers}]


@pytest.mark.parametrize(
    "prompt, turns, whole",
    [
        (TURNS[:2], [user("How?")], TURNS),
        ([system("Be kind.")], [user("How?")], [system("Be kind."), user("How?")]),
        (TURNS, TURNS, TURNS),
        (TURNS, [user("How? ")], TURNS),
        ([user("Why?")], TURNS, TURNS),
        ("Why?", TURNS, TURNS),
        ("How?", [system("Be kind."), user("How?")], [system("Be kind."), user("How?")]),
        (user("How?"), [], [user("How?")]),
        ([user("How?")], [system("Be kind."), user("How?")], [system("Be kind."), user("How?")]),
        ([user("How?")], TURNS, TURNS),
        ([system("Be kind."), user("How?")], TURNS, [system("Be kind."), *TURNS]),
        ([user("How?")], [assistant("Hello!"), user("How?")], [assistant("Hello!"), user("How?")]),
        (TURNS[:2], TURNS[1:], TURNS),
        (TURNS[:2], [user("Why?")], [*TURNS[:2], user("Why?")]),
    ],
)
def test_turns_before_the_chosen_are_kept_once(prompt, turns, whole):
    """An explicit prompt is what stands before the answers, also if these begin with the user."""
    row = {"prompt": prompt, **with_answers(turns)}
    expected = {"prompt": whole, "responses": {"chosen": "a", "rejected": "b"}}
    assert read_back(jsonl([row])) == [expected]


@pytest.mark.parametrize(
    "prompt, turns",
    [
        pytest.param("Why?", [user("How?")], id="another question"),
        pytest.param([user("Why?")], [user("How?")], id="another question in turns"),
        pytest.param(
            TURNS, [TURNS[0], assistant("Perhaps."), TURNS[2]], id="another answer before it"
        ),
        pytest.param(
            [system("Be kind."), user("How?")],
            [system("Be rude."), user("How?")],
            id="another system",
        ),
    ],
)
def test_a_prompt_that_its_chat_does_not_hold_drops(prompt, turns):
    row = {"prompt": prompt, **with_answers(turns)}
    assert read_back(jsonl([row])) == ["the chat does not hold the prompt"]


def test_a_dialogue_with_words_before_its_first_turn_drops():
    chosen = "Be kind.\n\nHuman: Why?\n\nAssistant: a"
    rejected = "Be kind.\n\nHuman: Why?\n\nAssistant: b"
    reason = preferences.hh({"chosen": chosen, "rejected": rejected})
    assert reason == "words before the first turn"


def test_fields_of_other_turns_do_not_stay():
    """Through Arrow every turn has the fields of all turns, as None."""
    prompt = [user("Why?") | {"name": "bob"}, user("How?")]
    [row] = read_back(parquet([{"prompt": prompt, **with_answers([])}]))
    assert row["prompt"] == prompt


def test_wrong_columns_name_all_schemas():
    message = r"rows.jsonl: has the columns \(question, answer\), expected are .*\(chosen, "
    with pytest.raises(ConfigError, match=message):
        read_back(jsonl([{"question": "a", "answer": "b"}]))


def test_wrong_columns_of_a_known_data_set_name_its_schema(tmp_path):
    (tmp_path / "stanfordnlp" / "SHP").mkdir(parents=True)  # a copy of the hub's
    parquet([{"history": "a", "human_ref_A": "b", "label": 1}], "stanfordnlp/SHP/train.parquet")
    message = (
        r"has the columns \(history, human_ref_A, label\), expected are \(history, human_ref_A, "
        r"human_ref_B, labels\)$"
    )
    with pytest.raises(ConfigError, match=message):
        read_back("stanfordnlp/SHP")


@pytest.mark.parametrize(
    "wrong",
    [
        {"prompt": 3},
        {"chosen": 3},
        {"chosen": [{"from": "gpt"}], "rejected": [{"from": "gpt"}]},
    ],
)
def test_a_bad_row_is_named(wrong):
    good = {"prompt": "a", "chosen": "b", "rejected": "c"}
    with pytest.raises(ConfigError, match=r"rows.jsonl: row 1 is not as trl\(\) expects it"):
        read_back(jsonl([good, {**good, **wrong}]))


def test_an_answer_with_its_system_turn_is_no_quadruple():
    """Two turns against one were taken for WRPO's two chosen responses, the system's for one."""
    row = {"prompt": [user("a")], "rejected": [assistant("c")]}
    row["chosen"] = [system("be kind"), assistant("b")]
    assert preferences.trl(row) == {"prompt": [user("a")], "responses": {}}, "no pair"


def test_a_quintuple_is_no_quadruple():
    row = {"prompt": [user("a")], "chosen": ["b", "c", "d"], "rejected": ["e", "f"]}
    with pytest.raises(ConfigError, match="row 0 is not as trl"):
        read_back(jsonl([row]))


@pytest.mark.parametrize(
    "name, content, message",
    [
        (
            "cut.jsonl",
            b'{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": "a", "cho',
            ".*JSON parse error: .* in row 1",
        ),
        ("empty.jsonl", b"", ""),
        ("half.parquet", b"PAR1 and no more", ""),
    ],
)
def test_files_that_cannot_be_read(name, content, message):
    Path(name).write_bytes(content)
    with pytest.raises(ConfigError, match=f"{name}: cannot be read: {message}"):
        read_back(name)


def test_an_unknown_split_is_refused():
    file = jsonl([{"prompt": "a"}])
    with pytest.raises(ConfigError, match='cannot be read: .*Unknown split "test"'):
        read_back(f"{file}:test")


def test_a_file_that_is_gone_is_refused():
    with pytest.raises(assets.AssetError, match="no such folder or file"):
        corpus.source("./gone.jsonl")


AS_PEOPLE_HAVE_THEM = {
    "array.json": lambda text: f"[{text.strip()}]".replace("}\n{", "},{").encode(),
    "bom.jsonl": lambda text: b"\xef\xbb\xbf" + text.encode(),
    "crlf.jsonl": lambda text: text.replace("\n", "\r\n\r\n").encode(),
    "zip.jsonl.gz": lambda text: gzip.compress(text.encode()),
    "RAW.JSONL": lambda text: text.encode(),
}


@pytest.mark.parametrize("name", AS_PEOPLE_HAVE_THEM)
def test_files_as_people_have_them_are_read(name):
    rows = [{"prompt": f"a\u2028b {i} é", "chosen": "b", "rejected": "c"} for i in range(2)]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    encode = AS_PEOPLE_HAVE_THEM[name]
    Path(name).write_bytes(encode(text))
    prompts = [row["prompt"] for row in read_back(name)]
    assert prompts == [row["prompt"] for row in rows]


def test_the_ending_of_a_parquet_file_may_be_in_capitals():
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c"}] * 2
    assert len(read_back(parquet(rows, "RAW.PARQUET"))) == 2


LINE = '{"prompt": "é", "chosen": "a", "rejected": "b"}\n'
GZIPPED = gzip.compress(LINE.encode() * 99)
BREAKING = {
    "latin.jsonl": LINE.encode("latin-1"),
    "utf16.jsonl": LINE.encode("utf-16"),
    "early.jsonl.gz": GZIPPED[:-20],
    "no.zip": b"PK\x03\x04 and no more",
    "table.csv": b"prompt,chosen,rejected\na,b,c\n",
}


@pytest.mark.parametrize("name", BREAKING)
def test_files_that_break_at_a_row_are_refused_by_name(name):
    Path(name).write_bytes(BREAKING[name])
    with pytest.raises(ConfigError, match=f"{name}: cannot be read"):
        read_back(name)


def test_a_copy_of_the_hub_has_its_splits(tmp_path):
    """As HuggingFaceH4/ultrafeedback_binarized declares them; test_gen is read for its prompts."""
    ref = "HuggingFaceH4/ultrafeedback_binarized"
    data = tmp_path / ref / "data"
    data.mkdir(parents=True)
    splits = ""
    for name in ("train_prefs", "test_gen"):
        splits += f"  - split: {name}\n    path: data/{name}-*\n"
    (tmp_path / ref / "README.md").write_text(
        f"---\nconfigs:\n- config_name: default\n  data_files:\n{splits}---\n"
    )
    record, row = CASES["ultrafeedback"]
    unanswered = {"chosen": [user("How?")], "rejected": [], "messages": [user("How?")]}
    parquet([record], str(data / "train_prefs-00000-of-00001.parquet"))
    parquet([{**record, **unanswered}], str(data / "test_gen-00000-of-00001.parquet"))
    assert read_back(ref) == [row]
    assert read_back(f"{ref}:test_gen") == [{"prompt": [user("How?")], "responses": {}}]
    assert preferences.place(f"{ref}:test_gen") == (ref, "test_gen")
    with pytest.raises(ConfigError, match="cannot be read: .*test_sft"):
        read_back(f"{ref}:test_sft")


def test_a_data_set_on_the_hub_is_known_by_its_id():
    commit = "0" * 40
    ref = f"org/name@{commit}:test"
    assert preferences.place("org/name") == ("datasets:org/name", "")
    assert preferences.place(ref) == (f"datasets:org/name@{commit}", "test")
    assert corpus.source(ref) == [{"repo": "org/name", "commit": commit}, "test"]


def test_a_file_is_known_by_its_content():
    name = jsonl([{"prompt": "a"}], "with:colon.jsonl")
    other = jsonl([{"prompt": "b"}], "b.jsonl")
    assert preferences.place(name) == (name, "")
    assert corpus.source(name) == [assets.resolve(name)]
    assert corpus.source(name) != corpus.source(other)


def test_alpaca_eval_has_its_805_prompts():
    if not (paths.CACHE / assets.ASSETS["llm_eval"].file).is_file():
        pytest.skip("the archive is fetched when a run asks for it")
    rows = read_back("alpaca_eval")
    assert len(rows) == 805
    assert len({row["prompt"] for row in rows}) == 805
    assert not any(preferences.reason(row) for row in rows)
    assert corpus.source("alpaca_eval") == [assets.resolve("llm_eval")]


def test_the_order_is_random_and_always_the_same():
    name = jsonl([{"prompt": str(i)} for i in range(50)])
    order = [number for number, _ in preferences.read(name)]
    again = [number for number, _ in preferences.read(name)]
    assert order == again
    assert order != list(range(50))
    assert sorted(order) == list(range(50))


def test_the_order_of_a_stream_is_random():
    prompts = [str(i) for i in range(50)]
    name = jsonl([{"prompt": prompt} for prompt in prompts])
    streamed = [row["prompt"] for _, row in preferences.read(name, streaming=True)]
    assert streamed != prompts
    assert sorted(streamed, key=int) == prompts


def test_a_dialogue_is_the_text_that_hh_publishes(tiny):
    """Its tokens are those of the text; a reward model may still read its turns."""
    tokenizer = templates.load_tokenizer(tiny)
    record, _ = CASES["hh"]
    row = preferences.hh(record)
    assert preferences.dialogue(row["prompt"]) + " I see." == record["chosen"]
    plain = dataclasses.replace(SMOKE.world, template="plain")
    prompt = preferences.prompt_row(tokenizer, row, plain, random.Random(0))
    responses = preferences.encoded_responses(tokenizer, prompt, row, plain)
    text = tokenizer.decode(prompt["prompt_ids"] + responses["chosen"])
    assert text == f"<s>{record['chosen']}</s>"
    assert prompt["text"] == TURNS


def test_a_dialogue_in_a_chat_is_its_turns(tiny):
    """What another model is asked is a text."""
    tokenizer = templates.load_tokenizer(tiny)
    record, _ = CASES["hh"]
    chat = dataclasses.replace(SMOKE.world, template="chat")
    prompt = preferences.prompt_row(tokenizer, preferences.hh(record), chat, random.Random(0))
    turns = "<|user|> Why?</s><|assistant|> Because.</s><|user|> How?</s><|assistant|>"
    assert tokenizer.decode(prompt["prompt_ids"]) == f"<s>{turns}"
    assert prompt["text"] == TURNS
    assert sources._wording(prompt, tokenizer) == preferences.dialogue(TURNS)


# --- the split

SMOKE = config.load("expo", "smoke")
WRPO = config.load("wrpo", "smoke")


def world(dataset, **changes):
    settings = {
        "dataset": dataset,
        "template": "chat",
        "pairs": "given",
        "gold_rows": 0,
        "reward_rows": 0,
        "prompt_tokens": (1, 64),
        "sft_rows": 0,
        "prompts": 12,
        "dev_prompts": 4,
        "test_prompts": 4,
        **changes,
    }
    return dataclasses.replace(SMOKE.world, **settings)


def pairs(n, **changes):
    rows = []
    for i in range(n):
        row = {"prompt": f"What is {i}?", "chosen": f"It is {i}.", "rejected": "No."}
        rows.append({**row, **changes})
    return rows


LONG = " ".join(["long"] * 90)


class Split(NamedTuple):
    """What preferences.split() returns and what it writes."""

    facts: dict
    train: list  # prompts
    dev: list
    test: list
    pairs: list
    sft: list
    held_out: list  # texts, labels


def split(world, tmp_path):
    out = tmp_path / "out"
    out.mkdir(exist_ok=True)
    facts = preferences.split(world, out)
    names = ("prompts", "dev_prompts", "test_prompts", "labelled")
    train, dev, test, labelled = [json.loads((out / f"{name}.json").read_text()) for name in names]
    assert labelled["gold"] == labelled["reward"] == [[], []]
    pairs = read_rows(out / "pairs.jsonl") if world.pairs == "given" else []
    sft = read_rows(out / "sft.jsonl")
    return Split(facts, train, dev, test, pairs, sft, labelled["held_out"])


def texts_of(prompts):
    return [row["text"] for row in prompts]


@pytest.fixture
def repeating():
    """Write 31 rows: a pair of each of 20 prompts, a second one of 10, and one with equal answers.

    One prompt is long.
    """
    rows = pairs(20) + pairs(10, rejected="Other.") + pairs(1, rejected="It is 0.")
    rows[19]["prompt"] = LONG
    return jsonl(rows)


def test_a_split_shares_no_prompt(repeating, tmp_path, tiny):
    drawn = split(world(repeating, prompts=23), tmp_path)
    judged = {*texts_of(drawn.dev), *texts_of(drawn.test)}
    assert len(judged) == 8
    assert drawn.train == []
    assert drawn.held_out == [[], []]
    tokenizer = templates.load_tokenizer(tiny)
    trained = [tokenizer.decode(row["prompt_ids"]) for row in drawn.pairs]
    assert trained
    for text in judged:
        assert not any(f"> {text}</s>" in prompt for prompt in trained)


def test_a_split_uses_or_counts_every_row(repeating, tmp_path):
    drawn = split(world(repeating, prompts=23), tmp_path)
    dropped = drawn.facts["dropped"]
    assert dropped.keys() <= {
        "equal responses",
        "repeated prompt",
        "prompt above world.prompt_tokens",
    }
    assert drawn.facts["pairs"] == len(drawn.pairs)
    assert 8 + len(drawn.pairs) + sum(dropped.values()) == 31


def test_sft_learns_the_first_response_of_given_pairs(repeating, tmp_path, tiny):
    drawn = split(world(repeating, prompts=23, sft_rows=5), tmp_path)
    assert len(drawn.sft) == drawn.facts["sft_rows"] == 5
    first = drawn.pairs[0]
    chosen = first["responses"]["chosen"]
    assert first["responses"].keys() == {"chosen", "rejected"}
    assert chosen[-1] == templates.load_tokenizer(tiny).eos_token_id
    assert drawn.sft[0] == {**first, "responses": {"chosen": chosen}}


def test_prompts_of_given_pairs_may_be_long(repeating, tmp_path):
    """The training cuts them."""
    drawn = split(world(repeating, prompts=31, dev_prompts=0, test_prompts=0), tmp_path)
    lengths = [len(row["prompt_ids"]) for row in drawn.pairs]
    assert len(lengths) == 30
    assert max(lengths) > 64


def with_template(tiny, folder, template):
    """Copy the tiny model, with another chat template."""
    import transformers

    shutil.copytree(tiny, folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return str(folder)


REFUSED = "the chat template refuses it (System role not supported)"


@pytest.fixture
def strict(tmp_path, tiny):
    """Return a model whose template takes no system turn, as Gemma's."""
    refusal = "{{ raise_exception('System role not supported') }}"
    template = "{% if messages[0].role == 'system' %}" + refusal + "{% endif %}"
    return with_template(tiny, tmp_path / "strict", template + assets.CHAT_TEMPLATE)


@pytest.fixture
def some_with_system():
    """Write 30 pairs, of which every third has a system turn."""
    rows = pairs(30)
    for i, row in enumerate(rows):
        row["prompt"] = [user(row["prompt"])]
        if i % 3 == 0:
            row["prompt"].insert(0, system("Be kind."))
    return jsonl(rows)


def test_rows_that_a_template_refuses_drop_and_are_counted(some_with_system, tmp_path, strict):
    drawn = split(world(some_with_system, target=strict, prompts=22), tmp_path)
    assert drawn.facts["dropped"] == {REFUSED: 10}
    assert len(drawn.pairs) == 12
    assert len(drawn.dev) == len(drawn.test) == 4


def test_prompts_from_elsewhere_that_a_template_refuses_drop(some_with_system, strict):
    tokenizer = templates.load_tokenizer(strict)
    drawn, dropped = preferences.prompts(
        some_with_system, world(some_with_system), tokenizer, most=99
    )
    assert len(drawn) == 20
    assert dropped == {REFUSED: 10}


def test_a_data_set_that_a_template_refuses_whole_is_refused(tmp_path, strict):
    rows = pairs(9, prompt=[system("Be kind."), user("a")])
    message = "rows.jsonl: 0 of 4 test rows; dropped: .*System role not supported.*: 9"
    with pytest.raises(ConfigError, match=message):
        split(world(jsonl(rows), target=strict), tmp_path)


@pytest.fixture
def some_end_in_a_blank():
    """Write 10 pairs, and again with a prompt that ends in a blank.

    The tokenizer joins that blank with the next word.
    """
    rows = pairs(10, chosen="the end.")
    rows += [{**row, "prompt": row["prompt"] + " "} for row in rows]
    return jsonl(rows)


def test_responses_that_share_a_token_with_their_prompt_drop_and_are_counted(
    some_end_in_a_blank, tmp_path, tiny
):
    sizes = {"prompts": 20, "dev_prompts": 0, "test_prompts": 0}
    drawn = split(world(some_end_in_a_blank, template="plain", **sizes), tmp_path)
    assert drawn.facts["dropped"] == {templates.JOINED: 10}
    assert len(drawn.pairs) == drawn.facts["pairs"] == 10
    tokenizer = templates.load_tokenizer(tiny)
    for row in drawn.pairs:
        ids = row["prompt_ids"] + row["responses"]["chosen"][:-1]
        text = tokenizer.decode(ids[1:])
        assert ids == tokenizer(text)["input_ids"]


def test_a_template_that_ends_in_a_blank_leaves_no_row(some_end_in_a_blank, tmp_path, tiny):
    template = assets.CHAT_TEMPLATE.replace("'<|assistant|>'", "'<|assistant|> '")
    blank = with_template(tiny, tmp_path / "blank", template)
    with pytest.raises(ConfigError, match=f"0 of 12 train rows; dropped: .*{templates.JOINED}"):
        split(world(some_end_in_a_blank, target=blank), tmp_path)


def question_and_answer(text):
    """Return what the user says and what the assistant answers, of the tiny model's chat."""
    match = re.fullmatch(r"<s><\|user\|> (.*)</s><\|assistant\|> (.*)</s>", text)
    return match.groups()


def test_given_responses_are_as_the_template_has_them(tmp_path, tiny):
    drawn = split(world(jsonl(pairs(20))), tmp_path)
    assert len(drawn.pairs) == 12
    assert drawn.facts["dropped"] == {}
    tokenizer = templates.load_tokenizer(tiny)
    for row in drawn.pairs:
        for response_ids in row["responses"].values():
            ids = row["prompt_ids"] + response_ids
            question, answer = question_and_answer(tokenizer.decode(ids))
            chat = [user(question), assistant(answer)]
            assert ids == tokenizer.apply_chat_template(chat, return_dict=False)


@pytest.fixture
def some_repeated():
    """Write 16 pairs: of 12 prompts, of 3 of them again, and of a long one."""
    return jsonl([*pairs(12), *pairs(3), *pairs(1, prompt=LONG)])


def test_prompts_to_sample_for_are_whole_and_different(some_repeated, tmp_path, tiny):
    drawn = split(world(some_repeated, pairs="sampled", prompts=8), tmp_path)
    texts = texts_of(drawn.train + drawn.dev + drawn.test)
    assert len(set(texts)) == len(texts)
    assert len(texts) == 16 - sum(drawn.facts["dropped"].values())
    tokenizer = templates.load_tokenizer(tiny)
    for row in drawn.train:
        assert row["prompt_ids"] == templates.render(tokenizer, row["text"], "chat")


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"pairs": "sampled", "prompts": 8, "dev_prompts": 6},
            r"rows.jsonl: \d of 8 train rows; dropped: .*repeated prompt",
        ),
        (
            {"prompt_tokens": (4, 10)},
            r"0 of 4 test rows; dropped: .'prompt above world.prompt_tokens': 16",
        ),
    ],
)
def test_a_data_set_that_is_too_small_is_refused(some_repeated, changes, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        split(world(some_repeated, **changes), tmp_path)


def test_dev_and_test_prompts_of_their_own(tmp_path):
    """The pairs may name prompts of the test set: those pairs drop."""
    test = jsonl([{"instruction": f"What is  {i}?"} for i in range(4)], "test.jsonl")
    dev = jsonl([{"prompt": f"And {i}?"} for i in range(4)], "dev.jsonl")
    drawn = split(world(jsonl(pairs(12)), dev_dataset=dev, test_dataset=test), tmp_path)
    assert set(texts_of(drawn.test)) == {f"What is  {i}?" for i in range(4)}
    assert set(texts_of(drawn.dev)) == {f"And {i}?" for i in range(4)}
    assert drawn.facts == {
        "sft_rows": 0,
        "pairs": 8,
        "held_out": 0,
        "dropped": {"repeated prompt": 4},
    }


class Reviews(NamedTuple):
    """A split of reviews as stanfordnlp/imdb has them, and the files that they are in."""

    train_file: str
    test_file: str
    drawn: Split
    labels: dict  # of all reviews, by text


@pytest.fixture
def of_reviews(tmp_path):
    """Draw SFT rows and prompts from training reviews; dev, test and labels from other reviews.

    Three of the training reviews are among the others too.
    """
    rows = reviews()
    train = jsonl(rows[:60], "train.jsonl")
    test = jsonl(rows[60:] + rows[:3], "test.jsonl")
    settings = world(
        train,
        dev_dataset=test,
        test_dataset=test,
        template="plain",
        pairs="sampled",
        prompt_tokens=(2, 8),
        sft_tokens=64,
        sft_rows=30,
        prompts=20,
    )
    labels = {row["text"]: row["label"] for row in rows}
    return Reviews(train, test, split(settings, tmp_path), labels)


def test_reviews_are_cut_to_beginnings(of_reviews):
    drawn = of_reviews.drawn
    for prompts in (drawn.train, drawn.dev, drawn.test):
        assert prompts
        for row in prompts:
            assert 2 <= len(row["prompt_ids"]) <= 8
            assert "text" not in row


def test_sft_learns_whole_sentences_of_reviews(of_reviews, tiny):
    rows = of_reviews.drawn.sft
    assert 0 < len(rows) <= 30
    assert len(rows) == of_reviews.drawn.facts["sft_rows"]
    tokenizer = templates.load_tokenizer(tiny)
    for row in rows:
        ids = row["prompt_ids"] + row["responses"]["chosen"]
        text = tokenizer.decode(ids, skip_special_tokens=True)
        assert text.endswith((".", "!", "?"))
        assert any(review.startswith(text) for review in of_reviews.labels)


def test_a_reward_is_measured_on_reviews_that_nothing_else_uses(of_reviews):
    texts, labels = of_reviews.drawn.held_out
    assert len(texts) == of_reviews.drawn.facts["held_out"] > 20
    in_test = [row["text"] for _, row in preferences.read(of_reviews.test_file)]
    judged = in_test[:8]
    in_train = [row["text"] for _, row in preferences.read(of_reviews.train_file)]
    trained = [text for text in in_train if text not in judged][:30]
    unused = [text for text in in_test[8:] if text not in trained]
    assert texts == [" ".join(text.split()[:32]) for text in unused]
    assert labels == [of_reviews.labels[text] for text in unused]


def test_no_reward_is_trained_on_a_users_reviews(tmp_path):
    train = jsonl(reviews()[:60], "train.jsonl")
    with pytest.raises(ConfigError, match="no reward is trained on train.jsonl"):
        split(world(train, gold_rows=1), tmp_path)


@pytest.mark.parametrize(
    "changes",
    [{"pairs": "given"}, {"dev_dataset": "alpaca_eval"}, {"test_dataset": "org/name"}],
)
def test_reviews_that_come_with_us_have_no_pairs_to_give(changes, tmp_path):
    message = "fixtures holds reviews: its pairs are sampled, its prompts its own"
    with pytest.raises(ConfigError, match=message):
        corpus.split(dataclasses.replace(SMOKE.world, **changes), tmp_path)


def test_reviews_in_a_chat_are_asked_whole(store):
    """The template stands around the beginning of a review, it is not cut with it."""
    cfg = dataclasses.replace(SMOKE.world, template="chat")
    tokenizer = templates.load_tokenizer(assets.model_dir("tiny"))
    for row in stages.texts(cfg).json("test_prompts.json"):
        assert tokenizer.decode(row["prompt_ids"]) == f"<s><|user|> {row['text']}</s><|assistant|>"
        assert 3 <= len(tokenizer(row["text"])["input_ids"]) <= 12


def test_prompts_from_elsewhere(store):
    record, _ = CASES["shp, A"]
    rows = [{**record, "history": f"Post {i // 2}"} for i in range(20)]
    cfg = config.load("mallows", "smoke", world__prompt_tokens=[1, 64], elsewhere_prompts=8)
    prompts = mallows.elsewhere(cfg, jsonl(rows)).json("rows.jsonl.json")
    posts = [row["text"][0]["content"] for row in prompts]
    assert len(posts) == 8
    assert len(set(posts)) == 8
    decode = templates.load_tokenizer(assets.model_dir("tiny")).decode
    text = decode(prompts[0]["prompt_ids"])
    assert text == f"<s>\n\nHuman: {posts[0]}\n\nAssistant:"


def test_too_few_prompts_from_elsewhere_are_refused(store):
    name = jsonl([{"prompt": f"Post {i // 2}"} for i in range(20)])
    cfg = config.load("mallows", "smoke", world__prompt_tokens=[1, 64], elsewhere_prompts=11)
    message = "elsewhere_prompts=11, but rows.jsonl has only 10; dropped: {'repeated prompt': 10}"
    with pytest.raises(ConfigError, match=message):
        mallows.elsewhere(cfg, name).get()


def test_rows_of_prompts_from_elsewhere_that_drop_are_counted(store):
    """They were passed over in silence: eight repeat a prompt, one is too long, two are empty."""
    rows = [{"prompt": f"What is {i}?"} for i in range(8)] * 2
    rows += [{"prompt": LONG}, {"prompt": " "}, {"prompt": None}]
    name = jsonl(rows)
    cfg = config.load("mallows", "smoke", world__prompt_tokens=[1, 64], elsewhere_prompts=8)
    tokenizer = templates.load_tokenizer(assets.model_dir("tiny"))
    drawn, dropped = preferences.prompts(name, cfg.world, tokenizer, most=99)
    assert len(drawn) == 8
    assert dropped == {
        "repeated prompt": 8,
        "prompt above world.prompt_tokens": 1,
        "no question": 2,
    }
    facts = mallows.elsewhere(cfg, name).manifest["facts"]
    assert facts["dropped"].keys() <= dropped.keys()


def continues_a_review(question, answer):
    """Return whether a review begins with a question and, maybe after a blank, an answer."""
    beginnings = (f"{question} {answer}", f"{question}{answer}")
    return any(review["text"].startswith(beginnings) for review in reviews())


def test_reviews_go_on_as_an_answer_in_a_chat(store, tmp_path, tiny):
    """What SFT learns there is how a review goes on, not the rest of the user's turn."""
    embedded = stages.texts(dataclasses.replace(SMOKE.world, template="chat"))
    sizes = {"sft_rows": 20, "sft_tokens": 64, "test_prompts": 2, "dev_prompts": 2}
    own = world(jsonl(reviews()), pairs="sampled", prompt_tokens=(2, 8), **sizes)
    tokenizer = templates.load_tokenizer(tiny)
    for rows in (read_rows(embedded.get() / "sft.jsonl"), split(own, tmp_path).sft):
        assert len(rows) > 10
        for row in rows:
            text = tokenizer.decode(row["prompt_ids"] + row["responses"]["chosen"])
            question, answer = question_and_answer(text)
            assert continues_a_review(question, answer)


def test_texts_from_elsewhere_are_asked_whole_in_a_chat(store):
    cfg = config.load("mallows", "smoke", world__template="chat")
    decode = templates.load_tokenizer(assets.model_dir("tiny")).decode
    rows = mallows.elsewhere(cfg, "fixtures").json("fixtures.json")
    assert len(rows) == cfg.elsewhere_prompts
    for row in rows:
        assert decode(row["prompt_ids"]) == f"<s><|user|> {row['text']}</s><|assistant|>"


# --- the pipeline


def test_new_settings_are_in_a_key_only_where_they_are_set():
    plain = stages.texts(SMOKE.world)
    assert not {"pairs", "dev_dataset", "test_dataset"} & plain.inputs.keys()


def test_settings_and_content_of_a_data_set_are_in_its_key():
    name = jsonl(pairs(20))
    keys = {
        stages.texts(world(name)).key,
        stages.texts(world(name, pairs="sampled")).key,
        stages.texts(world(name, test_dataset=name)).key,
    }
    assert len(keys) == 3
    jsonl(pairs(21))
    assert stages.texts(world(name)).key not in keys


DATED = "{{ strftime_now('%d %b %Y') }}" + assets.CHAT_TEMPLATE


@pytest.fixture
def dated(tmp_path, tiny):
    """Return a model whose chat template writes today's date."""
    return with_template(tiny, tmp_path / "dated", DATED)


@pytest.fixture
def undated(tmp_path, tiny):
    return with_template(tiny, tmp_path / "undated", assets.CHAT_TEMPLATE)


def test_a_date_is_in_the_key_only_where_a_template_writes_it(dated, undated):
    name = jsonl(pairs(20))
    assert stages.texts(world(name, target=dated)).inputs["date"] == "2024-07-26"
    for changes in ({"target": dated, "template": "plain"}, {"target": undated}, {}):
        assert "date" not in stages.texts(world(name, **changes)).inputs


def test_a_date_is_in_the_key_of_what_a_chat_model_is_asked(dated):
    chat = config.Source(kind="model", ref=dated, ask="{prompt}")
    plain = config.Source(kind="model", ref=dated)
    asked = sources.Asked(stages.texts(WRPO.world), "prompts")
    assert sources._put(WRPO, chat, asked).inputs["date"] == "2024-07-26"
    assert "date" not in sources._put(WRPO, plain, asked).inputs


def test_present_keys_hold_no_date():
    texts = stages.texts(SMOKE.world).inputs
    asked = sources.Asked(stages.texts(WRPO.world), "prompts")
    prompts = sources._put(WRPO, WRPO.known_sources["chat"], asked).inputs
    for inputs in (texts, prompts):
        assert not {"date", "tokens"} & inputs.keys()


def scores_inputs(judges=("reward",), **changes):
    """Return the inputs of the scores of SFT responses, in the smoke world with changes."""
    changed = dataclasses.replace(SMOKE.world, **changes)
    cfg = dataclasses.replace(SMOKE, world=changed)
    weights = stages.Weights(stages.sft(cfg))
    responses = stages.responses(cfg, weights, "dev_prompts", samples=1, seed=2)
    return stages.scores(cfg, responses, "dev_prompts", judges=judges).inputs


def test_the_date_that_a_reward_models_template_writes_is_in_the_key_of_its_scores(dated, undated):
    """Its own template counts: the same responses had other rewards on another day."""
    assert scores_inputs(reward_model=dated, reward_rows=0)["date"] == "2024-07-26"
    assert "date" not in scores_inputs(reward_model=undated, reward_rows=0)
    assert "date" not in scores_inputs()


def test_a_reward_model_that_does_not_judge_adds_no_date(dated):
    inputs = scores_inputs(("gold", "vader"), reward_model=dated, reward_rows=0)
    assert "date" not in inputs


@pytest.mark.parametrize(
    "paper, experiment, profile",
    [
        ("expo", "", "paper"),
        ("expo", "hub", "gpu"),
        ("wrpo", "", "paper"),
        ("mallows", "", "paper"),
        ("mallows", "llama3", "paper"),
        ("mallows", "hh", "paper"),
    ],
)
def test_present_keys_with_a_finished_reward_model_stay(paper, experiment, profile, monkeypatch):
    """The profiles' own reward models write no date."""
    monkeypatch.setenv("COMPUTE", "plan")
    world = config.load(paper, profile, experiment).world
    assert not world.reward_rows
    assert world.reward_model in corpus.DATELESS


def test_whether_another_reward_model_on_the_hub_writes_a_date_is_not_known():
    assert corpus.rendering("org/reward", "chat") == {"date": "2024-07-26"}


@pytest.fixture
def paper_worlds(monkeypatch):
    """Return the worlds of all experiments at profile `paper`, by name."""
    monkeypatch.setenv("COMPUTE", "plan")
    return {
        "expo": config.load("expo", "paper").world,
        "wrpo": config.load("wrpo", "paper").world,
        "mallows": config.load("mallows", "paper").world,
        "llama3": config.load("mallows", "paper", "llama3").world,
        "hh": config.load("mallows", "paper", "hh").world,
    }


def test_paper_profiles_have_the_pairs_of_the_papers(paper_worlds):
    """ExPO: 61,135 given pairs, α on test_gen's 1,000; MallowsPO: given pairs."""
    world = paper_worlds["expo"]
    assert (world.pairs, world.prompts, world.dev_prompts) == ("given", 61135, 1000)
    assert world.dev_dataset == "HuggingFaceH4/ultrafeedback_binarized:test_gen"
    assert paper_worlds["hh"].pairs == "given"
    assert paper_worlds["llama3"].pairs == "given"
    assert paper_worlds["wrpo"].pairs == "sampled"


def test_paper_profiles_have_the_test_prompts_of_the_papers(paper_worlds):
    assert paper_worlds["hh"].test_dataset == "Anthropic/hh-rlhf:test"
    for name in ("expo", "llama3", "wrpo"):
        assert paper_worlds[name].test_dataset == "alpaca_eval"
        assert paper_worlds[name].test_prompts == 805


def test_paper_profiles_have_data_sets_of_their_own(paper_worlds):
    keys = {stages.texts(world).key for world in paper_worlds.values()}
    assert len(keys) == 5
    for world in paper_worlds.values():
        location, _ = preferences.place(world.dataset)
        assert location.removeprefix("datasets:") in preferences.HUB
        assert not world.trust_remote_code, "no repository's code runs"


def test_prompts_in_a_chat_have_a_key_of_their_own():
    keys = set()
    for template in ("plain", "chat"):
        cfg = config.load("expo", "smoke", world__template=template, world__sft_rows=0)
        line = expo.Line(stages.sft(cfg), stages.sft(cfg), (0.0,))
        responses = expo.said(cfg, {"one": line})
        keys |= {key for key in responses.upstream if key.startswith("own-prompts")}
    assert len(keys) == 2


def test_an_engine_of_other_end_tokens_has_another_identity(tmp_path, tiny):
    """Then a swap of weights is not enough: the tokenizer's settings say where sampling stops."""
    copy = tmp_path / "copy"
    shutil.copytree(tiny, copy)
    assert stages._identity(str(copy)) == stages._identity(str(tiny))
    file = copy / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    other = tmp_path / "other"
    shutil.copytree(tiny, other)
    (other / file.name).write_text(json.dumps({**settings, "eos_token": "<pad>"}))
    assert stages._identity(str(other)) != stages._identity(str(tiny))


@pytest.fixture
def reward_model(tmp_path):
    """Return the folder of a reward model that reads turns, with random weights."""
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    source = assets.model_dir("tiny")
    folder = tmp_path / "reward"
    shape = AutoConfig.from_pretrained(source, num_labels=1)
    AutoModelForSequenceClassification.from_config(shape).save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder


def rows_in(artifact, name):
    file = artifact.get() / name
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_users_file_trains_and_is_scored_in_turns(store, reward_model):
    """Given pairs -> reference -> DPO -> responses -> a reward model, on a file as TRL takes it."""
    settings = world(jsonl(pairs(20)), reward_model=str(reward_model))
    cfg = config.load(
        "expo",
        "smoke",
        world=dataclasses.asdict(settings),
        fractions=[1.0],
        alphas={1.0: [0, 1]},
        seeds=[0],
        fewer_seeds={},
    )
    assert len(rows_in(stages.pairs(cfg), "pairs.jsonl")) == 12

    trained = stages.aligned(cfg, 1.0).manifest["facts"]
    assert trained["first"]["loss"] == pytest.approx(0.6931, abs=2e-3), "DPO starts at ln 2"

    assert stages.oracle(cfg.world) == "reward"
    curves = expo.curves(cfg)
    table = curves.csv("responses.csv.gz")
    assert (table["gold"] == table["reward"]).all()
    facts = curves.json("facts.json")
    assert facts["pairs"]["pairs"] == 12
    assert facts["reward"] == {}

    weights = stages.Weights(stages.sft(cfg), stages.aligned(cfg, 1.0))
    responses = stages.responses(cfg, weights, "dev_prompts", samples=1, seed=2)
    prompts = stages.texts(cfg.world).json("dev_prompts.json")
    questions = {row["id"]: row["text"] for row in prompts}
    decode = templates.load_tokenizer(assets.model_dir("tiny")).decode
    chats = []
    for row in rows_in(responses, "responses.jsonl"):
        answer = decode(row["response_ids"], skip_special_tokens=True)
        chats.append([user(questions[row["id"]]), assistant(answer)])
    expected = rewards.Classifier(reward_model).score(chats)
    scores = rows_in(expo.point(cfg, 1.0, 0, 0.0, "dev_prompts"), "scores.jsonl")
    assert [row["reward"] for row in scores] == pytest.approx(expected, abs=1e-4)
    assert expected.std() > 0
