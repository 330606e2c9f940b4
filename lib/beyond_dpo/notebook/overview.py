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
    path = paths.FIGURES / f"{name}.json"
    text = path.read_text(encoding="utf-8")
    record = json.loads(text)
    data = record.pop("data")
    return pd.DataFrame(data), record


def extrapolation(df: pd.DataFrame, ax) -> None:
    """Draw the gold reward against α, a curve a share of the preference pairs."""
    is_gold = df["measure"] == "gold"
    figures.alpha_curves(
        df[is_gold],
        ax,
        y="mean",
        low="low",
        high="high",
        mark={},
        ylabel="gold reward (mean σ)",
    )
    ax.legend(title="of the pairs", loc="lower left")
    ax.set(
        title="ExPO: extrapolate\n(SmolLM2-135M, film reviews)",
        xlabel="α, beyond the aligned model",
        ylim=(0, 1),  # bands of three trainings may be wider
    )


def dispersion(df: pd.DataFrame, ax) -> None:
    """Draw MallowsPO's lead over DPO by how wrong the estimate of φ is."""
    is_shown = df["spread"] == SPREAD
    shown = df[is_shown]
    methods = shown.groupby("method", sort=False)
    shifts = (-0.1, 0.1)  # so that the two methods do not cover each other
    for shift, (name, points) in zip(shifts, methods, strict=True):
        ax.errorbar(
            points["place"] + shift,
            points["ahead"],
            points["high"] - points["ahead"],
            fmt="o",
            color=figures.COLOURS[name],
            capsize=3,
            label=name,
        )
    _mark_no_lead(ax)
    places = sorted(shown["place"].unique())
    names = [TOLD[told] for told in shown["told"].unique()]
    ax.set_xticks(places, names)
    ax.legend(loc="lower left")
    ax.set(
        title="MallowsPO: weight by agreement\n(simulation, exact rewards)",
        xlabel="error of its estimate of agreement",
        ylabel="lead over DPO at equal KL (ranks)",
    )


def fusion(df: pd.DataFrame, ax) -> None:
    """Draw what WRPO gains over DPO against α, a curve a source."""
    is_shown = df["source"].isin(SOURCES)
    shown = df[is_shown]
    names = shown["source"].map(SOURCES)
    figures.alpha_curves(
        shown.assign(source=names),
        ax,
        by="source",
        y="gain",
        low="low",
        high="high",
        mark={},
    )
    _mark_no_lead(ax)
    ax.legend(title="source of responses", loc="lower left")
    ax.set(
        title="WRPO: learn from other models\n(simulation, exact rewards)",
        xlabel="α, share of the source's response",
        ylabel="lead over DPO on own pairs (%)",
    )
    highest = shown["high"].max()
    ax.set_ylim(bottom=-0.75 * highest)  # room for the legend


def _mark_no_lead(ax) -> None:
    """Draw the line where a method is as good as DPO."""
    ax.axhline(0, color="#333333", linewidth=1, zorder=1)


PANELS = {
    EXPO: extrapolation,
    MALLOWS: dispersion,
    WRPO: fusion,
}


def draw() -> tuple[plt.Figure, dict]:
    """Return the figure, and what is kept beside it."""
    fig, axes = plt.subplots(1, len(PANELS), figsize=(figures.WIDTH, 3.7))
    stamps = []
    sources = []
    for ax, (name, draw_panel) in zip(axes, PANELS.items(), strict=True):
        df, record = drawn_numbers(name)
        draw_panel(df, ax)
        title = ax.get_title()
        paper, _, _ = title.partition(":")
        stamps.append(f"{paper}: {record['stamp']}")
        sources.append({"figure": name, "keys": record["keys"]})
    stamp = " | ".join(stamps)
    figures.write_stamp(fig, stamp)
    content = {
        "figure": NAME,
        "panels": sources,
        "stamp": stamp,
    }
    return fig, content


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
