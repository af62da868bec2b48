"""Two gloo ranks compute what one rank computes with the same global batch."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ddp_worker import PLUGINS, STEPS
from tests.test_fit import CLI, arguments
from tests.toy import toy_dataset

ROOT = Path(__file__).parents[1]


def losses(dataset: Path, out: Path, ranks: int) -> dict[str, list[dict[str, float]]]:
    """Runs the worker on so many processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "tests.ddp_worker", str(dataset), str(out)]
    if ranks > 1:
        launch = [f"--nproc-per-node={ranks}", "--master-addr=127.0.0.1", f"--master-port={port}"]
        command = [sys.executable, "-m", "torch.distributed.run", *launch, *command[1:]]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    result: dict[str, Any] = json.loads(out.read_text())
    return result


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    """Losses of one rank and of two."""
    folder = tmp_path_factory.mktemp("ddp")
    dataset = toy_dataset(folder / "acts")
    return losses(dataset, folder / "one.json", 1), losses(dataset, folder / "two.json", 2)


@pytest.mark.parametrize("variant", ["TopK", "L1ReLU", "Gated", "everything", "MultiTopK", *PLUGINS])
def test_two_ranks_give_the_losses_of_one(variant: str, both: tuple[dict[str, Any], dict[str, Any]]) -> None:
    if variant in PLUGINS and variant not in both[0]:
        pytest.skip(f"saeforge-{variant} is not installed")
    one, two = (result[variant] for result in both)
    assert len(one) == len(two) == STEPS
    for step, (alone, shared) in enumerate(zip(one, two, strict=True)):
        assert shared["loss"] == pytest.approx(alone["loss"], rel=1e-5), step
        # Adam divides rounding noise by itself where a gradient is near 0, so weights part sooner than the loss.
        assert shared["fvu"] == pytest.approx(alone["fvu"], rel=1e-4), step
        assert shared["dead"] == alone["dead"], step
        assert shared["l0"] == pytest.approx(alone["l0"], rel=1e-3), step
    if variant == "TopK":
        assert max(step["dead"] for step in one) > 0  # or AuxK was not compared


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.slow)])
def test_two_ranks_told_to_stop_save_together_and_one_rank_goes_on(number: signal.Signals, tmp_path: Path) -> None:
    """The signal reaches the first process only, as a job scheduler may send it."""
    dataset, run = toy_dataset(tmp_path / "acts"), tmp_path / "run"
    options = {"data.tokens": 256 * 1000, "trainer.strategy": "ddp"}
    args = arguments(dataset, run, **options)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    log = (tmp_path / "log").open("w+")
    process = subprocess.Popen([*CLI, *args, "--trainer.devices=2"], stdout=log, stderr=log, env=environment)
    deadline = time.monotonic() + 90
    while not (run / "config.yaml").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(1.0)
    process.send_signal(number)
    code = process.wait(timeout=60)
    log.seek(0)
    said = log.read()
    log.close()
    assert code == 128 + number, said
    assert f"stopped by {number.name}" in said
    assert (run / "checkpoints" / "last.ckpt").is_file()
    assert not (run / "sae").exists()
    stopped = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]
    assert 0 < stopped < 1000
    resumed = [*CLI, *args, "--trainer.devices=1", "--ckpt_path=last"]
    done = subprocess.run(resumed, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (run / "sae").is_dir()
