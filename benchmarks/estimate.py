"""What jobs of SmolLM2-135M need, measured, for the estimates to be tested against: memory and seconds in all.

    python benchmarks/estimate.py [--freeze] [name …]

Rows are random tokens of one length: what a job needs depends on lengths alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import sys
import tempfile
from pathlib import Path

import measure

from beyond_dpo import artifacts, assets, config, data, estimate, launch, paths

STEPS = 4
TRAIN = {  # (prompt tokens, response tokens, rows a step), settings
    "short": ((16, 48, 8), {}),
    "more rows": ((16, 48, 24), {}),
    "long": ((56, 200, 8), {}),
    "accumulated": ((56, 200, 8), {"micro_batch": 2}),
    "checkpointed": ((56, 200, 8), {"gradient_checkpointing": True}),
    "float32": ((16, 48, 8), {"precision": "fp32"}),
    "RMSprop": ((16, 48, 8), {"optimizer": "rmsprop"}),
    "adapter": ((16, 48, 8), {"lora_rank": 8}),
    "ZeRO-2 of 2": ((16, 48, 8), {"zero": 2, "processes": 2, "micro_batch": 4}),
    "ZeRO-3 of 2": ((16, 48, 8), {"zero": 3, "processes": 2, "micro_batch": 4}),
    "offloaded": ((16, 48, 8), {"zero": 2, "offload": True}),
}
GENERATE = {"few": (64, 16, 48), "many": (1024, 8, 32)}  # requests, prompt tokens, response tokens


def train(name: str, model: Path, work: Path) -> dict:
    """Train for STEPS steps; return what the estimate takes, and what was measured."""
    (prompt, said, size), changes = TRAIN[name]
    settings = config.Train(**{"lr": 1e-6, "loss": "simpo", "global_batch": size, "micro_batch": size} | changes)
    rng = random.Random(0)
    words = [[rng.randrange(100, 40000) for _ in range(prompt + 2 * said)] for _ in range(STEPS * size)]
    rows = [
        {"id": f"{i}", "prompt_ids": ids[:prompt],
         "responses": {"chosen": ids[prompt : prompt + said], "rejected": ids[prompt + said :]}}
        for i, ids in enumerate(words)
    ]  # fmt: skip
    data.write_rows(work / "rows.jsonl", rows)
    limits = {"max_prompt": prompt + 1, "max_length": prompt + said + 1}
    job = {"model": str(model), "rows": str(work / "rows.jsonl"), "names": ["chosen", "rejected"], "limits": limits}
    job |= {"settings": dataclasses.asdict(settings), "reference": None, "seed": 0, "out": str(work / name)}
    (work / "job.json").write_text(json.dumps(job))
    how = {"launcher": "torchrun" if settings.processes > 1 else "plain", "processes": settings.processes}
    found = measure.run(launch.command("beyond_dpo.train", work / "job.json", **how, now=True))
    log = [json.loads(line) for line in (work / name / "log.jsonl").read_text().splitlines()]
    steps = sorted(size / line["rows_per_s"] for line in log)
    about = {"prompt": prompt, "said": said, "rows": size, "names": 2, "settings": changes}
    return about | {"gib": found["peak_gib"], "seconds": found["seconds"], "step_s": steps[len(steps) // 2]}


def generate(name: str, model: Path, work: Path) -> dict:
    """Start an engine and sample; return what the estimate takes, and what was measured."""
    requests, prompt, said = GENERATE[name]
    rng, decoding = random.Random(0), dataclasses.asdict(config.load("expo", "cpu").decoding)
    asked = [[rng.randrange(100, 40000) for _ in range(prompt)] for _ in range(requests)]
    prompts = [{"id": f"{i}", "prompt_ids": ids} for i, ids in enumerate(asked)]
    (work / "prompts.json").write_text(json.dumps(prompts))
    given = {"prompts": str(work / "prompts.json"), "out": str(work / "said.jsonl"), "samples": 1, "seed": 0}
    job = {"module": "beyond_dpo.generate", "name": "Engine", "calls": [["generate", given]], "devices": 1}
    job["settings"] = {"model": str(model), "decoding": decoding | {"max_tokens": said}}
    (work / "job.json").write_text(json.dumps(job))
    found = measure.run([sys.executable, "-m", "beyond_dpo.spread", work / "job.json"])
    tokens = sum(len(json.loads(line)["response_ids"]) for line in (work / "said.jsonl").read_text().splitlines())
    about = {"requests": requests, "prompt": prompt, "said": tokens / requests}
    return about | {"gib": found["peak_gib"], "seconds": found["seconds"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="only these, not frozen")
    parser.add_argument("--freeze", action="store_true", help="write data/frozen/benchmarks/estimate.json")
    options, model, runs = parser.parse_args(), assets.model_dir("smollm2"), {"train": {}, "generate": {}}
    speed = estimate.speed()
    with tempfile.TemporaryDirectory() as work:
        for kind, run in (("train", train), ("generate", generate)):
            for name in [n for n in globals()[kind.upper()] if n in options.names or not options.names]:
                runs[kind][name] = run(name, model, Path(work))
                print(kind, name, json.dumps(runs[kind][name]), flush=True)
    content = {"model": json.loads((model / "config.json").read_text()), "speed": speed, **artifacts.environment()}
    content |= runs
    if options.freeze and not options.names:
        paths.write(measure.RESULTS / "estimate.json", json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
