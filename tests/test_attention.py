"""Attention of a CPU, which computes the parts of a row on their own."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.testing import assert_close

from beyond_dpo import attention, scoring
from beyond_dpo.scoring import ResponseScorer

LENGTHS = [(3, [4, 2]), (1, [5, 1]), (6, [0, 3]), (2, [2, 2]), (4, [1, 7])]
NAMES = ["chosen", "rejected"]


@pytest.fixture(scope="module")
def batch():
    """Return rows of prompts and responses of LENGTHS in a batch, one response without a token."""
    rows = []
    for i, (prompt, lengths) in enumerate(LENGTHS):
        responses = {name: [7] * length for name, length in zip(NAMES, lengths, strict=True)}
        rows.append({"id": str(i), "prompt_ids": [5] * prompt, "responses": responses})
    return scoring.pack(rows, NAMES, pad_id=0)


def test_spans_of_lines_by_hand(batch):
    """13 tokens are the longest row, 44 // 26 is one line; rows stand in it by falling length."""
    (line,) = batch["spans"]
    assert line == [
        ((0, 4), [(4, 5), (5, 12)]),
        ((12, 15), [(15, 19), (19, 21)]),
        ((21, 27), [(27, 27), (27, 30)]),
        ((30, 31), [(31, 36), (36, 37)]),
        ((37, 39), [(39, 41), (41, 43)]),
    ]


def states(batch, key_heads):
    """Return random queries, keys and values of four heads for a batch, with gradients."""
    torch.manual_seed(0)
    lines, width = batch["input_ids"].shape
    query = torch.randn(lines, 4, width, 8, requires_grad=True)
    key = torch.randn(lines, key_heads, width, 8, requires_grad=True)
    value = torch.randn(lines, key_heads, width, 8, requires_grad=True)
    return query, key, value


def masked(query, key, value, mask):
    """Return attention under a mask, as by_rows() lays it out."""
    groups = query.shape[1] // key.shape[1]
    key = key.repeat_interleave(groups, 1)
    value = value.repeat_interleave(groups, 1)
    return scaled_dot_product_attention(query, key, value, mask).transpose(1, 2)


@pytest.mark.parametrize("key_heads", [4, 2])
def test_rows_on_their_own_are_what_the_mask_says(batch, key_heads):
    """Values and gradients; padding is 0 and gets none."""
    module = SimpleNamespace(num_key_value_groups=4 // key_heads, is_causal=True)
    mask = attention.visible(batch["row_of_token"], batch["part_of_token"])
    is_token = (batch["row_of_token"] >= 0)[..., None, None]
    inputs = states(batch, key_heads)
    wanted = masked(*inputs, mask) * is_token
    weights = torch.randn(wanted.shape)
    wanted_gradients = torch.autograd.grad((wanted * weights).sum(), inputs)
    found, nothing = attention.by_rows(module, *inputs, None, spans=batch["spans"])
    assert nothing is None
    assert_close(found, wanted)
    gradients = torch.autograd.grad((found * weights).sum(), inputs)
    for gradient, wanted_gradient in zip(gradients, wanted_gradients, strict=True):
        assert_close(gradient, wanted_gradient)


def test_without_spans_it_is_sdpa(batch):
    module = SimpleNamespace(num_key_value_groups=1, is_causal=True)
    query, key, value = states(batch, 4)
    found, _ = attention.by_rows(module, query, key, value, None)
    wanted = scaled_dot_product_attention(query, key, value, is_causal=True)
    assert_close(found, wanted.transpose(1, 2))


@pytest.fixture
def model(tiny):
    model = scoring.load_model(str(tiny), "sdpa", torch.float32).eval()
    attention.apply(model, "fp32", "by_rows")
    return model


def test_the_scorer_of_long_rows_computes_no_mask(model, rows, monkeypatch):
    scorer = ResponseScorer(model)
    assert scorer.by_rows
    assert scorer.rows_from == scoring.ROWS_FROM
    assert "spans" not in scorer.pack(rows, NAMES, 2), "these rows are short"
    expected = scorer.score(rows, NAMES, 2)["logps"]
    scorer.rows_from = 0
    monkeypatch.delattr(attention, "visible")
    assert_close(scorer.score(rows, NAMES, 2)["logps"], expected)


def test_a_model_that_hands_no_spans_on_computes_by_a_mask(model, rows):
    """It would compute as if all of a line were one text."""
    scorer = ResponseScorer(copy.deepcopy(model))
    expected = scorer.score(rows, NAMES, 2)["logps"]
    whole = model.model.forward

    def without_spans(*arguments, spans=None, **options):
        return whole(*arguments, **options)

    model.model.forward = without_spans
    scorer = ResponseScorer(model)
    assert not scorer.by_rows
    scorer.rows_from = 0
    assert_close(scorer.score(rows, NAMES, 2)["logps"], expected)
