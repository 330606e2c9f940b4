"""What the fault suite is made of: a store that can be killed, a small disk, damage, and a count of
what survives.
"""

import hashlib
import http.server
import json
import os
import shutil
import signal
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
from beyond_dpo.pipeline import artifacts

SCRIPT = Path(__file__).with_name("fault_pipeline.py")
ROUNDS = int(os.environ.get("FAULT_ROUNDS", "0"))  # 0: the short form
SEED = int(os.environ.get("FAULT_SEED", "6"))
CLOCK = (
    "tokens_per_s",
    "rows_per_s",
)  # in a training's log: all that another run of it writes otherwise
long_form = pytest.mark.skipif(not ROUNDS, reason="long form only: make faults")


class Store:
    """A folder of results with a cache and reports of its own, and the processes that work on
    it.
    """

    def __init__(self, folder: Path, **environment: str):
        self.folder, self.artifacts = folder, folder / "artifacts"
        self.reports, self.errors, self.read = folder / "reports", folder / "errors", 0
        self.artifacts.mkdir(parents=True)
        self.reports.touch()
        self.environment = {
            n: v for n, v in os.environ.items() if not n.startswith("BEYOND_DPO_")
        } | environment
        self.environment |= {
            "BEYOND_DPO_ARTIFACTS": str(self.artifacts),
            "BEYOND_DPO_CACHE": str(folder / "cache"),
        }
        self.environment |= {
            "BEYOND_DPO_FIGURES": str(folder / "figures"),
            "BEYOND_DPO_PROGRESS": str(self.reports),
        }

    def start(self, *command, errors: str = "errors") -> subprocess.Popen:
        """Start a command that works here; what it says goes to the file `errors`."""
        with open(self.folder / errors, "wb") as out:
            arguments = [sys.executable, *map(str, command)]
            return subprocess.Popen(
                arguments, env=self.environment, stdout=out, stderr=out, start_new_session=True
            )

    def said(self) -> str:
        return self.errors.read_text(errors="replace")

    def events(self) -> list[dict]:
        """Return what has been reported since the last call, whole lines only."""
        with open(self.reports, "rb") as file:
            file.seek(self.read)
            lines = [line for line in file.read().splitlines(keepends=True) if line.endswith(b"\n")]
        self.read += sum(map(len, lines))
        return [json.loads(line) for line in lines]

    def reaches(self, stage: str, child: subprocess.Popen, seconds: float = 300) -> bool:
        """Wait until a stage starts; False if the process ended before."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            ended = child.poll() is not None
            if any(told["event"] == "start" and told["stage"] == stage for told in self.events()):
                return True
            if ended:
                return False
            time.sleep(0.005)
        raise AssertionError(f"{stage} was not reached: {self.said()[-2000:]}")

    def processes(self) -> list[psutil.Process]:
        """Return all living processes that work here, whoever is their parent now."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                mine = process.environ().get("BEYOND_DPO_ARTIFACTS") == str(self.artifacts)
                found += [process] if mine and process.status() != psutil.STATUS_ZOMBIE else []
        return found

    def alone(self, seconds: float = 10) -> bool:
        """Say whether all processes are gone, after some time at most."""
        end = time.monotonic() + seconds
        while self.processes():
            if time.monotonic() > end:
                return False
            time.sleep(0.1)
        return True

    def kill(self) -> None:
        """End all at once with kill -9, as when the memory or the power is gone."""
        while found := self.processes():
            for process in found:
                with suppress(psutil.Error):
                    process.kill()
            psutil.wait_procs(found, timeout=5)

    def published(self) -> dict[str, bytes]:
        """Return {key: manifest} of what counts as finished; raise DamagedArtifact for any that is
        not whole.
        """
        artifacts._hashes.clear()  # as a new process
        done = {p.parent.name: p.read_bytes() for p in self.artifacts.glob("*/manifest.json")}
        done = {key: manifest for key, manifest in done.items() if not key.endswith(".partial")}
        for key in done:
            artifacts._verify(self.artifacts / key, key)
        return done

    def contents(self) -> dict[str, dict[str, str]]:
        """Return {key: {file: sha256}} of what is finished, but for the clock in the logs of
        trainings.
        """
        found = {}
        for key, manifest in self.published().items():
            found[key] = {
                name: entry["sha256"] for name, entry in json.loads(manifest)["files"].items()
            }
            if "log.jsonl" in found[key]:
                steps = map(
                    json.loads, (self.artifacts / key / "log.jsonl").read_text().splitlines()
                )
                steps = [
                    {name: v for name, v in step.items() if name not in CLOCK} for step in steps
                ]
                found[key]["log.jsonl"] = artifacts.digest(steps)
        for built in (self.folder / "cache").glob("*/.sha256.json"):
            found[built.parent.name] = json.loads(built.read_text())
        return found


def damage(folder: Path, rng) -> str:
    """Break one file of a finished result as disks and people do; return how."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.stat().st_size)
    path = rng.choice(files)
    content = bytearray(path.read_bytes())
    how = rng.choice(["byte flipped", "cut off", "gone", "emptied", "header length"])
    if how == "header length" and path.suffix != ".safetensors":
        how = "byte flipped"
    if how == "byte flipped":
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif how == "cut off":
        del content[rng.randrange(len(content)) :]
    elif how == "header length":
        content[:8] = (1 << 40).to_bytes(8, "little")
    path.unlink() if how == "gone" else path.write_bytes(
        b"" if how == "emptied" else bytes(content)
    )
    return f"{path.name} {how}"


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
        os.posix_fallocate(file.fileno(), 0, max(1, shutil.disk_usage(folder).free - (1 << 20)))
        file.seek(0, os.SEEK_END)
        while True:
            file.write(b"x" * 4096)
    assert shutil.disk_usage(folder).free == 0
    try:
        yield
    finally:
        filler.unlink()


class Endpoint(http.server.ThreadingHTTPServer):
    """An OpenAI-compatible endpoint on a bad day: of twelve requests one is refused, one fails, one
    gets no answer.

    What it says depends on the prompt alone. asked: {prompt: how often it was answered}.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Answer)
        self.asked, self.requests, self.lock = Counter(), 0, threading.Lock()
        threading.Thread(target=self.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, *_) -> None:
        """Say nothing: those who ask are killed in the middle."""


class _Answer(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt, server = asked["messages"][0]["content"], self.server
        with server.lock:
            server.requests += 1
            trouble = {1: 429, 5: 503, 9: "hang up"}.get(server.requests % 12)
            server.asked[prompt] += not trouble
        time.sleep(0.1)
        if trouble == "hang up":
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        words = hashlib.sha256(prompt.encode()).hexdigest()
        choices = [
            {
                "index": i,
                "finish_reason": "stop",
                "message": {"role": "assistant", "content": words[i:]},
            }
            for i in range(asked.get("n", 1))
        ]
        answer = {
            "id": "x",
            "object": "chat.completion",
            "created": 0,
            "model": "served",
            "choices": choices,
        }
        body = json.dumps({"error": {"message": "a bad day"}} if trouble else answer).encode()
        self.send_response(trouble or 200)
        for name, value in (
            ("Content-Type", "application/json"),
            ("Content-Length", len(body)),
            ("retry-after-ms", 20),
        ):
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_) -> None:
        """Say nothing."""


def wait_for(condition, seconds: float = 60):
    """Return the first true value of condition(); fail when it takes too long."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
    return value


def descendants(pid: int) -> list[psutil.Process]:
    with suppress(psutil.Error):
        return psutil.Process(pid).children(recursive=True)
    return []


def stop(child: subprocess.Popen, number: int = signal.SIGKILL) -> None:
    child.send_signal(number)
    child.wait(30)


def summary(terminalreporter) -> None:
    """Print how many faults were tried and survived, and write it with the machine to the file that
    FAULTS_TO names.
    """
    reports = sum(terminalreporter.stats.values(), [])
    reports = [report for report in reports if isinstance(report, pytest.TestReport)]
    called = [report for report in reports if report.when == "call"]
    told = [pair for report in called for pair in report.user_properties]
    tried = Counter(what for name, what in told if name == "fault tried")
    # survived is what a test that passed has counted: it compares all hashes at its end
    passed = [pair for report in called if report.passed for pair in report.user_properties]
    survived = Counter(what for name, what in passed if name == "fault survived")
    tried.update(
        one.nodeid
        for one in called
        if one.failed and not one.user_properties and "hostile" in one.nodeid
    )
    if not tried:
        return
    lost = sum(value for name, value in told if name == "results lost")
    found = {"tried": tried.total(), "survived": survived.total(), "lost": lost}
    words = (
        f"faults tried {found['tried']}, survived {found['survived']}, finished results lost "
        f"{found['lost']}"
    )
    terminalreporter.write_line(words)
    if to := os.environ.get("FAULTS_TO"):
        about = {"benchmark": "faults", "rounds": ROUNDS, "seed": SEED}
        about |= {"seconds": round(sum(report.duration for report in reports))}
        found |= {"faults": dict(sorted(tried.items())), "not survived": dict(tried - survived)}
        content = about | found | artifacts.environment()
        write_file(Path(to).absolute(), json.dumps(content, indent=1) + "\n")
