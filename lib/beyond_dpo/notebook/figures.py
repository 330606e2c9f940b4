"""Draw the papers' kinds of figures from DataFrames, and save them with their numbers as bytes that
repeat.

Every drawing function takes a DataFrame and an Axes and returns the Axes. y, low, high name
columns: a mean and the ends of its interval, in the unit that `ylabel` or `xlabel` states. Call
`style()` first, and draw no wider than WIDTH.
"""

import base64
import hashlib
import io
import json
import re
import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from PIL import Image

from beyond_dpo.files import write_file
from beyond_dpo.machine import paths
from beyond_dpo.notebook import parameters
from beyond_dpo.pipeline import artifacts

WIDTH = 8.5  # inches, 816 CSS pixels: the output area of JupyterLab has 828 in a window of 1,280
CSS_DPI = 96  # CSS pixels in an inch
# One colour per name in all figures, safe for colour-blind readers: Okabe-Ito and Tol's muted set
# for methods and
# judges; for shares of the data viridis, darker for more. Markers tell curves apart in grey print.
# fmt: off
COLOURS = {
    "SFT": "#767676", "DPO": "#0072B2", "ExPO": "#D55E00", "DPO + ExPO": "#D55E00", "IPO": (
        "#56B4E9"
    ),
    "SimPO": "#009E73", "MallowsPO-θ": "#CC79A7", "MallowsPO-φ": "#882255", "WRPO": "#117733",
    "gold": "#E69F00", "reward model": "#0072B2", "VADER": "#CC79A7",
    "5 %": "#7AD151", "10 %": "#35B779", "20 %": "#21918C", "40 %": "#3B528B", "100 %": "#440154",
}
# fmt: on
SPARE = (
    "#332288",
    "#44AA99",
    "#999933",
    "#AA4499",
    "#661100",
    "#6699CC",
    "#DDCC77",
    "#000000",
)  # any other name
MARKERS = "os^Dv<>P"
SVG = {"Date": None, "Creator": None}  # both would change the bytes
# Of an SVG: where coordinates stand, a number with decimals, and what is referred to by a name made
# of a hash.
PLACES = re.compile(r'\b(?:d|x|y|width|height)="[^"]*"|translate\([^)]*\)')
DECIMAL = re.compile(r"-?\d+\.\d+(?:e-?\d+)?")
IDS = re.compile(
    r'<(?:path|clipPath) id="([pmhC]\w*[0-9a-f]{10})"(.*?)(?:(?<!/)</clipPath>|/>)', re.DOTALL
)


def style() -> None:
    """Set sizes and fonts, and let notebooks show each figure as SVG and as PNG, both of bytes that
    repeat.

    The PNG is what an untrusted notebook, a forge or a slide shows; it has two pixels for each CSS
    pixel.
    """
    mpl.rc("figure", figsize=(WIDTH, 4), dpi=120)
    mpl.rc("figure.constrained_layout", use=True)
    mpl.rc("path", simplify=False)  # which points it drops hangs on the last bits of the numbers
    mpl.rc("svg", hashsalt="beyond_dpo", fonttype="path")
    mpl.rc("font", family="DejaVu Sans", size=10)  # the font that comes with matplotlib
    mpl.rc("axes", titlesize=11, grid=True, axisbelow=True)
    mpl.rc("axes.formatter", min_exponent=3)  # 0.01 and 100, not powers of ten
    mpl.rc("axes.spines", top=False, right=False)
    mpl.rc("grid", color="#e4e4e4", linewidth=0.8)
    mpl.rc("lines", linewidth=1.8, markersize=5)
    mpl.rc("legend", frameon=False, fontsize=9)
    from IPython import get_ipython
    from matplotlib_inline.backend_inline import set_matplotlib_formats

    shell = get_ipython()
    if shell is not None:
        set_matplotlib_formats()  # none of its own, which crop to what is drawn and lose the stamp
        formatters = shell.display_formatter.formatters
        formatters["image/svg+xml"].for_type(Figure, svg)
        formatters["image/png"].for_type(Figure, _png_output)


def save(fig, name: str, *, data: pd.DataFrame, keys: Iterable[str], stamp: str) -> Path:
    """Write figures/<name>.svg and figures/<name>.json (drawn numbers, artifact keys, stamp);
    return the SVG's path.

    name: <paper>_<fig|tab><n>_<slug>. data: the drawn numbers. keys: of the artifacts they come
    from. stamp: profile, model and n, written small under the figure. Raises ValueError for another
    kind of name.
    Drawing the same again writes the same bytes, in any process and on any CPU.
    In a notebook whose parameters were changed the files go to artifacts/figures, and the stamp
    says what was changed; so they do where all is computed anew (COMPUTE=cold), and the stamp says
    if it is in float32, as the committed results are not. A dry run (COMPUTE=plan), which executes
    a notebook's first cells, writes nothing.
    """
    if not re.fullmatch(r"(expo|mallows|wrpo)_(fig|tab)[0-9]+[a-z]?_[a-z0-9_]+", name):
        raise ValueError(
            f"figure name {name!r}: use <paper>_<fig|tab><n>_<slug>, as in "
            "expo_fig5_reward_vs_alpha"
        )
    mode, keys = artifacts.compute_mode(), list(dict.fromkeys(keys))
    if mode == "plan":
        return paths.FIGURES / f"{name}.svg"
    notebook = parameters.notebook_of(name)
    changes = parameters.changed(notebook)
    if mode == "cold" and artifacts.in_float32(keys):
        stamp = f"{stamp} · float32"
    if changes:
        stamp = f"{stamp} · changed: {', '.join(changes.values())}"
    write_stamp(fig, stamp)
    picture = svg(fig)

    rows = json.loads(data.to_json(orient="records", double_precision=6))
    content = {"figure": name, "stamp": stamp}
    values = parameters.current(notebook)
    if values:
        content |= {"notebook": notebook, "parameters": values}
    content |= {"keys": keys, "data": rows}

    folder = paths.FIGURES
    if (changes or parameters.anew()) and folder == paths.ROOT / "figures":
        folder = paths.ARTIFACTS / "figures"
        drawn = (
            f"drawn with {', '.join(changes.values())}"
            if changes
            else "drawn from results computed anew"
        )
        print(f"{name}: {drawn}; it is in {folder}, figures/ stays as it was")
    write_file(folder / f"{name}.json", json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    write_file(folder / f"{name}.svg", picture)
    return folder / f"{name}.svg"


def write_stamp(fig, stamp: str) -> Figure:
    """Write a small text under the figure in a strip of its own, in place of an earlier one; return
    the figure.
    """
    for text in [text for text in fig.texts if text.get_gid() == "stamp"]:
        text.remove()
    width, height = fig.get_size_inches()
    lines = textwrap.wrap(stamp, int(width * 17))  # about as many characters of this size as fit
    note = fig.text(
        0.995, 0.04 / height, "\n".join(lines), ha="right", va="bottom", fontsize=7, color="#555555"
    )
    note.set_gid("stamp")
    note.set_in_layout(False)
    if isinstance(fig.get_layout_engine(), ConstrainedLayoutEngine):
        strip = (0.1 + 0.14 * len(lines)) / height
        fig.get_layout_engine().set(rect=(0, strip, 1, 1 - strip))
    return fig


def svg(fig) -> str:
    """Return a figure as SVG text, the same on every CPU: coordinates are rounded, and ids follow
    from what they name.

    Matplotlib prints coordinates to a millionth of a point and makes ids of unrounded numbers.
    """
    _settle(fig)
    file = io.StringIO()
    fig.savefig(file, format="svg", metadata=SVG)
    text = PLACES.sub(lambda place: DECIMAL.sub(_rounded, place[0]), file.getvalue())
    for name, definition in IDS.findall(text):
        digest = hashlib.sha256(definition.encode()).hexdigest()[:10]
        text = re.sub(rf"\b{name}\b", f"i{digest}", text)
    return text


def png(fig) -> bytes:
    """Return a figure as PNG with two pixels for each CSS pixel, without date and version."""
    _settle(fig)
    drawn, small = io.BytesIO(), io.BytesIO()
    fig.savefig(drawn, format="png", dpi=2 * CSS_DPI, metadata={"Software": None})
    image = Image.open(drawn).convert("RGB")
    image.quantize(256, dither=Image.Dither.NONE).save(
        small, format="png", optimize=True
    )  # a third of the bytes
    return small.getvalue()


def _png_output(fig) -> tuple[str, dict]:
    """Return the PNG as a notebook's output holds it, with the size at which it is shown."""
    width, height = (round(inches * CSS_DPI) for inches in fig.get_size_inches())
    return base64.b64encode(png(fig)).decode(), {"width": width, "height": height}


def _settle(fig) -> None:
    """Lay the figure out once: each further draw would move the axes by a millionth, and so change
    the bytes.
    """
    if isinstance(fig.get_layout_engine(), ConstrainedLayoutEngine):
        fig.draw_without_rendering()
        fig.set_layout_engine("none")
        for ax in fig.axes:
            ax.set_position(np.round(ax.get_position().bounds, 4))


def _rounded(number: re.Match) -> str:
    """Return a printed number with two decimals at most; a hundredth of a point is not to be
    seen.
    """
    text = f"{float(number[0]):.2f}".rstrip("0").rstrip(".")
    return "0" if text == "-0" else text


def alpha_curves(
    df,
    ax,
    *,
    y,
    x="alpha",
    by="fraction",
    low=None,
    high=None,
    mark: Mapping | None = None,
    baseline: Mapping | None = None,
    ylabel="mean reward",
    title="preference pairs",
):
    """Draw reward (or length, repetition, ...) against α, one curve with its interval per value of
    `by`.

    by: column of names, or of shares in (0, 1], shown as percent. mark: {curve: α} to ring, default
    the best point of each curve, {} for none. baseline: {name: level} of horizontal lines. title:
    of the legend. The α axis becomes logarithmic away from 0 when it spans more than 1:20. Raises
    IndexError for a marked α that is not in `df`.
    """
    best = df.loc[df.groupby(by)[y].idxmax()].set_index(by)[x].to_dict() if mark is None else mark
    rings = []
    for name, colour, curve in _lines(df, ax, by, x, y, low, high):
        if name in best:
            point = curve[np.isclose(curve[x], best[name])].iloc[0]
            ax.plot(
                point[x],
                point[y],
                "o",
                markersize=11,
                markerfacecolor="none",
                markeredgecolor=colour,
            )
            rings.append((point[x], point[y], point[low or y], point[high or y], colour))
    for i, (name, level) in enumerate((baseline or {}).items()):
        ax.axhline(
            level,
            color=COLOURS.get(name, "#333333"),
            linestyle=("--", ":", "-.")[i % 3],
            linewidth=1.3,
            label=name,
            zorder=1,
        )
    _alpha_axis(ax, np.unique(df[x].to_numpy(float)))
    ax.set(xlabel="α, extrapolation beyond the aligned model (α = 0)", ylabel=ylabel, ymargin=0.1)
    _name_rings(ax, rings)
    return _legend(ax, title)


def interpolation(df, ax, *, y, x="gamma", by, low=None, high=None, ylabel="mean reward"):
    """Draw reward against γ = 1 + α, the place on the line from the SFT model (0) through the
    aligned model (1).

    by: column of the curves' names. γ in [0, 1] and γ > 1 are shaded apart.
    """
    left, right = min(0.0, df[x].min()), max(1.0, df[x].max())
    margin, axis = 0.03 * (right - left), ax.get_xaxis_transform()
    spans = [("interpolation", 0, 1, COLOURS["DPO"]), ("extrapolation", 1, right, COLOURS["ExPO"])]
    for name, start, end, colour in spans[: 1 + (right > 1)]:
        ax.axvspan(start, end, color=colour, alpha=0.07, linewidth=0)
        ax.text(
            (start + end) / 2, 1.01, name, transform=axis, ha="center", va="bottom", color=colour
        )
    for at, name in ((0, "SFT"), (1, "aligned")):
        inside = (-3, "right") if at == right else (3, "left")
        ax.axvline(at, color="#555555", linewidth=1, linestyle=":", zorder=1)
        ax.annotate(
            name,
            (at, 0),
            xycoords=axis,
            xytext=(inside[0], 4),
            textcoords="offset points",
            ha=inside[1],
            fontsize=8,
            color="#555555",
        )
    list(_lines(df, ax, by, x, y, low, high))
    xlabel = "γ = 1 + α, place on the line through SFT and aligned"
    ax.set(xlim=(left - margin, right + margin), xlabel=xlabel, ylabel=ylabel)
    return _legend(ax)


def dot_intervals(df, ax, *, label, value, low, high, colour=None, xlabel="mean reward"):
    """Draw one dot with its interval per row, from top to bottom in the order of `df`.

    label: column of the lines' names. colour: column that chooses the colours and makes the legend.
    """
    names = list(dict.fromkeys(df[label]))
    groups = [(None, df)] if colour is None else list(df.groupby(colour, sort=False))
    for i, (name, group) in enumerate(groups):
        places = np.array([names.index(n) for n in group[label]]) + 0.22 * (
            i - (len(groups) - 1) / 2
        )
        errors = [group[value] - group[low], group[high] - group[value]]
        ax.errorbar(
            group[value],
            places,
            xerr=errors,
            fmt=MARKERS[i % len(MARKERS)],
            color=_colour(name, i),
            capsize=3,
            elinewidth=1.5,
            label=_label(name),
        )
    ax.set_yticks(range(len(names)), names)
    ax.set(ylim=(len(names) - 0.5, -0.5), xlabel=xlabel)
    ax.grid(axis="y", visible=False)
    return _legend(ax) if colour else ax


def one_legend(fig, title: str | None = None, columns: int = 4):
    """Put one legend of all names above the panels of a figure, in place of the panels' own."""
    names = {}
    for ax in fig.axes:
        names |= dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
        if ax.get_legend() is not None:
            ax.get_legend().remove()
    return fig.legend(
        names.values(), names.keys(), title=title, loc="outside upper center", ncols=columns
    )


def _lines(df, ax, by, x, y, low, high):
    """Draw a line with its band per value of `by`; yield each value, its colour and its rows."""
    for i, (name, rows) in enumerate(df.groupby(by, sort=df[by].dtype.kind in "fi")):
        rows, colour = rows.sort_values(x), _colour(name, i)
        ax.plot(
            rows[x], rows[y], color=colour, marker=MARKERS[i % len(MARKERS)], label=_label(name)
        )
        if low:
            ax.fill_between(rows[x], rows[low], rows[high], color=colour, alpha=0.15, linewidth=0)
        yield name, colour, rows


def _name_rings(ax, rings: list[tuple]) -> None:
    """Write the α of each ring (x, y, low, high, colour) beside it; of rings that lie together, in
    a row.
    """
    ax.autoscale_view()
    groups = _together(ax, rings)
    for ring in rings:
        group = next(group for group in groups if ring in group)
        y, right, up = _free_place(ax, group)
        right += 15 * (group.index(ring) - (len(group) - 1) / 2)
        ax.annotate(
            f"{ring[0]:g}",
            (ring[0], y),
            xytext=(right, up),
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=8,
            color=ring[4],
            fontweight="bold",
        )


def _free_place(ax, group: list[tuple]) -> tuple[float, float, float]:
    """Return where to name rings: a height of the data, and from there points to the right and up.

    Above them, or below where a point of another curve is in the way, or beside them where one is
    there, too.
    """
    own = [ring[1] for ring in group]
    points = [
        point for line in ax.lines if line.get_marker() != "None" for point in line.get_xydata()
    ]
    others = [_points(ax, y) for x, y in points if x == group[0][0] and y not in own]
    highest, lowest = max(ring[3] for ring in group), min(ring[2] for ring in group)
    for y, up in ((highest, 11), (lowest, -11)):
        if not any(abs(_points(ax, y) + up - other) < 10 for other in others):
            return y, 0, up
    return max(own), 14, 5


def _together(ax, rings: list[tuple]) -> list[list[tuple]]:
    """Return the rings in groups that have one x and no gap of 24 points or more in height."""
    groups: list[list[tuple]] = []
    for ring in sorted(rings, key=lambda ring: ring[:2]):
        last = groups[-1][-1] if groups else None
        if last and last[0] == ring[0] and _points(ax, ring[1]) - _points(ax, last[1]) < 24:
            groups[-1].append(ring)
        else:
            groups.append([ring])
    return groups


def _points(ax, y: float) -> float:
    """Return where a height of the data is on the figure, in points."""
    return ax.transData.transform((0, y))[1] * 72 / ax.figure.dpi


def _label(name) -> str:
    if name is None:
        return "_only"  # the underscore keeps it out of legends
    return f"{100 * name:g} %" if isinstance(name, float) and 0 < name <= 1 else str(name)


def _colour(name, place: int = 0) -> str:
    return COLOURS["DPO"] if name is None else COLOURS.get(_label(name), SPARE[place % len(SPARE)])


def _legend(ax, title: str | None = None):
    ax.legend(
        title=title, loc="upper left", bbox_to_anchor=(1.01, 1), borderaxespad=0, alignment="left"
    )
    return ax


def _alpha_axis(ax, values: np.ndarray) -> None:
    """Make a wide α axis logarithmic away from 0, with ticks at drawn values as far as their labels
    fit.
    """
    sizes = np.abs(values[values != 0])
    if not len(sizes) or sizes.max() / sizes.min() <= 20:
        return
    ax.set_xscale("symlog", linthresh=sizes.min(), linscale=0.6)
    scale = ax.xaxis.get_transform()
    places = scale.transform(values)
    margin, unit = (
        0.04 * np.ptp(places),
        np.ptp(places) / (0.8 * ax.bbox.width * 72 / ax.figure.dpi),
    )  # unit: a point
    ax.set_xlim(scale.inverted().transform(np.array([places[0] - margin, places[-1] + margin])))
    ticks, end = [], -np.inf
    for value, place in zip(values, places, strict=True):
        half = unit * 3.5 * len(f"{value:g}")
        if place - half > end:
            ticks, end = [*ticks, value], place + half + 4 * unit
    ax.set_xticks(ticks, [f"{value:g}" for value in ticks])
    ax.xaxis.minorticks_off()
