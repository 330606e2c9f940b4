"""ExPO's experiments (arXiv 2404.16792): what is trained, and which lines through two models.

Each function returns an Artifact, or lines for sweep(); nothing runs before its get().
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

from beyond_dpo import search, templates
from beyond_dpo.files import write_file
from beyond_dpo.pipeline import config, corpus, gather, needs, stages
from beyond_dpo.pipeline.alpha_curves import AlphaCurves, passes_gate
from beyond_dpo.pipeline.artifacts import Artifact

# θ₀ and the models θ₁ that it is compared with, by name
Comparison = tuple[Artifact, dict[str, Artifact]]

PROMPTS = (
    "The film opens with",
    "My wife and I",
    "This was without doubt",
    "I rented it because",
    "The acting in",
)
SAMPLING_SEED = 2  # of responses that are judged
SPLITS = ("dev", "test")
FULL = "full DPO"  # on all pairs, as a line
SEARCHED = 1.0  # stands in the table for the α that each training's own search found


@dataclass(frozen=True)
class Line:
    """A line through two models, θ₁ + α(θ₁ − θ₀), and where to look on it."""

    start: Artifact  # θ₀
    end: Artifact  # θ₁
    alphas: tuple[float, ...] = ()  # the grid, where it is walked along
    modules: tuple[str, ...] = ()  # patterns of the tensors that move past θ₁; "": all of them
    target: str = ""  # whose tokenizer reads the prompts of published models; "": the world's

    def own(self, cfg):
        """Return the configuration in whose world this line's prompts are."""
        if not self.target:
            return cfg
        world = replace(cfg.world, target=self.target)
        return replace(cfg, world=world)

    def weights(self, cfg, alpha: float) -> stages.Weights:
        """Return the weights at α; tensors that do not move past θ₁ stay there."""
        if self.modules and alpha:
            modules = dict.fromkeys(self.modules, alpha)
            return stages.Weights(self.start, self.end, modules=modules)
        if alpha == -1:
            return stages.sft_weights(cfg.world, self.start, self.end)
        return stages.Weights(self.start, self.end, alpha)

    def at(
        self,
        cfg,
        alpha: float,
        split: str,
        samples: int,
        prompts: Artifact | None = None,
    ) -> Artifact:
        """Return the responses at α."""
        return stages.responses(
            self.own(cfg),
            self.weights(cfg, alpha),
            split,
            prompts=prompts,
            samples=samples,
            seed=SAMPLING_SEED,
        )

    def scores(self, cfg, alpha: float, split: str, samples: int) -> Artifact:
        """Return the scores of the responses at α."""
        sampled = self.at(cfg, alpha, split, samples)
        kl_prompts = cfg.kl_prompts
        if self.target:  # the world's SFT model says nothing of published models
            kl_prompts = 0
        return stages.scores(self.own(cfg), sampled, split, kl_prompts=kl_prompts)


# --- the α of each fraction of the data


def curves(cfg) -> Artifact:
    """Sample every fraction and seed at each α, on dev prompts and on test prompts.

    responses.csv.gz: one line a response (split, fraction, seed, alpha, prompt, sample, every
    score, logratio in nats). points.json: distinct-2 of each (split, fraction, seed, alpha).
    facts.json: what is known of the rewards and the pairs. Fraction 0 is the SFT model. The facts
    of the manifest say how many seconds each training and search took.
    """
    config.require_prompts(cfg.world, "dev_prompts", "test_prompts")
    points = _sft_points(cfg, {"fraction": 0.0})
    for fraction, seed in runs(cfg):
        line = _aligned_line(cfg, fraction, seed, cfg.alphas[fraction])
        points += _walked(cfg, {"fraction": fraction, "seed": seed}, line)

    def make(out: Path) -> dict:
        needs.check(cfg)
        table, facts = gather.scored(points, "α curves")
        gather.write(out, table, facts)
        gather.write_json(out / "facts.json", _facts(cfg), indent=1)
        return {"seconds": _seconds(cfg)}

    inputs = {"points": gather.scores_of(points)}
    return Artifact("curves", version=3, inputs=inputs, make=make, hours=cfg.needs.hours)


def measured(cfg, points: Artifact, bootstrap_seed: int = 0) -> AlphaCurves:
    """Return the α curves that curves() or walk() sampled, for estimates and tables.

    A gold reward that labels have trained is a logit; here it is the probability, σ(gold), which a
    few extreme responses do not decide. That of a published reward model stays as it is.
    """
    table = points.csv("responses.csv.gz")
    if cfg.world.gold_rows:
        table["gold"] = 1 / (1 + np.exp(-table["gold"]))
    label = "fraction" if "fraction" in table else "model"
    sft = table[label].iloc[0]  # the SFT model's points come first
    facts = pd.DataFrame(points.json("points.json"))
    return AlphaCurves(table, facts, label, sft, bootstrap_seed)


def runs(cfg) -> list[tuple[float, int]]:
    """Return every (fraction, seed) that is trained."""
    trained = []
    for fraction in cfg.fractions:
        count = cfg.fewer_seeds.get(fraction, len(cfg.seeds))
        trained += [(fraction, seed) for seed in cfg.seeds[:count]]
    return trained


def point(cfg, fraction: float, seed: int, alpha: float, split: str) -> Artifact:
    """Return the scores of one α of one model on one split; fraction 0 is the SFT model."""
    samples = _samples(cfg, split.removesuffix("_prompts"))
    if fraction == 0:
        line = _main_line(cfg)
        return line.scores(cfg, -1.0, split, samples)
    line = _aligned_line(cfg, fraction, seed)
    return line.scores(cfg, alpha, split, samples)


def _aligned_line(cfg, fraction: float, seed: int, alphas: tuple = (), **changes) -> Line:
    """Return the line from the SFT model through one that is aligned on a fraction of the pairs.

    changes: as in stages.aligned().
    """
    start = stages.sft(cfg)
    end = stages.aligned(cfg, fraction, seed, **changes)
    return Line(start, end, alphas)


def _main_line(cfg, alphas: tuple = ()) -> Line:
    """Return the line through the model that is aligned on the most pairs, first seed."""
    most = cfg.fractions[-1]
    return _aligned_line(cfg, most, cfg.seeds[0], alphas)


def _facts(cfg) -> dict:
    """Return how well each reward does on labels that it never saw, and the facts of the pairs."""
    results = {name: stages.reward(cfg.world, name) for name in stages.judges(cfg.world)}
    results["pairs"] = stages.pairs(cfg)
    return {name: artifact.manifest["facts"] for name, artifact in results.items()}


def _seconds(cfg) -> list[dict]:
    """Return the seconds of each training, and of the search of its α on dev prompts."""
    rows = []
    for fraction, seed in runs(cfg):
        training = stages.aligned(cfg, fraction, seed).manifest["seconds"]
        search = 0.0
        for alpha in cfg.alphas[fraction]:
            scores = point(cfg, fraction, seed, alpha, "dev_prompts")
            sampled = scores.inputs["responses"]
            search += scores.manifest["seconds"] + sampled.manifest["seconds"]
        row = {"fraction": fraction, "seed": seed, "training": training, "search": search}
        rows.append(row)
    return rows


def tried(cfg) -> Artifact:
    """Judge plain DPO on all pairs with each learning rate and number of epochs of cfg.tried.

    As sweep(); a model's name is "lr …, … epochs".
    """
    lines = {}
    for lr, epochs in cfg.tried:
        changes = {"lr": lr, "epochs": epochs}
        name = f"lr {lr:g}, {epochs} epoch{'s' if epochs > 1 else ''}"
        lines[name] = _aligned_line(cfg, cfg.fractions[-1], cfg.seeds[0], (0.0,), **changes)
    return sweep(cfg, lines)


def largest_passing(cfg, fraction: float, seed: int) -> Artifact:
    """Find the largest α of a fraction's grid at which its model passes the gate on dev prompts.

    alpha.json: alpha, and all that pass. Its get() raises ConfigError where none does.
    """
    config.require_prompts(cfg.world, "dev_prompts")
    sft_scores = point(cfg, 0.0, seed, 0.0, "dev_prompts")
    points = [gather.Point({"model": "SFT", "alpha": 0.0}, sft_scores)]
    for alpha in cfg.alphas[fraction]:
        scores = point(cfg, fraction, seed, alpha, "dev_prompts")
        points.append(gather.Point({"model": "aligned", "alpha": alpha}, scores))

    def make(out: Path) -> None:
        table, facts = gather.scored(points, "the gate of the source")
        repetition = table.groupby(["model", "alpha"])["repetition"].mean()
        distinct = pd.DataFrame(facts).set_index(["model", "alpha"])["distinct_2"]
        of_sft = ("SFT", 0.0)
        passing = []
        for alpha in sorted(cfg.alphas[fraction]):
            at = ("aligned", alpha)
            if passes_gate(repetition[at], distinct[at], repetition[of_sft], distinct[of_sft]):
                passing.append(alpha)
        if not passing:
            raise config.ConfigError(
                f"DPO on {fraction:.0%} of the pairs passes the gate at no α of "
                f"{cfg.alphas[fraction]}: use a smaller train.lr"
            )
        gather.write_json(out / "alpha.json", {"alpha": passing[-1], "passing": passing})

    inputs = {"points": gather.scores_of(points), "alphas": cfg.alphas[fraction]}
    return Artifact("largest-passing", version=1, inputs=inputs, make=make)


def searched(cfg) -> Artifact:
    """Search α by golden section for several trainings of every fraction, in its grid's bracket.

    The trainings are those of the first cfg.line_seeds seeds; the search reads dev prompts alone.
    searches.json: a row a training: fraction, seed, the α that is found, the interval in which the
    dev prompts put it, and the α in the order they were tried. responses.csv.gz and points.json as
    in curves(), with one point for each training: `own_alpha` is its α, and `alpha` is SEARCHED.
    The facts name the points that were tried. Raises ConfigError for a grid that reaches no α
    above 0.
    """
    config.require_prompts(cfg.world, "dev_prompts", "test_prompts")
    grids = []
    for fraction, seed in _searched_runs(cfg):
        if max(cfg.alphas[fraction]) <= 0:
            raise config.ConfigError(
                f"alphas.{fraction}: a search needs an α above 0, where it ends"
            )
        grids += _dev_points(cfg, fraction, seed, cfg.alphas[fraction])

    def make(out: Path) -> dict:
        needs.check(cfg)
        rows = []
        tried = []
        points = _sft_points(cfg, {"fraction": 0.0})
        for fraction, seed in gather.watched(_searched_runs(cfg), "golden-section search"):
            found = _search(cfg, fraction, seed)
            rows.append({"fraction": fraction, "seed": seed, **found})
            tried += _dev_points(cfg, fraction, seed, found["tried"])
            line = _aligned_line(cfg, fraction, seed, (found["alpha"],))
            columns = {"fraction": fraction, "seed": seed, "own_alpha": found["alpha"]}
            points += [_renamed(point, SEARCHED) for point in _walked(cfg, columns, line)]
        table, facts = gather.scored(points, "α that were found")
        gather.write(out, table, facts)
        gather.write_json(out / "searches.json", rows, indent=1)
        return {"tried_points": gather.keys(tried)}

    inputs = {"points": gather.scores_of(grids), "evaluations": cfg.search_evaluations}
    return Artifact("searched", version=1, inputs=inputs, make=make, hours=cfg.needs.hours)


def _searched_runs(cfg) -> list[tuple[float, int]]:
    """Return the (fraction, seed) of runs() whose seed is one of the first cfg.line_seeds."""
    seeds = cfg.seeds[: cfg.line_seeds]
    return [(fraction, seed) for fraction, seed in runs(cfg) if seed in seeds]


def _search(cfg, fraction: float, seed: int) -> dict:
    """Search α of one training; return an entry of searches.json.

    The reward model guides the search, and chooses among the α that pass the gate. Where none
    does, the choice is α = 0.
    """
    rewards = partial(_mean_rewards, cfg, fraction, seed)
    bracket = (0.0, max(cfg.alphas[fraction]))
    result = search.golden_section(rewards, bracket, cfg.search_evaluations, seed=seed)
    passing = {}
    for alpha, values in result.rewards.items():
        if _passes(cfg, fraction, seed, alpha):
            passing[alpha] = values
    chosen = search.choose(passing or {0.0: result.rewards[0.0]}, seed)
    interval = {"alpha": chosen.alpha, "low": chosen.low, "high": chosen.high}
    return {**interval, "tried": list(result.rewards)}


def _passes(cfg, fraction: float, seed: int, alpha: float) -> bool:
    """Return whether a point passes the gate on dev prompts."""
    here = _repetition(point(cfg, fraction, seed, alpha, "dev_prompts"))
    of_sft = _repetition(point(cfg, 0.0, seed, 0.0, "dev_prompts"))
    return bool(passes_gate(*here, *of_sft))


def _repetition(scores: Artifact) -> tuple[float, float]:
    """Return the repeated trigrams of a point (mean share of a response), and its distinct-2."""
    table = gather.read_lines(scores, "scores.jsonl")
    return table["repetition"].mean(), scores.manifest["facts"]["distinct_2"]


def _dev_points(cfg, fraction: float, seed: int, alphas: Iterable[float]) -> list[gather.Point]:
    """Return these α of one training on dev prompts."""
    points = []
    for alpha in alphas:
        columns = {"fraction": fraction, "seed": seed, "alpha": alpha}
        scores = point(cfg, fraction, seed, alpha, "dev_prompts")
        points.append(gather.Point(columns, scores))
    return points


def _mean_rewards(cfg, fraction: float, seed: int, alpha: float) -> np.ndarray:
    """Return the mean of the reward model for each dev prompt, (prompts,)."""
    scores = point(cfg, fraction, seed, alpha, "dev_prompts")
    table = gather.read_lines(scores, "scores.jsonl")
    prompts = table.groupby("id", sort=False)
    means = prompts["reward"].mean()
    return means.to_numpy()


# --- lines through two models


def sweep(cfg, lines: dict[str, Line]) -> Artifact:
    """Walk along lines on dev prompts; best.json: the α of each that the reward model chooses.

    responses.csv.gz and points.json as in curves(), with the line's name as `model`; the SFT model
    is "SFT".
    """
    config.require_prompts(cfg.world, "dev_prompts")
    sft_alone = _main_line(cfg, alphas=(-1.0,))
    every_line = {"SFT": sft_alone, **lines}
    points = []
    for name, line in every_line.items():
        for alpha in line.alphas:
            columns = {"model": name, "alpha": alpha}
            scores = line.scores(cfg, alpha, "dev_prompts", cfg.dev_samples)
            points.append(gather.Point(columns, scores))

    def make(out: Path) -> None:
        needs.check(cfg)
        table, facts = gather.scored(points, "lines through two models, dev prompts")
        gather.write(out, table, facts)
        means = table.groupby(["model", "alpha"])["reward"].mean()
        best = {}
        for name in lines:
            along = means.loc[name]
            best[name] = float(along.idxmax())
        gather.write_json(out / "best.json", best, indent=1)

    inputs = {"points": gather.scores_of(points), "names": list(lines)}
    return Artifact("sweep", version=2, inputs=inputs, make=make, hours=cfg.needs.hours)


def walk(cfg, lines: dict[str, dict[int, Line]]) -> Artifact:
    """Walk along lines of several trainings, on dev prompts and on test prompts.

    lines: {name: {seed: line}}. The files are those of curves(), with the line's name as `model`;
    the SFT model is "SFT". alpha_curves reads them.
    """
    config.require_prompts(cfg.world, "dev_prompts", "test_prompts")
    points = _sft_points(cfg, {"model": "SFT"})
    for name, by_seed in lines.items():
        for seed, line in by_seed.items():
            points += _walked(cfg, {"model": name, "seed": seed}, line)

    def make(out: Path) -> None:
        needs.check(cfg)
        table, facts = gather.scored(points, "lines of several trainings")
        gather.write(out, table, facts)

    inputs = {"points": gather.scores_of(points), "names": list(lines)}
    return Artifact("walk", version=1, inputs=inputs, make=make, hours=cfg.needs.hours)


def _sft_points(cfg, name: dict) -> list[gather.Point]:
    """Return the SFT model on both splits, with which every table begins; name: its column."""
    points = []
    for split in SPLITS:
        columns = {"split": split, **name, "seed": cfg.seeds[0], "alpha": 0.0}
        scores = point(cfg, 0.0, cfg.seeds[0], 0.0, f"{split}_prompts")
        points.append(gather.Point(columns, scores))
    return points


def _walked(cfg, columns: dict, line: Line) -> list[gather.Point]:
    """Return the points of a line, at each of its α on both splits."""
    points = []
    for alpha in line.alphas:
        for split in SPLITS:
            samples = _samples(cfg, split)
            scores = line.scores(cfg, alpha, f"{split}_prompts", samples)
            points.append(gather.Point({"split": split, **columns, "alpha": alpha}, scores))
    return points


def equal_steps(cfg, lines: dict[str, dict[int, Line]]) -> Artifact:
    """Walk along lines by steps that are equally long in the weights, whatever their ‖Δθ‖.

    The files are those of walk(), where `alpha` counts steps past θ₁, each as long as ‖Δθ‖ of the
    first line with the same seed, and `own_alpha` is the α of the line itself. The lines' own grids
    are cfg.pair_alphas, the steps too. steps.json: the α of each line, seed and step.
    """
    first = next(iter(lines))
    changes = {}
    for seed in lines[first]:
        comparisons = {}
        for name, by_seed in lines.items():
            comparisons[name] = (by_seed[seed].start, {name: by_seed[seed].end})
        changes[str(seed)] = change(cfg, comparisons)

    def make(out: Path) -> dict:
        needs.check(cfg)
        lengths = {seed: _lengths(artifact) for seed, artifact in changes.items()}
        points = _sft_points(cfg, {"model": "SFT"})
        rows = []
        for name, by_seed in lines.items():
            for seed, line in by_seed.items():
                ratio = lengths[str(seed)][first] / lengths[str(seed)][name]
                for step in cfg.pair_alphas:
                    alpha = float(f"{step * ratio:.6g}")
                    columns = {"model": name, "seed": seed, "own_alpha": alpha}
                    placed = _walked(cfg, columns, replace(line, alphas=(alpha,)))
                    points += [_renamed(point, step) for point in placed]
                    rows.append({**columns, "step": step})
        table, facts = gather.scored(points, "steps of equal length")
        gather.write(out, table, facts)
        gather.write_json(out / "steps.json", rows, indent=1)
        return {"chosen_points": gather.keys(points)}

    inputs = {"changes": changes, "steps": cfg.pair_alphas, "names": list(lines)}
    inputs["samples"] = [cfg.dev_samples, cfg.test_samples]
    inputs["texts"] = stages.texts(cfg.world)
    return Artifact("equal-steps", version=1, inputs=inputs, make=make, hours=cfg.needs.hours)


def _lengths(moved: Artifact) -> dict[str, float]:
    """Return ‖Δθ‖ of each pair that change() has measured."""
    table = moved.csv("movement.csv.gz")
    squares = table["change"] ** 2
    sums = squares.groupby(table["pair"]).sum()
    return (sums**0.5).to_dict()


def _renamed(point: gather.Point, step: float) -> gather.Point:
    """Return a point whose place in the table is that of a step."""
    columns = {**point.columns, "alpha": step}
    return gather.Point(columns, point.scores)


def _samples(cfg, split: str) -> int:
    """Return how many responses each prompt of a split has; split is "dev" or "test"."""
    return cfg.test_samples if split == "test" else cfg.dev_samples


def interpolation(cfg) -> dict[str, dict[int, Line]]:
    """Return the lines from the SFT model to the one aligned on all pairs, and past it, for walk().

    They hold γ = 1 + α between the two models; γ = 0 is the SFT model itself.
    """
    most = cfg.fractions[-1]  # all pairs
    between = [round(gamma - 1, 6) for gamma in cfg.interpolation if gamma > 0]
    past = cfg.alphas[most]
    alphas = tuple(sorted({*between, *past}))
    seeds = [seed for fraction, seed in runs(cfg) if fraction == most]
    return {"aligned": {seed: _aligned_line(cfg, most, seed, alphas) for seed in seeds}}


def of_seeds(cfg, lines_of: Callable[..., dict[str, Line]]) -> dict[str, dict[int, Line]]:
    """Return {name: {seed: line}} for walk(), of lines that depend on a training's seed.

    lines_of: takes the configuration and a seed; it is called with the first cfg.line_seeds seeds.
    """
    lines: dict[str, dict[int, Line]] = {}
    for seed in cfg.seeds[: cfg.line_seeds]:
        for name, line in lines_of(cfg, seed).items():
            lines.setdefault(name, {})[seed] = line
    return lines


def with_full(cfg, lines: dict[str, dict[int, Line]]) -> dict[str, dict[int, Line]]:
    """Return lines for walk() with that of DPO on all pairs at α = 0, whose gain is the unit.

    Its name is FULL, and it is trained with the same seeds as the first of the lines.
    """
    seeds = next(iter(lines.values()))
    most = cfg.fractions[-1]
    full = {seed: _aligned_line(cfg, most, seed, (0.0,)) for seed in seeds}
    return {**lines, FULL: full}


def recipes(cfg, seed: int) -> dict[str, Line]:
    """Return the lines of models trained longer, faster, by other optimizers or with another β.

    These are the rows of ACL Table 4 that cfg.recipes names, after the default; their epochs count
    those of the default as one.
    """
    lr = cfg.train.lr
    beta = cfg.train.beta
    changes = {
        "default": {},
        "epochs × 2": {"epochs": 2 * cfg.train.epochs},
        "epochs × 3": {"epochs": 3 * cfg.train.epochs},
        "learning rate × 2": {"lr": 2 * lr},
        "learning rate × 4": {"lr": 4 * lr},
        "AdaGrad": {"optimizer": "adagrad"},
        "RMSprop": {"optimizer": "rmsprop"},
        "β × 0.1": {"beta": beta / 10},
        "β × 10": {"beta": beta * 10},
    }
    align = partial(_aligned_line, cfg, cfg.recipe_fraction, seed, cfg.recipe_alphas)
    return {name: align(**changes[name]) for name in ("default", *cfg.recipes)}


def losses(cfg, seed: int) -> dict[str, Line]:
    """Return the lines of models trained on all pairs with the losses of cfg.losses (ACL Table 6).

    DPO is one of them, as cfg.train has it.
    """
    most = cfg.fractions[-1]
    align = partial(_aligned_line, cfg, most, seed, cfg.alphas[most])
    lines = {"DPO": align()}
    for name, settings in cfg.losses.items():
        lines[name] = align(**settings)
    return lines


def data_quality(cfg, seed: int) -> dict[str, Line]:
    """Return the lines of models trained on random pairs, and on those with long chosen responses.

    These are the rows of ACL Table 3, "10%, random" and so on. Raises ConfigError for a fraction
    without an α grid.
    """
    lines = {}
    for fraction in cfg.quality_fractions:
        config.check_grid(cfg, fraction)
        align = partial(_aligned_line, cfg, fraction, seed, cfg.alphas[fraction])
        lines[f"{fraction:.0%}, random"] = align()
        lines[f"{fraction:.0%}, length-biased"] = align(longest=True)
    return lines


def wrong_pairs(cfg, seed: int | None = None) -> dict[str, Line]:
    """Return a line from SFT to aligned, and lines that ExPO should not be applied to (v1 Fig. 7).

    Those go through published models where the configuration names them. seed: of DPO, and of what
    is fine-tuned beside the SFT model; None is the first. Raises ConfigError where it starts from
    one finished SFT model and names none.
    """
    seed = cfg.seeds[0] if seed is None else seed
    if not cfg.world.sft_rows and not cfg.wrong_pairs:
        raise config.ConfigError(
            f"profile {cfg.profile} starts from one finished SFT model: no other is there"
        )
    alphas = cfg.pair_alphas
    start = stages.sft(cfg)
    align = partial(stages.aligned, cfg, cfg.recipe_fraction, seed)
    lines = {"SFT → aligned from it": Line(start, align(), alphas)}
    if cfg.wrong_pairs:
        for name, pair in cfg.wrong_pairs.items():
            lines[name] = published(pair, alphas)
        return lines
    instruct = stages.model(cfg.world.target)
    other = stages.sft(cfg, seed=seed + 1)
    other_aligned = align(start=other)
    lines["instruct → SFT"] = Line(instruct, stages.sft(cfg, seed=seed), alphas)
    lines["two SFT models of one start"] = Line(start, other, alphas)
    lines["two aligned models of different starts"] = Line(align(), other_aligned, alphas)
    return lines


def published(pair: tuple[str, str], alphas: tuple) -> Line:
    """Return the line through two published models, by hub id or folder.

    The second's tokenizer reads the prompts.
    """
    start, end = pair
    return Line(stages.model(start), stages.model(end), alphas, target=end)


def modules(cfg, seed: int) -> dict[str, Line]:
    """Return lines on which all tensors, or a part of them, move past the aligned model.

    The parts are attention, MLP, and each half of the layers.
    """
    half = cfg.layers // 2
    parts = {
        "attention": ("*.self_attn.*",),
        "MLP": ("*.mlp.*",),
        "first half of the layers": _layer_patterns(0, half),
        "second half of the layers": _layer_patterns(half, cfg.layers),
    }
    line = _aligned_line(cfg, cfg.fractions[-1], seed, cfg.module_alphas)
    lines = {"all": line}
    for name, patterns in parts.items():
        lines[name] = replace(line, modules=patterns)
    return lines


def _layer_patterns(first: int, end: int) -> tuple[str, ...]:
    """Return patterns of the tensors of layers first, …, end − 1."""
    return tuple(f"*.layers.{layer}.*" for layer in range(first, end))


# --- how far models move


def alignments(cfg) -> dict[str, Comparison]:
    """Return what change() compares for ACL Table 1.

    That is SFT, and DPO on each fraction and with each seed; and where SFT is trained here, the
    target before it, and both.
    """
    first = cfg.seeds[0]
    start = stages.sft(cfg)
    models = {}
    for fraction, seed in runs(cfg):
        name = f"{fraction:.0%} of the pairs"
        if seed != first:
            name += f", seed {seed}"
        models[name] = stages.aligned(cfg, fraction, seed)
    comparisons = {"SFT → DPO": (start, models)}
    if cfg.world.sft_rows:
        instruct = stages.model(cfg.world.target)
        most = stages.aligned(cfg, cfg.fractions[-1], first)
        comparisons["instruct → SFT"] = (instruct, {"SFT": start})
        comparisons["instruct → DPO"] = (instruct, {"DPO": most})
    return comparisons


def change(cfg, pairs: dict[str, Comparison]) -> Artifact:
    """Measure how far each θ₀ lies from its models.

    movement.csv.gz: a row a tensor. cosines.json: [pair, model, model, cosine] wherever a θ₀ has
    several models.
    """

    def make(out: Path) -> None:
        from beyond_dpo.change import movement

        needs.check(cfg)
        frames = []
        angles = []
        for name, (start, models) in pairs.items():
            folders = {model: artifact.get() for model, artifact in models.items()}
            rows, cosines = movement(start.get(), folders)
            table = pd.DataFrame(rows)
            frames.append(table.assign(pair=name))
            if len(models) == 1:
                continue
            for two_models, cosine in cosines.items():
                angles.append([*two_models, cosine])
        gather.write_json(out / "cosines.json", angles)
        table = pd.concat(frames, ignore_index=True)
        gather.write_table(out / "movement.csv.gz", table)

    inputs = {}
    for name, (start, models) in pairs.items():
        inputs[name] = {"start": start, **models}
    return Artifact("change", version=2, inputs=inputs, make=make, hours=cfg.needs.hours)


def straightness(cfg) -> Artifact:
    """Measure how straight DPO's way on all pairs is, over its checkpoints; first seed.

    way.csv.gz: a row a tensor, see change.straightness().
    """
    parts = cfg.checkpoints
    end = stages.aligned(cfg, cfg.fractions[-1], cfg.seeds[0], parts=parts)
    start = stages.sft(cfg)

    def make(out: Path) -> None:
        from beyond_dpo import change

        needs.check(cfg)
        folder = end.get()
        between = [folder / f"part{number}" for number in range(1, parts)]
        rows = change.straightness(start.get(), between, folder)
        gather.write_table(out / "way.csv.gz", pd.DataFrame(rows))

    inputs = {"start": start, "end": end}
    return Artifact("straightness", version=1, inputs=inputs, make=make, hours=cfg.needs.hours)


def low_ranks(cfg, seed: int) -> dict[str, Line]:
    """Return the lines through models whose Δθ keeps a few directions of each matrix.

    Δθ is that of DPO on cfg.recipe_fraction of the pairs; "whole" has all of it.
    """
    fraction = cfg.recipe_fraction
    start = stages.sft(cfg)
    whole = stages.aligned(cfg, fraction, seed)
    alphas = cfg.alphas[fraction]
    lines = {"whole": Line(start, whole, alphas)}
    for rank in cfg.ranks:
        lines[f"rank {rank}"] = Line(start, _low_rank(start, whole, rank), alphas)
    return lines


def _low_rank(start: Artifact, model: Artifact, rank: int) -> Artifact:
    """Write a model that has moved along a few directions of each matrix (change.low_rank)."""

    def make(out: Path) -> dict:
        from beyond_dpo import change

        facts = change.low_rank(start.get(), model.get(), out, rank)
        return {"kept": round(facts["kept"], 4)}

    inputs = {"start": start, "model": model, "rank": rank}
    return Artifact("low-rank", version=1, inputs=inputs, make=make)


# --- what models write


def said(cfg, lines: dict[str, Line]) -> Artifact:
    """Sample one response to each of PROMPTS at every α of the lines.

    texts.json: [{model, alpha, prompt, text}, …], the model by its line's name.
    """
    readers = {}  # models whose tokenizers read the prompts, by line
    sampled = {}  # responses, by (line, α)
    for name, line in lines.items():
        reader = stages.sft(line.own(cfg))
        readers[name] = reader
        prompts = _own_prompts(cfg, reader)
        for alpha in line.alphas:
            sampled[name, alpha] = line.at(cfg, alpha, "own", 1, prompts)

    def make(out: Path) -> None:
        needs.check(cfg)
        texts = []
        for (name, alpha), artifact in gather.watched(sampled.items(), "text samples"):
            columns = {"model": name, "alpha": alpha}
            for row in _decoded(artifact, readers[name]):
                texts.append({**columns, **row})
        write_file(out / "texts.json", json.dumps(texts, ensure_ascii=False))

    points = list(sampled.values())
    inputs = {"points": points, "names": list(lines)}
    return Artifact("said", version=1, inputs=inputs, make=make, hours=cfg.needs.hours)


def _decoded(responses: Artifact, reader: Artifact) -> list[dict]:
    """Return {prompt, text} of each response, by the tokenizer of a model."""
    tokenizer = templates.load_tokenizer(str(reader.get()))
    rows = []
    file = responses.get() / "responses.jsonl"
    for response in stages.json_lines(file):
        text = tokenizer.decode(response["response_ids"], skip_special_tokens=True)
        rows.append({"prompt": response["id"], "text": text})
    return rows


def _own_prompts(cfg, reader: Artifact) -> Artifact:
    """Write PROMPTS in the tokens of a model: own.json."""
    inputs = {"prompts": PROMPTS, "tokenizer": reader}
    if cfg.world.template == "chat":
        inputs["template"] = "chat"
        inputs.update(corpus.rendering(cfg.world.target, "chat"))

    def make(out: Path) -> None:
        tokenizer = templates.load_tokenizer(str(reader.get()))
        rows = []
        for prompt in PROMPTS:
            prompt_ids = templates.render(tokenizer, prompt, cfg.world.template)
            rows.append({"id": prompt, "prompt_ids": prompt_ids})
        gather.write_json(out / "own.json", rows)

    return Artifact("own-prompts", version=1, inputs=inputs, make=make)


def told(cfg) -> Artifact:
    """Sample texts of DPO on cfg.recipe_fraction of the pairs, at every α of its grid; first seed.

    The file is that of said().
    """
    fraction = cfg.recipe_fraction
    line = _aligned_line(cfg, fraction, cfg.seeds[0], cfg.alphas[fraction])
    return said(cfg, {f"{fraction:.0%} of the pairs": line})
