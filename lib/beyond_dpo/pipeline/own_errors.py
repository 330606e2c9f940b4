"""Whether the differences that MallowsPO prints are larger than their own errors.

The paper (arXiv 2405.14953) gives some of its numbers an error and some a sample size. Differences
are taken as if both numbers were independent; two models that answer the same prompts differ with a
smaller error, which nobody can compute from what is printed.
"""

import numpy as np
import pandas as pd
from scipy.special import ndtri, stdtrit

from beyond_dpo import stats

FIG10_PROMPTS = 150  # to which the percentages of Figure 10 fit; the number is not printed


def independent(value: float, *errors: float) -> stats.Interval:
    """Return (value, low, high) of a difference of two numbers with these standard errors."""
    width = float(ndtri(stats.HIGH_END) * np.linalg.norm(errors))
    return value, value - width, value + width


def of_seeds(first: tuple, second: tuple, seeds: int) -> stats.Interval:
    """Return (first − second, low, high) of two means over as many seeds, by Welch's t.

    first, second: (mean, standard deviation).
    """
    variances = np.array([first[1], second[1]]) ** 2 / seeds
    degrees = variances.sum() ** 2 / (variances**2 / (seeds - 1)).sum()
    width = stdtrit(degrees, stats.HIGH_END) * np.sqrt(variances.sum())
    value = first[0] - second[0]
    return value, value - width, value + width


def of_cells(leads) -> stats.Interval:
    """Return (mean, low, high) of one lead a cell, by the t of their number."""
    mean = stats.mean_of_trainings(np.asarray(leads, float))
    return mean.value, mean.low, mean.high


def of_share(percent: float, prompts: int) -> stats.Interval:
    """Return (lead, low, high) of a win rate over 50 %, in points, on so many prompts."""
    share = percent / 100
    return independent(percent - 50, 100 * np.sqrt(share * (1 - share) / prompts))


def table(name: str, rows: dict[str, stats.Interval]) -> pd.DataFrame:
    """Return intervals as rows of a table, with whether each is told from 0."""
    shown = []
    for words, (value, low, high) in rows.items():
        row = {"where": name, "difference": words, "points": value, "low": low, "high": high}
        shown.append({**row, "told from 0": bool(low > 0 or high < 0)})
    return pd.DataFrame(shown)


def beyond_error(interval: stats.Interval) -> float:
    """Return how far the nearer end of an interval is above 0; below 0 where it holds 0."""
    return float(interval[1])
