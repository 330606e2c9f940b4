"""How far weights move: by hand on small folders, and the identities of norms and cosines."""

import math

import pytest
import torch

from beyond_dpo.change import movement
from test_extrapolate import CONFIG, TOKENIZER, save

NAMES = {
    "model.embed_tokens.weight": (None, "embeddings"),
    "model.layers.0.self_attn.q_proj.weight": (0, "attention"),
    "model.layers.1.mlp.up_proj.weight": (1, "MLP"),
    "model.layers.1.input_layernorm.weight": (1, "norms"),
}


def model(folder, steps: dict):
    """Weights of ones, moved by steps[name] in each entry; an integer tensor is never counted."""
    state = {name: torch.ones(3, 4) + steps.get(name, 0.0) for name in NAMES}
    return save(
        folder,
        state | {"model.steps": torch.tensor([len(steps)])},
        config=CONFIG,
        tokenizer=TOKENIZER,
    )


def test_norms_and_cosines_by_hand(tmp_path):
    """12 entries each moved by 0.5: ‖Δθ‖ = 0.5 √12; two models that share one of two moved tensors:
    cosine 0.5.
    """
    embed, attention, mlp, _ = NAMES
    start = model(tmp_path / "start", {})
    ends = {
        "a": model(tmp_path / "a", {embed: 0.5, attention: 0.5}),
        "b": model(tmp_path / "b", {embed: 0.5, mlp: 0.5}),
        "far": model(tmp_path / "far", {embed: 1.0, attention: 1.0}),
        "back": model(tmp_path / "back", {embed: -2.0}),
    }
    rows, cosines = movement(start, ends)
    assert len(rows) == len(ends) * len(NAMES)
    assert {(r["tensor"], r["layer"], r["part"]) for r in rows} == {
        (n, *about) for n, about in NAMES.items()
    }
    change = {(r["model"], r["tensor"]): r["change"] for r in rows}
    assert change["a", embed] == change["a", attention] == pytest.approx(0.5 * math.sqrt(12))
    assert change["a", mlp] == 0 and change["far", embed] == pytest.approx(math.sqrt(12))
    assert all(r["weight"] == pytest.approx(math.sqrt(12)) and r["size"] == 12 for r in rows)
    wanted = {
        ("a", "b"): 0.5,
        ("a", "far"): 1.0,
        ("a", "back"): -math.sqrt(0.5),
        ("b", "back"): -math.sqrt(0.5),
    }
    for pair, cosine in wanted.items():
        assert cosines[pair] == pytest.approx(cosine)
    assert all(cosines[name, name] == pytest.approx(1) for name in ends)


def test_a_model_that_has_not_moved_is_named(tmp_path):
    start, moved = (
        model(tmp_path / "start", {}),
        model(tmp_path / "moved", {"model.embed_tokens.weight": 1.0}),
    )
    with pytest.raises(ValueError, match="still has the very weights"):
        movement(start, {"moved": moved, "still": model(tmp_path / "still", {})})


def test_models_that_store_a_tied_tensor_under_different_names(tmp_path):
    """The head of the one is the embeddings of the other; old checkpoints' frequencies have moved
    nowhere.
    """
    start = model(tmp_path / "start", {})
    state = {name: torch.ones(3, 4) + 0.5 for name in NAMES} | {"model.steps": torch.tensor([0])}
    renamed = {
        name.replace("model.embed_tokens", "lm_head"): tensor for name, tensor in state.items()
    }
    renamed["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    folders = {
        "a": save(tmp_path / "a", state, config=CONFIG),
        "b": save(tmp_path / "b", renamed, config=CONFIG),
    }
    rows, cosines = movement(start, folders)
    assert {row["tensor"] for row in rows} == set(NAMES) and len(rows) == 2 * len(NAMES)
    assert all(row["change"] == pytest.approx(0.5 * math.sqrt(12)) for row in rows)
    assert cosines["a", "b"] == pytest.approx(1)
