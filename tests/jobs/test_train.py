"""Training on a real DeepSpeed engine in real processes, against a plain torch loop and against
itself.

Many jobs share one start: `python -m test_train` runs a list of them (a start costs more than all
the training).
"""

import dataclasses
import json
import logging
import math
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from beyond_dpo import lora, precision, scoring, templates
from beyond_dpo.jobs import fit_reward, reference, score, train
from beyond_dpo.losses import mallows_link
from beyond_dpo.machine import launch, paths
from beyond_dpo.pipeline import config
from beyond_dpo.rows import epoch_order, prepare, write_rows

pytestmark = pytest.mark.slow
LIMITS = {"max_prompt": 8, "max_length": 24, "bos_id": 0, "eos_id": 1}
SETTINGS = {
    "lr": 3e-3,
    "global_batch": 4,
    "micro_batch": 4,
    "epochs": 2,
    "loss": "sft",
    "precision": "fp32",
}
PAIRS = {
    "dpo": {"loss": "dpo", "beta": 0.5, "label_smoothing": 0.1},
    "ipo": {"loss": "ipo", "beta": 0.1},
    "simpo": {"loss": "simpo", "beta": 2.0, "gamma": 0.5},
    "rmsprop": {"loss": "dpo", "beta": 0.5, "optimizer": "rmsprop", "lr": 1e-3},
    "mallows_theta": {"loss": "mallows_theta", "beta": 1.0},
    "mallows_phi": {"loss": "mallows_phi", "beta": 0.5, "epsilon": 0.2},
    "mallows_ipo": {"loss": "mallows_ipo", "beta": 0.1},
    "mallows_simpo": {"loss": "mallows_simpo", "beta": 2.0, "gamma": 0.5},
}
FUSED = {
    "wrpo": {"loss": "wrpo", "beta": 0.5, "alpha": 0.6},
    "wrpo_static": {"loss": "wrpo", "beta": 0.5, "alpha": 0.6, "dynamic": False},
    "wrpo_ipo": {"loss": "wrpo_ipo", "beta": 0.1, "alpha": 0.3},
    "wrpo_simpo": {"loss": "wrpo_simpo", "beta": 2.0, "gamma": 0.5, "alpha": 0.3},
    "hybrid": {"loss": "hybrid", "beta": 0.5},
}
LORA = {**PAIRS["dpo"], "lora_rank": 2, "lora_alpha": 8.0, "lr": 1e-2}
LONG = {"epochs": 40, "checkpoint_every": 20}  # 120 steps: long enough to be killed before its end
BF16 = precision.computes_bf16(precision.CPUINFO) or torch.cuda.is_available()
needs_bf16 = pytest.mark.skipif(
    not BF16, reason="bfloat16 is refused on this CPU, which would emulate it"
)
ROUGH = {"precision": "bf16" if BF16 else "fp32"}


@pytest.fixture(scope="module")
def folder(tiny, rows, tmp_path_factory):
    """Write twelve good rows with a reference of theirs, and two with nothing to train on."""
    folder = tmp_path_factory.mktemp("train")
    good, _ = prepare(rows, ["chosen", "rejected"], **LIMITS)
    empty = [
        {"id": "no answer", "prompt_ids": [0, 7], "responses": {"chosen": [], "rejected": []}},
        {"id": "no prompt", "prompt_ids": [], "responses": {"chosen": [9], "rejected": [8]}},
    ]
    write_rows(folder / "rows.jsonl", [empty[0], *rows, empty[1]])
    write_rows(folder / "empty.jsonl", empty)
    write_rows(folder / "fused.jsonl", three(rows))
    from transformers import AutoModelForCausalLM

    job = {
        "model": str(tiny),
        "rows": str(folder / "rows.jsonl"),
        "names": ["chosen", "rejected"],
        "limits": LIMITS,
        "precision": "fp32",
        "micro_batch": 5,
        "out": str(folder / "reference"),
    }
    fused = {
        "rows": str(folder / "fused.jsonl"),
        "names": config.FUSED,
        "out": str(folder / "fused_reference"),
    }
    for each in (job, job | fused):
        (folder / "reference.json").write_text(json.dumps(each))
        reference.main(str(folder / "reference.json"))
    broken = AutoModelForCausalLM.from_pretrained(
        tiny, dtype=torch.float32
    )  # NaN for one row only: the head is untied
    broken.config.tie_word_embeddings = False
    broken.lm_head.weight = torch.nn.Parameter(broken.lm_head.weight.detach().clone())
    used = [set(r["prompt_ids"] + r["responses"]["chosen"][:-1]) for r in good]
    token = min(used[5] - set().union(*(u for i, u in enumerate(used) if i != 5)))
    with torch.no_grad():
        broken.get_input_embeddings().weight[token] = float("nan")
    broken.save_pretrained(folder / "broken")
    templates.load_tokenizer(tiny).save_pretrained(folder / "broken")
    os.environ["PYTHONPATH"] = f"{Path(__file__).parent}{os.pathsep}{os.environ['PYTHONPATH']}"
    return folder


def three(rows):
    """Return rows with a source's response as well, which is the chosen one of another row."""
    said = [r["responses"] for r in rows]
    sources = [said[i - 1]["chosen"] for i in range(len(rows))]
    responses = [
        dict(zip(config.FUSED, (s, *r.values()), strict=True))
        for s, r in zip(sources, said, strict=True)
    ]
    return [row | {"responses": response} for row, response in zip(rows, responses, strict=True)]


def a_job(folder, name, tiny, **changes):
    """Return a job that trains into folder/name; a loss on pairs gets both responses and the
    reference.
    """
    if changes.get("loss", "").startswith(("wrpo", "hybrid")):
        job = a_job(folder, name, tiny, **changes | {"loss": "dpo"}) | {"names": list(config.FUSED)}
        job |= {"rows": str(folder / "fused.jsonl"), "reference": str(folder / "fused_reference")}
        return job | {"settings": job["settings"] | {"loss": changes["loss"]}}
    special = {key: changes.pop(key) for key in ("model", "rows") if key in changes}
    settings = config.Train(**{"warmup": 0.2, **SETTINGS, **changes})
    pairs = settings.loss != "sft"
    return {
        "model": str(tiny),
        "rows": str(folder / "rows.jsonl"),
        "limits": LIMITS,
        "seed": 3,
        "out": str(folder / name),
        "names": ["chosen", "rejected"] if pairs else ["chosen"],
        "settings": dataclasses.asdict(settings),
        "reference": str(folder / "reference") if settings.loss not in ("sft", "simpo") else None,
    } | special


def run_all(jobs, workdir, **how):
    """Run many jobs in one start."""
    launch.run("test_train", {"jobs": jobs}, workdir, desc="jobs", **how)


@pytest.fixture(scope="module")
def single(folder, tiny):
    """Run all that one process can show; `killed` is `long`, killed by force after its first
    checkpoint and resumed.
    """
    killed = a_job(folder, "killed", tiny, **LONG)
    (folder / "killed.json").write_text(json.dumps(killed))
    child = subprocess.Popen(
        launch.command("beyond_dpo.jobs.train", folder / "killed.json"), start_new_session=True
    )
    end = time.monotonic() + 300
    while not (folder / "killed" / "checkpoints" / "zero0-of1" / "latest").exists():
        assert child.poll() is None and time.monotonic() < end
        time.sleep(0.005)
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    named = (folder / "killed" / "checkpoints" / "zero0-of1" / "latest").read_text()
    assert named in ("step20", "step40"), "the name of a checkpoint appears whole, or not at all"
    with open(folder / "killed" / "log.jsonl", "a") as f:  # as if it had been killed while it wrote
        f.write('{"step": 2')
    (folder / "steps_at_kill").write_text(
        str(len((folder / "killed" / "log.jsonl").read_text().splitlines()))
    )

    changes = {
        "sft": {},
        "sft_1": {"micro_batch": 1},
        "sft_2": {"micro_batch": 2},
        "adagrad": {"optimizer": "adagrad", "lr": 0.03, "weight_decay": 0.01},
        "decay": {"weight_decay": 0.1},
        **PAIRS,
        "dpo_1": {**PAIRS["dpo"], "micro_batch": 1},
        **FUSED,
        "wrpo_2": {**FUSED["wrpo"], "micro_batch": 2},
        "parts": {"parts": 3},
        "recomputed": {**PAIRS["dpo"], "micro_batch": 2, "gradient_checkpointing": True},
        "bf16": {**ROUGH, "save_dtype": "bfloat16"},
        "lora": LORA,
        "lora_bf16": {**LORA, **ROUGH},
        "offload": {"zero": 2, "offload": True},
        "clipped": {"max_grad_norm": 0.1},
        "plain_dpo": {"loss": "dpo", "beta": 0.1},
        "long": LONG,
        "killed": LONG,
        "overflow": {
            "lr": 1e6,
            "epochs": 1,
            "global_batch": 12,
            "save_dtype": "float16",
            "warmup": 0.0,
        },
    }
    jobs = [a_job(folder, name, tiny, **change) for name, change in changes.items()]
    jobs += [
        a_job(folder, "step3", tiny, checkpoint_every=3),
        a_job(folder, "step4", tiny, checkpoint_every=4),
    ]
    jobs += [jobs[-1] | {"spoil": "damaged"}, a_job(folder, "step2", tiny, checkpoint_every=2)]
    jobs += [jobs[-1] | {"spoil": "foreign"}]
    run_all(jobs, folder / "single")
    return folder


def spoil(out, how):
    """Damage the checkpoint after step 4 as a power cut does, its length unchanged, and lay the one
    before beside it.

    "foreign": put whole files in its place that are of no model.
    """
    saved = out / "checkpoints" / "zero0-of1"
    (state,) = (saved / "step4").glob("*.pt")
    if how == "foreign":
        torch.save({}, state)
        (state.parent / train.SIZES).write_text(json.dumps({state.name: state.stat().st_size}))
    else:
        content = bytearray(state.read_bytes())
        content[len(content) // 2 :] = bytes(len(content) - len(content) // 2)
        state.write_bytes(content)
        shutil.copytree(
            out.with_name("step3") / "checkpoints" / "zero0-of1" / "step3", saved / "step3"
        )


@pytest.fixture(scope="module")
def double(folder, tiny):
    """Run with two processes that torchrun started; each ZeRO stage twice, the second time from its
    checkpoint.
    """
    stages = [
        a_job(folder, f"zero{z}_2", tiny, zero=z, micro_batch=2, checkpoint_every=4)
        for z in range(4)
    ]
    pairs = a_job(
        folder,
        "dpo_2",
        tiny,
        zero=3,
        gradient_checkpointing=True,
        **PAIRS["dpo"] | {"micro_batch": 1},
    )
    sharded = a_job(folder, "sharded_2", tiny, zero=3, **PAIRS["dpo"] | {"micro_batch": 1}) | {
        "sharded": True
    }
    adapter = a_job(folder, "lora_2", tiny, zero=3, micro_batch=2, checkpoint_every=4, **LORA)
    run_all(
        [*stages, pairs, adapter, *stages, adapter, sharded],
        folder / "double",
        launcher="torchrun",
        processes=2,
    )
    return folder


def log(folder, name):
    return [json.loads(line) for line in (folder / name / "log.jsonl").read_text().splitlines()]


def losses(folder, name):
    return [entry["loss"] for entry in log(folder, name)]


def weights(path, file="model.safetensors"):
    from safetensors.torch import load_file

    return load_file(path / file)


# How far rounding may lead the weights astray: root mean square over all weights, in learning
# rates.
# The largest difference of any one weight would say little. These optimizers step by lr·g/√(mean of
# g²),
# so the error of a gradient g counts relative to g, and of 131,392 gradients some are nearly zero:
# one
# weight alone was 0.03 off where the root mean square was 1e-4. Up to 1.4e-4 was seen for rounding;
# 1 % of any setting of any loss moves it by 1.08e-3 or more (test_training_is_a_plain_torch_loop).
ROUNDED = 5e-4


def difference(a, b, lr=SETTINGS["lr"]):
    """Return the root mean square difference of all weights, in learning rates."""
    assert a.keys() == b.keys() and a
    differences = torch.cat([(a[name] - b[name]).flatten() for name in a])
    return differences.square().mean().sqrt().item() / lr


# ---- against a plain torch loop

BY_HAND = {
    "adamw": torch.optim.AdamW,
    "adagrad": torch.optim.Adagrad,
    "rmsprop": torch.optim.RMSprop,
}


def log_sigmoid(x):
    return torch.nn.functional.logsigmoid(x)


def logp_by_hand(model, row, name):
    """Return a response's summed log-probability from all logits of the model."""
    response = row["responses"][name]
    ids = torch.tensor([row["prompt_ids"] + response])
    table = model(input_ids=ids).logits[0, -len(response) - 1 : -1].log_softmax(-1)
    return table[range(len(response)), response].sum()


def pair_loss_by_hand(loss, settings, share, margin, mean_margin):
    """Return a pair's loss of the log-ratios' margin, or (SimPO's) of the mean log-probabilities'
    margin.
    """
    beta = settings["beta"]
    if loss == "dpo":
        flipped = settings.get("label_smoothing", 0.0)
        return -(1 - flipped) * log_sigmoid(beta * margin) - flipped * log_sigmoid(-beta * margin)
    if loss == "ipo":
        return (margin - 1 / (2 * beta)) ** 2
    if loss == "simpo":
        return -log_sigmoid(beta * mean_margin - settings["gamma"])
    if loss == "mallows_theta":
        return -log_sigmoid(share * beta * margin)
    if loss == "mallows_phi":
        phi = torch.tensor([math.exp(-share)])
        return -mallows_link(beta * margin[None], phi, settings["epsilon"])[0].log().float()
    if loss == "mallows_ipo":
        return (share * margin - 1 / (2 * beta)) ** 2
    assert loss == "mallows_simpo"
    return -log_sigmoid(share * (beta * mean_margin - settings["gamma"]))


def fused_loss_by_hand(
    loss, settings, done, source_margin, margin, source_mean, mean, rejected_mean
):
    """Return the loss of a source's, the target's and the rejected response; `done`: the share of
    steps done.
    """
    beta = settings["beta"]
    if loss == "hybrid":
        return -(log_sigmoid(beta * source_margin) + log_sigmoid(beta * margin)) / 2
    alpha = settings["alpha"]
    if settings.get("dynamic", True):
        alpha *= done
    fused = alpha * source_margin + (1 - alpha) * margin
    if loss == "wrpo":
        return -log_sigmoid(beta * fused)
    if loss == "wrpo_ipo":
        return (fused - 1 / (2 * beta)) ** 2
    assert loss == "wrpo_simpo"
    fused_mean = alpha * source_mean + (1 - alpha) * mean
    return -log_sigmoid(beta * (fused_mean - rejected_mean) - settings["gamma"])


def row_loss_by_hand(row, logps, base, share, done, loss, settings):
    """Return the loss of one preference row from its responses' log-probabilities and the
    reference's.
    """
    ratios = {name: logps[name] - base[row["id"], name] for name in logps}
    means = {name: logps[name] / len(row["responses"][name]) for name in logps}
    *source, chosen, rejected = logps
    margin = ratios[chosen] - ratios[rejected]
    if not source:
        return pair_loss_by_hand(loss, settings, share, margin, means[chosen] - means[rejected])
    source_margin = ratios[source[0]] - ratios[rejected]
    three_means = means[source[0]], means[chosen], means[rejected]
    return fused_loss_by_hand(loss, settings, done, source_margin, margin, *three_means)


def by_hand(
    tiny,
    rows,
    entropies,
    *,
    loss="sft",
    optimizer="adamw",
    lr,
    weight_decay=0.0,
    max_grad_norm=1.0,
    **settings,
):
    """Train with all logits, no engine, and the losses' formulas written out; return losses and
    weights.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    stepper = BY_HAND[optimizer](model.parameters(), lr=lr, weight_decay=weight_decay)
    names = list(rows[0]["responses"])
    rows, dropped = prepare(rows, names, **LIMITS)
    assert len(rows) == 12 and dropped == 0
    visits = [rows[i] for epoch in range(2) for i in epoch_order(12, 3, epoch)]
    with torch.no_grad():
        base = {(row["id"], name): logp_by_hand(model, row, name) for row in rows for name in names}
    spread = [-math.log((a + b) / 2) for a, b in entropies]
    share = {
        row["id"]: value / (sum(spread) / 12) for row, value in zip(rows, spread, strict=True)
    }  # mean 1
    found = []
    for step in range(6):
        batch = visits[4 * step : 4 * step + 4]
        values = []
        for row in batch:
            if loss == "sft":  # mean over the tokens of the step
                tokens = sum(len(row["responses"]["chosen"]) for row in batch)
                values.append(-logp_by_hand(model, row, "chosen") / tokens * 4)
            else:
                logps = {name: logp_by_hand(model, row, name) for name in names}
                values.append(
                    row_loss_by_hand(row, logps, base, share[row["id"]], step / 6, loss, settings)
                )
        value = sum(values) / 4
        found.append(value.item())
        stepper.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
        cosine = 0.5 * (1 + math.cos(math.pi * (step - 1) / 5))
        stepper.param_groups[0]["lr"] = lr * (cosine if step else 0.5)  # one step of warm-up
        stepper.step()
    return found, {name: w.detach() for name, w in model.named_parameters()}


def faults(settings):
    """Return the settings with one number wrong by 1 %, for each number of the loss; or else the
    rate by 0.1 %.
    """
    general = ("lr", "weight_decay", "max_grad_norm")
    numbers = [
        key for key, value in settings.items() if type(value) is float and key not in general
    ]
    wrong = [{**settings, key: 1.01 * settings[key]} for key in numbers]
    return wrong or [{**settings, "lr": 1.001 * settings["lr"]}]


@pytest.mark.parametrize("name", ["sft", "adagrad", "decay", "clipped", *PAIRS])
def test_training_is_a_plain_torch_loop(single, tiny, rows, name):
    """And a loop whose settings are 1 % off would not pass for it."""
    changes = {
        "adagrad": {"optimizer": "adagrad", "lr": 0.03, "weight_decay": 0.01},
        "decay": {"weight_decay": 0.1},
        "clipped": {"max_grad_norm": 0.1},
        **PAIRS,
    }.get(name, {})
    settings = {"lr": SETTINGS["lr"], **changes}
    good, _ = prepare(rows, ["chosen", "rejected"], **LIMITS)
    entropies = reference.load(single / "reference", good, ["chosen", "rejected"])[
        "entropies"
    ].tolist()
    wanted, theirs = by_hand(tiny, rows, entropies, **settings)
    assert losses(single, name) == pytest.approx(wanted, rel=1e-4)
    assert [e["step"] for e in log(single, name)] == list(range(6))
    ours = weights(single / name)
    assert difference(ours, theirs, settings["lr"]) < ROUNDED
    for wrong in faults(settings):
        assert (
            difference(ours, by_hand(tiny, rows, entropies, **wrong)[1], settings["lr"]) > ROUNDED
        ), wrong


@pytest.mark.parametrize("name", FUSED)
def test_wrpo_is_a_plain_torch_loop(single, tiny, rows, name):
    """With α = 0 at the first step and 5/6 of the largest at the last of six, or constant."""
    settings = {"lr": SETTINGS["lr"], **FUSED[name]}
    entropies = [(0.5, 0.5)] * 12
    wanted, theirs = by_hand(tiny, three(rows), entropies, **settings)
    assert losses(single, name) == pytest.approx(wanted, rel=1e-4)
    ours = weights(single / name)
    assert difference(ours, theirs) < ROUNDED
    for wrong in faults(settings):
        assert difference(ours, by_hand(tiny, three(rows), entropies, **wrong)[1]) > ROUNDED, wrong
    if name != "hybrid":
        settings = config.Train(**SETTINGS | FUSED[name])
        alphas = [settings.alpha * (step / 6 if settings.dynamic else 1) for step in range(6)]
        assert [entry["alpha"] for entry in log(single, name)] == pytest.approx(alphas)


def test_the_log_holds_the_reward_of_every_response(single):
    """α = 0 at the first step: the weighted reward is the target's; later it lies in between."""
    first, last = log(single, "wrpo")[0], log(single, "wrpo")[-1]
    assert abs(first["source_chosen_reward"]) + abs(first["target_chosen_reward"]) < 1e-5
    parts = [
        last["alpha"] * last["source_chosen_reward"],
        (1 - last["alpha"]) * last["target_chosen_reward"],
    ]
    assert last["chosen_reward"] == pytest.approx(sum(parts), rel=1e-5) and last[
        "alpha"
    ] == pytest.approx(0.5)
    assert last["margin"] == pytest.approx(last["chosen_reward"] - last["rejected_reward"])
    assert {
        "source_chosen_accuracy",
        "target_chosen_accuracy",
        "source_chosen_logps",
    } <= last.keys()
    static, pair = log(single, "wrpo_static")[0], log(single, "plain_dpo")[0]
    assert static["alpha"] == 0.6 and not {"alpha", "source_chosen_reward"} & pair.keys()


def test_one_step_of_wrpo_is_dpo_on_the_targets_pair(single, tiny):
    """Trap of a short run: α of the first step is 0. Fewer rows than a batch are one step, and
    divide nothing by 0.
    """
    few = {"epochs": 1, "global_batch": 24, "micro_batch": 12}
    fused = a_job(single, "one_wrpo", tiny, **FUSED["wrpo"], **few)
    target = a_job(single, "one_dpo", tiny, **PAIRS["dpo"] | {"label_smoothing": 0.0}, **few)
    target |= {
        "rows": fused["rows"],
        "reference": fused["reference"],
        "names": list(config.FUSED[1:]),
    }
    source = a_job(single, "one_source", tiny, **FUSED["wrpo_static"] | {"alpha": 1.0}, **few)
    run_all([fused, target, source], single / "one_step")
    assert len(log(single, "one_wrpo")) == 1 and log(single, "one_wrpo")[0]["alpha"] == 0
    assert difference(weights(single / "one_wrpo"), weights(single / "one_dpo")) < ROUNDED
    assert difference(weights(single / "one_wrpo"), weights(single / "one_source")) > 0.1


def test_parts_are_the_model_on_its_way(single):
    """Of six steps in three parts: after the second and the fourth; a third of the way is not two
    thirds.
    """
    assert (single / "parts/model.safetensors").read_bytes() == (
        single / "sft/model.safetensors"
    ).read_bytes()
    assert sorted(p.name for p in (single / "parts").glob("part*")) == ["part1", "part2"]
    moved = [
        difference(weights(single / "parts" / at), weights(single / "sft"))
        for at in ("part1", "part2")
    ]
    assert moved[0] > moved[1] > 0.01
    assert (single / "parts/part1/tokenizer.json").exists()


def test_three_steps_lower_the_loss(single):
    """Each epoch is three steps over the same rows."""
    for name in ("sft", *PAIRS, "adagrad", "bf16"):
        value = losses(single, name)
        assert sum(value[3:]) < 0.99 * sum(value[:3]), name
    assert log(single, "dpo")[-1]["accuracy"] == 1 and log(single, "dpo")[-1]["margin"] > 0.1


def test_at_step_0_the_cached_reference_is_the_policy(single, rows):
    """DPO's loss is ln 2 to 1e-6, its rewards 0; IPO's is 1 / (2 beta)^2 = 25. The reference had
    other batches.
    """
    first = log(single, "plain_dpo")[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert abs(first["chosen_reward"]) + abs(first["rejected_reward"]) < 1e-5
    assert losses(single, "ipo")[0] == pytest.approx(25, abs=1e-3)
    good, _ = prepare(rows, ["chosen", "rejected"], **LIMITS)
    base = reference.load(single / "reference", good, ["chosen", "rejected"])["logps"]
    visited = base[epoch_order(12, 3, 0)[:4]].mean(0)
    assert [first["chosen_logps"], first["rejected_logps"]] == pytest.approx(
        visited.tolist(), rel=1e-6
    )


# ---- adapters


def test_lora_trains_an_adapter_alone_in_any_number_of_processes(single, double, tiny):
    """The first loss is DPO's (B = 0), the later ones fall, two processes, ZeRO-3 and a resume
    change nothing.
    """
    assert losses(single, "lora")[0] == pytest.approx(losses(single, "dpo")[0], rel=1e-5)
    assert sum(losses(single, "lora")[3:]) < 0.9 * sum(losses(single, "lora")[:3])
    assert losses(single, "lora") == pytest.approx(losses(double, "lora_2"), rel=1e-4)
    assert (
        not (single / "lora" / "model.safetensors").exists()
        and (single / "lora" / "tokenizer.json").exists()
    )
    one, two = (
        weights(folder / name, lora.WEIGHTS)
        for folder, name in ((single, "lora"), (double, "lora_2"))
    )
    assert one.keys() == two.keys() and len(one) == 2 * 7 * 2, (
        "A and B of seven linear layers in two blocks"
    )
    # B begins as zeros, so that the first gradients of A are little but rounding: 5.5e-4 was seen
    assert difference(one, two, LORA["lr"]) < 10 * ROUNDED
    assert "/" not in (single / "lora" / lora.CONFIG).read_text(), "no path of this machine"


def test_peft_loads_the_adapter_as_it_was_trained(single, tiny, rows):
    """peft's own model and lora.tensors() at α = 0 score alike, and the last logged margin is near
    theirs.
    """
    import peft
    from transformers import AutoModelForCausalLM

    good, _ = prepare(rows, ["chosen", "rejected"], **LIMITS)
    plain = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    before = scoring.ResponseScorer(plain).score(good, ["chosen", "rejected"], 2)["logps"]
    own = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    own.load_state_dict(dict(lora.tensors(tiny, single / "lora", 0.0)), strict=False)
    theirs = peft.PeftModel.from_pretrained(plain, single / "lora").merge_and_unload()
    scores = [
        scoring.ResponseScorer(m).score(good, ["chosen", "rejected"], 2)["logps"]
        for m in (own, theirs)
    ]
    assert scores[0].tolist() == pytest.approx(scores[1].tolist(), rel=1e-5)
    moved = (scores[0] - before).view(2, -1)
    assert (moved[0] - moved[1]).mean() > 0.2, "in nats: the chosen responses became likelier"


# ---- however it is computed


def test_accumulation_does_not_change_the_result(single):
    for name, others in {"sft": ["sft_1", "sft_2"], "dpo": ["dpo_1"], "wrpo": ["wrpo_2"]}.items():
        for other in others:
            assert losses(single, other) == pytest.approx(losses(single, name), rel=1e-5)
            assert difference(weights(single / other), weights(single / name)) < ROUNDED


def test_gradient_checkpointing_and_offload_do_not_change_the_result(single):
    for name, other in [("dpo", "recomputed"), ("sft", "offload")]:
        assert losses(single, other) == pytest.approx(losses(single, name), rel=1e-5)
        assert difference(weights(single / other), weights(single / name)) < ROUNDED


@pytest.mark.parametrize("zero", range(4))
def test_two_processes_are_one(single, double, zero):
    one, two = log(single, "sft"), log(double, f"zero{zero}_2")
    for key in ("step", "loss", "lr", "grad_norm"):
        assert [e[key] for e in two] == pytest.approx([e[key] for e in one], rel=1e-5), key
    assert (
        difference(weights(double / f"zero{zero}_2", "first.safetensors"), weights(single / "sft"))
        < ROUNDED
    )


@pytest.mark.parametrize("zero", range(4))
def test_two_processes_resume_from_their_checkpoint(double, zero):
    """The second run finds the checkpoint after step 4 of 6, and writes steps 4 and 5 again."""
    again = double / f"zero{zero}_2"
    assert [e["step"] for e in log(double, again.name)] == list(range(6))
    assert difference(weights(again, "first.safetensors"), weights(again)) < ROUNDED
    assert (double / "double" / "job.log").read_text().count("steps 4 to 6") == 5, "and the adapter"


def test_two_processes_with_pairs(single, double):
    one, two = log(single, "dpo"), log(double, "dpo_2")
    for key in (
        "loss",
        "chosen_reward",
        "rejected_reward",
        "margin",
        "chosen_logps",
        "rejected_logps",
    ):
        assert [e[key] for e in two] == pytest.approx([e[key] for e in one], rel=1e-4, abs=1e-5), (
            key
        )
    # at step 0 the policy is the reference: which of two rewards is larger is rounding alone
    assert [e["accuracy"] for e in two[1:]] == [e["accuracy"] for e in one[1:]]
    assert difference(weights(double / "dpo_2"), weights(single / "dpo")) < ROUNDED


def test_the_deepspeed_launcher(single, tiny):
    """It sets LOCAL_SIZE, by which DeepSpeed would leave 66 MiB of shared memory behind for each
    process.
    """
    job = a_job(single, "launched", tiny, zero=2, micro_batch=2)
    launch.run(
        "beyond_dpo.jobs.train",
        job,
        single / "launched",
        desc="SFT",
        launcher="deepspeed",
        processes=2,
    )
    assert losses(single, "launched") == pytest.approx(losses(single, "sft"), rel=1e-5)
    assert difference(weights(single / "launched"), weights(single / "sft")) < ROUNDED
    port = re.search(r"--master_port=(\d+)", (single / "launched" / "job.log").read_text())[1]
    assert not [p for p in Path("/dev/shm").iterdir() if port in p.name]


def test_tasks_that_export_their_rank_need_no_launcher(single, tiny):
    """RANK, LOCAL_RANK, WORLD_SIZE and MASTER_* are all they share; of a task of `srun`, what SLURM
    says instead.
    """
    file = single / "tasks.json"
    file.write_text(json.dumps(a_job(single, "tasks", tiny, zero=1, micro_batch=2)))
    shared = {"MASTER_ADDR": "127.0.0.1"}
    shared["MASTER_PORT"] = str(launch._free_port())
    step = {
        "STEP_NUM_TASKS": "2",
        "PROCID": "1",
        "LOCALID": "1",
        "JOB_ID": "1",
        "STEP_ID": "0",
        "STEP_NODELIST": "n1",
    }
    ranks = [
        {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"},
        {f"SLURM_{k}": v for k, v in step.items()},
    ]
    command = [sys.executable, "-m", "beyond_dpo.jobs.train", str(file)]
    tasks = [subprocess.Popen(command, env=os.environ | shared | rank) for rank in ranks]
    assert [task.wait(120) for task in tasks] == [0, 0]
    assert losses(single, "tasks") == pytest.approx(losses(single, "sft"), rel=1e-5)
    assert difference(weights(single / "tasks"), weights(single / "sft")) < ROUNDED


# ---- interrupted


def test_killed_and_resumed_is_uninterrupted(single):
    """Killed by force after the first of its checkpoints, in one process with float32: every bit is
    the same.
    """
    assert 20 <= int((single / "steps_at_kill").read_text()) < 120
    assert "steps 20 to 120" in (single / "single" / "job.log").read_text()
    for key in ("step", "loss", "lr", "grad_norm"):
        assert [e[key] for e in log(single, "killed")] == [e[key] for e in log(single, "long")]
    assert [e["step"] for e in log(single, "killed")] == list(range(120))
    assert difference(weights(single / "killed"), weights(single / "long")) == 0
    kept = sorted(p.name for p in (single / "killed" / "checkpoints" / "zero0-of1").iterdir())
    assert kept == ["latest", "step100"]  # older ones are gone, and the end needs none


def test_a_damaged_checkpoint_is_set_aside_and_training_goes_on_from_the_one_before(single):
    """After the power failed: the last checkpoint has its length, but half of it is zeros. Bit for
    bit as without.
    """
    words = (single / "single" / "job.log").read_text()
    assert re.search(
        r"step4 is damaged \(.*other bytes.*kept as damaged-zero0-of1-step4; .* goes on from step3",
        words,
    )
    assert "steps 3 to 6" in words
    kept = sorted(p.name for p in (single / "step4" / "checkpoints").iterdir())
    assert kept == ["damaged-zero0-of1-step4", "finished", "zero0-of1"]
    for file in ("first.safetensors", "model.safetensors"):
        assert difference(weights(single / "step4", file), weights(single / "sft")) == 0
    assert losses(single, "step4") == losses(single, "sft")


def test_a_whole_checkpoint_that_cannot_be_loaded_says_what_to_delete(single):
    message = (single / "step2" / "error").read_text()
    assert re.search(
        r"checkpoint \S+/step4 cannot be loaded \(.+\); .* delete that folder, and the training",
        message,
    )
    assert "\n" not in message


@pytest.fixture
def checkpoints(tmp_path):
    """Make the folder of two checkpoints, after steps 2 and 4 of six; `latest` names the second."""
    saved = tmp_path / "checkpoints" / "zero1-of2"
    (tmp_path / "log.jsonl").write_text(
        "".join(json.dumps({"step": step}) + "\n" for step in range(6))
    )
    before = None
    for step in (2, 4):
        folder = saved / f"step{step}"
        folder.mkdir(parents=True)
        for rank in range(2):
            torch.save({"weights": torch.arange(1000.0) + rank}, folder / f"rank{rank}.pt")
        before = before and shutil.copytree(before, tmp_path / "kept")
        train._name_checkpoint(folder, tmp_path / "log.jsonl")
        before = folder
    assert sorted(p.name for p in saved.iterdir()) == ["latest", "step4"], (
        "the one before is of no more use"
    )
    shutil.copytree(tmp_path / "kept", saved / "step2")
    return saved


def flip(file, at):
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    "damage, why",
    [
        (lambda f: (f / "rank1.pt").write_bytes(b""), r"rank1.pt has 0 bytes of \d+"),
        (
            lambda f: (f / "rank1.pt").write_bytes(bytes((f / "rank1.pt").stat().st_size)),
            "rank1.pt has other bytes",
        ),
        (lambda f: flip(f / "rank1.pt", 2000), "rank1.pt has other bytes"),
        (lambda f: os.truncate(f / "rank0.pt", 1000), "rank0.pt has 1000 bytes of"),
        (lambda f: (f / "rank0.pt").unlink(), "rank0.pt is missing"),
        (lambda f: (f / train.SIZES).write_bytes(bytes(30)), "no readable sizes.json"),
        (lambda f: (f / train.SIZES).unlink(), "no readable sizes.json"),
    ],
    ids=["empty", "zeros", "a bit", "cut", "a missing file", "zeros for sizes", "no sizes"],
)
def test_a_damaged_checkpoint_is_found_whatever_is_damaged(checkpoints, caplog, damage, why):
    log_file = checkpoints.parents[1] / "log.jsonl"
    with caplog.at_level("INFO", "beyond_dpo.jobs.train"):
        assert train._find_checkpoint(checkpoints, log_file) == 4
    assert [record.getMessage() for record in caplog.records] == [
        f"checking {checkpoints / 'step4'}"
    ]
    damage(checkpoints / "step4")
    assert train._find_checkpoint(checkpoints, log_file) == 2
    kept = "kept as damaged-zero1-of2-step4; the training goes on from step2"
    assert re.search(f"step4 is damaged .{why}.*{kept}", caplog.text)
    damage(checkpoints / "step2")
    if (checkpoints / "step2" / train.SIZES).exists():  # else nothing says that it ever was whole
        assert train._find_checkpoint(checkpoints, log_file) == 0
        assert "kept as damaged-zero1-of2-step2; the training begins anew" in caplog.text
        kept = ["damaged-zero1-of2-step2", "damaged-zero1-of2-step4", "zero1-of2"]
        assert sorted(p.name for p in checkpoints.parent.iterdir()) == kept


@pytest.mark.parametrize("named", ["", "\0\0\0\0\0", "step6", "step", "../../log.jsonl"])
def test_latest_that_names_no_checkpoint_is_not_followed(checkpoints, caplog, named):
    """After a power cut the file may be empty or of zeros, or its folder may be gone: the newest
    whole one is taken.
    """
    (checkpoints / "latest").write_text(named)
    assert train._find_checkpoint(checkpoints, checkpoints.parents[1] / "log.jsonl") == 4
    assert (
        "latest names no checkpoint that is there" in caplog.text
        and "goes on from step4" in caplog.text
    )


def test_a_checkpoint_without_the_log_of_its_steps_is_not_taken(checkpoints, caplog):
    """The finished log would lack them, or be no JSON."""
    log_file = checkpoints.parents[1] / "log.jsonl"
    lines = log_file.read_bytes().splitlines(keepends=True)
    log_file.write_bytes(b"".join(lines[:3]) + bytes(len(lines[3])))
    assert train._find_checkpoint(checkpoints, log_file) == 2
    assert "step4 is damaged (log.jsonl does not hold its 4 steps)" in caplog.text
    log_file.unlink()
    assert train._find_checkpoint(checkpoints, log_file) == 0


def test_a_checkpoint_that_was_never_finished_is_no_damage(checkpoints, caplog):
    """Killed while it wrote: nothing to keep, nothing to say, and the one before is still the one
    to go on from.
    """
    shutil.copytree(checkpoints / "step4", checkpoints / "step6")
    (checkpoints / "step6" / train.SIZES).unlink()
    assert (
        train._find_checkpoint(checkpoints, checkpoints.parents[1] / "log.jsonl") == 4
        and not caplog.records
    )


def test_a_checkpoint_is_on_the_disk_before_latest_names_it(tmp_path, monkeypatch):
    """Every file and folder first; and the one before goes when it is on the disk what `latest`
    names.
    """
    from deepspeed import comm

    saved, sync, events = tmp_path / "checkpoints" / "zero0-of1", os.fsync, []
    (saved / "step2").mkdir(parents=True)
    (saved / "latest").write_text("step2")

    class Writes:
        """What DeepSpeed's engine does of a checkpoint: it writes files, which nobody brings to the
        disk.
        """

        def save_checkpoint(self, folder, tag, state, **options):
            (folder / tag).mkdir()
            (folder / tag / "model.pt").write_bytes(b"weights")

    (tmp_path / "log.jsonl").write_text("{}\n")

    def watched(number):
        sync(number)
        file = os.readlink(f"/proc/self/fd/{number}").removeprefix(str(tmp_path))
        events.append((file, (saved / "latest").read_text(), (saved / "step2").exists()))

    monkeypatch.setattr(os, "fsync", watched)
    monkeypatch.setattr(comm, "barrier", lambda: events.append(("all are here", "", True)))
    train._save_checkpoint(Writes(), saved, 4, tmp_path / "log.jsonl", 0, True)
    assert [file for file, *_ in events[:2]] == [
        "/checkpoints/zero0-of1/step4/model.pt",
        "all are here",
    ]
    before = {file for file, named, _ in events if named == "step2"}
    places = {
        "",
        "/log.jsonl",
        "/checkpoints",
        "/checkpoints/zero0-of1",
        "/checkpoints/zero0-of1/step4",
    }
    assert places <= before
    assert all(older for _, _, older in events) and not (saved / "step2").exists()
    assert events[-1][:2] == ("/checkpoints/zero0-of1", "step4")


# ---- what is saved


def test_a_model_that_lacks_a_tensor_is_not_trained(folder, tiny, tmp_path):
    """transformers would draw it at random, and say so in a table among other lines."""
    shutil.copytree(tiny, tmp_path / "lacking")
    kept = weights(tiny)
    name = next(name for name in kept if "layers.1.mlp.up_proj" in name)
    del kept[name]
    save_file(kept, tmp_path / "lacking" / "model.safetensors", metadata={"format": "pt"})
    job = a_job(folder, "untrained", tmp_path / "lacking")
    with pytest.raises(
        launch.JobFailed, match=rf"no {re.escape(name)} for the model \(1 missing\): .* not whole"
    ):
        launch.run("beyond_dpo.jobs.train", job, tmp_path, desc="SFT")


def test_persistent_buffers_and_weights_with_two_names_are_saved(tmp_path, tiny):
    """A router's correction is no parameter, and a head may share the embeddings though the
    configuration says no.
    """
    from transformers import AutoModelForCausalLM, DeepseekV3Config

    shape = {
        "vocab_size": 512,
        "hidden_size": 32,
        "intermediate_size": 32,
        "moe_intermediate_size": 16,
    }
    shape |= {
        "num_hidden_layers": 2,
        "first_k_dense_replace": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    }
    shape |= {
        "n_routed_experts": 4,
        "n_group": 2,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
    }
    shape |= {
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
    }
    model = AutoModelForCausalLM.from_config(DeepseekV3Config(**shape))
    model.model.layers[1].mlp.gate.e_score_correction_bias += torch.tensor([0.5, -0.25, 0.0, 1.0])
    assert not model.config.tie_word_embeddings
    model.lm_head.weight = model.model.embed_tokens.weight
    train._save(model, templates.load_tokenizer(tiny), tmp_path / "out", torch.float32, 0)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    before, after = model.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys() and "lm_head.weight" in after
    for name in before:
        assert torch.equal(before[name], after[name]), name
    ids = torch.tensor([[5, 6, 7, 8]])
    assert torch.equal(model.eval()(ids).logits, loaded.eval()(ids).logits)
    model.model.layers[1].mlp.gate.e_score_correction_bias[0] = math.nan
    with pytest.raises(train.NonFiniteLoss, match="e_score_correction_bias is not finite"):
        train._save(model, templates.load_tokenizer(tiny), tmp_path / "bad", torch.float32, 0)


@pytest.mark.parametrize("rank", [0, 2], ids=["whole", "adapter"])
def test_trained_files_have_the_mode_that_the_umask_says(tmp_path, tiny, rank):
    """safetensors writes for the owner alone: a colleague of the group could not read what was
    trained.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    if rank:
        lora.inject(model, rank, 4.0)
    mask = os.umask(0o027)
    try:
        train._save(model, templates.load_tokenizer(tiny), tmp_path / "part1", torch.float32, 0)
    finally:
        os.umask(mask)
    modes = {p.name: oct(p.stat().st_mode & 0o777) for p in (tmp_path / "part1").iterdir()}
    assert set(modes.values()) == {"0o640"}, modes
    assert any(name.endswith(".safetensors") for name in modes) and "tokenizer.json" in modes


def test_saved_model(single, tiny):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for name, dtype in [("sft", torch.float32), ("bf16", torch.bfloat16)]:
        assert {w.dtype for w in weights(single / name).values()} == {
            dtype
        }  # 20 weights: no second copy of the tied
        model = AutoModelForCausalLM.from_pretrained(single / name)
        assert model.dtype == dtype and model.lm_head.weight is model.get_input_embeddings().weight
        assert model.config.use_cache and model.config.vocab_size == 512
    tokenizer = AutoTokenizer.from_pretrained(single / "sft")
    assert tokenizer("A patient film.") == AutoTokenizer.from_pretrained(tiny)("A patient film.")
    assert tokenizer.chat_template
    facts = json.loads((single / "sft" / "facts.json").read_text())
    assert facts == {"rows": 12, "dropped": 2, "steps": 6}


@needs_bf16
def test_bf16_is_close_to_fp32(single, tiny):
    """Losses within 1 %, and the same way through weight space but for rounding (weights stay
    float32 in training).
    """
    assert losses(single, "bf16") == pytest.approx(losses(single, "sft"), rel=0.01)
    start, exact, rough = weights(tiny), weights(single / "sft"), weights(single / "bf16")
    a, b = (
        torch.cat([(end[n].float() - start[n]).flatten() for n in start]) for end in (exact, rough)
    )
    assert torch.nn.functional.cosine_similarity(a, b, dim=0) > 0.95


# ---- failures


def test_weights_that_overflow_in_the_files_dtype_are_not_saved(single):
    assert "is not finite in torch.float16" in (single / "overflow" / "error").read_text()
    assert not list((single / "overflow").glob("*.safetensors"))


def test_processes_with_different_numbers_of_chunks_wait_for_each_other(single, double):
    """Under ZeRO-3 each call of the head gathers it: with unequal numbers of calls two processes
    would hang.
    """
    assert losses(double, "sharded_2") == pytest.approx(losses(single, "dpo"), rel=1e-4)
    assert difference(weights(single / "dpo"), weights(double / "sharded_2")) < ROUNDED


@pytest.mark.parametrize("launcher, processes", [("plain", 1), ("torchrun", 2), ("deepspeed", 2)])
def test_a_loss_that_is_not_finite_stops_all_and_names_the_row(
    folder, tmp_path, launcher, processes
):
    """Of two processes one fails; the other waits for it in vain until the launcher ends it."""
    job = a_job(folder, tmp_path.name, folder / "broken", micro_batch=2)
    with pytest.raises(
        launch.JobFailed, match=r"NonFiniteLoss: step \d: the loss of rows \['r5'\]"
    ) as failure:
        launch.run(
            "beyond_dpo.jobs.train",
            job,
            tmp_path,
            desc="SFT",
            launcher=launcher,
            processes=processes,
        )
    assert "ended with status 1" in str(failure.value)
    assert not list((folder / tmp_path.name).glob("*.safetensors"))


@pytest.mark.parametrize(
    "changes, error, message",
    [
        (
            {"micro_batch": 3},
            config.ConfigError,
            r"global_batch=4 cannot be split into micro_batch=3.*micro_batch=",
        ),
        ({"optimizer": "adam"}, ValueError, "Input should be 'adamw', 'adagrad' or 'rmsprop'"),
        ({"parts": 30}, config.ConfigError, "6 steps cannot be cut into 30 parts"),
        (
            {"parts": 2, "global_batch": 24, "micro_batch": 4},
            config.ConfigError,
            "1 steps cannot be cut into 2 parts",
        ),
        ({"offload": True}, config.ConfigError, "offload=True needs zero"),
        (
            {"save_dtype": "floaty"},
            ValueError,
            "Input should be 'float32', 'bfloat16' or 'float16'",
        ),
        ({"rows": "empty.jsonl"}, ValueError, r"no row is left to train on \(2 dropped"),
        ({"rows": "prompts.jsonl"}, ValueError, "no response 'chosen'"),
    ],
)
def test_impossible_jobs_fail_at_once(folder, tiny, tmp_path, monkeypatch, changes, error, message):
    write_rows(folder / "prompts.jsonl", [{"id": "p", "prompt_ids": [0, 5], "responses": {}}])
    job = a_job(folder, "impossible", tiny)
    if "rows" in changes:
        job["rows"] = str(folder / changes.pop("rows"))
    job["settings"] |= changes
    for name, value in {"RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "job.json").write_text(json.dumps(job))
    with pytest.raises(error, match=message):
        train.main(str(tmp_path / "job.json"))
    assert not (folder / "impossible").exists()


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="a GPU computes in bfloat16, whatever the CPU can"
)
def test_bf16_is_refused_on_a_cpu_that_would_emulate_it(folder, tiny, tmp_path, monkeypatch):
    """Such as one with AVX2 only, where a run of an hour took days; float32 goes as before."""
    (tmp_path / "cpuinfo").write_text(
        "processor\t: 0\nflags\t\t: fpu sse4_2 avx f16c avx2 avx512f avx512_vnni\n"
    )
    monkeypatch.setattr(precision, "CPUINFO", str(tmp_path / "cpuinfo"))
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    limits = {
        "limits": LIMITS,
        "model": str(tiny),
        "rows": str(folder / "rows.jsonl"),
        "out": str(tmp_path / "out"),
    }
    passing = limits | {"names": ["chosen"], "precision": "bf16", "micro_batch": 4}
    reward = {
        "texts": ["a"] * 40,
        "labels": [0, 1] * 20,
        "held_out": [["a", "b"], [0, 1]],
        "seed": 0,
    }
    reward |= {"out": str(tmp_path), "reward": "reward", "encoder": "unread", "precision": "bf16"}
    training = a_job(folder, "refused", tiny, precision="bf16")
    jobs = {train.main: training, reference.main: passing, fit_reward.main: reward}
    for main, job in jobs.items():
        (tmp_path / "job.json").write_text(json.dumps(job))
        with pytest.raises(
            ValueError, match='precision "bf16" needs a GPU, or .* set precision to "fp32"$'
        ):
            main(str(tmp_path / "job.json"))
    with pytest.raises(ValueError, match="AVX512_BF16 or AMX"):
        score.Scorer(str(tiny), "bf16")
    assert score.Scorer(str(tiny), "fp32").precision == "fp32"
    assert not (folder / "refused").exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "text, computes",
    [
        ("flags\t\t: fpu avx2 avx512f avx512_bf16 amx_tile\n", True),
        ("flags\t\t: fpu avx2 amx_bf16 amx_tile\n", True),
        ("Features\t: fp asimd sve bf16 i8mm\n", True),
        ("flags\t\t: fpu avx2 avx512f amx_tile\n", False),
        ("Features\t: fp asimd\n", False),
        ("flags\t\t: avx2\nbugs\t\t: avx512_bf16\n", False),
        ("model name\t: of a machine that lists no flags\n", True),
        (None, True),
    ],
)
def test_what_a_processor_says_of_bfloat16(tmp_path, text, computes):
    if text is not None:
        (tmp_path / "cpuinfo").write_text(text)
    assert precision.computes_bf16(str(tmp_path / "cpuinfo")) is computes


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
@pytest.mark.parametrize(
    "module", ["jobs.train", "jobs.fit_reward", "jobs.reference", "pipeline.assets"]
)
def test_help_says_how_and_starts_nothing(tmp_path, monkeypatch, capsys, module):
    monkeypatch.setattr(paths, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(sys, "argv", [module, "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_module(f"beyond_dpo.{module}", run_name="__main__")
    assert end.value.code == 0 and capsys.readouterr().out.startswith(
        f"usage: python -m beyond_dpo.{module}"
    )
    assert not (tmp_path / "cache").exists()


def test_losses_that_do_not_fit_the_rows():
    scores = {"logps": torch.zeros(12), "tokens": torch.ones(12)}
    for loss, names, message in [
        ("dpo", ["chosen", "rejected"], "needs a reference"),
        ("ipo", ["rejected", "chosen"], "takes the responses"),
        ("simpo", ["chosen"], "takes the responses"),
        ("kto", ["chosen", "rejected"], "Input should be 'sft', 'dpo'"),
        ("mallows_simpo", ["chosen", "rejected"], "'mallows_simpo' needs a reference"),
        (
            "wrpo",
            ["chosen", "rejected"],
            "takes the responses .'source_chosen', 'target_chosen', 'rejected'., in this",
        ),
        ("wrpo", ["target_chosen", "source_chosen", "rejected"], "in this order"),
        ("dpo", list(config.FUSED), "takes the responses a chosen and the rejected one"),
    ]:
        base = torch.zeros(2, 2) if loss == "mallows_simpo" else None
        with pytest.raises(ValueError, match=message):
            train.row_losses(config.Train(**SETTINGS | {"loss": loss}), scores, base, names)


# ---- small parts


def test_schedule_by_hand():
    """Ten steps, 20 % warm-up: 1/3, 2/3, then 8 steps of (1 + cos(pi k / 8)) / 2; three steps are
    1, 0.75, 0.25.
    """
    found = [train.schedule(step, 10, 0.2) for step in range(10)]
    assert found[:3] == pytest.approx([1 / 3, 2 / 3, 1]) and found[6] == pytest.approx(0.5)
    assert all(0 < f <= 1 for f in found) and found[2:] == sorted(found[2:], reverse=True)
    assert [train.schedule(step, 3, 0.1) for step in range(3)] == pytest.approx([1, 0.75, 0.25])
    assert 0 < train.schedule(0, 1, 0.1) <= 1 and 0 < train.schedule(0, 1, 1.0) <= 1


def test_every_epoch_visits_each_row_once_and_no_batch_is_short():
    """Ten rows in batches of four: the third batch takes two rows of the first epoch and two of the
    second.
    """
    rows = [
        {"id": f"{i}", "prompt_ids": [1], "responses": {"chosen": [1] * (1 + i % 3)}}
        for i in range(10)
    ]
    batches = [train._step_rows(rows, ["chosen"], step, 4, seed=7) for step in range(5)]
    assert all(len(b) == 4 for b in batches)
    ids = [r["id"] for b in batches for r in b]
    assert {ids.count(f"{i}") for i in range(10)} == {2}
    for epoch in range(2):
        places = epoch_order(10, 7, epoch)
        visited = (
            sorted(f"{i}" for i in places[:8]) if epoch == 0 else sorted(f"{i}" for i in places[2:])
        )
        assert sorted(r["id"] for b in batches[3 * epoch : 3 * epoch + 2] for r in b) == visited
    assert all(
        len(b[0]["responses"]["chosen"]) <= len(b[3]["responses"]["chosen"]) for b in batches
    )


if (
    __name__ == "__main__"
):  # run a list of jobs in this process (one of several, if a launcher started it)
    logging.basicConfig(level=logging.INFO)
    todo = json.loads(Path(sys.argv[1]).read_text())
    for number, each in enumerate(todo["jobs"]):
        rank, out = os.environ.get("RANK", "0"), Path(each["out"])
        file = Path(sys.argv[1]).with_name(f"job{number}-{rank}.json")
        file.write_text(json.dumps(each))
        if rank == "0" and (out / "model.safetensors").exists():
            os.rename(out / "model.safetensors", out / "first.safetensors")
        if each.get("spoil"):
            spoil(out, each["spoil"])
        if each.get(
            "sharded"
        ):  # tiny weights too are gathered at each use, and logits exist for 8 tokens at a time
            settings = train.engine_config(config.Train(**each["settings"]), 2)
            settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
            train.engine_config = lambda *_, settings=settings: settings
            scoring.ResponseScorer.__init__.__defaults__ = ("fp32", 8)
        try:
            train.main(str(file))
        except (train.NonFiniteLoss, train.UnusableCheckpoint) as failure:
            (out / "error").write_text(str(failure))
