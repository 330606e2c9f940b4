"""What the machine is: its parts, its versions, and the rates that others are compared with."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import time
from importlib import metadata
from pathlib import Path

import torch
from results import Results, step_arguments

from beyond_dpo.pipeline import artifacts

PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "accelerate",
    "tokenizers",
    "safetensors",
    "numpy",
    "pyarrow",
    "pandas",
    "huggingface_hub",
    "datasets",
    "deepspeed",
    "trl",
    "peft",
    "liger_kernel",
    "flash_attn",
    "pydantic",
)
ROUNDS = 20  # products that are timed, after three that are not


def versions() -> dict[str, str]:
    """Return the versions of the packages that decide a speed, of those that are there."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def card() -> dict:
    """Return what the GPU says of itself, {} without one."""
    if not torch.cuda.is_available():
        return {}
    fields = ("name", "driver_version", "memory.total", "power.limit", "clocks.max.sm")
    query = f"--query-gpu={','.join(fields)}"
    (line,) = artifacts.output("nvidia-smi", query, "--format=csv,noheader")[:1] or [""]
    facts = dict(zip(fields, map(str.strip, line.split(",")), strict=False))
    return {
        **facts,
        "name": torch.cuda.get_device_name(0),
        "memory_gib": torch.cuda.get_device_properties(0).total_memory / 2**30,
        "cuda": torch.version.cuda,
        "capability": list(torch.cuda.get_device_capability(0)),
    }


def commit(given: str | None) -> str | None:
    """Return the commit that is measured: what the caller says, or what git does."""
    if given:
        return given
    here = Path(__file__).parent
    git = ["git", "-C", str(here), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(git, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() or None


def file_system(folder: Path) -> str:
    """Return the type of the file system that a folder is on, such as ext4 or tmpfs."""
    types = {}
    for line in Path("/proc/mounts").read_text(encoding="utf-8").splitlines():
        _, mounted, kind, *_ = line.split()
        types[Path(mounted)] = kind
    for place in (folder, *folder.parents):
        if place in types:
            return types[place]
    return "unknown"


def seconds_of(work, device: str) -> float:
    """Return the mean seconds of a piece of work on the device, after it is warm."""
    is_gpu = device == "cuda"
    for _ in range(3):
        work()
    if is_gpu:
        torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(ROUNDS):
        work()
    if is_gpu:
        torch.cuda.synchronize()
    return (time.perf_counter() - began) / ROUNDS


def matmul_rate(size: int) -> float:
    """Return the FLOP/s of a square bf16 product of random matrices (float32 without a GPU)."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    left = torch.randn(size, size, device=device, dtype=dtype)
    right = torch.randn(size, size, device=device, dtype=dtype)
    seconds = seconds_of(lambda: left @ right, device)
    return 2 * size**3 / seconds


def copy_rate(size: int) -> float:
    """Return the bytes/s of a copy within the device's memory, counting those read and written."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    source = torch.randint(0, 100, (size,), device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    seconds = seconds_of(lambda: target.copy_(source), device)
    return 2 * size / seconds


def summarise(content: dict) -> list[str]:
    """Return the machine in two lines."""
    lines = []
    for row in content["measured"]:
        gpu = row["gpu"].get("name", "no GPU")
        packages = ", ".join(f"{name} {version}" for name, version in row["packages"].items())
        lines.append(f"{gpu}, {row['cores']} cores, {row['memory_gib']:.0f} GiB; {packages}")
        matmul = f"{row['matmul_flops'] / 1e12:.3g} TFLOP/s"
        copy = f"{row['copy_bytes_per_s'] / 1e9:.3g} GB/s"
        disk = f"{row['disk_free_gib']:.0f} GiB free on {row['file_system']}"
        lines.append(f"matrix product {matmul}, copy {copy}; {disk}")
    return lines


def main() -> None:
    parser = step_arguments(__doc__)
    parser.add_argument("--commit")
    options = parser.parse_args()
    settings = {"matrix": 256 if options.tiny else 8192}
    results = Results(options.out / "environment.json", settings, summarise)
    machine = artifacts.environment()
    disk = shutil.disk_usage(options.work)
    row = {
        "gpu": card(),
        "cpu": machine["hardware"]["cpu"],
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": machine["hardware"]["memory_gib"],
        "disk_gib": disk.total / 2**30,
        "disk_free_gib": disk.free / 2**30,
        "file_system": file_system(options.work.resolve()),
        "python": platform.python_version(),
        "kernel": platform.release(),
        "packages": versions(),
        "commit": commit(options.commit),
        "matmul_flops": matmul_rate(settings["matrix"]),
        "copy_bytes_per_s": copy_rate(2**20 if options.tiny else 2**32),
    }
    results.add(row)


if __name__ == "__main__":
    main()
