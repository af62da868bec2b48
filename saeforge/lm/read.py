"""Activations of documents at a site, each row with the token it belongs to; nothing is stored."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from saeforge.lm.capture import Capture, TokenBatch
from saeforge.lm.tokens import Cutter, Segment, Specials

TOKENIZE_AT_ONCE = 64  # documents per call: the fast tokenizers work on them in parallel


@dataclass(frozen=True)
class TokenActivations:
    """Rows of activations and where they come from.

    Attributes:
        x: (rows, d) on the model's device, in its dtype.
        rows: uint32 (rows, 4) provenance: document, position in document, token id, number of the segment.
    """

    x: torch.Tensor
    rows: np.ndarray


def cut_documents(
    texts: Sequence[str], tokenizer: Any, specials: Specials, context_length: int, *, drop_first: bool | None = None
) -> list[Segment]:
    """Cut texts into segments, as a harvest does; a document's number is its index in `texts`.

    Args:
        texts: documents.
        tokenizer: of the model.
        specials: of the tokenizer.
        context_length: longest segment, special tokens included.
        drop_first: leave out the first token of a segment; None: if the tokenizer puts no special token before it.
    """
    cutter = Cutter(specials, context_length, drop_first=not specials.prefix if drop_first is None else drop_first)
    segments: list[Segment] = []
    for start in range(0, len(texts), TOKENIZE_AT_ONCE):
        part = list(texts[start : start + TOKENIZE_AT_ONCE])
        ids = tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]
        for number, tokens in enumerate(ids, start=start):
            segments += cutter.cut(number, tokens)
    return segments


def read_activations(
    capture: Capture,
    segments: Sequence[Segment],
    *,
    pad: int,
    batch_tokens: int = 8192,
    on_progress: Callable[[int, int], None] | None = None,
) -> Iterator[TokenActivations]:
    """Run the model over segments, one per context, and yield the kept rows at the capture's one site.

    Batches hold segments of similar length, so that there is little padding; rows of one segment stay together and in
    order, and each segment's rows come exactly once.

    Args:
        capture: entered, with one site.
        segments: what to read.
        pad: id for padding.
        batch_tokens: most tokens of a batch, padding included; one segment always fits.
        on_progress: called with (segments done, segments in all).
    """
    (site,) = capture.sites
    order = sorted(range(len(segments)), key=lambda i: (-len(segments[i].tokens), i))
    start = 0
    while start < len(order):
        longest = len(segments[order[start]].tokens)
        numbers = order[start : start + max(1, batch_tokens // longest)]
        start += len(numbers)
        ids = np.full((len(numbers), longest), pad, dtype=np.int64)
        mask, keep = np.zeros_like(ids), np.zeros(ids.shape, dtype=bool)
        rows = []
        for line, number in enumerate(numbers):
            segment = segments[number]
            length = len(segment.tokens)
            ids[line, :length], mask[line, :length], keep[line, :length] = segment.tokens, 1, segment.keep
            columns = [segment.positions[segment.keep], segment.tokens[segment.keep]]
            ends = [np.full(segment.kept, value, dtype=np.uint32) for value in (segment.document, number)]
            rows.append(np.stack([ends[0], *columns, ends[1]], axis=1).astype(np.uint32))
        x = capture(TokenBatch(torch.from_numpy(ids), torch.from_numpy(mask)))[site.id].flatten(0, 1)
        kept = torch.from_numpy(np.flatnonzero(keep)).to(x.device)
        yield TokenActivations(x.index_select(0, kept), np.concatenate(rows))
        if on_progress is not None:
            on_progress(start, len(order))
