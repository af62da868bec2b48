"""Looking at every byte of a finished dataset, and listing all that is wrong with it."""

from __future__ import annotations

import hashlib
import json
import math
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from saeforge.data.checksum import crc32
from saeforge.data.manifest import Manifest, ShardRecord, SiteRecord, sha256_json, shard_from_json
from saeforge.data.moments import Moments
from saeforge.data.shards import DTYPES, ROW_FIELDS, ROWS_FOLDER, load_manifest, size_fault
from saeforge.data.storage import Storage, open_storage
from saeforge.errors import DatasetError

STORED = {"bfloat16": "<u2", "float32": "<f4"}
CHUNK_BYTES = 1 << 23


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        shard: the file, by its name below the dataset's folder.
        block: number of the block within the file; None: no block in particular.
        message: what is wrong, in words.
    """

    shard: str
    block: int | None
    message: str

    def __str__(self) -> str:
        place = self.shard if self.block is None else f"{self.shard}, block {self.block}"
        return f"{place}: {self.message}"


def verify_dataset(
    root: str | Path,
    *,
    sites: Sequence[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Finding]:
    """Read a dataset whole, from its own place (never a cache), and list what is wrong with it.

    Looked at: the size of each shard and its sha256; of each block the tar header, the `.npy` header, crc32, NaN and
    infinity, the padding; provenance against the stored tokens; tokens against their sha256; commit records against
    the manifest; statistics against commit records.

    Args:
        root: folder or URL.
        sites: names of sites to look at, besides the provenance; None for all.
        progress: told (bytes done, bytes of all shards) now and then.

    Returns:
        Findings in the order of the files; empty for a sound dataset.

    Raises:
        DatasetError: there is no finished dataset, or no such site.
    """
    storage = open_storage(root)
    try:
        manifest = load_manifest(storage)
    except DatasetError as error:
        if storage.read_file("manifest.json") is None:
            raise
        return [Finding("manifest.json", None, str(error))]
    chosen = manifest.sites if sites is None else tuple(manifest.site(name, root=root) for name in sites)
    return list(_Verifier(storage, manifest, chosen, progress).findings())


class _Verifier:
    """One walk through a dataset."""

    def __init__(
        self,
        storage: Storage,
        manifest: Manifest,
        sites: Sequence[SiteRecord],
        progress: Callable[[int, int], None] | None,
    ) -> None:
        self.storage, self.manifest, self.sites = storage, manifest, sites
        self._progress = progress
        families = [site.shards for site in sites] + [manifest.rows]
        self._total = sum(shard.nbytes for family in families for shards in family.values() for shard in shards)
        self._done = 0
        self._size = 0  # of the file that is read
        self._window = "", 0, memoryview(b"")

    def findings(self) -> Iterator[Finding]:
        """Yield all that is wrong."""
        yield from self._records()
        files = self.manifest.packing.get("files", {})
        damaged = list(self._token_files(files))
        yield from damaged
        for site in self.sites:
            yield from self._statistics(site)
            for split, shards in site.shards.items():
                yield from self._family(site.folder, "acts", split, shards, site)
        for split, shards in self.manifest.rows.items():
            names = {f"{split}.{array}.npy" for array in ("documents", "positions", "tokens", "keep", "offsets")}
            # What the tokens should prove must be right itself; and rows that no harvest made have none.
            whole = names <= files.keys() and not {f"tokens/{name}" for name in names} & {f.shard for f in damaged}
            tokens = _Tokens(self.storage, split, {name: files[name] for name in names}) if whole else None
            yield from self._family(ROWS_FOLDER, "rows", split, shards, tokens)

    def _family(
        self, folder: str, kind: str, split: str, shards: Sequence[ShardRecord], about: SiteRecord | _Tokens | None
    ) -> Iterator[Finding]:
        files = [f"{folder}/{shard.file}" for shard in shards]
        for file, shard, size in zip(files, shards, self.storage.sizes(files), strict=True):
            fault = size_fault(size, shard)
            if fault:
                yield Finding(file, None, fault)
            if size is not None:
                self._size = size
                yield from self._shard(file, shard, kind, split, about, whole=fault is None)

    def _shard(
        self,
        file: str,
        shard: ShardRecord,
        kind: str,
        split: str,
        about: SiteRecord | _Tokens | None,
        *,
        whole: bool,
    ) -> Iterator[Finding]:
        """Walk through one shard; what cannot be laid at the door of a block is told by its sha256."""
        digest = hashlib.sha256()
        position = 0
        first: int | None = None
        found = not whole
        sound: list[tuple[int, np.ndarray]] = []
        for number, block in enumerate(shard.blocks):
            head = block.offset - position
            padding = -block.nbytes % tarfile.BLOCKSIZE
            try:
                buffer = self._bytes(file, position, head + block.nbytes + padding)
            except DatasetError as error:
                found = True
                yield Finding(file, number, str(error))
                position = block.offset + block.nbytes + padding
                continue
            digest.update(buffer)
            payload = buffer[head : head + block.nbytes]
            rows = self.manifest.splits[split].block_rows
            if isinstance(about, SiteRecord):
                dtype, shape = STORED[about.dtype], (rows, about.d)
            else:
                dtype, shape = "<u4", (rows, len(ROW_FIELDS))
            faults = []
            try:
                member = tarfile.TarInfo.frombuf(bytes(buffer[: tarfile.BLOCKSIZE]), "utf-8", "strict")
            except (tarfile.HeaderError, ValueError) as error:
                faults.append(f"its tar header is damaged ({error})")
            else:
                # Numbers run on within a shard; where they begin, only its members say.
                first = int(member.name[:8]) - number if first is None and member.name[:8].isdigit() else first
                name = f"{(first or 0) + number:08d}.{kind}.npy"
                if (member.name, member.size, member.isreg()) != (name, head - tarfile.BLOCKSIZE + block.nbytes, True):
                    faults.append(f"its tar header says {member.name}, {member.size} bytes; expected {name}")
            if not _npy_header_fits(bytes(buffer[tarfile.BLOCKSIZE : head]), dtype, shape):
                faults.append(f"its .npy header is damaged: expected {dtype} {shape}")
            if crc32(payload) != block.crc32:
                faults.append("checksum mismatch, the data is damaged")
            elif isinstance(about, SiteRecord):
                if not _finite(payload, about):
                    faults.append("holds NaN or infinite activations")
            elif block.nbytes == math.prod(shape) * 4:
                sound.append((number, np.frombuffer(payload, dtype=dtype).reshape(shape)))
            if any(buffer[head + block.nbytes :]):
                faults.append("the padding behind it is not zero")
            found = found or bool(faults)
            yield from (Finding(file, number, fault) for fault in faults)
            position = block.offset + block.nbytes + padding
        if isinstance(about, _Tokens) and sound:
            yield from (Finding(file, number, fault) for number, fault in about.faults(sound))
        if whole:
            end = self._bytes(file, position, shard.nbytes - position)
            digest.update(end)
            if any(end):
                yield Finding(file, None, "damaged behind the last block")
            elif not found and digest.hexdigest() != shard.sha256:
                yield Finding(file, None, "its sha256 does not match, though every block is right")

    def _bytes(self, file: str, offset: int, count: int) -> memoryview:
        """Return some bytes of a file; small ones are read many at once, a request each would take long."""
        name, start, window = self._window
        if name != file or not start <= offset <= offset + count <= start + len(window):
            if count < 0:
                raise DatasetError("the manifest's offsets overlap")
            start, window = offset, memoryview(bytearray(max(count, min(CHUNK_BYTES, self._size - offset))))
            try:
                self.storage.read(file, offset, window, "")
            except DatasetError as error:
                raise DatasetError(str(error).removeprefix(": ")) from error
            self._window = file, start, window
        self._done += count
        if self._progress:
            self._progress(min(self._done, self._total), self._total)
        return window[offset - start : offset - start + count]

    def _records(self) -> Iterator[Finding]:
        """Compare the commit records with the manifest."""
        manifest = self.manifest
        bucket_rows = manifest.shuffle.get("bucket_rows")
        moments = {site.id: Moments.empty(site.d) for site in manifest.sites}
        complete = True
        for split, cut in manifest.splits.items():
            listed: dict[str, list[ShardRecord]] = {}
            # Outliers were left out of their buckets: the buckets were cut before.
            kept = cut.n_blocks * cut.block_rows + cut.dropped_rows + cut.outlier_rows
            n_buckets = -(-(kept // cut.block_rows * cut.block_rows) // bucket_rows) if bucket_rows else 0
            missing = []
            for file in (f"index/{split}-{bucket:06d}.json" for bucket in range(n_buckets)):
                content = self.storage.read_file(file)
                if content is None:
                    missing.append(file)
                    continue
                try:
                    record = json.loads(content)
                    checksum = record.pop("sha256")
                    if checksum != sha256_json(record):
                        raise ValueError("its checksum does not match")
                    if record["config_sha256"] != manifest.config_sha256:
                        raise ValueError("it belongs to a harvest with other options")
                    for name, items in record["shards"].items():
                        listed.setdefault(name, []).extend(shard_from_json(item) for item in items)
                    if split == "train":
                        for site in manifest.sites:
                            moments[site.id] = moments[site.id].merge(Moments.from_json(record["moments"][site.id]))
                except (ValueError, KeyError, TypeError, AttributeError) as error:
                    complete = False
                    yield Finding(file, None, f"the commit record is damaged ({error})")
            if missing:
                complete = False
                more = f", and {len(missing) - 1} more" if len(missing) > 1 else ""
                yield Finding(missing[0], None, f"the commit record is missing{more}")
            if not missing and complete:
                families = {ROWS_FOLDER: manifest.rows, **{site.id: site.shards for site in manifest.sites}}
                for name, shards in families.items():
                    if bucket_rows and tuple(listed.get(name, ())) != shards[split]:
                        yield Finding("manifest.json", None, f"shards of {name}, {split}, are not those of index/")
        if complete and bucket_rows and manifest.splits["train"].n_blocks:  # a live run stores none
            for site in manifest.sites:
                merged, said = moments[site.id].statistics(), site.statistics
                sums = ("count", "mean", "variance", "mean_norm", "mean_square_norm", "max_norm")
                same = [np.allclose(getattr(merged, name), getattr(said, name), rtol=1e-9) for name in sums]
                if not all(same) or merged.norm_histogram != said.norm_histogram:
                    yield Finding("manifest.json", None, f"statistics of {site.id} are not those of index/")

    def _token_files(self, files: dict[str, str]) -> Iterator[Finding]:
        """Check the stored tokens against the checksums that packing made."""
        names = [f"tokens/{name}" for name in files]
        for file, sha256, size in zip(names, files.values(), self.storage.sizes(names), strict=True):
            if size is None:
                yield Finding(file, None, "is missing")
                continue
            digest = hashlib.sha256()
            try:
                for start in range(0, size, CHUNK_BYTES):
                    buffer = memoryview(bytearray(min(CHUNK_BYTES, size - start)))
                    self.storage.read(file, start, buffer, "")
                    digest.update(buffer)
            except DatasetError as error:
                yield Finding(file, None, str(error).removeprefix(": "))
                continue
            if digest.hexdigest() != sha256:
                yield Finding(file, None, "is damaged: its sha256 does not match")
        if files:
            content = self.storage.read_file("tokens/packing.json")
            try:
                if content is None:
                    yield Finding("tokens/packing.json", None, "is missing")
                elif json.loads(content) != self.manifest.packing:
                    yield Finding("tokens/packing.json", None, "is not what the manifest says")
            except ValueError as error:
                yield Finding("tokens/packing.json", None, f"is damaged ({error})")

    def _statistics(self, site: SiteRecord) -> Iterator[Finding]:
        train = self.manifest.splits["train"]
        # A live run stores no training rows: its statistics are those of a sample.
        if train.n_blocks and site.statistics.count != train.n_blocks * train.block_rows:
            yield Finding("manifest.json", None, f"statistics of {site.id} count {site.statistics.count} rows")


class _Tokens:
    """The stored tokens of one split, to hold provenance against."""

    def __init__(self, storage: Storage, split: str, files: dict[str, str]) -> None:
        with storage.local_files("tokens", files) as folder:
            arrays = {name.split(".")[1]: np.load(folder / name, mmap_mode="r") for name in files}
        self.arrays = {name: np.asarray(array) for name, array in arrays.items()}

    def faults(self, blocks: Iterable[tuple[int, np.ndarray]]) -> Iterator[tuple[int, str]]:
        """Yield (block, fault) of the blocks of one shard, whose rows come from neighbouring contexts."""
        offsets = self.arrays["offsets"]
        numbers = np.concatenate([np.full(len(rows), number) for number, rows in blocks])
        rows = np.concatenate([rows for _, rows in blocks]).astype(np.int64)
        outside = rows[:, 3] >= len(offsets) - 1
        for number in dict.fromkeys(numbers[outside].tolist()):
            yield number, f"its provenance names contexts beyond the {len(offsets) - 1} that tokens/ holds"
        numbers, rows = numbers[~outside], rows[~outside]
        if not len(rows):
            return
        first, last = int(offsets[rows[:, 3].min()]), int(offsets[rows[:, 3].max() + 1])
        kept = np.flatnonzero(self.arrays["keep"][first:last]) + first
        keys = (self.arrays["documents"][kept].astype(np.int64) << 32) | self.arrays["positions"][kept]
        order = np.argsort(keys)
        keys, kept = keys[order], kept[order]
        wanted = (rows[:, 0] << 32) | rows[:, 1]
        at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
        stands = kept[at]
        right = (
            (keys[at] == wanted)
            & (self.arrays["tokens"][stands] == rows[:, 2])
            & (np.searchsorted(offsets, stands, side="right") - 1 == rows[:, 3])
        )
        for number in dict.fromkeys(numbers[~right].tolist()):
            yield number, "its provenance names tokens that tokens/ does not hold at that place"
        _, where, counts = np.unique(wanted, return_index=True, return_counts=True)
        for number in dict.fromkeys(numbers[where[counts > 1]].tolist()):
            yield number, "its provenance names a token that its shard holds twice"


def _npy_header_fits(header: bytes, dtype: str, shape: tuple[int, ...]) -> bool:
    """Whether a header is version 1.0 of numpy's format, spelled as this format spells it; nothing is evaluated."""
    pattern = rf"\{{'descr': '{re.escape(dtype)}', 'fortran_order': False, 'shape': {re.escape(repr(shape))}, \}} *\n"
    start = b"\x93NUMPY\x01\x00" + (len(header) - 10).to_bytes(2, "little")
    return header[:10] == start and re.fullmatch(pattern, header[10:].decode("latin-1")) is not None


def _finite(payload: memoryview, site: SiteRecord) -> bool:
    x = torch.frombuffer(payload, dtype=DTYPES[site.dtype])
    # A sum is 40 times faster than isfinite and cannot hide a NaN or Inf; it may overflow, so it only asks.
    return math.isfinite(x.sum().item()) or bool(torch.isfinite(x).all())
