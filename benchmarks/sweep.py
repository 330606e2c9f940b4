"""One more α in the living engine against a new engine, on SmolLM2-135M: start, weight swap, and 64
responses.

python benchmarks/sweep.py
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
import time
from pathlib import Path

import torch
from measure import report
from safetensors.torch import load_file, save_file

from beyond_dpo import templates
from beyond_dpo.machine import launch
from beyond_dpo.pipeline import assets, config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--freeze", action="store_true", help="write data/frozen/benchmarks/sweep.json"
    )
    options = parser.parse_args()
    cfg, sft, rounds = config.load("expo", "cpu"), assets.model_dir("smollm2"), []
    with tempfile.TemporaryDirectory() as work:
        aligned = Path(work, "aligned")
        aligned.mkdir()
        for file in sft.iterdir():
            (aligned / file.name).write_bytes(file.read_bytes())
        generator = torch.Generator().manual_seed(0)
        weights = load_file(sft / "model.safetensors")
        moved = {
            n: w + 1e-3 * torch.randn(w.shape, generator=generator).to(w.dtype)
            for n, w in weights.items()
        }
        save_file(moved, aligned / "model.safetensors", {"format": "pt"})
        tokenizer = templates.load_tokenizer(str(sft))
        prompts = [
            {"id": str(i), "prompt_ids": templates.render(tokenizer, "The film is", "plain")}
            for i in range(64)
        ]
        Path(work, "prompts.json").write_text(json.dumps(prompts))
        settings = {"model": str(sft), "decoding": dataclasses.asdict(cfg.decoding)}
        for _ in range(options.rounds):
            clock = [time.perf_counter()]
            with launch.Worker(
                "beyond_dpo.jobs.generate", settings, Path(work), desc="sweep"
            ) as engine:
                clock.append(time.perf_counter())
                engine.call("swap", sft=str(sft), aligned=str(aligned), alpha=0.0)
                clock.append(time.perf_counter())
                for alpha in (0.5, 1.0, 2.0):
                    engine.call("swap", sft=str(sft), aligned=str(aligned), alpha=alpha)
                clock.append(time.perf_counter())
                files = {
                    "prompts": str(Path(work, "prompts.json")),
                    "out": str(Path(work, "out.jsonl")),
                }
                engine.call("generate", **files, samples=1, seed=0)
                clock.append(time.perf_counter())
            start, swap = clock[1] - clock[0], (clock[3] - clock[2]) / 3
            row = {"engine_start_s": start, "first_swap_s": clock[2] - clock[1], "swap_s": swap}
            rounds.append(row | {"64_responses_s": clock[4] - clock[3]})
    report("sweep", {"model": "SmolLM2-135M", "tensors": len(weights)}, rounds, options.freeze)


if __name__ == "__main__":
    main()
