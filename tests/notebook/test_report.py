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
COMMAND = [sys.executable, "-m", "beyond_dpo.notebook.report"]
NO_CLAIM = "No claim has been recorded yet.\n"


def claim(text="ExPO lifts DPO", ours=(2.0, 1.5, 2.5), **options):
    """Return a claim of which the paper says 2.6."""
    return report.claim(text, 2.6, "Table 1", ours, **options)


@pytest.fixture
def project(tmp_path, monkeypatch):
    """Return the folder of a project without any claim."""
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    monkeypatch.setattr(paths, "ARTIFACTS", tmp_path / "artifacts")
    monkeypatch.setattr(paths, "FROZEN", tmp_path / "data/frozen")
    return tmp_path


def freeze(project, notebook, profile):
    """Move a notebook's recorded claims to the frozen ones."""
    target = project / "data/frozen/claims"
    target.mkdir(parents=True, exist_ok=True)
    report.claims_path(notebook, profile).rename(target / f"{notebook}.{profile}.json")


# ---- verdicts

WITHIN = {"tolerance": 0.6}  # |2.0 - 2.6| = 0.6 is within it also in floats
SIGN = {"sign_only": True}
CASES = [
    # paper, ours, low, high, options, verdict
    (2.6, 2.0, 1.5, 2.7, {}, "reproduced"),  # the paper's value is inside
    (2.6, 2.0, 1.5, 2.5, {}, "direction"),  # just outside, same sign
    (2.6, 2.0, 1.5, 2.6, {}, "reproduced"),  # on the border
    (2.6, 2.0, 1.5, 2.5, WITHIN, "reproduced"),
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
    (2.6, 2.0, 1.5, 2.7, SIGN, "direction"),  # a sign alone is never reproduced as a number
    (1, 2.0, -0.1, 2.7, SIGN, "not reproduced"),
    (0.0, 0.1, -0.1, 0.3, {}, "reproduced"),  # the paper found no effect, neither did we
    (0.0, 0.4, 0.3, 0.5, {}, "not reproduced"),
    (0.0, 0.4, 0.3, 0.5, {"tolerance": 0.5}, "reproduced"),
]


@pytest.mark.parametrize(("paper", "ours", "low", "high", "options", "expected"), CASES)
def test_verdict(paper, ours, low, high, options, expected):
    """Each case again with all signs turned, which changes nothing."""
    assert report.verdict(paper, ours, low, high, **options) == expected
    turned = [None if number is None else -number for number in (paper, ours, high, low)]
    assert report.verdict(*turned, **options) == expected


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((1, float("nan"), 0, 1), {}, "'ours': nan"),
        ((float("nan"), 1, 0, 1), {}, "'paper': nan"),
        ((1, 1, 2, 1), {}, "low <= high"),
        ((1, 1, 0, 1), {"tolerance": -1}, "tolerance >= 0"),
        ((0, 1, 0, 1), {"sign_only": True}, "sign"),
    ],
)
def test_verdict_refuses(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        report.verdict(*arguments, **options)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("-", -2.0, -3.0, -1.0), "direction"),
        (("-", 2.0), "not reproduced"),
        (("+", 2.0, -1.0, 3.0), "not reproduced"),
        (("+", None), "not run"),
    ],
)
def test_verdict_on_a_sign_without_a_number(arguments, expected):
    assert report.verdict(*arguments) == expected


# ---- claims


def test_a_claim_has_what_it_was_made_of_and_its_verdict():
    row = report.claim("it rises", 1.5, "Table 1", (2.0, 1.0, 3.0), sign_only=True)
    assert list(row) == list(report.COLUMNS)
    assert row["verdict"] == "direction"
    assert row["low"] == 1.0
    assert row["high"] == 3.0


def test_a_claim_may_be_a_number_without_an_interval():
    row = report.claim("12 of 12", 12, "t", np.int64(12))
    assert row["ours"] == 12.0
    assert row["low"] is None
    assert row["verdict"] == "reproduced"


def test_a_claim_may_not_have_been_run():
    assert report.claim("later", "+", "t", None)["verdict"] == "not run"


def test_a_claim_keeps_the_sign_that_the_paper_states():
    row = report.claim("c", "-", "text", -1.0)
    assert row["paper"] == "-"
    assert row["verdict"] == "direction"


def test_a_claim_names_what_is_wrong():
    with pytest.raises(TypeError, match="unexpected keyword argument 'tolerence'"):
        claim(tolerence=1)
    with pytest.raises(TypeError, match="'ours'"):
        report.claim("it rises", 2.6, "Table 1")
    with pytest.raises(ValueError, match="'ExPO lifts DPO': needs finite numbers.*'ours': nan"):
        claim(ours=(float("nan"), 1.5, 2.5))


# ---- tables


def cells(table) -> list[list[tuple[str, str]]]:
    """Return (style, text) of every cell of a table's HTML, row by row."""
    rows = re.findall(r"<tr>(.*?)</tr>", table._repr_html_(), re.S)
    return [re.findall(r'<t[hd][^>]*style="([^"]*)"[^>]*>(.*?)</t[hd]>', row, re.S) for row in rows]


def texts_of(row: list[tuple[str, str]]) -> list[str]:
    return [text for _, text in row]


def test_tables_repeat_byte_for_byte():
    df = pd.DataFrame([claim()])
    first = report.show(df, "caption")
    second = report.show(df.copy(), "caption")
    assert first._repr_html_() == second._repr_html_()
    assert repr(first) == repr(second)
    assert "0x" not in repr(first)
    other = report.show(df, "another caption")
    assert other._repr_html_() != first._repr_html_()


def test_tables_escape_and_round():
    df = pd.DataFrame([claim("a < b & <script>", (1.23456, 1.5, 2.5))])
    table = report.show(df, "caption <i>")
    html = table._repr_html_()
    assert "a &lt; b &amp; &lt;script&gt;" in html
    assert "<script>" not in html
    assert "caption &lt;i&gt;" in html
    assert "1.235" in html
    assert "1.2346" not in html
    assert "1.235" in repr(table)
    assert report.SHADES["direction"] in html


def test_tables_of_claims_show_options_only_where_they_are_used(project):
    df = report.record(NOTEBOOK, [claim()], "cpu")
    table = report.show(df, "c")
    assert "None" not in table._repr_html_()
    assert "None" not in repr(table)
    assert "tolerance" not in table._repr_html_()
    assert "sign only" not in table._repr_html_()
    table = report.show(pd.DataFrame([claim(sign_only=True)]), "c")
    assert "sign only" in table._repr_html_()


@pytest.fixture
def models() -> pd.DataFrame:
    """Return data of all kinds, with missing values."""
    return pd.DataFrame(
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


def test_tables_have_headings_to_be_read(models):
    heading, *_ = cells(report.show(models, "c"))
    assert texts_of(heading) == [
        "model",
        "α",
        "share of the pairs",
        "distinct bigrams",
        "n",
        "held-out texts",
        "some other name",
    ]


def test_tables_have_cells_to_be_read(models):
    """Whole numbers have no decimals, missing ones are dashes, and no zero is negative."""
    _, first, _, third = cells(report.show(models, "c"))
    assert texts_of(first) == ["DPO", "0", "0.05", "0.515", "1", "2000", "yes"]
    assert texts_of(third) == ["–", "–", "1.00", "0.000", "3", "–", "yes"]


def test_in_tables_texts_stand_left_and_numbers_right(models):
    table = report.show(models, "c")
    for row in cells(table):
        (model, _), *numbers = row[:5]
        assert model == "text-align: left"
        assert {style for style, _ in numbers} == {"text-align: right"}
    lines = repr(table).splitlines()
    assert lines[1].startswith("DPO        ")
    assert lines[2].startswith("DPO + ExPO  128")


def test_long_texts_are_wrapped():
    """Texts wrap in both forms; a word that no browser would break may break anywhere."""
    df = pd.DataFrame({"text": ["very well " * 20, "!" * 200], "n": [1, 2]})
    table = report.show(df, "c")
    widths = [len(line) for line in repr(table).splitlines()]
    assert max(widths) <= report.PLAIN_WIDTH + 5
    assert repr(table).count("very") == 20
    _, row_of_words, row_of_marks = cells(table)
    style_of_words, _ = row_of_words[0]
    style_of_marks, _ = row_of_marks[0]
    assert "overflow-wrap" not in style_of_words
    assert "overflow-wrap: anywhere" in style_of_marks


def test_tables_need_no_trust():
    """The shades of the verdicts stand in the cells: an untrusted notebook loses <style>."""
    table = report.show(pd.DataFrame([claim(), claim("b", None)]), "c")
    style = re.search(r"<style.*?</style>", table._repr_html_(), re.S)[0]
    assert not re.search(r"\{[^}]*\}", style)
    _, *rows = cells(table)
    for row, verdict in zip(rows, ("direction", "not run"), strict=True):
        look, _ = row[-1]
        assert look.endswith(f"; background-color: {report.SHADES[verdict]}; color: black")


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
    texts = [texts_of(row) for row in shown]
    assert [row[1] for row in texts] == ["2.6", "12", "+"], "as the paper prints them"
    assert [row[3] for row in texts] == ["2", "11", "0.123"]
    assert texts[0][4] == "1.500"
    style, _ = shown[0][1]
    assert style == "text-align: right"


def test_tables_are_stylers_of_pandas():
    table = report.show(pd.DataFrame({"a": [1.0]}), "c")
    assert isinstance(table, pd.io.formats.style.Styler)


# ---- published numbers


def test_each_published_number_has_a_public_source():
    tables = sorted(paths.PUBLISHED.glob("expo_*.csv"))
    assert len(tables) >= 8
    for path in tables:
        df = report.published(path.stem)
        assert len(df)
        assert df["source"].notna().all()
        local_paths = df["source"].str.contains(r"(?:^|\s)(?:/|~/|\.\./)")
        assert not local_paths.any(), path


def test_published_tables_are_read_as_printed():
    """Three numbers by eye from the paper's Tables 1 and 3."""
    table = report.published("expo_table1").set_index("row")
    assert table.loc["DPO 10% data + ExPO", "reward"] == 6.57
    assert table.loc["DPO 10% data + ExPO", "delta_reward"] == 2.6
    assert report.published("expo_table3")["optimal_alpha"].iloc[0] == 8
    with pytest.raises(FileNotFoundError, match="published/expo_tabel1.csv"):
        report.published("expo_tabel1")


# ---- the scoreboard


@pytest.fixture
def three_profiles(project):
    """Freeze claims: smoke and cpu ran claim a, cpu ran b; gpu ran a and left b out."""
    claims = {
        "smoke": [claim("a", (99.0, 1.5, 99.0)), claim("smoke only")],
        "cpu": [claim("a"), claim("b")],
        "gpu": [claim("a", (2.25, 1.5, 2.5)), claim("b", None)],
    }
    for profile, rows in claims.items():
        report.record(NOTEBOOK, rows, profile, keys=["score-1", "score-1"])
        freeze(project, NOTEBOOK, profile)


def test_scoreboard_prefers_the_highest_profile(three_profiles):
    board = report.scoreboard()
    assert board[["claim", "profile", "ours", "verdict"]].values.tolist() == [
        ["a", "gpu", 2.25, "direction"],
        ["b", "cpu", 2.0, "direction"],
    ]


def test_local_runs_count_only_in_the_local_scoreboard(three_profiles):
    committed = report.scoreboard()
    report.record(NOTEBOOK, [claim("a", (2.5, 1.5, 2.5))], "gpu")
    assert report.scoreboard().equals(committed)
    assert report.scoreboard(local=True)["ours"].tolist() == [2.5, 2.0]


def test_a_claim_reworded_since_the_freeze_is_a_claim_of_its_own(three_profiles):
    report.record(NOTEBOOK, [claim("a, in other words")], "gpu")
    board = report.scoreboard(local=True)
    assert board["claim"].tolist() == ["a", "b", "a, in other words"]


def test_record_returns_a_table_of_the_claims(project):
    df = report.record(NOTEBOOK, [claim(), claim("b", None)], "cpu")
    assert df["verdict"].tolist() == ["direction", "not run"]
    assert list(df.columns) == list(report.COLUMNS)


def test_record_writes_plain_json(project):
    report.record(NOTEBOOK, [claim(ours=2.0)], "cpu", keys=["k-1", "k-1", "k-2"])
    content = json.loads(report.claims_path(NOTEBOOK, "cpu").read_text())
    assert content["keys"] == ["k-1", "k-2"]
    (row,) = content["claims"]
    assert row["low"] is None
    assert row["verdict"] == "direction"


def test_record_refuses_an_unknown_profile(project):
    with pytest.raises(ValueError, match="profile 'cup'"):
        report.record(NOTEBOOK, [claim()], "cup")


def test_the_readme_shows_the_frozen_scoreboard(tmp_path):
    """The README was updated after the last freeze."""
    text = (paths.ROOT / "README.md").read_text(encoding="utf-8")
    copy = tmp_path / "README.md"
    copy.write_text(text, encoding="utf-8")
    assert not report.update_readme(copy)


def test_update_readme(project):
    """The notebook's first claim says how many hold; the fold has all claims."""
    report.record(NOTEBOOK, [claim("a | b"), claim("c", None)], "cpu")
    freeze(project, NOTEBOOK, "cpu")
    readme = project / "README.md"
    readme.write_text("# T\n<!-- scoreboard -->\nold\n<!-- /scoreboard -->\nend\n")
    assert report.update_readme() is True
    text = readme.read_text()
    assert text.startswith("# T\n<!-- scoreboard -->\n| claim |")
    assert text.endswith("<!-- /scoreboard -->\nend\n")
    assert "\nold\n" not in text
    link = "[11_expo_headline](notebooks/11_expo_headline.ipynb)"
    first = "| a \\| b | +2.6 | +2 [+1.5, +2.5] | cpu | direction"
    second = "| c | +2.6 | – | cpu | not run"
    shown, _, fold = text.partition("<summary>All 2 claims</summary>")
    assert f"{first} (1 of 2 hold) | {link} |" in shown
    assert "| c |" not in shown
    assert f"{first} | {link} |" in fold
    assert f"{second} | {link} |" in fold
    assert text.count("| a ") == 2
    assert text.count("| c |") == 1
    assert report.update_readme() is False
    assert readme.read_text() == text


def test_update_readme_needs_one_pair_of_markers(project):
    (project / "README.md").write_text("# T\n<!-- scoreboard -->\n")
    with pytest.raises(ValueError, match="README.md needs one"):
        report.update_readme()


# ---- the command


@pytest.fixture
def command(project):
    """Return a function that runs the command in the project and returns what it prints."""
    environment = os.environ | {"BEYOND_DPO_ROOT": str(project)}
    environment.pop("BEYOND_DPO_ARTIFACTS", None)

    def printed(*arguments: str) -> str:
        done = subprocess.run(
            [*COMMAND, *arguments], capture_output=True, text=True, env=environment, check=True
        )
        return done.stdout

    return printed


def test_the_command_shows_local_claims_on_request(command):
    assert command() == NO_CLAIM
    report.record(NOTEBOOK, [claim()], "cpu")
    assert command() == NO_CLAIM
    shown = command("--local")
    assert "ExPO lifts DPO" in shown
    assert "direction" in shown


def test_the_command_updates_the_readme(command, project):
    (project / "README.md").write_text("<!-- scoreboard -->\n<!-- scoreboard -->\n")
    assert command("--readme").endswith("README.md updated\n")
    assert command("--readme").endswith("README.md was up to date\n")


def test_the_command_shows_one_notebook_by_its_stem_or_number(command):
    report.record(NOTEBOOK, [claim()], "cpu")
    shown = command("--local", NOTEBOOK)
    assert "ExPO lifts DPO" in shown
    assert command("--local", NOTEBOOK[:2]) == shown
    assert command("--local", "99") == NO_CLAIM


def test_a_report_that_has_no_place_says_so_in_one_line(project):
    environment = os.environ | {"BEYOND_DPO_ROOT": str(project)}
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            COMMAND, stdout=full, stderr=subprocess.PIPE, text=True, env=environment
        )
    assert done.returncode == 1
    assert done.stderr == "the output cannot be written: No space left on device\n"


def test_light_imports():
    heavy = {"torch", "transformers", "vllm", "deepspeed"}
    code = f"import sys, beyond_dpo.notebook.report; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "set()"
