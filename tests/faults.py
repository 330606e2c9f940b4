"""The parts of the fault suite: a store to kill, a small disk, damage, a count of what survives."""

import hashlib
import http.server
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from beyond_dpo.files import write_file
from beyond_dpo.jobs.settings import CLOCK
from beyond_dpo.pipeline import artifacts

SCRIPT = Path(__file__).with_name("fault_pipeline.py")
ROUNDS = int(os.environ.get("FAULT_ROUNDS", "0"))  # 0: the short form
SEED = int(os.environ.get("FAULT_SEED", "6"))
long_form = pytest.mark.skipif(not ROUNDS, reason="long form only: make faults")


class Store:
    """A folder of results with a cache and reports of its own, and the processes that work on it.

    Each process is started with `environment` besides that of the tests.
    """

    def __init__(self, folder: Path, **environment: str):
        self.folder = folder
        self.artifacts = folder / "artifacts"
        self.artifacts.mkdir(parents=True)
        self.reports = folder / "reports"
        self.reports.touch()
        self.reports_read = 0  # bytes
        self.environment = {
            name: value for name, value in os.environ.items() if not name.startswith("BEYOND_DPO_")
        }
        self.environment.update(environment)
        self.environment["BEYOND_DPO_ARTIFACTS"] = str(self.artifacts)
        self.environment["BEYOND_DPO_CACHE"] = str(folder / "cache")
        self.environment["BEYOND_DPO_FIGURES"] = str(folder / "figures")
        self.environment["FAULT_REPORTS"] = str(self.reports)

    def start(self, *command, log: str = "log") -> subprocess.Popen:
        """Start a command of Python that works here; its output goes to the file `log`."""
        arguments = [sys.executable, *map(str, command)]
        with open(self.folder / log, "wb") as output:
            return subprocess.Popen(
                arguments,
                env=self.environment,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def log(self, name: str = "log") -> str:
        """Return the output of the last command that was started with this log."""
        return (self.folder / name).read_text(errors="replace")

    def new_events(self) -> list[dict]:
        """Return what has been reported since the last call, whole lines only."""
        with open(self.reports, "rb") as file:
            file.seek(self.reports_read)
            lines = file.readlines()
        events = []
        for line in lines:
            if line.endswith(b"\n"):
                self.reports_read += len(line)
                events.append(json.loads(line))
        return events

    def started_stages(self) -> list[str]:
        """Return the stages that began since the last call of this or of `new_events`."""
        return [event["stage"] for event in self.new_events() if event["event"] == "start"]

    def reaches(self, stage: str, child: subprocess.Popen, seconds: float = 300) -> bool:
        """Wait until a stage starts; return False if the process ended before."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            ended = child.poll() is not None  # before reading, so that nothing is missed
            if stage in self.started_stages():
                return True
            if ended:
                return False
            time.sleep(0.005)
        raise AssertionError(f"{stage} was not reached: {self.log()[-2000:]}")

    def processes(self) -> list[psutil.Process]:
        """Return all living processes that work here, whoever is their parent now."""
        return [process for process in psutil.process_iter() if self._is_at_work(process)]

    def _is_at_work(self, process: psutil.Process) -> bool:
        with suppress(psutil.Error):
            folder = process.environ().get("BEYOND_DPO_ARTIFACTS")
            return folder == str(self.artifacts) and process.status() != psutil.STATUS_ZOMBIE
        return False

    def falls_idle(self, seconds: float = 10) -> bool:
        """Return whether all processes end, waiting for so long at most."""
        end = time.monotonic() + seconds
        while self.processes():
            if time.monotonic() > end:
                return False
            time.sleep(0.1)
        return True

    def kill(self) -> None:
        """End all at once with kill -9, as when the memory or the power is gone."""
        processes = self.processes()
        while processes:
            for process in processes:
                with suppress(psutil.Error):
                    process.kill()
            psutil.wait_procs(processes, timeout=5)
            processes = self.processes()

    def published(self) -> dict[str, bytes]:
        """Return {key: manifest} of finished results; raise DamagedArtifact if one is damaged."""
        artifacts._hashes.clear()  # as a new process
        manifests = {}
        for path in self.artifacts.glob("*/manifest.json"):
            key = path.parent.name
            if not key.endswith(".partial"):
                manifests[key] = path.read_bytes()
        for key in manifests:
            artifacts._verify(self.artifacts / key, key)
        return manifests

    def contents(self) -> dict[str, dict[str, str]]:
        """Return {key: {file: sha256}} of what is finished, without the clock in training logs."""
        hashes = {}
        for key, manifest in self.published().items():
            files = json.loads(manifest)["files"]
            hashes[key] = {name: entry["sha256"] for name, entry in files.items()}
            if "log.jsonl" in files:
                hashes[key]["log.jsonl"] = _digest_without_clock(self.artifacts / key / "log.jsonl")
        for built in (self.folder / "cache").glob("*/.sha256.json"):
            hashes[built.parent.name] = json.loads(built.read_text())
        return hashes


def _digest_without_clock(log: Path) -> str:
    """Return the digest of a training's log without the speeds in it."""
    steps = []
    for line in log.read_text().splitlines():
        step = json.loads(line)
        steps.append({name: value for name, value in step.items() if name not in CLOCK})
    return artifacts.digest(steps)


def damage(folder: Path, rng) -> str:
    """Break one file of a finished result as disks and people do; return how."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
    path = rng.choice(files)
    content = bytearray(path.read_bytes())
    kind = rng.choice(["byte flipped", "cut off", "gone", "emptied", "header length"])
    if kind == "header length" and path.suffix != ".safetensors":
        kind = "byte flipped"
    if kind == "byte flipped":
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif kind == "cut off":
        del content[rng.randrange(len(content)) :]
    elif kind == "emptied":
        content.clear()
    elif kind == "header length":
        content[:8] = (1 << 40).to_bytes(8, "little")
    if kind == "gone":
        path.unlink()
    else:
        path.write_bytes(content)
    return f"{path.name} {kind}"


@contextmanager
def disk(folder: Path, megabytes: float):
    """Mount a small disk at `folder`; skip the test where that is not allowed."""
    folder.mkdir(parents=True, exist_ok=True)
    size = f"size={int(megabytes * 2**20)}"
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", size, "tmpfs", folder], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"no disk can be mounted here: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


@contextmanager
def filled(folder: Path):
    """Leave no byte free on the disk of `folder`."""
    filler = folder / "filler"
    with open(filler, "wb", buffering=0) as file, suppress(OSError):
        almost_all = shutil.disk_usage(folder).free - 2**20
        os.posix_fallocate(file.fileno(), 0, max(1, almost_all))
        file.seek(0, os.SEEK_END)
        while True:
            file.write(b"x" * 4096)
    assert shutil.disk_usage(folder).free == 0
    try:
        yield
    finally:
        filler.unlink()


class Endpoint(http.server.ThreadingHTTPServer):
    """An OpenAI-compatible endpoint on a bad day.

    Of twelve requests one is refused, one fails and one gets no answer. What it says depends on the
    prompt alone.

    Attributes:
        answered: {prompt: how often it was answered}.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answered = Counter()
        self.requests = 0
        self.lock = threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def handle_error(self, *_) -> None:
        """Say nothing: those who ask are killed in the middle."""


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        length = int(self.headers["Content-Length"])
        request = json.loads(self.rfile.read(length))
        prompt = request["messages"][0]["content"]
        trouble = self._trouble(prompt)
        time.sleep(0.1)
        if trouble == "hang up":
            self.connection.shutdown(socket.SHUT_RDWR)
        elif trouble:
            self._send(trouble, {"error": {"message": "a bad day"}})
        else:
            self._send(200, _completion(prompt, request.get("n", 1)))

    def _trouble(self, prompt: str) -> int | str | None:
        """Count a request; return an HTTP status, "hang up", or None if it is to be answered."""
        with self.server.lock:
            self.server.requests += 1
            trouble = {1: 429, 5: 503, 9: "hang up"}.get(self.server.requests % 12)
            if trouble is None:
                self.server.answered[prompt] += 1
        return trouble

    def _send(self, status: int, content: dict) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("retry-after-ms", "20")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_) -> None:
        """Say nothing."""


def _completion(prompt: str, n: int) -> dict:
    """Return n replies that follow from the prompt, in the format of the OpenAI API."""
    text = hashlib.sha256(prompt.encode()).hexdigest()
    choices = []
    for i in range(n):
        message = {"role": "assistant", "content": text[i:]}
        choices.append({"index": i, "finish_reason": "stop", "message": message})
    return {
        "id": "x",
        "object": "chat.completion",
        "created": 0,
        "model": "served",
        "choices": choices,
    }


def descendants(pid: int) -> list[psutil.Process]:
    """Return a process' children and theirs; none if it is gone."""
    with suppress(psutil.Error):
        return psutil.Process(pid).children(recursive=True)
    return []


def stop(child: subprocess.Popen) -> None:
    """End a process alone with kill -9."""
    child.kill()
    child.wait(30)


def summary(terminalreporter) -> None:
    """Print how many faults were tried and survived.

    Write it with the machine to the file that FAULTS_TO names.
    """
    reports = [
        report
        for group in terminalreporter.stats.values()
        for report in group
        if isinstance(report, pytest.TestReport)
    ]
    calls = [report for report in reports if report.when == "call"]
    tried = Counter(_recorded(calls, "fault tried"))
    # A hostile input whose test failed before it counted anything was tried as well.
    for report in calls:
        if report.failed and not report.user_properties and "hostile" in report.nodeid:
            tried[report.nodeid] += 1
    # A test compares all hashes at its end: only what it counts if it passes has survived.
    passed = [report for report in calls if report.passed]
    survived = Counter(_recorded(passed, "fault survived"))
    lost = sum(_recorded(calls, "results lost"))
    if not tried:
        return
    terminalreporter.write_line(
        f"faults tried {tried.total()}, survived {survived.total()}, finished results lost {lost}"
    )
    file = os.environ.get("FAULTS_TO")
    if file:
        content = {
            "benchmark": "faults",
            "rounds": ROUNDS,
            "seed": SEED,
            "seconds": round(sum(report.duration for report in reports)),
            "tried": tried.total(),
            "survived": survived.total(),
            "lost": lost,
            "faults": dict(sorted(tried.items())),
            "not survived": dict(tried - survived),
            **artifacts.environment(),
        }
        write_file(Path(file).absolute(), json.dumps(content, indent=1) + "\n")


def _recorded(reports: list[pytest.TestReport], name: str) -> list:
    """Return the values of a property that tests recorded."""
    values = []
    for report in reports:
        values += [value for key, value in report.user_properties if key == name]
    return values
