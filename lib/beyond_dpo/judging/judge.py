"""Score a judge's verdicts, the rows that `ask` returns: AlpacaEval 2.0, Arena-Hard, MT-Bench."""

import functools
import math
import re
from collections import Counter
from typing import NamedTuple

import numpy as np
import pandas as pd

from beyond_dpo import stats

STRONG = 3  # Arena-Hard counts a strong verdict as three
# Arena-Hard's labels: (score of A, weight).
VERDICTS = {
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
# Log-odds per unit of the length term, and its spread over models: the median, and the quartiles'
# distance / 1.349, of φ·logit(LC)/θ over the 84 models whose weights and scores alpaca-eval
# publishes. This is φ as it would be without the difficulty term.
SLOPE = -1.18
SPREAD = 0.23


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
    """Hold a length-controlled win rate in percent with its 95 % interval.

    estimate: whether it was made without alpaca-eval's own data. dropped: rows without a
    preference, or without one of the outputs.
    """

    percent: float
    low: float
    high: float
    estimate: bool
    dropped: int


class MtBench(NamedTuple):
    """Hold mean ratings, 1 to 10, of first turns, second turns and both.

    unparsed: judgments without a rating.
    """

    first: float
    second: float
    overall: float
    unparsed: int


def win_rate(preferences) -> WinRate:
    """Return AlpacaEval's win rate, 100 · mean(preference − 1), with its standard error.

    preferences: (n,) in 1 (the baseline wins) to 2 (ours wins); 0, as in old files, is a tie, 1.5;
    None or NaN is dropped and counted. The standard error divides by n − 1. discrete: wins + half
    of the draws, in percent. Raises ValueError for anything else and for fewer than two. Turning
    all preferences x into 3 − x turns the percentage p into 100 − p.
    """
    values = np.array(list(preferences), float)
    judged = values[~np.isnan(values)]
    judged = np.where(judged == 0, 1.5, judged)
    count = len(judged)
    if count < 2 or judged.min() < 1 or judged.max() > 2:
        raise ValueError(f"needs two or more preferences in 1…2 (0 is a tie): {values}")
    wins = int((judged > 1.5).sum())
    losses = int((judged < 1.5).sum())
    draws = count - wins - losses
    percentages = 100 * (judged - 1)
    standard_error = percentages.std(ddof=1) / math.sqrt(count)
    return WinRate(
        percent=float(percentages.mean()),
        standard_error=float(standard_error),
        discrete=100 * (wins + draws / 2) / count,
        wins=wins,
        losses=losses,
        draws=draws,
        dropped=len(values) - count,
    )


def length_controlled(
    annotations, difficulty=None, *, slope=SLOPE, seed=0, n_boot=500
) -> LengthControlled:
    """Return the win rate if both answers were equally long: 100 · mean σ(θ + γ difficulty).

    From arXiv 2404.04475. annotations: AlpacaEval rows: preference, output_1 (the baseline's),
    output_2. difficulty: path of AlpacaEval's df_gamed.csv; with it alpaca-eval itself (extra
    `judge`) does the fit, on all 805 rows in their order. Without, an estimate: σ(θ) of
    P(ours wins) = σ(θ + slope · tanh(Δ length / its standard deviation)), by maximum likelihood.
    Its interval draws prompts, and the slope by SPREAD; slope=None fits the slope as well. On the
    two released models of the controlled study (published 8.7 and 10.4) it is 0.7 and 1.1 points
    too high with SLOPE, 6.1 and 7.1 with a fitted slope; the plain win rate is 4.0 and 4.5 too low.
    Without differences in length it is the win rate. A row without a preference or an output is
    dropped and counted. Raises ValueError for fewer than two other rows, for preferences out of
    1…2 (0 is a tie), and with `difficulty` for an output that is missing.
    """
    table = _compared(annotations)
    if difficulty is not None:
        return _by_alpaca_eval(table, difficulty)
    whole = table.dropna(subset=COMPARED)
    if len(whole) < 2:
        raise ValueError(
            "the length-controlled rate needs two or more rows with output_1, output_2 and a "
            f"preference: {len(whole)} of {len(table)} have them"
        )
    difference = whole["output_1"].str.len() - whole["output_2"].str.len()
    spread = difference.std() or 1
    lengths = np.tanh(difference / spread).to_numpy()
    preferences = whole["preference"].replace(0, 1.5)
    shares = preferences.to_numpy() - 1
    generator = np.random.default_rng(seed)
    if slope is None:
        slopes = [None] * n_boot
    else:
        slopes = [generator.normal(slope, SPREAD) for _ in range(n_boot)]
    rates = []
    for drawn_slope in slopes:
        drawn = generator.integers(len(whole), size=len(whole))
        rate = _controlled_rate(lengths[drawn], shares[drawn], drawn_slope)
        rates.append(rate)
    lower_tail = (1 - stats.LEVEL) / 2
    upper_tail = (1 + stats.LEVEL) / 2
    low, high = np.quantile(rates, [lower_tail, upper_tail])
    percent = _controlled_rate(lengths, shares, slope)
    return LengthControlled(
        percent=float(percent),
        low=float(low),
        high=float(high),
        estimate=True,
        dropped=len(table) - len(whole),
    )


def _controlled_rate(lengths: np.ndarray, shares: np.ndarray, slope: float | None) -> float:
    """Return 100 · σ(θ) of P(ours wins) = σ(θ + slope · length); slope=None fits the slope as well.

    lengths: in −1…1. shares: P(ours wins) by the judge. Both (n,).
    """
    from scipy.optimize import brentq
    from scipy.special import expit

    if slope is None:
        return _fitted_rate(lengths, shares)
    rate = np.clip(shares.mean(), 1e-9, 1 - 1e-9)

    def excess(theta: float) -> float:
        predicted = expit(theta + slope * lengths)
        return predicted.mean() - rate

    widest = 50 + abs(slope)  # a length is in −1…1
    theta = brentq(excess, -widest, widest)
    return 100 * expit(theta)


def _fitted_rate(lengths: np.ndarray, shares: np.ndarray) -> float:
    """Return 100 · σ(θ) by logistic regression on the lengths and a constant, whose weight is θ.

    Each row is there once as won and once as lost, with the weight of either.
    """
    from scipy.special import expit
    from sklearn.linear_model import LogisticRegression

    constant = np.ones(len(lengths))
    features = np.column_stack([lengths, constant])
    outcomes = np.repeat([1, 0], len(lengths))
    weights = np.concatenate([shares, 1 - shares])
    fit = LogisticRegression(C=np.inf, fit_intercept=False, tol=1e-8, max_iter=1000)
    fit.fit(np.tile(features, (2, 1)), outcomes, sample_weight=weights)
    theta = fit.coef_[0, 1]
    return 100 * expit(theta)


def _compared(annotations) -> pd.DataFrame:
    """Return a row per comparison: preference and both outputs.

    A missing preference is NaN, a missing output None. Raises ValueError for columns that are not
    there, and for preferences out of 1…2 (0 is a tie).
    """
    if not isinstance(annotations, pd.DataFrame):
        annotations = [dict(row) for row in annotations]
    table = pd.DataFrame(annotations)
    missing = [name for name in COMPARED if name not in table]
    if missing:
        raise ValueError(
            f"the length-controlled rate needs rows with {', '.join(missing)}: {len(table)} rows"
        )
    preferences = pd.to_numeric(table["preference"], errors="coerce")
    preferences = preferences.astype(float)
    allowed = (preferences == 0) | preferences.between(1, 2)
    wrong = preferences[~allowed].dropna()
    if len(wrong):
        raise ValueError(
            f"preferences are in 1…2 (0 is a tie): row {wrong.index[0]} has {wrong.iloc[0]:g}"
        )
    table["preference"] = preferences
    for name in ("output_1", "output_2"):
        is_text = table[name].map(lambda value: isinstance(value, str))
        table[name] = table[name].astype(object).where(is_text, None)
    return table


def _by_alpaca_eval(table: pd.DataFrame, difficulty) -> LengthControlled:
    """Let alpaca-eval fit; its data belong to rows by their place: none can be left out."""
    lacks_output = table[["output_1", "output_2"]].isna().any(axis=1)
    missing = table.index[lacks_output]
    if len(missing):
        raise ValueError(
            f"alpaca-eval's own fit needs both outputs of each row: row {missing[0]} lacks one"
        )
    judged = table["preference"].notna()
    if judged.sum() < 2:
        raise ValueError("alpaca-eval's own fit needs two or more rows with a preference")
    from unittest.mock import patch

    import sklearn
    from alpaca_eval.metrics import glm_winrate

    # Its function takes the file from the hub only, and changes sklearn's settings for good.
    hub = patch.object(glm_winrate, "hf_hub_download", lambda **_: str(difficulty))
    with hub, sklearn.config_context():
        facts = glm_winrate.get_length_controlled_winrate(table, save_weights_dir=None)
    percent = float(facts["length_controlled_winrate"])
    half_width = 1.96 * float(facts["lc_standard_error"])
    return LengthControlled(
        percent=percent,
        low=percent - half_width,
        high=percent + half_width,
        estimate=False,
        dropped=int((~judged).sum()),
    )


def preference(top: dict[str, float], swapped: bool) -> float | None:
    """Return weighted_alpaca_eval_gpt4_turbo's preference, 2 − p(m) / (p(m) + p(M)).

    top: log-probabilities of the likeliest tokens; m names the answer shown first, M the other.
    Without either token it is None. swapped: the baseline's answer was not the first, and the
    result x is turned into 3 − x.
    """
    first_logp = top.get("m", -math.inf)
    second_logp = top.get("M", -math.inf)
    likelier = max(first_logp, second_logp)
    if likelier == -math.inf:
        return None
    # Relative to the likelier one: servers write -9999 for a probability of 0.
    first = math.exp(first_logp - likelier)
    second = math.exp(second_logp - likelier)
    value = 2 - first / (first + second)
    return 3 - value if swapped else value


def rating(judgment: str) -> float | None:
    """Return MT-Bench's rating, as FastChat reads it: the first [[7]] or else the first [7].

    None without one, and for one outside of the 1 to 10 that the judge is asked for, where FastChat
    would count any number, such as a year in brackets.
    """
    for pattern in (r"\[\[(\d+\.?\d*)\]\]", r"\[(\d+\.?\d*)\]"):
        match = re.search(pattern, judgment)
        if match:
            score = float(match[1])
            return score if 1 <= score <= 10 else None
    return None


def mt_bench(rows) -> MtBench:
    """Average the ratings of MT-Bench (arXiv 2306.05685), by turn and over all.

    rows: of ask.mt_bench. overall is the mean of all ratings, not of the two means; a turn without
    any rating is NaN.
    """
    ratings = {1: [], 2: []}
    unparsed = 0
    for row in rows:
        score = rating(row["judgment"])
        if score is None:
            unparsed += 1
        else:
            ratings[row["turn"]].append(score)
    first = ratings[1]
    second = ratings[2]
    both = first + second
    return MtBench(_mean(first), _mean(second), _mean(both), unparsed)


def _mean(scores: list[float]) -> float:
    """Return the mean, NaN of nothing."""
    return float(np.mean(scores)) if scores else math.nan


def verdict(judgment: str) -> tuple[float, int] | None:
    """Return (score of A: 1, 0.5 or 0, weight) of a judgment, as Arena-Hard v2.0 reads it.

    It is the last [[A>B]], or else the last [A>B], in either case of letters; see VERDICTS for the
    others. None without a verdict.
    """
    for pattern in (r"\[\[([AB<>=]+)\]\]", r"\[([AB<>=]+)\]"):
        labels = re.findall(pattern, judgment.upper())
        if labels:
            return VERDICTS.get(labels[-1])
    return None


class Game(NamedTuple):
    """Hold what a judge said of two answers; verdict: as `verdict` returns it."""

    model_a: str
    model_b: str
    verdict: tuple[float, int] | None


def arena_hard(rows, baseline: str, *, seed: int = 0, n_boot: int = 500) -> pd.DataFrame:
    """Fit Bradley–Terry strengths s: P(i beats j) = σ(s_i − s_j), the baseline's s is 0.

    From arXiv 2406.11939. rows: of ask.arena_hard, of one or more models (and of one category,
    where categories have their own baselines). A strong verdict counts STRONG times, a tie for both
    sides; of a question with a game without a verdict none counts. Returns a row per model:
    percent, 100 · σ(s), its win rate against the baseline, with a bootstrap interval over
    questions, the questions that count, and those unparsed. Raises ValueError for models that no
    chain of games ties to the baseline. Of a model that meets the baseline only, it is the weighted
    mean of its scores.
    """
    from scipy.sparse.csgraph import connected_components

    games = _games(rows)
    models = {name for _, *pair in games for name in pair}
    others = models - {baseline}
    names = [baseline, *sorted(others)]
    wins, unparsed = _wins(games, names)
    total = wins.sum(0)
    if connected_components(total + total.T)[0] > 1:
        raise ValueError(
            f"no chain of verdicts ties all of {names} to {baseline}; unparsed: {dict(unparsed)}"
        )
    played = wins.sum(2) + wins.sum(1) > 0
    questions = played.sum(0)
    table = []
    for place, name in enumerate(names[1:], start=1):
        win_rate_of_draw = functools.partial(_win_rate, wins, place)
        percent, low, high = stats.interval(win_rate_of_draw, len(wins), seed, n_boot)
        row = {
            "model": name,
            "percent": percent,
            "low": low,
            "high": high,
            "questions": questions[place],
            "unparsed": unparsed[name],
        }
        table.append(row)
    columns = ["model", "percent", "low", "high", "questions", "unparsed"]
    return pd.DataFrame(table, columns=columns)


def _games(rows) -> dict[tuple, list[Game]]:
    """Return the games of each (question, model, model), whichever model is shown first."""
    games = {}
    for row in rows:
        game = Game(row["model_a"], row["model_b"], verdict(row["judgment"]))
        models = sorted([game.model_a, game.model_b])
        pair_games = games.setdefault((row["uid"], *models), [])
        pair_games.append(game)
    return games


def _wins(games: dict[tuple, list[Game]], names: list[str]) -> tuple[np.ndarray, Counter]:
    """Return how often i beats j, (questions, models, models), and {model: games left out}.

    Only questions with a game that counts are in it. A pair's games of one question are left out
    together if one of them has no verdict.
    """
    questions = {}
    for uid, _, _ in games:
        questions.setdefault(uid, len(questions))
    models = len(names)
    wins = np.zeros((len(questions), models, models))
    unparsed = Counter()
    for (uid, *pair), pair_games in games.items():
        if any(game.verdict is None for game in pair_games):
            unparsed.update(pair)
            continue
        question_wins = wins[questions[uid]]
        for game in pair_games:
            a = names.index(game.model_a)
            b = names.index(game.model_b)
            score, weight = game.verdict
            question_wins[a, b] += weight * score
            question_wins[b, a] += weight * (1 - score)
    counted = wins.any((1, 2))
    return wins[counted], unparsed


def _win_rate(wins: np.ndarray, place: int, drawn: np.ndarray) -> float:
    """Return 100 · σ(s) of one model against the first, the baseline, by logistic regression.

    wins: (questions, models, models), how often i beats j. place: of the model. drawn: questions.
    """
    from scipy.special import expit
    from sklearn.linear_model import LogisticRegression

    total = wins[drawn].sum(0)
    a, b = np.nonzero(np.triu(total + total.T))
    sides = np.eye(len(total))
    differences = sides[a] - sides[b]
    features = differences[:, 1:]  # the baseline's strength stays 0
    outcomes = np.repeat([1, 0], len(a))
    weights = np.concatenate([total[a, b], total[b, a]])
    fit = LogisticRegression(C=np.inf, fit_intercept=False, tol=1e-8, max_iter=1000)
    fit.fit(np.tile(features, (2, 1)), outcomes, sample_weight=weights)
    strength = fit.coef_[0][place - 1]
    return 100 * expit(strength)
