"""Say what a notebook would run, and what it is doing: artifacts and child processes report, the runner follows.

Reports are JSON lines in the file that BEYOND_DPO_PROGRESS names: {event, stage, key} for start, wait, hit and done of
an artifact, and {event, stage, fraction, eta} (fraction in [0, 1], eta in seconds) for progress of the one that runs.
"""

import contextlib
import json
import os
import shutil
import sys
import threading
import time
from pathlib import Path

from beyond_dpo import artifacts, config, paths


def planned(nb, values: dict) -> tuple:
    """Return a notebook's configuration (None if it has none) and the artifacts that it names, as its own cells say.

    Those are the set-up and the one that names its results. values: of its parameters. Nothing is computed, and no
    network is asked. Raises ConfigError where the set-up does.
    """
    held, cells = dict(values), [cell for cell in nb.cells if cell.cell_type == "code"]
    cells = [cell.source for cell in cells if "parameters" not in cell.metadata.get("tags", [])]
    before = os.environ.get("COMPUTE", "")
    os.environ["COMPUTE"] = "plan"
    try:
        with contextlib.suppress(artifacts.MissingArtifact):  # the first result that it would show
            exec("\n".join(cells[:2]), held)
    finally:
        os.environ["COMPUTE"] = before
    return held.get("cfg"), [value for value in held.values() if isinstance(value, artifacts.Artifact)]


def said(nb, values: dict) -> list[str]:
    """Return what a notebook needs and executes, a line each; arguments as for planned()."""
    try:
        cfg, named = planned(nb, values)
    except config.ConfigError as reason:
        return [f"is refused: {reason}"]
    jobs = [one.upstream for one in named]
    file = str(paths.ARTIFACTS / "{}.partial/checkpoints/config.json")
    hub = "KEY" * any('"plan": ' in json.dumps(one.recipe) for job in jobs for one in job.values())  # not by commit
    lines = []
    for job in jobs:
        for key, one in job.items():
            if one.does:  # names of models and files may hold braces
                lines.append(one.does.replace("{job}", file.replace("{}", hub or key)))
    if not lines:
        return ["computes nothing: shows what others found or printed"]
    n, world = cfg.needs, cfg.world
    return [
        f"needs: {n.gpus} GPUs of {n.gpu_gb} GB, {n.memory_gb} GB memory, {n.disk_gb} GB disk, about {n.hours:g} h",
        f"models: target {world.target}, reward model {world.reward_model}; data: {world.dataset}, {world.prompts} "
        f"{'given pairs' if world.pairs == 'given' else 'prompts for pairs'}, {world.dev_prompts} dev, "
        f"{world.test_prompts} test",
        *dict.fromkeys(lines),
    ]


class Watch:
    """Follow one notebook twice a second, in a `with`: memory of its processes, its reports, a live line on stderr.

    peak: most memory (RSS, bytes) that all processes below this one held together. computed, found: keys of artifacts.
    """

    def __init__(self, title: str, reports: Path):
        self.title, self.reports, self.cell, self.peak = title, reports, "", 0
        self.running, self.computed, self.found = {}, set(), set()
        self._offset, self._printed, self._stop = 0, (0.0, ""), threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *error):
        self._stop.set()
        self._thread.join()
        self._read()
        print("\r\x1b[K" * sys.stderr.isatty(), end="", file=sys.stderr, flush=True)

    def line(self) -> str:
        """Return what is going on: `[2/3] 11_expo_headline · cell 4 of 9 · train-ab12cd · SFT · 43 % · 2 min left`."""
        parts = [self.title, self.cell]
        for key, (began, what, fraction, eta) in list(self.running.items())[-1:]:
            parts += [key[:-10] if key[-17:-16] == "-" else key, "" if key.startswith(what) else what]
            parts += ["" if fraction is None else f"{100 * fraction:.0f} %"]
            parts += [f"for {duration(time.monotonic() - began)}" if eta is None else f"{duration(eta)} left"]
        return " · ".join(part for part in parts if part)

    def _follow(self) -> None:
        import psutil

        while not self._stop.wait(0.5):
            memory = 0
            for process in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    memory += process.memory_info().rss
            self.peak = max(self.peak, memory)
            self._read()
            line, now = self.line(), time.monotonic()
            if sys.stderr.isatty():
                print(f"\r{line[: shutil.get_terminal_size().columns - 1]}\x1b[K", end="", file=sys.stderr, flush=True)
            elif now - self._printed[0] >= 10 and line != self._printed[1]:
                print(line, file=sys.stderr, flush=True)
                self._printed = (now, line)

    def _read(self) -> None:
        with open(self.reports, "rb") as file:
            file.seek(self._offset)
            lines = [line for line in file.read().splitlines(keepends=True) if line.endswith(b"\n")]  # whole ones
        self._offset += sum(map(len, lines))
        for told in map(json.loads, lines):
            key = told.get("key") or next(reversed(self.running), told.get("stage") or "working")
            began = self.running.pop(key, (time.monotonic(),))[0]
            if told["event"] == "done":
                self.computed.add(key)
            elif told["event"] == "hit":
                self.found.add(key)
            elif told.get("fraction") != 1 or key != told["stage"]:  # a job outside of any artifact ends at 1
                self.running[key] = (began, told.get("stage") or "", told.get("fraction"), told.get("eta"))


def duration(seconds: float) -> str:
    """Return `45 s`, `2 min 10 s` or `3 h 12 min`."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
