"""DPO training: `beyond_dpo.jobs.train` and TRL's DPOTrainer in turn, on the same model, pairs,
precision and cores.

    python benchmarks/train_vs_trl.py                                # pip install .[bench]

The pairs are those of profile `cpu` (made first where they are missing). Both train SmolLM2-135M
with a batch of 8 pairs, bf16 autocast over float32 weights, AdamW, no gradient checkpointing, the
reference's log-probabilities computed beforehand, and an end token after each response; what is
timed are the optimizer steps after the first two (not TRL's last, which may be short). TRL as it
comes (reference model in memory, gradient checkpointing) is measured as well. `--profile` says
where our time goes.
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
    """Write the job files of the reference pass and of the training, as the pipeline does; return
    (module, file)s.
    """
    work, settings = (
        Path(job["out"]),
        dataclasses.replace(config.load("expo", "cpu").train, checkpoint_every=10**6),
    )
    limits = {
        "max_prompt": settings.max_prompt,
        "max_length": settings.max_length + 1,
    }  # room for the end token
    shared = {
        "model": job["model"],
        "rows": job["rows"],
        "names": ["chosen", "rejected"],
        "limits": limits,
    }
    scores = {"precision": "bf16", "micro_batch": 8, "out": str(work / "reference.safetensors")}
    training = {"settings": dataclasses.asdict(settings), "seed": 0, "reference": scores["out"]}
    training["out"] = str(work / "ours")
    jobs = []
    for name, part in (("reference", scores), ("train", training)):
        (work / f"{name}.json").write_text(json.dumps(shared | part))
        jobs.append((f"beyond_dpo.{name}", work / f"{name}.json"))
    return jobs


def ours(job: dict) -> dict:
    """Run both; speed from the log of the steps, memory from the larger of the two processes."""
    peak = max(
        run([sys.executable, "-m", module, file])["peak_gib"] for module, file in our_jobs(job)
    )
    steps = [
        json.loads(line) for line in Path(job["out"], "ours", "log.jsonl").read_text().splitlines()
    ][SKIP:]
    return {
        "pairs_per_s": len(steps) / sum(1 / step["rows_per_s"] for step in steps),
        "peak_gib": peak,
    }


def profile(job: dict) -> None:
    """Print the operators that our training spends its time in."""
    from torch.profiler import profile

    (scoring, first), (training, second) = our_jobs(job)
    importlib.import_module(scoring).main(str(first))
    with profile() as found:
        importlib.import_module(training).main(str(second))
    print(
        found.key_averages().table(
            sort_by="self_cpu_time_total", row_limit=15, max_name_column_width=40
        )
    )


def trl(job: dict, precompute: bool) -> None:
    """TRL's trainer on the same pairs as text; speed from its step callbacks."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    work, tokenizer, train = (
        Path(job["out"]),
        templates.load_tokenizer(job["model"]),
        config.load("expo", "cpu").train,
    )
    rows = read_rows(job["rows"])
    text = [{"prompt": r["prompt_ids"], **r["responses"]} for r in rows]
    text = [
        {name: tokenizer.decode(ids, skip_special_tokens=True) for name, ids in row.items()}
        for row in text
    ]
    settings = DPOConfig(
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
    spent, began = [], []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            began.append(time.perf_counter())

        def on_step_end(self, *_, **__):
            spent.append(time.perf_counter() - began[-1])

    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    trainer = DPOTrainer(
        model,
        args=settings,
        train_dataset=Dataset.from_list(text),
        processing_class=tokenizer,
        callbacks=[Clock()],
    )
    trainer.train()
    kept = spent[SKIP:-1]  # the last batch may be short
    (work / "result.json").write_text(
        json.dumps({"pairs_per_s": train.global_batch * len(kept) / sum(kept)})
    )


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
        job = json.loads(Path(options.child[1]).read_text())
        return (
            profile(job)
            if options.child[0] == "profile"
            else trl(job, precompute=options.child[0] == "trl")
        )
    rows = read_rows(stages.pairs(config.load("expo", "cpu")).get() / "pairs.jsonl")[
        : options.pairs
    ]
    end = templates.load_tokenizer(str(assets.model_dir("smollm2"))).eos_token_id
    for row in rows:  # TRL adds it to every response, so ours have it too
        row["responses"] = {
            name: [t for t in ids if t != end] + [end] for name, ids in row["responses"].items()
        }
    workers.close()
    tokens = sum(
        len(r["prompt_ids"]) * 2 + sum(map(len, r["responses"].values())) for r in rows
    ) / len(rows)
    rounds = []
    for _ in range(options.rounds):
        row = {}
        for kind in ("profile",) if options.profile else ("ours", "trl", "trl_default"):
            with tempfile.TemporaryDirectory() as work:
                write_rows(Path(work, "pairs.jsonl"), rows)
                job = {
                    "model": str(assets.model_dir("smollm2")),
                    "rows": str(Path(work, "pairs.jsonl")),
                    "out": work,
                }
                Path(work, "job.json").write_text(json.dumps(job))
                if kind == "ours":
                    found = ours(job)
                else:
                    found = run([sys.executable, __file__, "--child", kind, Path(work, "job.json")])
                    if options.profile:
                        return print(found["output"])
                    found |= json.loads(Path(work, "result.json").read_text())
                row |= {f"{kind}_{name}": found[name] for name in ("pairs_per_s", "peak_gib")}
                row[f"{kind}_tokens_per_s"] = found["pairs_per_s"] * tokens
        rounds.append(row)
        print(row, flush=True)
    about = {
        "model": "SmolLM2-135M",
        "pairs": len(rows),
        "batch": 8,
        "tokens_per_pair": tokens,
        "precision": "bf16",
    }
    report("train_vs_trl", about, rounds, options.freeze)


if __name__ == "__main__":
    main()
