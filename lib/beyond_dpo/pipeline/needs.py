"""Compare what a profile states that it needs (GPUs, memory, disk) with this machine."""

import json
import shutil
from contextlib import suppress

from beyond_dpo import precision
from beyond_dpo.machine import cluster, paths, workers
from beyond_dpo.pipeline import artifacts, config


def check(cfg) -> None:
    """Raise ConfigError, with numbers and what to do, if this machine lacks what `cfg` needs."""
    missing = lacking(cfg)
    if not missing:
        return
    fits = "smoke"
    if workers.memory_gib() > 9 and cfg.profile != "cpu":
        fits = "cpu"
    needed = " and ".join(missing)
    raise config.ConfigError(
        f"profile {cfg.profile} needs {needed}. What a machine that has them would "
        f"execute: --dry-run. What may run here: --profile {fits}"
    )


def lacking(cfg) -> list[str]:
    """Return what this machine lacks of what `cfg` needs, in words; nothing if it has all of it."""
    missing = []
    if cfg.needs.gpus:
        missing += _missing_gpus(cfg)
    elif _emulates_bf16(cfg):
        missing.append(
            "a GPU, or a CPU with AVX512_BF16 or AMX, for bfloat16 (this one would emulate it; "
            "set the precisions to fp32 and decoding.dtype to float32, as COMPUTE=cold does)"
        )
    disk_gb = free_disk_gb()
    if disk_gb < cfg.needs.disk_gb:
        needed = f"{cfg.needs.disk_gb} GB of disk for {paths.ARTIFACTS}"
        missing.append(f"{needed} (free or held by results: {disk_gb:.0f})")
    memory = workers.memory_gib()
    if memory < 0.9 * cfg.needs.memory_gb:
        missing.append(f"{cfg.needs.memory_gb} GB of memory (found {memory:.0f})")
    return missing


def _missing_gpus(cfg) -> list[str]:
    """Return the GPUs that the nodes of the training lack, in words; nothing if they have them."""
    needs = cfg.needs
    nodes = cluster.nodes(cfg.train.launcher)
    gpus = cards() * nodes
    if gpus >= needs.gpus:
        return []
    return [f"{needs.gpus} GPUs of {needs.gpu_gb} GB (found {gpus})"]


def _emulates_bf16(cfg) -> bool:
    """Return whether `cfg` asks for bfloat16 where nothing computes it."""
    if not _asks_for_bf16(cfg) or cards():
        return False
    return not precision.computes_bf16(precision.CPUINFO)


def _asks_for_bf16(cfg) -> bool:
    precisions = (cfg.sft.precision, cfg.train.precision, cfg.world.precision)
    samplings = (cfg.decoding, getattr(cfg, "sampling", None) or cfg.decoding)
    dtypes = [decoding.dtype for decoding in samplings]
    return "bf16" in precisions or "bfloat16" in dtypes


def cards() -> int:
    """Return the number of GPUs of this machine."""
    gpus = artifacts.output("nvidia-smi", "--query-gpu=index", "--format=csv,noheader")
    return len(gpus)


def free_disk_gb() -> float:
    """Return GB of disk for results: free, or held by those that are finished and need no more."""
    folder = paths.ARTIFACTS
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    for path in paths.ARTIFACTS.glob("*/manifest.json"):
        # One that is being made, or is damaged, is found by whoever reads it.
        with suppress(OSError, ValueError, LookupError):
            manifest = json.loads(path.read_text(encoding="utf-8"))
            sizes = [file["bytes"] for file in manifest["files"].values()]
            free += sum(sizes)
    return free / 1e9
