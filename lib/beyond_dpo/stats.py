"""Means and intervals over prompts, and over trainings and prompts; a seed gives one interval.

Of one training: percentile bootstrap intervals over prompts. Of several: two_level(), whose
interval also covers what another training would have given.

Shared by the first kind: values are (n,) or (n, k) in any unit. Axis 0 holds the independent units
(prompts), and a row is drawn as a whole. `groups`, (n,) labels, draws all units with one label
together, such as several pairs of one prompt. All raise ValueError for NaN or infinity, for fewer
than two units or groups, and for unequal shapes.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

LEVEL = 0.95  # of all intervals
# The quantiles of all draws where an interval ends.
LOW_END = (1 - LEVEL) / 2
HIGH_END = (1 + LEVEL) / 2

# Indices that are drawn at a time, half a MiB: more would not stay in a core's cache.
BLOCK = 2**16

Interval = tuple[float, float, float]  # of the statistic of all units, low end, high end
# Components of a statistic in several draws of the units, (draws, trainings, components): takes an
# (draws, size) array of indices for each set of units.
Measure = Callable[..., np.ndarray]
# A statistic of components that are means over trainings: (..., components) to (...).
Combine = Callable[[np.ndarray], np.ndarray]

POWER = 0.8  # with which an effect of the size Estimate.detectable would have been seen


@dataclass(frozen=True)
class Estimate:
    """An effect with what is known of its error, from several trainings and several units.

    The error has two parts: between_trainings, with trainings − 1 degrees of freedom, and
    between_units, taken as normal. With one training the first part is not known: the interval
    covers the units alone, and there is no p-value.
    """

    value: float
    between_trainings: float  # standard error, 0 with one training
    between_units: float  # standard error
    trainings: int

    @property
    def low(self) -> float:
        """The lower end of the interval of 95 %."""
        return self.value - self._width(HIGH_END)

    @property
    def high(self) -> float:
        """The upper end of the interval of 95 %."""
        return self.value + self._width(HIGH_END)

    @property
    def p(self) -> float | None:
        """The p-value of an effect of 0, two-sided: one minus the level at which it is an end."""
        if self.trainings < 2:
            return None
        if self.value == 0:
            return 1.0
        if self._width(HIGH_END) == 0:
            return 0.0
        from scipy.optimize import brentq

        def beyond(p: float) -> float:
            return self._width(1 - p / 2) - abs(self.value)

        smallest = 1e-12
        if beyond(smallest) < 0:
            return smallest
        return float(brentq(beyond, smallest, 1.0))

    @property
    def detectable(self) -> float | None:
        """The effect that such an experiment finds with 80 % power; None with one training."""
        if self.trainings < 2:
            return None
        return self._width(HIGH_END) + self._width(POWER)

    def _width(self, quantile: float) -> float:
        """Return how far the quantile of the error lies from its middle."""
        from scipy.special import ndtri, stdtrit

        of_units = ndtri(quantile) * self.between_units
        if self.trainings < 2:
            return float(of_units)
        of_trainings = stdtrit(self.trainings - 1, quantile) * self.between_trainings
        return float(np.hypot(of_trainings, of_units))

    def __neg__(self) -> "Estimate":
        return Estimate(-self.value, self.between_trainings, self.between_units, self.trainings)


def interval(
    statistic: Callable[[np.ndarray], float], units: int, seed: int, n_boot: int = 2000
) -> Interval:
    """Return (statistic of all units, low, high), drawing units with replacement.

    statistic: takes the (units,) indices of a draw. units: their number. n_boot: the number of
    draws.
    """

    def one_by_one(draws: np.ndarray) -> list[float]:
        return [statistic(draw) for draw in draws]

    return interval_of_many(one_by_one, units, seed, n_boot)


def interval_of_many(
    statistics: Callable[[np.ndarray], Iterable[float]], units: int, seed: int, n_boot: int = 2000
) -> Interval:
    """Return what `interval` does, of a function that takes the (k, units) indices of k draws."""
    if units < 2:
        raise ValueError(f"an interval needs 2 or more independent units: {units=}")
    generator = np.random.default_rng(seed)
    at_once = max(1, BLOCK // units)
    values: list[float] = []
    while len(values) < n_boot:
        count = min(at_once, n_boot - len(values))
        draws = generator.integers(units, size=(count, units))
        values.extend(statistics(draws))
    low, high = np.quantile(values, [LOW_END, HIGH_END])
    all_units = np.arange(units)
    (estimate,) = statistics(all_units[np.newaxis])
    return float(estimate), float(low), float(high)


def two_level(
    measure: Measure,
    sizes: Sequence[int],
    combine: Combine | None = None,
    *,
    seed: int,
    n_boot: int = 1000,
) -> Estimate:
    """Estimate a statistic of trainings that are all judged on the same units (prompts).

    The trainings' part of the error is the jackknife's over trainings. It holds what a training's
    answers to these units share with no other training, so that this is taken off the units' part,
    which is the bootstrap's over units.

    Args:
        measure: takes the indices of draws, (draws, size) for each set of units, and returns
            (draws, trainings, components). A choice that is made from units, such as of an α on dev
            prompts, belongs in here: it is made anew in each draw.
        sizes: the number of units of each set, as dev and test prompts, which are drawn apart.
        combine: what is made of the components' means over trainings, such as a ratio. None takes
            the only component.
    Raises:
        ValueError: for a set of less than two units, and for components that are not finite.
    """
    combine = combine or _only_component
    for size in sizes:
        if size < 2:
            raise ValueError(f"an interval needs 2 or more independent units: {size=}")
    all_units = [np.arange(size)[np.newaxis] for size in sizes]
    components = np.asarray_chkfinite(measure(*all_units), float)
    value = float(combine(components.mean(1))[0])
    trainings = components.shape[1]
    drawn = _drawn_components(measure, sizes, seed, n_boot)
    of_draws = combine(drawn.mean(1)).var()
    if trainings < 2:
        return Estimate(value, 0.0, float(np.sqrt(of_draws)), 1)
    of_trainings = _pseudo_values(components, combine)[0].var(ddof=1) / trainings
    apart = _pseudo_values(drawn, combine)
    apart -= apart.mean(1, keepdims=True)
    shared_with_none = apart.var(0).sum() / (trainings * (trainings - 1))
    of_units = max(0.0, of_draws - shared_with_none)
    return Estimate(value, float(np.sqrt(of_trainings)), float(np.sqrt(of_units)), trainings)


def _only_component(means: np.ndarray) -> np.ndarray:
    (component,) = np.moveaxis(means, -1, 0)
    return component


def _drawn_components(measure: Measure, sizes: Sequence[int], seed: int, n_boot: int) -> np.ndarray:
    """Return the components in each of n_boot draws, (draws, trainings, components)."""
    generator = np.random.default_rng(seed)
    at_once = max(1, BLOCK // sum(sizes))
    blocks = []
    for first in range(0, n_boot, at_once):
        count = min(at_once, n_boot - first)
        draws = [generator.integers(size, size=(count, size)) for size in sizes]
        blocks.append(measure(*draws))
    return np.asarray_chkfinite(np.concatenate(blocks), float)


def _pseudo_values(components: np.ndarray, combine: Combine) -> np.ndarray:
    """Return the jackknife's pseudo-values, (draws, trainings): what each training adds.

    Of a mean they are the trainings' own values.
    """
    trainings = components.shape[1]
    total = components.sum(1, keepdims=True)
    without_one = (total - components) / (trainings - 1)
    of_all = combine(components.mean(1))[:, np.newaxis]
    return trainings * of_all - (trainings - 1) * combine(without_one)


def two_level_mean(values, *, seed: int, n_boot: int = 1000) -> Estimate:
    """Estimate the mean of values of trainings and units, (trainings, units)."""
    values = np.asarray_chkfinite(values, float)

    def measure(draws: np.ndarray) -> np.ndarray:
        means = values[:, draws].mean(-1)  # (trainings, draws)
        return means.T[..., np.newaxis]

    return two_level(measure, [values.shape[1]], seed=seed, n_boot=n_boot)


def ratio_of_means(values, reference) -> Estimate:
    """Estimate mean(values) / mean(reference) of simulations that are independent of each other.

    Each is a training with units of its own, and has a value of both, (trainings,). The error is
    that of values - ratio · reference, to first order. A reference of ones gives the mean of
    values with the t interval. Raises ValueError for less than two, and for a reference of mean 0.
    """
    values, reference = _paired(values, reference)
    scale = reference.mean()
    if scale == 0:
        raise ValueError("the reference has a mean of 0")
    ratio = values.mean() / scale
    residual = mean_of_trainings((values - ratio * reference) / scale)
    return replace(residual, value=float(ratio))


def mean_of_trainings(values) -> Estimate:
    """Estimate the mean of one value a training, (trainings,), with the t quantile of their number.

    All of the error is between trainings: each is measured exactly. Adding a constant to the values
    adds it to the mean and to the ends of the interval.
    """
    values = np.asarray_chkfinite(values, float)
    if values.ndim != 1 or len(values) < 2:
        raise ValueError(f"a mean of trainings needs a list of 2 or more, got {values.shape}")
    error = values.std(ddof=1) / np.sqrt(len(values))
    return Estimate(float(values.mean()), float(error), 0.0, len(values))


def discoveries(p_values: Iterable[float], rate: float = 1 - LEVEL) -> list[bool]:
    """Return which of several effects are told from 0 (Benjamini and Hochberg 1995).

    Among those, a share of at most `rate` is expected to be 0 in truth.
    """
    p_values = np.asarray_chkfinite(list(p_values), float)
    if not len(p_values):
        return []
    from scipy.stats import false_discovery_control

    return (false_discovery_control(p_values) <= rate).tolist()


def mean_interval(values, *, seed: int, n_boot: int = 2000, groups=None) -> Interval:
    """Return (mean, low, high) of `values`; adding a constant to `values` adds it to all three."""
    values = np.asarray_chkfinite(values, float)
    units = len(values)
    values = values.reshape(units, -1)
    labels = np.arange(units)
    if groups is not None:
        labels = np.asarray(groups)
    _, group_of_unit = np.unique(labels, return_inverse=True)
    unit_sums = values.sum(1)
    unit_sizes = np.full(units, values.shape[1])
    sums = np.bincount(group_of_unit, unit_sums)
    sizes = np.bincount(group_of_unit, unit_sizes)
    alike = len(set(sizes)) == 1  # as many values in every draw

    def means(draws: np.ndarray) -> np.ndarray:
        totals = sums[draws].sum(1)
        counts = sizes.sum() if alike else sizes[draws].sum(1)
        return totals / counts

    return interval_of_many(means, len(sums), seed, n_boot)


def paired_interval(a, b, *, seed: int) -> Interval:
    """Return (mean, low, high) of a - b for the same units in the same order.

    What a and b share cancels.
    """
    a, b = _paired(a, b)
    differences = a - b
    return mean_interval(differences, seed=seed)


def rank_correlation(a, b, *, seed: int) -> Interval:
    """Return (rho, low, high), Spearman's rank correlation of two measures of the same units.

    a, b: (n,).
    """
    a, b = _paired(a, b)
    places_a = _places(a)
    places_b = _places(b)

    def rho(draw: np.ndarray) -> float:
        return _rho(places_a[draw], places_b[draw])

    return interval(rho, len(a), seed)


def peak_correlation(
    table, value: str, by: list[str], *, seed: int, n_boot: int = 2000
) -> Interval:
    """Return (rho, low, high), the rank correlation of by[0] and minus the α of a curve's peak.

    The peak is where mean `value` is highest, so rho is 1 if peaks fall where by[0] rises. A draw
    takes prompts, the same for all curves, and looks for each curve's peak anew, so the interval
    covers that choice too. Peaks that are all at one α show no relation: rho 0.

    table: one row per response. by: columns, whose every combination is a curve with an α grid of
    its own.
    """
    wide = table.pivot_table(index="prompt", columns=[*by, "alpha"], values=value)
    values = np.asarray_chkfinite(wide)
    alphas = wide.columns.get_level_values("alpha").to_numpy()
    first_of_by = wide.columns.get_level_values(0)
    curve_of_column = wide.columns.droplevel("alpha")
    curves = []
    x = []
    for curve in curve_of_column.unique():
        columns = np.flatnonzero(curve_of_column == curve)
        curves.append(columns)
        x.append(first_of_by[columns[0]])
    places_x = _places(x)
    places_of_alphas = _places(-alphas)

    def rho(draw: np.ndarray) -> float:
        means = values[draw].mean(0)
        peaks = []
        for columns in curves:
            highest = means[columns].argmax()
            peak = columns[highest]
            peaks.append(places_of_alphas[peak])
        return _rho(places_x, peaks)

    return interval(rho, len(values), seed, n_boot)


def summarise(table, value: str, by: list[str], *, seed: int):
    """Return a table of mean, low, high of `value` and n, one row per combination of columns `by`.

    table: one row per response; its prompts are drawn as a whole. Rows without a value (NaN) are
    left out, so that a measure taken on some prompts only can be summarised, and so is a
    combination without any.
    """
    import pandas as pd

    rows = []
    columns = [*by, "mean", "low", "high", "n"]
    measured = table.dropna(subset=[value])
    for combination, group in measured.groupby(by):
        prompts = group["prompt"]
        mean, low, high = mean_interval(group[value], seed=seed, groups=prompts)
        row = [*combination, mean, low, high, len(group)]
        rows.append(row)
    return pd.DataFrame(rows, columns=columns)


def gain(table, value: str, to: dict, since: dict, *, seed: int) -> Interval:
    """Return (mean, low, high) of `value` at the point `to` minus at the point `since`.

    Paired by prompt. to, since: {column: value} that pick the responses of one model and α each;
    both must answer the same prompts.
    """
    to_means = _prompt_means(table, value, to)
    since_means = _prompt_means(table, value, since)
    prompts = list(to_means.index)
    if not prompts or prompts != list(since_means.index):
        raise ValueError(
            f"{to} and {since} do not answer the same prompts "
            f"({len(to_means)} and {len(since_means)})"
        )
    return paired_interval(to_means, since_means, seed=seed)


def _prompt_means(table, value: str, point: dict):
    """Return the mean of `value` of each prompt's responses at a point, {column: value}."""
    for column, wanted in point.items():
        if isinstance(wanted, float):
            fits = np.isclose(table[column], wanted)
        else:
            fits = table[column] == wanted
        table = table[fits]
    by_prompt = table.groupby("prompt")
    means = by_prompt[value].mean()
    return means.sort_index()


def _paired(a, b) -> tuple[np.ndarray, np.ndarray]:
    """Return two measures as arrays; raise ValueError if they are not of the same units."""
    a = np.asarray_chkfinite(a, float)
    b = np.asarray_chkfinite(b, float)
    if a.shape != b.shape:
        raise ValueError(f"shapes differ: {a.shape} and {b.shape}; pair the units")
    return a, b


def _places(values) -> np.ndarray:
    """Return the place of each value among the different ones in their order, from 0."""
    _, places = np.unique(values, return_inverse=True)
    return places


def _ranks(places) -> np.ndarray:
    """Return ranks from 1 of what has these places; equals get the mean of theirs."""
    counts = np.bincount(places)
    last = counts.cumsum()
    means = last - (counts - 1) / 2
    return means[places]


def _rho(places_a, places_b) -> float:
    """Return Spearman's rank correlation of two measures by their places.

    It is 0 if all values of one are equal.
    """
    ranks_a = _ranks(places_a)
    ranks_b = _ranks(places_b)
    spread_a = np.ptp(ranks_a)
    spread_b = np.ptp(ranks_b)
    if spread_a == 0 or spread_b == 0:
        return 0.0
    matrix = np.corrcoef(ranks_a, ranks_b)
    return float(matrix[0, 1])
