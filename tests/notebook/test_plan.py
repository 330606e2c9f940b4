"""What the runner would do: the notebooks and parameters that are meant, and what it refuses."""

import os
import shutil
import subprocess
import sys
import time

import nbformat
import pytest
from projects import notebook

from beyond_dpo import events
from beyond_dpo.machine import paths
from beyond_dpo.notebook import plan, run
from beyond_dpo.pipeline import artifacts, config, needs


def test_find(folders, tmp_path):
    for name in ("00_start_here", "11_expo_headline", "12_expo_search", "90_playground"):
        notebook(folders / "notebooks" / f"{name}.ipynb")
    other = notebook(tmp_path / "elsewhere" / "mine.ipynb")
    assert [p.stem for p in plan.find(["11", "12_expo_search"])] == [
        "11_expo_headline",
        "12_expo_search",
    ]
    assert plan.find([str(other)]) == [other]
    assert [p.stem[:2] for p in plan.find([])] == ["11", "12", "90", "00"], (
        "the scoreboard comes last"
    )
    notebook(folders / "notebooks" / "21_mallows_bandit.ipynb")
    assert [p.stem[:2] for p in plan.find([])][0] == "21", "what takes seconds comes first"
    for wrong in ("1", "11_expo", "13", "11_expo_headlin"):
        if wrong == "11_expo":
            assert plan.find([wrong])[0].stem == "11_expo_headline"
            continue
        with pytest.raises(plan.Refused, match=f"{wrong}: fits 0 notebooks"):
            plan.find([wrong])
    notebook(folders / "notebooks" / "11_expo_second.ipynb")
    with pytest.raises(plan.Refused, match="11: fits 2 notebooks"):
        plan.find(["11"])


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
    assert plan.parameters(nbformat.read(notebook(tmp_path / "n.ipynb"), 4), "n") == DECLARED
    negative = (
        "a = -1\nb = {'x': [1, None]}\nc: int = 3\n\n# comment with = inside\nd = [\n"
        "    0.0,  # first\n    1.0,\n]"
    )
    read = plan.parameters(
        nbformat.read(notebook(tmp_path / "n.ipynb", parameters=negative), 4), "n"
    )
    assert read == {"a": -1, "b": {"x": [1, None]}, "c": 3, "d": [0.0, 1.0]}
    assert (
        plan.parameters(nbformat.read(notebook(tmp_path / "n.ipynb", parameters=None), 4), "n")
        == {}
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
    with pytest.raises(plan.Refused, match=f"^n: .*{message}"):
        plan.parameters(nb, "n")


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
    assert plan.check("n", DECLARED, {name: text}) == {name: value}
    assert type(plan.check("n", DECLARED, {name: text})[name]) is type(value)


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
    with pytest.raises(plan.Refused, match=message):
        plan.check("n", DECLARED, {name: text})
    with pytest.raises(plan.Refused, match="it declares none"):
        plan.check("n", {}, {name: text})


def test_command_line_refuses_before_anything_runs(folders, capsys):
    notebook(folders / "notebooks" / "11_expo_a.ipynb")
    notebook(folders / "notebooks" / "12_expo_b.ipynb", parameters="seed = 0")
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
    assert not (folders / "artifacts").exists()


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
    folders, capsys, monkeypatch
):
    """Types that a default of None does not tell, COMPUTE, and what cannot be frozen or read."""
    notebook(folders / "notebooks" / "11_expo_a.ipynb", SETUP, parameters=FREE)
    (folders / "notebooks" / "12_expo_b.ipynb").write_text("half a noteb")
    (folders / "notebooks" / "13_expo_c.ipynb").write_text("[]")
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
        (["11"], {"BEYOND_DPO_HOSTFILE": str(folders / "none")}, "BEYOND_DPO_HOSTFILE="),
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
    assert not (folders / "artifacts").exists() and not (folders / "data").exists()


def test_what_needs_asks_of_the_environment_is_refused_in_one_line(folders, capsys, monkeypatch):
    """The number of nodes is asked for when the launcher of the profile is known."""
    notebook(
        folders / "notebooks" / "11_expo_a.ipynb",
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


LARGE = """
from beyond_dpo.pipeline import config
from beyond_dpo.pipeline.artifacts import Artifact
cfg = config.load("expo", profile)
made = Artifact("score", 1, {}, lambda out: None)
"""


@pytest.fixture
def large(folders, monkeypatch):
    """Return the plan of a notebook whose profile is too large for this machine."""
    monkeypatch.setattr(needs, "cards", lambda: 0)
    path = notebook(folders / "notebooks" / "11_expo_a.ipynb", LARGE, "made.get()")
    changes = {"profile": "paper"}
    return plan.Plan(path, nbformat.read(path, 4), changes, DECLARED | changes)


def test_a_profile_that_is_too_large_for_this_machine_is_refused_where_it_would_compute(
    large, folders, capsys
):
    assert run.main(["11", "--profile", "paper"]) == 2
    errors = capsys.readouterr().err
    assert "refused: 11_expo_a: profile paper needs 8 GPUs of 80 GB (found 0)" in errors
    assert errors.count("\n") == 1
    assert not (folders / "artifacts").exists()
    plan.check_setup(large, force=True)


def test_what_was_computed_elsewhere_is_shown_on_any_machine(large, monkeypatch):
    artifacts.Artifact("score", 1, {}, lambda out: None).get()
    plan.check_setup(large)
    monkeypatch.setenv("COMPUTE", "never")
    shutil.rmtree(paths.ARTIFACTS)
    plan.check_setup(large)
    monkeypatch.setenv("COMPUTE", "cold")
    with pytest.raises(plan.Refused, match="11_expo_a: profile paper needs 8 GPUs"):
        plan.check_setup(large)


def test_the_configuration_of_every_notebook_is_known_without_running_it():
    """As the notebook itself makes it, and without what the set-up imports."""
    files, found = sorted(paths.NOTEBOOKS.glob("*.ipynb")), {}
    assert len(files) > 20
    for path in files:
        nb = nbformat.read(path, 4)
        found[path.stem] = plan.configuration(
            nb, plan.parameters(nb, path.stem) | {"profile": "smoke"}
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


def test_dry_run_describes_and_executes_nothing(folders, capsys):
    setup = (
        "from beyond_dpo.pipeline import config, expo, stages\n"
        "cfg = config.load('expo', profile, train__lr=lr)"
    )
    made = "part = stages.aligned(cfg, 0.1, seed)\npart.get()\n1 / 0"
    notebook(folders / "notebooks" / "00_start_here.ipynb", "1", parameters=None)
    notebook(folders / "notebooks" / "11_expo_a.ipynb", setup, made, "1 / 0")
    notebook(
        folders / "notebooks" / "15_expo_b.ipynb",
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
    assert not (folders / "artifacts").exists() and not os.environ.get("COMPUTE")


def test_a_dry_run_tells_of_a_hostfile_that_is_not_there(folders, capsys, monkeypatch):
    setup = "from beyond_dpo.pipeline import config\ncfg = config.load('expo', profile)"
    notebook(folders / "notebooks" / "11_expo_a.ipynb", setup)
    monkeypatch.setenv("BEYOND_DPO_HOSTFILE", str(folders / "none"))
    assert run.main(["11", "--dry-run"]) == 0
    assert "  is refused: BEYOND_DPO_HOSTFILE=" in capsys.readouterr().out


def test_planning_that_takes_a_while_says_so(folders, capsys, monkeypatch):
    monkeypatch.delenv("TQDM_DISABLE")
    monkeypatch.setattr(events, "SLOW", 0.1)
    monkeypatch.setattr(plan, "plan", lambda options: time.sleep(0.5) or [])
    assert run.main(["--all", "--dry-run"]) == 0
    assert capsys.readouterr().err == "planning: looking at what is there for each notebook\n"


def test_every_experiment_knows_what_its_profile_says_of_the_time():
    files = sorted(paths.NOTEBOOKS.glob("*.ipynb"))
    known = 0
    for path in files:
        content = nbformat.read(path, 4)
        cfg, results = plan.planned(content, plan.parameters(content, path.stem))
        for result in results:
            if any(artifact.stage == "train" for artifact in result.upstream.values()):
                assert result.hours == cfg.needs.hours > 0, (path.stem, result.stage)
                known += 1
    assert known > 15


NOT_OURS = "raise SystemExit('a cell ran outside of its kernel')"


def test_cells_of_a_notebook_without_a_configuration_are_not_executed_by_the_runner(folders):
    """Whoever runs a notebook of their own expects its cells to run once, in the kernel."""
    path = notebook(folders / "notebooks" / "11_expo_a.ipynb", NOT_OURS)
    run.compute(plan.Plan(path, nbformat.read(path, 4), {}, DECLARED))


ON_THE_HUB = """
from beyond_dpo.pipeline import assets, config
from beyond_dpo.pipeline.artifacts import Artifact
cfg = config.load("expo", "smoke")
made = Artifact("score", 1, {"model": assets.resolve("org/name@" + 40 * "a")}, lambda out: None)
"""


@pytest.mark.parametrize("mode", ["auto", "cold"])
def test_what_is_computed_beforehand_has_the_key_that_the_notebook_asks_for(
    folders, monkeypatch, mode
):
    """With models on the hub it had that of a dry run, so the kernel computed all of it again."""
    monkeypatch.setenv("COMPUTE", mode)
    path = notebook(folders / "notebooks" / "11_expo_a.ipynb", ON_THE_HUB, "made.get()")
    run.compute(plan.Plan(path, nbformat.read(path, 4), {}, DECLARED))
    model = {"repo": "org/name", "commit": 40 * "a"}
    asked_for = artifacts.Artifact("score", 1, {"model": model}, print)
    assert not asked_for.missing()
