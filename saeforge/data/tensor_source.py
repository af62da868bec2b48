"""`TensorSource`: rows in memory as a source of blocks."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saeforge.data.moments import Moments, Statistics
from saeforge.data.plan import permutation
from saeforge.data.source import Pair, Rows, describe_part, sample_blocks
from saeforge.errors import ConfigError, DatasetError

MIN_BLOCK_ROWS = 16


class TensorSource:
    """Rows in memory; the last share of a seeded permutation of blocks is held out for validation.

    Args:
        x: (n, d_in) tensor, array, or an iterable of such chunks; a tuple of these: sources side by side.
        target: (n, d_out) for a transcoder, in the same ways, or None.
        validation_share: share of rows held out.
        lanes: lanes of the plan that will read this; blocks are sized for it.
        unit: so many consecutive rows belong together and stay so when rows are shuffled: 1, 2, 4, 8 or 16.

    Raises:
        ConfigError: wrong shape, type or unit. DatasetError: NaN or infinite values, too few rows.
    """

    def __init__(
        self,
        x: Any,
        target: Any = None,
        *,
        validation_share: float = 0.1,
        lanes: int = 8,
        unit: int = 1,
    ) -> None:
        if unit not in (1, 2, 4, 8, 16):
            raise ConfigError(f"group_rows = {unit}: expected 1, 2, 4, 8 or 16")
        if not 0 <= validation_share < 1:
            raise ConfigError(f"validation_share = {validation_share}: expected a share from 0 up to, not including, 1")
        inputs = _sources(x, "X")
        targets = () if target is None else _sources(target, "target")
        self.x = inputs[0]
        if targets and len(targets[0]) != len(self.x):
            raise ConfigError(f"X has {len(self.x)} rows and target {len(targets[0])}; expected one target row per row")
        self.unit = unit
        self._tensors = inputs + targets
        self.widths = tuple(tensor.shape[1] for tensor in self._tensors)
        self.dtypes = tuple(tensor.dtype for tensor in self._tensors)
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
        shapes = [(tuple(tensor.shape), str(tensor.dtype)) for tensor in inputs]
        digest = hashlib.sha256(repr(shapes[0] if len(shapes) == 1 else shapes).encode())
        for tensor in self._tensors:
            digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
        self.fingerprint = digest.hexdigest()
        identity: dict[str, Any] = {"model": None, "site": None, "target": None, "dataset": self.fingerprint}
        reads = tuple(range(len(inputs)))
        writes = tuple(range(len(inputs), len(self._tensors))) or reads
        if len(reads) > 1 or len(writes) > 1:
            described = [describe_part(*part) for part in zip(self.widths, self.statistics, strict=True)]
            identity["sources"] = described[: len(reads)]
            identity["targets"] = described[len(reads) :] or None
        self.pairs: tuple[Pair, ...] = (Pair("", reads, writes, identity, unit),)

    def n_blocks(self, split: str) -> int:
        """See `BlockSource`."""
        return len(self._blocks[split])

    def block_rows(self, split: str) -> int:
        """See `BlockSource`."""
        return self._rows

    def read_block(self, split: str, index: int, into: Rows | None = None) -> Rows:
        """See `BlockSource`; without `into`, views of the rows in memory."""
        start = self._blocks[split][index] * self._rows
        views = tuple(tensor[start : start + self._rows] for tensor in self._tensors)
        if into is None:
            return views
        for rows, place in zip(views, into, strict=True):
            place.copy_(rows)
        return into

    def sample(self, rows: int) -> Rows:
        """See `BlockSource`."""
        return sample_blocks(self, rows)

    def counters(self) -> dict[str, float]:
        """See `BlockSource`."""
        return {}

    def close(self) -> None:
        """See `BlockSource`; nothing is held but memory."""

    def _statistics(self) -> tuple[Statistics, ...]:
        moments = [Moments.empty(width) for width in self.widths]
        for index in range(self.n_blocks("train")):
            for which, rows in enumerate(self.read_block("train", index)):
                moments[which] = moments[which].merge(Moments.of(rows.float().numpy()))
        return tuple(part.statistics() for part in moments)


def _sources(data: Any, name: str) -> Rows:
    """One tensor, or those of a tuple, equally long."""
    if not isinstance(data, tuple):
        return (_rows(data, name),)
    if not data:
        raise ConfigError(f"{name} is an empty list; give at least one source")
    parts = tuple(_rows(part, f"{name}[{number}]") for number, part in enumerate(data))
    for number, part in enumerate(parts):
        if len(part) != len(parts[0]):
            raise ConfigError(
                f"{name}[{number}] has {len(part)} rows, {name}[0] {len(parts[0])}: sources side by side need one row "
                "of each per token; chunks of one source are given as an iterator, iter([...])"
            )
    return parts


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
