"""Pairs whose dispersion is known, and MallowsPO's methods that learn from them (arXiv 2405.14953).

Where people's agreement on each pair is known, the paper's estimate of it, the entropy of the
reference model, can be set beside the truth, and beside the truth of other pairs.
"""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np

from beyond_dpo.pipeline import gather, stages
from beyond_dpo.pipeline.artifacts import Artifact
from beyond_dpo.rows import read_rows, write_rows

AGREEMENT = "agreement.json"  # beside pairs.jsonl: -log φ of each pair, up to a factor
LEAST = 0.01  # of a weight: a pair on which people are split evenly is as good as left out


@dataclass(frozen=True)
class Learner:
    """A loss, and its weights: "true", "shuffled", or "entropy", the paper's own estimate."""

    loss: str
    weights: str = ""  # DPO has none


LEARNERS: Mapping[str, Learner] = MappingProxyType(
    {
        "DPO": Learner("dpo"),
        "MallowsPO-θ, true": Learner("mallows_theta", "true"),
        "MallowsPO-θ, shuffled": Learner("mallows_theta", "shuffled"),
        "MallowsPO-θ, entropy": Learner("mallows_theta", "entropy"),
        "MallowsPO-φ, entropy": Learner("mallows_phi", "entropy"),
    }
)


def of_agreement(agreement) -> np.ndarray:
    """Return weights in proportion to -log φ, with mean 1 but for LEAST, (pairs,) float64.

    Raises ValueError for an agreement that is negative or not finite, and where all are 0.
    """
    agreement = np.asarray_chkfinite(agreement, float)
    if (agreement < 0).any() or not agreement.sum() > 0:
        raise ValueError("agreement is -log φ: not below 0, and somewhere above it")
    return np.maximum(agreement / agreement.mean(), LEAST)


def weighted(pairs: Artifact, quality: str, seed: int) -> Artifact:
    """Write the pairs with a "weight" each: pairs.jsonl.

    pairs: a result with pairs.jsonl and AGREEMENT. quality: "true", or "shuffled": those of other
    pairs, dealt out by the seed. Raises ValueError for another quality.
    """
    if quality not in ("true", "shuffled"):
        raise ValueError(f'quality must be "true" or "shuffled", got {quality!r}')
    inputs = {"pairs": pairs, "quality": quality}
    if quality == "shuffled":
        inputs["seed"] = seed

    def make(out: Path) -> None:
        rows = read_rows(pairs.get() / "pairs.jsonl")
        weights = of_agreement(pairs.json(AGREEMENT)).tolist()
        if quality == "shuffled":
            random.Random(seed).shuffle(weights)
        with_weights = []
        for row, weight in zip(rows, weights, strict=True):
            with_weights.append({**row, "weight": weight})
        write_rows(out / "pairs.jsonl", with_weights)

    return Artifact("weighted", version=1, inputs=inputs, make=make)


def trained(cfg, pairs: Artifact, name: str, seed: int) -> Artifact:
    """Train the SFT model on pairs whose agreement is known, as LEARNERS says of this name.

    All learners have the same rows in the same order, and one reference pass.
    """
    learner = LEARNERS[name]
    rows = pairs
    if learner.weights in ("true", "shuffled"):
        rows = weighted(pairs, learner.weights, seed)
    start = stages.sft(cfg)
    return stages.training(
        cfg,
        stages.changed(cfg.train, loss=learner.loss, parts=1),
        rows,
        "pairs.jsonl",
        stages.PAIR,
        base=start,
        reference_pass=stages.reference(cfg, start, pairs),
        seed=seed,
        desc=f"{name}, seed {seed}",
    )


def write_pairs(out: Path, rows: list[dict], agreement) -> None:
    """Write pairs and the agreement on each: pairs.jsonl and AGREEMENT, in one order."""
    if len(rows) != len(agreement):
        raise ValueError(f"{len(rows)} pairs, but agreement on {len(agreement)}")
    write_rows(out / "pairs.jsonl", rows)
    rounded = [round(float(value), 6) for value in agreement]
    gather.write_json(out / AGREEMENT, rounded)
