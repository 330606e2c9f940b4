"""The α search: on curves whose peak is known, and on two real (tiny) models in a living engine."""

import math

import numpy as np
import pytest
import torch

from beyond_dpo.jobs.search_alpha import search_alpha
from beyond_dpo.pipeline import config
from beyond_dpo.search import golden_section

NOISE = np.random.default_rng(0).normal(size=200)


def hill(top: float, calls: list):
    """Reward -(ln(1 + α) - ln(1 + top))², the same noise of each prompt at every α."""

    def evaluate(alpha: float) -> np.ndarray:
        calls.append(alpha)
        return NOISE - (math.log1p(alpha) - math.log1p(top)) ** 2

    return evaluate


@pytest.mark.parametrize("top", [0.3, 1.0, 5.0, 40.0])
def test_finds_the_peak_of_a_hill(top):
    """After 12 calls the bracket is 0.618¹⁰ of ln 101 wide: α + 1 is right to 5 %."""
    calls = []
    found = golden_section(hill(top, calls), (0.0, 100.0), 12, seed=0)
    assert abs(math.log1p(found.alpha) - math.log1p(top)) < 0.05
    assert len(calls) == len(set(calls)) == len(found.rewards) <= 12 and calls[0] == 0.0
    assert found.low <= found.alpha <= found.high
    assert found.low == found.high, "noise that all α share moves no choice"
    assert found.alpha == max(found.rewards, key=lambda a: found.rewards[a].mean())


def test_a_slope_ends_at_an_end_of_the_bracket():
    up = golden_section(lambda a: NOISE + a, (0.0, 10.0), 12, seed=0)
    assert up.alpha > 9.5
    down = golden_section(lambda a: NOISE - a, (0.0, 10.0), 12, seed=0)
    assert down.alpha == 0.0, "the aligned model itself is always tried"


def test_the_interval_is_wide_where_prompts_disagree():
    def evaluate(alpha):  # half of the prompts like α = 1, half α = 20: the mean hardly prefers any
        own = np.where(NOISE > 0, 1.0, 20.0)
        return -np.abs(np.log1p(alpha) - np.log1p(own))

    found = golden_section(evaluate, (0.0, 100.0), 10, seed=0)
    assert found.high / max(found.low, 0.1) > 2
    again = golden_section(evaluate, (0.0, 100.0), 10, seed=0)
    assert (again.alpha, again.low, again.high) == (found.alpha, found.low, found.high)


@pytest.mark.parametrize(
    "bracket, calls", [((1.0, 1.0), 8), ((-1.0, 1.0), 8), ((0.0, math.inf), 8), ((0.0, 1.0), 3)]
)
def test_refuses_impossible_searches(bracket, calls):
    with pytest.raises(ValueError, match="evaluations"):
        golden_section(hill(1.0, []), bracket, calls, seed=0)


def test_a_reward_that_is_not_finite_names_prompt_and_alpha():
    with pytest.raises(ValueError, match="prompt 3 at α=0.0"):
        golden_section(lambda a: np.array([0.0, 1, 2, np.nan]), (0.0, 1.0), 4, seed=0)


@pytest.mark.slow
def test_one_call_searches_two_models(tiny, tmp_path, monkeypatch, capsys):
    """A reward for one letter, on an "aligned" model moved towards it: its rewards are those of the
    sampled texts.
    """
    from transformers import AutoModelForCausalLM

    from beyond_dpo import templates

    tokenizer = templates.load_tokenizer(tiny)
    letter = templates.render(tokenizer, "e", "plain")[-1]
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    with torch.no_grad():
        rows = model.get_output_embeddings().weight
        rows[letter] += 0.02 * torch.randn(
            rows.shape[1], generator=torch.Generator().manual_seed(0)
        )
    model.save_pretrained(tmp_path / "aligned")
    tokenizer.save_pretrained(tmp_path / "aligned")
    heard = []

    def reward(prompts, responses):
        heard.append(list(zip(prompts, responses, strict=True)))
        return [text.count("e") for text in responses]

    decoding = config.Decoding(
        backend="transformers", max_tokens=6, max_model_len=64, dtype="float32"
    )
    prompts = ["The film", "A story of"]
    monkeypatch.delenv("TQDM_DISABLE")
    found = search_alpha(
        tiny,
        tmp_path / "aligned",
        prompts,
        reward,
        bracket=(0.0, 8.0),
        evaluations=4,
        decoding=decoding,
        samples=3,
    )
    assert capsys.readouterr().err.startswith(
        "searching α: at most 4 values, 6 responses at each\n"
    )
    assert (
        len(found.rewards) == len(heard) == 4
        and 0.0 in found.rewards
        and found.alpha in found.rewards
    )
    for values, pairs in zip(found.rewards.values(), heard, strict=True):
        assert [p for p, _ in pairs] == ["The film"] * 3 + ["A story of"] * 3
        assert values.tolist() == [
            np.mean([t.count("e") for p, t in pairs if p == prompt]) for prompt in prompts
        ]
    with pytest.raises(ValueError, match="prompts is empty"):
        search_alpha(tiny, tmp_path / "aligned", [], reward)
