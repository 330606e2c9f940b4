"""The five-armed bandit of MallowsPO (arXiv 2405.14953, section 5.2 and appendix C.1) at the
paper's full length.

The paper states the arms' rewards (Table 4), the 16 pairs (Table 5), full-batch SGD with lr 5e-3
for 500,000 steps and φ = 0.05. It does not state, and we chose as what reproduces Figures 8 and 9:
five free logits from 0 under a softmax, a uniform reference, the mean (not the sum) over pairs, and
a smoothing of the φ link that ends at |s| = 0.05.
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
MEANS = np.prod(REWARDS, -1).sum(-1)
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
PHI, EPSILON = 0.05, 0.05  # dispersion index, half width of the smoothing


def train(
    betas, *, link: str, steps: int = 500_000, lr: float = 5e-3, record_every: int = 100
) -> tuple[np.ndarray, np.ndarray]:
    """Train one policy per β on the 16 pairs: full-batch gradient descent in float64, compiled, on
    one core.

    Eq. 7 and 9, arXiv 2405.14953:  mean of -log g(s),  s = β (θ_winner - θ_loser), as a uniform
    reference and the softmax's normaliser cancel. link "dpo": g = sigmoid. link "mallows_phi":
    g(-s) = 1 - g(s), and for s > 0
    g = (s + 1) / (1 - φ^(s+1)) - s / (1 - φ^s). It jumps at 0; for |s| < ε the cubic 1/2 + a1 s +
    a3 s³ (section 3.4) stands in, which meets g and its slope at ±ε. The paper names neither this
    way to fit it nor ε. The cubic is steep: from β = 3.5 on (at this φ, ε and lr) the first steps
    overshoot, and rounding may grow to 1e-5 in passing.

    Args:
        betas: (k,) strengths of the KL penalty, > 0. lr: > 0. steps: a multiple of record_every.
    Returns:
        (n,) int64, the steps done at each record: 0, record_every, ..., steps; (n, k, 5) float64,
        the arms' probabilities then.
    Raises:
        ValueError: an unknown link, no β, or a parameter out of its range.
    """
    if link not in ("dpo", "mallows_phi"):
        raise ValueError(f'link must be "dpo" or "mallows_phi", got {link!r}')
    betas = np.asarray(betas, dtype=float)
    if betas.ndim != 1 or not betas.size:
        raise ValueError(f"betas must be a list of at least one number, got shape {betas.shape}")
    for name, value in (("betas", betas), ("lr", lr)):
        if not np.all((0 < value) & (value < np.inf)):
            raise ValueError(f"{name} must be positive and finite, got {value!r}")
    if record_every < 1 or steps < 1 or steps % record_every:
        raise ValueError(
            f"steps must be a positive multiple of record_every ({record_every}), got {steps!r}"
        )
    logits = np.zeros((steps // record_every + 1, len(betas), 5))
    _descend(logits, betas, link == "dpo", record_every, float(lr))
    return np.arange(len(logits)) * record_every, softmax(logits, -1)


def reward(probs) -> np.ndarray:
    """Return the expected true reward (Table 4, arXiv 2405.14953), (...), of arm probabilities
    (..., 5).
    """
    return np.asarray(probs) @ MEANS


def kl(probs) -> np.ndarray:
    """Return KL(π ‖ uniform) in nats, (...), of arm probabilities (..., 5): 0 for uniform, ln 5 for
    a single arm.
    """
    return rel_entr(probs, np.full(5, 0.2)).sum(-1)


# not cache=True: compiling takes a second, and where no folder can be written that would fail to
# import
@njit
def _phi_link(t):
    """Return (q, u, v) with 1 - g(t) = g(-t) = q u and slope g'(t) = g'(-t) = -q v, at t > 0 (Eq. 9
    and 12).

    q = φ^t is kept apart: at large t, g(-t) is too small for a float, but the slope of log g there,
    -v/u, is not.
    """
    q = np.exp(t * np.log(PHI))
    b, c = 1 / (1 - q), 1 / (1 - PHI * q)
    return (
        q,
        t * b - (t + 1) * PHI * c,
        b - PHI * c + np.log(PHI) * (t * b * b - (t + 1) * PHI * c * c),
    )


@njit  # loops over arms, as array expressions here would take three times as long to compile
def _descend(logits, betas, dpo, every, lr):
    """Descend from 0 for each β; put the logits after every `every` steps into logits (n, k, 5),
    but for row 0.
    """
    q, u, v = _phi_link(EPSILON)
    gap, slope = 0.5 - q * u, -q * v
    a3 = (slope * EPSILON - gap) / (2 * EPSILON**3)
    a1 = gap / EPSILON - a3 * EPSILON**2
    rise = np.zeros(5)
    for k in range(len(betas)):
        theta = np.zeros(5)
        for row in range(1, len(logits)):
            for _ in range(every):
                for winner, loser in PAIRS:
                    s = betas[k] * (theta[winner] - theta[loser])
                    # h = d log g / ds; the loss falls along beta * h * (winner up, loser down)
                    if dpo:
                        h = 1 / (1 + np.exp(s))
                    elif abs(s) < EPSILON:
                        h = (a1 + 3 * a3 * s * s) / (0.5 + a1 * s + a3 * s**3)
                    else:
                        q, u, v = _phi_link(abs(s))
                        h = -v / u if s < 0 else -q * v / (1 - q * u)
                    rise[winner] += h
                    rise[loser] -= h
                for arm in range(5):
                    theta[arm] += lr * betas[k] / len(PAIRS) * rise[arm]
                    rise[arm] = 0.0
            for arm in range(5):
                logits[row, k, arm] = theta[arm]
