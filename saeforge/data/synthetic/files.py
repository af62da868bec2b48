"""The same rows as plain files, for tools that read arrays: what a source makes, written once."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from saeforge.data.moments import Statistics
from saeforge.data.source import Pair, Rows
from saeforge.data.synthetic.config import SyntheticConfig
from saeforge.data.synthetic.sample import Activity
from saeforge.data.synthetic.source import BLOCK_ROWS, SyntheticSource, first_blocks, pair
from saeforge.data.synthetic.truth import Truth
from saeforge.errors import ConfigError, DatasetError

FORMAT, VERSION = "saeforge-synthetic", 1
HEAD, TRUTH, HELD_OUT_TRUTH = "synthetic.json", "truth.safetensors", "validation_truth.safetensors"
_SPLITS = ("train", "validation")


def write_rows(
    source: SyntheticSource,
    folder: str | Path,
    *,
    threads: int = 1,
    on_progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Writes all rows of a source and the truth behind them.

    In the folder: `train.npy` and `validation.npy`, (rows, d_in) float32, or uint16 = the bits of bfloat16;
    `truth.safetensors` (directions, bias, parents, ...: see `Truth`); `validation_truth.safetensors`, the features of
    the held-out rows as CSR (values, features, offsets); `synthetic.json` with the law, written last. A folder that
    holds the same rows already is left alone.

    Args:
        source: the rows.
        folder: made if it is missing.
        threads: that make rows.
        on_progress: called with (blocks written, blocks in all).

    Raises:
        DatasetError: the folder holds other rows.
    """
    folder = Path(folder)
    if (folder / HEAD).exists():
        if (held := SyntheticFiles(folder).fingerprint) != source.fingerprint:
            raise DatasetError(f"{folder} holds other synthetic rows ({held[:12]}); remove it or choose another folder")
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    total = sum(source.n_blocks(split) for split in _SPLITS)
    done = 0
    for split in _SPLITS:
        part = folder / f"{split}.npy.part"
        shape = (source.n_blocks(split) * BLOCK_ROWS, source.widths[0])
        bits = source.dtypes[0] == torch.bfloat16
        array = np.lib.format.open_memmap(str(part), mode="w+", dtype=np.uint16 if bits else np.float32, shape=shape)

        def write(block: int, split: str = split, array: np.memmap = array, bits: bool = bits) -> None:
            rows = source.read_block(split, block)[0]
            array[block * BLOCK_ROWS : (block + 1) * BLOCK_ROWS] = (rows.view(torch.int16) if bits else rows).numpy()

        with ThreadPoolExecutor(threads) as pool:
            for job in as_completed([pool.submit(write, block) for block in range(source.n_blocks(split))]):
                job.result()
                done += 1
                if on_progress is not None:
                    on_progress(done, total)
        array.flush()
        del array
        part.replace(folder / f"{split}.npy")
    save_file(_truth_tensors(source.truth), folder / TRUTH)
    held_out = [source.activity("validation", block) for block in range(source.n_blocks("validation"))]
    save_file(_activity_tensors(held_out), folder / HELD_OUT_TRUTH)
    head = {
        "format": FORMAT,
        "version": VERSION,
        "config": source.config.to_json(),
        "rows": {split: source.n_blocks(split) * BLOCK_ROWS for split in _SPLITS},
        "dtype": str(source.dtypes[0]).removeprefix("torch."),
        "fingerprint": source.fingerprint,
        "statistics": vars(source.statistics[0]),
    }
    part = folder / f"{HEAD}.part"
    with part.open("w") as file:
        file.write(json.dumps(head, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    part.replace(folder / HEAD)
    return folder


class SyntheticFiles:
    """What `write_rows` wrote, as a `BlockSource`: block for block the rows of the source that it was given.

    Args:
        folder: of the files.
        rows: use the first so many training rows, whole blocks; None: all.

    Attributes:
        config: the law. truth: what is behind the rows.

    Raises:
        DatasetError: no such files, damaged ones, or fewer rows than asked for.
    """

    def __init__(self, folder: str | Path, *, rows: int | None = None) -> None:
        self.folder = Path(folder)
        if not (self.folder / HEAD).is_file():
            raise DatasetError(f"{self.folder} holds no finished synthetic rows ({HEAD} is missing); write them first")
        try:
            head = json.loads((self.folder / HEAD).read_text())
            if head.get("format") != FORMAT or head["version"] > VERSION:
                raise DatasetError(f"{self.folder / HEAD} is not a file of this version of saeforge; write it again")
            self.config = SyntheticConfig.from_json(head["config"])
            self.truth = _truth(self.config, load_file(self.folder / TRUTH))
            self._arrays = {name: np.load(self.folder / f"{name}.npy", mmap_mode="r") for name in _SPLITS}
            held_out = load_file(self.folder / HELD_OUT_TRUTH)
            statistics = Statistics(**head["statistics"])
        except (OSError, ValueError, KeyError, TypeError, ConfigError) as error:
            raise DatasetError(
                f"the synthetic rows in {self.folder} are damaged ({error}); write them again"
            ) from error
        self._held_out = Activity(*(held_out[name].numpy() for name in ("values", "features", "offsets")))
        self._bits = head["dtype"] == "bfloat16"
        self._n_blocks = {split: len(array) // BLOCK_ROWS for split, array in self._arrays.items()}
        self.fingerprint: str = head["fingerprint"]
        if rows is not None:
            blocks = -(-rows // BLOCK_ROWS)
            if blocks > self._n_blocks["train"]:
                raise DatasetError(f"{self.folder} holds {head['rows']['train']} training rows, {rows} were asked for")
            self._n_blocks["train"] = blocks
        self.unit = 1
        self.widths: tuple[int, ...] = (self.config.d_in,)
        self.dtypes: tuple[torch.dtype, ...] = (torch.bfloat16 if self._bits else torch.float32,)
        self.statistics: tuple[Statistics, ...] = (statistics,)
        self.pairs: tuple[Pair, ...] = (pair(self.config, self.fingerprint),)

    def n_blocks(self, split: str) -> int:
        """See `BlockSource`."""
        return self._n_blocks[split]

    def block_rows(self, split: str) -> int:
        """See `BlockSource`."""
        return BLOCK_ROWS

    def activity(self, split: str, index: int) -> Activity:
        """The true features of a held-out block's rows.

        Raises:
            ConfigError: of a training block, whose features are not written.
        """
        if split != "validation":
            raise ConfigError("the features of held-out rows only are on disk; take SyntheticSource for others")
        start, stop = index * BLOCK_ROWS, (index + 1) * BLOCK_ROWS
        offsets = self._held_out.offsets[start : stop + 1]
        part = slice(int(offsets[0]), int(offsets[-1]))
        return Activity(self._held_out.values[part], self._held_out.features[part], offsets - offsets[0])

    def read_block(self, split: str, index: int, into: Rows | None = None) -> Rows:
        """See `BlockSource`."""
        start = index * BLOCK_ROWS
        place = into or (torch.empty(BLOCK_ROWS, self.widths[0], dtype=self.dtypes[0]),)
        view = place[0].view(torch.int16).numpy().view(np.uint16) if self._bits else place[0].numpy()
        np.copyto(view, self._arrays[split][start : start + BLOCK_ROWS])
        return place

    def sample(self, rows: int) -> Rows:
        """See `BlockSource`."""
        return first_blocks(self, rows)

    def counters(self) -> dict[str, float]:
        """See `BlockSource`."""
        return {}

    def close(self) -> None:
        """See `BlockSource`; maps are closed with the object."""


_ARRAYS = ("rates", "thresholds", "loadings", "means", "spreads", "parents")


def _truth_tensors(truth: Truth) -> dict[str, torch.Tensor]:
    arrays = {name: torch.from_numpy(np.ascontiguousarray(getattr(truth, name))) for name in _ARRAYS}
    return {"directions": truth.directions, "bias": truth.bias, **arrays}


def _truth(config: SyntheticConfig, tensors: dict[str, torch.Tensor]) -> Truth:
    arrays: dict[str, Any] = {name: tensors[name].numpy() for name in _ARRAYS}
    return Truth(config=config, directions=tensors["directions"], bias=tensors["bias"], **arrays)


def _activity_tensors(parts: list[Activity]) -> dict[str, torch.Tensor]:
    counts = [np.diff(part.offsets) for part in parts]
    offsets = np.concatenate([[0], np.cumsum(np.concatenate([[], *counts]))]).astype(np.int64)
    values = np.concatenate([np.empty(0, np.float32), *(part.values for part in parts)])
    features = np.concatenate([np.empty(0, np.int64), *(part.features for part in parts)])
    return {
        name: torch.from_numpy(array)
        for name, array in zip(("values", "features", "offsets"), (values, features, offsets), strict=True)
    }
