"""How far weights move: by hand on small folders, and the identities of norms and cosines."""

import math

import pytest
import torch
from safetensors.torch import load_file

from beyond_dpo.change import low_rank, movement, straightness
from test_extrapolate import save

EMBEDDINGS = "model.embed_tokens.weight"
ATTENTION = "model.layers.0.self_attn.q_proj.weight"
MLP = "model.layers.1.mlp.up_proj.weight"
NORM = "model.layers.1.input_layernorm.weight"
LAYERS_AND_PARTS = {
    EMBEDDINGS: (None, "embeddings"),
    ATTENTION: (0, "attention"),
    MLP: (1, "MLP"),
    NORM: (1, "norms"),
}
NORM_OF_ONES = math.sqrt(12)  # of a tensor of 3 × 4 ones


def model(folder, steps: dict):
    """Save ones, moved by steps[name] in each entry; an integer tensor is never counted."""
    state = {"model.steps": torch.tensor([len(steps)])}
    for name in LAYERS_AND_PARTS:
        state[name] = torch.ones(3, 4) + steps.get(name, 0.0)
    return save(folder, state)


@pytest.fixture
def start(tmp_path):
    return model(tmp_path / "start", {})


@pytest.fixture
def models(tmp_path):
    return {
        "a": model(tmp_path / "a", {EMBEDDINGS: 0.5, ATTENTION: 0.5}),
        "b": model(tmp_path / "b", {EMBEDDINGS: 0.5, MLP: 0.5}),
        "far": model(tmp_path / "far", {EMBEDDINGS: 1.0, ATTENTION: 1.0}),
        "back": model(tmp_path / "back", {EMBEDDINGS: -2.0}),
    }


def test_there_is_a_row_for_each_model_and_tensor(start, models):
    rows, _ = movement(start, models)
    assert len(rows) == len(models) * len(LAYERS_AND_PARTS)
    for row in rows:
        assert (row["layer"], row["part"]) == LAYERS_AND_PARTS[row["tensor"]]
        assert row["size"] == 12
        assert row["weight"] == pytest.approx(NORM_OF_ONES)


def test_norms_by_hand(start, models):
    """12 entries each moved by 0.5: ‖Δθ‖ = 0.5 √12."""
    rows, _ = movement(start, models)
    changes = {}
    for row in rows:
        changes[row["model"], row["tensor"]] = row["change"]
    assert changes["a", EMBEDDINGS] == pytest.approx(0.5 * NORM_OF_ONES)
    assert changes["a", ATTENTION] == pytest.approx(0.5 * NORM_OF_ONES)
    assert changes["a", MLP] == 0
    assert changes["far", EMBEDDINGS] == pytest.approx(NORM_OF_ONES)


@pytest.mark.parametrize(
    "names, wanted",
    [
        (("a", "b"), 0.5),  # they share one of two moved tensors
        (("a", "far"), 1.0),
        (("a", "back"), -math.sqrt(0.5)),
        (("b", "back"), -math.sqrt(0.5)),
        (("a", "a"), 1.0),
        (("b", "b"), 1.0),
        (("far", "far"), 1.0),
        (("back", "back"), 1.0),
    ],
)
def test_cosines_by_hand(start, models, names, wanted):
    _, cosines = movement(start, models)
    assert cosines[names] == pytest.approx(wanted)


def test_a_model_that_has_not_moved_is_named(start, tmp_path):
    models = {
        "moved": model(tmp_path / "moved", {EMBEDDINGS: 1.0}),
        "still": model(tmp_path / "still", {}),
    }
    with pytest.raises(ValueError, match="still has the very weights"):
        movement(start, models)


def test_models_that_store_a_tied_tensor_under_different_names(start, tmp_path):
    """The head of the one is the embeddings of the other.

    Old checkpoints' frequencies have moved nowhere.
    """
    moved = {name: torch.full((3, 4), 1.5) for name in LAYERS_AND_PARTS}
    moved["model.steps"] = torch.tensor([0])
    renamed = dict(moved)
    renamed["lm_head.weight"] = renamed.pop(EMBEDDINGS)
    renamed["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    models = {"a": save(tmp_path / "a", moved), "b": save(tmp_path / "b", renamed)}
    rows, cosines = movement(start, models)
    assert len(rows) == 2 * len(LAYERS_AND_PARTS)
    assert {row["tensor"] for row in rows} == set(LAYERS_AND_PARTS)
    for row in rows:
        assert row["change"] == pytest.approx(0.5 * NORM_OF_ONES)
    assert cosines["a", "b"] == pytest.approx(1)


# ---- the way of a training


def test_a_straight_way_has_r2_of_1(tmp_path, start):
    half = model(tmp_path / "half", {ATTENTION: 0.5, MLP: -1.0})
    end = model(tmp_path / "end", {ATTENTION: 1.0, MLP: -2.0})
    rows = straightness(start, [half], end)
    assert len(rows) == len(LAYERS_AND_PARTS)
    assert sum(row["along"] for row in rows) == pytest.approx(sum(row["way"] for row in rows))


def test_a_detour_by_hand(tmp_path, start):
    """Attention is straight; MLP goes to 1 in all entries and ends where it began, so never along.

    12 entries of attention moved by 0.5 at the checkpoint: 3 along of 3. MLP: 0 of 12.
    """
    detour = model(tmp_path / "detour", {ATTENTION: 0.5, MLP: 1.0})
    end = model(tmp_path / "end", {ATTENTION: 1.0})
    rows = {row["tensor"]: row for row in straightness(start, [detour], end)}
    assert (rows[ATTENTION]["along"], rows[ATTENTION]["way"]) == pytest.approx((3, 3))
    assert (rows[MLP]["along"], rows[MLP]["way"]) == pytest.approx((0, 12))


def test_a_way_back_counts_as_along(tmp_path, start):
    """The line has two sides: what lies on it before the start is no detour."""
    back = model(tmp_path / "back", {ATTENTION: -0.5})
    end = model(tmp_path / "end", {ATTENTION: 1.0})
    rows = straightness(start, [back], end)
    assert sum(row["along"] for row in rows) == pytest.approx(3)


def test_a_way_without_checkpoints_is_refused(start, models):
    with pytest.raises(ValueError, match="needs checkpoints"):
        straightness(start, [], models["a"])


# ---- Δθ of low rank


def saved(folder, weight, norm):
    return save(folder, {ATTENTION: weight, NORM: norm})


def test_the_nearest_matrix_by_hand(tmp_path):
    """Δθ = diag(3, 4): rank 1 keeps 4, which is 16 of 25 of the squares; norms move as they did."""
    zero = saved(tmp_path / "start", torch.zeros(2, 2), torch.zeros(2))
    moved = saved(tmp_path / "moved", torch.diag(torch.tensor([3.0, 4.0])), torch.zeros(2))
    out = tmp_path / "out"
    out.mkdir()
    facts = low_rank(zero, moved, out, rank=1)
    assert facts["kept"] == pytest.approx(16 / 25)
    tensors = load_file(out / "model.safetensors")
    torch.testing.assert_close(tensors[ATTENTION], torch.diag(torch.tensor([0.0, 4.0])))
    assert (out / "config.json").exists()


def test_full_rank_is_the_model_itself(tmp_path):
    generator = torch.Generator().manual_seed(0)
    start = saved(
        tmp_path / "start",
        torch.randn(3, 4, generator=generator),
        torch.randn(4, generator=generator),
    )
    moved = saved(
        tmp_path / "moved",
        torch.randn(3, 4, generator=generator),
        torch.randn(4, generator=generator),
    )
    out = tmp_path / "out"
    out.mkdir()
    assert low_rank(start, moved, out, rank=3)["kept"] == pytest.approx(1)
    tensors = load_file(out / "model.safetensors")
    wanted = load_file(moved / "model.safetensors")
    for name, tensor in wanted.items():
        torch.testing.assert_close(tensors[name], tensor, rtol=1e-5, atol=1e-6)


def test_a_rank_below_1_is_refused(start, models, tmp_path):
    with pytest.raises(ValueError, match="1 or more"):
        low_rank(start, models["a"], tmp_path, rank=0)
