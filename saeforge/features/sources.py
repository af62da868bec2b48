"""Where features are read from: rows of activations with the token that each belongs to, and the tokens around them.

Two sources with one interface: a dataset's shards, without the language model, and any text, with it.
"""

from __future__ import annotations

import contextlib
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from saeforge.data.manifest import SPLITS
from saeforge.data.shards import ActivationDataset
from saeforge.errors import ConfigError, DatasetError
from saeforge.features.aggregate import pack_keys, segment_keys
from saeforge.lm.capture import Capture
from saeforge.lm.load import load_tokenizer, tokenizer_card
from saeforge.lm.origin import Origin
from saeforge.lm.pack import Contexts, open_stored
from saeforge.lm.read import cut_documents, read_activations
from saeforge.lm.text import Document, open_text, read_passages
from saeforge.lm.tokens import Segment, choose_context_length, find_specials

SEGMENTS_AT_ONCE = 64  # of text: fixed, because a model's rounding depends on its batches


@dataclass(frozen=True)
class DocumentRecord:
    """A document that features were read from."""

    id: int
    name: str
    label: str | None
    split: str | None


class StoredTokens:
    """Token ids of all segments, special tokens left out, found by (document, position).

    Args:
        parts: arrays of token ids, kept as they are (memory maps).
        segments: uint64 key of each segment, as `segment_keys` gives it.
        part: index into `parts` of each segment.
        start: where the segment's text begins in that part.
        length: text tokens of the segment.
        room: text tokens of a full segment.
    """

    def __init__(
        self,
        parts: Sequence[np.ndarray],
        segments: np.ndarray,
        part: np.ndarray,
        start: np.ndarray,
        length: np.ndarray,
        room: int,
    ) -> None:
        order = np.argsort(segments)
        self.parts, self.room = [np.asarray(part) for part in parts], room  # a memory map slices slowly
        self.segments, self.part = segments[order], part[order]
        self.start, self.length = start[order], length[order]

    def around(self, keys: np.ndarray, reach: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the window of each token: `reach` tokens to both sides, cut at the borders of its segment.

        Returns:
            int64 arrays: number of the segment, first position of the window in its document, tokens of the window.

        Raises:
            DatasetError: a token is in no segment.
        """
        wanted = segment_keys(keys, self.room)
        number = np.searchsorted(self.segments, wanted)
        found = self.segments[np.minimum(number, len(self.segments) - 1)] == wanted
        inside = (keys & np.uint64(0xFFFFFFFF)).astype(np.int64) % self.room
        if not found.all() or (inside >= self.length[number]).any():
            raise DatasetError("the provenance names tokens that the dataset's tokens/ does not hold; harvest it again")
        first = np.maximum(inside - reach, 0)
        last = np.minimum(inside + reach, self.length[number] - 1)
        position = (keys & np.uint64(0xFFFFFFFF)).astype(np.int64) - inside + first
        return number, position, last - first + 1

    def tokens(self, segment: int, position: int, length: int) -> list[int]:
        """Return token ids from a position (in the document) on."""
        start = int(self.start[segment]) + position % self.room
        ids: list[int] = self.parts[self.part[segment]][start : start + length].tolist()
        return ids

    def slack(self, segment: int, position: int, length: int, reach: int) -> tuple[int, int]:
        """Return how many tokens, at most `reach`, stand in the segment before and behind a window."""
        inside = position % self.room
        return min(inside, reach), min(int(self.length[segment]) - inside - length, reach)


class RowSource(ABC):
    """Rows in units of a fixed size and order; a unit is what a build does between two looks at the clock.

    Attributes:
        identity: what decides the rows, as plain JSON values: equal identities, equal rows.
        documents: those that rows may come from.
        rows: rows of all units.
        units: number of units.
        tokens: the tokens of the segments.
        tokenizer: of the model.
    """

    identity: dict[str, Any]
    documents: list[DocumentRecord]
    rows: int
    units: int
    tokens: StoredTokens
    tokenizer: Any

    @abstractmethod
    def keys(self, unit: int) -> np.ndarray:
        """Return the packed (document, position) of a unit's rows, uint64, in the order of `read`."""

    @abstractmethod
    def read(self, unit: int) -> torch.Tensor:
        """Return a unit's rows, (rows, d)."""

    def close(self) -> None:  # noqa: B027 (not every source holds something)
        """Let go of what the source holds."""


class ShardRows(RowSource):
    """Rows of a dataset that `saeforge harvest` made.

    Args:
        path: the dataset's folder or URL.
        site: id of the site.
        split: "train", "validation" or "all".
        max_tokens: read at most so many rows, in whole blocks, at least one.
        unit_rows: rows of a unit, in whole blocks.
        model: where the model is now; None: where the dataset says.
        trust_remote_code: run Python code that comes with the tokenizer.

    Raises:
        DatasetError: no provenance or tokens, damaged ones, or no such split.
    """

    def __init__(
        self,
        path: str,
        *,
        site: str | None,
        split: str,
        max_tokens: int | None,
        unit_rows: int,
        model: str | None,
        trust_remote_code: bool = False,
    ) -> None:
        self.dataset = ActivationDataset.open(path, site=site)
        if split not in (*SPLITS, "all"):
            raise ConfigError(f"split {split!r}: expected train, validation or all")
        splits = [name for name in (SPLITS if split == "all" else [split]) if self.dataset.n_blocks(name)]
        if not splits:
            raise DatasetError(f"{path} has no {split} split; use --split train, or harvest with a validation_share")
        packing = self.dataset.manifest.packing
        if not packing:
            raise DatasetError(
                f"{path} has no tokens/, the texts of its rows, which only `saeforge harvest` stores; read features "
                "from text instead, with --texts"
            )
        blocks: list[tuple[str, int]] = []
        rows = 0
        for name in splits:
            for index in range(self.dataset.n_blocks(name)):
                size = self.dataset.block_rows(name)
                if max_tokens is None or rows + size <= max_tokens or not blocks:
                    blocks.append((name, index))
                    rows += size
        self.rows = rows
        self._units: list[list[tuple[str, int]]] = []
        filled = unit_rows
        for block in blocks:
            size = self.dataset.block_rows(block[0])
            if filled + size > unit_rows:
                self._units.append([])
                filled = 0
            self._units[-1].append(block)
            filled += size
        self.units = len(self._units)
        stored = open_stored(path, packing, splits)
        self.tokens = _stored_tokens(stored.contexts, packing)
        self.documents = [
            DocumentRecord(r["id"], r["name"], r["label"], r["split"]) for r in stored.documents if r["split"] in splits
        ]
        manifest = self.dataset.manifest
        name = model or str(manifest.model.get("name"))
        self.tokenizer = load_tokenizer(name, manifest.model.get("revision"), trust_remote_code=trust_remote_code)
        if tokenizer_card(self.tokenizer)["sha256"] != manifest.tokenizer.get("sha256"):
            raise DatasetError(
                f"the tokenizer of {name!r} is not the one that {path} was harvested with; restore it, or give --model"
            )
        self.identity = {
            "source": "shards",
            "dataset": self.dataset.fingerprint,
            "site": self.dataset.site.id,
            "splits": splits,
            "blocks": len(blocks),
            "unit_rows": unit_rows,
        }

    def keys(self, unit: int) -> np.ndarray:
        """See `RowSource.keys`."""
        rows = np.concatenate([self.dataset.read_rows(*block) for block in self._units[unit]])
        return pack_keys(rows[:, 0], rows[:, 1])

    def read(self, unit: int) -> torch.Tensor:
        """See `RowSource.read`."""
        blocks = self._units[unit]
        sizes = [self.dataset.block_rows(split) for split, _ in blocks]
        x = torch.empty(sum(sizes), self.dataset.d, dtype=self.dataset.dtype)
        start = 0
        for block, size in zip(blocks, sizes, strict=True):
            self.dataset.read_block(*block, out=x[start : start + size])
            start += size
        return x


class TextRows(RowSource):
    """Rows of any text, from the model that the SAE was trained on.

    Args:
        text: "demo" (the labelled passages that ship with saeforge), or what `saeforge harvest --text` takes.
        origin: model and site.
        max_tokens: read at most so many rows, in whole segments, at least one.
        device: of the model.

    Raises:
        ConfigError: no such text or model.
        DatasetError: the text holds nothing to keep.
    """

    def __init__(self, text: str, *, origin: Origin, max_tokens: int | None, device: str) -> None:
        documents = _open_documents(text)
        self.tokenizer = origin.load_tokenizer()
        loaded = origin.load_base(device=device)
        specials = find_specials(self.tokenizer)
        length = choose_context_length(None, loaded.context_limit, self.tokenizer)
        segments = cut_documents([document.text for document in documents], self.tokenizer, specials, length)
        if not segments:
            raise DatasetError(f"text {text!r} holds no token to keep; give more text")
        total = np.cumsum([segment.kept for segment in segments])
        if max_tokens is not None:
            segments = segments[: max(1, int((total <= max_tokens).sum()))]
        self.rows = int(total[len(segments) - 1])
        self._units = [segments[i : i + SEGMENTS_AT_ONCE] for i in range(0, len(segments), SEGMENTS_AT_ONCE)]
        self.units = len(self._units)
        self.documents = [DocumentRecord(i, d.name, d.label, d.split) for i, d in enumerate(documents)]
        room = length - len(specials.prefix) - len(specials.suffix)
        self.tokens = _segments_tokens(segments, len(specials.prefix), len(specials.suffix), room)
        self._pad = specials.pad
        self._stack = contextlib.ExitStack()
        self._capture = self._stack.enter_context(Capture(loaded.model, [origin.site]))
        digest = hashlib.sha256()
        for document in documents:
            digest.update(repr((document.name, document.label, document.split, document.text)).encode())
        self.identity = {
            "source": "text",
            "text_sha256": digest.hexdigest(),
            "model": loaded.card["files_sha256"] or loaded.card["name"],
            "tokenizer": tokenizer_card(self.tokenizer)["sha256"],
            "site": origin.site.id,
            "context_length": length,
            "segments": len(segments),
        }

    def keys(self, unit: int) -> np.ndarray:
        """See `RowSource.keys`; segments are in the order of their documents, so that these ascend."""
        segments = self._units[unit]
        return np.concatenate([pack_keys(np.array(s.document), s.positions[s.keep]) for s in segments])

    def read(self, unit: int) -> torch.Tensor:
        """See `RowSource.read`."""
        parts = list(read_activations(self._capture, self._units[unit], pad=self._pad))
        rows = np.concatenate([part.rows for part in parts])
        order = np.argsort(pack_keys(rows[:, 0], rows[:, 1]))
        x = torch.cat([part.x for part in parts])
        return x.index_select(0, torch.from_numpy(order).to(x.device))

    def close(self) -> None:
        """Take the hooks off the model."""
        self._stack.close()


def _open_documents(text: str) -> list[Document]:
    """Return all documents of a source, empty ones left out."""
    if text == "demo":
        documents = read_passages()
    else:
        source = open_text(text)
        documents = [source[i] for i in range(len(source))]
    return [document for document in documents if document.text.strip()]


def _stored_tokens(contexts: dict[str, Contexts], packing: dict[str, Any]) -> StoredTokens:
    """Index the segments of a dataset's `tokens/`."""
    special = packing["special_tokens"]
    before, behind = len(special["prefix"]), len(special["suffix"])
    room = packing["context_length"] - before - behind
    parts, columns = [], []
    for number, arrays in enumerate(own.arrays for own in contexts.values()):
        start = np.flatnonzero(np.asarray(arrays["within"]) == 0)
        length = np.diff(np.append(start, len(arrays["tokens"]))) - before - behind
        keys = pack_keys(arrays["documents"][start], arrays["positions"][start + before])
        parts.append(arrays["tokens"])
        columns.append((segment_keys(keys, room), np.full(len(start), number), start + before, length))
    segments, part, start, length = (np.concatenate(column) for column in zip(*columns, strict=True))
    return StoredTokens(parts, segments, part, start, length, room)


def _segments_tokens(segments: Sequence[Segment], before: int, behind: int, room: int) -> StoredTokens:
    """Index segments in memory."""
    tokens = np.concatenate([segment.tokens for segment in segments])
    sizes = np.array([len(segment.tokens) for segment in segments])
    start = np.cumsum(sizes) - sizes + before
    documents = np.array([segment.document for segment in segments])
    first = np.array([segment.positions[before] for segment in segments])
    keys = segment_keys(pack_keys(documents, first), room)
    return StoredTokens([tokens], keys, np.zeros(len(segments), dtype=np.int64), start, sizes - before - behind, room)
