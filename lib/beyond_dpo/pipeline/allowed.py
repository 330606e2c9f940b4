"""How much MallowsPO could gain with weights as even as the paper's estimate gives them.

The estimator's weights on film reviews lie close to 1. So close to DPO no method can be far ahead
of it, whatever the truth is. How far is computed on contextual bandits (beyond_dpo.contextual) with
exact rewards. The contexts' true -log φ has some spread, and MallowsPO-θ is given weights that are
drawn from the estimator's own: dealt out in the order of the truth, against it, or in none.
"""

import dataclasses
from pathlib import Path

import numpy as np
import pandas as pd

from beyond_dpo import stats
from beyond_dpo.pipeline import gather, mallows
from beyond_dpo.pipeline.artifacts import Artifact

ORDERS = ("as the truth", "unrelated", "against it")


def dealt(weights: np.ndarray, agreement: np.ndarray, order: str, seed: int) -> np.ndarray:
    """Return weights drawn from these for each context, in one of ORDERS, (contexts,) with mean 1.

    agreement: (contexts,) true -log φ. Raises ValueError for another order.
    """
    if order not in ORDERS:
        raise ValueError(f"order must be one of {ORDERS}, got {order!r}")
    generator = np.random.default_rng([seed, 4])
    drawn = generator.choice(weights, size=len(agreement))
    if order != "unrelated":
        ranks = np.argsort(np.argsort(agreement))
        drawn = np.sort(drawn)[ranks if order == "as the truth" else -1 - ranks]
    return drawn / drawn.mean()


def band(cfg) -> Artifact:
    """Measure what such weights gain over DPO on contextual bandits.

    shares.csv, a row for each spread of the truth, number of pairs and seed: the gain of DPO over
    the uniform policy at the settings' first KL (ranks), and for each of ORDERS by how much
    MallowsPO-θ gains more (ranks).
    """
    settings = cfg.contextual
    weighted = mallows.dispersed(cfg)

    def make(out: Path) -> None:
        weights = weighted.csv("dispersion.csv")["weight"].to_numpy()
        rows = []
        for spread in gather.watched(settings.spreads, "bandits with the estimator's weights"):
            for pairs in settings.pairs:
                for seed in mallows.contextual_seeds(settings):
                    rows.append(_row(settings, weights, spread, pairs, seed))
        gather.write_table(out / "shares.csv", pd.DataFrame(rows).round(4))

    does = "bandits with the estimator's weights, in this process"
    inputs = {"weights": weighted, "settings": dataclasses.asdict(settings)}
    return Artifact("allowed", version=1, inputs=inputs, make=make, does=does)


def _row(settings, weights: np.ndarray, spread: float, pairs: int, seed: int) -> dict:
    """Return one world's row."""
    from beyond_dpo import contextual as bandit

    world = bandit.draw_world(
        settings.contexts, settings.arms, settings.dimensions, spread=spread, seed=seed
    )
    wins = bandit.draw_pairs(world, pairs, people="mallows", seed=seed)
    learners = {"DPO": np.ones(settings.contexts)}
    for order in ORDERS:
        learners[order] = dealt(weights, world.agreement, order, seed)
    row = {"spread": spread, "pairs": pairs, "seed": seed}
    for name, agreement in learners.items():
        way = bandit.descend(
            world.features,
            wins,
            agreement,
            link="logistic",
            steps=max(settings.steps),
            lr=settings.lr,
        )
        row[name] = bandit.gain_at_kl(world.features, world.ranks, way[-1], settings.kls[0])
    for order in ORDERS:
        row[order] -= row["DPO"]
    return row


def shares(table: pd.DataFrame) -> pd.DataFrame:
    """Return what each order gains as a share of DPO's gain, with its interval over worlds.

    table: shares.csv of band(). Columns: spread, pairs, order, share, low, high.
    """
    rows = []
    for (spread, pairs), here in table.groupby(["spread", "pairs"]):
        for order in ORDERS:
            found = stats.ratio_of_means(here[order], here["DPO"])
            row = {"spread": spread, "pairs": pairs, "order": order, "share": found.value}
            rows.append({**row, "low": found.low, "high": found.high})
    return pd.DataFrame(rows)


def limits(table: pd.DataFrame) -> tuple[float, float]:
    """Return the band in which any effect must lie, as shares of DPO's gain.

    It reaches from the lowest share to the highest, over all spreads of the truth, numbers of pairs
    and orders.
    """
    every_share = shares(table)["share"]
    return float(every_share.min()), float(every_share.max())
