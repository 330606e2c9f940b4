"""An 8B checkpoint extrapolated from disk to disk, against a plain copy of it.

Random bf16 weights of Llama-3.1-8B's shape are written twice, as SFT and aligned model, in four
shards. Then ours writes one α and two, and `cp` the same bytes. Both are timed until what they
wrote is on the disk. Where the disk is too small or too slow for 32 layers in the time, there are
fewer, and the result says how many.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
from measure import run
from models import LLAMA_8B, TINY, Shape, config_of
from results import Clock, Results, step_arguments

SHARDS = 4
ALPHAS = (0.3, 0.5)
PROBE = 2 * 2**30  # bytes that are written to learn how fast the disk is
BLOCK = 32 * 2**20  # random numbers, which all tensors take their values from
# Models' sizes that the disk takes in all: two inputs, and in each round one and two outputs of
# ours and of cp.
INPUTS = 2
OUTPUTS = 6
LARGEST_ON_DISK = 4  # models' sizes that are on the disk at one time
SPARE = 4 * 2**30  # bytes of the disk that stay free
SHARE = 0.7  # of the step's time that the writing is planned to take


def shapes_of(shape: Shape) -> dict[str, tuple]:
    """Return {name: shape} of the weights of a Llama."""
    hidden = shape.hidden
    queries = shape.heads * shape.head_size
    keys = shape.key_heads * shape.head_size
    layer = {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (shape.inner, hidden),
        "mlp.up_proj": (shape.inner, hidden),
        "mlp.down_proj": (hidden, shape.inner),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    shapes = {"model.embed_tokens.weight": (shape.vocabulary, hidden)}
    for number in range(shape.layers):
        for name, size in layer.items():
            shapes[f"model.layers.{number}.{name}.weight"] = size
    shapes["model.norm.weight"] = (hidden,)
    if not shape.tied:
        shapes["lm_head.weight"] = (shape.vocabulary, hidden)
    return shapes


def elements(size: tuple) -> int:
    """Return the number of a tensor's elements."""
    count = 1
    for length in size:
        count *= length
    return count


def model_bytes(shape: Shape) -> int:
    """Return the bytes of a model's weights in bf16."""
    return 2 * sum(elements(size) for size in shapes_of(shape).values())


def random_block(count: int) -> memoryview:
    """Return random bf16 numbers as bytes."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)
    numbers = torch.randn(count, generator=generator, device=device) * 0.02
    return memoryview(numbers.to(torch.bfloat16).view(torch.uint8).cpu().numpy()).cast("B")


def write_checkpoint(folder: Path, shape: Shape, block: memoryview, seed: int) -> None:
    """Write a random model in shards of nearly one size; another seed gives other weights.

    Each tensor is parts of one block of random numbers, from another place in it on.
    """
    folder.mkdir()
    config = config_of(shape)
    config.dtype = "bfloat16"
    config.save_pretrained(folder)
    shapes = shapes_of(shape)
    names = list(shapes)
    weight_map = {}
    for shard in range(SHARDS):
        file = f"model-{shard + 1:05}-of-{SHARDS:05}.safetensors"
        own = {name: shapes[name] for name in names[shard::SHARDS]}
        write_shard(folder / file, own, block, seed * SHARDS + shard)
        weight_map.update(dict.fromkeys(own, file))
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def write_shard(path: Path, shapes: dict[str, tuple], block: memoryview, seed: int) -> None:
    """Write one safetensors file: the length of its header, the header, the tensors."""
    header = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, size in shapes.items():
        start = end
        end += 2 * elements(size)
        header[name] = {"dtype": "BF16", "shape": list(size), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    # Prime steps, so that no two tensors, and no two models, begin at the same number.
    place = 2 * (seed * 7_919) % len(block)
    with open(path, "wb") as opened:
        opened.write(len(text).to_bytes(8, "little"))
        opened.write(text)
        for size in shapes.values():
            write_from(opened, block, place, 2 * elements(size))
            place = (place + 2 * 1_000_003) % len(block)


def write_from(opened, block: memoryview, place: int, count: int) -> None:
    """Write so many bytes of a block from a place on, beginning anew at its end."""
    while count:
        part = block[place : place + count]
        opened.write(part)
        count -= len(part)
        place = 0


def disk_speed(work: Path, block: memoryview, size: int) -> float:
    """Return the bytes/s at which plain writing reaches the disk."""
    path = work / "probe"
    os.sync()
    began = perf_counter()
    with open(path, "wb") as opened:
        write_from(opened, block, 0, size)
        opened.flush()
        os.fsync(opened.fileno())
    seconds = perf_counter() - began
    path.unlink()
    return size / seconds


def fitting(shape: Shape, free: int, speed: float, seconds: float) -> Shape:
    """Return a shape with as many of its layers as the disk has room and time for."""
    writes = INPUTS + OUTPUTS
    largest = min((free - SPARE) / LARGEST_ON_DISK, SHARE * seconds * speed / writes)
    layers = shape.layers
    while layers > 1 and model_bytes(shape._replace(layers=layers)) > largest:
        layers -= 1
    return shape._replace(layers=layers)


def ours(sft: Path, aligned: Path, out: Path, alphas: tuple) -> dict:
    """Write the α by our command, which ends when they are on the disk."""
    command = [sys.executable, "-m", "beyond_dpo.jobs.command", "extrapolate"]
    command += [sft, aligned, out]
    for alpha in alphas:
        command += ["--alpha", alpha]
    return timed(command, out)


def copied(aligned: Path, out: Path, alphas: tuple) -> dict:
    """Copy a checkpoint as often, by cp and then sync."""
    steps = [f"mkdir {out}"]
    steps += [f"cp -r {aligned} {out}/{alpha}" for alpha in alphas]
    return timed(["sh", "-c", " && ".join([*steps, "sync"])], out)


def timed(command: list, out: Path) -> dict:
    """Return the seconds and the peak memory of a command; what it wrote is deleted."""
    measured = run(command)
    shutil.rmtree(out)
    return {"seconds": measured["seconds"], "peak_gib": measured["peak_gib"]}


def summarise(content: dict) -> list[str]:
    """Return a line for each number of α: medians of ours and cp's seconds, and their ratio."""
    lines = []
    for count in range(1, len(ALPHAS) + 1):
        rows = [row for row in content["measured"] if row.get("alphas") == count]
        if not rows:
            continue
        mine = median(row["ours"]["seconds"] for row in rows)
        cp = median(row["cp"]["seconds"] for row in rows)
        rate = median(row["ours_gb_per_s"] for row in rows)
        lines.append(
            f"extrapolate, {count} α: ours {mine:.1f} s ({rate:.2f} GB/s read and written), "
            f"cp and sync {cp:.1f} s, ours ÷ cp {mine / cp:.2f}"
        )
    return lines


def measure(results: Results, models: dict[str, Path], size: int, alphas: tuple) -> float:
    """Measure ours and cp once for these α; return the seconds of both."""
    count = len(alphas)
    out = models["aligned"].with_name("out")
    mine = ours(models["sft"], models["aligned"], out, alphas)
    cp = copied(models["aligned"], out, alphas)
    row = {
        "alphas": count,
        "ours": mine,
        "cp": cp,
        "ours_gb_per_s": (2 + count) * size / mine["seconds"] / 1e9,
        "cp_gb_per_s": 2 * count * size / cp["seconds"] / 1e9,
    }
    results.add(row)
    return mine["seconds"] + cp["seconds"]


def main() -> None:
    options = step_arguments(__doc__).parse_args()
    clock = Clock(options.seconds)
    block = random_block(2**16 if options.tiny else BLOCK)
    speed = disk_speed(options.work, block, 2**20 if options.tiny else PROBE)
    shape = TINY
    if not options.tiny:
        free = shutil.disk_usage(options.work).free
        shape = fitting(LLAMA_8B, free, speed, clock.left())
    size = model_bytes(shape)
    settings = {
        "shape": shape._asdict(),
        "bytes": size,
        "shards": SHARDS,
        "alphas": ALPHAS,
        "disk_write_gb_per_s": speed / 1e9,
    }
    results = Results(options.out / "extrapolate.json", settings, summarise)
    models = {}
    for seed, name in enumerate(("sft", "aligned")):
        models[name] = options.work / name
        write_checkpoint(models[name], shape, block, seed)
    for number in range(options.rounds):
        for count in range(1, len(ALPHAS) + 1):
            needed = longest_of(results, count)
            if needed > clock.left():
                results.note(f"no time for round {number + 1} of {count} α")
                continue
            measure(results, models, size, ALPHAS[:count])


def longest_of(results: Results, count: int) -> float:
    """Return the longest that these numbers of α have taken so far, 0 before the first."""
    seconds = [0.0]
    for row in results.content["measured"]:
        if row["alphas"] == count:
            seconds.append(row["ours"]["seconds"] + row["cp"]["seconds"])
    return max(seconds)


if __name__ == "__main__":
    main()
