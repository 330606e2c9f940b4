"""Sampling and scoring by shards, and adapters of low rank.

Any number of processes gives the same bytes, also after kill -9.
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


def settings(**changes):
    """Return smoke with shards of two prompts.

    These are three for its six dev prompts, and eight for the sixteen that make pairs.
    """
    return config.load(
        "expo",
        "smoke",
        decoding__shard=2,
        fractions=[1.0],
        alphas={1.0: [0, 2]},
        seeds=[0],
        fewer_seeds={},
        **changes,
    )


# ---- cutting


def test_parts_have_a_file_for_each_shard(tmp_path):
    files = shards.parts(tmp_path / "out.jsonl", 5, 2)
    names = [file.name for file in files]
    assert names == [".out.jsonl-0of3", ".out.jsonl-1of3", ".out.jsonl-2of3"]


def test_no_prompt_is_one_empty_shard(tmp_path):
    assert len(shards.parts(tmp_path / "out.jsonl", 0, 2)) == 1


def test_processes_take_shards_in_turn_and_none_that_is_made(tmp_path):
    files = shards.parts(tmp_path / "out.jsonl", 5, 2)
    assert shards.left(files, 0, 2) == [0, 2]
    assert shards.left(files, 1, 2) == [1]
    for shard in (0, 2):
        files[shard].touch()
    assert shards.left(files, 0, 1) == [1]


def test_shards_are_merged_in_order_once_all_are_made(tmp_path):
    out = tmp_path / "out.jsonl"
    files = shards.parts(out, 5, 2)
    files[2].write_text('{"response_ids": [2]}\n')
    files[0].write_text('{"response_ids": [0]}\n')
    message = "1 of 3 shards are missing, such as .out.jsonl-1of3: run again"
    with pytest.raises(ValueError, match=message):
        shards.merge(out, files)
    assert not out.exists()
    files[1].write_text('{"response_ids": [1, 1]}\n')
    rows = shards.merge(out, files)
    assert [row["response_ids"] for row in rows] == [[0], [1, 1], [2]]
    assert shards.counted(rows) == {"responses": 3, "tokens": 4}
    assert os.listdir(tmp_path) == ["out.jsonl"]


def test_devices_of_a_process_are_its_part_of_those_it_sees(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert spread.devices(1, 2) == {"CUDA_VISIBLE_DEVICES": "2,3"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    assert spread.devices(0, 2) == {"CUDA_VISIBLE_DEVICES": "4,5"}
    assert spread.devices(1, 2) == {"CUDA_VISIBLE_DEVICES": "6,7"}


def test_only_a_shard_size_of_its_own_enters_a_key():
    plain = config.load("expo", "smoke").decoding
    cut = dataclasses.replace(plain, shard=4)
    assert "shard" not in plain.recipe()
    assert cut.recipe()["shard"] == 4
    fields = {field.name for field in dataclasses.fields(plain)}
    assert set(plain.recipe()) == fields - {"shard", *plain.MACHINE}


@pytest.mark.parametrize(
    "name, value",
    [("engines", 4), ("tensor_parallel", 2), ("gpu_share", 0.2), ("launcher", "torchrun")],
)
def test_the_machine_enters_no_key(name, value):
    plain = config.load("expo", "smoke").decoding
    changed = dataclasses.replace(plain, **{name: value})
    assert changed.recipe() == plain.recipe()


# ---- one point, made by one process and by several


def contents(scores):
    """Return the bytes of a point's responses and scores, computed if they are missing."""
    responses = scores.inputs["responses"]
    responses_file = responses.get() / "responses.jsonl"
    scores_file = scores.get() / "scores.jsonl"
    return responses_file.read_bytes(), scores_file.read_bytes()


def dev_point(cfg):
    return expo.point(cfg, 1.0, 0, 2.0, "dev_prompts")


@pytest.fixture(scope="module")
def made(store):
    """Return the scores of one point, made by one process, and the bytes of its files."""
    scores = dev_point(settings())
    expected = contents(scores)
    assert len(expected[0].splitlines()) == 6
    folder = scores.inputs["responses"].get()
    assert not list(folder.glob(".*")), "no shard is left"
    workers.close()
    return scores, expected


@pytest.fixture
def emptied(made, tmp_path):
    """Take the point out of the store; return its scores and the bytes of its files."""
    scores, _ = made
    for artifact in (scores.inputs["responses"], scores):
        os.rename(paths.ARTIFACTS / artifact.key, tmp_path / artifact.key)
    yield made
    workers.close()


def test_the_machine_of_a_point_is_not_in_its_key(made):
    scores, _ = made
    again = dev_point(settings(decoding__engines=2, decoding__launcher="torchrun"))
    assert again.key == scores.key
    assert again.inputs["responses"].key == scores.inputs["responses"].key


def test_a_job_of_two_processes_gives_the_bytes_of_one(emptied):
    """As on many nodes: torchrun starts an engine for each process.

    Each takes every second shard.
    """
    _, expected = emptied
    cfg = settings(decoding__engines=2, decoding__launcher="torchrun")
    assert contents(dev_point(cfg)) == expected
    assert "generate" not in workers.living


def made_at(files):
    """Return {name: when it was made} of files."""
    return {file.name: file.stat().st_mtime_ns for file in files}


def test_an_engine_killed_in_the_middle_keeps_the_shards_it_made(emptied, monkeypatch):
    """Two living engines make those that are left, and all have the bytes of one engine."""
    scores, expected = emptied
    partial = paths.ARTIFACTS / f"{scores.inputs['responses'].key}.partial"
    pattern = ".responses.jsonl-*"
    seen = []

    def kill():
        end = time.monotonic() + 120
        while not seen and time.monotonic() < end:
            time.sleep(0.002)
            seen.extend(partial.glob(pattern))
        os.kill(workers.living["generate"].child.pid, signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    with pytest.raises(launch.JobFailed, match="generate: the worker died with status -9"):
        contents(dev_point(settings()))
    thread.join()
    left = made_at(partial.glob(pattern))
    assert 0 < len(seen) <= len(left) < 3, left
    merged = {}
    merge = shards.merge

    def watched_merge(out, files):  # by this process, since two engines made the shards
        merged.update(made_at(files))
        return merge(out, files)

    monkeypatch.setattr(shards, "merge", watched_merge)
    assert contents(dev_point(settings(decoding__engines=2))) == expected
    assert left.items() <= merged.items(), "a shard that was there is not made again"
    living = workers.living
    assert {"generate", "generate1", "score", "score1"} <= living.keys()
    assert living["generate"].child.pid != living["generate1"].child.pid


# ---- adapters


@pytest.fixture(scope="module")
def adapter(tiny, tmp_path_factory):
    """Return a random adapter of rank 2 for every linear layer of the tiny model.

    It is large enough to change what the model says.
    """
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("adapter")
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    torch.manual_seed(0)
    lora.inject(model, 2, 4.0)
    weights = {}
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            weights[name] = 0.5 * torch.randn(weight.shape)
    lora.save(model, weights, folder)
    return folder


def changed(weights, others):
    """Return the names of the tensors that differ."""
    return [name for name in weights if not torch.equal(weights[name], others[name])]


def merged_by_peft(tiny, folder):
    import peft
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    merged = peft.PeftModel.from_pretrained(model, folder).merge_and_unload()
    return merged.state_dict()


@pytest.mark.parametrize("alpha, moved", [(1.5, 14), (-1.0, 0)])
def test_scaling_an_adapter_is_expo(tiny, adapter, tmp_path, alpha, moved):
    """θ₀ + (1 + α)sBA is extrapolate.blend(θ₀, θ₁, α) of the merged model.

    It is also the scaled adapter merged by peft.
    """
    theta_sft = load_file(tiny / "model.safetensors")
    theta_aligned = dict(lora.tensors(tiny, adapter, 0.0))
    scaled = tmp_path / str(alpha)
    lora.scaled(adapter, {1.5: tmp_path / "1.5", -1.0: tmp_path / "-1.0"})
    weights_file = scaled / lora.WEIGHTS
    assert weights_file.samefile(adapter / lora.WEIGHTS), "linked, not copied"
    by_peft = merged_by_peft(tiny, scaled)
    weights = dict(lora.tensors(tiny, adapter, alpha))
    assert weights.keys() == theta_sft.keys()
    assert len(changed(weights, theta_sft)) == moved
    for name, weight in weights.items():
        expected = extrapolate.blend(theta_sft[name], theta_aligned[name], alpha)
        torch.testing.assert_close(weight, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(weight, by_peft[name], rtol=1e-5, atol=1e-5)


def test_the_alpha_of_a_part_moves_only_its_tensors(tiny, adapter):
    theta_aligned = dict(lora.tensors(tiny, adapter, 0.0))
    only_mlp = dict(lora.tensors(tiny, adapter, 0.0, {"*.mlp.*": 1.0}))
    moved = changed(theta_aligned, only_mlp)
    assert len(moved) == 6
    assert all(".mlp." in name for name in moved)


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
    peft_settings = json.loads((adapter / lora.CONFIG).read_text())
    (tmp_path / lora.CONFIG).write_text(json.dumps(peft_settings | change))
    os.link(adapter / lora.WEIGHTS, tmp_path / lora.WEIGHTS)
    with pytest.raises(ValueError, match=message):
        lora.scaled(tmp_path, {1: tmp_path / "out"})
    with pytest.raises(ValueError, match=message):
        lora.tensors(tiny, tmp_path, 1.0)


def write_adapter(folder, adapter, weights):
    """Write other weights with the settings of an adapter."""
    (folder / lora.CONFIG).write_text((adapter / lora.CONFIG).read_text())
    save_file(weights, folder / lora.WEIGHTS)


def test_an_adapter_that_adds_nothing_is_refused(tiny, adapter, tmp_path):
    weights = load_file(adapter / lora.WEIGHTS)
    zeros = {name: 0 * weight for name, weight in weights.items()}
    write_adapter(tmp_path, adapter, zeros)
    with pytest.raises(extrapolate.IncompatibleModels, match="there is no direction to follow"):
        lora.tensors(tiny, tmp_path, 1.0)


def test_an_adapter_of_another_model_is_refused(tiny, adapter, tmp_path):
    renamed = {}
    for name, weight in load_file(adapter / lora.WEIGHTS).items():
        renamed[name.replace("layers.1", "layers.7")] = weight
    write_adapter(tmp_path, adapter, renamed)
    message = r"adds .* to model.layers.7.*, in .* it is None"
    with pytest.raises(extrapolate.IncompatibleModels, match=message):
        lora.tensors(tiny, tmp_path, 1.0)


def test_an_adapter_is_no_model(tiny, adapter):
    message = (
        r"no model.safetensors or index in .*; an adapter is merged, or scaled by .*lora.scaled"
    )
    with pytest.raises(ValueError, match=message):
        extrapolate.check(tiny, adapter)


def test_an_sft_model_is_no_adapter():
    with pytest.raises(config.ConfigError, match="sft.lora_rank"):
        config.load("expo", "smoke", sft__lora_rank=4)


def logps_at(theta_sft, adapter, alpha, prompts, responses):
    """Return the log-probability of each response under θ₀ + (1 + α)sBA (nats)."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(theta_sft, dtype=torch.float32)
    weights = dict(lora.tensors(theta_sft, adapter, alpha))
    model.load_state_dict(weights, strict=False)
    rows = []
    for prompt, response in zip(prompts, responses, strict=True):
        tokens = prompt["prompt_ids"]
        rows.append({"id": prompt["id"], "prompt_ids": tokens, "responses": {"it": response}})
    scores = scoring.ResponseScorer(model).score(rows, ["it"], 2)
    return scores["logps"].detach().flatten().numpy()


def test_a_trained_adapter_is_sampled_at_each_alpha(store):
    """The log-probability of each response is that under θ₀ + (1 + α)sBA, after real training."""
    cfg = settings(train__lora_rank=2, train__lr=0.05, decoding__temperature=0.5)
    theta_sft = stages.sft(cfg)
    adapter = stages.aligned(cfg, 1.0, 0)
    prompts = stages.texts(cfg.world).json("dev_prompts.json")
    responses = {}
    for alpha in (0.0, 2.0):
        sampled = expo.point(cfg, 1.0, 0, alpha, "dev_prompts").inputs["responses"]
        table = pd.read_json(sampled.get() / "responses.jsonl", lines=True)
        responses[alpha] = table["response_ids"].tolist()
        logps = logps_at(theta_sft.get(), adapter.get(), alpha, prompts, responses[alpha])
        np.testing.assert_allclose(logps, table["logp"], atol=1e-3)
    assert len(responses[0.0]) == 6
    assert responses[0.0] != responses[2.0]
    workers.close()
