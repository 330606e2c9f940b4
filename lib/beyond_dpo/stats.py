"""Means and percentile bootstrap intervals from explicit generators: the same seed gives the same
interval.

Shared by all: values are (n,) or (n, k) in any unit, axis 0 holds the independent units (prompts)
and a row is drawn as a whole; `groups`, (n,) labels, draws all units with one label together
(several pairs of one prompt).
All raise ValueError for NaN or infinity, fewer than two units or groups, and unequal shapes.
"""

import numpy as np

LEVEL = 0.95  # of all intervals


def mean_interval(values, *, seed: int, n_boot: int = 2000, groups=None):
    """Return (mean, low, high) of `values`; adding a constant to `values` adds it to all three."""
    values = np.asarray_chkfinite(values, float)
    index = np.unique(
        np.arange(len(values)) if groups is None else np.asarray(groups), return_inverse=True
    )[1]
    sums = np.bincount(index, values.reshape(len(values), -1).sum(1))
    counts = np.bincount(index, np.full(len(values), values[0].size))
    return interval(lambda i: sums[i].sum() / counts[i].sum(), len(sums), seed, n_boot)


def paired_interval(a, b, *, seed: int):
    """Return (mean, low, high) of a - b for the same units in the same order; what a and b share
    cancels.
    """
    a, b = _paired(a, b)
    return mean_interval(a - b, seed=seed)


def peak_correlation(table, value: str, by: list[str], *, seed: int, n_boot: int = 2000):
    """Return (rho, low, high), the rank correlation of by[0] and −(the α at which mean `value` is
    highest).

    table: one row per response; one curve per combination of the columns `by`, each on an α grid of
    its own. A draw takes prompts, the same for all curves, and looks for each curve's peak anew:
    the interval covers that choice too. Peaks that are all at one α show no relation: rho 0.
    """
    wide = table.pivot_table(index="prompt", columns=[*by, "alpha"], values=value)
    values, alphas = np.asarray_chkfinite(wide), wide.columns.get_level_values("alpha").to_numpy()
    curves = wide.columns.droplevel("alpha")
    places = [np.flatnonzero(curves == curve) for curve in curves.unique()]
    x = [wide.columns[place[0]][0] for place in places]

    def rho(i):
        means = values[i].mean(0)
        return _rho(x, [-alphas[place[means[place].argmax()]] for place in places])

    return interval(rho, len(values), seed, n_boot)


def interval(statistic, units: int, seed: int, n_boot: int = 2000) -> tuple[float, float, float]:
    """Return (statistic of all units, low, high), drawing units: `statistic` takes the (units,)
    indices of a draw.
    """
    if units < 2:
        raise ValueError(f"an interval needs 2 or more independent units: {units=}")
    generator = np.random.default_rng(seed)
    draws = [statistic(generator.integers(units, size=units)) for _ in range(n_boot)]
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(statistic(np.arange(units))), float(low), float(high)


def _paired(a, b) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.asarray_chkfinite(a, float), np.asarray_chkfinite(b, float)
    if a.shape != b.shape:
        raise ValueError(f"shapes differ: {a.shape} and {b.shape}; pair the units")
    return a, b


def summarise(table, value: str, by: list[str], *, seed: int, groups: str = "prompt"):
    """Return one row per combination of the columns `by`: mean, low, high of `value` and n, prompts
    drawn as a whole.

    table: one row per response. Rows without a value (NaN) are left out, so that a measure taken on
    some prompts only can be summarised; a combination without any is left out.
    """
    import pandas as pd

    rows = []
    for place, group in table.dropna(subset=[value]).groupby(by, sort=True):
        mean, low, high = mean_interval(group[value], seed=seed, groups=group[groups])
        rows.append([*place, mean, low, high, len(group)])
    return pd.DataFrame(rows, columns=[*by, "mean", "low", "high", "n"])


def gain(table, value: str, to: dict, since: dict, *, seed: int) -> tuple[float, float, float]:
    """Return (mean, low, high) of `value` at the place `to` minus at the place `since`, paired by
    prompt.

    to, since: {column: value} that pick the responses of one model and α each; both must answer the
    same prompts.
    """
    means = []
    for place in (to, since):
        picked = table
        for column, wanted in place.items():
            fits = (
                np.isclose(picked[column], wanted)
                if isinstance(wanted, float)
                else picked[column] == wanted
            )
            picked = picked[fits]
        means.append(picked.groupby("prompt")[value].mean().sort_index())
    if not len(means[0]) or list(means[0].index) != list(means[1].index):
        raise ValueError(
            f"{to} and {since} do not answer the same prompts ({len(means[0])} and {len(means[1])})"
        )
    return paired_interval(means[0], means[1], seed=seed)


def rank_correlation(a, b, *, seed: int) -> tuple[float, float, float]:
    """Return (rho, low, high), Spearman's rank correlation of two (n,) measures of the same
    units.
    """
    a, b = _paired(a, b)
    return interval(lambda i: _rho(a[i], b[i]), len(a), seed)


def _rho(a, b) -> float:
    """Return Spearman's rank correlation; 0 where all of one are equal, which show no relation."""
    from scipy.stats import rankdata

    a, b = rankdata(a), rankdata(b)
    return float(np.corrcoef(a, b)[0, 1]) if np.ptp(a) and np.ptp(b) else 0.0
