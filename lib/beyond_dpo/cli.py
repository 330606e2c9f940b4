"""The `expo` command: extrapolate checkpoints, compare them and describe the result.

Here are the parts that need no engine. `beyond_dpo.jobs.command` adds the search for α, and is what
the command starts.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import beyond_dpo
from beyond_dpo import events, extrapolate, hub
from beyond_dpo.files import write_file

SHOWN = 10  # differences of two models that are listed one by one
CARD = "README.md"
MARK = "<!-- written by `expo card` -->"
OTHER_CARD = "README.aligned.md"  # what the aligned model's own card is called beside ours


class CommandError(RuntimeError):
    """Something that the user can put right; the message says it in one line."""


class Command(NamedTuple):
    """A part of the command, such as `expo diff`."""

    name: str
    summary: str
    examples: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], None]


def main(argv: Sequence[str] | None, commands: Sequence[Command]) -> int:
    """Run one of the commands; return its exit code.

    0: done. 1: a known error, which is one line on stderr. 2: a usage that is refused (by
    SystemExit). 130: interrupted.
    """
    events.printable()
    options = _parser(commands).parse_args(argv)
    try:
        options.run(options)
    except (CommandError, ValueError, OSError, re.error) as error:
        events.say(f"expo: {one_line(error)}")
        return 1
    except ModuleNotFoundError as error:
        events.say(f"expo: this needs {error.name}, which is not installed: pip install it")
        return 1
    except KeyboardInterrupt as interrupt:
        advice = str(interrupt) or "nothing half written stays, the same command begins again"
        events.say(f"interrupted; {advice}")
        return 130
    return 0


def one_line(error: Exception) -> str:
    """Return an error's message without its line breaks."""
    return " ".join(str(error).split()) or type(error).__name__


def _parser(commands: Sequence[Command]) -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="expo",
        description="Extrapolate a model past its SFT start: θ₁ + α(θ₁ − θ₀), ExPO, "
        "arXiv 2404.16792. SFT and ALIGNED are folders, or hub ids (org/name@revision).",
        epilog="exit codes: 0 done, 1 an error (one line on stderr), 2 a wrong usage, "
        "130 interrupted",
    )
    parser.add_argument(
        "--version", action="version", version=f"beyond-dpo {beyond_dpo.__version__}"
    )
    parts = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in commands:
        part = parts.add_parser(
            command.name,
            help=command.summary,
            description=command.summary,
            epilog=f"examples:\n{command.examples}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_arguments(part)
        part.set_defaults(run=command.run)
    return parser


def add_models(parser: argparse.ArgumentParser) -> None:
    """Add the two models that every command but `card` reads."""
    parser.add_argument("sft", metavar="SFT", help="θ₀: a folder or a hub id")
    parser.add_argument("aligned", metavar="ALIGNED", help="θ₁: a folder or a hub id")


def finite(text: str) -> float:
    """Read a finite number of the command line."""
    number = float(text)
    if not math.isfinite(number):
        raise ValueError
    return number


finite.__name__ = "finite number"  # what argparse calls it where it refuses one


# ---- expo extrapolate


def _size(size: int) -> str:
    """Return a number of bytes as people say it."""
    if size < 1e9:
        return f"{size / 1e6:.1f} MB"
    return f"{size / 1e9:.1f} GB"


def _module_alpha(text: str) -> tuple[str, float]:
    """Read PATTERN=ALPHA; the pattern may hold an = itself."""
    pattern, _, alpha = text.rpartition("=")
    if not pattern:
        raise ValueError
    return pattern, finite(alpha)


_module_alpha.__name__ = "PATTERN=ALPHA"


def _add_extrapolate(parser: argparse.ArgumentParser) -> None:
    add_models(parser)
    parser.add_argument(
        "out", type=Path, metavar="OUT", help="new folder; of several α OUT/alpha=0.3, …"
    )
    parser.add_argument(
        "--alpha",
        type=finite,
        nargs="+",
        action="extend",
        required=True,
        help="above 0 extrapolates, −1 … 0 interpolates",
    )
    parser.add_argument(
        "--dtype",
        choices=list(extrapolate.WRITABLE),
        help="of the weights that are written (default: as in ALIGNED)",
    )
    parser.add_argument(
        "--modules",
        type=_module_alpha,
        nargs="+",
        action="extend",
        default=[],
        metavar="PATTERN=ALPHA",
        help="tensors with an α of their own: a pattern of names such as '*.mlp.*', or re: and a "
        "regular expression; the first that fits counts",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="say what would be done, and check what can be"
    )


def _extrapolate(options: argparse.Namespace) -> None:
    """Write the models; print their folders."""
    sft = hub.locate(options.sft)
    aligned = hub.locate(options.aligned)
    outputs = {alpha: options.out for alpha in options.alpha}
    if len(outputs) > 1:
        for alpha in outputs:
            outputs[alpha] = options.out / f"alpha={str(alpha).removesuffix('.0')}"
    settings = {"modules": dict(options.modules), "dtype": options.dtype}
    plan = extrapolate.plan(sft.folder, aligned.folder, outputs, **settings)
    text = (
        f"reads {_size(plan.read)} and writes {_size(plan.written)} of {_size(plan.free)} that are "
        f"free, in about {events.duration(max(1, plan.seconds))} by a sample"
    )
    if options.dry_run:
        events.show(text)
    else:
        events.say(text)
        names = {"sft": sft.name, "aligned": aligned.name}
        extrapolate.extrapolate(sft.folder, aligned.folder, outputs, names=names, **settings)
    events.show("\n".join(map(str, outputs.values())))


EXTRAPOLATE = Command(
    "extrapolate",
    "write θ₁ + α(θ₁ − θ₀), for any number of α in one read of both models",
    """  expo extrapolate SFT ALIGNED OUT --alpha 0.3
  expo extrapolate SFT ALIGNED OUT --alpha 0.1 0.3 0.5 --dtype float32
  expo extrapolate SFT ALIGNED OUT --alpha 0.3 --modules '*embed_tokens*=0' '*.mlp.*=0.1'
  expo extrapolate org/sft@main org/aligned@main OUT --alpha 0.3 --dry-run""",
    _add_extrapolate,
    _extrapolate,
)


# ---- expo diff


def _add_diff(parser: argparse.ArgumentParser) -> None:
    add_models(parser)
    parser.add_argument("--tensors", action="store_true", help="each tensor, not all layers in one")


def _diff(options: argparse.Namespace) -> None:
    """Print how far the modules moved; raise CommandError if extrapolate would refuse the two."""
    sft = hub.locate(options.sft).folder
    aligned = hub.locate(options.aligned).folder
    differences = list(extrapolate.differences(sft, aligned))
    if differences:
        events.show("\n".join(differences[:SHOWN]))
        if len(differences) > SHOWN:
            events.show(f"… and {len(differences) - SHOWN} more")
        count = f"{len(differences)} difference{'s' if len(differences) > 1 else ''}"
        raise CommandError(f"extrapolate refuses these two: {count}")
    from beyond_dpo import change  # which needs torch

    with events.slow("reading both models"):
        rows, _ = change.movement(sft, {str(aligned): aligned})
    events.show("\n".join([*_norms(rows, options.tensors), *_remarks(sft, aligned)]))
    broken = [row["tensor"] for row in rows if not math.isfinite(row["change"])]
    if broken:
        raise CommandError(f"{broken[0]} holds NaN or infinity: extrapolate refuses it")


def _norms(rows: list[dict], each: bool) -> Iterator[str]:
    """Yield the lines of the table of norms; without `each` the layers of a module are one line."""
    groups: dict[str, list[dict]] = {}
    for row in rows:
        name = row["tensor"]
        if not each:
            name = re.sub(r"\.\d+(?=\.)", ".*", name)  # the number of the layer
        groups.setdefault(name, []).append(row)
    width = max(map(len, groups))
    headings = ["module".ljust(width), "tensors".rjust(8)]
    headings += [text.rjust(10) for text in ("‖θ₀‖", "‖θ₁ − θ₀‖", "share")]
    yield " ".join(headings)
    for name, members in [*groups.items(), ("all", rows)]:
        yield " ".join([name.ljust(width), *_norm_cells(members)])


def _norm_cells(rows: list[dict]) -> list[str]:
    """Return the cells of a line of the table of norms: how many tensors, norms, share moved."""
    weight = math.hypot(*[row["weight"] for row in rows])
    moved = math.hypot(*[row["change"] for row in rows])
    share = f"{moved / weight:.3%}" if weight else "–"
    norms = [f"{norm:.4g}" for norm in (weight, moved)]
    return [str(len(rows)).rjust(8), *[cell.rjust(10) for cell in (*norms, share)]]


def _remarks(sft: Path, aligned: Path) -> Iterator[str]:
    """Yield what else extrapolate does with these tensors."""
    pairs = extrapolate.check(sft, aligned)
    alphas = extrapolate.module_alphas(pairs, [1.0], {})
    copied = [name for name, alpha in alphas.items() if alpha == [0.0]]
    if copied:
        yield f"copied from ALIGNED, whatever α: {len(copied)} tensors, such as {copied[0]}"
    if extrapolate.ties_embeddings(aligned):
        ends = extrapolate.HEADS + extrapolate.EMBEDDINGS
        stored = [pair.aligned.name for pair in pairs if pair.aligned.name.endswith(ends)]
        yield f"tied, so with one α: output head and embeddings, stored as {' and '.join(stored)}"


DIFF = Command(
    "diff",
    "show how far each module moved, what is tied, and what extrapolate would refuse",
    """  expo diff SFT ALIGNED
  expo diff SFT ALIGNED --tensors

A name in the table is also a pattern for `expo extrapolate --modules`.
Ends with 1 where extrapolate would refuse the two models.""",
    _add_diff,
    _diff,
)


# ---- expo card


def _add_card(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", type=Path, metavar="OUT", help="what `expo extrapolate` wrote")
    parser.add_argument("--sft", metavar="NAME", help="what the card calls θ₀, such as a hub id")
    parser.add_argument("--aligned", metavar="NAME", help="what the card calls θ₁")
    parser.add_argument(
        "--push", metavar="REPO", help="also upload OUT to this repository on the hub (org/name)"
    )


def _card(options: argparse.Namespace) -> None:
    """Write the card of a model; print its file, and the address if it is uploaded."""
    out = options.out
    facts = extrapolate.load_json(out / "expo.json")
    if not facts:
        raise CommandError(f"no expo.json in {out}: name one folder that `expo extrapolate` wrote")
    names = {}
    for role in ("sft", "aligned"):
        names[role] = getattr(options, role) or facts.get(role) or f"the {role} model"
    _set_aside(out)
    write_file(out / CARD, _card_text(out, facts, names))
    events.show(str(out / CARD))
    if options.push:
        events.show(_push(out, options.push))


def _set_aside(out: Path) -> None:
    """Rename a card that is not ours: it describes the aligned model it was copied from."""
    card = out / CARD
    if card.is_file() and MARK not in card.read_text(encoding="utf-8", errors="replace"):
        card.rename(out / OTHER_CARD)


def _card_text(out: Path, facts: dict, names: dict[str, str]) -> str:
    """Return a model card: how the model was made, from what, and the hashes of both."""
    alpha = facts["alpha"]
    lines = [
        _front_matter(out, names),
        MARK,
        f"# {out.resolve().name}",
        "",
        f"The weights are θ₁ + α(θ₁ − θ₀) with α = {alpha:g}: model extrapolation (ExPO, Eq. 6 of "
        "[arXiv 2404.16792](https://arxiv.org/abs/2404.16792)). Nothing was trained.",
        "",
        "| | model | hash of its weights (xxh3_128) |",
        "|---|---|---|",
        f"| θ₀, SFT | {names['sft']} | `{facts['sft_xxh3']}` |",
        f"| θ₁, aligned | {names['aligned']} | `{facts['aligned_xxh3']}` |",
        "",
    ]
    for pattern, module_alpha in facts["modules"].items():
        lines.append(f"- tensors `{pattern}`: α = {module_alpha:g}")
    if "dtype" in facts:
        lines.append(f"- written in {facts['dtype']}")
    lines += [
        f"- made with beyond-dpo {beyond_dpo.__version__}",
        "- nothing is measured here: too large an α repeats itself and forgets to end",
        "",
        "| file | sha256 |",
        "|---|---|",
    ]
    for file in sorted(out.glob("*.safetensors")):
        with open(file, "rb") as opened:
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
        lines.append(f"| {file.name} | `{digest}` |")
    if (out / OTHER_CARD).is_file():
        lines += ["", f"The aligned model's own card is [{OTHER_CARD}]({OTHER_CARD})."]
    return "\n".join(lines) + "\n"


def _front_matter(out: Path, names: dict[str, str]) -> str:
    """Return the YAML that the hub reads; the licence is the one of the aligned model's card."""
    from huggingface_hub import ModelCard, ModelCardData

    repositories = []
    for name in names.values():
        match = hub.ID.fullmatch(name)
        if match:
            repositories.append(match[1])
    licence = None
    if (out / OTHER_CARD).is_file():
        licence = ModelCard.load(out / OTHER_CARD, ignore_metadata_errors=True).data.license
    data = ModelCardData(
        base_model=repositories or None,
        library_name="transformers",
        license=licence,
        tags=["merge", "expo", "model-extrapolation"],
    )
    return f"---\n{data.to_yaml()}\n---\n"


def _push(out: Path, repository: str) -> str:
    """Upload a folder to the hub; return its address."""
    import huggingface_hub

    try:
        api = huggingface_hub.HfApi()
        address = api.create_repo(repository, exist_ok=True)
        api.upload_folder(
            repo_id=repository, folder_path=out, commit_message="Extrapolated by expo (beyond-dpo)"
        )
    except Exception as error:  # the hub's client has many, none of which says what to do
        reason = hub.first_line(error)
        raise CommandError(
            f"{repository} cannot be written on the hub ({reason}); `hf auth login` gives a token"
        ) from error
    return str(address)


CARD_COMMAND = Command(
    "card",
    "write the model card of an extrapolated model: α, both inputs, hashes",
    """  expo card OUT
  expo card OUT --sft org/sft --aligned org/aligned
  expo card OUT --push org/name

Nothing is uploaded without --push.""",
    _add_card,
    _card,
)

COMMANDS = (EXTRAPOLATE, DIFF, CARD_COMMAND)
