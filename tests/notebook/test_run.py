"""The runner: what it refuses, and real runs of small notebooks in a project of their own."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from types import SimpleNamespace

import nbformat
import psutil
import pytest

from beyond_dpo import events
from beyond_dpo.machine import paths
from beyond_dpo.notebook import progress, run
from beyond_dpo.pipeline import artifacts, config, needs
from faults import disk, filled

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


@pytest.fixture
def project(tmp_path, monkeypatch):
    for name, folder in {
        "ROOT": "",
        "NOTEBOOKS": "notebooks",
        "ARTIFACTS": "artifacts",
        "FROZEN": "data/frozen",
        "FIGURES": "figures",
    }.items():
        monkeypatch.setattr(paths, name, tmp_path / folder)
    (tmp_path / "notebooks").mkdir()
    return tmp_path


def start(project, *arguments, **more):
    """Start the runner, in another folder and with the relative PYTHONPATH of a checkout; more:
    environment.
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


def test_find(project, tmp_path):
    for name in ("00_start_here", "11_expo_headline", "12_expo_search", "90_playground"):
        notebook(project / "notebooks" / f"{name}.ipynb")
    other = notebook(tmp_path / "elsewhere" / "mine.ipynb")
    assert [p.stem for p in run.find(["11", "12_expo_search"])] == [
        "11_expo_headline",
        "12_expo_search",
    ]
    assert run.find([str(other)]) == [other]
    assert [p.stem[:2] for p in run.find([])] == ["11", "12", "90", "00"], (
        "the scoreboard comes last"
    )
    notebook(project / "notebooks" / "21_mallows_bandit.ipynb")
    assert [p.stem[:2] for p in run.find([])][0] == "21", "what takes seconds comes first"
    for wrong in ("1", "11_expo", "13", "11_expo_headlin"):
        if wrong == "11_expo":
            assert run.find([wrong])[0].stem == "11_expo_headline"
            continue
        with pytest.raises(run.Refused, match=f"{wrong}: fits 0 notebooks"):
            run.find([wrong])
    notebook(project / "notebooks" / "11_expo_second.ipynb")
    with pytest.raises(run.Refused, match="11: fits 2 notebooks"):
        run.find(["11"])


DECLARED = {
    "profile": "smoke",
    "seed": 0,
    "lr": 1e-5,
    "alphas": [0, 0.5],
    "tag": "x",
    "limit": None,
    "quick": True,
}


def test_parameters_are_read_with_their_types(tmp_path):
    assert run.parameters(nbformat.read(notebook(tmp_path / "n.ipynb"), 4), "n") == DECLARED
    negative = (
        "a = -1\nb = {'x': [1, None]}\nc: int = 3\n\n# comment with = inside\nd = [\n"
        "    0.0,  # first\n    1.0,\n]"
    )
    read = run.parameters(
        nbformat.read(notebook(tmp_path / "n.ipynb", parameters=negative), 4), "n"
    )
    assert read == {"a": -1, "b": {"x": [1, None]}, "c": 3, "d": [0.0, 1.0]}
    assert (
        run.parameters(nbformat.read(notebook(tmp_path / "n.ipynb", parameters=None), 4), "n") == {}
    )


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "a = 1\ntwice = a * 2",
            "line 2: `twice = a \\* 2` is not `name = value`",
        ),  # would stay 2 when a is set
        ("import os", "`import os` is not"),
        ("a = b = 1", "`a = b = 1` is not"),
        ("a, b = 1, 2", "is not `name = value`"),
        ("a = (1, 2)", "is not `name = value`"),  # papermill would pass the text '(1, 2)'
        ("a = {1, 2}", "is not `name = value`"),
        ("a = f'{1}'", "is not `name = value`"),
        ("a = 1\na = 2", "line 2: `a = 2` is not"),
        ("a = 1\na += 1", "line 2: `a \\+= 1` is not"),
        ("a: int", "is not `name = value`"),
        ("a: float | None = None", "papermill cannot see a;"),
        ("s = 'a=b'", "papermill cannot see s;"),
        ("a = 1  # a = 2 is worse", "papermill cannot see a;"),
        ("a = ", "line 1: invalid syntax"),
    ],
)
def test_parameters_refuses_what_papermill_gets_wrong(tmp_path, source, message):
    nb = nbformat.read(notebook(tmp_path / "n.ipynb", parameters=source), 4)
    with pytest.raises(run.Refused, match=f"^n: .*{message}"):
        run.parameters(nb, "n")


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("seed", "3", 3),
        ("lr", "1", 1.0),
        ("lr", "0.1", 0.1),
        ("alphas", "[1, 2.5]", [1, 2.5]),
        ("alphas", "(1, 2)", [1, 2]),
        ("alphas", "[]", []),
        ("tag", "0.1", "0.1"),  # a text parameter takes the text
        ("tag", "'0.1'", "0.1"),
        ("tag", "org/model@main", "org/model@main"),
        ("limit", "5", 5),
        ("quick", "False", False),
    ],
)
def test_check_accepts(name, text, value):
    assert run.check("n", DECLARED, {name: text}) == {name: value}
    assert type(run.check("n", DECLARED, {name: text})[name]) is type(value)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "sede",
            "1",
            "n: no parameter 'sede'; did you mean 'seed'\\? It declares profile, seed, lr",
        ),
        ("seed", "1.5", "seed=1.5 is a float, unlike its default 0"),
        ("seed", "one", "seed=one is a str"),
        ("seed", "True", "seed=True is a bool"),
        ("seed", "", "seed= is a str"),
        ("lr", "False", "lr=False is a bool"),
        ("lr", "None", "lr=None is a NoneType"),
        ("quick", "1", "quick=1 is a int, unlike its default True"),
        ("alphas", "0.5", "alphas=0.5 is a float"),
        ("alphas", "['a']", "alphas=\\['a'\\] is a list, unlike"),
    ],
)
def test_check_refuses(name, text, message):
    with pytest.raises(run.Refused, match=message):
        run.check("n", DECLARED, {name: text})
    with pytest.raises(run.Refused, match="it declares none"):
        run.check("n", {}, {name: text})


def test_command_line_refuses_before_anything_runs(project, capsys):
    notebook(project / "notebooks" / "11_expo_a.ipynb")
    notebook(project / "notebooks" / "12_expo_b.ipynb", parameters="seed = 0")
    for arguments, message in {
        ("11", "-p", "sede=1"): "did you mean 'seed'",
        ("11", "12", "--profile", "cpu"): "12_expo_b: no parameter 'profile'",
        (): "name notebooks, or give --all",
        ("11", "--all"): "name notebooks, or give --all",
        ("11", "--in-place", "-p", "seed=1"): "--in-place runs the values written",
        ("13",): "13: fits 0 notebooks",
    }.items():
        assert run.main(list(arguments)) == 2
        assert message in capsys.readouterr().err
    assert not (project / "artifacts").exists()


SETUP = """
import nothing_that_is_installed
from beyond_dpo.pipeline import config
nothing_that_is_installed.style()
seeds = seed if seed is None else [seed]
changes = {"train__lr": lr}
cfg = config.load("expo", profile, seeds=seeds, **changes)
later = nothing_that_is_installed.more(cfg)
"""
FREE = 'profile = "smoke"\nseed = None\nlr = None'


def test_what_the_set_up_would_refuse_is_refused_in_one_line_before_anything_runs(
    project, capsys, monkeypatch
):
    """Types that a default of None does not tell, COMPUTE, freezing numbers without meaning, a
    damaged notebook.
    """
    notebook(project / "notebooks" / "11_expo_a.ipynb", SETUP, parameters=FREE)
    (project / "notebooks" / "12_expo_b.ipynb").write_text("half a noteb")
    (project / "notebooks" / "13_expo_c.ipynb").write_text("[]")
    for arguments, environment, message in [
        (
            ["11", "-p", "seed=abc"],
            {},
            "11_expo_a: seeds.0: Input should be a valid integer, got 'abc'",
        ),
        (["11", "-p", "seed=1.5"], {}, "11_expo_a: seeds.0: "),
        (["11", "-p", "lr=[1]"], {}, "11_expo_a: train.lr: "),
        (["11", "-p", "lr=fast"], {}, "11_expo_a: train.lr: "),
        (["11", "--profile", "cpux"], {}, "profile 'cpux' is none of smoke, cpu"),
        (["11"], {"COMPUTE": "nevr"}, "COMPUTE=nevr is none of auto"),
        (["11", "--dry-run"], {"COMPUTE": "AUTO"}, "COMPUTE=AUTO is none of auto"),
        (["11"], {"COMPUTE": "plan"}, "use --dry-run"),
        (
            ["11", "--freeze", "--profile", "smoke"],
            {},
            "those of profile smoke mean nothing; use cpu",
        ),
        (["11", "--freeze"], {}, "those of profile smoke mean nothing"),
        (["11"], {"BEYOND_DPO_HOSTFILE": str(project / "none")}, "BEYOND_DPO_HOSTFILE="),
        (["11"], {"BEYOND_DPO_PROCESSES": "["}, "BEYOND_DPO_PROCESSES=["),
        (["11"], {"BEYOND_DPO_PROCESSES": "two"}, "sft.processes: "),
        (["12"], {}, "12_expo_b.ipynb cannot be read as a notebook"),
        (["13"], {}, "13_expo_c.ipynb cannot be read as a notebook"),
    ]:
        with monkeypatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            assert run.main(arguments) == 2, arguments
        said = capsys.readouterr()
        assert (
            message in said.err and said.err.startswith("refused: ") and said.err.count("\n") == 1
        ), said.err
        assert not said.out
    assert not (project / "artifacts").exists() and not (project / "data").exists()


def test_a_profile_that_is_too_large_for_this_machine_is_refused_where_it_would_compute(
    project, capsys, monkeypatch
):
    """Before any kernel; what was computed elsewhere is shown on any machine."""
    made = (
        "from beyond_dpo.pipeline.artifacts import Artifact\n"
        "made = Artifact('score', 1, {}, lambda out: None)"
    )
    setup = f"from beyond_dpo.pipeline import config\ncfg = config.load('expo', profile)\n{made}"
    path = notebook(project / "notebooks" / "11_expo_a.ipynb", setup, "made.get()")
    monkeypatch.setattr(needs, "cards", lambda: 0)
    assert run.main(["11", "--profile", "paper"]) == 2
    said = capsys.readouterr().err
    assert (
        "refused: 11_expo_a: profile paper needs 8 GPUs of 80 GB (found 0)" in said
        and said.count("\n") == 1
    )
    assert not (project / "artifacts").exists()
    monkeypatch.undo()
    for name, folder in {"ARTIFACTS": "artifacts", "FROZEN": "data/frozen"}.items():
        monkeypatch.setattr(paths, name, project / folder)
    monkeypatch.setattr(needs, "cards", lambda: 0)
    artifacts.Artifact("score", 1, {}, lambda out: None).get()
    nb, options = nbformat.read(path, 4), SimpleNamespace(force=False)
    run._check_setup("n", nb, DECLARED | {"profile": "paper"}, options)
    monkeypatch.setenv("COMPUTE", "cold")
    shutil.rmtree(paths.ARTIFACTS)
    with pytest.raises(run.Refused, match="n: profile paper needs 8 GPUs"):
        run._check_setup("n", nb, DECLARED | {"profile": "paper"}, options)
    run._check_setup("n", nb, DECLARED | {"profile": "paper"}, SimpleNamespace(force=True))
    monkeypatch.setenv("COMPUTE", "never")
    run._check_setup("n", nb, DECLARED | {"profile": "paper"}, options)


def test_the_configuration_of_every_notebook_is_known_without_running_it():
    """As the notebook itself makes it, and without what the set-up imports."""
    files, found = sorted(paths.NOTEBOOKS.glob("*.ipynb")), {}
    assert len(files) > 20
    for path in files:
        nb = nbformat.read(path, 4)
        found[path.stem] = progress.configuration(
            nb, run.parameters(nb, path.stem) | {"profile": "smoke"}
        )
        loads = any("config.load(" in cell.source for cell in nb.cells)
        assert (found[path.stem] is not None) == loads, path.stem
    assert found["11_expo_headline"] == config.load("expo", "smoke")


def test_a_refusal_loads_nothing_heavy():
    code = (
        "import sys\nfrom beyond_dpo.notebook import run\n"
        "status = run.main(['11', '-p', 'seed=abc'])\n"
    )
    heavy = ["torch", "transformers", "pandas", "deepspeed", "vllm", "matplotlib"]
    code += f"print(status, [name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "2 []\n" and done.stderr.count("\n") == 1, done.stderr


WRONG = "lines = expo.wrong_pairs(cfg)"


def test_dry_run_describes_and_executes_nothing(project, capsys):
    setup = (
        "from beyond_dpo.pipeline import config, expo, stages\n"
        "cfg = config.load('expo', profile, train__lr=lr)"
    )
    made = "part = stages.aligned(cfg, 0.1, seed)\npart.get()\n1 / 0"
    notebook(project / "notebooks" / "00_start_here.ipynb", "1", parameters=None)
    notebook(project / "notebooks" / "11_expo_a.ipynb", setup, made, "1 / 0")
    notebook(
        project / "notebooks" / "15_expo_b.ipynb",
        setup.replace("lr)", "lr, wrong_pairs={})"),
        WRONG,
    )
    assert run.main(["--all", "--profile", "gpu", "--dry-run"]) == 0
    said = capsys.readouterr().out.splitlines()
    nothing = "  computes nothing: shows what others found or printed"
    assert said[0] == "11_expo_a profile='gpu'" and said[-2:] == ["00_start_here", nothing]
    assert (
        said[1] == "  needs: 1 GPUs of 40 GB, 32 GB memory, 60 GB disk, about 3 h"
        and "smollm2" in said[2]
    )
    assert [line.split(" (")[0] for line in said if "beyond_dpo.jobs.train" in line] == [
        "  SFT",
        "  DPO 10% seed 0",
    ]
    assert sum("beyond_dpo.jobs.reference" in line for line in said) == 1
    assert run.main(["11", "15", "--profile", "paper", "-p", "seed=3", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "DPO 10% seed 3 (1 × lr 1e-05, adamw, β 0.01, batch 128 = 8 × 4 × 4, ZeRO-3)" in said
    assert (
        "--num_accelerators 8" in said
        and "is refused: profile paper starts from one finished SFT model" in said
    )
    assert not (project / "artifacts").exists() and not os.environ.get("COMPUTE")


GOOD = """
import os, sys, pathlib, logging, time
from tqdm import tqdm
from beyond_dpo.pipeline.artifacts import Artifact
assert (seed, lr, profile) == (7, 2.0, "cpu") and type(lr) is float
assert list(tqdm([1])) == [1]
logging.getLogger("beyond_dpo").warning("to the log file")
make = lambda folder: (folder / "a.txt").write_text("a") and None
made = Artifact("train", 1, {"seed": seed}, make)
made.get(), made.get(), Artifact("score", 1, {"on": made}, lambda folder: None).get()
held = b"x" * (300 << 20)
time.sleep(1.5)  # to be seen
print(sys.executable, pathlib.Path.cwd().name)
"""


def test_runs_failures_and_dead_kernels(project):
    """Three notebooks in one go: one is fine, one raises in cell 3, one kills its kernel; none
    stops the next one.

    The kernels are this interpreter's although another `python3` comes first on the Jupyter path.
    """
    folder = project / "notebooks"
    notebook(folder / "11_expo_good.ipynb", GOOD)
    notebook(
        folder / "12_expo_bad.ipynb",
        "def f():\n    raise ValueError('boom')\nprint('so far')\nf()",
        "1",
    )
    notebook(
        folder / "13_expo_dead.ipynb",
        "x = 1",
        "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)",
    )
    done = start(project, "--all", "--profile", "cpu", "-p", "seed=7", "-p", "lr=2")
    out, err = done.communicate(timeout=120)
    assert done.returncode == 1, err
    runs = project / "artifacts" / "runs"
    good, bad, dead = (
        runs / f"{name}.cpu.ipynb" for name in ("11_expo_good", "12_expo_bad", "13_expo_dead")
    )

    cells = nbformat.read(good, 4).cells
    assert "injected-parameters" in cells[2].metadata.tags and [
        o.text for c in cells[3:] for o in c.outputs
    ] == [f"{sys.executable} notebooks\n"], (
        "nothing but its own print: no progress bar, no log line"
    )
    assert "to the log file" in good.with_suffix(".log").read_text()

    report = err[err.index("[2/3] 12_expo_bad · failed") : err.index("[3/3]")]
    assert (
        "cell 3 of 4" in report
        and "raise ValueError('boom')" in report
        and f"executed copy: {bad}" in report
    )
    assert "\nValueError: boom\n\nexecuted copy: " in report and "\x1b" not in report, report
    assert nbformat.read(bad, 4).cells[-1].execution_count is None, "the cell after the failure ran"

    report = err[err.index("[3/3] 13_expo_dead · failed") :]
    assert (
        "cell 4 of 4" in report
        and "DeadKernelError" in report
        and "os.kill" in report
        and str(dead) in report
    )

    table = [re.split(r"\s+", line.strip()) for line in out.strip().splitlines()]
    assert table[0] == ["notebook", "seconds", "peak", "GiB", "computed", "found", "status"]
    assert [(row[0], *row[3:]) for row in table[1:]] == [
        ("11_expo_good", "2", "0", "ok"),
        ("12_expo_bad", "0", "0", "failed"),
        ("13_expo_dead", "0", "0", "failed"),
        ("all", "2", "0"),
    ]
    assert "WARNING" not in err and "[1/3] 11_expo_good · ok" in err
    assert all(0.3 <= float(row[2]) < 4 for row in table[1:2])
    assert not list(runs.glob("*.jsonl"))


LIVING = """
import os, pathlib, logging
from beyond_dpo.machine import workers
from beyond_dpo.pipeline.artifacts import Artifact
Artifact("score", 1, {"of": str(pathlib.Path.cwd())}, lambda folder: None).get()
before = workers.living.get("jobs")
worker = workers.get("jobs", "beyond_dpo.machine.launch", {})
logging.getLogger("beyond_dpo").warning("in %s", tag)
folder = pathlib.Path.cwd().name
print(os.getpid(), worker.child.pid, before is worker, folder, sorted({"pid", "before"} & seen))
"""


def test_notebooks_of_one_run_share_living_processes(project, tmp_path):
    """But neither names, counts, folder nor log; one that fails takes them along, and all end with
    the run.
    """
    living = ("seen = set(dir())\npid = None", LIVING)
    names = [notebook(project / "notebooks" / f"1{i}_expo.ipynb", *living).stem for i in range(3)]
    names.append(notebook(tmp_path / "elsewhere" / "mine.ipynb", *living).stem)
    notebook(
        project / "notebooks" / "19_expo.ipynb",
        "import sys\nfrom beyond_dpo.machine import workers\n1 / 0",
    )
    order = ["10", "11", "19", "12", str(tmp_path / "elsewhere" / "mine.ipynb")]
    runner = start(project, *order, "-p", "tag=T")
    table = [line.split() for line in runner.communicate(timeout=120)[0].splitlines()]
    assert runner.returncode == 1 and not list((project / "tmp").glob("*.json")), (
        "a connection file"
    )
    counts = {name: (computed, found) for name, _, _, computed, found, status in table[1:-1]}
    assert counts == {
        "10_expo": ("1", "0"),
        "11_expo": ("0", "1"),
        "19_expo": ("0", "0"),
        "12_expo": ("0", "1"),
        "mine": ("1", "0"),
    }, "each notebook reports its own results"
    runs, said = project / "artifacts" / "runs", []
    for name in names:
        nb = nbformat.read(runs / f"{name}.smoke.ipynb", 4)
        assert [cell.get("execution_count") for cell in nb.cells] == [None, 1, 2, 3, 4]
        said.append(nb.cells[-1].outputs[0].text.split())
        assert (runs / f"{name}.smoke.log").read_text().count("in T") == 1
    kernels, pids, kept, folders, seen = zip(*said, strict=True)
    assert (
        kernels[0] == kernels[1] != kernels[2] == kernels[3]
        and pids[0] == pids[1] != pids[2] == pids[3]
    )
    assert kept == ("False", "True", "False", "True") and folders == ("notebooks",) * 3 + (
        "elsewhere",
    )
    assert set(seen) == {"[]"}, "names of an earlier notebook"
    assert not any(map(psutil.pid_exists, map(int, {*kernels, *pids})))


DRAWN = """
import matplotlib.pyplot as plt, pandas as pd
from beyond_dpo.notebook import figures, report
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
row = report.claim("it rises", 1, "Fig 2", (0.9, 0.8, 1.1))
report.show(report.record("12_expo_drawn", [row], profile, keys=[made.key]), "claims")
"""


def test_in_place_and_freeze(project):
    """Outputs come back clean and the second run changes no byte; the results behind them are in
    data/frozen.
    """
    path = notebook(project / "notebooks" / "12_expo_drawn.ipynb", DRAWN, CLAIM)
    path.write_text(
        path.read_text().replace('profile = \\"smoke', 'profile = \\"cpu')
    )  # smoke draws elsewhere
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
    """What -p changed is not the profile's result: drawn and recorded under artifacts/, and never
    frozen.
    """
    path = notebook(project / "notebooks" / "12_expo_drawn.ipynb", DRAWN, CLAIM)
    path.write_text(path.read_text().replace('profile = \\"smoke', 'profile = \\"cpu'))
    assert start(project, "12", "-p", "seed=7").wait(60) == 0
    assert (
        not (project / "figures").exists()
        and (project / "artifacts/figures/expo_fig2_x.svg").is_file()
    )
    assert not (project / "artifacts/runs/claims").exists()
    assert (project / "artifacts/runs/trials/12_expo_drawn.cpu.json").is_file()
    with pytest.raises(run.Refused, match="leave -p away"):
        options = {
            "notebooks": ["12"],
            "all": False,
            "profile": "cpu",
            "given": ["seed=7"],
            "in_place": False,
        }
        run._plan(SimpleNamespace(**options, freeze=True))


def test_freeze_names_a_key_that_is_nowhere(project):
    (project / "figures").mkdir()
    (project / "figures" / "expo_fig1_x.json").write_text(
        json.dumps({"keys": ["score-0123456789abcdef"]})
    )
    with pytest.raises(artifacts.MissingArtifact, match="score-0123456789abcdef is neither in"):
        run.freeze(0)


def test_clean_is_nbstripout(project):
    """On a notebook with everything in its metadata that runs leave there; cleaning again changes
    nothing.
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
    options = ["--keep-output", "--keep-count", "--extra-keys", keys]
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
    """Ctrl-C (or a batch system's SIGTERM) ends the kernel, its child in another session, and an
    orphan of that.
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


def test_watch_reads_reports(tmp_path):
    """What artifacts and child jobs report becomes one line; half a line is left for the next
    time.
    """
    reports = tmp_path / "reports"
    reports.touch()
    watch = progress.Watch("[2/3] 11_expo_headline", reports)
    watch.cell = "cell 4 of 9"
    train, score = f"train-{'ab12cd' + '0' * 10}", f"score-{'1' * 16}"

    def told(*lines):
        with open(reports, "a") as file:
            file.write("".join(lines))
        watch._read()
        return watch.line().removeprefix("[2/3] 11_expo_headline · cell 4 of 9")

    def line(event, key=None, **fields):
        known = (
            {"key": key, "stage": key.split("-")[0]} if key else {"stage": "job"}
        )  # child processes know no keys
        return json.dumps({"event": event, **known, **fields}) + "\n"

    assert told(line("hit", score)) == ""
    assert told(line("start", train)) == " · train-ab12cd · for 0 s"
    half = line("progress", fraction=0.434, eta=130.2)
    assert told(half[:20]) == " · train-ab12cd · for 0 s"
    assert told(half[20:]) == " · train-ab12cd · job · 43 % · 2 min 10 s left"
    assert told(line("done", train)) == ""
    assert told(line("hit", train)) == ""
    assert (watch.computed, watch.found - watch.computed) == ({train}, {score})
    assert "job · 50 %" in told(line("progress", fraction=0.5, eta=None))
    assert told(line("progress", fraction=1, eta=0)) == ""


def test_reports_that_cannot_be_read_are_left_out(tmp_path):
    """Half a line before the next one (a full disk), no JSON, other types: what comes after is
    read.
    """
    reports = tmp_path / "reports"
    watch = progress.Watch("title", reports)
    watch._read()  # there is none yet
    wrong = [
        b'{"event": "st{"event": "hit", "key": "a-1"}',
        b"\xff\x00",
        b"[]",
        b"1",
        b"null",
        b"{}",
        b'{"event": 5}',
        b'{"event": "progress"',
        b'{"event": "start", "key": ["a"]}',
        b'{"event": "start", "key": {}}',
        b'{"event": "progress", "stage": 1, "fraction": 0.5}',
        b'{"event": "progress", "stage": "x", "fraction": "y"}',
        b'{"event": "progress", "stage": "x", "eta": NaN}',
        b'{"event": "progress", "stage": "x", "eta": Infinity}',
        b'{"event": "progress", "stage": "x", "fraction": [1], "eta": 1}',
    ]
    reports.write_bytes(
        b"\n".join([*wrong, b'{"event": "hit", "key": "score-1"}', b'{"event": "progress"}', b""])
    )
    watch._read()
    assert watch.found == {"score-1"} and not watch.computed
    assert watch.line() == "title · working · for 0 s"
    reports.unlink()
    watch._read()
    with progress.Watch("without a file"):
        pass


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


def test_a_run_whose_reports_have_no_place_is_not_watched(tmp_path, monkeypatch):
    monkeypatch.setenv("BEYOND_DPO_PROGRESS", "")
    (tmp_path / "file").touch()
    with run._reports(tmp_path / "file") as reports:  # no folder
        assert reports is None
        events.tell(event="hit")
    with run._reports(tmp_path) as reports:
        events.tell(event="hit")
        assert json.loads(reports.read_text()) == {"event": "hit"}


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
    first = runner.stderr.readline()
    assert first == "[1/1] 11_expo_a · starting\n"
    runner.send_signal(signal.SIGINT)
    err = runner.communicate(timeout=30)[1]
    assert runner.returncode == 130
    assert err.count("\n") == 1 and run.RESUME in err, err


def test_an_interrupt_before_the_first_cell_is_told_as_well(project, monkeypatch, capsys):
    """It came before there was anything to watch, and the note asked what was watched."""
    path = notebook(project / "notebooks" / "11_expo_a.ipynb", "1")

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(run.tempfile, "NamedTemporaryFile", interrupted)
    monkeypatch.setenv("BEYOND_DPO_PROGRESS", "")
    options = SimpleNamespace(in_place=False, freeze=False)
    row = run._run("[1/1] 11_expo_a", path, nbformat.read(path, 4), {}, "smoke", options, None)
    assert row["status"] == "interrupted" and row["peak GiB"] == 0
    assert "interrupted · 0 s · before the first cell, executed copy: " in capsys.readouterr().err


SEEN = """
from beyond_dpo.machine import launch
from beyond_dpo.pipeline.artifacts import Artifact
does = "DPO 20% seed 0 (1 × lr 1e-05): python"
made = Artifact("train", 1, {"settings": {"lr": 1}}, lambda out: None, does)
last = Artifact("curves", 1, {"of": made}, lambda out: made.get() and None)
"""
BAR = """
import pathlib, time
file = pathlib.Path("progress")
with launch._bar("job", file) as show:
    for i in range(3):
        file.write_text(f"{i + 1} 3\\n")
        show()
"""


def executed(folder, monkeypatch, *cells, **environment):
    """Execute cells as JupyterLab does, in a kernel that no runner started; return the notebook."""
    from nbclient import NotebookClient

    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    with monkeypatch.context() as patch:
        patch.delenv("TQDM_DISABLE")
        patch.delenv("BEYOND_DPO_PROGRESS", raising=False)
        for name, value in (
            {"BEYOND_DPO_ARTIFACTS": str(folder / "artifacts")} | environment
        ).items():
            patch.setenv(name, value)
        NotebookClient(nb, km=run.Kernel(), resources={"metadata": {"path": str(folder)}}).execute()
    return nb


def test_in_jupyterlab_one_line_tells_what_is_computed_and_a_bar_how_far(tmp_path, monkeypatch):
    """And nothing is told of what is found; the bar is a widget, which is dropped when a notebook
    is cleaned.
    """
    nb = executed(tmp_path, monkeypatch, SEEN, "last.get();", "last.get();", BAR)
    _, computed, found, bar = nb.cells
    (line,) = computed.outputs
    assert line.name == "stderr" and line.text.count("\n") == 1
    assert re.match(
        r"computing curves-\w{16} and 1 results that it is made from, trainings: DPO 20% seed 0 "
        r"\(logs: .*/artifacts/logs and ",
        line.text,
    )
    assert not found.outputs
    assert [list(out.data)[-1] for out in bar.outputs] == [run.WIDGET]
    run.clean(nb)
    assert not bar.outputs
    shutil.rmtree(tmp_path / "artifacts")
    nb = executed(tmp_path, monkeypatch, SEEN, "last.get();", BAR, TQDM_DISABLE="1")
    assert not any(cell.outputs for cell in nb.cells)
    shutil.rmtree(tmp_path / "artifacts")
    nb = executed(
        tmp_path, monkeypatch, SEEN, "last.get();", BEYOND_DPO_PROGRESS=str(tmp_path / "reports")
    )
    assert not any(cell.outputs for cell in nb.cells)


def test_an_expectation_counts_what_is_missing_and_what_the_like_took(project, capsys):
    def made(seed, lr=1):
        recipe = {"settings": {"lr": lr}, "seed": seed}
        return artifacts.Artifact("train", 1, recipe, lambda out: None, f"DPO seed {seed} (x): y")

    first = made(0)
    first.get()
    manifest = paths.ARTIFACTS / first.key / "manifest.json"
    manifest.write_text(json.dumps(first.manifest | {"seconds": 200}))
    (paths.ARTIFACTS / "train-damaged").mkdir()
    (paths.ARTIFACTS / "train-damaged" / "manifest.json").write_text("{")
    artifacts.expect(
        artifacts.Artifact("sweep", 1, {"of": [made(0), made(1), made(2), made(3, lr=2)]}, None)
    )
    said = capsys.readouterr().err
    assert re.match(
        r"computing sweep-\w+ and 3 results that it is made from, trainings: DPO seed 1, DPO seed "
        r"2, "
        r"DPO seed 3; 2 like these took 6 min 40 s \(logs: ",
        said,
    )
    artifacts.expect(made(1))
    assert re.match(
        r"computing train-\w+, trainings: DPO seed 1; 1 like these took 3", capsys.readouterr().err
    )


def test_duration():
    assert [events.duration(s) for s in (45.9, 130, 3600, 11520)] == [
        "45 s",
        "2 min 10 s",
        "1 h 0 min",
        "3 h 12 min",
    ]


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
def test_make_lab_offers_the_kernel_that_has_the_package(tmp_path):
    """A real JupyterLab, on a machine where the user has a `python3` kernel of another
    environment.
    """
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
        assert wait_for(lambda: list((tmp_path / "runtime").glob("jpserver-*.json")), 60)
        (server,) = (tmp_path / "runtime").glob("jpserver-*.json")
        about = json.loads(server.read_text())
        with urllib.request.urlopen(
            f"{about['url']}api/kernelspecs?token={about['token']}"
        ) as answer:
            kernels = json.load(answer)
        assert kernels["default"] == "python3"
        assert kernels["kernelspecs"]["python3"]["spec"]["argv"][0] != "/bin/false"
    finally:
        os.killpg(lab.pid, signal.SIGKILL)
        lab.wait()


def cpu_notebook(project, *cells):
    """Write notebook 12 with profile cpu as its default: smoke draws elsewhere anyway."""
    path = notebook(project / "notebooks" / "12_expo_drawn.ipynb", *cells)
    path.write_text(path.read_text().replace('profile = \\"smoke', 'profile = \\"cpu'))
    return path


@pytest.mark.parametrize("mode", ["auto", "cold"])
def test_a_run_that_is_not_to_be_committed_leaves_the_projects_figures_alone(project, mode):
    """`make reproduce` at default parameters drew float32 over the committed figures, under the
    same stamp.
    """
    cpu_notebook(project, DRAWN, CLAIM)
    assert start(project, "12", COMPUTE=mode).wait(60) == 0
    assert not (project / "figures").exists() and not (project / "data").exists()
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


def test_what_needs_asks_of_the_environment_is_refused_in_one_line(project, capsys, monkeypatch):
    """The number of nodes is asked for the launcher of the profile, after the configuration was
    loaded.
    """
    notebook(
        project / "notebooks" / "11_expo_a.ipynb",
        SETUP.replace("import nothing_that_is_installed\n", ""),
    )

    def wrong(cfg):
        raise ValueError("SLURM_NNODES=x is not a whole number above 0")

    monkeypatch.setattr(needs, "check", wrong)
    assert run.main(["11"]) == 2
    assert (
        capsys.readouterr().err
        == "refused: 11_expo_a: SLURM_NNODES=x is not a whole number above 0\n"
    )


def test_a_dry_run_tells_of_a_hostfile_that_is_not_there(project, capsys, monkeypatch):
    setup = "from beyond_dpo.pipeline import config\ncfg = config.load('expo', profile)"
    notebook(project / "notebooks" / "11_expo_a.ipynb", setup)
    monkeypatch.setenv("BEYOND_DPO_HOSTFILE", str(project / "none"))
    assert run.main(["11", "--dry-run"]) == 0
    assert "  is refused: BEYOND_DPO_HOSTFILE=" in capsys.readouterr().out


def test_a_run_whose_table_has_no_place_ends_as_ever(project):
    """`make reproduce > log` on a full disk: no traceback, and the status is that of the
    notebooks.
    """
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


def test_planning_that_takes_a_while_says_so(project, capsys, monkeypatch):
    monkeypatch.delenv("TQDM_DISABLE")
    monkeypatch.setattr(events, "SLOW", 0.1)
    monkeypatch.setattr(run, "_plan", lambda options: time.sleep(0.5) or [])
    assert run.main(["--all", "--dry-run"]) == 0
    assert capsys.readouterr().err == "planning: looking at what is there for each notebook\n"


WATCHED = """
from beyond_dpo.pipeline import gather
list(gather.watched(range(3), "points"));
"""


def test_the_bar_of_a_long_cell_is_a_widget_in_jupyterlab(tmp_path, monkeypatch):
    """A text bar would be left in the saved outputs."""
    nb = executed(tmp_path, monkeypatch, WATCHED)
    assert [list(out.data)[-1] for cell in nb.cells for out in cell.outputs] == [run.WIDGET]


def test_the_bar_of_a_long_cell_ends_no_work_on_a_full_disk():
    environment = {name: value for name, value in os.environ.items() if name != "TQDM_DISABLE"}
    code = "from beyond_dpo.pipeline import gather\nprint(*gather.watched(range(3), 'points'))"
    with open("/dev/full", "wb") as full:
        command = [sys.executable, "-c", code]
        done = subprocess.run(
            command, env=environment, stdout=subprocess.PIPE, stderr=full, text=True
        )
    assert (done.returncode, done.stdout) == (0, "0 1 2\n")


def test_only_one_module_draws_progress_bars():
    """It knows where a bar is a widget, where there is none, and that its errors end no work."""
    files = sorted((paths.LIBRARY / "beyond_dpo").rglob("*.py"))
    assert len(files) > 40
    assert [
        file.stem for file in files if re.search("import.* tqdm", file.read_text(encoding="utf-8"))
    ] == ["events"]


def test_an_expectation_without_the_like_is_what_the_profile_says(project, capsys):
    """A fresh clone has no training behind it: data/frozen holds none."""

    def made(seed):
        recipe = {"settings": {"lr": 1}, "seed": seed}
        return artifacts.Artifact("train", 1, recipe, lambda out: None, f"DPO seed {seed} (x): y")

    both = artifacts.Artifact("sweep", 1, {"of": [made(0), made(1)]}, None, hours=0.5)
    artifacts.expect(both)
    said = capsys.readouterr().err
    assert (
        "trainings: DPO seed 0, DPO seed 1; a whole notebook takes about 0.5 h by its profile "
        "(logs: " in said
    )
    made(0).get()  # of which nobody says that it took no time: there is a like one now
    artifacts.expect(both)
    said = capsys.readouterr().err
    assert "; 1 like these took " in said and "by its profile" not in said
    quick = artifacts.Artifact("table", 1, {}, None, hours=0.5)
    artifacts.expect(quick)
    assert " h by its profile" not in capsys.readouterr().err, "nothing that takes long is missing"


def test_every_experiment_knows_what_its_profile_says_of_the_time():
    files, known = sorted(paths.NOTEBOOKS.glob("*.ipynb")), 0
    for path in files:
        nb = nbformat.read(path, 4)
        cfg, named = progress.planned(nb, run.parameters(nb, path.stem))
        for one in [
            one for one in named if any(job.stage == "train" for job in one.upstream.values())
        ]:
            assert one.hours == cfg.needs.hours > 0, (path.stem, one.stage)
            known += 1
    assert known > 15


SCRIPT = """
from beyond_dpo.pipeline.artifacts import Artifact
made = Artifact("train", 1, {"seed": 0}, lambda out: None, "DPO seed 0 (x): y")
made.get(), made.get()
"""


def test_a_plain_script_is_told_what_is_computed(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TQDM_DISABLE"}
    environment |= {"BEYOND_DPO_ARTIFACTS": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stderr.count("\n") == 1
    assert re.match(r"computing train-\w{16}, trainings: DPO seed 0 \(logs: ", done.stderr)
