"""A bandit for WRPO (arXiv 2412.03187): what a source must be for its responses to help.

Every prompt has a finite set of possible responses with known features. The target, the source and
every trained policy are distributions over that set, so that expected rewards and KL divergences
are sums and not estimates. The paper has no such bandit: all of its settings are ours.

The responses of the target are like a standard normal in all features, those of the source the
same, but moved along two of them:

- by `strength` along the first feature, which is the true reward, so that both are in standard
  deviations of the target's reward;
- by `distance` along the second, which no reward depends on: the source's style.

A trained policy is log π_θ = log π_ref + θ · features + constant with one θ for all prompts, so
that learning from one response moves similar ones, on prompts that were not trained on too.
"""

from dataclasses import dataclass

import numpy as np
from scipy.special import expit, log_expit, logsumexp

REWARD, STYLE = 0, 1  # features
CLOSE = 1e-5  # how close log KL comes to what is asked
TRIALS = 60  # of learning rates, at most


@dataclass(frozen=True)
class World:
    """How a bandit is drawn.

    strength, distance: of the source, in standard deviations of a feature; a strength below 0 is a
    weaker source. noise: standard deviation of what the reward model adds to the true reward.
    samples: that each model draws for a prompt. responses: possible ones of a prompt, half of them
    drawn as the target's and half as the source's.
    Raises ValueError for what is out of range.
    """

    strength: float = 0.0
    distance: float = 0.0
    noise: float = 1.0
    prompts: int = 64  # that are trained on
    samples: int = 5
    features: int = 64
    responses: int = 64
    test_prompts: int = 32  # that judge

    def __post_init__(self):
        for name in ("strength", "distance", "noise"):
            if not np.isfinite(getattr(self, name)):
                raise ValueError(f"{name} must be finite, got {getattr(self, name)!r}")
        for name in ("distance", "noise"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)!r}")
        for name in ("prompts", "samples", "features", "responses", "test_prompts"):
            number = getattr(self, name)
            if number != int(number) or number < 2:
                raise ValueError(f"{name} must be a whole number of at least 2, got {number!r}")


@dataclass(frozen=True)
class Prompts:
    """Prompts with their possible responses.

    features: (prompts, responses, features); the true reward is the first of them. log_target,
    log_source: (prompts, responses), nats.
    """

    features: np.ndarray
    log_target: np.ndarray
    log_source: np.ndarray

    @property
    def rewards(self) -> np.ndarray:
        """The true rewards, (prompts, responses), in sd of the target's."""
        return self.features[:, :, REWARD]


@dataclass(frozen=True)
class Quadruples:
    """The features of y_ws, y_wt and y_l of each prompt, (prompts, features) each."""

    source: np.ndarray
    target: np.ndarray
    rejected: np.ndarray

    def __post_init__(self):
        shapes = [np.shape(self.source), np.shape(self.target), np.shape(self.rejected)]
        if len(set(shapes)) > 1 or len(shapes[0]) != 2:
            raise ValueError(f"three arrays of one shape (prompts, features), got {shapes}")


@dataclass(frozen=True)
class Bandit:
    """What is learnt from, what judges, and what the reward model thinks.

    source_is_better: (prompts,), whether it gives y_ws more than y_wt. strength: mean true reward
    of y_ws less that of y_wt. gap: mean log-probability of y_wt under the target less that of y_ws,
    nats.
    """

    quadruples: Quadruples
    source_is_better: np.ndarray
    strength: float
    gap: float
    test: Prompts


# ---- what is drawn


def draw(world: World, seed: int) -> Bandit:
    """Draw a bandit. Worlds that differ in strength, distance or noise share all that is random."""
    generator = np.random.default_rng(seed)
    test = draw_prompts(world, world.test_prompts, generator)
    prompts = draw_prompts(world, world.prompts, generator)
    noise = generator.normal(size=prompts.rewards.shape)
    judged = prompts.rewards + world.noise * noise
    size = (2, world.prompts, world.samples)
    of_source, of_target = generator.random(size)
    of_source = sample(prompts.log_source, of_source)
    of_target = sample(prompts.log_target, of_target)
    y_ws = _best(judged, of_source)
    y_wt = _best(judged, of_target)
    y_l = _best(-judged, of_target)
    rows = np.arange(world.prompts)
    stronger = prompts.rewards[rows, y_ws] - prompts.rewards[rows, y_wt]
    gap = prompts.log_target[rows, y_wt] - prompts.log_target[rows, y_ws]
    quadruples = Quadruples(
        source=prompts.features[rows, y_ws],
        target=prompts.features[rows, y_wt],
        rejected=prompts.features[rows, y_l],
    )
    return Bandit(
        quadruples=quadruples,
        source_is_better=judged[rows, y_ws] > judged[rows, y_wt],
        strength=stronger.mean(),
        gap=gap.mean(),
        test=test,
    )


def draw_prompts(world: World, number: int, generator: np.random.Generator) -> Prompts:
    """Draw prompts, each with responses of both models.

    With p_t and p_s the densities of both models' responses (normal, one the other moved by the
    strength s and the distance d), each possible response is weighted by how much it is one's:

        π_target ∝ p_t / (p_t + p_s),  π_source ∝ p_s / (p_t + p_s),
        log p_s / p_t = s f_1 + d f_2 - (s² + d²) / 2.

    At s = d = 0 both are uniform.
    """
    size = (number, world.responses, world.features)
    features = generator.normal(size=size)
    half = world.responses // 2
    features[:, half:, REWARD] += world.strength
    features[:, half:, STYLE] += world.distance
    of_reward = world.strength * features[:, :, REWARD]
    of_style = world.distance * features[:, :, STYLE]
    log_ratio = of_reward + of_style - (world.strength**2 + world.distance**2) / 2
    return Prompts(
        features=features,
        log_target=_normalised(log_expit(-log_ratio)),
        log_source=_normalised(log_expit(log_ratio)),
    )


def _normalised(logits: np.ndarray) -> np.ndarray:
    return logits - logsumexp(logits, axis=-1, keepdims=True)


def sample(log_probs: np.ndarray, uniform: np.ndarray) -> np.ndarray:
    """Return indices of responses, (prompts, samples), by inverting the distribution function.

    log_probs: (prompts, responses). uniform: (prompts, samples), numbers in [0, 1).
    """
    cumulated = np.exp(log_probs).cumsum(-1)
    cumulated /= cumulated[:, -1:]  # which is 1 but for rounding
    below = cumulated[:, np.newaxis] <= uniform[:, :, np.newaxis]
    return below.sum(-1)


def _best(scores: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    """Return which of each prompt's drawn responses has the highest score, (prompts,)."""
    of_drawn = np.take_along_axis(scores, drawn, axis=1)
    best = of_drawn.argmax(-1)
    return drawn[np.arange(len(drawn)), best]


# ---- what is trained


def constant(alphas, steps: int) -> np.ndarray:
    """Return α of each step, (steps, methods), for fusion coefficients that stay as they are."""
    return np.tile(_coefficients(alphas), (steps, 1))


def rising(alphas, steps: int) -> np.ndarray:
    """Return α of each step, (steps, methods), rising from 0: α(t) = α_max t / T.

    It is the schedule of arXiv 2412.03187, with t the steps that are finished.
    """
    share = np.arange(steps) / steps
    return share[:, np.newaxis] * _coefficients(alphas)


def _coefficients(alphas) -> np.ndarray:
    """Return fusion coefficients as an array; raise ValueError for one outside of [0, 1]."""
    alphas = np.asarray(alphas, dtype=float)
    inside = (alphas >= 0) & (alphas <= 1)
    if alphas.ndim != 1 or alphas.size == 0 or not inside.all():
        raise ValueError(f"alpha must be a list of numbers in [0, 1], got {alphas!r}")
    return alphas


def pairs(chosen: np.ndarray, rejected: np.ndarray) -> Quadruples:
    """Return pairs as quadruples of which both best responses are the same.

    WRPO's loss of them is DPO's, at any α.
    """
    return Quadruples(source=chosen, target=chosen, rejected=rejected)


def better(bandit: Bandit) -> Quadruples:
    """Return pairs of the better of y_ws and y_wt by the reward model, and y_l: one hybrid."""
    quadruples = bandit.quadruples
    of_source = bandit.source_is_better[:, np.newaxis]
    chosen = np.where(of_source, quadruples.source, quadruples.target)
    return pairs(chosen, quadruples.rejected)


def both(bandit: Bandit) -> Quadruples:
    """Return two pairs of each prompt, (y_ws, y_l) and (y_wt, y_l), side by side.

    DPO's mean loss of them is the hybrid of losses.hybrid.
    """
    quadruples = bandit.quadruples
    chosen = np.stack([quadruples.source, quadruples.target], axis=1)
    rejected = np.repeat(quadruples.rejected, 2, axis=0)
    return pairs(chosen.reshape(rejected.shape), rejected)


def gradient(quadruples: Quadruples, theta: np.ndarray, alphas: np.ndarray, beta: float):
    """Return the gradient of WRPO's mean loss, (methods, features).

    arXiv 2412.03187: the loss of a quadruple is

        -log σ(m),  m = α r(y_ws) + (1 - α) r(y_wt) - r(y_l),  r(y) = β log π_θ(y) / π_ref(y),

    and r(y) = β (θ · f(y) - log Z), whose log Z cancels in m. So the gradient is

        -β σ(-m) (α f(y_ws) + (1 - α) f(y_wt) - f(y_l)).

    theta: (methods, features). alphas: (methods,). beta: strength of the KL penalty.
    """
    source, target, rejected = quadruples.source, quadruples.target, quadruples.rejected
    own = 1 - alphas
    of_source = alphas * (source @ theta.T)
    of_target = own * (target @ theta.T)
    margins = beta * (of_source + of_target - rejected @ theta.T)
    weights = -beta * expit(-margins) / len(margins)  # (prompts, methods)
    fused = (weights * alphas).T @ source + (weights * own).T @ target
    return fused - weights.T @ rejected


def train(
    quadruples: Quadruples, alphas: np.ndarray, *, lrs: np.ndarray, beta: float
) -> np.ndarray:
    """Train one policy per method: one epoch of gradient descent from the reference.

    Args:
        quadruples: of the prompts, in the order in which they are learnt from.
        alphas: (steps, methods), as of constant() or rising().
        lrs: (methods,), learning rates, > 0.
        beta: > 0.
    Returns:
        theta, (methods, features): 0 is the reference.
    Raises:
        ValueError: for α outside of [0, 1], a shape that does not fit, rates or β that are not
            positive, and prompts that cannot be cut into as many equal batches as there are steps.
    """
    alphas = np.asarray(alphas, dtype=float)
    lrs = np.asarray(lrs, dtype=float)
    if alphas.ndim != 2 or lrs.shape != alphas.shape[1:]:
        raise ValueError(f"(steps, methods) and (methods,), got {alphas.shape} and {lrs.shape}")
    _coefficients(alphas.ravel())
    positive = np.append(lrs, beta)
    if not ((positive > 0) & (positive < np.inf)).all():
        raise ValueError(f"lrs and beta must be positive and finite, got {lrs} and {beta!r}")
    prompts, features = quadruples.source.shape
    steps, methods = alphas.shape
    if prompts % steps:
        raise ValueError(f"{prompts} prompts are no {steps} equal batches")
    size = prompts // steps
    theta = np.zeros((methods, features))
    for step in range(steps):
        rows = slice(step * size, (step + 1) * size)
        batch = Quadruples(
            quadruples.source[rows], quadruples.target[rows], quadruples.rejected[rows]
        )
        theta -= lrs[:, np.newaxis] * gradient(batch, theta, alphas[step], beta)
    return theta


# ---- what is measured


def measure(theta: np.ndarray, prompts: Prompts) -> tuple[np.ndarray, np.ndarray]:
    """Return the rise of the expected true reward over the reference, and KL(π_θ ‖ π_ref).

    Both are exact means over prompts, (methods,): the first in sd of the target's reward, the
    second in nats. theta: (methods, features).
    """
    moved = prompts.features @ theta.T
    log_target = prompts.log_target[:, :, np.newaxis]
    logits = log_target + moved
    # written out, as scipy's logsumexp takes longer here than all the rest
    highest = logits.max(1, keepdims=True)
    policy = np.exp(logits - highest)
    total = policy.sum(1, keepdims=True)
    policy /= total
    log_normaliser = (highest + np.log(total))[:, 0]
    kl = (policy * moved).sum(1) - log_normaliser
    change = policy - np.exp(log_target)
    rise = (change * prompts.rewards[:, :, np.newaxis]).sum(1)
    return rise.mean(0), kl.mean(0)


def at_kl(
    quadruples: Quadruples, alphas: np.ndarray, prompts: Prompts, *, kl: float, beta: float
) -> np.ndarray:
    """Train each method so that it ends at a given KL; return the rise of the reward, (methods,).

    The learning rate of each method is found by the secant rule on log KL against its logarithm.
    Arguments as of train() and measure(). kl: nats, > 0. Raises ValueError where it is not reached.
    """
    if not 0 < kl < np.inf:
        raise ValueError(f"kl must be positive and finite, got {kl!r}")
    methods = np.shape(alphas)[1]
    rates = np.zeros(methods)  # logarithms
    slope = np.full(methods, 2.0)  # a small step's KL is as the square of the rate
    before = None
    for _ in range(TRIALS):
        theta = train(quadruples, alphas, lrs=np.exp(rates), beta=beta)
        rise, reached = measure(theta, prompts)
        missing = np.log(kl) - np.log(np.maximum(reached, 1e-300))
        if (np.abs(missing) < CLOSE).all():
            return rise
        if before is not None:
            slope = _slope(rates - before[0], before[1] - missing, slope)
        before = rates, missing
        rates = rates + np.clip(missing / slope, -2, 2)
    raise ValueError(f"a KL of {kl} is not reached: {reached}")


def _slope(steps: np.ndarray, rises: np.ndarray, last: np.ndarray) -> np.ndarray:
    """Return d log KL / d log rate of the last step, or the one before where nothing moved."""
    moved = np.abs(steps) > 1e-12
    ratio = rises / np.where(moved, steps, 1)
    return np.where(moved, np.clip(ratio, 0.2, 4), last)


# ---- what a small step would do


def predicted(world: World, alphas) -> np.ndarray:
    """Return the rise of the reward at equal KL over that of α = 0, less 1, of one small step.

    Ours, for normal features and constant α, (methods,). The step is the mean over N prompts of
    α f(y_ws) + (1 - α) f(y_wt) - f(y_l). With s and d the source's strength and distance, m the
    mean of the best of n normals and σ the reward model's noise, its expectation is

        S = α s + 2 m / sqrt(1 + σ²)  along the reward,  α d  along the style,

    and noise adds the variance V = (α² + (1 - α)² + 1) / N in each of the other features. At a
    small KL the reward is as the step's share along the reward, S / sqrt(S² + α² d² + (F - 1) V):
    strength counts by α, distance by α². With that share c of DPO and its S_0 the slope at α = 0 is

        (1 - c²) (s / S_0 + 1/2),

    so a little of a source pays where its best is above the middle of the target's best and worst,
    and no more than DPO leaves to be gained.
    """
    alphas = _coefficients(alphas)
    best = mean_of_best(world.samples)
    own = 2 * best / np.sqrt(1 + world.noise**2)

    def share(alphas: np.ndarray) -> np.ndarray:
        along = own + alphas * world.strength
        variance = (alphas**2 + (1 - alphas) ** 2 + 1) / world.prompts
        across = (alphas * world.distance) ** 2 + (world.features - 1) * variance
        return along / np.sqrt(along**2 + across)

    return share(alphas) / share(np.zeros(1)) - 1


def mean_of_best(samples: int) -> float:
    """Return the expectation of the largest of so many standard normals."""
    from scipy.integrate import quad
    from scipy.stats import norm

    def density(x: float) -> float:
        return samples * x * norm.pdf(x) * norm.cdf(x) ** (samples - 1)

    mean, _ = quad(density, -np.inf, np.inf)
    return mean
