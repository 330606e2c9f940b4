"""Hostile inputs: names that lead elsewhere, pickles, code in models and profiles, markup and
terminal codes.

Each would leave a file called `flag`, or show in what is printed, if it worked; the first test
shows that they can.
"""

import html.parser
import io
import json
import os
import pickle
import random
import re
import shutil
import tarfile
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from beyond_dpo import rewards, scoring, templates
from beyond_dpo.extrapolate import IncompatibleModels, check, extrapolate
from beyond_dpo.jobs import generate
from beyond_dpo.machine import launch, paths
from beyond_dpo.notebook import report, run
from beyond_dpo.pipeline import artifacts, assets, config, expo
from beyond_dpo.pipeline.artifacts import Artifact
from beyond_dpo.rows import read_rows, write_rows
from faults import long_form


@pytest.fixture
def flag(tmp_path):
    """Return the path of the file that no hostile input may make."""
    return tmp_path / "flag"


@pytest.fixture
def fault(record_property):
    """Count one fault as tried, and as survived where the test gets to its end."""
    return lambda what, n=1: [
        record_property(f"fault {k}", what) for k in ("tried", "survived") for _ in range(n)
    ]


class Evil:
    def __init__(self, flag):
        self.flag = str(flag)

    def __reduce__(self):
        return os.mkdir, (self.flag,)


def hostile_model(tiny: Path, folder: Path, flag: Path) -> Path:
    """Copy the tiny model and put into it what has been found in models: pickles under all names,
    and code.
    """
    shutil.copytree(tiny, folder)
    for name in (
        "pytorch_model.bin",
        "training_args.bin",
        "adapter_model.bin",
        "optimizer.pt",
        "tokenizer.pkl",
        "scheduler.pt",
        "model.pth",
    ):
        (folder / name).write_bytes(pickle.dumps(Evil(flag)))
    (folder / "evil.py").write_text(f"import os\nos.mkdir({str(flag)!r})\n")
    for name, classes in (
        ("config.json", {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}),
        ("tokenizer_config.json", {"AutoTokenizer": ["evil.T", "evil.T"]}),
    ):
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(content | {"auto_map": classes}))
    return folder


LOADERS = {
    "tokenizer": templates.load_tokenizer,
    "scorer": lambda folder: scoring.load_scorer(str(folder)),
    "engine": lambda folder: generate.Engine(
        str(folder), vars(config.load("expo", "smoke").decoding)
    ),
    "reward": lambda folder: rewards.Classifier(str(folder)),
    "folder": lambda folder: assets.model_dir(str(folder)),
    "extrapolation": lambda folder: extrapolate(
        folder, folder.parent / "aligned", {0.5: folder.parent / "out"}
    ),
}


def aligned(tiny: Path, folder: Path) -> Path:
    shutil.copytree(tiny, folder)
    tensors = {
        name: tensor + 0.01 for name, tensor in load_file(tiny / "model.safetensors").items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_the_hostile_files_work_where_they_are_loaded(tiny, tmp_path, flag):
    folder = hostile_model(tiny, tmp_path / "model", flag)
    pickle.loads((folder / "training_args.bin").read_bytes())
    assert flag.exists()
    flag.rmdir()
    exec((folder / "evil.py").read_text())
    assert flag.exists()


@pytest.mark.parametrize("reader", LOADERS)
def test_neither_pickles_nor_code_of_a_model_are_run(tiny, tmp_path, flag, fault, reader):
    """Beside safetensors they are ignored (a reward without a head is refused); alone they are
    refused.
    """
    folder = hostile_model(tiny, tmp_path / "model", flag)
    aligned(tiny, tmp_path / "aligned")
    with suppress(ValueError):
        LOADERS[reader](folder)
    assert not flag.exists()
    if reader == "extrapolation":
        assert not [
            p for p in (tmp_path / "out").iterdir() if p.suffix in (".bin", ".pt", ".pkl", ".pth")
        ]
        shutil.rmtree(tmp_path / "out")
    (folder / "model.safetensors").unlink()
    if reader != "tokenizer":
        with pytest.raises((ValueError, OSError, assets.AssetError), match="safetensors"):
            LOADERS[reader](folder)
    assert not flag.exists()
    fault(f"pickles and code in a model: {reader}", 2)


@long_form
def test_vllm_runs_neither_pickles_nor_code_of_a_model(tiny, tmp_path, flag, fault):
    folder = hostile_model(tiny, tmp_path / "model", flag)
    decoding = {**vars(config.load("expo", "smoke").decoding), "backend": "vllm"}
    settings = {"model": str(folder), "decoding": decoding}
    with launch.Worker("beyond_dpo.jobs.generate", settings, tmp_path, desc="engine"):
        assert not flag.exists()
    (folder / "model.safetensors").unlink()
    with pytest.raises(launch.JobFailed, match="Cannot find any model weights"):
        launch.Worker(
            "beyond_dpo.jobs.generate",
            {"model": str(folder), "decoding": decoding},
            tmp_path,
            desc="engine",
        )
    assert not flag.exists()
    fault("pickles and code in a model: vLLM", 2)


def test_a_pickled_array_is_not_unpickled(tmp_path, flag, fault):
    import numpy as np

    np.savez(
        tmp_path / "weights.npz",
        coef=np.array([Evil(flag)]),
        intercept=np.zeros(1),
        idf=np.zeros(1),
    )
    (tmp_path / "words.json").write_text('["a"]')
    with pytest.raises(ValueError, match="allow_pickle=False"):
        rewards.BagOfWords(tmp_path)
    assert not flag.exists()
    fault("pickled array")


def test_a_chat_template_runs_no_code(tiny, flag, fault):
    tokenizer = templates.load_tokenizer(tiny)
    kept = tokenizer.chat_template
    subclasses = "''.__class__.__mro__[1].__subclasses__()"
    for expression in ("cycler.__init__.__globals__.os", subclasses, "lipsum.__globals__"):
        tokenizer.chat_template = "{{ " + expression + f".mkdir('{flag}') }}}}"
        with pytest.raises(Exception, match="unsafe|undefined"):
            templates.render(tokenizer, "hi", "chat")
    tokenizer.chat_template = kept
    assert not flag.exists()
    fault("code in a chat template", 3)


@pytest.mark.parametrize(
    "tag", ["!!python/object/apply:os.mkdir [FLAG]", "!!python/name:os.mkdir", "!custom x"]
)
def test_tags_in_a_profile_make_no_objects(tmp_path, monkeypatch, flag, fault, tag):
    (tmp_path / "profiles").mkdir()
    (tmp_path / "profiles" / "expo.yaml").write_text(
        f"base:\n  world: {tag.replace('FLAG', str(flag))}\nsmoke: {{}}\n"
    )
    monkeypatch.setattr(config, "__file__", str(tmp_path / "config.py"))
    with pytest.raises(
        yaml.constructor.ConstructorError, match="could not determine a constructor"
    ):
        config.load("expo", "smoke")
    assert not flag.exists()
    fault("tag in a profile")


def test_the_code_knows_no_unsafe_loader():
    files = sorted((paths.ROOT / "lib").rglob("*.py"))
    assert len(files) > 25
    unsafe = re.compile(
        r"yaml\.(unsafe_|full_)?load\(|import pickle|pickle\.load|allow_pickle=True|shell=True|"
        r"joblib|weights_only=False|torch\.load\((?!.*weights_only=True)|\.extractall\(|"
        r"(?<![.\w])eval\("
    )
    for file in files:
        assert not (found := unsafe.search(file.read_text())), f"{file}: {found}"


# ---- names that lead elsewhere


ELSEWHERE = [
    "../../etc/passwd@main",
    "org/..@main",
    "org/../name",
    "..",
    "/etc/shadow/../x",
    "a/b/c@d",
    "org/name@main\n",
    "datasets:../x",
    "~nobody/../../x",
    "org\\..\\name",
]


@pytest.mark.parametrize("ref", ELSEWHERE)
def test_a_reference_leads_nowhere_else(ref, tmp_path, monkeypatch, fault):
    monkeypatch.setattr(paths, "CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(assets.AssetError):
        assets.model_dir(ref)
    assert not list(tmp_path.iterdir())
    fault("model reference that leads elsewhere")


def test_members_of_an_archive_lead_nowhere_else(tmp_path, monkeypatch, fault):
    """Links, devices and parent folders in a tar file: only bytes that the archive itself holds are
    returned.
    """
    (tmp_path / "secret").write_text("secret")
    monkeypatch.setattr(paths, "CACHE", tmp_path / "cache")
    archive = paths.CACHE / assets.ASSETS["vader"].file
    archive.parent.mkdir()
    with tarfile.open(archive, "w:gz") as tar:
        for name, kind, target in [
            ("link", tarfile.SYMTYPE, "../secret"),
            ("hard", tarfile.LNKTYPE, "../secret"),
            ("absolute", tarfile.SYMTYPE, str(tmp_path / "secret")),
            ("loop", tarfile.SYMTYPE, "loop"),
            ("fifo", tarfile.FIFOTYPE, ""),
            ("zero", tarfile.CHRTYPE, ""),
            ("folder", tarfile.DIRTYPE, ""),
        ]:
            member = tarfile.TarInfo(name)
            member.type, member.linkname, member.devmajor, member.devminor = kind, target, 1, 5
            tar.addfile(member)
        inside = tarfile.TarInfo("../secret2")
        inside.size = 4
        tar.addfile(inside, io.BytesIO(b"held"))
    pin = assets.ASSETS["vader"]
    monkeypatch.setitem(assets.ASSETS, "vader", replace(pin, sha256=artifacts.sha256(archive)))
    names = [
        "link",
        "hard",
        "absolute",
        "loop",
        "fifo",
        "zero",
        "folder",
        "../secret",
        "/etc/passwd",
    ]
    for name in names:
        with pytest.raises(assets.AssetError, match="holds no file"):
            assets.member("vader", name)
    assert assets.member("vader", "../secret2") == b"held"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "secret"]
    fault("archive member that leads elsewhere", len(names))


def test_a_damaged_archive_is_not_used(tmp_path, monkeypatch, fault):
    monkeypatch.setattr(paths, "CACHE", tmp_path)
    pin, content = assets.ASSETS["vader"], random.Random(0).randbytes(5000)
    archive = tmp_path / pin.file
    with tarfile.open(archive, "w:gz") as tar:
        inside = tarfile.TarInfo("inside")
        inside.size = len(content)
        tar.addfile(inside, io.BytesIO(content))
    whole = archive.read_bytes()
    monkeypatch.setitem(assets.ASSETS, "vader", replace(pin, sha256=artifacts.sha256(archive)))
    for wrong in (whole[:-1], whole[:100], b"", whole + b"x", whole[:2000] + b"\0" + whole[2001:]):
        archive.write_bytes(wrong)
        artifacts._hashes.clear()  # as a new process
        with pytest.raises(assets.AssetError, match="not the pinned .*: not used; delete the file"):
            assets.member("vader", "inside")
    archive.write_bytes(whole)
    artifacts._hashes.clear()
    assert assets.member("vader", "inside") == content
    fault("damaged archive", 5)


def test_names_of_a_run_lead_nowhere_else(tmp_path, monkeypatch, capsys, fault):
    for name, folder in {
        "NOTEBOOKS": "notebooks",
        "ARTIFACTS": "artifacts",
        "FROZEN": "frozen",
    }.items():
        monkeypatch.setattr(paths, name, tmp_path / folder)
    paths.NOTEBOOKS.mkdir()
    cell = nbformat.v4.new_code_cell('profile = "cpu"', metadata={"tags": ["parameters"]})
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), paths.NOTEBOOKS / "11_expo_a.ipynb")
    hostile = [
        ("../11_expo_a",),
        ("11_expo_a/../../x",),
        ("/etc/passwd",),
        ("*",),
        ("11", "--profile", "../../x"),
        ("11", "--profile", "x/../../../y"),
        ("11", "-p", "../x=1"),
        ("11", "-p", "profile=smoke\0"),
    ]
    for arguments in hostile:
        assert run.main(list(arguments)) == 2, arguments
        assert "refused: " in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["notebooks"]
    fault("name of a run that leads elsewhere", len(hostile))


def test_an_expression_as_a_parameter_is_no_code(fault, flag):
    for text in (
        f"__import__('os').mkdir('{flag}')",
        f"[__import__('os').mkdir('{flag}')]",
        "[].__class__",
        "f'{1}'",
    ):
        with pytest.raises(run.Refused, match="unlike its default"):
            run.check("n", {"alphas": [0.5]}, {"alphas": text})
    assert not flag.exists()
    fault("code as a parameter", 4)


def test_shards_outside_of_the_folder_are_not_read(tiny, tmp_path, fault):
    folder = aligned(tiny, tmp_path / "inner" / "model")
    (folder / "model.safetensors").rename(tmp_path / "outside.safetensors")
    index = {
        "weight_map": {"a": "../../outside.safetensors", "b": str(tmp_path / "outside.safetensors")}
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=rf"{folder}/outside.safetensors cannot be read"):
        check(tiny, folder)
    fault("shard outside of its folder", 2)


# ---- what is shown


class Tags(html.parser.HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.found, self.handlers = set(), []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.add(tag)
        self.handlers += [
            name for name, value in attrs if name.startswith("on") or "javascript:" in (value or "")
        ]


MARKUP = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "</style><script>x</script>",
    "</td></table><iframe src='javascript:alert(1)'>",
    "<svg/onload=alert(1)>",
    "&lt;b&gt; & <b>",
    "{{ x }} {% raw %}",
    "$\\frac{$",
]


def test_markup_that_a_model_says_is_shown_as_text(tmp_path, monkeypatch, fault):
    """The very cell of notebook 15 that shows what models say, in all places that a model's words
    can reach.
    """
    from IPython.core.formatters import DisplayFormatter

    monkeypatch.setattr(paths, "ARTIFACTS", tmp_path)
    monkeypatch.setattr(paths, "FROZEN", tmp_path / "frozen")
    cfg = config.load("expo", "smoke")
    said = [
        {"model": m, "alpha": float(a), "prompt": p, "text": text}
        for text in MARKUP
        for m in (text, "SFT")
        for a in (0, max(cfg.pair_alphas))
        for p in expo.PROMPTS[:1]
    ]
    said = {(row["model"], row["alpha"], row["prompt"]): row for row in said}.values()
    made = Artifact(
        "said", 1, {}, lambda out: (out / "texts.json").write_text(json.dumps([*said])) and None
    )
    (path,) = paths.NOTEBOOKS.glob("15_*.ipynb")
    (cell,) = [
        c.source for c in nbformat.read(path, 4).cells if 'said.json("texts.json")' in c.source
    ]
    *before, last = cell.strip().splitlines()
    names = {"said": made, "cfg": cfg, "pd": pd, "report": report}
    exec("\n".join(before), names)
    table = eval(last, names)
    shown, _ = DisplayFormatter().format(table)
    captioned = report.show(pd.DataFrame({text: [text] for text in MARKUP}), MARKUP[0]).to_html()
    for text in (shown["text/html"], captioned):
        tags = Tags(text)
        assert (
            tags.found <= {"style", "table", "caption", "thead", "tbody", "tr", "th", "td"}
            and not tags.handlers
        )
        assert all(
            word.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")[:12] in text
            for word in MARKUP
        )
    fault("markup in model output", len(MARKUP))


NOISE = "\x1b[2J\x1b]0;title\x07\x1b[31mred\x1b[0m \x9b5n\x00\x07\x08\x1bc é — 好\tend"


def test_a_log_tail_moves_no_cursor(tmp_path, monkeypatch, fault):
    """Escape sequences in a job's output and in a worker's exception; words, tabs and other scripts
    stay.
    """
    job = "def main(path):\n    print(open(path).read())\n    raise ValueError(open(path).read())\n"
    (tmp_path / "noisy.py").write_text(job + "if __name__ == '__main__':\n    main('noise')\n")
    (tmp_path / "noise").write_text(NOISE)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ['PYTHONPATH']}")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(launch.JobFailed) as job_failed:
        launch.run("noisy", {}, tmp_path / "work", desc="job")
    with launch.Worker("beyond_dpo.machine.launch", {}, tmp_path / "logs", desc="jobs") as worker:
        with pytest.raises(launch.JobFailed) as call_failed:
            worker.call("run", module="noisy", path="noise")
    for failure in (job_failed, call_failed):
        assert "red " in str(failure.value) and "é — 好\tend" in str(failure.value)
        assert not re.search(
            r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", str(failure.value)
        ) and "title" not in str(failure.value)
    fault("terminal codes in a log", 2)


# ---- broken files


def broken(content: bytes) -> dict[str, bytes]:
    """Return what disks and copies make of a safetensors file."""
    length, header = content[:8], json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    name = next(name for name in header if name != "__metadata__")

    def again(**changes) -> bytes:
        text = json.dumps({**header, name: header[name] | changes}).encode()
        return (
            len(text).to_bytes(8, "little") + text + content[8 + int.from_bytes(length, "little") :]
        )

    return {
        "empty": b"",
        "length alone": length,
        "no length": content[:5],
        "cut in the header": content[:200],
        "cut in the weights": content[:-1],
        "too long": content + b"\0",
        "header flipped": content[:8] + b"\xff" + content[9:],
        "huge length": (1 << 62).to_bytes(8, "little") + content[8:],
        "length 0": bytes(8) + content[8:],
        "length one more": (int.from_bytes(length, "little") + 1).to_bytes(8, "little")
        + content[8:],
        "negative offset": again(data_offsets=[-8, 8]),
        "offset outside": again(data_offsets=[0, 1 << 50]),
        "other shape": again(shape=[1 << 40]),
        "unknown dtype": again(dtype="F7"),
        "zeros": bytes(len(content)),
    }


def test_broken_weights_are_refused_by_every_reader(tiny, tmp_path, fault):
    """None crashes, none asks for the memory that a header promises, and none leaves half a
    result.
    """
    content = (tiny / "model.safetensors").read_bytes()
    cases = broken(content)
    for i, (how, wrong) in enumerate(cases.items()):
        folder = tmp_path / f"model{i}"
        shutil.copytree(tiny, folder)
        (folder / "model.safetensors").write_bytes(wrong)
        with pytest.raises(ValueError, match=re.escape(str(folder))):
            extrapolate(tiny, folder, {0.5: tmp_path / "out"})
        with pytest.raises(Exception) as failure:
            scoring.load_scorer(str(folder))
        assert type(failure.value).__name__ in (
            "SafetensorError",
            "OSError",
            "ValueError",
            "RuntimeError",
        ), how
        assert not (tmp_path / "out").exists()
    assert len(cases) == 15
    fault("broken safetensors", len(cases))


def test_rows_cut_off_anywhere_are_refused_or_whole(rows, tmp_path, fault):
    """A cut at a line's end leaves the first rows whole: that is for the manifest's hash to
    find.
    """
    path, rng = tmp_path / "rows.jsonl", random.Random(0)
    write_rows(path, rows)
    content = path.read_bytes()
    for cut in [rng.randrange(len(content)) for _ in range(200)]:
        path.write_bytes(content[:cut])
        lines = content[:cut].count(b"\n")
        if content[:cut].endswith(b"\n") or not cut or content[cut : cut + 1] == b"\n":
            assert read_rows(path) == rows[: lines + (content[cut : cut + 1] == b"\n")]
        else:
            with pytest.raises(ValueError, match=rf"rows\.jsonl:{lines + 1}"):
                read_rows(path)
    fault("rows cut off")


def test_a_swapped_tokenizer_is_named(tiny, tmp_path, fault):
    """Between θ₀ and θ₁: neither written to a checkpoint nor loaded into an engine, which goes on
    with what it had.
    """
    other = aligned(tiny, tmp_path / "aligned")
    engine = generate.Engine(str(tiny), vars(config.load("expo", "smoke").decoding))
    held = engine.swap(str(tiny), str(other), 0.5)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    a, b = [token for token, i in vocabulary.items() if i in (300, 301)]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    swapped = tmp_path / "swapped"
    shutil.copytree(other, swapped)
    (swapped / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(IncompatibleModels, match="token 300 of tokenizer.json"):
        extrapolate(tiny, swapped, {0.5: tmp_path / "out"})
    with pytest.raises(IncompatibleModels, match="token 300 of tokenizer.json"):
        engine.swap(str(tiny), str(swapped), 0.5)
    assert not (tmp_path / "out").exists() and engine.swap(str(tiny), str(other), 0.5) == held
    assert torch.isfinite(torch.tensor(held))
    fault("swapped tokenizer", 2)
