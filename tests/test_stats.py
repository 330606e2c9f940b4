"""Intervals: relations that must hold, coverage on a known distribution, faults."""

import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from beyond_dpo import stats


def width(interval):
    return interval[2] - interval[1]


def test_two_values_by_hand():
    """Units 0 and 1: a draw of two has mean 0, 1/2 or 1 with chances 1/4, 1/2, 1/4, so the 95 %
    interval is [0, 1].
    """
    assert stats.mean_interval([0, 1], seed=0) == (0.5, 0.0, 1.0)


def test_coverage_on_a_normal_sample():
    """The mean of 60 standard normals is inside its 95 % interval in about 94 of 100 samples."""
    samples = np.random.default_rng(1).normal(size=(300, 60))
    intervals = [
        stats.mean_interval(sample, seed=i, n_boot=400) for i, sample in enumerate(samples)
    ]
    covered = np.mean([low <= 0 <= high for _, low, high in intervals])
    assert 0.90 <= covered <= 0.98
    assert all(low < mean < high for mean, low, high in intervals)
    assert np.mean([width(i) for i in intervals]) == pytest.approx(2 * 1.96 / np.sqrt(60), rel=0.05)


def test_seed_fixes_the_draw_and_another_seed_changes_it():
    values = np.random.default_rng(2).normal(size=50)
    state = np.random.get_state()[1].copy()
    assert stats.mean_interval(values, seed=3) == stats.mean_interval(values, seed=3)
    assert stats.mean_interval(values, seed=3) != stats.mean_interval(values, seed=4)
    assert (np.random.get_state()[1] == state).all(), "the global generator was used"


def test_shift_moves_all_three():
    values = np.random.default_rng(5).normal(size=(40, 3))
    plain, moved = stats.mean_interval(values, seed=0), stats.mean_interval(values + 7, seed=0)
    assert np.subtract(moved, plain) == pytest.approx([7, 7, 7])


def test_copies_inside_a_group_add_no_information():
    """Each of 30 values four times: alone they look like 120 units and the interval is about half
    as wide (1/sqrt 4); grouped, or as rows of a matrix, the interval is that of the 30 values."""
    values = np.random.default_rng(6).normal(size=30)
    copies, groups = np.repeat(values, 4), np.repeat(np.arange(30), 4)
    grouped = stats.mean_interval(copies, seed=0, groups=groups)
    assert grouped == pytest.approx(stats.mean_interval(values, seed=0))
    assert stats.mean_interval(copies.reshape(30, 4), seed=0) == pytest.approx(grouped)
    assert 1.6 < width(grouped) / width(stats.mean_interval(copies, seed=0)) < 2.5


def test_groups_of_unequal_size_keep_the_mean_of_all_units():
    """Values 0 | 3, 3, 3: the mean of the four units is 9/4, not the mean 3/2 of the two groups."""
    assert stats.mean_interval([0, 3, 3, 3], seed=0, groups=["a", "b", "b", "b"]) == (
        2.25,
        0.0,
        3.0,
    )


def test_paired_interval_cancels_what_is_shared():
    shared = 100 * np.random.default_rng(7).normal(size=80)
    a, b = shared + 1, shared
    assert stats.paired_interval(a, b, seed=0) == pytest.approx((1, 1, 1))
    noise = np.random.default_rng(8).normal(size=80)
    forth, back = (
        stats.paired_interval(a + noise, b, seed=0),
        stats.paired_interval(b, a + noise, seed=0),
    )
    assert (-back[0], -back[2], -back[1]) == pytest.approx(forth)
    assert width(forth) < 0.1 * width(stats.mean_interval(a + noise, seed=0))


def test_peak_correlation():
    """Peaks at α 8, 4, 2 for 10, 20, 100 %: rho 1. With the peaks of two prompts apart, some draws
    turn it round.
    """
    grid, rows = (2, 4, 8), []
    for fraction, peak in ((0.1, 8), (0.2, 4), (1.0, 2)):
        for prompt in range(6):
            place = {"fraction": fraction, "prompt": prompt}
            rows += [place | {"alpha": a, "reward": prompt - abs(a - peak)} for a in grid]
    sure = pd.DataFrame(rows)
    assert stats.peak_correlation(sure, "reward", ["fraction"], seed=0, n_boot=50) == pytest.approx(
        (1, 1, 1)
    )
    with_seeds = pd.concat([sure.assign(seed=seed) for seed in (0, 1)])
    found = stats.peak_correlation(with_seeds, "reward", ["fraction", "seed"], seed=0, n_boot=50)
    assert found == pytest.approx((1, 1, 1))
    flat = sure.assign(reward=sure["alpha"])  # every curve peaks at 8: no relation, not "unknown"
    assert stats.peak_correlation(flat, "reward", ["fraction"], seed=0, n_boot=50) == (0, 0, 0)
    turned = sure[sure["prompt"] < 2].copy()
    other = turned["prompt"] == 1
    turned.loc[other, "reward"] = -2 * turned.loc[other, "reward"]
    rho, low, high = stats.peak_correlation(turned, "reward", ["fraction"], seed=0, n_boot=200)
    assert low < 0 < high == pytest.approx(1) and rho != pytest.approx(1)
    with pytest.raises(ValueError, match="infs or NaNs"):
        stats.peak_correlation(sure.drop(index=0), "reward", ["fraction"], seed=0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: stats.mean_interval([1, np.nan, 2], seed=0), "must not contain infs or NaNs"),
        (
            lambda: stats.mean_interval([[1, 2], [3, np.inf]], seed=0),
            "must not contain infs or NaNs",
        ),
        (
            lambda: stats.paired_interval([1, 2], [1, np.nan], seed=0),
            "must not contain infs or NaNs",
        ),
        (lambda: stats.paired_interval([1, 2], [1, 2, 3], seed=0), "shapes differ"),
        (lambda: stats.mean_interval([1], seed=0), "units=1"),
        (lambda: stats.mean_interval([1, 2], seed=0, groups=[0, 0]), "units=1"),
        (lambda: stats.mean_interval([], seed=0), "array of size 0"),
        (
            lambda: stats.mean_interval([1, 2], seed=0, groups=[0, 1, 2]),
            "don't have the same length",
        ),
    ],
)
def test_faults_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_light_imports():
    heavy = {"torch", "transformers", "vllm", "deepspeed", "pandas", "scipy"}
    code = f"import sys, beyond_dpo.stats; print(sorted({heavy} & set(sys.modules)))"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip()
        == "[]"
    )


def test_rank_correlation():
    """Spearman's rho: 1 for any rising pair, −1 for a falling one, 0.5 by hand for (1, 2, 3) and
    (1, 3, 2); ties.
    """
    x = np.arange(20.0)
    assert stats.rank_correlation(x, np.exp(x), seed=0) == pytest.approx((1, 1, 1))
    assert stats.rank_correlation(x, -(x**3), seed=0)[0] == pytest.approx(-1)
    assert stats.rank_correlation([1, 2, 3], [1, 3, 2], seed=0)[0] == pytest.approx(0.5)
    assert stats.rank_correlation([1, 1, 2, 2], [5, 5, 5, 5], seed=0) == (0.0, 0.0, 0.0), (
        "no relation with a constant"
    )
    rng = np.random.default_rng(0)
    a = rng.normal(size=200)
    rho, low, high = stats.rank_correlation(a, a + rng.normal(size=200), seed=1)
    assert low < rho < high and 0.5 < rho < 0.8
    with pytest.raises(ValueError, match="infs or NaNs"):
        stats.rank_correlation([1, np.nan, 3], [1, 2, 3], seed=0)
