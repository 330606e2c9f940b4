"""The book: API pages from docstrings, the scoreboard's table, and the whole site."""

import importlib
import subprocess

import pytest

from beyond_dpo.machine import paths
from beyond_dpo.notebook import claims

BOOK = paths.ROOT / "docs" / "book"
PYTHON = paths.ROOT / ".venv-book" / "bin" / "python"

DOCSTRING = """Return half of x*.

    h = x / 2

Half is what is left, see `other`.

Args:
    x: a number_, of
        any size.
    unit: nats.
Returns:
    (batch,), half of it.

The half of 0 is 0."""

MARKDOWN = r"""Return half of x\*.

```text
h = x / 2
```

Half is what is left, see `other`.

**Args**

- `x`: a number\_, of any size.
- `unit`: nats.

**Returns**

- (batch,), half of it.

The half of 0 is 0.
"""


@pytest.fixture
def book(monkeypatch):
    """Return the modules that build the book, which need no Sphinx."""
    monkeypatch.syspath_prepend(str(BOOK))
    return importlib.import_module("build"), importlib.import_module("api")


def test_a_docstring_becomes_markdown(book):
    _, api = book
    assert api.markdown(DOCSTRING) == MARKDOWN


def test_the_api_has_public_definitions_with_signatures_and_no_others(book, tmp_path):
    _, api = book
    module = tmp_path / "m.py"
    module.write_text(
        '"""A module."""\n'
        "def half(x: float, *, unit='nat') -> float:\n    'Return half.'\n"
        "def _hidden(): pass\n"
        "class Pair:\n    'Hold two.'\n    first: int\n"
        "    def swap(self): 'Swap.'\n    def _no(self): pass\n"
    )
    page = api.page(module)
    assert "::::{py:function} half(x: float, *, unit='nat') -> float" in page
    assert "::::{py:class} Pair" in page
    assert "- `first: int`" in page
    assert ":::{py:method} swap(self)" in page
    assert "_hidden" not in page
    assert "_no" not in page


def test_the_scoreboard_has_every_claim_and_a_menu_of_each_kind(book):
    build, _ = book
    page = build.scoreboard()
    board = claims.scoreboard()
    assert page.count("<tr data-paper=") == len(board) > 200
    for kind in board["kind"].unique():
        assert f"<option>{kind}</option>" in page
    assert "inconclusive (MDE" not in page.partition("<table")[0]


def test_every_notebook_of_a_paper_has_a_short_title(book):
    build, _ = book
    assert len(build.short_titles()) == len(list(paths.NOTEBOOKS.glob("[123]*.ipynb"))) > 20


@pytest.mark.slow
def test_the_book_builds_without_a_warning_and_its_links_hold():
    if not PYTHON.exists():
        pytest.skip("no .venv-book; `make book` makes it")
    for options in ([], ["--check"]):
        command = [PYTHON, BOOK / "build.py", *options]
        done = subprocess.run(command, cwd=paths.ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
    site = paths.ROOT / "build" / "book" / "html"
    pages = {path.stem for path in (site / "notebooks").glob("*.html")}
    assert pages == {path.stem for path in paths.NOTEBOOKS.glob("*.ipynb")}
    assert 'id="claims"' in (site / "scoreboard.html").read_text(encoding="utf-8")
    assert "svg" in (site / "notebooks" / "11_expo_headline.html").read_text(encoding="utf-8")
