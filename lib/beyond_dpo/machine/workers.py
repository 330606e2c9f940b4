"""The processes that live as long as the kernel or the runner that started them.

Those sample, one scores, and one does jobs in turn.
"""

import atexit
import json
import os
from pathlib import Path

from beyond_dpo.files import write_file
from beyond_dpo.machine import launch, paths

living: dict[str, launch.Worker] = {}


def close() -> None:
    """End the living engines (also done when the kernel ends)."""
    while living:
        living.popitem()[1].close()


def memory_gib() -> float:
    """Return this machine's memory in GiB."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def make_room(cfg, *needed: str) -> None:
    """End the living processes that are not needed next, unless there is room for all.

    They would hold gigabytes.
    """
    unknown = not cfg.needs.memory_gb  # of a target of one's own
    if unknown or cfg.needs.gpus or memory_gib() < 2 * cfg.needs.memory_gb:
        for name in list(living):
            if name.rstrip("0123456789") not in needed:
                living.pop(name).close()


def run(
    module: str, job: dict, out: Path, desc: str, *, launcher: str = "plain", processes: int = 1
) -> None:
    """Run a job to its end.

    It gets a process of its own from its launcher; jobs without one share a living process.
    """
    folder = out / "checkpoints"
    if launcher != "plain" or processes > 1:
        return launch.run(module, job, folder, desc=desc, launcher=launcher, processes=processes)
    write_file(folder / "config.json", json.dumps(job, indent=1))
    worker = get("jobs", "beyond_dpo.machine.launch", {})
    try:
        worker.desc = desc
        worker.call("run", module=module, path=str(folder / "config.json"))
    except launch.JobFailed:  # what a failed job leaves in memory is nobody's
        living.pop("jobs").close()
        raise


def get(name: str, module: str, settings: dict, environment: dict | None = None) -> launch.Worker:
    """Return the living worker of this name, a new one if there is none or it was built otherwise.

    environment: variables that only it gets.
    """
    worker = living.get(name)
    if worker is None or worker.settings != settings or worker.child.poll() is not None:
        if worker is not None:
            worker.close()
        worker = living[name] = launch.Worker(
            module, settings, paths.ARTIFACTS / "logs", desc=name, environment=environment
        )
    return worker


atexit.register(close)
