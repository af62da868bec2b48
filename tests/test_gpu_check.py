"""The GPU check, as far as it goes without one: a small run in Triton's interpreter, and what becomes of failures."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """scripts/gpu_check.py."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module("gpu_check")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed here")
def test_all_of_it_runs_in_the_interpreter(tmp_path: Path) -> None:
    options = ["--device", "cpu", "--shapes", "tiny", "--parts", "equality,sync,speed,fit", "--out", str(tmp_path)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "SAEFORGE_OPS": "triton", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "scripts/gpu_check.py"), *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = tmp_path.glob("*.json")
    report = json.loads(file.read_text())
    assert {entry["status"] for entry in report["parts"].values()} == {"passed"}
    assert len(report["parts"]["equality tiny"]["result"]) == 7
    assert report["parts"]["speed tiny"]["result"]["kernels"]["scatter_outer"]["calls"] == 2
    text = file.with_suffix(".md").read_text()
    assert "| gather_sum |" in text
    assert "**" not in text  # no failure


def test_a_part_that_fails_is_reported_and_the_next_one_runs(script: ModuleType) -> None:
    def wrong() -> None:
        raise ValueError("wrong sum")

    report: dict[str, Any] = {"parts": {}, "date": "2026-01-01", "command": "x"}
    later = time.perf_counter() + 60
    script.attempt(report, "first", later, wrong)
    script.attempt(report, "second", later, lambda: {"loss": 1.0})
    script.attempt(report, "third", 0.0, lambda: pytest.fail("there is no time left"))
    statuses = [entry["status"] for entry in report["parts"].values()]
    assert statuses == ["failed", "passed", "failed"]
    markdown = importlib.import_module("gpu_check_report").markdown(report)
    assert "**first failed**" in markdown
    assert "ValueError: wrong sum" in markdown
    assert "no time left" in markdown


def test_only_wheels_of_what_is_missing_or_too_old_are_unpacked(script: ModuleType, tmp_path: Path) -> None:
    wheels, site = tmp_path / "wheels", tmp_path / "site"
    wheels.mkdir()
    for name in ("pytest-1.0-py3-none-any.whl", "saeforge_absent_thing-1.0-py3-none-any.whl"):
        with zipfile.ZipFile(wheels / name, "w") as wheel:
            wheel.writestr(f"{name.split('-')[0]}_unpacked.py", "")
    assert script.unpack(wheels, site) == ["saeforge_absent_thing-1.0-py3-none-any.whl"]
    assert [path.name for path in site.iterdir()] == ["saeforge_absent_thing_unpacked.py"]


def test_what_is_missing_is_named_all_at_once(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "NEEDED", ("torch", "absent_one", "absent_two"))
    with pytest.raises(ModuleNotFoundError, match="absent_one, absent_two"):
        script.environment("cpu")
