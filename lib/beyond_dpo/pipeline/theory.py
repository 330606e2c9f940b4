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
    by_prompt = weights[:, np.newaxis]
    return softmax(rewards / by_prompt, axis=1)


def log_ratios(policy: Prompts) -> np.ndarray:
    """Return log π(y) − log π(y'), (prompts, responses, responses)."""
    logps = np.log(policy)
    of_y = logps[:, :, np.newaxis]
    of_other = logps[:, np.newaxis, :]
    return of_y - of_other


def gaps(ranks: Prompts) -> np.ndarray:
    """Return by how many places y stands before y', (prompts, responses, responses)."""
    of_y = ranks[:, :, np.newaxis]
    of_other = ranks[:, np.newaxis, :]
    return of_other - of_y


def theta_preferences(ranks: Prompts, phi) -> np.ndarray:
    """Return the chance that y is put before y': σ(-2 log φ · gap), Eq. 8."""
    c = _by_pair(_dispersion(phi))
    logits = c * gaps(ranks)
    return expit(logits)


def phi_preferences(ranks: Prompts, phi) -> np.ndarray:
    """Return the chance that y is put before y' by Eq. 9, ½ for y itself."""
    places = gaps(ranks).astype(float)
    is_same = places == 0
    apart = np.where(is_same, 1, places)
    chances = pair_probability(apart, _by_pair(phi))
    return np.where(is_same, 0.5, chances)


def phi_places(chance: float, phi: float) -> float:
    """Return the gap at which Eq. 9 gives this chance, its inverse; 0 for ½."""
    if chance == 0.5:
        return 0.0
    of_better = max(chance, 1 - chance)

    def missed(gap: float) -> float:
        probability = pair_probability(gap, phi)
        return float(probability) - of_better

    gap = brentq(missed, 1e-6, 1e3, xtol=1e-13)
    if chance < 0.5:
        return -gap
    return gap


def psi_optimum(values: np.ndarray, weights, beta: float) -> Prompts:
    """Return the optimum of generalised ΨPO: π ∝ exp(f(x) · mean over y' of Ψ(p(y ≻ y')) / β).

    The reference, and who y is compared with, are uniform. values: Ψ(p), (prompts, responses,
    responses). weights: f(x), (prompts,).
    """
    means = values.mean(2)
    by_prompt = weights[:, np.newaxis]
    logits = by_prompt * means / beta
    return softmax(logits, axis=1)


def checks(ranks: Prompts, phi: np.ndarray, beta: float) -> dict[str, float]:
    """Return by how much each statement is missed at most; "needs_weights" is to be above 0.

    theta_is_dpo, phi_is_dpo: Propositions 4 and 5, see losses_apart(). reward_or_kl: a reward
    divided by c has the optimum of a KL weight of c·β, and there σ(c·β·Δ) is how often y is
    preferred. theta_is_psi, phi_is_psi: Theorem 6, Ψ = logit with f = 1/c, and Ψ the inverse of
    Eq. 9, counted in places, have MallowsPO's optimum. needs_weights: with Ψ = logit and one f for
    all prompts, how far apart (total variation) the optima of the prompts are at most, whose
    central rankings are one.
    """
    return {
        **losses_apart(ranks, phi, beta),
        "reward_or_kl": _reward_or_kl(ranks, phi, beta),
        **_psi_apart(ranks, phi, beta),
        "needs_weights": _needs_weights(ranks, phi, beta),
    }


def _reward_or_kl(ranks: Prompts, phi: np.ndarray, beta: float) -> float:
    """Return how far a reward over c is from a KL weight of c·β, and σ(c·β·Δ) from preferences."""
    c = _dispersion(phi)
    rewards = -ranks.astype(float)
    with_kl_weight = optimum(rewards, beta * c)
    divided_rewards = rewards / c[:, np.newaxis]
    with_reward = optimum(divided_rewards, beta)
    optima_apart = _largest(with_kl_weight - with_reward)

    ratios = log_ratios(with_kl_weight)
    logits = _by_pair(c) * beta * ratios
    implied = expit(logits)
    preferences = expit(gaps(ranks))
    preferences_apart = _largest(implied - preferences)
    return max(optima_apart, preferences_apart)


def _psi_apart(ranks: Prompts, phi: np.ndarray, beta: float) -> dict[str, float]:
    """Return how far both optima of Theorem 6 are from MallowsPO's."""
    rewards = -ranks.astype(float)
    best = optimum(rewards, beta)

    preferences = theta_preferences(ranks, phi)
    by_logit = logit(preferences)
    weights = 1 / _dispersion(phi)
    theta = psi_optimum(by_logit, weights, beta)

    inverse = np.vectorize(phi_places)
    preferences = phi_preferences(ranks, phi)
    by_places = inverse(preferences, _by_pair(phi))
    same_weight = np.ones(len(phi))
    of_phi = psi_optimum(by_places, same_weight, beta)
    return {
        "theta_is_psi": _largest(theta - best),
        "phi_is_psi": _largest(of_phi - best),
    }


def _needs_weights(ranks: Prompts, phi: np.ndarray, beta: float) -> float:
    """Return the largest total variation between optima of one ranking, with one f for all."""
    same_ranks = np.broadcast_to(ranks[0], ranks.shape)
    preferences = theta_preferences(same_ranks, phi)
    by_logit = logit(preferences)
    same_weight = np.ones(len(phi))
    optima = psi_optimum(by_logit, same_weight, beta)
    other_optima = optima[:, np.newaxis]
    differences = np.abs(optima - other_optima)
    variations = differences.sum(2) / 2
    return _largest(variations)


def losses_apart(ranks: Prompts, phi: np.ndarray, beta: float) -> dict[str, float]:
    """Return how far MallowsPO's losses are from DPO's with the KL weight c·β, at most.

    theta_is_dpo: Proposition 4, the losses of the package. phi_is_dpo: Proposition 5, where DPO has
    the link g(u / c) in the place of σ(u). Both at the log-ratios of a policy that is not best.
    """
    import torch

    from beyond_dpo import losses

    some_rewards = ranks % 3 - 1.0
    policy = optimum(some_rewards, 1.0)
    ratios = log_ratios(policy)
    c_of_prompts = _by_pair(_dispersion(phi))
    c_of_pairs = np.broadcast_to(c_of_prompts, ratios.shape)
    first = torch.from_numpy(ratios).flatten()
    second = torch.zeros_like(first)
    c = torch.from_numpy(c_of_pairs.copy()).flatten()
    phi_of_pairs = torch.exp(-c / 2)

    theta, *_ = losses.mallows_theta(first, second, c, beta=beta)
    logits = c * beta * first
    dpo = -torch.nn.functional.logsigmoid(logits)

    by_phi, *_ = losses.mallows_phi(first, second, phi_of_pairs, beta=beta, epsilon=0.1)
    link = losses.mallows_link(logits / c, phi_of_pairs, 0.1)
    linked = -torch.log(link)
    theta_apart = theta - dpo
    phi_apart = by_phi - linked
    return {
        "theta_is_dpo": _largest(theta_apart.numpy()),
        "phi_is_dpo": _largest(phi_apart.numpy()),
    }


def _dispersion(phi: np.ndarray) -> np.ndarray:
    """Return c = -2 log φ."""
    log_phi = np.log(phi)
    return -2 * log_phi


def _by_pair(values: np.ndarray) -> np.ndarray:
    """Return (prompts,) as (prompts, 1, 1), to go with what there is of each pair of responses."""
    return values[:, np.newaxis, np.newaxis]


def _largest(differences: np.ndarray) -> float:
    sizes = np.abs(differences)
    return float(sizes.max())
