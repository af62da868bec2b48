"""Batches from blocks, in the order of a `Plan`, read ahead on threads, resumable from one integer.

A block goes from its file straight into the buffer of its window; a batch is one gather of rows out of the windows, on
the device that trains. Rows are reused, so that memory stays what it is after the first windows:

    host bytes   = 2 * lanes_here * window_rows * row_bytes + 3 * batch_bytes    (the second window is read ahead)
    device bytes = the same first term once more, if the device is not the CPU

where lanes_here = lanes / ranks, window_rows = window_blocks * block_rows, and row_bytes counts all tensors of a row
and 8 bytes for its place in the order. A batch that spans more windows of a lane than one holds more of them at once; a
source that makes its blocks (a live one) holds one more for each reading thread.
"""

from __future__ import annotations

import functools
import logging
import os
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saeforge.data.plan import RNG, Plan
from saeforge.data.source import BlockSource, Rows, empty_rows
from saeforge.errors import CheckpointError, ConfigError, DatasetError

Key = tuple[int, int, int]  # pass, lane, window

#: Batches that stay valid while the loader goes on, where it reuses their memory.
BATCH_RING = 3
#: Seconds without a finished read after which the log says that training waits for data.
PATIENCE = 60.0

log = logging.getLogger("saeforge.data")


def reading_threads() -> int:
    """How many threads read by default: two, on two cores one, since the other one gathers."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return 2 if cores > 2 else 1


@dataclass
class ReadStats:
    """What reading cost since the last look. Rates are per reading thread.

    Attributes:
        batches: given out. bytes: read. read_seconds: spent reading, over all threads.
        wait_seconds: that training stood still for data. windows_ready: summed over batches, windows read ahead.
    """

    batches: int = 0
    bytes: int = 0
    read_seconds: float = 0.0
    wait_seconds: float = 0.0
    windows_ready: int = 0

    def figures(self, seconds: float) -> dict[str, float]:
        """For a logger: milliseconds a step that training waited, windows read ahead, GB/s by the clock and a thread.

        Args:
            seconds: since the last look.
        """
        batches = max(1, self.batches)
        figures = {"wait_ms": 1e3 * self.wait_seconds / batches, "windows_ready": self.windows_ready / batches}
        figures["gb_per_second"] = self.bytes / seconds / 1e9
        if self.read_seconds > 0:
            figures["read_gb_per_second"] = self.bytes / self.read_seconds / 1e9
        return figures


class _Window:
    """One lane's window: blocks on their way into its buffers, and the order of its rows."""

    def __init__(self, stream: _Stream, key: Key, memory: tuple[Rows, Any]) -> None:
        buffers, free_from = memory
        self.buffers, self.device_buffers = buffers, None if stream.staged else buffers
        self.copied: Any = None  # CUDA event: the rows are on the device
        self._stream, self._order = stream, stream.pool.submit(stream.plan.rows, *key)
        rows = stream.plan.block_rows
        self._jobs = [
            stream.pool.submit(stream.read, block, at * rows, buffers, free_from)
            for at, block in enumerate(stream.plan.blocks(*key))
        ]
        self.order: Tensor | None = None

    def done(self) -> bool:
        """Whether every read has come to an end, good or bad."""
        return self._order.done() and all(job.done() for job in self._jobs)

    def finish(self) -> None:
        """Waits for the reads, raises what they raised, and brings the rows to the device."""
        if self.order is not None:
            return
        stream = self._stream
        jobs: list[Future[Any]] = [self._order, *self._jobs]
        start = time.perf_counter()
        while wait(jobs, timeout=PATIENCE).not_done:
            log.warning("training has waited %.0f s for data", time.perf_counter() - start)
        stream.stats.wait_seconds += time.perf_counter() - start
        for job in self._jobs:
            count, seconds = job.result()
            stream.stats.bytes += count
            stream.stats.read_seconds += seconds
        self.order = torch.from_numpy(self._order.result())
        if stream.staged:
            self.device_buffers, self.order, self.copied = stream.upload(self.buffers, self.order)


class _Stream:
    """The windows of one iteration: what is read, what is read ahead, and the memory that goes round."""

    def __init__(self, source: BlockSource, plan: Plan, lanes: list[int], device: torch.device, threads: int) -> None:
        self.source, self.plan, self.lanes, self.device = source, plan, lanes, device
        self.staged = device.type != "cpu"  # read into pinned memory, copied to the device on a stream of its own
        self.stats = ReadStats()
        self._copies: Any = torch.cuda.Stream(device) if device.type == "cuda" else None
        # A thread's current device is the first one until it is told; reading must not wake that one up.
        begin = functools.partial(torch.cuda.set_device, device) if device.type == "cuda" else None
        self.pool = ThreadPoolExecutor(threads, thread_name_prefix="saeforge-read", initializer=begin)
        self.windows: dict[Key, _Window] = {}
        self._free: list[tuple[Rows, Any]] = []  # with the event after which they may be written to
        self._free_on_device: list[Rows] = []
        self._outputs: list[Rows] = []

    def close(self) -> None:
        self.pool.shutdown(wait=True, cancel_futures=True)
        self.windows.clear()

    def read(self, block: int, start: int, buffers: Rows, free_from: Any) -> tuple[int, float]:
        """Job of a reading thread: one block into its place. Returns bytes and seconds."""
        if free_from is not None:
            free_from.synchronize()  # the device may still be copying the window that was here
        begin = time.perf_counter()
        places = tuple(buffer[start : start + self.plan.block_rows] for buffer in buffers)
        self.source.read_block("train", block, places)
        return sum(place.nbytes for place in places), time.perf_counter() - begin

    def upload(self, buffers: Rows, order: Tensor) -> tuple[Rows, Tensor, Any]:
        """Copies a window and its order to the device, beside what that does; returns both and the event of the end."""
        on_device = self._free_on_device.pop() if self._free_on_device else self._empty(self.device)
        if self._copies is None:
            for part, place in zip(buffers, on_device, strict=True):
                place.copy_(part)
            return on_device, order.to(self.device), None
        self._copies.wait_stream(torch.cuda.current_stream(self.device))  # gathers from this memory's last window
        with torch.cuda.stream(self._copies):
            for part, place in zip(buffers, on_device, strict=True):
                place.copy_(part, non_blocking=True)
            there = order.pin_memory().to(self.device, non_blocking=True)
            return on_device, there, self._copies.record_event()

    def batch(self, index: int, reuse: bool, total: int) -> Rows:
        """Rows of global batch `index`, of `total`, that belong to these lanes."""
        pass_index, pieces = self.plan.pieces(index)
        here = [(pass_index, lane, piece.window) for lane in self.lanes for piece in pieces]
        ahead = self._next(pass_index, pieces[-1].window)
        wanted = dict.fromkeys(here)
        if self.plan.first_batch(*ahead) < total:  # what no batch takes from would cost a live source forward passes
            wanted |= dict.fromkeys((ahead[0], lane, ahead[1]) for lane in self.lanes)
        for key in self.windows.keys() - wanted.keys():
            self._release(self.windows.pop(key))
        for key in wanted:
            if key not in self.windows:
                self.windows[key] = _Window(self, key, self._free.pop() if self._free else (self._empty(None), None))
        self.stats.batches += 1
        self.stats.windows_ready += sum(self.windows[key].done() for key in wanted if key not in here)
        for key in here:
            self.windows[key].finish()
        if self.staged:  # what is read already may travel while the device works on this batch
            for window in self.windows.values():
                if window.done():
                    window.finish()
        parts = [
            (self.windows[pass_index, lane, piece.window], slice(piece.start, piece.stop))
            for lane in self.lanes
            for piece in pieces
        ]
        rows = self.plan.lane_rows * len(self.lanes)
        outputs = self._output(rows, reuse and not self.staged)
        at = 0
        for window, piece in parts:
            assert window.order is not None
            assert window.device_buffers is not None
            if window.copied is not None:
                torch.cuda.current_stream(self.device).wait_event(window.copied)
                window.order.record_stream(torch.cuda.current_stream(self.device))
            order = window.order[piece]
            for rows_of_window, output in zip(window.device_buffers, outputs, strict=True):
                _gather(rows_of_window, order, output[at : at + len(order)])
            at += len(order)
        return outputs

    def _next(self, pass_index: int, window: int) -> tuple[int, int]:
        return (pass_index, window + 1) if window + 1 < self.plan.windows_per_lane else (pass_index + 1, 0)

    def _release(self, window: _Window) -> None:
        if window.order is None:  # it was read ahead and never used: a reader may still be writing to it
            return
        self._free.append((window.buffers, window.copied))
        if self.staged and window.device_buffers is not None:
            self._free_on_device.append(window.device_buffers)

    def _empty(self, device: torch.device | None) -> Rows:
        rows = max(stop - start for start, stop in map(self.plan.window_bounds, range(self.plan.windows_per_lane)))
        pinned = self.staged and device is None and self.device.type == "cuda"
        return empty_rows(self.source, rows * self.plan.block_rows, device=device, pinned=pinned)

    def _output(self, rows: int, reuse: bool) -> Rows:
        """Memory for a batch; fresh memory costs a page fault every 4 KiB, four times the gather itself [data 5.1]."""
        if not reuse:
            return empty_rows(self.source, rows, device=self.device)
        if len(self._outputs) < BATCH_RING:
            self._outputs.append(empty_rows(self.source, rows))
        else:
            self._outputs.append(self._outputs.pop(0))
        return self._outputs[-1]


def _gather(rows: Tensor, order: Tensor, out: Tensor) -> None:
    """Copies rows in an order. On the CPU not by torch, whose threads would wait for cores that the readers are on."""
    if rows.device.type == "cpu":
        source, into = (part.view(torch.uint8).numpy() for part in (rows, out))
        np.take(source, order.numpy(), axis=0, out=into, mode="clip")  # "raise" would copy by way of a buffer
    else:
        torch.index_select(rows, 0, order, out=out)


class TrainLoader:
    """Yields this rank's share of the global batches `position` .. `total - 1`.

    The state is the absolute batch number plus what must not change: it is the same on every rank, as Lightning saves
    rank 0's only. The loader has a length, so that Lightning does not run one batch ahead of what it saves.

    Args:
        source: where blocks come from.
        plan: the order.
        total: batches of the whole run; passes repeat, each in another order.
        rank, world: this process's place; `plan.lanes` must be a multiple of `world`.
        device: where batches are gathered; None: the CPU.
        threads: that read; None: `reading_threads`.
        reuse: on the CPU, batches share memory: one is overwritten when the third after it is drawn.

    Raises:
        ConfigError: lanes not a multiple of world.
    """

    def __init__(
        self,
        source: BlockSource,
        plan: Plan,
        total: int,
        *,
        rank: int = 0,
        world: int = 1,
        device: torch.device | str | None = None,
        threads: int | None = None,
        reuse: bool = False,
    ) -> None:
        if plan.lanes % world:
            raise ConfigError(f"lanes = {plan.lanes} is not a multiple of {world} ranks; set data.lanes to one")
        self.source, self.plan, self.total = source, plan, total
        self.lanes = [lane for lane in range(plan.lanes) if lane % world == rank]
        self.device, self.reuse = torch.device(device or "cpu"), reuse
        self.threads = reading_threads() if threads is None else threads
        self.position = 0
        self._stats = ReadStats()
        self._streams: weakref.WeakSet[_Stream] = weakref.WeakSet()

    def __len__(self) -> int:
        """Batches of the whole run, on every rank."""
        return self.total

    def __iter__(self) -> Iterator[Rows]:
        """From the current position to the end; nothing but a consumed batch moves the position."""
        stream = _Stream(self.source, self.plan, self.lanes, self.device, self.threads)
        self._streams.add(stream)
        self._stats = stream.stats
        try:
            while self.position < self.total:
                batch = stream.batch(self.position, self.reuse, self.total)
                self.position += 1
                yield batch
        finally:
            stream.close()

    def abort(self) -> None:
        """Drops what would still be read ahead, without waiting: for a process that is about to end.

        The interpreter joins reading threads at exit, after all that stands in their queue.
        """
        for stream in self._streams:
            stream.pool.shutdown(wait=False, cancel_futures=True)

    def read_stats(self) -> ReadStats:
        """What reading cost since the last call."""
        stats = self._stats
        found = ReadStats(**vars(stats))
        vars(stats).update(vars(ReadStats()))
        return found

    def state_dict(self) -> dict[str, Any]:
        """Plain integers and strings, equal on all ranks."""
        return {"position": self.position, **self._fixed()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues at a saved position.

        Raises:
            CheckpointError: the data or its order differ from those of the checkpoint.
        """
        for name, value in self._fixed().items():
            if state.get(name) != value:
                raise CheckpointError(
                    f"the checkpoint was trained with data {name} = {state.get(name)}, this run has {value}; "
                    "resume with the same dataset and split, batch_size, lanes, window_blocks and seed"
                )
        self.position = int(state["position"])

    def _fixed(self) -> dict[str, Any]:
        plan = self.plan
        return {
            "schema": 1,
            "rng": RNG,
            "dataset": self.source.fingerprint,
            "blocks": plan.n_blocks,  # rows in memory: another validation_share cuts the same data elsewhere
            "block_rows": plan.block_rows,
            "batch_size": plan.batch_rows,
            "lanes": plan.lanes,
            "window_blocks": plan.window_blocks,
            "seed": plan.seed,
            "unit": plan.unit,
        }


class ValidationLoader:
    """Held-out rows in stored order, whole blocks, batch i on rank i % world. Metrics are sums, so shares may differ.

    Args:
        source: where blocks come from.
        batch_rows: rows of a batch at most (at least one block).
        max_rows: rows to read at most, over all ranks; None for all.
        rank, world: this process's place.
        split: another split than "validation", read in the same way.
    """

    def __init__(
        self,
        source: BlockSource,
        batch_rows: int,
        *,
        max_rows: int | None = None,
        rank: int = 0,
        world: int = 1,
        split: str = "validation",
    ) -> None:
        self.source, self.split = source, split
        n_blocks = source.n_blocks(split)
        rows = source.block_rows(split) if n_blocks else 1
        if max_rows is not None:
            n_blocks = min(n_blocks, max(world, max_rows // rows))
        if 0 < n_blocks < world:
            raise DatasetError(f"{n_blocks} held-out blocks for {world} ranks; harvest more validation tokens")
        # Small held-out sets are cut finer, so that every rank has a batch: Lightning fails where one rank has none.
        step = max(1, min(batch_rows // rows, n_blocks // world))
        self._batches = [range(i, min(i + step, n_blocks)) for i in range(0, n_blocks, step)][rank::world]

    def __len__(self) -> int:
        """Batches of this rank."""
        return len(self._batches)

    def __iter__(self) -> Iterator[Rows]:
        """All batches of this rank."""
        for blocks in self._batches:
            rows = self.source.block_rows(self.split)
            outputs = empty_rows(self.source, rows * len(blocks))
            for at, block in enumerate(blocks):
                places = tuple(output[at * rows : (at + 1) * rows] for output in outputs)
                self.source.read_block(self.split, block, places)
            yield outputs
