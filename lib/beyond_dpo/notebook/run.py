"""Run notebooks with papermill, strictly: `python -m beyond_dpo.notebook.run 11 --profile cpu -p
seed=1`.

papermill alone lets a misspelt parameter pass with exit 0. Here it is refused, as are wrong types
and parameters that papermill cannot see. What the stages do is shown while it happens, and no
process that was started outlives the run.
"""

import argparse
import ast
import contextlib
import ctypes
import difflib
import json
import logging
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from beyond_dpo import events
from beyond_dpo.files import write_file
from beyond_dpo.machine import paths
from beyond_dpo.notebook import progress
from beyond_dpo.notebook.kernels import Kernel
from beyond_dpo.notebook.parameters import RENEW
from beyond_dpo.pipeline import artifacts, config, needs

CELLS = (
    "papermill execution ExecuteTime collapsed heading_collapsed hidden scrolled".split()
)  # that each run changes
# language_info stays: JupyterLab writes it whenever a notebook is saved, and nbconvert needs its
# file extension.
KEYS = [f"metadata.{k}" for k in ("papermill", "widgets")] + [f"cell.metadata.{k}" for k in CELLS]
# Recomputed from published tables, replayed or exact: seconds each, without any model.
QUICK = ("18", "19", "21", "22", "23")
RESUME = "the same command goes on from there"
WIDGET = "application/vnd.jupyter.widget-view+json"  # lives in the kernel that made it


class Refused(ValueError):
    """Say why nothing is run."""


def find(names: list[str]) -> list[Path]:
    """Return the notebooks meant by number prefix, stem or path; without names all.

    Of all, the quick ones come first and the scoreboard of all last.
    Raises Refused for a name that fits none or several.
    """
    known = sorted(paths.NOTEBOOKS.glob("*.ipynb"), key=_turn)
    found = [] if names else known
    for name in names:
        fits = [path for path in known if name == path.stem or path.name.startswith(f"{name}_")]
        fits = [Path(name).resolve()] if name.endswith(".ipynb") and Path(name).is_file() else fits
        if len(fits) != 1:
            near = difflib.get_close_matches(name, [path.stem for path in known], n=3, cutoff=0)
            raise Refused(
                f"{name}: fits {len(fits)} notebooks of {paths.NOTEBOOKS}; nearest: "
                f"{', '.join(near)}"
            )
        found += fits
    if not found:
        raise Refused(f"no notebook in {paths.NOTEBOOKS}")
    return found


def _turn(path: Path) -> tuple[int, str]:
    """Return the place of a notebook among all of them, to sort by."""
    number = path.name[:2]
    if number in QUICK:
        return 0, path.name
    return (2 if number == "00" else 1), path.name


def parameters(nb, name: str) -> dict:
    """Return the parameters that a notebook declares, with their defaults, from the cell tagged
    `parameters`.

    Raises Refused for a cell that holds anything but `name = literal`, once each, or a line that
    papermill cannot see.
    """
    from papermill.translators import PythonTranslator

    declared: dict = {}
    for cell in [cell for cell in nb.cells if "parameters" in cell.metadata.get("tags", [])]:
        try:
            body = ast.parse(cell.source).body
        except SyntaxError as error:
            raise Refused(f"{name}: parameters cell, line {error.lineno}: {error.msg}") from None
        for node in body:
            targets = getattr(node, "targets", [getattr(node, "target", None)])
            try:  # derived values would go stale, and papermill passes tuples and sets on as text
                value = ast.literal_eval(node.value)
                fine = (
                    len(targets) == 1
                    and targets[0].id not in declared
                    and json.loads(json.dumps(value)) == value
                )
            except (ValueError, TypeError, AttributeError):
                fine = False
            if not fine:
                what = (
                    "is not `name = value` with None or a bool, int, float, str, list or dict, "
                    "each name once"
                )
                raise Refused(
                    f"{name}: parameters cell, line {node.lineno}: `{ast.unparse(node)}` {what}"
                )
            declared[targets[0].id] = value
        logging.getLogger("papermill").setLevel(logging.ERROR)
        if hidden := sorted(set(declared) - {seen.name for seen in PythonTranslator.inspect(cell)}):
            advice = "without an annotation and with one '=' in the line, its comment included"
            raise Refused(
                f"{name}: papermill cannot see {', '.join(hidden)}; write `name = value` {advice}"
            )
    return declared


def check(name: str, declared: dict, given: dict[str, str]) -> dict:
    """Return the `given` texts as values of the declared types: Python literals, else text; an int
    may be a float.

    Raises Refused for an unknown name, with the nearest one, and for a wrong type.
    """
    values = {}
    for key, text in given.items():
        if key not in declared:
            near = difflib.get_close_matches(key, declared, n=1, cutoff=0)
            hint = (
                f"did you mean '{near[0]}'? It declares {', '.join(declared)}"
                if near
                else "it declares none"
            )
            raise Refused(f"{name}: no parameter '{key}'; {hint}")
        default, value = declared[key], text
        with contextlib.suppress(ValueError, SyntaxError):
            value = ast.literal_eval(text)
        value = text if isinstance(default, str) and not isinstance(value, str) else value
        if not _fits(default, value):
            raise Refused(
                f"{name}: {key}={text} is a {type(value).__name__}, unlike its default {default!r}"
            )
        values[key] = (
            list(value)
            if isinstance(value, tuple)
            else float(value)
            if type(default) is float
            else value
        )
    return values


def _fits(default, value) -> bool:
    if isinstance(default, list):
        return isinstance(value, list | tuple) and all(
            any(_fits(d, v) for d in default or [None]) for v in value
        )
    return (
        default is None
        or type(value) is type(default)
        or (type(default) is float and type(value) is int)
    )


def clean(nb) -> None:
    """Drop what changes with each run, but outputs and counts. Doing it again changes nothing."""
    from nbstripout import strip_output

    strip_output(nb, keep_output=True, keep_count=True, keep_id=False, extra_keys=KEYS)
    for cell in nb.cells:
        if "outputs" in cell:
            cell.outputs = [out for out in cell.outputs if WIDGET not in out.get("data", {})]


def execute(path: Path, nb, values: dict, watch: progress.Watch, copy: Path, kernel: Kernel) -> str:
    """Run the notebook at `path` in the kernel, write the executed copy, return why it failed (and
    end the kernel).
    """
    import papermill

    at = 0  # the cell that runs, in the notebook's own count
    watch.cell = "starting"  # of the kernel, which takes seconds

    def start(cell, cell_index):
        nonlocal at
        at += "injected-parameters" not in cell.metadata.get("tags", [])
        watch.cell = f"cell {at} of {len(nb.cells)}"

    how = {"kernel_name": "python3", "language": "python", "km": kernel, "on_cell_start": start}
    try:
        kernel.prepare(path.parent, copy.with_suffix(".log"))
        papermill.execute_notebook(
            path, copy, values, **how, progress_bar=False, coalesce_streams=True
        )
        return ""
    except papermill.PapermillExecutionError as error:
        text = events.UNPRINTABLE.sub(
            "", "\n".join(error.traceback) or f"{error.ename}: {error.evalue}"
        )
        reason = "\n".join(text.splitlines()[-30:])
    except Exception as error:
        reason = (
            f"{type(error).__name__}: {error}\nIts processes held {watch.peak / 2**30:.1f} GiB; "
            "out of memory?"
        )
    kernel.end()
    return f"{watch.cell}\n\n{nb.cells[max(at, 1) - 1].source}\n\n{reason}\n\nexecuted copy: {copy}"


def write_back(path: Path, nb, copy: Path) -> None:
    """Put the outputs and counts of the executed copy into the notebook at `path`, cleaned; nothing
    else changes.
    """
    import nbformat

    for cell, done in zip(nb.cells, nbformat.read(copy, as_version=4).cells, strict=True):
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = done.outputs, done.execution_count
    clean(nb)
    write_file(path, nbformat.writes(nb) + "\n")


def freeze(since: float) -> list[str]:
    """Copy into data/frozen the claims recorded since then, and the artifacts named by them and by
    figures drawn since.

    since: seconds since the epoch. Returns the keys. Raises as artifacts.freeze().
    """
    claims = [
        p
        for p in (paths.ARTIFACTS / "runs" / "claims").glob("*.json")
        if p.stat().st_mtime >= since
    ]
    records = claims + [p for p in paths.FIGURES.glob("*.json") if p.stat().st_mtime >= since]
    keys = sorted(
        {key for path in records for key in json.loads(path.read_text(encoding="utf-8"))["keys"]}
    )
    for key in keys:
        artifacts.freeze(key)
    for path in claims:
        write_file(paths.FROZEN / "claims" / path.name, path.read_bytes())
    return keys


def main(arguments: list[str] | None = None) -> int:
    """Run what the command line names; return 0, 1 if a notebook failed, 2 if one was refused, 130
    if interrupted.

    A Ctrl-C that is ignored since before the start (nohup, a background job of a script) stays so;
    SIGTERM does not.
    """
    events.printable()
    before = signal.signal(
        signal.SIGTERM, signal.default_int_handler
    )  # a batch system's stop is a Ctrl-C
    try:
        return _main(arguments)
    except KeyboardInterrupt:
        events.say(f"interrupted; {RESUME}")
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)


def _main(arguments: list[str] | None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m beyond_dpo.notebook.run", description=__doc__.splitlines()[0]
    )
    parser.add_argument("notebooks", nargs="*", help="number prefix, stem or path")
    parser.add_argument("--all", action="store_true", help="every notebook")
    parser.add_argument("--profile", help="smoke, cpu, gpu or paper; short for -p profile=...")
    parser.add_argument(
        "-p",
        dest="given",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="set a parameter",
    )
    parser.add_argument(
        "--in-place",
        action="store_true",
        help="run the defaults, write the outputs into the notebook",
    )
    parser.add_argument(
        "--freeze", action="store_true", help="copy the results behind its figures to data/frozen"
    )
    parser.add_argument("--force", action="store_true", help="run also what needs a larger machine")
    parser.add_argument(
        "--dry-run", action="store_true", help="say what would run and what it needs"
    )
    options = parser.parse_args(arguments)
    try:
        with events.slow("planning: looking at what is there for each notebook"):
            plan = _plan(options)
    except Refused as reason:
        events.say(f"refused: {reason}")
        return 2
    if options.dry_run:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # asks nobody
        for path, nb, values, _ in plan:
            head = " ".join([path.stem, *(f"{key}={value!r}" for key, value in values.items())])
            with events.slow(f"looking at what {path.stem} would run"):
                lines = progress.said(nb, parameters(nb, path.stem) | values)
            if not events.show("\n  ".join([head, *lines])):
                return 1
        return 0
    package = str(paths.LIBRARY)  # the kernel runs in another folder, with this very code
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [package, *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    os.environ |= {
        "TQDM_DISABLE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",
    }
    os.environ["PYTHONUTF8"] = "1"  # of the kernel, whatever the locale
    os.environ["MPLBACKEND"] = (
        "module://matplotlib_inline.backend_inline"  # with a cluster's Agg no figure is shown
    )
    os.environ.setdefault(
        "OMP_NUM_THREADS", str(len(os.sched_getaffinity(0)))
    )  # of this job, not of the host
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(
            36, 1
        )  # PR_SET_CHILD_SUBREAPER: orphans become ours, so that we can end them
    changed = any(set(values) - {"profile"} for _, _, values, _ in plan)
    renew = (
        options.in_place or options.freeze
    )  # what is drawn and claimed now is what will be committed
    if not renew or any(profile == "smoke" for *_, profile in plan):  # no figure of the project
        os.environ.setdefault("BEYOND_DPO_FIGURES", str(paths.ARTIFACTS / "figures"))
    os.environ |= {"BEYOND_DPO_CLAIMS": "trials"} if changed else {}
    if renew:
        os.environ[RENEW] = "1"
    logging.getLogger("asyncio").setLevel(
        logging.CRITICAL
    )  # of an interrupt it tells tasks that nobody asks for
    rows, kernel = [], Kernel()
    try:
        for i, notebook in enumerate(plan, 1):
            rows.append(_run(f"[{i}/{len(plan)}] {notebook[0].stem}", *notebook, options, kernel))
            if rows[-1]["status"] == "interrupted":
                return 130
            kernel = kernel if kernel.has_kernel else Kernel()
    finally:
        kernel.end()
    import pandas as pd

    total = {"notebook": "all", "peak GiB": max(row["peak GiB"] for row in rows), "status": ""}
    total |= {name: sum(row[name] for row in rows) for name in ("seconds", "computed", "found")}
    events.show(pd.DataFrame([*rows, total] if rows[1:] else rows).to_string(index=False))
    return int(any(row["status"] != "ok" for row in rows))


def _plan(options) -> list[tuple]:
    """Check all notebooks before the first one runs."""
    if bool(options.notebooks) == options.all:
        raise Refused("name notebooks, or give --all")
    given = dict(pair.partition("=")[::2] for pair in options.given)
    given |= {"profile": options.profile} if options.profile else {}
    if options.in_place and given:
        raise Refused("--in-place runs the values written in the parameters cell; edit them there")
    if options.freeze and options.given:
        raise Refused("--freeze keeps what a profile gives by itself: leave -p away")
    _check_mode()
    plan = []
    for path in find(options.notebooks):
        nb = _opened(path)
        declared = parameters(nb, path.stem)
        drop = (
            {"profile"} if options.all and "profile" not in declared else set()
        )  # it only shows what others found
        values = check(
            path.stem, declared, {key: text for key, text in given.items() if key not in drop}
        )
        if (profile := (declared | values).get("profile")) not in (
            None,
            *config.PROFILES,
        ):  # it names files
            raise Refused(
                f"{path.stem}: profile {profile!r} is none of {', '.join(config.PROFILES)}"
            )
        if options.freeze and profile == "smoke":
            raise Refused(
                f"{path.stem}: --freeze keeps results, and those of profile smoke mean nothing; "
                "use cpu"
            )
        if not options.dry_run:  # which says so for each notebook
            _check_setup(path.stem, nb, declared | values, options)
        plan.append((path, nb, values, profile))
    return plan


def _opened(path: Path):
    import nbformat

    try:
        return nbformat.read(path, as_version=4)
    except (OSError, ValueError, AttributeError) as error:  # the last for JSON that is no notebook
        why = " ".join(str(error).split())[:200]
        raise Refused(
            f"{path} cannot be read as a notebook ({type(error).__name__}: {why})"
        ) from None


def _check_mode() -> None:
    """Refuse a COMPUTE with which no notebook could run."""
    try:
        mode = artifacts.compute_mode()
    except ValueError as error:
        raise Refused(str(error)) from None
    if mode == "plan":
        raise Refused(
            "COMPUTE=plan finds and computes nothing; to see what would run, use --dry-run"
        )


def _check_setup(name: str, nb, values: dict, options) -> None:
    """Refuse what a notebook's own set-up would refuse, and a profile that this machine is too
    small for.

    On any machine a notebook shows results that are there.
    """
    try:
        cfg = progress.configuration(nb, values)
    except ValueError as error:
        raise Refused(f"{name}: {error}") from None
    if cfg is None or options.force or os.environ.get("COMPUTE") == "never":
        return
    try:
        needs.check(cfg)
    except config.ConfigError as lack:
        if progress.lacks_results(nb, values):
            raise Refused(f"{name}: {lack} (--force runs it all the same)") from None
    except ValueError as error:  # of the variables that describe a cluster
        raise Refused(f"{name}: {error}") from None


@contextlib.contextmanager
def _reports(folder: Path) -> Iterator[Path | None]:
    """Yield a file that the processes of a notebook find by BEYOND_DPO_PROGRESS; None where there
    can be none.
    """
    try:
        file = tempfile.NamedTemporaryFile(suffix=".jsonl", dir=folder)
    except OSError:  # a full disk, say: the notebook runs, it only cannot be watched
        os.environ["BEYOND_DPO_PROGRESS"] = ""
        yield None
        return
    with file:
        os.environ["BEYOND_DPO_PROGRESS"] = file.name
        yield Path(file.name)


def _run(
    title: str, path: Path, nb, values: dict, profile: str | None, options, kernel: Kernel
) -> dict:
    folder = paths.ARTIFACTS / "runs"
    copy = folder / (f"{path.stem}.{profile}.ipynb" if profile else path.name)
    watch, began = progress.Watch(title), time.time()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _reports(folder) as reports:
            watch.reports = reports
            with watch:
                note = execute(path, nb, values, watch, copy, kernel)
        status = "failed" if note else "ok"
        if options.in_place and not note:
            write_back(path, nb, copy)
        if options.freeze and not note:
            note = (
                "frozen: "
                f"{', '.join(freeze(began - 1)) or 'nothing, no figure or claim names a key'}"
            )
    except KeyboardInterrupt:
        status, note = (
            "interrupted",
            f"{watch.cell or 'before the first cell'}, executed copy: {copy}; {RESUME}",
        )
    except (ValueError, RuntimeError) as error:  # too big to freeze, damaged, nowhere
        status, note = "failed", f"the notebook ran, but its results are not stored: {error}"
    except OSError as error:  # nowhere to write
        status, note = "failed", f"{type(error).__name__}: {error}"
    seconds = time.time() - began
    events.say(f"{title} · {status} · {events.duration(seconds)}" + f" · {note}" * bool(note))
    row = {
        "notebook": path.stem,
        "seconds": round(seconds),
        "peak GiB": round(watch.peak / 2**30, 1),
    }
    return row | {
        "computed": len(watch.computed),
        "found": len(watch.found - watch.computed),
        "status": status,
    }


if __name__ == "__main__":
    sys.exit(main())
