"""What a run will need, in numbers, before anything starts: memory of a device and of the host, disk, hours.

From the configuration, the models' own config.json and this machine's speed, which is measured once
(`python -m beyond_dpo.estimate`). Factors were fitted to measured runs of a 135M model on two cores, to which
tests/test_estimate.py holds them; for a GPU they are what the same formulas say, not yet measured there.
"""

import argparse
import functools
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from beyond_dpo import artifacts, assets, cluster, config, paths, workers

GIB = 2**30
PROCESS = {"train": 0.4, "generate": 2.1}  # GiB that a process takes besides its model
ACTIVATION = (35.0, 10.0)  # bytes a token keeps for the backward pass, for each unit of hidden and intermediate
LOGIT = 25.0  # bytes of one logit: in float32 and half, its log-probability, and their gradients
BUCKETS, BUCKET, LIVE = 2.5, 5e8, 1e9  # DeepSpeed's buffers for gradients, and weights that ZeRO-3 keeps together
STATE = {"adamw": 8, "adagrad": 4, "rmsprop": 4}  # bytes of the optimizer's state, for each trained weight
START = {"train": 7.5, "generate": 13.0, "score": 6.0}  # seconds before a process computes
# the share of the matrix products' speed that the work reaches; float32 takes so many times longer
USE, SLOW = {"train": 0.37, "generate": 0.35, "score": 0.4}, 2.2


@dataclass(frozen=True)
class Shape:
    """Sizes of a causal language model.

    weights: of all of it; body: of what each token is multiplied with, without the head; linear: inputs and outputs of
    its linear layers together. cache: bytes of a token's keys and values in bfloat16.
    """

    weights: int
    body: int
    layers: int
    hidden: int
    intermediate: int
    vocabulary: int
    cache: int
    linear: int


def shape(architecture: dict) -> Shape:
    """Return the sizes of the model that a config.json describes, counted on a model that takes no memory."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    given = AutoConfig.for_model(**architecture)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(given)
    text, head, words = given.get_text_config(), model.get_output_embeddings().weight, model.get_input_embeddings()
    weights = sum(p.numel() for p in model.parameters())
    layers = [layer for layer in model.modules() if isinstance(layer, torch.nn.Linear) and layer.weight is not head]
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return Shape(
        weights=weights, body=weights - head.numel() - (head is not words.weight) * words.weight.numel(),
        layers=text.num_hidden_layers, hidden=text.hidden_size, vocabulary=len(head),
        intermediate=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        cache=4 * text.num_hidden_layers * heads * width,
        linear=sum(sum(layer.weight.shape) for layer in layers),
    )  # fmt: skip


def training(model: Shape, settings: config.Train, prompt: float, said: float, names: int) -> dict[str, float]:
    """Return the GiB of a training: {"device": of each process's device, "host": of all processes besides}.

    prompt, said: tokens of a prompt and of one of its `names` responses. On a CPU the device is the host's memory:
    processes × device + host. Weights, gradients and the optimizer's state are float32, which ZeRO 1, 2 and 3 spread
    over the processes, with buffers of its own and, at stage 3, a copy on the host from which the weights came; bf16
    keeps a copy of the weights besides; activations go with the tokens of a forward pass, all but their layers' inputs
    computed again with gradient checkpointing; logits exist for 2,048 tokens at one time.
    """
    state, gradients, kept = (settings.processes if settings.zero >= stage else 1 for stage in (1, 2, 3))
    trained = adapter(model, settings.lora_rank) if settings.lora_rank else model.weights
    optimizer = trained * (STATE[settings.optimizer] + 4 * (settings.zero > 0)) / state
    half, rows = settings.precision == "bf16", settings.micro_batch
    layer = ACTIVATION[0] * model.hidden + ACTIVATION[1] * model.intermediate
    layers = 4 * model.layers * model.hidden + layer if settings.gradient_checkpointing else model.layers * layer
    device = 4 * model.weights / kept + 4 * trained / gradients + 2 * model.weights * half
    device += rows * (prompt + names * said) * layers + min(rows * names * said, 2048) * model.vocabulary * LOGIT
    device += 4 * BUCKETS * min(model.weights, BUCKET) * (settings.zero > 0)
    device += 4 * min(model.weights, LIVE) * (settings.zero == 3)
    copy = 4 * model.weights * (settings.zero == 3)
    host = settings.processes * (PROCESS["train"] + (optimizer * settings.offload + copy) / GIB)
    return {"device": (device + optimizer * (not settings.offload)) / GIB, "host": host}


def adapter(model: Shape, rank: int) -> int:
    """Return the weights of a LoRA adapter of this rank: A and B of every linear layer but the head."""
    return rank * model.linear


def seconds(model: Shape, work: dict, speed: dict) -> float:
    """Return about how long a job computes: its multiplications by the speed that this kind of work reaches.

    Sampling is also bound by reading all weights once a token of 256 requests. speed: as `speed()` returns it.
    """
    prompt, said = work["tokens"]
    head, (kind, operations) = model.hidden * model.vocabulary, ("score", 2)
    if settings := work.get("train"):
        kind, count = "train", work["rows"] * settings.epochs
        operations = (4 if settings.lora_rank else 6) * (4 / 3 if settings.gradient_checkpointing else 1)
        products = count * ((prompt + work["names"] * said) * model.body + work["names"] * said * head)
        products *= SLOW if settings.precision == "fp32" else 1
        at_once = settings.processes if speed["gpus"] else 1
    else:
        products = work["requests"] * ((prompt + said) * model.body + said * head)
        at_once = work["decoding"].engines if "decoding" in work and speed["gpus"] else 1
    reads = 0.0
    if "decoding" in work:
        kind, reads = "generate", -(-work["requests"] // 256) * said * 2 * model.weights / speed["bytes"]
    return START[kind] + max(operations * products / (USE[kind] * speed["products"]), reads) / at_once


def memory(model: Shape, work: dict, gpus: bool) -> dict[str, float]:
    """Return the GiB of a job: {"device": memory that a card must have, "host": of one node}; a CPU has no device.

    An engine gets only its share of a card, and what scores beside it the rest.
    """
    if settings := work.get("train"):
        need = training(model, settings, *work["tokens"], work["names"])
        nodes = cluster.nodes(settings.launcher)
        here, device = settings.processes / nodes, need["device"]
        host = need["host"] / nodes + gpus * 4 * here * model.weights * (settings.zero < 3) / GIB  # on their way there
    else:
        how, here, host = work.get("decoding"), 1, PROCESS["generate"]
        share = how.gpu_share if how else 1 - config.Decoding.gpu_share
        device = model.weights * (4 if how and how.dtype == "float32" or not how and not gpus else 2)
        device = (device / how.tensor_parallel + 8 * how.max_model_len * model.cache if how else device) / GIB
        device /= share if gpus else 1
    return {"device": device, "host": host} if gpus else {"device": 0.0, "host": host + here * device}


def of(made: list[artifacts.Artifact]) -> dict:
    """Return what is still to be made for these artifacts, and about what it takes, with responses as long as allowed.

    trainings, samplings: their number. disk: GiB, with the optimizer's state of the largest training. hours: at this
    machine's speed. device, host: GiB of the largest job, see memory(). unknown: models whose config.json is not on
    this machine, which count nothing. Nor does what an experiment only decides on its way, or word models.
    """
    jobs = {key: one for artifact in made for key, one in artifact.missing().items()}
    work = [one.work for one in jobs.values() if "model" in one.work]
    sizes, speed = measured([one["model"] for one in work])
    found = {"trainings": sum("train" in w for w in work), "samplings": sum("decoding" in w for w in work)}
    found |= {"unknown": sorted({w["model"] for w in work} - sizes.keys()), "state": 0.0}
    found |= dict.fromkeys(("disk", "hours", "device", "host"), 0.0)
    for w in [w for w in work if w["model"] in sizes]:
        model = sizes[w["model"]]
        if "tokens" not in w:  # a copy of its files
            found["disk"] += 2 * model.weights / GIB
            continue
        found["hours"] += seconds(model, w, speed) / 3600
        need = memory(model, w, bool(speed["gpus"]))
        found |= {place: max(found[place], need[place]) for place in need}
        if settings := w.get("train"):
            kept = adapter(model, settings.lora_rank) if settings.lora_rank else model.weights
            found["disk"] += kept * settings.parts * (4 if settings.save_dtype == "float32" else 2) / GIB
            several = w["rows"] * settings.epochs / settings.global_batch > settings.checkpoint_every
            found["state"] = max(found["state"], 2 * 16 * kept * several / GIB)  # one is written beside another
        elif "decoding" in w:
            found["disk"] += 8 * w["requests"] * w["tokens"][1] / GIB  # a token is a number and a comma
    return found | {"disk": found["disk"] + found.pop("state")}


def told(found: dict) -> tuple[str, str]:
    """Return what of() found in words, and why it does not fit on this machine, "" if it does."""
    free, gpus, gib = _disk().free / GIB, cards(), workers.memory_gib()
    card = min(gpus, default=0.0)
    text = f"{found['trainings']} trainings, {found['samplings']} samplings, about {found['hours']:.2g} h, "
    text += f"{found['disk']:.1f} GiB of disk ({free:.0f} free), largest job "
    text += f"{found['device']:.1f} GiB of a card ({card:.0f}), " * bool(gpus)
    text += f"{found['host']:.1f} GiB of memory ({gib:.0f})"
    text += f"; without {', '.join(found['unknown'])}, not yet on this machine" if found["unknown"] else ""
    limits = {"disk": (found["disk"], free), "memory": (found["host"], gib)}
    limits |= {"a card": (found["device"], card)} if gpus else {}
    why = [f"about {a:.1f} GiB of {what} (found {b:.1f})" for what, (a, b) in limits.items() if a > b]
    help_ = ": set train.micro_batch, zero, offload, gradient_checkpointing or lora_rank, or decoding.tensor_parallel"
    return text, " and ".join(why) + (help_ if why and found["disk"] <= free else "")


def check(cfg, *made: artifacts.Artifact) -> None:
    """Raise ConfigError, with what is missing in numbers and what to do, if this machine cannot make the artifacts."""
    needs, gib, gpus = cfg.needs, workers.memory_gib(), len(cards()) * cluster.nodes(cfg.train.launcher)
    missing = [f"{needs.gpus} GPUs of {needs.gpu_gb} GB (found {gpus})"] if gpus < needs.gpus else []
    if (free := room()) < needs.disk_gb:
        missing += [f"{needs.disk_gb} GB of disk for {paths.ARTIFACTS} (free or held by results: {free:.0f})"]
    missing += [f"{needs.memory_gb} GB of memory (found {gib:.0f})"] if gib < 0.9 * needs.memory_gb else []
    if made and not missing and cfg.profile != "smoke":  # that runs anywhere
        missing += filter(None, [told(of(list(made)))[1]])
    if missing:
        raise config.ConfigError(
            f"profile {cfg.profile} needs {' and '.join(missing)}. What a machine that has them would execute: "
            f"--dry-run. What may run here: --profile {'cpu' if gib > 9 and cfg.profile != 'cpu' else 'smoke'}"
        )


def cards() -> list[float]:
    """Return the memory of each GPU of this machine in GiB."""
    told = artifacts.output("nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits")
    return [float(line) / 1024 for line in told if line.strip().isdigit()]


def room() -> float:
    """Return GB of disk for results: free, or held by those that are finished and need no more."""
    free = _disk().free / 1e9
    for path in paths.ARTIFACTS.glob("*/manifest.json"):
        with suppress(OSError, ValueError, LookupError):  # being made, or damaged: found when it is read
            free += sum(file["bytes"] for file in json.loads(path.read_text())["files"].values()) / 1e9
    return free


def _disk():
    return shutil.disk_usage(next(p for p in (paths.ARTIFACTS, *paths.ARTIFACTS.parents) if p.exists()))


@functools.cache
def architecture(ref: str) -> dict | None:
    """Return a model's config.json, None if it is not on this machine and the hub does not give it."""
    file = Path()
    if ref in assets.BUILDERS:
        file = paths.CACHE / f"{ref}-{artifacts.digest(assets.resolve(ref))[:12]}" / "config.json"
    elif Path(ref).is_dir():
        file = Path(ref, "config.json")
    elif hub := re.fullmatch(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", ref):
        import huggingface_hub

        file = huggingface_hub.try_to_load_from_cache(hub[1], "config.json", revision=hub[2])
        if not isinstance(file, str):
            with suppress(Exception):  # its client has many, and an estimate is no reason to end a run
                file = huggingface_hub.hf_hub_download(hub[1], "config.json", revision=hub[2])
        file = Path(file) if isinstance(file, str) else Path()
    return json.loads(file.read_text()) if file.is_file() else None


def measured(models: list[str]) -> tuple[dict[str, Shape], dict]:
    """Return {model: Shape} of those whose config.json is here, and this machine's speed; both are measured once."""
    file = paths.CACHE / "estimate.json"
    kept = {}
    with suppress(OSError, ValueError):  # not there, or damaged: measured again
        kept |= json.loads(file.read_text())
    wanted = {ref: given for ref in set(models) if (given := architecture(ref))}
    keys = {ref: artifacts.digest([given, [f.name for f in fields(Shape)]]) for ref, given in wanted.items()}
    threads = os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0))
    machine = artifacts.digest([platform.node(), artifacts.environment()["hardware"], str(threads)])
    ask = {keys[ref]: given for ref, given in wanted.items() if keys[ref] not in kept}
    if ask or machine not in kept:  # in a process of its own: this one needs no torch
        command = [sys.executable, "-m", "beyond_dpo.estimate", *["--speed"] * (machine not in kept)]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])}
        done = subprocess.run(command, input=json.dumps(ask), capture_output=True, text=True, env=env, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        kept |= found["shapes"] | ({machine: found["speed"]} if "speed" in found else {})
        paths.write(file, json.dumps(kept))
    return {ref: Shape(**kept[key]) for ref, key in keys.items() if kept[key]}, kept[machine]


def speed() -> dict:
    """Measure matrix products (operations a second, bfloat16) and memory (bytes a second); the median of ten."""
    import torch

    gpus = torch.cuda.device_count()
    device, n = ("cuda", 8192) if gpus else ("cpu", 2048)
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    big = torch.empty(256 << 20, device=device, dtype=torch.uint8)
    rates = {"products": (2 * n**3, lambda: a @ b), "bytes": (2 * big.numel(), lambda: big.clone())}
    found = {"gpus": gpus, "threads": torch.get_num_threads()}
    for name, (amount, run) in rates.items():
        times = []
        for _ in range(12):
            began = time.perf_counter()
            run()
            if gpus:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - began)
        found[name] = amount / sorted(times[2:])[5]
    return found


def main() -> None:
    """Print the Shape of each architecture on standard input, {name: config.json}, null for one of no known kind."""
    parser = argparse.ArgumentParser(prog="python -m beyond_dpo.estimate", description=main.__doc__)
    parser.add_argument("--speed", action="store_true", help="measure this machine as well")
    options = parser.parse_args()
    shapes, given = {}, json.load(sys.stdin)
    for name, architecture in given.items():
        try:
            shapes[name] = asdict(shape(architecture))
        except (ValueError, KeyError, AttributeError, TypeError):  # code of its own, an encoder
            shapes[name] = None
    print(json.dumps({"shapes": shapes} | ({"speed": speed()} if options.speed else {})))


if __name__ == "__main__":
    main()
