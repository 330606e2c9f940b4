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
LEAST_GAIN = 1e-9  # in y: a smaller one is rounding, and there is no share of it


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
        leads = []
        for training in curves:
            lead_of_training, _ = _fitted(values, draws, training)
            leads.append(lead_of_training)
        by_training = np.stack(leads, axis=1)
        return by_training[..., np.newaxis]

    prompts = values.shape[1]
    return stats.two_level(measure, [prompts], seed=seed)


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
    sft_by_prompt = sft.groupby("prompt")[y].mean().sort_index()
    sft_level = sft_by_prompt.to_numpy()
    prompts = values.shape[1]
    if len(sft_level) != prompts:
        raise ValueError(f"{len(sft_level)} prompts of the SFT model, {prompts} of the others")

    def measure(draws: np.ndarray) -> np.ndarray:
        sft_mean = sft_level[draws].mean(1)
        components = []
        for training in curves:
            leads, levels = _fitted(values, draws, training)
            gains = levels - sft_mean
            lead_and_gain = np.stack([leads, gains], axis=1)
            components.append(lead_and_gain)
        return np.stack(components, axis=1)

    def ratio(means: np.ndarray) -> np.ndarray:
        leads = means[..., 0]
        gains = means[..., 1]
        shares = np.full_like(leads, np.nan)
        np.divide(leads, gains, out=shares, where=np.abs(gains) >= LEAST_GAIN)
        return shares

    share = stats.two_level(measure, [prompts], ratio, seed=seed)
    interval = [share.value, share.low, share.high]
    if not np.isfinite(interval).all():
        raise ValueError(f"{pair[1]} gains nothing on the SFT model: there is no share of it")
    return share


def _tables(table: pd.DataFrame, pair: tuple, by: str, x: str, y: str) -> tuple:
    """Return x and y of each prompt and place, (2, prompts, places), and each seed's curves."""
    is_compared = table[by].isin(pair)
    table = table[is_compared]
    columns = ["seed", by, "place"]
    x_table = table.pivot_table(index="prompt", columns=columns, values=x)
    y_table = table.pivot_table(index="prompt", columns=columns, values=y)
    problem = f"{pair}: curves need {LEAST_PLACES} places each, all prompts, and a range of {x}"
    for by_prompt in (x_table, y_table):
        if by_prompt.empty or by_prompt.isna().any(axis=None):
            raise ValueError(problem)
    values = np.stack([x_table.to_numpy(), y_table.to_numpy()])
    curves = _of_seeds(x_table.columns, by, pair)
    if not _comparable(values[0], curves):
        raise ValueError(problem)
    return values, curves


def _comparable(x: np.ndarray, curves: list[_Curves]) -> bool:
    """Return whether all curves have enough places, and both of a training reach the same x."""
    means = x.mean(0)
    for training in curves:
        places = min(len(training.first), len(training.second))
        if places < LEAST_PLACES:
            return False
        low, high = _shared(means[training.first], means[training.second])
        if low > high:
            return False
    return True


def _of_seeds(columns: pd.MultiIndex, by: str, pair: tuple) -> list[_Curves]:
    """Return the columns of both methods in each training seed."""
    seeds = columns.get_level_values("seed")
    names = columns.get_level_values(by)
    first_name, second_name = pair
    is_first = names == first_name
    is_second = names == second_name
    curves = []
    for seed in seeds.unique():
        is_seed = seeds == seed
        first = np.flatnonzero(is_seed & is_first)
        second = np.flatnonzero(is_seed & is_second)
        curves.append(_Curves(first, second))
    return curves


def _shared(first: np.ndarray, second: np.ndarray) -> tuple:
    """Return the smallest and the largest x that both reach, over the last axis."""
    first_low = first.min(-1)
    second_low = second.min(-1)
    first_high = first.max(-1)
    second_high = second.max(-1)
    low = np.maximum(first_low, second_low)
    high = np.minimum(first_high, second_high)
    return low, high


def _fitted(values: np.ndarray, draws: np.ndarray, curves: _Curves) -> tuple:
    """Return the lead of one training in each draw, and the level of the second method.

    The level is that of its curve in the middle of the x that both reach. Each is (draws,).
    """
    first_places = len(curves.first)
    both = np.concatenate(curves)
    x_table, y_table = values[:, :, both]
    x = x_table[draws].mean(1)  # (draws, places)
    y = y_table[draws].mean(1)
    root = _root(x)
    constant = np.ones_like(x)
    is_first = np.zeros_like(x)
    is_first[:, :first_places] = 1
    terms = np.stack([constant, root, is_first], axis=2)
    solution = np.linalg.pinv(terms)
    coefficients = np.einsum("dkp,dp->dk", solution, y)
    level, slope, leads = coefficients.T
    first_x = x[:, :first_places]
    second_x = x[:, first_places:]
    low, high = _shared(first_x, second_x)
    middle = (low + high) / 2
    level_there = level + slope * _root(middle)
    return leads, level_there


def _root(kl: np.ndarray) -> np.ndarray:
    """Return √KL; an estimate below 0 counts as 0."""
    not_negative = np.maximum(kl, 0)
    return np.sqrt(not_negative)


def passing(points: pd.DataFrame, sft: pd.DataFrame) -> np.ndarray:
    """Return which points pass the gate, as on α curves, (points,) bool.

    points: a row a point with its mean "repetition" and its "distinct_2". sft: such rows of the SFT
    model, of which the means are taken.
    """
    most_repetition = sft["repetition"].mean() + MORE_REPETITION
    least_distinct = LEAST_DISTINCT * sft["distinct_2"].mean()
    repeats_little = points["repetition"] <= most_repetition
    is_distinct = points["distinct_2"] >= least_distinct
    passes = repeats_little & is_distinct
    return passes.to_numpy()
