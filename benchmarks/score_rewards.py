"""Reward scoring in float32 on the CPU, against the text-classification pipeline of transformers.

    python benchmarks/score_rewards.py

Texts are openings of IMDB reviews: whole sentences of up to 64 tokens, as long as what the embedded
world samples, and of up to 512 tokens. The reward is MiniLM with a one-logit head that is random,
which costs as much as a trained one. Both models are loaded beforehand. The pipeline has batches of
8, and of the size that was fastest for it in a first pass. What is timed is texts to scores; the
scores must agree. `--profile` says where our time goes.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable

import numpy as np
import torch
import transformers
from measure import report

from beyond_dpo import rewards, templates
from beyond_dpo.pipeline import assets, corpus, openings

TEXTS = {64: 384, 512: 64}  # {most tokens: texts}
PIPELINE_SIZES = (1, 2, 4, 8, 16, 32, 64)
TOLERANCE = 1e-4


def review_openings(most: int, number: int) -> list[str]:
    """Return the first whole sentences of reviews, of fewer than `most` tokens of SmolLM2."""
    tokenizer = templates.load_tokenizer(assets.model_dir("smollm2"))
    _, reviews, _ = corpus.shuffled("imdb")
    texts = []
    for review, _ in reviews:
        ids = openings.opening(tokenizer, review, most)
        if ids:
            texts.append(tokenizer.decode(ids, skip_special_tokens=True))
        if len(texts) == number:
            break
    return texts


def save_reward(folder: str) -> None:
    """Write MiniLM with a random head of one logit."""
    encoder = assets.model_dir("minilm")
    torch.manual_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        encoder, num_labels=1, dtype=torch.float32
    )
    torch.nn.init.normal_(model.classifier.weight)  # so that scores differ visibly
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(encoder).save_pretrained(folder)


def pipeline_scorer(folder: str) -> Callable:
    """Return a function of texts and a batch size that gives the pipeline's scores."""
    classify = transformers.pipeline(
        "text-classification", model=folder, dtype=torch.float32, device="cpu"
    )

    def score(texts: list[str], batch_size: int) -> np.ndarray:
        entries = classify(
            texts,
            batch_size=batch_size,
            truncation=True,
            function_to_apply="none",
        )
        return np.array([entry["score"] for entry in entries])

    return score


def timed(score: Callable, *arguments) -> tuple[float, np.ndarray]:
    """Return the seconds of a call, and what it returns."""
    began = time.perf_counter()
    scores = score(*arguments)
    return time.perf_counter() - began, scores


def fastest_size(score: Callable, texts: list[str]) -> int:
    """Return the batch size at which the pipeline scores a quarter of these texts fastest."""
    seconds = {}
    for size in PIPELINE_SIZES:
        seconds[size], _ = timed(score, texts[::4], size)
    return min(seconds, key=seconds.get)


def gemm_rate() -> float:
    """Return the operations a second of a square float32 matrix product of 1024."""
    a = torch.randn(1024, 1024)
    b = torch.randn(1024, 1024)
    seconds = [timed(torch.matmul, a, b)[0] for _ in range(20)]
    return 2 * 1024**3 / min(seconds)


def operations(reward: rewards.Classifier, texts: list[str]) -> float:
    """Return the operations that scores of these texts need: matrix products, without padding.

    Of the last layer every token needs its query, key and value, the first one alone the rest.
    """
    config = reward.model.config
    layers = config.num_hidden_layers
    whole = config.hidden_size * (4 * config.hidden_size + 2 * config.intermediate_size)
    unread = whole - 3 * config.hidden_size**2
    total = 0
    for text in texts:
        tokens = len(reward._ids(text))
        weights = layers * whole * tokens - unread * (tokens - 1)
        attention = 2 * layers * config.hidden_size * tokens**2
        total += 2 * (weights + attention)
    return total


def measure_round(
    reward: rewards.Classifier, pipeline: Callable, texts: dict[int, list[str]], sizes: dict
) -> dict[str, float]:
    """Score all texts in the three ways, one after the other; the scores must agree."""
    row = {}
    for most, some in texts.items():
        seconds, scores = timed(reward.score, some)
        row[f"ours_{most}_texts_per_s"] = len(some) / seconds
        row[f"ours_{most}_share_of_gemm"] = operations(reward, some) / seconds / gemm_rate()
        for name, size in (("pipeline_8", 8), ("pipeline_best", sizes[most])):
            seconds, expected = timed(pipeline, some, size)
            row[f"{name}_{most}_texts_per_s"] = len(some) / seconds
            difference = np.abs(scores - expected).max()
            assert difference < TOLERANCE, "both must compute the same"
    row["gemm_gflops"] = gemm_rate() / 1e9
    return row


def profile(reward: rewards.Classifier, texts: list[str]) -> None:
    """Print the operators that our scoring spends its time in."""
    reward.score(texts)
    with torch.profiler.profile() as profiler:
        reward.score(texts)
    operators = profiler.key_averages()
    print(operators.table(sort_by="self_cpu_time_total", row_limit=18, max_name_column_width=40))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--freeze", action="store_true", help="write data/frozen/benchmarks/score_rewards.json"
    )
    parser.add_argument("--profile", action="store_true", help="only show what our time goes to")
    options = parser.parse_args()
    texts = {most: review_openings(most, number) for most, number in TEXTS.items()}
    with tempfile.TemporaryDirectory() as folder:
        save_reward(folder)
        reward = rewards.load("classifier", folder=folder)
        pipeline = pipeline_scorer(folder)
    if options.profile:
        for some in texts.values():
            profile(reward, some)
        return
    sizes = {}
    for most, some in texts.items():  # warms up
        reward.score(some[::4])
        sizes[most] = fastest_size(pipeline, some)
    rounds = []
    for _ in range(options.rounds):
        rounds.append(measure_round(reward, pipeline, texts, sizes))
        print(json.dumps(rounds[-1]), flush=True)
    settings = {
        "model": "MiniLM-L6",
        "precision": "fp32",
        "texts": TEXTS,
        "mean_tokens": {
            most: float(np.mean([len(reward._ids(text)) for text in some]))
            for most, some in texts.items()
        },
        "pipeline_best_size": sizes,
    }
    report("score_rewards", settings, rounds, options.freeze)


if __name__ == "__main__":
    main()
