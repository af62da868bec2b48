"""Gradients: every implementation of the sparse engine gives the same, and finite differences agree."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from saeforge.data.batch import Batch
from saeforge.ops import native
from saeforge.ops.marks import recorded_stops, replayed_stops
from saeforge.testing.case import Case, Evaluation, close, distance, implementation
from saeforge.testing.outcome import CheckFailed
from saeforge.variants import Variant

#: float64 has 1e-16; sums of some thousand products lose three digits, cancellation two or three more.
DENSE_F64 = 1e-9
#: float32 has 6e-8: the same.
DENSE_F32 = 3e-4
#: of a gradient's norm. Central differences with steps of 1e-5 of a weight are right to about 1e-8.
FINITE_DIFFERENCE = 1e-5
RANDOM_DIRECTIONS = 3


def sparse_dense(case: Case) -> None:
    """Terms, latents and every gradient are those of dense products, in every implementation of the engine."""
    fast = ["stock", *(["native"] if _native() else [])]
    for dtype, bound, seeds in ((torch.float64, DENSE_F64, (1,)), (torch.float32, DENSE_F32, (1, 2, 3))):
        for name in fast:
            # In fp32 two pre-activations may tie but for rounding, and other latents be chosen: then other rows.
            for seed in seeds:
                variant, batch = case.variant(dtype), case.batch(seed=seed, dtype=dtype)
                with implementation("reference"):
                    dense = case.evaluated(variant, batch)
                with implementation(name):
                    sparse = case.evaluated(variant, batch)
                if torch.equal(dense.latents != 0, sparse.latents != 0):
                    break
            _same(dense, sparse, bound, f"SAEFORGE_OPS={name} in {str(dtype).removeprefix('torch.')}")


def _native() -> bool:
    with implementation("auto"):
        return native.wanted()


def _same(dense: Evaluation, sparse: Evaluation, bound: float, where: str) -> None:
    advice = "compute on code.values with saeforge.ops (encode, decode, pick), not on a product of your own"
    if not close(dense.latents, sparse.latents, bound):
        raise CheckFailed(f"latents under {where} differ from dense products; {advice}")
    for kind, a, b in (("term", dense.terms, sparse.terms), ("the gradient of", dense.gradients, sparse.gradients)):
        for name in a:
            if not close(a[name], b[name], bound):
                raise CheckFailed(
                    f"{kind} {name} under {where} differs from dense products by {distance(a[name], b[name]):.2g} "
                    f"of its size; {advice}"
                )


def finite_differences(case: Case) -> None:
    """In float64 each parameter's gradient is the derivative of the loss, along itself and random directions.

    What `stop_gradient` marks stays fixed, pseudo-gradients are left out, and steps over which another set of latents
    is active are not compared. Kinks inside the loss that the code does not show are improbable: a fault must
    show on two different batches.
    """
    first = _faults(case, case.batch(24, seed=3))
    if first and (second := _faults(case, case.batch(24, seed=4))):
        raise CheckFailed(second[0])


def _faults(case: Case, batch: Batch) -> list[str]:
    variant = case.variant()
    with recorded_stops() as stops:
        centre = case.evaluated(variant, batch, pseudo=False)
    whole = float(torch.cat([gradient.flatten() for gradient in centre.gradients.values()]).norm())
    generator = torch.Generator().manual_seed(5)
    faults = []
    for name, parameter in variant.named_parameters():
        gradient, compared = centre.gradients[name], 0
        for direction in _directions(gradient, generator):
            found = _slope(case, variant, batch, stops, centre, name, direction)
            if found is None:
                continue
            compared += 1
            slope, noise = found
            claimed = float((gradient * direction).sum())
            if not abs(slope - claimed) <= FINITE_DIFFERENCE * float(gradient.norm()) + 1e-8 * whole + noise:
                faults.append(
                    f"the gradient of {name} along a direction is {claimed:.6g}, but the loss changes by {slope:.6g}; "
                    "mend the backward pass, or mark what is meant: stop_gradient(...) for what is held fixed, "
                    "pseudo_gradient(...) for a straight-through estimate"
                )
                break
        if not compared:
            faults.append(
                f"every small step of {name} changes which latents are active; the choice should depend on "
                f"{tuple(parameter.shape)} numbers continuously"
            )
    return faults


def _directions(gradient: Tensor, generator: torch.Generator) -> Iterator[Tensor]:
    """Of norm 1."""
    if float(gradient.norm()) > 0:
        yield gradient / gradient.norm()
    for _ in range(RANDOM_DIRECTIONS):
        direction = torch.randn(gradient.shape, generator=generator, dtype=gradient.dtype)
        yield direction / direction.norm()


def _slope(
    case: Case, variant: Variant, batch: Batch, stops: Any, centre: Evaluation, name: str, direction: Tensor
) -> tuple[float, float] | None:
    """The central difference and its rounding error; None where no step keeps the same latents active."""
    at = variant.get_parameter(name).detach()
    size = max(float(at.square().mean().sqrt()), 0.01) * at.numel() ** 0.5
    for h in (1e-5 * size, 1e-6 * size, 1e-7 * size):
        ends = []
        for sign in (1.0, -1.0):
            with replayed_stops(stops):
                changed = {name: at + sign * h * direction}
                ends.append(case.evaluated(variant, batch, pseudo=False, changed=changed))
        if all(torch.equal(end.latents != 0, centre.latents != 0) for end in ends):
            plus, minus = (float(end.loss) for end in ends)
            largest = max(abs(float(term)) for term in centre.terms.values())
            return (plus - minus) / (2 * h), 1e-14 * largest / h
    return None
