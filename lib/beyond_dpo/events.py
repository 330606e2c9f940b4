"""What a process tells its parent, its own listeners and whoever watches: how far it is.

None of these ways ends any work. Reports within a process are {event, stage, key} for start, wait,
hit and done of an artifact (done also `seconds`), {event, stage, fraction, eta} (fraction in
[0, 1], eta in seconds) for the progress of the one that runs, and {event: alive} while a child is
waited for.
"""

import os
import re
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

SLOW = 2.0  # seconds, after which work says what it is doing

# what would move the cursor, or name the window, of a terminal that shows a log
UNPRINTABLE = re.compile(
    r"\x1b(\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b\n]*(\x07|\x1b\\)?)?|[^\t\n\x20-\x7e\xa0-\U0010ffff]"
)


_listeners: list[Callable] = []  # those inside a `with listening(...)` of this process


def progress(done: int, total: int) -> None:
    """Tell the parent how far this child is.

    Any process may call it; without a parent it does nothing. A file that cannot be written is no
    reason to end the work.
    """
    path = os.environ.get("BEYOND_DPO_CHILD_PROGRESS")
    if path and os.environ.get("RANK", "0") == "0":
        with suppress(OSError):
            Path(path).write_text(f"{done} {total}\n", encoding="utf-8")


def announce(stage: str, done: int, total: int, seconds: float) -> None:
    """Report how far a stage is, and by that how long it still takes."""
    eta = seconds * (total - done) / done if done else None
    tell(event="progress", stage=stage, fraction=done / total, eta=eta)


def tell(**report) -> None:
    """Report to whoever listens in this process."""
    for listener in _listeners:
        with suppress(Exception):  # no work ends because nobody can see how far it is
            listener(**report)


@contextmanager
def listening(listener: Callable) -> Iterator[None]:
    """Inside, pass every report of this process to `listener`, as keyword arguments."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


def quiet() -> bool:
    """Say whether this process keeps its stderr clean: a runner shows how far it is."""
    return bool(os.environ.get("TQDM_DISABLE")) or bool(_listeners)


def note(text: str) -> None:
    """Say what is being done: on stderr, or where that is kept clean to whoever listens."""
    if quiet():
        tell(event="progress", stage=text)
        return
    # a bar may stand in the line, which comes again below
    start_of_line = "\r\x1b[K" if sys.stderr.isatty() else ""
    say(start_of_line + text)


@contextmanager
def slow(text: str) -> Iterator[None]:
    """Say what is being done, if it takes longer than SLOW seconds."""
    timer = threading.Timer(SLOW, note, [text])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


class Bar(AbstractContextManager):
    """Show how far some work is: a widget in a notebook, else a line on stderr.

    Nothing is shown where TQDM_DISABLE is set. off_terminal: whether the line is also written where
    stderr is no terminal. options: of tqdm.
    No error of the bar ends the work (a full disk behind stderr, a notebook that was closed): it is
    shown no more.
    """

    def __init__(self, total: int, desc: str = "", *, off_terminal: bool = True, **options):
        self.done = 0
        self._shown = None
        # the widget does not look at it, and the text only when it is imported
        if os.environ.get("TQDM_DISABLE"):
            return
        if off_terminal or "ipykernel.zmqshell" in sys.modules or sys.stderr.isatty():
            with self._harmless():
                options = {"leave": False} | options
                self._shown = _tqdm()(total=total, desc=desc, disable=False, **options)

    @property
    def shown(self) -> bool:
        """Say whether anybody can see it."""
        return self._shown is not None

    def update(self, steps: int) -> None:
        """Move on by so many steps."""
        self.done += steps
        if self._shown is not None:
            with self._harmless():
                self._shown.update(steps)

    def close(self) -> None:
        """Take the bar away."""
        if self._shown is not None:
            with self._harmless():
                self._shown.close()

    def __exit__(self, *_):
        self.close()

    @contextmanager
    def _harmless(self) -> Iterator[None]:
        try:
            yield
        except Exception:  # stderr, a widget and its kernel have errors of their own each
            if self._shown is not None:
                self._shown.disable = True  # else it would try once more when it is deleted
            self._shown = None
            say("", end="")  # what could not be written goes


def _tqdm():
    """Return the kind of bar that fits: a widget in a notebook, else text."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a notebook without ipywidgets has the text
        from tqdm.auto import tqdm
    return tqdm


def printable() -> None:
    """Let this process print what its terminal's encoding lacks (α in a C locale) as \\u03b1."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def say(text: str, end: str = "\n") -> None:
    """Write to stderr; a full disk or a closed pipe behind it ends no work."""
    try:
        print(text, end=end, file=sys.stderr, flush=True)
    except OSError:
        # its buffer keeps what could not be written, and would fail again when the process ends
        sys.stderr = open(2, "w", encoding="utf-8", errors="replace", closefd=False)


def show(text: str) -> bool:
    """Write to stdout; return whether that took it.

    If not (a full disk, a closed pipe), say so on stderr.
    """
    try:
        print(text, flush=True)
    except OSError as error:  # as in say()
        sys.stdout = open(1, "w", encoding="utf-8", errors="replace", closefd=False)
        say(f"the output cannot be written: {error.strerror}")
        return False
    return True


def duration(seconds: float) -> str:
    """Return `45 s`, `2 min 10 s` or `3 h 12 min`."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    if minutes:
        return f"{minutes} min {rest} s"
    return f"{rest} s"
