"""Live activations: training blocks are made by the model when they are read, with nothing on disk but the tokens.

A block is a bucket of the harvest with the same options: the same tokens, the same rows in the same order, from the
same code. It is a pure function of its number, so that the loader's order, its ranks and its exact resume need nothing
new. What is kept in the folder: packed tokens, a sample of held-out rows (a small dataset of its own, so that the SAE
can be judged later), and, if asked for, every block that was made, as shards that a harvest with the same options
completes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import threading
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from saeforge.data.choice import SitesWanted
from saeforge.data.layout import bucket_permutation
from saeforge.data.manifest import Manifest, sha256_json
from saeforge.data.moments import Moments
from saeforge.data.plan import permutation
from saeforge.data.shard_source import ShardSource
from saeforge.data.shards import DTYPES
from saeforge.data.source import Pair, Rows
from saeforge.data.writer import read_bucket
from saeforge.errors import DatasetError
from saeforge.harvest import run as engine
from saeforge.harvest.buckets import make_rows
from saeforge.harvest.config import HarvestConfig
from saeforge.harvest.folder import DatasetFolder
from saeforge.harvest.progress import HarvestProgress
from saeforge.harvest.ranks import Rank
from saeforge.harvest.work import TextWork
from saeforge.lm.capture import Capture
from saeforge.lm.device import resolve_device

#: Rows of a block. Two blocks a lane are in memory: 2 GiB for 8 lanes at a width of 4,096 in bf16.
BLOCK_ROWS = 16_384
#: The least number of blocks that the default cuts the training text into.
LEAST_BLOCKS = 32
#: Places from which the sample for initialisation and statistics is taken.
SAMPLE_PLACES = 64
SAMPLE_ROWS = 65_536
#: Blocks on disk of one that is made at once: what outliers leave of the last one is not stored, here at most 1/16.
STORED_BLOCKS = 16


class LiveSource:
    """A `BlockSource` over a language model and text, one forward pass for all sites.

    Args:
        config: the harvest that this stands for; `bucket_rows` is the size of a block.
        write: keep the blocks that are made, as shards.
        validation_rows: held-out rows to make before training begins.
        lanes: of the plan that will read this: each needs a block.
        input: what the SAEs read and
        target: reconstruct (`saeforge.data.choice`), of the sites in `config`; None: an SAE for each of these.

    Raises:
        ConfigError, DatasetError: as `saeforge.harvest`; too little text for one block a lane.
    """

    def __init__(
        self,
        config: HarvestConfig,
        *,
        write: bool = False,
        validation_rows: int = 65_536,
        lanes: int = 1,
        input: SitesWanted = None,
        target: SitesWanted = None,
    ) -> None:
        if config.bucket_rows is None:
            config = dataclasses.replace(config, bucket_rows=default_block_rows(config))
        rank = Rank.here()
        device = rank.device(config.device, resolve_device(config.device), torch.cuda.device_count())
        self.config, self.write, self._rank = config, write, rank
        self._folder = DatasetFolder(Path(config.out), {**config.identity(), "device": torch.device(device).type})
        self._stack = contextlib.ExitStack()
        with self._folder.alone():
            self._stack.enter_context(self._folder.joined(overwrite=config.overwrite))
            self._folder.remove_parts()
            self._work = TextWork.load(config, device)
            if "plan" not in self._folder.card:
                engine.prepare(self._folder, config, self._work, rank, blocks_per_bucket=STORED_BLOCKS)
            engine.register(self._folder, self._work)
        self._prepared = self._work.open(self._folder.root / "tokens")
        self._capture = self._stack.enter_context(Capture(self._work.loaded.model, self._work.loaded.sites))
        self._lock = threading.Lock()  # the model sees one batch at a time
        self._writer = engine.open_writer(self._folder)
        rows, blocks = self._writer.splits["train"].rows, self.n_blocks("train")
        if blocks < lanes:  # before anything is made that would stand in the way of another try
            self._stack.close()
            fitting = 1 << max(rows // (4 * lanes), 1).bit_length() - 1
            raise DatasetError(
                f"{rows:,} training rows fill {blocks} blocks of {self._writer.bucket_rows:,}, fewer than {lanes} "
                f"lanes; set data.harvest.bucket_rows to {fitting}, or give more text"
            )
        self._retaken, self._made, self._closed = 0, 0, False
        self._sample = self._take_sample()
        moments = [Moments.of(rows.float().numpy()) for rows in self._sample]
        with self._folder.alone():
            manifest = self._hold_out(validation_rows, device, moments)
        self.fingerprint = sha256_json([self._folder.sha256, self._folder.card["plan"], self._prepared.record["files"]])
        root, sites = str(self._folder.root), [site.id for site in self._writer.sites]
        if input is None:
            self._held_out = ShardSource(root, sites=sites)
        else:
            self._held_out = ShardSource(root, input=input, target=target)
        # Tensors are numbered as the held-out dataset's are; the model makes them in the order of the harvest.
        self._order = [sites.index(dataset.site.id) for dataset in self._held_out.datasets]
        self.widths, self.dtypes = self._held_out.widths, self._held_out.dtypes
        self._sample = tuple(self._sample[number] for number in self._order)
        self.statistics = tuple(moments[number].statistics() for number in self._order)
        self.pairs: tuple[Pair, ...] = tuple(
            dataclasses.replace(pair, identity={**pair.identity, "dataset": self.fingerprint, "live": True})
            for pair in self._held_out.pairs
        )
        self.unit = config.group_rows
        self.manifest = manifest

    @property
    def held_out(self) -> ShardSource:
        """The held-out rows, on disk."""
        return self._held_out

    def n_blocks(self, split: str) -> int:
        """Whole blocks of the training text; what the folder holds of the held-out one."""
        if split == "train":
            return self._writer.splits["train"].rows // self._writer.bucket_rows
        return self._held_out.n_blocks(split)

    def block_rows(self, split: str) -> int:
        """See `BlockSource`."""
        return self._writer.bucket_rows if split == "train" else self._held_out.block_rows(split)

    def read_block(self, split: str, index: int, into: Rows | None = None) -> Rows:
        """Runs the model over the block's text, or reads the block if its shards are there.

        Where rows were left out as outliers, the block's first rows stand in their places a second time: all blocks
        have to be equally long. `counters` says how many. A block has the rows that shards would hold of it (whole
        stored blocks), so that it is the same whether it was written or not.

        Raises:
            DatasetError: outliers leave nothing of the block; the source was closed; what writing or the model raise.
        """
        if split != "train":
            return self._held_out.read_block(split, index, into)
        with self._lock:
            if self._closed:
                raise DatasetError(
                    f"the live source of {self._folder.root} was closed when its run ended; make a new ActivationData"
                )
            made = self._block(index)
        parts = [made[number] for number in self._order]
        rows = self._writer.bucket_rows
        if into is None:
            into = tuple(torch.empty(rows, part.shape[1], dtype=part.dtype) for part in parts)
        for part, place in zip(parts, into, strict=True):
            if len(part) == 0:
                raise DatasetError(
                    f"block {index}: outliers leave too few of its {rows} tokens; give a larger max_norm, or null"
                )
            for at in range(0, rows, len(part)):
                place[at : at + len(part)] = part[: rows - at]
        return into

    def sample(self, rows: int) -> Rows:
        """Rows from places spread over the training text, the ones behind `statistics`."""
        return tuple(part[:rows] for part in self._sample)

    def counters(self) -> dict[str, float]:
        """Blocks made by the model so far, and rows that stand in the place of an outlier."""
        return {"blocks_made": self._made, "rows_repeated": self._retaken}

    def close(self) -> None:
        """Lets the model and the folder go; finishes the dataset if every block was written."""
        if self.write and not self._writer.missing_buckets():
            with self._folder.alone():
                self._folder.reread()
                engine.finish(self._folder, self.config, self._work, self._prepared)
        elif self.write and self._rank.number == 0:
            missing, total = len(self._writer.missing_buckets()), len(list(self._writer.buckets()))
            print(
                f"saeforge: {self._folder.root} holds {total - missing} of {total} buckets; `saeforge harvest` with "
                f"the same options and --bucket_rows {self.config.bucket_rows} makes the rest",
                file=sys.stderr,
            )
        with self._lock:  # a reader may still be at work
            self._closed = True
            self._stack.close()

    # Inside ------------------------------------------------------------------------------------------------------

    def _block(self, index: int) -> list[Tensor]:
        """The rows of a block by site, without its outliers."""
        if self.write:
            silent = HarvestProgress(1, lambda: 0, silent=True)
            work = (self._folder, self.config, self._writer, self._prepared, self._capture, silent)
            while not engine.make_bucket(*work, "train", index):  # a harvest of the same dataset is at it
                time.sleep(engine.SECONDS_BETWEEN_LOOKS)
            parts = read_bucket(self._writer, "train", index)
        else:
            made = self._rows(*self._writer.bucket_range("train", index), index)
            stored = self._writer.splits["train"].block_rows
            parts = [made[site.id] for site in self._writer.sites]
            parts = [part[: len(part) // stored * stored] for part in parts]  # what shards would hold
        self._made += 1
        self._retaken += self._writer.bucket_rows - len(parts[0])
        return parts

    def _rows(self, start: int, stop: int, bucket: int | None) -> dict[str, Tensor]:
        """Rows of a range of kept tokens; in the order of a bucket, or as they stand in the text."""
        config = self.config
        if bucket is None:
            order = np.arange(stop - start)
        else:
            order = bucket_permutation(config.seed, "train", bucket, stop - start, config.group_rows)
        outliers = self._folder.card["plan"].get("outliers")
        return make_rows(
            self._capture,
            self._prepared.contexts["train"],
            start,
            stop,
            order,
            {site.id: DTYPES[site.dtype] for site in self._writer.sites},
            batch_contexts=config.batch_contexts,
            thresholds={name: site["threshold"] for name, site in outliers["sites"].items()} if outliers else None,
            group_rows=config.group_rows,
        ).data

    def _take_sample(self) -> Rows:
        """Rows of evenly spread places, mixed, so that any first part of them is spread as well."""
        total = self._writer.splits["train"].rows
        length = max(1, min(SAMPLE_ROWS, total) // SAMPLE_PLACES // self.config.group_rows) * self.config.group_rows
        starts = np.linspace(0, total - length, SAMPLE_PLACES).astype(int) // self.config.group_rows
        parts = [self._rows(start, start + length, None) for start in (starts * self.config.group_rows).tolist()]
        sample = [torch.cat([part[site.id] for part in parts]) for site in self._writer.sites]
        order = torch.from_numpy(permutation(len(sample[0]), self.config.seed))
        return tuple(rows[order] for rows in sample)

    def _hold_out(self, rows: int, device: str, moments: list[Moments]) -> Manifest:
        """Makes the held-out buckets, and the manifest of a dataset that has nothing else (yet)."""
        writer = self._writer
        path = self._folder.root / "manifest.json"
        buckets: list[tuple[str, int]] = []
        if "validation" in writer.splits:
            count = min(writer.n_buckets("validation"), max(1, -(-rows // writer.bucket_rows)))
            buckets = [("validation", bucket) for bucket in range(count)]
        if path.is_file() and all(writer.has_bucket(*key) for key in buckets):
            return Manifest.load(path)
        total = sum(stop - start for start, stop in (writer.bucket_range(*key) for key in buckets))
        with HarvestProgress(max(1, total), lambda: 0, silent=self._rank.number > 0) as progress:
            for key in buckets:
                engine.make_bucket(self._folder, self.config, writer, self._prepared, self._capture, progress, *key)
        if not writer.missing_buckets():  # a whole dataset that had lost a held-out shard, say, stays whole
            return engine.finish(self._folder, self.config, self._work, self._prepared)
        pilot = {site.id: part for site, part in zip(writer.sites, moments, strict=True)}
        return engine.finish(self._folder, self.config, self._work, self._prepared, buckets=buckets, moments=pilot)


def default_block_rows(config: HarvestConfig) -> int:
    """The largest power of two up to 16,384 rows that cuts the training text into 32 blocks, at least 1,024."""
    rows = int(config.n_tokens * (1 - config.validation_share)) // LEAST_BLOCKS
    return max(1024, min(BLOCK_ROWS, 1 << max(rows.bit_length() - 1, 0)))
