"""Runs the tests of the Triton kernels in Triton's interpreter; and compiles the kernels for an absent GPU."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed here")


def run(*arguments: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    return done.stdout


def test_the_kernels_pass_their_tests_in_the_interpreter() -> None:
    options = ["-q", "-x", "-p", "no:cacheprovider", "-m", "not gpu", "--timeout=120"]
    files = ["tests/test_triton.py", "tests/test_triton_step.py"]
    printed = run("-m", "pytest", *options, *files, TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")
    assert " passed" in printed


def test_the_kernels_compile_for_an_h100(tmp_path: Path) -> None:
    printed = run("-m", "tests.triton_compile", SAEFORGE_OPS="triton", TRITON_CACHE_DIR=str(tmp_path))
    assert {line.split()[0] for line in printed.splitlines()} == {
        *("_gather_sum", "_row_dots", "_whole_blocks", "_scatter_outer"),
        *("_candidates", "_choose", "_count_above", "_take_above"),
        *("_row_norms", "_scalars", "_row_adam"),
    }
