"""Sampling responses in float32 on the CPU: our engine, vLLM as it comes, and transformers.

    python benchmarks/sampling.py

256 requests of up to 48 tokens each, with SmolLM2-135M and the sampling settings of profile `cpu`
(temperature, top-k, top-p and penalties). Prompts are the first 8 to 16 tokens of IMDB reviews.
Ours is `beyond_dpo.jobs.generate` as the pipeline starts it. vLLM has its own sampler and its
defaults; like ours it returns the log-probability of each token. transformers has batches of 64,
prompts padded on the left, and returns tokens only. Each has a process of its own, in turn, that
loads the model and samples 32 requests to warm up; what is timed is the sampling of all.
`--profile` says where our time goes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import torch
from measure import report, run
from score_rewards import gemm_rate
from transformers import AutoConfig, AutoModelForCausalLM

from beyond_dpo import flops, templates
from beyond_dpo.machine import launch
from beyond_dpo.pipeline import assets, config, corpus

DTYPE = "float32"  # whatever the frozen results have
REQUESTS = 256
PROMPT_TOKENS = (8, 16)
WARM_UP = 32
TRANSFORMERS_BATCH = 64
KINDS = ("ours", "vllm", "transformers")
SETTINGS = ("temperature", "top_k", "top_p", "presence_penalty", "frequency_penalty", "max_tokens")


def review_prompts(number: int) -> list[dict]:
    """Return rows of reviews' first tokens, of all lengths in turn."""
    tokenizer = templates.load_tokenizer(assets.model_dir("smollm2"))
    _, reviews, _ = corpus.shuffled("imdb")
    shortest, longest = PROMPT_TOKENS
    rows = []
    for i, (review, _) in enumerate(reviews[:number]):
        length = shortest + i % (longest - shortest + 1)
        ids = templates.render(tokenizer, review, "plain")
        rows.append({"id": str(i), "prompt_ids": ids[:length]})
    return rows


def write_job(work: Path, requests: int) -> None:
    """Write prompts.json, and job.json with what a sampling needs."""
    (work / "prompts.json").write_text(json.dumps(review_prompts(requests)))
    decoding = dataclasses.asdict(config.load("expo", "cpu").decoding) | {"dtype": DTYPE}
    job = {"model": str(assets.model_dir("smollm2")), "decoding": decoding, "work": str(work)}
    (work / "job.json").write_text(json.dumps(job))


def ours(job: dict):
    """Return a function that samples responses to rows with our engine."""
    from beyond_dpo.jobs.generate import Engine

    engine = Engine(job["model"], job["decoding"])
    prompts = Path(job["work"], "our_prompts.json")
    out = Path(job["work"], "our_responses.jsonl")

    def sample(rows: list[dict]) -> list[list[int]]:
        prompts.write_text(json.dumps(rows))
        out.unlink(missing_ok=True)
        engine.generate(str(prompts), str(out), samples=1, seed=0)
        lines = out.read_text().splitlines()
        return [json.loads(line)["response_ids"] for line in lines]

    return sample


def vllm(job: dict):
    """Return a function that samples responses to rows with vLLM as it comes.

    It would take 92 % of the memory for keys and values; 4 GiB hold all requests.
    """
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")
    from vllm import LLM, SamplingParams

    decoding = job["decoding"]
    engine = LLM(
        job["model"],
        dtype=decoding["dtype"],
        max_model_len=decoding["max_model_len"],
        generation_config="vllm",
    )
    settings = {name: decoding[name] for name in SETTINGS}
    parameters = SamplingParams(**settings, logprobs=0, detokenize=False)

    def sample(rows: list[dict]) -> list[list[int]]:
        requests = [{"prompt_token_ids": row["prompt_ids"]} for row in rows]
        engine.reset_prefix_cache()
        results = engine.generate(requests, parameters, use_tqdm=False)
        return [list(result.outputs[0].token_ids) for result in results]

    return sample


def transformers(job: dict):
    """Return a function that samples responses to rows with generate() of transformers."""
    from beyond_dpo.jobs.generate import TRANSFORMERS_BLOCK, TransformersBackend

    assert TRANSFORMERS_BLOCK == TRANSFORMERS_BATCH
    backend = TransformersBackend(job["model"], job["decoding"])

    @torch.no_grad()
    def sample(rows: list[dict]) -> list[list[int]]:
        torch.manual_seed(0)
        prompts = [row["prompt_ids"] for row in rows]
        responses = []
        for start in range(0, len(prompts), TRANSFORMERS_BATCH):
            responses += backend._sample(prompts[start : start + TRANSFORMERS_BATCH])
        return responses

    return sample


def child(kind: str, file: str) -> None:
    """Sample in this process, which `run_child` started; write result.json."""
    job = json.loads(Path(file).read_text())
    work = Path(job["work"])
    rows = json.loads((work / "prompts.json").read_text())
    samplers = {"ours": ours, "vllm": vllm, "transformers": transformers, "profile": ours}
    sample = samplers[kind](job)
    sample(rows[:WARM_UP])
    if kind == "profile":
        with torch.profiler.profile() as profiler:
            sample(rows)
        print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=30))
        return
    began = time.perf_counter()
    responses = sample(rows)
    seconds = time.perf_counter() - began
    result = {"seconds": seconds, "responses": responses}
    (work / "result.json").write_text(json.dumps(result))


def run_child(kind: str, work: Path) -> dict:
    """Sample in a process of its own, with the environment of our children if it is ours."""
    environment = {}
    if kind in ("ours", "profile"):
        environment = child_environment()
    command = [sys.executable, __file__, "--child", kind, work / "job.json"]
    return run(command, **environment)


def child_environment() -> dict[str, str]:
    """Return what launch sets for the threads of a child."""
    environment = {"OMP_NUM_THREADS": str(launch.threads())}
    if not any(name in os.environ for name in launch.WAITING):
        environment["OMP_WAIT_POLICY"] = "PASSIVE"
    return environment


def counted(rows: list[dict], responses: list[list[int]]) -> float:
    """Return the operations of the matrix products that these responses need."""
    shape = AutoConfig.from_pretrained(assets.model_dir("smollm2"))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape)
    answered = []
    for row, response in zip(rows, responses, strict=True):
        answered.append({**row, "responses": {"response": response}})
    return flops.forward(model, answered, ["response"])


def measure_round(work: Path) -> dict[str, float]:
    """Sample in each of the three ways, one after the other."""
    rows = json.loads((work / "prompts.json").read_text())
    rate = gemm_rate()
    row = {"gemm_gflops": rate / 1e9}
    for kind in KINDS:
        peak = run_child(kind, work)["peak_gib"]
        result = json.loads((work / "result.json").read_text())
        responses = result["responses"]
        tokens = sum(len(response) for response in responses)
        operations = counted(rows, responses)
        row[f"{kind}_tokens_per_s"] = tokens / result["seconds"]
        row[f"{kind}_share_of_gemm"] = operations / result["seconds"] / rate
        row[f"{kind}_mean_tokens"] = tokens / len(responses)
        row[f"{kind}_peak_gib"] = peak
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=REQUESTS)
    parser.add_argument(
        "--freeze", action="store_true", help="write data/frozen/benchmarks/sampling.json"
    )
    parser.add_argument("--profile", action="store_true", help="only show what our time goes to")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(*options.child)
        return
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        write_job(work, options.requests)
        if options.profile:
            print(run_child("profile", work)["output"])
            return
        rounds = []
        for _ in range(options.rounds):
            rounds.append(measure_round(work))
            print(json.dumps(rounds[-1]), flush=True)
    settings = {
        "model": "SmolLM2-135M",
        "dtype": DTYPE,
        "requests": options.requests,
        "prompt_tokens": PROMPT_TOKENS,
        "transformers_batch": TRANSFORMERS_BATCH,
    }
    report("sampling", settings, rounds, options.freeze)


if __name__ == "__main__":
    main()
