"""Claims: what each notebook is to show, written down before it is measured, and its verdict.

data/claims.yaml holds every claim. A notebook measures, and judge() gives the verdicts by one set
of rules. Nothing here can be told what the verdict should be.
"""

import argparse
import json
import math
import os
import re
import sys
from collections.abc import Collection, Iterable
from functools import cache
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import pandas as pd
import yaml
from pydantic import Field, TypeAdapter
from pydantic.dataclasses import dataclass

from beyond_dpo import events, stats
from beyond_dpo.files import write_file
from beyond_dpo.jobs.settings import STRICT
from beyond_dpo.machine import paths
from beyond_dpo.notebook import parameters

# The scoreboard shows a claim once, from the first of these in which it was run.
PROFILES = ("paper", "gpu", "night", "cpu", "smoke")
EXPERIMENTS = ("experiment", "beyond")  # kinds whose numbers have an error
TOLD_FROM_0 = ("reproduced", "direction", "smaller", "contradicted")
TRIALS = "trials"  # the folder of claims made with changed parameters
ROUNDING = 1e-9  # what float arithmetic may leave over where a number should be met exactly
MOST_HEADLINES = 8  # rows of the README's table
MARKERS = re.compile(r"(<!-- scoreboard -->).*?(<!-- /?scoreboard -->)", re.DOTALL)
SIGNS = {"+": 1, "-": -1}
# The columns of a table of claims, and of the scoreboard.
SHOWN = ("claim", "paper", "source", "ours", "low", "high", "trainings", "verdict")
BOARD = ("notebook", "kind", "claim", "paper", "ours", "low", "high", "trainings", "profile")

Number = Annotated[float, Field(allow_inf_nan=False)]
# Our number: an estimate, (value, low, high) of one training, a plain number, or None: not run.
Measured = stats.Estimate | tuple[float, float, float] | float | None


@dataclass(frozen=True, config=STRICT)
class Claim:
    """What is to be shown, and by which rule.

    kind: an experiment (models are trained and judged here), replayed (the paper's own experiment,
    fully specified, run again), recomputed (from data that the authors released), exact (an
    identity, or a simulation of the theory), or beyond (an experiment that no paper has).
    """

    notebook: str
    id: str
    words: str
    kind: Literal["experiment", "replayed", "recomputed", "exact", "beyond"]
    # what the paper has in the same unit: a number, a sign where it only states a direction, or
    # nothing where what it found is not public
    paper: Number | Literal["+", "-"] | None = None
    source: str = ""  # where the paper has it
    estimand: str = ""  # what is estimated, with its unit
    direction: Literal["+", "-", "0"] = "+"  # of the effect that is claimed; 0: there is none
    # size of the claimed effect, or the smallest that would matter; the verdicts are in halves and
    # doubles of it
    delta: Annotated[float, Field(gt=0)] | None = None
    because: str = ""  # why delta is what it is
    # largest distance from the paper's number, where the number has no error of its own
    tolerance: Annotated[float, Field(ge=0)] = 0.0
    seeds: int = 0  # trainings, as planned
    prompts: str = ""  # as planned
    samples: int = 0  # responses to each prompt, as planned
    gate: bool = False  # whether it counts only where the responses pass the gate (EVIDENCE)
    headline: str = ""  # its words in the README, for the few that stand there
    headline_unit: str = ""  # what stands behind our number there
    headline_percent: bool = False  # our number is a share, and shown as percent
    changed: tuple[str, ...] = ()  # what was changed after the first commit, and why

    def __post_init__(self):
        if self.kind in EXPERIMENTS and self.delta is None:
            raise ValueError(f"{self.notebook}.{self.id}: an experiment needs its delta")


class Effect(NamedTuple):
    """Our number for a claim, with what is known of its error."""

    value: float
    low: float | None = None
    high: float | None = None
    trainings: int | None = None
    p: float | None = None
    detectable: float | None = None


# ---- the claims


@cache
def all_claims(path: Path | None = None) -> dict[str, dict[str, Claim]]:
    """Return {notebook: {id: claim}} of data/claims.yaml, in the file's order.

    What stands under a notebook's `all` holds for each of its claims that does not say otherwise.
    Raises ValueError for a claim that is not as `Claim` says.
    """
    path = path or paths.ROOT / "data" / "claims.yaml"
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    adapter = TypeAdapter(Claim)
    claims = {}
    for notebook, entries in content.items():
        shared = entries.pop("all", {})
        claims[notebook] = {}
        for name, entry in entries.items():
            values = {**shared, **entry, "notebook": notebook, "id": name}
            as_json = json.dumps(values)  # pydantic takes a JSON list for a tuple
            claims[notebook][name] = adapter.validate_json(as_json)
    return claims


def of(notebook: str) -> dict[str, Claim]:
    """Return {id: claim} of a notebook. Raises ValueError where data/claims.yaml has none."""
    claims = all_claims()
    if notebook not in claims:
        raise ValueError(f"data/claims.yaml has no claims of {notebook}")
    return claims[notebook]


# ---- verdicts


def verdict(claim: Claim, effect: Effect | None, *, told: bool, gate_failed: bool = False) -> str:
    """Judge one claim by the rule of its kind.

    A wider interval never turns a verdict into a better one.

    Args:
        effect: our number, or None: not run.
        told: whether the effect is told from 0, with all claims of the notebook in mind
            (stats.discoveries).
        gate_failed: the responses are such that the reward means nothing.
    """
    if effect is None:
        return "not run"
    if claim.kind not in EXPERIMENTS:
        return _verdict_without_error(claim, effect.value)
    if gate_failed:
        return "not testable here"
    if effect.trainings is None or effect.trainings < 2:
        return "one training"
    if claim.direction == "0":
        return _verdict_of_no_difference(claim, effect, told)
    return _verdict_of_effect(claim, effect, told)


def _verdict_of_effect(claim: Claim, effect: Effect, told: bool) -> str:
    """Judge a claim that there is an effect in a direction, of about the size delta."""
    sign = SIGNS[claim.direction]
    value = sign * effect.value
    low, high = sorted([sign * effect.low, sign * effect.high])
    half = claim.delta / 2
    if told and value < 0:
        return "contradicted"
    if told and low > 0 and high < half:
        return "smaller"
    if told:
        of_its_size = half <= value <= 2 * claim.delta
        # What no paper has cannot be reproduced.
        return "reproduced" if of_its_size and claim.kind == "experiment" else "direction"
    if -half < low and high < half:
        return "no effect"
    return "inconclusive"


def _verdict_without_error(claim: Claim, value: float) -> str:
    """Judge a number that has no error of its own: is it the paper's, or of its sign?"""
    if claim.paper is None:
        return "value not known"
    if claim.paper in SIGNS:
        good = value * SIGNS[claim.paper] > 0
    else:
        good = abs(value - claim.paper) <= claim.tolerance * (1 + ROUNDING) + ROUNDING
    if claim.kind == "exact" or claim.paper in SIGNS:
        return "holds" if good else "does not hold"
    return "equal" if good else "not equal"


def _verdict_of_no_difference(claim: Claim, effect: Effect, told: bool) -> str:
    """Judge a claim that there is no difference of the size delta."""
    if -claim.delta < effect.low and effect.high < claim.delta:
        return "reproduced" if claim.kind == "experiment" else "no effect"
    return "contradicted" if told else "inconclusive"


def as_effect(measured: Measured) -> Effect | None:
    """Return what a notebook measured as an Effect; raise ValueError for what is not finite."""
    if measured is None:
        return None
    if isinstance(measured, stats.Estimate):
        effect = Effect(
            measured.value,
            measured.low,
            measured.high,
            measured.trainings,
            measured.p,
            measured.detectable,
        )
    elif isinstance(measured, tuple):
        value, low, high = measured
        effect = Effect(float(value), float(low), float(high), 1)
    else:
        effect = Effect(float(measured))
    numbers = [number for number in effect if number is not None]
    if not all(math.isfinite(number) for number in numbers):
        raise ValueError(f"not finite: {effect}")
    return effect


def judge(
    notebook: str,
    profile: str,
    measured: dict[str, Measured],
    *,
    failed_gates: Collection[str] = (),
    keys: Iterable[str] = (),
) -> pd.DataFrame:
    """Judge a notebook's claims, store them for the scoreboard, and return them as a table.

    They go to artifacts/runs/claims/<notebook>.<profile>.json. Where a parameter other than the
    profile is not as committed they are no claims of the project: they go to artifacts/runs/trials,
    and that is printed.

    Args:
        measured: our numbers by the claims' ids; a claim without one was not run.
        failed_gates: ids of claims whose responses do not pass the gate.
        keys: of the artifacts behind the numbers, which `run --freeze` copies.
    Raises:
        ValueError: for an unknown profile or id, and for numbers that are not finite.
    """
    if profile not in PROFILES:
        raise ValueError(f"profile {profile!r} is none of {PROFILES}")
    claims = of(notebook)
    unknown = {*measured, *failed_gates} - set(claims)
    if unknown:
        raise ValueError(f"data/claims.yaml has no {sorted(unknown)} under {notebook}")
    effects = {name: as_effect(measured.get(name)) for name in claims}
    told = _told_from_0(claims, effects)
    rows = []
    for name, claim in claims.items():
        judged = verdict(claim, effects[name], told=name in told, gate_failed=name in failed_gates)
        rows.append(_row(claim, effects[name], judged))
    _store(notebook, profile, rows, keys)
    return _shown(rows)


def _told_from_0(claims: dict[str, Claim], effects: dict[str, Effect | None]) -> set[str]:
    """Return the ids of the experiments whose effects are told from 0."""
    tested = []
    for name, effect in effects.items():
        if effect is not None and effect.p is not None and claims[name].kind in EXPERIMENTS:
            tested.append(name)
    told = stats.discoveries(effects[name].p for name in tested)
    return {name for name, is_told in zip(tested, told, strict=True) if is_told}


def _row(claim: Claim, effect: Effect | None, judged: str) -> dict:
    """Return a judged claim as it is stored."""
    row = {
        "id": claim.id,
        "kind": claim.kind,
        "claim": claim.words,
        "paper": claim.paper,
        "source": claim.source,
        "ours": None,
        "verdict": judged,
    }
    if effect is not None:
        numbers = {name: value for name, value in effect._asdict().items() if name != "value"}
        row |= {"ours": effect.value, **numbers}
    for name, value in row.items():
        if isinstance(value, float):
            row[name] = float(f"{value:.6g}")
    return row


def _shown(rows: list[dict]) -> pd.DataFrame:
    """Return stored claims as a notebook shows them; columns without any entry are left out."""
    df = pd.DataFrame(rows)
    df["verdict"] = [_verdict_in_words(row) for row in rows]
    columns = [name for name in SHOWN if name in df and df[name].notna().any()]
    # "source" alone is a source of WRPO in notebooks' tables
    return df[columns].rename(columns={"source": "paper_source"})


def _verdict_in_words(row: dict) -> str:
    """Return a stored verdict, of an inconclusive one with the effect that would have been seen."""
    if row["verdict"] == "inconclusive" and row.get("detectable") is not None:
        return f"inconclusive (MDE {row['detectable']:.2g})"
    return row["verdict"]


def _store(notebook: str, profile: str, rows: list[dict], keys: Iterable[str]) -> None:
    content = {
        "notebook": notebook,
        "profile": profile,
        "keys": list(dict.fromkeys(keys)),
        "claims": rows,
    }
    path = stored_at(notebook, profile)
    write_file(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    changes = ", ".join(parameters.changed(notebook).values())
    if changes and path.parent.name == TRIALS:
        folder = path.parent
        print(f"{notebook}: claimed with {changes}; it is in {folder}, and no scoreboard counts it")


def stored_at(notebook: str, profile: str) -> Path:
    """Return where a local run stores a notebook's claims: in TRIALS if parameters were changed."""
    changed = set(parameters.changed(notebook))
    changed.discard("profile")  # each profile has claims of its own
    folder = TRIALS if changed else os.environ.get("BEYOND_DPO_CLAIMS", "claims")
    return paths.ARTIFACTS / "runs" / folder / f"{notebook}.{profile}.json"


# ---- the scoreboard


def scoreboard(local: bool = False) -> pd.DataFrame:
    """Return every claim that was judged with the columns BOARD and its verdict.

    Each claim stands there once, from the highest profile in which it was run. Smoke runs mean
    nothing and are left out. They are in the order of data/claims.yaml.

    Args:
        local: count not only data/frozen/claims but also the runs of this machine, which win at
            the same profile.
    """
    folders = [paths.FROZEN / "claims"]
    if local:
        folders.append(paths.ARTIFACTS / "runs" / "claims")
    stored = _stored(folders)
    rows = []
    for notebook, claims in all_claims().items():
        for name in claims:
            row = _best(stored.get((notebook, name), {}))
            if row:
                rows.append({**row, "notebook": notebook, "verdict": _verdict_in_words(row)})
    return pd.DataFrame(rows).reindex(columns=[*BOARD, "verdict", "id"])


def _stored(folders: list[Path]) -> dict[tuple[str, str], dict[str, dict]]:
    """Return {(notebook, id): {profile: claim}} of files of claims; later folders win."""
    stored: dict = {}
    for folder in folders:
        for path in sorted(folder.glob("*.json")):
            content = json.loads(path.read_text(encoding="utf-8"))
            profile = content["profile"]
            for row in content["claims"]:
                by_profile = stored.setdefault((content["notebook"], row["id"]), {})
                by_profile[profile] = {**row, "profile": profile}
    return stored


def _best(by_profile: dict[str, dict]) -> dict | None:
    """Return a claim from the highest profile in which it was run, or else was not."""
    present = [by_profile[name] for name in PROFILES[:-1] if name in by_profile]
    run = [row for row in present if row["ours"] is not None]
    for row in [*run, *present]:
        return row
    return None


def counts(board: pd.DataFrame) -> str:
    """Return how many claims of each kind have which verdict, in one line."""
    verdicts = board["verdict"].astype(str).str.replace(r" \(.*", "", regex=True)
    parts = []
    for kind, of_kind in verdicts.groupby(board["kind"], sort=False):
        numbers = of_kind.value_counts()
        listed = ", ".join(f"{number} {name}" for name, number in numbers.items())
        parts.append(f"{kind}: {listed}")
    return "; ".join(parts)


def update_readme(path: Path | None = None) -> bool:
    """Rewrite the README's table of findings; return whether it changed.

    It stands between `<!-- scoreboard -->` and `<!-- /scoreboard -->`: the claims that have a
    headline, and under them the counts of all. Doing it again changes nothing.

    Args:
        path: default README.md of the project.
    Raises:
        ValueError: unless the file has exactly one such pair, or for too many headlines.
    """
    path = path or paths.ROOT / "README.md"
    text = path.read_text(encoding="utf-8")
    if len(MARKERS.findall(text)) != 1:
        raise ValueError(
            f"{path} needs one `<!-- scoreboard -->` ... `<!-- /scoreboard -->` for the table to "
            "go to"
        )
    table = "\n".join(_findings(scoreboard()))
    new = MARKERS.sub(lambda markers: f"{markers[1]}\n{table}\n{markers[2]}", text)
    if new == text:
        return False
    write_file(path, new)
    return True


def _findings(board: pd.DataFrame) -> list[str]:
    """Return the lines of the README's table, and of the counts below it."""
    lines = [
        "| finding | ours [95 % interval] | kind | trainings | verdict | from |",
        "|---|---|---|---|---|---|",
    ]
    for row in board.to_dict("records"):
        claim = of(row["notebook"])[row["id"]]
        if claim.headline:
            lines.append(_finding(claim, row))
    headlines = len(lines) - 2
    if headlines > MOST_HEADLINES:
        raise ValueError(f"{headlines} claims have a headline; at most {MOST_HEADLINES} fit")
    return [*lines, "", f"All {len(board)} claims, by kind: {counts(board)}."]


def _finding(claim: Claim, row: dict) -> str:
    """Return a row of the README's table; its last cell leads to the notebook."""
    number, _, _ = claim.notebook.partition("_")
    cells = [
        claim.headline,
        _in_plain_words(claim, row),
        row["kind"],
        _count(row["trainings"]),
        row["verdict"],
        f"[{number}](notebooks/{claim.notebook}.ipynb), `{row['profile']}`",
    ]
    return f"| {' | '.join(cells)} |"


def _in_plain_words(claim: Claim, row: dict) -> str:
    """Return our number for a reader: rounded, with its interval and its unit."""
    if pd.isna(row["ours"]):
        return "–"
    text = _rounded(row["ours"], claim.headline_percent)
    if claim.headline_percent:
        text += " %"
    if not pd.isna(row["low"]):
        ends = [_rounded(row[end], claim.headline_percent) for end in ("low", "high")]
        text += f" [{', '.join(ends)}]"
    return f"{text} {claim.headline_unit}".strip()


def _rounded(value: float, percent: bool) -> str:
    """Return a number with its sign and two decimals, or a share as whole percent."""
    text = f"{100 * value:+.0f}" if percent else f"{value:+.2f}"
    if float(text) == 0:
        text = text.lstrip("+-")
    return text.replace("-", "−")


def _ours(row: dict) -> str:
    """Return our number with its interval."""
    text = _signed(row["ours"])
    if pd.isna(row["low"]):
        return text
    return f"{text} [{_signed(row['low'])}, {_signed(row['high'])}]"


def _count(value) -> str:
    return "–" if pd.isna(value) else f"{value:.0f}"


def _signed(value) -> str:
    """Return a number with its sign, a dash for a missing one, and a text as it is."""
    if isinstance(value, str):
        return value
    if pd.isna(value):
        return "–"
    return "0" if abs(value) < ROUNDING else f"{value:+.3g}"


def compared() -> pd.DataFrame:
    """Return every claim that was run on this machine beside its frozen result.

    agree: a number without an error of its own is within the claim's tolerance of the frozen one;
    an effect has the frozen one's sign where that is told from 0 or one of the two has no
    interval, else the intervals overlap.
    """
    frozen = _stored([paths.FROZEN / "claims"])
    own = _stored([paths.ARTIFACTS / "runs" / "claims"])
    rows = []
    for notebook, claims in all_claims().items():
        for name, claim in claims.items():
            theirs = _best(frozen.get((notebook, name), {}))
            ours = _best(own.get((notebook, name), {}))
            if ours is None or theirs is None:
                continue
            rows.append(
                {
                    "notebook": notebook,
                    "claim": claim.words,
                    "frozen": _with_profile(theirs),
                    "yours": _with_profile(ours),
                    "agree": agree(claim, theirs, ours),
                }
            )
    return pd.DataFrame(rows, columns=["notebook", "claim", "frozen", "yours", "agree"])


def _with_profile(row: dict) -> str:
    return f"{_ours({'low': None, 'high': None, **row})} ({row['profile']})"


def agree(claim: Claim, frozen: dict, ours: dict) -> str:
    """Return "yes", "no", or "–" where one of two stored claims was not run; see compared()."""
    if frozen["ours"] is None or ours["ours"] is None:
        return "–"
    if claim.kind not in EXPERIMENTS:
        distance = abs(frozen["ours"] - ours["ours"])
        allowed = max(claim.tolerance, 1e-3 * abs(frozen["ours"]))
        return "yes" if distance <= allowed + ROUNDING else "no"
    no_interval = frozen["low"] is None or ours["low"] is None
    if frozen["verdict"] in TOLD_FROM_0 or no_interval:
        return "yes" if frozen["ours"] * ours["ours"] > 0 else "no"
    overlap = ours["low"] <= frozen["high"] and frozen["low"] <= ours["high"]
    return "yes" if overlap else "no"


def main(arguments: list[str] | None = None) -> None:
    """Print the scoreboard; `python -m beyond_dpo.notebook.claims --help`."""
    parser = argparse.ArgumentParser(
        prog="python -m beyond_dpo.notebook.claims", description="Print the scoreboard."
    )
    parser.add_argument("notebooks", nargs="*", help="number prefix or stem; none: all")
    parser.add_argument(
        "--compare", action="store_true", help="this machine's runs beside the frozen results"
    )
    parser.add_argument("--readme", action="store_true", help="update the table in README.md")
    options = parser.parse_args(arguments)
    events.printable()
    df = compared() if options.compare else readable(scoreboard())
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


def readable(board: pd.DataFrame) -> pd.DataFrame:
    """Return a scoreboard of texts, with the interval behind our number."""
    ours = [_ours(row) for row in board.to_dict("records")]
    df = board.assign(ours=ours, paper=board["paper"].map(_signed))
    df["trainings"] = board["trainings"].map(_count)
    return df.drop(columns=["low", "high", "id"])


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("interrupted: nothing is half written; run it again", file=sys.stderr)
        sys.exit(130)
