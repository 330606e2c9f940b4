"""The `expo` command: what `cli` has, and the search for α, which needs an engine."""

from __future__ import annotations

import argparse
import csv
import importlib.util
import io
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from beyond_dpo import cli, events, extrapolate, hub, rewards, templates
from beyond_dpo.files import write_file
from beyond_dpo.machine import launch

if TYPE_CHECKING:
    from beyond_dpo.jobs.settings import Decoding
    from beyond_dpo.search import Search

COLUMNS = ("alpha", "reward", "gain", "gain_se", "words", "repeated")
# A text repeats itself if this much more of its trigrams does than at α = 0: the gate of the
# project's own experiments.
MORE_REPEATED = 0.05
READ = (".safetensors", ".json", ".jinja", ".txt", ".model")  # files that a model's result needs


def main(argv: Sequence[str] | None = None) -> int:
    """Run `expo`; return its exit code, see cli.main()."""
    return cli.main(argv, [cli.EXTRAPOLATE, SEARCH, cli.DIFF, cli.CARD_COMMAND])


def _add_search(parser: argparse.ArgumentParser) -> None:
    cli.add_models(parser)
    _add_judged(parser)
    _add_effort(parser)
    _add_sampling(parser)
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("expo-search"),
        metavar="FOLDER",
        help="of what is evaluated; the same command goes on from there (default expo-search)",
    )


def _add_judged(parser: argparse.ArgumentParser) -> None:
    """Add what is answered, and by what the answers are judged."""
    parser.add_argument(
        "--prompts",
        type=Path,
        required=True,
        metavar="F",
        help='what is answered: .jsonl of texts, turns or {"prompt": either}; else a text a line',
    )
    parser.add_argument(
        "--reward",
        required=True,
        metavar="MODEL",
        help="a sequence-classification model: a folder or a hub id. It reads chat turns if it has "
        "a chat template, else prompt and response as one text",
    )
    parser.add_argument(
        "--reward-label",
        type=int,
        metavar="N",
        help="which of its labels counts, from 0",
    )


def _add_effort(parser: argparse.ArgumentParser) -> None:
    """Add where is searched, and with how much."""
    parser.add_argument(
        "--bracket",
        type=cli.finite,
        nargs=2,
        default=(0.0, 2.0),
        metavar=("LOW", "HIGH"),
        help="smallest and largest α (default 0 2)",
    )
    add = parser.add_argument
    add("--evaluations", type=int, default=8, metavar="N", help="how many α at most (default 8)")
    add("--samples", type=int, default=1, metavar="N", help="responses to a prompt (default 1)")
    add("--max-tokens", type=int, default=512, metavar="N", help="of a response (default 512)")
    add(
        "--max-model-len",
        type=int,
        default=2048,
        metavar="N",
        help="tokens of prompt and response (default 2048)",
    )


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    """Add how responses are sampled."""
    add = parser.add_argument
    add("--seed", type=int, default=0, metavar="N", help="of sampling (default 0)")
    add(
        "--template",
        choices=("chat", "plain"),
        help="how prompts are put (default: chat if ALIGNED has a chat template)",
    )
    add(
        "--backend",
        choices=("transformers", "vllm"),
        default="transformers",
        help="what samples (default transformers)",
    )
    add(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of sampling (default bfloat16 on a GPU, else float32)",
    )


def _search(options: argparse.Namespace) -> None:
    """Search the best α; show and keep what is evaluated."""
    from beyond_dpo.jobs.search_alpha import search_alpha

    sft = hub.locate(options.sft).folder
    aligned = hub.locate(options.aligned).folder
    reward_model = hub.locate(options.reward).folder
    extrapolate.check(sft, aligned)
    decoding = _decoding(options)
    tokenizer = templates.load_tokenizer(str(aligned))
    prompts = read_prompts(options.prompts, options.template, tokenizer)
    made_from = {
        "sft": _folder_digest(sft),
        "aligned": _folder_digest(aligned),
        "reward": _folder_digest(reward_model),
        "prompts": prompts,
    }
    for name in ("reward_label", "samples", "seed"):
        made_from[name] = getattr(options, name)
    table = Table(options.out, made_from | decoding.recipe())
    try:
        result = search_alpha(
            sft,
            aligned,
            prompts,
            _reward(reward_model, options.reward_label),
            bracket=tuple(options.bracket),
            evaluations=options.evaluations,
            decoding=decoding,
            samples=options.samples,
            seed=options.seed,
            known=table.rewards(),
            on_evaluated=table.add,
        )
    except launch.JobFailed as error:
        *_, last_line = str(error).strip().splitlines()
        raise cli.CommandError(f"the engine ended: {last_line}") from error
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"{table.file} keeps {len(table.points)} α, the same command goes on from there"
        ) from None
    _tell(result, table, options)


def _decoding(options: argparse.Namespace) -> Decoding:
    """Return how responses are sampled; raise CommandError for a back-end that is not installed."""
    import torch

    from beyond_dpo.jobs.settings import Decoding

    if importlib.util.find_spec(options.backend) is None:
        raise cli.CommandError(
            f"--backend {options.backend} is not installed: pip install it, or leave it out"
        )
    dtype = options.dtype
    if dtype is None:
        dtype = "bfloat16" if torch.cuda.is_available() else "float32"
    return Decoding(
        backend=options.backend,
        max_tokens=options.max_tokens,
        max_model_len=options.max_model_len,
        dtype=dtype,
    )


def read_prompts(file: Path, template: str | None, tokenizer) -> list:
    """Return the prompts of a file as search_alpha() takes them: texts, or turns for a chat model.

    Raises ValueError, which names the line, for what is neither.
    """
    if template is None:
        template = "chat" if tokenizer.chat_template else "plain"
    prompts = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        prompt = line
        if file.suffix == ".jsonl":
            prompt = _prompt_of(line, f"{file}, line {number}")
        if template == "plain" and not isinstance(prompt, str):
            raise ValueError(f"{file}, line {number}: turns need --template chat")
        if template == "chat" and isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        prompts.append(prompt)
    return prompts


def _prompt_of(line: str, where: str) -> str | list[dict]:
    """Return the prompt of a line of JSON."""
    try:
        content = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where} is not JSON ({error})") from error
    prompt = content.get("prompt") if isinstance(content, dict) else content
    turns = isinstance(prompt, list) and prompt
    if turns and all(isinstance(turn, dict) and {"role", "content"} <= set(turn) for turn in turns):
        return prompt
    if isinstance(prompt, str):
        return prompt
    raise ValueError(f'{where} is no text, no turns of role and content, no {{"prompt": either}}')


def _reward(folder: Path, label: int | None) -> Callable[[list, list[str]], np.ndarray]:
    """Return a function from prompts and responses to rewards."""
    model = rewards.load("classifier", folder=str(folder.resolve()), label=label)

    def reward(prompts: list, responses: list[str]) -> np.ndarray:
        """Score the responses, as turns if the model reads those."""
        texts = []
        for prompt, response in zip(prompts, responses, strict=True):
            if model.tokenizer.chat_template:
                texts.append(rewards.chat(prompt, response))
            elif isinstance(prompt, str):
                texts.append(prompt + response)
            else:
                contents = [turn["content"] for turn in prompt]
                texts.append("\n".join([*contents, response]))
        return model.score(texts)

    return reward


def _folder_digest(folder: Path) -> str:
    """Return a digest of all files of a model that can change a result."""
    from xxhash import xxh3_128

    digest = xxh3_128()
    with events.slow(f"reading {folder}"):
        for file in sorted(folder.iterdir()):
            if file.suffix in READ:
                digest.update(f"{file.name} {file.stat().st_size}\n".encode())
                with open(file, "rb") as opened:
                    while block := opened.read(1 << 22):
                        digest.update(block)
    return digest.hexdigest()


class Table:
    """What a search has evaluated: shown, and kept in a folder from one run to the next.

    search.json holds the rewards and responses of each α, and what they were made from; search.csv
    the table of their means. Raises ValueError for a folder of another search.
    """

    def __init__(self, folder: Path, made_from: dict):
        self.file = folder / "search.json"
        self.csv_file = folder / "search.csv"
        self.made_from = made_from
        self.points: dict[float, dict] = {}  # {α: {"rewards", "responses"}}
        kept = extrapolate.load_json(self.file)
        if not kept:
            return
        others = [name for name in made_from if kept["made_from"].get(name) != made_from[name]]
        if others:
            raise ValueError(
                f"{self.file} is of a search with other {', '.join(others)}: give another --out"
            )
        for point in kept["points"]:
            self._show(point["alpha"], point)

    def rewards(self) -> dict[float, list[float]]:
        """Return {α: a reward per prompt}."""
        return {alpha: point["rewards"] for alpha, point in self.points.items()}

    def add(self, alpha: float, scores: np.ndarray, responses: list[str]) -> None:
        """Show and keep what one more α gave."""
        self._show(alpha, {"alpha": alpha, "rewards": scores.tolist(), "responses": responses})
        content = {"made_from": self.made_from, "points": list(self.points.values())}
        write_file(self.file, json.dumps(content, indent=1) + "\n")
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.row(alpha) for alpha in self.points)
        write_file(self.csv_file, text.getvalue())

    def row(self, alpha: float) -> dict[str, float]:
        """Return a line of the table.

        reward: the mean. gain: above that of the first α, with the standard error over prompts.
        words: of a response. repeated: the share of a response's trigrams of words that repeat.
        """
        point = self.points[alpha]
        first = next(iter(self.points.values()))
        gains = np.subtract(point["rewards"], first["rewards"])
        error = gains.std(ddof=1) / math.sqrt(len(gains)) if len(gains) > 1 else math.nan
        words = [response.split() for response in point["responses"]]
        return {
            "alpha": alpha,
            "reward": float(np.mean(point["rewards"])),
            "gain": float(gains.mean()),
            "gain_se": float(error),
            "words": float(np.mean([len(response) for response in words])),
            "repeated": float(np.mean([rewards.repetition(response) for response in words])),
        }

    def _show(self, alpha: float, point: dict) -> None:
        """Take in what one α gave, and print its line."""
        if not self.points:
            events.show(" ".join(f"{name:>9}" for name in COLUMNS))
        self.points[alpha] = point
        events.show(" ".join(f"{value:>9.4g}" for value in self.row(alpha).values()))


def _tell(result: Search, table: Table, options: argparse.Namespace) -> None:
    """Print the best α and what to do with it, and what speaks against it."""
    best = table.row(result.alpha)
    repeated_before = table.row(0.0)["repeated"]
    if best["repeated"] > repeated_before + MORE_REPEATED:
        events.show(
            f"careful: at α = {result.alpha:g} {best['repeated']:.0%} of the trigrams repeat, at "
            f"α = 0 {repeated_before:.0%}; read the responses in {table.file} before you believe it"
        )
    if result.alpha == max(result.rewards):
        events.show(
            "the largest α that was tried is the best: raise --bracket, what is known is kept"
        )
    chosen = f"95 % of redrawn prompts choose {result.low:g} to {result.high:g}"
    if result.alpha == 0:
        events.show(f"best α = 0, the aligned model itself ({chosen})")
        return
    events.show(f"best α = {result.alpha:g} ({chosen}); write it with")
    events.show(f"  expo extrapolate {options.sft} {options.aligned} OUT --alpha {result.alpha:g}")


SEARCH = cli.Command(
    "search",
    "find the best α with a reward model, in few evaluations, on your prompts",
    """  expo search SFT ALIGNED --prompts prompts.txt --reward org/reward-model
  expo search SFT ALIGNED --prompts prompts.jsonl --reward MODEL --bracket 0 4 --evaluations 10
  expo search SFT ALIGNED --prompts F --reward MODEL --backend vllm --out my-search

Rewards are means over the same prompts and noise at every α; the search is golden section.
An interrupted search goes on, and one more with a larger --evaluations or another --bracket
evaluates only what is new. The table is OUT/search.csv, with responses OUT/search.json.""",
    _add_search,
    _search,
)


if __name__ == "__main__":
    sys.exit(main())
