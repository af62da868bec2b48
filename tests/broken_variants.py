"""Variants that are wrong in one way each: what the conformance kit must catch, and say how to mend."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn

from saeforge.ops import Above, TopK, decode, encode, pick, pseudo_gradient
from saeforge.variants import SAE, Batch, DataStatistics, Recipe, ScheduleValues, StepOutput, Variant, random_unit_rows


class Right(Variant):
    """Top-k latents; the broken ones below differ in one method.

    Args:
        d_in: width of the input.
        d_out: width of the target.
        d_sae: number of latents.
        k: active latents per token.
    """

    def __init__(self, d_in: int, d_out: int, *, d_sae: int = 64, k: int = 4) -> None:
        super().__init__(d_in, d_out, d_sae=d_sae, input_scale="rms")
        self.k = k
        self.W_enc = nn.Parameter(torch.empty(d_sae, d_in))
        self.b_enc = nn.Parameter(torch.empty(d_sae))
        self.W_dec = nn.Parameter(torch.empty(d_sae, d_out))
        self.b_dec = nn.Parameter(torch.empty(d_out))

    @torch.no_grad()
    def initialise(self, stats: DataStatistics, x: Tensor, target: Tensor, generator: torch.Generator) -> None:
        self.set_scale(stats)
        self.W_dec.copy_(random_unit_rows(self.d_sae, self.d_out, generator))
        same = self.d_in == self.d_out
        self.W_enc.copy_(self.W_dec if same else random_unit_rows(self.d_sae, self.d_in, generator))
        self.b_enc.zero_()
        self.b_dec.copy_(target.mean(0) * self.target_scale)

    def schedules(self, total_steps: int) -> dict[str, Callable[[int], float]]:
        return {}

    def values(self, values: Tensor) -> Tensor:
        """What latents are made of the selected pre-activations."""
        return values.relu()

    def step(self, batch: Batch, schedule: ScheduleValues) -> StepOutput:
        x, target = self.scaled(batch)
        dtype = self.run.compute_dtype
        selected = encode(x, self.W_enc, self.b_enc, TopK(self.k), dtype=dtype)
        code = selected.with_values(self.values(selected.values))
        squared_error = (target - decode(code, self.W_dec, self.b_dec, dtype=dtype)).square().sum(1)
        return self.output({"mse": self.mean(squared_error, batch.weight)}, code, squared_error)

    def mean(self, per_row: Tensor, weight: Tensor | None) -> Tensor:
        """Over rows."""
        return self.mean_rows(per_row, weight)

    def param_groups(self) -> list[dict[str, Any]]:
        free = [self.W_enc, self.b_enc, self.b_dec]
        return [{"params": [self.W_dec], "constraint": "unit_norm"}, {"params": free, "constraint": None}]

    def recipe(self, total_steps: int) -> Recipe:
        return Recipe(lr=3e-4)

    @torch.no_grad()
    def fold(self) -> SAE:
        return self.folded(self.W_enc, self.b_enc, self.W_dec, self.b_dec, k=self.k)


@final
class OwnSum(Right):
    """A penalty that sums over the latents of one rank."""

    def step(self, batch: Batch, schedule: ScheduleValues) -> StepOutput:
        out = super().step(batch, schedule)
        code = out.code
        return StepOutput({**out.terms, "l1": 0.1 * code.values.sum() / code.n_rows}, code, out.counters)


@final
class OwnRows(Right):
    """Draws as many rows as it has latents here, which are another rank's too."""

    @torch.no_grad()
    def initialise(self, stats: DataStatistics, x: Tensor, target: Tensor, generator: torch.Generator) -> None:
        super().initialise(stats, x, target, generator)
        rows = torch.randn(self.W_dec.shape, generator=generator)
        self.W_dec.copy_(rows / rows.norm(dim=1, keepdim=True))


class _Doubled(torch.autograd.Function):
    """ReLU with twice its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.relu()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return 2 * grads[0] * (ctx.saved_tensors[0] > 0)


@final
class WrongGradient(Right):
    """Its own backward pass is off by two."""

    def values(self, values: Tensor) -> Tensor:
        return _Doubled.apply(values)


@final
class HostWait(Right):
    """It asks for a number in every step."""

    def values(self, values: Tensor) -> Tensor:
        return values.relu() if values.max().item() > -1 else values


@final
class RawUnits(Right):
    """A penalty on raw activations: another coefficient for every model."""

    def step(self, batch: Batch, schedule: ScheduleValues) -> StepOutput:
        out = super().step(batch, schedule)
        terms = {**out.terms, "norm": 1e-2 * (batch.x.to(self.W_enc.dtype) @ self.W_enc.T).square().mean()}
        return StepOutput(terms, out.code, out.counters)


@final
class LongRows(Right):
    """Declares a unit norm and starts from another."""

    @torch.no_grad()
    def initialise(self, stats: DataStatistics, x: Tensor, target: Tensor, generator: torch.Generator) -> None:
        super().initialise(stats, x, target, generator)
        self.W_dec.mul_(1.5)


@final
class OtherFold(Right):
    """Folds without its decoder's bias."""

    @torch.no_grad()
    def fold(self) -> SAE:
        return self.folded(self.W_enc, self.b_enc, self.W_dec, torch.zeros_like(self.b_dec), k=self.k)


@final
class OtherLatents(Right):
    """Folds without its encoder's bias."""

    @torch.no_grad()
    def fold(self) -> SAE:
        return self.folded(self.W_enc, torch.zeros_like(self.b_enc), self.W_dec, self.b_dec, k=self.k)


@final
class Noisy(Right):
    """Draws from the global generator in a step."""

    def values(self, values: Tensor) -> Tensor:
        return values.relu() * (torch.rand_like(values) < 0.9)


@final
class GlobalSeed(Right):
    """Starts from the global generator."""

    @torch.no_grad()
    def initialise(self, stats: DataStatistics, x: Tensor, target: Tensor, generator: torch.Generator) -> None:
        super().initialise(stats, x, target, generator)
        self.b_enc.copy_(0.1 * torch.randn_like(self.b_enc))


@final
class Forgetful(Right):
    """Counts steps in a plain attribute, which no checkpoint holds."""

    calls = 0

    def mean(self, per_row: Tensor, weight: Tensor | None) -> Tensor:
        self.calls += 1
        return self.mean_rows(per_row, weight) * self.calls


@final
class OwnMean(Right):
    """Takes means over its own rows, whatever their weights."""

    def mean(self, per_row: Tensor, weight: Tensor | None) -> Tensor:
        return per_row.mean()


@final
class OwnWeights(Right):
    """Normalises weights over its own rows."""

    def mean(self, per_row: Tensor, weight: Tensor | None) -> Tensor:
        return per_row.mean() if weight is None else (per_row * weight).sum() / weight.sum()


@final
class OwnProduct(Right):
    """Coarse rounding in a product of its own where the engine is the fast one."""

    numbers: ClassVar[Any] = itertools.count()

    def values(self, values: Tensor) -> Tensor:
        return values.relu() * (1 + 1e-3 * (next(self.numbers) % 2))


@final
class Untrained(Right):
    """Leaves a parameter out of its groups."""

    def param_groups(self) -> list[dict[str, Any]]:
        return [{"params": [self.W_enc, self.W_dec, self.b_dec], "constraint": None}]


@final
class WrongType(Right):
    """An option whose annotation is not its type.

    Args:
        d_in: width of the input.
        d_out: width of the target.
        d_sae: number of latents.
        rate: a share.
    """

    def __init__(self, d_in: int, d_out: int, *, d_sae: int = 64, rate: str = 0.5) -> None:  # type: ignore[assignment]
        super().__init__(d_in, d_out, d_sae=d_sae, k=4)
        self.rate = rate


@final
class Overflowing(Right):
    """Computes its latents in bfloat16 from a difference that bfloat16 does not have."""

    def values(self, values: Tensor) -> Tensor:
        if self.run.compute_dtype != torch.bfloat16:
            return values.relu()
        return ((values.to(torch.bfloat16) + 64) - 64).to(values.dtype).relu()


@final
class Unlearning(Right):
    """Its loss rises with what it reconstructs."""

    def mean(self, per_row: Tensor, weight: Tensor | None) -> Tensor:
        return -self.mean_rows(per_row, weight)


class RightJump(Right):
    """A JumpReLU with the pseudo-gradient of Rajamanoharan et al. 2024, times `strength`."""

    bandwidth = 0.05
    strength = 1.0
    sparsity = 0.05

    def __init__(self, d_in: int, d_out: int, *, d_sae: int = 64) -> None:
        super().__init__(d_in, d_out, d_sae=d_sae)
        self.log_threshold = nn.Parameter(torch.zeros(d_sae))

    @torch.no_grad()
    def initialise(self, stats: DataStatistics, x: Tensor, target: Tensor, generator: torch.Generator) -> None:
        super().initialise(stats, x, target, generator)
        self.log_threshold.fill_(-2.5)

    def step(self, batch: Batch, schedule: ScheduleValues) -> StepOutput:
        x, target = self.scaled(batch)
        dtype, theta = self.run.compute_dtype, self.log_threshold.exp()
        near = encode(x, self.W_enc, self.b_enc, Above(theta.detach() - self.bandwidth / 2), dtype=dtype)
        own = pick(theta, near)
        distance = near.values.detach() - own.detach()
        active = (distance > 0).to(own.dtype)
        density = self.strength * (distance.abs() < self.bandwidth / 2).to(own.dtype) / self.bandwidth
        code = near.with_values(near.values * active + pseudo_gradient(-own.detach() * density * own))
        squared_error = (target - decode(code, self.W_dec, self.b_dec, dtype=dtype)).square().sum(1)
        steps = active + pseudo_gradient(-density * own)
        terms = {
            "mse": self.mean_rows(squared_error, batch.weight),
            "l0": self.sparsity * self.mean_entries(steps, code, batch.weight),
        }
        return self.output(terms, code, squared_error)

    def param_groups(self) -> list[dict[str, Any]]:
        unit, free = super().param_groups()
        return [unit, {**free, "params": [*free["params"], self.log_threshold]}]

    @torch.no_grad()
    def fold(self) -> SAE:
        return self.folded(self.W_enc, self.b_enc, self.W_dec, self.b_dec, threshold=self.log_threshold.exp())


@final
class HalfJump(RightJump):
    """Half of the pseudo-gradient."""

    strength = 0.5


@final
class NoWindow(RightJump):
    """Does not say how wide its window is."""

    def __init__(self, d_in: int, d_out: int, *, d_sae: int = 64) -> None:
        super().__init__(d_in, d_out, d_sae=d_sae)
        self.width, self.bandwidth = self.bandwidth, 0.0

    def step(self, batch: Batch, schedule: ScheduleValues) -> StepOutput:
        self.bandwidth = self.width
        try:
            return super().step(batch, schedule)
        finally:
            self.bandwidth = 0.0


class WrongBase:
    """No variant at all."""

    def __init__(self, d_in: int, d_out: int) -> None:
        self.d_in, self.d_out = d_in, d_out


class Untyped(Right):
    """An argument without a type."""

    def __init__(self, d_in: int, d_out: int, k=3) -> None:  # type: ignore[no-untyped-def]
        super().__init__(d_in, d_out, k=k)
