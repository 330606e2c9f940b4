"""Compare what a profile states that it needs (GPUs, memory, disk) with this machine."""

import json
import shutil
from contextlib import suppress

from beyond_dpo import precision
from beyond_dpo.machine import cluster, paths, workers
from beyond_dpo.pipeline import artifacts, config


def check(cfg) -> None:
    """Raise ConfigError, with the numbers and what to do, if this machine lacks what `cfg`
    needs.
    """
    missing = lacking(cfg)
    if not missing:
        return
    fits = "cpu" if workers.memory_gib() > 9 and cfg.profile != "cpu" else "smoke"
    raise config.ConfigError(
        f"profile {cfg.profile} needs {' and '.join(missing)}. What a machine that has them would "
        f"execute: --dry-run. What may run here: --profile {fits}"
    )


def lacking(cfg) -> list[str]:
    """Return what this machine lacks of what `cfg` needs, in words; nothing if it has all of it."""
    needs = cfg.needs
    missing = []
    if needs.gpus:
        gpus = cards() * cluster.nodes(cfg.train.launcher)
        if gpus < needs.gpus:
            missing.append(f"{needs.gpus} GPUs of {needs.gpu_gb} GB (found {gpus})")
    elif _asks_for_bf16(cfg) and not cards() and not precision.computes_bf16(precision.CPUINFO):
        missing.append(
            "a GPU, or a CPU with AVX512_BF16 or AMX, for bfloat16 (this one would emulate it; "
            "set the "
            "precisions to fp32 and decoding.dtype to float32, as COMPUTE=cold does)"
        )
    room = free_disk_gb()
    if room < needs.disk_gb:
        where = f"{needs.disk_gb} GB of disk for {paths.ARTIFACTS}"
        missing.append(f"{where} (free or held by results: {room:.0f})")
    memory = workers.memory_gib()
    if memory < 0.9 * needs.memory_gb:
        missing.append(f"{needs.memory_gb} GB of memory (found {memory:.0f})")
    return missing


def _asks_for_bf16(cfg) -> bool:
    precisions = {cfg.sft.precision, cfg.train.precision, cfg.world.precision}
    samplings = [cfg.decoding, getattr(cfg, "sampling", cfg.decoding)]
    return "bf16" in precisions or "bfloat16" in {decoding.dtype for decoding in samplings}


def cards() -> int:
    """Return the number of GPUs of this machine."""
    query = ("--query-gpu=index", "--format=csv,noheader")
    return len(artifacts.output("nvidia-smi", *query))


def free_disk_gb() -> float:
    """Return GB of disk for results: free, or held by those that are finished and need no more."""
    existing = next(p for p in (paths.ARTIFACTS, *paths.ARTIFACTS.parents) if p.exists())
    free = shutil.disk_usage(existing).free
    for path in paths.ARTIFACTS.glob("*/manifest.json"):
        with suppress(OSError, ValueError, LookupError):  # being made, or damaged: found when read
            files = json.loads(path.read_text(encoding="utf-8"))["files"]
            free += sum(file["bytes"] for file in files.values())
    return free / 1e9
