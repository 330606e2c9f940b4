"""What the benchmarks share: run a command to its end and say how long it took and how much memory it used."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil

RESULTS = Path(__file__).resolve().parents[1] / "data" / "frozen" / "benchmarks"


def run(command: list, **environment: str) -> dict:
    """Return {seconds, peak_gib} of a command and all its children; raise CalledProcessError with its output's end.

    The peak is of the summed resident memory, sampled ten times a second; pages that processes share count once each.
    """
    began, peak, over = time.perf_counter(), [0], threading.Event()
    child = subprocess.Popen(
        list(map(str, command)), env={**os.environ, "TQDM_DISABLE": "1", **environment},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip

    def watch():
        root = psutil.Process(child.pid)
        while not over.wait(0.1):
            try:
                peak[0] = max(peak[0], sum(p.memory_info().rss for p in [root, *root.children(recursive=True)]))
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
    """Print median [smallest, largest] of every number of the rounds, and with `freeze` keep them in data/frozen."""
    import pandas as pd

    table = pd.DataFrame(rounds)
    summary = table.agg(["median", "min", "max"]).T
    print(json.dumps(settings, indent=1))
    print(summary.to_string(float_format=lambda x: f"{x:.3g}"))
    if freeze:
        RESULTS.mkdir(parents=True, exist_ok=True)
        cores = {"cores": len(os.sched_getaffinity(0)), "cpu": _cpu(), "python": sys.version.split()[0]}
        content = {"benchmark": name, **settings, **cores, "rounds": rounds}
        (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown")
