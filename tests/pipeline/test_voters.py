"""Real voters: how a vote is drawn, what the other raters say of it, and what learns from it."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
from scipy.optimize import check_grad

from beyond_dpo.pipeline import config, stages, voters, weighted

SMOKE = config.load("mallows", "smoke")
SETTINGS = SMOKE.voters


# --- votes


def test_histograms_count_each_rating():
    table = voters.histograms([[-4, 4, 4], [0]])
    assert table.tolist() == [[1, 0, 0, 0, 0, 0, 0, 0, 2], [0, 0, 0, 0, 1, 0, 0, 0, 0]]


def test_agreement_by_hand():
    """Of 19 raters who all agree: ln((19 + ½) / ½); of a split, none; on either side the same."""
    found = voters.agreement_of([1.0, 0.0, 0.5, 0.75], [19, 19, 7, 9])
    even = np.log((9 * 0.75 + 0.5) / (9 * 0.25 + 0.5))
    assert found == pytest.approx([np.log(39), np.log(39), 0, even])


def votes_on(first: list[int], second: list[int], seed: int = 0) -> voters.Votes:
    """Return the vote on one pair of sentences with these ratings."""
    counts = voters.histograms([first, second])
    generator = np.random.default_rng(seed)
    return voters.vote(counts, np.array([0]), np.array([1]), generator)


def test_a_vote_is_one_rating_against_one_and_the_others_are_without_them():
    """The first sentence has 4, 4, 1 and the second 2, 2: 4 wins, and 1 loses."""
    seen = set()
    for seed in range(30):
        votes = votes_on([4, 4, 1], [2, 2], seed)
        won = votes.chosen[0] == 0
        others = [4, 1] if won else [4, 4]
        share = np.mean([rating > 2 for rating in others])
        gap = np.mean(others) - 2
        assert votes.share[0] == pytest.approx(share if won else 1 - share)
        assert votes.gap[0] == pytest.approx(gap if won else -gap)
        raters = 1  # of the second sentence, who are fewer
        assert votes.agreement[0] == pytest.approx(voters.agreement_of(share, raters))
        seen.add(bool(won))
    assert seen == {True, False}


def test_equal_ratings_are_no_vote():
    assert len(votes_on([1, 1], [1, 1]).chosen) == 0


def test_ties_of_the_other_raters_are_half():
    votes = votes_on([3, 3], [-1, 3], seed=0)
    seeds = [votes_on([3, 3], [-1, 3], seed) for seed in range(20)]
    decided = [votes for votes in seeds if len(votes.chosen)]
    assert decided
    for votes in decided:  # −1 was drawn, so that 3 is left against 3
        assert votes.share[0] == 0.5
        assert votes.agreement[0] == 0


def test_labels_follow_the_crowd_as_often_as_the_other_raters_say():
    """Where the others agree the vote is theirs almost always, where they do not it is a coin."""
    generator = np.random.default_rng(0)
    means = generator.normal(0, 1.5, size=400)
    ratings = []
    for mean in means:
        values = np.clip(np.round(generator.normal(mean, 1.2, size=20)), -4, 4)
        ratings.append(values.astype(int).tolist())
    votes = voters.candidates(voters.histograms(ratings), np.random.default_rng(1))
    assert len(votes.share) > 3000
    clear = np.maximum(votes.share, 1 - votes.share) >= 0.95
    split = np.maximum(votes.share, 1 - votes.share) <= 0.6
    assert (votes.share[clear] > 0.5).mean() > 0.93
    assert abs((votes.share[split] > 0.5).mean() - 0.5) < 0.08
    assert np.corrcoef(votes.share, votes.gap)[0, 1] > 0.8


def many_votes(pairs: int = 2000) -> voters.Votes:
    """Return votes with every share from 0 to 1, and gaps that follow them."""
    generator = np.random.default_rng(0)
    share = generator.uniform(size=pairs)
    gap = 4 * (share - 0.5) + generator.normal(0, 0.3, size=pairs)
    places = np.arange(pairs)
    return voters.Votes(places, places + pairs, share, gap, voters.agreement_of(share, 20))


def test_a_mixture_has_its_share_of_contested_pairs():
    settings = dataclasses.replace(SETTINGS, agreed=0.95, contested=0.6)
    mixed = voters.mixture(many_votes(), 40, 0.25, settings)
    majority = np.maximum(mixed.share, 1 - mixed.share)
    assert (majority <= 0.6).sum() == 10
    assert (majority >= 0.95).sum() == 30
    assert (np.diff(mixed.chosen) > 0).all(), "in the order in which they were drawn"


def test_pairs_at_equal_gap_differ_in_agreement_alone():
    settings = dataclasses.replace(SETTINGS, gap=(0.8, 1.2), outer=0.25)
    votes = voters.equal_gap(many_votes(), 60, settings)
    distance = np.abs(votes.gap)
    assert distance.min() >= 0.8
    assert distance.max() <= 1.2
    order = np.argsort(votes.agreement)
    least, most = distance[order[:30]], distance[order[30:]]
    assert votes.agreement[order[30:]].min() > votes.agreement[order[:30]].max()
    assert abs(least.mean() - most.mean()) < 0.03


def test_too_few_pairs_are_refused():
    settings = dataclasses.replace(SETTINGS, agreed=0.999, contested=0.6)
    with pytest.raises(config.ConfigError, match="only .* clear and .* contested pairs for 400"):
        voters.mixture(many_votes(), 400, 0.5, settings)
    settings = dataclasses.replace(SETTINGS, gap=(9.0, 9.1))
    with pytest.raises(config.ConfigError, match="wider voters.agreed"):
        voters.equal_gap(many_votes(), 4, settings)


def test_a_split_shares_no_sentence_and_differs_by_seed():
    parts = voters.split(100, SETTINGS, 0)
    assert sorted(np.concatenate(parts)) == list(range(100))
    assert len(parts.dev) == SETTINGS.dev
    assert len(parts.test) == SETTINGS.test
    assert set(parts.test) != set(voters.split(100, SETTINGS, 1).test)
    with pytest.raises(config.ConfigError, match="too few are left"):
        voters.split(SETTINGS.dev + SETTINGS.test + 3, SETTINGS, 0)


# --- weights


def test_weights_have_mean_1_and_a_least():
    found = weighted.of_agreement([0.0, 1.0, 3.0])
    assert found == pytest.approx([weighted.LEAST, 0.75, 2.25])


@pytest.mark.parametrize("bad", [[-1.0, 2.0], [0.0, 0.0], [np.nan, 1.0]])
def test_an_agreement_that_is_none_is_refused(bad):
    with pytest.raises(ValueError):
        weighted.of_agreement(bad)


def test_an_unknown_quality_is_refused():
    with pytest.raises(ValueError, match="'guessed'"):
        weighted.weighted(voters.pairs(SMOKE, voters.MIXED, 0), "guessed", 0)


def test_rows_bring_their_weights_along(store):
    pairs = voters.pairs(SMOKE, voters.MIXED, 0)
    true = weighted.weighted(pairs, "true", 0)
    shuffled = weighted.weighted(pairs, "shuffled", 0)
    rows = {a: stages.json_lines(a.get() / "pairs.jsonl") for a in (pairs, true, shuffled)}
    wanted = weighted.of_agreement(pairs.json(weighted.AGREEMENT))
    assert [row.pop("weight") for row in rows[true]] == pytest.approx(wanted)
    dealt = [row.pop("weight") for row in rows[shuffled]]
    assert sorted(dealt) == pytest.approx(sorted(wanted))
    assert rows[true] == rows[shuffled] == rows[pairs]
    other = weighted.weighted(pairs, "shuffled", 1)
    assert other.key != shuffled.key
    assert weighted.weighted(pairs, "true", 1).key == true.key


def test_learners_share_rows_and_reference_pass():
    pairs = voters.pairs(SMOKE, voters.MIXED, 0)
    models = {name: weighted.trained(SMOKE, pairs, name, 0) for name in weighted.LEARNERS}
    assert len({model.key for model in models.values()}) == len(models) == 5
    assert len({model.inputs["reference"].key for model in models.values()}) == 1
    for name in ("DPO", "MallowsPO-θ, entropy", "MallowsPO-φ, entropy"):
        assert models[name].inputs["rows"].key == pairs.key


# --- language models


@pytest.fixture(scope="module")
def learnt(store):
    return voters.learnt(SMOKE)


def test_every_learner_scores_every_held_out_sentence(learnt):
    table = learnt.csv("scores.csv.gz")
    assert len(table) == len(voters.LEARNERS) * SETTINGS.test
    learners = list(weighted.LEARNERS)
    for kind, named in voters.LEARNERS.items():
        present = table[table["kind"] == kind].notna().all()
        assert [name for name in learners if present[name]] == list(named)
    table = table[table["kind"] == voters.MIXED]
    assert list(table.columns) == ["kind", "seed", "sentence", "crowd", *learners]
    assert (table[learners].nunique() > 1).all()
    assert not np.allclose(table["MallowsPO-θ, true"], table["DPO"])
    assert not np.allclose(table["MallowsPO-θ, true"], table["MallowsPO-θ, shuffled"])


def test_votes_hold_numbers_of_the_pairs_alone(learnt):
    votes = learnt.csv("votes.csv")
    assert len(votes) == len(voters.LEARNERS) * SETTINGS.pairs
    assert votes.groupby(["kind", "seed"])["entropy"].mean().to_numpy() == pytest.approx(
        1, abs=1e-4
    )
    assert votes["share"].between(0, 1).all()


def test_no_held_out_sentence_is_voted_on(store):
    said = stages.json_lines(voters.held_out(SMOKE).get() / "pairs.jsonl")
    held_out = {tuple(row["responses"]["said"]) for row in said}
    for kind in voters.LEARNERS:
        for row in stages.json_lines(voters.pairs(SMOKE, kind, 0).get() / "pairs.jsonl"):
            assert not held_out & {tuple(ids) for ids in row["responses"].values()}


def scores(shift: float) -> pd.DataFrame:
    """Return the scores of two learners and three trainings; the second's are noise but `shift`."""
    generator = np.random.default_rng(0)
    crowd = generator.normal(size=300)
    frames = []
    for seed in range(3):
        table = pd.DataFrame(
            {"kind": "mixed", "seed": seed, "sentence": range(300), "crowd": crowd}
        )
        table["DPO"] = generator.normal(size=300)
        table["other"] = table["DPO"] + shift * crowd
        frames.append(table)
    return pd.concat(frames)


def test_ahead_is_the_difference_of_correlations():
    table = scores(1.0)
    found = voters.ahead(table, "mixed", "other", seed=0)
    own = voters.follows(table, "mixed", "other", seed=0)
    wanted = []
    for _, rows in table.groupby("seed"):
        correlation = rows[["crowd", "DPO", "other"]].corr()["crowd"]
        wanted.append(correlation["other"] - correlation["DPO"])
    assert found.value == pytest.approx(np.mean(wanted))
    assert own.value > 0.6
    assert found.low > 0.3
    assert found.trainings == 3
    assert voters.ahead(table, "mixed", "DPO", seed=0).value == 0


# --- the linear model


def test_the_linear_fit_is_a_minimum_by_its_gradient():
    generator = np.random.default_rng(0)
    differences = generator.normal(size=(30, 4))
    weights = generator.uniform(0.1, 2, size=30)
    v = voters.fit(differences, weights, 0.1)

    def loss(at):
        s = weights * (differences @ at)
        return np.logaddexp(0, -s).mean() + 0.05 * at @ at

    def gradient(at):
        return np.array([(loss(at + h) - loss(at - h)) / 2e-6 for h in 1e-6 * np.eye(4)])

    assert np.abs(gradient(v)).max() < 1e-5
    assert check_grad(loss, gradient, v) < 1e-5


def test_weights_of_the_linear_model_decide_whom_it_follows():
    """Two votes against each other, on one feature: the heavier one wins."""
    differences = np.array([[1.0], [-1.0]])
    assert voters.fit(differences, np.array([2.0, 0.1]), 0.01)[0] > 0.1
    assert voters.fit(differences, np.array([0.1, 2.0]), 0.01)[0] < -0.1
    assert voters.fit(differences, np.ones(2), 0.01)[0] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("with_entropy", [False, True])
def test_linear_models_of_every_cell(store, with_entropy):
    table = voters.linear(SMOKE, with_entropy).csv("correlations.csv")
    cells = ["kind", "contested", "pairs", "penalty", "seed"]
    assert len(table) == 2 * 2 * SETTINGS.linear_seeds
    assert not table.duplicated(cells).any()
    learners = voters.LINEAR_ENTROPY if with_entropy else voters.LINEAR
    assert list(table.columns) == [*cells, "dev", *learners]
    assert table[list(learners)].abs().max(axis=None) <= 1


def test_without_entropies_no_model_is_asked():
    upstream = voters.linear(SMOKE).upstream
    assert {artifact.stage for artifact in upstream.values()} == {"linear-votes"}
    with_entropy = voters.linear(SMOKE, True).upstream
    assert "reference" in {artifact.stage for artifact in with_entropy.values()}


def test_the_penalty_is_the_one_with_which_dpo_does_best_on_dev_sentences():
    table = pd.DataFrame(
        {
            "kind": "mixed",
            "penalty": [0.1, 0.1, 1.0, 1.0],
            "dev": [0.2, 0.4, 0.9, 0.0],
            "DPO": [1, 2, 3, 4],
        }
    )
    assert voters.chosen_penalty(table, kind="mixed")["DPO"].tolist() == [3, 4]
    with pytest.raises(ValueError, match="no row"):
        voters.chosen_penalty(table, kind="other")
