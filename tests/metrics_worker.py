"""One of two ranks that measure the rows of test_metrics.py: python -m tests.metrics_worker STORE RANK OUT.json"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import torch

from saeforge.metrics import ReconstructionMetrics
from saeforge.ops import Group, SparseCode
from tests.test_metrics import D_SAE, D, data


def main(store: str, rank: int, out: str) -> None:
    """Rank 0 sees the first 300 rows, rank 1 the others."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    metrics = ReconstructionMetrics(D, D_SAE, pivot=torch.ones(D), decoder_norms=torch.ones(D_SAE))
    x, x_hat, f = (part[:300] if rank == 0 else part[300:] for part in data())
    for a, b, c in zip(x.split(7), x_hat.split(7), f.split(7), strict=True):
        metrics.update(a, b, SparseCode.from_dense(c))
    metrics.reduce(Group.world())
    Path(out).write_text(json.dumps(dataclasses.asdict(metrics.compute())))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
