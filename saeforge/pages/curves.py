"""The curves of a run, read from its CSV log and thinned to what can be drawn."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from saeforge.errors import DatasetError

#: Most points of a curve: a chart is not so many pixels wide.
MOST_POINTS = 600


class Curves:
    """What a run logged, by name: `train/loss`, `val/fvu`, `schedule/lr` ...

    Attributes:
        points: name -> steps and values, by ascending step.
        tokens_per_step: where the log tells, else None.
    """

    def __init__(self, points: dict[str, tuple[list[float], list[float]]]) -> None:
        self.points = points
        steps, tokens = points.get("train/tokens", ([], []))
        self.tokens_per_step = tokens[-1] / steps[-1] if steps and steps[-1] else None

    def of(self, name: str) -> tuple[list[float], list[float]] | None:
        """Tokens (or steps, if the log has no tokens) and values of one curve, thinned; None if it was not logged."""
        steps, values = self.points.get(name, ([], []))
        if not any(map(math.isfinite, values)):
            return None
        factor = self.tokens_per_step or 1.0
        return thinned([step * factor for step in steps], values)

    @property
    def x_label(self) -> str:
        """Of the axis that `of` gives."""
        return "tokens" if self.tokens_per_step else "steps"


def read_curves(folder: Path, members: Sequence[str] = ("",)) -> dict[str, Curves]:
    """The curves of a RUN folder, by SAE; those without any are left out.

    A resumed run has a file for each start: from the first step of a later one on, what earlier ones have is of steps
    that were made again.

    Args:
        folder: RUN.
        members: names of the SAEs that train side by side, which stand before the names of their figures; "" alone
            for a run of one.

    Raises:
        DatasetError: a log that is not one.
    """
    files = sorted(folder.glob("*/version_*/metrics.csv"), key=lambda path: _version(path.parent.name))
    points: dict[str, dict[str, dict[float, float]]] = {member: {} for member in members}
    for file in files:
        rows = list(_rows(file))
        first = min((step for _, step, _ in rows), default=math.inf)
        for values in (values for each in points.values() for values in each.values()):
            for step in [step for step in values if step >= first]:
                del values[step]
        for name, step, value in rows:
            member, _, rest = name.partition("/")
            owners = [member] if member in points else members
            for owner in owners:
                points[owner].setdefault(rest if member in points else name, {})[step] = value
    return {member: Curves({n: _ordered(v) for n, v in each.items() if v}) for member, each in points.items() if each}


def _ordered(values: dict[float, float]) -> tuple[list[float], list[float]]:
    steps = sorted(values)
    return steps, [values[step] for step in steps]


def _version(name: str) -> int:
    number = name.removeprefix("version_")
    return int(number) if number.isdigit() else -1


def _rows(file: Path) -> Iterable[tuple[str, float, float]]:
    """Name, step and value of every figure in a log."""
    try:
        with file.open(newline="", encoding="utf-8") as stream:
            for row in csv.DictReader(stream):
                if None in row or None in row.values():
                    continue  # the last line of a log that is being written, or was when its process died
                step = float(row.pop("step"))
                for name, value in row.items():
                    if value:
                        yield name, step, float(value)
    except (KeyError, ValueError, csv.Error) as error:
        raise DatasetError(f"{file} is no log of a run ({error}); remove it, or mend it") from error


def thinned(x: Sequence[float], y: Sequence[float], most: int = MOST_POINTS) -> tuple[list[float], list[float]]:
    """A curve of at most so many points, with the least and the greatest of every stretch kept: spikes stay.

    Args:
        x: ascending.
        y: equally many.
        most: at least 4.
    """
    if len(x) <= most:
        return list(x), list(y)
    stretch = math.ceil((len(x) - 2) / ((most - 2) // 2))
    kept = [0]
    for first in range(1, len(x) - 1, stretch):
        part = [i for i in range(first, min(first + stretch, len(x) - 1)) if math.isfinite(y[i])]
        if part:
            kept += sorted({min(part, key=y.__getitem__), max(part, key=y.__getitem__)})
    kept.append(len(x) - 1)
    return [x[i] for i in kept], [y[i] for i in kept]
