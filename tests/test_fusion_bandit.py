"""The bandit of sources: cases by hand, against the losses and differences, what must hold."""

import dataclasses

import numpy as np
import pytest
import torch

from beyond_dpo import fusion_bandit as bandit
from beyond_dpo import losses

SMALL = bandit.World(prompts=8, features=5, responses=6, samples=3, test_prompts=4)
FAR = dataclasses.replace(SMALL, strength=2.0, distance=3.0)
BETA = 0.3
STEPS = 4


def random_quadruples(prompts=8, features=5):
    arrays = np.random.default_rng(0).normal(size=(3, prompts, features))
    return bandit.Quadruples(*arrays)


def mean_loss(quadruples, theta, alpha, name="wrpo"):
    """Return the mean loss by losses.py, of one policy with parameters theta (features,)."""
    arrays = (quadruples.source, quadruples.target, quadruples.rejected)
    logratios = [torch.as_tensor(array) @ theta for array in arrays]
    if name == "hybrid":
        values, _, _ = losses.hybrid(*logratios, beta=BETA)
    else:
        values, _, _ = losses.wrpo(*logratios, alpha=alpha, beta=BETA)
    return values.mean()


def gradient_by_autograd(quadruples, theta, alpha, name="wrpo"):
    parameters = torch.tensor(theta, requires_grad=True)
    mean_loss(quadruples, parameters, alpha, name).backward()
    return parameters.grad.numpy()


# ---- by hand


def test_a_set_of_two_responses_by_hand():
    """π_ref is 1/2 each, θ ln 3 on the feature that the second response has: π is 1/4 and 3/4.

    Rewards are 0 and 1: the rise is 1/4. KL is 1/4 ln 1/2 + 3/4 ln 3/2.
    """
    half = np.log(np.full((1, 2), 0.5))
    prompts = bandit.Prompts(np.array([[[0.0], [1.0]]]), half, half)
    rise, kl = bandit.measure(np.log([[3.0]]), prompts)
    assert rise == pytest.approx([0.25])
    assert kl == pytest.approx([0.25 * np.log(0.5) + 0.75 * np.log(1.5)])


def test_the_reference_rises_by_nothing():
    prompts = bandit.draw(FAR, 0).test
    rise, kl = bandit.measure(np.zeros((2, 5)), prompts)
    assert rise == pytest.approx([0, 0], abs=1e-14)
    assert kl == pytest.approx([0, 0], abs=1e-14)


def test_a_first_step_by_hand():
    """σ(0) is 1/2, so θ is lr β / 2 times the mean of α y_ws + (1 - α) y_wt - y_l."""
    quadruples = bandit.Quadruples(
        source=np.array([[4.0, 0.0], [0.0, 0.0]]),
        target=np.array([[0.0, 2.0], [0.0, 0.0]]),
        rejected=np.array([[0.0, 0.0], [2.0, 0.0]]),
    )
    alphas = bandit.constant([0.0, 0.25, 1.0], 1)
    theta = bandit.train(quadruples, alphas, lrs=np.full(3, 10.0), beta=0.2)
    means = np.array([[-1, 1], [-0.5, 0.75], [1, 0]])
    assert theta == pytest.approx(10 * 0.2 / 2 * means)


def test_sampling_inverts_the_distribution_function():
    log_probs = np.log([[0.2, 0.5, 0.3]])
    uniform = np.array([[0.0, 0.19, 0.21, 0.69, 0.71, 1 - 1e-16]])
    assert bandit.sample(log_probs, uniform).tolist() == [[0, 0, 1, 1, 2, 2]]


def test_alpha_rises_from_0_as_in_the_paper():
    """α_max t / T, with t the steps that are finished: the last step has not all of it."""
    assert bandit.rising([0.1], 4)[:, 0] == pytest.approx([0, 0.025, 0.05, 0.075])
    assert bandit.constant([0.1, 1.0], 2).tolist() == [[0.1, 1.0], [0.1, 1.0]]


@pytest.mark.parametrize("samples, mean", [(2, 1 / np.sqrt(np.pi)), (3, 1.5 / np.sqrt(np.pi))])
def test_the_mean_of_the_best_normal(samples, mean):
    assert bandit.mean_of_best(samples) == pytest.approx(mean)


def test_a_prediction_by_hand():
    """Without features of noise only the style is in the way: S / sqrt(S² + α² d²)."""
    world = bandit.World(strength=1.0, distance=2.0, noise=0.0, prompts=10**9, samples=2)
    along = 2 / np.sqrt(np.pi) + 0.5
    wanted = along / np.sqrt(along**2 + 1) - 1
    assert bandit.predicted(world, [0.0, 0.5]) == pytest.approx([0, wanted], abs=1e-6)


@pytest.mark.parametrize("strength", [-2.0, 0.0, 3.0])
@pytest.mark.parametrize("distance", [0.0, 4.0])
def test_the_slope_of_the_prediction_at_0(strength, distance):
    """(1 - c²) (s / S + 1/2) with S = 2 m / sqrt(2), and c² = S² / (S² + 63 · 2 / 64)."""
    world = bandit.World(strength, distance)
    own = 2 * bandit.mean_of_best(5) / np.sqrt(2)
    left = 1 - own**2 / (own**2 + 63 * 2 / 64)
    slope = bandit.predicted(world, [1e-6])[0] / 1e-6
    assert slope == pytest.approx(left * (strength / own + 0.5), abs=1e-4)


# ---- against the losses


@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.7, 1.0])
def test_the_gradient_is_that_of_losses_wrpo(alpha):
    quadruples = random_quadruples()
    theta = np.random.default_rng(1).normal(size=5)
    ours = bandit.gradient(quadruples, theta[np.newaxis], np.array([alpha]), BETA)
    assert ours[0] == pytest.approx(gradient_by_autograd(quadruples, theta, alpha), abs=1e-12)


def test_the_gradient_is_the_slope_of_the_loss():
    quadruples = random_quadruples()
    theta = np.random.default_rng(1).normal(size=5)
    (ours,) = bandit.gradient(quadruples, theta[np.newaxis], np.array([0.3]), BETA)
    for feature, slope in enumerate(ours):
        step = 1e-5 * np.eye(5)[feature]
        above = mean_loss(quadruples, torch.tensor(theta + step), 0.3)
        below = mean_loss(quadruples, torch.tensor(theta - step), 0.3)
        assert (above - below).item() / 2e-5 == pytest.approx(slope, abs=1e-8)


def test_two_pairs_of_each_prompt_are_the_hybrid_loss():
    drawn = bandit.draw(FAR, 0)
    theta = np.random.default_rng(1).normal(size=5)
    two_pairs = bandit.both(drawn)
    assert two_pairs.source.shape == (16, 5)
    assert (two_pairs.source[:2] == [drawn.quadruples.source[0], drawn.quadruples.target[0]]).all()
    (ours,) = bandit.gradient(two_pairs, theta[np.newaxis], np.array([0.0]), BETA)
    wanted = gradient_by_autograd(drawn.quadruples, theta, 0.0, "hybrid")
    assert ours == pytest.approx(wanted, abs=1e-12)


def test_training_is_one_epoch_of_gradient_descent():
    quadruples = bandit.draw(FAR, 0).quadruples
    alphas = bandit.rising([0.8], STEPS)
    ours = bandit.train(quadruples, alphas, lrs=np.array([2.0]), beta=BETA)
    theta = np.zeros(5)
    for step in range(STEPS):
        rows = slice(2 * step, 2 * step + 2)
        batch = bandit.Quadruples(
            quadruples.source[rows], quadruples.target[rows], quadruples.rejected[rows]
        )
        theta = theta - 2.0 * gradient_by_autograd(batch, theta, 0.8 * step / STEPS)
    assert ours[0] == pytest.approx(theta, abs=1e-12)


# ---- what must hold


def rises(quadruples, alphas, test, rate=3.0):
    schedule = bandit.constant(alphas, STEPS)
    theta = bandit.train(quadruples, schedule, lrs=np.full(len(alphas), rate), beta=BETA)
    return bandit.measure(theta, test)[0]


def test_alpha_of_0_and_1_are_dpo():
    drawn = bandit.draw(FAR, 0)
    quadruples = drawn.quadruples
    of_target = bandit.pairs(quadruples.target, quadruples.rejected)
    of_source = bandit.pairs(quadruples.source, quadruples.rejected)
    first, last = rises(quadruples, [0.0, 1.0], drawn.test)
    assert first == pytest.approx(rises(of_target, [0.4], drawn.test)[0], abs=1e-12)
    assert last == pytest.approx(rises(of_source, [0.4], drawn.test)[0], abs=1e-12)
    assert first != pytest.approx(last, abs=1e-3)


def test_where_the_sources_best_is_the_targets_own_alpha_changes_nothing():
    drawn = bandit.draw(FAR, 0)
    same = bandit.pairs(drawn.quadruples.target, drawn.quadruples.rejected)
    values = rises(same, [0.0, 0.1, 1.0], drawn.test)
    assert np.ptp(values) < 1e-12


def test_methods_do_not_depend_on_their_neighbours():
    drawn = bandit.draw(FAR, 0)
    together = rises(drawn.quadruples, [0.0, 0.5, 1.0], drawn.test)
    alone = rises(drawn.quadruples, [0.5], drawn.test)
    assert together[1] == pytest.approx(alone[0], abs=1e-12)


def test_an_equal_source_is_the_target():
    prompts = bandit.draw(SMALL, 0).test
    uniform = np.full((4, 6), -np.log(6))
    assert prompts.log_target == pytest.approx(uniform)
    assert prompts.log_source == pytest.approx(uniform)


def test_both_models_are_distributions_with_the_ratio_of_two_normals():
    """log π_s - log π_t is s f_1 + d f_2, but for a constant of the prompt."""
    prompts = bandit.draw(FAR, 0).test
    for log_probs in (prompts.log_target, prompts.log_source):
        assert np.exp(log_probs).sum(-1) == pytest.approx(np.ones(4))
    ratio = prompts.log_source - prompts.log_target
    wanted = 2 * prompts.features[:, :, 0] + 3 * prompts.features[:, :, 1]
    assert np.ptp(ratio - wanted, axis=-1) == pytest.approx(np.zeros(4), abs=1e-9)


def test_a_source_is_as_strong_and_as_far_as_it_is_said():
    """In a large set π_t and π_s have the means 0 and (s, d), so y_ws is stronger by about s."""
    world = bandit.World(strength=1.0, distance=2.0, prompts=2000, features=2, responses=400)
    drawn = bandit.draw(world, 0)
    assert drawn.strength == pytest.approx(1, abs=0.1)
    prompts = bandit.draw_prompts(world, 400, np.random.default_rng(0))
    for log_probs, mean in ((prompts.log_target, [0, 0]), (prompts.log_source, [1, 2])):
        weighted = np.exp(log_probs)[:, :, np.newaxis] * prompts.features
        assert weighted.sum(1).mean(0) == pytest.approx(mean, abs=0.05)


def test_the_best_and_the_worst_are_those_of_the_reward_model():
    """Without noise the true reward decides: y_wt is above y_l, in every prompt or equal."""
    world = dataclasses.replace(SMALL, strength=6.0, noise=0.0, responses=40, samples=8)
    drawn = bandit.draw(world, 0)
    quadruples = drawn.quadruples
    assert (quadruples.target[:, 0] > quadruples.rejected[:, 0]).all()
    assert drawn.source_is_better.all()
    assert (bandit.better(drawn).source == quadruples.source).all()
    weak = bandit.draw(dataclasses.replace(world, strength=-6.0), 0)
    assert (bandit.better(weak).source == weak.quadruples.target).all()


def test_a_seed_is_one_bandit_and_worlds_share_what_is_random():
    one = bandit.draw(FAR, 3)
    again = bandit.draw(FAR, 3)
    other = bandit.draw(FAR, 4)
    assert (one.quadruples.source == again.quadruples.source).all()
    assert (one.test.features == again.test.features).all()
    assert not (one.test.features == other.test.features).any()
    near = bandit.draw(dataclasses.replace(FAR, distance=0.0), 3)
    assert (one.test.features[:, :, 2:] == near.test.features[:, :, 2:]).all()


@pytest.mark.parametrize("kl", [0.05, 0.5])
def test_methods_are_compared_at_the_kl_that_is_asked(kl):
    drawn = bandit.draw(FAR, 0)
    schedule = bandit.constant([0.0, 0.5], STEPS)
    rise = bandit.at_kl(drawn.quadruples, schedule, drawn.test, kl=kl, beta=BETA)
    rates = np.geomspace(0.01, 100, 400)
    for method, alpha in enumerate([0.0, 0.5]):
        alphas = bandit.constant(np.full(400, alpha), STEPS)
        theta = bandit.train(drawn.quadruples, alphas, lrs=rates, beta=BETA)
        risen, kls = bandit.measure(theta, drawn.test)
        assert rise[method] == pytest.approx(np.interp(kl, kls, risen), abs=1e-3)


def test_the_simulation_of_a_small_step_is_as_predicted():
    """Mean over seeds at a small KL against the formula of normal features."""
    world = bandit.World(strength=1.0, distance=1.0, responses=512, features=16, test_prompts=16)
    schedule = bandit.constant([0.0, 0.5], 1)
    measured = []
    for seed in range(30):
        drawn = bandit.draw(world, seed)
        measured.append(bandit.at_kl(drawn.quadruples, schedule, drawn.test, kl=0.01, beta=0.01))
    own, fused = np.mean(measured, 0)
    _, wanted = bandit.predicted(world, [0.0, 0.5])
    assert fused / own - 1 == pytest.approx(wanted, abs=0.02)


# ---- bad input


@pytest.mark.parametrize(
    "name, value",
    [
        ("strength", np.nan),
        ("strength", np.inf),
        ("distance", -1.0),
        ("noise", -0.1),
        ("noise", np.inf),
        ("prompts", 1),
        ("prompts", 8.5),
        ("samples", 0),
        ("features", 1),
        ("responses", 0),
        ("test_prompts", -3),
    ],
)
def test_a_world_out_of_range_is_named(name, value):
    with pytest.raises(ValueError, match=f"^{name} must"):
        dataclasses.replace(SMALL, **{name: value})


@pytest.mark.parametrize("alphas", [[1.1], [-0.1], [np.nan], [], 0.5, [[0.1]]])
@pytest.mark.parametrize("schedule", [bandit.constant, bandit.rising])
def test_alphas_out_of_range_are_refused(schedule, alphas):
    with pytest.raises(ValueError, match="^alpha must be"):
        schedule(alphas, STEPS)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"alphas": np.full((STEPS, 1), 1.5)}, "^alpha must be"),
        ({"alphas": np.zeros(STEPS)}, "^.steps, methods"),
        ({"alphas": np.zeros((3, 1))}, "^8 prompts are no 3 equal"),
        ({"lrs": np.ones(2)}, "^.steps, methods"),
        ({"lrs": np.zeros(1)}, "^lrs and beta must"),
        ({"lrs": np.full(1, np.nan)}, "^lrs and beta must"),
        ({"beta": 0.0}, "^lrs and beta must"),
        ({"beta": np.inf}, "^lrs and beta must"),
    ],
)
def test_a_training_that_cannot_be_is_refused(changes, message):
    arguments = {"alphas": np.zeros((STEPS, 1)), "lrs": np.ones(1), "beta": BETA, **changes}
    with pytest.raises(ValueError, match=message):
        bandit.train(random_quadruples(), **arguments)


@pytest.mark.parametrize("shapes", [[(8, 5), (8, 5), (8, 4)], [(8,), (8,), (8,)]])
def test_quadruples_have_one_shape(shapes):
    with pytest.raises(ValueError, match="^three arrays of one shape"):
        bandit.Quadruples(*[np.zeros(shape) for shape in shapes])


@pytest.mark.parametrize("kl, message", [(0.0, "^kl must"), (np.nan, "^kl must"), (1e3, "not rea")])
def test_a_kl_that_cannot_be_is_refused(kl, message):
    """A set of six responses has no policy that far from the reference."""
    drawn = bandit.draw(SMALL, 0)
    schedule = bandit.constant([0.0], STEPS)
    with pytest.raises(ValueError, match=message):
        bandit.at_kl(drawn.quadruples, schedule, drawn.test, kl=kl, beta=BETA)
