"""Artifacts have stable keys, are computed once and verified at each use.

They are honest when a process or a disk fails.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from beyond_dpo import events
from beyond_dpo.machine import paths
from beyond_dpo.pipeline import artifacts
from beyond_dpo.pipeline.artifacts import Artifact, DamagedArtifact, MissingArtifact

LIB = paths.LIBRARY
ROWS_CSV = "alpha,reward\n0.1,0.30000000000000004\n"


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    """Keep every test away from the project's own artifacts."""
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    monkeypatch.setattr(paths, "ARTIFACTS", tmp_path / "artifacts")
    monkeypatch.setattr(paths, "FROZEN", tmp_path / "frozen")
    monkeypatch.delenv("COMPUTE", raising=False)
    new_process()


def new_process():
    """Forget what this process has verified, as a new one would."""
    artifacts._hashes.clear()


def demo(calls=None, **inputs):
    """Return an artifact of stage "demo"; each run of its `make` is counted in the list `calls`."""

    def make(folder):
        if calls is not None:
            calls.append(1)
        (folder / "result.json").write_text('{"reward": 0.1}')
        (folder / "sub").mkdir(exist_ok=True)
        (folder / "sub" / "rows.csv").write_text(ROWS_CSV)
        return {"rows": 1}

    return Artifact("demo", 1, inputs, make)


def child(tmp_path, code, **env):
    """Start a real Python process that runs `code` and shares this test's folders."""
    environment = {
        **os.environ,
        "BEYOND_DPO_ROOT": str(tmp_path),
        "PYTHONPATH": str(LIB),
        "PYTHONUNBUFFERED": "1",
        **env,
    }
    environment.pop("COMPUTE", None)
    environment.pop("BEYOND_DPO_ARTIFACTS", None)
    imports = "import os, sys, time, resource\nfrom beyond_dpo.pipeline.artifacts import *\n"
    return subprocess.Popen(
        [sys.executable, "-c", imports + code],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def is_finished(artifact):
    stores = (paths.ARTIFACTS, paths.FROZEN)
    return any((store / artifact.key / "manifest.json").is_file() for store in stores)


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def suffixes_in(folder):
    return sorted(path.name.split(".")[-1] for path in folder.iterdir())


def test_key_is_the_hash_of_the_canonical_recipe():
    """The recipe is written out by hand, without blanks and with sorted names."""
    text = '{"inputs":{"alpha":0.1,"beta":1,"names":["a",null,true]},"stage":"demo","version":1}'
    digest = hashlib.sha256(text.encode()).hexdigest()
    key = demo(names=("a", None, True), beta=1.0, alpha=0.1).key
    assert key == f"demo-{digest[:16]}"
    assert key == "demo-6359c96457f22a65"


def test_key_ignores_the_order_of_names_and_the_form_of_numbers():
    key = demo(a=1, b={"x": 2.0, "y": [0.5]}).key
    assert key == demo(b={"y": (0.5,), "x": 2}, a=1.0).key


def test_key_ignores_nothing_else():
    nested = {"x": 2, "y": [0.5]}
    artifacts_apart = [
        demo(a=1, b=nested),
        demo(a=2, b=nested),
        demo(a=True, b=nested),
        demo(a="1", b=nested),
        Artifact("demo", 2, {"a": 1, "b": nested}, print),
        Artifact("other", 1, {"a": 1, "b": nested}, print),
    ]
    keys = {artifact.key for artifact in artifacts_apart}
    assert len(keys) == len(artifacts_apart)


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        (
            {"model": {"x": Path("/data/m")}},
            TypeError,
            r"Path\('/data/m'\) cannot enter a key: .*resolve.* for paths",
        ),
        ({"a": [1, float("nan")]}, ValueError, "not JSON compliant"),
        ({"a": float("inf")}, ValueError, "not JSON compliant"),
        ({"a": {("x", 1): "x"}}, TypeError, "keys must be str.*not tuple"),
        ({"a": {"b": {1, 2}}}, TypeError, r"\{1, 2\} cannot enter a key"),
        ({"a": len}, TypeError, "<built-in function len> cannot enter a key"),
    ],
)
def test_what_cannot_enter_a_key_is_refused(inputs, error, message):
    with pytest.raises(error, match=message):
        Artifact("demo", 1, inputs, print)


def test_upstream_artifact_enters_as_its_key():
    first = demo(seed=1)
    second = demo(seed=2)
    of_first = Artifact("below", 1, {"rows": {"from": [first]}}, print)
    of_second = Artifact("below", 1, {"rows": {"from": [second]}}, print)
    assert of_first.recipe["inputs"] == {"rows": {"from": [first.key]}}
    assert of_first.key != of_second.key


def test_computed_once_then_found(tmp_path):
    calls = []
    artifact = demo(calls, x=1)
    assert not is_finished(artifact)
    folder = artifact.get()
    assert is_finished(artifact)
    assert folder == tmp_path / "artifacts" / artifact.key
    assert demo(calls, x=1).get() == folder
    assert len(calls) == 1
    assert names_in(tmp_path / "artifacts") == [artifact.key, f"{artifact.key}.lock"]


def test_start_end_and_reuse_are_reported(monkeypatch):
    reports = []
    monkeypatch.setattr(events, "tell", lambda **report: reports.append(report))
    artifact = demo(x=1)
    artifact.get()
    artifact.get()
    assert [report["event"] for report in reports] == ["start", "done", "hit"]
    assert {(report["stage"], report["key"]) for report in reports} == {("demo", artifact.key)}
    assert reports[1]["seconds"] == artifact.manifest["seconds"]


def test_files_are_read_by_name():
    artifact = demo(x=1)
    assert artifact.json() == {"reward": 0.1}
    assert artifact.csv("sub/rows.csv").reward[0] == 0.30000000000000004


def test_manifest_says_what_was_done():
    artifact = demo(x=1.0)
    manifest = artifact.manifest
    assert manifest["stage"] == "demo"
    assert manifest["version"] == 1
    assert manifest["inputs"] == {"x": 1}
    assert manifest["key"] == artifact.key
    assert manifest["facts"] == {"rows": 1}
    assert manifest["seconds"] >= 0
    assert manifest["created"].endswith("+00:00")


def test_manifest_says_what_it_was_done_with():
    manifest = demo(x=1.0).manifest
    assert "numpy" in manifest["packages"]
    assert "pytest" not in manifest["packages"]
    assert manifest["hardware"]["cores"] >= 1
    assert manifest["hardware"]["memory_gib"] > 0.1
    assert manifest["git"] is None


def test_manifest_holds_the_hash_of_every_file():
    artifact = demo(x=1.0)
    files = artifact.manifest["files"]
    assert sorted(files) == ["result.json", "sub/rows.csv"]
    content = (artifact.get() / "result.json").read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    assert files["result.json"] == {"sha256": digest, "bytes": len(content)}


def test_manifest_names_the_commit(tmp_path):
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    (tmp_path / ".gitignore").write_text("artifacts\n")
    subprocess.run([*git, "add", ".gitignore"], check=True)
    subprocess.run([*git, "commit", "-qm", "x"], check=True)
    clean = demo(x=1).manifest["git"]
    assert len(clean["commit"]) == 40
    assert clean["dirty"] is False
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "new.svg").touch()
    assert demo(x=3).manifest["git"]["dirty"] is False, "a figure is a result"
    (tmp_path / "new.py").touch()
    assert demo(x=2).manifest["git"] == {"commit": clean["commit"], "dirty": True}


def test_seconds_leave_out_upstream_stages():
    slow = Artifact("slow", 1, {}, lambda folder: time.sleep(0.4))
    quick = Artifact("quick", 1, {"slow": slow}, lambda folder: {"from": slow.get().name})
    assert quick.manifest["seconds"] < 0.3 < slow.manifest["seconds"]


def test_working_state_is_not_published():
    def make(folder):
        (folder / "checkpoints" / "step1").mkdir(parents=True)
        (folder / "checkpoints" / "step1" / "state").write_text("x")
        (folder / "sub" / ".cache").mkdir(parents=True)
        (folder / "sub" / ".cache" / "y").write_text("y")
        (folder / ".progress").write_text("1")
        (folder / ".latest").symlink_to("checkpoints")
        (folder / "result.json").write_text("{}")

    folder = Artifact("work", 1, {}, make).get()
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert sorted(path.name for path in files) == ["manifest.json", "result.json"]


def test_exception_keeps_the_partial_work(tmp_path):
    def make(folder):
        is_second_attempt = (folder / "step").exists()
        (folder / "step").write_text("1")
        if not is_second_attempt:
            raise RuntimeError("boom")
        return {"resumed": is_second_attempt}

    artifact = Artifact("fragile", 1, {}, make)
    with pytest.raises(RuntimeError, match="boom"):
        artifact.get()
    assert not is_finished(artifact)
    assert (tmp_path / "artifacts" / f"{artifact.key}.partial" / "step").exists()
    assert artifacts._upstream == []
    assert artifact.manifest["facts"] == {"resumed": True}


def test_kill_in_the_middle_then_resume(tmp_path):
    """After kill -9 nothing is published, and the next attempt does what was not done."""
    code = """
def make(folder):
    done = len(list(folder.glob("step*")))
    for i in range(done, 4):
        (folder / f"step{i}").write_text("x")
        print(f"step{i}")
        if i == 1 and len(sys.argv) < 2:
            time.sleep(60)
    return {"found": done}
a = Artifact("long", 1, {}, make)
print(a.manifest["facts"])
"""
    process = child(tmp_path, code)
    assert [process.stdout.readline().strip() for _ in range(2)] == ["step0", "step1"]
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert suffixes_in(tmp_path / "artifacts") == ["lock", "partial"]
    process = child(tmp_path, code)
    out, err = process.communicate(timeout=30)
    assert out.split("\n")[:3] == ["step2", "step3", "{'found': 2}"], err


def test_two_processes_compute_once(tmp_path):
    code = """
events.tell = lambda **report: print(report["event"])
def make(folder):
    with open(os.environ["COUNTER"], "a") as file:
        file.write("x")
    while not os.path.exists(os.environ["COUNTER"] + ".go"):
        time.sleep(0.02)
print(Artifact("shared", 1, {}, make).get())
"""
    counter = tmp_path / "counter"
    first = child(tmp_path, code, COUNTER=str(counter))
    assert first.stdout.readline() == "start\n"
    second = child(tmp_path, code, COUNTER=str(counter))
    assert second.stdout.readline() == "wait\n"
    (tmp_path / "counter.go").touch()
    first_out, first_err = first.communicate(timeout=30)
    second_out, second_err = second.communicate(timeout=30)
    first_event, first_folder = first_out.split()
    second_event, second_folder = second_out.split()
    assert first_event == "done", first_err
    assert second_event == "hit", second_err
    assert first_folder == second_folder
    assert counter.read_text() == "x"
    assert "which another process is computing" in second_err
    assert second_err.count("waiting for shared-") == 1


def test_never_names_what_to_run(tmp_path, monkeypatch):
    monkeypatch.setenv("COMPUTE", "never")
    artifact = demo(x=1)
    message = rf"'demo': {artifact.key} .*make reproduce.*beyond_dpo.notebook.run NB --profile P"
    with pytest.raises(MissingArtifact, match=message):
        artifact.get()
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_mode_is_refused(monkeypatch):
    monkeypatch.setenv("COMPUTE", "sometimes")
    with pytest.raises(ValueError, match="COMPUTE=sometimes"):
        demo(x=1).get()


@pytest.fixture
def frozen_only(tmp_path):
    """Compute an artifact and keep its frozen copy alone; return it, its calls and the copy."""
    calls = []
    artifact = demo(calls, x=1)
    artifact.get()
    copy = artifacts.freeze(artifact.key)
    shutil.rmtree(tmp_path / "artifacts")
    return artifact, calls, copy


def test_frozen_is_enough_for_never(frozen_only, tmp_path, monkeypatch):
    artifact, calls, copy = frozen_only
    monkeypatch.setenv("COMPUTE", "never")
    assert copy == tmp_path / "frozen" / artifact.key
    assert artifact.get() == copy
    assert len(calls) == 1


def test_a_plan_finds_nothing(frozen_only, monkeypatch):
    artifact, _, _ = frozen_only
    monkeypatch.setenv("COMPUTE", "plan")
    with pytest.raises(MissingArtifact, match="COMPUTE=plan forbids computing"):
        artifact.get()


def test_frozen_is_ignored_by_cold(frozen_only, tmp_path, monkeypatch):
    artifact, calls, _ = frozen_only
    monkeypatch.setenv("COMPUTE", "cold")
    assert artifact.get().parent == tmp_path / "artifacts"
    assert len(calls) == 2


def test_upstream_is_everything_that_an_artifact_is_made_from_once_in_an_order_of_making():
    first = demo(x=1)
    second = demo(on=[first, {"too": first}])
    third = demo(x=2)
    last = demo(on={"left": (second, third), "right": first})
    assert list(first.upstream) == [first.key]
    assert list(second.upstream) == [first.key, second.key]
    order = list(last.upstream)
    assert sorted(order) == sorted([first.key, second.key, third.key, last.key])
    assert order[-1] == last.key
    assert order.index(first.key) < order.index(second.key)
    assert last.upstream[third.key] is third


def flip(folder):
    content = bytearray((folder / "result.json").read_bytes())
    content[3] ^= 1
    (folder / "result.json").write_bytes(bytes(content))


def truncate(folder):
    (folder / "result.json").write_text("{")


def remove(folder):
    (folder / "sub" / "rows.csv").unlink()


def edit_manifest(folder):
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(text.replace('"rows": 1', '"rows": 2'))


def remove_manifest(folder):
    (folder / "manifest.json").unlink()


DAMAGE = {
    flip: (
        r"result\.json: expected .'sha256': '\w{64}', 'bytes': 15., found .'sha256': '\w{64}', "
        r"'bytes': 15."
    ),
    truncate: r"result\.json: expected .*'bytes': 15., found .*'bytes': 1.",
    remove: r"sub/rows\.csv: expected .*'bytes': 37., found no such file",
    edit_manifest: r"manifest\.json: expected .*, found ",
    remove_manifest: r"manifest\.json: expected a manifest, found FileNotFoundError",
}


def by_name(damage):
    return damage.__name__


@pytest.mark.parametrize("damage", DAMAGE, ids=by_name)
def test_damage_to_a_result_is_refused_or_computed_again(damage, monkeypatch, caplog):
    calls = []
    artifact = demo(calls, x=1)
    artifact.get()
    artifacts.freeze(artifact.key)  # a whole copy there is no reason to pass over the damage
    damage(paths.ARTIFACTS / artifact.key)
    new_process()
    monkeypatch.setenv("COMPUTE", "never")
    with pytest.raises(DamagedArtifact, match=DAMAGE[damage]):
        artifact.get()
    monkeypatch.setenv("COMPUTE", "cold")
    with caplog.at_level(logging.WARNING):
        artifact.get()
    assert len(calls) == 2
    assert artifact.json() == {"reward": 0.1}
    assert caplog.text.count("to be computed again") == 1


@pytest.mark.parametrize("damage", DAMAGE, ids=by_name)
def test_damage_to_a_frozen_result_is_refused(damage, frozen_only):
    artifact, calls, copy = frozen_only
    damage(copy)
    new_process()
    with pytest.raises(DamagedArtifact, match=DAMAGE[damage] + r".*restore .* with git"):
        artifact.get()
    assert len(calls) == 1


def test_damaged_copy_gives_way_to_the_frozen_one():
    calls = []
    artifact = demo(calls, x=1)
    damaged = artifact.get()
    frozen = artifacts.freeze(artifact.key)
    flip(damaged)
    new_process()
    assert artifact.get() == frozen
    assert len(calls) == 1
    assert not damaged.exists()


def test_another_artifacts_folder_is_not_taken(tmp_path):
    other = demo(x=1)
    artifact = demo(x=2)
    other.get().rename(tmp_path / "artifacts" / artifact.key)
    assert artifact.get().name == artifact.key
    assert artifact.manifest["inputs"] == {"x": 2}


@pytest.mark.parametrize(("limit", "where"), [(4096, "make"), (600, "manifest")])
def test_full_disk_publishes_nothing(tmp_path, limit, where):
    """A limit on file sizes fails like a full disk, inside `make` or at the manifest."""
    code = """
def make(folder):
    (folder / "small").write_text("x" * 100)
    (folder / "large").write_text("x" * int(os.environ["SIZE"]))
if os.environ["LIMIT"] != "0":
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(os.environ["LIMIT"]), resource.RLIM_INFINITY))
print(Artifact("big", 1, {}, make).get().name)
"""
    size = str(10_000 if where == "make" else 500)
    _, err = child(tmp_path, code, SIZE=size, LIMIT=str(limit)).communicate(timeout=30)
    assert "OSError: [Errno 27]" in err
    assert suffixes_in(tmp_path / "artifacts") == ["lock", "partial"]
    out, err = child(tmp_path, code, SIZE=size, LIMIT="0").communicate(timeout=30)
    folder = tmp_path / "artifacts" / out.strip()
    assert (folder / "large").stat().st_size == int(size), err
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["files"].keys() == {"small", "large"}


def test_freeze_refuses_what_is_missing():
    with pytest.raises(MissingArtifact, match="compute it first"):
        artifacts.freeze(demo(x=1).key)


def test_freeze_refuses_what_is_large(tmp_path):
    artifact = demo(x=1)
    artifact.get()
    with pytest.raises(ValueError, match=r"has [\d,]+ bytes, more than the 50 allowed"):
        artifacts.freeze(artifact.key, max_bytes=50)
    assert not (tmp_path / "frozen").exists()


def test_freeze_copies_once_and_leaves_nothing_else(tmp_path):
    artifact = demo(x=1)
    folder = artifact.get()
    copy = artifacts.freeze(artifact.key)
    assert artifacts.freeze(artifact.key) == copy
    assert names_in(tmp_path / "frozen") == [artifact.key]
    assert (copy / "sub" / "rows.csv").read_bytes() == (folder / "sub" / "rows.csv").read_bytes()


def test_import_is_light():
    heavy = "{'torch', 'transformers', 'pandas', 'numpy'}"
    code = f"import sys, beyond_dpo.pipeline.artifacts; print(sorted({heavy} & set(sys.modules)))"
    environment = {**os.environ, "PYTHONPATH": str(LIB)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.stdout.strip() == "[]", done.stderr


def test_the_hash_of_a_large_file_says_what_is_read(tmp_path, monkeypatch, capsys):
    """A model's folder of many gigabytes was read without a word."""
    monkeypatch.delenv("TQDM_DISABLE")
    monkeypatch.setattr(events, "SLOW", 0.1)
    file_digest = hashlib.file_digest

    def slow_digest(*arguments):
        time.sleep(0.4)
        return file_digest(*arguments)

    monkeypatch.setattr(hashlib, "file_digest", slow_digest)
    small = tmp_path / "small"
    large = tmp_path / "large"
    small.write_bytes(b"x")
    large.write_bytes(b"x")
    os.truncate(large, artifacts.LARGE)
    artifacts.sha256(small)
    assert capsys.readouterr().err == ""
    digest = artifacts.sha256(large)
    assert capsys.readouterr().err == f"reading {large} for its hash, 0.1 GB\n"
    assert digest == hashlib.sha256(large.read_bytes()).hexdigest()
    assert artifacts.sha256(large) == digest
    assert capsys.readouterr().err == "", "it is read once"


def training(precision):
    settings = {"precision": precision, "save_dtype": "float32"}
    return Artifact("train", 1, {"settings": settings}, lambda folder: None)


def sampling(dtype):
    return Artifact("responses", 1, {"decoding": {"dtype": dtype}}, lambda folder: None)


def made_from(stage, parent):
    def make(folder):
        parent.get()

    return Artifact(stage, 1, {"of": [parent]}, make)


@pytest.mark.parametrize(
    "artifact, is_single",
    [
        (training("fp32"), True),
        (training("bf16"), False),
        (sampling("float32"), True),
        (sampling("bfloat16"), False),
    ],
)
def test_precision_is_told_by_what_a_result_was_made_from(artifact, is_single):
    """By its own recipe or by that of anything below it, not by the dtype of the saved weights."""
    artifact.get()
    curves = made_from("curves", made_from("scores", artifact))
    curves.get()
    assert artifacts.in_float32([artifact.key]) is is_single
    assert artifacts.in_float32([curves.key]) is is_single


def test_precision_of_several_results_is_single_if_one_is():
    double = training("bf16")
    single = sampling("float32")
    for artifact in (double, single):
        artifact.get()
    unknown = "train-0123456789abcdef"
    assert not artifacts.in_float32([double.key, unknown])
    assert artifacts.in_float32([double.key, single.key])
