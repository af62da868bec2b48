"""A server of harvesting processes for tests: it has torch and transformers loaded, and forks one child per harvest.

Run as `python -m tests.harvest_processes`. Each line on stdin is a JSON list of jobs that run side by side; the answer
is one line, a list of results. A job: `options` of the harvest, and maybe `environment`, `slow` (seconds that a bucket
takes longer), and `at`: the number of the step, or [kind, number], at which `signal` (SIGKILL) is sent to the process
itself, or from which on the disk is full (`signal` "full"). A result: exit `status` (negative for a signal), `out`,
`err`, `steps` (what was about to be done, in order) and `made` (buckets written).
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import json
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, AutoTokenizer  # noqa: F401 (these too)

from saeforge.cli.main import main
from saeforge.data import tario
from saeforge.data.moments import Moments
from saeforge.data.writer import DatasetWriter
from saeforge.lm.capture import Capture
from saeforge.lm.tokens import Cutter

WHERE = {"index": "record", "rows": "shard", "tokens": "tokens"}


class Steps:
    """Counts what a harvest does, and ends it at a given step."""

    def __init__(self, log: Path, at: int | tuple[str, int] | None, what: str) -> None:
        self.log = log.open("w", buffering=1)
        self.kind: str | None = None if at is None or isinstance(at, int) else at[0]
        self.at: int | None = at if at is None or isinstance(at, int) else at[1]
        self.what = what
        self.count = 0
        self.lock = threading.Lock()

    def step(self, label: str) -> None:
        with self.lock:
            self.count += self.kind in (None, label)
            self.log.write(label + "\n")
            count = self.count
        if self.at is None or count < self.at:
            return
        if self.what == "full" and label.split()[0] in ("fsync", "rename", "header"):
            raise OSError(errno.ENOSPC, "No space left on device")
        if self.what != "full" and count == self.at and self.kind in (None, label):
            os.kill(os.getpid(), getattr(signal, self.what))

    def before(self, holder: Any, name: str, label: Callable[..., str]) -> None:
        original = getattr(holder, name)

        def wrapped(*args: Any, **options: Any) -> Any:
            self.step(label(*args))
            return original(*args, **options)

        setattr(holder, name, wrapped)


def _kind(path: Path) -> str:
    if path.parent.name in ("index", "tokens"):
        return WHERE[path.parent.name]
    return {"dataset.json": "card", "manifest.json": "manifest"}.get(path.name, "shard")


def _child(job: dict[str, Any], folder: Path) -> int:
    os.environ.update(job.get("environment", {}))
    steps = Steps(folder / "steps", job.get("at"), job.get("signal", "SIGKILL"))
    made = (folder / "made").open("w", buffering=1)
    steps.before(Cutter, "cut", lambda *a: "cut")
    steps.before(Capture, "__call__", lambda *a: "forward")
    steps.before(Moments, "merge", lambda *a: "merge")
    steps.before(tario, "npy_header", lambda *a: "header")
    steps.before(os, "fsync", lambda *a: "fsync")
    rename = Path.rename

    def stepped_rename(self: Path, to: Path) -> None:
        steps.step(f"rename {_kind(to)}")
        rename(self, to)
        steps.step(f"renamed {_kind(to)}")

    Path.rename = stepped_rename  # type: ignore[assignment, method-assign]
    steps.before(DatasetWriter, "finish", lambda *a: "finish")
    original = DatasetWriter.write_bucket

    def write_bucket(self: DatasetWriter, split: str, bucket: int, *args: Any, **options: Any) -> None:
        steps.step("bucket")
        time.sleep(job.get("slow", 0))
        original(self, split, bucket, *args, **options)
        made.write(f"{split}-{bucket}\n")

    DatasetWriter.write_bucket = write_bucket  # type: ignore[method-assign]
    argv = [f"--{k}={json.dumps(v) if isinstance(v, list | None) else v}" for k, v in job["options"].items()]
    return int(main(["harvest", *argv]))


def _start(job: dict[str, Any], folder: Path) -> int:
    folder.mkdir()
    pid = os.fork()
    if pid:
        return pid
    status = 99
    try:
        with (folder / "out").open("w") as out, (folder / "err").open("w") as err:
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
        with contextlib.suppress(SystemExit):
            status = _child(job, folder)
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        import traceback

        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(status)


def _serve() -> None:
    torch.set_num_threads(1)
    for module in ("saeforge.cli.harvest", "saeforge.harvest.run", "transformers.models.llama.modeling_llama"):
        importlib.import_module(module)  # children find them loaded
    for line in sys.stdin:
        with tempfile.TemporaryDirectory() as name:
            jobs = json.loads(line)
            folders = [Path(name) / str(number) for number in range(len(jobs))]
            pids = [_start(job, folder) for job, folder in zip(jobs, folders, strict=True)]
            results = []
            for pid, folder in zip(pids, folders, strict=True):
                status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                texts = {key: (folder / key).read_text() for key in ("out", "err", "steps", "made")}
                lists = {key: texts[key].splitlines() for key in ("steps", "made")}
                results.append({"status": status, **texts, **lists})
        print(json.dumps(results), flush=True)


if __name__ == "__main__":
    _serve()
