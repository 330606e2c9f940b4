"""The process that does jobs in turn.

It is one for all, ended by a job that fails, and by the end of the kernel.
"""

import json

import psutil
import pytest

from beyond_dpo.machine import launch, paths, workers
from beyond_dpo.pipeline import config
from beyond_dpo.rows import write_rows


@pytest.fixture
def job(tmp_path, monkeypatch, tiny, rows):
    workers.close()  # those of other modules
    monkeypatch.setattr(paths, "ARTIFACTS", tmp_path / "artifacts")
    write_rows(tmp_path / "rows.jsonl", rows)
    limits = {"max_prompt": 16, "max_length": 64}
    job = {
        "model": str(tiny),
        "rows": str(tmp_path / "rows.jsonl"),
        "names": ["chosen"],
        "limits": limits,
    }
    yield job | {"precision": "fp32", "micro_batch": 8, "out": str(tmp_path / "out.safetensors")}
    workers.close()


@pytest.mark.slow
def test_jobs_share_a_process_until_one_fails(tmp_path, job):
    out = tmp_path / "a"
    out.mkdir()
    workers.run("beyond_dpo.jobs.reference", job, out, "one")
    first = workers.living["jobs"].child.pid
    assert (tmp_path / "out.safetensors").exists() and json.loads(
        (out / "checkpoints/config.json").read_text()
    ) == job
    workers.run("beyond_dpo.jobs.reference", job, out, "two")
    assert workers.living["jobs"].child.pid == first
    with pytest.raises(
        launch.JobFailed, match=r"(?s)three: Traceback.*row .* has no response 'said'"
    ):
        workers.run("beyond_dpo.jobs.reference", job | {"names": ["said"]}, out, "three")
    assert "jobs" not in workers.living and not psutil.pid_exists(first)
    workers.run("beyond_dpo.jobs.reference", job, out, "four")
    assert workers.living["jobs"].child.pid != first


def test_room_is_made_only_where_it_is_scarce(job, monkeypatch):
    cfg = config.load("expo", "smoke")
    worker = workers.get("jobs", "beyond_dpo.machine.launch", {})
    monkeypatch.setattr(workers, "memory_gib", lambda: 2.0 * cfg.needs.memory_gb)
    workers.make_room(cfg)
    assert workers.get("jobs", "beyond_dpo.machine.launch", {}) is worker, "there is plenty"
    monkeypatch.setattr(workers, "memory_gib", lambda: 1.9 * cfg.needs.memory_gb)
    workers.make_room(cfg, "jobs")
    assert workers.living == {"jobs": worker}
    workers.make_room(cfg, "generate")
    assert not workers.living and worker.child.poll() is not None
