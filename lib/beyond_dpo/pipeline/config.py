"""Profiles: one dial from a laptop test (`smoke`) to the paper's own settings (`paper`).

`load("expo", "cpu")` merges `base` and an overlay of `profiles/<paper>.yaml`. Only values enter the
keys of results, never a profile's name.
"""

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
from beyond_dpo.pipeline.settings import Expo, Mallows, Needs, Source, World, Wrpo
from beyond_dpo.rows import FUSED

# The settings are imported for users of this module.
__all__ = ["FUSED", "ConfigError", "Decoding", "Source", "Train", "World", "check_batch"]
PROFILES = ("smoke", "cpu", "night", "gpu", "paper")
BELOW = {"night": "cpu"}  # the profile whose values hold where a profile has none of its own
# Keys that begin so are in no table of differences: a profile's own name, and lists of models.
HIDDEN = ("profile", "pairs.", "wrong_pairs.")
# For MallowsPO and WRPO the judges are in none either: no result but the benchmarks' has to do with
# them.
JUDGES = ("judge", "mt_bench_judge")
SCHEMAS = {"expo": Expo, "mallows": Mallows, "wrpo": Wrpo}


def load(paper: str, profile: str, experiment: str = "", **overrides) -> Expo | Mallows | Wrpo:
    """Return the configuration of `paper` at `profile`, with `overrides` by dotted key.

    Args:
        experiment: one with models of its own at some profile, as `paper/llama3`.
        overrides: `train.lr`, or `train__lr`. A key set to None keeps the profile's value, so that
            a notebook can list what may be changed; a tuple or a grid is replaced whole. NumPy
            numbers and paths are taken as plain ones; a float32 is the decimal number that it
            prints.
    Raises:
        ConfigError: an unknown name or key, a wrong type or a value out of range, settings that
            contradict each other, an impossible batch split, a missing α grid, or a world without
            the prompts that its experiments need.

    Where nothing is overridden and results are read (COMPUTE is auto or never), the overlay
    `<profile>/frozen` holds too: the settings of the results in data/frozen.
    A target or data set that is not the profile's has needs that the profile does not know: then
    `needs` asks for nothing, unless it is given.
    """
    changed = _overrides(overrides)
    reads_frozen = not changed and _reads_frozen()
    values = _profile(paper, profile, experiment, reads_frozen)
    if _changes_world(values["world"], changed.get("world") or {}):
        names = [field.name for field in fields(Needs)]
        values["needs"] = dict.fromkeys(names, 0)
    for name in ("pairs", "wrong_pairs"):
        if name in changed:  # lists of models, replaced whole
            values[name] = {}
    values = _merge(values, changed)
    schema = SCHEMAS[paper]
    try:
        as_json = json.dumps(values)  # pydantic takes a JSON list for a tuple
        config = TypeAdapter(schema).validate_json(as_json)
    except ValidationError as error:
        raise ConfigError(_first_error(error, schema)) from None
    _check_names(config, schema, overrides)
    _check_settings(config)
    return config


def _changes_world(world: dict, changes: dict) -> bool:
    """Return whether overrides name another target or data set than a profile's world has."""
    for name in ("target", "dataset"):
        if name in changes and changes[name] != world.get(name):
            return True
    return False


def _overrides(by_key: dict) -> dict:
    """Return overrides by dotted key as nested dicts, without those that are None."""
    nested: dict = {}
    for key, value in by_key.items():
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
    import numpy  # no start-up cost: whoever has such a value has it loaded

    try:
        array = numpy.asarray(value)
    except (TypeError, ValueError, RuntimeError):
        # It is a tensor of another device, or of a dtype that NumPy does not have.
        raise _unusable(key, value) from None
    if array.ndim:
        return _plain(key, list(array))
    number = array[()]
    if isinstance(number, numpy.floating):
        return float(str(number))
    return _plain(key, array.item())


def _unusable(key: str, value) -> ConfigError:
    kind = type(value).__name__
    problem = f"a {kind} cannot be a setting, got {value!r:.80}"
    return ConfigError(f"{key}: {problem}; give a plain value")


def _profile(paper: str, profile: str, experiment: str, frozen: bool) -> dict:
    """Return the values of a profile: its layers one over another, and what the machine sets."""
    if paper not in SCHEMAS:
        raise ConfigError(_unknown("paper", paper, SCHEMAS))
    if profile not in PROFILES:
        raise ConfigError(_unknown("profile", profile, PROFILES))
    folder = Path(__file__).parent / "profiles"
    file = folder / f"{paper}.yaml"
    layers = yaml.safe_load(file.read_text(encoding="utf-8"))
    experiments = [""]
    for name in layers:
        _, slash, own_name = name.partition("/")
        if slash:
            experiments.append(own_name)
    if experiment not in experiments:
        raise ConfigError(_unknown("experiment", experiment, experiments))
    names = ["base", profile, f"{profile}/{experiment}"]
    if profile in BELOW:
        names.insert(1, BELOW[profile])
    if frozen:
        names.append(f"{profile}/frozen")
    values = {"profile": profile}
    for name in names:
        values = _merge(values, layers.get(name, {}))
    return _merge(values, _machine_settings(values))


def _machine_settings(values: dict) -> dict:
    """Return what the environment sets of the trainings and the samplings (see cluster.machine)."""
    training = cluster.machine(Train.MACHINE)
    decoding = {}
    for name, value in cluster.machine(Decoding.MACHINE).items():
        if name in Decoding.MACHINE:  # a hostfile sets more, which is of trainings alone
            decoding[name] = value
    if "engines" not in decoding:  # a single engine stays on the head
        decoding.pop("launcher", None)
    settings = {"sft": training, "train": training}
    for name in ("decoding", "sampling"):
        if values.get(name):
            settings[name] = decoding
    return settings


def _reads_frozen() -> bool:
    """Return whether COMPUTE lets a run read the results in data/frozen, or plans one that may."""
    mode = os.environ.get("COMPUTE") or "auto"
    return mode in ("auto", "never", "plan", "name")


def _first_error(error: ValidationError, schema) -> str:
    """Return a message about the first error, with the key, or for an unknown one the nearest."""
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "unexpected_keyword_argument":
        return _unknown("key", key, _keys(schema))
    message = first["msg"]
    value = first["input"]
    return f"{key}: {message}, got {value!r}"


def _keys(schema, prefix: str = "") -> list[str]:
    """Return every key of a settings class, those of its sections dotted."""
    keys = []
    for field in fields(schema):
        keys.append(prefix + field.name)
        if is_dataclass(field.type):
            keys += _keys(field.type, f"{prefix}{field.name}.")
    return keys


def _check_names(config, schema, overrides: dict) -> None:
    """Raise ConfigError for a key, a source or a fraction that the configuration does not have."""
    known = [*_keys(schema), *_flat(asdict(config))]
    for key, value in overrides.items():
        dotted = key.replace("__", ".")
        if value is None and dotted not in known:  # with a value it was refused before
            raise ConfigError(_unknown("key", dotted, known))
    if isinstance(config, Wrpo):
        _check_sources(config)
    for fraction in getattr(config, "fractions", ()):
        check_grid(config, fraction)


def _check_sources(config: Wrpo) -> None:
    """Raise ConfigError for a source that is named and not known."""
    for names in (config.sources, *config.source_sets, *config.compared):
        for name in names:
            if name not in config.known_sources:
                raise ConfigError(_unknown("source", name, config.known_sources))


def _check_settings(config) -> None:
    """Raise ConfigError for settings that contradict each other."""
    for name in ("sft", "train"):
        _check_lengths(getattr(config, name), name)
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
    _check_reward_model(config.world)
    if isinstance(config, Wrpo) and config.held_out:
        _check_held_out(config)
    if config.world.pairs == "sampled":
        require_prompts(config.world, "prompts", *_judged_on(config))
    _check_losses(config)


def _check_held_out(config: Wrpo) -> None:
    """Raise ConfigError for prompts that judge and are learnt from, or are more than there are."""
    world = config.world
    last = world.pools - 1
    learners = [seed for seed in (0, *config.seeds) if seed % world.pools == last]
    if learners:
        raise ConfigError(
            f"held_out={config.held_out} takes the last of world.pools={world.pools}, from which a "
            f"training with seed {learners[0]} learns: use more pools, or other seeds"
        )
    if config.held_out > world.prompts:
        raise ConfigError(
            f"held_out={config.held_out}, but a pool has world.prompts={world.prompts}"
        )


def _check_reward_model(world: World) -> None:
    """Raise ConfigError for a reward model of words that no labels train."""
    if world.reward_model in ("words", "ngrams") and not world.reward_rows:
        raise ConfigError(
            f"world.reward_model: {world.reward_model!r} is trained on labels, but "
            "world.reward_rows is 0: set it, or name a finished reward model"
        )


def _check_lengths(train: Train, where: str) -> None:
    """Raise ConfigError for a batch that cannot be split, or prompts as long as the whole text."""
    check_batch(train, where=where)
    if train.max_prompt >= train.max_length:
        room = f"{where}.max_prompt={train.max_prompt} leaves no room for a response"
        raise ConfigError(f"{room} in {where}.max_length={train.max_length}")


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
        known = ", ".join(str(with_grid) for with_grid in config.alphas)
        problem = f"no grid for fraction {fraction}, only for {known}"
        raise ConfigError(f"alphas has {problem}")


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
        problem = _unknown("loss", loss, get_args(PlainLosses))
        raise ConfigError(f"{where}: {problem}")
    try:
        replace(train, **{"loss": loss} | settings)
    except ValidationError as error:
        raise ConfigError(f"{where}: {_first_error(error, Train)}") from None


def differences(config, other) -> list[tuple[str, object, object]]:
    """Return (dotted key, value, other value) wherever two configurations of one paper differ."""
    hidden = HIDDEN if isinstance(config, Expo) else (*HIDDEN, *JUDGES)
    here = _flat(asdict(config))
    there = _flat(asdict(other))
    rows = []
    for key in {**here, **there}:
        if key.startswith(hidden):
            continue
        value = here.get(key)
        other_value = there.get(key)
        if value != other_value:
            rows.append((key, value, other_value))
    return rows


def _is_section(value) -> bool:
    """Return whether a value is a section of named settings, unlike `alphas`, keyed by numbers."""
    if not isinstance(value, dict):
        return False
    return all(isinstance(key, str) for key in value)


def _merge(below: dict, above: dict) -> dict:
    """Lay one layer over another: sections key by key, all else whole."""
    merged = dict(below)
    for key, value in above.items():
        if _is_section(value) and _is_section(merged.get(key)):
            value = _merge(merged[key], value)
        merged[key] = value
    return merged


def _flat(values: dict, prefix: str = "") -> dict:
    """Return nested sections as one dict by dotted key."""
    flat = {}
    for key, value in values.items():
        if _is_section(value):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _unknown(what: str, name: str, valid) -> str:
    """Return a message about an unknown name, with the nearest valid one or else all of them."""
    nearest = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.4)
    if nearest:
        return f"unknown {what} {name!r}; did you mean {nearest[0]!r}?"
    names = ", ".join(valid)
    return f"unknown {what} {name!r}; valid: {names}"
