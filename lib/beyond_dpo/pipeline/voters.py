"""MallowsPO where dispersion comes from real people: sentences of reviews, rated by many of them.

A pair is two sentences, and its label is one vote: one rater's number for the one sentence against
one rater's for the other. How much people agree on the pair is known from the other raters. A model
that has learnt from such votes is judged by how well its scores of sentences that it has not seen
follow the crowd's mean, so that nothing has to be sampled.

Of two items Mallows' φ model has one distance, and the chance of the better one is 1 / (1 + φ): so
-log φ of a pair is the log-odds of the other raters' preference.
"""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy.special import expit, logit

from beyond_dpo import dispersion, stats, templates
from beyond_dpo.pipeline import assets, config, corpus, gather, mallows, needs, stages, weighted
from beyond_dpo.pipeline.artifacts import Artifact
from beyond_dpo.pipeline.settings import Voters
from beyond_dpo.rows import write_rows

RATINGS = np.arange(-4, 5)  # from negative to positive
ROUNDS = 20  # of random pairs among all sentences, from which the wanted ones are taken
# What stands in front of a sentence, so that it is a response, and any language model has a score.
PROMPT = "Somebody who has seen the film wrote:\n"
STRATA = 4  # of the distance between means, in each of which pairs of both kinds are taken
MIXED = "mixed"  # pairs that people agree on and pairs that they do not, in equal parts
EQUAL_GAP = "equal gap"  # pairs as far apart in the crowd's mean, of more or less agreement
SAID = ("said",)  # the response of a row of one sentence
LEARNERS = {
    MIXED: tuple(weighted.LEARNERS),
    EQUAL_GAP: ("DPO", "MallowsPO-θ, true", "MallowsPO-θ, entropy"),
}
LINEAR = ("DPO", "MallowsPO-θ, true", "MallowsPO-θ, shuffled")  # what the linear model learns by
LINEAR_ENTROPY = ("DPO", "MallowsPO-θ, entropy")
# Settings that decide who is held out, which pairs there are, and what linear models learn.
HELD_OUT = ("dev", "test")
DRAWN = (*HELD_OUT, "agreed", "contested", "gap", "outer")
FITTED = (*DRAWN, "linear_pairs", "shares", "penalties", "linear_seeds")


class Votes(NamedTuple):
    """Votes on pairs of sentences, each (pairs,)."""

    chosen: np.ndarray  # places of the sentences that were put first
    rejected: np.ndarray
    share: np.ndarray  # of the other raters who put the chosen one first, ties half
    gap: np.ndarray  # of their mean ratings, chosen − rejected
    agreement: np.ndarray  # -log φ by the other raters, >= 0

    def take(self, places) -> "Votes":
        """Return the votes at these places."""
        columns = [column[places] for column in self]
        return Votes(*columns)


# --- votes


def histograms(ratings: list[list[int]]) -> np.ndarray:
    """Return how often each sentence got each of RATINGS, (sentences, 9) int64."""
    rows = []
    for values in ratings:
        places = np.asarray(values) - RATINGS[0]
        counts = np.bincount(places, minlength=len(RATINGS))
        rows.append(counts)
    return np.stack(rows)


def agreement_of(share, raters) -> np.ndarray:
    """Return -log φ = |log-odds| of the raters' shares, drawn to ½ by half a rater on each side.

    So a share of 0 or 1 among few raters is no certainty. share: in [0, 1]. raters: their number.
    """
    share = np.asarray(share, float)
    raters = np.asarray(raters, float)
    in_favour = raters * share + 0.5
    drawn_in = in_favour / (raters + 1)
    log_odds = logit(drawn_in)
    return np.abs(log_odds)


def vote(counts: np.ndarray, first: np.ndarray, second: np.ndarray, generator) -> Votes:
    """Let one rater of each sentence decide which is put first; equal ratings are no vote.

    counts: histograms(). first, second: (pairs,) places of sentences. The other raters are those
    who are left when these two are taken out. Sentences need two raters or more.
    """
    of_first = counts[first]
    of_second = counts[second]
    first_rating = _rating_of_one(of_first, generator)
    second_rating = _rating_of_one(of_second, generator)
    decided = first_rating != second_rating
    first_wins = first_rating > second_rating

    # From here on only pairs with a vote, and their other raters.
    first = first[decided]
    second = second[decided]
    first_wins = first_wins[decided]
    first_others = _without(of_first, first_rating)[decided]
    second_others = _without(of_second, second_rating)[decided]

    share = _share_above(first_others, second_others)
    first_mean = _mean_rating(first_others)
    second_mean = _mean_rating(second_others)
    gap = first_mean - second_mean
    first_raters = first_others.sum(1)
    second_raters = second_others.sum(1)
    raters = np.minimum(first_raters, second_raters)
    return Votes(
        chosen=np.where(first_wins, first, second),
        rejected=np.where(first_wins, second, first),
        share=np.where(first_wins, share, 1 - share),
        gap=np.where(first_wins, gap, -gap),
        agreement=agreement_of(share, raters),
    )


def _rating_of_one(counts: np.ndarray, generator) -> np.ndarray:
    """Draw one rater of each row of a histogram; return the places of their ratings."""
    raters = counts.sum(1)
    rater = generator.integers(raters)[:, np.newaxis]
    raters_up_to = counts.cumsum(1)
    is_passed = raters_up_to <= rater
    return is_passed.sum(1)


def _without(counts: np.ndarray, rating: np.ndarray) -> np.ndarray:
    """Return histograms without one rater of this rating each."""
    others = counts.copy()
    rows = np.arange(len(others))
    others[rows, rating] -= 1
    return others


def _share_above(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return the share of pairs of raters of whom the first one's rating is higher, ties half."""
    below = second.cumsum(1) - second
    beaten = below + 0.5 * second
    wins = (first * beaten).sum(1)
    pairs_of_raters = first.sum(1) * second.sum(1)
    return wins / pairs_of_raters


def _mean_rating(counts: np.ndarray) -> np.ndarray:
    total = counts @ RATINGS
    raters = counts.sum(1)
    return total / raters


def candidates(counts: np.ndarray, generator) -> Votes:
    """Return votes on random pairs; in each of ROUNDS every sentence is there at most once."""
    half = len(counts) // 2
    rounds = []
    for _ in range(ROUNDS):
        order = generator.permutation(len(counts))
        first = order[:half]
        second = order[half : 2 * half]
        votes = vote(counts, first, second, generator)
        rounds.append(votes)
    columns = zip(*rounds, strict=True)
    joined = [np.concatenate(column) for column in columns]
    return Votes(*joined)


def mixture(votes: Votes, pairs: int, contested: float, settings: Voters) -> Votes:
    """Return so many votes, this share of them on contested pairs, the others on agreed ones.

    Agreed: settings.agreed of the other raters or more put the same sentence first; contested:
    settings.contested or less. The first of each are taken. Raises ConfigError for too few.
    """
    contested_pairs = round(contested * pairs)
    agreed_pairs = pairs - contested_pairs
    majority = np.maximum(votes.share, 1 - votes.share)
    is_contested = majority <= settings.contested
    is_agreed = majority >= settings.agreed
    contested_places = np.flatnonzero(is_contested)[:contested_pairs]
    agreed_places = np.flatnonzero(is_agreed)[:agreed_pairs]
    return _of_both(votes, agreed_places, contested_places, pairs)


def equal_gap(votes: Votes, pairs: int, settings: Voters) -> Votes:
    """Return so many votes on pairs whose means are equally far apart: half with much agreement.

    The means of the other raters differ by what settings.gap says. That range is cut into STRATA;
    of the pairs in each, settings.outer with the most agreement and as many with the least are
    taken, so that both halves are equally far apart. Of all these the first are taken. Raises
    ConfigError for too few.
    """
    low, high = settings.gap
    ends = np.linspace(low, high, STRATA + 1)
    distance = np.abs(votes.gap)
    least = []
    most = []
    for low, high in itertools.pairwise(ends):
        is_inside = (distance >= low) & (distance < high)
        inside = np.flatnonzero(is_inside)
        order = np.argsort(votes.agreement[inside], kind="stable")
        by_agreement = inside[order]
        size = int(settings.outer * len(inside))
        least.append(by_agreement[:size])
        most.append(by_agreement[len(inside) - size :])
    contested_pairs = pairs // 2
    clear_pairs = pairs - contested_pairs
    contested = np.sort(np.concatenate(least))
    clear = np.sort(np.concatenate(most))
    return _of_both(votes, clear[:clear_pairs], contested[:contested_pairs], pairs)


def _of_both(votes: Votes, clear: np.ndarray, contested: np.ndarray, pairs: int) -> Votes:
    """Return the votes of both kinds, in the order in which they were drawn."""
    both = np.concatenate([clear, contested])
    places = np.sort(both)
    if len(places) < pairs:
        raise config.ConfigError(
            f"only {len(clear)} clear and {len(contested)} contested pairs for {pairs}: use fewer "
            "pairs, or wider voters.agreed, voters.contested or voters.gap"
        )
    return votes.take(places)


def drawn(counts: np.ndarray, kind: str, pairs: int, settings, generator, contested=0.5) -> Votes:
    """Draw votes of one of KINDS; contested: the share of such pairs in a mixture."""
    votes = candidates(counts, generator)
    if kind == EQUAL_GAP:
        return equal_gap(votes, pairs, settings)
    return mixture(votes, pairs, contested, settings)


# --- sentences


def _settings(cfg, names: tuple[str, ...]) -> dict:
    """Return those of the voters' settings that a result depends on."""
    values = {}
    for name in names:
        values[name] = getattr(cfg.voters, name)
    return values


class Split(NamedTuple):
    """Places of sentences: to vote on, to choose a penalty on, and to compare with the crowd."""

    train: np.ndarray
    dev: np.ndarray
    test: np.ndarray


def split(sentences: int, settings: Voters, seed: int) -> Split:
    """Deal sentences out anew for each seed; raise ConfigError where none is left to vote on."""
    held_out = settings.dev + settings.test
    if sentences - held_out < 4:
        raise config.ConfigError(
            f"voters.dev + voters.test = {held_out} of {sentences} sentences: too few are left"
        )
    generator = np.random.default_rng([seed, 0])
    order = generator.permutation(sentences)
    dev = order[: settings.dev]
    test = order[settings.dev : held_out]
    train = order[held_out:]
    return Split(train, dev, test)


def _said(cfg) -> Artifact:
    """Write every rated sentence as a response "said" to PROMPT: pairs.jsonl, ratings.json."""
    target = cfg.world.target
    inputs = {
        "tokenizer": assets.resolve(target),
        "source": corpus.source(cfg.rated),
        "kind": cfg.rated,
        "prompt": PROMPT,
    }

    def make(out: Path) -> None:
        folder = assets.tokenizer_dir(target)
        tokenizer = templates.load_tokenizer(folder)
        prompt_ids = templates.render(tokenizer, PROMPT, "plain")
        rows = []
        ratings = []
        for place, (text, ratings_of_text) in enumerate(mallows.rated(cfg.rated)):
            ids = templates.encode_response(tokenizer, text, prompt=PROMPT, template="plain")
            row = {
                "id": str(place),
                "prompt_ids": prompt_ids,
                "responses": {"said": ids},
            }
            rows.append(row)
            ratings.append(ratings_of_text)
        write_rows(out / "pairs.jsonl", rows)
        gather.write_json(out / "ratings.json", ratings)

    return Artifact("rated-responses", version=1, inputs=inputs, make=make)


def entropies(cfg) -> Artifact:
    """Pass the SFT model over every rated sentence, for the paper's estimate of dispersion."""
    return stages.reference(cfg, rows=_said(cfg), names=SAID)


def held_out(cfg) -> Artifact:
    """Write the sentences that models score: pairs.jsonl, and crowd.json, their mean ratings.

    They are the same for all trainings: those of the split of the first seed.
    """
    said = _said(cfg)
    first_seed = cfg.seeds[0]
    inputs = {"said": said, "seed": first_seed}
    inputs |= _settings(cfg, HELD_OUT)

    def make(out: Path) -> None:
        rows = stages.json_lines(said.get() / "pairs.jsonl")
        ratings = said.json("ratings.json")
        places = split(len(ratings), cfg.voters, first_seed).test
        held_out_rows = []
        crowd = []
        for place in places:
            held_out_rows.append(rows[place])
            mean = np.mean(ratings[place])
            crowd.append(float(mean))
        write_rows(out / "pairs.jsonl", held_out_rows)
        gather.write_json(out / "crowd.json", crowd)

    return Artifact("held-out-sentences", version=1, inputs=inputs, make=make)


def pairs(cfg, kind: str, seed: int) -> Artifact:
    """Draw the pairs of a training with this seed: pairs.jsonl, agreement.json, votes.csv.

    votes.csv, a row a pair: share (of the other raters who put the chosen one first), gap (of their
    means), agreement.
    """
    said = _said(cfg)
    settings = cfg.voters
    first_seed = cfg.seeds[0]
    inputs = {
        "said": said,
        "kind": kind,
        "seed": seed,
        "split": first_seed,
    }
    inputs |= _settings(cfg, (*DRAWN, "pairs"))

    def make(out: Path) -> None:
        rows = stages.json_lines(said.get() / "pairs.jsonl")
        ratings = said.json("ratings.json")
        train = split(len(ratings), settings, first_seed).train
        train_rows = [rows[place] for place in train]
        train_ratings = [ratings[place] for place in train]
        counts = histograms(train_ratings)
        generator = np.random.default_rng([seed, 1])
        votes = drawn(counts, kind, settings.pairs, settings, generator)
        _write_votes(out, votes, train_rows)

    return Artifact("votes", version=1, inputs=inputs, make=make)


def _write_votes(out: Path, votes: Votes, rows: list[dict]) -> None:
    """Write votes on pairs of rows that hold a response "said" each."""
    pairs_of_rows = []
    both = zip(votes.chosen, votes.rejected, strict=True)
    for number, (chosen_place, rejected_place) in enumerate(both):
        chosen = rows[chosen_place]
        rejected = rows[rejected_place]
        row = {
            "id": str(number),
            "prompt_ids": chosen["prompt_ids"],
            "responses": {
                "chosen": chosen["responses"]["said"],
                "rejected": rejected["responses"]["said"],
            },
        }
        pairs_of_rows.append(row)
    weighted.write_pairs(out, pairs_of_rows, votes.agreement)
    columns = {
        "share": votes.share,
        "gap": votes.gap,
        "agreement": votes.agreement,
    }
    table = pd.DataFrame(columns).round(6)
    gather.write_table(out / "votes.csv", table)


# --- language models


class _Cell(NamedTuple):
    """The votes of one kind and seed, and what comes of them."""

    kind: str
    seed: int
    votes: Artifact
    reference_pass: Artifact  # of the SFT model over the votes
    passes: dict[str, Artifact]  # of each learner over the held-out sentences


def learnt(cfg) -> Artifact:
    """Train the LEARNERS of each kind of votes with each seed, and score the held-out sentences.

    scores.csv.gz, a row for each kind, seed and sentence: crowd (mean rating), and a column for
    each learner, empty where a kind has it not: the log-ratio to the SFT model (nats).
    votes.csv, a row a pair: kind, seed, share, gap, agreement, entropy (the paper's estimate of its
    weight).
    """
    sentences = held_out(cfg)
    start = stages.sft(cfg)
    base = stages.reference(cfg, start, sentences, SAID)
    cells = []
    for kind in LEARNERS:
        for seed in cfg.seeds:
            cells.append(_cell(cfg, kind, seed, start, sentences))

    def make(out: Path) -> None:
        needs.check(cfg)
        passes = []
        for cell in cells:
            passes.extend(cell.passes.values())
        gather.train(passes)
        crowd = sentences.json("crowd.json")
        scores = []
        votes = []
        for cell in gather.watched(cells, "votes learnt and held-out sentences scored"):
            scores.append(_log_ratios(cell, base, crowd))
            votes.append(_votes_of(cell))
        gather.write_table(out / "scores.csv.gz", pd.concat(scores))
        gather.write_table(out / "votes.csv", pd.concat(votes))

    inputs = {"base": base, "held_out": sentences}
    for cell in cells:
        name = f"{cell.kind}, seed {cell.seed}"
        inputs[name] = {**cell.passes, "votes": cell.reference_pass}
    return Artifact("voters", version=1, inputs=inputs, make=make, hours=cfg.needs.hours)


def _cell(cfg, kind: str, seed: int, start: Artifact, sentences: Artifact) -> _Cell:
    """Return the votes of a kind and seed, and what each learner says of the sentences."""
    votes = pairs(cfg, kind, seed)
    reference_pass = stages.reference(cfg, start, votes)
    passes = {}
    for name in LEARNERS[kind]:
        model = weighted.trained(cfg, votes, name, seed)
        passes[name] = stages.reference(cfg, model, sentences, SAID)
    return _Cell(kind, seed, votes, reference_pass, passes)


def _log_ratios(cell: _Cell, base: Artifact, crowd: list[float]) -> pd.DataFrame:
    """Return the rows of scores.csv.gz of one kind and seed."""
    (sft_logps,) = stages.reference_values(base, "logps")
    columns = {
        "kind": cell.kind,
        "seed": cell.seed,
        "sentence": range(len(sft_logps)),
        "crowd": crowd,
    }
    table = pd.DataFrame(columns)
    for name, scores in cell.passes.items():
        (logps,) = stages.reference_values(scores, "logps")
        table[name] = logps - sft_logps
    return table.round(4)


def _votes_of(cell: _Cell) -> pd.DataFrame:
    """Return the votes of one kind and seed with the paper's estimate of their weights."""
    chosen, rejected = stages.reference_values(cell.reference_pass, "entropies")
    rows = range(len(chosen))
    weights, _ = dispersion.weights(chosen, rejected, rows)
    table = cell.votes.csv("votes.csv")
    table["kind"] = cell.kind
    table["seed"] = cell.seed
    table["entropy"] = weights.round(6)
    return table[["kind", "seed", "share", "gap", "agreement", "entropy"]]


def ahead(
    table: pd.DataFrame, kind: str, learner: str, than: str = "DPO", *, seed: int
) -> stats.Estimate:
    """Return by how much a learner's scores correlate more with the crowd than another's.

    Pearson's correlation over held-out sentences, and the mean of its difference over trainings.
    The sentences are drawn, the same for all trainings. table: scores.csv.gz of learnt().
    """
    rows = table[table["kind"] == kind]
    first_scores = _of_trainings(rows, learner)
    second_scores = _of_trainings(rows, than)
    crowd = _of_trainings(rows, "crowd")

    def measure(draws: np.ndarray) -> np.ndarray:
        drawn_crowd = crowd[:, draws]
        first = _correlations(first_scores[:, draws], drawn_crowd)
        second = _correlations(second_scores[:, draws], drawn_crowd)
        lead = first - second
        return lead.T[..., np.newaxis]

    sentences = crowd.shape[1]
    return stats.two_level(measure, [sentences], seed=seed)


def follows(table: pd.DataFrame, kind: str, learner: str, *, seed: int) -> stats.Estimate:
    """Return a learner's own correlation with the crowd, as ahead() takes it."""
    rows = table[table["kind"] == kind]
    scores = _of_trainings(rows, learner)
    crowd = _of_trainings(rows, "crowd")
    return _mean_correlation(scores, crowd, seed)


def estimate_follows(votes: pd.DataFrame, kind: str, *, seed: int) -> stats.Estimate:
    """Return how well the paper's estimate follows the other raters' agreement.

    It is Spearman's correlation over the pairs of a training, and its mean over trainings. votes:
    votes.csv of learnt().
    """
    rows = votes[votes["kind"] == kind]
    entropy_ranks = []
    agreement_ranks = []
    for _, training in rows.groupby("seed"):
        entropy_ranks.append(training["entropy"].rank())
        agreement_ranks.append(training["agreement"].rank())
    estimated = np.stack(entropy_ranks)
    agreed = np.stack(agreement_ranks)
    return _mean_correlation(estimated, agreed, seed)


def _mean_correlation(a: np.ndarray, b: np.ndarray, seed: int) -> stats.Estimate:
    """Return Pearson's correlation over units, a mean over trainings; (trainings, units) each."""

    def measure(draws: np.ndarray) -> np.ndarray:
        drawn_a = a[:, draws]
        drawn_b = b[:, draws]
        correlations = _correlations(drawn_a, drawn_b)
        return correlations.T[..., np.newaxis]

    units = a.shape[1]
    return stats.two_level(measure, [units], seed=seed)


def _of_trainings(rows: pd.DataFrame, column: str) -> np.ndarray:
    """Return a column as (trainings, sentences)."""
    table = rows.pivot(index="seed", columns="sentence", values=column)
    return table.to_numpy()


def _correlations(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return Pearson's correlation over the last axis; 0 where one of the two is constant."""
    a = a - a.mean(-1, keepdims=True)
    b = b - b.mean(-1, keepdims=True)
    a_squares = (a**2).sum(-1)
    b_squares = (b**2).sum(-1)
    scale = np.sqrt(a_squares * b_squares)
    products = (a * b).sum(-1)
    correlations = np.zeros_like(products)
    np.divide(products, scale, out=correlations, where=scale > 0)
    return correlations


# --- a linear model, as the line that language models are compared with


def linear(cfg, with_entropy: bool = False) -> Artifact:
    """Fit TF-IDF models on votes, by DPO and by MallowsPO-θ, over many seeds.

    correlations.csv, a row for each kind, contested (share of such pairs), pairs,
    penalty and seed: dev (DPO's correlation with the crowd on dev sentences, by which a penalty is
    chosen), and the correlation of each learner on test sentences. Each seed deals the sentences
    out anew. with_entropy: LINEAR_ENTROPY in place of LINEAR, for which the SFT model is needed.
    """
    settings = cfg.voters
    inputs = {"source": corpus.source(cfg.rated), "kind": cfg.rated}
    inputs |= _settings(cfg, FITTED)
    reference_pass = None
    if with_entropy:
        reference_pass = entropies(cfg)
        inputs["entropies"] = reference_pass

    def make(out: Path) -> None:
        sentences = mallows.rated(cfg.rated)
        entropies_of = None
        if reference_pass is not None:
            (entropies_of,) = stages.reference_values(reference_pass, "entropies")
        seeds = range(settings.linear_seeds)
        rows = []
        for seed in gather.watched(seeds, "TF-IDF models"):
            rows += _linear_rows(sentences, settings, seed, entropies_of)
        table = pd.DataFrame(rows).round(5)
        gather.write_table(out / "correlations.csv", table)

    does = f"TF-IDF models, in this process: {settings.linear_seeds} splits of the sentences"
    return Artifact("linear-votes", version=1, inputs=inputs, make=make, does=does)


class _Data(NamedTuple):
    """Sentences as linear models take them, and how they are split."""

    places: Split
    features: Any  # (sentences, features), sparse
    counts: np.ndarray  # histograms() of the sentences to vote on
    crowd: np.ndarray  # mean ratings, (sentences,)


def _linear_data(sentences: list[tuple], settings: Voters, seed: int) -> _Data:
    """Split sentences, and return what linear models take. sentences: (text, ratings) each."""
    texts = []
    ratings = []
    means = []
    for text, ratings_of_text in sentences:
        texts.append(text)
        ratings.append(ratings_of_text)
        means.append(np.mean(ratings_of_text))
    places = split(len(texts), settings, seed)
    features = _tf_idf(texts, places.train)
    train_ratings = [ratings[place] for place in places.train]
    counts = histograms(train_ratings)
    return _Data(places, features, counts, np.array(means))


def _linear_rows(sentences, settings, seed: int, entropies_of: np.ndarray | None) -> list[dict]:
    """Return the rows of one split of the sentences."""
    data = _linear_data(sentences, settings, seed)
    rows = []
    for number, cell in enumerate(_linear_cells(settings)):
        kind, contested, size = cell
        generator = np.random.default_rng([seed, 2, number])
        votes = drawn(data.counts, kind, size, settings, generator, contested)
        votes = votes._replace(
            chosen=data.places.train[votes.chosen],
            rejected=data.places.train[votes.rejected],
        )
        weights = _linear_weights(votes, entropies_of, generator)
        for penalty in settings.penalties:
            row = {
                "kind": kind,
                "contested": contested,
                "pairs": size,
                "penalty": penalty,
                "seed": seed,
            }
            row |= _linear_correlations(data, votes, weights, penalty)
            rows.append(row)
    return rows


def _linear_cells(settings) -> list[tuple[str, float, int]]:
    """Return (kind, share of contested pairs, pairs) of everything that is fitted."""
    cells = []
    for size in settings.linear_pairs:
        for share in settings.shares:
            cells.append((MIXED, share, size))
        cells.append((EQUAL_GAP, 0.5, size))
    return cells


def _linear_correlations(data: _Data, votes: Votes, weights: dict, penalty: float) -> dict:
    """Fit a model of each learner; return the crowd's correlation with DPO on dev, all on test."""
    features = data.features
    differences = features[votes.chosen] - features[votes.rejected]
    on_dev = {}
    on_test = {}
    for name, weights_of_learner in weights.items():
        model = fit(differences, weights_of_learner, penalty)
        scores = features @ model
        on_dev[name] = _follow_crowd(scores, data.crowd, data.places.dev)
        on_test[name] = _follow_crowd(scores, data.crowd, data.places.test)
    return {"dev": on_dev["DPO"], **on_test}


def _follow_crowd(scores: np.ndarray, crowd: np.ndarray, places: np.ndarray) -> float:
    """Return the correlation of scores with the crowd on the sentences at these places."""
    scores_there = scores[places]
    crowd_there = crowd[places]
    correlation = _correlations(scores_there, crowd_there)
    return float(correlation)


def _linear_weights(votes: Votes, entropies_of, generator) -> dict[str, np.ndarray]:
    """Return the weights of each learner: of LINEAR, or with entropies of LINEAR_ENTROPY."""
    pairs = len(votes.chosen)
    weights = {"DPO": np.ones(pairs)}
    if entropies_of is None:
        true = weighted.of_agreement(votes.agreement)
        weights["MallowsPO-θ, true"] = true
        weights["MallowsPO-θ, shuffled"] = generator.permutation(true)
        return weights
    chosen = entropies_of[votes.chosen]
    rejected = entropies_of[votes.rejected]
    estimated, _ = dispersion.weights(chosen, rejected, range(pairs))
    weights["MallowsPO-θ, entropy"] = estimated
    return weights


def _tf_idf(texts: list[str], train: np.ndarray):
    """Return TF-IDF features of words and pairs of words that two training sentences have."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)
    train_texts = [texts[place] for place in train]
    vectorizer.fit(train_texts)
    return vectorizer.transform(texts)


def fit(differences, weights: np.ndarray, penalty: float) -> np.ndarray:
    """Return the v of least mean -log σ(w · v·x) + penalty/2 · |v|².

    It is MallowsPO-θ (Eq. 8, arXiv 2405.14953) for a score that is linear in its features, with DPO
    for weights of 1; the penalty is in the place of the KL.

    Args:
        differences: (pairs, features), chosen − rejected; sparse or dense.
        weights: (pairs,), > 0.
        penalty: > 0.
    """
    from scipy.optimize import minimize

    pairs, features = differences.shape
    minimum = minimize(
        _loss(differences, weights, penalty, pairs),
        np.zeros(features),
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": 300},
    )
    return minimum.x


def _loss(differences, weights: np.ndarray, penalty: float, pairs: int) -> Callable:
    """Return what gives the loss of fit() and its gradient at v."""
    transposed = differences.T

    def function(v: np.ndarray) -> tuple[float, np.ndarray]:
        logits = weights * (differences @ v)
        losses = np.logaddexp(0, -logits)
        square = v @ v
        shrinkage = penalty / 2 * square
        value = losses.mean() + shrinkage
        chance_wrong = expit(-logits)
        pull = weights * chance_wrong / pairs
        gradient = penalty * v - transposed @ pull
        return value, gradient

    return function


def chosen_penalty(table: pd.DataFrame, **cell) -> pd.DataFrame:
    """Return the rows of a cell at the penalty with which DPO does best on dev sentences.

    cell: {column: value} of correlations.csv. Raises ValueError for a cell without a row.
    """
    for column, value in cell.items():
        is_equal = table[column] == value
        table = table[is_equal]
    if table.empty:
        raise ValueError(f"no row of {cell}")
    means = table.groupby("penalty")["dev"].mean()
    best = means.idxmax()
    is_best = table["penalty"] == best
    return table[is_best]


def linear_ahead(table: pd.DataFrame, learner: str, than: str = "DPO", **cell) -> stats.Estimate:
    """Return by how much a linear model's scores correlate more with the crowd than another's.

    It is the mean over the splits of the sentences. table and cell are those of chosen_penalty().
    """
    rows = chosen_penalty(table, **cell)
    leads = rows[learner] - rows[than]
    return stats.mean_of_trainings(leads)
