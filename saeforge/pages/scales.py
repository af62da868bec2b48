"""Where a value lies on an axis, and which values are worth a label."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

_SMALL = (1, 2, 5)


@dataclass(frozen=True)
class Scale:
    """A line from values to coordinates.

    Attributes:
        low, high: values at the ends.
        start, end: coordinates there.
        log: whether equal ratios are equally far apart.
    """

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    @classmethod
    def of(
        cls,
        values: Iterable[float],
        start: float,
        end: float,
        *,
        log: bool = False,
        zero: bool = False,
        room: float = 0.04,
    ) -> Scale:
        """One that holds all values, with room at both ends.

        Args:
            values: finite ones; on a logarithmic scale those above 0 count.
            start, end: coordinates.
            log: logarithmic.
            zero: begins at 0 exactly (linear only).
            room: at each end, as a share of the whole.
        """
        found = [value for value in values if math.isfinite(value) and (value > 0 or not log)]
        low, high = (min(found), max(found)) if found else (1.0, 10.0)
        if log:
            low, high = math.log(low), math.log(high)
            pad = (high - low) * room if high > low else 0.7
            return cls(math.exp(low - pad), math.exp(high + pad), start, end, True)
        if zero:
            low = min(low, 0.0)
        pad = (high - low) * room if high > low else abs(high) * 0.1 or 1.0
        return cls(low if zero and low == 0 else low - pad, high + pad, start, end)

    def at(self, value: float) -> float:
        """Coordinate of a value."""
        low, high, value = (
            (math.log(v) for v in (self.low, self.high, value)) if self.log else (self.low, self.high, value)
        )
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def ticks(self, most: int = 5) -> list[float]:
        """Round values inside, about `most` of them."""
        if not self.log:
            return _linear(self.low, self.high, most)
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        for digits in ((1,), _SMALL, (1, 2, 3, 5, 7)):
            found = [d * 10.0**n for n in decades for d in digits if self.low <= d * 10.0**n <= self.high]
            if len(found) >= 3:
                step = -(-len(found) // (most + 2))
                return found[::step]
        return _linear(self.low, self.high, most)

    def powers_of_two(self) -> list[float]:
        """The powers of two inside; the usual ticks where there are fewer than two, or too many."""
        exponents = (
            range(math.ceil(math.log2(self.low)), math.floor(math.log2(self.high)) + 1) if self.low > 0 else range(0)
        )
        return [2.0**n for n in exponents] if 2 <= len(exponents) <= 9 else self.ticks()

    def to_json(self) -> list[float | bool]:
        """For the page's script."""
        return [self.low, self.high, round(self.start, 2), round(self.end, 2), self.log]


def _linear(low: float, high: float, most: int) -> list[float]:
    rough = (high - low) / max(most, 1)
    magnitude = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * magnitude for factor in (1, 2, 2.5, 5, 10) if factor * magnitude >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(n * step, 12) for n in range(first, last + 1)]


def tick(value: float) -> str:
    """A tick's label, short."""
    size = abs(value)
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= limit:
            return f"{value / {'G': 1e9, 'M': 1e6, 'k': 1e3}[unit]:.4g}{unit}".replace("-", "\N{MINUS SIGN}")
    shown = f"{value:.4g}" if size == 0 or size >= 1e-3 else f"{value:.0e}".replace("e-0", "e-")
    return shown.replace("-", "\N{MINUS SIGN}")
