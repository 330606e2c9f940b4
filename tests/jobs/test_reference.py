"""Scores of responses against all logits in float64, and the reference's file of scores."""

import copy
import json
import math
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from beyond_dpo import attention, scoring
from beyond_dpo.jobs import reference
from beyond_dpo.machine import launch
from beyond_dpo.rows import prepare, row_length, write_rows
from beyond_dpo.scoring import ResponseScorer

PAIR = ["chosen", "rejected"]
GEMMA = {
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "head_dim": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


@pytest.fixture(scope="module")
def model(tiny):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def capped():
    """Return a random Gemma-2: its logits are 4 tanh(logits / 4), and embeddings are scaled."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(1)
    config = Gemma2Config(**GEMMA, final_logit_softcapping=4.0, attn_implementation="eager")
    model = Gemma2ForCausalLM(config).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(30)  # so that the cap matters
    return model


def batch(rows, names=PAIR, pad_id=2):
    tensors = scoring.pack(rows, list(names), pad_id)
    tensors.pop("ids")
    return tensors


def responses_of(rows, names=PAIR):
    """Return (prompt, response), each token ids, in the order of the scores."""
    return [(row["prompt_ids"], row["responses"][name]) for name in names for row in rows]


@torch.no_grad()
def by_hand(model, prompt_ids, response_ids):
    """Return a response's sum of ln p and its mean entropy / ln |V|.

    Computed alone, from all logits, in float64, by a Python loop.
    """
    ids = torch.tensor([prompt_ids + response_ids])
    logps = model(input_ids=ids).logits[0].double().log_softmax(-1)
    start = len(prompt_ids)
    end = ids.shape[1]
    total = 0.0
    for position in range(start, end):
        token = ids[0, position]
        total += logps[position - 1, token].item()
    entropies = -(logps.exp() * logps).sum(-1) / math.log(logps.shape[-1])
    mean_entropy = entropies[start - 1 : end - 1].mean()
    return total, mean_entropy.item()


def logps_by_hand(model, rows, names=PAIR):
    return [by_hand(model, *response)[0] for response in responses_of(rows, names)]


def assert_close_to(scores, expected, rel=1e-5, **tolerance):
    assert scores.tolist() == pytest.approx(expected, rel=rel, **tolerance)


def with_source(rows):
    """Return rows with a third response "source", which is the chosen one of another row."""
    extended = []
    for i, row in enumerate(rows):
        source = rows[i - 1]["responses"]["chosen"]
        extended.append({**row, "responses": {**row["responses"], "source": source}})
    return extended


# ---- against a plain computation


@pytest.mark.parametrize("chunk", [1, 7, 100_000])
@pytest.mark.parametrize("which", ["model", "capped"])
def test_scores_equal_all_logits_in_float64(which, chunk, request, rows):
    """Prompts are shared and rows share lines; response tokens far outnumber the smaller chunks."""
    model = request.getfixturevalue(which)
    inputs = batch(rows)
    assert len(inputs["input_ids"]) < len(rows)
    with torch.no_grad():
        scores = ResponseScorer(model, chunk=chunk)(**inputs, entropy=True)
    expected = [by_hand(model, *response) for response in responses_of(rows)]
    assert_close_to(scores["logps"], [logps for logps, _ in expected])
    assert_close_to(scores["entropies"], [entropy for _, entropy in expected])
    assert scores["tokens"].tolist() == [len(response) for _, response in responses_of(rows)]
    for values in scores.values():
        assert values.dtype == torch.float32
        assert values.shape == (2 * len(rows),)
    assert (scores["entropies"] > 0).all()
    assert (scores["entropies"] < 1).all()


def test_the_layout_of_flash_attention_gives_the_same_scores(model, rows):
    """Each response with its prompt, in one line, no mask: positions say where a sequence ends."""
    scorer = ResponseScorer(model)
    expected = scorer.score(rows, PAIR, 2, entropy=True)
    scorer.shared = False
    packed = scoring.pack(rows, PAIR, 2, shared=False)
    assert "row_of_token" not in packed
    assert len(packed["input_ids"]) == 1
    lengths = [row_length(row, [name]) for row in rows for name in PAIR]
    assert packed["input_ids"].numel() == sum(lengths), "no padding"
    assert packed["ids"] == [row["id"] for row in rows]
    scores = scorer.score(rows, PAIR, 2, entropy=True)
    for name, values in expected.items():
        assert_close_to(scores[name], values.tolist())


def test_flash_attention_is_not_taken_where_it_cannot_be():
    assert attention.choose("fp32") == "sdpa"
    assert attention.choose("bf16", "sdpa") == "sdpa"


@pytest.fixture(scope="module")
def flex(tiny):
    """Return the model with flex-attention, and with a head that is not nearly uniform."""
    model = scoring.load_model(str(tiny), "sdpa", torch.float32).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(10)
    model.set_attn_implementation("flex_attention")
    return model


@pytest.mark.parametrize("precision, tolerance", [("fp32", 1e-5), ("bf16", 2e-2)])
@pytest.mark.parametrize("names", [PAIR, ["source", "chosen", "rejected"]], ids=["pair", "fused"])
def test_flex_attention_scores_as_each_response_alone(flex, rows, names, precision, tolerance):
    """Forward only and not compiled, which is all that flex-attention can do on a CPU."""
    extended = with_source(rows)
    eager = copy.deepcopy(flex)
    eager.set_attn_implementation("eager")
    expected = torch.tensor(logps_by_hand(eager, extended, names))
    with torch.compiler.set_stance("force_eager"), torch.no_grad():
        scorer = ResponseScorer(flex, precision)
        assert scorer.flex
        assert scorer.pack(extended, names, 2)["input_ids"].shape[1] % 128 == 0
        scores = scorer.score(extended, names, 2)
    assert (scores["logps"] - expected).norm() <= tolerance * expected.norm()


def test_a_model_that_knows_no_flex_attention_keeps_to_sdpa(model, monkeypatch):
    """Only where flex-attention was not asked for by name."""
    monkeypatch.setattr(attention, "choose", lambda precision, wanted: "flex_attention")
    monkeypatch.setattr(type(model), "_supports_flex_attn", False)
    twin = copy.deepcopy(model)
    attention.apply(twin, "bf16")
    assert twin.config._attn_implementation == "sdpa"
    with pytest.raises(ValueError, match="does not support.*flex_attention"):
        attention.apply(twin, "bf16", "flex_attention")


@pytest.fixture
def on_a_gpu(monkeypatch):
    """Let flex-attention be what "auto" gives, as on a GPU; here its kernel cannot be compiled."""
    monkeypatch.setattr(attention, "choose", lambda precision, wanted: "flex_attention")
    monkeypatch.setattr(attention, "_one_kernel_for_all_lengths", lambda: None)


def refuse(*arguments, **options):
    raise RuntimeError("out of resource: shared memory")


def test_where_flex_attention_fails_sdpa_takes_its_place(
    model, rows, on_a_gpu, monkeypatch, caplog
):
    """The model stays in the mode that it had; asked for by name, the failure is told."""
    monkeypatch.setattr(attention, "visible_blocks", refuse)
    twin = copy.deepcopy(model).train()
    scorer = scoring.build_scorer(twin, "fp32")
    assert "sdpa takes its place: out of resource" in caplog.text
    assert not scorer.flex
    assert twin.training
    expected = ResponseScorer(copy.deepcopy(model)).score(rows, PAIR, 2)
    assert_close(scorer.score(rows, PAIR, 2)["logps"], expected["logps"])
    with pytest.raises(RuntimeError, match="out of resource"):
        scoring.build_scorer(copy.deepcopy(model), "fp32", "flex_attention")


def test_dropout_in_attention_is_nothing_for_flex_attention(model, on_a_gpu):
    twin = copy.deepcopy(model)
    twin.config.attention_dropout = 0.1
    attention.apply(twin, "bf16")
    assert twin.config._attn_implementation == "sdpa"


def test_an_attention_that_does_not_serve_the_model_is_noticed(model, monkeypatch):
    """As sdpa does with sinks: packed and alone it would be wrong alike."""
    twin = copy.deepcopy(model)
    for layer in twin.model.layers:
        monkeypatch.setattr(layer.self_attn, "scaling", 20 * layer.self_attn.scaling)
    whole = twin.set_attn_implementation

    def set_other_scaling(implementation):
        for layer in twin.model.layers:
            layer.self_attn.scaling *= 50 if implementation == "eager" else 0.02
        whole(implementation)

    monkeypatch.setattr(twin, "set_attn_implementation", set_other_scaling)
    with torch.no_grad():
        twin.get_output_embeddings().weight.mul_(10)
    with pytest.raises(ValueError, match="score packed responses otherwise than alone"):
        ResponseScorer(twin)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is what it needs")
def test_flex_attention_needs_a_gpu(model):
    with pytest.raises(ValueError, match="trains on a GPU only; sdpa needs none"):
        attention.apply(copy.deepcopy(model), "bf16", "flex_attention")


@pytest.mark.skipif(torch.cuda.is_available(), reason="flash-attention may be there with a GPU")
def test_flash_attention_needs_a_gpu():
    assert attention.choose("bf16") == "sdpa"
    with pytest.raises(ImportError, match="needs a GPU.*pip install flash-attn"):
        attention.choose("bf16", "flash_attention_2")


def gradients(model, score, responses):
    """Return the gradients of a weighted sum of scores, by the names of the weights."""
    twin = copy.deepcopy(model)
    coefficients = torch.linspace(-1, 1, responses)
    (score(twin) * coefficients).sum().backward()
    return {name: weight.grad for name, weight in twin.named_parameters()}


@pytest.mark.parametrize("chunk", [3, 50, 100_000])
def test_gradients_are_those_of_each_response_alone_however_they_are_cut(model, rows, chunk):
    """One chunk keeps its logits; several are computed again in the backward pass."""
    responses = responses_of(rows)

    def alone(twin):
        sums = []
        for prompt, response in responses:
            ids = torch.tensor([prompt + response])
            logps = twin(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            labels = ids[0, len(prompt) :, None]
            sums.append(logps.gather(-1, labels).sum())
        return torch.stack(sums)

    def packed(twin):
        return ResponseScorer(twin, chunk=chunk)(**batch(rows))["logps"]

    expected = gradients(model, alone, len(responses))
    assert len(expected) == 20
    found = gradients(model, packed, len(responses))
    for name, gradient in expected.items():
        assert_close(found[name], gradient, rtol=1e-4, atol=1e-5, msg=name)


def test_three_responses_share_one_prompt(model, rows):
    """As WRPO needs: three responses to a prompt, each scored as if it stood alone."""
    names = ["source", "chosen", "rejected"]
    extended = with_source(rows)
    with torch.no_grad():
        scores = ResponseScorer(model)(**batch(extended, names))
    assert_close_to(scores["logps"], logps_by_hand(model, extended, names))


def granite(logits_scaling):
    from transformers import GraniteConfig, GraniteForCausalLM

    torch.manual_seed(1)
    config = GraniteConfig(
        vocab_size=512,
        hidden_size=32,
        intermediate_size=64,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_hidden_layers=2,
        logits_scaling=logits_scaling,
    )
    return GraniteForCausalLM(config)


def local_gpt_neo():
    from transformers import GPTNeoConfig, GPTNeoForCausalLM

    torch.manual_seed(1)
    config = GPTNeoConfig(
        vocab_size=512,
        hidden_size=32,
        intermediate_size=64,
        num_layers=2,
        num_heads=2,
        attention_types=[[["local"], 2]],
        window_size=3,
    )
    return GPTNeoForCausalLM(config)


def test_a_model_that_does_not_divide_its_logits_is_taken():
    ResponseScorer(granite(1.0))


@pytest.mark.parametrize("build", [lambda: granite(8.0), local_gpt_neo], ids=["head", "mask"])
def test_models_that_score_packed_responses_otherwise_are_refused(build):
    """Granite divides its logits after the head; GPT-Neo's local layers count columns."""
    model = build()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(10)  # so that the difference shows in an untrained model
    with pytest.raises((ValueError, AttributeError), match="packed|embeddings"):
        ResponseScorer(model)


@pytest.mark.parametrize("cap", [4.0, 50.0])
def test_attention_scores_are_capped_as_in_the_model(tmp_path, cap):
    """sdpa leaves Gemma-2's cap out in silence.

    A cap of 50 is too weak for a check of the scores to notice.
    """
    from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(1)
    config = Gemma2Config(
        **GEMMA,
        query_pre_attn_scalar=16,
        initializer_range=0.8,
        attn_logit_softcapping=cap,
    )
    Gemma2ForCausalLM(config).save_pretrained(tmp_path)
    prompt = [5, 6, 7, 8]
    response = [9, 10, 11, 12]
    row = {"id": "", "prompt_ids": prompt, "responses": {"a": response}}
    scorers = [scoring.load_scorer(str(tmp_path))]
    logps = {}
    for implementation in ("eager", "sdpa"):
        model = AutoModelForCausalLM.from_pretrained(
            tmp_path, dtype=torch.float32, attn_implementation=implementation
        ).eval()
        # before a scorer takes the model from sdpa to eager attention
        logps[implementation], _ = by_hand(model, prompt, response)
        scorers.append(ResponseScorer(model))
    assert abs(logps["eager"] - logps["sdpa"]) > 1e-3, "the cap matters"
    for scorer in scorers:
        scores = scorer.score([row], ["a"], 2)
        assert_close_to(scores["logps"], [logps["eager"]])


@pytest.mark.parametrize(
    "name", ["attn_logit_softcapping", "attention_logits_soft_cap", "attn_logit_cap"]
)
def test_which_settings_cap_attention(name):
    from transformers import LlamaConfig

    assert attention.caps(LlamaConfig(**{name: 30.0}))
    assert not attention.caps(LlamaConfig(**{name: None}, final_logit_softcapping=30.0))


def test_a_checkpoint_that_lacks_a_tensor_is_refused(tiny, tmp_path):
    """transformers would draw the missing one at random and go on."""
    folder = tmp_path / "model"
    shutil.copytree(tiny, folder)
    tensors = load_file(tiny / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    del tensors[name]
    message = f"no {name} for the model"
    with pytest.raises(ValueError, match=message):
        scoring.plain_logps(str(tiny), tensors, [[5, 6, 7]], torch.float32)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message):
        scoring.load_scorer(str(folder))


@pytest.mark.parametrize("factor", [1.0, 1.5])
def test_plain_log_probabilities_are_those_of_the_given_tensors(model, tiny, factor):
    """Not those of the folder's own; as the Python loop has them."""
    weights = load_file(tiny / "model.safetensors")
    tensors = {name: tensor * factor for name, tensor in weights.items()}
    twin = copy.deepcopy(model)
    twin.load_state_dict(tensors, strict=False)
    sequences = [[5, 6, 7], [300, 9]]
    expected = [by_hand(twin, ids[:1], ids[1:])[0] for ids in sequences]
    found = scoring.plain_logps(str(tiny), tensors, sequences, torch.float32)
    assert found == pytest.approx(expected, rel=1e-5)


def test_sequences_longer_than_the_window_are_refused(model, rows):
    scorer = ResponseScorer(model)
    last_positions = [int(batch([row])["position_ids"].max()) for row in rows]
    longest = 1 + max(last_positions)
    scorer.window = longest
    batch_of_rows = scorer.pack(rows, PAIR, 2)
    assert batch_of_rows["input_ids"].shape[1] > longest, "lines may be longer, sequences not"
    scorer.window = longest - 1
    with pytest.raises(ValueError, match="window"):
        scorer.score(rows, PAIR, 2)


@pytest.fixture
def calls(model):
    """Return a list that gets the number of positions in each call of the model's head."""
    positions = []
    hook = model.lm_head.register_forward_hook(
        lambda module, inputs, output: positions.append(output.shape[0])
    )
    yield positions
    hook.remove()
    model.zero_grad()


def test_logits_exist_for_response_positions_only_and_a_chunk_at_a_time(model, rows, calls):
    total = sum(len(response) for _, response in responses_of(rows))
    whole = ResponseScorer(model)
    pieces = ResponseScorer(model, chunk=64)
    calls.clear()  # of the scorers' checks
    whole(**batch(rows))
    assert calls == [total]
    calls.clear()
    pieces(**batch(rows))["logps"].sum().backward()
    assert max(calls) == 64
    assert sum(calls) == 2 * total  # forward, and once more for backward


# ---- what scores may be


def test_a_model_that_knows_nothing_has_entropy_one(model, rows):
    """Logits all 0: ln p = -ln 512 for each token, and the entropy is ln |V|."""
    blank = copy.deepcopy(model)
    with torch.no_grad():
        blank.lm_head.weight.zero_()
        scores = ResponseScorer(blank)(**batch(rows), entropy=True)
    expected_logps = -math.log(512) * scores["tokens"]
    assert scores["entropies"].tolist() == pytest.approx([1.0] * 2 * len(rows), abs=2e-7)
    assert_close_to(scores["logps"], expected_logps.tolist(), rel=1e-6)


def test_a_model_that_is_sure_has_entropy_zero_and_never_less(model, rows):
    sure = copy.deepcopy(model)
    with torch.no_grad():
        sure.lm_head.weight.mul_(1e4)
        scores = ResponseScorer(sure)(**batch(rows), entropy=True)
    assert (scores["entropies"] >= 0).all()
    assert scores["entropies"].median() < 0.01


def test_a_response_without_tokens_scores_zero_and_its_entropy_is_nan(model, rows):
    empty = {**rows[1], "responses": {"chosen": []}}
    inputs = batch([rows[0], empty, rows[2]], ["chosen"])
    with torch.no_grad():
        scores = ResponseScorer(model)(**inputs, entropy=True)
    assert scores["logps"][1] == 0
    assert scores["tokens"][1] == 0
    assert scores["entropies"][1].isnan()
    assert scores["logps"][0] < 0
    assert scores["entropies"][[0, 2]].isfinite().all()


def test_a_batch_without_any_response_token(model, rows):
    empty = {**rows[1], "responses": {"chosen": []}}
    with torch.no_grad():
        scores = ResponseScorer(model)(**batch([empty], ["chosen"]), entropy=True)
    assert scores["logps"].tolist() == [0]
    assert scores["entropies"].isnan().all()


def test_bf16_is_close_to_fp32(model, rows):
    with torch.no_grad():
        exact = ResponseScorer(model, "fp32")(**batch(rows))["logps"]
        rough = ResponseScorer(model, "bf16")(**batch(rows))["logps"]
    assert rough.dtype == torch.float32
    assert not torch.equal(exact, rough)
    assert_close(exact, rough, rtol=5e-3, atol=0)


def test_an_unknown_precision_is_refused(model):
    with pytest.raises(ValueError, match="fp16"):
        ResponseScorer(model, "fp16")


@pytest.mark.parametrize("training", [True, False])
def test_the_check_leaves_the_models_mode_alone(model, training):
    """A generation back-end must not find its dropout switched on again."""
    twin = copy.deepcopy(model).train(training)
    ResponseScorer(twin)
    assert twin.training is training
    assert twin.get_decoder().training is training


# ---- whole sets of rows


@pytest.mark.parametrize("size", [2, 5, 100])
def test_scores_do_not_depend_on_the_batches(model, rows, size):
    scorer = ResponseScorer(model)
    expected = scoring.score_rows(scorer, rows, PAIR, pad_id=2, micro_batch=1)
    scores = scoring.score_rows(scorer, rows, PAIR, pad_id=2, micro_batch=size)
    for key in ("logps", "tokens", "entropies"):
        assert scores[key].shape == (len(rows), 2)
        assert not scores[key].requires_grad
        assert_close(scores[key], expected[key], rtol=1e-5, atol=1e-5)


def test_scores_keep_the_order_of_the_rows_and_names(model, rows):
    scorer = ResponseScorer(model)
    forwards = scoring.score_rows(scorer, rows, PAIR, pad_id=2, micro_batch=1)
    backwards = scoring.score_rows(scorer, rows[::-1], PAIR[::-1], pad_id=2, micro_batch=5)
    turned = backwards["logps"].flip(0).flip(1)
    assert_close(turned, forwards["logps"], rtol=1e-5, atol=1e-5)


def test_padding_with_the_end_token_changes_nothing(model, rows):
    """As in SmolLM2, where pad and end are one token, and responses end with it."""
    for row in rows[:2]:
        assert row["responses"]["chosen"][-1] == 1
    scorer = ResponseScorer(model)
    with_pad = scoring.score_rows(scorer, rows, ["chosen"], pad_id=2)
    with_end = scoring.score_rows(scorer, rows, ["chosen"], pad_id=1)
    for key, values in with_pad.items():
        assert torch.equal(values, with_end[key])


def test_a_score_that_is_not_finite_names_the_rows(model, rows):
    broken = copy.deepcopy(model)
    token = rows[3]["responses"]["chosen"][0]
    holding = []
    for row in rows:
        inputs = row["prompt_ids"] + row["responses"]["chosen"][:-1]
        if token in inputs:
            holding.append(row["id"])
    assert 0 < len(holding) < len(rows)
    with torch.no_grad():
        # a copy, so that the head stays whole
        broken.lm_head.weight = torch.nn.Parameter(broken.lm_head.weight.clone())
        broken.get_input_embeddings().weight[token] = float("inf")
    with pytest.raises(ValueError, match="not finite") as failure:
        scoring.score_rows(ResponseScorer(broken), rows, ["chosen"], pad_id=2, micro_batch=1)
    for row_id in holding[:5]:
        assert repr(row_id) in str(failure.value)


# ---- the job and its file


@pytest.fixture(scope="module")
def job(tiny, rows, tmp_path_factory):
    """Run the job in a child process, on rows of which one is empty; return its settings."""
    folder = tmp_path_factory.mktemp("reference")
    empty = {"id": "empty", "prompt_ids": [5], "responses": {"chosen": [], "rejected": [7]}}
    write_rows(folder / "rows.jsonl", [*rows, empty])
    job = {
        "model": str(tiny),
        "rows": str(folder / "rows.jsonl"),
        "names": PAIR,
        "limits": {"max_prompt": 6, "max_length": 20},
        "precision": "fp32",
        "micro_batch": 4,
        "out": str(folder / "reference.safetensors"),
    }
    launch.run("beyond_dpo.jobs.reference", job, folder / "work", desc="reference")
    return job


@pytest.fixture
def kept(job, rows):
    """Return the rows as the job cut them."""
    kept, dropped = prepare(rows, job["names"], **job["limits"], bos_id=0, eos_id=1)
    assert dropped == 0
    assert kept != rows
    return kept


@pytest.mark.slow
def test_reference_file_says_which_rows_it_has(job, rows):
    """It has one line for each row that is not empty."""
    with safe_open(job["out"], "pt") as file:
        metadata = file.metadata()
        assert metadata["dropped"] == "1"
        assert json.loads(metadata["names"]) == job["names"]
        assert json.loads(metadata["ids"]) == [row["id"] for row in rows]
        assert set(file.keys()) == {"logps", "tokens", "entropies"}


def test_reference_file_is_read_in_any_order(job, model, kept):
    names = ["rejected", "chosen"]
    backwards = kept[::-1]
    scores = reference.load(job["out"], backwards, names)
    expected = [by_hand(model, *response) for response in responses_of(backwards, names)]
    # from all of one response after the other to one row after the other
    logps, entropies = torch.tensor(expected).view(2, len(kept), 2).permute(2, 1, 0)
    assert_close(scores["logps"], logps, rtol=1e-5, atol=1e-5)
    assert_close(scores["entropies"], entropies, rtol=1e-5, atol=1e-5)


def test_a_part_of_a_reference_file_is_read(job, kept):
    part = kept[3:5]
    scores = reference.load(job["out"], part, ["chosen"])
    assert scores["tokens"].tolist() == [[len(row["responses"]["chosen"])] for row in part]


def test_reference_file_without_a_row_is_refused(job, kept):
    stranger = {**kept[0], "id": "stranger"}
    with pytest.raises(ValueError, match="holds no 'stranger'"):
        reference.load(job["out"], [*kept, stranger], ["chosen"])


def test_reference_file_without_a_response_is_refused(job, kept):
    with pytest.raises(ValueError, match="holds no 'target_chosen'"):
        reference.load(job["out"], kept, ["target_chosen", "rejected"])


def test_reference_file_of_rows_that_were_cut_otherwise_is_refused(job, rows, kept):
    assert len(rows[2]["responses"]["chosen"]) > len(kept[2]["responses"]["chosen"])
    with pytest.raises(ValueError, match="other lengths"):
        reference.load(job["out"], rows, job["names"])


def test_two_rows_with_one_id_are_refused(job, rows, tmp_path):
    twice = tmp_path / "rows.jsonl"
    write_rows(twice, [rows[0], rows[1], rows[0]])
    file = tmp_path / "job.json"
    file.write_text(json.dumps(job | {"rows": str(twice)}))
    with pytest.raises(ValueError, match="share an id"):
        reference.main(str(file))
