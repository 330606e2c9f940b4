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
from pathlib import Path

import pytest

from beyond_dpo.machine import paths, workers
from beyond_dpo.pipeline import assets

os.environ.update(
    PYTHONPATH=os.pathsep.join(
        filter(None, [str(paths.ROOT / "lib"), os.environ.get("PYTHONPATH")])
    ),
    TOKENIZERS_PARALLELISM="false",  # forked children of a used tokenizer warn and may hang
    HF_HUB_OFFLINE="1",  # no test needs the network
    TQDM_DISABLE="1",
    # threads of models this small mostly wait for each other, the longer the busier the machine
    OMP_NUM_THREADS="1",
    MPLBACKEND="agg",
)
for name in ("COMPUTE", "NB", "PROFILE", "MAKEFLAGS", "MAKELEVEL"):
    os.environ.pop(name, None)  # what the caller (or make) set for itself is not part of a test


# fixtures of tests that train, sample, serve or run notebooks for real: they count as slow
SLOW = {"store", "engine", "transformers_engine", "served", "gate", "endpoint", "project"}


@pytest.hookimpl(tryfirst=True)  # before pytest chooses by the marks
def pytest_collection_modifyitems(items):
    """Mark the slow tests, and begin with the files that take longest, so that two processes end at
    about one time.
    """
    for item in items:
        parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
        if SLOW & set(item.fixturenames) or "vllm" in parameters:
            item.add_marker(pytest.mark.slow)
    longest = (
        "test_cold.py",
        "test_faults.py",
        "test_shards.py",
        "test_wrpo.py",
        "test_notebooks.py",
        "test_judge.py",
    )
    items.sort(
        key=lambda item: (
            longest.index(item.path.name) if item.path.name in longest else len(longest)
        )
    )


def pytest_terminal_summary(terminalreporter):
    """Count what the fault suite tried, from whichever process ran it."""
    import faults

    faults.summary(terminalreporter)


def wait_for(condition, seconds=60.0):
    """Return condition()'s first true value; fail when it takes too long."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)
    return value


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@contextmanager
def openai_server(model, name: str, key: str, *options: str):
    """Start a real OpenAI-compatible server of vLLM; yield its address."""
    pytest.importorskip("vllm")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--port",
        str(port),
        "--enforce-eager",
    ]
    command += ["--model", str(model), "--served-model-name", name, *options]
    environment = os.environ | {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_API_KEY": key,
        "VLLM_NO_USAGE_STATS": "1",
    }
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    child = subprocess.Popen(command, env=environment, start_new_session=True, **quiet)
    try:
        end = time.monotonic() + 240
        while True:
            with suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health")
                break
            assert child.poll() is None and time.monotonic() < end
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()


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


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Let a module's tests share one empty store of results."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("store")
        patch.setattr(paths, "ARTIFACTS", folder / "artifacts")
        patch.setattr(paths, "FROZEN", folder / "frozen")
        yield folder
        workers.close()


@pytest.fixture(scope="session")
def tiny():
    """Return the folder of the tiny random model with its tokenizer."""
    return assets.model_dir("tiny")


@pytest.fixture(scope="session")
def rows(tiny):
    """Return preference rows of different lengths, cut out of the invented reviews."""
    from beyond_dpo import templates

    tokenizer, rng = templates.load_tokenizer(tiny), random.Random(0)
    texts = [
        json.loads(line)["text"]
        for line in (paths.FIXTURES / "reviews.jsonl").read_text().splitlines()
    ]
    made = []
    for i in range(12):
        prompt = templates.render(tokenizer, texts[i], "plain")[: rng.randint(3, 12)]
        answers = [
            templates.encode_response(tokenizer, texts[i + k][: rng.randint(5, 90)])
            for k in (20, 40)
        ]
        responses = {"chosen": answers[0], "rejected": answers[1]}
        made.append({"id": f"r{i}", "prompt_ids": prompt, "responses": responses})
    return made
