"""Find the α of ExPO (arXiv 2404.16792) with a reward model, by one engine at few values of α."""

import dataclasses
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path

import numpy as np
import torch

from beyond_dpo import events, templates
from beyond_dpo.jobs.settings import Decoding
from beyond_dpo.machine import launch
from beyond_dpo.search import Search, golden_section


def _default_decoding() -> Decoding:
    """Return how the paper samples, in the numbers that this machine computes."""
    dtype = "bfloat16" if torch.cuda.is_available() else "float32"
    return Decoding(max_tokens=512, max_model_len=2048, dtype=dtype)


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
    known: dict[float, list[float]] | None = None,
    on_evaluated: Callable[[float, np.ndarray, list[str]], None] | None = None,
) -> Search:
    """Search the α of θ₁ + α(θ₁ − θ₀) with the highest mean reward.

    This is ACL Eq. 6 and App. B of arXiv 2404.16792.

    Args:
        sft, aligned: folders of θ₀ and θ₁, as extrapolate() takes them.
        prompts: what the models continue: texts, or lists of {"role", "content"} turns for a chat
            model.
        reward: called with (prompts, responses), two lists of equal length, responses as text;
            returns one finite number each, higher is better.
        bracket: smallest and largest α, 0 <= smallest < largest; searched on the scale of
            ln(1 + α).
        evaluations: how many α are sampled in all, α = 0 included; at least 4.
        decoding: how responses are sampled (the back-end too); default as in the paper, at most
            512 tokens.
        samples: responses per prompt.
        seed: of sampling and bootstrap.
        known: {α: a reward per prompt} of an earlier search with the same arguments but for bracket
            and evaluations; those α are not sampled again.
        on_evaluated: called with (α, rewards, responses) after each α that was sampled.
    Returns:
        a Search. Evaluating one more α does not change the rewards of the others.
    Raises:
        ValueError: a bad bracket, no prompt, or rewards that are not finite.
        launch.JobFailed: from the engine, as extrapolate.check() for models that do not fit.
    """
    decoding = decoding or _default_decoding()
    tokenizer = templates.load_tokenizer(str(aligned))
    prompt_rows = _prompt_rows(tokenizer, prompts)
    if not prompt_rows:
        raise ValueError("prompts is empty: give at least one, better fifty")
    sampled_prompts = [prompt for prompt in prompts for _ in range(samples)]
    events.note(
        f"searching α: at most {evaluations} values, {len(sampled_prompts)} responses at each"
    )
    known = known or {}
    request = {"samples": samples, "seed": seed}
    with _sampler(str(sft), str(aligned), tokenizer, prompt_rows, decoding, request) as sample:

        def evaluate(alpha: float) -> np.ndarray:
            """Return the mean reward of each prompt's responses at α."""
            if alpha in known:
                return np.asarray(known[alpha])
            responses = sample(alpha)
            scores = np.asarray(reward(sampled_prompts, responses))
            rewards = scores.reshape(len(prompts), samples).mean(1)
            # What is not finite ends the search, and is not kept for the next one.
            if on_evaluated is not None and np.isfinite(rewards).all():
                on_evaluated(alpha, rewards, responses)
            return rewards

        return golden_section(evaluate, bracket, evaluations, seed=seed)


@contextmanager
def _sampler(
    sft: str, aligned: str, tokenizer, prompt_rows: list[dict], decoding: Decoding, request: dict
) -> Iterator[Callable[[float], list[str]]]:
    """Give a function that returns the responses at an α, of one engine for all.

    request: {"samples", "seed"}, as Engine.generate() takes them.
    """
    settings = {"model": sft, "decoding": dataclasses.asdict(decoding)}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        work = Path(folder)
        prompts_file = work / "prompts.json"
        prompts_file.write_text(json.dumps(prompt_rows), encoding="utf-8")

        @cache
        def engine() -> launch.Worker:
            """Start the engine when the first α needs it."""
            module = "beyond_dpo.jobs.generate"
            return stack.enter_context(launch.Worker(module, settings, work, desc="search"))

        def sample(alpha: float) -> list[str]:
            out = work / f"{alpha:g}.jsonl"
            files = {"prompts": str(prompts_file), "out": str(out)}
            engine().call("swap", sft=sft, aligned=aligned, alpha=alpha)
            engine().call("generate", **files, **request)
            return _responses(tokenizer, out)

        yield sample


def _prompt_rows(tokenizer, prompts: list) -> list[dict]:
    """Return prompts as Engine.generate() reads them: texts as they are, turns by the template."""
    rows = []
    for number, prompt in enumerate(prompts):
        kind = "plain" if isinstance(prompt, str) else "chat"
        tokens = templates.render(tokenizer, prompt, kind)
        rows.append({"id": str(number), "prompt_ids": tokens})
    return rows


def _responses(tokenizer, path: Path) -> list[str]:
    """Return the texts of a file of sampled responses."""
    texts = []
    for line in path.read_text(encoding="utf-8").splitlines():
        tokens = json.loads(line)["response_ids"]
        texts.append(tokenizer.decode(tokens, skip_special_tokens=True))
    return texts
