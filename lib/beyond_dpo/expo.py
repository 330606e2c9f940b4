"""ExPO's experiments (arXiv 2404.16792): α curves for models trained on fractions of the pairs, and the line through γ.

Each function returns an Artifact; nothing runs before its get(). `describe` says what a run would do, without doing it.
"""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd

from beyond_dpo import config, launch, stages
from beyond_dpo.artifacts import Artifact


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
            _table(frames, points, artifact, "dev", fraction, seed, alpha)
        table = pd.concat(frames)
        for fraction, seed in runs(cfg):
            here = table[(table["fraction"] == fraction) & (table["seed"] == seed)]
            alpha = float(here.groupby("alpha")["reward"].mean().idxmax())
            best.append({"fraction": fraction, "seed": seed, "alpha": alpha})
        wanted = [(0.0, 0, 0.0)]
        for b in best:
            wanted += [(b["fraction"], b["seed"], alpha) for alpha in dict.fromkeys([0.0, b["alpha"]])]
        for fraction, seed, alpha in stages.watched(wanted, "chosen α on test prompts"):
            _table(frames, points, point(cfg, fraction, seed, alpha, "test_prompts"), "test", fraction, seed, alpha)
        _write_table(out, frames, points)
        (out / "best.json").write_text(json.dumps(best, indent=1))
        facts = {name: stages.reward(cfg.world, name).manifest["facts"] for name in ("gold", "reward")}
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
            _table(frames, points, artifact, "dev", 1.0, cfg.seeds[0], alpha)
        _write_table(out, frames, points)

    return Artifact("interpolation", 1, {"walk": list(walk.values())}, make)


def runs(cfg) -> list[tuple[float, int]]:
    """Return every (fraction, seed) that is trained: the first seed for all, the others where they are cheap."""
    return [(f, s) for f in cfg.fractions for s in cfg.seeds if s == cfg.seeds[0] or f in cfg.seed_fractions]


def point(cfg, fraction: float, seed: int, alpha: float, split: str) -> Artifact:
    """Return the scores of one α of one model on one split; fraction 0 is the SFT model (α = −1 of any other)."""
    samples = cfg.test_samples if split == "test_prompts" else cfg.dev_samples
    model = stages.aligned(cfg, fraction or cfg.fractions[-1], seed if fraction else cfg.seeds[0])
    alpha = alpha if fraction else -1.0
    answers = stages.responses(cfg, stages.sft(cfg), split, aligned=model, alpha=alpha, samples=samples, seed=2)
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
    grid = "; ".join(f"{f:.0%}: {' '.join(f'{a:g}' for a in cfg.alphas[f])}" for f in cfg.fractions)
    lines += [f"one {cfg.decoding.backend} engine over every α ({grid}): python -m beyond_dpo.generate"]
    return lines


def _table(frames: list, points: list, artifact, split: str, fraction: float, seed: int, alpha: float) -> None:
    table = pd.read_json(artifact.get() / "scores.jsonl", lines=True)
    place = {"split": split, "fraction": fraction, "seed": seed, "alpha": alpha}
    table["logratio"] = (table["logp"] - table["logp_sft"]).round(4)
    table["prompt"] = pd.factorize(table["id"])[0]  # no row of the data set leaves artifacts/
    frames.append(table.drop(columns=["id", "logp", "logp_sft"]).assign(**place))
    points.append(place | artifact.manifest["facts"])


def _write_table(out: Path, frames: list, points: list) -> None:
    order = ["split", "fraction", "seed", "alpha", "prompt", "sample"]
    table = pd.concat(frames, ignore_index=True)
    table = table[order + [c for c in table.columns if c not in order]]
    table.to_csv(out / "responses.csv.gz", index=False, compression={"method": "gzip", "mtime": 0})
    (out / "points.json").write_text(json.dumps(points))
