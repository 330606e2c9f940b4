"""The five-armed bandit: against plain autograd, values by hand, the paper's tables and figures."""

import math
import time
from collections import Counter

import numpy as np
import pytest
import torch

from beyond_dpo import bandit

LINKS = ["dpo", "mallows_phi"]
PHI = 0.05
EPSILON = 0.05
NET = np.array([4, 3, 3, -1, -9])  # wins less losses of each arm in Table 5
each_link = pytest.mark.parametrize("link", LINKS)


def centred(logits):
    """Return logits less their mean over the arms, which a softmax does not see."""
    return logits - logits.mean(-1, keepdims=True)


# ---- against plain autograd


def bracket(t):
    """Return Eq. 9 for s = t > 0, as printed."""
    next_t = t + 1
    first = next_t / (1 - PHI**next_t)
    second = t / (1 - PHI**t)
    return first - second


def cubic():
    """Return (a1, a3) of section 3.4: 1/2 + a1 s + a3 s^3.

    It has the value and the slope of Eq. 9 at s = epsilon.
    """
    t = torch.tensor(EPSILON, dtype=torch.float64, requires_grad=True)
    value = bracket(t)
    (slope,) = torch.autograd.grad(value, t)
    of_value = [EPSILON, EPSILON**3]
    of_slope = [1, 3 * EPSILON**2]
    matrix = torch.tensor([of_value, of_slope], dtype=torch.float64)
    wanted = torch.stack([value.detach() - 0.5, slope])
    return torch.linalg.solve(matrix, wanted)


def phi_link(s):
    a1, a3 = cubic()
    inside = s.abs() < EPSILON
    smooth = 0.5 + a1 * s + a3 * s**3
    distance = torch.where(inside, 1.0, s.abs())
    right_of_0 = bracket(distance)
    exact = torch.where(s > 0, right_of_0, 1 - right_of_0)
    return torch.where(inside, smooth, exact)


def descend_with_autograd(betas, link, steps, lr):
    """Return the arms' probabilities (steps + 1, k, 5) and s of all pairs (steps, k, 16).

    Written out: log-softmax, log-ratios to the uniform reference, mean of -log g, autograd.
    """
    g = torch.sigmoid if link == "dpo" else phi_link
    beta = torch.tensor(betas, dtype=torch.float64).unsqueeze(1)
    theta = torch.zeros(len(betas), 5, dtype=torch.float64)
    winners, losers = torch.tensor(bandit.PAIRS).T
    log_reference = math.log(1 / 5)
    probabilities = [theta.softmax(-1)]
    scores = []
    for _ in range(steps):
        theta.requires_grad_()
        log_ratio = theta.log_softmax(-1) - log_reference
        winner_log_ratio = log_ratio[:, winners]
        loser_log_ratio = log_ratio[:, losers]
        s = beta * (winner_log_ratio - loser_log_ratio)
        log_likelihood = g(s).log()
        loss = -log_likelihood.mean(-1).sum()
        (gradient,) = torch.autograd.grad(loss, theta)
        theta = theta.detach() - lr * gradient
        probabilities.append(theta.softmax(-1))
        scores.append(s.detach())
    return torch.stack(probabilities).numpy(), torch.stack(scores).numpy()


@each_link
def test_equals_plain_autograd(link):
    betas = [0.02, 0.05, 0.1, 0.5, 2.0]
    steps_done, probabilities = bandit.train(betas, link=link, steps=2000, record_every=1)
    wanted, scores = descend_with_autograd(betas, link, 2000, lr=5e-3)
    assert steps_done.dtype.kind == "i"
    assert steps_done.tolist() == list(range(2001))
    assert probabilities.dtype == np.float64
    error = np.abs(probabilities - wanted)
    assert error.max() < 1e-9
    # All three pieces of the link were compared.
    assert (np.abs(scores) < EPSILON).any()
    assert (scores > EPSILON).any()
    assert (scores < -EPSILON).any()


# ---- what must hold


@pytest.mark.parametrize("link, slope", [("dpo", 0.5), ("mallows_phi", 2 * 6.947840)])
def test_first_step_by_hand(link, slope):
    """At s = 0 d(-log g)/ds is -1/2 for DPO and -a1 / (1/2) for the cubic.

    So θ moves by lr β slope net / 16.
    """
    beta = 0.3
    lr = 0.2
    _, probabilities = bandit.train([beta], link=link, steps=1, lr=lr, record_every=1)
    logits = np.log(probabilities[1, 0])
    step = lr * beta * slope
    wanted = step * NET / 16
    np.testing.assert_allclose(centred(logits), wanted, rtol=1e-6)


@each_link
def test_beta_and_lr_trade_places(link):
    """s = β Δ moves by lr β² times a function of s.

    So twice β and a quarter of lr leave s as it is, and halve the logits.
    """
    _, weak = bandit.train([0.5], link=link, lr=0.4, steps=1000)
    _, strong = bandit.train([1.0], link=link, lr=0.1, steps=1000)
    weak_logits = np.log(weak)
    strong_logits = np.log(strong)
    np.testing.assert_allclose(centred(weak_logits), 2 * centred(strong_logits), atol=1e-12)


def test_records():
    steps, probabilities = bandit.train([0.3, 0.1], link="dpo", steps=3000)
    assert steps.tolist() == list(range(0, 3001, 100))
    assert probabilities.shape == (31, 2, 5)


def test_a_beta_does_not_depend_on_its_neighbours_nor_on_what_is_recorded():
    betas = [0.3, 0.1, 4.0]
    _, of_three = bandit.train(betas, link="mallows_phi", steps=3000)
    steps, alone = bandit.train([0.1], link="mallows_phi", steps=3000, record_every=1500)
    assert steps.tolist() == [0, 1500, 3000]
    assert alone.shape == (3, 1, 5)
    at_these_steps = of_three[[0, 15, 30]]
    second = at_these_steps[:, 1]
    assert (second == alone[:, 0]).all()


def test_slope_of_the_link_far_below_0():
    """There it tends to ln φ - 1/t, though g itself is too small for a float."""
    q, u, v = bandit._phi_link(1e4)
    assert q == 0
    log_slope = -v / u
    limit = -math.log(PHI)
    assert log_slope == pytest.approx(limit - 1e-4, abs=1e-6)


@each_link
def test_large_steps_stay_finite(link):
    _, probabilities = bandit.train([1e3], link=link, lr=1e3, steps=100)
    assert np.isfinite(probabilities).all()


# ---- the paper's tables


def test_rewards_as_printed():
    assert bandit.MEANS == pytest.approx([15.5, 16.5, 16.5, 14.95, 1.03])
    for arm in bandit.REWARDS:
        assert sum(probability for _, probability in arm) == pytest.approx(1)


def test_pairs_as_printed():
    """Arms count from 1 in the paper."""
    winners, losers = np.add(bandit.PAIRS, 1).T
    assert winners.tolist() == [3, 2, 2, 1, 3, 1, 1, 1, 4, 2, 2, 2, 1, 3, 3, 4]
    assert losers.tolist() == [5, 5, 5, 2, 5, 5, 4, 5, 5, 4, 1, 5, 3, 5, 4, 2]


def test_net_wins():
    winners, losers = zip(*bandit.PAIRS, strict=True)
    wins = Counter(winners)
    wins.subtract(losers)
    assert [wins[arm] for arm in range(5)] == NET.tolist()


def test_reward_and_kl_of_uniform_policies():
    uniform = np.full((2, 3, 5), 0.2)
    rewards = bandit.reward(uniform)
    kls = bandit.kl(uniform)
    assert rewards == pytest.approx(np.full((2, 3), 12.896))
    assert kls.shape == (2, 3)
    assert (kls == 0).all()


def test_reward_and_kl_of_single_arms():
    single = np.eye(5)
    assert bandit.reward(single) == pytest.approx(bandit.MEANS)
    assert bandit.kl(single) == pytest.approx(np.full(5, math.log(5)))


def test_kl_by_hand():
    assert bandit.kl([0.5, 0.5, 0, 0, 0]) == pytest.approx(math.log(5 / 2))


@pytest.mark.parametrize("measure", [bandit.reward, bandit.kl])
def test_four_arms_are_refused(measure):
    with pytest.raises(ValueError):
        measure(np.full((2, 4), 0.25))


# ---- the paper's figures

# From an earlier, separate replay that meets the printed figures to the eye (the paper prints no
# numbers of them).
BETAS = [0.02, 0.05, 0.1, 0.3, 0.5, 1.0]
# P(arm 1) at 100k, ..., 500k steps.
FIGURE_9_CURVES = {
    ("dpo", 0.05): [0.524, 0.729, 0.865, 0.937, 0.971],
    ("dpo", 0.1): [0.731, 0.926],
}
# P of all arms at the end.
FIGURE_9_ENDS = {
    ("dpo", 0.05): [0.971, 0.012, 0.016, 0.000, 0.000],
    ("dpo", 0.1): [0.995, 0.002, 0.003, 0.000, 0.000],
    ("mallows_phi", 0.05): [0.421, 0.400, 0.155, 0.024, 0.000],
    ("mallows_phi", 0.1): [0.343, 0.334, 0.208, 0.115, 0.000],
}


@pytest.fixture(scope="module")
def full():
    """Return {link: {β: arm probabilities (records, 5)}} of the paper's full length."""
    policies = {}
    for link in LINKS:
        _, probabilities = bandit.train(BETAS, link=link)
        policies[link] = {beta: probabilities[:, i] for i, beta in enumerate(BETAS)}
    return policies


@pytest.mark.parametrize("link, beta", FIGURE_9_CURVES)
def test_figure_9_on_the_way(full, link, beta):
    wanted = FIGURE_9_CURVES[link, beta]
    probabilities = full[link][beta]
    first_arm = probabilities[1000::1000, 0]
    assert first_arm[: len(wanted)] == pytest.approx(wanted, abs=6e-4)


@pytest.mark.parametrize("link, beta", FIGURE_9_ENDS)
def test_figure_9_at_the_end(full, link, beta):
    wanted = FIGURE_9_ENDS[link, beta]
    assert full[link][beta][-1] == pytest.approx(wanted, abs=6e-4)


@pytest.mark.parametrize(
    "link, beta, kl, reward",
    [("dpo", 0.3, 1.224, 15.590), ("mallows_phi", 0.02, 0.758, 15.991)],
)
def test_figure_8a(full, link, beta, kl, reward):
    """The rightmost point of each link."""
    probabilities = full[link][beta][-1]
    assert bandit.kl(probabilities) == pytest.approx(kl, abs=6e-4)
    assert bandit.reward(probabilities) == pytest.approx(reward, abs=6e-4)


@pytest.fixture
def figure_8b(full):
    """Return a function from a link to its mean KL and its mean reward of four β, by record."""

    def curves(link):
        policies = [full[link][beta] for beta in (0.05, 0.1, 0.5, 1.0)]
        kls = np.mean([bandit.kl(policy) for policy in policies], 0)
        rewards = np.mean([bandit.reward(policy) for policy in policies], 0)
        return kls, rewards

    return curves


def test_figure_8b_dpo_at_its_peak(figure_8b):
    kls, rewards = figure_8b("dpo")
    peak = rewards.argmax()
    assert kls[peak] == pytest.approx(0.505, abs=6e-4)
    assert rewards[peak] == pytest.approx(15.876, abs=6e-4)


def test_figure_8b_mallows_phi_at_its_end(figure_8b):
    kls, rewards = figure_8b("mallows_phi")
    assert kls[-1] == pytest.approx(0.3033, abs=6e-4)
    assert rewards[-1] == pytest.approx(15.918, abs=6e-4)


# ---- bad input, speed


@pytest.mark.parametrize(
    "name, value",
    [
        ("link", "theta"),
        ("link", None),
        ("betas", []),
        ("betas", 0.1),
        ("betas", [[0.1]]),
        ("betas", [0.1, 0.0]),
        ("betas", [-1.0]),
        ("betas", [math.nan]),
        ("lr", 0.0),
        ("lr", math.inf),
        ("steps", 0),
        ("steps", 150),
        ("steps", 100.5),
        ("steps", math.inf),
        ("record_every", 0),
        ("record_every", 0.5),
        ("record_every", math.nan),
    ],
)
def test_bad_input_is_named(name, value):
    arguments = {"betas": [0.1], "link": "dpo", "steps": 100}
    arguments[name] = value
    message = f"^{name} must|^steps must be a positive multiple of {name}"
    with pytest.raises(ValueError, match=message):
        bandit.train(**arguments)


@pytest.mark.usefixtures("full")  # by which all is compiled
def test_time():
    """All of Figures 8 and 9 may take 10 s on one core.

    A tenth of the steps may take 1 s, which is five times what it needs. Processor time is
    measured, as other processes would lengthen any other.
    """
    betas = np.geomspace(0.02, 5, 16)
    began = time.process_time()
    for link in LINKS:
        bandit.train(betas, link=link, steps=50_000)
    assert time.process_time() - began < 1
