"""A real pipeline of profile smoke, for the fault suite to break.

    python fault_pipeline.py expo wrpo mallows served

If a worker dies, the next call must work. Training leaves a checkpoint after each step.
"""

import json
import os
import sys

from beyond_dpo import events
from beyond_dpo.machine import launch
from beyond_dpo.pipeline import config, expo, mallows, sources, wrpo

CHECKPOINTS = {"train__checkpoint_every": 1, "sft__checkpoint_every": 1, "needs__disk_gb": 0}
FEW = {"fractions": [0.5], "alphas": {0.5: [0, 1]}, "seeds": [0], "fewer_seeds": {}}


def results(part: str) -> list:
    """Return the last artifacts of one part of the pipeline."""
    if part == "expo":
        cfg = config.load("expo", "smoke", **FEW, **CHECKPOINTS)
        return [expo.curves(cfg)]
    if part == "mallows":
        cfg = config.load("mallows", "smoke", **CHECKPOINTS)
        return [mallows.dispersed(cfg), mallows.plug_in(cfg)]
    if part == "wrpo":
        cfg = config.load("wrpo", "smoke", **CHECKPOINTS)
        return [wrpo.main_result(cfg), wrpo.dynamics(cfg)]
    served = {
        "kind": "endpoint",
        "ref": "served",
        "url": os.environ["FAULT_ENDPOINT"],
        "ask": "Go on: {prompt}",
    }
    cfg = config.load(
        "wrpo", "smoke", known_sources={"served": served}, sources=["served"], source_sets=[]
    )
    return [sources.answers(cfg, "served")]


def compute(artifact) -> None:
    """Compute an artifact, again if a worker died the first time."""
    try:
        artifact.get()
    except launch.JobFailed as failure:
        print(f"JobFailed: {failure}", file=sys.stderr, flush=True)
        artifact.get()


def report(**event) -> None:
    """Append what this process reports to the file that the fault suite reads."""
    with open(os.environ["FAULT_REPORTS"], "a", encoding="utf-8") as file:
        file.write(json.dumps(event) + "\n")


def main(parts: list[str]) -> None:
    """Compute all artifacts of some parts of the pipeline."""
    # The recipes of all parts are made before anything is computed.
    last_artifacts = [artifact for part in parts for artifact in results(part)]
    with events.listening(report):
        for last in last_artifacts:
            for artifact in last.upstream.values():
                compute(artifact)


if __name__ == "__main__":
    main(sys.argv[1:])
