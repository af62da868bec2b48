"""The worker's end of the step benchmark: batches from a file, timed step by step, at the parent's command.

A contender of bench_step.py is a process of its own, so that memory, allocator and threads are separate. It is written
as a loop over `Gate.batches()`, whoever's loop that is, and obeys lines on stdin: `run N` takes N steps and answers one
line of JSON on stdout, `quit` ends the loop. While it waits it sleeps on stdin. Needs torch alone: the peers'
environments have nothing of saeforge.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class Gate:
    """Hands out batches and answers for them.

    Args:
        job: `data` (a raw file of bf16 rows), `d_in`, `batch`, `n_batches`, `threads`; more is the contender's.

    Attributes:
        losses: the contender appends one (detached) loss a step.
        figures: called after a run, outside of the timing; what it returns goes into the answer.
    """

    def __init__(self, job: dict[str, Any]) -> None:
        self.job = job
        self.losses: list[Tensor | float] = []
        self.figures: Callable[[], dict[str, Any]] = dict
        # Whatever else is printed to stdout would break the protocol: it goes to stderr.
        self._answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        torch.set_num_threads(job["threads"])
        self._file = os.open(job["data"], os.O_RDONLY)
        self._next = 0
        self._base = 0.0

    def rows(self, start: int, count: int) -> Tensor:
        """(count, d_in) bf16 rows of the file, in memory of their own."""
        width = 2 * self.job["d_in"]
        data = bytearray(os.pread(self._file, count * width, start * width))
        return torch.frombuffer(data, dtype=torch.bfloat16).view(count, -1)

    def imported(self, *packages: str) -> None:
        """Says that all imports are done: memory counts from here on. Versions of `packages` go into the report."""
        self._base = memory("VmRSS")
        self._versions = {name: metadata.version(name) for name in ("torch", *packages)}

    def batches(self) -> Iterator[Tensor]:
        """(batch, d_in) bf16 batches in the file's order, over and over; the time until the next one is asked for is
        the time of a step. Reading the file is not in it."""
        batch, n_batches = self.job["batch"], self.job["n_batches"]
        self._say({"versions": self._versions, "threads": torch.get_num_threads()})
        for line in sys.stdin:
            command, *words = line.split()
            if command == "quit":
                return
            seconds: list[float] = []
            self.losses.clear()
            reset_peak()
            cpu = time.process_time()
            for _ in range(int(words[0])):
                rows = self.rows(self._next * batch, batch)
                self._next = (self._next + 1) % n_batches
                start = time.perf_counter()
                yield rows
                seconds.append(time.perf_counter() - start)
            answer = {"seconds": seconds, "peak_mib": memory("VmHWM") - self._base, "cpu": time.process_time() - cpu}
            self._say({**answer, "losses": [float(loss) for loss in self.losses], **self.figures()})

    def _say(self, answer: dict[str, Any]) -> None:
        self._answers.write(json.dumps(answer) + "\n")
        self._answers.flush()


def memory(name: str) -> float:
    """MiB of this process: VmRSS, what it has now; VmHWM, the most it has had since `reset_peak`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) / 1024
    return float("nan")


def reset_peak() -> None:
    """Lets VmHWM start from what is in memory now; where the system forbids that, it stays the most of all time."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass
