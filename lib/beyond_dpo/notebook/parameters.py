"""Tell whether what is drawn now may take the place of what is committed.

What comes of other parameters is a trial, and what is computed anew may be of another machine or
precision: neither must take the place of a committed figure or claim, whoever started the kernel
(JupyterLab, papermill, the runner). So the functions that write ask here.
"""

import ast
import json
import os
import sys
from pathlib import Path

from beyond_dpo.machine import paths

# set by `run --in-place` and `run --freeze`: what is drawn is what will be committed
RENEW = "BEYOND_DPO_RENEW"


def changed(notebook: str) -> dict[str, str]:
    """Return {parameter: "parameter = value"} for each that differs from what is committed.

    notebook: the stem of its file name. Empty outside of a notebook, for an unknown notebook, and
    where the runner renews what is committed.
    """
    namespace = _namespace()
    if namespace is None or os.environ.get(RENEW):
        return {}
    differences = {}
    for name, before in committed(notebook).items():
        if name not in namespace:
            differences[name] = f"{name} is not set"
        elif _plain(namespace[name]) != before:
            differences[name] = f"{name} = {namespace[name]!r:.60}"
    return differences


def anew() -> bool:
    """Say whether all results are computed anew (COMPUTE=cold), and not to be committed."""
    return os.environ.get("COMPUTE") == "cold" and not os.environ.get(RENEW)


def committed(notebook: str) -> dict:
    """Return the parameters with which a notebook's committed figures were drawn, else those of its
    file.

    The figures know better: JupyterLab saves an edited parameters cell into the notebook's file by
    itself.
    """
    values = declared(notebook)
    for path in sorted((paths.ROOT / "figures").glob("*.json")):
        record = _record(path)
        if record.get("notebook") == notebook:
            return values | record.get("parameters", {})
    return values


def declared(notebook: str) -> dict:
    """Return the literals of the parameters cell of a notebook's file; empty if there is none."""
    path = paths.NOTEBOOKS / f"{notebook}.ipynb"
    if not path.is_file():
        return {}
    values = {}
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        if "parameters" in cell["metadata"].get("tags", []):
            values |= _literals("".join(cell["source"]))
    return values


def current(notebook: str) -> dict:
    """Return the values that the running notebook has now for the parameters of its file; empty
    outside of one.
    """
    namespace = _namespace()
    if namespace is None:
        return {}
    return {name: _plain(namespace[name]) for name in declared(notebook) if name in namespace}


def notebook_of(figure: str) -> str:
    """Return the stem of the notebook that draws a figure; "" if none is known to."""
    owner = _record(paths.ROOT / "figures" / f"{figure}.json").get("notebook")
    if owner:
        return owner
    written = (
        json.dumps(json.dumps(figure)).strip('"').encode()
    )  # its name, quoted in a cell, as JSON holds it
    for path in sorted(paths.NOTEBOOKS.glob("*.ipynb")):
        if written in path.read_bytes():
            return path.stem
    return ""


def _namespace() -> dict | None:
    """Return the names of the notebook that runs; None in a plain Python process."""
    if "IPython" not in sys.modules:
        return None
    from IPython import get_ipython

    shell = get_ipython()
    return None if shell is None else shell.user_ns


def _literals(source: str) -> dict:
    """Return {name: value} of the lines `name = literal`; other lines are the runner's to
    refuse.
    """
    values = {}
    for node in ast.parse(source).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        try:
            values[targets[0].id] = _plain(ast.literal_eval(node.value))
        except (AttributeError, ValueError):
            continue
    return values


def _plain(value):
    """Return a value as JSON gives it back, where 1 and 1.0 are equal; its text where it is no
    JSON.
    """
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError):
        return repr(value)


def _record(path: Path) -> dict:
    """Return what stands beside a figure; empty for a file that is not there or not whole."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}
