"""`bench_step.py --sweep`: how the time of a step grows with one size; a table, the figures, and a plot."""

from __future__ import annotations

import datetime
import json
import statistics
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from bench_quality_judge import machine
from bench_step import Contender, Setting, contenders, measure, write_data
from bench_step_report import milliseconds

from saeforge.errors import ConfigError

RANGES: dict[str, tuple[int, ...]] = {
    "d_sae": (3072, 6144, 12_288, 24_576, 49_152, 98_304, 131_072),
    "k": (8, 16, 32, 64, 128, 256),
    "batch": (256, 512, 1024, 2048, 4096, 8192, 16_384),
    "threads": (1, 2),
}
#: Matrices of (batch, d_sae) in fp32 that the dense twin holds at once, from its peak memory.
DENSE_MATRICES = 6


def dense_bytes(setting: Setting) -> int:
    """What the dense twin needs: weights, gradients and Adam's two moments, and its activations."""
    weights = 2 * setting.d_in * setting.d_sae
    return 4 * (4 * weights + DENSE_MATRICES * setting.batch * setting.d_sae)


def available_bytes() -> int:
    """Memory that a new process may take."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise ConfigError("no MemAvailable in /proc/meminfo; give --only 'ours|product' to leave the dense twin out")


def fitting(setting: Setting, chosen: list[Contender]) -> list[Contender]:
    """Without the dense twin where it would take more than half of the memory there is."""
    if dense_bytes(setting) <= available_bytes() // 2:
        return chosen
    return [contender for contender in chosen if contender.job["contender"] != "dense"]


def sweep(setting: Setting, axis: str, only: str, command: str, out: Path | None, values: Any = None) -> int:
    """Measures every value of one size and writes OUT.md, OUT.json and OUT.svg.

    Args:
        setting: the other sizes.
        axis: which size.
        only: expression that names of contenders match.
        command: for the report.
        out: without suffix; None prints only.
        values: of the axis; default: those of `RANGES`.
    """
    values = values or RANGES[axis]
    if axis == "k" and setting.variant != "topk":
        raise ConfigError(f"--sweep k with --variant {setting.variant}: only topk has a k")
    largest = max(values) if axis == "batch" else setting.batch
    rows = max(4 * largest, setting.batch * min(setting.n_batches, 16))
    points = []
    with tempfile.TemporaryDirectory(prefix="saeforge-bench-") as name:
        folder = Path(name)
        data = folder / "rows.bin"
        write_data(data, rows, setting.d_in, setting.seed)
        for value in values:
            here = replace(setting, losses=0, **{axis: value})
            here = replace(here, n_batches=rows // here.batch)
            found: dict[str, Any] = {}
            for precision in ("fp32", "bf16"):  # one after the other: large ones would not fit side by side
                chosen = [c for c in contenders(here, {}, only) if c.job["precision"] == precision]
                if chosen := fitting(here, chosen):
                    found |= measure(here, chosen, folder, data)["contenders"]
            points.append({"value": value, "contenders": found})
            print(f"{axis} {value}", file=sys.stderr, flush=True)
    result = {"axis": axis, "setting": asdict(setting), "machine": machine(), "command": command, "points": points}
    text = report(result, None if out is None else f"{out.name}.svg")
    print(text)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        Path(f"{out}.md").write_text(text)
        Path(f"{out}.json").write_text(json.dumps(result, indent=1) + "\n")
        picture(result, Path(f"{out}.svg"))
    return 0


def names_of(result: dict[str, Any]) -> list[str]:
    """All contenders of a sweep, in the order of their first appearance."""
    return list(dict.fromkeys(name for point in result["points"] for name in point["contenders"]))


def report(result: dict[str, Any], picture_name: str | None) -> str:
    """Milliseconds a step by value."""
    setting, host, names = result["setting"], result["machine"], names_of(result)
    sizes = [f"{name} {setting[name]:,}" for name in ("d_in", "d_sae", "batch", "threads") if name != result["axis"]]
    if setting["variant"] != "topk":
        sizes.append(f"L0 about {setting['l0']:g}")
    elif result["axis"] != "k":
        sizes.append(f"k {setting['k']}")
    lines = [
        f"# One training step of {setting['variant']} by {result['axis']} on CPU, {datetime.date.today():%Y-%m-%d}",
        "",
        f"`{result['command']}`",
        "",
        f"{', '.join(sizes)}; medians of {setting['rounds']} interleaved rounds of {setting['steps']} steps, in ms;",
        "the dense twin where it fits into memory. See bench_step.py's own report for what each contender is.",
        f"Machine: {', '.join(host['cpu'])}, {host['cores']} cores, Python {host['python']}, "
        f"{', '.join(f'{name} {version}' for name, version in host['versions'].items())}.",
        "",
        f"| {result['axis']} | {' | '.join(names)} |",
        f"|---{'|---' * len(names)}|",
    ]
    for point in result["points"]:
        times = [point["contenders"].get(name) for name in names]
        cells = ["" if entry is None else milliseconds(statistics.median(entry["seconds"])) for entry in times]
        lines.append(f"| {point['value']:,} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *([f"![step time]({picture_name})", ""] if picture_name else [])])


def picture(result: dict[str, Any], path: Path) -> None:
    """Median and range of each contender over the axis, both logarithmic."""
    plt.rcParams["svg.hashsalt"] = "saeforge"  # the same figures make the same file
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    kinds = list(dict.fromkeys(name.split(",")[0] for name in names_of(result)))
    for name in names_of(result):
        points = [(p["value"], p["contenders"][name]["seconds"]) for p in result["points"] if name in p["contenders"]]
        x = [value for value, _ in points]
        middle = [1000 * statistics.median(seconds) for _, seconds in points]
        low = [m - 1000 * min(seconds) for m, (_, seconds) in zip(middle, points, strict=True)]
        high = [1000 * max(seconds) - m for m, (_, seconds) in zip(middle, points, strict=True)]
        axes.errorbar(
            x,
            middle,
            yerr=(low, high),
            label=name,
            marker="o",
            markersize=4,
            capsize=2,
            color=f"C{kinds.index(name.split(',')[0])}",
            linestyle="-" if name.endswith("fp32") else "--",
        )
    values = [point["value"] for point in result["points"]]
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(values, [f"{value:,}" for value in values])
    axes.minorticks_off()
    axes.set_xlabel(result["axis"])
    axes.set_ylabel("ms a step")
    axes.set_title(f"One training step of {result['setting']['variant']}")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
