"""MallowsPO's experiments: the bandit's published numbers, weights, raters, and a real frontier."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch

from beyond_dpo import dispersion
from beyond_dpo.losses import mallows_link
from beyond_dpo.notebook import report
from beyond_dpo.pipeline import config, mallows, stages

SMOKE = config.load("mallows", "smoke", betas=[0.1], methods=["dpo", "mallows_phi"])


# --- the bandit


@pytest.fixture(scope="module")
def bandit_runs(store):
    return mallows.bandits(config.load("mallows", "cpu")).csv("runs.csv.gz")


@pytest.fixture(scope="module")
def bandit_ends(bandit_runs):
    """Return where each (method, β) ends."""
    ends = bandit_runs[bandit_runs["step"] == 500_000]
    return ends.set_index(["method", "beta"])


def test_the_bandit_is_recorded_from_its_start_to_its_end(bandit_runs):
    assert bandit_runs["step"].min() == 0
    assert bandit_runs["step"].max() == 500_000
    assert bandit_runs.groupby(["method", "beta"]).ngroups == 2 * 20
    start = bandit_runs[bandit_runs["step"] == 0]
    assert start["reward"].to_numpy() == pytest.approx(12.896)
    assert (start["kl"] == 0).all()


@pytest.mark.parametrize(
    "method, beta, reward, kl",
    [("MallowsPO-φ", 0.02, 15.995, 0.76), ("DPO", 0.3, 15.59, 1.22)],
)
def test_the_bandits_reward_and_kl_are_those_of_figures_8a_and_8b(
    bandit_ends, method, beta, reward, kl
):
    """As read off, within 0.01."""
    end = bandit_ends.loc[(method, beta)]
    assert end["reward"] == pytest.approx(reward, abs=0.01)
    assert end["kl"] == pytest.approx(kl, abs=0.01)


def test_the_bandits_policies_are_those_of_figure_9(bandit_ends):
    """As read off, within 0.02 in probability."""
    published = report.published("mallows_fig9_readoff")
    assert len(published)
    for row in published.itertuples():
        method = row.method.replace("-phi", "-φ")
        end = bandit_ends.loc[(method, row.beta)]
        wanted = [row.arm1, row.arm2, row.arm3, row.arm4, row.arm5]
        assert end[mallows.ARMS].tolist() == pytest.approx(wanted, abs=0.02)


def test_the_drawn_link_is_the_loss():
    s = np.linspace(-3, 3, 7)
    wanted = mallows_link(torch.tensor(s), torch.full((7,), 0.3), 0.2)
    assert mallows.link(s, 0.3, 0.2) == pytest.approx(wanted.numpy(), rel=1e-6)


# --- the contextual bandit


@pytest.fixture(scope="module")
def contextual_artifact(store):
    artifact = mallows.contextual(SMOKE)
    artifact.get()
    return artifact


@pytest.fixture(scope="module")
def contextual_gains(contextual_artifact):
    return contextual_artifact.csv("gains.csv.gz")


def test_every_contextual_bandit_is_measured_for_every_learner(contextual_gains):
    """Three worlds of two spreads, two numbers of pairs, three of steps and three seeds.

    The first world's end is measured at two other KL.
    """
    cells = ["world", "spread", "pairs", "steps", "kl", "seed"]
    learners = contextual_gains.columns.drop(cells)
    assert not contextual_gains.duplicated(cells).any()
    assert len(contextual_gains) == 2 * 2 * 3 * (3 * 3 + 2)
    assert contextual_gains["seed"].min() == 1000
    assert len(learners) == 2 + 2 * 5
    assert contextual_gains[learners].abs().max(axis=None) < 2  # of the best arm everywhere


def test_without_spread_true_and_shuffled_weights_are_none(contextual_gains):
    flat = contextual_gains[contextual_gains["spread"] == 0]
    for quality in ("true", "shuffled"):
        assert (flat[f"MallowsPO-θ, {quality}"] == flat["DPO"]).all()
        assert (flat[f"MallowsPO-φ, {quality}"] == flat["MallowsPO-φ, constant"]).all()
    assert (flat["MallowsPO-θ, noise 1"] != flat["DPO"]).any()


def test_the_identities_of_the_contextual_bandit_hold(contextual_artifact):
    missed = contextual_artifact.manifest["facts"]
    assert set(missed) == {"constant_phi", "theta_finds", "phi_finds"}
    assert max(missed.values()) < 1e-8


def test_ahead_is_the_mean_over_the_seeds_of_a_cell(contextual_gains):
    cell = {"world": "Mallows", "spread": 1, "pairs": 400, "steps": 100, "kl": 0.5}
    found = mallows.ahead(contextual_gains, "MallowsPO-θ, true", **cell)
    rows = contextual_gains
    for column, value in cell.items():
        rows = rows[rows[column] == value]
    assert found.value == pytest.approx((rows["MallowsPO-θ, true"] - rows["DPO"]).mean())
    assert found.trainings == 3
    cell["world"] = "Borda"
    with pytest.raises(ValueError, match="leaves 0 rows"):
        mallows.ahead(contextual_gains, "DPO", **cell)
    del cell["world"]
    with pytest.raises(ValueError, match="not one of each seed"):
        mallows.ahead(contextual_gains, "DPO", **cell)


def gains_of(means: list[float]) -> pd.DataFrame:
    """Return the gains of four seeds that have these means over DPO at noise 0, 1 and 2."""
    table = pd.DataFrame({"seed": range(4), "DPO": [1.0, 1.1, 1.2, 1.3]})
    for quality, mean in zip(["true", "noise 1", "noise 2"], means, strict=True):
        table[f"MallowsPO-θ, {quality}"] = table["DPO"] + mean
    return table


@pytest.mark.parametrize(
    "means, noise",
    [([0.03, 0.01, -0.03], 1.25), ([0.2, -0.2, 0.1], 0.5), ([-0.1, 0, 0], 0), ([0.3, 0.2, 0.1], 2)],
)
def test_break_even_by_hand(means, noise):
    """Where the line between the last gain above 0 and the first below crosses 0."""
    found = mallows.break_even(gains_of(means), "MallowsPO-θ", [1.0, 2.0], seed=0)
    assert found == pytest.approx((noise, noise, noise))


# --- the dispersion of prompts


def test_weights_of_the_pairs_are_those_of_the_reference_pass(store):
    artifact = mallows.dispersed(SMOKE)
    table = artifact.csv("dispersion.csv")
    weight = table["weight"]
    assert weight.mean() == pytest.approx(1, abs=1e-6)
    assert (weight > 0).all()
    wanted, scale = dispersion.weights(table["chosen"], table["rejected"], table.index)
    assert weight.to_numpy() == pytest.approx(wanted, rel=1e-3)
    facts = artifact.manifest["facts"]
    assert facts["phi_star"] == pytest.approx(scale, rel=1e-3)
    assert artifact.manifest["inputs"]["reference"] == stages.reference(SMOKE).key


def test_raters_hold_numbers_only(store):
    table = mallows.raters(SMOKE).csv("raters.csv")
    assert list(table) == ["entropy", "tokens", "people", "sd", "split", "strength"]
    assert len(table) == 12
    assert table.dtypes.map(pd.api.types.is_numeric_dtype).all()


def test_raters_are_the_people_of_the_sentences(store):
    raters = mallows.raters(SMOKE)
    table = raters.csv("raters.csv")
    deviations = set()
    for _, ratings in mallows.rated("fixtures"):
        deviation = np.std(ratings)
        deviations.add(round(float(deviation), 6))
    assert set(table["sd"]) <= deviations
    assert set(table["split"]) <= {0.0, 0.5}
    assert (table["people"] == 2).all()


def test_raters_have_the_entropy_of_a_continuation(store):
    table = mallows.raters(SMOKE).csv("raters.csv")
    assert table["entropy"].between(0, 1).all()
    assert (table["tokens"] >= 4).all()


@pytest.mark.parametrize(
    "source, size, fewest, most",
    [("movie", 10605, 15, 29), ("amazon", 3708, 20, 20)],
)
def test_rated_sentences(source, size, fewest, most):
    """Of Hutto & Gilbert 2014."""
    sentences = mallows.rated(source)
    people = [len(ratings) for _, ratings in sentences]
    assert len(sentences) == size
    assert min(people) == fewest
    assert max(people) == most
    for text, ratings in sentences:
        assert text.strip()
        assert min(ratings) >= -4
        assert max(ratings) <= 4


def test_a_source_without_ratings_is_refused():
    with pytest.raises(config.ConfigError, match="'imdb2' has no reader"):
        mallows.rated("imdb2")


@pytest.mark.parametrize("experiment", [mallows.dispersed, mallows.raters])
def test_a_machine_that_is_too_small_is_told_before_the_reference_pass(
    experiment, monkeypatch, tmp_path
):
    def lacks(cfg):
        raise config.ConfigError("too small")

    def computes(*arguments, **options):
        pytest.fail("it computes")

    monkeypatch.setattr(mallows.needs, "check", lacks)
    monkeypatch.setattr(stages.workers, "run", computes)
    with pytest.raises(config.ConfigError, match="too small"):
        experiment(SMOKE).make(tmp_path)


# --- what is trained


@pytest.fixture(scope="module")
def judged(store):
    """Return the table of the frontier."""
    return mallows.frontier(SMOKE).csv("responses.csv.gz")


def logratios(judged, loss, part):
    rows = judged[(judged["loss"] == loss) & (judged["part"] == part)]
    return rows["logratio"].tolist()


def test_a_frontier_is_judged_at_every_part_and_sft_once(judged):
    places = judged.groupby(["loss", "part"]).size()
    assert places.to_dict() == {
        ("sft", "end"): 6,
        ("dpo", "part1"): 6,
        ("dpo", "end"): 6,
        ("mallows_phi", "part1"): 6,
        ("mallows_phi", "end"): 6,
    }
    assert judged[["gold", "vader", "logratio"]].notna().all(axis=None)


def test_a_frontier_holds_no_text_and_no_token(judged):
    assert not {"prompt_ids", "response_ids", "text", "id"} & set(judged.columns)


def test_a_frontiers_models_differ_by_loss_and_part(judged):
    end = logratios(judged, "dpo", "end")
    assert end != logratios(judged, "dpo", "part1")
    assert end != logratios(judged, "mallows_phi", "end")


def test_a_frontiers_sft_model_does_not_diverge_from_itself(judged):
    sft = logratios(judged, "sft", "end")
    assert np.abs(sft).max() < 0.02, "but for rounding the same"


def trained(artifact):
    """Return the keys of the trainings that a result is made from."""
    return {key for key in artifact.upstream if key.startswith("train")}


def test_the_same_training_is_done_once_for_all_tables():
    """A cell of the grid at the frontier's β and learning rate is the frontier's own model."""
    cfg = config.load("mallows", "cpu")
    along = trained(mallows.frontier(cfg))
    ends = trained(mallows.plug_in(cfg))
    assert len(along) == 1 + 27
    assert len(ends) == 1 + 4 + 12
    assert len(along | ends) == 1 + 27 + 4 + 6


def test_the_weights_are_of_the_reference_pass_that_trainings_share():
    cfg = config.load("mallows", "cpu")
    reference = stages.reference(cfg).key
    assert reference in mallows.dispersed(cfg).upstream
    assert reference in mallows.frontier(cfg).upstream


# --- prompts from elsewhere


def test_prompts_from_elsewhere(store):
    rows = mallows.elsewhere(SMOKE, "fixtures").json("fixtures.json")
    low, high = SMOKE.world.prompt_tokens
    lengths = [len(row["prompt_ids"]) for row in rows]
    assert len(rows) == 6
    assert min(lengths) >= low
    assert max(lengths) <= high


def test_too_few_prompts_from_elsewhere_are_refused(store):
    cfg = dataclasses.replace(SMOKE, elsewhere_prompts=500)
    with pytest.raises(config.ConfigError, match="elsewhere_prompts=500, but fixtures has only"):
        mallows.elsewhere(cfg, "fixtures").get()


# --- the paper's settings


@pytest.fixture
def paper(monkeypatch):
    """Load experiments of profile paper without asking the hub."""
    monkeypatch.setenv("COMPUTE", "plan")

    def load(experiment):
        return config.load("mallows", "paper", experiment)

    return load


def test_paper_settings_of_controlled_sentiment(paper):
    cfg = paper("")
    train = cfg.train
    assert cfg.world.target == "openai-community/gpt2-large"
    assert train.optimizer == "rmsprop"
    assert train.lr == 1e-6
    assert train.global_batch == 64
    assert round(train.warmup * 391) == 150


def test_paper_settings_of_hh(paper):
    cfg = paper("hh")
    train = cfg.train
    assert cfg.world.target == "EleutherAI/pythia-2.8b"
    assert cfg.world.dataset == "Anthropic/hh-rlhf"
    assert train.optimizer == "rmsprop"
    assert train.lr == 1e-6
    assert train.global_batch == 32
    assert cfg.grid_betas == (0.1, 0.5)
    assert cfg.elsewhere == ("stanfordnlp/SHP", "HuggingFaceH4/stack-exchange-preferences")


def test_paper_settings_of_table_6(paper):
    cfg = paper("llama3")
    published = report.published("mallows_table6_beta_lr")
    cells = {(beta, lr) for beta in cfg.grid_betas for lr in cfg.grid_lrs}
    wanted = zip(published["beta"], published["lr"], strict=True)
    assert cells == set(wanted)


def test_paper_settings_of_table_1(paper):
    cfg = paper("llama3")
    published = report.published("mallows_table1_plug_in")
    assert len(published)
    for row in published.itertuples():
        loss = row.base_method.lower()
        own = cfg.plug_ins[loss]
        settings = {"lr": cfg.train.lr, **own}
        assert settings["beta"] == row.beta
        assert settings["lr"] == row.lr


def test_paper_plug_ins_are_trained_on_eight_gpus(paper):
    cfg = paper("llama3")
    upstream = mallows.plug_in(cfg).upstream
    works = "\n".join(artifact.does for artifact in upstream.values())
    assert "MALLOWS_SIMPO" in works
    assert "--num_accelerators 8" in works


def test_an_unknown_experiment_is_refused_with_the_nearest_one(paper):
    message = "unknown experiment 'lama3'; did you mean 'llama3'"
    with pytest.raises(config.ConfigError, match=message):
        paper("lama3")


# --- curves at equal x


def curves(shift=0.0, noise=0.0, reach=3.0):
    """Return curves "a" and "b", y = x − 0.1 x² (+ shift for "a"), at five places each.

    There are four prompts, which differ by a constant; "a" reaches x = `reach`, "b" 4.
    """
    rng = np.random.default_rng(0)
    rows = []
    for method, offset, end in (("a", shift, reach), ("b", 0.0, 4.0)):
        for place, x in enumerate(np.linspace(0, end, 5)):
            for prompt in range(4):
                y = x - 0.1 * x**2 + offset + prompt + noise * rng.normal()
                rows.append((method, place, prompt, x, y))
    table = pd.DataFrame(rows, columns=["method", "place", "prompt", "x", "y"])
    table["seed"] = 0
    return table


def gap(table, pair=("a", "b")):
    return mallows.gap_at_equal(table, "x", "y", "method", pair, seed=0)


def test_curves_that_differ_by_a_constant_differ_by_it_at_every_x():
    """Whatever places they were measured at."""
    assert gap(curves(0.5)) == pytest.approx((0.5, 0.5, 0.5))
    assert gap(curves(0.5), ("b", "a")) == pytest.approx((-0.5, -0.5, -0.5))


def saturating(x):
    return x / (x + 3)


def exponential(x):
    return 1 - np.exp(-x / 4)


@pytest.mark.parametrize("curve", [np.sqrt, saturating, exponential])
def test_one_curve_that_is_no_parabola_has_no_gap_to_itself(curve):
    """Also where one of the two reaches half as far."""
    table = curves(reach=2)
    table["y"] = curve(table["x"])
    mean, _, _ = gap(table)
    assert abs(mean) < 0.01 * curve(4)


def test_a_gap_of_noisy_curves_lies_within_its_interval():
    noisy = curves(0.5, noise=0.2)
    mean, low, high = gap(noisy)
    assert low < mean < high
    assert abs(mean - 0.5) < 0.3


def test_gaps_are_averaged_over_seeds_which_may_lie_elsewhere():
    other = curves(0.1)
    other["seed"] = 1
    other["y"] += 7
    both = pd.concat([curves(0.5), other])
    assert gap(both) == pytest.approx((0.3, 0.3, 0.3))


def test_curves_that_share_no_x_are_refused():
    table = curves()
    table.loc[table["method"] == "a", "x"] += 9
    with pytest.raises(ValueError, match="a range of x in common"):
        gap(table)


def test_curves_of_two_places_are_refused():
    two_places = curves().query("place < 2")
    with pytest.raises(ValueError, match="three places each"):
        gap(two_places)


def test_curves_of_different_prompts_are_refused():
    first_place_of_three = curves().query("prompt < 3 or place > 0")
    with pytest.raises(ValueError, match="all prompts"):
        gap(first_place_of_three)
