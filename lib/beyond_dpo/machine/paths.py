"""Absolute paths of the project, so that the working directory never matters, and its YAML."""

import os
from pathlib import Path

import yaml


def _folder(variable: str, default: Path) -> Path:
    """Return the folder that an environment variable names, or the default one."""
    folder = os.environ.get(variable)
    if not folder:
        folder = default
    return Path(folder).expanduser().resolve()


MODULE = Path(__file__).resolve()
LIBRARY = MODULE.parents[2]  # for children, where the package is not installed
ROOT = _folder("BEYOND_DPO_ROOT", LIBRARY.parent)
NOTEBOOKS = ROOT / "notebooks"
FIGURES = _folder("BEYOND_DPO_FIGURES", ROOT / "figures")
DATA = ROOT / "data"
PUBLISHED = DATA / "published"  # numbers as printed in the papers
FIXTURES = DATA / "fixtures"  # invented rows for tests and the smoke profile
FROZEN = DATA / "frozen"  # small measured results, committed
ARTIFACTS = _folder("BEYOND_DPO_ARTIFACTS", ROOT / "artifacts")  # everything computed, git-ignored
# Downloaded archives and converted models.
CACHE = _folder("BEYOND_DPO_CACHE", Path("~/.cache/beyond_dpo"))


def read_yaml(path: Path):
    """Return the content of a YAML file, by the parser in C where PyYAML has it.

    It takes a tenth of the time, and settings are read at each start.
    """
    safe_loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    loader = safe_loader(path.read_text(encoding="utf-8"))
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()
