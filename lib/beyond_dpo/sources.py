"""Responses of other models and of people, in the target's tokens: what WRPO (arXiv 2412.03187) learns from.

A source is one entry of a profile (config.Source): a model by asset, folder or hub id; an OpenAI-compatible endpoint; a
file of recorded answers; or the reviewers themselves.
"""

import json
import logging
from dataclasses import asdict, replace
from pathlib import Path

import pandas as pd

from beyond_dpo import assets, config, corpus, endpoint, preferences, stages
from beyond_dpo.artifacts import Artifact

log = logging.getLogger("beyond_dpo")


def shown(cfg) -> pd.DataFrame:
    """Return what a user should know of the sources before they are used: name, kind, model or file, terms."""
    rows = [{"source": name, **asdict(cfg.known_sources[name])} for name in cfg.sources]
    return pd.DataFrame(rows)[["source", "kind", "ref", "ask", "terms"]]


def sampling(cfg):
    """Return the configuration by which training data is sampled, from sources and target alike."""
    return replace(cfg, decoding=cfg.sampling)


def answers(cfg, name: str) -> Artifact:
    """Collect a source's responses to all prompts: responses.jsonl as of stages.responses, in the target's tokens.

    They are cut after cfg.sampling.max_tokens; those without a word are left out. Raises ConfigError for a source
    without any answer, and what the engine or the endpoint raises.
    """
    source, texts = cfg.known_sources[name], stages.texts(cfg.world)
    asked = {"model": source.ref, "ask": source.ask, "samples": cfg.world.samples, "sampling": cfg.sampling.recipe()}
    made_of = {"human": {}, "endpoint": asked}.get(source.kind)
    if source.kind == "recorded":
        made_of = {"file": assets.resolve(source.ref)}
    elif source.kind == "model":
        prompts = _put(cfg, source)
        how = {"prompts": prompts, "samples": cfg.world.samples, "seed": 1, "engine": "sample"}
        said = stages.responses(sampling(cfg), stages.model(source.ref), "prompts", **how)
        made_of = {"said": said}

    def make(out: Path) -> dict:
        from beyond_dpo import data

        tokenizer, rows = data.load_tokenizer(assets.model_dir(cfg.world.target)), texts.json("prompts.json")
        wording = {row["id"]: _wording(row, tokenizer) for row in rows}
        if source.kind == "human":
            found = _written(cfg, rows)
        elif source.kind == "model":
            found = _decoded(assets.model_dir(source.ref), prompts.json("prompts.json"), said)
        else:
            given = _recorded(source) if source.kind == "recorded" else _replies(cfg, source, wording, out)
            plain = cfg.world.template == "plain"
            found = {i: [(_after(text, answer) if plain else answer, ended) for answer, ended in given.get(text, ())]
                     for i, text in wording.items()}  # fmt: skip
        found, lines = {i: [one for one in responses if one[0].strip()] for i, responses in found.items()}, []
        for i, responses in found.items():
            for sample, (text, ended) in enumerate(responses):
                ids = data.encode_response(tokenizer, text, end=ended)[: cfg.sampling.max_tokens]
                lines.append(json.dumps({"id": i, "sample": sample, "response_ids": ids, "logp": None}) + "\n")
        if not lines:
            raise config.ConfigError(f"source {name} answers none of the {len(rows)} prompts")
        (out / "responses.jsonl").write_text("".join(lines))
        return {"responses": len(lines), "unanswered": sum(not found.get(row["id"]) for row in rows)}

    recipe = {"kind": source.kind, "texts": texts, "max_tokens": cfg.sampling.max_tokens, **made_of}
    return Artifact("answers", 1, recipe, make, f"source {name}: {source.kind} {source.ref}")


def _wording(row: dict, tokenizer) -> str:
    """Return a prompt's text: as the data set keeps it, or of its tokens (a chat's hold its template's words too)."""
    told = row.get("text") or tokenizer.decode(row["prompt_ids"], skip_special_tokens=True)
    return preferences.dialogue(told)


def _put(cfg, source: config.Source) -> Artifact:
    """Put the prompts to a source's model, in its own tokens: prompts.json.

    A text to go on with stands again where the chat model's answer begins, so that it goes on right there.
    """
    texts, plain = stages.texts(cfg.world), cfg.world.template == "plain"

    def make(out: Path) -> None:
        from beyond_dpo import data

        reader, own = (data.load_tokenizer(assets.model_dir(ref)) for ref in (cfg.world.target, source.ref))
        rows = texts.json("prompts.json")
        for row in rows:
            text = _wording(row, reader)
            if source.ask:
                row["prompt_ids"] = data.render(own, source.ask.format(prompt=text), "chat")
                row["prompt_ids"] += data.encode_response(own, text, end=False) if plain else []
            else:
                row["prompt_ids"] = data.render(own, text, "plain")
        (out / "prompts.json").write_text(json.dumps(rows))

    recipe = {"texts": texts, "tokenizer": assets.resolve(source.ref), "ask": source.ask, "plain": plain}
    return Artifact("asked", 1, recipe, make)


def _decoded(model: Path, prompts: list[dict], said: Artifact) -> dict:
    """Return {prompt id: [(text, did it end by itself), …]} of a model's own tokens."""
    from beyond_dpo import data

    tokenizer, found = data.load_tokenizer(model), {row["id"]: [] for row in prompts}
    asked = {row["id"]: row["prompt_ids"] for row in prompts}
    for line in (said.get() / "responses.jsonl").read_text().splitlines():
        row = json.loads(line)
        before, whole = (tokenizer.decode(asked[row["id"]] + ids, skip_special_tokens=True)
                         for ids in ([], row["response_ids"]))  # fmt: skip
        ended = set(row["response_ids"][-1:]) <= set(tokenizer.all_special_ids)
        found[row["id"]].append((whole[len(before) :], ended))  # a response alone may lose its first blank
    return found


def _written(cfg, prompts: list[dict]) -> dict:
    """Return how the reviewers went on: whole sentences that fit with an end token, or a first one's beginning."""
    from beyond_dpo import data

    tokenizer, found = data.load_tokenizer(assets.model_dir(cfg.world.target)), {}
    _, reviews, _ = corpus.shuffled(cfg.world.dataset)
    for row in prompts:
        text, cut = reviews[int(row["id"][1:])][0], len(row["prompt_ids"])
        room = replace(cfg.world, sft_tokens=cut + cfg.sampling.max_tokens)
        ids = corpus.opening(tokenizer, text, room)
        whole = len(ids) >= cut + corpus.SHORTEST
        ids = ids if whole else data.render(tokenizer, text, room.template)[: room.sft_tokens]
        found[row["id"]] = [(tokenizer.decode(ids[cut:]), whole)]
    return found


def _recorded(source: config.Source) -> dict:
    """Read recorded answers, {prompt: [(response, True), …]}: a file of JSON lines, or a data set on the hub.

    A row holds "prompt" and "response" (several rows for several responses), or as WRPO's authors publish theirs
    (AALF/ultrafeedback_wrpo) a list "chosen", whose first is the best source's. Each is a text, or turns of a chat.
    """
    path, found = Path(source.ref).expanduser(), {}
    if path.is_file():
        rows = map(json.loads, path.read_bytes().splitlines())  # of bytes: U+2028 ends no line
    else:
        import datasets

        repo, commit = assets.resolve(source.ref).values()
        rows = datasets.load_dataset(repo, revision=commit, split="train")
    try:
        for row in rows:
            response = row["response"] if "response" in row else _first(row["chosen"])
            found.setdefault(_text(row["prompt"]), []).append((_text(response), True))
    except (ValueError, LookupError, TypeError) as error:
        wanted = '{"prompt": text, "response": text} a line'
        raise config.ConfigError(
            f"{source.ref}: row {sum(map(len, found.values()))} is not {wanted}: {error!r}"
        ) from None
    return found


def _first(chosen: list) -> str | dict | list:
    """Return the best source's response of several; a single one, as in files of pairs, would give its first letter."""
    if not isinstance(chosen, list) or isinstance(chosen[0], dict) and chosen[0]["role"] == "user":
        raise ValueError(f'"chosen" is not a list of responses: {chosen!r:.80}')
    return chosen[0]


def _text(turns: str | dict | list) -> str:
    """Return the last turn's text of a chat."""
    return turns if isinstance(turns, str) else turns["content"] if isinstance(turns, dict) else _text(turns[-1])


def _replies(cfg, source: config.Source, wording: dict, out: Path) -> dict:
    """Ask an endpoint for every prompt; each reply is kept as it comes, so that nothing is asked for twice.

    Temperature, top-p and the number of tokens and samples are sent, no seed: an endpoint repeats nothing exactly. What
    it refuses to answer (HTTP 400) counts as unanswered. A server that ignores the number of samples, and returns
    fewer, is asked again for those that lack; a warning counts what it does not answer then. Raises EndpointError where
    no reply holds a word; then none is kept.
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
        log.warning("%s: %d responses fewer than asked for, also when asked again", source.ref, short)
    return found


def _request(cfg, source: config.Source, text: str, samples: int) -> dict:
    """Return what an endpoint is sent for a prompt."""
    said = source.ask.replace("{prompt}", text) or text
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
    """Return what an answer adds to a text that it was asked to go on with, whether it begins with that text or not."""
    answer = answer.strip()
    return answer[len(prompt) :] if answer.startswith(prompt) else f" {answer}"
