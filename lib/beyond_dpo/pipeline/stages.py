"""The stages that the experiments of all papers share.

A function that is named after a result, as sft() or pairs(), returns its Artifact: nothing runs
before its get(). In the order of the data they are

    texts, sft, (responses, scores,) pairs, subset, reference, aligned, responses, scores

The first responses are the SFT model's, of which pairs() makes its pairs; the last ones are sampled
at each α. What is made of those scores, such as curves, is in the papers' own modules.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import pandas as pd

from beyond_dpo.files import link_file
from beyond_dpo.machine import launch, spread, workers
from beyond_dpo.pipeline import artifacts, assets, config, corpus, gather, needs, spoiled
from beyond_dpo.pipeline.artifacts import Artifact
from beyond_dpo.rows import epoch_order, read_rows, write_rows

PAIR = ("chosen", "rejected")  # the responses of a preference pair
LARGE = 10**9  # bytes of a model's file that is linked, not copied
# rows.epoch_order's number for a draw of rows: no training has so many epochs, so that no draw is
# the order of an epoch
DRAW = 1_000
# settings of a training that its reference pass has too, from the configuration
REFERENCE_SETTINGS = ("max_prompt", "max_length", "precision")

# settings of a world that decide how its data set is split
SPLIT_SETTINGS = (
    "template",
    "sft_rows",
    "sft_tokens",
    "prompts",
    "dev_prompts",
    "test_prompts",
    "prompt_tokens",
    "gold_rows",
    "reward_rows",
    "reward_words",
)
# the judges, each a reward (see reward()): where a world has no spoiled texts, and where it has
JUDGES = ("gold", "reward", "vader")
MORE_JUDGES = ("gold", "reward", "words", "vader", "person")
# judge -> part of labelled.json that it is trained on
TRAINED_ON = {"gold": "gold", "reward": "reward", "words": "gold", "person": "gold"}
# what a judge is, where no setting says it: of rewards.KINDS
THIRD_OPINIONS = {"words": "bag_of_words", "vader": "vader", "person": "ngrams"}
# world.gold_model and world.reward_model that are trained from nothing; others are encoders
WORD_MODELS = {"words": "bag_of_words", "ngrams": "ngrams"}
SPOIL_SEEDS = {"gold": 0, "reward": 1, "held_out": 2}  # of the parts of labelled.json
ENCODER_TOKENS = 64  # of a text that an encoder was trained on before it could be set, at most
# what a config.json says of the origin of its weights, not of what an engine computes
ORIGIN_SETTINGS = ("dtype", "torch_dtype", "transformers_version", "_name_or_path")


# --- texts and models


def texts(world: config.World) -> Artifact:
    """Split the data set into SFT rows, labels and prompts (corpus.split)."""
    inputs = {name: getattr(world, name) for name in SPLIT_SETTINGS}
    inputs["tokenizer"] = assets.resolve(world.target)
    inputs["source"] = corpus.source(world.dataset)
    if world.dev_dataset:
        inputs["dev_dataset"] = corpus.source(world.dev_dataset)
    if world.test_dataset:
        inputs["test_dataset"] = corpus.source(world.test_dataset)
    if world.pairs != "sampled":
        inputs["pairs"] = world.pairs
    if corpus.pools(world) > 1:
        inputs["pools"] = corpus.pools(world)
    inputs.update(corpus.rendering(world.target, world.template))
    if world.template == "chat" or world.dataset not in corpus.EMBEDDED:
        # The version of the tokens: responses have those that they have after their prompt. Texts
        # of the embedded data sets never had others, so their keys stay without it.
        inputs["tokens"] = 2

    def make(out: Path) -> dict:
        return corpus.split(world, out)

    return Artifact("texts", version=1, inputs=inputs, make=make)


def model(ref: str) -> Artifact:
    """Copy a model's own files as they are before any training here; large ones are linked."""

    def make(out: Path) -> None:
        shutil.copytree(
            assets.model_dir(ref),
            out,
            ignore=shutil.ignore_patterns("manifest.json"),
            copy_function=partial(link_file, least=LARGE),
            dirs_exist_ok=True,
        )

    return Artifact("target", version=1, inputs={"model": assets.resolve(ref)}, make=make)


def sft(cfg, seed: int = 0) -> Artifact:
    """Fine-tune the target on review openings: the SFT model θ₀ of everything that follows.

    Where no rows are set for that, the target already is the SFT model.
    """
    if not cfg.world.sft_rows:
        return model(cfg.world.target)
    desc = f"SFT seed {seed}" if seed else "SFT"
    return training(cfg, cfg.sft, texts(cfg.world), "sft.jsonl", ["chosen"], seed=seed, desc=desc)


# --- rewards


def reward(world: config.World, name: str) -> Artifact:
    """Train a reward on labelled openings, and measure it on held-out ones.

    name: "gold" is world.gold_model, trained on half A of the reviews. "reward" is the reward
    model: world.reward_model, trained on half B, or a finished model. Where world.spoiled, both are
    trained on spoiled texts too. Third opinions, which choose nothing: "words", a bag of words of
    half A without spoiled texts; "person", which tells openings of half A from spoiled ones, so
    whether a person could have written a text; "vader", a word list. That one and a finished model
    have nothing to train: they are only measured.
    The facts say how well positive and negative held-out openings are told apart (held_out,
    accuracy, auc) and, where world.spoiled, positive from spoiled ones (auc_spoiled); of "person",
    how well openings and spoiled ones are.
    Its get() raises ConfigError for a reward of half A without labels.
    """
    inputs = {"texts": texts(world), "seed": 0}
    inputs.update(_reward_model(world, name))
    if world.spoiled or name == "person":
        inputs["spoiled"] = spoiled.VERSION
    inputs.update(_precision(world))

    def make(out: Path) -> dict:
        job = _reward_job(world, name, texts(world).json("labelled.json"))
        job["out"] = str(out)
        if "texts" in job and needs.cards():  # a living engine holds most of the card
            workers.close()
        workers.run("beyond_dpo.jobs.fit_reward", job, out, f"train {name}")
        return json.loads((out / "facts.json").read_text(encoding="utf-8"))

    does = f"reward {name}: python -m beyond_dpo.jobs.fit_reward {{job}}"
    return Artifact(f"reward-{name}", version=1, inputs=inputs, make=make, does=does)


def _precision(world: config.World) -> dict:
    """Return the precision of rewards for a stage's inputs.

    That is nothing for bf16, so that keys from before fp32 could be set stay as they are.
    """
    if world.precision == "bf16":
        return {}
    return {"precision": world.precision}


def _reward_kind(world: config.World, name: str) -> str:
    """Return which of rewards.KINDS a judge is."""
    if name in THIRD_OPINIONS:
        return THIRD_OPINIONS[name]
    if name == "reward" and not world.reward_rows:
        return "finished"
    return WORD_MODELS.get(_setting(world, name), "classifier")


def _setting(world: config.World, name: str) -> str:
    """Return the setting that says which model "gold" or "reward" is."""
    return world.gold_model if name == "gold" else world.reward_model


def _reward_model(world: config.World, name: str) -> dict:
    """Return the model of a judge for a stage's inputs.

    That is nothing for a gold reward of words, and for third opinions. An encoder's tokens are
    named where they are not ENCODER_TOKENS. So keys from before these settings stay as they are.
    """
    kind = _reward_kind(world, name)
    if kind in ("classifier", "finished"):
        model = {"encoder": assets.resolve(_setting(world, name))}
        if kind == "classifier" and _encoder_tokens(world) != ENCODER_TOKENS:
            model["max_tokens"] = _encoder_tokens(world)
        return model
    is_default = name == "gold" and kind == "bag_of_words"
    if name in THIRD_OPINIONS or is_default:
        return {}
    return {"kind": kind}


def _encoder_tokens(world: config.World) -> int:
    """Return how many tokens of a text an encoder is trained on at most: two for each word."""
    return 2 * world.reward_words


def _reward_job(world: config.World, name: str, labelled: dict) -> dict:
    """Return the job of jobs.fit_reward for one reward, without its folder."""
    kind = _reward_kind(world, name)
    job = {"kind": kind, "held_out": _held_out(world, name, labelled)}
    if kind == "vader":
        return job
    if kind == "finished":
        job["encoder"] = str(assets.model_dir(world.reward_model))
        job["trust_remote_code"] = world.reward_model in world.trust_remote_code
        return job
    openings, labels = _training_texts(world, name, labelled)
    job.update(seed=0, texts=openings, labels=labels)
    if kind == "classifier":
        job["encoder"] = str(assets.model_dir(_setting(world, name)))
        job["precision"] = world.precision
        job["max_tokens"] = _encoder_tokens(world)
        job["lean"] = world.spoiled  # what was trained before was trained without
    return job


def _training_texts(world: config.World, name: str, labelled: dict) -> tuple[list, list]:
    """Return the texts and labels that a judge is trained on; raise ConfigError without any."""
    part = TRAINED_ON[name]
    openings, labels = labelled.get(part, ([], []))
    if not openings:
        raise config.ConfigError(
            f"world.{part}_rows is 0: there is nothing to train the {name} reward on"
        )
    if name == "person":
        labels = [1] * len(openings)
    elif name == "words" or not world.spoiled:
        return openings, labels
    return spoiled.with_spoiled(openings, labels, SPOIL_SEEDS[part])


def _held_out(world: config.World, name: str, labelled: dict) -> tuple:
    """Return what a judge is measured on, as the arguments of fit_reward.held_out_facts."""
    openings, labels = labelled["held_out"]
    seed = SPOIL_SEEDS["held_out"]
    if name == "person":
        return spoiled.with_spoiled(openings, [1] * len(openings), seed)
    if world.spoiled:
        return openings, labels, spoiled.spoil(openings, seed)
    return openings, labels


def judges(world: config.World) -> tuple[str, ...]:
    """Return the names of all judges of a world, without those that it has no labels for."""
    return tuple(_with_labels(world, _all_judges(world)))


def _all_judges(world: config.World) -> tuple[str, ...]:
    """Return the names of all judges of a world, whether it has labels for them or not."""
    return MORE_JUDGES if world.spoiled else JUDGES


def _with_labels(world: config.World, names: Sequence[str]) -> list[str]:
    """Return the names of judges without those that need labels of half A, if there are none."""
    if world.gold_rows:
        return list(names)
    return [name for name in names if TRAINED_ON.get(name) != "gold"]


def oracle(world: config.World) -> str:
    """Return the reward that makes the pairs: "gold", or "reward" where no labels train a gold one.

    "reward" is the reward model.
    """
    return "gold" if world.gold_rows else "reward"


# --- responses and their scores


@dataclass(frozen=True)
class Weights:
    """The weights that responses are sampled from: θ₁ + α(θ₁ − θ₀), arXiv 2404.16792.

    Without `aligned` they are those of the model `sft` itself.
    """

    sft: Artifact  # θ₀
    aligned: Artifact | None = None  # θ₁
    alpha: float = 0.0
    modules: dict[str, float] = field(default_factory=dict)  # tensor patterns with their own α
    part: str = ""  # of the training of `aligned`, after which it is taken; "": its end

    def inputs(self) -> dict:
        """Return what a stage's inputs say of these weights."""
        inputs = {"sft": self.sft, "aligned": self.aligned, "alpha": self.alpha}
        if self.modules:
            inputs["modules"] = self.modules
        if self.part:
            inputs["part"] = self.part
        return inputs

    def folders(self) -> dict:
        """Return the arguments of Engine.swap; models that are missing are computed first."""
        sft_folder = str(self.sft.get())
        aligned_folder = None
        if self.aligned:
            aligned_folder = str(self.aligned.get() / self.part)
        return {
            "sft": sft_folder,
            "aligned": aligned_folder,
            "alpha": self.alpha,
            "modules": self.modules,
        }


def sft_weights(world: config.World, start: Artifact, aligned: Artifact) -> Weights:
    """Return the weights of the SFT model, as a point that aligned models are compared with.

    aligned: any model that was aligned from `start`; only in the key where world.sft_at_alpha.
    """
    if world.sft_at_alpha:
        return Weights(start, aligned, alpha=-1.0)
    return Weights(start)


def responses(
    cfg,
    weights: Weights,
    split: str,
    *,
    prompts: Artifact | None = None,
    samples: int,
    seed: int,
    engine: str = "generate",
) -> Artifact:
    """Sample responses to the prompts of `split`: responses.jsonl.

    prompts: other ones than the world's own. engine: name of the living engine that samples;
    whoever samples in two ways by turns keeps two.
    """
    prompts = prompts or texts(cfg.world)
    inputs = weights.inputs()
    inputs.update(prompts=prompts, split=split, samples=samples, seed=seed)
    inputs["decoding"] = cfg.decoding.recipe()

    def make(out: Path) -> dict:
        swap = weights.folders()
        generate = {
            "prompts": str(prompts.get() / f"{split}.json"),
            "out": str(out / "responses.jsonl"),
            "samples": samples,
            "seed": seed,
        }
        return _sample(cfg, engine, swap, generate, out)

    does = f"over every α: {sampling_in_words(cfg.decoding)}"
    return Artifact("responses", version=2, inputs=inputs, make=make, does=does)


def sampling_in_words(decoding: config.Decoding) -> str:
    """Return which engines sample, and the command that starts them."""
    if not decoding.launcher:
        engines = "one" if decoding.engines == 1 else str(decoding.engines)
        number = "engine" if decoding.engines == 1 else "engines"
        command = "python -m beyond_dpo.jobs.generate --serve"
        return f"{engines} {decoding.backend} {number}: {command}"
    command = launch.command(
        "beyond_dpo.machine.spread",
        Path("{job}"),
        launcher=decoding.launcher,
        processes=decoding.engines,
    )
    engines = f"{decoding.engines} {decoding.backend} engines"
    return f"shards of {decoding.shard} prompts on {engines}: {' '.join(command)}"


def _sample(cfg, engine: str, swap: dict, generate: dict, out: Path) -> dict:
    """Let an engine swap its weights and generate, with the arguments of both; return the facts."""
    settings = {
        "model": _start_model(engine, swap["sft"]),
        "decoding": asdict(cfg.decoding),
    }
    workers.make_room(cfg, "score", engine)
    answers = spread.call(
        cfg,
        engine,
        "beyond_dpo.jobs.generate.Engine",
        settings,
        [("swap", swap), ("generate", generate)],
        out,
        f"responses at α {swap['alpha']:g}",
    )
    facts = dict(spread.finish(cfg, generate, answers))
    if answers:  # of swap and of generate
        facts["probe"] = answers[0]
    return facts


def _start_model(engine: str, folder: str) -> str:
    """Return the model to name as the one that an engine starts with.

    Where the living engine can take the weights of `folder`, it is the model that this one started
    with. So the worker's settings stay equal, and workers.get does not restart it. Engine.swap then
    checks each tensor.
    """
    living = workers.living.get(engine)
    if living is None:
        return folder
    present = living.settings["model"]
    if _identity(present) == _identity(folder):
        return present  # no restart
    return folder


def _identity(folder: str) -> list:
    """Return what an engine keeps of the model that it starts with, whatever weights it takes.

    That is the model's structure, its vocabulary, and where its responses end, as its files say it.
    """
    structure = []
    for name in ("config.json", "generation_config.json"):
        settings = _json_if_there(Path(folder, name))
        kept = {key: value for key, value in settings.items() if key not in ORIGIN_SETTINGS}
        structure.append(kept)
    vocabulary = Path(folder, "tokenizer.json")
    digest = artifacts.sha256(vocabulary) if vocabulary.exists() else None
    return [*structure, digest, *_end_of_turn(Path(folder))]


def _end_of_turn(folder: Path) -> tuple:
    """Return a tokenizer's end token and chat template, which say where responses end."""
    settings = _json_if_there(folder / "tokenizer_config.json")
    end_token = settings.get("eos_token")
    if end_token is None:
        end_token = _json_if_there(folder / "special_tokens_map.json").get("eos_token")
    if isinstance(end_token, dict):
        end_token = end_token["content"]
    template = folder / "chat_template.jinja"
    if template.exists():
        return end_token, template.read_text(encoding="utf-8")
    return end_token, settings.get("chat_template")


def _json_if_there(file: Path) -> dict:
    """Return the content of a JSON file; {} where there is none."""
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def scores(
    cfg,
    sampled: Artifact,
    split: str,
    *,
    judges: Sequence[str] = (),
    kl_prompts: int = 0,
    prompts: Artifact | None = None,
) -> Artifact:
    """Score responses with the named judges, each a reward (see reward()): scores.jsonl.

    Beside each judge's reward it has length, whether it ended, repetition, and the log-probability
    (nats) under the weights that sampled and, for the first `kl_prompts` prompts, under the SFT
    model. judges: by default all of the world's, as judges() names them. Those are left out that
    need labels where the world has none.
    """
    world = cfg.world
    start = sft(cfg)
    prompts = prompts or texts(world)
    names = _with_labels(world, judges or _all_judges(world))
    trained = {name: reward(world, name) for name in names if name != "vader"}

    def make(out: Path) -> dict:
        folders = {name: str(artifact.get()) for name, artifact in trained.items()}
        call = {
            "rewards": {name: _judge(world, name, folders) for name in names},
            "prompts": str(prompts.get() / f"{split}.json"),
            "responses": str(sampled.get() / "responses.jsonl"),
            "out": str(out / "scores.jsonl"),
            "reference_prompts": kl_prompts,
            "shard": cfg.decoding.shard,
        }
        settings = {"target": str(start.get()), "precision": world.precision}
        return _score(cfg, settings, call, out)

    inputs = {
        "responses": sampled,
        "judges": names,
        "trained": trained,
        "kl_prompts": kl_prompts,
    }
    if "reward" in names and not world.reward_rows:
        # a finished reward model reads turns by its own template
        inputs.update(corpus.rendering(world.reward_model, "chat"))
    inputs.update(_precision(world))
    does = "its responses judged: python -m beyond_dpo.jobs.score --serve"
    return Artifact("scores", version=2, inputs=inputs, make=make, does=does)


def _judge(world: config.World, name: str, folders: dict[str, str]) -> dict:
    """Return the kind and the arguments of a judge, as Scorer.score takes them."""
    kind = _reward_kind(world, name)
    if kind == "vader":
        return {"kind": kind}
    if kind != "finished":
        return {"kind": kind, "folder": folders[name]}
    return {
        "kind": kind,
        "folder": str(assets.model_dir(world.reward_model)),
        "trust_remote_code": world.reward_model in world.trust_remote_code,
    }


def _score(cfg, settings: dict, call: dict, out: Path) -> dict:
    """Let living processes, or a job, score responses; return the facts."""
    answers = spread.call(
        cfg,
        "score",
        "beyond_dpo.jobs.score.Scorer",
        settings,
        [("score", call)],
        out,
        "scores",
    )
    if answers and answers[0]:
        return answers[0]
    # Several processes have scored their shards, and none tells anything. One of them is called
    # for all shards now: it finds each of them scored, and puts them together.
    scorer = workers.get("score", "beyond_dpo.jobs.score", settings)
    return scorer.call("score", **call)


# --- preference pairs


def require_samples(world: config.World) -> None:
    """Raise ConfigError for a single response to a prompt, where no preference can be had."""
    if world.samples < 2:
        advice = "a preference needs two responses to a prompt, set it to 2 or more"
        raise config.ConfigError(f"world.samples={world.samples}: {advice}")


def pairs(cfg, seed: int = 0) -> Artifact:
    """Pair the best with the worst of each prompt's samples from the SFT model: pairs.jsonl.

    seed: of the training that learns from them, which says whose pool of prompts it is.
    The oracle() says which is best. A data set's own pairs are taken where the world has them.
    Raises ConfigError for a single sample; its get() does where every prompt's samples score alike.
    """
    world = cfg.world
    if world.pairs == "given":
        return texts(world)
    require_samples(world)
    judge = oracle(world)
    split = corpus.pool(world, seed)
    sampling = _of_pairs(cfg)
    pool = responses(sampling, Weights(sft(cfg)), split, samples=world.samples, seed=1)
    judged = scores(sampling, pool, split, judges=(judge,))

    def make(out: Path) -> dict:
        prompts = texts(world).json(f"{split}.json")
        rewards = gather.read_lines(judged, "scores.jsonl")
        sampled = gather.read_lines(pool, "responses.jsonl")
        table = rewards.merge(sampled[["id", "sample", "response_ids"]], on=["id", "sample"])
        rows, gaps = _best_against_worst(table, judge, prompts)
        if not rows:
            raise config.ConfigError(_no_pairs(world, len(prompts)))
        write_rows(out / "pairs.jsonl", rows)
        return {
            "pairs": len(rows),
            "ties_dropped": len(prompts) - len(rows),
            # by the oracle(), also where that is not the gold reward
            "mean_gold_gap": round(sum(gaps) / len(gaps), 3),
        }

    return Artifact("pairs", version=1, inputs={"scores": judged}, make=make)


def _of_pairs(cfg):
    """Return the configuration with which the responses are sampled that pairs are made of."""
    sampling = getattr(cfg, "sampling", None)
    return replace(cfg, decoding=sampling) if sampling else cfg


def _best_against_worst(
    table: pd.DataFrame, judge: str, prompts: list[dict]
) -> tuple[list[dict], list[float]]:
    """Return the pair of every prompt that has a preference, and the gap between its rewards."""
    prompt_ids = {prompt["id"]: prompt["prompt_ids"] for prompt in prompts}
    rows = []
    gaps = []
    for name, samples in table.groupby("id", sort=False):
        best = samples.loc[samples[judge].idxmax()]
        worst = samples.loc[samples[judge].idxmin()]
        chosen = best["response_ids"]
        rejected = worst["response_ids"]
        # a prompt whose samples all score alike, or are alike, has no preference
        if best[judge] > worst[judge] and chosen != rejected:
            pair = {"chosen": chosen, "rejected": rejected}
            rows.append({"id": name, "prompt_ids": prompt_ids[name], "responses": pair})
            gaps.append(float(best[judge] - worst[judge]))
    return rows, gaps


def _no_pairs(world: config.World, prompts: int) -> str:
    """Say that no prompt has a preference, and what to do."""
    judge = "gold reward"
    if oracle(world) == "reward":
        judge = f"reward model {world.reward_model}"
    return (
        f"the {judge} scores all {world.samples} responses to each of {prompts} prompts alike, "
        "which leaves no pair to train on: use another reward model, more world.samples, or a "
        "higher decoding.temperature"
    )


def subset(cfg, fraction: float, seed: int, longest: bool = False) -> Artifact:
    """Draw a fraction of the pairs: pairs.jsonl.

    longest: not at random, but those whose chosen response is longest against the rejected one.
    Its get() raises ConfigError where there is no pair.
    """
    rows = pairs(cfg, seed)
    inputs = {"pairs": rows, "fraction": fraction, "seed": seed}
    if longest:
        inputs["longest"] = True

    def make(out: Path) -> dict:
        every_pair = read_rows(rows.get() / "pairs.jsonl")
        if not every_pair:
            advice = "use more prompts, or another data set"
            raise config.ConfigError(f"{rows.key} holds no pair to draw from: {advice}")
        order = epoch_order(len(every_pair), seed, epoch=DRAW)
        if longest:
            order.sort(key=lambda i: _extra_tokens(every_pair[i]), reverse=True)
        size = max(1, round(fraction * len(every_pair)))
        drawn = [every_pair[i] for i in sorted(order[:size])]
        write_rows(out / "pairs.jsonl", drawn)
        extra = sum(_extra_tokens(pair) for pair in drawn)
        return {"pairs": size, "mean_extra_tokens": round(extra / size, 2)}

    return Artifact("subset", version=1, inputs=inputs, make=make)


def _extra_tokens(pair: dict) -> int:
    """Return how many tokens the chosen response has more than the rejected one."""
    return len(pair["responses"]["chosen"]) - len(pair["responses"]["rejected"])


# --- training


def reference(
    cfg,
    start: Artifact | None = None,
    rows: Artifact | None = None,
    names: Sequence[str] = PAIR,
) -> Artifact:
    """Pass the SFT model once over all pairs; β, loss and seed of the training are not in its key.

    start: another model. rows: other rows than the pairs, with responses of these names.
    """
    start = start or sft(cfg)
    rows = rows or pairs(cfg)
    settings = cfg.train
    limits = {"max_prompt": settings.max_prompt, "max_length": settings.max_length}
    inputs = {"sft": start, "pairs": rows, "precision": settings.precision, **limits}
    if tuple(names) != PAIR:
        inputs["names"] = names

    def make(out: Path) -> None:
        workers.make_room(cfg, "jobs")
        job = {
            "model": str(start.get()),
            "rows": str(rows.get() / "pairs.jsonl"),
            "names": names,
            "limits": limits,
            "precision": settings.precision,
            # four times the rows of a training step: there are no gradients to keep
            "micro_batch": 4 * settings.micro_batch,
            "out": str(out / "reference.safetensors"),
        }
        workers.run("beyond_dpo.jobs.reference", job, out, "reference")

    does = "reference: python -m beyond_dpo.jobs.reference {job}"
    return Artifact("reference", version=2, inputs=inputs, make=make, does=does)


def reference_values(reference_pass: Artifact, name: str):
    """Return "logps" (nats), "tokens" or "entropies" of a reference pass.

    They are float64, (responses, rows).
    """
    from safetensors.numpy import load_file

    tensors = load_file(reference_pass.get() / "reference.safetensors")
    return tensors[name].T.astype(float)


def changed(train: config.Train, **changes) -> config.Train:
    """Return how one model is trained otherwise than `train` says, as epochs=2.

    Raises ConfigError for REFERENCE_SETTINGS: its reference pass would not have them.
    """
    for name in REFERENCE_SETTINGS:
        if name in changes:
            raise config.ConfigError(
                f"{name} of one training would not be its reference pass's: set train.{name}"
            )
    return replace(train, **changes)


def aligned(
    cfg,
    fraction: float,
    seed: int = 0,
    *,
    start: Artifact | None = None,
    longest: bool = False,
    **changes,
) -> Artifact:
    """Align the SFT model on a fraction of the pairs, which takes that fraction of the steps.

    start: another model to align, then against its own reference pass. longest: as in subset().
    changes: of cfg.train, as changed() takes them.
    """
    settings = changed(cfg.train, **changes)
    base = start or sft(cfg)
    desc = f"{settings.loss.upper()} {fraction:.0%} seed {seed}"
    for name, value in changes.items():
        if name == "loss":
            continue  # it stands in front
        desc += f", {value}" if isinstance(value, str) else f", {name} {value:g}"
    if longest:
        desc += ", the longest chosen"
    return training(
        cfg,
        settings,
        subset(cfg, fraction, seed, longest),
        "pairs.jsonl",
        PAIR,
        base=base,
        reference_pass=reference(cfg, base, pairs(cfg, seed)),
        seed=seed,
        desc=desc,
    )


def training(
    cfg,
    settings: config.Train,
    rows: Artifact,
    file: str,
    names: Sequence[str],
    *,
    base: Artifact | None = None,
    reference_pass: Artifact | None = None,
    seed: int,
    desc: str,
) -> Artifact:
    """Train `base`, or without it (for SFT) the target, on rows of `file` with responses `names`.

    reference_pass: that of reference(), for a loss that compares with the reference model.
    """
    inputs = {
        "model": base or assets.resolve(cfg.world.target),
        "rows": rows,
        "names": names,
        "reference": reference_pass,
        "settings": settings.recipe(),
        "seed": seed,
    }

    def make(out: Path) -> dict:
        if settings.launcher == "plain":
            workers.make_room(cfg, "jobs")
        else:
            workers.make_room(cfg)
        start = base.get() if base else assets.model_dir(cfg.world.target)
        job = {
            "model": str(start),
            "rows": str(rows.get() / file),
            "names": names,
            "reference": None,
            "limits": {"max_prompt": settings.max_prompt, "max_length": settings.max_length},
            "settings": asdict(settings),
            "seed": seed,
            "out": str(out),
        }
        if reference_pass:
            job["reference"] = str(reference_pass.get() / "reference.safetensors")
        return _train(settings, job, out, desc)

    does = _training_in_words(settings, desc)
    return Artifact("train", version=2, inputs=inputs, make=make, does=does)


def _train(settings: config.Train, job: dict, out: Path, desc: str) -> dict:
    """Run a training; return its facts with the first and the last line of its log."""
    checkpoints = out / "checkpoints"
    finished = checkpoints / "finished"
    finished.unlink(missing_ok=True)  # of an attempt that was killed after it
    workers.run(
        "beyond_dpo.jobs.train",
        job,
        out,
        desc,
        launcher=settings.launcher,
        processes=settings.processes,
    )
    # the deepspeed launcher ends with 0 when a signal ended its processes
    if not finished.exists():
        # where the job's logs are, too
        raise launch.JobFailed(f"{desc}: ended without a model; see the logs in {checkpoints}")
    facts = json.loads((out / "facts.json").read_text(encoding="utf-8"))
    steps = json_lines(out / "log.jsonl")
    return {**facts, "first": steps[0], "last": steps[-1]}


def _training_in_words(settings: config.Train, desc: str) -> str:
    """Return what a training does, and the command that would run it."""
    accumulation = config.check_batch(settings)
    batch = (
        f"{settings.global_batch} = {settings.processes} × {settings.micro_batch} × {accumulation}"
    )
    details = (
        f"{settings.epochs} × lr {settings.lr:g}, {settings.optimizer}, β {settings.beta:g}, "
        f"batch {batch}, ZeRO-{settings.zero}"
    )
    command = launch.command(
        "beyond_dpo.jobs.train",
        Path("{job}"),
        launcher=settings.launcher,
        processes=settings.processes,
    )
    return f"{desc} ({details}): {' '.join(command)}"


def json_lines(file: Path) -> list[dict]:
    """Return the objects of a file that has one a line."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
