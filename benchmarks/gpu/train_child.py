"""One process of the step `train`: prepare all cases, or do one training and tell its speed.

    python train_child.py prepare|ours|ours_compiled|trl|trl_best JOB.json

The job file of a training holds what step_train.job_of() says; that of `prepare` holds those of all
cases, as {"jobs": [...]}. A training writes result.json into its folder.
"""

from __future__ import annotations

import importlib
import json
import runpy
import sys
import time
import traceback
from pathlib import Path

import torch
from models import NAMES, Shape, as_text, random_rows, write_model, write_pairs

from beyond_dpo import templates
from beyond_dpo.rows import read_rows

BETA = 0.1
# Small: a random model at a larger rate may leave the range of numbers within these few steps.
RATE = 1e-6


def prepare_all(jobs: list[dict]) -> None:
    """Prepare cases; one that fails is told, and lacks its reference scores."""
    for job in jobs:
        began = time.perf_counter()
        try:
            prepare(job)
        except Exception:
            traceback.print_exc()
        print(f"{job['model']}: {time.perf_counter() - began:.1f} s", flush=True)


def prepare(job: dict) -> None:
    """Write a case's model, its pairs and, by our own job, their reference scores."""
    shape = Shape(**job["shape"])
    write_model(Path(job["model"]), shape)
    rows = random_rows(shape, job["pairs"], job["prompt"], job["response"])
    tokens = write_pairs(Path(job["rows"]), rows)
    if tokens != job["prompt"] + 2 * job["response"]:
        raise ValueError(f"a pair has {tokens} tokens")
    reference = {
        **shared(job),
        "precision": job["precision"],
        "micro_batch": job["micro_batch"],
        "out": job["reference"],
    }
    file = Path(job["rows"]).with_name("reference.json")
    file.write_text(json.dumps(reference))
    importlib.import_module("beyond_dpo.jobs.reference").main(str(file))


def shared(job: dict) -> dict:
    """Return what our reference pass and our training both take."""
    limits = {"max_prompt": job["prompt"], "max_length": job["prompt"] + job["response"]}
    return {"model": job["model"], "rows": job["rows"], "names": NAMES, "limits": limits}


def ours(job: dict, compiled: bool) -> list[float]:
    """Do what `python -m beyond_dpo.jobs.train` does; return the seconds of each step."""
    out = Path(job["out"], "trained")
    settings = {
        "lr": RATE,
        "beta": BETA,
        "global_batch": job["global_batch"],
        "micro_batch": job["micro_batch"],
        "precision": job["precision"],
        "max_prompt": job["prompt"],
        "max_length": job["prompt"] + job["response"],
        "save_dtype": "bfloat16",
        "attention": "auto",
        "compile": compiled,
        "launcher": "plain",
        "checkpoint_every": 10**6,  # none on the way
    }
    training = {
        **shared(job),
        "settings": settings,
        "seed": 0,
        "reference": job["reference"],
        "out": str(out),
    }
    file = Path(job["out"], "training.json")
    file.write_text(json.dumps(training))
    sys.argv = ["train", str(file)]
    runpy.run_module("beyond_dpo.jobs.train", run_name="__main__", alter_sys=True)
    log = (out / "log.jsonl").read_text().splitlines()
    steps = [json.loads(line) for line in log]
    return [job["global_batch"] / step["rows_per_s"] for step in steps]


def trl(job: dict, best: bool) -> list[float]:
    """Train by TRL on the same pairs as text; return the seconds of each step.

    best: with Liger's kernels in the model's layers.
    """
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, TrainerCallback
    from trl import DPOTrainer

    class Clock(TrainerCallback):
        """Time each optimizer step, until the GPU has done it."""

        def __init__(self):
            self.seconds = []

        def on_step_begin(self, *_, **__):
            synchronise()
            self.began = time.perf_counter()

        def on_step_end(self, *_, **__):
            synchronise()
            self.seconds.append(time.perf_counter() - self.began)

    rows = read_rows(Path(job["rows"]))
    clock = Clock()
    trainer = DPOTrainer(
        AutoModelForCausalLM.from_pretrained(
            job["model"], dtype=torch.float32, attn_implementation="sdpa"
        ),
        args=trl_settings(job, best),
        train_dataset=Dataset.from_list([as_text(row) for row in rows]),
        processing_class=templates.load_tokenizer(job["model"]),
        callbacks=[clock],
    )
    require_same_tokens(trainer.train_dataset, rows)
    trainer.train()
    return clock.seconds


def trl_settings(job: dict, best: bool):
    """Return TRL's settings for what ours() does."""
    from trl import DPOConfig

    is_bf16 = job["precision"] == "bf16"
    return DPOConfig(
        output_dir=str(Path(job["out"], "trained")),
        per_device_train_batch_size=job["micro_batch"],
        gradient_accumulation_steps=job["global_batch"] // job["micro_batch"],
        num_train_epochs=1,
        learning_rate=RATE,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        max_grad_norm=1.0,
        optim="adamw_torch_fused",
        beta=BETA,
        max_length=job["prompt"] + job["response"],
        bf16=is_bf16,
        use_cpu=not torch.cuda.is_available(),
        seed=0,
        precompute_ref_log_probs=True,
        gradient_checkpointing=False,
        use_liger_kernel=best,
        report_to=[],
        save_strategy="no",
        logging_steps=10**6,
        disable_tqdm=True,
    )


def require_same_tokens(dataset, rows: list[dict]) -> None:
    """Raise ValueError unless TRL's tokens of the texts are those that we train on."""
    if len(dataset) != len(rows):
        raise ValueError(f"TRL has {len(dataset)} pairs of {len(rows)}")
    for theirs, row in zip(dataset, rows, strict=True):
        same = theirs["prompt_ids"] == row["prompt_ids"]
        for name in NAMES:
            same = same and theirs[f"{name}_ids"] == row["responses"][name]
        if not same:
            raise ValueError(f"TRL has other tokens of row {row['id']}")


def synchronise() -> None:
    """Wait until the GPU has done what it was told to."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def memory() -> dict[str, float]:
    """Return this process's largest GPU memory in GiB, {} without a GPU."""
    if not torch.cuda.is_available():
        return {}
    return {
        "peak_allocated_gib": torch.cuda.max_memory_allocated() / 2**30,
        "peak_reserved_gib": torch.cuda.max_memory_reserved() / 2**30,
    }


def main(kind: str, file: str) -> None:
    """Do one job in this process."""
    job = json.loads(Path(file).read_text())
    if kind == "prepare":
        prepare_all(job["jobs"])
        return
    if kind.startswith("ours"):
        seconds = ours(job, compiled=kind == "ours_compiled")
    else:
        seconds = trl(job, best=kind == "trl_best")
    result = {"step_seconds": seconds, **memory()}
    Path(job["out"], "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
