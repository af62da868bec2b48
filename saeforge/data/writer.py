"""Writing an activation dataset bucket by bucket: block size, row permutation, shards, commit records, manifest.

A bucket is a range of a split's kept rows. It is the unit of commit: its shards are written first, then its record in
`index/`; what has no record does not exist. Files are never written in place.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from saeforge import __version__
from saeforge.data.manifest import (
    ITEM_BYTES,
    Manifest,
    ShardRecord,
    SiteRecord,
    SplitRecord,
    sha256_json,
    shard_from_json,
    shard_to_json,
    write_json,
)
from saeforge.data.moments import Moments
from saeforge.data.shards import DTYPES, ROW_FIELDS, ROWS_FOLDER, check_size
from saeforge.data.tario import write_shard
from saeforge.errors import DatasetError

MAX_BLOCK_BYTES = 16 * 2**20
MAX_SHARD_BYTES = 2**30
LANES = 8
BLOCKS_PER_LANE = 16
MIN_BLOCK_ROWS = 16
MIN_ROWS = LANES * BLOCKS_PER_LANE * MIN_BLOCK_ROWS
INDEX_FOLDER = "index"


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


def bucket_permutation(seed: int, split: str, bucket: int, rows: int) -> np.ndarray:
    """Return the row order of a bucket, the same for all sites: stored row i is kept row `permutation[i]` of it.

    Counter-based (Philox) and keyed by name, so that it depends on nothing else, least of all on what ran before.
    """
    digest = hashlib.sha256(f"saeforge bucket {seed} {split} {bucket}".encode()).digest()
    generator = np.random.Generator(np.random.Philox(key=np.frombuffer(digest[:16], dtype="<u8")))
    return generator.permutation(rows)


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
    def n_blocks(self) -> int:
        """Blocks of the split; the rows that do not fill a last one are dropped."""
        return self.kept_rows // self.block_rows

    @property
    def rows(self) -> int:
        """Rows that are stored."""
        return self.n_blocks * self.block_rows


class DatasetWriter:
    """Writes buckets in any order, knows which are missing, and finishes the manifest.

    Args:
        root: folder of the dataset; made if missing.
        sites: what is stored for each row.
        splits: plan of each split.
        bucket_rows: rows of a bucket, a multiple of every split's block_rows.
        config_sha256: written into each commit record; records of another configuration are refused.
        shard_bytes: payload of a shard at most.
    """

    def __init__(
        self,
        root: Path,
        sites: Sequence[SiteSpec],
        splits: Mapping[str, SplitPlan],
        *,
        bucket_rows: int,
        config_sha256: str,
        shard_bytes: int = MAX_SHARD_BYTES,
    ) -> None:
        for name, plan in splits.items():
            if bucket_rows % plan.block_rows:
                raise ValueError(
                    f"bucket_rows {bucket_rows} is no multiple of {plan.block_rows}, the block rows of {name}"
                )
        if len({site.folder for site in sites} | {ROWS_FOLDER, INDEX_FOLDER, "tokens"}) != len(sites) + 3:
            raise ValueError("sites must have distinct folders, none called rows, index or tokens")
        self.root = root
        self.sites = tuple(sites)
        self.splits = dict(splits)
        self.bucket_rows = bucket_rows
        self.config_sha256 = config_sha256
        self.shard_bytes = shard_bytes
        for folder in (INDEX_FOLDER, ROWS_FOLDER, *(site.folder for site in sites)):
            (root / folder).mkdir(parents=True, exist_ok=True)
            for stale in (root / folder).glob("*.part-*"):
                stale.unlink()

    def n_buckets(self, split: str) -> int:
        """Return the number of buckets of a split."""
        return -(-self.splits[split].rows // self.bucket_rows)

    def bucket_range(self, split: str, bucket: int) -> tuple[int, int]:
        """Return first and last-plus-one kept row of a bucket."""
        start = bucket * self.bucket_rows
        return start, min(start + self.bucket_rows, self.splits[split].rows)

    def buckets(self) -> Iterator[tuple[str, int]]:
        """Yield every (split, bucket) of the dataset."""
        for split in self.splits:
            for bucket in range(self.n_buckets(split)):
                yield split, bucket

    def missing_buckets(self) -> list[tuple[str, int]]:
        """Return the buckets without a valid commit record, or with a shard that is missing or of another size."""
        return [key for key in self.buckets() if self._record(*key) is None]

    def write_bucket(self, split: str, bucket: int, activations: Mapping[str, torch.Tensor], rows: np.ndarray) -> None:
        """Write and commit one bucket.

        Args:
            split: "train" or "validation".
            bucket: its index.
            activations: per site id, (rows, d) CPU tensor of the site's dtype, already in the bucket's permuted order.
            rows: uint32 (rows, 4) provenance in the same order.

        Raises:
            DatasetError: a value is NaN or infinite.
            SaeforgeError: the disk is full.
        """
        start, stop = self.bucket_range(split, bucket)
        shards: dict[str, list[ShardRecord]] = {}
        moments: dict[str, dict[str, Any]] = {}
        for site in self.sites:
            x = activations[site.id]
            if x.shape != (stop - start, site.d) or x.dtype != DTYPES[site.dtype]:
                raise ValueError(
                    f"{site.id}: got {tuple(x.shape)} {x.dtype}, not ({stop - start}, {site.d}) {site.dtype}"
                )
            total = Moments.empty(site.d)
            for block in x.split(self.splits[split].block_rows):
                with np.errstate(invalid="ignore"):  # NaN and Inf are found right below
                    part = Moments.of(block.double().numpy())
                if not np.isfinite(part.square_norm_sum):
                    raise DatasetError(f"{site.id}: NaN or infinite activations in bucket {bucket} of {split}")
                total = total.merge(part)
            moments[site.id] = total.to_json()
            stored = x.view(torch.int16).numpy().view("<u2") if site.dtype == "bfloat16" else x.numpy()
            shards[site.id] = self._write_family(site.folder, "acts", split, bucket, stored)
        shards[ROWS_FOLDER] = self._write_family(ROWS_FOLDER, "rows", split, bucket, np.asarray(rows, dtype="<u4"))
        record = {
            "config_sha256": self.config_sha256,
            "rows": [start, stop],
            "moments": moments,
            "shards": {name: [shard_to_json(dataclasses.asdict(s)) for s in items] for name, items in shards.items()},
        }
        write_json(self._index_path(split, bucket), {**record, "sha256": sha256_json(record)})

    def finish(self, **provenance: Any) -> Manifest:
        """Merge the commit records into `manifest.json`, written last, and return it.

        Args:
            provenance: the remaining fields of `Manifest` (model, tokenizer, versions, text, packing, shuffle,
                alignment_sha256).
        """
        shards: dict[str, dict[str, list[ShardRecord]]] = {
            name: {split: [] for split in self.splits} for name in (ROWS_FOLDER, *(site.id for site in self.sites))
        }
        moments = {site.id: Moments.empty(site.d) for site in self.sites}
        for split, bucket in self.buckets():
            record = self._record(split, bucket)
            if record is None:
                raise DatasetError(f"{self.root}: {split} bucket {bucket} is missing; run the same harvest command")
            for name, items in record["shards"].items():
                shards[name][split] += [shard_from_json(item) for item in items]
            if split == "train":
                moments = {
                    key: total.merge(Moments.from_json(record["moments"][key])) for key, total in moments.items()
                }
        frozen = {name: {split: tuple(items) for split, items in family.items()} for name, family in shards.items()}
        sites = [
            SiteRecord(
                **dataclasses.asdict(site),
                folder=site.folder,
                statistics=moments[site.id].statistics(),
                shards=frozen[site.id],
            )
            for site in self.sites
        ]
        splits = {
            name: SplitRecord(plan.block_rows, plan.n_blocks, plan.kept_rows - plan.rows)
            for name, plan in self.splits.items()
        }
        manifest = Manifest(
            saeforge_version=__version__,
            config_sha256=self.config_sha256,
            splits=splits,
            sites=tuple(sites),
            rows=frozen[ROWS_FOLDER],
            **provenance,
        )
        manifest.save(self.root / "manifest.json")
        return manifest

    def _index_path(self, split: str, bucket: int) -> Path:
        return self.root / INDEX_FOLDER / f"{split}-{bucket:06d}.json"

    def _write_family(self, folder: str, kind: str, split: str, bucket: int, data: np.ndarray) -> list[ShardRecord]:
        """Write the shards of one bucket; their numbers follow from the bucket's, so any one can be redone."""
        block_rows = self.splits[split].block_rows
        block_bytes = block_rows * data.strides[0]
        shard_blocks = max(1, self.shard_bytes // block_bytes)
        shards_per_bucket = -(-(self.bucket_rows // block_rows) // shard_blocks)
        first_block = bucket * (self.bucket_rows // block_rows)
        n_blocks = len(data) // block_rows
        records = []
        for number, start in enumerate(range(0, n_blocks, shard_blocks)):
            members = (
                (f"{first_block + i:08d}.{kind}.npy", data[i * block_rows : (i + 1) * block_rows])
                for i in range(start, min(start + shard_blocks, n_blocks))
            )
            path = self.root / folder / f"{split}-{bucket * shards_per_bucket + number:06d}.tar"
            records.append(write_shard(path, members))
        return records

    def _record(self, split: str, bucket: int) -> dict[str, Any] | None:
        """Return the commit record of a bucket if it is whole and its shards are there."""
        try:
            record = json.loads(self._index_path(split, bucket).read_bytes())
            checksum = record.pop("sha256")
        except (FileNotFoundError, ValueError, KeyError, AttributeError):
            return None
        if checksum != sha256_json(record) or record["config_sha256"] != self.config_sha256:
            return None
        folders = {ROWS_FOLDER: ROWS_FOLDER, **{site.id: site.folder for site in self.sites}}
        try:
            for name, items in record["shards"].items():
                for item in items:
                    shard = shard_from_json(item)
                    check_size(self.root / folders[name] / shard.file, shard)
        except DatasetError:
            return None
        return dict(record)


def write_dataset(
    root: str | Path,
    splits: Mapping[str, torch.Tensor],
    *,
    site: str = "array:out",
    dtype: str | None = None,
    bucket_rows: int | None = None,
    seed: int = 0,
    shuffle: bool = True,
) -> Manifest:
    """Write tensors as an activation dataset, without a model: for tests, imports and synthetic data.

    Args:
        root: folder to write.
        splits: (rows, d) floating tensor for "train" and, if wanted, "validation".
        site: id of the only site.
        dtype: "bfloat16" or "float32"; from the tensors if None (then they must have one of the two).
        bucket_rows: rows of a bucket; one bucket per split if None.
        seed: of the row permutation.
        shuffle: False keeps the order of the rows.

    Returns:
        The manifest. Provenance is (row number, 0, 0, row number // 1024).

    Raises:
        DatasetError: too few rows, or a value is not finite.
    """
    d = splits["train"].shape[1]
    dtype = dtype or str(splits["train"].dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise DatasetError(f"cannot store {dtype}: expected bfloat16 or float32; give dtype=")
    spec = SiteSpec(site, site.split(":")[0], site.rpartition(":")[2], d, dtype)
    plans = {
        name: SplitPlan(len(x), choose_block_rows(len(x), spec.row_bytes, split=name)) for name, x in splits.items()
    }
    largest = max(plan.block_rows for plan in plans.values())
    bucket_rows = bucket_rows or -(-max(plan.rows for plan in plans.values()) // largest) * largest
    digest = sha256_json({name: [list(x.shape), dtype, seed, bucket_rows, shuffle] for name, x in splits.items()})
    writer = DatasetWriter(Path(root), [spec], plans, bucket_rows=bucket_rows, config_sha256=digest)
    for split, bucket in writer.buckets():
        start, stop = writer.bucket_range(split, bucket)
        order = bucket_permutation(seed, split, bucket, stop - start) if shuffle else np.arange(stop - start)
        numbers = (order + start).astype(np.uint32)
        rows = np.zeros((stop - start, len(ROW_FIELDS)), dtype=np.uint32)
        rows[:, 0], rows[:, 3] = numbers, numbers // 1024
        x = splits[split].detach()[torch.from_numpy(order + start)].to(DTYPES[dtype]).contiguous()
        writer.write_bucket(split, bucket, {site: x}, rows)
    return writer.finish(
        alignment_sha256=digest, shuffle={"seed": seed, "bucket_rows": bucket_rows, "generator": "numpy-philox"}
    )
