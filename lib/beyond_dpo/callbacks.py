"""ExPO (arXiv 2404.16792) at the end of a training by transformers' Trainer, and so by TRL's."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, TrainerCallback
from transformers.integrations import is_deepspeed_zero3_enabled

from beyond_dpo import events, lora, templates
from beyond_dpo.extrapolate import blend
from beyond_dpo.search import Search, golden_section, require_search

# How the paper samples (its penalties are not known to transformers).
SAMPLING = {
    "do_sample": True,
    "temperature": 0.7,
    "top_k": 40,
    "top_p": 0.9,
    "max_new_tokens": 512,
}


class ExPOCallback(TrainerCallback):
    """Search the α of θ₁ + α(θ₁ − θ₀) when a training ends, and save the model at the best one.

        trainer = DPOTrainer(…, callbacks=[ExPOCallback(prompts, reward)])

    θ₁ is the trained model and θ₀ the one it began with (Eq. 6, arXiv 2404.16792). The model itself
    samples at each α, with its weights moved in place; afterwards it has the very bits that were
    trained. A LoRA adapter is not moved but scaled by 1 + α, which is the same (lora.py). The best
    model is saved in `out` with its tokenizer, an adapter as an adapter; expo.json there says which
    α it has, and the rewards at all that were tried. The Search is in callback.search.

    Memory: a full training needs a copy of θ₀ and, while α is searched, one of θ₁, both in the main
    memory and in the model's dtype. Without `sft` the copy of θ₀ is made when the training begins.
    With a folder or hub id it is read when the training ends, with a model (TRL's ref_model) none
    is made. An adapter needs no copy.

    An error of the search ends trainer.train(), with the trained weights in place: they can still
    be saved. All processes search, so a reward should be a function of its inputs alone; the first
    one saves.

    Args:
        prompts: texts, or lists of {"role", "content"} turns for a chat model.
        reward: called with (prompts, responses), two lists of equal length, responses as text;
            returns one finite number each, higher is better.
        sft: θ₀: a folder, a hub id, a model; None: the model as it is when the training begins.
        out: folder, new or empty; None: "expo" in the trainer's output folder.
        bracket, evaluations: see search.golden_section.
        samples: responses per prompt.
        sampling: arguments of generate() besides SAMPLING, or in place of them.
        batch_size: prompts that are sampled together.
        seed: of sampling, the same at every α, and of the bootstrap.
    Raises:
        ValueError: no prompt, or what golden_section() refuses.
    and when the training begins:
        ValueError: no tokenizer, weights that are spread over processes (ZeRO-3, FSDP), an adapter
            that is no plain, new LoRA, or a full training that goes on from a checkpoint without
            `sft`: what it began with is then not known.
        FileExistsError: `out` holds something.
    and when it ends:
        ValueError: `sft` is another kind of model or equals the trained one, or rewards are not
            one finite number for each response.
    """

    def __init__(
        self,
        prompts: list,
        reward: Callable,
        *,
        sft=None,
        out: str | Path | None = None,
        bracket: tuple[float, float] = (0.0, 16.0),
        evaluations: int = 8,
        samples: int = 1,
        sampling: dict | None = None,
        batch_size: int = 8,
        seed: int = 0,
    ):
        self.prompts = list(prompts)
        if not self.prompts:
            raise ValueError("prompts is empty: give at least one, better fifty")
        require_search(bracket, evaluations)
        self.reward = reward
        self.sft = sft
        self.out = out
        self.bracket = bracket
        self.evaluations = evaluations
        self.samples = samples
        self.sampling = SAMPLING | (sampling or {})
        self.batch_size = batch_size
        self.seed = seed
        self.search: Search | None = None

    def on_train_begin(self, args, state, control, *, model, processing_class, **_):
        """Refuse what could not be done at the end; take a copy of θ₀ if it is nowhere else."""
        if processing_class is None:
            raise ValueError("ExPOCallback needs a tokenizer: give the trainer a processing_class")
        if is_deepspeed_zero3_enabled() or args.fsdp:
            raise ValueError(
                "ExPOCallback moves whole weights, and ZeRO-3 and FSDP spread them over processes: "
                "save both models, and use beyond_dpo.extrapolate"
            )
        self._folder = Path(self.out or Path(args.output_dir) / "expo")
        if self._folder.exists() and any(self._folder.iterdir()):
            raise FileExistsError(f"{self._folder} holds something: move or delete it")
        if hasattr(model, "peft_config"):
            self._line = _AdapterLine(model)
            return
        if self.sft is None and state.global_step > 0:
            raise ValueError(
                "this training goes on from a checkpoint, so what it began with is not known: give "
                "ExPOCallback its folder, hub id or model as sft"
            )
        self._line = _WeightLine(model, self.sft)

    def on_train_end(self, args, state, control, *, model, processing_class, **_):
        """Search α, save the model at the best one, and restore the trained weights."""
        if state.is_world_process_zero:
            events.note(
                f"searching α: at most {self.evaluations} values, "
                f"{len(self.prompts) * self.samples} responses at each"
            )
        tokenizer = getattr(processing_class, "tokenizer", processing_class)
        prompts = [_prompt_ids(tokenizer, prompt) for prompt in self.prompts]
        self._line.begin()
        was_training = model.training
        model.eval()
        try:

            def evaluate(alpha: float) -> np.ndarray:
                """Return the mean reward of each prompt's responses at α."""
                self._line.move(alpha)
                return self._rewards(model, tokenizer, prompts)

            self.search = golden_section(evaluate, self.bracket, self.evaluations, seed=self.seed)
            if state.is_world_process_zero:
                self._save(tokenizer)
        finally:
            self._line.restore()
            model.train(was_training)
            del self._line  # and with it the copies

    def _rewards(self, model, tokenizer, prompts: list[list[int]]) -> np.ndarray:
        """Return the (prompts,) mean rewards of the model as its weights are now."""
        responses = self._responses(model, tokenizer, prompts)
        repeated = [prompt for prompt in self.prompts for _ in range(self.samples)]
        rewards = np.asarray(self.reward(repeated, responses), dtype=float)
        if rewards.shape != (len(responses),):
            raise ValueError(
                f"the reward function returned shape {rewards.shape} for {len(responses)} responses"
            )
        return rewards.reshape(len(prompts), self.samples).mean(1)

    def _responses(self, model, tokenizer, prompts: list[list[int]]) -> list[str]:
        """Return `samples` texts for each prompt; the seed is the same each time."""
        texts = []
        with torch.random.fork_rng():  # the noise of whatever follows stays as it was
            torch.manual_seed(self.seed)
            for start in range(0, len(prompts), self.batch_size):
                batch = tokenizer.pad(
                    {"input_ids": prompts[start : start + self.batch_size]},
                    padding_side="left",
                    return_tensors="pt",
                ).to(model.device)
                tokens = model.generate(
                    **batch,
                    num_return_sequences=self.samples,
                    pad_token_id=tokenizer.pad_token_id,
                    use_cache=True,  # which gradient checkpointing has turned off
                    **self.sampling,
                )
                width = batch["input_ids"].shape[1]
                texts += tokenizer.batch_decode(tokens[:, width:], skip_special_tokens=True)
        return texts

    def _save(self, tokenizer) -> None:
        """Write the model at the best α, its tokenizer and expo.json; all appear at once."""
        partial = self._folder.with_name(f".{self._folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        self._line.save(self.search.alpha, partial)
        tokenizer.save_pretrained(partial)
        facts = {
            "alpha": self.search.alpha,
            "low": self.search.low,
            "high": self.search.high,
            "mean_rewards": {
                alpha: float(rewards.mean()) for alpha, rewards in self.search.rewards.items()
            },
            "prompts": len(self.prompts),
            "samples": self.samples,
            "seed": self.seed,
        }
        (partial / "expo.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        if self._folder.exists():
            self._folder.rmdir()
        partial.rename(self._folder)


def _prompt_ids(tokenizer, prompt: str | list[dict]) -> list[int]:
    kind = "plain" if isinstance(prompt, str) else "chat"
    return templates.render(tokenizer, prompt, kind)


class _WeightLine:
    """The line θ₁ + α(θ₁ − θ₀) through the weights of a model that is trained as a whole."""

    def __init__(self, model, sft):
        """Take a copy of the weights as θ₀ if `sft` is None."""
        self.model = model
        self.sft = _copies(model) if sft is None else sft

    def begin(self) -> None:
        """Take a copy of the weights as θ₁; raise ValueError unless θ₀ is one like it."""
        self.theta_sft = self._weights_of_sft()
        self.theta_aligned = _copies(self.model)
        is_moved = False
        for name, aligned in self.theta_aligned.items():
            sft = self.theta_sft.get(name)
            if sft is None or sft.shape != aligned.shape:
                got = "nothing" if sft is None else list(sft.shape)
                raise ValueError(f"sft has {got} for {name} of shape {list(aligned.shape)}")
            is_moved = is_moved or not torch.equal(sft.cpu(), aligned)
        if not is_moved:
            raise ValueError("the trained model equals sft in all weights: there is no way to go")

    def _weights_of_sft(self) -> dict[str, Tensor]:
        if isinstance(self.sft, dict):
            return self.sft
        model = self.sft
        if isinstance(model, str | Path):
            model = AutoModelForCausalLM.from_pretrained(model, dtype=self.model.dtype)
        return {name: weight.detach() for name, weight in model.named_parameters()}

    @torch.no_grad()
    def move(self, alpha: float) -> None:
        """Give the model its weights at α."""
        for name, weight in self.model.named_parameters():
            if name in self.theta_aligned:
                aligned = self.theta_aligned[name].to(weight.device)
                sft = self.theta_sft[name].to(weight.device)
                weight.copy_(blend(sft, aligned, alpha))

    def restore(self) -> None:
        """Give the model its trained weights."""
        self.move(0.0)

    def save(self, alpha: float, folder: Path) -> None:
        """Write the model at α."""
        self.move(alpha)
        self.model.save_pretrained(folder)


@torch.no_grad()
def _copies(model) -> dict[str, Tensor]:
    """Return copies of the weights that are trained, in the main memory."""
    copies = {}
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            copies[name] = weight.detach().to("cpu", copy=True)
    return copies


class _AdapterLine:
    """The same line of an adapter: θ₀ + (1 + α)·s·BA, so that its scale alone is moved."""

    def __init__(self, model):
        """Raise ValueError for an adapter that is not one new and plain LoRA."""
        names = list(model.peft_config)
        if names != ["default"]:
            raise ValueError(
                f"ExPOCallback needs one new adapter, got {names}: θ₁ − θ₀ is no adapter where "
                "training goes on from another one"
            )
        lora.require_plain(model.peft_config["default"].to_dict(), "the adapter")
        self.model = model

    def begin(self) -> None:
        """Remember the scale of each layer."""
        from peft.tuners.lora import LoraLayer

        self.scales = {}
        for layer in self.model.modules():
            if isinstance(layer, LoraLayer):
                self.scales[layer] = layer.scaling["default"]

    def move(self, alpha: float) -> None:
        """Give the adapter its scale at α."""
        for layer, scale in self.scales.items():
            layer.scaling["default"] = (1 + alpha) * scale

    def restore(self) -> None:
        """Give the adapter the scale that it was trained with."""
        self.move(0.0)

    def save(self, alpha: float, folder: Path) -> None:
        """Write the adapter with its scale at α."""
        trained = folder / "trained"
        self.model.save_pretrained(trained)
        lora.scaled(trained, {alpha: folder})
        shutil.rmtree(trained)
