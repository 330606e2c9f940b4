"""Responses that share their prompt in one row, against each with a prompt of its own: forward and
backward passes.

    python benchmarks/shared_prompts.py

Rows of two (DPO) and three (WRPO) responses of 24 tokens, random tokens, prompts of 8, 64 and 512
tokens; SmolLM2-135M in bf16 autocast over float32 weights, 4 rows a pass. Both sides are packed
alike, in turn; their scores must agree.
"""

from __future__ import annotations

import argparse
import time

import torch
from measure import report

from beyond_dpo import scoring
from beyond_dpo.pipeline import assets, config

ROWS, SAID = 4, 24
KINDS = {"pairs": config.FUSED[1:], "quadruples": config.FUSED}


def rows_of(prompt: int, names: tuple, vocabulary: int) -> tuple[list[dict], list[dict]]:
    """Return rows that share their prompt, and the same responses in rows of their own, name-major
    as scores are.
    """
    generator = torch.Generator().manual_seed(prompt)

    def some(n: int) -> list[int]:
        return torch.randint(vocabulary, (n,), generator=generator).tolist()

    shared = []
    for i in range(ROWS):
        shared.append(
            {
                "id": str(i),
                "prompt_ids": some(prompt),
                "responses": {name: some(SAID) for name in names},
            }
        )
    alone = [
        {**row, "responses": {"said": row["responses"][name]}} for name in names for row in shared
    ]
    return shared, alone


def timed(
    scorer: scoring.ResponseScorer, rows: list[dict], names: tuple
) -> tuple[float, torch.Tensor]:
    """Return seconds of a forward and backward pass, and the scores."""
    scorer.zero_grad(set_to_none=True)
    began = time.perf_counter()
    scores = scorer.score(rows, names, 0)["logps"]
    scores.sum().backward()
    return time.perf_counter() - began, scores.detach()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--freeze", action="store_true", help="write data/frozen/benchmarks/shared_prompts.json"
    )
    options = parser.parse_args()
    scorer, rounds, apart = scoring.load_scorer(str(assets.model_dir("smollm2")), "bf16"), [], {}
    timed(scorer, rows_of(8, config.FUSED, scorer.config.vocab_size)[0], config.FUSED)  # warms up
    for _ in range(options.rounds):
        row = {}
        for kind, names in KINDS.items():
            for prompt in (8, 64, 512):
                shared, alone = rows_of(prompt, names, scorer.config.vocab_size)
                ours, found = timed(scorer, shared, names)
                theirs, wanted = timed(scorer, alone, ("said",))
                apart[f"{kind}_{prompt}"] = float(((found - wanted) / wanted).abs().max())
                assert apart[f"{kind}_{prompt}"] < 0.01, "both must compute the same"
                row[f"shared_{kind}_{prompt}"], row[f"alone_{kind}_{prompt}"] = (
                    ROWS / ours,
                    ROWS / theirs,
                )
        rounds.append(row)
    settings = {"rows": ROWS, "response_tokens": SAID, "largest_relative_difference": apart}
    report("shared_prompts", settings, rounds, options.freeze)


if __name__ == "__main__":
    main()
