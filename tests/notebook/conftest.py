"""Folders of a project of its own."""

import pytest

from beyond_dpo.machine import paths

FOLDERS = {
    "ROOT": "",
    "NOTEBOOKS": "notebooks",
    "ARTIFACTS": "artifacts",
    "FROZEN": "data/frozen",
    "FIGURES": "figures",
}


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Let this process work in an empty project; return its folder."""
    for name, folder in FOLDERS.items():
        monkeypatch.setattr(paths, name, tmp_path / folder)
    (tmp_path / "notebooks").mkdir()
    return tmp_path


@pytest.fixture
def project(folders):
    """Return the folder of an empty project whose notebooks are really run, which takes seconds."""
    return folders
