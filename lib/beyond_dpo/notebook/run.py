"""Run notebooks with papermill: `python -m beyond_dpo.notebook.run 11 --profile cpu -p seed=1`.

What a notebook will ask for is computed first, in this process, which keeps engines alive from one
notebook to the next and shows how far it all is. Then papermill executes the notebook in a fresh
kernel, which finds everything. No process that was started outlives the run.
"""

import argparse
import contextlib
import ctypes
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from beyond_dpo import events
from beyond_dpo.files import write_file
from beyond_dpo.machine import paths
from beyond_dpo.notebook import kernels, plan
from beyond_dpo.notebook.parameters import RENEW
from beyond_dpo.notebook.plan import Plan, Refused
from beyond_dpo.notebook.progress import Progress, Timetable
from beyond_dpo.pipeline import artifacts

# What each run changes in a cell's metadata.
OF_A_RUN = (
    "papermill",
    "execution",
    "ExecuteTime",
    "collapsed",
    "heading_collapsed",
    "hidden",
    "scrolled",
)
# language_info stays: JupyterLab writes it whenever a notebook is saved, and nbconvert needs its
# file extension.
CLEANED = ["metadata.papermill", "metadata.widgets", *(f"cell.metadata.{key}" for key in OF_A_RUN)]
RESUME = "the same command goes on from there"
WIDGET = "application/vnd.jupyter.widget-view+json"  # lives in the kernel that made it
PR_SET_CHILD_SUBREAPER = 36  # of prctl: orphans below this process become its own children


def clean(notebook) -> None:
    """Drop what changes with each run, but outputs and counts; doing it again changes nothing."""
    from nbstripout import strip_output

    strip_output(notebook, keep_output=True, keep_count=True, keep_id=True, extra_keys=CLEANED)
    for cell in notebook.cells:
        if "outputs" in cell:
            cell.outputs = [out for out in cell.outputs if WIDGET not in out.get("data", {})]


def compute(one: Plan) -> None:
    """Compute in this process what a notebook will ask for and is not there.

    Raises MissingArtifact under COMPUTE=never, and what the work raises.
    """
    for result in one.results:
        result.get()


def execute(one: Plan, copy: Path, progress: Progress) -> None:
    """Execute the notebook in a fresh kernel, and write the executed copy.

    Raises PapermillExecutionError if a cell fails.
    """
    import papermill

    progress.executes("starting a kernel")  # which takes seconds
    number = 0  # of the cell that runs, in the notebook's own count

    def begin(cell, cell_index):
        nonlocal number
        if "injected-parameters" not in cell.metadata.get("tags", []):
            number += 1
        progress.executes(f"cell {number} of {len(one.notebook.cells)}")

    papermill.execute_notebook(
        one.path,
        copy,
        one.changes,
        cwd=one.path.parent,
        kernel_name="python3",
        language="python",
        kernel_manager_class=kernels.OwnKernelManager,
        extra_arguments=kernels.options(copy.with_suffix(".log")),
        on_cell_start=begin,
        progress_bar=False,
        coalesce_streams=True,
    )


def write_back(one: Plan, copy: Path) -> None:
    """Put outputs and counts of the executed copy into the notebook itself; nothing else changes.

    They are cleaned before.
    """
    import nbformat

    executed = nbformat.read(copy, as_version=4)
    for cell, done in zip(one.notebook.cells, executed.cells, strict=True):
        if cell.cell_type == "code":
            cell.outputs = done.outputs
            cell.execution_count = done.execution_count
    clean(one.notebook)
    write_file(one.path, nbformat.writes(one.notebook) + "\n")


def freeze(since: float) -> list[str]:
    """Copy into data/frozen the claims recorded since then, and the artifacts behind them.

    Those are named by the claims, and by the figures drawn since. since: seconds since the epoch.
    Returns the keys. Raises as artifacts.freeze().
    """
    claims = _changed_since(since, paths.ARTIFACTS / "runs" / "claims")
    records = claims + _changed_since(since, paths.FIGURES)
    keys: set[str] = set()
    for path in records:
        keys.update(json.loads(path.read_text(encoding="utf-8"))["keys"])
    for key in sorted(keys):
        artifacts.freeze(key)
    for path in claims:
        write_file(paths.FROZEN / "claims" / path.name, path.read_bytes())
    return sorted(keys)


def _changed_since(since: float, folder: Path) -> list[Path]:
    return [path for path in folder.glob("*.json") if path.stat().st_mtime >= since]


def main(arguments: list[str] | None = None) -> int:
    """Run what the command line names.

    Returns 0, 1 if a notebook failed, 2 if one was refused, 130 if interrupted. A Ctrl-C that is
    ignored since before the start (nohup, a background job of a script) stays so; SIGTERM does not.
    """
    events.printable()
    # nbformat imports jsonschema, that a grammar of addresses, which takes a second and is not used
    sys.modules.setdefault("rfc3987_syntax", None)
    # a batch system's stop is a Ctrl-C
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return _main(_options(arguments))
    except KeyboardInterrupt:
        events.say(f"interrupted; {RESUME}")
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m beyond_dpo.notebook.run", description=__doc__.splitlines()[0]
    )
    add = parser.add_argument
    add("notebooks", nargs="*", help="number prefix, stem or path")
    add("--all", action="store_true", help="every notebook")
    add("--profile", help="smoke, cpu, night (ExPO), gpu or paper; short for -p profile=...")
    add(
        "-p",
        dest="given",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="set a parameter",
    )
    add(
        "--in-place",
        action="store_true",
        help="run the defaults, write the outputs into the notebook",
    )
    add("--freeze", action="store_true", help="copy the results behind its figures to data/frozen")
    add("--force", action="store_true", help="run also what needs a larger machine")
    add("--dry-run", action="store_true", help="say what would run and what it needs")
    return parser.parse_args(arguments)


def _main(options: argparse.Namespace) -> int:
    try:
        with events.slow("planning: looking at what is there for each notebook"):
            plans = plan.plan(options)
    except Refused as reason:
        events.say(f"refused: {reason}")
        return 2
    if options.dry_run:
        return _describe(plans)
    _prepare(plans, options)
    try:
        rows = _run_all(plans, options)
    finally:
        _end()
    if any(row["status"] == "interrupted" for row in rows):
        return 130
    _show_table(rows)
    return int(any(row["status"] != "ok" for row in rows))


def _describe(plans: list[Plan]) -> int:
    """Say what would run; return the exit status."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # asks nobody
    for one in plans:
        changes = [f"{key}={value!r}" for key, value in one.changes.items()]
        with events.slow(f"looking at what {one.name} would run"):
            lines = plan.described(one.notebook, one.parameters)
        if not events.show("\n  ".join([" ".join([one.name, *changes]), *lines])):
            return 1
    return 0


def _prepare(plans: list[Plan], options: argparse.Namespace) -> None:
    """Set what this process, its kernels and all their children find in the environment."""
    search = [str(paths.LIBRARY)]  # the kernel runs in another folder, with this very code
    if os.environ.get("PYTHONPATH"):
        search.append(os.environ["PYTHONPATH"])
    os.environ["PYTHONPATH"] = os.pathsep.join(search)
    os.environ["PYTHONUTF8"] = "1"  # of the kernel, whatever the locale
    os.environ["TQDM_DISABLE"] = "1"  # the runner shows how far it is
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["PYDEVD_DISABLE_FILE_VALIDATION"] = "1"
    # with a cluster's Agg no figure is shown
    os.environ["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"
    # of this job, not of the host
    os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))
    # only what is drawn and claimed by a rendering or a freeze will be committed
    renew = options.in_place or options.freeze
    if renew:
        os.environ[RENEW] = "1"
    if not renew or any(one.profile == "smoke" for one in plans):  # no figure of the project
        os.environ.setdefault("BEYOND_DPO_FIGURES", str(paths.ARTIFACTS / "figures"))
    if any(set(one.changes) - {"profile"} for one in plans):
        os.environ["BEYOND_DPO_CLAIMS"] = "trials"
    # of an interrupt it tells tasks that nobody asks for
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    logging.getLogger("papermill").setLevel(logging.CRITICAL)
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)  # so that we can end orphans


def _end() -> None:
    """End the living engines, which close what they opened, and then whatever else is left."""
    workers = sys.modules.get("beyond_dpo.machine.workers")
    if workers is not None:
        workers.close()
    kernels.end_children()


def _run_all(plans: list[Plan], options: argparse.Namespace) -> list[dict]:
    """Run one notebook after the other, until one is interrupted; return a row about each."""
    rows = []
    progress = Progress(Timetable(_missing(plans)))
    with events.listening(progress.hear):
        for number, one in enumerate(plans, 1):
            progress.begin(f"[{number}/{len(plans)}] {one.name}")
            rows.append(_run(one, options, progress))
            if rows[-1]["status"] == "interrupted":
                break
    return rows


def _missing(plans: list[Plan]) -> dict[str, artifacts.Artifact]:
    """Return {key: artifact} of what the notebooks will compute, as far as they say beforehand."""
    missing: dict[str, artifacts.Artifact] = {}
    with events.slow("planning: what is missing"):
        for one in plans:
            with contextlib.suppress(Exception):  # it will be told when it is run
                for result in one.results:
                    missing |= result.missing()
    return missing


def _run(one: Plan, options: argparse.Namespace, progress: Progress) -> dict:
    """Compute what a notebook needs, execute it, and return a row about it."""
    folder = paths.ARTIFACTS.absolute() / "runs"
    copy = folder / (f"{one.name}.{one.profile}.ipynb" if one.profile else one.path.name)
    began = time.time()
    status, note = "failed", ""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _log_file(copy.with_suffix(".log")):
            note = _fail(one, copy, progress)
        if not note:
            note = _keep(one, copy, options, began)
            status = "ok"
    except KeyboardInterrupt:
        where = progress.cell or "before the first cell"
        status, note = "interrupted", f"{where}, executed copy: {copy}; {RESUME}"
    except (ValueError, RuntimeError) as error:  # too big to freeze, damaged, nowhere
        note = f"the notebook ran, but its results are not stored: {error}"
    except OSError as error:  # nowhere to write
        note = f"{type(error).__name__}: {error}"
    seconds = time.time() - began
    progress.clear()
    words = [progress.title, status, events.duration(seconds)]
    if note:
        words.append(note)
    events.say(" · ".join(words))
    return {
        "notebook": one.name,
        "seconds": round(seconds),
        "peak GiB": round(progress.peak / 2**30, 1),
        "computed": len(progress.computed),
        "found": len(progress.found - progress.computed),
        "status": status,
    }


@contextlib.contextmanager
def _log_file(path: Path) -> Iterator[None]:
    """Write what the library logs in this process to a file, as the kernel does after it."""
    try:
        handler = logging.FileHandler(path, mode="w", encoding="utf-8")
    except OSError:  # a full disk, say: the run itself goes on
        handler = logging.NullHandler()
    handler.setFormatter(logging.Formatter(logging.BASIC_FORMAT))
    log = logging.getLogger("beyond_dpo")
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.setLevel(level)
        log.removeHandler(handler)
        handler.close()


def _fail(one: Plan, copy: Path, progress: Progress) -> str:
    """Compute and execute; return why that failed, "" if it did not."""
    import papermill

    try:
        compute(one)
    except Exception as error:
        logging.getLogger("beyond_dpo").exception("computing for %s", one.name)
        held = f"{progress.peak / 2**30:.1f} GiB"
        return (
            f"computing what it shows\n\n{type(error).__name__}: {error}\n\n"
            f"its processes held {held}; log: {copy.with_suffix('.log')}"
        )
    try:
        execute(one, copy, progress)
    except papermill.PapermillExecutionError as error:
        source, reason = error.source, "\n".join(error.traceback)
    except Exception as error:
        source, reason = "", f"{type(error).__name__}: {error}\nout of memory?"
    else:
        return ""
    shown = "\n".join(reason.splitlines()[-30:])
    return "\n\n".join(filter(None, [progress.cell, source, shown, f"executed copy: {copy}"]))


def _keep(one: Plan, copy: Path, options: argparse.Namespace, began: float) -> str:
    """Write the outputs back and freeze the results, where that is asked for; return a note."""
    if options.in_place:
        write_back(one, copy)
    if not options.freeze:
        return ""
    keys = freeze(began - 1)
    return f"frozen: {', '.join(keys) or 'nothing, no figure or claim names a key'}"


def _show_table(rows: list[dict]) -> None:
    import pandas as pd

    if len(rows) > 1:
        total = {"notebook": "all", "peak GiB": max(row["peak GiB"] for row in rows), "status": ""}
        for name in ("seconds", "computed", "found"):
            total[name] = sum(row[name] for row in rows)
        rows = [*rows, total]
    events.show(pd.DataFrame(rows).to_string(index=False))


if __name__ == "__main__":
    sys.exit(main())
