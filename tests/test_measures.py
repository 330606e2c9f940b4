"""How dense the code is: measured, printed (`pytest -s`, `python tests/test_measures.py`), bounded.

A line of code holds something else than a comment or a docstring. Its density is the number of
nodes of the syntax tree (without load and store marks) over the number of such lines.
"""

import ast
import io
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DENSITY = {"lib": 6.5, "tests": 7.0}  # nodes a line of code, at most
LONGEST = 50  # lines of code of a function, unless its docstring says why it is longer
WHY = "Long because"
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)
NO_CODE = (
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
)


def files(folder):
    return sorted((ROOT / folder).rglob("*.py"))


def code_lines(source, tree):
    """Return the numbers of the lines that hold code."""
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in NO_CODE:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(tree):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node) is not None:
            docstring = node.body[0]
            lines.difference_update(range(docstring.lineno, docstring.end_lineno + 1))
    return lines


def nodes(tree):
    """Return how many nodes a syntax tree has."""
    return sum(not isinstance(node, ast.expr_context) for node in ast.walk(tree))


def density(folder):
    """Return the nodes a line of code of all files below a folder of the project."""
    total_nodes = 0
    total_lines = 0
    for path in files(folder):
        source = path.read_text(encoding="utf-8")
        tree = ast.parse(source)
        total_nodes += nodes(tree)
        total_lines += len(code_lines(source, tree))
    return total_nodes / total_lines


def long_functions(folder):
    """Return [(lines of code, where)] of the functions that are too long for no stated reason."""
    found = []
    for path in files(folder):
        source = path.read_text(encoding="utf-8")
        tree = ast.parse(source)
        lines = code_lines(source, tree)
        for node in ast.walk(tree):
            if not isinstance(node, FUNCTION):
                continue
            length = len(lines & set(range(node.lineno, node.end_lineno + 1)))
            if length > LONGEST and WHY not in (ast.get_docstring(node) or ""):
                found.append((length, f"{path.relative_to(ROOT)}: {node.name}"))
    return sorted(found, reverse=True)


@pytest.mark.parametrize("folder", DENSITY)
def test_a_line_holds_one_thought(folder):
    measured = density(folder)
    print(f"{folder}: {measured:.2f} nodes a line of code")
    assert len(files(folder)) > 30
    assert measured <= DENSITY[folder]


@pytest.mark.parametrize("folder", [*DENSITY, "benchmarks"])
def test_a_function_fits_on_a_screen(folder):
    assert long_functions(folder) == []


def test_ruff_finds_nothing():
    """Complexity, branches and statements are bounded there, and the form is ruff's."""
    ruff = [sys.executable, "-m", "ruff"]
    folders = ["lib", "tests", "benchmarks"]
    checked = subprocess.run(
        [*ruff, "check", "--no-cache", *folders, "notebooks"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert checked.returncode == 0, checked.stdout
    formatted = subprocess.run(
        [*ruff, "format", "--check", "--no-cache", *folders],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert formatted.returncode == 0, formatted.stdout


def test_the_measures_themselves():
    """Two functions of known size: the measures count code alone."""
    source = '"""A module."""\n\n# a comment\n\n\ndef f(x):\n    """Add one."""\n    return x + 1\n'
    tree = ast.parse(source)
    assert code_lines(source, tree) == {6, 8}
    # Module, its docstring (Expr, Constant), FunctionDef, arguments, arg, docstring (2),
    # Return, BinOp, Name, Add, Constant
    assert nodes(tree) == 13


if __name__ == "__main__":
    for name in DENSITY:
        print(f"{name}: {density(name):.2f} nodes a line of code, longest: {long_functions(name)}")
