"""Compare our numbers with the papers': verdicts, tables for notebooks, the README's scoreboard."""

import argparse
import hashlib
import html
import itertools
import json
import math
import numbers
import os
import re
import sys
import textwrap
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd
from pandas.io.formats.style import Styler

from beyond_dpo import events
from beyond_dpo.files import write_file
from beyond_dpo.machine import paths
from beyond_dpo.notebook import parameters
from beyond_dpo.pipeline import config as configuration

# The scoreboard shows a claim once, from the first of these in which it was run.
PROFILES = ("paper", "gpu", "cpu", "smoke")
NUMBERS = ("ours", "low", "high", "tolerance")  # the columns of a claim that hold our numbers
COLUMNS = ("claim", "paper", "paper_source", *NUMBERS, "sign_only", "verdict")
BOARD = ("claim", "paper", "ours", "low", "high", "profile", "verdict", "notebook")
MARKERS = re.compile(r"(<!-- scoreboard -->).*?(<!-- /?scoreboard -->)", re.DOTALL)
TRIALS = "trials"  # the folder of claims made with changed parameters
SIGNS = {"+": 1.0, "-": -1.0}  # a direction that a paper states without a number
ROUNDING = 1e-9  # what float arithmetic may leave over where a number should be met exactly
SHADES = {
    "reproduced": "#d5ecd9",
    "direction": "#e3edf7",
    "not reproduced": "#f8dcd3",
    "not run": "#eeeeee",
}


# What a notebook's tables call the columns of our data. Any other name is shown with spaces in
# place of its underscores.
HEADINGS = {
    "paper_source": "where the paper has it",
    "low": "95 % low",
    "high": "95 % high",
    "sign_only": "sign only",
    "fraction": "share of the pairs",
    "alpha": "α",
    "α_max": "largest α",
    "beta": "β",
    "gamma": "γ",
    "lr": "learning rate",
    "gold": "gold reward",
    "reward": "reward model",
    "vader": "VADER",
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
    "auc": "AUC",
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
        if self.data.columns[column] == "verdict" and text in SHADES:
            look += f"; background-color: {SHADES[text]}; color: black"
        return look

    def _aligned(self, column: int, text: str, width: int) -> str:
        return text.ljust(width) if column in self.left else text.rjust(width)


def _wrapped(text: str) -> list[str]:
    """Return the lines of a cell in the text form, at least one."""
    return textwrap.wrap(text, PLAIN_WIDTH) or [""]


# ---- claims


def published(name: str) -> pd.DataFrame:
    """Return data/published/<name>.csv: numbers as a paper prints them, each with its source."""
    return pd.read_csv(paths.PUBLISHED / f"{name}.csv")


def verdict(paper, ours, low=None, high=None, *, tolerance=None, sign_only: bool = False) -> str:
    """Judge one effect, a signed difference in the claim's unit, by one rule for all notebooks.

    - reproduced: the paper's effect has the same sign, and lies in our interval [low, high] or
      within `tolerance` of ours. An effect of 0 in the paper has no sign to share.
    - direction: the same sign, and the interval excludes 0.
    - not run: `ours` is None.
    - value not known: `paper` is None.
    - not reproduced: otherwise.

    The verdict is the same when all signs are turned.

    Args:
        paper: a number; "+" or "-" where the paper states a direction and prints no number; None
            where what it found is not public.
        ours: our number, or None.
        low, high: None for a number without uncertainty.
        tolerance: at least 0; None is 0.
        sign_only: only the sign of `paper` is comparable (another scale, or read off a figure), so
            "direction" is the best verdict.

    Raises:
        ValueError: for NaN, for low > high, for a negative tolerance, and for a missing or zero
            sign with sign_only.
    """
    if ours is None:
        return "not run"
    if paper is None:
        return "value not known"
    if paper in SIGNS:
        paper = SIGNS[paper]
        sign_only = True
    low = ours if low is None else low
    high = ours if high is None else high
    tolerance = tolerance or 0
    effect = {"paper": paper, "ours": ours, "low": low, "high": high, "tolerance": tolerance}
    finite = all(math.isfinite(number) for number in effect.values())
    if not finite or low > high or tolerance < 0 or (sign_only and paper == 0):
        rule = "needs finite numbers, low <= high, tolerance >= 0, and a sign where sign_only"
        raise ValueError(f"{rule}: {effect}, {sign_only=}")

    same_sign = paper * ours > 0
    near = low <= paper <= high or abs(ours - paper) <= tolerance * (1 + ROUNDING)
    if near and not sign_only and (same_sign or paper == 0):
        return "reproduced"
    if same_sign and (low > 0 or high < 0):
        return "direction"
    return "not reproduced"


def claim(text: str, paper, source: str, ours, *, tolerance=None, sign_only: bool = False) -> dict:
    """Return a claim with its verdict: {column: value} of COLUMNS.

    Args:
        text: what the claim says.
        paper: the paper's number or sign.
        source: where the paper has it.
        ours: (mean, low, high), as the functions of `stats` return it, a number without an
            interval, or None (not run).
        tolerance, sign_only: see `verdict`.

    Raises:
        ValueError: as `verdict` does, with the claim's text in front.
    """
    mean = ours
    low = None
    high = None
    if isinstance(ours, tuple):
        mean, low, high = ours
    elif ours is not None:
        mean = float(ours)
    try:
        judged = verdict(paper, mean, low, high, tolerance=tolerance, sign_only=sign_only)
    except ValueError as error:
        raise ValueError(f"claim {text!r}: {error}") from None
    return {
        "claim": text,
        "paper": paper,
        "paper_source": source,
        "ours": mean,
        "low": low,
        "high": high,
        "tolerance": tolerance,
        "sign_only": sign_only,
        "verdict": judged,
    }


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

    Texts stand left, numbers right, and names of columns become HEADINGS. The columns tolerance and
    sign_only appear only where a claim uses them.

    The numbers of a column share their decimals, three at most, none where all are whole. Claims
    have units of their own: there each number stands for itself, the paper's with the decimals it
    needs, ours with three or none.

    Raises:
        ValueError: where two columns would have one heading.
    """
    for name in ("tolerance", "sign_only"):
        if name in df and not (df[name] > 0).any():
            df = df.drop(columns=name)
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


# ---- the scoreboard


def record(
    notebook: str, claims: Iterable[dict], profile: str, *, keys: Iterable[str] = ()
) -> pd.DataFrame:
    """Store a notebook's claims for the scoreboard and return them as a table.

    They go to artifacts/runs/claims/<notebook>.<profile>.json. Where a parameter other than the
    profile is not as committed they are no claims of the project: they go to
    artifacts/runs/trials, and that is printed.

    Args:
        claims: as `claim` returns them.
        keys: of the artifacts behind the numbers, which `run --freeze` copies.

    Raises:
        ValueError: for an unknown profile.
    """
    if profile not in PROFILES:
        raise ValueError(f"profile {profile!r} is none of {PROFILES}")
    df = pd.DataFrame(claims, columns=list(COLUMNS))
    df = df.astype(dict.fromkeys(NUMBERS, float))
    content = {
        "notebook": notebook,
        "profile": profile,
        "keys": list(dict.fromkeys(keys)),
        # Through pandas, which writes null for a missing number.
        "claims": json.loads(df.to_json(orient="records", double_precision=6)),
    }
    path = claims_path(notebook, profile)
    write_file(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    changes = ", ".join(parameters.changed(notebook).values())
    if changes and path.parent.name == TRIALS:
        folder = path.parent
        print(f"{notebook}: claimed with {changes}; it is in {folder}, and no scoreboard counts it")
    return df


def claims_path(notebook: str, profile: str) -> Path:
    """Return where a local run stores a notebook's claims: in TRIALS if parameters were changed."""
    changed = set(parameters.changed(notebook))
    changed.discard("profile")  # each profile has claims of its own
    folder = TRIALS if changed else os.environ.get("BEYOND_DPO_CLAIMS", "claims")
    return paths.ARTIFACTS / "runs" / folder / f"{notebook}.{profile}.json"


def scoreboard(local: bool = False) -> pd.DataFrame:
    """Return every recorded claim with the columns BOARD, in the order of the notebooks.

    Each claim stands there once, from the highest profile in which it was run. Smoke runs mean
    nothing and are left out.

    Args:
        local: count not only data/frozen/claims but also the runs of this machine, which win at
            the same profile.
    """
    best: dict[tuple[str, str], dict] = {}
    ranks = {}
    for content in _recorded(local):
        profile = content["profile"]
        notebook = content["notebook"]
        order = PROFILES.index(profile)
        if profile == "smoke":
            continue
        for row in content["claims"]:
            key = (notebook, row["claim"])
            rank = (row["ours"] is None, order)  # smaller is better
            if key not in best or rank <= ranks[key]:
                best[key] = {**row, "profile": profile, "notebook": notebook}
                ranks[key] = rank
    rows = sorted(best.values(), key=lambda row: row["notebook"])
    return pd.DataFrame(rows, columns=list(BOARD))


def _recorded(local: bool) -> list[dict]:
    """Return what the files of claims hold; local ones stand in place of frozen ones."""
    folders = [paths.FROZEN / "claims"]
    if local:
        folders.append(paths.ARTIFACTS / "runs" / "claims")
    files = {}
    for folder in folders:
        for path in sorted(folder.glob("*.json")):
            files[path.name] = path
    return [json.loads(path.read_text(encoding="utf-8")) for path in files.values()]


def update_readme(path: Path | None = None) -> bool:
    """Rewrite the README's scoreboard; return whether it changed.

    It stands between `<!-- scoreboard -->` and `<!-- /scoreboard -->`. Each notebook's first claim
    is in the open, with how many of its claims hold; a fold has all of them. Doing it again changes
    nothing.

    Args:
        path: default README.md of the project.

    Raises:
        ValueError: unless the file has exactly one such pair.
    """
    path = path or paths.ROOT / "README.md"
    text = path.read_text(encoding="utf-8")
    if len(MARKERS.findall(text)) != 1:
        raise ValueError(
            f"{path} needs one `<!-- scoreboard -->` ... `<!-- /scoreboard -->` for the table to "
            "go to"
        )
    board = _readable(scoreboard())
    lines = [
        *_markdown(_headlines(board)),
        "",
        f"<details><summary>All {len(board)} claims</summary>",
        "",
        *_markdown(board),
        "",
        "</details>",
    ]
    table = "\n".join(lines)
    new = MARKERS.sub(lambda markers: f"{markers[1]}\n{table}\n{markers[2]}", text)
    if new == text:
        return False
    write_file(path, new)
    return True


def _headlines(board: pd.DataFrame) -> pd.DataFrame:
    """Return each notebook's first claim, with how many of its claims hold behind the verdict."""
    known = board[board["verdict"] != "value not known"]  # where there is something to hold
    holds = known["verdict"].isin(["reproduced", "direction"])
    counts = holds.groupby(known["notebook"]).agg(["sum", "size"])
    texts = counts["sum"].map(" ({} of ".format) + counts["size"].map("{} hold)".format)
    first = board.drop_duplicates("notebook").set_index("notebook", drop=False)
    first["verdict"] += texts.reindex(first.index, fill_value="")
    return first


def main(arguments: list[str] | None = None) -> None:
    """Print the scoreboard; `python -m beyond_dpo.notebook.report --help`."""
    parser = argparse.ArgumentParser(
        prog="python -m beyond_dpo.notebook.report", description="Print the scoreboard."
    )
    parser.add_argument("notebooks", nargs="*", help="number prefix or stem; none: all")
    parser.add_argument(
        "--local", action="store_true", help="count the runs of this machine as well"
    )
    parser.add_argument("--readme", action="store_true", help="update the table in README.md")
    options = parser.parse_args(arguments)
    events.printable()
    df = _readable(scoreboard(options.local))
    if options.notebooks:
        names = [name.removesuffix(".ipynb") for name in options.notebooks]
        wanted = [_is_named(stem, names) for stem in df["notebook"]]
        df = df.loc[wanted]
    text = df.to_string(index=False) if len(df) else "No claim has been recorded yet."
    written = events.show(text)
    if options.readme:
        result = "README.md updated" if update_readme() else "README.md was up to date"
        written = events.show(result) and written
    if not written:
        sys.exit(1)


def _is_named(stem: str, names: list[str]) -> bool:
    """Return whether one of the names is a notebook's stem or the number in front of it."""
    return any(stem == name or stem.startswith(f"{name}_") for name in names)


def _readable(df: pd.DataFrame) -> pd.DataFrame:
    """Return a scoreboard of texts, with the interval behind our number."""
    text = df[["paper", "ours", "low", "high"]].map(_signed)
    interval = " [" + text["low"] + ", " + text["high"] + "]"
    interval = interval.where(text["low"] != "–", "")
    df = df.assign(paper=text["paper"], ours=text["ours"] + interval)
    return df.drop(columns=["low", "high"])


def _signed(value) -> str:
    """Return a number with its sign, a dash for a missing one, and a text as it is."""
    if isinstance(value, str):
        return value
    return "–" if pd.isna(value) else f"{value:+.3g}"


def _markdown(board: pd.DataFrame) -> list[str]:
    """Return the lines of a scoreboard's Markdown table."""
    lines = [
        "| claim | paper | ours [95 % interval] | profile | verdict | notebook |",
        "|---|---|---|---|---|---|",
    ]
    for row in board.to_dict("records"):
        row["notebook"] = f"[{row['notebook']}](notebooks/{row['notebook']}.ipynb)"
        cells = [cell.replace("|", "\\|").replace("\n", " ") for cell in row.values()]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("interrupted: nothing is half written; run it again", file=sys.stderr)
        sys.exit(130)
