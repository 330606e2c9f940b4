"""Extrapolating a checkpoint: ours, mergekit and a plain copy of the same bytes, in turn.

A random bf16 checkpoint of about 1B parameters in four shards, K = 1 and K = 4 values of α:

    python benchmarks/extrapolate.py        # pip install .[bench]

mergekit writes one α per run (method `linear`, weights 1 + α and −α), ours and `cp` all K in one.
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


def checkpoint(folder: Path, seed: int, layers: int) -> Path:
    """Write a random Llama of hidden size 2048, 45M parameters a layer, in four shards."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=32000,
        tie_word_embeddings=False,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)
    hidden, inner, small = 2048, 5632, 512
    shapes = {n: (32000, hidden) for n in ("model.embed_tokens.weight", "lm_head.weight")}
    shapes["model.norm.weight"] = (hidden,)
    for i in range(layers):
        at = f"model.layers.{i}."
        shapes |= {
            at + "self_attn.q_proj.weight": (hidden, hidden),
            at + "self_attn.k_proj.weight": (small, hidden),
        }
        shapes |= {
            at + "self_attn.v_proj.weight": (small, hidden),
            at + "self_attn.o_proj.weight": (hidden, hidden),
        }
        shapes |= {at + f"mlp.{n}_proj.weight": (inner, hidden) for n in ("gate", "up")}
        shapes |= {at + "mlp.down_proj.weight": (hidden, inner)}
        shapes |= {at + f"{n}_layernorm.weight": (hidden,) for n in ("input", "post_attention")}
    generator, names, index = torch.Generator().manual_seed(seed), list(shapes), {}
    for shard in range(4):
        part, file = names[shard::4], f"model-{shard + 1:05}-of-00004.safetensors"
        tensors = {n: 0.02 * torch.randn(shapes[n], generator=generator) for n in part}
        save_file(
            {n: t.to(torch.bfloat16) for n, t in tensors.items()}, folder / file, {"format": "pt"}
        )
        index |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": index})
    )
    return folder


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
    rounds = []
    with tempfile.TemporaryDirectory() as work:
        for name, seed in (("sft", 0), ("aligned", 1)):
            Path(work, name).mkdir()
            checkpoint(Path(work, name), seed, options.layers)
        sft, aligned, out = Path(work, "sft"), Path(work, "aligned"), Path(work, "out")
        size = sum(f.stat().st_size for f in aligned.iterdir())
        for _ in range(options.rounds):
            found = {}
            for k in (1, 4):
                command = [sys.executable, "-m", "beyond_dpo.extrapolate", sft, aligned, out]
                found[f"ours_{k}"] = run(
                    [*command, *(x for a in ALPHAS[:k] for x in ("--alpha", a))]
                )
                shutil.rmtree(out)
                copies = [f"cp -r {aligned} {out}/{i}" for i in range(k)]
                found[f"cp_{k}"] = run(["sh", "-c", " && ".join([f"mkdir {out}", *copies])])
                shutil.rmtree(out)
                found[f"mergekit_{k}"] = merge(options.mergekit, sft, aligned, out, ALPHAS[:k])
            row = {f"{n}_s": f["seconds"] for n, f in found.items()}
            row |= {f"{n}_gib": f["peak_gib"] for n, f in found.items()}
            rounds.append(row)
    report(
        "extrapolate",
        {"bytes": size, "shards": 4, "dtype": "bfloat16", "alphas": ALPHAS},
        rounds,
        options.freeze,
    )


def merge(command, sft: Path, aligned: Path, out: Path, alphas) -> dict:
    """Run mergekit once per α; return the seconds of all and the largest peak."""
    total = {"seconds": 0.0, "peak_gib": 0.0}
    for alpha in alphas:
        models = [{"model": str(aligned), "parameters": {"weight": 1 + alpha}}]
        models += [{"model": str(sft), "parameters": {"weight": -alpha}}]
        recipe = {
            "merge_method": "linear",
            "models": models,
            "parameters": {"normalize": False},
            "dtype": "bfloat16",
        }
        file = out.with_name("recipe.yml")
        file.write_text(json.dumps(recipe))  # JSON is YAML
        once = run([command, file, out, "--no-copy-tokenizer"])
        total = {
            "seconds": total["seconds"] + once["seconds"],
            "peak_gib": max(total["peak_gib"], once["peak_gib"]),
        }
        shutil.rmtree(out)
    return total


if __name__ == "__main__":
    main()
