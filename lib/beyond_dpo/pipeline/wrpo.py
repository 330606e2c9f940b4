"""WRPO's experiments (arXiv 2412.03187): the best responses of several source models, fused into
one small target.

prompts -> answers of each source -> scores -> y_ws, the best -> on a third of the prompts
        Target-SFT learns to say it -> on the rest Target-SFT's own best and worst, y_wt and y_l,
        stand beside it -> training -> judged
Each function returns an Artifact; nothing runs before its get().
"""

import itertools
import json
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pandas as pd

from beyond_dpo import stats
from beyond_dpo.pipeline import config, gather, needs, sources, stages
from beyond_dpo.pipeline.artifacts import Artifact
from beyond_dpo.rows import epoch_order, read_rows, write_rows

OWN, OFF_POLICY = (
    config.FUSED[1:],
    config.FUSED[::2],
)  # the target's own pair; the source's response against its worst
NAMES = {"dpo": "DPO", "ipo": "IPO", "simpo": "SimPO"}
FUSING = {"dpo": "wrpo", "ipo": "wrpo_ipo", "simpo": "wrpo_simpo"}


def thirds(cfg) -> Artifact:
    """Split the prompts at random: first.json for Target-SFT, rest.json for preferences."""

    def make(out: Path) -> None:
        prompts = stages.texts(cfg.world).json("prompts.json")
        random.Random(0).shuffle(prompts)
        cut = round(cfg.sft_share * len(prompts))
        (out / "first.json").write_text(json.dumps(prompts[:cut]), encoding="utf-8")
        (out / "rest.json").write_text(json.dumps(prompts[cut:]), encoding="utf-8")

    return Artifact("thirds", 1, {"texts": stages.texts(cfg.world), "share": cfg.sft_share}, make)


def scored(
    cfg, answers: Artifact, split: str = "prompts", prompts: Artifact | None = None
) -> Artifact:
    """Score responses by the reward model, which chooses what is learnt; gold, where there are
    labels, only judges.
    """
    return stages.scores(cfg, answers, split, judges=("reward",), prompts=prompts)


def fusion(cfg, names: tuple) -> Artifact:
    """Choose the best of all responses of the named sources to each prompt, ties by a fixed seed.

    best.jsonl, as write_rows: the response "source_chosen", and the name of its "source";
    sft.jsonl: those of the first third. A prompt without a response, or whose responses all score
    alike, is counted and dropped.
    """
    said = {name: sources.answers(cfg, name) for name in sorted(names)}
    judged = {name: scored(cfg, answers) for name, answers in said.items()}

    def make(out: Path) -> dict:
        table = pd.concat(
            [_table(said[name], judged[name]).assign(source=name) for name in said],
            ignore_index=True,
        )
        groups, rows, asked = (
            dict(iter(table.groupby("id"))),
            [],
            stages.texts(cfg.world).json("prompts.json"),
        )
        for prompt in asked:
            if picked := best_and_worst(groups.get(prompt["id"]), prompt["id"]):
                best = table.loc[picked[0]]
                said_by = {
                    "responses": {config.FUSED[0]: best["response_ids"]},
                    "source": best["source"],
                }
                rows.append(prompt | said_by)
        first = {prompt["id"] for prompt in thirds(cfg).json("first.json")}
        learnt = [row for row in rows if row["id"] in first]
        if not rows or (first and not learnt):
            part = f"{len(first)} prompts for Target-SFT" if rows else f"{len(asked)} prompts"
            raise config.ConfigError(
                f"the reward model {cfg.world.reward_model} finds no best response of "
                f"{', '.join(said)} to any of {part} (all score alike, or are empty): use another "
                "reward model, other sources, or more prompts"
            )
        write_rows(out / "best.jsonl", rows)
        write_rows(out / "sft.jsonl", learnt)
        return {"wins": Counter(row["source"] for row in rows), "dropped": len(asked) - len(rows)}

    return Artifact("fusion", 1, {"scores": judged, "thirds": thirds(cfg)}, make)


def best_and_worst(group: pd.DataFrame | None, seed: str) -> tuple | None:
    """Return the indices of the highest and of the lowest "reward" of a prompt's responses, ties
    broken by seed.

    None if there is no response, or there are several and all score alike.
    """
    if group is None or len(group) > 1 and group["reward"].nunique() == 1:
        return None
    generator, rewards = random.Random(seed), group["reward"]
    return tuple(
        generator.choice(list(group.index[rewards == end]))
        for end in (rewards.max(), rewards.min())
    )


def target_sft(cfg, names: tuple) -> Artifact:
    """Fine-tune the target on the sources' best responses to the first third of the prompts:
    Target-SFT.
    """
    how = {
        "base": stages.sft(cfg),
        "seed": cfg.seeds[0],
        "desc": f"Target-SFT on {' + '.join(names)}",
    }
    return stages.training(cfg, cfg.sft, fusion(cfg, names), "sft.jsonl", [config.FUSED[0]], **how)


def own(cfg, model: Artifact) -> tuple[Artifact, Artifact]:
    """Sample `model`'s own responses to the rest of the prompts, and score them."""
    start, how = (
        stages.sft(cfg),
        {"prompts": thirds(cfg), "samples": cfg.world.samples, "seed": 1, "engine": "sample"},
    )
    aligned = model if model.key != start.key else None
    said = stages.responses(sources.sampling(cfg), start, "rest", aligned=aligned, **how)
    return said, scored(cfg, said, "rest", thirds(cfg))


def quadruples(cfg, names: tuple, model: Artifact) -> Artifact:
    """Set y_ws beside the best and the worst of `model`'s own responses to the rest of the prompts:
    pairs.jsonl.

    Raises ConfigError for a single sample; its get() does where no prompt has both.
    """
    stages.require_samples(cfg.world)
    (said, judged), best = own(cfg, model), fusion(cfg, names)

    def make(out: Path) -> dict:
        table, rows = _table(said, judged), []
        groups, asked = dict(iter(table.groupby("id"))), thirds(cfg).json("rest.json")
        fused = {row["id"]: row for row in read_rows(best.get() / "best.jsonl")}
        for name in [prompt["id"] for prompt in asked if prompt["id"] in fused]:
            if picked := best_and_worst(groups.get(name), name):
                both = dict(zip(OWN, table.loc[list(picked), "response_ids"], strict=True))
                if both[OWN[0]] != both[OWN[1]]:  # else there is one response only
                    rows.append(fused[name] | {"responses": fused[name]["responses"] | both})
        if not rows:
            raise config.ConfigError(
                f"the reward model {cfg.world.reward_model} finds for none of {len(asked)} prompts "
                f"a best response of the sources, and a best and a worst of the model's own "
                f"{cfg.world.samples} (they score alike, or are empty): use another reward model, "
                "more prompts, or a higher sampling.temperature"
            )
        write_rows(out / "pairs.jsonl", rows)
        return {"quadruples": len(rows), "dropped": len(asked) - len(rows)}

    return Artifact("quadruples", 1, {"scores": judged, "fusion": best}, make)


def draw(cfg, rows: Artifact, seed: int) -> Artifact:
    """Keep the quadruples of a fraction of the prompts: the same prompts for all models of one
    seed.
    """

    def make(out: Path) -> None:

        ids = [prompt["id"] for prompt in thirds(cfg).json("rest.json")]
        order = epoch_order(len(ids), seed, epoch=1_000)[: max(1, round(cfg.fraction * len(ids)))]
        whole, kept = read_rows(rows.get() / "pairs.jsonl"), {ids[i] for i in order}
        drawn = [row for row in whole if row["id"] in kept]
        if not drawn:
            raise config.ConfigError(
                f"fraction={cfg.fraction} draws {len(kept)} of {len(ids)} prompts, and none of the "
                f"{len(whole)} quadruples is of these: use a larger fraction, or more prompts"
            )
        write_rows(out / "pairs.jsonl", drawn)

    inputs = {"quadruples": rows, "thirds": thirds(cfg), "fraction": cfg.fraction, "seed": seed}
    return Artifact("draw", 1, inputs, make)


def trained(
    cfg, loss: str, *, base: Artifact | None = None, names=(), responses=OWN, seed=0, **changes
) -> Artifact:
    """Train Target-SFT (or `base`) on a draw of its quadruples; the same reference pass serves all
    losses and seeds.

    names: the sources, default cfg.sources. responses: those that the loss takes, in its order.
    changes: of cfg.train.
    """
    names, settings = names or cfg.sources, replace(cfg.train, loss=loss, **changes)
    start, base = (
        "Target" if base else f"Target-SFT on {' + '.join(names)}",
        base or target_sft(cfg, names),
    )
    rows = quadruples(cfg, names, base)
    held = stages.reference(cfg, base, rows, config.FUSED)
    desc = f"{loss.upper()} from {start}, {responses[0]} chosen, seed {seed}"
    desc += "".join(f", {name} {value:g}" for name, value in changes.items())
    how = {"base": base, "against": held, "seed": seed, "desc": desc}
    return stages.training(
        cfg, settings, draw(cfg, rows, seed), "pairs.jsonl", list(responses), **how
    )


def fused(cfg, loss: str = "dpo", **how) -> Artifact:
    """Train WRPO in the form of DPO, IPO or SimPO."""
    return trained(
        cfg,
        FUSING[loss],
        responses=config.FUSED,
        **cfg.objectives[loss] | {"alpha": cfg.train.alpha} | how,
    )


def main_result(cfg) -> Artifact:
    """Judge Table 1's own rows: the target, the baselines trained from it, and what starts from
    Target-SFT.
    """
    start, models = (
        stages.sft(cfg),
        {("Target", 0): None, ("Target-SFT", 0): target_sft(cfg, cfg.sources)},
    )
    for seed in cfg.seeds:
        for loss, settings in cfg.objectives.items():
            models[f"Target-{NAMES[loss]}", seed] = trained(
                cfg, loss, base=start, seed=seed, **settings
            )
        models["Target-SFT-DPO", seed] = trained(cfg, "dpo", seed=seed, **cfg.objectives["dpo"])
        models["Target-SFT-WRPO", seed] = fused(cfg, seed=seed)
    return judged(
        cfg, [({"model": name, "seed": seed}, model) for (name, seed), model in models.items()]
    )


def weighted(cfg) -> Artifact:
    """Judge what enters the reward (source, target, both, two losses), and every α_max, dynamic and
    static; first seed.

    model: Target-SFT, "target only", "source only", "weighted", "hybrid", or "α" with alpha and
    dynamic.
    """
    settings, seed = cfg.objectives["dpo"], cfg.seeds[0]
    models = {"Target-SFT": target_sft(cfg, cfg.sources), "weighted": fused(cfg, seed=seed)}
    for name, responses in {"target only": OWN, "source only": OFF_POLICY}.items():
        models[name] = trained(cfg, "dpo", responses=responses, seed=seed, **settings)
    models["hybrid"] = trained(cfg, "hybrid", responses=config.FUSED, seed=seed, **settings)
    walk = [({"model": name}, model) for name, model in models.items()]
    for how in [{"alpha": a, "dynamic": d} for a in cfg.alphas for d in (True, False)]:
        alone = how["alpha"] == 1 and not how["dynamic"]  # constant 1 is the source alone
        walk.append(
            (
                {"model": "α", **how},
                models["source only"] if alone else fused(cfg, seed=seed, **how),
            )
        )
    return judged(cfg, walk)


def by_sources(cfg) -> Artifact:
    """Judge Target-SFT, and WRPO from it, for every choice of sources; first seed."""
    walk, seed = [], cfg.seeds[0]
    for choice, names in {
        " + ".join(names): names for names in (*cfg.source_sets, cfg.sources)
    }.items():
        models = {
            "Target-SFT": target_sft(cfg, names),
            "Target-SFT-WRPO": fused(cfg, names=names, seed=seed),
        }
        walk += [
            ({"sources": choice, "model": name, "seed": seed}, model)
            for name, model in models.items()
        ]
    return judged(cfg, walk)


def by_objective(cfg) -> Artifact:
    """Judge WRPO in the forms of DPO, IPO and SimPO beside each on the target's own pairs alone;
    first seed.
    """
    models, seed = {"Target-SFT": target_sft(cfg, cfg.sources)}, cfg.seeds[0]
    for loss, settings in cfg.objectives.items():
        models[NAMES[loss]] = trained(cfg, loss, seed=seed, **settings)
        models[f"WRPO-{NAMES[loss]}"] = fused(cfg, loss, seed=seed)
    return judged(cfg, [({"model": name, "seed": seed}, model) for name, model in models.items()])


def judged(cfg, walk: list[tuple[dict, Artifact | None]]) -> Artifact:
    """Sample every model's responses to the test prompts and score them; None is the target
    itself.
    """
    config.require_prompts(cfg.world, "test_prompts")
    start, points = stages.sft(cfg), []
    how = {
        "judges": ("gold",) * bool(cfg.world.gold_rows) + ("reward", "vader"),
        "kl_prompts": cfg.world.test_prompts,
    }
    for place, model in walk:
        at = {"aligned": model or target_sft(cfg, cfg.sources), "alpha": 0.0 if model else -1.0}
        said = stages.responses(cfg, start, "test_prompts", **at, samples=cfg.test_samples, seed=2)
        points.append((place, stages.scores(cfg, said, "test_prompts", **how)))
    return gather.judged(cfg, points)


def collected(cfg) -> Artifact:
    """Set the responses of every source and of Target-SFT to the rest of the prompts side by side.

    responses.csv.gz, a row a response: source, prompt, reward, length, overlap (the share of its
    token pairs that another response of Target-SFT to this prompt has), chosen (it is y_ws, or for
    Target-SFT y_wt).
    facts.json: how often each source's response was the best one, of all prompts, and how many
    prompts were dropped.
    """
    model = target_sft(cfg, cfg.sources)
    pools = {
        name: (answers := sources.answers(cfg, name), scored(cfg, answers)) for name in cfg.sources
    }
    pools["Target-SFT"] = own(cfg, model)
    rows, best = quadruples(cfg, cfg.sources, model), fusion(cfg, cfg.sources)

    def make(out: Path) -> None:
        needs.check(cfg)
        table = pd.concat(
            [_table(*pool).assign(source=name) for name, pool in pools.items()], ignore_index=True
        )
        kept = {row["id"]: row["responses"] for row in read_rows(rows.get() / "pairs.jsonl")}
        table = table[table["id"].isin(kept)]
        table["grams"] = [set(itertools.pairwise(ids)) for ids in table["response_ids"]]
        told = {
            name: list(group["grams"])
            for name, group in table[table["source"] == "Target-SFT"].groupby("id")
        }
        overlap, chosen = [], []
        for row in table.itertuples():
            others = set().union(*(grams for grams in told[row.id] if grams is not row.grams))
            overlap.append(len(row.grams & others) / max(1, len(row.grams)))
            chosen.append(row.response_ids in [kept[row.id][name] for name in config.FUSED[:2]])
        table["prompt"] = pd.factorize(table["id"])[0]  # no row of the data set leaves artifacts/
        table = table.assign(overlap=overlap, chosen=chosen).drop(
            columns=["id", "sample", "response_ids", "grams"]
        )
        table.round(5).to_csv(
            out / "responses.csv.gz", index=False, compression={"method": "gzip", "mtime": 0}
        )
        facts = {"sources": best.manifest["facts"], "quadruples": rows.manifest["facts"]}
        (out / "facts.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")

    inputs = {"pools": {name: scores for name, (_, scores) in pools.items()}, "quadruples": rows}
    return Artifact("collected", 1, inputs, make, hours=cfg.needs.hours)


def dynamics(cfg) -> Artifact:
    """Read the training logs of Target-SFT-DPO and WRPO, and how likely the reference finds each
    response.

    log.csv: model, seed and what train logs at each step (rewards in β nats). gap.csv: model (the
    reference), response (of config.FUSED), prompt, nats: the mean log-probability of its tokens.
    """
    start, model, seed = stages.sft(cfg), target_sft(cfg, cfg.sources), cfg.seeds[0]
    runs = {
        ("Target-SFT-DPO", s): trained(cfg, "dpo", seed=s, **cfg.objectives["dpo"])
        for s in cfg.seeds
    }
    runs |= {("Target-SFT-WRPO", s): fused(cfg, seed=s) for s in cfg.seeds}
    others = [alpha for alpha in cfg.alphas if alpha != cfg.train.alpha]
    runs |= {(f"α to {alpha:g}", seed): fused(cfg, alpha=alpha, seed=seed) for alpha in others}
    rows = quadruples(cfg, cfg.sources, model)
    held = {"Target": stages.reference(cfg, start, rows, config.FUSED)}
    held["Target-SFT"] = stages.reference(cfg, model, rows, config.FUSED)

    def make(out: Path) -> None:
        needs.check(cfg)
        read = {one: pd.read_json(run.get() / "log.jsonl", lines=True) for one, run in runs.items()}
        logs = [table.assign(model=name, seed=s) for (name, s), table in read.items()]
        pd.concat(logs).drop(columns=["tokens_per_s", "rows_per_s"]).round(6).to_csv(
            out / "log.csv", index=False
        )
        tables = []
        for name, one in held.items():
            means = stages.of_reference(one, "logps") / stages.of_reference(one, "tokens")
            table = (
                pd.DataFrame(means.T, columns=list(config.FUSED))
                .rename_axis("prompt")
                .reset_index()
            )
            tables.append(
                table.melt("prompt", var_name="response", value_name="nats").assign(model=name)
            )
        pd.concat(tables).round(5).to_csv(out / "gap.csv", index=False)

    inputs = {
        "runs": list(runs.values()),
        "names": [f"{name} {s}" for name, s in runs],
        "references": held,
    }
    return Artifact("dynamics", 1, inputs, make, hours=cfg.needs.hours)


def win_rate(table, value: str, to: str, against: str, *, seed: int) -> tuple[float, float, float]:
    """Return (share − 1/2, low, high) of responses of model `to` with a higher `value` than
    `against` has, paired.

    Paired by prompt and sample, a tie is half, prompts are drawn as a whole.
    """
    one, other = (table[table["model"] == name] for name in (to, against))
    both = one.merge(
        other[["prompt", "sample", value]], on=["prompt", "sample"], suffixes=("", "_other")
    )
    wins = (both[value] > both[f"{value}_other"]) + (both[value] == both[f"{value}_other"]) / 2
    return stats.mean_interval(wins - 0.5, seed=seed, groups=both["prompt"])


def _table(said: Artifact, judged: Artifact) -> pd.DataFrame:
    """Return a row for each response that has a token: id, sample, response_ids, reward, length."""
    files = said.get() / "responses.jsonl", judged.get() / "scores.jsonl"
    texts, table = (pd.read_json(file, lines=True, dtype={"id": str}) for file in files)
    table = texts[["id", "sample", "response_ids"]].merge(
        table[["id", "sample", "reward", "length"]]
    )
    return table[table["length"] > 0].reset_index(drop=True)
