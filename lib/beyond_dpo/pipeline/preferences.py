"""Published preference data, and a user's own, as rows of one kind: an adapter for each schema, and
the split.

A row is {"prompt": text or chat turns, "responses": {name: text}}, or a labelled text {"text",
"label"}. An adapter takes one row of its data set and returns such a row, or as a string why it
teaches nothing and is dropped.
"""

import html
import json
import lzma
import os
import random
import re
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from beyond_dpo import templates
from beyond_dpo.pipeline import assets, config, openings
from beyond_dpo.rows import write_rows

TURN, ROLES = re.compile(r"\n\n(Human|Assistant):"), {"Human": "user", "Assistant": "assistant"}
SEED = 20240416  # of the one order that all seeds of an experiment share
ALPACA_BASELINE = "eval_framework/tasks/alpaca_eval/data/alpaca_eval_gpt4_baseline.json"
QUESTIONS = ("prompt", "instruction", "question", "query", "input")  # columns that ask
SYSTEMS = ("system", "system_prompt")
# columns without which a question may not be the same
CONTEXTS = ("context", "documents", "history", "tools", "image", "images")
ABOUT = set(  # last words in the names of columns that say something about a row
    "id ids uuid idx index source dataset subset split category type topic domain tag tags label "
    "language lang name model models generator annotator author score scores rating ratings rank "
    "date time url license version hash sha order status difficulty metadata rationale".split()
)
ANSWERS = set(  # last words in the names of columns that hold a prompt's answers, or its whole chat
    "messages response responses completion completions answer answers output outputs generation "
    "generations".split()
)


def question(row: dict) -> str | list[dict] | None:
    """Return what a row asks, text or turns, from the column that holds it; None: none does.

    A column of the system's words stands in front, as a turn. Raises ValueError for columns that
    ask different things, and for those whose words would be left out.
    """
    given = {name: row[name] for name in QUESTIONS if row.get(name) is not None}
    asking = {name: value for name, value in given.items() if value}
    if len({json.dumps(value) for value in asking.values()}) > 1:
        names = " and ".join(asking)
        raise ValueError(f"the columns {names} ask different things: join them in one, `prompt`")
    _refuse_unread([name for name in CONTEXTS if row.get(name)])
    if asking:
        _refuse_unread(_besides(row))
    asked = next(iter((asking or given).values()), None)
    if isinstance(asked, dict | list):
        asked = _turns(asked)
    system = next((row[name] for name in SYSTEMS if row.get(name)), "")
    if not system:
        return asked
    if not asked:
        raise ValueError("a system's words without a prompt: give a column `prompt` too")
    turns = _turns(asked)
    if turns[0]["role"] != "system":
        return [{"role": "system", "content": system}, *turns]
    if turns[0]["content"] != system:
        raise ValueError("the system's column and its turn in the prompt differ: keep one of them")
    return turns


def _turns(prompt: str | dict | list | None) -> list[dict]:
    """Return a prompt as turns, without the fields that are None."""
    if isinstance(prompt, str):
        prompt = {"role": "user", "content": prompt}
    if isinstance(prompt, dict):
        prompt = [prompt]
    turns = []
    for turn in prompt or []:
        if not isinstance(turn, dict) or "role" not in turn:
            raise ValueError(f'a turn is {{"role": …, "content": …}}, got {turn!r:.80}')
        # Arrow gives every turn the fields of all other turns; content is one that all should have
        kept = {name: value for name, value in turn.items() if value is not None}
        turns.append(kept | {"role": turn["role"], "content": turn.get("content")})
    return turns


def _refuse_unread(columns: list[str]) -> None:
    """Raise ValueError if there are columns whose words would be left out of the prompt."""
    if columns:
        todo = "put it into the prompt, or take it out"
        raise ValueError(f"the column {columns[0]} would be left out: {todo}")


def _besides(row: dict) -> list[str]:
    """Return the columns of words beside a prompt that may belong to it: no other answers, no whole
    chat.
    """
    return [name for name in _unnamed(row) if _last_word(name) not in ANSWERS]


def _refuse_unnamed(row: dict) -> None:
    """Raise ValueError if a row without a prompt has another column that may hold its question."""
    unread = _unnamed(row)
    if unread:
        names = ", ".join(unread)
        todo = "rename what asks to `prompt`, drop the rest"
        raise ValueError(f"no column `prompt`, and nothing reads {names}: {todo}")


def _unnamed(row: dict) -> list[str]:
    """Return the columns of words that neither ask, nor are chosen, rejected or about the row."""
    unread = []
    for name, value in row.items():
        parts = re.split(r"[\W_]+", name.lower())
        if name in (*QUESTIONS, *SYSTEMS, *CONTEXTS) or "chosen" in parts or "rejected" in parts:
            continue
        if _last_word(name) not in ABOUT and _holds_words(value):
            unread.append(name)
    return unread


def _last_word(name: str) -> str:
    """Return the last word of a column's name, as "response" of "response_0" or "response_b"."""
    words = re.findall(r"[^\W\d_]{2,}", name.lower())
    return words[-1] if words else ""


def _holds_words(value) -> bool:
    """Return whether a value is text, or holds any: not a number, nor a list of scores."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return any(map(_holds_words, value))
    return isinstance(value, str) and bool(value.strip())


def trl(row: dict) -> dict | str:
    """Read prompt, chosen and rejected as TRL takes them: texts or turns, the prompt given or what
    both begin with.

    So are HuggingFaceH4/ultrafeedback_binarized and princeton-nlp/llama3-ultrafeedback-armorm:
    `prompt` a text, `chosen` and `rejected` whole chats. A prompt without answers is one to
    generate for.
    """
    prompt = question(row)
    chosen, rejected = _given(row, "chosen"), _given(row, "rejected")
    if isinstance(chosen, str) or isinstance(rejected, str):
        return _texts(row, prompt, chosen or "", rejected or "")
    chosen, rejected = chosen or [], rejected or []
    if (len(chosen), len(rejected)) == (2, 1) and not (
        isinstance(chosen[0], dict) and chosen[0]["role"] == "user"
    ):
        return wrpo(row | {"prompt": prompt})
    asked = _turns(prompt) if prompt else []
    answers = _turns(chosen), _turns(rejected)
    if not asked and answers[0]:
        if answers[0][0]["role"] == "assistant":
            _refuse_unnamed(row)
        else:
            _refuse_unread(_besides(row))
    chats = [_chat(asked, turns) for turns in answers]
    if None in chats and all(answers):
        return "the chat does not hold the prompt"
    pair = "no answer" if None in chats else _shared(*chats)
    return {"prompt": asked, "responses": {}} if asked and isinstance(pair, str) else pair


def _given(row: dict, name: str) -> str | list | None:
    """Return a row's answer, as text or turns."""
    answer = row.get(name)
    if isinstance(answer, dict):
        return [answer]
    if not isinstance(answer, str | list | None):
        raise ValueError(f"`{name}` is neither a text nor turns, but {answer!r:.80}")
    return answer


def _texts(row: dict, prompt: str | list | None, chosen: str, rejected: str) -> dict | str:
    """Read a pair of texts; without a prompt, that is what both begin with, up to a blank."""
    if prompt is not None:
        return {"prompt": prompt, "responses": {"chosen": chosen, "rejected": rejected}}
    if TURN.match(chosen):
        _refuse_unread(_besides(row))
        return hh(row)
    _refuse_unnamed(row)
    same = os.path.commonprefix([chosen, rejected])
    blanks = [blank.start() for blank in re.finditer(r"\s+", same)]
    cut = max(blanks, default=0)  # not within a word
    said = {"chosen": chosen[cut:], "rejected": rejected[cut:]}
    return {"prompt": chosen[:cut], "responses": said}


def _chat(asked: list[dict], turns: list[dict]) -> list[dict] | None:
    """Return the whole chat of a prompt and an answer's turns, which may repeat the prompt's.

    The system's turn stands in front, whichever of the two has it. None is returned where both have
    one and they differ, and where the answer has a user's turns, but not those of the prompt that
    it should answer: side by side they would ask twice.
    """
    if not turns:
        return asked
    front, asked = _system_first(asked)
    theirs, turns = _system_first(turns)
    if front and theirs and _words_of(front[0]) != _words_of(theirs[0]):
        return None
    front = front or theirs
    before = [_words_of(turn) for turn in turns[:-1]]
    told = [_words_of(turn) for turn in asked]
    starts = range(len(before) - len(told) + 1)
    if any(
        before[start : start + len(told)] == told for start in starts
    ):  # the whole chat is there
        return front + turns
    for size in range(min(len(told), len(before)), 0, -1):
        if told[-size:] == before[:size]:
            return front + asked + turns[size:]
    if asked[-1]["role"] == "user" and turns[:1] and turns[0]["role"] == "user":
        return None
    return front + asked + turns


def _system_first(turns: list[dict]) -> tuple[list[dict], list[dict]]:
    """Return the system's turn in front, if there is one, and the other turns."""
    first = 1 if turns and turns[0]["role"] == "system" else 0
    return turns[:first], turns[first:]


def _words_of(turn: dict) -> tuple[str, str]:
    """Return who says what in a turn, whatever the blanks."""
    return turn["role"], " ".join((turn["content"] or "").split())


def wrpo(row: dict) -> dict:
    """Read AALF/ultrafeedback_wrpo: chosen = [best of the sources, best of the target], rejected =
    [its worst].
    """
    said = zip(config.FUSED, map(_last, [*row["chosen"], *row["rejected"]]), strict=True)
    return {
        "prompt": [row["prompt"]] if isinstance(row["prompt"], dict) else row["prompt"],
        "responses": dict(said),
    }


def hh(row: dict) -> dict | str:
    """Read Anthropic/hh-rlhf: two dialogues, a text each, alike but for the last thing the
    assistant says.
    """
    dialogues = []
    for text in (row["chosen"], row["rejected"]):
        before, *parts = TURN.split(text or "")  # who, what, who, what, …
        if before.strip():
            return "words before the first turn"
        turns = zip(parts[::2], parts[1::2], strict=True)
        dialogues.append([{"role": ROLES[who], "content": what.strip()} for who, what in turns])
    return _shared(*dialogues)


def shp(row: dict) -> dict | str:
    """Read stanfordnlp/SHP: a post, and two comments, of which labels = 1 prefers A, 0 prefers
    B.
    """
    if row["labels"] not in (0, 1):
        return "no preference"
    said = [row["human_ref_A"], row["human_ref_B"]][:: 1 if row["labels"] else -1]
    prompt = [{"role": "user", "content": row["history"]}]
    return {"prompt": prompt, "responses": dict(zip(("chosen", "rejected"), said, strict=True))}


def stack_exchange(row: dict) -> dict | str:
    """Read HuggingFaceH4/stack-exchange-preferences: the answer with the highest pm_score, and that
    with the lowest.
    """
    scored = [
        (a["pm_score"], _words(a["text"]))
        for a in row["answers"] or ()
        if a["pm_score"] is not None
    ]
    best, worst = (end(scored, key=lambda answer: answer[0], default=(0, "")) for end in (max, min))
    if best[0] == worst[0]:
        return "no preference"
    prompt = [{"role": "user", "content": _words(row["question"])}]
    return {"prompt": prompt, "responses": {"chosen": best[1], "rejected": worst[1]}}


def imdb(row: dict) -> dict | str:
    """Read stanfordnlp/imdb: a review, and label 1 = positive, 0 = negative; its unlabelled split
    has −1.
    """
    text = " ".join((row["text"] or "").replace("<br />", " ").split())
    return {"text": text, "label": row["label"]} if row["label"] in (0, 1) else "no label"


def asked(row: dict) -> dict:
    """Read prompts alone: a column `prompt`, or AlpacaEval's `instruction`."""
    return {"prompt": question(row), "responses": {}}


SCHEMAS = [  # columns and their adapter; in a file the first that fits
    (("question", "answers"), stack_exchange),
    (("history", "human_ref_A", "human_ref_B", "labels"), shp),
    (("text", "label"), imdb),
    (("chosen", "rejected"), trl),
    (("instruction",), asked),
    (("prompt",), asked),
    (("prompt", "chosen", "rejected"), wrpo),
    (("chosen", "rejected"), hh),  # in a file trl() sees which it is
]
HUB = {
    "HuggingFaceH4/ultrafeedback_binarized": trl,
    "princeton-nlp/llama3-ultrafeedback-armorm": trl,
    "AALF/ultrafeedback_wrpo": wrpo,
    "Anthropic/hh-rlhf": hh,
    "stanfordnlp/SHP": shp,
    "HuggingFaceH4/stack-exchange-preferences": stack_exchange,
    "stanfordnlp/imdb": imdb,
}


def place(ref: str) -> tuple[str, str]:
    """Return where a data set is, a path or "datasets:org/name@revision", and the split after ":",
    or "".
    """
    where, _, part = ref.rpartition(":")
    if not where or "/" in part or Path(ref).expanduser().exists():
        where, part = ref, ""
    local = where.startswith(("/", "./", "../", "~")) or Path(where).exists()
    return where if local else f"datasets:{where}", part


def read(ref: str, streaming: bool = False) -> Iterator[tuple[int, dict | str]]:
    """Yield (number, row or why it is dropped) of a data set, in one random order that is always
    the same.

    ref: a hub id (org/name@revision), a folder, or a file of JSON lines or parquet; ":split" if not
    the training one; "alpaca_eval" is the 805 prompts of the pinned archive. streaming: for a few
    rows of one that is too big to load. Raises ConfigError for columns or a row of no known schema,
    and for a file that cannot be read.
    """
    where, part = place(ref)
    repo = where.removeprefix("datasets:").partition("@")[0]
    part = part or ("train_prefs" if repo.endswith("/ultrafeedback_binarized") else "train")
    table = _load(ref, where, part, streaming)
    columns = _readable(ref, lambda: table.column_names or [*next(iter(table), ())])
    one = HUB.get(repo)
    known = [(names, adapter) for names, adapter in SCHEMAS if one in (None, adapter)]
    adapter = next((adapter for names, adapter in known if set(names) <= set(columns)), None)
    if adapter is None:
        wanted = " or ".join(dict.fromkeys(f"({', '.join(names)})" for names, _ in known))
        names = ", ".join(columns)
        raise config.ConfigError(f"{ref}: has the columns ({names}), expected are {wanted}")
    rows = _in_order(table, streaming)
    while (numbered := _readable(ref, lambda: next(rows, None))) is not None:
        n, given = numbered
        try:
            row = adapter(given)
            reason(row, "pairs")  # reads every part of it
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            words = str(error) if isinstance(error, ValueError) else repr(error)
            problem = f"row {n} is not as {adapter.__name__}() expects it: {words}"
            raise config.ConfigError(f"{ref}: {problem}") from error
        yield n, row


def _in_order(table, streaming: bool) -> Iterator[tuple[int, dict]]:
    """Yield (number, row) in the one random order."""
    if streaming:
        yield from enumerate(table.shuffle(seed=SEED, buffer_size=10_000))
        return
    for n in random.Random(SEED).sample(range(len(table)), len(table)):
        yield n, table[n]


def _load(ref: str, where: str, part: str, streaming: bool):
    import datasets

    datasets.disable_progress_bars()
    path = Path(where).expanduser()

    def load():
        if ref == "alpaca_eval":
            return datasets.Dataset.from_list(
                json.loads(assets.member("llm_eval", ALPACA_BASELINE))
            )
        if where.startswith("datasets:"):
            repo, commit = assets.resolve(where).values()
            return datasets.load_dataset(repo, revision=commit, split=part, streaming=streaming)
        if path.is_dir():
            return datasets.load_dataset(str(path), split=part, streaming=streaming)
        kind = "parquet" if path.suffix.lower() == ".parquet" else "json"
        return datasets.load_dataset(kind, data_files=str(path), split=part, streaming=streaming)

    return _readable(ref, load)


def _readable(ref: str, read):
    """Return read(); raise ConfigError with the data set's name for a file that cannot be read.

    Some of these are only met at a row: text that is no UTF-8, or an archive that ends too early.
    """
    import datasets

    broken = (datasets.exceptions.DatasetsError, ValueError, OSError, StopIteration, EOFError)
    try:
        return read()
    except (*broken, zipfile.BadZipFile, zlib.error, lzma.LZMAError) as error:
        words = repr(error.__cause__ or error)
        if isinstance(error, UnicodeDecodeError):
            words += "; save it as UTF-8"
        raise config.ConfigError(f"{ref}: cannot be read: {words}") from error


def reason(row: dict | str, use: str = "") -> str:
    """Return why a row is of no use, or ""; use: "" for its prompt, "sft" for its first response,
    "pairs" for all.
    """
    if isinstance(row, str):
        return row
    if "text" in row:
        return "" if row["text"] else "empty prompt"
    prompt, said = row["prompt"] or "", [(text or "").strip() for text in row["responses"].values()]
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    roles = [turn["role"] for turn in turns]
    asked = [turn["content"] and turn["content"].strip() for turn in turns]
    if None in asked or not any(asked[-1:]) or roles[-1] == "assistant":
        return "no question"
    if use and not said:
        return "no preference"
    if use and not all(said[: 1 if use == "sft" else None]):
        return "empty response"
    return "equal responses" if use == "pairs" and said[-1] in said[:-1] else ""


def dialogue(prompt: str | list[dict]) -> str:
    """Return a prompt as text that a plain model goes on with; turns become HH's, up to
    "Assistant:".
    """
    if isinstance(prompt, str):
        return prompt
    who = ("Assistant" if turn["role"] == "assistant" else "Human" for turn in prompt)
    return (
        "".join(f"\n\n{w}: {turn['content']}" for w, turn in zip(who, prompt, strict=True))
        + "\n\nAssistant:"
    )


def prompt_row(tokenizer, row: dict, world: config.World, rng: random.Random) -> dict:
    """Return {"prompt_ids"} of a whole prompt, or of a review's beginning, and "text", what a chat
    model is asked.

    "text" is one user's words or several turns, also for a plain model, as a reward model may read
    turns.
    """
    if "text" in row:
        return openings.beginning(tokenizer, row["text"], world, rng)
    prompt, chat = row["prompt"], world.template == "chat"
    made = {
        "prompt_ids": templates.render(
            tokenizer, prompt if chat else dialogue(prompt), world.template
        )
    }
    if chat and isinstance(prompt, list) and [turn["role"] for turn in prompt] == ["user"]:
        prompt = prompt[0]["content"]
    return made | ({"text": prompt} if chat or isinstance(prompt, list) else {})


def prompts(ref: str, world: config.World, tokenizer, most: int) -> tuple[list[dict], Counter]:
    """Return up to `most` different prompts of another data set, and why other rows were dropped.

    They are made as those of `world`, and come out of 20 rows for each. The reasons, with how many
    rows each has, are those of split(), the chat template's refusals among them.
    """
    rows, rng = {}, random.Random(SEED)
    dropped: Counter = Counter()
    for n, row in islice(read(ref, streaming=place(ref)[0].startswith("datasets:")), 20 * most):
        if len(rows) == most:
            break
        why = reason(row)
        try:
            if not why:
                made = prompt_row(tokenizer, row, world, rng)
                why = _unfit(made, row, world, rows)
        except templates.RowError as error:
            why = error.reason
        if why:
            dropped[why] += 1
            continue
        rows[_key(row)] = {"id": f"E{n}"} | made
    return list(rows.values()), dropped


def _unfit(made: dict, row: dict, world: config.World, taken, paired: bool = False) -> str:
    """Return why a prompt is not drawn, or ""; those of given pairs may have any length."""
    if _key(row) in taken:
        return "repeated prompt"
    whole = "text" not in row and not paired
    if whole and len(made["prompt_ids"]) > world.prompt_tokens[1]:
        return "prompt above world.prompt_tokens"
    return ""


def split(world: config.World, out: Path) -> dict:
    """Write what corpus.split writes, and as pairs.jsonl the data set's own pairs where world.pairs
    is "given".

    Test prompts are drawn first, then dev, then training rows, none with a prompt that was drawn
    before. Sizes asked for count rows of the data set, some of which drop: empty or equal
    responses, no preference, a repeated prompt, one above world.prompt_tokens (not of given pairs:
    the training cuts those), turns that the chat template refuses, and responses that share a token
    with their prompt (templates.encode_response). Prompts are whole, but for reviews, which are cut
    to
    beginnings. Returns sizes, and what was dropped. Raises ConfigError for a data set that is too
    small.
    """
    if world.gold_rows or world.reward_rows:
        raise config.ConfigError(
            f"no reward is trained on {world.dataset}: take a finished one, and no gold_rows"
        )
    draw = _Draw(world, templates.load_tokenizer(assets.tokenizer_dir(world.target)))
    drawn = {"test": draw.rows("test", world.test_prompts)}
    drawn["dev"] = draw.rows("dev", world.dev_prompts)
    train = draw.rows("train", max(world.prompts, world.sft_rows))

    rows = []
    for made, _, responses in train:
        row = {"id": made["id"], "prompt_ids": made["prompt_ids"], "responses": responses}
        rows.append(row)
    first = []
    for row in rows[: world.sft_rows]:
        for response in [*row["responses"].values()][:1]:
            first.append(row | {"responses": {"chosen": response}})
    write_rows(out / "sft.jsonl", first)
    facts = {"sft_rows": len(first)}
    if world.pairs == "given":
        write_rows(out / "pairs.jsonl", rows[: world.prompts])
        facts["pairs"] = len(rows[: world.prompts])
        drawn["train"] = []
    else:
        drawn["train"] = train[: world.prompts]
    for name, file in {"train": "prompts", "dev": "dev_prompts", "test": "test_prompts"}.items():
        (out / f"{file}.json").write_text(
            json.dumps([made for made, _, _ in drawn[name]]), encoding="utf-8"
        )

    held = []  # labelled reviews that a reward is measured on
    if train and "label" in train[0][1]:
        more = islice(draw.pool(world.test_dataset or world.dataset), openings.HELD_OUT)
        held = [row for _, row in more if not reason(row) and _key(row) not in draw.seen]
    texts = [" ".join(row["text"].split()[: world.reward_words]) for row in held]
    labelled = {
        "gold": [[], []],
        "reward": [[], []],
        "held_out": [texts, [row["label"] for row in held]],
    }
    (out / "labelled.json").write_text(json.dumps(labelled), encoding="utf-8")
    return facts | {"held_out": len(held), "dropped": dict(draw.dropped)}


class _Draw:
    """Draw the parts of a split one after the other, none with a prompt of an earlier part."""

    def __init__(self, world: config.World, tokenizer):
        self.world = world
        self.tokenizer = tokenizer
        self.rng = random.Random(SEED)
        self.pools: dict[str, Iterator] = {}  # one a data set, from which all parts draw
        self.seen: set[str] = set()  # prompts
        self.dropped: Counter = Counter()  # why a row was of no use
        self.spare: Counter = Counter()  # dropped rows of a data set, in place of those asked for

    def pool(self, ref: str) -> Iterator[tuple[int, dict | str]]:
        """Return the rows of a data set that are not drawn yet."""
        if ref not in self.pools:
            self.pools[ref] = read(ref)
        return self.pools[ref]

    def rows(self, part: str, most: int) -> list[tuple[dict, dict, dict]]:
        """Return up to `most` rows: each its prompt, the row as read, the responses to train on.

        Raises ConfigError if the data set has too few.
        """
        ref = getattr(self.world, f"{part}_dataset", "") or self.world.dataset
        paired = part == "train" and self.world.pairs == "given"
        use = "pairs" if paired else ""
        if part == "train" and not paired and self.world.sft_rows:
            use = "sft"
        taken = set(self.seen) if paired else self.seen  # a prompt may have several pairs
        rows: list = []
        while len(rows) < most and (found := next(self.pool(ref), None)):
            n, row = found
            why = reason(row, use)
            try:
                if not why:
                    made = prompt_row(self.tokenizer, row, self.world, self.rng)
                    why = _unfit(made, row, self.world, taken, paired)
                if not why:
                    said = self._responses(made, row, use)
            except templates.RowError as error:
                why = error.reason
            if why:
                self.dropped[why] += 1
                self.spare[ref] += 1
                continue
            self.seen.add(_key(row))
            rows.append(({"id": f"{part}{n}"} | made, row, said))
        self.spare[ref] -= most - len(rows)  # one that drops counts as one of those asked for
        if self.spare[ref] < 0 or most and not rows:
            found = f"{len(rows)} of {most} {part} rows; dropped: {dict(self.dropped)}"
            raise config.ConfigError(f"{ref}: {found}")
        return rows

    def _responses(self, made: dict, row: dict, use: str) -> dict[str, list[int]]:
        """Return the responses to train on: all of a pair, the first for SFT, none of a prompt."""
        if not use:
            return {}
        if use == "sft" and "responses" in row:
            row = row | {"responses": dict([*row["responses"].items()][:1])}
        return _said(self.tokenizer, made, row, self.world)


def _said(tokenizer, made: dict, row: dict, world: config.World) -> dict[str, list[int]]:
    """Return a row's responses as token ids; of a review how it goes on, if it does."""
    if "text" in row:
        ids = openings.opening(tokenizer, row["text"], world.sft_tokens)
        return openings.continued(tokenizer, ids, made, world.template)
    prompt = row["prompt"]
    texts = {name: text for name, text in row["responses"].items() if text}
    if world.template == "plain" and isinstance(prompt, list):
        prompt = dialogue(prompt)
        texts = {name: f" {text.strip()}" for name, text in texts.items()}  # after "Assistant:"
    options = {"prompt": prompt, "template": world.template}
    return {
        name: templates.encode_response(tokenizer, text, **options) for name, text in texts.items()
    }


def _key(row: dict) -> str:
    return " ".join((row["text"] if "text" in row else dialogue(row["prompt"])).split())


def _shared(chosen: list[dict], rejected: list[dict]) -> dict | str:
    if not chosen or not rejected or {chosen[-1]["role"], rejected[-1]["role"]} != {"assistant"}:
        return "no answer"
    said = {"chosen": chosen[-1]["content"], "rejected": rejected[-1]["content"]}
    same = chosen[:-1] == rejected[:-1]
    return {"prompt": chosen[:-1], "responses": said} if same else "no shared prompt"


def _last(answer: str | dict | list) -> str:
    return (
        answer
        if isinstance(answer, str)
        else answer["content"]
        if isinstance(answer, dict)
        else _last(answer[-1])
    )


def _words(text: str | None) -> str:
    """Return the words of HTML as Stack Exchange writes it, where < and > that are meant are
    entities.
    """
    return html.unescape(re.sub(r"<[^<>]*>", "", text or "")).strip()
