"""Count the floating-point operations that a training needs, whatever it computes beside them.

A multiply-add is two operations. Only matrix products are counted: those of the decoder's weights
for each token, with a prompt counted once; those of attention for what a token sees; and the
language model's head where a response token is predicted. Padding, masked blocks, prompts that are
computed twice and layers that are computed again are no use, and are not counted.
"""

import torch

# Dense bfloat16 operations a second by the names of GPUs, from their makers' data sheets. Cards of
# nearly the same name (H100 PCIe, H200 NVL) are slower.
PEAK = {
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
}


def training(model, rows: list[dict], names: list[str]) -> float:
    """Return the operations of a step on rows: a backward pass needs twice those of a forward pass.

    model: a transformers model with dense layers; of a mixture of experts all are counted, though a
    token visits few. names: of the responses that are trained on.
    """
    return 3 * forward(model, rows, names)


def forward(model, rows: list[dict], names: list[str]) -> float:
    """Return the operations of scoring the named responses of rows."""
    config = model.config.get_text_config()
    tokens = 0
    scored = 0
    seen = 0
    for row in rows:
        prompt = len(row["prompt_ids"])
        lengths = [len(row["responses"][name]) for name in names]
        tokens += prompt + sum(lengths)
        scored += sum(lengths)
        seen += _seen(prompt, lengths)
    decoder = 2 * _decoder_weights(model) * tokens
    head = 2 * config.hidden_size * config.vocab_size * scored
    # queries with keys, and weights with values: two products of a head's width
    attention = 4 * _attention_width(config) * config.num_hidden_layers * seen
    return decoder + head + attention


def _seen(prompt: int, lengths: list[int]) -> int:
    """Return how many positions the tokens of a row see in all, themselves among them.

    lengths: of the responses, each of which sees the prompt and itself.
    """
    seen = prompt * (prompt + 1) // 2
    for length in lengths:
        seen += length * prompt + length * (length + 1) // 2
    return seen


def _decoder_weights(model) -> int:
    """Return how many weights of the decoder multiply each token: those of its matrices.

    Embeddings, of tokens and of positions, are looked up.
    """
    weights = 0
    for module in model.get_decoder().modules():
        if isinstance(module, torch.nn.Embedding):
            continue
        for parameter in module.parameters(recurse=False):
            shape = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3 keeps a part of it
            if len(shape) >= 2:
                weights += shape.numel()
    return weights


def _attention_width(config) -> int:
    """Return the width of all heads of a layer together."""
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return heads * width


def peak(name: str) -> float | None:
    """Return the operations a second that a GPU of this name can do, None for one not in PEAK."""
    return PEAK.get(name)


def device_peak(device: str) -> float | None:
    """Return peak() of a device as torch names it, None for the CPU."""
    if not device.startswith("cuda"):
        return None
    return peak(torch.cuda.get_device_name(device))
