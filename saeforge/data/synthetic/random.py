"""Random numbers as pure functions of integers, from the raw stream of Philox (see `saeforge.data.plan`)."""

from __future__ import annotations

import numpy as np


class Stream:
    """Numbers drawn one after another from the stream that a key names."""

    def __init__(self, *key: int) -> None:
        self._raw = np.random.Philox(np.random.SeedSequence(list(key)))

    def bytes(self, n: int) -> np.ndarray:
        """(n,) uint8, uniform."""
        return self._raw.random_raw(-(-n // 8)).view(np.uint8)[:n]

    def uniform(self, n: int) -> np.ndarray:
        """(n,) float64, uniform in [0, 1) with 53 bits."""
        scaled: np.ndarray = (self._raw.random_raw(n) >> np.uint64(11)) * 2.0**-53
        return scaled

    def normal(self, n: int) -> np.ndarray:
        """(n,) float64, standard normal, by Box and Muller (1958)."""
        half = -(-n // 2)
        radius = np.sqrt(-2 * np.log1p(-self.uniform(half)))
        angle = 2 * np.pi * self.uniform(half)
        return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:n]


def normals(n: int, *key: int) -> np.ndarray:
    """(n,) standard normal numbers as a pure function of `key`."""
    return Stream(*key).normal(n)
