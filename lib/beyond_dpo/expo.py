"""ExPO's experiments (arXiv 2404.16792): what is trained, and which lines through two models are walked along.

Each function returns an Artifact; nothing runs before its get(). `describe` says what a run would do, without doing it.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pandas as pd

from beyond_dpo import config, launch, search, stages
from beyond_dpo.artifacts import Artifact

PROMPTS = ("The film opens with", "My wife and I", "This was without doubt", "I rented it because", "The acting in")


@dataclasses.dataclass(frozen=True)
class Line:
    """A line through two models, θ₁ + α(θ₁ − θ₀), and where to look on it; modules scales Δθ of some tensors only."""

    start: Artifact  # θ₀
    end: Artifact  # θ₁
    alphas: tuple[float, ...]
    modules: tuple[str, ...] = ()  # patterns of the tensors that move past θ₁; the others stay there

    def at(self, cfg, alpha: float, split: str, samples: int, prompts: Artifact | None = None) -> Artifact:
        """Return the responses of one point."""
        how = {"modules": dict.fromkeys(self.modules, alpha), "alpha": 0.0} if self.modules else {"alpha": alpha}
        how |= {"samples": samples, "seed": 2, "prompts": prompts}
        return stages.responses(cfg, self.start, split, aligned=self.end, **how)


def curves(cfg) -> Artifact:
    """Search α with the reward model on dev prompts, for every fraction and seed; judge the chosen α on test prompts.

    responses.csv.gz: one line a response (split, fraction, seed, alpha, prompt, sample, every score, logratio in nats);
    points.json: one entry per (split, fraction, seed, alpha) with distinct-2, and best.json: the chosen α.
    The SFT model is fraction 0.
    """
    dev = {}
    for fraction, seed in runs(cfg):
        for alpha in cfg.alphas[fraction]:
            dev[fraction, seed, alpha] = point(cfg, fraction, seed, alpha, "dev_prompts")
    dev[0.0, 0, 0.0] = point(cfg, 0.0, 0, 0.0, "dev_prompts")
    recipe = {"dev": list(dev.values()), "test_samples": cfg.test_samples, "test": stages.texts(cfg.world)}

    def make(out: Path) -> dict:
        config.check_machine(cfg)
        for fraction, seed in runs(cfg):  # all training first, then one engine for all that is sampled
            stages.aligned(cfg, fraction, seed).get()
        frames, points, best = [], [], []
        for (fraction, seed, alpha), artifact in stages.watched(dev.items(), "α curves on dev prompts"):
            place = {"split": "dev", "fraction": fraction, "seed": seed, "alpha": alpha}
            _table(frames, points, artifact, place)
        table = pd.concat(frames)
        for fraction, seed in runs(cfg):
            here = table[(table["fraction"] == fraction) & (table["seed"] == seed)]
            alpha = float(here.groupby("alpha")["reward"].mean().idxmax())
            best.append({"fraction": fraction, "seed": seed, "alpha": alpha})
        wanted = [(0.0, 0, 0.0)]
        for b in best:
            wanted += [(b["fraction"], b["seed"], alpha) for alpha in dict.fromkeys([0.0, b["alpha"]])]
        for fraction, seed, alpha in stages.watched(wanted, "chosen α on test prompts"):
            place = {"split": "test", "fraction": fraction, "seed": seed, "alpha": alpha}
            _table(frames, points, point(cfg, fraction, seed, alpha, "test_prompts"), place)
        _write_table(out, frames, points)
        (out / "best.json").write_text(json.dumps(best, indent=1))
        facts = {name: stages.reward(cfg.world, name).manifest["facts"] for name in ("gold", "reward", "vader")}
        (out / "facts.json").write_text(json.dumps(facts | {"pairs": stages.pairs(cfg).manifest["facts"]}, indent=1))

    return Artifact("curves", 1, recipe, make)


def interpolation(cfg) -> Artifact:
    """Walk from the SFT model (γ = 0) to the aligned one (γ = 1), trained on all pairs, and past it; γ = 1 + α."""
    alphas = sorted({round(gamma - 1, 6) for gamma in cfg.interpolation} | set(cfg.alphas[1.0]))
    walk = {alpha: point(cfg, 1.0, cfg.seeds[0], alpha, "dev_prompts") for alpha in alphas}

    def make(out: Path) -> None:
        config.check_machine(cfg)
        frames, points = [], []
        for alpha, artifact in stages.watched(walk.items(), "from SFT to aligned and past it"):
            _table(frames, points, artifact, {"split": "dev", "fraction": 1.0, "seed": cfg.seeds[0], "alpha": alpha})
        _write_table(out, frames, points)

    return Artifact("interpolation", 1, {"walk": list(walk.values())}, make)


def sweep(cfg, lines: dict[str, Line]) -> Artifact:
    """Walk along lines through two models on dev prompts; best.json: the α of each that the reward model chooses.

    responses.csv.gz and points.json as in curves(), with the line's name as `model`; the SFT model is "SFT".
    """
    start = Line(stages.sft(cfg), stages.aligned(cfg, cfg.fractions[-1], cfg.seeds[0]), (-1.0,))
    walk = {
        (name, alpha): stages.scores(
            cfg, line.at(cfg, alpha, "dev_prompts", cfg.dev_samples), "dev_prompts", kl_prompts=cfg.kl_prompts
        )
        for name, line in {"SFT": start, **lines}.items() for alpha in line.alphas
    }  # fmt: skip

    def make(out: Path) -> None:
        config.check_machine(cfg)
        for line in lines.values():
            line.start.get(), line.end.get()
        frames, points = [], []
        for (name, alpha), artifact in stages.watched(walk.items(), "lines through two models, dev prompts"):
            _table(frames, points, artifact, {"model": name, "alpha": alpha})
        _write_table(out, frames, points)
        means = pd.concat(frames).groupby(["model", "alpha"])["reward"].mean().unstack()
        (out / "best.json").write_text(json.dumps({name: float(means.loc[name].idxmax()) for name in lines}, indent=1))

    return Artifact("sweep", 1, {"points": list(walk.values()), "names": list(lines)}, make)


def recipes(cfg) -> dict[str, Line]:
    """Return the lines of models trained longer, faster, by other optimizers and with another β (ACL Table 4)."""
    train, seed = cfg.train, cfg.seeds[0]
    changes = {"2 epochs": {"epochs": 2}, "3 epochs": {"epochs": 3}}
    changes |= {f"learning rate × {k}": {"lr": k * train.lr} for k in (2, 4)}
    changes |= {"AdaGrad": {"optimizer": "adagrad"}, "RMSprop": {"optimizer": "rmsprop"}}
    changes |= {"β × 0.1": {"beta": train.beta / 10}, "β × 10": {"beta": train.beta * 10}}
    picked = {"default": {}} | {name: changes[name] for name in cfg.recipes}
    models = {name: stages.aligned(cfg, cfg.recipe_fraction, seed, **change) for name, change in picked.items()}
    return {name: Line(stages.sft(cfg), model, cfg.recipe_alphas) for name, model in models.items()}


def data_quality(cfg) -> dict[str, Line]:
    """Return the lines of models trained on random pairs, and on those with the longest chosen responses (Table 3)."""
    f, seed = cfg.quality_fraction, cfg.seeds[0]
    models = {"random": stages.aligned(cfg, f, seed), "length-biased": stages.aligned(cfg, f, seed, longest=True)}
    return {name: Line(stages.sft(cfg), model, cfg.alphas[f]) for name, model in models.items()}


def wrong_pairs(cfg) -> dict[str, Line]:
    """Return a line from SFT to aligned, and lines through models that ExPO should not be applied to (v1 Fig. 7)."""
    one, other = stages.sft(cfg), stages.sft(cfg, seed=1)
    fraction, seed = cfg.recipe_fraction, cfg.seeds[0]
    aligned = stages.aligned(cfg, fraction, seed)
    pairs = {
        "SFT → aligned from it": (one, aligned),
        "instruct → SFT": (stages.target(cfg), one),
        "two SFT models of one start": (one, other),
        "two aligned models of different starts": (aligned, stages.aligned(cfg, fraction, seed, start=other)),
    }
    return {name: Line(*models, cfg.pair_alphas) for name, models in pairs.items()}


def modules(cfg) -> dict[str, Line]:
    """Return lines on which all tensors, attention, MLP, or half of the layers move past the aligned model."""
    model, half = stages.aligned(cfg, cfg.fractions[-1], cfg.seeds[0]), cfg.layers // 2
    parts = {"attention": ("*.self_attn.*",), "MLP": ("*.mlp.*",)}
    parts["first half of the layers"] = tuple(f"*.layers.{i}.*" for i in range(half))
    parts["second half of the layers"] = tuple(f"*.layers.{i}.*" for i in range(half, cfg.layers))
    line = Line(stages.sft(cfg), model, cfg.module_alphas)
    return {"all": line} | {name: dataclasses.replace(line, modules=patterns) for name, patterns in parts.items()}


def change(cfg) -> Artifact:
    """Measure how far SFT and DPO on each fraction move the weights; movement.csv.gz (a row a tensor), cosines.json."""
    start, seed = stages.sft(cfg), cfg.seeds[0]
    models = {f"{f:.0%} of the pairs": stages.aligned(cfg, f, seed) for f in cfg.fractions}
    pairs = {
        "SFT → DPO": (start, models), "instruct → SFT": (stages.target(cfg), {"SFT": start}),
        "instruct → DPO": (stages.target(cfg), {"DPO": models[f"{cfg.fractions[-1]:.0%} of the pairs"]}),
    }  # fmt: skip

    def make(out: Path) -> None:
        from beyond_dpo.change import movement

        frames = []
        for name, (zero, ends) in pairs.items():
            rows, cosines = movement(zero.get(), {n: model.get() for n, model in ends.items()})
            frames.append(pd.DataFrame(rows).assign(pair=name))
            if ends is models:
                (out / "cosines.json").write_text(json.dumps([[*pair, value] for pair, value in cosines.items()]))
        table = pd.concat(frames, ignore_index=True)
        table.to_csv(out / "movement.csv.gz", index=False, compression={"method": "gzip", "mtime": 0})

    return Artifact("change", 1, {name: [zero, *ends.values()] for name, (zero, ends) in pairs.items()}, make)


def said(cfg, lines: dict[str, Line]) -> Artifact:
    """Sample one response of every point to PROMPTS; texts.json: [{model, alpha, prompt, text}, …]."""
    tokenizer_of = stages.sft(cfg)

    def own(out: Path) -> None:
        from beyond_dpo import data

        tokenizer = data.load_tokenizer(str(tokenizer_of.get()))
        rows = [{"id": p, "prompt_ids": data.render(tokenizer, p, cfg.world.template)} for p in PROMPTS]
        (out / "own.json").write_text(json.dumps(rows))

    prompts = Artifact("own-prompts", 1, {"prompts": PROMPTS, "tokenizer": tokenizer_of}, own)
    points = {(name, a): line.at(cfg, a, "own", 1, prompts) for name, line in lines.items() for a in line.alphas}

    def make(out: Path) -> None:
        from beyond_dpo import data

        tokenizer, texts = data.load_tokenizer(str(tokenizer_of.get())), []
        for (name, alpha), artifact in stages.watched(points.items(), "text samples"):
            for line in (artifact.get() / "responses.jsonl").read_text().splitlines():
                r = json.loads(line)
                text = tokenizer.decode(r["response_ids"], skip_special_tokens=True)
                texts.append({"model": name, "alpha": alpha, "prompt": r["id"], "text": text})
        (out / "texts.json").write_text(json.dumps(texts, ensure_ascii=False))

    return Artifact("said", 1, {"points": list(points.values()), "names": list(lines)}, make)


def searches(cfg) -> Artifact:
    """Search α by golden section for every fraction, in the bracket of its hand-made grid; dev prompts.

    searches.json: per fraction the chosen α with its interval and the α in the order they were tried, beside the
    grid's choice. points.csv.gz: mean reward and gold reward of each (fraction, alpha, prompt).
    """
    seed, most = cfg.seeds[0], cfg.search_evaluations
    grids = {f: {a: point(cfg, f, seed, a, "dev_prompts") for a in cfg.alphas[f]} for f in cfg.fractions}

    def make(out: Path) -> None:
        config.check_machine(cfg)
        found, frames = [], []
        for f in stages.watched(grids, "golden-section search"):
            seen: dict[float, pd.DataFrame] = {}

            def evaluate(alpha, f=f, seen=seen):
                scores = pd.read_json(point(cfg, f, seed, alpha, "dev_prompts").get() / "scores.jsonl", lines=True)
                seen[alpha] = scores.groupby("id", sort=False)[["reward", "gold"]].mean().reset_index(drop=True)
                return seen[alpha]["reward"].to_numpy()

            result = search.golden_section(evaluate, (0.0, max(grids[f])), most, seed=seed)
            grid = max(grids[f], key=lambda a: evaluate(a).mean())
            found.append({"fraction": f, "alpha": result.alpha, "low": result.low, "high": result.high, "grid": grid,
                          "tried": list(result.rewards)})  # fmt: skip
            frames += [t.rename_axis("prompt").reset_index().assign(fraction=f, alpha=a) for a, t in seen.items()]
        pd.concat(frames).to_csv(out / "points.csv.gz", index=False, compression={"method": "gzip", "mtime": 0})
        (out / "searches.json").write_text(json.dumps(found, indent=1))

    recipe = {"points": [p for grid in grids.values() for p in grid.values()], "evaluations": most, "seed": seed}
    return Artifact("searches", 1, recipe, make)


def runs(cfg) -> list[tuple[float, int]]:
    """Return every (fraction, seed) that is trained: the first seed for all, the others where they are cheap."""
    return [(f, s) for f in cfg.fractions for s in cfg.seeds if s == cfg.seeds[0] or f in cfg.seed_fractions]


def point(cfg, fraction: float, seed: int, alpha: float, split: str) -> Artifact:
    """Return the scores of one α of one model on one split; fraction 0 is the SFT model (α = −1 of any other)."""
    samples = cfg.test_samples if split == "test_prompts" else cfg.dev_samples
    model = stages.aligned(cfg, fraction or cfg.fractions[-1], seed if fraction else cfg.seeds[0])
    alpha = alpha if fraction else -1.0
    answers = Line(stages.sft(cfg), model, (alpha,)).at(cfg, alpha, split, samples)
    return stages.scores(cfg, answers, split, kl_prompts=cfg.kl_prompts)


def describe(profile: str, **overrides) -> list[str]:
    """Return what a run of the notebooks at `profile` needs, reads and executes, a line each; nothing is started."""
    cfg = config.load("expo", profile, **overrides)
    world, train, needs = cfg.world, cfg.train, cfg.needs
    lines = [
        f"needs: {needs.gpus} GPUs of {needs.gpu_gb} GB, {needs.memory_gb} GB memory, {needs.disk_gb} GB disk, "
        f"about {needs.hours:g} h",
        f"models: target {world.target}, reward model {world.reward_model}; data: {world.dataset}",
        f"pairs: {world.prompts} {'published' if '/' in world.dataset else f'prompts × {world.samples} samples'}; "
        f"{world.dev_prompts} dev and {world.test_prompts} test prompts",
    ]
    job = Path("artifacts/train-KEY.partial/checkpoints/config.json")
    trainings = [("SFT", cfg.sft)] * bool(world.sft_rows)
    trainings += [(f"{train.loss} on {f:.0%} of the pairs, seed {s}", train) for f, s in runs(cfg)]
    for what, t in trainings:
        command = " ".join(launch.command("beyond_dpo.train", job, launcher=t.launcher, processes=t.processes))
        lines += [f"{what} (lr {t.lr:g}, β {t.beta:g}, batch {t.global_batch} = {t.processes} × {t.micro_batch} × "
                  f"{config.check_batch(t)}, ZeRO-{t.zero}): {command}"]  # fmt: skip
    lines += ["rewards and the pairs' log-probabilities: python -m beyond_dpo.rewards, python -m beyond_dpo.reference"]
    lines += [f"notebook 13 trains {len(cfg.recipes)} more on {cfg.recipe_fraction:.0%} of the pairs, 14 one on "
              f"{cfg.quality_fraction:.0%}, 15 another SFT model and one from it"]  # fmt: skip
    grid = "; ".join(f"{f:.0%}: {' '.join(f'{a:g}' for a in cfg.alphas[f])}" for f in cfg.fractions)
    lines += [f"one {cfg.decoding.backend} engine over every α ({grid}): python -m beyond_dpo.generate"]
    return lines


def _table(frames: list, points: list, artifact, place: dict) -> None:
    table = pd.read_json(artifact.get() / "scores.jsonl", lines=True)
    table["logratio"] = (table["logp"] - table["logp_sft"]).round(4)
    table["prompt"] = pd.factorize(table["id"])[0]  # no row of the data set leaves artifacts/
    frames.append(table.drop(columns=["id", "logp", "logp_sft"]).assign(**place))
    points.append(place | artifact.manifest["facts"])


def _write_table(out: Path, frames: list, points: list) -> None:
    first = [*(name for name in points[0] if name != "distinct_2"), "prompt", "sample"]
    table = pd.concat(frames, ignore_index=True)
    table = table[first + [c for c in table.columns if c not in first]]
    table.to_csv(out / "responses.csv.gz", index=False, compression={"method": "gzip", "mtime": 0})
    (out / "points.json").write_text(json.dumps(points))
