"""Extrapolation: the exact rule, the same bits in every layout, no trace of a failed run."""

from __future__ import annotations

import json
import os
import re
import resource
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
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
Q = "model.layers.0.q.weight"
EMBEDDINGS = "model.embed_tokens.weight"
HEAD = "lm_head.weight"


def weights(seed: int = 0, dtype=torch.bfloat16) -> dict[str, torch.Tensor]:
    """Make a small state: odd sizes, a scalar, an empty tensor, -0.0 and an integer buffer."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    return {
        "model.layers.0.q.weight": draw(5, 7),
        "model.layers.0.v.weight": draw(5, 7),
        "model.layers.1.q.weight": draw(5, 7),
        "model.layers.1.v.weight": draw(5, 7),
        EMBEDDINGS: draw(12, 5),
        "model.scale": draw(),
        "model.zeros": torch.tensor([-0.0, 0.0, -0.0, 1.5 + seed], dtype=dtype),
        "model.empty": torch.empty(0, 3, dtype=dtype),
        "model.steps": torch.tensor([3 + seed, 4]),
    }


def save(
    folder: Path, state: dict, *, shards: int = 1, config: dict | None = CONFIG, tokenizer=TOKENIZER
) -> Path:
    """Write a model folder as transformers does."""
    folder.mkdir(parents=True)
    index = {}
    for shard in range(shards):
        file = SINGLE if shards == 1 else f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        names = sorted(state)[shard::shards]
        part = {name: state[name].contiguous() for name in names}
        save_file(part, folder / file, {"format": "pt", "by": "test"})
        index |= dict.fromkeys(names, file)
    if shards > 1:
        write_json(folder / INDEX, {"metadata": {}, "weight_map": index})
    if config is not None:
        write_json(folder / "config.json", config)
    if tokenizer is not None:
        write_json(folder / "tokenizer.json", tokenizer)
    return folder


def write_json(file: Path, content) -> None:
    file.write_text(json.dumps(content))


def read_json(file: Path) -> dict:
    return json.loads(file.read_text())


def save_pair(folder: Path, sft: dict, aligned: dict) -> tuple[Path, Path]:
    return save(folder / "sft", sft), save(folder / "aligned", aligned)


def load(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    assert files
    state = {}
    for file in files:
        state |= load_file(file)
    return state


def same(left: dict, right: dict) -> bool:
    """Compare bits, so that -0.0 is not 0.0."""
    assert left.keys() == right.keys()
    return all(same_bits(left[name], right[name]) for name in left)


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    left_bytes = left.reshape(-1).view(torch.uint8)
    right_bytes = right.reshape(-1).view(torch.uint8)
    return torch.equal(left_bytes, right_bytes)


def blended(sft: dict, aligned: dict, alpha: float) -> dict[str, torch.Tensor]:
    """Return blend() of each tensor."""
    return {name: blend(sft[name], aligned[name], alpha) for name in aligned}


def without(state: dict, name: str) -> dict:
    rest = dict(state)
    del rest[name]
    return rest


def names_in(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


@pytest.fixture
def pair(tmp_path) -> tuple[Path, Path]:
    return save_pair(tmp_path, weights(0), weights(1))


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "out"


# ---- the rule


@pytest.mark.parametrize(
    "alpha, wanted",
    [
        (0.5, [1.25, -4.0, 3.0]),  # 1 + 0.5 (1 - 0.5), -2 + 0.5 (-2 - 2), 3 + 0.5 (3 - 3)
        (-0.5, [0.75, 0.0, 3.0]),  # halfway
    ],
)
def test_rule_by_hand(alpha, wanted):
    sft = torch.tensor([0.5, 2.0, 3.0])
    aligned = torch.tensor([1.0, -2.0, 3.0])
    assert blend(sft, aligned, alpha).tolist() == wanted


def test_integers_are_those_of_the_aligned_model():
    assert blend(torch.tensor([1]), torch.tensor([2]), 5.0).tolist() == [2]


def test_infinities_that_both_hold_are_copied():
    """Their difference would be NaN."""
    sft = torch.tensor([float("inf"), -float("inf"), 1.0])
    aligned = torch.tensor([float("inf"), -float("inf"), 2.0])
    assert blend(sft, aligned, 0.5).tolist() == [float("inf"), -float("inf"), 2.5]


def test_tensors_of_different_shapes_are_refused():
    with pytest.raises(IncompatibleModels, match=r"\[3\].*\[1\]"):
        blend(torch.ones(3), torch.ones(1), 0.5)


def test_float32_arithmetic_is_not_bfloat16():
    """theta0 = 1, theta1 = 1 + 53/128, alpha = 5 gives exactly 223/64.

    bfloat16 (steps of 1/64 there) can hold that. In bfloat16 arithmetic the step 132.5/64 is
    rounded to 132/64 and the sum 222.5/64 to 222/64.
    """
    sft = torch.tensor([1.0]).bfloat16()
    aligned = torch.tensor([1 + 53 / 128]).bfloat16()
    in_bfloat16 = aligned + 5 * (aligned - sft)
    assert blend(sft, aligned, 5).item() == 223 / 64
    assert in_bfloat16.item() == 222 / 64


def test_float32_arithmetic_is_nearer_the_exact_value():
    """Over random weights the two ways disagree in a good part."""
    generator = torch.Generator().manual_seed(0)
    aligned = torch.randn(10_000, generator=generator).bfloat16()
    noise = torch.randn(10_000, generator=generator)
    sft = (aligned.float() + 0.5 * noise).bfloat16()
    delta = aligned.double() - sft.double()
    exact = aligned.double() + 1.7 * delta
    ours = blend(sft, aligned, 1.7)
    in_bfloat16 = aligned + 1.7 * (aligned - sft)
    assert ours.dtype == torch.bfloat16
    disagree = ours != in_bfloat16
    assert disagree.float().mean() > 0.2
    our_errors = (ours.double() - exact).abs()
    their_errors = (in_bfloat16.double() - exact).abs()
    assert our_errors.mean() < 0.8 * their_errors.mean()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("shards", [1, 3])
def test_alpha_0_and_minus_1_give_the_inputs_bits(tmp_path, dtype, shards):
    sft = weights(0, dtype)
    aligned = weights(1, dtype)
    sft_folder = save(tmp_path / "sft", sft)
    aligned_folder = save(tmp_path / "aligned", aligned, shards=shards)
    extrapolate(sft_folder, aligned_folder, {0: tmp_path / "zero", -1: tmp_path / "minus"})
    assert same(load(tmp_path / "zero"), aligned)
    sft["model.steps"] = aligned["model.steps"]
    assert same(load(tmp_path / "minus"), sft)


FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@pytest.mark.parametrize("sft_dtype", FLOATS)
@pytest.mark.parametrize("aligned_dtype", FLOATS)
def test_the_command_and_blend_give_the_same_bits(tmp_path, sft_dtype, aligned_dtype):
    """Of numbers of all sizes down to subnormal ones, in an odd number."""
    generator = torch.Generator().manual_seed(0)

    def draw(dtype: torch.dtype) -> dict[str, torch.Tensor]:
        powers = torch.randint(-30, 8, (4999,), generator=generator)
        mantissas = torch.randn(4999, generator=generator, dtype=torch.float64)
        return {"w": (mantissas * 2.0**powers).to(dtype)}

    sft = draw(sft_dtype)
    aligned = draw(aligned_dtype)
    folders = save_pair(tmp_path, sft, aligned)
    outputs = {alpha: tmp_path / f"{alpha}" for alpha in (-1.0, -0.5, 0.0, 0.3, 1.0)}
    extrapolate(*folders, outputs)
    for alpha, out in outputs.items():
        assert same(load(out), blended(sft, aligned, alpha))


LAYOUTS = [(1, 1), (1, 3), (3, 2)]  # shards of the SFT and of the aligned model


@pytest.mark.parametrize("sft_shards, aligned_shards", LAYOUTS)
@pytest.mark.parametrize("block", [1 << 18, 8, 7])
def test_bits_do_not_depend_on_sharding_number_of_alphas_or_blocks(
    tmp_path, out, monkeypatch, sft_shards, aligned_shards, block
):
    """Every way gives blend() of each tensor."""
    monkeypatch.setattr(module, "BLOCK", block)
    sft = weights(0, torch.float32)
    aligned = weights(1, torch.float32)
    wanted = blended(sft, aligned, 0.3)
    sft_folder = save(tmp_path / "sft", sft, shards=sft_shards)
    aligned_folder = save(tmp_path / "aligned", aligned, shards=aligned_shards)
    extrapolate(sft_folder, aligned_folder, {0.3: out})
    assert same(load(out), wanted)
    assert names_in(out) == sorted([*names_in(aligned_folder), "expo.json"])
    of_two = tmp_path / "of two"
    extrapolate(sft_folder, aligned_folder, {2: tmp_path / "other", 0.3: of_two})
    assert same(load(of_two), wanted)
    assert same(dict(tensors(sft_folder, aligned_folder, 0.3)), wanted)


def test_digests_know_the_weights_not_the_files(tmp_path):
    facts = []
    for sft_shards, aligned_shards in LAYOUTS:
        root = tmp_path / f"{sft_shards} and {aligned_shards}"
        sft = save(root / "sft", weights(0), shards=sft_shards)
        aligned = save(root / "aligned", weights(1), shards=aligned_shards)
        outputs = {2: root / "other", 0.3: root / "out"}
        of_two = extrapolate(sft, aligned, outputs)
        facts.append(of_two[0.3])
    assert facts == [facts[0]] * 3


@pytest.mark.parametrize("alphas", [[1], [1, 2, 3]])
def test_each_input_file_is_read_once_for_all_alphas(tmp_path, alphas):
    """The kernel counts the bytes that this process reads: two models of 4 MB."""
    sft = {"w": torch.zeros(1 << 20)}
    aligned = {"w": torch.ones(1 << 20)}
    folders = save_pair(tmp_path, sft, aligned)
    outputs = {alpha: tmp_path / f"{alpha}" for alpha in alphas}
    before = bytes_read()
    extrapolate(*folders, outputs)
    megabytes = (bytes_read() - before) / (1 << 20)
    assert 8 <= megabytes < 9


def bytes_read() -> int:
    counters = Path("/proc/self/io").read_text()
    return int(re.search(r"rchar: (\d+)", counters)[1])


# ---- what an output holds


COPIED = ("generation_config.json", "chat_template.jinja", "tokenizer.model", "README.md")
NOT_COPIED = (
    "pytorch_model.bin",
    "optimizer.pt",
    "rng_state.pth",
    "training_args.bin",
    "manifest.json",
    "pytorch_model.bin.index.json",
    INDEX,
)


def test_small_files_are_the_aligned_models(pair, out):
    """Everything but weights and training state is copied."""
    sft, aligned = pair
    for name in COPIED:
        (aligned / name).write_text(name)
        (sft / name).write_text("SFT")
    for name in NOT_COPIED:
        (aligned / name).write_text("no")
    (aligned / "checkpoint-5").mkdir()
    extrapolate(sft, aligned, {0.5: out})
    wanted = sorted([*COPIED, "config.json", "tokenizer.json", SINGLE, "expo.json"])
    assert names_in(out) == wanted
    assert (out / "README.md").read_text() == "README.md"


def test_an_output_says_how_it_was_made(pair, out):
    facts = extrapolate(*pair, {0.5: out}, modules={"*.q.*": 2})[0.5]
    assert read_json(out / "expo.json") == facts
    assert facts["alpha"] == 0.5
    assert facts["modules"] == {"*.q.*": 2}
    assert re.fullmatch("[0-9a-f]{32}", facts["sft_xxh3"])
    assert facts["sft_xxh3"] != facts["aligned_xxh3"]
    with safe_open(out / "model.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pt"
    assert metadata["by"] == "test"
    assert metadata["expo_alpha"] == "0.5"
    assert json.loads(metadata["expo_modules"]) == {"*.q.*": 2}
    assert metadata["expo_aligned_xxh3"] == facts["aligned_xxh3"]


def test_an_output_is_a_model_like_any_other(pair, tmp_path, out):
    _, aligned = pair
    first = extrapolate(*pair, {0.5: out})[0.5]
    second = extrapolate(aligned, out, {0: tmp_path / "again"})[0]
    assert second["sft_xxh3"] == first["aligned_xxh3"]


# ---- alphas of modules


def test_module_alphas(pair, out):
    sft, aligned = pair
    modules = {r"re:model\.layers\.1\..*": 0, "*.q.weight": 3.0}
    extrapolate(sft, aligned, {0.5: out}, modules=modules)
    of_layer_1 = blended(load(sft), load(aligned), 0)
    of_q = blended(load(sft), load(aligned), 3.0)
    wanted = blended(load(sft), load(aligned), 0.5)
    wanted["model.layers.0.q.weight"] = of_q["model.layers.0.q.weight"]
    wanted["model.layers.1.q.weight"] = of_layer_1["model.layers.1.q.weight"]
    wanted["model.layers.1.v.weight"] = of_layer_1["model.layers.1.v.weight"]
    assert same(load(out), wanted)
    assert same(dict(tensors(sft, aligned, 0.5, modules)), wanted)


@pytest.mark.parametrize(
    "modules, message",
    [
        ({"*.k.weight": 1}, "k.weight"),
        ({"*": 1, "*.q.weight": 2}, "q.weight"),
        ({"*": float("nan")}, "nan"),
    ],
)
def test_module_alphas_that_decide_nothing_are_refused(pair, tmp_path, modules, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        extrapolate(*pair, {0.5: tmp_path / "no"}, modules=modules)


@pytest.mark.parametrize("pattern", ["model.steps", "re:.*inv_freq"], ids=["integers", "derived"])
def test_a_pattern_that_matches_only_what_is_copied_is_refused(tmp_path, pattern):
    """Its alpha would have no effect, and nobody would hear of it."""
    frequencies = {"model.rotary_emb.inv_freq": torch.ones(3)}
    folders = save_pair(tmp_path, weights(0) | frequencies, weights(1) | frequencies)
    message = re.escape(f"module pattern {pattern!r} decides no tensor")
    with pytest.raises(ValueError, match=message):
        extrapolate(*folders, {0.5: tmp_path / "no"}, modules={pattern: 2.0})
    assert not (tmp_path / "no").exists()


# ---- tied embeddings


@pytest.mark.parametrize("where", ["sft", "aligned", "both"])
def test_redundant_head_of_tied_embeddings(tmp_path, where, out):
    """A stored lm_head that repeats the embeddings is the same model with or without it."""
    sft = weights(0)
    aligned = weights(1)
    wanted = blended(sft, aligned, 0.5)
    if where in ("sft", "both"):
        sft[HEAD] = sft[EMBEDDINGS].clone()
    if where in ("aligned", "both"):
        aligned[HEAD] = aligned[EMBEDDINGS].clone()
        wanted[HEAD] = wanted[EMBEDDINGS]
    folders = save_pair(tmp_path, sft, aligned)
    extrapolate(*folders, {0.5: out})
    assert same(load(out), wanted)


NESTED_CONFIG = without(CONFIG, "tie_word_embeddings")
NESTED_CONFIG["text_config"] = {"tie_word_embeddings": True}
wherever_it_is_said = pytest.mark.parametrize(
    "config", [CONFIG, NESTED_CONFIG], ids=["config", "text_config"]
)


@wherever_it_is_said
def test_tied_tensors_cannot_have_two_alphas(tmp_path, config):
    sft = weights(0)
    aligned = weights(1)
    aligned[HEAD] = aligned[EMBEDDINGS].clone()
    save(tmp_path / "sft", sft, config=config)
    save(tmp_path / "aligned", aligned, config=config)
    folders = (tmp_path / "sft", tmp_path / "aligned")
    with pytest.raises(ValueError, match="tied"):
        extrapolate(*folders, {0.5: tmp_path / "no"}, modules={"lm_head*": 2})


@pytest.mark.parametrize("order", ["tied first", "tied last"])
def test_head_of_its_own_against_tied_embeddings(tmp_path, order):
    state = weights(1)
    state[HEAD] = state[EMBEDDINGS] + 1
    tied, own = save_pair(tmp_path, weights(0), state)
    folders = (tied, own) if order == "tied first" else (own, tied)
    with pytest.raises(IncompatibleModels, match="lm_head.weight.*absent"):
        check(*folders)


@pytest.mark.parametrize(
    "sft_names, aligned_names",
    [([EMBEDDINGS], [HEAD]), ([HEAD], [EMBEDDINGS]), ([HEAD], [EMBEDDINGS, HEAD])],
)
def test_of_two_tied_tensors_a_writer_keeps_either_name(tmp_path, sft_names, aligned_names, out):
    """One model stores the embeddings under their name, the other under the head's."""
    sft = weights(0)
    aligned = weights(1)
    sft_tensor = sft.pop(EMBEDDINGS)
    aligned_tensor = aligned.pop(EMBEDDINGS)
    wanted = blended(sft, aligned, 0.5)
    for name in sft_names:
        sft[name] = sft_tensor.clone()
    for name in aligned_names:
        aligned[name] = aligned_tensor.clone()
        wanted[name] = blend(sft_tensor, aligned_tensor, 0.5)
    folders = save_pair(tmp_path, sft, aligned)
    extrapolate(*folders, {0.5: out})
    assert same(load(out), wanted)
    assert same(dict(tensors(*folders, 0.5)), wanted)


@pytest.mark.parametrize("order", ["whole first", "whole last"])
def test_embeddings_of_an_untied_model_are_not_its_head(tmp_path, order):
    """Without embeddings a model with a head of its own is not whole, however they resemble."""
    state = weights(1)
    state[HEAD] = state[EMBEDDINGS] + 1
    cut_state = without(weights(0) | {HEAD: state[HEAD]}, EMBEDDINGS)
    whole = save(tmp_path / "whole", state)
    cut = save(tmp_path / "cut", cut_state)
    folders = (whole, cut) if order == "whole first" else (cut, whole)
    with pytest.raises(IncompatibleModels, match="embed_tokens.weight.*absent"):
        check(*folders)


# ---- what is no weight


DERIVED = {
    "model.layers.0.self_attn.rotary_emb.inv_freq": torch.rand(4),
    "h.0.attn.bias": torch.ones(1, 1, 6, 6).tril(),
    "h.0.attn.masked_bias": torch.tensor(-1e4),
    "gpt_neox.layers.0.attention.bias": torch.ones(1, 1, 6, 6).tril().bool(),
    "gpt_neox.layers.0.attention.masked_bias": torch.tensor(-float("inf")),
    "embeddings.position_ids": torch.arange(6)[None],
}


@pytest.mark.parametrize("where", ["sft", "aligned", "both"])
def test_derived_buffers_are_no_weights(tmp_path, where, out):
    """Old checkpoints store frequencies and masks, new ones do not.

    The pair is one all the same, none is moved, and none is in a digest.
    """
    sft = weights(0)
    aligned = weights(1)
    wanted = blended(sft, aligned, 0.5)
    plain = save_pair(tmp_path / "plain", sft, aligned)
    if where in ("sft", "both"):
        # Rounded otherwise in the one than in the other.
        sft |= {name: tensor + 0.25 for name, tensor in DERIVED.items()}
    if where in ("aligned", "both"):
        aligned |= DERIVED
        wanted |= DERIVED
    folders = save_pair(tmp_path, sft, aligned)
    facts = extrapolate(*folders, {0.5: out})
    assert same(load(out), wanted)
    assert same(dict(tensors(*folders, 0.5)), wanted)
    assert facts == extrapolate(*plain, {0.5: tmp_path / "plain" / "out"})


@pytest.mark.parametrize("name", ["h.0.attn.c_attn.bias", "model.layers.0.attention.bias"])
def test_a_bias_that_is_no_mask_is_a_weight(tmp_path, name):
    """A learned bias may have a mask's name, but not its square form; another may end alike."""
    sft = weights(0) | {name: torch.zeros(1, 4)}
    aligned = weights(1) | {name: torch.ones(1, 4)}
    folders = save_pair(tmp_path, sft, aligned)
    moved = dict(tensors(*folders, 1.0))
    assert moved[name].unique().tolist() == [2.0]
    bare = save(tmp_path / "bare", weights(2))
    with pytest.raises(IncompatibleModels, match="bias is .*absent"):
        check(folders[0], bare)


# ---- NaN and infinity


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_equal_infinities_are_copied(tmp_path, dtype):
    """-1e9 in a mask value is -inf in float16; infinities also stand between values that move."""
    sft = weights(0, dtype)
    aligned = weights(1, dtype)
    infinity = float("inf")
    minus_infinity = torch.tensor(-1e9).half()
    for state in (sft, aligned):
        state["model.scale"] = minus_infinity.to(dtype)
        state[Q][1, 2] = infinity
    folders = save_pair(tmp_path, sft, aligned)
    outputs = {0.5: tmp_path / "half", 0: tmp_path / "zero", -1: tmp_path / "minus"}
    extrapolate(*folders, outputs)
    half = load(tmp_path / "half")
    assert half[Q][1, 2] == infinity
    assert same(half, blended(sft, aligned, 0.5))
    for out in outputs.values():
        scale = load(out)["model.scale"]
        assert scale == -infinity
    assert same(load(tmp_path / "zero"), aligned)
    assert same(dict(tensors(*folders, 0.5)), half)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(
    "sft_value, aligned_value",
    [("nan", "nan"), ("-inf", "inf"), ("-inf", "1.0")],
    ids=["NaN in both", "the other infinity", "infinity in one"],
)
def test_other_infinities_and_nan_are_refused(tmp_path, dtype, sft_value, aligned_value):
    sft = weights(0, dtype)
    aligned = weights(1, dtype)
    sft["model.scale"] = torch.tensor(float(sft_value), dtype=dtype)
    aligned["model.scale"] = torch.tensor(float(aligned_value), dtype=dtype)
    folders = save_pair(tmp_path, sft, aligned)
    with pytest.raises(ValueError, match="model.scale holds NaN or infinity"):
        extrapolate(*folders, {0.5: tmp_path / "no"})


def test_overflow_of_the_result(tmp_path):
    """60000 + 0.5 (60000 - 0) = 90000 is beyond float16's 65504; at alpha 0.05 it is 63000."""
    size = 70_000
    sft = save(tmp_path / "sft", {"w": torch.zeros(size, dtype=torch.float16)})
    aligned = save(tmp_path / "aligned", {"w": torch.full((size,), 60_000, dtype=torch.float16)})
    low = tmp_path / "low"
    with pytest.raises(ValueError, match="w leaves the range of torch.float16 at alpha=0.5"):
        extrapolate(sft, aligned, {0.05: low, 0.5: tmp_path / "high"})
    assert not low.exists()
    extrapolate(sft, aligned, {0.05: low})
    (value,) = load(low)["w"].unique().tolist()
    assert value == 63008  # float16 steps are 32 wide there


def test_another_dtype(tmp_path, out):
    """A float32 SFT model under a bfloat16 aligned one: float32 arithmetic, bfloat16 result.

    At alpha = -1 the result is a cast.
    """
    sft = weights(0, torch.float32)
    aligned = weights(1)
    folders = save_pair(tmp_path, sft, aligned)
    extrapolate(*folders, {-1: tmp_path / "minus", 0.3: out})
    assert same(load(out), blended(sft, aligned, 0.3))
    cast = without(load(tmp_path / "minus"), "model.steps")
    assert same(cast, without(weights(0), "model.steps"))


# ---- refusals


def case(
    message: str,
    changes: dict | None = None,
    *,
    config: dict | None = None,
    tokenizer: dict | None = None,
):
    """Make an aligned folder's arguments with one difference, and the message that names it.

    changes: {name: another tensor, or None to leave it out}.
    """
    state = weights(1) | (changes or {})
    arguments = {
        "state": {name: tensor for name, tensor in state.items() if tensor is not None},
        "config": CONFIG | (config or {}),
        "tokenizer": TOKENIZER | (tokenizer or {}),
    }
    return message, arguments


SFT_IN_FLOAT32 = {
    name: tensor.float() if tensor.is_floating_point() else tensor
    for name, tensor in weights(0).items()
}
REFUSALS = {
    "name": case(r"layers.0.q.weight is 'float \[5, 7\]' .*'absent'", {Q: None}),
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
    "equal values": case("equals the one", SFT_IN_FLOAT32),
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
    sft = save(tmp_path / "sft", weights(0))
    aligned = save(tmp_path / "aligned", **arguments)
    with pytest.raises(ValueError, match=message) as caught:
        extrapolate(sft, aligned, {0.5: tmp_path / "a", 1: tmp_path / "b"})
    assert str(tmp_path) in str(caught.value)
    assert names_in(tmp_path) == ["aligned", "sft"]
    with pytest.raises(ValueError, match=message):
        list(tensors(sft, aligned, 0.5))


def test_vocabulary_files_without_tokenizer_json(tmp_path):
    """A vocab.json may well hold tokens called model and added_tokens."""
    sft = save(tmp_path / "sft", weights(0), tokenizer=None)
    aligned = save(tmp_path / "aligned", weights(1), tokenizer=None)
    for folder in (sft, aligned):
        write_json(folder / "vocab.json", {"model": 0, "added_tokens": 1})
    write_json(sft / "added_tokens.json", {"<0>": 2})
    write_json(aligned / "added_tokens.json", {"<1>": 2})
    with pytest.raises(IncompatibleModels, match="token 2 of added_tokens.json is '<0>' .*'<1>'"):
        check(sft, aligned)
    (aligned / "added_tokens.json").unlink()
    assert len(check(sft, aligned)) == len(weights())


@pytest.mark.parametrize("alpha", [float("nan"), float("inf")])
def test_alphas_must_be_finite(pair, out, alpha):
    with pytest.raises(ValueError, match="finite"):
        extrapolate(*pair, {alpha: out})
    with pytest.raises(ValueError, match="finite"):
        tensors(*pair, alpha)


def test_there_must_be_an_alpha(pair):
    with pytest.raises(ValueError, match="finite"):
        extrapolate(*pair, {})


def test_a_model_is_not_extrapolated_from_itself(pair, tmp_path):
    _, aligned = pair
    with pytest.raises(IncompatibleModels, match="equals"):
        tensors(aligned, tmp_path / "sft/../aligned", 0.5)


def test_an_output_needs_a_folder_of_its_own(pair, tmp_path, out):
    _, aligned = pair
    with pytest.raises(OSError, match="aligned"):
        extrapolate(*pair, {0.5: aligned})
    with pytest.raises(OSError, match="out"):
        extrapolate(*pair, {0.5: out, 1: tmp_path / "x/../out"})


def test_an_empty_folder_may_be_filled(pair, out):
    (out).mkdir()
    extrapolate(*pair, {0.5: out})
    assert (out / "expo.json").exists()


# ---- folders that cannot be read


def refuse_in_both_places(pair, broken: Path, out: Path, message: str) -> None:
    """Assert that a folder is refused as SFT and as aligned model, and that nothing is left."""
    sft, aligned = pair
    with pytest.raises(ValueError, match=message):
        extrapolate(sft, broken, {0.5: out})
    with pytest.raises(ValueError, match=message):
        extrapolate(broken, aligned, {0.5: out})
    assert not list(out.parent.glob("*out*"))


def test_a_file_that_is_cut_off_is_refused(pair, tmp_path, out):
    cut = save(tmp_path / "cut", weights(1))
    size = (cut / SINGLE).stat().st_size
    os.truncate(cut / SINGLE, size - 1)
    refuse_in_both_places(pair, cut, out, "cut/model")


def test_a_missing_shard_is_named(pair, tmp_path, out):
    part = save(tmp_path / "part", weights(1), shards=3)
    (part / "model-00002-of-00003.safetensors").unlink()
    refuse_in_both_places(pair, part, out, "00002")


def test_pickled_weights_are_never_loaded(pair, tmp_path, out):
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "pytorch_model.bin").write_bytes(b"")
    refuse_in_both_places(pair, pickled, out, "convert")


@pytest.mark.parametrize("name", ["none", "org/model"])
def test_a_folder_that_is_not_there_is_named(pair, out, name):
    """A hub id too is no folder."""
    message = f"no such folder: {name} .*downloaded"
    refuse_in_both_places(pair, Path(name), out, message)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
@pytest.mark.parametrize(
    "content, message",
    [("{", "is not JSON"), ("\x00\xff", "is not JSON"), ("[]", "holds no JSON object")],
)
def test_broken_json_is_named(pair, tmp_path, name, content, message, out):
    broken = save(tmp_path / "broken", weights(2))
    (broken / name).write_text(content, encoding="latin1")
    refuse_in_both_places(pair, broken, out, f"broken/{name} {message}")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_link_to_nowhere_is_named(pair, tmp_path, name, out):
    broken = save(tmp_path / "broken", weights(2))
    (broken / name).unlink()
    (broken / name).symlink_to("../blobs/gone")
    message = f"broken/{name} is a link to a file that is not there"
    refuse_in_both_places(pair, broken, out, message)


def test_a_missing_config_is_named(pair, tmp_path, out):
    broken = save(tmp_path / "broken", weights(2), config=None)
    refuse_in_both_places(pair, broken, out, "no config.json in .*broken")


@pytest.mark.parametrize("name", ["generation_config.json", "chat_template.jinja"])
def test_a_link_to_nowhere_among_the_small_files_is_named(pair, tmp_path, name, out):
    _, aligned = pair
    (aligned / name).symlink_to("../blobs/gone")
    with pytest.raises(ValueError, match=f"{name} is a link to a file that is not there"):
        extrapolate(*pair, {0.5: out})
    assert names_in(tmp_path) == ["aligned", "sft"]


def test_what_is_not_copied_may_be_missing(pair, out):
    _, aligned = pair
    (aligned / "optimizer.pt").symlink_to("../blobs/gone")
    extrapolate(*pair, {0.5: out})


def test_links_into_a_hub_cache_become_files(pair, tmp_path, out):
    for folder in pair:
        blobs = tmp_path / f"blobs-{folder.name}"
        os.rename(folder, blobs)
        folder.mkdir()
        for name in names_in(blobs):
            (folder / name).symlink_to(f"../{blobs.name}/{name}")
    extrapolate(*pair, {0.5: out})
    files = list((out).iterdir())
    assert len(files) == 4
    assert not any(file.is_symlink() for file in files)


# ---- memory, kills and full disks


SHARD_SIZES = [[64, *[4] * 9], [4] * 25, [4] * 25, [4] * 25]  # MB of each tensor of each shard


@pytest.fixture(scope="module")
def big(tmp_path_factory) -> tuple[Path, Path]:
    """Two sparse 400 MB models of 4 shards, all zero but the first value of each aligned shard."""
    root = tmp_path_factory.mktemp("big")
    one_in_bfloat16 = b"\x80?"
    sft = save_sparse(root / "sft", first_value=b"")
    aligned = save_sparse(root / "aligned", first_value=one_in_bfloat16)
    return sft, aligned


def save_sparse(folder: Path, first_value: bytes) -> Path:
    """Write a model whose files take hardly any room."""
    folder.mkdir()
    index = {}
    for shard, sizes in enumerate(SHARD_SIZES):
        header = {"__metadata__": {"format": "pt"}}
        end = 0
        for i, size in enumerate(sizes):
            start = end
            end += size << 20
            shape = [size << 9, 1 << 10]
            entry = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
            header[f"t{shard}.{i}"] = entry
            index[f"t{shard}.{i}"] = f"model-{shard}.safetensors"
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        length = len(text).to_bytes(8, "little")
        with open(folder / f"model-{shard}.safetensors", "wb") as file:
            file.write(length + text + first_value)
            file.truncate(8 + len(text) + end)
    assert len(index) == 85
    write_json(folder / INDEX, {"weight_map": index})
    write_json(folder / "config.json", {})
    return folder


MEASURED = """if True:
    import resource, sys, numpy, safetensors, tqdm
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    from beyond_dpo.jobs import command
    assert command.main(sys.argv[1:]) == 0
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def test_memory_is_bounded(big, out):
    """A 400 MB model takes less than 100 MB beyond the imports, in a process of its own."""
    sft, aligned = big
    arguments = ["extrapolate", sft, aligned, out, "--alpha", "0.5"]
    command = [sys.executable, "-c", MEASURED, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    path, megabytes = done.stdout.split()
    assert path == str(out)
    assert float(megabytes) < 100
    files = sorted(out.glob("*.safetensors"))
    assert len(files) == 4
    assert sum(file.stat().st_size for file in files) > 388 << 20
    with safe_open(files[0], "pt") as file:
        first_values = file.get_tensor("t0.0")[0, :2].tolist()
    assert first_values == [1.5, 0.0]  # 1 + 0.5 (1 - 0)
    shutil.rmtree(out)


def wait_for_work(parent: Path) -> None:
    deadline = time.monotonic() + 60
    while not list(parent.glob(".out.partial-*/*.safetensors")):
        assert time.monotonic() < deadline
        time.sleep(0.001)


def fork(work) -> int:
    """Do `work` in a child process, which ends with the status that it returns.

    Returns the child's id.
    """
    child = os.fork()
    if child == 0:
        # Else it is one with this process's, and may be held for ever.
        tqdm.set_lock(threading.RLock())
        os._exit(work())
    return child


def exit_code(child: int) -> int:
    """Wait for a child process; return its exit code, negative for a signal."""
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def test_kill_9_blocks_nothing(big, tmp_path, out):
    """A killed run leaves no result; the next run succeeds and clears what the dead one left."""

    def run() -> int:
        extrapolate(*big, {0.5: out})
        return 0

    child = fork(run)
    try:
        wait_for_work(tmp_path)
    finally:
        os.kill(child, signal.SIGKILL)
        code = exit_code(child)
    assert code == -signal.SIGKILL
    (working,) = tmp_path.iterdir()
    assert working.name.startswith(".out.partial-")
    with pytest.raises(Exception, match="header"):  # a half-written file does not load
        safe_open(working / "model-0.safetensors", "pt")
    extrapolate(*big, {0.5: out})
    assert names_in(tmp_path) == ["out"]
    shutil.rmtree(out)


def test_two_runs_into_one_folder_at_a_time(big, tmp_path, out):
    """The second run leaves the first one's working folder alone; the first finds it is late."""

    def run() -> int:
        try:
            extrapolate(*big, {0.5: out})
        except FileExistsError as error:
            return 3 if "another run has written" in str(error) else 4
        return 0

    first = fork(run)
    try:
        wait_for_work(tmp_path)
        os.kill(first, signal.SIGSTOP)
        (working,) = tmp_path.glob(".out.partial-*")
        extrapolate(*big, {0.5: out})
        assert working.exists()
        assert (out / "expo.json").exists()
    finally:
        os.kill(first, signal.SIGCONT)
        code = exit_code(first)
    assert code == 3
    assert names_in(tmp_path) == ["out"]
    shutil.rmtree(out)


def test_all_is_on_the_disk_before_it_has_its_name(pair, tmp_path, monkeypatch, out):
    """Files and folder are synced before the rename, and the folder above after it."""
    steps = []
    fsync = os.fsync
    rename = os.rename

    def noted_fsync(opened):
        steps.append(os.readlink(f"/proc/self/fd/{opened}"))
        fsync(opened)

    def noted_rename(source, target):
        steps.append(f"to {Path(target).name}")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "rename", noted_rename)
    extrapolate(*pair, {0.5: out})
    named = steps.index("to out")
    last_synced = steps[named - 5 : named]  # weights were synced before, without their header
    *files, folder = [Path(path).name for path in last_synced]
    assert sorted(files) == ["config.json", "expo.json", SINGLE, "tokenizer.json"]
    assert folder.startswith(".out.partial-")
    assert steps[named + 1 :] == [str(tmp_path)]


@pytest.mark.usefixtures("interrupts")
def test_interrupt_leaves_nothing(big, tmp_path, out):
    """Ctrl-C in the middle of the work stops the threads and deletes the working folder."""
    child = os.fork()
    if child == 0:  # only sends the signal
        wait_for_work(tmp_path)
        os.kill(os.getppid(), signal.SIGINT)
        os._exit(0)
    try:
        with pytest.raises(KeyboardInterrupt):
            extrapolate(*big, {0.5: out})
            time.sleep(5)
    finally:
        os.waitpid(child, 0)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def small_disk(tmp_path):
    """Mount a disk of 1 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root may mount a small disk")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.fixture(params=["reserved", "not reserved"])
def allocation(request, monkeypatch):
    """Reserve room for files, as Linux does, or do not, as macOS."""
    if request.param == "not reserved":
        monkeypatch.delattr(os, "posix_fallocate")


@pytest.mark.usefixtures("allocation")
def test_full_disk_leaves_nothing(tmp_path, small_disk):
    """A 2 MB result is an error at once where room can be reserved, else in the middle."""
    names = [f"w{i}" for i in range(4)]
    sft = {name: torch.zeros(1 << 17) for name in names}
    aligned = {name: torch.ones(1 << 17) for name in names}
    folders = save_pair(tmp_path, sft, aligned)
    with pytest.raises(OSError, match="No space left"):
        extrapolate(*folders, {0.5: small_disk / "out"})
    assert not list(small_disk.iterdir())


@pytest.mark.usefixtures("allocation")
def test_file_size_limit_leaves_nothing(tmp_path, out):
    sft = {"w": torch.zeros(1 << 18)}
    aligned = {"w": torch.ones(1 << 18)}
    folders = save_pair(tmp_path, sft, aligned)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 19, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            extrapolate(*folders, {0.5: out})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names_in(tmp_path) == ["aligned", "sft"]


# ---- another dtype than the aligned model's


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("alpha", [0.5, 0.0, -1.0])
def test_weights_are_written_in_the_dtype_that_is_asked_for(tmp_path, out, dtype, stored, alpha):
    """As blend() computes them in float32, rounded once; integers stay what they are."""
    sft = weights(0, stored)
    aligned = weights(1, stored)
    folders = [save(tmp_path / "sft", sft, shards=2), save(tmp_path / "aligned", aligned, shards=3)]
    extrapolate(*folders, {alpha: out}, dtype=dtype)
    expected = {}
    for name, tensor in aligned.items():
        if tensor.is_floating_point():
            exact = blend(sft[name].float(), tensor.float(), alpha)
            expected[name] = exact.to(getattr(torch, dtype))
        else:
            expected[name] = tensor
    assert same(load(out), expected)
    assert read_json(out / "config.json")["dtype"] == dtype
    assert read_json(out / "expo.json")["dtype"] == dtype
    sizes = [tensor.nbytes for tensor in expected.values()]
    assert read_json(out / INDEX)["metadata"]["total_size"] == sum(sizes)


def test_what_is_computed_from_the_config_keeps_its_dtype(tmp_path, out):
    """Rotary frequencies lose their meaning in bfloat16."""
    name = "model.rotary_emb.inv_freq"
    frequencies = {name: torch.linspace(0, 1, 5)}
    folders = save_pair(tmp_path, weights(0) | frequencies, weights(1) | frequencies)
    extrapolate(*folders, {0.5: out}, dtype="float16")
    assert same_bits(load(out)[name], frequencies[name])


def test_a_step_below_bfloat16s_rounding_is_kept_in_float32(tmp_path, out):
    """What --dtype is for: at α = 0.3 a bfloat16 output is the aligned model itself."""
    sft = {"w": torch.full((4,), 1.0, dtype=torch.bfloat16)}
    aligned = {"w": torch.full((4,), 1.0078125, dtype=torch.bfloat16)}  # the next number
    folders = save_pair(tmp_path, sft, aligned)
    extrapolate(*folders, {0.3: out})
    assert same_bits(load(out)["w"], aligned["w"])
    extrapolate(*folders, {0.3: tmp_path / "wide"}, dtype="float32")
    expected = torch.full((4,), 1.0078125 + 0.3 * 0.0078125)
    torch.testing.assert_close(load(tmp_path / "wide")["w"], expected)


def test_a_dtype_that_is_too_narrow_is_refused(tmp_path, out):
    sft = {"w": torch.zeros(4)}
    aligned = {"w": torch.full((4,), 1e5)}
    folders = save_pair(tmp_path, sft, aligned)
    with pytest.raises(ValueError, match="w leaves the range of torch.float16 at alpha=0.5"):
        extrapolate(*folders, {0.5: out}, dtype="float16")
    with pytest.raises(ValueError, match="float32, float16, bfloat16, not in 'int8'"):
        extrapolate(*folders, {0.5: out}, dtype="int8")
    assert names_in(tmp_path) == ["aligned", "sft"]


# ---- what it will take


def test_a_plan_counts_bytes_and_leaves_nothing(big, tmp_path):
    outputs = {0.3: tmp_path / "new" / "a", 0.5: tmp_path / "new" / "b"}
    plan = module.plan(*big, outputs)
    bytes_of_one = sum(map(sum, SHARD_SIZES)) << 20
    assert plan.read == 2 * bytes_of_one
    assert plan.written == 2 * bytes_of_one
    assert plan.free > plan.written
    assert 0 < plan.seconds < 600
    assert names_in(tmp_path) == []


def test_a_plan_clears_what_a_killed_one_left(pair, tmp_path, out):
    """Its sample is a working folder as an extrapolation's, which the next run deletes."""

    def killed() -> int:
        module._write_tensors = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        module.plan(*pair, {0.5: out})
        return 0

    assert exit_code(fork(killed)) == -signal.SIGKILL
    assert len(names_in(tmp_path)) == 3
    module.plan(*pair, {0.5: out})
    assert names_in(tmp_path) == ["aligned", "sft"]


def test_a_plan_in_float32_writes_twice_the_bytes(pair, out):
    narrow = module.plan(*pair, {0.5: out})
    wide = module.plan(*pair, {0.5: out}, dtype="float32")
    integers = 16  # bytes, of model.steps
    assert wide.written - integers == 2 * (narrow.written - integers)


@pytest.mark.parametrize("change", ["modules", "out"])
def test_a_plan_refuses_what_an_extrapolation_would(pair, out, change):
    if change == "modules":
        with pytest.raises(ValueError, match="decides no tensor"):
            module.plan(*pair, {0.5: out}, modules={"nothing": 1.0})
    else:
        with pytest.raises(FileExistsError, match="not a new or empty folder"):
            module.plan(*pair, {0.5: pair[1]})


def test_a_plan_sees_that_a_disk_is_too_small(pair, tmp_path, small_disk):
    outputs = {0.1 * i: small_disk / str(i) for i in range(1, 3000)}
    with pytest.raises(OSError, match="bytes free, .* are to be written"):
        module.plan(*pair, outputs)


# ---- what is said meanwhile


def stderr_of_a_run(pair, out: Path, monkeypatch, reading_end: int, writing_end: int) -> bytes:
    """Extrapolate with stderr at one end of a terminal or a pipe; return what the other reads."""
    with open(writing_end, "w") as stderr, open(reading_end, "rb", buffering=0) as screen:
        monkeypatch.setattr(sys, "stderr", stderr)
        extrapolate(*pair, {0.5: out})
        stderr.write("end")
        stderr.flush()
        text = b""
        while not text.endswith(b"end"):  # a terminal hands over piece by piece
            text += screen.read(10_000)
    return text.removesuffix(b"end")


def stderr_of_a_terminal(pair, out: Path, monkeypatch) -> bytes:
    master, slave = os.openpty()
    termios.tcsetwinsize(slave, (24, 80))
    return stderr_of_a_run(pair, out, monkeypatch, master, slave)


def test_a_terminal_shows_a_progress_bar(pair, out, monkeypatch):
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    assert b"100%" in stderr_of_a_terminal(pair, out, monkeypatch)


def test_a_progress_bar_can_be_disabled(pair, out, monkeypatch):
    monkeypatch.setenv("TQDM_DISABLE", "1")
    assert stderr_of_a_terminal(pair, out, monkeypatch) == b""


def test_a_pipe_gets_no_progress_bar(pair, out, monkeypatch):
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    assert stderr_of_a_run(pair, out, monkeypatch, *os.pipe()) == b""


def test_without_a_bar_one_line_says_what_takes_long(pair, out, monkeypatch, capsys):
    """Off a terminal nothing was said for as long as it took."""
    monkeypatch.delenv("TQDM_DISABLE")
    monkeypatch.setattr(events, "SLOW", 0.1)
    publish = module._publish

    def slowly(*folders):
        time.sleep(0.5)
        publish(*folders)

    monkeypatch.setattr(module, "_publish", slowly)
    extrapolate(*pair, {0.5: out})
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"extrapolating {pair[1]} to 1 α, ")


# ---- models of transformers


@torch.no_grad()
def test_loads_in_transformers(tmp_path, out):
    """A tied, sharded Llama from the output computes what one with parameters set by hand does."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    sft = LlamaForCausalLM(config).eval()
    aligned = LlamaForCausalLM(config).eval()
    by_hand = LlamaForCausalLM(config).eval()
    parameters = zip(sft.parameters(), aligned.parameters(), by_hand.parameters(), strict=True)
    for theta_sft, theta_aligned, theta in parameters:
        theta_aligned.copy_(theta_sft + 0.01 * torch.randn_like(theta_sft))
        theta.copy_(theta_aligned + 0.5 * (theta_aligned - theta_sft))
    sft.save_pretrained(tmp_path / "sft")
    aligned.save_pretrained(tmp_path / "aligned", max_shard_size="20KB")
    assert len(list((tmp_path / "aligned").glob("*.safetensors"))) > 1
    extrapolate(tmp_path / "sft", tmp_path / "aligned", {0.5: out})
    loaded = LlamaForCausalLM.from_pretrained(out).eval()
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(logits(loaded), logits(by_hand))
    assert not torch.allclose(logits(loaded), logits(aligned))


@torch.no_grad()
def logits(model) -> torch.Tensor:
    ids = torch.arange(9).unsqueeze(0)
    return model.eval()(ids).logits


# ---- adapters


def adapted(folder: Path, targets: list[str]) -> torch.Tensor:
    """Save a random GPT-2 and a random adapter of it with peft; return peft's logits with both."""
    import peft
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=64,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=32,
        bos_token_id=0,
        eos_token_id=1,
        initializer_range=0.3,
    )
    model = GPT2LMHeadModel(config).eval()
    model.save_pretrained(folder / "base")
    settings = peft.LoraConfig(r=2, lora_alpha=6, target_modules=targets, task_type="CAUSAL_LM")
    tuned = peft.get_peft_model(model, settings)
    with torch.no_grad():
        for weight in tuned.parameters():
            if weight.requires_grad:
                weight.copy_(torch.randn_like(weight))
    tuned.save_pretrained(folder / "adapter")
    return logits(tuned)


@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_an_adapter_of_conv1d_layers_is_added_transposed(tmp_path, prefix):
    """GPT-2 stores its weights (in, out), also square ones.

    On the hub its names lack their first part.
    """
    from transformers import GPT2LMHeadModel

    wanted = adapted(tmp_path, ["c_attn", "c_proj", "c_fc"])
    folder = tmp_path / "base"
    adapter = tmp_path / "adapter"
    base = {}
    for name, tensor in load(folder).items():
        short_name = name.removeprefix("transformer.")
        base[prefix + short_name] = tensor
    save_file(base, folder / SINGLE, {"format": "pt"})
    merged = dict(lora.tensors(folder, adapter, 0.0))
    moved = [name for name in base if not torch.equal(merged[name], base[name])]
    assert len(moved) == 8
    save_file(merged, folder / SINGLE, {"format": "pt"})
    model = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32)
    torch.testing.assert_close(logits(model), wanted, rtol=1e-4, atol=1e-4)


def refuse_adapter(base: Path, adapter: Path, message: str) -> None:
    """Assert that an adapter is refused by a message, added or scaled."""
    with pytest.raises(ValueError, match=message):
        lora.tensors(base, adapter, 1.0)
    with pytest.raises(ValueError, match=message):
        lora.scaled(adapter, {1.0: adapter.parent / "out"})


def test_half_an_adapter_is_never_used(tmp_path):
    """Embeddings, a B without its A, an unknown tensor: the file is refused by that name."""
    adapted(tmp_path, ["c_attn", "wte"])
    base = tmp_path / "base"
    adapter = tmp_path / "adapter"
    state = load_file(adapter / lora.WEIGHTS)
    linear = {name: tensor for name, tensor in state.items() if "c_attn" in name}
    assert len(linear) == 4
    assert len(state) == 6
    (orphaned,) = [name for name in linear if "h.1.attn.c_attn.lora_A" in name]
    unusable = {
        "lora_embedding_A": state,
        "c_attn.lora_B": without(linear, orphaned),
        "extra": linear | {"extra.weight": torch.ones(2)},
    }
    for name, content in unusable.items():
        save_file(content, adapter / lora.WEIGHTS)
        refuse_adapter(base, adapter, f"holds .*{name}.*merge it")
    (adapter / lora.WEIGHTS).unlink()
    refuse_adapter(base, adapter, "no adapter_model.safetensors")


PLAIN_LORA = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "bias": "none"}


def save_adapter(folder: Path, layer: str, a: torch.Tensor, b: torch.Tensor) -> Path:
    """Write a plain LoRA of rank 2 with scale 2."""
    folder.mkdir()
    settings = PLAIN_LORA | {"target_modules": [layer]}
    write_json(folder / lora.CONFIG, settings)
    state = {
        f"base_model.model.{layer}.lora_A.weight": a,
        f"base_model.model.{layer}.lora_B.weight": b,
    }
    save_file(state, folder / lora.WEIGHTS)
    return folder


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
    base = save(tmp_path / "model", weights(0))
    adapter = tmp_path / "adapter"
    a = torch.ones(2, 3)
    b = torch.ones(5, 2)
    save_adapter(adapter, "q", a, b)
    lora.scaled(adapter, {1.0: tmp_path / "plain"})
    settings = read_json(adapter / lora.CONFIG)
    write_json(adapter / lora.CONFIG, settings | change)
    refuse_adapter(base, adapter, message)


@wherever_it_is_said
def test_an_adapter_of_one_of_two_tied_tensors_is_refused(tmp_path, config):
    """peft moves the head alone; merged, it would move the embeddings too, or be lost."""
    state = weights(0, torch.float32)
    state[HEAD] = state[EMBEDDINGS].clone()
    tied = save(tmp_path / "tied", state, config=config)
    untied_config = CONFIG | {"tie_word_embeddings": False}
    untied = save(tmp_path / "untied", state, config=untied_config)
    a = torch.ones(2, 5)
    b = torch.ones(12, 2)
    adapter = save_adapter(tmp_path / "adapter", "lm_head", a, b)
    with pytest.raises(IncompatibleModels, match="moves lm_head.weight, which .* ties to another"):
        lora.tensors(tied, adapter, 1.0)
    merged = dict(lora.tensors(untied, adapter, 0.0))
    moved = merged[HEAD] - state[HEAD]
    wanted = torch.full((12, 5), 4.0)  # s BA = 4 / 2 · (1 · 1 + 1 · 1)
    torch.testing.assert_close(moved, wanted)


def test_scaling_an_adapter_again_writes_over_no_other(tmp_path, out):
    """A second attempt gives the same; another adapter leaves the first one's file alone."""
    a = torch.ones(2, 5)
    b = torch.ones(12, 2)
    first = save_adapter(tmp_path / "first", "q", a, b)
    other = save_adapter(tmp_path / "other", "q", 2 * a, b)
    first_weights = first / lora.WEIGHTS
    other_weights = other / lora.WEIGHTS
    first_bytes = first_weights.read_bytes()
    other_bytes = other_weights.read_bytes()
    assert first_bytes != other_bytes
    for adapter in (first, first, other, first):
        lora.scaled(adapter, {0.5: out})
        linked = out / lora.WEIGHTS
        assert linked.samefile(adapter / lora.WEIGHTS)
        assert read_json(out / lora.CONFIG)["lora_alpha"] == 6
        assert names_in(out) == [lora.CONFIG, lora.WEIGHTS]
        assert first_weights.read_bytes() == first_bytes
        assert other_weights.read_bytes() == other_bytes
