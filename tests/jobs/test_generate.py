"""Generation: one living vLLM engine over a sweep of α against checkpoints and transformers, on a
tiny random model.

The engine runs in a child process that starts once for all tests; this file is also that child's
program.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import time
from collections import Counter
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from scipy.stats import chi2
from transformers import AutoModelForCausalLM

from beyond_dpo import extrapolate, precision, scoring
from beyond_dpo.jobs import generate
from beyond_dpo.jobs.generate import Engine, StaleWeights, TransformersBackend
from beyond_dpo.machine import launch, paths
from beyond_dpo.pipeline import assets

DECODING = {
    "backend": "vllm",
    "temperature": 0.7,
    "top_k": 12,
    "top_p": 0.9,
    "presence_penalty": 0.6,
    "frequency_penalty": 0.4,
    "max_tokens": 12,
    "dtype": "float32",
    "max_model_len": 512,
}
TEXT = [0, *range(40, 70), 7, 300, 511, 2, 33]
LONG = [
    0,
    *(i % 500 + 5 for i in range(399)),
]  # three of vLLM's blocks on the CPU, so that its prefix cache is used
PROMPTS = [[0, 10 + i, *range(60, 60 + i)] for i in range(16)]
END = [1, *range(200, 260)]


class Sabotaged(Engine):
    """The engine, with the faults and the other decoding that the tests want of it."""

    def decode(self, **decoding):
        self.decoding.update(decoding)
        if "vllm" in self.decoding["backend"]:
            self.backend.llm.llm_engine.vllm_config.additional_config.update(decoding)

    def swap_without_effect(self, **arguments):
        swap, self.backend.swap = self.backend.swap, lambda *weights: None
        try:
            self.swap(**arguments)
        finally:
            self.backend.swap = swap


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A tiny SFT model with peaked predictions and several end tokens, and an "aligned" one 3 % of
    its weights away.
    """
    folder = tmp_path_factory.mktemp("models")
    weights = load_file(assets.model_dir("tiny") / "model.safetensors")
    random = torch.Generator().manual_seed(5)
    for name, share in {"sft": 0.0, "aligned": 0.03}.items():
        shutil.copytree(assets.model_dir("tiny"), folder / name)
        Path(folder, name, "generation_config.json").write_text(
            json.dumps({"eos_token_id": END, "bos_token_id": 0})
        )
        new = {}
        for key, value in weights.items():
            value = value * (12 if "embed" in key else 4 if value.ndim == 2 else 1)
            new[key] = value + share * value.std(correction=0) * torch.randn(
                value.shape, generator=random
            )
        save_file(new, folder / name / "model.safetensors", metadata={"format": "pt"})
    extrapolate.extrapolate(
        folder / "sft", folder / "aligned", {a: folder / f"{a}" for a in (0, -1, 0.5, 3)}
    )
    return folder


@pytest.fixture(scope="module")
def reference(models):
    """ln p of sequences after `given` tokens under a written checkpoint, by transformers."""
    loaded = {}

    def logp(name, ids, given=1):
        if name not in loaded:
            loaded[name] = AutoModelForCausalLM.from_pretrained(
                models / str(name), dtype=torch.float32
            )
        with torch.no_grad():
            logps = loaded[name](torch.tensor([ids])).logits[0].log_softmax(-1)
        return math.fsum(logps[i - 1, ids[i]].item() for i in range(given, len(ids)))

    logp.models = loaded
    return logp


@pytest.fixture(scope="module")
def engine(models, tmp_path_factory):
    here = os.pathsep.join([str(Path(__file__).parent), str(paths.ROOT / "lib")])
    workdir, began = tmp_path_factory.mktemp("engine"), time.monotonic()
    settings = {"model": str(models / "sft"), "decoding": DECODING}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"PYTHONPATH": here, "VLLM_CPU_OMP_THREADS_BIND": "nobind"}.items():
            patch.setenv(name, value)
        worker = launch.Worker("test_generate", settings, workdir, desc="vllm")
    with worker:
        yield SimpleNamespace(call=worker.call, start=time.monotonic() - began)


@pytest.fixture
def swap(engine, models):
    return lambda alpha: engine.call(
        "swap", sft=str(models / "sft"), aligned=str(models / "aligned"), alpha=alpha
    )


@pytest.fixture(scope="module")
def transformers_engine(models):
    return Sabotaged(str(models / "sft"), DECODING | {"backend": "transformers"})


FAILED = (StaleWeights, launch.JobFailed)  # of an engine in this process, and of a Worker's


def calls(engine):
    """Return how a method of a Worker, or of an Engine in this process, is called by its name."""
    return (
        engine.call
        if hasattr(engine, "call")
        else lambda method, **given: getattr(engine, method)(**given)
    )


def sample(engine, folder, prompts=PROMPTS, samples=1, seed=0):
    """Responses of a Worker or of an Engine in this process."""
    call = calls(engine)
    rows = [{"id": f"p{i}", "prompt_ids": p} for i, p in enumerate(prompts)]
    Path(folder, "prompts.json").write_text(json.dumps(rows))
    where = {"prompts": str(folder / "prompts.json"), "out": str(folder / "out.jsonl")}
    facts = call("generate", **where, samples=samples, seed=seed)
    lines = [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]
    assert [(r["id"], r["sample"]) for r in lines] == [
        (r["id"], s) for r in rows for s in range(samples)
    ]
    assert facts == {"responses": len(lines), "tokens": sum(len(r["response_ids"]) for r in lines)}
    return lines


def ids(lines):
    return [r["response_ids"] for r in lines]


def test_sweep_equals_checkpoints_written_by_the_extrapolator(engine, swap, reference):
    """Each α, the end points, and a way back: the engine's ln p of a text is that of the checkpoint
    of this α.
    """
    expected = {alpha: reference(alpha, TEXT) for alpha in (0, -1, 0.5, 3)}
    apart = sorted(expected.values())
    assert all(b - a > 0.01 for a, b in itertools.pairwise(apart)), "too alike to tell"
    probes = {}
    for alpha in (-1, 0, 0.5, 3, 0.5, 0, -1):
        probe = swap(alpha)
        assert probe == pytest.approx(probes.setdefault(alpha, probe), abs=1e-4)
        assert engine.call("logps", sequences=[TEXT, TEXT[:9]]) == pytest.approx(
            [expected[alpha], reference(alpha, TEXT[:9])], abs=2e-3
        )
    assert len(set(probes.values())) == 4
    assert expected[-1] == pytest.approx(reference("sft", TEXT), abs=1e-6)


def test_alpha_of_a_part_equals_its_checkpoint(engine, models, reference, tmp_path):
    """Attention moves to α = 3, the rest stays at the aligned model; the same α for all is another
    model.
    """
    given = {"sft": str(models / "sft"), "aligned": str(models / "aligned"), "alpha": 0.0}
    modules = {"*.self_attn.*": 3.0}
    extrapolate.extrapolate(
        models / "sft", models / "aligned", {0.0: models / "attention"}, modules=modules
    )
    engine.call("swap", **given, modules=modules)
    (found,) = engine.call("logps", sequences=[TEXT])
    assert found == pytest.approx(reference("attention", TEXT), abs=2e-3)
    assert abs(found - reference(0, TEXT)) > 0.01 and abs(found - reference(3, TEXT)) > 0.01
    engine.call("swap", **given)
    assert engine.call("logps", sequences=[TEXT]) == pytest.approx([reference(0, TEXT)], abs=2e-3)


def test_swap_is_cheap(engine, swap, record_property):
    """A sweep pays a swap, not a start, per α."""
    swap(0)
    began = time.monotonic()
    swap(3)
    seconds = time.monotonic() - began
    record_property("start_seconds", round(engine.start, 2))
    record_property("swap_seconds", round(seconds, 2))
    print(f"start {engine.start:.1f} s, swap {seconds:.2f} s")
    assert seconds < engine.start / 10


def test_swap_drops_cached_prefixes(engine, swap, reference, tmp_path):
    """The second prompt of a pair reads the first one's blocks; after a swap it must not read the
    old weights' ones.
    """
    for alpha in (0, 3, 0):
        swap(alpha)
        for row in sample(engine, tmp_path, [LONG, LONG]):
            given = LONG + row["response_ids"]
            assert row["logp"] == pytest.approx(reference(alpha, given, len(LONG)), abs=2e-3)


@pytest.mark.parametrize("backend, attempts", [("vllm", 1), ("transformers", 2)])
def test_weights_that_did_not_change_are_noticed(backend, attempts, request, models):
    """However often it is tried; the next swap that works is none of them."""
    call = calls(request.getfixturevalue("engine" if backend == "vllm" else "transformers_engine"))
    where = {"sft": str(models / "sft"), "aligned": str(models / "aligned")}
    first = call("swap", **where, alpha=0)
    for _ in range(attempts):
        with pytest.raises(FAILED, match=r"(?s)after the swap to α=0\.5 .*old weights"):
            call("swap_without_effect", **where, alpha=0.5)
    with pytest.raises(FAILED, match="the last swap failed"):
        call("logps", sequences=[TEXT])
    assert (
        call("swap", **where, alpha=0.5)
        != first
        == pytest.approx(call("swap", **where, alpha=0), abs=1e-4)
    )


def test_known_weights_that_changed_are_noticed(transformers_engine, models):
    engine, where = (
        transformers_engine,
        {"sft": str(models / "sft"), "aligned": str(models / "aligned")},
    )
    first = engine.swap(**where, alpha=0)
    engine.swap(**where, alpha=3)
    engine.probes[*where.values(), 0.0] += 1
    with pytest.raises(StaleWeights, match="gave the probe .* and now"):
        engine.swap(**where, alpha=0)
    engine.probes[*where.values(), 0.0] = first
    assert engine.swap(**where, alpha=0) == pytest.approx(first, abs=1e-6)


@pytest.mark.parametrize("backend", ["vllm", "transformers"])
def test_failed_swap_leaves_no_half_model(backend, request, models, reference):
    """α = 1e39 leaves the range of float32 when the engine already has some tensors: the α held
    before is gone too.
    """
    worker = request.getfixturevalue("engine" if backend == "vllm" else "transformers_engine")
    call = (
        worker.call
        if backend == "vllm"
        else lambda method, **given: getattr(worker, method)(**given)
    )
    where = {"sft": str(models / "sft"), "aligned": str(models / "aligned")}
    call("swap", **where, alpha=3)
    for _ in range(2):
        with pytest.raises((ValueError, launch.JobFailed), match=r"alpha=1e\+39"):
            call("swap", **where, alpha=1e39)
        with pytest.raises((StaleWeights, launch.JobFailed), match="the last swap failed"):
            call("logps", sequences=[TEXT])
        call("swap", **where, alpha=3)
        assert call("logps", sequences=[TEXT]) == pytest.approx([reference(3, TEXT)], abs=2e-3)


@pytest.mark.parametrize("backend", ["vllm", "transformers"])
def test_a_models_own_weights_need_no_second_model(backend, request, models, reference):
    """Also those that the engine started with: after a sweep, and after a swap that failed."""
    worker = request.getfixturevalue("engine" if backend == "vllm" else "transformers_engine")
    call = (
        worker.call
        if backend == "vllm"
        else lambda method, **given: getattr(worker, method)(**given)
    )
    where = {"sft": str(models / "sft"), "aligned": str(models / "aligned")}
    for before, own in ((3, "sft"), (3, "aligned"), (1e39, "sft"), (0.5, "3")):
        fails = (
            pytest.raises((ValueError, launch.JobFailed), match="leaves the range")
            if before > 3
            else nullcontext()
        )
        with fails:
            call("swap", **where, alpha=before)
        call("swap", sft=str(models / own), aligned=None, alpha=0.0)
        assert call("logps", sequences=[TEXT]) == pytest.approx([reference(own, TEXT)], abs=2e-3)


def test_models_of_another_shape_are_refused(transformers_engine, models, tmp_path):
    """A tensor that the engine has and the checkpoint lacks would silently keep its old value."""
    for name in ("sft", "aligned"):
        shutil.copytree(models / name, tmp_path / name)
        weights = load_file(tmp_path / name / "model.safetensors")
        del weights["model.layers.1.mlp.up_proj.weight"]
        save_file(weights, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(extrapolate.IncompatibleModels, match="up_proj"):
        transformers_engine.swap(str(tmp_path / "sft"), str(tmp_path / "aligned"), 1.0)


@pytest.mark.parametrize("backend", ["vllm", "transformers"])
def test_responses(backend, request, swap, models, reference, tmp_path):
    """They end with an end token or have max_tokens; logp is ln p of the response; the seed alone
    decides the draw.
    """
    if backend == "vllm":
        worker = request.getfixturevalue("engine")
        swap(0.5)
    else:
        worker = request.getfixturevalue("transformers_engine")
        worker.swap(str(models / "sft"), str(models / "aligned"), 0.5)
    lines = sample(worker, tmp_path, samples=4, seed=3)
    ended = [r["response_ids"][-1] in END for r in lines]
    assert all(
        done or len(r["response_ids"]) == DECODING["max_tokens"]
        for done, r in zip(ended, lines, strict=True)
    )
    assert not any(t in END for r in lines for t in r["response_ids"][:-1])
    assert 0 < sum(ended) < len(lines) == 64, "one way to end was not seen"
    for row in lines:
        prompt = PROMPTS[int(row["id"][1:])]
        expected = reference(0.5, prompt + row["response_ids"], len(prompt))
        assert row["logp"] == pytest.approx(expected, abs=2e-3)
    assert ids(sample(worker, tmp_path, samples=4, seed=3)) == ids(lines)
    other = ids(sample(worker, tmp_path, samples=4, seed=4))
    assert sum(a != b for a, b in zip(other, ids(lines), strict=True)) > 48


def test_a_warm_cache_changes_no_response(engine, swap, tmp_path):
    """Cached prefixes would let more prompts into one step, and so change which random numbers each
    gets.
    """
    swap(0)
    prompts = [LONG[: 390 - i] for i in range(24)]
    first = sample(engine, tmp_path, prompts, samples=2, seed=1)
    assert sample(engine, tmp_path, prompts, samples=2, seed=1) == first


def distributions(model, prompt, said):
    """What each token of a response is drawn from by the definition: penalties, temperature, top-k,
    top-p.
    """
    with torch.no_grad():
        logits = model(torch.tensor([prompt + said])).logits[0, len(prompt) - 1 : -1]
    for i, token in enumerate(said[:-1]):
        again = (
            DECODING["presence_penalty"] * (token not in said[:i]) + DECODING["frequency_penalty"]
        )
        logits[i + 1 :, token] -= again
    values, tokens = (logits / DECODING["temperature"]).topk(DECODING["top_k"])
    p = values.softmax(-1)
    p = p * (p.cumsum(-1) - p < DECODING["top_p"])
    p /= p.sum(-1, keepdim=True)
    return [dict(zip(*row, strict=True)) for row in zip(tokens.tolist(), p.tolist(), strict=True)]


@pytest.mark.parametrize("backend", ["vllm", "transformers"])
def test_samples_follow_the_definition(backend, request, swap, models, reference, tmp_path):
    """First tokens: χ² against the exact distribution (99.99 % bound). Later ones: none outside
    top-k and top-p after penalties, and their mean surprise equals the mean entropy of what they
    are drawn from within five standard errors.
    """
    worker = request.getfixturevalue("engine" if backend == "vllm" else "transformers_engine")
    if backend == "vllm":
        swap(0)
    else:
        worker.swap(str(models / "sft"), str(models / "aligned"), 0)
    reference(0, TEXT)
    model, prompt, n = reference.models[0], PROMPTS[2], 768
    said = ids(sample(worker, tmp_path, [prompt], samples=n, seed=7))
    exact = {t: p for t, p in distributions(model, prompt, said[0])[0].items() if p}
    counts = Counter(response[0] for response in said)
    assert 4 <= len(exact) < DECODING["top_k"] and counts.keys() <= exact.keys(), (
        "top-p must cut something"
    )
    statistic = sum((counts[t] - n * p) ** 2 / (n * p) for t, p in exact.items())
    assert statistic < chi2.ppf(0.9999, len(exact) - 1)
    excess = []
    for response in said[:256]:
        for token, p in zip(response, distributions(model, prompt, response), strict=True):
            assert p.get(token), f"token {token} is outside top-k and top-p"
            excess.append(-math.log(p[token]) + sum(q * math.log(q) for q in p.values() if q))
    excess = torch.tensor(excess)
    assert len(excess) > 2000 and abs(excess.mean()) < 5 * excess.std() / len(excess) ** 0.5


def test_top_k_1_is_greedy(engine, swap, tmp_path):
    """With k = 1 the processor leaves one token at temperature 1; without limits the same seed
    gives something else.
    """
    swap(0)
    try:
        engine.call("decode", temperature=0.0)
        greedy = ids(sample(engine, tmp_path))
        engine.call("decode", temperature=1.0, top_k=1, top_p=1.0)
        assert ids(sample(engine, tmp_path)) == greedy
        engine.call("decode", top_k=0, top_p=1e-6)
        assert ids(sample(engine, tmp_path)) == greedy
        engine.call("decode", top_k=0, top_p=1.0)
        assert ids(sample(engine, tmp_path)) != greedy
    finally:
        engine.call("decode", **{k: DECODING[k] for k in ("temperature", "top_k", "top_p")})


def test_temperature_0_is_greedy_in_both_backends(
    engine, swap, transformers_engine, models, tmp_path
):
    """The likeliest token after penalties, whatever top-k and top-p; -1 and 0 are no limit, as vLLM
    takes them.
    """
    swap(0)
    transformers_engine.swap(str(models / "sft"), str(models / "aligned"), 0)
    seen = set()
    try:
        for limits in (
            {"top_k": 12, "top_p": 0.9},
            {"top_k": -1, "top_p": 1.0},
            {"top_k": 0, "top_p": 0.5},
        ):
            for worker in (engine, transformers_engine):
                decode = getattr(worker, "decode", None) or partial(worker.call, "decode")
                decode(temperature=0.0, **limits)
                seen.add(json.dumps(ids(sample(worker, tmp_path, PROMPTS[:6], seed=len(seen)))))
                decode(temperature=0.7, **limits)
                sample(worker, tmp_path, PROMPTS[:2])
    finally:
        back = {key: DECODING[key] for key in ("temperature", "top_k", "top_p")}
        transformers_engine.decode(**back)
        engine.call("decode", **back)
    (greedy,) = seen
    assert len({tuple(said) for said in json.loads(greedy)}) > 3, "not one answer to all"


def test_model_defaults_do_not_decide(models, tmp_path):
    """A generation config that forbids all tokens but two (and repeats none) is no part of our
    decoding.
    """
    shutil.copytree(models / "sft", tmp_path / "model")
    loud = {
        "eos_token_id": END,
        "suppress_tokens": list(range(2, 512)),
        "repetition_penalty": 5.0,
        "min_new_tokens": 9,
    }
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(loud))
    decoding = DECODING | {"backend": "transformers"}
    both = [Engine(str(folder), decoding) for folder in (models / "sft", tmp_path / "model")]
    one, other = [sample(engine, tmp_path) for engine in both]
    assert one == other


def test_a_response_that_may_not_fit_is_refused(transformers_engine, models, tmp_path):
    transformers_engine.swap(str(models / "sft"), str(models / "aligned"), 0)
    sample(transformers_engine, tmp_path, [[5] * 500])
    for prompt, tokens in (([5] * 501, 501), ([], 0)):
        with pytest.raises(
            ValueError, match=f"prompt p1 has {tokens} tokens; between 1 and .* = 500"
        ):
            sample(transformers_engine, tmp_path, [[5], prompt])


# ---- whether all weights arrive

SMALL = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
PLAIN = {"backend": "transformers", "max_tokens": 8, "max_model_len": 64, "dtype": "float32"}
GROUPED = SMALL | {"num_key_value_heads": 2}
EXPERTS = {
    "num_experts_per_tok": 2,
    "num_local_experts": 4,
    "num_experts": 4,
    "moe_intermediate_size": 16,
}
RENAMED = {  # names in memory are others than in the file, tensors are merged, or are buffers
    "mixtral": lambda: transformers.MixtralConfig(**GROUPED, **EXPERTS),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(**GROUPED, **EXPERTS, head_dim=8),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**SMALL),
    "gemma4_text": lambda: transformers.Gemma4TextConfig(
        **GROUPED,
        head_dim=8,
        global_head_dim=8,
        sliding_window=64,
        vocab_size_per_layer_input=128,
        hidden_size_per_layer_input=8,
    ),
    "tied": lambda: transformers.LlamaConfig(**GROUPED, tie_word_embeddings=True),
}


def random_pair(folder, config, step=0.1):
    """Save a random model, and another one `step` away in every weight and persistent buffer."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder / "0")
    with torch.no_grad():
        for tensor in {id(t): t for t in model.state_dict().values()}.values():
            if tensor.is_floating_point():
                tensor.add_(torch.randn_like(tensor) * step)
    model.save_pretrained(folder / "1")
    return str(folder / "0"), str(folder / "1")


@pytest.mark.parametrize("name", RENAMED)
def test_a_swap_brings_every_tensor_whatever_its_name_in_memory(tmp_path, name):
    """After a swap the engine's model is, tensor by tensor, the one that transformers loads from a
    checkpoint.
    """
    zero, one = random_pair(tmp_path, RENAMED[name]())
    engine = Engine(zero, PLAIN)
    extrapolate.extrapolate(zero, one, {0.5: tmp_path / "half"})
    for alpha, folder in ((0.0, one), (0.5, tmp_path / "half"), (-1.0, zero)):
        engine.swap(zero, one, alpha)
        wanted = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
        found = engine.backend.model.state_dict()
        assert found.keys() == wanted.keys() and len(wanted) > 10
        for key, tensor in wanted.items():
            torch.testing.assert_close(found[key], tensor, rtol=0, atol=0, msg=key)
    assert engine.backend.model is engine.backend.scorer.model


def left_out(part):
    """Make a back-end whose swaps leave the tensors with `part` in their names as they were, in
    silence.
    """

    class Forgetful(TransformersBackend):
        @torch.no_grad()
        def swap(self, *weights):
            before = {
                name: tensor.clone()
                for name, tensor in self.model.state_dict().items()
                if part in name
            }
            digest = super().swap(*weights)
            for name, tensor in self.model.state_dict().items():
                if name in before:
                    tensor.copy_(before[name])
            return digest

    return Forgetful


BF16 = precision.computes_bf16(precision.CPUINFO) or torch.cuda.is_available()
DTYPES = [
    "float32",
    pytest.param(
        "bfloat16", marks=pytest.mark.skipif(not BF16, reason="bfloat16 is refused on this CPU")
    ),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "part", ["embed_tokens", "layers.1.self_attn.o_proj", "mlp.down_proj", "norm.weight", ""]
)
def test_tensors_that_a_swap_leaves_out_are_noticed_at_once(models, monkeypatch, part, dtype):
    """Nothing to compare with is known yet, and the probe changes: transformers alone tells that it
    is wrong.
    """
    monkeypatch.setattr(generate, "TransformersBackend", left_out(part))
    engine = Engine(str(models / "sft"), DECODING | {"backend": "transformers", "dtype": dtype})
    for _ in range(2):
        with pytest.raises(
            StaleWeights,
            match="does not compute with all of the weights that a swap brings: .* nats",
        ):
            engine.swap(str(models / "sft"), str(models / "aligned"), 0.0)
        with pytest.raises(StaleWeights, match="the last swap failed"):
            engine.logps([TEXT])


def test_an_engine_is_compared_with_transformers_once(models, monkeypatch):
    """Not at every α, not for the weights that it started with, nor for another model of its
    shape.
    """
    asked, plain = [], scoring.plain_logps
    monkeypatch.setattr(
        scoring, "plain_logps", lambda *given: asked.append(given[0]) or plain(*given)
    )
    engine = Engine(str(models / "sft"), DECODING | {"backend": "transformers"})
    engine.swap(str(models / "sft"), None, 0.0)
    assert asked == []
    for alpha in (0, 0.5, 3, 0.5):
        engine.swap(str(models / "sft"), str(models / "aligned"), alpha)
    engine.swap(str(models / "3"), None, 0.0)
    assert asked == [str(models / "sft")]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_small_step_is_no_false_alarm(models, tmp_path, dtype):
    """One weight of a token that the probe lacks moves by its last bit: other weights, the same
    probe.
    """
    weights = {
        n: t.to(getattr(torch, dtype))
        for n, t in load_file(models / "sft" / "model.safetensors").items()
    }
    for name in ("zero", "one"):
        shutil.copytree(models / "sft", tmp_path / name)
        row = weights["model.embed_tokens.weight"][50]
        row.view(torch.int32 if dtype == "float32" else torch.int16)[3] += name == "one"
        save_file(weights, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
    where = [str(tmp_path / name) for name in ("zero", "one")]
    engine = Engine(where[0], DECODING | {"backend": "transformers", "dtype": dtype})
    probes = [engine.swap(*where, alpha) for alpha in (0.0, -1.0, 1.0, 0.0, -1.0)]
    assert probes == pytest.approx([probes[0]] * 5, rel=1e-6)
    held = engine.backend.model.state_dict()["model.embed_tokens.weight"][50, 3]
    assert (
        held
        == load_file(tmp_path / "zero" / "model.safetensors")["model.embed_tokens.weight"][50, 3]
    )
    assert len(set(engine.digests.values())) == 4, "altered, 0, -1, 1"


def test_sampling_stops_where_the_aligned_model_ends_too(models, tmp_path):
    """Published pairs: prompts are rendered by the aligned model's tokenizer, which may close a
    turn otherwise.
    """
    other = tmp_path / "other"
    shutil.copytree(models / "aligned", other)
    ends = [*range(100, 400)]
    (other / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    (tmp_path / "prompts.json").write_text(json.dumps([{"id": "a", "prompt_ids": TEXT[:5]}]))
    engine = Engine(str(models / "sft"), DECODING | {"backend": "transformers"})
    first = {}
    for aligned in (models / "aligned", other, None):
        engine.swap(str(models / "sft"), aligned and str(aligned), 0.0)
        engine.generate(
            str(tmp_path / "prompts.json"), str(tmp_path / "out.jsonl"), samples=8, seed=1
        )
        said = [
            json.loads(line)["response_ids"]
            for line in (tmp_path / "out.jsonl").read_text().splitlines()
        ]
        first[aligned] = (
            [next((i for i, t in enumerate(ids) if t in ends), None) for ids in said],
            said,
        )
    places, said = first[other]
    assert all(
        place is None or place == len(ids) - 1 for place, ids in zip(places, said, strict=True)
    )
    assert any(place is not None for place in places), "the test means nothing without such an end"
    for aligned in (models / "aligned", None):
        places, said = first[aligned]
        assert any(
            place is not None and place < len(ids) - 1
            for place, ids in zip(places, said, strict=True)
        )


def test_bfloat16_is_refused_by_an_engine_on_a_cpu_that_would_emulate_it(
    models, tmp_path, monkeypatch
):
    (tmp_path / "cpuinfo").write_text("flags\t\t: fpu sse2 avx avx2 fma\n")
    monkeypatch.setattr(precision, "CPUINFO", str(tmp_path / "cpuinfo"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for backend in ("vllm", "transformers"):
        with pytest.raises(ValueError, match="this one would emulate it"):
            Engine(str(models / "sft"), DECODING | {"backend": backend, "dtype": "bfloat16"})


def test_the_same_weights_under_another_name_are_no_old_weights(
    transformers_engine, models, tmp_path
):
    """α = 0 of the aligned model is that model, and a copy of it is the same."""
    where = str(models / "sft"), str(models / "aligned")
    first = transformers_engine.swap(*where, 0.0)
    shutil.copytree(models / "aligned", tmp_path / "copy")
    assert transformers_engine.swap(where[1], None, 0.0) == first
    assert transformers_engine.swap(str(tmp_path / "copy"), None, 0.0) == first


def test_files_that_changed_between_two_swaps_are_noticed(models, tmp_path):
    """The same folders and α are other weights now: what was sampled before was of others."""
    shutil.copytree(models / "aligned", tmp_path / "aligned")
    where = str(models / "sft"), str(tmp_path / "aligned")
    engine = Engine(where[0], DECODING | {"backend": "transformers"})
    engine.swap(*where, 0.0)
    engine.swap(*where, 0.5)
    weights = load_file(tmp_path / "aligned" / "model.safetensors")
    weights["model.embed_tokens.weight"][300] += 1.0  # no token of the probe
    save_file(weights, tmp_path / "aligned" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        StaleWeights, match="took other tensors than the last time: the files have changed"
    ):
        engine.swap(*where, 0.0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mixtral", "gpt_neox"])
def test_vllm_computes_with_all_weights_or_says_that_it_does_not(tmp_path, monkeypatch, name):
    """On the CPU it packs a mixture's experts once: weights that are loaded later stay unpacked, in
    silence.
    """
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    shape = {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 128}
    config = RENAMED[name]()
    config.update(shape | ({"head_dim": 32} if name == "mixtral" else {}))
    zero, one = random_pair(tmp_path, config)
    alone = Engine(zero, PLAIN).swap(zero, one, 0.5)
    settings = {"model": zero, "decoding": PLAIN | {"backend": "vllm"}}
    with launch.Worker("beyond_dpo.jobs.generate", settings, tmp_path, desc="vllm") as engine:
        if name == "mixtral":
            with pytest.raises(
                launch.JobFailed,
                match="StaleWeights: vllm does not compute with all of the weights",
            ):
                engine.call("swap", sft=zero, aligned=one, alpha=0.5)
        else:
            assert engine.call("swap", sft=zero, aligned=one, alpha=0.5) == pytest.approx(
                alone, abs=1e-3
            )


def test_unknown_backend_is_refused(models):
    with pytest.raises(
        ValueError, match="unknown generation backend 'vlm'; there are vllm and transformers"
    ):
        Engine(str(models / "sft"), DECODING | {"backend": "vlm"})


def test_model_without_end_token_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="names no eos_token_id"):
        Engine(str(tmp_path), DECODING | {"backend": "transformers"})


LIMITS = [(-1, 1.0), (-1, 0.9)]
LIMITS += [(1, 1.0), (1, 0.5), (5, 0.9), (40, 0.9), (40, 1.0)]
LIMITS += [(0, 0.9), (0, 1e-9), (0, 1.0), (300, 0.3), (299, 0.99)]


@pytest.mark.parametrize("k, p", LIMITS)
def test_top_k_top_p_equals_vllms_own(k, p):
    """The mask of a full sort. Of equal logits at p's border vLLM keeps some, by the sort's order,
    and we all.
    """
    sampler = pytest.importorskip("vllm.v1.sample.ops.topk_topp_sampler")
    from beyond_dpo.jobs.sampling import top_k_top_p

    logits = torch.randn(64, 300, generator=torch.Generator().manual_seed(0)) * 3
    for given in (
        logits,
        logits.round(),
        torch.zeros(2, 300),
        logits.masked_fill(logits < 0, -float("inf")),
    ):
        limits = [torch.full((len(given),), value) for value in (k if k > 0 else 300, p)]
        sorted_out = sampler.apply_top_k_top_p_pytorch(given.clone(), *limits)
        lowest = sorted_out.masked_fill(sorted_out.isinf(), float("inf")).amin(-1, keepdim=True)
        expected = given.masked_fill(given < lowest, -float("inf"))
        found = top_k_top_p(given.clone(), k, p)
        assert torch.equal(found, expected)
        if given is logits:
            assert torch.equal(found, sorted_out)
            assert (found.isfinite().sum(-1) == k).all() or p < 1 or k < 1


def test_top_k_top_p_by_hand():
    """Masses 4, 3, 1, 1, 1 of 10. k 3 keeps the ties: 4, 3, 1, 1, 1; the four before the last hold
    9 of 10 > .8, the first two 7 of 10 < .8, so p = .8 keeps all five (vLLM would keep three); p =
    .7 keeps two.
    """
    pytest.importorskip("vllm")
    from beyond_dpo.jobs.sampling import top_k_top_p

    logits = torch.tensor([[1.0, 4.0, 1.0, 3.0, 1.0, 1e-9]]).log()
    cases = [(3, 1.0, 5), (3, 0.8, 5), (3, 0.699, 2), (2, 1.0, 2)]
    cases += [(1, 1.0, 1), (3, 0.1, 1), (0, 1.0, 6)]
    for k, p, kept in cases:
        assert top_k_top_p(logits.clone(), k, p).isfinite().sum() == kept


if __name__ == "__main__":
    launch.serve(Sabotaged)


@pytest.mark.slow
def test_a_model_spread_over_two_devices_is_the_same_model(models, tmp_path, monkeypatch):
    """Tensor parallelism: the probe of swapped weights is that of one device, and a seed repeats in
    all workers.
    """
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    settings = {"model": str(models / "sft"), "decoding": DECODING | {"tensor_parallel": 2}}
    weights = {"sft": str(models / "sft"), "aligned": str(models / "aligned"), "alpha": 0.5}
    with launch.Worker("beyond_dpo.jobs.generate", settings, tmp_path, desc="two") as two:
        probe = two.call("swap", **weights)
        first, again = (sample(two, tmp_path, PROMPTS[:4], samples=2, seed=3) for _ in range(2))
        assert first == again != sample(two, tmp_path, PROMPTS[:4], samples=2, seed=4)
    alone = Engine(str(models / "sft"), DECODING | {"backend": "transformers"})
    assert probe == pytest.approx(alone.swap(**weights), abs=1e-3)
