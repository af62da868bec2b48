"""A dictionary of a million latents trains on a CPU, within the memory that `saeforge plan` says."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from saeforge import scaling
from saeforge.scaling import DEVICES, Layout, Shape

D, D_SAE, K, BATCH, GIB = 256, 2**20, 32, 64, 2**30

RUN = f"""
import json, resource, torch
import saeforge
from lightning.pytorch import Callback

class Losses(Callback):
    losses, dead = [], []
    def on_train_batch_end(self, trainer, module, outputs, *args):
        self.losses.append(float(outputs["loss"]))
        self.dead.append(int(module.members[0].variant.dead().sum()))

x = torch.randn(4096, {D}, generator=torch.Generator().manual_seed(0))
# Nearly all latents count as dead from the second step on, which is the most that AuxK can need.
saeforge.train(
    x, d_sae={D_SAE}, k={K}, batch_size={BATCH}, tokens={BATCH} * 3, progress=False,
    training={{"dead_after_tokens": {BATCH}}}, trainer={{"accelerator": "cpu", "callbacks": [Losses()]}},
)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({{"peak": peak, "losses": Losses.losses, "dead": Losses.dead}}))
"""


def available() -> int:
    """Bytes of memory that a process may take."""
    lines = Path("/proc/meminfo").read_text().splitlines() if sys.platform == "linux" else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), 0)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(available() < 15 * GIB, reason="needs Linux with 15 GiB of memory to spare")
def test_a_million_latents_train_on_a_cpu_within_14_gib() -> None:
    """Three steps, a validation after each, and the folded SAE at the end."""
    done = subprocess.run([sys.executable, "-c", RUN], capture_output=True, text=True, timeout=3500, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found["losses"]) == 3
    assert all(map(math.isfinite, found["losses"]))
    assert found["dead"][0] > 0.9 * D_SAE
    assert found["peak"] < 14 * GIB
    shape = Shape(D, D_SAE, K, BATCH, precision="32-true", number_bytes=4, block_rows=16)
    planned = scaling.memory(shape, Layout(), DEVICES["cpu"])["peak"]
    assert found["peak"] == pytest.approx(planned, rel=0.2)
