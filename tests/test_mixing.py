"""How well batches are mixed over documents, and that a long run needs no more memory than a short one."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch

from saeforge.data.loader import TrainLoader
from saeforge.data.plan import Plan
from saeforge.data.shard_source import ShardSource
from saeforge.data.writer import write_dataset

ROWS, DOCUMENT, BUCKET, BATCH = 2**18, 128, 2**15, 4096


def pair_rate(root: Path, *, shuffled: bool) -> float:
    """Share of the pairs of rows in a batch that are of one document, over a pass."""
    documents = (torch.arange(ROWS) // DOCUMENT).float()[:, None].repeat(1, 2)
    write_dataset(root, {"train": documents}, bucket_rows=BUCKET, shuffle=shuffled)
    source = ShardSource(str(root))
    plan = Plan(source.n_blocks("train"), source.block_rows("train"), BATCH)
    same = pairs = 0
    for (rows,) in TrainLoader(source, plan, plan.batches_per_pass):
        counts = torch.bincount(rows[:, 0].long(), minlength=ROWS // DOCUMENT)
        same += int((counts * (counts - 1)).sum())
        pairs += BATCH * (BATCH - 1)
    return same / pairs


def test_rows_of_one_document_meet_hardly_more_often_than_by_chance(tmp_path: Path) -> None:
    """Buckets of an eighth of the data, shuffled when written, and windows when read: within twice the ideal rate."""
    ideal = (DOCUMENT - 1) / (ROWS - 1)
    assert 0.8 * ideal < pair_rate(tmp_path / "shuffled", shuffled=True) < 2 * ideal
    assert pair_rate(tmp_path / "stored", shuffled=False) > 2 * ideal  # or the windows alone would do


@pytest.mark.slow
def test_memory_stays_what_it_is_over_ten_thousand_batches(tmp_path: Path) -> None:
    """Within the formula of the loader, and without growth from the first tenth on."""
    d = 64
    write_dataset(tmp_path / "acts", {"train": torch.randn(2**18, d)}, dtype="bfloat16")
    source = ShardSource(str(tmp_path / "acts"))
    plan = Plan(source.n_blocks("train"), source.block_rows("train"), BATCH)
    stated = 2 * plan.lanes * plan.window_blocks * plan.block_rows * d * 2 + 3 * BATCH * d * 2
    gc.collect()
    before = resident()
    seen = [resident() for _ in TrainLoader(source, plan, 10_000, reuse=True)][1000:]
    assert max(seen) - before < stated + 32 * 2**20
    assert max(seen[len(seen) // 2 :]) - max(seen[: len(seen) // 2]) < 4 * 2**20


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
