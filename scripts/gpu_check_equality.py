"""The Triton kernels at the shapes of training, against float64, on poisoned memory; part of gpu_check.py."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from saeforge.ops import SparseCode, gpu, shadow
from saeforge.optim import RowAdam


class Shape(NamedTuple):
    """Of one step."""

    d: int
    d_sae: int
    k: int
    batch: int


SHAPES = {
    "A": Shape(768, 24576, 32, 4096),
    "B": Shape(4096, 65536, 100, 8192),
    "C": Shape(2304, 65536, 64, 4096),
    "tiny": Shape(16, 48, 4, 12),
}
#: Rows, and latents, whose sums are computed in float64.
SAMPLE = 64


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Memory that a kernel should write begins as NaN, or as a large number."""
    empty = torch.empty

    def filled(*shape: Any, **kwargs: Any) -> Tensor:
        made = empty(*shape, **kwargs)
        return made.fill_(float("nan") if made.dtype.is_floating_point else 2**30)

    torch.empty = filled  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.empty = empty  # type: ignore[assignment]


def _error(ours: Tensor, truth: Tensor) -> float:
    """The largest error, relative to the largest value."""
    return float((ours.double() - truth).abs().max() / truth.abs().max().clamp_min(1e-30))


def check(name: str, device: str) -> dict[str, float]:
    """Relative errors by kernel and type; raises AssertionError where one is too large, or a choice differs."""
    if device == "cpu":
        from tests.interpreter import mend

        mend()
    shape, found = SHAPES[name], {}
    torch.manual_seed(0)
    for dtype in (torch.bfloat16, torch.float32):
        label = str(dtype).removeprefix("torch.")
        with poisoned():
            code = _check_top_k(shape, device, dtype)
            for kernel, error in _check_products(shape, device, dtype, code).items():
                found[f"{kernel}, {label}"] = error
                # Sums of at most some thousand fp32 products, each exact to 6e-8.
                assert error < 2e-5, f"{kernel}, {label}: relative error {error:.2e}"
    with poisoned():
        found["RowAdam"] = _check_adam(shape, device)
    assert found["RowAdam"] < 1e-5, f"RowAdam: relative error {found['RowAdam']:.2e}"
    return found


def _check_top_k(shape: Shape, device: str, dtype: torch.dtype) -> SparseCode:
    kernels, (_, d_sae, k, batch) = gpu.kernels(), shape
    pre = torch.randn(batch, d_sae, device=device).to(dtype)
    pre[0] = 0  # one value: all tie
    pre[1, ::3] = float("nan")
    pre[2:, 7] = 9.0  # one latent is active everywhere
    values, indices = kernels.top_k(pre, k)
    again = kernels.top_k(pre, k)
    assert torch.equal(indices, again[1]), "top_k: two runs differ"
    some = torch.cat([torch.arange(4), torch.randint(batch, (4 * SAMPLE,))]).clamp_max(batch - 1).to(device)
    truth = torch.sort(pre[some].float(), dim=1, descending=True, stable=True).indices[:, :k].sort(dim=1).values
    assert torch.equal(indices[some], truth), "top_k: other latents than a stable sort"
    torch.testing.assert_close(values, pre.gather(1, indices).float(), rtol=0, atol=0, equal_nan=True)
    numbers = torch.topk(pre[2:].float(), k, dim=1).values
    assert torch.equal(values[2:].sort(dim=1, descending=True).values, numbers), "top_k: other values than torch's"
    offsets = torch.arange(batch + 1, device=device) * k
    return SparseCode(torch.randn(batch * k, device=device), indices.flatten(), offsets, d_sae, k)


def _check_products(shape: Shape, device: str, dtype: torch.dtype, code: SparseCode) -> dict[str, float]:
    kernels, (d, d_sae, k, batch) = gpu.kernels(), shape
    table, rows = torch.randn(d_sae, d, device=device).to(dtype), torch.randn(batch, d, device=device)
    values, indices = code.values.view(batch, k), code.indices.view(batch, k)
    some = torch.randint(batch, (SAMPLE,), device=device)
    gathered = table[indices[some]].double()
    found = {}
    out = kernels.gather_sum(code, code.values, table)
    assert bool(out.isfinite().all()), "gather_sum: not everything was written"
    found["gather_sum"] = _error(out[some], (values[some].double()[:, :, None] * gathered).sum(1))
    dots = kernels.row_dots(code, rows, table).view(batch, k)
    assert bool(dots.isfinite().all()), "row_dots: not everything was written"
    found["row_dots"] = _error(dots[some], (gathered * rows[some].double()[:, None]).sum(2))
    low = rows.to(dtype)
    grad = kernels.scatter_outer(code, code.values, low)
    assert bool(grad.isfinite().all()), "scatter_outer: not everything was written"
    assert torch.equal(grad, kernels.scatter_outer(code, code.values, low)), "scatter_outer: two runs differ"
    latents = torch.cat([torch.arange(8), torch.randint(d_sae, (SAMPLE,))]).to(device)
    matrix = torch.zeros(len(latents), batch, dtype=torch.float64, device=device)
    for at, latent in enumerate(latents.tolist()):
        hit = code.indices == latent
        matrix[at].index_add_(0, code.rows()[hit], code.values[hit].double())
    found["scatter_outer"] = _error(grad[latents], matrix @ low.double())
    return found


def _check_adam(shape: Shape, device: str) -> float:
    """Three steps of the fused form against the separate operations, clipped and projected; the largest error."""
    asked = os.environ.get("SAEFORGE_OPS", "auto")
    start = torch.nn.functional.normalize(torch.randn(shape.d_sae, shape.d, device=device), dim=1)
    after = []
    for mode in ("triton", "stock"):
        os.environ["SAEFORGE_OPS"] = mode
        row, free = nn.Parameter(start.clone()), nn.Parameter(start[: len(start) // 4].clone())
        copy = shadow.of(row)
        groups: list[dict[str, Any]] = [{"params": [row], "constraint": "unit_norm"}, {"params": [free]}]
        optimizer = RowAdam(groups, lr=1e-3)
        for step in range(3):
            generator = torch.Generator(device).manual_seed(step)
            for p in (row, free):
                p.grad = torch.randn(p.shape, device=device, generator=generator)
            optimizer.step()
        if mode == "triton":
            assert torch.equal(copy.rounded, row.detach().bfloat16()), "RowAdam: its bfloat16 copy is another"
        after.append((row.detach(), free.detach()))
    os.environ["SAEFORGE_OPS"] = asked
    return max(_error(ours, theirs.double()) for ours, theirs in zip(*after, strict=True))
