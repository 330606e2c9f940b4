"""A real pipeline at smoke, for the fault suite to break: `python fault_pipeline.py expo wrpo
mallows served`.

A worker that dies is met once: the next call must work. Training leaves a checkpoint after each
step.
"""

import os
import sys

from beyond_dpo.machine import launch
from beyond_dpo.pipeline import config, expo, mallows, sources, wrpo

OFTEN = {"train__checkpoint_every": 1, "sft__checkpoint_every": 1, "needs__disk_gb": 0}
FEW = {"fractions": [0.5], "alphas": {0.5: [0, 1]}, "seeds": [0], "seed_fractions": []}


def results(name: str) -> list:
    """Return the last artifacts of one part of the pipeline."""
    if name == "expo":
        return [expo.curves(config.load("expo", "smoke", **FEW, **OFTEN))]
    if name == "mallows":
        cfg = config.load("mallows", "smoke", **OFTEN)
        return [mallows.dispersed(cfg), mallows.plug_in(cfg)]
    cfg = config.load("wrpo", "smoke", **OFTEN)
    if name == "wrpo":
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


if __name__ == "__main__":
    for last in [last for name in sys.argv[1:] for last in results(name)]:
        for one in last.upstream.values():
            try:
                one.get()
            except launch.JobFailed as failure:
                print(f"JobFailed: {failure}", file=sys.stderr, flush=True)
                one.get()
