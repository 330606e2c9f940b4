"""Preference data on invented rows of the published schemas, written to files and read back through
`datasets`.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import random
import re
import shutil
from pathlib import Path

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


def found(ref):
    return [row for _, row in sorted(preferences.read(ref), key=lambda one: one[0])]


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
    row, wanted = CASES[name]
    assert found(write([row, row])) == [wanted, wanted]


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
    assert [preferences.reason(one, use) for one in found(jsonl([row]))] == [why]


# --- columns


ANSWERS = {"chosen": "The capital is Rome.", "rejected": "The capital is Bonn."}


@pytest.mark.parametrize("column", ["prompt", "instruction", "question", "query", "input"])
def test_the_question_is_read_from_the_column_that_asks(column):
    """It is not replaced by what both answers begin with."""
    row = {column: "Which capital?", **ANSWERS}
    assert found(jsonl([row])) == [{"prompt": "Which capital?", "responses": ANSWERS}]
    same = row | {
        "prompt": "Which capital?",
        "input": None if column != "input" else "Which capital?",
        "source": "x",
    }
    assert found(jsonl([same])) == [{"prompt": "Which capital?", "responses": ANSWERS}]


def test_the_systems_words_are_a_turn():
    whole = [system("Be kind."), user("hi")]
    for name, prompt in [("system", "hi"), ("system_prompt", [user("hi")]), ("system", whole)]:
        row = {name: "Be kind.", "prompt": prompt, "chosen": "a", "rejected": "b"}
        wanted = {"prompt": whole, "responses": {"chosen": "a", "rejected": "b"}}
        assert found(jsonl([row])) == [wanted]
        chat = row | {
            "chosen": [user("hi"), assistant("a")],
            "rejected": [user("hi"), assistant("b")],
        }
        assert found(jsonl([chat])) == [wanted], "the chats repeat the prompt"
        assert (
            found(jsonl([{name: "Be kind.", "prompt": prompt}]))[0]["prompt"] == wanted["prompt"]
        ), "prompts alone"
    assert found(jsonl([{"system": "", "prompt": "hi", **ANSWERS}]))[0]["prompt"] == "hi"


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
    with pytest.raises(
        ConfigError, match=rf"rows.jsonl: row 0 is not as trl\(\) expects it: .*{says}"
    ):
        found(jsonl([ANSWERS | columns]))
    alone = {"prompt": "Which?"} | {
        name: value for name, value in columns.items() if name not in ANSWERS
    }
    if {"context", "tools", "task", "source_text"} & columns.keys():
        with pytest.raises(ConfigError, match=r"row 0 is not as asked\(\) expects it"):
            found(jsonl([alone]))


@pytest.mark.parametrize(
    "column, value",
    [
        ("article", "A long one."),
        ("passage", ["First.", "Second."]),
        ("post_1", {"title": "", "body": "Words."}),
        ("response_context", "Words."),
    ],
)
def test_an_article_beside_a_prompt_is_refused_and_not_left_out(column, value):
    """A model was trained to answer "Summarise" without what it should summarise."""
    says = f"the column {column} would be left out: put it into the prompt"
    chats = {name: [user("Summarise"), assistant(text)] for name, text in ANSWERS.items()}
    dialogues = {
        name: f"\n\nHuman: Summarise\n\nAssistant: {text}" for name, text in ANSWERS.items()
    }
    for row in (
        {"prompt": "Summarise", **ANSWERS},
        {"prompt": [user("Summarise")], **ANSWERS},
        {"prompt": "Summarise"},
        {"prompt": "Summarise", **chats},
        chats,
        dialogues,
    ):
        with pytest.raises(ConfigError, match=says):
            found(jsonl([row | {column: value}]))
    empty = {"prompt": "Summarise", column: None, **ANSWERS}
    assert found(jsonl([empty, empty | {column: " "}]))[0]["prompt"] == "Summarise"


def test_columns_about_a_row_are_none_that_ask():
    about = {
        "id": "7",
        "source": "web",
        "chosen-model": "a",
        "score_rejected": "3",
        "question_type": "b",
        "n": 4,
    }
    row = {"chosen": "The sky is blue.", "rejected": "The sky is black."} | about
    assert found(jsonl([row]))[0]["prompt"] == "The sky is"
    more = {
        "prompt": "The sky is",
        "safe": True,
        "all_rm_scores": [0.1],
        "embedding": [[0.5]],
        "marks": {"help": 4},
    }
    assert found(jsonl([row | more]))[0]["prompt"] == "The sky is"


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
def test_other_answers_beside_a_prompt_are_no_text_to_read(name):
    for answers in (ANSWERS, {}):
        rows = [{"prompt": "Which capital?", **BESIDE_A_PROMPT[name], **answers}]
        assert found(jsonl(rows)) == [{"prompt": "Which capital?", "responses": answers}]


@pytest.mark.parametrize(
    "prompt, turns, wanted",
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
def test_turns_before_the_chosen_are_kept_once(prompt, turns, wanted):
    """An explicit prompt is what stands before the answers, also where these begin with a user's
    turn.
    """
    row = {
        "prompt": prompt,
        "chosen": [*turns, assistant("a")],
        "rejected": [*turns, assistant("b")],
    }
    assert found(jsonl([row])) == [
        {"prompt": wanted, "responses": {"chosen": "a", "rejected": "b"}}
    ]


def test_a_prompt_that_its_chat_does_not_hold_drops():
    row = {
        "prompt": "Why?",
        "chosen": [user("How?"), assistant("a")],
        "rejected": [user("How?"), assistant("b")],
    }
    assert found(jsonl([row])) == ["the chat does not hold the prompt"]
    other = [TURNS[0], assistant("Perhaps."), TURNS[2]]
    for prompt, turns in {
        "another question": ([user("Why?")], [user("How?")]),
        "another answer before it": (TURNS, other),
        "another system": ([system("Be kind."), user("How?")], [system("Be rude."), user("How?")]),
    }.values():
        row = {
            "prompt": prompt,
            "chosen": [*turns, assistant("a")],
            "rejected": [*turns, assistant("b")],
        }
        assert found(jsonl([row])) == ["the chat does not hold the prompt"]
    spoken = "Be kind.\n\nHuman: Why?\n\nAssistant: a"
    assert (
        preferences.hh({"chosen": spoken, "rejected": spoken[:-1] + "b"})
        == "words before the first turn"
    )


def test_fields_of_other_turns_do_not_stay(tmp_path):
    """Through Arrow every turn has the fields of all turns, as None."""
    rows = [
        {
            "prompt": [user("Why?") | {"name": "bob"}, user("How?")],
            "chosen": [assistant("a")],
            "rejected": [assistant("b")],
        }
    ]
    assert found(parquet(rows))[0]["prompt"] == [user("Why?") | {"name": "bob"}, user("How?")]


def test_wrong_columns_name_both_schemas(tmp_path):
    with pytest.raises(
        ConfigError,
        match=r"rows.jsonl: has the columns \(question, answer\), expected are .*\(chosen, ",
    ):
        found(jsonl([{"question": "a", "answer": "b"}]))
    (tmp_path / "stanfordnlp" / "SHP").mkdir(parents=True)
    parquet([{"history": "a", "human_ref_A": "b", "label": 1}], "stanfordnlp/SHP/train.parquet")
    message = (
        r"has the columns \(history, human_ref_A, label\), expected are \(history, human_ref_A, "
        r"human_ref_B, labels\)$"
    )
    with pytest.raises(ConfigError, match=message):
        found("stanfordnlp/SHP")  # a copy of the hub's


def test_a_bad_row_is_named():
    good = {"prompt": "a", "chosen": "b", "rejected": "c"}
    for bad in (
        {"prompt": 3},
        {"chosen": 3},
        {"chosen": [{"from": "gpt"}], "rejected": [{"from": "gpt"}]},
    ):
        with pytest.raises(ConfigError, match=r"rows.jsonl: row 1 is not as trl\(\) expects it"):
            found(jsonl([good, good | bad]))
    quadruple = {"prompt": [user("a")], "chosen": ["b", "c", "d"], "rejected": ["e", "f"]}
    with pytest.raises(ConfigError, match="row 0 is not as trl"):
        found(jsonl([quadruple]))


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(
        ConfigError, match="rows.jsonl: cannot be read: .*JSON parse error: .* in row 1"
    ):
        (tmp_path / "rows.jsonl").write_text(
            '{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": "a", "cho'
        )
        found("rows.jsonl")
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "half.parquet").write_bytes(b"PAR1 and no more")
    for name in ("empty.jsonl", "half.parquet"):
        with pytest.raises(ConfigError, match=f"{name}: cannot be read"):
            found(name)
    with pytest.raises(ConfigError, match='cannot be read: .*Unknown split "test"'):
        found(jsonl([{"prompt": "a"}]) + ":test")
    with pytest.raises(assets.AssetError, match="no such folder or file"):
        corpus.source("./gone.jsonl")


AS_PEOPLE_HAVE_THEM = {
    "array.json": lambda text: ("[" + text.strip().replace("}\n{", "},{") + "]").encode(),
    "bom.jsonl": lambda text: b"\xef\xbb\xbf" + text.encode(),
    "crlf.jsonl": lambda text: text.replace("\n", "\r\n\r\n").encode(),
    "zip.jsonl.gz": lambda text: gzip.compress(text.encode()),
    "RAW.JSONL": lambda text: text.encode(),
}


@pytest.mark.parametrize("name", AS_PEOPLE_HAVE_THEM)
def test_files_as_people_have_them_are_read(name):
    content = AS_PEOPLE_HAVE_THEM[name]
    rows = [{"prompt": f"a\u2028b {i} é", "chosen": "b", "rejected": "c"} for i in range(2)]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    Path(name).write_bytes(content(text))
    assert [row["prompt"] for row in found(name)] == [row["prompt"] for row in rows]
    Path("RAW.PARQUET").write_bytes(Path(parquet(rows)).read_bytes())
    assert len(found("RAW.PARQUET")) == 2


BREAKING = {
    "latin.jsonl": '{"prompt": "é", "chosen": "a", "rejected": "b"}\n'.encode("latin-1"),
    "utf16.jsonl": '{"prompt": "a", "chosen": "a", "rejected": "b"}\n'.encode("utf-16"),
    "early.jsonl.gz": gzip.compress(b'{"prompt": "a", "chosen": "a", "rejected": "b"}\n' * 99)[
        :-20
    ],
    "no.zip": b"PK\x03\x04 and no more",
    "table.csv": b"prompt,chosen,rejected\na,b,c\n",
}


@pytest.mark.parametrize("name", BREAKING)
def test_files_that_break_at_a_row_are_refused_by_name(name):
    content = BREAKING[name]
    Path(name).write_bytes(content)
    with pytest.raises(ConfigError, match=f"{name}: cannot be read"):
        found(name)


def test_a_copy_of_the_hub_has_its_splits(tmp_path):
    """As HuggingFaceH4/ultrafeedback_binarized declares them; test_gen gives its prompts whatever
    its answers are.
    """
    folder = tmp_path / "HuggingFaceH4" / "ultrafeedback_binarized"
    (folder / "data").mkdir(parents=True)
    parts = "".join(f"  - split: {p}\n    path: data/{p}-*\n" for p in ("train_prefs", "test_gen"))
    (folder / "README.md").write_text(
        f"---\nconfigs:\n- config_name: default\n  data_files:\n{parts}---\n"
    )
    row = CASES["ultrafeedback"][0]
    empty = {"chosen": [user("How?")], "rejected": [], "messages": [user("How?")]}
    parquet([row], str(folder / "data" / "train_prefs-00000-of-00001.parquet"))
    parquet([row | empty], str(folder / "data" / "test_gen-00000-of-00001.parquet"))
    ref = "HuggingFaceH4/ultrafeedback_binarized"
    assert found(ref) == [CASES["ultrafeedback"][1]]
    assert found(f"{ref}:test_gen") == [{"prompt": [user("How?")], "responses": {}}]
    assert preferences.place(f"{ref}:test_gen") == (ref, "test_gen")
    with pytest.raises(ConfigError, match="cannot be read: .*test_sft"):
        found(f"{ref}:test_sft")


def test_places():
    commit = "0" * 40
    assert preferences.place(f"org/name@{commit}:test") == (f"datasets:org/name@{commit}", "test")
    assert preferences.place("org/name") == ("datasets:org/name", "")
    assert corpus.source(f"org/name@{commit}:test") == [
        {"repo": "org/name", "commit": commit},
        "test",
    ]
    name = jsonl([{"prompt": "a"}], "with:colon.jsonl")
    assert preferences.place(name) == (name, "")
    assert (
        corpus.source(name)
        == [assets.resolve(name)]
        != corpus.source(jsonl([{"prompt": "b"}], "b.jsonl"))
    )


def test_alpaca_eval_has_its_805_prompts():
    if not (paths.CACHE / assets.ASSETS["llm_eval"].file).is_file():
        pytest.skip("the archive is fetched when a run asks for it")
    rows = found("alpaca_eval")
    assert len(rows) == 805 == len({row["prompt"] for row in rows}) and not any(
        map(preferences.reason, rows)
    )
    assert corpus.source("alpaca_eval") == [assets.resolve("llm_eval")]


def test_the_order_is_random_and_always_the_same():
    name = jsonl([{"prompt": str(i)} for i in range(50)])
    order = [n for n, _ in preferences.read(name)]
    assert sorted(order) == list(range(50)) != order and order == [
        n for n, _ in preferences.read(name)
    ]
    streamed = [row["prompt"] for _, row in preferences.read(name, streaming=True)]
    assert sorted(streamed, key=int) == [str(i) for i in range(50)] != streamed


def test_a_dialogue_is_the_text_that_hh_publishes(tiny):
    row, tokenizer = CASES["hh"][0], templates.load_tokenizer(tiny)
    read = preferences.hh(row)
    assert preferences.dialogue(read["prompt"]) + " I see." == row["chosen"]
    plain = dataclasses.replace(SMOKE.world, template="plain")
    made = preferences.prompt_row(tokenizer, read, plain, random.Random(0))
    said = preferences._said(tokenizer, made, read, plain)
    assert (
        tokenizer.decode(made["prompt_ids"] + said["chosen"]) == f"<s>{row['chosen']}</s>"
        and made["text"] == TURNS
    )
    chat = preferences.prompt_row(
        tokenizer, read, dataclasses.replace(plain, template="chat"), random.Random(0)
    )
    asked = "<|user|> Why?</s><|assistant|> Because.</s><|user|> How?</s><|assistant|>"
    assert tokenizer.decode(chat["prompt_ids"]) == f"<s>{asked}" and chat["text"] == TURNS
    assert sources._wording(chat, tokenizer) == preferences.dialogue(TURNS), (
        "what another model is asked is a text"
    )


# --- the split

SMOKE = config.load("expo", "smoke")
WRPO = config.load("wrpo", "smoke")


def world(dataset, **changes):
    given = {
        "template": "chat",
        "pairs": "given",
        "gold_rows": 0,
        "reward_rows": 0,
        "prompt_tokens": (1, 64),
    }
    sizes = {"sft_rows": 0, "prompts": 12, "dev_prompts": 4, "test_prompts": 4}
    return dataclasses.replace(SMOKE.world, dataset=dataset, **given | sizes | changes)


def pairs(n, **changes):
    return [
        {"prompt": f"What is {i}?", "chosen": f"It is {i}.", "rejected": "No."} | changes
        for i in range(n)
    ]


def split(world, tmp_path):
    out = tmp_path / "out"
    out.mkdir(exist_ok=True)
    facts = preferences.split(world, out)
    files = {f.stem: f.read_text() for f in out.iterdir()}
    prompts = {name: json.loads(files[f"{name}prompts"]) for name in ("", "dev_", "test_")}
    lines = {
        name: [json.loads(row) for row in files.get(name, "").splitlines()]
        for name in ("pairs", "sft")
    }
    return facts, prompts, lines, json.loads(files["labelled"])


def test_a_split_shares_no_prompt_and_counts_what_drops(tmp_path, tiny):
    """30 rows: of 10 prompts a second pair, one equal pair; 4 + 4 prompts for dev and test, the
    rest trains.
    """
    rows = pairs(20) + pairs(10, rejected="Other.") + pairs(1, rejected="It is 0.")
    rows[19]["prompt"] = " ".join(["long"] * 90)
    facts, prompts, lines, labelled = split(world(jsonl(rows), prompts=23, sft_rows=5), tmp_path)
    asked = {name: [row["text"] for row in part] for name, part in prompts.items()}
    assert (
        len({*asked["dev_"], *asked["test_"]}) == 8
        and prompts[""] == []
        and labelled["held_out"] == [[], []]
    )
    tokenizer = templates.load_tokenizer(tiny)
    taught = [tokenizer.decode(row["prompt_ids"]) for row in lines["pairs"]]
    assert not [
        text
        for text in taught
        for held in asked["dev_"] + asked["test_"]
        if f"> {held}</s>" in text
    ]
    assert len(taught) == facts["pairs"] and len(lines["sft"]) == facts["sft_rows"] == 5
    assert facts["dropped"].keys() <= {
        "equal responses",
        "repeated prompt",
        "prompt above world.prompt_tokens",
    }
    assert 8 + facts["pairs"] + sum(facts["dropped"].values()) == 31, "every row is used or counted"
    first = lines["pairs"][0]
    assert (
        first["responses"].keys() == {"chosen", "rejected"}
        and first["responses"]["chosen"][-1] == tokenizer.eos_token_id
    )
    assert lines["sft"][0] == first | {"responses": {"chosen": first["responses"]["chosen"]}}
    *_, lines, _ = split(world("rows.jsonl", prompts=31, dev_prompts=0, test_prompts=0), tmp_path)
    lengths = sorted(len(row["prompt_ids"]) for row in lines["pairs"])
    assert len(lengths) == 30 and lengths[-1] > 64, "the training cuts the prompts of given pairs"


def with_template(tiny, folder, template):
    """Copy the tiny model, with another chat template."""
    import transformers

    shutil.copytree(tiny, folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_rows_that_a_template_refuses_drop_and_are_counted(tmp_path, tiny):
    """As Gemma's, which has no system's turn."""
    refuse = "{{ raise_exception('System role not supported') }}"
    strict = "{% if messages[0].role == 'system' %}" + refuse + "{% endif %}" + assets.CHAT_TEMPLATE
    target = with_template(tiny, tmp_path / "strict", strict)
    rows = []
    for i, row in enumerate(pairs(30)):
        turns = [user(row["prompt"])] if i % 3 else [system("Be kind."), user(row["prompt"])]
        rows.append(row | {"prompt": turns})
    facts, prompts, lines, _ = split(world(jsonl(rows), target=target, prompts=22), tmp_path)
    assert facts["dropped"] == {"the chat template refuses it (System role not supported)": 10}
    assert len(lines["pairs"]) == 12 and len(prompts["dev_"]) == len(prompts["test_"]) == 4
    drawn, dropped = preferences.prompts(
        "rows.jsonl", world("rows.jsonl"), templates.load_tokenizer(target), 99
    )
    assert len(drawn) == 20 and dropped == facts["dropped"], "of prompts from elsewhere too"
    all_refused = jsonl(
        [row | {"prompt": [system("Be kind."), user("a")]} for row in pairs(9)], "refused.jsonl"
    )
    with pytest.raises(
        ConfigError,
        match="refused.jsonl: 0 of 4 test rows; dropped: .*System role not supported.*: 9",
    ):
        split(world(all_refused, target=target), tmp_path)


def test_responses_that_share_a_token_with_their_prompt_drop_and_are_counted(tmp_path, tiny):
    """A prompt that ends in a blank, which the tokenizer joins with the next word; a template that
    ends in one.
    """
    rows = pairs(10, chosen="the end.")
    rows += [row | {"prompt": row["prompt"] + " "} for row in rows]
    facts, _, lines, _ = split(
        world(jsonl(rows), template="plain", prompts=20, dev_prompts=0, test_prompts=0), tmp_path
    )
    assert (
        facts["dropped"] == {templates.JOINED: 10} and len(lines["pairs"]) == facts["pairs"] == 10
    )
    tokenizer = templates.load_tokenizer(tiny)
    for row in lines["pairs"]:
        ids = row["prompt_ids"] + row["responses"]["chosen"][:-1]
        assert ids == tokenizer(tokenizer.decode(ids[1:]))["input_ids"], (
            "the tokens of the whole text"
        )
    blank = with_template(
        tiny,
        tmp_path / "blank",
        assets.CHAT_TEMPLATE.replace("'<|assistant|>'", "'<|assistant|> '"),
    )
    with pytest.raises(ConfigError, match=f"0 of 12 train rows; dropped: .*{templates.JOINED}"):
        split(world("rows.jsonl", target=blank), tmp_path)


def test_given_responses_are_as_the_template_has_them(tmp_path, tiny):
    facts, _, lines, _ = split(world(jsonl(pairs(20))), tmp_path)
    tokenizer = templates.load_tokenizer(tiny)
    for row in lines["pairs"]:
        for ids in row["responses"].values():
            text = tokenizer.decode(row["prompt_ids"] + ids)
            asked, said = re.fullmatch(
                r"<s><\|user\|> (.*)</s><\|assistant\|> (.*)</s>", text
            ).groups()
            chat = [user(asked), assistant(said)]
            assert row["prompt_ids"] + ids == tokenizer.apply_chat_template(chat, return_dict=False)
    assert len(lines["pairs"]) == 12 and facts["dropped"] == {}


def test_prompts_to_sample_for_are_whole_and_different(tmp_path, tiny):
    rows = (
        pairs(12) + pairs(3) + [{"prompt": " ".join(["long"] * 90), "chosen": "a", "rejected": "b"}]
    )
    facts, prompts, lines, _ = split(world(jsonl(rows), pairs="sampled", prompts=8), tmp_path)
    texts = [row["text"] for part in prompts.values() for row in part]
    assert (
        len(texts) == len(set(texts)) == 16 - sum(facts["dropped"].values()) and not lines["pairs"]
    )
    tokenizer = templates.load_tokenizer(tiny)
    for row in prompts[""]:
        assert row["prompt_ids"] == templates.render(tokenizer, row["text"], "chat")
    with pytest.raises(
        ConfigError, match=r"rows.jsonl: \d of 8 train rows; dropped: .*repeated prompt"
    ):
        split(world(jsonl(rows), pairs="sampled", prompts=8, dev_prompts=6), tmp_path)
    with pytest.raises(
        ConfigError, match=r"0 of 4 test rows; dropped: .'prompt above world.prompt_tokens': 16"
    ):
        split(world(jsonl(rows), prompt_tokens=(4, 10)), tmp_path)


def test_dev_and_test_prompts_of_their_own(tmp_path):
    """The pairs may name prompts of the test set: those pairs drop."""
    test = jsonl([{"instruction": f"What is  {i}?"} for i in range(4)], "test.jsonl")
    dev = jsonl([{"prompt": f"And {i}?"} for i in range(4)], "dev.jsonl")
    facts, prompts, lines, _ = split(
        world(jsonl(pairs(12)), dev_dataset=dev, test_dataset=test), tmp_path
    )
    assert {row["text"] for row in prompts["test_"]} == {f"What is  {i}?" for i in range(4)}
    assert {row["text"] for row in prompts["dev_"]} == {f"And {i}?" for i in range(4)}
    assert facts == {"sft_rows": 0, "pairs": 8, "held_out": 0, "dropped": {"repeated prompt": 4}}


def test_reviews_are_cut_to_beginnings(tmp_path, tiny):
    """As stanfordnlp/imdb: training reviews for SFT and prompts, dev, test and labels from its
    other split.
    """
    rows = [
        json.loads(line) for line in (paths.FIXTURES / "reviews.jsonl").read_text().splitlines()
    ]
    train, test = jsonl(rows[:60], "train.jsonl"), jsonl(rows[60:] + rows[:3], "test.jsonl")
    how = {
        "template": "plain",
        "pairs": "sampled",
        "prompt_tokens": (2, 8),
        "sft_rows": 30,
        "prompts": 20,
    }
    facts, prompts, lines, labelled = split(
        world(train, dev_dataset=test, test_dataset=test, sft_tokens=64, **how), tmp_path
    )
    tokenizer = templates.load_tokenizer(tiny)
    known = {row["text"]: row["label"] for row in rows}
    for part in prompts.values():
        assert part and all(2 <= len(row["prompt_ids"]) <= 8 and "text" not in row for row in part)
    assert 0 < len(lines["sft"]) == facts["sft_rows"] <= 30
    for row in lines["sft"]:
        text = tokenizer.decode(
            row["prompt_ids"] + row["responses"]["chosen"], skip_special_tokens=True
        )
        assert any(review.startswith(text) for review in known) and text.endswith((".", "!", "?"))
    texts, labels = labelled["held_out"]
    assert 20 < len(texts) == facts["held_out"] <= len(rows) - 60 + 3 - 8
    order = [row["text"] for _, row in preferences.read(test)]
    taught = [row["text"] for _, row in preferences.read(train) if row["text"] not in order[:8]][
        :30
    ]
    assert texts == [" ".join(text.split()[:32]) for text in order[8:] if text not in taught], (
        "no reward is measured on it"
    )
    assert all(
        known[next(r for r in known if r.startswith(text))] == label
        for text, label in zip(texts, labels, strict=True)
    )
    with pytest.raises(ConfigError, match="no reward is trained on train.jsonl"):
        split(world(train, gold_rows=1), tmp_path)


def test_reviews_that_come_with_us_have_no_pairs_to_give(tmp_path):
    for changes in (
        {"pairs": "given"},
        {"dev_dataset": "alpaca_eval"},
        {"test_dataset": "org/name"},
    ):
        with pytest.raises(
            ConfigError, match="fixtures holds reviews: its pairs are sampled, its prompts its own"
        ):
            corpus.split(dataclasses.replace(SMOKE.world, **changes), tmp_path)


def test_reviews_in_a_chat_are_asked_whole(store):
    """The template stands around the beginning of a review, it is not cut with it."""
    cfg = dataclasses.replace(SMOKE.world, template="chat")
    tokenizer = templates.load_tokenizer(assets.model_dir("tiny"))
    for row in stages.texts(cfg).json("test_prompts.json"):
        assert tokenizer.decode(row["prompt_ids"]) == f"<s><|user|> {row['text']}</s><|assistant|>"
        assert 3 <= len(tokenizer(row["text"])["input_ids"]) <= 12


def test_prompts_from_elsewhere(store):
    rows = [CASES["shp, A"][0] | {"history": f"Post {i // 2}"} for i in range(20)]
    cfg = config.load("mallows", "smoke", world__prompt_tokens=[1, 64], elsewhere_prompts=8)
    made = mallows.elsewhere(cfg, jsonl(rows)).json("rows.jsonl.json")
    assert len(made) == 8 == len({row["text"][0]["content"] for row in made})
    decode = templates.load_tokenizer(assets.model_dir("tiny")).decode
    assert (
        decode(made[0]["prompt_ids"])
        == f"<s>\n\nHuman: {made[0]['text'][0]['content']}\n\nAssistant:"
    )
    few = "elsewhere_prompts=11, but rows.jsonl has only 10; dropped: {'repeated prompt': 10}"
    with pytest.raises(ConfigError, match=few):
        mallows.elsewhere(dataclasses.replace(cfg, elsewhere_prompts=11), "rows.jsonl").get()


def test_rows_of_prompts_from_elsewhere_that_drop_are_counted(store):
    """They were passed over in silence: here eight repeat a prompt, one is too long, two ask
    nothing.
    """
    rows = [{"prompt": f"What is {i}?"} for i in range(8)] * 2
    rows += [{"prompt": "long " * 90}, {"prompt": " "}, {"prompt": None}]
    cfg = config.load("mallows", "smoke", world__prompt_tokens=[1, 64], elsewhere_prompts=8)
    drawn, dropped = preferences.prompts(
        jsonl(rows), cfg.world, templates.load_tokenizer(assets.model_dir("tiny")), 99
    )
    assert len(drawn) == 8
    assert dropped == {
        "repeated prompt": 8,
        "prompt above world.prompt_tokens": 1,
        "no question": 2,
    }
    facts = mallows.elsewhere(cfg, "rows.jsonl").json("manifest.json")["facts"]
    assert facts["dropped"].keys() <= dropped.keys()


def test_reviews_go_on_as_an_answer_in_a_chat(store, tmp_path, tiny):
    """What SFT learns there is how a review goes on, not the rest of the user's turn."""
    tokenizer = templates.load_tokenizer(tiny)
    reviews = [
        json.loads(line) for line in (paths.FIXTURES / "reviews.jsonl").read_text().splitlines()
    ]
    embedded = stages.texts(dataclasses.replace(SMOKE.world, template="chat")).get() / "sft.jsonl"
    sizes = {"sft_rows": 20, "sft_tokens": 64, "test_prompts": 2, "dev_prompts": 2}
    split(world(jsonl(reviews), pairs="sampled", prompt_tokens=(2, 8), **sizes), tmp_path)
    for file in (embedded, tmp_path / "out" / "sft.jsonl"):
        rows = read_rows(file)
        assert len(rows) > 10
        for row in rows:
            text = tokenizer.decode(row["prompt_ids"] + row["responses"]["chosen"])
            asked, said = re.fullmatch(
                r"<s><\|user\|> (.*)</s><\|assistant\|> (.*)</s>", text
            ).groups()
            assert [
                review
                for review in reviews
                if review["text"].startswith((f"{asked} {said}", f"{asked}{said}"))
            ]


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
    name = jsonl(pairs(20))
    keys = {
        stages.texts(world(name, **changes)).key
        for changes in ({}, {"pairs": "sampled"}, {"test_dataset": name})
    }
    assert len(keys) == 3
    jsonl(pairs(21))
    assert stages.texts(world(name)).key not in keys, "a file's content is in its key"


def test_a_date_is_in_the_key_only_where_a_template_writes_it(tmp_path, tiny):
    today = "{{ strftime_now('%d %b %Y') }}" + assets.CHAT_TEMPLATE
    dated = with_template(tiny, tmp_path / "dated", today)
    other = with_template(tiny, tmp_path / "other", assets.CHAT_TEMPLATE)
    name = jsonl(pairs(20))
    assert stages.texts(world(name, target=dated)).inputs["date"] == "2024-07-26"
    for changes in ({"target": dated, "template": "plain"}, {"target": other}, {}):
        assert "date" not in stages.texts(world(name, **changes)).inputs
    asks = [stages.texts(SMOKE.world).inputs, sources._put(WRPO, WRPO.known_sources["chat"]).inputs]
    assert not [inputs for inputs in asks if {"date", "tokens"} & inputs.keys()], (
        "present keys stay"
    )
    source = config.Source(kind="model", ref=dated, ask="{prompt}")
    assert sources._put(WRPO, source).inputs["date"] == "2024-07-26"
    assert "date" not in sources._put(WRPO, config.Source(kind="model", ref=dated)).inputs


def test_the_date_that_a_reward_models_template_writes_is_in_the_key_of_its_scores(tmp_path, tiny):
    """Its own template, whatever the target's: the same responses had other rewards on another
    day.
    """
    dated = with_template(
        tiny, tmp_path / "dated", "{{ strftime_now('%d %b %Y') }}" + assets.CHAT_TEMPLATE
    )
    other = with_template(tiny, tmp_path / "other", assets.CHAT_TEMPLATE)

    def inputs(judges=("reward",), **changes):
        cfg = dataclasses.replace(SMOKE, world=dataclasses.replace(SMOKE.world, **changes))
        weights = stages.Weights(stages.sft(cfg))
        said = stages.responses(cfg, weights, "dev_prompts", samples=1, seed=2)
        return stages.scores(cfg, said, "dev_prompts", judges=judges).inputs

    finished = {"reward_model": dated, "reward_rows": 0}
    assert inputs(**finished)["date"] == "2024-07-26"
    assert "date" not in inputs(("gold", "vader"), **finished), "it does not judge"
    for changes in ({"reward_model": other, "reward_rows": 0}, {}):
        assert "date" not in inputs(**changes)


def test_present_keys_with_a_finished_reward_model_stay(monkeypatch):
    """The profiles' own write no date; of another one on the hub that is not known."""
    monkeypatch.setenv("COMPUTE", "plan")
    shipped = [("expo", "", "paper"), ("expo", "hub", "gpu"), ("wrpo", "", "paper")]
    shipped += [("mallows", name, "paper") for name in ("", "llama3", "hh")]
    for paper, experiment, profile in shipped:
        cfg = config.load(paper, profile, experiment)
        assert not cfg.world.reward_rows and cfg.world.reward_model in corpus.DATELESS
    assert corpus.rendering("org/reward", "chat") == {"date": "2024-07-26"}


def test_paper_profiles_have_the_data_of_the_papers(monkeypatch):
    """ExPO: 61,135 given pairs, α on test_gen's 1,000; MallowsPO: given pairs; AlpacaEval's or HH's
    prompts.
    """
    monkeypatch.setenv("COMPUTE", "plan")
    expo_world = config.load("expo", "paper").world
    llama, hh = (config.load("mallows", "paper", name).world for name in ("llama3", "hh"))
    wrpo = config.load("wrpo", "paper").world
    assert (expo_world.pairs, expo_world.prompts, expo_world.dev_prompts) == ("given", 61135, 1000)
    assert expo_world.dev_dataset == "HuggingFaceH4/ultrafeedback_binarized:test_gen"
    assert {w.test_dataset for w in (expo_world, llama, wrpo)} == {"alpaca_eval"}
    assert {w.test_prompts for w in (expo_world, llama, wrpo)} == {805}
    assert (hh.test_dataset, hh.pairs, llama.pairs, wrpo.pairs) == (
        "Anthropic/hh-rlhf:test",
        "given",
        "given",
        "sampled",
    )
    worlds = [expo_world, llama, hh, wrpo, config.load("mallows", "paper").world]
    assert not [w for w in worlds if w.trust_remote_code], "no repository's code runs"
    assert len({stages.texts(w).key for w in worlds}) == 5
    assert {preferences.place(w.dataset)[0].removeprefix("datasets:") for w in worlds} <= set(
        preferences.HUB
    )


def test_prompts_in_a_chat_have_a_key_of_their_own():
    keys = set()
    for template in ("plain", "chat"):
        cfg = config.load("expo", "smoke", world__template=template, world__sft_rows=0)
        line = expo.Line(stages.sft(cfg), stages.sft(cfg), (0.0,))
        said = expo.said(cfg, {"one": line})
        keys |= {key for key in said.upstream if key.startswith("own-prompts")}
    assert len(keys) == 2


def test_an_engine_of_other_end_tokens_is_of_another_shape(tmp_path, tiny):
    """Then a swap of weights is not enough: the tokenizer's settings say where sampling stops."""
    other = tmp_path / "other"
    shutil.copytree(tiny, other)
    assert stages._shape(str(other)) == stages._shape(str(tiny))
    settings = json.loads((other / "tokenizer_config.json").read_text())
    another = tmp_path / "another"
    shutil.copytree(other, another)
    (another / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": "<pad>"}))
    assert stages._shape(str(another)) != stages._shape(str(tiny))


def test_a_users_file_trains_and_is_scored_in_turns(store, tmp_path):
    """Given pairs -> reference -> DPO -> responses -> a reward model that reads turns, on a file as
    TRL takes it.
    """
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    source, reward = assets.model_dir("tiny"), tmp_path / "reward"
    model = AutoModelForSequenceClassification.from_config(
        AutoConfig.from_pretrained(source, num_labels=1)
    )
    model.save_pretrained(reward)
    AutoTokenizer.from_pretrained(source).save_pretrained(reward)
    changes = {"world": dataclasses.asdict(world(jsonl(pairs(20)), reward_model=str(reward)))}
    cfg = config.load(
        "expo",
        "smoke",
        **changes,
        fractions=[1.0],
        alphas={1.0: [0, 1]},
        seeds=[0],
        seed_fractions=[],
    )
    rows = read_rows(stages.pairs(cfg).get() / "pairs.jsonl")
    assert len(rows) == 12 and stages.oracle(cfg.world) == "reward"
    curves = expo.curves(cfg)
    table, facts = curves.csv("responses.csv.gz"), curves.json("facts.json")
    assert (
        (table["gold"] == table["reward"]).all()
        and facts["pairs"]["pairs"] == 12
        and facts["reward"] == {}
    )
    trained = stages.aligned(cfg, 1.0).manifest["facts"]
    assert trained["first"]["loss"] == pytest.approx(0.6931, abs=2e-3), "DPO starts at ln 2"
    weights = stages.Weights(stages.sft(cfg), stages.aligned(cfg, 1.0))
    said = stages.responses(cfg, weights, "dev_prompts", samples=1, seed=2)
    lines = [json.loads(line) for line in (said.get() / "responses.jsonl").read_text().splitlines()]
    scores = [
        json.loads(line)
        for line in (expo.point(cfg, 1.0, 0, 0.0, "dev_prompts").get() / "scores.jsonl")
        .read_text()
        .splitlines()
    ]
    asked = {row["id"]: row["text"] for row in stages.texts(cfg.world).json("dev_prompts.json")}
    decode = templates.load_tokenizer(source).decode
    chats = [
        [user(asked[r["id"]]), assistant(decode(r["response_ids"], skip_special_tokens=True))]
        for r in lines
    ]
    wanted = rewards.Classifier(reward).score(chats)
    assert [one["reward"] for one in scores] == pytest.approx(wanted, abs=1e-4) and wanted.std() > 0
