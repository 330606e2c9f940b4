"""Verdicts case by case, tables that repeat byte for byte, claims from record to README."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from beyond_dpo.machine import paths
from beyond_dpo.notebook import report

NOTEBOOK = "11_expo_headline"


def claim(text="ExPO lifts DPO", ours=(2.0, 1.5, 2.5), **how):
    return report.claim(text, 2.6, "Table 1", ours, **how)


@pytest.fixture
def project(tmp_path, monkeypatch):
    for name, folder in {"ROOT": "", "ARTIFACTS": "artifacts", "FROZEN": "data/frozen"}.items():
        monkeypatch.setattr(paths, name, tmp_path / folder)
    return tmp_path


def freeze(project, notebook, profile):
    target = project / "data/frozen/claims"
    target.mkdir(parents=True, exist_ok=True)
    report.claims_path(notebook, profile).rename(target / f"{notebook}.{profile}.json")


CASES = [
    # paper, ours, low, high, extra, verdict
    (2.6, 2.0, 1.5, 2.7, {}, "reproduced"),  # the paper's value is inside
    (2.6, 2.0, 1.5, 2.5, {}, "direction"),  # just outside, same sign
    (2.6, 2.0, 1.5, 2.6, {}, "reproduced"),  # on the border
    (
        2.6,
        2.0,
        1.5,
        2.5,
        {"tolerance": 0.6},
        "reproduced",
    ),  # |2.0 - 2.6| = 0.6 in floats is just within
    (2.6, 2.0, 1.5, 2.5, {"tolerance": 0.5}, "direction"),
    (2.6, 0.2, -0.1, 0.5, {}, "not reproduced"),  # same sign, but 0 is inside
    (2.6, 0.2, 0.0, 0.5, {}, "not reproduced"),  # an interval that ends at 0 does not exclude it
    (2.6, -2.0, -2.5, -1.5, {}, "not reproduced"),  # clearly the other way
    (0.1, -0.1, -0.3, 0.2, {}, "not reproduced"),  # inside the interval, yet the other sign
    (0.1, -0.1, -0.3, 0.2, {"tolerance": 1}, "not reproduced"),
    (-0.5, -0.4, -0.6, -0.2, {}, "reproduced"),
    (2.6, None, None, None, {}, "not run"),
    (2.6, 2.6, None, None, {}, "reproduced"),  # a number without uncertainty
    (2.6, 2.5, None, None, {}, "direction"),
    (
        2.6,
        2.0,
        1.5,
        2.7,
        {"sign_only": True},
        "direction",
    ),  # a sign alone is never reproduced as a number
    (1, 2.0, -0.1, 2.7, {"sign_only": True}, "not reproduced"),
    (0.0, 0.1, -0.1, 0.3, {}, "reproduced"),  # the paper found no effect, neither did we
    (0.0, 0.4, 0.3, 0.5, {}, "not reproduced"),
    (0.0, 0.4, 0.3, 0.5, {"tolerance": 0.5}, "reproduced"),
]


@pytest.mark.parametrize(("paper", "ours", "low", "high", "extra", "expected"), CASES)
def test_verdict(paper, ours, low, high, extra, expected):
    """Each case again with all signs turned, which changes nothing."""
    assert report.verdict(paper, ours, low, high, **extra) == expected
    turned = [None if x is None else -x for x in (paper, ours, high, low)]
    assert report.verdict(*turned, **extra) == expected


@pytest.mark.parametrize(
    ("arguments", "extra", "message"),
    [
        ((1, float("nan"), 0, 1), {}, "'ours': nan"),
        ((float("nan"), 1, 0, 1), {}, "'paper': nan"),
        ((1, 1, 2, 1), {}, "low <= high"),
        ((1, 1, 0, 1), {"tolerance": -1}, "tolerance >= 0"),
        ((0, 1, 0, 1), {"sign_only": True}, "sign"),
    ],
)
def test_verdict_refuses(arguments, extra, message):
    with pytest.raises(ValueError, match=message):
        report.verdict(*arguments, **extra)


def test_a_sign_without_a_number():
    assert (
        report.verdict("-", -2.0, -3.0, -1.0) == "direction"
        and report.verdict("-", 2.0) == "not reproduced"
    )
    assert (
        report.verdict("+", 2.0, -1.0, 3.0) == "not reproduced"
        and report.verdict("+", None) == "not run"
    )
    row = report.claim("c", "-", "text", -1.0)
    assert (row["paper"], row["verdict"]) == ("-", "direction")


def test_the_readme_shows_the_frozen_scoreboard(tmp_path):
    """`make render` and `python -m beyond_dpo.notebook.report --readme` were run after the last
    freeze.
    """
    copy = tmp_path / "README.md"
    copy.write_text((paths.ROOT / "README.md").read_text(encoding="utf-8"), encoding="utf-8")
    assert not report.update_readme(copy)


def test_claims_become_a_table_and_name_what_is_wrong(project):
    df = report.record(NOTEBOOK, [claim(), claim("b", None)], "cpu")
    assert list(df["verdict"]) == ["direction", "not run"]
    assert list(df.columns) == list(report.COLUMNS)
    with pytest.raises(TypeError, match="unexpected keyword argument 'tolerence'"):
        claim(tolerence=1)
    with pytest.raises(TypeError, match="'ours'"):
        report.claim("it rises", 2.6, "Table 1")
    with pytest.raises(ValueError, match="'ExPO lifts DPO': needs finite numbers.*'ours': nan"):
        claim(ours=(float("nan"), 1.5, 2.5))


def test_tables_repeat_escape_and_round(project):
    df = report.record(NOTEBOOK, [claim("a < b & <script>", (1.23456, 1.5, 2.5))], "cpu")
    first, second = report.show(df, "caption <i>"), report.show(df.copy(), "caption <i>")
    html = first._repr_html_()
    assert html == second._repr_html_()
    assert repr(first) == repr(second) and "0x" not in repr(first) and "1.235" in repr(first)
    assert (
        "a &lt; b &amp; &lt;script&gt;" in html
        and "<script>" not in html
        and "caption &lt;i&gt;" in html
    )
    assert "1.235" in html and "1.2346" not in html and report.SHADES["direction"] in html
    assert "None" not in html + repr(first) and "tolerance" not in html
    assert "sign only" in report.show(pd.DataFrame([claim(sign_only=True)]), "c")._repr_html_()
    assert html != report.show(df, "another caption")._repr_html_()


def cells(table) -> list[list[tuple[str, str]]]:
    """Return (style, text) of every cell of a table's HTML, row by row."""
    rows = re.findall(r"<tr>(.*?)</tr>", table._repr_html_(), re.S)
    return [re.findall(r'<t[hd][^>]*style="([^"]*)"[^>]*>(.*?)</t[hd]>', row, re.S) for row in rows]


def test_tables_are_to_be_read():
    """Texts stand left, numbers right, whole numbers without decimals, and no heading is a name of
    our data.
    """
    df = pd.DataFrame(
        {
            "model": ["DPO", "DPO + ExPO", None],
            "alpha": [0.0, 128.0, np.nan],
            "fraction": [0.05, 0.1, 1.0],
            "distinct_2": [0.5151, 0.5, -0.0000001],
            "n": [1, 2, 3],
            "held_out": [2000, None, "–"],
            "some_other_name": [True, False, True],
        }
    )
    heading, *rows = cells(report.show(df, "c"))
    names = [text for _, text in heading]
    assert names == [
        "model",
        "α",
        "share of the pairs",
        "distinct bigrams",
        "n",
        "held-out texts",
        "some other name",
    ]
    assert [text for _, text in rows[0]] == ["DPO", "0", "0.05", "0.515", "1", "2000", "yes"]
    assert [text for _, text in rows[2]] == ["–", "–", "1.00", "0.000", "3", "–", "yes"]
    for row in (heading, *rows):
        assert [style for style, _ in row][:5] == ["text-align: left"] + 4 * ["text-align: right"]
    text = repr(report.show(df, "c")).splitlines()
    assert text[1].startswith("DPO        ") and text[2].startswith("DPO + ExPO  128"), (
        "the text form as well"
    )


def test_long_texts_are_wrapped():
    """Text of many words wraps in both forms, and a word that no browser would break may break
    anywhere.
    """
    df = pd.DataFrame({"text": ["very well " * 20, "!" * 200], "n": [1, 2]})
    table = report.show(df, "c")
    assert max(map(len, repr(table).splitlines())) <= report.PLAIN_WIDTH + 5
    assert repr(table).count("very") == 20
    (_, (first, _), (second, _)) = cells(table)
    assert "overflow-wrap" not in first[0] and "overflow-wrap: anywhere" in second[0]


def test_tables_need_no_trust():
    """The shades of the verdicts and the alignment stand in the cells: an untrusted notebook loses
    <style>.
    """
    table = report.show(pd.DataFrame([claim(), claim("b", None)]), "c")
    assert not re.search(
        r"\{[^}]*\}", re.search(r"<style.*?</style>", table._repr_html_(), re.S)[0]
    )
    assert [row[-1][0].partition("; ")[2] for row in cells(table)[1:]] == [
        f"background-color: {report.SHADES[verdict]}; color: black"
        for verdict in ("direction", "not run")
    ]


def test_two_columns_of_one_heading_are_refused():
    with pytest.raises(ValueError, match="two columns of one heading: α, α"):
        report.show(pd.DataFrame({"alpha": [1], "α": [2]}), "c")


def test_numbers_of_claims_stand_for_themselves():
    rows = [
        claim("a", (2.0, 1.5, 2.5)),
        report.claim("b", 12, "t", 11),
        report.claim("c", "+", "t", 0.12345),
    ]
    _, *shown = cells(report.show(pd.DataFrame(rows), "c"))
    assert [row[1][1] for row in shown] == ["2.6", "12", "+"], "as the paper prints them"
    assert [row[3][1] for row in shown] == ["2", "11", "0.123"]
    assert shown[0][4][1] == "1.500" and shown[0][1][0] == "text-align: right"


def test_claim_rows():
    row = report.claim("it rises", 1.5, "Table 1", (2.0, 1.0, 3.0), sign_only=True)
    assert (row["verdict"], row["low"], row["high"]) == ("direction", 1.0, 3.0)
    (alone, none) = (
        report.claim("12 of 12", 12, "t", np.int64(12)),
        report.claim("later", "+", "t", None),
    )
    assert alone["ours"] == 12.0 and alone["low"] is None
    assert [alone["verdict"], none["verdict"]] == ["reproduced", "not run"]


def test_published_tables_are_read_as_printed():
    """Four numbers by eye from the paper's Tables 1 and 3: the tables shipped are eight."""
    tables = sorted(paths.PUBLISHED.glob("expo_*.csv"))
    assert len(tables) >= 8
    for path in tables:
        df = report.published(path.stem)
        assert len(df) and df["source"].notna().all()
        assert not df["source"].str.contains(r"(?:^|\s)(?:/|~/|\.\./)").any(), path
    table = report.published("expo_table1").set_index("row")
    assert table.loc["DPO 10% data + ExPO", "reward"] == 6.57
    assert table.loc["DPO 10% data + ExPO", "delta_reward"] == 2.6
    assert report.published("expo_table3")["optimal_alpha"].iloc[0] == 8
    with pytest.raises(FileNotFoundError, match="published/expo_tabel1.csv"):
        report.published("expo_tabel1")


def test_scoreboard_prefers_the_highest_profile(project):
    """cpu and smoke ran claim a; gpu ran a and left b out; b therefore comes from cpu."""
    for profile, rows in {
        "smoke": [claim("a", (99.0, 1.5, 99.0)), claim("smoke only")],
        "cpu": [claim("a"), claim("b")],
        "gpu": [claim("a", (2.25, 1.5, 2.5)), claim("b", None)],
    }.items():
        report.record(NOTEBOOK, rows, profile, keys=["score-1", "score-1"])
        freeze(project, NOTEBOOK, profile)
    board = report.scoreboard()
    assert board[["claim", "profile", "ours", "verdict"]].values.tolist() == [
        ["a", "gpu", 2.25, "direction"],
        ["b", "cpu", 2.0, "direction"],
    ]
    report.record(NOTEBOOK, [claim("a", (2.5, 1.5, 2.5))], "gpu")
    assert report.scoreboard().equals(board), "local runs must not change the committed scoreboard"
    assert report.scoreboard(local=True)["ours"].tolist() == [2.5, 2.0]
    report.record(
        NOTEBOOK, [claim("a, in other words")], "gpu"
    )  # a claim was reworded since the freeze
    assert report.scoreboard(local=True)["claim"].tolist() == ["a", "b", "a, in other words"]


def test_record_writes_plain_json(project):
    df = report.record(NOTEBOOK, [claim(ours=2.0)], "cpu", keys=["k-1", "k-1", "k-2"])
    content = json.loads(report.claims_path(NOTEBOOK, "cpu").read_text())
    assert content["keys"] == ["k-1", "k-2"] and content["claims"][0]["low"] is None
    assert content["claims"][0]["verdict"] == df["verdict"][0] == "direction"
    with pytest.raises(ValueError, match="profile 'cup'"):
        report.record(NOTEBOOK, [claim()], "cup")


def test_update_readme(project):
    report.record(NOTEBOOK, [claim("a | b"), claim("c", None)], "cpu")
    freeze(project, NOTEBOOK, "cpu")
    readme = project / "README.md"
    readme.write_text("# T\n<!-- scoreboard -->\nold\n<!-- /scoreboard -->\nend\n")
    assert report.update_readme() is True
    text = readme.read_text()
    assert text.startswith("# T\n<!-- scoreboard -->\n| claim |") and text.endswith(
        "<!-- /scoreboard -->\nend\n"
    )
    link = "[11_expo_headline](notebooks/11_expo_headline.ipynb)"
    first = "| a \\| b | +2.6 | +2 [+1.5, +2.5] | cpu | direction"
    assert f"{first} (1 of 2 hold) | {link} |" in text, (
        "the notebook's first claim, and how many hold"
    )
    assert text.count("| a ") == 2 and text.count("| c |") == 1
    assert f"{first} | {link} |" in text.partition("<summary>All 2 claims</summary>")[2]
    assert f"| c | +2.6 | – | cpu | not run | {link} |" in text and "\nold\n" not in text
    assert report.update_readme() is False and readme.read_text() == text
    readme.write_text("# T\n<!-- scoreboard -->\n")
    with pytest.raises(ValueError, match="README.md needs one"):
        report.update_readme()


def test_main_prints_and_updates(project):
    environment = os.environ | {"BEYOND_DPO_ROOT": str(project)}
    environment.pop("BEYOND_DPO_ARTIFACTS", None)
    command = [sys.executable, "-m", "beyond_dpo.notebook.report"]
    empty = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert empty.stdout == "No claim has been recorded yet.\n"
    report.record(NOTEBOOK, [claim()], "cpu")
    assert (
        "No claim"
        in subprocess.run(
            command, capture_output=True, text=True, env=environment, check=True
        ).stdout
    )
    (project / "README.md").write_text("<!-- scoreboard -->\n<!-- scoreboard -->\n")
    done = subprocess.run(
        [*command, "--local", "--readme"],
        capture_output=True,
        text=True,
        env=environment,
        check=True,
    )
    assert (
        "ExPO lifts DPO" in done.stdout
        and "direction" in done.stdout
        and "README.md updated" in done.stdout
    )
    asked = {name: [*command, "--local", name] for name in (NOTEBOOK, NOTEBOOK[:2], "99")}
    shown = {
        name: subprocess.run(
            line, capture_output=True, text=True, env=environment, check=True
        ).stdout
        for name, line in asked.items()
    }
    assert shown[NOTEBOOK] == shown[NOTEBOOK[:2]] and "ExPO lifts DPO" in shown[NOTEBOOK]
    assert shown["99"] == "No claim has been recorded yet.\n"


def test_light_imports():
    heavy = {"torch", "transformers", "vllm", "deepspeed"}
    code = f"import sys, beyond_dpo.notebook.report; print({heavy} & set(sys.modules))"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip()
        == "set()"
    )


def test_table_in_pandas_terms():
    assert isinstance(report.show(pd.DataFrame({"a": [1.0]}), "c"), pd.io.formats.style.Styler)


def test_a_report_that_has_no_place_says_so_in_one_line(project):
    environment = os.environ | {"BEYOND_DPO_ROOT": str(project)}
    with open("/dev/full", "wb") as full:
        command = [sys.executable, "-m", "beyond_dpo.notebook.report"]
        done = subprocess.run(
            command, stdout=full, stderr=subprocess.PIPE, text=True, env=environment
        )
    assert (
        done.returncode == 1
        and done.stderr == "the output cannot be written: No space left on device\n"
    )
