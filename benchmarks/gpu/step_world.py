"""Notebook 11's results on the embedded world at profile `gpu`, sampled by transformers.

The pipeline computes them itself, in the order in which they are made from each other: first those
of one training seed, then of two, and so on to the profile's five. Whatever number of seeds is
finished when time runs out is packed into world.tar.gz, to be unpacked into data/frozen. All that
was made for it stays in `artifacts`, so that a second call on the same machine goes on from there.

Archives and split texts come from .gpu/assets, where carry.py --assets puts them.
"""

from __future__ import annotations

import os
import tarfile
import time
from pathlib import Path

from results import Results, step_arguments

from beyond_dpo import events
from beyond_dpo.machine import paths, workers
from beyond_dpo.pipeline import config, expo

ASSETS = paths.ROOT / ".gpu" / "assets"
TEXTS = "texts.tar.gz"  # finished artifacts, by carry.py --assets
LARGEST = 16 * 2**20  # bytes of world.tar.gz
# Settings of the machine, none of which is in a key: trainings share one process, which starts up
# once, and as they take seconds no checkpoint is written on the way.
MACHINE = {
    "COMPUTE": "cold",
    "BEYOND_DPO_LAUNCHER": "plain",
    "BEYOND_DPO_CHECKPOINT_EVERY": "1000000",
}
# None of these is in a key, either. No engine has to make room for another one on this card.
ROOM = {"needs__gpus": 0, "needs__disk_gb": 20}


def seeds_in_turn(profile: str) -> list[list[int]]:
    """Return the first seed of a profile, the first two, and so on."""
    seeds = list(config.load("expo", profile).seeds)
    return [seeds[: count + 1] for count in range(len(seeds))]


def configured(profile: str, seeds: list[int]):
    """Return the configuration for these seeds."""
    room = ROOM if profile == "gpu" else {}
    return config.load("expo", profile, seeds=seeds, decoding__backend="transformers", **room)


def join_parts(folder: Path, cache: Path) -> list[str]:
    """Put the archives that were carried in parts together in the cache; return their names.

    Each is checked against its pinned sha256 when it is used.
    """
    cache.mkdir(parents=True, exist_ok=True)
    firsts = sorted(folder.glob("*.part00"))
    names = [first.name.removesuffix(".part00") for first in firsts]
    for name in names:  # anew each time: an earlier call may not have had all parts
        partial = cache / f".{name}.partial"
        with open(partial, "wb") as joined:
            for part in sorted(folder.glob(f"{name}.part*")):
                joined.write(part.read_bytes())
        partial.rename(cache / name)
    return names


def unpack_texts(folder: Path) -> None:
    """Put carried artifacts where the pipeline finds them; their hashes are checked on use."""
    packed = folder / TEXTS
    if packed.exists():
        paths.ARTIFACTS.mkdir(parents=True, exist_ok=True)
        with tarfile.open(packed) as archive:
            archive.extractall(paths.ARTIFACTS, filter="data")


def pack(keys: list[str], path: Path) -> int:
    """Pack finished artifacts into one file, which appears whole; return its size in bytes.

    Raises ValueError for more than may be brought back.
    """
    partial = path.with_name(f".{path.name}")
    with tarfile.open(partial, "w:gz") as archive:
        for key in keys:
            archive.add(paths.ARTIFACTS / key, key)
    size = partial.stat().st_size
    if size > LARGEST:
        raise ValueError(f"{keys} are {size:,} bytes, more than {LARGEST:,}")
    partial.rename(path)
    return size


def compute(cfg) -> list[str]:
    """Compute what notebook 11 shows; return the keys that --freeze would copy."""
    results = [expo.curves(cfg), expo.told(cfg)]
    for result in results:
        result.get()
    return [result.key for result in results]


def listener(results: Results):
    """Return a function that keeps what each finished artifact took."""

    def hear(event: str = "", stage: str = "", key: str = "", seconds: float = 0.0, **_) -> None:
        if event == "done":
            results.add({"stage": stage, "key": key, "seconds": seconds})

    return hear


def summarise(content: dict) -> list[str]:
    """Return the seconds of each stage, and which seeds are finished."""
    lines = []
    totals: dict[str, list[float]] = {}
    for row in content["measured"]:
        totals.setdefault(row["stage"], []).append(row["seconds"])
    for stage, seconds in totals.items():
        lines.append(f"{stage}: {len(seconds)} in {sum(seconds):.0f} s")
    return lines


def main() -> None:
    parser = step_arguments(__doc__)
    parser.add_argument("--assets", type=Path, default=ASSETS)
    options = parser.parse_args()
    profile = "smoke" if options.tiny else "gpu"
    results = Results(options.out / "world.json", {"profile": profile}, summarise)
    os.environ |= MACHINE
    if options.tiny:
        paths.ARTIFACTS = options.work / "artifacts"
        os.environ["BEYOND_DPO_ARTIFACTS"] = str(paths.ARTIFACTS)
    join_parts(options.assets, paths.CACHE)
    unpack_texts(options.assets)
    began = time.monotonic()
    with events.listening(listener(results)):
        for seeds in seeds_in_turn(profile):
            keys = compute(configured(profile, seeds))
            size = pack(keys, options.out / "world.tar.gz")
            seconds = time.monotonic() - began
            results.note(f"seeds {seeds}: after {seconds:.0f} s, {size:,} bytes: {', '.join(keys)}")
    workers.close()


if __name__ == "__main__":
    main()
