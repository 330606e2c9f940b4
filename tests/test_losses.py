"""Pairwise losses: values derived by hand, limits, gradients, and faults."""

import dataclasses
import inspect
import itertools
import math
import typing
from decimal import Decimal, localcontext

import pytest
import torch
from torch.testing import assert_close

from beyond_dpo.jobs import settings as job_settings
from beyond_dpo.losses import (
    LOSSES,
    PAIRS,
    dpo,
    hybrid,
    ipo,
    mallows_ipo,
    mallows_link,
    mallows_phi,
    mallows_simpo,
    mallows_theta,
    simpo,
    wrpo,
    wrpo_ipo,
    wrpo_simpo,
)

LN2 = math.log(2)
LN3 = math.log(3)


def tensor(*values, dtype=torch.float64, grad=False):
    return torch.tensor(values, dtype=dtype, requires_grad=grad)


def constant(like, value):
    return torch.full((len(like),), value)


def drawn(count, seed, size=64, dtype=torch.float64):
    """Return `count` tensors (size,) from a normal distribution."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, size, generator=generator, dtype=dtype)


def assert_values(found, expected, **tolerance):
    assert found.tolist() == pytest.approx(expected, **tolerance)


def assert_same(found, expected):
    assert_close(found, expected, rtol=0, atol=0)


OF_A_PAIR = {
    "dpo": lambda chosen, rejected: dpo(chosen, rejected, beta=0.1),
    "dpo_smooth": lambda chosen, rejected: dpo(chosen, rejected, beta=0.1, label_smoothing=0.2),
    "ipo": lambda chosen, rejected: ipo(chosen, rejected, tau=0.1),
    "simpo": lambda chosen, rejected: simpo(chosen, rejected, beta=2.0, gamma=0.5),
    "mallows_theta": lambda chosen, rejected: mallows_theta(
        chosen, rejected, constant(chosen, 1.7), beta=0.1
    ),
    "mallows_ipo": lambda chosen, rejected: mallows_ipo(
        chosen, rejected, constant(chosen, 1.7), tau=0.1
    ),
    "mallows_simpo": lambda chosen, rejected: mallows_simpo(
        chosen, rejected, constant(chosen, 1.7), beta=2.0, gamma=0.5
    ),
    "mallows_phi": lambda chosen, rejected: mallows_phi(
        chosen, rejected, constant(chosen, 0.3), beta=0.1, epsilon=0.05
    ),
    "wrpo": lambda chosen, rejected: wrpo(chosen, chosen / 2, rejected, alpha=0.3, beta=0.1),
    "wrpo_ipo": lambda chosen, rejected: wrpo_ipo(chosen, chosen / 2, rejected, alpha=0.3, tau=0.1),
    "wrpo_simpo": lambda chosen, rejected: wrpo_simpo(
        chosen, chosen / 2, rejected, alpha=0.3, beta=2.0, gamma=0.5
    ),
    "hybrid": lambda chosen, rejected: hybrid(chosen, chosen / 2, rejected, beta=0.1),
}
each_loss = pytest.mark.parametrize("loss", OF_A_PAIR.values(), ids=OF_A_PAIR)


# ---- DPO


@pytest.mark.parametrize("beta", [0.01, 0.1, 5.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.49])
def test_dpo_is_ln2_where_policy_equals_reference(beta, smoothing):
    zeros = tensor(0.0, 0.0)
    losses, chosen, rejected = dpo(zeros, zeros, beta=beta, label_smoothing=smoothing)
    assert_values(losses, [LN2, LN2], abs=1e-15)
    assert chosen.tolist() == [0.0, 0.0]
    assert rejected.tolist() == [0.0, 0.0]


def test_dpo_hand_values():
    """beta 0.5, log-ratios 2 ln 3 and 0: s = 0.5 * 2 ln 3 = ln 3, sigmoid(s) = 3/4, loss ln(4/3).

    The other way round s = -ln 3, sigmoid(s) = 1/4, and the loss is ln 4. A shift of both
    log-ratios changes no loss.
    """
    high = 2 * LN3
    chosen = tensor(high, 0.0, high + 7)
    rejected = tensor(0.0, high, 7.0)
    losses, chosen_reward, rejected_reward = dpo(chosen, rejected, beta=0.5)
    right = math.log(4 / 3)
    wrong = math.log(4)
    assert_values(losses, [right, wrong, right], abs=1e-14)
    assert_values(chosen_reward, [LN3, 0.0, LN3 + 3.5])
    assert_values(rejected_reward, [0.0, LN3, 3.5])


def test_dpo_gradient_by_hand():
    """d loss / d chosen = -beta * sigmoid(-s): -0.5 / 4 at s = ln 3 and beta 0.5."""
    chosen = tensor(2 * LN3, grad=True)
    rejected = tensor(0.0, grad=True)
    losses, _, _ = dpo(chosen, rejected, beta=0.5)
    losses.sum().backward()
    assert_values(chosen.grad, [-0.125])
    assert_values(rejected.grad, [0.125])


def test_label_smoothing_is_the_plain_loss_plus_e_times_s():
    """-log sigmoid(-s) = s - log sigmoid(s), so (1-e) L(s) + e L(-s) = L(s) + e * s."""
    chosen, rejected = 20 * drawn(2, seed=0)
    plain, _, _ = dpo(chosen, rejected, beta=0.3)
    flipped, _, _ = dpo(rejected, chosen, beta=0.3)
    smooth, _, _ = dpo(chosen, rejected, beta=0.3, label_smoothing=0.2)
    s = 0.3 * (chosen - rejected)
    assert_close(smooth, 0.8 * plain + 0.2 * flipped)
    assert_close(smooth, plain + 0.2 * s)


def test_dpo_is_linear_when_the_policy_is_far_on_the_wrong_side():
    """s = 0.1 * (-2e4): log(1 + e^2000) is 2000, where a naive log(sigmoid) is infinite."""
    chosen = tensor(-1e4, dtype=torch.float32)
    rejected = tensor(1e4, dtype=torch.float32)
    losses, _, _ = dpo(chosen, rejected, beta=0.1)
    assert_values(losses, [2000.0], rel=1e-6)


def test_half_precision_inputs_are_not_rounded_again():
    """1.0, 0.00390625 and their difference are exact in bfloat16, but beta times it is not."""
    chosen = tensor(1.0, dtype=torch.float32)
    rejected = tensor(0.00390625, dtype=torch.float32)
    half = dpo(chosen.bfloat16(), rejected.bfloat16(), beta=0.1)
    assert_same(half, dpo(chosen, rejected, beta=0.1))


# ---- IPO, SimPO


def test_ipo_hand_values():
    """tau 0.1: the target is 1 / 0.2 = 5; h = 5, 0, 7 and -1 give 0, 25, 4 and 36."""
    chosen = tensor(5.0, 1.0, 3.0, -4.0)
    rejected = tensor(0.0, 1.0, -4.0, -3.0)
    losses, chosen_reward, rejected_reward = ipo(chosen, rejected, tau=0.1)
    assert_values(losses, [0.0, 25.0, 4.0, 36.0], abs=1e-12)
    assert_values(chosen_reward, [0.5, 0.1, 0.3, -0.4])
    assert_values(rejected_reward, [0.0, 0.1, -0.4, -0.3])


@pytest.mark.parametrize("tau", [0.01, 0.1, 1.0])
def test_ipo_minimum_is_at_half_over_tau(tau):
    target = 1 / (2 * tau)
    chosen = tensor(target, target - 0.01, target + 0.01, grad=True)
    losses, _, _ = ipo(chosen, tensor(0.0, 0.0, 0.0), tau=tau)
    losses.sum().backward()
    at_target, below, above = chosen.grad
    assert losses[0] == 0
    assert_values(losses[1:], [1e-4, 1e-4])
    assert at_target == 0
    assert below < 0 < above


def test_simpo_hand_values():
    """beta 2, gamma 0.5: means -1 and -1.25 give rewards that differ by exactly gamma, loss ln 2.

    Equal means: s = -0.5, loss = ln(1 + e^0.5) = 0.974077. gamma is the margin itself, not a share
    of beta.
    """
    chosen = tensor(-1.0, -1.0)
    rejected = tensor(-1.25, -1.0)
    losses, chosen_reward, rejected_reward = simpo(chosen, rejected, beta=2.0, gamma=0.5)
    of_equal_means = math.log1p(math.exp(0.5))
    assert of_equal_means == pytest.approx(0.974077, abs=1e-6)
    assert_values(losses, [LN2, of_equal_means], abs=1e-14)
    assert chosen_reward.tolist() == [-2.0, -2.0]
    assert rejected_reward.tolist() == [-2.5, -2.0]


def test_simpo_without_margin_is_dpo_on_the_same_numbers():
    chosen = tensor(-0.5, -2.0)
    rejected = tensor(-1.5, -0.1)
    without_margin = simpo(chosen, rejected, beta=2.0, gamma=0.0)
    assert_close(without_margin, dpo(chosen, rejected, beta=2.0))


# ---- every loss


@each_loss
def test_gradient_equals_finite_differences(loss):
    chosen = tensor(-3.0, 0.2, 4.0, grad=True)
    rejected = tensor(1.0, -0.7, 3.5, grad=True)

    def losses(chosen, rejected):
        return loss(chosen, rejected)[0]

    assert torch.autograd.gradcheck(losses, (chosen, rejected), eps=1e-6, atol=1e-8)


@each_loss
def test_rewards_are_detached(loss):
    losses, chosen, rejected = loss(tensor(1.0, grad=True), tensor(0.0, grad=True))
    assert losses.requires_grad
    assert not chosen.requires_grad
    assert not rejected.requires_grad


@each_loss
def test_the_loss_of_a_pair_does_not_depend_on_its_batch(loss):
    losses, chosen, rejected = loss(tensor(1.0, 2.0, 3.0), tensor(0.0, 0.0, 0.0))
    assert losses.shape == chosen.shape == rejected.shape == (3,)
    alone, _, _ = loss(tensor(2.0), tensor(0.0))
    assert losses[1].item() == alone.item()


@each_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_magnitudes_stay_finite(loss, dtype):
    chosen = tensor(3e4, -3e4, 0.0, dtype=dtype, grad=True)
    losses, chosen_reward, rejected_reward = loss(chosen, -chosen.detach())
    losses.sum().backward()
    for values in (losses, chosen_reward, rejected_reward, chosen.grad):
        assert values.isfinite().all()
    assert losses.dtype == torch.float32
    assert chosen_reward.dtype == torch.float32
    assert chosen.grad.dtype == dtype
    assert (losses >= 0).all()


NO_VECTORS = {
    "length": (torch.zeros(2), torch.zeros(3), "differ in length"),
    "broadcast": (torch.zeros(1), torch.zeros(3), "differ in length"),
    "matrix": (
        torch.zeros(2, 1),
        torch.zeros(2, 1),
        r"chosen: expected a float tensor of shape \(batch,\)",
    ),
    "scalar": (
        torch.zeros(2),
        torch.tensor(0.0),
        r"rejected: expected .* got \(\) torch.float32",
    ),
    "integer": (
        torch.zeros(2, dtype=torch.long),
        torch.zeros(2),
        "chosen: expected .* torch.int64",
    ),
    "list": (torch.zeros(2), [0.0, 0.0], "rejected: expected .* got list"),
}


@each_loss
@pytest.mark.parametrize("chosen, rejected, message", NO_VECTORS.values(), ids=NO_VECTORS)
def test_wrong_inputs_raise(loss, chosen, rejected, message):
    with pytest.raises(ValueError, match=message):
        loss(chosen, rejected)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda x: dpo(x, x, beta=0.0), "beta"),
        (lambda x: dpo(x, x, beta=float("nan")), "beta"),
        (lambda x: dpo(x, x, beta=0.1, label_smoothing=0.5), "label_smoothing"),
        (lambda x: dpo(x, x, beta=0.1, label_smoothing=-0.1), "label_smoothing"),
        (lambda x: ipo(x, x, tau=-1.0), "tau"),
        (lambda x: simpo(x, x, beta=-2.0, gamma=0.5), "beta"),
        (lambda x: simpo(x, x, beta=2.0, gamma=-0.5), "gamma"),
        (lambda x: mallows_theta(x, x, x + 1, beta=0.0), "beta"),
        (lambda x: mallows_ipo(x, x, x + 1, tau=0.0), "tau"),
        (lambda x: mallows_simpo(x, x, x + 1, beta=2.0, gamma=-0.5), "gamma"),
        (lambda x: mallows_phi(x, x, x + 0.5, beta=-1.0, epsilon=0.1), "beta"),
        (lambda x: mallows_phi(x, x, x + 0.5, beta=1.0, epsilon=0.0), "epsilon"),
        (lambda x: mallows_link(x, x + 0.5, -0.1), "epsilon"),
        (lambda x: mallows_link(0.5, x + 0.5, 0.1), "s: expected .* got float"),
    ],
)
def test_parameters_out_of_range_raise(call, message):
    with pytest.raises(ValueError, match=message):
        call(tensor(0.0))


# ---- MallowsPO: weights


WEIGHTED = {
    "theta": (mallows_theta, dpo, {"beta": 0.1}),
    "ipo": (mallows_ipo, ipo, {"tau": 0.1}),
    "simpo": (mallows_simpo, simpo, {"beta": 2.0, "gamma": 0.5}),
}
each_weighted = pytest.mark.parametrize(
    "weighted, plain, settings", WEIGHTED.values(), ids=WEIGHTED
)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])


@each_weighted
@each_dtype
def test_weight_one_is_the_plain_loss(weighted, plain, settings, dtype):
    chosen, rejected = drawn(2, seed=1, dtype=torch.float32).to(dtype) * 30
    expected = plain(chosen, rejected, **settings)
    assert_same(weighted(chosen, rejected, torch.ones(64), **settings), expected)


@each_weighted
@each_dtype
def test_a_weight_changes_the_loss_but_not_the_rewards(weighted, plain, settings, dtype):
    chosen, rejected = drawn(2, seed=1, dtype=torch.float32).to(dtype) * 30
    plain_losses, *plain_rewards = plain(chosen, rejected, **settings)
    losses, *rewards = weighted(chosen, rejected, constant(chosen, 3.0), **settings)
    assert (losses != plain_losses).any()
    assert_same(rewards, plain_rewards)


def test_mallows_theta_hand_values():
    """beta 0.5, log-ratios 2 ln 3 and 0, weights 1, 2, 1/2: s = ln 3, 2 ln 3, ln(3)/2.

    The loss is ln(1 + e^-s).
    """
    chosen = tensor(2 * LN3, 2 * LN3, 2 * LN3)
    rejected = tensor(0.0, 0.0, 0.0)
    weight = tensor(1.0, 2.0, 0.5)
    losses, _, _ = mallows_theta(chosen, rejected, weight, beta=0.5)
    expected = [math.log(4 / 3), math.log(10 / 9), math.log1p(3**-0.5)]
    assert_values(losses, expected, abs=1e-14)


def test_mallows_ipo_hand_values():
    """tau 0.1, target 5: h = 2 with weights 1, 2.5 and 3 gives 9, 0 and 1."""
    chosen = tensor(2.0, 2.0, 2.0)
    rejected = tensor(0.0, 0.0, 0.0)
    weight = tensor(1.0, 2.5, 3.0)
    losses, _, _ = mallows_ipo(chosen, rejected, weight, tau=0.1)
    assert_values(losses, [9.0, 0.0, 1.0], abs=1e-14)


def test_mallows_simpo_hand_values():
    """beta 2, gamma 0.5, means 1 apart: logit 1.5; weight 2 gives 3, so it weighs gamma too."""
    chosen = tensor(-1.0, -1.0)
    rejected = tensor(-2.0, -2.0)
    weight = tensor(1.0, 2.0)
    losses, _, _ = mallows_simpo(chosen, rejected, weight, beta=2.0, gamma=0.5)
    expected = [math.log1p(math.exp(-1.5)), math.log1p(math.exp(-3.0))]
    assert_values(losses, expected, abs=1e-14)


CONSTANTS = {
    "theta": (lambda x, weight: mallows_theta(x, x, weight, beta=1.0)[0], "weight", "inf"),
    "ipo": (lambda x, weight: mallows_ipo(x, x, weight, tau=1.0)[0], "weight", "inf"),
    "simpo": (
        lambda x, weight: mallows_simpo(x, x, weight, beta=1.0, gamma=0.0)[0],
        "weight",
        "inf",
    ),
    "phi": (lambda x, phi: mallows_phi(x, x, phi, beta=1.0, epsilon=0.1)[0], "phi", "1.0"),
    "link": (lambda x, phi: mallows_link(x, phi, 0.1), "phi", "1.0"),
}
each_constant = pytest.mark.parametrize("call, name, below", CONSTANTS.values(), ids=CONSTANTS)


@each_constant
def test_bad_weights_and_dispersions_name_the_row(call, name, below):
    bad_values = [0.0, -0.5, math.inf, math.nan]
    if name == "phi":
        bad_values.append(1.0)
    for bad in bad_values:
        message = rf"{name} must be in \(0, {below}\), got {bad} in row 1"
        with pytest.raises(ValueError, match=message):
            call(tensor(0.0, 0.0, 0.0), tensor(0.5, bad, 0.0))


@each_constant
def test_weights_and_dispersions_are_one_for_each_pair(call, name, below):
    with pytest.raises(ValueError, match=f"{name} has 1 values for 2 pairs"):
        call(tensor(0.0, 0.0), tensor(0.5))
    with pytest.raises(ValueError, match=f"{name}: expected a float tensor .* got float"):
        call(tensor(0.0, 0.0), 0.5)


@each_constant
def test_no_gradient_flows_into_weights_and_dispersions(call, name, below):
    x = tensor(1.0, 2.0, grad=True)
    values = tensor(0.5, 0.5, grad=True)
    call(x, values).sum().backward()
    assert values.grad is None
    assert x.grad is not None


# ---- MallowsPO: the link and the phi loss


def link(s, phi, epsilon):
    s = torch.as_tensor(s, dtype=torch.float64)
    return mallows_link(s, torch.full_like(s, phi), epsilon)


def inversions(ranks):
    return sum(first > second for first, second in itertools.combinations(ranks, 2))


@pytest.mark.parametrize("phi", [0.05, 0.3, 0.95])
@pytest.mark.parametrize("better, worse", [(0, 1), (0, 2), (1, 4), (0, 5)])
def test_link_is_the_pairwise_chance_of_the_mallows_law(phi, better, worse):
    """Summed over all 720 rankings of 6 items, each with the chance phi^inversions / Z."""
    total = 0.0
    in_order = 0.0
    for ranks in itertools.permutations(range(6)):
        mass = phi ** inversions(ranks)
        total += mass
        if ranks[better] < ranks[worse]:
            in_order += mass
    chance = in_order / total
    distance = worse - better
    assert_values(link([distance, -distance], phi, 0.1), [chance, 1 - chance], abs=1e-13)


def test_link_published_values():
    """phi 0.3 at 1, 2, 5, and the jump at 0 for phi 0.05."""
    assert_values(link([1.0, 2.0, 5.0], 0.3, 0.1), [0.769231, 0.885445, 0.992198], abs=5e-7)
    assert_values(link([-1e-9, 1e-9], 0.05, 1e-12), [0.2812, 0.7188], abs=5e-5)


@pytest.mark.parametrize("phi", [1e-6, 0.05, 0.5, 1 - 1e-6])
def test_link_one_rank_apart(phi):
    """g(1) = 1 / (1 + phi)."""
    assert_values(link([1.0], phi, 0.1), [1 / (1 + phi)], abs=1e-15)


@pytest.mark.parametrize("phi", [1e-6, 0.05, 0.5, 0.99])
@pytest.mark.parametrize("epsilon", [0.05, 1.386])
def test_link_is_odd_about_a_half_and_rises(phi, epsilon):
    s = torch.arange(-1000, 1001, dtype=torch.float64) * 0.006
    g = link(s, phi, epsilon)
    assert_close(g + g.flip(0), torch.ones_like(g), rtol=0, atol=1e-15)
    rises = g.diff()
    assert (rises >= 0).all()
    assert (rises[900:1100] > 0).all()
    assert link([0.0], phi, epsilon).item() == 0.5


def test_cubic_of_the_bandit():
    """phi = epsilon = 0.05: G = 0.237798, D = 0.372183, a1 = 6.947840, a3 = -876.7543."""
    s = torch.linspace(-0.0499, 0.0499, 101, dtype=torch.float64)
    cubic = 0.5 + 6.947840 * s - 876.7543 * s**3
    assert_close(link(s, 0.05, 0.05), cubic, rtol=0, atol=1e-7)
    assert_values(link([0.05], 0.05, 0.05), [0.737798], abs=5e-7)


def test_slope_of_the_bandits_cubic():
    """a1 at 0, and D where the cubic ends, from both sides."""
    s = tensor(0.0, 0.05, 0.05 * (1 - 1e-12), grad=True)
    mallows_link(s, torch.full_like(s, 0.05), 0.05).sum().backward()
    assert_values(s.grad, [6.947840, 0.372183, 0.372183], abs=5e-7)


@pytest.mark.parametrize("phi", [1e-6, 0.05, 0.5, 0.999])
@pytest.mark.parametrize("epsilon", [0.01, 0.1, 1.386])
@pytest.mark.parametrize("sign", [1, -1])
def test_link_and_slope_are_continuous_where_the_cubic_ends(phi, epsilon, sign):
    s = sign * epsilon * tensor(1 - 1e-9, 1.0, 1 + 1e-9)
    s.requires_grad = True
    g = mallows_link(s, torch.full_like(s, phi), epsilon)
    (slope,) = torch.autograd.grad(g.sum(), s)
    assert g.max() - g.min() < 1e-7
    assert slope.max() - slope.min() < 1e-6


@pytest.mark.parametrize("phi", [1e-6, 0.05, 0.5, 0.99])
@pytest.mark.parametrize("epsilon", [0.05, 1.386])
def test_phi_gradient_equals_finite_differences(phi, epsilon):
    """Also at 0, where training starts and |s| has no derivative, and across the cubic's ends."""
    distances = [0.3 * epsilon, epsilon - 1e-3, epsilon + 1e-3, 1.5, 20.0, 300.0]
    opposite = [-distance for distance in distances]
    s = tensor(0.0, *distances, *opposite, grad=True)
    phis = torch.full_like(s, phi).detach()

    def losses(chosen):
        return mallows_phi(chosen, torch.zeros_like(s), phis, beta=1.0, epsilon=epsilon)[0]

    assert torch.autograd.gradcheck(losses, (s,), eps=1e-7, atol=2e-5, rtol=2e-5)


def exact_miss(t, p):
    """Return 1 - g(t) for t >= epsilon."""
    first = t / (p**-t - 1)
    second = (t + 1) / (p ** -(t + 1) - 1)
    return first - second


def printed_link(t, p):
    """Return g(t) for t > 0 as Eq. 9 is printed."""
    first = (t + 1) / (1 - p ** (t + 1))
    second = t / (1 - p**t)
    return first - second


def exact_slope(t, p):
    """Return g'(t) for t >= epsilon, Eq. 12."""
    q = p**t
    r = p ** (t + 1)
    first = (t + 1) * r / (1 - r) ** 2
    second = t * q / (1 - q) ** 2
    direct = 1 / (1 - r) - 1 / (1 - q)
    return direct + p.ln() * (first - second)


def exact_cubic(t, p, epsilon):
    """Return g(t) for 0 <= t < epsilon."""
    half = Decimal("0.5")
    rise = half - exact_miss(epsilon, p)
    slope = exact_slope(epsilon, p)
    a3 = (slope * epsilon - rise) / (2 * epsilon**3)
    a1 = rise / epsilon - a3 * epsilon**2
    return half + a1 * t + a3 * t**3


def exact_phi_loss(s: float, phi: float, epsilon: float) -> float:
    """Return -log g(s) in 60 digits."""
    with localcontext() as context:
        context.prec = 60
        p = Decimal(phi)
        t = abs(Decimal(s))
        if t < Decimal(epsilon):
            miss = 1 - exact_cubic(t, p, Decimal(epsilon))
        else:
            miss = exact_miss(t, p)
            if t < 5:
                assert abs(1 - miss - printed_link(t, p)) < Decimal("1e-40")
        chance = miss if s < 0 else 1 - miss
        return float(-chance.ln())


DISTANCES = [0.0, 0.01, 0.0499, 0.05, 0.0501, 0.7, 3.0, 40.0, 1e3, 1e4]
each_phi = pytest.mark.parametrize("phi", [1e-6, 1e-3, 0.05, 0.5, 0.99, 1 - 1e-6])


def phi_losses(distances, phi, dtype, epsilon):
    """Return s of both signs, phi, the losses and their gradients, each a tensor of `dtype`."""
    s = []
    for distance in distances:
        s += [distance, -distance]
    chosen = tensor(*s, dtype=dtype, grad=True)
    phis = torch.full_like(chosen, phi).detach()
    losses, _, _ = mallows_phi(chosen, torch.zeros_like(chosen), phis, beta=1.0, epsilon=epsilon)
    losses.sum().backward()
    return chosen, phis, losses, chosen.grad


@each_phi
@pytest.mark.parametrize("dtype, rel", [(torch.float64, 1e-12), (torch.float32, 1e-7)])
def test_phi_loss_against_sixty_digits(phi, dtype, rel):
    s, phis, losses, _ = phi_losses(DISTANCES, phi, dtype, epsilon=0.05)
    points = zip(s.tolist(), phis.tolist(), strict=True)
    exact = [exact_phi_loss(*point, epsilon=0.05) for point in points]
    assert_values(losses, exact, rel=rel, abs=1e-37)
    assert losses.dtype == dtype


@each_phi
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_phi_gradient_against_sixty_digits(phi, dtype):
    """Differences of the exact loss, away from the ends of the cubic."""
    s, phis, _, gradients = phi_losses(DISTANCES, phi, dtype, epsilon=0.05)
    assert gradients.dtype == dtype
    assert (gradients <= 0).all()
    for point, exact_phi, slope in zip(s.tolist(), phis.tolist(), gradients.tolist(), strict=True):
        if abs(point) <= 0.06:
            continue
        step = 1e-5 * abs(point)
        above = exact_phi_loss(point + step, exact_phi, 0.05)
        below = exact_phi_loss(point - step, exact_phi, 0.05)
        assert slope == pytest.approx((above - below) / (2 * step), rel=1e-6, abs=1e-10)


@pytest.mark.parametrize("phi", [1e-30, 1e-6, 0.05, 0.5, 1 - 1e-6, 1 - 2**-24])
@pytest.mark.parametrize("epsilon", [1e-6, 0.05, 5.0, 1e3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_phi_loss_and_gradient_are_finite_everywhere(phi, epsilon, dtype):
    """Also where phi^|s| underflows (s = ±1e4), and for phi = 1 - 2^-24, where g is 1/2.

    That phi is the float32 next to 1.
    """
    near = [0.0, 1e-30, epsilon, epsilon * (1 - 1e-7), epsilon / 2]
    far = [1.0, 300.0, 1e4, 1e30]
    _, _, losses, gradients = phi_losses(near + far, phi, dtype, epsilon)
    assert losses.isfinite().all()
    assert (losses >= 0).all()
    assert gradients.isfinite().all()
    assert (gradients <= 0).all()


def test_phi_loss_is_ln2_at_zero_and_linear_far_on_the_wrong_side():
    """phi 0.5, s = -1e4: 1 - g = 2^-1e4 (t (1 - phi) - phi), loss 1e4 ln 2 - ln 4999.5."""
    chosen = tensor(0.0, -5e3)
    rejected = tensor(0.0, 5e3)
    phi = tensor(0.9, 0.5)
    losses, chosen_reward, rejected_reward = mallows_phi(
        chosen, rejected, phi, beta=1.0, epsilon=0.1
    )
    far = 1e4 * LN2 - math.log(4999.5)
    assert_values(losses, [LN2, far], rel=1e-14)
    assert chosen_reward.tolist() == [0.0, -5e3]
    assert rejected_reward.tolist() == [0.0, 5e3]


def test_phi_near_one_tends_to_no_preference():
    """To first order in a = -log phi, g(s) = 1/2 + a (2 s + 1) / 12 for s > 0."""
    a = 1e-5
    s = tensor(0.5, 1.0, 4.0)
    expected = (2 * s + 1) / 12
    above_half = link(s, math.exp(-a), 0.1) - 0.5
    assert_values(above_half / a, expected.tolist(), rel=1e-5)


# ---- WRPO


FUSING = {
    "dpo": (wrpo, dpo, {"beta": 0.1}),
    "ipo": (wrpo_ipo, ipo, {"tau": 0.1}),
    "simpo": (wrpo_simpo, simpo, {"beta": 2.0, "gamma": 0.5}),
}
each_fusing = pytest.mark.parametrize("fused, plain, settings", FUSING.values(), ids=FUSING)


@each_fusing
def test_alpha_0_takes_the_targets_pair_and_alpha_1_the_sources(fused, plain, settings):
    source, target, rejected = drawn(3, seed=2, dtype=torch.float32)
    of_target = fused(source, target, rejected, alpha=0.0, **settings)
    of_source = fused(source, target, rejected, alpha=1.0, **settings)
    assert_same(of_target, plain(target, rejected, **settings))
    assert_same(of_source, plain(source, rejected, **settings))


@each_fusing
def test_the_response_of_the_source_comes_first(fused, plain, settings):
    source, target, rejected = drawn(3, seed=2, dtype=torch.float32)
    losses, _, _ = fused(source, target, rejected, alpha=0.1, **settings)
    swapped, _, _ = fused(target, source, rejected, alpha=0.1, **settings)
    assert (losses != swapped).all()


@each_fusing
def test_two_equal_chosen_responses_are_one(fused, plain, settings):
    _, target, rejected = drawn(3, seed=2, dtype=torch.float32)
    twice = fused(target, target, rejected, alpha=0.1, **settings)
    assert_close(twice, plain(target, rejected, **settings))


def test_wrpo_hand_values():
    """beta 0.5, alpha 1/4, log-ratios 8 ln 3 and 0: the chosen reward is 1/4 * 4 ln 3 = ln 3.

    Against a rejected one with the log-ratio 2 ln 3 the loss is ln 2; with 0, s = ln 3 and it is
    ln 4/3.
    """
    source = tensor(8 * LN3, 8 * LN3)
    target = tensor(0.0, 0.0)
    rejected = tensor(2 * LN3, 0.0)
    losses, chosen_reward, rejected_reward = wrpo(source, target, rejected, alpha=0.25, beta=0.5)
    assert_values(losses, [LN2, math.log(4 / 3)], abs=1e-14)
    assert_values(chosen_reward, [LN3, LN3])
    assert_values(rejected_reward, [LN3, 0.0])


def test_wrpo_ipo_hand_values():
    """h = 1/4 * 8 = 2 is the minimum at tau 1/4."""
    losses, _, _ = wrpo_ipo(tensor(8.0), tensor(0.0), tensor(0.0), alpha=0.25, tau=0.25)
    assert losses.item() == 0


def test_wrpo_simpo_hand_values():
    """2 * (1/4 * -1 + 3/4 * -3 + 3) - 1 = 0: the loss is ln 2."""
    losses, _, _ = wrpo_simpo(
        tensor(-1.0), tensor(-3.0), tensor(-3.0), alpha=0.25, beta=2.0, gamma=1.0
    )
    assert_values(losses, [LN2])


def test_hybrid_hand_values():
    """beta 0.5: (ln 10/9 + ln 2) / 2 at s = 2 ln 3 and 0."""
    losses, chosen_reward, _ = hybrid(tensor(4 * LN3), tensor(0.0), tensor(0.0), beta=0.5)
    assert_values(losses, [(math.log(10 / 9) + LN2) / 2])
    assert_values(chosen_reward, [LN3])


def gradients_of(function):
    """Return the gradients of a loss by its source's, target's and rejected log-ratio."""
    source = tensor(8 * LN3, grad=True)
    target = tensor(0.0, grad=True)
    rejected = tensor(0.0, grad=True)
    function(source, target, rejected).sum().backward()
    return [source.grad.item(), target.grad.item(), rejected.grad.item()]


def test_wrpo_has_one_sigmoid_for_all_three():
    """Its gradient is -beta sigmoid(-s) times (alpha, 1 - alpha, -1), with s = ln 3.

    Two DPO losses weigh each pair by its own sigmoid: s is 4 ln 3 and 0.
    """
    beta = 0.5
    alpha = 0.25

    def of_two_dpo_losses(source, target, rejected):
        source_losses, _, _ = dpo(source, rejected, beta=beta)
        target_losses, _, _ = dpo(target, rejected, beta=beta)
        return alpha * source_losses + (1 - alpha) * target_losses

    found = gradients_of(lambda *logratios: wrpo(*logratios, alpha=alpha, beta=beta)[0])
    shared = beta / 4  # sigmoid(-ln 3) is 1/4
    assert found == pytest.approx([-alpha * shared, -(1 - alpha) * shared, shared])
    mixed = gradients_of(of_two_dpo_losses)
    source_own = beta / 82  # sigmoid(-4 ln 3)
    target_own = beta / 2  # sigmoid(0)
    assert mixed[:2] == pytest.approx([-alpha * source_own, -(1 - alpha) * target_own])
    assert mixed[0] != pytest.approx(found[0], rel=0.1)


def test_hybrid_is_never_below_wrpo_at_one_half():
    source, target, rejected = 30 * drawn(3, seed=3, size=256)
    mixed, _, _ = hybrid(source, target, rejected, beta=0.1)
    fused, _, _ = wrpo(source, target, rejected, alpha=0.5, beta=0.1)
    gap = mixed - fused
    assert (gap > -1e-12).all()
    assert (gap > 0.01).any()


def test_hybrid_of_two_equal_pairs_is_dpo():
    source, _, rejected = 30 * drawn(3, seed=3, size=256)
    assert_close(hybrid(source, source, rejected, beta=0.1), dpo(source, rejected, beta=0.1))


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan")])
@each_fusing
def test_alpha_out_of_range_raises(fused, plain, settings, alpha):
    with pytest.raises(ValueError, match="alpha must be in"):
        fused(tensor(1.0), tensor(1.0), tensor(0.0), alpha=alpha, **settings)


def test_three_responses_of_unequal_lengths_raise():
    with pytest.raises(ValueError, match="differ in length"):
        wrpo(tensor(1.0, 1.0), tensor(1.0), tensor(0.0), alpha=0.1, beta=0.1)


# ---- the table of losses


@pytest.mark.parametrize("name", LOSSES)
def test_the_table_names_the_arguments_of_each_function(name):
    loss = LOSSES[name]
    keywords = set()
    tensors = []
    for parameter in inspect.signature(loss.function).parameters.values():
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            keywords.add(parameter.name)
        else:
            tensors.append(parameter.name)
    assert keywords == set(loss.settings)
    for responses in loss.responses:
        assert len(tensors) == len(responses) + int(loss.needs_weights)


def test_every_loss_but_fine_tuning_can_be_set():
    assert {*LOSSES, "sft"} == set(typing.get_args(job_settings.Losses))


def test_the_losses_of_pairs_are_those_that_take_a_chosen_and_the_rejected_response():
    """A configuration of ExPO or MallowsPO takes these alone (config)."""
    of_pairs = {name for name, loss in LOSSES.items() if loss.responses == PAIRS}
    assert of_pairs == set(typing.get_args(job_settings.PairLosses))


@pytest.mark.parametrize("name", LOSSES)
def test_each_argument_of_a_loss_can_be_set(name):
    """IPO's tau is set as beta."""
    can_be_set = {field.name for field in dataclasses.fields(job_settings.Train)}
    assert set(LOSSES[name].settings) - {"tau"} <= can_be_set


@pytest.mark.parametrize("setting", job_settings.USED_BY)
def test_a_setting_is_in_the_recipe_of_the_losses_that_use_it(setting):
    argument = "alpha" if setting == "dynamic" else setting
    users = {name for name, loss in LOSSES.items() if argument in loss.settings}
    assert set(job_settings.USED_BY[setting]) == users
