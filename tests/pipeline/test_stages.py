"""The stage graph at profile smoke: real DeepSpeed children, a real sweep, living engines."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from safetensors.torch import load_file, save_file

from beyond_dpo import rewards, templates
from beyond_dpo.files import link_file
from beyond_dpo.machine import launch, paths, workers
from beyond_dpo.notebook import plan
from beyond_dpo.pipeline import (
    alpha_curves,
    artifacts,
    assets,
    config,
    expo,
    gather,
    spoiled,
    stages,
)


def plain(**overrides):
    """Smoke without the deepspeed launcher: the same engine, started in half the time."""
    return config.load("expo", "smoke", sft__launcher="plain", train__launcher="plain", **overrides)


def one_fraction(*alphas):
    """Return smoke with a single model, at these α."""
    return plain(fractions=[1.0], alphas={1.0: alphas}, seeds=[0], fewer_seeds={})


def stored():
    """Return the names of all results."""
    return {path.name for path in paths.ARTIFACTS.iterdir() if path.suffix != ".lock"}


def frame(artifact):
    """Return the table of a stage's file of JSON lines."""
    return pd.read_json(artifact.get() / f"{artifact.stage}.jsonl", lines=True)


def samples_of(cfg, model, split, samples):
    """Return the responses of a model."""
    weights = stages.Weights(model)
    return stages.responses(cfg, weights, split, samples=samples, seed=1)


@pytest.fixture(scope="module")
def cfg():
    return one_fraction(0, 2)


@pytest.fixture(scope="module")
def curves(store, cfg):
    """Return the curves of one model, computed."""
    artifact = expo.curves(cfg)
    artifact.get()
    return artifact


@pytest.fixture(scope="module")
def pairs(curves, cfg):
    """Return the preference pairs of the curves' model."""
    folder = stages.pairs(cfg).get()
    return stages.json_lines(folder / "pairs.jsonl")


@pytest.fixture
def tiny_reward(tmp_path):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    source = assets.model_dir("tiny-encoder")
    folder = tmp_path / "reward"
    model = AutoModelForSequenceClassification.from_pretrained(source, num_labels=1)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder


# --- keys


@pytest.mark.parametrize(
    "machine",
    [
        {"train__launcher": "plain"},
        {"train__micro_batch": 2},
        {"train__zero": 1},
        {"train__checkpoint_every": 1},
    ],
    ids=str,
)
def test_the_machine_is_not_in_a_key(machine):
    key = expo.curves(config.load("expo", "smoke")).key
    assert expo.curves(config.load("expo", "smoke", **machine)).key == key


@pytest.mark.parametrize(
    "setting",
    [
        {"train__lr": 2e-3},
        {"train__beta": 0.2},
        {"decoding__top_k": 50},
        {"world__samples": 4},
        {"test_samples": 1},
    ],
    ids=str,
)
def test_what_decides_a_result_is_in_its_key(setting):
    key = expo.curves(config.load("expo", "smoke")).key
    assert expo.curves(config.load("expo", "smoke", **setting)).key != key


def test_the_profiles_name_is_not_a_setting():
    smoke = config.load("expo", "smoke")
    renamed = dataclasses.replace(smoke, profile="cpu")
    assert expo.curves(renamed).key == expo.curves(smoke).key


@pytest.mark.parametrize(
    "change",
    [{"train__beta": 0.5}, {"train__loss": "ipo"}, {"train__lr": 1.0}, {"seeds": [3]}],
    ids=str,
)
def test_reference_is_shared_by_every_beta_loss_and_seed(change):
    key = stages.reference(config.load("expo", "smoke")).key
    assert stages.reference(config.load("expo", "smoke", **change)).key == key


def test_a_target_that_needs_no_fine_tuning_is_the_sft_model():
    cfg = config.load("expo", "smoke", world__sft_rows=0)
    assert stages.sft(cfg).key == stages.model(cfg.world.target).key


def test_the_stages_of_an_experiment_are_named_without_torch():
    code = (
        "import sys\n"
        "from beyond_dpo.pipeline import assets, config, expo, mallows, stages, wrpo\n"
        "expo.curves(config.load('expo', 'cpu')).upstream\n"
        "mallows.frontier(config.load('mallows', 'cpu')).upstream\n"
        "wrpo.main_result(config.load('wrpo', 'cpu')).upstream\n"
        "stages._identity(str(assets.model_dir('tiny')))\n"
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    assets.model_dir("tiny")  # which is built once, with torch
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


# --- texts


@pytest.fixture(scope="module")
def real_texts(store):
    """Return the world of profile cpu, and its texts of the real reviews."""
    world = config.load("expo", "cpu").world
    texts = stages.texts(world)
    try:
        texts.get()
    except assets.AssetError as error:
        pytest.skip(str(error))
    return world, texts


def test_splits_share_no_prompt_and_are_sized_as_asked(real_texts):
    world, texts = real_texts
    rows = []
    for split in ("prompts", "dev_prompts", "test_prompts"):
        rows += texts.json(f"{split}.json")
    ids = [row["id"] for row in rows]
    assert len(ids) == world.prompts + world.dev_prompts + world.test_prompts
    assert len(set(ids)) == len(ids)
    lengths = [len(row["prompt_ids"]) for row in rows]
    assert min(lengths) >= 4
    assert max(lengths) <= 10


def test_labelled_reviews_come_before_all_prompts(real_texts):
    """So the reward's labels, the held-out ones and the prompts share no review of half B."""
    world, texts = real_texts
    labelled = texts.json("labelled.json")
    reward_texts, _ = labelled["reward"]
    held_out_texts, _ = labelled["held_out"]
    assert len(reward_texts) == world.reward_rows
    assert len(held_out_texts) == 2000
    for name, (_, labels) in labelled.items():
        assert set(labels) == {0, 1}, name
    prompts = texts.json("prompts.json")
    numbers = [int(row["id"].removeprefix("B")) for row in prompts]
    assert min(numbers) == world.reward_rows + 2000


def test_sft_rows_are_as_many_and_as_long_as_asked(real_texts):
    world, texts = real_texts
    rows = stages.json_lines(texts.get() / "sft.jsonl")
    assert len(rows) == world.sft_rows
    lengths = [len(row["responses"]["chosen"]) for row in rows]
    assert min(lengths) >= 8
    assert max(lengths) <= world.sft_tokens


# --- one run through the whole graph


def test_pairs_are_the_best_against_the_worst_by_the_gold_reward(pairs, cfg):
    pool = samples_of(cfg, stages.sft(cfg), "prompts", cfg.world.samples)
    scores = stages.scores(cfg, pool, "prompts", judges=("gold",))
    table = frame(pool)
    table["gold"] = frame(scores)["gold"]
    assert pairs
    for pair in pairs:
        samples = table[table["id"] == pair["id"]]
        responses = map(tuple, samples["response_ids"])
        gold = dict(zip(responses, samples["gold"], strict=True))
        chosen = tuple(pair["responses"]["chosen"])
        rejected = tuple(pair["responses"]["rejected"])
        assert gold[chosen] == samples["gold"].max()
        assert gold[rejected] == samples["gold"].min()


def test_every_alpha_answers_the_same_prompts(curves):
    table = curves.csv("responses.csv.gz")
    sizes = table.groupby(["split", "fraction", "alpha"]).size()
    assert set(sizes["dev"]) == {6 * 1}
    assert set(sizes["test"]) == {6 * 2}


def test_the_sft_models_own_responses_have_no_divergence_from_it(curves):
    table = curves.csv("responses.csv.gz")
    sft = table[(table["fraction"] == 0) & (table["split"] == "dev")]
    assert len(sft) == 6
    assert sft["logratio"].abs().max() < 0.05


def test_the_reward_model_chooses_alpha_on_dev_prompts(curves, cfg):
    """Among the points that pass the gate: of a random model's responses either may not."""
    table = curves.csv("responses.csv.gz")
    points = pd.DataFrame(curves.json("points.json"))
    dev = table[table["split"] == "dev"]
    means = dev.groupby(["fraction", "alpha"])[["reward", "repetition"]].mean()
    distinct = points[points["split"] == "dev"].set_index(["fraction", "alpha"])["distinct_2"]
    few_repeats = means["repetition"] <= means["repetition"][0.0, 0.0] + 0.05
    passing = means[few_repeats & (distinct >= 0.5 * distinct[0.0, 0.0])].loc[1.0]
    best = passing["reward"].idxmax() if len(passing) else 0.0
    choices = expo.measured(cfg, curves).choices()
    assert choices[["fraction", "seed", "alpha"]].to_numpy().tolist() == [[1.0, 0, best]]


def test_training_and_search_have_their_seconds(curves):
    (row,) = curves.manifest["facts"]["seconds"]
    assert (row["fraction"], row["seed"]) == (1.0, 0)
    assert row["training"] > 0
    assert row["search"] > 0


def test_a_walk_has_the_points_of_the_curves_and_those_between(curves, cfg):
    """Its α of 0 and 2 are those of the curves: only those between are sampled."""
    between = config.load("expo", "smoke", **{"fractions": [1.0], "interpolation": [0, 0.5, 1]})
    narrow = dataclasses.replace(cfg, interpolation=between.interpolation)
    lines = expo.interpolation(narrow)
    assert list(lines) == ["aligned"]
    assert list(lines["aligned"]) == [0]
    assert lines["aligned"][0].alphas == (-0.5, 0.0, 2.0)
    before = stored()
    walked = expo.walk(narrow, lines).csv("responses.csv.gz")
    new = [name for name in stored() - before if name.startswith("responses-")]
    assert len(new) == 2, "one α on two splits"
    table = curves.csv("responses.csv.gz")
    for split in ("dev", "test"):
        ours = walked[(walked["alpha"] == 2) & (walked["split"] == split)]
        theirs = table[(table["alpha"] == 2) & (table["split"] == split)]
        assert ours["gold"].tolist() == theirs["gold"].tolist()


def test_steps_of_equal_length_have_the_alpha_that_makes_them_so(store, cfg):
    """α ‖Δθ‖ of every line is a step times ‖Δθ‖ of the first."""
    some = dataclasses.replace(cfg, recipe_fraction=1.0, pair_alphas=(0.0, 1.0), line_seeds=1)
    lines = expo.of_seeds(some, expo.wrong_pairs)
    walked = expo.equal_steps(some, lines)
    rows = pd.DataFrame(walked.json("steps.json"))
    assert len(rows) == 2 * len(lines)
    moved = {}
    for name, by_seed in lines.items():
        line = by_seed[0]
        change = expo.change(some, {name: (line.start, {name: line.end})})
        moved[name] = (change.csv("movement.csv.gz")["change"] ** 2).sum() ** 0.5
    first = moved["SFT → aligned from it"]
    lengths = rows["own_alpha"] * rows["model"].map(moved)
    assert lengths.tolist() == pytest.approx((rows["step"] * first).tolist(), rel=1e-4)
    table = walked.csv("responses.csv.gz")
    assert set(table["alpha"]) == {0, 1}
    assert set(table["model"]) == {"SFT", *lines}


def test_lines_of_several_seeds(store):
    cfg = config.load("expo", "smoke", seeds=[3, 5, 7], line_seeds=2)
    lines = expo.of_seeds(cfg, expo.recipes)
    assert list(lines) == ["default", *cfg.recipes]
    for name, by_seed in lines.items():
        assert list(by_seed) == [3, 5], name
        assert by_seed[3].end.key != by_seed[5].end.key
    assert lines["default"][3].end.key == expo.recipes(cfg, 3)["default"].end.key


def test_losses_are_lines_of_their_own(store):
    cfg = config.load("expo", "smoke", losses={"IPO": {"loss": "ipo", "beta": 0.2}})
    lines = expo.losses(cfg, 0)
    assert list(lines) == ["DPO", "IPO"]
    settings = lines["IPO"].end.inputs["settings"]
    assert (settings["loss"], settings["beta"]) == ("ipo", 0.2)


def test_the_way_of_a_training_is_measured(store, cfg):
    straight = expo.straightness(dataclasses.replace(cfg, checkpoints=2))
    rows = straight.csv("way.csv.gz")
    assert rows["way"].sum() > 0
    assert 0 < rows["along"].sum() / rows["way"].sum() <= 1
    folder = straight.inputs["end"].get()
    assert (folder / "part1" / "model.safetensors").exists()


def test_a_model_of_low_rank_keeps_less_and_can_be_walked_along(store, cfg):
    some = dataclasses.replace(cfg, recipe_fraction=1.0, ranks=(1, 2))
    lines = expo.low_ranks(some, 0)
    assert list(lines) == ["whole", "rank 1", "rank 2"]
    kept = [lines[name].end.get() for name in ("rank 1", "rank 2")]
    shares = [
        json.loads((folder / "manifest.json").read_text())["facts"]["kept"] for folder in kept
    ]
    assert 0 < shares[0] < shares[1] <= 1
    by_seed = {name: {0: line} for name, line in lines.items()}
    table = expo.walk(some, by_seed).csv("responses.csv.gz")
    assert set(table["model"]) == {"SFT", *lines}


def test_a_search_names_the_points_that_it_tried(curves):
    cfg = one_fraction(0, 2)
    result = expo.searched(cfg)
    (found,) = result.json("searches.json")
    points = result.manifest["facts"]["tried_points"]
    assert [point["alpha"] for point in points] == found["tried"]
    for point in points:
        scores = expo.point(cfg, 1.0, 0, point["alpha"], "dev_prompts")
        assert point["key"] == scores.key


def test_a_search_finds_the_best_of_the_tried_points_that_pass_the_gate(curves):
    cfg = one_fraction(0, 2)
    result = expo.searched(cfg)
    (found,) = result.json("searches.json")
    passing = [alpha for alpha in found["tried"] if expo._passes(cfg, 1.0, 0, alpha)]
    means = {alpha: expo._mean_rewards(cfg, 1.0, 0, alpha).mean() for alpha in passing}
    assert found["alpha"] == max(means, key=means.get, default=0.0)
    table = result.csv("responses.csv.gz")
    aligned = table[table["fraction"] == 1.0]
    assert set(aligned["own_alpha"]) == {found["alpha"]}
    assert set(aligned["alpha"]) == {expo.SEARCHED}
    assert set(aligned["split"]) == {"dev", "test"}


def test_a_search_keeps_the_aligned_model_where_no_point_passes(curves, monkeypatch):
    monkeypatch.setattr(alpha_curves, "LEAST_DISTINCT", 100.0)
    assert expo._search(one_fraction(0, 2), 1.0, 0)["alpha"] == 0


def test_no_text_and_no_token_of_the_data_set_is_frozen(curves):
    files = curves.manifest["files"]
    assert set(files) == {"facts.json", "points.json", "responses.csv.gz"}
    for file in curves.get().glob("*.json"):
        assert "response_ids" not in file.read_text()
    frozen = artifacts.freeze(curves.key)
    size = sum(file.stat().st_size for file in frozen.iterdir())
    assert size < 100_000


def test_a_subset_may_be_of_the_longest_chosen_responses(pairs, cfg):
    extra = {}
    for pair in pairs:
        responses = pair["responses"]
        extra[pair["id"]] = len(responses["chosen"]) - len(responses["rejected"])
    part = stages.subset(cfg, 0.25, seed=0, longest=True)
    kept = [row["id"] for row in stages.json_lines(part.get() / "pairs.jsonl")]
    assert len(kept) == part.manifest["facts"]["pairs"]
    assert len(kept) == max(1, round(len(pairs) / 4))
    shortest_kept = min(extra[name] for name in kept)
    longest_left = max(extra[name] for name in extra if name not in kept)
    assert shortest_kept >= longest_left


def test_one_more_alpha_samples_one_more_point_and_trains_nothing(curves):
    before = stored()
    expo.curves(one_fraction(0, 2, 3)).get()
    new_stages = {name.partition("-")[0] for name in stored() - before}
    assert "curves" in new_stages
    assert new_stages <= {"responses", "scores", "curves"}


def test_a_frozen_result_needs_none_of_those_above_it(curves, monkeypatch, tmp_path):
    table = curves.csv("responses.csv.gz")
    artifacts.freeze(curves.key)
    monkeypatch.setattr(paths, "ARTIFACTS", tmp_path / "empty")
    monkeypatch.setenv("COMPUTE", "never")
    assert curves.csv("responses.csv.gz").equals(table)
    with pytest.raises(artifacts.MissingArtifact, match="make reproduce"):
        expo.curves(one_fraction(0, 2, 4)).get()


# --- living engines


def text_of(cfg, model):
    """Sample from a model anew; return the file's text."""
    answers = samples_of(cfg, model, "dev_prompts", 2)
    shutil.rmtree(paths.ARTIFACTS / answers.key, ignore_errors=True)
    return (answers.get() / "responses.jsonl").read_text()


def response_ids(text):
    return [json.loads(line)["response_ids"] for line in text.splitlines()]


def test_one_engine_samples_from_all_models_of_a_shape(store):
    """The SFT model, what it was trained from, and back: one process."""
    cfg = plain()
    start = stages.sft(cfg)
    raw = stages.model(cfg.world.target)
    first = text_of(cfg, start)
    engine = workers.living["generate"]
    second = text_of(cfg, raw)
    assert text_of(cfg, start) == first
    assert first != second
    assert workers.living["generate"] is engine
    loaded = Path(f"/proc/{engine.child.pid}/maps").read_text()
    assert "/torch/" in loaded
    assert "/sklearn/" not in loaded, "its import takes a second, and no engine uses it"


def test_an_engine_that_was_swapped_says_what_one_of_the_model_alone_says(store):
    cfg = plain()
    raw = stages.model(cfg.world.target)
    text_of(cfg, stages.sft(cfg))
    swapped = text_of(cfg, raw)
    settings = {"model": str(raw.get()), "decoding": dataclasses.asdict(cfg.decoding)}
    prompts = stages.texts(cfg.world).get() / "dev_prompts.json"
    out = store / "alone.jsonl"
    with launch.Worker("beyond_dpo.jobs.generate", settings, store, desc="alone") as alone:
        alone.call("generate", prompts=str(prompts), out=str(out), samples=2, seed=1)
    said_alone = out.read_text()
    assert response_ids(said_alone) == response_ids(swapped)


@pytest.mark.parametrize(
    "file, change",
    [
        ("config.json", {"rms_norm_eps": 0.5}),
        ("generation_config.json", {"eos_token_id": [*range(400)]}),
    ],
)
def test_a_model_of_another_shape_needs_an_engine_of_its_own(store, file, change):
    cfg = plain()
    raw = stages.model(cfg.world.target)
    own = text_of(cfg, raw)
    engine = workers.living["generate"]
    other = store / f"with other {file}"
    shutil.copytree(raw.get(), other, ignore=shutil.ignore_patterns("manifest.json"))
    settings = json.loads((other / file).read_text())
    (other / file).write_text(json.dumps(settings | change))
    assert text_of(cfg, stages.model(str(other))) != own
    assert workers.living["generate"] is not engine


@pytest.fixture
def two_models(tmp_path):
    """Return the folders of two copies of the tiny model."""
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        shutil.copytree(assets.model_dir("tiny"), folder)
    return folders


def test_an_engines_shape_is_what_its_files_say_not_how_they_are_written(two_models):
    """Another order of the settings, another dtype or origin are one shape."""
    one, two = two_models
    file = two / "config.json"
    settings = json.loads(file.read_text())
    settings["torch_dtype"] = "bfloat16"
    settings["dtype"] = "bfloat16"
    settings["transformers_version"] = "4.1"
    settings["_name_or_path"] = "/x"
    reordered = dict(reversed(settings.items()))
    file.write_text(json.dumps(reordered))
    assert stages._identity(str(two)) == stages._identity(str(one))


@pytest.mark.parametrize(
    "change", [{"rms_norm_eps": 0.5}, {"eos_token_id": 7}, {"tie_word_embeddings": False}], ids=str
)
def test_another_end_token_or_structure_is_another_identity(two_models, change):
    one, two = two_models
    file = two / "config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps(settings | change))
    assert stages._identity(str(two)) != stages._identity(str(one))


def test_a_saved_tokenizer_has_the_same_identity(two_models):
    """A training writes the files of its tokenizer anew, in another way than they came."""
    one, two = two_models
    templates.load_tokenizer(str(two)).save_pretrained(two)
    assert stages._identity(str(two)) == stages._identity(str(one))


# --- copies of models


def sizes(folder):
    """Return the size of each file of a folder that is not hidden."""
    files = [file for file in folder.iterdir() if not file.name.startswith(".")]
    return {file.name: file.stat().st_size for file in files}


def test_copying_a_model_can_be_tried_again(store, monkeypatch):
    """An interrupt leaves links to large files; the next attempt ends, and writes into none."""
    source = store / "source"
    out = store / "out"
    out.mkdir()
    shutil.copytree(assets.model_dir("tiny"), source)
    weights = {"x": {"dtype": "U8", "shape": [10**9], "data_offsets": [0, 10**9]}}
    header = json.dumps(weights).encode()
    with open(source / "large.safetensors", "wb") as large:  # which takes no room on the disk
        large.write(len(header).to_bytes(8, "little") + header)
        large.truncate(8 + len(header) + 10**9)
    monkeypatch.setattr(assets, "resolve", lambda ref: {"local": ref})  # without reading all of it
    copy = stages.model(str(source)).make
    copy(out)
    (out / "config.json").unlink()
    for _ in range(2):
        copy(out)
        assert (out / "large.safetensors").samefile(source / "large.safetensors")
        assert not (out / "config.json").samefile(source / "config.json")
        assert sizes(out) == sizes(source)
    assert not list(out.glob(f"*.{os.getpid()}")), "no partial copy is left"


def missing(source, target, other):
    pass


def linked_before(source, target, other):
    link_file(source, target)


def copied_before(source, target, other):
    link_file(source, target, least=10)


def link_to_nowhere(source, target, other):
    target.symlink_to(source.with_name("gone"))


def symbolic_link(source, target, other):
    target.symlink_to(source)


def another_file(source, target, other):
    target.write_text("old")


def second_name_of_another_file(source, target, other):
    os.link(other, target)


def second_name(source, target, other):
    os.link(source, target)


@pytest.mark.parametrize("least", [0, 10])
@pytest.mark.parametrize(
    "before",
    [
        missing,
        linked_before,
        copied_before,
        link_to_nowhere,
        symbolic_link,
        another_file,
        second_name_of_another_file,
        second_name,
    ],
)
def test_a_link_replaces_what_is_there_and_changes_no_other_file(tmp_path, before, least):
    source = tmp_path / "source"
    other = tmp_path / "other"
    target = tmp_path / "target"
    source.write_text("new")
    other.write_text("other")
    before(source, target, other)
    for _ in range(2):
        link_file(source, target, least)
        assert target.read_text() == "new"
        assert not target.is_symlink()
    assert other.read_text() == "other"
    assert len(list(tmp_path.iterdir())) == 3
    if least == 0:
        assert target.samefile(source)


def test_a_link_to_a_missing_file_leaves_what_is_there(tmp_path):
    target = tmp_path / "target"
    target.write_text("new")
    with pytest.raises(FileNotFoundError):
        link_file(tmp_path / "gone", target)
    assert target.read_text() == "new"


# --- lines through two models


@pytest.mark.parametrize(
    "change", [{"max_prompt": 8}, {"max_length": 99}, {"precision": "bf16"}], ids=str
)
def test_a_training_is_not_cut_otherwise_than_its_reference_pass(change):
    """The pass takes these of cfg.train, so that rows and log-probabilities would not fit."""
    cfg = config.load("expo", "cpu")
    (name,) = change
    with pytest.raises(config.ConfigError, match=f"{name} of one training .* set train.{name}"):
        stages.aligned(cfg, 1.0, **change)


def test_lines_share_what_is_already_trained():
    """No model of another notebook is trained again."""
    cfg = config.load("expo", "night")
    trained = {stages.aligned(cfg, fraction, seed).key for fraction, seed in expo.runs(cfg)}
    recipes = expo.recipes(cfg, 0)
    ends = {line.end.key for line in recipes.values()}
    assert len(ends) == len(recipes) == 9
    assert recipes["default"].end.key in trained
    quality = expo.data_quality(cfg, cfg.seeds[0])
    assert len(quality) == 2 * len(cfg.quality_fractions) == 6
    for name, line in quality.items():
        assert (line.end.key in trained) == name.endswith("random"), name


def test_no_line_has_one_model_at_both_ends():
    cfg = config.load("expo", "cpu")
    lines = {**expo.wrong_pairs(cfg), **expo.modules(cfg, 0)}
    assert len(lines) == 4 + 5
    for name, line in lines.items():
        assert line.start.key != line.end.key, name


def test_both_halves_of_the_layers_are_all_layers():
    cfg = config.load("expo", "cpu")
    lines = expo.modules(cfg, 0)
    first = lines["first half of the layers"].modules
    second = lines["second half of the layers"].modules
    assert len({*first, *second}) == cfg.layers == 30


def test_all_modules_together_are_the_plain_line():
    cfg = config.load("expo", "cpu")
    plain_line = expo.Line(stages.sft(cfg), stages.aligned(cfg, 1.0))
    whole = expo.modules(cfg, 0)["all"]
    at_two = whole.at(cfg, 2.0, "dev_prompts", 1)
    assert at_two.key == plain_line.at(cfg, 2.0, "dev_prompts", 1).key


def test_lines_of_one_finished_sft_model_are_refused():
    cfg = config.load("expo", "paper", wrong_pairs={})
    message = "profile paper starts from one finished SFT model"
    with pytest.raises(config.ConfigError, match=message):
        expo.wrong_pairs(cfg)


@pytest.fixture
def moved(store):
    """Return the folder of a model near the tiny one."""
    folder = store / "moved"
    shutil.copytree(assets.model_dir("tiny"), folder)
    file = folder / "model.safetensors"
    weights = load_file(file)
    for tensor in weights.values():
        deviation = tensor.std()
        tensor += 0.01 * deviation
    save_file(weights, file, {"format": "pt"})
    return folder


def test_published_wrong_pairs_are_lines_of_their_own_tokenizers(moved):
    """Two folders as two hub ids: walked along as any line, beside the right pair."""
    pair = [str(assets.model_dir("tiny")), str(moved)]
    cfg = plain(
        wrong_pairs={"instruct → SFT": pair},
        pair_alphas=[0, 1],
        recipe_fraction=0.5,
    )
    lines = expo.wrong_pairs(cfg)
    assert list(lines) == ["SFT → aligned from it", "instruct → SFT"]
    table = expo.sweep(cfg, lines).csv("responses.csv.gz")
    assert set(table["model"]) == {"SFT", *lines}
    published = table[table["model"] == "instruct → SFT"]
    assert published["logratio"].isna().all(), "the world's SFT model does not score it"
    texts = expo.said(cfg, lines).json("texts.json")
    assert len(texts) == 2 * 2 * len(expo.PROMPTS)


# --- what notebooks run


@pytest.fixture(scope="module", params=config.PROFILES)
def dry_run(request):
    """Return a profile, and what each notebook would do at it, a line each, by its number."""
    profile = request.param
    lines = {}
    for path in plan.find([]):
        notebook = nbformat.read(path, as_version=4)
        values = plan.parameters(notebook, path.stem)
        number = path.stem[:2]
        lines[number] = plan.described(notebook, values | {"profile": profile})
    return profile, lines


def trainings(lines):
    """Return how many trainings each notebook names."""
    counts = {}
    for number, works in lines.items():
        counts[number] = sum("beyond_dpo.jobs.train" in work for work in works)
    return counts


@pytest.mark.slow
def test_the_dry_run_names_every_training_of_expos_notebooks(dry_run):
    profile, lines = dry_run
    cfg = config.load("expo", profile)
    count = trainings(lines)
    sft = int(cfg.world.sft_rows > 0)
    models = len(expo.runs(cfg))
    taken = (cfg.train.lr, cfg.train.epochs)
    tried = [recipe for recipe in cfg.tried if recipe != taken]
    assert count["11"] == sft + models + len(tried)
    seeds = cfg.seeds[: cfg.line_seeds]
    fractions = (cfg.recipe_fraction, cfg.fractions[-1])  # of the low ranks and of the modules
    of_16 = {*expo.runs(cfg), *((fraction, seed) for fraction in fractions for seed in seeds)}
    checkpointed = 1  # all pairs once more, with the checkpoints that straightness needs
    assert count["16"] == sft + len(of_16) + checkpointed
    assert count["90"] == sft + models
    assert count["12"] == sft + sum(fraction == 1 for fraction, _ in expo.runs(cfg))
    of_13 = 2 + len(cfg.recipes)  # besides the recipes: the default, all pairs
    assert count["13"] == sft + len(seeds) * of_13
    assert count["14"] == sft + len(seeds) * (2 * len(cfg.quality_fractions) + 1)
    assert count["15"] == (1 + 3 * len(seeds) if sft else 1)
    assert count["17"] == sft + models
    for number in ("00", "18", "19"):
        assert count[number] == 0


@pytest.mark.slow
def test_the_dry_run_names_every_training_of_wrpos_notebooks(dry_run):
    profile, lines = dry_run
    cfg = config.load("wrpo", profile)
    count = trainings(lines)
    start = int(cfg.world.sft_rows > 0) + 1  # SFT, where it is trained here, and Target-SFT
    kinds = {cfg.known_sources[source].kind for source in cfg.sources}
    start += "expo" in kinds  # the model that ExPO pushes on
    seeds = len(cfg.seeds)
    losses = len(cfg.objectives)
    source_sets = {*cfg.source_sets, cfg.sources}
    larger_alphas = [alpha for alpha in cfg.alphas if alpha > 0.1]
    assert count["31"] == start + seeds * (losses + 2)
    assert count["32"] == start + 2 + 2 * len(cfg.alphas)
    seeds_of_ablations = min(seeds, cfg.ablation_seeds)
    assert count["33"] == start - 1 + (1 + seeds_of_ablations) * len(source_sets)
    assert count["34"] == start + 2 * losses * seeds_of_ablations
    assert count["35"] == start + 2 * seeds + len(larger_alphas)


@pytest.mark.slow
def test_the_dry_run_says_what_is_needed_and_which_models_are_used(dry_run):
    profile, lines = dry_run
    cfg = config.load("expo", profile)
    needed, models, *_ = lines["11"]
    assert f"{cfg.needs.hours:g} h" in needed
    assert cfg.world.target in models
    assert any(f"2 × lr {cfg.train.lr:g}" in line for line in lines["13"])
    published = "computes nothing"
    if profile == "paper":  # its twelve pairs are sampled from
        published = "8 GPUs"
    assert published in lines["18"][0]
    assert "computes nothing" in lines["19"][0]


# --- rewards and machines


@pytest.mark.parametrize(
    "changes, names",
    [
        ({}, ("gold", "reward", "vader")),
        ({"spoiled": True}, ("gold", "reward", "words", "vader", "person")),
        ({"gold_rows": 0}, ("reward", "vader")),
        ({"spoiled": True, "gold_rows": 0}, ("reward", "vader")),
    ],
    ids=str,
)
def test_the_judges_of_a_world_are_those_of_its_scores(changes, names):
    cfg = config.load("expo", "smoke")
    world = dataclasses.replace(cfg.world, spoiled=False)
    cfg = dataclasses.replace(cfg, world=dataclasses.replace(world, **changes))
    assert stages.judges(cfg.world) == names
    pool = samples_of(cfg, stages.sft(cfg), "dev_prompts", 1)
    inputs = stages.scores(cfg, pool, "dev_prompts").inputs
    assert inputs["judges"] == list(names)
    assert list(inputs["trained"]) == [name for name in names if name != "vader"]


@pytest.fixture
def jobs(monkeypatch, tmp_path):
    """Return the jobs of rewards that were to be trained, in place of any training."""
    monkeypatch.setattr(paths, "ARTIFACTS", tmp_path / "artifacts")
    monkeypatch.setattr(paths, "FROZEN", tmp_path / "frozen")
    started = []

    def note(module, job, out, desc):
        assert module == "beyond_dpo.jobs.fit_reward"
        started.append(job)
        (out / "facts.json").write_text("{}")

    monkeypatch.setattr(workers, "run", note)
    return started


def spoiled_world(**changes):
    """Return the smoke world with spoiled texts, its gold reward an encoder."""
    world = config.load("expo", "smoke").world
    second_form = {"spoiled": True, "gold_model": "tiny-encoder", "reward_words": 48}
    return dataclasses.replace(world, **second_form | changes)


def test_the_rewards_of_a_spoiled_world_learn_from_spoiled_texts(jobs):
    world = spoiled_world(reward_model="ngrams")
    for name in ("gold", "reward"):
        stages.reward(world, name).get()
    gold, reward = jobs
    labelled = stages.texts(world).json("labelled.json")
    measured = [*labelled["held_out"], spoiled.spoil(labelled["held_out"][0], 2)]
    for job, part, seed in ((gold, "gold", 0), (reward, "reward", 1)):
        texts, labels = spoiled.with_spoiled(*labelled[part], seed)
        assert (job["texts"], job["labels"]) == (texts, labels)
        assert list(job["held_out"]) == measured
    assert (gold["kind"], reward["kind"]) == ("classifier", "ngrams")
    assert gold["encoder"] == str(assets.model_dir("tiny-encoder"))
    assert gold["max_tokens"] == 96
    assert gold["lean"]
    assert "encoder" not in reward


def test_third_opinions_learn_from_half_a_without_what_gold_learns(jobs):
    """Words: sentiment alone. Person: every opening is positive, and every spoiled text is not."""
    world = spoiled_world()
    for name in ("words", "person", "vader"):
        stages.reward(world, name).get()
    words, person, vader = jobs
    labelled = stages.texts(world).json("labelled.json")
    openings, labels = labelled["gold"]
    held_out, held_out_labels = labelled["held_out"]
    spoiled_held_out = spoiled.spoil(held_out, 2)
    assert words["kind"] == "bag_of_words"
    assert [words["texts"], words["labels"]] == [openings, labels]
    assert person["kind"] == "ngrams"
    assert person["texts"] == openings + spoiled.spoil(openings, 0)
    assert person["labels"] == [1] * len(openings) + [0] * len(openings)
    assert person["held_out"][0] == held_out + spoiled_held_out
    assert person["held_out"][1] == [1] * len(held_out) + [0] * len(held_out)
    assert vader["kind"] == "vader"
    for job in (words, vader):
        assert list(job["held_out"]) == [held_out, held_out_labels, spoiled_held_out]


def test_rewards_of_the_first_form_are_trained_as_they_were(jobs):
    first_form = {"spoiled": False, "gold_model": "words", "reward_model": "tiny-encoder"}
    world = spoiled_world(**first_form, reward_words=32)
    for name in ("gold", "reward"):
        stages.reward(world, name).get()
    gold, reward = jobs
    labelled = stages.texts(world).json("labelled.json")
    for job, part in ((gold, "gold"), (reward, "reward")):
        assert [job["texts"], job["labels"]] == labelled[part]
        assert list(job["held_out"]) == labelled["held_out"]
    assert gold["kind"] == "bag_of_words"
    assert reward["kind"] == "classifier"
    assert reward["max_tokens"] == 64
    assert not reward["lean"]


def test_judges_of_half_a_need_its_labels(jobs):
    world = spoiled_world(gold_rows=0)
    for name in ("gold", "words", "person"):
        message = f"world.gold_rows is 0: there is nothing to train the {name} reward on"
        with pytest.raises(config.ConfigError, match=message):
            stages.reward(world, name).get()


def test_every_judge_of_a_spoiled_world_scores(store):
    """Gold is n-grams here, and the reward model the tiny encoder: both really trained."""
    models = {"world__gold_model": "ngrams", "world__reward_model": "tiny-encoder"}
    cfg = plain(world__spoiled=True, world__reward_words=48, **models)
    pool = samples_of(cfg, stages.sft(cfg), "dev_prompts", 1)
    scores = frame(stages.scores(cfg, pool, "dev_prompts"))
    assert {"gold", "reward", "words", "vader", "person", "ended"} < set(scores)
    for name in stages.judges(cfg.world):
        facts = stages.reward(cfg.world, name).manifest["facts"]
        measured = {"held_out", "accuracy", "auc"}
        if name != "person":
            measured.add("auc_spoiled")
        assert measured <= set(facts)
        assert scores[name].nunique() > 1
    assert stages.reward(cfg.world, "person").manifest["facts"]["auc"] > 0.8


def test_a_finished_reward_model_has_nothing_to_train(store, tiny_reward):
    cfg = plain(world__reward_model=str(tiny_reward), world__reward_rows=0)
    reward = stages.reward(cfg.world, "reward")
    facts = reward.manifest["facts"]
    assert set(facts) == {"held_out", "accuracy", "auc", "auc_spoiled"}
    assert facts["held_out"] > 10
    assert not list(reward.get().glob("*.safetensors")), "no copy of the model"


def test_a_finished_reward_model_is_used_as_it_is(store, tiny_reward):
    cfg = plain(world__reward_model=str(tiny_reward), world__reward_rows=0)
    pool = samples_of(cfg, stages.sft(cfg), "dev_prompts", 1)
    scores = frame(stages.scores(cfg, pool, "dev_prompts"))
    prompts = stages.texts(cfg.world).json("dev_prompts.json")
    folder = stages.sft(cfg).get()
    tokenizer = templates.load_tokenizer(str(folder))
    texts = []
    for prompt, response in zip(prompts, frame(pool)["response_ids"], strict=True):
        ids = prompt["prompt_ids"] + response
        texts.append(tokenizer.decode(ids, skip_special_tokens=True))
    wanted = rewards.Classifier(tiny_reward).score(texts)
    assert scores["reward"].tolist() == pytest.approx(wanted, abs=2e-5)


def test_a_machine_that_is_too_small_is_told_so_before_anything_starts(monkeypatch, tmp_path):
    monkeypatch.setattr(paths, "ARTIFACTS", tmp_path / "artifacts")
    monkeypatch.setattr(paths, "FROZEN", tmp_path / "frozen")
    cfg = plain()
    needs = dataclasses.replace(cfg.needs, memory_gb=10**6)
    cfg = dataclasses.replace(cfg, needs=needs)
    message = "1000000 GB of memory.*--dry-run.*--profile (cpu|smoke)"
    with pytest.raises(config.ConfigError, match=message):
        expo.curves(cfg).get()
    assert not list(paths.ARTIFACTS.glob("train-*"))


def test_ids_of_digits_stay_texts(store):
    """A data set with such ids missed its prompts: pandas read them as numbers."""

    def write(folder):
        (folder / "scores.jsonl").write_text('{"id": "007", "reward": 1.5}\n')

    artifact = artifacts.Artifact("digits", 1, {}, write)
    assert gather.read_lines(artifact, "scores.jsonl")["id"].tolist() == ["007"]
