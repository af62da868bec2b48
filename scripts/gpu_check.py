"""Runs every check that takes a GPU, each for itself, and writes a report. See gpu_check.sh.

    bash scripts/gpu_check.sh [--wheels DIR] [--out DIR] [--shapes A,B,C] [--parts NAMES] [--seconds 520]

Parts: `tests` (pytest -m gpu), `equality` (every kernel against float64 at the shapes, on poisoned memory), `sync` (a
step under set_sync_debug_mode("error")), `speed` (steps and kernels, against their floors, beside sparsify if it is
installed), `fit` (a bf16 run of the command on a small dataset). A part that fails is recorded, and the next one runs.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import datetime
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
import time
import traceback
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PARTS = ("tests", "equality", "sync", "speed", "fit")
#: What must be there, by the name of the import.
NEEDED = ("torch", "triton", "lightning", "transformers", "jsonargparse", "omegaconf", "isal", "webdataset", "wandb")
NEEDED_BY_TESTS = ("pytest", "pytest_timeout", "hypothesis")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheels", type=Path, help="folder of wheels for what is missing here")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/benchmarks", help="folder of the report")
    parser.add_argument("--parts", default=",".join(PARTS), help="which parts, by commas")
    parser.add_argument("--shapes", default="A,B,C", help="which shapes, by commas; `tiny` is for trying this out")
    parser.add_argument("--device", default="cuda", help="cpu: try this out in Triton's interpreter")
    parser.add_argument("--seconds", type=float, default=520, help="no part starts after that long")
    return parser.parse_args()


def unpack(wheels: Path, to: Path) -> list[str]:
    """Unpacks those wheels whose distribution is not installed, or not in a version that saeforge can use."""
    wanted = {}
    with contextlib.suppress(ImportError):
        from packaging.requirements import Requirement
        from packaging.utils import canonicalize_name

        text = (ROOT / "pyproject.toml").read_text()
        block = re.search(r"^dependencies = \[(.*?)^\]", text, re.S | re.M)
        for line in re.findall(r'^\s*"([^"]+)"', block[1] if block else "", re.M):
            requirement = Requirement(line)
            wanted[canonicalize_name(requirement.name)] = requirement.specifier
    done = []
    for wheel in sorted(wheels.glob("*.whl")):
        name = re.sub(r"[-_.]+", "-", wheel.name.split("-")[0]).lower()
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            version = None
        if version is None or (name in wanted and not wanted[name].contains(version, prereleases=True)):
            zipfile.ZipFile(wheel).extractall(to)
            done.append(wheel.name)
    return done


def environment(device: str) -> dict[str, Any]:
    """Versions and hardware; raises ModuleNotFoundError naming everything that is missing."""
    missing = [name for name in (*NEEDED, *NEEDED_BY_TESTS) if importlib.util.find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(f"not installed, and not among the wheels: {', '.join(missing)}")
    import torch

    names = ("torch", "triton", "lightning", "transformers", "numpy", "eai-sparsify")
    versions = {}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    about: dict[str, Any] = {"python": platform.python_version(), "versions": versions, "cuda": torch.version.cuda}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        about |= {"gpu": properties.name, "memory_gib": round(properties.total_memory / 2**30, 1)}
        about["processors"] = properties.multi_processor_count
        query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"]
        with contextlib.suppress(OSError):
            about["driver"] = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    else:
        about["gpu"] = "none, Triton's interpreter"
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    about["commit"] = commit.stdout.strip() or "unknown"
    return about


def run_tests(seconds: float) -> dict[str, Any]:
    """pytest -m gpu over the files that hold such tests."""
    files = [str(f) for f in sorted((ROOT / "tests").glob("test_*.py")) if "mark.gpu" in f.read_text()]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "--durations=5", *files]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds)
    lines = done.stdout.strip().splitlines()
    if done.returncode:
        raise AssertionError("\n".join(lines[-60:]) + done.stderr[-2000:])
    return {"summary": lines[-1], "files": len(files)}


def run_fit(device: str, seconds: float) -> dict[str, Any]:
    """`saeforge fit` in bf16 on rows with sparse structure; its loss must fall, and the SAE must be there."""
    import torch

    from saeforge.data.writer import write_dataset

    small = device == "cpu"
    d, d_sae, k, batch, steps, n = (32, 128, 4, 64, 12, 4096) if small else (256, 8192, 16, 2048, 150, 1 << 17)
    directions = torch.nn.functional.normalize(torch.randn(3 * d, d), dim=1)
    strengths = torch.rand(n, 3 * d) * (torch.rand(n, 3 * d) < 0.02)
    rows = (strengths @ directions + 0.3 * torch.randn(d)).bfloat16()
    with tempfile.TemporaryDirectory() as folder:
        write_dataset(Path(folder) / "acts", {"train": rows, "validation": rows[:2048]}, dtype="bfloat16")
        options = {
            "run": f"{folder}/run",
            "data.path": f"{folder}/acts",
            "data.batch_size": batch,
            "data.tokens": batch * steps,
            "model.variant": "topk",
            "model.variant.d_sae": d_sae,
            "model.variant.k": k,
            "model.lr": 0.001,
            "trainer.accelerator": "cpu" if small else "gpu",
            "trainer.precision": "bf16-mixed",
            "trainer.log_every_n_steps": 1,
            "trainer.enable_progress_bar": "false",
        }
        command = [sys.executable, "-m", "saeforge.cli.main", "fit"]
        command += [f"--{name}={value}" for name, value in options.items()]
        # Without a GPU there is nothing to try but the rest of the command.
        environment = {**os.environ, "SAEFORGE_OPS": "auto"} if small else None
        begin = time.perf_counter()
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=seconds)
        if done.returncode:
            raise AssertionError((done.stdout + done.stderr)[-4000:])
        losses = []
        for file in sorted(Path(folder, "run/csv").glob("version_*/metrics.csv")):
            with file.open() as text:
                losses += [float(row["train/loss"]) for row in csv.DictReader(text) if row.get("train/loss")]
        saved = sorted(path.name for path in Path(folder, "run/sae").iterdir())
    assert losses[-1] < losses[0], f"the loss did not fall: {losses[0]} to {losses[-1]}"
    return {"first_loss": losses[0], "last_loss": losses[-1], "seconds": time.perf_counter() - begin, "saved": saved}


def attempt(report: dict[str, Any], name: str, deadline: float, function: Callable[[], Any]) -> None:
    """Calls a part and records its result, or the error, under its name; after the deadline it does not begin."""
    entry: dict[str, Any] = {"status": "passed"}
    report["parts"][name] = entry
    begin = time.perf_counter()
    print(f"== {name}", flush=True)
    try:
        if begin > deadline:
            raise TimeoutError("no time left for it")
        entry["result"] = function()
    except Exception as error:
        entry |= {"status": "failed", "error": f"{type(error).__name__}: {error}"[:4000]}
        traceback.print_exc()
    entry["seconds"] = round(time.perf_counter() - begin, 1)
    print(f"== {name}: {entry['status']}, {entry['seconds']} s", flush=True)


def run(options: argparse.Namespace, report: dict[str, Any]) -> None:
    """All parts that were asked for."""
    begin = time.perf_counter()
    deadline = begin + options.seconds
    parts, shapes = options.parts.split(","), options.shapes.split(",")
    attempt(report, "environment", deadline, lambda: report.update(about=environment(options.device)))
    if report["parts"]["environment"]["status"] == "failed":
        return
    import gpu_check_equality as equality
    import gpu_check_speed as speed

    def left(most: float) -> float:
        return max(10.0, min(most, deadline - time.perf_counter()))

    steps: list[tuple[str, str, Callable[[], Any]]] = [("tests", "tests", lambda: run_tests(left(170)))]
    for shape in shapes:
        steps.append(("equality", f"equality {shape}", lambda s=shape: equality.check(s, options.device)))
    steps.append(("sync", "sync", lambda: speed.check_sync(shapes[0], options.device)))
    steps.append(("speed", "rates", lambda: report.update(rates=speed.rates(options.device))))
    for shape in shapes:
        steps.append(("speed", f"speed {shape}", lambda s=shape: speed.measure(s, options.device, report.get("rates"))))
    steps.append(("fit", "fit", lambda: run_fit(options.device, left(120))))
    for kind, name, function in steps:
        if kind in parts:
            attempt(report, name, deadline, function)


def main() -> int:
    """Everything; returns the exit code."""
    options = arguments()
    report: dict[str, Any] = {
        "command": "bash scripts/gpu_check.sh " + shlex.join(sys.argv[1:]),
        "date": datetime.date.today().isoformat(),
        "parts": {},
    }
    sys.path[:0] = [str(ROOT)]
    with tempfile.TemporaryDirectory() as site:
        if options.wheels:
            report["wheels"] = unpack(options.wheels, Path(site))
            sys.path.insert(1, site)
            os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), site, os.environ.get("PYTHONPATH", "")])
        try:
            run(options, report)
        finally:
            failed = [name for name, entry in report["parts"].items() if entry["status"] != "passed"]
            report["failed"] = failed
            from gpu_check_report import markdown  # it imports nothing that may be missing

            gpu = re.sub(r"[^A-Za-z0-9]+", "-", report.get("about", {}).get("gpu", "unknown")).strip("-").lower()
            options.out.mkdir(parents=True, exist_ok=True)
            stem = options.out / f"{report['date']}-step-{gpu}"
            stem.with_suffix(".json").write_text(json.dumps(report, indent=1, default=str) + "\n")
            stem.with_suffix(".md").write_text(markdown(report))
            print(f"== report: {stem}.md")
    print(f"== FAILED: {', '.join(failed)}" if failed else "== all parts passed")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
