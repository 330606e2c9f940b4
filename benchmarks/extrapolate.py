"""Extrapolating a checkpoint: ours, mergekit and a plain copy of the same bytes, in turn.

A random bf16 checkpoint of about 1B parameters in four shards, one and four values of α:

    python benchmarks/extrapolate.py        # pip install .[bench]

mergekit writes one α per run (method `linear`, weights 1 + α and −α); ours and `cp` write all of
them in one.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from measure import report, run
from safetensors.torch import save_file

ALPHAS = (0.3, 0.5, 1.0, 2.0)
SHARDS = 4
# Of the random Llama. Eight of 32 heads have keys and values: a fourth of the hidden size.
VOCABULARY = 32000
HIDDEN = 2048
INNER = 5632
KEYS = 512


def shapes_of(layers: int) -> dict[str, tuple]:
    """Return {name: shape} of the weights, 45M parameters a layer."""
    shapes = {
        "model.embed_tokens.weight": (VOCABULARY, HIDDEN),
        "lm_head.weight": (VOCABULARY, HIDDEN),
        "model.norm.weight": (HIDDEN,),
    }
    for i in range(layers):
        layer = {
            "self_attn.q_proj": (HIDDEN, HIDDEN),
            "self_attn.k_proj": (KEYS, HIDDEN),
            "self_attn.v_proj": (KEYS, HIDDEN),
            "self_attn.o_proj": (HIDDEN, HIDDEN),
            "mlp.gate_proj": (INNER, HIDDEN),
            "mlp.up_proj": (INNER, HIDDEN),
            "mlp.down_proj": (HIDDEN, INNER),
            "input_layernorm": (HIDDEN,),
            "post_attention_layernorm": (HIDDEN,),
        }
        for name, shape in layer.items():
            shapes[f"model.layers.{i}.{name}.weight"] = shape
    return shapes


def write_checkpoint(folder: Path, seed: int, layers: int) -> None:
    """Write a random Llama in bf16, in shards."""
    from transformers import LlamaConfig

    folder.mkdir()
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=VOCABULARY,
        tie_word_embeddings=False,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(seed)
    shapes = shapes_of(layers)
    weight_map = {}
    for shard in range(SHARDS):
        file = f"model-{shard + 1:05}-of-{SHARDS:05}.safetensors"
        tensors = {}
        for name in list(shapes)[shard::SHARDS]:
            weight = 0.02 * torch.randn(shapes[name], generator=generator)
            tensors[name] = weight.to(torch.bfloat16)
            weight_map[name] = file
        save_file(tensors, folder / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def ours(sft: Path, aligned: Path, out: Path, alphas) -> dict:
    """Write all α in one run of our command; return its seconds and peak."""
    command = [sys.executable, "-m", "beyond_dpo.jobs.command", "extrapolate"]
    command += [sft, aligned, out]
    for alpha in alphas:
        command += ["--alpha", alpha]
    measured = run(command)
    shutil.rmtree(out)
    return measured


def copy(aligned: Path, out: Path, times: int) -> dict:
    """Copy a checkpoint as often with cp; return the seconds and the peak."""
    steps = [f"mkdir {out}"]
    steps += [f"cp -r {aligned} {out}/{i}" for i in range(times)]
    measured = run(["sh", "-c", " && ".join(steps)])
    shutil.rmtree(out)
    return measured


def merge(command, sft: Path, aligned: Path, out: Path, alphas) -> dict:
    """Run mergekit once per α; return the seconds of all and the largest peak."""
    seconds = 0.0
    peak = 0.0
    for alpha in alphas:
        recipe = {
            "merge_method": "linear",
            "models": [
                {"model": str(aligned), "parameters": {"weight": 1 + alpha}},
                {"model": str(sft), "parameters": {"weight": -alpha}},
            ],
            "parameters": {"normalize": False},
            "dtype": "bfloat16",
        }
        file = out.with_name("recipe.yml")
        file.write_text(json.dumps(recipe))  # JSON is YAML
        measured = run([command, file, out, "--no-copy-tokenizer"])
        seconds += measured["seconds"]
        peak = max(peak, measured["peak_gib"])
        shutil.rmtree(out)
    return {"seconds": seconds, "peak_gib": peak}


def measure_round(command, sft: Path, aligned: Path, out: Path) -> dict[str, float]:
    """Measure ours, cp and mergekit in turn, for one α and for four."""
    measured = {}
    for k in (1, 4):
        measured[f"ours_{k}"] = ours(sft, aligned, out, ALPHAS[:k])
        measured[f"cp_{k}"] = copy(aligned, out, k)
        measured[f"mergekit_{k}"] = merge(command, sft, aligned, out, ALPHAS[:k])
    row = {f"{name}_s": result["seconds"] for name, result in measured.items()}
    for name, result in measured.items():
        row[f"{name}_gib"] = result["peak_gib"]
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--mergekit", default=Path(sys.executable).with_name("mergekit-yaml"), help="its command"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=19, help="19: one billion parameters")
    parser.add_argument(
        "--freeze", action="store_true", help="write data/frozen/benchmarks/extrapolate.json"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        sft = Path(work, "sft")
        aligned = Path(work, "aligned")
        out = Path(work, "out")
        write_checkpoint(sft, 0, options.layers)
        write_checkpoint(aligned, 1, options.layers)
        size = sum(file.stat().st_size for file in aligned.iterdir())
        rounds = []
        for _ in range(options.rounds):
            rounds.append(measure_round(options.mergekit, sft, aligned, out))
    settings = {"bytes": size, "shards": SHARDS, "dtype": "bfloat16", "alphas": ALPHAS}
    report("extrapolate", settings, rounds, options.freeze)


if __name__ == "__main__":
    main()
