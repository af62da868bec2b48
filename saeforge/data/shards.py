"""Reading an activation dataset: open, check, and read blocks by offset straight into a tensor's memory."""

from __future__ import annotations

import hashlib
import math
import os
import zlib
from bisect import bisect_right
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch

from saeforge.data.manifest import BlockRecord, Manifest, ShardRecord, SiteRecord
from saeforge.errors import DatasetError

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
ROWS_FOLDER = "rows"
ROW_FIELDS = ("document", "position", "token", "context")


class _Family:
    """The shards of one site (or of the provenance table) and one split, with arithmetic from block to file."""

    def __init__(self, folder: Path, shards: tuple[ShardRecord, ...]) -> None:
        self.folder = folder
        self.shards = shards
        self.ends = list(accumulate(len(shard.blocks) for shard in shards))

    def locate(self, index: int) -> tuple[Path, BlockRecord, int]:
        """Return the file, the record and the number within the file of block `index`."""
        at = bisect_right(self.ends, index)
        inside = index - (self.ends[at - 1] if at else 0)
        return self.folder / self.shards[at].file, self.shards[at].blocks[inside], inside

    def check_sizes(self) -> None:
        """Raise DatasetError unless every file exists with the size that the manifest says."""
        for shard in self.shards:
            check_size(self.folder / shard.file, shard)


class ActivationDataset:
    """One site of a finished activation dataset, read by block.

    Reading is safe from several threads and after a fork: no file is kept open between calls.

    Attributes:
        root: folder of the dataset.
        manifest: all that is known of it.
        site: the record of this site; `site.statistics` are those of the train split.
        fingerprint: sha256 of the manifest's canonical JSON.
    """

    def __init__(self, root: Path, manifest: Manifest, site: SiteRecord) -> None:
        """Use `open`, which checks what it opens."""
        self.root = root
        self.manifest = manifest
        self.site = site
        self.fingerprint = manifest.fingerprint
        self._blocks = {split: _Family(root / site.folder, shards) for split, shards in site.shards.items()}
        self._rows = {split: _Family(root / ROWS_FOLDER, shards) for split, shards in manifest.rows.items()}

    @classmethod
    def open(cls, path: str | Path, *, site: str | None = None) -> ActivationDataset:
        """Open a dataset and check that its shards exist with their sizes (contents are checked at each read).

        Args:
            path: folder that holds `manifest.json`.
            site: id, module path or alias of a site; may be left out where there is only one.

        Raises:
            DatasetError: manifest missing, damaged or newer; no such site; a shard missing or of another size.
        """
        root = Path(path)
        if not root.is_dir():
            raise DatasetError(
                f"no activation dataset at {root}: no such folder; run `saeforge harvest --out {root} ...`"
            )
        manifest = Manifest.load(root / "manifest.json")
        dataset = cls(root, manifest, manifest.site(site, root=root))
        for family in (*dataset._blocks.values(), *dataset._rows.values()):
            family.check_sizes()
        return dataset

    @property
    def d(self) -> int:
        """Width of a row."""
        return self.site.d

    @property
    def dtype(self) -> torch.dtype:
        """Logical dtype of the rows."""
        return DTYPES[self.site.dtype]

    def n_blocks(self, split: str) -> int:
        """Return the number of blocks of a split; 0 where the dataset was made without it."""
        return self.manifest.splits[split].n_blocks if split in self.manifest.splits else 0

    def block_rows(self, split: str) -> int:
        """Return the rows of every block of a split, a power of two."""
        self._check_split(split)
        return self.manifest.splits[split].block_rows

    def read_block(self, split: str, index: int, out: torch.Tensor | None = None) -> torch.Tensor:
        """Read one block and check its crc32 and that its values are finite.

        Args:
            split: "train" or "validation".
            index: 0 <= index < n_blocks(split).
            out: contiguous CPU tensor (block_rows, d) of the dataset's dtype that receives the rows; new if None.

        Returns:
            (block_rows, d) rows in raw units: `out`, or a new tensor.

        Raises:
            DatasetError: bytes are missing or damaged, or a value is NaN or infinite; names the shard file and block.
            ValueError: `out` does not fit.
        """
        path, block, inside = self._locate(self._blocks, split, index)
        if out is None:
            out = torch.empty(block.rows, self.d, dtype=self.dtype)
        if out.shape != (block.rows, self.d) or out.dtype != self.dtype or not out.is_contiguous() or out.is_cuda:
            raise ValueError(
                f"out must be a contiguous CPU tensor ({block.rows}, {self.d}) of {self.dtype}, got {tuple(out.shape)} "
                f"of {out.dtype} on {out.device}"
            )
        _read_into(path, block, inside, out.view(torch.uint8).numpy().reshape(-1).data)
        # A sum is 40 times faster than isfinite and cannot hide a NaN or Inf; it may overflow, so it only asks.
        if not math.isfinite(out.sum().item()) and not bool(torch.isfinite(out).all()):
            raise DatasetError(f"{path}, block {inside}: holds NaN or infinite activations; harvest this dataset again")
        return out

    def read_rows(self, split: str, index: int) -> np.ndarray:
        """Return the provenance of a block: uint32 (block_rows, 4) = document, position, token id, context.

        Raises:
            DatasetError: as `read_block`.
        """
        path, block, inside = self._locate(self._rows, split, index)
        out = np.empty((block.rows, len(ROW_FIELDS)), dtype="<u4")
        _read_into(path, block, inside, out.reshape(-1).view(np.uint8).data)
        return out

    def verify(self) -> None:
        """Read every shard of this site and of the provenance table whole and compare its sha256.

        Raises:
            DatasetError: names the first shard that differs.
        """
        for family in (*self._blocks.values(), *self._rows.values()):
            for shard in family.shards:
                path = family.folder / shard.file
                check_size(path, shard)
                with path.open("rb") as file:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
                if digest != shard.sha256:
                    raise DatasetError(f"{path} is damaged: its sha256 does not match; restore it or harvest again")

    def _check_split(self, split: str) -> None:
        if split not in self.manifest.splits:
            raise DatasetError(f"{self.root} has no split {split!r}; it has: {', '.join(self.manifest.splits)}")

    def _locate(self, families: dict[str, _Family], split: str, index: int) -> tuple[Path, BlockRecord, int]:
        self._check_split(split)
        if not 0 <= index < self.n_blocks(split):
            raise IndexError(f"block {index} of split {split}: expected 0 to {self.n_blocks(split) - 1}")
        return families[split].locate(index)


def check_size(path: Path, shard: ShardRecord) -> None:
    """Raise DatasetError unless the file exists with the recorded size."""
    try:
        size = path.stat().st_size
    except FileNotFoundError as error:
        raise DatasetError(
            f"shard {path} is missing; restore it, or remake it with the same harvest command"
        ) from error
    if size != shard.nbytes:
        raise DatasetError(
            f"shard {path} has {size} bytes, the manifest says {shard.nbytes}: truncated or replaced; restore it, "
            "or run the same harvest command again to remake it"
        )


def _read_into(path: Path, block: BlockRecord, inside: int, memory: memoryview) -> None:
    """Fill `memory` with the payload of a block, or raise DatasetError."""
    where = f"{path}, block {inside}"
    if len(memory) != block.nbytes:
        raise DatasetError(f"{where}: the manifest says {block.nbytes} bytes, expected {len(memory)}; harvest again")
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError as error:
        raise DatasetError(f"{where}: the shard is missing; restore it or harvest again") from error
    try:
        done = 0
        while done < len(memory):  # the kernel may return less than asked, and at most 2 GiB at once
            count = os.preadv(descriptor, [memory[done:]], block.offset + done)
            if count == 0:
                raise DatasetError(f"{where}: the file ends {len(memory) - done} bytes early; restore or harvest again")
            done += count
    except OSError as error:
        raise DatasetError(f"{where}: cannot be read ({error.strerror}); check the disk or the mount") from error
    finally:
        os.close(descriptor)
    if zlib.crc32(memory) != block.crc32:
        raise DatasetError(f"{where}: checksum mismatch, the data is damaged; restore it or harvest again")
