"""What MallowsPO's theory says of optima and losses, as numbers that can be compared.

Propositions 4 and 5 and Theorem 6 of arXiv 2405.14953, on prompts with a few responses: policies
are arrays, and optima are known in closed form. ranks: (prompts, responses), 1 the best; the reward
is minus the rank. phi: (prompts,), in (0, 1). c = -2 log phi.
"""

import numpy as np
from scipy.optimize import brentq
from scipy.special import expit, logit, softmax

from beyond_dpo.contextual import pair_probability

Prompts = np.ndarray  # (prompts, responses)


def optimum(rewards: Prompts, kl_weight) -> Prompts:
    """Return π ∝ exp(reward / kl_weight), the best for a uniform reference.

    kl_weight: one for all prompts, or (prompts,).
    """
    weights = np.broadcast_to(kl_weight, len(rewards))
    return softmax(rewards / weights[:, np.newaxis], axis=1)


def log_ratios(policy: Prompts) -> np.ndarray:
    """Return log π(y) − log π(y'), (prompts, responses, responses)."""
    logs = np.log(policy)
    return logs[:, :, np.newaxis] - logs[:, np.newaxis, :]


def gaps(ranks: Prompts) -> np.ndarray:
    """Return by how many places y stands before y', (prompts, responses, responses)."""
    return ranks[:, np.newaxis, :] - ranks[:, :, np.newaxis]


def theta_preferences(ranks: Prompts, phi) -> np.ndarray:
    """Return the chance that y is put before y': σ(-2 log φ · gap), Eq. 8."""
    return expit(-2 * np.log(phi)[:, np.newaxis, np.newaxis] * gaps(ranks))


def phi_preferences(ranks: Prompts, phi) -> np.ndarray:
    """Return the chance that y is put before y' by Eq. 9, ½ for y itself."""
    places = gaps(ranks).astype(float)
    apart = np.where(places == 0, 1, places)
    chances = pair_probability(apart, phi[:, np.newaxis, np.newaxis])
    return np.where(places == 0, 0.5, chances)


def phi_places(chance: float, phi: float) -> float:
    """Return the gap at which Eq. 9 gives this chance, its inverse; 0 for ½."""
    if chance == 0.5:
        return 0.0
    sure = max(chance, 1 - chance)
    gap = brentq(lambda s: float(pair_probability(s, phi)) - sure, 1e-6, 1e3, xtol=1e-13)
    return gap if chance > 0.5 else -gap


def psi_optimum(values: np.ndarray, weights, beta: float) -> Prompts:
    """Return the optimum of generalised ΨPO: π ∝ exp(f(x) · mean over y' of Ψ(p(y ≻ y')) / β).

    The reference, and who y is compared with, are uniform. values: Ψ(p), (prompts, responses,
    responses). weights: f(x), (prompts,).
    """
    means = values.mean(2)
    return softmax(weights[:, np.newaxis] * means / beta, axis=1)


def checks(ranks: Prompts, phi: np.ndarray, beta: float) -> dict[str, float]:
    """Return by how much each statement is missed at most; "needs_weights" is to be above 0.

    theta_is_dpo, phi_is_dpo: Propositions 4 and 5, see losses_apart(). reward_or_kl: a reward
    divided by c has the optimum of a KL weight of c·β, and there σ(c·β·Δ) is how often y is
    preferred. theta_is_psi, phi_is_psi: Theorem 6, Ψ = logit with f = 1/c, and Ψ the inverse of
    Eq. 9, counted in places, have MallowsPO's optimum. needs_weights: with Ψ = logit and one f for
    all prompts, how far apart (total variation) the optima of the prompts are at most, whose
    central rankings are one.
    """
    c = -2 * np.log(phi)
    rewards = -ranks.astype(float)
    stretched = optimum(rewards, beta * c)
    divided = optimum(rewards / c[:, np.newaxis], beta)
    seen = expit(c[:, np.newaxis, np.newaxis] * beta * log_ratios(stretched))
    wanted = expit(gaps(ranks))
    best = optimum(rewards, beta)
    by_logit = logit(theta_preferences(ranks, phi))
    inverse = np.vectorize(phi_places)
    by_places = inverse(phi_preferences(ranks, phi), phi[:, np.newaxis, np.newaxis])
    ones = np.ones(len(phi))
    same = np.broadcast_to(ranks[0], ranks.shape)
    unweighted = psi_optimum(logit(theta_preferences(same, phi)), ones, beta)
    return {
        **losses_apart(ranks, phi, beta),
        "reward_or_kl": max(_largest(stretched - divided), _largest(seen - wanted)),
        "theta_is_psi": _largest(psi_optimum(by_logit, 1 / c, beta) - best),
        "phi_is_psi": _largest(psi_optimum(by_places, ones, beta) - best),
        "needs_weights": float(np.abs(unweighted[:, np.newaxis] - unweighted).sum(2).max() / 2),
    }


def losses_apart(ranks: Prompts, phi: np.ndarray, beta: float) -> dict[str, float]:
    """Return how far MallowsPO's losses are from DPO's with the KL weight c·β, at most.

    theta_is_dpo: Proposition 4, the losses of the package. phi_is_dpo: Proposition 5, where DPO has
    the link g(u / c) in the place of σ(u). Both at the log-ratios of a policy that is not best.
    """
    import torch

    from beyond_dpo import losses

    c = -2 * np.log(phi)
    ratios = log_ratios(optimum(ranks % 3 - 1.0, 1.0))
    shape = ratios.shape
    first = torch.from_numpy(ratios).flatten()
    second = torch.zeros_like(first)
    by_row = torch.from_numpy(np.broadcast_to(c[:, np.newaxis, np.newaxis], shape).copy()).flatten()
    dispersions = torch.exp(-by_row / 2)
    theta, *_ = losses.mallows_theta(first, second, by_row, beta=beta)
    mallows_phi, *_ = losses.mallows_phi(first, second, dispersions, beta=beta, epsilon=0.1)
    u = by_row * beta * first
    dpo = -torch.nn.functional.logsigmoid(u)
    linked = -torch.log(losses.mallows_link(u / by_row, dispersions, 0.1))
    return {
        "theta_is_dpo": _largest((theta - dpo).numpy()),
        "phi_is_dpo": _largest((mallows_phi - linked).numpy()),
    }


def _largest(differences: np.ndarray) -> float:
    return float(np.abs(differences).max())
