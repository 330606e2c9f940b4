"""The useful floating-point operations of one training step, counted by hand.

A multiplication with its addition counts as two. What a method computes twice (a prompt for each of
its responses, a forward pass again for the backward one) is not useful, and counts once: so two
methods that do the same work are compared by the same number.
"""

from __future__ import annotations

from models import Shape

# Dense bf16 without sparsity, FLOP/s, from NVIDIA's datasheets: the H200 has the H100 SXM's chip.
DATASHEET = {"H100": 989e12, "H200": 989e12}
BACKWARD = 2  # a backward pass is two products for each one of the forward pass


def matmul_weights(shape: Shape) -> int:
    """Return the weights of the decoder's matrices: neither embeddings, head nor norms."""
    queries = shape.heads * shape.head_size
    keys = shape.key_heads * shape.head_size
    attention = 2 * shape.hidden * queries + 2 * shape.hidden * keys  # q and o, k and v
    mlp = 3 * shape.hidden * shape.inner  # gate, up and down
    return shape.layers * (attention + mlp)


def seen(prompt: int, response: int) -> int:
    """Return how many tokens the tokens of a pair see in all, each itself and what is before it."""
    of_prompt = prompt * (prompt + 1) // 2
    of_response = response * prompt + response * (response + 1) // 2
    return of_prompt + 2 * of_response


def forward_flops(shape: Shape, prompt: int, response: int) -> int:
    """Return the operations of one pair's forward pass, its prompt computed once.

    They are those of the decoder's matrices, of the output head where a response token is
    predicted, and of attention: the scores and their weighted sum, for each token that is seen.
    """
    tokens = prompt + 2 * response
    decoder = 2 * matmul_weights(shape) * tokens
    head = 2 * shape.hidden * shape.vocabulary * 2 * response
    width = shape.heads * shape.head_size
    attention = shape.layers * 4 * width * seen(prompt, response)
    return decoder + head + attention


def pair_flops(shape: Shape, prompt: int, response: int) -> int:
    """Return the operations of training on one pair; the reference is computed beforehand."""
    return (1 + BACKWARD) * forward_flops(shape, prompt, response)


def datasheet_peak(gpu: str | None) -> float | None:
    """Return the FLOP/s that a GPU's datasheet promises, None for one that is not in the table."""
    for name, peak in DATASHEET.items():
        if gpu and name in gpu:
            return peak
    return None
