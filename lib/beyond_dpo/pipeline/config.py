"""Profiles: one dial from a laptop test (`smoke`) to the paper's own settings (`paper`).

`load("expo", "cpu")` merges `base` and an overlay of `profiles/<paper>.yaml`; only values enter
keys."""

import difflib
import json
import os
from dataclasses import asdict, fields, is_dataclass, replace
from pathlib import Path
from typing import get_args

import yaml
from pydantic import TypeAdapter, ValidationError

from beyond_dpo.jobs.settings import (
    ConfigError,
    Decoding,
    PairLosses,
    PlainLosses,
    Train,
    check_batch,
)
from beyond_dpo.machine import cluster
from beyond_dpo.pipeline.settings import Expo, Mallows, Source, World, Wrpo
from beyond_dpo.rows import FUSED

# of the settings, for users of this module
__all__ = ["FUSED", "ConfigError", "Decoding", "Source", "Train", "World", "check_batch"]
PROFILES = ("smoke", "cpu", "gpu", "paper")
HIDDEN = (
    "profile",
    "pairs.",
    "wrong_pairs.",
)  # in no table of differences: its own name, and a list of models
SCHEMAS = {"expo": Expo, "mallows": Mallows, "wrpo": Wrpo}


def load(paper: str, profile: str, experiment: str = "", **overrides) -> Expo | Mallows | Wrpo:
    """Return the configuration of `paper` at `profile`, with `overrides` by dotted key.

    overrides: `train.lr`, or `train__lr`. A key set to None keeps the profile's value, so that a
        notebook can list what may be changed; a tuple or a grid is replaced whole. NumPy numbers
        and paths are taken as plain ones; a float32 is the decimal number that it prints.
    experiment: one with models of its own at some profile, as `paper/llama3`.

    Where nothing is overridden and results are read (COMPUTE is auto or never), the overlay
    `<profile>/frozen` holds too: the settings of the results in data/frozen.
    A target or data set that is not the profile's has needs that the profile does not know: then
    `needs` asks for nothing, unless it is given.
    Raises ConfigError for an unknown name or key, a wrong type or a value out of range, settings
    that contradict each other, an impossible batch split, a missing α grid, or a world without the
    prompts that its experiments need.
    """
    changed = _overrides(overrides)
    values = _profile(paper, profile, experiment, frozen=not changed and _reads_frozen())
    own = changed.get("world") or {}
    if any(key in own and own[key] != values["world"].get(key) for key in ("target", "dataset")):
        values["needs"] = dict.fromkeys(("gpus", "gpu_gb", "memory_gb", "disk_gb", "hours"), 0)
    for name in ("pairs", "wrong_pairs"):
        if name in changed:  # lists of models, replaced whole
            values[name] = {}
    values = _merge(values, changed)
    try:
        as_json = json.dumps(values)  # in JSON, where a list may be a tuple
        config = TypeAdapter(SCHEMAS[paper]).validate_json(as_json)
    except ValidationError as error:
        raise ConfigError(_told(error, SCHEMAS[paper])) from None
    _check_names(config, SCHEMAS[paper], overrides)
    _check_settings(config)
    return config


def _overrides(given: dict) -> dict:
    """Return overrides by dotted key as nested dicts, without those that are None."""
    nested: dict = {}
    for key, value in given.items():
        if value is None:
            continue
        key = key.replace("__", ".")
        value = _plain(key, value)
        for name in reversed(key.split(".")):
            value = {name: value}
        nested = _merge(nested, value)
    return nested


def _plain(key: str, value):
    """Return a value as JSON knows it: NumPy numbers and arrays, and paths, become plain ones."""
    if isinstance(value, dict):
        return _plain_dict(key, value)
    if isinstance(value, list | tuple):
        return [_plain(f"{key}.{i}", inner) for i, inner in enumerate(value)]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, str | int | float | None):
        return value
    if hasattr(value, "__array__"):
        return _plain_array(key, value)
    raise _unusable(key, value)


def _plain_dict(key: str, value: dict) -> dict:
    """Return a dict as JSON knows it; its names may be NumPy numbers or paths, as fractions are."""
    plain = {}
    for name, inner in value.items():
        name = _plain(key, name)
        if not isinstance(name, str | int | float):
            raise ConfigError(f"{key}: {name!r:.80} cannot be the name of a setting")
        if name in plain:
            raise ConfigError(f"{key}.{name} is given twice")
        plain[name] = _plain(f"{key}.{name}", inner)
    return plain


def _plain_array(key: str, value):
    """Return a NumPy number or array, or what becomes one, as plain numbers.

    Of each float of 2 or 4 bytes that is the shortest decimal number that it stands for: 0.1, where
    its exact value is 0.10000000149.
    """
    import numpy  # no start-up cost: who has such a value has it loaded

    try:
        array = numpy.asarray(value)
    except (
        TypeError,
        ValueError,
        RuntimeError,
    ):  # a tensor of another device, or of no dtype of NumPy's
        raise _unusable(key, value) from None
    if array.ndim:
        return [_plain(f"{key}.{i}", inner) for i, inner in enumerate(array)]
    if isinstance(array[()], numpy.floating):
        return float(str(array[()]))
    return _plain(key, array.item())


def _unusable(key: str, value) -> ConfigError:
    kind = type(value).__name__
    return ConfigError(
        f"{key}: a {kind} cannot be a setting, got {value!r:.80}; give a plain value"
    )


def _profile(paper: str, profile: str, experiment: str, frozen: bool) -> dict:
    """Return the values of a profile: its layers one over another, and what the machine sets."""
    if paper not in SCHEMAS:
        raise ConfigError(_unknown("paper", paper, SCHEMAS))
    if profile not in PROFILES:
        raise ConfigError(_unknown("profile", profile, PROFILES))
    file = Path(__file__).parent / "profiles" / f"{paper}.yaml"
    layers = yaml.safe_load(file.read_text(encoding="utf-8"))
    experiments = ["", *(name.partition("/")[2] for name in layers if "/" in name)]
    if experiment not in experiments:
        raise ConfigError(_unknown("experiment", experiment, experiments))
    names = ["base", profile, f"{profile}/{experiment}"]
    if frozen:
        names.append(f"{profile}/frozen")
    values = {"profile": profile}
    for name in names:
        values = _merge(values, layers.get(name, {}))
    return _merge(values, _of_machine(values))


def _of_machine(values: dict) -> dict:
    """Return what the environment sets of the trainings and the samplings (see cluster.machine)."""
    training = cluster.machine(Train.MACHINE)
    sampling = cluster.machine(Decoding.MACHINE)
    own = {name: sampling[name] for name in Decoding.MACHINE if name in sampling}
    if "engines" not in own:  # a single one stays on the head
        own.pop("launcher", None)
    found = {"sft": training, "train": training}
    for name in ("decoding", "sampling"):
        if name in values:
            found[name] = own
    return found


def _reads_frozen() -> bool:
    """Return whether COMPUTE lets a run read the results in data/frozen, or plans one that may."""
    return (os.environ.get("COMPUTE") or "auto") in ("auto", "never", "plan")


def _told(error: ValidationError, schema) -> str:
    """Say the first thing that is wrong, with the key, and for an unknown key the nearest one."""
    wrong = error.errors()[0]
    key = ".".join(map(str, wrong["loc"]))
    if wrong["type"] == "unexpected_keyword_argument":
        return _unknown("key", key, _keys(schema))
    return f"{key}: {wrong['msg']}, got {wrong['input']!r}"


def _keys(schema, prefix: str = "") -> list[str]:
    """Return every key of a settings class, those of its sections dotted."""
    keys = []
    for field in fields(schema):
        keys.append(prefix + field.name)
        if is_dataclass(field.type):
            keys += _keys(field.type, f"{prefix}{field.name}.")
    return keys


def _check_names(config, schema, overrides: dict) -> None:
    """Raise ConfigError for an unknown key that was set to None, a source or a fraction."""
    known = [*_keys(schema), *_flat(asdict(config))]
    for key in overrides:
        dotted = key.replace("__", ".")
        if overrides[key] is None and dotted not in known:
            raise ConfigError(_unknown("key", dotted, known))
    named = sum(getattr(config, "source_sets", ()), getattr(config, "sources", ()))
    for name in named:
        if name not in config.known_sources:
            raise ConfigError(_unknown("source", name, config.known_sources))
    for fraction in getattr(config, "fractions", ()):
        check_grid(config, fraction)
    for fraction in getattr(config, "seed_fractions", ()):
        if fraction not in config.fractions:
            trained = ", ".join(map(str, config.fractions))
            todo = "nothing is trained with it; give others, or seed_fractions=[]"
            raise ConfigError(
                f"seed_fractions: {fraction} is none of the fractions ({trained}): {todo}"
            )


def _check_settings(config) -> None:
    """Raise ConfigError for settings that contradict each other."""
    for name in ("sft", "train"):
        train = getattr(config, name)
        check_batch(train, where=name)
        if train.max_prompt >= train.max_length:
            room = f"{name}.max_prompt={train.max_prompt} leaves no room for a response"
            raise ConfigError(f"{room} in {name}.max_length={train.max_length}")
    for name in ("decoding", "sampling"):
        decoding = getattr(config, name, None)
        if decoding and decoding.max_tokens >= decoding.max_model_len:
            room = f"{name}.max_tokens={decoding.max_tokens} leaves no room for a prompt"
            raise ConfigError(f"{room} in {name}.max_model_len={decoding.max_model_len}")
    shortest, longest = config.world.prompt_tokens
    if shortest > longest:
        raise ConfigError(
            f"world.prompt_tokens: {shortest} (shortest) is above {longest} (longest)"
        )
    if config.sft.lora_rank:
        raise ConfigError(
            "sft.lora_rank: the SFT model, where all others start, must be whole; use "
            "train.lora_rank"
        )
    if config.world.pairs == "sampled":
        require_prompts(config.world, "prompts", *_judged_on(config))
    _check_losses(config)


def _judged_on(config) -> list[str]:
    """Return the prompts that a paper's experiments need besides those to train on."""
    return ["dev_prompts", "test_prompts"] if isinstance(config, Expo) else ["test_prompts"]


def require_prompts(world: World, *names: str) -> None:
    """Raise ConfigError if a world has none of the named prompts."""
    for name in names:
        if not getattr(world, name):
            raise ConfigError(f"world.{name}=0, but the experiments need some: set it to 1 or more")


def check_grid(config: Expo, fraction: float) -> None:
    """Raise ConfigError if no α grid is set for a fraction of the pairs."""
    if fraction not in config.alphas:
        grids = ", ".join(map(str, config.alphas))
        raise ConfigError(f"alphas has no grid for fraction {fraction}, only for {grids}")


def _check_losses(config) -> None:
    """Raise ConfigError for a loss where it cannot be trained, and for half of MallowsPO's grid."""
    if config.sft.loss != "sft":
        raise ConfigError(
            f"sft.loss: {config.sft.loss!r} compares responses, of which SFT has one: use 'sft'"
        )
    if not isinstance(config, Wrpo) and config.train.loss not in get_args(PairLosses):
        valid = ", ".join(get_args(PairLosses))
        raise ConfigError(
            f"train.loss: {config.train.loss!r} does not learn from pairs; valid: {valid}"
        )
    for name in ("plug_ins", "objectives"):
        for loss, settings in getattr(config, name, {}).items():
            _check_loss(config.train, f"{name}.{loss}", loss, settings)
    if isinstance(config, Mallows) and bool(config.grid_betas) != bool(config.grid_lrs):
        empty = "grid_lrs" if config.grid_betas else "grid_betas"
        raise ConfigError(
            f"{empty} is empty, and with it the grid of β and learning rate: fill both, or none"
        )


def _check_loss(train: Train, where: str, loss: str, settings: dict) -> None:
    """Raise ConfigError for a loss, or settings of it, that `train` could not take."""
    if loss not in get_args(PlainLosses):
        raise ConfigError(f"{where}: {_unknown('loss', loss, get_args(PlainLosses))}")
    try:
        replace(train, **{"loss": loss} | settings)
    except ValidationError as error:
        raise ConfigError(f"{where}: {_told(error, Train)}") from None


def differences(config, other) -> list[tuple[str, object, object]]:
    """Return (dotted key, value here, value there) wherever two configurations of one paper
    differ.
    """
    here = _flat(asdict(config))
    there = _flat(asdict(other))
    found = []
    for key in {**here, **there}:
        if here.get(key) != there.get(key) and not key.startswith(HIDDEN):
            found.append((key, here.get(key), there.get(key)))
    return found


def _section(value) -> bool:
    return isinstance(value, dict) and all(
        isinstance(k, str) for k in value
    )  # unlike `alphas`, keyed by numbers


def _merge(below: dict, above: dict) -> dict:
    """Lay one layer over another: sections key by key, all else whole."""
    out = dict(below)
    for key, value in above.items():
        out[key] = _merge(out[key], value) if _section(value) and _section(out.get(key)) else value
    return out


def _flat(values: dict, prefix: str = "") -> dict:
    out = {}
    for key, value in values.items():
        out |= _flat(value, f"{prefix}{key}.") if _section(value) else {f"{prefix}{key}": value}
    return out


def _unknown(what: str, name: str, valid) -> str:
    near = difflib.get_close_matches(name, list(valid), 1, 0.4)
    return f"unknown {what} {name!r}" + (
        f"; did you mean {near[0]!r}?" if near else f"; valid: {', '.join(valid)}"
    )
