"""Extrapolate an aligned model past its SFT start, from safetensors to safetensors in one streamed
read.

The rule is ExPO's, theta_2 = theta_1 + alpha * (theta_1 - theta_0) (Eq 6, arXiv 2404.16792);
nothing is trained. Command line: python -m beyond_dpo.extrapolate SFT ALIGNED OUT --alpha 0.3
--alpha 0.5 [--module '*.mlp.*=0.1']
"""

import argparse
import errno
import fcntl
import glob
import json
import math
import os
import re
import shutil
from collections import Counter, namedtuple
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from xxhash import (
    xxh3_128,
)  # says which weights went in; sha256 would take as long as a third of the copying

from beyond_dpo import events
from beyond_dpo.files import sync

BLOCK = 1 << 18  # elements per step: its buffers (about 5 MB) stay in the processor's cache
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "BOOL": torch.bool,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
}
STRUCTURE = (
    "architectures",
    "model_type",
    "vocab_size",
    "hidden_size",
    "num_attention_heads",
    "tie_word_embeddings",
)
HEADS = ("lm_head.weight", "embed_out.weight")
EMBEDDINGS = (
    "embed_tokens.weight",
    "wte.weight",
    "embed_in.weight",
    "word_embeddings.weight",
    "shared.weight",
)
# What a model computes from its config, though old checkpoints store it: transformers ignores it
# and writes none.
DERIVED = re.compile(
    r"(rotary_emb\.inv_freq|\.(attn|attention)\.masked_bias|\.(cos|sin)_cached|\bposition_ids)$"
)
CAUSAL_MASK = re.compile(
    r"\.(attn|attention)\.bias$"
)  # of GPT-2, GPT-NeoX: derived too, where it is a square
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
)  # weights, optimizer state, an artifact's own hashes
EQUAL = "every tensor in {1} equals the one in {0}: there is no direction to follow"
_Stored = namedtuple(
    "_Stored", "name file header data start size dtype shape kind"
)  # data: byte where the header ends


class IncompatibleModels(ValueError):
    """The two folders are not an SFT model and a model aligned from it."""


def blend(theta_sft: torch.Tensor, theta_aligned: torch.Tensor, alpha: float) -> torch.Tensor:
    """Return theta_aligned + alpha * (theta_aligned - theta_sft): Eq 6, arXiv 2404.16792.

    Takes two tensors of one shape; alpha > 0 extrapolates, -1 < alpha < 0 interpolates, 0 gives the
    aligned bits and -1 the SFT ones. Computes in float32 (bfloat16 would round the step, then the
    sum) and returns a new tensor of the aligned one's dtype; copies integers. Raises
    IncompatibleModels for different shapes.
    """
    if theta_sft.shape != theta_aligned.shape:
        raise IncompatibleModels(
            f"shape {list(theta_sft.shape)} (SFT) and {list(theta_aligned.shape)} (aligned)"
        )
    if alpha == 0 or not theta_aligned.is_floating_point():  # a + 0 * d would turn -0.0 into 0.0
        return theta_aligned.clone()
    if alpha == -1:  # a - (a - s) is s only up to rounding
        return theta_sft.to(theta_aligned.dtype, copy=True)
    theta = theta_aligned.to(torch.float32)
    return (theta - theta_sft.to(torch.float32)).mul_(alpha).add_(theta).to(theta_aligned.dtype)


def extrapolate(
    sft, aligned, outputs: dict[float, str | Path], *, modules: dict[str, float] | None = None
):
    """Write theta_aligned + alpha * (theta_aligned - theta_sft) into out_dir for each {alpha:
    out_dir}, in one read.

    sft, aligned: folders of safetensors, single or sharded. An output has the aligned model's
    shards, dtypes and small files, and says in expo.json how it was made. modules maps patterns of
    tensor names (fnmatch, or "re:" and a regular expression) to their own alpha; the first match
    wins. What a model computes from its config (rotary frequencies, causal masks) is copied from
    the aligned one, as are integers. Returns {alpha: content of expo.json}. Raises as check(),
    ValueError naming a tensor that is or becomes NaN or infinite (infinities that both models hold
    are copied), OSError for an out_dir in use or a full disk.
    """
    outputs = {float(alpha): Path(out).resolve() for alpha, out in outputs.items()}
    for out in outputs.values():
        if (
            list(outputs.values()).count(out) > 1
            or out.exists()
            and (not out.is_dir() or any(out.iterdir()))
        ):
            raise FileExistsError(
                f"{out} is not a new or empty folder for one alpha: delete it or choose another"
            )
    pairs = check(sft, aligned)
    alphas = module_alphas(pairs, list(outputs), modules or {})
    small = _small_files(Path(aligned))
    facts = [
        dict(alpha=a, modules=dict(modules or {}), sft_xxh3="-" * 32, aligned_xxh3="-" * 32)
        for a in outputs
    ]
    shards = {one.file: one for _, one in pairs}
    starts = {
        file: max(len(_header(one.header, fact)) for fact in facts) for file, one in shards.items()
    }
    with (
        ExitStack() as stack
    ):  # undone backwards on any exit: stop the workers, then delete what was not renamed
        folders = [_working_folder(out, small, stack) for out in outputs.values()]
        for folder in folders:
            for file, one in shards.items():
                _reserve(folder / file.name, starts[file] + file.stat().st_size - one.data)

        def work(pair):
            one = pair[1]
            return _write(
                pair,
                alphas[one.name],
                [folder / one.file.name for folder in folders],
                starts[one.file],
            )

        # Tensors are independent, so each thread takes one at a time and torch need not split its
        # operations further.
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(1)
        pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1))
        stack.callback(pool.shutdown, cancel_futures=True)
        disk = ThreadPoolExecutor(
            1
        )  # takes a finished shard to the disk while the next ones are computed
        stack.callback(disk.shutdown, cancel_futures=True)
        total = sum(one.size for pair in pairs for one in pair)
        bar = events.Bar(total, off_terminal=False, leave=True, unit="B", unit_scale=True)
        stack.enter_context(bar)
        if not bar.shown:
            what = f"extrapolating {aligned} to {len(folders)} α, {total / 1e9:.1f} GB to read"
            stack.enter_context(events.slow(what))
        unfinished = Counter(one.file for _, one in pairs)
        on_disk = []
        moved, rows = (
            False,
            (set(), set()),
        )  # a row per tensor, so that a model's digest does not depend on its shards
        for pair, (changed, digests) in zip(pairs, pool.map(work, pairs), strict=True):
            moved = moved or changed
            for one, digest, side in zip(pair, digests, rows, strict=True):
                if not derived(one):
                    side.add(f"{one.name} {one.dtype} {one.shape} {digest.hexdigest()}\n")
                bar.update(one.size)
            shard = pair[1].file
            unfinished[shard] -= 1
            if not unfinished[shard]:
                on_disk += [disk.submit(sync, folder / shard.name) for folder in folders]
        if not moved:
            raise IncompatibleModels(EQUAL.format(sft, aligned))
        for folder, fact in zip(folders, facts, strict=True):
            fact["sft_xxh3"], fact["aligned_xxh3"] = (
                xxh3_128("".join(sorted(r)).encode()).hexdigest() for r in rows
            )
            (folder / "expo.json").write_text(
                json.dumps(fact, indent=1, default=float) + "\n", encoding="utf-8"
            )
            for file, one in shards.items():
                with open(folder / file.name, "r+b") as new:
                    new.write(_header(one.header, fact, starts[file]))
        for synced in on_disk:
            synced.result()
        for folder, out in zip(folders, outputs.values(), strict=True):
            _publish(folder, out)
    return dict(zip(outputs, facts, strict=True))


def _reserve(new: Path, size: int) -> None:
    """Create a file that has room for `size` bytes. Its header is written last: a half file never
    loads.
    """
    with open(new, "xb") as opened:
        allocate = getattr(os, "posix_fallocate", lambda *_: None)  # not on macOS
        allocate(opened.fileno(), 0, size)


def _write(
    pair: tuple[_Stored, _Stored], alphas: list[float], news: list[Path], start: int
) -> tuple[bool, list]:
    """Write one tensor at each α into its file, whose tensors begin at byte `start`.

    Returns whether the two models differ in it, and the digests of the SFT and the aligned tensor.
    """
    zero, one = pair
    changed, digests = False, [xxh3_128(), xxh3_128()]
    with ExitStack() as files:
        opened = [files.enter_context(open(new, "r+b")) for new in news]
        for new in opened:
            new.seek(start + one.start)
        sinks = [digest.update for digest in digests] + [new.write for new in opened]
        for changed, *blocks in _blocks(zero, one, alphas):  # noqa: B007
            for sink, block in zip(sinks, blocks, strict=True):
                sink(block.view(torch.uint8).numpy())
    return changed, digests


def tensors(sft, aligned, alpha: float, modules: dict[str, float] | None = None):
    """Return an iterator over extrapolate()'s (name, tensor), read one by one; raises alike.
    aligned: None for θ₀.
    """
    pairs = check(sft, aligned)
    alphas = module_alphas(pairs, [alpha], modules or {})

    def stream():
        moved = False
        for zero, one in pairs:
            whole = torch.empty(one.shape, dtype=one.dtype)
            parts = iter(whole.view(-1).split(BLOCK))
            for changed, _, _, result in _blocks(zero, one, alphas[one.name]):
                next(parts).copy_(result)
                moved = moved or changed
            yield one.name, whole
        if aligned and not moved:
            raise IncompatibleModels(EQUAL.format(sft, aligned))

    return stream()


def check(sft, aligned) -> list[tuple[_Stored, _Stored]]:
    """Return where each tensor is in both models (None: in one), or raise IncompatibleModels with
    the first difference.

    Compares architecture, vocabulary, tensor names, shapes and kinds, but no weights: equal models
    and NaN show later. A head tied to the embeddings may be stored under either name, or under
    both. A derived() tensor may be absent from one; where the aligned model has it, it stands for
    both. Raises ValueError for unreadable folders.
    """
    alone, sft, aligned = aligned is None, Path(sft), Path(aligned or sft)

    def compare(what, zero, one):
        if zero != one:
            raise IncompatibleModels(f"{what} is {zero!r} in {sft} and {one!r} in {aligned}")

    zeros, ones = _stored(sft), _stored(aligned)
    if not alone and sft.samefile(aligned):
        raise IncompatibleModels(EQUAL.format(sft, aligned))
    left, right = (c | (c.get("text_config") or {}) for c in map(_config, (sft, aligned)))
    for key in (key for key in STRUCTURE if key in left and key in right):
        compare(f"{key} in config.json", left[key], right[key])
    for file in () if alone else ("tokenizer.json", "vocab.json", "added_tokens.json"):
        left, right = _vocabulary(sft / file), _vocabulary(aligned / file)
        for i in sorted(left.keys() | right.keys()) if left and right else ():
            compare(f"token {i} of {file}", left.get(i), right.get(i))
    pairs = []
    for name in ones | zeros:
        one = ones.get(name) or _tied(name, zeros, ones)
        zero = zeros.get(name) or _tied(name, ones, zeros)
        if derived(ones.get(name) or zeros[name]):
            zero = one = ones.get(name)
        compare(f"tensor {name}", zero.kind if zero else "absent", one.kind if one else "absent")
        if name in ones:
            pairs.append((zero, one))
    return pairs


def derived(tensor: _Stored) -> bool:
    """Tell whether a model computes a stored tensor from its config, so that it is no weight and
    need not be stored.
    """
    square = len(tensor.shape) == 4 and tensor.shape[-2] == tensor.shape[-1]
    return bool(DERIVED.search(tensor.name) or square and CAUSAL_MASK.search(tensor.name))


def module_alphas(pairs, alphas: list[float], modules: dict[str, float]) -> dict[str, list[float]]:
    """Return {tensor name: its alpha in each output}; raise ValueError for a pattern that decides
    nothing.
    """
    if not alphas or not all(map(math.isfinite, (*alphas, *modules.values()))):
        raise ValueError(f"alpha must be a finite number: {alphas}, modules {modules}")
    chosen, used = {}, set()
    for _, one in pairs:
        fits = (
            p
            for p in modules
            if (re.fullmatch(p[3:], one.name) if p[:3] == "re:" else fnmatchcase(one.name, p))
        )
        used.add(pattern := next(fits, None))
        moves = one.kind.startswith("float") and not derived(
            one
        )  # the rest is copied from the aligned model, as at 0
        chosen[one.name] = [modules.get(pattern, a) if moves else 0.0 for a in alphas]
    for pattern in modules.keys() - used:
        raise ValueError(
            f"module pattern {pattern!r} decides no tensor (the first match wins), such as "
            f"{one.name}"
        )
    tied = {tuple(row) for name, row in chosen.items() if name.endswith(HEADS + EMBEDDINGS)}
    if len(tied) > 1 and load_json(pairs[0][1].file.parent / "config.json").get(
        "tie_word_embeddings"
    ):
        raise ValueError(
            f"output head and embeddings are tied: give them one alpha, not {sorted(tied)}"
        )
    return chosen


def load_json(file: Path) -> dict:
    """Return the content of a JSON file, nothing if there is no such file.

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
    """Tell whether there is such a file; raise ValueError for a link whose target is missing."""
    if file.is_symlink() and not file.exists():
        raise ValueError(f"{file} is a link to a file that is not there: download the model again")
    return file.exists()


def _config(folder: Path) -> dict:
    """Return a model's config.json, without which nothing can load it; raise ValueError if there is
    none.
    """
    if not _is_there(folder / "config.json"):
        raise ValueError(
            f"no config.json in {folder}: a model cannot be loaded without; copy or download it"
        )
    return load_json(folder / "config.json")


def _blocks(zero: _Stored, one: _Stored, alphas: list[float]):
    """Yield (do they differ so far, SFT block, aligned block, result of each alpha); the next step
    overwrites them.
    """
    left, changed = math.prod(one.shape), False
    old, now, *results = (
        torch.empty(min(BLOCK, left), dtype=s.dtype) for s in [zero, one] + [one] * len(alphas)
    )
    theta, delta, moved = torch.empty(3, len(now))
    # Read, not mapped: mapped pages count as this process's memory, and a failing disk would be a
    # signal, not an error.
    with open(zero.file, "rb") as zero_file, open(one.file, "rb") as one_file:
        zero_file.seek(zero.data + zero.start)
        one_file.seek(one.data + one.start)
        while left:
            old, now, theta, delta, moved, *results = (
                b[:left] for b in (old, now, theta, delta, moved, *results)
            )
            left -= len(now)
            sources = (zero_file, old), (one_file, now)
            if any(
                file.readinto(block.view(torch.uint8).numpy()) < block.nbytes
                for file, block in sources
            ):
                raise ValueError(
                    f"{zero.file} or {one.file} became shorter while {one.name} was read"
                )
            if now.is_floating_point():
                torch.sub(theta.copy_(now), delta.copy_(old), out=delta)
                if not math.isfinite(
                    delta.sum()
                ):  # 40 times faster than to look at each, but it may overflow itself
                    both = now.isinf() & (now == old)
                    for file, block in sources:
                        if not (block.isfinite() | both).all():
                            raise ValueError(f"{one.name} holds NaN or infinity in {file.name}")
                    delta[both] = 0.0
                changed = changed or bool(delta.any())
            for alpha, result in zip(alphas, results, strict=True):  # as blend() does, in place
                step = (
                    now
                    if alpha == 0
                    else old
                    if alpha == -1
                    else torch.mul(delta, alpha, out=moved).add_(theta)
                )
                if (
                    not math.isfinite(result.copy_(step).sum())
                    and not (result.isfinite() | now.isinf()).all()
                ):
                    raise ValueError(
                        f"{one.name} leaves the range of {one.dtype} at alpha={alpha}: use a "
                        "smaller one"
                    )
            yield changed, old, now, *results


def _header(header: dict, fact: dict, length: int = 0) -> bytes:
    """Return header's bytes with fact in the metadata, filled to a multiple of 8 and at least
    length.
    """
    metadata = {"format": "pt", **header.get("__metadata__", {})}
    metadata |= {
        f"expo_{key}": v if isinstance(v, str) else json.dumps(v, default=float)
        for key, v in fact.items()
    }
    text = json.dumps({**header, "__metadata__": metadata}).encode()
    text = text.ljust(max(length - 8, len(text) + -len(text) % 8))
    return len(text).to_bytes(8, "little") + text


def _small_files(aligned: Path) -> list[Path]:
    """Return what an output takes over from the aligned model as it is: all but weights and
    training state.
    """
    small = []
    for file in sorted(aligned.iterdir()):
        wanted = (
            file.name == INDEX
            and not (aligned / SINGLE).exists()
            or not file.name.endswith(NOT_COPIED)
        )
        if wanted and _is_there(file) and file.is_file() and file.stat().st_size < 100 << 20:
            small.append(file)
    return small


def _working_folder(out: Path, small: list[Path], stack: ExitStack) -> Path:
    """Create a folder beside out with copies of some files, deleted with the stack or by the next
    run.

    It stays locked while its run lives: who finds it unlocked may delete it, as its run was killed.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    with (
        ExitStack() as turn
    ):  # one run at a time, so that nobody sees a folder between its making and its locking
        turn.enter_context(_Lock(out.parent, wait=True))
        for left in out.parent.glob(f".{glob.escape(out.name)}.partial-*"):
            with _Lock(left) as abandoned:
                if abandoned:
                    shutil.rmtree(left, ignore_errors=True)
        folder = out.with_name(f".{out.name}.partial-{os.urandom(4).hex()}")
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        folder.mkdir()
        stack.enter_context(_Lock(folder))
    for file in small:
        shutil.copyfile(file, folder / file.name)
    return folder


class _Lock:
    """Hold a folder's lock inside a with block, or until this process ends; yield whether it was to
    be had.

    A file system without locks gives none, so that nothing of another run is ever deleted there.
    """

    def __init__(self, folder: Path, wait: bool = False):
        self.folder = folder
        self.kind = fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB
        self.opened = None

    def __enter__(self) -> bool:
        try:
            self.opened = os.open(self.folder, os.O_RDONLY)
            fcntl.flock(self.opened, self.kind)
        except OSError:  # it is gone, it is another's, or nothing can be locked
            return False
        return True

    def __exit__(self, *_):
        if self.opened is not None:
            os.close(self.opened)


def _publish(folder: Path, out: Path) -> None:
    """Give a finished folder its name, when all of it is on the disk: a power cut leaves it whole
    or not there.
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


def _stored(folder: Path) -> dict[str, _Stored]:
    """Return the tensors of a folder by name, in the order of its files."""
    if not folder.is_dir():
        raise ValueError(
            f"no such folder: {folder} (a model on the hub has to be downloaded first)"
        )
    index = {} if (folder / SINGLE).exists() else load_json(folder / INDEX).get("weight_map")
    if index is None:
        raise ValueError(
            f"no {SINGLE} or index in {folder}: convert .bin, .pt (never loaded); adapters: "
            "lora.scaled()"
        )
    found, quantised = {}, "quantization_config" in load_json(folder / "config.json")
    for file in sorted(
        {folder / Path(shard).name for shard in index.values()} or {folder / SINGLE}
    ):
        try:
            with (
                safe_open(file, "pt"),
                open(file, "rb") as opened,
            ):  # safe_open checks header, offsets and length
                header = json.loads(opened.read(length := int.from_bytes(opened.read(8), "little")))
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} cannot be read: {error}") from error
        for name in sorted(
            header.keys() - {"__metadata__"}, key=lambda name: header[name]["data_offsets"]
        ):
            (start, end), dtype, shape = (
                header[name][key] for key in ("data_offsets", "dtype", "shape")
            )
            if quantised or (torch_dtype := DTYPES.get(dtype)) is None:
                raise ValueError(
                    f"{name} in {file} is quantised ({dtype}): dequantise the model first"
                )
            kind = f"{'float' if torch_dtype.is_floating_point else dtype} {shape}"
            found[name] = _Stored(
                name, file, header, 8 + length, start, end - start, torch_dtype, shape, kind
            )
    return found


def _vocabulary(file: Path) -> dict[int, str]:
    """Return {id: token} of a tokenizer.json, vocab.json or added_tokens.json; nothing if there is
    no such file.
    """
    content = load_json(file)
    vocab = (
        content["model"]["vocab"]
        if content.get("model") and file.name == "tokenizer.json"
        else content
    )
    ids = (
        {i: token for token, i in vocab.items()}
        if isinstance(vocab, dict)
        else dict(enumerate(t for t, _ in vocab))
    )
    return ids | {
        t["id"]: t["content"]
        for t in (() if vocab is content else content.get("added_tokens") or ())
    }


def _tied(name: str, there: dict[str, _Stored], here: dict[str, _Stored]) -> _Stored | None:
    """Return the tensor of one model that is another's `name` under another name: of an output head
    or embeddings.

    Tied, they are one tensor, and a writer keeps either name, or both. there: the tensors of the
    model that has `name`; here: those of the one that lacks it. None if they are not tied: a model
    that holds only one of the two ties them, one that holds both does so if they are equal bit for
    bit.
    """
    names = HEADS + EMBEDDINGS
    if not name.endswith(names):
        return None
    for other in (other for other in there if other != name and other.endswith(names)):
        if there[other][5:] != there[name][5:]:
            return None
        if not torch.equal(*(safe_open(there[n].file, "pt").get_tensor(n) for n in (name, other))):
            return None
    same = [
        tensor
        for other, tensor in here.items()
        if other.endswith(names) and tensor.kind == there[name].kind
    ]
    return same[0] if same else None


def main(argv: list[str] | None = None) -> None:
    """Run extrapolate() from the command line; several --alpha write OUT/alpha=<a>."""
    parser = argparse.ArgumentParser(
        prog="python -m beyond_dpo.extrapolate", description=__doc__.splitlines()[0]
    )
    for name in ("sft", "aligned", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument(
        "--alpha", type=float, action="append", required=True, help="may be repeated"
    )
    parser.add_argument(
        "--module", action="append", default=[], metavar="PATTERN=ALPHA", help="may be repeated"
    )
    args = parser.parse_args(argv)
    outputs = {
        a: args.out / f"alpha={str(a).removesuffix('.0')}" if args.alpha[1:] else args.out
        for a in args.alpha
    }
    try:
        modules = {
            pattern: float(alpha)
            for pattern, _, alpha in (module.rpartition("=") for module in args.module)
        }
        extrapolate(args.sft, args.aligned, outputs, modules=modules)
    except (ValueError, OSError, re.error) as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:
        events.say("interrupted; nothing half written stays, the same command begins again")
        raise SystemExit(130) from None
    events.show("\n".join(map(str, outputs.values())))


if __name__ == "__main__":
    main()
