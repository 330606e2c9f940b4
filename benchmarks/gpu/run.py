"""What a bare GPU machine does in a quarter of an hour: one command, no network.

    python3 benchmarks/gpu/run.py --out RESULTS
    python3 benchmarks/gpu/run.py --out RESULTS --steps train --limit train=400

It installs the carried wheels (carry.py) into a folder of its own and runs the steps one after the
other, each for a limited time: one that takes longer is ended with everything that it started, and
the next one begins. Results are written after each measurement. A short table comes last.

This file itself needs nothing but Python.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CARRIED = ROOT / ".gpu"
WHEELS = CARRIED / "wheels"
COMMIT = CARRIED / "commit"  # which carry.py writes, as .git may not be there
SECONDS = {"environment": 90, "attention": 180, "train": 300, "extrapolate": 120, "world": 480}
STEPS = ("attention", "train", "extrapolate", "world")
INSTALL_SECONDS = 120
MARGIN = 10  # seconds before its limit, at which a step is told to be done
PR_SET_CHILD_SUBREAPER = 36  # of prctl: orphans below this process become its own children


def install(wheels: Path) -> Path | None:
    """Install carried wheels into a folder that their names and sizes name; None without any.

    A folder that is there from an earlier call is taken as it is.
    """
    files = sorted(wheels.glob("*.whl"))
    if not files:
        return None
    text = "\n".join(f"{file.name} {file.stat().st_size}" for file in files)
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    site = Path(tempfile.gettempdir(), f"beyond-dpo-gpu-{digest}")
    if site.is_dir():
        return site
    began = time.monotonic()
    partial = site.with_name(f"{site.name}-{os.getpid()}")
    options = ["--no-index", "--no-deps", "--no-compile", "--no-cache-dir", "--target", partial]
    command = [sys.executable, "-m", "pip", "install", "-q", *options, *files]
    subprocess.run([str(word) for word in command], check=True, timeout=INSTALL_SECONDS)
    os.rename(partial, site)
    print(f"{len(files)} wheels installed in {time.monotonic() - began:.0f} s", flush=True)
    return site


def environment(site: Path | None) -> dict[str, str]:
    """Return the environment of the steps: our code and the carried packages, and no network."""
    search = [str(ROOT / "lib"), str(ROOT / "benchmarks")]
    if site:
        search.append(str(site))
    if os.environ.get("PYTHONPATH"):
        search.append(os.environ["PYTHONPATH"])
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(search),
        "PYTHONUNBUFFERED": "1",
        "PYTHONUTF8": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TQDM_DISABLE": "1",
        # for all sides alike: memory is not lost between blocks of different sizes
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        "NCCL_SOCKET_IFNAME": "lo",  # there may be no other
        # what one process has compiled the next ones need not
        "TORCHINDUCTOR_CACHE_DIR": str(Path(tempfile.gettempdir(), "beyond-dpo-compiled")),
    }


def run_step(name: str, seconds: float, options, site: Path | None) -> dict:
    """Run one step to its end or its limit; return how it ended."""
    work = Path(options.work, name)
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    command = [sys.executable, str(HERE / f"step_{name}.py"), "--out", str(options.out)]
    command += ["--work", str(work), "--seconds", str(max(1.0, seconds - MARGIN))]
    command += ["--tiny"] if options.tiny else []
    if name in ("train", "extrapolate"):
        command += ["--rounds", str(options.rounds)]
    if name == "train":
        command += ["--kinds", options.kinds, "--cases", options.cases]
    if name == "environment" and COMMIT.exists():
        command += ["--commit", COMMIT.read_text().strip()]
    began = time.monotonic()
    with open(options.out / "log.txt", "a", encoding="utf-8") as log:
        log.write(f"\n===== {name}, at most {seconds:.0f} s\n")
        log.flush()
        child = subprocess.Popen(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=environment(site),
            start_new_session=True,
        )
        try:
            status = "ok" if child.wait(seconds) == 0 else f"failed ({child.returncode})"
        except subprocess.TimeoutExpired:
            status = "out of time"
        finally:
            end_all(child)
    shutil.rmtree(work, ignore_errors=True)
    return {"step": name, "status": status, "seconds": round(time.monotonic() - began, 1)}


def end_all(child: subprocess.Popen) -> None:
    """End a step and everything that it started, also in sessions of their own.

    A process that the system cannot end at once is left to it after ten seconds.
    """
    end = time.monotonic() + 10
    while time.monotonic() < end:
        pids = descendants(os.getpid())
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        if not pids:
            break
        time.sleep(0.05)
    child.poll()


def descendants(parent: int) -> list[int]:
    """Return the processes that a process has started, directly or not, but for ended ones."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            _, _, after_name = (folder / "stat").read_text().rpartition(")")
            children.setdefault(int(after_name.split()[1]), []).append(int(folder.name))
    found = []
    waiting = [parent]
    while waiting:
        for pid in children.get(waiting.pop(), []):
            found.append(pid)
            waiting.append(pid)
    return found


def limits(options) -> dict[str, float]:
    """Return the seconds of each step, as the command line changes them."""
    seconds = dict(SECONDS)
    for text in options.limit:
        name, _, value = text.partition("=")
        if name not in seconds:
            raise SystemExit(f"--limit {text}: there are {', '.join(seconds)}")
        seconds[name] = float(value)
    return seconds


def show(options, rows: list[dict]) -> None:
    """Print what each step found, and how it ended."""
    for row in rows:
        file = options.out / f"{row['step']}.json"
        print(f"\n{row['step']}: {row['status']}, {row['seconds']:.0f} s")
        if file.exists():
            for line in json.loads(file.read_text())["summary"]:
                print(f"  {line}")
    print(f"\nresults: {options.out}", flush=True)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--steps", default=",".join(STEPS), help=f"some of {', '.join(STEPS)}")
    parser.add_argument(
        "--limit",
        action="append",
        default=[],
        metavar="STEP=SECONDS",
        help=f"may be repeated; without it {SECONDS}",
    )
    parser.add_argument("--rounds", type=int, default=2, help="as far as there is time")
    parser.add_argument("--kinds", default="", help="of step train: ours, trl and so on; all")
    parser.add_argument("--cases", default="", help="of step train: numbers of some cases; all")
    parser.add_argument("--tiny", action="store_true", help="a rehearsal: numbers mean nothing")
    parser.add_argument("--wheels", type=Path, default=WHEELS, help="folder of carried wheels")
    parser.add_argument("--work", type=Path, help="folder for what is not kept, in .gpu by default")
    options = parser.parse_args()
    options.out = options.out.resolve()
    names = options.steps.split(",")
    unknown = sorted(set(names) - set(STEPS))
    if unknown:
        parser.error(f"--steps {','.join(unknown)}: there are {', '.join(STEPS)}")
    options.steps = names
    return options


def main() -> int:
    """Run what the command line names; return 0 if all of it ended well."""
    options = parsed()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    options.out.mkdir(parents=True, exist_ok=True)
    if options.work is None:
        CARRIED.mkdir(exist_ok=True)  # on the project's disk: the system's own may be memory
        options.work = Path(tempfile.mkdtemp(prefix="work-", dir=CARRIED))
    seconds = limits(options)
    site = install(options.wheels)
    rows = []
    try:
        for name in ("environment", *options.steps):
            rows.append(run_step(name, seconds[name], options, site))
            print(f"{name}: {rows[-1]['status']}", flush=True)
    finally:
        shutil.rmtree(options.work, ignore_errors=True)
        (options.out / "steps.json").write_text(json.dumps(rows, indent=1) + "\n")
    show(options, rows)
    return int(any(row["status"].startswith("failed") for row in rows))


if __name__ == "__main__":
    sys.exit(main())
