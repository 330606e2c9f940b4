"""What a source must be: sets of sources from which the target itself learns, each apart."""

import dataclasses
import json

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import load_file

from beyond_dpo.pipeline import artifacts, config, corpus, expo, sources, stages, wrpo
from beyond_dpo.rows import read_rows, write_rows

SMOKE = config.load("wrpo", "smoke", seeds=[0])
SETS = SMOKE.compared


def rows_of(artifact):
    return read_rows(artifact.get() / "pairs.jsonl")


def lines(artifact):
    return stages.json_lines(artifact.get() / "responses.jsonl")


def ids(rows):
    return {row["id"] for row in rows}


# --- the four responses of a prompt


OWN = {"id": "p", "responses": {"target_chosen": [1], "rejected": [2]}}


def answers(*rows):
    """Return a table of answers; rows: (source, reward, response_ids)."""
    table = pd.DataFrame(rows, columns=["source", "reward", "response_ids"])
    return table.assign(id="p")


def test_the_best_of_all_sources_stands_beside_the_worst_of_the_same_one():
    table = answers(("a", 1.0, [3]), ("b", 5.0, [4]), ("b", 2.0, [5]), ("a", -9.0, [6]))
    responses, source = wrpo._beside(OWN, table)
    assert source == "b"
    assert responses == {
        "source_chosen": [4],
        "target_chosen": [1],
        "rejected": [2],
        "source_rejected": [5],
    }


def test_where_sources_say_nothing_the_targets_own_pair_stands_in():
    responses, source = wrpo._beside(OWN, None)
    assert source == "Target"
    assert responses["source_chosen"] == responses["target_chosen"] == [1]
    assert responses["source_rejected"] == responses["rejected"] == [2]
    alike = answers(("a", 1.0, [3]), ("b", 1.0, [4]))
    assert wrpo._beside(OWN, alike) == (responses, "Target")


@pytest.mark.parametrize("of_people", [1, 2], ids=["one answer", "answers that score alike"])
def test_a_source_without_a_worse_answer_has_the_targets_worst(of_people):
    table = answers(*[("people", 5.0, [4])] * of_people, ("a", 1.0, [3]))
    responses, source = wrpo._beside(OWN, table)
    assert source == "people"
    assert responses["source_chosen"] == [4]
    assert responses["source_rejected"] == [2]


# --- sources


@pytest.fixture(scope="module")
def asked(store):
    return wrpo.block(SMOKE, 0)


def test_the_target_as_a_source_answers_often_and_not_with_what_it_is_paired_with(asked):
    many = sources.answers(SMOKE, "many", asked)
    assert len(lines(many)) == 8 * 6
    own = sources.own(SMOKE, stages.Weights(stages.sft(SMOKE)), asked)
    assert len(lines(own)) == 8 * 3
    first = [[line["response_ids"] for line in lines(result)[:3]] for result in (many, own)]
    assert first[0] != first[1]


def test_people_who_liked_the_film_answer_alone(asked):
    _, reviews, _ = corpus.shuffled("fixtures")
    prompts = asked.rows()
    label = {row["id"]: reviews[int(row["id"][1:])][1] for row in prompts}
    assert set(label.values()) == {0, 1}
    answered = ids(lines(sources.answers(SMOKE, "positive", asked)))
    assert answered == {name for name, of_review in label.items() if of_review == 1}
    everybody = sources.answers(SMOKE, "human", asked)
    assert ids(lines(everybody)) == ids(prompts)


def test_the_source_that_expo_pushes_on_is_at_the_largest_alpha_that_passes(asked):
    pushed = sources.answers(SMOKE, "pushed", asked)
    facts = pushed.manifest["facts"]
    teacher = config.load("expo", "smoke", seeds=[0])
    gate = expo.largest_passing(teacher, 1.0, 0)
    assert gate.key in pushed.upstream
    assert facts["alpha"] == gate.json("alpha.json")["alpha"]
    start = stages.sft(SMOKE)
    weights = stages.Weights(start, stages.aligned(teacher, 1.0, 0), facts["alpha"])
    said = sources.own(SMOKE, weights, asked)
    assert said.key == facts["key"]
    assert lines(said) == lines(pushed)


def invented_scores(monkeypatch, repetitions, distinct):
    """Let ExPO's points be invented: at α of −1 (SFT), 0, 1, 2 responses are such."""

    def point(cfg, fraction, seed, alpha, split):
        place = 0 if fraction == 0 else 1 + int(alpha)

        def make(out):
            row = {"id": "a", "sample": 0, "reward": 0.0, "repetition": repetitions[place]}
            row |= {"logp": -1.0, "logp_sft": None}
            (out / "scores.jsonl").write_text(json.dumps(row) + "\n")
            return {"distinct_2": distinct[place]}

        inputs = {"invented": [place, repetitions, distinct]}
        return artifacts.Artifact("scores", 2, inputs, make)

    monkeypatch.setattr(expo, "point", point)
    return expo.largest_passing(config.load("expo", "smoke"), 1.0, 0)


@pytest.mark.parametrize(
    "repetitions, distinct, passing",
    [
        ((0.0, 0.0, 0.05, 0.06), (0.8, 0.8, 0.4, 0.8), [0.0, 1.0]),
        ((0.0, 0.0, 0.0, 0.0), (0.8, 0.8, 0.39, 0.4), [0.0, 2.0]),
        ((0.2, 0.25, 0.26, 0.3), (0.1, 0.05, 0.1, 0.1), [0.0]),
    ],
)
def test_the_gate_of_the_source_by_hand(store, monkeypatch, repetitions, distinct, passing):
    gate = invented_scores(monkeypatch, repetitions, distinct)
    assert gate.json("alpha.json") == {"alpha": passing[-1], "passing": passing}


def test_a_model_that_passes_nowhere_is_no_source(store, monkeypatch):
    gate = invented_scores(monkeypatch, (0.0, 0.5, 0.5, 0.5), (0.8, 0.8, 0.8, 0.8))
    with pytest.raises(config.ConfigError, match="passes the gate at no α"):
        gate.get()


@pytest.mark.parametrize("profile", ["smoke", "cpu", "night"])
def test_the_world_is_that_of_expo_and_shares_its_models(profile, monkeypatch):
    monkeypatch.setenv("COMPUTE", "plan cold")
    here = config.load("wrpo", profile)
    there = config.load("expo", profile)
    upstream = {**wrpo.compared(here).upstream, **wrpo.strength(here).upstream}
    shared = [stages.sft(there), stages.aligned(there, 1.0, 0), stages.reference(there)]
    shared += [stages.reward(there.world, name) for name in ("gold", "reward", "person")]
    shared += [stages.pairs(there, 0)]
    shared += [expo.point(there, 1.0, 0, alpha, "dev_prompts") for alpha in there.alphas[1.0]]
    assert not [artifact.stage for artifact in shared if artifact.key not in upstream]


# --- prompts


def test_what_judges_is_learnt_by_nobody(store, asked):
    held_out = ids(wrpo.judged_on(SMOKE).rows())
    assert len(held_out) == SMOKE.held_out == 6
    texts = stages.texts(SMOKE.world)
    for split in ("prompts", "dev_prompts"):
        assert not held_out & ids(texts.json(f"{split}.json"))
    assert ids(asked.rows()) < ids(texts.json("prompts.json"))


def test_a_training_learns_from_the_pool_of_its_seed(monkeypatch):
    monkeypatch.setenv("COMPUTE", "plan cold")
    cfg = config.load("wrpo", "night")
    splits = [wrpo.block(cfg, seed).prompts.inputs["split"] for seed in cfg.seeds]
    assert splits == ["prompts", "prompts_1", "prompts_2"]
    judged_on = wrpo.judged_on(cfg).prompts.inputs
    assert (judged_on["split"], judged_on["number"]) == ("prompts_4", 128)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"world.pools": 1}, "last of world.pools=1, from which a training with seed 0 learns"),
        ({"seeds": [0, 1]}, "last of world.pools=2, from which a training with seed 1 learns"),
        ({"held_out": 17}, "held_out=17, but a pool has world.prompts=16"),
        ({"compared": [["many", "fewer"]]}, "unknown source 'fewer'"),
        ({"compared": [[]]}, r"compared\.0: .* at least 1 item"),
        ({"kl_alphas": [-1.0]}, r"kl_alphas\.0: .* greater than -1"),
        ({"learnt": 0}, "learnt: .* greater than or equal to 1"),
        ({"margin": 0.0}, "margin: .* greater than 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes, message):
    with pytest.raises(config.ConfigError, match=message):
        config.load("wrpo", "smoke", **changes)


@pytest.mark.parametrize("experiment", [wrpo.compared, wrpo.strength])
def test_nothing_to_compare_is_said(experiment):
    nothing = config.load("wrpo", "smoke", compared=[])
    with pytest.raises(config.ConfigError, match="compared is empty at profile smoke"):
        experiment(nothing)


# --- what is learnt


@pytest.fixture(scope="module")
def own_pairs(store):
    return wrpo.own_pairs(SMOKE, 0)


@pytest.mark.parametrize("names", SETS, ids=wrpo.set_name)
def test_every_set_is_learnt_on_the_same_own_pairs(own_pairs, names):
    fused = wrpo.fused_pairs(SMOKE, names, 0)
    rows = rows_of(fused)
    assert len(rows) > 4
    for row, own in zip(rows, rows_of(own_pairs), strict=True):
        assert row["id"] == own["id"]
        assert list(row["responses"]) == [*config.FUSED, "source_rejected"]
        for name in wrpo.OWN:
            assert row["responses"][name] == own["responses"][name]
    wins = fused.manifest["facts"]["wins"]
    assert sum(wins.values()) == len(rows)
    assert set(wins) <= {*names, "Target"}


def test_positive_people_leave_prompts_to_the_target(own_pairs):
    fused = wrpo.fused_pairs(SMOKE, ("positive",), 0)
    wins = fused.manifest["facts"]["wins"]
    assert wins["Target"] > 0
    assert wins["positive"] > 0
    stand_ins = 0
    for row in rows_of(fused):
        responses = row["responses"]
        stand_ins += responses["source_chosen"] == responses["target_chosen"]
    assert stand_ins == wins["Target"]


def test_wrpo_with_silent_sources_is_dpo(own_pairs):
    """At any α, to float error: so sets that answer some prompts alone compare with DPO.

    Adam makes steps of gradients that are almost 0, so single weights may differ by more.
    """

    def make(out):
        rows = []
        for row in rows_of(own_pairs):
            responses, _ = wrpo._beside(row, None)
            rows.append({**row, "responses": responses})
        write_rows(out / "pairs.jsonl", rows)

    silent = artifacts.Artifact("fused-pairs", 1, {"silent": own_pairs}, make)
    settings = stages.changed(SMOKE.train, loss="wrpo", alpha=0.7, dynamic=False, beta=0.1)
    four = (*config.FUSED, "source_rejected")
    fused = wrpo._from_target(SMOKE, settings, silent, config.FUSED, four, 0, "silent")
    alone = wrpo._own_training(SMOKE, 0)
    weights = [load_file(model.get() / "model.safetensors") for model in (fused, alone)]
    start = load_file(stages.sft(SMOKE).get() / "model.safetensors")
    moved = 0.0
    apart = 0.0
    for name, tensor in weights[1].items():
        moved += ((tensor - start[name]) ** 2).sum()
        apart += ((tensor - weights[0][name]) ** 2).sum()
    assert moved > 1e-4
    assert apart < 1e-4 * moved


@pytest.mark.parametrize("profile, sets, seeds", [("cpu", 2, 1), ("night", 4, 3)])
def test_the_trainings_of_the_comparison(monkeypatch, profile, sets, seeds):
    """Each seed: DPO, each set with two α, and the same source's best and worst."""
    monkeypatch.setenv("COMPUTE", "plan cold")
    cfg = config.load("wrpo", profile)
    assert (len(cfg.compared), len(cfg.seeds)) == (sets, seeds)
    upstream = wrpo.compared(cfg).upstream.values()
    trained = [artifact for artifact in upstream if artifact.stage == "train"]
    assert len(trained) == 2 + seeds * (1 + 2 * sets + 1)  # SFT and ExPO's full DPO too
    references = [artifact for artifact in upstream if artifact.stage == "reference"]
    assert len(references) == 1 + seeds * (1 + sets)  # one serves all that learns from a set


# --- what is compared


@pytest.fixture(scope="module")
def compared(store):
    return wrpo.compared(SMOKE)


def test_each_model_is_judged_on_the_prompts_held_out(compared):
    table = compared.csv("responses.csv.gz")
    names = ["Target", "DPO on own pairs"]
    for names_of_set in SETS:
        names += [wrpo.set_name(names_of_set, alpha) for alpha in (0.1, 0.5)]
    names.append("pushed, best and worst")
    assert list(table["model"].unique()) == names
    assert (table.groupby("model")["prompt"].nunique() == 6).all()
    assert table[["gold", "reward", "words", "vader", "person", "logratio"]].notna().all(axis=None)
    on_line = table[table["model"] == "DPO on own pairs"]["alpha"]
    assert set(on_line.dropna()) == {-0.5, 1.0}
    assert on_line.isna().sum() == 6 * SMOKE.test_samples


def test_the_line_of_dpo_begins_at_the_target(compared):
    curves = wrpo.measured(SMOKE, compared, lines={wrpo.DPO: wrpo.TARGET})
    assert list(curves.alphas[wrpo.DPO]) == [-1, -0.5, 0, 1]
    kl = curves.kl(wrpo.DPO)
    assert kl.shape == (1, 4)
    assert abs(kl[0, 0]) < 0.02
    start = curves.estimate(curves.at(wrpo.DPO, -1.0))
    assert start.value == pytest.approx(curves.estimate(curves.sft()).value, abs=1e-9)
    gold = curves.values(wrpo.DPO, "gold", "test")
    assert ((gold >= 0) & (gold <= 1)).all()


def test_the_strength_of_sets_is_measured_on_dev_prompts(store):
    best = wrpo.strength(SMOKE).csv("best.csv")
    assert list(best["sources"].unique()) == ["Target", *map(wrpo.set_name, SETS)]
    assert best.groupby("sources")["prompt"].nunique()[["Target", "many"]].tolist() == [6, 6]
    assert (best["nats"] < 0).all()
    facts = wrpo.strength(SMOKE).json("facts.json")
    assert facts["many"]["responses"] == 6 * 6
    assert facts["Target"]["responses"] == 6 * 3
    table = wrpo.manipulation(SMOKE, best)
    assert table["sources"].tolist() == list(map(wrpo.set_name, SETS))
    answered = {name: facts[name]["responses"] for name in ("positive",)}
    assert table.set_index("sources")["prompts"]["positive"] == answered["positive"] < 6


def logit(share):
    return float(np.log(share / (1 - share)))


def bests(name, golds, nats=-2.0):
    """Return rows of best.csv; golds: σ(gold) by prompt."""
    rows = []
    for prompt, gold in golds.items():
        row = {"sources": name, "prompt": prompt, "gold": logit(gold), "reward": 10 * gold}
        rows.append({**row, "nats": nats})
    return rows


def judged_sets(**of_sets):
    cfg = dataclasses.replace(SMOKE, compared=tuple((name,) for name in of_sets), margin=0.1)
    own = dict.fromkeys(range(8), 0.5)
    rows = bests("Target", own, nats=-1.5)
    for name, golds in of_sets.items():
        rows += bests(name, golds)
    return wrpo.manipulation(cfg, pd.DataFrame(rows)).set_index("sources")


def test_a_set_is_testable_where_its_best_beats_the_targets_by_the_margin():
    strong = dict.fromkeys(range(8), 0.61)
    near = dict.fromkeys(range(8), 0.59)
    table = judged_sets(strong=strong, near=near)
    assert table["stronger"].tolist() == pytest.approx([0.11, 0.09])
    assert table["by_reward"].tolist() == pytest.approx([1.1, 0.9])
    assert table["further"].tolist() == pytest.approx([0.5, 0.5])
    assert table["testable"].tolist() == [True, False]


def test_a_set_whose_lead_could_be_chance_is_not_testable():
    """It leads by 0.15 in the mean, which prompts as different as these may show of no lead."""
    scattered = {0: 0.99, 1: 0.99, 2: 0.99, 3: 0.99, 4: 0.99, 5: 0.05, 6: 0.1, 7: 0.1}
    table = judged_sets(scattered=scattered)
    assert table["stronger"]["scattered"] > 0.1
    assert table["low"]["scattered"] < 0
    assert not table["testable"]["scattered"]


def test_strength_is_compared_on_prompts_that_both_answer():
    table = judged_sets(half=dict.fromkeys(range(4), 0.7))
    assert table["prompts"]["half"] == 4
    assert table["stronger"]["half"] == pytest.approx(0.2)


def test_what_decides_the_comparison_is_in_its_key():
    key = wrpo.compared(SMOKE).key
    changes = {
        "compared": SETS[:2],
        "compared_alphas": (0.1,),
        "learnt": 7,
        "held_out": 5,
        "kl_prompts": 3,
        "kl_alphas": (1.0,),
        "test_samples": 3,
        "objectives": {"dpo": {"beta": 0.2}},
    }
    for name, value in changes.items():
        changed = dataclasses.replace(SMOKE, **{name: value})
        assert wrpo.compared(changed).key != key, name
    assert wrpo.compared(dataclasses.replace(SMOKE, margin=0.2)).key == key


# --- estimates, by hand


def test_points_are_placed_on_their_lines():
    table = pd.DataFrame(
        {
            "model": ["start", "dpo", "dpo", "dpo"],
            "seed": [0, 0, 1, 1],
            "alpha": [np.nan, np.nan, np.nan, 1.0],
            "gold": [1, 2, 3, 4],
        }
    )
    placed = wrpo._placed(table, {"dpo": "start"})
    rows = placed[["model", "seed", "alpha", "gold"]].values.tolist()
    assert rows == [
        ["start", 0, 0.0, 1],
        ["dpo", 0, 0.0, 2],
        ["dpo", 1, 0.0, 3],
        ["dpo", 1, 1.0, 4],
        ["dpo", 0, -1.0, 1],
        ["dpo", 1, -1.0, 1],
    ]
    assert set(placed["split"]) == {"test"}


def test_models_of_several_choices_of_sources_are_told_apart():
    table = pd.DataFrame({"model": ["WRPO"], "sources": ["a + b"], "seed": [0]})
    placed = wrpo._placed(table, {})
    assert placed["model"].tolist() == ["WRPO · a + b"]
    assert placed["alpha"].tolist() == [0.0]
