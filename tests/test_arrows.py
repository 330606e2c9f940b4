"""Imports run one way between the folders, lazy ones too; nobody uses another module's private
names.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import beyond_dpo

LIB = Path(beyond_dpo.__file__).parent
FOLDERS = {
    "": 0,
    "machine": 1,
    "jobs": 2,
    "pipeline": 3,
    "judging": 4,
    "notebook": 4,
}  # may import what is lower
HEAVY = (
    "deepspeed",
    "vllm",
    "datasets",
    "pandas",
    "papermill",
    "numba",
    "sklearn",
    "pydantic",
    "peft",
)
FILES = sorted(path for path in LIB.rglob("*.py") if path.name != "__init__.py")
CORE = sorted(path.stem for path in LIB.glob("*.py") if path.name != "__init__.py")
COMPILED = "bandit"  # the one module of the core that needs numba, and so the extra [repro]


def name_of(path):
    """Return a module's name below the package, such as `jobs.train`."""
    return ".".join(path.relative_to(LIB).with_suffix("").parts)


def folder_of(module):
    return module.rpartition(".")[0]


def imported(path):
    """Return {name in this file: module of the package} for all of its imports, lazy ones too."""
    modules = {name_of(file) for file in FILES}
    found = {}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if (
            isinstance(node, ast.ImportFrom)
            and (node.module or "").partition(".")[0] == "beyond_dpo"
        ):
            inside = node.module.removeprefix("beyond_dpo").lstrip(".")
            for alias in node.names:
                whole = f"{inside}.{alias.name}".lstrip(".")
                found[alias.asname or alias.name] = whole if whole in modules else inside
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("beyond_dpo."):
                    found[alias.asname or alias.name] = alias.name.removeprefix("beyond_dpo.")
    return found


GRAPH = {name_of(path): set(imported(path).values()) - {name_of(path)} for path in FILES}


def test_the_folders_are_those_of_the_architecture():
    assert {folder_of(module) for module in GRAPH} == set(FOLDERS)
    assert len(GRAPH) > 40


def test_no_import_runs_upwards():
    wrong = []
    for module, others in GRAPH.items():
        for other in others:
            here, there = folder_of(module), folder_of(other)
            if here != there and FOLDERS[there] >= FOLDERS[here]:
                wrong.append(f"{module} imports {other}")
    assert not wrong


def test_no_two_modules_need_each_other():
    left = dict(GRAPH)
    while free := [module for module, others in left.items() if not others & left.keys()]:
        for module in free:
            del left[module]
    assert not left, "these import each other in a circle"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_private_names_stay_at_home(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = imported(path)
    private = [name for name in names if name.startswith("_")]
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id in names
        ):
            if node.attr.startswith("_") and not node.attr.startswith("__"):
                private.append(f"{node.value.id}.{node.attr}")
    assert not private


def test_the_core_needs_no_heavy_package():
    """With all of them blocked, each module of the core can be imported, but for the compiled
    one.
    """
    code = f"""
import importlib, sys
# an import of None fails as that of a package that is not there
sys.modules.update(dict.fromkeys({HEAVY}))
for name in {[name for name in CORE if name != COMPILED]}:
    importlib.import_module("beyond_dpo." + name)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_rows_and_settings_are_read_without_torch():
    code = (
        "import sys\n"
        "from beyond_dpo import rows, templates\n"
        "from beyond_dpo.pipeline import artifacts, config, preferences\n"
        "config.load('expo', 'smoke')\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stdout + done.stderr
