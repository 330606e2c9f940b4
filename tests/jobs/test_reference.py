"""Scores of responses against a plain computation with all logits in float64, and the reference's
file of scores.
"""

import copy
import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from beyond_dpo import scoring
from beyond_dpo.jobs import reference
from beyond_dpo.machine import launch
from beyond_dpo.rows import prepare, row_length, write_rows
from beyond_dpo.scoring import ResponseScorer


@pytest.fixture(scope="module")
def model(tiny):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def capped():
    """Return a random Gemma-2: its logits are 4 tanh(logits / 4), and embeddings are scaled."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(1)
    shape = {
        "vocab_size": 512,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "head_dim": 16,
    }
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "final_logit_softcapping": 4.0}
    loud = Gemma2ForCausalLM(Gemma2Config(**shape, **heads, attn_implementation="eager")).eval()
    with torch.no_grad():
        loud.lm_head.weight.mul_(30)  # so that the cap matters
    return loud


def batch(rows, names=("chosen", "rejected"), pad_id=2):
    tensors = scoring.pack(rows, list(names), pad_id)
    tensors.pop("ids")
    return tensors


@torch.no_grad()
def by_hand(model, prompt_ids, response_ids):
    """Return (sum of ln p, mean entropy / ln |V|) of one response: alone, all logits, float64, a
    Python loop.
    """
    ids = torch.tensor([prompt_ids + response_ids])
    logp = model(input_ids=ids).logits[0].double().log_softmax(-1)
    start, end = len(prompt_ids), ids.shape[1]
    entropies = -(logp.exp() * logp).sum(-1)[start - 1 : end - 1] / math.log(logp.shape[-1])
    return sum(logp[t - 1, ids[0, t]].item() for t in range(start, end)), entropies.mean().item()


@pytest.mark.parametrize("which", ["model", "capped"])
def test_scores_equal_all_logits_in_float64(which, request, rows):
    """Prompts are shared and rows share lines; response tokens far outnumber the smaller chunks."""
    assert len(batch(rows)["input_ids"]) < len(rows)
    model = request.getfixturevalue(which)
    wanted = [
        by_hand(model, r["prompt_ids"], r["responses"][n])
        for n in ("chosen", "rejected")
        for r in rows
    ]
    for chunk in (1, 7, 100_000):
        with torch.no_grad():
            scores = ResponseScorer(model, chunk=chunk)(**batch(rows), entropy=True)
        assert scores["logps"].tolist() == pytest.approx([w[0] for w in wanted], rel=1e-5)
        assert scores["entropies"].tolist() == pytest.approx([w[1] for w in wanted], rel=1e-5)
        assert scores["tokens"].tolist() == [
            len(r["responses"][n]) for n in ("chosen", "rejected") for r in rows
        ]
        assert all(
            v.dtype == torch.float32 and v.shape == (2 * len(rows),) for v in scores.values()
        )
        assert ((scores["entropies"] > 0) & (scores["entropies"] < 1)).all()


def test_the_layout_of_flash_attention_gives_the_same_scores(model, rows):
    """Each response with its prompt, all in one line, no mask: positions alone say where a sequence
    ends.
    """
    names = ["chosen", "rejected"]
    scorer = ResponseScorer(model)
    wanted = scorer.score(rows, names, 2, entropy=True)
    scorer.shared = False
    packed = scoring.pack(rows, names, 2, shared=False)
    assert "attention_mask" not in packed and len(packed["input_ids"]) == 1
    assert packed["input_ids"].numel() == sum(row_length(r, [n]) for r in rows for n in names), (
        "no padding"
    )
    assert packed["ids"] == [r["id"] for r in rows]
    found = scorer.score(rows, names, 2, entropy=True)
    for name in wanted:
        assert found[name].tolist() == pytest.approx(wanted[name].tolist(), rel=1e-5)


def test_flash_attention_is_taken_where_it_is_there():
    assert scoring.attention("fp32") == "sdpa" and scoring.attention("bf16", "sdpa") == "sdpa"
    if not torch.cuda.is_available():
        assert scoring.attention("bf16") == "sdpa"
        with pytest.raises(ImportError, match="needs a GPU.*pip install flash-attn"):
            scoring.attention("bf16", "flash_attention_2")


def test_gradients_are_those_of_each_response_alone_however_they_are_cut(model, rows):
    """One chunk keeps its logits; several are computed again in the backward pass."""
    alone = [(r["prompt_ids"], r["responses"][n]) for n in ("chosen", "rejected") for r in rows]

    def gradient(score):
        twin = copy.deepcopy(model)
        (score(twin) * torch.linspace(-1, 1, 2 * len(rows))).sum().backward()
        return {name: w.grad for name, w in twin.named_parameters()}

    def plain(twin):
        sums = []
        for prompt, said in alone:
            ids = torch.tensor([prompt + said])
            logps = twin(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            sums.append(logps.gather(-1, ids[0, len(prompt) :, None]).sum())
        return torch.stack(sums)

    wanted = gradient(plain)
    assert len(wanted) == 20
    for chunk in (3, 50, 100_000):
        found = gradient(
            lambda twin, chunk=chunk: ResponseScorer(twin, chunk=chunk)(**batch(rows))["logps"]
        )
        for name, grad in wanted.items():
            torch.testing.assert_close(found[name], grad, rtol=1e-4, atol=1e-5, msg=name)


def test_three_responses_share_one_prompt(model, rows):
    """As WRPO needs: source, target and rejected answer of one prompt, each scored as if it stood
    alone.
    """
    said = [r["responses"]["chosen"] for r in rows]
    extra = [
        {**r, "responses": {**r["responses"], "source": said[i - 1]}} for i, r in enumerate(rows)
    ]
    names = ("source", "chosen", "rejected")
    with torch.no_grad():
        scores = ResponseScorer(model)(**batch(extra, names))
    wanted = [by_hand(model, r["prompt_ids"], r["responses"][n])[0] for n in names for r in extra]
    assert scores["logps"].tolist() == pytest.approx(wanted, rel=1e-5)


def test_models_that_score_packed_responses_otherwise_are_refused():
    """GPT-Neo's local layers count columns, not positions; Granite divides its logits after the
    head.
    """
    from transformers import GPTNeoConfig, GPTNeoForCausalLM, GraniteConfig, GraniteForCausalLM

    torch.manual_seed(1)
    shape = {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 64}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 2}
    granite = {
        scale: GraniteForCausalLM(GraniteConfig(**shape, **heads, logits_scaling=scale))
        for scale in (1.0, 8.0)
    }
    ResponseScorer(granite[1.0])
    local = GPTNeoConfig(
        **shape, num_layers=2, num_heads=2, attention_types=[[["local"], 2]], window_size=3
    )
    for wrong in (granite[8.0], GPTNeoForCausalLM(local)):
        with torch.no_grad():
            for weight in wrong.parameters():
                weight.mul_(10)  # so that the difference shows in an untrained model
        with pytest.raises((ValueError, AttributeError), match="packed|embeddings"):
            ResponseScorer(wrong)


@pytest.mark.parametrize("cap", [4.0, 50.0])
def test_attention_scores_are_capped_as_in_the_model(tmp_path, cap):
    """sdpa leaves Gemma-2's cap out in silence; a large one, too weak for a check of the scores to
    notice, as well.
    """
    from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(1)
    shape = {
        "vocab_size": 512,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "head_dim": 16,
    }
    heads = {
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "query_pre_attn_scalar": 16,
        "initializer_range": 0.8,
    }
    Gemma2ForCausalLM(Gemma2Config(**shape, **heads, attn_logit_softcapping=cap)).save_pretrained(
        tmp_path
    )
    prompt, said = [5, 6, 7, 8], [9, 10, 11, 12]
    row = {"id": "", "prompt_ids": prompt, "responses": {"said": said}}
    found = {}
    for kind in ("eager", "sdpa"):
        model = AutoModelForCausalLM.from_pretrained(
            tmp_path, dtype=torch.float32, attn_implementation=kind
        ).eval()
        found[kind] = by_hand(model, prompt, said)[0]
        scorer = ResponseScorer(model)
        assert scorer.score([row], ["said"], 2)["logps"].tolist() == pytest.approx(
            [found["eager"]], rel=1e-5
        )
    assert abs(found["eager"] - found["sdpa"]) > 1e-3, "the cap matters"
    scorer = scoring.load_scorer(str(tmp_path))
    assert scorer.score([row], ["said"], 2)["logps"].tolist() == pytest.approx(
        [found["eager"]], rel=1e-5
    )


@pytest.mark.parametrize(
    "name", ["attn_logit_softcapping", "attention_logits_soft_cap", "attn_logit_cap"]
)
def test_which_settings_cap_attention(name):
    from transformers import LlamaConfig

    assert scoring.caps_attention(LlamaConfig(**{name: 30.0}))
    assert not scoring.caps_attention(LlamaConfig(**{name: None}, final_logit_softcapping=30.0))


def test_a_checkpoint_that_lacks_a_tensor_is_refused(tiny, tmp_path):
    """transformers would draw the missing one at random and go on."""
    shutil.copytree(tiny, tmp_path / "model")
    weights = load_file(tiny / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    cut = {key: tensor for key, tensor in weights.items() if key != name}
    with pytest.raises(ValueError, match=f"no {name} for the model"):
        scoring.plain_logps(str(tiny), cut, [[5, 6, 7]], torch.float32)
    save_file(cut, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"no {name} for the model"):
        scoring.load_scorer(str(tmp_path / "model"))


def test_plain_log_probabilities_are_those_of_the_given_tensors(model, tiny):
    """Not those of the folder's own; as the Python loop has them."""
    weights = load_file(tiny / "model.safetensors")
    other = {name: tensor * 1.5 for name, tensor in weights.items()}
    for tensors in (weights, other):
        twin = copy.deepcopy(model)
        twin.load_state_dict(tensors, strict=False)
        wanted = [by_hand(twin, ids[:1], ids[1:])[0] for ids in ([5, 6, 7], [300, 9])]
        found = scoring.plain_logps(str(tiny), tensors, [[5, 6, 7], [300, 9]], torch.float32)
        assert found == pytest.approx(wanted, rel=1e-5)


def test_sequences_longer_than_the_window_are_refused(model, rows):
    scorer = ResponseScorer(model)
    scorer.window = 1 + max(int(batch([r])["position_ids"].max()) for r in rows)
    with torch.no_grad():
        scorer(**batch(rows))  # lines may be longer than the window, sequences not
        scorer.window -= 1
        with pytest.raises(ValueError, match="window"):
            scorer(**batch(rows))


def test_logits_exist_for_response_positions_only_and_a_chunk_at_a_time(model, rows):
    seen, whole, pieces = [], ResponseScorer(model), ResponseScorer(model, chunk=64)
    hook = model.lm_head.register_forward_hook(
        lambda module, inputs, output: seen.append(output.shape[0])
    )
    total = sum(len(ids) for r in rows for ids in r["responses"].values())
    whole(**batch(rows))
    assert seen == [total]
    seen.clear()
    pieces(**batch(rows))["logps"].sum().backward()
    hook.remove()
    model.zero_grad()
    assert max(seen) == 64 and sum(seen) == 2 * total  # forward, and once more for backward


def test_a_model_that_knows_nothing_has_entropy_one(model, rows):
    """Logits all 0: ln p = -ln 512 for each token, and the entropy is ln |V|."""
    blank = copy.deepcopy(model)
    with torch.no_grad():
        blank.lm_head.weight.zero_()
        scores = ResponseScorer(blank)(**batch(rows), entropy=True)
    assert scores["entropies"].tolist() == pytest.approx([1.0] * 2 * len(rows), abs=2e-7)
    assert scores["logps"].tolist() == pytest.approx(
        (-math.log(512) * scores["tokens"]).tolist(), rel=1e-6
    )


def test_a_model_that_is_sure_has_entropy_zero_and_never_less(model, rows):
    sure = copy.deepcopy(model)
    with torch.no_grad():
        sure.lm_head.weight.mul_(1e4)
        scores = ResponseScorer(sure)(**batch(rows), entropy=True)
    assert (scores["entropies"] >= 0).all() and scores["entropies"].median() < 0.01


def test_a_response_without_tokens_scores_zero_and_its_entropy_is_nan(model, rows):
    rows = [
        {**r, "responses": {"chosen": r["responses"]["chosen"] if i != 1 else []}}
        for i, r in enumerate(rows[:3])
    ]
    with torch.no_grad():
        scores = ResponseScorer(model)(**batch(rows, ["chosen"]), entropy=True)
        nothing = ResponseScorer(model)(**batch(rows[1:2], ["chosen"]), entropy=True)
    assert scores["logps"][1] == scores["tokens"][1] == 0 and scores["entropies"][1].isnan()
    assert scores["logps"][0] < 0 and scores["entropies"][[0, 2]].isfinite().all()
    assert nothing["logps"].tolist() == [0] and nothing["entropies"].isnan().all()


def test_precision(model, rows):
    with torch.no_grad():
        exact, rough = (
            ResponseScorer(model, precision)(**batch(rows))["logps"]
            for precision in ("fp32", "bf16")
        )
    assert rough.dtype == torch.float32 and not torch.equal(exact, rough)
    torch.testing.assert_close(exact, rough, rtol=5e-3, atol=0)
    with pytest.raises(ValueError, match="fp16"):
        ResponseScorer(model, "fp16")


@pytest.mark.parametrize("training", [True, False])
def test_the_check_leaves_the_models_mode_alone(model, training):
    """A generation back-end must not find its dropout switched on again."""
    given = copy.deepcopy(model).train(training)
    ResponseScorer(given)
    assert given.training is training and given.get_decoder().training is training


# ---- whole sets of rows


def test_scores_keep_the_order_of_the_rows_whatever_the_batches(model, rows):
    names, columns = ["rejected", "chosen"], torch.tensor([1, 0])
    wanted = scoring.score_rows(ResponseScorer(model), rows, names, pad_id=2, micro_batch=1)
    for size in (2, 5, 100):
        found = scoring.score_rows(ResponseScorer(model), rows, names, pad_id=2, micro_batch=size)
        for key in ("logps", "tokens", "entropies"):
            assert found[key].shape == (len(rows), 2) and not found[key].requires_grad
            torch.testing.assert_close(found[key], wanted[key], rtol=1e-5, atol=1e-5)
    backwards = scoring.score_rows(
        ResponseScorer(model), rows[::-1], names[::-1], pad_id=2, micro_batch=5
    )
    torch.testing.assert_close(
        backwards["logps"].flip(0)[:, columns], wanted["logps"], rtol=1e-5, atol=1e-5
    )


def test_padding_with_the_end_token_changes_nothing(model, rows):
    """As in SmolLM2, where pad and end are one token, and responses end with it."""
    assert all(r["responses"]["chosen"][-1] == 1 for r in rows[:2])
    with_pad, with_end = (
        scoring.score_rows(ResponseScorer(model), rows, ["chosen"], pad_id=pad) for pad in (2, 1)
    )
    for key, value in with_pad.items():
        assert torch.equal(value, with_end[key])


def test_a_score_that_is_not_finite_names_the_rows(model, rows):
    broken = copy.deepcopy(model)
    token = rows[3]["responses"]["chosen"][0]
    holding = [r["id"] for r in rows if token in r["prompt_ids"] + r["responses"]["chosen"][:-1]]
    with torch.no_grad():
        broken.lm_head.weight = torch.nn.Parameter(
            broken.lm_head.weight.clone()
        )  # the head stays whole
        broken.get_input_embeddings().weight[token] = float("inf")
    assert 0 < len(holding) < len(rows)
    with pytest.raises(ValueError, match="not finite") as failure:
        scoring.score_rows(ResponseScorer(broken), rows, ["chosen"], pad_id=2, micro_batch=1)
    assert all(repr(i) in str(failure.value) for i in holding[:5])


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
        "names": ["chosen", "rejected"],
        "limits": {"max_prompt": 6, "max_length": 20},
        "precision": "fp32",
        "micro_batch": 4,
        "out": str(folder / "reference.safetensors"),
    }
    launch.run("beyond_dpo.jobs.reference", job, folder / "work", desc="reference")
    return job


def test_reference_file_holds_the_scores_of_the_cut_rows(job, model, rows):
    """The file is whole or missing, has one line per row that is not empty, and can be read in any
    order.
    """
    from safetensors import safe_open

    with safe_open(job["out"], "pt") as f:
        assert f.metadata()["dropped"] == "1" and json.loads(f.metadata()["names"]) == job["names"]
        assert json.loads(f.metadata()["ids"]) == [r["id"] for r in rows]
        assert set(f.keys()) == {"logps", "tokens", "entropies"}
    kept, dropped = prepare(rows, job["names"], **job["limits"], bos_id=0, eos_id=1)
    assert dropped == 0 and kept != rows
    wanted = [
        [by_hand(model, r["prompt_ids"], r["responses"][n]) for n in ("rejected", "chosen")]
        for r in kept[::-1]
    ]
    found = reference.load(job["out"], kept[::-1], ["rejected", "chosen"])
    torch.testing.assert_close(found["logps"], torch.tensor(wanted)[..., 0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        found["entropies"], torch.tensor(wanted)[..., 1], rtol=1e-5, atol=1e-5
    )
    few = reference.load(job["out"], kept[3:5], ["chosen"])
    assert few["tokens"].tolist() == [[len(r["responses"]["chosen"])] for r in kept[3:5]]


def test_reference_file_of_other_rows_is_refused(job, rows):
    kept, _ = prepare(rows, job["names"], **job["limits"], bos_id=0, eos_id=1)
    with pytest.raises(ValueError, match="holds no 'stranger'"):
        reference.load(job["out"], [*kept, {**kept[0], "id": "stranger"}], ["chosen"])
    with pytest.raises(ValueError, match="holds no 'target_chosen'"):
        reference.load(job["out"], kept, ["target_chosen", "rejected"])
    assert len(rows[2]["responses"]["chosen"]) > len(kept[2]["responses"]["chosen"])
    with pytest.raises(ValueError, match="other lengths"):  # not truncated, or truncated otherwise
        reference.load(job["out"], rows, job["names"])


def test_two_rows_with_one_id_are_refused(job, rows, tmp_path):
    write_rows(tmp_path / "rows.jsonl", [rows[0], rows[1], rows[0]])
    (tmp_path / "job.json").write_text(json.dumps(job | {"rows": str(tmp_path / "rows.jsonl")}))
    with pytest.raises(ValueError, match="share an id"):
        reference.main(str(tmp_path / "job.json"))


def test_a_job_cuts_its_rows_by_the_tokens_of_its_own_model(tiny, tmp_path):
    """The model's BOS stays in front of a cut prompt, its end token closes a cut response."""
    row = {"id": "long", "prompt_ids": [0, 5, 6, 7, 8], "responses": {"chosen": [9, 10, 11, 12, 1]}}
    write_rows(tmp_path / "rows.jsonl", [row])
    job = {
        "model": str(tiny),
        "rows": str(tmp_path / "rows.jsonl"),
        "names": ["chosen"],
        "limits": {"max_prompt": 3, "max_length": 6},
    }
    (cut,), dropped = reference.cut_rows(job)
    assert cut["prompt_ids"] == [0, 7, 8]
    assert cut["responses"]["chosen"] == [9, 10, 1]
    assert dropped == 0
