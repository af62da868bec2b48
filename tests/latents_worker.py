"""One process of a mesh of some ranks of data times two of latents.

python -m tests.latents_worker ROWS RANK STORE OUT
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist

from saeforge.ops import Group
from tests.latents import train

CASES = {
    "topk": ("topk", {"k": 3, "aux": 0.5, "k_aux": 4}, torch.float64),
    "gated": ("gated", {"l1": 0.1}, torch.float64),
    "topk in bf16": ("topk", {"k": 3, "aux": 0.5, "k_aux": 4}, torch.bfloat16),
}


def main(n_rows: int, rank: int, store: str, out: str) -> None:
    """Trains each case and writes this rank's losses, weights and bytes to OUT.RANK."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2 * n_rows)
    rows = [dist.new_group([2 * row, 2 * row + 1]) for row in range(n_rows)]
    columns = [dist.new_group([2 * row + column for row in range(n_rows)]) for column in range(2)]
    latents, group = Group.of(rows[rank // 2]), Group.of(columns[rank % 2])
    found = {}
    for name, (variant, options, compute) in CASES.items():
        dtype = torch.float32 if compute == torch.bfloat16 else compute
        done = train(variant, options, latents, group, dtype=dtype, compute=compute)
        names = done.variant.latent_names
        found[name] = (done.losses, done.variant.state_dict(), done.sent, sorted(names))
    latents.barrier()
    torch.save(found, f"{out}.{rank}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
