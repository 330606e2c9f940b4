"""Five α of a LoRA adapter in one vLLM batch against five weight swaps, on SmolLM2-135M, 64 prompts each.

    python benchmarks/adapters.py
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

from beyond_dpo import assets, config, data, launch, lora

ALPHAS = (0.0, 0.5, 1.0, 2.0, 4.0)


def adapter(model: Path, out: Path) -> None:
    """Write a random adapter of rank 8 of every linear layer, small enough for the model to go on writing text."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    lora.inject(loaded, 8, 16.0)
    trained = {name: w for name, w in loaded.named_parameters() if w.requires_grad}
    lora.save(loaded, {name: 0.01 * torch.randn(w.shape) for name, w in trained.items()}, out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--freeze", action="store_true", help="write data/frozen/benchmarks/adapters.json")
    options = parser.parse_args()
    decoding, sft, rounds = dataclasses.asdict(config.load("expo", "cpu").decoding), assets.model_dir("smollm2"), []
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        (work / "adapter").mkdir()
        adapter(sft, work / "adapter")
        folders = {f"{alpha:g}": str(work / f"alpha-{alpha:g}") for alpha in ALPHAS}
        lora.scaled(work / "adapter", dict(zip(ALPHAS, folders.values(), strict=True)))
        tokenizer = data.load_tokenizer(str(sft))
        prompts = [{"id": str(i), "prompt_ids": data.render(tokenizer, "The film is", "plain")} for i in range(64)]
        (work / "prompts.json").write_text(json.dumps(prompts))
        given = {"prompts": str(work / "prompts.json"), "samples": 1, "seed": 0}
        settings = {"model": str(sft), "decoding": decoding}
        with (
            launch.Worker("beyond_dpo.generate", settings | {"adapters": [5, 8]}, work, desc="together") as together,
            launch.Worker("beyond_dpo.generate", settings, work, desc="swapped") as swapped,
        ):
            for k in range(options.rounds + 1):  # the first round warms both up
                clock = [time.perf_counter()]
                together.call("generate", **given, out=str(work / f"together{k}.jsonl"), adapters=folders)
                clock.append(time.perf_counter())
                for alpha in ALPHAS:
                    swapped.call("swap", sft=str(sft), aligned=str(work / "adapter"), alpha=alpha)
                    swapped.call("generate", **given, out=str(work / f"swapped{k}-{alpha:g}.jsonl"))
                clock.append(time.perf_counter())
                rounds.append({"together_s": clock[1] - clock[0], "swapped_s": clock[2] - clock[1]})
    report("adapters", {"model": "SmolLM2-135M", "rank": 8, "alphas": ALPHAS}, rounds[1:], options.freeze)


if __name__ == "__main__":
    main()
