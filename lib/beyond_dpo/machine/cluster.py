"""Many nodes, and how a child process ends with those that started it.

The head is the process that runs the notebooks. All nodes see the project, its environment and
BEYOND_DPO_ARTIFACTS under the same paths. Two launchers start processes on other nodes: DeepSpeed's
over ssh, on the hosts that BEYOND_DPO_HOSTFILE names, and SLURM's srun, in an allocation and with
BEYOND_DPO_LAUNCHER=srun. torchrun starts processes on the head's machine alone.
BEYOND_DPO_<FIELD> sets any machine field of config.Train (processes: of all nodes), none of which
changes a result. See recipes/README.md.
"""

import os
import re
import shutil
import sys
import threading
import time
import traceback
from contextlib import suppress
from pathlib import Path

import yaml

# Before a launcher's command line: Linux sends the launcher SIGTERM when the thread that started it
# is gone, also after kill -9, and the launcher then ends its processes on all nodes.
TETHER = ["setpriv", "--pdeathsig", "TERM"] if shutil.which("setpriv") else []
# Beginnings of the variables that go along over ssh, beside PYTHON*. DeepSpeed writes them into the
# log, so HF_TOKEN and other secrets are not among them.
PASSED = (
    "BEYOND_DPO_",
    "GLOO_",
    "HF_HOME",
    "HF_HUB_",
    "NCCL_",
    "OMP_",
    "TORCH_",
    "TOKENIZERS_",
    "TQDM_",
)


def machine(names) -> dict:
    """Return those of the named fields of config.Train that the environment or a hostfile sets.

    Raises ValueError as hostfile() does, and for a value that is no YAML.
    """
    fields = {}
    slots = hostfile()
    if slots:
        fields["launcher"] = "deepspeed"
        fields["processes"] = sum(slots.values())
    for name in names:
        variable = f"BEYOND_DPO_{name.upper()}"
        text = os.environ.get(variable)
        if not text:
            continue
        try:
            fields[name] = yaml.safe_load(text)
        except yaml.YAMLError:
            raise ValueError(f"{variable}={text} is neither a number nor a word") from None
    return fields


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
    slots: dict[str, int] = {}
    for line in lines:
        content = line.split("#")[0].strip()
        if not content:
            continue
        entry = re.fullmatch(r"(\S+)\s+slots=([1-9]\d*)\s*(#.*)?", line.strip())
        if not entry or entry[1] in slots:
            raise ValueError(f"{path}: {line!r} is not `host slots=N`, each host once")
        slots[entry[1]] = int(entry[2])
    if not slots:
        raise ValueError(f"{path} names no host")
    return slots


def nodes(launcher: str) -> int:
    """Return over how many nodes the launcher spreads a job.

    Raises ValueError as hostfile() does.
    """
    if launcher == "deepspeed":
        return len(hostfile()) or 1
    if launcher == "srun":
        return int(os.environ.get("SLURM_NNODES") or 1)
    return 1


def reaches_others(launcher: str) -> bool:
    """Return whether the launcher may start processes on other nodes than the head."""
    if launcher == "deepspeed":
        return bool(hostfile())
    return launcher == "srun"


def share(processes: int, launcher: str) -> int:
    """Return how many of the processes each node runs.

    Raises ValueError if that is not the same number for all.
    """
    count = nodes(launcher)
    if processes % count:
        raise ValueError(f"{processes} processes cannot be shared equally by {count} nodes")
    return processes // count


def over_ssh(hosts: dict[str, int], each: int) -> list[str]:
    """Return what makes DeepSpeed run `each` processes on each host.

    Raises ValueError if a host has fewer slots.
    """
    if each > min(hosts.values()):
        raise ValueError(f"{each} processes a host are more than the slots of one of {hosts}")
    options = ["--hostfile", os.environ["BEYOND_DPO_HOSTFILE"], "--force_multi"]
    if "MASTER_ADDR" in os.environ:
        options += ["--master_addr", os.environ["MASTER_ADDR"]]
    return options


def environment(launcher: str, workdir: Path) -> dict[str, str]:
    """Return what is added to the environment of a job whose processes may sit on other nodes.

    Nothing for a launcher that starts processes on this machine only.
    """
    if not reaches_others(launcher):
        return {}
    added = {"BEYOND_DPO_PARENT": "0"}  # the number of a process says nothing on another node
    if launcher == "deepspeed":
        added["DS_ENV_FILE"] = str(workdir.absolute() / "environment")  # see exported()
    if launcher == "srun":
        added["OMP_NUM_THREADS"] = os.environ.get("SLURM_CPUS_PER_TASK", "1")
    return added


def exported(variables: dict[str, str]) -> str:
    """Return what DeepSpeed exports on all hosts, a line NAME=value each.

    First come the lines of the user's .deepspeed_env, which DeepSpeed does not read when
    DS_ENV_FILE names another file; then those of the job's variables that other hosts need.
    """
    name = os.environ.get("DS_ENV_FILE", ".deepspeed_env")
    lines = []
    for path in (Path.home() / name, Path(name)):
        if path.is_file():
            lines += path.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    for key, value in variables.items():
        if key.startswith(PASSED):
            lines.append(f"{key}={value}")
    return "".join(f"{line}\n" for line in lines if "=" in line)


def rank(devices: int) -> dict[str, str]:
    """Return RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT of a process without them.

    A task of `srun` gets them from what SLURM says; any other process is alone. So is a batch
    script, which is no step of its job.
    devices: how many this process sees; one, where SLURM gives each task its own.
    """
    world = os.environ.get("SLURM_STEP_NUM_TASKS", "1")
    if world == "1":
        return {
            "RANK": "0",
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "1",
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": "0",  # any that is free
        }
    job = int(os.environ["SLURM_JOB_ID"])
    step = int(os.environ["SLURM_STEP_ID"])
    local = int(os.environ["SLURM_LOCALID"])
    if devices:
        local = local % devices
    # The first node of gpu[03-07,11],big is gpu03.
    first = re.match(r"([^,\[]+)(?:\[([^],-]+))?", os.environ["SLURM_STEP_NODELIST"])
    address = first[1] + (first[2] or "")
    port = 12_000 + (97 * job + step) % 20_000  # below the ports a system gives away
    return {
        "RANK": os.environ["SLURM_PROCID"],
        "LOCAL_RANK": str(local),
        "WORLD_SIZE": world,
        "MASTER_ADDR": os.environ.get("MASTER_ADDR", address),
        "MASTER_PORT": os.environ.get("MASTER_PORT", str(port)),
    }


def follow_parent() -> None:
    """End this process within about a second when one of those that started it is gone.

    Its launcher, on the same machine, is one of them. The notebook's kernel is the other, where
    BEYOND_DPO_PARENT holds its number: 0 says that the kernel may sit on another node. Both may
    have been killed with kill -9. A process that was started by hand, without that variable,
    follows nobody.

    From here on an exception that ends this process is written in one piece, see
    _write_traceback(), and transformers does without scikit-learn, see _WithoutSklearn.
    """
    import psutil

    sys.excepthook = _write_traceback
    sys.meta_path.insert(0, _WithoutSklearn)
    if "BEYOND_DPO_PARENT" not in os.environ:
        return
    kernel = int(os.environ["BEYOND_DPO_PARENT"])
    launcher = os.getppid()

    def watch():
        while os.getppid() == launcher and (not kernel or psutil.pid_exists(kernel)):
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class _WithoutSklearn:
    """A finder of modules that finds none, and lets transformers skip an import of a second.

    Its assisted decoding, which no child does, would have one function of scikit-learn at hand.
    """

    @staticmethod
    def find_spec(name: str, path=None, target=None) -> None:
        if name == "transformers.generation.candidate_generator":
            utils = sys.modules["transformers.utils"]
            utils.is_sklearn_available = lambda: False


def _write_traceback(*error) -> None:
    """Write an exception (its type, value and traceback) to stderr at once.

    Launchers start Python unbuffered, and several processes share one log: without this, those that
    fail together would mix their lines, and even words, in it.
    """
    text = "".join(traceback.format_exception(*error))
    with suppress(OSError):  # the log is on a full disk
        os.write(2, text.encode(errors="replace"))
