"""On a GPU: responses that share a prompt under flex-attention's compiled kernel.

These tests skip where there is none. They need torch, transformers and pytest alone:

    pytest --noconftest tests/gpu
"""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from beyond_dpo import attention, scoring

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
NAMES = {2: ["chosen", "rejected"], 3: ["source", "target", "rejected"]}


def random_rows(names, seed=0):
    """Return rows of uneven lengths, some longer than a block of 128 tokens."""
    generator = torch.Generator().manual_seed(seed)

    def random_ids(n):
        return torch.randint(3, 500, (n,), generator=generator).tolist()

    rows = []
    for i, prompt in enumerate([3, 130, 260, 1, 77, 512, 129, 40]):
        responses = {name: random_ids(5 + 37 * i + 11 * k) for k, name in enumerate(names)}
        rows.append({"id": str(i), "prompt_ids": random_ids(prompt), "responses": responses})
    return rows


def alone(rows, names):
    """Return each response in a row of its own, name-major as scores are."""
    separate = []
    for name in names:
        for row in rows:
            separate.append({**row, "responses": {"response": row["responses"][name]}})
    return separate


@pytest.fixture(autouse=True)
def compiled_anew(monkeypatch):
    """Compile anew in each test, and fail where torch would go on without a kernel."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch._dynamo.config, "fail_on_recompile_limit_hit", True)


def model_on_gpu(implementation, precision):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=4096,
    )
    model = LlamaForCausalLM(config).cuda().train()
    attention.apply(model, precision, implementation)
    return scoring.ResponseScorer(model, precision)


def logps_and_gradient(scorer, rows, names):
    scorer.zero_grad(set_to_none=True)
    logps = scorer.score(rows, names, 0)["logps"]
    logps.sum().backward()
    gradients = [parameter.grad.flatten().double() for parameter in scorer.parameters()]
    return logps.detach().double(), torch.cat(gradients)


@pytest.mark.parametrize("precision, tolerance", [("fp32", 1e-5), ("bf16", 1e-2)])
@pytest.mark.parametrize("responses", [2, 3])
def test_flex_equals_separate_sequences(responses, precision, tolerance):
    """Scores and gradients, against sdpa in float32 with a prompt for each response."""
    names = NAMES[responses]
    rows = random_rows(names)
    exact = model_on_gpu("sdpa", "fp32")
    expected, expected_gradient = logps_and_gradient(exact, alone(rows, names), ["response"])
    flex = model_on_gpu("flex_attention", precision)
    assert flex.flex
    logps, gradient = logps_and_gradient(flex, rows, names)
    assert (logps - expected).norm() <= tolerance * expected.norm()
    assert (gradient - expected_gradient).norm() <= 3 * tolerance * expected_gradient.norm()


def test_lengths_may_change_from_batch_to_batch():
    names = NAMES[2]
    exact = model_on_gpu("sdpa", "fp32")
    flex = model_on_gpu("flex_attention", "bf16")
    for seed, size in enumerate([8, 5, 2, 1]):
        rows = random_rows(names, seed)[:size]
        expected, _ = logps_and_gradient(exact, alone(rows, names), ["response"])
        logps, _ = logps_and_gradient(flex, rows, names)
        assert (logps - expected).norm() <= 1e-2 * expected.norm()


def test_a_gpu_in_bf16_takes_flex_by_itself():
    assert attention.choose("bf16") == "flex_attention"
    assert attention.choose("fp32") == "sdpa"
