"""The picture of the README: a panel a paper, drawn from the numbers of the committed figures.

    python -m beyond_dpo.notebook.overview

draws figures/overview.svg, and figures/overview.json with its numbers. `make render` does it after
the notebooks, whose figures it takes its numbers from.
"""

import argparse
import json

import matplotlib.pyplot as plt
import pandas as pd

from beyond_dpo.files import write_file
from beyond_dpo.machine import paths
from beyond_dpo.notebook import figures

NAME = "overview"
EXPO = "expo_fig5_reward_length_vs_alpha"
MALLOWS = "mallows_fig0a_contextual_quality"
WRPO = "wrpo_fig0h_fusion_alpha"
SPREAD = 1.0  # of log(-log φ) over the contexts, in MallowsPO's panel
# What the panel calls that which MallowsPO is told of φ.
TOLD = {
    "true": "the\ntruth",
    "noise 0.5": "0.5",
    "noise 1": "1",
    "noise 2": "2",
    "shuffled": "other\ncontexts'",
}
# What the panel calls WRPO's sources: s, how much stronger, and d, how far away, in deviations of
# the target's own responses.
SOURCES = {
    "s 0, d 0": "equal, near",
    "s 2, d 0": "stronger, near",
    "s 2, d 3": "stronger, far",
    "s 4, d 3": "much stronger, far",
}


def drawn_numbers(name: str) -> tuple[pd.DataFrame, dict]:
    """Return the numbers of a committed figure, and all that stands beside them.

    Raises FileNotFoundError where no such figure is committed.
    """
    record = json.loads((paths.FIGURES / f"{name}.json").read_text(encoding="utf-8"))
    return pd.DataFrame(record.pop("data")), record


def extrapolation(df: pd.DataFrame, ax) -> None:
    """Draw the gold reward against α, a curve a share of the preference pairs."""
    gold = df[df["measure"] == "gold"]
    columns = {"y": "mean", "low": "low", "high": "high"}
    figures.alpha_curves(gold, ax, **columns, mark={}, ylabel="gold reward (mean σ)")
    ax.legend(title="of the pairs", loc="lower left")
    ax.set(
        title="ExPO: extrapolate\n(SmolLM2-135M, film reviews)",
        xlabel="α, beyond the aligned model",
    )


def dispersion(df: pd.DataFrame, ax) -> None:
    """Draw MallowsPO's lead over DPO by how wrong the estimate of φ is."""
    here = df[df["spread"] == SPREAD]
    for shift, (name, points) in zip((-0.1, 0.1), here.groupby("method", sort=False), strict=True):
        half = points["high"] - points["ahead"]
        style = {"fmt": "o", "color": figures.COLOURS[name], "capsize": 3, "label": name}
        ax.errorbar(points["place"] + shift, points["ahead"], half, **style)
    ax.axhline(0, color="#333333", linewidth=1, zorder=1)
    ax.set_xticks(sorted(here["place"].unique()), [TOLD[name] for name in here["told"].unique()])
    ax.legend(loc="lower left")
    ax.set(title="MallowsPO: weight by agreement\n(simulation, exact rewards)")
    ax.set_xlabel("error of its estimate of agreement")
    ax.set_ylabel("lead over DPO at equal KL (ranks)")


def fusion(df: pd.DataFrame, ax) -> None:
    """Draw what WRPO gains over DPO against α, a curve a source."""
    here = df[df["source"].isin(SOURCES)]
    here = here.assign(source=here["source"].map(SOURCES))
    columns = {"y": "gain", "low": "low", "high": "high"}
    figures.alpha_curves(here, ax, by="source", **columns, mark={})
    ax.axhline(0, color="#333333", linewidth=1, zorder=1)
    ax.legend(title="source of responses", loc="lower left")
    ax.set(title="WRPO: learn from other models\n(simulation, exact rewards)")
    ax.set(xlabel="α, share of the source's response", ylabel="lead over DPO on own pairs (%)")
    ax.set_ylim(bottom=-0.75 * here["high"].max())  # room for the legend


def draw() -> tuple[plt.Figure, dict]:
    """Return the figure, and what is kept beside it."""
    fig, axes = plt.subplots(1, 3, figsize=(figures.WIDTH, 3.7))
    panels = ((EXPO, extrapolation), (MALLOWS, dispersion), (WRPO, fusion))
    stamps = []
    content = {"figure": NAME, "panels": []}
    for ax, (name, panel) in zip(axes, panels, strict=True):
        df, record = drawn_numbers(name)
        panel(df, ax)
        paper, _, _ = ax.get_title().partition(":")
        stamps.append(f"{paper}: {record['stamp']}")
        content["panels"].append({"figure": name, "keys": record["keys"]})
    stamp = " | ".join(stamps)
    figures.write_stamp(fig, stamp)
    return fig, content | {"stamp": stamp}


def save() -> None:
    """Write figures/overview.svg and figures/overview.json; the same bytes each time."""
    with plt.rc_context():
        figures.style()
        plt.rc("font", size=8)
        plt.rc("axes", titlesize=8.5)
        plt.rc("legend", fontsize=7, title_fontsize=7)
        plt.rc("lines", linewidth=1.5, markersize=3.5)
        fig, content = draw()
        picture = figures.svg(fig)
        plt.close(fig)
    write_file(paths.FIGURES / f"{NAME}.svg", picture)
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    write_file(paths.FIGURES / f"{NAME}.json", text)


if __name__ == "__main__":
    argparse.ArgumentParser(
        prog="python -m beyond_dpo.notebook.overview", description="Draw the README's picture."
    ).parse_args()
    save()
    print("figures/overview.svg is drawn")
