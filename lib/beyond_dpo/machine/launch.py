"""Child processes: heavy work never runs in the notebook's kernel, and never outlives it.

`run` starts one job (training, a reference pass) with any launcher and waits for it; `Worker` keeps
a process alive that answers calls (a generation engine over a whole α sweep). Both show one
progress bar and raise with the log's tail.
"""

import gc
import importlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import traceback
from contextlib import AbstractContextManager, contextmanager, suppress
from multiprocessing.connection import Connection, Pipe
from pathlib import Path

from beyond_dpo import events
from beyond_dpo.machine import cluster, paths
from beyond_dpo.machine.cluster import follow_parent

# Names of variables that hold what may not leave this process: OPENAI_API_KEY, HF_TOKEN,
# AWS_SECRET_ACCESS_KEY, ... Endpoints are asked and the hub is read by the process that starts the
# children; they need neither.
SECRET = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD|PASSWD)$", re.IGNORECASE)
# each says to OpenMP (GNU's, which torch brings along, or LLVM's and Intel's) how long idle threads
# spin
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


class JobFailed(RuntimeError):
    """A child process ended with an error; the message holds what its log says about it."""


def command(
    module: str, config: Path, *, launcher: str = "plain", processes: int = 1, now: bool = False
) -> list[str]:
    """Return the command line that runs `python -m module config` in `processes` processes.

    deepspeed and srun share the processes among all nodes (see cluster); torchrun and plain run
    them on this machine.
    now: to be run here and at once: deepspeed gets a port that is free, and the devices that
    CUDA_VISIBLE_DEVICES names.
    Raises ValueError for an unknown launcher, several processes with the plain one, too few such
    devices, or processes that the nodes cannot share equally.
    """
    each = cluster.share(processes, launcher)
    job = [module, str(config)]
    if launcher == "plain" and processes == 1:
        return [sys.executable, "-m", *job]
    if launcher == "deepspeed":
        runner = [sys.executable, "-m", "deepspeed.launcher.runner"]
        where = _deepspeed_options(each, now)
        return [*runner, *where, "--no_local_rank", "--module", *job]
    if launcher == "torchrun":  # its processes meet at a port of this machine that is free
        agent = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
        return [*agent, "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0", "-m", *job]
    if launcher == "srun":  # the first failure ends all; also inside a step that is the head itself
        step = ["srun", "--ntasks", str(processes), "--kill-on-bad-exit=1", "--overlap"]
        return [*step, "--export=ALL", sys.executable, "-u", "-m", *job]
    raise ValueError(
        f"launcher {launcher!r}, {processes} processes: use deepspeed, torchrun, srun, or plain "
        "with 1"
    )


def _deepspeed_options(each: int, now: bool) -> list[str]:
    """Return where DeepSpeed's launcher starts `each` processes: on all hosts, or on this one."""
    options = ["--num_accelerators", str(each)]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    hosts = cluster.hostfile()
    if hosts:
        options += cluster.over_ssh(hosts, each)
    elif now and visible:
        # given a number of devices, deepspeed would take the machine's first ones
        devices = visible.split(",")[:each]
        if len(devices) < each or not all(d.isdigit() for d in devices):
            raise ValueError(
                f"the deepspeed launcher cannot take {each} devices from "
                f"CUDA_VISIBLE_DEVICES={visible}; give it that many device numbers, or use torchrun"
            )
        options = ["--include", "localhost:" + ",".join(devices)]
    if now:
        options += ["--master_port", str(_free_port())]
    return options


def run(
    module: str,
    config: dict,
    workdir: Path,
    *,
    desc: str,
    launcher: str = "plain",
    processes: int = 1,
) -> None:
    """Run `module` on `config` to its end, with its output in workdir/job.log.

    The config is written to workdir/config.json. Raises JobFailed with the log's tail. The whole
    process group is ended on any error or interrupt; a launcher then ends its processes on other
    nodes.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    path = workdir / "config.json"
    path.write_text(json.dumps(config, indent=1), encoding="utf-8")
    arguments = command(module, path, launcher=launcher, processes=processes, now=True)
    if cluster.reaches_others(launcher):
        arguments = [*cluster.TETHER, *arguments]
    each = cluster.share(processes, launcher)
    added = cluster.environment(launcher, workdir)
    log = workdir / "job.log"
    progress_file = workdir / ".progress"
    with open(log, "ab") as out, _bar(desc, progress_file) as show:
        begin = out.tell()  # an earlier attempt's output stays in front
        child = _start(arguments, out, progress_file, each, added)
        with _ended(child):
            while child.poll() is None:
                show()
                with suppress(subprocess.TimeoutExpired):
                    child.wait(0.5)
    if child.returncode:
        why = _tail(log, begin)
        raise JobFailed(f"{desc}: {module} ended with status {child.returncode}; {why}")


class Worker(AbstractContextManager):
    """A child process that builds one object and answers calls on it; `with` or `close()` ends it.

    module must call `serve(factory)` when run; `call(method, **arguments)` takes and returns plain
    JSON (big data goes through files), and raises JobFailed with the child's traceback, or its
    log's tail if it died.
    """

    def __init__(
        self,
        module: str,
        config: dict,
        workdir: Path,
        *,
        desc: str,
        environment: dict | None = None,
    ):
        workdir.mkdir(parents=True, exist_ok=True)
        self.settings = config
        name = f"{desc}-{os.getpid()}"  # two notebooks may share a folder
        self.desc = desc
        self.log = workdir / f"{name}.log"
        self.progress_file = workdir / f".{name}.progress"
        self._pipe, other_end = Pipe()
        with open(self.log, "ab") as out, other_end:
            # another worker of this name may have written what stands in front
            self._begin = out.tell()
            number = other_end.fileno()
            arguments = [sys.executable, "-m", module, "--serve", str(number)]
            self.child = _start(
                arguments, out, self.progress_file, 1, environment, pass_fds=[number]
            )
        try:
            with events.slow(f"starting {desc} ..."):
                self._ask(config, "start")
        except JobFailed:  # nobody will hold a worker whose object could not be built
            self.close()
            raise

    def call(self, method: str, **arguments):
        """Return what the object's method returns."""
        return self._ask({"method": method, "arguments": arguments}, method)

    def _ask(self, message: dict, what: str):
        text = json.dumps(message).encode()
        if self._pipe.closed:
            raise JobFailed(f"{self.desc}: this worker has ended; start another")
        try:
            with _bar(f"{self.desc}: {what}", self.progress_file) as show:
                self._pipe.send_bytes(text)
                while not self._pipe.poll(0.5):
                    show()
                answer = json.loads(self._pipe.recv_bytes())
        except (EOFError, OSError) as end:
            self.close()
            status, told = self.child.returncode, _tail(self.log, self._begin)
            raise JobFailed(f"{self.desc}: the worker died with status {status}; {told}") from end
        except BaseException:
            # an interrupt leaves a half-read answer behind: this worker is of no more use
            self.close()
            raise
        if "error" in answer:
            raise JobFailed(f"{self.desc}: {events.UNPRINTABLE.sub('', answer['error'])}")
        return answer["result"]

    def close(self) -> None:
        """End the process and everything it started."""
        with _ended(self.child):
            self._pipe.close()

    def __exit__(self, *_):
        self.close()


def serve(factory) -> None:
    """Answer a `Worker`'s calls until it closes the pipe; the first one builds the object.

    To be called in the child: `serve(Engine)` builds Engine(**config).
    """
    number = _pipe_number()
    follow_parent()
    pipe = Connection(number)
    target = None
    with suppress(EOFError, ConnectionError):
        while True:
            message = json.loads(pipe.recv_bytes())
            try:
                if target is None:
                    target = factory(**message)
                    result = None
                else:
                    method = getattr(target, message["method"])
                    result = method(**message["arguments"])
                answer = json.dumps({"result": result})
            except Exception:
                answer = json.dumps({"error": traceback.format_exc()})
            pipe.send_bytes(answer.encode())


def _pipe_number() -> int:
    """Return the file number that the command line names; end here for anything else."""
    arguments = sys.argv[1:]
    if len(arguments) == 2 and arguments[0] == "--serve" and arguments[1].isdecimal():
        return int(arguments[1])
    module = getattr(sys.modules["__main__"], "__spec__", None)
    name = module.name if module else sys.argv[0]
    usage = (
        f"usage: python -m {name} --serve FILE_NUMBER\n\n"
        "answers the calls of the process that starts it (beyond_dpo.machine.launch.Worker) over a "
        "pipe; there is no use in starting it by hand"
    )
    if "--help" in arguments or "-h" in arguments:
        print(usage)
        sys.exit(0)
    print(usage, file=sys.stderr)
    sys.exit(2)


class Jobs:
    """Run one job after the other in one process, which starts up only once.

    That is `Worker("beyond_dpo.machine.launch", {}, …)`.
    """

    def run(self, module: str, path: str) -> None:
        """Do what `python -m module path` does."""
        importlib.import_module(module).main(path)
        gc.collect()  # an engine and its model know each other


def threads() -> int:
    """Return how many threads one process may use: what OMP_NUM_THREADS says, else one a core.

    OpenMP takes a list, `4,2`, a number for each level of nesting: the outermost one counts.
    """
    outermost = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if outermost.isdecimal() and int(outermost) > 0:
        return int(outermost)
    return len(os.sched_getaffinity(0))


def without_secrets() -> dict[str, str]:
    """Return this process's environment without keys and tokens, for its children."""
    return {name: value for name, value in os.environ.items() if not SECRET.search(name)}


def _environment(progress_file: Path, processes: int, more: dict) -> dict[str, str]:
    """Return the environment of a child that runs `processes` processes; `more` is laid over it."""
    environment = without_secrets()
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        environment.pop(name, None)  # some clusters give them to a node's first process
    if not any(name in environment for name in WAITING):
        # threads without work leave the core to those that have some
        environment["OMP_WAIT_POLICY"] = "PASSIVE"
    # as many threads as this job may have, shared by its processes
    environment["OMP_NUM_THREADS"] = str(max(1, threads() // processes))
    search = [str(paths.LIBRARY)]
    if os.environ.get("PYTHONPATH"):
        search.append(os.environ["PYTHONPATH"])
    environment["PYTHONPATH"] = os.pathsep.join(search)
    environment["PYTHONUTF8"] = "1"  # whatever the locale: what it writes is read as UTF-8
    environment["BEYOND_DPO_CHILD_PROGRESS"] = str(progress_file.absolute())
    environment["BEYOND_DPO_PARENT"] = str(os.getpid())
    environment["TQDM_DISABLE"] = "1"
    environment["TOKENIZERS_PARALLELISM"] = "false"
    return environment | more


def _start(
    arguments: list[str],
    out,
    progress_file: Path,
    processes: int = 1,
    more: dict | None = None,
    **options,
) -> subprocess.Popen:
    """Start a child in its own session.

    Ctrl-C then reaches the notebook only, and the child's group can be ended whole.
    """
    more = more or {}
    environment = _environment(progress_file, processes, more)
    if "DS_ENV_FILE" in more:
        text = cluster.exported(environment)
        Path(more["DS_ENV_FILE"]).write_text(text, encoding="utf-8", errors="surrogateescape")
    return subprocess.Popen(
        arguments,
        stdout=out,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        env=environment,
        start_new_session=True,
        **options,
    )


@contextmanager
def _ended(child: subprocess.Popen):
    """Leave no process of the child's group behind, whatever happens inside."""
    try:
        yield
    finally:
        try:
            if child.poll() is None:
                _signal(child, signal.SIGTERM)
                with suppress(subprocess.TimeoutExpired):
                    child.wait(5)
        finally:  # also when the user is impatient and interrupts again
            _signal(child, signal.SIGKILL)  # grandchildren outlive a launcher that ended
            child.wait()


def _signal(child, number) -> None:
    with suppress(ProcessLookupError):
        os.killpg(child.pid, number)


@contextmanager
def _bar(desc: str, progress_file: Path):
    """Yield show(), which passes on what a child's progress file says: to a bar and to listeners.

    What cannot be read or shown is left out: no work ends because nobody can see how far it is.
    """
    with suppress(OSError):
        progress_file.write_text("", encoding="utf-8")
    began = time.monotonic()
    bar = None
    last = _counted(progress_file)

    def show():
        nonlocal bar, last
        counted = _counted(progress_file)
        if counted is None or counted == last:
            events.tell(event="alive")
            return
        last = counted
        done, total = counted
        if bar is None:
            bar = events.Bar(total, desc)
        bar.update(done - bar.done)
        events.announce(desc, done, total, time.monotonic() - began)

    try:
        yield show
        show()
    finally:
        if bar is not None:
            bar.close()


def _counted(progress_file: Path) -> tuple[int, int] | None:
    """Return (done, total) as the child wrote them; None while it writes, and for all else."""
    try:
        text = progress_file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    words = text.split()
    if len(words) != 2 or not text.endswith("\n") or not all(map(str.isdecimal, words)):
        return None
    done, total = map(int, words)
    return (done, total) if total else None


def _tail(log: Path, begin: int = 0) -> str:
    """Quote a failed child's output from its first traceback on, or else its last lines.

    begin: bytes of the log before it. The first traceback is the child's, a launcher's come later.
    """
    lines = log.read_bytes()[begin:].decode(errors="replace").splitlines()
    first = max(0, len(lines) - 25)
    for number, line in enumerate(lines):
        if "Traceback (most recent call" in line:
            first = number
            break
    shown = lines[first:]
    if len(shown) > 60:
        shown = [*shown[:40], "...", *shown[-20:]]
    return f"{log} says:\n" + events.UNPRINTABLE.sub("", "\n".join(shown))


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as s:
        return s.getsockname()[1]


if __name__ == "__main__":
    serve(Jobs)
