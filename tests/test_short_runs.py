"""Ranks of unequal hosts never wait for each other in vain, whatever happens to one of them, and compute the same."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from saeforge.training.watchdog import LOST_RANK
from tests.short_runs import STEPS, fate_of
from tests.toy import toy_dataset

ROOT, RUNS = Path(__file__).parents[1], 100


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.skipif(not hasattr(os, "fork"), reason="ranks are forked")
def test_no_hang_in_a_hundred_short_runs(tmp_path: Path) -> None:
    """Each with delays of its own, of both strategies; in ten a rank is killed, in ten one is told to stop."""
    files = [str(toy_dataset(tmp_path / "acts", rows=2048)), str(tmp_path / "runs"), str(tmp_path / "out.json")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-m", "tests.short_runs", *files, str(RUNS), "ddp", "latent_parallel"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=7000, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    runs = json.loads((tmp_path / "out.json").read_text())
    assert len(runs) == RUNS
    weights: dict[str, set[str]] = {}
    for run in runs:
        fate = fate_of(run["run"])
        if fate == signal.SIGKILL:
            assert sorted(run["codes"]) == [-signal.SIGKILL, LOST_RANK], run
            assert run["saved"] is None or run["saved"] % 2 == 0, run
            assert f"saeforge: error: rank {run['codes'].index(-signal.SIGKILL)} (process" in done.stderr
            continue
        assert run["codes"] == [0, 0], run
        if fate is None or run["saved"] == STEPS:
            assert run["saved"] == STEPS, run
            weights.setdefault(run["strategy"], set()).add(run["weights"])
        else:
            assert run["saved"] % 8 == 0, run  # when ranks ask each other
            assert run["weights"] is None, run
    assert len(weights) == 2
    assert all(len(each) == 1 and None not in each for each in weights.values()), "delays changed what was trained"
