"""One training loop on a DeepSpeed engine: `python -m beyond_dpo.train CONFIG.json`, under any launcher.

Reads RANK, WORLD_SIZE, LOCAL_RANK and MASTER_*, so `deepspeed`, `torchrun`, `srun` and plain python start it alike.
The job file holds config.Train's fields and: model, rows, names, reference (or null), limits, seed, out.
Supervised fine-tuning is the loss "sft" on rows with one response.
"""

import copy
import functools
import json
import logging
import math
import os
import shutil
import sys
import time
import warnings
from pathlib import Path

import torch

from beyond_dpo import cluster, data, dispersion, launch, lora, losses, paths, reference
from beyond_dpo import config as configuration

log = logging.getLogger("beyond_dpo.train")
OPTIMIZERS = {"adamw": functools.partial(torch.optim.AdamW, fused=True), "adagrad": torch.optim.Adagrad}
OPTIMIZERS["rmsprop"] = torch.optim.RMSprop


class NonFiniteLoss(RuntimeError):
    """The loss of a row, a gradient or a weight is not finite; the message holds the row ids or the weight's name."""


def schedule(step: int, total: int, warmup: float) -> float:
    """Return the learning-rate factor in (0, 1] of a 0-based optimizer step: linear warm-up, then cosine towards 0.

    The first step already has a positive rate: the smallest runs here have three steps.
    """
    warm = round(warmup * total)
    if step < warm:
        return (step + 1) / (warm + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / (total - warm)))


def fusion(settings: configuration.Train, step: int, total: int) -> float:
    """Return WRPO's α of a 0-based optimizer step: 0 at the first, then linearly towards settings.alpha, or constant.

    arXiv 2412.03187: α(t) = α_max t / T, with t the optimizer steps that are done. One step alone is DPO.
    """
    return settings.alpha * step / total if settings.dynamic else settings.alpha


def row_losses(
    settings: configuration.Train, scores: dict, base: torch.Tensor | None, names: list[str],
    weight: torch.Tensor | None = None, alpha: float = 0.0,
):  # fmt: skip
    """Return (losses, chosen_reward, rejected_reward), each (rows,), of name-major `scores` of len(names) × rows, and
    the reward of each response, (len(names), rows): β times the log-ratio, or for SimPO the mean log-probability.

    base: the reference's summed log-probabilities (len(names), rows), for losses that compare with it. weight: (rows,)
    dispersion.weights, for MallowsPO. alpha: of WRPO. Raises ValueError for a loss that does not fit the responses'
    names, or lacks its reference.
    """
    logps, loss = scores["logps"].view(len(names), -1), settings.loss
    if loss == "sft":
        return -logps.sum(0), torch.zeros_like(logps[0]), torch.zeros_like(logps[0]), torch.zeros_like(logps)
    fuses = loss.startswith(("wrpo", "hybrid"))
    pair = len(names) == 2 and names[0].endswith("chosen") and names[1] == "rejected"
    if (tuple(names) != configuration.FUSED) if fuses else not pair:
        wanted = configuration.FUSED if fuses else "a chosen and the rejected one"
        raise ValueError(f"loss {loss!r} takes the responses {wanted}, in this order, got {names}")
    if base is None and not loss.endswith("simpo") or weight is None and loss.startswith("mallows"):
        raise ValueError(f"loss {loss!r} needs a reference file")
    given = {"tau" if loss.endswith("ipo") else "beta": settings.beta}
    given |= {"alpha": alpha} if loss.startswith("wrpo") else {}
    takes = {"dpo": "label_smoothing", "mallows_phi": "epsilon"}.get(loss, "gamma" if loss.endswith("simpo") else "")
    given |= {takes: getattr(settings, takes)} if takes else {}
    inputs = logps / scores["tokens"].view(len(names), -1) if loss.endswith("simpo") else logps - base
    if loss == "mallows_phi":
        weight = torch.exp(-weight)  # dispersion.to_phi
    weights = [weight] if loss.startswith("mallows") else []
    return *getattr(losses, loss)(*inputs, *weights, **given), settings.beta * inputs.detach()


def engine_config(settings: configuration.Train, accumulation: int) -> dict:
    """Return DeepSpeed's configuration: no "auto", every number explicit. Weights are float32 in every stage."""
    if settings.offload and not settings.zero:
        raise configuration.ConfigError("offload=True needs zero 1, 2 or 3; stage 0 keeps the optimizer on the device")
    zero = {"stage": settings.zero, "overlap_comm": False}
    if settings.offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    return {
        "train_batch_size": settings.global_batch,
        "train_micro_batch_size_per_gpu": settings.micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": settings.max_grad_norm,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }


def main(path: str) -> None:
    """Run one job; an interrupted one goes on from its last checkpoint to the same result."""
    logging.basicConfig(level=logging.INFO)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # DeepSpeed's, at each step
    if "RANK" not in os.environ:  # started by plain python, or srun
        os.environ |= cluster.rank(torch.cuda.device_count())
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    os.environ.setdefault("LOCAL_RANK", str(rank % max(1, torch.cuda.device_count())))
    job = json.loads(Path(path).read_text())
    settings = configuration.Train(**{**job["settings"], "processes": world})
    accumulation = configuration.check_batch(settings)
    engine_settings = engine_config(settings, accumulation)
    save_dtype = getattr(torch, settings.save_dtype)
    out, names = Path(job["out"]), job["names"]
    rows, dropped = data.prepare(data.read_rows(job["rows"]), names, **job["limits"])
    if not rows:
        raise ValueError(f"{job['rows']}: no row is left to train on ({dropped} dropped, without prompt or response)")
    total = max(1, round(len(rows) * settings.epochs / settings.global_batch))
    ends = {round(total * part / settings.parts): f"part{part}" for part in range(1, settings.parts)}
    if len({0, total, *ends}) != settings.parts + 1:
        raise configuration.ConfigError(f"{total} steps cannot be cut into {settings.parts} parts")
    base, dispersed, everyone = None, None, [r["id"] for r in rows]
    if job["reference"]:
        held = reference.load(job["reference"], rows, names)
        base = dict(zip(everyone, held["logps"], strict=True))
        if settings.loss.startswith("mallows"):
            found, _ = dispersion.weights(*held["entropies"].T, everyone)
            dispersed = dict(zip(everyone, found, strict=True))

    cuda = torch.cuda.is_available()
    if not cuda:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read when deepspeed is imported
    os.environ.pop("LOCAL_SIZE", None)  # by it DeepSpeed on a CPU leaves 66 MiB in /dev/shm, for inference only
    import deepspeed
    from deepspeed import comm as dist
    from transformers import AutoModelForCausalLM

    deepspeed.init_distributed(dist_backend="nccl" if cuda else "gloo")
    device = f"cuda:{os.environ['LOCAL_RANK']}" if cuda else "cpu"
    tokenizer = data.load_tokenizer(job["model"])
    torch.manual_seed(job["seed"])
    how = {"attn_implementation": reference.attention(settings.precision, settings.attention)}
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32, use_safetensors=True, **how)
    if settings.lora_rank:
        lora.inject(model, settings.lora_rank, settings.lora_alpha)
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    scorer = reference.ResponseScorer(model.train(), settings.precision)
    weights = [w for w in scorer.parameters() if w.requires_grad]
    engine, *_ = deepspeed.initialize(
        model=scorer,
        optimizer=OPTIMIZERS[settings.optimizer](weights, lr=settings.lr, weight_decay=settings.weight_decay),
        config=engine_settings,
    )
    engine.enable_backward_allreduce = settings.zero > 0 or world > 1  # alone, stage 0 would only copy its gradients
    checkpoints, log_file, whole = out / "checkpoints", out / "log.jsonl", not settings.lora_rank
    saved = checkpoints / f"zero{settings.zero}-of{world}"
    first = engine.load_checkpoint(saved, load_module_strict=whole)[1]["step"] if (saved / "latest").exists() else 0
    if rank == 0:
        checkpoints.mkdir(parents=True, exist_ok=True)
        for other in checkpoints.glob("zero*"):  # of an attempt with other processes: its steps leave the log
            if not first or other != saved:
                shutil.rmtree(other)
        kept = log_file.read_text().splitlines()[:first] if log_file.exists() else []
        log_file.write_text("".join(line + "\n" for line in kept))  # not what came after the checkpoint
        (out / "facts.json").write_text(json.dumps({"rows": len(rows), "dropped": dropped, "steps": total}))
        log.info("%d rows (%d dropped: no prompt or no response), steps %d to %d", len(rows), dropped, first, total)

    for step in range(first, total):
        began = time.time()
        batch = _step_rows(rows, names, step, settings.global_batch, job["seed"])
        torch.manual_seed((job["seed"] << 32) + step * world + rank)  # for dropout: a resumed run draws the same
        weight = 1 / settings.global_batch
        if settings.loss == "sft":  # mean over the tokens of the whole step, however it is split
            weight = 1 / sum(len(r["responses"][n]) for r in batch for n in names)
        alpha = fusion(settings, step, total)
        sums = torch.zeros(4 + 3 * len(names), device=device)
        for micro in range(accumulation):
            start = (micro * world + rank) * settings.micro_batch
            part = batch[start : start + settings.micro_batch]
            tensors = data.pack(part, names, tokenizer.pad_token_id, scorer.shared)
            ids = tensors.pop("ids")
            scores = engine(**{k: v.to(device) for k, v in tensors.items()})
            against = torch.stack([base[i] for i in ids], 1).to(device) if base else None
            weight_of = torch.tensor([dispersed[i] for i in ids], device=device) if dispersed else None
            row_loss, chosen, rejected, inner = row_losses(settings, scores, against, names, weight_of, alpha)
            if not row_loss.isfinite().all():
                bad = [i for i, finite in zip(ids, row_loss.isfinite().tolist(), strict=True) if not finite]
                raise NonFiniteLoss(f"step {step}: the loss of rows {_culprits(model, part, names, bad)} is not finite")
            # the engine averages over accumulation and processes; the weight already is of the whole step
            engine.backward(row_loss.sum() * weight * accumulation * world)
            if micro == accumulation - 1:
                for group in engine.optimizer.param_groups:
                    group["lr"] = settings.lr * schedule(step, total, settings.warmup)
                if not settings.zero:  # which alone does not keep its norm
                    norm = torch.nn.utils.get_total_norm([w.grad for w in weights if w.grad is not None])
            engine.step()
            with torch.no_grad():
                rewards = chosen.sum(), rejected.sum(), (chosen > rejected).float().sum()
                of_each = inner, inner > inner[-1], scores["logps"].view(len(names), -1)
                of_each = [values.float().sum(1) for values in of_each]
                sums += torch.cat([torch.stack([row_loss.sum() * weight, *rewards]), *of_each])
        dist.all_reduce(sums)
        norm = float(engine.get_global_grad_norm() if settings.zero else norm)
        if not 0 <= norm < math.inf:  # the sharded stages report -1 for NaN
            raise NonFiniteLoss(f"step {step}: the gradient of rows {[r['id'] for r in batch]} is not finite")
        if rank == 0:
            rate = engine.optimizer.param_groups[0]["lr"]
            entry = {"step": step, "lr": rate, "grad_norm": norm}
            entry |= {"alpha": alpha} if settings.loss.startswith("wrpo") else {}
            entry |= _measured(sums.tolist(), batch, names, settings.loss, time.time() - began)
            with open(log_file, "a") as f:
                f.write(json.dumps(entry) + "\n")
            launch.progress(step + 1, total)
        if step + 1 in ends:
            _save(model, tokenizer, out / ends[step + 1], save_dtype, rank)
        if (step + 1) % settings.checkpoint_every == 0 and step + 1 < total:
            tag = f"step{step + 1}"
            engine.save_checkpoint(saved, tag, {"step": step + 1}, False, exclude_frozen_parameters=not whole)
            if rank == 0:  # `latest` at once: DeepSpeed's own writing would leave an empty one to a kill in the middle
                paths.write(saved / "latest", tag)
                for old in {*saved.glob("step*")} - {saved / tag}:  # of no more use
                    shutil.rmtree(old)
    _save(model, tokenizer, out, save_dtype, rank)
    if rank == 0:
        paths.write(checkpoints / "finished", "")
    dist.barrier()


@torch.no_grad()
def _culprits(model, rows: list[dict], names: list[str], bad: list[str]) -> list[str]:
    """Return which of the `bad` rows are so alone: packed, a row spoils those that share its line."""
    if hasattr(next(model.parameters()), "ds_id"):  # ZeRO-3: one process alone cannot gather the weights
        return bad
    device, found = next(model.parameters()).device, []
    for row in (row for row in rows if row["id"] in bad):
        texts = [torch.tensor([row["prompt_ids"] + row["responses"][n]], device=device) for n in names]
        found += [] if all(model(ids[None]).logits.isfinite().all() for ids in texts) else [row["id"]]
    return found or bad


_order = functools.lru_cache(2)(data.order)


def _step_rows(rows: list[dict], names: list[str], step: int, size: int, seed: int) -> list[dict]:
    """Return the rows of one optimizer step: the epochs' permutations end to end, so that no batch is cut short.

    Sorted by length: a step's gradient does not depend on the order, and micro-batches then carry little padding.
    """
    picked = []
    for position in range(step * size, (step + 1) * size):
        epoch, place = divmod(position, len(rows))
        picked.append(rows[_order(len(rows), seed, epoch)[place]])
    return sorted(picked, key=lambda r: (data.length(r, names), r["id"]))


def _measured(sums: list, batch: list, names: list, loss: str, seconds: float) -> dict:
    """Return what the log says of one step: its loss and speed, and of preferences the mean over its rows."""
    tokens = sum(data.length(r, names) for r in batch)
    entry = {"loss": sums[0], "tokens_per_s": tokens / seconds, "rows_per_s": len(batch) / seconds}
    if loss == "sft":
        return entry
    means = [x / len(batch) for x in sums[1:]]
    inner, correct, logps = (means[i : i + len(names)] for i in range(3, len(means), len(names)))
    for i, name in enumerate(names):
        entry |= {f"{name}_reward": inner[i], f"{name}_accuracy": correct[i], f"{name}_logps": logps[i]}
    chosen, rejected, accuracy = means[:3]  # as the loss takes them: WRPO's chosen reward is the weighted one
    del entry["rejected_accuracy"]
    return entry | {"chosen_reward": chosen, "margin": chosen - rejected, "accuracy": accuracy}


def _save(model, tokenizer, out: Path, dtype: torch.dtype, rank: int) -> None:
    """Write the model as safetensors, gathering ZeRO-3's shards one parameter at a time."""
    import deepspeed

    weights, adapter = {}, hasattr(model, "peft_config")
    for name, parameter in ((name, one) for name, one in model.named_parameters() if one.requires_grad or not adapter):
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            if rank == 0:
                weights[name] = parameter.detach().to("cpu", dtype, copy=True)
                if not weights[name].isfinite().all():
                    raise NonFiniteLoss(f"the trained weight {name} is not finite in {dtype}")
    if rank == 0 and adapter:
        lora.save(model, weights, out)
    elif rank == 0:
        model.save_pretrained(out, state_dict=weights)
        config = copy.deepcopy(model.config)  # save_pretrained wrote the dtype of the model in memory
        config.dtype = dtype
        config.save_pretrained(out)
    if rank == 0:
        tokenizer.save_pretrained(out)


if __name__ == "__main__":
    launch.follow_parent()
    main(sys.argv[1])
    torch.distributed.destroy_process_group()
