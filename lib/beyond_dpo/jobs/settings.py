"""What can be set of a training and of a sampling; jobs read nothing else of a configuration."""

from dataclasses import asdict
from typing import Annotated, ClassVar, Literal, get_args

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

# An int is taken as a float, but "1" and True are no numbers. Defaults are checked too: one that is
# out of range, such as an empty grid, has to be set by the profile.
STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, validate_default=True)
# The losses, each in one of these lists. The table losses.LOSSES says all else of them, but needs
# torch, and settings are read without it: a test compares the two.
# Each of these has a weighted form (MallowsPO) and a fused one (WRPO).
PlainLosses = Literal["dpo", "ipo", "simpo"]
# on a chosen and a rejected response
PairLosses = Literal[PlainLosses, "mallows_theta", "mallows_phi", "mallows_ipo", "mallows_simpo"]
# on WRPO's three responses, with an α
FusionLosses = Literal["wrpo", "wrpo_ipo", "wrpo_simpo"]
Losses = Literal["sft", PairLosses, FusionLosses, "hybrid"]
# Settings that came after the first results, and the losses that use them. They stay out of the
# recipes of all other losses, so that no key changed with them.
USED_BY = {
    "epsilon": ("mallows_phi",),
    "alpha": get_args(FusionLosses),
    "dynamic": get_args(FusionLosses),
}

# The columns of a training's log that the clock decides; all others repeat.
CLOCK = ("rows_per_s", "tokens_per_s", "computed_tokens_per_s", "flops_per_s", "mfu")

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
    """A key or value of a configuration is not usable; the message names the nearest valid one."""


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
    # adamw_8bit keeps its two moments in 8 bits (torchao): 2 bytes a weight in place of 8
    optimizer: Literal["adamw", "adamw_8bit", "adagrad", "rmsprop"] = "adamw"
    weight_decay: NotNegative = 0.0
    warmup: Share = 0.1  # fraction of the optimizer steps; then cosine to zero
    max_grad_norm: NotNegative = 1.0
    max_prompt: AtLeastOne = 64  # tokens kept of a prompt (its end)
    max_length: AtLeastOne = 128  # tokens kept of prompt and response together
    precision: Precision = "bf16"  # bf16 is autocast over float32 master weights
    # small Δθ vanish in bf16 rounding, see docs/differences.md
    save_dtype: Dtype = "float32"
    parts: AtLeastOne = 1  # equal parts of the training, after each of which the model is saved
    zero: Annotated[int, Field(ge=0, le=3)] = 0  # DeepSpeed ZeRO stage (machine, never in a key)
    offload: bool = False  # optimizer state in host memory (machine)
    gradient_checkpointing: bool = False  # (machine)
    # see attention.choose (machine)
    attention: Literal["auto", "sdpa", "flex_attention", "flash_attention_2"] = "auto"
    compile: bool = False  # torch.compile of the decoder's layers: a minute, then faster (machine)
    # train a low-rank adapter of all linear layers (Hu et al., arXiv 2106.09685); 0: every weight
    lora_rank: Count = 0
    lora_alpha: Positive = 16.0  # the adapter's step is lora_alpha / lora_rank · BA
    processes: int = 1  # of all nodes (machine)
    launcher: Literal["deepspeed", "torchrun", "srun", "plain"] = "deepspeed"  # (machine)
    checkpoint_every: AtLeastOne = 50  # optimizer steps between two checkpoints (machine)

    MACHINE: ClassVar = (
        "micro_batch",
        "zero",
        "offload",
        "gradient_checkpointing",
        "attention",
        "compile",
        "processes",
        "launcher",
        "checkpoint_every",
    )

    def recipe(self) -> dict:
        """Return what the result depends on.

        That is every field but the machine's, those that this loss does not know, and `parts` and
        the adapter's where they are not used.
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
    """How responses are sampled.

    ExPO (arXiv 2404.16792): temperature 0.7, top-k 40, top-p 0.9, penalties 0.1.
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
    # engines that take shards in turn, each on devices of its own (machine, never in a key)
    engines: AtLeastOne = 1
    tensor_parallel: AtLeastOne = 1  # devices that one vLLM engine spreads its model over (machine)
    # share of a card's memory for a vLLM engine, which leaves room for a reward model (machine)
    gpu_share: PositiveShare = 0.45
    # "": the engines live in this process; else they are a job of their own (machine)
    launcher: Literal["", "deepspeed", "torchrun", "srun"] = ""

    MACHINE: ClassVar = ("engines", "tensor_parallel", "gpu_share", "launcher")

    def recipe(self) -> dict:
        """Return what responses depend on.

        That is every field but the machine's, and `shard` only where it is not the default.
        """
        left_out = list(self.MACHINE)
        if self.shard == type(self).shard:
            left_out.append("shard")
        return {name: value for name, value in asdict(self).items() if name not in left_out}


def check_batch(train: Train, where: str = "train") -> int:
    """Return the gradient accumulation steps that make up `global_batch`.

    accumulation × micro_batch × processes == global_batch, always: the number of machines never
    changes the batch. Raises ConfigError if it cannot be split.
    """
    for name in ("global_batch", "micro_batch", "processes"):
        value = getattr(train, name)
        if value < 1:
            raise ConfigError(f"{where}.{name} must be at least 1, got {value}")
    rows_per_pass = train.micro_batch * train.processes
    if train.global_batch % rows_per_pass == 0:
        return train.global_batch // rows_per_pass
    nearest = _nearest_micro_batch(train)
    if nearest is None:
        advice = "change processes or global_batch"
    else:
        advice = f"the nearest that fits is micro_batch={nearest}"
    split = f"micro_batch={train.micro_batch} × processes={train.processes}"
    raise ConfigError(
        f"{where}.global_batch={train.global_batch} cannot be split into {split}; {advice}"
    )


def _nearest_micro_batch(train: Train) -> int | None:
    """Return the micro-batch nearest to the one that is set which splits the batch, if any does."""
    sizes = range(1, train.global_batch + 1)
    fitting = [size for size in sizes if train.global_batch % (size * train.processes) == 0]
    return min(fitting, key=lambda size: abs(size - train.micro_batch), default=None)
