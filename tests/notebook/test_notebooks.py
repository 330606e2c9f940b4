"""The committed notebooks: they say what they said (nbval) and keep the house rules."""

import ast
import base64
import io
import json
import os
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import nbformat
import pandas as pd
import pytest
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from PIL import Image

from beyond_dpo.machine import paths
from beyond_dpo.notebook import plan, report, run
from beyond_dpo.pipeline import assets, config, expo, stages

NOTEBOOKS = sorted(paths.NOTEBOOKS.glob("*.ipynb"))
LIBRARIES = {
    "dataclasses",
    "beyond_dpo",
    "numpy",
    "pandas",
    "matplotlib",
    "IPython",
    "ipywidgets",
    "io",
}


def code_cells(path):
    return [c for c in nbformat.read(path, 4).cells if c.cell_type == "code"]


def test_there_are_notebooks():
    assert {p.stem for p in NOTEBOOKS} >= {
        "00_start_here",
        "11_expo_headline",
        "12_expo_interpolation",
    }
    assert len(NOTEBOOKS) == 22


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_house_rules(path):
    """At most 20 code cells of 15 lines, one parameters cell, no class, no long function, no path,
    no shell.
    """
    cells = code_cells(path)
    assert 1 <= len(cells) <= 20
    assert sum("parameters" in c.metadata.get("tags", []) for c in cells) == 1
    for cell in cells:
        assert len(cell.source.splitlines()) <= 15, cell.source
        assert not re.search(r"^\s*[%!]", cell.source, re.M), "no shell and no magic"
        tree = ast.parse(cell.source)
        for node in ast.walk(tree):
            assert not isinstance(node, ast.ClassDef)
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 8, node.name
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = (
                    [node.module]
                    if isinstance(node, ast.ImportFrom)
                    else [a.name for a in node.names]
                )
                assert {n.split(".")[0] for n in names} <= LIBRARIES
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert not re.match(r"(\.{0,2}/|~|[A-Z]:\\)\w", node.value), f"a path: {node.value}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_committed_outputs_are_whole_and_clean(path):
    """Every cell was run in order, none failed, and nothing of one machine or one run is in the
    file.
    """
    text, cells = path.read_text(), code_cells(path)
    assert [c.execution_count for c in cells] == list(range(1, len(cells) + 1))
    assert not [o for c in cells for o in c.outputs if o.output_type == "error"]
    assert "papermill" not in json.loads(text)["metadata"] and '"execution": {' not in text
    assert not re.search(r"/(home|root|tmp|Users)/", text), "a path of one machine"
    if path.stem[0] in "123":
        joined = json.dumps([o.get("data", {}) for c in cells for o in c.outputs])
        assert "image/svg+xml" in joined and "verdict" in joined, "a figure and a verdict"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_figures_fit_the_output_area_and_need_no_trust(path):
    """JupyterLab in a window of 1,280 pixels shows 828; SVG and PNG have one size, the PNG twice
    the pixels.
    """
    for cell in code_cells(path):
        for output in cell.outputs:
            data = output.get("data", {})
            assert ("image/svg+xml" in data) == ("image/png" in data)
            if "image/png" in data:
                size = output.metadata["image/png"]
                points = re.search(
                    r'width="([\d.]+)pt" height="([\d.]+)pt"', data["image/svg+xml"]
                ).groups()
                assert [round(float(one) * 96 / 72) for one in points] == [
                    size["width"],
                    size["height"],
                ]
                picture = Image.open(io.BytesIO(base64.b64decode(data["image/png"])))
                assert (
                    abs(picture.width - 2 * size["width"]) <= 1
                    and abs(picture.height - 2 * size["height"]) <= 1
                )
                assert size["width"] <= 828
                assert "stamp" in data["image/svg+xml"]
    assert path.stat().st_size < 1_000_000


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_tables_have_readable_headings(path):
    tables = [
        o.data["text/html"]
        for c in code_cells(path)
        for o in c.outputs
        if "text/html" in o.get("data", {})
    ]
    headings = [name for table in tables for name in re.findall(r"<th[^>]*>(.*?)</th>", table)]
    assert bool(headings) == (path.stem != "90_playground")
    raw = set(report.HEADINGS) - {
        "reward"
    }  # also the name of what the sources' responses are given
    assert not [name for name in headings if "_" in name or name in raw]


NUMBER = re.compile(
    r"-?\d+(\.\d+)?|[–+-]|yes|no"
)  # as report.show writes them; a sign or a dash stands for one


def columns(table: str) -> dict[int, list[tuple[str, str]]]:
    """Return (style, text) of the cells below each heading of a table's HTML, the heading's
    first.
    """
    found: dict[int, list] = {}
    for row in re.findall(r"<tr>(.*?)</tr>", table, re.DOTALL):
        for j, cell in enumerate(
            re.findall(r'<t[hd][^>]*style="([^"]*)"[^>]*>(.*?)</t[hd]>', row, re.DOTALL)
        ):
            found.setdefault(j, []).append(cell)
    return found


def test_in_committed_tables_numbers_stand_right_and_texts_left():
    """Heading and cells of a column alike; a column with a single word in it holds texts."""
    tables, left, right = 0, 0, 0
    for path in NOTEBOOKS:
        shown = [
            o.data["text/html"]
            for c in code_cells(path)
            for o in c.outputs
            if "text/html" in o.get("data", {})
        ]
        tables += len(shown)
        for column in [column for table in shown for column in columns(table).values()]:
            (_, heading), *cells = column
            numbers = all(NUMBER.fullmatch(text) for _, text in cells)
            wanted = "text-align: right" if numbers else "text-align: left"
            assert cells and {style.partition(";")[0] for style, _ in column} == {wanted}, (
                path.stem,
                heading,
            )
            left += not numbers
            right += numbers
    assert tables == 88 and left > 150 and right > 300


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_kernel_without_the_package_is_told_which_one_has_it(path):
    """Its first import fails with ModuleNotFoundError; what to do stands directly above."""
    cells = nbformat.read(path, 4).cells
    first = next(
        i
        for i, cell in enumerate(cells)
        if cell.cell_type == "code" and "from beyond_dpo" in cell.source
    )
    above = cells[first - 1]
    assert above.cell_type == "markdown" and above.id == "kernel" and above.source.count("\n") == 0
    assert above.source.startswith(
        "If `beyond_dpo` is not found below, this kernel is another Python: "
    )
    assert "`make lab`" in above.source and "`.venv/bin/python`" in above.source


def test_nbconvert_to_script_writes_a_python_file():
    from nbconvert import ScriptExporter

    body, resources = ScriptExporter().from_filename(
        str(paths.NOTEBOOKS / "11_expo_headline.ipynb")
    )
    assert resources["output_extension"] == ".py"
    ast.parse(body)
    assert "curves = expo.curves(cfg)" in body


def test_the_quick_notebooks_need_no_model_and_no_download(monkeypatch):
    """They come first in `make reproduce`, within a minute of the set-up."""
    quick = [path for path in NOTEBOOKS if path.name[:2] in run.QUICK]
    assert [path.name[:2] for path in quick] == list(run.QUICK)
    assert {"train", "responses", "scores", "reward-gold"} <= {
        job.stage for job in upstream("11_expo_headline")
    }
    asked = []
    for name in ("fetch_all", "model_dir", "tokenizer_dir", "resolve"):
        monkeypatch.setattr(assets, name, lambda *given, name=name: asked.append((name, given)))
    monkeypatch.setenv("COMPUTE", "cold")
    for path in quick:
        jobs = upstream(path.stem)
        assert {job.stage for job in jobs} <= {"bandits"}, path.stem
        assert not re.search(
            '"(asset|local|repo|plan)": ', json.dumps([job.recipe for job in jobs])
        ), path.stem
    assert not asked


def upstream(stem: str) -> list:
    """Return all that a notebook's results are made from, and they themselves."""
    nb = nbformat.read(paths.NOTEBOOKS / f"{stem}.ipynb", 4)
    _, named = plan.planned(nb, plan.parameters(nb, stem))
    return [job for one in named for job in one.upstream.values()]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_opening_and_saving_in_jupyterlab_changes_nothing(path):
    """The file is as JupyterLab writes it: its metadata, its cells' ids, its indentation; nbconvert
    knows `.py`.
    """
    nb = json.loads(path.read_text(encoding="utf-8"))
    assert (nb["nbformat"], nb["nbformat_minor"]) == (4, 5)
    assert nb["metadata"]["kernelspec"] == {
        "display_name": "Python 3 (ipykernel)",
        "language": "python",
        "name": "python3",
    }
    language = nb["metadata"]["language_info"]
    assert language["file_extension"] == ".py" and language["mimetype"] == "text/x-python"
    assert language["codemirror_mode"] == {"name": "ipython", "version": 3}
    assert (language["name"], language["nbconvert_exporter"], language["pygments_lexer"]) == (
        "python",
        "python",
        "ipython3",
    )
    assert len({cell["id"] for cell in nb["cells"]}) == len(nb["cells"])
    assert path.read_text(encoding="utf-8") == nbformat.writes(nbformat.read(path, 4)) + "\n"


@pytest.mark.slow
def test_committed_notebooks_say_what_they_said(tmp_path):
    """nbval, strictly: all committed outputs come again from the frozen results, computing nothing.

    It compares the SVG of each figure, which is the same on every CPU, and not the PNG.
    """
    env = {
        **os.environ,
        "COMPUTE": "never",
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
    }
    env |= {
        "BEYOND_DPO_ARTIFACTS": str(tmp_path / "artifacts"),
        "BEYOND_DPO_FIGURES": str(tmp_path / "figures"),
    }
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--nbval",
        "--nbval-current-env",
        "--nbval-cell-timeout=120",
        "-p",
        "no:cacheprovider",
    ]
    done = subprocess.run(
        [*command, *map(str, NOTEBOOKS)], env=env, capture_output=True, text=True, cwd=paths.ROOT
    )
    assert done.returncode == 0, done.stdout[-6000:]
    passed = int(re.search(r"(\d+) passed", done.stdout)[1])
    assert passed == sum(len(code_cells(p)) for p in NOTEBOOKS), "every code cell was compared"
    drawn = {p.name: p.read_bytes() for p in (tmp_path / "figures").glob("*.svg")}
    assert (
        drawn == {p.name: p.read_bytes() for p in paths.FIGURES.glob("*.svg")} and len(drawn) == 29
    ), "the same bytes"


def test_sample_texts_train_nothing(tmp_path, monkeypatch):
    """Notebook 11 shows frozen texts; it samples 15 where the models are there, and says so where
    nothing is.
    """
    monkeypatch.setattr(paths, "ARTIFACTS", tmp_path)
    cfg, other = config.load("expo", "cpu"), config.load("expo", "cpu", seeds=[5])
    alphas = [0.0, 8.0, 64.0]
    for mode in ("auto", "never"):
        monkeypatch.setenv("COMPUTE", mode)
        frozen = expo.samples(cfg, alphas)
        assert not frozen.missing() and (paths.FROZEN / frozen.key).is_dir()
        assert expo.samples(other, alphas) is None
    for model in (stages.sft(other), stages.aligned(other, other.recipe_fraction, 5)):
        (tmp_path / model.key).mkdir()
    assert expo.samples(other, alphas) is None, "COMPUTE=never samples nothing"
    monkeypatch.setenv("COMPUTE", "auto")
    wanted = expo.samples(other, alphas)
    assert sorted({artifact.stage for artifact in wanted.missing().values()}) == [
        "own-prompts",
        "responses",
        "said",
    ]
    assert len(wanted.missing()) == 5, "three α, one response to each of five prompts"
    sampled = [
        one.recipe["inputs"]["alpha"]
        for one in wanted.missing().values()
        if one.stage == "responses"
    ]
    assert sampled == alphas, "0, the chosen and the largest"
    texts = pd.DataFrame(frozen.json("texts.json"))
    first = texts[texts["model"] == texts["model"][0]]
    assert sorted(set(first["alpha"])) == [0, 1, 4, 16] and first["prompt"].nunique() == 5


class Told:
    """What expo.samples returns, with texts at the given α of the first of two models."""

    key = "said-0123456789abcdef"

    def __init__(self, alphas):
        self.alphas = alphas

    def json(self, name):
        at = {"prompt": "My wife and I", "text": "left."}
        return [
            at | {"model": model, "alpha": alpha}
            for model in ("asked", "other")
            for alpha in self.alphas
        ]


@pytest.mark.parametrize(
    "sampled, shown, words",
    [
        (
            [0.0, 8.0, 64.0],
            ["α = 0", "α = 8", "α = 64"],
            "sampled nearest: 8 and 64",
        ),  # as a run samples them
        (
            [0.0, 1.0, 4.0, 16.0],
            ["α = 0", "α = 4", "α = 16"],
            "sampled nearest: 4 and 16",
        ),  # as they are frozen
    ],
)
def test_sample_texts_are_of_no_the_chosen_and_the_largest_extrapolation(sampled, shown, words):
    """Notebook 11's own cell; where other α were sampled its caption says which."""
    (cell,) = [
        cell
        for cell in code_cells(paths.NOTEBOOKS / "11_expo_headline.ipynb")
        if "expo.samples" in cell.source
    ]
    cfg, asked, tables = config.load("expo", "cpu"), [], []
    stub = SimpleNamespace(samples=lambda cfg, alphas: asked.extend(alphas) or Told(sampled))
    names = {
        "cfg": cfg,
        "chosen": {cfg.recipe_fraction: 8.0},
        "expo": stub,
        "curves": SimpleNamespace(key="curves-0"),
    }
    exec(cell.source, names | {"pd": pd, "report": report, "display": tables.append})
    assert asked == [0.0, 8.0, 64.0] == [0.0, 8.0, max(cfg.alphas[cfg.recipe_fraction])]
    assert list(tables[0].data.columns) == ["prompt", *shown]
    caption = f"chosen: α = 8, largest: 64; {words}"
    assert caption in tables[0]._repr_html_()
    if sampled[1] == 1.0:
        assert caption in "".join(cell.outputs[0].data["text/html"]), "as it is committed"


@pytest.mark.parametrize("mode", ["auto", "cold"])
def test_a_dry_run_draws_nothing(tmp_path, monkeypatch, mode):
    """It executes the first cells of a notebook in the runner's own process; in one that draws a
    figure as well.
    """
    monkeypatch.setenv("COMPUTE", mode)
    monkeypatch.setattr(paths, "FIGURES", tmp_path / "figures")
    path = paths.NOTEBOOKS / "23_mallows_links.ipynb"
    nb = nbformat.read(path, 4)
    assert "figures.save" in code_cells(path)[2].source
    plan.planned(nb, plan.parameters(nb, path.stem))
    assert not (tmp_path / "figures").exists()


COPIED = "12_expo_interpolation"


@pytest.fixture
def project(tmp_path):
    """A copy of what one notebook reads and writes, and the environment of a kernel that works
    there.
    """
    for name in ("figures", "data"):
        shutil.copytree(paths.ROOT / name, tmp_path / name)
    (tmp_path / "notebooks").mkdir()
    shutil.copy(paths.NOTEBOOKS / f"{COPIED}.ipynb", tmp_path / "notebooks")
    kept = {name: value for name, value in os.environ.items() if not name.startswith("BEYOND_DPO_")}
    lib = str(paths.LIBRARY)
    kept |= {"BEYOND_DPO_ROOT": str(tmp_path), "PYTHONPATH": lib, "COMPUTE": "never"}
    return tmp_path, kept


def committed(root) -> dict:
    """Return the bytes of all that a notebook must leave alone."""
    files = [
        path for name in ("figures", "data") for path in (root / name).rglob("*") if path.is_file()
    ]
    return {str(path.relative_to(root)): path.read_bytes() for path in files}


def execute(root, environment, nb) -> str:
    """Run a notebook's cells in a kernel of its own, as JupyterLab does; return what it printed."""
    manager = AsyncKernelManager(
        kernel_name="python3", kernel_spec_manager=KernelSpecManager(kernel_dirs=[])
    )
    client = NotebookClient(
        nb, km=manager, resources={"metadata": {"path": str(root / "notebooks")}}
    )
    client.execute(env=environment)
    return "".join(
        o.text for c in nb.cells for o in c.get("outputs", []) if o.output_type == "stream"
    )


def with_seed(nb, seed: int):
    """Return the notebook with another seed of its intervals in its parameters cell."""
    (cell,) = [cell for cell in nb.cells if "parameters" in cell.metadata.get("tags", [])]
    assert "bootstrap_seed = 0" in cell.source
    cell.source = cell.source.replace("bootstrap_seed = 0", f"bootstrap_seed = {seed}")
    return nb


def check_trial(root, said, changed):
    """The figure and the claims are under artifacts/, and both say what was changed."""
    record = json.loads((root / "artifacts/figures/expo_fig2_interpolation.json").read_text())
    assert record["stamp"].endswith(f" · changed: {changed}")
    assert (root / "artifacts/figures/expo_fig2_interpolation.svg").is_file()
    assert f"drawn with {changed}; it is in {root}/artifacts/figures" in said
    assert f"claimed with {changed}; it is in {root}/artifacts/runs/trials" in said
    assert [path.name for path in (root / "artifacts/runs/trials").iterdir()] == [
        f"{COPIED}.cpu.json"
    ]
    assert not (root / "artifacts/runs/claims").exists()


def test_an_edited_parameter_overwrites_nothing(project):
    """In JupyterLab, which saves the edited notebook by itself: the file then holds what the kernel
    holds.
    """
    root, environment = project
    before = committed(root)
    path = root / "notebooks" / f"{COPIED}.ipynb"
    nb = with_seed(nbformat.read(path, 4), 1)
    nbformat.write(nb, path)
    said = execute(root, environment, nb)
    assert committed(root) == before
    check_trial(root, said, "bootstrap_seed = 1")


def test_papermill_overwrites_nothing(project):
    """papermill by itself, which injects a cell with the parameters that it was given."""
    root, environment = project
    before = committed(root)
    command = [sys.executable, "-m", "papermill", "-k", "python3", "-p", "bootstrap_seed", "2"]
    copy = root / "copy.ipynb"
    notebook = root / "notebooks" / f"{COPIED}.ipynb"
    subprocess.run([*command, notebook, copy], env=environment, check=True, capture_output=True)
    assert committed(root) == before
    streams = [o.text for c in code_cells(copy) for o in c.outputs if o.output_type == "stream"]
    check_trial(root, "".join(streams), "bootstrap_seed = 2")


def test_unchanged_parameters_give_the_committed_files_again(project):
    root, environment = project
    before = committed(root)
    figure = root / "figures/expo_fig2_interpolation.svg"
    figure.write_text("damaged")
    said = execute(root, environment, nbformat.read(root / "notebooks" / f"{COPIED}.ipynb", 4))
    assert said == "" and committed(root) == before
    assert [path.name for path in (root / "artifacts/runs/claims").iterdir()] == [
        f"{COPIED}.cpu.json"
    ]
    assert not (root / "artifacts/figures").exists()


DRAWS = "19_expo_controlled"  # recomputes published tables, whatever COMPUTE says


def test_a_cold_run_by_hand_overwrites_no_committed_figure(project):
    """JupyterLab or papermill under COMPUTE=cold, with all parameters as committed."""
    root, environment = project
    shutil.copy(paths.NOTEBOOKS / f"{DRAWS}.ipynb", root / "notebooks")
    drawn = sorted((root / "figures").glob("expo_*.svg"))
    for figure in drawn:
        figure.write_text("kept")  # the numbers are the same: the bytes would tell nothing
    before = committed(root)
    nb = nbformat.read(root / "notebooks" / f"{DRAWS}.ipynb", 4)
    said = execute(root, environment | {"COMPUTE": "cold"}, nb)
    assert committed(root) == before
    (figure,) = (root / "artifacts/figures").glob("*.svg")
    assert (
        f"{figure.stem}: drawn from results computed anew; it is in {root}/artifacts/figures"
        in said
    )
    assert "float32" not in json.loads(figure.with_suffix(".json").read_text())["stamp"], (
        "no model computed it"
    )


@pytest.mark.slow
def test_readme_examples_run(tmp_path, monkeypatch):
    """Each Python block of the README, on two tiny models and a tiny reward model."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    from beyond_dpo.pipeline import assets

    for name, noise in (("sft", 0.0), ("aligned", 0.01)):
        model = AutoModelForCausalLM.from_pretrained(assets.model_dir("tiny"))
        with torch.no_grad():
            for p in model.parameters():
                p += noise
        model.save_pretrained(tmp_path / name)
        AutoTokenizer.from_pretrained(assets.model_dir("tiny")).save_pretrained(tmp_path / name)
    AutoModelForSequenceClassification.from_pretrained(
        assets.model_dir("tiny-encoder"), num_labels=1
    ).save_pretrained(tmp_path / "reward")
    AutoTokenizer.from_pretrained(assets.model_dir("tiny-encoder")).save_pretrained(
        tmp_path / "reward"
    )
    blocks = re.findall(r"```python\n(.*?)```", (paths.ROOT / "README.md").read_text(), re.S)
    assert len(blocks) == 8
    folders = {
        "sft_folder": tmp_path / "sft",
        "aligned_folder": tmp_path / "aligned",
        "reward_folder": tmp_path / "reward",
    }
    monkeypatch.chdir(tmp_path)
    for block in blocks:
        exec(block, dict(folders))
    assert (tmp_path / "out/alpha-0.5/model.safetensors").exists()
