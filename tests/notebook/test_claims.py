"""Verdicts by hand-computed cases, claims as written down, the scoreboard and the comparison."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from pydantic import ValidationError

from beyond_dpo import stats
from beyond_dpo.machine import paths
from beyond_dpo.notebook import claims, report

NOTEBOOK = "11_expo_headline"
ALL = claims.all_claims()


def claim(**changes):
    values = {"notebook": NOTEBOOK, "id": "c", "words": "it rises", "kind": "experiment"}
    values |= {"paper": 1.0, "delta": 1.0, **changes}
    return claims.Claim(**values)


def effect(value, low, high, trainings=5):
    return claims.Effect(value, low, high, trainings, p=0.5, detectable=1.0)


# ---- verdicts


@pytest.mark.parametrize(
    "value, low, high, told, expected",
    [
        (0.9, 0.4, 1.4, True, "reproduced"),
        (2.0, 0.4, 3.6, True, "reproduced"),
        (2.1, 0.4, 3.8, True, "direction"),
        (0.45, 0.1, 0.8, True, "direction"),
        (0.3, 0.2, 0.4, True, "smaller"),
        (0.1, -0.2, 0.4, False, "no effect"),
        (-0.1, -0.4, 0.2, False, "no effect"),
        (-0.9, -1.4, -0.4, True, "contradicted"),
        (-0.2, -0.3, -0.1, True, "contradicted"),
        (4.0, -5.0, 13.0, False, "inconclusive"),
        (0.5, -5.0, 5.0, False, "inconclusive"),
        (0.9, 0.1, 1.7, False, "inconclusive"),  # its interval excludes 0, but not beside others
    ],
)
def test_verdicts_of_an_experiment_by_hand(value, low, high, told, expected):
    assert claims.verdict(claim(), effect(value, low, high), told=told) == expected
    turned = effect(-value, -high, -low)
    assert claims.verdict(claim(direction="-"), turned, told=told) == expected


def test_the_audits_examples_are_inconclusive():
    """The paper's value lies in the interval, which says nothing as it holds everything."""
    for value in (4.0, 0.0, -4.0):
        wide = stats.Estimate(value, 1.8, 0.5, 5)
        assert wide.low < -0.9
        assert wide.high > 0.9
        told = stats.discoveries([wide.p])
        measured = claims.as_effect(wide)
        assert claims.verdict(claim(), measured, told=told[0]) == "inconclusive"


@pytest.mark.parametrize("value", [-2.0, -0.3, 0.0, 0.2, 0.45, 0.9, 1.9, 3.0])
def test_a_wider_interval_never_makes_a_verdict_positive(value):
    rank = {"inconclusive": 0, "no effect": 0, "contradicted": 0, "smaller": 1, "direction": 1}
    rank["reproduced"] = 1
    ranks = []
    for error in np.geomspace(0.01, 10, 40):
        estimate = stats.Estimate(value, error, error, 5)
        (told,) = stats.discoveries([estimate.p])
        judged = claims.verdict(claim(), claims.as_effect(estimate), told=told)
        ranks.append(rank[judged])
    assert ranks == sorted(ranks, reverse=True)
    assert ranks[-1] == 0


def test_null_worlds_are_rarely_told_from_0():
    """Ten claims whose effects are 0: in at most about 5 of 100 such notebooks any is told."""
    any_told = []
    for seed in range(150):
        generator = np.random.default_rng(seed)
        values = generator.normal(size=(10, 5, 32)) + 0.3 * generator.normal(size=(10, 5, 1))
        estimates = [stats.two_level_mean(v, seed=seed, n_boot=100) for v in values]
        any_told.append(any(stats.discoveries([e.p for e in estimates])))
    assert np.mean(any_told) <= 0.11


def test_gates_and_single_trainings_come_before_any_number():
    big = effect(1.0, 0.9, 1.1)
    assert claims.verdict(claim(), None, told=False) == "not run"
    assert claims.verdict(claim(), big, told=True, gate_failed=True) == "not testable here"
    alone = claims.as_effect((1.0, 0.9, 1.1))
    assert claims.verdict(claim(), alone, told=False) == "one training"
    assert claims.verdict(claim(kind="beyond", paper=None), alone, told=False) == "one training"


def test_what_no_paper_has_is_not_reproduced():
    beyond = claim(kind="beyond", paper=None)
    assert claims.verdict(beyond, effect(0.9, 0.4, 1.4), told=True) == "direction"


@pytest.mark.parametrize(
    "low, high, told, expected",
    [
        (-0.9, 0.9, False, "reproduced"),
        (0.1, 0.9, True, "reproduced"),
        (-1.1, 0.9, False, "inconclusive"),
        (0.1, 1.1, True, "contradicted"),
    ],
)
def test_a_claim_of_no_difference(low, high, told, expected):
    none = claim(direction="0", paper=0.02)
    middle = (low + high) / 2
    assert claims.verdict(none, effect(middle, low, high), told=told) == expected


@pytest.mark.parametrize(
    "changes, ours, expected",
    [
        ({"kind": "recomputed", "paper": 5.8, "tolerance": 0.05}, 5.81, "equal"),
        ({"kind": "recomputed", "paper": 5.8, "tolerance": 0.05}, 5.75, "equal"),
        ({"kind": "recomputed", "paper": 5.8, "tolerance": 0.05}, 5.7, "not equal"),
        ({"kind": "recomputed", "paper": 12}, 12, "equal"),
        ({"kind": "replayed", "paper": 0.525, "tolerance": 0.03}, 0.55, "equal"),
        ({"kind": "exact", "paper": "+"}, 0.1, "holds"),
        ({"kind": "exact", "paper": "+"}, -0.1, "does not hold"),
        ({"kind": "exact", "paper": 0}, 1e-3, "does not hold"),
        ({"kind": "recomputed", "paper": None}, 1.0, "value not known"),
    ],
)
def test_numbers_without_an_error(changes, ours, expected):
    plain = claim(delta=None, **changes)
    assert claims.verdict(plain, claims.as_effect(ours), told=False) == expected


def test_numbers_that_are_not_finite_are_refused():
    for bad in (float("nan"), (1.0, float("nan"), 2.0), stats.Estimate(float("inf"), 0, 0, 2)):
        with pytest.raises(ValueError, match="not finite"):
            claims.as_effect(bad)


# ---- the file


def test_every_claim_says_what_is_measured_and_against_what():
    listed = [one for of_notebook in ALL.values() for one in of_notebook.values()]
    assert len(listed) > 20
    for one in listed:
        where = f"{one.notebook}.{one.id}"
        assert (paths.NOTEBOOKS / f"{one.notebook}.ipynb").exists(), where
        assert one.words, where
        if one.kind in claims.EXPERIMENTS:
            assert one.estimand, where
            assert one.because, where
            assert one.seeds >= 1, where
        if one.kind == "beyond":
            assert one.paper is None, where
        if one.kind == "experiment" and isinstance(one.paper, float) and one.paper:
            assert (one.paper > 0) == (one.direction == "+"), where


def test_at_most_eight_claims_are_headlines():
    headlines = [one for of in ALL.values() for one in of.values() if one.headline]
    assert 1 <= len(headlines) <= claims.MOST_HEADLINES


def paper_of(notebook: str) -> dict:
    """Return {id: what the paper has} of a notebook's claims."""
    return {name: one.paper for name, one in ALL[notebook].items()}


def test_off_the_shelf_gains_are_those_that_the_paper_prints():
    table = report.published("expo_acl_table5").set_index("model")
    paper = paper_of("18_expo_off_the_shelf")
    assert paper["mean_lc"] == round(table["delta_lc"].mean(), 2)
    assert paper["mean_wr"] == round(table["delta_wr"].mean(), 2)
    assert paper["largest_lc"] == table["delta_lc"].max()
    assert paper["largest_wr"] == table["delta_wr"].max()
    for name, large, small in (("tulu2", "70b", "7b"), ("internlm2", "20b", "1.8b")):
        ends = table.loc[[f"{name}-{small}", f"{name}-{large}"]]
        for unit in ("wr", "lc"):
            printed = ends[f"delta_{unit}"].diff().iloc[1]
            assert paper[f"{name}_{unit}"] == pytest.approx(printed)


def test_controlled_gains_are_those_that_the_paper_prints():
    table = report.published("expo_acl_table2").set_index("row")
    paper = paper_of("19_expo_controlled")
    rows = {10: "DPO 10% steps", 20: "DPO 20% steps", 40: "DPO 40% steps", 100: "DPO 100% steps"}
    for steps, row in rows.items():
        for unit in ("wr", "lc"):
            assert paper[f"{unit}_gain_{steps}"] == table.loc[f"{row} + ExPO", f"delta_{unit}"]


def test_the_bandits_numbers_are_those_read_off_the_figures():
    curves = report.published("mallows_fig8a_readoff").groupby("method")["reward"]
    paper = paper_of("21_mallows_bandit_frontier")
    best = curves.max()
    assert paper["best"] == pytest.approx(best["MallowsPO-phi"] - best["DPO"])
    arms = report.published("mallows_fig9_readoff").set_index(["method", "beta"])
    arms = arms[["arm1", "arm2", "arm3"]]
    paper = paper_of("22_mallows_bandit_training")
    for beta, name in {0.05: "005", 0.1: "01"}.items():
        apart = arms.loc[("MallowsPO-phi", beta)] - arms.loc[("DPO", beta)]
        assert paper[f"best_arms_{name}"] == pytest.approx(apart["arm2"] + apart["arm3"])
        assert paper[f"first_arm_{name}"] == pytest.approx(apart["arm1"])


def test_the_rows_of_figure_10_are_those_that_the_paper_prints():
    table = report.published("mallows_fig10_win_rates")
    paper = paper_of("26_mallows_plug_in")
    places = {
        "Anthropic HH": "hh",
        "Stanford Human Preferences": "shp",
        "H4 Stack Exchange": "stack",
    }
    assert len(table) == 12
    for row in table.itertuples():
        letter = "phi" if "phi" in row.comparison else "theta"
        name = f"{letter}_{places[row.dataset]}_{row.beta}".replace(".", "")
        assert paper[name] == pytest.approx(row.win_rate_pct / 100 - 0.5)


@pytest.mark.parametrize(
    "entry, message",
    [
        ({"kind": "experiment", "words": "w"}, "needs its delta"),
        ({"kind": "guess", "words": "w"}, "experiment"),
        ({"kind": "exact", "words": "w", "dleta": 1}, "dleta"),
        ({"kind": "exact", "words": "w", "paper": "rises"}, "paper"),
    ],
)
def test_a_claim_that_lacks_something_is_refused(tmp_path, entry, message):
    file = tmp_path / "claims.yaml"
    file.write_text(json.dumps({NOTEBOOK: {"a": entry}}), encoding="utf-8")
    with pytest.raises((ValidationError, ValueError), match=message):
        claims.all_claims(file)


def test_what_stands_under_all_holds_for_each(tmp_path):
    file = tmp_path / "claims.yaml"
    entries = {"all": {"kind": "exact", "paper": 1}, "a": {"words": "w"}, "b": {"words": "v"}}
    entries["b"]["paper"] = 2
    file.write_text(json.dumps({NOTEBOOK: entries}), encoding="utf-8")
    read = claims.all_claims(file)[NOTEBOOK]
    assert [one.paper for one in read.values()] == [1, 2]


# ---- judged, stored, shown


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project with three claims, and empty stores."""
    entries = {
        "rises": {"kind": "experiment", "words": "it rises", "paper": 1, "delta": 1},
        "more": {
            "kind": "beyond",
            "words": "more",
            "delta": 1,
            "headline": "More of it",
            "headline_unit": "of it",
            "headline_percent": True,
        },
        "printed": {"kind": "recomputed", "words": "as printed", "paper": 5.8, "tolerance": 0.05},
    }
    (tmp_path / "data").mkdir()
    text = json.dumps({NOTEBOOK: entries})
    (tmp_path / "data" / "claims.yaml").write_text(text, encoding="utf-8")
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    monkeypatch.setattr(paths, "ARTIFACTS", tmp_path / "artifacts")
    monkeypatch.setattr(paths, "FROZEN", tmp_path / "frozen")
    monkeypatch.delenv("BEYOND_DPO_CLAIMS", raising=False)
    claims.all_claims.cache_clear()
    yield tmp_path
    claims.all_claims.cache_clear()


CLEAR = stats.Estimate(1.0, 0.05, 0.05, 5)
UNCLEAR = stats.Estimate(0.5, 0.4, 0.4, 5)


def freeze(profile):
    target = paths.FROZEN / "claims"
    target.mkdir(parents=True, exist_ok=True)
    stored = claims.stored_at(NOTEBOOK, profile)
    stored.rename(target / stored.name)


def test_a_notebooks_claims_are_judged_and_stored(project):
    measured = {"rises": CLEAR, "more": UNCLEAR, "printed": 5.8123}
    df = claims.judge(NOTEBOOK, "night", measured, keys=["k-1", "k-1", "k-2"])
    assert df["verdict"].tolist()[::2] == ["reproduced", "equal"]
    assert df["verdict"][1].startswith("inconclusive (MDE ")
    content = json.loads(claims.stored_at(NOTEBOOK, "night").read_text())
    assert content["keys"] == ["k-1", "k-2"]
    assert [row["id"] for row in content["claims"]] == ["rises", "more", "printed"]
    assert content["claims"][0]["trainings"] == 5


def test_one_claim_beside_many_needs_a_clearer_effect(project):
    """p of 0.03 is told from 0 alone (≤ 5 %), and beside one of 0.9 is not (> 2.5 %)."""
    effect_3_percent = stats.Estimate(2.17, 0.0, 1.0, 5)
    assert effect_3_percent.p == pytest.approx(0.03, abs=1e-3)
    alone = claims.judge(NOTEBOOK, "cpu", {"rises": effect_3_percent})
    assert alone["verdict"][0] == "direction"
    beside = {"rises": effect_3_percent, "more": stats.Estimate(0.1, 0.0, 1.0, 5)}
    assert claims.judge(NOTEBOOK, "cpu", beside)["verdict"][0].startswith("inconclusive")


def test_a_failed_gate_and_a_missing_number(project):
    df = claims.judge(NOTEBOOK, "cpu", {"rises": CLEAR}, failed_gates=["rises"])
    assert df["verdict"].tolist() == ["not testable here", "not run", "not run"]


@pytest.mark.parametrize(
    "profile, measured, message",
    [("cup", {}, "'cup' is none"), ("cpu", {"rise": 1.0}, r"no \['rise'\] under 11_expo")],
)
def test_unknown_names_are_refused(project, profile, measured, message):
    with pytest.raises(ValueError, match=message):
        claims.judge(NOTEBOOK, profile, measured)


def test_the_scoreboard_takes_the_highest_profile_and_leaves_smoke_out(project):
    claims.judge(NOTEBOOK, "cpu", {"rises": UNCLEAR, "more": (0.4, 0.1, 0.7), "printed": 5.9})
    freeze("cpu")
    claims.judge(NOTEBOOK, "night", {"rises": CLEAR, "printed": 5.8})
    freeze("night")
    claims.judge(NOTEBOOK, "smoke", {"rises": stats.Estimate(9.0, 0.1, 0.1, 2)})
    freeze("smoke")
    board = claims.scoreboard()
    assert board["profile"].tolist() == ["night", "cpu", "night"]
    assert board["verdict"].tolist() == ["reproduced", "one training", "equal"]
    expected = "experiment: 1 reproduced; beyond: 1 one training; recomputed: 1 equal"
    assert claims.counts(board) == expected


def test_own_runs_count_only_where_they_are_asked_for(project):
    claims.judge(NOTEBOOK, "cpu", {"rises": UNCLEAR})
    freeze("cpu")
    committed = claims.scoreboard()
    claims.judge(NOTEBOOK, "night", {"rises": CLEAR})
    assert claims.scoreboard().equals(committed)
    assert claims.scoreboard(local=True)["profile"][0] == "night"


def test_the_readme_has_the_headlines_and_the_counts(project):
    readme = project / "README.md"
    readme.write_text("a\n<!-- scoreboard -->\nold\n<!-- /scoreboard -->\nb\n", encoding="utf-8")
    claims.judge(NOTEBOOK, "night", {"rises": CLEAR, "more": UNCLEAR, "printed": 5.8})
    freeze("night")
    assert claims.update_readme(readme)
    text = readme.read_text(encoding="utf-8")
    assert "| More of it | +50 % [" in text
    assert "] of it | beyond | 5 | inconclusive" in text
    assert "| [11](notebooks/11_expo_headline.ipynb), `night` |" in text
    assert "it rises" not in text
    assert "All 3 claims, by kind: experiment: 1 reproduced; beyond: 1 inconclusive" in text
    assert not claims.update_readme(readme)


def test_the_committed_readme_shows_the_frozen_scoreboard(tmp_path):
    """The README was updated after the last freeze."""
    text = (paths.ROOT / "README.md").read_text(encoding="utf-8")
    copy = tmp_path / "README.md"
    copy.write_text(text, encoding="utf-8")
    assert not claims.update_readme(copy)


@pytest.mark.parametrize(
    "value, percent, expected",
    [
        (0.1634, True, "+16"),
        (-0.0035, True, "0"),
        (-0.0873, True, "−9"),
        (0.161, False, "+0.16"),
        (-0.001, False, "0.00"),
    ],
)
def test_numbers_of_the_readme_have_few_digits_and_a_sign(value, percent, expected):
    assert claims._rounded(value, percent) == expected


def test_what_float_arithmetic_leaves_over_is_shown_as_0():
    assert claims._signed(-6.2e-16) == "0"
    assert claims._signed(-0.0035) == "-0.0035"


def test_a_readme_without_a_place_for_the_table_is_refused(project):
    readme = project / "README.md"
    readme.write_text("nothing", encoding="utf-8")
    with pytest.raises(ValueError, match="scoreboard"):
        claims.update_readme(readme)


@pytest.mark.parametrize(
    "name, own, expected",
    [
        ("rises", stats.Estimate(0.2, 0.5, 0.5, 2), "yes"),
        ("rises", stats.Estimate(-0.2, 0.5, 0.5, 2), "no"),
        ("more", stats.Estimate(-0.1, 0.2, 0.2, 2), "yes"),
        ("more", stats.Estimate(-5.0, 0.1, 0.1, 2), "no"),
        ("more", 0.2, "yes"),  # without an interval
        ("more", -0.1, "no"),
        ("printed", 5.83, "yes"),
        ("printed", 5.9, "no"),
    ],
)
def test_own_runs_beside_the_frozen_ones(project, name, own, expected):
    claims.judge(NOTEBOOK, "night", {"rises": CLEAR, "more": UNCLEAR, "printed": 5.8})
    freeze("night")
    claims.judge(NOTEBOOK, "cpu", {name: own})
    df = claims.compared()
    agreed = dict(zip(df["claim"], df["agree"], strict=True))
    assert agreed[claims.of(NOTEBOOK)[name].words] == expected
    assert list(agreed.values()).count("–") == 2


def test_the_command_prints_the_board_and_the_comparison(project, capsys):
    claims.judge(NOTEBOOK, "night", {"rises": CLEAR})
    freeze("night")
    claims.main([])
    assert "reproduced" in capsys.readouterr().out
    claims.main(["--compare"])
    assert "No claim" in capsys.readouterr().out
    claims.judge(NOTEBOOK, "cpu", {"rises": CLEAR})
    claims.main(["--compare", "11"])
    assert "yes" in capsys.readouterr().out


def test_the_command_updates_the_readme(project, capsys):
    (project / "README.md").write_text("<!-- scoreboard -->\n<!-- scoreboard -->\n")
    claims.main(["--readme"])
    assert capsys.readouterr().out.endswith("README.md updated\n")
    claims.main(["--readme"])
    assert capsys.readouterr().out.endswith("README.md was up to date\n")


def test_a_scoreboard_that_has_no_place_says_so_in_one_line(project):
    environment = os.environ | {"BEYOND_DPO_ROOT": str(project)}
    command = [sys.executable, "-m", "beyond_dpo.notebook.claims"]
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            command, stdout=full, stderr=subprocess.PIPE, text=True, env=environment
        )
    assert done.returncode == 1
    assert done.stderr == "the output cannot be written: No space left on device\n"


def test_a_table_leaves_out_what_no_claim_has(project):
    """Exact numbers have neither interval nor trainings."""
    df = claims.judge(NOTEBOOK, "cpu", {"printed": 5.8})
    assert list(df.columns) == ["claim", "paper", "paper_source", "ours", "verdict"]
    df = claims.judge(NOTEBOOK, "cpu", {"rises": CLEAR})
    assert {"low", "high", "trainings"} <= set(df.columns)
