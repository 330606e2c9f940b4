"""Many nodes for real: two network namespaces are two hosts, where they can be had.

Over ssh and under SLURM the same training runs where the commands exist (openssh-server and pdsh;
slurm-wlm and munge); no test installs them.
"""

import dataclasses
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from beyond_dpo.machine import cluster, launch, paths
from beyond_dpo.pipeline import config, stages
from beyond_dpo.rows import write_rows
from conftest import alive, wait_for

RECIPES = paths.ROOT / "recipes"
# The head runs jobs one after the other, each described by folder/NAME.json.
HEAD = """
import json, sys
from pathlib import Path
from beyond_dpo.machine import launch

folder, launcher, *names = sys.argv[1:]
for name in names:
    path = Path(folder, name)
    module, job = json.loads(path.with_suffix(".json").read_text())
    try:
        launch.run(module, job, path / "checkpoints", desc=name, launcher=launcher, processes=2)
        path.with_suffix(".ok").touch()
    except launch.JobFailed as failure:
        path.with_suffix(".failed").write_text(str(failure))
"""
# Of a job's two processes one fails, if the job says so, and then the other one at the barrier.
TASK = """
import json, os, sys, time
from pathlib import Path
from torch import distributed
from beyond_dpo.machine import cluster, launch

launch.follow_parent()
if "RANK" not in os.environ:
    os.environ |= cluster.rank(0)
distributed.init_process_group("gloo")
job = json.loads(Path(sys.argv[1]).read_text())
rank = os.environ["RANK"]
Path(job["notes"] + rank).write_text(f"{os.getpid()}\\n")
distributed.barrier()
if job["fail"] == rank:
    raise ValueError("broken lamp")
distributed.barrier()
time.sleep(300)
"""
# Stands for srun: says that it runs, and when it is told to end.
SRUN = """#!/bin/sh
trap 'kill $!; touch {folder}/ended; exit 1' TERM
sleep 300 &
touch {folder}/started
wait
"""
LAUNCHER = """
import subprocess, sys

code = "import time; from beyond_dpo.machine import cluster; cluster.follow_parent(); "
code += "print('on', flush=True); time.sleep(300)"
child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
child.stdout.readline()
print(child.pid, flush=True)
child.wait()
"""


OF_A_CLUSTER = ("SLURM_", "BEYOND_DPO_", "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch):
    """Take what the machine of the tests may say of a cluster out of their environment."""
    for name in list(os.environ):
        if name.startswith(OF_A_CLUSTER):
            monkeypatch.delenv(name)


# ---- what the environment says


@pytest.fixture
def hosts(tmp_path, monkeypatch):
    """Return a function that writes the hostfile and names it in the environment."""

    def write(text):
        path = tmp_path / "hostfile"
        path.write_text(text)
        monkeypatch.setenv("BEYOND_DPO_HOSTFILE", str(path))

    return write


def test_a_hostfile_gives_launcher_and_processes(hosts):
    assert cluster.hostfile() == {}
    assert cluster.machine(config.Train.MACHINE) == {}
    hosts("# two\nnode-1 slots=4\n\n10.0.0.2   slots=4  # the other\n")
    assert cluster.hostfile() == {"node-1": 4, "10.0.0.2": 4}
    assert cluster.machine(config.Train.MACHINE) == {"launcher": "deepspeed", "processes": 8}
    assert cluster.nodes("deepspeed") == 2
    assert cluster.nodes("torchrun") == 1
    assert cluster.nodes("plain") == 1


@pytest.mark.parametrize(
    "text", ["node-1", "node-1 slots=0", "node-1 slots=two", "a slots=1\na slots=2", "# none"]
)
def test_a_bad_hostfile_is_refused(hosts, text):
    hosts(text)
    with pytest.raises(ValueError, match="hostfile"):
        cluster.hostfile()


def test_a_hostfile_that_is_not_there_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("BEYOND_DPO_HOSTFILE", str(tmp_path / "none"))
    with pytest.raises(ValueError, match="BEYOND_DPO_HOSTFILE=.*none cannot be read: No such file"):
        config.load("expo", "smoke")


def test_a_value_that_is_no_yaml_is_refused_by_name(monkeypatch):
    monkeypatch.setenv("BEYOND_DPO_PROCESSES", "[")
    with pytest.raises(ValueError, match=r"BEYOND_DPO_PROCESSES=\[ is neither a number nor a word"):
        config.load("expo", "smoke")


def test_the_hostfile_of_the_recipes_is_one(monkeypatch):
    monkeypatch.setenv("BEYOND_DPO_HOSTFILE", str(RECIPES / "hostfile"))
    assert cluster.hostfile() == {"node-1": 8, "node-2": 8}
    assert config.load("expo", "paper").train.processes == 16
    monkeypatch.setenv("BEYOND_DPO_PROCESSES", "32")
    with pytest.raises(config.ConfigError, match="global_batch"):
        config.load("expo", "paper", train__micro_batch=8)


def keys(cfg):
    return [stages.sft(cfg).key, stages.aligned(cfg, 0.5).key]


def test_the_environment_sets_the_machine_and_never_a_key(monkeypatch):
    before = config.load("expo", "smoke")
    variables = {
        "LAUNCHER": "srun",
        "PROCESSES": "2",
        "MICRO_BATCH": "1",
        "OFFLOAD": "true",
        "ZERO": "2",
        "LR": "7",  # of the result
    }
    for name, value in variables.items():
        monkeypatch.setenv(f"BEYOND_DPO_{name}", value)
    cfg = config.load("expo", "smoke")
    assert cfg.sft.launcher == "srun"
    assert cfg.train.launcher == "srun"
    assert cfg.train.processes == 2
    assert cfg.train.micro_batch == 1
    assert cfg.train.offload is True
    assert cfg.train.zero == 2
    assert cfg.train.lr == before.train.lr
    assert cfg.train.global_batch == before.train.global_batch
    assert keys(cfg) == keys(before)


def test_a_notebooks_own_value_counts_more_than_the_environments(monkeypatch):
    monkeypatch.setenv("BEYOND_DPO_MICRO_BATCH", "1")
    monkeypatch.setenv("BEYOND_DPO_PROCESSES", "2")
    assert config.load("expo", "smoke", train__processes=4).train.processes == 4


@pytest.mark.parametrize(
    "processes, message",
    [
        ("two", r"processes.*'two'"),
        ("16", "cannot be split into micro_batch=1 × processes=16"),
    ],
)
def test_a_number_of_processes_that_cannot_be_is_refused(monkeypatch, processes, message):
    monkeypatch.setenv("BEYOND_DPO_MICRO_BATCH", "1")
    monkeypatch.setenv("BEYOND_DPO_PROCESSES", processes)
    with pytest.raises(config.ConfigError, match=message):
        config.load("expo", "smoke")


def test_deepspeeds_command_for_many_nodes(hosts, tmp_path):
    job = tmp_path / "c.json"
    hosts("a slots=4\nb slots=4")
    runner = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", "4"]
    ssh = ["--hostfile", str(tmp_path / "hostfile"), "--force_multi"]
    command = launch.command("m", job, launcher="deepspeed", processes=8)
    assert command == [*runner, *ssh, "--no_local_rank", "--module", "m", str(job)]
    with pytest.raises(ValueError, match="8 processes a host are more than the slots"):
        launch.command("m", job, launcher="deepspeed", processes=16)


def test_sruns_command_for_many_nodes(monkeypatch, tmp_path):
    job = tmp_path / "c.json"
    monkeypatch.setenv("SLURM_NNODES", "2")
    command = launch.command("m", job, launcher="srun", processes=8)
    assert command[:3] == ["srun", "--ntasks", "8"]
    assert command[-5:] == [sys.executable, "-u", "-m", "m", str(job)]
    with pytest.raises(ValueError, match="3 processes cannot be shared equally by 2 nodes"):
        launch.command("m", job, launcher="srun", processes=3)


def test_torchruns_command_knows_no_other_node(hosts, monkeypatch, tmp_path):
    hosts("a slots=4\nb slots=4")
    monkeypatch.setenv("SLURM_NNODES", "2")
    command = launch.command("m", tmp_path / "c.json", launcher="torchrun", processes=3)
    agent = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "3"]
    assert command[:5] == agent


def test_processes_of_other_nodes_follow_no_process_of_the_head(hosts, monkeypatch, tmp_path):
    """This is for the launchers that reach other nodes.

    DeepSpeed's gets a file of what to export there.
    """
    for launcher in ("plain", "torchrun", "deepspeed"):
        assert cluster.environment(launcher, tmp_path) == {}
    assert cluster.environment("srun", tmp_path) == {
        "BEYOND_DPO_PARENT": "0",
        "OMP_NUM_THREADS": "1",
    }
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "12")
    assert cluster.environment("srun", tmp_path)["OMP_NUM_THREADS"] == "12"
    hosts("a slots=4\nb slots=4")
    file = str(tmp_path / "environment")
    assert cluster.environment("deepspeed", tmp_path) == {
        "BEYOND_DPO_PARENT": "0",
        "DS_ENV_FILE": file,
    }


def test_what_deepspeed_exports(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path.parent)
    (tmp_path / ".deepspeed_env").write_text("UCX_TLS=tcp\nNCCL_DEBUG=WARN\n")
    variables = {
        "NCCL_DEBUG": "INFO",
        "OMP_NUM_THREADS": "3",
        "OPENAI_API_KEY": "secret",
        "HF_TOKEN": "secret",
    }
    expected = "UCX_TLS=tcp\nNCCL_DEBUG=WARN\nNCCL_DEBUG=INFO\nOMP_NUM_THREADS=3\n"
    assert cluster.exported(variables) == expected, "no secret leaves the head"


ALONE = {
    "RANK": "0",
    "LOCAL_RANK": "0",
    "WORLD_SIZE": "1",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "0",
}
STEP = {
    "STEP_NUM_TASKS": "16",
    "STEP_ID": "2",
    "JOB_ID": "4242",
    "PROCID": "9",
    "LOCALID": "1",
    "STEP_NODELIST": "n[1-2]",
}
OF_STEP = {
    "RANK": "9",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "16",
    "MASTER_ADDR": "n1",
    "MASTER_PORT": "23476",
}
BATCH_SCRIPT = {"NTASKS": "16", "PROCID": "0", "JOB_ID": "4242"}  # is no step
NOTEBOOK_SERVER = STEP | {"STEP_NUM_TASKS": "1", "PROCID": "0"}  # is a step of one task


def set_slurm(monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(f"SLURM_{name}", value)


@pytest.mark.parametrize("slurm", [{}, BATCH_SCRIPT, NOTEBOOK_SERVER])
def test_a_process_that_is_alone(monkeypatch, slurm):
    set_slurm(monkeypatch, slurm)
    assert cluster.rank(8) == ALONE
    monkeypatch.setenv("MASTER_PORT", "29500")
    assert cluster.rank(8) == ALONE


@pytest.mark.parametrize(
    "changes, devices, different",
    [
        ({}, 0, {}),
        ({"STEP_NODELIST": "gpu[03-07,11],big"}, 8, {"MASTER_ADDR": "gpu03"}),
        # A task that sees its own device only.
        ({"STEP_NODELIST": "gpu[11,13]"}, 1, {"LOCAL_RANK": "0", "MASTER_ADDR": "gpu11"}),
        (
            {"STEP_NODELIST": "big-7,big-8", "STEP_ID": "3"},
            4,
            {"MASTER_ADDR": "big-7", "MASTER_PORT": "23477"},
        ),
    ],
)
def test_rank_by_slurm(monkeypatch, changes, devices, different):
    """The port is 12000 + (97 · job + step) mod 20000.

    Here 97 · 4242 + 2 = 411476, and the port is 12000 + 11476.
    """
    set_slurm(monkeypatch, STEP | changes)
    assert cluster.rank(devices) == OF_STEP | different
    monkeypatch.setenv("MASTER_PORT", "29500")
    assert cluster.rank(devices)["MASTER_PORT"] == "29500"


# ---- when one of those that started a process is gone


@pytest.mark.parametrize("parent, follows", [("0", True), (None, False)])
def test_a_process_follows_its_launcher_unless_it_was_started_by_hand(monkeypatch, parent, follows):
    if parent is not None:
        monkeypatch.setenv("BEYOND_DPO_PARENT", parent)
    launcher = subprocess.Popen([sys.executable, "-c", LAUNCHER], stdout=subprocess.PIPE, text=True)
    pid = int(launcher.stdout.readline())
    launcher.kill()
    launcher.communicate()
    if follows:
        wait_for(lambda: not alive(pid), 10)
    else:
        time.sleep(2.5)
        assert alive(pid)
        os.kill(pid, signal.SIGKILL)


def put_on_path(monkeypatch, command, script):
    """Write a command, which comes before all others of its name."""
    command.parent.mkdir()
    command.write_text(script)
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{command.parent}{os.pathsep}{os.environ['PATH']}")


@pytest.mark.skipif(not cluster.TETHER, reason="no setpriv")
def test_a_launcher_of_other_nodes_is_told_to_end_when_its_head_is_killed(tmp_path, monkeypatch):
    put_on_path(monkeypatch, tmp_path / "bin" / "srun", SRUN.format(folder=tmp_path))
    (tmp_path / "task.json").write_text(json.dumps(["no_module", {}]))
    head = subprocess.Popen([sys.executable, "-c", HEAD, str(tmp_path), "srun", "task"])
    wait_for((tmp_path / "started").exists)
    head.kill()
    head.wait()
    wait_for((tmp_path / "ended").exists, 10)


# ---- two hosts


@pytest.fixture(scope="module")
def folder(tiny, rows, tmp_path_factory):
    """Return a folder of a training job, job.json, and its result in one process, `one`."""
    folder = tmp_path_factory.mktemp("cluster")
    folder.chmod(0o755)
    write_rows(folder / "rows.jsonl", rows)
    settings = {
        "lr": 3e-3,
        "global_batch": 4,
        "micro_batch": 2,
        "epochs": 2,
        "loss": "sft",
        "precision": "fp32",
    }
    job = {
        "model": str(tiny),
        "rows": str(folder / "rows.jsonl"),
        "names": ["chosen"],
        "seed": 3,
        "reference": None,
        "limits": {"max_prompt": 8, "max_length": 24},
        "settings": dataclasses.asdict(config.Train(**settings, warmup=0.2)),
    }
    (folder / "job.json").write_text(json.dumps(job))
    out = folder / "one"
    launch.run("beyond_dpo.jobs.train", job | {"out": str(out)}, out / "checkpoints", desc="one")
    return folder


def ip(arguments):
    subprocess.run(["ip", *arguments.split()], check=True, capture_output=True)


class Hosts:
    """Two hosts, n1 and n2: network and UTS namespaces, or, with `alone`, this machine twice.

    Their addresses are 10.77.N.1 and 10.77.N.2.
    """

    def __init__(self, tmp: Path, alone: bool):
        self.tmp = tmp
        self.children = []
        self.names = []
        self.addresses = []
        if alone:
            return
        subprocess.run(["unshare", "--uts", "hostname", "n1"], check=True, capture_output=True)
        number = os.getpid() % 250
        self.names = [f"bd{os.getpid()}a", f"bd{os.getpid()}b"]
        self.addresses = [f"10.77.{number}.1", f"10.77.{number}.2"]
        first, second = self.addresses
        (tmp / "hosts").write_text(f"127.0.0.1 localhost\n{first} n1\n{second} n2\n")
        a, b = self.names
        ip(f"netns add {a}")
        ip(f"netns add {b}")
        ip(f"link add eth0 netns {a} type veth peer name eth0 netns {b}")
        for name, address in zip(self.names, self.addresses, strict=True):
            ip(f"-n {name} addr add {address}/24 dev eth0")
            ip(f"-n {name} link set eth0 up")
            ip(f"-n {name} link set lo up")

    def start(self, host: int, *command, **environment) -> subprocess.Popen:
        """Start a command on a host, in a session of its own; its output is kept in the folder."""
        enter = []
        interface = "lo"
        if self.names:
            interface = "eth0"
            script = 'hostname "$0"; mount --bind "$1" /etc/hosts; shift; exec "$@"'
            namespace = ["ip", "netns", "exec", self.names[host], "unshare", "--uts"]
            shell = ["sh", "-c", script, f"n{host + 1}", str(self.tmp / "hosts")]
            enter = [*namespace, *shell]
        with open(self.tmp / f"output{len(self.children)}", "wb") as out:
            child = subprocess.Popen(
                [*enter, *map(str, command)],
                env={**os.environ, "GLOO_SOCKET_IFNAME": interface, **environment},
                stdout=out,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        self.children.append(child)
        return child

    def sent(self) -> list[int]:
        """Return how many bytes each host has sent to the other."""
        sent = []
        for name in self.names:
            link = ["ip", "-j", "-s", "-n", name, "link", "show", "eth0"]
            shown = subprocess.run(link, check=True, capture_output=True).stdout
            sent.append(json.loads(shown)[0]["stats64"]["tx"]["bytes"])
        return sent

    def close(self):
        for child in reversed(self.children):  # servers last, as the others may say good-bye
            end_process(child)
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], check=True)


def end_process(child):
    """Ask a process to end, and kill it if it does not within ten seconds."""
    child.terminate()
    try:
        child.wait(10)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait(10)


@pytest.fixture
def two(tmp_path):
    """Yield two hosts, or one that plays both where namespaces cannot be made.

    They need `ip`, root, and leave to make them.
    """
    try:
        hosts = Hosts(tmp_path, alone=False)
    except (OSError, subprocess.CalledProcessError):
        hosts = Hosts(tmp_path, alone=True)
    yield hosts
    hosts.close()


@pytest.fixture
def apart(two):
    if not two.names:
        pytest.skip("no network namespaces here")
    return two


def write_jobs(folder, launcher) -> list[str]:
    """Write what HEAD runs: a training, a task that fails, one that does not end.

    Returns their names.
    """
    broken = f"{launcher}-broken"
    endless = f"{launcher}-endless"
    jobs = {
        launcher: ["beyond_dpo.jobs.train", training_job(folder, launcher)],
        broken: ["a_task", {"notes": str(folder / broken), "fail": "1"}],
        endless: ["a_task", {"notes": str(folder / endless), "fail": ""}],
    }
    for name, job in jobs.items():
        (folder / f"{name}.json").write_text(json.dumps(job))
    (folder / "a_task.py").write_text(TASK)
    (folder / "a_head.py").write_text(HEAD)
    return list(jobs)


def training_job(folder, name):
    job = json.loads((folder / "job.json").read_text())
    return job | {"out": str(folder / name)}


def processes_of(folder):
    """Return the processes on all hosts whose command line names the folder.

    These are launchers and all that they started.
    """
    pids = []
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            command = (path / "cmdline").read_bytes()
            if f"{folder}/".encode() in command:
                pids.append(path.name)
    return pids


def losses(folder, name):
    lines = (folder / name / "log.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def check_trained(folder, name):
    """Compare with one process: another number of processes is the same training."""
    trained = losses(folder, name)
    assert len(trained) == 6
    assert trained == pytest.approx(losses(folder, "one"), abs=1e-5)
    assert (folder / name / "model.safetensors").exists()


def wait_for_end_of(pids, seconds=30):
    wait_for(lambda: not any(alive(pid) for pid in pids), seconds)


def check_head(folder, launcher):
    """Look at what the head was told: the training ended well, and why the next task failed.

    The traceback is that of the other host's process; the first process ended with it.
    """
    assert (folder / f"{launcher}.ok").exists(), (folder / f"{launcher}.failed").read_text()
    check_trained(folder, launcher)
    message = (folder / f"{launcher}-broken.failed").read_text()
    assert message.count("ValueError: broken lamp") == 1
    notes = [folder / f"{launcher}-broken0", folder / f"{launcher}-broken1"]
    wait_for_end_of([note.read_text().strip() for note in notes])


def endless_pids(folder, launcher):
    """Wait for the endless job; return the ids of its processes."""
    pids = []
    for rank in (0, 1):
        note = folder / f"{launcher}-endless{rank}"
        wait_for(lambda note=note: note.exists() and note.read_text().endswith("\n"), 300)
        pids.append(note.read_text().strip())
    assert all(alive(pid) for pid in pids)
    return pids


@pytest.mark.slow
def test_the_torchrun_line_of_the_recipes_on_two_hosts_trains_as_one_process_does(folder, two):
    """The line is taken from the page, with other names; both hosts run it on one job file."""
    page = (RECIPES / "README.md").read_text()
    line = re.search(r"^.*torchrun --nnodes.*$", page, re.MULTILINE)[0]
    job = folder / "torchrun.json"
    job.write_text(json.dumps(training_job(folder, "torchrun")))
    meeting = "n1:29400"
    if not two.names:  # both meet on loopback, at a port that is free
        meeting = f"127.0.0.1:{launch._free_port()} --local_addr 127.0.0.1"
    changes = {
        "--nproc_per_node 8": "--nproc_per_node 1",
        "node-1:29400": meeting,
        "JOB.json": str(job),
    }
    for old, new in changes.items():
        assert old in line
        line = line.replace(old, new)
    command, *options = shlex.split(line)
    assert command == "torchrun"
    agent = [sys.executable, "-m", "torch.distributed.run", *options]
    agents = [two.start(host, *agent) for host in (0, 1)]
    for host, child in enumerate(agents):
        assert child.wait(300) == 0, (two.tmp / f"output{host}").read_text()[-2000:]
    check_trained(folder, "torchrun")
    assert all(sent > 100_000 for sent in two.sent()), "gradients went from host to host"


@pytest.mark.slow
@pytest.mark.skipif(
    not (shutil.which("pdsh") and Path("/usr/sbin/sshd").exists()), reason="no pdsh or sshd"
)
def test_a_deepspeed_job_over_ssh(folder, apart, monkeypatch):
    """An own sshd on each host, with own keys; `ssh` on PATH is the real one, configured."""
    tmp = apart.tmp
    keygen = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f"]
    for name in ("host", "id"):
        subprocess.run([*keygen, str(tmp / name)], check=True)
    (tmp / "sshd_config").write_text(
        f"Port 22\nHostKey {tmp}/host\nAuthorizedKeysFile {tmp}/id.pub\nPermitRootLogin yes\n"
        "StrictModes no\n"
        "UsePAM no\nUseDNS no\nPidFile none\n"
    )
    (tmp / "ssh_config").write_text(
        f"Host *\nIdentityFile {tmp}/id\nStrictHostKeyChecking no\nUserKnownHostsFile /dev/null\n"
        "LogLevel ERROR\n"
    )
    ssh = f'#!/bin/sh\nexec /usr/bin/ssh -F {tmp}/ssh_config "$@"\n'
    put_on_path(monkeypatch, tmp / "bin" / "ssh", ssh)
    (tmp / "hostfile").write_text("n1 slots=1\nn2 slots=1\n")
    monkeypatch.setenv("PYTHONPATH", f"{folder}{os.pathsep}{os.environ['PYTHONPATH']}")
    Path("/run/sshd").mkdir(exist_ok=True)
    for host in (0, 1):
        apart.start(host, "/usr/sbin/sshd", "-D", "-e", "-f", tmp / "sshd_config")
    jobs = write_jobs(folder, "deepspeed")
    command = [sys.executable, folder / "a_head.py", folder, "deepspeed", *jobs]
    head = apart.start(0, *command, BEYOND_DPO_HOSTFILE=str(tmp / "hostfile"))
    pids = endless_pids(folder, "deepspeed")
    check_head(folder, "deepspeed")
    head.kill()
    wait_for_end_of(pids)
    wait_for(lambda: not processes_of(folder), 30)


SLURM = """
ClusterName=trial
SlurmctldHost=n1({first})
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={tmp}/munge.socket
StateSaveLocation={tmp}/state
SlurmdSpoolDir={tmp}/%n
SlurmctldPidFile={tmp}/ctld.pid
SlurmdPidFile={tmp}/%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
NodeName=n1 NodeAddr={first} CPUs=2 Port=17001
NodeName=n2 NodeAddr={second} CPUs=2 Port=17002
PartitionName=all Nodes=n1,n2 Default=YES State=UP
"""


@pytest.mark.slow
@pytest.mark.skipif(
    not all(map(shutil.which, ("sbatch", "slurmctld", "slurmd", "munged"))), reason="no SLURM"
)
def test_a_slurm_job(folder, apart, monkeypatch):
    """A cluster of two nodes; the batch script starts the head, whose jobs are steps over both.

    A step ends with the head, though the batch script lives on.
    """
    tmp = apart.tmp
    first, second = apart.addresses
    (tmp / "slurm.conf").write_text(SLURM.format(first=first, second=second, tmp=tmp))
    (tmp / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
    (tmp / "state").mkdir()
    (tmp / "munge.key").write_bytes(os.urandom(64))
    (tmp / "munge.key").chmod(0o600)
    tmp.chmod(0o755)
    monkeypatch.setenv("SLURM_CONF", str(tmp / "slurm.conf"))
    monkeypatch.setenv("PYTHONPATH", f"{folder}{os.pathsep}{os.environ['PYTHONPATH']}")
    files = [
        f"--key-file={tmp}/munge.key",
        f"--pid-file={tmp}/munge.pid",
        f"--log-file={tmp}/munge.log",
        f"--seed-file={tmp}/munge.seed",
    ]
    apart.start(0, "munged", "--foreground", "--force", *files, f"--socket={tmp}/munge.socket")
    wait_for((tmp / "munge.socket").exists)
    apart.start(0, "slurmctld", "-D")
    for host in (0, 1):
        apart.start(host, "slurmd", "-D", "-N", f"n{host + 1}")

    def on_head(*command):
        """Return what a command prints on the first host."""
        inside = ["ip", "netns", "exec", apart.names[0], *map(str, command)]
        return subprocess.run(inside, capture_output=True, text=True).stdout

    idle = ["n1", "idle", "n2", "idle"]
    wait_for(lambda: on_head("sinfo", "-h", "-N", "-o", "%N %t").split() == idle, 60)
    jobs = " ".join(write_jobs(folder, "srun"))
    head = f"{sys.executable} {folder}/a_head.py {folder} srun {jobs} & echo $! > {tmp}/head"
    script = tmp / "job.sh"
    script.write_text(f"#!/bin/bash\n{head}\nwait\nsleep 300\n")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")
    options = ["--nodes=2", "--ntasks-per-node=1", f"--output={tmp}/batch", f"--chdir={tmp}"]
    submitted = on_head("sbatch", *options, script)
    number = re.search(r"\d+", submitted)[0]
    pids = endless_pids(folder, "srun")
    check_head(folder, "srun")
    os.kill(int((tmp / "head").read_text()), signal.SIGKILL)
    wait_for_end_of(pids, 60)
    wait_for(lambda: not processes_of(folder), 60)
    on_head("scancel", number)
    wait_for(lambda: not on_head("squeue", "-h"))


# ---- recipes


def test_the_batch_script_of_the_recipes_is_short_and_is_one():
    text = (RECIPES / "slurm.sh").read_text()
    assert text.startswith("#!/bin/bash\n")
    assert len(text.splitlines()) < 40
    subprocess.run(["bash", "-n", str(RECIPES / "slurm.sh")], check=True)


def test_the_recipes_name_only_variables_that_are_read():
    files = sorted(RECIPES.iterdir())
    assert [file.name for file in files] == ["README.md", "hostfile", "slurm.sh"]
    fields = [*config.Train.MACHINE, *config.Decoding.MACHINE, "artifacts", "hostfile"]
    known = {f"BEYOND_DPO_{field.upper()}" for field in fields}
    for file in files:
        named = set(re.findall(r"BEYOND_DPO_\w+", file.read_text()))
        assert named
        assert named <= known
