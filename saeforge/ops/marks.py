"""Marked departures from the true derivative: stop-gradients and pseudo-gradients.

A loss may hold a tensor fixed (AuxK's residual) or hand a gradient to a step function that has none (the threshold of a
JumpReLU). Written with these two functions, such places can be told apart from mistakes: `saeforge.testing` holds the
fixed tensors fixed and leaves the pseudo-gradients out, and finite differences then must agree with what remains.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor


class _Recording:
    """Values of the stop-gradients of one evaluation, in the order of their calls."""

    def __init__(self) -> None:
        self.values: list[Tensor] = []
        self.position: int | None = None  # None while recording; else the next value to hand out


_recording: _Recording | None = None
_pseudo = True


def stop_gradient(tensor: Tensor) -> Tensor:
    """The tensor without a gradient, marked: `tensor.detach()`, and the recorded value in a replay."""
    if _recording is None:
        return tensor.detach()
    if _recording.position is None:
        _recording.values.append(tensor.detach().clone())
        return _recording.values[-1]
    value = _recording.values[_recording.position]
    _recording.position += 1
    return value


def pseudo_gradient(tensor: Tensor) -> Tensor:
    """Exactly zero, with the gradient of `tensor`: adds a pseudo-gradient to what it is added to, marked as one.

    `f = z * active + pseudo_gradient(-(theta.detach() / eps) * inside * theta)` is a JumpReLU with the derivative of
    Rajamanoharan et al. 2024 (arXiv 2407.14435) by its threshold. `tensor` must be finite.
    """
    detached = tensor.detach()
    return tensor - detached if _pseudo else detached - detached


def replaying() -> bool:
    """Whether `stop_gradient` may return something else than its argument."""
    return _recording is not None


@contextmanager
def recorded_stops() -> Iterator[_Recording]:
    """Records what `stop_gradient` returns; see `replayed_stops`."""
    global _recording
    before, _recording = _recording, _Recording()
    try:
        yield _recording
    finally:
        _recording = before


@contextmanager
def replayed_stops(recording: _Recording) -> Iterator[None]:
    """Makes `stop_gradient` return the recorded values again, in the same order of calls."""
    global _recording
    before, _recording = _recording, recording
    recording.position = 0
    try:
        yield
    finally:
        recording.position, _recording = None, before


@contextmanager
def without_pseudo_gradients() -> Iterator[None]:
    """Leaves the true derivative: `pseudo_gradient` has no gradient inside."""
    global _pseudo
    before, _pseudo = _pseudo, False
    try:
        yield
    finally:
        _pseudo = before
