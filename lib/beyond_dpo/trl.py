"""MallowsPO, WRPO and shared prompts as trainers of TRL (`pip install beyond-dpo[trl]`, TRL 1.16).

Each is a subclass of TRL's DPOTrainer with another loss (losses.py). TRL computes loss, sums and
metrics in one method and has no hook for the loss alone, so compute_loss is overridden as a whole;
what else is, says each class. Data sets, settings (DPOConfig), precomputed reference
log-probabilities, adapters (PEFT), checkpoints and logs are TRL's. ExPOCallback needs no TRL and is
here so that all is imported from one place.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from beyond_dpo import attention, dispersion, losses, scoring
from beyond_dpo.callbacks import ExPOCallback
from beyond_dpo.rows import FUSED

try:
    import trl  # noqa: F401
except ImportError as error:
    raise ImportError("beyond_dpo.trl needs TRL: pip install beyond-dpo[trl]") from error

from datasets import IterableDataset
from transformers import AutoProcessor
from trl import DPOConfig, DPOTrainer
from trl.trainer.utils import add_fused_lm_head, get_config_model_id, pad

__all__ = [
    "DataCollatorForResponses",
    "ExPOCallback",
    "MallowsDPOTrainer",
    "SharedPrompts",
    "WRPOTrainer",
]

PAIR = ("chosen", "rejected")
REFERENCE = ("ref_chosen_logps", "ref_rejected_logps")  # the columns of precompute_ref_log_probs
# Settings of DPOConfig that belong to TRL's own losses, and their values that change nothing.
LOSS_SETTINGS = {
    "loss_type": ["sigmoid"],
    "loss_weights": None,
    "ld_alpha": None,
    "f_divergence_type": "reverse_kl",
    "label_smoothing": 0.0,
    "use_weighting": False,
}


@dataclass
class DataCollatorForResponses:
    """Lay the named responses of rows out as TRL's DataCollatorForPreference lays out its pairs.

    A row has `prompt_ids` and, of each response, `<name>_ids`. Each response is a sequence of its
    own with its prompt before it, cut to max_length, and padded on the right. All rows of the first
    response come first, so n rows with k responses give k·n sequences.
    """

    names: tuple[str, ...]
    pad_token_id: int
    max_length: int | None = None
    truncation_mode: str = "keep_start"
    pad_to_multiple_of: int | None = None
    # numbers of a row that are taken over as float32 tensors where the rows have them
    columns: tuple[str, ...] = REFERENCE

    def __call__(self, rows: list[dict]) -> dict[str, Tensor]:
        """Return input_ids, attention_mask, completion_mask (sequences, L), and the columns."""
        sequences = []
        is_seen = []
        in_completion = []
        for name in self.names:
            for row in rows:
                prompt = row["prompt_ids"]
                response = row[f"{name}_ids"]
                sequence = self._cut(prompt + response)
                sequences.append(sequence)
                is_seen.append([1] * len(sequence))
                in_completion.append(self._cut([0] * len(prompt) + [1] * len(response)))
        batch = {
            "input_ids": self._pad(sequences, self.pad_token_id),
            "attention_mask": self._pad(is_seen, 0),
            "completion_mask": self._pad(in_completion, 0),
        }
        for column in self.columns:
            if column in rows[0]:
                numbers = [row[column] for row in rows]
                batch[column] = torch.tensor(numbers, dtype=torch.float32)
        return batch

    def _cut(self, sequence: list[int]) -> list[int]:
        if self.max_length is None:
            return sequence
        if self.truncation_mode == "keep_end":
            return sequence[-self.max_length :]
        return sequence[: self.max_length]

    def _pad(self, sequences: list[list[int]], value: int) -> Tensor:
        tensors = [torch.tensor(sequence, dtype=torch.long) for sequence in sequences]
        return pad(tensors, value, "right", self.pad_to_multiple_of)


# ---- what both trainers share


class _OwnLossTrainer(DPOTrainer):
    """A DPOTrainer whose loss is row_losses(), of the responses that `responses` names."""

    responses = PAIR
    columns = ()  # of the data set, which row_losses() needs

    def __init__(
        self,
        model,
        ref_model=None,
        args: DPOConfig | None = None,
        data_collator=None,
        *,
        processing_class=None,
        **arguments,
    ):
        model_id = model if isinstance(model, str) else get_config_model_id(model.config)
        if args is None:
            model_name = model_id.split("/")[-1]
            args = DPOConfig(f"{model_name}-{self._name}")
        _require_own_loss(args, type(self).__name__)
        if processing_class is None:
            model_options = args.model_init_kwargs or {}
            processing_class = AutoProcessor.from_pretrained(
                model_id,
                revision=model_options.get("revision") if isinstance(model, str) else None,
                trust_remote_code=args.trust_remote_code,
            )
        # TRL's collator is made in DPOTrainer's own __init__, and only for pairs.
        if data_collator is None:
            data_collator = self._collator(args, processing_class)
        super().__init__(
            model,
            ref_model,
            args,
            data_collator,
            processing_class=processing_class,
            **arguments,
        )
        if self._is_vision_dataset:
            raise ValueError(f"{type(self).__name__} takes texts, and no images")

    def _collator(self, args: DPOConfig, processing_class) -> DataCollatorForResponses:
        tokenizer = getattr(processing_class, "tokenizer", processing_class)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return DataCollatorForResponses(
            names=self.responses,
            pad_token_id=tokenizer.pad_token_id,
            max_length=args.max_length,
            truncation_mode=args.truncation_mode,
            pad_to_multiple_of=args.pad_to_multiple_of,
            columns=REFERENCE + self.columns,
        )

    def _set_signature_columns_if_needed(self):
        """Keep the columns that the collator reads; Trainer drops all others."""
        ids = [f"{name}_ids" for name in self.responses]
        self._signature_columns = ["prompt_ids", *ids, *REFERENCE, *self.columns]

    def row_losses(
        self, logratios: Tensor, inputs: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the losses and both rewards, (rows,) each, from (responses, rows) log-ratios."""
        raise NotImplementedError

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Return the mean loss of a batch, in place of TRL's; log what TRL's trainer logs."""
        forward = {
            "input_ids": inputs["input_ids"],
            "attention_mask": inputs["attention_mask"],
            "use_cache": False,
        }
        if self.aux_loss_enabled:  # of a mixture of experts
            forward["output_router_logits"] = True
        in_completion = inputs["completion_mask"] == 1
        labels = inputs["input_ids"].masked_fill(~in_completion, -100)
        outputs = model(**forward, labels=labels, fused_lm_head=True)
        # Soft prompts of PEFT stand before the tokens.
        width = labels.shape[1] - 1
        token_logps = outputs.log_probs[:, -width:]
        logps = token_logps.sum(1).view(len(self.responses), -1)
        logratios = logps - self._reference_logps(inputs)
        row_losses, chosen_rewards, rejected_rewards = self.row_losses(logratios, inputs)
        loss = row_losses.mean()
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss
            self._note("aux_loss", outputs.aux_loss.view(1))
        self._note_rewards(chosen_rewards, rejected_rewards)
        for name, response_logps in zip(self.responses, logps, strict=True):
            self._note(f"logps/{name}", response_logps)
        self._note_tokens(outputs, in_completion[:, 1:], inputs["attention_mask"])
        if not return_outputs:
            return loss
        with torch.no_grad():  # the fused head makes no logits
            return loss, model(**forward)

    def compute_ref_log_probs(self, model, inputs):
        """Return TRL's reference log-probabilities of the chosen and of the rejected responses.

        Each is (rows,), but of two chosen responses (rows, 2). In this form TRL's own
        precompute_ref_log_probs stores and caches them.
        """
        names = ("input_ids", "attention_mask", "completion_mask")
        halves = super().compute_ref_log_probs(model, {name: inputs[name] for name in names})
        logps = torch.cat(halves).view(len(self.responses), -1)
        chosen = logps[:-1].T.squeeze(1)
        return chosen, logps[-1]

    def _reference_logps(self, inputs: dict[str, Tensor]) -> Tensor:
        """Return the reference's log-probabilities, (responses, rows)."""
        if self.precompute_ref_logps:
            chosen, rejected = (inputs[name] for name in REFERENCE)
        else:
            reference = self.ref_model or self.model
            chosen, rejected = self.compute_ref_log_probs(reference, inputs)
        columns = [chosen.view(len(rejected), -1), rejected.view(-1, 1)]
        return torch.cat(columns, dim=1).T

    @property
    def _log_of_mode(self) -> dict[str, list[float]]:
        """Return TRL's lists of what is averaged at the next line of the log."""
        return self._metrics["train" if self.model.training else "eval"]

    def _note(self, name: str, values: Tensor) -> None:
        """Add the mean over the rows of all processes to the log."""
        of_all = self.accelerator.gather_for_metrics(values.detach())
        self._log_of_mode[name].append(of_all.float().mean().item())

    def _note_rewards(self, chosen: Tensor, rejected: Tensor) -> None:
        self._note("rewards/chosen", chosen)
        self._note("rewards/rejected", rejected)
        self._note("rewards/accuracies", (chosen > rejected).float())
        self._note("rewards/margins", chosen - rejected)

    def _note_tokens(self, outputs, in_completion: Tensor, attention_mask: Tensor) -> None:
        """Log the means over response tokens that TRL logs, and how many tokens were read."""
        count = len(self.responses)
        masks = in_completion.chunk(count)
        width = in_completion.shape[1]
        self._note_token_mean("entropy", outputs.entropy[:, -width:], in_completion)
        logits = outputs.mean_logits[:, -width:].chunk(count)
        for name, values, mask in zip(self.responses, logits, masks, strict=True):
            self._note_token_mean(f"logits/{name}", values, mask)
        # of the response before the rejected one: "chosen", or the target's own
        is_top1 = outputs.is_top1[:, -width:].chunk(count)[-2]
        self._note_token_mean("mean_token_accuracy", is_top1.float(), masks[-2])
        if self.model.training:
            tokens = self.accelerator.gather_for_metrics(attention_mask.sum()).sum().item()
            self._total_train_tokens += tokens // self._tp_size
        self._log_of_mode["num_tokens"] = [self._total_train_tokens]

    def _note_token_mean(self, name: str, values: Tensor, mask: Tensor) -> None:
        total = self.accelerator.gather_for_metrics((values.detach() * mask).sum()).sum()
        count = self.accelerator.gather_for_metrics(mask.sum()).sum()
        self._log_of_mode[name].append((total / count.clamp(min=1)).item())


def _require_own_loss(args: DPOConfig, trainer: str) -> None:
    """Raise ValueError for a setting of TRL's losses, which would be without effect here."""
    for name, neutral in LOSS_SETTINGS.items():
        value = getattr(args, name)
        if value != neutral:
            raise ValueError(f"{trainer} has a loss of its own and knows no {name}={value!r}")


# ---- MallowsPO


class MallowsDPOTrainer(_OwnLossTrainer):
    """Train with MallowsPO (arXiv 2405.14953): DPO with a weight for each prompt.

    The weight is large where answers to a prompt are all alike (losses.mallows_theta, mallows_phi).

        trainer = MallowsDPOTrainer(model, args=DPOConfig(…), train_dataset=pairs)

    The data set is one of DPOTrainer's. The weights come from its column `weight_column`. Without
    one they are estimated by one pass of the reference model over the data sets, before training
    (dispersion.weights): from the mean entropy of the tokens of both responses, scaled so that the
    training set's mean weight is 1. They stand in the column "mallows_weight" of
    trainer.train_dataset, and trainer.phi_star is their scale, by which evaluation sets are
    weighted too.

    Besides the loss the collator and the columns that reach it are overridden, for the weight.

    Args:
        variant: "theta" or "phi", the loss.
        epsilon: half width of the cubic of "phi", > 0.
        weight_column: of the data sets, with numbers > 0; None: estimate them.
        The others are DPOTrainer's; beta is args.beta.
    Raises:
        ValueError: another variant, a weight that is missing, not finite or not > 0, a setting of
            TRL's own losses, or an estimate that is not possible: of a streamed data set, or with
            DeepSpeed or FSDP and no ref_model.

    The log has the mean weight besides what DPOTrainer logs. Rewards are without the weight.
    """

    _tag_names = ["trl", "mallowspo"]
    _name = "MallowsPO"
    _paper = {
        "title": "MallowsPO: Fine-Tune Your LLM with Preference Dispersions",
        "id": "2405.14953",
    }

    def __init__(
        self,
        *arguments,
        variant: str = "theta",
        epsilon: float = 0.1,
        weight_column: str | None = None,
        **keywords,
    ):
        if variant not in ("theta", "phi"):
            raise ValueError(f"variant must be 'theta' or 'phi', got {variant!r}")
        self.variant = variant
        self.epsilon = epsilon
        self.phi_star: float | None = None
        self.columns = (weight_column or "mallows_weight",)
        super().__init__(*arguments, **keywords)
        is_given = weight_column is not None
        add_weights = self._with_given_weights if is_given else self._with_estimated_weights
        self.train_dataset = add_weights(self.train_dataset)
        if isinstance(self.eval_dataset, dict):
            self.eval_dataset = {
                name: add_weights(dataset) for name, dataset in self.eval_dataset.items()
            }
        elif self.eval_dataset is not None:
            self.eval_dataset = add_weights(self.eval_dataset)

    def row_losses(self, logratios, inputs):
        """Return mallows_theta or mallows_phi of a batch."""
        (column,) = self.columns
        if column not in inputs:
            raise ValueError(
                f"a batch has no {column!r}: a data set that is not the trainer's own needs that "
                "column"
            )
        weights = inputs[column]
        self._note("weight", weights)
        if self.variant == "theta":
            return losses.mallows_theta(*logratios, weights, beta=self.beta)
        phi = torch.exp(-weights)  # dispersion.to_phi
        return losses.mallows_phi(*logratios, phi, beta=self.beta, epsilon=self.epsilon)

    def _with_given_weights(self, dataset):
        """Return a data set whose weights have been looked at; a streamed one is not read."""
        (column,) = self.columns
        _require_columns(next(iter(dataset)), [column])
        if isinstance(dataset, IterableDataset):
            return dataset
        weights = np.asarray(dataset[column], dtype=float)  # None becomes NaN
        if weights.shape != (len(dataset),):
            raise ValueError(f"{column!r} must hold one number a row, got shape {weights.shape}")
        is_usable = (weights > 0) & np.isfinite(weights)
        if not is_usable.all():
            row = int(np.argmin(is_usable))
            raise ValueError(f"{column!r} must be > 0 and finite, got {weights[row]} in row {row}")
        return dataset

    def _with_estimated_weights(self, dataset):
        """Return a data set with the estimated weights in a column; the first sets phi_star."""
        if isinstance(dataset, IterableDataset):
            raise ValueError(
                "weights cannot be estimated for a streamed data set, whose mean is not known: "
                "give a weight_column"
            )
        chosen, rejected = self._entropies(dataset).T
        weights, self.phi_star = dispersion.weights(
            chosen, rejected, range(len(dataset)), self.phi_star
        )
        (column,) = self.columns
        if column in dataset.column_names:
            dataset = dataset.remove_columns(column)
        return dataset.add_column(column, weights)

    def _entropies(self, dataset) -> Tensor:
        """Return the reference model's normalised entropies, (rows, 2): a response's token mean."""
        reference = self.ref_model or self.model
        if self.ref_model is not None:
            # TRL lets the policy's head compute entropies, the reference's only log-probabilities.
            unwrapped = self.accelerator.unwrap_model(self.ref_model)
            add_fused_lm_head(unwrapped, outputs=("log_probs", "entropy"))
        elif self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise ValueError(
                "under DeepSpeed or FSDP weights are estimated with a ref_model only: give one, or "
                "a weight_column"
            )
        batch_size = self.args.precompute_ref_batch_size or self.args.per_device_train_batch_size
        loader = DataLoader(dataset, batch_size, collate_fn=self.data_collator)
        vocabulary_size = self.model.config.get_text_config().vocab_size
        entropies = []
        for batch in self.accelerator.prepare(loader):
            sums = torch.stack(self.compute_ref_log_probs(_EntropyPass(reference), batch), dim=1)
            tokens = batch["completion_mask"][:, 1:].sum(1).view(2, -1).T
            means = sums / tokens / np.log(vocabulary_size)
            entropies.append(self.accelerator.gather_for_metrics(means).cpu())
        return torch.cat(entropies)


@dataclass
class _EntropyPass:
    """A model that gives entropies where it is asked for log-probabilities, so TRL sums them."""

    model: torch.nn.Module

    def __call__(self, **inputs):
        outputs = self.model(**inputs)
        outputs.log_probs = outputs.entropy
        return outputs

    def parameters(self):
        """Return the model's."""
        return self.model.parameters()


def _require_columns(row: dict, columns) -> None:
    """Raise ValueError unless the first row of a data set has all of the columns."""
    missing = [column for column in columns if column not in row]
    if missing:
        raise ValueError(f"the data set has no column {missing}, only {sorted(row)}")


# ---- WRPO


class WRPOTrainer(_OwnLossTrainer):
    """Train with WRPO (arXiv 2412.03187): blend the rewards of a source's and the own best answer.

        trainer = WRPOTrainer(model, args=DPOConfig(…), train_dataset=triples, alpha=0.1)

    The data set has the columns prompt, source_chosen (the best answer of the source models),
    target_chosen and rejected (the best and the worst of the model's own), as texts or, all four,
    as lists of messages. See losses.wrpo for the loss.

    Besides the loss the collator and the preparation of the data set are overridden, for the third
    response. TRL's own preparation is run once for each chosen response, so rejected responses are
    turned into tokens twice.

    Args:
        alpha: fusion coefficient in [0, 1], the share of the source's answer.
        dynamic: True: alpha rises as alpha · step / steps, with the optimizer steps that are done
            and all of the training's, so the first step is DPO on the own pair; False: it is
            constant.
        The others are DPOTrainer's; beta is args.beta.
    Raises:
        ValueError: alpha out of its range, a column that is missing, or a setting of TRL's own
            losses.

    The log has alpha, and of each response its reward and log-probability; rewards/chosen is the
    blended one.
    """

    responses = FUSED
    _tag_names = ["trl", "wrpo"]
    _name = "WRPO"
    _paper = {
        "title": "Weighted-Reward Preference Optimization for Implicit Model Fusion",
        "id": "2412.03187",
    }

    def __init__(self, *arguments, alpha: float = 0.1, dynamic: bool = True, **keywords):
        if not 0.0 <= alpha <= 1.0:
            raise ValueError(f"alpha must be in [0, 1], got {alpha!r}")
        self.alpha = alpha
        self.dynamic = dynamic
        super().__init__(*arguments, **keywords)

    @property
    def current_alpha(self) -> float:
        """Return alpha at this step; before a training of dynamic alpha it is 0."""
        if not self.dynamic:
            return self.alpha
        steps = max(1, self.state.max_steps)
        return self.alpha * self.state.global_step / steps

    def row_losses(self, logratios, inputs):
        """Return losses.wrpo of a batch."""
        self._log_of_mode["alpha"].append(self.current_alpha)
        for name, response_logratios in zip(FUSED[:2], logratios[:2], strict=True):
            self._note(f"rewards/{name}", self.beta * response_logratios)
        return losses.wrpo(*logratios, alpha=self.current_alpha, beta=self.beta)

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        """Return the data set with the token ids of the prompt and of its three responses."""
        first_row = next(iter(dataset))
        prepared = [f"{name}_ids" for name in ("prompt", *FUSED)]
        if all(column in first_row for column in prepared):
            return dataset
        _require_columns(first_row, ["prompt", *FUSED])
        used = ["prompt", *FUSED, "tools", "chat_template_kwargs"]
        dataset = dataset.select_columns([column for column in used if column in first_row])
        for name in FUSED[:2]:
            pairs = dataset.rename_column(name, "chosen")
            pairs = super()._prepare_dataset(pairs, processing_class, args, dataset_name)
            dataset = pairs.rename_columns(
                {
                    "chosen": name,
                    "prompt_ids": f"{name}:prompt",
                    "chosen_ids": f"{name}:chosen",
                    "rejected_ids": f"{name}:rejected",
                }
            )
        temporary = [column for column in next(iter(dataset)) if ":" in column]
        return dataset.map(_with_one_prompt, remove_columns=temporary)


def _with_one_prompt(row: dict) -> dict[str, list[int]]:
    """Return the token ids of a row whose pairs were prepared one by one.

    TRL ends a prompt where the tokens of it alone and of it with a response part. In one pair that
    may be earlier than in the other. The shorter prompt holds for all, and what it lacks is part of
    the responses.
    """
    source, target = FUSED[:2]
    prompts = (row[f"{source}:prompt"], row[f"{target}:prompt"])
    length = min(map(len, prompts))
    return {
        "prompt_ids": prompts[0][:length],
        f"{source}_ids": prompts[0][length:] + row[f"{source}:chosen"],
        f"{target}_ids": prompts[1][length:] + row[f"{target}:chosen"],
        "rejected_ids": prompts[1][length:] + row[f"{target}:rejected"],
    }


# ---- shared prompts


class SharedPrompts:
    """Let a trainer compute each prompt once for all responses of a row.

        class Trainer(SharedPrompts, DPOTrainer): …

    It goes before TRL's DPOTrainer, MallowsDPOTrainer or WRPOTrainer. The trainer's collator, loss
    and metrics stay as they are: the mixin wraps the model that TRL hands to them, so it lays a
    batch's sequences out anew on its way in and its log-probabilities back on their way out. A
    line holds the prompt but its last token, and then of each response that token and the
    response. Each sees the prompt and itself only, and gets the log-probabilities that it has
    alone, up to rounding.

    The reference model's pass is shared with precompute_ref_log_probs, and in the trainers of this
    module always; TRL's own DPOTrainer calls the reference model of a training step directly.

    Raises ValueError when the trainer is made for flash-attention or another attention that knows
    no such mask (sdpa and eager do), truncation_mode "keep_end", which cuts the prompts of one row
    differently, soft prompts of PEFT, the auxiliary loss of a mixture of experts, and a model that
    scores packed responses otherwise than alone (ResponseScorer); in training for a sequence longer
    than the model's attention window.
    """

    def __init__(self, *arguments, **keywords):
        super().__init__(*arguments, **keywords)
        if self.args.truncation_mode == "keep_end":
            raise ValueError("prompts cannot be shared with truncation_mode 'keep_end'")
        implementation = self.model.config._attn_implementation
        if implementation not in ("sdpa", "eager"):
            raise ValueError(f"prompts cannot be shared in {implementation}: use sdpa or eager")
        adapter = getattr(self.model, "active_peft_config", None)
        if self.aux_loss_enabled or getattr(adapter, "is_prompt_learning", False):
            raise ValueError(
                "prompts cannot be shared with soft prompts or a mixture's auxiliary loss "
                "(router_aux_loss_coef=0 leaves that out)"
            )
        scoring.ResponseScorer(self.model)  # which checks the model

    def compute_loss(self, model, inputs, *arguments, **keywords):
        """Return the loss of the model with shared prompts."""
        return super().compute_loss(self._shared(model), inputs, *arguments, **keywords)

    def compute_ref_log_probs(self, model, inputs):
        """Return the reference's log-probabilities with shared prompts."""
        return super().compute_ref_log_probs(self._shared(model), inputs)

    def _shared(self, model) -> "_SharedForward":
        responses = len(getattr(self, "responses", PAIR))
        window = getattr(self.model.config.get_text_config(), "sliding_window", None)
        return _SharedForward(model, responses, window)


@dataclass
class _SharedForward:
    """Call a model with TRL's fused head as TRL does, but compute each prompt once.

    Takes and returns what the model does, (responses · rows, L), all rows of the first response
    first.
    """

    model: torch.nn.Module
    responses: int
    window: int | None

    def __call__(self, input_ids, attention_mask, labels=None, fused_lm_head=False, **keywords):
        if not fused_lm_head:
            return self.model(input_ids=input_ids, attention_mask=attention_mask, **keywords)
        layout = _Layout.of(attention_mask, labels, self.responses)
        if self.window and layout.positions.max() >= self.window:
            raise ValueError(
                f"a sequence is longer than the model's attention window of {self.window} tokens"
            )
        is_seen = attention.visible(layout.rows, layout.parts)
        zeros = torch.zeros(is_seen.shape, dtype=self._mask_dtype, device=is_seen.device)
        outputs = self.model(
            input_ids=layout.gather(input_ids, 0),
            attention_mask=zeros.masked_fill(~is_seen, -torch.inf),
            position_ids=layout.positions,
            labels=layout.gather(labels, -100),
            fused_lm_head=True,
            **keywords,
        )
        for name in ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1"):
            if outputs.get(name) is not None:
                outputs[name] = layout.scatter(outputs[name])
        return outputs

    @property
    def _mask_dtype(self) -> torch.dtype:
        """Return the dtype that attention computes in, which sdpa wants its mask in."""
        weight = next(self.model.parameters())
        device = weight.device.type
        if torch.is_autocast_enabled(device):
            return torch.get_autocast_dtype(device)
        return weight.dtype


@dataclass
class _Layout:
    """Where the tokens of padded sequences stand in lines with shared prompts."""

    sources: Tensor  # (rows, W): index into the flat sequences, -1 in padding
    positions: Tensor  # (rows, W): of each token in its sequence
    rows: Tensor  # (rows, W): 0, -1 in padding, for attention.visible
    parts: Tensor  # (rows, W): 0 of a prompt, k of the k-th response
    starts: Tensor  # (rows, W): whether a response's part begins here
    shape: tuple[int, int]  # of the sequences

    @classmethod
    def of(cls, attention_mask: Tensor, labels: Tensor, responses: int) -> "_Layout":
        """Return the layout of (responses · rows, L) sequences, padded on the right."""
        count, width = labels.shape
        lengths = attention_mask.sum(1).tolist()
        has_label = labels != -100
        firsts = torch.where(has_label.any(1), has_label.int().argmax(1), attention_mask.sum(1))
        rows = count // responses
        prefixes = (firsts.view(responses, rows).amin(0) - 1).clamp(min=0).tolist()
        sources = []
        parts = []
        for row, prefix in enumerate(prefixes):
            line = list(range(row * width, row * width + prefix))
            line_parts = [0] * prefix
            for part in range(1, responses + 1):
                sequence = (part - 1) * rows + row
                start = sequence * width
                line += range(start + prefix, start + lengths[sequence])
                line_parts += [part] * (lengths[sequence] - prefix)
            sources.append(torch.tensor(line, dtype=torch.long))
            parts.append(torch.tensor(line_parts, dtype=torch.long))
        sources = pad(sources, -1).to(labels.device)
        parts = pad(parts, 0).to(labels.device)
        is_token = sources >= 0
        begins = parts != torch.nn.functional.pad(parts, (1, 0))[:, :-1]
        return cls(
            sources=sources,
            positions=(sources % width).masked_fill(~is_token, 0),
            rows=is_token.long() - 1,
            parts=parts,
            starts=begins & is_token,
            shape=(count, width),
        )

    def gather(self, values: Tensor, padding: int) -> Tensor:
        """Return the values of sequences in the lines' order, (rows, W); none where a part begins.

        A part begins with the prompt's last token, which nothing before it in the line predicts:
        its label is the padding.
        """
        gathered = values.flatten()[self.sources.clamp(min=0)]
        is_left_out = self.sources < 0
        if padding == -100:
            is_left_out = is_left_out | self.starts
        return gathered.masked_fill(is_left_out, padding)

    def scatter(self, values: Tensor) -> Tensor:
        """Return what a head gave for the lines' tokens, (rows, W − 1), as for the sequences.

        Each is of the token after the position, so a part's last position has none.
        """
        count, width = self.shape
        flat = values.new_zeros(count * width)
        # The prediction at a place belongs to the next place, which is of the same part.
        same_part = self.parts[:, :-1] == self.parts[:, 1:]
        is_used = same_part & (self.parts[:, :-1] > 0) & (self.sources[:, 1:] >= 0)
        flat = flat.index_put((self.sources[:, :-1][is_used],), values[is_used])
        return flat.view(count, width)[:, :-1]
