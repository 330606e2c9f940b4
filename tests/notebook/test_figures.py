"""Figures: bytes that repeat, numbers and keys beside the picture, axes that say what was drawn."""

import base64
import io
import itertools
import json
import os
import re
import subprocess
import sys

import matplotlib
import numpy as np
import pandas as pd
import pytest
from PIL import Image

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

from beyond_dpo.machine import paths
from beyond_dpo.notebook import figures, parameters  # noqa: E402
from beyond_dpo.pipeline.artifacts import Artifact  # noqa: E402

SHARES = [0.05, 0.1, 0.2, 0.4, 1.0]
SHARE_NAMES = ["5 %", "10 %", "20 %", "40 %", "100 %"]


@pytest.fixture
def ax(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "FIGURES", tmp_path / "figures")
    with matplotlib.rc_context():
        figures.style()
        fig, ax = plt.subplots()
        yield ax
        plt.close(fig)


def curves(alphas=(0, 0.5, 1, 2, 4, 8, 16, 32)):
    """A parabola per share in log2(1 + α) that peaks at α = 31, 15, 7, 3, 1."""
    rows = []
    for share, peak in zip(SHARES, (5, 4, 3, 2, 1), strict=True):
        for alpha in alphas:
            reward = 3 - 0.1 * (np.log2(1 + alpha) - peak) ** 2
            rows.append((share, float(alpha), reward, reward - 0.1, reward + 0.1))
    return pd.DataFrame(rows, columns=["fraction", "alpha", "reward", "low", "high"])


def save(fig, data=None, keys=(), stamp="cpu"):
    """Save a figure as expo_fig5_x, with the numbers of `curves` if no others are passed."""
    if data is None:
        data = curves()
    return figures.save(fig, "expo_fig5_x", data=data, keys=keys, stamp=stamp)


def texts_of(artists) -> list[str]:
    return [artist.get_text() for artist in artists]


def colours_of(ax) -> dict:
    return {line.get_label(): line.get_color() for line in ax.lines}


def stamp_of(fig):
    """Return the one text that is the stamp."""
    (stamp,) = [text for text in fig.texts if text.get_gid() == "stamp"]
    return stamp


def overlaps(texts) -> list[tuple]:
    """Return the pairs of texts whose boxes overlap on the drawn figure."""
    pairs = []
    for first, second in itertools.combinations(texts, 2):
        if not first.get_text() or not second.get_text():
            continue
        if first.get_window_extent().overlaps(second.get_window_extent()):
            pairs.append((first.get_text(), second.get_text()))
    return pairs


# ---- drawings


def test_alpha_curves_marks_the_peak_and_labels_the_axes(ax):
    """The α nearest to the peaks 31, 15, 7, 3, 1 in log2(1 + α) are ringed: 32, 16, 8, 4 and 1.

    The peak at 3 lies at 2 in log2(1 + α): α = 4 at 2.32 is nearer than α = 2 at 1.58.
    """
    axes = figures.alpha_curves(
        curves(),
        ax,
        y="reward",
        low="low",
        high="high",
        ylabel="reward (logits)",
        baseline={"SFT": 0.5, "all pairs": 2.0},
    )
    assert axes is ax
    ax.figure.canvas.draw()
    assert texts_of(ax.texts) == ["32", "16", "8", "4", "1"]
    assert texts_of(ax.get_legend().get_texts()) == [*SHARE_NAMES, "SFT", "all pairs"]
    assert ax.get_legend().get_title().get_text() == "preference pairs"
    assert ax.get_xscale() == "symlog"
    assert "α" in ax.get_xlabel()
    assert ax.get_ylabel() == "reward (logits)"
    colours = colours_of(ax)
    for name in [*SHARE_NAMES, "SFT"]:
        assert colours[name] == figures.COLOURS[name]
    assert len(ax.collections) == 5, "one band per curve"


def test_nothing_is_hidden_or_overlaps(ax):
    """Ticks, legend and axes stay apart; the stamp is in the figure and below the axis label."""
    alphas = (0, 0.1, 0.25, 0.5, 1, 2, 4, 8, 16, 32, 64, 128)
    figures.alpha_curves(curves(alphas), ax, y="reward")
    fig = ax.figure
    save(fig, stamp="profile cpu · SmolLM2-135M · 512 prompts")
    fig.canvas.draw()
    assert overlaps(ax.get_xticklabels()) == []
    ticks = ax.get_xticks()
    assert len(ticks) >= 8
    assert 0 in ticks
    stamp = stamp_of(fig).get_window_extent()
    assert fig.bbox.contains(stamp.x0, stamp.y0)
    assert fig.bbox.contains(stamp.x1, stamp.y1)
    assert stamp.y1 < ax.xaxis.label.get_window_extent().y0
    legend = ax.get_legend().get_window_extent()
    assert not legend.overlaps(ax.get_window_extent())
    assert legend.x1 <= fig.bbox.x1


def test_marks_of_one_choice_judged_by_another(ax):
    df = curves()
    figures.alpha_curves(df, ax, y="reward", mark={0.05: 16, 1.0: 0})
    assert texts_of(ax.texts) == ["16", "0"]
    with pytest.raises(IndexError):
        figures.alpha_curves(df, ax, y="reward", mark={0.05: 3})


def test_points_behind_the_gate_are_grey(ax):
    """Of α = 0, 1, 2 only the last does not pass: its marker, and the line that leads to it."""
    df = pd.DataFrame({"fraction": 0.1, "alpha": [0.0, 1.0, 2.0], "reward": [1.0, 2.0, 5.0]})
    figures.alpha_curves(df.assign(passes=[True, True, False]), ax, y="reward", mark={})
    grey = [line for line in ax.lines if line.get_color() == figures.GREY]
    assert [line.get_xdata().tolist() for line in grey] == [[1.0, 2.0], [2.0]]
    ax.clear()
    figures.alpha_curves(df.assign(passes=True), ax, y="reward", mark={})
    drawn = [
        line for line in ax.lines if line.get_color() == figures.GREY and len(line.get_xdata())
    ]
    assert not drawn


def test_narrow_alpha_axis_stays_linear(ax):
    figures.alpha_curves(curves((0, 0.1, 0.2, 0.3, 0.5)), ax, y="reward", mark={})
    assert ax.get_xscale() == "linear"
    assert not ax.texts


def walk(gammas) -> pd.DataFrame:
    """Return rewards along γ by two judges."""
    rows = []
    for judge in ("gold", "VADER"):
        for gamma in gammas:
            rows.append((judge, gamma, float(len(rows))))
    return pd.DataFrame(rows, columns=["judge", "gamma", "reward"])


def test_interpolation_shades_both_sides_of_the_aligned_model(ax):
    figures.interpolation(walk([0, 0.5, 1, 2]), ax, y="reward", by="judge")
    assert texts_of(ax.texts) == ["interpolation", "extrapolation", "SFT", "aligned"]
    colours = colours_of(ax)
    assert colours["gold"] == figures.COLOURS["gold"]
    assert colours["VADER"] == figures.COLOURS["VADER"]


def test_interpolation_that_ends_at_the_aligned_model_keeps_its_name_inside(ax):
    figures.interpolation(walk([0, 0.5, 1]), ax, y="reward", by="judge")
    ax.figure.canvas.draw()
    assert "extrapolation" not in texts_of(ax.texts)
    ends = [text.get_window_extent().x1 for text in ax.texts]
    assert max(ends) <= ax.get_window_extent().x1


@pytest.fixture
def models() -> pd.DataFrame:
    rows = [
        ("SFT", 0.0, -0.5, 0.25),
        ("DPO", 1.0, 0.5, 1.5),
        ("DPO + ExPO", 2.0, 1.0, 2.25),
    ]
    return pd.DataFrame(rows, columns=["model", "mean", "low", "high"])


def test_dot_intervals_keep_the_order_of_the_table(ax, models):
    figures.dot_intervals(models, ax, label="model", value="mean", low="low", high="high")
    assert texts_of(ax.get_yticklabels()) == ["SFT", "DPO", "DPO + ExPO"]
    assert ax.yaxis_inverted()
    assert ax.get_legend() is None
    (bars,) = ax.collections
    intervals = [segment[:, 0].tolist() for segment in bars.get_segments()]
    assert intervals == [[-0.5, 0.25], [0.5, 1.5], [1.0, 2.25]]


def test_dot_intervals_with_colours_have_a_legend(ax, models):
    figures.dot_intervals(
        models.assign(judge="gold"),
        ax,
        label="model",
        value="mean",
        low="low",
        high="high",
        colour="judge",
    )
    assert texts_of(ax.get_legend().get_texts()) == ["gold"]


def luminance(name: str) -> float:
    red, green, blue = matplotlib.colors.to_rgb(figures.COLOURS[name])
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_shares_get_visibly_darker_with_more_data():
    lights = [luminance(figures._label(share)) for share in SHARES]
    assert lights[0] < 0.75
    for lighter, darker in itertools.pairwise(lights):
        assert lighter - darker > 0.07


@pytest.mark.parametrize(
    "names",
    [
        ("gold", "reward model", "VADER"),
        ("SFT", "DPO", "ExPO", "MallowsPO-θ", "MallowsPO-φ", "WRPO"),
    ],
    ids=["judges", "methods"],
)
def test_names_of_one_kind_have_colours_of_their_own(names):
    colours = {figures.COLOURS[name] for name in names}
    assert len(colours) == len(names)


# ---- files


def test_save_writes_picture_numbers_keys_and_stamp(ax):
    df = curves((0, 1)).assign(low=np.nan)
    figures.alpha_curves(df, ax, y="reward")
    path = save(ax.figure, df, ["score-1", "score-1", "score-2"], "smoke · tiny")
    assert path == paths.FIGURES / "expo_fig5_x.svg"
    picture = path.read_text()
    assert picture.startswith("<?xml")
    assert "<dc:date>" not in picture
    assert "dc:creator" not in picture
    files = sorted(file.name for file in paths.FIGURES.iterdir())
    assert files == ["expo_fig5_x.json", "expo_fig5_x.svg"]
    content = json.loads(path.with_suffix(".json").read_text())
    assert content["keys"] == ["score-1", "score-2"]
    assert content["stamp"] == "smoke · tiny"
    assert content["data"][0] == {
        "fraction": 0.05,
        "alpha": 0.0,
        "reward": 0.5,
        "low": None,
        "high": 0.6,
    }


def test_saving_twice_does_not_draw_the_stamp_twice(ax):
    ax.plot([0, 1])
    path = save(ax.figure, stamp="smoke · tiny")
    first = path.read_bytes()
    assert save(ax.figure, stamp="smoke · tiny") == path
    assert path.read_bytes() == first


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fig5", "'fig5': use <paper>"),
        ("expo_fig5_a/b", "use <paper>"),
    ],
)
def test_save_refuses_another_kind_of_name(ax, name, message):
    with pytest.raises(ValueError, match=message):
        figures.save(ax.figure, name, data=curves(), keys=[], stamp="s")
    assert not paths.FIGURES.exists()


DRAW = """
import sys, pathlib, matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt, pandas as pd
from beyond_dpo.machine import paths
from beyond_dpo.notebook import figures
assert not {"torch", "transformers", "vllm", "deepspeed"} & set(sys.modules)
paths.FIGURES = pathlib.Path(sys.argv[1])
figures.style()
x = {"gamma": [0, 1, 2], "alpha": [0, 1, 30], "fraction": 0.1}
df = pd.DataFrame(x | {"r": [0.1, 1, 0.7], "s": [0, .9, .6]})
fig, (left, right) = plt.subplots(1, 2)
figures.interpolation(df, left, y="r", by="fraction", low="s", high="r")
figures.alpha_curves(df, right, y="r", low="s", high="r")
figures.save(fig, "expo_fig2_x", data=df, keys=["k-1"], stamp="profile smoke")
"""


def drawn_in_a_process(folder, hash_seed: str) -> list[bytes]:
    """Run DRAW in a process of its own; return the bytes of the files that it writes."""
    command = [sys.executable, "-c", DRAW, folder]
    environment = os.environ | {"PYTHONHASHSEED": hash_seed}
    subprocess.run(command, check=True, env=environment)
    return [path.read_bytes() for path in sorted(folder.iterdir())]


@pytest.mark.slow
def test_same_bytes_in_two_processes(tmp_path):
    first = drawn_in_a_process(tmp_path / "a", "1")
    second = drawn_in_a_process(tmp_path / "b", "2")
    assert len(first) == 2
    assert first == second


def raw_and_ours(jitter: float, folder) -> tuple[str, str]:
    """Draw most kinds of marks from numbers off by a share of `jitter`; return two SVGs.

    The first is as Matplotlib writes it, the second as we do.
    """
    rng = np.random.default_rng(0)
    noise = rng.uniform(-1, 1, 50)
    x = np.linspace(0, 1, 50) * (1 + jitter * noise)
    fig, axes = plt.subplots(2, 2, figsize=(7, 5))
    axes[0, 0].plot(x, np.sin(9 * x), "o-", label="a")
    axes[0, 1].scatter(x, x**2, alpha=0.5)
    axes[0, 1].set_xlim(0, 1 + jitter)
    axes[1, 0].hist(np.sin(50 * x) + x, 7, histtype="step")
    axes[1, 1].pcolormesh(np.outer(x[:3], x[:3]))
    axes[1, 1].fill_between(x, x, x + 1, hatch="/")
    raw = folder / f"{jitter}.svg"
    fig.savefig(raw, metadata=figures.SVG)
    ours = figures.svg(fig)
    plt.close(fig)
    return raw.read_text(), ours


def test_svg_does_not_depend_on_the_last_bits_of_its_numbers(ax, tmp_path):
    """Other CPUs compute other last bits: Matplotlib's ids and coordinates differ, ours do not."""
    raw, ours = raw_and_ours(0, tmp_path)
    other_raw, other = raw_and_ours(1e-12, tmp_path)
    assert raw != other_raw, "otherwise this test shows nothing"
    assert ours == other


def test_svg_keeps_what_it_refers_to(ax):
    """Every reference has a definition, and only coordinates are rounded, to 0.01 points."""
    ax.plot([0, 1 / 3], [0, 1 / 7], "o", label="a")
    ax.fill_between([0, 1], [0, 1], hatch="/")
    ax.legend()
    text = figures.svg(ax.figure)
    defined = set(re.findall(r' id="([^"]+)"', text))
    referred = set(re.findall(r'(?:xlink:href="#|url\(#)([^")]+)', text))
    assert referred
    assert referred <= defined
    assert "scale(0.015625)" in text, "the scale of letters is not rounded"
    assert not re.search(r'\b[dxy]="[^"]*\.\d{3}', text)


def test_a_saved_figure_is_shown_as_it_was_saved_until_it_is_changed(ax, monkeypatch):
    (curve,) = ax.plot([0, 1])
    saved = save(ax.figure).read_text()
    assert figures._svg_output(ax.figure) == saved
    figures.png(ax.figure)
    assert figures._svg_output(ax.figure) == figures.svg(ax.figure) == saved
    with monkeypatch.context() as patch:
        save(ax.figure)
        patch.setattr(figures, "svg", None)  # is not drawn again
        assert figures._svg_output(ax.figure) == saved
    curve.set_ydata([1, 0])
    assert figures._svg_output(ax.figure) == figures.svg(ax.figure) != saved


def test_png_is_twice_as_fine_as_it_is_shown(ax):
    """The picture of an untrusted notebook: 2 pixels a CSS pixel, no version, no date."""
    ax.plot([0, 1])
    text, size = figures._png_output(ax.figure)
    picture = base64.b64decode(text)
    width = round(96 * figures.WIDTH)
    assert size == {"width": width, "height": 384}
    assert Image.open(io.BytesIO(picture)).size == (2 * width, 2 * 384)
    assert b"Software" not in picture
    assert b"tEXt" not in picture
    assert figures.png(ax.figure) == picture


def test_one_legend_above_all_panels():
    with matplotlib.rc_context():
        figures.style()
        fig, axes = plt.subplots(2, 1)
        for ax in axes:
            figures.alpha_curves(curves(), ax, y="reward", baseline={"SFT": 0.5})
        legend = figures.one_legend(fig, "pairs", columns=6)
        figures.write_stamp(fig, "stamp")
        figures.svg(fig)
        assert texts_of(legend.get_texts()) == [*SHARE_NAMES, "SFT"]
        assert not any(ax.get_legend() for ax in axes)
        box = legend.get_window_extent()
        assert box.y0 >= max(ax.get_window_extent().y1 for ax in axes)
        assert fig.bbox.x0 <= box.x0
        assert fig.bbox.x1 >= box.x1
        assert fig.bbox.y1 >= box.y1
        plt.close(fig)


def test_rings_that_lie_together_are_named_side_by_side(ax):
    """Curves a, b and c have one best α and nearly one height; e passes where d's name would be."""
    rewards = {
        "a": (1.6, 2.0, 1.6),
        "b": (1.61, 2.01, 1.61),
        "c": (1.62, 2.02, 1.62),
        "d": (0.0, 0.1, 1.0),
        "e": (0.0, 0.1, 1.12),
    }
    df = pd.DataFrame(rewards, index=[0, 4, 8]).rename_axis("alpha").reset_index()
    df = df.melt("alpha", var_name="fraction", value_name="reward")
    figures.alpha_curves(df, ax, y="reward", mark={"a": 4, "b": 4, "c": 4, "d": 8})
    ax.figure.canvas.draw()
    assert texts_of(ax.texts) == ["4", "4", "4", "8"]
    assert overlaps(ax.texts) == []
    name = ax.texts[3].get_window_extent()
    _, point_of_d = ax.transData.transform((8, 1.0))
    assert name.y1 < point_of_d, "the other curve's point stays in sight"


def test_a_long_stamp_has_lines_enough(ax):
    """The stamp is whole, inside of the figure and below the axis' name."""
    changes = [f"parameter_{i} = {i / 7}" for i in range(12)]
    stamp = "cpu · smollm2 · changed: " + ", ".join(changes)
    ax.set_xlabel("x")
    save(ax.figure, stamp=stamp)
    ax.figure.canvas.draw()
    lines = stamp_of(ax.figure).get_text().split("\n")
    assert " ".join(lines) == stamp
    assert len(lines) >= 2
    box = stamp_of(ax.figure).get_window_extent()
    assert ax.figure.bbox.x0 <= box.x0
    assert box.y0 >= 0
    assert box.y1 < ax.xaxis.label.get_window_extent().y0


def test_the_stamp_says_float32_only_of_what_was_computed_anew_in_it(ax, tmp_path, monkeypatch):
    """The committed figures are of bfloat16, and their stamps stay as they are."""
    monkeypatch.setattr(paths, "ARTIFACTS", tmp_path / "artifacts")
    ax.plot([0, 1])

    def saved_stamp(artifact) -> str:
        path = save(ax.figure, keys=[artifact.key])
        content = json.loads(path.with_suffix(".json").read_text())
        return content["stamp"]

    in_float32 = Artifact("train", 1, {"precision": "fp32"}, lambda folder: None)
    in_bfloat16 = Artifact("train", 1, {"precision": "bf16"}, lambda folder: None)
    in_float32.get()
    in_bfloat16.get()
    monkeypatch.setenv("COMPUTE", "auto")
    assert saved_stamp(in_float32) == "cpu"
    assert saved_stamp(in_bfloat16) == "cpu"
    monkeypatch.setenv("COMPUTE", "cold")
    assert saved_stamp(in_float32) == "cpu · float32"
    assert saved_stamp(in_bfloat16) == "cpu"


def test_what_is_computed_anew_takes_no_committed_figures_place(ax, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    monkeypatch.setattr(paths, "FIGURES", tmp_path / "figures")
    monkeypatch.setattr(paths, "ARTIFACTS", tmp_path / "artifacts")
    ax.plot([0, 1])
    monkeypatch.setenv("COMPUTE", "cold")
    path = save(ax.figure)
    assert path.parent == tmp_path / "artifacts" / "figures"
    assert not (tmp_path / "figures").exists()
    assert "expo_fig5_x: drawn from results computed anew; it is in" in capsys.readouterr().out
    monkeypatch.setenv(parameters.RENEW, "1")
    path = save(ax.figure)
    assert path.parent == tmp_path / "figures"
