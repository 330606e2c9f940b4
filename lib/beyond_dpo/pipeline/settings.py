"""What can be set of each paper's experiments; config reads the values from profiles/*.yaml."""

from dataclasses import field
from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from beyond_dpo.jobs.settings import (
    STRICT,
    AtLeastOne,
    Count,
    Decoding,
    Fractions,
    Grid,
    NotEmpty,
    NotNegative,
    PairLosses,
    Positive,
    PositiveShare,
    Precision,
    Seeds,
    Share,
    Train,
)

Recipe = Literal[
    "2 epochs",
    "3 epochs",
    "learning rate × 2",
    "learning rate × 4",
    "AdaGrad",
    "RMSprop",
    "β × 0.1",
    "β × 10",
]
Names = Annotated[tuple[str, ...], NotEmpty]
Betas = Annotated[tuple[Positive, ...], NotEmpty]
FusionWeights = Annotated[tuple[Share, ...], NotEmpty]
Methods = Annotated[tuple[PairLosses, ...], NotEmpty]


@dataclass(frozen=True, config=STRICT)
class World:
    """Which models, texts and rewards; a model is a pinned asset, a local folder or a hub id
    (`org/name@revision`).
    """

    target: str
    dataset: str  # imdb | fixtures | a hub id, a folder or a file, as preferences.read takes them
    dev_dataset: str = ""  # where dev prompts come from, "": the same
    test_dataset: str = ""
    pairs: Literal["sampled", "given"] = "sampled"  # from the SFT model, or the data set's own
    template: Literal["plain", "chat"] = (
        "plain"  # text continuation, or the tokenizer's chat template
    )
    sft_rows: Count = (
        0  # reviews the target is fine-tuned on; 0: the target already is the SFT model
    )
    sft_tokens: AtLeastOne = 64
    prompts: Count = 0  # prompts that preference pairs are sampled for
    dev_prompts: Count = 0
    test_prompts: Count = 0
    prompt_tokens: tuple[AtLeastOne, AtLeastOne] = (
        4,
        10,
    )  # shortest and longest beginning of a review
    samples: AtLeastOne = 4  # responses per prompt, the best and the worst make the pair
    gold_rows: Count = 0  # labelled reviews the gold reward is trained on (half A)
    reward_rows: Count = 0  # labelled reviews the reward model is trained on (half B)
    reward_model: str = (
        "minilm"  # encoder to fine-tune on half B; a finished reward model where reward_rows is 0
    )
    trust_remote_code: tuple[
        str, ...
    ] = ()  # reward models whose repository may bring code of its own
    precision: Precision = "bf16"  # in which rewards are trained and responses scored
    reward_words: AtLeastOne = (
        32  # of a review that a reward is trained on: as many as it will score
    )


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

    fractions: Fractions = (0.05, 0.1, 0.2, 0.4, 1.0)
    alphas: dict[PositiveShare, Grid] = field(
        default_factory=dict
    )  # fraction -> α grid of the search
    interpolation: Grid = (0.0, 0.3, 0.5, 0.7, 1.0)  # γ = 1 + α between SFT and aligned
    seeds: Seeds = (0,)  # training seeds; the first is drawn as the curve
    seed_fractions: tuple[
        PositiveShare, ...
    ] = ()  # fractions trained with every seed (the others: first seed only)
    dev_samples: AtLeastOne = 1  # responses per prompt for each α of the search
    test_samples: AtLeastOne = 2
    recipes: tuple[
        Recipe, ...
    ] = ()  # training recipes to compare with the default one, see expo.recipes
    recipe_fraction: PositiveShare = (
        0.2  # of the pairs, for the training recipes (epochs, learning rate, optimizer, β)
    )
    recipe_alphas: Grid = ()  # α grid of every recipe
    quality_fraction: PositiveShare = (
        0.1  # of the pairs, random against the longest chosen responses
    )
    pair_alphas: Grid = ()  # α grid of the lines that ExPO should not be applied to
    layers: Annotated[int, Field(ge=2)] = 30  # of the target, which the module grid halves
    module_alphas: Grid = ()  # α grid of attention, MLP and layer ranges
    search_evaluations: Annotated[int, Field(ge=4)] = (
        7  # α that a golden-section search may sample, 0 included
    )
    pairs: dict[str, tuple[str, str]] = field(
        default_factory=dict
    )  # published models: SFT, and aligned from it
    wrong_pairs: dict[str, tuple[str, str]] = field(
        default_factory=dict
    )  # that ExPO should not be applied to
    published_alphas: Grid = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)  # α grid of each of them
    # model that compares their answers with AlpacaEval's baseline; "": the reward model alone
    judge: str = ""
    judge_url: str = ""  # of its OpenAI-compatible endpoint, "": OpenAI's (machine)
    kl_prompts: Count = (
        32  # prompts of each split whose responses the SFT model scores too, for the KL
    )


@dataclass(frozen=True, config=STRICT)
class Mallows(Paper):
    """Settings of the MallowsPO experiments (arXiv 2405.14953)."""

    fraction: PositiveShare = 1.0  # of the pairs that every model is trained on
    methods: Methods = (
        "dpo",
        "mallows_theta",
        "mallows_phi",
    )  # losses of the controlled-sentiment frontier
    betas: Betas = ()  # of the frontier
    seeds: Seeds = (
        0,
        1,
        2,
    )  # training seeds of the frontier; the first is the one of the other tables
    plug_ins: dict[str, dict[str, float]] = field(
        default_factory=dict
    )  # loss -> its settings, with and without weight
    grid_methods: Methods = ("dpo", "mallows_theta")
    grid_betas: tuple[Positive, ...] = ()
    grid_lrs: tuple[Positive, ...] = ()
    grid_elsewhere: bool = False  # judged on prompts from elsewhere too
    elsewhere: tuple[str, ...] = ("amazon",)  # other domains of the same task
    elsewhere_prompts: AtLeastOne = 64  # from each of them
    rated: Literal["movie", "amazon", "fixtures"] = "movie"  # sentences with human ratings
    rated_rows: AtLeastOne = 1000
    bandit_betas: Betas = ()
    bandit_steps: AtLeastOne = 500_000


@dataclass(frozen=True, config=STRICT)
class Source:
    """Where responses that WRPO learns from come from."""

    kind: Literal[
        "model", "endpoint", "recorded", "human"
    ]  # human: how the reviewers themselves went on
    # a model's asset, folder or hub id; an endpoint's model name; a file of recorded answers
    ref: str = ""
    url: str = (
        ""  # of an OpenAI-compatible endpoint (machine, never in a key); its key is OPENAI_API_KEY
    )
    ask: str = ""  # what a chat model is asked, with {prompt} in it; "" continues the text
    terms: str = ""  # what a user should know before it is used


@dataclass(frozen=True, config=STRICT)
class Wrpo(Paper):
    """Settings of the WRPO experiments (arXiv 2412.03187); `sft` is also how Target-SFT learns the
    best responses.
    """

    known_sources: dict[str, Source]
    sources: Names  # those that are fused
    source_sets: tuple[Names, ...]  # other choices of them, to compare
    sampling: (
        Decoding  # of sources and target for the training data; `decoding` is for what is judged
    )
    sft_share: Annotated[float, Field(gt=0, lt=1)] = 1 / 3  # of the prompts, for Target-SFT
    fraction: PositiveShare = (
        1.0  # of the quadruples that every model is trained on, another draw with each seed
    )
    seeds: Seeds = (0, 1, 2)
    objectives: dict[str, dict[str, float]] = field(default_factory=dict)  # loss -> its settings
    alphas: FusionWeights = (
        0.1,
        0.3,
        0.5,
        0.7,
        1.0,
    )  # largest fusion coefficients, dynamic and static
    test_samples: AtLeastOne = 1
