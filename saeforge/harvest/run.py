"""Second half of a harvest: forward passes, buckets, manifest; what a restart does, and several processes at once.

A bucket is a pure function of the stored tokens, its index, and the recorded batch shape and precision. So it does not
matter which process makes it, nor when, nor how often: processes claim buckets, none waits for another until the end.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from saeforge import __version__
from saeforge.data.layout import MIN_BLOCK_ROWS, SiteSpec, SplitPlan, bucket_permutation, choose_block_rows
from saeforge.data.manifest import Manifest
from saeforge.data.moments import Moments
from saeforge.data.shards import DTYPES, ROW_FIELDS
from saeforge.data.tario import no_space
from saeforge.data.writer import DatasetWriter
from saeforge.errors import ConfigError, SaeforgeError
from saeforge.harvest.behind import Behind, write_rows
from saeforge.harvest.buckets import make_rows
from saeforge.harvest.config import HarvestConfig
from saeforge.harvest.folder import DatasetFolder, available_memory
from saeforge.harvest.outliers import measure_pilot
from saeforge.harvest.prepare import Prepared
from saeforge.harvest.progress import HarvestProgress
from saeforge.harvest.ranks import Rank
from saeforge.harvest.report import summary
from saeforge.harvest.work import Options, TextWork, Work
from saeforge.lm.capture import Capture
from saeforge.lm.device import resolve_device
from saeforge.lm.load import LoadedModel, versions

MAX_BUCKET_ROWS = 2**20
MIN_BUCKET_ROWS = 2**12
ROW_PROVENANCE_BYTES = 4 * len(ROW_FIELDS)
SECONDS_BETWEEN_LOOKS = 0.5


def run_harvest(config: HarvestConfig) -> Manifest:
    """Harvest text, or continue, or say that it is finished. See `saeforge.harvest.harvest`."""
    return run_work(config, lambda device: TextWork.load(config, device))


def run_work(config: Options, load: Callable[[str], Work]) -> Manifest:
    """Harvest, or continue, or say that it is finished.

    Args:
        config: options.
        load: makes what is to be done, given the torch device; called only if anything is left to do.
    """
    rank = Rank.here()
    device = rank.device(config.device, resolve_device(config.device), torch.cuda.device_count())
    place = torch.device(device)
    if place.type == "cuda" and place.index is not None:  # or every process would open a context on the first device
        torch.cuda.set_device(place)
    folder = DatasetFolder(Path(config.out), {**config.identity(), "device": place.type})
    try:
        manifest, news = _run(folder, config, rank, device, load)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise no_space(folder.root, 0) from error
        raise
    if rank.number == 0:
        print(("" if news else f"already finished: {folder.root}\n") + summary(manifest, folder.root))
    return manifest


def _run(
    folder: DatasetFolder, config: Options, rank: Rank, device: str, load: Callable[[str], Work]
) -> tuple[Manifest, bool]:
    """Return the manifest, and whether anything was left to do."""
    work: Work | None = None
    with contextlib.ExitStack() as stack:
        with folder.alone():
            stack.enter_context(folder.joined(overwrite=config.overwrite))
            folder.remove_parts()
            finished = _finished(folder)
            if finished is not None:
                return finished, False
            if "plan" not in folder.card:
                work = load(device)
                prepare(folder, config, work, rank)
            elif folder.card["status"] == "finished":  # it was, but something is lost
                folder.save("harvesting")
        work = work or load(device)
        with folder.alone():
            folder.reread()
            if folder.card["status"] == "finished":
                return Manifest.load(folder.root / "manifest.json"), True
            register(folder, work)
        prepared = work.open(folder.root / "tokens")
        _fill(folder, config, work, prepared, rank)
        with folder.alone():
            folder.reread()
            if folder.card["status"] == "finished":  # by another process, meanwhile
                return Manifest.load(folder.root / "manifest.json"), True
            folder.remove_parts()
            return finish(folder, config, work, prepared), True


def _finished(folder: DatasetFolder) -> Manifest | None:
    """Return the manifest of a dataset that lacks nothing. To be called alone."""
    path = folder.root / "manifest.json"
    if not path.is_file() or "plan" not in folder.card or open_writer(folder).missing_buckets():
        return None
    manifest = Manifest.load(path)
    if not covers(manifest, open_writer(folder)):  # a live run's, of its held-out rows alone
        return None
    if folder.card["status"] != "finished":  # killed between the two
        folder.save("finished")
    return manifest


def covers(manifest: Manifest, writer: DatasetWriter) -> bool:
    """Whether a manifest accounts for every kept row of the plan."""
    rows = {
        name: split.n_blocks * split.block_rows + split.dropped_rows + split.outlier_rows
        for name, split in manifest.splits.items()
    }
    return rows == {name: plan.kept_rows for name, plan in writer.splits.items()}


def prepare(
    folder: DatasetFolder, config: Options, work: Work, rank: Rank, *, blocks_per_bucket: int | None = None
) -> None:
    """Store tokens and decide what depends on them and on the model: all processes find it in the card.

    Args:
        folder: of the dataset, held alone.
        config: its options.
        work: model and what it is to see.
        rank: this process among others.
        blocks_per_bucket: cut training blocks so small that a bucket has that many; None: as large as they may be.
    """
    tokens = folder.root / "tokens"
    tokens.mkdir(exist_ok=True)
    with Capture(work.loaded.model, work.loaded.sites) as capture:
        prepared = work.prepare(tokens, capture)
        plan = _plan(config, work.loaded, capture, prepared, rank, blocks_per_bucket)
        if config.max_norm is not None:
            plan["outliers"] = measure_pilot(
                capture,
                prepared.contexts["train"],
                {site.id: DTYPES[config.store_dtype] for site in work.loaded.sites},
                batch_contexts=config.batch_contexts,
                max_norm=config.max_norm,
            )
    folder.card |= {
        "model": work.loaded.card,
        "tokenizer": work.tokenizer_card,
        "plan": plan,
        "folders": [site["id"].replace(":", ".") for site in plan["sites"]],
    }
    folder.save("harvesting")


def _plan(
    config: Options,
    loaded: LoadedModel,
    capture: Capture,
    prepared: Prepared,
    rank: Rank,
    blocks_per_bucket: int | None,
) -> dict[str, Any]:
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
    if blocks_per_bucket is not None and config.bucket_rows is not None:
        most = max(MIN_BLOCK_ROWS, config.bucket_rows // blocks_per_bucket)
        splits = {name: SplitPlan(s.kept_rows, min(s.block_rows, most)) for name, s in splits.items()}
    largest_block = max(split.block_rows for split in splits.values())
    if config.bucket_rows is None:
        needed = 1 << (max(kept.values()) - 1).bit_length()
        row_bytes = sum(site.row_bytes for site in sites) + ROW_PROVENANCE_BYTES
        fitting = available_memory() // (4 * rank.local_world) // row_bytes  # two buckets, and as much again free
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


def register(folder: DatasetFolder, work: Work) -> None:
    """Check that this process has the model that the dataset was begun with, and write down its versions."""
    for name, now in (("model", work.loaded.card), ("tokenizer", work.tokenizer_card)):
        if folder.card[name] != now:
            raise ConfigError(f"the {name} changed since {folder.root} was begun; give --overwrite or another --out")
    folder.register({"saeforge": __version__, **versions()})
    folder.save(folder.card["status"])  # a live run may use a finished dataset


def open_writer(folder: DatasetFolder) -> DatasetWriter:
    """Return the writer of the recorded plan."""
    plan = folder.card["plan"]
    return DatasetWriter(
        folder.root,
        [SiteSpec(**site) for site in plan["sites"]],
        {name: SplitPlan(**split) for name, split in plan["splits"].items()},
        bucket_rows=plan["bucket_rows"],
        config_sha256=folder.sha256,
    )


def _fill(folder: DatasetFolder, config: Options, work: Work, prepared: Prepared, rank: Rank) -> None:
    """Make buckets until all are there: first those of this rank, then what nobody makes; wait for the rest."""
    writer = open_writer(folder)
    _check_disk(folder.root, writer, writer.missing_buckets())
    rows = sum(stop - start for start, stop in (writer.bucket_range(*key) for key in writer.buckets()))
    left = rank.own_first(list(writer.buckets()))
    said = False
    with (
        Capture(work.loaded.model, work.loaded.sites) as capture,
        HarvestProgress(rows, writer.committed_rows, silent=rank.number > 0) as progress,
        Behind(writer, progress) as behind,
    ):
        while left:
            elsewhere = [
                key
                for key in left
                if not make_bucket(folder, config, writer, prepared, capture, progress, *key, behind=behind)
            ]
            if elsewhere:
                behind.wait()
            if len(elsewhere) == len(left):  # all of them are being made by live processes
                if not said and rank.number == 0:
                    progress.say(f"waiting for other processes to finish {len(left)} buckets of {folder.root}")
                said = True
                time.sleep(SECONDS_BETWEEN_LOOKS)
                progress.show()
            left = elsewhere


def make_bucket(
    folder: DatasetFolder,
    config: Options,
    writer: DatasetWriter,
    prepared: Prepared,
    capture: Capture,
    progress: HarvestProgress,
    split: str,
    bucket: int,
    *,
    behind: Behind | None = None,
) -> bool:
    """Make a bucket unless it is there; False if another process is making it.

    With `behind`, its writing is only begun: the claim is held, and memory for two buckets, until it is committed.
    """
    if writer.has_bucket(split, bucket):
        return True
    with contextlib.ExitStack() as claim:
        if not claim.enter_context(folder.claim(split, bucket)):
            return False
        if writer.has_bucket(split, bucket):  # committed between the look and the claim
            return True
        start, stop = writer.bucket_range(split, bucket)
        outliers = folder.card["plan"].get("outliers")
        made = make_rows(
            capture,
            prepared.contexts[split],
            start,
            stop,
            bucket_permutation(config.seed, split, bucket, stop - start, config.group_rows),
            {site.id: DTYPES[site.dtype] for site in writer.sites},
            batch_contexts=config.batch_contexts,
            thresholds={name: site["threshold"] for name, site in outliers["sites"].items()} if outliers else None,
            group_rows=config.group_rows,
            progress=progress.add,
        )
        if behind is not None:
            behind.write(claim.pop_all(), split, bucket, made)
            return True
        write_rows(writer, split, bucket, made)
    progress.bucket_done(stop - start)
    return True


def finish(
    folder: DatasetFolder,
    config: Options,
    work: Work,
    prepared: Prepared,
    *,
    buckets: Sequence[tuple[str, int]] | None = None,
    moments: Mapping[str, Moments] | None = None,
) -> Manifest:
    """Write the manifest, from nothing but the records and the card. To be called alone.

    Args:
        folder: of the dataset.
        config: its options.
        work: model and what it saw.
        prepared: stored tokens.
        buckets: the only ones that the dataset has so far; None: all.
        moments: of the train rows, where none of them is stored; None: those of the records.
    """
    plan, runs = folder.card["plan"], folder.card["runs"]
    manifest = open_writer(folder).finish(
        buckets=buckets,
        moments=moments,
        model={**work.loaded.card, "batch_contexts": config.batch_contexts, "device": folder.identity["device"]},
        tokenizer=work.tokenizer_card,
        versions=runs[-1] | {"resumed": runs[:-1]},
        text=work.origin(prepared),
        packing=prepared.record,
        shuffle={
            "seed": config.seed,
            "bucket_rows": plan["bucket_rows"],
            "group_rows": config.group_rows,
            "generator": "numpy-philox",
        },
        outliers=plan.get("outliers", {}),
    )
    folder.save("finished" if buckets is None else "harvesting")
    return manifest


def _check_disk(root: Path, writer: DatasetWriter, missing: list[tuple[str, int]]) -> None:
    """Tell that the disk is too small before hours of work, not after."""
    rows = sum(stop - start for start, stop in (writer.bucket_range(*key) for key in missing))
    needed = rows * (sum(site.row_bytes for site in writer.sites) + ROW_PROVENANCE_BYTES)
    free = shutil.disk_usage(root).free
    if needed > free:
        raise SaeforgeError(
            f"the dataset needs {needed / 2**20:,.0f} MiB more, {root} has {free / 2**20:,.0f} MiB free; "
            "free some space, lower n_tokens, or choose another --out"
        )
