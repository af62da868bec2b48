"""Second half of a harvest: forward passes, buckets, manifest; and what a restart does.

A bucket is a pure function of the stored tokens, its index, and the recorded batch shape and precision: batches are
aligned to the whole split, never to a bucket, so that any bucket can be made alone, in any order, at any time.
"""

from __future__ import annotations

import dataclasses
import errno
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from saeforge import __version__
from saeforge.data.manifest import Manifest, sha256_json
from saeforge.data.shards import DTYPES, ROW_FIELDS
from saeforge.data.tario import no_space
from saeforge.data.writer import DatasetWriter, SiteSpec, SplitPlan, bucket_permutation, choose_block_rows
from saeforge.errors import ConfigError, DatasetError, SaeforgeError
from saeforge.harvest.config import HarvestConfig
from saeforge.harvest.folder import DatasetFolder, available_memory
from saeforge.harvest.prepare import Prepared, open_prepared, prepare
from saeforge.harvest.progress import HarvestProgress
from saeforge.harvest.report import summary
from saeforge.lm.capture import Capture
from saeforge.lm.device import resolve_device
from saeforge.lm.isolation import probe_isolation
from saeforge.lm.load import LoadedModel, load_model, load_tokenizer, tokenizer_card, versions
from saeforge.lm.pack import Contexts
from saeforge.lm.tokens import choose_context_length, find_specials

MAX_BUCKET_ROWS = 2**20
MIN_BUCKET_ROWS = 2**12
ROW_PROVENANCE_BYTES = 4 * len(ROW_FIELDS)


def run_harvest(config: HarvestConfig) -> Manifest:
    """Harvest, or continue, or say that it is finished. See `saeforge.harvest.harvest`."""
    device = resolve_device(config.device)
    identity = {**config.identity(), "device": torch.device(device).type}
    folder = DatasetFolder(Path(config.out), identity)
    try:
        with folder.claim(overwrite=config.overwrite):
            finished = _finished(folder)
            if finished is not None:
                print(f"already finished: {folder.root}\n{summary(finished, folder.root)}")
                return finished
            manifest = _harvest(folder, config, device)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise no_space(folder.root, 0) from error
        raise
    print(summary(manifest, folder.root))
    return manifest


def _finished(folder: DatasetFolder) -> Manifest | None:
    """Return the manifest of a dataset that lacks nothing."""
    if not (folder.root / "manifest.json").is_file() or "plan" not in folder.card:
        return None
    if _writer(folder).missing_buckets():
        return None
    return Manifest.load(folder.root / "manifest.json")


def _harvest(folder: DatasetFolder, config: HarvestConfig, device: str) -> Manifest:
    """Do what is left to do."""
    tokenizer = load_tokenizer(config.model, config.revision)
    loaded = load_model(config.model, config.sites, revision=config.revision, dtype=config.model_dtype, device=device)
    tokenizer_says = tokenizer_card(tokenizer)
    for name, now in (("model", loaded.card), ("tokenizer", tokenizer_says)):
        if folder.card.setdefault(name, now) != now:
            raise ConfigError(f"the {name} changed since {folder.root} was begun; give --overwrite or another --out")
    context_length = choose_context_length(config.context_length, loaded.context_limit, tokenizer)
    with Capture(loaded.model, loaded.sites) as capture:
        tokens = folder.root / "tokens"
        tokens.mkdir(exist_ok=True)
        prepared = open_prepared(tokens) or prepare(
            tokens,
            config,
            context_length,
            tokenizer,
            find_specials(tokenizer),
            lambda segments: probe_isolation(capture, segments),
        )
        if "plan" not in folder.card:
            folder.card["plan"] = _plan(config, loaded, capture, prepared)
            folder.card["folders"] = [site["id"].replace(":", ".") for site in folder.card["plan"]["sites"]]
        folder.card["runs"] = [*folder.card.get("runs", []), {"saeforge": __version__, **versions()}]
        folder.save("harvesting")
        writer = _writer(folder)
        missing = writer.missing_buckets()
        _check_disk(folder.root, writer, missing)
        rows = {key: int(np.diff(writer.bucket_range(*key))[0]) for key in writer.buckets()}
        with HarvestProgress(sum(rows.values()), sum(rows.values()) - sum(rows[key] for key in missing)) as progress:
            for split, bucket in missing:
                contexts = prepared.contexts[split]
                data, provenance = make_bucket(
                    capture, contexts, writer, split, bucket, config.batch_contexts, config.seed, progress
                )
                writer.write_bucket(split, bucket, data, provenance)
    plan = folder.card["plan"]
    shuffle = {"seed": config.seed, "bucket_rows": plan["bucket_rows"], "generator": "numpy-philox"}
    manifest = writer.finish(
        alignment_sha256=sha256_json([prepared.record["files"], plan["splits"], shuffle]),
        model={**loaded.card, "batch_contexts": config.batch_contexts, "device": torch.device(device).type},
        tokenizer=tokenizer_says,
        versions=folder.card["runs"][-1] | {"resumed": folder.mixed_versions()},
        text={"source": config.text, "n_tokens": config.n_tokens, "document_tokens": config.document_tokens},
        packing=prepared.record,
        shuffle=shuffle,
    )
    folder.save("finished")
    return manifest


def _writer(folder: DatasetFolder) -> DatasetWriter:
    """Return the writer of the recorded plan."""
    plan = folder.card["plan"]
    return DatasetWriter(
        folder.root,
        [SiteSpec(**site) for site in plan["sites"]],
        {name: SplitPlan(**split) for name, split in plan["splits"].items()},
        bucket_rows=plan["bucket_rows"],
        config_sha256=folder.sha256,
    )


def _plan(config: HarvestConfig, loaded: LoadedModel, capture: Capture, prepared: Prepared) -> dict[str, Any]:
    """Decide widths, block rows and bucket rows; recorded once, so that a restart does not decide anew."""
    first = next(iter(prepared.contexts.values())).batch(0, 1)
    widths = {name: x.shape[-1] for name, x in capture(first.batch).items()}
    sites = [
        SiteSpec(site.id, site.module_path, site.where, widths[site.id], config.store_dtype, site.alias)
        for site in loaded.sites
    ]
    wanted = ("train", "validation") if config.validation_share else ("train",)
    kept = {name: prepared.contexts[name].kept_rows if name in prepared.contexts else 0 for name in wanted}
    widest = max(site.row_bytes for site in sites)
    splits = {name: SplitPlan(rows, choose_block_rows(rows, widest, split=name)) for name, rows in kept.items()}
    largest_block = max(split.block_rows for split in splits.values())
    if config.bucket_rows is None:
        needed = 1 << (max(kept.values()) - 1).bit_length()
        row_bytes = sum(site.row_bytes for site in sites) + ROW_PROVENANCE_BYTES
        fitting = available_memory() // 4 // row_bytes
        affordable = 1 << max(fitting.bit_length() - 1, 0)
        bucket_rows = max(min(MAX_BUCKET_ROWS, needed, max(affordable, MIN_BUCKET_ROWS)), largest_block)
    elif config.bucket_rows < largest_block:
        raise ConfigError(f"bucket_rows {config.bucket_rows} is less than one block: expected at least {largest_block}")
    else:
        bucket_rows = config.bucket_rows
    return {
        "sites": [dataclasses.asdict(site) for site in sites],
        "splits": {name: dataclasses.asdict(split) for name, split in splits.items()},
        "bucket_rows": bucket_rows,
    }


def make_bucket(
    capture: Capture,
    contexts: Contexts,
    writer: DatasetWriter,
    split: str,
    bucket: int,
    batch_contexts: int,
    seed: int,
    progress: HarvestProgress,
) -> tuple[dict[str, torch.Tensor], np.ndarray]:
    """Run the model over the contexts of one bucket.

    Returns:
        Per site (rows, d) in the stored dtype, and uint32 (rows, 4) provenance, both in the bucket's permuted order.

    Raises:
        DatasetError: an activation is NaN or infinite; names site, document and position.
    """
    start, stop = writer.bucket_range(split, bucket)
    place = np.empty(stop - start, dtype=np.int64)  # place[kept row] = stored row
    place[bucket_permutation(seed, split, bucket, stop - start)] = np.arange(stop - start)
    data = {site.id: torch.empty(stop - start, site.d, dtype=DTYPES[site.dtype]) for site in writer.sites}
    provenance = np.empty((stop - start, len(ROW_FIELDS)), dtype=np.uint32)
    kept_before = contexts.kept_before
    first = int(np.searchsorted(kept_before, start, side="right")) - 1
    last = int(np.searchsorted(kept_before, stop, side="left"))
    for at in range(first // batch_contexts * batch_contexts, last, batch_contexts):
        end = min(at + batch_contexts, len(contexts))
        batch = contexts.batch(at, end)
        low, high = max(start, int(kept_before[at])), min(stop, int(kept_before[end]))
        mine = slice(low - int(kept_before[at]), high - int(kept_before[at]))
        target = place[low - start : high - start]
        rows = batch.rows[mine]
        provenance[target] = rows
        activations = capture(batch.batch)
        for site in writer.sites:
            x = activations[site.id].flatten(0, 1)
            x = x.index_select(0, batch.kept[mine].to(x.device)).to(DTYPES[site.dtype])
            finite = torch.isfinite(x).all(dim=1)
            if not bool(finite.all()):
                document, position = rows[int((~finite).nonzero()[0])][:2]
                raise DatasetError(
                    f"{site.id}: NaN or infinite activation in document {document} at token {position} (see "
                    "tokens/documents.jsonl); try --model_dtype float32, or leave that document out"
                )
            data[site.id].index_copy_(0, torch.from_numpy(target), x.cpu())
        progress.add(high - low)
    return data, provenance


def _check_disk(root: Path, writer: DatasetWriter, missing: list[tuple[str, int]]) -> None:
    """Tell that the disk is too small before hours of work, not after."""
    rows = sum(int(np.diff(writer.bucket_range(*key))[0]) for key in missing)
    needed = rows * (sum(site.row_bytes for site in writer.sites) + ROW_PROVENANCE_BYTES)
    free = shutil.disk_usage(root).free
    if needed > free:
        raise SaeforgeError(
            f"the dataset needs {needed / 2**20:,.0f} MiB more, {root} has {free / 2**20:,.0f} MiB free; "
            "free some space, lower n_tokens, or choose another --out"
        )
