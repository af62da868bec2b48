"""Making a dataset of activations that others stored: `.npy`, `.safetensors`, tars of `.npy`, SAELens' Arrow cache.

Rows are cut into units: a context where the arrays have a dimension for contexts, else a run of 256 rows. Whole units
go to a split, from 16 stripes spread over the sources, so that neighbours, which are often of one document, are rarely
on both sides. Units are permuted over the whole split, rows inside each bucket; so one bucket is in memory at a time.
The buckets are written like those of a harvest, and an interrupted import goes on with the bucket that is missing.
"""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from saeforge.data.foreign import first_bad_row
from saeforge.data.imports.arrays import ForeignArray, open_arrays
from saeforge.data.imports.arrow import ArrowArray
from saeforge.data.imports.folder import CARD, claim
from saeforge.data.imports.units import Units
from saeforge.data.layout import MIN_ROWS, SiteSpec, SplitPlan, bucket_permutation, choose_block_rows
from saeforge.data.manifest import Manifest, write_json
from saeforge.data.shards import DTYPES, ROW_FIELDS
from saeforge.data.writer import DatasetWriter
from saeforge.errors import ConfigError, DatasetError, SaeforgeError

MAX_BUCKET_ROWS = 2**20
MAX_BUCKET_BYTES = 2**30

Progress = Callable[[int, int], None]


def import_activations(
    sources: Sequence[str | Path],
    out: str | Path,
    *,
    key: str | None = None,
    site: str | None = None,
    dtype: str = "auto",
    model: str | None = None,
    validation_share: float = 0.1,
    shuffle: bool = True,
    seed: int = 0,
    skip_token_ids: Sequence[int] = (),
    bucket_rows: int | None = None,
    overwrite: bool = False,
    note: Callable[[str], None] = lambda text: None,
    progress: Progress = lambda done, total: None,
) -> Manifest:
    """Make a dataset of stored activations; an interrupted import goes on with the same call.

    Args:
        sources: `.npy` (rows, d) or (contexts, length, d), `.safetensors`, tars of `.npy`, folders of them, or a folder
            of Arrow files as SAELens' CacheActivationsRunner writes it.
        out: folder of the dataset.
        key: tensor, tar member or column to take, see `open_arrays`.
        site: where the activations come from, best as `module.path:out` of the HuggingFace model.
        dtype: "bfloat16", "float32", or "auto": bfloat16 stays, everything else is float32 (float16 does not fit into
            bfloat16 without rounding).
        model: name to record.
        validation_share: share of the rows held out, in whole contexts, from 16 stripes spread over the sources.
        shuffle: False keeps the order of the rows.
        seed: of the shuffle.
        skip_token_ids: leave out the rows of these tokens, for example BOS; counted in `text.skipped` of the manifest.
        bucket_rows: rows in memory at once, a power of two; None: 1 GiB of them, at most 1,048,576.
        overwrite: replace an import with other options, or of other files, in the same folder.
        note: receives remarks, for example that values are cast.
        progress: receives (rows done, rows in all) of this run.

    Returns:
        The manifest. Provenance is (context, position in it, token id or 0, context), contexts numbered through all
        sources; `text.sources` says which are in which file.

    Raises:
        ConfigError: wrong option, format or folder.
        DatasetError: damaged sources, NaN or infinite values, too few rows.
        SaeforgeError: the disk is full.
    """
    skipped = sorted(set(skip_token_ids))
    _check_options(dtype, validation_share, seed, bucket_rows, skipped)
    arrays = open_arrays(sources, key)
    stored = _stored_dtype(arrays, dtype, note)
    units = Units(arrays, validation_share=validation_share, seed=seed, shuffle=shuffle, skip_tokens=skipped)
    if skipped:
        total = sum(array.rows for array in arrays)
        note(
            f"{units.skipped_rows:,} of {total:,} rows are left out: they are of tokens {', '.join(map(str, skipped))}"
        )
    spec = _site_spec(site or _arrow_column(arrays) or "array:out", arrays[0].d, stored)
    kept = {split: units.kept_rows(split) for split in units.order}
    for split, rows in kept.items():
        if rows < MIN_ROWS:
            raise DatasetError(
                f"split {split} would have {rows} rows, at least {MIN_ROWS} are needed; give more files, or another "
                "--validation_share (0 for none)"
            )
    plans = {
        split: SplitPlan(rows, choose_block_rows(rows, spec.row_bytes, split=split)) for split, rows in kept.items()
    }
    bucket_rows = _bucket_rows(bucket_rows, plans, spec.row_bytes)
    table = _source_table(arrays, units)
    identity: dict[str, Any] = {
        "import": table,
        "site": dataclasses.asdict(spec),
        "model": model,
        "validation_share": validation_share,
        "shuffle": shuffle,
        "seed": seed,
        "bucket_rows": bucket_rows,
    }
    if skipped:  # not there without, so that imports begun before this option go on
        identity["skip_token_ids"] = skipped
    root = Path(out)
    modified = {str(path): path.stat().st_mtime_ns for path in sorted({array.path for array in arrays})}
    plan = {
        "sites": [dataclasses.asdict(spec)],
        "splits": {split: dataclasses.asdict(p) for split, p in plans.items()},
        "bucket_rows": bucket_rows,
    }
    with claim(root, identity, plan, modified, overwrite=overwrite) as card:
        writer = DatasetWriter(root, [spec], plans, bucket_rows=bucket_rows, config_sha256=card["config_sha256"])
        missing = writer.missing_buckets()
        if not missing and (root / "manifest.json").is_file():
            note(f"{root} is finished already")
            return Manifest.load(root / "manifest.json")
        # Times are no part of the identity (the same data twice is the same dataset), but files that changed between
        # two runs of one import would be mixed.
        if card["modified"] != modified and len(missing) < len(list(writer.buckets())):
            raise ConfigError(f"the sources changed since {root} was begun; give --overwrite true or another --out")
        sizes = {bucket: int(np.diff(writer.bucket_range(*bucket))[0]) for bucket in missing}
        needed = sum(sizes.values()) * (spec.row_bytes + 4 * len(ROW_FIELDS))
        free = shutil.disk_usage(root).free
        if needed > free:
            raise SaeforgeError(
                f"the dataset needs {needed / 2**20:,.0f} MiB more, {root} has {free / 2**20:,.0f} MiB free; free some "
                "space, or choose another --out or --dtype bfloat16"
            )
        done = 0
        for split, bucket in missing:

            def advance(rows: int, before: int = done) -> None:
                progress(before + rows, sum(sizes.values()))

            x, provenance = _make_bucket(arrays, units, writer, split, bucket, seed if shuffle else None, advance)
            writer.write_bucket(split, bucket, {spec.id: x}, provenance)
            done += sizes[split, bucket]
        known = all(array.has_tokens for array in arrays)
        left_out = {"skipped": {"token_ids": skipped, "rows": units.skipped_rows}} if skipped else {}
        # Without tokens nothing says that the rows of two imports are of the same text.
        aligned = {} if known else {"alignment_sha256": card["config_sha256"]}
        manifest = writer.finish(
            **aligned,
            model={"name": model} if model else {},
            text={"source": "import", "sources": table, "token_ids": known, **left_out},
            shuffle={"seed": seed, "bucket_rows": bucket_rows, "generator": "numpy-philox", "shuffled": shuffle},
        )
        write_json(root / CARD, {**card, "status": "finished"})
    return manifest


def _make_bucket(
    arrays: Sequence[ForeignArray],
    units: Units,
    writer: DatasetWriter,
    split: str,
    bucket: int,
    seed: int | None,
    advance: Callable[[int], None],
) -> tuple[torch.Tensor, np.ndarray]:
    """Read, cast and check the rows of a bucket, each into its place."""
    start, stop = writer.bucket_range(split, bucket)
    (site,) = writer.sites
    place = np.arange(stop - start)  # place[kept row] = stored row
    if seed is not None:
        place[bucket_permutation(seed, split, bucket, stop - start)] = np.arange(stop - start)
    data = torch.empty(stop - start, site.d, dtype=DTYPES[site.dtype])
    provenance = np.zeros((stop - start, len(ROW_FIELDS)), dtype=np.uint32)
    done = 0
    for number, rows, kept, contexts in units.reads(split, start, stop):
        array, target = arrays[number], place[kept - start]
        first, last = int(rows[0]), int(rows[-1]) + 1
        x = array.read(first, last).to(data.dtype)
        if len(rows) < last - first:
            x = x.index_select(0, torch.from_numpy(rows - first))
        if (bad := first_bad_row(x)) is not None:
            raise DatasetError(
                f"{array.where}, row {rows[bad]}: NaN or infinite (as {site.dtype}); leave such rows out, or if the "
                "numbers are too large for this dtype, choose another --dtype"
            )
        data.index_copy_(0, torch.from_numpy(target), x)
        provenance[target, 0] = provenance[target, 3] = contexts
        provenance[target, 1] = rows - units.start[contexts]
        tokens = array.tokens(first, last)
        if tokens is not None:
            provenance[target, 2] = tokens[rows - first]
        done += len(rows)
        advance(done)
    return data, provenance


def _check_options(
    dtype: str, validation_share: float, seed: int, bucket_rows: int | None, skipped: Sequence[int]
) -> None:
    if dtype not in ("auto", *DTYPES):
        raise ConfigError(f"dtype = {dtype!r}: expected auto, {' or '.join(DTYPES)}")
    if not 0 <= validation_share < 1:
        raise ConfigError(f"validation_share = {validation_share}: expected 0 to less than 1")
    if seed < 0:
        raise ConfigError(f"seed = {seed}: expected 0 or a positive number")
    if skipped and skipped[0] < 0:
        raise ConfigError(f"skip_token_ids = {skipped[0]}: expected token ids, 0 or more")
    if bucket_rows is not None and (bucket_rows < 1 or bucket_rows & (bucket_rows - 1)):
        raise ConfigError(f"bucket_rows = {bucket_rows}: expected a power of two")


def _stored_dtype(arrays: Sequence[ForeignArray], dtype: str, note: Callable[[str], None]) -> str:
    """Choose the dtype to store, and say what is cast and what is taken for bfloat16."""
    found = {array.dtype: array for array in arrays}
    stored = dtype if dtype != "auto" else "bfloat16" if set(found) == {"bfloat16"} else "float32"
    if "bfloat16" in found and found["bfloat16"].path.suffix in (".npy", ".tar"):
        note(f"{found['bfloat16'].where}: 16-bit values without a type of their own are taken for the bits of bfloat16")
    for name in sorted(set(found) - {stored}):
        lossy = {"float64": "rounded to ", "bfloat16": "exactly as "}.get(name, "exactly as ")
        if stored == "bfloat16":
            lossy = "rounded to "
        hint = "; --dtype bfloat16 would halve the size and round" if (name, stored) == ("float16", "float32") else ""
        note(f"{name} values are stored {lossy}{stored}{hint}")
    return stored


def _arrow_column(arrays: Sequence[ForeignArray]) -> str | None:
    return arrays[0].name if isinstance(arrays[0], ArrowArray) else None


def _site_spec(name: str, d: int, dtype: str) -> SiteSpec:
    path, _, where = name.rpartition(":")
    if where not in ("in", "out"):
        path, where = name, "out"
    if not path or set(path) & {"/", "\\", ":"} or path.startswith("."):
        raise ConfigError(f"site = {name!r}: expected a module path, like model.layers.6:out")
    return SiteSpec(f"{path}:{where}", path, where, d, dtype)


def _bucket_rows(wanted: int | None, plans: dict[str, SplitPlan], row_bytes: int) -> int:
    largest = max(plan.block_rows for plan in plans.values())
    if wanted is not None:
        if wanted < largest:
            raise ConfigError(f"bucket_rows {wanted} is less than one block: expected at least {largest}")
        return wanted
    needed = 1 << (max(plan.kept_rows for plan in plans.values()) - 1).bit_length()
    affordable = 1 << ((MAX_BUCKET_BYTES // row_bytes).bit_length() - 1)
    return max(min(MAX_BUCKET_ROWS, needed, affordable), largest)


def _source_table(arrays: Sequence[ForeignArray], units: Units) -> list[dict[str, Any]]:
    """Describe each file: name, bytes, rows, its first context, and the sha256 of what its headers say."""
    table: dict[Path, dict[str, Any]] = {}
    digests: dict[Path, Any] = {}
    firsts = np.searchsorted(units.array, np.arange(len(arrays)))
    for array, first in zip(arrays, firsts, strict=True):
        entry = table.setdefault(
            array.path,
            {
                "file": array.path.name,
                "bytes": array.path.stat().st_size,
                "arrays": 0,
                "rows": 0,
                "dtype": array.dtype,
                "context_length": array.context,
                "first_context": int(first),
            },
        )
        entry["arrays"] += 1
        entry["rows"] += array.rows
        digest = digests.setdefault(array.path, hashlib.sha256())
        digest.update(repr((array.name, array.rows, array.d, array.dtype, array.context)).encode())
    return [{**entry, "headers_sha256": digests[path].hexdigest()} for path, entry in table.items()]
