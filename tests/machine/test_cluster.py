"""Many nodes for real: two network namespaces are two hosts, one of which follows the other; where they can be had.

Over ssh and under SLURM the same training runs where the commands exist (openssh-server and pdsh; slurm-wlm and munge);
no test installs them.
"""

import dataclasses
import json
import os
import re
import shutil
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
# What a head does: train; have a follower's process fail; train on, until it is killed.
HEAD = """
import json, os, sys, time
from pathlib import Path
from beyond_dpo.machine import cluster, launch

folder, launcher, *jobs = Path(sys.argv[1]), *sys.argv[2:]
cluster.head()
for name in jobs:
    module, job = json.loads((folder / f"{name}.json").read_text())
    try:
        launch.run(module, job, folder / name / "checkpoints", desc=name, launcher=launcher, processes=2)
        (folder / f"{name}.ok").touch()
    except launch.JobFailed as failure:
        (folder / f"{name}.failed").write_text(str(failure))
"""
TASK = """
import json, os, sys, time
from pathlib import Path
from beyond_dpo.machine import launch

launch.follow_parent()
job, rank = json.loads(Path(sys.argv[1]).read_text()), os.environ.get("RANK") or os.environ["SLURM_PROCID"]
with open(job["notes"] + rank, "w") as note:
    print(os.getpid(), file=note)
while not all(Path(job["notes"] + other).exists() for other in "01"):
    time.sleep(0.05)
if job["fail"] == rank:
    raise ValueError("broken lamp")
time.sleep(300)
"""


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch):
    """Take what the machine of the tests may say of a cluster out of their environment."""
    for name in list(os.environ):
        if name.startswith(("SLURM_", "BEYOND_DPO_")) or name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"):
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
    assert cluster.hostfile.__doc__ and cluster.nodes("torchrun") == cluster.nodes("plain") == 1


@pytest.mark.parametrize("text", ["node-1", "node-1 slots=0", "node-1 slots=two", "a slots=1\na slots=2", "# none"])
def test_a_bad_hostfile_is_refused(hosts, text):
    hosts(text)
    with pytest.raises(ValueError, match="hostfile"):
        cluster.hostfile()


def test_a_hostfile_that_is_not_there_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("BEYOND_DPO_HOSTFILE", str(tmp_path / "none"))
    with pytest.raises(ValueError, match="BEYOND_DPO_HOSTFILE=.*none cannot be read: No such file"):
        config.load("expo", "smoke")


@pytest.mark.parametrize("text", ["two", "0", "-1", "1.5"])
def test_a_number_of_nodes_that_is_none_is_refused_by_name(monkeypatch, text):
    monkeypatch.setenv("BEYOND_DPO_NODES", text)
    with pytest.raises(ValueError, match=f"BEYOND_DPO_NODES={text} is not a whole number above 0"):
        cluster.nodes("torchrun")
    assert cluster.nodes("plain") == 1
    monkeypatch.setenv("BEYOND_DPO_NODES", "")
    assert cluster.nodes("torchrun") == 1


def test_a_value_that_is_no_yaml_is_refused_by_name(monkeypatch):
    monkeypatch.setenv("BEYOND_DPO_PROCESSES", "[")
    with pytest.raises(ValueError, match=r"BEYOND_DPO_PROCESSES=\[ is neither a number nor a word"):
        config.load("expo", "smoke")


def test_a_lease_that_cannot_be_touched_once_ends_no_job(tmp_path):
    """A full disk, or a file server that is away for a moment: the processes have patience of their own."""
    work = tmp_path / "jobs" / "work"
    work.mkdir(parents=True)
    with cluster.job([], work, "srun") as (_, failed, alive_):
        assert alive_()
        shutil.rmtree(tmp_path / "jobs")
        assert alive_() and not failed.exists()


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
    given = {"LAUNCHER": "srun", "PROCESSES": "2", "MICRO_BATCH": "1", "OFFLOAD": "true", "ZERO": "2", "LR": "7"}
    for name, value in given.items():
        monkeypatch.setenv(f"BEYOND_DPO_{name}", value)
    cfg = config.load("expo", "smoke")
    assert cfg.sft.launcher == cfg.train.launcher == "srun" and cfg.train.processes == 2
    assert (cfg.train.micro_batch, cfg.train.offload, cfg.train.zero) == (1, True, 2)
    assert cfg.train.lr == before.train.lr and cfg.train.global_batch == before.train.global_batch, "of the result"
    assert [stages.sft(cfg).key, stages.aligned(cfg, 0.5).key] == keys
    assert config.load("expo", "smoke", train__processes=4).train.processes == 4, "a notebook's own value counts more"
    monkeypatch.setenv("BEYOND_DPO_PROCESSES", "two")
    with pytest.raises(config.ConfigError, match=r"processes.*'two'"):
        config.load("expo", "smoke")
    monkeypatch.setenv("BEYOND_DPO_PROCESSES", "16")
    with pytest.raises(config.ConfigError, match="cannot be split into micro_batch=1 × processes=16"):
        config.load("expo", "smoke")


def test_commands_for_many_nodes(hosts, monkeypatch, tmp_path):
    file, tail = tmp_path / "c.json", ["-m", "m", str(tmp_path / "c.json")]
    monkeypatch.setenv("BEYOND_DPO_NODES", "2")
    agent = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "4", "--nnodes", "2"]
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.1")
    line = launch.command("m", file, launcher="torchrun", processes=8, now=True)
    port = line[line.index("--rdzv_endpoint") + 1].removeprefix("10.0.0.1:")
    assert line[:7] == agent and line[-3:] == tail and 1024 <= int(port) < 65536
    again = launch.command("m", file, launcher="torchrun", processes=8, now=True)
    name = line.index("--rdzv_id") + 1
    assert line[name] != again[name], "a late follower of the last job must not meet the next one's"
    shown = [launch.command("m", file, launcher="torchrun", processes=8) for _ in range(2)]
    assert shown[0] == shown[1] and shown[0][:7] == agent
    with pytest.raises(ValueError, match="3 processes cannot be shared equally by 2 nodes"):
        launch.command("m", file, launcher="torchrun", processes=3)
    monkeypatch.delenv("MASTER_ADDR")
    monkeypatch.setattr(cluster.socket, "gethostname", lambda: "localhost")  # what many a machine's name leads to
    with pytest.raises(ValueError, match="export MASTER_ADDR"):
        launch.command("m", file, launcher="torchrun", processes=2, now=True)

    hosts("a slots=4\nb slots=4")
    line = launch.command("m", file, launcher="deepspeed", processes=8)
    ssh = ["--num_accelerators", "4", "--hostfile", str(tmp_path / "hostfile"), "--force_multi"]
    assert line == [sys.executable, "-m", "deepspeed.launcher.runner", *ssh, "--no_local_rank", "--module", *tail[1:]]
    with pytest.raises(ValueError, match="8 processes a host are more than the slots"):
        launch.command("m", file, launcher="deepspeed", processes=16)

    line = launch.command("m", file, launcher="srun", processes=8)
    assert line[:3] == ["srun", "--ntasks", "8"] and line[-5:] == [sys.executable, "-u", *tail]


def test_what_deepspeed_exports(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path.parent)
    (tmp_path / ".deepspeed_env").write_text("UCX_TLS=tcp\nNCCL_DEBUG=WARN\n")
    given = {"NCCL_DEBUG": "INFO", "OMP_NUM_THREADS": "3", "OPENAI_API_KEY": "secret", "HF_TOKEN": "secret"}
    text = cluster.exported(given)
    assert text == "UCX_TLS=tcp\nNCCL_DEBUG=WARN\nNCCL_DEBUG=INFO\nOMP_NUM_THREADS=3\n", "no secret leaves the head"


ALONE = dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="localhost", MASTER_PORT="0")
STEP = dict(STEP_NUM_TASKS="16", STEP_ID="2", JOB_ID="4242", PROCID="9", LOCALID="1", STEP_NODELIST="n[1-2]")


@pytest.mark.parametrize(
    "slurm, devices, want",
    [
        ({}, 0, ALONE),
        ({"NTASKS": "16", "PROCID": "0", "JOB_ID": "4242"}, 8, ALONE),  # the batch script, which is no step
        (STEP | {"STEP_NUM_TASKS": "1", "PROCID": "0"}, 8, ALONE),  # a notebook server that srun started
        (STEP, 0, {"RANK": "9", "LOCAL_RANK": "1", "WORLD_SIZE": "16", "MASTER_ADDR": "n1", "MASTER_PORT": "23476"}),
        (STEP | {"STEP_NODELIST": "gpu[03-07,11],big"}, 8, {"LOCAL_RANK": "1", "MASTER_ADDR": "gpu03"}),
        (STEP | {"STEP_NODELIST": "gpu[11,13]"}, 1, {"LOCAL_RANK": "0", "MASTER_ADDR": "gpu11"}),  # sees its own only
        (STEP | {"STEP_NODELIST": "big-7,big-8", "STEP_ID": "3"}, 4, {"MASTER_ADDR": "big-7", "MASTER_PORT": "23477"}),
    ],
)
def test_rank_by_slurm(monkeypatch, slurm, devices, want):
    """The port is 12000 + (97 · job + step) mod 20000: here 97 · 4242 + 2 = 411476, and 12000 + 11476."""
    for name, value in slurm.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    found = cluster.rank(devices)
    assert found.keys() == ALONE.keys() and found == found | want
    monkeypatch.setenv("MASTER_PORT", "29500")
    assert cluster.rank(devices)["MASTER_PORT"] == ("0" if found == ALONE else "29500")


def test_pulse_counts_the_seconds_since_the_last_touch(tmp_path):
    """Whatever the clock says: only a change counts, and the first look shows none."""
    sign = tmp_path / "sign"
    sign.touch()
    os.utime(sign, (9, 9))
    quiet = cluster.pulse(sign)
    assert [next(quiet) for _ in range(3)] == [1, 2, 3]
    sign.touch()
    assert [next(quiet) for _ in range(2)] == [0, 1]
    os.utime(sign, (9, 9))  # by a node whose clock is wrong
    assert [next(quiet) for _ in range(2)] == [0, 1]
    sign.unlink()
    assert [next(quiet) for _ in range(2)] == [13, 25]
    sign.touch()
    assert next(quiet) == 0
    assert next(cluster.pulse(tmp_path / "none")) == 12


# ---- two hosts


@pytest.fixture(scope="module")
def folder(tiny, rows, tmp_path_factory):
    """Write a job for one process with its result, and the same job for two."""
    folder = tmp_path_factory.mktemp("cluster")
    folder.chmod(0o755)
    write_rows(folder / "rows.jsonl", rows)
    settings = {"lr": 3e-3, "global_batch": 4, "micro_batch": 2, "epochs": 2, "loss": "sft", "precision": "fp32"}
    job = {
        "model": str(tiny), "rows": str(folder / "rows.jsonl"), "names": ["chosen"], "seed": 3, "reference": None,
        "limits": {"max_prompt": 8, "max_length": 24, "bos_id": 0, "eos_id": 1},
        "settings": dataclasses.asdict(config.Train(**settings, warmup=0.2)),
    }  # fmt: skip
    launch.run("beyond_dpo.jobs.train", job | {"out": str(folder / "one")}, folder / "one" / "checkpoints", desc="one")
    (folder / "a_task.py").write_text(TASK)
    (folder / "a_head.py").write_text(HEAD)
    for way in ("torchrun", "deepspeed", "srun"):
        (folder / f"{way}.json").write_text(json.dumps(["beyond_dpo.jobs.train", job | {"out": str(folder / way)}]))
        for name, fail in {"broken": "1", "endless": ""}.items():
            task = {"notes": str(folder / f"{way}-{name}"), "fail": fail}
            (folder / f"{way}-{name}.json").write_text(json.dumps(["a_task", task]))
    return folder


class Hosts:
    """Two network namespaces with an interface eth0 each, 10.77.N.1 and .2, and an own /etc/hosts; or loopback."""

    def __init__(self, tmp: Path, alone: bool):
        self.tmp, self.children, self.names, self.addresses = tmp, [], [], ["127.0.0.1"] * 2
        if alone:
            return
        number = os.getpid() % 250
        self.names, self.addresses = [f"bd{os.getpid()}{c}" for c in "ab"], [f"10.77.{number}.{i}" for i in (1, 2)]
        a, b = self.names
        lines = [f"netns add {a}", f"netns add {b}", f"link add eth0 netns {a} type veth peer name eth0 netns {b}"]
        for name, address in zip(self.names, self.addresses, strict=True):
            lines += [f"-n {name} addr add {address}/24 dev eth0", f"-n {name} link set eth0 up"]
            lines += [f"-n {name} link set lo up"]
            known = "".join(f"{ip} n{i}\n" for i, ip in enumerate(self.addresses, 1))
            (tmp / "hosts").write_text(f"127.0.0.1 localhost\n{known}")
        for line in lines:
            subprocess.run(["ip", *line.split()], check=True, capture_output=True)

    def start(self, host: int, *command, **environment) -> subprocess.Popen:
        """Start a command on a host, in a session of its own; its output is kept in the folder."""
        known = 'mount --bind "$0" /etc/hosts; exec "$@"'
        enter, interface = [], "lo"
        if self.names:
            interface = "eth0"
            enter = ["ip", "netns", "exec", self.names[host], "sh", "-c", known, str(self.tmp / "hosts")]
        with open(self.tmp / f"output{len(self.children)}", "wb") as out:
            child = subprocess.Popen(
                [*enter, *map(str, command)], env={**os.environ, "GLOO_SOCKET_IFNAME": interface, **environment},
                stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
        self.children.append(child)
        return child

    def close(self):
        for child in reversed(self.children):  # servers last, as the others may say good-bye
            for end in (child.terminate, child.kill):
                with suppress(subprocess.TimeoutExpired):
                    child.wait(10 if child.poll() is None and end() is None else 0)
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], check=True)


@pytest.fixture
def two(tmp_path):
    """Yield two hosts, or one that plays both where namespaces cannot be made: no `ip`, no root, no leave."""
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


def named(folder):
    """Return the processes on all hosts whose command line names the folder: launchers and all that they started."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            found += [path.name] * (f"{folder}/".encode() in (path / "cmdline").read_bytes())
    return found


def losses(folder, name):
    return [json.loads(line)["loss"] for line in (folder / name / "log.jsonl").read_text().splitlines()]


def check_trained(folder, way):
    """Compare with one process: another number of processes is the same training."""
    assert (folder / f"{way}.ok").exists(), (folder / f"{way}.failed").read_text()
    assert len(losses(folder, way)) == 6 and losses(folder, way) == pytest.approx(losses(folder, "one"), abs=1e-5)
    assert (folder / way / "model.safetensors").exists()
    assert not [p for p in (folder / way).iterdir() if p.name.startswith(".checkpoints")], "a lease that nobody holds"


def check_broken(folder, way):
    """Look for the traceback of the other host's process at the head; the first process ended with it."""
    message = (folder / f"{way}-broken.failed").read_text()
    assert message.count("ValueError: broken lamp") == 1 and "process 1: Traceback" in message
    pids = [(folder / f"{way}-broken{rank}").read_text().strip() for rank in "01"]
    wait_for(lambda: not any(map(alive, pids)), 30)


def endless(folder, way):
    """Wait for the endless job; return the ids of its processes."""
    notes = [folder / f"{way}-endless{rank}" for rank in "01"]
    wait_for(lambda: all(note.exists() and note.read_text().endswith("\n") for note in notes), 300)
    pids = [note.read_text().strip() for note in notes]
    assert all(map(alive, pids))
    return pids


@pytest.mark.slow
def test_a_follower_takes_part_until_its_head_is_killed(folder, two, monkeypatch):
    """Train over two hosts; fail on one; then the head is killed by force in the middle of a third job."""
    store = folder / "torchrun-store"
    stale = folder / "stale.lease"
    stale.touch()
    gone = {"arguments": [], "workdir": str(folder), "lease": str(stale)}
    paths.write(store / "cluster" / "job.json", json.dumps(gone))  # of a head that crashed long ago
    monkeypatch.setenv("PYTHONPATH", f"{folder}{os.pathsep}{os.environ['PYTHONPATH']}")
    given = {"BEYOND_DPO_ARTIFACTS": str(store), "BEYOND_DPO_PATIENCE": "8"}
    follower = two.start(1, sys.executable, "-m", "beyond_dpo.machine.cluster", "join", 60, **given)
    time.sleep(1.5)
    assert follower.poll() is None and not list(folder.glob("job.*.log")), "a stale job is not joined"
    jobs = ["torchrun", "torchrun-broken", "torchrun-endless"]
    given |= {"MASTER_ADDR": two.addresses[0], "BEYOND_DPO_NODES": "2"}
    head = two.start(0, sys.executable, folder / "a_head.py", folder, "torchrun", *jobs, **given)
    pids = endless(folder, "torchrun")
    check_trained(folder, "torchrun")
    check_broken(folder, "torchrun")
    for name in two.names:
        link = ["ip", "-j", "-s", "-n", name, "link", "show", "eth0"]
        sent = json.loads(subprocess.run(link, check=True, capture_output=True).stdout)[0]["stats64"]
        assert min(sent["rx"]["bytes"], sent["tx"]["bytes"]) > 1_000_000, "gradients went from host to host"
    head.kill()
    wait_for(lambda: not any(map(alive, pids)), 30)
    assert follower.wait(30) == 0
    wait_for(lambda: not named(folder), 30)
    assert (two.tmp / "output0").read_text().count("joining from") == len(jobs), "each job once, also a failed one"


def test_a_follower_does_not_wait_for_ever(tmp_path):
    (tmp_path / "cluster").mkdir()
    (tmp_path / "cluster" / "head").touch()  # of a run that is over: nobody touches it now
    command = [sys.executable, "-m", "beyond_dpo.machine.cluster", "join"]
    environment = os.environ | {"BEYOND_DPO_ARTIFACTS": str(tmp_path)}
    assert subprocess.run([*command, "1"], env=environment, timeout=20).returncode == 0
    wrong = subprocess.run([*command, "1", "2"], env=environment, capture_output=True, text=True)
    assert wrong.returncode == 1 and "usage" in wrong.stderr
    wrong = subprocess.run([*command, "soon"], env=environment, capture_output=True, text=True)
    assert wrong.returncode == 1 and "usage" in wrong.stderr and "Traceback" not in wrong.stderr


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("pdsh") and Path("/usr/sbin/sshd").exists()), reason="no pdsh or sshd")
def test_a_deepspeed_job_over_ssh(folder, apart, monkeypatch):
    """An own sshd on each host, with own keys; `ssh` on PATH is the real one with a configuration."""
    tmp = apart.tmp
    for name in ("host", "id"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp / name)], check=True)
    (tmp / "sshd_config").write_text(
        f"Port 22\nHostKey {tmp}/host\nAuthorizedKeysFile {tmp}/id.pub\nPermitRootLogin yes\nStrictModes no\n"
        "UsePAM no\nUseDNS no\nPidFile none\n"
    )
    (tmp / "ssh_config").write_text(
        f"Host *\nIdentityFile {tmp}/id\nStrictHostKeyChecking no\nUserKnownHostsFile /dev/null\nLogLevel ERROR\n"
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
    given = {"BEYOND_DPO_HOSTFILE": str(tmp / "hostfile"), "BEYOND_DPO_PATIENCE": "8"}
    jobs = ["deepspeed", "deepspeed-broken", "deepspeed-endless"]
    head = apart.start(0, sys.executable, folder / "a_head.py", folder, "deepspeed", *jobs, **given)
    pids = endless(folder, "deepspeed")
    check_trained(folder, "deepspeed")
    check_broken(folder, "deepspeed")
    head.kill()
    wait_for(lambda: not any(map(alive, pids)), 30)
    wait_for(lambda: not named(folder), 30)


SLURM = """
ClusterName=trial
SlurmctldHost={name}({first})
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
@pytest.mark.skipif(not all(map(shutil.which, ("sbatch", "slurmctld", "slurmd", "munged"))), reason="no SLURM")
def test_a_slurm_job(folder, apart, monkeypatch):
    """A cluster of two nodes; the batch script is the head, its trainings are steps over both."""
    tmp = apart.tmp
    given = {"name": os.uname().nodename, "first": apart.addresses[0], "second": apart.addresses[1], "tmp": tmp}
    (tmp / "slurm.conf").write_text(SLURM.format(**given))
    (tmp / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
    (tmp / "state").mkdir()
    (tmp / "munge.key").write_bytes(os.urandom(64))
    (tmp / "munge.key").chmod(0o600)
    tmp.chmod(0o755)
    monkeypatch.setenv("SLURM_CONF", str(tmp / "slurm.conf"))
    monkeypatch.setenv("PYTHONPATH", f"{folder}{os.pathsep}{os.environ['PYTHONPATH']}")
    files = [f"--{name}={tmp}/munge.{name.split('-')[0]}" for name in ("key-file", "pid-file", "log-file", "seed-file")]
    apart.start(0, "munged", "--foreground", "--force", *files, f"--socket={tmp}/munge.socket")
    wait_for((tmp / "munge.socket").exists)
    apart.start(0, "slurmctld", "-D")
    for host in (0, 1):
        apart.start(host, "slurmd", "-D", "-N", f"n{host + 1}")

    def ask(*command):
        inside = ["ip", "netns", "exec", apart.names[0], *map(str, command)]
        return subprocess.run(inside, capture_output=True, text=True).stdout

    wait_for(lambda: ask("sinfo", "-h", "-N", "-o", "%N %t").split() == ["n1", "idle", "n2", "idle"], 60)
    script = tmp / "job.sh"
    jobs = "srun srun-broken srun-endless"
    script.write_text(f"#!/bin/bash\nexec {sys.executable} {folder}/a_head.py {folder} srun {jobs}\n")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")
    monkeypatch.setenv("BEYOND_DPO_PATIENCE", "8")
    options = ["--nodes=2", "--ntasks-per-node=1", f"--output={tmp}/batch", f"--chdir={tmp}"]
    number = re.search(r"\d+", ask("sbatch", *options, script))[0]
    pids = endless(folder, "srun")
    check_trained(folder, "srun")
    check_broken(folder, "srun")
    ask("scancel", number)
    wait_for(lambda: not any(map(alive, pids)) and not named(folder), 60)
    wait_for(lambda: not ask("squeue", "-h"))


# ---- recipes


@pytest.mark.parametrize("name", ["slurm.sh", "torchrun.sh"])
def test_recipes_are_short_and_are_scripts(name):
    text = (RECIPES / name).read_text()
    assert len(text.splitlines()) < 40 and text.startswith("#!/bin/bash\n")
    subprocess.run(["bash", "-n", str(RECIPES / name)], check=True)
    known = {f"BEYOND_DPO_{field.upper()}" for field in config.Train.MACHINE} | {"BEYOND_DPO_ARTIFACTS"}
    named = set(re.findall(r"BEYOND_DPO_\w+", text)) - {"BEYOND_DPO_NODES"}
    assert named <= known and {"BEYOND_DPO_LAUNCHER", "BEYOND_DPO_PROCESSES"} <= named
