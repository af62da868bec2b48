"""Data parallelism: ranks that share a batch have the loss and the gradient of the whole batch."""

from __future__ import annotations

import importlib
import json
import operator
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from saeforge.data.batch import Batch
from saeforge.ops import Group
from saeforge.ops.group import Kind
from saeforge.registry import PluginRecord
from saeforge.testing.case import Case, close
from saeforge.testing.outcome import CheckFailed

WORLD = 2
ROWS = 32
BOUND = 1e-9  # float64
WAIT_SECONDS = 100
_SAME_CALLS = "every rank must make the same calls of self.run.group in the same order"

Share = dict[str, Tensor]


class ThreadGroup(Group):
    """Ranks as threads of this process: sums through a barrier, as all-reduce would."""

    def __init__(self, rank: int, slots: list[Tensor], barrier: threading.Barrier) -> None:
        super().__init__(WORLD, rank)
        self.slots, self.lock = slots, barrier

    def _all_gather(self, tensor: Tensor) -> Tensor:
        self.slots[self.rank] = tensor
        self.lock.wait()
        every = torch.stack(self.slots)
        self.lock.wait()
        return every

    def _all_reduce(self, tensor: Tensor, kind: Kind) -> Tensor:
        every = self._all_gather(tensor)
        return every.sum(0) if kind == "sum" else every.amin(0)


def ranks(case: Case) -> None:
    """Two ranks (threads) with half of the rows each: mean loss, mean gradients and counts of the whole batch."""
    _compare(case, in_threads(lambda group: _share(case, group)))


def in_threads(share: Callable[[Group], Share]) -> list[Share]:
    """What each of two ranks returns."""
    slots, barrier = [torch.zeros(())] * WORLD, threading.Barrier(WORLD, timeout=WAIT_SECONDS)
    shares: list[Share | Exception] = [RuntimeError("it did not run")] * WORLD

    def work(rank: int) -> None:
        try:
            shares[rank] = share(ThreadGroup(rank, slots, barrier))
        except Exception as error:  # handed to the thread that checks
            barrier.abort()
            shares[rank] = error

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(WORLD)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    errors = [found for found in shares if isinstance(found, Exception)]
    for error in sorted(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
        raise error
    return [found for found in shares if isinstance(found, dict)]


def processes(case: Case) -> None:
    """The same with two processes and torch.distributed (gloo)."""
    module, name = case.cls.__module__, case.cls.__qualname__
    if module == "__main__" or "<locals>" in name:
        raise CheckFailed(f"{module}.{name} cannot be imported by another process; put the class into a module")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", "from saeforge.testing import ranks; ranks._process()"]
        arguments = [folder, module, name, json.dumps(case.options)]
        running = [
            subprocess.Popen([*command, str(rank), *arguments], env=environment, stderr=subprocess.PIPE, text=True)
            for rank in range(WORLD)
        ]
        try:
            said = [process.communicate(timeout=WAIT_SECONDS)[1] for process in running]
        except subprocess.TimeoutExpired as error:
            raise CheckFailed(f"two processes did not end within {WAIT_SECONDS} s; {_SAME_CALLS}") from error
        finally:
            for process in running:
                process.kill()
                process.wait()
        for process, text in zip(running, said, strict=True):
            if process.returncode:
                last = text.strip().splitlines()[-1:] or [f"exit code {process.returncode}"]
                raise CheckFailed(f"a process of two failed: {last[0]}; {_SAME_CALLS}")
        _compare(case, [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(WORLD)])


def _process() -> None:
    """One of them."""
    rank, folder, module, name, options = sys.argv[1:]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=int(rank), world_size=WORLD)
    try:
        cls = operator.attrgetter(name)(importlib.import_module(module))
        case = Case(cls, json.loads(options), PluginRecord(name, module, name))
        torch.save(_share(case, Group.world()), Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


def _share(case: Case, group: Group) -> Share:
    """Loss, gradients and counts of a rank's rows; without a group of several, of all rows."""
    variant = case.variant()
    variant.bind(case.settings(torch.float64, group))
    rows = slice(group.rank * ROWS // group.size, (group.rank + 1) * ROWS // group.size)
    batch = case.batch(ROWS, seed=12)
    weight = torch.linspace(0.2, 1.8, ROWS, dtype=torch.float64)[rows]
    x = batch.x[rows]
    assert batch.group is not None
    out = case.stepped(variant, Batch(x, x, weight, batch.group[rows]))
    loss = torch.stack(list(out.terms.values())).sum()
    loss.backward()
    counts = variant.observe(out.code)
    found = {"the loss": loss.detach(), "the counts of `observe`": counts.double()}
    for name, parameter in variant.named_parameters():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        found[f"the gradient of {name}"] = gradient.detach()
    return found


def _compare(case: Case, shares: list[Share]) -> None:
    whole = _share(case, Group())
    for name, value in whole.items():
        mean = torch.stack([share[name] for share in shares]).mean(0)
        if not close(mean, value, BOUND) and float((mean - value).abs().max()) > 1e-12:
            raise CheckFailed(
                f"{name} over two ranks is not that of the whole batch; take means with self.mean_rows and "
                "self.mean_entries, and everything else that looks across rows through self.run.group"
            )
