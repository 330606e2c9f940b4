"""The training job: one loop on a DeepSpeed engine, `python -m beyond_dpo.jobs.train JOB.json`.

It reads RANK, WORLD_SIZE, LOCAL_RANK and MASTER_*, so `deepspeed`, `torchrun`, `srun` and plain
python start it alike. The job file holds: model, rows, names, reference (or null), limits, seed,
out, and as "settings" the fields of settings.Train.
Supervised fine-tuning is the loss "sft" on rows with one response. Rows may bring MallowsPO's
weights along, a "weight" each; else they are estimated from the reference's entropies.

Into `out` go log.jsonl (a line for each optimizer step), facts.json, checkpoints to resume from,
and the model. The file checkpoints/finished appears last.

The columns of log.jsonl, of every loss:
    step, lr                 the 0-based number of the step, and its learning rate
    grad_norm                of the step's gradient, before it is clipped
    loss                     mean over the step's rows; of "sft" over the tokens of its responses
    rows_per_s
    tokens_per_s             each prompt counted once, without padding
    computed_tokens_per_s    with the padding of all processes
    flops_per_s              useful operations of all processes, as flops.training() counts them
    mfu                      flops_per_s over the peak of all GPUs, where flops.PEAK has that
Of the losses with an α (WRPO):
    alpha                    α at this step
Of all but "sft", as means over the step's rows:
    NAME_reward              of each response: β × log-ratio, or of SimPO β × mean log-probability
    NAME_logps               of each response: its summed log-probability, nats
    NAME_accuracy            how often its reward is above the rejected one's ("rejected" has none)
    chosen_reward            as the loss has it: WRPO's is the blend of its two chosen responses
    margin                   chosen_reward less the rejected reward
    accuracy                 how often that margin of a row is positive
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
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from beyond_dpo import dispersion, events, flops, lora, precision, scoring, templates
from beyond_dpo.files import share_weights, sync, write_file
from beyond_dpo.jobs.reference import load as load_reference
from beyond_dpo.jobs.settings import ConfigError, Train, check_batch
from beyond_dpo.losses import LOSSES, PAIRS
from beyond_dpo.machine import cluster, launch
from beyond_dpo.rows import FUSED, epoch_order, read_rows, row_length

log = logging.getLogger("beyond_dpo.jobs.train")


def _adamw_8bit(parameters: list[Tensor], **options):
    """Return torchao's AdamW, whose moments have 8 bits (arXiv 2110.02861)."""
    try:
        from torchao.optim import AdamW8bit
    except ImportError:
        raise ConfigError("optimizer adamw_8bit needs `pip install torchao`") from None
    return AdamW8bit(parameters, **options)


OPTIMIZERS = {
    "adamw_8bit": _adamw_8bit,
    "adamw": functools.partial(torch.optim.AdamW, fused=True),
    "adagrad": torch.optim.Adagrad,
    "rmsprop": torch.optim.RMSprop,
}
SIZES = "sizes.json"  # in a checkpoint: {file: bytes}, written when all of them are on the disk


class NonFiniteLoss(RuntimeError):
    """The loss of a row, a gradient or a weight is not finite; the message says which."""


class UnusableCheckpoint(RuntimeError):
    """An undamaged checkpoint cannot be loaded; the message says what to delete."""


class ReferenceScores(NamedTuple):
    """What training needs of the reference model, by row id."""

    logps: dict[str, Tensor]  # (responses,) each: summed log-probabilities, nats
    dispersion_weights: dict[str, float] | None  # dispersion.weights, for MallowsPO alone


@dataclass(frozen=True)
class Job:
    """A job file, read and checked: what to train, on which rows, for how many steps."""

    model: str  # the folder that the training starts from
    names: list[str]  # of the responses, in the order that the loss takes them
    seed: int
    out: Path
    settings: Train
    accumulation: int  # micro-batches of each process in one optimizer step
    engine_config: dict
    rows: list[dict]
    dropped: int  # rows that have no prompt, or lack a response
    reference_scores: ReferenceScores | None
    steps: int  # optimizer steps of the whole training
    parts: dict[int, str]  # number of steps -> the folder that the model is saved to after them


@dataclass(frozen=True)
class Run:
    """A job on its engine, in one of the processes that train the model together."""

    job: Job
    rank: int
    processes: int
    device: str
    tokenizer: Any
    model: Any
    scorer: scoring.ResponseScorer  # of that model
    trained: list[Tensor]  # the parameters that are trained
    engine: Any  # DeepSpeed's

    @property
    def log_file(self) -> Path:
        """Return the file that gets one line for each optimizer step."""
        return self.job.out / "log.jsonl"

    @property
    def checkpoints(self) -> Path:
        """Return the folder of the checkpoints that this many processes can load."""
        return self.job.out / "checkpoints" / f"zero{self.job.settings.zero}-of{self.processes}"

    @property
    def save_dtype(self) -> torch.dtype:
        """Return the dtype of the weights in the files."""
        return getattr(torch, self.job.settings.save_dtype)

    @property
    def trains_all(self) -> bool:
        """Tell whether all parameters are trained.

        Of an adapter some are frozen, and its checkpoint leaves those out.
        """
        return not self.job.settings.lora_rank


class MicroBatch(NamedTuple):
    """Rows that one process computes together, and all that this takes, in the main memory."""

    rows: list[dict]
    inputs: dict[str, Tensor]  # of the scorer
    reference_logps: Tensor | None  # (responses, rows), nats
    dispersion_weights: Tensor | None  # (rows,)

    @property
    def computed_tokens(self) -> int:
        """Return how many tokens the model computes, padding among them."""
        return self.inputs["input_ids"].numel()


class RowLosses(NamedTuple):
    """The losses of a batch's rows, and the rewards that they were computed from."""

    losses: Tensor  # (rows,)
    chosen_rewards: Tensor  # (rows,), as the loss takes them: WRPO's is the weighted one
    rejected_rewards: Tensor  # (rows,)
    response_rewards: Tensor  # (responses, rows): beta times log-ratio (SimPO: mean log-prob)


class Metrics(NamedTuple):
    """What one optimizer step reports: sums over its rows, each a tensor."""

    loss: Tensor  # (), of each row its loss × its loss share
    chosen_reward: Tensor  # ()
    rejected_reward: Tensor  # ()
    accuracy: Tensor  # (), rows whose chosen reward is the larger one
    response_rewards: Tensor  # (responses,)
    response_accuracies: Tensor  # (responses,), rows in which it is above the rejected one
    response_logps: Tensor  # (responses,), nats

    def plus(self, other: "Metrics") -> "Metrics":
        """Add the sums over other rows of the same step."""
        return Metrics(*(mine + its for mine, its in zip(self, other, strict=True)))


# ---- what a step computes


def schedule(step: int, total: int, warmup: float) -> float:
    """Return the learning-rate factor of a 0-based step: linear warm-up, then cosine towards 0.

    It is in (0, 1]: the first step already has a positive rate, as the smallest runs have three
    steps. warmup: the share of the `total` steps.
    """
    warm = round(warmup * total)
    if step < warm:
        return (step + 1) / (warm + 1)
    progress = (step - warm) / (total - warm)
    return 0.5 * (1 + math.cos(math.pi * progress))


def fusion(settings: Train, step: int, total: int) -> float:
    """Return WRPO's α at a 0-based optimizer step.

    arXiv 2412.03187: α(t) = α_max t / T, with t the optimizer steps that are done; or α_max where
    it is not dynamic. As α(0) = 0, the first step learns from the target's own pair alone: its loss
    is then DPO (of wrpo_ipo IPO, of wrpo_simpo SimPO), and a training of one step is no more.
    """
    if settings.dynamic:
        return settings.alpha * step / total
    return settings.alpha


def row_losses(
    settings: Train,
    scores: dict,
    reference_logps: Tensor | None,
    names: list[str],
    dispersion_weights: Tensor | None = None,
    alpha: float = 0.0,
) -> RowLosses:
    """Compute the loss of each row from the scores of its responses.

    Args:
        scores: "logps" and "tokens", (responses × rows,) each, all rows of the first response
            first.
        reference_logps: (responses, rows), for a loss that compares with the reference model.
        dispersion_weights: (rows,), dispersion.weights, for MallowsPO.
        alpha: WRPO's fusion coefficient.

    Raises ValueError for a loss that does not fit the responses' names, or lacks its reference.
    """
    logps = scores["logps"].view(len(names), -1)
    if settings.loss == "sft":
        zeros = torch.zeros_like(logps)
        return RowLosses(-logps.sum(0), zeros[0], zeros[0], zeros)
    loss = LOSSES[settings.loss]
    _check_inputs(settings.loss, names, reference_logps, dispersion_weights)
    if loss.needs_reference:
        inputs = logps - reference_logps
    else:
        inputs = logps / scores["tokens"].view(len(names), -1)
    arguments = list(inputs)
    if settings.loss == "mallows_phi":
        arguments.append(torch.exp(-dispersion_weights))  # dispersion.to_phi
    elif loss.needs_weights:
        arguments.append(dispersion_weights)
    keywords = _loss_settings(settings, alpha)
    losses, chosen_rewards, rejected_rewards = loss.function(*arguments, **keywords)
    response_rewards = settings.beta * inputs.detach()
    return RowLosses(losses, chosen_rewards, rejected_rewards, response_rewards)


def _check_inputs(
    name: str,
    responses: list[str],
    reference_logps: Tensor | None,
    dispersion_weights: Tensor | None,
) -> None:
    """Raise ValueError unless a loss has the responses and what it needs of the reference."""
    loss = LOSSES[name]
    if tuple(responses) not in loss.responses:
        wanted = "a chosen and the rejected one" if loss.responses == PAIRS else FUSED
        raise ValueError(
            f"loss {name!r} takes the responses {wanted}, in this order, got {responses}"
        )
    lacks_reference = loss.needs_reference and reference_logps is None
    lacks_weights = loss.needs_weights and dispersion_weights is None
    if lacks_reference or lacks_weights:
        raise ValueError(f"loss {name!r} needs a reference file")


def _loss_settings(settings: Train, alpha: float) -> dict[str, float]:
    """Return the keyword arguments of the loss: the settings of these names, but for two."""
    keywords = {}
    for name in LOSSES[settings.loss].settings:
        if name == "alpha":
            keywords[name] = alpha  # at this step; the setting is its last value
        elif name == "tau":
            keywords[name] = settings.beta  # IPO's τ is set as beta
        else:
            keywords[name] = getattr(settings, name)
    return keywords


def engine_config(settings: Train, accumulation: int) -> dict:
    """Return DeepSpeed's configuration, with every number explicit and none "auto".

    The weights are float32 in every stage.
    """
    if settings.offload and not settings.zero:
        raise ConfigError(
            "offload=True needs zero 1, 2 or 3; stage 0 keeps the optimizer on the device"
        )
    if settings.compile and settings.zero == 3:
        raise ConfigError(
            "compile=True needs zero 0, 1 or 2; stage 3 gathers weights in each layer"
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


# ---- the job


def main(path: str) -> None:
    """Run one job; an interrupted one goes on from its last checkpoint to the same result."""
    logging.basicConfig(level=logging.INFO)
    # DeepSpeed's, at each step
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    rank, processes = _place_in_group()
    job = _read_job(path, processes)
    run = _start_engine(job, rank, processes)
    first = _resume(run)
    if rank == 0:
        _write_facts(job, first)
    _train(run, first)
    _save(run.model, run.tokenizer, job.out, run.save_dtype, rank)
    if rank == 0:
        write_file(job.out / "checkpoints" / "finished", "")
    _wait_for_all()


def _place_in_group() -> tuple[int, int]:
    """Return this process's rank and the number of processes, and complete the environment."""
    cards = torch.cuda.device_count()
    if "RANK" not in os.environ:  # started by plain python, or srun
        os.environ |= cluster.rank(cards)
    rank = int(os.environ["RANK"])
    os.environ.setdefault("LOCAL_RANK", str(rank % max(1, cards)))
    return rank, int(os.environ["WORLD_SIZE"])


def _read_job(path: str, processes: int) -> Job:
    """Read a job file and its rows; raise ValueError or ConfigError if it cannot be trained."""
    fields = json.loads(Path(path).read_text(encoding="utf-8"))
    settings = Train(**{**fields["settings"], "processes": processes})
    precision.require_precision(settings.precision)
    accumulation = check_batch(settings)
    names = fields["names"]
    config = engine_config(settings, accumulation)
    tokenizer = templates.load_tokenizer(fields["model"])
    rows, dropped = templates.cut_rows(
        tokenizer, read_rows(fields["rows"]), names, fields["limits"]
    )
    if not rows:
        raise ValueError(
            f"{fields['rows']}: no row is left to train on ({dropped} dropped, without prompt or "
            "response)"
        )
    steps = max(1, round(len(rows) * settings.epochs / settings.global_batch))
    parts = _part_ends(steps, settings.parts)
    reference_scores = None
    if fields["reference"]:
        reference_scores = _read_reference(fields["reference"], rows, names, settings.loss)
    return Job(
        model=fields["model"],
        names=names,
        seed=fields["seed"],
        out=Path(fields["out"]),
        settings=settings,
        accumulation=accumulation,
        engine_config=config,
        rows=rows,
        dropped=dropped,
        reference_scores=reference_scores,
        steps=steps,
        parts=parts,
    )


def _part_ends(steps: int, parts: int) -> dict[int, str]:
    """Return after how many steps each part but the last ends, with its folder's name."""
    if parts > steps:  # a part would have no step
        raise ConfigError(f"{steps} steps cannot be cut into {parts} parts")
    return {round(steps * part / parts): f"part{part}" for part in range(1, parts)}


def _read_reference(path: str, rows: list[dict], names: list[str], loss: str) -> ReferenceScores:
    """Return what a loss needs of a reference file."""
    scores = load_reference(path, rows, names)
    ids = [row["id"] for row in rows]
    logps = dict(zip(ids, scores["logps"], strict=True))
    if loss == "sft" or not LOSSES[loss].needs_weights:
        return ReferenceScores(logps, None)
    weights = _own_weights(rows)
    if weights is None:
        chosen_entropies, rejected_entropies = scores["entropies"].T
        weights, _ = dispersion.weights(chosen_entropies, rejected_entropies, ids)
    return ReferenceScores(logps, dict(zip(ids, weights, strict=True)))


def _own_weights(rows: list[dict]) -> list[float] | None:
    """Return the "weight" of each row, in place of the estimate; None if no row has one.

    Raises ValueError where some rows have none, and for one that is not positive and finite.
    """
    if not any("weight" in row for row in rows):
        return None
    weights = []
    for row in rows:
        weight = row.get("weight")
        is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not is_number or not 0 < weight < math.inf:
            raise ValueError(f"row {row['id']}: a weight must be positive and finite: {weight!r}")
        weights.append(float(weight))
    return weights


def _start_engine(job: Job, rank: int, processes: int) -> Run:
    """Join the other processes, load the model and build the engine that trains it."""
    device = _join_group()
    import deepspeed  # which reads the environment that _join_group has completed

    settings = job.settings
    tokenizer = templates.load_tokenizer(job.model)
    scorer = _load_scorer(job, device)
    trained = [parameter for parameter in scorer.parameters() if parameter.requires_grad]
    optimizer = OPTIMIZERS[settings.optimizer](
        trained, lr=settings.lr, weight_decay=settings.weight_decay
    )
    engine, *_ = deepspeed.initialize(model=scorer, optimizer=optimizer, config=job.engine_config)
    # a single process in stage 0 would only copy its gradients
    engine.enable_backward_allreduce = settings.zero > 0 or processes > 1
    return Run(
        job=job,
        rank=rank,
        processes=processes,
        device=device,
        tokenizer=tokenizer,
        model=scorer.model,
        scorer=scorer,
        trained=trained,
        engine=engine,
    )


def _join_group() -> str:
    """Connect this process with the others, and return its device."""
    has_cuda = torch.cuda.is_available()
    if not has_cuda:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read when deepspeed is imported
    # where LOCAL_SIZE is set, DeepSpeed on a CPU leaves 66 MiB in /dev/shm that only inference uses
    os.environ.pop("LOCAL_SIZE", None)
    import deepspeed

    deepspeed.init_distributed(dist_backend="nccl" if has_cuda else "gloo")
    if not has_cuda:
        return "cpu"
    device = f"cuda:{os.environ['LOCAL_RANK']}"
    torch.cuda.set_device(device)
    return device


def _wait_for_all() -> None:
    """Return when all processes have come here."""
    from deepspeed import comm

    comm.barrier()


def _load_scorer(job: Job, device: str) -> scoring.ResponseScorer:
    """Return the model to train, in float32 and with its adapter if it gets one."""
    settings = job.settings
    torch.manual_seed(job.seed)
    model = scoring.load_model(job.model, "eager", torch.float32)
    if settings.lora_rank:
        lora.inject(model, settings.lora_rank, settings.lora_alpha)
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model = model.train().to(device)
    scorer = scoring.build_scorer(model, settings.precision, settings.attention)
    if settings.compile:
        compile_layers(scorer)
    return scorer


def compile_layers(scorer: scoring.ResponseScorer, backend: str = "inductor") -> None:
    """Let torch.compile fuse the operations of each layer and of the scores, at the first step.

    All layers are of one kind: one is compiled, for batches of any shape. backend: torch's name of
    what compiles.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    for module in scorer.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.compile(dynamic=True, backend=backend)
    scorer.compile_scores(backend)


def _resume(run: Run) -> int:
    """Load the last undamaged checkpoint; return after how many steps it was written, or else 0."""
    from deepspeed import comm as dist

    chosen = torch.zeros(1, dtype=torch.long, device=run.device)
    if run.rank == 0:
        chosen += _choose_checkpoint(run.checkpoints, run.log_file)
    dist.broadcast(chosen, 0)
    steps = int(chosen)
    if steps:
        _load_checkpoint(run.engine, run.checkpoints / f"step{steps}", run.trains_all)
    if run.rank == 0:
        _delete_other_checkpoints(run.checkpoints, steps)
        _cut_log(run.log_file, steps)
    return steps


def _delete_other_checkpoints(saved: Path, steps: int) -> None:
    """Delete what this attempt, which goes on after `steps` steps, will never load or writes anew.

    That is all checkpoints of another ZeRO stage or number of processes, and those in `saved` of
    later steps; where the training begins anew (steps 0), it is all that there are.
    """
    saved.parent.mkdir(parents=True, exist_ok=True)
    for other in saved.parent.glob("zero*"):
        if not steps or other != saved:
            shutil.rmtree(other)
    for later in saved.glob("step*"):
        if _steps_of(later.name) > steps:
            shutil.rmtree(later)


def _cut_log(log_file: Path, steps: int) -> None:
    """Keep the first `steps` lines of the log: later steps are logged once more.

    The shorter log takes the place of the other as a whole, as a checkpoint whose steps are not all
    logged is not loaded (_damage).
    """
    if not log_file.exists():
        return
    content = log_file.read_bytes()
    kept = [line + b"\n" for line in content.splitlines()[:steps]]
    shorter = b"".join(kept)
    if shorter != content:
        write_file(log_file, shorter)


def _write_facts(job: Job, first: int) -> None:
    """Write and log how many rows and steps the training has."""
    facts = {"rows": len(job.rows), "dropped": job.dropped, "steps": job.steps}
    (job.out / "facts.json").write_text(json.dumps(facts), encoding="utf-8")
    log.info(
        "%d rows (%d dropped: no prompt or no response), steps %d to %d",
        len(job.rows),
        job.dropped,
        first,
        job.steps,
    )


# ---- the loop


def _train(run: Run, first: int) -> None:
    """Take the optimizer steps from `first` on, and log, save and checkpoint on the way."""
    job = run.job
    with ThreadPoolExecutor(1) as pool:
        micro_batches = ahead(_micro_batches(run, first), pool)
        for step in range(first, job.steps):
            entry = _train_step(run, step, micro_batches)
            done = step + 1
            if run.rank == 0:
                with open(run.log_file, "a", encoding="utf-8") as file:
                    file.write(json.dumps(entry) + "\n")
                events.progress(done, job.steps)
            if done in job.parts:
                part = job.out / job.parts[done]
                _save(run.model, run.tokenizer, part, run.save_dtype, run.rank)
            if done % job.settings.checkpoint_every == 0 and done < job.steps:
                _save_checkpoint(
                    run.engine, run.checkpoints, done, run.log_file, run.rank, run.trains_all
                )


def ahead(items: Iterator, pool: ThreadPoolExecutor) -> Iterator:
    """Yield items; the pool computes the next one while the caller uses the one before."""
    coming = pool.submit(next, items, None)
    while (item := coming.result()) is not None:
        coming = pool.submit(next, items, None)
        yield item


def _micro_batches(run: Run, first: int) -> Iterator[MicroBatch]:
    """Yield this process's micro-batches of all steps from `first` on."""
    job = run.job
    settings = job.settings
    for step in range(first, job.steps):
        batch = _step_rows(job.rows, job.names, step, settings.global_batch, job.seed)
        for micro in range(job.accumulation):
            start = (micro * run.processes + run.rank) * settings.micro_batch
            yield _micro_batch(run, batch[start : start + settings.micro_batch])


def _micro_batch(run: Run, rows: list[dict]) -> MicroBatch:
    """Lay rows out for the scorer; with a GPU in pinned memory, from which copies do not wait."""
    inputs = run.scorer.pack(rows, run.job.names, run.tokenizer.pad_token_id)
    ids = inputs.pop("ids")
    reference_logps, dispersion_weights = _reference_of(run.job.reference_scores, ids)
    if run.device != "cpu":
        inputs = {name: tensor.pin_memory() for name, tensor in inputs.items()}
        if reference_logps is not None:
            reference_logps = reference_logps.pin_memory()
    return MicroBatch(rows, inputs, reference_logps, dispersion_weights)


def _train_step(run: Run, step: int, micro_batches: Iterator[MicroBatch]) -> dict:
    """Take one optimizer step, and return what the log says of it."""
    began = time.time()
    job = run.job
    settings = job.settings
    batch = _step_rows(job.rows, job.names, step, settings.global_batch, job.seed)
    # for dropout: a resumed run draws the same
    torch.manual_seed((job.seed << 32) + step * run.processes + run.rank)
    alpha = fusion(settings, step, job.steps)
    rate = settings.lr * schedule(step, job.steps, settings.warmup)
    _set_rate(run.engine, rate)
    loss_share = _loss_share(job, batch)
    metrics = _no_metrics(len(job.names), run.device)
    losses = []  # of each micro-batch
    computed_tokens = 0
    for micro in range(job.accumulation):
        micro_batch = next(micro_batches)
        micro_metrics, row_losses = _backward(run, micro_batch, alpha, loss_share)
        metrics = metrics.plus(micro_metrics)
        losses.append((micro_batch.rows, row_losses))
        computed_tokens += micro_batch.computed_tokens
        if micro < job.accumulation - 1:
            run.engine.step()  # the engine counts a micro-batch, no weight changes
    _require_finite(run, losses, step)
    norm = _update_weights(run)
    metrics = _over_all_processes(metrics)
    gradient_norm = float(norm)
    if not 0 <= gradient_norm < math.inf:  # the sharded stages report -1 for NaN
        ids = [row["id"] for row in batch]
        raise NonFiniteLoss(f"step {step}: the gradient of rows {ids} is not finite")
    entry = {"step": step, "lr": rate, "grad_norm": gradient_norm}
    if settings.loss != "sft" and "alpha" in LOSSES[settings.loss].settings:
        entry["alpha"] = alpha
    speed = _speed(run, batch, computed_tokens, time.time() - began)
    return entry | speed | _log_columns(metrics, batch, job.names, settings.loss)


def _set_rate(engine, rate: float) -> None:
    """Set the learning rate of the next optimizer step."""
    for group in engine.optimizer.param_groups:
        if isinstance(group["lr"], Tensor):  # torchao's, whose step is compiled
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def _update_weights(run: Run) -> float | Tensor:
    """Take the optimizer step of the gradient that was added up; return its norm before clipping.

    In stage 0 the engine clips the gradient in place and then deletes it, so the norm is computed
    before. In the sharded stages no process has all of the gradient: the engine computes its norm
    within the step, and tells it after.
    """
    if run.job.settings.zero:
        run.engine.step()
        return run.engine.get_global_grad_norm()
    gradients = [parameter.grad for parameter in run.trained if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    run.engine.step()
    return norm


# the order of an epoch is asked for once for each of its rows
_order = functools.lru_cache(2)(epoch_order)


def _step_rows(rows: list[dict], names: list[str], step: int, size: int, seed: int) -> list[dict]:
    """Return the rows of one optimizer step.

    The epochs' permutations follow each other end to end, so that no batch is cut short. The rows
    are sorted by length: a step's gradient does not depend on their order, and micro-batches then
    carry little padding.
    """
    batch = []
    for position in range(step * size, (step + 1) * size):
        epoch, index = divmod(position, len(rows))
        order = _order(len(rows), seed, epoch)
        batch.append(rows[order[index]])
    return sorted(batch, key=lambda row: (row_length(row, names), row["id"]))


def _loss_share(job: Job, batch: list[dict]) -> float:
    """Return the number that each row's loss is multiplied by in the loss of its step.

    The loss of a step is Σ loss × loss_share over its rows, however it is split: for preferences
    the mean over the rows. The loss "sft" of a row is a sum over its tokens, and that of a step the
    mean over all tokens.
    """
    if job.settings.loss != "sft":
        return 1 / job.settings.global_batch
    tokens = 0
    for row in batch:
        tokens += sum(len(row["responses"][name]) for name in job.names)
    return 1 / tokens


def _backward(
    run: Run, micro_batch: MicroBatch, alpha: float, loss_share: float
) -> tuple[Metrics, Tensor]:
    """Add a micro-batch's Σ loss × loss_share to the step's gradient.

    Return what it reports, and the losses of its rows. With one process nothing here waits for the
    GPU: while it computes, the program is already at the next micro-batch.
    """
    job = run.job
    scores = run.engine(**scoring.to_device(micro_batch.inputs, run.device))
    reference_logps = micro_batch.reference_logps
    if reference_logps is not None:
        reference_logps = reference_logps.to(run.device, non_blocking=True)
    result = row_losses(
        job.settings, scores, reference_logps, job.names, micro_batch.dispersion_weights, alpha
    )
    loss = result.losses.sum() * loss_share
    # the engine averages gradients over accumulation and processes, but their sum is wanted
    run.engine.backward(loss * job.accumulation * run.processes)
    metrics = _measure(loss, result, scores["logps"].view(len(job.names), -1))
    return metrics, result.losses.detach()


def _reference_of(
    scores: ReferenceScores | None, ids: list[str]
) -> tuple[Tensor | None, Tensor | None]:
    """Return the (responses, rows) reference log-probabilities and the dispersion weights of rows.

    Each is None where there is none.
    """
    if scores is None:
        return None, None
    logps = torch.stack([scores.logps[row_id] for row_id in ids], dim=1)
    if scores.dispersion_weights is None:
        return logps, None
    dispersion_weights = [scores.dispersion_weights[row_id] for row_id in ids]
    return logps, torch.tensor(dispersion_weights)


def _require_finite(run: Run, losses: list[tuple[list[dict], Tensor]], step: int) -> None:
    """Raise NonFiniteLoss, which names the rows, unless the losses of a step are finite.

    losses: of each micro-batch its rows and their losses.
    """
    all_losses = torch.cat([row_losses for _, row_losses in losses])
    if all_losses.isfinite().all():
        return
    for rows, row_losses in losses:
        finite = row_losses.isfinite().tolist()
        bad = [row["id"] for row, is_finite in zip(rows, finite, strict=True) if not is_finite]
        if bad:
            culprits = _culprits(run.model, rows, run.job.names, bad)
            raise NonFiniteLoss(f"step {step}: the loss of rows {culprits} is not finite")


@torch.no_grad()
def _culprits(model, rows: list[dict], names: list[str], bad: list[str]) -> list[str]:
    """Return which of the `bad` rows have logits that are not finite when each is computed alone.

    A row without finite logits spoils the losses of those that are packed into one sequence with
    it. All of `bad` are returned where none is at fault alone, and in ZeRO-3.
    """
    parameter = next(model.parameters())
    if hasattr(parameter, "ds_id"):  # ZeRO-3: one process alone cannot gather the weights
        return bad
    culprits = []
    for row in rows:
        if row["id"] not in bad:
            continue
        for name in names:
            tokens = row["prompt_ids"] + row["responses"][name]
            logits = model(torch.tensor([tokens], device=parameter.device)).logits
            if not logits.isfinite().all():
                culprits.append(row["id"])
                break
    return culprits or bad


def _no_metrics(responses: int, device: str) -> Metrics:
    """Return the metrics of no rows."""
    zero = torch.zeros((), device=device)
    zeros = torch.zeros(responses, device=device)
    return Metrics(zero, zero, zero, zero, zeros, zeros, zeros)


@torch.no_grad()
def _measure(loss: Tensor, result: RowLosses, logps: Tensor) -> Metrics:
    """Return what one micro-batch adds to the metrics of its step; logps is (responses, rows)."""
    is_right = result.chosen_rewards > result.rejected_rewards
    is_above_rejected = result.response_rewards > result.response_rewards[-1]
    return Metrics(
        loss=loss.detach(),
        chosen_reward=result.chosen_rewards.sum(),
        rejected_reward=result.rejected_rewards.sum(),
        accuracy=is_right.float().sum(),
        response_rewards=result.response_rewards.float().sum(1),
        response_accuracies=is_above_rejected.float().sum(1),
        response_logps=logps.detach().float().sum(1),
    )


def _over_all_processes(metrics: Metrics) -> Metrics:
    """Return the sums over the rows of all processes, in the main memory."""
    from deepspeed import comm as dist

    values = torch.cat([value.reshape(-1) for value in metrics])
    dist.all_reduce(values)
    sizes = [value.numel() for value in metrics]
    return Metrics(*values.cpu().split(sizes))


def _speed(run: Run, batch: list[dict], computed_tokens: int, seconds: float) -> dict:
    """Return the log's columns of speed; the module's docstring lists them.

    computed_tokens: of this process; the others are taken to compute as many.
    """
    tokens = sum(row_length(row, run.job.names) for row in batch)
    operations = flops.training(run.model, batch, run.job.names)
    columns = {
        "rows_per_s": len(batch) / seconds,
        "tokens_per_s": tokens / seconds,
        "computed_tokens_per_s": computed_tokens * run.processes / seconds,
        "flops_per_s": operations / seconds,
    }
    peak = flops.device_peak(run.device)
    if peak is not None:
        columns["mfu"] = columns["flops_per_s"] / (peak * run.processes)
    return columns


def _log_columns(metrics: Metrics, batch: list[dict], names: list[str], loss: str) -> dict:
    """Return a step's loss, and for preferences the means over its rows.

    The module's docstring lists the columns.
    """
    columns = {"loss": metrics.loss.item()}
    if loss == "sft":
        return columns
    rows = len(batch)
    for i, name in enumerate(names):
        columns[f"{name}_reward"] = metrics.response_rewards[i].item() / rows
        if name != "rejected":
            columns[f"{name}_accuracy"] = metrics.response_accuracies[i].item() / rows
        columns[f"{name}_logps"] = metrics.response_logps[i].item() / rows
    chosen_reward = metrics.chosen_reward.item() / rows
    rejected_reward = metrics.rejected_reward.item() / rows
    columns["chosen_reward"] = chosen_reward
    columns["margin"] = chosen_reward - rejected_reward
    columns["accuracy"] = metrics.accuracy.item() / rows
    return columns


# ---- checkpoints


def _steps_of(tag: str) -> int:
    """Return N of a checkpoint's name "stepN": it was written after N steps. 0 for other names."""
    number = re.fullmatch(r"step(\d+)", tag)
    return int(number[1]) if number else 0


def _save_checkpoint(
    engine, saved: Path, step: int, log_file: Path, rank: int, trains_all: bool
) -> None:
    """Write the checkpoint after `step` steps.

    `latest` names it once the files of all processes are on the disk. Where not all parameters are
    trained, those that are frozen are left out.
    """
    folder = saved / f"step{step}"
    engine.save_checkpoint(
        saved,
        folder.name,
        {"step": step},
        save_latest=False,
        exclude_frozen_parameters=not trains_all,
    )
    # Each process waits for all files that it sees: its own are among them, and those of processes
    # on other machines are for these to wait for.
    for file in folder.iterdir():
        sync(file)
    _wait_for_all()
    if rank == 0:
        _name_checkpoint(folder, log_file)


def _name_checkpoint(folder: Path, log_file: Path) -> None:
    """Let `latest` name a checkpoint whose files are on the disk, and delete the ones before it.

    Whenever the power fails, the disk has an undamaged checkpoint and the log of the steps before.
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


def _choose_checkpoint(saved: Path, log_file: Path) -> int:
    """Return after how many steps the checkpoint to go on from was written, 0 if there is none.

    It is the first undamaged one of _candidates(). One that is damaged, as a power cut may leave
    it, is renamed and stays beside `saved`, and the log says so. One that was never finished, as an
    attempt ended while it wrote it, is passed over without a word.
    """
    named = _latest_name(saved)
    tags = _candidates(saved, named)
    problems = []
    if named is not None and named not in tags:
        latest = saved / "latest"
        problems.append(f"{latest} names no checkpoint that is there ({named[:40]!r})")
    chosen = ""
    for tag in tags:
        folder = saved / tag
        log.info("checking %s", folder)  # reads all of it
        damage = _damage(folder, log_file)
        if not damage:
            chosen = tag
            break
        was_finished = tag == named or (folder / SIZES).exists()
        if was_finished:
            kept = _set_aside(folder).name
            problems.append(f"checkpoint {folder} is damaged ({damage}): kept as {kept}")
    outcome = f"goes on from {chosen}" if chosen else "begins anew"
    for problem in problems:
        log.warning("%s; the training %s", problem, outcome)
    return _steps_of(chosen)


def _latest_name(saved: Path) -> str | None:
    """Return what the file `latest` says, which a power cut may have spoilt; None without one."""
    latest = saved / "latest"
    if not latest.exists():
        return None
    return latest.read_text(encoding="utf-8", errors="replace").strip()


def _candidates(saved: Path, named: str | None) -> list[str]:
    """Return the checkpoints' names: the one that `latest` names, then from newest to oldest."""
    tags = [folder.name for folder in saved.glob("step*") if _steps_of(folder.name)]
    return sorted(tags, key=lambda tag: (tag != named, -_steps_of(tag)))


def _damage(folder: Path, log_file: Path) -> str:
    """Return what a checkpoint lacks, or "": its files are whole and the steps before it logged."""
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
        checks = list(pool.map(_checksums_agree, [folder / name for name in sizes]))
    for name, agrees in zip(sizes, checks, strict=True):
        if not agrees:
            return f"{name} has other bytes than were written"
    steps = _steps_of(folder.name)
    if _logged_steps(log_file, steps) != list(range(steps)):
        return f"{log_file.name} does not hold its {steps} steps"
    return ""


def _checksums_agree(file: Path) -> bool:
    """Tell whether each part of a file by torch.save, a zip archive, has the CRC-32 it states."""
    try:
        with zipfile.ZipFile(file) as archive:
            return archive.testzip() is None
    except Exception:  # zipfile raises errors of many kinds for bytes that are no archive
        return False


def _logged_steps(log_file: Path, most: int) -> list[int]:
    """Return the steps of the log's first `most` lines, [] if one of them is not readable."""
    if not log_file.exists():
        return []
    lines = log_file.read_text(encoding="utf-8", errors="replace").splitlines()
    try:
        return [json.loads(line)["step"] for line in lines[:most]]
    except (ValueError, LookupError, TypeError):
        return []


def _set_aside(folder: Path) -> Path:
    """Rename a checkpoint so that no later attempt takes it, and return its new path."""
    saved = folder.parent
    name = f"damaged-{saved.name}-{folder.name}"
    target = saved.parent / name
    number = 1
    while target.exists():
        number += 1
        target = saved.parent / f"{name}-{number}"
    return folder.rename(target)


def _load_checkpoint(engine, folder: Path, trains_all: bool) -> None:
    """Load an undamaged checkpoint's weights and optimizer; raise UnusableCheckpoint if it fails.

    trains_all: it has all parameters, and else all but the frozen ones, which are loaded already.
    """
    problem = ""
    try:
        loaded, _ = engine.load_checkpoint(
            folder.parent, folder.name, load_module_strict=trains_all
        )
        if not loaded:
            problem = "DeepSpeed found nothing to load"
    except Exception as error:  # the engine may hold half of it: this process cannot begin anew
        message = f"{type(error).__name__}: {error}"
        problem = " ".join(message.split())[:200]
    if problem:
        raise UnusableCheckpoint(
            f"checkpoint {folder} cannot be loaded ({problem}); if that happens again, delete that "
            "folder, and the training begins without it"
        )


# ---- the trained model


def _save(model, tokenizer, out: Path, dtype: torch.dtype, rank: int) -> None:
    """Write the model as safetensors, or its adapter alone, on the disk when this returns."""
    weights = _gathered_weights(model, dtype, rank)
    if rank != 0:
        return
    out.mkdir(parents=True, exist_ok=True)
    if hasattr(model, "peft_config"):
        lora.save(model, weights, out)
    else:
        model.save_pretrained(out, state_dict=weights)
        # again, as save_pretrained wrote the dtype of the model in memory
        config = copy.deepcopy(model.config)
        config.dtype = dtype
        config.save_pretrained(out)
    tokenizer.save_pretrained(out)
    share_weights(out)
    for file in out.iterdir():  # a part is not written again after a checkpoint that came later
        if file.is_file():
            sync(file)
    sync(out)


def _gathered_weights(model, dtype: torch.dtype, rank: int) -> dict[str, Tensor]:
    """Return copies of all that the model consists of by name, on rank 0; {} on the others.

    Parameters are in `dtype`, buffers as they are; of an adapter, what is trained. ZeRO-3's shards
    are gathered one parameter at a time, by all ranks. A parameter with several names stands under
    each, but for those that transformers ties again when it loads the model. Raises NonFiniteLoss.
    """
    import deepspeed

    is_adapter = hasattr(model, "peft_config")
    parameters = dict(model.named_parameters(remove_duplicate=False))
    weights = {}
    for name, parameter in parameters.items():
        source = model.all_tied_weights_keys.get(name)
        is_tied = source is not None and parameters.get(source) is parameter
        is_frozen = is_adapter and not parameter.requires_grad
        if is_tied or is_frozen:
            continue
        is_sharded = hasattr(parameter, "ds_id")
        with deepspeed.zero.GatheredParameters([parameter], enabled=is_sharded):
            if rank == 0:
                weights[name] = parameter.detach().to("cpu", dtype, copy=True)
    if rank == 0 and not is_adapter:
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
