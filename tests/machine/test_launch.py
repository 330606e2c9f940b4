"""Child processes, real ones with every launcher.

None survives its parent, an interrupt, or a failure of its own.
"""

import ast
import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from types import SimpleNamespace

import pytest

from beyond_dpo import events
from beyond_dpo.machine import launch, paths, spread
from conftest import alive, wait_for
from faults import disk, filled

JOB = """
import json, os, subprocess, sys, time
from beyond_dpo import events
from beyond_dpo.machine import launch

launch.follow_parent()
config = json.load(open(sys.argv[1]))
rank = os.environ.get("RANK", "0")
if "note" in config:
    open(config["note"] + rank, "w").write(json.dumps(dict(os.environ)))
for step in range(config.get("steps", 0)):
    time.sleep(0.7)
    events.progress(step + 1, config["steps"])
if "say" in config:
    print(config["say"], flush=True)
if "fail" in config:
    error = ValueError(config["fail"])
    for i in range(config.get("notes", 0)):
        error.add_note(f"{rank}.{i}")
    while "notes" in config and not all(os.path.exists(config["note"] + r) for r in "01"):
        pass  # both fail together
    raise error
if "hang" in config:
    below = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
    open(config["hang"] + rank, "w").write(f"{os.getpid()} {below.pid}")
    time.sleep(300)
"""
WORKER = """
import os, time
from beyond_dpo import events
from beyond_dpo.machine import launch

class Counter:
    def __init__(self, start, wait=0):
        time.sleep(wait)
        self.value = 10 // start
    def add(self, n):
        self.value += n
        return {"value": self.value}
    def size(self, text):
        return [len(text), text[-1]]
    def echo(self, n):
        return "y" * n
    def fail(self):
        return {}["no such key"]
    def odd(self):
        return object()
    def die(self):
        print("about to die", flush=True)
        os._exit(3)
    def hang(self):
        time.sleep(300)
    def slow(self):
        for i in range(4):
            time.sleep(0.7)
            events.progress(i + 1, 4)
    def say(self, text):
        print(text, flush=True)

launch.serve(Counter)
"""
PARENT = """
import json, sys, time
from pathlib import Path
from beyond_dpo.machine import launch

pids, work, launcher, processes = sys.argv[1:]
try:
    how = {"launcher": launcher, "processes": int(processes)}
    launch.run("a_job", {"hang": pids}, Path(work), desc="job", **how)
except launch.JobFailed as failure:
    print(failure, flush=True)
    time.sleep(300)
"""


@pytest.fixture(autouse=True)
def modules(tmp_path, monkeypatch):
    """Put the modules that the children run where they find them."""
    for name, text in {"a_job": JOB, "a_worker": WORKER, "a_parent": PARENT}.items():
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ['PYTHONPATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)


def worker(tmp_path, start=2):
    return launch.Worker("a_worker", {"start": start}, tmp_path / "logs", desc="counter")


def parent_of_hanging_job(tmp_path, launcher="plain", processes=1):
    """Start a Python that runs `launch.run`; return it and the process ids below it.

    Those are jobs and their own children.
    """
    arguments = [str(tmp_path / "pids"), str(tmp_path / "work"), launcher, str(processes)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    parent = subprocess.Popen([sys.executable, "-m", "a_parent", *arguments], text=True, **pipes)
    files = [tmp_path / f"pids{rank}" for rank in range(processes)]
    wait_for(lambda: all(f.exists() and len(f.read_text().split()) == 2 for f in files))
    pids = [int(pid) for f in files for pid in f.read_text().split()]
    assert len(pids) == 2 * processes and all(map(alive, pids))
    return parent, pids


# ---- command lines


def test_commands(tmp_path, monkeypatch):
    config = tmp_path / "c.json"
    assert launch.command("m", config) == [sys.executable, "-m", "m", str(config)]
    assert launch.command("m", config, launcher="torchrun", processes=2) == [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--rdzv_backend",
        "c10d",
        "--rdzv_endpoint",
        "localhost:0",
        "-m",
        "m",
        str(config),
    ]
    monkeypatch.setenv(
        "CUDA_VISIBLE_DEVICES", "5,2,7"
    )  # says nothing about the machine that a command is printed for
    rest = ["--no_local_rank", "--module", "m", str(config)]
    line = launch.command("m", config, launcher="deepspeed", processes=2)
    assert line == [
        sys.executable,
        "-m",
        "deepspeed.launcher.runner",
        "--num_accelerators",
        "2",
        *rest,
    ]
    line = launch.command("m", config, launcher="deepspeed", processes=2, now=True)
    assert line[3:6] == ["--include", "localhost:5,2", "--master_port"] and line[7:] == rest
    assert 1024 <= int(line[6]) < 65536
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    line = launch.command("m", config, launcher="deepspeed", processes=2, now=True)
    assert line[3:6] == ["--num_accelerators", "2", "--master_port"]


@pytest.mark.parametrize(
    "launcher, processes, visible, message",
    [
        ("plain", 2, "", "plain"),
        ("mpi", 1, "", "mpi"),
        ("deepspeed", 2, "3", "=3"),
        ("deepspeed", 1, "MIG-1", "MIG"),
    ],
)
def test_impossible_commands(tmp_path, monkeypatch, launcher, processes, visible, message):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(ValueError, match=message):
        launch.command("m", tmp_path, launcher=launcher, processes=processes, now=True)


# ---- run


@pytest.fixture
def reports():
    """Return the list of what this process reports, but that a child is waited for."""
    heard = []

    def listener(**report):
        if report["event"] != "alive":
            heard.append(report)

    with events.listening(listener):
        yield heard


def test_run_tells_how_far_it_is(tmp_path, reports):
    """Four steps of 0.7 s each: the first, some of the others, and the last, which is 1."""
    note = str(tmp_path / "note")
    launch.run("a_job", {"steps": 4, "note": note}, tmp_path / "work", desc="counting")
    assert {(r["event"], r["stage"]) for r in reports} == {("progress", "counting")}
    fractions = [r["fraction"] for r in reports]
    assert 2 <= len(fractions) <= 4 and fractions[-1] == 1 and fractions == sorted(set(fractions))
    assert reports[0]["eta"] > 0 == reports[-1]["eta"]
    environment = json.loads((tmp_path / "note0").read_text())
    assert environment["TQDM_DISABLE"] == "1" and "RANK" not in environment
    assert int(environment["OMP_NUM_THREADS"]) == len(os.sched_getaffinity(0))


def test_a_failing_job_raises_with_its_traceback_and_not_an_older_one(tmp_path):
    for attempt in ("first", "second"):
        with pytest.raises(launch.JobFailed) as failure:
            launch.run(
                "a_job",
                {"say": f"{attempt} try", "fail": f"{attempt} lamp"},
                tmp_path / "work",
                desc="job",
            )
        message = str(failure.value)
        assert (
            "job: a_job ended with status 1" in message and f"ValueError: {attempt} lamp" in message
        )
        assert "job.log" in message and message.count("Traceback") == 1
    log = (tmp_path / "work" / "job.log").read_text()
    assert "first try" in log and "second try" in log  # a resumed job's log holds all attempts


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_launchers_do_not_hide_the_traceback(tmp_path, monkeypatch, launcher):
    """Both end with status 1 and lines of their own.

    Those of torchrun are longer than a usual tail.
    """
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    config = {"note": str(tmp_path / "note"), "fail": "broken lamp"}
    with pytest.raises(launch.JobFailed, match="ended with status 1") as failure:
        launch.run("a_job", config, tmp_path / "work", desc="job", launcher=launcher, processes=2)
    assert "ValueError: broken lamp" in str(failure.value)
    first = json.loads(next(tmp_path.glob("note[01]")).read_text())
    assert first["WORLD_SIZE"] == "2" and first["OMP_NUM_THREADS"] == "1"


@pytest.mark.slow
def test_tracebacks_of_processes_that_fail_together_stay_whole(tmp_path):
    config = {"note": str(tmp_path / "note"), "fail": "broken lamp", "notes": 2000}
    with pytest.raises(launch.JobFailed, match="ValueError: broken lamp"):
        launch.run("a_job", config, tmp_path / "work", desc="job", launcher="torchrun", processes=2)
    log = (tmp_path / "work" / "job.log").read_text()
    for rank in (
        0,
        1,
    ):  # torchrun may end the second before it has said anything, never in the middle of a word
        whole = "ValueError: broken lamp\n" + "".join(f"{rank}.{i}\n" for i in range(2000))
        assert whole in log or f"{rank}.0\n" not in log


def test_without_a_traceback_the_last_lines_are_shown(tmp_path):
    log = tmp_path / "log"
    log.write_text("\n".join(f"line {i}" for i in range(100)))
    assert launch._tail(log).splitlines()[1:] == [f"line {i}" for i in range(75, 100)]
    log.write_text(
        "before\nTraceback (most recent call last):\n" + "\n".join(f"line {i}" for i in range(100))
    )
    shown = launch._tail(log).splitlines()[1:]
    assert (
        shown[0].startswith("Traceback")
        and shown[-1] == "line 99"
        and "before" not in shown
        and len(shown) == 61
    )


@pytest.mark.usefixtures("interrupts")
@pytest.mark.parametrize("launcher, processes", [("plain", 1), ("torchrun", 2)])
def test_ctrl_c_leaves_no_process(tmp_path, launcher, processes):
    parent, pids = parent_of_hanging_job(tmp_path, launcher, processes)
    parent.send_signal(signal.SIGINT)
    _, err = parent.communicate(timeout=20)
    assert parent.returncode and "KeyboardInterrupt" in err
    ours = (
        pids if launcher == "plain" else pids[::2]
    )  # torchrun gives each process a session of its own
    assert not any(map(alive, ours))
    for pid in set(pids) - set(ours):
        with suppress(ProcessLookupError):  # torchrun may have ended them
            os.kill(pid, signal.SIGKILL)


def test_a_killed_parent_takes_its_job_along(tmp_path):
    parent, pids = parent_of_hanging_job(tmp_path)
    parent.kill()
    parent.communicate()
    wait_for(lambda: not alive(pids[0]), 3)
    os.kill(pids[1], signal.SIGKILL)  # a job's own children are the job's business


@pytest.mark.slow
def test_a_killed_launcher_takes_its_processes_along(tmp_path):
    parent, pids = parent_of_hanging_job(tmp_path, "torchrun", 1)
    with open(f"/proc/{pids[0]}/stat") as f:
        launcher = int(f.read().rpartition(")")[2].split()[1])
    os.kill(launcher, signal.SIGKILL)
    wait_for(lambda: not alive(pids[0]), 3)
    assert "ended with status -9" in parent.stdout.readline() and alive(parent.pid)
    parent.kill()
    parent.communicate()
    os.kill(pids[1], signal.SIGKILL)


# ---- Worker


def test_worker_answers_calls_and_lives_on_after_an_exception(tmp_path):
    with worker(tmp_path) as counter:
        assert counter.settings == {"start": 2}
        assert counter.call("add", n=3) == {"value": 8}
        with pytest.raises(launch.JobFailed, match="KeyError: 'no such key'") as failure:
            counter.call("fail")
        assert "Traceback" in str(failure.value) and "in fail" in str(failure.value)
        with pytest.raises(launch.JobFailed, match="not JSON serializable"):
            counter.call("odd")
        with pytest.raises(launch.JobFailed, match="AttributeError"):
            counter.call("subtract")
        with pytest.raises(TypeError, match="not JSON serializable"):
            counter.call("add", n=tmp_path)
        assert counter.call("add", n=1) == {"value": 9}
    assert counter.child.returncode is not None
    with pytest.raises(launch.JobFailed, match="has ended"):
        counter.call("add", n=1)
    counter.close()  # twice does no harm


def test_worker_takes_and_returns_more_than_a_pipe_holds(tmp_path):
    with worker(tmp_path) as counter:
        assert counter.call("size", text="x" * 5_000_000 + "ö\n") == [5_000_002, "\n"]
        assert counter.call("echo", n=5_000_000) == "y" * 5_000_000


def test_worker_whose_object_fails_leaves_no_process(tmp_path):
    before = children()
    with pytest.raises(launch.JobFailed, match="ZeroDivisionError"):
        worker(tmp_path, start=0)
    assert children() == before


def test_worker_that_dies_raises_with_its_log(tmp_path):
    counter = worker(tmp_path)
    with pytest.raises(launch.JobFailed, match=r"(?s)died with status 3.*about to die"):
        counter.call("die")
    with pytest.raises(launch.JobFailed, match="has ended"):
        counter.call("add", n=1)


def test_worker_killed_between_two_calls_raises(tmp_path):
    """Writing to the pipe fails here, and so does closing it with the unwritten rest inside."""
    counter = worker(tmp_path)
    counter.child.kill()
    counter.child.wait()
    with pytest.raises(launch.JobFailed, match="died with status -9"):
        counter.call("add", n=1)


@pytest.mark.slow
def test_worker_reports_progress_of_each_call(tmp_path, reports):
    with worker(tmp_path) as counter:
        counter.call("slow")
        counter.call("add", n=1)  # reports nothing of its own, nor the last call's end
    assert {r["stage"] for r in reports} == {"counter: slow"} and reports[-1]["fraction"] == 1


@pytest.mark.usefixtures("interrupts")
def test_an_interrupted_call_ends_the_worker(tmp_path):
    counter = worker(tmp_path)
    timer = subprocess.Popen(["sh", "-c", f"sleep 1; kill -INT {os.getpid()}"])
    with pytest.raises(KeyboardInterrupt):
        counter.call("hang")
    timer.wait()
    assert not alive(counter.child.pid)


def children():
    with open(f"/proc/self/task/{os.getpid()}/children") as f:
        return {pid for pid in f.read().split() if alive(pid)}


def test_a_second_worker_of_one_name_keeps_the_first_ones_log(tmp_path):
    """Its own end quotes what it said itself, and not what the first one did."""
    with worker(tmp_path) as first:
        first.call("say", text="words of the first")
    second = worker(tmp_path)
    assert second.log == first.log
    with pytest.raises(launch.JobFailed, match="about to die") as failure:
        second.call("die")
    assert "words of the first" not in str(failure.value)
    assert first.log.read_text().split("\n")[:2] == ["words of the first", "about to die"]


SLOW_START = {"start": 2, "wait": 3}


def test_a_worker_that_starts_slowly_says_so(tmp_path, monkeypatch, capsys):
    """Nothing was said for as long as an engine took to load."""
    monkeypatch.delenv("TQDM_DISABLE")
    with launch.Worker("a_worker", SLOW_START, tmp_path / "logs", desc="counter") as counter:
        assert counter.call("add", n=3) == {"value": 8}
    assert capsys.readouterr().err == "starting counter ...\n"


@pytest.mark.slow
def test_a_worker_that_starts_slowly_says_so_to_a_listener(tmp_path, reports, capsys):
    launch.Worker("a_worker", SLOW_START, tmp_path / "logs", desc="counter").close()
    assert reports == [{"event": "progress", "stage": "starting counter ..."}]
    assert capsys.readouterr().err == ""


def test_what_is_quick_says_nothing(monkeypatch, capsys):
    monkeypatch.delenv("TQDM_DISABLE")
    monkeypatch.setattr(events, "SLOW", 0.3)
    with events.slow("quick"):
        pass
    with events.slow("slow"):
        time.sleep(0.6)
    assert capsys.readouterr().err == "slow\n"


# ---- what children get to know of this process


SECRETS = (
    "OPENAI_API_KEY",
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "ANTHROPIC_API_KEY",
    "AWS_SECRET_ACCESS_KEY",
    "AZURE_OPENAI_KEY",
    "VLLM_API_KEY",
    "GITHUB_TOKEN",
    "CLIENT_SECRET",
    "DB_PASSWORD",
)
NEEDED = (
    "HF_HOME",
    "HF_HUB_OFFLINE",
    "TOKENIZERS_PARALLELISM",
    "NCCL_DEBUG",
    "SSH_AUTH_SOCK",
    "VLLM_TARGET_DEVICE",
)


def test_no_child_gets_a_key_or_a_token(tmp_path, monkeypatch):
    """Endpoints are asked and the hub is read by this process.

    The switch of the tokenizers and the like are no secrets.
    """
    for name in SECRETS:
        monkeypatch.setenv(name, "sk-secret")
    for name in NEEDED:
        monkeypatch.setenv(name, "1")
    launch.run("a_job", {"note": str(tmp_path / "note")}, tmp_path / "work", desc="job")
    environment = json.loads((tmp_path / "note0").read_text())
    assert not set(SECRETS) & set(environment) and "sk-secret" not in environment.values()
    assert set(NEEDED) <= set(environment) and os.environ["HF_TOKEN"] == "sk-secret"


def test_no_child_is_handed_the_whole_environment():
    """Whoever makes one for a child begins with launch.without_secrets()."""
    files = sorted((paths.ROOT / "lib" / "beyond_dpo").rglob("*.py"))
    assert len(files) > 40
    whole = re.compile(
        r"os\.environ \| |\*\*os\.environ|os\.environ\.copy|dict\(os\.environ|env=os\.environ"
    )
    assert not [file.name for file in files if whole.search(file.read_text(encoding="utf-8"))]
    assert sum("without_secrets()" in file.read_text(encoding="utf-8") for file in files) == 3


def test_idle_threads_of_children_sleep_unless_the_user_says_otherwise(tmp_path, monkeypatch):
    for name in launch.WAITING:
        monkeypatch.delenv(name, raising=False)
    assert launch._environment(tmp_path / "p", 1, {})["OMP_WAIT_POLICY"] == "PASSIVE"
    for name, value in {
        "OMP_WAIT_POLICY": "ACTIVE",
        "GOMP_SPINCOUNT": "7",
        "KMP_BLOCKTIME": "3",
    }.items():
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            environment = launch._environment(tmp_path / "p", 1, {})
            assert {n: environment[n] for n in launch.WAITING if n in environment} == {name: value}


CORES = len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    "given, want",
    [
        ("4,2", 4),
        ("4", 4),
        (" 3 , 1", 3),
        ("12,6,2", 12),
        (None, CORES),
        ("", CORES),
        ("0", CORES),
        ("four", CORES),
    ],
)
def test_nested_numbers_of_threads_are_understood(tmp_path, monkeypatch, given, want):
    """OMP_NUM_THREADS=4,2 is legal: a number for each level.

    Children get one, as vLLM reads it with int().
    """
    if given is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    assert launch.threads() == want
    assert launch._environment(tmp_path / "p", 2, {})["OMP_NUM_THREADS"] == str(max(1, want // 2))
    engines = SimpleNamespace(decoding=SimpleNamespace(engines=2, tensor_parallel=1))
    assert spread._engine_environment(engines, 1)["OMP_NUM_THREADS"] == str(max(1, want // 2))


def test_a_job_runs_with_nested_numbers_of_threads(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "4,2")
    launch.run("a_job", {"note": str(tmp_path / "note")}, tmp_path / "work", desc="job")
    assert json.loads((tmp_path / "note0").read_text())["OMP_NUM_THREADS"] == "4"


# ---- what tells how far the work is never ends it


def test_work_goes_on_where_nobody_can_be_told_how_far_it_is(tmp_path):
    """A folder stands where the progress should go: the child cannot write it."""
    (tmp_path / "work" / ".progress").mkdir(parents=True)
    launch.run("a_job", {"steps": 2, "say": "done"}, tmp_path / "work", desc="job")
    assert (tmp_path / "work" / "job.log").read_text() == "done\n"


def test_work_goes_on_where_a_listener_fails(tmp_path):
    def broken(**report):
        raise OSError("nobody listens any more")

    with events.listening(broken):
        launch.run("a_job", {"steps": 2, "say": "done"}, tmp_path / "work", desc="job")
    assert (tmp_path / "work" / "job.log").read_text() == "done\n"


@pytest.mark.slow
def test_work_goes_on_where_a_full_disk_takes_no_progress(tmp_path, reports):
    with disk(tmp_path / "disk", 1):
        with filled(tmp_path / "disk"):
            folder = tmp_path / "disk" / "logs"
            counter = launch.Worker("a_worker", {"start": 2}, folder, desc="counter")
            with counter:
                counter.call("slow")
                assert counter.call("add", n=3) == {"value": 8}
        assert counter.progress_file.read_text() == "" and not reports


WRONG = [
    b"",
    b"\n",
    b"1 2",
    b"x y\n",
    b"0 0\n",
    b"-1 4\n",
    b"1 2 3\n",
    b"1.5 2\n",
    b"\xff\xfe\n",
    "² ³\n".encode(),
]


def test_a_damaged_progress_file_is_left_out(tmp_path, reports):
    file = tmp_path / "progress"
    with launch._bar("job", file) as show:
        for wrong in WRONG:
            file.write_bytes(wrong)
            show()
        file.unlink()
        show()
        assert not reports
        file.write_bytes(b"3 4\n")
        show()
    assert [report["fraction"] for report in reports] == [0.75]


def test_progress_left_by_another_job_is_not_shown(tmp_path, reports):
    file = tmp_path / "progress"
    file.write_text("2 4\n")
    with launch._bar("job", file) as show:
        show()
    assert not reports


def test_a_device_that_is_always_full_takes_no_progress_but_ends_nothing(monkeypatch):
    monkeypatch.setenv("BEYOND_DPO_CHILD_PROGRESS", "/dev/full")
    events.progress(1, 2)


# ---- locales


OTHER_LOCALE = """
import sys
from pathlib import Path
from beyond_dpo.machine import launch
from beyond_dpo.notebook import claims
from beyond_dpo.pipeline import config

encoding = sys.stdout.encoding
assert sys.flags.utf8_mode == 0 and encoding.lower() in ("ascii", "ansi_x3.4-1968"), encoding
assert "\u03b2 \u00d7 10" in config.load("expo", "cpu").recipes
work = Path(sys.argv[1])
try:
    launch.run("a_job", {"say": "\u03b1 \u597d", "fail": "\u03b2 lamp"}, work, desc="job")
except launch.JobFailed as failure:
    assert "ValueError: \u03b2 lamp" in str(failure)
assert "\u03b1 \u597d" in (work / "job.log").read_text(encoding="utf-8")
with launch.Worker("a_worker", {"start": 2}, work, desc="w") as worker:
    assert worker.call("size", text="\u03b1") == [1, "\u03b1"]
claims.main([])
"""


def test_files_are_utf8_whatever_the_locale(tmp_path):
    """Keys hold names such as "β × 10": with another encoding they were others, or an error."""
    other = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    (tmp_path / "other.py").write_text(OTHER_LOCALE, encoding="utf-8")
    command = [sys.executable, str(tmp_path / "other.py"), str(tmp_path / "work")]
    done = subprocess.run(command, env=os.environ | other, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    assert b"verdict" in done.stdout


BINARY = ("os.open", "tarfile.open", "Image.open")  # they read bytes


def _of_a_child(node) -> bool:
    """Say whether this is a call whose text=True decodes what a child prints."""
    if not isinstance(node, ast.Call):
        return False
    switched_on = {
        keyword.arg for keyword in node.keywords if getattr(keyword.value, "value", None) is True
    }
    return bool({"text", "universal_newlines"} & switched_on)


def test_no_text_is_read_or_written_in_the_locales_encoding():
    """Every open(), read_text() and write_text() names its encoding, or is of bytes.

    So does what reads a child.
    """
    files = sorted((paths.ROOT / "lib" / "beyond_dpo").rglob("*.py"))
    assert len(files) > 40
    wrong, seen = [], 0
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            name = ast.unparse(node.func).rpartition(".")[2] if isinstance(node, ast.Call) else ""
            if _of_a_child(node) and not {"encoding", None} & {
                keyword.arg for keyword in node.keywords
            }:
                wrong.append(f"{file.name}:{node.lineno}: {ast.unparse(node)}")
            if name not in ("open", "read_text", "write_text") or ast.unparse(node.func) in BINARY:
                continue
            seen += 1
            texts = [
                a.value
                for a in node.args
                if isinstance(a, ast.Constant) and isinstance(a.value, str)
            ]
            bytes_ = name == "open" and any("b" in text for text in texts[-1:])
            named = {keyword.arg for keyword in node.keywords}  # None: given as **options
            if not bytes_ and not named & {"encoding", None}:
                wrong.append(f"{file.name}:{node.lineno}: {ast.unparse(node)}")
    assert seen > 40 and not wrong, wrong


# ---- the modules' own help


HELP = """
import contextlib, io, json, runpy, sys, threading
import psutil

told = {}
for name in sys.argv[1:]:
    sys.argv[:] = [name, "--help"]
    out, err, status = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            runpy.run_module(f"beyond_dpo.{name}", run_name="__main__", alter_sys=True)
        except SystemExit as end:
            status = end.code or 0
        except BaseException as error:
            status = repr(error)
    children = [" ".join(child.cmdline()) for child in psutil.Process().children()]
    told[name] = [status, out.getvalue(), children]
print(json.dumps(told))
"""
FILES = sorted((paths.ROOT / "lib/beyond_dpo").rglob("*.py"))
MODULES = [
    ".".join(path.relative_to(paths.ROOT / "lib/beyond_dpo").with_suffix("").parts)
    for path in FILES
    if "__main__" in path.read_text()
]


@pytest.fixture(scope="module")
def helped():
    """Return {module: [exit status, output, children left]} of --help.

    One process imports all of them.
    """
    command = [sys.executable, "-c", HELP, *MODULES]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_modules_with_a_command_line_are_known():
    assert len(MODULES) == 13, MODULES


@pytest.mark.parametrize("module", MODULES)
def test_help_says_what_a_module_is_for_and_starts_nothing(helped, module):
    status, said, children = helped[module]
    assert status == 0, (status, said)
    assert "usage: " in said and len(said.split()) > 10 and not children


def test_an_interrupted_scoreboard_is_one_line():
    code = "import os, runpy, signal\nfrom beyond_dpo import events\n"
    code += "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    code += "events.printable = lambda: os.kill(os.getpid(), signal.SIGINT)\n"
    code += "runpy.run_module('beyond_dpo.notebook.claims', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (
        done.returncode == 130
        and done.stderr.startswith("interrupted: ")
        and done.stderr.count("\n") == 1
    )
