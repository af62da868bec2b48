"""Reading an activation dataset: open, check, and read blocks by offset straight into a tensor's memory."""

from __future__ import annotations

from bisect import bisect_right
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch

from saeforge.data.manifest import BlockRecord, Manifest, ShardRecord, SiteRecord, no_manifest
from saeforge.data.storage import Extent, LocalStorage, ReadCounts, Storage, open_storage
from saeforge.errors import DatasetError

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
ROWS_FOLDER = "rows"
ROW_FIELDS = ("document", "position", "token", "context")


class _Family:
    """The shards of one site (or of the provenance table) and one split, with arithmetic from block to file."""

    def __init__(self, folder: str, shards: tuple[ShardRecord, ...]) -> None:
        self.folder = folder
        self.shards = shards
        self.ends = list(accumulate(len(shard.blocks) for shard in shards))

    def locate(self, index: int) -> tuple[Extent, BlockRecord]:
        """Return where block `index` lies, and its record."""
        at = bisect_right(self.ends, index)
        inside = index - (self.ends[at - 1] if at else 0)
        shard = self.shards[at]
        block = shard.blocks[inside]
        return Extent(f"{self.folder}/{shard.file}", block.offset, block.crc32, shard.sha256, inside), block


class ActivationDataset:
    """One site of a finished activation dataset, read by block, from a folder or a URL.

    Reading is safe from several threads and after a fork: no file is kept open between calls.

    Attributes:
        storage: where the bytes are; `storage.counts` says what reading has cost.
        location: absolute path of the folder, or its URL: opens the same dataset again.
        manifest: all that is known of it.
        site: the record of this site; `site.statistics` are those of the train split.
        fingerprint: sha256 of the manifest's canonical JSON.
    """

    def __init__(self, storage: Storage, manifest: Manifest, site: SiteRecord) -> None:
        """Use `open`, which checks what it opens."""
        self.storage = storage
        self.location = storage.location
        self.manifest = manifest
        self.site = site
        self.fingerprint = manifest.fingerprint
        self._blocks = {split: _Family(site.folder, shards) for split, shards in site.shards.items()}
        self._rows = {split: _Family(ROWS_FOLDER, shards) for split, shards in manifest.rows.items()}

    @classmethod
    def open(cls, path: str | Path, *, site: str | None = None) -> ActivationDataset:
        """Open a dataset and check that its shards exist with their sizes (contents are checked at each read).

        Args:
            path: folder that holds `manifest.json`, or its URL (`saeforge.data.storage.open_storage`).
            site: id, module path or alias of a site; may be left out where there is only one.

        Raises:
            DatasetError: manifest missing, damaged or newer; no such site; a shard missing or of another size; a URL
                that cannot be read.
        """
        storage = open_storage(path)
        manifest = load_manifest(storage)
        dataset = cls(storage, manifest, manifest.site(site, root=path))
        records = {
            f"{family.folder}/{shard.file}": shard
            for family in (*dataset._blocks.values(), *dataset._rows.values())
            for shard in family.shards
        }
        for (file, shard), size in zip(records.items(), storage.sizes(list(records)), strict=True):
            fault = size_fault(size, shard)
            if fault:
                raise DatasetError(f"shard {storage.name(file)} {fault}")
        return dataset

    @property
    def counts(self) -> ReadCounts:
        """What reading has cost so far: retries, bytes from the origin, bytes from the cache."""
        return self.storage.counts

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
        """Read one block and check its crc32.

        The writer refuses NaN and infinity, so that what has the right checksum is finite; `verify` looks all the same.

        Args:
            split: "train" or "validation".
            index: 0 <= index < n_blocks(split).
            out: contiguous CPU tensor (block_rows, d) of the dataset's dtype that receives the rows; new if None.

        Returns:
            (block_rows, d) rows in raw units: `out`, or a new tensor.

        Raises:
            DatasetError: bytes are missing or damaged; names the shard file and the block.
            ValueError: `out` does not fit.
        """
        extent, block = self._locate(self._blocks, split, index)
        if out is None:
            out = torch.empty(block.rows, self.d, dtype=self.dtype)
        if out.shape != (block.rows, self.d) or out.dtype != self.dtype or not out.is_contiguous() or out.is_cuda:
            raise ValueError(
                f"out must be a contiguous CPU tensor ({block.rows}, {self.d}) of {self.dtype}, got {tuple(out.shape)} "
                f"of {out.dtype} on {out.device}"
            )
        self._read(extent, block, out.view(torch.uint8).numpy().reshape(-1).data)
        return out

    def read_rows(self, split: str, index: int) -> np.ndarray:
        """Return the provenance of a block: uint32 (block_rows, 4) = document, position, token id, context.

        Raises:
            DatasetError: as `read_block`.
        """
        extent, block = self._locate(self._rows, split, index)
        out = np.empty((block.rows, len(ROW_FIELDS)), dtype="<u4")
        self._read(extent, block, out.reshape(-1).view(np.uint8).data)
        return out

    def verify(self) -> None:
        """Check every byte of this site, of the provenance and of what stands beside them (`verify_dataset`).

        Raises:
            DatasetError: names the first thing that is wrong, and says how many there are.
        """
        from saeforge.data.verify import verify_dataset

        findings = verify_dataset(self.location, sites=[self.site.id])
        if findings:
            more = f" (and {len(findings) - 1} more)" if len(findings) > 1 else ""
            raise DatasetError(f"{self.location}: {findings[0]}{more}; restore it, or harvest again")

    def _check_split(self, split: str) -> None:
        if split not in self.manifest.splits:
            raise DatasetError(f"{self.location} has no split {split!r}; it has: {', '.join(self.manifest.splits)}")

    def _locate(self, families: dict[str, _Family], split: str, index: int) -> tuple[Extent, BlockRecord]:
        self._check_split(split)
        if not 0 <= index < self.n_blocks(split):
            raise IndexError(f"block {index} of split {split}: expected 0 to {self.n_blocks(split) - 1}")
        return families[split].locate(index)

    def _read(self, extent: Extent, block: BlockRecord, memory: memoryview) -> None:
        if len(memory) != block.nbytes:
            where = self.storage.where(extent.file, extent.block)
            raise DatasetError(
                f"{where}: the manifest says {block.nbytes} bytes, expected {len(memory)}; harvest again"
            )
        self.storage.read_block(extent, memory)


def load_manifest(storage: Storage) -> Manifest:
    """Read the manifest as it is now.

    Raises:
        DatasetError: no dataset there, not a finished one, or a damaged or newer manifest.
    """
    storage.check()
    content = storage.read_file("manifest.json")
    if content is None:
        place = storage.name("").rstrip("/")
        if isinstance(storage, LocalStorage):
            raise no_manifest(place)
        raise DatasetError(f"no manifest.json in {place}: expected a finished activation dataset; check the address")
    try:
        return Manifest.parse(content, storage.name("manifest.json"))
    except DatasetError:
        again = storage.read_file("manifest.json")  # an answer that was cut off looks like damage
        if again is None or again == content:
            raise
        return Manifest.parse(again, storage.name("manifest.json"))


def size_fault(size: int | None, shard: ShardRecord) -> str | None:
    """Return what is wrong with a shard of that size (None: there is none), in words; None if nothing is."""
    if size is None:
        return "is missing; restore it, or remake it with the same harvest command"
    if size != shard.nbytes:
        return (
            f"has {size} bytes, the manifest says {shard.nbytes}: truncated or replaced; restore it, or run the same "
            "harvest command again to remake it"
        )
    return None


def check_size(path: Path, shard: ShardRecord) -> None:
    """Raise DatasetError unless the file exists with the recorded size."""
    fault = size_fault(path.stat().st_size if path.exists() else None, shard)
    if fault:
        raise DatasetError(f"shard {path} {fault}")
