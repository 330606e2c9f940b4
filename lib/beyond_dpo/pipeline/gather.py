"""Results of many models in one table, computed in an order that keeps engines alive."""

import json
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from beyond_dpo import events
from beyond_dpo.files import write_file
from beyond_dpo.pipeline import needs
from beyond_dpo.pipeline.artifacts import Artifact


class Point(NamedTuple):
    """A model at an α: its place in the table, and the scores of its responses."""

    columns: dict  # that say which it is, such as {"model": "DPO", "alpha": 2.0}
    scores: Artifact


def watched(items: Iterable, desc: str) -> Iterator:
    """Yield the items under a progress bar, and tell the batch runner."""
    items = list(items)
    total = len(items)
    began = time.monotonic()
    with events.Bar(total, desc) as bar:
        for item in items:
            yield item
            bar.update(1)
            seconds = time.monotonic() - began
            events.announce(desc, bar.done, total, seconds)


def scored(points: list[Point], desc: str) -> tuple[pd.DataFrame, list[dict]]:
    """Get the scores of every point: a row for each response, and a record of each point.

    A record has the point's columns and the facts of its scores. Trainings that are missing all
    come first. "gold" is the reward that made the pairs, also where no labels train one of that
    name.
    """
    train(scores_of(points))
    frames = []
    facts = []
    for columns, scores in watched(points, desc):
        responses = _responses(scores)
        frames.append(responses.assign(**columns))
        measured = scores.manifest["facts"]
        facts.append({**columns, **measured})
    table = pd.concat(frames, ignore_index=True)
    if "gold" not in table:
        table["gold"] = table["reward"]
    return table, facts


def train(results: Iterable[Artifact]) -> None:
    """Run the trainings that results lack: later they would end the engine that samples."""
    missing = {}
    for result in results:
        missing.update(result.missing())
    for artifact in missing.values():
        if artifact.stage == "train":
            artifact.get()


def _responses(scores: Artifact) -> pd.DataFrame:
    """Return a row for each response that was scored, with its log-ratio to the SFT model (nats).

    Prompts are numbered: no row of the data set, not even its name, leaves artifacts/.
    """
    table = read_lines(scores, "scores.jsonl")
    logratio = table["logp"] - table["logp_sft"]
    numbers, _ = pd.factorize(table["id"])
    table["logratio"] = logratio.round(4)
    table["prompt"] = numbers
    return table.drop(columns=["id", "logp", "logp_sft"])


def judged(cfg, points: list[Point]) -> Artifact:
    """Gather the scores of trained models: responses.csv.gz and points.json, as of write()."""

    def make(out: Path) -> None:
        needs.check(cfg)
        table, facts = scored(points, "trained models")
        write(out, table, facts)

    places = [columns for columns, _ in points]
    inputs = {"places": places, "points": scores_of(points)}
    return Artifact("judged", version=1, inputs=inputs, make=make, hours=cfg.needs.hours)


def scores_of(points: list[Point]) -> list[Artifact]:
    """Return the scores of every point, for the inputs of what is made from them."""
    return [scores for _, scores in points]


def keys(points: list[Point]) -> list[dict]:
    """Return each point with the key of its scores, for the facts of the stage that chose it."""
    named = []
    for columns, scores in points:
        named.append({**columns, "key": scores.key})
    return named


def write(out: Path, table: pd.DataFrame, facts: list[dict]) -> None:
    """Write what scored() returns: responses.csv.gz and points.json."""
    write_table(out / "responses.csv.gz", table)
    write_json(out / "points.json", facts)


def read_lines(artifact: Artifact, name: str) -> pd.DataFrame:
    """Return a table of a result's file of JSON lines.

    Ids stay the texts that they are: pandas would read those of digits as numbers.
    """
    file = artifact.get() / name
    return pd.read_json(file, lines=True, dtype={"id": str})


def write_table(file: Path, table: pd.DataFrame) -> None:
    """Write a table as .csv, or .csv.gz by the file's name; the same bytes each time."""
    compression = None
    if file.suffix == ".gz":
        compression = {"method": "gzip", "mtime": 0}
    table.to_csv(file, index=False, compression=compression)


def write_json(file: Path, value, indent: int | None = None) -> None:
    """Write a value as JSON; the file appears whole or not at all."""
    write_file(file, json.dumps(value, indent=indent))
