"""How reviews begin and go on: prompts of a few first words, and texts of whole sentences."""

import random
import re

from beyond_dpo import templates
from beyond_dpo.pipeline import config

Ids = list[int]  # of tokens

SENTENCE = re.compile(r"(?<=[.!?])\s+")
HELD_OUT = 2000  # labelled reviews that no reward is trained on
SHORTEST = 8  # tokens of a continuation worth training on


def beginning(tokenizer, text: str, world: config.World, rng: random.Random) -> dict:
    """Return the prompt of a review's first tokens, as many as world.prompt_tokens say."""
    ids = templates.render(tokenizer, text, "plain")
    cut = rng.randint(*world.prompt_tokens)
    return begun(tokenizer, ids[:cut], world.template)


def begun(tokenizer, ids: Ids, template: str) -> dict:
    """Return {"prompt_ids"}, a prompt of the first tokens of a review.

    In a chat the user says these words: the template stands around them, and "text" holds them.
    """
    if template == "plain":
        return {"prompt_ids": ids}
    text = tokenizer.decode(ids, skip_special_tokens=True)
    prompt_ids = templates.render(tokenizer, text, "chat")
    return {"prompt_ids": prompt_ids, "text": text}


def continued(tokenizer, ids: Ids, prompt: dict, template: str) -> dict[str, Ids]:
    """Return {"chosen"}: how a review of these tokens goes on after a prompt of begun().

    The response has an end. Returns {} where less than SHORTEST tokens are left.
    """
    if template == "plain":
        rest = _rest_of_tokens(tokenizer, ids, prompt)
    else:
        rest = _rest_of_text(tokenizer, ids, prompt)
    if rest is None:
        return {}
    return {"chosen": rest}


def _rest_of_tokens(tokenizer, ids: Ids, prompt: dict) -> Ids | None:
    """Return the tokens after the prompt's, and an end token."""
    cut = len(prompt["prompt_ids"])
    if len(ids) < cut + SHORTEST:
        return None
    end = templates.encode_response(tokenizer, "", template="plain")
    return [*ids[cut:], *end]


def _rest_of_text(tokenizer, ids: Ids, prompt: dict) -> Ids | None:
    """Return the text after the prompt's, as an answer in a chat."""
    begin = prompt["text"]
    cut = len(templates.render(tokenizer, begin, "plain"))
    text = tokenizer.decode(ids, skip_special_tokens=True)
    too_short = len(ids) < cut + SHORTEST
    if too_short or not text.startswith(begin):
        return None
    rest = text.removeprefix(begin)
    return templates.encode_response(
        tokenizer,
        rest.strip(),
        prompt=begin,
        template="chat",
    )


def opening(tokenizer, text: str, most: int) -> Ids:
    """Return the tokens of a review's first whole sentences, fewer than `most`.

    So it is a text with a natural end.
    """
    sentences = []
    ids = []
    for sentence in SENTENCE.split(text):
        sentences.append(sentence)
        whole = " ".join(sentences)
        longer = templates.render(tokenizer, whole, "plain")
        if len(longer) >= most:
            break
        ids = longer
    return ids
