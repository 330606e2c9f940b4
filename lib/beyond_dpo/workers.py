"""The processes that live as long as the kernel: those that sample, one that scores, one that does jobs in turn."""

import atexit
import json
import os
import shutil
from contextlib import suppress
from pathlib import Path

from beyond_dpo import config, launch, paths

living: dict[str, launch.Worker] = {}


def close() -> None:
    """End the living engines (also done when the kernel ends)."""
    while living:
        living.popitem()[1].close()


def memory_gib() -> float:
    """Return this machine's memory in GiB."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def check_machine(cfg) -> None:
    """Raise ConfigError, with what is missing and what to do, if this machine cannot run the profile."""
    needs, gib = cfg.needs, memory_gib()
    gpus = len(list(Path("/proc/driver/nvidia/gpus").glob("*"))) or len(list(Path("/dev").glob("nvidia[0-9]*")))
    missing = [f"{needs.gpus} GPUs of {needs.gpu_gb} GB (found {gpus})"] if gpus < needs.gpus else []
    free = shutil.disk_usage(next(p for p in (paths.ARTIFACTS, *paths.ARTIFACTS.parents) if p.exists())).free / 1e9
    for path in paths.ARTIFACTS.glob("*/manifest.json"):  # what is finished needs no room any more
        with suppress(OSError, ValueError, LookupError):  # being made, or damaged: found when it is read
            free += sum(file["bytes"] for file in json.loads(path.read_text())["files"].values()) / 1e9
    room = f"{needs.disk_gb} GB of disk for {paths.ARTIFACTS} (free or held by results: {free:.0f})"
    missing += [room] if free < needs.disk_gb else []
    missing += [f"{needs.memory_gb} GB of memory (found {gib:.0f})"] if gib < 0.9 * needs.memory_gb else []
    if missing:
        raise config.ConfigError(
            f"profile {cfg.profile} needs {' and '.join(missing)}. What a machine that has them would execute: "
            f"--dry-run. What may run here: --profile {'cpu' if gib > 9 and cfg.profile != 'cpu' else 'smoke'}"
        )


def make_room(cfg, *needed: str) -> None:
    """End the living processes that are not needed next and would hold gigabytes, unless there is room for both."""
    if cfg.needs.gpus or memory_gib() < 2 * cfg.needs.memory_gb:
        for name in living.keys() - set(needed):
            living.pop(name).close()


def run(module: str, job: dict, out: Path, desc: str, *, launcher: str = "plain", processes: int = 1) -> None:
    """Run a job to its end, in a process of its own, or in the one that does all those that no launcher starts."""
    folder = out / "checkpoints"
    if launcher != "plain" or processes > 1:
        return launch.run(module, job, folder, desc=desc, launcher=launcher, processes=processes)
    paths.write(folder / "config.json", json.dumps(job, indent=1))
    worker = get("jobs", "beyond_dpo.launch", {})
    try:
        worker.desc = desc
        worker.call("run", module=module, path=str(folder / "config.json"))
    except launch.JobFailed:  # what a failed job leaves in memory is nobody's
        living.pop("jobs").close()
        raise


def get(name: str, module: str, settings: dict) -> launch.Worker:
    """Return the living worker of this name, a new one if there is none or it was built otherwise."""
    worker = living.get(name)
    if worker is None or worker.settings != settings or worker.child.poll() is not None:
        if worker is not None:
            worker.close()
        worker = living[name] = launch.Worker(module, settings, paths.ARTIFACTS / "logs", desc=name)
    return worker


atexit.register(close)
