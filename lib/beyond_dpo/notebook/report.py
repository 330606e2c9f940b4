"""Compare our numbers with the papers': verdicts, tables for notebooks, and the README's
scoreboard.
"""

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

PROFILES = (
    "paper",
    "gpu",
    "cpu",
    "smoke",
)  # the scoreboard shows a claim once, from the first of these that was run
COLUMNS = (
    "claim",
    "paper",
    "paper_source",
    "ours",
    "low",
    "high",
    "tolerance",
    "sign_only",
    "verdict",
)
MARKERS = re.compile(r"(<!-- scoreboard -->).*?(<!-- /?scoreboard -->)", re.DOTALL)
TRIALS = "trials"  # the folder of claims made with changed parameters
SIGNS = {"+": 1.0, "-": -1.0}  # a direction that a paper states without a number
SHADES = {
    "reproduced": "#d5ecd9",
    "direction": "#e3edf7",
    "not reproduced": "#f8dcd3",
    "not run": "#eeeeee",
}


# What a notebook's tables call the columns of our data; any other name is shown with spaces for
# underscores.
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
CELL = re.compile(r'class="(?:data row(\d+)|col_heading level0) col(\d+)"')  # of a Styler's HTML
LONG_WORD = 30  # characters, above which a word may be broken anywhere
PLAIN_WIDTH = 44  # characters of a column in the text form, where longer texts are wrapped


class Table(Styler):
    """Show a table of texts: as HTML with its look in each cell, so that it needs no trust, and as
    plain text.
    """

    left: frozenset[int] = frozenset()  # places of the columns that hold texts, not numbers

    def __repr__(self) -> str:
        rows = [list(self.data.columns), *self.data.values.tolist()]
        wrapped = [[textwrap.wrap(cell, PLAIN_WIDTH) or [""] for cell in row] for row in rows]
        widths = [
            max(len(line) for row in wrapped for line in row[j]) for j in range(self.data.shape[1])
        ]
        lines = []
        for row in wrapped:
            for parts in itertools.zip_longest(*row, fillvalue=""):
                aligned = [self._aligned(j, part, widths[j]) for j, part in enumerate(parts)]
                lines.append("  ".join(aligned).rstrip())
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return CELL.sub(
            lambda cell: f'{cell[0]} style="{self._look(cell[1], int(cell[2]))}"',
            super()._repr_html_(),
        )

    def _aligned(self, column: int, text: str, width: int) -> str:
        return text.ljust(width) if column in self.left else text.rjust(width)

    def _look(self, row: str | None, column: int) -> str:
        """Return the CSS of a cell; row: None for a heading."""
        look = "text-align: left" if column in self.left else "text-align: right"
        if (
            row is not None
            and max(map(len, self.data.iloc[int(row), column].split()), default=0) > LONG_WORD
        ):
            look += "; overflow-wrap: anywhere"
        if row is not None and self.data.columns[column] == "verdict":
            shade = SHADES.get(self.data.iloc[int(row), column])
            look += f"; background-color: {shade}; color: black" if shade else ""
        return look


def published(name: str) -> pd.DataFrame:
    """Return data/published/<name>.csv: numbers as a paper prints them, each with its source."""
    return pd.read_csv(paths.PUBLISHED / f"{name}.csv")


def verdict(paper, ours, low=None, high=None, *, tolerance=None, sign_only: bool = False) -> str:
    """Judge one effect, a signed difference in the claim's unit, by one rule for all notebooks.

    reproduced: same sign as the paper's effect, which lies in our interval [low, high] or within
    `tolerance` of ours;
    direction: same sign and the interval excludes 0; not run: `ours` is None; otherwise not
    reproduced.
    low, high: None for a number without uncertainty. sign_only: only the sign of `paper` is
    comparable (another scale, or read off a figure), so "direction" is the best verdict. A paper's
    effect of 0 has no direction to share.
    paper: "+" or "-" where the paper states a direction and prints no number; None where what it
    found is not public. Raises ValueError for NaN, for low > high, a negative tolerance, and a
    missing or zero sign with sign_only.
    The verdict is the same when all signs are turned.
    """
    if ours is None or paper is None:
        return "not run" if ours is None else "value not known"
    if paper in SIGNS:
        paper, sign_only = SIGNS[paper], True
    low, high = ours if low is None else low, ours if high is None else high
    numbers = {"paper": paper, "ours": ours, "low": low, "high": high, "tolerance": tolerance or 0}
    finite = all(map(math.isfinite, numbers.values()))
    if not finite or low > high or numbers["tolerance"] < 0 or (sign_only and paper == 0):
        rule = "needs finite numbers, low <= high, tolerance >= 0, and a sign where sign_only"
        raise ValueError(f"{rule}: {numbers}, {sign_only=}")
    same_sign = paper * ours > 0
    near = low <= paper <= high or abs(ours - paper) <= numbers["tolerance"] * (1 + 1e-9)
    if near and not sign_only and (same_sign or paper == 0):
        return "reproduced"
    return "direction" if same_sign and (low > 0 or high < 0) else "not reproduced"


def claim(text: str, paper, source: str, ours, *, tolerance=None, sign_only: bool = False) -> dict:
    """Return a claim with its verdict: what it says, the paper's number or sign, where it is
    printed, and ours.

    ours: (mean, low, high), as the functions of `stats` return it, a number without an interval, or
    None (not run).
    tolerance, sign_only: see `verdict`, whose ValueError gets the claim's text in front.
    """
    mean, low, high = (
        ours if isinstance(ours, tuple) else (ours if ours is None else float(ours), None, None)
    )
    try:
        judged = verdict(paper, mean, low, high, tolerance=tolerance, sign_only=sign_only)
    except ValueError as error:
        raise ValueError(f"claim {text!r}: {error}") from None
    return dict(
        zip(
            COLUMNS,
            (text, paper, source, mean, low, high, tolerance, sign_only, judged),
            strict=True,
        )
    )


def card(config, experiment: str = ""):
    """Return what differs between `config` and profile paper, as a table for a notebook's set-up
    cell.
    """
    paper = next(
        name for name, schema in configuration.SCHEMAS.items() if isinstance(config, schema)
    )
    rows = configuration.differences(config, configuration.load(paper, "paper", experiment))
    here = "here" if config.profile == "paper" else f"profile {config.profile}"
    df = pd.DataFrame(rows, columns=["setting", here, "profile paper"]).map(str)
    long = 'style="display: block; max-height: 18em; overflow: auto"'
    return show(
        df, "Where it differs from profile paper (ours where none is stated)"
    ).set_table_attributes(long)


def show(df: pd.DataFrame, caption: str) -> Table:
    """Return `df` as a table for a notebook: texts to the left, headings to read, the same bytes in
    each run.

    The numbers of a column share their decimals, three at most, none where all are whole. Claims
    have units of their
    own: there each number stands for itself, the paper's with the decimals it needs, ours with
    three or none. Names of columns become HEADINGS. The columns tolerance and sign_only appear only
    where a claim uses them.
    Raises ValueError where two columns would have one heading.
    """
    df = df.drop(
        columns=[
            name for name in ("tolerance", "sign_only") if name in df and not (df[name] > 0).any()
        ]
    )
    claims = "verdict" in df
    texts = pd.DataFrame({name: _texts(df[name], claims) for name in df.columns}, dtype=object)
    texts.columns = [HEADINGS.get(name, str(name).replace("_", " ")) for name in df.columns]
    if texts.columns.has_duplicates:
        raise ValueError(f"two columns of one heading: {', '.join(texts.columns)}")
    uuid = hashlib.sha256(caption.encode()).hexdigest()[:8]
    table = Table(texts, uuid=uuid, caption=html.escape(caption), cell_ids=False)
    table.left = frozenset(j for j, name in enumerate(df.columns) if _holds_text(df[name]))
    table.hide(axis="index").format(escape="html").format_index(axis=1, escape="html")
    return table


def _holds_text(column: pd.Series) -> bool:
    """Return whether a column holds words; a sign or a missing value among numbers is none."""
    return any(isinstance(value, str) and value not in SIGNS for value in column)


def _texts(column: pd.Series, claims: bool) -> list[str]:
    """Return what a table shows of each value of a column; claims: of a table of claims."""
    shared = max((_decimals(float(value)) for value in column if _is_number(value)), default=0)
    texts = []
    for value in column:
        decimals = _decimals(float(value)) if _is_number(value) and claims else shared
        if claims and column.name != "paper" and decimals:
            decimals = 3
        if isinstance(value, bool | np.bool_):
            texts.append("yes" if value else "no")
        elif _is_number(value):
            text = f"{value:.{decimals}f}"
            texts.append(text.removeprefix("-") if float(text) == 0 else text)
        elif value is None or value is pd.NA or value is pd.NaT or isinstance(value, float):
            texts.append("–")
        else:
            texts.append(str(value))
    return texts


def _is_number(value) -> bool:
    return (
        isinstance(value, numbers.Real)
        and not isinstance(value, bool | np.bool_)
        and math.isfinite(value)
    )


def _decimals(number: float) -> int:
    """Return how many decimals show a number, three at most; what float arithmetic leaves in the
    tenth counts not.
    """
    for decimals in range(3):
        if abs(number - round(number, decimals)) < 1e-9:
            return decimals
    return 3


def record(
    notebook: str, claims: Iterable[dict], profile: str, *, keys: Iterable[str] = ()
) -> pd.DataFrame:
    """Store a notebook's claims for the scoreboard and return them as a table.

    claims: as `claim` returns them. keys: of the artifacts behind the numbers, copied by `run
    --freeze`.
    Writes artifacts/runs/claims/<notebook>.<profile>.json. With other parameters than the committed
    ones, but for the
    profile, they are no claims of the project: it writes artifacts/runs/trials/… and says so.
    Raises ValueError for an unknown profile.
    """
    if profile not in PROFILES:
        raise ValueError(f"profile {profile!r} is none of {PROFILES}")
    df = pd.DataFrame(claims, columns=list(COLUMNS)).astype(dict.fromkeys(COLUMNS[3:-2], float))
    rows = json.loads(
        df.to_json(orient="records", double_precision=6)
    )  # a missing number becomes null
    content = {
        "notebook": notebook,
        "profile": profile,
        "keys": list(dict.fromkeys(keys)),
        "claims": rows,
    }
    path = claims_path(notebook, profile)
    write_file(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    words = ", ".join(parameters.changed(notebook).values())
    if words and path.parent.name == TRIALS:
        print(
            f"{notebook}: claimed with {words}; it is in {path.parent}, and no scoreboard counts it"
        )
    return df


def claims_path(notebook: str, profile: str) -> Path:
    """Return where a notebook's claims of a local run are stored: `trials` where parameters were
    changed.
    """
    changed = set(parameters.changed(notebook)) - {"profile"}  # each profile has claims of its own
    folder = TRIALS if changed else os.environ.get("BEYOND_DPO_CLAIMS", "claims")
    return paths.ARTIFACTS / "runs" / folder / f"{notebook}.{profile}.json"


def scoreboard(local: bool = False) -> pd.DataFrame:
    """Return claim, paper, ours, low, high, profile, verdict, notebook of every recorded claim.

    Each claim once, from the highest profile in which it was run; smoke runs mean nothing and are
    left out. Reads data/frozen/claims, with `local` also the runs of this machine, which win at the
    same profile.
    """
    folders = [paths.FROZEN / "claims"] + [paths.ARTIFACTS / "runs" / "claims"] * local
    best: dict[tuple, dict] = {}
    files = {
        path.name: path for folder in folders for path in sorted(folder.glob("*.json"))
    }  # local ones replace
    for path in files.values():
        content = json.loads(path.read_text(encoding="utf-8"))
        rank, notebook = PROFILES.index(content["profile"]), content["notebook"]
        for row in content["claims"] if content["profile"] != "smoke" else []:
            line = row | {
                "profile": content["profile"],
                "notebook": notebook,
                "rank": (row["ours"] is None, rank),
            }
            if (old := best.get((notebook, row["claim"]))) is None or line["rank"] <= old["rank"]:
                best[notebook, row["claim"]] = line
    columns = ["claim", "paper", "ours", "low", "high", "profile", "verdict", "notebook"]
    return pd.DataFrame(
        [best[place] for place in sorted(best, key=lambda place: place[0])], columns=columns
    )


def update_readme(path: Path | None = None) -> bool:
    """Rewrite what is between `<!-- scoreboard -->` and `<!-- /scoreboard -->`; return whether it
    changed.

    Each notebook's first claim stands in the open, with how many of its claims hold; a fold has all
    of them.
    path: default README.md of the project. Raises ValueError unless the file has exactly one such
    pair. Doing it again changes nothing.
    """
    path = path or paths.ROOT / "README.md"
    text = path.read_text(encoding="utf-8")
    if len(MARKERS.findall(text)) != 1:
        raise ValueError(
            f"{path} needs one `<!-- scoreboard -->` ... `<!-- /scoreboard -->` for the table to "
            "go to"
        )
    board = _readable(scoreboard())
    known = board[board["verdict"] != "value not known"]  # where there is something to hold
    holds = (
        known["verdict"]
        .isin(["reproduced", "direction"])
        .groupby(known["notebook"])
        .agg(["sum", "size"])
    )
    first = board.drop_duplicates("notebook").set_index("notebook", drop=False)
    counts = holds["sum"].map(" ({} of ".format) + holds["size"].map("{} hold)".format)
    first["verdict"] += counts.reindex(first.index, fill_value="")
    fold = [
        f"<details><summary>All {len(board)} claims</summary>",
        "",
        *_markdown(board),
        "",
        "</details>",
    ]
    lines = [*_markdown(first), "", *fold]
    new = MARKERS.sub(lambda match: "\n".join([match[1], *lines, match[2]]), text)
    if new != text:
        write_file(path, new)
    return new != text


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
        asked = [name.removesuffix(".ipynb") for name in options.notebooks]
        wanted = df["notebook"].map(
            lambda stem: any(stem == name or stem.startswith(f"{name}_") for name in asked)
        )
        df = df[wanted]
    fine = events.show(df.to_string(index=False) if len(df) else "No claim has been recorded yet.")
    if options.readme:
        fine = (
            events.show("README.md updated" if update_readme() else "README.md was up to date")
            and fine
        )
    if not fine:
        sys.exit(1)


def _readable(df: pd.DataFrame) -> pd.DataFrame:
    text = df[["paper", "ours", "low", "high"]].map(
        lambda x: x if isinstance(x, str) else "–" if pd.isna(x) else f"{x:+.3g}"
    )
    interval = (" [" + text["low"] + ", " + text["high"] + "]").where(text["low"] != "–", "")
    return df.assign(paper=text["paper"], ours=text["ours"] + interval).drop(
        columns=["low", "high"]
    )


def _markdown(board: pd.DataFrame) -> list[str]:
    lines = [
        "| claim | paper | ours [95 % interval] | profile | verdict | notebook |",
        "|---|---|---|---|---|---|",
    ]
    for row in board.to_dict("records"):
        row["notebook"] = f"[{row['notebook']}](notebooks/{row['notebook']}.ipynb)"
        lines.append(
            "| "
            + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row.values())
            + " |"
        )
    return lines


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("interrupted: nothing is half written; run it again", file=sys.stderr)
        sys.exit(130)
