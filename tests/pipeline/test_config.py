"""Configuration: every profile, every refusal with the nearest name, the papers' own numbers."""

from __future__ import annotations

import ast
import csv
import dataclasses
import json
import math
import re
import subprocess
import sys
import types
import typing
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from beyond_dpo.jobs.settings import Grid
from beyond_dpo.judging.published import off_the_shelf
from beyond_dpo.machine import paths
from beyond_dpo.notebook import report
from beyond_dpo.pipeline import assets, config, expo, mallows, needs, wrpo
from beyond_dpo.pipeline.config import ConfigError, Decoding, Source, Train, World, load
from beyond_dpo.pipeline.settings import Expo, Mallows, Needs, Recipe, Wrpo

SMOKE = load("expo", "smoke")
PAPER = load("expo", "paper")


def train(**changes):
    return dataclasses.replace(SMOKE.train, **changes)


def layers_of(paper):
    """Return the text of the file that holds a paper's profiles."""
    file = paths.ROOT / "lib/beyond_dpo/pipeline/profiles" / f"{paper}.yaml"
    return file.read_text(encoding="utf-8")


@pytest.mark.parametrize("profile", config.PROFILES)
def test_every_profile_has_a_grid_for_each_of_its_fractions(profile):
    cfg = load("expo", profile)
    assert cfg.profile == profile
    assert set(cfg.fractions) <= cfg.alphas.keys()
    assert set(cfg.fewer_seeds) <= set(cfg.fractions)
    assert all(1 <= count <= len(cfg.seeds) for count in cfg.fewer_seeds.values())
    for grid in cfg.alphas.values():
        assert list(grid) == sorted(set(grid))
        assert all(type(alpha) is float for alpha in grid)


@pytest.mark.parametrize("profile", config.PROFILES)
def test_every_profile_has_room_for_prompts_and_responses(profile):
    cfg = load("expo", profile)
    assert cfg.decoding.max_tokens < cfg.decoding.max_model_len
    for settings in (cfg.sft, cfg.train):
        assert settings.max_prompt < settings.max_length


@pytest.mark.parametrize("profile", config.PROFILES)
def test_every_profile_has_batches_that_can_be_split(profile):
    cfg = load("expo", profile)
    assert cfg.sft.loss == "sft"
    assert cfg.train.loss != "sft"
    for settings in (cfg.sft, cfg.train):
        steps = config.check_batch(settings)
        assert steps * settings.micro_batch * settings.processes == settings.global_batch


def test_profiles_are_five_and_frozen():
    assert config.PROFILES == ("smoke", "cpu", "night", "gpu", "paper")
    with pytest.raises(dataclasses.FrozenInstanceError):
        SMOKE.train.lr = 1.0


@pytest.mark.parametrize(
    "where, overrides, message",
    [
        (("exp", "cpu"), {}, r"^unknown paper 'exp'; did you mean 'expo'\?$"),
        (("expo", "cpus"), {}, r"^unknown profile 'cpus'; did you mean 'cpu'\?$"),
        (("expo", "qqq"), {}, r"^unknown profile 'qqq'; valid: smoke, cpu, night, gpu, paper$"),
        (("expo", "cpu"), {"trian": 1}, r"^unknown key 'trian'; did you mean 'train'\?$"),
        (
            ("expo", "cpu"),
            {"train.betta": 1},
            r"^unknown key 'train\.betta'; did you mean 'train\.beta'\?$",
        ),
        (("expo", "cpu"), {"train__learning_rat": 1}, r"^unknown key 'train\.learning_rat'"),
        (
            ("expo", "cpu"),
            {"train.betta": None},
            r"^unknown key 'train\.betta'; did you mean 'train\.beta'\?$",
        ),
        (
            ("expo", "cpu"),
            {"train.loss": "dpp"},
            r"^train\.loss: Input should be 'sft', .*'dpo'.*, got 'dpp'$",
        ),
        (
            ("expo", "cpu"),
            {"decoding.backend": "xyz"},
            r"^decoding\.backend: .* 'vllm' or 'transformers', got 'xyz'$",
        ),
        (("expo", "cpu"), {"train": 3}, r"^train: Input should be an object, got 3$"),
        (
            ("expo", "cpu"),
            {"train.lr.x": 3},
            r"^train\.lr: Input should be a valid number, got \{'x': 3\}$",
        ),
        (
            ("expo", "cpu"),
            {"train.lr": "1e-4"},
            r"^train\.lr: Input should be a valid number, got '1e-4'$",
        ),
        (
            ("expo", "cpu"),
            {"train.lr": True},
            r"^train\.lr: Input should be a valid number, got True$",
        ),
        (
            ("expo", "cpu"),
            {"train.lr": float("nan")},
            r"^train\.lr: Input should be a finite number, got nan$",
        ),
        (
            ("expo", "cpu"),
            {"train.epochs": 1.0},
            r"^train\.epochs: Input should be a valid integer, got 1\.0$",
        ),
        (
            ("expo", "cpu"),
            {"train.epochs": True},
            r"^train\.epochs: Input should be a valid integer, got True$",
        ),
        (
            ("expo", "cpu"),
            {"train.offload": 1},
            r"^train\.offload: Input should be a valid boolean, got 1$",
        ),
        (
            ("expo", "cpu"),
            {"world.target": 1},
            r"^world\.target: Input should be a valid string, got 1$",
        ),
        (
            ("expo", "cpu"),
            {"seeds": [0, "1"]},
            r"^seeds\.1: Input should be a valid integer, got '1'$",
        ),
        (("expo", "cpu"), {"seeds": 3}, r"^seeds: Input should be a valid array, got 3$"),
        (
            ("expo", "cpu"),
            {"world.prompt_tokens": [1, 2, 3]},
            r"^world\.prompt_tokens: .* at most 2 items.*got",
        ),
        (
            ("expo", "cpu"),
            {"alphas": {"x": [1]}},
            r"^alphas\.x.*: Input should be a valid number.*, got 'x'$",
        ),
        (
            ("expo", "cpu"),
            {"alphas": {0.1: 1}},
            r"^alphas\.0\.1: Input should be a valid array, got 1$",
        ),
        (
            ("expo", "cpu"),
            {"alphas": {0.1: ["1"]}},
            r"^alphas\.0\.1\.0: Input should be a valid number, got '1'$",
        ),
        (("expo", "cpu"), {"alphas": {}}, r"^alphas has no grid for fraction 0\.1"),
        (
            ("expo", "smoke"),
            {"fractions": [0.5, 0.3]},
            r"^alphas has no grid for fraction 0\.3, only for 0\.5, 1\.0$",
        ),
    ],
)
def test_refusals_name_the_key_and_the_nearest(where, overrides, message):
    with pytest.raises(ConfigError, match=message):
        load(*where, **overrides)


def test_overrides_have_dotted_or_underscored_keys():
    by_key = load("expo", "smoke", **{"train.lr": 1}, train__epochs=2)
    expected = dataclasses.replace(SMOKE.train, lr=1.0, epochs=2)
    assert by_key.train == expected
    assert type(by_key.train.lr) is float
    assert by_key.decoding == SMOKE.decoding
    assert load("expo", "smoke", train={"lr": 1.0, "epochs": 2}).train == expected


def test_a_list_becomes_a_tuple():
    assert load("expo", "smoke", seeds=[4, 5]).seeds == (4, 5)


def test_none_keeps_what_the_profile_has():
    unchanged = {"decoding.top_k": None, "dev_samples": None, "train": None, "alphas": None}
    assert load("expo", "smoke", **unchanged) == SMOKE


def test_a_grid_is_replaced_whole_and_a_section_key_by_key():
    cfg = load("expo", "smoke", alphas={1: [3], 0.5: [1, 2]})
    assert cfg.alphas == {1.0: (3.0,), 0.5: (1.0, 2.0)}
    single = {"fractions": [1.0], "alphas": {1.0: [3]}, "fewer_seeds": {}}
    assert load("expo", "smoke", **single).alphas == {1.0: (3.0,)}


def test_profiles_differ_from_base_only_where_they_say_so():
    """Profile smoke has the temperature of base, and max_tokens of its own."""
    assert SMOKE.decoding.temperature == PAPER.decoding.temperature == 0.7
    assert SMOKE.decoding.max_tokens == 16
    assert PAPER.decoding.max_tokens == 2048


@pytest.mark.parametrize(
    "changes, accumulation",
    [
        ({"global_batch": 128, "micro_batch": 4, "processes": 8}, 4),
        ({"global_batch": 128, "micro_batch": 1, "processes": 1}, 128),
        ({"global_batch": 6, "micro_batch": 6, "processes": 1}, 1),
        ({"global_batch": 6, "micro_batch": 1, "processes": 3}, 2),
    ],
)
def test_accumulation(changes, accumulation):
    assert config.check_batch(train(**changes)) == accumulation


@pytest.mark.parametrize(
    "sizes, message",
    [
        (
            (128, 5, 8),
            r"global_batch=128 cannot be split into micro_batch=5 × processes=8; .* micro_batch=4$",
        ),
        ((12, 5, 1), r"nearest that fits is micro_batch=4$"),
        ((16, 100, 2), r"nearest that fits is micro_batch=8$"),
        ((10, 1, 4), r"cannot be split .* change processes or global_batch$"),
        ((0, 1, 1), r"global_batch must be at least 1, got 0"),
        ((8, 0, 1), r"micro_batch must be at least 1, got 0"),
        ((8, 1, -1), r"processes must be at least 1, got -1"),
    ],
)
def test_impossible_batches_name_the_key_and_the_nearest_fit(sizes, message):
    global_batch, micro_batch, processes = sizes
    changes = {
        "global_batch": global_batch,
        "micro_batch": micro_batch,
        "processes": processes,
    }
    with pytest.raises(ConfigError, match="^train.*" + message):
        config.check_batch(train(**changes))
    with pytest.raises(ConfigError, match="^sft.*" + message):
        load("expo", "smoke", sft=changes)


FIELDS = {field.name for field in dataclasses.fields(Train)}
MACHINE = {
    "micro_batch",
    "zero",
    "offload",
    "gradient_checkpointing",
    "attention",
    "compile",
    "processes",
    "launcher",
    "checkpoint_every",
}
SOMETIMES = {"epsilon", "parts", "alpha", "dynamic", "lora_rank", "lora_alpha"}


@pytest.mark.parametrize(
    "changes, used",
    [
        ({}, set()),
        ({"loss": "mallows_phi", "parts": 2}, {"epsilon", "parts"}),
        ({"loss": "wrpo_ipo"}, {"alpha", "dynamic"}),
        ({"lora_rank": 4}, {"lora_rank", "lora_alpha"}),
        ({"loss": "hybrid"}, set()),
    ],
)
def test_a_recipe_holds_what_the_result_depends_on(changes, used):
    """A new field enters the recipe unless it is put among the machine's, or among SOMETIMES."""
    assert MACHINE == set(Train.MACHINE)
    assert train(**changes).recipe().keys() == FIELDS - MACHINE - (SOMETIMES - used)


def test_a_recipe_does_not_depend_on_the_machine():
    elsewhere = train(
        micro_batch=1,
        zero=3,
        offload=True,
        gradient_checkpointing=True,
        processes=4,
        launcher="plain",
    )
    assert elsewhere.recipe() == SMOKE.train.recipe()
    assert train(lr=1.0).recipe() != SMOKE.train.recipe()


@pytest.fixture(scope="module")
def changed():
    """Return the settings of the paper with three changes, one of them with markup in it."""
    return load(
        "expo",
        "paper",
        train__beta=0.5,
        alphas={**PAPER.alphas, 0.4: [9]},
        world__dev_dataset="<b>&",
    )


def test_differences_are_the_changed_keys(changed):
    rows = {key: (value, other) for key, value, other in config.differences(changed, PAPER)}
    assert rows.keys() == {"train.beta", "alphas", "world.dev_dataset"}
    assert rows["train.beta"] == (0.5, 0.01)
    alphas, _ = rows["alphas"]
    assert alphas[0.4] == (9.0,)


def test_a_card_prints_the_differences(changed):
    card = report.card(changed)
    differences = config.differences(changed, PAPER)
    assert card.data.values.tolist() == [[str(cell) for cell in row] for row in differences]
    lines = [line.split() for line in repr(card).splitlines()]
    assert ["train.beta", "0.5", "0.01"] in lines


def test_a_card_is_a_table_of_html(changed):
    page = report.card(changed)._repr_html_()
    for cell in ("train.beta", "0.5", "0.01", "&lt;b&gt;&amp;"):
        assert f">{cell}</td>" in page
    assert "<b>" not in page
    assert page.count("<tr>") == 4
    assert page == report.card(changed)._repr_html_()


def test_the_card_of_the_paper_is_empty():
    assert report.card(PAPER).data.empty


@pytest.mark.parametrize("profile", ["smoke", "cpu", "gpu"])
def test_card_says_how_far_a_profile_is_from_the_paper(profile):
    keys = set(report.card(load("expo", profile)).data["setting"])
    assert {"world.target", "train.beta", "train.lr"} <= keys
    same = {"profile", "decoding.temperature", "decoding.top_k", "decoding.top_p", "train.loss"}
    assert not same & keys


def test_this_machine():
    needs.check(SMOKE)
    cfg = load("expo", "smoke", needs__gpus=10_000, needs__gpu_gb=80, needs__memory_gb=10**7)
    message = r"smoke needs 10000 GPUs of 80 GB \(found \d+\) and 10000000 GB of memory"
    with pytest.raises(ConfigError, match=message):
        needs.check(cfg)


def test_what_is_finished_counts_as_room(tmp_path, monkeypatch):
    """A profile of 20 GB may go on with 5 GB free when 16 GB of it are there."""
    monkeypatch.setattr(needs.paths, "ARTIFACTS", tmp_path)
    monkeypatch.setattr(needs.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=5e9))
    cfg = load("expo", "smoke", needs__disk_gb=20)
    with pytest.raises(ConfigError, match=r"20 GB of disk for .* held by results: 5\).*--profile"):
        needs.check(cfg)
    finished = tmp_path / "train-1"
    finished.mkdir()
    manifest = {"files": {"a": {"bytes": 16_000_000_000}}}
    (finished / "manifest.json").write_text(json.dumps(manifest))
    needs.check(cfg)
    damaged = tmp_path / "train-2"
    damaged.mkdir()
    (damaged / "manifest.json").write_text("{")  # it is noticed by whoever reads it
    needs.check(cfg)


@pytest.mark.parametrize("paper", config.SCHEMAS)
@pytest.mark.parametrize("profile", ["smoke", "cpu"])
def test_cpu_profiles_compute_in_float32(monkeypatch, paper, profile):
    """bfloat16 is emulated on a CPU without AVX512-BF16 or AMX: a run of an hour took days."""
    monkeypatch.setenv("COMPUTE", "cold")
    cfg = load(paper, profile)
    assert {cfg.sft.precision, cfg.train.precision, cfg.world.precision} == {"fp32"}
    samplings = [cfg.decoding, getattr(cfg, "sampling", None) or cfg.decoding]
    assert {decoding.dtype for decoding in samplings} == {"float32"}


def test_bfloat16_is_refused_before_the_work_on_a_cpu_that_would_emulate_it(monkeypatch, tmp_path):
    """The faked processor has AVX2 and no more; the profiles of a CPU ask it for nothing else."""
    avx2 = tmp_path / "cpuinfo"
    avx2.write_text("model name\t: old\nflags\t\t: fpu sse4_2 avx avx2 fma\n")
    monkeypatch.setattr(needs.precision, "CPUINFO", str(avx2))
    monkeypatch.setattr(needs, "cards", lambda: 0)
    monkeypatch.setattr(needs, "free_disk_gb", lambda: 1000.0)
    monkeypatch.setenv("COMPUTE", "cold")
    for paper in config.SCHEMAS:
        for profile in ("smoke", "cpu"):
            assert needs.lacking(load(paper, profile)) == []
    with pytest.raises(ConfigError, match="a CPU with AVX512_BF16 or AMX, for bfloat16"):
        needs.check(load("expo", "cpu", train__precision="bf16"))
    with pytest.raises(ConfigError, match="for bfloat16"):
        needs.check(load("wrpo", "cpu", sampling__dtype="bfloat16"))


UNKNOWN = {  # hub ids of which no commit fit to use was found; none may join them unseen
    "AALF/ultrafeedback_wrpo",
    "alignment-handbook/zephyr-7b-sft-full",
    "allenai/tulu-2-dpo-13b",
    "allenai/tulu-2-dpo-7b",
    "deepseek-ai/DeepSeek-Coder-V2-Instruct-0724",
    "HuggingFaceH4/mistral-7b-sft-alpha",
    "HuggingFaceH4/mistral-7b-sft-beta",
    "HuggingFaceH4/zephyr-7b-alpha",
    "internlm/internlm2-chat-1_8b-sft",
    "internlm/internlm2-chat-20b-sft",
    "internlm/internlm2-chat-7b-sft",
    "snorkelai/Snorkel-Mistral-PairRM-DPO",
    "weqweasdas/RM-Mistral-7B",
}


HUB_ID = re.compile(r"(?<![\w/.])[\w.-]+/[\w.-]*\w(?=[\s:,\]\"}])")


def test_every_hub_id_of_a_profile_has_its_line_among_the_pins():
    named = set()
    for paper in config.SCHEMAS:
        without = re.sub(r"#.*|http://[^\"]*", "", layers_of(paper))  # comments and addresses
        for name in HUB_ID.findall(without):
            if name.split("/")[0] not in config.PROFILES:
                named.add(name.removeprefix("datasets:"))
    assert len(named) > 45
    assert named == assets.REVISIONS.keys()


def test_every_pin_is_a_commit_or_known_to_be_none():
    """It is null where no commit is known, which the log then tells."""
    unknown = {name for name, commit in assets.REVISIONS.items() if commit is None}
    assert unknown == UNKNOWN
    for name in assets.REVISIONS.keys() - unknown:
        assert re.fullmatch("[0-9a-f]{40}", assets.REVISIONS[name])


def test_a_pin_is_taken_where_no_commit_is_named():
    armorm = "RLHFlow/ArmoRM-Llama3-8B-v0.1"
    assert assets.resolve(armorm)["commit"] == assets.REVISIONS[armorm]
    own = "a" * 40
    assert assets.resolve(f"EleutherAI/pythia-2.8b@{own}")["commit"] == own


def test_frozen_results_are_read_with_the_settings_they_were_measured_with(monkeypatch):
    """Only where nothing is changed; what is computed anew is float32."""
    monkeypatch.delenv("COMPUTE", raising=False)
    assert load("mallows", "cpu").train.precision == "bf16"
    assert load("mallows", "cpu", seeds=None).decoding.dtype == "bfloat16"
    assert load("mallows", "cpu", seeds=[0]).train.precision == "fp32"


@pytest.mark.parametrize(
    "mode, precision",
    [("never", "bf16"), ("cold", "fp32"), ("plan", "bf16"), ("plan cold", "fp32")],
)
def test_frozen_settings_hold_only_where_results_are_read(mode, precision, monkeypatch):
    monkeypatch.setenv("COMPUTE", mode)
    assert load("mallows", "cpu").train.precision == precision


@pytest.mark.parametrize(
    "paper, changes, message",
    [
        ("expo", {"train.max_prompt": 64}, "train.max_prompt=64 leaves no room .*max_length=64"),
        ("expo", {"decoding.max_tokens": 128}, "max_tokens=128 leaves no room .*max_model_len=128"),
        ("expo", {"world.prompt_tokens": [9, 4]}, "prompt_tokens: 9 .* is above 4"),
        (
            "expo",
            {"world.reward_model": "ngrams", "world.reward_rows": 0},
            "world.reward_model: 'ngrams' is trained on labels, .*reward_rows is 0",
        ),
        ("expo", {"fractions": [0.5, 1.5]}, r"fractions\.1: .* less than or equal to 1"),
        ("expo", {"seeds": []}, "seeds: .* at least 1 item"),
        ("expo", {"seeds": [-1]}, r"seeds\.0: .* greater than or equal to 0"),
        ("expo", {"search_evaluations": 3}, "search_evaluations: .* greater than or equal to 4"),
        ("expo", {"train.zero": 4}, "train.zero: .* less than or equal to 3"),
        (
            "mallows",
            {"plug_ins": {"dpoo": {}}},
            "plug_ins.dpoo: unknown loss 'dpoo'; did you mean 'dpo'",
        ),
        ("mallows", {"plug_ins": {"mallows_phi": {}}}, "plug_ins.mallows_phi: unknown loss"),
        ("mallows", {"plug_ins": {"dpo": {"loss": 1.0}}}, "plug_ins.dpo: loss: .*got 1.0"),
        ("mallows", {"plug_ins": {"dpo": {"bta": 1.0}}}, "plug_ins.dpo: unknown key 'bta'.*'beta'"),
        ("mallows", {"betas": [0.0]}, r"betas\.0: .* greater than 0"),
        ("wrpo", {"objectives": {"ipo": {"beta": -1.0}}}, "objectives.ipo: beta: .* than 0"),
        ("wrpo", {"alphas": [1.1]}, r"alphas\.0: .* less than or equal to 1"),
        ("wrpo", {"bandit_rising": [1.1]}, r"bandit_rising\.0: .* less than or equal to 1"),
        ("wrpo", {"bandit_distances": [-1.0]}, r"bandit_distances\.0: .* than or equal to 0"),
        ("wrpo", {"bandit_seeds": 1}, "bandit_seeds: .* than or equal to 2"),
        ("wrpo", {"sampling.max_tokens": 256}, "sampling.max_tokens=256 leaves no room"),
        ("wrpo", {"sft_share": 1.0}, "sft_share: .* less than 1"),
        ("expo", {"seeds": [2**32]}, r"seeds\.0: .* less than 4294967296"),
        (
            "expo",
            {"alphas": {0.5: [1], 1.0: [1], 1.5: [1]}},
            r"alphas\.1\.5.*less than or equal to 1",
        ),
        ("expo", {"layers": 1}, "layers: .* greater than or equal to 2"),
        ("expo", {"recipes": ["epochs × 4"]}, r"recipes\.0: .*'epochs × 2'"),
        (
            "expo",
            {"train.loss": "wrpo"},
            "train.loss: 'wrpo' does not learn from pairs; valid: dpo, ",
        ),
        ("wrpo", {"sft.loss": "dpo"}, "sft.loss: 'dpo' compares responses"),
        ("mallows", {"methods": ["dpoo"]}, r"methods\.0: .*'dpo'.*got 'dpoo'"),
        ("mallows", {"grid_methods": ["dpo", "wrpo"]}, r"grid_methods\.1: .*got 'wrpo'"),
        ("mallows", {"rated": "imdb"}, "rated: .*'movie', 'amazon' or 'fixtures'"),
    ],
)
def test_numbers_out_of_range_are_refused_when_loaded(paper, changes, message):
    with pytest.raises(ConfigError, match=message):
        load(paper, "smoke", **changes)


@pytest.mark.parametrize(
    "paper, changes, message",
    [
        ("expo", {"fractions": []}, "fractions: .* at least 1 item"),
        ("expo", {"alphas": {0.5: [], 1.0: [1]}}, r"alphas\.0\.5: .* at least 1 item"),
        ("expo", {"interpolation": []}, "interpolation: .* at least 1 item"),
        ("expo", {"recipe_alphas": []}, "recipe_alphas: .* at least 1 item"),
        ("expo", {"pair_alphas": []}, "pair_alphas: .* at least 1 item"),
        ("expo", {"module_alphas": []}, "module_alphas: .* at least 1 item"),
        ("expo", {"published_alphas": []}, "published_alphas: .* at least 1 item"),
        ("expo", {"world.dev_prompts": 0}, "world.dev_prompts=0, but"),
        ("expo", {"world.test_prompts": 0}, "world.test_prompts=0, but"),
        ("mallows", {"world.prompts": 0}, "world.prompts=0, but"),
        ("mallows", {"world.test_prompts": 0}, "world.test_prompts=0, but"),
        ("mallows", {"betas": []}, "betas: .* at least 1 item"),
        ("mallows", {"bandit_betas": []}, "bandit_betas: .* at least 1 item"),
        ("mallows", {"methods": []}, "methods: .* at least 1 item"),
        ("mallows", {"grid_betas": []}, "grid_betas is empty, and with it the grid"),
        ("mallows", {"grid_lrs": []}, "grid_lrs is empty, and with it the grid"),
        ("wrpo", {"world.test_prompts": 0}, "world.test_prompts=0, but"),
        ("wrpo", {"sources": []}, "sources: .* at least 1 item"),
        ("wrpo", {"source_sets": [["human"], []]}, r"source_sets\.1: .* at least 1 item"),
        ("wrpo", {"alphas": []}, "alphas: .* at least 1 item"),
        ("wrpo", {"bandit_alphas": []}, "bandit_alphas: .* at least 1 item"),
    ],
)
def test_lists_that_would_do_nothing_or_fail_late_are_refused_when_loaded(paper, changes, message):
    with pytest.raises(ConfigError, match=message):
        load(paper, "smoke", **changes)


def sweep(cfg):
    return expo.sweep(cfg, {})


@pytest.mark.parametrize(
    "paper, experiment",
    [
        ("expo", expo.curves),
        ("expo", expo.searched),
        ("expo", off_the_shelf),
        ("expo", sweep),
        ("mallows", mallows.frontier),
        ("wrpo", wrpo.main_result),
    ],
)
def test_experiments_refuse_given_pairs_without_other_prompts(paper, experiment, monkeypatch):
    """A configuration of given pairs may be without, as there are results that need none."""
    monkeypatch.setenv("COMPUTE", "plan")
    cfg = load(paper, "smoke", world={"pairs": "given", "dev_prompts": 0, "test_prompts": 0})
    message = "world.(dev|test)_prompts=0, but the experiments need some"
    with pytest.raises(ConfigError, match=message):
        experiment(cfg)


def test_experiments_refuse_a_missing_grid(monkeypatch):
    monkeypatch.setenv("COMPUTE", "plan")
    cfg = load("expo", "smoke", quality_fractions=[0.1])
    with pytest.raises(ConfigError, match="alphas has no grid for fraction 0.1, only for 0.5, 1.0"):
        expo.data_quality(cfg, 0)
    cfg = load("expo", "smoke", alphas={0.5: [0], 1.0: [0, 1]})
    with pytest.raises(ConfigError, match="alphas.0.5: a search needs an α above 0"):
        expo.searched(cfg)
    nothing = {"plug_ins": {}, "grid_betas": (), "grid_lrs": ()}
    cfg = dataclasses.replace(load("mallows", "smoke"), **nothing)
    with pytest.raises(ConfigError, match="plug_ins and grid_betas are empty"):
        mallows.plug_in(cfg)


# Fields without a bound of their own, and why; any α of a Grid is a point on the line through two
# models.
UNBOUNDED = {
    "Train.global_batch": "check_batch says which number fits",
    "Train.micro_batch": "check_batch says which number fits",
    "Train.processes": "check_batch says which number fits",
    "Mallows.plug_ins": "checked as settings of Train",
    "Wrpo.objectives": "checked as settings of Train",
}
MAY_BE_EMPTY = {
    "World.trust_remote_code": "no code of others runs",
    "Expo.alphas": "checked against the fractions",
    "Expo.fewer_seeds": "every fraction is trained with every seed",
    "Expo.losses": "DPO alone",
    "Expo.ranks": "all of Δθ alone",
    "Expo.tried": "nothing was tried before",
    "Expo.recipes": "the default one alone",
    "Expo.pairs": "none are published",
    "Expo.wrong_pairs": "lines of the profile's own models",
    "Mallows.plug_ins": "an experiment without; its function says so",
    "Mallows.grid_betas": "an experiment without; checked against the other",
    "Mallows.grid_lrs": "an experiment without; checked against the other",
    "Mallows.elsewhere": "test prompts alone",
    "Wrpo.known_sources": "checked against the sources",
    "Wrpo.source_sets": "the sources alone",
    "Wrpo.objectives": "merged with those of the profile",
    "Wrpo.kl_alphas": "start and model alone",
    "Wrpo.compared": "an experiment without; its functions say so",
    "Wrpo.bandit_varied": "the map alone",
    "Wrpo.bandit_prompts": "not varied",
    "Wrpo.bandit_noises": "not varied",
    "Wrpo.bandit_kls": "not varied",
}
SETTINGS = [Train, Decoding, World, Needs, Expo, Mallows, Source, Wrpo]


def constrained(fields, names):
    """Return whether one of pydantic's fields has one of these constraints."""
    for field in fields:
        for part in field.metadata:
            if any(hasattr(part, name) for name in names):
                return True
    return False


def unbounded(annotation, where):
    """Yield (kind, where) of each number without a bound, and each list that may be empty."""
    if annotation == Grid:
        return
    fields = []
    if typing.get_origin(annotation) is typing.Annotated:
        annotation, *fields = typing.get_args(annotation)
    origin = typing.get_origin(annotation)
    arguments = typing.get_args(annotation)
    if annotation in (int, float) and not constrained(fields, ("ge", "gt", "le", "lt")):
        yield "number", where
    if origin in (tuple, dict):
        has_fixed_length = origin is tuple and ... not in arguments
        if not has_fixed_length and not constrained(fields, ("min_length",)):
            yield "list", where
        for argument in arguments:
            yield from unbounded(argument, where)


def test_every_number_of_the_settings_has_a_bound_and_every_list_an_element():
    """Or stands in the lists above, with the reason."""
    without = {"number": set(), "list": set()}
    fields = 0
    for schema in SETTINGS:
        for name, annotation in typing.get_type_hints(schema, include_extras=True).items():
            if name == "MACHINE":
                continue
            fields += 1
            for kind, where in unbounded(annotation, f"{schema.__name__}.{name}"):
                without[kind].add(where)
    assert fields > 120
    assert without == {"number": set(UNBOUNDED), "list": set(MAY_BE_EMPTY)}


def test_a_recipe_of_the_settings_is_one_that_can_be_trained(monkeypatch):
    monkeypatch.setenv("COMPUTE", "plan")
    names = list(typing.get_args(Recipe))
    assert list(expo.recipes(load("expo", "smoke", recipes=names), 0)) == ["default", *names]


@pytest.mark.parametrize("paper", config.SCHEMAS)
@pytest.mark.parametrize("frozen", [False, True])
def test_every_shipped_profile_and_experiment_loads(monkeypatch, paper, frozen):
    monkeypatch.setenv("COMPUTE", "never" if frozen else "cold")
    names = set(re.findall(r"^([\w/]+):", layers_of(paper), re.MULTILINE))
    assert set(config.PROFILES) <= names
    for name in names - {"base"}:
        profile, _, experiment = name.partition("/")
        load(paper, profile, "" if experiment == "frozen" else experiment)


OF_OTHER_KINDS = {  # key -> value, and what it is taken for
    "seeds": (np.arange(2), (0, 1)),
    "train.lr": (np.float32(0.1), 0.1),
    "train.epochs": (np.int64(3), 3),
    "train.offload": (np.bool_(True), True),
    "world.target": (Path("/models/x"), "/models/x"),
    "recipe_alphas": (pd.Series([0.1], dtype="float32"), (0.1,)),
    "alphas": (
        {np.int64(1): [np.float64(0.5)], np.float32(0.5): np.array([0.1, 0.2], np.float32)},
        {1.0: (0.5,), 0.5: (0.1, 0.2)},
    ),
}


@pytest.mark.parametrize("key", OF_OTHER_KINDS)
def test_values_of_other_kinds_are_taken(key):
    value, plain = OF_OTHER_KINDS[key]
    taken = load("expo", "smoke", **{key: value})
    for name in key.split("."):
        taken = getattr(taken, name)
    assert taken == plain
    assert type(taken) is type(plain)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.longdouble])
def test_an_array_has_the_same_numbers_as_a_scalar(dtype):
    cfg = load(
        "expo",
        "smoke",
        recipe_alphas=np.array([0.1, 0.3], dtype),
        pair_alphas=[dtype(0.1)],
        train__lr=np.array(dtype(0.1)),
    )
    assert cfg.recipe_alphas == (0.1, 0.3)
    assert cfg.pair_alphas == (0.1,)
    assert cfg.train.lr == 0.1


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("train.lr", 1j, "train.lr: a complex cannot be a setting"),
        (
            "train.lr",
            np.datetime64("2024-01-01T00:00:00"),
            "train.lr: a datetime cannot be a setting",
        ),
        ("world", {"x": {1}}, r"world\.x: a set cannot be a setting"),
        ("alphas", {(1, 2): [1]}, r"alphas: \[1, 2\] cannot be the name of a setting"),
        ("alphas", {None: [1]}, "alphas: None cannot be the name of a setting"),
        ("alphas", {0.1: [1], np.float32(0.1): [2]}, r"alphas\.0\.1 is given twice"),
    ],
)
def test_values_of_other_kinds_are_refused_in_words(key, value, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        load("expo", "smoke", **{key: value})


def test_a_target_of_ones_own_does_not_need_what_the_papers_model_needs():
    """A 135M model was refused at profile paper for want of eight GPUs."""
    own = load("expo", "paper", world={"target": "tiny", "dataset": "pairs.jsonl"})
    assert own.needs.gpus == own.needs.memory_gb == 0
    needs.check(own)
    assert load("expo", "paper", world={"dev_prompts": 10}).needs == PAPER.needs
    assert load("expo", "paper", world={"target": "tiny"}, needs__gpus=1).needs.gpus == 1


def test_import_is_light():
    code = "import sys, beyond_dpo.pipeline.config as c; c.load('expo', 'cpu'); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"torch", "transformers", "vllm", "deepspeed", "pandas", "numpy", "sklearn"}
    assert not heavy & set(done.stdout.split())


def test_paper_profile_trains_like_the_paper():
    """ACL App. B of arXiv 2404.16792 and the zephyr recipe: 61,135 pairs make 478 steps."""
    settings = PAPER.train
    steps = math.ceil(PAPER.world.prompts / settings.global_batch)
    assert steps == 478
    assert config.check_batch(settings) == 4
    assert PAPER.decoding.backend == "vllm"
    assert PAPER.fractions == (0.05, 0.1, 0.2, 0.4, 1.0)


def published(name, column):
    with open(paths.PUBLISHED / f"{name}.csv", newline="") as file:
        return {row[column]: row for row in csv.DictReader(file)}


@pytest.mark.parametrize(
    "fraction, model",
    [(0.1, "DPO (10% data)"), (0.2, "DPO (20% data)"), (1.0, "zephyr-7b-dpo-full")],
)
def test_paper_grids_hold_the_published_ranges(fraction, model):
    row = published("expo_table3", "aligned_model")[model]
    searched = {float(alpha) for alpha in ast.literal_eval(row["search_range"])}
    assert searched <= set(PAPER.alphas[fraction])
    assert float(row["optimal_alpha"]) in searched


@pytest.mark.parametrize(
    "fraction, model",
    [
        (0.05, "zephyr_0.05 (5% data)"),
        (0.1, "DPO (10% data)"),
        (0.2, "DPO (20% data)"),
        (0.4, "DPO (40% data)"),
        (1.0, "zephyr-7b-dpo"),
    ],
)
def test_paper_grids_hold_the_published_optima(fraction, model):
    row = published("expo_acl_table7_alpha", "model")[model]
    assert float(row["optimal_alpha"]) in PAPER.alphas[fraction]


# What papers/*.md print of each paper's settings, by key; a list in a YAML file is a tuple here.
ZEPHYR = {
    "lr": 5e-7,
    "beta": 0.01,
    "global_batch": 128,
    "epochs": 1,
    "optimizer": "adamw",
    "warmup": 0.1,
    "zero": 3,
    "offload": True,
    "gradient_checkpointing": True,
    "loss": "dpo",
    "max_prompt": 1024,
    "max_length": 2048,
    "precision": "bf16",
    "label_smoothing": 0.0,
    "lora_rank": 0,
}
WEIGHTED = {
    "lr": 3e-7,
    "beta": 0.01,
    "alpha": 0.1,
    "dynamic": True,
    "global_batch": 128,
    "epochs": 1,
    "zero": 3,
    "gradient_checkpointing": True,
    "warmup": 0.1,
    "optimizer": "adamw",
    "max_prompt": 1800,
    "max_length": 2048,
    "micro_batch": 2,
    "processes": 8,
    "precision": "bf16",
}
PUBLISHED = [
    ("expo", "", "train", ZEPHYR),
    (
        "expo",
        "",
        "decoding",
        {
            "temperature": 0.7,
            "top_k": 40,
            "top_p": 0.9,
            "presence_penalty": 0.1,
            "frequency_penalty": 0.1,
            "max_tokens": 2048,
            "dtype": "bfloat16",
        },
    ),
    (
        "expo",
        "",
        "world",
        {
            "target": "alignment-handbook/zephyr-7b-sft-full",
            "template": "chat",
            "pairs": "given",
            "dataset": "HuggingFaceH4/ultrafeedback_binarized",
            "dev_prompts": 1000,
            "test_prompts": 805,
            "reward_model": "weqweasdas/RM-Mistral-7B",
        },
    ),
    ("mallows", "", "train", {"optimizer": "rmsprop", "lr": 1e-6, "global_batch": 64}),
    (
        "mallows",
        "llama3",
        "train",
        {
            "lr": 5e-7,
            "global_batch": 256,
            "epochs": 1,
            "optimizer": "adamw",
            "zero": 3,
            "warmup": 0.1,
            "max_length": 2048,
            "max_prompt": 1800,
            "micro_batch": 1,
        },
    ),
    (
        "mallows",
        "llama3",
        "world",
        {
            "target": "meta-llama/Meta-Llama-3-8B-Instruct",
            "template": "chat",
            "dataset": "princeton-nlp/llama3-ultrafeedback-armorm",
            "reward_model": "RLHFlow/ArmoRM-Llama3-8B-v0.1",
        },
    ),
    ("mallows", "hh", "train", {"optimizer": "rmsprop", "lr": 1e-6, "global_batch": 32}),
    (
        "mallows",
        "hh",
        "world",
        {"target": "EleutherAI/pythia-2.8b", "dataset": "Anthropic/hh-rlhf"},
    ),
    ("wrpo", "", "train", WEIGHTED),
    (
        "wrpo",
        "",
        "sft",
        {
            "lr": 7e-6,
            "global_batch": 128,
            "micro_batch": 8,
            "epochs": 1,
            "warmup": 0.1,
            "zero": 3,
            "max_length": 2048,
            "gradient_checkpointing": True,
            "optimizer": "adamw",
        },
    ),
    ("wrpo", "", "sampling", {"temperature": 0.8, "top_p": 0.95}),
    (
        "wrpo",
        "",
        "world",
        {
            "target": "meta-llama/Meta-Llama-3-8B-Instruct",
            "samples": 5,
            "reward_model": "RLHFlow/ArmoRM-Llama3-8B-v0.1",
        },
    ),
]


@pytest.mark.parametrize("paper, experiment, section, printed", PUBLISHED)
def test_profile_paper_has_what_the_papers_print(paper, experiment, section, printed):
    settings = getattr(load(paper, "paper", experiment), section)
    values = dataclasses.asdict(settings)
    assert {name: values[name] for name in printed} == printed


@pytest.mark.parametrize("paper", config.SCHEMAS)
def test_profile_gpu_is_the_embedded_world_at_full_size_on_one_card(paper):
    """All IMDB prompts that half B (24,676 reviews) has left, five seeds, the models of `cpu`."""
    gpu = load(paper, "gpu")
    cpu = load(paper, "cpu")
    held_out = 2000
    used = gpu.world.reward_rows + held_out + gpu.world.dev_prompts + gpu.world.test_prompts
    assert gpu.world.prompts == 24_676 - used
    assert gpu.world.gold_rows == 20_000
    assert gpu.world.target == cpu.world.target == "smollm2"
    assert gpu.world.dataset == cpu.world.dataset == "imdb"
    assert len(set(gpu.seeds)) == 5
    assert gpu.train.beta == 0.1
    assert gpu.decoding.backend == "vllm"


@pytest.mark.parametrize("paper", config.SCHEMAS)
def test_profile_gpu_needs_one_card(paper):
    gpu = load(paper, "gpu")
    assert gpu.needs.gpus == 1
    assert gpu.needs.gpu_gb <= 80
    assert gpu.train.processes == gpu.sft.processes == gpu.decoding.engines == 1


def test_the_environment_sets_the_engines_too(monkeypatch):
    """Several engines are started by the trainings' launcher, a single one stays on the head."""
    monkeypatch.setenv("BEYOND_DPO_TENSOR_PARALLEL", "8")
    monkeypatch.setenv("BEYOND_DPO_LAUNCHER", "torchrun")
    cfg = load("wrpo", "paper")
    for settings in (cfg.decoding, cfg.sampling):
        assert (settings.tensor_parallel, settings.engines, settings.launcher) == (8, 1, "")
    monkeypatch.setenv("BEYOND_DPO_ENGINES", "4")
    cfg = load("wrpo", "paper")
    for settings in (cfg.decoding, cfg.sampling):
        assert (settings.tensor_parallel, settings.engines, settings.launcher) == (8, 4, "torchrun")


def test_own_pairs_replace_those_of_the_profile():
    cfg = load("expo", "gpu", "hub", pairs={"mine": ["a/b", "c/d"]})
    assert list(cfg.pairs) == ["mine"]
    assert len(load("expo", "paper", pairs=None).pairs) == 12
