"""What a sweep saves: n SAEs from one stream beside n runs of one SAE each, from shards and from a running model.

    python scripts/bench_sweep.py --out docs/benchmarks/DATE-sweep-cpu

Top-k SAEs of one site that differ in k. Shards: rows 384 wide on a local disk, in the page cache. Live: the demo model
to layer 3 of 6, as in configs/live/demo.yaml. In rounds, the sweep and then the n runs one after the other, in the next
round the other way round; seconds of the steps after the first ones, medians and ranges over rounds; the first round
warms up. The report says how many cores other work used. About two minutes a round.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shlex
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench_live import Clock, Others, open_source, wait_for_quiet
from bench_quality_judge import machine

from saeforge.data.shard_source import ShardSource
from saeforge.data.source import BlockSource
from saeforge.data.writer import write_dataset
from saeforge.training.data import ActivationData
from saeforge.training.module import SAEModule
from saeforge.training.trainer import SAETrainer
from saeforge.variants import TopK

BATCH, LANES, D = 2048, 8, 384


def seconds(source: BlockSource, ks: list[int], given: argparse.Namespace, window_blocks: int) -> float:
    """Seconds a step of one run that trains an SAE for each of `ks`."""
    data = ActivationData.of(source, batch_size=BATCH, window_blocks=window_blocks, lanes=LANES)
    base = ks[0]
    module = SAEModule(
        lambda i, o: TopK(i, o, d_sae=given.d_sae, k=base),
        data.d_in,
        data.d_out,
        grid={"k": ks} if len(ks) > 1 else None,
    )
    clock = Clock()
    trainer = SAETrainer(
        accelerator="cpu",
        devices=1,
        max_steps=given.skip + given.steps,
        callbacks=[clock],
        logger=False,
        enable_progress_bar=False,
        limit_val_batches=0,
        default_root_dir=None,
    )
    trainer.fit(module, data)
    return (clock.times[-1] - clock.times[given.skip - 1]) / given.steps


def measure(open_one: Callable[[], BlockSource], given: argparse.Namespace, window_blocks: int) -> dict[str, Any]:
    """Seconds a step of the sweep, and of each run alone, in each round."""
    rounds: list[dict[str, Any]] = []
    for number in range(given.rounds + 1):
        wait_for_quiet(given.patience)
        others = Others()
        jobs = [given.k, *([k] for k in given.k)]
        found = {}
        for job in jobs if number % 2 == 0 else reversed(jobs):
            found[len(job) > 1, job[0]] = seconds(open_one(), job, given, window_blocks)
        alone = [found[False, k] for k in given.k]
        rounds.append({"sweep": found[True, given.k[0]], "alone": alone, "other_cores": others.cores()})
        print(json.dumps(rounds[-1]), flush=True)
    return {"rounds": rounds[1:]}


def row(name: str, result: dict[str, Any]) -> str:
    """A line of the table."""
    rounds = result["rounds"]
    sweep = [1e3 * each["sweep"] for each in rounds]
    alone = [1e3 * sum(each["alone"]) for each in rounds]
    gain = [b / a for a, b in zip(sweep, alone, strict=True)]
    cells = [
        f"{statistics.median(values):,.0f} ({min(values):,.0f} to {max(values):,.0f})" for values in (sweep, alone)
    ]
    gains = f"{statistics.median(gain):.2f} ({min(gain):.2f} to {max(gain):.2f})"
    return f"| {name} | {cells[0]} | {cells[1]} | {gains} |"


def report(results: dict[str, Any], given: argparse.Namespace) -> str:
    """The Markdown page."""
    others = [each["other_cores"] for result in results.values() for each in result["rounds"]]
    n, host = len(given.k), machine()
    lines = [
        f"# A sweep beside lone runs, {datetime.date.today()}",
        "",
        f"`{shlex.join(['python', *sys.argv])}`",
        "",
        f"{n} top-k SAEs of one site, k = {', '.join(map(str, given.k))}, {given.d_sae:,} latents, batches of "
        f"{BATCH:,} tokens, fp32, {torch.get_num_threads()} threads; "
        f"{given.steps} steps timed in each of {given.rounds} rounds.",
        f"Machine: {', '.join(host['cpu'])}, {host['cores']} cores, Python {host['python']}, "
        f"{', '.join(f'{name} {version}' for name, version in host['versions'].items())}.",
        f"Other work used {statistics.median(others):.2f} cores meanwhile ({min(others):.2f} to {max(others):.2f}).",
        "",
        f"| rows from | sweep, ms a step | {n} lone runs, ms a step, summed | times faster |",
        "|---|---|---|---|",
        *(row(name, result) for name, result in results.items()),
        "",
        "Medians over rounds, ranges in brackets. Each SAE of the sweep is that of its lone run to the bit "
        "(tests/test_sweep.py).",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measures and writes the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="path of the report, without its ending")
    parser.add_argument("--k", type=int, nargs="+", default=[16, 32, 64, 128])
    parser.add_argument("--d-sae", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--skip", type=int, default=8, help="first steps that are not timed")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--patience", type=float, default=60.0, help="seconds a round waits for a quiet machine")
    parser.add_argument("--text", default="demo")
    parser.add_argument("--tokens", type=int, default=150_000, help="of the live source")
    parser.add_argument("--block-rows", type=int, default=1024)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        generator = torch.Generator().manual_seed(0)
        rows = (given.skip + given.steps + 1) * BATCH
        write_dataset(folder / "acts", {"train": torch.randn(rows, D, generator=generator)}, dtype="float32")
        results = {
            "shards": measure(lambda: ShardSource(str(folder / "acts")), given, 4),
            "the running model": measure(lambda: open_source(folder / "live", given), given, 1),
        }
    settings = {key: value for key, value in vars(given).items() if key != "out"}
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.with_suffix(".json").write_text(
        json.dumps({"machine": machine(), "settings": settings, "results": results}, indent=1) + "\n"
    )
    given.out.with_suffix(".md").write_text(report(results, given))
    print(given.out.with_suffix(".md").read_text())


if __name__ == "__main__":
    main()
