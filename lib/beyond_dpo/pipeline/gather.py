"""Results of many models in one table: computed in an order that keeps engines alive, under one
progress bar.
"""

import json
import time
from pathlib import Path

import pandas as pd

from beyond_dpo import events
from beyond_dpo.pipeline import needs
from beyond_dpo.pipeline.artifacts import Artifact


def watched(items, desc: str):
    """Yield the items under a progress bar, and tell the batch runner."""
    items, began = list(items), time.monotonic()
    with events.Bar(len(items), desc) as bar:
        for item in items:
            yield item
            bar.update(1)
            events.announce(desc, bar.done, len(items), time.monotonic() - began)


def scored(walk: list[tuple[dict, Artifact]], desc: str) -> tuple[pd.DataFrame, list[dict]]:
    """Get the scores of every place: one line a response, and each place with its facts; all
    trainings come first.

    gold: the reward that made the pairs, where no labels train another.
    """
    made_from = {key: one for _, artifact in walk for key, one in artifact.missing().items()}
    for one in [one for one in made_from.values() if one.stage == "train"]:
        one.get()  # in between it would end the engine that samples
    frames, points = [], []
    for place, artifact in watched(walk, desc):
        table = pd.read_json(artifact.get() / "scores.jsonl", lines=True)
        table["logratio"] = (table["logp"] - table["logp_sft"]).round(4)
        table["prompt"] = pd.factorize(table["id"])[0]  # no row of the data set leaves artifacts/
        frames.append(table.drop(columns=["id", "logp", "logp_sft"]).assign(**place))
        points.append(place | artifact.manifest["facts"])
    table = pd.concat(frames, ignore_index=True)
    return table if "gold" in table else table.assign(gold=table["reward"]), points


def judged(cfg, points: list[tuple[dict, Artifact]]) -> Artifact:
    """Gather the scores of trained models: responses.csv.gz and points.json as write() leaves them.

    points: (place, in columns; its scores).
    """

    def make(out: Path) -> None:
        needs.check(cfg)
        write(out, *scored(points, "trained models"))

    inputs = {"places": [p for p, _ in points], "points": [s for _, s in points]}
    return Artifact("judged", 1, inputs, make, hours=cfg.needs.hours)


def write(out: Path, table: pd.DataFrame, points: list[dict]) -> None:
    """Write what scored() returns: responses.csv.gz and points.json."""
    table.to_csv(out / "responses.csv.gz", index=False, compression={"method": "gzip", "mtime": 0})
    (out / "points.json").write_text(json.dumps(points), encoding="utf-8")
