"""A rehearsal of benchmarks/gpu on the CPU: every step on tiny models, and the counting of work."""

import importlib
import importlib.util
import json
import math
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from beyond_dpo.machine import paths
from beyond_dpo.pipeline import config, expo
from beyond_dpo.pipeline.artifacts import Artifact

GPU = paths.ROOT / "benchmarks" / "gpu"
RUN = GPU / "run.py"


def read(folder: Path, name: str) -> dict:
    return json.loads((folder / f"{name}.json").read_text())


def run(out: Path, *options: str) -> subprocess.CompletedProcess:
    """Run the benchmark without carried wheels: this environment has what they hold."""
    command = [sys.executable, str(RUN), "--out", str(out), "--tiny"]
    command += ["--wheels", str(out / "no-wheels"), "--work", str(out / "work"), *options]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture
def modules(monkeypatch):
    """Return a function that imports a file of the benchmark by its name."""
    monkeypatch.syspath_prepend(str(GPU.parent))
    monkeypatch.syspath_prepend(str(GPU))
    return importlib.import_module


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory):
    """Return the folder of results of a whole rehearsal, and what it printed."""
    out = tmp_path_factory.mktemp("gpu")
    done = run(out, "--steps", "attention,train,extrapolate")
    log = out / "log.txt"
    assert done.returncode == 0, log.read_text() if log.exists() else done.stderr
    return out, done.stdout


def require_positive(row: dict, *names: str) -> None:
    for name in names:
        assert math.isfinite(row[name]), name
        assert row[name] > 0, name


@pytest.mark.long
def test_every_step_ends_well_and_is_in_the_table(rehearsal):
    out, printed = rehearsal
    steps = [row["step"] for row in read(out, "steps")]
    assert steps == ["environment", "attention", "train", "extrapolate"]
    assert {row["status"] for row in read(out, "steps")} == {"ok"}
    assert read(out, "train")["notes"] == []
    assert read(out, "extrapolate")["notes"] == []
    assert "tiny 16+24, ours: " in printed
    assert "extrapolate, 2 α: ours " in printed
    assert not (out / "work").exists()


@pytest.mark.long
def test_the_environment_is_told(rehearsal):
    (row,) = read(rehearsal[0], "environment")["measured"]
    assert {"torch", "transformers", "deepspeed"} <= set(row["packages"])
    require_positive(row, "cores", "memory_gib", "disk_free_gib", "matmul_flops")
    require_positive(row, "copy_bytes_per_s")


@pytest.mark.long
def test_all_ways_to_compute_attention_score_alike(rehearsal):
    """Without a GPU flex-attention and compiled layers are left out."""
    content = read(rehearsal[0], "attention")
    assert content["notes"] == []
    shared, separate = content["measured"]
    assert shared["way"] == "shared, sdpa"
    assert separate["way"] == "separate, sdpa"
    assert shared["logps"] == pytest.approx(separate["logps"], rel=1e-4)
    assert len(shared["logps"]) == 16
    for row in content["measured"]:
        require_positive(row, "pairs_per_s", "useful_flops_per_s", "until_first_pass_s")
    assert "aten::mm" in (rehearsal[0] / "attention.txt").read_text()


@pytest.mark.long
def test_trainings_are_timed_step_by_step(rehearsal):
    content = read(rehearsal[0], "train")
    (case,) = content["settings"]["cases"]
    kinds = ["ours"]
    if importlib.util.find_spec("trl"):
        kinds.insert(0, "trl")
    found = [(row["round"], row["kind"]) for row in content["measured"]]
    assert found == [(0, kind) for kind in kinds] + [(1, kind) for kind in reversed(kinds)]
    for row in content["measured"]:
        assert row["case"] == case["name"]
        assert row["micro_batch"] == case["micro_batch"]
        assert len(row["step_seconds"]) == case["warmup"] + case["timed"]
        timed = sorted(row["step_seconds"][case["warmup"] :])
        assert len(timed) == 2
        pairs_per_s = case["global_batch"] / (sum(timed) / 2)
        assert row["pairs_per_s"] == pytest.approx(pairs_per_s)
        tokens = case["prompt"] + 2 * case["response"]
        assert row["tokens_per_s"] == pytest.approx(tokens * pairs_per_s)
        assert row["useful_flops_per_s"] == pytest.approx(case["flops_per_pair"] * pairs_per_s)
        share = row["useful_flops_per_s"] / content["settings"]["matmul_flops"]
        assert row["mfu_matmul"] == pytest.approx(share)
        require_positive(row, "pairs_per_s", "mfu_matmul", "process_seconds")
        assert row["process_seconds"] > sum(row["step_seconds"])


@pytest.mark.long
def test_our_ratio_to_trl_is_that_of_the_medians(rehearsal):
    pytest.importorskip("trl")
    content = read(rehearsal[0], "train")
    speeds = {"ours": [], "trl": []}
    for row in content["measured"]:
        speeds[row["kind"]].append(row["pairs_per_s"])
    ratio = sum(speeds["ours"]) / sum(speeds["trl"])  # of two rounds each, as of their medians
    (line,) = [line for line in content["summary"] if ", TRL: " in line]
    assert line.endswith(f"ours ÷ this {ratio:.2f}")


@pytest.mark.long
def test_checkpoints_are_extrapolated_and_copied(rehearsal):
    content = read(rehearsal[0], "extrapolate")
    size = content["settings"]["bytes"]
    embeddings = 512 * 64  # which are the head
    queries_and_output = 2 * 64 * 64
    keys_and_values = 2 * 64 * 32
    mlp = 3 * 64 * 128
    norms = 2 * 64
    layer = queries_and_output + keys_and_values + mlp + norms
    last_norm = 64
    assert size == 2 * (embeddings + 2 * layer + last_norm), "two bytes a weight, two layers"
    assert [row["alphas"] for row in content["measured"]] == [1, 2, 1, 2]
    for row in content["measured"]:
        moved = (2 + row["alphas"]) * size / 1e9
        assert row["ours_gb_per_s"] == pytest.approx(moved / row["ours"]["seconds"])
        require_positive(row["ours"], "seconds", "peak_gib")
        require_positive(row["cp"], "seconds")
    require_positive(content["settings"], "disk_write_gb_per_s")


ENDLESS = """
import subprocess, sys, time

child = [sys.executable, "-c", "import time; time.sleep(600)", sys.argv[2]]
subprocess.Popen(child, start_new_session=True)
print("begun", flush=True)
time.sleep(600)
"""


@pytest.mark.slow
def test_a_step_past_its_time_is_ended_with_its_children_and_the_next_one_begins(tmp_path):
    steps = {"environment": "", "endless": ENDLESS, "failing": "1 / 0", "quick": "print('done')"}
    for name, source in steps.items():
        (tmp_path / f"step_{name}.py").write_text(source)
    program = (
        f"import pathlib, sys; sys.path.insert(0, {str(GPU)!r}); import run; "
        f"run.HERE = pathlib.Path({str(tmp_path)!r}); run.STEPS = {tuple(steps)}; "
        "run.SECONDS = dict.fromkeys(run.STEPS, 20); sys.exit(run.main())"
    )
    out = tmp_path / "out"
    options = ["--out", str(out), "--steps", "endless,failing,quick", "--limit", "endless=2"]
    options += ["--wheels", str(out / "no-wheels")]
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", program, *options], capture_output=True, text=True)
    assert time.monotonic() - began < 15
    assert done.returncode == 1, done.stderr
    status = {row["step"]: row["status"] for row in read(out, "steps")}
    assert status == {
        "environment": "ok",
        "endless": "out of time",
        "failing": "failed (1)",
        "quick": "ok",
    }
    log = (out / "log.txt").read_text()
    assert "begun" in log
    assert "ZeroDivisionError" in log
    assert log.endswith("done\n")
    assert not [pid for pid in psutil.pids() if str(out) in command_line(pid)]


def command_line(pid: int) -> str:
    """Return how a process was started, "" of one that is gone."""
    try:
        return " ".join(psutil.Process(pid).cmdline())
    except psutil.Error:
        return ""


def test_a_misspelt_step_is_refused(tmp_path):
    done = run(tmp_path, "--steps", "trian")
    assert done.returncode == 2
    assert "--steps trian: there are attention, train, extrapolate, world" in done.stderr


def test_useful_operations_are_those_of_a_plain_count(modules):
    """Every product of one pair's forward pass, written out token by token."""
    models = modules("models")
    shape = models.TINY
    prompt = 3
    response = 2
    total = 0
    for position in range(prompt):
        total += token_flops(shape, position + 1)
    for _ in range(2):
        for position in range(response):
            total += token_flops(shape, prompt + position + 1)
            total += 2 * shape.hidden * shape.vocabulary
    assert models.pair_flops(shape, prompt, response) == 3 * total


def token_flops(shape, seen: int) -> int:
    """Return the operations of one token that sees so many, itself included."""
    products = []
    for _ in range(shape.layers):
        products += [(shape.hidden, shape.heads * shape.head_size)] * 2
        products += [(shape.hidden, shape.key_heads * shape.head_size)] * 2
        products += [(shape.hidden, shape.inner)] * 3
        products += [(seen, shape.head_size)] * 2 * shape.heads
    return sum(2 * rows * columns for rows, columns in products)


def test_the_shapes_have_the_parameters_that_their_names_say(modules):
    models = modules("models")
    step = modules("step_extrapolate")
    billions = {}
    for name in ("LLAMA_1B", "LLAMA_8B", "SMOLLM2_135M"):
        billions[name] = step.model_bytes(getattr(models, name)) / 2e9
    assert billions == pytest.approx(
        {"LLAMA_1B": 1.2358, "LLAMA_8B": 8.0303, "SMOLLM2_135M": 0.13452}, rel=1e-4
    )


def test_a_small_or_slow_disk_gets_fewer_layers(modules):
    models = modules("models")
    fitting = modules("step_extrapolate").fitting
    wide = 10**12
    assert fitting(models.LLAMA_8B, wide, speed=1e10, seconds=100).layers == 32
    slow = fitting(models.LLAMA_8B, wide, speed=5e8, seconds=100)
    small = fitting(models.LLAMA_8B, 40 * 2**30, speed=1e10, seconds=100)
    assert 1 < slow.layers < small.layers < 32
    assert modules("step_extrapolate").model_bytes(small) * 4 <= 36 * 2**30


def test_some_cases_are_chosen_by_their_numbers(modules):
    step = modules("step_train")
    assert step.chosen(step.CASES, "") == list(step.CASES)
    assert [case.name for case in step.chosen(step.CASES, "1,3")] == ["1B 512+512", "135M 16+64"]


def test_a_case_out_of_memory_goes_on_with_half_its_micro_batch(modules, tmp_path, monkeypatch):
    step = modules("step_train")
    results = modules("results")
    case = step.TINY_CASES[0]._replace(micro_batch=4)
    asked = []

    def run_child(kind, job):
        asked.append((kind, job["micro_batch"]))
        if job["micro_batch"] == 4 and kind == "trl":
            return None, "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate"
        return {"step_seconds": [1.0, 0.5, 0.5]}, ""

    monkeypatch.setattr(step, "run_child", run_child)
    setting = step.Setting(tmp_path, "fp32", None, 1e12)
    settings = {"cases": [step.case_facts(case)]}
    found = results.Results(tmp_path / "train.json", settings, step.summarise)
    bench = step.Bench(found, results.Clock(100), setting, ["trl", "ours"])
    assert bench.round(0, case).micro_batch == 2
    assert asked == [("trl", 4), ("trl", 2), ("ours", 2)]
    assert [row["micro_batch"] for row in found.content["measured"]] == [2, 2]
    assert found.content["notes"] == ["tiny 16+24, trl: out of memory at micro-batch 4"]
    assert found.content["summary"][1].endswith("micro-batch 2, ours ÷ this 1.00")


def test_archives_that_came_in_parts_are_whole_again(modules, tmp_path, monkeypatch):
    carry = modules("carry")
    archive = tmp_path / "model-1.0-py3-none-any.whl"
    archive.write_bytes(bytes(range(256)) * 40)
    parts = tmp_path / "parts"
    parts.mkdir()
    monkeypatch.setattr(carry, "ASSETS", parts)
    monkeypatch.setattr(carry, "PART", 3000)
    carry.split(archive)
    assert [part.stat().st_size for part in sorted(parts.iterdir())] == [2560] * 4
    cache = tmp_path / "cache"
    assert modules("step_world").join_parts(parts, cache) == [archive.name]
    assert (cache / archive.name).read_bytes() == archive.read_bytes()


def test_finished_artifacts_are_packed_and_unpacked(modules, folders, tmp_path):
    world = modules("step_world")
    key = "curves-0123456789abcdef"
    finished = paths.ARTIFACTS / key
    finished.mkdir(parents=True)
    (finished / "best.json").write_text("[]")
    packed = tmp_path / world.TEXTS
    assert world.pack([key], packed) == packed.stat().st_size
    (finished / "best.json").unlink()
    world.unpack_texts(tmp_path)
    assert (finished / "best.json").read_text() == "[]"


def test_the_world_is_that_of_notebook_11_for_one_more_seed_at_a_time(modules, monkeypatch):
    world = modules("step_world")
    for name, value in world.MACHINE.items():
        monkeypatch.setenv(name, value)
    assert world.seeds_in_turn("gpu") == [list(range(count)) for count in range(1, 6)]
    cfg = world.configured("gpu", [0, 1])
    profile = config.load("expo", "gpu", seeds=[0, 1], decoding__backend="transformers")
    assert expo.curves(cfg).key == expo.curves(profile).key
    assert cfg.needs.gpus == 0
    assert (cfg.train.launcher, cfg.train.checkpoint_every) == ("plain", 10**6)


def test_the_world_computes_what_notebook_11_names(modules, monkeypatch):
    """It called a function that was no longer there, and only a GPU would have told."""
    world = modules("step_world")
    got = []
    monkeypatch.setattr(Artifact, "get", lambda result: got.append(result.key))
    cfg = config.load("expo", "smoke")
    assert world.compute(cfg) == got == [expo.curves(cfg).key, expo.told(cfg).key]


def test_what_is_carried_is_locked_or_named_with_its_version(modules):
    carry = modules("carry")
    pins = carry.locked()
    assert len(carry.LOCKED) > 10
    for name in carry.LOCKED:
        assert "==" in pins[carry.canonical(name)]
    assert 'trl = ["trl==1.16.0"]' in (paths.ROOT / "pyproject.toml").read_text()
    assert "trl==1.16.0" in carry.OTHERS
