"""Preference losses: free functions on tensors, derived from the equations of the papers."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from beyond_dpo.rows import FUSED


def _vector(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor) or x.dim() != 1 or not x.is_floating_point():
        got = f"{tuple(x.shape)} {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"{name}: expected a float tensor of shape (batch,), got {got}")


def _pair(
    chosen: Tensor, rejected: Tensor, gamma: float = 0.0, **positive: float
) -> tuple[Tensor, Tensor]:
    """Check two (batch,) float tensors and the parameters; return the tensors in at least
    float32.
    """
    _vector("chosen", chosen)
    _vector("rejected", rejected)
    # Broadcasting (1,) against (n,) would give a number for every pair, and the wrong one.
    if chosen.shape != rejected.shape:
        raise ValueError(
            f"chosen {tuple(chosen.shape)} and rejected {tuple(rejected.shape)} differ in length"
        )
    _positive(**positive)
    if not 0.0 <= gamma < float("inf"):
        raise ValueError(f"gamma must be a finite number >= 0, got {gamma!r}")
    # bfloat16 has 8 bits: the difference of two inputs is taken in float32, or the loss would be
    # rounded again.
    wide = torch.promote_types(torch.promote_types(chosen.dtype, rejected.dtype), torch.float32)
    return chosen.to(wide), rejected.to(wide)


def _positive(**values: float) -> None:
    for name, value in values.items():
        if not 0.0 < value < float("inf"):
            raise ValueError(f"{name} must be a positive finite number, got {value!r}")


def dpo(
    chosen_logratios: Tensor,
    rejected_logratios: Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the DPO loss of each pair.

    Eq. 7, arXiv 2305.18290:  -log sigmoid(s),  s = beta * (chosen_logratio - rejected_logratio).
    Label smoothing treats a share e of the labels as flipped:  -(1 - e) log sigmoid(s) - e log
    sigmoid(-s).
    Args:
        chosen_logratios, rejected_logratios: (batch,), nats: log pi(y|x) - log pi_ref(y|x), summed
        over the response.
        beta: strength of the KL penalty, > 0.
        label_smoothing: e in [0, 0.5).
    Returns:
        losses (>= 0), chosen_reward, rejected_reward = beta * logratio (detached), each (batch,) in
        at least float32.
    Raises:
        ValueError: inputs are not two float (batch,) tensors of one length, or a parameter is out
        of range.

    The loss is ln 2 where policy and reference agree, whatever beta and the smoothing; smoothing
    adds e * s to it.
    """
    chosen, rejected = _pair(chosen_logratios, rejected_logratios, beta=beta)
    if not 0.0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must be in [0, 0.5), got {label_smoothing!r}")
    s = beta * (chosen - rejected)
    losses = -(1.0 - label_smoothing) * logsigmoid(s) - label_smoothing * logsigmoid(-s)
    return losses, beta * chosen.detach(), beta * rejected.detach()


def ipo(
    chosen_logratios: Tensor, rejected_logratios: Tensor, *, tau: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the IPO loss of each pair.

    Eq. 17, arXiv 2310.12036:  (h - 1 / (2 tau))^2,  h = chosen_logratio - rejected_logratio.
    The log-ratios are sums over tokens, as in the paper; averaging them gives tau another meaning.

    Args, Returns and Raises are those of dpo, with tau > 0 for beta; the loss is in nats squared.

    The loss is zero, and its gradient too, exactly at h = 1 / (2 tau); at h = 0 it is 1 / (4
    tau^2).
    """
    chosen, rejected = _pair(chosen_logratios, rejected_logratios, tau=tau)
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
    Returns and Raises are those of dpo; the rewards are beta * mean_logp.

    The loss is ln 2 where the rewards differ by exactly gamma.
    """
    chosen, rejected = _pair(chosen_mean_logps, rejected_mean_logps, beta=beta, gamma=gamma)
    losses = -logsigmoid(beta * (chosen - rejected) - gamma)
    return losses, beta * chosen.detach(), beta * rejected.detach()


def _per_pair(name: str, values: Tensor, like: Tensor, below: float = float("inf")) -> Tensor:
    """Check one number in (0, below) per pair; return them as `like` is, detached: they belong to
    the prompt.
    """
    _vector(name, values)
    if values.shape != like.shape:
        raise ValueError(f"{name} has {len(values)} values for {len(like)} pairs")
    if (bad := ~((values > 0) & (values < below))).any():
        row = int(bad.nonzero()[0])
        raise ValueError(f"{name} must be in (0, {below}), got {float(values[row])!r} in row {row}")
    return values.detach().to(like)


def mallows_theta(
    chosen_logratios: Tensor, rejected_logratios: Tensor, weight: Tensor, *, beta: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the MallowsPO-theta loss of each pair: DPO whose s is multiplied by a weight per
    prompt.

    Eq. 8, arXiv 2405.14953:  -log sigmoid(weight * s),  s = beta * (chosen_logratio -
    rejected_logratio).
    The paper's weight is -2 log phi(x); here it is an estimate with mean 1 (dispersion.weights), as
    in its code.

    Args, Returns and Raises are those of dpo, and
        weight: (batch,), no unit, > 0 and finite (ValueError names the row); large where the
            answers to a prompt are all alike. The rewards are without it, as the paper defines
            them; they compare with those of DPO.

    Weight 1 gives DPO; a weight near 0 leaves the pair out. No gradient flows into the weight.
    """
    chosen, rejected = _pair(chosen_logratios, rejected_logratios, beta=beta)
    losses = -logsigmoid(_per_pair("weight", weight, chosen) * (beta * (chosen - rejected)))
    return losses, beta * chosen.detach(), beta * rejected.detach()


def mallows_ipo(
    chosen_logratios: Tensor, rejected_logratios: Tensor, weight: Tensor, *, tau: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the MallowsIPO loss of each pair: IPO whose h is multiplied by a weight per prompt.

    (weight * h - 1 / (2 tau))^2,  h = chosen_logratio - rejected_logratio: no equation of arXiv
    2405.14953 but its authors' code, whose plain `ipo` is (tau * h - 1/2)^2, tau^2 times ours: the
    same minimum, other gradients.

    Args, Returns and Raises are those of ipo, with the weight of mallows_theta.
    Weight 1 gives IPO; the minimum is at h = 1 / (2 tau weight).
    """
    chosen, rejected = _pair(chosen_logratios, rejected_logratios, tau=tau)
    losses = (_per_pair("weight", weight, chosen) * (chosen - rejected) - 1.0 / (2.0 * tau)) ** 2
    return losses, tau * chosen.detach(), tau * rejected.detach()


def mallows_simpo(
    chosen_mean_logps: Tensor,
    rejected_mean_logps: Tensor,
    weight: Tensor,
    *,
    beta: float,
    gamma: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the MallowsSimPO loss of each pair: SimPO whose logit, margin included, is multiplied
    by a weight.

    -log sigmoid(weight * (beta * (chosen_mean_logp - rejected_mean_logp) - gamma)): no equation of
    arXiv 2405.14953 but its authors' code, run without reference and with length normalisation;
    their `home_advantage` is gamma / beta.

    Args, Returns and Raises are those of simpo, with the weight of mallows_theta.
    Weight 1 gives SimPO; the loss is ln 2 where the rewards differ by exactly gamma, whatever the
    weight.
    """
    chosen, rejected = _pair(chosen_mean_logps, rejected_mean_logps, beta=beta, gamma=gamma)
    losses = -logsigmoid(_per_pair("weight", weight, chosen) * (beta * (chosen - rejected) - gamma))
    return losses, beta * chosen.detach(), beta * rejected.detach()


def _log_miss(t: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """Return log(1 - g(t)) and its derivative by t, for g of Eq. 9 and t > 0; a = -log phi.

    With q = phi^t, 1 - g is q (t (1 - phi) - phi (1 - q)) / ((1 - q) (1 - phi q)). The bracket is a
    difference of near equals for phi near 1; with E(x) = 1 - e^-x and n(x) = x / E(x) - 1 it
    becomes a sum,

        1 - g = e^-x E(a) (n(x) + a - n(a)) / (a E(x + a)),    x = a t,    and    n'(x) = (x - n(x))
        / E(x).
    """

    def parts(x: Tensor) -> tuple[Tensor, Tensor]:
        e = -torch.expm1(-x)
        series = x * x / 2 * (1 - x / 3 * (1 - x / 4 * (1 - x / 5)))
        return e, torch.where(x < 1e-3, series, x - e) / e

    x = a * t
    (ea, na), (ex, nx), exa = parts(a), parts(x), -torch.expm1(-x - a)
    bracket = nx + (a - na)
    return torch.log(ea * bracket / (a * exa)) - x, a * ((x - nx) / (ex * bracket) - 1 / exa)


def _log_link(s: Tensor, phi: Tensor, epsilon: float) -> Tensor:
    """Return log g(s) in float64, in which s and phi must be, finite with its gradient for every
    finite s.
    """
    a = -torch.log(phi)
    side = torch.where(s < 0, -1.0, 1.0)
    t = (
        side * s
    )  # |s|, except that its gradient at 0 is 1: training starts there, on the slope of the cubic
    inside = t < epsilon
    far, _ = _log_miss(t.clamp(min=epsilon), a)
    edge, slope = _log_miss(torch.full_like(t, epsilon), a)
    # 1 minus the cubic, as a sum of positive terms: 1/2 at v = 1 (s = 0); value and slope of 1 - g
    # at v = 0.
    v, miss = torch.where(inside, (epsilon - t) / epsilon, 1.0), edge.exp()
    near = miss + v / 2 * ((0.5 - miss) * v * (3 - v) - miss * slope * epsilon * (1 - v) * (2 - v))
    wrong = torch.where(inside, near.log(), far)
    return torch.where(s < 0, wrong, torch.log1p(-wrong.exp()))


def mallows_link(s: Tensor, phi: Tensor, epsilon: float) -> Tensor:
    """Return g(s), the chance that Mallows' phi model with Kendall's distance puts an item before
    one s ranks lower.

    Eq. 9, arXiv 2405.14953, for |s| >= epsilon:  g(s) = (s + 1) / (1 - phi^(s + 1)) - s / (1 -
    phi^s) for s > 0 and g(-s) = 1 - g(s). It jumps at 0; for |s| < epsilon the cubic  1/2 + a1 s +
    a3 s^3  that meets it with its slope is
    taken: a3 = (D epsilon - G) / (2 epsilon^3), a1 = G / epsilon - a3 epsilon^2, G = g(epsilon) -
    1/2,
    D = g'(epsilon) (Eq. 12). The paper does not say how it fits the cubic; this reading gives its
    Fig. 9.

    Args:
        s: (batch,), the reward of the first item minus that of the second, in ranks.
        phi: (batch,), dispersion in (0, 1): near 0 all rank alike (g steps), near 1 at random (g =
        1/2).
        epsilon: half width of the cubic, > 0; one that is tiny shows the jump.
    Returns g, (batch,) float64, in (0, 1) up to rounding. Raises ValueError as mallows_phi.
    """
    _vector("s", s)
    _positive(epsilon=epsilon)
    return _log_link(s.double(), _per_pair("phi", phi, s.double(), 1.0), epsilon).exp()


def mallows_phi(
    chosen_logratios: Tensor,
    rejected_logratios: Tensor,
    phi: Tensor,
    *,
    beta: float,
    epsilon: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the MallowsPO-phi loss of each pair.

    Eq. 7 and 9, arXiv 2405.14953:  -log g(s),  s = beta * (chosen_logratio - rejected_logratio), g
    = mallows_link.

    Args, Returns and Raises are those of dpo, and
        phi: (batch,), dispersion of each prompt in (0, 1) (dispersion.to_phi of a weight;
        ValueError names the row).
        epsilon: half width, in units of s, of the cubic that replaces the jump of g at 0, > 0.

    The loss is ln 2 where policy and reference agree. Far on the wrong side it grows as |s| times
    -log phi. It is computed in float64 and in logarithms, so that it and its gradient are finite
    for every s.
    """
    chosen, rejected = _pair(chosen_logratios, rejected_logratios, beta=beta, epsilon=epsilon)
    s = beta * (chosen.double() - rejected.double())
    losses = -_log_link(s, _per_pair("phi", phi, s, 1.0), epsilon).to(chosen.dtype)
    return losses, beta * chosen.detach(), beta * rejected.detach()


def _fused(source: Tensor, target: Tensor, rejected: Tensor, alpha: float) -> Tensor:
    """Check three (batch,) float tensors and alpha; return alpha * source + (1 - alpha) *
    target.
    """
    source, _ = _pair(source, rejected)
    target, _ = _pair(target, rejected)
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha must be in [0, 1], got {alpha!r}")
    return alpha * source + (1.0 - alpha) * target


def wrpo(
    source_logratios: Tensor,
    target_logratios: Tensor,
    rejected_logratios: Tensor,
    *,
    alpha: float,
    beta: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the WRPO loss of each quadruple (prompt, source's best, target's best, rejected
    response).

    arXiv 2412.03187:  -log sigmoid(alpha * r(y_ws) + (1 - alpha) * r(y_wt) - r(y_l)),  r(y) = beta
    * logratio(y). All three share one sigmoid, and so one gradient weight: this is no mix of two
    DPO losses (hybrid is).

    Args:
        source_logratios, target_logratios, rejected_logratios: (batch,), nats: log pi(y|x) - log
        pi_ref(y|x), summed
            over the response: the best one of the source models, the best and the worst of the
            target's own.
        alpha: fusion coefficient, the share of the source's response, in [0, 1]; the paper's rises
        from 0 to 0.1.
        beta: strength of the KL penalty, > 0.
    Returns and Raises are those of dpo; chosen_reward is the weighted one.

    alpha = 0 is DPO on (target, rejected), alpha = 1 DPO on (source, rejected); ln 2 where policy
    and reference agree.
    """
    chosen = _fused(source_logratios, target_logratios, rejected_logratios, alpha)
    return dpo(chosen, rejected_logratios, beta=beta)


def wrpo_ipo(
    source_logratios: Tensor,
    target_logratios: Tensor,
    rejected_logratios: Tensor,
    *,
    alpha: float,
    tau: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute IPO's form of WRPO:  (alpha * h(y_ws) + (1 - alpha) * h(y_wt) - h(y_l) - 1 / (2
    tau))^2,  h = logratio.

    Derived here from IPO (Eq. 17, arXiv 2310.12036) with WRPO's weighted reward; arXiv 2412.03187
    has such a variant, whose formula is not public to us. Args, Returns and Raises are those of
    wrpo, with tau as in ipo.
    alpha = 0 is IPO on (target, rejected), alpha = 1 IPO on (source, rejected).
    """
    chosen = _fused(source_logratios, target_logratios, rejected_logratios, alpha)
    return ipo(chosen, rejected_logratios, tau=tau)


def wrpo_simpo(
    source_mean_logps: Tensor,
    target_mean_logps: Tensor,
    rejected_mean_logps: Tensor,
    *,
    alpha: float,
    beta: float,
    gamma: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute SimPO's form of WRPO:  -log sigmoid(beta * (alpha * l(y_ws) + (1 - alpha) * l(y_wt) -
    l(y_l)) - gamma).

    l is the mean log-probability of a token, in nats; there is no reference model. Derived here
    from SimPO (Eq. 6, arXiv 2405.14734) with WRPO's weighted reward; arXiv 2412.03187 has such a
    variant, whose formula is not public to us. Args, Returns and Raises are those of wrpo, with
    mean_logps, beta and gamma as in simpo.
    alpha = 0 is SimPO on (target, rejected), alpha = 1 SimPO on (source, rejected).
    """
    chosen = _fused(source_mean_logps, target_mean_logps, rejected_mean_logps, alpha)
    return simpo(chosen, rejected_mean_logps, beta=beta, gamma=gamma)


def hybrid(
    source_logratios: Tensor, target_logratios: Tensor, rejected_logratios: Tensor, *, beta: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the mean of two DPO losses, (source, rejected) and (target, rejected): the baseline
    of WRPO's authors.

    It is the `sigmoid` branch of their code (arXiv 2412.03187): each pair has a sigmoid, and so a
    gradient, of its own. Args, Returns and Raises are those of wrpo; chosen_reward is the mean of
    both. It is never below wrpo at alpha 1/2.
    """
    source, chosen, rejected = dpo(source_logratios, rejected_logratios, beta=beta)
    target, other, _ = dpo(target_logratios, rejected_logratios, beta=beta)
    return (source + target) / 2, (chosen + other) / 2, rejected


@dataclass(frozen=True)
class Loss:
    """A loss and what it has to be given."""

    # takes a (batch,) tensor for each response, the weights if it needs them, and its settings
    function: Callable[..., tuple[Tensor, Tensor, Tensor]]
    # the responses that it takes, by name and in its order: one of these tuples
    responses: tuple[tuple[str, ...], ...]
    # the names of its keyword arguments
    settings: tuple[str, ...]
    # takes log-ratios to the reference model; without it, mean log-probabilities of a token
    needs_reference: bool = True
    # takes a weight for each prompt (dispersion.weights), or phi of that weight
    needs_weights: bool = False


PAIRS = (("chosen", "rejected"), ("source_chosen", "rejected"), ("target_chosen", "rejected"))
TRIPLE = (FUSED,)
LOSSES: dict[str, Loss] = {
    "dpo": Loss(dpo, PAIRS, ("beta", "label_smoothing")),
    "ipo": Loss(ipo, PAIRS, ("tau",)),
    "simpo": Loss(simpo, PAIRS, ("beta", "gamma"), needs_reference=False),
    "mallows_theta": Loss(mallows_theta, PAIRS, ("beta",), needs_weights=True),
    "mallows_phi": Loss(mallows_phi, PAIRS, ("beta", "epsilon"), needs_weights=True),
    "mallows_ipo": Loss(mallows_ipo, PAIRS, ("tau",), needs_weights=True),
    "mallows_simpo": Loss(
        mallows_simpo, PAIRS, ("beta", "gamma"), needs_reference=False, needs_weights=True
    ),
    "wrpo": Loss(wrpo, TRIPLE, ("alpha", "beta")),
    "wrpo_ipo": Loss(wrpo_ipo, TRIPLE, ("alpha", "tau")),
    "wrpo_simpo": Loss(wrpo_simpo, TRIPLE, ("alpha", "beta", "gamma"), needs_reference=False),
    "hybrid": Loss(hybrid, TRIPLE, ("beta",)),
}
