"""Find the α of ExPO (arXiv 2404.16792) with a reward model: one call, one living engine, few evaluations.

The paper tries a grid by hand. Reward against α rises, peaks and falls, so a golden-section search needs fewer points;
the same prompts at every α (paired) keep the sampling noise out of the comparison.
"""

import dataclasses
import json
import math
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from beyond_dpo import config, launch, templates

GOLDEN = (math.sqrt(5) - 1) / 2


@dataclasses.dataclass(frozen=True)
class Search:
    """The result of a search: the α with the highest mean reward, and how sure the prompts are about it.

    alpha: among the evaluated. low, high: 95 % of bootstrap draws of the prompts choose an α in between. rewards: {α:
    (prompts,) mean reward of each prompt}, in the order of evaluation; α = 0, the aligned model itself, comes first.
    """

    alpha: float
    low: float
    high: float
    rewards: dict[float, np.ndarray]


def search_alpha(
    sft, aligned, prompts: list, reward: Callable, *, bracket: tuple[float, float] = (0.0, 16.0), evaluations: int = 8,
    decoding: config.Decoding | None = None, samples: int = 1, seed: int = 0,
) -> Search:  # fmt: skip
    """Search the α of θ₁ + α(θ₁ − θ₀) with the highest mean reward (ACL Eq. 6 and App. B, arXiv 2404.16792).

    Args:
        sft, aligned: folders of θ₀ and θ₁, as extrapolate() takes them.
        prompts: what the models continue: texts, or lists of {"role", "content"} turns for a chat model.
        reward: called with (prompts, responses), two lists of equal length, responses as text; returns one finite
            number each, higher is better.
        bracket: smallest and largest α, 0 <= smallest < largest; searched on the scale of ln(1 + α).
        evaluations: how many α are sampled in all, α = 0 included; at least 4.
        decoding: how responses are sampled (the back-end too); default as in the paper, at most 512 tokens.
        samples: responses per prompt. seed: of sampling and bootstrap.
    Returns:
        a Search. Evaluating one more α changes the others' rewards by nothing.
    Raises:
        ValueError for a bad bracket, no prompt, or rewards that are not finite; launch.JobFailed from the engine,
        as extrapolate.check() does for models that do not fit.
    """
    decoding = decoding or config.Decoding(max_tokens=512, max_model_len=2048)
    tokenizer = templates.load_tokenizer(str(aligned))
    rendered = [templates.render(tokenizer, p, "plain" if isinstance(p, str) else "chat") for p in prompts]
    if not rendered:
        raise ValueError("prompts is empty: give at least one, better fifty")
    asked = [p for p in prompts for _ in range(samples)]
    with tempfile.TemporaryDirectory() as work:
        given = Path(work, "prompts.json")
        rows = [{"id": str(i), "prompt_ids": prompt} for i, prompt in enumerate(rendered)]
        given.write_text(json.dumps(rows), encoding="utf-8")
        settings = {"model": str(sft), "decoding": dataclasses.asdict(decoding)}
        with launch.Worker("beyond_dpo.generate", settings, Path(work), desc="search") as engine:

            def evaluate(alpha: float) -> np.ndarray:
                out = Path(work, f"{alpha:g}.jsonl")
                engine.call("swap", sft=str(sft), aligned=str(aligned), alpha=alpha)
                engine.call("generate", prompts=str(given), out=str(out), samples=samples, seed=seed)
                said = [json.loads(line)["response_ids"] for line in out.read_text(encoding="utf-8").splitlines()]
                scores = np.asarray(reward(asked, [tokenizer.decode(ids, skip_special_tokens=True) for ids in said]))
                return scores.reshape(len(prompts), samples).mean(1)

            return golden_section(evaluate, bracket, evaluations, seed=seed)


def golden_section(evaluate: Callable, bracket: tuple[float, float], evaluations: int, *, seed: int) -> Search:
    """Search the maximum of mean(evaluate(α)), which should rise and then fall, in `evaluations` calls.

    evaluate(α) returns the (prompts,) rewards at α, for the same prompts each time. α = 0 is evaluated first, for what
    the search gains; then golden section on ln(1 + α), whose interval shrinks by 0.618 with each call. α is rounded
    to three digits. Raises ValueError for a bad bracket, too few evaluations or rewards that are not finite.
    """
    low, high = bracket
    if not (0 <= low < high < math.inf) or evaluations < 4:
        raise ValueError(f"need 0 <= low < high and at least 4 evaluations, got {bracket} and {evaluations}")
    rewards: dict[float, np.ndarray] = {}

    def mean(place: float) -> float:
        alpha = float(f"{math.expm1(place):.3g}")
        if alpha not in rewards:
            rewards[alpha] = np.asarray(evaluate(alpha), dtype=float)
            if not (finite := np.isfinite(rewards[alpha])).all():
                raise ValueError(f"the reward of prompt {np.argmin(finite)} at α={alpha} is not finite")
        return rewards[alpha].mean()

    mean(0.0)
    a, b = math.log1p(low), math.log1p(high)
    while len(rewards) < evaluations and b - a > 0.042:
        c, d = b - GOLDEN * (b - a), a + GOLDEN * (b - a)  # one of them was a place before, and is not sampled again
        a, b = (a, d) if mean(c) >= mean(d) else (c, b)
    alphas, table = list(rewards), np.stack(list(rewards.values()))
    generator = np.random.default_rng(seed)
    draws = generator.integers(table.shape[1], size=(2000, table.shape[1]))
    picked = np.array(alphas)[table[:, draws].mean(2).argmax(0)]
    best = alphas[table.mean(1).argmax()]
    return Search(best, *(float(x) for x in np.quantile(picked, [0.025, 0.975], method="nearest")), rewards)
