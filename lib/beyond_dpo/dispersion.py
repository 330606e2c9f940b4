"""Dispersion of prompts, estimated from the reference model's entropies, and Mallows rankings.

MallowsPO, arXiv 2405.14953. A prompt whose answers the reference model is sure of has a small
dispersion index phi; -log phi weights its pair.
"""

import numpy as np


def weights(
    chosen_entropies,
    rejected_entropies,
    ids,
    phi_star: float | None = None,
) -> tuple[np.ndarray, float]:
    """Return the weight of every pair and the scale phi_star that gave it.

    Eq. 10 and 11 as in the authors' code:
        weight = -phi_star * ln H,  H = (chosen_entropy + rejected_entropy) / 2,
        phi_star = 1 / mean(-ln H),
    so that the mean weight of the data set is 1.

    Args:
        chosen_entropies: (rows,), as reference.load gives them: the reference model's entropy
            divided by ln |V|, averaged over the tokens of the response, each in (0, 1).
        rejected_entropies: (rows,), the same of the rejected response.
        ids: (rows,), named in errors.
        phi_star: a scale found before, > 0: that of the training set, to weight another set alike.
    Returns:
        weight, (rows,) float64, > 0 and without unit; phi_star.
    Raises:
        ValueError: no rows, unequal lengths, a phi_star that is not positive and finite, or an
            entropy out of its range or NaN, as that of an empty response is (naming the id).
    """
    chosen = np.asarray(chosen_entropies, dtype=float)
    rejected = np.asarray(rejected_entropies, dtype=float)
    _check_entropies(chosen, rejected, ids)
    entropies = (chosen + rejected) / 2
    sureness = -np.log(entropies)
    if phi_star is None:
        phi_star = float(1 / sureness.mean())
    if not 0 < phi_star < np.inf:
        raise ValueError(f"phi_star must be a positive finite number, got {phi_star!r}")
    weight = phi_star * sureness
    return weight, phi_star


def _check_entropies(chosen: np.ndarray, rejected: np.ndarray, ids) -> None:
    """Raise ValueError unless every row has two entropies in (0, 1)."""
    rows = len(ids)
    one_of_each = chosen.shape == rejected.shape == (rows,)
    if rows == 0 or not one_of_each:
        shapes = f"{chosen.shape} and {rejected.shape}"
        raise ValueError(f"entropies {shapes} for {rows} rows; give one of each per row")
    lower = np.minimum(chosen, rejected)
    higher = np.maximum(chosen, rejected)
    is_valid = (lower > 0) & (higher < 1)  # False for NaN
    if is_valid.all():
        return
    row = int(np.argmin(is_valid))
    entropies = f"{chosen[row]} and {rejected[row]}"
    raise ValueError(
        f"row {ids[row]}: normalised entropies {entropies} have no weight; "
        "each must be in (0, 1) (NaN: the response is empty)"
    )


def to_phi(weight) -> np.ndarray:
    """Return the dispersion index exp(-weight) for losses.mallows_phi, (rows,) float64 in (0, 1).

    The weight stands for the paper's -log phi (Eq. 10). For the theta loss, whose factor is
    -2 log phi, it is taken as it is: the mean 1 fixes its scale.
    """
    weight = np.asarray(weight, dtype=float)
    return np.exp(-weight)


def mallows_rankings(n_items: int, phi: float, draws: int, seed: int) -> np.ndarray:
    """Draw rankings from P(ranks) = phi^inversions / Z (Eq. 5, Kendall's distance).

    Repeated insertion: item k passes j of the k items before it with a chance in proportion to
    phi^j. phi is in [0, 1], and 1 is uniform; raises ValueError for another one.

    Returns (draws, n_items) integers: [i, k] is the rank of item k in draw i, 0 the best. The
    central ranking is 0, 1, 2, …
    """
    if not 0 <= phi <= 1:
        raise ValueError(f"phi must be in [0, 1], got {phi!r}")
    generator = np.random.default_rng(seed)
    shape = (draws, n_items)
    ranks = np.empty(shape, dtype=int)
    for k in range(n_items):
        places = k + 1
        passes = np.arange(places)
        chances = float(phi) ** passes
        chances /= chances.sum()
        passed = generator.choice(places, size=draws, p=chances)
        rank = k - passed
        ranks[:, k] = rank
        earlier = ranks[:, :k]
        is_passed = earlier >= rank[:, np.newaxis]
        earlier += is_passed  # in place: the items that k passed fall by one rank
    return ranks
