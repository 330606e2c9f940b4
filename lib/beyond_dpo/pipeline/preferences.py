"""Read preference data, published or a user's own, as rows of one kind, and split them.

A record is one row of a data set as its publisher wrote it. An adapter turns a record into a row
{"prompt": text or chat turns, "responses": {name: text}}, into a labelled text {"text", "label"},
or into a string that says why the record teaches nothing and is dropped.
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
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from itertools import islice
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

from beyond_dpo import templates
from beyond_dpo.pipeline import assets, config, openings
from beyond_dpo.pipeline.settings import World
from beyond_dpo.rows import write_rows

SEED = 20240416  # of the one random order that all seeds of an experiment share
ALPACA_BASELINE = "eval_framework/tasks/alpaca_eval/data/alpaca_eval_gpt4_baseline.json"
HH_TURN = re.compile(r"\n\n(Human|Assistant):")
HH_ROLES = {"Human": "user", "Assistant": "assistant"}

# Names of columns that hold a prompt, a system message, and what else a prompt may refer to.
QUESTIONS = ("prompt", "instruction", "question", "query", "input")
SYSTEMS = ("system", "system_prompt")
CONTEXTS = ("context", "documents", "history", "tools", "image", "images")

# Last words in the names of columns that say something about a record.
IDENTITY = {"id", "ids", "uuid", "idx", "index", "version", "hash", "sha", "order", "status"}
ORIGIN = {"source", "dataset", "subset", "split", "date", "time", "url", "license"}
TOPIC = {"category", "type", "topic", "domain", "tag", "tags", "label", "language", "lang"}
AUTHOR = {"name", "model", "models", "generator", "annotator", "author"}
JUDGEMENT = {"score", "scores", "rating", "ratings", "rank", "difficulty", "rationale", "metadata"}
ABOUT = IDENTITY | ORIGIN | TOPIC | AUTHOR | JUDGEMENT

# Last words in the names of columns that hold a prompt's answers, or its whole chat.
CHATS = {"messages", "generation", "generations", "output", "outputs"}
REPLIES = {"response", "responses", "completion", "completions", "answer", "answers"}
ANSWERS = CHATS | REPLIES

Turns = list[dict]  # of a chat, each {"role", "content"}
Prompt = str | Turns
RowOrReason = dict | str  # a row, or why there is none
Responses = dict[str, list[int]]  # name -> token ids


def question(record: dict) -> Prompt | None:
    """Return what a record asks, as text or turns; None if no column of it asks.

    A system message in a column of its own becomes the first turn.
    Raises ValueError for columns that ask different things, and for columns whose words would be
    left out of the prompt.
    """
    present = _filled(record, QUESTIONS)
    different = {json.dumps(value) for value in present.values()}
    if len(different) > 1:
        names = " and ".join(present)
        raise ValueError(f"the columns {names} ask different things: join them in one, `prompt`")
    contexts = _filled(record, CONTEXTS)
    _refuse_unread(list(contexts))
    if present:
        _refuse_unread(_unread_beside_prompt(record))
    prompt = _first_column(record, QUESTIONS)
    if isinstance(prompt, dict | list):
        prompt = _turns(prompt)
    system = _first_column(record, SYSTEMS)
    if not system:
        return prompt
    return _after_system(system, prompt)


def _filled(record: dict, names: tuple[str, ...]) -> dict:
    """Return those of the named columns that hold anything, not None and not empty."""
    return {name: record[name] for name in names if record.get(name)}


def _first_column(record: dict, names: tuple[str, ...]):
    """Return the value of the first of the named columns that holds anything, or an empty one's."""
    for value in _filled(record, names).values():
        return value
    for name in names:
        if record.get(name) is not None:
            return record[name]
    return None


def _after_system(system: str, prompt: Prompt | None) -> Turns:
    """Return a prompt as turns that begin with the system message."""
    if not prompt:
        raise ValueError("a system's words without a prompt: give a column `prompt` too")
    turns = _turns(prompt)
    if turns[0]["role"] != "system":
        return [{"role": "system", "content": system}, *turns]
    if turns[0]["content"] != system:
        raise ValueError("the system's column and its turn in the prompt differ: keep one of them")
    return turns


def _turns(prompt: Prompt | dict | None) -> Turns:
    """Return a prompt as turns, without those fields of a turn that are None.

    Arrow gives every turn the fields of all other turns. Only role and content are always kept.
    """
    if isinstance(prompt, str):
        prompt = _user_turn(prompt)
    if isinstance(prompt, dict):
        prompt = [prompt]
    turns = []
    for turn in prompt or []:
        if not isinstance(turn, dict) or "role" not in turn:
            raise ValueError(f'a turn is {{"role": …, "content": …}}, got {turn!r:.80}')
        kept = {name: value for name, value in turn.items() if value is not None}
        kept["role"] = turn["role"]
        kept["content"] = turn.get("content")
        turns.append(kept)
    return turns


def _user_turn(text: str) -> dict:
    return {"role": "user", "content": text}


def _refuse_unread(columns: list[str]) -> None:
    """Raise ValueError if there are columns whose words would be left out of the prompt."""
    if columns:
        name = columns[0]
        todo = "put it into the prompt, or take it out"
        raise ValueError(f"the column {name} would be left out: {todo}")


def _refuse_unnamed_question(record: dict) -> None:
    """Raise ValueError if a record without a prompt has a column that may hold its question."""
    unread = _unread_columns(record)
    if unread:
        names = ", ".join(unread)
        todo = "rename what asks to `prompt`, drop the rest"
        raise ValueError(f"no column `prompt`, and nothing reads {names}: {todo}")


def _unread_beside_prompt(record: dict) -> list[str]:
    """Return the columns beside a prompt that may belong to it: neither answers nor whole chats."""
    unread = _unread_columns(record)
    return [name for name in unread if _last_word(name) not in ANSWERS]


def _unread_columns(record: dict) -> list[str]:
    """Return the columns with words that no adapter reads and that are not about the record."""
    unread = []
    for name, value in record.items():
        parts = re.split(r"[\W_]+", name.lower())
        is_prompt = name in (*QUESTIONS, *SYSTEMS, *CONTEXTS)
        is_answer = "chosen" in parts or "rejected" in parts
        if is_prompt or is_answer or _last_word(name) in ABOUT:
            continue
        if _holds_words(value):
            unread.append(name)
    return unread


def _last_word(name: str) -> str:
    """Return the last word of a column's name, as "response" of "response_0" or "response_b"."""
    parts = re.findall(r"[^\W\d_]{2,}", name.lower())
    return parts[-1] if parts else ""


def _holds_words(value) -> bool:
    """Return whether a value is text, or holds any: not a number, nor a list of scores."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return any(_holds_words(item) for item in value)
    return isinstance(value, str) and bool(value.strip())


def trl(record: dict) -> RowOrReason:
    """Read prompt, chosen and rejected in every form that TRL takes.

    Each is text or turns, and the prompt is a column or what both answers begin with.
    HuggingFaceH4/ultrafeedback_binarized and princeton-nlp/llama3-ultrafeedback-armorm have a text
    as `prompt`, and whole chats as `chosen` and `rejected`. A prompt without answers is one to
    generate for.
    """
    prompt = question(record)
    chosen = _answer(record, "chosen")
    rejected = _answer(record, "rejected")
    if isinstance(chosen, str) or isinstance(rejected, str):
        return _text_pair(record, prompt, chosen or "", rejected or "")
    chosen = chosen or []
    rejected = rejected or []
    if _is_quadruple(chosen, rejected):
        return wrpo({**record, "prompt": prompt})
    return _chat_pair(record, prompt, chosen, rejected)


def _answer(record: dict, name: str) -> Prompt | None:
    """Return a record's answer, as text or turns."""
    answer = record.get(name)
    if isinstance(answer, dict):
        return [answer]
    if not isinstance(answer, str | list | None):
        raise ValueError(f"`{name}` is neither a text nor turns, but {answer!r:.80}")
    return answer


def _pair(prompt: Prompt, chosen: str, rejected: str) -> dict:
    return {"prompt": prompt, "responses": {"chosen": chosen, "rejected": rejected}}


def _text_pair(record: dict, prompt: Prompt | None, chosen: str, rejected: str) -> RowOrReason:
    """Read a pair of texts; without a prompt, that is what both begin with, up to a blank."""
    if prompt is not None:
        return _pair(prompt, chosen, rejected)
    if HH_TURN.match(chosen):
        _refuse_unread(_unread_beside_prompt(record))
        return hh(record)
    _refuse_unnamed_question(record)
    shared = os.path.commonprefix([chosen, rejected])
    blanks = [match.start() for match in re.finditer(r"\s+", shared)]
    cut = max(blanks, default=0)  # the last blank, so that no word is cut in two
    prompt = chosen[:cut]
    return _pair(prompt, chosen[cut:], rejected[cut:])


def _is_quadruple(chosen: list, rejected: list) -> bool:
    """Return whether these are WRPO's two chosen responses and one rejected, not a chat's turns."""
    sizes = (len(chosen), len(rejected))
    if sizes != (2, 1):
        return False
    first = chosen[0]
    opens_a_chat = isinstance(first, dict) and first["role"] != "assistant"
    return not opens_a_chat


def _chat_pair(record: dict, prompt: Prompt | None, chosen: list, rejected: list) -> RowOrReason:
    """Read a pair of answers in turns, each of which may repeat the prompt's turns."""
    prompt_turns = _turns(prompt) if prompt else []
    chosen_turns = _turns(chosen)
    rejected_turns = _turns(rejected)
    if chosen_turns and not prompt_turns:
        _refuse_unread_question(record, chosen_turns)

    chosen_chat = _chat(prompt_turns, chosen_turns)
    rejected_chat = _chat(prompt_turns, rejected_turns)
    if chosen_chat is None or rejected_chat is None:
        if chosen_turns and rejected_turns:
            return "the chat does not hold the prompt"
        pair = "no answer"
    else:
        pair = _pair_of_chats(chosen_chat, rejected_chat)
    if prompt_turns and isinstance(pair, str):
        return {"prompt": prompt_turns, "responses": {}}
    return pair


def _refuse_unread_question(record: dict, answer: Turns) -> None:
    """Raise ValueError for a record without a prompt whose question may be in a column not read."""
    if answer[0]["role"] == "assistant":
        _refuse_unnamed_question(record)
    else:  # the chat begins with its question
        _refuse_unread(_unread_beside_prompt(record))


def _chat(prompt: Turns, answer: Turns) -> Turns | None:
    """Return the whole chat of a prompt and an answer's turns, which may repeat the prompt's.

    A system message stands in front, whichever of the two has it. The result is None where both
    have one and they differ, and where the answer begins with a user's turn that is not in the
    prompt: after the prompt it would ask a second time.
    """
    if not answer:
        return prompt
    prompt_system, prompt = _split_system(prompt)
    answer_system, answer = _split_system(answer)
    if prompt_system and answer_system:
        if _spoken(prompt_system[0]) != _spoken(answer_system[0]):
            return None
    system = prompt_system or answer_system

    spoken_prompt = [_spoken(turn) for turn in prompt]
    spoken_before = [_spoken(turn) for turn in answer[:-1]]  # all but the response itself
    if _contains(spoken_before, spoken_prompt):
        return system + answer
    repeated = _overlap(spoken_prompt, spoken_before)
    border = [*prompt[-1:], *answer[:1]]
    asks_twice = _roles(border) == ["user", "user"]
    if asks_twice and not repeated:
        return None
    return system + prompt + answer[repeated:]


def _roles(turns: Turns) -> list[str]:
    return [turn["role"] for turn in turns]


def _split_system(turns: Turns) -> tuple[Turns, Turns]:
    """Return the system's turn in front, if there is one, and the other turns."""
    has_system = _roles(turns[:1]) == ["system"]
    cut = 1 if has_system else 0
    return turns[:cut], turns[cut:]


def _spoken(turn: dict) -> tuple[str, str]:
    """Return who says what in a turn, whatever the blanks."""
    role = turn["role"]
    content = turn["content"] or ""
    return role, " ".join(content.split())


def _contains(whole: list, part: list) -> bool:
    """Return whether the items of `part` stand side by side somewhere in `whole`."""
    size = len(part)
    last_start = len(whole) - size
    for start in range(last_start + 1):
        if whole[start : start + size] == part:
            return True
    return False


def _overlap(first: list, second: list) -> int:
    """Return how many items at the end of `first` are those at the beginning of `second`."""
    longest = min(len(first), len(second))
    for size in range(longest, 0, -1):
        if first[-size:] == second[:size]:
            return size
    return 0


def _pair_of_chats(chosen: Turns, rejected: Turns) -> RowOrReason:
    """Return the row of two whole chats that differ in the last turn, or why there is none."""
    chosen_answer = chosen[-1:]
    rejected_answer = rejected[-1:]
    if _roles(chosen_answer + rejected_answer) != ["assistant", "assistant"]:
        return "no answer"
    prompt = chosen[:-1]
    if prompt != rejected[:-1]:
        return "no shared prompt"
    return _pair(prompt, chosen_answer[0]["content"], rejected_answer[0]["content"])


def wrpo(record: dict) -> dict:
    """Read AALF/ultrafeedback_wrpo: two chosen responses and a rejected one.

    `chosen` is [best of the sources, best of the target], `rejected` [worst of the target].
    """
    answers = [*record["chosen"], *record["rejected"]]
    responses = {}
    for name, answer in zip(config.FUSED, answers, strict=True):
        responses[name] = _last_content(answer)
    prompt = record["prompt"]
    if isinstance(prompt, dict):
        prompt = [prompt]
    return {"prompt": prompt, "responses": responses}


def _last_content(answer: str | dict | list) -> str:
    """Return the text of an answer: itself, a turn's, or that of a chat's last turn."""
    if isinstance(answer, str):
        return answer
    if isinstance(answer, dict):
        return answer["content"]
    return _last_content(answer[-1])


def hh(record: dict) -> RowOrReason:
    """Read Anthropic/hh-rlhf: two dialogues, each a text, alike up to the assistant's last turn."""
    chosen = _hh_turns(record["chosen"])
    rejected = _hh_turns(record["rejected"])
    if chosen is None or rejected is None:
        return "words before the first turn"
    return _pair_of_chats(chosen, rejected)


def _hh_turns(dialogue_text: str | None) -> Turns | None:
    """Return the turns of a dialogue; None if words stand before its first turn."""
    before, *parts = HH_TURN.split(dialogue_text or "")
    if before.strip():
        return None
    speakers = parts[::2]  # parts are in turn a speaker and what this one says
    contents = parts[1::2]
    turns = []
    for speaker, content in zip(speakers, contents, strict=True):
        role = HH_ROLES[speaker]
        turns.append({"role": role, "content": content.strip()})
    return turns


def shp(record: dict) -> RowOrReason:
    """Read stanfordnlp/SHP: a post and two comments; labels is 1 if A is preferred, 0 if B is."""
    prompt = [_user_turn(record["history"])]
    first = record["human_ref_A"]
    second = record["human_ref_B"]
    if record["labels"] == 1:
        return _pair(prompt, first, second)
    if record["labels"] == 0:
        return _pair(prompt, second, first)
    return "no preference"


def stack_exchange(record: dict) -> RowOrReason:
    """Read HuggingFaceH4/stack-exchange-preferences: the answers of highest and lowest pm_score."""
    answers = record["answers"] or []
    scored = [answer for answer in answers if answer["pm_score"] is not None]
    if not scored:
        return "no preference"
    best = max(scored, key=itemgetter("pm_score"))
    worst = min(scored, key=itemgetter("pm_score"))
    if best["pm_score"] == worst["pm_score"]:
        return "no preference"
    prompt = _user_turn(_html_text(record["question"]))
    chosen = _html_text(best["text"])
    rejected = _html_text(worst["text"])
    return _pair([prompt], chosen, rejected)


def _html_text(page: str | None) -> str:
    """Return the text of HTML as Stack Exchange writes it, with entities for < and > in a text."""
    without_tags = re.sub(r"<[^<>]*>", "", page or "")
    text = html.unescape(without_tags)
    return text.strip()


def imdb(record: dict) -> RowOrReason:
    """Read stanfordnlp/imdb: a review and its label, 1 positive, 0 negative, −1 unlabelled."""
    label = record["label"]
    if label not in (0, 1):
        return "no label"
    review = record["text"] or ""
    review = review.replace("<br />", " ")
    return {"text": " ".join(review.split()), "label": label}


def asked(record: dict) -> dict:
    """Read prompts alone: a column `prompt`, or AlpacaEval's `instruction`."""
    return {"prompt": question(record), "responses": {}}


SCHEMAS = [  # columns and their adapter; a file is read by the first whose columns it has
    (("question", "answers"), stack_exchange),
    (("history", "human_ref_A", "human_ref_B", "labels"), shp),
    (("text", "label"), imdb),
    (("chosen", "rejected"), trl),
    (("instruction",), asked),
    (("prompt",), asked),
    # Only for data sets in HUB: in a file trl() sees which of these two it is.
    (("prompt", "chosen", "rejected"), wrpo),
    (("chosen", "rejected"), hh),
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
    """Return where a data set is, and the name of its split, "" if `ref` names none.

    The first is a path, or "datasets:org/name@revision" for a data set on the hub. The second is
    what follows the last ":" of `ref`.
    """
    location, _, split_name = ref.rpartition(":")
    file = Path(ref).expanduser()
    if not location or "/" in split_name or file.exists():
        location = ref
        split_name = ""
    looks_local = location.startswith(("/", "./", "../", "~"))
    if looks_local or Path(location).exists():
        return location, split_name
    return f"datasets:{location}", split_name


def read(ref: str, streaming: bool = False) -> Iterator[tuple[int, RowOrReason]]:
    """Yield (number, row or why it is dropped) of a data set, in one random, fixed order.

    Args:
        ref: a hub id (org/name@revision), a folder, or a file of JSON lines or parquet, with
            ":split" if not the training one; "alpaca_eval" is the 805 prompts of the pinned
            archive.
        streaming: for a few rows of a data set that is too big to load.
    Raises:
        ConfigError: columns or a record of no known schema, or a file that cannot be read.
    """
    location, split_name = place(ref)
    repo = location.removeprefix("datasets:").partition("@")[0]
    if not split_name:
        is_binarized = repo.endswith("/ultrafeedback_binarized")
        split_name = "train_prefs" if is_binarized else "train"
    with _naming_broken_file(ref):
        table = _load(ref, location, split_name, streaming)
        columns = table.column_names
        if not columns:  # a stream may know them only from its first record
            columns = list(next(iter(table), ()))
    adapter = _adapter(ref, repo, columns)

    records = _in_order(table, streaming)
    while True:
        with _naming_broken_file(ref):
            numbered = next(records, None)
        if numbered is None:
            return
        number, record = numbered
        try:
            row = _adapted(adapter, record)
        except ValueError as error:
            problem = f"row {number} is not as {adapter.__name__}() expects it: {error}"
            raise config.ConfigError(f"{ref}: {problem}") from error
        yield number, row


def _adapted(adapter, record: dict) -> RowOrReason:
    """Return what an adapter makes of a record; raise ValueError for one that it cannot read."""
    try:
        row = adapter(record)
        reason(row, "pairs")  # reads every part of the row
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(repr(error)) from error
    return row


def _adapter(ref: str, repo: str, columns: list[str]):
    """Return the adapter for a data set's columns; for one in HUB only that adapter will do."""
    known = []
    for names, adapter in SCHEMAS:
        if repo in HUB and adapter is not HUB[repo]:
            continue
        if set(names) <= set(columns):
            return adapter
        known.append("(" + ", ".join(names) + ")")
    expected = " or ".join(dict.fromkeys(known))
    present = ", ".join(columns)
    raise config.ConfigError(f"{ref}: has the columns ({present}), expected are {expected}")


def _load(ref: str, location: str, split_name: str, streaming: bool):
    """Return a data set of the library `datasets`."""
    import datasets

    datasets.disable_progress_bars()
    if ref == "alpaca_eval":
        baseline = json.loads(assets.member("llm_eval", ALPACA_BASELINE))
        return datasets.Dataset.from_list(baseline)
    path = Path(location).expanduser()
    data_files = None
    revision = None
    if location.startswith("datasets:"):
        loader, revision = assets.resolve(location).values()
    elif path.is_dir():
        loader = str(path)
    else:
        loader = "parquet" if path.suffix.lower() == ".parquet" else "json"
        data_files = str(path)
    return datasets.load_dataset(
        loader, data_files=data_files, revision=revision, split=split_name, streaming=streaming
    )


def _in_order(table, streaming: bool) -> Iterator[tuple[int, dict]]:
    """Yield (number, record) in the one random order."""
    if streaming:
        yield from enumerate(table.shuffle(seed=SEED, buffer_size=10_000))
        return
    numbers = range(len(table))
    rng = random.Random(SEED)
    for number in rng.sample(numbers, len(numbers)):
        yield number, table[number]


@contextmanager
def _naming_broken_file(ref: str) -> Iterator[None]:
    """Raise ConfigError with the data set's name where a file cannot be read.

    Some of these are only met at a record: text that is no UTF-8, an archive that ends too early.
    """
    import datasets

    broken_table = (datasets.exceptions.DatasetsError, ValueError, StopIteration)
    broken_archive = (OSError, EOFError, zipfile.BadZipFile, zlib.error, lzma.LZMAError)
    try:
        yield
    except (*broken_table, *broken_archive) as error:
        detail = repr(error.__cause__ or error)
        if isinstance(error, UnicodeDecodeError):
            detail += "; save it as UTF-8"
        raise config.ConfigError(f"{ref}: cannot be read: {detail}") from error


def reason(row: RowOrReason, use: str = "") -> str:
    """Return why a row is of no use, or "".

    use: what it is wanted for, "" its prompt alone, "sft" its first response, "pairs" all of them.
    """
    if isinstance(row, str):
        return row
    if "text" in row:
        return "" if row["text"] else "empty prompt"
    responses = [_stripped(text) for text in row["responses"].values()]
    if not _asks(row["prompt"] or ""):
        return "no question"
    if not use:
        return ""
    if not responses:
        return "no preference"
    needed = responses[:1] if use == "sft" else responses
    if not all(needed):
        return "empty response"
    last = responses[-1]
    if use == "pairs" and last in responses[:-1]:
        return "equal responses"
    return ""


def _stripped(text: str | None) -> str:
    return text.strip() if text else ""


def _asks(prompt: Prompt) -> bool:
    """Return whether a prompt ends with words that are not the assistant's, and no turn is None."""
    if isinstance(prompt, str):
        return bool(prompt.strip())
    roles = _roles(prompt)
    contents = [turn["content"] for turn in prompt]
    texts = [_stripped(content) for content in contents]
    if None in contents or roles[-1] == "assistant":
        return False
    return bool(texts[-1])


def dialogue(prompt: Prompt) -> str:
    """Return a prompt as text that a plain model goes on with.

    Turns become a dialogue as Anthropic/hh-rlhf writes it, up to "Assistant:".
    """
    if isinstance(prompt, str):
        return prompt
    text = ""
    for turn in prompt:
        speaker = "Assistant" if turn["role"] == "assistant" else "Human"
        text += f"\n\n{speaker}: {turn['content']}"
    return f"{text}\n\nAssistant:"


def prompt_row(tokenizer, row: dict, world: World, rng: random.Random) -> dict:
    """Return {"prompt_ids"} of a whole prompt or of a review's beginning, and "text" in a chat.

    "text" is one user's words or several turns. Turns are kept for a plain model too, as a reward
    model may read them.
    """
    if "text" in row:
        return openings.beginning(tokenizer, row["text"], world, rng)
    prompt = row["prompt"]
    if world.template == "chat":
        prompt_ids = templates.render(tokenizer, prompt, "chat")
        return {"prompt_ids": prompt_ids, "text": _as_text(prompt)}
    prompt_ids = templates.render(tokenizer, dialogue(prompt), world.template)
    if isinstance(prompt, list):
        return {"prompt_ids": prompt_ids, "text": prompt}
    return {"prompt_ids": prompt_ids}


def _as_text(prompt: Prompt) -> Prompt:
    """Return the words of a prompt that is one user's turn; other prompts as they are."""
    if isinstance(prompt, str):
        return prompt
    is_one_question = _roles(prompt) == ["user"]
    return prompt[0]["content"] if is_one_question else prompt


def prompts(ref: str, world: World, tokenizer, most: int) -> tuple[list[dict], Counter]:
    """Return up to `most` different prompts of another data set, and why other rows were dropped.

    They are made as those of `world`, from the first 20 · `most` rows. The reasons, with how many
    rows each has, are those of split(), the chat template's refusals among them.
    """
    location, _ = place(ref)
    is_on_hub = location.startswith("datasets:")
    rows = read(ref, streaming=is_on_hub)
    first_rows = islice(rows, 20 * most)
    rng = random.Random(SEED)
    prompt_rows: dict[str, dict] = {}
    dropped: Counter = Counter()
    for number, row in first_rows:
        if len(prompt_rows) == most:
            break
        try:
            prompt = _usable_prompt(tokenizer, row, world, rng, taken=prompt_rows)
        except templates.RowError as error:
            dropped[error.reason] += 1
            continue
        text = _prompt_text(row)
        prompt_rows[text] = {"id": f"E{number}", **prompt}
    return list(prompt_rows.values()), dropped


def _usable_prompt(
    tokenizer,
    row: RowOrReason,
    world: World,
    rng: random.Random,
    *,
    taken: Collection[str],
    use: str = "",
) -> dict:
    """Return prompt_row() of a row; raise RowError with the reason if it is of no use.

    taken: the texts of prompts that may not be drawn again. use: as in reason(). The prompts of
    given pairs may have any length, as the training cuts them, and reviews are cut here.
    """
    problem = reason(row, use)
    if problem:
        raise templates.RowError(problem)
    prompt = prompt_row(tokenizer, row, world, rng)
    if _prompt_text(row) in taken:
        raise templates.RowError("repeated prompt")
    _, longest = world.prompt_tokens
    may_be_longer = use == "pairs" or "text" in row
    if not may_be_longer and len(prompt["prompt_ids"]) > longest:
        raise templates.RowError("prompt above world.prompt_tokens")
    return prompt


def _prompt_text(row: dict) -> str:
    """Return a row's prompt as one text, by which a repeated prompt is known."""
    if "text" in row:
        text = row["text"]
    else:
        text = dialogue(row["prompt"])
    return " ".join(text.split())


def split(world: World, out: Path) -> dict:
    """Write the files of corpus.split, and pairs.jsonl where world.pairs is "given".

    Test prompts are drawn first, then dev, then training rows, none with a prompt that was drawn
    before. Sizes asked for count rows of the data set, some of which drop: empty or equal
    responses, no preference, a repeated prompt, one above world.prompt_tokens (not of given pairs:
    the training cuts those), turns that the chat template refuses, and responses that share a token
    with their prompt (templates.encode_response). Prompts are whole, but those of reviews are their
    beginnings. Returns the sizes, and how many rows were dropped for which reason.
    Raises ConfigError for a data set that is too small.
    """
    if world.gold_rows or world.reward_rows:
        raise config.ConfigError(
            f"no reward is trained on {world.dataset}: take a finished one, and no gold_rows"
        )
    test_dataset = world.test_dataset or world.dataset
    dev_dataset = world.dev_dataset or world.dataset
    tokenizer = templates.load_tokenizer(assets.tokenizer_dir(world.target))
    draw = _Draw(world, tokenizer)
    test = draw.rows("test", test_dataset, world.test_prompts)
    dev = draw.rows("dev", dev_dataset, world.dev_prompts)
    train_rows = max(world.prompts, world.sft_rows)
    train = draw.rows("train", world.dataset, train_rows, use=_training_use(world))

    facts = _write_training_files(world, train, out)
    _write_prompts(out / "dev_prompts.json", dev)
    _write_prompts(out / "test_prompts.json", test)
    held_out = []
    if train and "label" in train[0].row:
        held_out = draw.labelled(test_dataset)
    _write_labelled(out / "labelled.json", held_out, world.reward_words)
    return {**facts, "held_out": len(held_out), "dropped": dict(draw.dropped)}


def _training_use(world: World) -> str:
    """Return what the training rows are wanted for, as reason() takes it."""
    if world.pairs == "given":
        return "pairs"
    return "sft" if world.sft_rows else ""


class _Drawn(NamedTuple):
    """A row that was drawn: its prompt, the row as read, the responses to train on."""

    prompt: dict  # "id", "prompt_ids", and "text" as of prompt_row()
    row: dict
    responses: Responses


def _write_training_files(world: World, train: list[_Drawn], out: Path) -> dict:
    """Write sft.jsonl, prompts.json and given pairs; return the number of SFT rows and of pairs."""
    rows = []
    for drawn in train:
        row = {
            "id": drawn.prompt["id"],
            "prompt_ids": drawn.prompt["prompt_ids"],
            "responses": drawn.responses,
        }
        rows.append(row)
    sft_rows = []
    for row in rows[: world.sft_rows]:
        responses = list(row["responses"].values())
        if responses:  # a review that does not go on has none
            sft_rows.append({**row, "responses": {"chosen": responses[0]}})
    write_rows(out / "sft.jsonl", sft_rows)
    facts = {"sft_rows": len(sft_rows)}
    if world.pairs == "given":
        pairs = rows[: world.prompts]
        write_rows(out / "pairs.jsonl", pairs)
        facts["pairs"] = len(pairs)
        _write_prompts(out / "prompts.json", [])
    else:
        _write_prompts(out / "prompts.json", train[: world.prompts])
    return facts


def _write_prompts(file: Path, rows: list[_Drawn]) -> None:
    prompt_rows = [drawn.prompt for drawn in rows]
    file.write_text(json.dumps(prompt_rows), encoding="utf-8")


def _write_labelled(file: Path, held_out: list[dict], most_words: int) -> None:
    """Write the labelled reviews that a reward is measured on; none are there to train it on."""
    texts = []
    labels = []
    for row in held_out:
        first_words = row["text"].split()[:most_words]
        texts.append(" ".join(first_words))
        labels.append(row["label"])
    parts = {
        "gold": [[], []],
        "reward": [[], []],
        "held_out": [texts, labels],
    }
    file.write_text(json.dumps(parts), encoding="utf-8")


class _Draw:
    """Draw the parts of a split one after the other, none with a prompt of an earlier part."""

    def __init__(self, world: World, tokenizer):
        self.world = world
        self.tokenizer = tokenizer
        self.rng = random.Random(SEED)
        self.pools: dict[str, Iterator] = {}  # one a data set, from which all parts draw
        self.seen: set[str] = set()  # texts of the prompts that were drawn
        self.dropped: Counter = Counter()  # reason -> rows
        self.spare: Counter = Counter()  # data set -> dropped rows, in place of those asked for

    def pool(self, ref: str) -> Iterator[tuple[int, RowOrReason]]:
        """Return the rows of a data set that are not drawn yet."""
        if ref not in self.pools:
            self.pools[ref] = read(ref)
        return self.pools[ref]

    def rows(self, part: str, ref: str, most: int, use: str = "") -> list[_Drawn]:
        """Return up to `most` rows of a data set that are of `use`, as reason() takes it.

        A prompt may have several given pairs, so these may share it with one another.
        Raises ConfigError if the data set has too few.
        """
        taken = set(self.seen) if use == "pairs" else self.seen
        rows: list[_Drawn] = []
        while len(rows) < most:
            numbered = next(self.pool(ref), None)
            if numbered is None:
                break
            number, row = numbered
            try:
                prompt = _usable_prompt(
                    self.tokenizer, row, self.world, self.rng, taken=taken, use=use
                )
                responses = self._responses(prompt, row, use)
            except templates.RowError as error:
                self.dropped[error.reason] += 1
                self.spare[ref] += 1
                continue
            self.seen.add(_prompt_text(row))
            named_prompt = {"id": f"{part}{number}", **prompt}
            rows.append(_Drawn(named_prompt, row, responses))
        self._require_enough(part, ref, most, len(rows))
        return rows

    def labelled(self, ref: str) -> list[dict]:
        """Return the next labelled reviews of a data set that were not drawn."""
        reviews = []
        for _, row in islice(self.pool(ref), openings.HELD_OUT):
            if reason(row):
                continue
            if _prompt_text(row) not in self.seen:
                reviews.append(row)
        return reviews

    def _require_enough(self, part: str, ref: str, most: int, count: int) -> None:
        """Raise ConfigError if a data set is too small: a dropped row is one of those asked for."""
        missing = most - count
        self.spare[ref] -= missing
        is_empty = most > 0 and count == 0
        if is_empty or self.spare[ref] < 0:
            reasons = dict(self.dropped)
            shortage = f"{count} of {most} {part} rows; dropped: {reasons}"
            raise config.ConfigError(f"{ref}: {shortage}")

    def _responses(self, prompt: dict, row: dict, use: str) -> Responses:
        """Return the responses to train on: all of a pair, the first for SFT, none of a prompt."""
        if not use:
            return {}
        if use == "sft" and "responses" in row:
            first_response = islice(row["responses"].items(), 1)
            row = {**row, "responses": dict(first_response)}
        return encoded_responses(self.tokenizer, prompt, row, self.world)


def encoded_responses(tokenizer, prompt: dict, row: dict, world: World) -> Responses:
    """Return a row's responses as token ids; of a review how it goes on, if it does.

    prompt: as prompt_row() returns it. Raises RowError for a response that shares a token with it.
    """
    if "text" in row:
        ids = openings.opening(tokenizer, row["text"], world.sft_tokens)
        return openings.continued(tokenizer, ids, prompt, world.template)
    context = row["prompt"]
    is_dialogue = world.template == "plain" and isinstance(context, list)
    if is_dialogue:
        context = dialogue(context)
    responses = {}
    for name, text in row["responses"].items():
        if not text:
            continue
        if is_dialogue:
            text = f" {text.strip()}"  # after "Assistant:"
        responses[name] = templates.encode_response(
            tokenizer, text, prompt=context, template=world.template
        )
    return responses
