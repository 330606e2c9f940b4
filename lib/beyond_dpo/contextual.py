"""A contextual bandit whose dispersion differs between contexts, and is known.

MallowsPO (arXiv 2405.14953) weights a pair by how much people agree in its context. The paper's own
bandit has one context and a constant φ, so it cannot say when that pays. Here each context x has a
central ranking μ0(·|x) of its arms and a dispersion φ(x); the reward of an arm is minus its rank,
and what a policy earns, and its KL to the uniform reference, are sums, not samples.

What the contexts compete for is decided by the features ψ(x, y) of the policy

    π(y|x) ∝ exp(v · ψ(x, y) / β).

With a table for each context (ψ one-hot, `tables`) every context is learnt by itself, and weights
only say how far it goes: they share out the KL. With few features for many contexts (`draw_world`)
one v serves all of them, as the weights of one model do: what is learnt from a contested context
moves the policy in a clear one, and weights decide whom v listens to.

s = β log π(y1|x) / π(y2|x) = v · (ψ(x, y1) - ψ(x, y2)) for the uniform reference, so that β is in
neither the loss nor its minimum: gradient descent on θ = v / β with the step size lr / β² takes the
same way v at each β. So one training holds the policies of all β, and methods are compared at equal
KL, each at its own β, after any number of steps (`gain_at_kl`).
"""

from typing import NamedTuple

import numpy as np
from numba import njit
from scipy.special import expit

LINKS = ("logistic", "mallows_phi")
SMALL = 1e-3  # below which x - 1 + exp(-x) is summed as a series


class World(NamedTuple):
    """Contexts with their arms: what is learnt, what people prefer, and how much they agree."""

    features: np.ndarray  # (contexts, arms, dimensions) float64
    ranks: np.ndarray  # (contexts, arms) int64, the central rankings: 1 the best
    agreement: np.ndarray  # (contexts,) float64, -log φ > 0, with mean 1 where it is drawn


# ---- what is drawn


def draw_world(contexts: int, arms: int, dimensions: int, *, spread: float, seed: int) -> World:
    """Draw a world whose contexts share the few parameters of one linear policy.

    Features are standard normal. A context's central ranking is that of w · ψ(x, y), for one
    standard normal w. The policy can follow such rankings, though not give all of them evenly
    spaced rewards. -log φ(x) is log-normal, divided by its mean over the contexts.

    Args:
        contexts, arms, dimensions: at least 1, 2 and 1.
        spread: standard deviation of log(-log φ), >= 0; 0: φ = 1/e everywhere.
        seed: another spread with the same seed has the same features, rankings and order of φ.
    Raises:
        ValueError: for a size that is too small, or a spread below 0.
    """
    if contexts < 1 or arms < 2 or dimensions < 1:
        raise ValueError(f"no world has {contexts=}, {arms=}, {dimensions=}")
    _require_spread("spread", spread)
    generator = np.random.default_rng([seed, 0])
    features = generator.standard_normal((contexts, arms, dimensions))
    direction = generator.standard_normal(dimensions)
    deviations = generator.standard_normal(contexts)
    best_first = np.argsort(-features @ direction, axis=1)
    ranks = np.argsort(best_first, axis=1) + 1
    agreement = _with_mean_1(np.exp(spread * deviations))
    return World(features, ranks, agreement)


def tables(world: World) -> World:
    """Return the same contexts for a policy that has a parameter for each context and arm.

    The features are one-hot, times √(contexts · (arms - 1)): over all pairs their differences then
    have the mean square 2 in each direction, as those of draw_world, and so one step size fits
    both.
    """
    contexts, arms = world.ranks.shape
    scale = np.sqrt(contexts * (arms - 1))
    one_hot = scale * np.eye(contexts * arms)
    features = one_hot.reshape(contexts, arms, contexts * arms)
    return world._replace(features=features)


def pair_probability(gap, phi) -> np.ndarray:
    """Return the chance that an item is put before one that ranks `gap` places lower.

    Rankings have P(μ) ∝ φ^(inversions to μ0). Eq. 9, arXiv 2405.14953, exact for whole gaps:
        g(s) = (s + 1) / (1 - φ^(s + 1)) - s / (1 - φ^s)  for s > 0,  g(-s) = 1 - g(s).

    Args:
        gap: places, of any shape, none of them 0.
        phi: dispersion in (0, 1), of a shape that goes with that of gap.
    Returns:
        float64 in (0, 1); g(1) = 1 / (1 + φ).
    Raises:
        ValueError: for a gap of 0, where Eq. 9 has no value, and for a phi outside of (0, 1).
    """
    gap = np.asarray(gap, dtype=float)
    phi = np.asarray(phi, dtype=float)
    if not np.all(gap):
        raise ValueError("gap must not be 0: no two items have one rank")
    if not np.all((phi > 0) & (phi < 1)):
        raise ValueError(f"phi must be in (0, 1), got {phi!r}")
    log_phi = np.log(phi)
    s = np.abs(gap)
    first = (s + 1) / -np.expm1((s + 1) * log_phi)
    second = s / -np.expm1(s * log_phi)
    chance = first - second
    return np.where(gap > 0, chance, 1 - chance)


def draw_pairs(world: World, pairs: int, *, people: str, seed: int) -> np.ndarray:
    """Draw preference pairs: a context, two different arms of it, and who wins.

    Args:
        pairs: how many, >= 1; with the same seed fewer pairs are the first of more.
        people: who decides. "mallows": people who rank as Mallows' φ model says
            (pair_probability). "bradley_terry": a coin with the chance σ(-log φ(x) · gap), which
            is the same for neighbours in the ranking and more extreme beyond them.
        seed: worlds that differ in φ alone get the same contexts, arms and luck.
    Returns:
        wins, (contexts, arms, arms) int64: [x, i, j] counts how often i won against j.
    Raises:
        ValueError: for no pairs and for other people.
    """
    if pairs < 1:
        raise ValueError(f"pairs must be at least 1, got {pairs!r}")
    contexts, arms = world.ranks.shape
    generator = np.random.default_rng([seed, 1])
    luck = generator.random((pairs, 4))
    context = (luck[:, 0] * contexts).astype(int)
    first = (luck[:, 1] * arms).astype(int)
    apart = 1 + (luck[:, 2] * (arms - 1)).astype(int)
    second = (first + apart) % arms
    gap = world.ranks[context, second] - world.ranks[context, first]
    chance = _chance(gap, world.agreement[context], people)
    wins_first = luck[:, 3] < chance
    winner = np.where(wins_first, first, second)
    loser = np.where(wins_first, second, first)
    wins = np.zeros((contexts, arms, arms), dtype=np.int64)
    np.add.at(wins, (context, winner, loser), 1)
    return wins


def chances(world: World, people: str) -> np.ndarray:
    """Return how often i wins against j in an endless number of pairs, (contexts, arms, arms).

    Of the two, [x, i, j] + [x, j, i] = 1, and 0 of an arm with itself. expected_loss() takes them
    in place of counts. Raises ValueError for other people than draw_pairs() knows.
    """
    gap = world.ranks[:, np.newaxis, :] - world.ranks[:, :, np.newaxis]
    agreement = world.agreement[:, np.newaxis, np.newaxis]
    itself = gap == 0
    chance = _chance(np.where(itself, 1, gap), agreement, people)
    return np.where(itself, 0.0, chance)


def _chance(gap, agreement, people: str) -> np.ndarray:
    """Return the chance that an arm wins against one that ranks `gap` places lower."""
    if people == "mallows":
        return pair_probability(gap, np.exp(-agreement))
    if people == "bradley_terry":
        return expit(agreement * gap)
    raise ValueError(f'people must be "mallows" or "bradley_terry", got {people!r}')


def estimate(agreement, *, noise: float, seed: int) -> np.ndarray:
    """Return an estimate of -log φ(x) that is wrong by a factor exp(noise · z), z normal.

    It is divided by its mean, as the authors' code does with its own. noise 0 gives the truth over
    its mean. With the same seed a larger noise is the same error, only larger.

    Args:
        agreement: (contexts,) true -log φ, > 0.
        noise: standard deviation of the error of log(-log φ), >= 0.
    Raises:
        ValueError: for a noise below 0, and for an agreement that is not positive and finite.
    """
    agreement = _agreement(agreement, len(agreement))
    _require_spread("noise", noise)
    deviations = np.random.default_rng([seed, 2]).standard_normal(len(agreement))
    return _with_mean_1(agreement * np.exp(noise * deviations))


def shuffle(agreement, *, seed: int) -> np.ndarray:
    """Return -log φ of the contexts dealt out anew: as uneven as the truth, and unrelated."""
    return np.random.default_rng([seed, 3]).permutation(agreement)


def _with_mean_1(values: np.ndarray) -> np.ndarray:
    return values / values.mean()


def _require_spread(name: str, value: float) -> None:
    if not 0 <= value < np.inf:
        raise ValueError(f"{name} must be finite and not below 0, got {value!r}")


# ---- what is learnt


def descend(
    features, wins, agreement, *, link: str, steps: int, lr: float, epsilon: float = 0.1
) -> np.ndarray:
    """Learn v from pairs by full-batch gradient descent from 0 in float64; return its way.

    The loss is the mean over pairs of -log g(s), s = v · (ψ(x, winner) - ψ(x, loser)).
    link "logistic": g(s) = σ(a(x) s). a(x) = 1 gives DPO; a(x) = -2 log φ(x), or an estimate with
    mean 1, gives MallowsPO-θ (Eq. 8, arXiv 2405.14953). link "mallows_phi": g is Eq. 9 with
    φ(x) = exp(-a(x)), and for |s| < epsilon the cubic that meets it with its slope (section 3.4),
    as losses.mallows_link.

    Args:
        features: (contexts, arms, dimensions).
        wins: (contexts, arms, arms), [x, i, j] how often i won against j.
        agreement: (contexts,), a(x) > 0.
        link: "logistic" or "mallows_phi".
        steps: >= 1.
        lr: step size of v, > 0; that of θ = v / β is lr / β².
        epsilon: half width of the cubic, > 0.
    Returns:
        (steps + 1, dimensions): v before the first step and after each.
    Raises:
        ValueError: for shapes that do not fit, no pairs, and parameters out of their range.

    With one a for all contexts, "logistic" takes DPO's way at a step size a² lr, divided by a: a
    constant φ only rescales β (Proposition 4).
    """
    if link not in LINKS:
        raise ValueError(f"link must be one of {LINKS}, got {link!r}")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps!r}")
    _require_positive(lr=lr, epsilon=epsilon)
    differences, context, share = _pairs(features, wins)
    agreement = _agreement(agreement, len(wins))
    way = np.zeros((steps + 1, differences.shape[1]))
    a1, a3 = _cubics(agreement, epsilon)
    is_logistic = link == "logistic"
    _descend(way, differences, context, share, agreement, a1, a3, is_logistic, lr, epsilon)
    return way


def expected_loss(
    features, wins, agreement, v, *, link: str, epsilon: float = 0.1
) -> tuple[float, np.ndarray]:
    """Return the loss that descend() lowers at v, and its gradient by v, (dimensions,).

    wins may be any weights of (context, winner, loser), such as chances: then it is the expected
    loss. The other Args and Raises are those of descend().
    """
    if link not in LINKS:
        raise ValueError(f"link must be one of {LINKS}, got {link!r}")
    _require_positive(epsilon=epsilon)
    differences, context, share = _pairs(features, wins)
    agreement = _agreement(agreement, len(wins))
    a1, a3 = _cubics(agreement, epsilon)
    s = differences @ np.asarray(v, dtype=float)
    loss = 0.0
    gradient = np.zeros(len(v))
    for row, x in enumerate(context):
        if link == "logistic":
            log_g = -np.logaddexp(0, -agreement[x] * s[row])
            slope = agreement[x] * expit(-agreement[x] * s[row])
        else:
            log_g, slope = _log_link(s[row], agreement[x], a1[x], a3[x], epsilon)
        loss -= share[row] * log_g
        gradient -= share[row] * slope * differences[row]
    return float(loss), gradient


def link(s, phi: float, epsilon: float) -> np.ndarray:
    """Return MallowsPO's φ link g(s), Eq. 9 of arXiv 2405.14953 with its cubic (section 3.4).

    The same numbers as losses.mallows_link, without torch.

    Args:
        s: differences of rewards, of any shape.
        phi: dispersion in (0, 1). epsilon: half width of the cubic, > 0.
    Returns:
        float64 in (0, 1), of the shape of s; g(-s) = 1 - g(s).
    Raises:
        ValueError: for a phi or an epsilon out of its range.
    """
    if not 0 < phi < 1:
        raise ValueError(f"phi must be in (0, 1), got {phi!r}")
    _require_positive(epsilon=epsilon)
    agreement = -np.log(phi)
    (a1,), (a3,) = _cubics(np.array([agreement]), epsilon)
    s = np.asarray(s, dtype=float)
    logs = [_log_link(value, agreement, a1, a3, epsilon)[0] for value in s.ravel()]
    return np.exp(logs).reshape(s.shape)


def _pairs(features, wins) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return of each kind of pair: ψ(x, winner) - ψ(x, loser), x, and its share of the pairs."""
    features = np.asarray(features, dtype=float)
    wins = np.asarray(wins)
    fits = features.ndim == 3 and wins.shape == (*features.shape[:2], features.shape[1])
    if not fits:
        raise ValueError(
            f"features {features.shape} and wins {wins.shape}; they must be (contexts, arms, "
            "dimensions) and (contexts, arms, arms)"
        )
    if not wins.sum() > 0 or wins.min() < 0:
        raise ValueError("wins must hold at least one pair, and nothing below 0")
    context, winner, loser = np.nonzero(wins)
    differences = features[context, winner] - features[context, loser]
    counts = wins[context, winner, loser]
    return differences, context, counts / counts.sum()


def _agreement(agreement, contexts: int) -> np.ndarray:
    values = np.asarray(agreement, dtype=float)
    if values.shape != (contexts,):
        raise ValueError(f"agreement must have one value for each context, got {values.shape}")
    if not np.all((values > 0) & (values < np.inf)):
        raise ValueError(f"agreement (-log φ) must be positive and finite, got {values!r}")
    return values


def _require_positive(**values: float) -> None:
    for name, value in values.items():
        if not 0 < value < np.inf:
            raise ValueError(f"{name} must be positive and finite, got {value!r}")


# Not cache=True: see bandit.py.
@njit
def _miss(t, a):
    """Return (1 - g(t), slope of log(1 - g(t))) of Eq. 9 at t > 0, φ = exp(-a).

    As in losses._log_miss, a sum of positive terms: with E(x) = 1 - e^-x, n(x) = x / E(x) - 1 and
    x = a t, 1 - g = e^-x E(a) (n(x) + a - n(a)) / (a E(x + a)).
    """
    x = a * t
    e_of_a, n_of_a = _e_and_n(a)
    e_of_x, n_of_x = _e_and_n(x)
    e_of_sum = -np.expm1(-x - a)
    bracket = n_of_x + (a - n_of_a)
    miss = np.exp(-x) * e_of_a * bracket / (a * e_of_sum)
    slope = a * ((x - n_of_x) / (e_of_x * bracket) - 1 / e_of_sum)
    return miss, slope


@njit
def _e_and_n(x):
    """Return E(x) = 1 - e^-x and n(x) = x / E(x) - 1, exact for small x too."""
    e = -np.expm1(-x)
    difference = x - e
    if x < SMALL:
        difference = x * x / 2 * (1 - x / 3 * (1 - x / 4 * (1 - x / 5)))
    return e, difference / e


@njit
def _cubics(agreement, epsilon):
    """Return a1 and a3 of each context's cubic 1/2 + a1 s + a3 s³ (section 3.4)."""
    a1 = np.empty_like(agreement)
    a3 = np.empty_like(agreement)
    for x in range(len(agreement)):
        miss, log_slope = _miss(epsilon, agreement[x])
        gap = 0.5 - miss
        slope = -miss * log_slope
        a3[x] = (slope * epsilon - gap) / (2 * epsilon**3)
        a1[x] = gap / epsilon - a3[x] * epsilon**2
    return a1, a3


@njit
def _log_link(s, a, a1, a3, epsilon):
    """Return log g(s) and its slope, of Eq. 9 with its cubic."""
    if abs(s) < epsilon:
        g = 0.5 + a1 * s + a3 * s**3
        return np.log(g), (a1 + 3 * a3 * s * s) / g
    miss, log_slope = _miss(abs(s), a)
    if s < 0:
        return np.log(miss), -log_slope
    return np.log1p(-miss), -miss * log_slope / (1 - miss)


@njit
def _descend(way, differences, context, share, agreement, a1, a3, is_logistic, lr, epsilon):
    """Fill the rows of way but the first, each with v after one more step."""
    pairs, dimensions = differences.shape
    rise = np.empty(dimensions)
    for step in range(1, len(way)):
        v = way[step - 1]
        rise[:] = 0.0
        for row in range(pairs):
            x = context[row]
            s = 0.0
            for j in range(dimensions):
                s += v[j] * differences[row, j]
            if is_logistic:
                slope = agreement[x] / (1 + np.exp(agreement[x] * s))
            else:
                _, slope = _log_link(s, agreement[x], a1[x], a3[x], epsilon)
            for j in range(dimensions):
                rise[j] += share[row] * slope * differences[row, j]
        for j in range(dimensions):
            way[step, j] = v[j] + lr * rise[j]


# ---- what a policy earns


def policy(features, theta) -> np.ndarray:
    """Return π(y|x) ∝ exp(θ · ψ(x, y)), (contexts, arms); θ = v / β, (dimensions,)."""
    logits = np.asarray(features) @ np.asarray(theta)
    logits -= logits.max(-1, keepdims=True)
    weights = np.exp(logits)
    return weights / weights.sum(-1, keepdims=True)


def measure(probabilities, ranks) -> tuple[float, float]:
    """Return what a policy gains, and its KL to the uniform policy, means over the contexts.

    The reward of an arm is minus its central rank, as the paper defines it. The gain is over the
    uniform policy, in ranks: 0 for that, (arms - 1) / 2 for the best arm in each context.

    Args:
        probabilities, ranks: (contexts, arms).
    Returns:
        gain, and KL in nats: 0 for the uniform policy, ln(arms) for a single arm.
    Raises:
        ValueError: if the shapes differ.
    """
    probabilities = np.asarray(probabilities, dtype=float)
    ranks = np.asarray(ranks)
    if probabilities.shape != ranks.shape or ranks.ndim != 2:
        raise ValueError(
            f"probabilities {probabilities.shape} and ranks {ranks.shape}; both must be "
            "(contexts, arms)"
        )
    arms = ranks.shape[1]
    gain = (arms + 1) / 2 - (probabilities * ranks).sum(-1)
    logs = np.log(np.maximum(probabilities, 1e-300) * arms)
    kl = (probabilities * logs).sum(-1)
    return float(gain.mean()), float(kl.mean())


def gain_at_kl(features, ranks, v, kl: float) -> float:
    """Return the gain of the policy π(y|x) ∝ exp(v · ψ(x, y) / β) at that β where its KL is `kl`.

    KL falls strictly with β, so that there is one. It is found by bisection, to 1e-10 nats.

    Args:
        features: (contexts, arms, dimensions). ranks: (contexts, arms). v: (dimensions,).
        kl: nats, > 0.
    Returns:
        the gain in ranks, as of measure(); NaN where no β reaches that KL, which may not be above
        ln(arms).
    Raises:
        ValueError: if the shapes do not fit, and for a kl that is not positive.
    """
    _require_positive(kl=kl)
    ranks = np.asarray(ranks, dtype=float)
    scores = np.asarray(features, dtype=float) @ np.asarray(v, dtype=float)
    if scores.shape != ranks.shape:
        raise ValueError(f"features of {scores.shape} (contexts, arms) and ranks of {ranks.shape}")
    return float(_at_beta(scores, ranks, float(kl)))


@njit
def _gain_and_kl(scores, ranks, scale):
    """Return measure() of the softmax of scale · scores."""
    contexts, arms = scores.shape
    gain = 0.0
    kl = 0.0
    for x in range(contexts):
        top = scale * scores[x].max()
        total = 0.0
        score = 0.0
        rank = 0.0
        for y in range(arms):
            logit = scale * scores[x, y] - top
            weight = np.exp(logit)
            total += weight
            score += weight * logit
            rank += weight * ranks[x, y]
        gain += (arms + 1) / 2 - rank / total
        kl += score / total - np.log(total / arms)
    return gain / contexts, kl / contexts


@njit
def _at_beta(scores, ranks, kl):
    low = 0.0
    high = 1.0
    _, reached = _gain_and_kl(scores, ranks, high)
    while reached < kl:
        low = high
        high *= 2
        if high > 1e9:
            return np.nan
        _, reached = _gain_and_kl(scores, ranks, high)
    for _ in range(100):
        middle = (low + high) / 2
        gain, reached = _gain_and_kl(scores, ranks, middle)
        if abs(reached - kl) < 1e-10:
            break
        if reached < kl:
            low = middle
        else:
            high = middle
    return gain


# ---- both together, for a first look


class Frontier(NamedTuple):
    """What a method earns, means over worlds."""

    gains: np.ndarray  # (kls,) float64: over the uniform policy, in ranks, at each KL
    kl: float  # nats, of its policy at one β


def frontiers(
    *,
    spread: float,
    noise: float,
    kls,
    beta: float,
    pairs: int = 400,
    steps: int = 100,
    lr: float = 0.3,
    contexts: int = 16,
    arms: int = 5,
    dimensions: int = 8,
    seeds=range(1000, 1100),
) -> dict[str, Frontier]:
    """Train DPO and MallowsPO in many worlds; return what each earns at equal KL.

    By itself in the worlds of notebook 27.

    Args:
        spread: standard deviation of log(-log φ) over the contexts, >= 0.
        noise: standard deviation of the error of the estimate of log(-log φ), >= 0.
        kls: nats, at which the methods are compared.
        beta: > 0, of the policies whose KL is returned.
        seeds: of the worlds.
    Returns:
        {method: Frontier} of DPO, MallowsPO-θ and MallowsPO-φ.
    Raises:
        ValueError: as draw_world, draw_pairs, estimate, descend and gain_at_kl.

    Without spread and noise MallowsPO-θ is DPO.
    """
    _require_positive(beta=beta)
    links = {"DPO": "logistic", "MallowsPO-θ": "logistic", "MallowsPO-φ": "mallows_phi"}
    gains: dict[str, list] = {method: [] for method in links}
    reached: dict[str, list] = {method: [] for method in links}
    for seed in seeds:
        world = draw_world(contexts, arms, dimensions, spread=spread, seed=seed)
        wins = draw_pairs(world, pairs, people="mallows", seed=seed)
        told = estimate(world.agreement, noise=noise, seed=seed)
        for method, link in links.items():
            weights = np.ones(contexts) if method == "DPO" else told
            v = descend(world.features, wins, weights, link=link, steps=steps, lr=lr)[-1]
            gains[method].append([gain_at_kl(world.features, world.ranks, v, kl) for kl in kls])
            reached[method].append(measure(policy(world.features, v / beta), world.ranks)[1])
    return {
        method: Frontier(np.mean(gains[method], axis=0), float(np.mean(reached[method])))
        for method in links
    }
