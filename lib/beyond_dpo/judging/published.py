"""Search and judge ExPO on published pairs of models (arXiv 2404.16792, Table 2, ACL Table 5)."""

import json
from pathlib import Path

import pandas as pd

from beyond_dpo.judging import ask, benchmarks
from beyond_dpo.pipeline import config, expo, gather, needs, stages
from beyond_dpo.pipeline.artifacts import Artifact
from beyond_dpo.pipeline.endpoint import Endpoint


def off_the_shelf(cfg) -> Artifact:
    """Extrapolate published pairs: search α on dev prompts, then sample and judge test prompts.

    The reward model chooses α; test prompts are sampled at α = 0 and at the chosen α. Files: as
    sweep(), with the column split and the pair's name as `model`; wins.json: with a judge,
    AlpacaEval's win rate in percent with its standard error, and its length-controlled estimate
    with its interval, of each (model, alpha).
    """
    config.require_prompts(cfg.world, "dev_prompts", "test_prompts")
    lines = {}
    for name, pair in cfg.pairs.items():
        lines[name] = expo.published(pair, cfg.published_alphas)
    dev = []
    for name, line in lines.items():
        for alpha in cfg.published_alphas:
            scores = line.scores(cfg, alpha, "dev_prompts", cfg.dev_samples)
            place = {"split": "dev", "model": name, "alpha": alpha}
            dev.append((place, scores))

    def make(out: Path) -> dict:
        needs.check(cfg)
        dev_table, dev_points = gather.scored(dev, "α of published models, dev prompts")
        best = _best_alphas(dev_table, list(lines))
        test = _test_places(cfg, lines, best)
        test_table, test_points = gather.scored(test, "published models, test prompts")
        table = pd.concat([dev_table, test_table])
        gather.write(out, table, dev_points + test_points)
        wins = []
        if cfg.judge:
            for place, scores in test:
                line = lines[place["model"]]
                responses = scores.inputs["responses"]
                wins.append(place | _wins(line.own(cfg), place, responses))
        (out / "wins.json").write_text(json.dumps(wins, indent=1), encoding="utf-8")
        (out / "best.json").write_text(json.dumps(best, indent=1), encoding="utf-8")
        return {"chosen_points": gather.keys(test)}

    inputs = {
        "dev": [scores for _, scores in dev],
        "names": list(lines),
        "judge": cfg.judge,
        "test_samples": cfg.test_samples,
    }
    return Artifact("published", version=1, inputs=inputs, make=make, hours=cfg.needs.hours)


def _best_alphas(table: pd.DataFrame, names: list[str]) -> dict[str, float]:
    """Return the α with the highest mean reward of each model."""
    rewards = table.groupby(["model", "alpha"])["reward"]
    means = rewards.mean().unstack()
    best = {}
    for name in names:
        best[name] = float(means.loc[name].idxmax())
    return best


def _test_places(
    cfg, lines: dict[str, expo.Line], best: dict[str, float]
) -> list[tuple[dict, Artifact]]:
    """Return (place, scores) of each model on test prompts, at α = 0 and at its chosen α."""
    places = []
    for name, line in lines.items():
        alphas = dict.fromkeys([0.0, best[name]])  # once, where the chosen α is 0
        for alpha in alphas:
            scores = line.scores(cfg, alpha, "test_prompts", cfg.test_samples)
            place = {"split": "test", "model": name, "alpha": alpha}
            places.append((place, scores))
    return places


def _wins(cfg, place: dict, responses: Artifact) -> dict:
    """Return AlpacaEval's win rate, plain and length-controlled, of the responses of one place."""
    instructions = {}
    for row in stages.texts(cfg.world).json("test_prompts.json"):
        instructions[row["id"]] = row["text"]
    outputs = {}
    for prompt_id, text in benchmarks.first_texts(cfg, responses).items():
        outputs.setdefault(instructions[prompt_id], text)
    judged = ask.alpaca_eval(
        outputs,
        Endpoint(cfg.judge, cfg.judge_url),
        model=f"{place['model']} {place['alpha']:g}",
        questions=ask.alpaca_questions(outputs),
    )
    win_rate, length_controlled = benchmarks.alpaca_scores(ask.rows(judged))
    return {
        "win_rate": win_rate._asdict(),
        "length_controlled": length_controlled._asdict(),
    }
