"""What reaches wandb (read back from an offline run), the CSV log, and the progress bar."""

from __future__ import annotations

import csv
import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
import torch

from saeforge.cli.main import main
from saeforge.training.callbacks import DENSITY_EDGES, density_histogram
from tests.test_fit import arguments
from tests.toy import toy_dataset
from tests.wandb_file import contents

TRAIN = {"loss", "mse", "l0", "fvu", "dead", "tokens", "tokens_per_second"}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy dataset."""
    return toy_dataset(tmp_path_factory.mktemp("toy") / "acts")


def test_an_offline_wandb_run_holds_config_terms_metrics_and_histogram(dataset: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    args = arguments(dataset, run, **{"model.variant": "gated", "data.tokens": 256 * 20})
    logger = ["--trainer.logger=lightning.pytorch.loggers.WandbLogger", "--trainer.logger.offline=true"]
    assert main([*args, *logger]) == 0
    history, config = contents(run)
    named = TRAIN | {"aux", "l1", "log10_density"}
    assert {f"train/{name}" for name in named} | {"schedule/lr", "schedule/l1"} <= history
    assert {"val/fvu", "val/l0_mean", "val/dead", "val/cosine", "val/reconstruction_bias"} <= history
    assert config["config"]["model"]["variant"]["class_path"] == "saeforge.variants.Gated"
    assert config["resolved"]["dead_after_tokens"] == 256  # 5% of 5,120 tokens
    assert config["variant"]["distribution"] == "saeforge"
    assert config["data"]["site"]["id"] == "array:out"


def test_no_logger_writes_no_log(dataset: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert main(arguments(dataset, run, **{"trainer.logger": "false"})) == 0
    assert {path.name for path in run.iterdir()} == {"checkpoints", "sae", "config.yaml"}


def test_the_csv_log_holds_the_same_names(dataset: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert main(arguments(dataset, run)) == 0
    (file,) = (run / "csv").glob("version_*/metrics.csv")
    names = set(next(csv.reader(file.read_text().splitlines())))
    assert {f"train/{name}" for name in TRAIN | {"aux"}} <= names


def test_without_a_terminal_lines_show_l0_fvu_and_dead(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = [a for a in arguments(dataset, tmp_path / "run") if "enable_progress_bar" not in a]
    assert main(args) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert len(lines) == 10
    assert all(name in line for line in lines for name in ("loss", "l0", "fvu", "dead", "tokens/s", "left"))


def test_on_a_terminal_a_bar_shows_l0_fvu_and_dead(dataset: Path, tmp_path: Path) -> None:
    args = [a for a in arguments(dataset, tmp_path / "run") if "enable_progress_bar" not in a]
    shown = run_on_terminal([sys.executable, "-m", "saeforge.cli.main", *args])
    assert "training" in shown
    assert all(f"{name}:" in shown for name in ("l0", "fvu", "dead"))


def run_on_terminal(command: list[str]) -> str:
    """The output of a command whose stdout and stderr are a terminal 200 columns wide."""
    outside, inside = pty.openpty()
    fcntl.ioctl(inside, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 200, 0, 0))
    process = subprocess.Popen(command, stdout=inside, stderr=inside, env={**os.environ, "TERM": "xterm"})
    os.close(inside)
    parts = []
    while True:
        try:
            part = os.read(outside, 65536)
        except OSError:  # the terminal is gone with its last writer
            break
        if not part:
            break
        parts.append(part)
    os.close(outside)
    assert process.wait() == 0
    return b"".join(parts).decode(errors="replace")


def test_density_histogram_counts_every_latent_once() -> None:
    counts = torch.tensor([0, 1, 10, 1000])
    histogram, edges = density_histogram(counts, 1000.0)
    assert histogram.sum() == 4
    assert histogram[0] == 1  # never fired
    assert histogram[-1] == 1  # always fired: log10 = 0
    assert len(edges) == len(DENSITY_EDGES)
