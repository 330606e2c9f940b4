"""The pipeline: thin functions that tie the modules together, each returning an Artifact that
nothing has computed yet.

texts -> sft -> pool -> pairs -> reference -> aligned -> responses(α) -> scores -> curves
"""

import dataclasses
import json
import shutil
from functools import partial
from pathlib import Path

import pandas as pd

from beyond_dpo import templates
from beyond_dpo.files import link_file
from beyond_dpo.machine import launch, spread, workers
from beyond_dpo.pipeline import artifacts, assets, config, corpus, needs
from beyond_dpo.pipeline.artifacts import Artifact
from beyond_dpo.rows import epoch_order, read_rows, write_rows

# what a config says of its weights' origin, not of what an engine computes
UNSHAPED = ("dtype", "torch_dtype", "transformers_version", "_name_or_path")


def texts(world: config.World) -> Artifact:
    """Split the data set into SFT rows, labels and prompts (corpus.split)."""
    picked = (
        "template sft_rows sft_tokens prompts dev_prompts test_prompts prompt_tokens gold_rows "
        "reward_rows"
    )
    recipe = {name: getattr(world, name) for name in [*picked.split(), "reward_words"]}
    recipe |= {"tokenizer": assets.resolve(world.target), "source": corpus.source(world.dataset)}
    recipe |= {
        name: corpus.source(ref)
        for name in ("dev_dataset", "test_dataset")
        if (ref := getattr(world, name))
    }
    recipe |= {"pairs": world.pairs} if world.pairs != "sampled" else {}
    recipe |= corpus.rendering(world.target, world.template)
    if world.template == "chat" or world.dataset not in corpus.EMBEDDED:
        recipe["tokens"] = 2  # of responses: those that they have after their prompt
    return Artifact("texts", 1, recipe, lambda out: corpus.split(world, out))


def model(ref: str) -> Artifact:
    """Copy a model's own files, before any training here; those of a gigabyte and more are
    linked.
    """

    def make(out: Path) -> None:
        how = {
            "ignore": shutil.ignore_patterns("manifest.json"),
            "copy_function": partial(link_file, least=10**9),
        }
        shutil.copytree(assets.model_dir(ref), out, dirs_exist_ok=True, **how)

    return Artifact("target", 1, {"model": assets.resolve(ref)}, make)


def sft(cfg, seed: int = 0) -> Artifact:
    """Fine-tune the target on review openings: the SFT model θ₀ of everything that follows."""
    if not cfg.world.sft_rows:  # it already is one
        return model(cfg.world.target)
    desc = f"SFT seed {seed}" if seed else "SFT"
    return training(cfg, cfg.sft, texts(cfg.world), "sft.jsonl", ["chosen"], seed=seed, desc=desc)


def reward(world: config.World, name: str) -> Artifact:
    """Train the gold reward (words, half A) or the reward model (encoder, half B) on labelled
    openings.

    "vader" and a finished reward model have nothing to train: they are only measured on the same
    held-out labels.
    """
    recipe = {"texts": texts(world), "seed": 0}
    if name == "reward":
        recipe["encoder"] = assets.resolve(world.reward_model)
    if world.precision == "fp32":
        recipe["precision"] = world.precision

    def make(out: Path) -> dict:
        labelled = json.loads((texts(world).get() / "labelled.json").read_text(encoding="utf-8"))
        (words, labels), held_out = labelled.get(name, ([], [])), labelled["held_out"]
        if name == "gold" and not words:
            raise config.ConfigError(
                "world.gold_rows is 0: there is nothing to train the gold reward on"
            )
        job = {
            "texts": words,
            "labels": labels,
            "held_out": held_out,
            "seed": 0,
            "out": str(out),
            "reward": name,
        }
        if name == "reward":
            job["encoder"] = str(assets.model_dir(world.reward_model))
            if words:
                job["precision"] = world.precision
            else:
                job["trust_remote_code"] = world.reward_model in world.trust_remote_code
        if words and needs.cards():  # a living engine holds most of the card
            workers.close()
        workers.run("beyond_dpo.jobs.fit_reward", job, out, f"train {name}")
        return json.loads((out / "facts.json").read_text(encoding="utf-8"))

    return Artifact(
        f"reward-{name}",
        1,
        recipe,
        make,
        f"reward {name}: python -m beyond_dpo.jobs.fit_reward {{job}}",
    )


def oracle(world: config.World) -> str:
    """Return which reward makes the pairs: the gold reward, or where no labels train one the reward
    model.
    """
    return "gold" if world.gold_rows else "reward"


def responses(
    cfg,
    model: Artifact,
    split: str,
    *,
    aligned: Artifact | None = None,
    alpha: float = 0.0,
    modules: dict | None = None,
    part="",
    prompts: Artifact | None = None,
    samples: int,
    seed: int,
    engine="generate",
) -> Artifact:
    """Sample responses to the prompts of `split` from θ₁ + α(θ₁ − θ₀), or from `model` itself
    without `aligned`.

    modules: as in extrapolate(). part: of `aligned`'s training, after which it is taken. prompts:
    not the world's own.
    engine: the living one that does it; who samples in two ways by turns keeps two.
    """
    prompts = prompts or texts(cfg.world)
    recipe = {"sft": model, "aligned": aligned, "alpha": alpha, "prompts": prompts, "split": split}
    recipe |= {name: given for name, given in (("modules", modules), ("part", part)) if given}

    def make(out: Path) -> dict:
        own, living = str(model.get()), workers.living.get(engine)
        alike = living and _shape(living.settings["model"]) == _shape(
            own
        )  # then a swap brings all weights
        settings = {
            "model": living.settings["model"] if alike else own,
            "decoding": dataclasses.asdict(cfg.decoding),
        }
        workers.make_room(cfg, "score", engine)
        swap = {
            "sft": own,
            "aligned": aligned and str(aligned.get() / part),
            "alpha": alpha,
            "modules": modules,
        }
        given = {
            "prompts": str(prompts.get() / f"{split}.json"),
            "out": str(out / "responses.jsonl"),
        }
        given |= {"samples": samples, "seed": seed}
        served, calls = "beyond_dpo.jobs.generate.Engine", [("swap", swap), ("generate", given)]
        answers = spread.call(
            cfg, engine, served, settings, calls, out, f"responses at α {alpha:g}"
        )
        return spread.finish(cfg, given, answers) | ({"probe": answers[0]} if answers else {})

    does = (
        f"one {cfg.decoding.backend} engine over every α: python -m beyond_dpo.jobs.generate "
        "--serve"
    )
    recipe |= {"decoding": cfg.decoding.recipe(), "samples": samples, "seed": seed}
    return Artifact("responses", 2, recipe, make, does)


def _shape(model: str) -> list:
    """Return what an engine keeps of the model that it starts with: structure, end tokens,
    vocabulary.
    """
    about = []
    for name in ("config.json", "generation_config.json"):
        file = Path(model, name)
        content = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        about.append({key: value for key, value in content.items() if key not in UNSHAPED})
    words = Path(model, "tokenizer.json")
    return [*about, words.exists() and artifacts.sha256(words), templates.model_end_tokens(model)]


def scores(
    cfg,
    answers: Artifact,
    split: str,
    *,
    judges: tuple = ("gold", "reward", "vader"),
    kl_prompts: int = 0,
    prompts: Artifact | None = None,
) -> Artifact:
    """Score responses with the named judges, with length, repetition and the log-ratio to the SFT
    model.
    """
    start, prompts = sft(cfg), prompts or texts(cfg.world)
    judges = tuple(name for name in judges if name != "gold" or cfg.world.gold_rows)
    trained = {name: reward(cfg.world, name) for name in judges if name != "vader"}
    kinds = {"gold": "bag_of_words", "reward": "classifier", "vader": "vader"}

    def make(out: Path) -> dict:
        folders = {name: {"folder": str(artifact.get())} for name, artifact in trained.items()}
        rewards = {name: {"kind": kinds[name], **folders.get(name, {})} for name in judges}
        if "reward" in judges and not cfg.world.reward_rows:
            rewards["reward"] |= {
                "kind": "finished",
                "folder": str(assets.model_dir(cfg.world.reward_model)),
            }
            rewards["reward"] |= {
                "trust_remote_code": cfg.world.reward_model in cfg.world.trust_remote_code
            }
        job = {
            "rewards": rewards,
            "out": str(out / "scores.jsonl"),
            "reference_prompts": kl_prompts,
        }
        job["shard"] = cfg.decoding.shard
        files = {
            "prompts": str(prompts.get() / f"{split}.json"),
            "responses": str(answers.get() / "responses.jsonl"),
        }
        settings = {"target": str(start.get()), "precision": cfg.world.precision}
        served = "beyond_dpo.jobs.score.Scorer"
        (facts,) = spread.call(
            cfg, "score", served, settings, [("score", job | files)], out, "scores"
        ) or [None]
        return facts or workers.get("score", "beyond_dpo.jobs.score", settings).call(
            "score", **job, **files
        )

    recipe = {
        "responses": answers,
        "judges": list(judges),
        "trained": trained,
        "kl_prompts": kl_prompts,
    }
    if (
        "reward" in judges and not cfg.world.reward_rows
    ):  # a finished one reads turns by its own template
        recipe |= corpus.rendering(cfg.world.reward_model, "chat")
    if cfg.world.precision == "fp32":
        recipe["precision"] = cfg.world.precision
    return Artifact(
        "scores", 2, recipe, make, "its responses judged: python -m beyond_dpo.jobs.score --serve"
    )


def require_samples(world: config.World) -> None:
    """Raise ConfigError for a single response to a prompt, where no preference can be had."""
    if world.samples < 2:
        advice = "a preference needs two responses to a prompt, set it to 2 or more"
        raise config.ConfigError(f"world.samples={world.samples}: {advice}")


def pairs(cfg) -> Artifact:
    """Pair the best with the worst of each prompt's samples from the SFT model, by the oracle; or
    take those given.

    Raises ConfigError for a single sample; its get() does where every prompt's samples score alike.
    """
    if cfg.world.pairs == "given":
        return texts(cfg.world)
    require_samples(cfg.world)
    pool = responses(cfg, sft(cfg), "prompts", samples=cfg.world.samples, seed=1)
    judged = scores(cfg, pool, "prompts", judges=(oracle(cfg.world),))

    def make(out: Path) -> dict:
        asked = {r["id"]: r["prompt_ids"] for r in texts(cfg.world).json("prompts.json")}
        gold = pd.read_json(judged.get() / "scores.jsonl", lines=True)
        said = pd.read_json(pool.get() / "responses.jsonl", lines=True).set_index(["id", "sample"])[
            "response_ids"
        ]
        rows, gaps, by = [], [], oracle(cfg.world)
        for name, group in gold.groupby("id", sort=False):
            best, worst = group.loc[group[by].idxmax()], group.loc[group[by].idxmin()]
            chosen, rejected = said[name, best["sample"]], said[name, worst["sample"]]
            # a prompt whose samples all score alike, or are alike, has no preference
            if best[by] > worst[by] and chosen != rejected:
                responses = {"chosen": chosen, "rejected": rejected}
                rows.append({"id": name, "prompt_ids": asked[name], "responses": responses})
                gaps.append(float(best[by] - worst[by]))
        if not rows:
            judge = "gold reward" if by == "gold" else f"reward model {cfg.world.reward_model}"
            raise config.ConfigError(
                f"the {judge} scores all {cfg.world.samples} responses to each of {len(asked)} "
                "prompts alike, which leaves no pair to train on: use another reward model, more "
                "world.samples, or a higher decoding.temperature"
            )
        write_rows(out / "pairs.jsonl", rows)
        gap = round(sum(gaps) / len(gaps), 3)
        return {"pairs": len(rows), "ties_dropped": len(asked) - len(rows), "mean_gold_gap": gap}

    return Artifact("pairs", 1, {"scores": judged}, make)


def reference(
    cfg, start: Artifact | None = None, rows: Artifact | None = None, names=("chosen", "rejected")
) -> Artifact:
    """Pass the SFT model (or `start`) once over all pairs; β, loss and seed of the training are not
    in its key.

    rows: in place of the pairs, with responses of these names.
    """
    start, rows, train = start or sft(cfg), rows or pairs(cfg), cfg.train
    recipe = {"sft": start, "pairs": rows, "precision": train.precision}
    recipe |= {"max_prompt": train.max_prompt, "max_length": train.max_length}
    recipe |= {"names": names} if names != ("chosen", "rejected") else {}

    def make(out: Path) -> None:
        workers.make_room(cfg, "jobs")
        job = {"model": str(start.get()), "rows": str(rows.get() / "pairs.jsonl"), "names": names}
        job |= {"limits": _limits(train, start.get()), "precision": train.precision}
        # four times the rows of a training step: there are no gradients to keep
        job |= {"micro_batch": 4 * train.micro_batch, "out": str(out / "reference.safetensors")}
        workers.run("beyond_dpo.jobs.reference", job, out, "reference")

    return Artifact(
        "reference", 2, recipe, make, "reference: python -m beyond_dpo.jobs.reference {job}"
    )


def of_reference(held: Artifact, what: str):
    """Return logps, tokens or entropies of a reference pass, float64 (responses, rows)."""
    from safetensors.numpy import load_file

    return load_file(held.get() / "reference.safetensors")[what].T.astype(float)


def subset(cfg, fraction: float, seed: int, longest: bool = False) -> Artifact:
    """Draw a fraction of the pairs: at random, or those whose chosen response is longest against
    the rejected one.
    """
    rows = pairs(cfg)

    def make(out: Path) -> dict:
        everything = read_rows(rows.get() / "pairs.jsonl")
        if not everything:
            advice = "use more prompts, or another data set"
            raise config.ConfigError(f"{rows.key} holds no pair to draw from: {advice}")
        order = epoch_order(len(everything), seed, epoch=1_000)
        longer = [
            len(r["responses"]["chosen"]) - len(r["responses"]["rejected"]) for r in everything
        ]
        if longest:
            order.sort(key=lambda i: -longer[i])
        kept = order[: max(1, round(fraction * len(everything)))]
        write_rows(out / "pairs.jsonl", [everything[i] for i in sorted(kept)])
        return {
            "pairs": len(kept),
            "mean_extra_tokens": round(sum(longer[i] for i in kept) / len(kept), 2),
        }

    recipe = {"pairs": rows, "fraction": fraction, "seed": seed} | (
        {"longest": True} if longest else {}
    )
    return Artifact("subset", 1, recipe, make)


def aligned(
    cfg,
    fraction: float,
    seed: int = 0,
    *,
    start: Artifact | None = None,
    longest: bool = False,
    **changes,
) -> Artifact:
    """Align the SFT model on a fraction of the pairs (a fraction of the data is a fraction of the
    steps).

    start: another model to align, then its own reference. longest: see subset(). changes: of
    cfg.train, as epochs=2.
    """
    settings = dataclasses.replace(cfg.train, **changes)
    part, base = subset(cfg, fraction, seed, longest), start or sft(cfg)
    desc = f"{settings.loss.upper()} {fraction:.0%} seed {seed}"
    for name, value in changes.items():
        if value == settings.loss:
            continue
        desc += f", {value}" if isinstance(value, str) else f", {name} {value:g}"
    if longest:
        desc += ", the longest chosen"
    given = {"base": base, "against": reference(cfg, base), "seed": seed, "desc": desc}
    return training(cfg, settings, part, "pairs.jsonl", ["chosen", "rejected"], **given)


def training(
    cfg,
    settings: config.Train,
    rows: Artifact,
    file: str,
    names: list,
    *,
    base: Artifact | None = None,
    against: Artifact | None = None,
    seed: int,
    desc: str,
) -> Artifact:
    """Train from `base` against its reference pass, or (SFT) from the target."""
    machine = {"launcher": settings.launcher, "processes": settings.processes}
    batch = (
        f"{settings.global_batch} = {settings.processes} × {settings.micro_batch} × "
        f"{config.check_batch(settings)}"
    )
    does = (
        f"{desc} ({settings.epochs} × lr {settings.lr:g}, {settings.optimizer}, β "
        f"{settings.beta:g}, batch {batch}, "
    )
    does += (
        f"ZeRO-{settings.zero}): "
        f"{' '.join(launch.command('beyond_dpo.jobs.train', Path('{job}'), **machine))}"
    )
    recipe = {
        "model": base or assets.resolve(cfg.world.target),
        "rows": rows,
        "names": names,
        "reference": against,
    }
    recipe |= {"settings": settings.recipe(), "seed": seed}

    def make(out: Path) -> dict:
        workers.make_room(cfg, *["jobs"] * (settings.launcher == "plain"))
        model = base.get() if base else assets.model_dir(cfg.world.target)
        job = {
            "model": str(model),
            "rows": str(rows.get() / file),
            "names": names,
            "seed": seed,
            "out": str(out),
        }
        job |= {"limits": _limits(settings, model), "settings": dataclasses.asdict(settings)}
        job["reference"] = str(against.get() / "reference.safetensors") if against else None
        finished = out / "checkpoints" / "finished"
        finished.unlink(missing_ok=True)  # of an attempt that was killed after it
        workers.run("beyond_dpo.jobs.train", job, out, desc, **machine)
        if (
            not finished.exists()
        ):  # the deepspeed launcher ends with 0 when a signal ended its processes
            raise launch.JobFailed(
                f"{desc}: ended without a model; see the logs in {out / 'checkpoints'}"
            )
        steps = [
            json.loads(line)
            for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()
        ]
        return json.loads((out / "facts.json").read_text(encoding="utf-8")) | {
            "first": steps[0],
            "last": steps[-1],
        }

    return Artifact("train", 2, recipe, make, does)


def _limits(settings: config.Train, model: Path) -> dict:
    """Return how rows are cut; only asked for when something is computed, as it needs the
    tokenizer.
    """
    tokenizer = templates.load_tokenizer(str(model))
    limits = {"max_prompt": settings.max_prompt, "max_length": settings.max_length}
    return limits | {"bos_id": tokenizer.bos_token_id, "eos_id": templates.end_tokens(tokenizer)}
