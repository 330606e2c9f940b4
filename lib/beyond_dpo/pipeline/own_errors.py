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
    error = np.linalg.norm(errors)
    quantile = ndtri(stats.HIGH_END)
    return _around(value, float(quantile * error))


def of_seeds(first: tuple, second: tuple, seeds: int) -> stats.Interval:
    """Return (first − second, low, high) of two means over as many seeds, by Welch's t.

    first, second: (mean, standard deviation).
    """
    first_mean, first_deviation = first
    second_mean, second_deviation = second
    deviations = np.array([first_deviation, second_deviation])
    variances = deviations**2 / seeds  # of the means
    variance = variances.sum()
    spread = variances**2 / (seeds - 1)
    degrees = variance**2 / spread.sum()
    quantile = stdtrit(degrees, stats.HIGH_END)
    width = quantile * np.sqrt(variance)
    return _around(first_mean - second_mean, width)


def _around(value: float, width: float) -> stats.Interval:
    """Return (value, low, high) with both ends so far from the value."""
    low = value - width
    high = value + width
    return value, low, high


def of_cells(leads) -> stats.Interval:
    """Return (mean, low, high) of one lead a cell, by the t of their number."""
    values = np.asarray(leads, float)
    mean = stats.mean_of_trainings(values)
    return mean.value, mean.low, mean.high


def of_share(percent: float, prompts: int) -> stats.Interval:
    """Return (lead, low, high) of a win rate over 50 %, in points, on so many prompts."""
    share = percent / 100
    variance = share * (1 - share) / prompts
    error = 100 * np.sqrt(variance)
    lead = percent - 50
    return independent(lead, error)


def table(name: str, rows: dict[str, stats.Interval]) -> pd.DataFrame:
    """Return intervals as rows of a table, with whether each is told from 0."""
    shown = []
    for words, (value, low, high) in rows.items():
        is_told = low > 0 or high < 0
        row = {
            "where": name,
            "difference": words,
            "points": value,
            "low": low,
            "high": high,
            "told from 0": bool(is_told),
        }
        shown.append(row)
    return pd.DataFrame(shown)


def beyond_error(interval: stats.Interval) -> float:
    """Return how far the nearer end of an interval is above 0; below 0 where it holds 0."""
    _, low, _ = interval
    return float(low)
