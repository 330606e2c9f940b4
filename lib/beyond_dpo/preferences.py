"""Published preference data, and a user's own, as rows of one kind: an adapter for each schema, and the split.

A row is {"prompt": text or chat turns, "responses": {name: text}}, or a labelled text {"text", "label"}. An adapter
takes one row of its data set and returns such a row, or as a string why it teaches nothing and is dropped.
"""

import html
import json
import os
import random
import re
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from beyond_dpo import assets, config

TURN, ROLES = re.compile(r"\n\n(Human|Assistant):"), {"Human": "user", "Assistant": "assistant"}
SEED = 20240416  # of the one order that all seeds of an experiment share


def trl(row: dict) -> dict | str:
    """Read prompt, chosen and rejected as TRL takes them: texts or turns, the prompt given or what both begin with.

    So are HuggingFaceH4/ultrafeedback_binarized and princeton-nlp/llama3-ultrafeedback-armorm: `prompt` a text,
    `chosen` and `rejected` whole chats. A prompt without answers is one to generate for.
    """
    prompt, chosen, rejected = (row.get(name) for name in ("prompt", "chosen", "rejected"))
    if isinstance(chosen, str) or isinstance(rejected, str):
        chosen, rejected = chosen or "", rejected or ""
        if prompt is None and TURN.match(chosen):
            return hh(row)
        same = os.path.commonprefix([chosen, rejected]) if prompt is None else ""
        cut = max((blank.start() for blank in re.finditer(r"\s+", same)), default=0)  # not within a word
        said = {"chosen": chosen[cut:], "rejected": rejected[cut:]}
        return {"prompt": chosen[:cut] if prompt is None else prompt, "responses": said}
    chosen, rejected = chosen or [], rejected or []
    if (len(chosen), len(rejected)) == (2, 1) and not (isinstance(chosen[0], dict) and chosen[0]["role"] == "user"):
        return wrpo(row)
    asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt or []
    pair = _shared(*(turns if turns and turns[0]["role"] != "assistant" else asked + turns
                     for turns in (chosen, rejected)))  # fmt: skip
    return {"prompt": asked, "responses": {}} if asked and isinstance(pair, str) else pair


def wrpo(row: dict) -> dict:
    """Read AALF/ultrafeedback_wrpo: chosen = [best of the sources, best of the target], rejected = [its worst]."""
    said = zip(config.FUSED, map(_last, [*row["chosen"], *row["rejected"]]), strict=True)
    return {"prompt": [row["prompt"]] if isinstance(row["prompt"], dict) else row["prompt"], "responses": dict(said)}


def hh(row: dict) -> dict | str:
    """Read Anthropic/hh-rlhf: two dialogues, a text each, alike but for the last thing the assistant says."""
    said = [TURN.split(text or "")[1:] for text in (row["chosen"], row["rejected"])]  # who, what, who, what, …
    return _shared(*([{"role": ROLES[who], "content": what.strip()}
                      for who, what in zip(one[::2], one[1::2], strict=True)] for one in said))  # fmt: skip


def shp(row: dict) -> dict | str:
    """Read stanfordnlp/SHP: a post, and two comments, of which labels = 1 prefers A, 0 prefers B."""
    if row["labels"] not in (0, 1):
        return "no preference"
    said = [row["human_ref_A"], row["human_ref_B"]][:: 1 if row["labels"] else -1]
    prompt = [{"role": "user", "content": row["history"]}]
    return {"prompt": prompt, "responses": dict(zip(("chosen", "rejected"), said, strict=True))}


def stack_exchange(row: dict) -> dict | str:
    """Read HuggingFaceH4/stack-exchange-preferences: the answer with the highest pm_score, and that with the lowest."""
    scored = [(a["pm_score"], _words(a["text"])) for a in row["answers"] or () if a["pm_score"] is not None]
    best, worst = (end(scored, key=lambda answer: answer[0], default=(0, "")) for end in (max, min))
    if best[0] == worst[0]:
        return "no preference"
    prompt = [{"role": "user", "content": _words(row["question"])}]
    return {"prompt": prompt, "responses": {"chosen": best[1], "rejected": worst[1]}}


def imdb(row: dict) -> dict | str:
    """Read stanfordnlp/imdb: a review, and label 1 = positive, 0 = negative; its unlabelled split has −1."""
    text = " ".join((row["text"] or "").replace("<br />", " ").split())
    return {"text": text, "label": row["label"]} if row["label"] in (0, 1) else "no label"


def asked(row: dict) -> dict:
    """Read prompts alone: a column `prompt`, or AlpacaEval's `instruction`."""
    return {"prompt": row["instruction"] if "instruction" in row else row["prompt"], "responses": {}}


SCHEMAS = [  # columns and their adapter; in a file the first that fits
    (("question", "answers"), stack_exchange), (("history", "human_ref_A", "human_ref_B", "labels"), shp),
    (("text", "label"), imdb), (("chosen", "rejected"), trl), (("instruction",), asked), (("prompt",), asked),
    (("prompt", "chosen", "rejected"), wrpo), (("chosen", "rejected"), hh),  # in a file trl() sees which it is
]  # fmt: skip
HUB = {
    "HuggingFaceH4/ultrafeedback_binarized": trl, "princeton-nlp/llama3-ultrafeedback-armorm": trl,
    "AALF/ultrafeedback_wrpo": wrpo, "Anthropic/hh-rlhf": hh, "stanfordnlp/SHP": shp,
    "HuggingFaceH4/stack-exchange-preferences": stack_exchange, "stanfordnlp/imdb": imdb,
}  # fmt: skip


def place(ref: str) -> tuple[str, str]:
    """Return where a data set is, a path or "datasets:org/name@revision", and the split after ":", or ""."""
    where, _, part = ref.rpartition(":")
    if not where or "/" in part or Path(ref).expanduser().exists():
        where, part = ref, ""
    local = where.startswith(("/", "./", "../", "~")) or Path(where).exists()
    return where if local else f"datasets:{where}", part


def read(ref: str, streaming: bool = False) -> Iterator[tuple[int, dict | str]]:
    """Yield (number, row or why it is dropped) of a data set, in one random order that is always the same.

    ref: a hub id (org/name@revision), a folder, or a file of JSON lines or parquet; ":split" if not the training one;
    "alpaca_eval" is the 805 prompts of the pinned archive. streaming: for a few rows of one that is too big to load.
    Raises ConfigError for columns or a row of no known schema, and for a file that cannot be read.
    """
    where, part = place(ref)
    repo = where.removeprefix("datasets:").partition("@")[0]
    part = part or ("train_prefs" if repo.endswith("/ultrafeedback_binarized") else "train")
    table = _load(ref, where, part, streaming)
    found, one = table.column_names or [*next(iter(table), ())], HUB.get(repo)
    known = [(columns, adapter) for columns, adapter in SCHEMAS if one in (None, adapter)]
    adapter = next((adapter for columns, adapter in known if set(columns) <= set(found)), None)
    if adapter is None:
        wanted = " or ".join(dict.fromkeys(f"({', '.join(columns)})" for columns, _ in known))
        raise config.ConfigError(f"{ref}: has the columns ({', '.join(found)}), expected are {wanted}")
    order = random.Random(SEED).sample(range(len(table)), len(table)) if not streaming else ()
    rows = enumerate(table.shuffle(seed=SEED, buffer_size=10_000)) if streaming else ((n, table[n]) for n in order)
    for n, given in rows:
        try:
            row = adapter(given)
            reason(row, "pairs")  # reads every part of it
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise config.ConfigError(f"{ref}: row {n} is not as {adapter.__name__}() expects it: {error!r}") from error
        yield n, row


def _load(ref: str, where: str, part: str, streaming: bool):
    import datasets

    from beyond_dpo import ask

    datasets.disable_progress_bars()
    path = Path(where).expanduser()
    try:
        if ref == "alpaca_eval":
            return datasets.Dataset.from_list(json.loads(assets.member("llm_eval", ask.ALPACA_BASELINE)))
        if where.startswith("datasets:"):
            repo, commit = assets.resolve(where).values()
            return datasets.load_dataset(repo, revision=commit, split=part, streaming=streaming)
        if path.is_dir():
            return datasets.load_dataset(str(path), split=part, streaming=streaming)
        kind = "parquet" if path.suffix == ".parquet" else "json"
        return datasets.load_dataset(kind, data_files=str(path), split=part, streaming=streaming)
    except (datasets.exceptions.DatasetsError, ValueError, OSError, StopIteration) as error:
        raise config.ConfigError(f"{ref}: cannot be read: {error.__cause__ or error!r}") from error


def reason(row: dict | str, use: str = "") -> str:
    """Return why a row is of no use, or ""; use: "" for its prompt, "sft" for its first response, "pairs" for all."""
    if isinstance(row, str) or "text" in row:
        return row if isinstance(row, str) else "" if row["text"] else "empty prompt"
    prompt, said = row["prompt"] or "", [(text or "").strip() for text in row["responses"].values()]
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    asked = [turn["content"] and turn["content"].strip() for turn in turns]
    if None in asked or not any(asked[-1:]) or turns[-1]["role"] == "assistant":
        return "no question"
    if use and not said:
        return "no preference"
    if use and not all(said[: 1 if use == "sft" else None]):
        return "empty response"
    return "equal responses" if use == "pairs" and said[-1] in said[:-1] else ""


def dialogue(prompt: str | list[dict]) -> str:
    """Return a prompt as text that a plain model goes on with; turns become HH's, up to "Assistant:"."""
    if isinstance(prompt, str):
        return prompt
    who = ("Assistant" if turn["role"] == "assistant" else "Human" for turn in prompt)
    return "".join(f"\n\n{w}: {turn['content']}" for w, turn in zip(who, prompt, strict=True)) + "\n\nAssistant:"


def prompt_row(tokenizer, row: dict, world: config.World, rng: random.Random) -> dict:
    """Return {"prompt_ids"} of a whole prompt, or of a review's beginning, and "text", what a chat model is asked.

    "text" is one user's words or several turns, also for a plain model, as a reward model may read turns.
    """
    from beyond_dpo import corpus, data

    if "text" in row:
        return corpus.beginning(tokenizer, row["text"], world, rng)
    prompt, chat = row["prompt"], world.template == "chat"
    made = {"prompt_ids": data.render(tokenizer, prompt if chat else dialogue(prompt), world.template)}
    if chat and isinstance(prompt, list) and [turn["role"] for turn in prompt] == ["user"]:
        prompt = prompt[0]["content"]
    return made | ({"text": prompt} if chat or isinstance(prompt, list) else {})


def prompts(ref: str, world: config.World, tokenizer, most: int) -> list[dict]:
    """Return up to `most` different prompts of another data set, made as those of `world`, out of 20 rows for each."""
    rows, rng = {}, random.Random(SEED)
    for n, row in islice(read(ref, streaming=place(ref)[0].startswith("datasets:")), 20 * most):
        if len(rows) == most:
            break
        if not reason(row):
            made = prompt_row(tokenizer, row, world, rng)
            if "text" in row or len(made["prompt_ids"]) <= world.prompt_tokens[1]:
                rows.setdefault(_key(row), {"id": f"E{n}"} | made)
    return list(rows.values())


def split(world: config.World, out: Path) -> dict:
    """Write what corpus.split writes, and as pairs.jsonl the data set's own pairs where world.pairs is "given".

    Test prompts are drawn first, then dev, then training rows, none with a prompt that was drawn before. Sizes asked
    for count rows of the data set, some of which drop: empty or equal responses, no preference, a repeated prompt, one
    above world.prompt_tokens (not of given pairs: the training cuts those). Prompts are whole, but for reviews, which
    are cut to beginnings. Returns sizes, and what was dropped. Raises ConfigError for a data set that is too small.
    """
    from beyond_dpo import corpus, data

    if world.gold_rows or world.reward_rows:
        raise config.ConfigError(f"no reward is trained on {world.dataset}: take a finished one, and no gold_rows")
    tokenizer, rng = data.load_tokenizer(assets.model_dir(world.target)), random.Random(SEED)
    given, dropped, spare, seen, pools, drawn = world.pairs == "given", Counter(), Counter(), set(), {}, {}
    sizes = {"test": world.test_prompts, "dev": world.dev_prompts, "train": max(world.prompts, world.sft_rows)}
    for name, most in sizes.items():
        ref = getattr(world, f"{name}_dataset", "") or world.dataset
        pool, rows, before = pools.setdefault(ref, read(ref)), [], set(seen)
        paired = given and name == "train"
        use = "pairs" if paired else "sft" if name == "train" and world.sft_rows else ""
        while len(rows) < most and (found := next(pool, None)):
            n, row = found
            if not (why := reason(row, use)):
                made = prompt_row(tokenizer, row, world, rng)
                if _key(row) in (before if paired else seen):  # a prompt may have several pairs
                    why = "repeated prompt"
                elif "text" not in row and len(made["prompt_ids"]) > world.prompt_tokens[1] and not paired:
                    why = "prompt above world.prompt_tokens"
            if why:
                dropped[why] += 1
                spare[ref] += 1
                continue
            seen.add(_key(row))
            rows.append(({"id": f"{name}{n}"} | made, row))
        spare[ref] -= most - len(rows)  # one that drops counts as one of those asked for
        if spare[ref] < 0 or most and not rows:
            raise config.ConfigError(f"{ref}: {len(rows)} of {most} {name} rows; dropped: {dict(dropped)}")
        drawn[name] = rows
    train = [{"id": made["id"], "prompt_ids": made["prompt_ids"], "responses": _said(tokenizer, made, row, world)}
             for made, row in rows]  # fmt: skip
    first = [row | {"responses": {"chosen": next(iter(row["responses"].values()))}}
             for row in train[: world.sft_rows] if row["responses"]]  # fmt: skip
    data.write_rows(out / "sft.jsonl", first)
    facts = {"sft_rows": len(first)} | ({"pairs": len(train[: world.prompts])} if given else {})
    if given:
        data.write_rows(out / "pairs.jsonl", train[: world.prompts])
    drawn["train"] = [] if given else rows[: world.prompts]
    for name, file in {"train": "prompts", "dev": "dev_prompts", "test": "test_prompts"}.items():
        (out / f"{file}.json").write_text(json.dumps([made for made, _ in drawn[name]]))
    more = islice(pools[world.test_dataset or world.dataset], corpus.HELD_OUT) if rows and "label" in rows[0][1] else ()
    held = [row for _, row in more if not reason(row) and _key(row) not in seen]  # a reward is measured on them
    texts = [" ".join(row["text"].split()[: world.reward_words]) for row in held]
    labelled = {"gold": [[], []], "reward": [[], []], "held_out": [texts, [row["label"] for row in held]]}
    (out / "labelled.json").write_text(json.dumps(labelled))
    return facts | {"held_out": len(held), "dropped": dict(dropped)}


def _said(tokenizer, made: dict, row: dict, world: config.World) -> dict[str, list[int]]:
    """Return a row's responses as token ids; of a review how it goes on, if it does."""
    from beyond_dpo import corpus, data

    if "text" in row:
        ids, cut = corpus.opening(tokenizer, row["text"], world), len(made["prompt_ids"])
        return {"chosen": [*ids[cut:], tokenizer.eos_token_id]} if len(ids) >= cut + corpus.SHORTEST else {}
    spoken = world.template == "plain" and isinstance(row["prompt"], list)  # after "Assistant:"
    texts = {name: f" {text.strip()}" if spoken else text for name, text in row["responses"].items() if text}
    return {name: data.encode_response(tokenizer, text) for name, text in texts.items()}


def _key(row: dict) -> str:
    return " ".join((row["text"] if "text" in row else dialogue(row["prompt"])).split())


def _shared(chosen: list[dict], rejected: list[dict]) -> dict | str:
    if not chosen or not rejected or {chosen[-1]["role"], rejected[-1]["role"]} != {"assistant"}:
        return "no answer"
    said = {"chosen": chosen[-1]["content"], "rejected": rejected[-1]["content"]}
    same = chosen[:-1] == rejected[:-1]
    return {"prompt": chosen[:-1], "responses": said} if same else "no shared prompt"


def _last(answer: str | dict | list) -> str:
    return answer if isinstance(answer, str) else answer["content"] if isinstance(answer, dict) else _last(answer[-1])


def _words(text: str | None) -> str:
    """Return the words of HTML as Stack Exchange writes it, where < and > that are meant are entities."""
    return html.unescape(re.sub(r"<[^<>]*>", "", text or "")).strip()
