"""The five-armed bandit of MallowsPO (arXiv 2405.14953, section 5.2 and appendix C.1).

It is trained at the paper's full length. The paper states the arms' rewards (Table 4), the 16 pairs
(Table 5), full-batch SGD with lr 5e-3 for 500,000 steps and φ = 0.05. It does not state, and we
chose as what reproduces Figures 8 and 9: five free logits from 0 under a softmax, a uniform
reference, the mean (not the sum) over pairs, and a smoothing of the φ link that ends at |s| = 0.05.
"""

import numpy as np
from numba import njit
from scipy.special import rel_entr, softmax

# Table 4: the two rewards of each arm, as (reward, probability).
REWARDS = (
    ((20, 0.5), (11, 0.5)),
    ((30, 0.5), (3, 0.5)),
    ((18, 0.5), (15, 0.5)),
    ((15, 0.99), (10, 0.01)),
    ((1, 0.99), (4, 0.01)),
)
MEANS = np.prod(REWARDS, -1).sum(-1)  # the expected reward of each arm
ARMS = len(REWARDS)
# Table 5: (winner, loser) of each pair; arms count from 0 here, from 1 in the paper.
PAIRS = (
    (2, 4),
    (1, 4),
    (1, 4),
    (0, 1),
    (2, 4),
    (0, 4),
    (0, 3),
    (0, 4),
    (3, 4),
    (1, 3),
    (1, 0),
    (1, 4),
    (0, 2),
    (2, 4),
    (2, 3),
    (3, 1),
)
PHI = 0.05  # dispersion index
EPSILON = 0.05  # half width of the smoothing


def train(
    betas, *, link: str, steps: int = 500_000, lr: float = 5e-3, record_every: int = 100
) -> tuple[np.ndarray, np.ndarray]:
    """Train one policy per β on the 16 pairs: full-batch gradient descent in float64.

    It is compiled, and runs on one core. The loss is the mean of -log g(s) with
    s = β (θ_winner - θ_loser), as a uniform reference and the softmax's normaliser cancel (Eq. 7
    and 9, arXiv 2405.14953). link "dpo": g = sigmoid. link "mallows_phi": g(-s) = 1 - g(s), and for
    s > 0

        g = (s + 1) / (1 - φ^(s+1)) - s / (1 - φ^s).

    That jumps at 0. For |s| < ε the cubic 1/2 + a1 s + a3 s³ (section 3.4) stands in, which meets g
    and its slope at ±ε. The paper names neither this way to fit it nor ε. The cubic is steep: from
    β = 3.5 on (at this φ, ε and lr) the first steps overshoot, and rounding may grow to 1e-5 in
    passing.

    Args:
        betas: (k,) strengths of the KL penalty, > 0.
        link: "dpo" or "mallows_phi".
        steps: a multiple of record_every.
        lr: learning rate, > 0.
        record_every: steps between two records.
    Returns:
        (n,) int64, the steps done at each record: 0, record_every, ..., steps; and
        (n, k, 5) float64, the arms' probabilities then.
    Raises:
        ValueError: an unknown link, no β, or a parameter out of its range.
    """
    if link not in ("dpo", "mallows_phi"):
        raise ValueError(f'link must be "dpo" or "mallows_phi", got {link!r}')
    betas = np.asarray(betas, dtype=float)
    is_list = betas.ndim == 1
    if not is_list or betas.size == 0:
        raise ValueError(f"betas must be a list of at least one number, got shape {betas.shape}")
    _require_positive("betas", betas)
    _require_positive("lr", lr)
    if record_every < 1 or steps < 1 or steps % record_every:
        raise ValueError(
            f"steps must be a positive multiple of record_every ({record_every}), got {steps!r}"
        )
    records = steps // record_every + 1
    shape = (records, len(betas), ARMS)
    logits = np.zeros(shape)
    is_dpo = link == "dpo"
    _descend(logits, betas, is_dpo, record_every, float(lr))
    steps_done = np.arange(records) * record_every
    return steps_done, softmax(logits, -1)


def _require_positive(name: str, value) -> None:
    positive = (0 < value) & (value < np.inf)
    if not np.all(positive):
        raise ValueError(f"{name} must be positive and finite, got {value!r}")


def reward(probs) -> np.ndarray:
    """Return the expected true reward (Table 4, arXiv 2405.14953) of arm probabilities.

    probs: (..., 5). The result is (...).
    """
    return np.asarray(probs) @ MEANS


def kl(probs) -> np.ndarray:
    """Return KL(π ‖ uniform) in nats: 0 for the uniform policy, ln 5 for a single arm.

    probs: (..., 5) arm probabilities. The result is (...).
    """
    uniform = np.full(ARMS, 1 / ARMS)
    terms = rel_entr(probs, uniform)
    return terms.sum(-1)


# Not cache=True: compiling takes a second, and where no folder can be written, the import would
# fail.
@njit
def _phi_link(t):
    """Return (q, u, v) with 1 - g(t) = g(-t) = q u and slope g'(t) = g'(-t) = -q v, at t > 0.

    Eq. 9 and 12, arXiv 2405.14953. q = φ^t is kept apart: at large t, g(-t) is too small for a
    float, but the slope of log g there, -v/u, is not.
    """
    log_phi = np.log(PHI)
    q = np.exp(t * log_phi)
    b = 1 / (1 - q)
    c = 1 / (1 - PHI * q)
    next_t = t + 1
    u = t * b - next_t * PHI * c
    slope_of_factors = t * b * b - next_t * PHI * c * c
    slope_of_t = b - PHI * c
    v = slope_of_t + log_phi * slope_of_factors
    return q, u, v


@njit
def _cubic():
    """Return (a1, a3) of the cubic 1/2 + a1 s + a3 s³ that meets g and its slope at s = ±ε."""
    q, u, v = _phi_link(EPSILON)
    gap = 0.5 - q * u
    slope = -q * v
    cube = EPSILON**3
    a3 = (slope * EPSILON - gap) / (2 * cube)
    square = EPSILON**2
    a1 = gap / EPSILON - a3 * square
    return a1, a3


@njit
def _log_slope(s, dpo, a1, a3):
    """Return d log g / ds of the link at s."""
    if dpo:
        return 1 / (1 + np.exp(s))
    if abs(s) < EPSILON:
        g = 0.5 + a1 * s + a3 * s**3
        slope = a1 + 3 * a3 * s * s
        return slope / g
    q, u, v = _phi_link(abs(s))
    if s < 0:
        return -v / u
    slope = -q * v
    g = 1 - q * u
    return slope / g


# The loops go over arms: array expressions here would take three times as long to compile.
@njit
def _descend(logits, betas, dpo, every, lr):
    """Descend from 0 for each β, and fill the rows of logits (n, k, 5) but the first.

    Each row holds the logits after `every` more steps.
    """
    a1, a3 = _cubic()
    rise = np.zeros(ARMS)  # minus the gradient, but for the factor β / pairs
    for k in range(len(betas)):
        beta = betas[k]
        theta = np.zeros(ARMS)
        for row in range(1, len(logits)):
            for _ in range(every):
                for winner, loser in PAIRS:
                    difference = theta[winner] - theta[loser]
                    s = beta * difference
                    log_slope = _log_slope(s, dpo, a1, a3)
                    rise[winner] += log_slope
                    rise[loser] -= log_slope
                for arm in range(ARMS):
                    theta[arm] += lr * beta / len(PAIRS) * rise[arm]
                    rise[arm] = 0.0
            for arm in range(ARMS):
                logits[row, k, arm] = theta[arm]
