"""Judging and tuning for bench_quality.py: held-out metrics, the PCA control, the search for a penalty, the table."""

from __future__ import annotations

import math
import os
import platform
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from saeforge.data.loader import ValidationLoader
from saeforge.data.source import BlockSource
from saeforge.errors import SaeforgeError
from saeforge.metrics import Reconstruction, ReconstructionMetrics
from saeforge.ops import SparseCode
from saeforge.sae import SAE

COLUMNS = {
    "FVU": ("fvu", "{:.4f}"),
    "L0": ("l0_mean", "{:.2f}"),
    "cosine": ("cosine", "{:.4f}"),
    "bias": ("reconstruction_bias", "{:.4f}"),
    "dead": ("dead", "{:.0f}"),
    "seconds": ("seconds", "{:.0f}"),
}


@torch.no_grad()
def judge(sae: SAE, source: BlockSource) -> Reconstruction:
    """Metrics of an SAE over all held-out rows, raw units."""
    mean, norms = torch.tensor(source.statistics[0].mean), sae.W_dec.norm(dim=1)
    metrics = ReconstructionMetrics(sae.d_out, sae.d_sae, pivot=mean, decoder_norms=norms)
    for batch in ValidationLoader(source, 8192):
        x = batch[0].float()
        code = sae.encode(x)
        metrics.update(x, sae.decode(code, x), code)
    return metrics.compute()


@torch.no_grad()
def judge_pca(source: BlockSource, rank: int) -> Reconstruction:
    """Metrics of the best linear reconstruction of that rank: fitted to training rows, judged on held-out ones."""
    d = source.widths[0]
    mean = torch.tensor(source.statistics[0].mean, dtype=torch.float64)
    scatter = torch.zeros(d, d, dtype=torch.float64)
    for block in range(source.n_blocks("train")):
        rows = source.read_block("train", block)[0].double() - mean
        scatter.addmm_(rows.T, rows)
    components = torch.linalg.eigh(scatter).eigenvectors[:, -rank:]
    metrics = ReconstructionMetrics(d, rank, pivot=mean, decoder_norms=torch.ones(rank))
    for batch in ValidationLoader(source, 8192):
        x = batch[0].double()
        scores = (x - mean) @ components
        metrics.update(x, mean + scores @ components.T, SparseCode.from_dense(scores))
    return metrics.compute()


@dataclass(frozen=True)
class Tuned:
    """Where a search for a penalty ended: coefficient, L0 there, runs needed, and d log(L0) / d log(coefficient)."""

    coefficient: float
    l0: float
    runs: int
    slope: float


def tune(
    l0_of: Callable[[float], float],
    start: float,
    *,
    target: float,
    tolerance: float,
    slope: float = -1.0,
    max_runs: int = 8,
) -> Tuned:
    """Finds a coefficient with a mean L0 within `tolerance` of `target`, by the secant method on logarithms.

    Args:
        l0_of: a whole training run: coefficient -> mean held-out L0.
        start: first coefficient.
        target: L0 wanted.
        tolerance: largest accepted distance from it.
        slope: first guess of d log(L0) / d log(coefficient), until two runs tell.
        max_runs: give up after so many.

    Raises:
        SaeforgeError: not found.
    """
    seen: list[tuple[float, float]] = []
    coefficient = start
    for run in range(1, max_runs + 1):
        l0 = l0_of(coefficient)
        seen.append((math.log(coefficient), math.log(max(l0, 1e-3))))
        if len(seen) > 1:
            (x0, y0), (x1, y1) = seen[-2:]
            # More penalty, fewer latents: a rising secant is noise between two near points.
            slope = min((y1 - y0) / (x1 - x0), -0.1)
        if abs(l0 - target) <= tolerance:
            return Tuned(coefficient, l0, run, slope)
        step = (math.log(target) - seen[-1][1]) / slope
        coefficient *= math.exp(max(-2.0, min(2.0, step)))
    raise SaeforgeError(f"no coefficient with L0 {target} +- {tolerance} in {max_runs} runs: {seen}; start elsewhere")


def table(runs: list[dict[str, Any]]) -> str:
    """A Markdown table: mean over seeds, and (smallest to largest) where there are several."""
    lines = ["| run | seeds | " + " | ".join(COLUMNS) + " |", "|---" * (2 + len(COLUMNS)) + "|"]
    for name in dict.fromkeys(run["name"] for run in runs):
        group = [run for run in runs if run["name"] == name]
        cells = []
        for key, form in COLUMNS.values():
            values = [run[key] for run in group if key in run]
            if not values:
                cells.append("")
                continue
            low, high = form.format(min(values)), form.format(max(values))
            spread = f" ({low} to {high})" if low != high else ""
            cells.append(form.format(statistics.fmean(values)) + spread)
        lines.append(f"| {name} | {len(group)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def identity(source: BlockSource) -> dict[str, Any]:
    """Which rows, wherever they lie."""
    return {key: source.pairs[0].identity[key] for key in ("model", "site", "dataset")}


def machine() -> dict[str, Any]:
    """Versions and hardware, for the report."""
    cpu = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in cpu.read_text().splitlines() if line.startswith("model name")]
    versions = {name: metadata.version(name) for name in ("saeforge", "torch", "lightning", "transformers", "numpy")}
    return {"cpu": names[:1], "cores": os.cpu_count(), "python": platform.python_version(), "versions": versions}


def machine_line() -> str:
    """The same in one line."""
    host = machine()
    versions = ", ".join(f"{name} {version}" for name, version in host["versions"].items())
    return f"Machine: {', '.join(host['cpu'])}, {host['cores']} cores, Python {host['python']}, {versions}."
