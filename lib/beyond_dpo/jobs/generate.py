"""Sample responses from θ₁ + α(θ₁ − θ₀): one engine starts once, then swaps weights for each α.

`Engine` lives in a child process (`launch.Worker("beyond_dpo.jobs.generate", ...)`).
Prompts and responses are token ids.
The back-end, vLLM or transformers, is chosen by name and never falls back to the other.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from xxhash import xxh3_128

from beyond_dpo import events, extrapolate, lora, scoring, templates
from beyond_dpo.files import write_file
from beyond_dpo.jobs.settings import Decoding
from beyond_dpo.machine import launch, paths, shards
from beyond_dpo.precision import require_precision

VLLM_BLOCK = 256  # requests that vLLM holds at one time
TRANSFORMERS_BLOCK = 64  # requests that transformers samples together, on a GPU at least
GPU_TOKENS = 2**18  # of requests with their longest responses, which a GPU samples together
# Decoding settings that vLLM's own sampler applies on a GPU, and our processors on a CPU.
SAMPLER_SETTINGS = ("presence_penalty", "frequency_penalty", "top_k", "top_p")
PROBE_TOKENS = 16  # of the text whose log-probability tells one set of weights from another
# An engine is compared with transformers on this many texts of PROBE_TOKENS tokens each, which are
# taken from the whole vocabulary.
COMPARED_TEXTS = 4
# Largest relative difference between two computations of one log-probability by one engine.
REPEATED = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 2e-2}
# Largest difference between the engine and transformers, as a share of what altered weights change.
# Rounding stays far below it, and a tensor that a swap left out is above it.
INDEPENDENT = {"float32": 1e-3, "float16": 0.05, "bfloat16": 0.1}


class StaleWeights(RuntimeError):
    """The engine does not compute with the weights it was told to."""


class Point(NamedTuple):
    """Name a model on the line θ₁ + α(θ₁ − θ₀) by what its weights are made from.

    sft, aligned: folders of θ₀ and θ₁ (None: θ₀ itself). modules: as in extrapolate(). altered: its
    weights are changed, as `Weights` says, for a comparison with transformers.
    """

    sft: str
    aligned: str | None
    alpha: float
    modules: dict[str, float] | None = None
    altered: bool = False

    def key(self) -> tuple:
        """Return a hashable name: two keys may be the same weights, one key is never two."""
        modules = self.modules or {}
        key = (self.sft, self.aligned or self.sft, self.alpha, *modules.items())
        return (*key, "altered") if self.altered else key


class Engine:
    """Hold one architecture's weights and answer `swap`, `generate` and `logps` calls.

    model: folder the engine starts from (architecture, end tokens). decoding: fields of
    config.Decoding.
    """

    def __init__(self, model: str, decoding: dict):
        backends = {"vllm": VllmBackend, "transformers": TransformersBackend}
        name = decoding["backend"]
        if name not in backends:
            raise ValueError(
                f"unknown generation backend {name!r}; there are vllm and transformers"
            )
        self.model = model
        self.decoding = asdict(Decoding()) | decoding
        dtype = self.decoding["dtype"]
        if dtype == "bfloat16":
            require_precision("bf16")
        self.backend = backends[name](model, self.decoding)
        # vLLM takes more names of types, such as "auto": they get the widest bounds.
        self.precision = dtype if dtype in REPEATED else "bfloat16"
        vocabulary = _vocabulary_size(model)
        self.probe_text = [token % vocabulary for token in range(100, 100 + PROBE_TOKENS)]
        self.texts = _compared_texts(vocabulary)
        self.point = Point(model, None, 0.0)  # whose weights the engine holds
        self.whole = True  # False from the beginning of a swap until it has succeeded
        self.probes = {self.point.key(): self._probe()}  # nats, by the keys of points
        self.digests = {}  # of the tensors that a swap brought, by the keys of points
        self.start_logps = None  # of the texts, under the weights that it started with
        self.rehearsed = False

    def swap(
        self, sft: str, aligned: str | None, alpha: float, modules: dict[str, float] | None = None
    ) -> float:
        """Load the weights θ₁ + α(θ₁ − θ₀); return the log-probability of a probe text (nats).

        sft, aligned: folders of θ₀ and θ₁ (None: θ₀ itself), with the tensors of the model that the
        engine started from. modules: as in extrapolate(), patterns of tensor names with an α of
        their own. The first swap of an engine is rehearsed with altered weights and compared with
        transformers. Raises StaleWeights if the engine leaves a tensor out, computes something else
        than transformers, still has the weights before, or finds known weights changed; and as
        extrapolate.tensors(). After any error only another swap helps: it may hold half of each.
        """
        point = Point(sft, aligned, float(alpha), modules)
        key = point.key()
        if self.whole and key == self.point.key():
            return self.probes[key]
        if not Path(sft).samefile(self.model):
            # A back-end would keep its own tensor where the model lacks one.
            extrapolate.check(self.model, sft)
        self.whole = False
        if not self.rehearsed:
            self._rehearse()
        digest = self.backend.swap(point)
        folders = [folder for folder in (sft, aligned) if folder]
        self.backend.stop_at(_end_tokens(folders))
        probe = self._probe()
        self._check_swap(point, digest, probe)
        self._hold(point, digest, probe)
        self.whole = True
        return self.probes[key]

    def _hold(self, point: Point, digest: str, probe: float) -> None:
        """Note the point that the engine is at, its tensors' digest, and its probe (nats)."""
        key = point.key()
        self.point = point
        self.probes.setdefault(key, probe)
        self.digests[key] = digest

    def _rehearse(self) -> None:
        """Swap to altered weights of the start model and compare the engine with transformers.

        Whether all tensors arrive depends on the architecture and not on their values, so an engine
        does this once.
        """
        if self.start_logps is None:
            self.start_logps = self.backend.logps(self.texts)
        altered = Point(self.model, None, 0.0, altered=True)
        digest = self.backend.swap(altered)
        engine_logps = self.backend.logps(self.texts)
        (wanted_logps,) = self._independent_logps(altered)
        error = _distance(engine_logps, wanted_logps)
        share = error / _distance(self.start_logps, wanted_logps)
        if not share <= INDEPENDENT[self.precision]:  # NaN is no success either
            raise StaleWeights(
                f"{self.decoding['backend']} does not compute with all of the weights that a swap "
                f"brings: {engine_logps[0]:.4f} nats where transformers has {wanted_logps[0]:.4f}. "
                f"For {self.model} and what is trained from it use backend transformers, or write "
                "each α with extrapolate() and start an engine of that"
            )
        self._hold(altered, digest, self._probe())
        self.rehearsed = True

    def _check_swap(self, point: Point, digest: str, probe: float) -> None:
        """Raise StaleWeights if the engine does not hold the weights of a point after its swap.

        digest: of the tensors that the engine took. probe: what it computes with them now.
        """
        key = point.key()
        swap = f"the swap to α={point.alpha} of {point.aligned or point.sft}"
        self._check_change(point, digest, probe, swap)
        if digest != self.digests.get(key, digest):
            raise StaleWeights(
                f"{swap} took other tensors than the last time: the files have changed meanwhile"
            )
        known = self.probes.get(key, probe)
        if abs(known - probe) > REPEATED[self.precision] * abs(probe):
            raise StaleWeights(f"{swap} gave the probe {known}, and now {probe}")

    def _check_change(self, point: Point, digest: str, probe: float, swap: str) -> None:
        """Raise StaleWeights if other tensors came and the engine still computes with the old ones.

        A small step may leave the probe as it is. Then the other texts are computed by transformers
        with the old and the new weights, and tell which of them the engine has.
        """
        old = self.point.key()
        if probe != self.probes[old] or digest == self.digests.get(old):
            return
        engine_logps = self.backend.logps(self.texts)
        old_logps, new_logps = self._independent_logps(self.point, point)
        if _distance(engine_logps, old_logps) < 0.5 * _distance(old_logps, new_logps):
            raise StaleWeights(f"after {swap} the probe is still {probe}: old weights")

    def _independent_logps(self, *points: Point) -> list[list[float]]:
        """Return what transformers computes for the texts at each point, on the processor (nats).

        vLLM replaces classes of transformers in its own process, so beside vLLM another process
        computes them.
        """
        # A processor is faster at float32 than at the narrower types.
        dtype = self.precision if torch.cuda.is_available() else "float32"
        job = {"model": self.model, "points": points, "texts": self.texts, "dtype": dtype}
        if self.decoding["backend"] == "transformers":
            return independent_logps(job)
        return _in_own_process(job)

    def generate(
        self, prompts: str, out: str, samples: int, seed: int, rank: int = 0, world: int = 1
    ) -> dict | None:
        """Sample `samples` responses to each prompt of a JSON file into the JSONL file `out`.

        prompts: a file of [{"id", "prompt_ids"}, …]. One line a response: id, sample, response_ids
        (end token included if it came), logp (sum of ln p of its tokens under these weights before
        penalties, temperature and truncation, nats).
        Same weights, prompts and seed: same responses, whatever the number of processes:
        decoding.shard prompts are sampled together, with a seed of their own. rank, world: of
        several processes, each of which makes its shards only, for shards.merge(); alone it goes on
        from the shards that are there, and returns how many responses there are. Raises ValueError
        for a prompt after which max_tokens do not fit.
        """
        rows = json.loads(Path(prompts).read_text(encoding="utf-8"))
        self._check_lengths(rows)
        size = self.decoding["shard"]
        files = shards.parts(out, len(rows), size)
        missing = shards.left(files, rank, world)
        for done, shard in enumerate(missing):
            shard_rows = rows[shard * size : (shard + 1) * size]
            shard_seed = seed + shard * 1_000_003
            on_progress = partial(_report_progress, done, len(missing))
            lines = self._sampled_lines(shard_rows, samples, shard_seed, on_progress)
            write_file(files[shard], "".join(lines))
        if world > 1:
            return None
        return shards.counted(shards.merge(out, files))

    def _check_lengths(self, rows: list[dict]) -> None:
        """Raise ValueError for a prompt too long for a response: vLLM would cut it in silence."""
        room = self.decoding["max_model_len"] - self.decoding["max_tokens"]
        for row in rows:
            length = len(row["prompt_ids"])
            if not 0 < length <= room:
                raise ValueError(
                    f"prompt {row['id']} has {length} tokens; between 1 and max_model_len - "
                    f"max_tokens = {room} can be answered"
                )

    def _sampled_lines(
        self, rows: list[dict], samples: int, seed: int, on_progress: Callable[[int, int], None]
    ) -> list[str]:
        """Sample responses to the prompts of rows; return a JSON line for each response."""
        prompts = [row["prompt_ids"] for row in rows]
        answers = self._whole_backend().generate(prompts, samples, seed, on_progress)
        lines = []
        for number, (response, logp) in enumerate(answers):
            prompt_number, sample = divmod(number, samples)
            entry = {
                "id": rows[prompt_number]["id"],
                "sample": sample,
                "response_ids": response,
                "logp": logp,
            }
            lines.append(json.dumps(entry) + "\n")
        return lines

    def logps(self, sequences: list[list[int]]) -> list[float]:
        """Return ln p (nats) of each sequence given its first token, under the present weights."""
        return self._whole_backend().logps(sequences)

    def _whole_backend(self):
        if not self.whole:
            raise StaleWeights(
                "the last swap failed and left the engine without whole weights: swap again"
            )
        return self.backend

    def _probe(self) -> float:
        return self.backend.logps([self.probe_text])[0]


def _report_progress(shards_before: int, shard_count: int, done: int, requests: int) -> None:
    """Report `done` of the `requests` of one shard, as a part of all shards to be made."""
    events.progress(shards_before * requests + done, shard_count * requests)


def _vocabulary_size(model: str) -> int:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(model).get_text_config().vocab_size


def _compared_texts(vocabulary: int) -> list[list[int]]:
    """Return texts of tokens from the whole vocabulary but its ends, where special tokens stand."""
    count = COMPARED_TEXTS * PROBE_TOKENS
    tokens = torch.linspace(0.1 * vocabulary, 0.9 * vocabulary, count).long().tolist()
    return [tokens[first::COMPARED_TEXTS] for first in range(COMPARED_TEXTS)]


def _distance(left: list[float], right: list[float]) -> float:
    """Return the mean distance of two lists of log-probabilities (nats)."""
    differences = [abs(a - b) for a, b in zip(left, right, strict=True)]
    return math.fsum(differences) / len(differences)


def independent_logps(job: dict) -> list[list[float]]:
    """Return ln p (nats) of a job's texts at each of its points, by transformers alone.

    job: model (a folder), points (the arguments of `Weights` each), texts (token ids), dtype.
    """
    dtype = getattr(torch, job["dtype"])
    logps = []
    for point in job["points"]:
        tensors = {}
        for name, tensor in Weights(*point):
            tensors[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
        logps.append(scoring.plain_logps(job["model"], tensors, job["texts"], dtype))
    return logps


def _in_own_process(job: dict) -> list[list[float]]:
    """Return independent_logps() of a job, from a process that gives its memory back."""
    environment = launch.without_secrets()
    environment["PYTHONPATH"] = os.pathsep.join([str(paths.LIBRARY), *sys.path])
    environment["BEYOND_DPO_PARENT"] = str(os.getpid())
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "job.json")
        file.write_text(json.dumps(job), encoding="utf-8")
        done = subprocess.run(
            [sys.executable, "-m", "beyond_dpo.jobs.generate", "--logps", str(file)],
            capture_output=True,
            env=environment,
            encoding="utf-8",
            errors="replace",
        )
        if done.returncode:
            reason = done.stderr[-2000:] or f"its process ended with {done.returncode}"
            raise RuntimeError(
                f"transformers cannot compute with the weights of {job['model']}: {reason}"
            )
        return json.loads(file.read_text(encoding="utf-8"))


class Weights:
    """Iterate over the tensors of θ₁ + α(θ₁ − θ₀) by name, and tell afterwards which went by.

    Takes the fields of a `Point`. altered: each element is 25 % larger or smaller, in a pattern
    that does not depend on the tensor's name.
    """

    def __init__(
        self,
        sft: str,
        aligned: str | None,
        alpha: float,
        modules: dict | None,
        altered: bool = False,
    ):
        self.tensors = lora.tensors(sft, aligned, alpha, modules)
        self.altered = altered
        self.finished = False
        self.hash = xxh3_128()

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in self.tensors:
            if self.altered and tensor.is_floating_point():
                _alter(tensor)
            header = f"{name} {tensor.dtype} {list(tensor.shape)}"
            elements = tensor.contiguous().view(-1)
            self.hash.update(header.encode())
            self.hash.update(elements.view(torch.uint8).numpy())
            yield name, tensor
        self.finished = True

    def digest(self) -> str:
        """Return a digest of all tensors; raise StaleWeights if some were never asked for."""
        if not self.finished:
            raise StaleWeights("the back-end did not take all of the tensors")
        return self.hash.hexdigest()


def _alter(tensor: torch.Tensor) -> None:
    """Make each element of a tensor a quarter larger or smaller, zeros a hundredth, in place."""
    generator = torch.Generator().manual_seed(0)
    # The pattern's length is a prime number, so that it is no row's length.
    signs = torch.randint(0, 2, (65_521,), generator=generator) - 0.5
    for part in tensor.view(-1).split(len(signs)):
        step = signs[: len(part)]
        part.copy_(part.float() * (1 + 0.5 * step) + 0.02 * step)


class VllmBackend:
    """Run vLLM in this process.

    Weights go through its own loader, tensor by tensor. The prefix cache is dropped before each
    sampling.
    """

    def __init__(self, model: str, decoding: dict):
        # This process already is the child that owns the engine.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        from vllm import LLM, SamplingParams
        from vllm.platforms import current_platform

        self.decoding = decoding
        self.end_tokens = _end_tokens([model])
        self.parameters = partial(SamplingParams, detokenize=False)
        if current_platform.is_cpu():
            self.own_settings = ()
            options = _cpu_options(decoding)
        else:
            self.own_settings = SAMPLER_SETTINGS
            options = {"gpu_memory_utilization": decoding["gpu_share"]}
        self.llm = LLM(
            model,
            dtype=decoding["dtype"],
            max_model_len=decoding["max_model_len"],
            seed=0,  # sampling seeds its generator anew
            max_num_seqs=VLLM_BLOCK,
            skip_tokenizer_init=True,
            generation_config="vllm",
            disable_log_stats=True,
            load_format="safetensors",
            worker_extension_cls="beyond_dpo.jobs.generate.SwapExtension",
            tensor_parallel_size=decoding["tensor_parallel"],
            **options,
        )

    def stop_at(self, end_tokens: list[int]) -> None:
        self.end_tokens = end_tokens

    def swap(self, point: Point) -> str:
        """Load the weights of a point in all workers; return the digest of their tensors."""
        digests = self.llm.collective_rpc("swap_weights", args=tuple(point))
        if len(set(digests)) > 1:
            raise StaleWeights(f"the workers of one engine took different tensors: {digests}")
        return digests[0]

    def generate(
        self,
        prompts: list[list[int]],
        samples: int,
        seed: int,
        on_progress: Callable[[int, int], None],
    ) -> list[tuple[list[int], float]]:
        """Return (response, logp) of `samples` responses to each prompt, in the prompts' order."""
        # Keys and values of other weights would stay in the cache, and a warm one changes how
        # requests are batched.
        if not self.llm.reset_prefix_cache():
            raise StaleWeights("vLLM kept its prefix cache")
        # A seed per request ends the CPU engine: one generator, and prompts in a fixed order.
        self.llm.collective_rpc("seed_sampler", args=(seed,))
        names = ("temperature", "max_tokens", *self.own_settings)
        settings = {name: self.decoding[name] for name in names}
        parameters = self.parameters(**settings, stop_token_ids=self.end_tokens, logprobs=0)
        # Every sample is a request of its own: n > 1 gives the same tokens in an order that is not
        # fixed.
        requests = [{"prompt_token_ids": prompt} for prompt in prompts for _ in range(samples)]
        answers = []
        for start in range(0, len(requests), VLLM_BLOCK):
            block = requests[start : start + VLLM_BLOCK]
            for result in self.llm.generate(block, parameters, use_tqdm=False):
                output = result.outputs[0]
                answers.append((list(output.token_ids), float(output.cumulative_logprob)))
            on_progress(len(answers), len(requests))
        return answers

    def logps(self, sequences: list[list[int]]) -> list[float]:
        """Return ln p (nats) of each sequence given its first token."""
        parameters = self.parameters(max_tokens=1, prompt_logprobs=0)
        requests = [{"prompt_token_ids": sequence} for sequence in sequences]
        results = self.llm.generate(requests, parameters, use_tqdm=False)
        sums = []
        for sequence, result in zip(sequences, results, strict=True):
            entries = zip(sequence[1:], result.prompt_logprobs[1:], strict=True)
            sums.append(math.fsum(entry[token].logprob for token, entry in entries))
        return sums


def _cpu_options(decoding: dict) -> dict:
    """Return the options with which vLLM runs on a CPU; VLLM_CPU_KVCACHE_SPACE is its memory.

    The built-in sampler counts and sorts the whole vocabulary at every step: our processors take
    its place.
    """
    return {
        "enforce_eager": True,
        "logits_processors": [
            "beyond_dpo.jobs.sampling:CpuPenalties",
            "beyond_dpo.jobs.sampling:CpuTopKTopP",
        ],
        "additional_config": {name: decoding[name] for name in SAMPLER_SETTINGS},
    }


class SwapExtension:
    """Add weight swaps to vLLM's workers, which mix this class in.

    Parameters are packed on the CPU, so only vLLM's own loader may write them.
    """

    parameter_names: set[str] | None = None  # of the model that the engine started with

    def seed_sampler(self, seed: int) -> None:
        torch.manual_seed(seed)

    def swap_weights(self, *point) -> str:
        """Give the model the weights of a point, by its fields; return their digest.

        Raises StaleWeights for a parameter that vLLM's loader left as it was.
        """
        model = self.model_runner.get_model()
        weights = Weights(*point)
        if self.parameter_names is None:  # a swap that fails later may leave tied ones untied
            self.parameter_names = {name for name, _ in model.named_parameters()}
        assigned = _load_weights(self.model_runner, weights, self.parameter_names)
        missing = sorted(self.parameter_names - assigned)
        if missing:
            raise StaleWeights(
                f"vLLM's loader left {missing[0]} as it was ({len(missing)} parameters in all)"
            )
        _repack_heads(model)
        return weights.digest()


def _load_weights(runner, weights: Weights, parameter_names: set[str]) -> set[str]:
    """Load weights by vLLM's own loader; return which of the parameters it assigned.

    A loader that does not tell is taken to have assigned all of them.
    """
    model = runner.get_model()
    assigned = set()
    load = model.load_weights

    def load_and_note(tensors):
        names = load(tensors)
        assigned.update(parameter_names if names is None else names)
        return names

    model.load_weights = load_and_note
    try:
        runner.reload_weights(weights_iterator=weights)
    finally:
        del model.load_weights
    return assigned


def _repack_heads(model) -> None:
    """Pack the heads anew: one that is tied to the embeddings keeps a packed copy of old ones."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    for layer in model.modules():
        if isinstance(layer, ParallelLMHead):
            layer.quant_method.process_weights_after_loading(layer)


class TransformersBackend:
    """Sample with transformers' generate(), for machines without vLLM."""

    def __init__(self, model: str, decoding: dict):
        self.folder = model
        self.decoding = decoding
        self.end_tokens = _end_tokens([model])
        self.dtype = getattr(torch, decoding["dtype"])
        self.scorer = scoring.load_scorer(model, dtype=self.dtype).eval()
        loaded = self.scorer.model
        self.device = loaded.device
        self.attention = loaded.config._attn_implementation
        self.dtypes = {name: tensor.dtype for name, tensor in loaded.state_dict().items()}
        self._hold(loaded)

    def _hold(self, model) -> None:
        self.model = model
        self.scorer.model = model
        self.stop_at(self.end_tokens)

    def stop_at(self, end_tokens: list[int]) -> None:
        """Let sampling stop at these tokens.

        The model's own sampling defaults are left out, as vLLM does not follow them either.
        """
        from transformers import GenerationConfig

        self.end_tokens = end_tokens
        self.model.generation_config = GenerationConfig(
            eos_token_id=end_tokens, pad_token_id=end_tokens[0]
        )

    def swap(self, point: Point) -> str:
        """Load the weights of a point as transformers loads a file; return their digest."""
        weights = Weights(*point)
        # The old model goes first: there may be room for one model only.
        self.model = None
        self.scorer.model = None
        tensors = {}
        for name, tensor in weights:
            tensors[name] = tensor.to(self.dtypes.get(name, tensor.dtype))
        model = scoring.load_model(self.folder, self.attention, self.dtype, tensors)
        self._hold(model.eval().to(self.device))
        return weights.digest()

    @torch.no_grad()
    def generate(
        self,
        prompts: list[list[int]],
        samples: int,
        seed: int,
        on_progress: Callable[[int, int], None],
    ) -> list[tuple[list[int], float]]:
        """Return (response, logp) of `samples` responses to each prompt, in the prompts' order."""
        torch.manual_seed(seed)
        requests = [prompt for prompt in prompts for _ in range(samples)]
        answers = []
        size = self._block_size()
        for start in range(0, len(requests), size):
            block = requests[start : start + size]
            responses = self._sample(block)
            logps = self._score(block, responses)
            answers += zip(responses, logps, strict=True)
            on_progress(len(answers), len(requests))
        return answers

    def _block_size(self) -> int:
        """Return how many requests are sampled together.

        Each token takes a GPU about as long for many requests as for a few.
        """
        if self.device.type != "cuda":
            return TRANSFORMERS_BLOCK
        return max(TRANSFORMERS_BLOCK, GPU_TOKENS // self.decoding["max_model_len"])

    def _sample(self, prompts: list[list[int]]) -> list[list[int]]:
        """Sample one response to each prompt, all of them together."""
        width = max(len(prompt) for prompt in prompts)
        padded_prompts = []
        masks = []
        for prompt in prompts:
            padding = width - len(prompt)
            padded_prompts.append([self.end_tokens[0]] * padding + prompt)
            masks.append([0] * padding + [1] * len(prompt))
        device = self.model.device
        sequences = self.model.generate(
            torch.tensor(padded_prompts, device=device),
            attention_mask=torch.tensor(masks, device=device),
            max_new_tokens=self.decoding["max_tokens"],
            logits_processor=[partial(self._penalise, width)],
            **self._choice(),
        )
        return [self._until_end(tokens) for tokens in sequences[:, width:].tolist()]

    def _until_end(self, tokens: list[int]) -> list[int]:
        """Return the tokens up to the first end token, which is kept."""
        for place, token in enumerate(tokens):
            if token in self.end_tokens:
                return tokens[: place + 1]
        return tokens

    def _choice(self) -> dict:
        """Return how generate() chooses a token, from settings as vLLM takes them.

        Temperature 0 is greedy; top-k 0 and -1 are no limit.
        """
        if not self.decoding["temperature"]:
            return {"do_sample": False}
        return {
            "do_sample": True,
            "temperature": self.decoding["temperature"],
            "top_k": max(0, self.decoding["top_k"]),
            "top_p": self.decoding["top_p"],
        }

    def _penalise(self, width: int, ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Subtract the presence and frequency penalties of the tokens after a prompt of `width`."""
        response = ids[:, width:]
        ones = torch.ones_like(response, dtype=logits.dtype)
        counts = torch.zeros_like(logits).scatter_add_(1, response, ones)
        frequency = self.decoding["frequency_penalty"] * counts
        presence = self.decoding["presence_penalty"] * (counts > 0)
        return logits - frequency - presence

    def logps(self, sequences: list[list[int]]) -> list[float]:
        """Return ln p (nats) of each sequence given its first token."""
        first = [sequence[:1] for sequence in sequences]
        rest = [sequence[1:] for sequence in sequences]
        return self._score(first, rest)

    @torch.no_grad()
    def _score(self, prompts: list[list[int]], responses: list[list[int]]) -> list[float]:
        rows = []
        for prompt, response in zip(prompts, responses, strict=True):
            rows.append({"id": "", "prompt_ids": prompt, "responses": {"response": response}})
        return self.scorer.score(rows, ["response"], self.end_tokens[0])["logps"].tolist()


def _end_tokens(models: list[str]) -> list[int]:
    """Return the token ids at which sampling stops: any with which one of the models may close.

    Raises ValueError if the models' files name none.
    """
    end_tokens = []
    for model in models:
        end_tokens += templates.model_end_tokens(model)
    if not end_tokens:
        files = "its tokenizer, generation_config.json or config.json"
        raise ValueError(f"{models[0]} names no eos_token_id in {files}")
    return list(dict.fromkeys(end_tokens))


def main() -> None:
    """Serve an Engine to launch.Worker, or compute the log-probabilities it is compared with."""
    parser = argparse.ArgumentParser(
        prog="python -m beyond_dpo.jobs.generate", description=main.__doc__
    )
    tasks = parser.add_mutually_exclusive_group(required=True)
    tasks.add_argument("--serve", type=int, metavar="FD", help="the pipe that calls come through")
    tasks.add_argument(
        "--logps",
        type=Path,
        metavar="JOB.json",
        help="of independent_logps(); the result replaces it",
    )
    options = parser.parse_args()
    # Not this module, which is __main__: vLLM imports it by its name.
    from beyond_dpo.jobs import generate

    if options.logps is None:
        launch.serve(generate.Engine)
        return
    launch.follow_parent()
    job = json.loads(options.logps.read_text(encoding="utf-8"))
    write_file(options.logps, json.dumps(generate.independent_logps(job)))


if __name__ == "__main__":
    main()
