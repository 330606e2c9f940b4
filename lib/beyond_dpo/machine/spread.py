"""Sampling and scoring by several processes, each of which makes its shards: on this machine, or on
all nodes.

`python -m beyond_dpo.machine.spread JOB.json` is such a process, under any launcher and on any
number of nodes that
share the folder: it builds the engine or scorer of the job and makes its calls for the shards rank,
rank + world, …
"""

import argparse
import importlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from beyond_dpo.machine import cluster, launch, shards, workers


def devices(place: int, each: int = 1) -> dict[str, str]:
    """Return the environment in which the process at `place` (0, 1, …) of a machine sees `each`
    devices alone.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(64)))
    return {"CUDA_VISIBLE_DEVICES": ",".join(visible.split(",")[place * each : (place + 1) * each])}


def call(
    cfg, name: str, served: str, settings: dict, calls: list[tuple[str, dict]], out: Path, desc: str
) -> list:
    """Make calls, [(method, arguments), …], on living processes of this machine, or in a job on all
    nodes.

    name: of the living process; served: "module.Class" that it serves. Calls with an `out` are
    shared by cfg.decoding.engines processes; who asks several must finish() then. Returns what the
    first process answered, for each call ([] for a job).
    """
    (module, _, kind), how = served.rpartition("."), cfg.decoding
    if how.launcher:
        job = {
            "module": module,
            "name": kind,
            "settings": settings,
            "calls": calls,
            "devices": how.tensor_parallel,
        }
        workers.run(
            "beyond_dpo.machine.spread",
            job,
            out,
            desc,
            launcher=how.launcher,
            processes=how.engines,
        )
        return []
    many = range(how.engines)
    held = [workers.get(f"{name}{i or ''}", module, settings, _place(cfg, i)) for i in many]

    def ask(rank: int) -> list:
        share = {"rank": rank, "world": len(many)} if len(many) > 1 else {}
        return [
            held[rank].call(method, **given, **(share if "out" in given else {}))
            for method, given in calls
        ]

    if len(many) == 1:
        return ask(0)
    with ThreadPoolExecutor(len(many)) as pool:
        asked = [pool.submit(ask, rank) for rank in many]
        try:
            return [one.result() for one in asked][0]
        except (
            BaseException
        ):  # an interrupt, or one of them failed: the others' calls end with their processes
            for worker in held:
                worker.close()
            raise


def _place(cfg, place: int) -> dict[str, str]:
    """Return the environment of one of several engines: its devices, and its part of the
    processor's threads.
    """
    if cfg.decoding.engines == 1:
        return {}
    threads = max(1, launch.threads() // cfg.decoding.engines)
    return devices(place, cfg.decoding.tensor_parallel) | {"OMP_NUM_THREADS": str(threads)}


def finish(cfg, given: dict, answers: list) -> dict:
    """Return how many responses and tokens were generated; what several processes made is merged.

    given: the arguments of `generate`, answers: what call() returned for it and the calls before.
    """
    if answers and cfg.decoding.engines == 1:
        return answers[-1]
    prompts = len(json.loads(Path(given["prompts"]).read_text(encoding="utf-8")))
    return shards.counted(
        shards.merge(given["out"], shards.parts(given["out"], prompts, cfg.decoding.shard))
    )


def main(path: str) -> None:
    """Do this process's share of a job file: module and name of a class, settings to build it,
    calls [method, {…}].
    """
    if "RANK" not in os.environ:  # started by srun, or alone
        os.environ |= cluster.rank(0)
    job = json.loads(Path(path).read_text(encoding="utf-8"))
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None or len(visible.split(",")) > job["devices"]:  # else the launcher chose them
        os.environ |= devices(int(os.environ["LOCAL_RANK"]), job["devices"])
    for name in [
        name
        for name in os.environ
        if name.startswith(("TORCHELASTIC_", "MASTER_", "LOCAL_", "WORLD_"))
    ]:
        del os.environ[name]  # this process is alone: vLLM would wait for the launcher's other ones
    served = getattr(importlib.import_module(job["module"]), job["name"])(**job["settings"])
    for method, arguments in job["calls"]:
        share = {"rank": rank, "world": world} if "out" in arguments else {}
        getattr(served, method)(**arguments, **share)


def _job() -> str:
    """Return the job file that the command line names; --help says what this is and ends here."""
    parser = argparse.ArgumentParser(
        prog="python -m beyond_dpo.machine.spread", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "job",
        metavar="JOB.json",
        help="as a stage writes it; a launcher gives each process its share",
    )
    return parser.parse_args().job


if __name__ == "__main__":
    asked = _job()
    launch.follow_parent()
    main(asked)
