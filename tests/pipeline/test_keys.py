"""Keys stay as they are, or nothing that is frozen would be found again.

Where a key is to change, `python tests/pipeline/test_keys.py` writes the golden table anew, and the
commit says why.
"""

import dataclasses
import json
import sys
import typing
from pathlib import Path

import nbformat
import pytest

from beyond_dpo.jobs import settings as job_settings
from beyond_dpo.machine import paths
from beyond_dpo.notebook import plan
from beyond_dpo.pipeline import (
    artifacts,
    assets,
    config,
    expo,
    mallows,
    spoiled,
    stages,
    wrpo,
)

GOLDEN = Path(__file__).with_name("golden_keys.json")
CLAIMS = sorted((paths.FROZEN / "claims").glob("*.json"))
LOSSES = typing.get_args(job_settings.Losses)
TRAIN = job_settings.Train(lr=1e-5, global_batch=8, micro_batch=4)
DECODING = job_settings.Decoding()

# another value for each setting that decides a result
OTHER_TRAIN = {
    "lr": 2e-5,
    "global_batch": 16,
    "epochs": 2,
    "beta": 0.3,
    "gamma": 0.5,
    "epsilon": 0.2,
    "alpha": 0.5,
    "dynamic": False,
    "label_smoothing": 0.1,
    "optimizer": "rmsprop",
    "weight_decay": 0.01,
    "warmup": 0.2,
    "max_grad_norm": 0.5,
    "max_prompt": 32,
    "max_length": 96,
    "precision": "fp32",
    "save_dtype": "bfloat16",
    "parts": 4,
    "lora_rank": 8,
}
OTHER_DECODING = {
    "backend": "transformers",
    "temperature": 0.0,
    "top_k": 0,
    "top_p": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "max_tokens": 48,
    "dtype": "float32",
    "max_model_len": 128,
    "shard": 64,
}


def key_of(stage, recipe):
    return artifacts.Artifact(stage, 1, recipe, make=None).key


def keys():
    """Return {settings in words: key} of every loss and every decoding, with each other setting."""
    table = {}
    for loss in LOSSES:
        plain = dataclasses.replace(TRAIN, loss=loss)
        table[f"{loss}"] = key_of("train", plain.recipe())
        for name, value in OTHER_TRAIN.items():
            other = dataclasses.replace(plain, **{name: value})
            table[f"{loss} {name}={value}"] = key_of("train", other.recipe())
        adapter = dataclasses.replace(plain, lora_rank=8, lora_alpha=32.0)
        table[f"{loss} lora_rank=8 lora_alpha=32.0"] = key_of("train", adapter.recipe())
    table["decoding"] = key_of("responses", DECODING.recipe())
    for name, value in OTHER_DECODING.items():
        other = dataclasses.replace(DECODING, **{name: value})
        table[f"decoding {name}={value}"] = key_of("responses", other.recipe())
    return table


def test_every_loss_and_decoding_has_the_key_it_had():
    assert keys() == json.loads(GOLDEN.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "default, other, without",
    [(TRAIN, OTHER_TRAIN, {"loss", "lora_alpha"}), (DECODING, OTHER_DECODING, set())],
    ids=["train", "decoding"],
)
def test_the_table_has_every_setting_that_decides_a_result(default, other, without):
    """`without` are settings that it has in another way, or that lead to another stage."""
    fields = {field.name for field in dataclasses.fields(default)}
    assert fields == set(other) | without | set(default.MACHINE)
    for name, value in other.items():
        assert value != getattr(default, name), name


def test_the_machine_of_a_training_is_in_no_key():
    elsewhere = {
        "micro_batch": 1,
        "zero": 3,
        "offload": True,
        "gradient_checkpointing": True,
        "attention": "sdpa",
        "compile": True,
        "processes": 8,
        "launcher": "srun",
        "checkpoint_every": 7,
    }
    assert set(elsewhere) == set(TRAIN.MACHINE)
    assert dataclasses.replace(TRAIN, **elsewhere).recipe() == TRAIN.recipe()


def test_the_machine_of_a_sampling_is_in_no_key():
    elsewhere = {"engines": 4, "tensor_parallel": 2, "gpu_share": 0.9, "launcher": "srun"}
    assert set(elsewhere) == set(DECODING.MACHINE)
    assert dataclasses.replace(DECODING, **elsewhere).recipe() == DECODING.recipe()


def test_there_are_claims():
    assert len(CLAIMS) == 23


@pytest.mark.slow
@pytest.mark.parametrize("file", CLAIMS, ids=lambda file: file.name.partition("_")[0])
def test_the_plan_of_a_notebook_names_what_its_claims_and_figures_were_made_from(file, monkeypatch):
    monkeypatch.delenv("COMPUTE", raising=False)  # what is frozen is read
    record = json.loads(file.read_text(encoding="utf-8"))
    name = record["notebook"]
    notebook = nbformat.read(paths.NOTEBOOKS / f"{name}.ipynb", as_version=4)
    _, named = plan.planned(notebook, plan.parameters(notebook, name))
    assert sorted(artifact.key for artifact in named) == sorted(record["keys"])
    drawn = [json.loads(path.read_text(encoding="utf-8")) for path in paths.FIGURES.glob("*.json")]
    figures = [figure for figure in drawn if figure.get("notebook") == name]
    assert figures, "each of these notebooks draws"
    for figure in figures:
        assert set(figure["keys"]) <= set(record["keys"]), figure["figure"]


# --- the SFT model as a point of a table


EXPO = config.load("expo", "cpu")
MALLOWS = config.load("mallows", "cpu")
WRPO = config.load("wrpo", "cpu")
TABLES = {  # frozen results that hold a point of the SFT model
    "frontier": lambda: mallows.frontier(MALLOWS),
    "main result": lambda: wrpo.main_result(WRPO),
}


def placed(judged, **columns):
    """Return the scores of the point of a gathered table that has these columns."""
    points = zip(judged.inputs["places"], judged.inputs["points"], strict=True)
    (scores,) = [scores for place, scores in points if columns.items() <= place.items()]
    return scores


SFT_POINTS = {
    "frontier": lambda: placed(mallows.frontier(MALLOWS), loss="sft"),
    "main result": lambda: placed(wrpo.main_result(WRPO), model="Target"),
}


def with_sft(cfg, at_alpha):
    world = dataclasses.replace(cfg.world, sft_at_alpha=at_alpha)
    return dataclasses.replace(cfg, world=world)


@pytest.mark.parametrize("table", TABLES)
def test_frozen_results_are_found_as_long_as_their_sft_point_is_one_at_alpha(table):
    artifact = TABLES[table]()
    assert (paths.FROZEN / artifact.key).is_dir()


@pytest.mark.parametrize("table", SFT_POINTS)
def test_the_sft_point_as_itself_names_no_aligned_model(table, monkeypatch):
    build = SFT_POINTS[table]
    frozen = build()
    for name in ("MALLOWS", "WRPO"):
        monkeypatch.setitem(globals(), name, with_sft(globals()[name], at_alpha=False))
    alone = build()
    assert alone.key != frozen.key
    weights = alone.inputs["responses"].inputs
    assert weights["aligned"] is None
    assert weights["alpha"] == 0
    trained = [one.key for one in alone.upstream.values() if one.stage == "train"]
    assert trained == [weights["sft"].key]


def test_other_points_keep_their_keys_where_the_sft_point_is_itself():
    at_alpha, itself = (with_sft(EXPO, at_alpha) for at_alpha in (True, False))
    other = expo.point(at_alpha, 1.0, 0, 2.0, "dev_prompts")
    assert expo.point(itself, 1.0, 0, 2.0, "dev_prompts").key == other.key
    sft = expo.point(at_alpha, 0.0, 0, 0.0, "dev_prompts")
    assert expo.point(itself, 0.0, 0, 0.0, "dev_prompts").key != sft.key


@pytest.mark.parametrize("paper", config.SCHEMAS)
def test_new_results_have_the_sft_point_as_itself(paper, monkeypatch):
    monkeypatch.setenv("COMPUTE", "cold")
    for profile in config.PROFILES:
        assert not config.load(paper, profile).world.sft_at_alpha


def test_a_pool_for_each_seed_is_in_the_keys_and_seeds_take_turns():
    one = config.load("expo", "smoke", world__pools=1)
    two = config.load("expo", "smoke", world__pools=2)
    assert stages.texts(one.world).key != stages.texts(two.world).key
    assert stages.pairs(one, 0).key == stages.pairs(one, 1).key
    assert stages.pairs(two, 0).key != stages.pairs(two, 1).key
    assert stages.pairs(two, 0).key == stages.pairs(two, 2).key
    of_seeds = [stages.aligned(two, 1.0, seed) for seed in (0, 1)]
    assert of_seeds[0].inputs["reference"].key != of_seeds[1].inputs["reference"].key


# --- rewards


FIRST_FORM = config.World(  # all settings of its rewards are those by default
    target="tiny", dataset="fixtures", gold_rows=64, reward_rows=64, reward_model="tiny-encoder"
)
ENCODER = assets.resolve("tiny-encoder")


def reward_inputs(name, **changes):
    """Return what decides a reward besides the texts, in the world of the first form changed."""
    world = dataclasses.replace(FIRST_FORM, **changes)
    inputs = dict(stages.reward(world, name).inputs)
    assert inputs.pop("texts").key == stages.texts(world).key
    return inputs


@pytest.mark.parametrize(
    "name, inputs",
    [
        ("gold", {"seed": 0}),
        ("reward", {"seed": 0, "encoder": ENCODER}),
        ("vader", {"seed": 0}),
    ],
)
def test_rewards_of_the_first_form_have_the_inputs_they_had(name, inputs):
    assert reward_inputs(name) == inputs
    assert reward_inputs(name, precision="fp32") == {**inputs, "precision": "fp32"}
    finished = reward_inputs(name, reward_rows=0)
    assert finished == inputs


@pytest.mark.parametrize(
    "name, changes, new",
    [
        ("gold", {"gold_model": "ngrams"}, {"kind": "ngrams"}),
        ("gold", {"gold_model": "tiny-encoder"}, {"encoder": ENCODER}),
        ("gold", {"spoiled": True}, {"spoiled": spoiled.VERSION}),
        ("gold", {"gold_model": "words"}, {}),
        ("gold", {"reward_words": 48}, {}),
        (
            "gold",
            {"gold_model": "tiny-encoder", "reward_words": 48},
            {"encoder": ENCODER, "max_tokens": 96},
        ),
        ("reward", {"reward_model": "ngrams"}, {"kind": "ngrams"}),
        ("reward", {"reward_model": "words"}, {"kind": "bag_of_words"}),
        ("reward", {"gold_model": "ngrams"}, {"encoder": ENCODER}),
        ("reward", {"spoiled": True}, {"encoder": ENCODER, "spoiled": spoiled.VERSION}),
        ("reward", {"reward_words": 48}, {"encoder": ENCODER, "max_tokens": 96}),
        ("reward", {"reward_words": 48, "reward_rows": 0}, {"encoder": ENCODER}),
        ("words", {"spoiled": True, "gold_model": "ngrams"}, {"spoiled": spoiled.VERSION}),
        ("vader", {"spoiled": True}, {"spoiled": spoiled.VERSION}),
        ("person", {}, {"spoiled": spoiled.VERSION}),
        ("person", {"gold_model": "tiny-encoder"}, {"spoiled": spoiled.VERSION}),
    ],
    ids=str,
)
def test_what_a_reward_is_enters_its_key_where_it_is_not_the_default(name, changes, new):
    assert reward_inputs(name, **changes) == {"seed": 0, **new}


def test_spoiled_texts_enter_no_key_of_the_texts():
    """So the SFT model of both forms is one."""
    world = dataclasses.replace(FIRST_FORM, spoiled=True, gold_model="ngrams")
    assert stages.texts(world).key == stages.texts(FIRST_FORM).key


if __name__ == "__main__":
    sys.stdout.write(f"{GOLDEN}\n")
    GOLDEN.write_text(json.dumps(keys(), indent=1) + "\n", encoding="utf-8")
