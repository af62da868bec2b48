"""The report of scripts/bench_synthetic.py: ours beside the peer at equal L0, with a verdict for each variant."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from bench_quality_judge import machine_line

from saeforge.benchmark.cells import Cells
from saeforge.benchmark.report import Summary, markdown, plot, summarise, table
from saeforge.benchmark.search import between, found
from saeforge.evaluation.ground_truth import CONVENTIONS


def pooled(a: Summary, b: Summary, name: str) -> float:
    """Pooled standard deviation of two sets of equally many seeds."""
    return float(((a.deviation(name) ** 2 + b.deviation(name) ** 2) / 2) ** 0.5)


def verdict(ours: Summary, theirs: Summary) -> str:
    """At least theirs minus one pooled standard deviation in F1 and MCC, in at most half of the time."""
    if not ours.records or not theirs.records:
        return "not measured"
    faults = []
    for name, title in (("f1", "F1"), ("mcc", "MCC")):
        least = theirs.mean(name) - pooled(ours, theirs, name)
        if ours.mean(name) < least:
            faults.append(f"{title} {ours.mean(name):.4f} is below {least:.4f}")
    ratio = theirs.mean("seconds") / ours.mean("seconds")
    if ratio < 2:
        faults.append(f"only {ratio:.2f} times as fast")
    better = f"F1 {ours.mean('f1') - theirs.mean('f1'):+.4f}, MCC {ours.mean('mcc') - theirs.mean('mcc'):+.4f}, "
    theirs_cpu, ours_cpu = (
        [record["cpu_seconds"] for record in side.records if "cpu_seconds" in record] for side in (theirs, ours)
    )
    cpu = ""
    if theirs_cpu and ours_cpu:
        cpu = f" ({mean(theirs_cpu) / mean(ours_cpu):.1f} by processor time)"
    return f"{better}{ratio:.1f} times as fast{cpu}: {'; '.join(faults) or 'holds'}"


def matched(cells: Cells, variant: str) -> list[Summary]:
    """Ours and theirs where the peer's only run of a seed sets the L0, and ours was brought to it."""
    both: dict[str, list[dict[str, Any]]] = {"ours": [], "theirs": []}
    missing = []
    for peer in cells.of(variant=variant, side="theirs"):
        runs = cells.of(variant=variant, side="ours", seed=peer["seed"])
        pair = found([(run["value"], run["l0"]) for run in runs], peer["l0"])
        if pair is None:
            missing.append(peer["seed"])
            continue
        both["theirs"].append(peer)
        both["ours"].append(between(runs[pair[0]], runs[pair[1]], peer["l0"]))
    target = sum(peer["l0"] for peer in both["theirs"]) / max(len(both["theirs"]), 1)
    return [
        Summary(variant, side, round(target, 2), tuple(records), tuple(missing) if side == "ours" else ())
        for side, records in both.items()
    ]


def write_report(
    cells: Cells, variants: Sequence[str], targets: Sequence[float], match: Collection[str], path: Path
) -> None:
    """Writes the Markdown file, a plot beside it, and all runs as JSON beside it."""
    protocol = cells.content["header"]["protocol"]
    summaries, verdicts = [], []
    for variant in variants:
        pairs = [[summarise(cells, variant, target, side=side) for side in ("ours", "theirs")] for target in targets]
        for pair in [matched(cells, variant)] if variant in match else pairs:
            summaries += [summary for summary in pair if summary.records]
            verdicts.append([variant, f"{pair[0].target:g}", verdict(*pair)])
    versions = sorted({cell["version"] for cell in cells.of(side="theirs")})
    lines = [
        f"# Known features: saeforge beside SAELens {', '.join(versions)}",
        "",
        f"`{shlex.join(['python', *sys.argv])}`",
        "",
        machine_line(),
        "",
        f"Synthetic activations of one file, {protocol['d_sae']:,} latents, {protocol['samples']:,} rows in batches of "
        f"{protocol['batch_size']:,}, constant lr {protocol['lr']:g}, {protocol['precision']}, "
        f"{cells.content['header']['threads']} thread(s); the script's head says how. "
        "Mean ± standard deviation over seeds, at the wanted L0 of the saved SAE on held-out rows; where a penalty "
        "sets it, interpolated linearly between the two runs around it (seconds too). Seconds are of training alone."
        + (f" Of {', '.join(match)} the peer trains once a seed, and ours is brought to its L0." if match else ""),
        "",
        markdown(table(summaries, sides=True)),
        "It holds if mean F1 and MCC are at least the peer's minus one pooled standard deviation, in at most half of "
        "the time:",
        "",
        markdown([["variant", "L0", "ours against theirs"], *verdicts]),
        *(f"* {name}: {meaning}." for name, meaning in CONVENTIONS.items()),
    ]
    for summary in summaries:
        for seed in summary.missing:
            lines.append(f"* {summary.variant}, {summary.side}, seed {seed}: no run near L0 {summary.target:g}.")
    path.parent.mkdir(parents=True, exist_ok=True)
    plot(cells, variants, path.with_suffix(".svg"))
    lines += ["", f"![F1, MCC and explained variance of every run over its L0]({path.with_suffix('.svg').name})"]
    path.write_text("\n".join(lines) + "\n")
    path.with_suffix(".json").write_text(json.dumps(cells.content, indent=1) + "\n")
