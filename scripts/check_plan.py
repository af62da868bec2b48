"""Memory of real runs on the CPU beside what `saeforge plan` says of them; exit code 1 if one is off by more than 20%.

    python scripts/check_plan.py              # three shapes, a process each, about half a minute on a quiet core

A process is measured from what it holds just before `saeforge.train` (everything imported and run once, the rows in
memory) to its peak, by the kernel's own count.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

TOLERANCE = 0.20
STEPS = 6
#: d_in, d_sae, k, batch, precision: wide rows, many latents, and the shape of docs/speed.md.
SHAPES = (
    (512, 16_384, 16, 1024, "32-true"),
    (256, 65_536, 16, 512, "bf16-mixed"),
    (768, 12_288, 32, 2048, "bf16-mixed"),
)


def resident(field: str) -> int:
    """Bytes of this process: VmRSS now, or VmHWM, the most so far."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def work(d_in: int, d_sae: int, k: int, batch: int, precision: str) -> dict[str, int]:
    """One run; returns bytes held before it, the most during it, and the rows of a block."""
    import torch

    import saeforge
    from saeforge.data.tensor_source import TensorSource

    options = {"precision": precision, "progress": False, "training": {"dead_after_tokens": 10**9}}
    small = torch.randn(4096, 64).bfloat16()
    saeforge.train(small, d_sae=256, k=8, batch_size=256, tokens=256 * 4, **options)
    x = torch.empty(40_000, d_in, dtype=torch.bfloat16)
    for part in x.split(4096):
        part.copy_(torch.randn(len(part), d_in))
    block_rows = TensorSource(x).block_rows("train")
    before = resident("VmRSS")
    saeforge.train(x, d_sae=d_sae, k=k, batch_size=batch, tokens=batch * STEPS, **options)
    return {"before": before, "peak": resident("VmHWM"), "block_rows": block_rows}


def check(shape: tuple[int, int, int, int, str]) -> bool:
    """Runs one shape in a process of its own and prints a line; whether the plan is close enough."""
    from saeforge.scaling import DEVICES, Layout, Shape, memory

    command = [sys.executable, __file__, "--worker", *map(str, shape)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"the run died:\n{done.stderr[-2000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    d_in, d_sae, k, batch, precision = shape
    planned = memory(
        Shape(d_in, d_sae, k, batch, precision=precision, block_rows=found["block_rows"]), Layout(), DEVICES["cpu"]
    )["peak"]
    measured = found["peak"] - found["before"]
    off = planned / measured - 1
    print(
        f"d_in {d_in:4}  d_sae {d_sae:6}  k {k:3}  batch {batch:4}  {precision:10}  "
        f"measured {measured / 1e6:7.1f} MB  planned {planned / 1e6:7.1f} MB  {off:+.1%}",
        flush=True,
    )
    return abs(off) <= TOLERANCE


def main() -> int:
    """Checks all shapes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", nargs=5, help=argparse.SUPPRESS)
    worker = parser.parse_args().worker
    if worker:
        print(json.dumps(work(*map(int, worker[:4]), worker[4])))
        return 0
    return 0 if all([check(shape) for shape in SHAPES]) else 1


if __name__ == "__main__":
    sys.exit(main())
