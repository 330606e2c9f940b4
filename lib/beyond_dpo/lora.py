"""Low-rank adapters (LoRA, arXiv 2106.09685): train them, and extrapolate by their scale alone.

An aligned model θ₁ = θ₀ + s·BA has θ₁ + α(θ₁ − θ₀) = θ₀ + (1 + α)·s·BA, exactly (ExPO's Eq. 6, arXiv 2404.16792): the
same small file with another scale, so that one engine answers with all α side by side.
"""

import json
from pathlib import Path

from beyond_dpo import paths

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # of tensor names in an adapter's file, as peft writes them
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM makes room for


def inject(model, rank: int, alpha: float) -> None:
    """Give every linear layer of `model` but its head an adapter BA (B = 0), and freeze all other weights."""
    import peft

    settings = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules="all-linear", task_type="CAUSAL_LM")
    peft.inject_adapter_in_model(settings, model)


def save(model, weights: dict, out: Path) -> None:
    """Write the adapter of an injected model, in peft's format and without any path: what vLLM and peft load.

    weights: the trained parameters by their name in `model`.
    """
    from safetensors.torch import save_file

    settings = model.peft_config["default"].to_dict() | {"inference_mode": True}
    settings["target_modules"] = sorted(settings["target_modules"])
    text = json.dumps(settings, indent=1, sort_keys=True, default=str)
    Path(out, CONFIG).write_text(text)
    save_file({PREFIX + name.replace(".default.", "."): w for name, w in weights.items()}, Path(out, WEIGHTS))


def scaled(adapter: str | Path, outputs: dict[float, str | Path]) -> None:
    """Write {alpha: folder}: the adapter with its scale times 1 + alpha, its weights linked, not copied.

    Raises as scale().
    """
    settings, adapter = json.loads(Path(adapter, CONFIG).read_text()), Path(adapter)
    scale(settings, adapter)
    for alpha, out in outputs.items():
        Path(out).mkdir(parents=True, exist_ok=True)
        changed = settings | {"lora_alpha": settings["lora_alpha"] * (1 + alpha)}
        Path(out, CONFIG).write_text(json.dumps(changed, indent=1, sort_keys=True))
        paths.link(adapter / WEIGHTS, Path(out, WEIGHTS))


def scale(settings: dict, adapter: Path) -> float:
    """Return s, by which BA is added: lora_alpha / r, or lora_alpha / √r of a rank-stabilised adapter.

    Raises ValueError for an adapter that is more than s·BA of linear layers, where (1 + α)·s would not be ExPO.
    """
    more = ("use_dora", "modules_to_save", "alpha_pattern", "rank_pattern", "trainable_token_indices", "lora_bias")
    if found := [name for name in more if settings.get(name)] + [b for b in [settings.get("bias")] if b != "none"]:
        raise ValueError(f"{adapter} is more than s·BA ({', '.join(found)}): merge it, and extrapolate whole models")
    return settings["lora_alpha"] / (settings["r"] ** (0.5 if settings.get("use_rslora") else 1))


def deltas(adapter: str | Path) -> dict:
    """Return s·BA in float32 by the name of the weight that it is added to. Raises as scale()."""
    from safetensors.torch import load_file

    adapter = Path(adapter)
    weights, s = load_file(adapter / WEIGHTS), scale(json.loads(Path(adapter, CONFIG).read_text()), adapter)
    found = {}
    for name in [name for name in weights if name.endswith(".lora_A.weight")]:
        a, b = weights[name].float(), weights[name.replace("lora_A", "lora_B")].float()
        found[name.removeprefix(PREFIX).replace(".lora_A.weight", ".weight")] = s * (b @ a)
    return found


def tensors(sft: str | Path, adapter: str | Path | None, alpha: float, modules: dict[str, float] | None = None):
    """Return an iterator over (name, θ₀ + (1 + α)·s·BA), float32 where something is added, else θ₀ as it is stored.

    As extrapolate.tensors(), which it calls for an aligned model that is no adapter; arguments as there. Raises alike,
    IncompatibleModels for an adapter of other tensors or one that adds nothing, and as scale().
    """
    from beyond_dpo import extrapolate

    if adapter is None or not Path(adapter, CONFIG).exists():
        return extrapolate.tensors(sft, adapter, alpha, modules)
    pairs, added = extrapolate.check(sft, None), deltas(adapter)
    alphas = extrapolate._alphas(pairs, [alpha], modules or {})
    for name, delta in added.items():
        shape = next((list(one.shape) for _, one in pairs if one.name == name), None)
        if shape != list(delta.shape):
            added_to = f"{adapter} adds {list(delta.shape)} to {name}, in {sft} it is {shape}"
            raise extrapolate.IncompatibleModels(added_to)
    if not any(delta.any() for delta in added.values()):
        raise extrapolate.IncompatibleModels(extrapolate.EQUAL.format(sft, adapter))

    def stream():
        for name, weight in extrapolate.tensors(sft, None, 0.0):
            moves = name in added and alphas[name][0] != -1
            yield name, weight.float() + (1 + alphas[name][0]) * added[name] if moves else weight

    return stream()
