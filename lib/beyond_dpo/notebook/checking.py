"""What somebody needs who checks the results: a manifest, licences, hyper-parameters.

    python -m beyond_dpo.notebook.checking

writes codecheck.yml, in the manner of CODECHECK, and the tables of docs/checking.md. Both come from
data/claims.yaml, the frozen claims, the figures and the settings; `make render` does it.
"""

import argparse
import json
import re
from pathlib import Path
from typing import NamedTuple

import yaml

from beyond_dpo import events
from beyond_dpo.files import write_file
from beyond_dpo.machine import paths
from beyond_dpo.notebook import claims
from beyond_dpo.pipeline import assets, config

SPEC = "https://codecheck.org.uk/spec/config/1.0/"
HEAD = "# Written by `python -m beyond_dpo.notebook.checking`; not by hand.\n"
# The time that a notebook's first cell states, as it was measured.
TIME = re.compile(r"(?:about )?\d+ (?:s|min|h)\b(?: after notebook \d\d)?")
NOT_TIMED = "not timed"


class Searched(NamedTuple):
    """A setting of which several values were tried: where it stands, and what the values are for.

    field: a name in the settings of the paper's experiments; a dot leads into a part of them.
    """

    paper: str
    field: str
    what: str


SEARCHED = (
    Searched("expo", "tried", "full DPO's learning rate and epochs, by the reward model on dev"),
    Searched("expo", "fractions", "shares of the pairs"),
    Searched("expo", "alphas", "α of each share, the best by the reward model on dev prompts"),
    Searched("expo", "search_evaluations", "α in the golden-section search"),
    Searched("expo", "recipes", "changes of DPO's recipe, each compared"),
    Searched("expo", "recipe_alphas", "α of each recipe"),
    Searched("expo", "pair_alphas", "α of pairs that are no SFT and aligned model"),
    Searched("expo", "module_alphas", "α of a part of the model"),
    Searched("mallows", "betas", "β of the frontier, all shown"),
    Searched("mallows", "grid_betas", "β of the plug-in table, all shown"),
    Searched("mallows", "grid_lrs", "learning rates of the plug-in table, all shown"),
    Searched("mallows", "bandit_betas", "β of the five-armed bandit, all shown"),
    Searched("mallows", "contextual.noises", "errors of the estimate, all shown"),
    Searched("mallows", "contextual.spreads", "spreads of φ, all shown"),
    Searched("wrpo", "alphas", "largest α, all shown"),
    Searched("wrpo", "source_sets", "choices of sources, all shown"),
    Searched("wrpo", "objectives", "forms of the loss, all shown"),
    Searched("wrpo", "bandit_alphas", "α of the bandit of sources, all shown"),
)
# Of each training: one value each.
SET = ("loss", "lr", "beta", "epochs", "global_batch", "optimizer", "warmup", "max_length")
PROFILES = {"expo": "night", "mallows": "cpu", "wrpo": "cpu"}  # of the frozen results


# ---- the manifest


def manifest() -> list[dict]:
    """Return an entry for each file of results: what it is, its command, time, and claims.

    Raises ValueError for a claim that no file holds.
    """
    entries = []
    for notebook in claims.all_claims():
        entries += _figure_entries(notebook)
        entries += _claim_entries(notebook)
    missing = _all_ids() - _held_ids()
    if missing:
        raise ValueError(f"no frozen file holds {sorted(missing)}")
    return entries


def _figure_entries(notebook: str) -> list[dict]:
    """Return an entry for each figure that a notebook draws."""
    entries = []
    for figure in figures_of(notebook):
        entry = {
            "file": f"figures/{figure}.svg",
            "comment": f"drawn by notebooks/{notebook}.ipynb",
            "command": command(notebook),
            "time": time_of(notebook),
        }
        entries.append(entry)
    return entries


def _claim_entries(notebook: str) -> list[dict]:
    """Return an entry for each file of a notebook's frozen claims."""
    entries = []
    for path in stored(notebook):
        file = path.relative_to(paths.ROOT)
        entry = {
            "file": file.as_posix(),
            "comment": "claims of data/claims.yaml, with numbers and verdicts",
            "command": command(notebook),
            "time": time_of(notebook),
            "claims": _ids_in(path),
        }
        entries.append(entry)
    return entries


def _ids_in(path: Path) -> list[str]:
    """Return the ids of the claims that a frozen file holds."""
    content = _read_json(path)
    return [claim["id"] for claim in content["claims"]]


def _held_ids() -> set[tuple[str, str]]:
    """Return (notebook, id) of every claim that some frozen file holds."""
    held = set()
    for notebook in claims.all_claims():
        for path in stored(notebook):
            for name in _ids_in(path):
                held.add((notebook, name))
    return held


def _all_ids() -> set[tuple[str, str]]:
    """Return (notebook, id) of every claim."""
    ids = set()
    for notebook, claims_of_notebook in claims.all_claims().items():
        for name in claims_of_notebook:
            ids.add((notebook, name))
    return ids


def _read_json(path: Path) -> dict:
    text = path.read_text(encoding="utf-8")
    return json.loads(text)


def stored(notebook: str) -> list[Path]:
    """Return the files of a notebook's frozen claims, one for each profile."""
    folder = paths.FROZEN / "claims"
    files = folder.glob(f"{notebook}.*.json")
    return sorted(files)


def command(notebook: str) -> str:
    """Return what computes a notebook's results anew, at the profile of its frozen claims."""
    number, _, _ = notebook.partition("_")
    reproduce = f"make reproduce NB={number}"
    profile = _profile(notebook)
    if profile == "cpu":
        return reproduce
    return f"{reproduce} PROFILE={profile}"


def _profile(notebook: str) -> str:
    """Return the first of claims.PROFILES with which a notebook's claims are frozen, or "cpu"."""
    stored_names = [path.name for path in stored(notebook)]
    for profile in claims.PROFILES:
        if f"{notebook}.{profile}.json" in stored_names:
            return profile
    return "cpu"


def time_of(notebook: str) -> str:
    """Return the time that a notebook states under its title, or else what its results tell."""
    path = paths.NOTEBOOKS / f"{notebook}.ipynb"
    first_cell = _read_json(path)["cells"][0]
    text = "".join(first_cell["source"])
    stated = TIME.search(text)
    if stated is None:
        return recorded_time(notebook)
    return stated[0]


def recorded_time(notebook: str) -> str:
    """Return how long the trainings and searches behind a notebook's figures took.

    Frozen α curves keep these seconds; a notebook without such curves is not timed. What else a
    notebook computes comes on top.
    """
    keys = set()
    for figure in figures_of(notebook):
        record = _read_json(paths.FIGURES / f"{figure}.json")
        keys |= set(record["keys"])
    seconds = 0.0
    for key in keys:
        facts = _read_json(paths.FROZEN / key / "manifest.json").get("facts", {})
        for row in facts.get("seconds", []):
            seconds += row["training"] + row["search"]
    if not seconds:
        return NOT_TIMED
    return f"more than {events.duration(seconds)}, which its curves' trainings and points took"


def figures_of(notebook: str) -> list[str]:
    """Return the names of the committed figures that a notebook draws."""
    names = []
    for path in sorted(paths.FIGURES.glob("*.json")):
        record = _read_json(path)
        if record.get("notebook") == notebook:
            names.append(path.stem)
    return names


def codecheck() -> str:
    """Return the text of codecheck.yml."""
    path = paths.ROOT / "CITATION.cff"
    citation = yaml.safe_load(path.read_text(encoding="utf-8"))
    content = {
        "version": SPEC,
        "paper": {
            "title": citation["title"],
            "reference": path.name,
        },
        "manifest": manifest(),
    }
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=120)
    return HEAD + text


# ---- the tables of docs/checking.md


def manifest_table() -> list[str]:
    """Return a line of Markdown for each notebook: claims, command, time, files."""
    lines = [
        "| notebook | claims | command | time, as it states | figures |",
        "|---|---|---|---|---|",
    ]
    for notebook, claims_of_notebook in claims.all_claims().items():
        number, _, _ = notebook.partition("_")
        cells = [
            f"[{number}](../notebooks/{notebook}.ipynb)",
            str(len(claims_of_notebook)),
            f"`{command(notebook)}`",
            time_of(notebook),
            _figure_links(notebook),
        ]
        lines.append(_line(cells))
    return lines


def _figure_links(notebook: str) -> str:
    """Return numbered links to the figures that a notebook draws."""
    links = []
    for number, figure in enumerate(figures_of(notebook), start=1):
        links.append(f"[{number}](../figures/{figure}.svg)")
    return " ".join(links)


def licence_table() -> list[str]:
    """Return a line of Markdown for each pinned model and data set."""
    lines = ["| name | what | from | licence | fetched |", "|---|---|---|---|---|"]
    for name, asset in assets.ASSETS.items():
        if "-part" in name:  # the rest of the file that stands above it
            continue
        cells = [
            name,
            asset.what,
            f"`{asset.package}` {asset.version}",
            asset.licence,
            "only where it is named" if asset.opt_in else "when first needed",
        ]
        lines.append(_line(cells))
    return lines


def hub_table() -> list[str]:
    """Return a line of Markdown for each model and data set that profiles name by hub id."""
    lines = ["| hub id | commit |", "|---|---|"]
    for name, commit in assets.REVISIONS.items():
        shown = "not pinned"
        if commit:
            shown = f"`{commit[:12]}`"
        lines.append(_line([f"`{name}`", shown]))
    return lines


def searched_table() -> list[str]:
    """Return a line of Markdown for each setting of which several values were tried."""
    lines = ["| paper | what | values | number |", "|---|---|---|---|"]
    for entry in SEARCHED:
        profile = PROFILES[entry.paper]
        cfg = config.load(entry.paper, profile)
        value = _value(cfg, entry.field)
        values, number = _values(value)
        cells = [
            entry.paper,
            f"{entry.what} (`{entry.field}`)",
            values,
            number,
        ]
        lines.append(_line(cells))
    return lines


def set_table() -> list[str]:
    """Return a line of Markdown for each kind of training, with the values of its settings."""
    names = ["paper", "training", *SET]
    rules = ["---"] * len(names)
    lines = [_line(names), "|" + "|".join(rules) + "|"]
    for paper, profile in PROFILES.items():
        cfg = config.load(paper, profile)
        for name in ("sft", "train"):
            training = getattr(cfg, name)
            recipe = training.recipe()  # without what its loss does not know
            values = [str(recipe.get(field, "–")) for field in SET]
            lines.append(_line([paper, name, *values]))
    return lines


def _value(settings, field: str):
    """Return a setting; a dot in its name leads into a part of the settings."""
    for name in field.split("."):
        settings = getattr(settings, name)
    return settings


def _values(value) -> tuple[str, str]:
    """Return the values of a setting in words, and how many there are."""
    if isinstance(value, int):
        return "chosen by the search", str(value)
    number = str(len(value))
    if not isinstance(value, dict):
        return _list(value), number
    named = []
    for name, entry in value.items():
        named.append(f"{name}: {_list(entry)}")
    return _list(named), number


def _list(values) -> str:
    """Return values in one cell of a table."""
    texts = []
    if isinstance(values, dict):
        for name, value in values.items():
            texts.append(f"{name} {value:g}")
        return " ".join(texts)
    for value in values:
        text = str(value)
        if isinstance(value, tuple | list):
            text = " + ".join(map(str, value))
        texts.append(text)
    return ", ".join(texts)


def _line(cells: list[str]) -> str:
    content = " | ".join(cells)
    return f"| {content} |"


TABLES = {
    "manifest": manifest_table,
    "searched": searched_table,
    "set": set_table,
    "licences": licence_table,
    "hub": hub_table,
}


def with_tables(page: str) -> str:
    """Return a page with each of TABLES between its markers.

    Raises ValueError where a table has no place, `<!-- name -->` and `<!-- /name -->`.
    """
    for name, lines in TABLES.items():
        start = f"<!-- {name} -->"
        end = f"<!-- /{name} -->"
        if not page.count(start) == page.count(end) == 1:
            raise ValueError(f"the page needs {start} and {end} once each")
        before, _, rest = page.partition(start)
        _, _, after = rest.partition(end)
        table = "\n".join(lines())
        page = f"{before}{start}\n{table}\n{end}{after}"
    return page


def main() -> None:
    """Write codecheck.yml and the tables of docs/checking.md."""
    argparse.ArgumentParser(
        prog="python -m beyond_dpo.notebook.checking",
        description="Write codecheck.yml and the tables of docs/checking.md.",
    ).parse_args()
    page = paths.ROOT / "docs" / "checking.md"
    write_file(paths.ROOT / "codecheck.yml", codecheck())
    write_file(page, with_tables(page.read_text(encoding="utf-8")))
    print("codecheck.yml and docs/checking.md are up to date")


if __name__ == "__main__":
    main()
