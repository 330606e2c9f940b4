"""What a run needs, estimated: against measured runs of SmolLM2-135M and a real model's sizes; refused in time."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import types

import nbformat
import pytest

from beyond_dpo import config, estimate, expo, paths, progress, published, run, stages
from beyond_dpo.estimate import Shape, training

MEASURED = json.loads((paths.FROZEN / "benchmarks" / "estimate.json").read_text())
SMOLLM2 = estimate.shape(MEASURED["model"])
PAIR = {"prompt": 16, "said": 48, "names": 2}


def settings(about):
    given = {"lr": 1e-6, "loss": "simpo", "global_batch": about["rows"], "micro_batch": about["rows"]}
    return config.Train(**given | about["settings"])


def gib(about):
    found = training(SMOLLM2, settings(about), about["prompt"], about["said"], about["names"])
    return found["host"] + settings(about).processes * found["device"]


def test_there_are_measured_runs():
    assert len(MEASURED["train"]) == 11 and len(MEASURED["generate"]) == 2 and MEASURED["hardware"]["cores"] == 2


@pytest.mark.parametrize("name", MEASURED["train"])
def test_memory_of_measured_trainings(name):
    """Within 20 %, of one process and of two together: plain, long rows, recomputed, adapter, sharded, offloaded."""
    about = MEASURED["train"][name]
    assert gib(about) == pytest.approx(about["gib"], rel=0.2)


def test_memory_is_estimated_in_the_right_order():
    """What was measured to need more is estimated to need more, wherever two runs differ by a quarter."""
    runs = list(MEASURED["train"].values())
    pairs = [(a, b) for a in runs for b in runs if a["gib"] > 1.25 * b["gib"]]
    assert len(pairs) > 20 and all(gib(a) > gib(b) for a, b in pairs)


@pytest.mark.parametrize("kind", ["train", "generate"])
def test_seconds_of_measured_runs(kind):
    """Within a factor of 1.5, or 2.5 for two processes on two cores, with the speed that was measured beside them."""
    for name, about in MEASURED[kind].items():
        tokens = (about["prompt"], about["said"])
        if kind == "train":
            work = {"train": settings(about), "rows": 4 * about["rows"], "tokens": tokens, "names": about["names"]}
        else:
            work = {"decoding": config.Decoding(), "requests": about["requests"], "tokens": tokens}
        ratio = estimate.seconds(SMOLLM2, work, MEASURED["speed"]) / about["seconds"]
        most = 2.5 if "of 2" in name else 1.5
        assert 1 / most < ratio < most, (name, ratio)


def test_sizes_are_those_of_the_real_model(tiny):
    from transformers import AutoModelForCausalLM

    found = estimate.shape(json.loads((tiny / "config.json").read_text()))
    model = AutoModelForCausalLM.from_pretrained(tiny)
    assert found.weights == sum(p.numel() for p in model.parameters())
    assert found.body == found.weights - 512 * 64, "the tied embeddings are the head"
    assert (found.layers, found.hidden, found.intermediate, found.vocabulary) == (2, 64, 128, 512)
    assert found.cache == 2 * 2 * 2 * 32 * 2, "layers × (keys, values) × 2 heads × 32 × 2 bytes"
    assert SMOLLM2.weights == 134_515_008


def test_an_adapter_has_the_weights_that_are_counted(tiny):
    import torch
    from transformers import AutoModelForCausalLM

    from beyond_dpo import lora

    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    lora.inject(model, 4, 16.0)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert estimate.adapter(estimate.shape(json.loads((tiny / "config.json").read_text())), 4) == trained


def test_what_saves_memory_by_hand():
    """2^30 weights, no activations: float32 weights, gradients and Adam are 4 + 4 + 8 GiB; bf16 keeps 2 GiB more."""
    one = Shape(weights=2**30, body=2**30, layers=1, hidden=1, intermediate=1, vocabulary=1, cache=1, linear=1)
    plain = config.Train(lr=1.0, global_batch=1, micro_batch=1, precision="fp32")

    def device(**changes):
        return training(one, dataclasses.replace(plain, **changes), 1, 1, 2)["device"]

    assert device() == pytest.approx(16, abs=1e-4)
    assert device(precision="bf16") == pytest.approx(18, abs=1e-4)
    assert device(optimizer="rmsprop") == pytest.approx(12, abs=1e-4)
    buckets, live = 4 * 2.5 * 5e8 / 2**30, 4e9 / 2**30
    assert device(zero=1, processes=4) == pytest.approx(4 + 4 + 12 / 4 + buckets, abs=1e-4), "the optimizer has a copy"
    assert device(zero=3, processes=4) == pytest.approx((4 + 4 + 12) / 4 + buckets + live, abs=1e-4)
    assert device(zero=2, offload=True) == pytest.approx(8 + buckets, abs=1e-4)
    host = training(one, dataclasses.replace(plain, zero=2, offload=True), 1, 1, 2)["host"]
    assert host == pytest.approx(12 + estimate.PROCESS["train"], abs=1e-3)


@pytest.mark.parametrize("name", MEASURED["generate"])
def test_memory_of_measured_samplings(name):
    work = {"decoding": config.load("expo", "cpu").decoding}
    found = estimate.memory(SMOLLM2, work, gpus=False)
    assert found["host"] == pytest.approx(MEASURED["generate"][name]["gib"], rel=0.15) and found["device"] == 0


@pytest.mark.parametrize("numbers, held", [((31, 32, 33, 34, 35), 11), ((21, 22, 23, 24, 25, 26), 20)])
def test_disk_of_measured_papers(store, monkeypatch, numbers, held):
    """README: the results of WRPO hold 11 GB, those of MallowsPO 20; from what their notebooks name, all missing."""
    monkeypatch.setattr(estimate, "measured", lambda models: ({"smollm2": SMOLLM2}, MEASURED["speed"]))
    named = []
    for (path,) in (run.find([str(number)]) for number in numbers):
        nb = nbformat.read(path, as_version=4)
        named += progress.planned(nb, run.parameters(nb, path.stem) | {"profile": "cpu"})[1]
    found = estimate.of(named)
    assert found["disk"] * 2**30 / 1e9 == pytest.approx(held, rel=0.1) and 37 <= found["trainings"] <= 38


def test_what_is_there_is_not_counted_again(store, monkeypatch):
    cfg = config.load("expo", "smoke")
    monkeypatch.setattr(estimate, "measured", lambda models: ({}, MEASURED["speed"]))
    whole = estimate.of([expo.curves(cfg)])
    assert whole["trainings"] == 1 + len(expo.runs(cfg))
    assert whole["unknown"] == ["tiny", "tiny-encoder"] and whole["hours"] == 0, "their config.json is not here"
    stages.sft(cfg).get()
    assert estimate.of([expo.curves(cfg)])["trainings"] == whole["trainings"] - 1
    left = estimate.of([stages.sft(cfg)])
    assert left.pop("unknown") == [] and not any(left.values())


BIG = Shape(weights=8 * 10**9, body=7 * 10**9, layers=32, hidden=4096, intermediate=14336, vocabulary=128256,
            cache=131072, linear=2_600_000)  # fmt: skip


def test_a_job_that_does_not_fit_is_refused_with_numbers_and_what_to_do(store, monkeypatch):
    monkeypatch.setattr(estimate, "measured", lambda models: (dict.fromkeys(models, BIG), MEASURED["speed"]))
    monkeypatch.setattr(estimate, "_disk", lambda: types.SimpleNamespace(free=1e12))
    cfg = dataclasses.replace(config.load("expo", "smoke"), profile="cpu")
    with pytest.raises(config.ConfigError, match=r"about 1\d\d\.\d GiB of memory \(found \d+\.\d\): set train.micro_b"):
        estimate.check(cfg, expo.curves(cfg))
    speed = MEASURED["speed"] | {"gpus": 1}
    monkeypatch.setattr(estimate, "measured", lambda models: (dict.fromkeys(models, BIG), speed))
    monkeypatch.setattr(estimate, "cards", lambda: [80.0])
    monkeypatch.setattr(estimate.workers, "memory_gib", lambda: 256.0)
    with pytest.raises(config.ConfigError, match=r"about 1\d\d\.\d GiB of a card \(found 80\.0\): .*tensor_parallel"):
        estimate.check(cfg, expo.curves(cfg))


def test_a_published_pair_up_to_8b_fits_on_one_card(store, monkeypatch):
    """Profile gpu, experiment hub: it trains nothing, so only an engine's share and a reward model's rest count."""
    monkeypatch.setenv("COMPUTE", "plan")
    speed = MEASURED["speed"] | {"gpus": 1}
    monkeypatch.setattr(estimate, "measured", lambda models: (dict.fromkeys(models, BIG), speed))
    found = estimate.of([published.off_the_shelf(config.load("expo", "gpu", "hub"))])
    assert found["trainings"] == 0 and 30 < found["device"] < 80 and found["samplings"] == 6
    nodes = {"decoding": config.Decoding(tensor_parallel=8)}
    assert estimate.memory(BIG, nodes, gpus=True)["device"] < found["device"] / 3


def test_the_runner_says_what_it_takes_and_refuses(tmp_path):
    """On a disk of 50 MB: a dry run says that it does not fit, a run is refused before anything starts."""
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=50m", "tmpfs", small], capture_output=True).returncode:
        pytest.skip("no disk can be mounted here")
    try:
        env = os.environ | {"BEYOND_DPO_ARTIFACTS": str(small), "COMPUTE": "cold"}
        command = [sys.executable, "-m", "beyond_dpo.run", "31", "--profile", "cpu"]
        dry = subprocess.run([*command, "--dry-run"], env=env, capture_output=True, text=True)
        told = dry.stdout.splitlines()
        assert dry.returncode == 0 and any("17 trainings" in line for line in told[-2:]), dry.stderr
        if any("without smollm2" in line for line in told):
            pytest.skip("the SmolLM2 asset has not been unpacked on this machine")
        assert re.fullmatch(r"does not fit: about \d+\.\d GiB of disk \(found 0\.0\)", told[-1]), told[-2:]
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        assert done.returncode == 2 and not list(small.iterdir())
        assert "estimate: 17 trainings" in done.stderr and "--force runs it all the same" in done.stderr
    finally:
        subprocess.run(["umount", small], check=True)
