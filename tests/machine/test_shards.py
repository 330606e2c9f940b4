"""Sampling and scoring by shards: the same bytes from any number of processes and after kill -9;
adapters.
"""

import dataclasses
import json
import os
import signal
import threading
import time

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

from beyond_dpo import extrapolate, lora, scoring
from beyond_dpo.machine import launch, paths, shards, spread, workers
from beyond_dpo.pipeline import config, expo, stages


def cut(**changes):
    """Smoke with shards of two prompts: three for its six dev prompts, eight for the sixteen that
    make pairs.
    """
    one = {"fractions": [1.0], "alphas": {1.0: [0, 2]}, "seeds": [0], "seed_fractions": []}
    return config.load("expo", "smoke", decoding__shard=2, **one, **changes)


def test_parts_by_hand(tmp_path):
    files = shards.parts(tmp_path / "out.jsonl", 5, 2)
    assert [file.name for file in files] == [
        ".out.jsonl-0of3",
        ".out.jsonl-1of3",
        ".out.jsonl-2of3",
    ]
    assert len(shards.parts(tmp_path / "out.jsonl", 0, 2)) == 1, "no prompt is one empty shard"
    assert [shards.left(files, rank, 2) for rank in (0, 1)] == [[0, 2], [1]]
    for k in (2, 0):
        files[k].write_text(f'{{"response_ids": [{k}]}}\n')
    assert shards.left(files, 0, 1) == [1]
    with pytest.raises(
        ValueError, match="1 of 3 shards are missing, such as .out.jsonl-1of3: run again"
    ):
        shards.merge(tmp_path / "out.jsonl", files)
    assert not (tmp_path / "out.jsonl").exists()
    files[1].write_text('{"response_ids": [1, 1]}\n')
    rows = shards.merge(tmp_path / "out.jsonl", files)
    assert [row["response_ids"] for row in rows] == [[0], [1, 1], [2]], "in order"
    assert shards.counted(rows) == {"responses": 3, "tokens": 4} and os.listdir(tmp_path) == [
        "out.jsonl"
    ]


def test_devices(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert spread.devices(1, 2) == {"CUDA_VISIBLE_DEVICES": "2,3"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    assert [spread.devices(i, 2)["CUDA_VISIBLE_DEVICES"] for i in (0, 1)] == ["4,5", "6,7"]


def test_only_a_shard_size_of_its_own_enters_a_key():
    plain = config.load("expo", "smoke").decoding
    assert (
        "shard" not in plain.recipe() and dataclasses.replace(plain, shard=4).recipe()["shard"] == 4
    )
    for machine in (
        {"engines": 4},
        {"tensor_parallel": 2},
        {"gpu_share": 0.2},
        {"launcher": "torchrun"},
    ):
        assert dataclasses.replace(plain, **machine).recipe() == plain.recipe()
    assert set(plain.recipe()) == {f.name for f in dataclasses.fields(plain)} - {
        "shard",
        *plain.MACHINE,
    }


@pytest.fixture(scope="module")
def made(store):
    """Return the scores of one point, made by one process, and their bytes."""
    cfg = cut()
    scores = expo.point(cfg, 1.0, 0, 2.0, "dev_prompts")
    responses = scores.inputs["responses"]
    held = [(a.get() / f"{a.stage}.jsonl").read_bytes() for a in (responses, scores)]
    assert len(held[0].splitlines()) == 6 and not list(responses.get().glob(".*")), (
        "no shard is left"
    )
    workers.close()
    return responses, scores, held


def again(made, monkeypatch, tmp_path, **changes):
    """Make the same point in a store without it, otherwise; return its bytes."""
    responses, scores, _ = made
    for artifact in (responses, scores):
        os.rename(paths.ARTIFACTS / artifact.key, tmp_path / artifact.key)
    new = expo.point(cut(**changes), 1.0, 0, 2.0, "dev_prompts")
    assert (new.key, new.inputs["responses"].key) == (scores.key, responses.key), (
        "the machine is not in a key"
    )
    return [(a.get() / f"{a.stage}.jsonl").read_bytes() for a in (new.inputs["responses"], new)]


def test_two_living_engines_give_the_bytes_of_one(made, monkeypatch, tmp_path):
    assert again(made, monkeypatch, tmp_path, decoding__engines=2) == made[2]
    assert {"generate", "generate1", "score", "score1"} <= workers.living.keys()
    assert workers.living["generate"].child.pid != workers.living["generate1"].child.pid
    workers.close()


def test_a_job_of_two_processes_gives_the_bytes_of_one(made, monkeypatch, tmp_path):
    """As on many nodes: torchrun starts an engine for each process, which takes every second
    shard.
    """
    changes = {"decoding__engines": 2, "decoding__launcher": "torchrun"}
    assert again(made, monkeypatch, tmp_path, **changes) == made[2]
    assert "generate" not in workers.living
    workers.close()


def test_an_engine_killed_in_the_middle_keeps_the_shards_it_made(made, monkeypatch, tmp_path):
    responses, seen = made[0], []
    partial = paths.ARTIFACTS / f"{responses.key}.partial"

    def kill():
        end = time.monotonic() + 120
        while time.monotonic() < end and not list(partial.glob(".responses.jsonl-*")):
            time.sleep(0.002)
        seen.extend(partial.glob(".responses.jsonl-*"))
        os.kill(workers.living["generate"].child.pid, signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    with pytest.raises(launch.JobFailed, match="generate: the worker died with status -9"):
        again(made, monkeypatch, tmp_path)
    thread.join()
    left = {path.name: path.stat().st_mtime_ns for path in partial.glob(".responses.jsonl-*")}
    assert 0 < len(seen) <= len(left) < 3, left
    kept, merge = {}, shards.merge

    def watch(out, files):  # this process merges, since two engines made the shards
        kept.update({file.name: file.stat().st_mtime_ns for file in files})
        return merge(out, files)

    monkeypatch.setattr(shards, "merge", watch)
    new = expo.point(cut(decoding__engines=2), 1.0, 0, 2.0, "dev_prompts")
    assert [
        (a.get() / f"{a.stage}.jsonl").read_bytes() for a in (new.inputs["responses"], new)
    ] == made[2]
    assert {name: kept[name] for name in left} == left, "a shard that was there is not made again"
    workers.close()


# ---- adapters


@pytest.fixture(scope="module")
def adapter(tiny, tmp_path_factory):
    """A random adapter of rank 2 for every linear layer of the tiny model, large enough to change
    what it says.
    """
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("adapter")
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    torch.manual_seed(0)
    lora.inject(model, 2, 4.0)
    moved = {
        name: 0.5 * torch.randn(w.shape) for name, w in model.named_parameters() if w.requires_grad
    }
    lora.save(model, moved, folder)
    return folder


def test_scaling_an_adapter_is_expo(tiny, adapter, tmp_path):
    """θ₀ + (1 + α)sBA is extrapolate.blend(θ₀, θ₁, α) of the merged model, and the scaled adapter
    merged by peft.
    """
    import peft
    from transformers import AutoModelForCausalLM

    start = load_file(tiny / "model.safetensors")
    merged = dict(lora.tensors(tiny, adapter, 0.0))
    lora.scaled(adapter, {1.5: tmp_path / "a", -1.0: tmp_path / "b"})
    assert (tmp_path / "a" / lora.WEIGHTS).samefile(adapter / lora.WEIGHTS), "linked, not copied"
    for alpha, folder in ((1.5, "a"), (-1.0, "b")):
        model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
        theirs = (
            peft.PeftModel.from_pretrained(model, tmp_path / folder).merge_and_unload().state_dict()
        )
        ours = dict(lora.tensors(tiny, adapter, alpha))
        assert ours.keys() == start.keys()
        moved = [name for name in ours if not torch.equal(ours[name], start[name])]
        assert len(moved) == (14 if alpha > 0 else 0)
        for name, weight in ours.items():
            wanted = extrapolate.blend(start[name], merged[name], alpha)
            torch.testing.assert_close(weight, wanted, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(weight, theirs[name], rtol=1e-5, atol=1e-5)
    only_mlp = dict(lora.tensors(tiny, adapter, 0.0, {"*.mlp.*": 1.0}))
    moved = [n for n in merged if not torch.equal(only_mlp[n], merged[n])]
    assert len(moved) == 6 and all(".mlp." in n for n in moved)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"use_dora": True}, r"more than s·BA \(use_dora\): merge it"),
        ({"bias": "all"}, r"more than s·BA \(all\)"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ],
)
def test_an_adapter_that_is_more_than_a_product_is_refused(
    tiny, adapter, tmp_path, change, message
):
    settings = json.loads((adapter / lora.CONFIG).read_text()) | change
    (tmp_path / lora.CONFIG).write_text(json.dumps(settings))
    os.link(adapter / lora.WEIGHTS, tmp_path / lora.WEIGHTS)
    for use in (
        lambda: lora.scaled(tmp_path, {1: tmp_path / "out"}),
        lambda: lora.tensors(tiny, tmp_path, 1.0),
    ):
        with pytest.raises(ValueError, match=message):
            use()


def test_adapters_of_other_models_and_those_that_add_nothing_are_refused(tiny, adapter, tmp_path):
    (tmp_path / lora.CONFIG).write_text((adapter / lora.CONFIG).read_text())
    weights = load_file(adapter / lora.WEIGHTS)
    save_file({n: w * 0 for n, w in weights.items()}, tmp_path / lora.WEIGHTS)
    with pytest.raises(extrapolate.IncompatibleModels, match="there is no direction to follow"):
        lora.tensors(tiny, tmp_path, 1.0)
    save_file(
        {n.replace("layers.1", "layers.7"): w for n, w in weights.items()}, tmp_path / lora.WEIGHTS
    )
    with pytest.raises(
        extrapolate.IncompatibleModels, match=r"adds .* to model.layers.7.*, in .* it is None"
    ):
        lora.tensors(tiny, tmp_path, 1.0)
    with pytest.raises(
        ValueError, match=r"no model.safetensors or index in .*; adapters: lora.scaled"
    ):
        extrapolate.check(tiny, adapter)
    with pytest.raises(config.ConfigError, match="sft.lora_rank"):
        config.load("expo", "smoke", sft__lora_rank=4)


def test_a_trained_adapter_is_sampled_at_each_alpha(store, tiny):
    """Real training with lora_rank; the log-probability of each response is that under θ₀ + (1 +
    α)sBA.
    """
    from transformers import AutoModelForCausalLM

    cfg = cut(train__lora_rank=2, train__lr=0.05, decoding__temperature=0.5)
    start, adapter = stages.sft(cfg), stages.aligned(cfg, 1.0, 0)
    said = {}
    for alpha in (0.0, 2.0):
        sampled = expo.point(cfg, 1.0, 0, alpha, "dev_prompts").inputs["responses"]
        table = pd.read_json(sampled.get() / "responses.jsonl", lines=True)
        said[alpha] = table["response_ids"].tolist()
        model = AutoModelForCausalLM.from_pretrained(start.get(), dtype=torch.float32)
        model.load_state_dict(dict(lora.tensors(start.get(), adapter.get(), alpha)), strict=False)
        prompts = stages.texts(cfg.world).json("dev_prompts.json")
        rows = [
            {"id": prompt["id"], "prompt_ids": prompt["prompt_ids"], "responses": {"said": ids}}
            for prompt, ids in zip(prompts, said[alpha], strict=True)
        ]
        scores = scoring.ResponseScorer(model).score(rows, ["said"], 2)
        np.testing.assert_allclose(
            scores["logps"].detach().flatten().numpy(), table["logp"], atol=1e-3
        )
    assert said[0.0] != said[2.0] and len(said[0.0]) == 6
    workers.close()
