"""The five-armed bandit at full length, compiled, against a plain PyTorch loop, on one core.

    python benchmarks/bandit.py

The PyTorch loop trains all β at once.
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
LINKS = ("dpo", "mallows_phi")
STEPS = 500_000
TORCH_STEPS = 2_000
JOB = f"""
from beyond_dpo import bandit
for link in {LINKS}:
    bandit.train({BETAS}, link=link, steps={STEPS})
"""


def torch_train(
    link: str, steps: int, lr: float = 5e-3, phi: float = 0.05, epsilon: float = 0.05
) -> torch.Tensor:
    """Do what bandit.train does as one would in PyTorch: autograd, float64, the β as a batch."""
    a1, a3 = cubic(phi, epsilon)
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
            inside = s.abs() < epsilon
            sign = s.sign()
            outside = (1 - sign) / 2 + sign * exact(torch.where(inside, 1.0, s.abs()), phi)
            losses = -torch.where(inside, 0.5 + a1 * s + a3 * s**3, outside).log()
        optimizer.zero_grad()
        losses.mean(-1).sum().backward()
        optimizer.step()
    return theta.detach().softmax(-1)


def exact(s, phi: float):
    """Return the link of MallowsPO-φ for s > 0; see bandit.train."""
    return (s + 1) / (1 - phi ** (s + 1)) - s / (1 - phi**s)


def cubic(phi: float, epsilon: float) -> tuple[float, float]:
    """Return a1, a3 of the cubic that meets the exact link and its slope at s = epsilon."""
    edge = torch.tensor(epsilon, dtype=torch.float64, requires_grad=True)
    value = exact(edge, phi)
    value.backward()
    gap = value.item() - 0.5
    slope = edge.grad.item()
    a3 = (slope * epsilon - gap) / (2 * epsilon**3)
    a1 = gap / epsilon - a3 * epsilon**2
    return a1, a3


def largest_difference(steps: int) -> float:
    """Return how far the two ways are apart, in probability; it also compiles ours."""
    differences = []
    for link in LINKS:
        _, probabilities = bandit.train(BETAS, link=link, steps=steps)
        expected = torch_train(link, steps).numpy()
        differences.append(np.abs(probabilities[-1] - expected).max())
    return max(differences)


def measure_round() -> dict[str, float]:
    """Time each of the two ways here, and ours as a whole job in a process of its own."""
    began = time.perf_counter()
    for link in LINKS:
        bandit.train(BETAS, link=link, steps=STEPS)
    compiled_seconds = time.perf_counter() - began
    began = time.perf_counter()
    for link in LINKS:
        torch_train(link, TORCH_STEPS)
    torch_seconds = time.perf_counter() - began
    job_seconds = run([sys.executable, "-c", JOB])["seconds"]
    ours_1000 = compiled_seconds / STEPS * 1000
    torch_1000 = torch_seconds / TORCH_STEPS * 1000
    return {
        "job_s": job_seconds,
        "compiled_s": compiled_seconds,
        "ours_1000_s": ours_1000,
        "torch_1000_s": torch_1000,
        "ours_steps_per_s": 1000 / ours_1000,
        "torch_steps_per_s": 1000 / torch_1000,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--freeze", action="store_true", help="write data/frozen/benchmarks/bandit.json"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    settings = {
        "betas": BETAS,
        "links": LINKS,
        "steps": STEPS,
        "torch_steps": TORCH_STEPS,
        "apart_at_200": largest_difference(200),
    }
    rounds = [measure_round() for _ in range(options.rounds)]
    report("bandit", settings, rounds, options.freeze)


if __name__ == "__main__":
    main()
