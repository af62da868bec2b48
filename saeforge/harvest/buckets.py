"""Rows of a range of kept tokens: forward passes, outliers, shuffled order. Needs no dataset on disk.

The result is a pure function of the contexts, the range, the order, the batch size and the precision: batches start at
the range's own first context, so that any bucket (or any block of a live run) can be made alone, in any order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from saeforge.data.shards import ROW_FIELDS
from saeforge.errors import DatasetError
from saeforge.lm.capture import Capture
from saeforge.lm.pack import ContextSource

COMPACT_ROWS = 8192


@dataclass(frozen=True)
class BucketRows:
    """Rows in their stored order.

    Attributes:
        data: per site id (rows, d) CPU tensor in the stored dtype.
        provenance: uint32 (rows, 4) of the same rows: document, position in document, token id, context.
        dropped: rows of the range that are not here because their group holds an outlier.
        outliers: per site, rows of the range over its threshold.
    """

    data: dict[str, Tensor]
    provenance: np.ndarray
    dropped: int
    outliers: dict[str, int]


def make_rows(
    capture: Capture,
    contexts: ContextSource,
    start: int,
    stop: int,
    order: np.ndarray,
    dtypes: Mapping[str, torch.dtype],
    *,
    batch_contexts: int,
    thresholds: Mapping[str, float] | None = None,
    group_rows: int = 1,
    progress: Callable[[int], None] | None = None,
) -> BucketRows:
    """Run the model over the contexts of a range of kept rows.

    Args:
        capture: entered.
        contexts: of the split.
        start: first kept row of the range.
        stop: last kept row and one.
        order: row i of the result is kept row `start + order[i]` (before outliers are taken out, the others moving up).
        dtypes: what to store for each site of the capture; sites without an entry are left out.
        batch_contexts: contexts per forward pass.
        thresholds: per site, the largest norm of a row that is kept; None keeps all. A row goes where it is larger at
            any site, so that sites stay aligned.
        group_rows: rows that stay together: with one of them, all go.
        progress: called with the rows of each batch as they are done.

    Raises:
        DatasetError: an activation is NaN or infinite; names site, document and position.
    """
    n = stop - start
    place = np.empty(n, dtype=np.int64)  # place[kept row] = row of the result
    place[order] = np.arange(n)
    data: dict[str, Tensor] = {}
    provenance = np.empty((n, len(ROW_FIELDS)), dtype=np.uint32)
    over = np.zeros(n, dtype=bool)
    outliers = dict.fromkeys(thresholds or {}, 0)
    for piece in _one_ahead(_forward(capture, contexts, start, stop, dtypes, batch_contexts)):
        target = place[piece.first - start : piece.first - start + len(piece.rows)]
        provenance[target] = piece.rows
        index = torch.from_numpy(target)
        for site, landing in piece.sites.items():
            x, norms = landing.wait(site, piece.rows)
            if site not in data:
                data[site] = torch.empty(n, x.shape[1], dtype=x.dtype)
            data[site].index_copy_(0, index, x)
            if thresholds is not None:
                large = norms.numpy() > thresholds[site]
                outliers[site] += int(large.sum())
                over[target] |= large
        if progress is not None:
            progress(len(piece.rows))
    keep = np.repeat(~over.reshape(-1, group_rows).any(axis=1), group_rows)
    kept = np.flatnonzero(keep)
    if len(kept) < n:
        provenance = provenance[kept]
        data = {site: _compact(x, kept) for site, x in data.items()}
    return BucketRows(data, provenance, n - len(kept), outliers)


def row_norms(
    capture: Capture, contexts: ContextSource, first: int, last: int, dtypes: Mapping[str, torch.dtype]
) -> dict[str, np.ndarray]:
    """Return per site the float32 norms of the kept rows of contexts `first` to `last`, in one forward pass."""
    start, stop = (int(contexts.kept_before[context]) for context in (first, last))
    (piece,) = _forward(capture, contexts, start, stop, dtypes, last - first)
    return {site: landing.wait(site, piece.rows)[1].numpy() for site, landing in piece.sites.items()}


@dataclass(frozen=True)
class _Landing:
    """One site's rows of a batch and their norms, on their way to the host."""

    x: Tensor
    norms: Tensor
    arrived: torch.cuda.Event | None

    @classmethod
    def of(cls, x: Tensor) -> _Landing:
        # Of what is stored, so that a reader of the shards finds the same norms.
        norms = torch.linalg.vector_norm(x, dim=1, dtype=torch.float32)
        if not x.is_cuda:
            return cls(x.cpu(), norms.cpu(), None)
        hosts = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for t in (x, norms)]
        for host, t in zip(hosts, (x, norms), strict=True):
            host.copy_(t, non_blocking=True)
        return cls(hosts[0], hosts[1], torch.cuda.current_stream(x.device).record_event())

    def wait(self, site: str, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """Return rows and norms once they are here; raises DatasetError where a value is not finite."""
        if self.arrived is not None:
            self.arrived.synchronize()
        if not bool(torch.isfinite(self.norms).all()):  # a norm may overflow where no value does
            finite = torch.isfinite(self.x).all(dim=1)
            if not bool(finite.all()):
                document, position = rows[int((~finite).nonzero()[0])][:2]
                raise DatasetError(
                    f"{site}: NaN or infinite activation in document {document} at token {position} (see "
                    "tokens/documents.jsonl); try --model_dtype float32, or leave that document out"
                )
        return self.x, self.norms


@dataclass(frozen=True)
class _Piece:
    """What one forward pass gives: kept rows from `first` on, with their provenance."""

    first: int
    rows: np.ndarray
    sites: dict[str, _Landing]


def _forward(
    capture: Capture,
    contexts: ContextSource,
    start: int,
    stop: int,
    dtypes: Mapping[str, torch.dtype],
    batch_contexts: int,
) -> Iterator[_Piece]:
    """Yield the kept rows from `start` to `stop`, one forward pass at a time."""
    kept_before = contexts.kept_before
    first = int(np.searchsorted(kept_before, start, side="right")) - 1
    last = int(np.searchsorted(kept_before, stop, side="left"))
    for at in range(first, last, batch_contexts):
        end = min(at + batch_contexts, last)
        batch = contexts.batch(at, end)
        low, high = max(start, int(kept_before[at])), min(stop, int(kept_before[end]))
        mine = slice(low - int(kept_before[at]), high - int(kept_before[at]))
        activations = capture(batch.batch)
        sites = {}
        for site, dtype in dtypes.items():
            x = activations[site].flatten(0, 1)
            sites[site] = _Landing.of(x.index_select(0, batch.kept[mine].to(x.device)).to(dtype))
        yield _Piece(low, batch.rows[mine], sites)


def _one_ahead(pieces: Iterator[_Piece]) -> Iterator[_Piece]:
    """Yield each piece after the next forward pass was started, so that an accelerator works while the host copies."""
    before: _Piece | None = None
    for piece in pieces:
        if before is not None:
            yield before
        before = piece
    if before is not None:
        yield before


def _compact(x: Tensor, kept: np.ndarray) -> Tensor:
    """Move the rows `kept` (ascending) to the front, in place: a bucket may fill a good part of the memory."""
    index = torch.from_numpy(kept)
    for at in range(0, len(index), COMPACT_ROWS):
        part = index[at : at + COMPACT_ROWS]
        x[at : at + len(part)] = x.index_select(0, part)  # sources never stand before their target
    return x[: len(index)]
