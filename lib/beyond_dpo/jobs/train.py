"""One training loop on a DeepSpeed engine: `python -m beyond_dpo.jobs.train CONFIG.json`, under any
launcher.

Reads RANK, WORLD_SIZE, LOCAL_RANK and MASTER_*, so `deepspeed`, `torchrun`, `srun` and plain python
start it alike. The job file holds config.Train's fields and: model, rows, names, reference (or
null), limits, seed, out.
Supervised fine-tuning is the loss "sft" on rows with one response.
"""

import argparse
import copy
import functools
import json
import logging
import math
import os
import re
import shutil
import time
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from beyond_dpo import dispersion, events, lora, losses, precision, scoring, templates
from beyond_dpo.files import share_weights, sync, write_file
from beyond_dpo.jobs import reference
from beyond_dpo.jobs.settings import FUSED, ConfigError, Train, check_batch
from beyond_dpo.machine import cluster, launch
from beyond_dpo.rows import epoch_order, row_length

log = logging.getLogger("beyond_dpo.jobs.train")
OPTIMIZERS = {
    "adamw": functools.partial(torch.optim.AdamW, fused=True),
    "adagrad": torch.optim.Adagrad,
}
OPTIMIZERS["rmsprop"] = torch.optim.RMSprop
SIZES = "sizes.json"  # in a checkpoint: {file: bytes}, written when all of them are on the disk


class NonFiniteLoss(RuntimeError):
    """The loss of a row, a gradient or a weight is not finite; the message holds the row ids or the
    weight's name.
    """


class UnusableCheckpoint(RuntimeError):
    """A checkpoint whose files are whole cannot be loaded; the message says what to delete."""


def schedule(step: int, total: int, warmup: float) -> float:
    """Return the learning-rate factor in (0, 1] of a 0-based optimizer step: linear warm-up, then
    cosine towards 0.

    The first step already has a positive rate: the smallest runs here have three steps.
    """
    warm = round(warmup * total)
    if step < warm:
        return (step + 1) / (warm + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / (total - warm)))


def fusion(settings: Train, step: int, total: int) -> float:
    """Return WRPO's α of a 0-based optimizer step: 0 at the first, then linearly towards
    settings.alpha, or constant.

    arXiv 2412.03187: α(t) = α_max t / T, with t the optimizer steps that are done. One step alone
    is DPO.
    """
    return settings.alpha * step / total if settings.dynamic else settings.alpha


def row_losses(
    settings: Train,
    scores: dict,
    base: torch.Tensor | None,
    names: list[str],
    weight: torch.Tensor | None = None,
    alpha: float = 0.0,
):
    """Return (losses, chosen_reward, rejected_reward), each (rows,), of name-major `scores` of
    len(names) × rows, and the reward of each response, (len(names), rows): β times the log-ratio,
    or for SimPO the mean log-probability.

    base: the reference's summed log-probabilities (len(names), rows), for losses that compare with
    it. weight: (rows,) dispersion.weights, for MallowsPO. alpha: of WRPO. Raises ValueError for a
    loss that does not fit the responses' names, or lacks its reference.
    """
    logps, loss = scores["logps"].view(len(names), -1), settings.loss
    if loss == "sft":
        return (
            -logps.sum(0),
            torch.zeros_like(logps[0]),
            torch.zeros_like(logps[0]),
            torch.zeros_like(logps),
        )
    fuses = loss.startswith(("wrpo", "hybrid"))
    pair = len(names) == 2 and names[0].endswith("chosen") and names[1] == "rejected"
    if (tuple(names) != FUSED) if fuses else not pair:
        wanted = FUSED if fuses else "a chosen and the rejected one"
        raise ValueError(f"loss {loss!r} takes the responses {wanted}, in this order, got {names}")
    if base is None and not loss.endswith("simpo") or weight is None and loss.startswith("mallows"):
        raise ValueError(f"loss {loss!r} needs a reference file")
    given = {"tau" if loss.endswith("ipo") else "beta": settings.beta}
    given |= {"alpha": alpha} if loss.startswith("wrpo") else {}
    takes = {"dpo": "label_smoothing", "mallows_phi": "epsilon"}.get(
        loss, "gamma" if loss.endswith("simpo") else ""
    )
    given |= {takes: getattr(settings, takes)} if takes else {}
    inputs = (
        logps / scores["tokens"].view(len(names), -1) if loss.endswith("simpo") else logps - base
    )
    if loss == "mallows_phi":
        weight = torch.exp(-weight)  # dispersion.to_phi
    weights = [weight] if loss.startswith("mallows") else []
    return *getattr(losses, loss)(*inputs, *weights, **given), settings.beta * inputs.detach()


def engine_config(settings: Train, accumulation: int) -> dict:
    """Return DeepSpeed's configuration: no "auto", every number explicit. Weights are float32 in
    every stage.
    """
    if settings.offload and not settings.zero:
        raise ConfigError(
            "offload=True needs zero 1, 2 or 3; stage 0 keeps the optimizer on the device"
        )
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
    warnings.filterwarnings(
        "ignore", category=FutureWarning, module="torch.distributed"
    )  # DeepSpeed's, at each step
    if "RANK" not in os.environ:  # started by plain python, or srun
        os.environ |= cluster.rank(torch.cuda.device_count())
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    os.environ.setdefault("LOCAL_RANK", str(rank % max(1, torch.cuda.device_count())))
    job = json.loads(Path(path).read_text(encoding="utf-8"))
    settings = Train(**{**job["settings"], "processes": world})
    precision.require_precision(settings.precision)
    accumulation = check_batch(settings)
    engine_settings = engine_config(settings, accumulation)
    save_dtype = getattr(torch, settings.save_dtype)
    out, names = Path(job["out"]), job["names"]
    rows, dropped = reference.cut_rows(job)
    if not rows:
        raise ValueError(
            f"{job['rows']}: no row is left to train on ({dropped} dropped, without prompt or "
            "response)"
        )
    total = max(1, round(len(rows) * settings.epochs / settings.global_batch))
    ends = {
        round(total * part / settings.parts): f"part{part}" for part in range(1, settings.parts)
    }
    if len({0, total, *ends}) != settings.parts + 1:
        raise ConfigError(f"{total} steps cannot be cut into {settings.parts} parts")
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
    os.environ.pop(
        "LOCAL_SIZE", None
    )  # by it DeepSpeed on a CPU leaves 66 MiB in /dev/shm, for inference only
    import deepspeed
    from deepspeed import comm as dist

    deepspeed.init_distributed(dist_backend="nccl" if cuda else "gloo")
    device = f"cuda:{os.environ['LOCAL_RANK']}" if cuda else "cpu"
    tokenizer = templates.load_tokenizer(job["model"])
    torch.manual_seed(job["seed"])
    attention = scoring.attention(settings.precision, settings.attention)
    model = scoring.load_model(job["model"], attention, torch.float32)
    if settings.lora_rank:
        lora.inject(model, settings.lora_rank, settings.lora_alpha)
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    scorer = scoring.ResponseScorer(model.train(), settings.precision)
    weights = [w for w in scorer.parameters() if w.requires_grad]
    engine, *_ = deepspeed.initialize(
        model=scorer,
        optimizer=OPTIMIZERS[settings.optimizer](
            weights, lr=settings.lr, weight_decay=settings.weight_decay
        ),
        config=engine_settings,
    )
    engine.enable_backward_allreduce = (
        settings.zero > 0 or world > 1
    )  # alone, stage 0 would only copy its gradients
    checkpoints, log_file, whole = out / "checkpoints", out / "log.jsonl", not settings.lora_rank
    saved = checkpoints / f"zero{settings.zero}-of{world}"
    found = torch.zeros(1, dtype=torch.long, device=device)
    if rank == 0:
        found += _find_checkpoint(saved, log_file)
    dist.broadcast(found, 0)
    first = int(found)
    if first:
        _load_checkpoint(engine, saved / f"step{first}", strict=whole)
    if rank == 0:
        checkpoints.mkdir(parents=True, exist_ok=True)
        for other in checkpoints.glob(
            "zero*"
        ):  # of an attempt with other processes: its steps leave the log
            if not first or other != saved:
                shutil.rmtree(other)
        for later in saved.glob("step*"):  # whose writing was interrupted: these steps come again
            if _steps(later.name) > first:
                shutil.rmtree(later)
        kept = (
            log_file.read_text(encoding="utf-8").splitlines()[:first] if log_file.exists() else []
        )
        # without what came after the checkpoint
        log_file.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        facts = {"rows": len(rows), "dropped": dropped, "steps": total}
        (out / "facts.json").write_text(json.dumps(facts), encoding="utf-8")
        log.info(
            "%d rows (%d dropped: no prompt or no response), steps %d to %d",
            len(rows),
            dropped,
            first,
            total,
        )

    for step in range(first, total):
        began = time.time()
        batch = _step_rows(rows, names, step, settings.global_batch, job["seed"])
        torch.manual_seed(
            (job["seed"] << 32) + step * world + rank
        )  # for dropout: a resumed run draws the same
        weight = 1 / settings.global_batch
        if settings.loss == "sft":  # mean over the tokens of the whole step, however it is split
            weight = 1 / sum(len(r["responses"][n]) for r in batch for n in names)
        alpha = fusion(settings, step, total)
        sums = torch.zeros(4 + 3 * len(names), device=device)
        for micro in range(accumulation):
            start = (micro * world + rank) * settings.micro_batch
            part = batch[start : start + settings.micro_batch]
            tensors = scoring.pack(part, names, tokenizer.pad_token_id, scorer.shared)
            ids = tensors.pop("ids")
            scores = engine(**{k: v.to(device) for k, v in tensors.items()})
            against = torch.stack([base[i] for i in ids], 1).to(device) if base else None
            weight_of = (
                torch.tensor([dispersed[i] for i in ids], device=device) if dispersed else None
            )
            row_loss, chosen, rejected, inner = row_losses(
                settings, scores, against, names, weight_of, alpha
            )
            if not row_loss.isfinite().all():
                bad = [
                    i
                    for i, finite in zip(ids, row_loss.isfinite().tolist(), strict=True)
                    if not finite
                ]
                raise NonFiniteLoss(
                    f"step {step}: the loss of rows {_culprits(model, part, names, bad)} is not "
                    "finite"
                )
            # the engine averages over accumulation and processes; the weight already is of the
            # whole step
            engine.backward(row_loss.sum() * weight * accumulation * world)
            if micro == accumulation - 1:
                for group in engine.optimizer.param_groups:
                    group["lr"] = settings.lr * schedule(step, total, settings.warmup)
                if not settings.zero:  # which alone does not keep its norm
                    norm = torch.nn.utils.get_total_norm(
                        [w.grad for w in weights if w.grad is not None]
                    )
            engine.step()
            with torch.no_grad():
                rewards = chosen.sum(), rejected.sum(), (chosen > rejected).float().sum()
                of_each = inner, inner > inner[-1], scores["logps"].view(len(names), -1)
                of_each = [values.float().sum(1) for values in of_each]
                sums += torch.cat([torch.stack([row_loss.sum() * weight, *rewards]), *of_each])
        dist.all_reduce(sums)
        norm = float(engine.get_global_grad_norm() if settings.zero else norm)
        if not 0 <= norm < math.inf:  # the sharded stages report -1 for NaN
            raise NonFiniteLoss(
                f"step {step}: the gradient of rows {[r['id'] for r in batch]} is not finite"
            )
        if rank == 0:
            rate = engine.optimizer.param_groups[0]["lr"]
            entry = {"step": step, "lr": rate, "grad_norm": norm}
            entry |= {"alpha": alpha} if settings.loss.startswith("wrpo") else {}
            entry |= _measured(sums.tolist(), batch, names, settings.loss, time.time() - began)
            with open(log_file, "a", encoding="utf-8") as f:
                f.write(json.dumps(entry) + "\n")
            events.progress(step + 1, total)
        if step + 1 in ends:
            _save(model, tokenizer, out / ends[step + 1], save_dtype, rank)
        if (step + 1) % settings.checkpoint_every == 0 and step + 1 < total:
            _save_checkpoint(engine, saved, step + 1, log_file, rank, whole)
    _save(model, tokenizer, out, save_dtype, rank)
    if rank == 0:
        write_file(checkpoints / "finished", "")
    dist.barrier()


def _steps(tag: str) -> int:
    """Return after how many steps the checkpoint of this name was written, 0 for any other name."""
    number = re.fullmatch(r"step(\d+)", tag)
    return int(number[1]) if number else 0


def _save_checkpoint(
    engine, saved: Path, step: int, log_file: Path, rank: int, whole: bool
) -> None:
    """Write the checkpoint after `step` steps; `latest` names it once the files of all processes
    are on the disk.

    whole: with the weights that are not trained.
    """
    from deepspeed import comm as dist

    folder = saved / f"step{step}"
    options = {"save_latest": False, "exclude_frozen_parameters": not whole}
    engine.save_checkpoint(saved, folder.name, {"step": step}, **options)
    for file in folder.iterdir():  # each process brings what it wrote to the disk
        sync(file)
    dist.barrier()
    if rank == 0:
        _name_checkpoint(folder, log_file)


def _name_checkpoint(folder: Path, log_file: Path) -> None:
    """Let `latest` name a checkpoint whose files are on the disk, and delete the ones before it.

    Whenever the power fails, a whole checkpoint is on the disk, and the log of the steps before it.
    """
    sizes = {file.name: file.stat().st_size for file in sorted(folder.iterdir())}
    write_file(folder / SIZES, json.dumps(sizes, indent=1))
    saved = folder.parent
    for written in (log_file, folder, saved, saved.parent, saved.parent.parent):
        sync(written)
    write_file(saved / "latest", folder.name)
    sync(saved)
    for old in saved.glob("step*"):
        if old != folder:
            shutil.rmtree(old)


def _find_checkpoint(saved: Path, log_file: Path) -> int:
    """Return after how many steps the checkpoint to go on from was written, 0 where there is none.

    It is the one that `latest` names, or else the newest of the others. A damaged one, as a power
    cut may leave it, is renamed and stays beside `saved`; the log says so.
    """
    latest = saved / "latest"
    named = latest.read_text(encoding="utf-8", errors="replace").strip() if latest.exists() else ""
    tags = [folder.name for folder in saved.glob("step*") if _steps(folder.name)]
    tags.sort(key=lambda tag: (tag != named, -_steps(tag)))
    lost, chosen = [], ""
    if latest.exists() and named not in tags:
        lost.append(f"{latest} names no checkpoint that is there ({named[:40]!r})")
    for tag in tags:
        folder = saved / tag
        log.info("checking %s", folder)  # reads all of it
        damage = _damage(folder, log_file)
        if not damage:
            chosen = tag
            break
        if tag == named or (folder / SIZES).exists():  # else an attempt ended while it wrote it
            kept = _set_aside(folder).name
            lost.append(f"checkpoint {folder} is damaged ({damage}): kept as {kept}")
    onwards = f"goes on from {chosen}" if chosen else "begins anew"
    for loss in lost:
        log.warning("%s; the training %s", loss, onwards)
    return _steps(chosen)


def _damage(folder: Path, log_file: Path) -> str:
    """Return what a checkpoint lacks, "" if nothing: its files whole, the steps before it
    logged.
    """
    try:
        sizes = json.loads((folder / SIZES).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return f"no readable {SIZES}: {type(error).__name__}"
    for name, size in sizes.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes of {size}"
    with ThreadPoolExecutor(8) as pool:
        readable = list(pool.map(_readable, [folder / name for name in sizes]))
    for name, fine in zip(sizes, readable, strict=True):
        if not fine:
            return f"{name} has other bytes than were written"
    lines = (
        log_file.read_text(encoding="utf-8", errors="replace").splitlines()
        if log_file.exists()
        else []
    )
    steps = _steps(folder.name)
    try:
        logged = [json.loads(line)["step"] for line in lines[:steps]]
    except (ValueError, LookupError, TypeError):
        logged = []
    if logged != list(range(steps)):
        return f"{log_file.name} does not hold its {steps} steps"
    return ""


def _readable(file: Path) -> bool:
    """Return whether a file by torch.save, a zip archive, has the CRC-32 of each of its parts."""
    try:
        with zipfile.ZipFile(file) as archive:
            return archive.testzip() is None
    except Exception:  # zipfile raises errors of many kinds for bytes that are no archive
        return False


def _set_aside(folder: Path) -> Path:
    """Rename a checkpoint so that no later attempt takes it, and return its new place."""
    saved = folder.parent
    place, number = saved.parent / f"damaged-{saved.name}-{folder.name}", 1
    while place.exists():
        number += 1
        place = saved.parent / f"damaged-{saved.name}-{folder.name}-{number}"
    return folder.rename(place)


def _load_checkpoint(engine, folder: Path, strict: bool) -> None:
    """Load a whole checkpoint's weights and optimizer; raise UnusableCheckpoint if that fails."""
    try:
        loaded, _ = engine.load_checkpoint(folder.parent, folder.name, load_module_strict=strict)
        problem = "" if loaded else "DeepSpeed found nothing to load"
    except Exception as error:  # the engine may hold half of it: this process cannot begin anew
        problem = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    if problem:
        raise UnusableCheckpoint(
            f"checkpoint {folder} cannot be loaded ({problem}); if that happens again, delete that "
            "folder, and the training begins without it"
        )


@torch.no_grad()
def _culprits(model, rows: list[dict], names: list[str], bad: list[str]) -> list[str]:
    """Return which of the `bad` rows are so alone: packed, a row spoils those that share its
    line.
    """
    if hasattr(
        next(model.parameters()), "ds_id"
    ):  # ZeRO-3: one process alone cannot gather the weights
        return bad
    device, found = next(model.parameters()).device, []
    for row in (row for row in rows if row["id"] in bad):
        texts = [
            torch.tensor([row["prompt_ids"] + row["responses"][n]], device=device) for n in names
        ]
        found += (
            [] if all(model(ids[None]).logits.isfinite().all() for ids in texts) else [row["id"]]
        )
    return found or bad


_order = functools.lru_cache(2)(epoch_order)


def _step_rows(rows: list[dict], names: list[str], step: int, size: int, seed: int) -> list[dict]:
    """Return the rows of one optimizer step: the epochs' permutations end to end, so that no batch
    is cut short.

    Sorted by length: a step's gradient does not depend on the order, and micro-batches then carry
    little padding.
    """
    picked = []
    for position in range(step * size, (step + 1) * size):
        epoch, place = divmod(position, len(rows))
        picked.append(rows[_order(len(rows), seed, epoch)[place]])
    return sorted(picked, key=lambda r: (row_length(r, names), r["id"]))


def _measured(sums: list, batch: list, names: list, loss: str, seconds: float) -> dict:
    """Return what the log says of one step: its loss and speed, and of preferences the mean over
    its rows.
    """
    tokens = sum(row_length(r, names) for r in batch)
    entry = {"loss": sums[0], "tokens_per_s": tokens / seconds, "rows_per_s": len(batch) / seconds}
    if loss == "sft":
        return entry
    means = [x / len(batch) for x in sums[1:]]
    inner, correct, logps = (means[i : i + len(names)] for i in range(3, len(means), len(names)))
    for i, name in enumerate(names):
        entry |= {
            f"{name}_reward": inner[i],
            f"{name}_accuracy": correct[i],
            f"{name}_logps": logps[i],
        }
    chosen, rejected, accuracy = means[
        :3
    ]  # as the loss takes them: WRPO's chosen reward is the weighted one
    del entry["rejected_accuracy"]
    return entry | {"chosen_reward": chosen, "margin": chosen - rejected, "accuracy": accuracy}


def _save(model, tokenizer, out: Path, dtype: torch.dtype, rank: int) -> None:
    """Write the model as safetensors, or its adapter alone, on the disk when this returns."""
    weights = _weights(model, dtype, rank)
    if rank != 0:
        return
    out.mkdir(parents=True, exist_ok=True)
    if hasattr(model, "peft_config"):
        lora.save(model, weights, out)
    else:
        model.save_pretrained(out, state_dict=weights)
        config = copy.deepcopy(
            model.config
        )  # save_pretrained wrote the dtype of the model in memory
        config.dtype = dtype
        config.save_pretrained(out)
    tokenizer.save_pretrained(out)
    share_weights(out)
    for file in out.iterdir():  # a part is not written again after a checkpoint that came later
        if file.is_file():
            sync(file)
    sync(out)


def _weights(model, dtype: torch.dtype, rank: int) -> dict[str, torch.Tensor]:
    """Return copies of all that the model consists of by name, on rank 0; {} on the others.

    Parameters are in `dtype`, buffers as they are; of an adapter, what is trained. ZeRO-3's shards
    are gathered one parameter at a time, by all ranks. A parameter with several names stands under
    each, but for those that transformers ties again when it loads the model. Raises NonFiniteLoss.
    """
    import deepspeed

    adapter, weights = hasattr(model, "peft_config"), {}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, parameter in parameters.items():
        source = model.all_tied_weights_keys.get(name)
        tied = source is not None and parameters.get(source) is parameter
        if tied or (adapter and not parameter.requires_grad):
            continue
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            if rank == 0:
                weights[name] = parameter.detach().to("cpu", dtype, copy=True)
    if rank == 0 and not adapter:
        for name, tensor in model.state_dict().items():
            if name not in parameters:  # a persistent buffer, as a router's correction
                weights[name] = tensor.detach().to("cpu", copy=True)
    for name, tensor in weights.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise NonFiniteLoss(f"the trained weight {name} is not finite in {tensor.dtype}")
    return weights


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m beyond_dpo.jobs.train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("job", help="the job file (JSON)")
    arguments = parser.parse_args()
    launch.follow_parent()
    main(arguments.job)
    torch.distributed.destroy_process_group()
