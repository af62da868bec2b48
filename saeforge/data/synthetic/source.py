"""`SyntheticSource`: blocks of synthetic activations, made when they are read."""

from __future__ import annotations

import hashlib
from typing import Any

import torch

from saeforge.data.moments import Moments, Statistics
from saeforge.data.source import BlockSource, Pair, Rows
from saeforge.data.synthetic.config import SyntheticConfig
from saeforge.data.synthetic.sample import Activity, Sampler
from saeforge.data.synthetic.truth import Truth
from saeforge.errors import ConfigError

BLOCK_ROWS = 2048
#: Rows that the statistics are taken from.
STATISTICS_ROWS = 65_536
_SPLITS = {"train": 0, "validation": 1}
_DTYPES = (torch.float32, torch.bfloat16)


class SyntheticSource:
    """Activations with a known truth, as a `BlockSource`: a block is a pure function of (configuration, split, index).

    Args:
        config: the law.
        rows: training rows; rounded up to whole blocks.
        validation_rows: held-out rows; rounded up likewise.
        dtype: torch.float32 or torch.bfloat16 (then a row is rounded once it is made).

    Attributes:
        truth: what is behind the rows.

    Raises:
        ConfigError: no rows, another dtype.
    """

    def __init__(
        self,
        config: SyntheticConfig,
        *,
        rows: int = 20_000_000,
        validation_rows: int = 131_072,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if rows < 1 or validation_rows < 0:
            raise ConfigError(f"rows = {rows}, validation_rows = {validation_rows}: expected at least 1 and 0")
        if dtype not in _DTYPES:
            raise ConfigError(f"dtype = {dtype}: expected torch.float32 or torch.bfloat16")
        self.config, self.truth = config, Truth.of(config)
        self._sampler = Sampler(self.truth)
        self._n_blocks = {"train": -(-rows // BLOCK_ROWS), "validation": -(-validation_rows // BLOCK_ROWS)}
        self.unit = 1
        self.widths: tuple[int, ...] = (config.d_in,)
        self.dtypes: tuple[torch.dtype, ...] = (dtype,)
        self.fingerprint = fingerprint(config, self._n_blocks, dtype)
        self.statistics: tuple[Statistics, ...] = (
            Moments.of(self.sample(STATISTICS_ROWS)[0].float().numpy()).statistics(),
        )
        self.pairs: tuple[Pair, ...] = (pair(config, self.fingerprint),)

    def n_blocks(self, split: str) -> int:
        """See `BlockSource`."""
        return self._n_blocks[split]

    def block_rows(self, split: str) -> int:
        """See `BlockSource`."""
        return BLOCK_ROWS

    def activity(self, split: str, index: int) -> Activity:
        """The true features of a block's rows."""
        return self._sampler.draw(BLOCK_ROWS, self.config.seed, 16, _SPLITS[split], index)

    def read_block(self, split: str, index: int, into: Rows | None = None) -> Rows:
        """See `BlockSource`."""
        rows = self.activity(split, index).activations(self.truth)
        if into is None:
            return (rows.to(self.dtypes[0]),)
        into[0].copy_(rows)
        return into

    def sample(self, rows: int) -> Rows:
        """See `BlockSource`."""
        return first_blocks(self, rows)

    def counters(self) -> dict[str, float]:
        """See `BlockSource`."""
        return {}

    def close(self) -> None:
        """See `BlockSource`; nothing is held."""


def first_blocks(source: BlockSource, rows: int) -> Rows:
    """About `rows` training rows: rows that are drawn independently need not be taken from all over the data."""
    blocks = range(min(source.n_blocks("train"), -(-rows // BLOCK_ROWS)))
    return (torch.cat([source.read_block("train", block)[0] for block in blocks]),)


def fingerprint(config: SyntheticConfig, n_blocks: dict[str, int], dtype: torch.dtype) -> str:
    """Of rows that this law, these lengths and this type make."""
    return hashlib.sha256(
        repr((config.fingerprint, BLOCK_ROWS, sorted(n_blocks.items()), str(dtype))).encode()
    ).hexdigest()


def pair(config: SyntheticConfig, dataset: str) -> Pair:
    """What an SAE learns from synthetic rows, and remembers of them."""
    identity: dict[str, Any] = {
        "model": None,
        "site": None,
        "target": None,
        "dataset": dataset,
        "synthetic": config.to_json(),
    }
    return Pair("", (0,), (0,), identity)
