"""From documents to segments: special tokens, cutting to the context length, which tokens are kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from saeforge.errors import ConfigError

NO_POSITION = 0xFFFFFFFF
DEFAULT_CONTEXT_LENGTH = 512
_PROBE = "the quick brown fox"


@dataclass(frozen=True)
class Specials:
    """Special tokens of a tokenizer.

    Attributes:
        prefix: ids that it puts before a text (BOS, CLS).
        suffix: ids that it puts behind a text (EOS, SEP).
        dropped: ids that are never kept, wherever they stand; the unknown token is text, unless it serves as another.
        pad: id for padding.
    """

    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    dropped: frozenset[int]
    pad: int


def find_specials(tokenizer: Any) -> Specials:
    """Find prefix and suffix by tokenizing a text with and without special tokens.

    Raises:
        ConfigError: the tokenizer rewrites the text when it adds special tokens.
    """
    plain = tokenizer(_PROBE, add_special_tokens=False)["input_ids"]
    full = tokenizer(_PROBE, add_special_tokens=True)["input_ids"]
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == plain:
            break
    else:
        raise ConfigError("the tokenizer changes a text's tokens when it adds special tokens; it cannot be used here")
    dropped = set(tokenizer.all_special_ids)
    # Those that only a chat template uses are known by their mark alone.
    dropped |= {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    names = ("bos_token_id", "eos_token_id", "pad_token_id", "cls_token_id", "sep_token_id", "mask_token_id")
    if tokenizer.unk_token_id not in {getattr(tokenizer, name, None) for name in names}:
        dropped.discard(tokenizer.unk_token_id)
    pad = tokenizer.pad_token_id
    return Specials(
        prefix=tuple(full[:start]),
        suffix=tuple(full[start + len(plain) :]),
        dropped=frozenset(dropped),
        pad=0 if pad is None else int(pad),
    )


def choose_context_length(asked: int | None, model_limit: int | None, tokenizer: Any) -> int:
    """Return the longest segment, special tokens included.

    Args:
        asked: what was asked for; None: 512, or what model and tokenizer allow if that is less.
        model_limit: what the model allows, or None.
        tokenizer: of the model.

    Raises:
        ConfigError: more than they allow.
    """
    limit = min((limit for limit in (model_limit, tokenizer.model_max_length) if limit), default=None)
    if asked is None:
        return DEFAULT_CONTEXT_LENGTH if limit is None else min(DEFAULT_CONTEXT_LENGTH, limit)
    if limit is not None and asked > limit:
        raise ConfigError(f"context_length {asked}: this model and its tokenizer allow {limit}")
    return asked


@dataclass(frozen=True)
class Segment:
    """A piece of one document that a model sees alone, special tokens included.

    Attributes:
        document: number of the document.
        tokens: uint32 ids.
        positions: uint32 position of each token in its document; NO_POSITION for special tokens.
        keep: whether the activation of a token is stored.
    """

    document: int
    tokens: np.ndarray
    positions: np.ndarray
    keep: np.ndarray

    @property
    def kept(self) -> int:
        """Number of kept tokens."""
        return int(self.keep.sum())


class Cutter:
    """Cuts documents into segments of at most `context_length` tokens, special tokens included.

    A segment depends on its document alone, so that rows do not depend on how segments are packed.

    Args:
        specials: of the tokenizer.
        context_length: longest segment.
        drop_first: also drop the first token of each segment: without a BOS it takes the attention sink's place.
        group_rows: keep only whole runs of so many neighbouring tokens.

    Attributes:
        ungrouped: tokens that would be kept, but filled no run, in all documents so far.
    """

    def __init__(self, specials: Specials, context_length: int, *, drop_first: bool, group_rows: int = 1) -> None:
        self.room = context_length - len(specials.prefix) - len(specials.suffix)
        if self.room < 2:
            raise ConfigError(
                f"context_length {context_length} leaves no room beside special tokens; give a larger one"
            )
        self.specials = specials
        self.drop_first = drop_first
        self.group_rows = group_rows
        self.ungrouped = 0
        self._dropped = np.array(sorted(specials.dropped), dtype=np.int64)

    def cut(
        self, document: int, ids: list[int], *, budget: int | None = None, wanted: np.ndarray | None = None
    ) -> list[Segment]:
        """Return the segments of a document's plain token ids that keep at least one row.

        Args:
            document: its number.
            ids: token ids without special tokens.
            budget: most rows to keep; what is beyond is not kept.
            wanted: bool, for each id, whether it may be kept; None: all.
        """
        prefix, suffix = self.specials.prefix, self.specials.suffix
        segments = []
        left = len(ids) if budget is None else budget
        for start in range(0, len(ids), self.room):
            piece = np.array(ids[start : start + self.room], dtype=np.int64)
            kept_ids = ~np.isin(piece, self._dropped)
            if wanted is not None:
                kept_ids &= wanted[start : start + self.room]
            if self.drop_first:
                kept_ids[0] = False
            keep = whole_runs(kept_ids, self.group_rows)
            within = np.cumsum(keep) <= left // self.group_rows * self.group_rows
            self.ungrouped += int((kept_ids & ~keep & within).sum())
            keep &= within
            kept = int(keep.sum())
            left -= kept
            if kept == 0:
                continue
            outside = (np.full(len(prefix), NO_POSITION), np.full(len(suffix), NO_POSITION))
            positions = np.concatenate([outside[0], np.arange(start, start + len(piece)), outside[1]])
            segments.append(
                Segment(
                    document,
                    np.concatenate([np.array(prefix, dtype=np.int64), piece, suffix]).astype(np.uint32),
                    positions.astype(np.uint32),
                    np.concatenate([np.zeros(len(prefix), bool), keep, np.zeros(len(suffix), bool)]),
                )
            )
        return segments


def whole_runs(keep: np.ndarray, length: int) -> np.ndarray:
    """Return the mask with each run of True cut to a multiple of `length`, from its start on."""
    if length == 1:
        return keep
    edges = np.flatnonzero(np.diff(np.concatenate([[False], keep, [False]]).astype(np.int8)))
    out = np.zeros_like(keep)
    for start, stop in edges.reshape(-1, 2):
        out[start : start + (stop - start) // length * length] = True
    return out
