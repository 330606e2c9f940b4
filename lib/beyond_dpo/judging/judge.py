"""What a judge's verdicts come to: AlpacaEval 2.0, Arena-Hard and MT-Bench, from the rows that
`ask` returns.
"""

import math
import re
from collections import Counter
from typing import NamedTuple

import numpy as np
import pandas as pd

from beyond_dpo import stats

STRONG = 3  # Arena-Hard counts a strong verdict as three
VERDICTS = {  # Arena-Hard's labels: score of A, weight
    "A>>B": (1.0, STRONG),
    "B<<A": (1.0, STRONG),
    "A>B": (1.0, 1),
    "B<A": (1.0, 1),
    "A=B": (0.5, 1),
    "B=A": (0.5, 1),
    "A<B": (0.0, 1),
    "B>A": (0.0, 1),
    "A<<B": (0.0, STRONG),
    "B>>A": (0.0, STRONG),
}
COMPARED = ["preference", "output_1", "output_2"]  # what the length-controlled rate is made of
# log-odds per unit of the length term, and its spread over models: median, and quartiles' distance
# / 1.349, over 84 models of φ·logit(LC)/θ, of the weights and scores that alpaca-eval publishes: φ
# as it is without the difficulty term
SLOPE, SPREAD = -1.18, 0.23


class WinRate(NamedTuple):
    """Hold AlpacaEval's scores: percentages, standard error in points, and counts."""

    percent: float
    standard_error: float
    discrete: float
    wins: int
    losses: int
    draws: int
    dropped: int  # preferences that are missing


class LengthControlled(NamedTuple):
    """Hold a length-controlled win rate in percent with its 95 % interval; estimate: without
    alpaca-eval's own data.

    dropped: rows without a preference, or without one of the outputs.
    """

    percent: float
    low: float
    high: float
    estimate: bool
    dropped: int = 0


class MtBench(NamedTuple):
    """Hold mean ratings, 1 to 10, of first turns, second turns and both; unparsed: judgments
    without a rating.
    """

    first: float
    second: float
    overall: float
    unparsed: int


def win_rate(preferences) -> WinRate:
    """Score preferences, AlpacaEval's win rate: 100 · mean(preference − 1), with its standard error
    (n − 1).

    preferences: (n,) in 1 (the baseline wins) to 2 (ours wins); 0, as in old files, is a tie, 1.5;
    None or NaN is dropped and counted. discrete: wins + half of the draws, in percent. Raises
    ValueError for anything else and for fewer than two. Turning all preferences x into 3 − x turns
    the percentage p into 100 − p.
    """
    given = np.array(list(preferences), float)
    kept = np.where(given == 0, 1.5, given)[~np.isnan(given)]
    if len(kept) < 2 or kept.min() < 1 or kept.max() > 2:
        raise ValueError(f"needs two or more preferences in 1…2 (0 is a tie): {given}")
    wins, losses, share = int((kept > 1.5).sum()), int((kept < 1.5).sum()), 100 * (kept - 1)
    draws, error = len(kept) - wins - losses, float(share.std(ddof=1) / math.sqrt(len(kept)))
    discrete = 100 * (wins + draws / 2) / len(kept)
    return WinRate(
        float(share.mean()), error, discrete, wins, losses, draws, len(given) - len(kept)
    )


def length_controlled(
    annotations, difficulty=None, *, slope=SLOPE, seed=0, n_boot=500
) -> LengthControlled:
    """Return the win rate if both answers were equally long (arXiv 2404.04475): 100 · mean σ(θ + γ
    difficulty).

    annotations: AlpacaEval rows: preference, output_1 (the baseline's), output_2. difficulty: path
    of AlpacaEval's df_gamed.csv; with it alpaca-eval itself (extra `judge`) does the fit, on all
    805 rows in their order. Without, an
    estimate: σ(θ) of P(ours wins) = σ(θ + slope · tanh(Δ length / its standard deviation)), by
    maximum likelihood. Its interval draws prompts, and the slope by SPREAD; slope=None fits the
    slope as well. On the two released models of the controlled study (published 8.7 and 10.4) it is
    0.7 and 1.1 points too high with SLOPE, 6.1 and 7.1 with a fitted slope; the plain win rate is
    4.0 and 4.5 too low. Without differences in length it is the win rate. A row without a
    preference or an output is dropped and counted. Raises ValueError for fewer than two other rows,
    for preferences out of 1…2 (0 is a tie), and with `difficulty` for an output that is missing.
    """
    from scipy.optimize import brentq
    from scipy.special import expit
    from sklearn.linear_model import LogisticRegression

    table = _compared(annotations)
    if difficulty is not None:
        return _by_alpaca_eval(table, difficulty)
    whole = table.dropna(subset=COMPARED)
    if len(whole) < 2:
        raise ValueError(
            "the length-controlled rate needs two or more rows with output_1, output_2 and a "
            "preference:"
            f" {len(whole)} of {len(table)} have them"
        )
    longer = whole["output_1"].str.len() - whole["output_2"].str.len()
    x = np.tanh(longer / (longer.std() or 1)).to_numpy()
    y = whole["preference"].replace(0, 1.5).to_numpy() - 1
    generator = np.random.default_rng(seed)

    def controlled(i, slope) -> float:
        if slope is None:
            features = np.column_stack([x[i], np.ones(len(i))])
            fit = LogisticRegression(C=np.inf, fit_intercept=False, tol=1e-8, max_iter=1000)
            # each row once as won and once as lost, with the weight of either
            both = np.r_[features, features]
            outcomes = np.repeat([1, 0], len(i))
            weights = np.r_[y[i], 1 - y[i]]
            fit.fit(both, outcomes, sample_weight=weights)
            return 100 * expit(fit.coef_[0, 1])
        rate = np.clip(y[i].mean(), 1e-9, 1 - 1e-9)
        widest = 50 + abs(slope)  # |x| < 1
        return 100 * expit(
            brentq(lambda theta: expit(theta + slope * x[i]).mean() - rate, -widest, widest)
        )

    slopes = [slope if slope is None else generator.normal(slope, SPREAD) for _ in range(n_boot)]
    draws = [controlled(generator.integers(len(y), size=len(y)), slope) for slope in slopes]
    low, high = np.quantile(draws, [(1 - stats.LEVEL) / 2, (1 + stats.LEVEL) / 2])
    percent = float(controlled(np.arange(len(y)), slope))
    return LengthControlled(percent, float(low), float(high), True, len(table) - len(whole))


def _compared(annotations) -> pd.DataFrame:
    """Return a row per comparison: preference, NaN where there is none, and both outputs, None
    where one is missing.
    """
    rows = (
        [dict(row) for row in annotations]
        if not isinstance(annotations, pd.DataFrame)
        else annotations
    )
    table = pd.DataFrame(rows)
    missing = [name for name in COMPARED if name not in table]
    if missing:
        raise ValueError(
            f"the length-controlled rate needs rows with {', '.join(missing)}: {len(table)} rows"
        )
    table["preference"] = pd.to_numeric(table["preference"], errors="coerce").astype(float)
    wrong = table["preference"][
        (table["preference"] != 0) & ~table["preference"].between(1, 2)
    ].dropna()
    if len(wrong):
        raise ValueError(
            f"preferences are in 1…2 (0 is a tie): row {wrong.index[0]} has {wrong.iloc[0]:g}"
        )
    for name in ("output_1", "output_2"):
        text = table[name].map(lambda value: isinstance(value, str))
        table[name] = table[name].astype(object).where(text, None)
    return table


def _by_alpaca_eval(table: pd.DataFrame, difficulty) -> LengthControlled:
    """Let alpaca-eval fit; its data belong to rows by their place: none can be left out."""
    missing = table.index[table[["output_1", "output_2"]].isna().any(axis=1)]
    if len(missing):
        raise ValueError(
            f"alpaca-eval's own fit needs both outputs of each row: row {missing[0]} lacks one"
        )
    if table["preference"].notna().sum() < 2:
        raise ValueError("alpaca-eval's own fit needs two or more rows with a preference")
    from unittest.mock import patch  # its function takes the file from the hub only

    import sklearn
    from alpaca_eval.metrics import glm_winrate

    fetched = patch.object(glm_winrate, "hf_hub_download", lambda **_: str(difficulty))
    with fetched, sklearn.config_context():  # it changes sklearn's settings for good
        found = glm_winrate.get_length_controlled_winrate(table, save_weights_dir=None)
    percent, error = (
        float(found["length_controlled_winrate"]),
        1.96 * float(found["lc_standard_error"]),
    )
    dropped = int(table["preference"].isna().sum())
    return LengthControlled(percent, percent - error, percent + error, False, dropped)


def preference(top: dict[str, float], swapped: bool) -> float | None:
    """Return weighted_alpaca_eval_gpt4_turbo's preference, 2 − p(m) / (p(m) + p(M)); None without
    either token.

    top: log-probabilities of the likeliest tokens; m names the answer shown first. swapped: the
    baseline's answer was not the first, and the result x is turned into 3 − x.
    """
    logps = [top.get(token, -math.inf) for token in "mM"]
    likelier = max(logps)
    if likelier == -math.inf:
        return None
    m, other = (
        math.exp(logp - likelier) for logp in logps
    )  # servers write -9999 for a probability of 0
    found = 2 - m / (m + other)
    return 3 - found if swapped else found


def rating(judgment: str) -> float | None:
    """Return MT-Bench's rating, as FastChat reads it: the first [[7]] or else the first [7].

    None without one, and for one outside of the 1 to 10 that the judge is asked for, where FastChat
    would count any number, such as a year in brackets.
    """
    found = re.search(r"\[\[(\d+\.?\d*)\]\]", judgment) or re.search(r"\[(\d+\.?\d*)\]", judgment)
    return float(found[1]) if found and 1 <= float(found[1]) <= 10 else None


def mt_bench(rows) -> MtBench:
    """Average the ratings of MT-Bench (arXiv 2306.05685), by turn and over all; NaN for a turn
    without any.

    rows: of ask.mt_bench. overall is the mean of all ratings, not of the two means.
    """
    rated = [(row["turn"], rating(row["judgment"])) for row in rows]
    turns = [
        [score for turn, score in rated if turn == wanted and score is not None]
        for wanted in (1, 2)
    ]
    means = [
        float(np.mean(scores)) if scores else math.nan for scores in (*turns, turns[0] + turns[1])
    ]
    return MtBench(*means, len(rated) - len(turns[0] + turns[1]))


def verdict(judgment: str) -> tuple[float, int] | None:
    """Return (score of A: 1, 0.5 or 0, weight) of a judgment, as Arena-Hard v2.0 reads it; None
    without a verdict.

    It is the last [[A>B]], or else the last [A>B], in either case of letters; see VERDICTS for the
    others.
    """
    for pattern in (r"\[\[([AB<>=]+)\]\]", r"\[([AB<>=]+)\]"):
        labels = re.findall(pattern, judgment.upper())
        if labels:
            return VERDICTS.get(labels[-1])
    return None


def arena_hard(rows, baseline: str, *, seed: int = 0, n_boot: int = 500) -> pd.DataFrame:
    """Fit Bradley–Terry strengths, the baseline's 0 (arXiv 2406.11939): P(i beats j) = σ(s_i −
    s_j).

    rows: of ask.arena_hard, of one or more models (and of one category, where categories have their
    own baselines). A strong verdict counts STRONG times, a tie for both sides; of a question with a
    game without a verdict none counts. Returns a row per model: percent, 100 · σ(s), its win rate
    against the baseline, with a bootstrap interval over questions, the questions that count, and
    those unparsed. Raises ValueError for models that no chain of games ties to the baseline. Of a
    model that meets the baseline only, it is the weighted mean of its scores.
    """
    from scipy.sparse.csgraph import connected_components
    from scipy.special import expit
    from sklearn.linear_model import LogisticRegression

    games, unparsed = {}, Counter()
    for row in rows:
        pair = (row["model_a"], row["model_b"])
        games.setdefault((row["uid"], *sorted(pair)), []).append((*pair, verdict(row["judgment"])))
    names = [baseline, *sorted({name for _, *pair in games for name in pair} - {baseline})]
    questions = {uid: k for k, uid in enumerate(dict.fromkeys(uid for uid, *_ in games))}
    wins = np.zeros((len(questions), len(names), len(names)))
    for (uid, *pair), played in games.items():
        if not all(found for *_, found in played):
            unparsed.update(pair)
            continue
        for a, b, (score, weight) in played:
            a, b = names.index(a), names.index(b)
            wins[questions[uid], a, b] += weight * score
            wins[questions[uid], b, a] += weight * (1 - score)
    wins = wins[wins.any((1, 2))]
    total = wins.sum(0)
    if connected_components(total + total.T)[0] > 1:
        raise ValueError(
            f"no chain of verdicts ties all of {names} to {baseline}; unparsed: {dict(unparsed)}"
        )

    def rates(i) -> np.ndarray:
        total, sides = wins[i].sum(0), np.eye(len(names))
        a, b = np.nonzero(np.triu(total + total.T))
        features = np.tile((sides[a] - sides[b])[:, 1:], (2, 1))
        fit = LogisticRegression(C=np.inf, fit_intercept=False, tol=1e-8, max_iter=1000)
        fit.fit(features, np.repeat([1, 0], len(a)), sample_weight=np.r_[total[a, b], total[b, a]])
        return 100 * expit(fit.coef_[0])

    counts = (wins.sum(2) + wins.sum(1) > 0).sum(0)
    found = [
        [
            name,
            *stats.interval(lambda i, k=k: rates(i)[k], len(wins), seed, n_boot),
            counts[k + 1],
            unparsed[name],
        ]
        for k, name in enumerate(names[1:])
    ]
    return pd.DataFrame(found, columns=["model", "percent", "low", "high", "questions", "unparsed"])
