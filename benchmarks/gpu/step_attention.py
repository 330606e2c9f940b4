"""Forward and backward pass of one micro-batch, with each way to compute attention.

The models are random, in bf16 autocast over float32 weights. A micro-batch has 8 pairs; prompts and
responses have 512 tokens each. What is compared: responses that share their prompt, by
flex-attention's block mask or by sdpa with a dense mask; and each response with a prompt of its
own, by sdpa, which then needs no mask (lengths are equal, so nothing is padded). Each is measured
as it comes and with torch.compile. All are given the same useful operations (beyond_dpo.flops), by
which their shares of the peak compare. What the time of our way goes to is in attention.txt.
"""

from __future__ import annotations

import gc
import time
from pathlib import Path
from statistics import median

import torch
from models import LLAMA_1B, NAMES, SMOLLM2_135M, TINY, Shape, config_of, random_rows
from results import Clock, Results, step_arguments
from transformers import AutoModelForCausalLM

from beyond_dpo import attention, flops, scoring
from beyond_dpo.jobs import train

PAIRS = 8
REPEATS = 5
SHAPES = {"1B": LLAMA_1B, "135M": SMOLLM2_135M}
WAYS = {  # name: (attention, responses share their prompt, torch.compile); ours is the first
    "shared, flex": ("flex_attention", True, False),
    "shared, flex, compiled": ("flex_attention", True, True),
    "shared, sdpa": ("sdpa", True, False),
    "separate, sdpa": ("sdpa", False, False),
    "separate, sdpa, compiled": ("sdpa", False, True),
}
TINY_WAYS = ("shared, sdpa", "separate, sdpa")


class Shared:
    """Score responses as our training does."""

    def __init__(self, model, precision: str, compiled: bool):
        self.scorer = scoring.ResponseScorer(model, precision)
        if compiled:
            train.compile_layers(self.scorer)

    def logps(self, rows: list[dict]) -> torch.Tensor:
        """Return the summed log-probability of each response, all chosen ones first."""
        return self.scorer.score(rows, NAMES, 0)["logps"]


class Separate:
    """Score responses that have a prompt each, as trainers do: logits of all their tokens."""

    def __init__(self, model, precision: str, compiled: bool):
        self.model = model
        self.bf16 = precision == "bf16"
        if compiled:
            for layer in model.model.layers:
                layer.compile(dynamic=True)

    def logps(self, rows: list[dict]) -> torch.Tensor:
        """Return the summed log-probability of each response, all chosen ones first."""
        sequences = [row["prompt_ids"] + row["responses"][name] for name in NAMES for row in rows]
        ids = torch.tensor(sequences, device=self.model.device)
        prompt = len(rows[0]["prompt_ids"])
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=self.bf16):
            logits = self.model(ids, use_cache=False).logits
        predicted = logits[:, prompt - 1 : -1].flatten(0, 1).float()
        labels = ids[:, prompt:]
        losses = torch.nn.functional.cross_entropy(predicted, labels.flatten(), reduction="none")
        return -losses.view(labels.shape).sum(1)


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def build(shape: Shape, way: str):
    """Return a random model, and what scores by it in one of the WAYS."""
    implementation, shares, compiled = WAYS[way]
    has_gpu = torch.cuda.is_available()
    precision = "bf16" if has_gpu else "fp32"
    torch.manual_seed(0)
    with torch.device("cuda" if has_gpu else "cpu"):
        model = AutoModelForCausalLM.from_config(config_of(shape), dtype=torch.float32)
    attention.apply(model, precision, implementation)
    kind = Shared if shares else Separate
    return model, kind(model.train(), precision, compiled)


def timed_pass(model, way, rows: list[dict]) -> tuple[float, torch.Tensor]:
    """Return the seconds of a forward and backward pass, and the log-probabilities."""
    model.zero_grad(set_to_none=True)
    synchronize()
    began = time.perf_counter()
    logps = way.logps(rows)
    logps.sum().backward()
    synchronize()
    return time.perf_counter() - began, logps.detach()


def measure(name: str, shape: Shape, way: str, rows: list[dict]) -> dict:
    """Return seconds, rates, memory and log-probabilities of one way."""
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    model, scorer = build(shape, way)
    timed_pass(model, scorer, rows)
    first = time.perf_counter() - began
    passes = [timed_pass(model, scorer, rows) for _ in range(REPEATS)]
    seconds = [duration for duration, _ in passes]
    rate = flops.training(model, rows, NAMES) / median(seconds)
    result = {
        "shape": name,
        "way": way,
        "until_first_pass_s": first,
        "seconds": seconds,
        "pairs_per_s": len(rows) / median(seconds),
        "useful_flops_per_s": rate,
        "logps": passes[-1][1].tolist(),
    }
    if torch.cuda.is_available():
        peak = flops.device_peak("cuda")
        result["mfu_datasheet"] = rate / peak if peak else None
        result["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return result


def profile(shape: Shape, way: str, rows: list[dict]) -> str:
    """Return a table of what the time of a pass goes to."""
    model, scorer = build(shape, way)
    for _ in range(2):
        timed_pass(model, scorer, rows)
    with torch.profiler.profile() as profiler:
        timed_pass(model, scorer, rows)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    operators = profiler.key_averages()
    by = f"self_{device}_time_total"
    return operators.table(sort_by=by, row_limit=30, max_name_column_width=70)


def summarise(content: dict) -> list[str]:
    """Return a line for each way."""
    lines = []
    for row in content["measured"]:
        words = f"{row['shape']}, {row['way']}: {row['pairs_per_s']:.4g} pairs/s"
        if row.get("mfu_datasheet"):
            words += f", MFU {row['mfu_datasheet']:.1%}, {row['peak_gib']:.1f} GiB"
        lines.append(words)
    return lines


def main() -> None:
    options = step_arguments(__doc__).parse_args()
    clock = Clock(options.seconds)
    tokens = 16 if options.tiny else 512
    shapes = {"tiny": TINY} if options.tiny else SHAPES
    ways = TINY_WAYS if options.tiny else WAYS
    settings = {"pairs": PAIRS, "prompt": tokens, "response": tokens, "repeats": REPEATS}
    results = Results(options.out / "attention.json", settings, summarise)
    told = False
    for name, shape in shapes.items():
        rows = random_rows(shape, PAIRS, tokens, tokens)
        for way in ways:
            if clock.left() < 0:
                results.note(f"{name}, {way}: no time")
                continue
            try:
                results.add(measure(name, shape, way, rows))
                if not told:  # of the first, which is ours
                    Path(options.out, "attention.txt").write_text(profile(shape, way, rows))
                    told = True
            except Exception as error:  # the others go on
                message = f"{type(error).__name__}: {error}"
                results.note(f"{name}, {way} failed: {message[:500]}")


if __name__ == "__main__":
    main()
