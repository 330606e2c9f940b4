"""How a transformers model computes attention over responses that share their prompts.

A token sees what comes before it in its row's prompt and in its own response, and nothing else.
sdpa is told so by a mask, flex-attention by a mask of blocks, of which it skips those that see
nothing. "by_rows" computes the parts of each row on their own, so that nothing masked is computed.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

FLASH = "flash_attention_2"
FLEX = "flex_attention"
BY_ROWS = "by_rows"
# The name of a config's setting by which a model caps its attention scores.
CAP = re.compile("att.*(soft_?cap|logits?_cap)")


class Span(NamedTuple):
    """Where a row stands in its line: pairs of (first token, the one after the last)."""

    prompt: tuple[int, int]
    responses: list[tuple[int, int]]  # right after the prompt, one after the other


def visible(row_of_token: Tensor, part_of_token: Tensor) -> Tensor:
    """Return (lines, 1, L, L) bool: whether the first of two positions sees the second.

    A token sees itself and what comes before it in its row's prompt and in its own response.
    Padding sees padding, as a position that sees nothing would be NaN.

    row_of_token, part_of_token: (lines, L), see pack().
    """
    seen_row = row_of_token.unsqueeze(1)
    same_row = row_of_token.unsqueeze(2) == seen_row
    seen_part = part_of_token.unsqueeze(1)
    same_part = part_of_token.unsqueeze(2) == seen_part
    in_prompt = seen_part == 0
    is_seen = same_row & (in_prompt | same_part)
    not_after = is_seen.tril()
    return not_after.unsqueeze(1)


def visible_blocks(row_of_token: Tensor, part_of_token: Tensor):
    """Return what visible() says as a BlockMask: flex-attention skips blocks that see nothing."""
    from torch.nn.attention.flex_attention import create_block_mask

    rows = row_of_token.int()
    parts = part_of_token.int()

    def is_seen(line, head, position, seen_position):
        same_row = rows[line, position] == rows[line, seen_position]
        seen_part = parts[line, seen_position]
        same_part = parts[line, position] == seen_part
        not_after = position >= seen_position
        return same_row & ((seen_part == 0) | same_part) & not_after

    lines, width = rows.shape
    return create_block_mask(is_seen, lines, None, width, width, device=rows.device)


def by_rows(
    module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    spans: list[list[Span]] | None = None,
    **options,
) -> tuple[Tensor, None]:
    """Compute the attention of a layer row by row, by sdpa; transformers calls it.

    A prompt sees itself, a response its prompt and itself: of L² products only those of a row are
    computed, and of a prompt those before the diagonal.

    Args:
        query, key, value: (lines, heads, L, width of a head); keys and values may have fewer heads.
        attention_mask: where it is given, or there are no spans, this is sdpa as it comes.
        spans: the rows of each line. What is behind them is padding, and gets 0.
    Returns:
        (lines, L, heads, width of a head), and no weights.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if spans is None or attention_mask is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    lines = []
    # Parts are split off, not sliced: the gradient of each slice would be as large as the whole.
    states = zip(query.split(1), key.split(1), value.split(1), spans, strict=True)
    for line_query, line_key, line_value, rows in states:
        sizes = _sizes(rows, query.shape[2])
        queries = iter(line_query.split(sizes, dim=2))
        keys = iter(line_key.split(sizes, dim=2))
        values = iter(line_value.split(sizes, dim=2))
        parts = []
        for row in rows:
            parts += _row_attention(module, queries, keys, values, len(row.responses), options)
        padding = next(queries).transpose(1, 2)
        lines.append(torch.cat([*parts, torch.zeros_like(padding)], dim=1))
    return torch.cat(lines), None


def _sizes(rows: list[Span], width: int) -> list[int]:
    """Return the tokens of each part of a line: prompts with their responses, then padding."""
    sizes = []
    for row in rows:
        sizes.append(row.prompt[1] - row.prompt[0])
        sizes += [stop - start for start, stop in row.responses]
    sizes.append(width - sum(sizes))
    return sizes


def _row_attention(
    module,
    queries: Iterator[Tensor],
    keys: Iterator[Tensor],
    values: Iterator[Tensor],
    responses: int,
    options: dict,
) -> list[Tensor]:
    """Return the attention of a row's prompt and of each response, (1, tokens, heads, width).

    queries, keys, values: of the parts that follow, (1, heads, tokens, width).
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    query = next(queries)
    prompt_key = next(keys)
    prompt_value = next(values)
    of_prompt, _ = sdpa_attention_forward(module, query, prompt_key, prompt_value, None, **options)
    parts = [of_prompt]
    for _ in range(responses):
        query = next(queries)
        key = torch.cat([prompt_key, next(keys)], dim=2)
        value = torch.cat([prompt_value, next(values)], dim=2)
        # all of the prompt, and of the response what is not after
        seen = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=key.device)
        seen = seen.tril(prompt_key.shape[2])
        of_response, _ = sdpa_attention_forward(
            module, query, key, value, seen[None, None], **options
        )
        parts.append(of_response)
    return parts


def choose(precision: str, wanted: str = "auto") -> str:
    """Return the attention to ask transformers for.

    That is `wanted`. "auto" is flex-attention on a GPU in precision "bf16", where it skips what a
    token does not see, and by_rows() on a CPU; else it is PyTorch's scaled-dot-product attention
    (sdpa). With flash-attention a prompt is computed once for each of its responses.
    Raises ImportError for a flash-attention that is not there, and ValueError for flex-attention
    without a GPU.
    """
    from transformers.utils import is_flash_attn_2_available

    if wanted == FLEX and not torch.cuda.is_available():
        raise ValueError("flex_attention trains on a GPU only; sdpa needs none")
    is_fast = torch.cuda.is_available() and precision == "bf16"
    if wanted == FLASH and not (is_fast and is_flash_attn_2_available()):
        raise ImportError(
            "flash_attention_2 needs a GPU, precision bf16 and `pip install flash-attn`; sdpa "
            "needs none"
        )
    if wanted != "auto":
        return wanted
    if is_fast:
        return FLEX
    return "sdpa" if torch.cuda.is_available() else BY_ROWS


def apply(model, precision: str, wanted: str = "auto") -> None:
    """Let a transformers model compute its attention as choose() says.

    For "auto", a model that knows no flex-attention keeps to sdpa. Raises ImportError as
    choose(), and ValueError for a model that does not know what is wanted.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(BY_ROWS, by_rows)
    implementation = choose(precision, wanted)
    lacks_flex = implementation == FLEX and not model._supports_flex_attn
    lacks_sdpa = implementation == BY_ROWS and not model._supports_sdpa
    if lacks_sdpa or (lacks_flex and wanted == "auto"):
        implementation = "sdpa"
    if implementation == FLEX:
        # Lengths differ from batch to batch: one kernel for all of them.
        torch._dynamo.config.assume_static_by_default = False
    model.set_attn_implementation(implementation)


def caps(config) -> bool:
    """Return whether a model caps its attention scores, as Gemma-2 does: s ← c · tanh(s / c)."""
    for name, value in config.to_dict().items():
        if value and CAP.match(name):
            return True
    return False


def use_one_that_caps(model) -> None:
    """Switch a transformers model that caps its attention scores from sdpa to eager attention.

    sdpa leaves the cap out in silence.
    """
    uses_sdpa = model.config._attn_implementation in ("sdpa", BY_ROWS)
    if uses_sdpa and caps(model.config.get_text_config()):
        model.set_attn_implementation("eager")
