"""Weights from entropies, derived by hand, and Mallows rankings against the exact law."""

import itertools
import math
import subprocess
import sys

import numpy as np
import pytest
import torch

from beyond_dpo import dispersion


def test_hand_values():
    """Mean entropies e^-1 and e^-3: -ln H is 1 and 3, phi_star 1/2, the weights 1/2 and 3/2."""
    first = math.exp(-1)
    second = math.exp(-3)
    weight, phi_star = dispersion.weights(
        [first + 0.1, second],
        [first - 0.1, second],
        ["a", "b"],
    )
    assert weight.tolist() == pytest.approx([0.5, 1.5])
    assert phi_star == pytest.approx(0.5)
    phi = dispersion.to_phi(weight)
    assert phi.tolist() == pytest.approx([math.exp(-0.5), math.exp(-1.5)])


def test_a_scale_that_is_given_is_kept():
    """1/2 weights a row with the mean entropy e^-2 as 1."""
    entropies = [math.exp(-2)]
    weight, phi_star = dispersion.weights(entropies, entropies, ["c"], phi_star=0.5)
    assert weight.tolist() == pytest.approx([1.0])
    assert phi_star == 0.5


def test_scale_of_the_authors_code():
    """Their 0.29 belongs to a geometric mean entropy of 0.0318 (-ln H = 3.448)."""
    around_mean = np.array([-0.5, 0.0, 0.5])
    entropies = np.exp(-3.448 + around_mean)
    _, phi_star = dispersion.weights(entropies, entropies, "abc")
    assert phi_star == pytest.approx(0.29, abs=1e-4)


@pytest.fixture
def entropies():
    """Return what reference.load does, a float32 tensor (rows, names)."""
    generator = torch.Generator().manual_seed(0)
    return torch.rand(500, 2, generator=generator) * 0.2 + 1e-4


def test_the_mean_weight_is_one(entropies):
    weight, _ = dispersion.weights(entropies[:, 0], entropies[:, 1], range(500))
    assert isinstance(weight, np.ndarray)
    assert weight.dtype == np.float64
    assert weight.shape == (500,)
    assert weight.mean() == pytest.approx(1, abs=1e-13)


def test_more_entropy_weighs_less(entropies):
    weight, _ = dispersion.weights(entropies[:, 0], entropies[:, 1], range(500))
    mean_entropies = entropies.double().mean(1).numpy()
    by_entropy = weight[np.argsort(mean_entropies)]
    assert (np.diff(by_entropy) < 0).all()


def test_phi_is_between_0_and_1(entropies):
    weight, _ = dispersion.weights(entropies[:, 0], entropies[:, 1], range(500))
    phi = dispersion.to_phi(weight)
    assert (phi > 0).all()
    assert (phi < 1).all()


def test_the_scale_of_a_set_weights_a_part_of_it_alike(entropies):
    weight, phi_star = dispersion.weights(entropies[:, 0], entropies[:, 1], range(500))
    part = entropies[:7]
    part_weight, part_scale = dispersion.weights(part[:, 0], part[:, 1], range(7), phi_star)
    assert part_scale == phi_star
    assert (part_weight == weight[:7]).all()


FAULTS = {
    "NaN": (
        [0.1, np.nan],
        [0.1, 0.1],
        None,
        "row b: normalised entropies nan and 0.1 .* the response is empty",
    ),
    "both 0": (
        [0.1, 0.0],
        [0.1, 0.0],
        None,
        "row b: normalised entropies 0.0 and 0.0 have no weight",
    ),
    "one 0": (
        [0.0, 0.1],
        [0.2, 0.1],
        None,
        "row a: normalised entropies 0.0 and 0.2 have no weight",
    ),
    "1": ([0.1, 0.1], [0.1, 1.0], None, "row b: .* 0.1 and 1.0"),
    "negative": ([-0.1, 0.1], [0.3, np.inf], None, "row a: .* -0.1 and 0.3"),
    "unequal": ([0.1, 0.1], [0.3], None, r"entropies \(2,\) and \(1,\) for 2 rows"),
    "too few": ([0.1], [0.3], None, r"entropies \(1,\) and \(1,\) for 2 rows"),
    "scale 0": (
        [0.1, 0.2],
        [0.3, 0.2],
        0.0,
        "phi_star must be a positive finite number, got 0.0",
    ),
    "scale NaN": (
        [0.1, 0.2],
        [0.3, 0.2],
        np.nan,
        "phi_star must be a positive finite number, got nan",
    ),
}


@pytest.mark.parametrize("chosen, rejected, phi_star, message", FAULTS.values(), ids=FAULTS)
def test_faults_name_the_row(chosen, rejected, phi_star, message):
    with pytest.raises(ValueError, match=message):
        dispersion.weights(chosen, rejected, ["a", "b"], phi_star)


def test_no_rows():
    with pytest.raises(ValueError, match="for 0 rows"):
        dispersion.weights([], [], [])


def inversions(ranks):
    return sum(first > second for first, second in itertools.combinations(ranks, 2))


@pytest.mark.parametrize("phi", [0.3, 0.8, 1.0])
def test_rankings_follow_the_law(phi):
    """All 24 rankings of 4 items, by chi-square.

    With 23 degrees of freedom it is above 49.7 once in 1,000.
    """
    draws = 40_000
    drawn = dispersion.mallows_rankings(4, phi, draws, seed=0)
    assert drawn.shape == (draws, 4)
    counts = []
    masses = []
    for ranks in itertools.permutations(range(4)):
        is_this = (drawn == ranks).all(1)
        counts.append(is_this.sum())
        masses.append(phi ** inversions(ranks))
    expected = draws * np.array(masses) / sum(masses)
    assert sum(counts) == draws
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert chi_square < 49.7


def test_phi_0_draws_the_central_ranking():
    ranks = dispersion.mallows_rankings(5, 0.0, 3, seed=0)
    assert (ranks == np.arange(5)).all()


def test_a_seed_draws_the_same_rankings_again():
    ranks = dispersion.mallows_rankings(6, 0.5, 50, seed=1)
    again = dispersion.mallows_rankings(6, 0.5, 50, seed=1)
    other = dispersion.mallows_rankings(6, 0.5, 50, seed=2)
    assert (ranks == again).all()
    assert (ranks != other).any()
    assert (np.sort(ranks, axis=1) == np.arange(6)).all()


@pytest.mark.parametrize("phi", [-0.1, 1.1, math.nan])
def test_rankings_of_an_impossible_phi(phi):
    with pytest.raises(ValueError, match="phi must be in"):
        dispersion.mallows_rankings(4, phi, 1, seed=0)


def test_light_imports():
    code = (
        "import sys, beyond_dpo.dispersion\n"
        "print(sorted({'torch', 'pandas', 'scipy'} & set(sys.modules)))"
    )
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert child.stdout.strip() == "[]"
