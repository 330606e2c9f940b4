"""Profiles: one dial from a laptop test (`smoke`) to the paper's own settings (`paper`).

`load("expo", "cpu")` merges `base` and an overlay of `profiles/<paper>.yaml`; only values enter keys."""

import difflib
import json
from dataclasses import asdict, fields
from pathlib import Path

import yaml
from pydantic import TypeAdapter, ValidationError

from beyond_dpo import cluster
from beyond_dpo.settings import FUSED, Decoding, Expo, Mallows, Source, Train, World, Wrpo

__all__ = ["FUSED", "Decoding", "Source", "Train", "World"]  # of settings, for users of this module
PROFILES = ("smoke", "cpu", "gpu", "paper")
HIDDEN = ("profile", "pairs.", "wrong_pairs.")  # in no table of differences: its own name, and a list of models
SCHEMAS = {"expo": Expo, "mallows": Mallows, "wrpo": Wrpo}


class ConfigError(ValueError):
    """A key or value of a configuration is not usable; the message names it and the nearest valid one."""


def load(paper: str, profile: str, experiment: str = "", **overrides) -> Expo | Mallows | Wrpo:
    """Return the configuration of `paper` at `profile`, with `overrides` by dotted key (`train.lr`, or `train__lr`).

    experiment: one with models of its own at some profile, as `paper/llama3`. A key set to None keeps the profile's
    value, so that a notebook can list what may be changed; a tuple or a grid is replaced whole. Raises ConfigError for
    an unknown name or key, a wrong type or value, an impossible batch split or a missing α grid.
    """
    file = Path(__file__).parent / "profiles" / f"{paper}.yaml"
    layers = yaml.safe_load(file.read_text(encoding="utf-8")) if paper in SCHEMAS else {}
    experiments = ["", *(name.partition("/")[2] for name in layers)]
    known = {"paper": (paper, SCHEMAS), "profile": (profile, PROFILES), "experiment": (experiment, experiments)}
    for what, (name, valid) in known.items():
        if name not in valid:
            raise ConfigError(_unknown(what, name, valid))
    values = {"profile": profile}
    for layer in ("base", profile, f"{profile}/{experiment}"):
        values = _merge(values, layers.get(layer, {}))
    machine, sampling = cluster.machine(Train.MACHINE), cluster.machine(Decoding.MACHINE)
    own = {name: sampling[name] for name in Decoding.MACHINE if name in sampling}
    if "engines" not in own:  # a single one stays on the head
        own.pop("launcher", None)
    values = _merge(values, {name: own for name in ("decoding", "sampling") if name in values})
    values = _merge(values, {"sft": machine, "train": machine})
    given = {key.replace("__", "."): value for key, value in overrides.items()}
    values |= {name: {} for name in ("pairs", "wrong_pairs") if given.get(name) is not None}  # replaced whole
    for key, value in given.items():
        for name in reversed(key.split(".") if value is not None else ()):
            value = {name: value}
        values = _merge(values, value or {})
    try:
        config = TypeAdapter(SCHEMAS[paper]).validate_json(json.dumps(values))  # where a list may be a tuple
    except ValidationError as error:
        wrong = error.errors()[0]
        key = ".".join(map(str, wrong["loc"]))
        if wrong["type"] == "unexpected_keyword_argument" and given.get(key) is not None:
            load(paper, profile, experiment, **{key: None})  # says what is nearest
        raise ConfigError(f"{key}: {wrong['msg']}, got {wrong['input']!r}") from None
    known = [*(f.name for f in fields(config)), *_flat(asdict(config))]
    for key in [key for key in given if given[key] is None and key not in known]:
        raise ConfigError(_unknown("key", key, known))
    for name in ("sft", "train"):
        check_batch(getattr(config, name), where=name)
    if config.sft.lora_rank:
        raise ConfigError("sft.lora_rank: the SFT model, where all others start, must be whole; use train.lora_rank")
    named = sum(getattr(config, "source_sets", ()), getattr(config, "sources", ()))
    for name in [name for name in named if name not in config.known_sources]:
        raise ConfigError(_unknown("source", name, config.known_sources))
    for fraction in [f for f in getattr(config, "fractions", ()) if f not in config.alphas]:
        raise ConfigError(f"alphas has no grid for fraction {fraction}, only for {', '.join(map(str, config.alphas))}")
    return config


def check_batch(train: Train, where: str = "train") -> int:
    """Return the gradient accumulation steps that make up `global_batch`; raise ConfigError if it cannot be split.

    accumulation × micro_batch × processes == global_batch, always: the number of machines never changes the batch.
    """
    for name in ("global_batch", "micro_batch", "processes"):
        if getattr(train, name) < 1:
            raise ConfigError(f"{where}.{name} must be at least 1, got {getattr(train, name)}")
    per_pass = train.micro_batch * train.processes
    if train.global_batch % per_pass:
        fits = [n for n in range(1, train.global_batch + 1) if train.global_batch % (n * train.processes) == 0]
        nearest = min(fits, key=lambda n: abs(n - train.micro_batch)) if fits else None
        hint = f"the nearest that fits is micro_batch={nearest}" if fits else "change processes or global_batch"
        split = f"micro_batch={train.micro_batch} × processes={train.processes}"
        raise ConfigError(f"{where}.global_batch={train.global_batch} cannot be split into {split}; {hint}")
    return train.global_batch // per_pass


def differences(config, other) -> list[tuple[str, object, object]]:
    """Return (dotted key, value here, value there) wherever two configurations of one paper differ."""
    a, b = _flat(asdict(config)), _flat(asdict(other))
    return [(k, a.get(k), b.get(k)) for k in {**a, **b} if a.get(k) != b.get(k) and not k.startswith(HIDDEN)]


def card(config, experiment: str = ""):
    """Return what differs between `config` and profile paper, as a table for a notebook's set-up cell."""
    import pandas as pd

    from beyond_dpo import report

    paper = next(name for name, schema in SCHEMAS.items() if isinstance(config, schema))
    rows = differences(config, load(paper, "paper", experiment))
    df = pd.DataFrame(rows, columns=["setting", f"profile {config.profile}", "profile paper"]).map(str)
    long = 'style="display: block; max-height: 18em; overflow: auto"'
    return report.show(df, "Where it differs from profile paper (ours where none is stated)").set_table_attributes(long)


def _section(value) -> bool:
    return isinstance(value, dict) and all(isinstance(k, str) for k in value)  # unlike `alphas`, keyed by numbers


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
    return f"unknown {what} {name!r}" + (f"; did you mean {near[0]!r}?" if near else f"; valid: {', '.join(valid)}")
