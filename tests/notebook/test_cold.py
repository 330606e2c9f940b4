"""Every notebook runs cold at smoke: `make long` runs it, `make test` leaves it out."""

import os
import subprocess
import sys

import nbformat
import pytest

from beyond_dpo.machine import paths
from beyond_dpo.notebook import plan

pytestmark = pytest.mark.long


def test_every_notebook_runs_cold_at_smoke(tmp_path, monkeypatch):
    """`make smoke` into an empty store trains, samples, scores and draws for real.

    Then nothing is left to compute.
    """
    store = {
        "BEYOND_DPO_ARTIFACTS": str(tmp_path / "artifacts"),
        "BEYOND_DPO_FIGURES": str(tmp_path / "figures"),
    }
    command = [sys.executable, "-m", "beyond_dpo.notebook.run", "--all", "--profile", "smoke"]
    env = os.environ | store | {"COMPUTE": "cold"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    drawn = {p.name for p in (tmp_path / "figures").glob("*.svg")}
    committed = {p.name for p in paths.FIGURES.glob("*.svg")}
    assert drawn == committed - {"overview.svg"}  # which is drawn from other figures' numbers
    ran = {p.name for p in (tmp_path / "artifacts" / "runs").glob("*.ipynb")}
    assert {name.split(".")[0] for name in ran} == {p.stem for p in paths.NOTEBOOKS.glob("*.ipynb")}

    monkeypatch.setattr(paths, "ARTIFACTS", tmp_path / "artifacts")
    monkeypatch.setenv("COMPUTE", "cold")
    results = 0
    for path in plan.find([]):
        notebook = nbformat.read(path, as_version=4)
        values = plan.parameters(notebook, path.stem)
        if "profile" in values:
            values["profile"] = "smoke"
        _, named = plan.planned(notebook, values)
        results += len(named)
        assert not [key for artifact in named for key in artifact.missing()], path.stem
    assert results >= 20
