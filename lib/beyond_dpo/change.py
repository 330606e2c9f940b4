"""How far, and in which direction, training moves the weights (ACL Table 1, arXiv 2404.16792)."""

import math
import re

from safetensors import safe_open

from beyond_dpo import extrapolate

PARTS = {
    "attention": ".self_attn.",
    "MLP": ".mlp.",
    "norms": "norm.",
    "embeddings": "embed_tokens.",
}


def movement(start, models: dict) -> tuple[list[dict], dict[tuple[str, str], float]]:
    """Measure Δθ = θ₁ − θ₀ of each model, tensor by tensor.

    start: folder of θ₀. models: {name: folder of θ₁}, all with θ₀'s tensors. Returns (rows,
    cosines): one row per model and tensor, with its part (attention, MLP, norms, embeddings or
    other), its layer (None outside the layers), its size, and the Frobenius norms `change` of Δθ
    and `weight` of θ₀; and for each two models the cosine of their Δθ over all tensors, in −1…1.
    Sums are float64, memory is one tensor of each model. Raises as extrapolate.check(); ValueError
    for a model that equals the start. The squares of a model's `change` add up to that of the whole
    Δθ.
    """
    names, rows = list(models), []
    pairs = {name: _moving(start, models[name]) for name in names}
    products = {(a, b): 0.0 for i, a in enumerate(names) for b in names[i:]}
    for tensor in pairs[names[0]]:
        if not all(
            tensor in held for held in pairs.values()
        ):  # one stores the second of two tied names, another not
            continue
        theta = _read(pairs[names[0]][tensor][0])
        moved = {name: _read(pairs[name][tensor][1]) - theta for name in names}
        for a, b in products:
            products[a, b] += float(moved[a].flatten() @ moved[b].flatten())
        part = next((p for p, mark in PARTS.items() if mark in tensor), "other")
        layer = re.search(r"\.layers\.(\d+)\.", tensor)
        about = {
            "tensor": tensor,
            "part": part,
            "layer": int(layer[1]) if layer else None,
            "size": theta.numel(),
        }
        about["weight"] = float(theta.norm())
        rows += [
            {"model": name, **about, "change": float(delta.norm())} for name, delta in moved.items()
        ]
    if still := [name for name in names if not products[name, name]]:
        raise ValueError(f"{still[0]} has the very weights of {start}: it has not moved")
    return rows, {
        (a, b): p / math.sqrt(products[a, a] * products[b, b]) for (a, b), p in products.items()
    }


def _moving(start, model) -> dict:
    """Return {name in the start: where it is in both} of all floating-point weights; of two tied
    names one.
    """
    pairs = [
        (zero, one) for zero, one in extrapolate.check(start, model) if not extrapolate.derived(one)
    ]
    return {zero.name: (zero, one) for zero, one in pairs if zero.kind.startswith("float")}


def _read(stored):
    with safe_open(stored.file, "pt") as f:
        return f.get_tensor(stored.name).double()
