"""Find the α of ExPO (arXiv 2404.16792) in few evaluations.

The paper tries a grid by hand. Reward against α rises, peaks and falls, so a golden-section search
needs fewer points. The same prompts at every α (paired) keep the sampling noise out of the
comparison.
"""

import dataclasses
import math
from collections.abc import Callable

import numpy as np

GOLDEN = (math.sqrt(5) - 1) / 2
NARROW = 0.042  # the width of an interval of ln(1 + α) that is not searched further
DRAWS = 2000  # of the bootstrap


@dataclasses.dataclass(frozen=True)
class Search:
    """The result of a search: the α with the highest mean reward, and how sure the prompts are."""

    alpha: float  # one of those that were evaluated
    low: float  # 95 % of bootstrap draws of the prompts choose an α from low to high
    high: float
    rewards: dict[float, np.ndarray]  # {α: (prompts,) rewards}, in the order of evaluation


def golden_section(
    evaluate: Callable[[float], np.ndarray],
    bracket: tuple[float, float],
    evaluations: int,
    *,
    seed: int,
) -> Search:
    """Search the maximum of mean(evaluate(α)), which should rise and then fall.

    α = 0, the aligned model itself, is evaluated first, for what the search gains. Then golden
    section on ln(1 + α), whose interval shrinks by 0.618 with each call. α is rounded to three
    digits.

    Args:
        evaluate: returns the (prompts,) rewards at α, for the same prompts each time.
        bracket: the lowest and the highest α.
        evaluations: how often evaluate is called at most.
        seed: of the bootstrap draws.
    Raises:
        ValueError: a bad bracket, too few evaluations, or rewards that are not finite.
    """
    require_search(bracket, evaluations)
    low, high = bracket
    rewards: dict[float, np.ndarray] = {}

    def mean_reward(log_point: float) -> float:
        alpha = float(f"{math.expm1(log_point):.3g}")
        if alpha not in rewards:
            rewards[alpha] = _finite(evaluate(alpha), alpha)
        return rewards[alpha].mean()

    mean_reward(0.0)
    a = math.log1p(low)
    b = math.log1p(high)
    while len(rewards) < evaluations and b - a > NARROW:
        # After the first round one of the two was evaluated before, and is not evaluated again.
        left = b - GOLDEN * (b - a)
        right = a + GOLDEN * (b - a)
        if mean_reward(left) >= mean_reward(right):
            b = right
        else:
            a = left
    return choose(rewards, seed)


def require_search(bracket: tuple[float, float], evaluations: int) -> None:
    """Raise ValueError for a bracket or a number of evaluations that cannot be searched with."""
    low, high = bracket
    if not (0 <= low < high < math.inf) or evaluations < 4:
        raise ValueError(
            f"need 0 <= low < high and at least 4 evaluations, got {bracket} and {evaluations}"
        )


def _finite(values, alpha: float) -> np.ndarray:
    """Return the rewards at α as an array; raise ValueError for one that is not finite."""
    rewards = np.asarray(values, dtype=float)
    finite = np.isfinite(rewards)
    if not finite.all():
        prompt = np.argmin(finite)
        raise ValueError(f"the reward of prompt {prompt} at α={alpha} is not finite")
    return rewards


def choose(rewards: dict[float, np.ndarray], seed: int) -> Search:
    """Choose the α with the highest mean, and see which ones other draws of the prompts choose.

    rewards: {α: (prompts,) rewards}, of the same prompts. seed: of the bootstrap draws.
    """
    alphas = list(rewards)
    table = np.stack(list(rewards.values()))
    best = table.mean(1).argmax()
    prompts = table.shape[1]
    generator = np.random.default_rng(seed)
    draws = generator.integers(prompts, size=(DRAWS, prompts))
    best_of_draws = table[:, draws].mean(2).argmax(0)
    chosen = np.array(alphas)[best_of_draws]
    low, high = np.quantile(chosen, [0.025, 0.975], method="nearest")
    return Search(alphas[best], float(low), float(high), rewards)
