"""What can be set of each paper's experiments; config reads the values from profiles/*.yaml."""

from dataclasses import field
from typing import Annotated, Any, Literal

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
    "epochs × 2",
    "epochs × 3",
    "learning rate × 2",
    "learning rate × 4",
    "AdaGrad",
    "RMSprop",
    "β × 0.1",
    "β × 10",
]
Names = Annotated[tuple[str, ...], NotEmpty]
Betas = Annotated[tuple[Positive, ...], NotEmpty]
NotNegatives = Annotated[tuple[NotNegative, ...], NotEmpty]
Sizes = Annotated[tuple[AtLeastOne, ...], NotEmpty]
FusionWeights = Annotated[tuple[Share, ...], NotEmpty]
# of a bandit's source, in standard deviations: how much stronger and how far away it is
Strength = Annotated[float, Field(ge=-10, le=10)]
Distance = Annotated[float, Field(ge=0, le=10)]
# α of a model's line beside the model itself, after its start at −1
OnLine = Annotated[float, Field(gt=-1, le=8)]
Methods = Annotated[tuple[PairLosses, ...], NotEmpty]


@dataclass(frozen=True, config=STRICT)
class World:
    """Which models, texts and rewards.

    A model is a pinned asset, a local folder or a hub id (`org/name@revision`).
    """

    target: str
    dataset: str  # imdb | fixtures | a hub id, a folder or a file, as preferences.read takes them
    dev_dataset: str = ""  # where dev prompts come from, "": the same
    test_dataset: str = ""
    pairs: Literal["sampled", "given"] = "sampled"  # from the SFT model, or the data set's own
    # text continuation, or the tokenizer's chat template
    template: Literal["plain", "chat"] = "plain"
    # reviews the target is fine-tuned on; 0: the target already is the SFT model
    sft_rows: Count = 0
    sft_tokens: AtLeastOne = 64
    prompts: Count = 0  # prompts that preference pairs are sampled for
    # disjoint sets of that many prompts: a training with seed s learns from the pairs of set s
    # modulo their number; data sets that are not embedded have one
    pools: AtLeastOne = 1
    dev_prompts: Count = 0
    test_prompts: Count = 0
    prompt_tokens: tuple[AtLeastOne, AtLeastOne] = (4, 10)  # shortest and longest beginning
    samples: AtLeastOne = 4  # responses per prompt, the best and the worst make the pair
    gold_rows: Count = 0  # labelled reviews the gold reward is trained on (half A)
    # "words": bag of words; "ngrams": up to three words, and what repeats; else an encoder to
    # fine-tune
    gold_model: str = "words"
    reward_rows: Count = 0  # labelled reviews the reward model is trained on (half B)
    # as gold_model, on half B; a finished reward model where reward_rows is 0
    reward_model: str = "minilm"
    # rewards are trained on as many spoiled openings too, labelled 0, so that they know a bad text
    # when they see one
    spoiled: bool = False
    # reward models whose repository may bring code of its own
    trust_remote_code: tuple[str, ...] = ()
    # the SFT model as a point of a table is sampled as α = −1 of an aligned model, which has its
    # values in that model's dtype: so were results that are frozen
    sft_at_alpha: bool = False
    precision: Precision = "bf16"  # in which rewards are trained and responses scored
    # words of a review that a reward is trained on: as many as it will score; an encoder is trained
    # on up to twice as many tokens
    reward_words: AtLeastOne = 32


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


@dataclass(frozen=True, config=STRICT, kw_only=True)
class Judged:
    """Who judges the answers to the benchmarks of a paper; in no key but those of its verdicts."""

    # model that compares answers with the baselines of AlpacaEval and Arena-Hard; "": nobody is
    # asked
    judge: str = ""
    mt_bench_judge: str = ""  # model that rates MT-Bench's answers; "": the judge
    judge_url: str = ""  # of their OpenAI-compatible endpoint, "": OpenAI's (machine)


@dataclass(frozen=True, config=STRICT)
class Lines(Paper):
    """Which models ExPO starts from, and which α it tries on which lines."""

    fractions: Fractions = (0.05, 0.1, 0.2, 0.4, 1.0)
    # fraction -> α grid of the search
    alphas: dict[PositiveShare, Grid] = field(default_factory=dict)
    interpolation: Grid = (0.0, 0.3, 0.5, 0.7, 1.0)  # γ = 1 + α between SFT and aligned
    seeds: Seeds = (0,)  # training seeds; the first is drawn as the curve
    # fraction -> how many of the seeds it is trained with; the others are with all
    fewer_seeds: dict[PositiveShare, AtLeastOne] = field(default_factory=dict)
    line_seeds: AtLeastOne = 3  # how many of the seeds the lines of `recipes` and below have
    # name -> loss and its settings, to compare with DPO on all pairs
    losses: dict[str, dict[str, Any]] = field(default_factory=dict)
    checkpoints: Annotated[int, Field(ge=2)] = 8  # of a training whose way is looked at
    ranks: tuple[AtLeastOne, ...] = (1, 4, 16)  # of Δθ, to see what a few directions keep
    # (learning rate, epochs) of plain DPO on all pairs that were tried before anything else; the
    # one with the most reward on dev prompts is what `train` says
    tried: tuple[tuple[Positive, AtLeastOne], ...] = ()
    dev_samples: AtLeastOne = 1  # responses per prompt for each α of the search
    test_samples: AtLeastOne = 2
    # training recipes to compare with the default one, see expo.recipes
    recipes: tuple[Recipe, ...] = ()
    # share of the pairs that the training recipes (epochs, learning rate, optimizer, β) get
    recipe_fraction: PositiveShare = 0.2
    recipe_alphas: Grid = ()  # α grid of every recipe
    # shares of the pairs: a random draw against those with the longest chosen responses
    quality_fractions: Fractions = (0.1, 0.2, 0.4)
    pair_alphas: Grid = ()  # α grid of the lines that ExPO should not be applied to
    layers: Annotated[int, Field(ge=2)] = 30  # of the target, which the module grid halves
    module_alphas: Grid = ()  # α grid of attention, MLP and layer ranges
    # number of α that a golden-section search may sample, 0 included
    search_evaluations: Annotated[int, Field(ge=4)] = 7
    # name -> published models: SFT, and aligned from it
    pairs: dict[str, tuple[str, str]] = field(default_factory=dict)
    # name -> two models that ExPO should not be applied to
    wrong_pairs: dict[str, tuple[str, str]] = field(default_factory=dict)
    published_alphas: Grid = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)  # α grid of each of them


@dataclass(frozen=True, config=STRICT)
class Expo(Judged, Lines):  # in this order, so that a table of settings lists the judge after α
    """Settings of the ExPO experiments (arXiv 2404.16792)."""

    # number of prompts of each split whose responses the SFT model scores too, for the KL
    kl_prompts: Count = 32


@dataclass(frozen=True, config=STRICT)
class Contextual:
    """Which contextual bandits are drawn, and who learns from them (beyond_dpo.contextual)."""

    contexts: AtLeastOne = 16
    arms: Annotated[int, Field(ge=2)] = 5
    dimensions: AtLeastOne = 8  # of the policy that all contexts share
    # standard deviations of log(-log φ) over the contexts
    spreads: NotNegatives = (0.0, 0.2, 0.5, 1.0, 1.5)
    pairs: Sizes = (100, 400, 1600)
    noises: NotNegatives = (0.5, 1.0, 2.0)  # of the estimates of log(-log φ)
    steps: Sizes = (1, 10, 100)  # after which policies are measured
    lr: Positive = 0.3
    # nats at which policies are compared: the first everywhere, the others in one world
    kls: Betas = (0.5, 0.2, 0.8)
    seeds: AtLeastOne = 100  # worlds with their pairs, the same for all methods
    first_seed: Count = 1000


@dataclass(frozen=True, config=STRICT)
class Voters:
    """Which pairs of rated sentences are voted on, and which linear models learn from the votes."""

    pairs: AtLeastOne = 256  # that a language model learns from
    dev: AtLeastOne = 1000  # sentences on which the linear model's penalty is chosen
    test: AtLeastOne = 1000  # sentences on which scores are compared with the crowd
    # of the other raters, who put the same sentence of an agreed pair first: at least
    agreed: Share = 0.95
    contested: Share = 0.6  # and of a contested pair: at most
    gap: tuple[NotNegative, NotNegative] = (0.8, 1.2)  # of mean ratings, of pairs at equal gap
    outer: PositiveShare = 0.25  # of those pairs, from each end of the agreement
    linear_pairs: Sizes = (512, 2048)
    shares: Fractions = (0.25, 0.5, 0.75)  # of contested pairs in the linear model's mixtures
    penalties: Betas = (3e-4, 3e-3, 0.03, 0.3)  # of the linear model's weights
    linear_seeds: Annotated[int, Field(ge=2)] = 40


@dataclass(frozen=True, config=STRICT)
class Mallows(Judged, Paper):
    """Settings of the MallowsPO experiments (arXiv 2405.14953)."""

    fraction: PositiveShare = 1.0  # of the pairs that every model is trained on
    # of the responses that pairs are made of; None: as what is judged
    sampling: Decoding | None = None
    test_samples: AtLeastOne = 1  # responses to each prompt that is judged
    table_seeds: AtLeastOne = 1  # how many of the seeds the plug-ins and the grid have
    # dev prompts, on which nothing is chosen here, are judged beside the test prompts
    judge_dev: bool = False
    # losses of the controlled-sentiment frontier
    methods: Methods = ("dpo", "mallows_theta", "mallows_phi")
    betas: Betas = ()  # of the frontier
    # training seeds of the frontier; the first is the one of the other tables
    seeds: Seeds = (0, 1, 2)
    # loss -> its settings, with and without weight
    plug_ins: dict[str, dict[str, float]] = field(default_factory=dict)
    grid_methods: Methods = ("dpo", "mallows_theta")
    grid_betas: tuple[Positive, ...] = ()
    grid_lrs: tuple[Positive, ...] = ()
    grid_elsewhere: bool = False  # the grid is judged on prompts from elsewhere too
    elsewhere: tuple[str, ...] = ("amazon",)  # other domains of the same task
    elsewhere_prompts: AtLeastOne = 64  # from each of them
    rated: Literal["movie", "amazon", "fixtures"] = "movie"  # sentences with human ratings
    rated_rows: AtLeastOne = 1000
    bandit_betas: Betas = ()
    bandit_steps: AtLeastOne = 500_000
    contextual: Contextual = field(default_factory=Contextual)
    # c of the prompts on which people agree, and of the others, where labels are σ(c · Δgold)
    known: tuple[Positive, Positive] = (2.0, 0.1)
    # places on the line from the SFT model to a trained one, for reward at equal KL; 0 is its end
    known_alphas: Grid = (-0.5, -0.25, 0.0)
    voters: Voters = field(default_factory=Voters)


@dataclass(frozen=True, config=STRICT)
class Source:
    """Where some of the responses that WRPO learns from are taken."""

    # human: how the reviewers themselves went on; target: the target itself; expo: the model that
    # notebook 11 aligns on all pairs, pushed on to the largest α that passes the gate
    kind: Literal["model", "endpoint", "recorded", "human", "target", "expo"]
    # a model's asset, folder or hub id; an endpoint's model name; a file of recorded answers
    ref: str = ""
    # address of an OpenAI-compatible endpoint (machine, never in a key), whose secret is
    # OPENAI_API_KEY
    url: str = ""
    ask: str = ""  # what a chat model is asked, with {prompt} in it; "" continues the text
    samples: Count = 0  # responses per prompt of a model that is sampled, 0: world.samples
    only: Literal["", "positive"] = ""  # of people: those whose review has this label; "": all
    terms: str = ""  # what a user should know before it is used


@dataclass(frozen=True, config=STRICT)
class Wrpo(Judged, Paper):
    """Settings of the WRPO experiments (arXiv 2412.03187).

    `sft` is also how Target-SFT learns the best responses.
    """

    known_sources: dict[str, Source]
    sources: Names  # those that are fused
    source_sets: tuple[Names, ...]  # other choices of them, to compare
    # of sources and target for the training data; `decoding` is for what is judged
    sampling: Decoding
    sft_share: Annotated[float, Field(gt=0, lt=1)] = 1 / 3  # of the prompts, for Target-SFT
    # share of the quadruples that every model is trained on, another draw with each seed
    fraction: PositiveShare = 1.0
    seeds: Seeds = (0, 1, 2)
    objectives: dict[str, dict[str, float]] = field(default_factory=dict)  # loss -> its settings
    # largest fusion coefficients, dynamic and static
    alphas: FusionWeights = (0.1, 0.3, 0.5, 0.7, 1.0)
    ablation_seeds: AtLeastOne = 1  # how many of the seeds the ablations have
    test_samples: AtLeastOne = 1
    # number of prompts that judge: the first ones of the world's last pool, from which then nobody
    # may learn; 0: the world's test prompts judge
    held_out: Count = 0
    # number of prompts that judge whose responses the target scores too, for the KL; 0: all
    kl_prompts: Count = 0
    # further α of the line from the start through DPO, so that its reward is known at other KL
    kl_alphas: tuple[OnLine, ...] = ()
    # sets of sources from which the target itself learns, each apart: what must a source be?
    compared: tuple[Names, ...] = ()
    compared_alphas: FusionWeights = (0.1, 0.5)  # largest fusion coefficients with each of them
    learnt: AtLeastOne = 64  # prompts that a training learns from there, of its seed's pool
    # a set is strong where its best beats the target's best by this, mean σ(gold), on dev prompts
    margin: Positive = 0.05
    # the bandit's sources: every pair of these
    bandit_strengths: Annotated[tuple[Strength, ...], NotEmpty] = (-1.0, 0.0, 1.0, 2.0, 3.0, 4.0)
    bandit_distances: Annotated[tuple[Distance, ...], NotEmpty] = (0.0, 1.0, 2.0, 3.0, 4.0)
    bandit_alphas: FusionWeights = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)  # constant
    bandit_rising: FusionWeights = (0.1, 1.0)  # largest of those that rise from 0
    bandit_seeds: Annotated[int, Field(ge=2)] = 120
    # (strength, distance) of the sources for which one setting more is varied: how many prompts,
    # the reward model's noise, and the KL (nats) at which methods are compared: sets of 64
    # responses allow about 4
    bandit_varied: tuple[tuple[Strength, Distance], ...] = ((0.0, 0.0), (2.0, 0.0), (2.0, 3.0))
    bandit_prompts: tuple[AtLeastOne, ...] = (16, 256, 1024)
    bandit_noises: tuple[NotNegative, ...] = (0.0, 3.0)
    bandit_kls: tuple[Positive, ...] = (0.25, 2.0)
