"""The five-armed bandit at full length, compiled, against a plain PyTorch loop over all β at once;
one core.

python benchmarks/bandit.py
"""

from __future__ import annotations

import argparse
import sys
import time

import numpy as np
import torch
from measure import report, run
from torch.nn.functional import logsigmoid

from beyond_dpo import bandit
from beyond_dpo.pipeline import config

BETAS = list(config.load("mallows", "cpu").bandit_betas)  # of Figures 8a, 8b and 9
LINKS, STEPS, TORCH_STEPS = ("dpo", "mallows_phi"), 500_000, 2_000
JOB = (
    f"from beyond_dpo import bandit\nfor link in {LINKS}: bandit.train({BETAS}, link=link, "
    f"steps={STEPS})"
)


def torch_train(
    link: str, steps: int, lr: float = 5e-3, phi: float = 0.05, epsilon: float = 0.05
) -> torch.Tensor:
    """Do what bandit.train does as one would in PyTorch: autograd, float64, the β as a batch."""

    def exact(t):
        return (t + 1) / (1 - phi ** (t + 1)) - t / (1 - phi**t)

    edge = torch.tensor(epsilon, dtype=torch.float64, requires_grad=True)
    exact(edge).backward()
    gap, slope = exact(edge).item() - 0.5, edge.grad.item()
    a3 = (slope * epsilon - gap) / (2 * epsilon**3)
    a1 = gap / epsilon - a3 * epsilon**2
    winners, losers = torch.tensor(bandit.PAIRS).T
    beta = torch.tensor(BETAS, dtype=torch.float64)[:, None]
    theta = torch.zeros(len(BETAS), 5, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([theta], lr=lr)
    for _ in range(steps):
        logps = theta.log_softmax(-1)
        s = beta * (logps[:, winners] - logps[:, losers])
        if link == "dpo":
            losses = -logsigmoid(s)
        else:
            inside, sign = s.abs() < epsilon, s.sign()
            outer = (1 - sign) / 2 + sign * exact(torch.where(inside, 1.0, s.abs()))
            losses = -torch.where(inside, 0.5 + a1 * s + a3 * s**3, outer).log()
        optimizer.zero_grad()
        losses.mean(-1).sum().backward()
        optimizer.step()
    return theta.detach().softmax(-1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--freeze", action="store_true", help="write data/frozen/benchmarks/bandit.json"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    rounds, apart = [], 0.0
    for link in LINKS:  # compiles, and shows that both do the same
        ours = bandit.train(BETAS, link=link, steps=200)[1][-1]
        apart = max(apart, np.abs(ours - torch_train(link, 200).numpy()).max())
    for _ in range(options.rounds):
        clock = [time.perf_counter()]
        for link in LINKS:
            bandit.train(BETAS, link=link, steps=STEPS)
        clock.append(time.perf_counter())
        for link in LINKS:
            torch_train(link, TORCH_STEPS)
        clock.append(time.perf_counter())
        row = {
            "job_s": run([sys.executable, "-c", JOB])["seconds"],
            "compiled_s": clock[1] - clock[0],
        }
        row["ours_1000_s"] = row["compiled_s"] / STEPS * 1000
        row["torch_1000_s"] = (clock[2] - clock[1]) / TORCH_STEPS * 1000
        row["ours_steps_per_s"], row["torch_steps_per_s"] = (
            1000 / row[f"{n}_1000_s"] for n in ("ours", "torch")
        )
        rounds.append(row)
    settings = {
        "betas": BETAS,
        "links": LINKS,
        "steps": STEPS,
        "torch_steps": TORCH_STEPS,
        "apart_at_200": apart,
    }
    report("bandit", settings, rounds, options.freeze)


if __name__ == "__main__":
    main()
