"""Figures: bytes that repeat, numbers and keys beside the picture, axes and marks that say what was
drawn.
"""

import base64
import io
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


def overlaps(texts):
    """Return the pairs of texts whose boxes overlap on the drawn figure."""
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts if text.get_text()]
    return [
        (a, b)
        for i, (a, box) in enumerate(boxes)
        for b, other in boxes[i + 1 :]
        if box.overlaps(other)
    ]


def test_alpha_curves_marks_the_peak_and_labels_the_axes(ax):
    """Of the α drawn, the nearest to the peaks 31, 15, 7, 3, 1 in log2(1 + α) are 32, 16, 8, 4
    (2.32 against 1.58: 0.32 from 2 against 0.42) and 1."""
    df = curves()
    assert (
        figures.alpha_curves(
            df,
            ax,
            y="reward",
            low="low",
            high="high",
            ylabel="reward (logits)",
            baseline={"SFT": 0.5, "all pairs": 2.0},
        )
        is ax
    )
    ax.figure.canvas.draw()
    assert [text.get_text() for text in ax.texts] == ["32", "16", "8", "4", "1"]
    legend = [text.get_text() for text in ax.get_legend().get_texts()]
    assert legend == ["5 %", "10 %", "20 %", "40 %", "100 %", "SFT", "all pairs"]
    assert ax.get_legend().get_title().get_text() == "preference pairs"
    assert (
        ax.get_xscale() == "symlog"
        and "α" in ax.get_xlabel()
        and ax.get_ylabel() == "reward (logits)"
    )
    drawn = {line.get_label(): line.get_color() for line in ax.lines}
    assert all(drawn[name] == figures.COLOURS[name] for name in legend[:6])
    assert len(ax.collections) == 5, "one band per curve"


def test_nothing_is_hidden_or_overlaps(ax):
    """Tick labels, the legend and the axes stay apart; the stamp lies inside the figure and below
    the axis label.
    """
    figures.alpha_curves(curves((0, 0.1, 0.25, 0.5, 1, 2, 4, 8, 16, 32, 64, 128)), ax, y="reward")
    figures.save(
        ax.figure,
        "expo_fig5_x",
        data=curves(),
        keys=[],
        stamp="profile cpu · SmolLM2-135M · 512 prompts",
    )
    fig = ax.figure
    fig.canvas.draw()
    assert overlaps(ax.get_xticklabels()) == []
    assert len(ax.get_xticks()) >= 8 and 0 in ax.get_xticks()
    (stamp,) = [text for text in fig.texts if text.get_gid() == "stamp"]
    box, label = stamp.get_window_extent(), ax.xaxis.label.get_window_extent()
    assert (
        fig.bbox.contains(box.x0, box.y0)
        and fig.bbox.contains(box.x1, box.y1)
        and box.y1 < label.y0
    )
    legend = ax.get_legend().get_window_extent()
    assert not legend.overlaps(ax.get_window_extent()) and legend.x1 <= fig.bbox.x1


def test_marks_of_one_choice_judged_by_another(ax):
    df = curves()
    figures.alpha_curves(df, ax, y="reward", mark={0.05: 16, 1.0: 0})
    assert [text.get_text() for text in ax.texts] == ["16", "0"]
    with pytest.raises(IndexError):
        figures.alpha_curves(df, ax, y="reward", mark={0.05: 3})


def test_narrow_alpha_axis_stays_linear(ax):
    figures.alpha_curves(curves((0, 0.1, 0.2, 0.3, 0.5)), ax, y="reward", mark={})
    assert ax.get_xscale() == "linear" and not ax.texts


def test_interpolation_shades_both_sides_of_the_aligned_model(ax):
    df = pd.DataFrame(
        {
            "gamma": [0, 0.5, 1, 2] * 2,
            "reward": np.arange(8.0),
            "judge": ["gold"] * 4 + ["VADER"] * 4,
        }
    )
    figures.interpolation(df, ax, y="reward", by="judge")
    names = [text.get_text() for text in ax.texts]
    assert names == ["interpolation", "extrapolation", "SFT", "aligned"]
    lines = {line.get_label(): line.get_color() for line in ax.lines}
    assert lines["gold"] == figures.COLOURS["gold"] and lines["VADER"] == figures.COLOURS["VADER"]
    fig, other = plt.subplots()
    figures.interpolation(df[df.gamma <= 1], other, y="reward", by="judge")
    fig.canvas.draw()
    assert "extrapolation" not in [text.get_text() for text in other.texts]
    assert max(text.get_window_extent().x1 for text in other.texts) <= other.get_window_extent().x1
    plt.close(fig)


def test_dot_intervals_keep_the_order_of_the_table(ax):
    df = pd.DataFrame(
        {
            "model": ["SFT", "DPO", "DPO + ExPO"],
            "mean": [0.0, 1.0, 2.0],
            "low": [-0.5, 0.5, 1.0],
            "high": [0.25, 1.5, 2.25],
        }
    )
    figures.dot_intervals(df, ax, label="model", value="mean", low="low", high="high")
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["SFT", "DPO", "DPO + ExPO"]
    assert ax.yaxis_inverted() and ax.get_legend() is None
    (bars,) = ax.collections
    assert [segment[:, 0].tolist() for segment in bars.get_segments()] == [
        [-0.5, 0.25],
        [0.5, 1.5],
        [1.0, 2.25],
    ]
    figures.dot_intervals(
        df.assign(judge="gold"),
        ax,
        label="model",
        value="mean",
        low="low",
        high="high",
        colour="judge",
    )
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["gold"]


def test_palette():
    """Shares get darker with more data, each step visibly; the judges and the methods differ among
    themselves.
    """

    def luminance(name):
        red, green, blue = matplotlib.colors.to_rgb(figures.COLOURS[name])
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    light = [luminance(figures._label(share)) for share in SHARES]
    assert light[0] < 0.75 and all(a - b > 0.07 for a, b in zip(light, light[1:], strict=False))
    for group in (
        ("gold", "reward model", "VADER"),
        ("SFT", "DPO", "ExPO", "MallowsPO-θ", "MallowsPO-φ", "WRPO"),
    ):
        assert len({figures.COLOURS[name] for name in group}) == len(group)


def test_save_writes_picture_numbers_keys_and_stamp(ax):
    df = curves((0, 1)).assign(low=np.nan)
    figures.alpha_curves(df, ax, y="reward")
    path = figures.save(
        ax.figure,
        "expo_fig5_x",
        data=df,
        keys=["score-1", "score-1", "score-2"],
        stamp="smoke · tiny",
    )
    content = json.loads(path.with_suffix(".json").read_text())
    assert path == paths.FIGURES / "expo_fig5_x.svg" and path.read_text().startswith("<?xml")
    assert content["keys"] == ["score-1", "score-2"] and content["stamp"] == "smoke · tiny"
    assert content["data"][0] == {
        "fraction": 0.05,
        "alpha": 0.0,
        "reward": 0.5,
        "low": None,
        "high": 0.6,
    }
    assert sorted(p.name for p in paths.FIGURES.iterdir()) == [
        "expo_fig5_x.json",
        "expo_fig5_x.svg",
    ]
    first = path.read_bytes()
    assert b"<dc:date>" not in first and b"dc:creator" not in first
    figures.save(ax.figure, "expo_fig5_x", data=df, keys=[], stamp="smoke · tiny")
    assert path.read_bytes() == first, "saving twice must not draw the stamp twice"


@pytest.mark.parametrize(
    ("name", "stamp", "message"),
    [
        ("fig5", "s", "'fig5': use <paper>"),
        ("expo_fig5_a/b", "s", "use <paper>"),
    ],
)
def test_save_refuses(ax, name, stamp, message):
    with pytest.raises(ValueError, match=message):
        figures.save(ax.figure, name, data=curves(), keys=[], stamp=stamp)
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


def test_same_bytes_in_two_processes(tmp_path):
    for folder, seed in (("a", "1"), ("b", "2")):
        subprocess.run(
            [sys.executable, "-c", DRAW, tmp_path / folder],
            check=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
        )
    first, second = ([p.read_bytes() for p in sorted((tmp_path / f).iterdir())] for f in "ab")
    assert len(first) == 2 and first == second


def drawn(jitter: float, folder, name="expo_fig2_x"):
    """Draw most kinds of marks from numbers that are off by a share of `jitter`; return the raw SVG
    and ours.
    """
    rng = np.random.default_rng(0)
    x = np.linspace(0, 1, 50) * (1 + jitter * rng.uniform(-1, 1, 50))
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


def test_svg_does_not_hang_on_the_last_bits_of_its_numbers(ax, tmp_path):
    """Other CPUs compute other last bits; Matplotlib's own ids and coordinates then differ, ours do
    not.
    """
    (raw, ours), (other_raw, other) = drawn(0, tmp_path), drawn(1e-12, tmp_path)
    assert raw != other_raw, "otherwise this test shows nothing"
    assert ours == other


def test_svg_keeps_what_it_refers_to(ax):
    """Every reference has a definition, scales of letters are not rounded, and coordinates are, to
    0.01 points.
    """
    ax.plot([0, 1 / 3], [0, 1 / 7], "o", label="a")
    ax.fill_between([0, 1], [0, 1], hatch="/")
    ax.legend()
    text = figures.svg(ax.figure)
    defined = set(re.findall(r' id="([^"]+)"', text))
    referred = set(re.findall(r'(?:xlink:href="#|url\(#)([^")]+)', text))
    assert referred and referred <= defined
    assert "scale(0.015625)" in text
    assert not re.search(r'\b[dxy]="[^"]*\.\d{3}', text)


def test_png_is_twice_as_fine_as_it_is_shown(ax):
    """The picture for an untrusted notebook: 2 pixels a CSS pixel, no version, no date, the same
    bytes again.
    """
    ax.plot([0, 1])
    text, size = figures._png_output(ax.figure)
    picture = base64.b64decode(text)
    assert Image.open(io.BytesIO(picture)).size == (2 * size["width"], 2 * size["height"])
    assert size == {"width": round(96 * figures.WIDTH), "height": 384}
    assert b"Software" not in picture and b"tEXt" not in picture
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
        names = [text.get_text() for text in legend.get_texts()]
        assert names == ["5 %", "10 %", "20 %", "40 %", "100 %", "SFT"]
        assert not any(ax.get_legend() for ax in axes)
        box = legend.get_window_extent()
        assert box.y0 >= max(ax.get_window_extent().y1 for ax in axes)
        assert fig.bbox.x0 <= box.x0 and box.x1 <= fig.bbox.x1 and box.y1 <= fig.bbox.y1
        plt.close(fig)


def test_rings_that_lie_together_are_named_side_by_side(ax):
    """Three curves with one best α and nearly one height; a fourth passes where the name of a fifth
    would be.
    """
    names = {"a": 0, "b": 0.01, "c": 0.02}
    rows = [
        (name, alpha, 2.0 + shift - 0.1 * abs(alpha - 4))
        for name, shift in names.items()
        for alpha in (0, 4, 8)
    ]
    rows += [("d", alpha, reward) for alpha, reward in ((0, 0.0), (4, 0.1), (8, 1.0))]
    rows += [("e", alpha, reward) for alpha, reward in ((0, 0.0), (4, 0.1), (8, 1.12))]
    df = pd.DataFrame(rows, columns=["fraction", "alpha", "reward"])
    figures.alpha_curves(df, ax, y="reward", mark={"a": 4, "b": 4, "c": 4, "d": 8})
    ax.figure.canvas.draw()
    assert [text.get_text() for text in ax.texts] == ["4", "4", "4", "8"]
    assert overlaps(ax.texts) == []
    below = ax.texts[3].get_window_extent()
    assert below.y1 < ax.transData.transform((8, 1.0))[1], "the other curve's point stays in sight"


def test_a_long_stamp_has_lines_enough(ax):
    """What was changed is said whole, inside of the figure and below the axis' name."""
    stamp = "cpu · smollm2 · changed: " + ", ".join(f"parameter_{i} = {i / 7}" for i in range(12))
    ax.set_xlabel("x")
    figures.save(ax.figure, "expo_fig5_x", data=curves(), keys=[], stamp=stamp)
    ax.figure.canvas.draw()
    (text,) = [text for text in ax.figure.texts if text.get_gid() == "stamp"]
    box = text.get_window_extent()
    assert text.get_text().replace("\n", " ") == stamp and text.get_text().count("\n") >= 1
    assert (
        ax.figure.bbox.x0 <= box.x0
        and box.y0 >= 0
        and box.y1 < ax.xaxis.label.get_window_extent().y0
    )


def test_the_stamp_says_float32_only_of_what_was_computed_anew_in_it(ax, tmp_path, monkeypatch):
    """The committed figures are of bfloat16, and their stamps stay as they are."""
    monkeypatch.setattr(paths, "ARTIFACTS", tmp_path / "artifacts")
    ax.plot([0, 1])

    def stamp(key):
        path = figures.save(ax.figure, "expo_fig5_x", data=curves(), keys=[key], stamp="cpu")
        return json.loads(path.with_suffix(".json").read_text())["stamp"]

    made = [Artifact("train", 1, {"precision": p}, lambda folder: None) for p in ("fp32", "bf16")]
    for one in made:
        one.get()
    for mode, wanted in {"auto": ["cpu", "cpu"], "cold": ["cpu · float32", "cpu"]}.items():
        monkeypatch.setenv("COMPUTE", mode)
        assert [stamp(one.key) for one in made] == wanted


def test_what_is_computed_anew_takes_no_committed_figures_place(ax, tmp_path, monkeypatch, capsys):
    for name, folder in {"ROOT": "", "FIGURES": "figures", "ARTIFACTS": "artifacts"}.items():
        monkeypatch.setattr(paths, name, tmp_path / folder)
    ax.plot([0, 1])
    monkeypatch.setenv("COMPUTE", "cold")
    path = figures.save(ax.figure, "expo_fig5_x", data=curves(), keys=[], stamp="cpu")
    assert path.parent == tmp_path / "artifacts" / "figures" and not (tmp_path / "figures").exists()
    assert "expo_fig5_x: drawn from results computed anew; it is in" in capsys.readouterr().out
    monkeypatch.setenv(parameters.RENEW, "1")
    path = figures.save(ax.figure, "expo_fig5_x", data=curves(), keys=[], stamp="cpu")
    assert path.parent == tmp_path / "figures"
