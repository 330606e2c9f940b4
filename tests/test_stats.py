"""Intervals: relations that must hold, coverage on a known distribution, faults."""

import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from beyond_dpo import stats

NAN = float("nan")
INF = float("inf")


def width(interval):
    _, low, high = interval
    return high - low


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


# ---- means


def test_two_values_by_hand():
    """A draw of two of 0 and 1 has mean 0, 1/2 or 1 with chances 1/4, 1/2, 1/4.

    So the 95 % interval is [0, 1].
    """
    interval = stats.mean_interval([0, 1], seed=0)
    assert interval == (0.5, 0.0, 1.0)


@pytest.fixture(scope="module")
def intervals_of_normal_samples():
    """The intervals of 300 samples of 60 standard normals."""
    intervals = []
    for seed, sample in enumerate(normal(1, 300, 60)):
        interval = stats.mean_interval(sample, seed=seed, n_boot=400)
        intervals.append(interval)
    return intervals


def test_coverage_on_a_normal_sample(intervals_of_normal_samples):
    """The mean is inside its 95 % interval in about 94 of 100 samples."""
    covers = []
    for mean, low, high in intervals_of_normal_samples:
        assert low < mean < high
        covers.append(low <= 0 <= high)
    assert 0.90 <= np.mean(covers) <= 0.98


def test_width_on_a_normal_sample(intervals_of_normal_samples):
    widths = [width(interval) for interval in intervals_of_normal_samples]
    standard_error = 1 / np.sqrt(60)
    wanted = 2 * 1.96 * standard_error
    assert np.mean(widths) == pytest.approx(wanted, rel=0.05)


def test_seed_fixes_the_draw_and_another_seed_changes_it():
    values = normal(2, 50)
    interval = stats.mean_interval(values, seed=3)
    assert stats.mean_interval(values, seed=3) == interval
    assert stats.mean_interval(values, seed=4) != interval


@pytest.mark.parametrize("groups", [None, list("aabbbccdefgg")])
def test_many_draws_at_a_time_are_those_of_one_at_a_time(monkeypatch, groups):
    values = normal(4, 12)
    interval = stats.mean_interval(values, seed=3, groups=groups)
    monkeypatch.setattr(stats, "BLOCK", 1)
    assert stats.mean_interval(values, seed=3, groups=groups) == interval
    if groups is None:
        by_numpy = stats.interval(lambda draw: values[draw].mean(), 12, 3)
        assert by_numpy == pytest.approx(interval)


def test_ranks_are_those_of_scipy():
    from scipy.stats import rankdata

    values = normal(4, 60).round(1)
    assert len(set(values)) < 45, "ties"
    ranks = stats._ranks(stats._places(values))
    assert (ranks == rankdata(values)).all()


def test_the_global_generator_is_not_used():
    before = np.random.get_state()[1].copy()
    stats.mean_interval([0, 1, 2], seed=3)
    after = np.random.get_state()[1]
    assert (after == before).all()


def test_shift_moves_all_three():
    values = normal(5, 40, 3)
    plain = stats.mean_interval(values, seed=0)
    moved = stats.mean_interval(values + 7, seed=0)
    differences = np.subtract(moved, plain)
    assert differences == pytest.approx([7, 7, 7])


def test_copies_inside_a_group_add_no_information():
    """Each of 30 values stands four times.

    Grouped, or as rows of a matrix, the interval is that of the 30 values. Alone they look like 120
    units, and the interval is about half as wide (1/sqrt 4).
    """
    values = normal(6, 30)
    copies = np.repeat(values, 4)
    groups = np.repeat(np.arange(30), 4)
    rows = copies.reshape(30, 4)
    of_values = stats.mean_interval(values, seed=0)
    of_rows = stats.mean_interval(rows, seed=0)
    assert of_rows == pytest.approx(of_values)
    grouped = stats.mean_interval(copies, seed=0, groups=groups)
    assert grouped == pytest.approx(of_values)
    ungrouped = stats.mean_interval(copies, seed=0)
    assert 1.6 < width(grouped) / width(ungrouped) < 2.5


def test_groups_of_unequal_size_keep_the_mean_of_all_units():
    """Values 0 | 3, 3, 3: the mean of the four units is 9/4, not the mean 3/2 of the two groups."""
    values = [0, 3, 3, 3]
    groups = ["a", "b", "b", "b"]
    interval = stats.mean_interval(values, seed=0, groups=groups)
    assert interval == (2.25, 0.0, 3.0)


# ---- pairs


def test_paired_interval_of_a_constant_difference():
    shared = 100 * normal(7, 80)
    interval = stats.paired_interval(shared + 1, shared, seed=0)
    assert interval == pytest.approx((1, 1, 1))


def test_paired_interval_cancels_what_is_shared():
    shared = 100 * normal(7, 80)
    noisy = shared + 1 + normal(8, 80)
    paired = stats.paired_interval(noisy, shared, seed=0)
    unpaired = stats.mean_interval(noisy, seed=0)
    assert width(paired) < 0.1 * width(unpaired)


def test_paired_interval_of_exchanged_values_is_the_opposite():
    a = normal(7, 80)
    b = normal(8, 80)
    mean, low, high = stats.paired_interval(a, b, seed=0)
    exchanged = stats.paired_interval(b, a, seed=0)
    assert exchanged == pytest.approx((-mean, -high, -low))


# ---- peaks of curves


PEAKS = {0.1: 8, 0.2: 4, 1.0: 2}  # {fraction: α of the highest reward}


@pytest.fixture
def curves():
    """Return the rewards of six prompts at three α, one curve for each fraction."""
    rows = []
    for fraction, peak in PEAKS.items():
        for prompt in range(6):
            for alpha in (2, 4, 8):
                reward = prompt - abs(alpha - peak)
                rows.append([fraction, prompt, alpha, reward])
    return pd.DataFrame(rows, columns=["fraction", "prompt", "alpha", "reward"])


def peak_correlation(curves, by=("fraction",), n_boot=50):
    columns = list(by)
    return stats.peak_correlation(curves, "reward", columns, seed=0, n_boot=n_boot)


def test_peaks_that_fall_with_the_fraction(curves):
    assert peak_correlation(curves) == pytest.approx((1, 1, 1))


def test_peaks_of_several_seeds(curves):
    with_seeds = pd.concat([curves.assign(seed=0), curves.assign(seed=1)])
    interval = peak_correlation(with_seeds, ["fraction", "seed"])
    assert interval == pytest.approx((1, 1, 1))


def test_peaks_at_one_alpha_show_no_relation(curves):
    """The correlation is 0 then, not unknown."""
    flat = curves.assign(reward=curves["alpha"])
    assert peak_correlation(flat) == (0, 0, 0)


def test_draws_look_for_the_peaks_anew(curves):
    """With the peaks of two prompts apart, some draws turn the correlation round."""
    two = curves[curves["prompt"] < 2].copy()
    is_second = two["prompt"] == 1
    two.loc[is_second, "reward"] *= -2
    rho, low, high = peak_correlation(two, n_boot=200)
    assert low < 0
    assert high == pytest.approx(1)
    assert rho != pytest.approx(1)


def test_a_prompt_that_misses_at_one_alpha_is_refused(curves):
    with pytest.raises(ValueError, match="infs or NaNs"):
        peak_correlation(curves.drop(index=0))


# ---- rank correlation


def test_rank_correlation_by_hand():
    rho, _, _ = stats.rank_correlation([1, 2, 3], [1, 3, 2], seed=0)
    assert rho == pytest.approx(0.5)


def test_rank_correlation_of_a_rising_pair():
    x = np.arange(20.0)
    interval = stats.rank_correlation(x, np.exp(x), seed=0)
    assert interval == pytest.approx((1, 1, 1))


def test_rank_correlation_of_a_falling_pair():
    x = np.arange(20.0)
    rho, _, _ = stats.rank_correlation(x, -(x**3), seed=0)
    assert rho == pytest.approx(-1)


def test_a_constant_has_no_relation():
    interval = stats.rank_correlation([1, 1, 2, 2], [5, 5, 5, 5], seed=0)
    assert interval == (0.0, 0.0, 0.0)


def test_rank_correlation_of_noisy_values():
    generator = np.random.default_rng(0)
    a = generator.normal(size=200)
    noise = generator.normal(size=200)
    b = a + noise
    rho, low, high = stats.rank_correlation(a, b, seed=1)
    assert low < rho < high
    assert 0.5 < rho < 0.8


# ---- faults


@pytest.mark.parametrize(
    "values, groups, message",
    [
        ([1, NAN, 2], None, "must not contain infs or NaNs"),
        ([[1, 2], [3, INF]], None, "must not contain infs or NaNs"),
        ([1], None, "units=1"),
        ([1, 2], [0, 0], "units=1"),
        ([], None, "array of size 0"),
        ([1, 2], [0, 1, 2], "don't have the same length"),
    ],
)
def test_values_without_a_mean_interval_are_refused(values, groups, message):
    with pytest.raises(ValueError, match=message):
        stats.mean_interval(values, seed=0, groups=groups)


@pytest.mark.parametrize("function", [stats.paired_interval, stats.rank_correlation])
@pytest.mark.parametrize(
    "a, b, message",
    [
        ([1, 2], [1, NAN], "must not contain infs or NaNs"),
        ([1, NAN, 3], [1, 2, 3], "must not contain infs or NaNs"),
        ([1, 2], [1, 2, 3], "shapes differ"),
    ],
)
def test_values_that_are_no_pairs_are_refused(function, a, b, message):
    with pytest.raises(ValueError, match=message):
        function(a, b, seed=0)


def test_light_imports():
    heavy = {"torch", "transformers", "vllm", "deepspeed", "pandas", "scipy"}
    code = f"import sys, beyond_dpo.stats; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


# ---- trainings and prompts


def crossed(seed, trainings, units, of_trainings, of_units, rest):
    """Values of trainings and units that share what a training, and what a unit, adds."""
    generator = np.random.default_rng(seed)
    values = of_trainings * generator.normal(size=(trainings, 1))
    values = values + of_units * generator.normal(size=(1, units))
    return values + rest * generator.normal(size=(trainings, units))


def test_trainings_that_agree_leave_the_error_of_prompts():
    """Both trainings give 0 and 2 to the two prompts: the mean's variance over draws is 1/2.

    A draw of two prompts has mean 0, 1 or 2 with chances 1/4, 1/2, 1/4.
    """
    estimate = stats.two_level_mean([[0, 2], [0, 2]], seed=0, n_boot=20_000)
    assert estimate.value == 1
    assert estimate.between_trainings == 0
    assert estimate.between_units == pytest.approx(np.sqrt(0.5), rel=0.02)
    assert estimate.trainings == 2


def test_prompts_that_agree_leave_the_error_of_trainings():
    """Trainings of 0, 3 and 6: variance 9, standard error √(9/3), t of 2 degrees 4.303."""
    estimate = stats.two_level_mean([[0, 0], [3, 3], [6, 6]], seed=0)
    assert estimate.between_units == pytest.approx(0, abs=1e-12)
    assert estimate.between_trainings == pytest.approx(np.sqrt(3))
    assert estimate.high - estimate.value == pytest.approx(4.303 * np.sqrt(3), rel=1e-3)


def test_the_interval_ends_at_0_where_p_is_5_percent():
    estimate = stats.Estimate(1.0, 0.2, 0.3, 5)
    shifted = stats.Estimate(estimate.value - estimate.low, 0.2, 0.3, 5)
    assert shifted.low == pytest.approx(0, abs=1e-9)
    assert shifted.p == pytest.approx(0.05, rel=1e-3)
    assert (-shifted).p == pytest.approx(shifted.p)


def test_one_training_has_no_p_value():
    estimate = stats.two_level_mean([[1.0, 2.0, 3.0]], seed=0)
    assert estimate.trainings == 1
    assert estimate.p is None
    assert estimate.detectable is None
    assert estimate.low < 2 < estimate.high


def test_an_effect_of_the_detectable_size_is_found_in_80_of_100():
    """Five trainings that differ by 1, prompts by nothing, and the effect that is detectable."""
    true_error = stats.Estimate(0, 1 / np.sqrt(5), 0, 5)
    found = []
    for seed in range(800):
        values = true_error.detectable + crossed(seed, 5, 2, 1.0, 0.0, 0.0)
        estimate = stats.two_level_mean(values, seed=seed, n_boot=2)
        found.append(estimate.p < 0.05)
    assert 0.74 <= np.mean(found) <= 0.88


@pytest.mark.parametrize("of_trainings", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("trainings, least, most", [(5, 0.93, 0.97), (3, 0.93, 0.99)])
def test_coverage_in_null_worlds(of_trainings, trainings, least, most):
    """The mean of 0 is inside, whether trainings differ beyond their prompts or not."""
    covers = []
    for seed in range(700):
        values = crossed(seed, trainings, 64, of_trainings, 0.3, 1.0)
        estimate = stats.two_level_mean(values, seed=seed, n_boot=200)
        covers.append(estimate.low <= 0 <= estimate.high)
    slack = 2.5 * np.sqrt(0.05 * 0.95 / len(covers))
    assert least - slack <= np.mean(covers) <= most + slack


def test_a_share_is_the_ratio_of_means_and_its_error_that_of_both():
    """Of two trainings (1, 2) and (3, 4) the ratio is 4/6; without one it is 3/4, and 1/2."""
    components = np.array([[[1.0, 2.0], [3.0, 4.0]]])

    def measure(draws):
        return np.repeat(components, len(draws), axis=0)

    estimate = stats.two_level(measure, [4], lambda means: means[..., 0] / means[..., 1], seed=0)
    assert estimate.value == pytest.approx(4 / 6)
    pseudo = [2 * 4 / 6 - 3 / 4, 2 * 4 / 6 - 1 / 2]
    assert estimate.between_trainings == pytest.approx(np.std(pseudo, ddof=1) / np.sqrt(2))
    assert estimate.between_units == pytest.approx(0, abs=1e-12)


def test_two_sets_of_prompts_are_drawn_apart():
    sizes = []

    def measure(dev, test):
        sizes.append((dev.shape, test.shape))
        return np.zeros((len(dev), 2, 1))

    stats.two_level(measure, [3, 5], seed=0, n_boot=10)
    assert sizes == [((1, 3), (1, 5)), ((10, 3), (10, 5))]


def test_what_is_not_finite_or_has_one_unit_is_refused():
    with pytest.raises(ValueError, match="2 or more"):
        stats.two_level_mean([[1.0], [2.0]], seed=0)
    with pytest.raises(ValueError, match="NaN|infs"):
        stats.two_level_mean([[1.0, NAN], [2.0, 1.0]], seed=0)


def test_discoveries_by_hand():
    """Of four p-values at 5 %: 0.01 ≤ 1/4 · 5 %, 0.02 ≤ 2/4 · 5 %, 0.04 > 3/4 · 5 %, 0.06 > 5 %."""
    assert stats.discoveries([0.04, 0.01, 0.06, 0.02]) == [False, True, False, True]
    assert stats.discoveries([]) == []


# ---- ratios of means over simulations


def test_a_ratio_of_means_by_hand():
    """Means 3 and 2: the ratio 1.5, residuals (1 - 1.5, 5 - 4.5) / 2 of sd √2 / 4, error 1/4."""
    estimate = stats.ratio_of_means([1.0, 5.0], [1.0, 3.0])
    assert estimate.value == 1.5
    assert estimate.between_trainings == pytest.approx(0.25)
    assert estimate.between_units == 0
    assert estimate.trainings == 2


def test_over_ones_it_is_the_mean_with_the_t_interval():
    from scipy.stats import ttest_1samp

    values = normal(0, 12)
    estimate = stats.ratio_of_means(values, np.ones(12))
    low, high = ttest_1samp(values, 0).confidence_interval()
    assert (estimate.low, estimate.high) == pytest.approx((low, high))


def test_the_interval_of_a_ratio_covers_it():
    inside = 0
    for seed in range(300):
        reference = 1 + 0.3 * normal(seed, 40)
        values = 0.2 * reference + 0.1 * normal(1000 + seed, 40)
        estimate = stats.ratio_of_means(values, reference)
        inside += estimate.low < 0.2 < estimate.high
    assert 0.91 < inside / 300 < 0.98


@pytest.mark.parametrize(
    "values, reference, message",
    [
        ([1.0], [1.0], "2 or more"),
        ([1.0, 2.0], [1.0, 2.0, 3.0], "shapes differ"),
        ([1.0, 2.0], [-1.0, 1.0], "a mean of 0"),
        ([1.0, NAN], [1.0, 1.0], "infs or NaNs"),
    ],
)
def test_a_ratio_that_cannot_be_is_refused(values, reference, message):
    with pytest.raises(ValueError, match=message):
        stats.ratio_of_means(values, reference)


def test_mean_of_trainings_by_hand():
    """Of 1, 2, 3: mean 2, standard error 1/√3, and the t quantile of two degrees of freedom."""
    found = stats.mean_of_trainings([1, 2, 3])
    assert found.value == 2
    assert found.trainings == 3
    assert found.between_trainings == pytest.approx(3**-0.5)
    assert found.high - 2 == pytest.approx(4.302653 * 3**-0.5)
    moved = stats.mean_of_trainings([11, 12, 13])
    assert moved.low == pytest.approx(found.low + 10)


@pytest.mark.parametrize("values", [[], [1.0], [[1.0, 2.0]], [1.0, np.nan]])
def test_a_mean_of_trainings_needs_several_that_are_finite(values):
    with pytest.raises(ValueError):
        stats.mean_of_trainings(values)
