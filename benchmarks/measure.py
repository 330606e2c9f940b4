"""What the benchmarks share: time a command and its memory, report rounds, and show them all."""

from __future__ import annotations

import json
import os
import subprocess
import threading
from statistics import median
from time import perf_counter
from typing import NamedTuple

import psutil

from beyond_dpo.files import write_file
from beyond_dpo.machine import paths
from beyond_dpo.pipeline import artifacts

RESULTS = paths.FROZEN / "benchmarks"
PAGE = paths.ROOT / "docs" / "performance.md"  # which holds the table


class Comparison(NamedTuple):
    """A row of the table of speeds: our number, whom it is compared with, theirs, the ratio's goal.

    `ours` and `theirs` are names of numbers in a round. `bound` is one of the file's bounds: what
    the ratio would be if speed were nothing but the number of matrix products.
    """

    what: str
    ours: str
    against: str
    theirs: str
    goal: str = ""
    bound: str = ""


ONE_ALPHA = "one α, peak memory (GiB; goal: below 1)"
FOUR_ALPHAS = "four α, peak memory (GiB; goal: below 1)"
GOALS = {8: "≥ 3", 64: "", 512: "≥ 4"}  # of our speed against TRL's, by tokens of a prompt
# At 512 tokens hardly anything is padding, so similar lengths help nobody.
BEST_AT = (8, 64)


def against_trl() -> list[Comparison]:
    """Return the comparisons of trainings: speeds, then memory."""
    rows = []
    for name, their in (("TRL", "trl"), ("TRL at its best", "trl_best")):
        for tokens, goal in GOALS.items():
            if their == "trl_best" and tokens not in BEST_AT:
                continue
            what = f"DPO training, prompts of {tokens} tokens (pairs/s)"
            key = f"pairs_per_s_{tokens}"
            rows.append(Comparison(what, f"ours_{key}", name, f"{their}_{key}", goal))
    for tokens in GOALS:
        what = f"DPO training, prompts of {tokens} tokens, peak memory (GiB)"
        key = f"peak_gib_{tokens}"
        rows.append(Comparison(what, f"ours_{key}", "TRL", f"trl_{key}", "≤ 0.7"))
    return rows


ROWS = {
    "train_vs_trl": against_trl(),
    "extrapolate": [
        Comparison("one α of a 1B model (s)", "ours_1_s", "`cp`", "cp_1_s", "≤ 2.5"),
        Comparison("four α (s)", "ours_4_s", "`cp` four times", "cp_4_s", "≤ 1.2"),
        Comparison("one α (s)", "ours_1_s", "mergekit", "mergekit_1_s"),
        Comparison("four α (s)", "ours_4_s", "mergekit", "mergekit_4_s", "≤ 0.1"),
        Comparison(ONE_ALPHA, "ours_1_gib", "mergekit", "mergekit_1_gib"),
        Comparison(FOUR_ALPHAS, "ours_4_gib", "mergekit", "mergekit_4_gib"),
    ],
    "bandit": [
        Comparison(
            "five-armed bandit, all β (steps/s)",
            "ours_steps_per_s",
            "PyTorch",
            "torch_steps_per_s",
        ),
    ],
    "shared_prompts": [
        Comparison(
            f"{kind}/s, prompts of {tokens} tokens",
            f"shared_{kind}_{tokens}",
            "one for each response",
            f"alone_{kind}_{tokens}",
            bound=f"{kind}_{tokens}",
        )
        for kind in ("pairs", "quadruples")
        for tokens in (8, 64, 512)
    ],
    "score_rewards": [
        Comparison(
            f"rewards of texts of up to {tokens} tokens (texts/s)",
            f"ours_{tokens}_texts_per_s",
            f"`transformers.pipeline`, {batches}",
            f"pipeline_{name}_{tokens}_texts_per_s",
            goal,
        )
        for tokens in (64, 512)
        for batches, name, goal in (
            ("batches of 8", "8", "≥ 3"),
            ("its fastest batches", "best", ""),
        )
    ],
    "score_logps": [
        Comparison(
            "log-probabilities (pairs/s)",
            "ours_pairs_per_s",
            "a plain loop, batches of 8",
            "plain_pairs_per_s",
            "≥ 3",
        ),
    ],
    "sampling": [
        Comparison(
            "sampling 256 responses (tokens/s)",
            "ours_tokens_per_s",
            against,
            f"{name}_tokens_per_s",
            goal,
        )
        for against, name, goal in (
            ("vLLM as it comes", "vllm", "≥ 2"),
            ("`generate()` of transformers, batches of 64", "transformers", "≥ 5"),
        )
    ],
    "sweep": [
        Comparison(
            "one more α in the living engine (s)",
            "swap_s",
            "a new engine",
            "engine_start_s",
            "≤ 0.05",
        ),
    ],
}


class PeakMemory(threading.Thread):
    """Watch the memory of a process and all its children, ten times a second, until `stop`."""

    def __init__(self, pid: int):
        super().__init__(daemon=True)
        self.process = psutil.Process(pid)
        self.peak = 0  # bytes
        self.over = threading.Event()

    def run(self) -> None:
        while not self.over.wait(0.1):
            try:
                processes = [self.process, *self.process.children(recursive=True)]
                used = sum(process.memory_info().rss for process in processes)
            except psutil.NoSuchProcess:
                continue
            self.peak = max(self.peak, used)

    def stop(self) -> float:
        """Return the peak in GiB."""
        self.over.set()
        self.join()
        return self.peak / 2**30


def run(command: list, **environment: str) -> dict:
    """Return {seconds, peak_gib, output} of a command and all its children.

    The peak is of the summed resident memory; pages that processes share count in each. What was
    written before is on the disk when the clock starts.

    Raises:
        CalledProcessError: with the end of its output.
    """
    os.sync()
    began = perf_counter()
    child = subprocess.Popen(
        [str(argument) for argument in command],
        env={**os.environ, "TQDM_DISABLE": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    memory = PeakMemory(child.pid)
    memory.start()
    output, _ = child.communicate()
    peak = memory.stop()
    seconds = perf_counter() - began
    if child.returncode:
        raise subprocess.CalledProcessError(child.returncode, command, output[-3000:])
    return {"seconds": seconds, "peak_gib": peak, "output": output}


def report(name: str, settings: dict, rounds: list[dict], freeze: bool) -> None:
    """Print the rounds and what they compare.

    Args:
        freeze: keep the rounds in data/frozen and renew the table in docs/performance.md.
    """
    content = {"benchmark": name, **settings, **artifacts.environment(), "rounds": rounds}
    print(json.dumps(content, indent=1))
    print("\n".join(compared(content)))
    if freeze:
        write_file(RESULTS / f"{name}.json", json.dumps(content, indent=1) + "\n")
        write_file(PAGE, table(PAGE.read_text()))


def compared(content: dict) -> list[str]:
    """Return a Markdown line per comparison of ROWS.

    It has the medians of both, and the median [smallest, largest] of the rounds' ratios; of a
    single round the ratio, and that it is one.
    """
    rounds = content["rounds"]
    lines = []
    for comparison in ROWS[content["benchmark"]]:
        ours = [row[comparison.ours] for row in rounds]
        theirs = [row[comparison.theirs] for row in rounds]
        ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
        spread = f"[{min(ratios):.2f}, {max(ratios):.2f}]" if len(rounds) > 1 else "(one round)"
        cells = [
            comparison.what,
            f"{median(ours):.3g}",
            comparison.against,
            f"{median(theirs):.3g}",
            f"{median(ratios):.2f} {spread}",
            bound_of(comparison, content),
            comparison.goal,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def bound_of(comparison: Comparison, content: dict) -> str:
    """Return what a ratio is bounded by as far as matrix products go, "" where nobody counted."""
    bound = content.get("bounds", {}).get(comparison.bound)
    return f"{bound:.2f}" if bound else ""


def table(page: str) -> str:
    """Return a page with the table of all frozen benchmarks between its markers."""
    lines = [
        "| what | ours | against | theirs | ours ÷ theirs [rounds] | by products | goal |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in ROWS:
        path = RESULTS / f"{name}.json"
        if path.exists():
            lines += compared(json.loads(path.read_text()))
    start = "<!-- benchmarks -->"
    end = "<!-- /benchmarks -->"
    if not page.count(start) == page.count(end) == 1:
        raise ValueError(f"{PAGE.name} needs {start} and {end} once each, around the table")
    before, _, rest = page.partition(start)
    _, _, after = rest.partition(end)
    return "\n".join([before + start, *lines, end]) + after
