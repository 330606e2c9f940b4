"""Pairwise losses: values derived by hand, limits, gradients, and faults."""

import inspect
import itertools
import math
import typing
from decimal import Decimal, localcontext

import pytest
import torch

from beyond_dpo.jobs import settings
from beyond_dpo.losses import (
    LOSSES,
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

OF_A_PAIR = {
    "dpo": lambda c, r: dpo(c, r, beta=0.1),
    "dpo_smooth": lambda c, r: dpo(c, r, beta=0.1, label_smoothing=0.2),
    "ipo": lambda c, r: ipo(c, r, tau=0.1),
    "simpo": lambda c, r: simpo(c, r, beta=2.0, gamma=0.5),
    "mallows_theta": lambda c, r: mallows_theta(c, r, torch.full((len(c),), 1.7), beta=0.1),
    "mallows_ipo": lambda c, r: mallows_ipo(c, r, torch.full((len(c),), 1.7), tau=0.1),
    "mallows_simpo": lambda c, r: mallows_simpo(
        c, r, torch.full((len(c),), 1.7), beta=2.0, gamma=0.5
    ),
    "mallows_phi": lambda c, r: mallows_phi(
        c, r, torch.full((len(c),), 0.3), beta=0.1, epsilon=0.05
    ),
    "wrpo": lambda c, r: wrpo(c, c / 2, r, alpha=0.3, beta=0.1),
    "wrpo_ipo": lambda c, r: wrpo_ipo(c, c / 2, r, alpha=0.3, tau=0.1),
    "wrpo_simpo": lambda c, r: wrpo_simpo(c, c / 2, r, alpha=0.3, beta=2.0, gamma=0.5),
    "hybrid": lambda c, r: hybrid(c, c / 2, r, beta=0.1),
}
each_loss = pytest.mark.parametrize("loss", OF_A_PAIR.values(), ids=OF_A_PAIR)


def row(*values, dtype=torch.float64, grad=False):
    return torch.tensor(values, dtype=dtype, requires_grad=grad)


@pytest.mark.parametrize("beta", [0.01, 0.1, 5.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.49])
def test_dpo_is_ln2_where_policy_equals_reference(beta, smoothing):
    losses, chosen, rejected = dpo(
        row(0.0, 0.0), row(0.0, 0.0), beta=beta, label_smoothing=smoothing
    )
    assert losses.tolist() == pytest.approx([math.log(2)] * 2, abs=1e-15)
    assert chosen.tolist() == rejected.tolist() == [0.0, 0.0]


def test_dpo_hand_values():
    """beta 0.5, log-ratios 2 ln 3 and 0: s = 0.5 * 2 ln 3 = ln 3, sigmoid(s) = 3/4, loss = ln(4/3).

    The other way round s = -ln 3, sigmoid(s) = 1/4, loss = ln 4. A shift of both log-ratios changes
    no loss.
    """
    a, b = 2 * math.log(3), 0.0
    losses, chosen, rejected = dpo(row(a, b, a + 7), row(b, a, b + 7), beta=0.5)
    assert losses.tolist() == pytest.approx(
        [math.log(4 / 3), math.log(4), math.log(4 / 3)], abs=1e-14
    )
    assert chosen.tolist() == pytest.approx([math.log(3), 0.0, math.log(3) + 3.5])
    assert rejected.tolist() == pytest.approx([0.0, math.log(3), 3.5])


def test_dpo_gradient_by_hand():
    """d loss / d chosen = -beta * sigmoid(-s): at s = ln 3 and beta 0.5 that is -0.5 / 4 = -1/8;
    +1/8 for rejected.
    """
    c, r = row(2 * math.log(3), grad=True), row(0.0, grad=True)
    dpo(c, r, beta=0.5)[0].sum().backward()
    assert c.grad.item() == pytest.approx(-0.125) and r.grad.item() == pytest.approx(0.125)


def test_label_smoothing_is_the_plain_loss_plus_e_times_s():
    """-log sigmoid(-s) = s - log sigmoid(s), so (1-e) L(s) + e L(-s) = L(s) + e * s."""
    c, r = torch.randn(2, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 20
    plain, _, _ = dpo(c, r, beta=0.3)
    flipped, _, _ = dpo(r, c, beta=0.3)
    smooth, _, _ = dpo(c, r, beta=0.3, label_smoothing=0.2)
    torch.testing.assert_close(smooth, 0.8 * plain + 0.2 * flipped)
    torch.testing.assert_close(smooth, plain + 0.2 * 0.3 * (c - r))


def test_ipo_hand_values():
    """tau 0.1: the target is 1 / 0.2 = 5. h = 5 gives 0, h = 0 gives 25, h = 7 gives 4, h = -1
    gives 36.
    """
    losses, chosen, rejected = ipo(row(5.0, 1.0, 3.0, -4.0), row(0.0, 1.0, -4.0, -3.0), tau=0.1)
    assert losses.tolist() == pytest.approx([0.0, 25.0, 4.0, 36.0], abs=1e-12)
    assert chosen.tolist() == pytest.approx([0.5, 0.1, 0.3, -0.4])
    assert rejected.tolist() == pytest.approx([0.0, 0.1, -0.4, -0.3])


@pytest.mark.parametrize("tau", [0.01, 0.1, 1.0])
def test_ipo_minimum_is_at_half_over_tau(tau):
    h = 1 / (2 * tau)
    c, r = row(h, h - 0.01, h + 0.01, grad=True), row(0.0, 0.0, 0.0)
    losses, _, _ = ipo(c, r, tau=tau)
    losses.sum().backward()
    assert losses[0] == 0 and c.grad[0] == 0
    assert losses[1].item() == pytest.approx(1e-4) and losses[2].item() == pytest.approx(1e-4)
    assert c.grad[1] < 0 < c.grad[2]


def test_simpo_hand_values():
    """beta 2, gamma 0.5. Means -1 and -1.25 differ by 0.25: the rewards differ by exactly gamma,
    the loss is ln 2.

    Equal means: s = -0.5, loss = ln(1 + e^0.5) = 0.974077. gamma is the margin itself, not a share
    of beta.
    """
    losses, chosen, rejected = simpo(row(-1.0, -1.0), row(-1.25, -1.0), beta=2.0, gamma=0.5)
    assert losses.tolist() == pytest.approx([math.log(2), math.log1p(math.exp(0.5))], abs=1e-14)
    assert losses[1].item() == pytest.approx(0.974077, abs=1e-6)
    assert chosen.tolist() == [-2.0, -2.0] and rejected.tolist() == [-2.5, -2.0]


def test_simpo_without_margin_is_dpo_on_the_same_numbers():
    c, r = row(-0.5, -2.0), row(-1.5, -0.1)
    torch.testing.assert_close(simpo(c, r, beta=2.0, gamma=0.0), dpo(c, r, beta=2.0))


@each_loss
def test_gradient_equals_finite_differences(loss):
    c, r = row(-3.0, 0.2, 4.0, grad=True), row(1.0, -0.7, 3.5, grad=True)
    assert torch.autograd.gradcheck(lambda a, b: loss(a, b)[0], (c, r), eps=1e-6, atol=1e-8)


@each_loss
def test_rewards_are_detached_and_everything_is_per_pair(loss):
    losses, chosen, rejected = loss(row(1.0, 2.0, 3.0, grad=True), row(0.0, 0.0, 0.0, grad=True))
    assert losses.requires_grad and not chosen.requires_grad and not rejected.requires_grad
    assert losses.shape == chosen.shape == rejected.shape == (3,)
    alone = loss(row(2.0), row(0.0))[0]
    assert losses[1].item() == alone.item()  # a pair's loss does not depend on its batch


@each_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_magnitudes_stay_finite(loss, dtype):
    c = torch.tensor([3e4, -3e4, 0.0], dtype=dtype, requires_grad=True)
    losses, chosen, rejected = loss(c, -c.detach())
    losses.sum().backward()
    for x in (losses, chosen, rejected, c.grad):
        assert torch.isfinite(x).all()
    assert losses.dtype == chosen.dtype == torch.float32 and c.grad.dtype == dtype
    assert (losses >= 0).all()


def test_dpo_is_linear_when_the_policy_is_far_on_the_wrong_side():
    """s = 0.1 * (-2e4) = -2000: log(1 + e^2000) = 2000 to the last bit, where a naive log(sigmoid)
    is infinite.
    """
    losses, _, _ = dpo(row(-1e4, dtype=torch.float32), row(1e4, dtype=torch.float32), beta=0.1)
    assert losses.item() == pytest.approx(2000.0, rel=1e-6)


def test_half_precision_inputs_are_not_rounded_again():
    """1.0 and 0.00390625 are exact in bfloat16, their difference 0.99609375 is, but not beta times
    it.
    """
    values = [1.0], [0.00390625]
    half = dpo(*(torch.tensor(v, dtype=torch.bfloat16) for v in values), beta=0.1)
    full = dpo(*(torch.tensor(v, dtype=torch.float32) for v in values), beta=0.1)
    torch.testing.assert_close(half, full, rtol=0, atol=0)


@each_loss
@pytest.mark.parametrize(
    "chosen, rejected, says",
    [
        (torch.zeros(2), torch.zeros(3), "differ in length"),
        (torch.zeros(1), torch.zeros(3), "differ in length"),
        (
            torch.zeros(2, 1),
            torch.zeros(2, 1),
            r"chosen: expected a float tensor of shape \(batch,\)",
        ),
        (torch.zeros(2), torch.tensor(0.0), r"rejected: expected .* got \(\) torch.float32"),
        (torch.zeros(2, dtype=torch.long), torch.zeros(2), "chosen: expected .* torch.int64"),
        (torch.zeros(2), [0.0, 0.0], "rejected: expected .* got list"),
    ],
    ids=["length", "broadcast", "matrix", "scalar", "integer", "list"],
)
def test_wrong_inputs_raise(loss, chosen, rejected, says):
    with pytest.raises(ValueError, match=says):
        loss(chosen, rejected)


@pytest.mark.parametrize(
    "call, says",
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
def test_parameters_out_of_range_raise(call, says):
    with pytest.raises(ValueError, match=says):
        call(row(0.0))


WEIGHTED = {
    "theta": (mallows_theta, dpo, {"beta": 0.1}),
    "ipo": (mallows_ipo, ipo, {"tau": 0.1}),
    "simpo": (mallows_simpo, simpo, {"beta": 2.0, "gamma": 0.5}),
}
each_weighted = pytest.mark.parametrize(
    "weighted, plain, settings", WEIGHTED.values(), ids=WEIGHTED
)


@each_weighted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_weight_one_is_the_plain_loss(weighted, plain, settings, dtype):
    c, r = torch.randn(2, 64, generator=torch.Generator().manual_seed(1)).to(dtype) * 30
    expected = plain(c, r, **settings)
    torch.testing.assert_close(weighted(c, r, torch.ones(64), **settings), expected, rtol=0, atol=0)
    other = weighted(c, r, torch.full((64,), 3.0), **settings)
    assert (other[0] != expected[0]).any()
    torch.testing.assert_close(
        other[1:], expected[1:], rtol=0, atol=0
    )  # rewards are those of the plain loss


def test_weighted_hand_values():
    """theta: beta 0.5, log-ratios 2 ln 3 and 0, weights 1, 2, 1/2: s = ln 3, 2 ln 3, ln(3)/2; loss
    ln(1 + e^-s).

    ipo: tau 0.1, target 5: h = 2 with weights 1, 2.5 and 3 gives 9, 0 and 1.
    simpo: beta 2, gamma 0.5, means 1 apart: logit 1.5; weight 2 gives 3, so the margin is weighted
    too.
    """
    h = row(*[2 * math.log(3)] * 3)
    losses, _, _ = mallows_theta(h, 0 * h, row(1.0, 2.0, 0.5), beta=0.5)
    assert losses.tolist() == pytest.approx(
        [math.log(4 / 3), math.log(10 / 9), math.log1p(3**-0.5)], abs=1e-14
    )
    losses, _, _ = mallows_ipo(row(2.0, 2.0, 2.0), row(0.0, 0.0, 0.0), row(1.0, 2.5, 3.0), tau=0.1)
    assert losses.tolist() == pytest.approx([9.0, 0.0, 1.0], abs=1e-14)
    losses, _, _ = mallows_simpo(
        row(-1.0, -1.0), row(-2.0, -2.0), row(1.0, 2.0), beta=2.0, gamma=0.5
    )
    assert losses.tolist() == pytest.approx(
        [math.log1p(math.exp(-1.5)), math.log1p(math.exp(-3.0))], abs=1e-14
    )


CONSTANTS = {
    "theta": (lambda x, k: mallows_theta(x, x, k, beta=1.0), "weight", "inf"),
    "ipo": (lambda x, k: mallows_ipo(x, x, k, tau=1.0), "weight", "inf"),
    "simpo": (lambda x, k: mallows_simpo(x, x, k, beta=1.0, gamma=0.0), "weight", "inf"),
    "phi": (lambda x, k: mallows_phi(x, x, k, beta=1.0, epsilon=0.1), "phi", "1.0"),
    "link": (lambda x, k: mallows_link(x, k, 0.1), "phi", "1.0"),
}


@pytest.mark.parametrize("call, name, below", CONSTANTS.values(), ids=CONSTANTS)
def test_bad_weights_and_dispersions_name_the_row(call, name, below):
    for bad in (0.0, -0.5, math.inf, math.nan) + ((1.0,) if name == "phi" else ()):
        with pytest.raises(
            ValueError, match=rf"{name} must be in \(0, {below}\), got {bad} in row 1"
        ):
            call(row(0.0, 0.0, 0.0), row(0.5, bad, 0.0))
    with pytest.raises(ValueError, match=f"{name} has 1 values for 2 pairs"):
        call(row(0.0, 0.0), row(0.5))
    with pytest.raises(ValueError, match=f"{name}: expected a float tensor .* got float"):
        call(row(0.0, 0.0), 0.5)
    x, constant = row(1.0, 2.0, grad=True), row(0.5, 0.5, grad=True)
    call(x, constant)[0].sum().backward()
    assert constant.grad is None and x.grad is not None


def link(s, phi, epsilon):
    s = torch.as_tensor(s, dtype=torch.float64)
    return mallows_link(s, torch.full_like(s, phi), epsilon)


@pytest.mark.parametrize("phi", [0.05, 0.3, 0.95])
def test_link_is_the_pairwise_chance_of_the_mallows_law(phi):
    """Items d ranks apart, summed over all 720 rankings of 6 items with the chance phi^inversions /
    Z.
    """
    rankings = list(itertools.permutations(range(6)))
    mass = [phi ** sum(a > b for a, b in itertools.combinations(ranks, 2)) for ranks in rankings]
    for i, j in ((0, 1), (0, 2), (1, 4), (0, 5)):
        chance = sum(
            m for m, ranks in zip(mass, rankings, strict=True) if ranks[i] < ranks[j]
        ) / sum(mass)
        assert link([j - i, i - j], phi, 0.1).tolist() == pytest.approx(
            [chance, 1 - chance], abs=1e-13
        )


def test_link_published_values():
    """phi 0.3 at 1, 2, 5; g(1) = 1 / (1 + phi); the jump at 0 from 0.2812 to 0.7188 for phi
    0.05.
    """
    assert link([1.0, 2.0, 5.0], 0.3, 0.1).tolist() == pytest.approx(
        [0.769231, 0.885445, 0.992198], abs=5e-7
    )
    for phi in (1e-6, 0.05, 0.5, 1 - 1e-6):
        assert link([1.0], phi, 0.1).item() == pytest.approx(1 / (1 + phi), abs=1e-15)
    assert link([-1e-9, 1e-9], 0.05, 1e-12).tolist() == pytest.approx([0.2812, 0.7188], abs=5e-5)


@pytest.mark.parametrize("phi", [1e-6, 0.05, 0.5, 0.99])
@pytest.mark.parametrize("epsilon", [0.05, 1.386])
def test_link_is_odd_about_a_half_and_rises(phi, epsilon):
    s = torch.arange(-1000, 1001, dtype=torch.float64) * 0.006
    g = link(s, phi, epsilon)
    torch.testing.assert_close(g + g.flip(0), torch.ones_like(g), rtol=0, atol=1e-15)
    assert (
        (g.diff() >= 0).all()
        and (g[:-1] < g[1:])[900:1100].all()
        and link([0.0], phi, epsilon).item() == 0.5
    )


def test_cubic_of_the_bandit():
    """phi = epsilon = 0.05: G = 0.237798, D = 0.372183, a1 = 6.947840, a3 = -876.7543."""
    s = torch.linspace(-0.0499, 0.0499, 101, dtype=torch.float64)
    cubic = 0.5 + 6.947840 * s - 876.7543 * s**3
    torch.testing.assert_close(link(s, 0.05, 0.05), cubic, rtol=0, atol=1e-7)
    assert link([0.05], 0.05, 0.05).item() == pytest.approx(0.737798, abs=5e-7)
    at = torch.tensor([0.0, 0.05, 0.05 * (1 - 1e-12)], dtype=torch.float64, requires_grad=True)
    mallows_link(at, torch.full_like(at, 0.05), 0.05).sum().backward()
    assert at.grad.tolist() == pytest.approx([6.947840, 0.372183, 0.372183], abs=5e-7)


@pytest.mark.parametrize("phi", [1e-6, 0.05, 0.5, 0.999])
@pytest.mark.parametrize("epsilon", [0.01, 0.1, 1.386])
@pytest.mark.parametrize("sign", [1, -1])
def test_link_and_slope_are_continuous_where_the_cubic_ends(phi, epsilon, sign):
    at = sign * epsilon * torch.tensor([1 - 1e-9, 1.0, 1 + 1e-9], dtype=torch.float64)
    at.requires_grad = True
    g = mallows_link(at, torch.full_like(at, phi), epsilon)
    (slope,) = torch.autograd.grad(g.sum(), at)
    assert g.max() - g.min() < 1e-7 and slope.max() - slope.min() < 1e-6


@pytest.mark.parametrize("phi", [1e-6, 0.05, 0.5, 0.99])
@pytest.mark.parametrize("epsilon", [0.05, 1.386])
def test_phi_gradient_equals_finite_differences(phi, epsilon):
    """Also at 0, where training starts and |s| has no derivative, and across the ends of the
    cubic.
    """
    e = epsilon
    s = row(
        0.0,
        0.3 * e,
        -0.3 * e,
        e - 1e-3,
        1e-3 - e,
        e + 1e-3,
        -e - 1e-3,
        1.5,
        -1.5,
        20.0,
        -20.0,
        300.0,
        -300.0,
    )
    s.requires_grad = True
    phis = torch.full_like(s, phi).detach()

    def loss(c):
        return mallows_phi(c, torch.zeros_like(c), phis, beta=1.0, epsilon=e)[0]

    assert torch.autograd.gradcheck(loss, (s,), eps=1e-7, atol=2e-5, rtol=2e-5)


def exact_phi_loss(s: float, phi: float, epsilon: float) -> float:
    """-log g(s) in 60 digits, with 1 - g(t) = t / (phi^-t - 1) - (t + 1) / (phi^-(t + 1) - 1)."""
    with localcontext() as context:
        context.prec = 60
        p, e, t = Decimal(phi), Decimal(epsilon), abs(Decimal(s))

        def miss(x):
            return x / (p**-x - 1) - (x + 1) / (p ** -(x + 1) - 1)

        def slope(x):  # Eq. 12
            q, r = p**x, p ** (x + 1)
            fall = p.ln() * ((x + 1) * r / (1 - r) ** 2 - x * q / (1 - q) ** 2)
            return 1 / (1 - r) - 1 / (1 - q) + fall

        if t < e:
            half, d = Decimal("0.5") - miss(e), slope(e)
            a3 = (d * e - half) / (2 * e**3)
            wrong = Decimal("0.5") - (half / e - a3 * e * e) * t - a3 * t**3
        else:
            wrong = miss(t)
            if t < 5:  # Eq. 9 as it is printed
                assert abs(1 - wrong - ((t + 1) / (1 - p ** (t + 1)) - t / (1 - p**t))) < Decimal(
                    "1e-40"
                )
        return float(-(wrong if s < 0 else 1 - wrong).ln())


GRID = [0.0, 0.01, 0.0499, 0.05, 0.0501, 0.7, 3.0, 40.0, 1e3, 1e4]


@pytest.mark.parametrize("phi", [1e-6, 1e-3, 0.05, 0.5, 0.99, 1 - 1e-6])
def test_phi_loss_against_sixty_digits(phi):
    s = [x * sign for x in GRID for sign in (1, -1)]
    for dtype, rel in ((torch.float64, 1e-12), (torch.float32, 1e-7)):
        c = torch.tensor(s, dtype=dtype, requires_grad=True)
        phis = torch.full((len(s),), phi, dtype=dtype)
        losses, _, _ = mallows_phi(c, torch.zeros_like(c), phis, beta=1.0, epsilon=0.05)
        losses.sum().backward()
        exact = [exact_phi_loss(a, b, 0.05) for a, b in zip(c.tolist(), phis.tolist(), strict=True)]
        assert losses.tolist() == pytest.approx(exact, rel=rel, abs=1e-37)
        assert losses.dtype == c.grad.dtype == dtype and (c.grad <= 0).all()
        for a, b, slope in zip(c.tolist(), phis.tolist(), c.grad.tolist(), strict=True):
            if abs(a) > 0.06:  # differences of the exact loss, away from the ends of the cubic
                h = 1e-5 * abs(a)
                rise = (exact_phi_loss(a + h, b, 0.05) - exact_phi_loss(a - h, b, 0.05)) / (2 * h)
                assert slope == pytest.approx(rise, rel=1e-6, abs=1e-10)


@pytest.mark.parametrize("phi", [1e-30, 1e-6, 0.05, 0.5, 1 - 1e-6, 1 - 2**-24])
@pytest.mark.parametrize("epsilon", [1e-6, 0.05, 5.0, 1e3])
def test_phi_loss_and_gradient_are_finite_everywhere(phi, epsilon):
    """Also for phi = 1 - 2^-24, the float32 next to 1, where g is 1/2, and where phi^|s| underflows
    (s = ±1e4).
    """
    s = [0.0, 1e-30, epsilon, epsilon * (1 - 1e-7), epsilon / 2, 1.0, 300.0, 1e4, 1e30]
    for dtype in (torch.float32, torch.float64):
        c = torch.tensor([*s, *(-x for x in s)], dtype=dtype, requires_grad=True)
        losses, _, _ = mallows_phi(
            c, torch.zeros_like(c), torch.full_like(c, phi).detach(), beta=1.0, epsilon=epsilon
        )
        losses.sum().backward()
        assert (
            losses.isfinite().all()
            and (losses >= 0).all()
            and c.grad.isfinite().all()
            and (c.grad <= 0).all()
        )


def test_phi_loss_is_ln2_at_zero_and_linear_far_on_the_wrong_side():
    """phi 0.5, s = -1e4: 1 - g = q (t (1 - phi) - phi) with q = 2^-1e4, over 1: loss 1e4 ln 2 -
    ln(4999.5).
    """
    losses, chosen, rejected = mallows_phi(
        row(0.0, -5e3), row(0.0, 5e3), row(0.9, 0.5), beta=1.0, epsilon=0.1
    )
    assert losses.tolist() == pytest.approx(
        [math.log(2), 1e4 * math.log(2) - math.log(4999.5)], rel=1e-14
    )
    assert chosen.tolist() == [0.0, -5e3] and rejected.tolist() == [0.0, 5e3]


def test_phi_near_one_tends_to_no_preference():
    """To first order in a = -log phi, g(s) = 1/2 + a (2 s + 1) / 12 for s > 0."""
    a, s = 1e-5, row(0.5, 1.0, 4.0)
    assert ((link(s, math.exp(-a), 0.1) - 0.5) / a).tolist() == pytest.approx(
        ((2 * s + 1) / 12).tolist(), rel=1e-5
    )


# ---- WRPO


FUSED = {
    "dpo": (wrpo, dpo, {"beta": 0.1}),
    "ipo": (wrpo_ipo, ipo, {"tau": 0.1}),
    "simpo": (wrpo_simpo, simpo, {"beta": 2.0, "gamma": 0.5}),
}


@pytest.mark.parametrize("fused, plain, settings", FUSED.values(), ids=FUSED)
def test_alpha_0_takes_the_targets_pair_and_alpha_1_the_sources(fused, plain, settings):
    s, t, r = torch.randn(3, 64, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(
        fused(s, t, r, alpha=0.0, **settings), plain(t, r, **settings), rtol=0, atol=0
    )
    torch.testing.assert_close(
        fused(s, t, r, alpha=1.0, **settings), plain(s, r, **settings), rtol=0, atol=0
    )
    between, swapped = (fused(*both, r, alpha=0.1, **settings) for both in ((s, t), (t, s)))
    assert (between[0] != swapped[0]).all(), "the source's response comes first"
    torch.testing.assert_close(fused(t, t, r, alpha=0.1, **settings), plain(t, r, **settings))


def test_wrpo_hand_values():
    """beta 0.5, alpha 1/4, log-ratios 8 ln 3, 0 and 2 ln 3: reward 1/4 * 4 ln 3 = ln 3 for chosen
    and ln 3: ln 2.

    With the rejected one at 0, s = ln 3 and the loss is ln 4/3. IPO: h = 1/4 * 8 = 2 at tau 1/4 is
    its minimum, 0. SimPO: 2 * (1/4 * -1 + 3/4 * -3 + 3) - 1 = 0, the loss is ln 2. Hybrid: (ln 10/9
    + ln 2) / 2 at s = 2 ln 3 and 0.
    """
    a = 8 * math.log(3)
    losses, chosen, rejected = wrpo(row(a, a), row(0.0, 0.0), row(a / 4, 0.0), alpha=0.25, beta=0.5)
    assert losses.tolist() == pytest.approx([math.log(2), math.log(4 / 3)], abs=1e-14)
    assert chosen.tolist() == pytest.approx([math.log(3)] * 2)
    assert rejected.tolist() == pytest.approx([math.log(3), 0.0])
    assert wrpo_ipo(row(8.0), row(0.0), row(0.0), alpha=0.25, tau=0.25)[0].item() == 0
    fused = wrpo_simpo(row(-1.0), row(-3.0), row(-3.0), alpha=0.25, beta=2.0, gamma=1.0)
    assert fused[0].item() == pytest.approx(math.log(2))
    both, chosen, _ = hybrid(row(a / 2), row(0.0), row(0.0), beta=0.5)
    assert both.item() == pytest.approx(
        (math.log(10 / 9) + math.log(2)) / 2
    ) and chosen.item() == pytest.approx(a / 8)


def test_wrpo_has_one_sigmoid_for_all_three():
    """Its gradient is -beta sigmoid(-s) times (alpha, 1 - alpha, -1); two DPO losses weigh each
    pair by its own.
    """
    beta, alpha, values = 0.5, 0.25, (8 * math.log(3), 0.0, 0.0)
    s, t, r = (row(x, grad=True) for x in values)
    wrpo(s, t, r, alpha=alpha, beta=beta)[0].sum().backward()
    shared = beta / 4  # sigmoid(-ln 3)
    found = [x.grad.item() for x in (s, t, r)]
    assert found == pytest.approx([-alpha * shared, -(1 - alpha) * shared, shared])
    s, t, r = (row(x, grad=True) for x in values)
    mixed = alpha * dpo(s, r, beta=beta)[0] + (1 - alpha) * dpo(t, r, beta=beta)[0]
    mixed.sum().backward()
    own = [beta / 82, beta / 2]  # sigmoid(-4 ln 3) and sigmoid(0)
    assert [s.grad.item(), t.grad.item()] == pytest.approx([-alpha * own[0], -(1 - alpha) * own[1]])
    assert s.grad.item() != pytest.approx(found[0], rel=0.1)


def test_hybrid_is_never_below_wrpo_at_one_half():
    s, t, r = (
        torch.randn(3, 256, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * 30
    )
    gap = hybrid(s, t, r, beta=0.1)[0] - wrpo(s, t, r, alpha=0.5, beta=0.1)[0]
    assert (gap > -1e-12).all() and (gap > 0.01).any()
    torch.testing.assert_close(hybrid(s, s, r, beta=0.1), dpo(s, r, beta=0.1))


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan")])
def test_alpha_out_of_range_raises(alpha):
    for call in (
        wrpo,
        lambda *x, beta, **k: wrpo_ipo(*x, tau=beta, **k),
        lambda *x, **k: wrpo_simpo(*x, gamma=0, **k),
    ):
        with pytest.raises(ValueError, match="alpha must be in"):
            call(row(1.0), row(1.0), row(0.0), alpha=alpha, beta=0.1)
    with pytest.raises(ValueError, match="differ in length"):
        wrpo(row(1.0, 1.0), row(1.0), row(0.0), alpha=0.1, beta=0.1)


# ---- the table of losses


@pytest.mark.parametrize("name", LOSSES)
def test_the_table_names_the_arguments_of_each_function(name):
    loss = LOSSES[name]
    parameters = inspect.signature(loss.function).parameters.values()
    keywords = {
        parameter.name
        for parameter in parameters
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }
    assert keywords == set(loss.settings)
    positional = len(parameters) - len(keywords)
    for responses in loss.responses:
        assert positional == len(responses) + int(loss.needs_weights)


def test_every_loss_but_fine_tuning_can_be_set():
    assert {*LOSSES, "sft"} == set(typing.get_args(settings.Losses))


@pytest.mark.parametrize("setting", settings.USED_BY)
def test_a_setting_is_in_the_recipe_of_the_losses_that_use_it(setting):
    argument = "alpha" if setting == "dynamic" else setting
    users = {name for name, loss in LOSSES.items() if argument in loss.settings}
    assert set(settings.USED_BY[setting]) == users
