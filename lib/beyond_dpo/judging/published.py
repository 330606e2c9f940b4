"""ExPO on published pairs of models, searched and judged here (arXiv 2404.16792, Table 2 and ACL
Table 5).
"""

import json
from pathlib import Path

import pandas as pd

from beyond_dpo import templates
from beyond_dpo.judging import ask, judge
from beyond_dpo.pipeline import assets, config, expo, gather, needs, stages
from beyond_dpo.pipeline.artifacts import Artifact
from beyond_dpo.pipeline.endpoint import Endpoint


def off_the_shelf(cfg) -> Artifact:
    """Extrapolate published pairs: α by the reward model on dev prompts, then test prompts at 0 and
    the chosen α.

    As sweep(), with the column split and the pair's name as `model`; wins.json: with a judge,
    AlpacaEval's win rate in percent with its standard error, and its length-controlled estimate
    with its interval, of each (model, alpha).
    """
    config.require_prompts(cfg.world, "dev_prompts", "test_prompts")
    lines = {name: expo.published(pair, cfg.published_alphas) for name, pair in cfg.pairs.items()}

    def place(name: str, alpha: float, split: str) -> gather.Point:
        samples = cfg.test_samples if split == "test" else cfg.dev_samples
        scores = lines[name].scores(cfg, alpha, f"{split}_prompts", samples)
        return gather.Point({"split": split, "model": name, "alpha": alpha}, scores)

    dev = [place(name, alpha, "dev") for name in lines for alpha in cfg.published_alphas]

    def make(out: Path) -> dict:
        needs.check(cfg)
        searched, points = gather.scored(dev, "α of published models, dev prompts")
        means, wins = searched.groupby(["model", "alpha"])["reward"].mean().unstack(), []
        best = {name: float(means.loc[name].idxmax()) for name in lines}
        test = [place(name, a, "test") for name in lines for a in dict.fromkeys([0.0, best[name]])]
        tested, more = gather.scored(test, "published models, test prompts")
        gather.write(out, pd.concat([searched, tested]), points + more)
        for at, scores in test if cfg.judge else ():
            said = _spoken(lines[at["model"]].own(cfg), scores.inputs["responses"], "test_prompts")
            name, by = f"{at['model']} {at['alpha']:g}", Endpoint(cfg.judge, cfg.judge_url)
            rows = ask.rows(
                ask.alpaca_eval(said, by, model=name, questions=ask.alpaca_questions(said))
            )
            won, fair = (
                judge.win_rate(row["preference"] for row in rows),
                judge.length_controlled(rows),
            )
            wins.append(at | {"win_rate": won._asdict(), "length_controlled": fair._asdict()})
        (out / "wins.json").write_text(json.dumps(wins, indent=1), encoding="utf-8")
        (out / "best.json").write_text(json.dumps(best, indent=1), encoding="utf-8")
        return {"chosen_points": gather.keys(test)}

    recipe = {"dev": [scores for _, scores in dev], "names": list(lines), "judge": cfg.judge}
    recipe |= {"test_samples": cfg.test_samples}
    return Artifact("published", 1, recipe, make, hours=cfg.needs.hours)


def _spoken(cfg, said: Artifact, split: str) -> dict[str, str]:
    """Return {what a prompt asks: the first response to it} in words."""
    tokenizer, found = templates.load_tokenizer(assets.tokenizer_dir(cfg.world.target)), {}
    asked = {row["id"]: row["text"] for row in stages.texts(cfg.world).json(f"{split}.json")}
    for line in (said.get() / "responses.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        found.setdefault(
            asked[row["id"]], tokenizer.decode(row["response_ids"], skip_special_tokens=True)
        )
    return found
