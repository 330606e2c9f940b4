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
    place = Path(folder, name)
    module, job = json.loads(place.with_suffix(".json").read_text())
    try:
        launch.run(module, job, place / "checkpoints", desc=name, launcher=launcher, processes=2)
        place.with_suffix(".ok").touch()
    except launch.JobFailed as failure:
        place.with_suffix(".failed").write_text(str(failure))
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


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch):
    """Take what the machine of the tests may say of a cluster out of their environment."""
    for name in list(os.environ):
        if name.startswith(("SLURM_", "BEYOND_DPO_")) or name in (
            "RANK",
            "WORLD_SIZE",
            "LOCAL_RANK",
            "MASTER_ADDR",
        ):
            monkeypatch.delenv(name)


# ---- what the environment says


@pytest.fixture
def hosts(tmp_path, monkeypatch):
    def write(text):
        (tmp_path / "hostfile").write_text(text)
        monkeypatch.setenv("BEYOND_DPO_HOSTFILE", str(tmp_path / "hostfile"))

    return write


def test_a_hostfile_gives_launcher_and_processes(hosts):
    assert cluster.hostfile() == {} and cluster.machine(config.Train.MACHINE) == {}
    hosts("# two\nnode-1 slots=4\n\n10.0.0.2   slots=4  # the other\n")
    assert cluster.hostfile() == {"node-1": 4, "10.0.0.2": 4} and cluster.nodes("deepspeed") == 2
    assert cluster.machine(config.Train.MACHINE) == {"launcher": "deepspeed", "processes": 8}
    assert cluster.nodes("torchrun") == cluster.nodes("plain") == 1


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


def test_the_environment_sets_the_machine_and_never_a_key(monkeypatch):
    before = config.load("expo", "smoke")
    keys = [stages.sft(before).key, stages.aligned(before, 0.5).key]
    given = {
        "LAUNCHER": "srun",
        "PROCESSES": "2",
        "MICRO_BATCH": "1",
        "OFFLOAD": "true",
        "ZERO": "2",
        "LR": "7",
    }
    for name, value in given.items():
        monkeypatch.setenv(f"BEYOND_DPO_{name}", value)
    cfg = config.load("expo", "smoke")
    assert cfg.sft.launcher == cfg.train.launcher == "srun" and cfg.train.processes == 2
    assert (cfg.train.micro_batch, cfg.train.offload, cfg.train.zero) == (1, True, 2)
    assert (
        cfg.train.lr == before.train.lr and cfg.train.global_batch == before.train.global_batch
    ), "of the result"
    assert [stages.sft(cfg).key, stages.aligned(cfg, 0.5).key] == keys
    assert config.load("expo", "smoke", train__processes=4).train.processes == 4, (
        "a notebook's own value counts more"
    )
    monkeypatch.setenv("BEYOND_DPO_PROCESSES", "two")
    with pytest.raises(config.ConfigError, match=r"processes.*'two'"):
        config.load("expo", "smoke")
    monkeypatch.setenv("BEYOND_DPO_PROCESSES", "16")
    with pytest.raises(
        config.ConfigError, match="cannot be split into micro_batch=1 × processes=16"
    ):
        config.load("expo", "smoke")


def test_commands_for_many_nodes(hosts, monkeypatch, tmp_path):
    file = tmp_path / "c.json"
    hosts("a slots=4\nb slots=4")
    line = launch.command("m", file, launcher="deepspeed", processes=8)
    runner = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", "4"]
    ssh = ["--hostfile", str(tmp_path / "hostfile"), "--force_multi"]
    assert line == [*runner, *ssh, "--no_local_rank", "--module", "m", str(file)]
    with pytest.raises(ValueError, match="8 processes a host are more than the slots"):
        launch.command("m", file, launcher="deepspeed", processes=16)

    monkeypatch.setenv("SLURM_NNODES", "2")
    line = launch.command("m", file, launcher="srun", processes=8)
    assert line[:3] == ["srun", "--ntasks", "8"]
    assert line[-5:] == [sys.executable, "-u", "-m", "m", str(file)]
    with pytest.raises(ValueError, match="3 processes cannot be shared equally by 2 nodes"):
        launch.command("m", file, launcher="srun", processes=3)

    alone = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "3"]
    assert launch.command("m", file, launcher="torchrun", processes=3)[:5] == alone


def test_processes_of_other_nodes_follow_no_process_of_the_head(hosts, monkeypatch, tmp_path):
    """Only for the launchers that reach other nodes; DeepSpeed's gets a file of what to export
    there.
    """
    assert cluster.environment("plain", tmp_path) == cluster.environment("torchrun", tmp_path) == {}
    assert cluster.environment("deepspeed", tmp_path) == {}
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
    given = {
        "NCCL_DEBUG": "INFO",
        "OMP_NUM_THREADS": "3",
        "OPENAI_API_KEY": "secret",
        "HF_TOKEN": "secret",
    }
    text = cluster.exported(given)
    assert text == "UCX_TLS=tcp\nNCCL_DEBUG=WARN\nNCCL_DEBUG=INFO\nOMP_NUM_THREADS=3\n", (
        "no secret leaves the head"
    )


ALONE = dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="localhost", MASTER_PORT="0")
STEP = dict(
    STEP_NUM_TASKS="16", STEP_ID="2", JOB_ID="4242", PROCID="9", LOCALID="1", STEP_NODELIST="n[1-2]"
)


@pytest.mark.parametrize(
    "slurm, devices, want",
    [
        ({}, 0, ALONE),
        (
            {"NTASKS": "16", "PROCID": "0", "JOB_ID": "4242"},
            8,
            ALONE,
        ),  # the batch script, which is no step
        (
            STEP | {"STEP_NUM_TASKS": "1", "PROCID": "0"},
            8,
            ALONE,
        ),  # a notebook server that srun started
        (
            STEP,
            0,
            {
                "RANK": "9",
                "LOCAL_RANK": "1",
                "WORLD_SIZE": "16",
                "MASTER_ADDR": "n1",
                "MASTER_PORT": "23476",
            },
        ),
        (
            STEP | {"STEP_NODELIST": "gpu[03-07,11],big"},
            8,
            {"LOCAL_RANK": "1", "MASTER_ADDR": "gpu03"},
        ),
        (
            STEP | {"STEP_NODELIST": "gpu[11,13]"},
            1,
            {"LOCAL_RANK": "0", "MASTER_ADDR": "gpu11"},
        ),  # sees its own only
        (
            STEP | {"STEP_NODELIST": "big-7,big-8", "STEP_ID": "3"},
            4,
            {"MASTER_ADDR": "big-7", "MASTER_PORT": "23477"},
        ),
    ],
)
def test_rank_by_slurm(monkeypatch, slurm, devices, want):
    """The port is 12000 + (97 · job + step) mod 20000: here 97 · 4242 + 2 = 411476, and 12000 +
    11476.
    """
    for name, value in slurm.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    found = cluster.rank(devices)
    assert found.keys() == ALONE.keys() and found == found | want
    monkeypatch.setenv("MASTER_PORT", "29500")
    assert cluster.rank(devices)["MASTER_PORT"] == ("0" if found == ALONE else "29500")


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
        return
    time.sleep(2.5)
    assert alive(pid)
    os.kill(pid, signal.SIGKILL)


@pytest.mark.skipif(not cluster.TETHER, reason="no setpriv")
def test_a_launcher_of_other_nodes_is_told_to_end_when_its_head_is_killed(tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "srun").write_text(SRUN.format(folder=tmp_path))
    (tmp_path / "bin" / "srun").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    (tmp_path / "task.json").write_text(json.dumps(["no_module", {}]))
    head = subprocess.Popen([sys.executable, "-c", HEAD, str(tmp_path), "srun", "task"])
    wait_for((tmp_path / "started").exists)
    head.kill()
    head.wait()
    wait_for((tmp_path / "ended").exists, 10)


# ---- two hosts


@pytest.fixture(scope="module")
def folder(tiny, rows, tmp_path_factory):
    """Write a training job, job.json, and its result in one process, the folder `one`."""
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
    launch.run(
        "beyond_dpo.jobs.train",
        job | {"out": str(folder / "one")},
        folder / "one" / "checkpoints",
        desc="one",
    )
    return folder


class Hosts:
    """Two hosts, n1 and n2: network and UTS namespaces with addresses 10.77.N.1 and .2; or this
    machine twice.
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
        self.names = [f"bd{os.getpid()}{c}" for c in "ab"]
        self.addresses = [f"10.77.{number}.1", f"10.77.{number}.2"]
        first, second = self.addresses
        (tmp / "hosts").write_text(f"127.0.0.1 localhost\n{first} n1\n{second} n2\n")
        a, b = self.names
        lines = [
            f"netns add {a}",
            f"netns add {b}",
            f"link add eth0 netns {a} type veth peer name eth0 netns {b}",
        ]
        for name, address in zip(self.names, self.addresses, strict=True):
            lines.append(f"-n {name} addr add {address}/24 dev eth0")
            lines.append(f"-n {name} link set eth0 up")
            lines.append(f"-n {name} link set lo up")
        for line in lines:
            subprocess.run(["ip", *line.split()], check=True, capture_output=True)

    def start(self, host: int, *command, **environment) -> subprocess.Popen:
        """Start a command on a host, in a session of its own; its output is kept in the folder."""
        enter = []
        interface = "lo"
        if self.names:
            interface = "eth0"
            known = 'hostname "$0"; mount --bind "$1" /etc/hosts; shift; exec "$@"'
            enter = ["ip", "netns", "exec", self.names[host], "unshare", "--uts"]
            enter += ["sh", "-c", known, f"n{host + 1}", str(self.tmp / "hosts")]
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
            for end in (child.terminate, child.kill):
                with suppress(subprocess.TimeoutExpired):
                    child.wait(10 if child.poll() is None and end() is None else 0)
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], check=True)


@pytest.fixture
def two(tmp_path):
    """Yield two hosts, or one that plays both where namespaces cannot be made: no `ip`, no root, no
    leave.
    """
    try:
        made = Hosts(tmp_path, alone=False)
    except (OSError, subprocess.CalledProcessError):
        made = Hosts(tmp_path, alone=True)
    yield made
    made.close()


@pytest.fixture
def apart(two):
    if not two.names:
        pytest.skip("no network namespaces here")
    return two


def write_jobs(folder, launcher) -> list[str]:
    """Write what HEAD runs: a training, a task that fails, one that does not end. Return their
    names.
    """
    names = [launcher, f"{launcher}-broken", f"{launcher}-endless"]
    training = json.loads((folder / "job.json").read_text()) | {"out": str(folder / launcher)}
    broken = {"notes": str(folder / names[1]), "fail": "1"}
    endless = {"notes": str(folder / names[2]), "fail": ""}
    jobs = [["beyond_dpo.jobs.train", training], ["a_task", broken], ["a_task", endless]]
    for name, job in zip(names, jobs, strict=True):
        (folder / f"{name}.json").write_text(json.dumps(job))
    (folder / "a_task.py").write_text(TASK)
    (folder / "a_head.py").write_text(HEAD)
    return names


def named(folder):
    """Return the processes on all hosts whose command line names the folder: launchers and all that
    they started.
    """
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            found += [path.name] * (f"{folder}/".encode() in (path / "cmdline").read_bytes())
    return found


def losses(folder, name):
    return [
        json.loads(line)["loss"] for line in (folder / name / "log.jsonl").read_text().splitlines()
    ]


def check_trained(folder, name):
    """Compare with one process: another number of processes is the same training."""
    assert len(losses(folder, name)) == 6
    assert losses(folder, name) == pytest.approx(losses(folder, "one"), abs=1e-5)
    assert (folder / name / "model.safetensors").exists()


def check_head(folder, launcher):
    """Look at what the head was told: the training ended well, and why the next task failed.

    The traceback is that of the other host's process; the first process ended with it.
    """
    assert (folder / f"{launcher}.ok").exists(), (folder / f"{launcher}.failed").read_text()
    check_trained(folder, launcher)
    message = (folder / f"{launcher}-broken.failed").read_text()
    assert message.count("ValueError: broken lamp") == 1
    pids = [(folder / f"{launcher}-broken{rank}").read_text().strip() for rank in "01"]
    wait_for(lambda: not any(map(alive, pids)), 30)


def endless(folder, way):
    """Wait for the endless job; return the ids of its processes."""
    notes = [folder / f"{way}-endless{rank}" for rank in "01"]
    wait_for(lambda: all(note.exists() and note.read_text().endswith("\n") for note in notes), 300)
    pids = [note.read_text().strip() for note in notes]
    assert all(map(alive, pids))
    return pids


@pytest.mark.slow
def test_the_torchrun_line_of_the_recipes_on_two_hosts_trains_as_one_process_does(folder, two):
    """The line is taken from the page, with other names; both hosts run it on one job file."""
    line = next(
        line
        for line in (RECIPES / "README.md").read_text().splitlines()
        if "torchrun --nnodes" in line
    )
    job = folder / "torchrun.json"
    job.write_text(
        json.dumps(
            json.loads((folder / "job.json").read_text()) | {"out": str(folder / "torchrun")}
        )
    )
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
    assert shlex.split(line)[0] == "torchrun"
    agent = [sys.executable, "-m", "torch.distributed.run", *shlex.split(line)[1:]]
    agents = [two.start(host, *agent) for host in (0, 1)]
    status = [agent.wait(300) for agent in agents]
    assert status == [0, 0], [(two.tmp / f"output{host}").read_text()[-2000:] for host in (0, 1)]
    check_trained(folder, "torchrun")
    assert all(sent > 100_000 for sent in two.sent()), "gradients went from host to host"


@pytest.mark.slow
@pytest.mark.skipif(
    not (shutil.which("pdsh") and Path("/usr/sbin/sshd").exists()), reason="no pdsh or sshd"
)
def test_a_deepspeed_job_over_ssh(folder, apart, monkeypatch):
    """An own sshd on each host, with own keys; `ssh` on PATH is the real one with a
    configuration.
    """
    tmp = apart.tmp
    for name in ("host", "id"):
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp / name)], check=True
        )
    (tmp / "sshd_config").write_text(
        f"Port 22\nHostKey {tmp}/host\nAuthorizedKeysFile {tmp}/id.pub\nPermitRootLogin yes\n"
        "StrictModes no\n"
        "UsePAM no\nUseDNS no\nPidFile none\n"
    )
    (tmp / "ssh_config").write_text(
        f"Host *\nIdentityFile {tmp}/id\nStrictHostKeyChecking no\nUserKnownHostsFile /dev/null\n"
        "LogLevel ERROR\n"
    )
    (tmp / "bin").mkdir()
    (tmp / "bin" / "ssh").write_text(f'#!/bin/sh\nexec /usr/bin/ssh -F {tmp}/ssh_config "$@"\n')
    (tmp / "bin" / "ssh").chmod(0o755)
    (tmp / "hostfile").write_text("n1 slots=1\nn2 slots=1\n")
    monkeypatch.setenv("PYTHONPATH", f"{folder}{os.pathsep}{os.environ['PYTHONPATH']}")
    monkeypatch.setenv("PATH", f"{tmp / 'bin'}{os.pathsep}{os.environ['PATH']}")
    Path("/run/sshd").mkdir(exist_ok=True)
    for host in (0, 1):
        apart.start(host, "/usr/sbin/sshd", "-D", "-e", "-f", tmp / "sshd_config")
    jobs = write_jobs(folder, "deepspeed")
    given = {"BEYOND_DPO_HOSTFILE": str(tmp / "hostfile")}
    head = apart.start(0, sys.executable, folder / "a_head.py", folder, "deepspeed", *jobs, **given)
    pids = endless(folder, "deepspeed")
    check_head(folder, "deepspeed")
    head.kill()
    wait_for(lambda: not any(map(alive, pids)), 30)
    wait_for(lambda: not named(folder), 30)


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
        f"--{name}={tmp}/munge.{name.split('-')[0]}"
        for name in ("key-file", "pid-file", "log-file", "seed-file")
    ]
    apart.start(0, "munged", "--foreground", "--force", *files, f"--socket={tmp}/munge.socket")
    wait_for((tmp / "munge.socket").exists)
    apart.start(0, "slurmctld", "-D")
    for host in (0, 1):
        apart.start(host, "slurmd", "-D", "-N", f"n{host + 1}")

    def ask(*command):
        inside = ["ip", "netns", "exec", apart.names[0], *map(str, command)]
        return subprocess.run(inside, capture_output=True, text=True).stdout

    wait_for(
        lambda: ask("sinfo", "-h", "-N", "-o", "%N %t").split() == ["n1", "idle", "n2", "idle"], 60
    )
    script = tmp / "job.sh"
    jobs = " ".join(write_jobs(folder, "srun"))
    head = f"{sys.executable} {folder}/a_head.py {folder} srun {jobs} & echo $! > {tmp}/head"
    script.write_text(f"#!/bin/bash\n{head}\nwait\nsleep 300\n")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")
    options = ["--nodes=2", "--ntasks-per-node=1", f"--output={tmp}/batch", f"--chdir={tmp}"]
    number = re.search(r"\d+", ask("sbatch", *options, script))[0]
    pids = endless(folder, "srun")
    check_head(folder, "srun")
    os.kill(int((tmp / "head").read_text()), signal.SIGKILL)
    wait_for(lambda: not any(map(alive, pids)) and not named(folder), 60)
    ask("scancel", number)
    wait_for(lambda: not ask("squeue", "-h"))


# ---- recipes


def test_the_batch_script_of_the_recipes_is_short_and_is_one():
    text = (RECIPES / "slurm.sh").read_text()
    assert len(text.splitlines()) < 40 and text.startswith("#!/bin/bash\n")
    subprocess.run(["bash", "-n", str(RECIPES / "slurm.sh")], check=True)


def test_the_recipes_name_only_variables_that_are_read():
    files = sorted(RECIPES.iterdir())
    assert [file.name for file in files] == ["README.md", "hostfile", "slurm.sh"]
    fields = [*config.Train.MACHINE, *config.Decoding.MACHINE, "artifacts", "hostfile"]
    known = {f"BEYOND_DPO_{field.upper()}" for field in fields}
    for file in files:
        named = set(re.findall(r"BEYOND_DPO_\w+", file.read_text()))
        assert named and named <= known
