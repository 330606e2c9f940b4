"""What the benchmarks share: run a command to its end and say how long it took and how much memory
it used.
"""

from __future__ import annotations

import json
import os
import subprocess
import threading
import time
from statistics import median

import psutil

from beyond_dpo.files import write_file
from beyond_dpo.machine import paths
from beyond_dpo.pipeline import artifacts

RESULTS = paths.FROZEN / "benchmarks"
ROWS = {  # what is compared: in words, our number, against whom, theirs, the goal for the ratio
    "train_vs_trl": [
        ("DPO training (pairs/s)", "ours_pairs_per_s", "TRL", "trl_pairs_per_s", "≥ 1.5"),
        ("DPO training, peak memory (GiB)", "ours_peak_gib", "TRL", "trl_peak_gib", "≤ 0.8"),
        (
            "DPO training (pairs/s)",
            "ours_pairs_per_s",
            "TRL as it comes",
            "trl_default_pairs_per_s",
            "",
        ),
        (
            "DPO training, peak memory (GiB)",
            "ours_peak_gib",
            "TRL as it comes",
            "trl_default_peak_gib",
            "",
        ),
    ],
    "extrapolate": [
        ("one α of a 1B model (s)", "ours_1_s", "`cp`", "cp_1_s", "≤ 1.5"),
        ("four α (s)", "ours_4_s", "`cp` four times", "cp_4_s", "≤ 1.5"),
        ("one α (s)", "ours_1_s", "mergekit", "mergekit_1_s", ""),
        ("four α (s)", "ours_4_s", "mergekit", "mergekit_4_s", "≤ 0.33"),
        ("one α, peak memory (GiB; goal: below 1)", "ours_1_gib", "mergekit", "mergekit_1_gib", ""),
        (
            "four α, peak memory (GiB; goal: below 1)",
            "ours_4_gib",
            "mergekit",
            "mergekit_4_gib",
            "",
        ),
    ],
    "bandit": [
        (
            "five-armed bandit, all β (steps/s)",
            "ours_steps_per_s",
            "PyTorch",
            "torch_steps_per_s",
            "",
        )
    ],
    "shared_prompts": [
        (
            f"{name}/s, prompts of {n} tokens",
            f"shared_{name}_{n}",
            "one for each response",
            f"alone_{name}_{n}",
            "",
        )
        for name in ("pairs", "quadruples")
        for n in (8, 64, 512)
    ],
    "sweep": [
        ("one more α in the living engine (s)", "swap_s", "a new engine", "engine_start_s", "≤ 0.1")
    ],
}


def run(command: list, **environment: str) -> dict:
    """Return {seconds, peak_gib} of a command and all its children; raise CalledProcessError with
    its output's end.

    The peak is of the summed resident memory, sampled ten times a second; pages that processes
    share count in each. What was written before is on the disk when the clock starts.
    """
    os.sync()
    began, peak, over = time.perf_counter(), [0], threading.Event()
    child = subprocess.Popen(
        list(map(str, command)),
        env={**os.environ, "TQDM_DISABLE": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )

    def watch():
        root = psutil.Process(child.pid)
        while not over.wait(0.1):
            try:
                peak[0] = max(
                    peak[0],
                    sum(p.memory_info().rss for p in [root, *root.children(recursive=True)]),
                )
            except psutil.NoSuchProcess:
                continue

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    output, _ = child.communicate()
    over.set()
    thread.join()
    if child.returncode:
        raise subprocess.CalledProcessError(child.returncode, command, output[-3000:])
    return {"seconds": time.perf_counter() - began, "peak_gib": peak[0] / 2**30, "output": output}


def report(name: str, settings: dict, rounds: list[dict], freeze: bool) -> None:
    """Print the rounds and what they compare; with `freeze` keep them in data/frozen and renew the
    README's table.
    """
    content = {"benchmark": name, **settings, **artifacts.environment(), "rounds": rounds}
    print(json.dumps(content, indent=1))
    print("\n".join(compared(content)))
    if freeze:
        write_file(RESULTS / f"{name}.json", json.dumps(content, indent=1) + "\n")
        readme = paths.ROOT / "README.md"
        write_file(readme, table(readme.read_text()))


def compared(content: dict) -> list[str]:
    """Return a Markdown line per comparison of ROWS: medians, and the ratio's median [smallest,
    largest] of a round.
    """
    lines, rounds = [], content["rounds"]
    for what, ours, other, theirs, goal in ROWS[content["benchmark"]]:
        a, b = ([r[name] for r in rounds] for name in (ours, theirs))
        ratios = sorted(x / y for x, y in zip(a, b, strict=True))
        ratio = f"{median(ratios):.2f} [{ratios[0]:.2f}, {ratios[-1]:.2f}]"
        cells = [what, f"{median(a):.3g}", other, f"{median(b):.3g}", ratio, goal]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def table(readme: str) -> str:
    """Return the README's text with the table of all frozen benchmarks between its markers."""
    lines = [
        "| what | ours | against | theirs | ours ÷ theirs [rounds] | goal |",
        "|---|---|---|---|---|---|",
    ]
    for name in ROWS:
        path = RESULTS / f"{name}.json"
        lines += compared(json.loads(path.read_text())) if path.exists() else []
    start, end = "<!-- benchmarks -->", "<!-- /benchmarks -->"
    if not readme.count(start) == readme.count(end) == 1:
        raise ValueError(f"README.md needs {start} and {end} once each, around the table")
    before, after = readme.partition(start)[0], readme.partition(end)[2]
    return "\n".join([before + start, *lines, end]) + after
