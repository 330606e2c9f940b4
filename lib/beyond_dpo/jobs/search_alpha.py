"""Find the α of ExPO (arXiv 2404.16792) with a reward model: one call, one living engine, few
evaluations.
"""

import dataclasses
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from beyond_dpo import events, templates
from beyond_dpo.jobs.settings import Decoding
from beyond_dpo.machine import launch
from beyond_dpo.search import Search, golden_section


def search_alpha(
    sft,
    aligned,
    prompts: list,
    reward: Callable,
    *,
    bracket: tuple[float, float] = (0.0, 16.0),
    evaluations: int = 8,
    decoding: Decoding | None = None,
    samples: int = 1,
    seed: int = 0,
) -> Search:
    """Search the α of θ₁ + α(θ₁ − θ₀) with the highest mean reward (ACL Eq. 6 and App. B, arXiv
    2404.16792).

    Args:
        sft, aligned: folders of θ₀ and θ₁, as extrapolate() takes them.
        prompts: what the models continue: texts, or lists of {"role", "content"} turns for a chat
        model.
        reward: called with (prompts, responses), two lists of equal length, responses as text;
            returns one finite number each, higher is better.
        bracket: smallest and largest α, 0 <= smallest < largest; searched on the scale of ln(1 +
        α).
        evaluations: how many α are sampled in all, α = 0 included; at least 4.
        decoding: how responses are sampled (the back-end too); default as in the paper, at most 512
        tokens.
        samples: responses per prompt. seed: of sampling and bootstrap.
    Returns:
        a Search. Evaluating one more α changes the others' rewards by nothing.
    Raises:
        ValueError for a bad bracket, no prompt, or rewards that are not finite; launch.JobFailed
        from the engine,
        as extrapolate.check() does for models that do not fit.
    """
    if decoding is None:
        dtype = "bfloat16" if torch.cuda.is_available() else "float32"
        decoding = Decoding(max_tokens=512, max_model_len=2048, dtype=dtype)
    tokenizer = templates.load_tokenizer(str(aligned))
    rendered = [
        templates.render(tokenizer, p, "plain" if isinstance(p, str) else "chat") for p in prompts
    ]
    if not rendered:
        raise ValueError("prompts is empty: give at least one, better fifty")
    asked = [p for p in prompts for _ in range(samples)]
    events.note(f"searching α: at most {evaluations} values, {len(asked)} responses at each")
    with tempfile.TemporaryDirectory() as work:
        given = Path(work, "prompts.json")
        rows = [{"id": str(i), "prompt_ids": prompt} for i, prompt in enumerate(rendered)]
        given.write_text(json.dumps(rows), encoding="utf-8")
        settings = {"model": str(sft), "decoding": dataclasses.asdict(decoding)}
        with launch.Worker(
            "beyond_dpo.jobs.generate", settings, Path(work), desc="search"
        ) as engine:

            def evaluate(alpha: float) -> np.ndarray:
                out = Path(work, f"{alpha:g}.jsonl")
                engine.call("swap", sft=str(sft), aligned=str(aligned), alpha=alpha)
                engine.call(
                    "generate", prompts=str(given), out=str(out), samples=samples, seed=seed
                )
                said = [
                    json.loads(line)["response_ids"]
                    for line in out.read_text(encoding="utf-8").splitlines()
                ]
                scores = np.asarray(
                    reward(asked, [tokenizer.decode(ids, skip_special_tokens=True) for ids in said])
                )
                return scores.reshape(len(prompts), samples).mean(1)

            return golden_section(evaluate, bracket, evaluations, seed=seed)
