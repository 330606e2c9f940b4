"""The committed notebooks: they say what they said (nbval) and keep the house rules."""

import ast
import json
import os
import re
import subprocess
import sys

import nbformat
import pytest

from beyond_dpo import paths

NOTEBOOKS = sorted(paths.NOTEBOOKS.glob("*.ipynb"))
LIBRARIES = {"beyond_dpo", "numpy", "pandas", "matplotlib", "IPython", "ipywidgets", "io"}


def code_cells(path):
    return [c for c in nbformat.read(path, 4).cells if c.cell_type == "code"]


def test_there_are_notebooks():
    assert {p.stem for p in NOTEBOOKS} >= {"00_start_here", "11_expo_headline", "12_expo_interpolation"}
    assert len(NOTEBOOKS) == 22


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_house_rules(path):
    """At most 20 code cells of 15 lines, one parameters cell, no class, no long function, no path, no shell."""
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
                names = [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
                assert {n.split(".")[0] for n in names} <= LIBRARIES
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert not re.match(r"(\.{0,2}/|~|[A-Z]:\\)\w", node.value), f"a path: {node.value}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_committed_outputs_are_whole_and_clean(path):
    """Every cell was run in order, none failed, and nothing of one machine or one run is in the file."""
    text, cells = path.read_text(), code_cells(path)
    assert [c.execution_count for c in cells] == list(range(1, len(cells) + 1))
    assert not [o for c in cells for o in c.outputs if o.output_type == "error"]
    assert "papermill" not in json.loads(text)["metadata"] and '"execution": {' not in text
    assert not re.search(r"/(home|root|tmp|Users)/", text), "a path of one machine"
    if path.stem[0] in "123":
        joined = json.dumps([o.get("data", {}) for c in cells for o in c.outputs])
        assert "image/svg+xml" in joined and "verdict" in joined, "a figure and a verdict"


def test_committed_notebooks_say_what_they_said(tmp_path):
    """nbval, strictly: all committed outputs come again from the frozen results, computing nothing."""
    env = {**os.environ, "COMPUTE": "never", "MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    env |= {"BEYOND_DPO_ARTIFACTS": str(tmp_path / "artifacts"), "BEYOND_DPO_FIGURES": str(tmp_path / "figures")}
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
    done = subprocess.run([*command, *map(str, NOTEBOOKS)], env=env, capture_output=True, text=True, cwd=paths.ROOT)
    assert done.returncode == 0, done.stdout[-6000:]
    passed = int(re.search(r"(\d+) passed", done.stdout)[1])
    assert passed == sum(len(code_cells(p)) for p in NOTEBOOKS), "every code cell was compared"
    drawn = {p.name: p.read_bytes() for p in (tmp_path / "figures").glob("*.svg")}
    assert drawn == {p.name: p.read_bytes() for p in paths.FIGURES.glob("*.svg")} and len(drawn) == 29, "the same bytes"


def test_readme_examples_run(tmp_path, monkeypatch):
    """Each Python block of the README, on two tiny models and a tiny reward model."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    from beyond_dpo import assets

    for name, noise in (("sft", 0.0), ("aligned", 0.01)):
        model = AutoModelForCausalLM.from_pretrained(assets.model_dir("tiny"))
        with torch.no_grad():
            for p in model.parameters():
                p += noise
        model.save_pretrained(tmp_path / name)
        AutoTokenizer.from_pretrained(assets.model_dir("tiny")).save_pretrained(tmp_path / name)
    AutoModelForSequenceClassification.from_pretrained(assets.model_dir("tiny-encoder"), num_labels=1).save_pretrained(
        tmp_path / "reward"
    )
    AutoTokenizer.from_pretrained(assets.model_dir("tiny-encoder")).save_pretrained(tmp_path / "reward")
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
