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
POINT = ["kind", "method", "seed", "place"]  # the columns that say which point a response is of


def known_c(kind: str, entropies: np.ndarray, values: tuple[float, float], seed: int) -> np.ndarray:
    """Return c of each prompt: the first of the values for half of them, (prompts,) float64.

    With FREE they are drawn; with TIED they are those with the smallest entropies. Raises
    ValueError for another kind.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {KINDS}, got {kind!r}")
    prompts = len(entropies)
    if kind == FREE:
        generator = np.random.default_rng([seed, 0])
        order = generator.permutation(prompts)
    else:
        order = np.argsort(entropies, kind="stable")
    first_half = order[: prompts // 2]
    large, small = values
    c = np.full(prompts, small)
    c[first_half] = large
    return c


def right_labels(c: np.ndarray, gaps: np.ndarray, seed: int) -> np.ndarray:
    """Draw whether each label shows the better response, with the chance σ(c · gap)."""
    generator = np.random.default_rng([seed, 1])
    coins = generator.uniform(size=len(gaps))
    chances = expit(c * gaps)
    return coins < chances


def labelled(cfg, kind: str, seed: int) -> Artifact:
    """Draw labels for the pairs of a training with this seed: pairs.jsonl, agreement.json (c).

    labels.csv, a row a pair: c, gap (of the gold reward, best − worst, a logit), right (whether the
    label shows the best), entropy (normalised, mean of both responses).
    """
    judge = stages.oracle(cfg.world)
    drawn = stages.subset(cfg, cfg.fraction, seed)
    every_pair = stages.pairs(cfg, seed)
    reference_pass = stages.reference(cfg, rows=every_pair)
    scores = every_pair.inputs["scores"]
    inputs = {
        "pairs": drawn,
        "reference": reference_pass,
        "scores": scores,
        "kind": kind,
        "values": cfg.known,
        "seed": seed,
    }

    def make(out: Path) -> None:
        rows = read_rows(drawn.get() / "pairs.jsonl")
        ids = [row["id"] for row in rows]
        gaps = _gaps(scores, judge).loc[ids].to_numpy()
        entropies = _entropies(reference_pass).loc[ids].to_numpy()
        c = known_c(kind, entropies, cfg.known, seed)
        right = right_labels(c, gaps, seed)
        labelled_rows = []
        for row, is_right in zip(rows, right, strict=True):
            labelled_rows.append(row if is_right else _flipped(row))
        weighted.write_pairs(out, labelled_rows, c)
        columns = {
            "c": c,
            "gap": gaps,
            "right": right,
            "entropy": entropies,
        }
        table = pd.DataFrame(columns).round(6)
        gather.write_table(out / "labels.csv", table)

    return Artifact("labelled", version=1, inputs=inputs, make=make)


def _gaps(scores: Artifact, judge: str) -> pd.Series:
    """Return by how much the best response to each prompt is better than the worst, by id."""
    responses = gather.read_lines(scores, "scores.jsonl")
    rewards = responses.groupby("id")[judge]
    best = rewards.max()
    worst = rewards.min()
    return best - worst


def _entropies(reference_pass: Artifact) -> pd.Series:
    """Return the mean entropy of the two responses of each pair, by id."""
    from safetensors import safe_open

    path = reference_pass.get() / "reference.safetensors"
    with safe_open(path, "numpy") as file:
        metadata = file.metadata()
        ids = json.loads(metadata["ids"])
        entropies = file.get_tensor("entropies")
    means = entropies.astype(float).mean(1)
    return pd.Series(means, index=ids)


def _flipped(row: dict) -> dict:
    """Return a pair with the worst response as the chosen one."""
    responses = row["responses"]
    flipped = {
        "chosen": responses["rejected"],
        "rejected": responses["chosen"],
    }
    return {**row, "responses": flipped}


def judged(cfg) -> Artifact:
    """Train every learner on labels of each kind and seed, and judge it at cfg.known_alphas.

    responses.csv.gz and points.json as of gather.write(), with the columns split, kind, method,
    seed, place (the α); method "SFT" is the SFT model. labels.csv: those of every training with
    kind and seed.
    """
    splits = mallows.judged_splits(cfg)
    config.require_prompts(cfg.world, *splits)
    labels = {}
    for kind in KINDS:
        for seed in cfg.seeds:
            labels[kind, seed] = labelled(cfg, kind, seed)
    points = _points(cfg, labels, splits)

    def make(out: Path) -> None:
        needs.check(cfg)
        table, facts = gather.scored(points, "models of known dispersion")
        gather.write(out, table, facts)
        tables = []
        for (kind, seed), rows in labels.items():
            of_training = rows.csv("labels.csv")
            of_training["kind"] = kind
            of_training["seed"] = seed
            tables.append(of_training)
        gather.write_table(out / "labels.csv", pd.concat(tables))

    places = [columns for columns, _ in points]
    inputs = {
        "places": places,
        "points": gather.scores_of(points),
        "labels": list(labels.values()),
    }
    return Artifact("known-dispersion", version=1, inputs=inputs, make=make, hours=cfg.needs.hours)


def _points(cfg, labels: dict[tuple, Artifact], splits: list[str]) -> list[gather.Point]:
    """Return the points of the SFT model and of all trainings; labels: {(kind, seed): rows}."""
    sft = stages.Weights(stages.sft(cfg))
    points = []
    for split in splits:
        points.append(_point(cfg, {"method": SFT}, sft, split))
    for (kind, seed), rows in labels.items():
        for name in weighted.LEARNERS:
            model = weighted.trained(cfg, rows, name, seed)
            columns = {
                "kind": kind,
                "method": name,
                "seed": seed,
            }
            points += _line(cfg, columns, model, splits)
    return points


def _line(cfg, columns: dict, model: Artifact, splits: list[str]) -> list[gather.Point]:
    """Return the points of one training on all splits."""
    sft = stages.sft(cfg)
    points = []
    for alpha in cfg.known_alphas:
        weights = stages.Weights(sft, model, alpha)
        columns_here = {**columns, "place": alpha}
        for split in splits:
            point = _point(cfg, columns_here, weights, split)
            points.append(point)
    return points


def _point(cfg, columns: dict, weights: stages.Weights, split: str) -> gather.Point:
    """Sample from weights, and score that."""
    world = cfg.world
    sampled = stages.responses(cfg, weights, split, samples=cfg.test_samples, seed=SAMPLING_SEED)
    scores = stages.scores(
        cfg,
        sampled,
        split,
        judges=(stages.oracle(world), "vader"),
        kl_prompts=max(world.test_prompts, world.dev_prompts),
    )
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
    gate = _gate(table, points.json("points.json"))
    table = table.merge(gate, on=POINT)
    is_sft = table["method"] == SFT
    models = table[~is_sft]
    sft = table[is_sft]
    return models, sft


def _gate(table: pd.DataFrame, records: list[dict]) -> pd.DataFrame:
    """Return POINT and "passes", a row a point; records: points.json, one a point and split."""
    wanted = [*POINT, "distinct_2"]
    facts = pd.DataFrame(records).reindex(columns=wanted)
    distinct = _means(facts, "distinct_2")
    repetition = _means(table, "repetition")
    points = distinct.merge(repetition)
    is_sft = points["method"] == SFT
    points["passes"] = equal_kl.passing(points, points[is_sft])
    return points[[*POINT, "passes"]]


def _means(rows: pd.DataFrame, column: str) -> pd.DataFrame:
    """Return the mean of a column at each point; the SFT model's point has no kind and seed."""
    by_point = rows.groupby(POINT, dropna=False)
    means = by_point[column].mean()
    return means.reset_index()


def ahead(
    models: pd.DataFrame, sft: pd.DataFrame, kind: str, method: str, *, seed: int
) -> stats.Estimate | None:
    """Return by how much a method leads DPO at equal KL, as a share of what DPO gains.

    Points that do not pass the gate are left out, unless is_open() says that too few would be left.
    None where the two curves of a training share no range of KL, or DPO gains nothing. models and
    sft are those of measured().
    """
    is_kind = models["kind"] == kind
    rows = models[is_kind]
    if is_open(models, kind, method):
        rows = rows[rows["passes"]]
    try:
        return equal_kl.share_of_gain(rows, (method, DPO), sft, seed=seed)
    except ValueError:
        return None


def is_open(models: pd.DataFrame, kind: str, method: str) -> bool:
    """Return whether the trained models of a method and of DPO pass the gate in most trainings."""
    trained_alpha = models["place"].max()
    is_kind = models["kind"] == kind
    is_trained = models["place"] == trained_alpha
    ends = models[is_kind & is_trained]
    shares = ends.groupby("method")["passes"].mean()
    of_both = shares[[method, DPO]]
    return bool(of_both.min() > 0.5)
