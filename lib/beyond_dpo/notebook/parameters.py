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

# The variable that `run --in-place` and `run --freeze` set: what is drawn will be committed.
RENEW = "BEYOND_DPO_RENEW"


def changed(notebook: str) -> dict[str, str]:
    """Return {parameter: "parameter = value"} for each that differs from what is committed.

    Empty outside of a notebook, for an unknown notebook, and where the runner renews what is
    committed.

    Args:
        notebook: the stem of its file name.
    """
    namespace = _namespace()
    if namespace is None or os.environ.get(RENEW):
        return {}
    differences = {}
    for name, committed_value in committed(notebook).items():
        if name not in namespace:
            differences[name] = f"{name} is not set"
        elif _plain(namespace[name]) != committed_value:
            differences[name] = f"{name} = {namespace[name]!r:.60}"
    return differences


def anew() -> bool:
    """Return whether all results are computed anew (COMPUTE=cold), and not to be committed."""
    cold = os.environ.get("COMPUTE") == "cold"
    return cold and not os.environ.get(RENEW)


def committed(notebook: str) -> dict:
    """Return the parameters of a notebook's committed figures, or those of its file without any.

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
    notebook_json = json.loads(path.read_text(encoding="utf-8"))
    for cell in notebook_json["cells"]:
        if "parameters" in cell["metadata"].get("tags", []):
            source = "".join(cell["source"])
            values.update(_literals(source))
    return values


def current(notebook: str) -> dict:
    """Return the running notebook's values of its file's parameters; empty outside of one."""
    namespace = _namespace()
    if namespace is None:
        return {}
    return {name: _plain(namespace[name]) for name in declared(notebook) if name in namespace}


def notebook_of(figure: str) -> str:
    """Return the stem of the notebook that draws a figure; "" if none is known to."""
    record = _record(paths.ROOT / "figures" / f"{figure}.json")
    if record.get("notebook"):
        return record["notebook"]
    # A cell has the figure's name in quotes, which the notebook's JSON escapes.
    quoted = json.dumps(figure)
    escaped = json.dumps(quoted).strip('"')
    for path in sorted(paths.NOTEBOOKS.glob("*.ipynb")):
        if escaped.encode() in path.read_bytes():
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
    """Return {name: value} of the lines `name = literal`; the runner refuses other lines."""
    values = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign):
            target = node.targets[0]
        else:
            target = getattr(node, "target", None)  # of `name: type = literal`
        try:
            values[target.id] = _plain(ast.literal_eval(node.value))
        except (AttributeError, ValueError):
            continue
    return values


def _plain(value):
    """Return a value as JSON gives it back, or its text where JSON cannot hold it."""
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
