"""Weights from entropies: values derived by hand, relations, faults; rankings against the exact
law.
"""

import itertools
import math
import subprocess
import sys

import numpy as np
import pytest
import torch

from beyond_dpo import dispersion


def test_hand_values():
    """Means of the entropies e^-1 and e^-3: -ln H is 1 and 3, phi_star 1/2, the weights 1/2 and
    3/2.

    The same scale given to a set of one row with mean e^-2 weights it 1.
    """
    h = [math.exp(-1), math.exp(-3)]
    weight, phi_star = dispersion.weights([h[0] + 0.1, h[1]], [h[0] - 0.1, h[1]], ["a", "b"])
    assert weight.tolist() == pytest.approx([0.5, 1.5]) and phi_star == pytest.approx(0.5)
    assert dispersion.to_phi(weight).tolist() == pytest.approx([math.exp(-0.5), math.exp(-1.5)])
    weight, phi_star = dispersion.weights([math.exp(-2)], [math.exp(-2)], ["c"], phi_star=0.5)
    assert weight.tolist() == pytest.approx([1.0]) and phi_star == 0.5


def test_scale_of_the_authors_code():
    """Their 0.29 belongs to a geometric mean entropy of 0.0318 (-ln H = 3.448)."""
    h = np.exp(-3.448 + np.array([-0.5, 0.0, 0.5]))
    assert dispersion.weights(h, h, "abc")[1] == pytest.approx(0.29, abs=1e-4)


def test_mean_is_one_and_more_entropy_weighs_less():
    """From what reference.load returns, a float32 tensor (rows, names)."""
    entropies = torch.rand(500, 2, generator=torch.Generator().manual_seed(0)) * 0.2 + 1e-4
    weight, phi_star = dispersion.weights(entropies[:, 0], entropies[:, 1], range(500))
    assert isinstance(weight, np.ndarray) and weight.dtype == np.float64 and weight.shape == (500,)
    assert weight.mean() == pytest.approx(1, abs=1e-13)
    assert (np.diff(weight[np.argsort(entropies.double().mean(1).numpy())]) < 0).all()
    phi = dispersion.to_phi(weight)
    assert ((phi > 0) & (phi < 1)).all()
    again, same = dispersion.weights(entropies[:7, 0], entropies[:7, 1], range(7), phi_star)
    assert same == phi_star and (again == weight[:7]).all()


@pytest.mark.parametrize(
    ("chosen", "rejected", "phi_star", "message"),
    [
        (
            [0.1, np.nan],
            [0.1, 0.1],
            None,
            "row b: normalised entropies nan and 0.1 .* the response is empty",
        ),
        ([0.1, 0.0], [0.1, 0.0], None, "row b: normalised entropies 0.0 and 0.0 have no weight"),
        ([0.0, 0.1], [0.2, 0.1], None, "row a: normalised entropies 0.0 and 0.2 have no weight"),
        ([0.1, 0.1], [0.1, 1.0], None, "row b: .* 0.1 and 1.0"),
        ([-0.1, 0.1], [0.3, np.inf], None, "row a: .* -0.1 and 0.3"),
        ([0.1, 0.1], [0.3], None, r"entropies \(2,\) and \(1,\) for 2 rows"),
        ([0.1], [0.3], None, r"entropies \(1,\) and \(1,\) for 2 rows"),
        ([0.1, 0.2], [0.3, 0.2], 0.0, "phi_star must be a positive finite number, got 0.0"),
        ([0.1, 0.2], [0.3, 0.2], np.nan, "phi_star must be a positive finite number, got nan"),
    ],
)
def test_faults_name_the_row(chosen, rejected, phi_star, message):
    with pytest.raises(ValueError, match=message):
        dispersion.weights(chosen, rejected, ["a", "b"], phi_star)


def test_no_rows():
    with pytest.raises(ValueError, match="for 0 rows"):
        dispersion.weights([], [], [])


@pytest.mark.parametrize("phi", [0.3, 0.8, 1.0])
def test_rankings_follow_the_law(phi):
    """All 24 rankings of 4 items: chi-square with 23 degrees of freedom is above 49.7 once in
    1,000.
    """
    draws = 40_000
    found = dispersion.mallows_rankings(4, phi, draws, seed=0)
    assert found.shape == (draws, 4)
    rankings = list(itertools.permutations(range(4)))
    mass = np.array([phi ** sum(a > b for a, b in itertools.combinations(r, 2)) for r in rankings])
    counts = np.array([(found == r).all(1).sum() for r in rankings])
    expected = draws * mass / mass.sum()
    assert counts.sum() == draws and ((counts - expected) ** 2 / expected).sum() < 49.7


def test_rankings_at_the_ends_and_seeds():
    assert (dispersion.mallows_rankings(5, 0.0, 3, seed=0) == np.arange(5)).all()
    a, b, c = (dispersion.mallows_rankings(6, 0.5, 50, seed) for seed in (1, 1, 2))
    assert (a == b).all() and (a != c).any() and (np.sort(a, axis=1) == np.arange(6)).all()
    for phi in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="phi must be in"):
            dispersion.mallows_rankings(4, phi, 1, seed=0)


def test_light_imports():
    code = (
        "import sys, beyond_dpo.dispersion; print(sorted({'torch', 'pandas', 'scipy'} & "
        "set(sys.modules)))"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip()
        == "[]"
    )
