"""MallowsPO's experiments: the bandit's published numbers, weights, raters, and a real frontier at
profile smoke.
"""

import dataclasses
import json

import numpy as np
import pandas as pd
import pytest

from beyond_dpo import dispersion
from beyond_dpo.losses import mallows_link
from beyond_dpo.notebook import report
from beyond_dpo.pipeline import config, mallows, stages

SMOKE = config.load("mallows", "smoke", betas=[0.1], methods=["dpo", "mallows_phi"])


def test_the_bandit_ends_where_the_papers_figures_end(store):
    """Figures 8a, 8b and 9, read off: within 0.01 in reward and 0.02 in probability."""
    table = mallows.bandits(config.load("mallows", "cpu")).csv("runs.csv.gz")
    assert table["step"].min() == 0 and table["step"].max() == 500_000
    assert table.groupby(["method", "beta"]).ngroups == 2 * 20
    end = table[table["step"] == 500_000].set_index(["method", "beta"])
    assert end.loc[("MallowsPO-φ", 0.02), "reward"] == pytest.approx(15.995, abs=0.01)
    assert end.loc[("MallowsPO-φ", 0.02), "kl"] == pytest.approx(0.76, abs=0.01)
    assert end.loc[("DPO", 0.3), ["reward", "kl"]].tolist() == pytest.approx(
        [15.59, 1.22], abs=0.01
    )
    for row in report.published("mallows_fig9_readoff").itertuples():
        method = row.method.replace("-phi", "-φ")
        arms = end.loc[(method, row.beta), [f"arm{arm}" for arm in range(1, 6)]]
        assert arms.tolist() == pytest.approx(
            [row.arm1, row.arm2, row.arm3, row.arm4, row.arm5], abs=0.02
        )
    start = table[table["step"] == 0]
    assert start["reward"].to_numpy() == pytest.approx(12.896) and (start["kl"] == 0).all()


def test_weights_of_the_pairs_are_those_of_the_reference_pass(store):
    artifact = mallows.dispersed(SMOKE)
    table, held = artifact.csv("dispersion.csv"), stages.reference(SMOKE).manifest
    assert table["weight"].mean() == pytest.approx(1, abs=1e-6) and (table["weight"] > 0).all()
    wanted, scale = dispersion.weights(table["chosen"], table["rejected"], table.index)
    assert table["weight"].to_numpy() == pytest.approx(wanted, rel=1e-3)
    assert (
        artifact.manifest["facts"]["phi_star"] == pytest.approx(scale, rel=1e-3)
        and held["stage"] == "reference"
    )


def test_raters_hold_numbers_only(store):
    table = mallows.raters(SMOKE).csv("raters.csv")
    assert (
        table.columns.tolist() == ["entropy", "tokens", "people", "sd", "split", "strength"]
        and len(table) == 12
    )
    assert (
        table.dtypes.map(pd.api.types.is_numeric_dtype).all()
        and table["entropy"].between(0, 1).all()
    )
    said = [ratings for _, ratings in mallows.rated("fixtures")]
    assert set(table["sd"]) <= {round(float(np.std(ratings)), 6) for ratings in said}
    assert (
        set(table["split"]) <= {0.0, 0.5}
        and (table["people"] == 2).all()
        and (table["tokens"] >= 4).all()
    )


def test_a_frontier_is_trained_sampled_along_the_way_and_judged(store):
    table, cfg = mallows.frontier(SMOKE).csv("responses.csv.gz"), SMOKE
    places = table.groupby(["loss", "part"]).size().to_dict()
    n = cfg.world.dev_prompts
    parts = [("dpo", "part1"), ("dpo", "end"), ("mallows_phi", "part1"), ("mallows_phi", "end")]
    assert places == {("sft", "end"): n} | dict.fromkeys(parts, n)
    assert table["logratio"].notna().all() and table[["gold", "vader"]].notna().all().all()
    assert table[table["loss"] == "sft"]["logratio"].abs().max() < 0.02, "but for bf16 the same"
    end = {
        name: rows["logratio"].tolist()
        for name, rows in table[table["part"] == "end"].groupby("loss")
    }
    half = table[(table["loss"] == "dpo") & (table["part"] == "part1")]["logratio"].tolist()
    assert end["dpo"] != half and end["dpo"] != end["mallows_phi"]
    assert not {"prompt_ids", "response_ids", "text", "id"} & set(table.columns)


def test_the_same_training_is_done_once_for_all_tables():
    """A cell of the grid at the frontier's β and learning rate is the frontier's own model."""
    cfg = config.load("mallows", "cpu")
    tables = (mallows.frontier, mallows.plug_in)
    models = [{key for key in table(cfg).upstream if key.startswith("train")} for table in tables]
    assert [len(keys) for keys in models] == [1 + 27, 1 + 4 + 12]
    assert len(set.union(*models)) == 1 + 27 + 4 + 6
    assert mallows.dispersed(cfg).upstream.keys() >= {stages.reference(cfg).key}


def test_rated_sentences():
    """The film reviews of Hutto & Gilbert 2014: 10,605 sentences with 15 to 29 raters; 3,708 on
    products with 20.
    """
    for source, size, people in (("movie", 10605, (15, 29)), ("amazon", 3708, (20, 20))):
        sentences = mallows.rated(source)
        counts = [len(ratings) for _, ratings in sentences]
        assert len(sentences) == size and (min(counts), max(counts)) == people
        assert all(-4 <= rating <= 4 for _, ratings in sentences for rating in ratings)
        assert all(text.strip() for text, _ in sentences)


def test_prompts_from_elsewhere(store):
    rows = json.loads((mallows.elsewhere(SMOKE, "fixtures").get() / "fixtures.json").read_text())
    low, high = SMOKE.world.prompt_tokens
    assert len(rows) == 6 and all(low <= len(row["prompt_ids"]) <= high for row in rows)
    with pytest.raises(config.ConfigError, match="elsewhere_prompts=500, but fixtures has only"):
        mallows.elsewhere(dataclasses.replace(SMOKE, elsewhere_prompts=500), "fixtures").get()
    with pytest.raises(config.ConfigError, match="'imdb2' has no reader"):
        mallows.rated("imdb2")


def test_the_drawn_link_is_the_loss():
    import torch

    s = np.linspace(-3, 3, 7)
    wanted = mallows_link(torch.tensor(s), torch.full((7,), 0.3), 0.2)
    assert mallows.link(s, 0.3, 0.2) == pytest.approx(wanted.numpy(), rel=1e-6)


def test_paper_profiles_hold_the_published_settings(monkeypatch):
    monkeypatch.setenv("COMPUTE", "plan")
    imdb, llama, hh = (config.load("mallows", "paper", name) for name in ("", "llama3", "hh"))
    assert imdb.world.target == "openai-community/gpt2-large" and imdb.train.optimizer == "rmsprop"
    assert (imdb.train.lr, imdb.train.global_batch, round(imdb.train.warmup * 391)) == (
        1e-6,
        64,
        150,
    )
    assert hh.world.target == "EleutherAI/pythia-2.8b" and hh.world.dataset == "Anthropic/hh-rlhf"
    assert (hh.train.optimizer, hh.train.lr, hh.train.global_batch, hh.grid_betas) == (
        "rmsprop",
        1e-6,
        32,
        (0.1, 0.5),
    )
    assert hh.elsewhere == ("stanfordnlp/SHP", "HuggingFaceH4/stack-exchange-preferences")
    table = report.published("mallows_table6_beta_lr")
    cells = {(b, lr) for b in llama.grid_betas for lr in llama.grid_lrs}
    assert cells == set(zip(table["beta"], table["lr"], strict=True))
    for row in report.published("mallows_table1_plug_in").itertuples():
        given = {"lr": llama.train.lr} | llama.plug_ins[row.base_method.lower()]
        assert (given["beta"], given["lr"]) == (row.beta, row.lr)
    works = "\n".join(one.does for one in mallows.plug_in(llama).upstream.values())
    assert "MALLOWS_SIMPO" in works and "--num_accelerators 8" in works
    with pytest.raises(
        config.ConfigError, match="unknown experiment 'lama3'; did you mean 'llama3'"
    ):
        config.load("mallows", "paper", "lama3")


def frontier(shift=0.0, noise=0.0, reach=3.0):
    """Two curves y = x − 0.1 x² (+ shift) at five places of four prompts, which differ by a
    constant.
    """
    rng, rows = np.random.default_rng(0), []
    for method, offset, end in (("a", shift, reach), ("b", 0.0, 4.0)):
        for place, x in enumerate(np.linspace(0, end, 5)):
            for prompt in range(4):
                y = x - 0.1 * x**2 + offset + prompt + noise * rng.normal()
                rows.append(
                    {"method": method, "seed": 0, "place": place, "prompt": prompt, "x": x, "y": y}
                )
    return pd.DataFrame(rows)


def test_gap_at_equal_x():
    """Curves that differ by a constant differ by it at every x, whatever places they were measured
    at.
    """
    gap = {"x": "x", "y": "y", "by": "method", "pair": ("a", "b"), "seed": 0}
    assert mallows.gap_at_equal(frontier(0.5), **gap) == pytest.approx((0.5, 0.5, 0.5))
    assert mallows.gap_at_equal(frontier(0.5), **gap | {"pair": ("b", "a")}) == pytest.approx(
        (-0.5, -0.5, -0.5)
    )
    for curve in (
        np.sqrt,
        lambda x: x / (x + 3),
        lambda x: 1 - np.exp(-x / 4),
    ):  # one curve, no parabola, half as far
        same = frontier(reach=2)
        same["y"] = curve(same["x"])
        assert abs(mallows.gap_at_equal(same, **gap)[0]) < 0.01 * curve(4)
    mean, low, high = mallows.gap_at_equal(frontier(0.5, noise=0.2), **gap)
    assert low < mean < high and abs(mean - 0.5) < 0.3
    other = frontier(0.1).assign(seed=1, y=lambda rows: rows["y"] + 7)
    both = pd.concat([frontier(0.5), other])
    assert mallows.gap_at_equal(both, **gap) == pytest.approx((0.3, 0.3, 0.3)), (
        "seeds may lie elsewhere"
    )
    with pytest.raises(ValueError, match="a range of x in common"):
        mallows.gap_at_equal(
            frontier().assign(x=lambda rows: rows["x"] + 9 * (rows["method"] == "a")), **gap
        )
    with pytest.raises(ValueError, match="three places each"):
        mallows.gap_at_equal(frontier().query("place < 2"), **gap)
    with pytest.raises(ValueError, match="all prompts"):
        mallows.gap_at_equal(frontier().query("prompt < 3 or place > 0"), **gap)


@pytest.mark.parametrize("experiment", [mallows.dispersed, mallows.raters])
def test_a_machine_that_is_too_small_is_told_before_the_reference_pass(
    experiment, monkeypatch, tmp_path
):
    def lacks(cfg):
        raise config.ConfigError("too small")

    monkeypatch.setattr(mallows.needs, "check", lacks)
    monkeypatch.setattr(stages.workers, "run", lambda *_, **__: pytest.fail("it computes"))
    with pytest.raises(config.ConfigError, match="too small"):
        experiment(SMOKE).make(tmp_path)
