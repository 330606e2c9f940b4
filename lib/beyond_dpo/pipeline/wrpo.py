"""WRPO's experiments (arXiv 2412.03187): the best responses of several models in one small target.

prompts -> answers of each source -> scores -> y_ws, the best -> on a third of the prompts
        Target-SFT learns to say it -> on the rest Target-SFT's own best and worst, y_wt and y_l,
        stand beside it -> training -> judged
What a source must be is asked of the target itself, without Target-SFT:

prompts -> the target's best and worst, and the best of each set of sources -> training -> judged
Each function returns an Artifact; nothing runs before its get().
"""

import itertools
import json
import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from beyond_dpo import fusion_bandit as bandit
from beyond_dpo import stats
from beyond_dpo.jobs.settings import CLOCK
from beyond_dpo.pipeline import config, corpus, gather, needs, sources, stages
from beyond_dpo.pipeline.alpha_curves import AlphaCurves
from beyond_dpo.pipeline.artifacts import Artifact
from beyond_dpo.rows import epoch_order, read_rows, write_rows

SOURCE_CHOSEN, TARGET_CHOSEN, REJECTED = config.FUSED  # y_ws, y_wt, y_l
OWN = (TARGET_CHOSEN, REJECTED)  # the target's own pair
OFF_POLICY = (SOURCE_CHOSEN, REJECTED)  # the source's response against the target's worst
SOURCE_REJECTED = "source_rejected"  # the worst of the source that has the best, as in FuseChat-3.0
SAME_SOURCE = (SOURCE_CHOSEN, SOURCE_REJECTED)
TARGET = "Target"
DPO = "DPO on own pairs"
NAMES = {"dpo": "DPO", "ipo": "IPO", "simpo": "SimPO"}
FUSING = {"dpo": "wrpo", "ipo": "wrpo_ipo", "simpo": "wrpo_simpo"}

# of the bandit, whose other settings are those of fusion_bandit.World and of the configuration
BETA = 0.1
STEPS = 16
KL = 1.0  # nats, at which methods are compared where it is not varied
RATE = 1.0  # learning rate at which identities are checked; the KL is then about 1
CHECKED = bandit.World(strength=2.0, distance=3.0)
CHECKS = 10  # seeds of it


class Pool(NamedTuple):
    """Responses to sample from, and their scores by the reward model."""

    responses: Artifact
    scores: Artifact


# --- what is learnt from


def thirds(cfg) -> Artifact:
    """Split the prompts at random: first.json for Target-SFT, rest.json for preferences."""
    texts = stages.texts(cfg.world)

    def make(out: Path) -> None:
        prompts = texts.json("prompts.json")
        random.Random(0).shuffle(prompts)
        cut = round(cfg.sft_share * len(prompts))
        gather.write_json(out / "first.json", prompts[:cut])
        gather.write_json(out / "rest.json", prompts[cut:])

    inputs = {"texts": texts, "share": cfg.sft_share}
    return Artifact("thirds", version=1, inputs=inputs, make=make)


def scored(
    cfg, answers: Artifact, split: str = "prompts", prompts: Artifact | None = None
) -> Artifact:
    """Score responses by the reward model, which chooses what is learnt; gold only judges."""
    return stages.scores(cfg, answers, split, judges=("reward",), prompts=prompts)


def fusion(cfg, names: Sequence[str]) -> Artifact:
    """Choose the best of all responses of the named sources to each prompt, ties by a fixed seed.

    best.jsonl, as write_rows: the response "source_chosen", and the name of its "source".
    sft.jsonl: those of the first third. A prompt without a response, or whose responses all score
    alike, is counted and dropped. Its get() raises ConfigError where none is left to learn from.
    """
    pools = _source_pools(cfg, sorted(names))

    def make(out: Path) -> dict:
        prompts = stages.texts(cfg.world).json("prompts.json")
        rows = _best_of_sources(_tables(pools), prompts)
        first = _by_id(thirds(cfg).json("first.json"))
        sft_rows = [row for row in rows if row["id"] in first]
        if not rows:
            raise _no_best_response(cfg, pools, f"{len(prompts)} prompts")
        if first and not sft_rows:
            raise _no_best_response(cfg, pools, f"{len(first)} prompts for Target-SFT")
        write_rows(out / "best.jsonl", rows)
        write_rows(out / "sft.jsonl", sft_rows)
        wins = Counter(row["source"] for row in rows)
        dropped = len(prompts) - len(rows)
        return {"wins": wins, "dropped": dropped}

    inputs = {"scores": _scores_of(pools), "thirds": thirds(cfg)}
    return Artifact("fusion", version=1, inputs=inputs, make=make)


def _source_pools(cfg, names: Sequence[str], asked: sources.Asked | None = None) -> dict[str, Pool]:
    """Return the pool of each source; asked: None is every prompt."""
    asked = asked or sources.every_prompt(cfg)
    pools = {}
    for name in names:
        answers = sources.answers(cfg, name, asked)
        pools[name] = Pool(answers, scored(cfg, answers, asked.split, asked.prompts))
    return pools


def _scores_of(pools: dict[str, Pool]) -> dict[str, Artifact]:
    """Return the scores of each pool, for the inputs of what is made from them."""
    return {name: pool.scores for name, pool in pools.items()}


def _tables(pools: dict[str, Pool]) -> pd.DataFrame:
    """Return a row for each response of every pool that has a token, with its "source"."""
    tables = []
    for name, pool in pools.items():
        table = _table(*pool)
        tables.append(table.assign(source=name))
    return pd.concat(tables, ignore_index=True)


def _best_of_sources(table: pd.DataFrame, prompts: list[dict]) -> list[dict]:
    """Return a row for each prompt that has a best response."""
    groups = dict(iter(table.groupby("id")))
    rows = []
    for prompt in prompts:
        name = prompt["id"]
        ends = best_and_worst(groups.get(name), name)
        if ends is None:
            continue
        best, _ = ends
        row = dict(prompt)
        row["responses"] = {SOURCE_CHOSEN: table.loc[best, "response_ids"]}
        row["source"] = table.loc[best, "source"]
        rows.append(row)
    return rows


def _no_best_response(cfg, names: Sequence[str], prompts: str) -> config.ConfigError:
    """Return the error that there is nothing to learn from, with what to do."""
    return config.ConfigError(
        f"the reward model {cfg.world.reward_model} finds no best response of "
        f"{', '.join(names)} to any of {prompts} (all score alike, or are empty): use another "
        "reward model, other sources, or more prompts"
    )


def best_and_worst(group: pd.DataFrame | None, seed: str) -> tuple | None:
    """Return the indices of the highest and of the lowest "reward" of a prompt's responses.

    Ties are broken by seed. None if there is no response, or there are several and all score alike.
    """
    if group is None:
        return None
    rewards = group["reward"]
    if len(group) > 1 and rewards.nunique() == 1:
        return None
    highest = group.index[rewards == rewards.max()]
    lowest = group.index[rewards == rewards.min()]
    generator = random.Random(seed)
    best = generator.choice(list(highest))
    worst = generator.choice(list(lowest))
    return best, worst


def target_sft(cfg, names: Sequence[str]) -> Artifact:
    """Fine-tune the target on the sources' best responses to the first third: Target-SFT.

    It is trained as the SFT model, but on whole responses.
    """
    return stages.training(
        cfg,
        replace(cfg.sft, max_length=cfg.train.max_length),
        fusion(cfg, names),
        "sft.jsonl",
        [SOURCE_CHOSEN],
        base=stages.sft(cfg),
        seed=cfg.seeds[0],
        desc=f"Target-SFT on {' + '.join(names)}",
    )


def own(cfg, model: Artifact) -> Pool:
    """Sample `model`'s own responses to the rest of the prompts, and score them."""
    prompts = thirds(cfg)
    start = stages.sft(cfg)
    weights = stages.Weights(start)
    if model.key != start.key:
        weights = stages.Weights(start, model)
    return _own_pool(cfg, weights, sources.Asked(prompts, "rest"))


def _own_pool(cfg, weights: stages.Weights, asked: sources.Asked) -> Pool:
    """Sample a model's own responses, and score them."""
    sampled = sources.own(cfg, weights, asked)
    return Pool(sampled, scored(cfg, sampled, asked.split, asked.prompts))


def quadruples(cfg, names: Sequence[str], model: Artifact) -> Artifact:
    """Set y_ws beside the best and the worst of `model`'s own responses: pairs.jsonl.

    These are to the rest of the prompts. Raises ConfigError for a single sample; its get() does
    where no prompt has both.
    """
    stages.require_samples(cfg.world)
    sampled, judged = own(cfg, model)
    best = fusion(cfg, names)

    def make(out: Path) -> dict:
        prompts = thirds(cfg).json("rest.json")
        own_pairs = _own_pairs(_table(sampled, judged), prompts)
        fused_rows = _by_id(read_rows(best.get() / "best.jsonl"))
        rows = []
        for name, pair in own_pairs.items():
            if name in fused_rows:
                row = fused_rows[name]
                responses = {**row["responses"], **pair}
                rows.append({**row, "responses": responses})
        if not rows:
            raise _no_pair(cfg, len(prompts), "a best response of the sources, and ")
        write_rows(out / "pairs.jsonl", rows)
        dropped = len(prompts) - len(rows)
        return {"quadruples": len(rows), "dropped": dropped}

    inputs = {"scores": judged, "fusion": best}
    return Artifact("quadruples", version=1, inputs=inputs, make=make)


def _no_pair(cfg, prompts: int, beside: str = "") -> config.ConfigError:
    """Return the error that a model's own responses have no preference; beside: what else lacks."""
    return config.ConfigError(
        f"the reward model {cfg.world.reward_model} finds for none of {prompts} prompts {beside}"
        f"a best and a worst of the model's own {cfg.world.samples} (they score alike, or are "
        "empty): use another reward model, more prompts, or a higher sampling.temperature"
    )


def _own_pairs(table: pd.DataFrame, prompts: list[dict]) -> dict[str, dict]:
    """Return the best and the worst response to each prompt, by its id, where they are not one."""
    groups = dict(iter(table.groupby("id")))
    pairs = {}
    for prompt in prompts:
        name = prompt["id"]
        ends = best_and_worst(groups.get(name), name)
        if ends is None:
            continue
        best, worst = table.loc[list(ends), "response_ids"]
        if best != worst:
            pairs[name] = {TARGET_CHOSEN: best, REJECTED: worst}
    return pairs


def draw(cfg, rows: Artifact, seed: int) -> Artifact:
    """Keep the quadruples of a fraction of the prompts, the same for all models of one seed.

    Its get() raises ConfigError where none of these prompts has a quadruple.
    """

    def make(out: Path) -> None:
        prompts = thirds(cfg).json("rest.json")
        size = round(cfg.fraction * len(prompts))
        order = epoch_order(len(prompts), seed, epoch=stages.DRAW)
        first = order[: max(1, size)]
        kept = _by_id([prompts[i] for i in first])
        every_row = read_rows(rows.get() / "pairs.jsonl")
        drawn = [row for row in every_row if row["id"] in kept]
        if not drawn:
            raise config.ConfigError(
                f"fraction={cfg.fraction} draws {len(kept)} of {len(prompts)} prompts, and none of "
                f"the {len(every_row)} quadruples is of these: use a larger fraction, or more "
                "prompts"
            )
        write_rows(out / "pairs.jsonl", drawn)

    inputs = {
        "quadruples": rows,
        "thirds": thirds(cfg),
        "fraction": cfg.fraction,
        "seed": seed,
    }
    return Artifact("draw", version=1, inputs=inputs, make=make)


def _table(answers: Artifact, judged: Artifact) -> pd.DataFrame:
    """Return a row for each response that has a token: id, sample, response_ids, reward, length."""
    response = ["id", "sample"]
    responses = gather.read_lines(answers, "responses.jsonl")
    scores = gather.read_lines(judged, "scores.jsonl")
    tokens = responses[[*response, "response_ids"]]
    measures = scores[[*response, "reward", "length"]]
    table = tokens.merge(measures, on=response)
    with_a_token = table[table["length"] > 0]
    return with_a_token.reset_index(drop=True)


def _by_id(rows: list[dict]) -> dict[str, dict]:
    """Return rows, or prompts, by their id."""
    return {row["id"]: row for row in rows}


# --- what is trained


def trained(
    cfg,
    loss: str,
    *,
    base: Artifact | None = None,
    names: Sequence[str] = (),
    responses: Sequence[str] = OWN,
    seed: int = 0,
    **changes,
) -> Artifact:
    """Train Target-SFT (or `base`) on a draw of its quadruples.

    The same reference pass serves all losses and seeds. names: the sources, default cfg.sources.
    responses: those that the loss takes, in its order. changes: of cfg.train, as stages.changed()
    takes them.
    """
    names = names or cfg.sources
    start = "Target"
    if base is None:
        start = f"Target-SFT on {' + '.join(names)}"
        base = target_sft(cfg, names)
    rows = quadruples(cfg, names, base)
    chosen = responses[0]
    desc = f"{loss.upper()} from {start}, {chosen} chosen, seed {seed}"
    for name, value in changes.items():
        desc += f", {name} {value:g}"
    return stages.training(
        cfg,
        stages.changed(cfg.train, loss=loss, **changes),
        draw(cfg, rows, seed),
        "pairs.jsonl",
        responses,
        base=base,
        reference_pass=stages.reference(cfg, base, rows, config.FUSED),
        seed=seed,
        desc=desc,
    )


def fused(
    cfg,
    loss: str = "dpo",
    *,
    names: Sequence[str] = (),
    seed: int = 0,
    **changes,
) -> Artifact:
    """Train WRPO in the form of DPO, IPO or SimPO; arguments as of trained()."""
    settings = {**cfg.objectives[loss], "alpha": cfg.train.alpha, **changes}
    return trained(
        cfg,
        FUSING[loss],
        names=names,
        responses=config.FUSED,
        seed=seed,
        **settings,
    )


# --- what is compared


def main_result(cfg) -> Artifact:
    """Judge Table 1's own rows.

    These are the target, the baselines trained from it, and what starts from Target-SFT. The line
    from Target-SFT through its DPO model has further points, with their "alpha".
    """
    points = [
        _target_point(cfg, {"model": "Target", "seed": 0}),
        _point(cfg, {"model": "Target-SFT", "seed": 0}, target_sft(cfg, cfg.sources)),
    ]
    for seed in cfg.seeds:
        trainings = _main_trainings(cfg, seed)
        for name, model in trainings.items():
            points.append(_point(cfg, {"model": name, "seed": seed}, model))
        own_dpo = "Target-SFT-DPO"
        line = {"model": own_dpo, "seed": seed}
        start = target_sft(cfg, cfg.sources)
        points += _line(cfg, line, start, trainings[own_dpo])
    return gather.judged(cfg, points)


def main_models(cfg) -> dict[str, stages.Weights]:
    """Return the models of Table 1's own rows by name; first seed."""
    start = stages.sft(cfg)
    trainings = {"Target-SFT": target_sft(cfg, cfg.sources), **_main_trainings(cfg, cfg.seeds[0])}
    models = {"Target": stages.Weights(start)}
    for name, model in trainings.items():
        models[name] = stages.Weights(start, model)
    return models


def _main_trainings(cfg, seed: int) -> dict[str, Artifact]:
    """Return the baselines trained from the target, and what starts from Target-SFT, by name."""
    start = stages.sft(cfg)
    models = {}
    for loss, settings in cfg.objectives.items():
        models[f"Target-{NAMES[loss]}"] = trained(cfg, loss, base=start, seed=seed, **settings)
    models["Target-SFT-DPO"] = _own_dpo(cfg, seed)
    models["Target-SFT-WRPO"] = fused(cfg, seed=seed)
    return models


def _own_dpo(cfg, seed: int, responses: Sequence[str] = OWN) -> Artifact:
    """Train Target-SFT by DPO on its own pairs, or on others."""
    settings = cfg.objectives["dpo"]
    return trained(cfg, "dpo", responses=responses, seed=seed, **settings)


def weighted(cfg) -> Artifact:
    """Judge what enters the reward, and every α_max, dynamic and static; first seed.

    model: Target-SFT, "target only", "source only", "weighted", "hybrid" (two losses), or "α" with
    alpha and dynamic.
    """
    seed = cfg.seeds[0]
    settings = cfg.objectives["dpo"]
    source_only = _own_dpo(cfg, seed, OFF_POLICY)
    models = {
        "Target-SFT": target_sft(cfg, cfg.sources),
        "weighted": fused(cfg, seed=seed),
        "target only": _own_dpo(cfg, seed),
        "source only": source_only,
        "hybrid": trained(cfg, "hybrid", responses=config.FUSED, seed=seed, **settings),
    }
    points = [_point(cfg, {"model": name}, model) for name, model in models.items()]
    for alpha, dynamic in itertools.product(cfg.alphas, (True, False)):
        if alpha == 1 and not dynamic:  # constant 1 is the source alone
            model = source_only
        else:
            model = fused(cfg, seed=seed, alpha=alpha, dynamic=dynamic)
        columns = {"model": "α", "alpha": alpha, "dynamic": dynamic}
        points.append(_point(cfg, columns, model))
    return gather.judged(cfg, points)


def by_sources(cfg) -> Artifact:
    """Judge Target-SFT, and WRPO from it, for every choice of sources; seeds of the ablations."""
    choices = {}
    for names in (*cfg.source_sets, cfg.sources):
        choices[" + ".join(names)] = names
    points = []
    for choice, names in choices.items():
        first = cfg.seeds[0]
        start = {"sources": choice, "model": "Target-SFT", "seed": first}
        points.append(_point(cfg, start, target_sft(cfg, names)))
        for seed in _ablated(cfg):
            columns = {"sources": choice, "model": "Target-SFT-WRPO", "seed": seed}
            points.append(_point(cfg, columns, fused(cfg, names=names, seed=seed)))
    return gather.judged(cfg, points)


def _ablated(cfg) -> tuple[int, ...]:
    """Return the seeds of the ablations."""
    return cfg.seeds[: cfg.ablation_seeds]


def by_objective(cfg) -> Artifact:
    """Judge WRPO in the forms of DPO, IPO and SimPO beside each of these alone.

    Alone they learn from the target's own pairs. Seeds of the ablations.
    """
    start = {"model": "Target-SFT", "seed": cfg.seeds[0]}
    points = [_point(cfg, start, target_sft(cfg, cfg.sources))]
    for seed in _ablated(cfg):
        for loss, settings in cfg.objectives.items():
            name = NAMES[loss]
            alone = trained(cfg, loss, seed=seed, **settings)
            points.append(_point(cfg, {"model": name, "seed": seed}, alone))
            both = fused(cfg, loss, seed=seed)
            points.append(_point(cfg, {"model": f"WRPO-{name}", "seed": seed}, both))
    return gather.judged(cfg, points)


def _point(cfg, columns: dict, model: Artifact) -> gather.Point:
    """Return a trained model as a point of a table."""
    weights = stages.Weights(stages.sft(cfg), model)
    return _scored_point(cfg, columns, weights)


def _target_point(cfg, columns: dict) -> gather.Point:
    """Return the target itself as a point of a table."""
    start = stages.sft(cfg)
    weights = stages.sft_weights(cfg.world, start, target_sft(cfg, cfg.sources))
    return _scored_point(cfg, columns, weights)


def _line(cfg, columns: dict, start: Artifact, model: Artifact) -> list[gather.Point]:
    """Return the points of the line from `start` through a model that lie beside the model."""
    points = []
    for alpha in cfg.kl_alphas:
        weights = stages.Weights(start, model, alpha)
        points.append(_scored_point(cfg, {**columns, "alpha": alpha}, weights))
    return points


def _scored_point(cfg, columns: dict, weights: stages.Weights) -> gather.Point:
    """Sample responses to the prompts that judge, and score them.

    Raises ConfigError for a world without test prompts.
    """
    config.require_prompts(cfg.world, "test_prompts")
    asked = judged_on(cfg)
    sampled = stages.responses(
        cfg, weights, asked.split, prompts=asked.prompts, samples=cfg.test_samples, seed=2
    )
    every_prompt = cfg.held_out or cfg.world.test_prompts
    kl_prompts = cfg.kl_prompts or every_prompt
    scores = stages.scores(cfg, sampled, asked.split, kl_prompts=kl_prompts, prompts=asked.prompts)
    return gather.Point(columns, scores)


def judged_on(cfg) -> sources.Asked:
    """Return the prompts that judge: those held out of the last pool, or the world's own."""
    if not cfg.held_out:
        return sources.Asked(stages.texts(cfg.world), "test_prompts")
    last = corpus.pool(cfg.world, cfg.world.pools - 1)
    return _first_prompts(cfg, last, cfg.held_out)


def _first_prompts(cfg, split: str, number: int) -> sources.Asked:
    """Return the first prompts of a split."""
    texts = stages.texts(cfg.world)

    def make(out: Path) -> None:
        prompts = texts.json(f"{split}.json")
        gather.write_json(out / "prompts.json", prompts[:number])

    inputs = {"texts": texts, "split": split, "number": number}
    first = Artifact("first-prompts", version=1, inputs=inputs, make=make)
    return sources.Asked(first, "prompts")


# --- what a source must be


def own_pairs(cfg, seed: int) -> Artifact:
    """Pair the target's own best and worst response to each prompt of a training: pairs.jsonl.

    Raises ConfigError for a single sample; its get() does where no prompt has both.
    """
    stages.require_samples(cfg.world)
    asked = block(cfg, seed)
    pool = _own_pool(cfg, stages.Weights(stages.sft(cfg)), asked)

    def make(out: Path) -> dict:
        prompts = asked.rows()
        pairs = _own_pairs(_table(*pool), prompts)
        if not pairs:
            raise _no_pair(cfg, len(prompts))
        rows = [{**row, "responses": pairs[row["id"]]} for row in prompts if row["id"] in pairs]
        write_rows(out / "pairs.jsonl", rows)
        return {"pairs": len(rows), "dropped": len(prompts) - len(rows)}

    inputs = {"scores": pool.scores}
    return Artifact("own-pairs", version=1, inputs=inputs, make=make)


def block(cfg, seed: int) -> sources.Asked:
    """Return the prompts that a training with this seed learns from: the first ones of its pool."""
    return _first_prompts(cfg, corpus.pool(cfg.world, seed), cfg.learnt)


def fused_pairs(cfg, names: Sequence[str], seed: int) -> Artifact:
    """Set the best response of the named sources beside each of the target's own pairs.

    pairs.jsonl, of the same prompts whatever the sources: where these say nothing, the target's own
    best stands in for theirs, and WRPO is DPO. The fourth response, "source_rejected", is the worst
    of the source that has the best, or the target's where that one has no worse.
    """
    pairs = own_pairs(cfg, seed)
    pools = _source_pools(cfg, sorted(names), block(cfg, seed))

    def make(out: Path) -> dict:
        answers = dict(iter(_tables(pools).groupby("id")))
        rows = []
        wins = Counter()
        for row in read_rows(pairs.get() / "pairs.jsonl"):
            responses, source = _beside(row, answers.get(row["id"]))
            rows.append({**row, "responses": responses})
            wins[source] += 1
        write_rows(out / "pairs.jsonl", rows)
        return {"wins": wins}

    inputs = {"pairs": pairs, "scores": _scores_of(pools)}
    return Artifact("fused-pairs", version=1, inputs=inputs, make=make)


def _beside(row: dict, answers: pd.DataFrame | None) -> tuple[dict, str]:
    """Return the four responses of a prompt, and whose the first is.

    row: with the target's own pair. answers: those of the sources, None if there are none.
    """
    own_best = row["responses"][TARGET_CHOSEN]
    own_worst = row["responses"][REJECTED]
    ends = best_and_worst(answers, row["id"])
    if ends is None:
        return {SOURCE_CHOSEN: own_best, **row["responses"], SOURCE_REJECTED: own_worst}, TARGET
    best = answers.loc[ends[0]]
    of_same = answers[answers["source"] == best["source"]]
    worst = own_worst
    ends = best_and_worst(of_same, row["id"])
    if ends is not None and of_same.loc[ends[1], "reward"] < best["reward"]:
        worst = of_same.loc[ends[1], "response_ids"]
    best_ids = best["response_ids"]
    return {SOURCE_CHOSEN: best_ids, **row["responses"], SOURCE_REJECTED: worst}, best["source"]


def compared(cfg) -> Artifact:
    """Judge DPO on the target's own pairs, and WRPO with each set of sources, from the target.

    model: Target, DPO (on the line through it, at each α of cfg.kl_alphas too), a set and its
    largest α (set_name()), or the best against the worst of the same source, of the first set.
    Raises ConfigError for a configuration that compares no sources.
    """
    require_compared(cfg)
    start = stages.sft(cfg)
    at_start = stages.sft_weights(cfg.world, start, _own_training(cfg, cfg.seeds[0]))
    points = [_scored_point(cfg, {"model": TARGET, "seed": cfg.seeds[0]}, at_start)]
    for seed in cfg.seeds:
        dpo = _own_training(cfg, seed)
        points.append(_point(cfg, {"model": DPO, "seed": seed}, dpo))
        points += _line(cfg, {"model": DPO, "seed": seed}, start, dpo)
        for name, model in _taught(cfg, seed).items():
            points.append(_point(cfg, {"model": name, "seed": seed}, model))
    return gather.judged(cfg, points)


def require_compared(cfg) -> None:
    """Raise ConfigError for a configuration that compares no sources."""
    if not cfg.compared:
        raise config.ConfigError(
            f"compared is empty at profile {cfg.profile} (in data/frozen's world too: use "
            "COMPUTE=cold at cpu): name sets of sources, as [[many], [positive]]"
        )


def set_name(names: Sequence[str], alpha: float | None = None) -> str:
    """Return what a set of sources is called in tables; alpha: with what share it is fused."""
    name = " + ".join(names)
    return name if alpha is None else f"{name}, α to {alpha:g}"


def same_source_name(names: Sequence[str]) -> str:
    """Return what DPO on the best and worst response of the same source is called in tables."""
    return f"{set_name(names)}, best and worst"


def _own_training(cfg, seed: int) -> Artifact:
    """Train the target by DPO on its own pairs."""
    rows = own_pairs(cfg, seed)
    settings = stages.changed(cfg.train, loss="dpo", **cfg.objectives["dpo"])
    return _from_target(cfg, settings, rows, OWN, OWN, seed, DPO)


def _taught(cfg, seed: int) -> dict[str, Artifact]:
    """Return the trainings of the target with each set of sources, by name."""
    four = (*config.FUSED, SOURCE_REJECTED)
    beta = cfg.objectives["dpo"]
    trainings = {}
    for names in cfg.compared:
        rows = fused_pairs(cfg, names, seed)
        for alpha in cfg.compared_alphas:
            name = set_name(names, alpha)
            settings = stages.changed(cfg.train, loss="wrpo", alpha=alpha, **beta)
            trainings[name] = _from_target(
                cfg, settings, rows, config.FUSED, four, seed, f"WRPO, {name}"
            )
    first = cfg.compared[0]
    rows = fused_pairs(cfg, first, seed)
    settings = stages.changed(cfg.train, loss="dpo", **beta)
    name = same_source_name(first)
    trainings[name] = _from_target(cfg, settings, rows, SAME_SOURCE, four, seed, f"DPO, {name}")
    return trainings


def _from_target(
    cfg,
    settings: config.Train,
    rows: Artifact,
    responses: Sequence[str],
    scored_responses: Sequence[str],
    seed: int,
    desc: str,
) -> Artifact:
    """Train the target on responses of rows; one reference pass has all that the rows hold."""
    start = stages.sft(cfg)
    return stages.training(
        cfg,
        settings,
        rows,
        "pairs.jsonl",
        responses,
        base=start,
        reference_pass=stages.reference(cfg, start, rows, scored_responses),
        seed=seed,
        desc=f"{desc}, seed {seed}",
    )


def strength(cfg) -> Artifact:
    """Measure how strong each set of sources is, and how far away, on the world's dev prompts.

    best.csv: a row a set and prompt: sources (Target: its own), prompt, gold, reward, length,
    repetition, nats (mean log-probability of a token under the target), of the response that the
    reward model likes best. facts.json: what is known of each source's answers.
    Raises ConfigError as compared() does.
    """
    require_compared(cfg)
    config.require_prompts(cfg.world, "dev_prompts")
    asked = sources.Asked(stages.texts(cfg.world), "dev_prompts")
    own_words = _own_pool(cfg, stages.Weights(stages.sft(cfg)), asked)
    pools = {TARGET: {TARGET: own_words}}
    for names in cfg.compared:
        pools[set_name(names)] = _source_pools(cfg, sorted(names), asked)
    scores = {name: _scores_of_best(cfg, of_set, asked) for name, of_set in pools.items()}

    def make(out: Path) -> None:
        needs.check(cfg)
        tables = []
        for name, judged in scores.items():
            table = gather.read_lines(judged, "scores.jsonl")
            tables.append(table.assign(sources=name))
        table = _strengths(pd.concat(tables, ignore_index=True))
        gather.write_table(out / "best.csv", table.round(5))
        facts = {}
        for of_set in pools.values():
            for name, pool in of_set.items():
                facts[name] = pool.responses.manifest["facts"]
        gather.write_json(out / "facts.json", facts, indent=1)

    inputs = {"scores": scores}
    return Artifact("strength", version=1, inputs=inputs, make=make, hours=cfg.needs.hours)


def _scores_of_best(cfg, pools: dict[str, Pool], asked: sources.Asked) -> Artifact:
    """Score the best response to each prompt by all rewards, and by the target itself."""

    def make(out: Path) -> None:
        rows = _best_of_sources(_tables(pools), asked.rows())
        with open(out / "responses.jsonl", "w", encoding="utf-8") as file:
            for row in rows:
                ids = row["responses"][SOURCE_CHOSEN]
                line = {"id": row["id"], "sample": 0, "response_ids": ids, "logp": None}
                file.write(json.dumps(line) + "\n")

    inputs = {"scores": _scores_of(pools), "prompts": asked.prompts, "split": asked.split}
    best = Artifact("best-answers", version=1, inputs=inputs, make=make)
    number = cfg.world.dev_prompts
    return stages.scores(cfg, best, asked.split, kl_prompts=number, prompts=asked.prompts)


def _strengths(table: pd.DataFrame) -> pd.DataFrame:
    """Return the table of strength(); prompts are numbered, the same for all sets."""
    numbers, _ = pd.factorize(table["id"])
    if "gold" not in table:
        table["gold"] = table["reward"]
    nats = table["logp_sft"] / table["length"]
    table = table.assign(prompt=numbers, nats=nats)
    return table[["sources", "prompt", "gold", "reward", "length", "repetition", "nats"]]


def manipulation(cfg, best: pd.DataFrame, bootstrap_seed: int = 0) -> pd.DataFrame:
    """Return how much stronger each set's best is than the target's best, and whether it is tested.

    best: of strength(). A row a set: sources, prompts (that it answers), stronger (mean σ(gold),
    paired by prompt) with low and high, by_reward (of the reward model, logits), further (nats a
    token that its best is less likely under the target), testable: the mean is at least cfg.margin
    and its interval lies above 0.
    """
    if cfg.world.gold_rows:
        best = best.assign(gold=1 / (1 + np.exp(-best["gold"])))
    by_prompt = best.set_index(["sources", "prompt"])
    own_best = by_prompt.loc[TARGET]
    rows = []
    for names in cfg.compared:
        name = set_name(names)
        theirs = by_prompt.loc[name]
        both = theirs.merge(own_best, on="prompt", suffixes=("", "_own"))
        value, low, high = stats.paired_interval(
            both["gold"], both["gold_own"], seed=bootstrap_seed
        )
        row = {"sources": name, "prompts": len(both), "stronger": value, "low": low, "high": high}
        row["by_reward"] = (both["reward"] - both["reward_own"]).mean()
        row["further"] = (both["nats_own"] - both["nats"]).mean()
        rows.append({**row, "testable": bool(value >= cfg.margin and low > 0)})
    return pd.DataFrame(rows)


def measured(
    cfg,
    judged: Artifact,
    *,
    sft: str = TARGET,
    lines: dict[str, str] | None = None,
    bootstrap_seed: int = 0,
) -> AlphaCurves:
    """Return judged models, for estimates over trainings and prompts.

    sft: the model that all are compared with, and by which the gate goes; it is trained once.
    lines: model -> the model that its line starts from, which is its point at α = −1.
    Models of several choices of sources are called "model · sources".
    A gold reward that labels have trained is a logit; here it is σ(gold), as in expo.measured().
    """
    table = judged.csv("responses.csv.gz")
    if cfg.world.gold_rows:
        table["gold"] = 1 / (1 + np.exp(-table["gold"]))
    points = pd.DataFrame(judged.json("points.json"))
    table = _placed(table, lines or {})
    points = _placed(points, lines or {})
    return AlphaCurves(table, points, "model", sft, bootstrap_seed, chooses_on="test")


def _placed(table: pd.DataFrame, lines: dict[str, str]) -> pd.DataFrame:
    """Return rows of responses or of points with the columns that AlphaCurves reads."""
    if "alpha" not in table:
        table = table.assign(alpha=0.0)
    if "sources" in table:
        table = table.assign(model=table["model"] + " · " + table["sources"])
    table = table.fillna({"alpha": 0.0})
    parts = [table]
    for model, start in lines.items():
        at_start = table[table["model"] == start]
        for seed in table[table["model"] == model]["seed"].unique():
            parts.append(at_start.assign(model=model, seed=seed, alpha=-1.0))
    return pd.concat(parts, ignore_index=True).assign(split="test")


# --- what sources say, and what the training does


def collected(cfg) -> Artifact:
    """Set the responses of every source and of Target-SFT to the rest of the prompts side by side.

    responses.csv.gz, a row a response: source, prompt, reward, length, overlap (the share of its
    token pairs that another response of Target-SFT to this prompt has), chosen (it is y_ws, or for
    Target-SFT y_wt).
    facts.json: how often each source's response was the best one, of all prompts, and how many
    prompts were dropped.
    """
    model = target_sft(cfg, cfg.sources)
    pools = _source_pools(cfg, cfg.sources)
    pools["Target-SFT"] = own(cfg, model)
    rows = quadruples(cfg, cfg.sources, model)
    best = fusion(cfg, cfg.sources)

    def make(out: Path) -> None:
        needs.check(cfg)
        fused_rows = _by_id(read_rows(rows.get() / "pairs.jsonl"))
        table = _side_by_side(_tables(pools), fused_rows)
        gather.write_table(out / "responses.csv.gz", table.round(5))
        facts = {
            "sources": best.manifest["facts"],
            "quadruples": rows.manifest["facts"],
        }
        gather.write_json(out / "facts.json", facts, indent=1)

    inputs = {"pools": _scores_of(pools), "quadruples": rows}
    return Artifact("collected", version=1, inputs=inputs, make=make, hours=cfg.needs.hours)


def _side_by_side(table: pd.DataFrame, quadruples: dict[str, dict]) -> pd.DataFrame:
    """Return the table of collected(), of the prompts that have a quadruple.

    Prompts are numbered: no row of the data set leaves artifacts/.
    """
    table = table[table["id"].isin(quadruples)]
    chosen = []
    for row in table.itertuples():
        responses = quadruples[row.id]["responses"]
        best = [responses[SOURCE_CHOSEN], responses[TARGET_CHOSEN]]
        chosen.append(row.response_ids in best)
    numbers, _ = pd.factorize(table["id"])
    table = table.assign(prompt=numbers, overlap=_overlaps(table), chosen=chosen)
    return table.drop(columns=["id", "sample", "response_ids"])


def _overlaps(table: pd.DataFrame) -> list[float]:
    """Return the share of each response's token pairs that another one of Target-SFT has.

    The other one is a response to the same prompt.
    """
    token_pairs = [set(itertools.pairwise(ids)) for ids in table["response_ids"]]
    of_target = defaultdict(list)  # positions in the table, by prompt
    for position, row in enumerate(table.itertuples()):
        if row.source == "Target-SFT":
            of_target[row.id].append(position)
    overlaps = []
    for position, name in enumerate(table["id"]):
        pairs = token_pairs[position]
        others = set()
        for other in of_target[name]:
            if other != position:
                others |= token_pairs[other]
        shared = len(pairs & others)
        overlaps.append(shared / max(1, len(pairs)))
    return overlaps


def dynamics(cfg) -> Artifact:
    """Read the training logs, and how likely the reference finds each response.

    log.csv: model, seed and what train logs at each step (rewards in β nats), of Target-SFT-DPO and
    of WRPO. gap.csv: model (the reference), response (of config.FUSED), prompt, nats: the mean
    log-probability of its tokens.
    """
    model = target_sft(cfg, cfg.sources)
    rows = quadruples(cfg, cfg.sources, model)
    runs = _logged_runs(cfg)
    references = {
        "Target": stages.reference(cfg, stages.sft(cfg), rows, config.FUSED),
        "Target-SFT": stages.reference(cfg, model, rows, config.FUSED),
    }

    def make(out: Path) -> None:
        needs.check(cfg)
        logs = []
        for (name, seed), run in runs.items():
            log = gather.read_lines(run, "log.jsonl")
            logs.append(log.assign(model=name, seed=seed))
        log = pd.concat(logs).drop(columns=list(CLOCK), errors="ignore")
        gather.write_table(out / "log.csv", log.round(6))
        gaps = []
        for name, reference_pass in references.items():
            gap = _mean_logps(reference_pass)
            gaps.append(gap.assign(model=name))
        gap = pd.concat(gaps)
        gather.write_table(out / "gap.csv", gap.round(5))

    inputs = {
        "runs": list(runs.values()),
        "names": [f"{name} {seed}" for name, seed in runs],
        "references": references,
    }
    return Artifact("dynamics", version=1, inputs=inputs, make=make, hours=cfg.needs.hours)


def _logged_runs(cfg) -> dict[tuple[str, int], Artifact]:
    """Return the trainings whose logs are read, by (name, seed)."""
    runs = {}
    for seed in cfg.seeds:
        runs["Target-SFT-DPO", seed] = _own_dpo(cfg, seed)
    for seed in cfg.seeds:
        runs["Target-SFT-WRPO", seed] = fused(cfg, seed=seed)
    first = cfg.seeds[0]
    for alpha in cfg.alphas:
        if alpha != cfg.train.alpha:
            name = f"α to {alpha:g}"
            runs[name, first] = fused(cfg, alpha=alpha, seed=first)
    return runs


def _mean_logps(reference_pass: Artifact) -> pd.DataFrame:
    """Return prompt, response and nats: the mean log-probability of a response's tokens."""
    logps = stages.reference_values(reference_pass, "logps")
    tokens = stages.reference_values(reference_pass, "tokens")
    means = logps / tokens
    table = pd.DataFrame(means.T, columns=list(config.FUSED))
    table = table.rename_axis("prompt").reset_index()
    return table.melt("prompt", var_name="response", value_name="nats")


def win_rate(
    table,
    value: str,
    to: str,
    against: str,
    *,
    seed: int,
) -> tuple[float, float, float]:
    """Return (share − 1/2, low, high) of responses of model `to` with a higher `value`.

    Higher than that of `against`, paired by prompt and sample; a tie is half. Prompts are drawn as
    a whole.
    """
    ours = table[table["model"] == to]
    theirs = table[table["model"] == against]
    pairing = ["prompt", "sample"]
    both = ours.merge(theirs[[*pairing, value]], on=pairing, suffixes=("", "_theirs"))
    our_value = both[value]
    their_value = both[f"{value}_theirs"]
    wins = our_value > their_value
    ties = our_value == their_value
    share = wins + ties / 2
    return stats.mean_interval(share - 0.5, seed=seed, groups=both["prompt"])


# --- the bandit of sources


class Cell(NamedTuple):
    """A world of the bandit, and the KL (nats) at which methods are compared in it."""

    world: bandit.World
    kl: float = KL

    @property
    def columns(self) -> dict:
        """Its place in the table."""
        names = ("strength", "distance", "prompts", "noise")
        place = {name: getattr(self.world, name) for name in names}
        return {**place, "kl": self.kl}


def fusion_bandit(cfg) -> Artifact:
    """Train WRPO and DPO in the fusion bandit, for every source, to an equal KL.

    rises.csv.gz, a row a cell, seed and method: strength, distance, prompts, noise, kl, seed,
    method (constant, rising: WRPO; better, both: hybrids by DPO), alpha, rise (of the expected true
    reward over the reference, in sd of the target's reward). Constant α of 0 is DPO on the target's
    own pairs, 1 is DPO on the source's.
    sources.csv, a row a cell: stronger (true reward of y_ws less that of y_wt), gap (what y_ws is
    less likely under the target than y_wt, nats) and preferred (how often the reward model prefers
    y_ws); means over the seeds.
    identities.json: as of bandit_identities().
    Raises ConfigError for prompts that are no equal batches.
    """
    for prompts in cfg.bandit_prompts:
        if prompts % STEPS:
            raise config.ConfigError(
                f"bandit_prompts: {prompts} prompts are no {STEPS} equal batches"
            )
    cells = bandit_cells(cfg)
    constant = bandit.constant(cfg.bandit_alphas, STEPS)
    rising = bandit.rising(cfg.bandit_rising, STEPS)
    columns = [{"method": "constant", "alpha": alpha} for alpha in cfg.bandit_alphas]
    columns += [{"method": "rising", "alpha": alpha} for alpha in cfg.bandit_rising]
    columns += [{"method": "better"}, {"method": "both"}]
    schedule = np.hstack([constant, rising])

    def make(out: Path) -> None:
        tables = []
        of_sources = []
        for cell in gather.watched(cells, "bandits"):
            rises, source = _cell(cell, schedule, columns, cfg.bandit_seeds)
            tables.append(rises)
            of_sources.append(source)
        table = pd.concat(tables, ignore_index=True)
        gather.write_table(out / "rises.csv.gz", table.round(5))
        gather.write_table(out / "sources.csv", pd.DataFrame(of_sources).round(4))
        gather.write_json(out / "identities.json", bandit_identities(), indent=1)

    inputs = {
        "cells": [[asdict(cell.world), cell.kl] for cell in cells],
        "constant": cfg.bandit_alphas,
        "rising": cfg.bandit_rising,
        "seeds": cfg.bandit_seeds,
        "beta": BETA,
        "steps": STEPS,
    }
    does = f"fusion bandit, in this process: {len(cells)} cells of {cfg.bandit_seeds} seeds"
    return Artifact("fusion-bandit", version=1, inputs=inputs, make=make, does=does)


def _cell(
    cell: Cell, schedule: np.ndarray, columns: list[dict], seeds: int
) -> tuple[pd.DataFrame, dict]:
    """Return the rises of every seed and method in a cell, and what its source is like."""
    rows = []
    of_seeds = []
    for seed in range(seeds):
        drawn = bandit.draw(cell.world, seed)
        source = {
            "stronger": drawn.strength,
            "gap": drawn.gap,
            "preferred": drawn.source_is_better.mean(),
        }
        of_seeds.append(source)
        rises = _rises(drawn, cell.kl, schedule)
        for column, rise in zip(columns, rises, strict=True):
            rows.append({**cell.columns, "seed": seed, **column, "rise": rise})
    means = pd.DataFrame(of_seeds).mean().to_dict()
    return pd.DataFrame(rows), {**cell.columns, **means}


def bandit_cells(cfg) -> list[Cell]:
    """Return the map of sources, and the cells in which one setting more is varied."""
    cells = []
    for strength, distance in itertools.product(cfg.bandit_strengths, cfg.bandit_distances):
        cells.append(Cell(bandit.World(strength, distance)))
    for strength, distance in cfg.bandit_varied:
        world = bandit.World(strength, distance)
        for prompts in cfg.bandit_prompts:
            cells.append(Cell(replace(world, prompts=prompts)))
        for noise in cfg.bandit_noises:
            cells.append(Cell(replace(world, noise=noise)))
        for kl in cfg.bandit_kls:
            cells.append(Cell(world, kl))
    return cells


def _rises(drawn: bandit.Bandit, kl: float, alphas: np.ndarray) -> np.ndarray:
    """Return the rise of WRPO with each column of alphas, and of the two hybrids."""
    pairs_alpha = bandit.constant([0.0], STEPS)  # any α is DPO on pairs
    rises = []
    for quadruples, schedule in (
        (drawn.quadruples, alphas),
        (bandit.better(drawn), pairs_alpha),
        (bandit.both(drawn), pairs_alpha),
    ):
        rises.append(bandit.at_kl(quadruples, schedule, drawn.test, kl=kl, beta=BETA))
    return np.concatenate(rises)


def bandit_identities() -> dict[str, float]:
    """Return the largest difference of the rise of methods that should be one, at one rate.

    own: WRPO at α = 0, DPO on (y_wt, y_l). source: at α = 1, DPO on (y_ws, y_l). same: at any α
    where y_ws is y_wt, DPO. Of seeds of the world CHECKED.
    """
    differences = {"own": [], "source": [], "same": []}
    for seed in range(CHECKS):
        drawn = bandit.draw(CHECKED, seed)
        quadruples = drawn.quadruples
        own_pairs = bandit.pairs(quadruples.target, quadruples.rejected)
        source_pairs = bandit.pairs(quadruples.source, quadruples.rejected)
        dpo_own = _rise_at_rate(drawn, own_pairs, [0.5])
        dpo_source = _rise_at_rate(drawn, source_pairs, [0.5])
        first, last = _rise_at_rate(drawn, quadruples, [0.0, 1.0])
        of_same = _rise_at_rate(drawn, own_pairs, [0.0, 0.1, 1.0])
        differences["own"].append(abs(first - dpo_own).max())
        differences["source"].append(abs(last - dpo_source).max())
        differences["same"].append(abs(of_same - dpo_own).max())
    return {name: float(max(values)) for name, values in differences.items()}


def _rise_at_rate(drawn: bandit.Bandit, quadruples: bandit.Quadruples, alphas) -> np.ndarray:
    rates = np.full(len(alphas), RATE)
    schedule = bandit.constant(alphas, STEPS)
    theta = bandit.train(quadruples, schedule, lrs=rates, beta=BETA)
    rise, _ = bandit.measure(theta, drawn.test)
    return rise
