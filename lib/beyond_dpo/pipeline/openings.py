"""How reviews begin and go on: prompts of a few first words, and texts of whole sentences with an
end.
"""

import random
import re

from beyond_dpo import templates
from beyond_dpo.pipeline import config

SENTENCE = re.compile(r"(?<=[.!?])\s+")
HELD_OUT = 2000  # labelled reviews that no reward is trained on
SHORTEST = 8  # tokens of a continuation worth training on


def beginning(tokenizer, text: str, world: config.World, rng: random.Random) -> dict:
    """Return the prompt of a review's first tokens, as many as world.prompt_tokens say."""
    ids = templates.render(tokenizer, text, "plain")[: rng.randint(*world.prompt_tokens)]
    return begun(tokenizer, ids, world.template)


def begun(tokenizer, ids: list[int], template: str) -> dict:
    """Return {"prompt_ids"} of the first tokens of a review; in a chat, asked.

    There "text" is what is asked, and the template stands around it whole.
    """
    if template == "plain":
        return {"prompt_ids": ids}
    asked = tokenizer.decode(ids, skip_special_tokens=True)
    return {"prompt_ids": templates.render(tokenizer, asked, "chat"), "text": asked}


def continued(tokenizer, ids: list[int], made: dict, template: str) -> dict[str, list[int]]:
    """Return {"chosen"}, how a review of these tokens goes on after its beginning, with an end.

    made: the beginning, as of begun(). Returns {} where less than `SHORTEST` tokens are left.
    """
    if template == "plain":
        cut = len(made["prompt_ids"])
        if len(ids) < cut + SHORTEST:
            return {}
        end = templates.encode_response(tokenizer, "", template="plain")
        return {"chosen": [*ids[cut:], *end]}
    asked = made["text"]
    text = tokenizer.decode(ids, skip_special_tokens=True)
    left = len(ids) - len(templates.render(tokenizer, asked, "plain"))
    if left < SHORTEST or not text.startswith(asked):
        return {}
    rest = text[len(asked) :].strip()
    return {"chosen": templates.encode_response(tokenizer, rest, prompt=asked, template="chat")}


def opening(tokenizer, text: str, most: int) -> list[int]:
    """Return the tokens of a review's first whole sentences, fewer than `most`.

    So it is a text with a natural end.
    """
    kept = []
    ids = []
    for sentence in SENTENCE.split(text):
        kept.append(sentence)
        longer = templates.render(tokenizer, " ".join(kept), "plain")
        if len(longer) >= most:
            break
        ids = longer
    return ids
