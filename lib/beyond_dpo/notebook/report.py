"""Tables for notebooks: the papers' printed numbers, configurations, results, judged claims."""

import hashlib
import html
import itertools
import math
import numbers
import re
import textwrap

import numpy as np
import pandas as pd
from pandas.io.formats.style import Styler

from beyond_dpo.machine import paths
from beyond_dpo.pipeline import config as configuration

SIGNS = ("+", "-")  # what a paper's column has where it states a direction and no number
ROUNDING = 1e-9  # what float arithmetic may leave over
GREEN = "#d5ecd9"
BLUE = "#e3edf7"
RED = "#f8dcd3"
GREY = "#eeeeee"
# Of verdicts, without what stands behind them in brackets.
SHADES = {
    "reproduced": GREEN,
    "equal": GREEN,
    "holds": GREEN,
    "direction": BLUE,
    "smaller": BLUE,
    "contradicted": RED,
    "not equal": RED,
    "does not hold": RED,
    "no effect": GREY,
    "inconclusive": GREY,
    "one training": GREY,
    "not testable here": GREY,
    "value not known": GREY,
    "not run": GREY,
}

# What a notebook's tables call the columns of our data. Any other name is shown with spaces in
# place of its underscores.
HEADINGS = {
    "paper_source": "where the paper has it",
    "low": "95 % low",
    "high": "95 % high",
    "fraction": "share of the pairs",
    "alpha": "α",
    "α_max": "largest α",
    "beta": "β",
    "gamma": "γ",
    "lr": "learning rate",
    "gold": "gold reward",
    "reward": "reward model",
    "words": "bag of words",
    "vader": "VADER",
    "person": "a person's text? (logit)",
    "ended": "share that ends by itself",
    "positive": "share of positive responses",
    "length": "length (tokens)",
    "repetition": "repeated trigrams",
    "distinct_2": "distinct bigrams",
    "logratio": "log-ratio to SFT (nats)",
    "kl": "KL (nats)",
    "split": "prompts",
    "cell": "setting",
    "ref": "taken from",
    "ask": "asked with",
    "held_out": "held-out texts",
    "trained_on": "training texts",
    "auc": "AUC, positive against negative",
    "auc_spoiled": "AUC, positive against spoiled",
    "ties_dropped": "prompts without a preference",
    "largest_passing": "largest α that passes",
    "mean_gold_gap": "mean gap of the gold reward",
    "sft_model": "SFT model",
    "optimal_alpha": "best α",
    "delta_wr": "WR gain, printed",
    "delta_lc": "LC gain, printed",
    "delta_mt": "MT-Bench gain, printed",
}
# A cell in a Styler's HTML: its row, which a heading has not, and its column.
CELL = re.compile(r'class="(?:data row(\d+)|col_heading level0) col(\d+)"')
LONG_WORD = 30  # characters, above which a word may be broken anywhere
PLAIN_WIDTH = 44  # characters of a column in the text form, where longer texts are wrapped


class Table(Styler):
    """Show a table of texts in HTML that needs no trust, and as plain text.

    The look of each cell stands in the cell, as an untrusted notebook loses <style>.
    """

    left: frozenset[int] = frozenset()  # places of the columns that hold texts, not numbers

    def __repr__(self) -> str:
        rows = [list(self.data.columns), *self.data.values.tolist()]
        wrapped = [[_wrapped(cell) for cell in row] for row in rows]
        widths = []
        for column in zip(*wrapped, strict=True):
            widths.append(max(len(line) for cell in column for line in cell))
        lines = []
        for row in wrapped:
            for parts in itertools.zip_longest(*row, fillvalue=""):
                aligned = [self._aligned(j, part, widths[j]) for j, part in enumerate(parts)]
                lines.append("  ".join(aligned).rstrip())
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return CELL.sub(self._with_look, super()._repr_html_())

    def _with_look(self, cell: re.Match) -> str:
        """Return the attributes of an HTML cell with its CSS behind them."""
        row, column = cell.groups()
        look = self._look(row, int(column))
        return f'{cell[0]} style="{look}"'

    def _look(self, row: str | None, column: int) -> str:
        """Return the CSS of a cell; row: None for a heading."""
        look = "text-align: left" if column in self.left else "text-align: right"
        if row is None:
            return look
        text = self.data.iloc[int(row), column]
        if any(len(word) > LONG_WORD for word in text.split()):
            look += "; overflow-wrap: anywhere"
        verdict, _, _ = text.partition(" (")
        if self.data.columns[column] == "verdict" and verdict in SHADES:
            look += f"; background-color: {SHADES[verdict]}; color: black"
        return look

    def _aligned(self, column: int, text: str, width: int) -> str:
        return text.ljust(width) if column in self.left else text.rjust(width)


def _wrapped(text: str) -> list[str]:
    """Return the lines of a cell in the text form, at least one."""
    return textwrap.wrap(text, PLAIN_WIDTH) or [""]


def published(name: str) -> pd.DataFrame:
    """Return data/published/<name>.csv: numbers as a paper prints them, each with its source."""
    return pd.read_csv(paths.PUBLISHED / f"{name}.csv")


# ---- tables


def card(config, experiment: str = ""):
    """Return what differs between `config` and profile paper, as a table for a set-up cell."""
    paper = next(
        name for name, schema in configuration.SCHEMAS.items() if isinstance(config, schema)
    )
    rows = configuration.differences(config, configuration.load(paper, "paper", experiment))
    here = "here" if config.profile == "paper" else f"profile {config.profile}"
    df = pd.DataFrame(rows, columns=["setting", here, "profile paper"]).map(str)
    table = show(df, "Where it differs from profile paper (ours where none is stated)")
    # A long card gets a scroll bar.
    return table.set_table_attributes('style="display: block; max-height: 18em; overflow: auto"')


def show(df: pd.DataFrame, caption: str) -> Table:
    """Return `df` as a table for a notebook, the same bytes in each run.

    Texts stand left, numbers right, and names of columns become HEADINGS.

    The numbers of a column share their decimals, three at most, none where all are whole. Claims
    have units of their own: there each number stands for itself, the paper's with the decimals it
    needs, ours with three or none.

    Raises:
        ValueError: where two columns would have one heading.
    """
    claims = "verdict" in df
    texts = pd.DataFrame({name: _texts(df[name], claims) for name in df.columns}, dtype=object)
    texts.columns = [_heading(name) for name in df.columns]
    if texts.columns.has_duplicates:
        raise ValueError(f"two columns of one heading: {', '.join(texts.columns)}")
    uuid = hashlib.sha256(caption.encode()).hexdigest()[:8]
    table = Table(texts, uuid=uuid, caption=html.escape(caption), cell_ids=False)
    table.left = frozenset(j for j, name in enumerate(df.columns) if _holds_text(df[name]))
    table.hide(axis="index")
    table.format(escape="html")
    table.format_index(axis=1, escape="html")
    return table


def _heading(name) -> str:
    return HEADINGS.get(name, str(name).replace("_", " "))


def _holds_text(column: pd.Series) -> bool:
    """Return whether a column holds words; a sign or a missing value among numbers is none."""
    return any(isinstance(value, str) and value not in SIGNS for value in column)


def _texts(column: pd.Series, claims: bool) -> list[str]:
    """Return what a table shows of each value of a column.

    Args:
        claims: whether it is a table of claims.
    """
    shared = max((_decimals(float(value)) for value in column if _is_number(value)), default=0)
    texts = []
    for value in column:
        if not _is_number(value):
            texts.append(_word(value))
            continue
        decimals = shared
        if claims:
            decimals = _decimals(float(value))
            if decimals and column.name != "paper":
                decimals = 3
        texts.append(_fixed(value, decimals))
    return texts


def _word(value) -> str:
    """Return what a table shows of a value that is no finite number."""
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if value is None or value is pd.NA or value is pd.NaT or isinstance(value, float):
        return "–"
    return str(value)


def _fixed(number, decimals: int) -> str:
    """Return a number with so many decimals; never a negative zero."""
    text = f"{number:.{decimals}f}"
    return text.removeprefix("-") if float(text) == 0 else text


def _is_number(value) -> bool:
    """Return whether a value is a finite number and no truth value."""
    if isinstance(value, bool | np.bool_) or not isinstance(value, numbers.Real):
        return False
    return math.isfinite(value)


def _decimals(number: float) -> int:
    """Return how many decimals show a number, three at most."""
    for decimals in range(3):
        if abs(number - round(number, decimals)) < ROUNDING:
            return decimals
    return 3
