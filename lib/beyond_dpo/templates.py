"""Texts and chats to token ids: the only place where templates, BOS and end tokens are handled.

Every back-end receives token ids, never strings.
"""

import json
import re
from datetime import date
from functools import lru_cache
from pathlib import Path

import jinja2

DATE = date(2024, 7, 26)  # what a chat template that writes today's date writes, on any day
# Texts before a response whose prompt is not known: the first that shares no token is taken.
BEFORE = ("a", "\n", ".", "1")
ASKED = [{"role": "user", "content": "a"}]  # a chat's prompt, where any will do
JOINED = "the prompt's tokens do not begin those of prompt and response"


class RowError(ValueError):
    """One row cannot become tokens.

    `reason` is the same for all rows of its kind, to drop and count them.
    """

    def __init__(self, reason: str, row=""):
        super().__init__(f"{reason}: {row!r:.80}" if row else reason)
        self.reason = reason


@lru_cache(maxsize=8)
def load_tokenizer(path):
    """Load the tokenizer of a local model folder; where it has no pad token, pad with the end
    token.

    Masks never come from `== pad_id`, so pad and end may be one token (as in SmolLM2).
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
        return {name: without_none(inner) for name, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [without_none(inner) for inner in value]
    return value


def chat_ids(tokenizer, turns: list[dict], **options) -> list[int]:
    """Return the token ids of chat turns, as the tokenizer's template writes them.

    Fields that are None do not reach the template, and a template that writes today's date writes
    `DATE`, so the same turns are the same tokens on any day.
    options: of tokenizer.apply_chat_template().
    Raises ValueError without a template, and RowError for turns that the template refuses.
    """
    return list(_chat(tokenizer, turns, tokenize=True, **options))


def _chat(tokenizer, turns: list[dict], **options) -> list[int] | str:
    """Apply the chat template; with tokenize=False to a text."""
    if not tokenizer.chat_template:
        name = tokenizer.name_or_path or "tokenizer"
        raise ValueError(f'{name} has no chat template: use template="plain"')
    if "strftime_now" in str(tokenizer.chat_template):
        options["strftime_now"] = DATE.strftime
    turns = without_none(turns)
    try:
        return tokenizer.apply_chat_template(turns, return_dict=False, **options)
    except (jinja2.TemplateError, ValueError, TypeError, LookupError, AttributeError) as error:
        words = f"{error}".partition("\n")[0][:80]
        raise RowError(f"the chat template refuses it ({words})", turns) from error


@lru_cache(maxsize=8)
def _special_tokens(tokenizer) -> list[str]:
    """Return the markup of a tokenizer, such as "</s>", that a text may only talk about."""
    return [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]


def end_tokens(tokenizer) -> list[int]:
    """Return the ids that end a response, for training and sampling alike.

    They are the tokenizer's end token, which closes a plain text, those that generation_config.json
    and config.json of its folder name, and the one with which its chat template closes an
    assistant's turn. Empty if nothing names any.
    """
    return list(_end_tokens(tokenizer, tokenizer.eos_token_id, str(tokenizer.chat_template)))


@lru_cache(maxsize=16)
def _end_tokens(tokenizer, eos: int | None, template: str) -> tuple[int, ...]:
    ends = [eos, *_named_end_tokens(tokenizer.name_or_path), _closing_token(tokenizer, template)]
    return tuple(dict.fromkeys(end for end in ends if end is not None))


def model_end_tokens(folder: str | Path) -> list[int]:
    """Return end_tokens() of a model folder's tokenizer; without one, what its configs name."""
    if [*Path(folder).glob("tokenizer*"), *Path(folder).glob("vocab.*")]:
        return end_tokens(load_tokenizer(str(folder)))
    return _named_end_tokens(folder)


def _named_end_tokens(folder: str | Path) -> list[int]:
    """Return the end tokens that generation_config.json and config.json of a model folder name."""
    ends: list[int | None] = []
    if not folder:  # a tokenizer that was built, not loaded
        return []
    for name in ("generation_config.json", "config.json"):
        file = Path(folder, name)
        if not file.is_file():
            continue
        config = json.loads(file.read_text(encoding="utf-8"))
        for part in (config, config.get("text_config") or {}):
            named = part.get("eos_token_id")
            ends += named if isinstance(named, list) else [named]
    return list(dict.fromkeys(end for end in ends if end is not None))


@lru_cache(maxsize=16)
def _closing_token(tokenizer, template: str) -> int | None:
    """Return the first added token that a chat template writes after an answer's text, if any."""
    if not tokenizer.chat_template:
        return None
    turns = [*ASKED, {"role": "assistant", "content": "a"}]
    try:
        whole = chat_ids(tokenizer, turns)
        begun = chat_ids(tokenizer, turns, continue_final_message=True)
    except RowError:  # a template for something else than a chat
        return None
    added = set(tokenizer.added_tokens_decoder)
    # the text's last token may be another one where more text follows it
    return next((token for token in whole[len(begun) - 1 :] if token in added), None)


def _literal(tokenizer, text: str) -> list[int]:
    # A review that contains "</s>" is talking about it: split_special_tokens keeps such markup
    # plain text.
    return list(tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])


def render(tokenizer, prompt: str | list[dict], template: str, begun: str = "") -> list[int]:
    """Turn one prompt into the token ids that a model continues.

    Args:
        prompt: text, or for "chat" also a list of {"role", "content"} turns that does not end with
        the assistant.
        template: "plain" (the text itself; markup in it stays text) or "chat" (the tokenizer's chat
        template).
        begun: how the answer begins, so that the model goes on right there.
    Raises:
        ValueError: unknown template, no chat template, or two BOS in front.
        RowError: an assistant turn at the end, or turns that the chat template refuses.
        TypeError: the prompt is not what the template takes.

    A BOS stands in front if the tokenizer puts one there by itself (plain), or its template does
    (chat), never two.
    """
    if template == "plain":
        if not isinstance(prompt, str):
            raise TypeError(
                f'template "plain" takes a string, got {type(prompt).__name__}; use "chat" for '
                "turns"
            )
        front = tokenizer("a", add_special_tokens=True)["input_ids"][
            :1
        ]  # a BOS, where the tokenizer adds one
        ids = _literal(tokenizer, prompt + begun)
        if front == [tokenizer.bos_token_id]:
            ids = front + ids
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


def _begun(tokenizer, turns: list[dict], text: str) -> list[int]:
    """Return the ids of turns and the beginning of the assistant's answer to them."""
    chat = [*turns, {"role": "assistant", "content": text}]
    if _holds_markup(tokenizer, text):
        return render(tokenizer, turns, "chat") + _marked(tokenizer, turns, chat)
    return chat_ids(tokenizer, chat, continue_final_message=True)


def _turns(prompt: str | list[dict]) -> list[dict]:
    """Return a prompt as the turns of a chat."""
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if not isinstance(turns, list) or not turns or not all(isinstance(t, dict) for t in turns):
        wanted = "a string or a non-empty list of turns"
        raise TypeError(f'template "chat" takes {wanted}, got {prompt!r:.80}')
    if turns[-1].get("role") == "assistant":
        why = "the prompt ends with an assistant turn, so there is nothing to answer"
        raise RowError(f"{why}: drop that turn")
    return turns


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
    response together, so that render() and this one after the other are the tokens of the whole
    text: with the blanks that a chat template puts around an answer, and without the mark that some
    tokenizers put at the beginning of a text.

    Args:
        end: close it, in a chat with the token that ends the template's turn, else with the
            tokenizer's end token. False for a response that was cut.
        prompt: what it answers, as render() takes it; None: any, for one whose ids alone are known.
        template: "plain" or "chat"; None: "chat" where the tokenizer has a chat template.
    Raises:
        RowError: the prompt's ids do not begin the ids of the whole, as the tokenizer joins the
            prompt's end with the response's beginning, or the template writes the prompt in another
            way where a response follows; or the template refuses the turns.
        ValueError: there is no end token, or as render() does.

    Markup in a response stays text, also in a chat.
    """
    if end and not end_tokens(tokenizer):
        raise ValueError(
            f"{tokenizer.name_or_path or 'tokenizer'} has no end token: pass end=False"
        )
    if template is None:
        template = "chat" if tokenizer.chat_template else "plain"
    if template == "chat":
        return _answer(tokenizer, ASKED if prompt is None else _turns(prompt), text, end)
    before = BEFORE if prompt is None else [prompt]
    ids = _continuation(tokenizer, before, text)
    return [*ids, end_tokens(tokenizer)[0]] if end else ids


def _continuation(tokenizer, before: list[str] | tuple[str, ...], text: str) -> list[int]:
    """Return a text's ids after the first of the texts `before` that shares no token with it."""
    for front in before:
        prompt_ids = _literal(tokenizer, front)
        whole = _literal(tokenizer, front + text)
        if whole[: len(prompt_ids)] == prompt_ids:
            return whole[len(prompt_ids) :]
    raise RowError(JOINED, text)


def _answer(tokenizer, turns: list[dict], text: str, end: bool) -> list[int]:
    """Return the ids of an assistant's answer to the turns, closed by what ends it if `end`."""
    prompt_ids = render(tokenizer, turns, "chat")
    begun = _begun(tokenizer, turns, text)
    if begun[: len(prompt_ids)] != prompt_ids:
        raise RowError(JOINED, text)
    if not end:
        return begun[len(prompt_ids) :]
    ends = end_tokens(tokenizer)
    if not _holds_markup(tokenizer, text):
        closed = chat_ids(tokenizer, [*turns, {"role": "assistant", "content": text}])
        if closed[: len(prompt_ids)] != prompt_ids:
            raise RowError(JOINED, text)
        for last in range(len(prompt_ids), len(closed)):
            # an end token that a text may hold, such as that of a line break, is not the template's
            if closed[last] in ends and closed[last] in tokenizer.added_tokens_decoder:
                return closed[len(prompt_ids) : last + 1]
    closing = _closing_token(tokenizer, str(tokenizer.chat_template))
    return [*begun[len(prompt_ids) :], ends[0] if closing is None else closing]


def _holds_markup(tokenizer, text: str) -> bool:
    return any(markup in text for markup in _special_tokens(tokenizer))


def _marked(tokenizer, turns: list[dict], chat: list[dict]) -> list[int]:
    """Return the ids of an answer whose text holds markup: a </s> in it does not end it."""
    prompt = _chat(tokenizer, turns, tokenize=False, add_generation_prompt=True)
    begun = _chat(tokenizer, chat, tokenize=False, continue_final_message=True)
    if not begun.startswith(prompt):
        raise RowError(JOINED, chat[-1]["content"])
    special = "|".join(map(re.escape, _special_tokens(tokenizer)))
    before = re.split(special, prompt)[-1]  # the tokens of a text begin anew after a special one
    return _continuation(tokenizer, [before], begun[len(prompt) :])
