"""Errors of printed differences, by hand."""

import numpy as np
import pytest
from scipy import stats as reference

from beyond_dpo.pipeline import own_errors


def test_independent_errors_add_as_squares():
    value, low, high = own_errors.independent(2.0, 3.0, 4.0)
    assert value == 2.0
    assert (low, high) == pytest.approx((2 - 1.959964 * 5, 2 + 1.959964 * 5))


def test_two_means_over_seeds_are_compared_by_welch():
    generator = np.random.default_rng(0)
    first = generator.normal(1, 2, size=10)
    second = generator.normal(0, 1, size=10)
    pairs = [(values.mean(), values.std(ddof=1)) for values in (first, second)]
    wanted = reference.ttest_ind(first, second, equal_var=False).confidence_interval()
    _, low, high = own_errors.of_seeds(*pairs, 10)
    assert (low, high) == pytest.approx((wanted.low, wanted.high))


def test_a_win_rate_by_hand():
    """60 % of 96 prompts: 10 points with the standard error 5."""
    value, low, _ = own_errors.of_share(60.0, 96)
    assert value == 10
    assert low == pytest.approx(10 - 1.959964 * 5)


def test_cells_are_the_units_of_a_table_without_errors():
    leads = [0.23, 1.0, 2.23, 1.57, -0.81, 0.55]
    wanted = reference.ttest_1samp(leads, 0).confidence_interval()
    assert own_errors.of_cells(leads)[1:] == pytest.approx((wanted.low, wanted.high))


def test_a_table_says_what_is_told_from_0():
    table = own_errors.table("Table 1", {"a": (1.0, 0.5, 1.5), "b": (1.0, -0.5, 2.5)})
    assert table["told from 0"].tolist() == [True, False]
    assert own_errors.beyond_error((1.0, 0.5, 1.5)) > 0 > own_errors.beyond_error((1.0, -0.5, 2.5))
