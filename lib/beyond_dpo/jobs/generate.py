"""Sample responses from `θ₁ + α(θ₁ − θ₀)` in one living engine: one start, then a weight swap per
α.

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
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from xxhash import xxh3_128

from beyond_dpo import events, extrapolate, lora, scoring, templates
from beyond_dpo.files import write_file
from beyond_dpo.jobs.settings import Decoding
from beyond_dpo.machine import launch, paths, shards
from beyond_dpo.precision import require_precision

BLOCK = 256  # requests in the engine at one time
PROBE = 16  # tokens whose log-probability tells one set of weights from another
# texts of as many tokens, over the whole vocabulary, by which an engine is compared with
# transformers
TEXTS = 4
# How far two computations of one log-probability may be apart, as a share of it, and how far the
# engine and
# transformers, as a share of what altered weights change: rounding is far below, a tensor that
# stayed behind above.
REPEATED = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 2e-2}
INDEPENDENT = {"float32": 1e-3, "float16": 0.05, "bfloat16": 0.1}


class StaleWeights(RuntimeError):
    """The engine does not compute with the weights it was told to."""


class Engine:
    """Hold one architecture's weights and answer `swap`, `generate` and `logps` calls.

    model: folder the engine starts from (architecture, end tokens). decoding: fields of
    config.Decoding.
    """

    def __init__(self, model: str, decoding: dict, seed: int = 0):
        backend = {"vllm": VllmBackend, "transformers": TransformersBackend}.get(
            decoding["backend"]
        )
        if backend is None:
            raise ValueError(
                f"unknown generation backend {decoding['backend']!r}; there are vllm and "
                "transformers"
            )
        self.decoding, self.model = asdict(Decoding()) | decoding, model
        if self.decoding["dtype"] == "bfloat16":
            require_precision("bf16")
        self.backend = backend(model, self.decoding, seed)
        dtype = self.decoding["dtype"]
        self.precision = (
            dtype if dtype in REPEATED else "bfloat16"
        )  # vLLM knows more names, "auto" is one
        self.probe_text, self.texts = _texts(model)
        self.given, self.whole = (
            (model, None, 0.0, None),
            True,
        )  # arguments of Weights: those that it holds
        self.probes, self.digests = {_name(*self.given): self._probe()}, {}
        self.start_logps, self.checked = None, False

    def swap(
        self, sft: str, aligned: str | None, alpha: float, modules: dict[str, float] | None = None
    ) -> float:
        """Give the engine the weights θ₁ + α(θ₁ − θ₀) and return the log-probability of a fixed
        probe text (nats).

        sft, aligned: folders of θ₀ and θ₁ (None: θ₀ itself), with the tensors of the model that the
        engine started from. modules: as in extrapolate(), patterns of tensor names with an α of
        their own. The first swap of an engine is rehearsed with altered weights and compared with
        transformers. Raises StaleWeights if the engine leaves a tensor out, computes something else
        than transformers, still has the weights before, or finds known weights changed; and as
        extrapolate.tensors(). After any error only another swap helps: it may hold half of each.
        """
        given = (sft, aligned, float(alpha), modules)
        wanted, held = _name(*given), _name(*self.given)
        if wanted != held or not self.whole:
            if not Path(sft).samefile(self.model):
                extrapolate.check(
                    self.model, sft
                )  # a back-end would keep its own tensor where one is missing
            self.whole = False
            if not self.checked:
                self._rehearse()
            digest = self.backend.swap(*given)
            self.backend.stop_at(_end_tokens(*filter(None, given[:2])))
            probe = self._probe()
            self._compare(given, digest, probe)
            self._hold(given, digest, probe)
            self.whole = True
        return self.probes[wanted]

    def _hold(self, given: tuple, digest: str, probe: float) -> None:
        """Note which weights the engine has, the digest of their tensors, and what it computes with
        them.
        """
        self.given = given
        self.probes.setdefault(_name(*given), probe)
        self.digests[_name(*given)] = digest

    def _rehearse(self) -> None:
        """Swap to altered weights of the model it started from, and compare with what transformers
        computes with them.

        Whether all of them arrive depends on the architecture, not on their values: an engine does
        this once.
        """
        if self.start_logps is None:
            self.start_logps = self.backend.logps(self.texts)
        altered = (self.model, None, 0.0, None, True)
        digest = self.backend.swap(*altered)
        found, (right,) = self.backend.logps(self.texts), self._independent(altered)
        share = _distance(found, right) / _distance(self.start_logps, right)
        if not share <= INDEPENDENT[self.precision]:  # NaN is no success either
            raise StaleWeights(
                f"{self.decoding['backend']} does not compute with all of the weights that a swap "
                "brings: "
                f"{found[0]:.4f} nats where transformers has {right[0]:.4f}. For {self.model} and "
                "what is trained "
                "from it use backend transformers, or write each α with extrapolate() and start "
                "an engine of that"
            )
        self._hold(altered, digest, self._probe())
        self.checked = True

    def _compare(self, given: tuple, digest: str | None, probe: float) -> None:
        """Raise StaleWeights if the engine does not hold the weights that it just was given.

        digest: of the tensors that it took, probe: what it computes with them now.
        """
        wanted, held = _name(*given), _name(*self.given)
        about = f"the swap to α={given[2]} of {given[1] or given[0]}"
        same = digest is not None and digest == self.digests.get(held)
        if probe == self.probes[held] and not same:
            # a small step may leave the probe as it is: other texts and transformers tell one from
            # the other
            found = self.backend.logps(self.texts)
            before, now = self._independent(self.given, given)
            if _distance(found, before) < 0.5 * _distance(before, now):
                raise StaleWeights(f"after {about} the probe is still {probe}: old weights")
        if digest != self.digests.get(wanted, digest):
            raise StaleWeights(
                f"{about} took other tensors than the last time: the files have changed meanwhile"
            )
        known = self.probes.get(wanted, probe)
        if abs(known - probe) > REPEATED[self.precision] * abs(probe):
            raise StaleWeights(f"{about} gave the probe {known}, and now {probe}")

    def _independent(self, *weights: tuple) -> list[list[float]]:
        """Return what transformers computes for the texts under each of some weights.

        vLLM changes transformers' classes in its process where it has none of its own: then another
        process does it.
        """
        dtype = (
            self.precision if torch.cuda.is_available() else "float32"
        )  # which a processor is faster at
        job = {"model": self.model, "weights": weights, "texts": self.texts, "dtype": dtype}
        return (
            independent_logps(job)
            if self.decoding["backend"] == "transformers"
            else _in_own_process(job)
        )

    def generate(
        self, prompts: str, out: str, samples: int, seed: int, rank: int = 0, world: int = 1
    ) -> dict | None:
        """Sample `samples` responses per prompt of a JSON file [{"id", "prompt_ids"}, …] into the
        JSONL file `out`.

        One line a response: id, sample, response_ids (end token included if it came), logp (sum of
        ln p of its tokens under these weights before penalties, temperature and truncation, nats).
        Same weights, prompts and seed: same
        responses, whatever the number of processes: decoding.shard prompts are sampled together,
        with a seed of their own. rank, world: of several processes, each of which makes its shards
        only, for shards.merge(); alone it goes on from the shards that are there, and returns how
        many responses there are. Raises ValueError for a
        prompt after which max_tokens do not fit.
        """
        rows, size = json.loads(Path(prompts).read_text(encoding="utf-8")), self.decoding["shard"]
        room = self.decoding["max_model_len"] - self.decoding["max_tokens"]
        for row in rows:
            if not 0 < len(row["prompt_ids"]) <= room:  # vLLM would cut the response without a word
                given = f"prompt {row['id']} has {len(row['prompt_ids'])} tokens"
                raise ValueError(
                    f"{given}; between 1 and max_model_len - max_tokens = {room} can be answered"
                )
        files = shards.parts(out, len(rows), size)
        todo = shards.left(files, rank, world)
        for done, k in enumerate(todo):
            part = rows[k * size : (k + 1) * size]
            asked = [row["prompt_ids"] for row in part]
            tell = partial(_progress, done, len(todo))
            answers = self._held().generate(asked, samples, seed + k * 1_000_003, tell)
            lines = []
            for i, (ids, logp) in enumerate(answers):
                row = part[i // samples]
                entry = {"id": row["id"], "sample": i % samples, "response_ids": ids, "logp": logp}
                lines.append(json.dumps(entry) + "\n")
            write_file(files[k], "".join(lines))
        if world > 1:
            return None
        return shards.counted(shards.merge(out, files))

    def logps(self, sequences: list[list[int]]) -> list[float]:
        """Return ln p (nats) of each sequence given its first token, under the present weights."""
        return self._held().logps(sequences)

    def _held(self):
        if not self.whole:
            raise StaleWeights(
                "the last swap failed and left the engine without whole weights: swap again"
            )
        return self.backend

    def _probe(self) -> float:
        return self.backend.logps([self.probe_text])[0]


def _progress(before: int, shards_in_all: int, done: int, requests: int) -> None:
    events.progress(before * requests + done, shards_in_all * requests)


def _name(
    sft: str, aligned: str | None, alpha: float, modules: dict | None, altered: bool = False
) -> tuple:
    """Name weights by what they come from: two names may be the same weights, one name never is
    two.
    """
    name = (sft, aligned or sft, alpha, *(modules or {}).items())
    return (*name, "altered") if altered else name


def _texts(model: str) -> tuple[list[int], list[list[int]]]:
    """Return the probe, and texts of tokens from all over the vocabulary but its ends, where
    special ones stand.
    """
    from transformers import AutoConfig

    size = AutoConfig.from_pretrained(model).get_text_config().vocab_size
    tokens = torch.linspace(0.1 * size, 0.9 * size, TEXTS * PROBE).long().tolist()
    return [token % size for token in range(100, 100 + PROBE)], [
        tokens[i::TEXTS] for i in range(TEXTS)
    ]


def _distance(left: list[float], right: list[float]) -> float:
    """Return the mean distance of two lists of log-probabilities (nats)."""
    return math.fsum(abs(a - b) for a, b in zip(left, right, strict=True)) / len(left)


def independent_logps(job: dict) -> list[list[float]]:
    """Return ln p (nats) of a job's texts under each of its weights (arguments of `Weights`), by
    transformers alone.
    """
    dtype, scores = getattr(torch, job["dtype"]), []
    for weights in job["weights"]:
        tensors = {
            name: t.to(dtype) if t.is_floating_point() else t for name, t in Weights(*weights)
        }
        scores.append(scoring.plain_logps(job["model"], tensors, job["texts"], dtype))
    return scores


def _in_own_process(job: dict) -> list[list[float]]:
    """Return independent_logps() of a job, from a process that gives its memory back."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "job.json")
        file.write_text(json.dumps(job), encoding="utf-8")
        library = str(paths.LIBRARY)
        environment = launch.without_secrets() | {
            "PYTHONPATH": os.pathsep.join([library, *sys.path])
        }
        environment["BEYOND_DPO_PARENT"] = str(os.getpid())
        command = [sys.executable, "-m", "beyond_dpo.jobs.generate", "--logps", str(file)]
        words = {"encoding": "utf-8", "errors": "replace"}
        done = subprocess.run(command, capture_output=True, env=environment, **words)
        if done.returncode:
            why = done.stderr[-2000:] or f"its process ended with {done.returncode}"
            raise RuntimeError(
                f"transformers cannot compute with the weights of {job['model']}: {why}"
            )
        return json.loads(file.read_text(encoding="utf-8"))


class Weights:
    """Iterate over the tensors of θ₁ + α(θ₁ − θ₀) by name, and tell afterwards which went by.

    altered: each element is 25 % larger or smaller, in a pattern that does not depend on the
    tensor's name.
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
        self.altered, self.finished, self.hash = altered, False, xxh3_128()

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in self.tensors:
            if self.altered and tensor.is_floating_point():
                _alter(tensor)
            self.hash.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            self.hash.update(tensor.contiguous().view(-1).view(torch.uint8).numpy())
            yield name, tensor
        self.finished = True

    def digest(self) -> str:
        """Return a digest of all tensors; raise StaleWeights if some were never asked for."""
        if not self.finished:
            raise StaleWeights("the back-end did not take all of the tensors")
        return self.hash.hexdigest()


def _alter(tensor: torch.Tensor) -> None:
    """Make each element of a tensor a quarter larger or smaller, zeros a hundredth, in place."""
    signs = (
        torch.randint(0, 2, (65_521,), generator=torch.Generator().manual_seed(0)) - 0.5
    )  # a prime: no row's length
    for part in tensor.view(-1).split(len(signs)):
        step = signs[: len(part)]
        part.copy_(part.float() * (1 + 0.5 * step) + 0.02 * step)


class VllmBackend:
    """vLLM in this process; weights go through its own loader, tensor by tensor, and the prefix
    cache is dropped.
    """

    def __init__(self, model: str, decoding: dict, seed: int):
        os.environ.setdefault(
            "VLLM_ENABLE_V1_MULTIPROCESSING", "0"
        )  # this process already is the child
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        from vllm import LLM, SamplingParams
        from vllm.platforms import current_platform

        self.decoding, self.end = decoding, _end_tokens(model)
        extra = {"gpu_memory_utilization": decoding["gpu_share"]}
        self.parameters = partial(SamplingParams, detokenize=False)
        self.own = (
            "presence_penalty",
            "frequency_penalty",
            "top_k",
            "top_p",
        )  # what vLLM does itself
        if (
            current_platform.is_cpu()
        ):  # the built-in sampler counts and sorts the whole vocabulary at every step
            ours = [f"beyond_dpo.jobs.sampling:{name}" for name in ("CpuPenalties", "CpuTopKTopP")]
            extra = {
                "enforce_eager": True,
                "logits_processors": ours,
            }  # its share of memory is VLLM_CPU_KVCACHE_SPACE
            extra["additional_config"], self.own = {name: decoding[name] for name in self.own}, ()
        self.llm = LLM(
            model,
            dtype=decoding["dtype"],
            max_model_len=decoding["max_model_len"],
            seed=seed,
            max_num_seqs=BLOCK,
            skip_tokenizer_init=True,
            generation_config="vllm",
            disable_log_stats=True,
            load_format="safetensors",
            worker_extension_cls="beyond_dpo.jobs.generate.SwapExtension",
            tensor_parallel_size=decoding["tensor_parallel"],
            **extra,
        )

    def stop_at(self, ends: list[int]) -> None:
        self.end = ends

    def swap(self, *weights) -> str:
        digests = self.llm.collective_rpc("swap_weights", args=weights)
        if len(set(digests)) > 1:
            raise StaleWeights(f"the workers of one engine took different tensors: {digests}")
        return digests[0]

    def generate(
        self, prompts: list[list[int]], samples: int, seed: int, tell
    ) -> list[tuple[list[int], float]]:
        # Keys and values of other weights would stay in the cache, and a warm one changes how
        # requests are batched.
        if not self.llm.reset_prefix_cache():
            raise StaleWeights("vLLM kept its prefix cache")
        # a seed per request ends the CPU engine: one generator, prompts in a fixed order
        self.llm.collective_rpc("seed_sampler", args=(seed,))
        given = {name: self.decoding[name] for name in ("temperature", "max_tokens", *self.own)}
        params = self.parameters(**given, stop_token_ids=self.end, logprobs=0)
        # every sample is a request of its own: n > 1 gives the same tokens in an order that is not
        # fixed
        requests, out = [{"prompt_token_ids": p} for p in prompts for _ in range(samples)], []
        for start in range(0, len(requests), BLOCK):
            answers = self.llm.generate(requests[start : start + BLOCK], params, use_tqdm=False)
            out += [
                (list(a.outputs[0].token_ids), float(a.outputs[0].cumulative_logprob))
                for a in answers
            ]
            tell(len(out), len(requests))
        return out

    def logps(self, sequences: list[list[int]]) -> list[float]:
        params = self.parameters(max_tokens=1, prompt_logprobs=0)
        answers = self.llm.generate(
            [{"prompt_token_ids": s} for s in sequences], params, use_tqdm=False
        )
        scores = []
        for ids, answer in zip(sequences, answers, strict=True):
            given = zip(ids[1:], answer.prompt_logprobs[1:], strict=True)
            scores.append(math.fsum(entry[token].logprob for token, entry in given))
        return scores


class SwapExtension:
    """vLLM mixes this into its workers; parameters are packed on the CPU, so only its own loader
    may write them.
    """

    parameter_names: set[str] | None = None  # of the model that the engine started with

    def seed_sampler(self, seed: int) -> None:
        torch.manual_seed(seed)

    def swap_weights(self, *weights) -> str:
        """Give the model the weights that `Weights` iterates over; return their digest.

        Raises StaleWeights for a parameter that vLLM's loader left as it was.
        """
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

        model, stream, assigned = self.model_runner.get_model(), Weights(*weights), set()
        if self.parameter_names is None:  # a swap that fails later may leave tied ones untied
            self.parameter_names = {name for name, _ in model.named_parameters()}
        load = model.load_weights

        def load_and_note(tensors):
            names = load(tensors)
            assigned.update(
                self.parameter_names if names is None else names
            )  # some loaders do not tell
            return names

        model.load_weights = load_and_note
        try:
            self.model_runner.reload_weights(weights_iterator=stream)
        finally:
            del model.load_weights
        if missing := sorted(self.parameter_names - assigned):
            raise StaleWeights(
                f"vLLM's loader left {missing[0]} as it was ({len(missing)} parameters in all)"
            )
        for layer in model.modules():
            if isinstance(
                layer, ParallelLMHead
            ):  # tied to the embeddings, it keeps a packed copy of the old ones
                layer.quant_method.process_weights_after_loading(layer)
        return stream.digest()


class TransformersBackend:
    """transformers' generate(), for machines without vLLM."""

    def __init__(self, model: str, decoding: dict, seed: int):
        self.folder, self.decoding, self.end = model, decoding, _end_tokens(model)
        self.dtype = getattr(torch, decoding["dtype"])
        self.scorer = scoring.load_scorer(model, dtype=self.dtype).eval()
        self.device = self.scorer.model.device
        self.implementation = self.scorer.model.config._attn_implementation
        self.dtypes = {
            name: tensor.dtype for name, tensor in self.scorer.model.state_dict().items()
        }
        self._hold(self.scorer.model)

    def _hold(self, model) -> None:
        self.scorer.model = self.model = model
        self.stop_at(self.end)

    def stop_at(self, ends: list[int]) -> None:
        from transformers import GenerationConfig

        self.end = ends
        # without the model's own sampling defaults, which vLLM does not follow either
        self.model.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=ends[0])

    def swap(self, *weights) -> str:
        """Load the weights that `Weights` iterates over as transformers loads a file; return their
        digest.
        """
        stream, device = Weights(*weights), self.device
        self.scorer.model = self.model = None  # there may be room for one model only
        tensors = {name: tensor.to(self.dtypes.get(name, tensor.dtype)) for name, tensor in stream}
        model = scoring.load_model(self.folder, self.implementation, self.dtype, tensors)
        self._hold(model.eval().to(device))
        return stream.digest()

    @torch.no_grad()
    def generate(
        self, prompts: list[list[int]], samples: int, seed: int, tell
    ) -> list[tuple[list[int], float]]:
        torch.manual_seed(seed)
        d, out, block = self.decoding, [], 64
        requests = [p for p in prompts for _ in range(samples)]
        for start in range(0, len(requests), block):
            part = requests[start : start + block]
            width = max(map(len, part))
            ids = torch.tensor(
                [[self.end[0]] * (width - len(p)) + p for p in part], device=self.model.device
            )
            mask = torch.tensor(
                [[0] * (width - len(p)) + [1] * len(p) for p in part], device=self.model.device
            )
            grown = self.model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=d["max_tokens"],
                **self._choice(),
                logits_processor=[partial(self._penalise, width)],
            )
            said = []
            for tokens in grown[:, width:].tolist():
                stop = next((i + 1 for i, t in enumerate(tokens) if t in self.end), len(tokens))
                said.append(tokens[:stop])
            out += zip(said, self._score(part, said), strict=True)
            tell(len(out), len(requests))
        return out

    def _choice(self) -> dict:
        """Return how generate() chooses a token, from settings as vLLM takes them: temperature 0 is
        greedy.
        """
        if not self.decoding["temperature"]:
            return {"do_sample": False}
        top_k = max(0, self.decoding["top_k"])  # 0 and -1: no limit
        how = {
            "temperature": self.decoding["temperature"],
            "top_k": top_k,
            "top_p": self.decoding["top_p"],
        }
        return {"do_sample": True, **how}

    def _penalise(self, width: int, ids, logits):
        said = ids[:, width:]
        counts = torch.zeros_like(logits).scatter_add_(
            1, said, torch.ones_like(said, dtype=logits.dtype)
        )
        return (
            logits
            - self.decoding["frequency_penalty"] * counts
            - self.decoding["presence_penalty"] * (counts > 0)
        )

    def logps(self, sequences: list[list[int]]) -> list[float]:
        return self._score([s[:1] for s in sequences], [s[1:] for s in sequences])

    @torch.no_grad()
    def _score(self, prompts: list[list[int]], responses: list[list[int]]) -> list[float]:
        given = zip(prompts, responses, strict=True)
        rows = [
            {"id": "", "prompt_ids": prompt, "responses": {"said": response}}
            for prompt, response in given
        ]
        return self.scorer.score(rows, ["said"], self.end[0])["logps"].tolist()


def _end_tokens(*models: str) -> list[int]:
    """Return the token ids at which sampling stops: all with which any of these models may close a
    response.

    Raises ValueError if the models' files name none.
    """
    ends = [end for model in models for end in templates.model_end_tokens(model)]
    if not ends:
        files = "its tokenizer, generation_config.json or config.json"
        raise ValueError(f"{models[0]} names no eos_token_id in {files}")
    return list(dict.fromkeys(ends))


def main() -> None:
    """Serve an Engine to the process that started this one (launch.Worker), or compute what it is
    compared with.
    """
    parser = argparse.ArgumentParser(
        prog="python -m beyond_dpo.jobs.generate", description=main.__doc__
    )
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--serve", type=int, metavar="FD", help="the pipe that calls come through")
    task.add_argument(
        "--logps",
        type=Path,
        metavar="JOB.json",
        help="of independent_logps(); the result replaces it",
    )
    task = parser.parse_args()
    from beyond_dpo.jobs import generate  # not this module, __main__: vLLM imports it by its name

    if task.logps:
        launch.follow_parent()
        asked = json.loads(task.logps.read_text(encoding="utf-8"))
        write_file(task.logps, json.dumps(generate.independent_logps(asked)))
    else:
        launch.serve(generate.Engine)


if __name__ == "__main__":
    main()
