"""How rows are cut and ordered: rows of a block, order inside a bucket, what a site and a split are beforehand."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from saeforge.data.manifest import ITEM_BYTES
from saeforge.errors import DatasetError

MAX_BLOCK_BYTES = 16 * 2**20
LANES = 8
BLOCKS_PER_LANE = 16
MIN_BLOCK_ROWS = 16
MIN_ROWS = LANES * BLOCKS_PER_LANE * MIN_BLOCK_ROWS


def choose_block_rows(rows: int, row_bytes: int, *, split: str) -> int:
    """Return the rows of a block: the largest power of two that keeps blocks small and numerous enough.

    Args:
        rows: kept rows of the split.
        row_bytes: bytes of a row of the widest site.
        split: its name, for the message.

    Returns:
        A power of two p with p * row_bytes <= 16 MiB and rows // p >= 128 (16 blocks for each of 8 lanes), at least 16.

    Raises:
        DatasetError: fewer than 2,048 rows, or rows wider than 1 MiB.
    """
    if rows < MIN_ROWS:
        raise DatasetError(
            f"split {split} has {rows} rows, at least {MIN_ROWS} are needed ({LANES * BLOCKS_PER_LANE} blocks of "
            f"{MIN_BLOCK_ROWS}); give more text or a larger n_tokens (or another validation_share)"
        )
    limit = min(MAX_BLOCK_BYTES // row_bytes, rows // (LANES * BLOCKS_PER_LANE))
    if limit < MIN_BLOCK_ROWS:
        raise DatasetError(f"rows of {row_bytes} bytes are too wide: at most {MAX_BLOCK_BYTES // MIN_BLOCK_ROWS} fit")
    return 1 << (limit.bit_length() - 1)


def bucket_permutation(seed: int, split: str, bucket: int, rows: int, group_rows: int = 1) -> np.ndarray:
    """Return the row order of a bucket, the same for all sites: stored row i is kept row `permutation[i]` of it.

    Counter-based (Philox) and keyed by name, so that it depends on nothing else, least of all on what ran before.

    Args:
        seed: of the dataset.
        split: its name.
        bucket: its index.
        rows: of the bucket, a multiple of group_rows.
        group_rows: runs of so many rows move together, their rows in order.
    """
    digest = hashlib.sha256(f"saeforge bucket {seed} {split} {bucket}".encode()).digest()
    generator = np.random.Generator(np.random.Philox(key=np.frombuffer(digest[:16], dtype="<u8")))
    groups = generator.permutation(rows // group_rows)
    return (groups[:, None] * group_rows + np.arange(group_rows)).reshape(-1)


@dataclass(frozen=True)
class SiteSpec:
    """A site before it has data: see `SiteRecord` for the fields."""

    id: str
    module_path: str
    where: str
    d: int
    dtype: str
    alias: str | None = None

    @property
    def folder(self) -> str:
        """Folder of the tar family: a colon would make `tar` and webdataset see a host or a URL."""
        return self.id.replace(":", ".")

    @property
    def row_bytes(self) -> int:
        """Bytes of one stored row."""
        return self.d * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class SplitPlan:
    """How many rows of a split are kept and how they are cut: all of it known before the first forward pass."""

    kept_rows: int
    block_rows: int

    @property
    def rows(self) -> int:
        """Rows in whole blocks: what is stored if no row is an outlier."""
        return self.kept_rows // self.block_rows * self.block_rows
