"""The non-zeros of latents over all tokens of labelled documents, and what they say of every latent.

Of a pass over the texts only non-zeros stay: 8 bytes each (row and value), and 8 bytes per latent and batch. 1e7 tokens
with 100 active latents are 8 GB.
Rankings go through the latents in blocks of at most a few million entries, so that sorting needs little beside that.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from saeforge.lm.labelled import Comparison, LabelledTexts
from saeforge.metrics.ranking import Entries, Ordered, Ranking
from saeforge.ops import SparseCode

BLOCK_ENTRIES = 1 << 23


class LatentColumns:
    """Non-zeros by latent, gathered batch by batch."""

    def __init__(self, d_sae: int) -> None:
        self.d_sae = d_sae
        self.n_rows = 0
        self._batches: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []  # rows, values, offsets per latent

    def add(self, code: SparseCode) -> None:
        """Append the rows of a code."""
        code = code.trimmed()
        order, rows, offsets = code.by_latent()
        values = code.values[order].float().cpu().numpy()
        row = (rows + self.n_rows).to(torch.int64).cpu().numpy().astype(np.uint32)
        self._batches.append((row, values, offsets.cpu().numpy()))
        self.n_rows += code.n_rows

    def entries(self, start: int, stop: int) -> Entries:
        """Entries of the latents from start up to stop, numbered from 0."""
        latents, rows, values = [np.zeros(0, np.int64)], [np.zeros(0, np.uint32)], [np.zeros(0, np.float32)]
        for row, value, offsets in self._batches:
            here = slice(offsets[start], offsets[stop])
            latents.append(np.repeat(np.arange(stop - start), np.diff(offsets[start : stop + 1])))
            rows.append(row[here])
            values.append(value[here])
        return Entries(np.concatenate(latents), np.concatenate(rows), np.concatenate(values), stop - start)

    def blocks(self, most: int = BLOCK_ENTRIES) -> Iterator[tuple[int, int]]:
        """Ranges of latents with at most so many entries each; one latent always fits."""
        sizes = np.zeros(self.d_sae, np.int64)
        for _, _, offsets in self._batches:
            sizes += np.diff(offsets)
        ends = np.cumsum(sizes)
        start = 0
        while start < self.d_sae:
            done = ends[start - 1] if start else 0
            stop = max(start + 1, int(np.searchsorted(ends, done + most, side="right")))
            yield start, stop
            start = stop

    def counts(self, rows: np.ndarray) -> np.ndarray:
        """int64 (d_sae,): on how many rows of a mask (rows,) each latent is active."""
        result = np.zeros(self.d_sae, np.int64)
        for start, stop in self.blocks():
            entries = self.entries(start, stop)
            active = (entries.value != 0) & rows[entries.row]
            result[start:stop] = np.bincount(entries.latent[active], minlength=stop - start)
        return result

    def score(self, latent: int) -> np.ndarray:
        """float32 (rows,): one latent's value on every row."""
        entries = self.entries(latent, latent + 1)
        dense = np.zeros(self.n_rows, np.float32)
        dense[entries.row] = entries.value
        return dense


@dataclass(frozen=True)
class TrainRanking:
    """Figures of every latent for every comparison on the train documents: float64 (comparisons, d_sae)."""

    token_auroc: np.ndarray
    document_auroc: np.ndarray


def rank_latents(
    columns: LatentColumns, document: np.ndarray, texts: LabelledTexts, comparisons: list[Comparison]
) -> TrainRanking:
    """Rank all latents for all comparisons, on tokens and mean-pooled documents of the train half.

    Args:
        columns: of all tokens.
        document: int (tokens,), the document of each.
        texts: labels and halves of the documents.
        comparisons: which label against which.
    """
    token_train = texts.train[document]
    tokens = np.bincount(document, minlength=len(texts.texts))
    members = [comparison.members(texts.label) for comparison in comparisons]
    members = [(positive & texts.train, negative & texts.train) for positive, negative in members]
    shape = (len(comparisons), columns.d_sae)
    result = TrainRanking(np.empty(shape), np.empty(shape))
    for start, stop in columns.blocks():
        entries = columns.entries(start, stop)
        used = token_train[entries.row]
        entries = Entries(entries.latent[used], entries.row[used], entries.value[used], entries.n_latents)
        by_token, by_document = Ordered(entries), Ordered(pool_mean(entries, document, tokens))
        for i, (positive, negative) in enumerate(members):
            token: Ranking = by_token.rank(positive[document], negative[document])
            result.token_auroc[i, start:stop] = token.auroc
            result.document_auroc[i, start:stop] = by_document.rank(positive, negative).auroc
    return result


def pool_mean(entries: Entries, document: np.ndarray, tokens: np.ndarray) -> Entries:
    """Mean over each document's tokens, silent ones included, of every latent.

    Args:
        entries: over tokens.
        document: int (tokens,), the document of each token.
        tokens: int (documents,), how many each has.
    """
    key = entries.latent * len(tokens) + document[entries.row]
    used, place = np.unique(key, return_inverse=True)
    sums = np.bincount(place, entries.value, minlength=used.size)
    row = used % len(tokens)
    return Entries(used // len(tokens), row, (sums / tokens[row]).astype(np.float32), entries.n_latents)
