"""How fast are activations read? The reader beside webdataset on the same tar files, and its memory over a long run.

    python scripts/bench_data.py --out docs/benchmarks/DATE-data-cpu

Writes a dataset of random bf16 rows into a temporary folder (`--gib`, 1 by default), reads it once so that the page
cache holds it, and then measures in rounds, one of each after the other, so that a busy machine is busy for all of
them. Medians and ranges over the rounds; OUT.md and OUT.json.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from bench_quality_judge import machine

from saeforge.data.loader import TrainLoader, reading_threads
from saeforge.data.plan import Plan
from saeforge.data.shard_source import ShardSource
from saeforge.data.shards import ActivationDataset
from saeforge.data.writer import write_dataset

BATCH = 4096
#: What the promises of docs and design name.
TIMES_WEBDATASET, GB_PER_THREAD = 8.0, 3.0


def shards(root: Path) -> list[str]:
    """The training shards of the only site."""
    dataset = ActivationDataset.open(root)
    return [str(root / dataset.site.folder / shard.file) for shard in dataset.site.shards["train"]]


def read_blocks(root: Path) -> Callable[[], int]:
    """One thread, every block in turn into the same memory; checksums are verified."""
    dataset = ActivationDataset.open(root)
    out = torch.empty(dataset.block_rows("train"), dataset.d, dtype=dataset.dtype)

    def once() -> int:
        for index in range(dataset.n_blocks("train")):
            dataset.read_block("train", index, out)
        return dataset.n_blocks("train") * out.nbytes

    return once


def loader(root: Path, threads: int) -> Callable[[], tuple[int, float]]:
    """Shuffled training batches as `fit` draws them: two passes, after one that fills the loader's memory."""
    source = ShardSource(str(root))
    plan = Plan(source.n_blocks("train"), source.block_rows("train"), BATCH)

    def once() -> tuple[int, float]:
        done, start = 0, time.perf_counter()
        batches = TrainLoader(source, plan, 3 * plan.batches_per_pass, threads=threads, reuse=True)
        for index, rows in enumerate(batches):
            if index == plan.batches_per_pass:
                done, start = 0, time.perf_counter()
            done += rows[0].nbytes
        return done, time.perf_counter() - start

    return once


def webdataset_blocks(root: Path, decode: bool) -> Callable[[], int]:
    """webdataset, whole blocks in stored order: raw bytes, or arrays through its own decoder."""

    def once() -> int:
        stream = webdataset.WebDataset(shards(root), shardshuffle=False)
        samples = stream.decode() if decode else stream
        return sum(s["acts.npy"].nbytes if decode else len(s["acts.npy"]) for s in samples)

    return once


def webdataset_batches(root: Path, blocks: int) -> Callable[[], int]:
    """webdataset, shuffled batches of rows: decode, unbatch, shuffle buffer, batch; over the first blocks only."""

    def rows(samples: Iterator[dict[str, Any]]) -> Iterator[np.ndarray]:
        for sample in samples:
            yield from sample["acts.npy"]

    def once() -> int:
        stream = webdataset.WebDataset(shards(root), shardshuffle=False).decode().slice(blocks)
        stages = (webdataset.shuffle(5000), webdataset.batched(BATCH, collation_fn=np.stack))
        return sum(batch.nbytes for batch in webdataset.DataPipeline(stream, rows, *stages))

    return once


def memory(root: Path, batches: int) -> dict[str, float]:
    """Resident memory in MiB over many batches, beside the loader's formula."""
    source = ShardSource(str(root))
    plan = Plan(source.n_blocks("train"), source.block_rows("train"), BATCH)
    row_bytes = source.widths[0] * 2
    stated = 2 * plan.lanes * plan.window_blocks * plan.block_rows * row_bytes + 3 * BATCH * row_bytes
    gc.collect()
    before, seen = resident(), []
    for index, _ in enumerate(TrainLoader(source, plan, batches, reuse=True)):
        if index >= batches // 20 and index % 50 == 0:
            seen.append(resident())
    half = len(seen) // 2
    return {
        "batches": batches,
        "stated": stated / 2**20,
        "most": max(seen) - before,
        "first_half": statistics.median(seen[:half]) - before,
        "second_half": statistics.median(seen[half:]) - before,
    }


def resident() -> float:
    """MiB of this process in memory, without the page cache."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="report without its suffix; default: print only")
    parser.add_argument("--gib", type=float, default=1.0, help="size of the dataset")
    parser.add_argument("--d", type=int, default=4096, help="width of a row")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batches", type=int, default=10_000, help="of the memory run, at least 200")
    given = parser.parse_args()
    if given.batches < 200:
        parser.error(f"--batches {given.batches}: the memory run needs at least 200")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="saeforge-bench-") as folder:
        root = Path(folder) / "acts"
        rows = int(given.gib * 2**30 / (2 * given.d))
        write_dataset(root, {"train": torch.randn(rows, given.d, dtype=torch.bfloat16)})
        n_blocks = ActivationDataset.open(root).n_blocks("train")
        ways: dict[str, Callable[[], int | tuple[int, float]]] = {
            "saeforge, blocks, one thread": read_blocks(root),
            "saeforge, shuffled batches, one reading thread": loader(root, 1),
            "saeforge, shuffled batches, two reading threads": loader(root, 2),
            "webdataset, blocks, raw bytes": webdataset_blocks(root, decode=False),
            "webdataset, blocks, .decode()": webdataset_blocks(root, decode=True),
            "webdataset, shuffled batches": webdataset_batches(root, max(4, n_blocks // 8)),
        }
        rates: dict[str, list[float]] = {name: [] for name in ways}
        for number in range(given.rounds + 1):
            for name, way in ways.items():
                start = time.perf_counter()
                found = way()
                done, seconds = found if isinstance(found, tuple) else (found, time.perf_counter() - start)
                rate = done / seconds / 1e9
                if number:  # the first round fills the page cache and the allocator
                    rates[name].append(rate)
            print(f"round {number} of {given.rounds}", file=sys.stderr)
        held = memory(root, given.batches)
    result = {"rates": rates, "memory": held, "machine": machine(), "d": given.d, "gib": given.gib}
    text = report(result, shlex.join(["python", "scripts/bench_data.py", *sys.argv[1:]]))
    print(text)
    if given.out is not None:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.with_suffix(".md").write_text(text)
        given.out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    return 0


def report(result: dict[str, Any], command: str) -> str:
    """The tables and what they mean for the promises."""
    rates, held = result["rates"], result["memory"]
    median = {name: statistics.median(values) for name, values in rates.items()}
    drawn = f"saeforge, shuffled batches, {'one reading thread' if reading_threads() == 1 else 'two reading threads'}"
    ours, theirs = median[drawn], median["webdataset, shuffled batches"]  # as `fit` draws them on this machine
    decoded, alone = median["webdataset, blocks, .decode()"], median["saeforge, blocks, one thread"]

    def met(value: float, bound: float) -> str:
        return "met" if value >= bound else f"missed (goal {bound:g})"

    host = result["machine"]
    lines = [
        f"# Reading activations, {datetime.date.today():%Y-%m-%d}",
        "",
        f"`{command}`",
        "",
        f"Random bf16 rows, d {result['d']}, {result['gib']:g} GiB in tar shards, all in the page cache; one torch",
        f"thread; {len(next(iter(rates.values())))} rounds, each way once in each; batches of {BATCH:,} rows.",
        f"Machine: {', '.join(host['cpu'])}, {host['cores']} cores, Python {host['python']}, "
        f"{', '.join(f'{name} {version}' for name, version in host['versions'].items())}.",
        "",
        "| way | GB/s, median | range |",
        "|---|---|---|",
        *(f"| {name} | {median[name]:.2f} | {min(v):.2f} to {max(v):.2f} |" for name, v in rates.items()),
        "",
        f"* Shuffled training batches, as `fit` draws them here (reading threads: {reading_threads()}):",
        f"  {ours / theirs:.1f} times webdataset's, {met(ours / theirs, TIMES_WEBDATASET)}.",
        f"* Whole blocks in stored order, which nobody trains on: {alone / decoded:.1f} times webdataset's with its",
        "  decoder; ours verifies a checksum of every block, webdataset none.",
        f"* One thread from the page cache, checksums verified: {alone:.2f} GB/s, {met(alone, GB_PER_THREAD)}.",
        f"* Memory over {held['batches']:,} batches: at most {held['most']:.0f} MiB more than before; median of the",
        f"  first half {held['first_half']:.1f}, of the second {held['second_half']:.1f} MiB; the loader's formula "
        f"says {held['stated']:.0f} MiB.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
