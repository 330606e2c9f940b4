"""Generation: one living engine over a sweep of α, against checkpoints and transformers.

The model is tiny and random. The vLLM engine runs in a child process that starts once for all
tests; this file is also that child's program.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import runpy
import shutil
import sys
import time
from collections import Counter
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
from beyond_dpo.jobs.generate import Engine, Point, StaleWeights, TransformersBackend
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
IN_PROCESS = DECODING | {"backend": "transformers"}
TEXT = [0, *range(40, 70), 7, 300, 511, 2, 33]
# Three of vLLM's blocks on the CPU, so that its prefix cache is used.
LONG = [0, *(i % 500 + 5 for i in range(399))]
PROMPTS = [[0, 10 + i, *range(60, 60 + i)] for i in range(16)]
END = [1, *range(200, 260)]
ALPHAS = (0, -1, 0.5, 3)  # of the written checkpoints
# What a failed call raises: of an engine in this process, and of a Worker's.
FAILED = (StaleWeights, launch.JobFailed)
OWN = {"aligned": None, "alpha": 0.0}  # the swap to a model's own weights
on_both_backends = pytest.mark.parametrize("backend", ["vllm", "transformers"])


class Sabotaged(Engine):
    """The engine, with the faults and the other decoding that the tests want of it."""

    def decode(self, **decoding):
        self.decoding.update(decoding)
        if "vllm" in self.decoding["backend"]:
            self.backend.llm.llm_engine.vllm_config.additional_config.update(decoding)

    def swap_without_effect(self, **arguments):
        swap = self.backend.swap
        self.backend.swap = lambda point: "the digest of no tensor"
        try:
            self.swap(**arguments)
        finally:
            self.backend.swap = swap

    def start_another(self, model, decoding):
        """Start another engine in this process."""
        self.another = Engine(model, decoding)

    def call_another(self, name, arguments):
        return getattr(self.another, name)(**arguments)

    def end_another(self):
        del self.another


def near(expected):
    """Compare log-probabilities of two computations (nats)."""
    return pytest.approx(expected, abs=2e-3)


def write_json(path, value):
    path.write_text(json.dumps(value))


def read_weights(folder):
    return load_file(Path(folder) / "model.safetensors")


def write_weights(folder, weights):
    file = Path(folder) / "model.safetensors"
    save_file(weights, file, metadata={"format": "pt"})


def peaked(weights):
    """Return weights whose predictions are peaked, as those of a trained model are."""
    scaled = {}
    for name, weight in weights.items():
        if "embed" in name:
            scaled[name] = 12 * weight
        elif weight.ndim == 2:
            scaled[name] = 4 * weight
        else:
            scaled[name] = weight
    return scaled


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Return a folder of models: `sft`, `aligned`, and checkpoints named by their α.

    The SFT model has peaked predictions and several end tokens, the aligned one is 3 % of its
    weights away.
    """
    folder = tmp_path_factory.mktemp("models")
    tiny = assets.model_dir("tiny")
    weights = peaked(read_weights(tiny))
    random = torch.Generator().manual_seed(5)
    for name, share in {"sft": 0.0, "aligned": 0.03}.items():
        shutil.copytree(tiny, folder / name)
        tokens = {"eos_token_id": END, "bos_token_id": 0}
        write_json(folder / name / "generation_config.json", tokens)
        moved = {}
        for key, weight in weights.items():
            step = share * weight.std(correction=0)
            noise = torch.randn(weight.shape, generator=random)
            moved[key] = weight + step * noise
        write_weights(folder / name, moved)
    checkpoints = {alpha: folder / f"{alpha}" for alpha in ALPHAS}
    extrapolate.extrapolate(folder / "sft", folder / "aligned", checkpoints)
    return folder


@pytest.fixture(scope="module")
def line(models):
    """Return the folders of θ₀ and θ₁, as arguments of swap()."""
    return line_of(models / "sft", models / "aligned")


def line_of(sft, aligned):
    return {"sft": str(sft), "aligned": str(aligned)}


@torch.no_grad()
def logits_of(model, tokens):
    batch = torch.tensor([tokens])
    return model(batch).logits[0]


@pytest.fixture(scope="module")
def reference(models):
    """Return ln p of sequences after `prompt` tokens under a checkpoint, by transformers."""
    loaded = {}

    def logp(name, tokens=TEXT, prompt=1):
        if name not in loaded:
            folder = models / str(name)
            loaded[name] = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        logps = logits_of(loaded[name], tokens).log_softmax(-1)
        predicted = range(prompt, len(tokens))
        return math.fsum(logps[i - 1, tokens[i]].item() for i in predicted)

    logp.models = loaded
    return logp


@pytest.fixture(scope="module")
def engine(models, tmp_path_factory):
    """Yield the call of a living vLLM engine, and how many seconds its start took."""
    folders = [Path(__file__).parent, paths.ROOT / "lib"]
    workdir = tmp_path_factory.mktemp("engine")
    settings = {"model": str(models / "sft"), "decoding": DECODING}
    began = time.monotonic()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(map(str, folders)))
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        worker = launch.Worker("test_generate", settings, workdir, desc="vllm")
    with worker:
        seconds = time.monotonic() - began
        yield SimpleNamespace(call=worker.call, start=seconds)


@pytest.fixture
def swap(engine, line):
    return lambda alpha: engine.call("swap", **line, alpha=alpha)


@pytest.fixture(scope="module")
def transformers_engine(models):
    return Sabotaged(str(models / "sft"), IN_PROCESS)


@pytest.fixture
def call(backend, request):
    """Return how a method of the backend's engine is called by its name."""
    if backend == "vllm":
        return request.getfixturevalue("engine").call
    return by_name(request.getfixturevalue("transformers_engine"))


def by_name(engine):
    """Return how a method of an Engine in this process is called by its name, as a Worker's is."""
    return lambda method, **arguments: getattr(engine, method)(**arguments)


def in_process(model, **decoding):
    """Return an engine of transformers in this process."""
    return Engine(str(model), IN_PROCESS | decoding)


def text_logp(call):
    """Return the engine's ln p of TEXT."""
    (logp,) = call("logps", sequences=[TEXT])
    return logp


def read_rows(path):
    lines = path.read_text().splitlines()
    return [json.loads(line) for line in lines]


def sample(call, folder, prompts=PROMPTS, samples=1, seed=0):
    """Return the rows of responses to prompts, by an engine's call."""
    rows = []
    for number, prompt in enumerate(prompts):
        rows.append({"id": f"p{number}", "prompt_ids": prompt})
    prompts_file = folder / "prompts.json"
    out = folder / "out.jsonl"
    write_json(prompts_file, rows)
    facts = call("generate", prompts=str(prompts_file), out=str(out), samples=samples, seed=seed)
    lines = read_rows(out)
    ids = [row["id"] for row in rows for _ in range(samples)]
    assert [line["id"] for line in lines] == ids
    assert [line["sample"] for line in lines] == [*range(samples)] * len(rows)
    tokens = sum(len(row["response_ids"]) for row in lines)
    assert facts == {"responses": len(lines), "tokens": tokens}
    return lines


def sample_ids(*arguments, **options):
    """Return the token ids of sampled responses; arguments as of sample()."""
    return [row["response_ids"] for row in sample(*arguments, **options)]


# ---- swaps


def test_sweep_equals_checkpoints_written_by_the_extrapolator(engine, swap, reference):
    """Each α, the end points and a way back have the ln p of a text of that α's checkpoint."""
    expected = {alpha: reference(alpha) for alpha in ALPHAS}
    ranked = sorted(expected.values())
    for low, high in itertools.pairwise(ranked):
        assert high - low > 0.01, "too alike to tell"
    probes = {}
    beginning = TEXT[:9]
    for alpha in (-1, 0, 0.5, 3, 0.5, 0, -1):
        probe = swap(alpha)
        probes.setdefault(alpha, probe)
        assert probe == pytest.approx(probes[alpha], abs=1e-4)
        logps = engine.call("logps", sequences=[TEXT, beginning])
        logp, beginning_logp = logps
        assert logp == near(expected[alpha])
        assert beginning_logp == near(reference(alpha, beginning))
    assert len(set(probes.values())) == 4
    assert expected[-1] == pytest.approx(reference("sft"), abs=1e-6)


def test_alpha_of_a_part_equals_its_checkpoint(engine, models, line, reference):
    """Attention moves to α = 3, the rest stays at the aligned model.

    The same α for all tensors is another model.
    """
    modules = {"*.self_attn.*": 3.0}
    checkpoint = {0.0: models / "attention"}
    extrapolate.extrapolate(models / "sft", models / "aligned", checkpoint, modules=modules)
    engine.call("swap", **line, alpha=0.0, modules=modules)
    logp = text_logp(engine.call)
    assert logp == near(reference("attention"))
    for other in (0, 3):
        assert abs(logp - reference(other)) > 0.01
    engine.call("swap", **line, alpha=0.0)
    assert text_logp(engine.call) == near(reference(0))


def test_swap_is_cheap(engine, swap, record_property):
    """A sweep pays a swap, not a start, per α."""
    swap(0)
    began = time.monotonic()
    swap(3)
    seconds = time.monotonic() - began
    record_property("start_seconds", round(engine.start, 2))
    record_property("swap_seconds", round(seconds, 2))
    assert seconds < engine.start / 10


def test_swap_drops_cached_prefixes(engine, swap, reference, tmp_path):
    """The second prompt of a pair reads the first one's blocks, but never those of old weights."""
    for alpha in (0, 3, 0):
        swap(alpha)
        for row in sample(engine.call, tmp_path, [LONG, LONG]):
            tokens = LONG + row["response_ids"]
            expected = reference(alpha, tokens, prompt=len(LONG))
            assert row["logp"] == near(expected)


@pytest.mark.parametrize("backend, attempts", [("vllm", 1), ("transformers", 2)])
def test_weights_that_did_not_change_are_noticed(call, attempts, line):
    """They are noticed however often it is tried, and the next swap that works is none of them."""
    first = call("swap", **line, alpha=0)
    for _ in range(attempts):
        with pytest.raises(FAILED, match=r"(?s)after the swap to α=0\.5 .*old weights"):
            call("swap_without_effect", **line, alpha=0.5)
    with pytest.raises(FAILED, match="the last swap failed"):
        call("logps", sequences=[TEXT])
    assert call("swap", **line, alpha=0.5) != first
    again = call("swap", **line, alpha=0)
    assert again == pytest.approx(first, abs=1e-4)


def test_known_weights_that_changed_are_noticed(transformers_engine, line):
    engine = transformers_engine
    first = engine.swap(**line, alpha=0)
    engine.swap(**line, alpha=3)
    key = Point(**line, alpha=0.0).key()
    engine.probes[key] += 1
    with pytest.raises(StaleWeights, match="gave the probe .* and now"):
        engine.swap(**line, alpha=0)
    engine.probes[key] = first
    again = engine.swap(**line, alpha=0)
    assert again == pytest.approx(first, abs=1e-6)


@on_both_backends
def test_failed_swap_leaves_no_half_model(call, line, reference):
    """α = 1e39 leaves the range of float32 when the engine already has some tensors.

    The α before is gone then, too.
    """
    call("swap", **line, alpha=3)
    for _ in range(2):
        with pytest.raises((ValueError, launch.JobFailed), match=r"alpha=1e\+39"):
            call("swap", **line, alpha=1e39)
        with pytest.raises(FAILED, match="the last swap failed"):
            call("logps", sequences=[TEXT])
        call("swap", **line, alpha=3)
        assert text_logp(call) == near(reference(3))


@on_both_backends
def test_a_models_own_weights_need_no_second_model(call, models, line, reference):
    """Also those that the engine started with, after a sweep."""
    for alpha_before, own in ((3, "sft"), (3, "aligned"), (0.5, "3")):
        call("swap", **line, alpha=alpha_before)
        call("swap", sft=str(models / own), **OWN)
        assert text_logp(call) == near(reference(own))


@on_both_backends
def test_the_weights_it_started_with_come_back_after_a_swap_that_failed(call, line, reference):
    call("swap", **line, alpha=3)
    with pytest.raises((ValueError, launch.JobFailed), match="leaves the range"):
        call("swap", **line, alpha=1e39)
    call("swap", sft=line["sft"], **OWN)
    assert text_logp(call) == near(reference("sft"))


def test_models_of_another_shape_are_refused(transformers_engine, models, tmp_path):
    """A tensor that the engine has and the checkpoint lacks would silently keep its old value."""
    for name in ("sft", "aligned"):
        shutil.copytree(models / name, tmp_path / name)
        weights = read_weights(tmp_path / name)
        del weights["model.layers.1.mlp.up_proj.weight"]
        write_weights(tmp_path / name, weights)
    with pytest.raises(extrapolate.IncompatibleModels, match="up_proj"):
        line = line_of(tmp_path / "sft", tmp_path / "aligned")
        transformers_engine.swap(**line, alpha=1.0)


# ---- samples


@on_both_backends
def test_responses(call, line, reference, tmp_path):
    """They end with an end token or have max_tokens, and logp is ln p of the response."""
    call("swap", **line, alpha=0.5)
    rows = sample(call, tmp_path, samples=4, seed=3)
    ended = 0
    for row in rows:
        response = row["response_ids"]
        *inner, last = response
        assert last in END or len(response) == DECODING["max_tokens"]
        assert not set(inner) & set(END)
        ended += last in END
        prompt = PROMPTS[int(row["id"][1:])]
        tokens = prompt + row["response_ids"]
        expected = reference(0.5, tokens, prompt=len(prompt))
        assert row["logp"] == near(expected)
    assert len(rows) == 64
    assert 0 < ended < 64, "one way to end was not seen"


@on_both_backends
def test_the_seed_alone_decides_the_draw(call, line, tmp_path):
    call("swap", **line, alpha=0.5)
    first = sample_ids(call, tmp_path, samples=4, seed=3)
    assert sample_ids(call, tmp_path, samples=4, seed=3) == first
    other = sample_ids(call, tmp_path, samples=4, seed=4)
    different = 0
    for one_response, other_response in zip(first, other, strict=True):
        different += one_response != other_response
    assert different > 48


def test_a_warm_cache_changes_no_response(engine, swap, tmp_path):
    """Cached prefixes would put more prompts into one step, and so change who gets which draw."""
    swap(0)
    prompts = [LONG[:length] for length in range(390, 366, -1)]
    first = sample(engine.call, tmp_path, prompts, samples=2, seed=1)
    again = sample(engine.call, tmp_path, prompts, samples=2, seed=1)
    assert again == first


def distributions(model, prompt, response):
    """Return {token: probability} that each token of a response is drawn from, by the definition.

    In order: penalties, temperature, top-k, top-p.
    """
    logits = logits_of(model, prompt + response)
    logits = logits[len(prompt) - 1 : -1]
    for i, token in enumerate(response[:-1]):
        penalty = DECODING["frequency_penalty"]
        if token not in response[:i]:
            penalty += DECODING["presence_penalty"]
        logits[i + 1 :, token] -= penalty
    logits = logits / DECODING["temperature"]
    values, tokens = logits.topk(DECODING["top_k"])
    p = values.softmax(-1)
    mass_before = p.cumsum(-1) - p
    p = p * (mass_before < DECODING["top_p"])
    p /= p.sum(-1, keepdim=True)
    steps = []
    for candidates, probabilities in zip(tokens.tolist(), p.tolist(), strict=True):
        step = dict(zip(candidates, probabilities, strict=True))
        steps.append(step)
    return steps


@pytest.fixture
def drawn(call, line, reference, tmp_path):
    """Return (model at α = 0, prompt, 768 responses to it)."""
    call("swap", **line, alpha=0)
    reference(0, TEXT)
    prompt = PROMPTS[2]
    responses = sample_ids(call, tmp_path, [prompt], samples=768, seed=7)
    return reference.models[0], prompt, responses


@on_both_backends
def test_samples_follow_the_definition(drawn):
    """First tokens: χ² against the exact distribution (99.99 % bound).

    Later ones: none outside top-k and top-p after penalties, and their mean surprise equals the
    mean entropy of what they are drawn from within five standard errors.
    """
    model, prompt, responses = drawn
    first_distribution = distributions(model, prompt, responses[0])[0]
    check_first_tokens(first_distribution, responses)
    excess = []
    for response in responses[:256]:
        for token, p in zip(response, distributions(model, prompt, response), strict=True):
            assert p.get(token), f"token {token} is outside top-k and top-p"
            surprise = -math.log(p[token])
            possible = [q for q in p.values() if q]
            entropy = -sum(q * math.log(q) for q in possible)
            excess.append(surprise - entropy)
    excess = torch.tensor(excess)
    assert len(excess) > 2000
    standard_error = excess.std() / len(excess) ** 0.5
    mean = excess.mean()
    assert abs(mean) < 5 * standard_error


def check_first_tokens(distribution, responses):
    exact = {token: p for token, p in distribution.items() if p}
    first_tokens = [response[0] for response in responses]
    counts = Counter(first_tokens)
    assert 4 <= len(exact) < DECODING["top_k"], "top-p must cut something"
    assert counts.keys() <= exact.keys()
    statistic = 0.0
    for token, p in exact.items():
        expected = len(responses) * p
        excess = counts[token] - expected
        statistic += excess**2 / expected
    assert statistic < chi2.ppf(0.9999, len(exact) - 1)


def test_top_k_1_is_greedy(engine, swap, tmp_path):
    """With k = 1 the processor leaves one token at temperature 1.

    Without limits the same seed gives something else.
    """
    swap(0)
    try:
        engine.call("decode", temperature=0.0)
        greedy = sample_ids(engine.call, tmp_path)
        engine.call("decode", temperature=1.0, top_k=1, top_p=1.0)
        assert sample_ids(engine.call, tmp_path) == greedy
        engine.call("decode", top_k=0, top_p=1e-6)
        assert sample_ids(engine.call, tmp_path) == greedy
        engine.call("decode", top_k=0, top_p=1.0)
        assert sample_ids(engine.call, tmp_path) != greedy
    finally:
        restore_decoding(engine.call)


def restore_decoding(call):
    names = ("temperature", "top_k", "top_p")
    call("decode", **{name: DECODING[name] for name in names})


def test_temperature_0_is_greedy_in_both_backends(
    engine, swap, transformers_engine, line, tmp_path
):
    """The likeliest token after penalties is taken, whatever top-k and top-p.

    -1 and 0 are no limit of top-k, as vLLM takes them.
    """
    swap(0)
    transformers_engine.swap(**line, alpha=0)
    calls = [engine.call, by_name(transformers_engine)]
    limits = [(12, 0.9), (-1, 1.0), (0, 0.5)]
    sampled = []
    try:
        for (top_k, top_p), call in itertools.product(limits, calls):
            call("decode", temperature=0.0, top_k=top_k, top_p=top_p)
            responses = sample_ids(call, tmp_path, PROMPTS[:6], seed=len(sampled))
            sampled.append(responses)
            call("decode", temperature=0.7, top_k=top_k, top_p=top_p)
            sample(call, tmp_path, PROMPTS[:2])
    finally:
        for call in calls:
            restore_decoding(call)
    greedy = sampled[0]
    assert sampled == [greedy] * 6
    different = {tuple(response) for response in greedy}
    assert len(different) > 3, "not one answer to all"


def test_model_defaults_do_not_decide(models, tmp_path):
    """A generation config is no part of our decoding.

    This one forbids all tokens but two, and repeats none.
    """
    shutil.copytree(models / "sft", tmp_path / "model")
    defaults = {
        "eos_token_id": END,
        "suppress_tokens": list(range(2, 512)),
        "repetition_penalty": 5.0,
        "min_new_tokens": 9,
    }
    write_json(tmp_path / "model" / "generation_config.json", defaults)
    plain = in_process(models / "sft")
    opinionated = in_process(tmp_path / "model")
    rows = sample(by_name(plain), tmp_path)
    assert rows == sample(by_name(opinionated), tmp_path)


@pytest.mark.parametrize("length", [0, 501])
def test_a_response_that_may_not_fit_is_refused(transformers_engine, line, tmp_path, length):
    call = by_name(transformers_engine)
    call("swap", **line, alpha=0)
    sample(call, tmp_path, [[5] * 500])
    message = f"prompt p1 has {length} tokens; between 1 and .* = 500"
    with pytest.raises(ValueError, match=message):
        sample(call, tmp_path, [[5], [5] * length])


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
# Models whose names in memory are others than in the file, or whose tensors are merged or buffers.
RENAMED = {
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
    tensors = {id(tensor): tensor for tensor in model.state_dict().values()}  # tied ones once
    with torch.no_grad():
        for tensor in tensors.values():
            if tensor.is_floating_point():
                tensor.add_(torch.randn_like(tensor) * step)
    model.save_pretrained(folder / "1")
    return line_of(folder / "0", folder / "1")


@pytest.mark.parametrize("name", RENAMED)
def test_a_swap_brings_every_tensor_whatever_its_name_in_memory(tmp_path, name):
    """After a swap the engine's model is the one that transformers loads from a checkpoint."""
    line = random_pair(tmp_path, RENAMED[name]())
    engine = Engine(line["sft"], PLAIN)
    half = tmp_path / "half"
    extrapolate.extrapolate(line["sft"], line["aligned"], {0.5: half})
    checkpoints = {0.0: line["aligned"], 0.5: half, -1.0: line["sft"]}
    for alpha, folder in checkpoints.items():
        engine.swap(**line, alpha=alpha)
        expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
        found = engine.backend.model.state_dict()
        assert found.keys() == expected.keys()
        assert len(expected) > 10
        for key, tensor in expected.items():
            assert torch.equal(found[key], tensor), key
    assert engine.backend.model is engine.backend.scorer.model


def left_out(part):
    """Make a back-end whose swaps silently keep the tensors with `part` in their names."""

    class Forgetful(TransformersBackend):
        @torch.no_grad()
        def swap(self, point):
            kept = {}
            for name, tensor in self.model.state_dict().items():
                if part in name:
                    kept[name] = tensor.clone()
            digest = super().swap(point)
            for name, tensor in self.model.state_dict().items():
                if name in kept:
                    tensor.copy_(kept[name])
            return digest

    return Forgetful


BF16 = precision.computes_bf16(precision.CPUINFO) or torch.cuda.is_available()
no_bf16 = pytest.mark.skipif(not BF16, reason="bfloat16 is refused on this CPU")
DTYPES = ["float32", pytest.param("bfloat16", marks=no_bf16)]
PARTS = ["embed_tokens", "layers.1.self_attn.o_proj", "mlp.down_proj", "norm.weight", ""]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("part", PARTS)
def test_tensors_that_a_swap_leaves_out_are_noticed_at_once(models, line, monkeypatch, part, dtype):
    """Nothing to compare with is known yet, and the probe changes.

    Only transformers tells that it is wrong.
    """
    monkeypatch.setattr(generate, "TransformersBackend", left_out(part))
    engine = in_process(models / "sft", dtype=dtype)
    message = "does not compute with all of the weights that a swap brings: .* nats"
    for _ in range(2):
        with pytest.raises(StaleWeights, match=message):
            engine.swap(**line, alpha=0.0)
        with pytest.raises(StaleWeights, match="the last swap failed"):
            engine.logps([TEXT])


def test_an_engine_is_compared_with_transformers_once(models, line, monkeypatch):
    """Not at every α, not for the weights that it started with, nor for another model."""
    compared = []
    plain_logps = scoring.plain_logps

    def watched(folder, *arguments):
        compared.append(folder)
        return plain_logps(folder, *arguments)

    monkeypatch.setattr(scoring, "plain_logps", watched)
    engine = in_process(models / "sft")
    engine.swap(line["sft"], **OWN)
    assert compared == []
    for alpha in (0, 0.5, 3, 0.5):
        engine.swap(**line, alpha=alpha)
    engine.swap(str(models / "3"), **OWN)
    assert compared == [line["sft"]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_small_step_is_no_false_alarm(models, tmp_path, dtype):
    """One weight of a token that the probe lacks moves by its last bit.

    These are other weights with the same probe.
    """
    embeddings = "model.embed_tokens.weight"
    bits = torch.int32 if dtype == "float32" else torch.int16
    weights = {}
    for name, weight in read_weights(models / "sft").items():
        weights[name] = weight.to(getattr(torch, dtype))
    for name, moved_bits in (("zero", 0), ("one", 1)):
        shutil.copytree(models / "sft", tmp_path / name)
        weights[embeddings][50].view(bits)[3] += moved_bits
        write_weights(tmp_path / name, weights)
    line = line_of(tmp_path / "zero", tmp_path / "one")
    engine = in_process(tmp_path / "zero", dtype=dtype)
    first = engine.swap(**line, alpha=0.0)
    for alpha in (-1.0, 1.0, 0.0, -1.0):
        probe = engine.swap(**line, alpha=alpha)
        assert probe == pytest.approx(first, rel=1e-6)
    loaded = engine.backend.model.state_dict()[embeddings]
    written = read_weights(tmp_path / "zero")[embeddings]
    assert loaded[50, 3] == written[50, 3]
    assert len(set(engine.digests.values())) == 4, "altered, 0, -1, 1"


def places_of_ends(response, ends):
    return [place for place, token in enumerate(response) if token in ends]


def test_sampling_stops_where_the_aligned_model_ends_too(models, tmp_path):
    """A published pair's prompts are rendered by the aligned model's tokenizer.

    That one may close a turn otherwise.
    """
    other = tmp_path / "other"
    shutil.copytree(models / "aligned", other)
    ends = list(range(100, 400))
    write_json(other / "generation_config.json", {"eos_token_id": ends})
    engine = in_process(models / "sft")
    sft = str(models / "sft")

    def closed_and_gone_on(aligned):
        """Return whether a response closes with one of the ends, and whether one goes on after."""
        engine.swap(sft, aligned, 0.0)
        closed = False
        goes_on = False
        responses = sample_ids(by_name(engine), tmp_path, [TEXT[:5]], samples=8, seed=1)
        for response in responses:
            places = places_of_ends(response, ends)
            last = len(response) - 1
            closed = closed or last in places
            goes_on = goes_on or any(place < last for place in places)
        return closed, goes_on

    assert closed_and_gone_on(str(other)) == (True, False)
    for aligned in (str(models / "aligned"), None):
        _, goes_on = closed_and_gone_on(aligned)
        assert goes_on


@pytest.mark.parametrize("name", ["vllm", "transformers"])
def test_bfloat16_is_refused_by_an_engine_on_a_cpu_that_would_emulate_it(
    models, tmp_path, monkeypatch, name
):
    (tmp_path / "cpuinfo").write_text("flags\t\t: fpu sse2 avx avx2 fma\n")
    monkeypatch.setattr(precision, "CPUINFO", str(tmp_path / "cpuinfo"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="this one would emulate it"):
        in_process(models / "sft", backend=name, dtype="bfloat16")


def test_the_same_weights_under_another_name_are_no_old_weights(
    transformers_engine, line, tmp_path
):
    """α = 0 of the aligned model is that model, and a copy of it is the same."""
    first = transformers_engine.swap(**line, alpha=0.0)
    shutil.copytree(line["aligned"], tmp_path / "copy")
    for folder in (line["aligned"], str(tmp_path / "copy")):
        assert transformers_engine.swap(folder, **OWN) == first


def test_files_that_changed_between_two_swaps_are_noticed(models, tmp_path):
    """The same folders and α are other weights now: what was sampled before was of others."""
    shutil.copytree(models / "aligned", tmp_path / "aligned")
    line = line_of(models / "sft", tmp_path / "aligned")
    engine = in_process(models / "sft")
    engine.swap(**line, alpha=0.0)
    engine.swap(**line, alpha=0.5)
    weights = read_weights(tmp_path / "aligned")
    weights["model.embed_tokens.weight"][300] += 1.0  # no token of the probe
    write_weights(tmp_path / "aligned", weights)
    message = "took other tensors than the last time: the files have changed"
    with pytest.raises(StaleWeights, match=message):
        engine.swap(**line, alpha=0.0)


@pytest.fixture
def another(engine):
    """Return a function that starts another engine in the process of the vLLM engine.

    That one has imported vLLM, which takes longer than the start. The function returns the engine's
    call.
    """

    def start(model):
        decoding = PLAIN | {"backend": "vllm"}
        engine.call("start_another", model=model, decoding=decoding)

        def call(method, **arguments):
            return engine.call("call_another", name=method, arguments=arguments)

        return call

    yield start
    engine.call("end_another")


@pytest.mark.slow
def test_vllm_computes_with_all_weights_of_a_model_of_other_names(tmp_path, another):
    config = RENAMED["gpt_neox"]()
    config.update({"vocab_size": 512, "hidden_size": 128, "intermediate_size": 128})
    line = random_pair(tmp_path, config)
    alone = Engine(line["sft"], PLAIN)
    expected = alone.swap(**line, alpha=0.5)
    probe = another(line["sft"])("swap", **line, alpha=0.5)
    assert probe == pytest.approx(expected, abs=1e-3)


@pytest.mark.slow
def test_vllm_says_that_it_does_not_compute_with_all_weights_of_a_mixture(tmp_path, another):
    """On the CPU it packs experts once: weights that are loaded later stay unpacked, in silence."""
    config = RENAMED["mixtral"]()
    shape = {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 128, "head_dim": 32}
    config.update(shape)
    line = random_pair(tmp_path, config)
    message = "StaleWeights: vllm does not compute with all of the weights"
    call = another(line["sft"])
    with pytest.raises(launch.JobFailed, match=message):
        call("swap", **line, alpha=0.5)


@pytest.mark.long
def test_a_model_spread_over_two_devices_is_the_same_model(models, line, tmp_path, monkeypatch):
    """Tensor parallelism: the probe of swapped weights is that of one device.

    A seed repeats in all workers. The engine is served as notebooks have it served.
    """
    # Its threads may run on any core, as other processes run at the same time.
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    alone = in_process(models / "sft")
    expected = alone.swap(**line, alpha=0.5)
    decoding = DECODING | {"tensor_parallel": 2}
    settings = {"model": str(models / "sft"), "decoding": decoding}
    module = "beyond_dpo.jobs.generate"
    with launch.Worker(module, settings, tmp_path, desc="vllm") as spread:
        probe = spread.call("swap", **line, alpha=0.5)
        prompts = PROMPTS[:4]
        first = sample(spread.call, tmp_path, prompts, samples=2, seed=3)
        again = sample(spread.call, tmp_path, prompts, samples=2, seed=3)
        other = sample(spread.call, tmp_path, prompts, samples=2, seed=4)
    assert first == again
    assert first != other
    assert probe == pytest.approx(expected, abs=1e-3)


def test_unknown_backend_is_refused(models):
    message = "unknown generation backend 'vlm'; there are vllm and transformers"
    with pytest.raises(ValueError, match=message):
        in_process(models / "sft", backend="vlm")


def test_model_without_end_token_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="names no eos_token_id"):
        in_process(tmp_path)


# ---- top-k and top-p


LIMITS = [
    (-1, 1.0),
    (-1, 0.9),
    (1, 1.0),
    (1, 0.5),
    (5, 0.9),
    (40, 0.9),
    (40, 1.0),
    (0, 0.9),
    (0, 1e-9),
    (0, 1.0),
    (300, 0.3),
    (299, 0.99),
]


def cut_logits(kind):
    """Return logits (rows, 300): different ones, with equal ones, all equal, or some impossible."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(64, 300, generator=generator)
    kinds = {
        "different": logits,
        "rounded": logits.round(),
        "equal": torch.zeros(2, 300),
        "impossible": logits.masked_fill(logits < 0, -float("inf")),
    }
    return kinds[kind]


def sorted_cut(logits, k, p):
    """Return vLLM's own logits after top-k and top-p, by a full sort."""
    sampler = pytest.importorskip("vllm.v1.sample.ops.topk_topp_sampler")
    rows = len(logits)
    ks = torch.full((rows,), k if k > 0 else 300)
    ps = torch.full((rows,), p)
    return sampler.apply_top_k_top_p_pytorch(logits.clone(), ks, ps)


@pytest.mark.parametrize("kind", ["different", "rounded", "equal", "impossible"])
@pytest.mark.parametrize("k, p", LIMITS)
def test_top_k_top_p_equals_vllms_own(k, p, kind):
    """Of equal logits at p's border vLLM keeps some, by the sort's order, and we all."""
    logits = cut_logits(kind)
    theirs = sorted_cut(logits, k, p)
    from beyond_dpo.jobs.sampling import top_k_top_p

    impossible = theirs.isinf()
    lowest = theirs.masked_fill(impossible, float("inf")).amin(-1, keepdim=True)
    expected = logits.masked_fill(logits < lowest, -float("inf"))
    ours = top_k_top_p(logits.clone(), k, p)
    assert torch.equal(ours, expected)
    if kind == "different":
        assert torch.equal(ours, theirs)
    if kind == "different" and p == 1 and k >= 1:
        kept = ours.isfinite().sum(-1)
        assert (kept == k).all()


@pytest.mark.parametrize(
    "k, p, kept",
    [
        (3, 1.0, 5),
        (3, 0.8, 5),
        (3, 0.699, 2),
        (2, 1.0, 2),
        (1, 1.0, 1),
        (3, 0.1, 1),
        (0, 1.0, 6),
    ],
)
def test_top_k_top_p_by_hand(k, p, kept):
    """Masses 4, 3, 1, 1, 1 of 10.

    k = 3 keeps the ties: 4, 3, 1, 1, 1. The four before the last hold 9 of 10 > 0.8, the first two
    7 of 10 < 0.8, so p = 0.8 keeps all five (vLLM would keep three), and p = 0.7 keeps two.
    """
    pytest.importorskip("vllm")
    from beyond_dpo.jobs.sampling import top_k_top_p

    masses = torch.tensor([[1.0, 4.0, 1.0, 3.0, 1.0, 1e-9]])
    logits = masses.log()
    assert top_k_top_p(logits, k, p).isfinite().sum() == kept


@pytest.mark.parametrize(
    ("device", "longest", "together"), [("cpu", 160, 64), ("cuda", 160, 1638), ("cuda", 4096, 64)]
)
def test_a_gpu_samples_as_many_requests_together_as_their_tokens_allow(device, longest, together):
    backend = object.__new__(TransformersBackend)
    backend.device = torch.device(device)
    backend.decoding = {"max_model_len": longest}
    assert backend._block_size() == together


if __name__ == "__main__":
    launch.serve(Sabotaged)


def test_help_is_shown_and_starts_nothing(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["generate", "--help"])
    # As in a process of its own.
    monkeypatch.delitem(sys.modules, "beyond_dpo.jobs.generate", raising=False)
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("beyond_dpo.jobs.generate", run_name="__main__")
    assert ended.value.code == 0
    assert "usage: python -m beyond_dpo.jobs.generate" in capsys.readouterr().out
