"""Tables that repeat byte for byte and need no trust, and the papers' numbers as printed."""

import re
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from beyond_dpo.machine import paths
from beyond_dpo.notebook import claims, report


def claim(words="ExPO lifts DPO", verdict="direction", **changes):
    """Return a judged claim, as a notebook shows it."""
    row = {"claim": words, "paper": 2.6, "paper_source": "Table 1", "ours": 2.0}
    return row | {"low": 1.5, "high": 2.5, "verdict": verdict} | changes


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
    df = pd.DataFrame([claim("a < b & <script>", ours=1.23456)])
    table = report.show(df, "caption <i>")
    html = table._repr_html_()
    assert "a &lt; b &amp; &lt;script&gt;" in html
    assert "<script>" not in html
    assert "caption &lt;i&gt;" in html
    assert "1.235" in html
    assert "1.2346" not in html
    assert "1.235" in repr(table)
    assert report.SHADES["direction"] in html


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
    table = report.show(pd.DataFrame([claim(), claim("b", "not run")]), "c")
    style = re.search(r"<style.*?</style>", table._repr_html_(), re.S)[0]
    assert not re.search(r"\{[^}]*\}", style)
    _, *rows = cells(table)
    for row, verdict in zip(rows, ("direction", "not run"), strict=True):
        look, _ = row[-1]
        assert look.endswith(f"; background-color: {report.SHADES[verdict]}; color: black")


@pytest.mark.parametrize(
    "verdict, shade",
    [
        ("reproduced", report.GREEN),
        ("equal", report.GREEN),
        ("holds", report.GREEN),
        ("smaller", report.BLUE),
        ("contradicted", report.RED),
        ("does not hold", report.RED),
        ("one training", report.GREY),
        ("inconclusive (MDE 0.12)", report.GREY),
    ],
)
def test_verdicts_are_shaded_by_what_they_say(verdict, shade):
    _, row = cells(report.show(pd.DataFrame([claim(verdict=verdict)]), "c"))
    look, text = row[-1]
    assert text == verdict
    assert f"background-color: {shade};" in look


def test_every_verdict_of_the_scoreboard_has_a_shade():
    verdicts = claims.scoreboard()["verdict"].str.partition(" (")[0]
    assert len(verdicts) > 100
    assert set(verdicts) <= set(report.SHADES)


def test_two_columns_of_one_heading_are_refused():
    with pytest.raises(ValueError, match="two columns of one heading: α, α"):
        report.show(pd.DataFrame({"alpha": [1], "α": [2]}), "c")


def test_numbers_of_claims_stand_for_themselves():
    rows = [claim("a"), claim("b", paper=12, ours=11), claim("c", paper="+", ours=0.12345)]
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


def test_light_imports():
    heavy = {"torch", "transformers", "vllm", "deepspeed"}
    code = f"import sys, beyond_dpo.notebook.report; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "set()"
