"""Propositions 4 and 5 and Theorem 6 of MallowsPO, by hand and with what would break them."""

import numpy as np
import pytest

from beyond_dpo.pipeline import theory

RANKS = np.array([[1, 2, 3], [3, 1, 2]])
PHI = np.array([0.2, 0.7])


def test_an_optimum_by_hand():
    """Of rewards 0 and ln 4 with the KL weight 2: 1 to 2."""
    found = theory.optimum(np.array([[0.0, np.log(4)]]), 2.0)
    assert found[0] == pytest.approx([1 / 3, 2 / 3])


def test_preferences_by_hand():
    """Of neighbours both links say 1 / (1 + φ) but θ, whose weight is twice −log φ."""
    by_theta = theory.theta_preferences(RANKS, PHI)
    by_phi = theory.phi_preferences(RANKS, PHI)
    assert by_theta[0, 0, 1] == pytest.approx(1 / (1 + 0.2**2))
    assert by_phi[0, 0, 1] == pytest.approx(1 / (1 + 0.2))
    assert by_phi[1, 1, 2] == pytest.approx(1 / (1 + 0.7))
    for chances in (by_theta, by_phi):
        assert chances + chances.transpose(0, 2, 1) == pytest.approx(np.ones((2, 3, 3)))


@pytest.mark.parametrize("gap", [-3, -1, 0, 1, 2])
def test_places_are_the_inverse_of_the_link(gap):
    ranks = np.array([[5, 5 - gap]]) if gap else np.array([[5, 5]])
    chance = theory.phi_preferences(ranks, np.array([0.4]))[0, 1, 0]
    assert theory.phi_places(float(chance), 0.4) == pytest.approx(gap, abs=1e-9)


@pytest.mark.parametrize("beta", [0.5, 2.0])
def test_every_statement_holds(beta):
    found = theory.checks(RANKS, PHI, beta)
    assert found.pop("needs_weights") > 0.01
    assert len(found) == 5
    assert max(found.values()) < 1e-6


def test_a_wrong_weight_breaks_theorem_6():
    """With f = 1 in place of 1/c the optimum is another one."""
    values = np.log(theory.theta_preferences(RANKS, PHI))
    values = values - values.transpose(0, 2, 1)  # the log-odds
    best = theory.optimum(-RANKS.astype(float), 0.5)
    c = -2 * np.log(PHI)
    assert theory.psi_optimum(values, 1 / c, 0.5) == pytest.approx(best)
    wrong = theory.psi_optimum(values, np.ones(2), 0.5)
    assert np.abs(wrong - best).max() > 0.01
