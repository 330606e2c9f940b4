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

import nbformat
import pytest
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from PIL import Image

from beyond_dpo.machine import paths
from beyond_dpo.notebook import plan, report
from beyond_dpo.pipeline import assets

NOTEBOOKS = sorted(paths.NOTEBOOKS.glob("*.ipynb"))
OF_PAPERS = [path for path in NOTEBOOKS if path.stem[0] in "123"]
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
PATH = re.compile(r"(\.{0,2}/|~|[A-Z]:\\)\w")
# A number as report.show writes it; a sign or a dash stands for one.
NUMBER = re.compile(r"-?\d+(\.\d+)?|[–+-]|yes|no")


def read(stem: str):
    return nbformat.read(paths.NOTEBOOKS / f"{stem}.ipynb", 4)


def code_cells(nb) -> list:
    return [cell for cell in nb.cells if cell.cell_type == "code"]


def outputs(nb) -> list:
    """Return the outputs of all cells of a notebook."""
    return [output for cell in code_cells(nb) for output in cell.outputs]


def tables_of(nb) -> list[str]:
    """Return the HTML of all tables that a notebook shows."""
    shown = [output.get("data", {}) for output in outputs(nb)]
    return [data["text/html"] for data in shown if "text/html" in data]


def printed(nb) -> str:
    """Return all that a notebook printed."""
    return "".join(output.text for output in outputs(nb) if output.output_type == "stream")


def parameters_cell(nb):
    """Return the one cell that has the tag `parameters`."""
    (cell,) = [cell for cell in nb.cells if "parameters" in cell.metadata.get("tags", [])]
    return cell


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def path(request):
    """Return each committed notebook's path in turn."""
    return request.param


@pytest.fixture
def nb(path):
    """Return each committed notebook in turn."""
    return nbformat.read(path, 4)


def test_there_are_notebooks():
    stems = [path.stem for path in NOTEBOOKS]
    assert stems[0] == "00_start_here"
    assert "11_expo_headline" in stems
    assert "12_expo_interpolation" in stems
    assert len(stems) == 25


# ---- house rules


def imported(node) -> list[str]:
    """Return the packages that a node of a syntax tree imports from."""
    names = []
    if isinstance(node, ast.ImportFrom):
        names = [node.module]
    elif isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    return [name.partition(".")[0] for name in names]


def test_cells_are_few_and_short(nb):
    """At most 20 code cells of 15 lines, one of them with the parameters."""
    cells = code_cells(nb)
    assert 1 <= len(cells) <= 20
    assert parameters_cell(nb) in cells
    for cell in cells:
        assert len(cell.source.splitlines()) <= 15, cell.source


def test_cells_hold_no_machinery(nb):
    """No class, no long function, no import from elsewhere, no path, no shell and no magic."""
    for cell in code_cells(nb):
        assert not re.search(r"^\s*[%!]", cell.source, re.M), cell.source
        for node in ast.walk(ast.parse(cell.source)):
            assert not isinstance(node, ast.ClassDef)
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 8, node.name
            assert set(imported(node)) <= LIBRARIES
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert not PATH.match(node.value), f"a path: {node.value}"


def test_committed_outputs_are_whole_and_clean(path, nb):
    """Every cell was run in order, none failed, and nothing tells of one machine or one run."""
    text = path.read_text()
    counts = [cell.execution_count for cell in code_cells(nb)]
    assert counts == list(range(1, len(counts) + 1))
    assert not [output for output in outputs(nb) if output.output_type == "error"]
    assert "papermill" not in nb.metadata
    assert '"execution": {' not in text
    assert not re.search(r"/(home|root|tmp|Users)/", text), "a path of one machine"


@pytest.mark.parametrize("path", OF_PAPERS, ids=lambda path: path.stem)
def test_notebooks_of_the_papers_show_a_figure_and_a_verdict(nb):
    shown = json.dumps([output.get("data", {}) for output in outputs(nb)])
    assert "image/svg+xml" in shown
    assert "verdict" in shown


def test_figures_fit_the_output_area_and_need_no_trust(path, nb):
    """JupyterLab shows 828 pixels in a window of 1,280; a PNG has two pixels for each of them."""
    for output in outputs(nb):
        data = output.get("data", {})
        assert ("image/svg+xml" in data) == ("image/png" in data)
        if "image/png" in data:
            svg = data["image/svg+xml"]
            size = output.metadata["image/png"]
            points = re.search(r'width="([\d.]+)pt" height="([\d.]+)pt"', svg)
            width, height = (round(float(number) * 96 / 72) for number in points.groups())
            assert size == {"width": width, "height": height}
            assert width <= 828
            picture = Image.open(io.BytesIO(base64.b64decode(data["image/png"])))
            assert abs(picture.width - 2 * width) <= 1
            assert abs(picture.height - 2 * height) <= 1
            assert "stamp" in svg
    assert path.stat().st_size < 1_000_000


def test_tables_have_readable_headings(path, nb):
    headings = re.findall(r"<th[^>]*>(.*?)</th>", "".join(tables_of(nb)))
    assert bool(headings) == (path.stem != "90_playground")
    raw = set(report.HEADINGS)
    raw.discard("reward")  # also the name of what the sources' responses are given
    assert not [name for name in headings if "_" in name or name in raw]


def columns(table: str) -> dict[int, list[tuple[str, str]]]:
    """Return (style, text) of each column's cells in a table's HTML, the heading first."""
    cells_of: dict[int, list] = {}
    for row in re.findall(r"<tr>(.*?)</tr>", table, re.DOTALL):
        cells = re.findall(r'<t[hd][^>]*style="([^"]*)"[^>]*>(.*?)</t[hd]>', row, re.DOTALL)
        for number, cell in enumerate(cells):
            cells_of.setdefault(number, []).append(cell)
    return cells_of


def test_in_committed_tables_numbers_stand_right_and_texts_left():
    """Heading and cells of a column alike; a column with a single word in it holds texts."""
    tables = []
    for path in NOTEBOOKS:
        tables += tables_of(read(path.stem))
    counts = {"text-align: left": 0, "text-align: right": 0}
    for table in tables:
        for (style, heading), *cells in columns(table).values():
            assert cells, heading
            numbers = all(NUMBER.fullmatch(text) for _, text in cells)
            alignment = "text-align: right" if numbers else "text-align: left"
            assert style == alignment, heading
            assert {look.partition(";")[0] for look, _ in cells} == {alignment}, heading
            counts[alignment] += 1
    assert len(tables) == 108
    assert counts["text-align: left"] > 150
    assert counts["text-align: right"] > 250


def test_a_kernel_without_the_package_is_told_which_one_has_it(nb):
    """Its first import fails with ModuleNotFoundError; what to do stands directly above."""
    above = None
    for cell in nb.cells:
        if cell.cell_type == "code" and "from beyond_dpo" in cell.source:
            break
        above = cell
    assert above.cell_type == "markdown"
    assert above.id == "kernel"
    assert "\n" not in above.source
    assert above.source.startswith(
        "If `beyond_dpo` is not found below, this kernel is another Python: "
    )
    assert "`make lab`" in above.source
    assert "`.venv/bin/python`" in above.source


def test_nbconvert_to_script_writes_a_python_file():
    from nbconvert import ScriptExporter

    notebook = paths.NOTEBOOKS / "11_expo_headline.ipynb"
    body, resources = ScriptExporter().from_filename(str(notebook))
    assert resources["output_extension"] == ".py"
    ast.parse(body)
    assert "expo.curves(cfg)" in body


def test_opening_and_saving_in_jupyterlab_changes_nothing(path, nb):
    """The file is as JupyterLab writes it: its metadata, its cells' ids, its indentation."""
    assert (nb.nbformat, nb.nbformat_minor) == (4, 5)
    assert nb.metadata.kernelspec == {
        "display_name": "Python 3 (ipykernel)",
        "language": "python",
        "name": "python3",
    }
    language = nb.metadata.language_info
    assert language.file_extension == ".py"
    assert language.mimetype == "text/x-python"
    assert language.codemirror_mode == {"name": "ipython", "version": 3}
    assert language.name == "python"
    assert language.nbconvert_exporter == "python"
    assert language.pygments_lexer == "ipython3"
    ids = {cell.id for cell in nb.cells}
    assert len(ids) == len(nb.cells)
    assert path.read_text(encoding="utf-8") == nbformat.writes(nb) + "\n"


# ---- what the committed notebooks say


# What drawing from frozen results does without, as on Binder.
HEAVY = ("torch", "transformers", "vllm", "deepspeed", "safetensors", "datasets", "sklearn", "peft")
ABSENT = f"""
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {HEAVY}:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())
"""
WITH_TORCH = "23_mallows_links"  # it computes propositions with the losses themselves


@pytest.mark.slow
def test_committed_notebooks_say_what_they_said(tmp_path):
    """nbval, strictly: all committed outputs come again from the frozen results, computing nothing.

    All but one are drawn without torch and its like. The SVG of each figure is compared, which is
    the same on every CPU, and not the PNG.
    """
    (tmp_path / "sitecustomize.py").write_text(ABSENT)
    without = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-c", "import torch"]
    assert subprocess.run(command, env=without, capture_output=True).returncode == 1
    light = [path for path in NOTEBOOKS if path.stem != WITH_TORCH]
    assert len(light) == len(NOTEBOOKS) - 1
    compare(light, tmp_path, more_paths=[tmp_path])
    compare([paths.NOTEBOOKS / f"{WITH_TORCH}.ipynb"], tmp_path)
    drawn = pictures(tmp_path / "figures")
    assert len(drawn) == 42
    committed = pictures(paths.FIGURES)
    del committed["overview.svg"]  # drawn from other figures' numbers, by no notebook
    assert drawn == committed, "the same bytes"
    for path in (tmp_path / "figures").glob("*.json"):
        assert json.loads(path.read_text(encoding="utf-8"))["data"]


def compare(notebooks, folder, more_paths=()) -> None:
    """Run the notebooks by nbval, and see that every code cell says what it said."""
    python_path = [*map(str, more_paths), str(paths.ROOT / "lib")]
    environment = os.environ | {
        "COMPUTE": "never",
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
        "BEYOND_DPO_ARTIFACTS": str(folder / "artifacts"),
        "BEYOND_DPO_FIGURES": str(folder / "figures"),
        "PYTHONPATH": os.pathsep.join(python_path),
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += ["--nbval", "--nbval-current-env", "--nbval-cell-timeout=120"]
    command += [str(path) for path in notebooks]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=paths.ROOT)
    assert done.returncode == 0, done.stdout[-6000:]
    passed = int(re.search(r"(\d+) passed", done.stdout)[1])
    cells = [len(code_cells(read(path.stem))) for path in notebooks]
    assert passed == sum(cells), "every code cell was compared"


def pictures(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.svg")}


def upstream(stem: str) -> list:
    """Return all that a notebook's results are made from, and they themselves."""
    nb = read(stem)
    _, results = plan.planned(nb, plan.parameters(nb, stem))
    return [artifact for result in results for artifact in result.upstream.values()]


def test_the_quick_notebooks_need_no_model_and_no_download(monkeypatch):
    """They come first in `make reproduce`, within a minute of the set-up."""
    quick = [path for path in NOTEBOOKS if path.name[:2] in plan.QUICK]
    assert [path.name[:2] for path in quick] == list(plan.QUICK)
    calls = []
    for name in ("fetch_all", "model_dir", "tokenizer_dir", "resolve"):
        monkeypatch.setattr(assets, name, lambda *args, name=name: calls.append((name, args)))
    monkeypatch.setenv("COMPUTE", "cold")
    for path in quick:
        artifacts = upstream(path.stem)
        assert {artifact.stage for artifact in artifacts} <= {"bandits"}, path.stem
        recipes = json.dumps([artifact.recipe for artifact in artifacts])
        assert not re.search('"(asset|local|repo|plan)": ', recipes), path.stem
    assert not calls


def test_the_headline_notebook_needs_models():
    """So `upstream` does find what the quick notebooks have not."""
    stages_of_headline = {artifact.stage for artifact in upstream("11_expo_headline")}
    assert {"train", "responses", "scores", "reward-gold"} <= stages_of_headline


@pytest.mark.parametrize("mode", ["auto", "cold"])
def test_a_dry_run_draws_nothing(tmp_path, monkeypatch, mode):
    """It executes a notebook's first cells in the runner's process, also those that draw."""
    monkeypatch.setenv("COMPUTE", mode)
    monkeypatch.setattr(paths, "FIGURES", tmp_path / "figures")
    stem = "23_mallows_links"
    nb = read(stem)
    assert "figures.save" in code_cells(nb)[2].source
    plan.planned(nb, plan.parameters(nb, stem))
    assert not (tmp_path / "figures").exists()


# ---- what running a notebook overwrites

COPIED = "34_wrpo_objectives"
FIGURE = "wrpo_fig0d_objectives"  # which it draws


@pytest.fixture
def project(tmp_path):
    """Copy what one notebook reads and writes; return the folder."""
    shutil.copytree(paths.ROOT / "figures", tmp_path / "figures")
    shutil.copytree(paths.ROOT / "data", tmp_path / "data")
    (tmp_path / "notebooks").mkdir()
    shutil.copy(paths.NOTEBOOKS / f"{COPIED}.ipynb", tmp_path / "notebooks")
    return tmp_path


@pytest.fixture
def environment(project) -> dict[str, str]:
    """Return the environment of a kernel that works in the project."""
    variables = dict(os.environ)
    for name in os.environ:
        if name.startswith("BEYOND_DPO_"):
            del variables[name]
    variables["BEYOND_DPO_ROOT"] = str(project)
    variables["PYTHONPATH"] = str(paths.LIBRARY)
    variables["COMPUTE"] = "never"
    return variables


def committed(project) -> dict[str, bytes]:
    """Return the bytes of all that a notebook must leave alone."""
    files = [*(project / "figures").rglob("*"), *(project / "data").rglob("*")]
    return {str(file): file.read_bytes() for file in files if file.is_file()}


def execute(project, environment, nb) -> str:
    """Run a notebook's cells in a kernel of its own, as JupyterLab does; return what it printed."""
    manager = AsyncKernelManager(
        kernel_name="python3", kernel_spec_manager=KernelSpecManager(kernel_dirs=[])
    )
    folder = {"metadata": {"path": str(project / "notebooks")}}
    NotebookClient(nb, km=manager, resources=folder).execute(env=environment)
    return printed(nb)


def check_trial(project, output: str, change: str) -> None:
    """Check that figure and claims are under artifacts/, and that both say what was changed."""
    figures = project / "artifacts" / "figures"
    record = json.loads((figures / f"{FIGURE}.json").read_text())
    assert record["stamp"].endswith(f" · changed: {change}")
    assert (figures / f"{FIGURE}.svg").is_file()
    assert f"drawn with {change}; it is in {figures}" in output
    trials = project / "artifacts" / "runs" / "trials"
    assert f"claimed with {change}; it is in {trials}" in output
    assert [file.name for file in trials.iterdir()] == [f"{COPIED}.cpu.json"]
    assert not (project / "artifacts" / "runs" / "claims").exists()


def test_an_edited_parameter_overwrites_nothing(project, environment):
    """JupyterLab saves the edited notebook by itself: the file then holds what the kernel holds."""
    before = committed(project)
    nb = read(COPIED)
    cell = parameters_cell(nb)
    assert "bootstrap_seed = 0" in cell.source
    cell.source = cell.source.replace("bootstrap_seed = 0", "bootstrap_seed = 1")
    nbformat.write(nb, project / "notebooks" / f"{COPIED}.ipynb")
    output = execute(project, environment, nb)
    assert committed(project) == before
    check_trial(project, output, "bootstrap_seed = 1")


def test_papermill_overwrites_nothing(project, environment):
    """papermill by itself injects a cell with the parameters of its command line."""
    before = committed(project)
    notebook = project / "notebooks" / f"{COPIED}.ipynb"
    copy = project / "copy.ipynb"
    command = [sys.executable, "-m", "papermill", notebook, copy]
    command += ["-k", "python3", "-p", "bootstrap_seed", "2"]
    subprocess.run(command, env=environment, check=True, capture_output=True)
    assert committed(project) == before
    output = printed(nbformat.read(copy, 4))
    check_trial(project, output, "bootstrap_seed = 2")


def test_unchanged_parameters_give_the_committed_files_again(project, environment):
    before = committed(project)
    (project / "figures" / f"{FIGURE}.svg").write_text("damaged")
    output = execute(project, environment, read(COPIED))
    assert output == ""
    assert committed(project) == before
    claims = project / "artifacts" / "runs" / "claims"
    assert [file.name for file in claims.iterdir()] == [f"{COPIED}.cpu.json"]
    assert not (project / "artifacts" / "figures").exists()


def test_a_cold_run_by_hand_overwrites_no_committed_figure(project, environment):
    """JupyterLab or papermill under COMPUTE=cold, with all parameters as committed."""
    stem = "19_expo_controlled"  # recomputes published tables, whatever COMPUTE says
    shutil.copy(paths.NOTEBOOKS / f"{stem}.ipynb", project / "notebooks")
    for file in (project / "figures").glob("expo_*.svg"):
        file.write_text("kept")  # the numbers are the same: the bytes would tell nothing
    before = committed(project)
    environment["COMPUTE"] = "cold"
    output = execute(project, environment, read(stem))
    assert committed(project) == before
    folder = project / "artifacts" / "figures"
    (figure,) = folder.glob("*.svg")
    message = f"{figure.stem}: drawn from results computed anew; it is in {folder}"
    assert message in output
    record = json.loads(figure.with_suffix(".json").read_text())
    assert "float32" not in record["stamp"], "no model computed it"


# ---- the examples of docs/own_code.md


def save_causal_model(folder, noise: float) -> None:
    """Save the tiny model and its tokenizer, with each weight moved by `noise`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tiny = assets.model_dir("tiny")
    model = AutoModelForCausalLM.from_pretrained(tiny)
    with torch.no_grad():
        for weight in model.parameters():
            weight += noise
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny).save_pretrained(folder)


def save_reward_model(folder) -> None:
    """Save a tiny reward model with a random head, and its tokenizer."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    encoder = assets.model_dir("tiny-encoder")
    model = AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=1)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(encoder).save_pretrained(folder)


@pytest.fixture
def example_models(tmp_path, monkeypatch):
    """Go to a folder that holds the models of the examples; return their names there."""
    save_causal_model(tmp_path / "sft", 0.0)
    save_causal_model(tmp_path / "aligned", 0.01)
    save_reward_model(tmp_path / "reward")
    monkeypatch.chdir(tmp_path)
    return {"sft_folder": "sft", "aligned_folder": "aligned", "reward_folder": "reward"}


def examples():
    """Return the Python blocks of docs/own_code.md."""
    page = (paths.ROOT / "docs" / "own_code.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.S)
    assert len(blocks) == 8
    return blocks


@pytest.mark.slow
def test_the_examples_run(tmp_path, example_models):
    """Each Python block, on two tiny models and a tiny reward model."""
    for block in examples():
        exec(block, dict(example_models))
    assert (tmp_path / "out/alpha-0.5/model.safetensors").exists()


@pytest.mark.slow
def test_the_examples_of_the_core_need_no_heavy_package(tmp_path, example_models):
    """Losses, dispersion, extrapolation and rewards, where the packages of [repro] are missing."""
    above_the_core = ("beyond_dpo.pipeline", "beyond_dpo.judging", "beyond_dpo.jobs")
    core = [b for b in examples() if not any(folder in b for folder in above_the_core)]
    assert len(core) == 5
    # an import of None fails as that of a package that is not there
    missing = "import sys\nsys.modules.update(dict.fromkeys({}))\n".format(
        ["deepspeed", "vllm", "datasets", "pandas", "papermill", "sklearn", "matplotlib"]
    )
    models = "".join(f"{name} = {folder!r}\n" for name, folder in example_models.items())
    code = missing + models + "\n".join(core)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "out/alpha-0.5/model.safetensors").exists()
