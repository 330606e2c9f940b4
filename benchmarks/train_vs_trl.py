"""DPO training: `beyond_dpo.jobs.train` and TRL's DPOTrainer in turn.

    python benchmarks/train_vs_trl.py                                # pip install .[bench]

Both have the same model, pairs, precision and cores. Responses are those of the pairs of profile
`cpu` (made first where they are missing), with an end token each; prompts are cut from the same
reviews to 8, 64 or 512 tokens. Both train SmolLM2-135M with a batch of 8 pairs, AdamW, no gradient
checkpointing, and the reference's log-probabilities computed beforehand. TRL's best is batches of
pairs of similar length besides. What is timed are the optimizer steps after the first two (not
TRL's last, which may be short). `--profile` says where our time goes.
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
from statistics import median

import torch
from measure import BEST_AT, GOALS, report, run
from transformers import AutoConfig, AutoModelForCausalLM

from beyond_dpo import templates
from beyond_dpo.machine import workers
from beyond_dpo.pipeline import assets, config, stages
from beyond_dpo.rows import read_rows, row_length, write_rows

SKIP = 2  # steps that warm up
PROMPT_TOKENS = tuple(GOALS)
BATCH = 8  # pairs, of profile `cpu`
RESPONSE_TOKENS = 49  # at most: 48 of profile `cpu`, and an end token


def our_jobs(job: dict) -> list[tuple[str, Path]]:
    """Write the job files of the reference pass and of the training, as the pipeline does.

    Return a (module, file) for each.
    """
    work = Path(job["out"])
    settings = dataclasses.replace(
        config.load("expo", "cpu").train,
        precision=job["precision"],
        max_prompt=job["prompt_tokens"],
        max_length=job["prompt_tokens"] + RESPONSE_TOKENS,
        checkpoint_every=10**6,  # none on the way
    )
    limits = {"max_prompt": settings.max_prompt, "max_length": settings.max_length}
    shared = {
        "model": job["model"],
        "rows": job["rows"],
        "names": ["chosen", "rejected"],
        "limits": limits,
    }
    scores = str(work / "reference.safetensors")
    reference = {**shared, "precision": job["precision"], "micro_batch": 8, "out": scores}
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
    return {
        "pairs_per_s": 1 / seconds_per_pair,
        "peak_gib": max(peaks),
        "flops_per_s": median(step["flops_per_s"] for step in steps),
    }


def profile(job: dict) -> None:
    """Print the operators that our training spends its time in."""
    from torch.profiler import profile

    (reference, reference_file), (training, training_file) = our_jobs(job)
    importlib.import_module(reference).main(str(reference_file))
    with profile() as profiler:
        importlib.import_module(training).main(str(training_file))
    operators = profiler.key_averages()
    print(operators.table(sort_by="self_cpu_time_total", row_limit=15, max_name_column_width=40))


def trl(job: dict, best: bool) -> None:
    """Train with TRL on the same pairs as text; write the speed to result.json.

    best: pairs of similar length come together, so that little is padding.
    """
    from datasets import Dataset
    from transformers import TrainerCallback
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
    rows = read_rows(job["rows"])
    if best:
        rows = sorted(rows, key=lambda row: row_length(row, ["chosen", "rejected"]))
    clock = Clock()
    trainer = DPOTrainer(
        AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32),
        args=trl_settings(job, best),
        train_dataset=Dataset.from_list(as_text(rows, tokenizer)),
        processing_class=tokenizer,
        callbacks=[clock],
    )
    trainer.train()
    seconds = clock.seconds[SKIP:-1]  # the last batch may be short
    speed = trainer.args.per_device_train_batch_size * len(seconds) / sum(seconds)
    (work / "result.json").write_text(json.dumps({"pairs_per_s": speed}))


def trl_settings(job: dict, best: bool):
    """Return TRL's settings for what ours() does."""
    from trl import DPOConfig

    train = config.load("expo", "cpu").train
    return DPOConfig(
        output_dir=str(Path(job["out"], "trl")),
        per_device_train_batch_size=train.global_batch,
        num_train_epochs=1,
        learning_rate=train.lr,
        beta=train.beta,
        max_length=job["prompt_tokens"] + RESPONSE_TOKENS,
        bf16=job["precision"] == "bf16",
        use_cpu=True,
        seed=0,
        precompute_ref_log_probs=True,
        gradient_checkpointing=False,
        train_sampling_strategy="sequential" if best else "random",
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


def with_prompts(rows: list[dict], tokens: int) -> list[dict]:
    """Return rows whose prompts have so many tokens, of all the rows' texts one after the other."""
    text = []
    for row in rows:
        text += row["prompt_ids"]
        for ids in row["responses"].values():
            text += ids[:-1]
    longer = []
    for i, row in enumerate(rows):
        start = i * len(text) // len(rows)
        prompt = [text[k % len(text)] for k in range(start, start + tokens)]
        longer.append({**row, "prompt_ids": prompt})
    return longer


def write_job(work: Path, rows: list[dict], precision: str) -> dict:
    """Write the rows of one training, and job.json with what it needs; return that."""
    write_rows(work / "pairs.jsonl", rows)
    job = {
        "model": str(assets.model_dir("smollm2")),
        "rows": str(work / "pairs.jsonl"),
        "prompt_tokens": len(rows[0]["prompt_ids"]),
        "precision": precision,
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
        trl(job, best=kind == "trl_best")


def measure_round(rows: list[dict], precision: str) -> dict[str, float]:
    """Train once in each of the three ways on prompts of each length."""
    result = {}
    for tokens in PROMPT_TOKENS:
        kinds = ("ours", "trl", "trl_best") if tokens in BEST_AT else ("ours", "trl")
        for kind in kinds:
            with tempfile.TemporaryDirectory() as folder:
                work = Path(folder)
                job = write_job(work, with_prompts(rows, tokens), precision)
                if kind == "ours":
                    measured = ours(job)
                else:
                    measured = run_child(kind, work)
                    measured.update(json.loads((work / "result.json").read_text()))
            for name in ("pairs_per_s", "peak_gib", "flops_per_s"):
                if name in measured:
                    result[f"{kind}_{name}_{tokens}"] = measured[name]
            print(tokens, kind, measured["pairs_per_s"], measured["peak_gib"], flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--pairs", type=int, default=64, help="how many pairs are trained on: 8 a step"
    )
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument(
        "--freeze", action="store_true", help="write data/frozen/benchmarks/train_vs_trl.json"
    )
    parser.add_argument(
        "--profile",
        type=int,
        metavar="TOKENS",
        help="only show what our time goes to, with prompts of so many tokens",
    )
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(*options.child)
        return
    rows = pairs_with_end_token(options.pairs)
    if options.profile:
        with tempfile.TemporaryDirectory() as folder:
            work = Path(folder)
            write_job(work, with_prompts(rows, options.profile), options.precision)
            print(run_child("profile", work)["output"])
        return
    rounds = []
    for _ in range(options.rounds):
        rounds.append(measure_round(rows, options.precision))
        print(rounds[-1], flush=True)
    settings = {
        "model": "SmolLM2-135M",
        "pairs": len(rows),
        "batch": 8,
        "response_tokens": mean_response(rows),
        "precision": options.precision,
        "trl_products_over_ours": {tokens: products_ratio(rows, tokens) for tokens in GOALS},
    }
    report("train_vs_trl", settings, rounds, options.freeze)


def products_ratio(rows: list[dict], tokens: int) -> float:
    """Return how many matrix products TRL computes for each of ours: the ratio of speeds to expect.

    TRL computes each response with a prompt of its own, filled up to the longest of its batch of 8
    pairs, and the logits of all these tokens; we a prompt once, and the logits of responses alone.
    Attention is not counted.
    """
    shape = AutoConfig.from_pretrained(assets.model_dir("smollm2"))
    head = shape.hidden_size * shape.vocab_size
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape)
    decoder = model.num_parameters() - head  # the head is the embeddings
    ours = 0
    theirs = 0
    for start in range(0, len(rows), BATCH):
        batch = rows[start : start + BATCH]
        lengths = [len(ids) for row in batch for ids in row["responses"].values()]
        ours += (tokens * len(batch) + sum(lengths)) * decoder + sum(lengths) * head
        theirs += len(lengths) * (tokens + max(lengths)) * (decoder + head)
    return theirs / ours


def mean_response(rows: list[dict]) -> float:
    """Return the mean number of tokens of a response."""
    lengths = [len(ids) for row in rows for ids in row["responses"].values()]
    return sum(lengths) / len(lengths)


if __name__ == "__main__":
    main()
