"""Writing an activation dataset bucket by bucket: block size, row permutation, shards, commit records, manifest.

A bucket is a range of a split's kept rows. It is the unit of commit: its shards are written first, then its record in
`index/`; what has no record does not exist. Files are never written in place.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from saeforge import __version__
from saeforge.data.layout import SiteSpec, SplitPlan, bucket_permutation, choose_block_rows
from saeforge.data.manifest import (
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
from saeforge.data.storage import Extent, LocalStorage
from saeforge.data.tario import write_shard
from saeforge.errors import DatasetError

MAX_SHARD_BYTES = 2**30
MAX_THREADS = 8
INDEX_FOLDER = "index"


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
        return [key for key in self.buckets() if not self.has_bucket(*key)]

    def has_bucket(self, split: str, bucket: int) -> bool:
        """Whether a bucket is committed and its shards are there with their sizes."""
        return self.record(split, bucket) is not None

    def committed_rows(self) -> int:
        """Return the kept rows of the buckets that have a record: a look at one folder, for showing progress."""
        names = {path.name for path in (self.root / INDEX_FOLDER).iterdir()}
        ranges = [self.bucket_range(*key) for key in self.buckets() if self._index_path(*key).name in names]
        return sum(stop - start for start, stop in ranges)

    def write_bucket(
        self,
        split: str,
        bucket: int,
        activations: Mapping[str, torch.Tensor],
        rows: np.ndarray,
        *,
        outlier_rows: int = 0,
        outliers: Mapping[str, int] | None = None,
    ) -> None:
        """Write and commit one bucket. No other process may be writing the same one.

        As many whole blocks as there are rows for are stored, maybe none.

        Args:
            split: "train" or "validation".
            bucket: its index.
            activations: per site id, (rows, d) CPU tensor of the site's dtype, already in the bucket's permuted order.
            rows: uint32 (rows, 4) provenance in the same order.
            outlier_rows: rows of the bucket that were left out for their norm; with `rows`, all of its range.
            outliers: per site id, rows over its threshold.

        Raises:
            DatasetError: a value is NaN or infinite.
            SaeforgeError: the disk is full.
        """
        start, stop = self.bucket_range(split, bucket)
        block_rows = self.splits[split].block_rows
        whole = (stop - start - outlier_rows) // block_rows * block_rows
        if rows.shape != (stop - start - outlier_rows, len(ROW_FIELDS)):
            raise ValueError(
                f"provenance of shape {rows.shape}, not ({stop - start - outlier_rows}, {len(ROW_FIELDS)})"
            )
        stored: dict[str, np.ndarray] = {ROWS_FOLDER: np.asarray(rows, dtype="<u4")}
        for site in self.sites:
            x = activations[site.id]
            if x.shape != (stop - start - outlier_rows, site.d) or x.dtype != DTYPES[site.dtype]:
                raise ValueError(
                    f"{site.id}: got {tuple(x.shape)} {x.dtype}, not ({stop - start - outlier_rows}, {site.d}) "
                    f"{site.dtype}"
                )
            stored[site.id] = x.view(torch.int16).numpy().view("<u2") if site.dtype == "bfloat16" else x.numpy()
        self._remove_parts(split, bucket)
        moments: dict[str, Any] = {}
        # Sums, checksums and writing let go of the interpreter: blocks, then shards, go side by side.
        with ThreadPoolExecutor(_threads()) as pool:
            for site in self.sites:
                blocks = [stored[site.id][at : at + block_rows] for at in range(0, whole, block_rows)]
                total = functools.reduce(Moments.merge, pool.map(_moments, blocks), Moments.empty(site.d))
                if not np.isfinite(total.square_norm_sum):
                    raise DatasetError(f"{site.id}: NaN or infinite activations in bucket {bucket} of {split}")
                moments[site.id] = total.to_json()
            families = {
                name: self._submit_family(pool, name, split, bucket, data[:whole]) for name, data in stored.items()
            }
            shards = {name: [shard.result() for shard in family] for name, family in families.items()}
        record = {
            "config_sha256": self.config_sha256,
            "rows": [start, stop],
            "stored_rows": whole,
            "outlier_rows": outlier_rows,
            "outliers": {site.id: (outliers or {}).get(site.id, 0) for site in self.sites},
            "moments": moments,
            "shards": {name: [shard_to_json(dataclasses.asdict(s)) for s in items] for name, items in shards.items()},
        }
        write_json(self._index_path(split, bucket), {**record, "sha256": sha256_json(record)})

    def finish(
        self,
        *,
        buckets: Sequence[tuple[str, int]] | None = None,
        moments: Mapping[str, Moments] | None = None,
        **provenance: Any,
    ) -> Manifest:
        """Merge the commit records into `manifest.json`, written last, and return it.

        Args:
            buckets: those that the dataset has; None: all of them.
            moments: per site id, of the train rows; None: as stored.
            provenance: the remaining fields of `Manifest` (model, tokenizer, versions, text, packing, shuffle,
                outliers). `alignment_sha256`, if not given, is taken from the tokens' files and the stored provenance;
                `outliers` gets the rows over each site's threshold.

        Raises:
            DatasetError: a bucket is missing, or no training row is left.
        """
        shards: dict[str, dict[str, list[ShardRecord]]] = {
            name: {split: [] for split in self.splits} for name in (ROWS_FOLDER, *(site.id for site in self.sites))
        }
        summed = {site.id: Moments.empty(site.d) for site in self.sites}
        over = {site.id: 0 for site in self.sites}
        stored, outliers = dict.fromkeys(self.splits, 0), dict.fromkeys(self.splits, 0)
        kept = dict.fromkeys(self.splits, 0)
        if buckets is None:
            kept = {name: plan.kept_rows for name, plan in self.splits.items()}
        for split, bucket in self.buckets() if buckets is None else buckets:
            record = self.record(split, bucket)
            if record is None:
                raise DatasetError(f"{self.root}: {split} bucket {bucket} is missing; run the same harvest command")
            for name, items in record["shards"].items():
                shards[name][split] += [shard_from_json(item) for item in items]
            stored[split] += record["stored_rows"]
            if buckets is not None:
                kept[split] += record["rows"][1] - record["rows"][0]
            outliers[split] += record["outlier_rows"]
            for name, count in record["outliers"].items():
                over[name] += count
            if split == "train":
                summed = {key: total.merge(Moments.from_json(record["moments"][key])) for key, total in summed.items()}
        if not stored["train"] and moments is None:
            raise DatasetError(f"{self.root}: every training row is an outlier; give a larger max_norm, or null")
        frozen = {name: {split: tuple(items) for split, items in family.items()} for name, family in shards.items()}
        sites = [
            SiteRecord(
                **dataclasses.asdict(site),
                folder=site.folder,
                statistics=(moments or summed)[site.id].statistics(),
                shards=frozen[site.id],
            )
            for site in self.sites
        ]
        splits = {
            name: SplitRecord(
                plan.block_rows,
                stored[name] // plan.block_rows,
                kept[name] - stored[name] - outliers[name],
                outliers[name],
            )
            for name, plan in self.splits.items()
        }
        if provenance.get("outliers"):
            thresholds = {name: {**site, "rows": over[name]} for name, site in provenance["outliers"]["sites"].items()}
            provenance["outliers"] = {**provenance["outliers"], "sites": thresholds}
        if "alignment_sha256" not in provenance:
            files = provenance.get("packing", {}).get("files")
            order = {split: [shard.sha256 for shard in items] for split, items in frozen[ROWS_FOLDER].items()}
            provenance["alignment_sha256"] = sha256_json([files, order])
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

    def _shard_paths(self, name: str, row_bytes: int, split: str, bucket: int) -> tuple[list[Path], int]:
        """Return where a bucket's shards of a family go at most, and the blocks of each.

        Their numbers follow from the bucket's, so that any one can be redone.
        """
        folder = {site.id: site.folder for site in self.sites}.get(name, name)
        block_rows = self.splits[split].block_rows
        bucket_blocks = self.bucket_rows // block_rows
        shard_blocks = max(1, self.shard_bytes // (block_rows * row_bytes))
        count = -(-bucket_blocks // shard_blocks)
        return [self.root / folder / f"{split}-{bucket * count + i:06d}.tar" for i in range(count)], shard_blocks

    def _submit_family(
        self, pool: ThreadPoolExecutor, name: str, split: str, bucket: int, data: np.ndarray
    ) -> list[Future[ShardRecord]]:
        """Begin to write the shards of one bucket and family."""
        block_rows = self.splits[split].block_rows
        kind = "rows" if name == ROWS_FOLDER else "acts"
        first_block = bucket * (self.bucket_rows // block_rows)
        blocks = [
            (f"{first_block + i:08d}.{kind}.npy", data[i * block_rows : (i + 1) * block_rows])
            for i in range(len(data) // block_rows)
        ]
        paths, shard_blocks = self._shard_paths(name, data.shape[1] * data.itemsize, split, bucket)
        starts = range(0, len(blocks), shard_blocks)
        return [
            pool.submit(write_shard, path, blocks[start : start + shard_blocks])
            for path, start in zip(paths, starts, strict=False)
        ]

    def _remove_parts(self, split: str, bucket: int) -> None:
        """Remove what a killed process left of this bucket, and only of this one: others may be at work on theirs."""
        targets = [self._index_path(split, bucket)]
        for name, row_bytes in [(ROWS_FOLDER, 4 * len(ROW_FIELDS)), *((s.id, s.row_bytes) for s in self.sites)]:
            targets += self._shard_paths(name, row_bytes, split, bucket)[0]
        for folder in {path.parent for path in targets}:
            names = {path.name for path in targets if path.parent == folder}
            for stale in folder.glob("*.part-*"):
                if stale.name.partition(".part-")[0] in names:
                    stale.unlink(missing_ok=True)

    def record(self, split: str, bucket: int) -> dict[str, Any] | None:
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


def read_bucket(writer: DatasetWriter, split: str, bucket: int) -> list[torch.Tensor]:
    """Return the rows of a committed bucket, (rows, d) for each of the writer's sites, checked.

    Raises:
        DatasetError: it is not there, or damaged.
    """
    record = writer.record(split, bucket)
    if record is None:
        raise DatasetError(f"{writer.root}: {split} bucket {bucket} is not there")
    storage = LocalStorage(writer.root)
    parts = []
    for site in writer.sites:
        rows = torch.empty(record["stored_rows"], site.d, dtype=DTYPES[site.dtype])
        memory, at = rows.view(torch.uint8).numpy().reshape(-1).data, 0
        for shard in map(shard_from_json, record["shards"][site.id]):
            for number, block in enumerate(shard.blocks):
                extent = Extent(f"{site.folder}/{shard.file}", block.offset, block.crc32, shard.sha256, number)
                storage.read_block(extent, memory[at : at + block.nbytes])
                at += block.nbytes
        parts.append(rows)
    return parts


def _moments(block: np.ndarray) -> Moments:
    with np.errstate(invalid="ignore"):  # NaN and Inf are found in the sums
        return Moments.of(block)


def _threads() -> int:
    """Return how many threads write a bucket: the processors that this process may use, up to 8."""
    return min(MAX_THREADS, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


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
