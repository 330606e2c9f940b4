"""Rewards at equal KL: by hand, and how often the interval holds the truth."""

import numpy as np
import pandas as pd
import pytest

from beyond_dpo.pipeline import equal_kl

PAIR = ("theta", "dpo")
REACH = {"theta": (1, 4, 9), "dpo": (2, 5, 8)}  # KL at the places of each method


def curves(lead: float = 0.1, seeds: int = 2, prompts: int = 4) -> pd.DataFrame:
    """Return curves 0.3 + 0.1 √KL (+ lead for theta); prompts differ by a constant that cancels."""
    rows = []
    for seed in range(seeds):
        for method, reach in REACH.items():
            for place, x in enumerate(reach):
                for prompt in range(prompts):
                    y = 0.3 + 0.1 * np.sqrt(x) + lead * (method == "theta")
                    rows.append([seed, method, place, prompt, x, y + prompt - 1.5])
    columns = ["seed", "method", "place", "prompt", "logratio", "gold"]
    return pd.DataFrame(rows, columns=columns)


def test_curves_that_differ_by_a_constant_differ_by_it():
    found = equal_kl.lead(curves(), PAIR, seed=0)
    assert found.value == pytest.approx(0.1)
    assert found.trainings == 2
    other = equal_kl.lead(curves(), PAIR[::-1], seed=0)
    assert other.value == pytest.approx(-0.1)


def test_the_mean_over_trainings_of_different_leads():
    first = curves(0.1, seeds=1)
    second = curves(0.3, seeds=1).assign(seed=1)
    found = equal_kl.lead(pd.concat([first, second]), PAIR, seed=0)
    assert found.value == pytest.approx(0.2)
    assert found.between_trainings == pytest.approx(0.1)


def test_a_share_of_the_gain_by_hand():
    """Both reach KL 2 to 8; in the middle, 5, DPO is at 0.3 + 0.1 √5, the SFT model at 0.2."""
    sft = pd.DataFrame({"prompt": range(4), "gold": 0.2 + np.arange(4) - 1.5})
    found = equal_kl.share_of_gain(curves(), PAIR, sft, seed=0)
    assert found.value == pytest.approx(0.1 / (0.1 + 0.1 * np.sqrt(5)))
    with pytest.raises(ValueError, match="3 prompts of the SFT model"):
        equal_kl.share_of_gain(curves(), PAIR, sft[:3], seed=0)


def test_there_is_no_share_of_no_gain():
    table = curves(0.0).assign(gold=0.5)
    sft = pd.DataFrame({"prompt": range(4), "gold": 0.5})
    with pytest.raises(ValueError, match="dpo gains nothing"):
        equal_kl.share_of_gain(table, PAIR, sft, seed=0)


def far_apart(table):
    table.loc[table["method"] == "theta", "logratio"] += 50
    return table


@pytest.mark.parametrize(
    "change",
    [
        far_apart,
        lambda table: table[table["place"] == 0],
        lambda table: table[(table["place"] > 0) | (table["prompt"] > 0)],
        lambda table: table[table["method"] == "dpo"],
    ],
    ids=["no range in common", "one place", "a prompt is missing", "one method"],
)
def test_curves_that_cannot_be_compared_are_refused(change):
    with pytest.raises(ValueError, match="curves need 2 places"):
        equal_kl.lead(change(curves()), PAIR, seed=0)


def simulated(generator, truth: float, concave: bool) -> pd.DataFrame:
    """Draw three trainings of both methods on 40 prompts, three places each.

    The reward is a + b √KL, or bends down further out. Of each place prompts, trainings and
    responses are noise; the lead of a training varies by 0.03 around the truth.
    """
    rows = []
    prompts = np.arange(40)
    of_prompt = generator.normal(0, 0.2, size=40)
    for seed in range(3):
        own = generator.normal(0, 0.03)
        for method in PAIR:
            for place, x in enumerate((1.0, 4.0, 9.0)):
                x = x * generator.uniform(0.8, 1.25)
                y = 0.3 + 0.1 * np.sqrt(x) - 0.004 * concave * x
                y += (truth + own) * (method == "theta")
                table = pd.DataFrame({"prompt": prompts})
                table["gold"] = y + of_prompt + generator.normal(0, 0.3, size=40)
                table["logratio"] = x + generator.normal(0, 2, size=40)
                rows.append(table.assign(seed=seed, method=method, place=place))
    return pd.concat(rows)


@pytest.mark.slow
@pytest.mark.parametrize("concave", [False, True])
def test_the_interval_holds_the_truth_as_often_as_it_says(concave):
    """95 % of simulated experiments, within the error of 100 of them; it is not needlessly wide."""
    generator = np.random.default_rng(0)
    held = []
    errors = []
    widths = []
    for number in range(100):
        table = simulated(generator, 0.05, concave)
        found = equal_kl.lead(table, PAIR, seed=number)
        held.append(found.low <= 0.05 <= found.high)
        errors.append(found.value - 0.05)
        widths.append(found.high - found.low)
    assert np.mean(held) > 0.9
    assert abs(np.mean(errors)) < 3 * np.std(errors) / np.sqrt(len(errors)) + 1e-9
    # t of two degrees of freedom is 4.3 in place of 2: such intervals are wide by right
    assert np.mean(widths) < 3 * 2 * 1.96 * np.std(errors)


def test_the_gate_is_that_of_alpha_curves():
    sft = pd.DataFrame({"repetition": [0.0, 0.02], "distinct_2": [0.7, 0.5]})
    points = pd.DataFrame(
        {"repetition": [0.06, 0.07, 0.01, 0.01], "distinct_2": [0.5, 0.5, 0.3, 0.29]}
    )
    assert equal_kl.passing(points, sft).tolist() == [True, False, True, False]
