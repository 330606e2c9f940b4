"""Environment of the tests and of every child process they start."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from beyond_dpo.machine import paths, workers
from beyond_dpo.pipeline import assets

search_path = [str(paths.ROOT / "lib")]
if os.environ.get("PYTHONPATH"):
    search_path.append(os.environ["PYTHONPATH"])
os.environ["PYTHONPATH"] = os.pathsep.join(search_path)
# Forked children of a used tokenizer warn and may hang.
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"  # no test needs the network
os.environ["TQDM_DISABLE"] = "1"
# Threads of models this small mostly wait for each other, the longer the busier the machine.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MPLBACKEND"] = "agg"
# What the caller (or make) set for itself is not part of a test.
for name in ("COMPUTE", "NB", "PROFILE", "MAKEFLAGS", "MAKELEVEL"):
    os.environ.pop(name, None)


KEY = "sk-not-to-be-found-anywhere"  # of every endpoint that tests ask

# Fixtures of tests that train, sample, serve or run notebooks for real: they count as slow.
SLOW = {
    "store",
    "smollm2_server",
    "engine",
    "transformers_engine",
    "served",
    "gate",
    "endpoint",
    "project",
}
# The files that take longest begin, so that two processes end at about one time.
LONGEST = [
    "test_notebooks.py",
    "test_train.py",
    "test_shards.py",
    "test_faults.py",
    "test_judge.py",
    "test_stages.py",
    "test_generate.py",
    "test_cli.py",
    "test_rewards.py",
    "test_wrpo.py",
]


@pytest.hookimpl(tryfirst=True)  # before pytest chooses by the marks
def pytest_collection_modifyitems(items):
    """Mark the slow tests, and begin with the files that take longest."""
    for item in items:
        parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
        is_long = item.get_closest_marker("long") is not None
        if is_long or SLOW & set(item.fixturenames) or "vllm" in parameters:
            item.add_marker(pytest.mark.slow)
    items.sort(key=rank)


def rank(item) -> int:
    """Return the place of a test's file in LONGEST, which all others follow."""
    name = item.path.name
    return LONGEST.index(name) if name in LONGEST else len(LONGEST)


def pytest_terminal_summary(terminalreporter):
    """Count what the fault suite tried, from whichever process ran it."""
    import faults

    faults.summary(terminalreporter)


def wait_for(condition, seconds=60.0):
    """Return condition()'s first true value; fail when it takes too long."""
    end = time.monotonic() + seconds
    value = condition()
    while not value:
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)
        value = condition()
    return value


def alive(pid):
    """Return whether a process exists and is no zombie."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    _, _, after_name = text.rpartition(")")
    state = after_name.split()[0]
    return state != "Z"


@contextmanager
def openai_server(model, name: str, key: str, *options: str):
    """Start a real OpenAI-compatible server of vLLM; yield its address."""
    pytest.importorskip("vllm")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--port", str(port)]
    command += ["--model", str(model), "--served-model-name", name, "--enforce-eager", *options]
    environment = os.environ | {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_API_KEY": key,
        "VLLM_NO_USAGE_STATS": "1",
    }
    child = subprocess.Popen(
        command,
        env=environment,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    address = f"http://127.0.0.1:{port}"
    try:
        wait_for_server(child, f"{address}/health")
        yield address
    finally:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def wait_for_server(child, url: str) -> None:
    """Wait until a server answers; fail if it ends before, or takes longer than four minutes."""
    end = time.monotonic() + 240
    while True:
        with suppress(OSError):
            urllib.request.urlopen(url)
            return
        assert child.poll() is None
        assert time.monotonic() < end
        time.sleep(0.5)


@pytest.fixture(scope="session")
def smollm2_server():
    """Start a real OpenAI-compatible server of the model `judge`, SmolLM2-135M.

    Yield its address; the key that it wants is KEY.
    """
    try:
        assets.fetch_all(["smollm2"])
    except assets.AssetError as error:
        pytest.skip(str(error))
    # bfloat16 takes minutes where AVX2 is all there is.
    options = ("--max-model-len", "2048", "--dtype", "float32")
    with openai_server(assets.model_dir("smollm2"), "judge", KEY, *options) as address:
        yield address


# the likeliest first token of a judge's reply, from which AlpacaEval's preference is read
ODDS = {
    "content": [{"token": "m", "logprob": -0.1, "top_logprobs": [{"token": "m", "logprob": -0.1}]}]
}


class Scripted(ThreadingHTTPServer):
    """An endpoint that gives the n-th request the n-th of `script`, and all later ones the last.

    Of a script: a JSON value or a text is the body of a 200, (status, JSON value) another answer,
    an Event is waited for, and the connection then closed. requests: those that came, their bodies.
    """

    def __init__(self, *script):
        super().__init__(("127.0.0.1", 0), ScriptedAnswer)
        self.script = list(script)
        self.requests = []
        self.lock = threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def next_answer(self, request):
        """Note a request; return what the script has for it."""
        with self.lock:
            number = min(len(self.requests), len(self.script) - 1)
            self.requests.append(request)
            return self.script[number]

    @property
    def prompts(self):
        """Return the texts of the users' turns that came, in order."""
        return [request["messages"][0]["content"] for request in self.requests]


class Handler(BaseHTTPRequestHandler):
    """Read and answer a request as an OpenAI-compatible server does."""

    def body(self):
        return self.rfile.read(int(self.headers["Content-Length"]))

    def answer(self, status, content, kind="application/json", **headers):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


class ScriptedAnswer(Handler):
    def do_POST(self):
        answer = self.server.next_answer(json.loads(self.body()))
        if isinstance(answer, threading.Event):
            answer.wait()
            return
        status = 200
        if isinstance(answer, tuple):
            status, answer = answer
        text = answer if isinstance(answer, str) else json.dumps(answer)
        self.answer(status, text.encode())


@pytest.fixture
def scripted(monkeypatch):
    """Return a maker of Scripted endpoints, which end with the test."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    servers = []

    def make(*script) -> Scripted:
        servers.append(Scripted(*script))
        return servers[-1]

    yield make
    for server in servers:
        server.shutdown()
        server.server_close()


def reply(content="Fine.", samples=1, logprobs=None, **more):
    """Return the body of a reply, which counts no tokens."""
    message = {"role": "assistant", "content": content}
    choice = {"index": 0, "finish_reason": "stop", "logprobs": logprobs, "message": message}
    body = {
        "id": "1",
        "object": "chat.completion",
        "created": 1,
        "model": "m",
        "choices": [choice] * samples,
    }
    return body | more


@pytest.fixture
def interrupts():
    """Let a test interrupt what it starts, also where the suite runs in the background of a script.

    There the shell has SIGINT ignored, all children inherit that, and no Python raises
    KeyboardInterrupt.
    """
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        yield
        return
    if threading.current_thread() is not threading.main_thread():
        pytest.skip("SIGINT is ignored here, and only the main thread could change that")
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, signal.SIG_IGN)


FOLDERS = {
    "ROOT": "",
    "NOTEBOOKS": "notebooks",
    "ARTIFACTS": "artifacts",
    "FROZEN": "data/frozen",
    "FIGURES": "figures",
}


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Let this process work in an empty project; return its folder."""
    for name, folder in FOLDERS.items():
        monkeypatch.setattr(paths, name, tmp_path / folder)
    (tmp_path / "notebooks").mkdir()
    return tmp_path


@pytest.fixture
def project(folders):
    """Return the folder of an empty project whose notebooks are really run, which takes seconds."""
    return folders


@pytest.fixture(scope="session")
def shared_workers():
    """Let modules with a store share the processes that they start, each of which takes seconds."""
    yield
    workers.close()


@pytest.fixture(scope="module")
def store(tmp_path_factory, shared_workers):
    """Let a module's tests share one empty store of results."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("store")
        patch.setattr(paths, "ARTIFACTS", folder / "artifacts")
        patch.setattr(paths, "FROZEN", folder / "frozen")
        yield folder


@pytest.fixture(scope="session")
def tiny():
    """Return the folder of the tiny random model with its tokenizer."""
    return assets.model_dir("tiny")


@pytest.fixture(scope="session")
def rows(tiny):
    """Return preference rows of different lengths, cut out of the invented reviews."""
    from beyond_dpo import templates

    tokenizer = templates.load_tokenizer(tiny)
    rng = random.Random(0)
    lines = (paths.FIXTURES / "reviews.jsonl").read_text().splitlines()
    texts = [json.loads(line)["text"] for line in lines]

    def response(text: str) -> list[int]:
        return templates.encode_response(tokenizer, text[: rng.randint(5, 90)])

    preferences = []
    for i in range(12):
        prompt = templates.render(tokenizer, texts[i], "plain")[: rng.randint(3, 12)]
        responses = {"chosen": response(texts[i + 20]), "rejected": response(texts[i + 40])}
        preferences.append({"id": f"r{i}", "prompt_ids": prompt, "responses": responses})
    return preferences
