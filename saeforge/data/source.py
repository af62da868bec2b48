"""Where blocks come from: the one small interface of all sources, and what an SAE learns from one.

Sources are shards on disk (`shard_source`), tensors in memory (`tensor_source`), a language model that runs along
(`saeforge.harvest.live`) and rows of known features (`synthetic`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from saeforge.data.batch import Batch
from saeforge.data.moments import Statistics

#: Tensors side by side, (rows, width) each: row i of all of them belongs to one token.
Rows = tuple[Tensor, ...]


@dataclass(frozen=True)
class Pair:
    """What one SAE learns from a source.

    Attributes:
        name: of the SAE among those that train together; "" where there is one.
        inputs: numbers of the tensors that it reads, side by side: one, or several for a crosscoder.
        targets: numbers of those that it reconstructs; the same ones for an SAE, others for a transcoder.
        identity: where the rows come from (model, site, target, dataset), as plain JSON values.
        unit: neighbouring rows that belong together (`BlockSource.unit`).
    """

    name: str
    inputs: tuple[int, ...]
    targets: tuple[int, ...]
    identity: dict[str, Any]
    unit: int = 1

    def batch(self, rows: Rows) -> Batch:
        """The batch of this SAE; `target` is the same tensor as `x` where it reconstructs its input."""
        x = _beside([rows[number] for number in self.inputs])
        target = x if self.targets == self.inputs else _beside([rows[number] for number in self.targets])
        if self.unit == 1:
            return Batch(x, target)
        return Batch(x, target, group=torch.arange(len(x), device=x.device) // self.unit)

    def widths(self, source: BlockSource) -> tuple[int, int]:
        """d_in and d_out."""
        d_in, d_out = (sum(source.widths[number] for number in numbers) for numbers in (self.inputs, self.targets))
        return d_in, d_out

    def statistics(self, source: BlockSource) -> tuple[Statistics, Statistics]:
        """Of the input and of the target."""
        x, target = (
            Statistics.beside([source.statistics[number] for number in numbers])
            for numbers in (self.inputs, self.targets)
        )
        return x, target


def _beside(parts: Sequence[Tensor]) -> Tensor:
    """(rows, sum of widths); a single part is itself."""
    if len(parts) == 1:
        return parts[0]
    dtype = parts[0].dtype if all(part.dtype == parts[0].dtype for part in parts) else torch.float32
    return torch.cat([part.to(dtype) for part in parts], dim=1)


class BlockSource(Protocol):
    """Blocks of activation rows, all of one split equally long. Reading is safe from several threads at once.

    Attributes:
        widths: of each tensor of a block. dtypes: of each.
        statistics: of the training rows of each.
        pairs: which tensors train which SAE.
        unit: neighbouring rows that belong together and stay so, a power of two; 1: none do.
        fingerprint: changes whenever the data does.
    """

    widths: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]
    statistics: tuple[Statistics, ...]
    pairs: tuple[Pair, ...]
    unit: int
    fingerprint: str

    def n_blocks(self, split: str) -> int:
        """Number of blocks of "train" or "validation"; 0 if there is no such split."""

    def block_rows(self, split: str) -> int:
        """Rows of every block of a split."""

    def read_block(self, split: str, index: int, into: Rows | None = None) -> Rows:
        """The tensors of a block, on the CPU.

        Args:
            split: "train" or "validation".
            index: of the block.
            into: memory of these shapes and dtypes that receives the rows; None: the source's own, or new.
        """

    def sample(self, rows: int) -> Rows:
        """About `rows` training rows spread over the data, the same at every call and on every rank."""

    def counters(self) -> dict[str, float]:
        """What reading has met so far, for the logger: retries, bytes from a cache; empty if nothing can happen."""

    def close(self) -> None:
        """Lets go of what the source holds (a model, a lock); called once, when training is over."""


def empty_rows(source: BlockSource, rows: int, *, device: torch.device | None = None, pinned: bool = False) -> Rows:
    """Memory for `rows` rows of a source."""
    return tuple(
        torch.empty(rows, width, dtype=dtype, device=device, pin_memory=pinned)
        for width, dtype in zip(source.widths, source.dtypes, strict=True)
    )


def sample_blocks(source: BlockSource, rows: int) -> Rows:
    """About `rows` training rows: the first ones of at most 256 blocks that are spread evenly."""
    n_blocks, block_rows = source.n_blocks("train"), source.block_rows("train")
    chosen = np.linspace(0, n_blocks - 1, num=min(n_blocks, 256)).astype(int)
    take = max(1, min(block_rows, -(-rows // len(chosen))))
    parts = [source.read_block("train", block) for block in dict.fromkeys(int(block) for block in chosen)]
    return tuple(torch.cat([part[:take] for part in tensors]) for tensors in zip(*parts, strict=True))


def describe_part(d: int, statistics: Statistics) -> dict[str, Any]:
    """What an SAE of several sources remembers of each: its width, and the root mean square norm of its rows."""
    return {"d": d, "rms_norm": math.sqrt(statistics.mean_square_norm)}
