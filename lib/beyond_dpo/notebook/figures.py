"""Draw the papers' kinds of figures from DataFrames, and save them as bytes that repeat.

Every drawing function takes a DataFrame and an Axes and returns the Axes. Its arguments y, low and
high name columns: a mean and the ends of its interval, in the unit that `ylabel` or `xlabel`
states. Call `style()` first, and draw no wider than WIDTH.
"""

import base64
import hashlib
import io
import json
import re
import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple
from weakref import WeakKeyDictionary

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from PIL import Image

from beyond_dpo.files import write_file
from beyond_dpo.machine import paths
from beyond_dpo.notebook import parameters
from beyond_dpo.pipeline import artifacts, config

WIDTH = 8.5  # inches, 816 CSS pixels: the output area of JupyterLab has 828 in a window of 1,280
CSS_DPI = 96  # CSS pixels in an inch
POINTS = 72  # typographic points in an inch

# One colour per name in all figures, safe for colour-blind readers. Methods and judges have colours
# of Okabe and Ito and of Tol's muted set; shares of the data have viridis, darker for more.
COLOURS = {
    "SFT": "#767676",
    "DPO": "#0072B2",
    "ExPO": "#D55E00",
    "DPO + ExPO": "#D55E00",
    "IPO": "#56B4E9",
    "SimPO": "#009E73",
    "MallowsPO-θ": "#CC79A7",
    "MallowsPO-φ": "#882255",
    "WRPO": "#117733",
    "gold": "#E69F00",
    "reward model": "#0072B2",
    "VADER": "#CC79A7",
    "5 %": "#7AD151",
    "10 %": "#35B779",
    "20 %": "#21918C",
    "40 %": "#3B528B",
    "100 %": "#440154",
}
# The colours of all other names, in the order of the curves.
SPARE = (
    "#332288",
    "#44AA99",
    "#999933",
    "#AA4499",
    "#661100",
    "#6699CC",
    "#DDCC77",
    "#000000",
)
PASSES = "passes"  # a column: whether a point's responses are such that a reward means something
GREY = "#b0b0b0"  # of points that do not pass
MARKERS = "os^Dv<>P"  # they tell curves apart in grey print
BASELINE_STYLES = ("--", ":", "-.")

PAPERS = "|".join(config.SCHEMAS)
NAME = re.compile(rf"({PAPERS})_(fig|tab)[0-9]+[a-z]?_[a-z0-9_]+")
SVG = {"Date": None, "Creator": None}  # metadata left out, as both would change the bytes
# Where an SVG has coordinates, and a number with decimals in there.
COORDINATES = re.compile(r'\b(?:d|x|y|width|height)="[^"]*"|translate\([^)]*\)')
DECIMAL = re.compile(r"-?\d+\.\d+(?:e-?\d+)?")
# What an SVG defines under a name that Matplotlib makes of a hash: the name and the definition.
HASHED_IDS = re.compile(
    r'<(?:path|clipPath) id="([pmhC]\w*[0-9a-f]{10})"(.*?)(?:(?<!/)</clipPath>|/>)', re.DOTALL
)


# The SVG of each figure that save() wrote, for as long as the figure lives.
_saved: WeakKeyDictionary[Figure, str] = WeakKeyDictionary()


class Columns(NamedTuple):
    """The columns of a curve: its x, its mean, and the ends of its interval where it has one."""

    x: str
    y: str
    low: str | None = None
    high: str | None = None


class Ring(NamedTuple):
    """A marked point of a curve, with the ends of its interval and its colour."""

    x: float
    y: float
    low: float
    high: float
    colour: str


def style() -> None:
    """Set sizes and fonts, and let notebooks show each figure as SVG and as PNG.

    Both are bytes that repeat. The PNG is what an untrusted notebook, a forge or a slide shows; it
    has two pixels for each CSS pixel.
    """
    mpl.rc("figure", figsize=(WIDTH, 4), dpi=120)
    mpl.rc("figure.constrained_layout", use=True)
    # Which points simplification drops depends on the last bits of the numbers.
    mpl.rc("path", simplify=False)
    mpl.rc("svg", hashsalt="beyond_dpo", fonttype="path")
    mpl.rc("font", family="DejaVu Sans", size=10)  # the font that comes with matplotlib
    mpl.rc("axes", titlesize=11, grid=True, axisbelow=True)
    mpl.rc("axes.formatter", min_exponent=3)  # 0.01 and 100, not powers of ten
    mpl.rc("axes.spines", top=False, right=False)
    mpl.rc("grid", color="#e4e4e4", linewidth=0.8)
    mpl.rc("lines", linewidth=1.8, markersize=5)
    mpl.rc("legend", frameon=False, fontsize=9)
    _register_formats()


def _register_formats() -> None:
    """Let the notebook that runs, if one does, show figures by `svg` and `png`."""
    from IPython import get_ipython
    from matplotlib_inline.backend_inline import set_matplotlib_formats

    shell = get_ipython()
    if shell is None:
        return
    # IPython's own formats crop to what is drawn and lose the stamp.
    set_matplotlib_formats()
    formatters = shell.display_formatter.formatters
    formatters["image/svg+xml"].for_type(Figure, _svg_output)
    formatters["image/png"].for_type(Figure, _png_output)


# ---- files


def save(fig, name: str, *, data: pd.DataFrame, keys: Iterable[str], stamp: str) -> Path:
    """Write figures/<name>.svg and figures/<name>.json; return the SVG's path.

    The JSON holds the drawn numbers, the artifact keys and the stamp. Drawing the same again writes
    the same bytes, in any process and on any CPU.

    In a notebook whose parameters were changed the files go to artifacts/figures, and the stamp
    says what was changed. They go there as well where all is computed anew (COMPUTE=cold), and the
    stamp says if it is in float32, as the committed results are not. A dry run (COMPUTE=plan),
    which executes a notebook's first cells, writes nothing.

    Args:
        fig: a Figure.
        name: <paper>_<fig|tab><n>_<slug>.
        data: the drawn numbers.
        keys: of the artifacts that the numbers come from.
        stamp: profile, model and n, written small under the figure.

    Raises:
        ValueError: for another kind of name.
    """
    if not NAME.fullmatch(name):
        raise ValueError(
            f"figure name {name!r}: use <paper>_<fig|tab><n>_<slug>, as in "
            "expo_fig5_reward_vs_alpha"
        )
    if artifacts.compute_mode() == "plan":
        return paths.FIGURES / f"{name}.svg"
    keys = list(dict.fromkeys(keys))
    notebook = parameters.notebook_of(name)
    changes = ", ".join(parameters.changed(notebook).values())

    stamp = _full_stamp(stamp, keys, changes)
    write_stamp(fig, stamp)
    picture = svg(fig)
    _saved[fig] = picture
    fig.stale = False  # until something is changed in it

    content = {"figure": name, "stamp": stamp}
    values = parameters.current(notebook)
    if values:
        content["notebook"] = notebook
        content["parameters"] = values
    content["keys"] = keys
    content["data"] = json.loads(data.to_json(orient="records", double_precision=6))

    folder = _folder(name, changes)
    write_file(folder / f"{name}.json", json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    write_file(folder / f"{name}.svg", picture)
    return folder / f"{name}.svg"


def _full_stamp(stamp: str, keys: list[str], changes: str) -> str:
    """Add to a stamp what was computed in float32 and which parameters were changed."""
    if artifacts.compute_mode() == "cold" and artifacts.in_float32(keys):
        stamp = f"{stamp} · float32"
    if changes:
        stamp = f"{stamp} · changed: {changes}"
    return stamp


def _folder(name: str, changes: str) -> Path:
    """Return where a figure goes; print it where that is not the folder of committed figures."""
    committed = paths.FIGURES == paths.ROOT / "figures"
    if not committed or not (changes or parameters.anew()):
        return paths.FIGURES
    folder = paths.ARTIFACTS / "figures"
    origin = f"drawn with {changes}" if changes else "drawn from results computed anew"
    print(f"{name}: {origin}; it is in {folder}, figures/ stays as it was")
    return folder


def write_stamp(fig, stamp: str) -> Figure:
    """Write a small text in a strip of its own under the figure; return the figure.

    It takes the place of an earlier stamp.
    """
    for text in list(fig.texts):
        if text.get_gid() == "stamp":
            text.remove()
    width, height = fig.get_size_inches()
    lines = textwrap.wrap(stamp, int(width * 17))  # about as many characters of this size as fit
    note = fig.text(
        0.995,
        0.04 / height,
        "\n".join(lines),
        ha="right",
        va="bottom",
        fontsize=7,
        color="#555555",
    )
    note.set_gid("stamp")
    note.set_in_layout(False)
    layout = fig.get_layout_engine()
    if isinstance(layout, ConstrainedLayoutEngine):
        strip = (0.1 + 0.14 * len(lines)) / height
        layout.set(rect=(0, strip, 1, 1 - strip))
    return fig


def svg(fig) -> str:
    """Return a figure as SVG text, the same on every CPU.

    Matplotlib prints coordinates to a millionth of a point and makes ids of unrounded numbers.
    Here coordinates are rounded, and each id follows from what it names.
    """
    _settle(fig)
    file = io.StringIO()
    fig.savefig(file, format="svg", metadata=SVG)
    text = COORDINATES.sub(_round_decimals, file.getvalue())
    for name, definition in HASHED_IDS.findall(text):
        digest = hashlib.sha256(definition.encode()).hexdigest()[:10]
        text = re.sub(rf"\b{name}\b", f"i{digest}", text)
    return text


def png(fig) -> bytes:
    """Return a figure as PNG with two pixels for each CSS pixel, without date and version."""
    _settle(fig)
    drawn = io.BytesIO()
    fig.savefig(drawn, format="png", dpi=2 * CSS_DPI, metadata={"Software": None})
    image = Image.open(drawn).convert("RGB")
    # A palette of 256 colours takes a third of the bytes.
    image = image.quantize(256, dither=Image.Dither.NONE)
    reduced = io.BytesIO()
    image.save(reduced, format="png", optimize=True)
    return reduced.getvalue()


def _svg_output(fig) -> str:
    """Return the SVG of a figure that is shown: as it was saved, if it is still the same."""
    if fig in _saved and not fig.stale:
        return _saved[fig]
    return svg(fig)


def _png_output(fig) -> tuple[str, dict]:
    """Return the PNG as a notebook's output holds it, with the size at which it is shown."""
    width, height = fig.get_size_inches()
    size = {"width": round(width * CSS_DPI), "height": round(height * CSS_DPI)}
    return base64.b64encode(png(fig)).decode(), size


def _settle(fig) -> None:
    """Lay the figure out once and for all.

    Each further layout would move the axes by a millionth, and so change the bytes.
    """
    if isinstance(fig.get_layout_engine(), ConstrainedLayoutEngine):
        fig.draw_without_rendering()
        fig.set_layout_engine("none")
        for ax in fig.axes:
            ax.set_position(np.round(ax.get_position().bounds, 4))


def _round_decimals(coordinates: re.Match) -> str:
    """Return a piece of SVG with all of its numbers rounded."""
    return DECIMAL.sub(_rounded, coordinates[0])


def _rounded(number: re.Match) -> str:
    """Return a printed number with at most two decimals; a hundredth of a point is invisible."""
    text = f"{float(number[0]):.2f}".rstrip("0").rstrip(".")
    return "0" if text == "-0" else text


# ---- drawings


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
    """Draw reward (or length, repetition, ...) against α, one curve with its interval per `by`.

    The α axis becomes logarithmic away from 0 when it spans more than 1:20.

    Args:
        by: column of names, or of shares in (0, 1], which are shown as percent.
        mark: {curve: α} to ring. None rings the best point of each curve, {} rings none.
        baseline: {name: level} of horizontal lines.
        title: of the legend.

    A column "passes" tells where the gate is open; other points are grey.

    Raises:
        IndexError: for a marked α that is not in `df`.
    """
    columns = Columns(x, y, low, high)
    if mark is None:
        best = df.loc[df.groupby(by)[y].idxmax()]
        mark = best.set_index(by)[x].to_dict()
    rings = []
    for number, (name, curve) in enumerate(_curves(df, by, columns)):
        colour = _draw_curve(ax, curve, columns, name, number)
        if name in mark:
            ring = _draw_ring(ax, curve, columns, mark[name], colour)
            rings.append(ring)
    _draw_baselines(ax, baseline or {})
    _set_alpha_axis(ax, np.unique(df[x].to_numpy(float)))
    ax.set(xlabel="α, extrapolation beyond the aligned model (α = 0)", ylabel=ylabel, ymargin=0.1)
    _name_rings(ax, rings)
    return _add_legend(ax, title)


def interpolation(df, ax, *, y, x="gamma", by, low=None, high=None, ylabel="mean reward"):
    """Draw reward against γ = 1 + α, from the SFT model (0) through the aligned model (1).

    γ in [0, 1] and γ > 1 are shaded apart.

    Args:
        by: column of the curves' names.
    """
    left = min(0.0, df[x].min())
    right = max(1.0, df[x].max())
    margin = 0.03 * (right - left)
    _shade(ax, "interpolation", 0, 1, COLOURS["DPO"])
    if right > 1:
        _shade(ax, "extrapolation", 1, right, COLOURS["ExPO"])
    _draw_model(ax, "SFT", 0, right)
    _draw_model(ax, "aligned", 1, right)
    columns = Columns(x, y, low, high)
    for number, (name, curve) in enumerate(_curves(df, by, columns)):
        _draw_curve(ax, curve, columns, name, number)
    xlabel = "γ = 1 + α, place on the line through SFT and aligned"
    ax.set(xlim=(left - margin, right + margin), xlabel=xlabel, ylabel=ylabel)
    return _add_legend(ax)


def dot_intervals(df, ax, *, label, value, low, high, colour=None, xlabel="mean reward"):
    """Draw one dot with its interval per row, from top to bottom in the order of `df`.

    Args:
        label: column of the lines' names.
        colour: column that chooses the colours and makes the legend.
    """
    names = list(dict.fromkeys(df[label]))
    groups = [(None, df)]
    if colour is not None:
        groups = list(df.groupby(colour, sort=False))
    middle = (len(groups) - 1) / 2
    for number, (name, group) in enumerate(groups):
        lines = np.array([names.index(line) for line in group[label]])
        ax.errorbar(
            group[value],
            lines + 0.22 * (number - middle),
            xerr=[group[value] - group[low], group[high] - group[value]],
            fmt=_marker(number),
            color=_colour(name, number),
            capsize=3,
            elinewidth=1.5,
            label=_label(name),
        )
    ax.set_yticks(range(len(names)), names)
    ax.set(ylim=(len(names) - 0.5, -0.5), xlabel=xlabel)
    ax.grid(axis="y", visible=False)
    return _add_legend(ax) if colour else ax


def one_legend(fig, title: str | None = None, columns: int = 4):
    """Put one legend of all names above the panels of a figure, in place of the panels' own."""
    handle_of = {}
    for ax in fig.axes:
        handles, labels = ax.get_legend_handles_labels()
        handle_of.update(zip(labels, handles, strict=True))
        if ax.get_legend() is not None:
            ax.get_legend().remove()
    return fig.legend(
        handle_of.values(),
        handle_of.keys(),
        title=title,
        loc="outside upper center",
        ncols=columns,
    )


# ---- pieces of drawings


def _curves(df, by: str, columns: Columns) -> list[tuple]:
    """Return (value of `by`, its rows along x): numbers in their order, names as they come."""
    numeric = df[by].dtype.kind in "fi"
    return [(name, rows.sort_values(columns.x)) for name, rows in df.groupby(by, sort=numeric)]


def _draw_curve(ax, curve, columns: Columns, name, number: int) -> str:
    """Draw a line and, if it has an interval, a band; return their colour."""
    x = curve[columns.x]
    colour = _colour(name, number)
    ax.plot(x, curve[columns.y], color=colour, marker=_marker(number), label=_label(name))
    if columns.low:
        low = curve[columns.low]
        high = curve[columns.high]
        ax.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
    if PASSES in curve:
        _grey_out(ax, curve, columns, _marker(number))
    return colour


def _grey_out(ax, curve, columns: Columns, marker: str) -> None:
    """Draw over a curve in grey where its points do not pass the gate."""
    x = curve[columns.x].to_numpy()
    y = curve[columns.y].to_numpy()
    failing = ~curve[PASSES].to_numpy(bool)
    for left in range(len(x) - 1):
        if failing[left] or failing[left + 1]:
            ax.plot(x[left : left + 2], y[left : left + 2], color=GREY)
    ax.plot(x[failing], y[failing], marker, color=GREY)


def _draw_ring(ax, curve, columns: Columns, alpha: float, colour: str) -> Ring:
    """Draw a ring around a curve's point at α, and return it; IndexError if there is no point."""
    at_alpha = np.isclose(curve[columns.x], alpha)
    point = curve[at_alpha].iloc[0]
    ring = Ring(
        x=point[columns.x],
        y=point[columns.y],
        low=point[columns.low or columns.y],
        high=point[columns.high or columns.y],
        colour=colour,
    )
    ax.plot(
        ring.x,
        ring.y,
        "o",
        markersize=11,
        markerfacecolor="none",
        markeredgecolor=colour,
    )
    return ring


def _draw_baselines(ax, baseline: Mapping) -> None:
    """Draw a horizontal line per {name: level}."""
    for number, (name, level) in enumerate(baseline.items()):
        ax.axhline(
            level,
            color=COLOURS.get(name, "#333333"),
            linestyle=BASELINE_STYLES[number % len(BASELINE_STYLES)],
            linewidth=1.3,
            label=name,
            zorder=1,
        )


def _shade(ax, name: str, start: float, end: float, colour: str) -> None:
    """Shade a range of x and write its name above."""
    ax.axvspan(start, end, color=colour, alpha=0.07, linewidth=0)
    ax.text(
        (start + end) / 2,
        1.01,
        name,
        transform=ax.get_xaxis_transform(),
        ha="center",
        va="bottom",
        color=colour,
    )


def _draw_model(ax, name: str, x: float, right: float) -> None:
    """Draw a vertical line with its name at its foot, to the left where it ends the axis."""
    offset, alignment = (-3, "right") if x == right else (3, "left")
    ax.axvline(x, color="#555555", linewidth=1, linestyle=":", zorder=1)
    ax.annotate(
        name,
        (x, 0),
        xycoords=ax.get_xaxis_transform(),
        xytext=(offset, 4),
        textcoords="offset points",
        ha=alignment,
        fontsize=8,
        color="#555555",
    )


def _name_rings(ax, rings: list[Ring]) -> None:
    """Write the x of each ring beside it; rings that lie together are named side by side."""
    ax.autoscale_view()
    groups = _groups(ax, rings)
    for ring in rings:
        group = next(group for group in groups if ring in group)
        middle = (len(group) - 1) / 2
        y, right, up = _free_place(ax, group)
        right += 15 * (group.index(ring) - middle)
        ax.annotate(
            f"{ring.x:g}",
            (ring.x, y),
            xytext=(right, up),
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=8,
            color=ring.colour,
            fontweight="bold",
        )


def _free_place(ax, group: list[Ring]) -> tuple[float, float, float]:
    """Return where to name rings: a height of the data, and from there points right and up.

    The names go above the rings, or below them where a point of another curve is in the way, or
    beside them where one is there, too.
    """
    ring_heights = [ring.y for ring in group]
    others = []
    for line in ax.lines:
        if line.get_marker() == "None":  # a baseline
            continue
        for x, y in line.get_xydata():
            if x == group[0].x and y not in ring_heights:
                others.append(_points_up(ax, y))

    highest = max(ring.high for ring in group)
    lowest = min(ring.low for ring in group)
    for y, up in ((highest, 11), (lowest, -11)):
        height = _points_up(ax, y) + up
        taken = any(abs(height - other) < 10 for other in others)
        if not taken:
            return y, 0, up
    return max(ring_heights), 14, 5


def _groups(ax, rings: list[Ring]) -> list[list[Ring]]:
    """Return the rings in groups that have one x and no gap of 24 points or more in height."""
    groups: list[list[Ring]] = []
    last = None
    for ring in sorted(rings, key=lambda ring: (ring.x, ring.y)):
        near = (
            last is not None
            and last.x == ring.x
            and _points_up(ax, ring.y) - _points_up(ax, last.y) < 24
        )
        if near:
            groups[-1].append(ring)
        else:
            groups.append([ring])
        last = ring
    return groups


def _points_up(ax, y: float) -> float:
    """Return where a height of the data is on the figure, in points."""
    _, pixels = ax.transData.transform((0, y))
    return pixels * POINTS / ax.figure.dpi


def _label(name) -> str:
    """Return what a legend calls a curve: a share of the data in percent, any other name as is."""
    if name is None:
        return "_only"  # the underscore keeps it out of legends
    if isinstance(name, float) and 0 < name <= 1:
        return f"{100 * name:g} %"
    return str(name)


def _colour(name, number: int) -> str:
    """Return the colour of a name, or one of SPARE by the number of its curve."""
    if name is None:
        return COLOURS["DPO"]
    spare = SPARE[number % len(SPARE)]
    return COLOURS.get(_label(name), spare)


def _marker(number: int) -> str:
    return MARKERS[number % len(MARKERS)]


def _add_legend(ax, title: str | None = None):
    ax.legend(
        title=title,
        loc="upper left",
        bbox_to_anchor=(1.01, 1),
        borderaxespad=0,
        alignment="left",
    )
    return ax


def _set_alpha_axis(ax, values: np.ndarray) -> None:
    """Make a wide α axis logarithmic away from 0, with ticks at drawn values.

    Args:
        values: all α, ascending.
    """
    sizes = np.abs(values[values != 0])
    if not len(sizes) or sizes.max() / sizes.min() <= 20:
        return
    ax.set_xscale("symlog", linthresh=sizes.min(), linscale=0.6)
    scale = ax.xaxis.get_transform()
    positions = scale.transform(values)
    length = np.ptp(positions)
    margin = 0.04 * length
    ends = np.array([positions[0] - margin, positions[-1] + margin])
    ax.set_xlim(scale.inverted().transform(ends))

    points_wide = 0.8 * ax.bbox.width * POINTS / ax.figure.dpi
    ticks = _spaced(values, positions, length / points_wide)
    ax.set_xticks(ticks, [f"{value:g}" for value in ticks])
    ax.xaxis.minorticks_off()


def _spaced(values: np.ndarray, positions: np.ndarray, point: float) -> list[float]:
    """Return those of ascending values whose labels fit beside each other on an axis.

    Args:
        positions: of the values on the axis.
        point: the length of one typographic point in the unit of `positions`.
    """
    ticks = []
    end = -np.inf  # of the last label
    for value, position in zip(values, positions, strict=True):
        half_width = point * 3.5 * len(f"{value:g}")
        if position - half_width > end:
            ticks.append(value)
            end = position + half_width + 4 * point
    return ticks
