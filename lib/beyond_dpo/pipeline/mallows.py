"""MallowsPO's experiments (arXiv 2405.14953): the bandit, the dispersion estimate, controlled
sentiment, plug-ins.

Each function returns an Artifact; nothing runs before its get().
"""

import json
import random
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
RECORDS = 200  # of each bandit's training, fewer towards its end


def bandits(cfg) -> Artifact:
    """Train the bandit with both links and every β; runs.csv.gz: method, step, beta, arm1 … arm5,
    reward, kl (nats).
    """

    def make(out: Path) -> None:
        from beyond_dpo import bandit

        frames, betas = [], cfg.bandit_betas
        for link in ("dpo", "mallows_phi"):
            steps, probs = bandit.train(betas, link=link, steps=cfg.bandit_steps)
            kept = (
                np.unique(np.geomspace(1, len(steps), RECORDS).astype(int)) - 1
            )  # it changes most at the start
            steps, probs = steps[kept], probs[kept]
            index = pd.MultiIndex.from_product(
                [[NAMES[link]], steps, betas], names=["method", "step", "beta"]
            )
            arms = pd.DataFrame(probs.reshape(-1, 5), index, [f"arm{arm}" for arm in range(1, 6)])
            frames.append(
                arms.assign(reward=bandit.reward(probs).ravel(), kl=bandit.kl(probs).ravel())
            )
        table = pd.concat(frames).round(6).reset_index()
        table.to_csv(out / "runs.csv.gz", index=False, compression={"method": "gzip", "mtime": 0})

    does = (
        f"bandit, in this process: {cfg.bandit_steps:,} steps for {len(cfg.bandit_betas)} β, DPO "
        "and MallowsPO-φ"
    )
    return Artifact(
        "bandits", 1, {"betas": cfg.bandit_betas, "steps": cfg.bandit_steps}, make, does
    )


def dispersed(cfg) -> Artifact:
    """Weight all pairs by the SFT model's entropies; dispersion.csv: chosen, rejected (normalised),
    weight.
    """
    held = stages.reference(cfg)

    def make(out: Path) -> dict:
        from beyond_dpo import dispersion

        needs.check(cfg)
        chosen, rejected = stages.of_reference(held, "entropies")
        weight, phi_star = dispersion.weights(chosen, rejected, range(len(chosen)))
        table = pd.DataFrame({"chosen": chosen, "rejected": rejected, "weight": weight})
        table.round(6).to_csv(out / "dispersion.csv", index=False)
        return {"phi_star": round(phi_star, 6)}

    return Artifact("dispersion", 1, {"reference": held}, make, hours=cfg.needs.hours)


def rated(source: str) -> list[tuple[str, list[int]]]:
    """Return sentences of reviews with the ratings, −4 (negative) to 4, of 15 to 29 people each
    (Hutto & Gilbert 2014).

    source: "movie" (10,605 sentences), "amazon" (3,708, on products), or "fixtures" with invented
    ratings.
    """
    if source not in corpus.RATED:
        return [
            (text, [4 * label - 2, len(text) % 5 - 2]) for text, label in corpus.halves(source)[0]
        ]
    folder, archive = (
        "hutto_ICWSM_2014",
        "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz",
    )

    def rows(what: str) -> list[list[str]]:
        text = assets.member(
            "vader", archive, f"{folder}/{source}ReviewSnippets_{what}.txt"
        ).decode("utf-8-sig")
        return [line.split("\t") for line in text.splitlines() if line.strip()]

    ratings = {name: json.loads(values) for name, _, _, values in rows("anonDataRatings")}
    return [(text, ratings[name]) for name, _, text in rows("GroundTruth")]


def raters(cfg) -> Artifact:
    """Set the SFT model's entropy on the second half of film-review sentences beside what 15 to 29
    people said of them.

    raters.csv, a row a sentence in no order: entropy (normalised), tokens (of that half), people,
    sd of their ratings, split (the smaller of the shares of positive and of negative ratings),
    strength (absolute mean rating).
    """
    recipe = {"tokenizer": assets.resolve(cfg.world.target), "source": corpus.source(cfg.rated)}
    recipe |= {"rows": cfg.rated_rows, "max_prompt": cfg.train.max_prompt, "kind": cfg.rated}

    def split(out: Path) -> None:
        sentences, rows, said = rated(cfg.rated), [], []
        random.Random(0).shuffle(sentences)
        reader = templates.load_tokenizer(assets.tokenizer_dir(cfg.world.target))
        for i, (text, ratings) in enumerate(sentences):
            ids = templates.render(reader, text, "plain")
            if len(ids) >= openings.SHORTEST and len(rows) < cfg.rated_rows:
                cut = min(len(ids) // 2, cfg.train.max_prompt)
                rows.append(
                    {"id": str(i), "prompt_ids": ids[:cut], "responses": {"said": ids[cut:]}}
                )
                said.append(ratings)
        write_rows(out / "pairs.jsonl", rows)
        (out / "ratings.json").write_text(json.dumps(said), encoding="utf-8")

    rows = Artifact("rated", 1, recipe, split)
    held = stages.reference(cfg, rows=rows, names=("said",))

    def make(out: Path) -> None:
        needs.check(cfg)
        entropies, tokens = (stages.of_reference(held, what)[0] for what in ("entropies", "tokens"))
        table = pd.DataFrame({"entropy": entropies, "tokens": tokens})
        ratings = [
            np.array(said)
            for said in json.loads((rows.get() / "ratings.json").read_text(encoding="utf-8"))
        ]
        table["people"] = [len(said) for said in ratings]
        table["sd"] = [said.std() for said in ratings]
        table["split"] = [min((said > 0).mean(), (said < 0).mean()) for said in ratings]
        table["strength"] = [abs(said.mean()) for said in ratings]
        table.round(6).to_csv(out / "raters.csv", index=False)

    return Artifact("raters", 1, {"reference": held, "rated": rows}, make, hours=cfg.needs.hours)


def frontier(cfg) -> Artifact:
    """Judge every method, β and seed along its training (Fig. 8c)."""
    runs = [
        {"loss": m, "beta": b, "lr": cfg.train.lr, "seed": s}
        for m in cfg.methods
        for b in cfg.betas
        for s in cfg.seeds
    ]
    parts = [*(f"part{part}" for part in range(1, cfg.train.parts)), ""]
    return judged(cfg, [(run, "test_prompts", None, part) for run in runs for part in parts])


def plug_in(cfg) -> Artifact:
    """Judge every plug-in with and without weights on test prompts and elsewhere, and a grid of β
    and learning rate.

    Table 1: the settings of cfg.plug_ins. Table 6: DPO and MallowsPO-θ, on test prompts only.
    Raises ConfigError where there are neither.
    """
    if not cfg.plug_ins and not cfg.grid_betas:
        raise config.ConfigError(
            "plug_ins and grid_betas are empty: nothing would be trained; set one of them"
        )
    shared = {"seed": cfg.seeds[0], "lr": cfg.train.lr}
    plugs = [
        {"loss": name, **shared, **settings}
        for loss, settings in cfg.plug_ins.items()
        for name in (loss, WEIGHTED[loss])
    ]
    cells = [
        {"loss": name, **shared, "lr": lr, "beta": beta}
        for name in cfg.grid_methods
        for beta in cfg.grid_betas
        for lr in cfg.grid_lrs
    ]
    far = {source: elsewhere(cfg, source) for source in cfg.elsewhere}
    wide, cells = (plugs + cells, []) if cfg.grid_elsewhere else (plugs, cells)
    walk = [
        (run, split, prompts, "")
        for run in wide
        for split, prompts in {"test_prompts": None, **far}.items()
    ]
    walk += [(run, "test_prompts", None, "") for run in cells]
    return judged(cfg, [place for i, place in enumerate(walk) if place not in walk[:i]])


def judged(cfg, walk: list[tuple[dict, str, Artifact | None, str]]) -> Artifact:
    """Train every run of `walk`, sample after that part of it, and judge; the SFT model once for
    each split.

    walk: (loss, seed and settings of cfg.train; split; its prompts, None for the world's own; part,
    "" for the end). As gather.judged, with the columns of the runs, split and part; loss "sft" is
    the SFT model.
    """
    config.require_prompts(cfg.world, "test_prompts")
    start, points = stages.sft(cfg), []
    for run, split, prompts, part in walk:
        model = stages.aligned(cfg, cfg.fraction, **run)
        new = split not in [place["split"] for place, _ in points]
        for place, part_of, alpha in [({"loss": "sft"}, "", -1.0)] * new + [(run, part, 0.0)]:
            how = {"aligned": model, "alpha": alpha, "part": part_of, "samples": 1, "seed": 2}
            said = stages.responses(cfg, start, split, prompts=prompts, **how)
            judge = {
                "judges": (stages.oracle(cfg.world), "vader"),
                "kl_prompts": cfg.world.test_prompts,
            }
            score = stages.scores(cfg, said, split, prompts=prompts, **judge)
            points.append(({"split": split, "part": part_of or "end", **place}, score))

    return gather.judged(cfg, points)


def elsewhere(cfg, source: str) -> Artifact:
    """Take prompts from another domain, of texts their beginning; <source>.json as the world's own
    prompts.

    The facts hold how many rows of a data set were dropped, and why.
    """
    world = cfg.world
    recipe = {
        "source": corpus.source(source),
        "kind": source,
        "tokenizer": assets.resolve(world.target),
    }
    recipe |= {
        "rows": cfg.elsewhere_prompts,
        "prompt_tokens": world.prompt_tokens,
        "template": world.template,
    }
    recipe |= corpus.rendering(world.target, world.template)

    def make(out: Path) -> dict:
        tokenizer = templates.load_tokenizer(assets.tokenizer_dir(world.target))
        known = source in (*corpus.RATED, "fixtures")
        rows, dropped = [], {}
        if not known:
            rows, dropped = preferences.prompts(source, world, tokenizer, cfg.elsewhere_prompts)
        generator, texts = random.Random(0), [text for text, _ in rated(source)] if known else []
        generator.shuffle(texts)
        for i, text in enumerate(texts):
            ids = templates.render(tokenizer, text, "plain")
            cut = generator.randint(*world.prompt_tokens)
            if len(ids) >= cut and len(rows) < cfg.elsewhere_prompts:
                rows.append({"id": f"E{i}"} | openings.begun(tokenizer, ids[:cut], world.template))
        if len(rows) < cfg.elsewhere_prompts:
            found = f"{source} has only {len(rows)}; dropped: {dict(dropped)}"
            raise config.ConfigError(f"elsewhere_prompts={cfg.elsewhere_prompts}, but {found}")
        write_file(out / f"{source}.json", json.dumps(rows))  # a hub id is a folder and a file
        return {"dropped": dict(dropped)}

    return Artifact("elsewhere", 1, recipe, make)


def link(s, phi: float, epsilon: float) -> np.ndarray:
    """Return losses.mallows_link of an array s, for drawing."""
    import torch

    from beyond_dpo import losses

    s = torch.as_tensor(np.asarray(s, dtype=float))
    return losses.mallows_link(s, torch.full_like(s, phi), epsilon).numpy()


def gap_at_equal(
    table, x: str, y: str, by: str, pair: tuple, *, seed: int
) -> tuple[float, float, float]:
    """Return (mean, low, high) of y of pair[0] − y of pair[1] at equal x, averaged over the x that
    both reach.

    table: one row per response, with the columns `by`, "seed" (of training), "place" (the points of
    each curve), "prompt", x and y. To the mean x and y of the places of both curves of a training
    seed one curve in 1, √x, x and x² is fitted, and a difference c + d x between the two (a curve
    of its own for each would favour the one that reaches less); then seeds are averaged. Prompts
    are drawn, the same for all places. A place that the curves share, such as
    the start of the training, does not belong into the table: there the difference is 0, whatever
    the methods do. Raises ValueError for curves that share no x, with fewer than three places, or
    not of the same prompts.
    """
    wide = [
        table.pivot_table(index="prompt", columns=["seed", by, "place"], values=v) for v in (x, y)
    ]
    trained, names = (wide[0].columns.get_level_values(level) for level in ("seed", by))
    curves = [
        [np.flatnonzero((trained == s) & (names == name)) for name in pair]
        for s in trained.unique()
    ]

    def reach(xs, curve) -> tuple[float, float]:  # the x that both have
        return max(xs[c].min() for c in curve), min(xs[c].max() for c in curve)

    def gap(i) -> float:
        xs, ys = (part.to_numpy()[i].mean(0) for part in wide)
        gaps = []
        for one, other in curves:
            x, first = np.r_[xs[one], xs[other]], np.repeat([1.0, 0.0], [len(one), len(other)])
            shape = [x**0, np.sqrt(np.maximum(x, 0)), x, x**2, first, first * x]
            *_, c, d = np.linalg.lstsq(np.stack(shape, 1), np.r_[ys[one], ys[other]], rcond=None)[0]
            gaps.append(c + d * np.mean(reach(xs, (one, other))))
        return np.mean(gaps)

    apart = any(np.subtract(*reach(wide[0].mean().to_numpy(), curve)) > 0 for curve in curves)
    if apart or wide[0].isna().any(axis=None) or min(len(c) for curve in curves for c in curve) < 3:
        raise ValueError(
            f"{pair}: curves of {by} need three places each, all prompts, and a range of {x} in "
            "common"
        )
    return stats.interval(gap, len(wide[0]), seed)
