"""The five-armed bandit: the compiled loop against plain autograd, values by hand, the paper's
tables and figures.
"""

import math
import time
from collections import Counter

import numpy as np
import pytest
import torch

from beyond_dpo import bandit

LINKS = ["dpo", "mallows_phi"]
PHI, EPSILON = 0.05, 0.05
each_link = pytest.mark.parametrize("link", LINKS)


def bracket(t):
    """Eq. 9 for s = t > 0, as printed."""
    return (t + 1) / (1 - PHI ** (t + 1)) - t / (1 - PHI**t)


def cubic():
    """Section 3.4: 1/2 + a1 s + a3 s^3 with the value and the slope of Eq. 9 at s = epsilon."""
    t = torch.tensor(EPSILON, dtype=torch.float64, requires_grad=True)
    value = bracket(t)
    (slope,) = torch.autograd.grad(value, t)
    matrix = torch.tensor([[EPSILON, EPSILON**3], [1, 3 * EPSILON**2]], dtype=torch.float64)
    return torch.linalg.solve(matrix, torch.stack([value.detach() - 0.5, slope]))


def g(s, link):
    if link == "dpo":
        return torch.sigmoid(s)
    a1, a3 = cubic()
    inside = s.abs() < EPSILON
    sign = torch.sign(s)
    exact = (1 - sign) / 2 + sign * bracket(torch.where(inside, 1.0, s.abs()))
    return torch.where(inside, 0.5 + a1 * s + a3 * s**3, exact)


def oracle(betas, link, steps, lr):
    """Log-softmax, log-ratios to the uniform reference, mean of -log g, autograd: (steps + 1, k,
    5), (steps, k, 16).
    """
    beta = torch.tensor(betas, dtype=torch.float64)[:, None]
    theta = torch.zeros(len(betas), 5, dtype=torch.float64, requires_grad=True)
    winners, losers = torch.tensor(bandit.PAIRS).T
    probs, scores = [theta.detach().softmax(-1)], []
    for _ in range(steps):
        logratio = theta.log_softmax(-1) - math.log(1 / 5)
        s = beta * (logratio[:, winners] - logratio[:, losers])
        (grad,) = torch.autograd.grad(-g(s, link).log().mean(-1).sum(), theta)
        theta = (theta.detach() - lr * grad).requires_grad_()
        probs.append(theta.detach().softmax(-1))
        scores.append(s.detach())
    return torch.stack(probs).numpy(), torch.stack(scores).numpy()


@each_link
def test_equals_plain_autograd(link):
    betas, steps = [0.02, 0.05, 0.1, 0.5, 2.0], 2000
    at, probs = bandit.train(betas, link=link, steps=steps, record_every=1)
    expected, scores = oracle(betas, link, steps, lr=5e-3)
    assert at.tolist() == list(range(steps + 1)) and at.dtype.kind == "i"
    assert probs.dtype == np.float64 and np.abs(probs - expected).max() < 1e-9
    # All three pieces of the link were compared.
    assert (
        (np.abs(scores) < EPSILON).any() and (scores > EPSILON).any() and (scores < -EPSILON).any()
    )


NET = np.array([4, 3, 3, -1, -9])  # wins less losses of each arm in Table 5


@pytest.mark.parametrize(("link", "slope"), [("dpo", 0.5), ("mallows_phi", 2 * 6.947840)])
def test_first_step_by_hand(link, slope):
    """At s = 0 d(-log g)/ds is -1/2 for DPO and -a1 / (1/2) for the cubic, so θ moves by lr β slope
    net / 16.
    """
    beta, lr = 0.3, 0.2
    _, probs = bandit.train([beta], link=link, steps=1, lr=lr, record_every=1)
    logits = np.log(probs[1, 0])
    np.testing.assert_allclose(logits - logits.mean(), lr * beta * slope * NET / 16, rtol=1e-6)


@each_link
def test_beta_and_lr_trade_places(link):
    """s = β Δ moves by lr β² times a function of s: twice β and a quarter of lr leave s, and halve
    the logits.
    """
    _, a = bandit.train([0.5], link=link, lr=0.4, steps=1000)
    _, b = bandit.train([1.0], link=link, lr=0.1, steps=1000)
    a, b = np.log(a), np.log(b)
    np.testing.assert_allclose(
        a - a.mean(-1, keepdims=True), 2 * (b - b.mean(-1, keepdims=True)), atol=1e-12
    )


def test_a_beta_does_not_depend_on_its_neighbours_nor_on_what_is_recorded():
    steps, many = bandit.train([0.3, 0.1, 4.0], link="mallows_phi", steps=3000)
    few_steps, one = bandit.train([0.1], link="mallows_phi", steps=3000, record_every=1500)
    assert many.shape == (31, 3, 5) and steps.tolist() == list(range(0, 3001, 100))
    assert one.shape == (3, 1, 5) and few_steps.tolist() == [0, 1500, 3000]
    assert (many[[0, 15, 30], 1] == one[:, 0]).all()


def test_link_far_out():
    """-log g stays finite: far below 0 its slope tends to ln φ - 1/t, far above 0 the gradient is
    gone.
    """
    q, u, v = bandit._phi_link(1e4)
    assert q == 0 and -v / u == pytest.approx(-math.log(PHI) - 1e-4, abs=1e-6)
    for link in LINKS:
        assert np.isfinite(bandit.train([1e3], link=link, lr=1e3, steps=100)[1]).all()


def test_tables_as_printed():
    assert bandit.MEANS == pytest.approx([15.5, 16.5, 16.5, 14.95, 1.03])
    assert all(sum(p for _, p in arm) == pytest.approx(1) for arm in bandit.REWARDS)
    win = "3 2 2 1 3 1 1 1 4 2 2 2 1 3 3 4".split()
    lose = "5 5 5 2 5 5 4 5 5 4 1 5 3 5 4 2".split()
    assert list(bandit.PAIRS) == [(int(w) - 1, int(x) - 1) for w, x in zip(win, lose, strict=True)]
    wins, losses = (Counter(side) for side in zip(*bandit.PAIRS, strict=True))
    assert [wins[arm] - losses[arm] for arm in range(5)] == NET.tolist()


def test_reward_and_kl():
    uniform, single = np.full((2, 3, 5), 0.2), np.eye(5)
    assert bandit.reward(uniform) == pytest.approx(np.full((2, 3), 12.896))
    assert (bandit.kl(uniform) == 0).all() and bandit.kl(uniform).shape == (2, 3)
    assert bandit.reward(single) == pytest.approx(bandit.MEANS)
    assert bandit.kl(single) == pytest.approx(np.full(5, math.log(5)))
    assert bandit.kl([0.5, 0.5, 0, 0, 0]) == pytest.approx(math.log(5 / 2))
    for wrong in (bandit.reward, bandit.kl):
        with pytest.raises(ValueError):
            wrong(np.full((2, 4), 0.25))


# From an earlier, separate replay that meets the printed figures to the eye (the paper prints no
# numbers of them).
FIGURE_9 = {  # P(arm 1) at 100k, ..., 500k steps, and all arms at the end
    ("dpo", 0.05): ([0.524, 0.729, 0.865, 0.937, 0.971], [0.971, 0.012, 0.016, 0.000, 0.000]),
    ("dpo", 0.1): ([0.731, 0.926], [0.995, 0.002, 0.003, 0.000, 0.000]),
    ("mallows_phi", 0.05): ([], [0.421, 0.400, 0.155, 0.024, 0.000]),
    ("mallows_phi", 0.1): ([], [0.343, 0.334, 0.208, 0.115, 0.000]),
}
FIGURE_8A = [
    ("dpo", 0.3, 1.224, 15.590),
    ("mallows_phi", 0.02, 0.758, 15.991),
]  # β of the rightmost points, KL, reward
FIGURE_8B = {
    "dpo": (0.505, 15.876),
    "mallows_phi": (0.3033, 15.918),
}  # KL and reward, mean of four β: peak, end


@pytest.fixture(scope="module")
def full():
    betas = [0.02, 0.05, 0.1, 0.3, 0.5, 1.0]
    return betas, {link: bandit.train(betas, link=link)[1] for link in LINKS}


@pytest.mark.parametrize(("link", "beta"), FIGURE_9)
def test_figure_9(full, link, beta):
    curve, end = FIGURE_9[link, beta]
    probs = full[1][link][:, full[0].index(beta)]
    assert probs[1000::1000, 0][: len(curve)] == pytest.approx(curve, abs=6e-4)
    assert probs[-1] == pytest.approx(end, abs=6e-4)


@pytest.mark.parametrize(("link", "beta", "kl", "reward"), FIGURE_8A)
def test_figure_8a(full, link, beta, kl, reward):
    probs = full[1][link][-1, full[0].index(beta)]
    assert bandit.kl(probs) == pytest.approx(kl, abs=6e-4) and bandit.reward(
        probs
    ) == pytest.approx(reward, abs=6e-4)


@each_link
def test_figure_8b(full, link):
    four = full[1][link][:, [full[0].index(b) for b in (0.05, 0.1, 0.5, 1.0)]]
    rewards, kls = bandit.reward(four).mean(1), bandit.kl(four).mean(1)
    best = rewards.argmax() if link == "dpo" else -1
    assert (kls[best], rewards[best]) == pytest.approx(FIGURE_8B[link], abs=6e-4)


GOOD = {"betas": [0.1], "link": "dpo", "steps": 100}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("link", "theta"),
        ("link", None),
        ("betas", []),
        ("betas", 0.1),
        ("betas", [[0.1]]),
        ("betas", [0.1, 0.0]),
    ]
    + [
        ("betas", [-1.0]),
        ("betas", [math.nan]),
        ("lr", 0.0),
        ("lr", math.inf),
        ("steps", 0),
        ("steps", 150),
    ]
    + [
        ("steps", 100.5),
        ("steps", math.inf),
        ("record_every", 0),
        ("record_every", 0.5),
        ("record_every", math.nan),
    ],
)
def test_bad_input_is_named(name, value):
    with pytest.raises(
        ValueError, match=f"^{name} must|^steps must be a positive multiple of {name}"
    ):
        bandit.train(**{**GOOD, name: value})


def test_time(full):
    """All of Figures 8 and 9 may take 10 s on one core: a tenth of the steps in 1 s, which is five
    times what it needs.

    Processor time, as other processes would lengthen any other; compiled by `full` before.
    """
    began = time.process_time()
    for link in LINKS:
        bandit.train(np.geomspace(0.02, 5, 16), link=link, steps=50_000)
    assert time.process_time() - began < 1
