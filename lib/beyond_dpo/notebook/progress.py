"""Show one line about a run: which notebook, which result, how far, and how long it all takes.

What this process reports (see beyond_dpo.events) is heard: start, wait, hit and done of an
artifact, and how far the work of the one that runs has come.
"""

import contextlib
import shutil
import sys
import time
from dataclasses import dataclass

from beyond_dpo import events
from beyond_dpo.pipeline import artifacts

EVERY_SECONDS = {True: 0.5, False: 10.0}  # between two lines, on a terminal and in a log file


class Timetable:
    """How long the missing results of a run still take, by what the like of them has taken."""

    def __init__(self, missing: dict[str, artifacts.Artifact]):
        # those that are computed in a child process; the others take seconds
        self._missing = {key: made for key, made in missing.items() if made.does}
        self._measured: dict[str, list[float]] = {}  # seconds of what this run has made

    def finished(self, key: str, seconds: float | None) -> None:
        """Take in that a result is there; seconds: that it took, None where it was found."""
        artifact = self._missing.pop(key, None)
        if artifact is not None and seconds is not None:
            self._measured.setdefault(_kind(artifact), []).append(seconds)

    def left(self) -> tuple[float, int]:
        """Return the seconds that are left, and the number of results whose time nobody knows."""
        seconds, unknown = 0.0, 0
        for artifact in list(self._missing.values()):
            expected = self._expected(artifact)
            if expected is None:
                unknown += 1
            else:
                seconds += expected
        return seconds, unknown

    def _expected(self, artifact: artifacts.Artifact) -> float | None:
        kind = _kind(artifact)
        if kind not in self._measured:  # of an earlier run, or none
            earlier = artifacts.seconds_of_like(artifact)
            self._measured[kind] = [] if earlier is None else [earlier]
        like = self._measured[kind]
        return sum(like) / len(like) if like else None


def _kind(artifact: artifacts.Artifact) -> str:
    """Return what two results share that take about as long: stage and settings."""
    return artifacts.digest([artifact.stage, artifacts.settings(artifact)])


@dataclass
class Working:
    """What is being done: since when (seconds, monotonic), in words, how far (0 to 1, or None)."""

    since: float
    what: str = ""
    fraction: float | None = None
    seconds_left: float | None = None


class Progress:
    """Hear what this process reports, and show it as one line on stderr.

    computed, found: keys of artifacts, and peak: most memory (RSS, bytes) that this process and
    those below it held together, all since the last begin().
    """

    def __init__(self, timetable: Timetable):
        self._timetable = timetable
        self._planned = len(timetable._missing)
        self._shown_at, self._shown = 0.0, ""
        self.begin("")

    def begin(self, title: str) -> None:
        """Go on to another notebook, of this title: `[2/3] 11_expo_headline`."""
        self.title, self.cell = title, ""
        self.peak = 0
        self.computed: set[str] = set()
        self.found: set[str] = set()
        self._running: dict[str, Working] = {}

    def hear(self, **report) -> None:
        """Take in one report, and show the line anew if it is time to."""
        self._take(**report)
        self.show()

    def executes(self, cell: str) -> None:
        """Show which cell of the notebook is executed."""
        self.cell = cell
        self.show()

    def show(self) -> None:
        """Show the line, unless one was shown just before."""
        now = time.monotonic()
        terminal = sys.stderr.isatty()
        if now - self._shown_at < EVERY_SECONDS[terminal]:
            return
        self._shown_at = now
        self._measure_memory()
        line = self.line()
        if terminal:
            columns = shutil.get_terminal_size().columns - 1
            events.say(f"\r{line[:columns]}\x1b[K", end="")
        elif line != self._shown:
            events.say(line)
        self._shown = line

    def clear(self) -> None:
        """Take the line from the terminal."""
        if sys.stderr.isatty():
            events.say("\r\x1b[K", end="")

    def line(self) -> str:
        """Return what is going on.

        As `[2/3] 11_expo_headline · train-ab12cd · SFT · 43 % · 2 min left · all: about 38 min`.
        """
        parts = [self.title, self.cell]
        if self._running:
            key, work = list(self._running.items())[-1]
            parts += _described(key, work)
        if not self.cell:
            parts.append(self._whole())
        return " · ".join(part for part in parts if part)

    def _whole(self) -> str:
        """Return how long everything that is planned still takes, as far as it is known."""
        seconds, unknown = self._timetable.left()
        known = f"about {events.duration(seconds)}" if seconds else ""
        open_ends = f"{unknown} results of unknown time" if unknown else ""
        whole = " and ".join(filter(None, [known, open_ends]))
        return f"all: {whole}" if whole else ""

    def _take(self, event: str, stage: str = "", key: str = "", **more) -> None:
        if event == "alive":  # a child is waited for
            return
        key = key or next(reversed(self._running), stage or "working")
        work = self._running.pop(key, None) or Working(time.monotonic())
        if event == "done":
            self.computed.add(key)
            self._timetable.finished(key, more.get("seconds"))
        elif event == "hit":
            self.found.add(key)
            self._timetable.finished(key, None)
        elif more.get("fraction") != 1 or key != stage:  # a job outside of any artifact ends at 1
            self._running[key] = Working(work.since, stage, more.get("fraction"), more.get("eta"))

    def _measure_memory(self) -> None:
        import psutil

        memory = 0
        with contextlib.suppress(psutil.Error):
            own = psutil.Process()
            for process in [own, *own.children(recursive=True)]:
                with contextlib.suppress(psutil.Error):
                    memory += process.memory_info().rss
        self.peak = max(self.peak, memory)


def _described(key: str, work: Working) -> list[str]:
    """Return the parts of a line about one result: its key, the work, how far, how long."""
    short = key[:-10] if key[-17:-16] == "-" else key  # six digits of the hash are enough
    parts = [short]
    if not key.startswith(work.what):
        parts.append(work.what)
    if work.fraction is not None:
        parts.append(f"{100 * work.fraction:.0f} %")
    if work.seconds_left is None:
        parts.append(f"for {events.duration(time.monotonic() - work.since)}")
    else:
        parts.append(f"{events.duration(work.seconds_left)} left")
    return parts
