"""Rewards of trained models at equal KL, over several trainings: who leads, and by how much.

A method that goes further has more reward, and a larger KL to the SFT model. So each training is
looked at in a few places, and what is compared is the curves through them. Near the SFT model the
reward rises with the root of the KL; the two curves of one training seed are taken to differ by a
constant. That is a curve of three parameters,

    reward = a + b √KL + lead · [first method],

fitted to the places of both. More of them would follow the noise of a handful of places.
"""

from typing import NamedTuple

import numpy as np
import pandas as pd

from beyond_dpo import stats
from beyond_dpo.pipeline.alpha_curves import LEAST_DISTINCT, MORE_REPETITION

LEAST_PLACES = 2  # of a method in a training


class _Curves(NamedTuple):
    """The columns of one training's places in a table of prompts, of both methods."""

    first: np.ndarray
    second: np.ndarray


def lead(
    table: pd.DataFrame,
    pair: tuple[str, str],
    *,
    by: str = "method",
    x: str = "logratio",
    y: str = "gold",
    seed: int,
) -> stats.Estimate:
    """Return y of pair[0] − y of pair[1] at equal x, with its error over trainings and prompts.

    Prompts are drawn, the same for all places and trainings. A place that the curves share, such as
    the SFT model, does not belong into the table: there the difference is 0, whatever the methods
    do.

    Args:
        table: a row a response, with the columns by, "seed" (of training), "place" (of a curve),
            "prompt", x and y.
    Raises:
        ValueError: for curves that share no range of x, with fewer than LEAST_PLACES places, or not
            of the same prompts.
    """
    values, curves = _tables(table, pair, by, x, y)

    def measure(draws: np.ndarray) -> np.ndarray:
        leads = [_fitted(values, draws, one)[0] for one in curves]
        return np.stack(leads, axis=1)[..., np.newaxis]

    return stats.two_level(measure, [values.shape[1]], seed=seed)


def share_of_gain(
    table: pd.DataFrame,
    pair: tuple[str, str],
    sft: pd.DataFrame,
    *,
    by: str = "method",
    x: str = "logratio",
    y: str = "gold",
    seed: int,
) -> stats.Estimate:
    """Return lead() as a share of what pair[1] gains on the SFT model at the same x.

    That is in the middle of the range of x that both reach, on their curve. sft: the responses of
    the SFT model to the same prompts, with the columns "prompt" and y. Its other arguments are
    those of lead(). Raises ValueError as lead() does, and where pair[1] gains nothing.
    """
    values, curves = _tables(table, pair, by, x, y)
    start = sft.groupby("prompt")[y].mean().sort_index().to_numpy()
    if len(start) != values.shape[1]:
        raise ValueError(f"{len(start)} prompts of the SFT model, {values.shape[1]} of the others")

    def measure(draws: np.ndarray) -> np.ndarray:
        of_start = start[draws].mean(1)
        components = []
        for one in curves:
            leads, levels = _fitted(values, draws, one)
            components.append(np.stack([leads, levels - of_start], axis=1))
        return np.stack(components, axis=1)

    def ratio(means: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore"):
            return means[..., 0] / means[..., 1]

    share = stats.two_level(measure, [values.shape[1]], ratio, seed=seed)
    if not np.isfinite([share.value, share.low, share.high]).all():
        raise ValueError(f"{pair[1]} gains nothing on the SFT model: there is no share of it")
    return share


def _tables(table: pd.DataFrame, pair: tuple, by: str, x: str, y: str) -> tuple:
    """Return x and y of each prompt and place, (2, prompts, places), and each seed's curves."""
    table = table[table[by].isin(pair)]
    columns = ["seed", by, "place"]
    x_table = table.pivot_table(index="prompt", columns=columns, values=x)
    y_table = table.pivot_table(index="prompt", columns=columns, values=y)
    problem = f"{pair}: curves need {LEAST_PLACES} places each, all prompts, and a range of {x}"
    if x_table.empty or x_table.isna().any(axis=None) or y_table.isna().any(axis=None):
        raise ValueError(problem)
    values = np.stack([x_table.to_numpy(), y_table.to_numpy()])
    curves = _of_seeds(x_table.columns, by, pair)
    means = values[0].mean(0)
    for one in curves:
        if min(len(one.first), len(one.second)) < LEAST_PLACES:
            raise ValueError(problem)
        low, high = _shared(means[one.first], means[one.second])
        if low > high:
            raise ValueError(problem)
    return values, curves


def _of_seeds(columns: pd.MultiIndex, by: str, pair: tuple) -> list[_Curves]:
    """Return the columns of both methods in each training seed."""
    seeds = columns.get_level_values("seed")
    names = columns.get_level_values(by)
    curves = []
    for seed in seeds.unique():
        first, second = (np.flatnonzero((seeds == seed) & (names == name)) for name in pair)
        curves.append(_Curves(first, second))
    return curves


def _shared(first: np.ndarray, second: np.ndarray) -> tuple:
    """Return the smallest and the largest x that both reach, over the last axis."""
    low = np.maximum(first.min(-1), second.min(-1))
    high = np.minimum(first.max(-1), second.max(-1))
    return low, high


def _fitted(values: np.ndarray, draws: np.ndarray, curves: _Curves) -> tuple:
    """Return the lead of one training in each draw, and the level of the second method.

    The level is that of its curve in the middle of the x that both reach. Each is (draws,).
    """
    both = np.concatenate(curves)
    x, y = (table[:, both][draws].mean(1) for table in values)  # (draws, places)
    root = np.sqrt(np.maximum(x, 0))
    in_first = np.zeros_like(x)
    in_first[:, : len(curves.first)] = 1
    terms = np.stack([np.ones_like(x), root, in_first], axis=2)
    coefficients = np.einsum("dkp,dp->dk", np.linalg.pinv(terms), y)
    level, slope, leads = coefficients.T
    low, high = _shared(x[:, : len(curves.first)], x[:, len(curves.first) :])
    middle = np.sqrt(np.maximum((low + high) / 2, 0))
    return leads, level + slope * middle


def passing(points: pd.DataFrame, sft: pd.DataFrame) -> np.ndarray:
    """Return which points pass the gate, as on α curves, (points,) bool.

    points: a row a point with its mean "repetition" and its "distinct_2". sft: such rows of the SFT
    model, of which the means are taken.
    """
    repeats = points["repetition"] <= sft["repetition"].mean() + MORE_REPETITION
    distinct = points["distinct_2"] >= LEAST_DISTINCT * sft["distinct_2"].mean()
    return (repeats & distinct).to_numpy()
