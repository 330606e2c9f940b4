"""How far, and in which direction, training moves the weights (ACL Table 1, arXiv 2404.16792)."""

import math
import re
from pathlib import Path

import torch
from safetensors import safe_open

from beyond_dpo import extrapolate

# Part of a model: what stands in the names of its tensors.
PARTS = {
    "attention": ".self_attn.",
    "MLP": ".mlp.",
    "norms": "norm.",
    "embeddings": "embed_tokens.",
}


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
