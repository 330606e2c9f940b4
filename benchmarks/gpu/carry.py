"""Pack what a GPU machine without a network lacks, into .gpu/ (run this where there is one).

    python benchmarks/gpu/carry.py            # wheels for Python 3.12, Linux x86-64
    python benchmarks/gpu/carry.py --check    # and run all steps on tiny models with nothing else
    python benchmarks/gpu/carry.py --assets   # besides what the step `world` reads, in parts

present.txt lists what the machine has. Versions are those of requirements/cpu.txt.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CARRIED = ROOT / ".gpu"
WHEELS = CARRIED / "wheels"
ASSETS = CARRIED / "assets"
LARGEST = 45 * 2**20  # bytes of all wheels
PART = 40 * 2**20  # bytes of a part of an archive, at most
# What is locked, and not there. typing_extensions may be there in an older version than pydantic
# takes.
LOCKED = (
    "annotated-types",
    "datasets",
    "dill",
    "gguf",
    "hjson",
    "multiprocess",
    "peft",
    "pydantic",
    "pydantic_core",
    "typing_extensions",
    "typing-inspection",
    "vaderSentiment",
)
# What we are compared with.
OTHERS = ("trl==1.16.0", "liger_kernel==0.8.5")
PLATFORMS = (
    "manylinux_2_28_x86_64",
    "manylinux_2_17_x86_64",
    "manylinux2014_x86_64",
    "manylinux1_x86_64",
)
# Not taken from the wheels in a check: one is of another Python, and DeepSpeed without its compiled
# collectives compiles them at its first start on a CPU.
OWN = ("multiprocess-*-py312-none-any.whl", "deepspeed-*.whl")
PIP = [sys.executable, "-m", "pip"]
# Imported by every Python of a check, before anything else: of what is installed here, it finds
# nothing but the packages that are allowed.
GUARD = """
import json, os
from importlib.machinery import PathFinder

ALLOWED = set(json.loads(os.environ["GPU_CHECK_ALLOWED"]))
find = PathFinder.find_spec

def find_spec(name, path=None, target=None):
    spec = find(name, path, target)
    if path is not None or spec is None or name in ALLOWED:
        return spec
    places = [spec.origin or "", *(spec.submodule_search_locations or [])]
    installed = [place for place in places if "site-packages" in place]
    own = [place for place in installed if "_vendor" not in place]  # else it is part of another
    return None if own else spec

PathFinder.find_spec = find_spec
"""


def canonical(name: str) -> str:
    """Return a package's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def locked() -> dict[str, str]:
    """Return {name: requirement} of requirements/cpu.txt."""
    text = (ROOT / "requirements" / "cpu.txt").read_text(encoding="utf-8")
    lines = [line.split("#")[0].strip() for line in text.splitlines()]
    return {canonical(line.partition("==")[0]): line for line in lines if "==" in line}


def download(requirements: list[str]) -> None:
    """Put wheels for the machine into WHEELS, without what they need in turn."""
    command = [*PIP, "download", "-q", "--no-deps", "--only-binary=:all:", "-d", str(WHEELS)]
    command += ["--python-version", "3.12", "--implementation", "cp"]
    for platform in PLATFORMS:
        command += ["--platform", platform]
    subprocess.run([*command, *requirements], check=True)


def build_deepspeed(requirement: str) -> None:
    """Put a wheel of DeepSpeed into WHEELS that holds nothing compiled, and so fits any Python.

    Raises ValueError if one is compiled all the same.
    """
    command = [*PIP, "wheel", "-q", "--no-cache-dir", "--no-deps", "--no-build-isolation"]
    environment = {**os.environ, "DS_BUILD_OPS": "0"}
    environment.pop("DS_BUILD_SHM_COMM", None)
    subprocess.run([*command, "-w", str(WHEELS), requirement], check=True, env=environment)
    (wheel,) = WHEELS.glob("deepspeed-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        compiled = [name for name in archive.namelist() if name.endswith(".so")]
    if compiled or not wheel.name.endswith("-py3-none-any.whl"):
        raise ValueError(f"{wheel.name} is compiled: {compiled}")


def require_small(folder: Path, largest: int) -> int:
    """Return the bytes of a folder's files; raise ValueError if they are too many to carry."""
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    if size > largest:
        raise ValueError(f"{folder} has {size:,} bytes, more than {largest:,}")
    return size


def carry_wheels() -> None:
    """Fill WHEELS anew, and say of which commit."""
    shutil.rmtree(WHEELS, ignore_errors=True)
    WHEELS.mkdir(parents=True)
    pins = locked()
    download([*(pins[canonical(name)] for name in LOCKED), *OTHERS])
    build_deepspeed(pins["deepspeed"])
    head = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    commit = subprocess.run(head, capture_output=True, text=True).stdout.strip()
    (CARRIED / "commit").write_text(commit + "\n")
    size = require_small(WHEELS, LARGEST)
    for wheel in sorted(WHEELS.glob("*.whl")):
        print(f"{wheel.stat().st_size:12,}  {wheel.name}")
    print(f"{size:12,}  bytes in all ({LARGEST:,} allowed): {WHEELS}")


# ---- models and texts


def carry_assets() -> None:
    """Fill ASSETS anew with the archives of models, in parts, and with the texts, split already.

    The reviews stay here: what the step reads of them is in the texts.
    """
    from beyond_dpo.pipeline import assets, config, stages

    shutil.rmtree(ASSETS, ignore_errors=True)
    ASSETS.mkdir(parents=True)
    world = config.load("expo", "gpu").world
    texts = stages.texts(world).get()
    with tarfile.open(ASSETS / "texts.tar.gz", "w:gz") as archive:
        archive.add(texts, texts.name)
    for path in assets.fetch_all([world.target, world.reward_model]):
        split(path)
    for part in sorted(ASSETS.iterdir()):
        digest = hashlib.sha256(part.read_bytes()).hexdigest()
        print(f"{part.stat().st_size:12,}  {part.name}  sha256 {digest}")


def split(path: Path) -> None:
    """Write an archive's parts, of nearly one size, as NAME.part00 and so on."""
    content = path.read_bytes()
    count = -(-len(content) // PART)
    size = -(-len(content) // count)
    for number in range(count):
        part = content[number * size : (number + 1) * size]
        (ASSETS / f"{path.name}.part{number:02}").write_bytes(part)


# ---- whether that is all


def allowed_modules() -> set[str]:
    """Return the top-level modules of what the machine has and of what is carried.

    What a package that is there needs in turn is there too, also what a newer version of it, as
    this environment may have, needs besides.
    """
    text = (HERE / "present.txt").read_text(encoding="utf-8")
    present = {canonical(line) for line in text.splitlines() if line and not line.startswith("#")}
    names = needed_by(present)
    names |= {canonical(wheel.name.partition("-")[0]) for wheel in WHEELS.glob("*.whl")}
    owned = importlib.metadata.packages_distributions()
    return {module for module, owners in owned.items() if names & set(map(canonical, owners))}


def needed_by(names: set[str]) -> set[str]:
    """Return packages and all that they need, as far as they are installed here."""
    found = set()
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found.add(name)
        try:
            requirements = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        for requirement in requirements:
            if "extra ==" not in requirement:
                needed = re.match(r"[\w.-]+", requirement)
                waiting.append(canonical(needed[0]))
    return found


def check(options: list[str]) -> int:
    """Run all steps on tiny models where nothing else can be imported; return the exit status.

    Wheels of pure Python are those that are carried. Compiled ones, and those of OWN, are this
    environment's own.
    """
    with tempfile.TemporaryDirectory() as folder:
        guard = Path(folder, "guard")
        guard.mkdir()
        (guard / "sitecustomize.py").write_text(GUARD)
        pure = Path(folder, "pure")
        pure.mkdir()
        for wheel in WHEELS.glob("*-none-any.whl"):
            shutil.copy(wheel, pure)
        for name in OWN:
            for wheel in pure.glob(name):
                wheel.unlink()
        environment = {
            **os.environ,
            "PYTHONPATH": str(guard),
            "GPU_CHECK_ALLOWED": json.dumps(sorted(allowed_modules())),
            "OMP_NUM_THREADS": "1",
        }
        out = Path(folder, "out")
        command = [sys.executable, str(HERE / "run.py"), "--out", str(out), "--tiny"]
        command += ["--wheels", str(pure), "--rounds", "1", *options]
        status = subprocess.run(command, env=environment).returncode
        log = out / "log.txt"
        if status and log.exists():
            print(log.read_text()[-6000:])
    return status


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--assets", action="store_true", help="models and texts, too")
    parser.add_argument("--check", action="store_true", help="run the steps with nothing else")
    parser.add_argument("--steps", help="of the check, see run.py")
    options = parser.parse_args()
    carry_wheels()
    if options.assets:
        carry_assets()
    if not options.check:
        return 0
    return check(["--steps", options.steps] if options.steps else [])


if __name__ == "__main__":
    sys.exit(main())
