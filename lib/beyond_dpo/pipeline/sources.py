"""Collect responses of other models and of people, in the target's tokens, for WRPO to learn from.

WRPO: arXiv 2412.03187. A source is one entry of a profile (config.Source): a model by asset, folder
or hub id; an OpenAI-compatible endpoint; a file of recorded answers; or the reviewers themselves.
"""

import gzip
import json
import logging
import shutil
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from beyond_dpo import templates
from beyond_dpo.pipeline import (
    assets,
    config,
    corpus,
    endpoint,
    expo,
    openings,
    preferences,
    stages,
)
from beyond_dpo.pipeline.artifacts import Artifact

log = logging.getLogger("beyond_dpo")
SEED = 1  # of the responses that are learnt from
OWN_SEED = 3  # of the target's as a source, which are others than those that it is paired with
EXPO_SEED = 0  # of the training that an "expo" source is
POSITIVE = 1  # label of a review


class Answer(NamedTuple):
    """Hold a response as text, and whether it ended by itself and was not cut."""

    text: str
    ended: bool


Answers = dict[str, list[Answer]]  # by a prompt's id, or by its text


class Asked(NamedTuple):
    """Hold the prompts that are put to models: the split of a result."""

    prompts: Artifact
    split: str

    def rows(self) -> list[dict]:
        """Return the prompts."""
        return self.prompts.json(f"{self.split}.json")


class Sampled(NamedTuple):
    """Hold the prompts that a source's model is given, and its responses to them."""

    prompts: Artifact
    responses: Artifact


def shown(cfg) -> pd.DataFrame:
    """Return what a user should know of the sources before they are used.

    That is each source's name, kind, model or file, what it is asked, and its terms.
    """
    rows = []
    for name in cfg.sources:
        settings = asdict(cfg.known_sources[name])
        rows.append({"source": name, **settings})
    return pd.DataFrame(rows)[["source", "kind", "ref", "ask", "terms"]]


def sampling(cfg):
    """Return the configuration by which training data is sampled, from sources and target alike."""
    return replace(cfg, decoding=cfg.sampling)


def answers(cfg, name: str, asked: Asked | None = None) -> Artifact:
    """Collect a source's responses to prompts, in the target's tokens; asked: None is all of them.

    They are in responses.jsonl, with lines as of stages.responses, and are cut after
    cfg.sampling.max_tokens. Those without a word are left out. So are those that the target's chat
    template does not take (templates.encode_response), which are counted as `refused`, and those
    that an endpoint still lacks when it was asked again, which are counted as `short`.
    Raises ConfigError for a source without any answer or with an `ask` that asks the same of all
    prompts, and what the engine or the endpoint raises.
    """
    source = cfg.known_sources[name]
    check(name, source)
    asked = asked or every_prompt(cfg)
    if source.kind == "target":
        return own(cfg, stages.Weights(stages.sft(cfg)), asked, source.samples, seed=OWN_SEED)
    if source.kind == "expo":
        return _pushed_on(cfg, source, asked)
    sampled = _sample(cfg, source, asked) if source.kind == "model" else None
    inputs = _inputs(cfg, source, asked, sampled)

    def make(out: Path) -> dict:
        rows = asked.rows()
        by_id, short = _collect(cfg, source, sampled, rows, out)
        lines, refused = _encoded(cfg, rows, by_id)
        if not lines:
            raise config.ConfigError(f"source {name} answers none of the {len(rows)} prompts")
        with open(out / "responses.jsonl", "w", encoding="utf-8") as file:
            for line in lines:
                file.write(json.dumps(line) + "\n")
        return _facts(rows, lines, refused, short)

    does = _in_words(cfg, name)
    return Artifact("answers", version=1, inputs=inputs, make=make, does=does)


def every_prompt(cfg) -> Asked:
    """Return the prompts of the world's first pool."""
    return Asked(stages.texts(cfg.world), "prompts")


def own(cfg, weights: stages.Weights, asked: Asked, samples: int = 0, seed: int = SEED) -> Artifact:
    """Sample responses as training data are sampled; samples: 0 is world.samples."""
    return stages.responses(
        sampling(cfg),
        weights,
        asked.split,
        prompts=asked.prompts,
        samples=samples or cfg.world.samples,
        seed=seed,
        engine="sample",
    )


def _pushed_on(cfg, source: config.Source, asked: Asked) -> Artifact:
    """Sample the model that ExPO pushes on (arXiv 2404.16792): responses.jsonl.

    It is DPO on all pairs as notebook 11 trains it, at the largest α of its grid that passes the
    gate. The facts say which α that is.
    """
    teacher = config.load("expo", cfg.profile, seeds=[EXPO_SEED])
    teacher = replace(teacher, world=cfg.world, sft=cfg.sft)
    most = teacher.fractions[-1]
    aligned = stages.aligned(teacher, most, EXPO_SEED)
    chosen = expo.largest_passing(teacher, most, EXPO_SEED)
    samples = source.samples or cfg.world.samples

    def make(out: Path) -> dict:
        alpha = chosen.json("alpha.json")["alpha"]
        weights = stages.Weights(stages.sft(cfg), aligned, alpha)
        said = own(cfg, weights, asked, samples)
        shutil.copyfile(said.get() / "responses.jsonl", out / "responses.jsonl")
        return {"alpha": alpha, "key": said.key}

    inputs = {
        "aligned": aligned,
        "alpha": chosen,
        "prompts": asked.prompts,
        "split": asked.split,
        "samples": samples,
        "seed": SEED,
        "sampling": cfg.sampling.recipe(),
    }
    does = f"source: DPO on all pairs, pushed on by ExPO: {stages.sampling_in_words(cfg.sampling)}"
    return Artifact("pushed-on", version=1, inputs=inputs, make=make, does=does)


def _inputs(cfg, source: config.Source, asked: Asked, sampled: Sampled | None) -> dict:
    """Return what decides a source's answers, for its key."""
    inputs = {
        "kind": source.kind,
        "texts": asked.prompts,
        "max_tokens": cfg.sampling.max_tokens,
    }
    if asked.split != "prompts":
        inputs["split"] = asked.split
    if cfg.world.target not in assets.BUILDERS:  # to those a text alone is the same tokens
        inputs["tokens"] = 2  # of responses: those that they have after other text
    if source.only:
        inputs["only"] = source.only
    if sampled is not None:
        inputs["said"] = sampled.responses
    elif source.kind == "recorded":
        inputs["file"] = assets.resolve(source.ref)
    elif source.kind == "endpoint":
        inputs["model"] = source.ref
        inputs["ask"] = source.ask
        inputs["samples"] = source.samples or cfg.world.samples
        inputs["sampling"] = cfg.sampling.recipe()
    return inputs


def _in_words(cfg, name: str) -> str:
    """Return what a source is, and the command that samples it or would serve it."""
    source = cfg.known_sources[name]
    words = f"source {name}: {source.kind} {source.ref}".rstrip()
    if source.kind == "model":
        return f"{words}: {stages.sampling_in_words(cfg.sampling)}"
    if source.kind == "endpoint":
        where = source.url or "the client's default address"
        return f"{words} at {where}; to serve it there: vllm serve {source.ref}"
    return words


def _sample(cfg, source: config.Source, asked: Asked) -> Sampled:
    """Sample responses of a source that is a model of its own."""
    prompts = _put(cfg, source, asked)
    weights = stages.Weights(stages.model(source.ref))
    put = Asked(prompts, "prompts")
    return Sampled(prompts, own(cfg, weights, put, source.samples))


def _collect(
    cfg, source: config.Source, sampled: Sampled | None, rows: list[dict], out: Path
) -> tuple[Answers, int]:
    """Return a source's answers by the prompts' ids, and how many of those asked for lack."""
    if source.kind == "human":
        return _written(cfg, rows, source.only), 0
    if sampled is not None:
        prompts = sampled.prompts.json("prompts.json")
        model = assets.tokenizer_dir(source.ref)
        return _decoded(model, prompts, sampled.responses), 0

    tokenizer = templates.load_tokenizer(assets.tokenizer_dir(cfg.world.target))
    wording = {row["id"]: _wording(row, tokenizer) for row in rows}
    if source.kind == "recorded":
        by_text = _recorded(source)
        short = 0
    else:
        by_text, short = _replies(cfg, source, wording.values(), out)
    goes_on = cfg.world.template == "plain"
    by_id = {}
    for prompt_id, text in wording.items():
        by_id[prompt_id] = by_text.get(text, [])
        if goes_on:
            by_id[prompt_id] = [_continuation(text, answer) for answer in by_id[prompt_id]]
    return by_id, short


def _continuation(prompt: str, answer: Answer) -> Answer:
    """Return what an answer adds to a text that it was asked to go on with.

    The answer may begin with that text, or not.
    """
    text = answer.text.strip()
    if text.startswith(prompt):
        return Answer(text[len(prompt) :], answer.ended)
    return Answer(f" {text}", answer.ended)


def _facts(rows: list[dict], lines: list[dict], refused: int, short: int) -> dict:
    """Return what the manifest says of a source's answers; `refused` and `short` only if any."""
    answered = {line["id"] for line in lines}
    unanswered = [row for row in rows if row["id"] not in answered]
    facts = {"responses": len(lines), "unanswered": len(unanswered)}
    if refused:
        facts["refused"] = refused
    if short:
        facts["short"] = short
    return facts


def check(name: str, source: config.Source) -> None:
    """Raise ConfigError for a source that would be asked the same, whatever the prompt."""
    if source.ask and "{prompt}" not in source.ask:
        key = f"known_sources.{name}.ask"
        raise config.ConfigError(f"{key} has no {{prompt}} in it, got {source.ask!r}")


def asking(source: config.Source, text: str) -> str:
    """Return what a source is asked: `ask` with the prompt in it; other braces are text."""
    return source.ask.replace("{prompt}", text) if source.ask else text


def _encoded(cfg, rows: list[dict], by_id: Answers) -> tuple[list[dict], int]:
    """Return the lines of answers that say something, and how many were refused.

    Refused are those that the target's chat template does not take. A plain prompt may end within
    a word, so its response is what goes on after any text.
    """
    tokenizer = templates.load_tokenizer(assets.tokenizer_dir(cfg.world.target))
    template = cfg.world.template
    lines = []
    refused = 0
    for row in rows:
        prompt = row["text"] if template == "chat" else None
        responses = [answer for answer in by_id.get(row["id"], []) if answer.text.strip()]
        for sample, (text, ended) in enumerate(responses):
            try:
                ids = templates.encode_response(
                    tokenizer, text, end=ended, prompt=prompt, template=template
                )
            except templates.RowError:
                refused += 1
                continue
            line = {
                "id": row["id"],
                "sample": sample,
                "response_ids": ids[: cfg.sampling.max_tokens],
                "logp": None,
            }
            lines.append(line)
    return lines, refused


def _wording(row: dict, tokenizer) -> str:
    """Return a prompt's text: as the data set keeps it, or else decoded from its tokens.

    The tokens of a chat hold its template's words too.
    """
    prompt = row.get("text")
    if not prompt:
        prompt = tokenizer.decode(row["prompt_ids"], skip_special_tokens=True)
    return preferences.dialogue(prompt)


def _put(cfg, source: config.Source, asked: Asked) -> Artifact:
    """Put the prompts to a source's model, in its own tokens: prompts.json.

    A text to go on with stands again where the chat model's answer begins, so that it goes on right
    there.
    """
    is_plain = cfg.world.template == "plain"

    def make(out: Path) -> None:
        target_tokenizer = templates.load_tokenizer(assets.tokenizer_dir(cfg.world.target))
        source_tokenizer = templates.load_tokenizer(assets.tokenizer_dir(source.ref))
        rows = asked.rows()
        for row in rows:
            text = _wording(row, target_tokenizer)
            if source.ask:
                request = asking(source, text)
                begun = text if is_plain else ""
                ids = templates.render(source_tokenizer, request, "chat", begun=begun)
            else:
                ids = templates.render(source_tokenizer, text, "plain")
            row["prompt_ids"] = ids
        (out / "prompts.json").write_text(json.dumps(rows), encoding="utf-8")

    inputs = {
        "texts": asked.prompts,
        "tokenizer": assets.resolve(source.ref),
        "ask": source.ask,
        "plain": is_plain,
    }
    if asked.split != "prompts":
        inputs["split"] = asked.split
    if source.ask:
        inputs.update(corpus.rendering(source.ref, "chat"))
        if source.ref not in assets.BUILDERS:
            inputs["tokens"] = 2  # the text's own where the answer begins
    return Artifact("asked", version=1, inputs=inputs, make=make)


def _decoded(model: Path, prompts: list[dict], responses: Artifact) -> Answers:
    """Return the answers that a model sampled in its own tokens, by the prompts' ids."""
    tokenizer = templates.load_tokenizer(model)
    end_tokens = templates.end_tokens(tokenizer)
    prompt_ids = {row["id"]: row["prompt_ids"] for row in prompts}
    by_id = {name: [] for name in prompt_ids}
    file = responses.get() / "responses.jsonl"
    for line in file.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        name = row["id"]
        response_ids = row["response_ids"]
        # Decoded alone, a response may lose its first blank.
        whole_ids = prompt_ids[name] + response_ids
        before = tokenizer.decode(prompt_ids[name], skip_special_tokens=True)
        whole = tokenizer.decode(whole_ids, skip_special_tokens=True)
        ended = bool(response_ids) and response_ids[-1] in end_tokens
        answer = Answer(whole[len(before) :], ended)
        by_id[name].append(answer)
    return by_id


def _written(cfg, prompts: list[dict], only: str) -> Answers:
    """Return how the reviewers went on, by the prompts' ids.

    That is whole sentences that fit with an end token, or else the beginning of the first one.
    only: "positive" leaves out whoever did not like the film.
    """
    tokenizer = templates.load_tokenizer(assets.tokenizer_dir(cfg.world.target))
    _, reviews, _ = corpus.shuffled(cfg.world.dataset)
    is_chat = cfg.world.template == "chat"
    by_id = {}
    for row in prompts:
        number = int(row["id"][1:])
        review, label = reviews[number]
        if only and label != POSITIVE:
            continue
        begun = row["prompt_ids"]
        if is_chat:  # without the template's words
            begun = templates.render(tokenizer, row["text"], "plain")
        most = len(begun) + cfg.sampling.max_tokens
        ids = openings.opening(tokenizer, review, most)
        is_whole = len(ids) >= len(begun) + openings.SHORTEST
        if not is_whole:
            ids = templates.render(tokenizer, review, "plain")[:most]
        before = tokenizer.decode(begun, skip_special_tokens=True)
        text = tokenizer.decode(ids, skip_special_tokens=True)
        rest = text[len(before) :]
        if is_chat:
            rest = rest.strip()
        answer = Answer(rest, ended=is_whole)
        by_id[row["id"]] = [answer]
    return by_id


def _recorded(source: config.Source) -> Answers:
    """Read recorded answers, by the text of their prompt: a file of JSON lines, or a data set.

    A row holds "prompt" and "response" (several rows for several responses), or as WRPO's authors
    publish theirs (AALF/ultrafeedback_wrpo) a list "chosen", whose first is the best source's. Each
    is a text, or turns of a chat.
    """
    path = Path(source.ref).expanduser()
    if path.is_file():
        rows = _json_rows(path)
    else:
        import datasets

        repo, commit = assets.resolve(source.ref).values()
        rows = datasets.load_dataset(repo, revision=commit, split="train")
    by_text: Answers = {}
    count = 0
    try:
        for row in rows:
            response = row["response"] if "response" in row else _best(row["chosen"])
            prompt = _prompt_text(row["prompt"])
            answer = Answer(_text(response), ended=True)
            by_text.setdefault(prompt, []).append(answer)
            count += 1
    except (ValueError, LookupError, TypeError, EOFError, OSError, zlib.error) as error:
        expected = '{"prompt": text, "response": text} a line'
        problem = f"row {count} is not {expected}: {error!r}"
        raise config.ConfigError(f"{source.ref}: {problem}") from None
    return by_text


def _json_rows(path: Path) -> Iterator[dict]:
    """Yield the rows of a JSON file: an object a line or an array of them, UTF-8, maybe gzipped."""
    content = path.read_bytes()
    if content.startswith(b"\x1f\x8b"):
        content = gzip.decompress(content)
    text = content.decode("utf-8-sig")
    if text.lstrip().startswith("["):
        yield from json.loads(text)
        return
    for line in text.split("\n"):  # not splitlines(): U+2028 ends no line
        if line.strip():
            yield json.loads(line)


def _prompt_text(prompt: str | dict | list) -> str:
    """Return a recorded prompt as _wording() words it: one user's text, or a whole dialogue."""
    if isinstance(prompt, list) and len(prompt) > 1:
        return preferences.dialogue(prompt)
    return _text(prompt)


def _best(chosen: list) -> str | dict | list:
    """Return the best source's response of several; raise ValueError for a single response.

    Of a single one, as files of pairs have it, the first item would be a letter or a user's turn.
    """
    is_several = isinstance(chosen, list)
    if is_several and isinstance(chosen[0], dict):
        is_several = chosen[0]["role"] != "user"
    if not is_several:
        raise ValueError(f'"chosen" is not a list of responses: {chosen!r:.80}')
    return chosen[0]


def _text(turns: str | dict | list) -> str:
    """Return the last turn's text of a chat."""
    if isinstance(turns, str):
        return turns
    if isinstance(turns, dict):
        return _text(turns["content"])
    return _text(turns[-1])


def _replies(cfg, source: config.Source, texts: Iterable[str], out: Path) -> tuple[Answers, int]:
    """Ask an endpoint for every prompt; return its responses by prompt, and how many lack.

    Each reply is kept as it comes, so that nothing is asked for twice. Temperature, top-p and the
    number of tokens and samples are sent, no seed: an endpoint repeats nothing exactly. What it
    refuses to answer (HTTP 400) counts as unanswered. A server that ignores the number of samples,
    and returns fewer, is asked again for those that lack; what it does not answer then is counted,
    and warned of. Raises EndpointError where no reply holds a word; then none is kept.
    """
    samples = source.samples or cfg.world.samples
    server = endpoint.Endpoint(source.ref, source.url)
    folder = out / "checkpoints"
    by_text: Answers = {text: [] for text in texts}
    lacking = dict.fromkeys(by_text, samples)  # text -> how many responses it lacks
    for attempt in range(samples):  # each brings a response or more to every text that lacks any
        requests = {text: _request(cfg, source, text, count) for text, count in lacking.items()}
        name = f"replies-{attempt}.jsonl" if attempt else "replies.jsonl"
        replies, _ = endpoint.ask(server, requests, folder / name, _choices)
        lacking = _add_replies(by_text, replies, lacking, samples)
        if not lacking:
            break
    if any(by_text.values()) and not _holds_a_word(by_text):
        for file in folder.glob("replies*.jsonl"):
            file.unlink()
        raise endpoint.EndpointError(
            f"{source.ref}: no reply to {len(by_text)} prompts holds a word"
        )
    short = sum(samples - len(responses) for responses in by_text.values() if responses)
    if short:
        log.warning(
            "%s: %d responses fewer than asked for, also when asked again", source.ref, short
        )
    return by_text, short


def _add_replies(by_text: Answers, replies: dict, lacking: dict[str, int], samples: int) -> dict:
    """Add replies to the prompts' answers; return how many each answered prompt still lacks."""
    still_lacking = {}
    for text, choices in replies.items():
        responses = [Answer(*choice) for choice in choices]
        by_text[text] += responses[: lacking[text]]
        missing = samples - len(by_text[text])
        if responses and missing > 0:
            still_lacking[text] = missing
    return still_lacking


def _request(cfg, source: config.Source, text: str, samples: int) -> dict:
    """Return what an endpoint is sent for a prompt."""
    turn = {"role": "user", "content": asking(source, text)}
    return {
        "messages": [turn],
        "n": samples,
        "temperature": cfg.sampling.temperature,
        "top_p": cfg.sampling.top_p,
        "max_tokens": cfg.sampling.max_tokens,
    }


def _choices(reply) -> list[tuple[str, bool]]:
    """Return (text, whether it ended by itself) of an endpoint's choices, none of a refusal."""
    choices = []
    if reply:
        for choice in reply.choices:
            text = choice.message.content or ""
            choices.append((text, choice.finish_reason == "stop"))
    return choices


def _holds_a_word(by_text: Answers) -> bool:
    """Return whether any response holds a word."""
    for responses in by_text.values():
        if any(answer.text.strip() for answer in responses):
            return True
    return False
