"""Does this model keep packed segments apart? Asked of the loaded model itself, with real text."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from saeforge.lm.capture import Capture, TokenBatch
from saeforge.lm.tokens import Segment

# Relative to the norm of the row. A leak in a tiny model can be as small as 1e-4, so it is looked for exactly: same
# shapes, other neighbours, equal rows. The comparison with a segment alone only has to find wrong positions, and its
# shapes differ, so rounding is allowed for.
LEAK_TOLERANCE = 1e-6
DIFFERENCE_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class Isolation:
    """Result of `probe_isolation`.

    Attributes:
        isolated: packing this model with restarting positions changes nothing.
        leak: largest relative change of a row when the other segment of its context is replaced.
        difference: mean relative difference of a row packed and alone.
        reason: one line, for the record.
    """

    isolated: bool
    leak: float
    difference: float
    reason: str


def probe_isolation(capture: Capture, segments: Sequence[Segment]) -> Isolation:
    """Compare rows of a segment packed behind two different neighbours, and alone.

    Args:
        capture: hooks on the model.
        segments: real segments, at least one; the first two are used.

    Returns:
        Whether `position_ids` that restart isolate segments in this model.
    """
    if "position_ids" not in inspect.signature(capture.model.forward).parameters:
        return Isolation(False, float("nan"), float("nan"), "the model takes no position_ids")
    shortest = min(len(segments[0].tokens), 64)
    neighbour = torch.from_numpy(segments[0].tokens[:shortest].astype("int64"))
    other = neighbour.flip(0)
    if torch.equal(other, neighbour):
        other = (neighbour + 1) % int(neighbour.max() + 2)
    segment = torch.from_numpy(segments[min(1, len(segments) - 1)].tokens[:64].astype("int64"))
    positions = torch.cat([torch.arange(len(neighbour)), torch.arange(len(segment))])[None]

    def run(ids: torch.Tensor, position_ids: torch.Tensor | None) -> list[torch.Tensor]:
        found = capture(TokenBatch(ids[None], None, position_ids))
        return [found[site.id][0, -len(segment) :].float() for site in capture.sites]

    first = run(torch.cat([neighbour, segment]), positions)
    second = run(torch.cat([other, segment]), positions)
    alone = run(segment, None)
    leak = max(_relative(a, b).max().item() for a, b in zip(first, second, strict=True))
    difference = max(_relative(a, b).mean().item() for a, b in zip(first, alone, strict=True))
    dtype = next(capture.model.parameters()).dtype
    limit = DIFFERENCE_TOLERANCE.get(dtype, DIFFERENCE_TOLERANCE[torch.bfloat16])
    if not leak <= LEAK_TOLERANCE:
        return Isolation(False, leak, difference, f"packed segments see each other (relative change {leak:.1e})")
    if not difference <= limit:
        return Isolation(False, leak, difference, f"packed rows differ from separate ones by {difference:.1e}")
    return Isolation(True, leak, difference, "packed rows equal separate ones")


def _relative(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return the distance of rows relative to their norm."""
    return (a - b).pow(2).sum(-1).sqrt() / b.pow(2).sum(-1).sqrt().clamp_min(1e-12)
