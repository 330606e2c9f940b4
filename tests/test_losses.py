"""Pairwise losses: values derived by hand, limits, gradients, and faults."""

import math

import pytest
import torch

from beyond_dpo.losses import dpo, ipo, simpo

LOSSES = {
    "dpo": lambda c, r: dpo(c, r, beta=0.1),
    "dpo_smooth": lambda c, r: dpo(c, r, beta=0.1, label_smoothing=0.2),
    "ipo": lambda c, r: ipo(c, r, tau=0.1),
    "simpo": lambda c, r: simpo(c, r, beta=2.0, gamma=0.5),
}
each_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


def row(*values, dtype=torch.float64, grad=False):
    return torch.tensor(values, dtype=dtype, requires_grad=grad)


@pytest.mark.parametrize("beta", [0.01, 0.1, 5.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.49])
def test_dpo_is_ln2_where_policy_equals_reference(beta, smoothing):
    losses, chosen, rejected = dpo(row(0.0, 0.0), row(0.0, 0.0), beta=beta, label_smoothing=smoothing)
    assert losses.tolist() == pytest.approx([math.log(2)] * 2, abs=1e-15)
    assert chosen.tolist() == rejected.tolist() == [0.0, 0.0]


def test_dpo_hand_values():
    """beta 0.5, log-ratios 2 ln 3 and 0: s = 0.5 * 2 ln 3 = ln 3, sigmoid(s) = 3/4, loss = ln(4/3).

    The other way round s = -ln 3, sigmoid(s) = 1/4, loss = ln 4. A shift of both log-ratios changes no loss.
    """
    a, b = 2 * math.log(3), 0.0
    losses, chosen, rejected = dpo(row(a, b, a + 7), row(b, a, b + 7), beta=0.5)
    assert losses.tolist() == pytest.approx([math.log(4 / 3), math.log(4), math.log(4 / 3)], abs=1e-14)
    assert chosen.tolist() == pytest.approx([math.log(3), 0.0, math.log(3) + 3.5])
    assert rejected.tolist() == pytest.approx([0.0, math.log(3), 3.5])


def test_dpo_gradient_by_hand():
    """d loss / d chosen = -beta * sigmoid(-s): at s = ln 3 and beta 0.5 that is -0.5 / 4 = -1/8; +1/8 for rejected."""
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
    """tau 0.1: the target is 1 / 0.2 = 5. h = 5 gives 0, h = 0 gives 25, h = 7 gives 4, h = -1 gives 36."""
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
    """beta 2, gamma 0.5. Means -1 and -1.25 differ by 0.25: the rewards differ by exactly gamma, the loss is ln 2.

    Equal means: s = -0.5, loss = ln(1 + e^0.5) = 0.974077. gamma is the margin itself, not a share of beta.
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
    """s = 0.1 * (-2e4) = -2000: log(1 + e^2000) = 2000 to the last bit, where a naive log(sigmoid) is infinite."""
    losses, _, _ = dpo(row(-1e4, dtype=torch.float32), row(1e4, dtype=torch.float32), beta=0.1)
    assert losses.item() == pytest.approx(2000.0, rel=1e-6)


def test_half_precision_inputs_are_not_rounded_again():
    """1.0 and 0.00390625 are exact in bfloat16, their difference 0.99609375 is, but not beta times it."""
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
        (torch.zeros(2, 1), torch.zeros(2, 1), r"chosen: expected a float tensor of shape \(batch,\)"),
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
    ],
)
def test_parameters_out_of_range_raise(call, says):
    with pytest.raises(ValueError, match=says):
        call(row(0.0))
