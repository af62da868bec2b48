"""Contexts: segments packed side by side, stored as flat arrays that are read through memory maps.

Per split, in the folder `tokens/`: `<split>.tokens.npy`, `.documents.npy`, `.positions.npy` (in the document),
`.within.npy` (in the segment, 0 starts a new one), `.keep.npy`, all one entry per token, and `.offsets.npy`, where each
context starts. Contexts stand in their final, shuffled order.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch

from saeforge.data.storage import hash_file, open_storage
from saeforge.data.tario import npy_header
from saeforge.errors import ConfigError
from saeforge.lm.capture import ModelBatch, TokenBatch
from saeforge.lm.tokens import Segment

ARRAYS = ("tokens", "documents", "positions", "within", "keep", "offsets")


def pack_segments(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Put segments into contexts, best fit, longest first (Ding et al. 2024, arXiv 2404.10830).

    Args:
        lengths: tokens of each segment, each at most `capacity`.
        capacity: tokens of a context.

    Returns:
        For each context the numbers of its segments.
    """
    contexts: list[list[int]] = []
    open_with: dict[int, list[int]] = {}  # free tokens -> contexts
    free_bits = (
        0  # bit f is set while some context has f free tokens: the best fit is the lowest bit from the length up
    )
    for number in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[number]
        fitting = free_bits >> length
        if fitting:
            free = length + (fitting & -fitting).bit_length() - 1
            context = open_with[free].pop()
            if not open_with[free]:
                free_bits &= ~(1 << free)
        else:
            free, context = capacity, len(contexts)
            contexts.append([])
        contexts[context].append(number)
        if free > length:
            open_with.setdefault(free - length, []).append(context)
            free_bits |= 1 << (free - length)
    return contexts


def write_contexts(
    folder: Path, split: str, segments: Sequence[Segment], *, capacity: int, packed: bool, seed: int
) -> dict[str, str]:
    """Pack, shuffle and store the segments of one split.

    Args:
        folder: `tokens/` of the dataset.
        split: its name.
        segments: in the order of the documents.
        capacity: tokens of a context.
        packed: several segments in a context, or one in each.
        seed: of the order of contexts.

    Returns:
        sha256 of each file by name.
    """
    if packed:
        contexts = pack_segments([len(segment.tokens) for segment in segments], capacity)
    else:
        contexts = [[number] for number in range(len(segments))]
    key = np.frombuffer(hashlib.sha256(f"saeforge contexts {seed} {split}".encode()).digest()[:16], dtype="<u8")
    order = np.random.Generator(np.random.Philox(key=key)).permutation(len(contexts))
    chosen = [[segments[number] for number in contexts[context]] for context in order]
    flat = [segment for context in chosen for segment in context]
    lengths = [len(segment.tokens) for segment in flat]
    arrays = {
        "tokens": np.concatenate([segment.tokens for segment in flat]),
        "documents": np.repeat(np.array([segment.document for segment in flat], dtype=np.uint32), lengths),
        "positions": np.concatenate([segment.positions for segment in flat]),
        "within": np.concatenate([np.arange(length, dtype=np.uint32) for length in lengths]),
        "keep": np.concatenate([segment.keep for segment in flat]),
        "offsets": np.cumsum([0, *(sum(len(segment.tokens) for segment in context) for context in chosen)]),
    }
    hashes = {}
    for name, array in arrays.items():
        path = folder / f"{split}.{name}.npy"
        save_array(path, array)
        hashes[path.name] = hash_file(path)
    return hashes


def save_array(path: Path, array: np.ndarray) -> None:
    """Write a `.npy` file durably; numpy's own writer reports a full disk without saying that it is one."""
    with path.open("wb") as file:
        file.write(npy_header(array, 128))
        file.write(np.ascontiguousarray(array).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())


B_co = TypeVar("B_co", bound=ModelBatch, covariant=True)


@dataclass(frozen=True)
class ContextBatch(Generic[B_co]):
    """A batch of contexts and where its kept tokens stand.

    Attributes:
        batch: what the model gets.
        kept: int64 index of the kept tokens in the flattened (contexts x length) batch, in context order.
        rows: uint32 (kept, 4) provenance: document, position in document, token id, context.
    """

    batch: B_co
    kept: torch.Tensor
    rows: np.ndarray


class ContextSource(Protocol):
    """What rows are made of: contexts in their final order, and how many rows each of them keeps."""

    @property
    def kept_before(self) -> np.ndarray:
        """int64 (contexts + 1), kept rows before each context: the global row order of the split."""

    @property
    def kept_rows(self) -> int:
        """Kept tokens of the split."""

    def __len__(self) -> int:
        """Return the number of contexts."""

    def batch(self, start: int, stop: int) -> ContextBatch[ModelBatch]:
        """Return contexts `start` to `stop`."""


class Contexts:
    """The contexts of one split, memory-mapped.

    Attributes:
        kept_before: int64 (contexts + 1), kept rows before each context: the global row order of the split.
    """

    def __init__(self, folder: Path, split: str, *, packed: bool, pad: int) -> None:
        self.arrays = {name: np.load(folder / f"{split}.{name}.npy", mmap_mode="r") for name in ARRAYS}
        self.offsets = np.asarray(self.arrays["offsets"])
        self.packed = packed
        self.pad = pad
        kept = np.add.reduceat(self.arrays["keep"], self.offsets[:-1], dtype=np.int64)
        self.kept_before = np.concatenate([[0], np.cumsum(kept)])

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def kept_rows(self) -> int:
        """Kept tokens of the split."""
        return int(self.kept_before[-1])

    def batch(self, start: int, stop: int) -> ContextBatch[TokenBatch]:
        """Return contexts `start` to `stop`, padded on the right to the longest of them."""
        first, last = int(self.offsets[start]), int(self.offsets[stop])
        lengths = np.diff(self.offsets[start : stop + 1])
        grid = np.arange(int(lengths.max()))
        real = grid[None, :] < lengths[:, None]

        def spread(name: str, fill: int | np.ndarray) -> torch.Tensor:
            out = np.empty(real.shape, dtype=np.int64)
            out[:] = fill
            out[real] = self.arrays[name][first:last]
            return torch.from_numpy(out)

        keep = np.asarray(self.arrays["keep"][first:last])
        contexts = np.repeat(np.arange(start, stop, dtype=np.uint32), lengths)
        columns = (*(self.arrays[name][first:last] for name in ("documents", "positions", "tokens")), contexts)
        mask = position_ids = None
        if self.packed:
            # Padding counts from 0 again: a segment of its own, which no token attends to.
            position_ids = spread("within", np.maximum(grid[None, :] - lengths[:, None], 0))
        else:
            mask = torch.from_numpy(real.astype(np.int64))
        return ContextBatch(
            TokenBatch(spread("tokens", self.pad), mask, position_ids),
            torch.from_numpy(np.flatnonzero(real)[keep]),
            np.stack([np.asarray(column)[keep] for column in columns], axis=1).astype(np.uint32),
        )


@dataclass(frozen=True)
class StoredText:
    """The text of a finished dataset: contexts by split, and a record (id, name, label, split) of each document."""

    contexts: dict[str, Contexts]
    documents: list[dict[str, Any]]


def open_stored(root: str | Path, packing: Mapping[str, Any], splits: Sequence[str]) -> StoredText:
    """Open the stored tokens of a finished dataset, after a look at the checksums of their files.

    Those of a URL are downloaded, once if there is a cache.

    Args:
        root: the dataset's folder or URL.
        packing: `packing` of its manifest.
        splits: whose contexts.

    Raises:
        ConfigError: the dataset was made of other inputs than text.
        DatasetError: a file is missing or damaged.
    """
    if "special_tokens" not in packing:
        raise ConfigError(
            f"{root} was made of {packing.get('rule', 'other inputs')} and holds no text; this needs a dataset made by "
            "`saeforge harvest`"
        )
    wanted = {
        name: sha256
        for name, sha256 in packing["files"].items()
        if name == "documents.jsonl" or name.split(".")[0] in splits
    }
    pad = packing["special_tokens"]["pad"]
    with open_storage(root).local_files("tokens", wanted) as folder:
        contexts = {split: Contexts(folder, split, packed=packing["packed"], pad=pad) for split in splits}
        with (folder / "documents.jsonl").open(encoding="utf-8") as file:
            return StoredText(contexts, [json.loads(line) for line in file])
