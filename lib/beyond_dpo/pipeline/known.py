"""MallowsPO on a language model where the dispersion of every prompt is known.

Of the SFT model's responses to a prompt x the best and the worst by the gold reward are a pair; its
label is a coin that shows the best one with the chance σ(c(x) · Δgold). So c(x) is MallowsPO-θ's
weight (arXiv 2405.14953, Eq. 8), known for each prompt. It has two values, cfg.known, for half of
the prompts each.
"""

import json
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.special import expit

from beyond_dpo import stats
from beyond_dpo.pipeline import config, equal_kl, gather, mallows, needs, stages, weighted
from beyond_dpo.pipeline.artifacts import Artifact
from beyond_dpo.rows import read_rows

FREE = "free"  # c is drawn, whatever the prompt
TIED = "tied"  # c is large where the SFT model is surer than of half of the prompts
KINDS = (FREE, TIED)
SFT = "SFT"
DPO = "DPO"
SAMPLING_SEED = 2


def known_c(kind: str, entropies: np.ndarray, values: tuple[float, float], seed: int) -> np.ndarray:
    """Return c of each prompt: the first of the values for half of them, (prompts,) float64.

    With FREE they are drawn; with TIED they are those with the smallest entropies. Raises
    ValueError for another kind.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {KINDS}, got {kind!r}")
    order = np.argsort(entropies, kind="stable")
    if kind == FREE:
        order = np.random.default_rng([seed, 0]).permutation(len(entropies))
    large, small = values
    c = np.full(len(entropies), small)
    c[order[: len(order) // 2]] = large
    return c


def right_labels(c: np.ndarray, gaps: np.ndarray, seed: int) -> np.ndarray:
    """Draw whether each label shows the better response, with the chance σ(c · gap)."""
    coins = np.random.default_rng([seed, 1]).uniform(size=len(gaps))
    return coins < expit(c * gaps)


def labelled(cfg, kind: str, seed: int) -> Artifact:
    """Draw labels for the pairs of a training with this seed: pairs.jsonl, agreement.json (c).

    labels.csv, a row a pair: c, gap (of the gold reward, best − worst, a logit), right (whether the
    label shows the best), entropy (normalised, mean of both responses).
    """
    world = cfg.world
    judge = stages.oracle(world)
    drawn = stages.subset(cfg, cfg.fraction, seed)
    every_pair = stages.pairs(cfg, seed)
    reference_pass = stages.reference(cfg, rows=every_pair)
    inputs = {"pairs": drawn, "reference": reference_pass, "scores": every_pair.inputs["scores"]}
    inputs |= {"kind": kind, "values": cfg.known, "seed": seed}

    def make(out: Path) -> None:
        rows = read_rows(drawn.get() / "pairs.jsonl")
        ids = [row["id"] for row in rows]
        gaps = _gaps(inputs["scores"], judge).loc[ids].to_numpy()
        entropies = _entropies(reference_pass).loc[ids].to_numpy()
        c = known_c(kind, entropies, cfg.known, seed)
        right = right_labels(c, gaps, seed)
        flipped = [_flipped(row, is_right) for row, is_right in zip(rows, right, strict=True)]
        weighted.write_pairs(out, flipped, c)
        table = pd.DataFrame({"c": c, "gap": gaps, "right": right, "entropy": entropies})
        gather.write_table(out / "labels.csv", table.round(6))

    return Artifact("labelled", version=1, inputs=inputs, make=make)


def _gaps(scores: Artifact, judge: str) -> pd.Series:
    """Return by how much the best response to each prompt is better than the worst, by id."""
    rewards = gather.read_lines(scores, "scores.jsonl").groupby("id")[judge]
    return rewards.max() - rewards.min()


def _entropies(reference_pass: Artifact) -> pd.Series:
    """Return the mean entropy of the two responses of each pair, by id."""
    from safetensors import safe_open

    with safe_open(reference_pass.get() / "reference.safetensors", "numpy") as file:
        ids = json.loads(file.metadata()["ids"])
        entropies = file.get_tensor("entropies")
    return pd.Series(entropies.astype(float).mean(1), index=ids)


def _flipped(row: dict, is_right: bool) -> dict:
    """Return a pair as its label has it."""
    if is_right:
        return row
    best = row["responses"]["chosen"]
    worst = row["responses"]["rejected"]
    return {**row, "responses": {"chosen": worst, "rejected": best}}


def judged(cfg) -> Artifact:
    """Train every learner on labels of each kind and seed, and judge it at cfg.known_alphas.

    responses.csv.gz and points.json as of gather.write(), with the columns split, kind, method,
    seed, place (the α); method "SFT" is the SFT model. labels.csv: those of every training with
    kind and seed.
    """
    splits = mallows.judged_splits(cfg)
    config.require_prompts(cfg.world, *splits)
    labels = {(kind, seed): labelled(cfg, kind, seed) for kind in KINDS for seed in cfg.seeds}
    points = [_point(cfg, {"method": SFT}, stages.Weights(stages.sft(cfg)), s) for s in splits]
    for (kind, seed), rows in labels.items():
        for name in weighted.LEARNERS:
            model = weighted.trained(cfg, rows, name, seed)
            columns = {"kind": kind, "method": name, "seed": seed}
            points += _line(cfg, columns, model, splits)

    def make(out: Path) -> None:
        needs.check(cfg)
        table, facts = gather.scored(points, "models of known dispersion")
        gather.write(out, table, facts)
        tables = []
        for (kind, seed), rows in labels.items():
            tables.append(rows.csv("labels.csv").assign(kind=kind, seed=seed))
        gather.write_table(out / "labels.csv", pd.concat(tables))

    places = [columns for columns, _ in points]
    inputs = {"places": places, "points": gather.scores_of(points)}
    inputs["labels"] = list(labels.values())
    return Artifact("known-dispersion", version=1, inputs=inputs, make=make, hours=cfg.needs.hours)


def _line(cfg, columns: dict, model: Artifact, splits: list[str]) -> list[gather.Point]:
    """Return the points of one training on all splits."""
    points = []
    for alpha in cfg.known_alphas:
        weights = stages.Weights(stages.sft(cfg), model, alpha)
        for split in splits:
            points.append(_point(cfg, {**columns, "place": alpha}, weights, split))
    return points


def _point(cfg, columns: dict, weights: stages.Weights, split: str) -> gather.Point:
    """Sample from weights, and score that."""
    sampled = stages.responses(cfg, weights, split, samples=cfg.test_samples, seed=SAMPLING_SEED)
    judges = (stages.oracle(cfg.world), "vader")
    prompts = max(cfg.world.test_prompts, cfg.world.dev_prompts)
    scores = stages.scores(cfg, sampled, split, judges=judges, kl_prompts=prompts)
    return gather.Point({"split": split, **columns}, scores)


def measured(cfg, points: Artifact) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the responses of trained models and of the SFT model, for equal_kl and tables.

    "gold" is the probability σ(gold), "prompt" tells the prompts of all splits apart, and "passes"
    says whether a response's point passes the gate (equal_kl.passing).
    """
    table = points.csv("responses.csv.gz")
    if cfg.world.gold_rows:
        table["gold"] = expit(table["gold"])
    table["prompt"] = table["split"] + " " + table["prompt"].astype(str)
    place = ["kind", "method", "seed", "place"]
    facts = pd.DataFrame(points.json("points.json")).reindex(
        columns=["split", *place, "distinct_2"]
    )
    means = table.groupby([*place], dropna=False)["repetition"].mean().reset_index()
    by_point = facts.groupby(place, dropna=False)["distinct_2"].mean().reset_index().merge(means)
    is_sft = by_point["method"] == SFT
    by_point["passes"] = equal_kl.passing(by_point, by_point[is_sft])
    table = table.merge(by_point[[*place, "passes"]], on=place)
    sft = table["method"] == SFT
    return table[~sft], table[sft]


def ahead(
    models: pd.DataFrame, sft: pd.DataFrame, kind: str, method: str, *, seed: int
) -> stats.Estimate | None:
    """Return by how much a method leads DPO at equal KL, as a share of what DPO gains.

    Points that do not pass the gate are left out, unless is_open() says that too few would be left.
    None where the two curves of a training share no range of KL, or DPO gains nothing. models and
    sft are those of measured().
    """
    rows = models[models["kind"] == kind]
    if is_open(models, kind, method):
        rows = rows[rows["passes"]]
    try:
        return equal_kl.share_of_gain(rows, (method, DPO), sft, seed=seed)
    except ValueError:
        return None


def is_open(models: pd.DataFrame, kind: str, method: str) -> bool:
    """Return whether the trained models of a method and of DPO pass the gate in most trainings."""
    ends = models[(models["kind"] == kind) & (models["place"] == models["place"].max())]
    shares = ends.groupby("method")["passes"].mean()
    return bool(shares[[method, DPO]].min() > 0.5)
