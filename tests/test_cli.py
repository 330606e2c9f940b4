"""The `expo` command: what it writes, says and refuses, in real runs on tiny models."""

import base64
import csv
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from beyond_dpo import extrapolate
from beyond_dpo.jobs import command
from beyond_dpo.machine import paths
from beyond_dpo.pipeline import assets
from conftest import KEY, Handler, wait_for

SINGLE = "model.safetensors"
EXPO = [sys.executable, "-m", "beyond_dpo.jobs.command"]
QUICK = ("--evaluations", "4", "--max-tokens", "8", "--max-model-len", "128")
has_mergekit = importlib.util.find_spec("mergekit") is not None
with_mergekit = pytest.mark.skipif(not has_mergekit, reason="mergekit is of the extra [bench]")


def save_moved(model: Path, out: Path, dtype=torch.float32) -> None:
    """Save a model whose weights all moved a little, as an aligned one's."""
    shutil.copytree(model, out, ignore=shutil.ignore_patterns(".*"))
    generator = torch.Generator().manual_seed(0)
    moved = {}
    for name, weight in load_file(model / SINGLE).items():
        moved[name] = (weight + 0.01 * torch.randn(weight.shape, generator=generator)).to(dtype)
    save_file(moved, out / SINGLE, {"format": "pt"})


def save_reward_model(folder: Path) -> None:
    """Save a tiny reward model with a random head."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    encoder = assets.model_dir("tiny-encoder")
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=1)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(encoder).save_pretrained(folder)


@pytest.fixture
def models(tiny, tmp_path, monkeypatch) -> Path:
    """Work in a folder with the models `sft` and `aligned`; return it."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny, "sft", ignore=shutil.ignore_patterns(".*"))
    save_moved(Path("sft"), Path("aligned"))
    return tmp_path


@pytest.fixture
def searched(models) -> Path:
    """Work beside a reward model and prompts too."""
    save_reward_model(Path("reward-model"))
    Path("prompts.txt").write_text("The film\nA story of\n\nI liked it\n")
    return models


def expo(*arguments: str) -> int:
    """Run the command in this process; return its exit code."""
    try:
        return command.main(arguments)
    except SystemExit as ended:
        return ended.code


def error_of(capsys, *arguments: str) -> str:
    """Return the one line with which a command ends that fails with 1."""
    assert expo(*arguments) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("expo: ")
    return lines[-1]


# ---- usage


@pytest.mark.parametrize("name", ["", "extrapolate", "search", "diff", "card"])
def test_help_has_examples(name, capsys):
    arguments = [name, "--help"] if name else ["--help"]
    assert expo(*arguments) == 0
    text = capsys.readouterr().out
    if name:
        assert text.count(f"\n  expo {name} ") >= 2
    else:
        assert "exit codes: 0 done, 1 an error" in text
        for part in ("extrapolate", "search", "diff", "card"):
            assert re.search(rf"^    {part}\b", text, re.M)


@pytest.mark.parametrize(
    "line, complaint",
    [
        ("", "COMMAND"),
        ("merge", "invalid choice: 'merge'"),
        ("extrapolate sft aligned out", "--alpha"),
        ("extrapolate sft aligned out --alpha much", "finite number value: 'much'"),
        ("extrapolate sft aligned out --alpha nan", "finite number value: 'nan'"),
        ("extrapolate sft aligned out --alpha 1 --modules *", "PATTERN=ALPHA value: '*'"),
        ("extrapolate sft aligned out --alpha 1 --modules *=inf", "PATTERN=ALPHA value: '*=inf'"),
        ("extrapolate sft aligned out --alpha 1 --dtype int8", "'int8'"),
        ("search sft aligned --prompts f", "--reward"),
        ("card", "OUT"),
    ],
)
def test_a_wrong_usage_ends_with_2(line, complaint, capsys):
    assert expo(*line.split()) == 2
    assert complaint in capsys.readouterr().err


@pytest.mark.parametrize("read", ["sft", "aligned"])
def test_a_missing_folder_is_one_line(models, capsys, read):
    shutil.rmtree(read)
    for name in ("extrapolate", "diff", "search"):
        arguments = {
            "extrapolate": ["out", "--alpha", "1"],
            "diff": [],
            "search": ["--prompts", "f", "--reward", "r"],
        }[name]
        line = error_of(capsys, name, "sft", "aligned", *arguments)
        assert line == f"expo: no such folder: {read}"
    assert not Path("out").exists()


def test_a_hub_that_cannot_be_reached_is_one_line(models, capsys):
    """The tests are offline (conftest.py)."""
    line = error_of(capsys, "extrapolate", "sft", "org/aligned@main", "out", "--alpha", "1")
    assert "org/aligned@main is no folder here, and cannot be had from the hub (" in line
    assert line.endswith("log in with `hf auth login` if the model is gated")


def test_a_snapshot_in_the_hubs_cache_is_named_by_its_commit(models, monkeypatch):
    from huggingface_hub import constants

    commit = "0123456789abcdef0123456789abcdef01234567"
    repo = models / "hub" / "models--org--name"
    shutil.copytree("aligned", repo / "snapshots" / commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(models / "hub"))
    assert expo("extrapolate", "sft", f"org/name@{commit}", "out", "--alpha", "1") == 0
    facts = json.loads(Path("out", "expo.json").read_text())
    assert facts["sft"] == "sft"
    assert facts["aligned"] == f"org/name@{commit}"


# ---- expo extrapolate


def test_one_alpha_is_written_into_the_folder_itself(models, capsys):
    assert expo("extrapolate", "sft", "aligned", "out", "--alpha", "0.5") == 0
    shown, said = capsys.readouterr()
    assert shown == "out\n"
    assert re.match(r"reads 1\.1 MB and writes 0\.5 MB of .*B that are free, in about ", said)
    for name, weight in extrapolate.tensors("sft", "aligned", 0.5):
        assert torch.equal(load_file("out/model.safetensors")[name], weight)


def test_several_alphas_have_a_folder_each(models, capsys):
    more = ("--alpha", "0.5", "-1", "--alpha", "1e-3", "--modules", "*.mlp.*=2", "*norm*=0")
    assert expo("extrapolate", "sft", "aligned", "out", *more) == 0
    assert capsys.readouterr().out.split() == ["out/alpha=0.5", "out/alpha=-1", "out/alpha=0.001"]
    facts = json.loads(Path("out/alpha=-1/expo.json").read_text())
    assert facts["alpha"] == -1
    assert facts["modules"] == {"*.mlp.*": 2.0, "*norm*": 0.0}
    name = "model.layers.1.mlp.up_proj.weight"
    written = load_file("out/alpha=-1/model.safetensors")
    aligned = load_file("aligned/model.safetensors")
    assert torch.equal(written["model.norm.weight"], aligned["model.norm.weight"])
    expected = dict(extrapolate.tensors("sft", "aligned", 2.0))[name]
    assert torch.equal(written[name], expected)


def test_a_dry_run_writes_nothing(models, capsys):
    before = sorted(path.name for path in models.iterdir())
    assert expo("extrapolate", "sft", "aligned", "a/out", "--alpha", "1", "2", "--dry-run") == 0
    first, *folders = capsys.readouterr().out.splitlines()
    assert first.startswith("reads 1.1 MB and writes 1.1 MB of ")
    assert folders == ["a/out/alpha=1", "a/out/alpha=2"]
    assert sorted(path.name for path in models.iterdir()) == before


def test_an_output_of_another_dtype_loads(models):
    from transformers import AutoModelForCausalLM

    assert expo("extrapolate", "sft", "aligned", "out", "--alpha", "1", "--dtype", "bfloat16") == 0
    model = AutoModelForCausalLM.from_pretrained("out")
    assert model.dtype == torch.bfloat16
    exact = dict(extrapolate.tensors("sft", "aligned", 1.0))["model.norm.weight"]
    assert torch.equal(model.model.norm.weight, exact.to(torch.bfloat16))


@pytest.mark.parametrize("dry", [(), ("--dry-run",)])
@pytest.mark.parametrize(
    "fault, arguments, complaint",
    [
        ("", ("--modules", "*.experts.*=1"), "module pattern '*.experts.*' decides no tensor"),
        ("", ("--modules", "re:(=1"), "missing ), unterminated subpattern"),
        ("full", (), "out is not a new or empty folder for one alpha"),
        ("architecture", (), "model_type in config.json is 'llama' in sft and 'gpt2' in aligned"),
    ],
)
def test_an_extrapolation_that_cannot_be_is_one_line(
    models, capsys, dry, fault, arguments, complaint
):
    if fault == "full":
        Path("out").mkdir()
        Path("out", "mine.txt").write_text("not to be lost")
    if fault == "architecture":
        settings = json.loads(Path("aligned/config.json").read_text())
        Path("aligned/config.json").write_text(json.dumps(settings | {"model_type": "gpt2"}))
    before = sorted(str(path) for path in models.rglob("*"))
    command_line = ("extrapolate", "sft", "aligned", "out", "--alpha", "1", *arguments, *dry)
    assert complaint in error_of(capsys, *command_line)
    assert sorted(str(path) for path in models.rglob("*")) == before


def test_a_full_disk_behind_the_bar_ends_no_work(models):
    """A terminal that is gone, or a full disk: tqdm's own error came through."""
    code = "import sys; sys.stderr.isatty = lambda: True\n"
    code += "from beyond_dpo.jobs import command; sys.exit(command.main(sys.argv[1:]))"
    arguments = ["extrapolate", "sft", "aligned", "out", "--alpha", "0.5"]
    environment = dict(os.environ)
    environment.pop("TQDM_DISABLE", None)
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=full,
            text=True,
        )
    assert done.returncode == 0
    assert done.stdout == "out\n"


INTERRUPTED = """
import os, signal, sys
from beyond_dpo import extrapolate
from beyond_dpo.jobs import command
signal.signal(signal.SIGINT, signal.default_int_handler)
extrapolate.extrapolate = lambda *_, **__: os.kill(os.getpid(), signal.SIGINT)
sys.exit(command.main(['extrapolate', 'sft', 'aligned', 'out', '--alpha', '1']))
"""


def test_an_interrupted_extrapolation_is_one_line(models):
    done = subprocess.run([sys.executable, "-c", INTERRUPTED], capture_output=True, text=True)
    assert done.returncode == 130
    *_, line = done.stderr.splitlines()
    assert line.startswith("interrupted; nothing half written stays")
    assert "Traceback" not in done.stderr


# ---- against the formula, and mergekit


def by_hand(alpha: float) -> dict[str, torch.Tensor]:
    """Return θ₁ + α(θ₁ − θ₀) of the two models in float64."""
    theta_sft = load_file("sft/model.safetensors")
    expected = {}
    for name, theta_aligned in load_file("aligned/model.safetensors").items():
        exact = theta_aligned.double()
        expected[name] = exact + alpha * (exact - theta_sft[name].double())
    return expected


def assert_rounded(folder: str, alpha: float, roundoff: float) -> None:
    """Compare a model with the formula: an output is rounded once, the float32 sums twice."""
    written = load_file(f"{folder}/model.safetensors")
    theta_aligned = load_file("aligned/model.safetensors")
    expected = by_hand(alpha)
    assert written.keys() == expected.keys()
    for name, exact in expected.items():
        sizes = theta_aligned[name].double().abs() + (exact - theta_aligned[name].double()).abs()
        allowed = roundoff * exact.abs() + 3 * 2.0**-24 * sizes
        assert ((written[name].double() - exact).abs() <= allowed).all(), name
    moved = (expected["model.norm.weight"] - theta_aligned["model.norm.weight"].double()).abs()
    assert moved.max() > 1e-3  # far more than rounding


@pytest.mark.parametrize("alpha", [0.3, 1.5, -0.4])
@pytest.mark.parametrize("dtype, roundoff", [("float32", 2.0**-24), ("bfloat16", 2.0**-8)])
def test_the_numbers_are_those_of_the_formula(models, alpha, dtype, roundoff):
    more = ("--alpha", str(alpha), "--dtype", dtype)
    assert expo("extrapolate", "sft", "aligned", "out", *more) == 0
    assert_rounded("out", alpha, roundoff)


def blocks(kind: str) -> list[str]:
    """Return the code of docs/expo_command.md in one language."""
    text = (paths.ROOT / "docs" / "expo_command.md").read_text(encoding="utf-8")
    return re.findall(rf"```{kind}\n(.*?)```", text, re.S)


@pytest.fixture
def shell(models, monkeypatch) -> Path:
    """Let a shell find `expo` and `mergekit-yaml` where no such scripts are installed."""
    scripts = {"expo": "beyond_dpo.jobs.command", "mergekit-yaml": "mergekit.scripts.run_yaml"}
    for name, module in scripts.items():
        script = models / "bin" / name
        script.parent.mkdir(exist_ok=True)
        script.write_text(f'#!/bin/sh\nexec {sys.executable} -m {module} "$@"\n')
        script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{models / 'bin'}:{os.environ['PATH']}")
    return models


def in_shell(line: str) -> subprocess.CompletedProcess:
    return subprocess.run(["bash", "-ec", line], capture_output=True, text=True, timeout=240)


@with_mergekit
@pytest.mark.slow
def test_mergekits_way_as_the_docs_show_it_gives_the_same(shell):
    (recipe,) = blocks("yaml")
    Path("linear.yml").write_text(recipe)
    (merge,) = [block for block in blocks("bash") if "mergekit" in block]
    done = in_shell(merge)
    assert done.returncode == 0, done.stderr[-2000:]
    assert expo("extrapolate", "sft", "aligned", "ours", "--alpha", "0.3") == 0
    assert_rounded("merged", 0.3, 2.0**-24)
    assert_rounded("ours", 0.3, 2.0**-24)


# ---- expo diff


def test_diff_shows_what_moved_and_what_is_tied(models, capsys):
    assert expo("diff", "sft", "aligned") == 0
    header, *lines, last = capsys.readouterr().out.splitlines()
    assert header.split() == ["module", "tensors", "‖θ₀‖", "‖θ₁", "−", "θ₀‖", "share"]
    rows = {}
    for line in lines:
        name, *numbers = line.split()
        rows[name] = numbers
    assert len(rows) == 12  # nine in each of two layers, embeddings, the last norm, and all
    sft = load_file("sft/model.safetensors")
    aligned = load_file("aligned/model.safetensors")
    ups = [f"model.layers.{layer}.mlp.up_proj.weight" for layer in (0, 1)]
    moved = torch.cat([(aligned[name] - sft[name]).flatten() for name in ups]).norm()
    weight = torch.cat([sft[name].flatten() for name in ups]).norm()
    tensors, norm, change, share = rows["model.layers.*.mlp.up_proj.weight"]
    assert int(tensors) == 2
    assert float(norm) == pytest.approx(weight.item(), rel=1e-3)
    assert float(change) == pytest.approx(moved.item(), rel=1e-3)
    assert float(share.rstrip("%")) == pytest.approx(100 * (moved / weight).item(), rel=1e-3)
    assert int(rows["all"][0]) == len(sft) == 20
    assert last == (
        "tied, so with one α: output head and embeddings, stored as model.embed_tokens.weight"
    )


def test_a_name_of_diffs_table_is_a_pattern(models, capsys):
    assert expo("diff", "sft", "aligned") == 0
    _, *lines, _, _ = capsys.readouterr().out.splitlines()
    patterns = [f"{line.split()[0]}=0.1" for line in lines]
    more = ("--alpha", "1", "--modules", *patterns)
    assert expo("extrapolate", "sft", "aligned", "out", *more) == 0
    everywhere = dict(extrapolate.tensors("sft", "aligned", 0.1))
    for name, weight in load_file("out/model.safetensors").items():
        assert torch.equal(weight, everywhere[name])


def test_diff_of_each_tensor(models, capsys):
    assert expo("diff", "sft", "aligned", "--tensors") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if line.startswith("model.")]) == 20


def test_diff_lists_what_would_be_refused(models, capsys):
    tokens = json.loads(Path("aligned/tokenizer.json").read_text())
    *_, (last, number) = tokens["model"]["vocab"].items()
    tokens["model"]["vocab"] = {**tokens["model"]["vocab"], "another": number}
    del tokens["model"]["vocab"][last]
    Path("aligned/tokenizer.json").write_text(json.dumps(tokens))
    state = load_file("aligned/model.safetensors")
    state["model.more.weight"] = torch.zeros(2)
    save_file(state, "aligned/model.safetensors")
    line = error_of(capsys, "diff", "sft", "aligned")
    assert line == "expo: extrapolate refuses these two: 2 differences"
    with pytest.raises(extrapolate.IncompatibleModels, match="tokenizer.json is .* and 'another'"):
        extrapolate.check("sft", "aligned")


def test_diff_counts_more_differences_than_it_lists(models, capsys):
    save_reward_model(Path("reward"))
    capsys.readouterr()
    assert expo("diff", "sft", "reward") == 1
    *listed, last = capsys.readouterr().out.splitlines()
    assert len(listed) == 10
    assert listed[0].startswith("architectures in config.json is ['LlamaForCausalLM'] in sft and ")
    assert re.fullmatch(r"… and \d+ more", last)


@pytest.mark.parametrize("fault", ["equal", "NaN"])
def test_diff_finds_what_shows_in_the_weights_only(models, capsys, fault):
    if fault == "equal":
        shutil.copyfile("sft/model.safetensors", "aligned/model.safetensors")
        complaint = "aligned has the very weights of sft"
    else:
        state = load_file("aligned/model.safetensors")
        state["model.norm.weight"][3] = torch.nan
        save_file(state, "aligned/model.safetensors")
        complaint = "model.norm.weight holds NaN or infinity: extrapolate refuses it"
    assert complaint in error_of(capsys, "diff", "sft", "aligned")
    assert expo("extrapolate", "sft", "aligned", "out", "--alpha", "1") == 1


# ---- expo card


@pytest.fixture
def extrapolated(models, capsys) -> Path:
    """Return a folder with a model and the card of the aligned one."""
    Path("aligned/README.md").write_text("---\nlicense: mit\n---\n# Not what was extrapolated\n")
    assert expo("extrapolate", "sft", "aligned", "out", "--alpha", "0.3", "--dtype", "float32") == 0
    capsys.readouterr()
    return Path("out")


def test_the_card_says_alpha_inputs_and_hashes(extrapolated, capsys):
    assert expo("card", "out", "--aligned", "org/aligned@main") == 0
    assert capsys.readouterr().out == "out/README.md\n"
    text = Path("out/README.md").read_text()
    facts = json.loads(Path("out/expo.json").read_text())
    assert f"| θ₀, SFT | sft | `{facts['sft_xxh3']}` |" in text
    assert f"| θ₁, aligned | org/aligned@main | `{facts['aligned_xxh3']}` |" in text
    assert "with α = 0.3:" in text
    checked = subprocess.run(["sha256sum", "out/model.safetensors"], capture_output=True, text=True)
    sha256, _ = checked.stdout.split()
    assert f"| model.safetensors | `{sha256}` |" in text


def test_the_hub_reads_the_cards_front_matter(extrapolated):
    from huggingface_hub import ModelCard

    assert expo("card", "out", "--aligned", "org/aligned@main") == 0
    data = ModelCard.load(Path("out/README.md")).data
    assert data.base_model == ["org/aligned"]
    assert data.license == "mit"
    assert "expo" in data.tags


def test_the_aligned_models_card_is_kept_beside_ours(extrapolated):
    for _ in range(2):  # the second time, the card is ours
        assert expo("card", "out") == 0
    assert "# Not what was extrapolated" in Path("out/README.aligned.md").read_text()
    assert "README.aligned.md" in Path("out/README.md").read_text()


def test_a_card_of_anything_else_is_refused(models, capsys):
    assert "no expo.json in aligned" in error_of(capsys, "card", "aligned")
    assert not Path("aligned/README.md").exists()


class Hub(ThreadingHTTPServer):
    """Answer what huggingface_hub asks when a small repository is uploaded; keep what came.

    files: {path: content}. token: what the client proved itself by.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), HubAnswer)
        self.files = {}
        self.created = None
        self.token = None
        self.url = f"http://127.0.0.1:{self.server_port}"


class HubAnswer(Handler):
    def do_GET(self):
        self.answer(200, json.dumps({"id": "org/name", "sha": "0" * 40}).encode())

    def do_POST(self):
        body = self.body()
        self.server.token = self.headers["Authorization"]
        if self.path == "/api/repos/create":
            self.server.created = json.loads(body)
            content = {"url": f"{self.server.url}/org/name"}
        elif self.path.endswith("/preupload/main"):
            files = json.loads(body)["files"]
            content = {"files": [{"path": f["path"], "uploadMode": "regular"} for f in files]}
            for file in content["files"]:
                file["shouldIgnore"] = False
        elif self.path.endswith("/commit/main"):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    file = line["value"]
                    self.server.files[file["path"]] = base64.b64decode(file["content"])
            content = {"commitUrl": f"{self.server.url}/org/name/commit/1", "commitOid": "1"}
        else:
            content = {}
        self.answer(200, json.dumps(content).encode())


@pytest.fixture
def hub(monkeypatch):
    """Let the commands that are started find a hub of this machine."""
    server = Hub()
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_TOKEN", KEY)
    yield server
    server.shutdown()
    server.server_close()


def test_nothing_is_uploaded_unless_it_is_asked_for(extrapolated, hub):
    done = subprocess.run([*EXPO, "card", "out"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert hub.created is None
    pushed = [*EXPO, "card", "out", "--push", "org/name"]
    done = subprocess.run(pushed, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert hub.created["name"] == "name"
    assert hub.created["organization"] == "org"
    assert hub.token == f"Bearer {KEY}"
    for file in ("README.md", "model.safetensors", "expo.json", "config.json"):
        assert hub.files[file] == Path("out", file).read_bytes()
    assert done.stdout.splitlines()[-1].endswith("/org/name")
    assert KEY not in done.stdout + done.stderr


def test_a_card_that_cannot_be_uploaded_is_one_line(extrapolated, capsys):
    line = error_of(capsys, "card", "out", "--push", "org/name")
    assert line.startswith("expo: org/name cannot be written on the hub (")
    assert Path("out/README.md").exists()


# ---- expo search, before an engine starts


def search(*more: str) -> tuple[str, ...]:
    arguments = ("search", "sft", "aligned", "--prompts", "prompts.txt")
    return (*arguments, "--reward", "reward-model", *QUICK, *more)


@pytest.mark.parametrize(
    "fault, complaint",
    [
        ("no prompts", "No such file or directory: 'prompts.txt'"),
        ("empty prompts", "prompts is empty"),
        ("no reward", "no such folder: reward-model"),
        ("reward without a head", "reward-model"),
        ("other architecture", "model_type in config.json is 'llama' in sft and 'gpt2'"),
        ("bracket", "need 0 <= low < high"),
        ("damaged table", "search.json is not JSON"),
    ],
)
def test_a_search_that_cannot_be_is_one_line(searched, capsys, fault, complaint):
    more = ()
    if fault == "no prompts":
        Path("prompts.txt").unlink()
    if fault == "empty prompts":
        Path("prompts.txt").write_text("\n")
    if fault == "no reward":
        shutil.rmtree("reward-model")
    if fault == "reward without a head":
        shutil.rmtree("reward-model")
        shutil.copytree(assets.model_dir("tiny-encoder"), "reward-model")
    if fault == "other architecture":
        settings = json.loads(Path("aligned/config.json").read_text())
        Path("aligned/config.json").write_text(json.dumps(settings | {"model_type": "gpt2"}))
    if fault == "bracket":
        more = ("--bracket", "2", "1")
    if fault == "damaged table":
        Path("expo-search").mkdir()
        Path("expo-search/search.json").write_text("{")
    assert complaint in error_of(capsys, *search(*more))


@pytest.mark.parametrize(
    "line, template, expected",
    [
        ('"The film"', "plain", "The film"),
        ('{"prompt": "The film", "id": 3}', "plain", "The film"),
        ('"The film"', None, [{"role": "user", "content": "The film"}]),
        (
            '{"prompt": [{"role": "system", "content": "Be brief."}]}',
            None,
            [{"role": "system", "content": "Be brief."}],
        ),
        ('{"text": "The film"}', None, ValueError),
        ("[]", None, ValueError),
        ("{", None, ValueError),
        ('[{"role": "user", "content": "a"}]', "plain", ValueError),
    ],
)
def test_prompts_of_json_lines(tiny, tmp_path, line, template, expected):
    """The tiny model has a chat template, so texts become a user's turns there."""
    from beyond_dpo import templates

    file = tmp_path / "prompts.jsonl"
    file.write_text(f"\n{line}\n")
    tokenizer = templates.load_tokenizer(tiny)
    if expected is ValueError:
        with pytest.raises(ValueError, match=r"prompts\.jsonl, line 2"):
            command.read_prompts(file, template, tokenizer)
    else:
        assert command.read_prompts(file, template, tokenizer) == [expected]


# ---- expo search, in an engine


def start_search(*more: str) -> subprocess.Popen:
    return subprocess.Popen(
        [*EXPO, *search(*more)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def kept_points() -> list[dict]:
    file = Path("expo-search/search.json")
    return json.loads(file.read_text())["points"] if file.exists() else []


@pytest.mark.slow
@pytest.mark.usefixtures("interrupts")
def test_an_interrupted_search_goes_on_where_it_was(searched):
    """Ctrl-C after the first α; its rewards are marked, and the next run takes them as they are."""
    child = start_search()
    wait_for(kept_points, 120)
    child.send_signal(signal.SIGINT)
    _, errors = child.communicate(timeout=60)
    assert child.returncode == 130, errors
    points = kept_points()
    *_, last = errors.splitlines()
    assert last == (
        f"interrupted; expo-search/search.json keeps {len(points)} α, the same command goes on "
        "from there"
    )
    assert "Traceback" not in errors
    file = Path("expo-search/search.json")
    content = json.loads(file.read_text())
    assert content["points"][0]["alpha"] == 0.0
    content["points"][0]["rewards"] = [50.0, 60.0, 70.0]  # no logit of the model is so large
    file.write_text(json.dumps(content))

    child = start_search()
    shown, errors = child.communicate(timeout=240)
    assert child.returncode == 0, errors
    points = kept_points()
    assert points[0]["rewards"] == [50.0, 60.0, 70.0]
    assert len(points) == 4
    assert len({point["alpha"] for point in points}) == 4
    for point in points:
        assert len(point["rewards"]) == len(point["responses"]) == 3
    header, *lines = shown.splitlines()
    assert header.split() == ["alpha", "reward", "gain", "gain_se", "words", "repeated"]
    assert lines[0].split()[:2] == ["0", "60"]
    assert lines[-1].startswith("best α = 0, the aligned model itself (")
    with open("expo-search/search.csv") as opened:
        rows = list(csv.DictReader(opened))
    assert [float(row["alpha"]) for row in rows] == [point["alpha"] for point in points]
    assert float(rows[1]["gain"]) == pytest.approx(float(rows[1]["reward"]) - 60)

    # all is known now: no engine starts, and other settings do not mix with it
    assert expo(*search()) == 0
    assert expo(*search("--seed", "1")) == 1


@pytest.mark.slow
def test_the_docs_commands_run_as_printed(shell, hub):
    """All of them in one folder, in their order; the search with its real engine."""
    save_reward_model(Path("reward-model"))
    Path("prompts.txt").write_text("The film\nA story of\n")
    lines = "".join(block for block in blocks("bash") if "mergekit" not in block).splitlines()
    assert len(lines) == 9
    for line in lines:
        done = in_shell(line)
        assert done.returncode == 0, line + done.stderr[-2000:]
        assert done.stdout
    assert not Path("planned").exists()
    alphas = sorted(path.name for path in Path("several").iterdir())
    assert alphas == ["alpha=0.1", "alpha=0.3", "alpha=0.5"]
    assert Path("expo-search/search.csv").exists()
    assert b"base_model:\n- org/sft\n- org/aligned\n" in hub.files["README.md"]
