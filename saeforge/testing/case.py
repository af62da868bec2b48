"""`Case`: a variant as the checks need it, small, with weights as in the middle of a run, and rows to feed it."""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from saeforge.data.batch import Batch
from saeforge.data.moments import Moments, Statistics
from saeforge.ops import Group, Shard, latents_over
from saeforge.ops.marks import without_pseudo_gradients
from saeforge.registry import PluginRecord
from saeforge.testing.outcome import CheckFailed
from saeforge.variants import DataStatistics, RunSettings, StepOutput, Variant, shard_

WIDTH = 12
#: Widths of the sources of variants that take several (those whose input scale is per source).
SOURCES = (7, 5)
#: Options that keep a case small, where the variant has them and the caller does not set them.
SMALL = {"d_sae": 64, "k": 4}
TOTAL_STEPS = 100
STEP = 60  # of the run that the checks are in: past every usual warm-up
DEAD_AFTER = 50
GROUP_ROWS = 2
DIRECTIONS = 32
RAW_SCALE = 7.0


@dataclass(frozen=True)
class Evaluation:
    """One step of a variant: detached terms, dense latents (B, d_sae), gradients by parameter (0 where none comes)."""

    terms: dict[str, Tensor]
    latents: Tensor
    gradients: dict[str, Tensor]
    squared_error: Tensor
    k: int | None

    @property
    def loss(self) -> Tensor:
        """The sum of the terms."""
        return torch.stack([term.double() for term in self.terms.values()]).sum()


class Case:
    """A variant class with options, and data for it.

    Rows are sparse combinations of fixed directions around a mean, in raw units far from 1; two neighbouring rows each
    form a group (`Batch.group`). A variant whose input scale is per source gets two sources side by side.

    Args:
        cls: the class.
        options: of its constructor; `d_sae` and `k` have small defaults.
        record: who ships it.
    """

    def __init__(self, cls: type[Variant], options: dict[str, Any], record: PluginRecord) -> None:
        known = inspect.signature(cls).parameters
        small = {name: value for name, value in SMALL.items() if name in known}
        self.cls, self.record, self.options = cls, record, {**small, **options}
        self.sources = SOURCES if cls(WIDTH, WIDTH, **self.options).scale.ndim else ()

    @property
    def width(self) -> int:
        """d_in and d_out."""
        return WIDTH

    # Data --------------------------------------------------------------------------------------------------------

    def rows(self, n: int, *, seed: int = 1) -> Tensor:
        """(n, d) fp32 rows in raw units."""
        generator = torch.Generator().manual_seed(7)
        directions = torch.nn.functional.normalize(torch.randn(DIRECTIONS, WIDTH, generator=generator), dim=1)
        mean = 0.3 * torch.randn(WIDTH, generator=generator)
        generator.manual_seed(1000 + seed)
        active = torch.rand(n, DIRECTIONS, generator=generator) < 0.1
        strengths = (0.5 + torch.rand(n, DIRECTIONS, generator=generator)) * active
        noise = 0.05 * torch.randn(n, WIDTH, generator=generator)
        return RAW_SCALE * (strengths @ directions + mean + noise)

    def batch(self, n: int = 32, *, seed: int = 1, dtype: torch.dtype = torch.float64, scale: float = 1.0) -> Batch:
        """n rows, in groups of two."""
        x = (scale * self.rows(n, seed=seed)).to(dtype)
        return Batch(x, x, group=torch.arange(n) // GROUP_ROWS)

    def statistics(self, x: Tensor) -> DataStatistics:
        """Of rows (n, d), by source where there are several."""
        parts = tuple(_statistics(part) for part in x.split(self.sources or (WIDTH,), dim=1))
        both = Statistics.beside(parts)
        return DataStatistics(both, both, parts if self.sources else (), parts if self.sources else ())

    # The variant -------------------------------------------------------------------------------------------------

    def settings(self, dtype: torch.dtype = torch.float32, group: Group | None = None) -> RunSettings:
        """Of a run whose encoder product has that type."""
        return RunSettings(TOTAL_STEPS, DEAD_AFTER, dtype, group or Group(), self.sources, self.sources)

    def initialised(self, *, seed: int = 0, scale: float = 1.0, shard: Shard | None = None) -> Variant:
        """An fp32 variant as it starts on rows times `scale`; of a rank, its latents."""
        variant = self.cls(WIDTH, WIDTH, **self.options)
        if shard is not None:
            shard_(variant, shard)
        variant.bind(self.settings())
        x = scale * self.rows(1024, seed=0)
        with latents_over(shard):
            variant.initialise(self.statistics(x), x, x, torch.Generator().manual_seed(seed))
        return variant

    @cached_property
    def _moved(self) -> Variant:
        """An initialised variant with noise on every parameter, its constraints kept, and a quarter of latents dead."""
        variant = self.initialised()
        generator = torch.Generator().manual_seed(11)
        with torch.no_grad():
            for parameter in variant.parameters():
                size = 0.1 * float(parameter.square().mean().sqrt()) + 0.02
                parameter.add_(size * torch.randn(parameter.shape, generator=generator))
        variant.constrain_()
        variant.tokens_since_fired[: variant.d_sae // 4] = DEAD_AFTER
        variant.list_dead()
        return variant

    def variant(self, dtype: torch.dtype = torch.float64, *, compute: torch.dtype | None = None) -> Variant:
        """As in the middle of a run: no parameter at a special value, some latents dead.

        Args:
            dtype: of the weights.
            compute: of the encoder product; None: the same.
        """
        variant = deepcopy(self._moved).to(dtype)
        variant.bind(self.settings(compute or dtype))
        return variant

    def schedule(self, variant: Variant, step: int = STEP) -> dict[str, Any]:
        """Its scheduled values in a step of the run."""
        return {name: value(step) for name, value in variant.schedules(TOTAL_STEPS).items()}

    def stepped(self, variant: Variant, batch: Batch, step: int = STEP) -> StepOutput:
        """The output of a step; the variant's state moves."""
        return variant.step(batch, self.schedule(variant, step))

    def evaluated(
        self,
        variant: Variant,
        batch: Batch,
        *,
        pseudo: bool = True,
        changed: dict[str, Tensor] | None = None,
        step: int = STEP,
    ) -> Evaluation:
        """One step and its backward pass, on a copy of the variant.

        Args:
            variant: the variant; stays as it is.
            batch: rows.
            pseudo: whether pseudo-gradients count.
            changed: values of parameters that differ from the variant's.
            step: of the run.
        """
        copy = deepcopy(variant)
        with torch.no_grad():
            for name, value in (changed or {}).items():
                copy.get_parameter(name).copy_(value)
        if pseudo:
            out = self._backward(copy, batch, step)
        else:
            with without_pseudo_gradients():
                out = self._backward(copy, batch, step)
        gradients = {
            name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            for name, parameter in copy.named_parameters()
        }
        terms = {name: term.detach() for name, term in out.terms.items()}
        latents = out.code.to_dense().detach()
        return Evaluation(terms, latents, gradients, out.counters["squared_error"], out.code.k)

    def _backward(self, variant: Variant, batch: Batch, step: int) -> StepOutput:
        out = self.stepped(variant, batch, step)
        total = torch.stack(list(out.terms.values())).sum()
        if not total.requires_grad:
            raise CheckFailed("no loss term depends on a parameter; do not detach what `step` returns as terms")
        total.backward()
        return out

    @cached_property
    def selects_over_the_batch(self) -> bool:
        """Whether a row's latents depend on the other rows of the batch, as under batch top-k."""
        variant, batch = self.variant(), self.batch(32)
        half = Batch(batch.x[:16], batch.x[:16], group=torch.arange(16) // GROUP_ROWS)
        whole = self.evaluated(variant, batch).latents[:16]
        return not torch.equal(whole != 0, self.evaluated(variant, half).latents != 0)


def _statistics(x: Tensor) -> Statistics:
    return Moments.of(x.double().contiguous().numpy()).statistics()


def close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    """Whether no entry differs by more than `tolerance` times the largest magnitude of either (or 1e-30)."""
    a, b = a.double(), b.double()
    if not bool(torch.isfinite(a).all() and torch.isfinite(b).all()):
        return False
    bound = tolerance * max(float(a.abs().amax()), float(b.abs().amax()), 1e-30) if a.numel() else math.inf
    return bool(((a - b).abs() <= bound).all())


def distance(a: Tensor, b: Tensor) -> float:
    """The largest difference over the largest magnitude, for messages."""
    a, b = a.double(), b.double()
    return float((a - b).abs().amax() / torch.maximum(a.abs().amax(), b.abs().amax()).clamp_min(1e-30))


@contextmanager
def implementation(name: str) -> Iterator[None]:
    """With `SAEFORGE_OPS` set."""
    before = os.environ.get("SAEFORGE_OPS")
    os.environ["SAEFORGE_OPS"] = name
    try:
        yield
    finally:
        if before is None:
            del os.environ["SAEFORGE_OPS"]
        else:
            os.environ["SAEFORGE_OPS"] = before
