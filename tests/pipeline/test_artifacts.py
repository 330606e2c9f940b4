"""Artifacts: stable keys, computed once, verified at each use, and honest when a process or a disk
fails.
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
    def make(folder):
        if calls is not None:
            calls.append(1)
        (folder / "result.json").write_text('{"reward": 0.1}')
        (folder / "sub").mkdir(exist_ok=True)
        (folder / "sub" / "rows.csv").write_text("alpha,reward\n0.1,0.30000000000000004\n")
        return {"rows": 1}

    return Artifact("demo", 1, inputs, make)


def child(tmp_path, code, **env):
    """Start a real Python process that shares this test's folders and defines `make` before
    `code`.
    """
    env = (
        os.environ
        | {"BEYOND_DPO_ROOT": str(tmp_path), "PYTHONPATH": str(LIB), "PYTHONUNBUFFERED": "1"}
        | env
    )
    env.pop("COMPUTE", None)
    env.pop("BEYOND_DPO_ARTIFACTS", None)
    code = "import os, sys, time, resource\nfrom beyond_dpo.pipeline.artifacts import *\n" + code
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finished(artifact):
    return any(
        (root / artifact.key / "manifest.json").is_file()
        for root in (paths.ARTIFACTS, paths.FROZEN)
    )


def test_key_is_the_hash_of_the_canonical_recipe():
    """{"inputs":...,"stage":...,"version":...} without blanks and with sorted names, written out by
    hand.
    """
    text = '{"inputs":{"alpha":0.1,"beta":1,"names":["a",null,true]},"stage":"demo","version":1}'
    key = demo(names=("a", None, True), beta=1.0, alpha=0.1).key
    assert (
        key == "demo-" + hashlib.sha256(text.encode()).hexdigest()[:16] == "demo-6359c96457f22a65"
    )


def test_key_ignores_order_and_number_form_and_nothing_else():
    key = demo(a=1, b={"x": 2.0, "y": [0.5]}).key
    assert key == demo(b={"y": (0.5,), "x": 2}, a=1.0).key
    others = [
        demo(a=2, b={"x": 2, "y": [0.5]}),
        demo(a=True, b={"x": 2, "y": [0.5]}),
        demo(a="1", b={"x": 2, "y": [0.5]}),
    ]
    others += [Artifact("demo", 2, {"a": 1, "b": {"x": 2, "y": [0.5]}}, print)]
    others += [Artifact("other", 1, {"a": 1, "b": {"x": 2, "y": [0.5]}}, print)]
    assert len({key, *(other.key for other in others)}) == 6


@pytest.mark.parametrize(
    ("inputs", "error", "words"),
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
def test_what_cannot_enter_a_key_is_refused(inputs, error, words):
    with pytest.raises(error, match=words):
        Artifact("demo", 1, inputs, print)


def test_upstream_artifact_enters_as_its_key():
    first, second = demo(seed=1), demo(seed=2)
    below = Artifact("below", 1, {"rows": {"from": [first]}}, print)
    assert below.recipe["inputs"] == {"rows": {"from": [first.key]}}
    assert below.key != Artifact("below", 1, {"rows": {"from": [second]}}, print).key


def test_computed_once_then_found(tmp_path, monkeypatch):
    calls, told_of = [], []
    monkeypatch.setattr(events, "tell", lambda **told: told_of.append(tuple(told.values())[:3]))
    one = demo(calls, x=1)
    assert not finished(one)
    folder = one.get()
    assert finished(one) and folder == tmp_path / "artifacts" / one.key
    assert demo(calls, x=1).get() == folder and len(calls) == 1
    assert told_of == [(event, "demo", one.key) for event in ("start", "done", "hit")]
    assert one.json() == {"reward": 0.1}
    assert one.csv("sub/rows.csv").reward[0] == 0.30000000000000004
    assert sorted(p.name for p in (tmp_path / "artifacts").iterdir()) == [
        one.key,
        f"{one.key}.lock",
    ]


def test_manifest_says_what_was_done():
    one = demo(x=1.0)
    manifest = one.manifest
    assert [manifest[name] for name in ("stage", "version", "inputs", "key")] == [
        "demo",
        1,
        {"x": 1},
        one.key,
    ]
    assert (
        manifest["facts"] == {"rows": 1}
        and manifest["seconds"] >= 0
        and manifest["created"].endswith("+00:00")
    )
    assert "numpy" in manifest["packages"] and "pytest" not in manifest["packages"]
    assert manifest["hardware"]["cores"] >= 1 and manifest["hardware"]["memory_gib"] > 0.1
    assert manifest["git"] is None
    assert sorted(manifest["files"]) == ["result.json", "sub/rows.csv"]
    content = (one.get() / "result.json").read_bytes()
    assert manifest["files"]["result.json"] == {
        "sha256": hashlib.sha256(content).hexdigest(),
        "bytes": len(content),
    }


def test_manifest_names_the_commit(tmp_path):
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    (tmp_path / ".gitignore").write_text("artifacts\n")
    subprocess.run([*git, "add", ".gitignore"], check=True)
    subprocess.run([*git, "commit", "-qm", "x"], check=True)
    first = demo(x=1).manifest["git"]
    assert len(first["commit"]) == 40 and first["dirty"] is False
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "new.svg").touch()
    assert demo(x=3).manifest["git"]["dirty"] is False, "a figure is a result"
    (tmp_path / "new.py").touch()
    assert demo(x=2).manifest["git"] == {"commit": first["commit"], "dirty": True}


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
    assert sorted(p.name for p in folder.rglob("*") if p.is_file()) == [
        "manifest.json",
        "result.json",
    ]


def test_exception_keeps_the_partial_work(tmp_path):
    def make(folder):
        seen = (folder / "step").exists()
        (folder / "step").write_text("1")
        if not seen:
            raise RuntimeError("boom")
        return {"resumed": seen}

    one = Artifact("fragile", 1, {}, make)
    with pytest.raises(RuntimeError, match="boom"):
        one.get()
    assert not finished(one) and (tmp_path / "artifacts" / f"{one.key}.partial" / "step").exists()
    assert artifacts._upstream == []
    assert one.manifest["facts"] == {"resumed": True}


def test_kill_in_the_middle_then_resume(tmp_path):
    """kill -9 after two of four steps: nothing is published, and the next attempt does the other
    two.
    """
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
    left = sorted(p.name.split(".")[-1] for p in (tmp_path / "artifacts").iterdir())
    assert left == ["lock", "partial"]
    process = child(tmp_path, code)
    out, err = process.communicate(timeout=30)
    assert out.split("\n")[:3] == ["step2", "step3", "{'found': 2}"], err


def test_two_processes_compute_once(tmp_path):
    code = """
events.tell = lambda **told: print(told["event"])
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
    (out1, err1), (out2, err2) = first.communicate(timeout=30), second.communicate(timeout=30)
    assert out1.split()[0] == "done" and out2.split()[0] == "hit", err1 + err2
    assert out1.split()[1] == out2.split()[1]
    assert counter.read_text() == "x"
    assert "which another process is computing" in err2 and err2.count("waiting for shared-") == 1


def test_never_names_what_to_run(tmp_path, monkeypatch):
    monkeypatch.setenv("COMPUTE", "never")
    one = demo(x=1)
    told = rf"'demo': {one.key} .*make reproduce.*beyond_dpo.notebook.run NB --profile P"
    with pytest.raises(MissingArtifact, match=told):
        one.get()
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setenv("COMPUTE", "sometimes")
    with pytest.raises(ValueError, match="COMPUTE=sometimes"):
        one.get()


def test_frozen_is_enough_for_never_and_ignored_by_cold(tmp_path, monkeypatch):
    calls = []
    one = demo(calls, x=1)
    one.get()
    frozen = artifacts.freeze(one.key)
    shutil.rmtree(tmp_path / "artifacts")
    monkeypatch.setenv("COMPUTE", "never")
    assert one.get() == frozen == tmp_path / "frozen" / one.key and len(calls) == 1
    monkeypatch.setenv("COMPUTE", "plan")
    with pytest.raises(artifacts.MissingArtifact, match="COMPUTE=plan forbids computing"):
        one.get()
    monkeypatch.setenv("COMPUTE", "cold")
    assert one.get().parent == tmp_path / "artifacts" and len(calls) == 2


def test_upstream_is_everything_that_an_artifact_is_made_from_once_in_an_order_of_making():
    a = demo([], x=1)
    b, c = demo([], on=[a, {"too": a}]), demo([], x=2)
    d = demo([], on={"left": (b, c), "right": a})
    assert list(a.upstream) == [a.key] and list(b.upstream) == [a.key, b.key]
    order = list(d.upstream)
    assert sorted(order) == sorted([a.key, b.key, c.key, d.key]) and order[-1] == d.key
    assert order.index(a.key) < order.index(b.key) and d.upstream[c.key] is c


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


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_damage_is_noticed_in_both_places(damage, monkeypatch, caplog):
    calls = []
    one = demo(calls, x=1)
    one.get()
    frozen = artifacts.freeze(one.key)
    damage(one.get())
    new_process()
    monkeypatch.setenv("COMPUTE", "never")
    with pytest.raises(DamagedArtifact, match=DAMAGE[damage]):
        one.get()
    monkeypatch.setenv("COMPUTE", "cold")
    with caplog.at_level(logging.WARNING):
        one.get()
    assert (
        len(calls) == 2
        and one.json() == {"reward": 0.1}
        and caplog.text.count("to be computed again") == 1
    )
    shutil.rmtree(one.get())
    damage(frozen)
    new_process()
    monkeypatch.setenv("COMPUTE", "auto")
    with pytest.raises(DamagedArtifact, match=DAMAGE[damage] + r".*restore .* with git"):
        one.get()
    assert len(calls) == 2


def test_damaged_copy_gives_way_to_the_frozen_one(tmp_path):
    calls = []
    one = demo(calls, x=1)
    flip_later = one.get()
    frozen = artifacts.freeze(one.key)
    flip(flip_later)
    new_process()
    assert one.get() == frozen and len(calls) == 1 and not flip_later.exists()


def test_another_artifacts_folder_is_not_taken(tmp_path):
    one, two = demo(x=1), demo(x=2)
    one.get().rename(tmp_path / "artifacts" / two.key)
    assert two.get().name == two.key and two.manifest["inputs"] == {"x": 2}


@pytest.mark.parametrize(("limit", "where"), [(4096, "make"), (600, "manifest")])
def test_full_disk_publishes_nothing(tmp_path, limit, where):
    """A limit on file sizes fails like a full disk, once inside `make` and once at the manifest;
    then there is room.
    """
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
    assert sorted(p.name.split(".")[-1] for p in (tmp_path / "artifacts").iterdir()) == [
        "lock",
        "partial",
    ]
    out, err = child(tmp_path, code, SIZE=size, LIMIT="0").communicate(timeout=30)
    folder = tmp_path / "artifacts" / out.strip()
    assert (folder / "large").stat().st_size == int(size), err
    assert json.loads((folder / "manifest.json").read_text())["files"].keys() == {"small", "large"}


def test_freeze_refuses_large_and_missing(tmp_path):
    one = demo(x=1)
    with pytest.raises(MissingArtifact, match="compute it first"):
        artifacts.freeze(one.key)
    one.get()
    with pytest.raises(ValueError, match=r"has [\d,]+ bytes, more than the 50 allowed"):
        artifacts.freeze(one.key, max_bytes=50)
    assert not (tmp_path / "frozen").exists()
    copy = artifacts.freeze(one.key)
    assert artifacts.freeze(one.key) == copy
    assert [p.name for p in (tmp_path / "frozen").iterdir()] == [one.key]
    assert (copy / "sub" / "rows.csv").read_bytes() == (one.get() / "sub" / "rows.csv").read_bytes()


def test_import_is_light():
    heavy = "{'torch', 'transformers', 'pandas', 'numpy'}"
    code = f"import sys, beyond_dpo.pipeline.artifacts; print(sorted({heavy} & set(sys.modules)))"
    env = os.environ | {"PYTHONPATH": str(LIB)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_the_hash_of_a_large_file_says_what_is_read(tmp_path, monkeypatch, capsys):
    """A model's folder of many gigabytes was read without a word."""
    monkeypatch.delenv("TQDM_DISABLE")
    monkeypatch.setattr(events, "SLOW", 0.1)
    of = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda *given: time.sleep(0.4) or of(*given))
    small, large = tmp_path / "small", tmp_path / "large"
    small.write_bytes(b"x")
    large.write_bytes(b"x")
    os.truncate(large, artifacts.LARGE)
    artifacts.sha256(small)
    assert capsys.readouterr().err == ""
    found = artifacts.sha256(large)
    assert capsys.readouterr().err == f"reading {large} for its hash, 0.1 GB\n"
    assert found == hashlib.sha256(large.read_bytes()).hexdigest() == artifacts.sha256(large)
    assert capsys.readouterr().err == ""


def test_precision_is_told_by_what_a_result_was_made_from():
    """By its own recipe or by that of anything below it; the dtype of the saved weights says
    nothing.
    """

    def train(precision):
        settings = {"precision": precision, "save_dtype": "float32"}
        return Artifact("train", 1, {"settings": settings}, lambda folder: None)

    def above(stage, one):
        return Artifact(stage, 1, {"of": [one]}, lambda folder: one.get() and None)

    single, double = (
        Artifact("responses", 1, {"decoding": {"dtype": d}}, lambda folder: None)
        for d in ("float32", "bfloat16")
    )
    for one in (train("fp32"), train("bf16"), single, double):
        one.get()
    assert artifacts.in_float32([train("fp32").key]) and artifacts.in_float32([single.key])
    assert not artifacts.in_float32([train("bf16").key, double.key, "train-0123456789abcdef"])
    for precision, told in {"fp32": True, "bf16": False}.items():
        whole = above("curves", above("scores", train(precision)))
        whole.get()
        assert artifacts.in_float32([whole.key]) is told
