"""Pairwise preference losses: free functions on tensors, derived from the equations of the papers."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def _pair(chosen: Tensor, rejected: Tensor) -> tuple[Tensor, Tensor]:
    """Check two (batch,) float tensors and return them in at least float32."""
    for name, x in (("chosen", chosen), ("rejected", rejected)):
        if not isinstance(x, Tensor) or x.dim() != 1 or not x.is_floating_point():
            got = f"{tuple(x.shape)} {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"{name}: expected a float tensor of shape (batch,), got {got}")
    # Broadcasting (1,) against (n,) would give a number for every pair, and the wrong one.
    if chosen.shape != rejected.shape:
        raise ValueError(f"chosen {tuple(chosen.shape)} and rejected {tuple(rejected.shape)} differ in length")
    # bfloat16 has 8 bits: the difference of two inputs is taken in float32, or the loss would be rounded again.
    wide = torch.promote_types(torch.promote_types(chosen.dtype, rejected.dtype), torch.float32)
    return chosen.to(wide), rejected.to(wide)


def _positive(**values: float) -> None:
    for name, value in values.items():
        if not 0.0 < value < float("inf"):
            raise ValueError(f"{name} must be a positive finite number, got {value!r}")


def dpo(
    chosen_logratios: Tensor, rejected_logratios: Tensor, *, beta: float, label_smoothing: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the DPO loss of each pair.

    Eq. 7, arXiv 2305.18290:  -log sigmoid(s),  s = beta * (chosen_logratio - rejected_logratio).
    Label smoothing e treats a share e of the labels as flipped:  -(1 - e) log sigmoid(s) - e log sigmoid(-s).

    Args:
        chosen_logratios, rejected_logratios: (batch,), nats: log pi(y|x) - log pi_ref(y|x), summed over the response.
        beta: strength of the KL penalty, > 0.
        label_smoothing: e in [0, 0.5).
    Returns:
        losses (>= 0), chosen_reward, rejected_reward = beta * logratio (detached), each (batch,) in at least float32.
    Raises:
        ValueError: inputs are not two float (batch,) tensors of one length, or a parameter is out of range.

    The loss is ln 2 where policy and reference agree, whatever beta and the smoothing; smoothing adds e * s to it.
    """
    chosen, rejected = _pair(chosen_logratios, rejected_logratios)
    _positive(beta=beta)
    if not 0.0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must be in [0, 0.5), got {label_smoothing!r}")
    s = beta * (chosen - rejected)
    losses = -(1.0 - label_smoothing) * logsigmoid(s) - label_smoothing * logsigmoid(-s)
    return losses, beta * chosen.detach(), beta * rejected.detach()


def ipo(chosen_logratios: Tensor, rejected_logratios: Tensor, *, tau: float) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the IPO loss of each pair.

    Eq. 17, arXiv 2310.12036:  (h - 1 / (2 tau))^2,  h = chosen_logratio - rejected_logratio.
    The log-ratios are sums over tokens, as in the paper; averaging them gives tau another meaning.

    Args:
        chosen_logratios, rejected_logratios: (batch,), nats: log pi(y|x) - log pi_ref(y|x), summed over the response.
        tau: strength of the KL penalty, > 0.
    Returns:
        losses (>= 0, nats squared), chosen_reward, rejected_reward = tau * logratio (detached), each (batch,).
    Raises:
        ValueError: inputs are not two float (batch,) tensors of one length, or tau is not positive.

    The loss is zero, and its gradient too, exactly at h = 1 / (2 tau); at h = 0 it is 1 / (4 tau^2).
    """
    chosen, rejected = _pair(chosen_logratios, rejected_logratios)
    _positive(tau=tau)
    losses = (chosen - rejected - 1.0 / (2.0 * tau)) ** 2
    return losses, tau * chosen.detach(), tau * rejected.detach()


def simpo(
    chosen_mean_logps: Tensor, rejected_mean_logps: Tensor, *, beta: float, gamma: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the SimPO loss of each pair; there is no reference model.

    Eq. 6, arXiv 2405.14734:  -log sigmoid(beta * (chosen_mean_logp - rejected_mean_logp) - gamma).

    Args:
        chosen_mean_logps, rejected_mean_logps: (batch,), nats per token: log pi(y|x) / |y|.
        beta: scale of the reward, > 0.
        gamma: target margin itself (not its ratio to beta), >= 0.
    Returns:
        losses (>= 0), chosen_reward, rejected_reward = beta * mean_logp (detached), each (batch,) in at least float32.
    Raises:
        ValueError: inputs are not two float (batch,) tensors of one length, or a parameter is out of range.

    The loss is ln 2 where the rewards differ by exactly gamma.
    """
    chosen, rejected = _pair(chosen_mean_logps, rejected_mean_logps)
    _positive(beta=beta)
    if not 0.0 <= gamma < float("inf"):
        raise ValueError(f"gamma must be a finite number >= 0, got {gamma!r}")
    losses = -logsigmoid(beta * (chosen - rejected) - gamma)
    return losses, beta * chosen.detach(), beta * rejected.detach()
