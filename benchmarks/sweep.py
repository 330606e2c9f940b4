"""One more α in the living engine against a new engine, on SmolLM2-135M.

    python benchmarks/sweep.py

What is timed is the start of an engine, swaps of its weights, and 64 responses. Models and engine
are float32, as in profile `cpu`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import tempfile
import time
from pathlib import Path

import torch
from measure import report
from safetensors.torch import load_file, save_file

from beyond_dpo import templates
from beyond_dpo.machine import launch
from beyond_dpo.pipeline import assets, config

DTYPE = "float32"  # of the engine


def write_models(sft: Path, aligned: Path) -> int:
    """Write SmolLM2, and the same with all weights moved a little; return how many tensors it has.

    Both are float32.
    """
    source = assets.model_dir("smollm2")
    generator = torch.Generator().manual_seed(0)
    weights = {}
    moved = {}
    for name, weight in load_file(source / "model.safetensors").items():
        weights[name] = weight.float()
        noise = torch.randn(weight.shape, generator=generator)
        moved[name] = weights[name] + 1e-3 * noise
    for folder, tensors in ((sft, weights), (aligned, moved)):
        shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors"))
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return len(weights)


def write_prompts(path: Path, sft: Path) -> None:
    """Write the same prompt 64 times."""
    tokenizer = templates.load_tokenizer(str(sft))
    prompts = []
    for i in range(64):
        prompt_ids = templates.render(tokenizer, "The film is", "plain")
        prompts.append({"id": str(i), "prompt_ids": prompt_ids})
    path.write_text(json.dumps(prompts))


def seconds_of(function, *args, **kwargs) -> float:
    """Return how long a call takes."""
    began = time.perf_counter()
    function(*args, **kwargs)
    return time.perf_counter() - began


def measure_round(settings: dict, sft: Path, aligned: Path, work: Path) -> dict[str, float]:
    """Start an engine, swap its weights four times and let it answer."""
    models = {"sft": str(sft), "aligned": str(aligned)}
    files = {"prompts": str(work / "prompts.json"), "out": str(work / "out.jsonl")}
    began = time.perf_counter()
    with launch.Worker("beyond_dpo.jobs.generate", settings, work, desc="sweep") as engine:
        started = time.perf_counter() - began
        first_swap = seconds_of(engine.call, "swap", **models, alpha=0.0)
        swaps = [seconds_of(engine.call, "swap", **models, alpha=a) for a in (0.5, 1.0, 2.0)]
        responses = seconds_of(engine.call, "generate", **files, samples=1, seed=0)
    return {
        "engine_start_s": started,
        "first_swap_s": first_swap,
        "swap_s": sum(swaps) / len(swaps),
        "64_responses_s": responses,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--freeze", action="store_true", help="write data/frozen/benchmarks/sweep.json"
    )
    options = parser.parse_args()
    decoding = dataclasses.asdict(config.load("expo", "cpu").decoding) | {"dtype": DTYPE}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        sft = work / "sft"
        aligned = work / "aligned"
        tensors = write_models(sft, aligned)
        settings = {"model": str(sft), "decoding": decoding}
        write_prompts(work / "prompts.json", sft)
        rounds = []
        for _ in range(options.rounds):
            rounds.append(measure_round(settings, sft, aligned, work))
    settings = {"model": "SmolLM2-135M", "dtype": DTYPE, "tensors": tensors}
    report("sweep", settings, rounds, options.freeze)


if __name__ == "__main__":
    main()
