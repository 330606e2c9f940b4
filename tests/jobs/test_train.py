"""Training on a real DeepSpeed engine in real processes, against a plain loop and against itself.

Many jobs share one start, which costs more than all the training: `python -m test_train` runs a
list of them.
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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import cosine_similarity, logsigmoid

from beyond_dpo import lora, precision, scoring, templates
from beyond_dpo.jobs import fit_reward, reference, score, train
from beyond_dpo.losses import mallows_link
from beyond_dpo.machine import launch, paths
from beyond_dpo.pipeline import config
from beyond_dpo.rows import epoch_order, prepare, write_rows

pytestmark = pytest.mark.slow
PAIR = ["chosen", "rejected"]
LIMITS = {"max_prompt": 8, "max_length": 24, "bos_id": 0, "eos_id": 1}
SETTINGS = {
    "lr": 3e-3,
    "global_batch": 4,
    "micro_batch": 4,
    "epochs": 2,
    "loss": "sft",
    "precision": "fp32",
}
# twelve rows, twice, in batches of four
ROWS = 12
STEPS = 6
PLAIN = {
    "sft": {},
    "adagrad": {"optimizer": "adagrad", "lr": 0.03, "weight_decay": 0.01},
    "decay": {"weight_decay": 0.1},
    "clipped": {"max_grad_norm": 0.1},
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
FUSED_LOSSES = {settings["loss"] for settings in FUSED.values()}
LORA = {**PAIRS["dpo"], "lora_rank": 2, "lora_alpha": 8.0, "lr": 1e-2}
LONG = {"epochs": 40, "checkpoint_every": 20}  # 120 steps: long enough to be killed before its end
BF16 = precision.computes_bf16(precision.CPUINFO) or torch.cuda.is_available()
needs_bf16 = pytest.mark.skipif(
    not BF16, reason="bfloat16 is refused on this CPU, which would emulate it"
)
ROUGH = {"precision": "bf16" if BF16 else "fp32"}
MODULE = "beyond_dpo.jobs.train"


# ---- the jobs


@pytest.fixture(scope="module")
def good(rows):
    """Return the rows as a job cuts them."""
    good, dropped = prepare(rows, PAIR, **LIMITS)
    assert len(good) == ROWS
    assert dropped == 0
    return good


@pytest.fixture(scope="module")
def folder(tiny, rows, good, tmp_path_factory):
    """Write twelve good rows with a reference of theirs, and two with nothing to train on."""
    folder = tmp_path_factory.mktemp("train")
    no_answer = {
        "id": "no answer",
        "prompt_ids": [0, 7],
        "responses": {"chosen": [], "rejected": []},
    }
    no_prompt = {
        "id": "no prompt",
        "prompt_ids": [],
        "responses": {"chosen": [9], "rejected": [8]},
    }
    write_rows(folder / "rows.jsonl", [no_answer, *rows, no_prompt])
    write_rows(folder / "empty.jsonl", [no_answer, no_prompt])
    write_rows(folder / "fused.jsonl", with_source(rows))
    write_rows(folder / "weighted.jsonl", with_weights(rows))
    write_reference(folder, tiny, "rows.jsonl", PAIR, "reference")
    write_reference(folder, tiny, "fused.jsonl", config.FUSED, "fused_reference")
    save_broken_model(tiny, good, folder / "broken")
    # for the child processes that run this file
    python_path = [str(Path(__file__).parent), os.environ["PYTHONPATH"]]
    os.environ["PYTHONPATH"] = os.pathsep.join(python_path)
    return folder


def with_weights(rows):
    """Return rows that bring weights along, from 0.25 to 3."""
    return [{**row, "weight": 0.25 * (i + 1)} for i, row in enumerate(rows)]


def with_source(rows):
    """Return rows with a source's response as well, which is the chosen one of another row."""
    extended = []
    for i, row in enumerate(rows):
        source = rows[i - 1]["responses"]["chosen"]
        target, rejected = row["responses"].values()
        responses = dict(zip(config.FUSED, (source, target, rejected), strict=True))
        extended.append(row | {"responses": responses})
    return extended


def write_reference(folder, model, rows, names, out):
    job = {
        "model": str(model),
        "rows": str(folder / rows),
        "names": names,
        "limits": LIMITS,
        "precision": "fp32",
        "micro_batch": 5,
        "out": str(folder / out),
    }
    file = folder / "reference.json"
    file.write_text(json.dumps(job))
    reference.main(str(file))


def save_broken_model(tiny, rows, out):
    """Save a model that computes NaN for row 5 alone, by the embedding of one of its tokens."""
    from transformers import AutoModelForCausalLM

    inputs = []
    for row in rows:
        inputs.append(set(row["prompt_ids"] + row["responses"]["chosen"][:-1]))
    others = inputs[:5] + inputs[6:]
    token = min(inputs[5].difference(*others))
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    # the head is untied, and stays whole
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    with torch.no_grad():
        model.get_input_embeddings().weight[token] = float("nan")
    model.save_pretrained(out)
    templates.load_tokenizer(tiny).save_pretrained(out)


def a_job(folder, name, model, rows="rows.jsonl", **changes):
    """Return a job that trains into folder/name, with the responses and reference of its loss."""
    settings = config.Train(**{"warmup": 0.2, **SETTINGS, **changes})
    job = {
        "model": str(model),
        "rows": str(folder / rows),
        "names": PAIR,
        "limits": LIMITS,
        "seed": 3,
        "out": str(folder / name),
        "settings": dataclasses.asdict(settings),
        "reference": str(folder / "reference"),
    }
    if settings.loss == "sft":
        job["names"] = ["chosen"]
        job["reference"] = None
    elif settings.loss == "simpo":
        job["reference"] = None
    elif settings.loss in FUSED_LOSSES:
        job["rows"] = str(folder / "fused.jsonl")
        job["names"] = list(config.FUSED)
        job["reference"] = str(folder / "fused_reference")
    return job


def run_all(jobs, workdir, **options):
    """Run many jobs in one start."""
    launch.run("test_train", {"jobs": jobs}, workdir, desc="jobs", **options)


@pytest.fixture(scope="module")
def single(folder, tiny):
    """Run all that one process can show.

    `killed` is `long`, killed by force after its first checkpoint and resumed.
    """
    kill_after_a_checkpoint(folder, a_job(folder, "killed", tiny, **LONG))
    overflow = {
        "lr": 1e6,
        "epochs": 1,
        "global_batch": 12,
        "save_dtype": "float16",
        "warmup": 0.0,
    }
    changes = {
        **PLAIN,
        **PAIRS,
        **FUSED,
        "sft_1": {"micro_batch": 1},
        "sft_2": {"micro_batch": 2},
        "dpo_1": {**PAIRS["dpo"], "micro_batch": 1},
        "wrpo_2": {**FUSED["wrpo"], "micro_batch": 2},
        "parts": {"parts": 3},
        "recomputed": {**PAIRS["dpo"], "micro_batch": 2, "gradient_checkpointing": True},
        "bf16": {**ROUGH, "save_dtype": "bfloat16"},
        "lora": LORA,
        "lora_bf16": {**LORA, **ROUGH},
        "offload": {"zero": 2, "offload": True},
        "plain_dpo": {"loss": "dpo", "beta": 0.1},
        "long": LONG,
        "killed": LONG,
        "overflow": overflow,
        "step2": {"checkpoint_every": 2},
        "step3": {"checkpoint_every": 3},
        "step4": {"checkpoint_every": 4},
    }
    jobs = [a_job(folder, name, tiny, **change) for name, change in changes.items()]
    for name in ("mallows_theta", "mallows_phi"):
        jobs.append(a_job(folder, f"{name}_own", tiny, "weighted.jsonl", **PAIRS[name]))
    # once more, after their checkpoints were spoilt
    jobs.append(a_job(folder, "step4", tiny, checkpoint_every=4) | {"spoil": "damaged"})
    jobs.append(a_job(folder, "step2", tiny, checkpoint_every=2) | {"spoil": "foreign"})
    run_all(jobs, folder / "single")
    return folder


def kill_after_a_checkpoint(folder, job):
    """Run a job until its first checkpoint is named, and kill it."""
    out = Path(job["out"])
    file = folder / "killed.json"
    file.write_text(json.dumps(job))
    child = subprocess.Popen(launch.command(MODULE, file), start_new_session=True)
    latest = out / "checkpoints" / "zero0-of1" / "latest"
    end = time.monotonic() + 300
    while not latest.exists():
        assert child.poll() is None
        assert time.monotonic() < end
        time.sleep(0.005)
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    named = latest.read_text()
    assert named in ("step20", "step40"), "the name of a checkpoint appears whole, or not at all"
    log_file = out / "log.jsonl"
    with open(log_file, "a") as log:
        log.write('{"step": 2')  # as if it had been killed while it wrote
    lines = log_file.read_text().splitlines()
    (folder / "steps_at_kill").write_text(str(len(lines)))


def spoil(out, kind):
    """Spoil the checkpoint after step 4 of a finished training.

    "damaged": as a power cut does, with its length unchanged; the one after step 3 of another
    training is laid beside it. "foreign": put whole files in its place that are of no model.
    """
    saved = out / "checkpoints" / "zero0-of1"
    (state,) = (saved / "step4").glob("*.pt")
    if kind == "foreign":
        torch.save({}, state)
        sizes = {state.name: state.stat().st_size}
        (state.parent / train.SIZES).write_text(json.dumps(sizes))
        return
    content = state.read_bytes()
    half = len(content) // 2
    zeros = bytes(len(content) - half)
    state.write_bytes(content[:half] + zeros)
    before = out.with_name("step3") / "checkpoints" / "zero0-of1" / "step3"
    shutil.copytree(before, saved / "step3")


@pytest.fixture(scope="module")
def double(folder, tiny):
    """Run with two processes that torchrun started.

    Each ZeRO stage runs twice, the second time from its checkpoint.
    """
    again = [
        a_job(folder, f"zero{zero}_2", tiny, zero=zero, micro_batch=2, checkpoint_every=4)
        for zero in range(4)
    ]
    again.append(a_job(folder, "lora_2", tiny, zero=3, micro_batch=2, checkpoint_every=4, **LORA))
    pairs = {**PAIRS["dpo"], "zero": 3, "micro_batch": 1}
    once = [
        a_job(folder, "dpo_2", tiny, gradient_checkpointing=True, **pairs),
        a_job(folder, "sharded_2", tiny, **pairs) | {"sharded": True},
    ]
    # what changes the engine's configuration comes last
    jobs = [*again, *again, *once]
    run_all(jobs, folder / "double", launcher="torchrun", processes=2)
    return folder


# ---- what a training left


def log(folder, name):
    lines = (folder / name / "log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def column(folder, name, key):
    return [entry[key] for entry in log(folder, name)]


def losses(folder, name):
    return column(folder, name, "loss")


def weights(path, file="model.safetensors"):
    return load_file(path / file)


# How far rounding may lead the weights astray: root mean square over all weights, in learning
# rates. The largest difference of any one weight would say little. These optimizers step by
# lr·g/√(mean of g²), so the error of a gradient g counts relative to g, and of 131,392 gradients
# some are nearly zero: one weight alone was 0.03 off where the root mean square was 1e-4. Up to
# 1.4e-4 was seen for rounding; 1 % of any setting of any loss moves it by 1.08e-3 or more
# (test_training_is_a_plain_torch_loop).
ROUNDED = 5e-4


def difference(first, second, lr=SETTINGS["lr"]):
    """Return the root mean square difference of all weights, in learning rates."""
    assert first
    assert first.keys() == second.keys()
    differences = []
    for name, weight in first.items():
        differences.append((weight - second[name]).flatten())
    mean_square = torch.cat(differences).square().mean()
    return mean_square.sqrt().item() / lr


# ---- against a plain torch loop

BY_HAND = {
    "adamw": torch.optim.AdamW,
    "adagrad": torch.optim.Adagrad,
    "rmsprop": torch.optim.RMSprop,
}


def logp_by_hand(model, row, name):
    """Return a response's summed log-probability from all logits of the model."""
    response = row["responses"][name]
    ids = torch.tensor([row["prompt_ids"] + response])
    logits = model(input_ids=ids).logits[0, -len(response) - 1 : -1]
    logps = logits.log_softmax(-1)
    positions = range(len(response))
    return logps[positions, response].sum()


def logps_by_hand(model, row):
    """Return {response: its summed log-probability}."""
    return {name: logp_by_hand(model, row, name) for name in row["responses"]}


def pair_loss_by_hand(loss, settings, weight, margin, mean_margin):
    """Return a pair's loss of a margin: of log-ratios, or (SimPO) of mean log-probabilities."""
    beta = settings["beta"]
    ipo_target = 1 / (2 * beta)
    if loss == "dpo":
        flipped = settings.get("label_smoothing", 0.0)
        right = logsigmoid(beta * margin)
        wrong = logsigmoid(-beta * margin)
        return -(1 - flipped) * right - flipped * wrong
    if loss == "ipo":
        return (margin - ipo_target) ** 2
    if loss == "simpo":
        return -logsigmoid(beta * mean_margin - settings["gamma"])
    if loss == "mallows_theta":
        return -logsigmoid(weight * beta * margin)
    if loss == "mallows_phi":
        phi = torch.tensor([math.exp(-weight)])
        chance = mallows_link(beta * margin[None], phi, settings["epsilon"])
        return -chance[0].log().float()
    if loss == "mallows_ipo":
        return (weight * margin - ipo_target) ** 2
    assert loss == "mallows_simpo"
    return -logsigmoid(weight * (beta * mean_margin - settings["gamma"]))


def fused_loss_by_hand(loss, settings, done, margins, mean_margins):
    """Return the loss of three responses.

    margins: of the source's and of the target's response against the rejected one, as in
    pair_loss_by_hand. done: the share of the steps that are done.
    """
    beta = settings["beta"]
    source_margin, target_margin = margins
    if loss == "hybrid":
        return -(logsigmoid(beta * source_margin) + logsigmoid(beta * target_margin)) / 2
    alpha = settings["alpha"]
    if settings.get("dynamic", True):
        alpha *= done
    margin = alpha * source_margin + (1 - alpha) * target_margin
    if loss == "wrpo":
        return -logsigmoid(beta * margin)
    if loss == "wrpo_ipo":
        return (margin - 1 / (2 * beta)) ** 2
    assert loss == "wrpo_simpo"
    source_mean, target_mean = mean_margins
    mean_margin = alpha * source_mean + (1 - alpha) * target_mean
    return -logsigmoid(beta * mean_margin - settings["gamma"])


def row_loss_by_hand(row, logps, reference_logps, weight, done, loss, settings):
    """Return the loss of one preference row from log-probabilities {response: nats}."""
    ratios = []
    means = []
    for name, response in row["responses"].items():
        ratios.append(logps[name] - reference_logps[name])
        means.append(logps[name] / len(response))
    *chosen_ratios, rejected_ratio = ratios
    *chosen_means, rejected_mean = means
    margins = [ratio - rejected_ratio for ratio in chosen_ratios]
    mean_margins = [mean - rejected_mean for mean in chosen_means]
    if len(margins) == 1:
        return pair_loss_by_hand(loss, settings, weight, margins[0], mean_margins[0])
    return fused_loss_by_hand(loss, settings, done, margins, mean_margins)


def weights_by_hand(rows, entropies):
    """Return {row: MallowsPO's weight, whose mean is 1} from the rows' entropies of a pair."""
    sureness = {}
    for row, (chosen, rejected) in zip(rows, entropies, strict=True):
        sureness[row["id"]] = -math.log((chosen + rejected) / 2)
    mean = sum(sureness.values()) / len(rows)
    return {row_id: value / mean for row_id, value in sureness.items()}


def sft_loss_by_hand(model, batch):
    """Return the mean over the tokens of a step."""
    logps = [logp_by_hand(model, row, "chosen") for row in batch]
    tokens = [len(row["responses"]["chosen"]) for row in batch]
    return -sum(logps) / sum(tokens)


def rate_by_hand(lr, step):
    """Return one step of warm-up, then five of a cosine."""
    if step == 0:
        return 0.5 * lr
    return lr * 0.5 * (1 + math.cos(math.pi * (step - 1) / 5))


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
    """Train with all logits, no engine and formulas written out; return losses and weights."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    stepper = BY_HAND[optimizer](model.parameters(), lr=lr, weight_decay=weight_decay)
    rows, dropped = prepare(rows, list(rows[0]["responses"]), **LIMITS)
    assert len(rows) == ROWS
    assert dropped == 0
    order = [*epoch_order(ROWS, 3, 0), *epoch_order(ROWS, 3, 1)]
    with torch.no_grad():
        reference_logps = {row["id"]: logps_by_hand(model, row) for row in rows}
    row_weights = weights_by_hand(rows, entropies)
    step_losses = []
    for step in range(STEPS):
        batch = [rows[i] for i in order[4 * step : 4 * step + 4]]
        if loss == "sft":
            step_loss = sft_loss_by_hand(model, batch)
        else:
            row_losses = []
            for row in batch:
                logps = logps_by_hand(model, row)
                base = reference_logps[row["id"]]
                weight = row_weights[row["id"]]
                done = step / STEPS
                row_losses.append(row_loss_by_hand(row, logps, base, weight, done, loss, settings))
            step_loss = sum(row_losses) / 4
        step_losses.append(step_loss.item())
        stepper.zero_grad()
        step_loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
        stepper.param_groups[0]["lr"] = rate_by_hand(lr, step)
        stepper.step()
    trained = {name: weight.detach() for name, weight in model.named_parameters()}
    return step_losses, trained


def faults(settings):
    """Return the settings with one number wrong, for each number of the loss by 1 %.

    If the loss has none, the rate is wrong by 0.1 %.
    """
    general = ("lr", "weight_decay", "max_grad_norm")
    wrong = []
    for key, value in settings.items():
        if type(value) is float and key not in general:
            wrong.append({**settings, key: 1.01 * value})
    if not wrong:
        wrong.append({**settings, "lr": 1.001 * settings["lr"]})
    return wrong


@pytest.mark.parametrize("name", [*PLAIN, *PAIRS])
def test_training_is_a_plain_torch_loop(single, tiny, rows, good, name):
    """And a loop whose settings are 1 % off would not pass for it."""
    settings = {"lr": SETTINGS["lr"], **(PLAIN | PAIRS)[name]}
    entropies = reference.load(single / "reference", good, PAIR)["entropies"].tolist()
    expected_losses, expected = by_hand(tiny, rows, entropies, **settings)
    assert losses(single, name) == pytest.approx(expected_losses, rel=1e-4)
    assert column(single, name, "step") == list(range(STEPS))
    trained = weights(single / name)
    assert difference(trained, expected, settings["lr"]) < ROUNDED
    for wrong in faults(settings):
        _, other = by_hand(tiny, rows, entropies, **wrong)
        assert difference(trained, other, settings["lr"]) > ROUNDED, wrong


@pytest.mark.parametrize("name", ["mallows_theta", "mallows_phi"])
def test_weights_that_rows_bring_along_take_the_place_of_the_estimate(single, good, name):
    """At step 0 all losses are ln 2, whatever the weights; the gradient of θ is in proportion."""
    own = losses(single, f"{name}_own")
    estimated = losses(single, name)
    assert own[0] == pytest.approx(estimated[0], abs=1e-5)
    assert own[1:] != pytest.approx(estimated[1:], abs=1e-4)


@pytest.mark.parametrize("bad", [0, -1.0, float("inf"), float("nan"), "1", True, None])
def test_a_weight_that_is_none_is_refused_with_its_row(folder, good, bad):
    rows = with_weights(good)
    rows[3]["weight"] = bad
    with pytest.raises(ValueError, match=f"row {rows[3]['id']}: a weight must be positive"):
        read_weights(folder, rows)


def read_weights(folder, rows):
    """Return the weights of rows as the job reads them, of a loss that needs some."""
    scores = train._read_reference(str(folder / "reference"), rows, PAIR, "mallows_theta")
    return [scores.dispersion_weights[row["id"]] for row in rows]


def test_weights_of_rows_are_taken_as_they_are_and_all_or_none(folder, good):
    rows = with_weights(good)
    assert read_weights(folder, rows) == [row["weight"] for row in rows]
    estimated = read_weights(folder, good)
    assert sum(estimated) / len(estimated) == pytest.approx(1)
    del rows[5]["weight"]
    with pytest.raises(ValueError, match=f"row {rows[5]['id']}: a weight"):
        read_weights(folder, rows)


@pytest.mark.parametrize("name", FUSED)
def test_wrpo_is_a_plain_torch_loop(single, tiny, rows, name):
    settings = {"lr": SETTINGS["lr"], **FUSED[name]}
    entropies = [(0.5, 0.5)] * ROWS  # of no use here
    rows = with_source(rows)
    expected_losses, expected = by_hand(tiny, rows, entropies, **settings)
    assert losses(single, name) == pytest.approx(expected_losses, rel=1e-4)
    trained = weights(single / name)
    assert difference(trained, expected) < ROUNDED
    for wrong in faults(settings):
        _, other = by_hand(tiny, rows, entropies, **wrong)
        assert difference(trained, other) > ROUNDED, wrong


@pytest.mark.parametrize("name", ["wrpo", "wrpo_ipo", "wrpo_simpo"])
def test_dynamic_alpha_rises_with_the_steps(single, name):
    """0 at the first step, 5/6 of the largest at the last of six."""
    largest = FUSED[name]["alpha"]
    expected = [largest * step / STEPS for step in range(STEPS)]
    assert column(single, name, "alpha") == pytest.approx(expected)


def test_static_alpha_is_constant(single):
    assert column(single, "wrpo_static", "alpha") == [0.6] * STEPS


def test_the_log_holds_the_reward_of_every_response(single):
    """α = 0 at the first step: the weighted reward is the target's; later it lies in between."""
    entries = log(single, "wrpo")
    first = entries[0]
    last = entries[-1]
    assert abs(first["source_chosen_reward"]) + abs(first["target_chosen_reward"]) < 1e-5
    assert last["alpha"] == pytest.approx(0.5)
    of_source = last["alpha"] * last["source_chosen_reward"]
    of_target = (1 - last["alpha"]) * last["target_chosen_reward"]
    assert last["chosen_reward"] == pytest.approx(of_source + of_target, rel=1e-5)
    assert last["margin"] == pytest.approx(last["chosen_reward"] - last["rejected_reward"])


def test_the_columns_of_a_log(single):
    """Tables and notebooks read them by these names."""
    every = ["step", "lr", "grad_norm"]
    speed = ["rows_per_s", "tokens_per_s", "computed_tokens_per_s", "flops_per_s"]
    assert list(log(single, "sft")[0]) == [*every, *speed, "loss"]
    pair = ["chosen_reward", "chosen_accuracy", "chosen_logps"]
    pair += ["rejected_reward", "rejected_logps", "margin", "accuracy"]
    assert list(log(single, "plain_dpo")[0]) == [*every, *speed, "loss", *pair]
    fused = ["source_chosen_reward", "source_chosen_accuracy", "source_chosen_logps"]
    fused += ["target_chosen_reward", "target_chosen_accuracy", "target_chosen_logps"]
    fused += ["rejected_reward", "rejected_logps", "chosen_reward", "margin", "accuracy"]
    assert list(log(single, "wrpo_static")[0]) == [*every, "alpha", *speed, "loss", *fused]


def test_speeds_of_a_log_fit_each_other(single):
    """Padding is computed too; on a CPU no peak is known, so there is no MFU."""
    for entry in log(single, "plain_dpo"):
        assert entry["computed_tokens_per_s"] >= entry["tokens_per_s"] > entry["rows_per_s"] > 0
        assert entry["flops_per_s"] > entry["tokens_per_s"]
        assert "mfu" not in entry


def test_one_step_of_wrpo_is_dpo_on_the_targets_pair(single, tiny):
    """Trap of a short run: α of the first step is 0.

    Fewer rows than a batch are one step, and divide nothing by 0.
    """
    few = {"epochs": 1, "global_batch": 24, "micro_batch": 12}
    wrpo = a_job(single, "one_wrpo", tiny, **FUSED["wrpo"], **few)
    source = a_job(single, "one_source", tiny, **{**FUSED["wrpo_static"], "alpha": 1.0}, **few)
    dpo = a_job(single, "one_dpo", tiny, loss="dpo", beta=0.5, **few)
    dpo["names"] = list(config.FUSED[1:])
    for key in ("rows", "reference"):
        dpo[key] = wrpo[key]
    run_all([wrpo, dpo, source], single / "one_step")
    assert column(single, "one_wrpo", "alpha") == [0]
    trained = weights(single / "one_wrpo")
    assert difference(trained, weights(single / "one_dpo")) < ROUNDED
    assert difference(trained, weights(single / "one_source")) > 0.1


def test_parts_are_the_model_on_its_way(single):
    """Of six steps in three parts: after the second and the fourth."""
    parts = single / "parts"
    whole = (parts / "model.safetensors").read_bytes()
    assert whole == (single / "sft" / "model.safetensors").read_bytes()
    assert sorted(path.name for path in parts.glob("part*")) == ["part1", "part2"]
    end = weights(single / "sft")
    first_distance = difference(weights(parts / "part1"), end)
    second_distance = difference(weights(parts / "part2"), end)
    assert first_distance > second_distance > 0.01
    assert (parts / "part1" / "tokenizer.json").exists()


@pytest.mark.parametrize("name", ["sft", *PAIRS, "adagrad", "bf16"])
def test_three_steps_lower_the_loss(single, name):
    """Each epoch is three steps over the same rows."""
    step_losses = losses(single, name)
    first_epoch = sum(step_losses[:3])
    second_epoch = sum(step_losses[3:])
    assert second_epoch < 0.99 * first_epoch


def test_dpo_learns_the_preferences(single):
    last = log(single, "dpo")[-1]
    assert last["accuracy"] == 1
    assert last["margin"] > 0.1


def test_at_step_0_the_cached_reference_is_the_policy(single, good):
    """DPO's loss is ln 2 to 1e-6, its rewards 0; IPO's is 1 / (2 beta)^2 = 25.

    The reference had other batches.
    """
    first = log(single, "plain_dpo")[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert abs(first["chosen_reward"]) + abs(first["rejected_reward"]) < 1e-5
    assert losses(single, "ipo")[0] == pytest.approx(25, abs=1e-3)
    logps = reference.load(single / "reference", good, PAIR)["logps"]
    first_rows = epoch_order(ROWS, 3, 0)[:4]
    chosen_logps, rejected_logps = logps[first_rows].mean(0).tolist()
    assert first["chosen_logps"] == pytest.approx(chosen_logps, rel=1e-6)
    assert first["rejected_logps"] == pytest.approx(rejected_logps, rel=1e-6)


# ---- adapters


def test_lora_begins_as_dpo_and_learns(single):
    """B is 0 at the first step."""
    step_losses = losses(single, "lora")
    assert step_losses[0] == pytest.approx(losses(single, "dpo")[0], rel=1e-5)
    assert sum(step_losses[3:]) < 0.9 * sum(step_losses[:3])


def test_lora_saves_an_adapter_alone(single):
    out = single / "lora"
    assert not (out / "model.safetensors").exists()
    assert (out / "tokenizer.json").exists()
    matrices = weights(out, lora.WEIGHTS)
    assert len(matrices) == 2 * 7 * 2, "A and B of seven linear layers in two blocks"
    assert "/" not in (out / lora.CONFIG).read_text(), "no path of this machine"


def test_lora_in_two_processes_with_zero_3_and_a_resume_is_the_same(single, double):
    assert losses(single, "lora") == pytest.approx(losses(double, "lora_2"), rel=1e-4)
    one = weights(single / "lora", lora.WEIGHTS)
    two = weights(double / "lora_2", lora.WEIGHTS)
    # B begins as zeros, so that the first gradients of A are little but rounding: 5.5e-4 was seen
    assert difference(one, two, LORA["lr"]) < 10 * ROUNDED


def test_peft_loads_the_adapter_as_it_was_trained(single, tiny, good):
    """peft's own model and lora.tensors() at α = 0 score alike, and as the training meant it."""
    import peft
    from transformers import AutoModelForCausalLM

    def logps(model):
        return scoring.ResponseScorer(model).score(good, PAIR, 2)["logps"]

    plain = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    before = logps(plain)
    own = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    own.load_state_dict(dict(lora.tensors(tiny, single / "lora", 0.0)), strict=False)
    theirs = peft.PeftModel.from_pretrained(plain, single / "lora").merge_and_unload()
    after = logps(own)
    assert after.tolist() == pytest.approx(logps(theirs).tolist(), rel=1e-5)
    chosen, rejected = (after - before).view(2, -1)
    assert (chosen - rejected).mean() > 0.2, "in nats: the chosen responses became likelier"


# ---- however it is computed


@pytest.mark.parametrize(
    "name, other",
    [
        ("sft", "sft_1"),
        ("sft", "sft_2"),
        ("dpo", "dpo_1"),
        ("wrpo", "wrpo_2"),
        ("dpo", "recomputed"),
        ("sft", "offload"),
    ],
)
def test_how_it_is_computed_does_not_change_the_result(single, name, other):
    """Accumulation, gradient checkpointing and offload."""
    assert losses(single, other) == pytest.approx(losses(single, name), rel=1e-5)
    assert difference(weights(single / other), weights(single / name)) < ROUNDED


@pytest.mark.parametrize("zero", range(4))
def test_two_processes_are_one(single, double, zero):
    name = f"zero{zero}_2"
    for key in ("step", "loss", "lr", "grad_norm"):
        expected = column(single, "sft", key)
        assert column(double, name, key) == pytest.approx(expected, rel=1e-5), key
    trained = weights(double / name, "first.safetensors")
    assert difference(trained, weights(single / "sft")) < ROUNDED


@pytest.mark.parametrize("zero", range(4))
def test_two_processes_resume_from_their_checkpoint(double, zero):
    """The second run finds the checkpoint after step 4 of 6, and writes steps 4 and 5 again."""
    name = f"zero{zero}_2"
    assert column(double, name, "step") == list(range(STEPS))
    first = weights(double / name, "first.safetensors")
    assert difference(first, weights(double / name)) < ROUNDED
    messages = (double / "double" / "job.log").read_text()
    assert messages.count("steps 4 to 6") == 5, "four stages and the adapter"


def test_two_processes_with_pairs(single, double):
    keys = [
        "loss",
        "chosen_reward",
        "rejected_reward",
        "margin",
        "chosen_logps",
        "rejected_logps",
    ]
    for key in keys:
        expected = column(single, "dpo", key)
        assert column(double, "dpo_2", key) == pytest.approx(expected, rel=1e-4, abs=1e-5), key
    # at step 0 the policy is the reference: which of two rewards is larger is rounding alone
    assert column(double, "dpo_2", "accuracy")[1:] == column(single, "dpo", "accuracy")[1:]
    assert difference(weights(double / "dpo_2"), weights(single / "dpo")) < ROUNDED


def test_the_deepspeed_launcher(single, tiny):
    """It sets LOCAL_SIZE, by which DeepSpeed would leave 66 MiB of shared memory a process."""
    out = single / "launched"
    job = a_job(single, out.name, tiny, zero=2, micro_batch=2)
    launch.run(MODULE, job, out, desc="SFT", launcher="deepspeed", processes=2)
    assert losses(single, out.name) == pytest.approx(losses(single, "sft"), rel=1e-5)
    assert difference(weights(out), weights(single / "sft")) < ROUNDED
    port = re.search(r"--master_port=(\d+)", (out / "job.log").read_text())[1]
    left = [path.name for path in Path("/dev/shm").iterdir() if port in path.name]
    assert not left


def test_tasks_that_export_their_rank_need_no_launcher(single, tiny):
    """RANK, LOCAL_RANK, WORLD_SIZE and MASTER_* are all they share.

    Of a task of `srun`, what SLURM says stands in their place.
    """
    file = single / "tasks.json"
    file.write_text(json.dumps(a_job(single, "tasks", tiny, zero=1, micro_batch=2)))
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(launch._free_port())}
    first = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}
    second = {
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_PROCID": "1",
        "SLURM_LOCALID": "1",
        "SLURM_JOB_ID": "1",
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NODELIST": "n1",
    }
    command = [sys.executable, "-m", MODULE, str(file)]
    tasks = []
    for variables in (first, second):
        environment = os.environ | shared | variables
        tasks.append(subprocess.Popen(command, env=environment))
    assert [task.wait(120) for task in tasks] == [0, 0]
    assert losses(single, "tasks") == pytest.approx(losses(single, "sft"), rel=1e-5)
    assert difference(weights(single / "tasks"), weights(single / "sft")) < ROUNDED


# ---- interrupted


def test_killed_and_resumed_is_uninterrupted(single):
    """Killed by force after the first of its checkpoints: every bit is the same.

    That is so in one process with float32.
    """
    steps_at_kill = int((single / "steps_at_kill").read_text())
    assert 20 <= steps_at_kill < 120
    assert "steps 20 to 120" in (single / "single" / "job.log").read_text()
    assert column(single, "killed", "step") == list(range(120))
    for key in ("step", "loss", "lr", "grad_norm"):
        assert column(single, "killed", key) == column(single, "long", key)
    assert difference(weights(single / "killed"), weights(single / "long")) == 0


def test_the_last_checkpoint_alone_is_kept(single):
    saved = single / "killed" / "checkpoints" / "zero0-of1"
    # older ones are gone, and the end needs none
    assert sorted(path.name for path in saved.iterdir()) == ["latest", "step100"]


def test_a_damaged_checkpoint_is_set_aside_and_training_goes_on_from_the_one_before(single):
    """After the power failed: the last checkpoint has its length, but half of it is zeros.

    The result is bit for bit that of a training without it.
    """
    messages = (single / "single" / "job.log").read_text()
    damage = r"step4 is damaged \(.*other bytes.*kept as damaged-zero0-of1-step4"
    assert re.search(f"{damage}; .* goes on from step3", messages)
    assert "steps 3 to 6" in messages
    checkpoints = single / "step4" / "checkpoints"
    kept = sorted(path.name for path in checkpoints.iterdir())
    assert kept == ["damaged-zero0-of1-step4", "finished", "zero0-of1"]
    expected = weights(single / "sft")
    for file in ("first.safetensors", "model.safetensors"):
        assert difference(weights(single / "step4", file), expected) == 0
    assert losses(single, "step4") == losses(single, "sft")


def test_a_whole_checkpoint_that_cannot_be_loaded_says_what_to_delete(single):
    message = (single / "step2" / "error").read_text()
    problem = r"checkpoint \S+/step4 cannot be loaded \(.+\)"
    assert re.search(f"{problem}; .* delete that folder, and the training", message)
    assert "\n" not in message


@pytest.fixture
def log_file(tmp_path):
    """Write the log of six steps."""
    file = tmp_path / "log.jsonl"
    lines = [json.dumps({"step": step}) + "\n" for step in range(STEPS)]
    file.write_text("".join(lines))
    return file


@pytest.fixture
def checkpoints(tmp_path, log_file):
    """Make the folder of two checkpoints, after steps 2 and 4 of six; `latest` names the second."""
    saved = tmp_path / "checkpoints" / "zero1-of2"
    copy = tmp_path / "kept"
    write_checkpoint(saved / "step2", log_file)
    shutil.copytree(saved / "step2", copy)
    write_checkpoint(saved / "step4", log_file)
    names = sorted(path.name for path in saved.iterdir())
    assert names == ["latest", "step4"], "the one before is of no more use"
    shutil.copytree(copy, saved / "step2")
    return saved


def write_checkpoint(folder, log_file):
    folder.mkdir(parents=True)
    for rank in range(2):
        torch.save({"weights": torch.arange(1000.0) + rank}, folder / f"rank{rank}.pt")
    train._name_checkpoint(folder, log_file)


def empty(folder):
    (folder / "rank1.pt").write_bytes(b"")


def fill_with_zeros(folder):
    file = folder / "rank1.pt"
    file.write_bytes(bytes(file.stat().st_size))


def flip_a_bit(folder):
    file = folder / "rank1.pt"
    content = bytearray(file.read_bytes())
    content[2000] ^= 1
    file.write_bytes(content)


def cut_off(folder):
    os.truncate(folder / "rank0.pt", 1000)


def delete_a_file(folder):
    (folder / "rank0.pt").unlink()


def fill_sizes_with_zeros(folder):
    (folder / train.SIZES).write_bytes(bytes(30))


def delete_sizes(folder):
    (folder / train.SIZES).unlink()


DAMAGES = [
    (empty, r"rank1.pt has 0 bytes of \d+"),
    (fill_with_zeros, "rank1.pt has other bytes"),
    (flip_a_bit, "rank1.pt has other bytes"),
    (cut_off, "rank0.pt has 1000 bytes of"),
    (delete_a_file, "rank0.pt is missing"),
    (fill_sizes_with_zeros, "no readable sizes.json"),
    (delete_sizes, "no readable sizes.json"),
]
each_damage = pytest.mark.parametrize(
    "damage, reason", DAMAGES, ids=[damage.__name__ for damage, _ in DAMAGES]
)


def test_a_whole_checkpoint_is_found_without_a_warning(checkpoints, log_file, caplog):
    with caplog.at_level("INFO", MODULE):
        assert train._choose_checkpoint(checkpoints, log_file) == 4
    messages = [record.getMessage() for record in caplog.records]
    assert messages == [f"checking {checkpoints / 'step4'}"]


@each_damage
def test_a_damaged_checkpoint_is_found_whatever_is_damaged(
    checkpoints, log_file, caplog, damage, reason
):
    damage(checkpoints / "step4")
    assert train._choose_checkpoint(checkpoints, log_file) == 2
    kept = "kept as damaged-zero1-of2-step4; the training goes on from step2"
    assert re.search(f"step4 is damaged .{reason}.*{kept}", caplog.text)


# without its sizes, nothing says that a checkpoint which is not the latest ever was whole
@pytest.mark.parametrize("damage", [damage for damage, _ in DAMAGES if damage is not delete_sizes])
def test_where_all_checkpoints_are_damaged_the_training_begins_anew(
    checkpoints, log_file, caplog, damage
):
    damage(checkpoints / "step4")
    damage(checkpoints / "step2")
    assert train._choose_checkpoint(checkpoints, log_file) == 0
    assert "kept as damaged-zero1-of2-step2; the training begins anew" in caplog.text
    names = sorted(path.name for path in checkpoints.parent.iterdir())
    assert names == ["damaged-zero1-of2-step2", "damaged-zero1-of2-step4", "zero1-of2"]


@pytest.mark.parametrize("named", ["", "\0\0\0\0\0", "step6", "step", "../../log.jsonl"])
def test_latest_that_names_no_checkpoint_is_not_followed(checkpoints, log_file, caplog, named):
    """After a power cut the file may be empty or of zeros, or its folder may be gone.

    The newest whole one is taken.
    """
    (checkpoints / "latest").write_text(named)
    assert train._choose_checkpoint(checkpoints, log_file) == 4
    assert "latest names no checkpoint that is there" in caplog.text
    assert "goes on from step4" in caplog.text


def test_a_checkpoint_without_the_log_of_its_steps_is_not_taken(checkpoints, log_file, caplog):
    """The finished log would lack them, or be no JSON."""
    lines = log_file.read_bytes().splitlines(keepends=True)
    zeros = bytes(len(lines[3]))
    log_file.write_bytes(b"".join(lines[:3]) + zeros)
    assert train._choose_checkpoint(checkpoints, log_file) == 2
    assert "step4 is damaged (log.jsonl does not hold its 4 steps)" in caplog.text


def test_no_checkpoint_is_taken_without_a_log(checkpoints, log_file):
    log_file.unlink()
    assert train._choose_checkpoint(checkpoints, log_file) == 0


def test_a_checkpoint_that_was_never_finished_is_no_damage(checkpoints, log_file, caplog):
    """Killed while it wrote: nothing to keep or to say, and the one before is taken."""
    shutil.copytree(checkpoints / "step4", checkpoints / "step6")
    delete_sizes(checkpoints / "step6")
    assert train._choose_checkpoint(checkpoints, log_file) == 4
    assert not caplog.records


def test_a_kill_while_the_log_is_cut_loses_no_checkpoint(checkpoints, log_file):
    """Written in place, the log was empty for a moment, and with it the checkpoint of no use.

    A second name of the file shows whether it is written into.
    """
    before = log_file.read_bytes()
    lines = before.splitlines(keepends=True)
    second_name = log_file.with_name("second name")
    os.link(log_file, second_name)
    train._cut_log(log_file, 4)
    assert log_file.read_bytes() == b"".join(lines[:4])
    assert second_name.read_bytes() == before
    assert train._choose_checkpoint(checkpoints, log_file) == 4


def test_a_log_that_ends_with_its_checkpoint_is_left_alone(log_file):
    before = log_file.stat()
    train._cut_log(log_file, STEPS)
    after = log_file.stat()
    assert after.st_mtime_ns == before.st_mtime_ns
    assert after.st_ino == before.st_ino


def test_a_line_that_was_begun_leaves_the_log(log_file):
    """Killed while it wrote; after a power cut its end may even be no text."""
    whole = log_file.read_bytes()
    log_file.write_bytes(whole + b'{"step": 6, "\xc3')
    train._cut_log(log_file, STEPS)
    assert log_file.read_bytes() == whole


def test_what_is_left_of_other_attempts_is_deleted(checkpoints):
    """Of later steps, and of another number of processes; what is set aside stays."""
    shutil.copytree(checkpoints / "step4", checkpoints / "step6")
    for name in ("zero1-of4", "damaged-zero1-of2-step5"):
        shutil.copytree(checkpoints, checkpoints.parent / name)
    train._delete_other_checkpoints(checkpoints, 4)
    names = sorted(path.name for path in checkpoints.parent.iterdir())
    assert names == ["damaged-zero1-of2-step5", "zero1-of2"]
    assert sorted(path.name for path in checkpoints.iterdir()) == ["latest", "step2", "step4"]
    train._delete_other_checkpoints(checkpoints, 0)
    assert not checkpoints.exists()


class WritingEngine:
    """What DeepSpeed does of a checkpoint: it writes files, which nobody brings to the disk."""

    def save_checkpoint(self, folder, tag, state, **options):
        (folder / tag).mkdir()
        (folder / tag / "model.pt").write_bytes(b"weights")


def test_a_checkpoint_is_on_the_disk_before_latest_names_it(tmp_path, log_file, monkeypatch):
    """Every file and folder first; the one before goes when the disk has what `latest` names."""
    from deepspeed import comm

    saved = tmp_path / "checkpoints" / "zero0-of1"
    (saved / "step2").mkdir(parents=True)
    (saved / "latest").write_text("step2")
    fsync = os.fsync
    synced = []  # (file, what `latest` names then)

    def watched(number):
        fsync(number)
        assert (saved / "step2").exists()
        path = os.readlink(f"/proc/self/fd/{number}")
        synced.append((path.removeprefix(str(tmp_path)), (saved / "latest").read_text()))

    monkeypatch.setattr(os, "fsync", watched)
    monkeypatch.setattr(comm, "barrier", lambda: synced.append(("all are here", "")))
    train._save_checkpoint(WritingEngine(), saved, 4, log_file, 0, True)
    first, second = synced[:2]
    assert first == ("/checkpoints/zero0-of1/step4/model.pt", "step2")
    assert second == ("all are here", "")
    before = {file for file, named in synced if named == "step2"}
    needed = {
        "",
        "/log.jsonl",
        "/checkpoints",
        "/checkpoints/zero0-of1",
        "/checkpoints/zero0-of1/step4",
    }
    assert needed <= before
    assert synced[-1] == ("/checkpoints/zero0-of1", "step4")
    assert not (saved / "step2").exists()


# ---- what is saved


def test_a_model_that_lacks_a_tensor_is_not_trained(folder, tiny, tmp_path):
    """transformers would draw it at random, and say so in a table among other lines."""
    lacking = tmp_path / "lacking"
    shutil.copytree(tiny, lacking)
    tensors = weights(tiny)
    name = next(name for name in tensors if "layers.1.mlp.up_proj" in name)
    del tensors[name]
    save_file(tensors, lacking / "model.safetensors", metadata={"format": "pt"})
    job = a_job(folder, "untrained", lacking)
    message = rf"no {re.escape(name)} for the model \(1 missing\): .* not whole"
    with pytest.raises(launch.JobFailed, match=message):
        launch.run(MODULE, job, tmp_path, desc="SFT")


@pytest.fixture
def mixture():
    """Return a model whose router has a correction, and whose head shares the embeddings.

    A router's correction is no parameter but a buffer. The configuration says that the head shares
    nothing.
    """
    from transformers import AutoModelForCausalLM, DeepseekV3Config

    config = DeepseekV3Config(
        vocab_size=512,
        hidden_size=32,
        intermediate_size=32,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        first_k_dense_replace=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        n_routed_experts=4,
        n_group=2,
        topk_group=1,
        num_experts_per_tok=2,
        n_shared_experts=1,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
    )
    model = AutoModelForCausalLM.from_config(config)
    correction(model).add_(torch.tensor([0.5, -0.25, 0.0, 1.0]))
    assert not model.config.tie_word_embeddings
    model.lm_head.weight = model.model.embed_tokens.weight
    return model


def correction(model):
    return model.model.layers[1].mlp.gate.e_score_correction_bias


def test_persistent_buffers_and_weights_with_two_names_are_saved(tmp_path, tiny, mixture):
    from transformers import AutoModelForCausalLM

    out = tmp_path / "out"
    train._save(mixture, templates.load_tokenizer(tiny), out, torch.float32, 0)
    loaded = AutoModelForCausalLM.from_pretrained(out)
    before = mixture.state_dict()
    after = loaded.state_dict()
    assert before.keys() == after.keys()
    assert "lm_head.weight" in after
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name
    ids = torch.tensor([[5, 6, 7, 8]])
    assert torch.equal(mixture.eval()(ids).logits, loaded.eval()(ids).logits)


def test_a_buffer_that_is_not_finite_is_not_saved(tmp_path, tiny, mixture):
    correction(mixture)[0] = math.nan
    tokenizer = templates.load_tokenizer(tiny)
    with pytest.raises(train.NonFiniteLoss, match="e_score_correction_bias is not finite"):
        train._save(mixture, tokenizer, tmp_path / "bad", torch.float32, 0)


@pytest.mark.parametrize("rank", [0, 2], ids=["whole", "adapter"])
def test_trained_files_have_the_mode_that_the_umask_says(tmp_path, tiny, rank):
    """safetensors writes for the owner alone: a colleague of the group could not read it."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    if rank:
        lora.inject(model, rank, 4.0)
    out = tmp_path / "part1"
    umask = os.umask(0o027)
    try:
        train._save(model, templates.load_tokenizer(tiny), out, torch.float32, 0)
    finally:
        os.umask(umask)
    modes = {path.name: oct(path.stat().st_mode & 0o777) for path in out.iterdir()}
    assert set(modes.values()) == {"0o640"}, modes
    assert "tokenizer.json" in modes
    assert list(out.glob("*.safetensors"))


@pytest.mark.parametrize("name, dtype", [("sft", torch.float32), ("bf16", torch.bfloat16)])
def test_saved_model(single, name, dtype):
    from transformers import AutoModelForCausalLM

    # 20 weights: no second copy of the tied one
    assert {weight.dtype for weight in weights(single / name).values()} == {dtype}
    model = AutoModelForCausalLM.from_pretrained(single / name)
    assert model.dtype == dtype
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert model.config.use_cache
    assert model.config.vocab_size == 512


def test_saved_tokenizer(single, tiny):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(single / "sft")
    before = AutoTokenizer.from_pretrained(tiny)
    assert tokenizer("A patient film.") == before("A patient film.")
    assert tokenizer.chat_template


def test_saved_facts(single):
    facts = json.loads((single / "sft" / "facts.json").read_text())
    assert facts == {"rows": ROWS, "dropped": 2, "steps": STEPS}


@needs_bf16
def test_bf16_is_close_to_fp32(single, tiny):
    """Losses within 1 %, and the same way through weight space but for rounding.

    The weights stay float32 in training.
    """
    assert losses(single, "bf16") == pytest.approx(losses(single, "sft"), rel=0.01)
    start = weights(tiny)

    def moved(name):
        end = weights(single / name)
        steps = [(end[key].float() - start[key]).flatten() for key in start]
        return torch.cat(steps)

    assert cosine_similarity(moved("sft"), moved("bf16"), dim=0) > 0.95


# ---- failures


def test_weights_that_overflow_in_the_files_dtype_are_not_saved(single):
    assert "is not finite in torch.float16" in (single / "overflow" / "error").read_text()
    assert not list((single / "overflow").glob("*.safetensors"))


def test_processes_with_different_numbers_of_chunks_wait_for_each_other(single, double):
    """Under ZeRO-3 each call of the head gathers it.

    With unequal numbers of calls two processes would hang.
    """
    assert losses(double, "sharded_2") == pytest.approx(losses(single, "dpo"), rel=1e-4)
    assert difference(weights(double / "sharded_2"), weights(single / "dpo")) < ROUNDED


@pytest.mark.parametrize("launcher, processes", [("plain", 1), ("deepspeed", 2)])
def test_a_loss_that_is_not_finite_stops_all_and_names_the_row(
    folder, tmp_path, launcher, processes
):
    """Of two processes one fails; the other waits for it in vain until the launcher ends it."""
    job = a_job(folder, tmp_path.name, folder / "broken", micro_batch=2)
    message = r"NonFiniteLoss: step \d: the loss of rows \['r5'\]"
    options = {"launcher": launcher, "processes": processes}
    with pytest.raises(launch.JobFailed, match=message) as failure:
        launch.run(MODULE, job, tmp_path, desc="SFT", **options)
    assert "ended with status 1" in str(failure.value)
    assert not list((folder / tmp_path.name).glob("*.safetensors"))


@pytest.fixture
def one_process(monkeypatch):
    """Let this process be the only one of a training."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")


def run_here(main, job, folder):
    file = folder / "job.json"
    file.write_text(json.dumps(job))
    main(str(file))


@pytest.mark.parametrize(
    "changes, error, message",
    [
        (
            {"micro_batch": 3},
            config.ConfigError,
            r"global_batch=4 cannot be split into micro_batch=3.*micro_batch=",
        ),
        (
            {"optimizer": "adam"},
            ValueError,
            "Input should be 'adamw', 'adamw_8bit', 'adagrad' or 'rmsprop'",
        ),
        ({"parts": 30}, config.ConfigError, "6 steps cannot be cut into 30 parts"),
        (
            {"parts": 2, "global_batch": 24, "micro_batch": 4},
            config.ConfigError,
            "1 steps cannot be cut into 2 parts",
        ),
        ({"offload": True}, config.ConfigError, "offload=True needs zero"),
        ({"compile": True, "zero": 3}, config.ConfigError, "compile=True needs zero 0, 1 or 2"),
        (
            {"save_dtype": "floaty"},
            ValueError,
            "Input should be 'float32', 'bfloat16' or 'float16'",
        ),
    ],
)
def test_impossible_settings_fail_at_once(
    folder, tiny, tmp_path, one_process, changes, error, message
):
    job = a_job(folder, "impossible", tiny)
    job["settings"] |= changes
    with pytest.raises(error, match=message):
        run_here(train.main, job, tmp_path)
    assert not (folder / "impossible").exists()


def test_a_training_without_rows_fails_at_once(folder, tiny, tmp_path, one_process):
    job = a_job(folder, "impossible", tiny, rows="empty.jsonl")
    with pytest.raises(ValueError, match=r"no row is left to train on \(2 dropped"):
        run_here(train.main, job, tmp_path)
    assert not (folder / "impossible").exists()


def test_a_training_without_responses_fails_at_once(folder, tiny, tmp_path, one_process):
    rows = tmp_path / "prompts.jsonl"
    write_rows(rows, [{"id": "p", "prompt_ids": [0, 5], "responses": {}}])
    job = a_job(folder, "impossible", tiny, rows=rows)
    with pytest.raises(ValueError, match="no response 'chosen'"):
        run_here(train.main, job, tmp_path)
    assert not (folder / "impossible").exists()


@pytest.fixture
def without_bf16(tmp_path, monkeypatch):
    """Let the processor be one with AVX2 only, where a run in bfloat16 of an hour took days."""
    if torch.cuda.is_available():
        pytest.skip("a GPU computes in bfloat16, whatever the CPU can")
    cpuinfo = tmp_path / "cpuinfo"
    flags = "fpu sse4_2 avx f16c avx2 avx512f avx512_vnni"
    cpuinfo.write_text(f"processor\t: 0\nflags\t\t: {flags}\n")
    monkeypatch.setattr(precision, "CPUINFO", str(cpuinfo))


REFUSAL = 'precision "bf16" needs a GPU, or .* set precision to "fp32"$'


def test_bf16_training_is_refused_on_a_cpu_that_would_emulate_it(
    folder, tiny, tmp_path, one_process, without_bf16
):
    job = a_job(folder, "refused", tiny, precision="bf16")
    with pytest.raises(ValueError, match=REFUSAL):
        run_here(train.main, job, tmp_path)
    assert not (folder / "refused").exists()


def test_a_bf16_reference_is_refused_on_a_cpu_that_would_emulate_it(
    folder, tiny, tmp_path, without_bf16
):
    job = {
        "limits": LIMITS,
        "model": str(tiny),
        "rows": str(folder / "rows.jsonl"),
        "out": str(tmp_path / "out"),
        "names": ["chosen"],
        "precision": "bf16",
        "micro_batch": 4,
    }
    with pytest.raises(ValueError, match=REFUSAL):
        run_here(reference.main, job, tmp_path)
    assert not (tmp_path / "out").exists()


def test_a_bf16_reward_is_refused_on_a_cpu_that_would_emulate_it(tmp_path, without_bf16):
    job = {
        "texts": ["a"] * 40,
        "labels": [0, 1] * 20,
        "held_out": [["a", "b"], [0, 1]],
        "seed": 0,
        "out": str(tmp_path),
        "kind": "classifier",
        "encoder": "unread",
        "precision": "bf16",
    }
    with pytest.raises(ValueError, match=REFUSAL):
        run_here(fit_reward.main, job, tmp_path)


def test_bf16_scores_are_refused_on_a_cpu_that_would_emulate_them(tiny, without_bf16):
    """float32 goes as before."""
    with pytest.raises(ValueError, match="AVX512_BF16 or AMX"):
        score.Scorer(str(tiny), "bf16")
    assert score.Scorer(str(tiny), "fp32").precision == "fp32"


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
    ],
)
def test_what_a_processor_says_of_bfloat16(tmp_path, text, computes):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(text)
    assert precision.computes_bf16(str(cpuinfo)) is computes


def test_a_system_that_says_nothing_of_its_processor(tmp_path):
    assert precision.computes_bf16(str(tmp_path / "missing")) is True


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
@pytest.mark.parametrize(
    "module", ["jobs.train", "jobs.fit_reward", "jobs.reference", "pipeline.assets"]
)
def test_help_says_how_and_starts_nothing(tmp_path, monkeypatch, capsys, module):
    monkeypatch.setattr(paths, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(sys, "argv", [module, "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_module(f"beyond_dpo.{module}", run_name="__main__")
    assert end.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: python -m beyond_dpo.{module}")
    assert not (tmp_path / "cache").exists()


ZEROS = torch.zeros(2, 2)
MISFITS = [
    ("dpo", PAIR, None, "needs a reference"),
    ("ipo", ["rejected", "chosen"], ZEROS, "takes the responses"),
    ("simpo", ["chosen"], None, "takes the responses"),
    ("mallows_theta", PAIR, ZEROS, "'mallows_theta' needs a reference"),
    ("mallows_simpo", PAIR, ZEROS, "'mallows_simpo' needs a reference"),
    (
        "wrpo",
        PAIR,
        None,
        "takes the responses .'source_chosen', 'target_chosen', 'rejected'., in this",
    ),
    ("wrpo", ["target_chosen", "source_chosen", "rejected"], None, "in this order"),
    ("dpo", list(config.FUSED), None, "takes the responses a chosen and the rejected one"),
]


@pytest.mark.parametrize("loss, names, reference_logps, message", MISFITS)
def test_losses_that_do_not_fit_the_rows(loss, names, reference_logps, message):
    scores = {"logps": torch.zeros(12), "tokens": torch.ones(12)}
    settings = config.Train(**{**SETTINGS, "loss": loss})
    with pytest.raises(ValueError, match=message):
        train.row_losses(settings, scores, reference_logps, names)


def test_a_loss_that_is_not_known():
    with pytest.raises(ValueError, match="Input should be 'sft', 'dpo'"):
        config.Train(**{**SETTINGS, "loss": "kto"})


# ---- small parts


def factors(total, warmup):
    return [train.schedule(step, total, warmup) for step in range(total)]


def test_schedule_by_hand():
    """Ten steps, 20 % warm-up: 1/3, 2/3, then 8 steps of (1 + cos(pi k / 8)) / 2."""
    ten = factors(10, 0.2)
    assert ten[:3] == pytest.approx([1 / 3, 2 / 3, 1])
    assert ten[6] == pytest.approx(0.5)
    assert ten[2:] == sorted(ten[2:], reverse=True)


def test_schedule_of_three_steps():
    assert factors(3, 0.1) == pytest.approx([1, 0.75, 0.25])


@pytest.mark.parametrize("total, warmup", [(10, 0.2), (1, 0.1), (1, 1.0)])
def test_every_step_has_a_positive_rate(total, warmup):
    for factor in factors(total, warmup):
        assert 0 < factor <= 1


@pytest.fixture
def ten_batches():
    """Return the ids and responses of ten rows in batches of four: two epochs, five batches."""
    rows = []
    for i in range(10):
        response = [1] * (1 + i % 3)
        rows.append({"id": f"{i}", "prompt_ids": [1], "responses": {"chosen": response}})
    return [train._step_rows(rows, ["chosen"], step, 4, seed=7) for step in range(5)]


def test_every_epoch_visits_each_row_once_and_no_batch_is_short(ten_batches):
    """The third batch takes two rows of the first epoch and two of the second."""
    for batch in ten_batches:
        assert len(batch) == 4
    visited = [{row["id"] for row in batch} for batch in ten_batches]
    first_epoch = [f"{i}" for i in epoch_order(10, 7, 0)]
    second_epoch = [f"{i}" for i in epoch_order(10, 7, 1)]
    assert visited[0] | visited[1] == set(first_epoch[:8])
    assert visited[3] | visited[4] == set(second_epoch[2:])
    third = [row["id"] for row in ten_batches[2]]
    assert sorted(third) == sorted(first_epoch[8:] + second_epoch[:2])


def test_a_batch_is_sorted_by_length(ten_batches):
    for batch in ten_batches:
        lengths = [len(row["responses"]["chosen"]) for row in batch]
        assert lengths == sorted(lengths)


# ---- the thread that lays out micro-batches


def test_the_next_item_is_computed_while_one_is_used():
    """In order, one ahead and no more; what fails there fails here."""
    computed = []

    def numbers():
        for number in range(4):
            computed.append(number)
            yield number
        raise OSError("no more")

    with ThreadPoolExecutor(1) as pool:
        items = train.ahead(numbers(), pool)
        for wanted in range(4):
            assert next(items) == wanted
            pool.submit(int).result()  # the thread has nothing left to do
            assert computed == list(range(min(wanted + 2, 4)))
        with pytest.raises(OSError, match="no more"):
            next(items)


def test_items_end_where_they_end():
    with ThreadPoolExecutor(1) as pool:
        assert list(train.ahead(iter([5, 6]), pool)) == [5, 6]
        assert list(train.ahead(iter([]), pool)) == []


@pytest.mark.slow
def test_compiled_layers_compute_the_same(tiny, rows):
    """Compiled for one shape and used for others; the operations are left as they are here."""
    names = ["chosen", "rejected"]
    plain = scoring.load_scorer(str(tiny))
    compiled = scoring.load_scorer(str(tiny))
    train.compile_layers(compiled, backend="aot_eager")
    for batch in (rows[:4], rows[4:9], rows[9:]):
        results = []
        for scorer in (plain, compiled):
            scorer.zero_grad()
            logps = scorer.score(batch, names, 2)["logps"]
            logps.sum().backward()
            gradients = [parameter.grad for parameter in scorer.parameters()]
            results.append([logps, *gradients])
        for wanted, found in zip(*results, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert set(compiled.state_dict()) == set(plain.state_dict()), "it is saved under the same names"


def test_eight_bit_moments_need_torchao(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    with pytest.raises(config.ConfigError, match="adamw_8bit needs `pip install torchao`"):
        train.OPTIMIZERS["adamw_8bit"]([torch.nn.Parameter(torch.zeros(2))], lr=0.1)


def test_eight_bit_moments_train_almost_as_adamw_does(single, tiny):
    """What they differ by is a small part of what was learnt."""
    pytest.importorskip("torchao")
    names = {"adamw": "moments_32", "adamw_8bit": "moments_8"}
    jobs = []
    for optimizer, name in names.items():
        jobs.append(a_job(single, name, tiny, loss="dpo", optimizer=optimizer))
    run_all(jobs, single / "eight_bit")
    before = load_file(Path(tiny) / "model.safetensors")
    after = [load_file(single / name / "model.safetensors") for name in names.values()]
    learnt = difference = 0.0
    for name, start in before.items():
        exact, rounded = (weights[name].double() for weights in after)
        learnt += float((exact - start.double()).square().sum())
        difference += float((exact - rounded).square().sum())
    assert 0 < difference < 0.05 * learnt


# ---- the program that runs a list of jobs


def run_jobs(path):
    """Run a list of jobs in this process (one of several, if a launcher started it)."""
    rank = os.environ.get("RANK", "0")
    jobs = json.loads(path.read_text())["jobs"]
    for number, job in enumerate(jobs):
        out = Path(job["out"])
        file = path.with_name(f"job{number}-{rank}.json")
        file.write_text(json.dumps(job))
        earlier = out / "model.safetensors"
        if rank == "0" and earlier.exists():
            earlier.rename(out / "first.safetensors")
        if job.get("spoil"):
            spoil(out, job["spoil"])
        if job.get("sharded"):
            shard_everything(config.Train(**job["settings"]))
        try:
            train.main(str(file))
        except (train.NonFiniteLoss, train.UnusableCheckpoint) as failure:
            (out / "error").write_text(str(failure))


def shard_everything(settings):
    """Gather tiny weights too at each use, and let logits exist for 8 tokens at a time.

    This holds for all later jobs of this process.
    """
    changed = train.engine_config(settings, 2)
    changed["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    train.engine_config = lambda settings, accumulation: changed
    scoring.ResponseScorer.__init__.__defaults__ = ("fp32", 8)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    run_jobs(Path(sys.argv[1]))
