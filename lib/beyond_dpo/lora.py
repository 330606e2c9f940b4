"""Low-rank adapters (LoRA, arXiv 2106.09685): train them, and extrapolate by their scale alone.

An aligned model θ₁ = θ₀ + s·BA has θ₁ + α(θ₁ − θ₀) = θ₀ + (1 + α)·s·BA, exactly (ExPO's Eq. 6,
arXiv 2404.16792): the same small file with another scale.
"""

import json
from pathlib import Path

from safetensors import safe_open

from beyond_dpo.files import link_file, write_file

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."  # of tensor names in an adapter's file, as peft writes them
A = ".lora_A.weight"
B = ".lora_B.weight"
# Settings of peft's LoraConfig that change nothing of θ₀ + s·BA, or that are looked at one by one.
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
# Initial values of A and B that leave θ₀ as it is.
STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
# Types of models whose linear layers are Conv1D, with weights of shape (in, out).
CONV1D = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
INSTEAD = "merge it, and extrapolate whole models"


def inject(model, rank: int, alpha: float) -> None:
    """Give every linear layer of a model but its head an adapter BA, and freeze all else.

    B is 0 at first, so the model computes what it did. rank: of A and B. alpha: lora_alpha.
    """
    import peft

    settings = peft.LoraConfig(
        r=rank, lora_alpha=alpha, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    peft.inject_adapter_in_model(settings, model)


def save(model, weights: dict, out: Path) -> None:
    """Write the adapter of an injected model in peft's format, which vLLM loads too.

    No path of this machine is written.

    weights: the trained parameters by their name in `model`.
    """
    from safetensors.torch import save_file

    settings = model.peft_config["default"].to_dict() | {"inference_mode": True}
    settings["target_modules"] = sorted(settings["target_modules"])
    text = json.dumps(settings, indent=1, sort_keys=True, default=str)
    Path(out, CONFIG).write_text(text, encoding="utf-8")
    tensors_by_peft_name = {}
    for name, weight in weights.items():
        tensors_by_peft_name[PREFIX + name.replace(".default.", ".")] = weight
    save_file(tensors_by_peft_name, Path(out, WEIGHTS))


def scaled(adapter: str | Path, outputs: dict[float, str | Path]) -> None:
    """Write an adapter with its scale times 1 + alpha for each {alpha: folder}.

    Its weights are linked, not copied. Raises ValueError for an adapter that is no plain LoRA, see
    read_settings() and products().
    """
    adapter = Path(adapter)
    settings = read_settings(adapter)
    products(adapter)
    for alpha, out in outputs.items():
        out = Path(out)
        out.mkdir(parents=True, exist_ok=True)
        scaled_alpha = settings["lora_alpha"] * (1 + alpha)
        text = json.dumps(settings | {"lora_alpha": scaled_alpha}, indent=1, sort_keys=True)
        write_file(out / CONFIG, text)
        link_file(adapter / WEIGHTS, out / WEIGHTS)


def read_settings(adapter: Path) -> dict:
    """Return the settings of an adapter's folder; raise ValueError as require_plain()."""
    from beyond_dpo import extrapolate

    settings = extrapolate.load_json(adapter / CONFIG)
    require_plain(settings, str(adapter))
    return settings


def require_plain(settings: dict, adapter: str) -> None:
    """Raise ValueError unless the settings are those of a plain LoRA.

    A plain LoRA is θ₀ + s·BA, with θ₀ the base model as it is. Refused are another kind (LoHa,
    IA3, …), one that adds more than s·BA (DoRA, biases, …), and one whose start has changed θ₀
    (PiSSA, OLoRA, …): for those (1 + α)·s would not be ExPO. A setting that is not known here
    counts as one that adds something.

    adapter: how errors name it.
    """
    kind = settings.get("peft_type")
    if kind != "LORA" or not isinstance(settings.get("r"), int) or "lora_alpha" not in settings:
        raise ValueError(
            f"{adapter} is an adapter of kind {kind}, not a LoRA with r and lora_alpha: {INSTEAD}"
        )
    additions = [name for name in sorted(settings.keys() - NEUTRAL) if settings[name]]
    if settings.get("bias", "none") != "none":
        additions.append(settings["bias"])
    if additions:
        names = ", ".join(map(str, additions))
        raise ValueError(f"{adapter} is more than s·BA ({names}): {INSTEAD}")
    start = settings.get("init_lora_weights", True)
    if start not in STARTS:
        raise ValueError(
            f"{adapter} belongs to a base model that its start ({start}) has changed: save it "
            "once more with peft's "
            f"path_initial_model_for_weight_conversion, which makes it a plain LoRA, or {INSTEAD}"
        )


def scale(settings: dict) -> float:
    """Return s, the factor of BA: lora_alpha / r, or lora_alpha / √r if rank-stabilised."""
    exponent = 0.5 if settings.get("use_rslora") else 1
    return settings["lora_alpha"] / settings["r"] ** exponent


def products(adapter: Path) -> list[str]:
    """Return the names of the layers to which an adapter adds a product BA, as its file has them.

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
    layers = firsts & seconds
    unused = names - {layer + A for layer in layers} - {layer + B for layer in layers}
    if unused:
        raise ValueError(
            f"{adapter} holds {min(unused)}, which is no half of a product BA: {INSTEAD}"
        )
    return sorted(layers)


def deltas(sft: Path, adapter: Path, shapes: dict[str, list[int]]) -> dict:
    """Return {name of a weight of `sft`: the s·BA that is added to it}, in float32.

    Each has the layout of its weight: Conv1D layers (GPT-2's) keep theirs transposed. shapes: of
    the tensors of `sft`, by name. Raises as read_settings() and products(), and IncompatibleModels
    for an adapter of other tensors, or of one of two tied ones, which peft moves alone.
    """
    from beyond_dpo import extrapolate

    settings = read_settings(adapter)
    config = extrapolate.load_json(sft / "config.json")
    in_first = settings.get("fan_in_fan_out") or config.get("model_type") in CONV1D
    added = {}
    for layer in products(adapter):
        with safe_open(adapter / WEIGHTS, "pt") as file:
            a = file.get_tensor(layer + A).float()
            b = file.get_tensor(layer + B).float()
        delta = scale(settings) * (b @ a)
        name = _name_in(shapes, layer.removeprefix(PREFIX) + ".weight")
        shape = shapes.get(name)
        fits = shape == list(delta.shape)
        fits_transposed = shape == list(delta.T.shape)
        if fits_transposed and (in_first or not fits):
            delta = delta.T
        elif not fits:
            raise extrapolate.IncompatibleModels(
                f"{adapter} adds {list(delta.shape)} to {name}, in {sft} it is {shape}"
            )
        tied_names = extrapolate.HEADS + extrapolate.EMBEDDINGS
        if name.endswith(tied_names) and extrapolate.ties_embeddings(sft):
            raise extrapolate.IncompatibleModels(
                f"{adapter} moves {name}, which {sft} ties to another: {INSTEAD}"
            )
        added[name] = delta
    return added


def _name_in(stored: dict, name: str) -> str:
    """Return a weight's name in a checkpoint; some leave out its first part ("transformer.")."""
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
    """Return an iterator over the (name, tensor) of θ₀ + (1 + α)·s·BA.

    A tensor is float32 where something is added, else it is θ₀'s as it is stored. An `adapter` that
    is None or a whole model goes to extrapolate.tensors(), whose arguments these are. Raises as
    that and deltas(), and IncompatibleModels for an adapter that adds nothing.
    """
    from beyond_dpo import extrapolate

    if adapter is None or not Path(adapter, CONFIG).exists():
        return extrapolate.tensors(sft, adapter, alpha, modules)
    pairs = extrapolate.check(sft, None)
    shapes = {pair.sft.name: pair.sft.shape for pair in pairs}
    added = deltas(Path(sft), Path(adapter), shapes)
    alphas = extrapolate.module_alphas(pairs, [alpha], modules or {})
    if not any(delta.any() for delta in added.values()):
        raise extrapolate.IncompatibleModels(extrapolate.EQUAL.format(sft, adapter))

    def stream():
        for name, weight in extrapolate.tensors(sft, None, 0.0):
            factor = 1 + alphas[name][0]
            if name in added and factor != 0:
                yield name, weight.float() + factor * added[name]
            else:
                yield name, weight

    return stream()
