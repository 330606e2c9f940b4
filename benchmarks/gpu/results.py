"""What the steps share: a results file that is always whole, and commands that are timed."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

from beyond_dpo.files import write_file


class Results:
    """The JSON file of a step, written anew after each measurement.

    A step that is killed loses nothing that it has measured. `summarise` makes the lines of the
    table at the end.
    """

    def __init__(self, path: Path, settings: dict, summarise: Callable[[dict], list[str]]):
        self.path = path
        self.summarise = summarise
        self.content = {"settings": settings, "measured": [], "notes": []}
        self.write()

    def add(self, row: dict) -> None:
        """Keep a measurement."""
        print(json.dumps(row), flush=True)
        self.content["measured"].append(row)
        self.write()

    def note(self, text: str) -> None:
        """Keep what was left out or failed."""
        print(text, flush=True)
        self.content["notes"].append(text)
        self.write()

    def write(self) -> None:
        self.content["summary"] = self.summarise(self.content) + self.content["notes"]
        write_file(self.path, json.dumps(self.content, indent=1) + "\n")


class Clock:
    """The time that a step has."""

    def __init__(self, seconds: float):
        self.end = time.monotonic() + seconds

    def left(self) -> float:
        """Return the seconds that are left."""
        return self.end - time.monotonic()


def step_arguments(description: str) -> argparse.ArgumentParser:
    """Return the parser of the options that every step takes."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--work", type=Path, required=True, help="folder for what is not kept")
    parser.add_argument("--seconds", type=float, required=True, help="how long the step may take")
    parser.add_argument("--tiny", action="store_true", help="a rehearsal: numbers mean nothing")
    parser.add_argument("--rounds", type=int, default=2)
    return parser
