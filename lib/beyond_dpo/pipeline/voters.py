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
from typing import NamedTuple

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
EQUAL_GAP = (
    "equal gap"  # pairs that are as far apart in the crowd's mean, of more or less agreement
)
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
        return Votes(*(column[places] for column in self))


# --- votes


def histograms(ratings: list[list[int]]) -> np.ndarray:
    """Return how often each sentence got each of RATINGS, (sentences, 9) int64."""
    rows = []
    for values in ratings:
        places = np.asarray(values) - RATINGS[0]
        rows.append(np.bincount(places, minlength=len(RATINGS)))
    return np.stack(rows)


def agreement_of(share, raters) -> np.ndarray:
    """Return -log φ = |log-odds| of the raters' shares, drawn to ½ by half a rater on each side.

    So a share of 0 or 1 among few raters is no certainty. share: in [0, 1]. raters: their number.
    """
    share = np.asarray(share, float)
    raters = np.asarray(raters, float)
    return np.abs(logit((raters * share + 0.5) / (raters + 1)))


def vote(counts: np.ndarray, first: np.ndarray, second: np.ndarray, generator) -> Votes:
    """Let one rater of each sentence decide which is put first; equal ratings are no vote.

    counts: histograms(). first, second: (pairs,) places of sentences. The other raters are those
    who are left when these two are taken out. Sentences need two raters or more.
    """
    of_first = counts[first]
    of_second = counts[second]
    one = _rating_of_one(of_first, generator)
    other = _rating_of_one(of_second, generator)
    decided = one != other
    first_wins = (one > other)[decided]
    others_first = _without(of_first, one)[decided]
    others_second = _without(of_second, other)[decided]
    share = _share_above(others_first, others_second)
    gap = _mean_rating(others_first) - _mean_rating(others_second)
    raters = np.minimum(others_first.sum(1), others_second.sum(1))
    sign = np.where(first_wins, 1, -1)
    return Votes(
        chosen=np.where(first_wins, first[decided], second[decided]),
        rejected=np.where(first_wins, second[decided], first[decided]),
        share=np.where(first_wins, share, 1 - share),
        gap=sign * gap,
        agreement=agreement_of(share, raters),
    )


def _rating_of_one(counts: np.ndarray, generator) -> np.ndarray:
    """Draw one rater of each row of a histogram; return the places of their ratings."""
    raters = counts.sum(1)
    drawn = generator.integers(raters)
    return (counts.cumsum(1) <= drawn[:, np.newaxis]).sum(1)


def _without(counts: np.ndarray, rating: np.ndarray) -> np.ndarray:
    """Return histograms without one rater of this rating each."""
    others = counts.copy()
    others[np.arange(len(others)), rating] -= 1
    return others


def _share_above(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return the share of pairs of raters of whom the first one's rating is higher, ties half."""
    below = second.cumsum(1) - second
    wins = (first * (below + 0.5 * second)).sum(1)
    return wins / (first.sum(1) * second.sum(1))


def _mean_rating(counts: np.ndarray) -> np.ndarray:
    return counts @ RATINGS / counts.sum(1)


def candidates(counts: np.ndarray, generator) -> Votes:
    """Return votes on random pairs; in each of ROUNDS every sentence is there at most once."""
    rounds = []
    for _ in range(ROUNDS):
        order = generator.permutation(len(counts))
        half = len(order) // 2
        rounds.append(vote(counts, order[:half], order[half : 2 * half], generator))
    return Votes(*(np.concatenate(columns) for columns in zip(*rounds, strict=True)))


def mixture(votes: Votes, pairs: int, contested: float, settings: Voters) -> Votes:
    """Return so many votes, this share of them on contested pairs, the others on agreed ones.

    Agreed: settings.agreed of the other raters or more put the same sentence first; contested:
    settings.contested or less. The first of each are taken. Raises ConfigError for too few.
    """
    majority = np.maximum(votes.share, 1 - votes.share)
    wanted = round(contested * pairs)
    split = np.flatnonzero(majority <= settings.contested)[:wanted]
    agreed = np.flatnonzero(majority >= settings.agreed)[: pairs - wanted]
    return _of_both(votes, agreed, split, pairs)


def equal_gap(votes: Votes, pairs: int, settings: Voters) -> Votes:
    """Return so many votes on pairs whose means are equally far apart: half with much agreement.

    The means of the other raters differ by what settings.gap says. That range is cut into STRATA;
    of the pairs in each, settings.outer with the most agreement and as many with the least are
    taken, so that both halves are equally far apart. Of all these the first are taken. Raises
    ConfigError for too few.
    """
    distance = np.abs(votes.gap)
    ends = np.linspace(*settings.gap, STRATA + 1)
    least, most = [], []
    for low, high in itertools.pairwise(ends):
        inside = np.flatnonzero((distance >= low) & (distance < high))
        size = int(settings.outer * len(inside))
        by_agreement = inside[np.argsort(votes.agreement[inside], kind="stable")]
        least.append(by_agreement[:size])
        most.append(by_agreement[len(inside) - size :])
    half = pairs // 2
    contested = np.sort(np.concatenate(least))[:half]
    clear = np.sort(np.concatenate(most))[: pairs - half]
    return _of_both(votes, clear, contested, pairs)


def _of_both(votes: Votes, clear: np.ndarray, contested: np.ndarray, pairs: int) -> Votes:
    """Return the votes of both kinds, in the order in which they were drawn."""
    places = np.sort(np.concatenate([clear, contested]))
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
    return {name: getattr(cfg.voters, name) for name in names}


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
    order = np.random.default_rng([seed, 0]).permutation(sentences)
    dev = order[: settings.dev]
    test = order[settings.dev : held_out]
    return Split(order[held_out:], dev, test)


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
        tokenizer = templates.load_tokenizer(assets.tokenizer_dir(target))
        prompt_ids = templates.render(tokenizer, PROMPT, "plain")
        sentences = mallows.rated(cfg.rated)
        rows = []
        for place, (text, _) in enumerate(sentences):
            ids = templates.encode_response(tokenizer, text, prompt=PROMPT, template="plain")
            row = {"id": str(place), "prompt_ids": prompt_ids, "responses": {"said": ids}}
            rows.append(row)
        write_rows(out / "pairs.jsonl", rows)
        gather.write_json(out / "ratings.json", [ratings for _, ratings in sentences])

    return Artifact("rated-responses", version=1, inputs=inputs, make=make)


def entropies(cfg) -> Artifact:
    """Pass the SFT model over every rated sentence, for the paper's estimate of dispersion."""
    return stages.reference(cfg, rows=_said(cfg), names=SAID)


def held_out(cfg) -> Artifact:
    """Write the sentences that models score: pairs.jsonl, and crowd.json, their mean ratings.

    They are the same for all trainings: those of the split of the first seed.
    """
    said = _said(cfg)
    inputs = {"said": said, "seed": cfg.seeds[0], **_settings(cfg, HELD_OUT)}

    def make(out: Path) -> None:
        ratings = said.json("ratings.json")
        places = split(len(ratings), cfg.voters, cfg.seeds[0]).test
        rows = stages.json_lines(said.get() / "pairs.jsonl")
        write_rows(out / "pairs.jsonl", [rows[place] for place in places])
        gather.write_json(out / "crowd.json", [float(np.mean(ratings[p])) for p in places])

    return Artifact("held-out-sentences", version=1, inputs=inputs, make=make)


def pairs(cfg, kind: str, seed: int) -> Artifact:
    """Draw the pairs of a training with this seed: pairs.jsonl, agreement.json, votes.csv.

    votes.csv, a row a pair: share (of the other raters who put the chosen one first), gap (of their
    means), agreement.
    """
    said = _said(cfg)
    settings = cfg.voters
    inputs = {"said": said, "kind": kind, "seed": seed, "split": cfg.seeds[0]}
    inputs.update(_settings(cfg, (*DRAWN, "pairs")))

    def make(out: Path) -> None:
        ratings = said.json("ratings.json")
        rows = stages.json_lines(said.get() / "pairs.jsonl")
        train = split(len(ratings), settings, cfg.seeds[0]).train
        counts = histograms([ratings[place] for place in train])
        generator = np.random.default_rng([seed, 1])
        votes = drawn(counts, kind, settings.pairs, settings, generator)
        _write_votes(out, votes, [rows[place] for place in train])

    return Artifact("votes", version=1, inputs=inputs, make=make)


def _write_votes(out: Path, votes: Votes, rows: list[dict]) -> None:
    """Write votes on pairs of rows that hold a response "said" each."""
    pairs_of_rows = []
    for number, (chosen, rejected) in enumerate(zip(votes.chosen, votes.rejected, strict=True)):
        responses = {
            "chosen": rows[chosen]["responses"]["said"],
            "rejected": rows[rejected]["responses"]["said"],
        }
        row = {"id": str(number), "prompt_ids": rows[chosen]["prompt_ids"], "responses": responses}
        pairs_of_rows.append(row)
    weighted.write_pairs(out, pairs_of_rows, votes.agreement)
    table = {"share": votes.share, "gap": votes.gap, "agreement": votes.agreement}
    gather.write_table(out / "votes.csv", pd.DataFrame(table).round(6))


# --- language models


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
    cells = [(kind, seed) for kind in LEARNERS for seed in cfg.seeds]
    voted = {cell: pairs(cfg, *cell) for cell in cells}
    estimated = {cell: stages.reference(cfg, start, voted[cell]) for cell in cells}
    passes = {cell: _passes(cfg, cell, voted[cell], sentences) for cell in cells}

    def make(out: Path) -> None:
        needs.check(cfg)
        gather.train([one for by_learner in passes.values() for one in by_learner.values()])
        crowd = sentences.json("crowd.json")
        scores = []
        votes = []
        for cell in gather.watched(cells, "votes learnt and held-out sentences scored"):
            scores.append(_log_ratios(cell, passes[cell], base, crowd))
            votes.append(_votes_of(cell, voted[cell], estimated[cell]))
        gather.write_table(out / "scores.csv.gz", pd.concat(scores))
        gather.write_table(out / "votes.csv", pd.concat(votes))

    inputs = {"base": base, "held_out": sentences}
    for kind, seed in cells:
        used = {**passes[kind, seed], "votes": estimated[kind, seed]}
        inputs[f"{kind}, seed {seed}"] = used
    return Artifact("voters", version=1, inputs=inputs, make=make, hours=cfg.needs.hours)


def _passes(cfg, cell: tuple, votes: Artifact, sentences: Artifact) -> dict[str, Artifact]:
    """Return what each learner of one (kind, seed) says of the held-out sentences."""
    kind, seed = cell
    passes = {}
    for name in LEARNERS[kind]:
        model = weighted.trained(cfg, votes, name, seed)
        passes[name] = stages.reference(cfg, model, sentences, SAID)
    return passes


def _log_ratios(cell: tuple, passes: dict[str, Artifact], base: Artifact, crowd) -> pd.DataFrame:
    """Return the rows of scores.csv.gz of one (kind, seed)."""
    kind, seed = cell
    (start,) = stages.reference_values(base, "logps")
    table = pd.DataFrame(
        {"kind": kind, "seed": seed, "sentence": range(len(start)), "crowd": crowd}
    )
    for name, scores in passes.items():
        (logps,) = stages.reference_values(scores, "logps")
        table[name] = logps - start
    return table.round(4)


def _votes_of(cell: tuple, votes: Artifact, reference_pass: Artifact) -> pd.DataFrame:
    """Return the votes of one (kind, seed) with the paper's estimate of their weights."""
    kind, seed = cell
    chosen, rejected = stages.reference_values(reference_pass, "entropies")
    weights, _ = dispersion.weights(chosen, rejected, range(len(chosen)))
    table = votes.csv("votes.csv").assign(kind=kind, seed=seed, entropy=weights.round(6))
    return table[["kind", "seed", "share", "gap", "agreement", "entropy"]]


def ahead(
    table: pd.DataFrame, kind: str, learner: str, than: str = "DPO", *, seed: int
) -> stats.Estimate:
    """Return by how much a learner's scores correlate more with the crowd than another's.

    Pearson's correlation over held-out sentences, and the mean of its difference over trainings.
    The sentences are drawn, the same for all trainings. table: scores.csv.gz of learnt().
    """
    rows = table[table["kind"] == kind]
    scores = [_of_trainings(rows, name) for name in (learner, than)]
    crowd = _of_trainings(rows, "crowd")

    def measure(draws: np.ndarray) -> np.ndarray:
        first, second = (_correlations(values[:, draws], crowd[:, draws]) for values in scores)
        return (first - second).T[..., np.newaxis]

    return stats.two_level(measure, [crowd.shape[1]], seed=seed)


def follows(table: pd.DataFrame, kind: str, learner: str, *, seed: int) -> stats.Estimate:
    """Return a learner's own correlation with the crowd, as ahead() takes it."""
    rows = table[table["kind"] == kind]
    scores = _of_trainings(rows, learner)
    crowd = _of_trainings(rows, "crowd")

    def measure(draws: np.ndarray) -> np.ndarray:
        return _correlations(scores[:, draws], crowd[:, draws]).T[..., np.newaxis]

    return stats.two_level(measure, [crowd.shape[1]], seed=seed)


def estimate_follows(votes: pd.DataFrame, kind: str, *, seed: int) -> stats.Estimate:
    """Return how well the paper's estimate follows the other raters' agreement.

    It is Spearman's correlation over the pairs of a training, and its mean over trainings. votes:
    votes.csv of learnt().
    """
    rows = votes[votes["kind"] == kind]
    by_seed = [here for _, here in rows.groupby("seed")]
    estimated = np.stack([here["entropy"].rank() for here in by_seed])
    agreed = np.stack([here["agreement"].rank() for here in by_seed])

    def measure(draws: np.ndarray) -> np.ndarray:
        return _correlations(estimated[:, draws], agreed[:, draws]).T[..., np.newaxis]

    return stats.two_level(measure, [estimated.shape[1]], seed=seed)


def _of_trainings(rows: pd.DataFrame, column: str) -> np.ndarray:
    """Return a column as (trainings, sentences)."""
    return rows.pivot(index="seed", columns="sentence", values=column).to_numpy()


def _correlations(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return Pearson's correlation over the last axis; 0 where one of the two is constant."""
    a = a - a.mean(-1, keepdims=True)
    b = b - b.mean(-1, keepdims=True)
    scale = np.sqrt((a**2).sum(-1) * (b**2).sum(-1))
    products = (a * b).sum(-1)
    return np.divide(products, scale, out=np.zeros_like(products), where=scale > 0)


# --- a linear model, as the line that language models are compared with


def linear(cfg, with_entropy: bool = False) -> Artifact:
    """Fit TF-IDF models on votes, by DPO and by MallowsPO-θ, over many seeds.

    correlations.csv, a row for each kind, contested (share of such pairs), pairs,
    penalty and seed: dev (DPO's correlation with the crowd on dev sentences, by which a penalty is
    chosen), and the correlation of each learner on test sentences. Each seed deals the sentences
    out anew. with_entropy: LINEAR_ENTROPY in place of LINEAR, for which the SFT model is needed.
    """
    settings = cfg.voters
    inputs = {"source": corpus.source(cfg.rated), "kind": cfg.rated, **_settings(cfg, FITTED)}
    estimate = entropies(cfg) if with_entropy else None
    if with_entropy:
        inputs["entropies"] = estimate

    def make(out: Path) -> None:
        sentences = mallows.rated(cfg.rated)
        sureness = None
        if estimate is not None:
            (sureness,) = stages.reference_values(estimate, "entropies")
        rows = []
        for seed in gather.watched(range(settings.linear_seeds), "TF-IDF models"):
            rows += _linear_rows(sentences, settings, seed, sureness)
        gather.write_table(out / "correlations.csv", pd.DataFrame(rows).round(5))

    does = f"TF-IDF models, in this process: {settings.linear_seeds} splits of the sentences"
    return Artifact("linear-votes", version=1, inputs=inputs, make=make, does=does)


def _linear_rows(sentences, settings, seed: int, entropies_of: np.ndarray | None) -> list[dict]:
    """Return the rows of one split of the sentences."""
    texts = [text for text, _ in sentences]
    ratings = [values for _, values in sentences]
    places = split(len(texts), settings, seed)
    features = _tf_idf(texts, places.train)
    counts = histograms([ratings[place] for place in places.train])
    crowd = np.array([np.mean(values) for values in ratings])
    rows = []
    for number, cell in enumerate(_linear_cells(settings)):
        generator = np.random.default_rng([seed, 2, number])
        kind, contested, size = cell
        votes = drawn(counts, kind, size, settings, generator, contested)
        own = votes._replace(
            chosen=places.train[votes.chosen], rejected=places.train[votes.rejected]
        )
        differences = features[own.chosen] - features[own.rejected]
        weights = _linear_weights(own, entropies_of, generator)
        for penalty in settings.penalties:
            row = {"kind": kind, "contested": contested, "pairs": size}
            row |= {"penalty": penalty, "seed": seed}
            scores = {n: features @ fit(differences, w, penalty) for n, w in weights.items()}
            row["dev"] = float(_correlations(scores["DPO"][places.dev], crowd[places.dev]))
            for name, values in scores.items():
                row[name] = float(_correlations(values[places.test], crowd[places.test]))
            rows.append(row)
    return rows


def _linear_cells(settings) -> list[tuple[str, float, int]]:
    """Return (kind, share of contested pairs, pairs) of everything that is fitted."""
    cells = []
    for size in settings.linear_pairs:
        cells += [(MIXED, share, size) for share in settings.shares]
        cells.append((EQUAL_GAP, 0.5, size))
    return cells


def _linear_weights(votes: Votes, entropies_of, generator) -> dict[str, np.ndarray]:
    """Return the weights of each learner: of LINEAR, or with entropies of LINEAR_ENTROPY."""
    weights = {"DPO": np.ones(len(votes.chosen))}
    if entropies_of is None:
        true = weighted.of_agreement(votes.agreement)
        weights["MallowsPO-θ, true"] = true
        weights["MallowsPO-θ, shuffled"] = generator.permutation(true)
        return weights
    chosen = entropies_of[votes.chosen]
    rejected = entropies_of[votes.rejected]
    weights["MallowsPO-θ, entropy"], _ = dispersion.weights(chosen, rejected, range(len(chosen)))
    return weights


def _tf_idf(texts: list[str], train: np.ndarray):
    """Return TF-IDF features of words and pairs of words that two training sentences have."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)
    vectorizer.fit([texts[place] for place in train])
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

    pairs = differences.shape[0]
    function = _loss(differences, weights, penalty, pairs)
    start = np.zeros(differences.shape[1])
    return minimize(function, start, jac=True, method="L-BFGS-B", options={"maxiter": 300}).x


def _loss(differences, weights: np.ndarray, penalty: float, pairs: int) -> Callable:
    """Return what gives the loss of fit() and its gradient at v."""
    transposed = differences.T

    def function(v: np.ndarray) -> tuple[float, np.ndarray]:
        s = weights * (differences @ v)
        value = np.logaddexp(0, -s).mean() + penalty / 2 * (v @ v)
        pull = weights * expit(-s) / pairs
        return value, penalty * v - transposed @ pull

    return function


def chosen_penalty(table: pd.DataFrame, **cell) -> pd.DataFrame:
    """Return the rows of a cell at the penalty with which DPO does best on dev sentences.

    cell: {column: value} of correlations.csv. Raises ValueError for a cell without a row.
    """
    for column, value in cell.items():
        table = table[table[column] == value]
    if table.empty:
        raise ValueError(f"no row of {cell}")
    best = table.groupby("penalty")["dev"].mean().idxmax()
    return table[table["penalty"] == best]


def linear_ahead(table: pd.DataFrame, learner: str, than: str = "DPO", **cell) -> stats.Estimate:
    """Return by how much a linear model's scores correlate more with the crowd than another's.

    It is the mean over the splits of the sentences. table and cell are those of chosen_penalty().
    """
    rows = chosen_penalty(table, **cell)
    return stats.mean_of_trainings(rows[learner] - rows[than])
