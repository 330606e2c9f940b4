"""The α search: on curves whose peak is known, and on two real (tiny) models in a living engine."""

import math

import numpy as np
import pytest
import torch

from beyond_dpo import templates
from beyond_dpo.jobs.search_alpha import search_alpha
from beyond_dpo.pipeline import config
from beyond_dpo.search import golden_section

NOISE = np.random.default_rng(0).normal(size=200)  # of each prompt


def hill(top: float):
    """Return rewards -(ln(1 + α) - ln(1 + top))², with the same noise of each prompt at every α."""

    def evaluate(alpha: float) -> np.ndarray:
        distance = math.log1p(alpha) - math.log1p(top)
        return NOISE - distance**2

    return evaluate


@pytest.mark.parametrize("top", [0.3, 1.0, 5.0, 40.0])
def test_finds_the_peak_of_a_hill(top):
    """After 12 calls the bracket is 0.618¹⁰ of ln 101 wide: α + 1 is right to 5 %."""
    result = golden_section(hill(top), (0.0, 100.0), 12, seed=0)
    distance = math.log1p(result.alpha) - math.log1p(top)
    assert abs(distance) < 0.05
    mean_reward = result.rewards[result.alpha].mean()
    for rewards in result.rewards.values():
        assert rewards.mean() <= mean_reward


@pytest.mark.parametrize("top", [0.3, 1.0, 5.0, 40.0])
def test_no_alpha_is_evaluated_twice_and_0_comes_first(top):
    alphas = []
    evaluate = hill(top)

    def counted(alpha: float) -> np.ndarray:
        alphas.append(alpha)
        return evaluate(alpha)

    result = golden_section(counted, (0.0, 100.0), 12, seed=0)
    assert alphas[0] == 0.0
    assert len(alphas) <= 12
    assert len(set(alphas)) == len(alphas)
    assert list(result.rewards) == alphas


def test_noise_that_all_alphas_share_moves_no_choice():
    result = golden_section(hill(5.0), (0.0, 100.0), 12, seed=0)
    assert result.low == result.alpha == result.high


def test_a_rising_slope_ends_at_the_end_of_the_bracket():
    result = golden_section(lambda alpha: NOISE + alpha, (0.0, 10.0), 12, seed=0)
    assert result.alpha > 9.5


def test_a_falling_slope_ends_at_the_aligned_model_itself():
    result = golden_section(lambda alpha: NOISE - alpha, (0.0, 10.0), 12, seed=0)
    assert result.alpha == 0.0


def divided(alpha: float) -> np.ndarray:
    """Half of the prompts like α = 1, half α = 20, so the mean hardly prefers any."""
    favourite = np.where(NOISE > 0, 1.0, 20.0)
    return -np.abs(np.log1p(alpha) - np.log1p(favourite))


def test_the_interval_is_wide_where_prompts_disagree():
    result = golden_section(divided, (0.0, 100.0), 10, seed=0)
    low = max(result.low, 0.1)
    assert result.high / low > 2


def test_a_seed_fixes_the_interval():
    first = golden_section(divided, (0.0, 100.0), 10, seed=0)
    again = golden_section(divided, (0.0, 100.0), 10, seed=0)
    assert (again.alpha, again.low, again.high) == (first.alpha, first.low, first.high)


@pytest.mark.parametrize(
    "bracket, evaluations",
    [((1.0, 1.0), 8), ((-1.0, 1.0), 8), ((0.0, math.inf), 8), ((0.0, 1.0), 3)],
)
def test_refuses_impossible_searches(bracket, evaluations):
    with pytest.raises(ValueError, match="evaluations"):
        golden_section(hill(1.0), bracket, evaluations, seed=0)


def test_a_reward_that_is_not_finite_names_prompt_and_alpha():
    rewards = np.array([0.0, 1, 2, np.nan])
    with pytest.raises(ValueError, match="prompt 3 at α=0.0"):
        golden_section(lambda alpha: rewards, (0.0, 1.0), 4, seed=0)


# ---- in an engine


def test_a_search_without_prompts_is_refused(tiny):
    with pytest.raises(ValueError, match="prompts is empty"):
        search_alpha(tiny, tiny, [], reward=None)


def test_what_is_known_is_not_sampled_again(tiny):
    """With all α known no engine starts, and no reward is asked."""
    known = golden_section(hill(0.5), (0.0, 2.0), 6, seed=0).rewards
    prompts = ["The film"] * len(NOISE)
    more = {"bracket": (0.0, 2.0), "evaluations": 6, "known": known}
    result = search_alpha(tiny, tiny, prompts, reward=None, **more)
    assert list(result.rewards) == list(known)
    assert result.alpha == max(known, key=lambda alpha: known[alpha].mean())


@pytest.fixture
def moved(tiny, tmp_path):
    """Return an "aligned" model that is moved towards a letter."""
    from transformers import AutoModelForCausalLM

    tokenizer = templates.load_tokenizer(tiny)
    letter = templates.render(tokenizer, "e", "plain")[-1]
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        rows = model.get_output_embeddings().weight
        step = torch.randn(rows.shape[1], generator=generator)
        rows[letter] += 0.02 * step
    model.save_pretrained(tmp_path / "aligned")
    tokenizer.save_pretrained(tmp_path / "aligned")
    return tmp_path / "aligned"


@pytest.mark.slow
def test_one_call_searches_two_models(tiny, moved, monkeypatch, capsys):
    """A reward for one letter: the rewards are those of the sampled texts."""
    monkeypatch.delenv("TQDM_DISABLE")
    batches = []  # of (prompt, response), one for each α

    def reward(prompts, responses):
        batches.append(list(zip(prompts, responses, strict=True)))
        return [response.count("e") for response in responses]

    decoding = config.Decoding(
        backend="transformers",
        max_tokens=6,
        max_model_len=64,
        dtype="float32",
    )
    result = search_alpha(
        tiny,
        moved,
        ["The film", "A story of"],
        reward,
        bracket=(0.0, 8.0),
        evaluations=4,
        decoding=decoding,
        samples=3,
    )
    message = "searching α: at most 4 values, 6 responses at each\n"
    assert capsys.readouterr().err.startswith(message)
    assert len(result.rewards) == len(batches) == 4
    assert 0.0 in result.rewards
    assert result.alpha in result.rewards
    for rewards, batch in zip(result.rewards.values(), batches, strict=True):
        prompts = [prompt for prompt, _ in batch]
        assert prompts == ["The film"] * 3 + ["A story of"] * 3
        counts = [response.count("e") for _, response in batch]
        assert rewards.tolist() == [np.mean(counts[:3]), np.mean(counts[3:])]
