"""Say what a notebook would run, and what it is doing: artifacts and child processes report, the
runner follows.

Reports are JSON lines in the file that BEYOND_DPO_PROGRESS names: {event, stage, key} for start,
wait, hit and done of an artifact, and {event, stage, fraction, eta} (fraction in [0, 1], eta in
seconds) for progress of the one that runs.
"""

import ast
import contextlib
import json
import math
import os
import shutil
import sys
import threading
import time
from pathlib import Path

from beyond_dpo import events
from beyond_dpo.machine import paths
from beyond_dpo.pipeline import artifacts, config


def configuration(nb, values: dict):
    """Return the configuration that a notebook's set-up loads with these parameters; None where it
    loads none.

    Only the set-up's assignments up to that are executed, none of its imports, so that this takes
    no time. Raises ConfigError as config.load() does, and ValueError for a cluster that the
    environment does not describe well.
    """
    for cell in nb.cells:
        if cell.cell_type != "code" or "parameters" in cell.metadata.get("tags", []):
            continue
        try:
            body = ast.parse(cell.source).body
        except SyntaxError:  # a magic command, say
            continue
        steps = [node for node in body if isinstance(node, ast.Assign)]
        for last, node in enumerate(steps):
            if isinstance(node.value, ast.Call) and ast.unparse(node.value.func) == "config.load":
                return _assigned(steps[: last + 1], values)
    return None


def _assigned(steps: list[ast.Assign], values: dict):
    """Return what the last of these assignments assigns; None where they need more than config and
    the parameters.
    """
    names = {**values, "config": config}
    try:
        exec(compile(ast.Module(steps, []), "set-up", "exec"), names)
    except ValueError:
        raise
    except Exception:  # shown by the notebook itself
        return None
    return names.get(ast.unparse(steps[-1].targets[0]))


def lacks_results(nb, values: dict) -> bool:
    """Say whether a notebook would compute anything; arguments as for planned()."""
    try:
        named = planned(nb, values)[1]
        return any(one.missing() for one in named)
    except Exception:  # what it needs cannot even be named
        return True


def planned(nb, values: dict) -> tuple:
    """Return a notebook's configuration (None if it has none) and the artifacts that it names, as
    its own cells say.

    Those are the set-up and the one that names its results. values: of its parameters. Nothing is
    computed, and no network is asked. Raises ValueError where the set-up does, as ConfigError is
    one.
    """
    held, cells = dict(values), [cell for cell in nb.cells if cell.cell_type == "code"]
    cells = [cell.source for cell in cells if "parameters" not in cell.metadata.get("tags", [])]
    before = os.environ.get("COMPUTE")
    os.environ["COMPUTE"] = "plan cold" if before == "cold" else "plan"
    try:
        with contextlib.suppress(artifacts.MissingArtifact):  # the first result that it would show
            exec("\n".join(cells[:2]), held)
    finally:
        del os.environ["COMPUTE"]
        if before is not None:
            os.environ["COMPUTE"] = before
    return held.get("cfg"), [
        value for value in held.values() if isinstance(value, artifacts.Artifact)
    ]


def said(nb, values: dict) -> list[str]:
    """Return what a notebook needs and executes, a line each; arguments as for planned()."""
    try:
        cfg, named = planned(nb, values)
    except ValueError as reason:  # a ConfigError, or variables that do not describe a cluster well
        return [f"is refused: {reason}"]
    jobs = [one.upstream for one in named]
    file = str(paths.ARTIFACTS / "{}.partial/checkpoints/config.json")
    hub = "KEY" * any(
        '"plan": ' in json.dumps(one.recipe) for job in jobs for one in job.values()
    )  # not by commit
    lines = []
    for job in jobs:
        for key, one in job.items():
            if one.does:  # names of models and files may hold braces
                lines.append(one.does.replace("{job}", file.replace("{}", hub or key)))
    if not lines:
        return ["computes nothing: shows what others found or printed"]
    n, world = cfg.needs, cfg.world
    return [
        f"needs: {n.gpus} GPUs of {n.gpu_gb} GB, {n.memory_gb} GB memory, {n.disk_gb} GB disk, "
        f"about {n.hours:g} h",
        f"models: target {world.target}, reward model {world.reward_model}; data: "
        f"{world.dataset}, {world.prompts} "
        f"{'given pairs' if world.pairs == 'given' else 'prompts for pairs'}, {world.dev_prompts} "
        "dev, "
        f"{world.test_prompts} test",
        *dict.fromkeys(lines),
    ]


class Watch:
    """Follow one notebook twice a second, in a `with`: memory of its processes, its reports, a live
    line on stderr.

    reports: the file that its processes write to, None where there is none.
    peak: most memory (RSS, bytes) that all processes below this one held together. computed, found:
    keys of artifacts.
    """

    def __init__(self, title: str, reports: Path | None = None):
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
        if sys.stderr.isatty():
            events.say("\r\x1b[K", end="")

    def line(self) -> str:
        """Return what is going on: `[2/3] 11_expo_headline · cell 4 of 9 · train-ab12cd · SFT · 43
        % · 2 min left`.
        """
        parts = [self.title, self.cell]
        for key, (began, what, fraction, eta) in list(self.running.items())[-1:]:
            parts += [
                key[:-10] if key[-17:-16] == "-" else key,
                "" if key.startswith(what) else what,
            ]
            parts += ["" if fraction is None else f"{100 * fraction:.0f} %"]
            if eta is None:
                parts.append(f"for {events.duration(time.monotonic() - began)}")
            else:
                parts.append(f"{events.duration(eta)} left")
        return " · ".join(part for part in parts if part)

    def _follow(self) -> None:
        import psutil

        while not self._stop.wait(0.5):
            memory = 0
            with contextlib.suppress(psutil.Error):
                for process in psutil.Process().children(recursive=True):
                    with contextlib.suppress(psutil.Error):
                        memory += process.memory_info().rss
            self.peak = max(self.peak, memory)
            self._read()
            line, now = self.line(), time.monotonic()
            if sys.stderr.isatty():
                events.say(f"\r{line[: shutil.get_terminal_size().columns - 1]}\x1b[K", end="")
            elif now - self._printed[0] >= 10 and line != self._printed[1]:
                events.say(line)
                self._printed = (now, line)

    def _read(self) -> None:
        """Take in what has been reported since the last time, whole lines only; none of it can end
        the run.
        """
        if self.reports is None:
            return
        try:
            with open(self.reports, "rb") as file:
                file.seek(self._offset)
                lines = [
                    line for line in file.read().splitlines(keepends=True) if line.endswith(b"\n")
                ]
        except OSError:
            return
        self._offset += sum(map(len, lines))
        for line in lines:
            if told := _report(line):
                self._take(told)

    def _take(self, told: dict) -> None:
        key = told.get("key") or next(reversed(self.running), told.get("stage") or "working")
        began = self.running.pop(key, (time.monotonic(),))[0]
        if told["event"] == "done":
            self.computed.add(key)
        elif told["event"] == "hit":
            self.found.add(key)
        elif told.get("fraction") != 1 or key != told.get(
            "stage"
        ):  # a job outside of any artifact ends at 1
            self.running[key] = (
                began,
                told.get("stage") or "",
                told.get("fraction"),
                told.get("eta"),
            )


def _report(line: bytes) -> dict | None:
    """Return a report, None for a damaged one: half a line on a full disk, or two in one."""
    try:
        told = json.loads(line)
    except ValueError:
        return None
    if not isinstance(told, dict) or not isinstance(told.get("event"), str):
        return None
    words = all(isinstance(told.get(name), str | None) for name in ("stage", "key"))
    numbers = [told[name] for name in ("fraction", "eta") if told.get(name) is not None]
    fine = all(type(number) in (int, float) and math.isfinite(number) for number in numbers)
    return told if words and fine else None
