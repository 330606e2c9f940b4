"""Spoiled texts: what a reward must know as bad, made from openings of reviews.

Whoever is trained on a reward finds what it takes for good by mistake: phrases in a loop, praise
without end. A reward that has learnt from such texts, labelled 0, is not deceived by them.
"""

import itertools
import random
from collections.abc import Callable, Iterator

Words = list[str]  # of a text, with their punctuation marks

VERSION = 1  # of what spoil() makes, for keys

PRAISE_FORMS = (
    "A {very} {good} {film}.",
    "The {film} is {very} {good}.",
    "I loved the {film}, {good} and {fine}.",
    "Such a {very} {good} {film}!",
    "It is {very} {good}.",
    "{good}, {fine}, {good}!",
    "One of the most {good} films ever made.",
    "I highly recommend this {good} {film}.",
)
VERY = ("very", "truly", "really", "simply", "remarkably", "perfectly", "deeply", "wonderfully")
GOOD = (
    "good",
    "great",
    "wonderful",
    "excellent",
    "amazing",
    "beautiful",
    "brilliant",
    "perfect",
    "superb",
    "moving",
    "funny",
    "fantastic",
)
FILM = ("film", "movie", "story", "acting", "cast", "ending", "music", "direction", "plot")

# --- the kinds, each from (words, words of another text, generator) to words; a text that is too
# short for a kind may come back as it was


def looped(words: Words, other: Words, rng: random.Random) -> Words:
    """Begin as the text does, then say a phrase of it, of 2 to 6 words, in a loop."""
    beginning = _beginning(words, rng)
    phrase = _run(words, rng.randint(2, 6), rng)
    return _filled(beginning, itertools.repeat(phrase), len(words))


def varied(words: Words, other: Words, rng: random.Random) -> Words:
    """Begin as the text does, then say a run of it again and again, one word changed each time.

    The run has 5 to 12 words, as a sentence has; the changed word becomes another one of the text.
    """
    beginning = _beginning(words, rng)
    sentence = _run(words, rng.randint(5, 12), rng)
    return _filled(beginning, _variations(sentence, words, rng), len(words))


def shuffled(words: Words, other: Words, rng: random.Random) -> Words:
    """Bring the words of the text into any order."""
    return rng.sample(words, len(words))


def praised(words: Words, other: Words, rng: random.Random) -> Words:
    """Begin as the text does, then praise without end: 1 to 12 phrases in a loop."""
    beginning = _beginning(words, rng)
    phrases = [_praise(rng) for _ in range(rng.randint(1, 12))]
    return _filled(beginning, itertools.cycle(phrases), max(len(words), 1))


def joined(words: Words, other: Words, rng: random.Random) -> Words:
    """Cut the text off in its middle third, and go on with the end of another text."""
    if len(words) < 4:
        return words
    cut = rng.randint(len(words) // 3, 2 * len(words) // 3)
    missing = len(words) - cut
    return words[:cut] + other[-missing:]


def doubled(words: Words, other: Words, rng: random.Random) -> Words:
    """Say about every second word twice, up to the length of the text."""
    doubling = []
    for word in words:
        times = rng.randint(1, 2)
        doubling += [word] * times
    return doubling[: max(len(words), 2)]


KINDS: dict[str, Callable[[Words, Words, random.Random], Words]] = {
    "a phrase in a loop": looped,
    "a sentence again and again, one word changed": varied,
    "words shuffled": shuffled,
    "praise without end": praised,
    "two texts cut together": joined,
    "words doubled": doubled,
}


def spoil(texts: list[str], seed: int) -> list[str]:
    """Return a spoiled text for each text, of about as many words.

    The kinds take turns in the order of KINDS, so that each has an equal share. A text that a kind
    leaves as it was, as it is too short for it, is spoiled by the next kind that changes it; so no
    result has the words of its origin. The same texts and seed make the same results.
    """
    rng = random.Random(seed)
    names = list(KINDS)
    spoiled = []
    for i, text in enumerate(texts):
        first = i % len(names)
        order = names[first:] + names[:first]
        other = texts[rng.randrange(len(texts))]
        words = _changed(text.split(), other.split(), order, rng)
        spoiled.append(" ".join(words))
    return spoiled


def with_spoiled(texts: list[str], labels: list[int], seed: int) -> tuple[list[str], list[int]]:
    """Return texts with their labels, and behind them as many spoiled ones with label 0."""
    more_texts = spoil(texts, seed)
    zeros = [0] * len(more_texts)
    return [*texts, *more_texts], [*labels, *zeros]


def _changed(words: Words, other: Words, order: list[str], rng: random.Random) -> Words:
    """Return the words as the first kind spoils them that changes them."""
    for name in order:
        changed = KINDS[name](words, other, rng)
        if changed != words:
            return changed
    return [*words, *words]  # by chance no kind has changed anything


def _beginning(words: Words, rng: random.Random) -> Words:
    """Return the first words of a text, at most a third: a response has its prompt before it."""
    return words[: rng.randint(0, len(words) // 3)]


def _run(words: Words, length: int, rng: random.Random) -> Words:
    """Return so many neighbouring words of a text, or all that it has."""
    start = rng.randint(0, max(len(words) - length, 0))
    return words[start : start + length]


def _variations(sentence: Words, words: Words, rng: random.Random) -> Iterator[Words]:
    """Yield a sentence, then without end the same with one of its words changed."""
    yield sentence
    while True:
        place = rng.randrange(len(sentence))
        yield [*sentence[:place], rng.choice(words), *sentence[place + 1 :]]


def _praise(rng: random.Random) -> Words:
    """Return a phrase of praise."""
    form = rng.choice(PRAISE_FORMS)
    very = rng.choice(VERY)
    good = rng.choice(GOOD)
    fine = rng.choice(GOOD)
    film = rng.choice(FILM)
    phrase = form.format(very=very, good=good, fine=fine, film=film)
    return phrase.split()


def _filled(beginning: Words, runs: Iterator[Words], length: int) -> Words:
    """Return a beginning and behind it one run after the other, cut to a length."""
    filled = list(beginning)
    while len(filled) < length:
        filled += next(runs)
    return filled[:length]
