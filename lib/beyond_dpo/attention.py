"""How a transformers model computes attention over responses that share their prompts.

A token sees what comes before it in its row's prompt and in its own response, and nothing else.
sdpa is told so by a mask, flex-attention by a mask of blocks, of which it skips those that see
nothing.
"""

import re

import torch
from torch import Tensor

FLASH = "flash_attention_2"
FLEX = "flex_attention"
# The name of a config's setting by which a model caps its attention scores.
CAP = re.compile("att.*(soft_?cap|logits?_cap)")


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


def choose(precision: str, wanted: str = "auto") -> str:
    """Return the attention to ask transformers for.

    That is `wanted`. "auto" is flex-attention on a GPU in precision "bf16", where it skips what a
    token does not see, and everywhere else PyTorch's scaled-dot-product attention (sdpa). With
    flash-attention a prompt is computed once for each of its responses.
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
    return FLEX if is_fast else "sdpa"


def apply(model, precision: str, wanted: str = "auto") -> None:
    """Let a transformers model compute its attention as choose() says.

    For "auto", a model that knows no flex-attention, or trains with dropout in its attention, which
    flex-attention does not know, gets sdpa; one that does not know sdpa gets eager attention.
    Raises ImportError as choose(), and ValueError for a model that does not know what is wanted.
    """
    implementation = choose(precision, wanted)
    if wanted == "auto":
        has_dropout = getattr(model.config.get_text_config(), "attention_dropout", 0)
        if implementation == FLEX and (has_dropout or not model._supports_flex_attn):
            implementation = "sdpa"
        if implementation == "sdpa" and not model._supports_sdpa:
            implementation = "eager"
    if implementation == FLEX:
        _one_kernel_for_all_lengths()
    model.set_attn_implementation(implementation)


def _one_kernel_for_all_lengths() -> None:
    """Let torch compile flex-attention for any shape, as lengths differ from batch to batch.

    This holds for all that this process compiles. A kernel is compiled again where there is one
    line or several, one block or several, with gradients or without, so the limit is raised: past
    it torch computes without a kernel, and without a word.
    """
    torch._dynamo.config.assume_static_by_default = False
    torch._dynamo.config.recompile_limit = 64
    torch.fx.experimental._config.use_duck_shape = False


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
    uses_sdpa = model.config._attn_implementation == "sdpa"
    if uses_sdpa and caps(model.config.get_text_config()):
        model.set_attn_implementation("eager")
