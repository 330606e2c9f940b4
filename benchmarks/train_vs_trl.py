"""DPO training: `beyond_dpo.jobs.train` and TRL's DPOTrainer in turn.

    python benchmarks/train_vs_trl.py                                # pip install .[bench]

Both have the same model, pairs, precision and cores. The pairs are those of profile `cpu` (made
first where they are missing). Both train SmolLM2-135M with a batch of 8 pairs, bf16 autocast over
float32 weights, AdamW, no gradient checkpointing, the reference's log-probabilities computed
beforehand, and an end token after each response. What is timed are the optimizer steps after the
first two (not TRL's last, which may be short). TRL as it comes (reference model in memory, gradient
checkpointing) is measured as well. `--profile` says where our time goes.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import sys
import tempfile
import time
from pathlib import Path

from measure import report, run

from beyond_dpo import templates
from beyond_dpo.machine import workers
from beyond_dpo.pipeline import assets, config, stages
from beyond_dpo.rows import read_rows, write_rows

SKIP = 2  # steps that warm up


def our_jobs(job: dict) -> list[tuple[str, Path]]:
    """Write the job files of the reference pass and of the training, as the pipeline does.

    Return a (module, file) for each.
    """
    work = Path(job["out"])
    # No checkpoint is written on the way.
    settings = dataclasses.replace(config.load("expo", "cpu").train, checkpoint_every=10**6)
    limits = {
        "max_prompt": settings.max_prompt,
        "max_length": settings.max_length + 1,  # room for the end token
    }
    shared = {
        "model": job["model"],
        "rows": job["rows"],
        "names": ["chosen", "rejected"],
        "limits": limits,
    }
    scores = str(work / "reference.safetensors")
    reference = {**shared, "precision": "bf16", "micro_batch": 8, "out": scores}
    training = {
        **shared,
        "settings": dataclasses.asdict(settings),
        "seed": 0,
        "reference": scores,
        "out": str(work / "ours"),
    }
    jobs = []
    for name, content in (("reference", reference), ("train", training)):
        file = work / f"{name}.json"
        file.write_text(json.dumps(content))
        jobs.append((f"beyond_dpo.jobs.{name}", file))
    return jobs


def ours(job: dict) -> dict[str, float]:
    """Run our two processes; the peak is the larger of theirs."""
    peaks = []
    for module, file in our_jobs(job):
        measured = run([sys.executable, "-m", module, file])
        peaks.append(measured["peak_gib"])
    log = Path(job["out"], "ours", "log.jsonl").read_text().splitlines()
    steps = [json.loads(line) for line in log][SKIP:]
    seconds_per_pair = sum(1 / step["rows_per_s"] for step in steps) / len(steps)
    return {"pairs_per_s": 1 / seconds_per_pair, "peak_gib": max(peaks)}


def profile(job: dict) -> None:
    """Print the operators that our training spends its time in."""
    from torch.profiler import profile

    (reference, reference_file), (training, training_file) = our_jobs(job)
    importlib.import_module(reference).main(str(reference_file))
    with profile() as profiler:
        importlib.import_module(training).main(str(training_file))
    operators = profiler.key_averages()
    print(operators.table(sort_by="self_cpu_time_total", row_limit=15, max_name_column_width=40))


def trl(job: dict, precompute: bool) -> None:
    """Train with TRL on the same pairs as text; write the speed to result.json.

    Args:
        precompute: the reference's log-probabilities are computed beforehand, and there is no
            gradient checkpointing.
    """
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, TrainerCallback
    from trl import DPOTrainer

    class Clock(TrainerCallback):
        """Time each optimizer step."""

        def __init__(self):
            self.seconds = []

        def on_step_begin(self, *_, **__):
            self.began = time.perf_counter()

        def on_step_end(self, *_, **__):
            self.seconds.append(time.perf_counter() - self.began)

    work = Path(job["out"])
    tokenizer = templates.load_tokenizer(job["model"])
    clock = Clock()
    trainer = DPOTrainer(
        AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32),
        args=trl_settings(work, precompute),
        train_dataset=Dataset.from_list(as_text(read_rows(job["rows"]), tokenizer)),
        processing_class=tokenizer,
        callbacks=[clock],
    )
    trainer.train()
    seconds = clock.seconds[SKIP:-1]  # the last batch may be short
    speed = trainer.args.per_device_train_batch_size * len(seconds) / sum(seconds)
    (work / "result.json").write_text(json.dumps({"pairs_per_s": speed}))


def trl_settings(work: Path, precompute: bool):
    """Return TRL's settings for what profile `cpu` does."""
    from trl import DPOConfig

    train = config.load("expo", "cpu").train
    return DPOConfig(
        output_dir=str(work / "trl"),
        per_device_train_batch_size=train.global_batch,
        num_train_epochs=1,
        learning_rate=train.lr,
        beta=train.beta,
        max_length=train.max_length + 1,
        bf16=True,
        use_cpu=True,
        seed=0,
        precompute_ref_log_probs=precompute,
        gradient_checkpointing=not precompute,
        report_to=[],
        save_strategy="no",
        logging_steps=10**6,
        lr_scheduler_type="cosine",
        warmup_steps=train.warmup,
        disable_tqdm=True,
    )


def as_text(rows: list[dict], tokenizer) -> list[dict]:
    """Return rows of token ids as the texts that TRL reads."""
    texts = []
    for row in rows:
        text = {"prompt": tokenizer.decode(row["prompt_ids"], skip_special_tokens=True)}
        for name, ids in row["responses"].items():
            text[name] = tokenizer.decode(ids, skip_special_tokens=True)
        texts.append(text)
    return texts


def pairs_with_end_token(number: int) -> list[dict]:
    """Return the first pairs of profile `cpu`, each response with an end token, as TRL adds it."""
    folder = stages.pairs(config.load("expo", "cpu")).get()
    rows = read_rows(folder / "pairs.jsonl")[:number]
    workers.close()
    end = templates.load_tokenizer(str(assets.model_dir("smollm2"))).eos_token_id
    for row in rows:
        for name, ids in row["responses"].items():
            row["responses"][name] = [token for token in ids if token != end] + [end]
    return rows


def tokens_per_pair(rows: list[dict]) -> float:
    """Return the mean number of tokens of a pair, whose prompt stands before each response."""
    tokens = 0
    for row in rows:
        tokens += 2 * len(row["prompt_ids"])
        tokens += sum(len(ids) for ids in row["responses"].values())
    return tokens / len(rows)


def write_job(work: Path, rows: list[dict]) -> dict:
    """Write the rows of one training, and job.json with the paths that it needs; return those."""
    write_rows(work / "pairs.jsonl", rows)
    job = {
        "model": str(assets.model_dir("smollm2")),
        "rows": str(work / "pairs.jsonl"),
        "out": str(work),
    }
    (work / "job.json").write_text(json.dumps(job))
    return job


def run_child(kind: str, work: Path) -> dict:
    """Run this script for one training that write_job has prepared, in a process of its own."""
    return run([sys.executable, __file__, "--child", kind, work / "job.json"])


def child(kind: str, file: str) -> None:
    """Do one training in this process, which `run_child` started."""
    job = json.loads(Path(file).read_text())
    if kind == "profile":
        profile(job)
    else:
        trl(job, precompute=kind == "trl")


def measure_round(rows: list[dict]) -> dict[str, float]:
    """Train once in each of the three ways."""
    tokens = tokens_per_pair(rows)
    result = {}
    for kind in ("ours", "trl", "trl_default"):
        with tempfile.TemporaryDirectory() as folder:
            work = Path(folder)
            job = write_job(work, rows)
            if kind == "ours":
                measured = ours(job)
            else:
                measured = run_child(kind, work)
                measured.update(json.loads((work / "result.json").read_text()))
        result[f"{kind}_pairs_per_s"] = measured["pairs_per_s"]
        result[f"{kind}_peak_gib"] = measured["peak_gib"]
        result[f"{kind}_tokens_per_s"] = measured["pairs_per_s"] * tokens
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--pairs", type=int, default=96, help="how many pairs are trained on: 8 a step"
    )
    parser.add_argument(
        "--freeze", action="store_true", help="write data/frozen/benchmarks/train_vs_trl.json"
    )
    parser.add_argument("--profile", action="store_true", help="only show what our time goes to")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(*options.child)
        return
    rows = pairs_with_end_token(options.pairs)
    if options.profile:
        with tempfile.TemporaryDirectory() as folder:
            write_job(Path(folder), rows)
            print(run_child("profile", Path(folder))["output"])
        return
    rounds = []
    for _ in range(options.rounds):
        rounds.append(measure_round(rows))
        print(rounds[-1], flush=True)
    settings = {
        "model": "SmolLM2-135M",
        "pairs": len(rows),
        "batch": 8,
        "tokens_per_pair": tokens_per_pair(rows),
        "precision": "bf16",
    }
    report("train_vs_trl", settings, rounds, options.freeze)


if __name__ == "__main__":
    main()
