"""Responses of other models and of people, in the target's tokens: what WRPO (arXiv 2412.03187)
learns from.

A source is one entry of a profile (config.Source): a model by asset, folder or hub id; an
OpenAI-compatible endpoint; a file of recorded answers; or the reviewers themselves.
"""

import gzip
import json
import logging
import zlib
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pandas as pd

from beyond_dpo import templates
from beyond_dpo.pipeline import assets, config, corpus, endpoint, openings, preferences, stages
from beyond_dpo.pipeline.artifacts import Artifact

log = logging.getLogger("beyond_dpo")


def shown(cfg) -> pd.DataFrame:
    """Return what a user should know of the sources before they are used: name, kind, model or
    file, terms.
    """
    rows = [{"source": name, **asdict(cfg.known_sources[name])} for name in cfg.sources]
    return pd.DataFrame(rows)[["source", "kind", "ref", "ask", "terms"]]


def sampling(cfg):
    """Return the configuration by which training data is sampled, from sources and target alike."""
    return replace(cfg, decoding=cfg.sampling)


def answers(cfg, name: str) -> Artifact:
    """Collect a source's responses to all prompts: responses.jsonl as of stages.responses, in the
    target's tokens.

    They are cut after cfg.sampling.max_tokens; those without a word are left out, and those that
    the target's chat template does not take (templates.encode_response), which are counted. So are
    those that an endpoint still lacks when it was asked again, as `short`.
    Raises ConfigError for a source without any answer or with an `ask` that asks the same of all
    prompts, and what the engine or the endpoint raises.
    """
    source, texts = cfg.known_sources[name], stages.texts(cfg.world)
    check(name, source)
    asked = {
        "model": source.ref,
        "ask": source.ask,
        "samples": cfg.world.samples,
        "sampling": cfg.sampling.recipe(),
    }
    made_of = {"human": {}, "endpoint": asked}.get(source.kind)
    if source.kind == "recorded":
        made_of = {"file": assets.resolve(source.ref)}
    elif source.kind == "model":
        prompts = _put(cfg, source)
        how = {"prompts": prompts, "samples": cfg.world.samples, "seed": 1, "engine": "sample"}
        weights = stages.Weights(stages.model(source.ref))
        said = stages.responses(sampling(cfg), weights, "prompts", **how)
        made_of = {"said": said}

    def make(out: Path) -> dict:
        tokenizer, rows = (
            templates.load_tokenizer(assets.tokenizer_dir(cfg.world.target)),
            texts.json("prompts.json"),
        )
        wording = {row["id"]: _wording(row, tokenizer) for row in rows}
        short = 0
        if source.kind == "human":
            found = _written(cfg, rows)
        elif source.kind == "model":
            found = _decoded(assets.tokenizer_dir(source.ref), prompts.json("prompts.json"), said)
        else:
            if source.kind == "recorded":
                given = _recorded(source)
            else:
                given, short = _replies(cfg, source, wording, out)
            plain = cfg.world.template == "plain"
            found = {
                i: [
                    (_after(text, answer) if plain else answer, ended)
                    for answer, ended in given.get(text, ())
                ]
                for i, text in wording.items()
            }
        lines, refused = _encoded(cfg, tokenizer, rows, found)
        if not lines:
            raise config.ConfigError(f"source {name} answers none of the {len(rows)} prompts")
        (out / "responses.jsonl").write_text(
            "".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8"
        )
        answered = {line["id"] for line in lines}
        unanswered = sum(row["id"] not in answered for row in rows)
        facts = {"responses": len(lines), "unanswered": unanswered}
        if refused:
            facts["refused"] = refused
        if short:
            facts["short"] = short
        return facts

    recipe = {"kind": source.kind, "texts": texts, "max_tokens": cfg.sampling.max_tokens, **made_of}
    if cfg.world.target not in assets.BUILDERS:  # to those a text alone is the same tokens
        recipe["tokens"] = 2  # of responses: those that they have after other text
    return Artifact("answers", 1, recipe, make, f"source {name}: {source.kind} {source.ref}")


def check(name: str, source: config.Source) -> None:
    """Raise ConfigError for a source that would be asked the same, whatever the prompt."""
    if source.ask and "{prompt}" not in source.ask:
        key = f"known_sources.{name}.ask"
        raise config.ConfigError(f"{key} has no {{prompt}} in it, got {source.ask!r}")


def asking(source: config.Source, text: str) -> str:
    """Return what a source is asked: `ask` with the prompt in it; other braces are text."""
    return source.ask.replace("{prompt}", text) if source.ask else text


def _encoded(cfg, tokenizer, rows: list[dict], found: dict) -> tuple[list[dict], int]:
    """Return responses that say something, in the target's tokens, and how many were refused.

    Refused are those that its chat template does not take. A plain prompt may end within a word,
    so its response is what goes on after any text.
    """
    lines = []
    refused = 0
    for row in rows:
        prompt = row["text"] if cfg.world.template == "chat" else None
        how = {"prompt": prompt, "template": cfg.world.template}
        answers = [answer for answer in found.get(row["id"], ()) if answer[0].strip()]
        for sample, (text, ended) in enumerate(answers):
            try:
                ids = templates.encode_response(tokenizer, text, end=ended, **how)
            except templates.RowError:
                refused += 1
                continue
            ids = ids[: cfg.sampling.max_tokens]
            line = {"id": row["id"], "sample": sample, "response_ids": ids, "logp": None}
            lines.append(line)
    return lines, refused


def _wording(row: dict, tokenizer) -> str:
    """Return a prompt's text: as the data set keeps it, or of its tokens (a chat's hold its
    template's words too).
    """
    told = row.get("text") or tokenizer.decode(row["prompt_ids"], skip_special_tokens=True)
    return preferences.dialogue(told)


def _put(cfg, source: config.Source) -> Artifact:
    """Put the prompts to a source's model, in its own tokens: prompts.json.

    A text to go on with stands again where the chat model's answer begins, so that it goes on right
    there.
    """
    texts, plain = stages.texts(cfg.world), cfg.world.template == "plain"

    def make(out: Path) -> None:
        reader, own = (
            templates.load_tokenizer(assets.tokenizer_dir(ref))
            for ref in (cfg.world.target, source.ref)
        )
        rows = texts.json("prompts.json")
        for row in rows:
            text = _wording(row, reader)
            if source.ask:
                begun = text if plain else ""
                row["prompt_ids"] = templates.render(own, asking(source, text), "chat", begun=begun)
            else:
                row["prompt_ids"] = templates.render(own, text, "plain")
        (out / "prompts.json").write_text(json.dumps(rows), encoding="utf-8")

    recipe = {
        "texts": texts,
        "tokenizer": assets.resolve(source.ref),
        "ask": source.ask,
        "plain": plain,
    }
    if source.ask:
        recipe |= corpus.rendering(source.ref, "chat")
        if source.ref not in assets.BUILDERS:
            recipe["tokens"] = 2  # the text's own where the answer begins
    return Artifact("asked", 1, recipe, make)


def _decoded(model: Path, prompts: list[dict], said: Artifact) -> dict:
    """Return {prompt id: [(text, did it end by itself), …]} of a model's own tokens."""
    tokenizer, found = templates.load_tokenizer(model), {row["id"]: [] for row in prompts}
    ends = templates.end_tokens(tokenizer)
    asked = {row["id"]: row["prompt_ids"] for row in prompts}
    for line in (said.get() / "responses.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        before = tokenizer.decode(asked[row["id"]], skip_special_tokens=True)
        whole = tokenizer.decode(asked[row["id"]] + row["response_ids"], skip_special_tokens=True)
        ended = bool(row["response_ids"]) and row["response_ids"][-1] in ends
        found[row["id"]].append(
            (whole[len(before) :], ended)
        )  # a response alone may lose its first blank
    return found


def _written(cfg, prompts: list[dict]) -> dict:
    """Return how the reviewers went on: whole sentences that fit with an end token, or a first
    one's beginning.
    """
    tokenizer, found = templates.load_tokenizer(assets.tokenizer_dir(cfg.world.target)), {}
    _, reviews, _ = corpus.shuffled(cfg.world.dataset)
    for row in prompts:
        review = reviews[int(row["id"][1:])][0]
        if cfg.world.template == "chat":
            begun = templates.render(tokenizer, row["text"], "plain")
        else:
            begun = row["prompt_ids"]
        most = len(begun) + cfg.sampling.max_tokens
        ids = openings.opening(tokenizer, review, most)
        whole = len(ids) >= len(begun) + openings.SHORTEST
        if not whole:
            ids = templates.render(tokenizer, review, "plain")[:most]
        before = tokenizer.decode(begun, skip_special_tokens=True)
        text = tokenizer.decode(ids, skip_special_tokens=True)[len(before) :]
        if cfg.world.template == "chat":
            text = text.strip()
        found[row["id"]] = [(text, whole)]
    return found


def _recorded(source: config.Source) -> dict:
    """Read recorded answers, {prompt: [(response, True), …]}: a file of JSON lines, or a data set
    on the hub.

    A row holds "prompt" and "response" (several rows for several responses), or as WRPO's authors
    publish theirs (AALF/ultrafeedback_wrpo) a list "chosen", whose first is the best source's. Each
    is a text, or turns of a chat.
    """
    path, found, read = Path(source.ref).expanduser(), {}, 0
    if path.is_file():
        rows = _json_rows(path)
    else:
        import datasets

        repo, commit = assets.resolve(source.ref).values()
        rows = datasets.load_dataset(repo, revision=commit, split="train")
    try:
        for row in rows:
            response = row["response"] if "response" in row else _first(row["chosen"])
            found.setdefault(_asked(row["prompt"]), []).append((_text(response), True))
            read += 1
    except (ValueError, LookupError, TypeError, EOFError, OSError, zlib.error) as error:
        wanted = '{"prompt": text, "response": text} a line'
        raise config.ConfigError(f"{source.ref}: row {read} is not {wanted}: {error!r}") from None
    return found


def _json_rows(path: Path) -> Iterator[dict]:
    """Yield the rows of a JSON file: an object a line or an array of them, UTF-8, maybe gzipped."""
    content = path.read_bytes()
    if content.startswith(b"\x1f\x8b"):
        content = gzip.decompress(content)
    text = content.decode("utf-8-sig")
    if text.lstrip().startswith("["):
        yield from json.loads(text)
        return
    for line in text.split("\n"):  # U+2028 ends no line
        if line.strip():
            yield json.loads(line)


def _asked(prompt: str | dict | list) -> str:
    """Return a recorded prompt as _wording() words it: one user's text, or a whole dialogue."""
    if isinstance(prompt, list) and len(prompt) > 1:
        return preferences.dialogue(prompt)
    return _text(prompt)


def _first(chosen: list) -> str | dict | list:
    """Return the best source's response of several; a single one, as in files of pairs, would give
    its first letter.
    """
    if not isinstance(chosen, list) or isinstance(chosen[0], dict) and chosen[0]["role"] == "user":
        raise ValueError(f'"chosen" is not a list of responses: {chosen!r:.80}')
    return chosen[0]


def _text(turns: str | dict | list) -> str:
    """Return the last turn's text of a chat."""
    if isinstance(turns, str):
        return turns
    if isinstance(turns, dict):
        return _text(turns["content"])
    return _text(turns[-1])


def _replies(cfg, source: config.Source, wording: dict, out: Path) -> tuple[dict, int]:
    """Ask an endpoint for every prompt; return its responses, and how many of those asked for lack.

    Each reply is kept as it comes, so that nothing is asked for twice. Temperature, top-p and the
    number of tokens and
    samples are sent, no seed: an endpoint repeats nothing exactly. What it refuses to answer (HTTP
    400) counts as unanswered. A server that ignores the number of samples, and returns fewer, is
    asked again for those that lack; what it does not answer then is counted, and warned of. Raises
    EndpointError where no reply holds a word; then none is kept.
    """
    samples = cfg.world.samples
    asked = endpoint.Endpoint(source.ref, source.url)
    folder = out / "checkpoints"
    found = {text: [] for text in wording.values()}
    lacking = dict.fromkeys(found, samples)
    for turn in range(samples):  # each brings a response or more to every prompt that lacks any
        requests = {text: _request(cfg, source, text, count) for text, count in lacking.items()}
        kept = folder / (f"replies-{turn}.jsonl" if turn else "replies.jsonl")
        replies, _ = endpoint.ask(asked, requests, kept, _choices)
        for text, responses in replies.items():
            found[text] += responses[: lacking[text]]
        lacking = {
            text: samples - len(found[text])
            for text, responses in replies.items()
            if responses and len(found[text]) < samples
        }
        if not lacking:
            break
    if any(found.values()) and not _words(found):
        for kept in folder.glob("replies*.jsonl"):
            kept.unlink()
        raise endpoint.EndpointError(f"{source.ref}: no reply to {len(found)} prompts holds a word")
    short = sum(samples - len(responses) for responses in found.values() if responses)
    if short:
        log.warning(
            "%s: %d responses fewer than asked for, also when asked again", source.ref, short
        )
    return found, short


def _request(cfg, source: config.Source, text: str, samples: int) -> dict:
    """Return what an endpoint is sent for a prompt."""
    said = asking(source, text)
    how = cfg.sampling
    return {
        "messages": [{"role": "user", "content": said}],
        "n": samples,
        "temperature": how.temperature,
        "top_p": how.top_p,
        "max_tokens": how.max_tokens,
    }


def _choices(reply) -> list[tuple[str, bool]]:
    """Return [(text, did it end by itself), …] of an endpoint's reply, none of a refusal."""
    choices = reply.choices if reply else []
    return [(choice.message.content or "", choice.finish_reason == "stop") for choice in choices]


def _words(replies: dict) -> bool:
    """Return whether any response of an endpoint holds a word."""
    return any(text.strip() for responses in replies.values() for text, _ in responses)


def _after(prompt: str, answer: str) -> str:
    """Return what an answer adds to a text that it was asked to go on with, whether it begins with
    that text or not.
    """
    answer = answer.strip()
    return answer[len(prompt) :] if answer.startswith(prompt) else f" {answer}"
