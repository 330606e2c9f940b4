"""The stage graph at profile smoke: real DeepSpeed children, a real sweep, resumed after kill
-9.
"""

import dataclasses
import json
import os
import shutil

import nbformat
import pandas as pd
import pytest
from safetensors.torch import load_file, save_file

from beyond_dpo import rewards, templates
from beyond_dpo.files import link_file
from beyond_dpo.machine import launch, paths, workers
from beyond_dpo.notebook import plan
from beyond_dpo.pipeline import artifacts, assets, config, expo, stages


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "ARTIFACTS", tmp_path / "artifacts")
    monkeypatch.setattr(paths, "FROZEN", tmp_path / "frozen")
    yield tmp_path
    workers.close()


@pytest.fixture
def tiny_reward(tmp_path):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    source, folder = assets.model_dir("tiny-encoder"), tmp_path / "reward"
    AutoModelForSequenceClassification.from_pretrained(source, num_labels=1).save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder


def plain(**overrides):
    """Smoke with plain python in place of the deepspeed launcher: the same engine, started in half
    the time.
    """
    return config.load("expo", "smoke", sft__launcher="plain", train__launcher="plain", **overrides)


def test_keys_hold_what_matters_and_nothing_else():
    base = config.load("expo", "smoke")
    key = expo.curves(base).key
    for machine in (
        {"train__launcher": "plain"},
        {"train__micro_batch": 2},
        {"train__zero": 1},
        {"train__checkpoint_every": 1},
    ):
        assert expo.curves(config.load("expo", "smoke", **machine)).key == key, machine
    for matters in (
        {"train__lr": 2e-3},
        {"train__beta": 0.2},
        {"decoding__top_k": 50},
        {"world__samples": 4},
        {"test_samples": 1},
    ):
        assert expo.curves(config.load("expo", "smoke", **matters)).key != key, matters
    assert expo.curves(dataclasses.replace(base, profile="cpu")).key == key, (
        "the profile's name is not a setting"
    )


def test_reference_is_shared_by_every_beta_loss_and_seed():
    key = stages.reference(config.load("expo", "smoke")).key
    for change in (
        {"train__beta": 0.5},
        {"train__loss": "ipo"},
        {"train__lr": 1.0},
        {"seeds": [3]},
    ):
        assert stages.reference(config.load("expo", "smoke", **change)).key == key


def test_splits_are_disjoint_and_sized_as_asked(store):
    """On the real reviews: no prompt is shared between train, dev, test, the reward's labels and
    the held-out ones.
    """
    world = config.load("expo", "cpu").world
    try:
        folder = stages.texts(world).get()
    except Exception as error:
        if type(error).__name__ != "AssetError":
            raise
        pytest.skip(str(error))
    splits = {
        s: json.loads((folder / f"{s}.json").read_text())
        for s in ("prompts", "dev_prompts", "test_prompts")
    }
    ids = [r["id"] for rows in splits.values() for r in rows]
    assert len(ids) == len(set(ids)) == world.prompts + world.dev_prompts + world.test_prompts
    labelled = json.loads((folder / "labelled.json").read_text())
    assert len(labelled["reward"][0]) == world.reward_rows and len(labelled["held_out"][0]) == 2000
    first = min(int(i[1:]) for i in ids)
    assert first == world.reward_rows + 2000, (
        "prompts begin where the labelled reviews of half B end"
    )
    assert all(set(labels) == {0, 1} for _, labels in labelled.values())
    lengths = {len(r["prompt_ids"]) for rows in splits.values() for r in rows}
    assert min(lengths) >= 4 and max(lengths) <= 10
    rows = [json.loads(line) for line in (folder / "sft.jsonl").read_text().splitlines()]
    assert len(rows) == world.sft_rows
    assert all(8 <= len(r["responses"]["chosen"]) <= world.sft_tokens for r in rows)


def test_pairs_are_best_against_worst_and_the_sweep_is_consistent(store):
    """One run through the whole graph: pairs follow the gold scores, α = −1 is SFT, all α answer
    the same prompts.
    """
    cfg = plain(fractions=[1.0], alphas={1.0: [0, 2]}, seeds=[0], seed_fractions=[])
    curves = expo.curves(cfg)
    table, best = curves.csv("responses.csv.gz"), curves.json("best.json")
    pairs = [
        json.loads(line)
        for line in (stages.pairs(cfg).get() / "pairs.jsonl").read_text().splitlines()
    ]
    weights = stages.Weights(stages.sft(cfg))
    pool = stages.responses(cfg, weights, "prompts", samples=cfg.world.samples, seed=1)
    gold = pd.read_json(
        stages.scores(cfg, pool, "prompts", judges=("gold",)).get() / "scores.jsonl", lines=True
    )
    said = pd.read_json(pool.get() / "responses.jsonl", lines=True)
    said["gold"] = gold["gold"]
    for pair in pairs:
        mine = said[said["id"] == pair["id"]]
        score = {tuple(r): g for r, g in zip(mine["response_ids"], mine["gold"], strict=True)}
        assert score[tuple(pair["responses"]["chosen"])] == mine["gold"].max()
        assert score[tuple(pair["responses"]["rejected"])] == mine["gold"].min()
    assert set(table.groupby(["split", "fraction", "alpha"]).size()) == {
        6,
        12,
    }  # 6 dev prompts × 1, 6 test prompts × 2
    sft = table[(table["fraction"] == 0) & (table["split"] == "dev")]
    assert sft["logratio"].abs().max() < 0.05, (
        "the SFT model's own responses have no divergence from it"
    )
    dev = (
        table[(table["split"] == "dev") & (table["fraction"] == 1)]
        .groupby("alpha")["reward"]
        .mean()
    )
    assert best == [{"fraction": 1.0, "seed": 0, "alpha": dev.idxmax()}]
    assert curves.manifest["files"].keys() == {
        "best.json",
        "facts.json",
        "points.json",
        "responses.csv.gz",
    }
    text = "".join(p.read_text(errors="ignore") for p in curves.get().glob("*.json"))
    assert "response_ids" not in text, "no text and no token of the data set is frozen"

    extra = {
        p["id"]: len(p["responses"]["chosen"]) - len(p["responses"]["rejected"]) for p in pairs
    }
    part = stages.subset(cfg, 0.25, seed=0, longest=True)
    kept = [
        json.loads(line)["id"] for line in (part.get() / "pairs.jsonl").read_text().splitlines()
    ]
    assert len(kept) == max(1, round(len(pairs) / 4)) == part.manifest["facts"]["pairs"]
    assert min(extra[i] for i in kept) >= max([extra[i] for i in extra if i not in kept])

    known = set(p.name for p in paths.ARTIFACTS.iterdir())
    wider = plain(fractions=[1.0], alphas={1.0: [0, 2, 3]}, seeds=[0], seed_fractions=[])
    expo.curves(wider).get()
    new = {
        p.name.split("-")[0]
        for p in paths.ARTIFACTS.iterdir()
        if p.name not in known and p.suffix != ".lock"
    }
    assert new <= {"responses", "scores", "curves"}, (
        "one more α samples one more point and trains nothing"
    )

    frozen = artifacts.freeze(curves.key)
    assert sum(f.stat().st_size for f in frozen.iterdir()) < 100_000
    os.rename(paths.ARTIFACTS, store / "gone")
    os.environ["COMPUTE"] = "never"
    try:
        assert curves.csv("responses.csv.gz").equals(table), (
            "a hit on the last stage needs none of those above it"
        )
        with pytest.raises(artifacts.MissingArtifact, match="make reproduce"):
            expo.curves(wider).get()
    finally:
        del os.environ["COMPUTE"]


def test_one_engine_samples_from_all_models_of_a_shape(store):
    """The SFT model, what it was trained from, and back: one process, which says what an engine of
    each alone says.
    """
    cfg = plain()
    start, raw = stages.sft(cfg), stages.model(cfg.world.target)

    def said(model):
        weights = stages.Weights(model)
        answers = stages.responses(cfg, weights, "dev_prompts", samples=2, seed=1)
        shutil.rmtree(paths.ARTIFACTS / answers.key, ignore_errors=True)
        return (answers.get() / "responses.jsonl").read_text()

    first, engine = said(start), workers.living["generate"]
    own = said(raw)
    assert said(start) == first != own and workers.living["generate"] is engine
    settings = {"model": str(raw.get()), "decoding": dataclasses.asdict(cfg.decoding)}
    with launch.Worker("beyond_dpo.jobs.generate", settings, store, desc="alone") as alone:
        prompts = str(stages.texts(cfg.world).get() / "dev_prompts.json")
        alone.call("generate", prompts=prompts, out=str(store / "alone.jsonl"), samples=2, seed=1)
    alone, together = (
        [json.loads(line) for line in text.splitlines()]
        for text in ((store / "alone.jsonl").read_text(), own)
    )
    assert [row["response_ids"] for row in alone] == [row["response_ids"] for row in together]

    changes = {
        "config.json": {"rms_norm_eps": 0.5},
        "generation_config.json": {"eos_token_id": [*range(400)]},
    }
    for file, changed in changes.items():
        engine, other = workers.living["generate"], store / file
        shutil.copytree(raw.get(), other, ignore=shutil.ignore_patterns("manifest.json"))
        (other / file).write_text(json.dumps(json.loads((other / file).read_text()) | changed))
        assert said(stages.model(str(other))) != own and workers.living["generate"] is not engine, (
            "it needs its own"
        )


def test_copying_a_model_can_be_tried_again(store, monkeypatch):
    """An interrupt leaves links to files of a gigabyte; the next attempt ends, and writes into none
    of them.
    """
    source, out = store / "source", store / "out"
    shutil.copytree(assets.model_dir("tiny"), source)
    size = 10**9
    header = json.dumps({"x": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    with open(source / "large.safetensors", "wb") as large:  # which takes no room on the disk
        large.write(len(header).to_bytes(8, "little") + header)
        large.truncate(8 + len(header) + size)
    monkeypatch.setattr(assets, "resolve", lambda ref: {"local": ref})  # without reading all of it
    out.mkdir()
    copy = stages.model(str(source)).make
    copy(out)
    (out / "config.json").unlink()
    for _ in range(2):
        copy(out)
        assert (out / "large.safetensors").samefile(source / "large.safetensors")
        assert not (out / "config.json").samefile(source / "config.json")
        assert {f.name: f.stat().st_size for f in out.iterdir() if f.name[0] != "."} == {
            f.name: f.stat().st_size for f in source.iterdir() if f.name[0] != "."
        }
    assert not [f for f in out.iterdir() if f.name.endswith(f".{os.getpid()}")]


@pytest.mark.parametrize("least", [0, 10])
def test_a_link_replaces_what_is_there_and_changes_no_other_file(tmp_path, least):
    """Twice the same, a link to nowhere, another file, a second name of another file: the target is
    the source.
    """
    source, other, target = (tmp_path / name for name in ("source", "other", "target"))
    source.write_text("new")
    other.write_text("other")
    befores = [
        lambda: None,
        lambda: link_file(source, target, least),
        lambda: target.symlink_to(tmp_path / "gone"),
        lambda: target.symlink_to(source),
        lambda: target.write_text("old"),
        lambda: os.link(other, target),
        lambda: os.link(source, target),
    ]
    for before in befores:
        target.unlink(missing_ok=True)
        before()
        for _ in range(2):
            link_file(source, target, least)
            assert target.read_text() == "new" and not target.is_symlink()
        assert other.read_text() == "other" and len(list(tmp_path.iterdir())) == 3
        assert target.samefile(source) or least
    with pytest.raises(FileNotFoundError):
        link_file(tmp_path / "gone", target)
    assert target.read_text() == "new"


def test_an_engines_shape_is_what_its_files_say_not_how_they_are_written(tmp_path):
    """Other indents, another dtype or origin are one shape; another end token or structure is
    not.
    """
    for name in ("one", "two"):
        shutil.copytree(assets.model_dir("tiny"), tmp_path / name)
    shape, file = stages._shape(str(tmp_path / "one")), tmp_path / "two" / "config.json"
    settings = json.loads(file.read_text())
    about = {
        "torch_dtype": "bfloat16",
        "dtype": "bfloat16",
        "transformers_version": "4.1",
        "_name_or_path": "/x",
    }
    file.write_text(json.dumps(dict(reversed((settings | about).items()))))
    assert stages._shape(str(tmp_path / "two")) == shape
    for changed in ({"rms_norm_eps": 0.5}, {"eos_token_id": 7}, {"tie_word_embeddings": False}):
        file.write_text(json.dumps(settings | changed))
        assert stages._shape(str(tmp_path / "two")) != shape


def test_lines_share_what_is_already_trained():
    """No model of another notebook is trained again, and no line has one model at both ends."""
    cfg = config.load("expo", "cpu")
    trained = {stages.aligned(cfg, f, s).key for f, s in expo.runs(cfg)}
    assert expo.recipes(cfg)["default"].end.key in trained
    assert len({line.end.key for line in expo.recipes(cfg).values()}) == len(expo.recipes(cfg)) == 9
    assert expo.data_quality(cfg)["random"].end.key in trained
    for line in [*expo.wrong_pairs(cfg).values(), *expo.modules(cfg).values()]:
        assert line.start.key != line.end.key
    halves = [line.modules for name, line in expo.modules(cfg).items() if "half" in name]
    assert len(set(halves[0] + halves[1])) == cfg.layers == 30
    whole = expo.modules(cfg)["all"].at(cfg, 2.0, "dev_prompts", 1)
    assert (
        whole.key
        == expo.Line(stages.sft(cfg), stages.aligned(cfg, 1.0), ())
        .at(cfg, 2.0, "dev_prompts", 1)
        .key
    )


def test_a_target_that_needs_no_fine_tuning_is_the_sft_model():
    cfg = config.load("expo", "smoke", world__sft_rows=0)
    assert stages.sft(cfg).key == stages.model(cfg.world.target).key


@pytest.mark.slow
@pytest.mark.parametrize("profile", config.PROFILES)
def test_the_dry_run_names_every_training_of_every_notebook(profile):
    cfg, found = config.load("expo", profile), {}
    for path in plan.find([]):
        nb = nbformat.read(path, as_version=4)
        found[path.stem[:2]] = plan.described(
            nb, plan.parameters(nb, path.stem) | {"profile": profile}
        )
    count = {
        number: sum("beyond_dpo.jobs.train" in line for line in lines)
        for number, lines in found.items()
    }
    sft, models = int(cfg.world.sft_rows > 0), len(expo.runs(cfg))
    assert count["11"] == count["16"] == count["90"] == sft + models
    assert (
        count["12"] == sft + 1
        and count["13"] == sft + 2 + len(cfg.recipes)
        and count["14"] == sft + 3
    )
    assert count["15"] == (5 if sft else 2) and count["17"] == sft + len(cfg.fractions)
    fused = config.load("wrpo", profile)
    start, seeds, losses = (
        int(fused.world.sft_rows > 0) + 1,
        len(fused.seeds),
        len(fused.objectives),
    )
    assert count["31"] == start + seeds * (losses + 2) and count["32"] == start + 2 + 2 * len(
        fused.alphas
    )
    assert (
        count["33"] == start - 1 + 2 * len({*fused.source_sets, fused.sources})
        and count["34"] == start + 2 * losses
    )
    assert count["35"] == start + 2 * seeds + sum(alpha > 0.1 for alpha in fused.alphas)
    assert count["00"] == count["18"] == count["19"] == 0
    published = (
        "8 GPUs" if profile == "paper" else "computes nothing"
    )  # the paper's twelve pairs are sampled from
    assert published in found["18"][0] and "computes nothing" in found["19"][0]
    assert cfg.world.target in found["11"][1] and f"{cfg.needs.hours:g} h" in found["11"][0]
    assert any(f"2 × lr {cfg.train.lr:g}" in line for line in found["13"])


def test_a_finished_reward_model_is_used_as_it_is(store, tiny_reward):
    """With no rows to train it on: measured on the held-out labels, and its scores are those of the
    model itself.
    """
    cfg = plain(world__reward_model=str(tiny_reward), world__reward_rows=0)
    facts = stages.reward(cfg.world, "reward").manifest["facts"]
    assert facts.keys() == {"held_out", "accuracy", "auc"} and facts["held_out"] > 10
    assert not list(stages.reward(cfg.world, "reward").get().glob("*.safetensors")), (
        "no copy of the model"
    )
    weights = stages.Weights(stages.sft(cfg))
    pool = stages.responses(cfg, weights, "dev_prompts", samples=1, seed=1)
    scores = pd.read_json(
        stages.scores(cfg, pool, "dev_prompts").get() / "scores.jsonl", lines=True
    )
    prompts = json.loads((stages.texts(cfg.world).get() / "dev_prompts.json").read_text())
    said = pd.read_json(pool.get() / "responses.jsonl", lines=True)["response_ids"]
    tokenizer = templates.load_tokenizer(str(stages.sft(cfg).get()))
    ids = [p["prompt_ids"] + response for p, response in zip(prompts, said, strict=True)]
    texts = [tokenizer.decode(i, skip_special_tokens=True) for i in ids]
    assert scores["reward"].tolist() == pytest.approx(
        rewards.Classifier(tiny_reward).score(texts), abs=2e-5
    )


def test_lines_of_one_finished_sft_model_are_refused():
    with pytest.raises(
        config.ConfigError, match="profile paper starts from one finished SFT model"
    ):
        expo.wrong_pairs(config.load("expo", "paper", wrong_pairs={}))


def test_published_wrong_pairs_are_lines_of_their_own_tokenizers(store):
    """Two folders as two hub ids: read by the second's tokenizer, walked along as any line, beside
    the right pair.
    """
    tiny = str(assets.model_dir("tiny"))
    moved = store / "moved"
    shutil.copytree(tiny, moved)
    weights = load_file(moved / "model.safetensors")
    save_file(
        {n: w + 0.01 * w.std() for n, w in weights.items()},
        moved / "model.safetensors",
        {"format": "pt"},
    )
    cfg = plain(
        wrong_pairs={"instruct → SFT": [tiny, str(moved)]}, pair_alphas=[0, 1], recipe_fraction=0.5
    )
    lines = expo.wrong_pairs(cfg)
    assert list(lines) == ["SFT → aligned from it", "instruct → SFT"]
    table, texts = (
        expo.sweep(cfg, lines).csv("responses.csv.gz"),
        expo.said(cfg, lines).json("texts.json"),
    )
    assert set(table["model"]) == {"SFT", *lines} and len(texts) == 2 * 2 * len(expo.PROMPTS)
    assert table[table["model"] == "instruct → SFT"]["logratio"].isna().all(), (
        "the world's SFT model does not score it"
    )


def test_a_machine_that_is_too_small_is_told_so_before_anything_starts(store):
    cfg = plain()
    cfg = dataclasses.replace(cfg, needs=dataclasses.replace(cfg.needs, memory_gb=10**6))
    with pytest.raises(
        config.ConfigError, match=r"1000000 GB of memory.*--profile smoke|--dry-run"
    ):
        expo.curves(cfg).get()
    assert not [p for p in paths.ARTIFACTS.iterdir() if p.name.startswith("train-")]
