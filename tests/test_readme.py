"""Every command and every block of Python in README.md works."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import saeforge
from saeforge.cli.main import main
from tests.readme import ROOT, blocks, commands
from tests.toy import toy_dataset

SMALL_FIT = ["--data.tokens=20480", "--trainer.logger=false", "--trainer.enable_progress_bar=false"]
# What makes a command small enough for a test: its first words -> arguments that are added.
SHORTER: dict[tuple[str, ...], list[str]] = {
    ("saeforge", "harvest"): ["--n_tokens", "40000"],
    ("saeforge", "plan"): [],
    ("saeforge", "fit", "--config", "configs/quickstart/fit.yaml"): SMALL_FIT,
    ("saeforge", "fit", "--config", "configs/gpu/topk-64k.yaml"): [
        *SMALL_FIT,
        "--model.variant.d_sae=256",
        "--model.variant.k=4",
        "--data.batch_size=256",
        "--trainer.accelerator=cpu",
        "--trainer.devices=1",
    ],
    ("saeforge", "evaluate"): ["--effect_tokens", "500"],
    ("saeforge", "features", "build"): [],
    ("saeforge", "features", "concepts"): ["--labels", "french,python", "--random_draws", "1", "--resamples", "20"],
    ("saeforge", "features", "show"): [],
    ("saeforge", "features", "search"): [],
    ("saeforge", "report"): [],
    ("saeforge", "steer"): ["--max_new_tokens", "4"],
    ("saeforge", "export"): [],
    ("saeforge", "import"): [],
    ("saeforge", "variants"): [],
    ("saeforge", "new-variant"): [],
    ("saeforge", "bench-synthetic"): ["--variants", "[topk]", "--samples", "20480", "--seeds", "1", "--l0", "[8]"],
}
SCRIPTS = {("bash", "scripts/quickstart.sh"), ("bash", "scripts/test.sh")}  # run by the slow test, and by CI


@pytest.mark.timeout(600)  # a minute alone; machines are shared
def test_every_command_works_and_then_the_python_that_steers(tmp_path: Path) -> None:
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    toy_dataset(tmp_path / "data" / "my-activations")
    os.chdir(tmp_path)
    seen = 0
    for command in commands():
        if tuple(command) in SCRIPTS:
            continue
        matching = [more for prefix, more in SHORTER.items() if tuple(command[: len(prefix)]) == prefix]
        assert len(matching) == 1, f"README.md has a command that no test runs: {' '.join(command)}"
        assert main([*command[1:], *matching[0]]) == 0, command
        seen += 1
    assert seen >= 10
    assert (tmp_path / "runs" / "quickstart" / "evaluation.json").is_file()
    (source,) = [block for block in blocks("python") if "saeforge.steer" in block]
    printed = run_python(source, tmp_path)
    assert "The bridge was built" in printed
    assert "clamp:0" in printed


def test_the_python_works(tmp_path: Path) -> None:
    source = next(block for block in blocks("python") if "saeforge.train" in block)
    assert "torch.Size([4, 64])" in run_python(source, tmp_path)
    assert saeforge.load(tmp_path / "my-sae").d_sae == 512


def run_python(source: str, folder: Path) -> str:
    """What a block of Python prints."""
    command = [sys.executable, "-c", source]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=170, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_link_leads_somewhere() -> None:
    import re

    for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / "README.md").read_text()):
        assert target.startswith("http") or (ROOT / target).exists(), target


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_quickstart_from_a_fresh_clone_twice(tmp_path: Path) -> None:
    if shutil.which("git") is None:
        pytest.skip("needs git to clone this repository")
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
    for _ in range(2):
        command = ["bash", "scripts/quickstart.sh"]
        done = subprocess.run(command, cwd=clone, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "FVU" in done.stdout
    assert "already" in done.stdout
