"""Extrapolate an aligned model past its SFT start, from safetensors to safetensors in one read.

The rule is ExPO's, theta_2 = theta_1 + alpha * (theta_1 - theta_0) (Eq 6, arXiv 2404.16792), where
theta_0 is the SFT model and theta_1 the aligned one. Nothing is trained. Weights are streamed: each
of up to 8 threads needs about 6 MB, however large the model is. Whole tensors are held only where
they are asked for, one by one (tensors()). What is written is computed by numpy (dtypes): only
blend() and tensors() import torch.

From the command line: `expo extrapolate` (cli).
"""

from __future__ import annotations

import errno
import fcntl
import glob
import json
import math
import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple, Self

import numpy as np
from safetensors import SafetensorError, safe_open

from beyond_dpo import dtypes, events
from beyond_dpo.dtypes import DTYPES, Dtype
from beyond_dpo.files import sync

if TYPE_CHECKING:
    import torch

# Elements of a tensor that a thread computes at a time. The buffers for so many, about 5 MB and a
# result for each alpha, stay in the processor's cache.
BLOCK = 1 << 18
LARGEST_SMALL_FILE = 100 << 20  # bytes, of a file that is copied besides the weights
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# Settings of config.json that both models must share.
STRUCTURE = (
    "architectures",
    "model_type",
    "vocab_size",
    "hidden_size",
    "num_attention_heads",
    "tie_word_embeddings",
)
VOCABULARIES = ("tokenizer.json", "vocab.json", "added_tokens.json")
# How the names of an output head and of token embeddings end. Where they are tied, the two are one
# tensor, which may be stored under either name.
HEADS = ("lm_head.weight", "embed_out.weight")
EMBEDDINGS = (
    "embed_tokens.weight",
    "wte.weight",
    "embed_in.weight",
    "word_embeddings.weight",
    "shared.weight",
)
# Names of tensors that a model computes from its config. Old checkpoints store them; transformers
# ignores them and no longer writes them.
DERIVED = re.compile(
    r"(rotary_emb\.inv_freq|\.(attn|attention)\.masked_bias|\.(cos|sin)_cached|\bposition_ids)$"
)
# The causal mask of GPT-2 and GPT-NeoX is derived too. A tensor of this name is one if it is
# square.
CAUSAL_MASK = re.compile(r"\.(attn|attention)\.bias$")
# Weights, optimizer state and an artifact's hashes of its own files belong to the aligned model
# alone.
NOT_COPIED = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".pkl",
    ".ckpt",
    ".h5",
    ".msgpack",
    ".onnx",
    ".gguf",
    ".npz",
    ".index.json",
    "manifest.json",
)
EQUAL = "every tensor in {1} equals the one in {0}: there is no direction to follow"
UNKNOWN_DIGEST = "-" * 32  # as long as the digest that will take its place
# What weights can be written in, other than the aligned model's own.
WRITABLE = {dtype.name: code for code, dtype in DTYPES.items() if code in ("F32", "F16", "BF16")}
SAMPLE = 64 << 20  # bytes that are read, at most, to see how long a whole model will take


class IncompatibleModels(ValueError):
    """The two folders are not an SFT model and a model aligned from it."""


@dataclass(frozen=True)
class Shard:
    """A safetensors file of a model."""

    file: Path
    header: dict  # the JSON in front of its tensors
    data_start: int  # the byte where the header ends and the tensors begin

    @property
    def entries(self) -> dict[str, dict]:
        """What the header says of each tensor."""
        return {name: entry for name, entry in self.header.items() if name != "__metadata__"}

    @property
    def data_size(self) -> int:
        """The bytes of all tensors together."""
        return max((entry["data_offsets"][1] for entry in self.entries.values()), default=0)

    def data_offset(self, name: str) -> int:
        """A tensor's first byte, counted from data_start."""
        return self.header[name]["data_offsets"][0]


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor is stored, and what it is; its content stays on the disk."""

    name: str
    shard: Shard
    data_offset: int  # the tensor's first byte, counted from shard.data_start
    size: int  # in bytes
    dtype: Dtype
    shape: list[int]
    kind: str  # what two models must agree on, such as "float [2, 3]" or "I64 [4]"

    @property
    def file(self) -> Path:
        return self.shard.file

    @property
    def file_offset(self) -> int:
        """The tensor's first byte, counted from the beginning of the file."""
        return self.shard.data_start + self.data_offset


class TensorPair(NamedTuple):
    """The same tensor of the SFT model and of the aligned model."""

    sft: StoredTensor
    aligned: StoredTensor


class _Work(NamedTuple):
    """What is to be computed, and how it will lie in the files of each output."""

    pairs: list[TensorPair]
    alphas: dict[str, list[float]]  # of each tensor, one for each output
    shards: dict[Path, Shard]  # as they will be written, by the aligned model's file
    code: str | None  # of the floats that are written, as in DTYPES; None: each as it is

    @property
    def size(self) -> int:
        """The bytes that are read."""
        return sum(pair.sft.size + pair.aligned.size for pair in self.pairs)


@dataclass(frozen=True)
class Plan:
    """What an extrapolation reads and writes, and about how long it takes."""

    read: int  # bytes of both models
    written: int  # bytes of all outputs
    free: int  # bytes on the disk that they go to
    seconds: float  # by a sample that was just computed and written there


class _Written(NamedTuple):
    """What was seen of a tensor pair while its result was written."""

    differs: bool  # whether the two models differ in it
    sft_digest: str
    aligned_digest: str


def blend(theta_sft: torch.Tensor, theta_aligned: torch.Tensor, alpha: float) -> torch.Tensor:
    """Return theta_aligned + alpha * (theta_aligned - theta_sft): Eq 6, arXiv 2404.16792.

    Takes two tensors of one shape. alpha > 0 extrapolates and -1 < alpha < 0 interpolates; alpha 0
    gives the very bits of the aligned tensor, -1 those of the SFT tensor. Computes in float32
    (bfloat16 would round the step, and then the sum), and returns a new tensor of the aligned one's
    dtype. Integers are copied from the aligned tensor, and so are infinities that both hold. Raises
    IncompatibleModels for different shapes.

    This is the rule for one tensor in memory. extrapolate() computes the same bits block by block
    (_compute_at).
    """
    import torch

    if theta_sft.shape != theta_aligned.shape:
        raise IncompatibleModels(
            f"shape {list(theta_sft.shape)} (SFT) and {list(theta_aligned.shape)} (aligned)"
        )
    # The sum would turn -0.0 into 0.0 at alpha = 0, and be exact only up to rounding at -1.
    if alpha == 0 or not theta_aligned.is_floating_point():
        return theta_aligned.clone()
    if alpha == -1:
        return theta_sft.to(theta_aligned.dtype, copy=True)
    theta = theta_aligned.to(torch.float32)
    delta = theta - theta_sft.to(torch.float32)
    equal_infinities = theta_aligned.isinf() & (theta_aligned == theta_sft)
    delta[equal_infinities] = 0.0
    return delta.mul_(alpha).add_(theta).to(theta_aligned.dtype)


def extrapolate(
    sft: str | Path,
    aligned: str | Path,
    outputs: dict[float, str | Path],
    *,
    modules: dict[str, float] | None = None,
    dtype: str | None = None,
    names: dict[str, str] | None = None,
) -> dict[float, dict]:
    """Write theta_aligned + alpha * (theta_aligned - theta_sft) for each {alpha: folder}.

    The two models are read once for all alphas. An output has the shards, dtypes and small files of
    the aligned model, and its expo.json says how it was made. What a model computes from its config
    (rotary frequencies, causal masks) is copied from the aligned model, and so are integers.

    Args:
        sft: folder of theta_0 as safetensors, single or sharded.
        aligned: folder of theta_1, alike.
        outputs: {alpha: new or empty folder}.
        modules: {pattern of tensor names: alpha of their own}. A pattern is one of fnmatch, or
            "re:" and a regular expression; the first match wins.
        dtype: float32, float16 or bfloat16, of the weights that are written; default each as in the
            aligned model. float32 keeps a step that is below the rounding of bfloat16.
        names: more for expo.json, such as what the models are called.
    Returns:
        {alpha: content of its expo.json}.
    Raises:
        IncompatibleModels, ValueError: as check() and module_alphas(); an unknown dtype; or a
            tensor holds or becomes NaN or infinite, which the error names. Infinities that both
            models hold are copied.
        OSError: an output folder is in use, or a disk is full.
    """
    outputs = {float(alpha): Path(out).resolve() for alpha, out in outputs.items()}
    _require_new(list(outputs.values()))
    work = _prepared(sft, aligned, list(outputs), modules or {}, dtype)
    small_files = _small_files(Path(aligned))
    facts = {alpha: _new_facts(alpha, modules or {}, dtype, names or {}) for alpha in outputs}
    data_starts = _data_starts(work.shards, list(facts.values()))
    # Leaving the stack deletes every working folder that was not renamed, whatever happened.
    with ExitStack() as stack:
        folders = [_working_folder(out, small_files, stack) for out in outputs.values()]
        for folder in folders:
            _reserve_shards(folder, work.shards, data_starts)
            if dtype is not None:
                _tell_dtype(folder, dtype, work.shards)
        text = f"extrapolating {aligned} to {len(folders)} α, {work.size / 1e9:.1f} GB to read"
        bar = stack.enter_context(_progress(work.size, text))
        written = _write_tensors(work, folders, data_starts, bar)
        if not any(tensor.differs for tensor in written):
            raise IncompatibleModels(EQUAL.format(sft, aligned))
        digests = _model_digests(work.pairs, written)
        for folder, fact in zip(folders, facts.values(), strict=True):
            fact.update(digests)
            _write_facts(folder, fact, work.shards, data_starts)
        for folder, out in zip(folders, outputs.values(), strict=True):
            _publish(folder, out)
    return facts


def plan(
    sft: str | Path,
    aligned: str | Path,
    outputs: dict[float, str | Path],
    *,
    modules: dict[str, float] | None = None,
    dtype: str | None = None,
) -> Plan:
    """Say what extrapolate() would read and write with the same arguments, and how long it takes.

    The time is that of a sample: tensors of up to SAMPLE bytes are computed, written beside the
    outputs and deleted. Raises as extrapolate() for what is wrong before weights are read, and
    OSError where the disk has no room for the outputs.
    """
    outputs = {float(alpha): Path(out).resolve() for alpha, out in outputs.items()}
    _require_new(list(outputs.values()))
    work = _prepared(sft, aligned, list(outputs), modules or {}, dtype)
    parent = next(iter(outputs.values())).parent
    while not parent.exists():
        parent = parent.parent
    written = len(outputs) * sum(shard.data_size for shard in work.shards.values())
    free = shutil.disk_usage(parent).free
    if written > free:
        raise OSError(f"{parent} has {free} bytes free, {written} are to be written: make room")
    sample = _sample(work)
    began = time.perf_counter()
    with ExitStack() as stack:
        copies = [_working_folder(parent / out.name, [], stack) for out in outputs.values()]
        for copy in copies:
            _reserve_shards(copy, sample.shards, dict.fromkeys(sample.shards, 0))
        bar = stack.enter_context(events.Bar(0, off_terminal=False))
        _write_tensors(sample, copies, dict.fromkeys(sample.shards, 0), bar)
    seconds = (time.perf_counter() - began) * work.size / max(sample.size, 1)
    return Plan(work.size, written, free, seconds)


def _prepared(
    sft: str | Path,
    aligned: str | Path,
    alphas: list[float],
    modules: dict[str, float],
    dtype: str | None,
) -> _Work:
    """Check what can be checked before weights are read; return the work that is to be done."""
    if dtype is not None and dtype not in WRITABLE:
        raise ValueError(f"weights are written in {', '.join(WRITABLE)}, not in {dtype!r}")
    code = WRITABLE.get(dtype)
    pairs = check(sft, aligned)
    shards = {pair.aligned.file: pair.aligned.shard for pair in pairs}
    if code is not None:
        shards = _laid_out(pairs, code)
    return _Work(pairs, module_alphas(pairs, alphas, modules), shards, code)


def _sample(work: _Work) -> _Work:
    """Return a part of the work: tensors of at most SAMPLE bytes, or the smallest if all exceed it.

    Large tensors come first, as most of a model's bytes are in its large tensors.
    """
    pairs = []
    size = 0
    largest_first = sorted(work.pairs, key=lambda pair: pair.aligned.size, reverse=True)
    for pair in largest_first:
        bytes_read = pair.sft.size + pair.aligned.size
        if size + bytes_read <= SAMPLE:
            pairs.append(pair)
            size += bytes_read
    if not size:
        pairs = largest_first[-1:]
    return work._replace(pairs=pairs, shards=_laid_out(pairs, work.code))


def tensors(
    sft: str | Path,
    aligned: str | Path | None,
    alpha: float,
    modules: dict[str, float] | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Return an iterator over the (name, tensor) that extrapolate() would write, read one by one.

    aligned: None gives theta_0 as it is. Raises as extrapolate(); what concerns names, shapes and
    alphas at once, the rest while the tensors are read.
    """
    import torch

    pairs = check(sft, aligned)
    alphas = module_alphas(pairs, [alpha], modules or {})

    def stream() -> Iterator[tuple[str, torch.Tensor]]:
        differ = False
        for pair in pairs:
            name = pair.aligned.name
            dtype = pair.aligned.dtype
            theta = torch.empty(pair.aligned.shape, dtype=getattr(torch, dtype.name))
            content = theta.view(-1).view(torch.uint8).numpy()
            done = 0  # bytes
            for block in _blocks(pair, alphas[name]):
                result = _bytes(block.results[0])
                content[done : done + len(result)] = result
                done += len(result)
                differ = differ or block.differs
            yield name, theta
        if aligned is not None and not differ:
            raise IncompatibleModels(EQUAL.format(sft, aligned))

    return stream()


# ---- which tensors belong together


def check(sft: str | Path, aligned: str | Path | None) -> list[TensorPair]:
    """Return where each tensor is in both models, in the order of the aligned model's files.

    Compares architecture, vocabulary, and the names, shapes and kinds of tensors, but no weights:
    equal models and NaN show later. A head that is tied to the embeddings may be stored under
    either name, or under both. A derived() tensor may be absent from one model; where the aligned
    model has it, it stands for both. With aligned None, every tensor is paired with itself.

    Raises IncompatibleModels, which names the first difference, and ValueError for a folder that
    cannot be read.
    """
    sft = Path(sft)
    if aligned is None:
        return _paired_with_themselves(sft)
    aligned = Path(aligned)
    sft_tensors = _stored_tensors(sft)
    aligned_tensors = _stored_tensors(aligned)
    for difference in _differences(sft, aligned, sft_tensors, aligned_tensors):
        raise IncompatibleModels(difference)
    pairs = []
    for name, aligned_tensor in aligned_tensors.items():
        if derived(aligned_tensor):
            sft_tensor = aligned_tensor
        else:
            sft_tensor = _counterpart(name, aligned_tensors, sft_tensors)
        pairs.append(TensorPair(sft_tensor, aligned_tensor))
    return pairs


def differences(sft: str | Path, aligned: str | Path) -> Iterator[str]:
    """Return an iterator over all for which check() refuses two models, in words.

    Raises ValueError for a folder that cannot be read.
    """
    sft = Path(sft)
    aligned = Path(aligned)
    return _differences(sft, aligned, _stored_tensors(sft), _stored_tensors(aligned))


def _differences(
    sft: Path,
    aligned: Path,
    sft_tensors: dict[str, StoredTensor],
    aligned_tensors: dict[str, StoredTensor],
) -> Iterator[str]:
    if sft.samefile(aligned):
        yield EQUAL.format(sft, aligned)
        return
    compared = [_compared_structure(sft, aligned), _compared_vocabulary(sft, aligned)]
    compared.append(_compared_tensors(sft_tensors, aligned_tensors))
    for what, sft_value, aligned_value in chain(*compared):
        if sft_value != aligned_value:
            yield f"{what} is {sft_value!r} in {sft} and {aligned_value!r} in {aligned}"


def _paired_with_themselves(folder: Path) -> list[TensorPair]:
    """Return the tensors of one model, as pairs from which any alpha leads back to them."""
    stored = _stored_tensors(folder)
    _require_config(folder)
    return [TensorPair(tensor, tensor) for tensor in stored.values()]


# What two models must agree in: what it is, the SFT model's value, the aligned model's.
Compared = tuple[str, object, object]


def _compared_structure(sft: Path, aligned: Path) -> Iterator[Compared]:
    """Yield the settings of the two config.json that say how a model is built."""
    sft_settings = _text_settings(sft)
    aligned_settings = _text_settings(aligned)
    for key in STRUCTURE:
        if key in sft_settings and key in aligned_settings:
            yield f"{key} in config.json", sft_settings[key], aligned_settings[key]


def _compared_vocabulary(sft: Path, aligned: Path) -> Iterator[Compared]:
    """Yield the tokens of both models.

    A file of tokens that only one of the two has is not compared.
    """
    for file in VOCABULARIES:
        if _have_same_bytes(sft / file, aligned / file):
            continue  # reading all tokens would take a tenth of a weight swap's time
        sft_tokens = _vocabulary(sft / file)
        aligned_tokens = _vocabulary(aligned / file)
        if not sft_tokens or not aligned_tokens:
            continue
        for token_id in sorted(sft_tokens.keys() | aligned_tokens.keys()):
            what = f"token {token_id} of {file}"
            yield what, sft_tokens.get(token_id), aligned_tokens.get(token_id)


def _compared_tensors(
    sft_tensors: dict[str, StoredTensor], aligned_tensors: dict[str, StoredTensor]
) -> Iterator[Compared]:
    """Yield the kinds of all tensors but those that are derived()."""
    for name, aligned_tensor in aligned_tensors.items():
        if not derived(aligned_tensor):
            sft_tensor = _counterpart(name, aligned_tensors, sft_tensors)
            yield f"tensor {name}", _kind(sft_tensor), aligned_tensor.kind
    for name, sft_tensor in sft_tensors.items():
        if name not in aligned_tensors and not derived(sft_tensor):
            tied = _tied_tensor(name, sft_tensors, aligned_tensors)
            yield f"tensor {name}", sft_tensor.kind, _kind(tied)


def _counterpart(
    name: str, owner: dict[str, StoredTensor], other: dict[str, StoredTensor]
) -> StoredTensor | None:
    """Return the tensor of `other` that belongs to `name` of `owner`, None if there is none."""
    return other.get(name) or _tied_tensor(name, owner, other)


def _have_same_bytes(left: Path, right: Path) -> bool:
    """Return whether both files are there and equal."""
    return left.is_file() and right.is_file() and left.read_bytes() == right.read_bytes()


def _kind(tensor: StoredTensor | None) -> str:
    return "absent" if tensor is None else tensor.kind


def derived(tensor: StoredTensor) -> bool:
    """Return whether a model computes the tensor from its config.

    Such a tensor is no weight, and need not be stored.
    """
    if DERIVED.search(tensor.name):
        return True
    square = len(tensor.shape) == 4 and tensor.shape[-2] == tensor.shape[-1]
    return square and CAUSAL_MASK.search(tensor.name) is not None


def _tied_tensor(
    name: str, owner: dict[str, StoredTensor], other: dict[str, StoredTensor]
) -> StoredTensor | None:
    """Return the tensor of `other` that is `name` of `owner` under another name, None without one.

    Tied head and embeddings are one tensor, and a writer keeps either name, or both.

    owner: the tensors of the model that has `name`. other: those of the model that lacks it.
    """
    if not name.endswith(HEADS + EMBEDDINGS) or not _ties(owner):
        return None
    for candidate in other.values():
        if candidate.name.endswith(HEADS + EMBEDDINGS) and candidate.kind == owner[name].kind:
            return candidate
    return None


def _ties(stored: dict[str, StoredTensor]) -> bool:
    """Return whether a model's head and embeddings are one tensor.

    They are where it stores one of the two, or both and all of their values are equal.
    """
    candidates = [tensor for name, tensor in stored.items() if name.endswith(HEADS + EMBEDDINGS)]
    return all(_equal(tensor, candidates[0]) for tensor in candidates)


def _equal(left: StoredTensor, right: StoredTensor) -> bool:
    """Return whether two stored tensors have the same dtype, shape and values, none of them NaN."""
    if left is right:
        return True
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    size = math.prod(left.shape)
    with open(left.file, "rb") as left_file, open(right.file, "rb") as right_file:
        left_file.seek(left.file_offset)
        right_file.seek(right.file_offset)
        for start in range(0, size, BLOCK):
            left_block = np.empty(min(BLOCK, size - start), left.dtype.numpy)
            right_block = np.empty_like(left_block)
            if not _fill(left_block, left_file) or not _fill(right_block, right_file):
                return False
            left_values = dtypes.values(left_block, left.dtype)
            if not np.array_equal(left_values, dtypes.values(right_block, right.dtype)):
                return False
    return True


def module_alphas(
    pairs: list[TensorPair], alphas: list[float], modules: dict[str, float]
) -> dict[str, list[float]]:
    """Return {tensor name: its alpha in each output}.

    What is copied from the aligned model has alpha 0: integers and derived() tensors. A pattern
    decides a tensor that is not copied if it is the first of `modules` that matches its name.

    Raises ValueError for an alpha that is not finite, for a pattern that decides no tensor (as it
    matches none, none but copied ones, or none that an earlier pattern does not match), and for
    tied tensors with different alphas.
    """
    if not alphas or not all(map(math.isfinite, [*alphas, *modules.values()])):
        raise ValueError(f"alpha must be a finite number: {alphas}, modules {modules}")
    chosen = {}
    used_patterns = set()
    for pair in pairs:
        tensor = pair.aligned
        pattern = _first_match(tensor.name, modules)
        if derived(tensor) or not tensor.dtype.is_floating_point:
            chosen[tensor.name] = [0.0] * len(alphas)
        elif pattern is None:
            chosen[tensor.name] = list(alphas)
        else:
            used_patterns.add(pattern)
            chosen[tensor.name] = [modules[pattern]] * len(alphas)
    for pattern in modules:
        if pattern not in used_patterns:
            raise ValueError(
                f"module pattern {pattern!r} decides no tensor (the first match wins), such as "
                f"{pairs[-1].aligned.name}"
            )
    tied = {tuple(row) for name, row in chosen.items() if name.endswith(HEADS + EMBEDDINGS)}
    if len(tied) > 1 and ties_embeddings(pairs[0].aligned.file.parent):
        raise ValueError(
            f"output head and embeddings are tied: give them one alpha, not {sorted(tied)}"
        )
    return chosen


def ties_embeddings(folder: Path) -> bool:
    """Return whether a model's config.json says that its head and embeddings are one tensor."""
    return bool(_text_settings(folder).get("tie_word_embeddings"))


def _first_match(name: str, patterns: dict[str, float]) -> str | None:
    """Return the first pattern that fits a tensor's name, None if none does."""
    for pattern in patterns:
        if pattern.startswith("re:"):
            matches = re.fullmatch(pattern.removeprefix("re:"), name) is not None
        else:
            matches = fnmatchcase(name, pattern)
        if matches:
            return pattern
    return None


# ---- reading a model's folder


def load_json(file: Path) -> dict:
    """Return the content of a JSON file, an empty dict if there is no such file.

    Raises ValueError, which names the file, for a link to nowhere and for anything but one JSON
    object.
    """
    if not _is_there(file):
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON ({error}): fetch or write it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds no JSON object: fetch or write it again")
    return content


def _is_there(file: Path) -> bool:
    """Return whether there is such a file; raise ValueError for a link whose target is missing."""
    if file.is_symlink() and not file.exists():
        raise ValueError(f"{file} is a link to a file that is not there: download the model again")
    return file.exists()


def _text_settings(folder: Path) -> dict:
    """Return the settings of config.json, overridden by those of its text_config if it has one.

    Raises ValueError if there is no config.json.
    """
    _require_config(folder)
    settings = load_json(folder / "config.json")
    return settings | (settings.get("text_config") or {})


def _require_config(folder: Path) -> None:
    """Raise ValueError if there is no config.json, without which nothing can load the model."""
    if not _is_there(folder / "config.json"):
        raise ValueError(
            f"no config.json in {folder}: a model cannot be loaded without; copy or download it"
        )


def _vocabulary(file: Path) -> dict[int, str]:
    """Return {id: token} of one of the VOCABULARIES, an empty dict if there is no such file."""
    content = load_json(file)
    vocabulary = content
    added_tokens = []
    # A vocab.json may hold tokens that are called "model" and "added_tokens".
    if file.name == "tokenizer.json" and content.get("model"):
        vocabulary = content["model"]["vocab"]
        added_tokens = content.get("added_tokens") or []
    if isinstance(vocabulary, dict):
        tokens = {token_id: token for token, token_id in vocabulary.items()}
    else:
        tokens = dict(enumerate(token for token, _ in vocabulary))
    for added in added_tokens:
        tokens[added["id"]] = added["content"]
    return tokens


def _stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a folder by name, in the order of its files and within them."""
    if not folder.is_dir():
        raise ValueError(
            f"no such folder: {folder} (a model on the hub has to be downloaded first)"
        )
    files = _shard_files(folder)
    quantised = "quantization_config" in load_json(folder / "config.json")
    stored = {}
    for file in files:
        shard = _read_shard(file)
        entries = shard.entries
        for name in sorted(entries, key=lambda name: entries[name]["data_offsets"]):
            entry = entries[name]
            dtype = DTYPES.get(entry["dtype"])
            if quantised or dtype is None:
                raise ValueError(
                    f"{name} in {file} is quantised ({entry['dtype']}): dequantise the model first"
                )
            start, end = entry["data_offsets"]
            shape = entry["shape"]
            number = "float" if dtype.is_floating_point else entry["dtype"]
            kind = f"{number} {shape}"
            stored[name] = StoredTensor(name, shard, start, end - start, dtype, shape, kind)
    return stored


def _shard_files(folder: Path) -> list[Path]:
    """Return a model's safetensors files; raise ValueError for a folder that has none."""
    if (folder / SINGLE).exists():
        return [folder / SINGLE]
    weight_map = load_json(folder / INDEX).get("weight_map")
    if weight_map is None:
        raise ValueError(
            f"no {SINGLE} or index in {folder}: convert .bin, .pt (never loaded); adapters: "
            "lora.scaled()"
        )
    names = {Path(shard).name for shard in weight_map.values()}
    return sorted(folder / name for name in names or {SINGLE})


def _read_shard(file: Path) -> Shard:
    """Return a safetensors file's header; raise ValueError for a file that is damaged or absent."""
    try:
        # safe_open() checks the header, the offsets and the length of the file.
        with safe_open(file, "np"), open(file, "rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(length))
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    return Shard(file, header, data_start=8 + length)


def _small_files(aligned: Path) -> list[Path]:
    """Return what an output takes over from the aligned model unchanged.

    That is everything but weights and training state. The index of shards is taken too, where the
    shards are what is read.
    """
    small_files = []
    for file in sorted(aligned.iterdir()):
        if file.name == INDEX:
            wanted = not (aligned / SINGLE).exists()
        else:
            wanted = not file.name.endswith(NOT_COPIED)
        if wanted and _is_there(file) and file.is_file():
            if file.stat().st_size < LARGEST_SMALL_FILE:
                small_files.append(file)
    return small_files


# ---- computing, block by block


@dataclass
class _Block:
    """Buffers for a block of one tensor, which are used again for the tensor's next block.

    If all is in bfloat16, the float32 buffers hold the even elements before the odd ones.
    """

    sft: np.ndarray  # as it is stored
    aligned: np.ndarray  # as it is stored
    theta: np.ndarray  # the aligned block in float32
    delta: np.ndarray  # aligned - SFT in float32
    step: np.ndarray  # what is being computed, in float32
    work: np.ndarray  # of the same size in uint32
    results: list[np.ndarray]  # one for each alpha, as it is written
    split: bool  # whether both models are in bfloat16, and the results
    differs: bool = False  # whether the two models differ in this block or in one before it

    @classmethod
    def empty(cls, pair: TensorPair, alphas: int, size: int, written: Dtype) -> Self:
        """Return buffers of `size` elements with that number of results of a dtype."""
        theta, delta, step = np.empty((3, size), np.float32)
        return cls(
            sft=np.empty(size, pair.sft.dtype.numpy),
            aligned=np.empty(size, pair.aligned.dtype.numpy),
            theta=theta,
            delta=delta,
            step=step,
            work=np.empty(size, np.uint32),
            results=[np.empty(size, written.numpy) for _ in range(alphas)],
            split=pair.sft.dtype == pair.aligned.dtype == written == dtypes.BFLOAT16,
        )

    def first(self, size: int) -> Self:
        """Return the first `size` elements of all buffers."""
        return replace(
            self,
            sft=self.sft[:size],
            aligned=self.aligned[:size],
            theta=self.theta[:size],
            delta=self.delta[:size],
            step=self.step[:size],
            work=self.work[:size],
            results=[result[:size] for result in self.results],
        )

    def widen(self, stored: np.ndarray, dtype: Dtype, wide: np.ndarray) -> None:
        """Write stored floats into a buffer of float32."""
        if self.split:
            dtypes.widen_split(stored, wide)
        else:
            dtypes.widen(stored, dtype, wide)

    def narrow_step(self, dtype: Dtype, result: np.ndarray) -> None:
        """Round what was computed into a result."""
        if self.split:
            dtypes.narrow_split(self.step, result, self.work)
        else:
            dtypes.narrow(self.step, dtype, result, self.work)


def _blocks(pair: TensorPair, alphas: list[float], code: str | None = None) -> Iterator[_Block]:
    """Yield the blocks of a tensor, each with its results; the next block overwrites the buffers.

    code: of the floats that are written, None for the aligned tensor's own.
    Raises ValueError for NaN, for infinities that only one model holds, for a result beyond the
    range of its dtype, and for a file that was cut off in the meantime.
    """
    remaining = math.prod(pair.aligned.shape)
    written = DTYPES[_written_code(pair.aligned, code)]
    block = _Block.empty(pair, len(alphas), min(BLOCK, remaining), written)
    # The files are read, not mapped: mapped pages count as this process's memory, and a failing
    # disk would be a signal, not an error.
    with open(pair.sft.file, "rb") as sft_file, open(pair.aligned.file, "rb") as aligned_file:
        sft_file.seek(pair.sft.file_offset)
        aligned_file.seek(pair.aligned.file_offset)
        while remaining:
            if remaining < len(block.aligned):
                block = block.first(remaining)
            remaining -= len(block.aligned)
            if not _fill(block.sft, sft_file) or not _fill(block.aligned, aligned_file):
                raise ValueError(
                    f"{pair.sft.file} or {pair.aligned.file} became shorter while "
                    f"{pair.aligned.name} was read"
                )
            _compute(block, pair, alphas, written)
            yield block


def _fill(buffer: np.ndarray, file: BinaryIO) -> bool:
    """Read a buffer's content from a file; return whether the file had so much."""
    return file.readinto(_bytes(buffer)) == buffer.nbytes


def _bytes(block: np.ndarray) -> np.ndarray:
    """Return an array's memory as an array of bytes."""
    return block.view(np.uint8)


@np.errstate(all="ignore")  # NaN and infinite results are looked for
def _compute(block: _Block, pair: TensorPair, alphas: list[float], written: Dtype) -> None:
    """Compute a block's results from its stored values; raises as _blocks()."""
    if not pair.aligned.dtype.is_floating_point:
        for result in block.results:
            np.copyto(result, block.aligned)
        return
    _subtract(block, pair)
    for alpha, result in zip(alphas, block.results, strict=True):
        _compute_at(block, alpha, result, pair, written)


def _subtract(block: _Block, pair: TensorPair) -> None:
    """Compute a block's theta and delta from its stored values, which must be finite.

    Where both models hold the same infinity, delta is 0.
    """
    sft_dtype = pair.sft.dtype
    aligned_dtype = pair.aligned.dtype
    block.widen(block.aligned, aligned_dtype, block.theta)
    block.widen(block.sft, sft_dtype, block.delta)
    np.subtract(block.theta, block.delta, out=block.delta)
    aligned_finite = dtypes.all_finite(block.aligned, aligned_dtype)
    if not aligned_finite or not dtypes.all_finite(block.sft, sft_dtype):
        equal_infinities = _equal_infinities(block, pair)
        for stored, tensor in ((block.sft, pair.sft), (block.aligned, pair.aligned)):
            if not (dtypes.are_finite(stored, tensor.dtype) | equal_infinities).all():
                raise ValueError(f"{pair.aligned.name} holds NaN or infinity in {tensor.file}")
        if block.split:
            equal_infinities = dtypes.in_split_order(equal_infinities)
        block.delta[equal_infinities] = 0.0
    if not block.differs:
        block.differs = bool(block.delta.any())


def _equal_infinities(block: _Block, pair: TensorPair) -> np.ndarray:
    """Return for each element whether both models hold the same infinity."""
    sft_infinite = dtypes.are_infinite(block.sft, pair.sft.dtype)
    sft_negative = dtypes.are_negative(block.sft, pair.sft.dtype)
    aligned_infinite = dtypes.are_infinite(block.aligned, pair.aligned.dtype)
    aligned_negative = dtypes.are_negative(block.aligned, pair.aligned.dtype)
    return sft_infinite & aligned_infinite & (sft_negative == aligned_negative)


def _compute_at(
    block: _Block, alpha: float, result: np.ndarray, pair: TensorPair, written: Dtype
) -> None:
    """Compute a block at one alpha as blend() does, but without new memory."""
    if alpha == 0 and pair.aligned.dtype == written:
        np.copyto(result, block.aligned)
    elif alpha == -1 and pair.sft.dtype == written:
        np.copyto(result, block.sft)
    else:
        if alpha == 0:
            np.copyto(block.step, block.theta)
        elif alpha == -1:
            block.widen(block.sft, pair.sft.dtype, block.step)
        else:
            np.multiply(block.delta, np.float32(alpha), out=block.step)
            block.step += block.theta
        block.narrow_step(written, result)
    if dtypes.all_finite(result, written):
        return
    was_infinite = dtypes.are_infinite(block.aligned, pair.aligned.dtype)
    finite = dtypes.are_finite(result, written) | was_infinite
    if not finite.all():
        raise ValueError(
            f"{pair.aligned.name} leaves the range of {written} at alpha={alpha}: use a smaller one"
        )


# ---- writing models that appear whole


def _require_new(outs: list[Path]) -> None:
    """Raise FileExistsError for a folder that is in use, or that two alphas share."""
    for out in outs:
        shared = outs.count(out) > 1
        used = out.exists() and (not out.is_dir() or any(out.iterdir()))
        if shared or used:
            raise FileExistsError(
                f"{out} is not a new or empty folder for one alpha: delete it or choose another"
            )


def _working_folder(out: Path, small_files: list[Path], stack: ExitStack) -> Path:
    """Create a folder beside `out` with copies of some files; leaving the stack deletes it.

    The folder stays locked while this run lives. If another run finds it and can lock it, this run
    was killed, and the other one deletes the folder.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    # One run at a time, so that nobody sees a folder between its creation and its locking. Where
    # nothing can be locked this goes on without, as then no folder is ever taken for abandoned.
    with _lock(out.parent, wait=True):
        _delete_abandoned(out)
        folder = out.with_name(f".{out.name}.partial-{os.urandom(4).hex()}")
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        folder.mkdir()
        stack.enter_context(_lock(folder))
    for file in small_files:
        shutil.copyfile(file, folder / file.name)
    return folder


def _delete_abandoned(out: Path) -> None:
    """Delete the working folders that killed runs left beside `out`."""
    for folder in out.parent.glob(f".{glob.escape(out.name)}.partial-*"):
        with _lock(folder) as locked:
            if locked:  # so its own run does not live any more
                shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _lock(folder: Path, wait: bool = False) -> Iterator[bool]:
    """Hold a folder's lock until this is left, or this process ends; yield whether it is held.

    wait: until another process that holds it leaves it. A file system without locks gives none, so
    that nothing of another run is ever deleted there.
    """
    operation = fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB
    with ExitStack() as stack:
        try:
            opened = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, opened)
            fcntl.flock(opened, operation)
            locked = True
        except OSError:  # the folder is gone, another run holds it, or nothing can be locked
            locked = False
        yield locked


def _data_starts(shards: dict[Path, Shard], facts: list[dict]) -> dict[Path, int]:
    """Return the byte at which the tensors begin in an output's shard, by the aligned model's file.

    It is the same in all outputs, so there is room for the longest of their headers. Headers stand
    first but are written last, so their length is fixed here: `facts` hold placeholders that are as
    long as the digests (UNKNOWN_DIGEST).
    """
    data_starts = {}
    for file, shard in shards.items():
        headers = [_padded(_header_text(shard.header, fact)) for fact in facts]
        data_starts[file] = max(map(len, headers))
    return data_starts


def _reserve_shards(folder: Path, shards: dict[Path, Shard], data_starts: dict[Path, int]) -> None:
    """Create a folder's shards with room for all of their bytes, so that a full disk shows at once.

    The headers are written last: a file that is half written never loads.
    """
    for file, shard in shards.items():
        size = data_starts[file] + shard.data_size
        with open(folder / file.name, "xb") as opened:
            if hasattr(os, "posix_fallocate") and size:  # not on macOS
                os.posix_fallocate(opened.fileno(), 0, size)


def _written_code(tensor: StoredTensor, code: str | None) -> str:
    """Return the code of DTYPES that a tensor is written in; only weights take another one."""
    own = tensor.shard.header[tensor.name]["dtype"]
    if code is None or derived(tensor) or not tensor.dtype.is_floating_point:
        return own
    return code


def _laid_out(pairs: list[TensorPair], code: str | None) -> dict[Path, Shard]:
    """Return the shards that hold the aligned tensors of these pairs, written in a dtype.

    Tensors keep the order of the aligned model's files.
    """
    tensors_of: dict[Path, list[StoredTensor]] = {}
    for pair in sorted(pairs, key=lambda pair: pair.aligned.data_offset):
        tensors_of.setdefault(pair.aligned.file, []).append(pair.aligned)
    shards = {}
    for file, stored in tensors_of.items():
        header = {"__metadata__": stored[0].shard.header.get("__metadata__", {})}
        start = 0
        for tensor in stored:
            written = _written_code(tensor, code)
            end = start + math.prod(tensor.shape) * DTYPES[written].numpy.itemsize
            offsets = [start, end]
            header[tensor.name] = {
                "dtype": written,
                "shape": tensor.shape,
                "data_offsets": offsets,
            }
            start = end
        shards[file] = Shard(file, header, data_start=0)
    return shards


def _tell_dtype(folder: Path, dtype: str, shards: dict[Path, Shard]) -> None:
    """Say in a folder's config.json and index of shards which dtype the weights are written in."""
    settings = load_json(folder / "config.json")
    for part in (settings, settings.get("text_config") or {}):
        for key in ("dtype", "torch_dtype"):
            if key in part:
                part[key] = dtype
    if "torch_dtype" not in settings:
        settings["dtype"] = dtype
    (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    index = load_json(folder / INDEX)
    if index:
        size = sum(shard.data_size for shard in shards.values())
        index["metadata"] = {**(index.get("metadata") or {}), "total_size": size}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


@contextmanager
def _progress(size: int, text: str) -> Iterator[events.Bar]:
    """Show a bar of bytes on a terminal; elsewhere say `text` once, if the work takes long."""
    with events.Bar(size, off_terminal=False, leave=True, unit="B", unit_scale=True) as bar:
        if bar.shown:
            yield bar
        else:
            with events.slow(text):
                yield bar


def _write_tensors(
    work: _Work, folders: list[Path], data_starts: dict[Path, int], bar: events.Bar
) -> list[_Written]:
    """Write all tensors into the shards of each folder, and wait until these are on the disk."""
    pairs = work.pairs

    def write(pair: TensorPair) -> _Written:
        file = pair.aligned.file
        name = pair.aligned.name
        copies = [folder / file.name for folder in folders]
        place = data_starts[file] + work.shards[file].data_offset(name)
        return _write_tensor(pair, work.alphas[name], copies, place, work.code)

    unfinished = Counter(pair.aligned.file for pair in pairs)
    written = []
    syncs = []
    with ExitStack() as stack:
        # Tensors are independent, so each thread takes one at a time.
        pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1))
        stack.callback(pool.shutdown, cancel_futures=True)
        # Takes a finished shard to the disk while the next ones are computed.
        disk = ThreadPoolExecutor(1)
        stack.callback(disk.shutdown, cancel_futures=True)
        for pair, tensor in zip(pairs, pool.map(write, pairs), strict=True):
            written.append(tensor)
            bar.update(pair.sft.size + pair.aligned.size)
            file = pair.aligned.file
            unfinished[file] -= 1
            if not unfinished[file]:
                syncs += [disk.submit(sync, folder / file.name) for folder in folders]
        for future in syncs:
            future.result()
    return written


def _write_tensor(
    pair: TensorPair, alphas: list[float], copies: list[Path], place: int, code: str | None
) -> _Written:
    """Write a tensor at each alpha into its copy of the shard, from the byte `place` on."""
    sft_digest = _new_digest()
    aligned_digest = _new_digest()
    differs = False
    with ExitStack() as stack:
        opened = [stack.enter_context(open(copy, "r+b")) for copy in copies]
        for file in opened:
            file.seek(place)
        for block in _blocks(pair, alphas, code):
            sft_digest.update(_bytes(block.sft))
            aligned_digest.update(_bytes(block.aligned))
            for file, result in zip(opened, block.results, strict=True):
                file.write(_bytes(result))
            differs = block.differs
    return _Written(differs, sft_digest.hexdigest(), aligned_digest.hexdigest())


def _new_digest():
    """Return an empty digest; SHA-256 would take as long as a third of the copying."""
    from xxhash import xxh3_128

    return xxh3_128()


def _model_digests(pairs: list[TensorPair], written: list[_Written]) -> dict[str, str]:
    """Return the facts that tell which weights went in.

    Rows are sets, as one tied tensor of the SFT model may stand in two pairs.
    """
    sft_rows = set()
    aligned_rows = set()
    for pair, tensor in zip(pairs, written, strict=True):
        if not derived(pair.sft):
            sft_rows.add(_digest_row(pair.sft, tensor.sft_digest))
        if not derived(pair.aligned):
            aligned_rows.add(_digest_row(pair.aligned, tensor.aligned_digest))
    return {"sft_xxh3": _digest_of(sft_rows), "aligned_xxh3": _digest_of(aligned_rows)}


def _digest_row(tensor: StoredTensor, digest: str) -> str:
    return f"{tensor.name} {tensor.dtype} {tensor.shape} {digest}\n"


def _digest_of(rows: set[str]) -> str:
    """Return the digest of a model from a row per tensor, so that its shards do not matter."""
    digest = _new_digest()
    digest.update("".join(sorted(rows)).encode())
    return digest.hexdigest()


def _new_facts(
    alpha: float, modules: dict[str, float], dtype: str | None, names: dict[str, str]
) -> dict:
    """Return how an output is made, before the digests of the models are known."""
    facts = {
        "alpha": alpha,
        "modules": dict(modules),
        "sft_xxh3": UNKNOWN_DIGEST,
        "aligned_xxh3": UNKNOWN_DIGEST,
    }
    if dtype is not None:
        facts["dtype"] = dtype
    return facts | names


def _write_facts(
    folder: Path, facts: dict, shards: dict[Path, Shard], data_starts: dict[Path, int]
) -> None:
    """Say in expo.json and in the headers of the shards how an output was made."""
    text = json.dumps(facts, indent=1, default=float) + "\n"
    (folder / "expo.json").write_text(text, encoding="utf-8")
    for file, shard in shards.items():
        with open(folder / file.name, "r+b") as opened:
            opened.write(_padded(_header_text(shard.header, facts), data_starts[file]))


def _header_text(header: dict, facts: dict) -> str:
    """Return a safetensors file's header as JSON, with the facts in its metadata."""
    metadata = {"format": "pt", **header.get("__metadata__", {})}
    for key, fact in facts.items():
        text = fact if isinstance(fact, str) else json.dumps(fact, default=float)
        metadata[f"expo_{key}"] = text
    return json.dumps({**header, "__metadata__": metadata})


def _padded(header: str, least: int = 0) -> bytes:
    """Return what stands in front of a safetensors file's tensors: 8 bytes of length, the header.

    Blanks fill the header to a multiple of 8 bytes, and both to `least` bytes.
    """
    content = header.encode()
    multiple_of_8 = math.ceil(len(content) / 8) * 8
    content = content.ljust(max(multiple_of_8, least - 8))
    return len(content).to_bytes(8, "little") + content


def _publish(folder: Path, out: Path) -> None:
    """Give a finished folder its name, once all of it is on the disk.

    After a power cut the folder is there as a whole, or not at all.
    """
    for path in [*folder.iterdir(), folder]:
        sync(path)
    try:
        os.rename(folder, out)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        raise FileExistsError(
            f"another run has written {out} meanwhile: this result is dropped"
        ) from error
    sync(out.parent)
