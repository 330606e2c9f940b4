"""What can be set, of the machine and of each paper's experiments; config reads the values from profiles/*.yaml."""

from dataclasses import asdict, field
from typing import Annotated, ClassVar, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)  # an int is a float, "1" and True are not
Losses = Literal["sft", "dpo", "ipo", "simpo", "mallows_theta", "mallows_phi", "mallows_ipo", "mallows_simpo",
                 "wrpo", "wrpo_ipo", "wrpo_simpo", "hybrid"]  # fmt: skip
FUSED = ("source_chosen", "target_chosen", "rejected")  # WRPO's responses, in the order that its losses take them

# Numbers that no run can use are refused when a configuration is loaded.
Count = Annotated[int, Field(ge=0)]
AtLeastOne = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
PositiveShare = Annotated[float, Field(gt=0, le=1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Seeds = Annotated[tuple[Count, ...], Field(min_length=1)]
Dtype = Literal["float32", "bfloat16", "float16"]
Precision = Literal["bf16", "fp32"]


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
    save_dtype: Dtype = "float32"  # small Δθ vanish in bf16 rounding, see README "known differences"
    parts: AtLeastOne = 1  # equal parts of the training, after each of which the model is saved
    zero: Annotated[int, Field(ge=0, le=3)] = 0  # DeepSpeed ZeRO stage (machine, never in a key)
    offload: bool = False  # optimizer state in host memory (machine)
    gradient_checkpointing: bool = False  # (machine)
    attention: Literal["auto", "sdpa", "flash_attention_2"] = "auto"  # see reference.attention (machine)
    lora_rank: Count = 0  # train a low-rank adapter of all linear layers (Hu et al., arXiv 2106.09685); 0: every weight
    lora_alpha: Positive = 16.0  # the adapter's step is lora_alpha / lora_rank · BA
    processes: int = 1  # of all nodes (machine)
    launcher: Literal["deepspeed", "torchrun", "srun", "plain"] = "deepspeed"  # (machine)
    checkpoint_every: AtLeastOne = 50  # optimizer steps between checkpoints to resume from (machine)

    MACHINE: ClassVar = (
        "micro_batch zero offload gradient_checkpointing attention processes launcher checkpoint_every".split()
    )

    def recipe(self) -> dict:
        """Return what the result depends on: every field but the machine's, and but what this loss does not know."""
        unused = ["epsilon"] * (self.loss != "mallows_phi") + ["parts"] * (self.parts == 1)
        unused += ["alpha", "dynamic"] * (not self.loss.startswith("wrpo"))
        unused += ["lora_rank", "lora_alpha"] * (not self.lora_rank)
        return {k: v for k, v in asdict(self).items() if k not in [*self.MACHINE, *unused]}


@dataclass(frozen=True, config=STRICT)
class Decoding:
    """How responses are sampled (ExPO: temperature 0.7, top-k 40, top-p 0.9, penalties 0.1; arXiv 2404.16792)."""

    backend: Literal["vllm", "transformers"] = "vllm"  # part of the key, never a silent fallback
    temperature: NotNegative = 0.7
    top_k: Annotated[int, Field(ge=-1)] = 40  # 0 or -1: all tokens
    top_p: PositiveShare = 0.9
    presence_penalty: Penalty = 0.1
    frequency_penalty: Penalty = 0.1
    max_tokens: AtLeastOne = 2048
    dtype: Dtype = "bfloat16"
    max_model_len: AtLeastOne = 4096
    together: bool = True  # all α of an adapter in one vLLM batch; on two cores a swap for each takes half as long
    shard: AtLeastOne = 512  # prompts that are sampled in one go, each shard with a seed of its own
    engines: AtLeastOne = 1  # that take shards in turn, each on devices of its own (machine, never in a key)
    tensor_parallel: AtLeastOne = 1  # devices that one vLLM engine spreads its model over (machine)
    gpu_share: PositiveShare = 0.45  # of a card's memory for a vLLM engine, beside a reward model (machine)
    launcher: Literal["", "deepspeed", "torchrun", "srun"] = ""  # "": engines live here; else in a job (machine)

    MACHINE: ClassVar = "engines tensor_parallel gpu_share launcher".split()

    def recipe(self) -> dict:
        """Return what responses depend on: every field but the machine's; `shard` where it is not the default.

        What is sampled together is another result, with a key that names it.
        """
        given, default = asdict(self), type(self).shard
        return {k: v for k, v in given.items() if k not in (*self.MACHINE, "together") and (k, v) != ("shard", default)}


@dataclass(frozen=True, config=STRICT)
class World:
    """Which models, texts and rewards; a model is a pinned asset, a local folder or a hub id (`org/name@revision`)."""

    target: str
    dataset: str  # imdb | fixtures | a hub id, a folder or a file, as preferences.read takes them
    dev_dataset: str = ""  # where dev prompts come from, "": the same
    test_dataset: str = ""
    pairs: Literal["sampled", "given"] = "sampled"  # from the SFT model, or the data set's own
    template: Literal["plain", "chat"] = "plain"  # text continuation, or the tokenizer's chat template
    sft_rows: Count = 0  # reviews the target is fine-tuned on; 0: the target already is the SFT model
    sft_tokens: AtLeastOne = 64
    prompts: Count = 0  # prompts that preference pairs are sampled for
    dev_prompts: Count = 0
    test_prompts: Count = 0
    prompt_tokens: tuple[AtLeastOne, AtLeastOne] = (4, 10)  # shortest and longest beginning of a review
    samples: AtLeastOne = 4  # responses per prompt, the best and the worst make the pair
    gold_rows: Count = 0  # labelled reviews the gold reward is trained on (half A)
    reward_rows: Count = 0  # labelled reviews the reward model is trained on (half B)
    reward_model: str = "minilm"  # encoder to fine-tune on half B; a finished reward model where reward_rows is 0
    trust_remote_code: tuple[str, ...] = ()  # reward models whose repository may bring code of its own
    precision: Precision = "bf16"  # in which rewards are trained and responses scored
    reward_words: AtLeastOne = 32  # of a review that a reward is trained on: as many as it will score


@dataclass(frozen=True, config=STRICT)
class Needs:
    """What a machine must offer, and about how long one notebook takes."""

    gpus: Count
    gpu_gb: Count
    memory_gb: Count
    disk_gb: Count
    hours: NotNegative


@dataclass(frozen=True, config=STRICT)
class Paper:
    """What the experiments of every paper need."""

    profile: str
    world: World
    sft: Train
    train: Train
    decoding: Decoding
    needs: Needs


@dataclass(frozen=True, config=STRICT)
class Expo(Paper):
    """Settings of the ExPO experiments (arXiv 2404.16792)."""

    fractions: tuple[PositiveShare, ...] = (0.05, 0.1, 0.2, 0.4, 1.0)
    alphas: dict[float, tuple[float, ...]] = field(default_factory=dict)  # fraction -> α grid of the search
    interpolation: tuple[float, ...] = (0.0, 0.3, 0.5, 0.7, 1.0)  # γ = 1 + α between SFT and aligned
    seeds: Seeds = (0,)  # training seeds; the first is drawn as the curve
    seed_fractions: tuple[float, ...] = ()  # fractions trained with every seed (the others: first seed only)
    dev_samples: AtLeastOne = 1  # responses per prompt for each α of the search
    test_samples: AtLeastOne = 2
    recipes: tuple[str, ...] = ()  # training recipes to compare with the default one, see expo.recipes
    recipe_fraction: PositiveShare = 0.2  # of the pairs, for the training recipes (epochs, learning rate, optimizer, β)
    recipe_alphas: tuple[float, ...] = ()  # α grid of every recipe
    quality_fraction: PositiveShare = 0.1  # of the pairs, random against the longest chosen responses
    pair_alphas: tuple[float, ...] = ()  # α grid of the lines that ExPO should not be applied to
    layers: AtLeastOne = 30  # of the target, which the module grid halves
    module_alphas: tuple[float, ...] = ()  # α grid of attention, MLP and layer ranges
    search_evaluations: Annotated[int, Field(ge=4)] = 7  # α that a golden-section search may sample, 0 included
    pairs: dict[str, tuple[str, str]] = field(default_factory=dict)  # published models: SFT, and aligned from it
    wrong_pairs: dict[str, tuple[str, str]] = field(default_factory=dict)  # that ExPO should not be applied to
    published_alphas: tuple[float, ...] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)  # α grid of each of them
    judge: str = ""  # model that compares their answers with AlpacaEval's baseline; "": the reward model alone
    judge_url: str = ""  # of its OpenAI-compatible endpoint, "": OpenAI's (machine)
    kl_prompts: Count = 32  # prompts of each split whose responses the SFT model scores too, for the KL


@dataclass(frozen=True, config=STRICT)
class Mallows(Paper):
    """Settings of the MallowsPO experiments (arXiv 2405.14953)."""

    fraction: PositiveShare = 1.0  # of the pairs that every model is trained on
    methods: tuple[str, ...] = ("dpo", "mallows_theta", "mallows_phi")  # losses of the controlled-sentiment frontier
    betas: tuple[Positive, ...] = ()  # of the frontier
    seeds: Seeds = (0, 1, 2)  # training seeds of the frontier; the first is the one of the other tables
    plug_ins: dict[str, dict[str, float]] = field(default_factory=dict)  # loss -> its settings, with and without weight
    grid_methods: tuple[str, ...] = ("dpo", "mallows_theta")
    grid_betas: tuple[Positive, ...] = ()
    grid_lrs: tuple[Positive, ...] = ()
    grid_elsewhere: bool = False  # judged on prompts from elsewhere too
    elsewhere: tuple[str, ...] = ("amazon",)  # other domains of the same task
    elsewhere_prompts: AtLeastOne = 64  # from each of them
    rated: str = "movie"  # sentences with human ratings
    rated_rows: AtLeastOne = 1000
    bandit_betas: tuple[Positive, ...] = ()
    bandit_steps: AtLeastOne = 500_000


@dataclass(frozen=True, config=STRICT)
class Source:
    """Where responses that WRPO learns from come from."""

    kind: Literal["model", "endpoint", "recorded", "human"]  # human: how the reviewers themselves went on
    ref: str = ""  # a model's asset, folder or hub id; an endpoint's model name; a file of recorded answers
    url: str = ""  # of an OpenAI-compatible endpoint (machine, never in a key); its key is OPENAI_API_KEY
    ask: str = ""  # what a chat model is asked, with {prompt} in it; "" continues the text
    terms: str = ""  # what a user should know before it is used


@dataclass(frozen=True, config=STRICT)
class Wrpo(Paper):
    """Settings of the WRPO experiments (arXiv 2412.03187); `sft` is also how Target-SFT learns the best responses."""

    known_sources: dict[str, Source]
    sources: tuple[str, ...]  # those that are fused
    source_sets: tuple[tuple[str, ...], ...]  # other choices of them, to compare
    sampling: Decoding  # of sources and target for the training data; `decoding` is for what is judged
    sft_share: Annotated[float, Field(gt=0, lt=1)] = 1 / 3  # of the prompts, for Target-SFT
    fraction: PositiveShare = 1.0  # of the quadruples that every model is trained on, another draw with each seed
    seeds: Seeds = (0, 1, 2)
    objectives: dict[str, dict[str, float]] = field(default_factory=dict)  # loss -> its settings
    alphas: tuple[Share, ...] = (0.1, 0.3, 0.5, 0.7, 1.0)  # largest fusion coefficients, dynamic and static
    test_samples: AtLeastOne = 1
