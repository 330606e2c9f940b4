"""Texts and chats to token ids: the only place where templates, BOS and end tokens are handled.

Every back-end receives token ids, never strings.
"""

import json
import re
from datetime import date
from functools import lru_cache
from pathlib import Path

from beyond_dpo.rows import prepare

# What a chat template that writes today's date writes, on any day.
DATE = date(2024, 7, 26)
# Texts before a response whose prompt is not known. The first that shares no token with the
# response is taken.
BEFORE = ("a", "\n", ".", "1")
ANY_PROMPT = [{"role": "user", "content": "a"}]  # a chat's prompt, where any will do
JOINED = "the prompt's tokens do not begin those of prompt and response"


class RowError(ValueError):
    """One row cannot become tokens.

    `reason` is the same for all rows of its kind, to drop and count them.
    """

    def __init__(self, reason: str, row=""):
        message = f"{reason}: {row!r:.80}" if row else reason
        super().__init__(message)
        self.reason = reason


@lru_cache(maxsize=8)
def load_tokenizer(path):
    """Load the tokenizer of a local model folder.

    One without a pad token pads with its end token. Masks never come from `== pad_id`, so pad and
    end may be one token (as in SmolLM2).
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(path))
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def without_none(value):
    """Return JSON without the fields that are None.

    Arrow gives every turn the fields of all other turns, and templates ask whether one is there.
    """
    if isinstance(value, dict):
        present = {name: field for name, field in value.items() if field is not None}
        return {name: without_none(field) for name, field in present.items()}
    if isinstance(value, list):
        return [without_none(item) for item in value]
    return value


def chat_ids(tokenizer, turns: list[dict], **options) -> list[int]:
    """Return the token ids of chat turns, as the tokenizer's template writes them.

    Fields that are None do not reach the template, and a template that writes today's date writes
    `DATE`, so the same turns are the same tokens on any day.
    options: of tokenizer.apply_chat_template().
    Raises ValueError without a template, and RowError for turns that the template refuses.
    """
    ids = _apply_template(tokenizer, turns, tokenize=True, **options)
    return list(ids)


def _apply_template(tokenizer, turns: list[dict], **options) -> list[int] | str:
    """Return what the chat template makes of turns: token ids, or a text with tokenize=False."""
    import jinja2

    if not tokenizer.chat_template:
        name = tokenizer.name_or_path or "tokenizer"
        raise ValueError(f'{name} has no chat template: use template="plain"')
    if "strftime_now" in str(tokenizer.chat_template):
        options["strftime_now"] = DATE.strftime
    turns = without_none(turns)
    try:
        return tokenizer.apply_chat_template(turns, return_dict=False, **options)
    except (jinja2.TemplateError, ValueError, TypeError, LookupError, AttributeError) as error:
        first_line, _, _ = str(error).partition("\n")
        reason = f"the chat template refuses it ({first_line[:80]})"
        raise RowError(reason, turns) from error


@lru_cache(maxsize=8)
def _special_tokens(tokenizer) -> list[str]:
    """Return the markup of a tokenizer, such as "</s>", that a text may only talk about."""
    added = tokenizer.added_tokens_decoder.values()
    return [token.content for token in added if token.special]


def end_tokens(tokenizer) -> list[int]:
    """Return the ids that end a response, for training and sampling alike.

    They are the tokenizer's end token, which closes a plain text; those that generation_config.json
    and config.json of its folder name; and the one with which its chat template closes an
    assistant's turn. Empty if nothing names any.
    """
    # A tokenizer's end token and template can change, so they are part of what is cached.
    template = str(tokenizer.chat_template)
    ends = _end_tokens(tokenizer, tokenizer.eos_token_id, template)
    return list(ends)


def cut_rows(
    tokenizer, rows: list[dict], names: list[str], limits: dict[str, int]
) -> tuple[list[dict], int]:
    """Return rows with the named responses, cut to length, and how many were dropped.

    limits: max_prompt and max_length, in tokens. The tokenizer says which tokens open a prompt and
    close a response. See rows.prepare.
    """
    return prepare(
        rows,
        names,
        max_prompt=limits["max_prompt"],
        max_length=limits["max_length"],
        bos_id=tokenizer.bos_token_id,
        eos_id=end_tokens(tokenizer),
    )


@lru_cache(maxsize=16)
def _end_tokens(tokenizer, eos: int | None, template: str) -> tuple[int, ...]:
    named = _named_end_tokens(tokenizer.name_or_path)
    closing = _closing_token(tokenizer, template)
    return tuple(_known_once([eos, *named, closing]))


def _known_once(tokens: list[int | None]) -> list[int]:
    """Return tokens without None and repetitions, in their order."""
    known: list[int] = []
    for token in tokens:
        if token is not None and token not in known:
            known.append(token)
    return known


def model_end_tokens(folder: str | Path) -> list[int]:
    """Return end_tokens() of a model folder's tokenizer; without one, what its configs name."""
    folder = Path(folder)
    has_tokenizer = any(folder.glob("tokenizer*")) or any(folder.glob("vocab.*"))
    if not has_tokenizer:
        return _named_end_tokens(folder)
    tokenizer = load_tokenizer(str(folder))
    return end_tokens(tokenizer)


def _named_end_tokens(folder: str | Path) -> list[int]:
    """Return the end tokens that generation_config.json and config.json of a model folder name."""
    if not folder:  # a tokenizer that was built, not loaded
        return []
    ends: list[int | None] = []
    for name in ("generation_config.json", "config.json"):
        file = Path(folder, name)
        if not file.is_file():
            continue
        config = json.loads(file.read_text(encoding="utf-8"))
        for part in (config, config.get("text_config") or {}):
            named = part.get("eos_token_id")
            if isinstance(named, list):
                ends += named
            else:
                ends.append(named)
    return _known_once(ends)


@lru_cache(maxsize=16)
def _closing_token(tokenizer, template: str) -> int | None:
    """Return the first added token that a chat template writes after an answer's text, if any."""
    if not tokenizer.chat_template:
        return None
    turns = _with_answer(ANY_PROMPT, "a")
    try:
        whole = chat_ids(tokenizer, turns)
        begun = chat_ids(tokenizer, turns, continue_final_message=True)
    except RowError:  # a template for something else than a chat
        return None
    added = set(tokenizer.added_tokens_decoder)
    # The text's last token may be another one where more text follows it.
    last_of_text = len(begun) - 1
    for token in whole[last_of_text:]:
        if token in added:
            return token
    return None


def _with_answer(turns: list[dict], text: str) -> list[dict]:
    """Return turns and the assistant's answer to them."""
    answer = {"role": "assistant", "content": text}
    return [*turns, answer]


def _literal(tokenizer, text: str) -> list[int]:
    """Return the ids of a text alone; markup in it stays text.

    A review that contains "</s>" is talking about it.
    """
    encoding = tokenizer(text, add_special_tokens=False, split_special_tokens=True)
    return list(encoding["input_ids"])


def render(tokenizer, prompt: str | list[dict], template: str, begun: str = "") -> list[int]:
    """Turn one prompt into the token ids that a model continues.

    A BOS stands in front if the tokenizer puts one there by itself (plain), or its template does
    (chat), never two.

    Args:
        tokenizer: the model's.
        prompt: text, or for "chat" also a list of {"role", "content"} turns that does not end with
            the assistant.
        template: "plain" (the text itself; markup in it stays text) or "chat" (the tokenizer's chat
            template).
        begun: how the answer begins, so that the model goes on right there.
    Raises:
        ValueError: unknown template, no chat template, or two BOS in front.
        RowError: an assistant turn at the end, or turns that the chat template refuses.
        TypeError: the prompt is not what the template takes.
    """
    if template == "plain":
        ids = _plain_ids(tokenizer, prompt, begun)
    elif template == "chat" and begun:
        ids = _begun(tokenizer, _turns(prompt), begun)
    elif template == "chat":
        ids = chat_ids(tokenizer, _turns(prompt), add_generation_prompt=True)
    else:
        raise ValueError(f'template must be "plain" or "chat", got {template!r}')
    if ids[:2] == [tokenizer.bos_token_id] * 2:
        raise ValueError(
            "the rendered prompt starts with two BOS tokens: remove one from the chat template"
        )
    return ids


def _plain_ids(tokenizer, prompt: str, begun: str) -> list[int]:
    if not isinstance(prompt, str):
        raise TypeError(
            f'template "plain" takes a string, got {type(prompt).__name__}; use "chat" for turns'
        )
    ids = _literal(tokenizer, prompt + begun)
    front = tokenizer("a", add_special_tokens=True)["input_ids"][:1]
    if front == [tokenizer.bos_token_id]:
        return front + ids
    return ids


def _begun(tokenizer, turns: list[dict], text: str) -> list[int]:
    """Return the ids of turns and the beginning of the assistant's answer to them."""
    if _holds_markup(tokenizer, text):
        prompt_ids = render(tokenizer, turns, "chat")
        return prompt_ids + _marked_answer(tokenizer, turns, text)
    chat = _with_answer(turns, text)
    return chat_ids(tokenizer, chat, continue_final_message=True)


def _turns(prompt: str | list[dict]) -> list[dict]:
    """Return a prompt as the turns of a chat."""
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    is_turns = isinstance(prompt, list) and all(isinstance(turn, dict) for turn in prompt)
    if not prompt or not is_turns:
        raise TypeError(
            f'template "chat" takes a string or a non-empty list of turns, got {prompt!r:.80}'
        )
    if prompt[-1].get("role") == "assistant":
        raise RowError(
            "the prompt ends with an assistant turn, so there is nothing to answer: drop that turn"
        )
    return prompt


def encode_response(
    tokenizer,
    text: str,
    *,
    end: bool = True,
    prompt: str | list[dict] | None = None,
    template: str | None = None,
) -> list[int]:
    """Turn a response into token ids: what it adds to the rendering of its prompt.

    The ids are the difference of two whole renderings, of the prompt alone and of prompt and
    response together. So the ids of render() and these, one after the other, are the tokens of the
    whole text: with the blanks that a chat template puts around an answer, and without the mark
    that some tokenizers put at the beginning of a text. Markup in a response stays text, also in a
    chat.

    Args:
        tokenizer: the model's.
        text: the response.
        end: close it, in a chat with the token that ends the template's turn, else with the
            tokenizer's end token. False for a response that was cut.
        prompt: what it answers, as render() takes it; None: any, for one whose ids alone are known.
        template: "plain" or "chat"; None: "chat" where the tokenizer has a chat template.
    Raises:
        RowError: the prompt's ids do not begin the ids of the whole, as the tokenizer joins the
            prompt's end with the response's beginning, or the template writes the prompt in another
            way where a response follows; or the template refuses the turns.
        ValueError: there is no end token, or as render() does.
    """
    if end and not end_tokens(tokenizer):
        name = tokenizer.name_or_path or "tokenizer"
        raise ValueError(f"{name} has no end token: pass end=False")
    if template is None:
        template = "chat" if tokenizer.chat_template else "plain"
    if template == "chat":
        turns = ANY_PROMPT if prompt is None else _turns(prompt)
        return _answer(tokenizer, turns, text, end)
    before = BEFORE if prompt is None else [prompt]
    ids = _continuation(tokenizer, before, text)
    if end:
        ids.append(end_tokens(tokenizer)[0])
    return ids


def _continuation(tokenizer, before: list[str] | tuple[str, ...], text: str) -> list[int]:
    """Return a text's ids after the first of the texts `before` that shares no token with it."""
    for prompt in before:
        prompt_ids = _literal(tokenizer, prompt)
        whole = _literal(tokenizer, prompt + text)
        count = len(prompt_ids)
        if whole[:count] == prompt_ids:
            return whole[count:]
    raise RowError(JOINED, text)


def _answer(tokenizer, turns: list[dict], text: str, end: bool) -> list[int]:
    """Return the ids of an assistant's answer to the turns, closed by what ends it if `end`."""
    prompt_ids = render(tokenizer, turns, "chat")
    whole = _begun(tokenizer, turns, text)
    begun = _after(prompt_ids, whole, text)
    if not end:
        return begun
    ends = end_tokens(tokenizer)
    if not _holds_markup(tokenizer, text):
        whole = chat_ids(tokenizer, _with_answer(turns, text))
        closed = _after(prompt_ids, whole, text)
        added = tokenizer.added_tokens_decoder
        for number, token in enumerate(closed, start=1):
            # An end token that a text may hold, such as a line break, is not the template's.
            if token in ends and token in added:
                return closed[:number]
    closing = _closing_token(tokenizer, str(tokenizer.chat_template))
    if closing is None:
        closing = ends[0]
    return [*begun, closing]


def _after(prompt_ids: list[int], whole: list[int], text: str) -> list[int]:
    """Return what follows a prompt's ids; raise RowError if these do not begin the whole."""
    count = len(prompt_ids)
    if whole[:count] != prompt_ids:
        raise RowError(JOINED, text)
    return whole[count:]


def _holds_markup(tokenizer, text: str) -> bool:
    special_tokens = _special_tokens(tokenizer)
    return any(token in text for token in special_tokens)


def _marked_answer(tokenizer, turns: list[dict], text: str) -> list[int]:
    """Return the ids of an answer whose text holds markup: a </s> in it does not end it."""
    chat = _with_answer(turns, text)
    prompt = _apply_template(tokenizer, turns, tokenize=False, add_generation_prompt=True)
    begun = _apply_template(tokenizer, chat, tokenize=False, continue_final_message=True)
    if not begun.startswith(prompt):
        raise RowError(JOINED, text)
    # After a special token the tokens of a text begin anew.
    special_tokens = _special_tokens(tokenizer)
    any_special = "|".join(map(re.escape, special_tokens))
    last_part = re.split(any_special, prompt)[-1]
    answer = begun.removeprefix(prompt)
    return _continuation(tokenizer, [last_part], answer)
