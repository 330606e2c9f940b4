"""What can be set of a training and of a sampling: the jobs read nothing else of a
configuration.
"""

from dataclasses import asdict
from typing import Annotated, ClassVar, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

# an int is a float, "1" and True are not; a default may be out of range, where a profile has to
# give the value
STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, validate_default=True)
PlainLosses = Literal[
    "dpo", "ipo", "simpo"
]  # each has a weighted form (MallowsPO) and a fused one (WRPO)
PairLosses = Literal[
    "dpo", "ipo", "simpo", "mallows_theta", "mallows_phi", "mallows_ipo", "mallows_simpo"
]
Losses = Literal[
    "sft",
    "dpo",
    "ipo",
    "simpo",
    "mallows_theta",
    "mallows_phi",
    "mallows_ipo",
    "mallows_simpo",
    "wrpo",
    "wrpo_ipo",
    "wrpo_simpo",
    "hybrid",
]
# Settings that came after the first results, and the losses that use them. They stay out of the
# recipes of all other losses, so that no key changed with them.
FUSION_LOSSES = ("wrpo", "wrpo_ipo", "wrpo_simpo")
USED_BY = {
    "epsilon": ("mallows_phi",),
    "alpha": FUSION_LOSSES,
    "dynamic": FUSION_LOSSES,
}

# Numbers that no run can use are refused when a configuration is loaded.
Count = Annotated[int, Field(ge=0)]
AtLeastOne = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
PositiveShare = Annotated[float, Field(gt=0, le=1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
NotEmpty = Field(min_length=1)
Seeds = Annotated[tuple[Seed, ...], NotEmpty]
Grid = Annotated[tuple[float, ...], NotEmpty]  # of α, any of which is a point on the line
Fractions = Annotated[tuple[PositiveShare, ...], NotEmpty]
Dtype = Literal["float32", "bfloat16", "float16"]
Precision = Literal["bf16", "fp32"]


class ConfigError(ValueError):
    """A key or value of a configuration is not usable; the message names it and the nearest valid
    one.
    """


@dataclass(frozen=True, config=STRICT)
class Train:
    """How one model is trained; batch sizes count rows (a preference pair is one row)."""

    lr: Positive  # peak learning rate
    global_batch: int  # rows per optimizer step, whatever the number of processes
    micro_batch: int  # rows per process and forward pass (speed and memory only, never in a key)
    epochs: AtLeastOne = 1
    loss: Losses = "dpo"
    beta: Positive = 0.1  # DPO/SimPO β, or IPO τ
    gamma: NotNegative = 0.0  # SimPO target margin
    epsilon: Positive = 0.1  # half width of the cubic in MallowsPO-φ
    alpha: Share = 0.1  # WRPO's fusion coefficient, at the end of the training
    dynamic: bool = True  # α rises linearly from 0, else it is constant
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    optimizer: Literal["adamw", "adagrad", "rmsprop"] = "adamw"
    weight_decay: NotNegative = 0.0
    warmup: Share = 0.1  # fraction of the optimizer steps; then cosine to zero
    max_grad_norm: NotNegative = 1.0
    max_prompt: AtLeastOne = 64  # tokens kept of a prompt (its end)
    max_length: AtLeastOne = 128  # tokens kept of prompt and response together
    precision: Precision = "bf16"  # bf16 is autocast over float32 master weights
    save_dtype: Dtype = (
        "float32"  # small Δθ vanish in bf16 rounding, see README "known differences"
    )
    parts: AtLeastOne = 1  # equal parts of the training, after each of which the model is saved
    zero: Annotated[int, Field(ge=0, le=3)] = 0  # DeepSpeed ZeRO stage (machine, never in a key)
    offload: bool = False  # optimizer state in host memory (machine)
    gradient_checkpointing: bool = False  # (machine)
    attention: Literal["auto", "sdpa", "flash_attention_2"] = (
        "auto"  # see scoring.attention (machine)
    )
    # train a low-rank adapter of all linear layers (Hu et al., arXiv 2106.09685); 0: every weight
    lora_rank: Count = 0
    lora_alpha: Positive = 16.0  # the adapter's step is lora_alpha / lora_rank · BA
    processes: int = 1  # of all nodes (machine)
    launcher: Literal["deepspeed", "torchrun", "srun", "plain"] = "deepspeed"  # (machine)
    checkpoint_every: AtLeastOne = (
        50  # optimizer steps between checkpoints to resume from (machine)
    )

    MACHINE: ClassVar = (
        "micro_batch zero offload gradient_checkpointing attention processes launcher "
        "checkpoint_every"
    ).split()

    def recipe(self) -> dict:
        """Return what the result depends on: every field but the machine's, and but what this loss
        does not know.
        """
        left_out = list(self.MACHINE)
        for name, losses in USED_BY.items():
            if self.loss not in losses:
                left_out.append(name)
        if self.parts == 1:
            left_out.append("parts")
        if not self.lora_rank:
            left_out += ["lora_rank", "lora_alpha"]
        return {name: value for name, value in asdict(self).items() if name not in left_out}


@dataclass(frozen=True, config=STRICT)
class Decoding:
    """How responses are sampled (ExPO: temperature 0.7, top-k 40, top-p 0.9, penalties 0.1; arXiv
    2404.16792).
    """

    backend: Literal["vllm", "transformers"] = "vllm"  # part of the key, never a silent fallback
    temperature: NotNegative = 0.7
    top_k: Annotated[int, Field(ge=-1)] = 40  # 0 or -1: all tokens
    top_p: PositiveShare = 0.9
    presence_penalty: Penalty = 0.1
    frequency_penalty: Penalty = 0.1
    max_tokens: AtLeastOne = 2048
    dtype: Dtype = "bfloat16"
    max_model_len: AtLeastOne = 4096
    shard: AtLeastOne = 512  # prompts that are sampled in one go, each shard with a seed of its own
    engines: AtLeastOne = (
        1  # that take shards in turn, each on devices of its own (machine, never in a key)
    )
    tensor_parallel: AtLeastOne = 1  # devices that one vLLM engine spreads its model over (machine)
    gpu_share: PositiveShare = (
        0.45  # of a card's memory for a vLLM engine, beside a reward model (machine)
    )
    launcher: Literal["", "deepspeed", "torchrun", "srun"] = (
        ""  # "": engines live here; else in a job (machine)
    )

    MACHINE: ClassVar = "engines tensor_parallel gpu_share launcher".split()

    def recipe(self) -> dict:
        """Return what responses depend on: every field but the machine's; `shard` where it is not
        the default.
        """
        recipe = {name: value for name, value in asdict(self).items() if name not in self.MACHINE}
        if self.shard == type(self).shard:
            del recipe["shard"]
        return recipe


def check_batch(train: Train, where: str = "train") -> int:
    """Return the gradient accumulation steps that make up `global_batch`; raise ConfigError if it
    cannot be split.

    accumulation × micro_batch × processes == global_batch, always: the number of machines never
    changes the batch.
    """
    for name in ("global_batch", "micro_batch", "processes"):
        if getattr(train, name) < 1:
            raise ConfigError(f"{where}.{name} must be at least 1, got {getattr(train, name)}")
    per_pass = train.micro_batch * train.processes
    if train.global_batch % per_pass:
        fits = [
            n
            for n in range(1, train.global_batch + 1)
            if train.global_batch % (n * train.processes) == 0
        ]
        nearest = min(fits, key=lambda n: abs(n - train.micro_batch)) if fits else None
        hint = (
            f"the nearest that fits is micro_batch={nearest}"
            if fits
            else "change processes or global_batch"
        )
        split = f"micro_batch={train.micro_batch} × processes={train.processes}"
        raise ConfigError(
            f"{where}.global_batch={train.global_batch} cannot be split into {split}; {hint}"
        )
    return train.global_batch // per_pass
