"""A step as one CUDA graph: for small SAEs, whose step is bound by launching kernels one by one.

What a graph repeats must be the same every time: shapes, addresses, and everything the host decides. So it serves
variants with a constant number of active latents, without schedules of their own, on one GPU, while no latent is listed
as dead; every other step runs as usual, and the log says once why.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

from saeforge.data.batch import Batch
from saeforge.ops import SparseCode, shadow
from saeforge.variants import ScheduleValues, StepOutput, Variant

log = logging.getLogger("saeforge.training")


class GraphedStep:
    """`variant.step`, captured at its first call that allows it and replayed from then on.

    Args:
        variant: on the device where it trains, before the first step.
    """

    def __init__(self, variant: Variant) -> None:
        self._variant = variant
        self._graph: Any = None
        self._shape: tuple[Any, ...] = ()
        self._body: _Body | None = None
        self._ragged = False
        self._told: set[str] = set()

    def __call__(self, batch: Batch, schedule: ScheduleValues) -> StepOutput:
        """As `variant.step`, with the same results."""
        reason = self._why_not(batch, schedule)
        if reason is not None:
            if reason not in self._told:
                self._told.add(reason)
                log.info("no CUDA graph: %s", reason)
            return self._variant.step(batch, schedule)
        for parameter in self._variant.parameters():
            if shadow.to_update(parameter) is not None:
                shadow.of(parameter)  # the graph reads the copy where it lies; whoever changed the weight may not have
        rows = (batch.x,) if batch.target is batch.x else (batch.x, batch.target)
        shape = tuple((row.shape, row.dtype) for row in rows)
        if self._graph is None or shape != self._shape:
            first = self._variant.step(batch, schedule)  # kernels are compiled and copies made before the capture
            if first.code.k is None:
                self._ragged = True
                return first
            self._body = _Body(self._variant, first.code.k)
            samples = tuple(row.clone() for row in rows)
            self._graph = torch.cuda.make_graphed_callables(self._body, samples, allow_unused_input=True)
            self._shape = shape
        assert self._body is not None
        return self._body.unpack(self._graph(*rows))

    def _why_not(self, batch: Batch, schedule: ScheduleValues) -> str | None:
        run = self._variant.run
        if batch.x.device.type != "cuda":
            return f"the step runs on {batch.x.device.type}"
        if run.group.size > 1:
            return f"{run.group.size} devices share the batch"
        if self._variant.shard is not None:
            return f"{self._variant.shard.group.size} devices share out the latents"
        if batch.weight is not None:
            return "rows have weights"
        if batch.target.requires_grad:
            return "the target carries the gradient of a skip path"
        if self._variant.schedules(run.total_steps):
            return f"{type(self._variant).__name__} has schedules, and a graph repeats its numbers"
        if self._ragged:
            return f"{type(self._variant).__name__} has no constant number of active latents"
        if len(self._variant.dead_latents()):
            return "some latents are dead, and how many they are may change (until they are revived)"
        return None


class _Body(nn.Module):
    """The step as tensors in, tensors out."""

    def __init__(self, variant: Variant, k: int) -> None:
        super().__init__()
        self.variant, self._k = variant, k
        self._terms: list[str] = []
        self._counters: list[str] = []

    def forward(self, x: Tensor, target: Tensor | None = None) -> tuple[Tensor, ...]:
        out = self.variant.step(Batch(x, x if target is None else target), {})
        self._terms, self._counters = list(out.terms), list(out.counters)
        code = out.code
        return (*out.terms.values(), *out.counters.values(), code.values, code.indices, code.offsets)

    def unpack(self, tensors: tuple[Tensor, ...]) -> StepOutput:
        values, indices, offsets = tensors[-3:]
        code = SparseCode(values, indices, offsets, self.variant.d_sae, self._k)
        at = len(self._terms)
        terms = dict(zip(self._terms, tensors[:at], strict=True))
        return StepOutput(terms, code, dict(zip(self._counters, tensors[at:-3], strict=True)))
