"""The fault suite: kill -9, full disks, damage, two at once, dying engines. Whatever happens, a
rerun ends the same.

`make test` runs a short form; `make faults` breaks every stage of every pipeline, several times
(FAULT_ROUNDS).
"""

import dataclasses
import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress

import nbformat
import psutil
import pytest
import torch
from safetensors.torch import load, load_file, save, save_file

from beyond_dpo.extrapolate import extrapolate
from beyond_dpo.jobs import reference
from beyond_dpo.machine import launch, paths, workers
from beyond_dpo.pipeline import assets, config, stages
from fault_pipeline import results
from faults import (
    ROUNDS,
    SCRIPT,
    SEED,
    Endpoint,
    Store,
    damage,
    descendants,
    disk,
    filled,
    long_form,
    stop,
    wait_for,
)

PARTS = ["expo", "served", *["mallows", "wrpo"] * bool(ROUNDS)]
MODES = ["everything killed", "child killed", "disk full", "kernel killed"]
WORKS_BELOW = (
    "train",
    "reward-gold",
    "reward-reward",
    "reference",
    "responses",
    "scores",
)  # in a child process


@pytest.fixture
def fault(record_property):
    """Return a context that counts a fault as tried when it begins and as survived when nothing in
    it failed.
    """

    @contextmanager
    def one(what: str):
        record_property("fault tried", what)
        yield
        record_property("fault survived", what)

    return one


@pytest.fixture(scope="module")
def endpoint():
    server = Endpoint()
    yield server
    server.shutdown()


@pytest.fixture(scope="module")
def store(endpoint, tmp_path_factory):
    """Return a maker of empty stores."""
    made = []

    def new(folder=None) -> Store:
        asked = {"FAULT_ENDPOINT": endpoint.url, "OPENAI_API_KEY": "sk-x"}
        made.append(Store(folder or tmp_path_factory.mktemp("store"), **asked))
        return made[-1]

    yield new
    for one in made:
        one.kill()


@pytest.fixture(scope="module")
def whole(store):
    """Return a store that nothing disturbed, and the stages in the order in which they begin."""
    here = store()
    assert here.start(SCRIPT, *PARTS).wait(900) == 0, here.said()
    return here, list(
        dict.fromkeys(told["stage"] for told in here.events() if told["event"] == "start")
    )


def two_at_once(here: Store) -> None:
    """Run the pipeline in two processes; each result is computed by one of them, and both have
    all.
    """
    here.events()
    pair = [here.start(SCRIPT, *PARTS, errors=f"errors of {i}") for i in range(2)]
    codes = [child.wait(900) for child in pair]
    assert codes == [0, 0], "".join((here.folder / f"errors of {i}").read_text() for i in range(2))
    done = [told["key"] for told in here.events() if told["event"] == "done"]
    assert len(done) == len(set(done)), done
    assert here.alone()


def strike(here: Store, child, mode: str, moment: float, rng) -> bool | None:
    """Break a running pipeline; return whether it lives on. If not, none of its processes is left.

    None: nothing was hit, as it had just ended, or the stage has no child.
    """
    if mode == "disk full":
        with filled(here.artifacts):
            child.wait(120)
        assert here.alone()
        if child.returncode == 0:  # the last stage had just been written
            return None
        assert "No space left on device" in here.said(), here.said()
        return False
    time.sleep(moment)
    if mode == "child killed":
        below = descendants(child.pid)
        if not below:
            return None
        rng.choice(below).kill()
        return True
    if child.poll() is not None:
        return None
    here.kill() if mode == "everything killed" else stop(child)
    child.wait(10)
    assert here.alone(), f"left over: {here.processes()}"
    return False


@pytest.mark.parametrize("attempt", range(ROUNDS or 1))
def test_whatever_stage_is_broken_a_rerun_ends_the_same(
    whole, store, endpoint, fault, record_property, monkeypatch, attempt
):
    """Kill all processes, the kernel or a child, fill the disk, damage what is finished: at a
    random moment of each stage, and let two processes do the rest. What was finished stays (or is
    computed again, if it was damaged), and all ends in the same bytes.
    """
    rng, (calm, stages), here, lost = random.Random(f"{SEED} {attempt}"), whole, store(), 0
    seconds = {
        one["stage"]: one["seconds"] for one in map(json.loads, reversed(calm.published().values()))
    }
    asked, struck, again = endpoint.asked.total(), 0, 0
    monkeypatch.setenv("FAULT_ENDPOINT", endpoint.url)  # a key does not depend on it
    looked_at = {
        key for part in PARTS for last in results(part) for key in last.upstream
    }  # at each run
    picked = (
        stages
        if ROUNDS
        else [stage for stage in stages if stage in ("train", "responses", "answers")]
    )
    with disk(here.artifacts, 64):
        child, kept = None, {}

        def lost_since() -> int:
            now = here.published()
            return sum(now.get(key) != manifest for key, manifest in kept.items())

        for i, stage in enumerate(picked):
            mode = MODES[(i + attempt) % 4]
            mode = "kernel killed" if mode == "child killed" and stage not in WORKS_BELOW else mode
            if child is None and kept.keys() & looked_at:
                broken = rng.choice(sorted(kept.keys() & looked_at))
                del kept[broken]
                again += broken.startswith("answers")
                with fault("finished result damaged"):
                    damage(here.artifacts / broken, rng)
                    child = here.start(SCRIPT, *PARTS)
                    wait_for(
                        lambda key=broken: (
                            f"{key}/" in here.said() and "to be computed again" in here.said()
                        ),
                        300,
                    )
            child = child or here.start(SCRIPT, *PARTS)
            if here.reaches(stage, child):
                goes_on = strike(here, child, mode, rng.uniform(0, min(10, seconds[stage])), rng)
                if goes_on is None:  # it had ended meanwhile, or had no child: nothing was hit
                    continue
                with fault(f"{mode}: {stage}"):
                    struck += 1
                    if not goes_on:
                        lost, kept, child = lost + lost_since(), here.published(), None
        if child:
            assert child.wait(600) == 0, here.said()
        else:
            with fault("two runs at once"):
                two_at_once(here)
        lost += lost_since()
        found = here.contents()
    record_property("results lost", lost)
    assert lost == 0
    assert endpoint.asked.total() - asked <= len(endpoint.asked) * (1 + again) + 8 * struck, (
        "more than 8 replies lost"
    )
    assert found.keys() == calm.contents().keys()
    assert found == calm.contents()


def test_a_reference_file_has_the_same_bytes_each_time():
    """safetensors writes metadata in another order each time, so that a rerun ended in another
    hash.
    """
    about, tensors = {name: name for name in ("ids", "names", "dropped")}, {"logps": torch.ones(2)}
    written = [save(tensors, metadata=about) for _ in range(50)]
    assert len(set(written)) > 1 == len(set(map(reference._sorted, written)))
    assert torch.equal(load(reference._sorted(written[0]))["logps"], tensors["logps"])


def test_a_reply_that_a_full_disk_cut_off_is_asked_for_again(
    endpoint, tmp_path, monkeypatch, fault
):
    """Also where another reply was written behind the half of it."""
    from beyond_dpo.pipeline import endpoint as client

    monkeypatch.setenv("OPENAI_API_KEY", "sk-x")
    kept = tmp_path / "replies.jsonl"
    kept.write_text('["a", "kept", []]\n["b", "ha["c", "kept", []]\n["d", "half')
    requests = {i: {"messages": [{"role": "user", "content": f"cut off: {i}"}]} for i in "abcd"}

    def read(reply) -> str:
        return reply.choices[0].message.content

    with fault("reply cut off"):
        found, _ = client.ask(client.Endpoint("served", endpoint.url), requests, kept, read)
        assert found["a"] == "kept" and all(len(found[i]) == 64 for i in "bcd")
        assert endpoint.asked["cut off: a"] == 0
        assert client.ask(client.Endpoint("served", endpoint.url), requests, kept, read)[0] == found


# ---- launchers and engines that die


def victims(words: str) -> list[psutil.Process]:
    """Return the processes that this test started whose command line holds `words`."""
    return [one for one in descendants(os.getpid()) if words in " ".join(cmdline(one))]


def cmdline(process: psutil.Process) -> list[str]:
    with suppress(psutil.Error):
        return process.cmdline()
    return []


@pytest.fixture
def texts(whole, tmp_path, monkeypatch):
    """Let stages work in this process on a store that holds the texts alone; return their
    artifact.
    """
    made = stages.texts(config.load("expo", "smoke").world)
    shutil.copytree(whole[0].artifacts / made.key, tmp_path / "artifacts" / made.key)
    monkeypatch.setattr(paths, "ARTIFACTS", tmp_path / "artifacts")
    yield made
    workers.close()


DYING = {
    "launcher": ("deepspeed.launcher.launch", 1),
    "runner": ("deepspeed.launcher.runner", 1),
    "rank": ("-m beyond_dpo.jobs.train", 2),
}


@pytest.mark.parametrize("who", list(DYING) if ROUNDS else ["launcher"])
def test_half_a_model_of_a_killed_attempt_is_not_taken_for_the_result(whole, texts, fault, who):
    """DeepSpeed's launcher ends with 0 when a signal ended what it started: what was there before
    is no model.
    """
    words, processes = DYING[who]
    changes = {
        "launcher": "deepspeed",
        "checkpoint_every": 1,
        "processes": processes,
        "micro_batch": 8 // processes,
    }
    cfg = config.load("expo", "smoke", **{f"sft__{name}": value for name, value in changes.items()})
    artifact = stages.training(cfg, cfg.sft, texts, "sft.jsonl", ["chosen"], seed=0, desc="SFT")
    finished, partial = (
        whole[0].artifacts / artifact.key,
        paths.ARTIFACTS / f"{artifact.key}.partial",
    )
    partial.mkdir()
    for name in ("log.jsonl", "facts.json"):
        shutil.copy(finished / name, partial)
    (partial / "model.safetensors").write_bytes(
        (finished / "model.safetensors").read_bytes()[:100_000]
    )

    def kill():
        wait_for(lambda: victims(words))[0].kill()

    killer = threading.Thread(target=kill)
    with fault(f"deepspeed's {who} killed"):
        killer.start()
        with pytest.raises(launch.JobFailed, match=r"SFT: .*(ended with|without a model)"):
            artifact.get()
        killer.join()
        wait_for(lambda: not victims("beyond_dpo.jobs.train"), 10)
        assert not (paths.ARTIFACTS / artifact.key).exists()
    if ROUNDS:
        there, here = (
            load_file(folder / "model.safetensors") for folder in (finished, artifact.get())
        )
        near = 0 if processes == 1 else 0.01  # two processes round otherwise
        assert all(torch.allclose(there[name], here[name], rtol=0, atol=near) for name in there)


@long_form
@pytest.mark.parametrize("backend", ["transformers", "vllm"])
def test_an_engine_killed_while_it_answers_is_followed_by_another(
    tiny, tmp_path, monkeypatch, fault, backend
):
    """The caller gets the end of the log, no process stays, and the next call has an engine that
    says the same.
    """
    monkeypatch.setattr(paths, "ARTIFACTS", tmp_path)
    decoding = {**dataclasses.asdict(config.load("expo", "smoke").decoding), "backend": backend}
    (tmp_path / "prompts.json").write_text(
        json.dumps([{"id": str(i), "prompt_ids": [0, 70 + i]} for i in range(400)])
    )
    asked = {"prompts": str(tmp_path / "prompts.json"), "samples": 2, "seed": 0}

    def say(out: str) -> bytes:
        engine = workers.get(
            "generate", "beyond_dpo.jobs.generate", {"model": str(tiny), "decoding": decoding}
        )
        engine.call("generate", out=str(tmp_path / out), **asked)
        return (tmp_path / out).read_bytes()

    calm = say("calm")
    timer = threading.Timer(0.3, workers.living["generate"].child.kill)
    with fault(f"engine killed: {backend}"):
        timer.start()
        with pytest.raises(
            launch.JobFailed, match=r"(?s)the worker died with status -9.*generate-\d+\.log says"
        ):
            say("killed")
        assert not victims("beyond_dpo.jobs.generate")
        assert say("after") == calm
    workers.close()


# ---- small disks


def test_no_room_for_a_converted_model(tmp_path, monkeypatch, fault):
    """Nothing stays in the cache, also not of a killed process; with room it is built, the same as
    elsewhere.
    """
    calm = assets.model_dir("tiny")
    monkeypatch.setattr(paths, "CACHE", tmp_path / "cache")
    with disk(paths.CACHE, 4), fault("disk full: cache"):
        (paths.CACHE / f".{calm.name}-left").mkdir()
        with filled(paths.CACHE), pytest.raises(Exception, match="No space left on device"):
            assets.model_dir("tiny")
        assert not [path for path in paths.CACHE.iterdir() if path.is_dir()]
        assert (assets.model_dir("tiny") / ".sha256.json").read_bytes() == (
            calm / ".sha256.json"
        ).read_bytes()


def test_no_room_for_an_extrapolated_model(whole, tmp_path, fault):
    """The error names the disk and nothing stays; with room the same call works."""
    models = sorted(
        folder for folder in whole[0].artifacts.glob("train-*") if folder.suffix != ".lock"
    )[:2]
    with disk(tmp_path / "disk", 4), fault("disk full: extrapolation"):
        outputs = {0.5: tmp_path / "disk" / "a", 1.0: tmp_path / "disk" / "b"}
        with filled(tmp_path / "disk"), pytest.raises(OSError, match="No space left on device"):
            extrapolate(*models, outputs)
        assert not list((tmp_path / "disk").iterdir())
        extrapolate(*models, outputs)
        assert load_file(outputs[0.5] / "model.safetensors")


@long_form
def test_an_extrapolation_killed_at_any_moment_ends_the_same(tmp_path, fault):
    """Two models of 100 MB; what a killed writer leaves neither blocks nor changes the next."""
    rng, generator = random.Random(SEED), torch.Generator().manual_seed(SEED)
    for name in ("sft", "aligned"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        tensors = {
            f"layers.{i}.weight": torch.randn(1024, 1024, generator=generator) for i in range(25)
        }
        save_file(tensors, tmp_path / name / "model.safetensors")
    command = [
        sys.executable,
        "-m",
        "beyond_dpo.extrapolate",
        tmp_path / "sft",
        tmp_path / "aligned",
    ]
    began = time.monotonic()
    subprocess.run([*command, tmp_path / "calm", "--alpha", "0.5"], check=True, capture_output=True)
    seconds, out = time.monotonic() - began, tmp_path / "out"
    for _ in range(5 * ROUNDS):
        with fault("everything killed: extrapolation"):
            child = subprocess.Popen([*command, out, "--alpha", "0.5"], stdout=subprocess.DEVNULL)
            time.sleep(rng.uniform(0.5, 1) * seconds)
            stop(child)
            if out.exists():
                assert (out / "model.safetensors").read_bytes() == (
                    tmp_path / "calm/model.safetensors"
                ).read_bytes()
                shutil.rmtree(out)
    subprocess.run([*command, out, "--alpha", "0.5"], check=True, capture_output=True)
    assert (out / "model.safetensors").read_bytes() == (
        tmp_path / "calm/model.safetensors"
    ).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["aligned", "calm", "out", "sft"]


@long_form
def test_a_conversion_killed_at_any_moment_ends_the_same(tmp_path, fault):
    """A real GGUF file, dequantised in a child process; the cache keeps nothing of the killed
    ones.
    """
    try:
        archive, calm = assets.fetch_all(["smollm2"])[0], assets.model_dir("smollm2")
    except assets.AssetError as error:
        pytest.skip(str(error))
    here, rng = Store(tmp_path), random.Random(SEED)
    cache = tmp_path / "cache"
    cache.mkdir(exist_ok=True)
    shutil.copy(archive, cache)
    for _ in range(ROUNDS):
        with fault("everything killed: conversion"):
            child = here.start(
                "-c", "from beyond_dpo.pipeline import assets; assets.model_dir('smollm2')"
            )
            time.sleep(rng.uniform(1, 12))
            here.kill() if rng.random() < 0.5 else stop(child)
            assert here.alone()
    code = "from beyond_dpo.pipeline import assets; assets.model_dir('smollm2')"
    assert here.start("-c", code).wait(300) == 0, here.said()
    assert [path.name for path in cache.iterdir() if path.is_dir()] == [calm.name]
    assert (cache / calm.name / ".sha256.json").read_bytes() == (calm / ".sha256.json").read_bytes()


# ---- the runner

CELL = """
import time
from beyond_dpo.machine import workers
from beyond_dpo.pipeline.artifacts import Artifact
def make(folder):
    (folder / "text").write_text(tag)
    workers.get("jobs", "beyond_dpo.machine.launch", {})
    wait = lambda out: time.sleep(0 if (folder.parent / "go").exists() else 600)
    Artifact("waits", 1, {}, wait).get()
print(Artifact("slow", 1, {"tag": tag}, make).get().name)
"""


@pytest.fixture
def project(tmp_path):
    """Return a store in a project of its own, with one notebook that waits for a file."""
    nb = nbformat.v4.new_notebook(
        metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}}
    )
    nb.cells = [nbformat.v4.new_code_cell('tag = "x"', metadata={"tags": ["parameters"]})]
    nb.cells += [nbformat.v4.new_code_cell(CELL)]
    (tmp_path / "notebooks").mkdir()
    nbformat.write(nb, tmp_path / "notebooks" / "11_expo_slow.ipynb")
    here = Store(tmp_path, BEYOND_DPO_ROOT=str(tmp_path))
    yield here
    here.kill()


def test_a_killed_runner_leaves_no_process_and_its_rerun_ends_well(project, fault, tmp_path):
    """kill -9 of the runner alone: its kernel and the kernel's worker end by themselves. A
    parameter is no code.
    """
    run = [
        "-m",
        "beyond_dpo.notebook.run",
        "11",
        "-p",
        "tag=x'\n__import__('pathlib').Path('injected').touch()#",
    ]
    runner = project.start(*run)
    with fault("runner killed"):
        wait_for(lambda: list(project.artifacts.glob("waits-*.partial")), 60)
        wait_for(
            lambda: len(project.processes()) == 3, 60
        )  # runner, kernel, worker; first also git
        stop(runner)
        assert project.alone(), project.processes()
    (project.artifacts / "go").touch()
    assert project.start(*run).wait(60) == 0, project.said()
    assert len([key for key in project.published() if key.startswith(("slow", "waits"))]) == 2
    assert not list(tmp_path.rglob("injected"))


@long_form
def test_a_real_notebook_killed_and_run_twice_at_once_ends_the_same(store, fault):
    rng, calm, here = random.Random(SEED), store(), store()
    command = ["-m", "beyond_dpo.notebook.run", "11", "--profile", "smoke"]
    began = time.monotonic()
    assert calm.start(*command).wait(600) == 0, calm.said()
    seconds = time.monotonic() - began
    for i in range(2 * ROUNDS):
        what, runner = ("runner", "kernel", "everything")[i % 3], here.start(*command)
        time.sleep(rng.uniform(0.1, 0.7) * seconds)
        with fault(f"{what} killed: notebook 11"):
            if what == "kernel":
                for kernel in [
                    one for one in descendants(runner.pid) if "ipykernel" in " ".join(cmdline(one))
                ]:
                    kernel.kill()
                runner.wait(120)
            else:
                here.kill() if what == "everything" else stop(runner)
            assert here.alone(), here.processes()
            here.published()
    with fault("two runs at once: notebook 11"):
        pair = [here.start(*command, errors=f"errors of {i}") for i in range(2)]
        assert [runner.wait(600) for runner in pair] == [0, 0], (
            here.folder / "errors of 0"
        ).read_text()
        assert here.alone() and here.contents() == calm.contents()


@long_form
def test_a_runner_on_a_full_disk_says_so(project, fault):
    with disk(project.artifacts, 4):
        (project.artifacts / "go").touch()
        with fault("disk full: runs"):
            with filled(project.artifacts):
                assert project.start("-m", "beyond_dpo.notebook.run", "11").wait(60) == 1
            assert "No space left on device" in project.said() and not project.published(), (
                project.said()
            )
            assert project.start("-m", "beyond_dpo.notebook.run", "11").wait(60) == 0, (
                project.said()
            )
            assert project.alone()
