"""Sampling and scoring by several processes, each of which makes its shards.

The processes live on this machine, or are a job on all nodes. `python -m beyond_dpo.machine.spread
JOB.json` is a process of such a job, under any launcher and on any number of nodes that share the
folder: it builds the engine or scorer of the job and makes its calls for the shards rank,
rank + world, …
"""

import argparse
import importlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from beyond_dpo.machine import cluster, launch, shards, workers

# Variables of a launcher that make vLLM wait for the launcher's other processes.
LAUNCHER_VARIABLES = ("TORCHELASTIC_", "MASTER_", "LOCAL_", "WORLD_")
ALL_DEVICES = [str(number) for number in range(64)]


def devices(place: int, each: int = 1) -> dict[str, str]:
    """Return the environment in which the process at `place` sees `each` devices alone.

    place: 0, 1, … of a machine.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    numbers = visible.split(",") if visible else ALL_DEVICES
    own = numbers[place * each : (place + 1) * each]
    return {"CUDA_VISIBLE_DEVICES": ",".join(own)}


def call(
    cfg, name: str, served: str, settings: dict, calls: list[tuple[str, dict]], out: Path, desc: str
) -> list:
    """Make calls on living processes of this machine, or in a job on all nodes.

    name: of the living process. served: "module.Class" that it serves. calls: [(method, arguments),
    …]; those with an `out` are shared by cfg.decoding.engines processes, and who asks several must
    finish() then. Returns what the first process answered, for each call ([] for a job).
    """
    decoding = cfg.decoding
    module, _, class_name = served.rpartition(".")
    if decoding.launcher:
        job = {
            "module": module,
            "name": class_name,
            "settings": settings,
            "calls": calls,
            "devices": decoding.tensor_parallel,
        }
        workers.run(
            "beyond_dpo.machine.spread",
            job,
            out,
            desc,
            launcher=decoding.launcher,
            processes=decoding.engines,
        )
        return []
    engines = []
    for place in range(decoding.engines):
        engine_name = f"{name}{place}" if place else name
        environment = _engine_environment(cfg, place)
        engines.append(workers.get(engine_name, module, settings, environment))
    return _answers(engines, calls)


def _answers(engines: list[launch.Worker], calls: list[tuple[str, dict]]) -> list:
    """Make the calls on all engines at once, each for its shards; return the first one's answers.

    An interrupt, or an error of one of them, ends the processes of all, and with them their calls.
    """
    world = len(engines)
    if world == 1:
        return _make_calls(engines[0].call, calls, 0, 1)
    with ThreadPoolExecutor(world) as pool:
        pending = []
        for rank, engine in enumerate(engines):
            pending.append(pool.submit(_make_calls, engine.call, calls, rank, world))
        try:
            answers = [made.result() for made in pending]
        except BaseException:
            for engine in engines:
                engine.close()
            raise
    return answers[0]


def _make_calls(method_call, calls: list, rank: int, world: int) -> list:
    """Make calls by method_call(method, **arguments); those with an `out` get rank and world.

    A process that is alone gets neither of the two.
    """
    answers = []
    for method, arguments in calls:
        if world > 1 and "out" in arguments:
            arguments = arguments | {"rank": rank, "world": world}
        answers.append(method_call(method, **arguments))
    return answers


def _engine_environment(cfg, place: int) -> dict[str, str]:
    """Return the environment of one of several engines: its devices and its part of the threads."""
    engines = cfg.decoding.engines
    if engines == 1:
        return {}
    threads = max(1, launch.threads() // engines)
    environment = devices(place, cfg.decoding.tensor_parallel)
    return environment | {"OMP_NUM_THREADS": str(threads)}


def finish(cfg, arguments: dict, answers: list) -> dict:
    """Return how many responses and tokens were generated; what several processes made is merged.

    arguments: of `generate`. answers: what call() returned for it and the calls before.
    """
    if answers and cfg.decoding.engines == 1:
        return answers[-1]
    prompts = json.loads(Path(arguments["prompts"]).read_text(encoding="utf-8"))
    out = arguments["out"]
    files = shards.parts(out, len(prompts), cfg.decoding.shard)
    return shards.counted(shards.merge(out, files))


def main(path: str) -> None:
    """Do this process's share of a job file.

    It holds the module and name of a class, the settings to build it, and calls [method, {…}].
    """
    if "RANK" not in os.environ:  # started by srun, or alone
        os.environ |= cluster.rank(0)
    job = json.loads(Path(path).read_text(encoding="utf-8"))
    rank = int(os.environ["RANK"])
    world = int(os.environ["WORLD_SIZE"])
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None or len(visible.split(",")) > job["devices"]:  # else the launcher chose them
        os.environ |= devices(int(os.environ["LOCAL_RANK"]), job["devices"])
    for variable in list(os.environ):
        if variable.startswith(LAUNCHER_VARIABLES):
            del os.environ[variable]
    served_class = getattr(importlib.import_module(job["module"]), job["name"])
    served = served_class(**job["settings"])
    for method, arguments in job["calls"]:
        if "out" in arguments:
            arguments = arguments | {"rank": rank, "world": world}
        getattr(served, method)(**arguments)


def _job_file() -> str:
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
    job_file = _job_file()
    launch.follow_parent()
    main(job_file)
