"""What the α curves of several models and trainings say: gates, chosen α, effects with errors.

The trainings of all models share seeds and prompts, so what is compared is compared training by
training and prompt by prompt (stats.two_level).
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from beyond_dpo import stats

# A point passes the gate if its responses repeat at most so many more of their trigrams than the
# SFT model's, and have at least this share of its distinct bigrams. Of others no reward is to be
# trusted.
MORE_REPETITION = 0.05
LEAST_DISTINCT = 0.5
CHOOSES = "reward"  # the measure by which an α is chosen: the reward model
Model = Hashable  # a value of the table's column that tells the models apart


def passes_gate(repetition, distinct, sft_repetition, sft_distinct):
    """Return whether responses are such that a reward means something; numbers or arrays.

    repetition: mean share of repeated trigrams. distinct: share of distinct bigrams. Both also of
    the SFT model, on the same prompts.
    """
    repeats_little = repetition <= sft_repetition + MORE_REPETITION
    return repeats_little & (distinct >= LEAST_DISTINCT * sft_distinct)


@dataclass(frozen=True)
class Quantity:
    """A number of each training, which depends on the prompts that are drawn.

    of_draws: takes the indices of dev and of test prompts, (draws, prompts) each, and returns
    (draws, trainings).
    """

    of_draws: Callable[[np.ndarray, np.ndarray], np.ndarray]
    trainings: int

    def __sub__(self, other: "Quantity") -> "Quantity":
        trainings = min(self.trainings, other.trainings)

        def difference(dev: np.ndarray, test: np.ndarray) -> np.ndarray:
            left = self.of_draws(dev, test)[:, :trainings]
            return left - other.of_draws(dev, test)[:, :trainings]

        return Quantity(difference, trainings)


class AlphaCurves:
    """Measures of responses at each α of several models, each trained with several seeds.

    Args:
        table: a row a response, with the columns split ("dev", "test"), `label`, seed, alpha,
            prompt and every measure.
        points: a row a point, with the same columns and "distinct_2".
        label: the column that tells the models apart.
        sft: its value for the SFT model, which has one row of points, at any α.
        bootstrap_seed: of all intervals.
        chooses_on: the split on which α is chosen and the gate is looked at; "test" where nothing
            is chosen and there are no dev prompts.
    Raises:
        ValueError: for a model without a point of one of its seeds.
    """

    def __init__(
        self,
        table: pd.DataFrame,
        points: pd.DataFrame,
        label: str,
        sft: Model,
        bootstrap_seed: int,
        chooses_on: str = "dev",
    ):
        self.chooses_on = chooses_on
        self.label = label
        self.sft_label = sft
        self.bootstrap_seed = bootstrap_seed
        aligned = table[table[label] != sft]
        self.models = list(aligned[label].unique())
        grids = aligned.groupby(label)["alpha"]
        self.alphas = {model: np.sort(grid.unique()) for model, grid in grids}
        self.table = table
        self.points = points
        self.sizes = [
            table[table["split"] == split]["prompt"].nunique() for split in (chooses_on, "test")
        ]
        self._gates = {model: self._passes(model) for model in self.models}
        self._rewards = {model: self.values(model, CHOOSES, chooses_on) for model in self.models}

    # ---- arrays

    def seeds(self, model: Model) -> list[int]:
        """Return the seeds that a model was trained with, in their order."""
        return sorted(self.table[self.table[self.label] == model]["seed"].unique())

    def values(self, model: Model, measure: str, split: str) -> np.ndarray:
        """Return the mean over samples of a measure, (trainings, α, prompts)."""
        rows = self.table[(self.table[self.label] == model) & (self.table["split"] == split)]
        means = rows.groupby(["seed", "alpha", "prompt"])[measure].mean()
        seeds, alphas, prompts = means.index.levshape
        if len(means) != seeds * alphas * prompts:
            raise ValueError(f"{model} lacks points: every seed needs the same α and prompts")
        return means.sort_index().to_numpy().reshape(seeds, alphas, prompts)

    def gates(self, model: Model) -> np.ndarray:
        """Return which points of a model pass the gate, (trainings, α)."""
        return self._gates[model]

    def fails(self, model: Model) -> bool:
        """Return whether a model passes the gate at no α in half of its trainings or more."""
        return self.gates(model).any(1).mean() <= 0.5

    def kl(self, model: Model) -> np.ndarray:
        """Return the mean log-ratio to the SFT model (nats) of each point, (trainings, α)."""
        rows = self.table[self.table[self.label] == model]
        means = rows.groupby(["seed", "alpha"])["logratio"].mean()
        return means.sort_index().to_numpy().reshape(-1, len(self.alphas[model]))

    def _passes(self, model: Model) -> np.ndarray:
        repetition = self.values(model, "repetition", self.chooses_on).mean(-1)
        of_sft = self.values(self.sft_label, "repetition", self.chooses_on).mean()
        distinct = self._distinct(model)
        distinct_of_sft = self._distinct(self.sft_label).item()
        return passes_gate(repetition, distinct, of_sft, distinct_of_sft)

    def _distinct(self, model: Model) -> np.ndarray:
        """Return the distinct bigrams of each point, (trainings, α)."""
        points = self.points
        rows = points[(points[self.label] == model) & (points["split"] == self.chooses_on)]
        return rows.pivot(index="seed", columns="alpha", values="distinct_2").to_numpy()

    # ---- quantities

    def sft(self, measure: str = "gold") -> Quantity:
        """Return a measure of the SFT model, the same for each training."""
        return self.once(self.sft_label, measure)

    def once(self, model: Model, measure: str = "gold") -> Quantity:
        """Return a measure of a model that others start from, the same for each of their trainings.

        It has one point.
        """
        values = self.values(model, measure, "test")[0, 0]
        most = max(len(self.seeds(model)) for model in self.models)

        def mean(_, test: np.ndarray) -> np.ndarray:
            means = values[test].mean(-1)
            return np.repeat(means[:, np.newaxis], most, axis=1)

        return Quantity(mean, most)

    def at(self, model: Model, alpha: float, measure: str = "gold") -> Quantity:
        """Return a measure of a model at one α of its grid, on test prompts."""
        (place,) = np.flatnonzero(np.isclose(self.alphas[model], alpha))
        values = self.values(model, measure, "test")[:, place]

        def mean(_, test: np.ndarray) -> np.ndarray:
            return values[:, test].mean(-1).T

        return Quantity(mean, len(values))

    def chosen(self, model: Model, measure: str = "gold") -> Quantity:
        """Return a measure of a model at the α that is chosen, on test prompts.

        The reward model chooses on dev prompts, among the points that pass the gate, and anew in
        each draw. Where no point passes it is the smallest α; see fails().
        """
        values = self.values(model, measure, "test")
        trainings = np.arange(len(values))

        def mean(dev: np.ndarray, test: np.ndarray) -> np.ndarray:
            places = self._chosen_places(model, dev)
            means = values[:, :, test].mean(-1)  # (trainings, α, draws)
            draws = np.arange(len(dev))[:, np.newaxis]
            return means[trainings, places, draws]

        return Quantity(mean, len(values))

    def at_kl_of(self, model: Model, other: Model, measure: str = "gold") -> Quantity:
        """Return a measure of a model where its KL is that of another at α = 0, on test prompts.

        It is read off the line between the two neighbouring points of the model's curve that pass
        the gate; beyond its ends it is that of the end.
        """
        values = self.values(model, measure, "test")
        targets = self.kl(other)[:, 0]
        trainings = min(len(values), len(targets))
        weights = np.zeros((trainings, len(self.alphas[model])))
        for k in range(trainings):
            passing = np.flatnonzero(self.gates(model)[k])
            if len(passing):
                weights[k, passing] = _interpolation(self.kl(model)[k][passing], targets[k])
            else:
                weights[k, 0] = 1

        def mean(_, test: np.ndarray) -> np.ndarray:
            means = values[:trainings, :, test].mean(-1)
            return np.einsum("kad,ka->dk", means, weights)

        return Quantity(mean, trainings)

    def _chosen_places(self, model: Model, dev: np.ndarray) -> np.ndarray:
        """Return the place in the grid of the α that is chosen in each draw, (draws, trainings)."""
        rewards = self._rewards[model][:, :, dev].mean(-1)
        passing = self.gates(model)[:, :, np.newaxis]
        return np.where(passing, rewards, -np.inf).argmax(1).T

    def shrinking(self) -> Quantity:
        """Return how far the chosen α falls as the models' labels, which are numbers, rise.

        It is the rank correlation of label and −α in each training, 0 where all α are the same.
        """
        from scipy.stats import rankdata

        trainings = min(len(self.seeds(model)) for model in self.models)
        labels = rankdata([float(model) for model in self.models])

        def correlation(dev: np.ndarray, _) -> np.ndarray:
            alphas = []
            for model in self.models:
                places = self._chosen_places(model, dev)[:, :trainings]
                alphas.append(self.alphas[model][places])
            ranks = rankdata(-np.stack(alphas, -1), axis=-1)
            return _correlation(ranks, labels)

        return Quantity(correlation, trainings)

    # ---- estimates

    def estimate(self, quantity: Quantity) -> stats.Estimate:
        """Return the mean of a quantity over trainings, with its error."""

        def measure(dev: np.ndarray, test: np.ndarray) -> np.ndarray:
            return quantity.of_draws(dev, test)[..., np.newaxis]

        return stats.two_level(measure, self.sizes, seed=self.bootstrap_seed)

    def share(self, quantity: Quantity, of: Quantity) -> stats.Estimate:
        """Return the mean of a quantity over that of another, with the error of both."""
        trainings = min(quantity.trainings, of.trainings)

        def measure(dev: np.ndarray, test: np.ndarray) -> np.ndarray:
            above = quantity.of_draws(dev, test)[:, :trainings]
            below = of.of_draws(dev, test)[:, :trainings]
            return np.stack([above, below], -1)

        def ratio(means: np.ndarray) -> np.ndarray:
            return means[..., 0] / means[..., 1]

        return stats.two_level(measure, self.sizes, ratio, seed=self.bootstrap_seed)

    def in_units_of(self, quantity: Quantity, unit: Quantity) -> stats.Estimate:
        """Return the mean of a quantity over that of another, the error of both to first order.

        As share(), for units that are not far from 0 in every draw of prompts: the error is that of
        quantity − ratio · unit. Raises ValueError for a unit of mean 0.
        """
        mean_unit = self.estimate(unit).value
        if mean_unit == 0:
            raise ValueError("the unit has a mean of 0")
        ratio = self.estimate(quantity).value / mean_unit
        trainings = min(quantity.trainings, unit.trainings)

        def residual(dev: np.ndarray, test: np.ndarray) -> np.ndarray:
            above = quantity.of_draws(dev, test)[:, :trainings]
            below = unit.of_draws(dev, test)[:, :trainings]
            return (above - ratio * below) / mean_unit

        error = self.estimate(Quantity(residual, trainings))
        return replace(error, value=ratio)

    # ---- tables

    def choices(self) -> pd.DataFrame:
        """Return the chosen α of each model and seed, and the largest one that passes the gate."""
        every_prompt = np.arange(self.sizes[0])[np.newaxis]
        rows = []
        for model in self.models:
            places = self._chosen_places(model, every_prompt)[0]
            for k, seed in enumerate(self.seeds(model)):
                passing = self.alphas[model][self.gates(model)[k]]
                largest = passing.max() if len(passing) else np.nan
                chosen = self.alphas[model][places[k]]
                row = {self.label: model, "seed": seed, "alpha": chosen, "largest_passing": largest}
                rows.append(row)
        return pd.DataFrame(rows)

    def summary(self, measure: str, split: str = "test") -> pd.DataFrame:
        """Return the mean of a measure at every point with its interval over trainings and prompts.

        Prompts on which it was not measured, as the log-ratio is on some alone, are left out.
        passes: whether the point passes the gate in most trainings.
        """
        rows = []
        for model in self.models:
            values = self.values(model, measure, split)
            values = values[:, :, np.isfinite(values).all((0, 1))]
            passing = self.gates(model).mean(0) > 0.5
            for place, alpha in enumerate(self.alphas[model]):
                mean = stats.two_level_mean(values[:, place], seed=self.bootstrap_seed)
                row = {self.label: model, "alpha": alpha, "mean": mean.value}
                row |= {"low": mean.low, "high": mean.high, "passes": bool(passing[place])}
                rows.append({**row, "trainings": mean.trainings})
        return pd.DataFrame(rows)


def _interpolation(x: np.ndarray, target: float) -> np.ndarray:
    """Return the weights of points at x whose weighted mean lies at `target` on the line."""
    order = np.argsort(x)
    weights = np.zeros(len(x))
    place = np.interp(target, x[order], np.arange(len(x)))
    below = int(np.floor(place))
    above = min(below + 1, len(x) - 1)
    part = place - below
    weights[order[below]] += 1 - part
    weights[order[above]] += part
    return weights


def _correlation(ranks: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the correlation of the last axis of ranks with labels; 0 where ranks are equal."""
    ranks = ranks - ranks.mean(-1, keepdims=True)
    labels = labels - labels.mean()
    spread = np.sqrt((ranks**2).sum(-1) * (labels**2).sum())
    products = ranks @ labels
    return np.divide(products, spread, out=np.zeros_like(products), where=spread > 0)
