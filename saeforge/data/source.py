"""Where blocks come from: one small interface, and two sources behind it (shards on disk, tensors in memory)."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from saeforge.data.batch import Batch
from saeforge.data.moments import Moments, Statistics
from saeforge.data.plan import permutation
from saeforge.data.shards import ActivationDataset
from saeforge.errors import ConfigError, DatasetError

MIN_BLOCK_ROWS = 16

#: Memory for rows of the input, and of the target where it is another tensor.
Buffers = tuple[Tensor, Tensor | None]


class BlockSource(Protocol):
    """Blocks of activation rows, all of one split equally long. Reading is safe from several threads at once.

    Attributes:
        d_in: width of the input. d_out: width of the target.
        dtypes: of input and target; None for the target where it is the input.
        statistics: of the training rows: input, then target.
        fingerprint: changes whenever the data does.
        identity: where the rows come from (model, site, dataset), as plain JSON values.
    """

    d_in: int
    d_out: int
    dtypes: tuple[torch.dtype, torch.dtype | None]
    statistics: tuple[Statistics, Statistics]
    fingerprint: str
    identity: dict[str, Any]

    def n_blocks(self, split: str) -> int:
        """Number of blocks of "train" or "validation"; 0 if there is no such split."""

    def block_rows(self, split: str) -> int:
        """Rows of every block of a split."""

    def read_block(self, split: str, index: int, into: Buffers | None = None) -> Buffers:
        """Input (rows, d_in) and target (rows, d_out) of a block, on the CPU; target None means the input.

        Args:
            split: "train" or "validation".
            index: of the block.
            into: memory of these shapes and `dtypes` that receives the rows; None: the source's own, or new.
        """

    def sample(self, rows: int) -> Batch:
        """About `rows` training rows spread over the data, the same at every call and on every rank."""

    def counters(self) -> dict[str, float]:
        """What reading has met so far, for the logger: retries, bytes from a cache; empty if nothing can happen."""


def empty_rows(source: BlockSource, rows: int, *, device: torch.device | None = None, pinned: bool = False) -> Buffers:
    """Memory for `rows` rows of a source."""
    widths = zip((source.d_in, source.d_out), source.dtypes, strict=True)
    x, target = (
        None if dtype is None else torch.empty(rows, d, dtype=dtype, device=device, pin_memory=pinned)
        for d, dtype in widths
    )
    assert x is not None
    return x, target


def sample_blocks(source: BlockSource, rows: int) -> Batch:
    """About `rows` training rows: the first ones of at most 256 blocks that are spread evenly."""
    n_blocks, block_rows = source.n_blocks("train"), source.block_rows("train")
    chosen = np.linspace(0, n_blocks - 1, num=min(n_blocks, 256)).astype(int)
    take = max(1, min(block_rows, -(-rows // len(chosen))))
    parts = [source.read_block("train", block) for block in dict.fromkeys(int(block) for block in chosen)]
    x = torch.cat([part[:take] for part, _ in parts])
    targets = [part[:take] for _, part in parts if part is not None]
    return Batch(x, torch.cat(targets) if targets else x)


class ShardSource:
    """An activation dataset on disk.

    Args:
        path: the dataset's folder.
        input: site to read; may be omitted if the dataset has one.
        target: site to reconstruct (a transcoder); None: the input.

    Raises:
        DatasetError: missing or damaged dataset, unknown site.
    """

    def __init__(self, path: str, *, input: str | None = None, target: str | None = None) -> None:
        self.input = ActivationDataset.open(path, site=input)
        self.target = None if target is None else ActivationDataset.open(path, site=target)
        self.d_in = self.input.d
        self.d_out = self.input.d if self.target is None else self.target.d
        self.dtypes = (self.input.dtype, None if self.target is None else self.target.dtype)
        target_statistics = self.input.site.statistics if self.target is None else self.target.site.statistics
        self.statistics = (self.input.site.statistics, target_statistics)
        self.fingerprint = self.input.fingerprint
        manifest = self.input.manifest
        self.identity: dict[str, Any] = {
            "model": manifest.model,
            "site": _site(self.input),
            "target": None if self.target is None else _site(self.target),
            "dataset": self.fingerprint,
            "dataset_path": str(Path(path).resolve()),
        }

    def n_blocks(self, split: str) -> int:
        """See `BlockSource`."""
        return self.input.n_blocks(split) if split in self.input.manifest.splits else 0

    def block_rows(self, split: str) -> int:
        """See `BlockSource`."""
        return self.input.block_rows(split)

    def read_block(self, split: str, index: int, into: Buffers | None = None) -> Buffers:
        """See `BlockSource`; checksums are verified at every read."""
        x, target = into or (None, None)
        x = self.input.read_block(split, index, x)
        return x, None if self.target is None else self.target.read_block(split, index, target)

    def sample(self, rows: int) -> Batch:
        """See `BlockSource`."""
        return sample_blocks(self, rows)

    def counters(self) -> dict[str, float]:
        """See `BlockSource`."""
        return {}


class TensorSource:
    """Rows in memory; the last share of a seeded permutation of blocks is held out for validation.

    Args:
        x: (n, d_in) tensor, array, or an iterable of such chunks.
        target: (n, d_out) for a transcoder, or None.
        validation_share: share of rows held out.
        lanes: lanes of the plan that will read this; blocks are sized for it.

    Raises:
        ConfigError: wrong shape or type. DatasetError: NaN or infinite values, too few rows.
    """

    def __init__(
        self,
        x: Tensor | np.ndarray | Iterable[Tensor],
        target: Tensor | np.ndarray | None = None,
        *,
        validation_share: float = 0.1,
        lanes: int = 8,
    ) -> None:
        if not 0 <= validation_share < 1:
            raise ConfigError(f"validation_share = {validation_share}: expected a share from 0 up to, not including, 1")
        self.x = _rows(x, "X")
        self.y = None if target is None else _rows(target, "target")
        if self.y is not None and len(self.y) != len(self.x):
            raise ConfigError(f"X has {len(self.x)} rows and target {len(self.y)}; expected one target row per row")
        self.d_in = self.x.shape[1]
        self.d_out = self.d_in if self.y is None else self.y.shape[1]
        self.dtypes = (self.x.dtype, None if self.y is None else self.y.dtype)
        rows = MIN_BLOCK_ROWS
        if len(self.x) < 2 * rows * lanes:
            raise DatasetError(f"X has {len(self.x)} rows; training needs at least {2 * rows * lanes} ({lanes} lanes)")
        while rows * 2 * 16 * lanes <= len(self.x) and rows * 2 * self.x[0].nbytes <= 1 << 24:
            rows *= 2
        total = len(self.x) // rows
        held_out = max(1, round(validation_share * total)) if validation_share else 0
        if held_out >= total:
            raise ConfigError(
                f"validation_share = {validation_share} leaves none of {total} blocks to train on; lower it"
            )
        order = [int(block) for block in permutation(total, 0, 2)]
        self._blocks = {"train": order[: total - held_out], "validation": order[total - held_out :]}
        self._rows = rows
        self.statistics = self._statistics()
        digest = hashlib.sha256(repr((tuple(self.x.shape), str(self.x.dtype))).encode())
        for tensor in (self.x, self.y):
            if tensor is not None:
                digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
        self.fingerprint = digest.hexdigest()
        self.identity: dict[str, Any] = {"model": None, "site": None, "target": None, "dataset": self.fingerprint}

    def n_blocks(self, split: str) -> int:
        """See `BlockSource`."""
        return len(self._blocks[split])

    def block_rows(self, split: str) -> int:
        """See `BlockSource`."""
        return self._rows

    def read_block(self, split: str, index: int, into: Buffers | None = None) -> Buffers:
        """See `BlockSource`; without `into`, views of the rows in memory."""
        start = self._blocks[split][index] * self._rows
        part = slice(start, start + self._rows)
        views = self.x[part], None if self.y is None else self.y[part]
        if into is None:
            return views
        for rows, place in zip(views, into, strict=True):
            if rows is not None and place is not None:
                place.copy_(rows)
        return into

    def sample(self, rows: int) -> Batch:
        """See `BlockSource`."""
        return sample_blocks(self, rows)

    def counters(self) -> dict[str, float]:
        """See `BlockSource`."""
        return {}

    def _statistics(self) -> tuple[Statistics, Statistics]:
        moments = [Moments.empty(self.d_in), Moments.empty(self.d_out)]
        for index in range(self.n_blocks("train")):
            for which, rows in enumerate(self.read_block("train", index)):
                if rows is not None:
                    moments[which] = moments[which].merge(Moments.of(rows.float().numpy()))
        first = moments[0].statistics()
        return first, first if self.y is None else moments[1].statistics()


def _site(dataset: ActivationDataset) -> dict[str, Any]:
    site = dataset.site
    return {"id": site.id, "module_path": site.module_path, "where": site.where, "d": site.d, "dtype": site.dtype}


def _rows(data: Any, name: str) -> Tensor:
    """A finite (n, d) CPU tensor of floats from a tensor, an array, or an iterable of either."""
    if isinstance(data, np.ndarray):
        with warnings.catch_warnings():
            # A memory map opened for reading: nothing here writes to it.
            warnings.filterwarnings("ignore", "The given NumPy array is not writable", UserWarning)
            data = torch.from_numpy(np.ascontiguousarray(data))
    if not isinstance(data, Tensor):
        if not isinstance(data, Iterable) or isinstance(data, (str, bytes, Mapping)):
            raise ConfigError(f"{name} is a {type(data).__name__}; expected a tensor, an array, or an iterator of them")
        parts = [_rows(part, f"{name} chunk {number}") for number, part in enumerate(data)]
        if not parts:
            raise DatasetError(f"{name} yielded nothing; expected chunks of shape (rows, d_in)")
        for number, part in enumerate(parts):
            if part.shape[1] != parts[0].shape[1]:
                raise ConfigError(f"{name} chunk {number} is {part.shape[1]} wide, the first {parts[0].shape[1]}")
        data = torch.cat(parts)
    assert isinstance(data, Tensor)
    if data.ndim != 2:
        raise ConfigError(f"{name} has shape {tuple(data.shape)}; expected (rows, d_in): flatten leading dimensions")
    if not data.is_floating_point():
        raise ConfigError(f"{name} holds {data.dtype}; expected floating point activations")
    data = data.detach().cpu()
    rows: Tensor = data if data.dtype in (torch.bfloat16, torch.float32) else data.float()
    for start in range(0, len(rows), 1 << 16):
        bad = (~torch.isfinite(rows[start : start + (1 << 16)])).any(1).nonzero()
        if len(bad):
            raise DatasetError(f"{name} row {start + int(bad[0])} holds NaN or infinite values; remove such rows")
    return rows.contiguous()
