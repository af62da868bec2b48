"""A run that dies ten times has the weights of one that never did: on one rank, on two, and with live activations."""

from __future__ import annotations

import os
import random
import signal
import subprocess
from pathlib import Path

import pytest

from tests.test_fit import CLI, arguments, assert_same, interrupt, weights
from tests.test_live import arguments as live_arguments
from tests.test_live import home as home  # a fixture
from tests.toy import toy_dataset

pytestmark = pytest.mark.slow
STEPS, DEATHS = 60, 10


def fit(args: list[str], ranks: int) -> subprocess.CompletedProcess[str]:
    """One process of its own, as a user starts it; two ranks start each other."""
    devices = ["--trainer.devices=2", "--trainer.strategy=ddp"] if ranks == 2 else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.run(
        [*CLI, *args, *devices], env=environment, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.mark.parametrize(("source", "ranks"), [("shards", 1), ("shards", 2), ("live", 1)])
def test_a_run_that_is_killed_ten_times_has_the_same_bits(source: str, ranks: int, tmp_path: Path, home: Path) -> None:
    """Each rank kills itself right after a step, never asking; checkpoints lie six steps apart."""
    dataset = toy_dataset(tmp_path / "acts")

    def args(run: Path) -> list[str]:
        if source == "live":
            return live_arguments(home, run, "--data.sites=resid_post.2")
        options = {"model.dead_after_tokens": 1024, "data.tokens": 256 * STEPS}
        return arguments(dataset, run, **options)

    done = fit(args(tmp_path / "whole"), ranks)
    assert done.returncode == 0, done.stderr[-2000:]
    parts = tmp_path / "parts"
    for step in sorted(random.Random(ranks).sample(range(1, STEPS), DEATHS)):
        resume = ["--ckpt_path=last"] if (parts / "checkpoints" / "last.ckpt").exists() else []
        callback = interrupt(step, signal.SIGKILL)["trainer.callbacks"]
        died = fit([*args(parts), *resume, f"--trainer.callbacks={callback}"], ranks)
        assert died.returncode == -signal.SIGKILL, died.stderr[-2000:]
        assert not (parts / "sae").exists()
    done = fit([*args(parts), "--ckpt_path=last"], ranks)
    assert done.returncode == 0, done.stderr[-2000:]
    assert_same(weights(tmp_path / "whole"), weights(parts))
