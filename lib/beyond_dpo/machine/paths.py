"""Absolute paths of the project, so that the working directory never matters."""

import os
from pathlib import Path


def _folder(variable: str, default: Path) -> Path:
    return Path(os.environ.get(variable) or default).expanduser().resolve()


LIBRARY = Path(__file__).resolve().parents[2]  # for children, where the package is not installed
ROOT = _folder("BEYOND_DPO_ROOT", LIBRARY.parent)
NOTEBOOKS = ROOT / "notebooks"
FIGURES = _folder("BEYOND_DPO_FIGURES", ROOT / "figures")
PUBLISHED = ROOT / "data" / "published"  # numbers as printed in the papers
FIXTURES = ROOT / "data" / "fixtures"  # invented rows for tests and the smoke profile
FROZEN = ROOT / "data" / "frozen"  # small measured results, committed
ARTIFACTS = _folder("BEYOND_DPO_ARTIFACTS", ROOT / "artifacts")  # everything computed, git-ignored
CACHE = _folder(
    "BEYOND_DPO_CACHE", Path("~/.cache/beyond_dpo")
)  # downloaded archives, converted models
