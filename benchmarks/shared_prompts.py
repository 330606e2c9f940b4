"""Responses that share their prompt in one row, against each with a prompt of its own.

    python benchmarks/shared_prompts.py

What is timed is a forward and backward pass of SmolLM2-135M in float32, or with `--precision bf16`
in bf16 autocast where the processor has it. A pass has 4 rows of random tokens: two (DPO) or three
(WRPO) responses of 24 tokens, prompts of 8, 64 and 512. Both sides are packed alike, in turn; their
scores must agree. The bound is the ratio of the matrix products that the two need.
"""

from __future__ import annotations

import argparse
import time

import torch
from measure import report

from beyond_dpo import flops, scoring
from beyond_dpo.pipeline import assets, config

ROWS = 4
PROMPT_TOKENS = (8, 64, 512)
RESPONSE_TOKENS = 24
TOLERANCE = {"fp32": 1e-4, "bf16": 1e-2}  # relative
KINDS = {"pairs": config.FUSED[1:], "quadruples": config.FUSED}


def shared_rows(prompt_tokens: int, names: tuple, vocabulary: int) -> list[dict]:
    """Return rows of random tokens whose responses share their prompt."""
    generator = torch.Generator().manual_seed(prompt_tokens)

    def random_ids(n: int) -> list[int]:
        return torch.randint(vocabulary, (n,), generator=generator).tolist()

    rows = []
    for i in range(ROWS):
        prompt_ids = random_ids(prompt_tokens)
        responses = {name: random_ids(RESPONSE_TOKENS) for name in names}
        rows.append({"id": str(i), "prompt_ids": prompt_ids, "responses": responses})
    return rows


def separate_rows(rows: list[dict], names: tuple) -> list[dict]:
    """Return each response in a row of its own, name-major as scores are."""
    separate = []
    for name in names:
        for row in rows:
            response = row["responses"][name]
            separate.append({**row, "responses": {"response": response}})
    return separate


def timed(
    scorer: scoring.ResponseScorer, rows: list[dict], names: tuple
) -> tuple[float, torch.Tensor]:
    """Return seconds of a forward and backward pass, and the scores."""
    scorer.zero_grad(set_to_none=True)
    began = time.perf_counter()
    scores = scorer.score(rows, names, 0)["logps"]
    scores.sum().backward()
    return time.perf_counter() - began, scores.detach()


def measure_round(scorer: scoring.ResponseScorer, tolerance: float) -> tuple[dict, dict]:
    """Score rows of both kinds and all lengths in the two ways, one after the other.

    Return the rows a second, and the largest relative difference of scores.
    """
    speeds = {}
    differences = {}
    for kind, names in KINDS.items():
        for tokens in PROMPT_TOKENS:
            rows = shared_rows(tokens, names, scorer.config.vocab_size)
            seconds, scores = timed(scorer, rows, names)
            speeds[f"shared_{kind}_{tokens}"] = ROWS / seconds
            seconds, expected = timed(scorer, separate_rows(rows, names), ("response",))
            speeds[f"alone_{kind}_{tokens}"] = ROWS / seconds
            difference = float(((scores - expected) / expected).abs().max())
            assert difference < tolerance, "both must compute the same"
            differences[f"{kind}_{tokens}"] = difference
    return speeds, differences


def bounds(scorer: scoring.ResponseScorer) -> dict[str, float]:
    """Return how many times the products of shared prompts the separate ones are."""
    ratios = {}
    for kind, names in KINDS.items():
        for tokens in PROMPT_TOKENS:
            rows = shared_rows(tokens, names, scorer.config.vocab_size)
            separate = flops.training(scorer.model, separate_rows(rows, names), ("response",))
            shared = flops.training(scorer.model, rows, names)
            ratios[f"{kind}_{tokens}"] = separate / shared
    return ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument(
        "--freeze", action="store_true", help="write data/frozen/benchmarks/shared_prompts.json"
    )
    options = parser.parse_args()
    scorer = scoring.load_scorer(str(assets.model_dir("smollm2")), options.precision)
    vocabulary = scorer.config.vocab_size
    largest = shared_rows(max(PROMPT_TOKENS), config.FUSED, vocabulary)
    # warms up: the first use of memory is slow on a virtual machine
    timed(scorer, separate_rows(largest, config.FUSED), ("response",))
    rounds = []
    for _ in range(options.rounds):
        speeds, differences = measure_round(scorer, TOLERANCE[options.precision])
        rounds.append(speeds)
        print(speeds, flush=True)
    settings = {
        "precision": options.precision,
        "rows": ROWS,
        "response_tokens": RESPONSE_TOKENS,
        "largest_relative_difference": differences,
        "bounds": bounds(scorer),
    }
    report("shared_prompts", settings, rounds, options.freeze)


if __name__ == "__main__":
    main()
