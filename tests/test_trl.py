"""The trainers of TRL with our losses: against our own training, TRL's own, and by hand.

Every training here is a real one of TRL, of the tiny model or of SmolLM2.
"""

import copy
import json
import math
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("trl", reason="TRL is not installed: pip install beyond-dpo[trl]")

import peft
from datasets import Dataset
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from beyond_dpo import dispersion, extrapolate, lora, scoring
from beyond_dpo.jobs import train
from beyond_dpo.jobs.settings import Train
from beyond_dpo.machine import paths
from beyond_dpo.pipeline import assets
from beyond_dpo.rows import FUSED
from beyond_dpo.trl import (
    DataCollatorForResponses,
    ExPOCallback,
    MallowsDPOTrainer,
    SharedPrompts,
    WRPOTrainer,
)

PAIR = ("chosen", "rejected")
WEIGHTS = [0.4, 1.0, 2.5, 0.7, 1.6, 0.2, 1.1, 0.9]
BATCH = 4  # rows of an optimizer step; eight rows are two steps an epoch
LR = 0.03
# Relative error of a float32 log-probability: each token's is a few products over 64 (hidden) and
# 128 (MLP) numbers, whose errors of 2⁻²⁴ add up as √128.
ROUNDED = math.sqrt(128) * 2**-24
# Plain gradient descent in float32, over rows in their order.
PLAIN = {
    "per_device_train_batch_size": BATCH,
    "num_train_epochs": 2,
    "learning_rate": LR,
    "beta": 0.5,
    "optim": "sgd",
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0,
    "train_sampling_strategy": "sequential",
    "max_length": 40,
    "bf16": False,
    "use_cpu": True,
    "report_to": [],
    "save_strategy": "no",
    "logging_steps": 1,
    "disable_tqdm": True,
}
TEXTS = [
    "a good film with a slow start",
    "bad acting",
    "I liked it so much that I saw it twice",
    "one",
    "it is what it is, and no more than that",
    "too long",
    "she plays well",
    "never again in my life",
]


def texts(number: int) -> dict[str, str]:
    """Return the texts of a row, all different in length."""
    return {
        "prompt": "The film was " + "very " * (number % 3),
        "source_chosen": TEXTS[(number + 5) % 8],
        "target_chosen": TEXTS[number],
        "chosen": TEXTS[number],
        "rejected": TEXTS[(number + 1) % 8] + " no" * number,
    }


def as_turns(row: dict) -> dict[str, list[dict]]:
    """Return a row as a conversation."""
    turns = {}
    for name, text in row.items():
        role = "user" if name == "prompt" else "assistant"
        turns[name] = [{"role": role, "content": text}]
    return turns


def data_set(kind: str = "plain", names=("prompt", *PAIR), **columns) -> Dataset:
    """Return eight rows with the named texts, and other columns."""
    rows = []
    for number in range(8):
        row = texts(number) if kind == "plain" else as_turns(texts(number))
        row = {name: row[name] for name in names}
        for column, values in columns.items():
            row[column] = values[number]
        rows.append(row)
    return Dataset.from_list(rows)


def triples(kind: str = "plain") -> Dataset:
    return data_set(kind, ("prompt", *FUSED))


@pytest.fixture
def settings(tmp_path):
    """Return a maker of TRL's settings, PLAIN but for what it is given."""

    def make(**changes) -> DPOConfig:
        return DPOConfig(**(PLAIN | {"output_dir": str(tmp_path / "out")} | changes))

    return make


@pytest.fixture
def model(tiny):
    return load(tiny)


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture(scope="session")
def tokenizer(tiny):
    return AutoTokenizer.from_pretrained(tiny)


class Gradients(TrainerCallback):
    """Keep the gradient of each optimizer step, as one vector."""

    def __init__(self):
        self.of_steps = []

    def on_pre_optimizer_step(self, args, state, control, *, model, **_):
        self.of_steps.append(gradient_of(model))


def gradient_of(model) -> torch.Tensor:
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    return torch.cat([weight.grad.flatten() for weight in trained])


def trained_weights(model) -> torch.Tensor:
    trained = [weight.detach() for weight in model.parameters() if weight.requires_grad]
    return torch.cat([weight.flatten() for weight in trained])


def column(trainer, name: str) -> list[float]:
    """Return a column of the log, a value for each step."""
    return [line[name] for line in trainer.state.log_history if "loss" in line]


def difference(vector: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the length of their difference, as a share of the expected one's."""
    return float((vector - expected).norm() / expected.norm())


# ---- our own training


def rows_of(trainer, names) -> list[dict]:
    """Return the rows that a trainer learns from as our own training reads them, cut alike."""
    rows = []
    for number, row in enumerate(trainer.train_dataset):
        room = trainer.args.max_length - len(row["prompt_ids"])
        responses = {name: row[f"{name}_ids"][:room] for name in names}
        rows.append({"id": str(number), "prompt_ids": row["prompt_ids"], "responses": responses})
    return rows


def our_training(model, rows, names, weights, **changes):
    """Train with our own losses and scoring; return losses, gradients, and the log-probabilities.

    These are (steps, responses, rows).
    """
    ours = Train(lr=LR, global_batch=BATCH, micro_batch=BATCH, **changes)
    scorer = scoring.ResponseScorer(model)
    names = list(names)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    batches = [rows[start : start + BATCH] for start in (0, BATCH)]
    with torch.no_grad():
        references = [scorer.score(batch, names, 2)["logps"] for batch in batches]
    losses = []
    gradients = []
    logps = []
    for step in range(4):
        number = step % 2
        scores = scorer.score(batches[number], names, 2)
        reference = references[number].view(len(names), -1)
        batch_weights = weights[number * BATCH : (number + 1) * BATCH]
        alpha = train.fusion(ours, step, 4)
        result = train.row_losses(ours, scores, reference, names, batch_weights, alpha)
        loss = result.losses.mean()
        optimizer.zero_grad()
        loss.backward()
        losses.append(loss.item())
        gradients.append(gradient_of(model))
        logps.append(scores["logps"].detach().view(len(names), -1))
        optimizer.step()
    return losses, gradients, torch.stack(logps)


OURS = {
    "theta": {"loss": "mallows_theta", "beta": 0.5},
    "phi": {"loss": "mallows_phi", "beta": 0.5, "epsilon": 0.2},
    "wrpo": {"loss": "wrpo", "beta": 0.5, "alpha": 0.6},
    "wrpo_static": {"loss": "wrpo", "beta": 0.5, "alpha": 0.6, "dynamic": False},
}


def trl_trainer(name, kind, model, tokenizer, arguments, **keywords):
    """Return the trainer that has a loss of OURS."""
    if name.startswith("wrpo"):
        return WRPOTrainer(
            model,
            args=arguments,
            train_dataset=triples(kind),
            processing_class=tokenizer,
            alpha=0.6,
            dynamic=name == "wrpo",
            **keywords,
        )
    return MallowsDPOTrainer(
        model,
        args=arguments,
        train_dataset=data_set(kind, agreement=WEIGHTS),
        processing_class=tokenizer,
        variant=name,
        epsilon=0.2,
        weight_column="agreement",
        **keywords,
    )


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("kind", ["plain", "chat"])
@pytest.mark.parametrize("way", ["precomputed", "accumulated"])
def test_a_training_is_our_own_step_by_step(name, kind, way, model, tokenizer, settings):
    """Losses, gradients and weights agree up to rounding; with a beta 1 % off they would not.

    A loss is a function of slope 1 at most of β·w·margin, so its error is that of a margin.
    """
    own = copy.deepcopy(model)
    initial = trained_weights(model).clone()
    if way == "precomputed":
        arguments = settings(precompute_ref_log_probs=True)
    else:
        arguments = settings(per_device_train_batch_size=2, gradient_accumulation_steps=2)
    gradients = Gradients()
    trainer = trl_trainer(name, kind, model, tokenizer, arguments, callbacks=[gradients])
    trainer.train()
    names = FUSED if name.startswith("wrpo") else PAIR
    rows = rows_of(trainer, names)
    other = copy.deepcopy(own)
    losses, expected_gradients, logps = our_training(
        own, rows, names, torch.tensor(WEIGHTS), **OURS[name]
    )
    assert len(losses) == len(column(trainer, "loss")) == 4
    tolerance = 0.5 * max(WEIGHTS) * ROUNDED * float(logps.abs().sum(1).max())
    assert tolerance < 5e-4
    assert column(trainer, "loss") == pytest.approx(losses, abs=tolerance)
    assert losses[0] == pytest.approx(math.log(2), abs=tolerance)
    assert min(losses) < 0.6
    for gradient, expected in zip(gradients.of_steps, expected_gradients, strict=True):
        assert difference(gradient, expected) < tolerance
    movement = trained_weights(model) - initial
    assert difference(movement, trained_weights(own) - initial) < tolerance
    wrong = OURS[name] | {"beta": 0.505}
    our_training(other, rows, names, torch.tensor(WEIGHTS), **wrong)
    assert difference(movement, trained_weights(other) - initial) > tolerance


def test_alpha_rises_with_the_steps(model, tokenizer, settings):
    trainer = trl_trainer("wrpo", "plain", model, tokenizer, settings())
    assert trainer.current_alpha == 0.0  # before a training
    trainer.train()
    assert column(trainer, "alpha") == pytest.approx([0.0, 0.15, 0.3, 0.45])
    assert trainer.current_alpha == 0.6  # of the evaluation at its end


def test_a_new_adapter_learns_as_our_own_training(tiny, tokenizer, settings):
    """The reference is the model without its adapter."""
    adapter = peft.LoraConfig(r=2, lora_alpha=8, target_modules="all-linear")
    gradients = Gradients()
    trainer = trl_trainer(
        "theta",
        "chat",
        load(tiny),
        tokenizer,
        settings(learning_rate=0.0),
        peft_config=adapter,
        callbacks=[gradients],
    )
    for name, weight in trainer.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    own = copy.deepcopy(trainer.model)
    trainer.train()
    scorer = scoring.ResponseScorer(own)
    rows = rows_of(trainer, PAIR)[:BATCH]
    scores = scorer.score(rows, list(PAIR), 2)
    with torch.no_grad(), own.disable_adapter():
        reference = scorer.score(rows, list(PAIR), 2)["logps"].view(2, -1)
    ours = Train(lr=LR, global_batch=BATCH, micro_batch=BATCH, **OURS["theta"])
    weights = torch.tensor(WEIGHTS[:BATCH])
    loss = train.row_losses(ours, scores, reference, list(PAIR), weights).losses.mean()
    loss.backward()
    logps = scores["logps"].detach().view(2, -1)
    tolerance = 0.5 * max(WEIGHTS) * ROUNDED * float(logps.abs().sum(0).max())
    assert column(trainer, "loss")[0] == pytest.approx(loss.item(), abs=tolerance)
    assert abs(loss.item() - math.log(2)) > 100 * tolerance
    assert difference(gradients.of_steps[0], gradient_of(own)) < tolerance


# ---- TRL's own trainer


def dpo_log(model, tokenizer, arguments, rows, cls=DPOTrainer, **keywords):
    """Train and return the log: {name: values of the steps}."""
    trainer = cls(model, args=arguments, train_dataset=rows, processing_class=tokenizer, **keywords)
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    return {name: [line[name] for line in lines] for name in lines[0]}


def assert_same_log(log, expected, renamed=None):
    """Check that two logs have the same values up to rounding, under all names of the second.

    At the first step all rewards are 0 up to rounding, which decides which of two is larger.
    """
    for name, values in expected.items():
        mine = (renamed or {}).get(name, name)
        first = 1 if name == "rewards/accuracies" else 0
        assert log[mine][first:] == pytest.approx(values[first:], rel=1e-4, abs=1e-5), name


def test_weight_1_is_trls_dpo_with_all_that_it_logs(tiny, tokenizer, settings):
    expected = dpo_log(load(tiny), tokenizer, settings(), data_set())
    rows = data_set(agreement=[1.0] * 8)
    log = dpo_log(
        load(tiny), tokenizer, settings(), rows, MallowsDPOTrainer, weight_column="agreement"
    )
    assert_same_log(log, expected)
    assert set(log) == {*expected, "weight"}
    assert log["weight"] == [1.0] * 4


@pytest.mark.parametrize("alpha, chosen", [(0.0, "target_chosen"), (1.0, "source_chosen")])
def test_wrpo_at_the_ends_is_trls_dpo(tiny, tokenizer, settings, alpha, chosen):
    """Rewards and gradients; means over tokens have a third response in them."""
    pairs = data_set("chat", ("prompt", chosen, "rejected")).rename_column(chosen, "chosen")
    expected = dpo_log(load(tiny), tokenizer, settings(), pairs)
    names = ("loss", "grad_norm", "rewards/chosen", "rewards/margins", "logps/chosen")
    log = dpo_log(
        load(tiny),
        tokenizer,
        settings(),
        triples("chat"),
        WRPOTrainer,
        alpha=alpha,
        dynamic=False,
    )
    renamed = {"logps/chosen": f"logps/{chosen}"}
    assert_same_log(log, {name: expected[name] for name in names}, renamed)


def test_the_collator_is_trls_for_pairs():
    rows = [
        {"prompt_ids": [1, 2, 3], "chosen_ids": [4, 5], "rejected_ids": [6]},
        {"prompt_ids": [7, 8], "chosen_ids": [9], "rejected_ids": [10, 11, 12, 13]},
    ]
    for row in rows:
        row |= {"ref_chosen_logps": -1.5, "ref_rejected_logps": -2.5}
    options = {"pad_token_id": 0, "max_length": 5, "pad_to_multiple_of": 4}
    for mode in ("keep_start", "keep_end"):
        expected = DataCollatorForPreference(truncation_mode=mode, **options)(rows)
        batch = DataCollatorForResponses(PAIR, truncation_mode=mode, **options)(rows)
        assert set(batch) == set(expected)
        for name, values in expected.items():
            assert torch.equal(batch[name], values), name


# ---- by hand


def test_losses_by_hand(model, tokenizer, settings):
    """Of theta at β = 1/2 and weight 2 it is −log σ(1)."""
    ratios = torch.tensor([[1.0], [0.0]])
    trainer = trl_trainer("theta", "plain", model, tokenizer, settings())
    inputs = {"agreement": torch.tensor([2.0])}
    loss, chosen, rejected = trainer.row_losses(ratios, inputs)
    assert loss.item() == pytest.approx(0.3132617)
    assert (chosen.item(), rejected.item()) == (0.5, 0.0)
    trainer.variant = "phi"
    trainer.beta = 1.0
    # g(1) = 1 / (1 + φ), and the weight of φ = 1/4 is ln 4
    inputs = {"agreement": torch.tensor([math.log(4)])}
    loss, _, _ = trainer.row_losses(ratios, inputs)
    assert loss.item() == pytest.approx(math.log(1.25), rel=1e-6)


def test_wrpo_by_hand(model, tokenizer, settings):
    """The blend of 1/2 · 3 and 1/2 · 1 at α 1/2 is 1, so the margin over 0 is 1."""
    trainer = trl_trainer("wrpo_static", "plain", model, tokenizer, settings())
    trainer.alpha = 0.5
    ratios = torch.tensor([[3.0], [1.0], [0.0]])
    loss, chosen, _ = trainer.row_losses(ratios, {})
    assert loss.item() == pytest.approx(0.3132617)
    assert chosen.item() == 1.0


def test_wrpo_shares_one_prompt_among_its_responses(model, tokenizer, settings):
    """Where tokens of the prompt's end and a response merge, TRL's prompt is shorter.

    The text of each response is whole with the prompt before it, whichever is the shorter one.
    """
    rows = Dataset.from_list(
        [
            {
                "prompt": "I like th",
                "source_chosen": "e film",
                "target_chosen": "! no",
                "rejected": " x",
            }
        ]
    )
    trainer = WRPOTrainer(model, args=settings(), train_dataset=rows, processing_class=tokenizer)
    (row,) = trainer.train_dataset
    alone = tokenizer("I like th")["input_ids"]
    merged = tokenizer("I like the film")["input_ids"]
    assert merged[: len(alone)] != alone  # or this would test nothing
    assert row["prompt_ids"] == alone[: len(row["prompt_ids"])] != alone
    for name, text in (("source_chosen", "e film"), ("target_chosen", "! no"), ("rejected", " x")):
        whole = tokenizer("I like th" + text + "</s>")["input_ids"]
        assert row["prompt_ids"] + row[f"{name}_ids"] == whole
    assert not [column for column in row if ":" in column]


# ---- the weights


def expected_weights(folder, trainer):
    """Return our own estimate of the weights of a trainer's rows, its scale, and its error.

    A token's entropy has the error of log-probabilities, of which it is a mean. A weight is −φ* ln
    of the mean entropy of a row.
    """
    scorer = scoring.ResponseScorer(load(folder))
    rows = rows_of(trainer, PAIR)
    scores = scoring.score_rows(scorer, rows, list(PAIR), pad_id=2)
    weights, phi_star = dispersion.weights(*scores["entropies"].T, range(len(rows)))
    ids = [rows[0]["prompt_ids"] + rows[0]["responses"]["chosen"]]
    with torch.no_grad():
        logps = scorer.model(torch.tensor(ids)).logits.log_softmax(-1)
    error = ROUNDED * float(logps.abs().max()) / math.log(512) / scores["entropies"].min()
    return weights, phi_star, phi_star * float(error)


@pytest.fixture(scope="session")
def sharp(tiny, tmp_path_factory):
    """Return a tiny model that is surer of some tokens, so that weights differ."""
    model = load(tiny)
    with torch.no_grad():
        model.get_output_embeddings().weight *= 8
    folder = tmp_path_factory.mktemp("sharp")
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("way", ["initial", "precomputed", "other", "adapter"])
def test_weights_are_estimated_by_the_reference(way, tiny, sharp, tokenizer, settings):
    """Whichever model that is: the initial one, a copy, another one, or one without its adapter."""
    keywords = {}
    reference = sharp
    if way == "other":
        keywords["ref_model"] = load(tiny)
        reference = tiny
    if way == "adapter":
        keywords["peft_config"] = peft.LoraConfig(
            r=2, target_modules=["q_proj"], init_lora_weights=False
        )
    trainer = MallowsDPOTrainer(
        load(sharp),
        args=settings(precompute_ref_log_probs=way == "precomputed"),
        train_dataset=data_set("chat"),
        eval_dataset={"few": data_set("chat").select([1, 2])},
        processing_class=tokenizer,
        **keywords,
    )
    weights, phi_star, error = expected_weights(reference, trainer)
    estimated = trainer.train_dataset["mallows_weight"]
    assert np.abs(estimated - weights).max() < error
    assert np.mean(estimated) == pytest.approx(1.0)
    assert trainer.phi_star == pytest.approx(phi_star, rel=error)
    assert np.std(estimated) > 20 * error
    # the same scale, not a mean of 1
    few = trainer.eval_dataset["few"]["mallows_weight"]
    assert list(few) == pytest.approx(list(estimated)[1:3])
    trainer.train()
    means = [np.mean(estimated[:BATCH]), np.mean(estimated[BATCH:])]
    assert column(trainer, "weight") == pytest.approx(means * 2)
    trainer.evaluate()
    assert trainer.state.log_history[-1]["eval_weight"] == pytest.approx(np.mean(few))


def mallows(model, tokenizer, arguments, rows, **keywords):
    return MallowsDPOTrainer(
        model, args=arguments, train_dataset=rows, processing_class=tokenizer, **keywords
    )


BAD_WEIGHTS = {
    "nan": ([1.0] * 7 + [math.nan], "must be > 0 and finite, got nan in row 7"),
    "infinite": ([math.inf] + [1.0] * 7, "got inf in row 0"),
    "zero": ([1.0, 0.0] + [1.0] * 6, "got 0.0 in row 1"),
    "none": ([1.0, None] + [1.0] * 6, "got nan in row 1"),
    "lists": ([[1.0, 2.0]] * 8, r"one number a row, got shape \(8, 2\)"),
}


@pytest.mark.parametrize("fault", BAD_WEIGHTS)
def test_bad_weights_are_refused(fault, model, tokenizer, settings):
    weights, message = BAD_WEIGHTS[fault]
    rows = data_set(agreement=weights)
    with pytest.raises(ValueError, match=message):
        mallows(model, tokenizer, settings(), rows, weight_column="agreement")


def test_what_mallows_lacks_is_named(model, tokenizer, settings):
    with pytest.raises(ValueError, match=r"no column \['agreement'\], only \['chosen', .*'prompt'"):
        mallows(model, tokenizer, settings(), data_set(), weight_column="agreement")
    streamed = data_set().to_iterable_dataset()
    with pytest.raises(ValueError, match="cannot be estimated for a streamed data set"):
        mallows(model, tokenizer, settings(max_steps=1), streamed)
    with pytest.raises(ValueError, match="variant must be 'theta' or 'phi', got 'psi'"):
        mallows(model, tokenizer, settings(), data_set(), variant="psi")
    trainer = mallows(model, tokenizer, settings(), data_set())
    with pytest.raises(ValueError, match="a batch has no 'mallows_weight'"):
        trainer.evaluate(data_set().select([0]))


def test_a_streamed_data_set_has_its_weights_in_a_column(model, tokenizer, settings):
    streamed = data_set(agreement=WEIGHTS).to_iterable_dataset()
    trainer = mallows(model, tokenizer, settings(max_steps=2), streamed, weight_column="agreement")
    trainer.train()
    assert column(trainer, "weight") == pytest.approx([1.15, 0.95])


def test_what_wrpo_cannot_use_is_refused(model, tokenizer, settings):
    keywords = {"args": settings(), "processing_class": tokenizer}
    for alpha in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"alpha must be in \[0, 1\]"):
            WRPOTrainer(model, train_dataset=triples(), alpha=alpha, **keywords)
    message = r"no column \['source_chosen', 'target_chosen'\]"
    with pytest.raises(ValueError, match=message):
        WRPOTrainer(model, train_dataset=data_set(), **keywords)


@pytest.mark.parametrize(
    "setting",
    [
        {"loss_type": "ipo"},
        {"label_smoothing": 0.1},
        {"ld_alpha": 0.5},
        {"use_weighting": True},
        {"f_divergence_type": "forward_kl"},
    ],
)
def test_settings_of_trls_losses_are_refused(setting, model, tokenizer, settings):
    (name,) = setting
    with pytest.raises(ValueError, match=f"MallowsDPOTrainer has a loss .* no {name}="):
        mallows(model, tokenizer, settings(**setting), data_set())


# ---- what TRL's users do with a trainer


@pytest.mark.parametrize("name", ["theta", "wrpo"])
def test_a_resumed_training_ends_with_the_same_weights(name, tiny, tokenizer, settings):
    """Adam's moments and α's steps go on from the checkpoint."""
    arguments = settings(optim="adamw_torch", save_strategy="steps", save_steps=2)
    whole = trl_trainer(name, "plain", load(tiny), tokenizer, arguments)
    whole.train()
    resumed = trl_trainer(name, "plain", load(tiny), tokenizer, arguments)
    resumed.train(resume_from_checkpoint=f"{arguments.output_dir}/checkpoint-2")
    assert resumed.state.global_step == 4
    assert torch.equal(trained_weights(resumed.model), trained_weights(whole.model))
    assert column(resumed, "loss") == column(whole, "loss")
    card = (paths.Path(arguments.output_dir) / "checkpoint-4" / "README.md").exists()
    assert card or (paths.Path(arguments.output_dir) / "README.md").exists()


def test_model_and_tokenizer_are_found_by_the_folder(tiny, settings):
    """As TRL does, without a processing_class, and a tokenizer without a pad token."""
    trainer = WRPOTrainer(str(tiny), args=settings(), train_dataset=triples())
    trainer.train()
    assert trainer.processing_class.pad_token == "<pad>"
    assert len(column(trainer, "loss")) == 4


def test_evaluation_and_predictions(model, tokenizer, settings):
    """Losses of a set at the end of training, and logits, as TRL's trainer gives them."""
    trainer = WRPOTrainer(
        model,
        args=settings(precompute_ref_log_probs=True),
        train_dataset=triples("chat"),
        eval_dataset=triples("chat").select([0, 1, 2]),
        processing_class=tokenizer,
        alpha=0.3,
    )
    before = trainer.evaluate()
    assert before["eval_loss"] == pytest.approx(math.log(2))
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss"] < 0.65
    assert after["eval_alpha"] == pytest.approx(0.3)
    prepared = trainer.eval_dataset
    assert np.array(prepared["ref_chosen_logps"]).shape == (3, 2)
    output = trainer.predict(prepared)
    assert output.metrics["test_loss"] == pytest.approx(after["eval_loss"])
    assert output.predictions.shape[-1] == 512


# ---- shared prompts


class SharedDPO(SharedPrompts, DPOTrainer):
    pass


class SharedMallows(SharedPrompts, MallowsDPOTrainer):
    pass


class SharedWRPO(SharedPrompts, WRPOTrainer):
    pass


SHARED = {
    "dpo": (DPOTrainer, SharedDPO),
    "mallows": (MallowsDPOTrainer, SharedMallows),
    "wrpo": (WRPOTrainer, SharedWRPO),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SHARED)
@pytest.mark.parametrize("way", ["initial", "precomputed", "adapter", "checkpointed", "eager"])
def test_shared_prompts_change_nothing_but_the_work(name, way, tiny, tokenizer, settings):
    rows = triples("chat") if name == "wrpo" else data_set("chat")
    keywords = {}
    if way == "adapter":
        keywords["peft_config"] = peft.LoraConfig(r=2, target_modules="all-linear")
    arguments = settings(
        precompute_ref_log_probs=way == "precomputed",
        gradient_checkpointing=way == "checkpointed",
        beta=0.1,
    )
    logs = []
    for cls in SHARED[name]:
        model = load(tiny)
        if way == "eager":
            model.set_attn_implementation("eager")
        logs.append(dpo_log(model, tokenizer, arguments, rows, cls, **keywords))
    expected, log = logs
    assert set(log) == set(expected)
    assert_same_log(log, expected)


def test_shared_prompts_are_computed_once(model, tokenizer, settings, monkeypatch):
    """Four prompts of twenty tokens and their responses: the decoder sees each prompt once."""
    rows = data_set().map(lambda row: {"prompt": "a very long story of it " * 4})
    seen = []
    forward = type(model.model).forward

    def counted(self, *arguments, input_ids, **keywords):
        seen.append(tuple(input_ids.shape))
        return forward(self, *arguments, input_ids=input_ids, **keywords)

    monkeypatch.setattr(type(model.model), "forward", counted)
    arguments = settings(max_length=200, max_steps=1, precompute_ref_log_probs=True)
    trainer = SharedDPO(model, args=arguments, train_dataset=rows, processing_class=tokenizer)
    seen.clear()
    trainer.train()
    batch = [row for row in trainer.train_dataset][:BATCH]
    widths = []
    for row in batch:
        prompt = len(row["prompt_ids"])
        assert prompt > 20
        widths.append(prompt + 1 + len(row["chosen_ids"]) + len(row["rejected_ids"]))
    # the prompt but its last token once, and that token before each response
    assert set(seen) == {(BATCH, max(widths))}


def test_what_shares_no_prompts_is_refused(tiny, model, tokenizer, settings):
    keywords = {"train_dataset": data_set(), "processing_class": tokenizer}
    with pytest.warns(FutureWarning, match="keep_end"):
        arguments = settings(truncation_mode="keep_end")
    with pytest.raises(ValueError, match="cannot be shared with truncation_mode 'keep_end'"):
        SharedDPO(model, args=arguments, **keywords)
    model.set_attn_implementation("flex_attention")
    with pytest.raises(ValueError, match="cannot be shared in flex_attention: use sdpa or eager"):
        SharedDPO(model, args=settings(), **keywords)
    model.set_attn_implementation("sdpa")
    soft = peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="cannot be shared with soft prompts"):
        SharedDPO(load(tiny), args=settings(), peft_config=soft, **keywords)
    trainer = SharedDPO(model, args=settings(), **keywords)
    model.config.sliding_window = 8
    with pytest.raises(ValueError, match="longer than the model's attention window of 8 tokens"):
        trainer.train()


# ---- ExPO at the end


def count_of_e(prompts, responses):
    """Reward the letter e, whatever the prompt."""
    assert len(prompts) == len(responses)
    return [response.count("e") for response in responses]


def expo(reward=count_of_e, prompts=("The film was", "A story"), **changes):
    options = {
        "bracket": (0.0, 8.0),
        "evaluations": 5,
        "samples": 3,
        "sampling": {"max_new_tokens": 6},
    }
    return ExPOCallback(prompts, reward, **(options | changes))


def dpo(model, tokenizer, arguments, callback, **keywords):
    """Return a DPO trainer with the callback."""
    return DPOTrainer(
        model,
        args=arguments,
        train_dataset=data_set(),
        processing_class=tokenizer,
        callbacks=[callback],
        **keywords,
    )


@pytest.mark.parametrize("way", ["copy", "folder", "model"])
def test_expo_saves_the_extrapolated_model_beside_the_trained_one(
    way, tiny, model, tokenizer, settings
):
    """Its bits are those of extrapolate(); the trained model is as without the callback."""
    sft = {"copy": None, "folder": tiny, "model": load(tiny)}[way]
    callback = expo(sft=sft)
    arguments = settings()
    trainer = dpo(model, tokenizer, arguments, callback)
    trainer.train()
    without = DPOTrainer(
        load(tiny), args=arguments, train_dataset=data_set(), processing_class=tokenizer
    )
    without.train()
    assert torch.equal(trained_weights(model), trained_weights(without.model))
    folder = paths.Path(arguments.output_dir)
    trainer.save_model(folder / "trained")
    alpha = callback.search.alpha
    facts = json.loads((folder / "expo" / "expo.json").read_text())
    assert facts["alpha"] == alpha
    assert [float(key) for key in facts["mean_rewards"]] == list(callback.search.rewards)
    assert len(facts["mean_rewards"]) == 5
    assert max(facts["mean_rewards"].values()) == facts["mean_rewards"][str(alpha)]
    saved = load_file(folder / "expo" / "model.safetensors")
    expected = dict(extrapolate.tensors(tiny, folder / "trained", alpha))
    assert set(saved) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(saved[name], tensor), name
    assert AutoTokenizer.from_pretrained(folder / "expo").eos_token == "</s>"
    assert not hasattr(callback, "_line")  # the copies are gone


def test_expo_moves_the_model_to_the_alpha_it_names(model, tokenizer, settings):
    """A reward that knows the weights: θ₁ + α(θ₁ − θ₀) of one of them rises in a straight line."""
    weight = model.model.norm.weight
    initial = weight[0].item()
    seen = []

    def reward(prompts, responses):
        seen.append(weight[0].item())
        return [len(response) for response in responses]

    callback = expo(reward)
    dpo(model, tokenizer, settings(), callback).train()
    step = weight[0].item() - initial
    assert abs(step) > 1e-4
    for alpha, value in zip(callback.search.rewards, seen, strict=True):
        assert value == pytest.approx(initial + (1 + alpha) * step, abs=(2 + alpha) * 2**-23)


def test_expo_samples_the_same_way_at_every_alpha(model, tokenizer, settings):
    """With weights that barely move, the noise being the same, so are the responses."""
    batches = []

    def reward(prompts, responses):
        batches.append((prompts, responses))
        return [len(response) for response in responses]

    callback = expo(reward, prompts=["The film was", "A story"], batch_size=1)
    dpo(model, tokenizer, settings(learning_rate=1e-7), callback).train()
    assert len(batches) == 5
    prompts, responses = batches[0]
    assert prompts == ["The film was"] * 3 + ["A story"] * 3
    assert len(set(responses)) > 3
    assert all(batch == batches[0] for batch in batches)


def test_expo_of_a_chat_model_reads_turns(model, tokenizer, settings):
    turns = [{"role": "user", "content": "How was the film?"}]
    callback = expo(prompts=[turns])
    seen = []
    generate = model.generate

    def noted(input_ids, **options):
        seen.append(tokenizer.batch_decode(input_ids))
        return generate(input_ids=input_ids, **options)

    model.generate = noted
    dpo(model, tokenizer, settings(), callback).train()
    assert seen == [["<s><|user|> How was the film?</s><|assistant|>"]] * 5


def test_expo_leaves_the_noise_of_what_follows_alone(tiny, tokenizer, settings):
    states = []
    for callback in (expo(), TrainerCallback()):
        dpo(load(tiny), tokenizer, settings(), callback).train()
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_expo_scales_an_adapter(tiny, tokenizer, settings):
    """The saved adapter is the trained one at 1 + α times its scale."""
    adapter = peft.LoraConfig(r=2, lora_alpha=6, target_modules="all-linear")
    callback = expo()
    arguments = settings(learning_rate=1.0)
    trainer = dpo(load(tiny), tokenizer, arguments, callback, peft_config=adapter)
    trainer.train()
    folder = paths.Path(arguments.output_dir)
    trainer.save_model(folder / "trained")
    alpha = callback.search.alpha
    trained = lora.read_settings(folder / "trained")
    scaled = lora.read_settings(folder / "expo")
    assert trained["lora_alpha"] == 6
    assert scaled["lora_alpha"] == pytest.approx(6 * (1 + alpha))
    saved = load_file(folder / "expo" / lora.WEIGHTS)
    for name, tensor in load_file(folder / "trained" / lora.WEIGHTS).items():
        assert torch.equal(saved[name], tensor)
    assert not (folder / "expo" / "trained").exists()
    assert json.loads((folder / "expo" / "expo.json").read_text())["alpha"] == alpha
    for layer in trainer.model.modules():
        if isinstance(layer, LoraLayer):
            assert layer.scaling["default"] == 3.0
    # the same logits as the extrapolated whole model
    ids = torch.tensor([[5, 6, 7, 8]])
    tuned = peft.PeftModel.from_pretrained(load(tiny), folder / "expo")
    whole = load(tiny)
    whole.load_state_dict(dict(lora.tensors(tiny, folder / "trained", alpha)), strict=False)
    assert torch.allclose(tuned(ids).logits, whole(ids).logits, atol=1e-5)
    assert not torch.allclose(load(tiny)(ids).logits, whole(ids).logits, atol=1e-3)


def test_expo_refuses_an_adapter_that_is_no_new_plain_lora(tiny, tokenizer, settings):
    arguments = settings()
    dora = peft.LoraConfig(r=2, target_modules=["q_proj"], use_dora=True)
    with pytest.raises(ValueError, match=r"the adapter is more than s·BA \(use_dora\)"):
        dpo(load(tiny), tokenizer, arguments, expo(), peft_config=dora).train()
    plain = peft.LoraConfig(r=2, target_modules=["q_proj"])
    old = peft.get_peft_model(load(tiny), plain)
    with pytest.raises(ValueError, match=r"one new adapter, got \['default', 'ref'\]"):
        dpo(old, tokenizer, arguments, expo()).train()


def test_expo_of_a_resumed_training_needs_the_sft_model(tiny, tokenizer, settings):
    """A copy at the beginning would be of the checkpoint. With the folder all is as in one go."""
    arguments = settings(save_strategy="steps", save_steps=2)
    whole = expo(out=f"{arguments.output_dir}/whole")
    trainer = dpo(load(tiny), tokenizer, arguments, whole)
    trainer.train()
    checkpoint = f"{arguments.output_dir}/checkpoint-2"
    with pytest.raises(ValueError, match="goes on from a checkpoint"):
        dpo(load(tiny), tokenizer, arguments, expo()).train(resume_from_checkpoint=checkpoint)
    resumed = expo(sft=str(tiny))
    dpo(load(tiny), tokenizer, arguments, resumed).train(resume_from_checkpoint=checkpoint)
    assert resumed.search.alpha == whole.search.alpha
    saved = [
        load_file(paths.Path(arguments.output_dir) / name / "model.safetensors")
        for name in ("whole", "expo")
    ]
    assert all(torch.equal(saved[0][name], saved[1][name]) for name in saved[0])


BAD_REWARDS = {
    "raises": (lambda prompts, responses: 1 / 0, ZeroDivisionError, "division"),
    "nan": (
        lambda prompts, responses: [math.nan] * len(responses),
        ValueError,
        "reward of prompt 0 at α=0.0 is not finite",
    ),
    "few": (
        lambda prompts, responses: [1.0],
        ValueError,
        r"returned shape \(1,\) for 6 responses",
    ),
}


@pytest.mark.parametrize("fault", BAD_REWARDS)
def test_a_reward_that_fails_leaves_the_trained_weights(fault, tiny, model, tokenizer, settings):
    reward, error, message = BAD_REWARDS[fault]
    calls = []

    def second_time(prompts, responses):
        """Fail where the weights are moved, if it is the call that raises."""
        calls.append(len(responses))
        if fault == "raises" and len(calls) == 1:
            return [0.0] * len(responses)
        return reward(prompts, responses)

    arguments = settings()
    trainer = dpo(model, tokenizer, arguments, expo(second_time))
    with pytest.raises(error, match=message):
        trainer.train()
    without = DPOTrainer(
        load(tiny), args=arguments, train_dataset=data_set(), processing_class=tokenizer
    )
    without.train()
    assert torch.equal(trained_weights(model), trained_weights(without.model))
    assert model.training
    assert not (paths.Path(arguments.output_dir) / "expo").exists()


def test_expo_refuses_early_what_would_fail_late(tiny, model, tokenizer, settings, tmp_path):
    with pytest.raises(ValueError, match="prompts is empty"):
        expo(prompts=[])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(FileExistsError, match="full holds something: move or delete it"):
        dpo(model, tokenizer, settings(), expo(out=tmp_path / "full")).train()
    with pytest.raises(ValueError, match="need 0 <= low < high"):
        expo(bracket=(1.0, 0.5))


def test_expo_after_supervised_training(tiny, model, tokenizer, settings, tmp_path):
    """With TRL's SFTTrainer; a plain Trainer without a tokenizer is refused."""
    arguments = {"report_to": [], "use_cpu": True, "save_strategy": "no", "num_train_epochs": 1}
    rows = data_set().map(lambda row: {"completion": row["chosen"]}, remove_columns=list(PAIR))
    callback = expo()
    SFTTrainer(
        model,
        args=SFTConfig(str(tmp_path), bf16=False, **arguments),
        train_dataset=rows,
        processing_class=tokenizer,
        callbacks=[callback],
    ).train()
    trained = tmp_path / "trained"
    model.save_pretrained(trained)
    saved = load_file(tmp_path / "expo" / "model.safetensors")
    for name, tensor in extrapolate.tensors(tiny, trained, callback.search.alpha):
        assert torch.equal(saved[name], tensor), name
    rows = [{"input_ids": torch.tensor([5, 6, 7]), "labels": torch.tensor([5, 6, 7])}]
    plain = Trainer(
        model,
        args=TrainingArguments(str(tmp_path / "plain"), **arguments),
        train_dataset=rows,
        callbacks=[expo()],
    )
    with pytest.raises(ValueError, match="ExPOCallback needs a tokenizer"):
        plain.train()


def test_expo_refuses_a_model_that_is_no_start(tiny, tokenizer, settings, tmp_path):
    wider = load(tiny)
    wider.resize_token_embeddings(600)
    with pytest.raises(ValueError, match=r"sft has \[600, 64\] for model.embed_tokens.weight"):
        dpo(load(tiny), tokenizer, settings(), expo(sft=wider)).train()
    with pytest.raises(ValueError, match="equals sft in all weights"):
        dpo(load(tiny), tokenizer, settings(learning_rate=0.0), expo(sft=tiny)).train()


# ---- several processes


def train_in_a_group(out: str) -> None:
    """Train with estimated weights, and with ExPO at the end; the first process writes what came.

    A step has four rows, whatever the number of processes.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    folder = assets.model_dir("tiny")
    arguments = DPOConfig(
        **{**PLAIN, "output_dir": out, "per_device_train_batch_size": BATCH // processes}
    )
    callback = expo()
    trainer = MallowsDPOTrainer(
        load(folder),
        args=arguments,
        train_dataset=data_set("chat"),
        processing_class=AutoTokenizer.from_pretrained(folder),
        callbacks=[callback],
    )
    trainer.train()
    if trainer.is_world_process_zero():
        result = {
            "weights": list(trainer.train_dataset["mallows_weight"]),
            "losses": column(trainer, "loss"),
            "mean_weights": column(trainer, "weight"),
            "tokens": column(trainer, "num_tokens"),
            "rewards": [rewards.tolist() for rewards in callback.search.rewards.values()],
            "processes": trainer.accelerator.num_processes,
        }
        paths.Path(out, "result.json").write_text(json.dumps(result))


@pytest.mark.slow
def test_two_processes_train_as_one_does(tmp_path):
    """The same weights, losses and logs up to rounding, and one folder of ExPO's."""
    results = []
    for processes in (1, 2):
        out = tmp_path / str(processes)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc_per_node={processes}", __file__, str(out)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
        results.append(json.loads((out / "result.json").read_text()))
        assert (out / "expo" / "expo.json").exists()
    single, double = results
    assert (single.pop("processes"), double.pop("processes")) == (1, 2)
    assert np.std(single["weights"]) > 0.005
    assert single.pop("rewards") == double.pop("rewards")
    for name, values in single.items():
        assert double[name] == pytest.approx(values, rel=1e-4), name


# ---- a real model


@pytest.mark.slow
def test_smollm2_learns_and_is_extrapolated(tokenizer, settings, tmp_path):
    """MallowsPO with an adapter, ExPO after it, and a step of WRPO, of SmolLM2-135M."""
    try:
        folder = assets.model_dir("smollm2")
    except assets.AssetError as error:
        pytest.skip(str(error))
    adapter = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
    callback = expo(
        prompts=[[{"role": "user", "content": "Was it a good film?"}]],
        evaluations=4,
        samples=2,
        sampling={"max_new_tokens": 8},
    )
    arguments = settings(optim="adamw_torch", learning_rate=1e-3, num_train_epochs=4, max_length=96)
    mallows_trainer = MallowsDPOTrainer(
        load(folder),
        args=arguments,
        train_dataset=data_set("chat"),
        processing_class=AutoTokenizer.from_pretrained(folder),
        peft_config=adapter,
        callbacks=[callback],
    )
    weights = np.array(mallows_trainer.train_dataset["mallows_weight"])
    assert weights.mean() == pytest.approx(1.0)
    assert 0.05 < weights.std() < 0.6
    mallows_trainer.train()
    losses = column(mallows_trainer, "loss")
    assert losses[0] == pytest.approx(math.log(2), abs=1e-3)
    assert losses[-1] < 0.5
    assert len(callback.search.rewards) == 4
    assert lora.read_settings(tmp_path / "out" / "expo")["r"] == 4
    del mallows_trainer
    wrpo = WRPOTrainer(
        load(folder),
        args=settings(
            max_steps=1,
            per_device_train_batch_size=2,
            precompute_ref_log_probs=True,
            max_length=96,
        ),
        train_dataset=triples("chat"),
        processing_class=AutoTokenizer.from_pretrained(folder),
    )
    wrpo.train()
    assert column(wrpo, "loss") == pytest.approx([math.log(2)], abs=1e-3)
    assert column(wrpo, "alpha") == [0.0]


# ---- what the docs show


def test_the_code_of_the_docs_runs(tiny, tmp_path, monkeypatch):
    """All blocks of docs/trl.md in their order, with the tiny model in place of the one there."""
    monkeypatch.chdir(tmp_path)
    text = (paths.ROOT / "docs" / "trl.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) >= 5
    named = '"HuggingFaceTB/SmolLM2-135M-Instruct"'
    assert named in blocks[0]
    names = {}
    for block in blocks:
        exec(compile(block.replace(named, repr(str(tiny))), "docs/trl.md", "exec"), names)


if __name__ == "__main__":
    train_in_a_group(sys.argv[1])
