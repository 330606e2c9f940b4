"""Spoiled texts: each kind by a hand-written example, and what holds of all of them."""

import random

import pytest

from beyond_dpo.pipeline import spoiled

WORDS = "the plot is thin, but every actor is very good".split()
OTHER = "a b c d e f g h i j".split()
TEXTS = [
    "I went to see this film last night with my two sisters, and we all liked its music.",
    "The plot is thin, but every actor is very good, and so is the light. See it twice.",
    "Harbour of Glass is a patient piece of storytelling with real weight behind every fall.",
]


class Drawn:
    """A generator whose draws are given, one after the other."""

    def __init__(self, *draws):
        self.draws = iter(draws)

    def draw(self, *_):
        return next(self.draws)

    randint = randrange = choice = sample = draw


@pytest.mark.parametrize(
    "kind, draws, wanted",
    [
        # two words are kept; three words from the fifth on
        (spoiled.looped, (2, 3, 4), "the plot but every actor but every actor but every"),
        # one word is kept; five words from the sixth on; the first of them becomes "thin,"
        (spoiled.varied, (1, 5, 5, 0, "thin,"), "the every actor is very good thin, actor is very"),
        (spoiled.shuffled, (WORDS[::-1],), "good very is actor every but thin, is plot the"),
        # three words are kept; one phrase: its form and the words in it
        (
            spoiled.praised,
            (3, 1, "It is {very} {good}.", "truly", "great", "perfect", "film"),
            "the plot is It is truly great. It is truly",
        ),
        (spoiled.joined, (4,), "the plot is thin, e f g h i j"),
        (
            spoiled.doubled,
            (2, 1, 2, 1, 1, 2, 1, 1, 2, 1),
            "the the plot is is thin, but every every actor",
        ),
    ],
    ids=[kind.__name__ for kind in spoiled.KINDS.values()],
)
def test_every_kind_by_hand(kind, draws, wanted):
    drawn = Drawn(*draws)
    assert " ".join(kind(WORDS, OTHER, drawn)) == wanted
    assert not list(drawn.draws), "each draw has been used"


def test_the_kinds_take_turns(monkeypatch):
    """With six kinds that only write their name, nine texts begin anew with the first one."""
    names = list(spoiled.KINDS)
    marked = {name: lambda words, other, rng, name=name: [name] for name in names}
    monkeypatch.setattr(spoiled, "KINDS", marked)
    assert spoiled.spoil(["a text"] * 9, 0) == names + names[:3]


def test_a_seed_fixes_the_texts():
    first = spoiled.spoil(TEXTS * 4, 0)
    assert spoiled.spoil(TEXTS * 4, 0) == first
    assert spoiled.spoil(TEXTS * 4, 1) != first


def test_spoiled_texts_are_as_long_as_their_origins():
    texts = TEXTS * 40
    for text, result in zip(texts, spoiled.spoil(texts, 0), strict=True):
        assert len(result.split()) == len(text.split())


@pytest.mark.parametrize("text", ["", " ", "a", "a a", "a b", "a b c", "a a a a a", "Good, good!"])
@pytest.mark.parametrize("kind", range(6))
def test_a_text_that_is_too_short_for_a_kind_is_spoiled_by_another(text, kind):
    for seed in range(20):
        result = spoiled.spoil([*TEXTS, *TEXTS][:kind] + [text], seed)[kind]
        assert result.split() != text.split()
        assert len(result.split()) <= max(2 * len(text.split()), 1)


def test_no_text_stays_as_it_was():
    """Neither by chance, nor where all kinds leave a text as it is."""
    texts = TEXTS * 40
    for text, result in zip(texts, spoiled.spoil(texts, 0), strict=True):
        assert result != text


def test_a_text_that_no_kind_changes_is_said_twice(monkeypatch):
    unchanged = {"none": lambda words, other, rng: words}
    monkeypatch.setattr(spoiled, "KINDS", unchanged)
    assert spoiled.spoil(["A film."], 0) == ["A film. A film."]


def test_no_texts_make_none():
    assert spoiled.spoil([], 0) == []


def test_spoiled_texts_are_negatives_behind_their_origins():
    texts, labels = spoiled.with_spoiled(TEXTS, [1, 0, 1], 3)
    assert texts == TEXTS + spoiled.spoil(TEXTS, 3)
    assert labels == [1, 0, 1, 0, 0, 0]


def test_a_phrase_of_praise_is_whole():
    for seed in range(200):
        phrase = " ".join(spoiled._praise(random.Random(seed)))
        assert "{" not in phrase
        assert phrase[-1] in ".!"
