"""Low-rank adapters (LoRA, arXiv 2106.09685): train them, and extrapolate by their scale alone.

An aligned model θ₁ = θ₀ + s·BA has θ₁ + α(θ₁ − θ₀) = θ₀ + (1 + α)·s·BA, exactly (ExPO's Eq. 6,
arXiv 2404.16792): the same small file with another scale.
"""

import json
from pathlib import Path

from safetensors import safe_open

from beyond_dpo.files import link_file, write_file

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # of tensor names in an adapter's file, as peft writes them
A, B = ".lora_A.weight", ".lora_B.weight"
# settings of peft's LoraConfig that change nothing of θ₀ + s·BA, or are looked at one by one
NEUTRAL = {
    "peft_type",
    "task_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "r",
    "lora_alpha",
    "use_rslora",
    "fan_in_fan_out",
    "bias",
    "init_lora_weights",
    "lora_dropout",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "megatron_core",
    "qalora_group_size",
    "eva_config",
}
STARTS = (True, False, None, "gaussian", "eva", "orthogonal")  # of A and B, which leave θ₀ as it is
CONV1D = (
    "gpt2",
    "openai-gpt",
    "imagegpt",
    "decision_transformer",
)  # weights of such layers are (in, out)
INSTEAD = "merge it, and extrapolate whole models"


def inject(model, rank: int, alpha: float) -> None:
    """Give every linear layer of `model` but its head an adapter BA (B = 0), and freeze all other
    weights.
    """
    import peft

    settings = peft.LoraConfig(
        r=rank, lora_alpha=alpha, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    peft.inject_adapter_in_model(settings, model)


def save(model, weights: dict, out: Path) -> None:
    """Write the adapter of an injected model, in peft's format and without any path: what vLLM and
    peft load.

    weights: the trained parameters by their name in `model`.
    """
    from safetensors.torch import save_file

    settings = model.peft_config["default"].to_dict() | {"inference_mode": True}
    settings["target_modules"] = sorted(settings["target_modules"])
    text = json.dumps(settings, indent=1, sort_keys=True, default=str)
    Path(out, CONFIG).write_text(text, encoding="utf-8")
    save_file(
        {PREFIX + name.replace(".default.", "."): w for name, w in weights.items()},
        Path(out, WEIGHTS),
    )


def scaled(adapter: str | Path, outputs: dict[float, str | Path]) -> None:
    """Write {alpha: folder}: the adapter with its scale times 1 + alpha, its weights linked, not
    copied.

    Raises ValueError for an adapter that is no plain LoRA, see read_settings() and products().
    """
    adapter = Path(adapter)
    settings = read_settings(adapter)
    products(adapter)
    for alpha, out in outputs.items():
        Path(out).mkdir(parents=True, exist_ok=True)
        changed = settings | {"lora_alpha": settings["lora_alpha"] * (1 + alpha)}
        write_file(Path(out, CONFIG), json.dumps(changed, indent=1, sort_keys=True))
        link_file(adapter / WEIGHTS, Path(out, WEIGHTS))


def read_settings(adapter: Path) -> dict:
    """Return an adapter's settings, of a plain LoRA: θ₀ + s·BA, added to linear layers of the very
    θ₀ that is given.

    Raises ValueError for another kind (LoHa, IA3, …), for one that is more than s·BA (DoRA, biases,
    …), and for one whose start has changed θ₀ (PiSSA, OLoRA, …): for those (1 + α)·s would not be
    ExPO. A setting that is not known here counts as one that adds something.
    """
    from beyond_dpo import extrapolate

    settings = extrapolate.load_json(adapter / CONFIG)
    kind = settings.get("peft_type")
    if kind != "LORA" or not isinstance(settings.get("r"), int) or "lora_alpha" not in settings:
        raise ValueError(
            f"{adapter} is an adapter of kind {kind}, not a LoRA with r and lora_alpha: {INSTEAD}"
        )
    more = [name for name in sorted(settings.keys() - NEUTRAL) if settings[name]]
    if settings.get("bias", "none") != "none":
        more.append(settings["bias"])
    if more:
        raise ValueError(f"{adapter} is more than s·BA ({', '.join(map(str, more))}): {INSTEAD}")
    start = settings.get("init_lora_weights", True)
    if start not in STARTS:
        raise ValueError(
            f"{adapter} belongs to a base model that its start ({start}) has changed: save it "
            "once more with peft's "
            f"path_initial_model_for_weight_conversion, which makes it a plain LoRA, or {INSTEAD}"
        )
    return settings


def scale(settings: dict) -> float:
    """Return s, by which BA is added: lora_alpha / r, or lora_alpha / √r of a rank-stabilised
    adapter.
    """
    return settings["lora_alpha"] / (settings["r"] ** (0.5 if settings.get("use_rslora") else 1))


def products(adapter: Path) -> list[str]:
    """Return what an adapter's file adds a product BA to, as it names them.

    Raises ValueError if the file is not there, holds a tensor that is no A or B of a linear layer,
    or one without the other.
    """
    if not (adapter / WEIGHTS).exists():
        raise ValueError(
            f"no {WEIGHTS} in {adapter}: save the adapter as safetensors (a pickle is never loaded)"
        )
    with safe_open(adapter / WEIGHTS, "pt") as file:
        names = set(file.keys())
    firsts = {name.removesuffix(A) for name in names if name.endswith(A)}
    seconds = {name.removesuffix(B) for name in names if name.endswith(B)}
    used = {name + A for name in firsts & seconds} | {name + B for name in firsts & seconds}
    if names != used:
        raise ValueError(
            f"{adapter} holds {min(names - used)}, which is no half of a product BA: {INSTEAD}"
        )
    return sorted(firsts)


def deltas(sft: Path, adapter: Path, shapes: dict[str, list[int]]) -> dict:
    """Return s·BA in float32 by the name of the weight of `sft` that it is added to, and in its
    layout.

    shapes: of the tensors of `sft`, by name. Conv1D layers (GPT-2's) keep their weights transposed.
    Raises as read_settings() and products(), and IncompatibleModels for an adapter of other
    tensors, or of one of two tied ones, which peft moves alone.
    """
    from beyond_dpo import extrapolate

    settings = read_settings(adapter)
    s = scale(settings)
    about = extrapolate.load_json(sft / "config.json")
    in_first = settings.get("fan_in_fan_out") or about.get("model_type") in CONV1D
    added = {}
    for product in products(adapter):
        with safe_open(adapter / WEIGHTS, "pt") as file:
            delta = s * (
                file.get_tensor(product + B).float() @ file.get_tensor(product + A).float()
            )
        name = _name_in(shapes, product.removeprefix(PREFIX) + ".weight")
        shape = shapes.get(name)
        if shape == list(delta.T.shape) and (in_first or shape != list(delta.shape)):
            delta = delta.T
        if shape != list(delta.shape):
            what = f"{adapter} adds {list(delta.shape)} to {name}, in {sft} it is {shape}"
            raise extrapolate.IncompatibleModels(what)
        if about.get("tie_word_embeddings") and name.endswith(
            extrapolate.HEADS + extrapolate.EMBEDDINGS
        ):
            raise extrapolate.IncompatibleModels(
                f"{adapter} moves {name}, which {sft} ties to another: {INSTEAD}"
            )
        added[name] = delta
    return added


def _name_in(stored: dict, name: str) -> str:
    """Return the name under which a checkpoint stores a weight: some leave out the first part
    ("transformer.").
    """
    if name in stored:
        return name
    shorter = name.partition(".")[2]
    return shorter if shorter in stored else name


def tensors(
    sft: str | Path,
    adapter: str | Path | None,
    alpha: float,
    modules: dict[str, float] | None = None,
):
    """Return an iterator over (name, θ₀ + (1 + α)·s·BA), float32 where something is added, else θ₀
    as it is stored.

    As extrapolate.tensors(), which it calls for an aligned model that is no adapter; arguments as
    there. Raises alike, as deltas(), and IncompatibleModels for an adapter that adds nothing.
    """
    from beyond_dpo import extrapolate

    if adapter is None or not Path(adapter, CONFIG).exists():
        return extrapolate.tensors(sft, adapter, alpha, modules)
    pairs = extrapolate.check(sft, None)
    added = deltas(Path(sft), Path(adapter), {one.name: one.shape for _, one in pairs})
    alphas = extrapolate.module_alphas(pairs, [alpha], modules or {})
    if not any(delta.any() for delta in added.values()):
        raise extrapolate.IncompatibleModels(extrapolate.EQUAL.format(sft, adapter))

    def stream():
        for name, weight in extrapolate.tensors(sft, None, 0.0):
            moves = name in added and alphas[name][0] != -1
            yield name, weight.float() + (1 + alphas[name][0]) * added[name] if moves else weight

    return stream()
