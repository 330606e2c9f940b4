"""Build the book: the notebooks as committed, the pages of docs/, a scoreboard, the API.

    python docs/book/build.py [--check]

Sphinx reads its pages from one folder, so they are copied to build/book/source under the paths that
they have in the project: links between them hold. The site is build/book/html. Nothing is executed.
"""

import argparse
import html
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "lib"), str(ROOT / "docs" / "book")]

import api  # noqa: E402

from beyond_dpo.notebook import claims  # noqa: E402

BOOK = ROOT / "docs" / "book"
OUT = ROOT / "build" / "book"
SOURCE = OUT / "source"
# Pages that are not in docs/, by the paths that they have in the project.
PAGES = ("CHANGELOG.md", "CONTRIBUTING.md", "recipes/README.md", "benchmarks/gpu/README.md")
LINK = re.compile(r"\]\(([^)\s#]+)(?:#[^)\s]*)?\)")
NOTEBOOK = re.compile(r"\[(\d\d) ([^\]]+)\]\((\d\d_\w+)\.ipynb\)")
BADGE = re.compile(r"^\[!\[.*\n", re.MULTILINE)
PAPERS = {"1": "ExPO", "2": "MallowsPO", "3": "WRPO"}  # by the first digit of a notebook
# The pages of the book after the notebooks; those that are not there are left out.
CHAPTERS = {
    "Rerun": ["usage", "jupyter", "cluster", "judges", "faults", "performance"],
    "Take a piece": ["own_code", "expo_command", "trl"],
    "Judge": ["evidence", "differences", "checking"],
    "Inside": ["architecture", "book/README"],
}
COLUMNS = {
    "claim": "claim",
    "kind": "kind",
    "ours": "ours [95 %]",
    "paper": "paper",
    "trainings": "trainings",
    "verdict": "verdict",
    "notebook": "from",
}


def main(arguments: list[str] | None = None) -> int:
    """Build the site, or check its links; return Sphinx's exit status."""
    parser = argparse.ArgumentParser(description="Build the book into build/book/html.")
    parser.add_argument("--check", action="store_true", help="check the links in the built book")
    options = parser.parse_args(arguments)
    assemble()
    builder, folder = ("linkcheck", "links") if options.check else ("html", "html")
    # A warning is an error: most are links that lead nowhere.
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", builder]
    environment = os.environ | {"BEYOND_DPO_ROOT": str(ROOT)}
    done = subprocess.run([*command, str(SOURCE), str(OUT / folder)], env=environment)
    if done.returncode == 0:
        print(OUT / folder / ("output.txt" if options.check else "index.html"))
    return done.returncode


def assemble() -> None:
    """Put together what Sphinx reads."""
    shutil.rmtree(SOURCE, ignore_errors=True)
    SOURCE.mkdir(parents=True)
    shutil.copy(BOOK / "conf.py", SOURCE)
    shutil.copytree(BOOK / "static", SOURCE / "static")
    for page in [*sorted((ROOT / "docs").rglob("*.md")), *(ROOT / name for name in PAGES)]:
        copy(page)
    notebooks = sorted((ROOT / "notebooks").glob("*.ipynb"))
    for notebook in notebooks:
        copy(notebook)
    modules = write_api()
    write(SOURCE / "scoreboard.md", scoreboard())
    readme = ROOT / "README.md"
    write(SOURCE / "index.md", start_page(readme.read_text(encoding="utf-8"), modules))
    copy_linked(readme)


def copy(page: Path) -> None:
    """Copy a page to its place among the sources, and the files that it links to."""
    target = SOURCE / page.relative_to(ROOT)
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(page, target)
    copy_linked(page)


def copy_linked(page: Path) -> None:
    """Copy what a page links to and is no page itself: the reader can download it."""
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        file = (page.parent / link).resolve()
        if file.suffix in (".md", ".ipynb") or not file.is_file():
            continue
        target = SOURCE / file.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)


def write(path: Path, text: str) -> None:
    """Write a page, and the folder that it is in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


# ---- the start page


def start_page(readme: str, modules: list[str]) -> str:
    """Return the README as the first page of the book, with its table of contents."""
    parts = [BADGE.sub("", readme)]
    titles = short_titles()
    parts.append(contents("Start", ["notebooks/00_start_here", "scoreboard"]))
    for digit, paper in PAPERS.items():
        names = [name for name in titles if name.startswith(digit)]
        entries = [f"{name[:2]} {titles[name]} <notebooks/{name}>" for name in names]
        parts.append(contents(paper, entries))
    parts.append(contents("Try", ["Playground <notebooks/90_playground>"]))
    for chapter, names in CHAPTERS.items():
        present = [f"docs/{name}" for name in names if (ROOT / "docs" / f"{name}.md").is_file()]
        parts.append(contents(chapter, present))
    parts.append(contents("API of the core", [f"api/{name}" for name in modules]))
    others = [name.removesuffix(".md") for name in PAGES]
    parts.append(contents("Project", others))
    return "\n".join(parts)


def short_titles() -> dict[str, str]:
    """Return {notebook: its short name} as notebook 00 has them; its title is a whole finding."""
    notebook = json.loads((ROOT / "notebooks" / "00_start_here.ipynb").read_text(encoding="utf-8"))
    text = "".join(notebook["cells"][0]["source"])
    titles = {stem: title for _, title, stem in NOTEBOOK.findall(text)}
    stems = [path.stem for path in sorted((ROOT / "notebooks").glob("[123]*.ipynb"))]
    missing = set(stems) - set(titles)
    if missing:
        raise ValueError(f"notebook 00 does not name {sorted(missing)}")
    return {stem: titles[stem] for stem in stems}


def contents(caption: str, entries: list[str]) -> str:
    """Return a part of the table of contents, which only the side bar shows."""
    lines = ["```{toctree}", ":hidden:", f":caption: {caption}", "", *entries, "```", ""]
    return "\n".join(lines)


# ---- the API


def write_api() -> list[str]:
    """Write a page for each module of the core; return their names."""
    modules = sorted((ROOT / "lib" / "beyond_dpo").glob("[a-z]*.py"))
    for module in modules:
        write(SOURCE / "api" / f"{module.stem}.md", api.page(module))
    return [module.stem for module in modules]


# ---- the scoreboard


def scoreboard() -> str:
    """Return the page of all claims, with menus that choose among them."""
    rows = claims.readable(claims.scoreboard()).to_dict("records")
    for row in rows:
        row["paper_of_notebook"] = PAPERS[row["notebook"][0]]
    # An inconclusive verdict has an effect of its own behind it, in brackets.
    menus = {
        "paper": ("paper", sorted({row["paper_of_notebook"] for row in rows})),
        "kind": ("kind", sorted({row["kind"] for row in rows})),
        "verdict": ("verdict", sorted({plain_verdict(row) for row in rows})),
    }
    head = "".join(f"<th>{name}</th>" for name in COLUMNS.values())
    lines = [
        "---",
        "html_theme.sidebar_secondary.remove: true",  # the table takes the whole width
        "---",
        "# Scoreboard",
        "",
        "Every claim, from the highest profile in which it was run; what the words mean is in "
        "[evidence](docs/evidence.md).",
        "",
        '<div class="choose">',
        *(menu(name, label, options) for name, (label, options) in menus.items()),
        '<label>words <input id="choose-words" type="search"></label>',
        '<output id="chosen"></output>',
        "</div>",
        f'<table id="claims"><thead><tr>{head}</tr></thead><tbody>',
        *(board_row(row) for row in rows),
        "</tbody></table>",
    ]
    return "\n".join(lines) + "\n"


def plain_verdict(row: dict) -> str:
    """Return a verdict without what stands behind it in brackets."""
    verdict, _, _ = row["verdict"].partition(" (")
    return verdict


def menu(name: str, label: str, options: list[str]) -> str:
    """Return a menu that chooses the rows with one value."""
    choices = "".join(f"<option>{html.escape(option)}</option>" for option in options)
    first = '<option value="">all</option>'
    return f'<label>{label} <select id="choose-{name}">{first}{choices}</select></label>'


def board_row(row: dict) -> str:
    """Return a claim as a row of the table; data-label is its heading on a narrow screen."""
    cells = []
    for name, label in COLUMNS.items():
        text = html.escape(str(row[name]))
        if name == "notebook":
            text = f'<a href="notebooks/{row["notebook"]}.html">{text[:2]}</a>, {row["profile"]}'
        cells.append(f'<td data-label="{label}" class="{name}">{text}</td>')
    data = {
        "paper": row["paper_of_notebook"],
        "kind": row["kind"],
        "verdict": plain_verdict(row),
    }
    attributes = " ".join(f'data-{name}="{html.escape(value)}"' for name, value in data.items())
    return f"<tr {attributes}>{''.join(cells)}</tr>"


if __name__ == "__main__":
    sys.exit(main())
