"""Sample responses from `θ₁ + α(θ₁ − θ₀)` in one living engine: one start, then a weight swap per α.

`Engine` lives in a child process (`launch.Worker("beyond_dpo.generate", ...)`); prompts and responses are token ids.
The back-end, vLLM or transformers, is chosen by name and never falls back to the other.
"""

import json
import math
import os
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from beyond_dpo import data, extrapolate, launch, lora, paths, reference, shards
from beyond_dpo.config import Decoding

BLOCK = 256  # requests in the engine at one time
PROBE = 16  # tokens whose log-probability tells one set of weights from another


class StaleWeights(RuntimeError):
    """The engine does not compute with the weights it was told to."""


class Engine:
    """Hold one architecture's weights and answer `swap`, `generate` and `logps` calls.

    model: folder the engine starts from (architecture, end tokens). decoding: fields of config.Decoding. adapters:
    the number and the rank of those (see lora.scaled) that vLLM answers with side by side; then nothing is swapped.
    """

    def __init__(self, model: str, decoding: dict, seed: int = 0, adapters: tuple[int, int] = (0, 0)):
        backend = {"vllm": VllmBackend, "transformers": TransformersBackend}.get(decoding["backend"])
        if backend is None:
            raise ValueError(f"unknown generation backend {decoding['backend']!r}; there are vllm and transformers")
        self.decoding, self.model = asdict(Decoding()) | decoding, model
        self.backend = backend(model, self.decoding, seed, *([adapters] if adapters[0] else []))
        self.weights, self.whole = (model, model, 0.0), True
        self.probes = {self.weights: self._probe()}

    def swap(self, sft: str, aligned: str | None, alpha: float, modules: dict[str, float] | None = None) -> float:
        """Give the engine the weights θ₁ + α(θ₁ − θ₀) and return the log-probability of a fixed probe text (nats).

        sft, aligned: folders of θ₀ and θ₁ (None: θ₀ itself), with the tensors of the model that the engine started
        from. modules: as in extrapolate(), patterns of tensor names with an α of their own. Raises StaleWeights if
        other weights give the very same probe as before, or known weights another one, and as extrapolate.tensors()
        does. After any error only another swap helps: the engine may hold half of each.
        """
        wanted, held = (sft, aligned or sft, float(alpha), *(modules or {}).items()), self.weights
        if wanted != held or not self.whole:
            if not Path(sft).samefile(self.model):
                extrapolate.check(self.model, sft)  # a back-end would keep its own tensor where one is missing
            self.whole = False
            self.backend.swap(sft, aligned, alpha, modules)
            probe = self._probe()
            if probe == self.probes[held] and _source(*held) != _source(*wanted):
                raise StaleWeights(f"after the swap to α={alpha} of {aligned} the probe is still {probe}: old weights")
            if abs(self.probes.setdefault(wanted, probe) - probe) > 1e-3 * abs(probe):
                raise StaleWeights(f"α={alpha} of {aligned} gave the probe {self.probes[wanted]}, and now {probe}")
            self.weights, self.whole = wanted, True
        return self.probes[wanted]

    def generate(
        self, prompts: str, out: str, samples: int, seed: int, rank: int = 0, world: int = 1,
        adapters: dict[str, str] | None = None,
    ) -> dict | None:  # fmt: skip
        """Sample `samples` responses per prompt of a JSON file [{"id", "prompt_ids"}, …] into the JSONL file `out`.

        One line a response: id, sample, response_ids (end token included if it came), logp (sum of ln p of its tokens
        under these weights before penalties, temperature and truncation, nats). Same weights, prompts and seed: same
        responses, whatever the number of processes: decoding.shard prompts are sampled together, with a seed of their
        own. rank, world: of several processes, each of which makes its shards only, for shards.merge(); alone it goes
        on from the shards that are there, and returns how many responses there are. adapters: {name: folder}, each of
        which answers all prompts, in one batch; a line then says which ("adapter"). Raises ValueError for a prompt
        after which max_tokens do not fit.
        """
        rows, size = json.loads(Path(prompts).read_text()), self.decoding["shard"]
        room = self.decoding["max_model_len"] - self.decoding["max_tokens"]
        for row in rows:
            if not 0 < len(row["prompt_ids"]) <= room:  # vLLM would cut the response without a word
                given = f"prompt {row['id']} has {len(row['prompt_ids'])} tokens"
                raise ValueError(f"{given}; between 1 and max_model_len - max_tokens = {room} can be answered")
        files = shards.parts(out, len(rows), size)
        todo = shards.left(files, rank, world)
        for done, k in enumerate(todo):
            part = [(row, name) for row in rows[k * size : (k + 1) * size] for name in adapters or [None]]
            tell, text = partial(_progress, done, len(todo)), ""
            given = {"adapters": [adapters[name] for _, name in part]} if adapters else {}
            asked = [row["prompt_ids"] for row, _ in part]
            answers = self._held().generate(asked, samples, seed + k * 1_000_003, tell, **given)
            for i, (ids, logp) in enumerate(answers):
                row, name = part[i // samples]
                entry = {"id": row["id"], "sample": i % samples, "response_ids": ids, "logp": logp}
                text += json.dumps(entry | ({"adapter": name} if adapters else {})) + "\n"
            paths.write(files[k], text)
        if world > 1:
            return None
        return shards.counted(shards.merge(out, files))

    def logps(self, sequences: list[list[int]]) -> list[float]:
        """Return ln p (nats) of each sequence given its first token, under the present weights."""
        return self._held().logps(sequences)

    def _held(self):
        if not self.whole:
            raise StaleWeights("the last swap failed and left the engine without whole weights: swap again")
        return self.backend

    def _probe(self) -> float:
        return self.backend.logps([list(range(100, 100 + PROBE))])[0]


def _progress(before: int, shards_in_all: int, done: int, requests: int) -> None:
    launch.progress(before * requests + done, shards_in_all * requests)


def _source(sft: str, aligned: str, alpha: float, *modules) -> tuple:
    """Name weights by what they come from: two names may be the same weights, one name never is two."""
    if modules:
        return (sft, aligned, alpha, *modules)
    return (sft,) if alpha == -1 or sft == aligned else (aligned,) if alpha == 0 else (sft, aligned, alpha)


class VllmBackend:
    """vLLM in this process; weights go through its own loader, tensor by tensor, and the prefix cache is dropped."""

    def __init__(self, model: str, decoding: dict, seed: int, adapters: tuple[int, int] = (0, 0)):
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # this process already is the child
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        from vllm import LLM, SamplingParams
        from vllm.platforms import current_platform

        self.decoding, self.end = decoding, _end_tokens(model)
        extra = {"gpu_memory_utilization": decoding["gpu_share"]}
        self.parameters, self.adapters = partial(SamplingParams, detokenize=False), {}
        self.own = ("presence_penalty", "frequency_penalty", "top_k", "top_p")  # what vLLM does itself
        if current_platform.is_cpu():  # the built-in sampler counts and sorts the whole vocabulary at every step
            ours = [f"beyond_dpo.sampling:{name}" for name in ("CpuPenalties", "CpuTopKTopP")]
            extra = {"enforce_eager": True, "logits_processors": ours}  # its share of memory is VLLM_CPU_KVCACHE_SPACE
            extra["additional_config"], self.own = {name: decoding[name] for name in self.own}, ()
        if adapters[0]:
            extra |= {"enable_lora": True, "max_loras": adapters[0], "max_lora_rank": adapters[1]}
        self.llm = LLM(
            model, dtype=decoding["dtype"], max_model_len=decoding["max_model_len"], seed=seed, max_num_seqs=BLOCK,
            skip_tokenizer_init=True, generation_config="vllm", disable_log_stats=True, load_format="safetensors",
            worker_extension_cls="beyond_dpo.generate.SwapExtension",
            tensor_parallel_size=decoding["tensor_parallel"], **extra,
        )  # fmt: skip

    def swap(self, *weights) -> None:
        self.llm.collective_rpc("swap_weights", args=weights)

    def generate(
        self, prompts: list[list[int]], samples: int, seed: int, tell, adapters: list[str] | None = None
    ) -> list[tuple[list[int], float]]:
        # Keys and values of other weights would stay in the cache, and a warm one changes how requests are batched.
        if not self.llm.reset_prefix_cache():
            raise StaleWeights("vLLM kept its prefix cache")
        # a seed per request ends the CPU engine: one generator, prompts in a fixed order
        self.llm.collective_rpc("seed_sampler", args=(seed,))
        given = {name: self.decoding[name] for name in ("temperature", "max_tokens", *self.own)}
        params = self.parameters(**given, stop_token_ids=self.end, logprobs=0)
        # every sample is a request of its own: n > 1 gives the same tokens in an order that is not fixed
        requests, out = [{"prompt_token_ids": p} for p in prompts for _ in range(samples)], []
        loras = [self._adapter(folder) for folder in adapters or () for _ in range(samples)] or None
        for start in range(0, len(requests), BLOCK):
            block = slice(start, start + BLOCK)
            answers = self.llm.generate(requests[block], params, use_tqdm=False, lora_request=loras and loras[block])
            out += [(list(a.outputs[0].token_ids), float(a.outputs[0].cumulative_logprob)) for a in answers]
            tell(len(out), len(requests))
        return out

    def _adapter(self, folder: str):
        from vllm.lora.request import LoRARequest

        return self.adapters.setdefault(folder, LoRARequest(folder, len(self.adapters) + 1, folder))

    def logps(self, sequences: list[list[int]]) -> list[float]:
        params = self.parameters(max_tokens=1, prompt_logprobs=0)
        answers = self.llm.generate([{"prompt_token_ids": s} for s in sequences], params, use_tqdm=False)
        scores = []
        for ids, answer in zip(sequences, answers, strict=True):
            given = zip(ids[1:], answer.prompt_logprobs[1:], strict=True)
            scores.append(math.fsum(entry[token].logprob for token, entry in given))
        return scores


class SwapExtension:
    """vLLM mixes this into its workers; parameters are packed on the CPU, so only its own loader may write them."""

    def seed_sampler(self, seed: int) -> None:
        torch.manual_seed(seed)

    def swap_weights(self, *weights) -> None:
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

        self.model_runner.reload_weights(weights_iterator=lora.tensors(*weights))
        for layer in self.model_runner.get_model().modules():
            if isinstance(layer, ParallelLMHead):  # tied to the embeddings, it keeps a packed copy of the old ones
                layer.quant_method.process_weights_after_loading(layer)


class TransformersBackend:
    """transformers' generate(), for machines without vLLM."""

    def __init__(self, model: str, decoding: dict, seed: int):
        from transformers import GenerationConfig

        self.decoding, self.end = decoding, _end_tokens(model)
        self.scorer = reference.load_scorer(model, dtype=getattr(torch, decoding["dtype"])).eval()
        self.model = self.scorer.model
        # without the model's own sampling defaults, which vLLM does not follow either
        self.model.generation_config = GenerationConfig(eos_token_id=self.end, pad_token_id=self.end[0])

    @torch.no_grad()
    def swap(self, *weights) -> None:
        parameters = dict(self.model.named_parameters())
        for name, tensor in lora.tensors(*weights):
            if name in parameters:  # a stored copy of a tied tensor has no parameter of its own
                parameters[name].copy_(tensor)

    @torch.no_grad()
    def generate(self, prompts: list[list[int]], samples: int, seed: int, tell) -> list[tuple[list[int], float]]:
        torch.manual_seed(seed)
        d, out, block = self.decoding, [], 64
        requests = [p for p in prompts for _ in range(samples)]
        for start in range(0, len(requests), block):
            part = requests[start : start + block]
            width = max(map(len, part))
            ids = torch.tensor([[self.end[0]] * (width - len(p)) + p for p in part], device=self.model.device)
            mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in part], device=self.model.device)
            grown = self.model.generate(
                ids, attention_mask=mask, do_sample=True, temperature=d["temperature"], top_k=d["top_k"],
                top_p=d["top_p"], max_new_tokens=d["max_tokens"], logits_processor=[partial(self._penalise, width)],
            )  # fmt: skip
            said = []
            for tokens in grown[:, width:].tolist():
                stop = next((i + 1 for i, t in enumerate(tokens) if t in self.end), len(tokens))
                said.append(tokens[:stop])
            out += zip(said, self._score(part, said), strict=True)
            tell(len(out), len(requests))
        return out

    def _penalise(self, width: int, ids, logits):
        said = ids[:, width:]
        counts = torch.zeros_like(logits).scatter_add_(1, said, torch.ones_like(said, dtype=logits.dtype))
        return logits - self.decoding["frequency_penalty"] * counts - self.decoding["presence_penalty"] * (counts > 0)

    def logps(self, sequences: list[list[int]]) -> list[float]:
        return self._score([s[:1] for s in sequences], [s[1:] for s in sequences])

    @torch.no_grad()
    def _score(self, prompts: list[list[int]], responses: list[list[int]]) -> list[float]:
        given = zip(prompts, responses, strict=True)
        rows = [{"id": "", "prompt_ids": prompt, "responses": {"said": response}} for prompt, response in given]
        return self.scorer.score(rows, ["said"], self.end[0])["logps"].tolist()


def _end_tokens(model: str) -> list[int]:
    """Return the token ids at which sampling stops: all with which training may close a response.

    Raises ValueError if the model's files name none.
    """
    ends = data.model_end_tokens(model)
    if not ends:
        files = "its tokenizer, generation_config.json or config.json"
        raise ValueError(f"{model} names no eos_token_id in {files}")
    return ends


if __name__ == "__main__":
    from beyond_dpo.generate import Engine as _Engine  # not __main__.Engine: vLLM imports this module by its name

    launch.serve(_Engine)
