"""Do OpenMP's idle threads spin, and what does that cost a small DPO training?

    python benchmarks/waiting.py [--rounds 3] [--seconds 20] [--out waiting.json]

The training runs alone, beside one busy process, and beside several. Each measurement is a child
process of its own, as launch starts them: with the default of the OpenMP library that torch brings
along (threads spin for a while), and with OMP_WAIT_POLICY=PASSIVE (they sleep at once).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

from beyond_dpo.machine import launch
from beyond_dpo.pipeline import artifacts

POLICIES = {"as it comes": {}, "passive": {"OMP_WAIT_POLICY": "PASSIVE"}}
# How many busy processes run at the same time.
BESIDE = {
    "nothing": 0,
    "one busy process": 1,
    "as many as there are cores": len(os.sched_getaffinity(0)),
}
BUSY = "while True: pass"
# SmolLM2-135M's, with fewer layers and words.
SHAPE = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 2,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 8192,
}
PAIRS = 4  # in a step
TOKENS = 64  # of a response


def train(seconds: float) -> float:
    """Return the seconds of a DPO step of a small random model, the mean over `seconds`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    ids = torch.randint(SHAPE["vocab_size"], (2 * PAIRS, TOKENS))  # chosen, then rejected

    def step() -> None:
        logits = model(input_ids=ids).logits[:, :-1]
        logps = logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).sum((1, 2))
        chosen, rejected = logps.chunk(2)
        loss = -torch.nn.functional.logsigmoid(0.1 * (chosen - rejected)).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(3):  # the first ones fill the allocator
        step()
    steps = 0
    began = time.perf_counter()
    while time.perf_counter() - began < seconds:
        step()
        steps += 1
    return (time.perf_counter() - began) / steps


def measure(policy: dict[str, str], neighbours: int, seconds: float) -> float:
    """Return train(seconds) of a child, beside so many processes that never wait."""
    environment = {name: value for name, value in os.environ.items() if name not in launch.WAITING}
    environment.update(policy)
    busy = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(neighbours)]
    try:
        command = [sys.executable, __file__, "--step", str(seconds)]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
        return float(done.stdout)
    finally:
        for process in busy:
            process.kill()
            process.wait()


def table(rounds: list[dict]) -> list[str]:
    """Return a line for each neighbour: the medians of a step in milliseconds, and their ratio."""
    lines = [
        f"{'beside':28} {'as it comes':>12} {'passive':>10} {'ratio':>6}   (ms a step, medians)"
    ]
    for beside in BESIDE:
        spinning = 1000 * median(row[beside]["as it comes"] for row in rounds)
        sleeping = 1000 * median(row[beside]["passive"] for row in rounds)
        ratio = sleeping / spinning
        lines.append(f"{beside:28} {spinning:12.1f} {sleeping:10.1f} {ratio:6.2f}")
    return lines


def measure_round(seconds: float) -> dict[str, dict[str, float]]:
    """Return {what runs beside: {policy: seconds of a step}}."""
    measured = {}
    for beside, neighbours in BESIDE.items():
        measured[beside] = {}
        for name, policy in POLICIES.items():
            measured[beside][name] = measure(policy, neighbours, seconds)
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--seconds", type=float, default=20.0, help="of each of the six measurements of a round"
    )
    parser.add_argument("--out", type=Path, help="write the rounds to this JSON file")
    parser.add_argument(
        "--step", type=float, metavar="SECONDS", help="measure here (for its children)"
    )
    options = parser.parse_args()
    if options.step:
        print(train(options.step))
        return
    rounds = []
    for i in range(options.rounds):
        print(
            f"round {i + 1} of {options.rounds}, {6 * options.seconds:.0f} s and the starts",
            file=sys.stderr,
        )
        rounds.append(measure_round(options.seconds))
    print("\n".join(table(rounds)))
    if options.out:
        content = {
            "benchmark": "waiting",
            "seconds": options.seconds,
            "threads": launch.threads(),
            **artifacts.environment(),
            "rounds": rounds,
        }
        options.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
