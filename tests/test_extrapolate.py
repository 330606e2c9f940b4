"""Extrapolation: the exact rule, the same bits however the weights are stored, and no trace of a
run that fails.
"""

from __future__ import annotations

import json
import os
import re
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from beyond_dpo import events, lora
from beyond_dpo import extrapolate as module
from beyond_dpo.extrapolate import IncompatibleModels, blend, check, extrapolate, tensors

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 12,
    "tie_word_embeddings": True,
}
TOKENIZER = {
    "model": {"type": "BPE", "vocab": {"a": 0, "b": 1}},
    "added_tokens": [{"id": 2, "content": "<s>"}],
}


def weights(seed: int = 0, dtype=torch.bfloat16) -> dict[str, torch.Tensor]:
    """Make a small state with an odd size, a scalar, an empty tensor, negative zeros and an integer
    buffer.
    """
    draw = torch.Generator().manual_seed(seed)
    state = {
        f"model.layers.{i}.{n}.weight": torch.randn(5, 7, generator=draw).to(dtype)
        for i in (0, 1)
        for n in "qv"
    }
    state["model.embed_tokens.weight"] = torch.randn(12, 5, generator=draw).to(dtype)
    state["model.scale"] = torch.randn((), generator=draw).to(dtype)
    state["model.zeros"] = torch.tensor([-0.0, 0.0, -0.0, 1.5 + seed], dtype=dtype)
    state["model.empty"] = torch.empty(0, 3, dtype=dtype)
    state["model.steps"] = torch.tensor([3 + seed, 4])
    return state


def save(
    folder: Path, state: dict, *, shards: int = 1, config: dict | None = CONFIG, tokenizer=TOKENIZER
) -> Path:
    """Write a model folder as transformers does."""
    folder.mkdir(parents=True)
    names = [sorted(state)[i::shards] for i in range(shards)]
    files = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    files = files if shards > 1 else ["model.safetensors"]
    for file, part in zip(files, names, strict=True):
        save_file(
            {name: state[name].contiguous() for name in part},
            folder / file,
            {"format": "pt", "by": "test"},
        )
    if shards > 1:
        index = {name: file for file, part in zip(files, names, strict=True) for name in part}
        (folder / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": index})
        )
    for name, content in (("config.json", config), ("tokenizer.json", tokenizer)):
        if content is not None:
            (folder / name).write_text(json.dumps(content))
    return folder


def load(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    assert files
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def same(left: dict, right: dict) -> bool:
    """Compare bits, so that -0.0 is not 0.0."""
    assert left.keys() == right.keys()
    return all(
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
        for a, b in ((left[name], right[name]) for name in left)
    )


@pytest.fixture
def pair(tmp_path) -> tuple[Path, Path]:
    return save(tmp_path / "sft", weights(0)), save(tmp_path / "aligned", weights(1))


def test_rule_by_hand():
    """1 + 0.5 (1 - 0.5) = 1.25; -2 + 0.5 (-2 - 2) = -4; 3 + 0.5 (3 - 3) = 3, and halfway (alpha =
    -0.5) 0.75, 0, 3.
    """
    sft, aligned = torch.tensor([0.5, 2.0, 3.0]), torch.tensor([1.0, -2.0, 3.0])
    assert blend(sft, aligned, 0.5).tolist() == [1.25, -4.0, 3.0]
    assert blend(sft, aligned, -0.5).tolist() == [0.75, 0.0, 3.0]
    assert blend(torch.tensor([1]), torch.tensor([2]), 5.0).tolist() == [2]
    with pytest.raises(IncompatibleModels, match=r"\[3\].*\[1\]"):
        blend(sft, aligned[:1], 0.5)


def test_float32_arithmetic_is_not_bfloat16():
    """theta0 = 1, theta1 = 1 + 53/128, alpha = 5: 223/64 exactly, which bfloat16 (steps of 1/64
    there) can hold.

    In bfloat16 the step 132.5/64 is rounded to 132/64 and the sum 222.5/64 to 222/64. Over random
    weights the two ways disagree in a good part, and float32 is nearer the exact value.
    """
    sft, aligned = torch.tensor([1.0]).bfloat16(), torch.tensor([1 + 53 / 128]).bfloat16()
    assert blend(sft, aligned, 5).item() == 223 / 64
    assert (aligned + 5 * (aligned - sft)).item() == 222 / 64
    draw = torch.Generator().manual_seed(0)
    aligned = torch.randn(10_000, generator=draw).bfloat16()
    sft = (aligned.float() + 0.5 * torch.randn(10_000, generator=draw)).bfloat16()
    exact = aligned.double() + 1.7 * (aligned.double() - sft.double())
    ours, theirs = blend(sft, aligned, 1.7), aligned + 1.7 * (aligned - sft)
    assert ours.dtype == torch.bfloat16 and (ours != theirs).float().mean() > 0.2
    assert (ours.double() - exact).abs().mean() < 0.8 * (theirs.double() - exact).abs().mean()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("shards", [1, 3])
def test_alpha_0_and_minus_1_give_the_inputs_bits(tmp_path, dtype, shards):
    sft, aligned = weights(0, dtype), weights(1, dtype)
    folders = save(tmp_path / "sft", sft), save(tmp_path / "aligned", aligned, shards=shards)
    extrapolate(*folders, {0: tmp_path / "zero", -1: tmp_path / "minus"})
    assert same(load(tmp_path / "zero"), aligned)
    assert same(load(tmp_path / "minus"), {**sft, "model.steps": aligned["model.steps"]})


def test_bits_do_not_depend_on_sharding_number_of_alphas_or_blocks(tmp_path, monkeypatch):
    """Every way gives blend() of each tensor, and the digests know the weights, not the files."""
    sft, aligned = weights(0, torch.float32), weights(1, torch.float32)
    wanted = {name: blend(sft[name], aligned[name], 0.3) for name in aligned}
    facts = []
    for i, (left, right, block) in enumerate([(1, 1, 1 << 18), (1, 3, 8), (3, 2, 7)]):
        monkeypatch.setattr(module, "BLOCK", block)
        folders = (
            save(tmp_path / f"sft{i}", sft, shards=left),
            save(tmp_path / f"al{i}", aligned, shards=right),
        )
        facts += extrapolate(*folders, {0.3: tmp_path / f"one{i}"}).values()
        facts.append(extrapolate(*folders, {2: tmp_path / f"x{i}", 0.3: tmp_path / f"y{i}"})[0.3])
        assert same(load(tmp_path / f"one{i}"), wanted) and same(load(tmp_path / f"y{i}"), wanted)
        assert same(dict(tensors(*folders, 0.3)), wanted)
        layout = [
            sorted(f.name for f in folder.iterdir())
            for folder in (tmp_path / f"one{i}", folders[1])
        ]
        assert layout[0] == sorted([*layout[1], "expo.json"])
    assert len(facts) == 6 and all(fact == facts[0] for fact in facts)


def test_each_input_file_is_read_once_for_all_alphas(pair, tmp_path):
    """The kernel counts: three alphas read less than 1.5 times what one alpha reads."""
    save(tmp_path / "big0", {"w": torch.zeros(1 << 20)})
    save(tmp_path / "big1", {"w": torch.ones(1 << 20)})

    def read(outputs):
        before = re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text())[1]
        extrapolate(tmp_path / "big0", tmp_path / "big1", outputs)
        return int(re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text())[1]) - int(before)

    assert 8 << 20 <= read({1: tmp_path / "a"}) < 9 << 20
    assert 8 << 20 <= read({1: tmp_path / "b", 2: tmp_path / "c", 3: tmp_path / "d"}) < 9 << 20


def test_small_files_and_provenance(pair, tmp_path):
    """Everything but weights and training state comes from the aligned model; the rest says how the
    result was made.
    """
    sft, aligned = pair
    for name in ("generation_config.json", "chat_template.jinja", "tokenizer.model", "README.md"):
        (aligned / name).write_text(name)
        (sft / name).write_text("SFT")
    for name in (
        "pytorch_model.bin",
        "optimizer.pt",
        "rng_state.pth",
        "training_args.bin",
        "manifest.json",
        "pytorch_model.bin.index.json",
        "model.safetensors.index.json",
    ):
        (aligned / name).write_text("no")
    (aligned / "checkpoint-5").mkdir()
    fact = extrapolate(sft, aligned, {0.5: tmp_path / "out"}, modules={"*.q.*": 2})[0.5]
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == [
        "README.md",
        "chat_template.jinja",
        "config.json",
        "expo.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer.model",
    ]
    assert (tmp_path / "out/README.md").read_text() == "README.md"
    assert json.loads((tmp_path / "out/expo.json").read_text()) == fact
    assert fact["alpha"] == 0.5 and fact["modules"] == {"*.q.*": 2}
    assert (
        re.fullmatch("[0-9a-f]{32}", fact["sft_xxh3"]) and fact["sft_xxh3"] != fact["aligned_xxh3"]
    )
    with safe_open(tmp_path / "out/model.safetensors", "pt") as file:
        metadata = file.metadata()
    assert (
        metadata["format"] == "pt" and metadata["by"] == "test" and metadata["expo_alpha"] == "0.5"
    )
    assert json.loads(metadata["expo_modules"]) == {"*.q.*": 2}
    assert metadata["expo_aligned_xxh3"] == fact["aligned_xxh3"]
    again = extrapolate(aligned, tmp_path / "out", {0: tmp_path / "again"})[
        0
    ]  # an output is a model like any other
    assert again["sft_xxh3"] == fact["aligned_xxh3"]


def test_module_alphas(pair, tmp_path):
    sft, aligned = load(pair[0]), load(pair[1])
    modules = {r"re:model\.layers\.1\..*": 0, "*.q.weight": 3.0}
    extrapolate(*pair, {0.5: tmp_path / "out"}, modules=modules)
    expected = {name: 0 if ".1." in name else 3.0 if ".q." in name else 0.5 for name in aligned}
    wanted = {name: blend(sft[name], aligned[name], expected[name]) for name in aligned}
    assert len(set(expected.values())) == 3 and same(load(tmp_path / "out"), wanted)
    assert same(dict(tensors(*pair, 0.5, modules)), wanted)
    for bad, named in (({"*.k.weight": 1}, "k.weight"), ({"*": 1, "*.q.weight": 2}, "q.weight")):
        with pytest.raises(ValueError, match=re.escape(named)):
            extrapolate(*pair, {0.5: tmp_path / "no"}, modules=bad)
    with pytest.raises(ValueError, match="nan"):
        extrapolate(*pair, {0.5: tmp_path / "no"}, modules={"*": float("nan")})


@pytest.mark.parametrize("where", ["sft", "aligned", "both"])
def test_redundant_head_of_tied_embeddings(tmp_path, where):
    """A stored lm_head that repeats the embeddings is the same model with or without it."""
    states = {name: weights(seed) for seed, name in enumerate(("sft", "aligned"))}
    wanted = {
        name: blend(states["sft"][name], states["aligned"][name], 0.5) for name in states["sft"]
    }
    for name, state in states.items():
        if where in (name, "both"):
            state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    if where != "sft":
        wanted["lm_head.weight"] = wanted["model.embed_tokens.weight"]
    folders = [save(tmp_path / name, state) for name, state in states.items()]
    extrapolate(*folders, {0.5: tmp_path / "out"})
    assert same(load(tmp_path / "out"), wanted)
    if where != "sft":
        with pytest.raises(ValueError, match="tied"):
            extrapolate(*folders, {0.5: tmp_path / "no"}, modules={"lm_head*": 2})


def test_head_of_its_own_against_tied_embeddings(tmp_path):
    state = weights(1)
    state["lm_head.weight"] = state["model.embed_tokens.weight"] + 1
    folders = save(tmp_path / "sft", weights(0)), save(tmp_path / "aligned", state)
    for left, right in (folders, folders[::-1]):
        with pytest.raises(IncompatibleModels, match="lm_head.weight.*absent"):
            check(left, right)


@pytest.mark.parametrize(
    "names", [("embed_tokens", "lm_head"), ("lm_head", "embed_tokens"), ("lm_head", "both")]
)
def test_of_two_tied_tensors_a_writer_keeps_either_name(tmp_path, names):
    """One model stores the embeddings under their name, the other under the head's: one and the
    same tensor.
    """
    states = [weights(0), weights(1)]
    embeddings = [state.pop("model.embed_tokens.weight") for state in states]
    wanted = {name: blend(states[0][name], states[1][name], 0.5) for name in states[1]}
    kept = {"embed_tokens": ["model.embed_tokens.weight"], "lm_head": ["lm_head.weight"]}
    kept["both"] = kept["embed_tokens"] + kept["lm_head"]
    for state, tensor, name in zip(states, embeddings, names, strict=True):
        state |= {key: tensor.clone() for key in kept[name]}
    folders = [save(tmp_path / str(i), state) for i, state in enumerate(states)]
    extrapolate(*folders, {0.5: tmp_path / "out"})
    wanted |= {key: blend(*embeddings, 0.5) for key in kept[names[1]]}
    assert same(load(tmp_path / "out"), wanted) and same(dict(tensors(*folders, 0.5)), wanted)


def test_embeddings_of_an_untied_model_are_not_its_head(tmp_path):
    """Without embeddings a model with a head of its own is not whole, whatever its head is equal to
    in shape.
    """
    state = weights(1)
    state["lm_head.weight"] = state["model.embed_tokens.weight"] + 1
    cut = without(
        weights(0) | {"lm_head.weight": state["lm_head.weight"]}, "model.embed_tokens.weight"
    )
    folders = save(tmp_path / "whole", state), save(tmp_path / "cut", cut)
    for left, right in (folders, folders[::-1]):
        with pytest.raises(IncompatibleModels, match="embed_tokens.weight.*absent"):
            check(left, right)


DERIVED = {
    "model.layers.0.self_attn.rotary_emb.inv_freq": torch.rand(4),
    "h.0.attn.bias": torch.ones(1, 1, 6, 6).tril(),
    "h.0.attn.masked_bias": torch.tensor(-1e4),
    "gpt_neox.layers.0.attention.bias": torch.ones(1, 1, 6, 6).tril().bool(),
    "gpt_neox.layers.0.attention.masked_bias": torch.tensor(-float("inf")),
    "embeddings.position_ids": torch.arange(6)[None],
}


@pytest.mark.parametrize("where", ["sft", "aligned", "both"])
def test_derived_buffers_are_no_weights(tmp_path, where):
    """Old checkpoints store frequencies and masks, new ones do not: the pair is one all the same,
    and none is moved.
    """
    states = {name: weights(seed) for seed, name in enumerate(("sft", "aligned"))}
    plain = [save(tmp_path / "plain" / name, state) for name, state in states.items()]
    wanted = {
        name: blend(states["sft"][name], states["aligned"][name], 0.5) for name in states["sft"]
    }
    for name, state in states.items():
        if where in (name, "both"):  # rounded otherwise in the one than in the other
            state |= {
                key: value + 0.25 if name == "sft" else value for key, value in DERIVED.items()
            }
    if where != "sft":
        wanted |= DERIVED
    folders = [save(tmp_path / name, state) for name, state in states.items()]
    found = extrapolate(*folders, {0.5: tmp_path / "out"})
    assert same(load(tmp_path / "out"), wanted) and same(dict(tensors(*folders, 0.5)), wanted)
    assert found == extrapolate(*plain, {0.5: tmp_path / "plain" / "out"}), (
        "they are in no digest of the weights"
    )


def test_a_bias_that_is_no_mask_is_a_weight(tmp_path):
    """A learned bias may have a mask's name, not its square form; a bias of a layer may end
    alike.
    """
    for name in ("h.0.attn.c_attn.bias", "model.layers.0.attention.bias"):
        states = [weights(seed) | {name: torch.full((1, 4), float(seed))} for seed in (0, 1)]
        folders = [save(tmp_path / name / str(i), state) for i, state in enumerate(states)]
        assert dict(tensors(*folders, 1.0))[name].unique().tolist() == [2.0]
        bare = save(tmp_path / name / "bare", weights(2))
        with pytest.raises(IncompatibleModels, match="bias is .*absent"):
            check(folders[0], bare)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_equal_infinities_are_copied(tmp_path, dtype):
    """-1e9 in a mask value is -inf in float16. What both models hold is copied, between values that
    move.
    """
    sft, aligned = weights(0, dtype), weights(1, dtype)
    for state in (sft, aligned):
        state["model.scale"] = torch.tensor(-1e9).half().to(dtype)
        state["model.layers.0.q.weight"][1, 2] = float("inf")
    folders = save(tmp_path / "sft", sft), save(tmp_path / "aligned", aligned)
    outputs = {0.5: tmp_path / "half", 0: tmp_path / "zero", -1: tmp_path / "minus"}
    extrapolate(*folders, outputs)
    wanted = blend(sft["model.layers.0.q.weight"], aligned["model.layers.0.q.weight"], 0.5)
    wanted[1, 2] = float("inf")
    assert torch.equal(load(outputs[0.5])["model.layers.0.q.weight"], wanted)
    assert all(load(out)["model.scale"] == -float("inf") for out in outputs.values())
    assert same(load(outputs[0]), aligned) and same(
        dict(tensors(*folders, 0.5)), load(outputs[0.5])
    )
    for i, bad in enumerate(
        (float("nan"), float("inf"), 1.0)
    ):  # NaN in both, the other infinity, one only
        state = aligned | {"model.scale": torch.tensor(bad, dtype=dtype)}
        start = sft | ({"model.scale": state["model.scale"]} if bad != bad else {})
        broken = save(tmp_path / f"sft{i}", start), save(tmp_path / f"aligned{i}", state)
        with pytest.raises(ValueError, match="model.scale holds NaN or infinity"):
            extrapolate(*broken, {0.5: tmp_path / "no"})


def without(state, name):
    return {key: value for key, value in state.items() if key != name}


def case(
    message: str,
    changes: dict | None = None,
    *,
    config: dict | None = None,
    tokenizer: dict | None = None,
):
    """Make an aligned folder's arguments with one difference, and the message that names it."""
    state = {**weights(1), **(changes or {})}
    state = {name: tensor for name, tensor in state.items() if tensor is not None}
    return message, {
        "state": state,
        "config": CONFIG | (config or {}),
        "tokenizer": TOKENIZER | (tokenizer or {}),
    }


EQUAL = {
    name: tensor.float() if tensor.is_floating_point() else tensor
    for name, tensor in weights(0).items()
}
REFUSALS = {
    "name": case(
        r"layers.0.q.weight is 'float \[5, 7\]' .*'absent'", {"model.layers.0.q.weight": None}
    ),
    "extra": case(r"model.new is 'absent' .* 'float \[2\]'", {"model.new": torch.ones(2)}),
    "shape": case(r"model.scale is 'float \[\]'.*'float \[2\]'", {"model.scale": torch.ones(2)}),
    "kind": case(r"model.scale is 'float \[\]'.*'I64 \[\]'", {"model.scale": torch.tensor(1)}),
    "vocabulary": case("vocab_size .* is 12 .* 13 ", config={"vocab_size": 13}),
    "nested": case("vocab_size .* is 12 .* 9 ", config={"text_config": {"vocab_size": 9}}),
    "tied": case("tie_word_embeddings .* True .* False ", config={"tie_word_embeddings": False}),
    "architecture": case("model_type .* 'llama' .* 'gpt2' ", config={"model_type": "gpt2"}),
    "token": case("token 1 .*'b' .*'c' ", tokenizer={"model": {"vocab": {"a": 0, "c": 1}}}),
    "added token": case("token 2 .*'<s>' .*None ", tokenizer={"added_tokens": []}),
    "unigram": case(
        "token 1 .*'b' .*'d' ", tokenizer={"model": {"vocab": [["a", 0.1], ["d", 0.2]]}}
    ),
    "equal": case("equals the one", weights(0)),
    "equal values": case("equals the one", EQUAL),
    "nan": case("model.scale holds NaN .*aligned", {"model.scale": torch.tensor(float("nan"))}),
    "infinite": case(
        "model.scale holds NaN .*aligned", {"model.scale": torch.tensor(-float("inf"))}
    ),
    "four bits": case("quantised", config={"quantization_config": {"bits": 4}}),
    "eight bits": case(
        "model.scale.*F8_E4M3", {"model.scale": torch.ones(2).to(torch.float8_e4m3fn)}
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals_name_the_difference_and_leave_nothing(tmp_path, name):
    message, arguments = REFUSALS[name]
    sft, aligned = save(tmp_path / "sft", weights(0)), save(tmp_path / "aligned", **arguments)
    with pytest.raises(ValueError, match=message) as caught:
        extrapolate(sft, aligned, {0.5: tmp_path / "a", 1: tmp_path / "b"})
    assert str(tmp_path) in str(caught.value) and sorted(f.name for f in tmp_path.iterdir()) == [
        "aligned",
        "sft",
    ]
    with pytest.raises(ValueError, match=message):
        list(tensors(sft, aligned, 0.5))


def test_vocabulary_files_without_tokenizer_json(tmp_path):
    """A vocab.json may well hold tokens called model and added_tokens."""
    folders = [save(tmp_path / str(i), weights(i), tokenizer=None) for i in (0, 1)]
    for i, folder in enumerate(folders):
        (folder / "vocab.json").write_text(json.dumps({"model": 0, "added_tokens": 1}))
        (folder / "added_tokens.json").write_text(json.dumps({f"<{i}>": 2}))
    with pytest.raises(IncompatibleModels, match="token 2 of added_tokens.json is '<0>' .*'<1>'"):
        check(*folders)
    (folders[1] / "added_tokens.json").unlink()
    assert len(check(*folders)) == len(weights())


def test_refused_arguments(pair, tmp_path):
    sft, aligned = pair
    for alpha in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="finite"):
            extrapolate(sft, aligned, {alpha: tmp_path / "out"})
        with pytest.raises(ValueError, match="finite"):
            tensors(sft, aligned, alpha)
    with pytest.raises(ValueError, match="finite"):
        extrapolate(sft, aligned, {})
    with pytest.raises(IncompatibleModels, match="equals"):
        tensors(aligned, tmp_path / "sft/../aligned", 0.5)
    with pytest.raises(OSError, match="aligned"):
        extrapolate(sft, aligned, {0.5: aligned})
    with pytest.raises(OSError, match="out"):
        extrapolate(sft, aligned, {0.5: tmp_path / "out", 1: tmp_path / "x/../out"})
    (tmp_path / "out").mkdir()
    extrapolate(sft, aligned, {0.5: tmp_path / "out"})  # an empty folder may be filled
    assert (tmp_path / "out/expo.json").exists()


def test_unreadable_folders(pair, tmp_path):
    sft, aligned = pair
    cut = save(tmp_path / "cut", weights(1))
    os.truncate(cut / "model.safetensors", (cut / "model.safetensors").stat().st_size - 1)
    part = save(tmp_path / "part", weights(1), shards=3)
    (part / "model-00002-of-00003.safetensors").unlink()
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "pytorch_model.bin").write_bytes(b"")
    for folder, message in (
        (cut, "cut/model"),
        (part, "00002"),
        (pickled, "convert"),
        (tmp_path / "none", "none"),
    ):
        for models in ((sft, folder), (folder, aligned)):
            with pytest.raises(ValueError, match=message):
                extrapolate(*models, {0.5: tmp_path / "out"})
    assert not (tmp_path / "out").exists()


def test_what_is_missing_is_said_in_words(pair, tmp_path):
    """No folder, a hub id, no config.json, a broken one, links to nowhere: the error names it, and
    nothing is left.
    """
    sft, aligned = pair
    out = tmp_path / "out"
    for missing in (tmp_path / "nowhere", Path("org/model")):
        for models in ((missing, aligned), (sft, missing)):
            with pytest.raises(ValueError, match=f"no such folder: {missing} .*downloaded"):
                extrapolate(*models, {0.5: out})
    for name in ("config.json", "tokenizer.json"):
        whole = (aligned / name).read_text()
        for broken, what in (
            ("{", "is not JSON"),
            ("\x00\xff", "is not JSON"),
            ("[]", "holds no JSON object"),
        ):
            (aligned / name).write_text(broken, encoding="latin1")
            for models in ((sft, aligned), (aligned, sft)):
                with pytest.raises(ValueError, match=f"aligned/{name} {what}"):
                    extrapolate(*models, {0.5: out})
        (aligned / name).unlink()
        (aligned / name).symlink_to("../blobs/gone")
        for models in ((sft, aligned), (aligned, sft)):
            with pytest.raises(
                ValueError, match=f"aligned/{name} is a link to a file that is not there"
            ):
                extrapolate(*models, {0.5: out})
        (aligned / name).unlink()
        if name == "config.json":
            for models in ((sft, aligned), (aligned, sft)):
                with pytest.raises(ValueError, match="no config.json in .*aligned"):
                    extrapolate(*models, {0.5: out})
        (aligned / name).write_text(whole)
    for name, named in (
        ("generation_config.json", True),
        ("chat_template.jinja", True),
        ("optimizer.pt", False),
    ):
        (aligned / name).symlink_to("../blobs/gone")
        if named:
            with pytest.raises(ValueError, match=f"{name} is a link to a file that is not there"):
                extrapolate(sft, aligned, {0.5: out})
            (aligned / name).unlink()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["aligned", "sft"]
    extrapolate(sft, aligned, {0.5: out})  # what is not copied may be missing


def test_links_into_a_hub_cache_become_files(pair, tmp_path):
    sft, aligned = pair
    for folder in pair:
        blobs = tmp_path / f"blobs-{folder.name}"
        blobs.mkdir()
        for file in list(folder.iterdir()):
            os.rename(file, blobs / file.name)
            file.symlink_to(f"../{blobs.name}/{file.name}")
    extrapolate(sft, aligned, {0.5: tmp_path / "out"})
    made = list((tmp_path / "out").iterdir())
    assert len(made) == 4 and not any(file.is_symlink() for file in made)


def test_overflow_of_the_result(tmp_path):
    """60000 + 0.5 (60000 - 0) = 90000 is beyond float16's 65504; at alpha 0.05 it is 63000."""
    sft = save(tmp_path / "sft", {"w": torch.zeros(70_000, dtype=torch.float16)})
    aligned = save(tmp_path / "aligned", {"w": torch.full((70_000,), 60_000, dtype=torch.float16)})
    with pytest.raises(ValueError, match="w leaves the range of torch.float16 at alpha=0.5"):
        extrapolate(sft, aligned, {0.05: tmp_path / "low", 0.5: tmp_path / "high"})
    assert not (tmp_path / "low").exists()
    extrapolate(sft, aligned, {0.05: tmp_path / "low"})
    assert load(tmp_path / "low")["w"].unique().tolist() == [
        63008
    ]  # float16 steps are 32 wide there


def test_another_dtype(tmp_path):
    """A float32 SFT model under a bfloat16 aligned one: float32 arithmetic, bfloat16 result, alpha
    = -1 is a cast.
    """
    sft, aligned = weights(0, torch.float32), weights(1)
    folders = save(tmp_path / "sft", sft), save(tmp_path / "aligned", aligned)
    extrapolate(*folders, {-1: tmp_path / "minus", 0.3: tmp_path / "out"})
    assert same(
        load(tmp_path / "out"), {name: blend(sft[name], aligned[name], 0.3) for name in aligned}
    )
    assert same(
        without(load(tmp_path / "minus"), "model.steps"), without(weights(0), "model.steps")
    )


@pytest.fixture(scope="module")
def big(tmp_path_factory) -> tuple[Path, Path]:
    """Two sparse 400 MB models of 4 shards: one tensor of 64 MB and many of 4 MB, all zero but a
    few values.
    """
    root = tmp_path_factory.mktemp("big")
    for model in ("sft", "aligned"):
        (root / model).mkdir()
        index = {}
        for shard in range(4):
            sizes = [64, *[4] * 9] if shard == 0 else [4] * 25
            header, end = {"__metadata__": {"format": "pt"}}, 0
            for i, size in enumerate(sizes):
                header[f"t{shard}.{i}"] = {
                    "dtype": "BF16",
                    "shape": [size << 9, 1 << 10],
                    "data_offsets": [end, end := end + (size << 20)],
                }
            text = json.dumps(header).encode()
            text += b" " * (-len(text) % 8)
            file = root / model / f"model-{shard}.safetensors"
            with open(file, "wb") as opened:
                opened.write(
                    len(text).to_bytes(8, "little")
                    + text
                    + (b"\x80?" if model == "aligned" else b"")
                )  # 1.0
                opened.truncate(8 + len(text) + end)
            index |= dict.fromkeys(without(header, "__metadata__"), file.name)
        assert len(index) == 85
        (root / model / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": index})
        )
        (root / model / "config.json").write_text("{}")
    return root / "sft", root / "aligned"


def test_memory_is_bounded(big, tmp_path):
    """A 400 MB model takes less than 100 MB beyond the imports, in a process and through a command
    line of its own.
    """
    arguments = [*map(str, big), str(tmp_path / "out"), "--alpha", "0.5"]
    code = """if True:
        import resource, runpy, safetensors, torch, tqdm
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        runpy.run_module("beyond_dpo.extrapolate", run_name="__main__")  # what python -m does
        print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)"""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    path, growth = done.stdout.split()
    assert path == arguments[2] and float(growth) < 100
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) == 4 and sum(f.stat().st_size for f in files) > 388 << 20
    with safe_open(files[0], "pt") as file:
        assert file.get_tensor("t0.0")[0, :2].tolist() == [1.5, 0.0]  # 1 + 0.5 (1 - 0)
    shutil.rmtree(tmp_path / "out")


def wait_for_work(parent: Path) -> None:
    deadline = time.monotonic() + 60
    while not list(parent.glob(".out.partial-*/*.safetensors")):
        assert time.monotonic() < deadline
        time.sleep(0.001)


def fork(work) -> int:
    """Do `work` in a child process, which ends with the status that it returns; return the child's
    id.
    """
    child = os.fork()
    if child == 0:
        tqdm.set_lock(
            threading.RLock()
        )  # else it is one with this process's, and may be held for ever
        os._exit(work())
    return child


def test_kill_9_blocks_nothing(big, tmp_path):
    """A killed run leaves no result; the next run succeeds and clears what the dead one left."""
    child = fork(lambda: extrapolate(*big, {0.5: tmp_path / "out"}) and 0)
    try:
        wait_for_work(tmp_path)
    finally:
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL
    assert [f.name[:13] for f in tmp_path.iterdir()] == [".out.partial-"]
    (left,) = tmp_path.glob(".out.partial-*/model-0.safetensors")
    with pytest.raises(Exception, match="header"):  # a half-written file does not load
        safe_open(left, "pt")
    extrapolate(*big, {0.5: tmp_path / "out"})
    assert [f.name for f in tmp_path.iterdir()] == ["out"]
    shutil.rmtree(tmp_path / "out")


def test_two_runs_into_one_folder_at_a_time(big, tmp_path):
    """The second one leaves the working folder of the first alone, which then finds that it came
    too late.
    """

    def run() -> int:
        try:
            extrapolate(*big, {0.5: tmp_path / "out"})
        except FileExistsError as error:
            return 3 if "another run has written" in str(error) else 4
        return 0

    first = fork(run)
    try:
        wait_for_work(tmp_path)
        os.kill(first, signal.SIGSTOP)
        (working,) = tmp_path.glob(".out.partial-*")
        extrapolate(*big, {0.5: tmp_path / "out"})
        assert working.exists() and (tmp_path / "out" / "expo.json").exists()
    finally:
        os.kill(first, signal.SIGCONT)
        _, status = os.waitpid(first, 0)
    assert os.waitstatus_to_exitcode(status) == 3
    assert [f.name for f in tmp_path.iterdir()] == ["out"]
    shutil.rmtree(tmp_path / "out")


def test_all_is_on_the_disk_before_it_has_its_name(pair, tmp_path, monkeypatch):
    """Files and folder are synced before the rename, and the folder above after it."""
    synced, fsync, rename = [], os.fsync, os.rename

    def noted_fsync(opened):
        synced.append(Path(os.readlink(f"/proc/self/fd/{opened}")))
        fsync(opened)

    def noted_rename(source, target):
        synced.append(f"to {Path(target).name}")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "rename", noted_rename)
    extrapolate(*pair, {0.5: tmp_path / "out"})
    before, after = synced[: synced.index("to out")], synced[synced.index("to out") + 1 :]
    names = [path.name for path in before[-5:]]  # weights were once before, without their header
    assert sorted(names[:4]) == ["config.json", "expo.json", "model.safetensors", "tokenizer.json"]
    assert names[4].startswith(".out.partial-") and after == [tmp_path]


@pytest.mark.usefixtures("interrupts")
def test_interrupt_leaves_nothing(big, tmp_path):
    """Ctrl-C in the middle of the work stops the threads and deletes the working folder."""
    threads = torch.get_num_threads()
    pid = os.fork()
    if pid == 0:  # only sends the signal
        wait_for_work(tmp_path)
        os.kill(os.getppid(), signal.SIGINT)
        os._exit(0)
    try:
        with pytest.raises(KeyboardInterrupt):
            extrapolate(*big, {0.5: tmp_path / "out"})
            time.sleep(5)
    finally:
        os.waitpid(pid, 0)
    assert not list(tmp_path.iterdir()) and torch.get_num_threads() == threads


@pytest.mark.parametrize("allocate", [True, False])
def test_full_disk_leaves_nothing(tmp_path, monkeypatch, allocate):
    """A disk of 1 MB for a 2 MB result: an error at once where space can be reserved, in the middle
    where it cannot.
    """
    sft = save(tmp_path / "sft", {f"w{i}": torch.zeros(1 << 17) for i in range(4)})
    aligned = save(tmp_path / "aligned", {f"w{i}": torch.ones(1 << 17) for i in range(4)})
    if not allocate:
        monkeypatch.delattr(os, "posix_fallocate")
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root may mount a small disk")
    try:
        with pytest.raises(OSError, match="No space left"):
            extrapolate(sft, aligned, {0.5: disk / "out"})
        assert not list(disk.iterdir())
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("allocate", [True, False])
def test_file_size_limit_leaves_nothing(tmp_path, monkeypatch, allocate):
    sft, aligned = (
        save(tmp_path / str(i), {"w": torch.full((1 << 18,), i, dtype=torch.float32)})
        for i in (0, 1)
    )
    if not allocate:
        monkeypatch.delattr(os, "posix_fallocate")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 19, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            extrapolate(sft, aligned, {0.5: tmp_path / "out"})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["0", "1"]


def test_command_line(pair, tmp_path, capsys):
    sft, aligned = map(str, pair)
    module.main([sft, aligned, str(tmp_path / "one"), "--alpha", "0.5", "--module", "*.q.weight=2"])
    module.main(
        [sft, aligned, str(tmp_path / "two"), "--alpha", "0.5", "--alpha", "-1", "--alpha", "1e-3"]
    )
    assert capsys.readouterr().out.splitlines() == [
        str(tmp_path / name) for name in ("one", "two/alpha=0.5", "two/alpha=-1", "two/alpha=0.001")
    ]
    assert json.loads((tmp_path / "one/expo.json").read_text())["modules"] == {"*.q.weight": 2.0}
    assert same(load(tmp_path / "two/alpha=0.5"), dict(tensors(sft, aligned, 0.5)))
    for extra in (
        ["--alpha", "nan"],
        ["--alpha", "1", "--module", "*"],
        ["--alpha", "1", "--module", "re:(=1"],
    ):
        with pytest.raises(SystemExit, match="error: "):
            module.main([sft, aligned, str(tmp_path / "no"), *extra])
    with pytest.raises(SystemExit, match="error: .*one"):
        module.main([sft, aligned, str(tmp_path / "one"), "--alpha", "1"])


@pytest.mark.parametrize("name", ["extrapolate", "jobs.generate"])
def test_help_is_shown_and_starts_nothing(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    monkeypatch.delitem(
        sys.modules, f"beyond_dpo.{name}", raising=False
    )  # as in a process of its own
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(f"beyond_dpo.{name}", run_name="__main__")
    assert (
        ended.value.code == 0 and f"usage: python -m beyond_dpo.{name}" in capsys.readouterr().out
    )


@pytest.mark.parametrize("terminal, disabled", [(True, False), (True, True), (False, False)])
def test_progress_bar_only_on_a_terminal(pair, tmp_path, monkeypatch, terminal, disabled):
    master, slave = os.openpty() if terminal else os.pipe()
    if terminal:
        termios.tcsetwinsize(slave, (24, 80))
    monkeypatch.setenv("TQDM_DISABLE", "1") if disabled else monkeypatch.delenv(
        "TQDM_DISABLE", raising=False
    )
    with open(slave, "w") as stderr, open(master, "rb", buffering=0) as screen:
        monkeypatch.setattr(sys, "stderr", stderr)
        extrapolate(*pair, {0.5: tmp_path / "out"})
        stderr.write("end")
        stderr.flush()
        shown = b""
        while not shown.endswith(b"end"):  # a terminal hands over piece by piece
            shown += screen.read(10_000)
    assert b"100%" in shown if terminal and not disabled else shown == b"end"


def test_without_a_bar_one_line_says_what_takes_long(pair, tmp_path, monkeypatch, capsys):
    """Off a terminal nothing was said for as long as it took."""
    monkeypatch.delenv("TQDM_DISABLE")
    monkeypatch.setattr(events, "SLOW", 0.1)
    publish = module._publish

    def slowly(*folders):
        time.sleep(0.5)
        publish(*folders)

    monkeypatch.setattr(module, "_publish", slowly)
    extrapolate(*pair, {0.5: tmp_path / "out"})
    said = capsys.readouterr().err
    assert said.startswith(f"extrapolating {pair[1]} to 1 α, ") and said.count("\n") == 1


def test_a_full_disk_behind_the_bar_ends_no_work(pair, tmp_path):
    """A terminal that is gone, or a full disk: tqdm's own error came through."""
    code = (
        "import sys\nfrom beyond_dpo import extrapolate as module\n"
        "sys.stderr.isatty = lambda: True\n"
    )
    code += "module.main(sys.argv[1:])"
    command = [sys.executable, "-c", code, *map(str, pair), str(tmp_path / "out"), "--alpha", "0.5"]
    environment = {name: value for name, value in os.environ.items() if name != "TQDM_DISABLE"}
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            command, env=environment, stdout=subprocess.PIPE, stderr=full, text=True
        )
    assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'out'}\n")


def test_an_interrupted_extrapolation_is_one_line():
    code = "import os, signal\nfrom beyond_dpo import extrapolate as module\n"
    code += "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    code += "module.extrapolate = lambda *_, **__: os.kill(os.getpid(), signal.SIGINT)\n"
    code += "module.main(['sft', 'aligned', 'out', '--alpha', '1'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (
        done.returncode == 130
        and done.stderr.startswith("interrupted; ")
        and done.stderr.count("\n") == 1
    )


def test_loads_in_transformers(tmp_path):
    """A tied, sharded Llama from the output computes the logits of a model whose parameters were
    set by hand.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = LlamaConfig(
        **sizes, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True
    )
    torch.manual_seed(0)
    sft, aligned, by_hand = (LlamaForCausalLM(config).eval() for _ in range(3))
    with torch.no_grad():
        for zero, one, two in zip(
            sft.parameters(), aligned.parameters(), by_hand.parameters(), strict=True
        ):
            one.copy_(zero + 0.01 * torch.randn_like(zero))
            two.copy_(one + 0.5 * (one - zero))
    for model, name in ((sft, "sft"), (aligned, "aligned")):
        model.save_pretrained(
            tmp_path / name, max_shard_size="20KB" if name == "aligned" else "1GB"
        )
    assert len(list((tmp_path / "aligned").glob("*.safetensors"))) > 1
    extrapolate(tmp_path / "sft", tmp_path / "aligned", {0.5: tmp_path / "out"})
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    ids = torch.arange(10)[None]
    with torch.no_grad():
        logits = [model(ids).logits for model in (loaded, by_hand, aligned)]
    assert torch.equal(logits[0], logits[1]) and not torch.allclose(logits[0], logits[2])


# ---- adapters

GPT2 = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}


def adapted(folder: Path, targets: list[str], **settings) -> torch.Tensor:
    """Save a random GPT-2 and a random adapter of it with peft; return the logits that peft
    computes with both.
    """
    import peft
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(**GPT2, bos_token_id=0, eos_token_id=1, initializer_range=0.3)
    ).eval()
    model.save_pretrained(folder / "base")
    settings = {
        "r": 2,
        "lora_alpha": 6,
        "target_modules": targets,
        "task_type": "CAUSAL_LM",
    } | settings
    tuned = peft.get_peft_model(model, peft.LoraConfig(**settings))
    with torch.no_grad():
        for weight in tuned.parameters():
            if weight.requires_grad:
                weight.copy_(torch.randn_like(weight))
    tuned.save_pretrained(folder / "adapter")
    return logits(tuned)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(9)[None]).logits


@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_an_adapter_of_conv1d_layers_is_added_transposed(tmp_path, prefix):
    """GPT-2 stores its weights (in, out), also square ones; on the hub its names lack their first
    part.
    """
    from transformers import GPT2LMHeadModel

    wanted = adapted(tmp_path, ["c_attn", "c_proj", "c_fc"])
    base = load(tmp_path / "base")
    save_file(
        {prefix + name.removeprefix("transformer."): tensor for name, tensor in base.items()},
        tmp_path / "base/model.safetensors",
        {"format": "pt"},
    )
    shutil.copytree(tmp_path / "base", tmp_path / "merged")
    merged = dict(lora.tensors(tmp_path / "base", tmp_path / "adapter", 0.0))
    assert (
        sum(
            not torch.equal(merged[prefix + name.removeprefix("transformer.")], base[name])
            for name in base
        )
        == 8
    )
    save_file(merged, tmp_path / "merged/model.safetensors", {"format": "pt"})
    found = logits(GPT2LMHeadModel.from_pretrained(tmp_path / "merged", dtype=torch.float32))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_half_an_adapter_is_never_used(tmp_path):
    """Embeddings, a B without its A, an unknown tensor: all of a file is added, or it is refused by
    that name.
    """
    adapted(tmp_path, ["c_attn", "wte"])
    adapter = tmp_path / "adapter"
    held = load_file(adapter / lora.WEIGHTS)
    linear = {name: tensor for name, tensor in held.items() if "c_attn" in name}
    assert len(held) == len(linear) + 2 == 6
    orphan = {
        name: tensor for name, tensor in linear.items() if "h.1.attn.c_attn.lora_A" not in name
    }
    files = {
        "lora_embedding_A": held,
        "c_attn.lora_B": orphan,
        "extra": linear | {"extra.weight": torch.ones(2)},
    }
    for named, content in files.items():
        save_file(content, adapter / lora.WEIGHTS)
        uses = {
            "swap": lambda: lora.tensors(tmp_path / "base", adapter, 1.0),
            "scale": lambda: lora.scaled(adapter, {1.0: tmp_path / "out"}),
        }
        for use in uses.values():
            with pytest.raises(ValueError, match=f"holds .*{named}.*merge it"):
                use()
    (adapter / lora.WEIGHTS).unlink()
    for use in uses.values():
        with pytest.raises(ValueError, match="no adapter_model.safetensors"):
            use()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"peft_type": "LOHA", "lora_alpha": None}, "kind LOHA, not a LoRA"),
        ({"peft_type": "IA3", "r": None}, "kind IA3, not a LoRA"),
        ({"init_lora_weights": "pissa_niter_4"}, r"its start \(pissa_niter_4\) has changed"),
        ({"init_lora_weights": "olora"}, "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "lora_ga"}, "has changed"),
        ({"layer_replication": [[0, 1], [0, 2]]}, r"more than s·BA \(layer_replication\)"),
        ({"alora_invocation_tokens": [1]}, r"more than s·BA \(alora_invocation_tokens\)"),
        (
            {"a_setting_of_tomorrow": 1, "bias": "lora_only"},
            r"more than s·BA \(a_setting_of_tomorrow, lora_only\)",
        ),
    ],
)
def test_an_adapter_that_is_no_plain_lora_is_refused(tmp_path, change, message):
    settings = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "bias": "none",
        "target_modules": ["q"],
    }
    (tmp_path / lora.CONFIG).write_text(json.dumps(settings))
    names = {"A": torch.ones(2, 3), "B": torch.ones(5, 2)}
    save_file(
        {f"base_model.model.q.lora_{n}.weight": t for n, t in names.items()},
        tmp_path / lora.WEIGHTS,
    )
    lora.scaled(tmp_path, {1.0: tmp_path / "plain"})
    (tmp_path / lora.CONFIG).write_text(json.dumps(settings | change))
    with pytest.raises(ValueError, match=message):
        lora.scaled(tmp_path, {1.0: tmp_path / "out"})
    with pytest.raises(ValueError, match=message):
        lora.tensors(save(tmp_path / "model", weights(0)), tmp_path, 1.0)


def test_an_adapter_of_one_of_two_tied_tensors_is_refused(tmp_path):
    """peft moves the head alone; in the merged file it would move the embeddings too, or be
    lost.
    """
    state = weights(0, torch.float32)
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    settings = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "bias": "none",
        "target_modules": ["lm_head"],
    }
    (tmp_path / lora.CONFIG).write_text(json.dumps(settings))
    names = {"A": torch.ones(2, 5), "B": torch.ones(12, 2)}
    save_file(
        {f"base_model.model.lm_head.lora_{n}.weight": t for n, t in names.items()},
        tmp_path / lora.WEIGHTS,
    )
    with pytest.raises(IncompatibleModels, match="moves lm_head.weight, which .* ties to another"):
        lora.tensors(save(tmp_path / "tied", state), tmp_path, 1.0)
    untied = save(tmp_path / "untied", state, config=CONFIG | {"tie_word_embeddings": False})
    moved = dict(lora.tensors(untied, tmp_path, 0.0))["lm_head.weight"] - state["lm_head.weight"]
    torch.testing.assert_close(moved, torch.full((12, 5), 4.0))  # s BA = 4 / 2 · (1 · 1 + 1 · 1)


def test_scaling_an_adapter_again_writes_over_no_other(tmp_path):
    """A second attempt gives the same; another adapter into the same folder leaves the first one's
    file alone.
    """
    for i, name in enumerate(("one", "other")):
        (tmp_path / name).mkdir()
        settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "bias": "none"}
        (tmp_path / name / lora.CONFIG).write_text(json.dumps(settings))
        names = {"A": torch.full((2, 5), i + 1.0), "B": torch.ones(12, 2)}
        tensors = {f"base_model.model.q.lora_{n}.weight": t for n, t in names.items()}
        save_file(tensors, tmp_path / name / lora.WEIGHTS)
    contents = [(tmp_path / name / lora.WEIGHTS).read_bytes() for name in ("one", "other")]
    assert contents[0] != contents[1]
    for name in ("one", "one", "other", "one"):
        lora.scaled(tmp_path / name, {0.5: tmp_path / "scaled"})
        assert (tmp_path / "scaled" / lora.WEIGHTS).samefile(tmp_path / name / lora.WEIGHTS)
        assert json.loads((tmp_path / "scaled" / lora.CONFIG).read_text())["lora_alpha"] == 6
        assert [
            (tmp_path / name / lora.WEIGHTS).read_bytes() for name in ("one", "other")
        ] == contents
        assert len(list((tmp_path / "scaled").iterdir())) == 2
