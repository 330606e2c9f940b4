"""README and docs/: links lead somewhere, commands work, what is generated is up to date."""

import json
import os
import re
import subprocess
import sys

import pytest
import yaml
from packaging.utils import canonicalize_name

from beyond_dpo.machine import paths
from beyond_dpo.notebook import checking, claims, overview

ROOT = paths.ROOT
PAGES = sorted(
    [
        ROOT / "README.md",
        ROOT / "CHANGELOG.md",
        ROOT / "CONTRIBUTING.md",
        ROOT / "recipes" / "README.md",
        ROOT / "benchmarks" / "gpu" / "README.md",
        *(ROOT / "docs").rglob("*.md"),
    ]
)
# Written and tested beside the code that they are about.
OWN_TESTS = {"expo_command.md", "trl.md"}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
MOST_LINES = 250
HEAVY = ("torch", "transformers", "vllm", "deepspeed", "safetensors", "datasets", "sklearn", "peft")
# What a page shows and no test runs, each with its reason.
NOT_RUN = {
    "podman": "no container runtime",
    "conda": "installs an environment for CUDA",
    "pip install": "installs packages",
    "python -m pip install": "installs packages",
    ".venv/bin/python -m pytest": "is this suite",
    "pytest": "is this suite",
    "COMPUTE=never PYTHONPATH=lib python -m jupyterlab": "opens a server; its notebooks run below",
    "!git clone": "of Colab",
    "!grep": "of Colab",
    "%pip install": "of Colab",
    "import os, sys": "of Colab",
    "os.environ": "of Colab",
    "sys.path": "of Colab",
}


def text_of(path) -> str:
    return path.read_text(encoding="utf-8")


def name_of(path) -> str:
    return path.relative_to(ROOT).as_posix()


def is_not_run(command: str) -> bool:
    return any(command.startswith(beginning) for beginning in NOT_RUN)


def shown_commands() -> list[str]:
    """Return the commands that README, CONTRIBUTING and docs/ show, without their comments.

    They are the lines of blocks without a language, and in the README those between backticks.
    """
    lines = []
    for page in PAGES:
        is_ours = page.parent in (ROOT, ROOT / "docs", ROOT / "docs" / "book")
        if page.name in OWN_TESTS or not is_ours:
            continue
        for language, block in FENCE.findall(text_of(page)):
            if not language:
                lines += block.splitlines()
    without_blocks = FENCE.sub("", text_of(ROOT / "README.md"))
    for code in INLINE.findall(without_blocks):
        if re.match(r"(make|pip|python|pytest|\.venv/bin/python) ", code):
            lines.append(code)
    commands = [re.sub(r"\s+#.*", "", line).strip() for line in lines]
    return sorted({command for command in commands if command})


COMMANDS = shown_commands()
MAKE = [command for command in COMMANDS if command.startswith("make ")]
PYTHON = [c for c in COMMANDS if c.startswith(".venv/bin/python -m beyond_dpo.")]


def test_every_command_is_run_or_has_a_reason():
    left = [c for c in COMMANDS if c not in MAKE and c not in PYTHON and not is_not_run(c)]
    assert not left
    assert len(MAKE) > 8
    assert len(PYTHON) >= 3


@pytest.mark.parametrize("command", MAKE)
def test_make_knows_what_is_shown(command):
    """As make would run it; test_packaging.py says what some of them must do."""
    done = subprocess.run(
        f"{command} -n READY= BOOK=", shell=True, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.mark.parametrize("command", PYTHON)
def test_commands_of_the_package_run(command):
    own = command.replace(".venv/bin/python", sys.executable, 1)
    environment = os.environ | {"PYTHONPATH": str(ROOT / "lib")}
    done = subprocess.run(
        own, shell=True, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip()


# ---- links


def anchors_of(text: str) -> set[str]:
    """Return the anchors that a forge gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", text), re.MULTILINE)
    slugs = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings]
    return {slug.strip().replace(" ", "-") for slug in slugs}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    text = text_of(page)
    for target in LINK.findall(FENCE.sub("", text)):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        path = (page.parent / file).resolve() if file else page
        assert path.exists(), f"{target} of {name_of(page)}"
        if anchor:
            assert anchor in anchors_of(text_of(path)), f"{target} of {name_of(page)}"


def test_every_page_is_linked_from_the_readme_or_a_page_of_it():
    linked = set()
    for page in PAGES:
        targets = LINK.findall(text_of(page))
        linked |= {(page.parent / target.partition("#")[0]).resolve() for target in targets}
    unlinked = [page for page in PAGES if page not in linked]
    assert unlinked == [ROOT / "README.md"]


# ---- the first screen


def test_the_readme_is_short_and_begins_with_picture_and_findings():
    text = text_of(ROOT / "README.md")
    assert len(text.splitlines()) <= MOST_LINES
    before, _, after = text.partition("<!-- scoreboard -->")
    assert "](figures/overview.svg)" in before
    assert len(before.splitlines()) < 25
    board, _, _ = after.partition("<!-- /scoreboard -->")
    assert board.count("](notebooks/") <= claims.MOST_HEADLINES


def test_the_committed_picture_is_drawn_from_the_committed_figures(tmp_path, monkeypatch):
    for name in (overview.EXPO, overview.MALLOWS, overview.WRPO):
        source = ROOT / "figures" / f"{name}.json"
        (tmp_path / source.name).write_bytes(source.read_bytes())
    monkeypatch.setattr(paths, "FIGURES", tmp_path)
    overview.save()
    for ending in ("svg", "json"):
        drawn = (tmp_path / f"overview.{ending}").read_bytes()
        assert drawn == (ROOT / "figures" / f"overview.{ending}").read_bytes()


# ---- for those who check


def test_the_manifest_covers_every_claim_once():
    entries = yaml.safe_load(text_of(ROOT / "codecheck.yml"))["manifest"]
    listed = []
    for entry in entries:
        assert (ROOT / entry["file"]).is_file()
        notebook = entry["file"].rpartition("/")[2].partition(".")[0]
        listed += [(notebook, name) for name in entry.get("claims", [])]
    every = {(notebook, name) for notebook, of in claims.all_claims().items() for name in of}
    assert set(listed) == every
    assert len(every) > 200


def test_the_manifest_names_every_figure_of_a_notebook():
    listed = {entry["file"] for entry in checking.manifest()}
    committed = {f"figures/{path.name}" for path in (ROOT / "figures").glob("*.svg")}
    assert committed - listed == {"figures/overview.svg"}


def test_manifest_and_tables_are_up_to_date():
    assert checking.codecheck() == text_of(ROOT / "codecheck.yml")
    page = text_of(ROOT / "docs" / "checking.md")
    assert checking.with_tables(page) == page


def test_a_notebook_that_states_no_time_has_that_of_its_trainings():
    (curves,) = paths.FROZEN.glob("curves-*/manifest.json")
    rows = json.loads(text_of(curves))["facts"]["seconds"]
    minutes = sum(row["training"] + row["search"] for row in rows) // 60
    assert len(rows) > 10
    time = f"{minutes // 60:.0f} h {minutes % 60:.0f} min"
    expected = f"more than {time}, which its curves' trainings and points took"
    assert checking.recorded_time("11_expo_headline") == expected
    assert checking.recorded_time("18_expo_off_the_shelf") == checking.NOT_TIMED


def test_a_claim_without_a_frozen_file_is_named(monkeypatch):
    monkeypatch.setattr(checking, "stored", lambda notebook: [])
    with pytest.raises(ValueError, match="beats_full_20"):
        checking.manifest()


def test_a_page_without_markers_gets_no_tables():
    with pytest.raises(ValueError, match="<!-- manifest -->"):
        checking.with_tables("# no table")


@pytest.mark.parametrize("file", ["Containerfile", ".github/workflows/book.yml"])
def test_what_could_not_be_run_names_what_is_there(file):
    """The targets of make, and what the container file copies one by one."""
    text = re.sub(r"^ *#.*$", "", text_of(ROOT / file), flags=re.MULTILINE)
    targets = re.findall(r"\bmake\W+([a-z]+)\b", re.sub(r"apt-get[^\n]*\n[^\n]*", "", text))
    assert targets
    for target in targets:
        assert re.search(rf"^{target}:.*## ", text_of(ROOT / "Makefile"), re.MULTILINE), target
    for line in re.findall(r"^COPY (.*) \S+$", text, re.MULTILINE):
        for name in line.split():
            assert (ROOT / name).exists(), name


def test_binder_starts_what_it_can_execute():
    for name in ("postBuild", "start"):
        assert os.access(ROOT / "binder" / name, os.X_OK)


# ---- without torch


def pins(file) -> dict[str, str]:
    lines = [line for line in text_of(file).splitlines() if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in (x.split("==") for x in lines)}


def test_binder_pins_what_the_lock_pins():
    lock = pins(ROOT / "requirements" / "cpu.txt")
    light = pins(ROOT / "binder" / "requirements.txt")
    assert len(light) > 10
    assert light.items() <= lock.items()
    assert not set(HEAVY) & set(light)
