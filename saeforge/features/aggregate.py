"""First pass: what a stream of active latents says of each of them, in bounded memory and in any order.

Statistics, the strongest contexts and samples by strength are kept as arrays with one row per latent, and merged step
by step without a loop over latents or tokens. Everything but the last bits of a sum is independent of how the stream is
cut into steps and in which order it comes:

* strongest contexts: one hit for each segment, the `TOP` largest; ties go to the lowest (document, position);
* samples: the range of an activation is its octave below the octave of the latent's maximum, so that a new maximum
  moves whole reservoirs and never splits one; in a range the `PER_RANGE` lowest hashes of (seed, latent, document,
  position);
* quantiles: from a histogram of `1 << FINE_BITS` equal bins for each octave: within 1/32 of the value.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from saeforge.errors import ConfigError, DatasetError

TOP = 20
RANGES = 5
PER_RANGE = 5
FINE_BITS = 5
LOWEST_OCTAVE, OCTAVES = -16, 32  # values outside count in the first or last bin
BINS = OCTAVES << FINE_BITS
_SHIFT = 23 - FINE_BITS  # a float32's exponent and leading bits of its fraction are the number of its bin
_BASE = (127 + LOWEST_OCTAVE) << FINE_BITS
DOCUMENT_BITS = 1 << 32  # 512 MiB: distinct documents are counted exactly while latents x documents stay below
NOTHING = np.uint64(0xFFFFFFFFFFFFFFFF)
_BITS_OF_BYTE = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(1, dtype=np.uint8)

#: Arrays of an aggregate, which are its whole state.
FIELDS = (
    "count",
    "total",
    "largest",
    "histogram",
    "seen",
    "top_value",
    "top_key",
    "sample_value",
    "sample_key",
    "sample_hash",
)


def pack_keys(documents: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Return uint64 `document << 32 | position`, which orders by document, then position."""
    return (documents.astype(np.uint64) << np.uint64(32)) | positions.astype(np.uint64)


def unpack_keys(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return documents and positions, int64, of packed keys."""
    return (keys >> np.uint64(32)).astype(np.int64), (keys & np.uint64(0xFFFFFFFF)).astype(np.int64)


def segment_keys(keys: np.ndarray, room: int) -> np.ndarray:
    """Return the segment of each token, as `document << 32 | number of the segment in it`.

    Args:
        keys: packed (document, position).
        room: text tokens of a full segment: documents are cut at its multiples.
    """
    documents, positions = unpack_keys(keys)
    return pack_keys(documents, positions // room)


class Aggregate:
    """Statistics and pointers of every latent.

    Args:
        d_sae: number of latents.
        n_documents: documents have numbers below this.
        room: text tokens of a full segment.
        seed: of the samples.
    """

    count: np.ndarray
    total: np.ndarray
    largest: np.ndarray
    histogram: np.ndarray
    seen: np.ndarray
    top_value: np.ndarray
    top_key: np.ndarray
    sample_value: np.ndarray
    sample_key: np.ndarray
    sample_hash: np.ndarray

    def __init__(self, d_sae: int, *, n_documents: int, room: int, seed: int = 0) -> None:
        self.d_sae, self.room, self.seed = d_sae, room, seed
        self.rows = 0
        self.document_bits = max(8, min(n_documents, DOCUMENT_BITS // d_sae) + 7 & ~7)
        self.documents_exact = n_documents <= self.document_bits
        self.count = np.zeros(d_sae, dtype=np.int64)
        self.total = np.zeros(d_sae, dtype=np.float64)
        self.largest = np.zeros(d_sae, dtype=np.float32)
        self.histogram = np.zeros((d_sae, BINS), dtype=np.int32)
        self.seen = np.zeros((d_sae, self.document_bits // 8), dtype=np.uint8)
        self.top_value = np.zeros((d_sae, TOP), dtype=np.float32)
        self.top_key = np.zeros((d_sae, TOP), dtype=np.uint64)
        self.sample_value = np.zeros((d_sae, RANGES, PER_RANGE), dtype=np.float32)
        self.sample_key = np.zeros((d_sae, RANGES, PER_RANGE), dtype=np.uint64)
        self.sample_hash = np.full((d_sae, RANGES, PER_RANGE), NOTHING)

    def state(self) -> dict[str, np.ndarray]:
        """Return the arrays that `restore` takes, not copied."""
        return {"rows": np.array(self.rows), **{name: getattr(self, name) for name in FIELDS}}

    def restore(self, state: dict[str, np.ndarray]) -> None:
        """Go on from a saved state.

        Raises:
            DatasetError: it belongs to another aggregate.
        """
        for name in FIELDS:
            if state[name].shape != getattr(self, name).shape:
                raise DatasetError("the saved progress does not fit this SAE and dataset; build with --overwrite")
            setattr(self, name, state[name])
        self.rows = int(state["rows"])

    def update(self, latents: np.ndarray, values: np.ndarray, keys: np.ndarray, rows: int) -> None:
        """Take in some rows' active latents.

        Args:
            latents: int64 (n,).
            values: float32 (n,); zeros are not active and are left out.
            keys: uint64 (n,), packed (document, position) of each entry; no (latent, key) may come twice.
            rows: tokens that these entries come from, silent ones included.

        Raises:
            ConfigError: a value is negative or not finite, or there are more than 2^31 rows.
        """
        self.rows += rows
        if self.rows >= 1 << 31:
            raise ConfigError("more than 2^31 tokens: give --max_tokens; so many are not needed to read features")
        active = values != 0
        if not active.all():
            latents, values, keys = latents[active], values[active], keys[active]
        if len(values) == 0:
            return
        low, high = float(values.min()), float(values.max())
        if not (low > 0 and math.isfinite(high)):
            raise ConfigError(f"latents with values from {low} to {high}: expected finite, positive ones")
        self.count += np.bincount(latents, minlength=self.d_sae)
        self.total += np.bincount(latents, weights=values, minlength=self.d_sae)
        fine = np.clip((values.view(np.int32) >> _SHIFT) - _BASE, 0, BINS - 1)
        np.add.at(self.histogram.reshape(-1), latents * BINS + fine, 1)
        octave_before = _octaves(self.largest)
        np.maximum.at(self.largest, latents, values)
        self._see_documents(latents, keys)
        self._keep_top(latents, values, keys)
        risen = np.flatnonzero((_octaves(self.largest) != octave_before) & (self.sample_value > 0).any((1, 2)))
        if len(risen):
            self._merge_samples(risen, risen[:0], values[:0], keys[:0], keys[:0])
        self._keep_samples(latents, values, keys)

    def _see_documents(self, latents: np.ndarray, keys: np.ndarray) -> None:
        column = keys >> np.uint64(32)
        if not self.documents_exact:
            column = _mix(column) % np.uint64(self.document_bits)
        column = column.astype(np.int64)
        flat = self.seen.reshape(-1)
        place, bit = latents * self.seen.shape[1] + (column >> 3), column & 7
        fresh = (flat[place] >> bit.astype(np.uint8)) & 1 == 0
        place, bit = place[fresh], bit[fresh]
        for number in range(8):  # equal places are written with equal bytes, so that repeats do no harm
            at = place[bit == number]
            flat[at] |= np.uint8(1 << number)

    def _keep_top(self, latents: np.ndarray, values: np.ndarray, keys: np.ndarray) -> None:
        good = values >= self.top_value[latents, -1]
        latents, values, keys = latents[good], values[good], keys[good]
        if len(latents) == 0:
            return
        touched, latents, (values, keys) = self._with_kept(latents, (values, keys), ("top_value", "top_key"))
        # A segment's best first; then, of the best ones, the strongest of each latent.
        segments = segment_keys(keys, self.room)
        order = np.lexsort((keys, -values, segments, latents))
        latents, values, keys, segments = latents[order], values[order], keys[order], segments[order]
        first = np.ones(len(order), dtype=bool)
        first[1:] = (latents[1:] != latents[:-1]) | (segments[1:] != segments[:-1])
        latents, values, keys = latents[first], values[first], keys[first]
        order = np.lexsort((keys, -values, latents))
        latents, values, keys = latents[order], values[order], keys[order]
        rank = _ranks(latents)
        kept = rank < TOP
        self.top_value[touched], self.top_key[touched] = 0, 0
        self.top_value[latents[kept], rank[kept]] = values[kept]
        self.top_key[latents[kept], rank[kept]] = keys[kept]

    def _keep_samples(self, latents: np.ndarray, values: np.ndarray, keys: np.ndarray) -> None:
        hashes = self._hash(latents, keys)
        good = hashes <= self.sample_hash[latents, self._range(latents, values), -1]
        if good.any():
            latents = latents[good]
            self._merge_samples(np.unique(latents), latents, values[good], keys[good], hashes[good])

    def _merge_samples(
        self, touched: np.ndarray, latents: np.ndarray, values: np.ndarray, keys: np.ndarray, hashes: np.ndarray
    ) -> None:
        names = ("sample_value", "sample_key", "sample_hash")
        _, latents, (values, keys, hashes) = self._with_kept(latents, (values, keys, hashes), names, touched)
        group = latents * RANGES + self._range(latents, values)
        order = np.lexsort((keys, hashes, group))
        group, values, keys, hashes = group[order], values[order], keys[order], hashes[order]
        rank = _ranks(group)
        kept = rank < PER_RANGE
        at = (group[kept] // RANGES, group[kept] % RANGES, rank[kept])
        self.sample_value[touched], self.sample_key[touched], self.sample_hash[touched] = 0, 0, NOTHING
        self.sample_value[at], self.sample_key[at], self.sample_hash[at] = values[kept], keys[kept], hashes[kept]

    def _with_kept(
        self,
        latents: np.ndarray,
        columns: tuple[np.ndarray, ...],
        names: tuple[str, ...],
        touched: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray, tuple[np.ndarray, ...]]:
        """Return the latents concerned, and the entries with those that are kept of these latents so far."""
        touched = np.unique(latents) if touched is None else touched
        kept = [getattr(self, name)[touched].reshape(len(touched), -1) for name in names]
        row, slot = np.nonzero(kept[0] > 0)
        merged = tuple(np.concatenate([new, old[row, slot]]) for new, old in zip(columns, kept, strict=True))
        return touched, np.concatenate([latents, touched[row]]), merged

    def _range(self, latents: np.ndarray, values: np.ndarray) -> np.ndarray:
        """Return the range of values: 0 for the octave of the latent's maximum, and so on downwards."""
        return np.asarray(np.minimum(_octaves(self.largest)[latents] - _octaves(values), RANGES - 1))

    def _hash(self, latents: np.ndarray, keys: np.ndarray) -> np.ndarray:
        of_latent = _mix(np.arange(self.d_sae, dtype=np.uint64) + _mix(np.full(1, self.seed, dtype=np.uint64)))
        return _mix(keys ^ of_latent[latents])

    def documents(self) -> np.ndarray:
        """Return in how many documents each latent fires, int64: exact, or a linear count of hashed documents."""
        bits: np.ndarray = _BITS_OF_BYTE[self.seen].sum(1, dtype=np.int64)
        if self.documents_exact:
            return bits
        free = np.maximum(self.document_bits - bits, 1) / self.document_bits
        return np.asarray(np.rint(-self.document_bits * np.log(free)).astype(np.int64))

    def mean(self) -> np.ndarray:
        """Return the mean of each latent's non-zeros, 0 where it never fired; float64."""
        return np.asarray(self.total / np.maximum(self.count, 1))

    def quantile(self, share: float) -> np.ndarray:
        """Return a quantile (nearest rank) of each latent's non-zeros, float64, 0 where it never fired.

        The error is below 1/32 of the value, for values from 2^-16 to 2^16.
        """
        result = np.zeros(self.d_sae)
        for start in range(0, self.d_sae, 4096):  # bounds the memory of the running sums
            part = slice(start, start + 4096)
            running = np.cumsum(self.histogram[part], axis=1, dtype=np.int64)
            rank = np.maximum(np.ceil(share * self.count[part]), 1)
            fine = (running < rank[:, None]).sum(1).clip(max=BINS - 1)
            line = np.arange(len(fine))
            inside = self.histogram[part][line, fine]
            before = running[line, fine] - inside
            low, high = _edge(fine), _edge(fine + 1)
            guess = low + (high - low) * (rank - before - 0.5) / np.maximum(inside, 1)
            result[part] = np.where(self.count[part] > 0, np.minimum(guess, self.largest[part]), 0)
        return result

    def octaves(self) -> np.ndarray:
        """Return int64 (d_sae, OCTAVES): activations from 2^e to 2^(e + 1), e from LOWEST_OCTAVE up."""
        return np.asarray(self.histogram.reshape(self.d_sae, OCTAVES, -1).sum(2, dtype=np.int64))

    def examples(self) -> dict[str, np.ndarray]:
        """Return all pointers, ordered by latent, the strongest before the samples, and then by rank.

        Returns:
            latent, range (-1: strongest contexts, else 0 to RANGES - 1), rank, value, key; of equal length.
        """
        values = np.concatenate([self.top_value, self.sample_value.reshape(self.d_sae, -1)], axis=1)
        keys = np.concatenate([self.top_key, self.sample_key.reshape(self.d_sae, -1)], axis=1)
        ranges = np.concatenate([np.full(TOP, -1), np.repeat(np.arange(RANGES), PER_RANGE)])
        ranks = np.concatenate([np.arange(TOP), np.tile(np.arange(PER_RANGE), RANGES)])
        latent, slot = np.nonzero(values > 0)
        at: Any = (latent, slot)
        return {"latent": latent, "range": ranges[slot], "rank": ranks[slot], "value": values[at], "key": keys[at]}


def _octaves(values: np.ndarray) -> np.ndarray:
    """Return the biased binary exponents of float32 values; 0 for zero."""
    return np.asarray(values.view(np.int32) >> 23)


def _edge(fine: np.ndarray) -> np.ndarray:
    """Return the lower edges of fine bins; the first bin begins at 0."""
    edges = ((fine + _BASE).astype(np.int32) << np.int32(_SHIFT)).view(np.float32).astype(np.float64)
    return np.where(fine == 0, 0.0, edges)


def _ranks(groups: np.ndarray) -> np.ndarray:
    """Return each entry's number inside its group, for sorted groups."""
    first = np.ones(len(groups), dtype=bool)
    first[1:] = groups[1:] != groups[:-1]
    starts = np.flatnonzero(first)
    number = np.arange(len(groups))
    return np.asarray(number - np.repeat(starts, np.diff(np.append(starts, len(groups)))))


def _mix(x: np.ndarray) -> np.ndarray:
    """Return the splitmix64 finaliser of uint64 numbers."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(x ^ (x >> np.uint64(31)))
