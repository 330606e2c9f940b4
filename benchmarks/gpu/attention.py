"""Forward and backward pass of one micro-batch on a GPU, with each way to compute attention.

    python benchmarks/gpu/attention.py --out results.json

The model is a random Llama of 1B or of SmolLM2's 135M, in bf16 autocast over float32 weights. The
micro-batch has 8 pairs; prompts and responses have 512 tokens each.
What is compared: responses that share their prompt (flex-attention's block mask, or sdpa with a
dense mask), and each response with a prompt of its own (sdpa, which then needs no mask; lengths are
equal, so nothing is padded); each as it comes and with torch.compile. All are given the same useful
operations, flops.training(), by which their shares of the peak (MFU) compare.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from pathlib import Path
from statistics import median

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from beyond_dpo import attention, flops, scoring
from beyond_dpo.jobs import train

PAIRS = 8
TOKENS = 512
NAMES = ["chosen", "rejected"]
REPEATS = 5
SHAPES = {
    "1B": {
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 8192,
        "vocab_size": 128256,
        "rope_theta": 500000.0,
    },
    "135M": {
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "intermediate_size": 1536,
        "vocab_size": 49152,
    },
    "tiny": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 64,
        "vocab_size": 128,
    },
}
WAYS = {  # name: (attention, responses share their prompt, torch.compile)
    "shared, flex": ("flex_attention", True, False),
    "shared, flex, compiled": ("flex_attention", True, True),
    "shared, sdpa": ("sdpa", True, False),
    "separate, sdpa": ("sdpa", False, False),
    "separate, sdpa, compiled": ("sdpa", False, True),
}


def random_rows(vocabulary: int, tokens: int) -> list[dict]:
    """Return pairs of random tokens."""
    generator = torch.Generator().manual_seed(0)

    def random_ids() -> list[int]:
        return torch.randint(vocabulary, (tokens,), generator=generator).tolist()

    rows = []
    for i in range(PAIRS):
        responses = {name: random_ids() for name in NAMES}
        rows.append({"id": str(i), "prompt_ids": random_ids(), "responses": responses})
    return rows


class Separate(torch.nn.Module):
    """Score responses that have a prompt each, as trainers do: logits of all their tokens."""

    def __init__(self, model, compiled: bool):
        super().__init__()
        self.model = model
        if compiled:
            for layer in model.model.layers:
                layer.compile(dynamic=True)

    def logps(self, rows: list[dict], device: str) -> torch.Tensor:
        """Return the summed log-probability of each response, all chosen ones first."""
        sequences = [row["prompt_ids"] + row["responses"][name] for name in NAMES for row in rows]
        ids = torch.tensor(sequences, device=device)
        prompt = len(rows[0]["prompt_ids"])
        with torch.autocast(ids.device.type, torch.bfloat16):
            logits = self.model(ids, use_cache=False).logits
        predicted = logits[:, prompt - 1 : -1]
        labels = ids[:, prompt:]
        losses = torch.nn.functional.cross_entropy(
            predicted.flatten(0, 1).float(), labels.flatten(), reduction="none"
        )
        return -losses.view(labels.shape).sum(1)


class Shared(torch.nn.Module):
    """Score responses as our training does."""

    def __init__(self, model, compiled: bool):
        super().__init__()
        self.scorer = scoring.ResponseScorer(model, "bf16")
        if compiled:
            train.compile_layers(self.scorer)

    def logps(self, rows: list[dict], device: str) -> torch.Tensor:
        """Return the summed log-probability of each response, all chosen ones first."""
        return self.scorer.score(rows, NAMES, 0)["logps"]


def build(shape: str, way: str, device: str):
    """Return a random model that computes in one of the WAYS."""
    implementation, shares, compiled = WAYS[way]
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPES[shape], tie_word_embeddings=True, max_position_embeddings=4096)
    with torch.device(device):
        model = LlamaForCausalLM(config)
    attention.apply(model, "bf16", implementation)
    kind = Shared if shares else Separate
    return kind(model.train(), compiled)


def synchronize(device: str) -> None:
    """Wait for the GPU."""
    if device == "cuda":
        torch.cuda.synchronize()


def timed_pass(module, rows: list[dict], device: str) -> tuple[float, torch.Tensor]:
    """Return the seconds of a forward and backward pass, and the log-probabilities."""
    module.zero_grad(set_to_none=True)
    synchronize(device)
    began = time.perf_counter()
    logps = module.logps(rows, device)
    logps.sum().backward()
    synchronize(device)
    return time.perf_counter() - began, logps.detach()


def measure(shape: str, way: str, device: str, tokens: int = TOKENS) -> dict:
    """Return seconds, MFU, memory and log-probabilities of one way."""
    torch._dynamo.reset()
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    module = build(shape, way, device)
    rows = random_rows(SHAPES[shape]["vocab_size"], tokens)
    timed_pass(module, rows, device)
    first = time.perf_counter() - began
    seconds = []
    for _ in range(REPEATS):
        duration, logps = timed_pass(module, rows, device)
        seconds.append(duration)
    model = module.scorer.model if hasattr(module, "scorer") else module.model
    operations = flops.training(model, rows, NAMES)
    result = {
        "shape": shape,
        "way": way,
        "until_first_pass_s": first,
        "seconds": seconds,
        "pairs_per_s": PAIRS / median(seconds),
        "flops_per_s": operations / median(seconds),
        "logps": logps.tolist(),
    }
    if device == "cuda":
        result["mfu"] = result["flops_per_s"] / (flops.peak("cuda") or torch.nan)
        result["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return result


def profile(shape: str, way: str, device: str, tokens: int) -> str:
    """Return a table of what the time of a pass goes to."""
    module = build(shape, way, device)
    rows = random_rows(SHAPES[shape]["vocab_size"], tokens)
    for _ in range(2):
        timed_pass(module, rows, device)
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        timed_pass(module, rows, device)
    by = "self_cuda_time_total" if device == "cuda" else "self_cpu_time_total"
    return profiler.key_averages().table(sort_by=by, row_limit=30, max_name_column_width=70)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shapes", nargs="+", default=["1B", "135M"], choices=SHAPES)
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--profile", help="one of the ways: only show where its time goes")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.profile:
        table = profile(options.shapes[0], options.profile, device, options.tokens)
        options.out.write_text(table)
        return
    results = []
    for shape in options.shapes:
        for way in WAYS:
            try:
                result = measure(shape, way, device, options.tokens)
            except Exception as error:  # one way that fails says so, and the others go on
                result = {"shape": shape, "way": way, "error": f"{type(error).__name__}: {error}"}
            results.append(result)
            options.out.write_text(json.dumps(results, indent=1))
            print({name: value for name, value in result.items() if name != "logps"}, flush=True)


if __name__ == "__main__":
    main()
