"""Every notebook runs cold at smoke. The longest test: a file of its own, with which conftest.py begins."""

import os
import subprocess
import sys

from beyond_dpo import paths


def test_every_notebook_runs_cold_at_smoke(tmp_path):
    """`make smoke` into an empty store: real training, sampling, scoring, figures; then again, computing nothing."""
    store = {"BEYOND_DPO_ARTIFACTS": str(tmp_path / "artifacts"), "BEYOND_DPO_FIGURES": str(tmp_path / "figures")}
    command = [sys.executable, "-m", "beyond_dpo.run", "--all", "--profile", "smoke"]
    for mode in ("cold", "never"):
        env = os.environ | store | {"COMPUTE": mode}
        done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert {p.name for p in (tmp_path / "figures").glob("*.svg")} == {p.name for p in paths.FIGURES.glob("*.svg")}
    ran = {p.name for p in (tmp_path / "artifacts" / "runs").glob("*.ipynb")}
    assert {name.split(".")[0] for name in ran} == {p.stem for p in paths.NOTEBOOKS.glob("*.ipynb")}
