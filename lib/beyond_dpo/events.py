"""What a process tells its parent, the batch runner and whoever watches: how far it is, and lines that end no work.

Reports to the batch runner are JSON lines in the file that BEYOND_DPO_PROGRESS names: {event, stage, key} for start,
wait, hit and done of an artifact, and {event, stage, fraction, eta} (fraction in [0, 1], eta in seconds) for progress
of the one that runs.
"""

import json
import os
import re
import sys
from contextlib import suppress
from pathlib import Path

# what would move the cursor, or name the window, of a terminal that shows a log
UNPRINTABLE = re.compile(r"\x1b(\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b\n]*(\x07|\x1b\\)?)?|[^\t\n\x20-\x7e\xa0-\U0010ffff]")


def progress(done: int, total: int) -> None:
    """Tell the parent how far this child is (any process may call it; without a parent it does nothing).

    A file that cannot be written is no reason to end the work.
    """
    path = os.environ.get("BEYOND_DPO_CHILD_PROGRESS")
    if path and os.environ.get("RANK", "0") == "0":
        with suppress(OSError):
            Path(path).write_text(f"{done} {total}\n", encoding="utf-8")


def announce(stage: str, done: int, total: int, seconds: float) -> None:
    """Tell the batch runner how far a stage is, and by that how long it still takes."""
    eta = seconds * (total - done) / done if done else None
    tell(event="progress", stage=stage, fraction=done / total, eta=eta, seconds=seconds)


def tell(**report) -> None:
    """Send the batch runner a report, if one listens (see `progress`); if it cannot be written, it is lost."""
    if runner := os.environ.get("BEYOND_DPO_PROGRESS"):
        with suppress(OSError), open(runner, "a", encoding="utf-8") as f:
            f.write(json.dumps(report) + "\n")


def interactive() -> bool:
    """Say whether somebody sits in front of this kernel; not where the batch runner or a checker started it."""
    quiet = os.environ.get("TQDM_DISABLE") or "BEYOND_DPO_PROGRESS" in os.environ
    return "ipykernel.zmqshell" in sys.modules and not quiet


def printable() -> None:
    """Let this process print what its terminal's encoding lacks (α in a C locale) as \\u03b1, and not fail."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def say(text: str, end: str = "\n") -> None:
    """Write to stderr; a full disk or a closed pipe behind it ends no work."""
    try:
        print(text, end=end, file=sys.stderr, flush=True)
    except OSError:  # its buffer keeps what could not be written, and would fail again when the process ends
        sys.stderr = open(2, "w", encoding="utf-8", errors="replace", closefd=False)


def duration(seconds: float) -> str:
    """Return `45 s`, `2 min 10 s` or `3 h 12 min`."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
