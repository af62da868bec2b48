"""Second pass: the tokens around each example, and the latent's activation at every one of them.

Only rows that some window needs are encoded. What one window needs is a pair (token, latent); pairs are sorted by token
once, so that each row that comes by, in any order, finds its own at once.
"""

from __future__ import annotations

import numpy as np

from saeforge.features.sources import StoredTokens
from saeforge.ops import SparseCode

REACH = 24  # tokens to both sides


class Windows:
    """Windows of examples, filled row by row.

    Args:
        latents: int64 (n,) of the examples.
        keys: uint64 (n,) their tokens.
        values: float32 (n,) their activations.
        tokens: where the tokens stand.

    Attributes:
        segment, position, length: of each window: number of its segment, first position in the document, tokens.
        offsets: int64 (n + 1,) of the windows in `values`.
        values: float32, NaN where no activation is stored for a token.
    """

    def __init__(
        self, latents: np.ndarray, keys: np.ndarray, values: np.ndarray, tokens: StoredTokens, *, reach: int = REACH
    ) -> None:
        self.segment, self.position, self.length = tokens.around(keys, reach)
        self.offsets = np.concatenate([[0], np.cumsum(self.length)]).astype(np.int64)
        self.values = np.full(self.offsets[-1], np.nan, dtype=np.float32)
        inside = np.arange(self.offsets[-1]) - np.repeat(self.offsets[:-1], self.length)
        # Windows lie in one document, so that positions can be counted up inside the packed key.
        centre = (keys & np.uint64(0xFFFFFFFF)).astype(np.int64) - self.position
        first = keys - centre.astype(np.uint64)
        needed = np.repeat(first, self.length) + inside.astype(np.uint64)
        self._centres = self.offsets[:-1] + centre
        self._centre_values = values
        self._slot = np.argsort(needed, kind="stable")
        needed = needed[self._slot]
        self._latent = np.repeat(latents, self.length)[self._slot]
        self._key, starts = np.unique(needed, return_index=True)
        self._starts = np.append(starts, len(needed)).astype(np.int64)

    def needed(self, keys: np.ndarray) -> np.ndarray:
        """Return which rows, by number, some window needs."""
        return np.flatnonzero(self._find(keys)[1])

    def fill(self, keys: np.ndarray, code: SparseCode) -> None:
        """Take in rows.

        Args:
            keys: uint64 (rows,); those that no window needs are passed over.
            code: their latents, on the CPU.
        """
        number, found = self._find(keys)
        counts = np.where(found, self._starts[number + 1] - self._starts[number], 0)
        row = np.repeat(np.arange(len(keys)), counts)
        pair = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts) + self._starts[number][row]
        # Rows of a code are in order, and so are the latents of a row: (row, latent) is sorted as it stands.
        code = code.trimmed()
        entries = code.rows().numpy() * code.d_sae + code.indices.numpy()
        wanted = row * code.d_sae + self._latent[pair]
        at = np.searchsorted(entries, wanted)
        active = np.zeros(len(wanted), dtype=bool)
        if len(entries):
            at = np.minimum(at, len(entries) - 1)
            active = entries[at] == wanted
        values = np.zeros(len(wanted), dtype=np.float32)
        values[active] = code.values.numpy()[at[active]]
        self.values[self._slot[pair]] = values

    def finish(self) -> None:
        """Put the centres' values back: fewer rows in a product may round differently in the last bit."""
        self.values[self._centres] = self._centre_values

    def _find(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if len(self._key) == 0:  # no latent ever fired
            return np.zeros(len(keys), dtype=np.int64), np.zeros(len(keys), dtype=bool)
        number = np.minimum(np.searchsorted(self._key, keys), len(self._key) - 1)
        return number, self._key[number] == keys
