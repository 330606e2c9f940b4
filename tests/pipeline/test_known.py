"""Known dispersion: which c a prompt has, how labels are drawn, and what is judged."""

import dataclasses

import numpy as np
import pytest

from beyond_dpo.pipeline import config, known, stages, weighted

SMOKE = config.load("mallows", "smoke")


def test_c_is_large_for_the_surer_half_or_for_a_random_one():
    entropies = np.array([0.5, 0.1, 0.4, 0.2])
    tied = known.known_c(known.TIED, entropies, (2.0, 0.1), seed=0)
    assert tied.tolist() == [0.1, 2.0, 0.1, 2.0]
    many = np.linspace(0, 1, 400)
    free = known.known_c(known.FREE, many, (2.0, 0.1), seed=0)
    assert (free == 2.0).sum() == 200
    assert abs(np.corrcoef(free, many)[0, 1]) < 0.15
    assert not np.array_equal(free, known.known_c(known.FREE, many, (2.0, 0.1), seed=1))
    with pytest.raises(ValueError, match="'loose'"):
        known.known_c("loose", many, (2.0, 0.1), seed=0)


@pytest.mark.parametrize(
    "c, gap, chance", [(2.0, 3.0, 0.9975), (0.1, 3.0, 0.5744), (1.0, 0.0, 0.5)]
)
def test_labels_are_coins_of_their_chance(c, gap, chance):
    right = known.right_labels(np.full(20_000, c), np.full(20_000, gap), seed=0)
    assert right.mean() == pytest.approx(chance, abs=0.012)


@pytest.fixture(scope="module")
def labelled(store):
    return known.labelled(SMOKE, known.TIED, 0)


def test_labels_turn_the_pairs_around_and_say_so(labelled):
    rows = stages.json_lines(labelled.get() / "pairs.jsonl")
    pairs = stages.json_lines(stages.subset(SMOKE, SMOKE.fraction, 0).get() / "pairs.jsonl")
    table = labelled.csv("labels.csv")
    assert [row["id"] for row in rows] == [row["id"] for row in pairs]
    for row, pair, right in zip(rows, pairs, table["right"], strict=True):
        better = row["responses"]["chosen" if right else "rejected"]
        assert better == pair["responses"]["chosen"]
    assert (table["gap"] > 0).all()
    assert table["c"].tolist() == labelled.json(weighted.AGREEMENT)


def test_tied_c_follow_the_entropies_of_the_reference_pass(labelled):
    table = labelled.csv("labels.csv")
    large = table[table["c"] == 2.0]["entropy"]
    small = table[table["c"] == 0.1]["entropy"]
    assert abs(len(large) - len(small)) <= 1
    assert large.max() <= small.min()
    wanted = stages.reference_values(stages.reference(SMOKE), "entropies").mean(0)
    assert sorted(table["entropy"]) == pytest.approx(sorted(wanted), abs=1e-6)


def test_every_learner_is_judged_at_every_place(store):
    """On test prompts and, as that is set here, on dev prompts: no two of them are one prompt."""
    cfg = dataclasses.replace(SMOKE, judge_dev=True)
    points = known.judged(cfg)
    models, sft = known.measured(cfg, points)
    cells = models.groupby(["kind", "method", "place"]).size()
    assert len(cells) == 2 * len(weighted.LEARNERS) * len(SMOKE.known_alphas)
    assert set(cells) == {SMOKE.world.test_prompts + SMOKE.world.dev_prompts}
    assert set(sft["prompt"]) == set(models["prompt"])
    assert models["gold"].between(0, 1).all()
    assert models["passes"].dtype == bool
    assert models["logratio"].notna().all()
    ends = models[(models["place"] == 0) & (models["kind"] == known.FREE)]
    by_method = {name: rows["logratio"].tolist() for name, rows in ends.groupby("method")}
    assert by_method["DPO"] != by_method["MallowsPO-θ, true"]
    labels = points.csv("labels.csv")
    assert set(labels["kind"]) == set(known.KINDS)


def test_the_world_of_night_is_expos():
    """Prompts, SFT model, pool, its gold reward, pairs and their reference pass are shared."""
    expo = config.load("expo", "night")
    mallows = config.load("mallows", "night")
    for seed in mallows.seeds:
        assert stages.pairs(mallows, seed).key == stages.pairs(expo, seed).key
        ours = stages.reference(mallows, rows=stages.pairs(mallows, seed))
        theirs = stages.reference(expo, rows=stages.pairs(expo, seed))
        assert ours.key == theirs.key
    assert len(mallows.seeds) >= 3
