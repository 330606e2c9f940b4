"""What weights as even as the estimator's could gain."""

import numpy as np
import pandas as pd
import pytest

from beyond_dpo.pipeline import allowed, config, mallows

SMOKE = config.load("mallows", "smoke")
AGREEMENT = np.array([0.2, 3.0, 1.0, 0.5])


def test_weights_are_dealt_in_the_order_of_the_truth_and_against_it():
    weights = np.linspace(0.5, 1.5, 50)
    along = allowed.dealt(weights, AGREEMENT, "as the truth", seed=0)
    against = allowed.dealt(weights, AGREEMENT, "against it", seed=0)
    unrelated = allowed.dealt(weights, AGREEMENT, "unrelated", seed=0)
    assert np.argsort(along).tolist() == np.argsort(AGREEMENT).tolist()
    assert np.argsort(against).tolist() == np.argsort(-AGREEMENT).tolist()
    for dealt in (along, against, unrelated):
        assert dealt.mean() == pytest.approx(1)
        assert sorted(dealt) == pytest.approx(sorted(along)), "the same draw"
    with pytest.raises(ValueError, match="'somehow'"):
        allowed.dealt(weights, AGREEMENT, "somehow", seed=0)


@pytest.mark.long
def test_the_band_of_real_weights(store):
    table = allowed.band(SMOKE).csv("shares.csv")
    sizes = SMOKE.contextual
    assert len(table) == len(sizes.spreads) * len(sizes.pairs) * sizes.seeds
    assert (table["DPO"] > 0).all()
    low, high = allowed.limits(table)
    assert low <= high
    assert len(allowed.shares(table)) == len(sizes.spreads) * len(sizes.pairs) * 3
    assert mallows.dispersed(SMOKE).key in allowed.band(SMOKE).upstream


def test_shares_by_hand():
    row = {"spread": 1.0, "pairs": 100, "DPO": 2.0}
    row |= {"as the truth": 0.1, "unrelated": 0.0, "against it": -0.2}
    table = pd.DataFrame([{**row, "seed": 0}, {**row, "seed": 1}])
    shares = allowed.shares(table).set_index("order")["share"]
    assert shares["as the truth"] == pytest.approx(0.05)
    assert allowed.limits(table) == pytest.approx((-0.1, 0.05))
