"""Bytes that a step of `fit` exchanges, counted where they are handed over, are those that `saeforge plan` says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from saeforge import scaling
from saeforge.scaling import Layout, Shape
from tests.bytes_worker import BATCH, D_SAE, LAYOUTS, STEPS, K
from tests.toy import D_IN, toy_dataset

ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="ranks are forked")
def test_the_bytes_of_a_step_are_those_of_the_plan(tmp_path: Path) -> None:
    """Under DDP, over latents, and over both; and while latents are dead what AuxK adds, by `ops.shards`."""
    dataset, out = toy_dataset(tmp_path / "acts", rows=2048), tmp_path / "out.json"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-m", "tests.bytes_worker", str(dataset), str(out)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=170, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    shape = Shape(D_IN, D_SAE, K, BATCH, precision="32-true", number_bytes=4)
    for data, latents in LAYOUTS:
        planned = scaling.traffic(shape, Layout(data, latents))
        ranks = json.loads(out.read_text())[f"{data}x{latents}"]
        rows, k_aux = BATCH // data, D_IN // 2
        for number, steps in enumerate(ranks):
            group = range(number - number % latents, number - number % latents + latents)
            seen = set()
            for step, found in enumerate(steps):
                dead = [ranks[each][step - 1]["dead"] if step else 0 for each in group]
                seen.add(sum(dead) > k_aux)
                assert found["gradients"] == planned["gradients"]
                sums = 8 * D_IN + 8 + 8 if any(dead) and data > 1 else 0  # of the residual, rows, squares, in float64
                assert found.get("data sum", 0) == planned["counts"] + sums
                second = 4 * rows * D_IN if any(dead) and latents > 1 else 0
                assert found.get("latents sum", 0) == planned["reconstruction"] + planned["sums"] + second
                candidates = 4 * rows * min(k_aux, max(dead)) if sum(dead) > k_aux and latents > 1 else 0
                assert found.get("latents gather", 0) == planned["candidates"] + candidates
            assert seen == {True, False}
            copied = sum(found.get("latents copy", 0) for found in steps)
            first = number % latents == 0
            assert copied == (STEPS * (planned["rows"] + planned["copies"]) if first else 0)
