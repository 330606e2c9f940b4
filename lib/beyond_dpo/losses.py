"""Preference losses: free functions on tensors, derived from the equations of the papers."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from beyond_dpo.rows import FUSED

INFINITY = float("inf")


def _require_vector(name: str, values: Tensor) -> None:
    if not isinstance(values, Tensor):
        got = type(values).__name__
    elif values.dim() != 1 or not values.is_floating_point():
        got = f"{tuple(values.shape)} {values.dtype}"
    else:
        return
    raise ValueError(f"{name}: expected a float tensor of shape (batch,), got {got}")


def _require_positive(**values: float) -> None:
    for name, value in values.items():
        if not 0.0 < value < INFINITY:
            raise ValueError(f"{name} must be a positive finite number, got {value!r}")


def _require_gamma(gamma: float) -> None:
    if not 0.0 <= gamma < INFINITY:
        raise ValueError(f"gamma must be a finite number >= 0, got {gamma!r}")


def _pair(chosen: Tensor, rejected: Tensor) -> tuple[Tensor, Tensor]:
    """Check two (batch,) float tensors, and return them in at least float32."""
    _require_vector("chosen", chosen)
    _require_vector("rejected", rejected)
    # Broadcasting (1,) against (n,) would give a number for every pair, and the wrong one.
    if chosen.shape != rejected.shape:
        raise ValueError(
            f"chosen {tuple(chosen.shape)} and rejected {tuple(rejected.shape)} differ in length"
        )
    # bfloat16 has 8 bits of precision. The difference of the two is taken in float32, or it would
    # be rounded once more.
    common = torch.promote_types(chosen.dtype, rejected.dtype)
    dtype = torch.promote_types(common, torch.float32)
    return chosen.to(dtype), rejected.to(dtype)


def _per_prompt(name: str, values: Tensor, like: Tensor, below: float = INFINITY) -> Tensor:
    """Check a number in (0, below) for each pair; return the numbers without a gradient.

    They belong to the prompts. They get the dtype and the device of `like`, (batch,). Where they
    come from the main memory, their check does not wait for the GPU.
    """
    _require_vector(name, values)
    if values.shape != like.shape:
        raise ValueError(f"{name} has {len(values)} values for {len(like)} pairs")
    in_range = (values > 0) & (values < below)
    if not in_range.all():
        row = int((~in_range).nonzero()[0])
        value = float(values[row])
        raise ValueError(f"{name} must be in (0, {below}), got {value!r} in row {row}")
    return values.detach().to(like.device, like.dtype, non_blocking=True)


# ---- DPO, IPO, SimPO


def dpo(
    chosen_logratios: Tensor,
    rejected_logratios: Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the DPO loss of each pair.

    Eq. 7, arXiv 2305.18290:
        -log sigmoid(s),  s = beta * (chosen_logratio - rejected_logratio).
    Label smoothing treats a share e of the labels as flipped:
        -(1 - e) log sigmoid(s) - e log sigmoid(-s).

    Args:
        chosen_logratios: (batch,), nats: log pi(y|x) - log pi_ref(y|x), summed over the response.
        rejected_logratios: (batch,), the same of the rejected response.
        beta: strength of the KL penalty, > 0.
        label_smoothing: e in [0, 0.5).
    Returns:
        losses (>= 0), chosen_reward and rejected_reward, each (batch,) in at least float32. A
        reward is beta * logratio, without a gradient.
    Raises:
        ValueError: the inputs are not two float tensors (batch,) of one length, or a parameter is
            out of its range.

    The loss is ln 2 where policy and reference agree, whatever beta and the smoothing are. The
    smoothing adds e * s to the loss.
    """
    chosen, rejected = _pair(chosen_logratios, rejected_logratios)
    _require_positive(beta=beta)
    if not 0.0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must be in [0, 0.5), got {label_smoothing!r}")
    margin = beta * (chosen - rejected)
    as_labelled = (1.0 - label_smoothing) * logsigmoid(margin)
    flipped = label_smoothing * logsigmoid(-margin)
    losses = -as_labelled - flipped
    chosen_reward = beta * chosen.detach()
    rejected_reward = beta * rejected.detach()
    return losses, chosen_reward, rejected_reward


def ipo(
    chosen_logratios: Tensor, rejected_logratios: Tensor, *, tau: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the IPO loss of each pair.

    Eq. 17, arXiv 2310.12036:
        (h - 1 / (2 tau))^2,  h = chosen_logratio - rejected_logratio.
    The log-ratios are sums over tokens, as in the paper; averages would give tau another meaning.

    Args, Returns and Raises are those of dpo, with tau > 0 in place of beta. The loss is in nats
    squared.

    The loss and its gradient are zero exactly at h = 1 / (2 tau). At h = 0 the loss is
    1 / (4 tau^2).
    """
    chosen, rejected = _pair(chosen_logratios, rejected_logratios)
    _require_positive(tau=tau)
    margin = chosen - rejected
    target = 1.0 / (2.0 * tau)
    losses = (margin - target) ** 2
    chosen_reward = tau * chosen.detach()
    rejected_reward = tau * rejected.detach()
    return losses, chosen_reward, rejected_reward


def simpo(
    chosen_mean_logps: Tensor, rejected_mean_logps: Tensor, *, beta: float, gamma: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the SimPO loss of each pair, which needs no reference model.

    Eq. 6, arXiv 2405.14734:
        -log sigmoid(beta * (chosen_mean_logp - rejected_mean_logp) - gamma).

    Args:
        chosen_mean_logps: (batch,), nats per token: log pi(y|x) / |y|.
        rejected_mean_logps: (batch,), the same of the rejected response.
        beta: scale of the reward, > 0.
        gamma: the target margin itself (not its ratio to beta), >= 0.
    Returns and Raises are those of dpo. A reward is beta * mean_logp.

    The loss is ln 2 where the rewards differ by exactly gamma.
    """
    chosen, rejected = _pair(chosen_mean_logps, rejected_mean_logps)
    _require_positive(beta=beta)
    _require_gamma(gamma)
    margin = beta * (chosen - rejected)
    losses = -logsigmoid(margin - gamma)
    chosen_reward = beta * chosen.detach()
    rejected_reward = beta * rejected.detach()
    return losses, chosen_reward, rejected_reward


# ---- MallowsPO


def mallows_theta(
    chosen_logratios: Tensor, rejected_logratios: Tensor, weight: Tensor, *, beta: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the MallowsPO-theta loss of each pair: DPO with a weight for each prompt.

    Eq. 8, arXiv 2405.14953:
        -log sigmoid(weight * s),  s = beta * (chosen_logratio - rejected_logratio).
    The paper's weight is -2 log phi(x). Here it is an estimate with mean 1 (dispersion.weights), as
    in the authors' code.

    Args:
        weight: (batch,), without unit, > 0 and finite: large where the answers to a prompt are all
            alike.
    The other Args, Returns and Raises are those of dpo; the ValueError for a weight names its row.
    The rewards are without the weight, as the paper defines them, and compare with those of DPO.

    Weight 1 gives DPO; a weight near 0 leaves the pair out. No gradient flows into the weight.
    """
    chosen, rejected = _pair(chosen_logratios, rejected_logratios)
    _require_positive(beta=beta)
    weights = _per_prompt("weight", weight, chosen)
    margin = beta * (chosen - rejected)
    losses = -logsigmoid(weights * margin)
    chosen_reward = beta * chosen.detach()
    rejected_reward = beta * rejected.detach()
    return losses, chosen_reward, rejected_reward


def mallows_ipo(
    chosen_logratios: Tensor, rejected_logratios: Tensor, weight: Tensor, *, tau: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the MallowsIPO loss of each pair: IPO with a weight for each prompt.

        (weight * h - 1 / (2 tau))^2,  h = chosen_logratio - rejected_logratio
    is no equation of arXiv 2405.14953 but follows its authors' code. Their plain `ipo` is
    (tau * h - 1/2)^2, which is tau^2 times the loss here: the same minimum, other gradients.

    Args, Returns and Raises are those of ipo, with the weight of mallows_theta.

    Weight 1 gives IPO; the minimum is at h = 1 / (2 tau weight).
    """
    chosen, rejected = _pair(chosen_logratios, rejected_logratios)
    _require_positive(tau=tau)
    weights = _per_prompt("weight", weight, chosen)
    margin = chosen - rejected
    target = 1.0 / (2.0 * tau)
    losses = (weights * margin - target) ** 2
    chosen_reward = tau * chosen.detach()
    rejected_reward = tau * rejected.detach()
    return losses, chosen_reward, rejected_reward


def mallows_simpo(
    chosen_mean_logps: Tensor,
    rejected_mean_logps: Tensor,
    weight: Tensor,
    *,
    beta: float,
    gamma: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the MallowsSimPO loss of each pair: SimPO with a weight for each prompt.

    The weight multiplies the whole logit, with its margin:
        -log sigmoid(weight * (beta * (chosen_mean_logp - rejected_mean_logp) - gamma)).
    This is no equation of arXiv 2405.14953 but its authors' code, run without a reference and with
    length normalisation; their `home_advantage` is gamma / beta.

    Args, Returns and Raises are those of simpo, with the weight of mallows_theta.

    Weight 1 gives SimPO. The loss is ln 2 where the rewards differ by exactly gamma, whatever the
    weight.
    """
    chosen, rejected = _pair(chosen_mean_logps, rejected_mean_logps)
    _require_positive(beta=beta)
    _require_gamma(gamma)
    weights = _per_prompt("weight", weight, chosen)
    margin = beta * (chosen - rejected)
    losses = -logsigmoid(weights * (margin - gamma))
    chosen_reward = beta * chosen.detach()
    rejected_reward = beta * rejected.detach()
    return losses, chosen_reward, rejected_reward


def mallows_link(s: Tensor, phi: Tensor, epsilon: float) -> Tensor:
    """Return g(s), the chance that Mallows' phi model puts an item before one s ranks lower.

    The model has Kendall's distance. Eq. 9, arXiv 2405.14953, for |s| >= epsilon:
        g(s) = (s + 1) / (1 - phi^(s + 1)) - s / (1 - phi^s)  for s > 0,  g(-s) = 1 - g(s).
    This jumps at 0. For |s| < epsilon it is replaced by the cubic 1/2 + a1 s + a3 s^3 that meets it
    with the same slope:
        a3 = (D epsilon - G) / (2 epsilon^3),  a1 = G / epsilon - a3 epsilon^2,
        G = g(epsilon) - 1/2,  D = g'(epsilon)  (Eq. 12).
    The paper does not say how it fits the cubic; this reading gives its Fig. 9.

    Args:
        s: (batch,), the reward of the first item minus that of the second, in ranks.
        phi: (batch,), dispersion in (0, 1). Near 0 all rank alike and g is a step; near 1 they rank
            at random and g is 1/2.
        epsilon: half width of the cubic, > 0; a tiny one shows the jump.
    Returns:
        g, (batch,) float64, in (0, 1) up to rounding.
    Raises:
        ValueError: as in mallows_phi.
    """
    _require_vector("s", s)
    _require_positive(epsilon=epsilon)
    s = s.double()
    dispersion = _per_prompt("phi", phi, s, below=1.0)
    return _log_link(s, dispersion, epsilon).exp()


def mallows_phi(
    chosen_logratios: Tensor,
    rejected_logratios: Tensor,
    phi: Tensor,
    *,
    beta: float,
    epsilon: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the MallowsPO-phi loss of each pair.

    Eq. 7 and 9, arXiv 2405.14953:
        -log g(s),  s = beta * (chosen_logratio - rejected_logratio),  g = mallows_link.

    Args:
        phi: (batch,), dispersion of each prompt in (0, 1): dispersion.to_phi of a weight.
        epsilon: half width, in units of s, of the cubic that replaces the jump of g at 0, > 0.
    The other Args, Returns and Raises are those of dpo; the ValueError for a phi names its row.

    The loss is ln 2 where policy and reference agree. Far on the wrong side it grows as |s| times
    -log phi. It is computed in float64 and in logarithms, so that it and its gradient are finite
    for every s.
    """
    chosen, rejected = _pair(chosen_logratios, rejected_logratios)
    _require_positive(beta=beta, epsilon=epsilon)
    margin = beta * (chosen.double() - rejected.double())
    dispersion = _per_prompt("phi", phi, margin, below=1.0)
    losses = -_log_link(margin, dispersion, epsilon).to(chosen.dtype)
    chosen_reward = beta * chosen.detach()
    rejected_reward = beta * rejected.detach()
    return losses, chosen_reward, rejected_reward


def _log_link(s: Tensor, phi: Tensor, epsilon: float) -> Tensor:
    """Return log g(s) in float64, finite with its gradient for every finite s.

    s and phi must be float64. g is computed from 1 - g(|s|), the chance of the wrong order.
    """
    a = -torch.log(phi)
    side = torch.where(s < 0, -1.0, 1.0)
    # |s|, except that its gradient at 0 is 1: training starts there, on the slope of the cubic
    distance = side * s
    is_near = distance < epsilon
    far, _ = _log_miss(distance.clamp(min=epsilon), a)
    edge, slope = _log_miss(torch.full_like(distance, epsilon), a)
    # 1 minus the cubic, as a sum of positive terms. It is 1/2 at v = 1 (s = 0), and has the value
    # and the slope of 1 - g at v = 0 (s = epsilon).
    v = torch.where(is_near, (epsilon - distance) / epsilon, 1.0)
    miss_at_edge = edge.exp()
    half_v = v / 2
    rise = (0.5 - miss_at_edge) * v * (3 - v)
    bend = miss_at_edge * slope * epsilon * (1 - v) * (2 - v)
    near = miss_at_edge + half_v * (rise - bend)
    log_miss = torch.where(is_near, near.log(), far)
    log_hit = torch.log1p(-log_miss.exp())
    return torch.where(s < 0, log_miss, log_hit)


def _log_miss(t: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """Return log(1 - g(t)) and its derivative by t, for g of Eq. 9 and t > 0; a = -log phi.

    With q = phi^t, 1 - g is q (t (1 - phi) - phi (1 - q)) / ((1 - q) (1 - phi q)). The bracket is a
    difference of near equals for phi near 1. With E(x) = 1 - e^-x, n(x) = x / E(x) - 1 and x = a t
    it becomes a sum:
        1 - g = e^-x E(a) (n(x) + a - n(a)) / (a E(x + a)),  n'(x) = (x - n(x)) / E(x).
    """
    x = a * t
    e_of_a, n_of_a = _e_and_n(a)
    e_of_x, n_of_x = _e_and_n(x)
    e_of_sum = -torch.expm1(-x - a)
    bracket = n_of_x + (a - n_of_a)
    log_miss = torch.log(e_of_a * bracket / (a * e_of_sum)) - x
    slope = a * ((x - n_of_x) / (e_of_x * bracket) - 1 / e_of_sum)
    return log_miss, slope


def _e_and_n(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return E(x) = 1 - e^-x and n(x) = x / E(x) - 1, exact for small x too."""
    e = -torch.expm1(-x)
    # x - E(x) up to x^5
    series = x * x / 2 * (1 - x / 3 * (1 - x / 4 * (1 - x / 5)))
    difference = torch.where(x < 1e-3, series, x - e)
    return e, difference / e


# ---- WRPO


def _fuse(source: Tensor, target: Tensor, rejected: Tensor, alpha: float) -> Tensor:
    """Check three (batch,) float tensors and alpha; return alpha source + (1 - alpha) target."""
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
    """Compute the WRPO loss of each prompt with three responses.

    arXiv 2412.03187:
        -log sigmoid(alpha * r(y_ws) + (1 - alpha) * r(y_wt) - r(y_l)),  r(y) = beta * logratio(y).
    All three share one sigmoid, and so one gradient weight: this is no mix of two DPO losses
    (hybrid is).

    Args:
        source_logratios: (batch,), nats: log pi(y|x) - log pi_ref(y|x), summed over y_ws, the best
            response of the source models.
        target_logratios: (batch,), the same of y_wt, the best of the target's own responses.
        rejected_logratios: (batch,), the same of y_l, the worst of the target's own responses.
        alpha: fusion coefficient in [0, 1], the share of the source's response; the paper's rises
            from 0 to 0.1.
        beta: strength of the KL penalty, > 0.
    Returns and Raises are those of dpo; chosen_reward is the weighted one.

    alpha = 0 is DPO on (target, rejected), alpha = 1 is DPO on (source, rejected). The loss is ln 2
    where policy and reference agree.
    """
    chosen = _fuse(source_logratios, target_logratios, rejected_logratios, alpha)
    return dpo(chosen, rejected_logratios, beta=beta)


def wrpo_ipo(
    source_logratios: Tensor,
    target_logratios: Tensor,
    rejected_logratios: Tensor,
    *,
    alpha: float,
    tau: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute IPO's form of the WRPO loss of each prompt with three responses.

        (alpha * h(y_ws) + (1 - alpha) * h(y_wt) - h(y_l) - 1 / (2 tau))^2,  h = logratio,
    is derived here from IPO (Eq. 17, arXiv 2310.12036) with WRPO's weighted reward. arXiv
    2412.03187 has such a variant, whose formula is not public to us.

    Args, Returns and Raises are those of wrpo, with tau as in ipo.

    alpha = 0 is IPO on (target, rejected), alpha = 1 is IPO on (source, rejected).
    """
    chosen = _fuse(source_logratios, target_logratios, rejected_logratios, alpha)
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
    """Compute SimPO's form of the WRPO loss of each prompt with three responses.

        -log sigmoid(beta * (alpha * l(y_ws) + (1 - alpha) * l(y_wt) - l(y_l)) - gamma),
    with l the mean log-probability of a token in nats, needs no reference model. It is derived here
    from SimPO (Eq. 6, arXiv 2405.14734) with WRPO's weighted reward. arXiv 2412.03187 has such a
    variant, whose formula is not public to us.

    Args, Returns and Raises are those of wrpo, with mean_logps, beta and gamma as in simpo.

    alpha = 0 is SimPO on (target, rejected), alpha = 1 is SimPO on (source, rejected).
    """
    chosen = _fuse(source_mean_logps, target_mean_logps, rejected_mean_logps, alpha)
    return simpo(chosen, rejected_mean_logps, beta=beta, gamma=gamma)


def hybrid(
    source_logratios: Tensor, target_logratios: Tensor, rejected_logratios: Tensor, *, beta: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the mean of two DPO losses: of (source, rejected) and of (target, rejected).

    It is a baseline of WRPO's authors, the `sigmoid` branch of their code (arXiv 2412.03187). Each
    pair has a sigmoid, and so a gradient weight, of its own.

    Args, Returns and Raises are those of wrpo, without alpha; chosen_reward is the mean of both.

    It is never below wrpo at alpha 1/2.
    """
    source_losses, source_reward, rejected_reward = dpo(
        source_logratios, rejected_logratios, beta=beta
    )
    target_losses, target_reward, _ = dpo(target_logratios, rejected_logratios, beta=beta)
    losses = (source_losses + target_losses) / 2
    chosen_reward = (source_reward + target_reward) / 2
    return losses, chosen_reward, rejected_reward


# ---- the table


@dataclass(frozen=True)
class Loss:
    """A loss and what it has to be given."""

    # called with a (batch,) tensor for each response, the weights if it needs them, its settings
    function: Callable[..., tuple[Tensor, Tensor, Tensor]]
    # the responses that it takes, by name and in its order: one of these tuples
    responses: tuple[tuple[str, ...], ...]
    # the names of its keyword arguments
    settings: tuple[str, ...]
    # True: it takes log-ratios to the reference model; False: mean log-probabilities of a token
    needs_reference: bool = True
    # True: it takes a weight for each prompt (dispersion.weights), or the phi of that weight
    needs_weights: bool = False


PAIRS = (
    ("chosen", "rejected"),
    ("source_chosen", "rejected"),
    ("target_chosen", "rejected"),
    ("source_chosen", "source_rejected"),
)
TRIPLE = (FUSED,)
LOSSES: dict[str, Loss] = {
    "dpo": Loss(
        function=dpo,
        responses=PAIRS,
        settings=("beta", "label_smoothing"),
    ),
    "ipo": Loss(
        function=ipo,
        responses=PAIRS,
        settings=("tau",),
    ),
    "simpo": Loss(
        function=simpo,
        responses=PAIRS,
        settings=("beta", "gamma"),
        needs_reference=False,
    ),
    "mallows_theta": Loss(
        function=mallows_theta,
        responses=PAIRS,
        settings=("beta",),
        needs_weights=True,
    ),
    "mallows_phi": Loss(
        function=mallows_phi,
        responses=PAIRS,
        settings=("beta", "epsilon"),
        needs_weights=True,
    ),
    "mallows_ipo": Loss(
        function=mallows_ipo,
        responses=PAIRS,
        settings=("tau",),
        needs_weights=True,
    ),
    "mallows_simpo": Loss(
        function=mallows_simpo,
        responses=PAIRS,
        settings=("beta", "gamma"),
        needs_reference=False,
        needs_weights=True,
    ),
    "wrpo": Loss(
        function=wrpo,
        responses=TRIPLE,
        settings=("alpha", "beta"),
    ),
    "wrpo_ipo": Loss(
        function=wrpo_ipo,
        responses=TRIPLE,
        settings=("alpha", "tau"),
    ),
    "wrpo_simpo": Loss(
        function=wrpo_simpo,
        responses=TRIPLE,
        settings=("alpha", "beta", "gamma"),
        needs_reference=False,
    ),
    "hybrid": Loss(
        function=hybrid,
        responses=TRIPLE,
        settings=("beta",),
    ),
}
