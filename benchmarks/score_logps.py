"""Log-probabilities of pairs in float32 on the CPU, against the loop that most people write.

    python benchmarks/score_logps.py

The pairs are of IMDB reviews: a prompt of 64 tokens, the review's next 16 to 48 tokens and as many
of another review. Ours is the reference pass in batches of the embedded world, which also computes
entropies. The plain loop gives transformers 8 padded sequences at a time, and takes the responses'
log-probabilities from all logits. Both have SmolLM2-135M. `--profile` says where our time goes.
"""

from __future__ import annotations

import argparse
import json
import random

import torch
from measure import report
from score_rewards import gemm_rate, timed

from beyond_dpo import flops, scoring, templates
from beyond_dpo.pipeline import assets, config, corpus

PROMPT_TOKENS = 64
RESPONSE_TOKENS = (16, 48)
PLAIN_BATCH = 8
NAMES = ["chosen", "rejected"]
PAD = 2  # any token: masks come from lengths


def review_pairs(number: int) -> list[dict]:
    """Return rows of reviews' beginnings, with how they go on and how another review does."""
    tokenizer = templates.load_tokenizer(assets.model_dir("smollm2"))
    _, reviews, rng = corpus.shuffled("imdb")
    longest = PROMPT_TOKENS + max(RESPONSE_TOKENS)
    token_lists = []
    for review, _ in reviews:
        ids = templates.render(tokenizer, review, "plain")
        if len(ids) >= longest:
            token_lists.append(ids)
        if len(token_lists) == number:
            break
    rows = []
    for i, ids in enumerate(token_lists):
        responses = {"chosen": _next_tokens(ids, rng)}
        responses["rejected"] = _next_tokens(token_lists[i - 1], rng)
        rows.append({"id": str(i), "prompt_ids": ids[:PROMPT_TOKENS], "responses": responses})
    return rows


def _next_tokens(ids: list[int], rng: random.Random) -> list[int]:
    """Return a few tokens of a review after those of the prompt."""
    return ids[PROMPT_TOKENS:][: rng.randint(*RESPONSE_TOKENS)]


@torch.no_grad()
def plain_logps(model, rows: list[dict]) -> torch.Tensor:
    """Return the log-probabilities, (rows, 2), as a plain loop over transformers computes them."""
    sequences = [(row["prompt_ids"], row["responses"][name]) for name in NAMES for row in rows]
    logps = []
    for start in range(0, len(sequences), PLAIN_BATCH):
        batch = sequences[start : start + PLAIN_BATCH]
        width = max(len(prompt) + len(response) for prompt, response in batch)
        input_ids = torch.full((len(batch), width), PAD)
        is_token = torch.zeros(len(batch), width, dtype=torch.long)
        is_response = torch.zeros(len(batch), width)
        for i, (prompt, response) in enumerate(batch):
            end = len(prompt) + len(response)
            input_ids[i, :end] = torch.tensor(prompt + response)
            is_token[i, :end] = 1
            is_response[i, len(prompt) : end] = 1
        logits = model(input_ids=input_ids, attention_mask=is_token).logits[:, :-1]
        labels = input_ids[:, 1:].unsqueeze(-1)
        token_logps = logits.log_softmax(-1).gather(-1, labels).squeeze(-1)
        logps.append((token_logps * is_response[:, 1:]).sum(1))
    return torch.cat(logps).view(len(NAMES), len(rows)).T


def our_logps(scorer: scoring.ResponseScorer, rows: list[dict]) -> torch.Tensor:
    """Return the log-probabilities, (rows, 2), of the reference pass."""
    micro_batch = config.load("expo", "cpu").train.micro_batch
    scores = scoring.score_rows(scorer, rows, NAMES, pad_id=PAD, micro_batch=micro_batch)
    return scores["logps"]


def measure_round(scorer: scoring.ResponseScorer, rows: list[dict]) -> dict[str, float]:
    """Score the rows in both ways, one after the other; the scores must agree."""
    operations = flops.forward(scorer.model, rows, NAMES)
    rate = gemm_rate()
    ours, logps = timed(our_logps, scorer, rows)
    plain, expected = timed(plain_logps, scorer.model, rows)
    difference = float((logps - expected).abs().max())
    assert difference < 1e-2, "both must compute the same"  # nats, of about −150
    return {
        "ours_pairs_per_s": len(rows) / ours,
        "plain_pairs_per_s": len(rows) / plain,
        "ours_share_of_gemm": operations / ours / rate,
        "plain_share_of_gemm": operations / plain / rate,
        "gemm_gflops": rate / 1e9,
        "largest_difference": difference,
    }


def profile(scorer: scoring.ResponseScorer, rows: list[dict]) -> None:
    """Print the operators that our scoring spends its time in."""
    with torch.profiler.profile() as profiler:
        our_logps(scorer, rows)
    operators = profiler.key_averages()
    print(operators.table(sort_by="self_cpu_time_total", row_limit=18, max_name_column_width=40))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pairs", type=int, default=128)
    parser.add_argument(
        "--freeze", action="store_true", help="write data/frozen/benchmarks/score_logps.json"
    )
    parser.add_argument("--profile", action="store_true", help="only show what our time goes to")
    options = parser.parse_args()
    rows = review_pairs(options.pairs)
    scorer = scoring.load_scorer(str(assets.model_dir("smollm2")))
    measure_round(scorer, rows[:8])  # warms up
    if options.profile:
        profile(scorer, rows[:16])
        return
    rounds = []
    for _ in range(options.rounds):
        rounds.append(measure_round(scorer, rows))
        print(json.dumps(rounds[-1]), flush=True)
    settings = {
        "model": "SmolLM2-135M",
        "precision": "fp32",
        "pairs": len(rows),
        "prompt_tokens": PROMPT_TOKENS,
        "response_tokens": RESPONSE_TOKENS,
        "plain_batch": PLAIN_BATCH,
    }
    report("score_logps", settings, rounds, options.freeze)


if __name__ == "__main__":
    main()
