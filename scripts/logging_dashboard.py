"""Draws the view of wandb_workspace.py from an offline wandb run, as docs/images/logging-dashboard.png was.

    python scripts/logging_dashboard.py RUN --out docs/images/logging-dashboard.png

The figures are the run's own; the arrangement is the view's, the drawing is matplotlib's and not wandb's.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
from wandb_workspace import SECTIONS, Panel

from saeforge.errors import ConfigError, SaeforgeError
from saeforge.training.figures import X_AXIS

COLUMNS = 3
#: Points of one name: (tokens, value), where a histogram's value is its counts and edges.
Curves = dict[str, list[tuple[float, Any]]]


def read(run: Path) -> Curves:
    """What the offline wandb runs of a RUN folder hold, by name.

    Raises:
        ConfigError: there is none.
    """
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from tests.wandb_file import records

    curves: Curves = {}
    for file in sorted(run.glob("wandb/offline-run-*/*.wandb")):
        for record in records(file):
            row: dict[str, Any] = {}
            for item in record.history.item:
                name, *part = [item.key] if item.key else item.nested_key
                value = json.loads(item.value_json)
                if part:
                    row.setdefault(name, {})[part[0]] = value
                else:
                    row[name] = value
            for name, value in row.items():
                if X_AXIS in row and not (isinstance(value, dict) and "bins" not in value):
                    curves.setdefault(name, []).append((row[X_AXIS], value))
    if not curves:
        raise ConfigError(f"{run} holds no offline wandb run; give a RUN that was logged with `offline: true`")
    return curves


def draw(axes: Any, panel: Panel, curves: Curves) -> None:
    """One panel: lines, or histograms side by side, over tokens."""
    names = [name for name in panel.names if name in curves]
    if panel.regex:
        names += [name for name in curves if re.match(panel.regex, name) and name not in names]
    axes.set_title(panel.title, fontsize=8)
    axes.tick_params(labelsize=6)
    axes.grid(alpha=0.2)
    if not names:
        axes.text(
            0.5, 0.5, "not in this run", ha="center", va="center", fontsize=7, color="0.5", transform=axes.transAxes
        )
        return
    for name in names:
        points = curves[name]
        if isinstance(points[0][1], dict):
            width = points[0][0]
            for tokens, value in points:
                edges, counts = np.array(value["bins"]), np.array(value["values"], dtype=float)
                shades = (counts / counts.max())[:, None]
                axes.pcolormesh([tokens - width, tokens], edges, shades, cmap="Blues", rasterized=True)
        else:
            x, y = zip(*((tokens, value) for tokens, value in points if isinstance(value, int | float)), strict=True)
            axes.plot(x, y, linewidth=1, marker="." if len(x) < 15 else None, markersize=3, label=name)
            if panel.logarithmic:
                axes.set_yscale("log")
    if len(axes.lines) > 1:
        axes.legend(fontsize=5, frameon=False)


def main() -> int:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    curves = read(given.run)
    heights = [-(-len(panels) // COLUMNS) for panels in SECTIONS.values()]
    figure = plt.figure(figsize=(10, 1.9 * sum(heights)), layout="constrained")
    parts = figure.subfigures(len(SECTIONS), 1, height_ratios=heights)
    for part, height, (title, panels) in zip(parts, heights, SECTIONS.items(), strict=True):
        part.suptitle(title, x=0.01, ha="left", fontsize=10, fontweight="bold")
        grid = part.subplots(height, COLUMNS, squeeze=False).flatten()
        for axes, panel in zip(grid, panels, strict=False):
            draw(axes, panel, curves)
        for axes in grid[len(panels) :]:
            axes.set_axis_off()
    given.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(given.out, dpi=80, metadata={"Software": None})
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except SaeforgeError as error:
        sys.exit(f"logging_dashboard.py: {error}")
