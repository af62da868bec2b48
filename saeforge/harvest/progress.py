"""Progress of a harvest: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 15.0


class HarvestProgress:
    """Counts kept tokens; tokens/s and time left are those of this run.

    Args:
        total: kept tokens of the whole dataset.
        done: of them, stored by earlier runs.
    """

    def __init__(self, total: int, done: int) -> None:
        self.total = total
        self.done = done
        self.before = done
        self.start = time.monotonic()
        self._last_line = self.start
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> HarvestProgress:
        console = Console(stderr=True)
        if console.is_terminal:
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
    def rate(self) -> float:
        """Tokens per second in this run."""
        return (self.done - self.before) / max(time.monotonic() - self.start, 1e-9)

    def add(self, tokens: int) -> None:
        """Count `tokens` more."""
        self.done += tokens
        now = time.monotonic()
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, advance=tokens, rate=f"{self.rate:,.0f}/s")
        elif now - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = now
            left = (self.total - self.done) / max(self.rate, 1e-9)
            print(
                f"harvest: {self.done:,} of {self.total:,} tokens, {self.rate:,.0f}/s, {_duration(left)} left",
                file=sys.stderr,
                flush=True,
            )


def _duration(seconds: float) -> str:
    """Return hours, minutes and seconds in short."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
