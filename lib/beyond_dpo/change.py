"""How far, and in which direction, training moves the weights (ACL Table 1, arXiv 2404.16792).

movement() compares models, straightness() the checkpoints of one training, and low_rank() keeps of
Δθ = θ₁ − θ₀ what a few directions hold.
"""

import math
import re
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from beyond_dpo import extrapolate

# Part of a model: what stands in the names of its tensors.
PARTS = {
    "attention": ".self_attn.",
    "MLP": ".mlp.",
    "norms": "norm.",
    "embeddings": "embed_tokens.",
}

MANIFEST = "manifest.json"  # of a folder of results, which says nothing of a model


def movement(
    start: str | Path, models: dict[str, str | Path]
) -> tuple[list[dict], dict[tuple[str, str], float]]:
    """Measure Δθ = θ₁ − θ₀ of each model, tensor by tensor.

    Sums are float64, memory is one tensor of each model. The squares of a model's `change` add up
    to that of the whole Δθ.

    Args:
        start: folder of θ₀.
        models: {name: folder of θ₁}, all with θ₀'s tensors.
    Returns:
        rows: one per model and tensor, with its part (attention, MLP, norms, embeddings or other),
            its layer (None outside the layers), its size, and the Frobenius norms `change` of Δθ
            and `weight` of θ₀.
        cosines: {(name, name): cosine of their Δθ over all tensors, in −1…1}.
    Raises:
        IncompatibleModels, ValueError: as extrapolate.check().
        ValueError: a model equals the start.
    """
    names = list(models)
    pairs = {name: _weight_pairs(start, folder) for name, folder in models.items()}
    products = {}  # of the Δθ of each two models, and of each model with itself
    for i, name in enumerate(names):
        for other in names[i:]:
            products[name, other] = 0.0
    rows = []
    for tensor in _common_names(pairs):
        theta_sft = _read(pairs[names[0]][tensor].sft)
        deltas = {}
        for name in names:
            pair = pairs[name][tensor]
            deltas[name] = _read(pair.aligned) - theta_sft
        for name, other in products:
            product = deltas[name].flatten() @ deltas[other].flatten()
            products[name, other] += float(product)
        for name, delta in deltas.items():
            row = _describe(tensor, theta_sft, delta)
            rows.append({"model": name, **row})
    for name in names:
        if not products[name, name]:
            raise ValueError(f"{name} has the very weights of {start}: it has not moved")
    cosines = {}
    for (name, other), product in products.items():
        squares = products[name, name] * products[other, other]
        cosines[name, other] = product / math.sqrt(squares)
    return rows, cosines


def straightness(start: str | Path, checkpoints: list[str | Path], end: str | Path) -> list[dict]:
    """Measure how close the checkpoints of a training lie to the line from its start to its end.

    A checkpoint's way from the start has a part along that line, and a rest across it. The share of
    the squares that is along, R² = Σ‖along‖² / Σ‖way‖², is 1 for a straight way. Of a random walk
    in many dimensions it is about Σ t² / (T Σ t) over its steps t of T.

    Args:
        start, end: folders of the model before and after the training.
        checkpoints: folders of the model in between.
    Returns:
        rows: one per tensor, as of movement() with the end's `change`, and the sums `along` and
            `way` of squares over the checkpoints, so that the sums of rows give the R² of all.
    Raises:
        ValueError: no checkpoint, or as movement().
    """
    if not checkpoints:
        raise ValueError("a way needs checkpoints between its start and its end")
    folders = {"end": end}
    for number, folder in enumerate(checkpoints):
        folders[str(number)] = folder
    pairs = {name: _weight_pairs(start, folder) for name, folder in folders.items()}
    rows = []
    for tensor in _common_names(pairs):
        theta_sft = _read(pairs["end"][tensor].sft)
        whole = _read(pairs["end"][tensor].aligned) - theta_sft
        length = float(whole.norm())
        along = 0.0
        way = 0.0
        for name in list(folders)[1:]:
            step = _read(pairs[name][tensor].aligned) - theta_sft
            way += float(step.norm()) ** 2
            if length:
                along += (float(step.flatten() @ whole.flatten()) / length) ** 2
        rows.append({**_describe(tensor, theta_sft, whole), "along": along, "way": way})
    return rows


def low_rank(start: str | Path, model: str | Path, out: str | Path, rank: int) -> dict:
    """Write a model that has moved from θ₀ as another, in each matrix along `rank` directions only.

    Each matrix of Δθ is replaced by the nearest one of that rank: its largest singular values
    (Eckart and Young 1936). Other tensors, such as norms, move as they did.

    Args:
        start, model: folders of θ₀ and θ₁.
        out: an existing folder.
    Returns:
        {"kept"}: the share of ‖Δθ‖² that is left, in 0…1.
    Raises:
        ValueError: a rank below 1, or as movement().
    """
    if rank < 1:
        raise ValueError(f"a rank is 1 or more, got {rank}")
    pairs = _weight_pairs(start, model)
    weights = {}
    all_squares = 0.0
    kept_squares = 0.0
    for pair in pairs.values():
        theta_sft = _read(pair.sft)
        delta = _read(pair.aligned) - theta_sft
        kept = _nearest(delta, rank) if delta.dim() == 2 else delta
        all_squares += float(delta.norm()) ** 2
        kept_squares += float(kept.norm()) ** 2
        with safe_open(pair.aligned.file, "pt") as file:
            dtype = file.get_tensor(pair.aligned.name).dtype
        weights[pair.aligned.name] = (theta_sft + kept).to(dtype).contiguous()
    for file in Path(model).iterdir():
        if file.suffix in (".json", ".jinja", ".txt", ".model") and file.name != MANIFEST:
            shutil.copyfile(file, Path(out, file.name))
    save_file(weights, Path(out, "model.safetensors"), {"format": "pt"})
    return {"kept": kept_squares / all_squares if all_squares else 0.0}


def _nearest(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    """Return the nearest matrix of a rank, in the Frobenius norm."""
    left, values, right = torch.linalg.svd(matrix.float(), full_matrices=False)
    kept = left[:, :rank] * values[:rank] @ right[:rank]
    return kept.to(matrix.dtype)


def _weight_pairs(start: str | Path, model: str | Path) -> dict[str, extrapolate.TensorPair]:
    """Return {name in the start: tensor pair} of floating-point weights; of two tied names one."""
    pairs = {}
    for pair in extrapolate.check(start, model):
        if pair.sft.dtype.is_floating_point and not extrapolate.derived(pair.aligned):
            pairs[pair.sft.name] = pair
    return pairs


def _common_names(pairs: dict[str, dict[str, extrapolate.TensorPair]]) -> list[str]:
    """Return the names of the tensors that all models have, in the order of the first one.

    One model may store the second of two tied names where another does not.
    """
    first, *others = pairs.values()
    names = []
    for name in first:
        if all(name in other for other in others):
            names.append(name)
    return names


def _describe(tensor: str, theta_sft: torch.Tensor, delta: torch.Tensor) -> dict:
    """Return what a row says about one tensor of one model."""
    part = "other"
    for candidate, mark in PARTS.items():
        if mark in tensor:
            part = candidate
            break
    layer = re.search(r"\.layers\.(\d+)\.", tensor)
    return {
        "tensor": tensor,
        "part": part,
        "layer": int(layer[1]) if layer else None,
        "size": theta_sft.numel(),
        "weight": float(theta_sft.norm()),
        "change": float(delta.norm()),
    }


def _read(tensor: extrapolate.StoredTensor) -> torch.Tensor:
    """Return a stored tensor's content in float64."""
    with safe_open(tensor.file, "pt") as file:
        return file.get_tensor(tensor.name).double()
