"""Dispersion of prompts from the reference model's entropies (MallowsPO, arXiv 2405.14953), and
Mallows rankings.

A prompt whose answers the reference model is sure of has a small dispersion index phi; -log phi
weights its pair.
"""

import numpy as np


def weights(
    chosen_entropies, rejected_entropies, ids, phi_star: float | None = None
) -> tuple[np.ndarray, float]:
    """Return the weight of every pair and the scale phi_star that gave it.

    Eq. 10 and 11 as in the authors' code:  weight = -phi_star * ln H,  H = (chosen_entropy +
    rejected_entropy) / 2, and phi_star = 1 / mean(-ln H), so that the mean weight of the data set
    is 1.

    Args:
        chosen_entropies, rejected_entropies: (rows,), as reference.load gives them: entropy / ln
            |V| of the reference model, averaged over the tokens of the response, each in (0, 1).
        ids: (rows,), named in errors.
        phi_star: a scale found before, > 0: that of the training set, to weight another set alike.
    Returns:
        weight, (rows,) float64, > 0 and without unit; phi_star.
    Raises:
        ValueError: no rows, unequal lengths, an entropy out of range or NaN as of an empty response
            (naming the id), or a phi_star that is not positive and finite.
    """
    chosen, rejected = (np.asarray(x, dtype=float) for x in (chosen_entropies, rejected_entropies))
    if not chosen.shape == rejected.shape == (len(ids),) or not len(ids):
        raise ValueError(
            f"entropies {chosen.shape} and {rejected.shape} for {len(ids)} rows; give one of each "
            "per row"
        )
    mean = (chosen + rejected) / 2
    fine = (chosen > 0) & (chosen < 1) & (rejected > 0) & (rejected < 1)
    if not fine.all():
        row = int(np.argmin(fine))
        raise ValueError(
            f"row {ids[row]}: normalised entropies {chosen[row]} and {rejected[row]} have no "
            "weight; "
            "each must be in (0, 1) (NaN: the response is empty)"
        )
    phi_star = float(1 / -np.log(mean).mean()) if phi_star is None else phi_star
    if not 0 < phi_star < np.inf:
        raise ValueError(f"phi_star must be a positive finite number, got {phi_star!r}")
    return -phi_star * np.log(mean), phi_star


def to_phi(weight) -> np.ndarray:
    """Return the dispersion index exp(-weight) for losses.mallows_phi, (rows,) float64 in (0, 1).

    The weight stands for the paper's -log phi (Eq. 10). For the theta loss, whose factor is -2 log
    phi, it is taken as
    it is: its scale is fixed by the mean 1.
    """
    return np.exp(-np.asarray(weight, dtype=float))


def mallows_rankings(n_items: int, phi: float, draws: int, seed: int) -> np.ndarray:
    """Return ranks drawn from P(ranks) = phi^inversions / Z (Eq. 5, Kendall's distance), (draws,
    n_items) integers.

    ranks[i, k] is the rank of item k in draw i, 0 the best; the central ranking is 0, 1, 2, …
    Repeated insertion: item k passes j of the k items before it with a chance in proportion to
    phi^j. phi in [0, 1], 1 is uniform. Raises ValueError for another phi.
    """
    if not 0 <= phi <= 1:
        raise ValueError(f"phi must be in [0, 1], got {phi!r}")
    generator, ranks = np.random.default_rng(seed), np.empty((draws, n_items), dtype=int)
    for k in range(n_items):
        chances = float(phi) ** np.arange(k + 1)
        ranks[:, k] = k - generator.choice(k + 1, size=draws, p=chances / chances.sum())
        ranks[:, :k] += ranks[:, :k] >= ranks[:, k : k + 1]
    return ranks
