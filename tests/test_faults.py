"""The fault suite: kill -9, full disks, damage, two at once, dying engines.

Whatever happens, a rerun ends the same. `make test` and `make long` run a short form; `make faults`
breaks every stage of every pipeline, several times (FAULT_ROUNDS).
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
from conftest import wait_for
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
)

# The parts of the pipeline that are run.
PARTS = ["expo", "served", "mallows", "wrpo"] if ROUNDS else ["expo", "served"]
SHORT_FORM = ("train", "responses", "answers")  # the stages that it breaks
MODES = ["everything killed", "child killed", "disk full", "kernel killed"]
# The stages that work in a child process.
IN_A_CHILD = ("train", "reward-gold", "reward-reward", "reference", "responses", "scores")
NO_SPACE = "No space left on device"
# What came of a fault.
MISSED = "missed"
GOES_ON = "goes on"
ENDED = "ended"


@pytest.fixture
def fault(record_property):
    """Return a context that counts a fault: as tried at its start, as survived at its end."""

    @contextmanager
    def counted(name: str):
        record_property("fault tried", name)
        yield
        record_property("fault survived", name)

    return counted


@pytest.fixture(scope="module")
def endpoint():
    server = Endpoint()
    yield server
    server.shutdown()


@pytest.fixture(scope="module")
def store(endpoint, tmp_path_factory):
    """Return a maker of empty stores."""
    stores = []

    def make() -> Store:
        folder = tmp_path_factory.mktemp("store")
        made = Store(folder, FAULT_ENDPOINT=endpoint.url, OPENAI_API_KEY="sk-x")
        stores.append(made)
        return made

    yield make
    for made in stores:
        made.kill()


@pytest.fixture(scope="module")
def whole(store):
    """Return a store that nothing disturbed, and the stages in the order in which they begin."""
    calm = store()
    assert calm.start(SCRIPT, *PARTS).wait(900) == 0, calm.log()
    return calm, list(dict.fromkeys(calm.started_stages()))


# ---- the pipeline broken at each stage


class Pipeline:
    """The pipeline in a store where it is broken again and again, and what that cost.

    Attributes:
        child: the process that runs it, if one does.
        finished: {key: manifest} of what was finished when it was last broken.
        lost: how many finished results were lost.
        strikes: how often it was hit.
        replies_damaged: how many finished results were damaged that consist of replies.
    """

    def __init__(self, store: Store, fault, rng: random.Random):
        self.store = store
        self.fault = fault
        self.rng = rng
        self.child = None
        self.finished = {}
        self.lost = 0
        self.strikes = 0
        self.replies_damaged = 0

    def start(self) -> None:
        self.child = self.store.start(SCRIPT, *PARTS)

    def count_lost(self) -> None:
        """Count what was finished when the pipeline was last broken and is not so any more."""
        now = self.store.published()
        for key, manifest in self.finished.items():
            if now.get(key) != manifest:
                self.lost += 1

    def damage_one(self, keys: set[str]) -> None:
        """Damage one finished result of `keys`, if there is one, and see a new run notice it."""
        candidates = sorted(self.finished.keys() & keys)
        if not candidates:
            return
        key = self.rng.choice(candidates)
        del self.finished[key]
        if key.startswith("answers"):
            self.replies_damaged += 1
        with self.fault("finished result damaged"):
            damage(self.store.artifacts / key, self.rng)
            self.start()
            wait_for(lambda: self._says_damaged(key), 300)

    def _says_damaged(self, key: str) -> bool:
        log = self.store.log()
        return f"{key}/" in log and "to be computed again" in log

    def break_at(self, stage: str, mode: str, seconds: float) -> None:
        """Break the pipeline at a random moment of a stage, which takes so many seconds."""
        if not self.store.reaches(stage, self.child):
            return
        moment = self.rng.uniform(0, min(10, seconds))
        outcome = strike(self.store, self.child, mode, moment, self.rng)
        if outcome == MISSED:
            return
        with self.fault(f"{mode}: {stage}"):
            self.strikes += 1
            if outcome == ENDED:
                self.count_lost()
                self.finished = self.store.published()
                self.child = None

    def finish(self) -> None:
        """Let the pipeline run to its end, twice at once if it does not run now."""
        if self.child:
            assert self.child.wait(600) == 0, self.store.log()
        else:
            with self.fault("two runs at once"):
                run_twice_at_once(self.store)
        self.count_lost()


def strike(here: Store, child, mode: str, moment: float, rng) -> str:
    """Break a running pipeline; return MISSED, GOES_ON or ENDED.

    Of an ended one no process is left. Nothing is hit where the pipeline had just ended, or where
    its stage has no child.
    """
    if mode == "disk full":
        return strike_disk(here, child)
    time.sleep(moment)
    if mode == "child killed":
        children = descendants(child.pid)
        if not children:
            return MISSED
        rng.choice(children).kill()
        return GOES_ON
    if child.poll() is not None:
        return MISSED
    if mode == "everything killed":
        here.kill()
    else:
        stop(child)
    child.wait(10)
    assert here.falls_idle(), f"left over: {here.processes()}"
    return ENDED


def strike_disk(here: Store, child) -> str:
    """Fill the disk of a running pipeline; return MISSED or ENDED."""
    with filled(here.artifacts):
        child.wait(120)
    assert here.falls_idle()
    if child.returncode == 0:  # the last stage had just been written
        return MISSED
    assert NO_SPACE in here.log(), here.log()
    return ENDED


def run_twice_at_once(here: Store) -> None:
    """Run the pipeline in two processes; one of them computes each result, and both have all."""
    here.new_events()
    pair = [here.start(SCRIPT, *PARTS, log=f"log {i}") for i in range(2)]
    codes = [child.wait(900) for child in pair]
    assert codes == [0, 0], here.log("log 0") + here.log("log 1")
    done = [event["key"] for event in here.new_events() if event["event"] == "done"]
    assert len(done) == len(set(done)), done
    assert here.falls_idle()


def seconds_of_stages(calm: Store) -> dict[str, float]:
    """Return how long the first result of each stage took."""
    seconds = {}
    for text in calm.published().values():
        manifest = json.loads(text)
        seconds.setdefault(manifest["stage"], manifest["seconds"])
    return seconds


def mode_of(stage: str, number: int) -> str:
    """Return the fault of the stage with this number; each takes its turn."""
    mode = MODES[number % len(MODES)]
    if mode == "child killed" and stage not in IN_A_CHILD:
        return "kernel killed"
    return mode


@pytest.mark.long
@pytest.mark.parametrize("attempt", range(ROUNDS or 1))
def test_whatever_stage_is_broken_a_rerun_ends_the_same(
    whole, store, endpoint, fault, record_property, monkeypatch, attempt
):
    """Break the pipeline at a random moment of each stage, and let two processes do the rest.

    All processes, the kernel or a child are killed, the disk is filled, and what is finished is
    damaged. What was finished stays (or is computed again, if it was damaged), and all ends in the
    same bytes.
    """
    calm, all_stages = whole
    broken_stages = all_stages
    if not ROUNDS:
        broken_stages = [stage for stage in all_stages if stage in SHORT_FORM]
    seconds = seconds_of_stages(calm)
    answered_before = endpoint.answered.total()
    monkeypatch.setenv("FAULT_ENDPOINT", endpoint.url)  # a key does not depend on it
    # What each run looks at, and so whose damage it must notice.
    keys = {key for part in PARTS for last in results(part) for key in last.upstream}

    pipeline = Pipeline(store(), fault, random.Random(f"{SEED} {attempt}"))
    with disk(pipeline.store.artifacts, 64):
        for number, stage in enumerate(broken_stages):
            if pipeline.child is None:
                pipeline.damage_one(keys)
            if pipeline.child is None:
                pipeline.start()
            pipeline.break_at(stage, mode_of(stage, number + attempt), seconds[stage])
        pipeline.finish()
        contents = pipeline.store.contents()

    record_property("results lost", pipeline.lost)
    assert pipeline.lost == 0
    answered = endpoint.answered.total() - answered_before
    needed = len(endpoint.answered) * (1 + pipeline.replies_damaged)
    assert answered <= needed + 8 * pipeline.strikes, "more than 8 replies lost"
    assert contents.keys() == calm.contents().keys()
    assert contents == calm.contents()


def test_a_reference_file_has_the_same_bytes_each_time():
    """safetensors writes metadata in another order each time, so a rerun ended in another hash."""
    metadata = {"ids": "ids", "names": "names", "dropped": "dropped"}
    tensors = {"logps": torch.ones(2)}
    files = [save(tensors, metadata=metadata) for _ in range(50)]
    assert len(set(files)) > 1
    sorted_files = [reference._sorted(file) for file in files]
    assert len(set(sorted_files)) == 1
    assert torch.equal(load(sorted_files[0])["logps"], tensors["logps"])


def test_a_reply_that_a_full_disk_cut_off_is_asked_for_again(
    endpoint, tmp_path, monkeypatch, fault
):
    """Also where another reply was written behind the half of it."""
    from beyond_dpo.pipeline import endpoint as client

    monkeypatch.setenv("OPENAI_API_KEY", "sk-x")
    replies = tmp_path / "replies.jsonl"
    replies.write_text('["a", "kept", []]\n["b", "ha["c", "kept", []]\n["d", "half')
    requests = {}
    for name in ("a", "b", "c", "d"):
        requests[name] = {"messages": [{"role": "user", "content": f"cut off: {name}"}]}

    def read(reply) -> str:
        return reply.choices[0].message.content

    def ask() -> dict[str, str]:
        served = client.Endpoint("served", endpoint.url)
        texts, _ = client.ask(served, requests, replies, read)
        return texts

    with fault("reply cut off"):
        texts = ask()
        assert texts["a"] == "kept"
        for name in ("b", "c", "d"):
            assert len(texts[name]) == 64
        assert endpoint.answered["cut off: a"] == 0
        assert ask() == texts


# ---- launchers and engines that die


def victims(text: str, pid: int | None = None) -> list[psutil.Process]:
    """Return the processes with a text in their command line that a process, or this, started."""
    return [process for process in descendants(pid or os.getpid()) if text in cmdline(process)]


def cmdline(process: psutil.Process) -> str:
    """Return a process' command line, empty if it is gone."""
    with suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


@pytest.fixture
def texts(whole, tmp_path, monkeypatch):
    """Let stages work in this process on a store of the texts alone; return their artifact."""
    calm, _ = whole
    artifact = stages.texts(config.load("expo", "smoke").world)
    shutil.copytree(calm.artifacts / artifact.key, tmp_path / "artifacts" / artifact.key)
    monkeypatch.setattr(paths, "ARTIFACTS", tmp_path / "artifacts")
    yield artifact
    workers.close()


# Which process dies: what is in its command line, and how many processes train.
DYING = {
    "launcher": ("deepspeed.launcher.launch", 1),
    "runner": ("deepspeed.launcher.runner", 1),
    "rank": ("-m beyond_dpo.jobs.train", 2),
}


def sft_artifact(texts, processes: int):
    """Return the SFT model that DeepSpeed trains in so many processes."""
    cfg = config.load(
        "expo",
        "smoke",
        sft__launcher="deepspeed",
        sft__checkpoint_every=1,
        sft__processes=processes,
        sft__micro_batch=8 // processes,
    )
    return stages.training(cfg, cfg.sft, texts, "sft.jsonl", ["chosen"], seed=0, desc="SFT")


def leave_half_a_model(finished, partial) -> None:
    """Make a folder as an attempt leaves it that was killed while it wrote its model."""
    partial.mkdir()
    shutil.copy(finished / "log.jsonl", partial)
    shutil.copy(finished / "facts.json", partial)
    model = (finished / "model.safetensors").read_bytes()
    (partial / "model.safetensors").write_bytes(model[:100_000])


@pytest.mark.parametrize("name", list(DYING) if ROUNDS else ["launcher"])
def test_half_a_model_of_a_killed_attempt_is_not_taken_for_the_result(whole, texts, fault, name):
    """DeepSpeed's launcher ends with 0 when a signal ended what it started."""
    calm, _ = whole
    text, processes = DYING[name]
    artifact = sft_artifact(texts, processes)
    finished = calm.artifacts / artifact.key
    leave_half_a_model(finished, paths.ARTIFACTS / f"{artifact.key}.partial")

    def kill():
        victim = wait_for(lambda: victims(text))[0]
        victim.kill()

    killer = threading.Thread(target=kill)
    with fault(f"deepspeed's {name} killed"):
        killer.start()
        with pytest.raises(launch.JobFailed, match=r"SFT: .*(ended with|without a model)"):
            artifact.get()
        killer.join()
        wait_for(lambda: not victims("beyond_dpo.jobs.train"), 10)
        assert not (paths.ARTIFACTS / artifact.key).exists()
    if ROUNDS:
        expected = load_file(finished / "model.safetensors")
        tensors = load_file(artifact.get() / "model.safetensors")
        tolerance = 0 if processes == 1 else 0.01  # two processes round otherwise
        for tensor_name, tensor in expected.items():
            assert torch.allclose(tensor, tensors[tensor_name], rtol=0, atol=tolerance)


@long_form
@pytest.mark.parametrize("backend", ["transformers", "vllm"])
def test_an_engine_killed_while_it_answers_is_followed_by_another(
    tiny, tmp_path, monkeypatch, fault, backend
):
    """The caller gets the end of the log, no process stays, and the next engine says the same."""
    monkeypatch.setattr(paths, "ARTIFACTS", tmp_path)
    decoding = dataclasses.asdict(config.load("expo", "smoke").decoding)
    decoding["backend"] = backend
    settings = {"model": str(tiny), "decoding": decoding}
    prompts = [{"id": str(i), "prompt_ids": [0, 70 + i]} for i in range(400)]
    prompts_file = tmp_path / "prompts.json"
    prompts_file.write_text(json.dumps(prompts))

    def generate(name: str) -> bytes:
        out = tmp_path / name
        engine = workers.get("generate", "beyond_dpo.jobs.generate", settings)
        engine.call("generate", prompts=str(prompts_file), out=str(out), samples=2, seed=0)
        return out.read_bytes()

    calm = generate("calm")
    timer = threading.Timer(0.3, workers.living["generate"].child.kill)
    message = r"(?s)the worker died with status -9.*generate-\d+\.log says"
    with fault(f"engine killed: {backend}"):
        timer.start()
        with pytest.raises(launch.JobFailed, match=message):
            generate("killed")
        assert not victims("beyond_dpo.jobs.generate")
        assert generate("after") == calm
    workers.close()


# ---- small disks


def test_no_room_for_a_converted_model(tmp_path, monkeypatch, fault):
    """Nothing stays in the cache, not even of a killed process; with room the model is built."""
    calm = assets.model_dir("tiny")
    monkeypatch.setattr(paths, "CACHE", tmp_path / "cache")
    with disk(paths.CACHE, 4), fault("disk full: cache"):
        (paths.CACHE / f".{calm.name}-left").mkdir()
        with filled(paths.CACHE), pytest.raises(Exception, match=NO_SPACE):
            assets.model_dir("tiny")
        assert folders_in(paths.CACHE) == []
        assert hashes_of(assets.model_dir("tiny")) == hashes_of(calm)


def folders_in(folder) -> list[str]:
    return [path.name for path in folder.iterdir() if path.is_dir()]


def hashes_of(model) -> bytes:
    return (model / ".sha256.json").read_bytes()


def test_no_room_for_an_extrapolated_model(whole, tmp_path, fault):
    """The error names the disk and nothing stays; with room the same call works."""
    calm, _ = whole
    models = sorted(path for path in calm.artifacts.glob("train-*") if path.suffix != ".lock")
    theta_sft, theta_aligned = models[:2]
    folder = tmp_path / "disk"
    outputs = {0.5: folder / "a", 1.0: folder / "b"}
    with disk(folder, 4), fault("disk full: extrapolation"):
        with filled(folder), pytest.raises(OSError, match=NO_SPACE):
            extrapolate(theta_sft, theta_aligned, outputs)
        assert not list(folder.iterdir())
        extrapolate(theta_sft, theta_aligned, outputs)
        assert load_file(outputs[0.5] / "model.safetensors")


def save_random_model(folder, generator: torch.Generator) -> None:
    """Save 25 random weights, 100 MB."""
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    tensors = {}
    for i in range(25):
        tensors[f"layers.{i}.weight"] = torch.randn(1024, 1024, generator=generator)
    save_file(tensors, folder / "model.safetensors")


@long_form
def test_an_extrapolation_killed_at_any_moment_ends_the_same(tmp_path, fault):
    """What a killed writer leaves neither blocks nor changes the next."""
    rng = random.Random(SEED)
    generator = torch.Generator().manual_seed(SEED)
    sft = tmp_path / "sft"
    aligned = tmp_path / "aligned"
    save_random_model(sft, generator)
    save_random_model(aligned, generator)
    expo = [sys.executable, "-m", "beyond_dpo.jobs.command"]
    extrapolation = [*expo, "extrapolate", sft, aligned]

    calm = [*extrapolation, tmp_path / "calm", "--alpha", "0.5"]
    began = time.monotonic()
    subprocess.run(calm, check=True, capture_output=True)
    seconds = time.monotonic() - began
    expected = (tmp_path / "calm/model.safetensors").read_bytes()

    out = tmp_path / "out"
    command = [*extrapolation, out, "--alpha", "0.5"]
    for _ in range(5 * ROUNDS):
        with fault("everything killed: extrapolation"):
            child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
            time.sleep(rng.uniform(0.5, 1) * seconds)
            stop(child)
            if out.exists():
                assert (out / "model.safetensors").read_bytes() == expected
                shutil.rmtree(out)
    subprocess.run(command, check=True, capture_output=True)
    assert (out / "model.safetensors").read_bytes() == expected
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["aligned", "calm", "out", "sft"]


@long_form
def test_a_conversion_killed_at_any_moment_ends_the_same(tmp_path, fault):
    """A real GGUF file is converted in a child process; the cache keeps nothing of killed ones."""
    try:
        archive = assets.fetch_all(["smollm2"])[0]
        calm = assets.model_dir("smollm2")
    except assets.AssetError as error:
        pytest.skip(str(error))
    here = Store(tmp_path)
    rng = random.Random(SEED)
    cache = tmp_path / "cache"
    cache.mkdir(exist_ok=True)
    shutil.copy(archive, cache)
    code = "from beyond_dpo.pipeline import assets; assets.model_dir('smollm2')"
    for _ in range(ROUNDS):
        with fault("everything killed: conversion"):
            child = here.start("-c", code)
            time.sleep(rng.uniform(1, 12))
            if rng.random() < 0.5:
                here.kill()
            else:
                stop(child)
            assert here.falls_idle()
    assert here.start("-c", code).wait(300) == 0, here.log()
    assert folders_in(cache) == [calm.name]
    assert hashes_of(cache / calm.name) == hashes_of(calm)


# ---- the runner

RUN = ("-m", "beyond_dpo.notebook.run", "11")
CELL = """
import time
from beyond_dpo.machine import workers
from beyond_dpo.pipeline.artifacts import Artifact

def make(folder):
    (folder / "text").write_text(tag)
    workers.get("jobs", "beyond_dpo.machine.launch", {})
    go = folder.parent / "go"

    def wait(_):
        if not go.exists():
            time.sleep(600)

    Artifact("waits", 1, {}, wait).get()

print(Artifact("slow", 1, {"tag": tag}, make).get().name)
"""


@pytest.fixture
def project(tmp_path):
    """Return a store in a project of its own, with one notebook that waits for a file."""
    parameters = nbformat.v4.new_code_cell('tag = "x"', metadata={"tags": ["parameters"]})
    nb = nbformat.v4.new_notebook(
        metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}},
        cells=[parameters, nbformat.v4.new_code_cell(CELL)],
    )
    (tmp_path / "notebooks").mkdir()
    nbformat.write(nb, tmp_path / "notebooks" / "11_expo_slow.ipynb")
    here = Store(tmp_path, BEYOND_DPO_ROOT=str(tmp_path))
    yield here
    here.kill()


def test_a_killed_runner_leaves_no_process_and_its_rerun_ends_well(project, fault, tmp_path):
    """kill -9 of the runner alone: its kernel and the kernel's worker end by themselves.

    The value of its parameter is no code.
    """
    command = [*RUN, "-p", "tag=x'\n__import__('pathlib').Path('injected').touch()#"]
    runner = project.start(*command)
    with fault("runner killed"):
        wait_for(lambda: list(project.artifacts.glob("waits-*.partial")), 60)
        # Runner, kernel and worker; before also git.
        wait_for(lambda: len(project.processes()) == 3, 60)
        stop(runner)
        assert project.falls_idle(), project.processes()
    (project.artifacts / "go").touch()
    assert project.start(*command).wait(60) == 0, project.log()
    finished = [key for key in project.published() if key.startswith(("slow", "waits"))]
    assert len(finished) == 2
    assert not list(tmp_path.rglob("injected"))


def kill_part(name: str, here: Store, runner) -> None:
    """Kill the runner, its kernel or everything; let what is left end by itself."""
    if name == "everything":
        here.kill()
    elif name == "runner":
        stop(runner)
    else:
        for kernel in victims("ipykernel", runner.pid):
            kernel.kill()
        runner.wait(120)


@long_form
def test_a_real_notebook_killed_and_run_twice_at_once_ends_the_same(store, fault):
    rng = random.Random(SEED)
    command = [*RUN, "--profile", "smoke"]
    calm = store()
    began = time.monotonic()
    assert calm.start(*command).wait(600) == 0, calm.log()
    seconds = time.monotonic() - began

    here = store()
    parts = ("runner", "kernel", "everything")
    for i in range(2 * ROUNDS):
        name = parts[i % len(parts)]
        runner = here.start(*command)
        time.sleep(rng.uniform(0.1, 0.7) * seconds)
        with fault(f"{name} killed: notebook 11"):
            kill_part(name, here, runner)
            assert here.falls_idle(), here.processes()
            here.published()
    with fault("two runs at once: notebook 11"):
        pair = [here.start(*command, log=f"log {i}") for i in range(2)]
        codes = [runner.wait(600) for runner in pair]
        assert codes == [0, 0], here.log("log 0")
        assert here.falls_idle()
        assert here.contents() == calm.contents()


@long_form
def test_a_runner_on_a_full_disk_says_so(project, fault):
    with disk(project.artifacts, 4):
        (project.artifacts / "go").touch()
        with fault("disk full: runs"):
            with filled(project.artifacts):
                assert project.start(*RUN).wait(60) == 1
            assert NO_SPACE in project.log()
            assert not project.published(), project.log()
            assert project.start(*RUN).wait(60) == 0, project.log()
            assert project.falls_idle()
