"""α curves of several models and trainings: gates, choices and effects by hand-made tables."""

import numpy as np
import pandas as pd
import pytest

from beyond_dpo.pipeline.alpha_curves import AlphaCurves, passes_gate

ALPHAS = (0.0, 1.0, 2.0)
PROMPTS = 4


def rows_of(fraction, seed, alpha, gold, reward, *, repetition=0.0, logratio=0.0):
    """Rows of both splits whose values are the same for every prompt."""
    rows = []
    for split in ("dev", "test"):
        for prompt in range(PROMPTS):
            row = {"split": split, "fraction": fraction, "seed": seed, "alpha": alpha}
            row |= {"prompt": prompt, "sample": 0, "gold": gold, "reward": reward}
            row |= {"repetition": repetition, "length": 10 + alpha, "logratio": logratio}
            rows.append(row)
    return rows


GOLD = {  # of (fraction, seed) at each of ALPHAS
    (0.1, 0): (0.4, 0.6, 0.7),
    (0.1, 1): (0.4, 0.5, 0.8),
    (1.0, 0): (0.7, 0.75, 0.3),
    (1.0, 1): (0.6, 0.65, 0.2),
}
# The reward model prefers what is best, but for a repetitive point that it likes too much.
REWARD = {
    (0.1, 0): (1, 2, 3),
    (0.1, 1): (1, 2, 3),
    (1.0, 0): (1, 2, 9),
    (1.0, 1): (1, 2, 0),
}


def curves(repetition=0.2, distinct=0.5):
    """Two models with two trainings each; at (1.0, seed 0, α = 2) responses repeat themselves."""
    rows = rows_of(0.0, 0, 0.0, 0.3, 0.0)
    points = []
    for (fraction, seed), golds in GOLD.items():
        for place, alpha in enumerate(ALPHAS):
            repeats = repetition if (fraction, seed, alpha) == (1.0, 0, 2.0) else 0.0
            reward = REWARD[fraction, seed][place]
            kl = (2.0 if fraction == 1.0 else 1.0) * (1 + alpha)
            rows += rows_of(
                fraction, seed, alpha, golds[place], reward, repetition=repeats, logratio=kl
            )
            points.append({"fraction": fraction, "seed": seed, "alpha": alpha})
    table = pd.DataFrame(rows)
    points = pd.DataFrame([{"fraction": 0.0, "seed": 0, "alpha": 0.0}, *points])
    points["distinct_2"] = np.where(points["fraction"] == 0, 0.8, distinct)
    points = pd.concat([points.assign(split="dev"), points.assign(split="test")])
    return AlphaCurves(table, points, "fraction", 0.0, bootstrap_seed=0)


def test_the_gate_is_closed_by_repetition():
    assert curves().gates(1.0).tolist() == [[True, True, False], [True, True, True]]
    assert curves(repetition=0.05).gates(1.0).all()
    assert curves(repetition=0.051).gates(1.0).sum() == 5


def test_the_gate_is_closed_by_few_distinct_bigrams():
    assert curves(distinct=0.4).gates(0.1).all()
    low = curves(distinct=0.39)
    assert not low.gates(0.1).any()
    assert low.fails(0.1)
    assert not curves().fails(1.0)


def test_the_gate_by_hand():
    assert passes_gate(0.05, 0.4, 0.0, 0.8)
    assert not passes_gate(0.051, 0.4, 0.0, 0.8)
    assert not passes_gate(0.05, 0.39, 0.0, 0.8)
    repetitions = np.array([0.3, 0.4])
    assert passes_gate(repetitions, 0.5, 0.3, 1.0).tolist() == [True, False]


def test_without_dev_prompts_the_gate_is_looked_at_where_all_is_judged():
    whole = curves()
    table = whole.table[whole.table["split"] == "test"]
    points = whole.points[whole.points["split"] == "test"]
    alone = AlphaCurves(table, points, "fraction", 0.0, bootstrap_seed=0, chooses_on="test")
    assert alone.gates(1.0).tolist() == whole.gates(1.0).tolist()
    assert alone.sizes == [PROMPTS, PROMPTS]
    at = alone.estimate(alone.at(1.0, 1.0))
    assert at.value == pytest.approx((0.75 + 0.65) / 2)


def test_alpha_is_chosen_among_points_that_pass():
    """At seed 0 the reward model likes α = 2 best, where responses repeat themselves."""
    choices = curves().choices().set_index(["fraction", "seed"])
    assert choices["alpha"].to_dict() == {(0.1, 0): 2, (0.1, 1): 2, (1.0, 0): 1, (1.0, 1): 1}
    assert choices["largest_passing"].to_dict()[1.0, 0] == 1
    ungated = curves(repetition=0.0).choices().set_index(["fraction", "seed"])
    assert ungated["alpha"][1.0, 0] == 2


def test_a_mean_over_trainings_by_hand():
    estimate = curves().estimate(curves().at(0.1, 1.0))
    assert estimate.value == pytest.approx(0.55)
    assert estimate.trainings == 2
    assert curves().estimate(curves().sft()).value == pytest.approx(0.3)


def test_a_gain_and_its_error_by_hand():
    """0.1 gains 0.3 and 0.4 by its chosen α: mean 0.35, standard error 0.05."""
    measured = curves()
    gain = measured.estimate(measured.chosen(0.1) - measured.at(0.1, 0.0))
    assert gain.value == pytest.approx(0.35)
    assert gain.between_trainings == pytest.approx(0.05)
    assert gain.between_units == pytest.approx(0, abs=1e-12)


def test_a_share_of_a_gain_by_hand():
    """0.1 with ExPO is 0.75, 1.0 is 0.65 and SFT 0.3: (0.75 − 0.65) / (0.65 − 0.3)."""
    measured = curves()
    full = measured.at(1.0, 0.0)
    share = measured.share(measured.chosen(0.1) - full, full - measured.sft())
    assert share.value == pytest.approx(0.1 / 0.35)


def test_lengths_are_taken_at_the_chosen_alpha():
    measured = curves()
    longer = measured.chosen(0.1, "length") - measured.at(0.1, 0.0, "length")
    assert measured.estimate(longer).value == pytest.approx(2)


def test_alpha_shrinks():
    """The chosen α are 2 and 1 for 0.1 and 1.0 in both trainings: a correlation of 1."""
    assert curves().estimate(curves().shrinking()).value == pytest.approx(1)
    same = curves(distinct=0.1)  # nothing passes: α = 0 for all
    assert same.estimate(same.shrinking()).value == 0


def test_reward_at_equal_kl_by_hand():
    """1.0 has KL 2 at α = 0; 0.1 has KL 1, 2 and 3, so α = 1: gold 0.6 and 0.5."""
    measured = curves()
    assert measured.estimate(measured.at_kl_of(0.1, 1.0)).value == pytest.approx(0.55)
    # Beyond the end of a curve it is the end: 0.1 at α = 0 has KL 1, and 1.0 begins at 2.
    assert measured.estimate(measured.at_kl_of(1.0, 0.1)).value == pytest.approx(0.65)


def test_equal_kl_lies_between_two_points():
    measured = curves()
    kl = measured.kl
    measured.kl = lambda model: kl(model) + (0.5 if model == 1.0 else 0.0)
    halfway = np.mean([(0.6 + 0.7) / 2, (0.5 + 0.8) / 2])
    assert measured.estimate(measured.at_kl_of(0.1, 1.0)).value == pytest.approx(halfway)


def test_the_choice_is_made_anew_in_each_draw():
    """Where dev prompts disagree about α, the error holds that, though test prompts all agree."""
    measured = curves()
    rewards = measured._rewards[0.1].copy()
    rewards[:, 2] = np.array([9, -9, 9, -1])  # above the others on average, not in every draw
    measured._rewards[0.1] = rewards
    estimate = measured.estimate(measured.chosen(0.1))
    assert estimate.between_units > 0.01


def test_a_model_without_one_of_its_points_is_refused():
    measured = curves()
    of_dev = measured.table[measured.table["split"] == "dev"]
    table = measured.table.drop(index=of_dev.index[-1])
    with pytest.raises(ValueError, match="lacks points"):
        AlphaCurves(table, measured.points, "fraction", 0.0, bootstrap_seed=0)


def test_the_summary_leaves_out_prompts_without_the_measure():
    """The SFT model scores some of the prompts only: the others have no log-ratio."""
    measured = curves()
    measured.table.loc[measured.table["prompt"] >= 2, "logratio"] = np.nan
    summary = measured.summary("logratio").set_index(["fraction", "alpha"])
    assert summary["mean"][0.1, 1.0] == pytest.approx(2.0)
    assert measured.kl(0.1)[0].tolist() == [1, 2, 3]


def test_the_summary_says_where_the_gate_closes():
    summary = curves().summary("gold").set_index(["fraction", "alpha"])
    assert summary["mean"][1.0, 2.0] == pytest.approx(0.25)
    assert not summary["passes"][1.0, 2.0]
    assert summary["passes"][1.0, 1.0]
    assert (summary["low"] <= summary["mean"]).all()


def test_a_share_to_first_order_is_the_ratio_of_means_with_a_finite_error():
    """Here trainings differ and prompts do not; the error is that of q − r·u over the unit."""
    both = curves()
    gain = both.at(1.0, 0.0) - both.sft()  # 0.4 and 0.3
    small = both.at(0.1, 0.0) - both.sft()  # 0.1 and 0.1
    ratio = 0.1 / 0.35
    share = both.in_units_of(small, gain)
    assert share.value == pytest.approx(ratio)
    residuals = (np.array([0.1, 0.1]) - ratio * np.array([0.4, 0.3])) / 0.35
    assert share.between_trainings == pytest.approx(residuals.std(ddof=1) / np.sqrt(2))
    assert share.between_units == pytest.approx(0.0, abs=1e-9)
    itself = both.in_units_of(gain, gain)
    assert (itself.value, itself.between_trainings) == pytest.approx((1.0, 0.0))


def test_a_unit_that_is_0_in_some_draws_of_prompts_leaves_a_finite_error():
    rows = []
    for model, golds in {"sft": [0, 0, 0, 0], "dpo": [0, 0, 0, 1], "wrpo": [0, 0, 1, 1]}.items():
        for prompt, gold in enumerate(golds):
            row = {"split": "test", "model": model, "seed": 0, "alpha": 0.0, "prompt": prompt}
            rows.append({**row, "gold": gold, "reward": gold, "repetition": 0.0, "logratio": 1.0})
    table = pd.DataFrame(rows)
    points = table.drop_duplicates("model").assign(distinct_2=1.0)
    few = AlphaCurves(table, points, "model", "sft", 0, chooses_on="test")
    gain = few.at("dpo", 0.0) - few.sft()
    share = few.in_units_of(few.at("wrpo", 0.0) - few.sft(), gain)
    assert share.value == pytest.approx(2.0)
    assert np.isfinite(share.between_units)
    with pytest.raises(ValueError, match="mean of 0"):
        few.in_units_of(gain, few.sft())


def test_a_start_is_the_same_for_each_training_of_others():
    whole = curves()
    one = whole.table[(whole.table["fraction"] != 0.1) | (whole.table["seed"] == 0)]
    one = one[(one["fraction"] != 0.1) | (one["alpha"] == 0)]
    with_start = AlphaCurves(
        one,
        whole.points.merge(one[["fraction", "seed", "alpha"]].drop_duplicates()),
        "fraction",
        0.0,
        bootstrap_seed=0,
    )
    lead = with_start.estimate(with_start.at(1.0, 0.0) - with_start.once(0.1))
    assert lead.trainings == 2
    assert lead.value == pytest.approx((0.7 + 0.6) / 2 - 0.4)
    alone = with_start.estimate(with_start.at(1.0, 0.0) - with_start.at(0.1, 0.0))
    assert alone.trainings == 1
    assert with_start.estimate(with_start.sft()).value == pytest.approx(0.3)
