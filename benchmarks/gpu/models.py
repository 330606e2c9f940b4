"""Random models, their tokenizer and random pairs: nothing is downloaded.

A word is a token, so a row of ids and its text say exactly the same: ours reads the ids, TRL the
text.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import NamedTuple

from beyond_dpo.rows import row_length, write_rows

WORDS = 8000  # of the tokenizer, at most; a model's vocabulary may be larger
SPECIAL = ("<s>", "</s>", "<pad>")  # ids 0, 1 and 2
END = 1
NAMES = ["chosen", "rejected"]


class Shape(NamedTuple):
    """The shape of a Llama."""

    hidden: int
    layers: int
    heads: int
    key_heads: int  # that have keys and values
    head_size: int
    inner: int  # of the MLP
    vocabulary: int
    tied: bool = True  # the output head is the embeddings


# As their config.json has them: meta-llama/Llama-3.2-1B, HuggingFaceTB/SmolLM2-135M,
# meta-llama/Llama-3.1-8B.
LLAMA_1B = Shape(2048, 16, 32, 8, 64, 8192, 128256)
SMOLLM2_135M = Shape(576, 30, 9, 3, 64, 1536, 49152)
LLAMA_8B = Shape(4096, 32, 32, 8, 128, 14336, 128256, tied=False)
TINY = Shape(64, 2, 4, 2, 16, 128, 512)


def config_of(shape: Shape):
    """Return the configuration of a Llama of this shape."""
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_heads,
        head_dim=shape.head_size,
        intermediate_size=shape.inner,
        vocab_size=shape.vocabulary,
        tie_word_embeddings=shape.tied,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        max_position_embeddings=8192,
        bos_token_id=0,
        eos_token_id=END,
        pad_token_id=2,
        attention_dropout=0.0,
        architectures=["LlamaForCausalLM"],
    )


def write_model(folder: Path, shape: Shape) -> None:
    """Write a random model in bfloat16, and its tokenizer; a GPU draws the weights if there is one.

    Both sides read the same file into float32.
    """
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = config_of(shape)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    write_tokenizer(folder, shape)


def write_tokenizer(folder: Path, shape: Shape) -> None:
    """Write a tokenizer of words between blanks, of which none adds a token by itself."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate(SPECIAL)}
    for number in range(len(SPECIAL), words_of(shape)):
        vocabulary[word_of(number)] = number
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
    )
    fast.save_pretrained(folder)


def pair_flops(shape: Shape, prompt: int, response: int) -> float:
    """Return the useful operations of training on one pair, flops.training()."""
    import torch
    from transformers import AutoModelForCausalLM

    from beyond_dpo import flops

    with torch.device("meta"):  # only shapes
        model = AutoModelForCausalLM.from_config(config_of(shape))
    return flops.training(model, random_rows(shape, 1, prompt, response), NAMES)


def words_of(shape: Shape) -> int:
    """Return how many of a model's tokens its tokenizer knows."""
    return min(WORDS, shape.vocabulary)


def word_of(token: int) -> str:
    """Return the word of a token that is not special."""
    return f"w{token}"


def random_rows(shape: Shape, count: int, prompt: int, response: int) -> list[dict]:
    """Return pairs of random tokens, all of the same lengths; an end token closes each response."""
    rng = random.Random(0)

    def ids(length: int) -> list[int]:
        return [rng.randrange(len(SPECIAL), words_of(shape)) for _ in range(length)]

    rows = []
    for i in range(count):
        responses = {name: [*ids(response - 1), END] for name in NAMES}
        rows.append({"id": f"r{i}", "prompt_ids": ids(prompt), "responses": responses})
    return rows


def write_pairs(path: Path, rows: list[dict]) -> int:
    """Write rows for both sides; return the tokens of a pair, its prompt counted once."""
    write_rows(path, rows)
    lengths = {row_length(row, NAMES) for row in rows}
    (length,) = lengths
    return length


def as_text(row: dict) -> dict[str, str]:
    """Return a row as the texts that TRL reads, which puts the end token there itself."""
    text = {"prompt": " ".join(map(word_of, row["prompt_ids"]))}
    for name, ids in row["responses"].items():
        words = [word_of(token) for token in ids[:-1]]
        text[name] = " " + " ".join(words)
    return text
