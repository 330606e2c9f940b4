"""Penalties, top-k and top-p for vLLM on the CPU, without a pass over the whole vocabulary."""

import torch
from torch import Tensor
from vllm.v1.sample.logits_processor import LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates


def top_k_top_p(logits: Tensor, k: int, p: float) -> Tensor:
    """Keep the k largest logits of each row, then those that hold the mass p; set others to −inf.

    logits: (rows, vocabulary), float, changed in place. k below 1 and p = 1 mean no limit. A token
    stays while the more likely ones of those k hold less than p. Equal logits stay or go together,
    and the largest stays. The result is that of sorting each row, at a fraction of its time on a
    CPU.
    """
    vocabulary = logits.shape[-1]
    if 0 < k < vocabulary:
        kept = k
    elif p < 1:
        kept = vocabulary
    else:
        return logits
    # in falling order, one more than the k: where that equals the k-th, others may too
    largest, tokens = logits.topk(min(kept + 1, vocabulary), dim=-1)
    top = largest[:, :kept]
    has_ties = kept < vocabulary and bool((largest[:, kept] == top[:, -1]).any())
    ties = _equal_to_last(logits, top) if has_ties else 0
    if p < 1:
        lowest = _lowest_of_mass(top, ties, p)
    else:
        lowest = top[:, -1:]
    if has_ties:
        is_left_out = logits < lowest
        return logits.masked_fill_(is_left_out, -float("inf"))
    # writing the few that stay takes half the time of comparing all
    top = top.masked_fill(top < lowest, -float("inf"))
    return logits.fill_(-float("inf")).scatter_(1, tokens[:, :kept], top)


def _equal_to_last(logits: Tensor, top: Tensor) -> Tensor:
    """Return how many logits equal the k-th, yet are not among the k, (rows, 1).

    top: (rows, k), the k largest logits in falling order. Such ties are common in bfloat16.
    """
    # how many logits of each row are not below the k-th, in a third of the time of .sum(-1)
    is_among = logits >= top[:, -1:]
    rows = is_among.nonzero()[:, 0]
    counts = torch.bincount(rows, minlength=len(logits))
    return counts[:, None] - top.shape[-1]


def _lowest_of_mass(top: Tensor, ties: Tensor | int, p: float) -> Tensor:
    """Return the smallest logit of each row, (rows, 1), that the mass p still needs.

    top: (rows, k), the k largest logits in falling order. ties: how many more equal the k-th. The
    mass is that of all these.
    """
    mass = (top - top[:, :1]).exp()
    mass_of_ties = ties * mass[:, -1:]
    total = mass.sum(-1, keepdim=True) + mass_of_ties
    mass_before = mass.cumsum(-1) - mass
    is_needed = mass_before < p * total
    is_needed[:, 0] = True
    needed = top.masked_fill(~is_needed, float("inf"))
    return needed.amin(-1, keepdim=True)


class CpuPenalties(LogitsProcessor):
    """Apply presence and frequency penalties to the tokens of the responses so far.

    vLLM's own passes go over all logits, and are a quarter of the time of a step with 256 requests.
    """

    def __init__(self, vllm_config, device, is_pin_memory):
        self.penalties = vllm_config.additional_config
        self.tokens = {}  # row -> its response's token ids, a list that vLLM appends to

    def is_argmax_invariant(self) -> bool:
        """Return False, so that it runs where vLLM's own penalties do."""
        return False

    def update_state(self, batch_update) -> None:
        """Note which requests came, left or moved to another row."""

        def tokens_of(parameters, prompt, response):
            return response

        process_dict_updates(self.tokens, batch_update, tokens_of)

    def apply(self, logits: Tensor) -> Tensor:
        """Subtract the penalties in place from logits, (rows, vocabulary)."""
        vocabulary = logits.shape[-1]
        positions = []
        for row, tokens in self.tokens.items():
            positions += [row * vocabulary + token for token in tokens]
        # an empty list would make floats
        positions = torch.tensor(positions, dtype=torch.long)
        positions, counts = positions.unique(return_counts=True)
        frequency = self.penalties["frequency_penalty"]
        presence = self.penalties["presence_penalty"]
        rows = positions // vocabulary
        tokens = positions % vocabulary
        penalties = counts * frequency + presence
        logits[rows, tokens] -= penalties
        return logits


class CpuTopKTopP(LogitsProcessor):
    """Apply `top_k_top_p` to every request; vLLM's own sampler sorts all rows at each step."""

    def __init__(self, vllm_config, device, is_pin_memory):
        self.limits = vllm_config.additional_config

    def is_argmax_invariant(self) -> bool:
        """Return True, so that it runs after the temperature, as vLLM's own top-k and top-p do."""
        return True

    def update_state(self, batch_update) -> None:
        """Need no state: all requests of an engine decode alike."""

    def apply(self, logits: Tensor) -> Tensor:
        """Limit logits, (rows, vocabulary), in place."""
        return top_k_top_p(logits, self.limits["top_k"], self.limits["top_p"])
