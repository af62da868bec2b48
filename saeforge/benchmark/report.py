"""What a benchmark on synthetic activations found: means over seeds at equal L0, as a table and as a plot."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saeforge.benchmark.cells import Cells
from saeforge.benchmark.search import between, found
from saeforge.errors import ConfigError

#: Shown in tables, in this order: name -> (heading, digits).
COLUMNS: Mapping[str, tuple[str, int]] = {
    "f1": ("F1", 4),
    "mcc": ("MCC", 4),
    "uniqueness": ("unique", 3),
    "precision": ("precision", 3),
    "recall": ("recall", 3),
    "explained_variance": ("EV", 4),
    "shrinkage": ("shrinkage", 3),
    "dead": ("dead", 1),
    "absorption": ("absorption", 3),
    "parent_miss": ("control", 3),
    "l0": ("L0", 2),
    "seconds": ("seconds", 0),
}


@dataclass(frozen=True)
class Summary:
    """One variant at one wanted L0.

    Attributes:
        variant: its name. side: who trained it ("ours", or a peer). target: the wanted L0.
        records: one per seed that got there, interpolated between two runs where it had to be.
        missing: seeds without a run near enough.
    """

    variant: str
    side: str
    target: float
    records: tuple[dict[str, Any], ...]
    missing: tuple[int, ...]

    def values(self, name: str) -> list[float]:
        """One measure of all seeds that have it."""
        return [float(record[name]) for record in self.records if record.get(name) is not None]

    def mean(self, name: str) -> float:
        """Over seeds; NaN where no seed has it."""
        values = self.values(name)
        return sum(values) / len(values) if values else math.nan

    def deviation(self, name: str) -> float:
        """Sample standard deviation over seeds; 0 for a single one, NaN for none."""
        values, mean = self.values(name), self.mean(name)
        if len(values) < 2:
            return 0.0 if values else math.nan
        return math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))


def summarise(cells: Cells, variant: str, target: float, *, side: str = "ours") -> Summary:
    """Gathers the runs of one variant at one L0.

    A variant whose option is its L0 counts with the run that was asked for this one, whatever L0 it has at inference;
    others with the two runs around it, or one within 0.1 of it.
    """
    records, missing = [], []
    for seed in sorted({cell["seed"] for cell in cells.of(variant=variant, side=side)}):
        runs = cells.of(variant=variant, side=side, seed=seed)
        asked = [run for run in runs if run["exact"] and run["value"] == target]
        pair = found([(run["value"], run["l0"]) for run in runs], target)
        if asked:
            records.append(asked[0])
        elif pair is not None:
            records.append(between(runs[pair[0]], runs[pair[1]], target))
        else:
            missing.append(seed)
    return Summary(variant, side, target, tuple(records), tuple(missing))


def table(summaries: Sequence[Summary], *, sides: bool = False) -> list[list[str]]:
    """Heading and rows of means and standard deviations over seeds, as text.

    Args:
        summaries: the rows.
        sides: with a column for who trained it.
    """
    heading = ["variant", *(["trained by"] if sides else []), "wanted L0", "seeds"]
    rows = [heading + [title for title, _ in COLUMNS.values()]]
    for summary in summaries:
        row = [summary.variant, *([summary.side] if sides else []), f"{summary.target:g}", str(len(summary.records))]
        for name, (_, digits) in COLUMNS.items():
            row.append(_number(summary.mean(name), summary.deviation(name), digits, len(summary.values(name)) > 1))
        rows.append(row)
    return rows


def _number(mean: float, deviation: float, digits: int, several: bool) -> str:
    if math.isnan(mean):
        return "-"
    return f"{mean:.{digits}f}" + (f" ± {deviation:.{digits}f}" if several else "")


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; numbers to the right."""
    rule = ["---" if number == 0 else "---:" for number in range(len(rows[0]))]
    return "".join(f"| {' | '.join(row)} |\n" for row in [rows[0], rule, *rows[1:]])


def plot(cells: Cells, variants: Sequence[str], path: str | Path) -> None:
    """F1, MCC and explained variance of every run over its L0, as an SVG (or what the suffix says).

    Raises:
        ConfigError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("the plot needs matplotlib; pip install 'saeforge[synthetic]'") from error
    figure = Figure(figsize=(12, 4), layout="constrained")
    axes = figure.subplots(1, 3)
    for number, variant in enumerate(variants):
        sides = sorted({cell["side"] for cell in cells.of(variant=variant)})
        for side in sides:
            runs = sorted(cells.of(variant=variant, side=side), key=lambda run: float(run["l0"]))
            style = {
                "color": f"C{number}",
                "linestyle": "-" if side == "ours" else "--",
                "marker": "o",
                "markersize": 3,
            }
            label = variant if sides == ["ours"] else f"{variant}, {side}"
            for axis, name in zip(axes, ("f1", "mcc", "explained_variance"), strict=True):
                axis.plot([run["l0"] for run in runs], [run[name] for run in runs], label=label, **style)
    for axis, title in zip(axes, ("F1", "MCC", "explained variance"), strict=True):
        axis.set(xlabel="L0", title=title)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize="small")
    figure.savefig(path)
