"""The runner: real runs of small notebooks in a project of their own."""

import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from contextlib import suppress

import nbformat
import psutil
import pytest
from projects import CLAIM, DRAWN, cpu_notebook, notebook, start, wait_for

from beyond_dpo.machine import paths
from beyond_dpo.notebook import plan, run
from beyond_dpo.pipeline import artifacts
from faults import disk, filled

COMPUTED = """
from beyond_dpo.pipeline import config
from beyond_dpo.pipeline.artifacts import Artifact
cfg = config.load("expo", "smoke")
def write(folder):
    (folder / "a.txt").write_text("a")
made = Artifact("train", 1, {"seed": seed}, write)
last = Artifact("score", 1, {"on": made}, lambda folder: made.get() and None)
"""
SHOWN = """
import logging, os, pathlib, sys
from tqdm import tqdm
last.get()
assert (seed, lr, profile) == (7, 2.0, "cpu") and type(lr) is float
assert list(tqdm([1])) == [1]
logging.getLogger("beyond_dpo").warning("to the log file")
print(sys.executable, pathlib.Path.cwd().name, made.get().is_dir())
"""
BAD = "def f():\n    raise ValueError('boom')\nprint('so far')\nf()"
DEAD = "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)"


def report_about(name, errors):
    """Return what the runner said of a notebook that failed."""
    begin = errors.index(f"{name} · failed")
    end = errors.find("\n[", begin)
    return errors[begin:end] if end > 0 else errors[begin:]


@pytest.fixture(scope="module")
def three_runs(tmp_path_factory):
    """Run three notebooks in one go: one is fine, one raises in cell 3, one kills its kernel.

    Return the folder, the exit status and what was said.
    """
    folder = tmp_path_factory.mktemp("three")
    notebook(folder / "notebooks" / "11_expo_good.ipynb", COMPUTED, SHOWN)
    notebook(folder / "notebooks" / "12_expo_bad.ipynb", BAD, "1")
    notebook(folder / "notebooks" / "13_expo_dead.ipynb", "x = 1", DEAD)
    runner = start(folder, "--all", "--profile", "cpu", "-p", "seed=7", "-p", "lr=2")
    out, errors = runner.communicate(timeout=120)
    return folder, runner.returncode, out, errors


@pytest.mark.slow
def test_a_notebook_runs_in_a_kernel_of_this_interpreter(three_runs):
    """Although another `python3` comes first on the Jupyter path; its log goes to a file."""
    folder, _, _, errors = three_runs
    copy = folder / "artifacts" / "runs" / "11_expo_good.cpu.ipynb"
    cells = nbformat.read(copy, 4).cells
    assert "injected-parameters" in cells[2].metadata.tags
    shown = [output.text for cell in cells[3:] for output in cell.outputs]
    assert shown == [f"{sys.executable} notebooks True\n"], "its own print alone: no bar, no log"
    assert "to the log file" in copy.with_suffix(".log").read_text()
    assert "WARNING" not in errors and "[1/3] 11_expo_good · ok" in errors


@pytest.mark.slow
def test_what_a_notebook_asks_for_is_computed_before_its_kernel_starts(three_runs):
    folder, _, _, _ = three_runs
    log = (folder / "artifacts" / "runs" / "11_expo_good.cpu.log").read_text()
    order = [log.index(text) for text in ("finished train-", "finished score-", "to the log file")]
    assert order == sorted(order)


@pytest.mark.slow
def test_a_notebook_that_raises_is_reported_with_its_cell_and_stops_no_other(three_runs):
    folder, status, _, errors = three_runs
    copy = folder / "artifacts" / "runs" / "12_expo_bad.cpu.ipynb"
    report = report_about("12_expo_bad", errors)
    assert status == 1
    assert "cell 3 of 4" in report and "raise ValueError('boom')" in report
    assert f"\nValueError: boom\n\nexecuted copy: {copy}" in report and "\x1b" not in report
    assert nbformat.read(copy, 4).cells[-1].execution_count is None, "the cell after it ran"


@pytest.mark.slow
def test_a_notebook_whose_kernel_dies_is_reported_with_its_cell(three_runs):
    folder, _, _, errors = three_runs
    report = report_about("13_expo_dead", errors)
    assert "cell 4 of 4" in report and "DeadKernelError" in report
    assert str(folder / "artifacts" / "runs" / "13_expo_dead.cpu.ipynb") in report


@pytest.mark.slow
def test_a_table_tells_what_was_computed(three_runs):
    _, _, out, _ = three_runs
    table = [re.split(r"\s+", line.strip()) for line in out.strip().splitlines()]
    assert table[0] == ["notebook", "seconds", "peak", "GiB", "computed", "found", "status"]
    assert [(row[0], *row[3:]) for row in table[1:]] == [
        ("11_expo_good", "2", "0", "ok"),
        ("12_expo_bad", "0", "0", "failed"),
        ("13_expo_dead", "0", "0", "failed"),
        ("all", "2", "0"),
    ]


BROKEN = """
from beyond_dpo.machine import launch
from beyond_dpo.pipeline import config
from beyond_dpo.pipeline.artifacts import Artifact
cfg = config.load("expo", "smoke")
def make(folder):
    raise launch.JobFailed("the log says why")
made = Artifact("train", 1, {}, make)
"""


def test_work_that_fails_is_reported_before_any_kernel_starts(project):
    notebook(project / "notebooks" / "11_expo_a.ipynb", BROKEN, "made.get()")
    runner = start(project, "11")
    errors = runner.communicate(timeout=60)[1]
    log = project / "artifacts" / "runs" / "11_expo_a.smoke.log"
    assert runner.returncode == 1
    assert "11_expo_a · failed" in errors and "JobFailed: the log says why" in errors
    assert str(log) in errors and "Traceback" not in errors
    assert "Traceback" in log.read_text(), "where it failed is in the log"
    assert not log.with_suffix(".ipynb").exists()


def test_what_is_missing_and_must_not_be_computed_is_said_before_any_kernel_starts(project):
    notebook(project / "notebooks" / "11_expo_a.ipynb", COMPUTED, SHOWN)
    runner = start(project, "11", COMPUTE="never")
    errors = runner.communicate(timeout=60)[1]
    assert runner.returncode == 1 and "COMPUTE=never forbids computing it" in errors


LIVING = """
import os, sys
from beyond_dpo.machine import workers
from beyond_dpo.pipeline import config
from beyond_dpo.pipeline.artifacts import Artifact
cfg = config.load("expo", "smoke")
def make(folder):
    worker = workers.get("jobs", "beyond_dpo.machine.launch", {})
    (folder / "pids").write_text(f"{os.getpid()} {worker.child.pid}")
made = Artifact("score", 1, {"of": tag}, make)
"""
PIDS = "print((made.get() / 'pids').read_text(), os.getpid(), len(workers.living))"


def test_notebooks_of_one_run_share_living_processes_but_no_kernel(project):
    """Engines live in the runner, from one notebook to the next, and end with it."""
    for number, tag in enumerate("AB"):
        cell = LIVING.replace("tag}", f"'{tag}'}}")
        notebook(project / "notebooks" / f"1{number}_expo.ipynb", cell, PIDS)
    runner = start(project, "10", "11")
    assert runner.wait(timeout=120) == 0
    printed = []
    for number in range(2):
        copy = project / "artifacts" / "runs" / f"1{number}_expo.smoke.ipynb"
        printed.append(nbformat.read(copy, 4).cells[-1].outputs[0].text.split())
    (runner_0, worker_0, kernel_0, living_0), (runner_1, worker_1, kernel_1, living_1) = printed
    assert runner_0 == runner_1 == str(runner.pid) and worker_0 == worker_1
    assert kernel_0 != kernel_1 and living_0 == living_1 == "0"
    pids = map(int, (worker_0, kernel_0, kernel_1))
    assert not any(map(psutil.pid_exists, pids))
    assert not list((project / "tmp").glob("*.json")), "a kernel's connection file with its key"


def test_in_place_and_freeze(project):
    """Outputs come back clean, and the second run changes no byte.

    The results behind them are in data/frozen.
    """
    path = cpu_notebook(project, DRAWN, CLAIM)
    before = nbformat.read(path, 4)
    written = []
    for _ in range(2):
        done = start(project, "12", "--in-place", "--freeze")
        assert "frozen: score-" in done.communicate(timeout=60)[1] and done.returncode == 0
        written.append(path.read_bytes())
    assert written[0] == written[1]
    nb = nbformat.read(path, 4)
    nbformat.validate(nb)
    assert nb.metadata == before.metadata and nb.cells[1].metadata == {"tags": ["parameters"]}
    assert [cell.source for cell in nb.cells] == [cell.source for cell in before.cells], (
        "a parameters cell was injected"
    )
    assert [cell.get("execution_count") for cell in nb.cells] == [None, 1, 2, 3]
    assert (
        "image/svg+xml" in nb.cells[2].outputs[0].data
        and "0x" not in nb.cells[3].outputs[0].data["text/plain"]
    )
    assert str(project) not in path.read_text(), "an absolute path in the outputs"
    run.clean(nb)
    assert nb == nbformat.read(path, 4), "nbstripout would still change it"
    (key,) = json.loads((project / "figures/expo_fig2_x.json").read_text())["keys"]
    assert sorted(p.name for p in (project / "data/frozen").iterdir()) == ["claims", key]
    assert [p.name for p in (project / "data/frozen/claims").iterdir()] == [
        "12_expo_drawn.cpu.json"
    ]
    assert (project / "data/frozen" / key / "s.csv").is_file()


def test_changed_parameters_leave_the_projects_figures_and_claims_alone(project):
    """What -p changed is not the result of the profile.

    It is drawn and recorded under artifacts/, and never frozen.
    """
    cpu_notebook(project, DRAWN, CLAIM)
    assert start(project, "12", "-p", "seed=7").wait(60) == 0
    assert (
        not (project / "figures").exists()
        and (project / "artifacts/figures/expo_fig2_x.svg").is_file()
    )
    assert not (project / "artifacts/runs/claims").exists()
    assert (project / "artifacts/runs/trials/12_expo_drawn.cpu.json").is_file()
    with pytest.raises(plan.Refused, match="leave -p away"):
        plan.plan(run._options(["12", "--profile", "cpu", "-p", "seed=7", "--freeze"]))


def test_freeze_names_a_key_that_is_nowhere(project):
    (project / "figures").mkdir()
    (project / "figures" / "expo_fig1_x.json").write_text(
        json.dumps({"keys": ["score-0123456789abcdef"]})
    )
    with pytest.raises(artifacts.MissingArtifact, match="score-0123456789abcdef is neither in"):
        run.freeze(0)


def test_clean_is_nbstripout(project):
    """The notebook has everything in its metadata that runs leave there.

    Cleaning again changes nothing.
    """
    nb = nbformat.read(notebook(project / "notebooks" / "1_a.ipynb", "1 + 1"), 4)
    nb.metadata |= {"papermill": {}, "language_info": {"name": "python"}, "widgets": {}, "keep": 1}
    nb.cells[1].metadata |= {
        "papermill": {"status": "x"},
        "execution": {"t": 1},
        "scrolled": True,
        "collapsed": False,
    }
    nb.cells[2] |= {"execution_count": 3, "outputs": [nbformat.v4.new_output("stream", text="a")]}
    path = project / "b.ipynb"
    nbformat.write(nb, path)
    keys = "metadata.papermill cell.metadata.papermill metadata.widgets"
    options = ["--keep-output", "--keep-count", "--keep-id", "--extra-keys", keys]
    subprocess.run([sys.executable, "-m", "nbstripout", *options, path], check=True)
    run.clean(nb)
    assert nb == nbformat.read(path, 4) and nb.cells[2].outputs and nb.metadata.keep == 1
    assert nb.metadata.language_info == {"name": "python"}, "JupyterLab would write it again"
    run.clean(nb)
    assert nb == nbformat.read(path, 4)


BUSY = """
import os, pathlib, subprocess, time
child = subprocess.Popen(["sleep", "600"], start_new_session=True)
shell = ["sh", "-c", "sleep 600 & echo $!"]
orphan = subprocess.Popen(shell, start_new_session=True, stdout=subprocess.PIPE, text=True)
pids = [os.getpid(), child.pid, int(orphan.stdout.readline())]
temporary = pathlib.Path(f"{tag}.tmp")
temporary.write_text(" ".join(map(str, pids)))
temporary.rename(f"{tag}.pids")
time.sleep(600)
"""


@pytest.mark.usefixtures("interrupts")
def test_interrupt_leaves_no_process(project):
    """Ctrl-C ends the kernel, its child in another session, and an orphan of that.

    So does SIGTERM, which a batch system sends.
    """
    notebook(project / "notebooks" / "11_expo_busy.ipynb", BUSY)
    runs = {
        number: start(project, "11", "-p", f"tag={number.name}")
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    for number, runner in runs.items():
        pids = project / "notebooks" / f"{number.name}.pids"
        assert wait_for(pids.exists, 60)
        started = list(map(int, pids.read_text().split()))
        assert len(started) == 3 and all(map(psutil.pid_exists, started))
        runner.send_signal(number)
        err = runner.communicate(timeout=30)[1]
        assert runner.returncode == 130 and "11_expo_busy · interrupted" in err
        assert "cell 3 of 3, executed copy: " in err and f"; {run.RESUME}\n" in err
        assert "Traceback" not in err and err.count("interrupted") == 1
        assert wait_for(lambda pids=started: not any(map(psutil.pid_exists, pids)), 5)
    assert not list((project / "tmp").glob("*.json")), "a kernel's connection file with its key"


def test_a_run_goes_on_where_nothing_can_be_told(project):
    """Its own words go to a full disk, its results to one with room: it ends as ever."""
    notebook(project / "notebooks" / "11_expo_a.ipynb", "print('α')")
    with disk(project / "small", 1):
        errors = project / "small" / "errors"
        with open(errors, "wb") as err, filled(project / "small"):
            environment = os.environ | {"BEYOND_DPO_ROOT": str(project)}
            command = [sys.executable, "-m", "beyond_dpo.notebook.run", "11"]
            done = subprocess.run(
                command, env=environment, stdout=subprocess.PIPE, stderr=err, timeout=60
            )
        assert done.returncode == 0, done.stdout
        assert errors.read_bytes() == b"" and b"11_expo_a" in done.stdout
    assert (
        nbformat.read(project / "artifacts/runs/11_expo_a.smoke.ipynb", 4).cells[-1].outputs[0].text
        == "α\n"
    )


def test_a_run_in_another_locale(project):
    notebook(project / "notebooks" / "11_expo_a.ipynb", "print('α')", "raise ValueError('β')")
    done = start(project, "11", LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    err = done.communicate(timeout=60)[1]
    assert (
        done.returncode == 1
        and "ValueError: \\u03b2" in err
        and "Error" not in err.replace("ValueError", "")
    )
    cells = nbformat.read(project / "artifacts/runs/11_expo_a.smoke.ipynb", 4).cells
    assert ["α\n"] == [
        out.text for cell in cells if cell.source == "print('α')" for out in cell.outputs
    ]


@pytest.mark.usefixtures("interrupts")
def test_an_early_interrupt_is_one_line(project):
    """While the kernel still starts: no traceback, and how to go on."""
    notebook(project / "notebooks" / "11_expo_a.ipynb", "1")
    runner = start(project, "11", "--profile", "cpu")
    assert runner.stderr.readline() == "[1/1] 11_expo_a · starting a kernel\n"
    runner.send_signal(signal.SIGINT)
    errors = runner.communicate(timeout=30)[1]
    assert runner.returncode == 130
    assert errors.count("\n") == 1 and run.RESUME in errors, errors


SLOW_WORK = """
import pathlib, subprocess, time
from beyond_dpo.machine import workers
from beyond_dpo.pipeline import config
from beyond_dpo.pipeline.artifacts import Artifact
cfg = config.load("expo", "smoke")
def make(folder):
    worker = workers.get("jobs", "beyond_dpo.machine.launch", {})
    pathlib.Path(tag).write_text(str(worker.child.pid))
    time.sleep(600)
made = Artifact("train", 1, {}, make)
"""


@pytest.mark.usefixtures("interrupts")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_run_that_is_ended_while_it_computes_leaves_no_process(project, number):
    """Ctrl-C and a batch system's stop say how to go on; after kill -9 the workers see it."""
    notebook(project / "notebooks" / "11_expo_a.ipynb", SLOW_WORK, "made.get()")
    pid_file = project / "pid"
    runner = start(project, "11", "-p", f"tag={pid_file}")
    assert wait_for(lambda: pid_file.exists() and pid_file.read_text(), 60)
    pid = int(pid_file.read_text())
    runner.send_signal(number)
    errors = runner.communicate(timeout=30)[1]
    if number == signal.SIGKILL:
        assert runner.returncode == -number
    else:
        assert runner.returncode == 130 and errors.count(run.RESUME) == 1
        assert "before the first cell" in errors and "Traceback" not in errors
    assert wait_for(lambda: not psutil.pid_exists(pid), 20)


def test_light_imports():
    heavy = "{'torch', 'transformers', 'vllm', 'deepspeed', 'pandas', 'papermill', 'psutil'}"
    code = f"import sys, beyond_dpo.notebook.run; print({heavy} & set(sys.modules))"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip()
        == "set()"
    )


STUB = """#!/bin/sh
test "$1" = -c && exec {python} "$@"
echo "$@" "JUPYTER_PATH=$JUPYTER_PATH"
"""


@pytest.mark.parametrize("user", ["0", "1000"])
def test_make_lab_takes_options_and_works_as_root(tmp_path, user):
    """As root JupyterLab does not start unless it is told that this is meant."""
    for name, text in {
        "python": STUB.format(python=sys.executable),
        "id": f"#!/bin/sh\necho {user}\n",
    }.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    environment = os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "JUPYTER_PATH": "/elsewhere",
    }
    command = [
        "make",
        "-s",
        "lab",
        "READY=",
        f"PY={tmp_path / 'python'}",
        "LAB=--port 8889 --no-browser",
    ]
    done = subprocess.run(
        command, cwd=paths.ROOT, env=environment, capture_output=True, text=True, check=True
    )
    root = " --allow-root" if user == "0" else ""
    *_, last = done.stdout.splitlines()
    assert last == (
        f"-m jupyterlab{root} --port 8889 --no-browser notebooks/00_start_here.ipynb "
        f"JUPYTER_PATH={sys.prefix}/share/jupyter:/elsewhere"
    )
    assert f"kernel: Python 3 (ipykernel) of {sys.prefix}" in done.stdout


@pytest.mark.slow
def kernels_of(runtime):
    """Return what the Jupyter server of a runtime folder offers, None where it does not answer yet.

    It writes its address down before it listens.
    """
    for server in runtime.glob("jpserver-*.json"):
        with suppress(OSError, ValueError):  # no connection yet, or half a file
            about = json.loads(server.read_text())
            address = f"{about['url']}api/kernelspecs?token={about['token']}"
            with urllib.request.urlopen(address) as answer:
                return json.load(answer)
    return None


def test_make_lab_offers_the_kernel_that_has_the_package(tmp_path):
    """A real JupyterLab; the user has a `python3` kernel of another environment."""
    spec = tmp_path / "jupyter" / "kernels" / "python3"
    spec.mkdir(parents=True)
    (spec / "kernel.json").write_text(
        json.dumps({"argv": ["/bin/false"], "display_name": "x", "language": "python"})
    )
    environment = os.environ | {
        "JUPYTER_DATA_DIR": str(tmp_path / "jupyter"),
        "JUPYTER_PREFER_ENV_PATH": "0",
    }
    environment |= {
        "JUPYTER_RUNTIME_DIR": str(tmp_path / "runtime"),
        "JUPYTER_CONFIG_DIR": str(tmp_path / "config"),
    }
    environment |= {"JUPYTER_PATH": str(tmp_path / "jupyter")}
    command = [
        "make",
        "lab",
        "READY=",
        f"PY={sys.executable}",
        "LAB=--no-browser --ip 127.0.0.1 --port 0",
    ]
    options = {
        "stdout": subprocess.DEVNULL,
        "stderr": subprocess.DEVNULL,
        "start_new_session": True,
    }
    lab = subprocess.Popen(command, cwd=paths.ROOT, env=environment, **options)
    try:
        kernels = wait_for(lambda: kernels_of(tmp_path / "runtime"))
        assert kernels["default"] == "python3"
        assert kernels["kernelspecs"]["python3"]["spec"]["argv"][0] != "/bin/false"
    finally:
        os.killpg(lab.pid, signal.SIGKILL)
        lab.wait()


@pytest.mark.parametrize("mode", ["auto", "cold"])
def test_a_run_that_is_not_to_be_committed_leaves_the_projects_figures_alone(project, mode):
    """`make reproduce` drew float32 over the committed figures, under the same stamp."""
    cpu_notebook(project, DRAWN, CLAIM)
    assert start(project, "12", COMPUTE=mode).wait(60) == 0
    assert not (project / "figures").exists() and not (project / "data/frozen").exists()
    assert (project / "artifacts/figures/expo_fig2_x.svg").is_file()
    assert (project / "artifacts/runs/claims/12_expo_drawn.cpu.json").is_file(), (
        "its claims are of the profile"
    )


FLOAT32 = DRAWN.replace('{"seed": seed}', '{"seed": seed, "precision": "fp32"}')


def test_a_cold_freeze_draws_the_projects_figures_and_says_float32(project):
    cpu_notebook(project, FLOAT32)
    assert start(project, "12", "--freeze", COMPUTE="cold").wait(60) == 0
    content = json.loads((project / "figures/expo_fig2_x.json").read_text())
    assert content["stamp"] == "profile smoke · float32"
    assert (project / "data/frozen" / content["keys"][0] / "s.csv").is_file()
    assert not (project / "artifacts/figures").exists()


def test_a_run_whose_table_has_no_place_ends_as_ever(project):
    """`make reproduce > log` on a full disk ends without a traceback, with its usual status."""
    notebook(project / "notebooks" / "11_expo_a.ipynb", "1")
    environment = os.environ | {"BEYOND_DPO_ROOT": str(project)}
    command = [sys.executable, "-m", "beyond_dpo.notebook.run", "11"]
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            command, env=environment, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        assert (
            done.stderr.splitlines()[-1] == "the output cannot be written: No space left on device"
        )
        assert "Traceback" not in done.stderr and "Exception" not in done.stderr
        done = subprocess.run(
            [*command, "--dry-run"], env=environment, stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert (
        done.returncode == 1
        and done.stderr == "the output cannot be written: No space left on device\n"
    )
