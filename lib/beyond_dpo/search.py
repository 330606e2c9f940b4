"""Find the α of ExPO (arXiv 2404.16792) in few evaluations.

The paper tries a grid by hand. Reward against α rises, peaks and falls, so a golden-section search
needs fewer points; the same prompts at every α (paired) keep the sampling noise out of the
comparison.
"""

import dataclasses
import math
from collections.abc import Callable

import numpy as np

GOLDEN = (math.sqrt(5) - 1) / 2


@dataclasses.dataclass(frozen=True)
class Search:
    """The result of a search: the α with the highest mean reward, and how sure the prompts are
    about it.

    alpha: among the evaluated. low, high: 95 % of bootstrap draws of the prompts choose an α in
    between. rewards: {α: (prompts,) mean reward of each prompt}, in the order of evaluation; α = 0,
    the aligned model itself, comes first.
    """

    alpha: float
    low: float
    high: float
    rewards: dict[float, np.ndarray]


def golden_section(
    evaluate: Callable, bracket: tuple[float, float], evaluations: int, *, seed: int
) -> Search:
    """Search the maximum of mean(evaluate(α)), which should rise and then fall, in `evaluations`
    calls.

    evaluate(α) returns the (prompts,) rewards at α, for the same prompts each time. α = 0 is
    evaluated first, for what the search gains; then golden section on ln(1 + α), whose interval
    shrinks by 0.618 with each call. α is rounded to three digits. Raises ValueError for a bad
    bracket, too few evaluations or rewards that are not finite.
    """
    low, high = bracket
    if not (0 <= low < high < math.inf) or evaluations < 4:
        raise ValueError(
            f"need 0 <= low < high and at least 4 evaluations, got {bracket} and {evaluations}"
        )
    rewards: dict[float, np.ndarray] = {}

    def mean(place: float) -> float:
        alpha = float(f"{math.expm1(place):.3g}")
        if alpha not in rewards:
            rewards[alpha] = np.asarray(evaluate(alpha), dtype=float)
            if not (finite := np.isfinite(rewards[alpha])).all():
                raise ValueError(
                    f"the reward of prompt {np.argmin(finite)} at α={alpha} is not finite"
                )
        return rewards[alpha].mean()

    mean(0.0)
    a, b = math.log1p(low), math.log1p(high)
    while len(rewards) < evaluations and b - a > 0.042:
        c, d = (
            b - GOLDEN * (b - a),
            a + GOLDEN * (b - a),
        )  # one of them was a place before, and is not sampled again
        a, b = (a, d) if mean(c) >= mean(d) else (c, b)
    alphas, table = list(rewards), np.stack(list(rewards.values()))
    generator = np.random.default_rng(seed)
    draws = generator.integers(table.shape[1], size=(2000, table.shape[1]))
    picked = np.array(alphas)[table[:, draws].mean(2).argmax(0)]
    best = alphas[table.mean(1).argmax()]
    return Search(
        best, *(float(x) for x in np.quantile(picked, [0.025, 0.975], method="nearest")), rewards
    )
