"""Imports run one way between folders, and nobody uses another module's private names."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

import beyond_dpo

LIB = Path(beyond_dpo.__file__).parent
# The height of each folder, which may import what is lower. The core is "".
FOLDERS = {"": 0, "machine": 1, "jobs": 2, "pipeline": 3, "judging": 4, "notebook": 4}
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
# the modules of the core that need numba, and so the extra [repro]
COMPILED = ("bandit", "contextual")
TRAINERS = ("trl",)  # that of the extra [trl]


def name_of(path):
    """Return a module's name below the package, such as `jobs.train`."""
    return ".".join(path.relative_to(LIB).with_suffix("").parts)


def folder_of(module):
    return module.rpartition(".")[0]


MODULES = {name_of(path) for path in FILES}


def tree_of(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def imported(path):
    """Return {name in this file: module of the package} for all of its imports, lazy ones too."""
    module_of = {}
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.ImportFrom):
            module_of.update(imported_from(node))
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("beyond_dpo."):
                    name = alias.asname or alias.name
                    module_of[name] = alias.name.removeprefix("beyond_dpo.")
    return module_of


def imported_from(node):
    """Return {name: module of the package} of `from x import name`, where name may be a module."""
    package, _, parent = (node.module or "").partition(".")
    if package != "beyond_dpo":
        return {}
    module_of = {}
    for alias in node.names:
        child = f"{parent}.{alias.name}".lstrip(".")
        module_of[alias.asname or alias.name] = child if child in MODULES else parent
    return module_of


# {module: the modules that it imports}
GRAPH = {name_of(path): set(imported(path).values()) - {name_of(path)} for path in FILES}


def test_the_folders_are_those_of_the_architecture():
    assert {folder_of(module) for module in GRAPH} == set(FOLDERS)
    assert len(GRAPH) > 40


def test_no_import_runs_upwards():
    wrong = []
    for module, imports in GRAPH.items():
        folder = folder_of(module)
        for other in imports:
            other_folder = folder_of(other)
            if folder != other_folder and FOLDERS[other_folder] >= FOLDERS[folder]:
                wrong.append(f"{module} imports {other}")
    assert not wrong


def test_no_two_modules_need_each_other():
    try:
        list(graphlib.TopologicalSorter(GRAPH).static_order())
    except graphlib.CycleError as error:
        pytest.fail(f"these import each other in a circle: {error.args[1]}")


def is_private(name):
    return name.startswith("_") and not name.startswith("__")


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_private_names_stay_at_home(path):
    names = imported(path)
    private = [name for name in names if name.startswith("_")]
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            owner = node.value.id
            if owner in names and is_private(node.attr):
                private.append(f"{owner}.{node.attr}")
    assert not private


def python(code):
    """Run code in a process of its own."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


@pytest.mark.slow
def test_the_core_needs_no_heavy_package():
    """With all of them blocked each module of the core can be imported, but those of an extra."""
    names = [name for name in CORE if name not in COMPILED + TRAINERS]
    code = f"""
import importlib, sys
# an import of None fails as that of a package that is not there
sys.modules.update(dict.fromkeys({HEAVY}))
for name in {names}:
    importlib.import_module("beyond_dpo." + name)
"""
    done = python(code)
    assert done.returncode == 0, done.stderr[-2000:]


def test_rows_and_settings_are_read_without_torch():
    code = """
import sys
from beyond_dpo import rows, templates
from beyond_dpo.pipeline import artifacts, config, preferences
config.load('expo', 'smoke')
print('torch' in sys.modules)
"""
    done = python(code)
    assert done.stdout.strip() == "False", done.stdout + done.stderr
