"""The operations of a training, by hand and against torch's own counter."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from beyond_dpo import flops

NAMES = ["chosen", "rejected"]


def row(prompt, chosen, rejected):
    """Return a row with so many tokens in each part."""
    responses = {"chosen": [1] * chosen, "rejected": [2] * rejected}
    return {"id": "", "prompt_ids": [3] * prompt, "responses": responses}


@pytest.fixture(scope="module")
def llama():
    config = LlamaConfig(
        vocab_size=100,
        hidden_size=16,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        tie_word_embeddings=True,
        attn_implementation="eager",
    )
    return LlamaForCausalLM(config)


def test_operations_by_hand(llama):
    """A prompt of 3 tokens, responses of 2 and 1.

    Weights of a layer: queries and output 16 × 32 each, keys and values 16 × 16 each, the MLP
    3 × 16 × 40: 3,456, of two layers 6,912. Tokens 6, scored 3. The prompt's tokens see
    1 + 2 + 3 = 6 positions, the responses' 4 + 5 and 4: 19 in all.
    """
    decoder = 2 * 6912 * 6
    head = 2 * 16 * 100 * 3
    attention = 2 * 2 * (4 * 8) * 2 * 19
    rows = [row(3, 2, 1)]
    assert flops.forward(llama, rows, NAMES) == decoder + head + attention
    assert flops.training(llama, rows, NAMES) == 3 * (decoder + head + attention)


def test_operations_of_rows_add_up(llama):
    rows = [row(3, 2, 1), row(7, 5, 4)]
    separately = sum(flops.forward(llama, [each], NAMES) for each in rows)
    assert flops.forward(llama, rows, NAMES) == separately


def test_torch_counts_the_same(llama):
    """On one sequence; torch counts the products that the causal mask throws away, and all logits.

    Of L² products L (L + 1) / 2 are seen.
    """
    prompt, response = 5, 7
    length = prompt + response
    ids = torch.ones(1, length, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        llama(ids)
    unseen = length * length - length * (length + 1) // 2
    not_needed = 2 * 2 * 32 * 2 * unseen + 2 * 16 * 100 * prompt
    counted = flops.forward(llama, [row(prompt, response, 0)], ["chosen"])
    assert counter.get_total_flops() == counted + not_needed


def test_embeddings_of_positions_multiply_nothing():
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=100, n_positions=64)
    model = GPT2LMHeadModel(config)
    decoder = 2 * (16 * 48 + 16 * 16 + 2 * 16 * 64) * 6
    head = 2 * 16 * 100 * 3
    attention = 2 * 2 * 16 * 19
    assert flops.forward(model, [row(3, 2, 1)], NAMES) == decoder + head + attention


def test_a_cpu_has_no_known_peak():
    assert flops.device_peak("cpu") is None


@pytest.mark.parametrize(
    "name, wanted",
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 PCIe", None),  # has another peak
    ],
)
def test_peaks_by_name(monkeypatch, name, wanted):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert flops.peak(name) == wanted
    assert flops.device_peak("cuda:0") == wanted
