"""Progress of a harvest, all processes together: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 15.0
SECONDS_BETWEEN_LOOKS = 2.0


class HarvestProgress:
    """Counts kept tokens: those of the buckets that anyone committed, and of those in work here.

    Args:
        total: kept tokens of the whole dataset.
        committed: returns those of the buckets that are committed; asked every two seconds at most.
        silent: show nothing.
    """

    def __init__(self, total: int, committed: Callable[[], int], *, silent: bool = False) -> None:
        self.total = total
        self.committed = committed
        self.silent = silent
        self.before = self._stored = committed()
        self._own = 0
        self.start = self._last_look = self._last_line = time.monotonic()
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> HarvestProgress:
        console = Console(stderr=True)
        if console.is_terminal and not self.silent:
            self._bar = Progress(
                TextColumn("harvest"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("tokens, {task.fields[rate]}"),
                TimeRemainingColumn(compact=True),
                TextColumn("left"),
                console=console,
            )
            self._bar.start()
            self._task = self._bar.add_task("harvest", total=self.total, completed=self.done, rate="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    @property
    def done(self) -> int:
        """Tokens done, of the whole dataset."""
        return min(self._stored + self._own, self.total)

    @property
    def rate(self) -> float:
        """Tokens per second since the start of this process, by all of them."""
        return (self.done - self.before) / max(time.monotonic() - self.start, 1e-9)

    def add(self, tokens: int) -> None:
        """Count `tokens` more of a bucket in work here."""
        self._own += tokens
        self.show()

    def bucket_done(self, tokens: int) -> None:
        """A bucket of this process with so many of the tokens that were counted is committed."""
        self._own = max(0, self._own - tokens)
        self._look()
        self.show()

    def say(self, line: str) -> None:
        """Print a line, above the bar if there is one."""
        if self._bar is not None:
            self._bar.console.print(f"harvest: {line}", highlight=False, soft_wrap=True)
        else:
            print(f"harvest: {line}", file=sys.stderr, flush=True)

    def show(self) -> None:
        """Bring what is shown up to date."""
        now = time.monotonic()
        if now - self._last_look >= SECONDS_BETWEEN_LOOKS:
            self._look()
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=self.done, rate=f"{self.rate:,.0f}/s")
        elif now - self._last_line >= SECONDS_BETWEEN_LINES and not self.silent:
            self._last_line = now
            left = (self.total - self.done) / self.rate if self.rate else float("inf")
            print(
                f"harvest: {self.done:,} of {self.total:,} tokens, {self.rate:,.0f}/s, {_duration(left)} left",
                file=sys.stderr,
                flush=True,
            )

    def _look(self) -> None:
        self._last_look = time.monotonic()
        self._stored = self.committed()


def _duration(seconds: float) -> str:
    """Return hours, minutes and seconds in short."""
    if seconds == float("inf"):
        return "unknown time"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
