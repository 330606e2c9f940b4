"""Small projects of their own for the runner: notebooks, and the command that runs them."""

import json
import os
import subprocess
import sys
import time

import nbformat

from beyond_dpo.machine import paths

PARAMETERS = (
    'profile = "smoke"  # how much\nseed = 0\nlr = 1e-5\nalphas = [0, 0.5]\ntag = "x"\n'
    "limit = None\nquick = True"
)


def notebook(path, *cells, parameters=PARAMETERS, tags=("parameters",)):
    """Write a notebook: a title, the parameters cell if any, then `cells`."""
    nb = nbformat.v4.new_notebook(
        metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}}
    )
    nb.cells = [nbformat.v4.new_markdown_cell("# title")]
    if parameters is not None:
        nb.cells.append(nbformat.v4.new_code_cell(parameters, metadata={"tags": list(tags)}))
    nb.cells += [nbformat.v4.new_code_cell(cell) for cell in cells]
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(nb, path)
    return path


def start(project, *arguments, **more):
    """Start the runner in another folder, with the relative PYTHONPATH of a checkout.

    more: variables of its environment.
    """
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("BEYOND_DPO_")
    } | more
    environment |= {
        "BEYOND_DPO_ROOT": str(project),
        "PYTHONPATH": "lib",
        "JUPYTER_PATH": str(project / "jupyter"),
    }
    environment["TMPDIR"] = str(project / "tmp")
    (project / "tmp").mkdir(exist_ok=True)
    spec = (
        project / "jupyter" / "kernels" / "python3"
    )  # a `python3` that cannot work and is found first
    spec.mkdir(parents=True, exist_ok=True)
    (spec / "kernel.json").write_text(
        json.dumps({"argv": ["/bin/false"], "display_name": "x", "language": "python"})
    )
    command = [sys.executable, "-m", "beyond_dpo.notebook.run", *arguments]
    where = paths.LIBRARY.parent
    return subprocess.Popen(
        command,
        cwd=where,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def wait_for(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.1)
    return condition()


DRAWN = """
import matplotlib.pyplot as plt, pandas as pd
from beyond_dpo.notebook import claims, figures, report
from beyond_dpo.pipeline.artifacts import Artifact
figures.style()
df = pd.DataFrame({"gamma": [0, 1, 2], "r": [0.1, 1, 0.7], "judge": "gold"})
made = Artifact("score", 1, {"seed": seed}, lambda folder: df.to_csv(folder / "s.csv"))
made.get()
fig, ax = plt.subplots()
figures.interpolation(df, ax, y="r", by="judge")
path = figures.save(fig, "expo_fig2_x", data=df, keys=[made.key], stamp="profile smoke")
"""


CLAIM = """
judged = claims.judge("12_expo_drawn", profile, {"rises": (0.9, 0.8, 1.1)}, keys=[made.key])
report.show(judged, "claims")
"""


WRITTEN = """
12_expo_drawn:
  rises: {words: it rises, kind: experiment, paper: 1, source: Fig 2, delta: 1}
"""


def cpu_notebook(project, *cells):
    """Write notebook 12 and its claim. Its profile is cpu, as smoke draws elsewhere anyway."""
    path = notebook(project / "notebooks" / "12_expo_drawn.ipynb", *cells)
    path.write_text(path.read_text().replace('profile = \\"smoke', 'profile = \\"cpu'))
    (project / "data").mkdir()
    (project / "data" / "claims.yaml").write_text(WRITTEN)
    return path
