"""Equal sparsity: which setting to train next, and a metric at an L0 between two trained settings."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from saeforge.errors import ConfigError

#: An SAE is at its L0 if it is at most so far away.
TOLERANCE = 0.1
#: Neighbours whose L0 differ by at most this share of the wanted one are interpolated between.
WIDEST = 0.25
#: The next setting aims this share beyond the wanted L0, so that two trained ones embrace it.
BEYOND = 0.04
#: Slopes of log L0 by log setting that are believed, from two settings on one side.
_SLOPES = 0.2, 5.0


@dataclass(frozen=True)
class Knob:
    """The option that sets a variant's sparsity.

    Attributes:
        option: its name.
        start: the first value to try; for an exact knob, L0 itself is the value.
        rising: L0 rises with it (a target), or falls (a penalty).
        exact: L0 is this option's value by construction: one run is enough.
    """

    option: str
    start: float = 1.0
    rising: bool = False
    exact: bool = False

    @classmethod
    def parse(cls, text: str) -> Knob:
        """`k` is exact; `l1:5` is a penalty that starts at 5; `target_l0:8:rising` rises.

        Raises:
            ConfigError: anything else.
        """
        option, *more = text.split(":")
        try:
            if not more:
                return cls(option, exact=True, rising=True)
            if len(more) == 1 or (len(more) == 2 and more[1] == "rising"):
                return cls(option, start=float(more[0]), rising=len(more) == 2)
        except ValueError:
            pass
        raise ConfigError(f"knob {text!r}: expected OPTION (exact), OPTION:START (a penalty) or OPTION:START:rising")


def next_value(
    knob: Knob, points: Sequence[tuple[float, float]], target: float, *, hints: Sequence[float] = (), most: int = 7
) -> float | None:
    """The setting to train next; None if the trained ones suffice, or are `most` already.

    Args:
        knob: what is set.
        points: (value, L0) of what was trained.
        target: the wanted L0.
        hints: values to try first, from another seed.
        most: settings to train at most.
    """
    if knob.exact:
        return None if points else target
    if found(points, target) is not None or len(points) >= most:
        return None
    tried = {value for value, _ in points}
    for value in hints:
        if value not in tried:
            return value
    if not points:
        return knob.start
    logs = sorted((math.log(max(l0, 0.01) / target), math.log(value)) for value, l0 in points)
    nearest, at = min(logs, key=lambda point: abs(point[0]))
    aim = math.log1p(-BEYOND if nearest > 0 else BEYOND)
    below, above = [point for point in logs if point[0] < 0], [point for point in logs if point[0] > 0]
    if below and above:
        (low, low_at), (high, high_at) = below[-1], above[0]
        share = min(max((aim - low) / (high - low), 0.1), 0.9)  # however bent the curve is, the bracket shrinks
        return _rounded(low_at + share * (high_at - low_at))
    slope = 1.0 if knob.rising else -1.0  # L0 falls about as the inverse of a penalty
    if len(logs) > 1:  # all on one side; the L0 of a quadratic penalty may follow its target by a fifth
        (near, near_at), (far, far_at) = sorted(logs, key=lambda point: abs(point[0]))[:2]
        seen = (near - far) / (near_at - far_at)
        slope *= min(max(seen / slope, _SLOPES[0]), _SLOPES[1])
    step = min(max((aim - nearest) / slope, -2.0), 2.0)
    value = _rounded(at + step)
    if value in tried:  # what was trained there is no nearer: L0 does not follow, so further out than anything
        value = _rounded(math.log(max(tried) if step > 0 else min(tried)) + math.copysign(1.0, step))
    return value


def _rounded(logarithm: float) -> float:
    """Six digits: what is written, and read by people, is what was trained."""
    return float(f"{math.exp(logarithm):.6g}")


def found(points: Sequence[tuple[float, float]], target: float) -> tuple[int, int] | None:
    """Numbers of the two points to interpolate between; twice that of one at the target; None: not there yet.

    Two around the target come first, also where one of them is within the tolerance: a tenth of a latent moves MCC by
    as much as another seed does.
    """
    if not points:
        return None
    below = [number for number, (_, l0) in enumerate(points) if l0 <= target]
    above = [number for number, (_, l0) in enumerate(points) if l0 >= target]
    if below and above:
        low, high = max(below, key=lambda number: points[number][1]), min(above, key=lambda number: points[number][1])
        if points[high][1] - points[low][1] <= WIDEST * target:
            return low, high
    nearest = min(range(len(points)), key=lambda number: abs(points[number][1] - target))
    return (nearest, nearest) if abs(points[nearest][1] - target) <= TOLERANCE else None


def between(low: Mapping[str, Any], high: Mapping[str, Any], target: float) -> dict[str, Any]:
    """Numbers that two records share, interpolated linearly in their `l0`; the record itself if both are the same."""
    if low is high:
        return dict(low)
    share = (target - low["l0"]) / (high["l0"] - low["l0"])

    def is_number(value: Any) -> bool:
        return isinstance(value, (int, float)) and not isinstance(value, bool)

    shared = [key for key in low if is_number(low[key]) and is_number(high.get(key))]
    return {key: low[key] + share * (high[key] - low[key]) for key in shared}
