"""DPO training: ours and TRL's DPOTrainer in turn, on random models and random pairs.

All have the same model, pairs, precision (bf16 autocast over float32 weights), optimizer (fused
AdamW), batch and micro-batch, no gradient checkpointing, and the reference's log-probabilities
computed beforehand. "TRL best" has Liger's kernels in the model's layers besides. All pairs are of
one length, so nobody computes padding. Every training is a process of its own. What is timed are
the optimizer steps after the first ones, in which kernels are compiled and memory is taken.

Useful FLOPs are counted alike for all (beyond_dpo.flops). MFU is their rate over the GPU's peak:
that of its datasheet, and that of a large matrix product on this very card (environment.json).
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import NamedTuple

from models import LLAMA_1B, SMOLLM2_135M, TINY, Shape, pair_flops
from results import Clock, Results, step_arguments

from beyond_dpo import flops

CHILD = Path(__file__).with_name("train_child.py")
OUT_OF_MEMORY = ("OutOfMemoryError", "CUDA out of memory")
VARIANTS = ("trl", "ours", "ours_compiled", "trl_best")  # TRL begins: it needs more memory
LABELS = {
    "ours": "ours",
    "ours_compiled": "ours, compiled",
    "trl": "TRL",
    "trl_best": "TRL best",
}


class Case(NamedTuple):
    """A model and the pairs that it is trained on."""

    name: str
    shape: Shape
    prompt: int  # tokens
    response: int
    global_batch: int  # pairs of an optimizer step
    micro_batch: int  # pairs of a forward pass
    warmup: int  # steps that are not timed
    timed: int


# 64 pairs a step are 98,304 tokens of the first case: 2 to 4 s on an H100, so that six steps, twice
# for each side, fit into the time. 8 pairs a pass are 16,384 tokens for TRL, about 60 of 80 GB.
CASES = (
    Case("1B 512+512", LLAMA_1B, 512, 512, 64, 8, warmup=2, timed=4),
    Case("135M 512+512", SMOLLM2_135M, 512, 512, 64, 8, warmup=2, timed=6),
    # as the reviews of the embedded world: a whole batch in one pass
    Case("135M 16+64", SMOLLM2_135M, 16, 64, 64, 64, warmup=3, timed=12),
)
TINY_CASES = (Case("tiny 16+24", TINY, 16, 24, 4, 2, warmup=1, timed=2),)


class Setting(NamedTuple):
    """What all cases of a run share."""

    work: Path
    precision: str  # bf16, or fp32 where there is no GPU
    gpu: str | None
    matmul_flops: float  # of this card, as measured


def job_of(case: Case, setting: Setting) -> dict:
    """Return the job of train_child.py for a case."""
    folder = setting.work / case.name.replace(" ", "-").replace("+", "-")
    return {
        "shape": case.shape._asdict(),
        "prompt": case.prompt,
        "response": case.response,
        "pairs": case.global_batch * (case.warmup + case.timed),
        "global_batch": case.global_batch,
        "micro_batch": case.micro_batch,
        "precision": setting.precision,
        "model": str(folder / "model"),
        "rows": str(folder / "pairs.jsonl"),
        "reference": str(folder / "reference.safetensors"),
        "out": str(folder / "run"),
    }


def run_child(kind: str, job: dict) -> tuple[dict | None, str]:
    """Run a job in a process of its own; return its result, and what it printed if it failed."""
    out = Path(job["out"])
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    file = out / "job.json"
    file.write_text(json.dumps(job))
    done = subprocess.run(
        [sys.executable, str(CHILD), kind, str(file)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
    )
    print(done.stdout, flush=True)
    result = None
    if done.returncode == 0:
        path = out / "result.json"
        result = json.loads(path.read_text()) if path.exists() else {}
    shutil.rmtree(out / "trained", ignore_errors=True)
    return result, done.stdout


def variants(has_gpu: bool) -> list[str]:
    """Return what can be measured here: TRL where it is installed, its best where Liger is too."""
    kinds = ["ours"]
    if has_gpu:
        kinds.append("ours_compiled")
    if importlib.util.find_spec("trl"):
        kinds.append("trl")
        if has_gpu and importlib.util.find_spec("liger_kernel"):
            kinds.append("trl_best")
    return [kind for kind in VARIANTS if kind in kinds]


def measured(case: Case, kind: str, result: dict, setting: Setting) -> dict:
    """Return the rates of one training, from the seconds of its steps."""
    seconds = result["step_seconds"][case.warmup :]
    if len(seconds) != case.timed:
        raise ValueError(f"{case.name}, {kind}: {len(seconds)} timed steps of {case.timed}")
    pairs_per_s = case.global_batch / median(seconds)
    useful = pairs_per_s * pair_flops(case.shape, case.prompt, case.response)
    peak = flops.peak(setting.gpu or "")
    return {
        "case": case.name,
        "kind": kind,
        "micro_batch": case.micro_batch,
        **result,
        "pairs_per_s": pairs_per_s,
        "tokens_per_s": pairs_per_s * (case.prompt + 2 * case.response),
        "useful_flops_per_s": useful,
        "mfu_datasheet": useful / peak if peak else None,
        "mfu_matmul": useful / setting.matmul_flops,
    }


class Bench:
    """Measure cases, as long as there is time; a case that does not fit gets half its micro-batch.

    That holds for all sides: rates are compared at one micro-batch only.
    """

    def __init__(self, results: Results, clock: Clock, setting: Setting, kinds: list[str]):
        self.results = results
        self.clock = clock
        self.setting = setting
        self.kinds = kinds
        self.longest = {}  # seconds of (case, kind)

    def prepare(self, cases: list[Case]) -> list[Case]:
        """Write what the cases need; return those for which that succeeded."""
        jobs = [job_of(case, self.setting) for case in cases]
        run_child("prepare", {"jobs": jobs, "out": str(self.setting.work / "prepare")})
        ready = []
        for case, job in zip(cases, jobs, strict=True):
            if Path(job["reference"]).exists():
                ready.append(case)
            else:
                self.results.note(f"{case.name} could not be prepared: see the log")
        return ready

    def round(self, number: int, case: Case) -> Case:
        """Measure each side once; return the case, with the micro-batch that it has now."""
        kinds = self.kinds if number % 2 == 0 else self.kinds[::-1]
        for kind in kinds:
            if self.longest.get((case.name, kind), 0) > self.clock.left():
                self.results.note(f"{case.name}, {kind}: no time for round {number + 1}")
                continue
            case = self.one(number, case, kind)
        return case

    def one(self, number: int, case: Case, kind: str) -> Case:
        """Measure one side, at half the micro-batch where memory runs out; return the case."""
        began = perf_counter()
        result, output = run_child(kind, job_of(case, self.setting))
        seconds = perf_counter() - began
        self.longest[case.name, kind] = max(seconds, self.longest.get((case.name, kind), 0))
        if result is not None:
            row = measured(case, kind, result, self.setting)
            self.results.add({**row, "round": number, "process_seconds": seconds})
            return case
        is_full = any(words in output for words in OUT_OF_MEMORY)
        if not is_full or case.micro_batch == 1:
            self.results.note(f"{case.name}, {kind} failed: {last_line(output)}")
            return case
        self.results.note(f"{case.name}, {kind}: out of memory at micro-batch {case.micro_batch}")
        smaller = case._replace(micro_batch=case.micro_batch // 2)
        return self.one(number, smaller, kind)


def last_line(output: str) -> str:
    """Return the last line of what a process printed, cut to a readable length."""
    lines = output.strip().splitlines() or ["no output"]
    return lines[-1][:300]


def rows_of(content: dict, case: str, kind: str) -> list[dict]:
    """Return the measurements of one side of a case, at the smallest micro-batch it had."""
    rows = [row for row in content["measured"] if row["case"] == case]
    if not rows:
        return []
    smallest = min(row["micro_batch"] for row in rows)
    return [row for row in rows if row["kind"] == kind and row["micro_batch"] == smallest]


def summarise(content: dict) -> list[str]:
    """Return a line for each side of each case: medians over the rounds, and our ratio to it."""
    lines = []
    for case in content["settings"]["cases"]:
        name = case["name"]
        ours = rows_of(content, name, "ours")
        for kind in LABELS:
            rows = rows_of(content, name, kind)
            if rows:
                lines.append(f"{name}, {LABELS[kind]}: {told(rows, ours)}")
    return lines


def told(rows: list[dict], ours: list[dict]) -> str:
    """Return the rates of one side's rounds in words."""
    speed = median(row["pairs_per_s"] for row in rows)
    tokens = median(row["tokens_per_s"] for row in rows)
    words = [f"{speed:.4g} pairs/s, {tokens:.4g} tokens/s"]
    if rows[0]["mfu_datasheet"] is not None:
        datasheet = median(row["mfu_datasheet"] for row in rows)
        words.append(f"MFU {datasheet:.1%} of the datasheet")
    words.append(f"{median(row['mfu_matmul'] for row in rows):.1%} of the measured product")
    if "peak_allocated_gib" in rows[0]:
        allocated = max(row["peak_allocated_gib"] for row in rows)
        reserved = max(row["peak_reserved_gib"] for row in rows)
        words.append(f"{allocated:.1f} GiB allocated, {reserved:.1f} reserved")
    words.append(f"micro-batch {rows[0]['micro_batch']}")
    if ours and rows[0]["kind"] != "ours":
        mine = median(row["pairs_per_s"] for row in ours)
        words.append(f"ours ÷ this {mine / speed:.2f}")
    return ", ".join(words)


def chosen(cases: tuple[Case, ...], numbers: str) -> list[Case]:
    """Return the cases of these numbers, such as "1,3"; "": all of them."""
    if not numbers:
        return list(cases)
    return [cases[int(number) - 1] for number in numbers.split(",")]


def case_facts(case: Case) -> dict:
    """Return a case as JSON, with the useful operations of a pair."""
    operations = pair_flops(case.shape, case.prompt, case.response)
    return {**case._asdict(), "shape": case.shape._asdict(), "flops_per_pair": operations}


def main() -> None:
    parser = step_arguments(__doc__)
    parser.add_argument("--kinds", default="", help="of those that are here, some alone")
    parser.add_argument("--cases", default="", help="numbers of some cases, the first one is 1")
    options = parser.parse_args()
    clock = Clock(options.seconds)
    (machine,) = json.loads((options.out / "environment.json").read_text())["measured"]
    gpu = machine["gpu"].get("name")
    setting = Setting(
        work=options.work,
        precision="bf16" if gpu else "fp32",
        gpu=gpu,
        matmul_flops=machine["matmul_flops"],
    )
    cases = chosen(TINY_CASES if options.tiny else CASES, options.cases)
    kinds = variants(bool(gpu))
    if options.kinds:
        kinds = [kind for kind in kinds if kind in options.kinds.split(",")]
    settings = {
        "cases": [case_facts(case) for case in cases],
        "precision": setting.precision,
        "datasheet_flops": flops.peak(gpu or ""),
        "matmul_flops": setting.matmul_flops,
    }
    results = Results(options.out / "train.json", settings, summarise)
    bench = Bench(results, clock, setting, kinds)
    ready = bench.prepare(cases)
    for number in range(options.rounds):
        ready = [bench.round(number, case) for case in ready]
    if not results.content["measured"]:
        sys.exit("nothing was measured")


if __name__ == "__main__":
    main()
