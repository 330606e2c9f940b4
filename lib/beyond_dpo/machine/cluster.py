"""Many nodes: the head starts each job on all of them, and it ends with the head's, whatever happens to either.

The head is the process that runs the notebooks. All nodes see the project, its environment and BEYOND_DPO_ARTIFACTS
under the same paths. Set on the head: BEYOND_DPO_HOSTFILE (deepspeed over ssh), BEYOND_DPO_LAUNCHER=srun (in a SLURM
allocation), or BEYOND_DPO_LAUNCHER=torchrun and BEYOND_DPO_NODES, with `python -m beyond_dpo.machine.cluster join` on
each further node. BEYOND_DPO_<FIELD> sets any machine field of config.Train (processes: of all nodes), none of which
changes a result. See recipes/.
"""

import fcntl
import itertools
import json
import os
import re
import shutil
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import yaml

from beyond_dpo.files import write_file
from beyond_dpo.machine import paths


def number(name: str, default: int) -> int:
    """Return a whole number above 0 from an environment variable; raise ValueError for anything else there."""
    text = os.environ.get(name) or str(default)
    if text.strip().isdecimal() and int(text) > 0:
        return int(text)
    raise ValueError(f"{name}={text} is not a whole number above 0")


PATIENCE = number("BEYOND_DPO_PATIENCE", 60)  # seconds without a sign of life, after which all ends
TETHER = ["setpriv", "--pdeathsig", "KILL"] if shutil.which("setpriv") else []  # a launcher dies with its parent
# What goes along over ssh, beside PYTHON*: DeepSpeed writes it into the log, so no HF_TOKEN or other secret.
PASSED = ("BEYOND_DPO_", "GLOO_", "HF_HOME", "HF_HUB_", "NCCL_", "OMP_", "TORCH_", "TOKENIZERS_", "TQDM_")


def machine(names) -> dict:
    """Return those of the named fields of config.Train that the environment sets, or a hostfile.

    Raises ValueError as hostfile() does, and for a value that is no YAML.
    """
    slots = hostfile()
    found = {"launcher": "deepspeed", "processes": sum(slots.values())} if slots else {}
    given = {name: os.environ.get(f"BEYOND_DPO_{name.upper()}") for name in names}
    for name, text in given.items():
        if not text:
            continue
        try:
            found[name] = yaml.safe_load(text)
        except yaml.YAMLError:
            raise ValueError(f"BEYOND_DPO_{name.upper()}={text} is neither a number nor a word") from None
    return found


def hostfile() -> dict[str, int]:
    """Return the slots (processes) of each host in BEYOND_DPO_HOSTFILE, {} without one.

    Raises ValueError for a file that cannot be read, names no host, or holds anything else.
    """
    path = os.environ.get("BEYOND_DPO_HOSTFILE")
    if not path:
        return {}
    try:
        lines = Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise ValueError(f"BEYOND_DPO_HOSTFILE={path} cannot be read: {error.strerror}") from None
    found: dict[str, int] = {}
    for line in lines:
        if line.split("#")[0].strip():
            fits = re.fullmatch(r"(\S+)\s+slots=([1-9]\d*)\s*(#.*)?", line.strip())
            if not fits or fits[1] in found:
                raise ValueError(f"{path}: {line!r} is not `host slots=N`, each host once")
            found[fits[1]] = int(fits[2])
    if not found:
        raise ValueError(f"{path} names no host")
    return found


def nodes(launcher: str) -> int:
    """Return over how many nodes the launcher spreads a job; raise ValueError as hostfile() and number() do."""
    if launcher == "deepspeed":
        return len(hostfile()) or 1
    variable = {"torchrun": "BEYOND_DPO_NODES", "srun": "SLURM_NNODES"}.get(launcher)
    return number(variable, 1) if variable else 1


def share(processes: int, launcher: str) -> int:
    """Return how many of the processes each node runs; ValueError if that is not the same number for all."""
    if processes % nodes(launcher):
        raise ValueError(f"{processes} processes cannot be shared equally by {nodes(launcher)} nodes")
    return processes // nodes(launcher)


def over_ssh(hosts: dict[str, int], each: int) -> list[str]:
    """Return what makes DeepSpeed run `each` processes on each host; ValueError if one has fewer slots."""
    if each > min(hosts.values()):
        raise ValueError(f"{each} processes a host are more than the slots of one of {hosts}")
    first = ["--master_addr", os.environ["MASTER_ADDR"]] if "MASTER_ADDR" in os.environ else []
    return ["--hostfile", os.environ["BEYOND_DPO_HOSTFILE"], "--force_multi", *first]


def meeting(port: int, now: bool) -> list[str]:
    """Return where torchrun's agents meet: at this node's MASTER_ADDR or name; ValueError if others cannot reach that.

    now: to be run at once, and by the followers, for whom each meeting has a name of its own.
    """
    if nodes("torchrun") == 1:
        return ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
    name = os.environ.get("MASTER_ADDR") or (socket.gethostname() if now else "HEAD")
    if now and "MASTER_ADDR" not in os.environ and socket.gethostbyname(name).startswith("127."):
        raise ValueError(f"{name} is a name for this machine only: export MASTER_ADDR, by which other nodes reach it")
    here = ["--nnodes", str(nodes("torchrun")), "--rdzv_id", f"{name}-{port}-{time.time_ns() if now else 0}"]
    here += ["--local_addr", name, "--rdzv_conf", "is_host=1"]
    return [*here, "--rdzv_backend", "c10d", "--rdzv_endpoint", f"{name}:{port}"]


def rank(devices: int) -> dict[str, str]:
    """Return RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT of a process that no launcher gave them.

    Of a task of `srun` by what SLURM says, else of a process that is alone (a batch script is, too: it is no step).
    devices: that this process sees; one, where SLURM gives each task its own.
    """
    world = os.environ.get("SLURM_STEP_NUM_TASKS", "1")
    if world == "1":  # port 0: any that is free
        return dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="localhost", MASTER_PORT="0")
    job, step, local = (int(os.environ[f"SLURM_{name}"]) for name in ("JOB_ID", "STEP_ID", "LOCALID"))
    first = re.match(r"([^,\[]+)(?:\[([^],-]+))?", os.environ["SLURM_STEP_NODELIST"])  # gpu[03-07,11],big -> gpu03
    host, port = first[1] + (first[2] or ""), 12_000 + (97 * job + step) % 20_000  # below the ports a system gives away
    where = {"MASTER_ADDR": host, "MASTER_PORT": str(port)}
    where |= {name: os.environ[name] for name in where if name in os.environ}
    local = local % devices if devices else local
    return where | {"RANK": os.environ["SLURM_PROCID"], "LOCAL_RANK": str(local), "WORLD_SIZE": world}


def pulse(path: Path) -> Iterator[int]:
    """Yield, when asked once a second, for how many seconds `path` was not touched; one that is gone ages twelvefold.

    Opened each time, as a network file system then asks its server, and no other node's clock is believed.
    """
    last, quiet = None, 0
    while True:
        try:
            with open(path, "rb") as file:
                now = os.fstat(file.fileno()).st_mtime_ns
        except OSError:
            now = None
        if now and last and now != last:
            quiet = 0
        else:
            quiet += 1 if now else 12
        last = now or last
        yield quiet


@contextmanager
def job(arguments: list[str], workdir: Path, launcher: str) -> Iterator[tuple[dict, Path | None, Callable[[], bool]]]:
    """Lease a job's life to its processes on all nodes while inside of `with`, and call torchrun's followers to it.

    Yields the environment to add to the job's, the file that its first traceback goes to, and a function to call about
    once a second, which returns False if the job has failed and its launcher does not notice. A job of this machine
    alone needs no lease.
    """
    ssh = launcher == "deepspeed" and hostfile()
    if not ssh and launcher != "srun" and nodes(launcher) == 1:
        yield {}, None, lambda: True
        return
    # beside the folder, so that the head's network file system looks again at what others have written there
    lease = workdir.absolute().parent / f".{workdir.name}.lease"
    failed, since = lease.with_suffix(".failed"), []

    def alive() -> bool:
        with suppress(OSError):  # the next one counts as well
            lease.touch()
        since.extend([time.monotonic()] * failed.exists())
        return not since or time.monotonic() - since[0] < PATIENCE / 6

    environment = {"BEYOND_DPO_LEASE": str(lease)}
    if launcher != "torchrun":
        environment["BEYOND_DPO_PARENT"] = "0"  # a process number says nothing on another node
    if ssh:
        environment["DS_ENV_FILE"] = str(workdir.absolute() / "environment")
    if launcher == "srun":
        environment["OMP_NUM_THREADS"] = os.environ.get("SLURM_CPUS_PER_TASK", "1")
    with ExitStack() as stack:
        failed.unlink(missing_ok=True)  # of a head that was killed
        for path in (failed, lease):
            stack.callback(path.unlink, missing_ok=True)
        lease.touch()
        if launcher == "torchrun":
            head()
            posted = paths.ARTIFACTS / "cluster" / "job.json"
            lock = stack.enter_context(open(posted.with_name("lock"), "wb"))
            fcntl.flock(lock, fcntl.LOCK_EX)  # one job at a time, should two heads have the same followers
            theirs = ["is_host=0" if text == "is_host=1" else text for text in arguments[1:]]
            call = {"arguments": theirs, "workdir": str(workdir.absolute()), "lease": str(lease)}
            write_file(posted, json.dumps(call))
            stack.callback(posted.unlink, missing_ok=True)
        yield environment, failed, alive


def exported(environment: dict) -> str:
    """Return what DeepSpeed exports on all hosts, a line NAME=value each: the job's, and those of .deepspeed_env."""
    name = os.environ.get("DS_ENV_FILE", ".deepspeed_env")
    files = [path for path in (Path.home() / name, Path(name)) if path.is_file()]
    kept = [path.read_text(encoding="utf-8", errors="surrogateescape").splitlines() for path in files]
    ours = [f"{key}={value}" for key, value in environment.items() if key.startswith(PASSED)]
    return "".join(f"{line}\n" for line in [*sum(kept, []), *ours] if "=" in line)


def head() -> None:
    """Let followers see that this process lives, as long as it does (the runner: its kernels come and go)."""
    if nodes("torchrun") == 1 or "BEYOND_DPO_HEAD" in os.environ:
        return
    os.environ["BEYOND_DPO_HEAD"] = str(os.getpid())  # for the processes below
    sign = paths.ARTIFACTS / "cluster" / "head"
    sign.parent.mkdir(parents=True, exist_ok=True)

    def live():
        while True:
            with suppress(OSError):
                sign.touch()
            time.sleep(1)

    threading.Thread(target=live, daemon=True).start()


def join(wait: float) -> None:
    """Take part in each of the head's torchrun jobs from this node, until the head ends, or none comes in `wait` s."""
    folder, started, last, began = paths.ARTIFACTS / "cluster", False, None, time.monotonic()
    for quiet in pulse(folder / "head"):
        started, call = started or quiet == 0, None
        if quiet >= PATIENCE if started else time.monotonic() - began > wait:
            return
        with suppress(OSError, ValueError):
            call = json.loads((folder / "job.json").read_text(encoding="utf-8"))
        if call and call != last:
            last, lease = call, pulse(Path(call["lease"]))
        if call and next(lease) == 0:  # not what a crashed head left behind
            _follow(call, lease)
            lease = itertools.repeat(PATIENCE)  # each job once
        time.sleep(1)


def _follow(call: dict, lease: Iterator[int]) -> None:
    from beyond_dpo.machine import launch

    work, arguments = Path(call["workdir"]), [*call["arguments"]]
    value = {name: text for name, text in zip(arguments, arguments[1:], strict=False) if name.startswith("--")}
    host, _, port = value["--rdzv_endpoint"].rpartition(":")
    family, kind, _, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as way:  # sends nothing, but knows by which of its addresses
        way.connect(where)
        here = way.getsockname()[0]
    arguments[arguments.index("--local_addr") + 1] = here
    log = work / f"job.{socket.gethostname()}-{os.getpid()}.log"
    _print(f"{work}: joining from {here}")
    with open(log, "ab") as out:
        begin, each = out.tell(), int(value["--nproc_per_node"])
        environment = {"BEYOND_DPO_LEASE": call["lease"]}
        child = launch._start([*TETHER, sys.executable, *arguments], out, work / ".progress", each, environment)
        with launch._ended(child):
            while (status := child.poll()) is None and next(lease) < PATIENCE:
                time.sleep(1)
    if status:
        fail(call["lease"], launch._tail(log, begin))
    _print(f"{work}: ended with status {status}")


def _print(text: str) -> None:
    with suppress(OSError):  # a full disk behind it ends no job
        print(text, flush=True)


def follow_parent() -> None:
    """End this process within about a second when its launcher or the notebook's kernel is gone (kill -9 included).

    And write a traceback in one piece: launchers start Python unbuffered, so processes that fail together would mix
    even their words in the log they share.
    """
    import psutil

    launcher, lease = os.getppid(), os.environ.get("BEYOND_DPO_LEASE")
    kernel = int(os.environ.get("BEYOND_DPO_PARENT", 0))

    def say(*error):
        text = "".join(traceback.format_exception(*error))
        with suppress(OSError):  # its log is on a full disk
            os.write(2, text.encode(errors="replace"))
        if lease:
            fail(lease, text)

    def watch():
        quiet = pulse(Path(lease)) if lease else itertools.repeat(0)
        while os.getppid() == launcher and (not kernel or psutil.pid_exists(kernel)) and next(quiet) < PATIENCE:
            time.sleep(1)
        os._exit(1)

    sys.excepthook = say
    if kernel or lease:
        threading.Thread(target=watch, daemon=True).start()


def fail(lease: str, text: str) -> None:
    """Tell the head why its job failed; the first process to say so is heard."""
    told = {"encoding": "utf-8", "errors": "replace"}
    with suppress(OSError), open(Path(lease).with_suffix(".failed"), "x", **told) as file:
        task = os.environ.get("RANK") or os.environ.get("SLURM_PROCID")
        file.write(f"{socket.gethostname()}, process {task or 'that starts the others'}: {text}")


def main(arguments: list[str]) -> None:
    """Follow a head, as the command line says; end here for --help and for anything else."""
    usage = "usage: python -m beyond_dpo.machine.cluster join [SECONDS TO WAIT FOR A HEAD, 3600]"
    if "--help" in arguments or "-h" in arguments:
        print(f"{usage}\n\ntakes part, from a further node, in each torchrun job of the head until that ends")
        return
    command, *rest = arguments or [""]
    seconds = rest[0] if rest else "3600"
    if command != "join" or len(rest) > 1 or not re.fullmatch(r"\d+(\.\d+)?", seconds):
        sys.exit(usage)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with suppress(KeyboardInterrupt):
        join(float(seconds))


if __name__ == "__main__":
    main(sys.argv[1:])
