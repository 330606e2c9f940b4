"""MallowsPO's experiments (arXiv 2405.14953): bandits, dispersion, controlled sentiment, plug-ins.

Each function returns an Artifact; nothing runs before its get().
"""

import dataclasses
import itertools
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from beyond_dpo import stats, templates
from beyond_dpo.files import write_file
from beyond_dpo.pipeline import assets, config, corpus, gather, needs, openings, preferences, stages
from beyond_dpo.pipeline.artifacts import Artifact
from beyond_dpo.rows import write_rows

WEIGHTED = {"dpo": "mallows_theta", "ipo": "mallows_ipo", "simpo": "mallows_simpo"}
NAMES = {
    "sft": "SFT",
    "dpo": "DPO",
    "ipo": "IPO",
    "simpo": "SimPO",
    "mallows_theta": "MallowsPO-θ",
    "mallows_phi": "MallowsPO-φ",
    "mallows_ipo": "MallowsIPO",
    "mallows_simpo": "MallowsSimPO",
}
# Contextual bandits: who prefers, and whether the contexts share the policy's parameters.
CONTEXTUAL_WORLDS = {
    "Mallows": ("mallows", True),
    "Bradley–Terry": ("bradley_terry", True),
    "Mallows, a table for each context": ("mallows", False),
}
CONTEXTUAL_PHI = 0.3  # of an identity that holds for any
# the columns of two curves in a table of gap_at_equal()
CurvePair = tuple[np.ndarray, np.ndarray]

RECORDS = 200  # of each bandit's training, fewer towards its end
ARMS = ["arm1", "arm2", "arm3", "arm4", "arm5"]
LEAST_PLACES = 3  # of a curve of gap_at_equal()

# ratings of review sentences by people, in the package vaderSentiment (Hutto & Gilbert 2014)
RATINGS = "hutto_ICWSM_2014"
RATINGS_ARCHIVE = f"vaderSentiment-3.3.2/additional_resources/{RATINGS}.tar.gz"


# --- the bandit


def bandits(cfg) -> Artifact:
    """Train the bandit with both links and every β.

    runs.csv.gz: method, step, beta, arm1 … arm5 (probabilities), reward, kl (nats).
    """
    betas = cfg.bandit_betas
    steps = cfg.bandit_steps

    def make(out: Path) -> None:
        runs = [_bandit_runs(link, betas, steps) for link in ("dpo", "mallows_phi")]
        table = pd.concat(runs).round(6)
        gather.write_table(out / "runs.csv.gz", table.reset_index())

    does = f"bandit, in this process: {steps:,} steps for {len(betas)} β, DPO and MallowsPO-φ"
    inputs = {"betas": betas, "steps": steps}
    return Artifact("bandits", version=1, inputs=inputs, make=make, does=does)


def _bandit_runs(link: str, betas: tuple[float, ...], steps: int) -> pd.DataFrame:
    """Train the bandit with one link and every β; return a row for each recorded (step, β)."""
    from beyond_dpo import bandit

    every_step, every_policy = bandit.train(betas, link=link, steps=steps)
    # it changes most at the start
    spaced = np.geomspace(1, len(every_step), RECORDS)
    recorded = np.unique(spaced.astype(int)) - 1
    policies = every_policy[recorded]
    index = pd.MultiIndex.from_product(
        [[NAMES[link]], every_step[recorded], betas],
        names=["method", "step", "beta"],
    )
    probabilities = policies.reshape(-1, len(ARMS))
    table = pd.DataFrame(probabilities, index, ARMS)
    table["reward"] = bandit.reward(policies).ravel()
    table["kl"] = bandit.kl(policies).ravel()
    return table


def link(s, phi: float, epsilon: float) -> np.ndarray:
    """Return losses.mallows_link of an array s, for drawing; it needs no torch."""
    from beyond_dpo import contextual

    return contextual.link(s, phi, epsilon)


# --- the contextual bandit


def contextual(cfg) -> Artifact:
    """Train DPO and MallowsPO on contextual bandits whose dispersion is known.

    gains.csv.gz, a row for each world, spread, pairs, steps, kl and seed: what each of
    _learners() gains over the uniform policy, in ranks, at that KL (nats), with a column for each.
    The facts hold three identities; see _identities().
    """
    settings = cfg.contextual
    cells = list(itertools.product(CONTEXTUAL_WORLDS, settings.spreads, settings.pairs))

    def make(out: Path) -> dict:
        rows = []
        for cell in gather.watched(cells, "contextual bandits"):
            for seed in contextual_seeds(settings):
                rows += _gains(settings, *cell, seed)
        table = pd.DataFrame(rows).round(3)  # a tenth of what one seed adds by chance
        gather.write_table(out / "gains.csv.gz", table)
        return _identities(settings)

    does = f"bandits, in this process: {settings.seeds} worlds in each of {len(cells)} settings"
    inputs = {"settings": dataclasses.asdict(settings)}
    return Artifact("contextual", version=1, inputs=inputs, make=make, does=does)


def ahead(table: pd.DataFrame, learner: str, than: str = "DPO", **cell) -> stats.Estimate:
    """Return by how much a learner's gain is larger, the mean over the seeds of a cell.

    table: gains.csv.gz of contextual(). cell: {column: value} that leaves one row a seed. Raises
    ValueError where it does not.
    """
    rows = _rows_of(table, cell)
    return stats.mean_of_trainings(rows[learner] - rows[than])


def break_even(
    table: pd.DataFrame, method: str, noises: Sequence[float], *, seed: int, **cell
) -> stats.Interval:
    """Return (noise, low, high) at which MallowsPO's mean gain over DPO falls below 0.

    It is interpolated between two of the noises, of which 0 is the truth; it is the largest of them
    where the gain stays above 0, and 0 where it is below from the start. Seeds are drawn anew,
    where `seed` is that of the draws. table and cell are those of ahead().
    """
    rows = _rows_of(table, cell)
    levels = [0.0, *noises]
    learners = [f"{method}, true", *(f"{method}, noise {noise:g}" for noise in noises)]
    gains = rows[learners].to_numpy() - rows[["DPO"]].to_numpy()

    def crossing(draw: np.ndarray) -> float:
        means = gains[draw].mean(0)
        negative = np.flatnonzero(means < 0)
        if not len(negative):
            return levels[-1]
        right = negative[0]
        if right == 0:
            return 0.0
        share = means[right - 1] / (means[right - 1] - means[right])
        return levels[right - 1] + share * (levels[right] - levels[right - 1])

    return stats.interval(crossing, len(gains), seed)


def _rows_of(table: pd.DataFrame, cell: Mapping) -> pd.DataFrame:
    """Return the rows of a cell of contextual(), one of each seed."""
    for column, value in cell.items():
        table = table[table[column] == value]
    if table.empty or table["seed"].duplicated().any():
        raise ValueError(f"{cell} leaves {len(table)} rows, not one of each seed")
    return table


def contextual_seeds(settings) -> range:
    """Return the seeds of the worlds, which all methods share."""
    return range(settings.first_seed, settings.first_seed + settings.seeds)


def _gains(settings, name: str, spread: float, pairs: int, seed: int) -> list[dict]:
    """Return the rows of one world and its pairs."""
    from beyond_dpo import contextual as bandit

    people, shared = CONTEXTUAL_WORLDS[name]
    world = _world(settings, spread, seed)
    if not shared:
        world = bandit.tables(world)
    wins = bandit.draw_pairs(world, pairs, people=people, seed=seed)
    ways = {}
    for learner, (link, agreement) in _learners(settings, world.agreement, seed).items():
        ways[learner] = bandit.descend(
            world.features,
            wins,
            agreement,
            link=link,
            steps=max(settings.steps),
            lr=settings.lr,
        )
    rows = []
    for steps, kl in _policies(settings, name):
        row = {
            "world": name,
            "spread": spread,
            "pairs": pairs,
            "steps": steps,
            "kl": kl,
            "seed": seed,
        }
        for learner, way in ways.items():
            row[learner] = bandit.gain_at_kl(world.features, world.ranks, way[steps], kl)
        rows.append(row)
    return rows


def _policies(settings, name: str) -> list[tuple[int, float]]:
    """Return after how many steps and at which KL the policies of a world are measured."""
    first_kl, *other_kls = settings.kls
    policies = [(steps, first_kl) for steps in settings.steps]
    if name == "Mallows":
        policies += [(max(settings.steps), kl) for kl in other_kls]
    return policies


def _world(settings, spread: float, seed: int):
    """Draw a world of the settings' size."""
    from beyond_dpo import contextual as bandit

    return bandit.draw_world(
        settings.contexts, settings.arms, settings.dimensions, spread=spread, seed=seed
    )


def _learners(settings, truth: np.ndarray, seed: int) -> dict[str, tuple[str, np.ndarray]]:
    """Return {learner: (link, weights)}: what each takes for -log φ.

    "constant" is MallowsPO-φ that knows the mean alone; that of MallowsPO-θ would be DPO.
    """
    from beyond_dpo import contextual as bandit

    constant = np.ones_like(truth)
    known = {"true": truth}
    for noise in settings.noises:
        known[f"noise {noise:g}"] = bandit.estimate(truth, noise=noise, seed=seed)
    known["shuffled"] = bandit.shuffle(truth, seed=seed)
    learners = {
        "DPO": ("logistic", constant),
        "MallowsPO-φ, constant": ("mallows_phi", constant),
    }
    for method, link in {"MallowsPO-θ": "logistic", "MallowsPO-φ": "mallows_phi"}.items():
        for quality, agreement in known.items():
            learners[f"{method}, {quality}"] = (link, agreement)
    return learners


def _identities(settings) -> dict[str, float]:
    """Return by how much three identities of the theory are missed at most.

    constant_phi: with one φ everywhere, MallowsPO-θ with the paper's -2 log φ gains at equal KL
    what DPO does (Proposition 4). theta_finds, phi_finds: with endless pairs of Bradley-Terry and
    of Mallows people the gradient is 0 where the policy's rewards are minus the central ranks
    (Theorem 1).
    """
    from beyond_dpo import contextual as bandit

    missed = {"constant_phi": 0.0, "theta_finds": 0.0, "phi_finds": 0.0}
    for seed in contextual_seeds(settings):
        flat = _world(settings, 0.0, seed)
        gap = abs(_constant_phi_gap(settings, flat, seed))
        missed["constant_phi"] = max(missed["constant_phi"], gap)
        uneven = bandit.tables(_world(settings, max(settings.spreads), seed))
        v = -uneven.ranks.ravel() / uneven.features.max()
        fitting = {
            "theta_finds": ("bradley_terry", "logistic"),
            "phi_finds": ("mallows", "mallows_phi"),
        }
        for identity, (people, link) in fitting.items():
            weights = bandit.chances(uneven, people)
            _, gradient = bandit.expected_loss(
                uneven.features, weights, uneven.agreement, v, link=link
            )
            largest = float(np.abs(gradient).max())
            missed[identity] = max(missed[identity], largest)
    return missed


def _constant_phi_gap(settings, world, seed: int) -> float:
    """Return what MallowsPO-θ gains over DPO where φ is the same everywhere."""
    from beyond_dpo import contextual as bandit

    wins = bandit.draw_pairs(world, min(settings.pairs), people="mallows", seed=seed)
    gains = []
    for factor in (1.0, -2 * np.log(CONTEXTUAL_PHI)):  # 1 is DPO
        way = bandit.descend(
            world.features,
            wins,
            np.full_like(world.agreement, factor),
            link="logistic",
            steps=max(settings.steps),
            lr=settings.lr / factor**2,
        )
        gain = bandit.gain_at_kl(world.features, world.ranks, way[-1], settings.kls[0])
        gains.append(gain)
    dpo, theta = gains
    return theta - dpo


# --- the dispersion of prompts


def dispersed(cfg) -> Artifact:
    """Weight all pairs by the SFT model's entropies.

    dispersion.csv: chosen, rejected (normalised entropies), weight.
    """
    reference_pass = stages.reference(cfg)

    def make(out: Path) -> dict:
        from beyond_dpo import dispersion

        needs.check(cfg)
        chosen, rejected = stages.reference_values(reference_pass, "entropies")
        weight, phi_star = dispersion.weights(chosen, rejected, range(len(chosen)))
        table = pd.DataFrame({"chosen": chosen, "rejected": rejected, "weight": weight})
        gather.write_table(out / "dispersion.csv", table.round(6))
        return {"phi_star": round(phi_star, 6)}

    inputs = {"reference": reference_pass}
    return Artifact("dispersion", version=1, inputs=inputs, make=make, hours=cfg.needs.hours)


def rated(source: str) -> list[tuple[str, list[int]]]:
    """Return sentences of reviews with the ratings of people, −4 (negative) to 4 (positive).

    source: "movie" (10,605 sentences, 15 to 29 people each), "amazon" (3,708 on products, 20
    people), or "fixtures" with invented ratings.
    """
    if source not in corpus.RATED:
        reviews, _ = corpus.halves(source)
        return [(text, _invented_ratings(text, label)) for text, label in reviews]
    ratings = {}
    for name, _, _, values in _rating_rows(source, "anonDataRatings"):
        ratings[name] = json.loads(values)
    sentences = []
    for name, _, text in _rating_rows(source, "GroundTruth"):
        sentences.append((text, ratings[name]))
    return sentences


def _invented_ratings(text: str, label: int) -> list[int]:
    """Return two ratings: one agrees with the label, the other depends on the length."""
    agreeing = 4 * label - 2
    other = len(text) % 5 - 2
    return [agreeing, other]


def _rating_rows(source: str, table: str) -> Iterator[list[str]]:
    """Yield the rows of a table of the archive of ratings, its columns apart."""
    file = f"{RATINGS}/{source}ReviewSnippets_{table}.txt"
    content = assets.member("vader", RATINGS_ARCHIVE, file)
    for line in content.decode("utf-8-sig").splitlines():
        if line.strip():
            yield line.split("\t")


def raters(cfg) -> Artifact:
    """Set the SFT model's entropy on sentences beside what people said of them.

    raters.csv, a row a sentence in no order: entropy (normalised, of its second half), tokens (of
    that half), people (15 to 29), sd of their ratings, split (the smaller of the shares of positive
    and of negative ratings), strength (absolute mean rating).
    """
    rows = _rated_rows(cfg)
    reference_pass = stages.reference(cfg, rows=rows, names=("said",))

    def make(out: Path) -> None:
        needs.check(cfg)
        (entropies,) = stages.reference_values(reference_pass, "entropies")
        (tokens,) = stages.reference_values(reference_pass, "tokens")
        every_rating = rows.json("ratings.json")
        disagreement = pd.DataFrame([_disagreement(ratings) for ratings in every_rating])
        table = pd.DataFrame({"entropy": entropies, "tokens": tokens})
        table = table.join(disagreement)
        gather.write_table(out / "raters.csv", table.round(6))

    inputs = {"reference": reference_pass, "rated": rows}
    return Artifact("raters", version=1, inputs=inputs, make=make, hours=cfg.needs.hours)


def _disagreement(ratings: list[int]) -> dict:
    """Return how far the people who rated one sentence are apart."""
    values = np.array(ratings)
    positive = (values > 0).mean()
    negative = (values < 0).mean()
    return {
        "people": len(values),
        "sd": values.std(),
        "split": min(positive, negative),
        "strength": abs(values.mean()),
    }


def _rated_rows(cfg) -> Artifact:
    """Cut rated sentences into a prompt and a response "said": pairs.jsonl, ratings.json."""
    target = cfg.world.target
    max_prompt = cfg.train.max_prompt
    inputs = {
        "tokenizer": assets.resolve(target),
        "source": corpus.source(cfg.rated),
        "rows": cfg.rated_rows,
        "max_prompt": max_prompt,
        "kind": cfg.rated,
    }

    def make(out: Path) -> None:
        tokenizer = templates.load_tokenizer(assets.tokenizer_dir(target))
        sentences = rated(cfg.rated)
        random.Random(0).shuffle(sentences)
        rows = []
        ratings_of_rows = []
        for i, (text, ratings) in enumerate(sentences):
            if len(rows) == cfg.rated_rows:
                break
            ids = templates.render(tokenizer, text, "plain")
            if len(ids) < openings.SHORTEST:
                continue
            cut = min(len(ids) // 2, max_prompt)
            row = {"id": str(i), "prompt_ids": ids[:cut]}
            row["responses"] = {"said": ids[cut:]}
            rows.append(row)
            ratings_of_rows.append(ratings)
        write_rows(out / "pairs.jsonl", rows)
        gather.write_json(out / "ratings.json", ratings_of_rows)

    return Artifact("rated", version=1, inputs=inputs, make=make)


# --- what is trained


@dataclass(frozen=True)
class Run:
    """A training, and on which prompts and after which part of it the model is judged."""

    settings: Mapping  # loss, seed and settings of cfg.train
    split: str = "test_prompts"
    prompts: Artifact | None = None  # None: the world's own
    part: str = ""  # of the training; "": its end


def frontier(cfg) -> Artifact:
    """Judge every method, β and seed along its training (Fig. 8c)."""
    parts = [f"part{part}" for part in range(1, cfg.train.parts)]
    parts.append("")
    runs = []
    for loss, beta, seed in itertools.product(cfg.methods, cfg.betas, cfg.seeds):
        settings = {
            "loss": loss,
            "beta": beta,
            "lr": cfg.train.lr,
            "seed": seed,
        }
        for part, split in itertools.product(parts, judged_splits(cfg)):
            runs.append(Run(settings, split, part=part))
    return judged(cfg, runs)


def judged_splits(cfg) -> list[str]:
    """Return the splits of the world whose prompts are judged; on none of them is a choice made."""
    return ["test_prompts", "dev_prompts"] if cfg.judge_dev else ["test_prompts"]


def plug_in(cfg) -> Artifact:
    """Judge plug-ins with and without weights, and a grid of β and learning rate.

    Table 1: the settings of cfg.plug_ins, on the world's own prompts and on those from elsewhere.
    Table 6: DPO and MallowsPO-θ, on the world's own prompts, and elsewhere if cfg.grid_elsewhere.
    Both with the first cfg.table_seeds seeds.
    Raises ConfigError where there are neither.
    """
    if not cfg.plug_ins and not cfg.grid_betas:
        raise config.ConfigError(
            "plug_ins and grid_betas are empty: nothing would be trained; set one of them"
        )
    plugs = []
    cells = []
    for seed in cfg.seeds[: cfg.table_seeds]:
        plugs += _plug_in_settings(cfg, seed)
        cells += _grid_settings(cfg, seed)
    own_prompts = dict.fromkeys(judged_splits(cfg))
    everywhere = dict(own_prompts)
    for source in cfg.elsewhere:
        everywhere[source] = elsewhere(cfg, source)
    runs = _runs_on(plugs, everywhere)
    runs += _runs_on(cells, everywhere if cfg.grid_elsewhere else own_prompts)
    return judged(cfg, _each_once(runs))


def plug_in_models(cfg) -> dict[str, stages.Weights]:
    """Return the models of Table 1 by name: every plug-in, without weights and with them."""
    start = stages.sft(cfg)
    models = {}
    for settings in _plug_in_settings(cfg, cfg.seeds[0]):
        name = NAMES[settings["loss"]]
        models[name] = stages.Weights(start, stages.aligned(cfg, cfg.fraction, **settings))
    return models


def _plug_in_settings(cfg, seed: int) -> list[dict]:
    """Return the settings of every plug-in with a seed, without weights and with them."""
    trainings = []
    for loss, settings in cfg.plug_ins.items():
        for name in (loss, WEIGHTED[loss]):
            training = {
                "loss": name,
                "seed": seed,
                "lr": cfg.train.lr,
                **settings,
            }
            trainings.append(training)
    return trainings


def _grid_settings(cfg, seed: int) -> list[dict]:
    """Return the settings of every cell of the grid of β and learning rate with a seed."""
    cells = []
    for loss, beta, lr in itertools.product(cfg.grid_methods, cfg.grid_betas, cfg.grid_lrs):
        settings = {
            "loss": loss,
            "seed": seed,
            "lr": lr,
            "beta": beta,
        }
        cells.append(settings)
    return cells


def _runs_on(trainings: list[dict], prompts_of: dict[str, Artifact | None]) -> list[Run]:
    """Return a run of each training on the prompts of each split."""
    runs = []
    for settings in trainings:
        for split, prompts in prompts_of.items():
            runs.append(Run(settings, split, prompts))
    return runs


def _each_once(runs: list[Run]) -> list[Run]:
    """Return the runs without repetitions: a plug-in may be a cell of the grid too."""
    unique = []
    for run in runs:
        if run not in unique:
            unique.append(run)
    return unique


def judged(cfg, runs: list[Run]) -> Artifact:
    """Train every run, sample from it, and judge; the SFT model once for each split.

    As gather.judged, with the columns of the settings, split and part; loss "sft" is the SFT model.
    """
    config.require_prompts(cfg.world, "test_prompts")
    start = stages.sft(cfg)
    points = []
    splits = set()
    for run in runs:
        model = stages.aligned(cfg, cfg.fraction, **run.settings)
        if run.split not in splits:
            splits.add(run.split)
            sft_run = Run({"loss": "sft"}, run.split, run.prompts)
            sft_weights = stages.sft_weights(cfg.world, start, model)
            points.append(_point(cfg, sft_run, sft_weights))
        weights = stages.Weights(start, model, part=run.part)
        points.append(_point(cfg, run, weights))
    return gather.judged(cfg, points)


def _point(cfg, run: Run, weights: stages.Weights) -> gather.Point:
    """Sample from the weights of a run, and score that."""
    sampled = stages.responses(
        cfg,
        weights,
        run.split,
        prompts=run.prompts,
        samples=cfg.test_samples,
        seed=2,
    )
    scores = stages.scores(
        cfg,
        sampled,
        run.split,
        prompts=run.prompts,
        judges=(stages.oracle(cfg.world), "vader"),
        kl_prompts=cfg.world.test_prompts,
    )
    part = run.part or "end"
    columns = {"split": run.split, "part": part, **run.settings}
    return gather.Point(columns, scores)


# --- prompts from elsewhere


def elsewhere(cfg, source: str) -> Artifact:
    """Take prompts from another domain: <source>.json, as the world's own prompts.

    Of texts their beginning is the prompt. The facts hold how many rows of a data set were dropped,
    and why. Its get() raises ConfigError where there are fewer than cfg.elsewhere_prompts.
    """
    world = cfg.world
    size = cfg.elsewhere_prompts
    inputs = {
        "source": corpus.source(source),
        "kind": source,
        "tokenizer": assets.resolve(world.target),
        "rows": size,
        "prompt_tokens": world.prompt_tokens,
        "template": world.template,
        **corpus.rendering(world.target, world.template),
    }

    def make(out: Path) -> dict:
        tokenizer = templates.load_tokenizer(assets.tokenizer_dir(world.target))
        dropped = {}
        if source in (*corpus.RATED, "fixtures"):
            rows = _beginnings(source, world, tokenizer, size)
        else:
            rows, dropped = preferences.prompts(source, world, tokenizer, size)
        if len(rows) < size:
            too_few = f"{source} has only {len(rows)}; dropped: {dict(dropped)}"
            raise config.ConfigError(f"elsewhere_prompts={size}, but {too_few}")
        write_file(out / f"{source}.json", json.dumps(rows))  # a hub id is a folder and a file
        return {"dropped": dict(dropped)}

    return Artifact("elsewhere", version=1, inputs=inputs, make=make)


def _beginnings(source: str, world: config.World, tokenizer, size: int) -> list[dict]:
    """Return prompts of the beginnings of rated sentences, at most `size`."""
    texts = [text for text, _ in rated(source)]
    generator = random.Random(0)
    generator.shuffle(texts)
    rows = []
    for i, text in enumerate(texts):
        if len(rows) == size:
            break
        ids = templates.render(tokenizer, text, "plain")
        cut = generator.randint(*world.prompt_tokens)
        if len(ids) >= cut:
            prompt = openings.begun(tokenizer, ids[:cut], world.template)
            rows.append({"id": f"E{i}", **prompt})
    return rows


# --- curves at equal x


def gap_at_equal(
    table, x: str, y: str, by: str, pair: tuple, *, seed: int
) -> tuple[float, float, float]:
    """Return (mean, low, high) of y of pair[0] − y of pair[1] at equal x.

    It is averaged over the x that both reach. table: one row per response, with the columns `by`,
    "seed" (of training), "place" (the points of each curve), "prompt", x and y. To the mean x and y
    of the places of both curves of a training seed one curve in 1, √x, x and x² is fitted, and a
    difference c + d x between the two (a curve of its own for each would favour the one that
    reaches less); then seeds are averaged. Prompts are drawn, the same for all places. A place that
    the curves share, such as the start of the training, does not belong into the table: there the
    difference is 0, whatever the methods do. Raises ValueError for curves that share no x, with
    fewer than three places, or not of the same prompts.
    """
    columns = ["seed", by, "place"]
    x_table = table.pivot_table(index="prompt", columns=columns, values=x)
    y_table = table.pivot_table(index="prompt", columns=columns, values=y)
    x_values = x_table.to_numpy()
    y_values = y_table.to_numpy()
    curves = _curve_pairs(x_table.columns, by, pair)
    incomplete = x_table.isna().any(axis=None)
    if incomplete or not _comparable(x_values.mean(0), curves):
        raise ValueError(
            f"{pair}: curves of {by} need three places each, all prompts, and a range of {x} in "
            "common"
        )

    def gaps(draws) -> np.ndarray:
        mean_x = x_values[draws].mean(1)
        mean_y = y_values[draws].mean(1)
        of_seeds = [_fitted_gaps(mean_x, mean_y, both) for both in curves]
        return np.stack(of_seeds, axis=1).mean(1)

    return stats.interval_of_many(gaps, len(x_values), seed)


def _curve_pairs(columns: pd.MultiIndex, by: str, pair: tuple) -> list[CurvePair]:
    """Return the columns of both curves of each training seed."""
    seeds = columns.get_level_values("seed")
    names = columns.get_level_values(by)
    first_name, second_name = pair
    curves = []
    for seed in seeds.unique():
        first = np.flatnonzero((seeds == seed) & (names == first_name))
        second = np.flatnonzero((seeds == seed) & (names == second_name))
        curves.append((first, second))
    return curves


def _comparable(mean_x: np.ndarray, curves: list[CurvePair]) -> bool:
    """Return whether all curves have enough places, and those of a seed some x in common."""
    for both in curves:
        first, second = both
        if min(len(first), len(second)) < LEAST_PLACES:
            return False
        low, high = _common_range(mean_x, both)
        if low > high:
            return False
    return True


def _common_range(mean_x: np.ndarray, curves: CurvePair) -> tuple[np.ndarray, np.ndarray]:
    """Return the smallest and the largest x that both curves reach, of each row of mean_x."""
    first, second = curves
    x_first = mean_x[..., first]
    x_second = mean_x[..., second]
    low = np.maximum(x_first.min(-1), x_second.min(-1))
    high = np.minimum(x_first.max(-1), x_second.max(-1))
    return low, high


def _fitted_gaps(mean_x: np.ndarray, mean_y: np.ndarray, curves: CurvePair) -> np.ndarray:
    """Fit one curve and a difference c + d x; return that difference in the middle of their x.

    mean_x, mean_y: a row per draw, of which each is fitted by itself.
    """
    first, second = curves
    both = np.r_[first, second]
    x = mean_x[:, both]
    y = mean_y[:, both]
    root = np.sqrt(np.maximum(x, 0))
    in_first = np.broadcast_to(np.repeat([1.0, 0.0], [len(first), len(second)]), x.shape)
    curve_terms = [x**0, root, x, x**2]
    difference_terms = [in_first, in_first * x]
    terms = np.stack([*curve_terms, *difference_terms], axis=2)
    differences = []
    for terms_of_draw, y_of_draw in zip(terms, y, strict=True):
        coefficients, *_ = np.linalg.lstsq(terms_of_draw, y_of_draw, rcond=None)
        differences.append(coefficients[-2:])
    c, d = np.transpose(differences)
    low, high = _common_range(mean_x, curves)
    return c + d * (low + high) / 2
