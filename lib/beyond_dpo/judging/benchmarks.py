"""Put models to AlpacaEval 2.0, Arena-Hard and MT-Bench: sample their answers and score them.

`ask` holds the questions and the requests to a judge, `judge` the scores of what it says.
"""

import itertools
import logging
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from beyond_dpo import templates
from beyond_dpo.judging import ask, judge
from beyond_dpo.pipeline import assets, config, corpus, gather, needs, stages
from beyond_dpo.pipeline.artifacts import Artifact
from beyond_dpo.pipeline.endpoint import Endpoint

log = logging.getLogger("beyond_dpo")
SAMPLING_SEED = 2  # of responses that are judged, as in the papers' experiments
ROLES = ("user", "assistant")  # of a chat's turns, which alternate


class Question(NamedTuple):
    """Hold a question of a benchmark: its id there, and what is said in each of its turns."""

    id: str | int
    turns: Sequence[str]


class Score(NamedTuple):
    """Hold a score of a model, with a 95 % interval or a standard error where there is one."""

    benchmark: str
    score: float
    low: float | None = None
    high: float | None = None
    standard_error: float | None = None


class Benchmark(NamedTuple):
    """Say what a benchmark asks, how answers to it are judged, and what the verdicts come to.

    archives: assets that hold its questions (the first), prompts of the judge, and baselines.
    ask: of the module `ask`. scores: takes the judge's rows and our model's name in them.
    """

    archives: tuple[str, ...]
    turns: int
    questions: Callable[[], list[Question]]
    ask: Callable[..., Artifact]
    scores: Callable[[list[dict], str], list[Score]]


def benchmarked(
    cfg, models: dict[str, stages.Weights], names: Sequence[str] = ("alpaca_eval",)
) -> Artifact | None:
    """Let models answer the questions of benchmarks, and a judge say how well.

    benchmarks.csv: model, benchmark, score, low and high (95 % interval) or standard_error. The
    facts name the judgments by their keys. None without cfg.judge: then nobody is asked and nothing
    sampled.

    Args:
        models: the weights that answer, by the model's name.
        names: of BENCHMARKS.
    Raises:
        Its get() raises AssetError for an archive that cannot be had, before anything is sampled,
        ConfigError if no question of a benchmark leaves room for an answer, and EndpointError as
        the functions of `ask` do. What was sampled and judged before is kept.
    """
    if not cfg.judge:
        return None
    answers = {}  # the responses of each turn, by (model, benchmark)
    for (model, weights), name in itertools.product(models.items(), names):
        answers[model, name] = _answers(cfg, weights, name)
    judges = {name: _judge(cfg, name) for name in names}
    archives = _archives(names)

    def make(out: Path) -> dict:
        needs.check(cfg)
        assets.fetch_all(archives)
        _sample(answers)
        rows = []
        judgments = []
        for (model, name), turns in answers.items():
            judged = _judged(cfg, name, turns, judges[name], model)
            for score in BENCHMARKS[name].scores(ask.rows(judged), model):
                rows.append({"model": model, **score._asdict()})
            judgments.append({"model": model, "benchmark": name, "key": judged.key})
        pd.DataFrame(rows).round(4).to_csv(out / "benchmarks.csv", index=False)
        return {"judgments": judgments}

    inputs = {
        "answers": [[model, name, turns] for (model, name), turns in answers.items()],
        "judges": {name: endpoint.model for name, endpoint in judges.items()},
        "archives": [assets.resolve(archive) for archive in archives],
    }
    work = [f"{name} judged by {endpoint.model}" for name, endpoint in judges.items()]
    does = f"benchmarks of {len(models)} models: {', '.join(work)}"
    return Artifact("benchmarks", 1, inputs, make, does, hours=cfg.needs.hours)


def _archives(names: Sequence[str]) -> list[str]:
    """Return the assets that benchmarks read, each once."""
    archives = []
    for name in names:
        archives += BENCHMARKS[name].archives
    return list(dict.fromkeys(archives))


def _judge(cfg, name: str) -> Endpoint:
    """Return the judge of a benchmark: MT-Bench may have one of its own."""
    model = cfg.judge
    if name == "mt_bench" and cfg.mt_bench_judge:
        model = cfg.mt_bench_judge
    return Endpoint(model, cfg.judge_url)


# --- what models answer


def _answers(cfg, weights: stages.Weights, name: str) -> list[Artifact]:
    """Return the responses of each turn of a benchmark, one to each question.

    A later turn is asked with the answers to the earlier ones before it.
    """
    responses = []
    for _ in range(BENCHMARKS[name].turns):
        sampled = stages.responses(
            cfg,
            weights,
            name,
            prompts=_prompts(cfg, name, tuple(responses)),
            samples=1,
            seed=SAMPLING_SEED,
        )
        responses.append(sampled)
    return responses


def _prompts(cfg, name: str, earlier: Sequence[Artifact]) -> Artifact:
    """Write the prompts of a benchmark's next turn in the target's tokens: <name>.json.

    earlier: the responses of the turns before, which each prompt holds. The id of a prompt is the
    place of its question. A prompt that leaves no room for an answer is left out, and counted.
    """
    world = cfg.world
    room = cfg.decoding.max_model_len - cfg.decoding.max_tokens
    recipe = {
        "benchmark": name,
        "questions": assets.resolve(BENCHMARKS[name].archives[0]),
        "earlier": earlier,
        "tokenizer": assets.resolve(world.target),
        "template": world.template,
        "room": room,
        **corpus.rendering(world.target, world.template),
    }

    def make(out: Path) -> dict:
        tokenizer = templates.load_tokenizer(assets.tokenizer_dir(world.target))
        questions = BENCHMARKS[name].questions()
        chats = _chats(questions, [first_texts(cfg, responses) for responses in earlier])
        rows = []
        for prompt_id, turns in chats.items():
            prompt_ids = _rendered(tokenizer, turns, world.template)
            if len(prompt_ids) <= room:
                rows.append({"id": prompt_id, "prompt_ids": prompt_ids})
        if not rows:
            raise config.ConfigError(
                f"no question of {name} leaves room for decoding.max_tokens="
                f"{cfg.decoding.max_tokens} in decoding.max_model_len={cfg.decoding.max_model_len}"
            )
        too_long = len(questions) - len(rows)
        if too_long:
            log.warning("%d questions of %s are too long: they have no answer", too_long, name)
        gather.write_json(out / f"{name}.json", rows)
        return {"too_long": too_long}

    return Artifact("benchmark-prompts", 1, recipe, make)


def _chats(questions: list[Question], earlier: list[dict[str, str]]) -> dict[str, list[str]]:
    """Return the turns of each chat, by prompt id: questions and our answers, a question at last.

    earlier: {prompt id: answer} of each turn before. A question without an answer there has no
    chat.
    """
    chats = {}
    for place, question in enumerate(questions):
        prompt_id = str(place)
        if not all(prompt_id in answers for answers in earlier):
            continue
        turns = []
        for text, answers in zip(question.turns, earlier, strict=False):
            turns += [text, answers[prompt_id]]
        turns.append(question.turns[len(earlier)])
        chats[prompt_id] = turns
    return chats


def _rendered(tokenizer, turns: list[str], template: str) -> list[int]:
    """Return the token ids of a chat's turns; without a chat template they are paragraphs."""
    if template == "plain":
        return templates.render(tokenizer, "\n\n".join(turns), template)
    chat = []
    for role, text in zip(itertools.cycle(ROLES), turns, strict=False):
        chat.append({"role": role, "content": text})
    return templates.render(tokenizer, chat, template)


def _sample(answers: dict[tuple[str, str], list[Artifact]]) -> None:
    """Sample all answers that are missing, after all trainings that they need."""
    responses = list(itertools.chain(*answers.values()))
    gather.train(responses)
    for sampled in gather.watched(responses, "answers to benchmarks"):
        sampled.get()


def first_texts(cfg, responses: Artifact) -> dict[str, str]:
    """Return {prompt id: the first response to it}, as the target's tokenizer decodes it."""
    tokenizer = templates.load_tokenizer(assets.tokenizer_dir(cfg.world.target))
    texts = {}
    for row in stages.json_lines(responses.get() / "responses.jsonl"):
        text = tokenizer.decode(row["response_ids"], skip_special_tokens=True)
        texts.setdefault(row["id"], text)
    return texts


# --- what the judge says


def _judged(cfg, name: str, turns: list[Artifact], endpoint: Endpoint, model: str) -> Artifact:
    """Return the judge's rows about a model's answers; a question without one has an empty one."""
    texts = [first_texts(cfg, responses) for responses in turns]
    outputs = {}
    for place, question in enumerate(BENCHMARKS[name].questions()):
        replies = [answers.get(str(place), "") for answers in texts]
        outputs[question.id] = replies if len(replies) > 1 else replies[0]
    return BENCHMARKS[name].ask(outputs, endpoint, model=model)


def alpaca_scores(rows: list[dict]) -> tuple[judge.WinRate, judge.LengthControlled]:
    """Return AlpacaEval's win rate, plain and length-controlled, of the rows of ask.alpaca_eval."""
    win_rate = judge.win_rate(row["preference"] for row in rows)
    return win_rate, judge.length_controlled(rows)


def _alpaca_table(rows: list[dict], model: str) -> list[Score]:
    plain, controlled = alpaca_scores(rows)
    return [
        Score("AlpacaEval 2 LC (%)", controlled.percent, controlled.low, controlled.high),
        Score("AlpacaEval 2 WR (%)", plain.percent, standard_error=plain.standard_error),
    ]


def _arena_table(rows: list[dict], model: str) -> list[Score]:
    """Return Arena-Hard's win rate in each category, which has a baseline of its own."""
    by_category = defaultdict(list)
    for row in rows:
        by_category[row["category"]].append(row)
    scores = []
    for category, games in by_category.items():
        (baseline,) = {games[0]["model_a"], games[0]["model_b"]} - {model}
        (rate,) = judge.arena_hard(games, baseline).to_dict("records")
        label = f"Arena-Hard 2.0 WR (%), {category.replace('_', ' ')}"
        scores.append(Score(label, rate["percent"], rate["low"], rate["high"]))
    return scores


def _mt_table(rows: list[dict], model: str) -> list[Score]:
    ratings = judge.mt_bench(rows)
    return [
        Score("MT-Bench, first turn", ratings.first),
        Score("MT-Bench, second turn", ratings.second),
        Score("MT-Bench", ratings.overall),
    ]


# --- the benchmarks


def _alpaca_questions() -> list[Question]:
    instructions = [row["instruction"] for row in ask.alpaca_questions()]
    return [Question(instruction, [instruction]) for instruction in instructions]


def _arena_questions() -> list[Question]:
    return [Question(row["uid"], [row["prompt"]]) for row in ask.arena_questions()]


def _mt_questions() -> list[Question]:
    return [Question(row["question_id"], row["turns"]) for row in ask.mt_questions()]


BENCHMARKS = {
    "alpaca_eval": Benchmark(
        archives=("llm_eval", "alpaca_eval"),
        turns=1,
        questions=_alpaca_questions,
        ask=ask.alpaca_eval,
        scores=_alpaca_table,
    ),
    "arena_hard": Benchmark(
        archives=("llm_eval",),
        turns=1,
        questions=_arena_questions,
        ask=ask.arena_hard,
        scores=_arena_table,
    ),
    "mt_bench": Benchmark(
        archives=("mt_bench",),
        turns=2,
        questions=_mt_questions,
        ask=ask.mt_bench,
        scores=_mt_table,
    ),
}
