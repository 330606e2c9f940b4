"""ExPO's experiments (arXiv 2404.16792): what is trained, and which lines through two models are
walked along.

Each function returns an Artifact; nothing runs before its get().
"""

import dataclasses
import json
import os
from functools import partial
from pathlib import Path

import pandas as pd

from beyond_dpo import search, templates
from beyond_dpo.pipeline import config, corpus, gather, needs, stages
from beyond_dpo.pipeline.artifacts import Artifact

PROMPTS = (
    "The film opens with",
    "My wife and I",
    "This was without doubt",
    "I rented it because",
    "The acting in",
)


@dataclasses.dataclass(frozen=True)
class Line:
    """A line through two models, θ₁ + α(θ₁ − θ₀), and where to look on it; modules scales Δθ of
    some tensors only.

    target: whose tokenizer reads the prompts, for published models in place of the world's own.
    """

    start: Artifact  # θ₀
    end: Artifact  # θ₁
    alphas: tuple[float, ...] = ()  # the grid, where it is walked along
    modules: tuple[
        str, ...
    ] = ()  # patterns of the tensors that move past θ₁; the others stay there
    target: str = ""

    def own(self, cfg):
        """Return the configuration in whose world this line's prompts are."""
        return dataclasses.replace(
            cfg, world=dataclasses.replace(cfg.world, target=self.target or cfg.world.target)
        )

    def at(
        self, cfg, alpha: float, split: str, samples: int, prompts: Artifact | None = None
    ) -> Artifact:
        """Return the responses of one point; at α = 0 every part is θ₁ itself."""
        modules = dict.fromkeys(self.modules, alpha) if alpha else {}
        how = {
            "alpha": 0.0 if modules else alpha,
            "modules": modules,
            "samples": samples,
            "seed": 2,
        }
        return stages.responses(
            self.own(cfg), self.start, split, aligned=self.end, prompts=prompts, **how
        )

    def scores(self, cfg, alpha: float, split: str, samples: int) -> Artifact:
        """Return the scores of one point."""
        compared = 0 if self.target else cfg.kl_prompts  # its SFT model is no scorer here
        return stages.scores(
            self.own(cfg), self.at(cfg, alpha, split, samples), split, kl_prompts=compared
        )


def curves(cfg) -> Artifact:
    """Search α with the reward model on dev prompts, for every fraction and seed; judge the chosen
    α on test prompts.

    responses.csv.gz: one line a response (split, fraction, seed, alpha, prompt, sample, every
    score, logratio in nats); points.json: distinct-2 of each (split, fraction, seed, alpha);
    best.json: the chosen α. Fraction 0: the SFT model.
    """
    config.require_prompts(cfg.world, "dev_prompts", "test_prompts")
    dev = [(f, s, alpha) for f, s in runs(cfg) for alpha in cfg.alphas[f]] + [
        (0.0, cfg.seeds[0], 0.0)
    ]
    recipe = {"dev": [point(cfg, *place, "dev_prompts") for place in dev]}
    recipe |= {"test_samples": cfg.test_samples, "test": stages.texts(cfg.world)}

    def judged(split: str, places: list, desc: str) -> tuple:
        walk = [
            (
                {"split": split, "fraction": f, "seed": s, "alpha": a},
                point(cfg, f, s, a, f"{split}_prompts"),
            )
            for f, s, a in places
        ]
        return gather.scored(walk, desc)

    def make(out: Path) -> None:
        needs.check(cfg)
        searched, points = judged("dev", dev, "α curves on dev prompts")
        means = searched.groupby(["fraction", "seed", "alpha"])["reward"].mean()
        best = [
            {"fraction": f, "seed": s, "alpha": float(means.loc[f, s].idxmax())}
            for f, s in runs(cfg)
        ]
        wanted = dev[-1:]  # the SFT model
        wanted += [
            (b["fraction"], b["seed"], alpha)
            for b in best
            for alpha in dict.fromkeys([0.0, b["alpha"]])
        ]
        tested, more = judged("test", wanted, "chosen α on test prompts")
        gather.write(out, pd.concat([searched, tested]), points + more)
        (out / "best.json").write_text(json.dumps(best, indent=1), encoding="utf-8")
        names = ("gold",) * bool(cfg.world.gold_rows) + ("reward", "vader")
        facts = {name: stages.reward(cfg.world, name).manifest["facts"] for name in names}
        facts["pairs"] = stages.pairs(cfg).manifest["facts"]
        (out / "facts.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")

    return Artifact("curves", 2, recipe, make, hours=cfg.needs.hours)


def sweep(cfg, lines: dict[str, Line]) -> Artifact:
    """Walk along lines through two models on dev prompts; best.json: the α of each that the reward
    model chooses.

    responses.csv.gz and points.json as in curves(), with the line's name as `model`; the SFT model
    is "SFT".
    """
    config.require_prompts(cfg.world, "dev_prompts")
    start = Line(stages.sft(cfg), stages.aligned(cfg, cfg.fractions[-1], cfg.seeds[0]), (-1.0,))
    walk = [
        ({"model": name, "alpha": alpha}, line.scores(cfg, alpha, "dev_prompts", cfg.dev_samples))
        for name, line in {"SFT": start, **lines}.items()
        for alpha in line.alphas
    ]

    def make(out: Path) -> None:
        needs.check(cfg)
        table, points = gather.scored(walk, "lines through two models, dev prompts")
        gather.write(out, table, points)
        means = table.groupby(["model", "alpha"])["reward"].mean().unstack()
        best = {name: float(means.loc[name].idxmax()) for name in lines}
        (out / "best.json").write_text(json.dumps(best, indent=1), encoding="utf-8")

    inputs = {"points": [score for _, score in walk], "names": list(lines)}
    return Artifact("sweep", 2, inputs, make, hours=cfg.needs.hours)


def interpolation(cfg) -> dict[str, Line]:
    """Return the line from the SFT model (γ = 0) to the one aligned on all pairs (γ = 1) and past
    it; γ = 1 + α.
    """
    alphas = sorted(
        {round(gamma - 1, 6) for gamma in cfg.interpolation} | set(cfg.alphas[cfg.fractions[-1]])
    )
    return {
        "aligned": Line(
            stages.sft(cfg), stages.aligned(cfg, cfg.fractions[-1], cfg.seeds[0]), tuple(alphas)
        )
    }


def recipes(cfg) -> dict[str, Line]:
    """Return the lines of models trained longer, faster, by other optimizers and with another β
    (ACL Table 4).
    """
    lr, beta = cfg.train.lr, cfg.train.beta
    changes = {"default": {}, "2 epochs": {"epochs": 2}, "3 epochs": {"epochs": 3}}
    changes |= {"learning rate × 2": {"lr": 2 * lr}, "learning rate × 4": {"lr": 4 * lr}}
    changes |= {"AdaGrad": {"optimizer": "adagrad"}, "RMSprop": {"optimizer": "rmsprop"}}
    changes |= {"β × 0.1": {"beta": beta / 10}, "β × 10": {"beta": beta * 10}}
    train = partial(stages.aligned, cfg, cfg.recipe_fraction, cfg.seeds[0])
    models = {name: train(**changes[name]) for name in ("default", *cfg.recipes)}
    return {name: Line(stages.sft(cfg), model, cfg.recipe_alphas) for name, model in models.items()}


def data_quality(cfg) -> dict[str, Line]:
    """Return the lines of models trained on random pairs, and on those with the longest chosen
    responses (Table 3).

    Raises ConfigError without an α grid for this fraction.
    """
    f, seed = cfg.quality_fraction, cfg.seeds[0]
    config.check_grid(cfg, f)
    models = {
        "random": stages.aligned(cfg, f, seed),
        "length-biased": stages.aligned(cfg, f, seed, longest=True),
    }
    return {name: Line(stages.sft(cfg), model, cfg.alphas[f]) for name, model in models.items()}


def wrong_pairs(cfg) -> dict[str, Line]:
    """Return a line from SFT to aligned, and lines through models that ExPO should not be applied
    to (v1 Fig. 7).

    Those are published ones where the configuration names them. Raises ConfigError where it starts
    from one finished SFT model and names none.
    """
    if not cfg.world.sft_rows and not cfg.wrong_pairs:
        raise config.ConfigError(
            f"profile {cfg.profile} starts from one finished SFT model: no other is there"
        )
    one, aligned = stages.sft(cfg), partial(stages.aligned, cfg, cfg.recipe_fraction, cfg.seeds[0])
    if cfg.wrong_pairs:
        lines = {"SFT → aligned from it": Line(one, aligned(), cfg.pair_alphas)}
        return lines | {
            name: published(pair, cfg.pair_alphas) for name, pair in cfg.wrong_pairs.items()
        }
    other = stages.sft(cfg, seed=1)
    pairs = {
        "SFT → aligned from it": (one, aligned()),
        "instruct → SFT": (stages.model(cfg.world.target), one),
        "two SFT models of one start": (one, other),
        "two aligned models of different starts": (aligned(), aligned(start=other)),
    }
    return {name: Line(*models, cfg.pair_alphas) for name, models in pairs.items()}


def published(pair: tuple[str, str], alphas: tuple) -> Line:
    """Return the line through two published models, by hub id or folder; the second's tokenizer
    reads the prompts.
    """
    return Line(stages.model(pair[0]), stages.model(pair[1]), alphas, target=pair[1])


def modules(cfg) -> dict[str, Line]:
    """Return lines on which all tensors, attention, MLP, or half of the layers move past the
    aligned model.
    """
    model, half = stages.aligned(cfg, cfg.fractions[-1], cfg.seeds[0]), cfg.layers // 2
    parts = {"attention": ("*.self_attn.*",), "MLP": ("*.mlp.*",)}
    parts["first half of the layers"] = tuple(f"*.layers.{i}.*" for i in range(half))
    parts["second half of the layers"] = tuple(f"*.layers.{i}.*" for i in range(half, cfg.layers))
    line = Line(stages.sft(cfg), model, cfg.module_alphas)
    return {"all": line} | {
        name: dataclasses.replace(line, modules=patterns) for name, patterns in parts.items()
    }


def alignments(cfg) -> dict[str, tuple[Artifact, dict[str, Artifact]]]:
    """Return what change() compares for ACL Table 1: SFT, and DPO on each fraction and with each
    seed.
    """
    start, first = stages.sft(cfg), cfg.seeds[0]
    models = {}
    for fraction, seed in runs(cfg):
        name = f"{fraction:.0%} of the pairs"
        if seed != first:
            name += f", seed {seed}"
        models[name] = stages.aligned(cfg, fraction, seed)
    most = stages.aligned(cfg, cfg.fractions[-1], first)
    before, ends = (
        stages.model(cfg.world.target),
        {"SFT": start, "DPO": most} if cfg.world.sft_rows else {},
    )
    return {"SFT → DPO": (start, models)} | {
        f"instruct → {name}": (before, {name: end}) for name, end in ends.items()
    }


def change(cfg, pairs: dict[str, tuple[Artifact, dict[str, Artifact]]]) -> Artifact:
    """Measure how far each θ₀ lies from its models: movement.csv.gz, a row a tensor; cosines.json
    of all but single.
    """

    def make(out: Path) -> None:
        from beyond_dpo.change import movement

        needs.check(cfg)
        frames, angles = [], []
        for name, (zero, ends) in pairs.items():
            rows, cosines = movement(zero.get(), {n: model.get() for n, model in ends.items()})
            frames.append(pd.DataFrame(rows).assign(pair=name))
            angles += [[*pair, value] for pair, value in cosines.items()] if len(ends) > 1 else []
        (out / "cosines.json").write_text(json.dumps(angles), encoding="utf-8")
        table = pd.concat(frames, ignore_index=True)
        table.to_csv(
            out / "movement.csv.gz", index=False, compression={"method": "gzip", "mtime": 0}
        )

    inputs = {name: {"start": zero, **ends} for name, (zero, ends) in pairs.items()}
    return Artifact("change", 2, inputs, make, hours=cfg.needs.hours)


def said(cfg, lines: dict[str, Line]) -> Artifact:
    """Sample one response of every point to PROMPTS; texts.json: [{model, alpha, prompt, text},
    …].
    """
    readers = {
        name: stages.sft(line.own(cfg)) for name, line in lines.items()
    }  # of each line's prompts

    def prompts(reader: Artifact) -> Artifact:
        def own(out: Path) -> None:
            tokenizer = templates.load_tokenizer(str(reader.get()))
            rows = [
                {"id": p, "prompt_ids": templates.render(tokenizer, p, cfg.world.template)}
                for p in PROMPTS
            ]
            (out / "own.json").write_text(json.dumps(rows), encoding="utf-8")

        recipe = {"prompts": PROMPTS, "tokenizer": reader}
        if cfg.world.template == "chat":
            recipe |= {"template": "chat"} | corpus.rendering(cfg.world.target, "chat")
        return Artifact("own-prompts", 1, recipe, own)

    points = {
        (name, alpha): line.at(cfg, alpha, "own", 1, prompts(readers[name]))
        for name, line in lines.items()
        for alpha in line.alphas
    }

    def make(out: Path) -> None:
        needs.check(cfg)
        texts = []
        for (name, alpha), artifact in gather.watched(points.items(), "text samples"):
            decode = partial(
                templates.load_tokenizer(str(readers[name].get())).decode, skip_special_tokens=True
            )
            for line in (
                (artifact.get() / "responses.jsonl").read_text(encoding="utf-8").splitlines()
            ):
                r = json.loads(line)
                texts.append(
                    {
                        "model": name,
                        "alpha": alpha,
                        "prompt": r["id"],
                        "text": decode(r["response_ids"]),
                    }
                )
        (out / "texts.json").write_text(json.dumps(texts, ensure_ascii=False), encoding="utf-8")

    inputs = {"points": list(points.values()), "names": list(lines)}
    return Artifact("said", 1, inputs, make, hours=cfg.needs.hours)


def samples(cfg, alphas: list[float]) -> Artifact | None:
    """Return what one model of the curves says at the given α, or at others if those alone were
    sampled.

    The model: DPO on cfg.recipe_fraction of the pairs, the first seed. Sampling takes one response
    to each of PROMPTS at each α, and the model itself: where it is not there, said(cfg,
    wrong_pairs(cfg)) may hold texts of its line. Nothing is trained for this; None where neither is
    there. In texts.json its name is the first.
    """
    model = stages.aligned(cfg, cfg.recipe_fraction, cfg.seeds[0])
    name = f"{cfg.recipe_fraction:.0%} of the pairs"
    wanted = said(cfg, {name: Line(stages.sft(cfg), model, tuple(dict.fromkeys(alphas)))})
    small = {"own-prompts", "responses", "said"}
    missing = {artifact.stage for artifact in wanted.missing().values()}
    if not missing or (missing <= small and os.environ.get("COMPUTE") != "never"):
        return wanted
    if not cfg.world.sft_rows and not cfg.wrong_pairs:
        return None
    other = said(cfg, wrong_pairs(cfg))
    return None if other.missing() else other


def searches(cfg) -> Artifact:
    """Search α by golden section for every fraction, in the bracket of its hand-made grid; dev
    prompts.

    searches.json: per fraction the chosen α with its interval and the α in the order they were
    tried, beside the grid's choice. responses.csv.gz and points.json as in curves(), of both.
    Raises ConfigError for a grid that reaches no α above 0.
    """
    config.require_prompts(cfg.world, "dev_prompts")
    for fraction in cfg.fractions:
        if max(cfg.alphas[fraction]) <= 0:
            raise config.ConfigError(
                f"alphas.{fraction}: a search needs an α above 0, where it ends"
            )
    seed, most = cfg.seeds[0], cfg.search_evaluations

    def mean_rewards(f: float, alpha: float):
        scores = pd.read_json(
            point(cfg, f, seed, alpha, "dev_prompts").get() / "scores.jsonl", lines=True
        )
        return scores.groupby("id", sort=False)["reward"].mean().to_numpy()

    def make(out: Path) -> None:
        needs.check(cfg)
        found, walk = [], []
        for f in gather.watched(cfg.fractions, "golden-section search"):
            grid = {a: mean_rewards(f, a).mean() for a in cfg.alphas[f]}
            result = search.golden_section(
                partial(mean_rewards, f), (0.0, max(grid)), most, seed=seed
            )
            found.append(
                {
                    "fraction": f,
                    "alpha": result.alpha,
                    "low": result.low,
                    "high": result.high,
                    "grid": max(grid, key=grid.get),
                    "tried": list(result.rewards),
                }
            )
            places = [{"fraction": f, "alpha": a} for a in dict.fromkeys([*grid, *result.rewards])]
            walk += [
                (place, point(cfg, f, seed, place["alpha"], "dev_prompts")) for place in places
            ]
        gather.write(out, *gather.scored(walk, "searched α and grids"))
        (out / "searches.json").write_text(json.dumps(found, indent=1), encoding="utf-8")

    grids = [point(cfg, f, seed, a, "dev_prompts") for f in cfg.fractions for a in cfg.alphas[f]]
    inputs = {"points": grids, "evaluations": most, "seed": seed}
    return Artifact("searches", 2, inputs, make, hours=cfg.needs.hours)


def runs(cfg) -> list[tuple[float, int]]:
    """Return every (fraction, seed) that is trained: the first seed for all, the others where they
    are cheap.
    """
    return [
        (f, s)
        for f in cfg.fractions
        for s in cfg.seeds
        if s == cfg.seeds[0] or f in cfg.seed_fractions
    ]


def point(cfg, fraction: float, seed: int, alpha: float, split: str) -> Artifact:
    """Return the scores of one α of one model on one split; fraction 0 is the SFT model (α = −1 of
    any other).
    """
    samples = cfg.test_samples if split == "test_prompts" else cfg.dev_samples
    model = stages.aligned(cfg, fraction or cfg.fractions[-1], seed if fraction else cfg.seeds[0])
    alpha = alpha if fraction else -1.0
    return Line(stages.sft(cfg), model).scores(cfg, alpha, split, samples)
