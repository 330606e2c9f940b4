"""The contextual bandit: small cases by hand, identities, gradients, and what it refuses."""

import itertools
import math
import time

import numpy as np
import pandas as pd
import pytest
import torch

from beyond_dpo import contextual
from beyond_dpo.losses import mallows_link
from beyond_dpo.pipeline import config, mallows

PEOPLE = ["mallows", "bradley_terry"]
# Two contexts of two arms and one parameter: it prefers the first arm in both.
SHARED = np.array([[[1.0], [0.0]], [[1.0], [0.0]]])
RANKS = np.array([[1, 2], [1, 2]])
each_link = pytest.mark.parametrize("link", contextual.LINKS)


def wins_of_first(wins, losses):
    """Return counts of two contexts of two arms: how often the first arm won and lost in each."""
    counts = np.zeros((2, 2, 2))
    counts[:, 0, 1] = wins
    counts[:, 1, 0] = losses
    return counts


@pytest.fixture(scope="module")
def world():
    return contextual.draw_world(6, 4, 3, spread=0.8, seed=5)


@pytest.fixture(scope="module")
def wins(world):
    return contextual.draw_pairs(world, 200, people="mallows", seed=5)


# ---- what people prefer


def test_chance_of_neighbours_by_hand():
    """g(1) = 1 / (1 + φ), and g(-1) = 1 - g(1)."""
    chance = contextual.pair_probability([1, -1], 0.25)
    assert chance == pytest.approx([0.8, 0.2])


@pytest.mark.parametrize("phi", [0.05, 0.5, 0.95])
def test_chance_is_that_of_all_rankings(phi):
    """Of four items, written out: φ to the number of inversions."""
    before = np.zeros(4)
    total = 0.0
    for places in itertools.permutations(range(4)):
        inversions = sum(a > b for a, b in itertools.combinations(places, 2))
        weight = phi**inversions
        total += weight
        before += weight * (places[0] < np.array(places))
    gaps = [1, 2, 3]
    assert contextual.pair_probability(gaps, phi) == pytest.approx(before[1:] / total)


def test_chance_near_full_dispersion_is_a_half():
    assert contextual.pair_probability(3, 1 - 1e-6) == pytest.approx(0.5, abs=1e-5)


@pytest.mark.parametrize("people", PEOPLE)
def test_pairs_are_won_as_often_as_the_model_says(people):
    world = contextual.draw_world(2, 3, 1, spread=0.7, seed=0)
    wins = contextual.draw_pairs(world, 200_000, people=people, seed=0)
    assert wins.sum() == 200_000
    met = wins + wins.swapaxes(1, 2)
    different = met > 0
    assert different.sum() == 2 * 3 * 2  # no arm meets itself
    share = wins[different] / met[different]
    assert share == pytest.approx(contextual.chances(world, people)[different], abs=0.015)


def test_fewer_pairs_are_the_first_of_more(world):
    few = contextual.draw_pairs(world, 50, people="mallows", seed=1)
    more = contextual.draw_pairs(world, 60, people="mallows", seed=1)
    added = more - few
    assert added.min() == 0
    assert added.sum() == 10


def test_other_dispersion_same_contexts_and_rankings(world):
    other = contextual.draw_world(6, 4, 3, spread=0.0, seed=5)
    assert (other.features == world.features).all()
    assert (other.ranks == world.ranks).all()
    assert other.agreement.tolist() == [1.0] * 6
    assert world.agreement.mean() == pytest.approx(1)
    assert np.ptp(world.agreement) > 0.5


def test_rankings_are_those_of_a_direction(world):
    """One v follows all of them, so that what the contexts teach goes together."""
    assert np.sort(world.ranks, axis=1).tolist() == [[1, 2, 3, 4]] * 6
    generator = np.random.default_rng([5, 0])
    generator.standard_normal((6, 4, 3))
    utility = world.features @ generator.standard_normal(3)
    best = utility.argmax(1)
    assert (world.ranks[np.arange(6), best] == 1).all()


def test_a_seed_gives_the_same_again(world):
    again = contextual.draw_world(6, 4, 3, spread=0.8, seed=5)
    other = contextual.draw_world(6, 4, 3, spread=0.8, seed=6)
    for first, second, third in zip(world, again, other, strict=True):
        assert (first == second).all()
        assert (first != third).any()
    one, two = (contextual.draw_pairs(world, 30, people="mallows", seed=2) for _ in range(2))
    assert (one == two).all()


# ---- estimates of the dispersion


def test_an_estimate_without_noise_is_the_truth(world):
    assert contextual.estimate(world.agreement, noise=0, seed=0) == pytest.approx(world.agreement)


def test_noise_has_the_size_that_it_should():
    truth = np.full(20_000, 2.0)
    found = contextual.estimate(truth, noise=0.5, seed=0)
    assert found.mean() == pytest.approx(1)
    assert np.log(found).std() == pytest.approx(0.5, abs=0.01)


def test_more_noise_is_the_same_error_only_larger(world):
    errors = []
    for noise in (0.5, 1.0):
        found = contextual.estimate(world.agreement, noise=noise, seed=3)
        error = np.log(found / world.agreement)
        errors.append(error - error.mean())
    assert errors[1] == pytest.approx(2 * errors[0])


def test_shuffled_are_the_same_values_elsewhere(world):
    shuffled = contextual.shuffle(world.agreement, seed=0)
    assert sorted(shuffled) == sorted(world.agreement)
    assert (shuffled != world.agreement).any()


# ---- two contexts of two arms, by hand


def test_two_contexts_share_a_parameter():
    """The first arm wins 3 of 4 and 1 of 2, 4 of 6 in all: DPO ends at s = ln(4 / 2)."""
    wins = wins_of_first([3, 1], [1, 1])
    way = contextual.descend(SHARED, wins, [1, 1], link="logistic", steps=500, lr=4)
    assert way[-1] == pytest.approx([math.log(2)])


def test_weights_say_whom_the_parameter_listens_to():
    """A weight near 0 leaves a context out, whatever is preferred there: s = ln(3 / 1) / weight."""
    wins = wins_of_first([3, 0], [1, 4])
    way = contextual.descend(SHARED, wins, [2, 1e-6], link="logistic", steps=500, lr=2)
    assert way[-1] == pytest.approx([math.log(3) / 2], rel=1e-4)


def test_with_tables_each_context_is_learnt_by_itself():
    """Weights only say how far it goes: s = ln(wins / losses) / weight."""
    world = contextual.World(SHARED, RANKS, np.ones(2))
    own = contextual.tables(world)
    assert own.features.shape == (2, 2, 4)
    assert own.features[1, 0].tolist() == [0, 0, math.sqrt(2), 0]
    wins = wins_of_first([3, 1], [1, 4])
    way = contextual.descend(own.features, wins, [2, 0.5], link="logistic", steps=3000, lr=1)
    scores = own.features @ way[-1]
    s = scores[:, 0] - scores[:, 1]
    assert s == pytest.approx([math.log(3) / 2, math.log(1 / 4) / 0.5])


def test_first_step_by_hand():
    """At s = 0 the slope of log g is a / 2: the first context moves v by lr (3 - 1) a / 2 / 6."""
    wins = wins_of_first([3, 1], [1, 1])
    way = contextual.descend(SHARED, wins, [1.5, 7], link="logistic", steps=1, lr=0.3)
    assert way == pytest.approx(np.array([[0], [0.3 * 2 * 0.75 / 6]]))


def test_gain_at_a_divergence_by_hand():
    """π(first) = 3/4 in both contexts: KL is ln 2 less the entropy, and the gain 1.5 - 1.25."""
    kl = math.log(2) + 0.75 * math.log(0.75) + 0.25 * math.log(0.25)
    for v in (0.01, 1.0, 40.0):
        gain = contextual.gain_at_kl(SHARED, RANKS, [v], kl)
        assert gain == pytest.approx(0.25, abs=1e-8)
    assert contextual.gain_at_kl(SHARED, RANKS, [-1.0], kl) == pytest.approx(-0.25, abs=1e-8)


def test_measures_by_hand():
    half = np.full((2, 2), 0.5)
    assert contextual.measure(half, RANKS) == pytest.approx((0, 0))
    one_sure = np.array([[1.0, 0.0], [0.5, 0.5]])
    assert contextual.measure(one_sure, RANKS) == pytest.approx((0.25, math.log(2) / 2))


def test_gain_at_a_divergence_is_that_of_the_policy(world):
    v = np.array([1.0, -0.5, 0.2])
    for beta in (0.3, 2.0):
        probabilities = contextual.policy(world.features, v / beta)
        gain, kl = contextual.measure(probabilities, world.ranks)
        assert contextual.gain_at_kl(world.features, world.ranks, v, kl) == pytest.approx(gain)


def test_a_divergence_that_no_beta_reaches_has_no_gain(world):
    v = [1.0, 0.0, 0.0]
    assert math.isnan(contextual.gain_at_kl(world.features, world.ranks, v, math.log(4) + 0.01))
    assert math.isnan(contextual.gain_at_kl(world.features, world.ranks, [0.0] * 3, 0.1))


# ---- identities


def test_a_constant_phi_only_rescales_beta(world, wins):
    """Proposition 4: the way of DPO at the step size a² lr, divided by a, and so the same gains."""
    a = -2 * math.log(0.3)
    constant = np.full(6, a)
    theta = contextual.descend(world.features, wins, constant, link="logistic", steps=90, lr=0.1)
    dpo = contextual.descend(
        world.features, wins, np.ones(6), link="logistic", steps=90, lr=0.1 * a**2
    )
    assert theta == pytest.approx(dpo / a, rel=1e-9, abs=1e-12)
    gains = [
        contextual.gain_at_kl(world.features, world.ranks, way[-1], 0.3) for way in (theta, dpo)
    ]
    assert gains[0] == pytest.approx(gains[1], abs=1e-8)


def test_without_spread_the_true_weights_are_1():
    flat = contextual.draw_world(6, 4, 3, spread=0, seed=9)
    assert contextual.estimate(flat.agreement, noise=0, seed=9).tolist() == [1.0] * 6
    assert contextual.shuffle(flat.agreement, seed=9).tolist() == [1.0] * 6


@pytest.mark.parametrize(
    "people, link", [("mallows", "mallows_phi"), ("bradley_terry", "logistic")]
)
def test_the_model_that_fits_the_people_finds_the_central_rankings(world, people, link):
    """With endless pairs v = minus the ranks is where its gradient is 0 (Theorem 1)."""
    own = contextual.tables(world)
    scale = own.features.max()
    v = -world.ranks.ravel() / scale
    weights = contextual.chances(world, people)
    _, gradient = contextual.expected_loss(own.features, weights, world.agreement, v, link=link)
    assert np.abs(gradient).max() < 1e-15
    _, of_dpo = contextual.expected_loss(own.features, weights, np.ones(6), v, link="logistic")
    assert np.abs(of_dpo).max() > 1e-3


def test_dpo_of_bradley_terry_goes_further_where_people_agree(world):
    """Its reward is the true one times -log φ(x): that is what it pays its divergence for."""
    own = contextual.tables(world)
    reward = -world.ranks * world.agreement[:, np.newaxis]
    v = reward.ravel() / own.features.max()
    weights = contextual.chances(world, "bradley_terry")
    _, gradient = contextual.expected_loss(own.features, weights, np.ones(6), v, link="logistic")
    assert np.abs(gradient).max() < 1e-15


# ---- against other code


@each_link
def test_gradient_against_finite_differences(world, wins, link):
    v = np.array([0.4, -0.3, 0.25])
    _, gradient = contextual.expected_loss(world.features, wins, world.agreement, v, link=link)
    step = 1e-6
    for j in range(3):
        losses = []
        for sign in (1, -1):
            moved = v.copy()
            moved[j] += sign * step
            loss, _ = contextual.expected_loss(
                world.features, wins, world.agreement, moved, link=link
            )
            losses.append(loss)
        slope = (losses[0] - losses[1]) / (2 * step)
        assert gradient[j] == pytest.approx(slope, abs=1e-7)


@each_link
def test_descent_follows_the_gradient(world, wins, link):
    way = contextual.descend(world.features, wins, world.agreement, link=link, steps=20, lr=0.2)
    assert way.shape == (21, 3)
    assert (way[0] == 0).all()
    for before, after in itertools.pairwise(way):
        _, gradient = contextual.expected_loss(
            world.features, wins, world.agreement, before, link=link
        )
        assert after == pytest.approx(before - 0.2 * gradient, abs=1e-12)


@pytest.mark.parametrize("s", [-30.0, -2.0, -0.05, 0.0, 0.02, 0.1, 1.0, 12.0])
@pytest.mark.parametrize("a", [0.01, 0.7, 6.0])
def test_phi_link_is_that_of_the_losses(s, a):
    """Of one pair, whose loss is -log g(s)."""
    wins = wins_of_first([1, 0], [0, 0])
    loss, _ = contextual.expected_loss(SHARED, wins, [a, 1], [s], link="mallows_phi")
    phi = torch.tensor([math.exp(-a)])
    g = mallows_link(torch.tensor([s], dtype=torch.float64), phi.double(), 0.1)
    assert math.exp(-loss) == pytest.approx(float(g), rel=1e-6)


@pytest.mark.parametrize("phi", [0.05, 0.4, 0.97])
def test_the_link_is_that_of_the_losses_and_odd_about_a_half(phi):
    s = np.linspace(-4, 4, 41)
    ours = contextual.link(s, phi, 0.1)
    theirs = mallows_link(torch.tensor(s), torch.full((41,), phi, dtype=torch.float64), 0.1)
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-12)
    np.testing.assert_allclose(ours + ours[::-1], 1, rtol=1e-12)


@pytest.mark.parametrize(("phi", "epsilon"), [(0.0, 0.1), (1.0, 0.1), (0.5, 0.0)])
def test_a_link_out_of_range_is_refused(phi, epsilon):
    with pytest.raises(ValueError):
        contextual.link([0.5], phi, epsilon)


@each_link
def test_descent_lowers_the_loss(world, wins, link):
    way = contextual.descend(world.features, wins, world.agreement, link=link, steps=200, lr=0.05)
    ends = []
    for v in (way[0], way[-1]):
        loss, _ = contextual.expected_loss(world.features, wins, world.agreement, v, link=link)
        ends.append(loss)
    assert ends[0] == pytest.approx(math.log(2))
    assert ends[1] < ends[0] - 0.05


@each_link
def test_large_steps_stay_finite(world, wins, link):
    way = contextual.descend(world.features, wins, world.agreement, link=link, steps=50, lr=1e3)
    assert np.isfinite(way).all()


# ---- bad input, speed


@pytest.mark.parametrize(
    "change, message",
    [
        ({"features": np.zeros((2, 2))}, "features"),
        ({"features": np.zeros((3, 2, 1))}, "features"),
        ({"wins": np.ones((2, 3, 3))}, "features"),
        ({"wins": np.zeros((2, 2, 2))}, "wins must"),
        ({"wins": -np.ones((2, 2, 2))}, "wins must"),
        ({"agreement": [1.0]}, "one value for each context"),
        ({"agreement": [1.0, 0.0]}, "positive and finite"),
        ({"agreement": [1.0, math.nan]}, "positive and finite"),
        ({"link": "dpo"}, "link must"),
        ({"steps": 0}, "steps must"),
        ({"lr": 0.0}, "lr must"),
        ({"lr": math.inf}, "lr must"),
        ({"epsilon": -1.0}, "epsilon must"),
    ],
)
def test_descent_refuses_what_does_not_fit(change, message):
    arguments = {
        "features": SHARED,
        "wins": wins_of_first([3, 1], [1, 1]),
        "agreement": [1.0, 1.0],
        "link": "logistic",
        "steps": 2,
        "lr": 0.1,
    }
    arguments.update(change)
    with pytest.raises(ValueError, match=message):
        contextual.descend(**arguments)


@pytest.mark.parametrize("phi", [0.0, 1.0, 1.5, -0.2, math.nan])
def test_a_dispersion_outside_of_0_and_1_is_refused(phi):
    with pytest.raises(ValueError, match="phi must be in"):
        contextual.pair_probability([1, 2], phi)


@pytest.mark.parametrize(
    "call",
    [
        lambda world: contextual.draw_world(0, 2, 1, spread=1, seed=0),
        lambda world: contextual.draw_world(2, 1, 1, spread=1, seed=0),
        lambda world: contextual.draw_world(2, 2, 0, spread=1, seed=0),
        lambda world: contextual.draw_world(2, 2, 1, spread=-0.1, seed=0),
        lambda world: contextual.draw_pairs(world, 0, people="mallows", seed=0),
        lambda world: contextual.draw_pairs(world, 5, people="voters", seed=0),
        lambda world: contextual.chances(world, "voters"),
        lambda world: contextual.pair_probability([0, 1], 0.5),
        lambda world: contextual.estimate(world.agreement, noise=-1, seed=0),
        lambda world: contextual.estimate(world.agreement, noise=math.inf, seed=0),
        lambda world: contextual.estimate([1.0, -1.0], noise=1, seed=0),
        lambda world: contextual.gain_at_kl(world.features, world.ranks[:2], [1, 1, 1], 0.1),
        lambda world: contextual.gain_at_kl(world.features, world.ranks, [1, 1, 1], 0),
        lambda world: contextual.measure(np.ones((2, 3)), np.ones((3, 2))),
        lambda world: contextual.expected_loss(
            world.features, np.ones((6, 4, 4)), world.agreement, [0, 0, 0], link="theta"
        ),
    ],
)
def test_bad_input_is_refused(world, call):
    with pytest.raises(ValueError):
        call(world)


@pytest.mark.usefixtures("wins")
def test_frontiers_without_spread_and_noise_are_those_of_dpo():
    found = contextual.frontiers(spread=0, noise=0, kls=[0.2, 0.5], beta=1, seeds=[1, 2])
    np.testing.assert_allclose(found["MallowsPO-θ"].gains, found["DPO"].gains, atol=1e-9)
    assert found["MallowsPO-θ"].kl == pytest.approx(found["DPO"].kl)
    nearer, further = found["DPO"].gains
    assert 0 < nearer < further
    smaller = contextual.frontiers(spread=0, noise=0, kls=[0.2], beta=0.5, seeds=[1, 2])
    assert smaller["DPO"].kl > found["DPO"].kl


def test_frontiers_are_what_notebook_27_has_frozen():
    """The first of its worlds, with the true φ."""
    cfg = config.load("mallows", "cpu")
    table = mallows.contextual(cfg).csv("gains.csv.gz")
    cell = {"world": "Mallows", "spread": 1.0, "pairs": 400, "steps": 100, "kl": 0.5}
    first = table["seed"].min()
    (row,) = table[(table[[*cell, "seed"]] == pd.Series(cell | {"seed": first})).all(axis=1)].index
    found = contextual.frontiers(spread=1.0, noise=0, kls=[0.5], beta=1, seeds=[first])
    for method, column in (("DPO", "DPO"), ("MallowsPO-θ", "MallowsPO-θ, true")):
        assert found[method].gains[0] == pytest.approx(table.loc[row, column], abs=0.001)


def test_time():
    """A hundred trainings of 100 steps may take a second of one core, five times what they need."""
    world = contextual.draw_world(16, 5, 8, spread=1, seed=0)
    wins = contextual.draw_pairs(world, 1600, people="mallows", seed=0)
    arguments = (world.features, wins, world.agreement)
    contextual.descend(*arguments, link="logistic", steps=1, lr=0.1)  # compiles
    began = time.process_time()
    for _ in range(100):
        contextual.descend(*arguments, link="logistic", steps=100, lr=0.1)
    assert time.process_time() - began < 1
