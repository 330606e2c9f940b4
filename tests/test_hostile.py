"""Hostile inputs: names that lead elsewhere, pickles, code, markup and terminal codes.

Each would leave something called `flag`, or show in what is printed, if it worked. The first test
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
from beyond_dpo.notebook import plan, report, run
from beyond_dpo.pipeline import artifacts, assets, config, expo
from beyond_dpo.pipeline.artifacts import Artifact
from beyond_dpo.rows import read_rows, write_rows
from faults import long_form


@pytest.fixture
def flag(tmp_path):
    """Return the path of the folder that no hostile input may make."""
    return tmp_path / "flag"


@pytest.fixture
def fault(record_property):
    """Return a function that counts faults as tried and survived, at the end of a test."""

    def count(name: str, n: int = 1) -> None:
        for _ in range(n):
            record_property("fault tried", name)
            record_property("fault survived", name)

    return count


# ---- pickles and code

PICKLES = (
    "pytorch_model.bin",
    "training_args.bin",
    "adapter_model.bin",
    "optimizer.pt",
    "tokenizer.pkl",
    "scheduler.pt",
    "model.pth",
)
PICKLE_SUFFIXES = (".bin", ".pt", ".pkl", ".pth")


class Evil:
    """An object that makes the flag when it is unpickled."""

    def __init__(self, flag):
        self.flag = str(flag)

    def __reduce__(self):
        return os.mkdir, (self.flag,)


def hostile_model(tiny: Path, folder: Path, flag: Path) -> Path:
    """Copy the tiny model and put into it what has been found in models: pickles and code."""
    shutil.copytree(tiny, folder)
    for name in PICKLES:
        (folder / name).write_bytes(pickle.dumps(Evil(flag)))
    (folder / "evil.py").write_text(f"import os\nos.mkdir({str(flag)!r})\n")
    model_classes = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}
    update_json(folder / "config.json", auto_map=model_classes)
    update_json(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.T", "evil.T"]})
    return folder


def update_json(path: Path, **values) -> None:
    content = json.loads(path.read_text())
    content.update(values)
    path.write_text(json.dumps(content))


def load_engine(folder: Path) -> generate.Engine:
    decoding = config.load("expo", "smoke").decoding
    return generate.Engine(str(folder), vars(decoding))


def extrapolate_beside(folder: Path) -> None:
    """Extrapolate from a model through `aligned` beside it to `out` beside it."""
    extrapolate(folder, folder.parent / "aligned", {0.5: folder.parent / "out"})


LOADERS = {
    "tokenizer": templates.load_tokenizer,
    "scorer": lambda folder: scoring.load_scorer(str(folder)),
    "engine": load_engine,
    "reward": lambda folder: rewards.Classifier(str(folder)),
    "folder": lambda folder: assets.model_dir(str(folder)),
    "extrapolation": extrapolate_beside,
}


def aligned(tiny: Path, folder: Path) -> Path:
    """Copy the tiny model with all of its weights moved."""
    shutil.copytree(tiny, folder)
    tensors = load_file(tiny / "model.safetensors")
    moved = {name: tensor + 0.01 for name, tensor in tensors.items()}
    save_file(moved, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_the_hostile_files_work_where_they_are_loaded(tiny, tmp_path, flag):
    folder = hostile_model(tiny, tmp_path / "model", flag)
    pickle.loads((folder / "training_args.bin").read_bytes())
    assert flag.exists()
    flag.rmdir()
    exec((folder / "evil.py").read_text())
    assert flag.exists()


@pytest.mark.parametrize("reader", LOADERS)
def test_pickles_and_code_beside_safetensors_are_ignored(tiny, tmp_path, flag, fault, reader):
    """A reward without a head is refused."""
    folder = hostile_model(tiny, tmp_path / "model", flag)
    aligned(tiny, tmp_path / "aligned")
    with suppress(ValueError):
        LOADERS[reader](folder)
    assert not flag.exists()
    if reader == "extrapolation":
        files = list((tmp_path / "out").iterdir())
        assert files
        assert not [file for file in files if file.suffix in PICKLE_SUFFIXES]
    fault(f"pickles and code in a model: {reader}")


@pytest.mark.parametrize("reader", LOADERS)
def test_pickles_and_code_without_safetensors_are_refused(tiny, tmp_path, flag, fault, reader):
    """A tokenizer needs no weights."""
    folder = hostile_model(tiny, tmp_path / "model", flag)
    (folder / "model.safetensors").unlink()
    aligned(tiny, tmp_path / "aligned")
    if reader == "tokenizer":
        LOADERS[reader](folder)
    else:
        with pytest.raises((ValueError, OSError, assets.AssetError), match="safetensors"):
            LOADERS[reader](folder)
    assert not flag.exists()
    fault(f"pickles and code in a model: {reader}")


@long_form
def test_vllm_runs_neither_pickles_nor_code_of_a_model(tiny, tmp_path, flag, fault):
    folder = hostile_model(tiny, tmp_path / "model", flag)
    decoding = dict(vars(config.load("expo", "smoke").decoding))
    decoding["backend"] = "vllm"
    settings = {"model": str(folder), "decoding": decoding}
    with launch.Worker("beyond_dpo.jobs.generate", settings, tmp_path, desc="engine"):
        assert not flag.exists()
    (folder / "model.safetensors").unlink()
    with pytest.raises(launch.JobFailed, match="Cannot find any model weights"):
        launch.Worker("beyond_dpo.jobs.generate", settings, tmp_path, desc="engine")
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
    expressions = (
        "cycler.__init__.__globals__.os",
        "''.__class__.__mro__[1].__subclasses__()",
        "lipsum.__globals__",
    )
    for expression in expressions:
        tokenizer.chat_template = "{{ " + expression + f".mkdir('{flag}')" + " }}"
        with pytest.raises(Exception, match="unsafe|undefined"):
            templates.render(tokenizer, "hi", "chat")
    tokenizer.chat_template = kept
    assert not flag.exists()
    fault("code in a chat template", len(expressions))


@pytest.mark.parametrize(
    "tag", ["!!python/object/apply:os.mkdir [FLAG]", "!!python/name:os.mkdir", "!custom x"]
)
def test_tags_in_a_profile_make_no_objects(tmp_path, monkeypatch, flag, fault, tag):
    value = tag.replace("FLAG", str(flag))
    profile = f"base:\n  world: {value}\nsmoke: {{}}\n"
    (tmp_path / "profiles").mkdir()
    (tmp_path / "profiles" / "expo.yaml").write_text(profile)
    monkeypatch.setattr(config, "__file__", str(tmp_path / "config.py"))
    message = "could not determine a constructor"
    with pytest.raises(yaml.constructor.ConstructorError, match=message):
        config.load("expo", "smoke")
    assert not flag.exists()
    fault("tag in a profile")


UNSAFE = re.compile(
    r"yaml\.(unsafe_|full_)?load\(|import pickle|pickle\.load|allow_pickle=True|shell=True|"
    r"joblib|weights_only=False|torch\.load\((?!.*weights_only=True)|\.extractall\(|"
    r"(?<![.\w])eval\("
)


def test_the_code_knows_no_unsafe_loader():
    files = sorted((paths.ROOT / "lib").rglob("*.py"))
    assert len(files) > 25
    for file in files:
        loader = UNSAFE.search(file.read_text())
        assert not loader, f"{file}: {loader}"


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


def special_member(name: str, kind: bytes, target: str) -> tarfile.TarInfo:
    """Return a member of a tar file that is a link, a device, a pipe or a folder."""
    member = tarfile.TarInfo(name)
    member.type = kind
    member.linkname = target
    member.devmajor = 1
    member.devminor = 5
    return member


def add_file(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def pin(monkeypatch, archive: Path) -> None:
    """Pin an archive as that of the asset `vader`."""
    pinned = replace(assets.ASSETS["vader"], sha256=artifacts.sha256(archive))
    monkeypatch.setitem(assets.ASSETS, "vader", pinned)


def test_members_of_an_archive_lead_nowhere_else(tmp_path, monkeypatch, fault):
    """Of links, devices and parent folders in a tar file: only the archive's own bytes are read."""
    secret = tmp_path / "secret"
    secret.write_text("secret")
    special = [
        ("link", tarfile.SYMTYPE, "../secret"),
        ("hard", tarfile.LNKTYPE, "../secret"),
        ("absolute", tarfile.SYMTYPE, str(secret)),
        ("loop", tarfile.SYMTYPE, "loop"),
        ("fifo", tarfile.FIFOTYPE, ""),
        ("zero", tarfile.CHRTYPE, ""),
        ("folder", tarfile.DIRTYPE, ""),
    ]
    monkeypatch.setattr(paths, "CACHE", tmp_path / "cache")
    archive = paths.CACHE / assets.ASSETS["vader"].file
    archive.parent.mkdir()
    with tarfile.open(archive, "w:gz") as tar:
        for name, kind, target in special:
            tar.addfile(special_member(name, kind, target))
        add_file(tar, "../secret2", b"held")
    pin(monkeypatch, archive)
    names = [name for name, *_ in special]
    names += ["../secret", "/etc/passwd"]
    for name in names:
        with pytest.raises(assets.AssetError, match="holds no file"):
            assets.member("vader", name)
    assert assets.member("vader", "../secret2") == b"held"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "secret"]
    fault("archive member that leads elsewhere", len(names))


def test_a_damaged_archive_is_not_used(tmp_path, monkeypatch, fault):
    monkeypatch.setattr(paths, "CACHE", tmp_path)
    archive = tmp_path / assets.ASSETS["vader"].file
    content = random.Random(0).randbytes(5000)
    with tarfile.open(archive, "w:gz") as tar:
        add_file(tar, "inside", content)
    pin(monkeypatch, archive)
    whole = archive.read_bytes()
    damaged = [
        whole[:-1],
        whole[:100],
        b"",
        whole + b"x",
        whole[:2000] + b"\0" + whole[2001:],
    ]
    for wrong in damaged:
        archive.write_bytes(wrong)
        artifacts._hashes.clear()  # as a new process
        with pytest.raises(assets.AssetError, match="not the pinned .*: not used; delete the file"):
            assets.member("vader", "inside")
    archive.write_bytes(whole)
    artifacts._hashes.clear()
    assert assets.member("vader", "inside") == content
    fault("damaged archive", len(damaged))


@pytest.mark.parametrize(
    "arguments",
    [
        ["../11_expo_a"],
        ["11_expo_a/../../x"],
        ["/etc/passwd"],
        ["*"],
        ["11", "--profile", "../../x"],
        ["11", "--profile", "x/../../../y"],
        ["11", "-p", "../x=1"],
        ["11", "-p", "profile=smoke\0"],
    ],
)
def test_names_of_a_run_lead_nowhere_else(tmp_path, monkeypatch, capsys, fault, arguments):
    monkeypatch.setattr(paths, "NOTEBOOKS", tmp_path / "notebooks")
    monkeypatch.setattr(paths, "ARTIFACTS", tmp_path / "artifacts")
    monkeypatch.setattr(paths, "FROZEN", tmp_path / "frozen")
    paths.NOTEBOOKS.mkdir()
    cell = nbformat.v4.new_code_cell('profile = "cpu"', metadata={"tags": ["parameters"]})
    nb = nbformat.v4.new_notebook(cells=[cell])
    nbformat.write(nb, paths.NOTEBOOKS / "11_expo_a.ipynb")
    assert run.main(arguments) == 2
    assert "refused: " in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["notebooks"]
    fault("name of a run that leads elsewhere")


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').mkdir('FLAG')",
        "[__import__('os').mkdir('FLAG')]",
        "[].__class__",
        "f'{1}'",
    ],
)
def test_an_expression_as_a_parameter_is_no_code(fault, flag, text):
    value = text.replace("FLAG", str(flag))
    with pytest.raises(plan.Refused, match="unlike its default"):
        plan.check("n", {"alphas": [0.5]}, {"alphas": value})
    assert not flag.exists()
    fault("code as a parameter")


def test_shards_outside_of_the_folder_are_not_read(tiny, tmp_path, fault):
    folder = aligned(tiny, tmp_path / "inner" / "model")
    outside = tmp_path / "outside.safetensors"
    (folder / "model.safetensors").rename(outside)
    index = {"weight_map": {"a": "../../outside.safetensors", "b": str(outside)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=rf"{folder}/outside.safetensors cannot be read"):
        check(tiny, folder)
    fault("shard outside of its folder", 2)


# ---- what is shown


class Tags(html.parser.HTMLParser):
    """The tags of an HTML text, and those of their attributes that could run code."""

    def __init__(self, text: str):
        super().__init__()
        self.names = set()
        self.handlers = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.names.add(tag)
        for name, value in attrs:
            if name.startswith("on") or "javascript:" in (value or ""):
                self.handlers.append(name)


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


def check_shown_as_text(html_text: str) -> None:
    """Check that a table has no tags but its own, and all of MARKUP as text."""
    tags = Tags(html_text)
    assert tags.names <= {"style", "table", "caption", "thead", "tbody", "tr", "th", "td"}
    assert not tags.handlers
    for markup in MARKUP:
        escaped = markup.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
        assert escaped[:12] in html_text


def last_value(source: str, names: dict):
    """Run a cell and return the value of its last line, as a notebook does."""
    *before, last = source.strip().splitlines()
    exec("\n".join(before), names)
    return eval(last, names)


def test_markup_that_a_model_says_is_shown_as_text(tmp_path, monkeypatch, fault):
    """Notebook 15's own cell, with markup as what a model says and as a model's name."""
    from IPython.core.formatters import DisplayFormatter

    monkeypatch.setattr(paths, "ARTIFACTS", tmp_path)
    monkeypatch.setattr(paths, "FROZEN", tmp_path / "frozen")
    cfg = config.load("expo", "smoke")
    texts = []
    for model in (*MARKUP, "SFT"):
        text = MARKUP[-1] if model == "SFT" else model
        for alpha in (0.0, float(max(cfg.pair_alphas))):
            row = {"model": model, "alpha": alpha, "prompt": expo.PROMPTS[0], "text": text}
            texts.append(row)

    def write_texts(out: Path) -> None:
        (out / "texts.json").write_text(json.dumps(texts))

    (path,) = paths.NOTEBOOKS.glob("15_*.ipynb")
    sources = [cell.source for cell in nbformat.read(path, 4).cells]
    (source,) = [source for source in sources if 'said.json("texts.json")' in source]
    said = Artifact("said", 1, {}, write_texts)
    lines = [*MARKUP, "SFT"]
    names = {"said": said, "cfg": cfg, "lines": lines, "pd": pd, "report": report}
    table = last_value(source, names)
    shown, _ = DisplayFormatter().format(table)
    check_shown_as_text(shown["text/html"])
    fault("markup in model output", len(MARKUP))


def test_markup_in_headings_and_captions_is_shown_as_text():
    df = pd.DataFrame({markup: [markup] for markup in MARKUP})
    for caption in MARKUP:
        check_shown_as_text(report.show(df, caption).to_html())


NOISE = "\x1b[2J\x1b]0;title\x07\x1b[31mred\x1b[0m \x9b5n\x00\x07\x08\x1bc é — 好\tend"
NOISY_JOB = """
def main(path):
    print(open(path).read())
    raise ValueError(open(path).read())
if __name__ == '__main__':
    main('noise')
"""


@pytest.fixture
def noisy(tmp_path, monkeypatch) -> str:
    """Return the name of a module whose job prints and raises NOISE; it lies in the folder here."""
    (tmp_path / "noisy.py").write_text(NOISY_JOB)
    (tmp_path / "noise").write_text(NOISE)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ['PYTHONPATH']}")
    monkeypatch.chdir(tmp_path)
    return "noisy"


def check_moves_no_cursor(message: str) -> None:
    """Check that no escape sequence is left, but words, tabs and other scripts are."""
    assert "red " in message
    assert "é — 好\tend" in message
    assert "title" not in message
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", message)


def test_the_log_of_a_job_moves_no_cursor(tmp_path, noisy, fault):
    with pytest.raises(launch.JobFailed) as failure:
        launch.run(noisy, {}, tmp_path / "work", desc="job")
    check_moves_no_cursor(str(failure.value))
    fault("terminal codes in a log")


def test_the_exception_of_a_worker_moves_no_cursor(tmp_path, noisy, fault):
    with launch.Worker("beyond_dpo.machine.launch", {}, tmp_path / "logs", desc="jobs") as worker:
        with pytest.raises(launch.JobFailed) as failure:
            worker.call("run", module=noisy, path="noise")
    check_moves_no_cursor(str(failure.value))
    fault("terminal codes in a log")


# ---- broken files


def broken(content: bytes) -> dict[str, bytes]:
    """Return what disks and copies make of a safetensors file.

    It begins with the length of a JSON header in 8 bytes; behind the header are the weights.
    """
    length = content[:8]
    header_end = 8 + int.from_bytes(length, "little")
    header = json.loads(content[8:header_end])
    name = next(name for name in header if name != "__metadata__")

    def with_length(number: int) -> bytes:
        return number.to_bytes(8, "little") + content[8:]

    def with_header(**changes) -> bytes:
        """Return the file with another description of its first tensor."""
        tensor = header[name] | changes
        text = json.dumps(header | {name: tensor}).encode()
        return len(text).to_bytes(8, "little") + text + content[header_end:]

    return {
        "empty": b"",
        "length alone": length,
        "no length": content[:5],
        "cut in the header": content[:200],
        "cut in the weights": content[:-1],
        "too long": content + b"\0",
        "header flipped": length + b"\xff" + content[9:],
        "huge length": with_length(1 << 62),
        "length 0": with_length(0),
        "length one more": with_length(header_end - 8 + 1),
        "negative offset": with_header(data_offsets=[-8, 8]),
        "offset outside": with_header(data_offsets=[0, 1 << 50]),
        "other shape": with_header(shape=[1 << 40]),
        "unknown dtype": with_header(dtype="F7"),
        "zeros": bytes(len(content)),
    }


def test_broken_weights_are_refused_by_every_reader(tiny, tmp_path, fault):
    """None crashes, asks for the memory that a header promises, or leaves half a result."""
    content = (tiny / "model.safetensors").read_bytes()
    cases = broken(content)
    errors = ("SafetensorError", "OSError", "ValueError", "RuntimeError")
    for number, (damage, wrong) in enumerate(cases.items()):
        folder = tmp_path / f"model{number}"
        shutil.copytree(tiny, folder)
        (folder / "model.safetensors").write_bytes(wrong)
        with pytest.raises(ValueError, match=re.escape(str(folder))):
            extrapolate(tiny, folder, {0.5: tmp_path / "out"})
        with pytest.raises(Exception) as failure:
            scoring.load_scorer(str(folder))
        assert type(failure.value).__name__ in errors, damage
        assert not (tmp_path / "out").exists()
    assert len(cases) == 15
    fault("broken safetensors", len(cases))


def test_rows_cut_off_anywhere_are_refused_or_whole(rows, tmp_path, fault):
    """A cut at a line's end leaves the first rows whole: the manifest's hash has to find that."""
    path = tmp_path / "rows.jsonl"
    rng = random.Random(0)
    write_rows(path, rows)
    content = path.read_bytes()
    for cut in [rng.randrange(len(content)) for _ in range(200)]:
        rest = content[:cut]
        path.write_bytes(rest)
        lines = rest.count(b"\n")
        if not rest or rest.endswith(b"\n"):
            assert read_rows(path) == rows[:lines]
        elif content[cut : cut + 1] == b"\n":  # the last row is whole but for its line's end
            assert read_rows(path) == rows[: lines + 1]
        else:
            with pytest.raises(ValueError, match=rf"rows\.jsonl:{lines + 1}"):
                read_rows(path)
    fault("rows cut off")


@pytest.fixture
def swapped(tiny, tmp_path) -> Path:
    """Return an aligned model in whose tokenizer the tokens 300 and 301 are swapped."""
    folder = aligned(tiny, tmp_path / "swapped")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = [token for token, i in vocabulary.items() if i in (300, 301)]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


def test_a_swapped_tokenizer_is_not_written_to_a_checkpoint(tiny, tmp_path, swapped, fault):
    with pytest.raises(IncompatibleModels, match="token 300 of tokenizer.json"):
        extrapolate(tiny, swapped, {0.5: tmp_path / "out"})
    assert not (tmp_path / "out").exists()
    fault("swapped tokenizer")


def test_a_swapped_tokenizer_is_not_loaded_into_an_engine(tiny, tmp_path, swapped, fault):
    """The engine goes on with what it had."""
    theta_aligned = str(aligned(tiny, tmp_path / "aligned"))
    engine = load_engine(tiny)
    probe = engine.swap(str(tiny), theta_aligned, 0.5)
    assert torch.isfinite(torch.tensor(probe))
    with pytest.raises(IncompatibleModels, match="token 300 of tokenizer.json"):
        engine.swap(str(tiny), str(swapped), 0.5)
    assert engine.swap(str(tiny), theta_aligned, 0.5) == probe
    fault("swapped tokenizer")
