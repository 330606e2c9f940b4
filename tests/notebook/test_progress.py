"""How far a run is, as it is shown: one line of the runner, one bar in JupyterLab."""

import json
import os
import re
import shutil
import subprocess
import sys

import nbformat
import pytest

from beyond_dpo import events
from beyond_dpo.machine import paths
from beyond_dpo.notebook import kernels, progress, run
from beyond_dpo.pipeline import artifacts


def artifact(stage, seed, lr=1):
    """Return a result of a child process, that nothing has computed."""
    recipe = {"settings": {"lr": lr}, "seed": seed}
    return artifacts.Artifact(stage, 1, recipe, lambda out: None, f"{stage} seed {seed} (x): y")


@pytest.fixture
def heard(monkeypatch):
    """Return a Progress that listens, at its second notebook, and shows every line."""
    monkeypatch.setattr(progress, "EVERY_SECONDS", {True: 0, False: 0})
    shown = progress.Progress(progress.Timetable({}))
    shown.begin("[2/3] 11_expo_headline")
    with events.listening(shown.hear):
        yield shown


TRAIN = f"train-{'ab12cd' + '0' * 10}"
SCORE = f"score-{'1' * 16}"


def test_a_line_tells_which_result_is_made_and_how_far_it_is(heard, capsys):
    events.tell(event="start", stage="train", key=TRAIN)
    assert heard.line() == "[2/3] 11_expo_headline · train-ab12cd · for 0 s"
    events.tell(event="progress", stage="DPO 20 %", fraction=0.434, eta=130.2)
    line = "[2/3] 11_expo_headline · train-ab12cd · DPO 20 % · 43 % · 2 min 10 s left"
    assert heard.line() == line
    assert capsys.readouterr().err.splitlines()[-1] == line
    events.tell(event="done", stage="train", key=TRAIN, seconds=1.0)
    assert heard.line() == "[2/3] 11_expo_headline"


def test_a_line_tells_which_cell_runs(heard):
    heard.executes("cell 4 of 9")
    assert heard.line() == "[2/3] 11_expo_headline · cell 4 of 9"


def test_work_outside_of_any_result_is_told_until_it_ends(heard):
    events.tell(event="progress", stage="starting", fraction=0.5, eta=None)
    assert "starting · 50 % · for 0 s" in heard.line()
    events.tell(event="progress", stage="starting", fraction=1, eta=0)
    assert heard.line() == "[2/3] 11_expo_headline"


def test_results_are_counted_for_each_notebook(heard):
    events.tell(event="hit", stage="score", key=SCORE)
    events.tell(event="start", stage="train", key=TRAIN)
    events.tell(event="done", stage="train", key=TRAIN, seconds=1.0)
    events.tell(event="hit", stage="train", key=TRAIN)
    assert (heard.computed, heard.found - heard.computed) == ({TRAIN}, {SCORE})
    heard.begin("[3/3] 12_expo_interpolation")
    assert not heard.computed and not heard.found


@pytest.mark.parametrize(
    "report", [{}, {"event": 5, "key": ["a"]}, {"event": "progress", "fraction": "x"}]
)
def test_a_report_that_cannot_be_read_ends_no_work(heard, report):
    events.tell(**report)
    events.tell(event="hit", stage="score", key=SCORE)
    assert heard.found == {SCORE}


def test_without_a_listener_nothing_is_told(monkeypatch):
    monkeypatch.delenv("TQDM_DISABLE")
    assert not events.quiet()
    events.tell(event="hit")
    with events.listening(print):
        assert events.quiet()
    assert not events.quiet()


def test_the_time_that_is_left_is_that_of_the_like(folders):
    """A result of the same stage and settings took so long in this run, else in an earlier one."""
    first, second, third, other = (artifact("train", seed) for seed in range(4))
    other = artifact("train", 0, lr=2)
    table = progress.Timetable({made.key: made for made in (first, second, third, other)})
    assert table.left() == (0, 4), "nothing like them was ever made"
    table.finished(first.key, 30.0)
    assert table.left() == (60, 1)
    table.finished(second.key, 50.0)
    assert table.left() == (40, 1), "the mean of what was measured"
    table.finished(third.key, None)
    assert table.left() == (0, 1), "one was found"


def test_the_time_that_is_left_is_known_from_an_earlier_run(folders):
    made = artifact("train", 0)
    made.get()
    manifest = paths.ARTIFACTS / made.key / "manifest.json"
    manifest.write_text(json.dumps(made.manifest | {"seconds": 200}))
    missing = artifact("train", 1)
    table = progress.Timetable({missing.key: missing})
    assert table.left() == (200, 0)
    listening = progress.Progress(table)
    assert listening.line() == "all: about 3 min 20 s"


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
        for name, value in (
            {"BEYOND_DPO_ARTIFACTS": str(folder / "artifacts")} | environment
        ).items():
            patch.setenv(name, value)
        NotebookClient(
            nb,
            km=kernels.OwnKernelManager(kernel_name="python3"),
            resources={"metadata": {"path": str(folder)}},
        ).execute()
    return nb


def test_in_jupyterlab_one_line_tells_what_is_computed_and_a_bar_how_far(tmp_path, monkeypatch):
    """Nothing is told of what is found; the widget is dropped when a notebook is cleaned."""
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


def test_an_expectation_counts_what_is_missing_and_what_the_like_took(folders, capsys):
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


def test_an_expectation_without_the_like_is_what_the_profile_says(folders, capsys):
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


def test_duration():
    assert [events.duration(s) for s in (45.9, 130, 3600, 11520)] == [
        "45 s",
        "2 min 10 s",
        "1 h 0 min",
        "3 h 12 min",
    ]
