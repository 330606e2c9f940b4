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
    held = set()
    for notebook in claims.all_claims():
        common = {"command": command(notebook), "time": time_of(notebook)}
        for figure in figures_of(notebook):
            comment = f"drawn by notebooks/{notebook}.ipynb"
            entries.append({"file": f"figures/{figure}.svg", "comment": comment, **common})
        for path in stored(notebook):
            content = json.loads(path.read_text(encoding="utf-8"))
            ids = [row["id"] for row in content["claims"]]
            held |= {(notebook, name) for name in ids}
            file = path.relative_to(paths.ROOT).as_posix()
            comment = "claims of data/claims.yaml, with numbers and verdicts"
            entries.append({"file": file, "comment": comment, **common, "claims": ids})
    missing = set(_all_ids()) - held
    if missing:
        raise ValueError(f"no frozen file holds {sorted(missing)}")
    return entries


def _all_ids() -> list[tuple[str, str]]:
    """Return (notebook, id) of every claim."""
    return [(notebook, name) for notebook, of in claims.all_claims().items() for name in of]


def stored(notebook: str) -> list[Path]:
    """Return the files of a notebook's frozen claims, one for each profile."""
    return sorted((paths.FROZEN / "claims").glob(f"{notebook}.*.json"))


def command(notebook: str) -> str:
    """Return what computes a notebook's results anew, at the profile of its frozen claims."""
    number, _, _ = notebook.partition("_")
    profiles = [path.suffixes[0].removeprefix(".") for path in stored(notebook)]
    profile = next((name for name in claims.PROFILES if name in profiles), "cpu")
    change = "" if profile == "cpu" else f" PROFILE={profile}"
    return f"make reproduce NB={number}{change}"


def time_of(notebook: str) -> str:
    """Return the time that a notebook states under its title, or that it states none."""
    path = paths.NOTEBOOKS / f"{notebook}.ipynb"
    first = json.loads(path.read_text(encoding="utf-8"))["cells"][0]
    stated = TIME.search("".join(first["source"]))
    return stated[0] if stated else NOT_TIMED


def figures_of(notebook: str) -> list[str]:
    """Return the names of the committed figures that a notebook draws."""
    names = []
    for path in sorted(paths.FIGURES.glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        if record.get("notebook") == notebook:
            names.append(path.stem)
    return names


def codecheck() -> str:
    """Return the text of codecheck.yml."""
    citation = yaml.safe_load((paths.ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    content = {
        "version": SPEC,
        "paper": {"title": citation["title"], "reference": "CITATION.cff"},
        "manifest": manifest(),
    }
    return HEAD + yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=120)


# ---- the tables of docs/checking.md


def manifest_table() -> list[str]:
    """Return a line of Markdown for each notebook: claims, command, time, files."""
    lines = [
        "| notebook | claims | command | time, as it states | figures |",
        "|---|---|---|---|---|",
    ]
    for notebook, of in claims.all_claims().items():
        number, _, _ = notebook.partition("_")
        links = [f"[{place}](../figures/{name}.svg)" for place, name in _numbered(notebook)]
        link = f"[{number}](../notebooks/{notebook}.ipynb)"
        cells = [link, str(len(of)), f"`{command(notebook)}`", time_of(notebook), " ".join(links)]
        lines.append(_line(cells))
    return lines


def _numbered(notebook: str) -> list[tuple[int, str]]:
    return list(enumerate(figures_of(notebook), start=1))


def licence_table() -> list[str]:
    """Return a line of Markdown for each pinned model and data set."""
    lines = ["| name | what | from | licence | fetched |", "|---|---|---|---|---|"]
    for name, asset in assets.ASSETS.items():
        if "-part" in name:  # the rest of the file that stands above it
            continue
        fetched = "only where it is named" if asset.opt_in else "when first needed"
        origin = f"`{asset.package}` {asset.version}"
        lines.append(_line([name, asset.what, origin, asset.licence, fetched]))
    return lines


def hub_table() -> list[str]:
    """Return a line of Markdown for each model and data set that profiles name by hub id."""
    lines = ["| hub id | commit |", "|---|---|"]
    for name, commit in assets.REVISIONS.items():
        lines.append(_line([f"`{name}`", f"`{commit[:12]}`" if commit else "not pinned"]))
    return lines


def searched_table() -> list[str]:
    """Return a line of Markdown for each setting of which several values were tried."""
    lines = ["| paper | what | values | number |", "|---|---|---|---|"]
    for entry in SEARCHED:
        value = _value(config.load(entry.paper, PROFILES[entry.paper]), entry.field)
        shown, number = _values(value)
        lines.append(_line([entry.paper, f"{entry.what} (`{entry.field}`)", shown, number]))
    return lines


def set_table() -> list[str]:
    """Return a line of Markdown for each kind of training, with the values of its settings."""
    lines = [_line(["paper", "training", *SET]), "|---" * (len(SET) + 2) + "|"]
    for paper, profile in PROFILES.items():
        cfg = config.load(paper, profile)
        for name in ("sft", "train"):
            recipe = getattr(cfg, name).recipe()  # without what its loss does not know
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
    if isinstance(value, dict):
        value = [f"{name}: {_list(entry)}" for name, entry in value.items()]
    return _list(value), str(len(value))


def _list(values) -> str:
    """Return values in one cell of a table."""
    if isinstance(values, dict):
        return " ".join(f"{name} {value:g}" for name, value in values.items())
    texts = []
    for value in values:
        nested = isinstance(value, tuple | list)
        texts.append(" + ".join(map(str, value)) if nested else str(value))
    return ", ".join(texts)


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


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
        page = "\n".join([before + start, *lines(), end]) + after
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
