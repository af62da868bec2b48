"""CPU kernels in C++, as functions on tensors. Values and results are fp32; tables may be fp32 or bfloat16.

Every pointer handed over is checked here: type, device, contiguity. The kernels check nothing.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from saeforge.errors import ConfigError
from saeforge.ops.native import pool
from saeforge.ops.native.build import library
from saeforge.ops.wish import wish

__all__ = [
    "above",
    "by_latent",
    "collect",
    "gather_sum",
    "residual",
    "residual_grad",
    "round_rows",
    "row_adam",
    "row_dots",
    "row_norms",
    "row_sum",
    "scatter_outer",
    "screened_above",
    "screened_count",
    "screened_top_k",
    "spread",
    "takes",
    "top_k",
    "wanted",
]

_FLOATS = (torch.float32, torch.bfloat16)


def wanted() -> bool:
    """Whether this machine has the kernels, and the environment does not ask for others.

    Raises:
        ConfigError: SAEFORGE_OPS asks for them, and they cannot be had.
    """
    asked = wish()
    if asked == "native" and library() is None:
        raise ConfigError("SAEFORGE_OPS=native, but the kernels do not compile here; the log says why")
    return asked in ("auto", "native") and library() is not None


def takes(*tensors: Tensor) -> bool:
    """Whether the kernels are wanted and can work on these: on the CPU, fp32 or bfloat16."""
    return all(tensor.device.type == "cpu" and tensor.dtype in _FLOATS for tensor in tensors) and wanted()


def _call(name: str, *arguments: Tensor | int | float | None) -> None:
    """Tensors become pointers, ints int64 and floats float; the number of threads comes last."""
    found = library()
    assert found is not None
    given: list[object] = []
    for argument in arguments:
        if argument is None:
            given.append(ctypes.c_void_p(0))
        elif isinstance(argument, Tensor):
            if argument.device.type != "cpu" or not argument.is_contiguous():
                raise ValueError(f"{name}: a kernel needs contiguous tensors on the CPU")
            given.append(ctypes.c_void_p(argument.data_ptr()))
        elif isinstance(argument, bool):
            given.append(ctypes.c_int(argument))
        elif isinstance(argument, int):
            given.append(ctypes.c_int64(argument))
        else:
            given.append(ctypes.c_float(argument))
    getattr(found, f"saeforge_{name}")(*given, ctypes.c_int(torch.get_num_threads()))


def _float(tensor: Tensor, name: str) -> Tensor:
    if tensor.dtype != torch.float32:
        raise ValueError(f"{name}: expected float32, got {tensor.dtype}")
    return tensor.detach().contiguous()


def _table(tensor: Tensor, name: str) -> tuple[Tensor, bool]:
    if tensor.dtype not in _FLOATS:
        raise ValueError(f"{name}: expected float32 or bfloat16, got {tensor.dtype}")
    return tensor.detach().contiguous(), tensor.dtype == torch.bfloat16


# Selection -------------------------------------------------------------------------------------------------------


def top_k(pre: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """values (B, k) fp32, indices (B, k) ascending: the k largest of each row of (B, n), ties to the lowest index."""
    pre, is_bf16 = _table(pre, "top_k")
    values = torch.empty(len(pre), k)
    indices = torch.empty(len(pre), k, dtype=torch.int64)
    _call("top_k", pre, is_bf16, *pre.shape, k, values, indices)
    return values, indices


def above(pre: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """values (nnz,) fp32, indices (nnz,), counts (B,) of the entries above the threshold, (1,) or one a latent."""
    pre, is_bf16 = _table(pre, "above")
    threshold, stride = _float(threshold, "above"), int(threshold.numel() > 1)
    counts = torch.empty(len(pre), dtype=torch.int64)
    _call("count_above", pre, is_bf16, *pre.shape, threshold, stride, counts)
    offsets = _offsets(counts)
    values = torch.empty(int(offsets[-1]))
    indices = torch.empty(len(values), dtype=torch.int64)
    _call("take_above", pre, is_bf16, *pre.shape, threshold, stride, offsets, values, indices)
    return values, indices, counts


def _offsets(counts: Tensor) -> Tensor:
    offsets = torch.zeros(len(counts) + 1, dtype=torch.int64)
    torch.cumsum(counts, 0, out=offsets[1:])
    return offsets


def screened_top_k(
    pre: Tensor, margin: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, k: int
) -> tuple[Tensor, Tensor]:
    """As `top_k`, of `x @ weight.T + bias` in fp32; pre (B, n) bfloat16 is within margin (B,) of it, and rounded."""
    values = torch.empty(len(pre), k)
    indices = torch.empty(len(pre), k, dtype=torch.int64)
    rows = (_float(x, "x"), _float(weight, "weight"), None if bias is None else _float(bias, "bias"))
    _call("screened_top_k", pre, *pre.shape, k, _float(margin, "margin"), *rows, weight.shape[1], values, indices)
    return values, indices


def screened_count(pre: Tensor, margin: Tensor, threshold: Tensor) -> Tensor:
    """(B,): how many entries of each row may lie above the threshold."""
    counts = torch.empty(len(pre), dtype=torch.int64)
    stride = int(threshold.numel() > 1)
    _call("screened_count", pre, *pre.shape, _float(margin, "margin"), _float(threshold, "above"), stride, counts)
    return counts


def screened_above(
    pre: Tensor,
    margin: Tensor,
    threshold: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    candidates: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `above`, of `x @ weight.T + bias` in fp32. candidates: (B,) from `screened_count`."""
    offsets = _offsets(candidates)
    room = int(offsets[-1])
    values, indices, counts = torch.empty(room), torch.empty(room, dtype=torch.int64), torch.empty_like(candidates)
    rows = (_float(x, "x"), _float(weight, "weight"), None if bias is None else _float(bias, "bias"))
    stride, d = int(threshold.numel() > 1), weight.shape[1]
    bounds = (_float(margin, "margin"), _float(threshold, "above"), stride)
    _call("screened_above", pre, *pre.shape, *bounds, *rows, d, offsets, values, indices, counts)
    filled = torch.arange(room) < torch.repeat_interleave(offsets[:-1] + counts, candidates, output_size=room)
    return values[filled], indices[filled], counts


def round_rows(weight: Tensor, rounded: Tensor, residual: Tensor, norm: Tensor) -> None:
    """weight (n, d) as bfloat16 into `rounded`; norms of what the rounding took, and of the rows, into (n,) each."""
    _call("round_rows", *weight.shape, _float(weight, "weight"), rounded, residual, norm)


# Products --------------------------------------------------------------------------------------------------------


def gather_sum(indices: Tensor, offsets: Tensor, values: Tensor, table: Tensor) -> Tensor:
    """(B, d): sum of the rows of `table` (n, d) at a row's indices, times its values."""
    table, is_bf16 = _table(table, "gather_sum")
    out = torch.empty(len(offsets) - 1, table.shape[1])
    values = _float(values, "values")
    _call("gather_sum", len(out), indices, offsets, values, table, is_bf16, table.shape[1], out)
    return out


def row_dots(indices: Tensor, offsets: Tensor, rows: Tensor, table: Tensor) -> Tensor:
    """(nnz,): the dot product of a row of `rows` (B, d) with each of the rows of `table` at its indices."""
    table, is_bf16 = _table(table, "row_dots")
    out = torch.empty(len(indices))
    rows = _float(rows, "rows")
    _call("row_dots", len(offsets) - 1, indices, offsets, rows, table, is_bf16, table.shape[1], out)
    return out


def scatter_outer(order: Tensor, rows: Tensor, offsets: Tensor, values: Tensor, table: Tensor) -> Tensor:
    """(n, d): for each latent, the sum of the rows of `table` (B, d) in which it is active, times its values.

    order, rows, offsets: the transposed pattern, from `by_latent`.
    """
    table, is_bf16 = _table(table, "scatter_outer")
    out = pool.empty(len(offsets) - 1, table.shape[1])
    values = _float(values, "values")
    _call("scatter_outer", len(out), order, rows, offsets, values, table, is_bf16, table.shape[1], out)
    return out


def by_latent(indices: Tensor, offsets: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """order (nnz,), rows (nnz,), offsets (n + 1,): the entries sorted by latent, then by row."""
    order, rows = torch.empty_like(indices), torch.empty_like(indices)
    latent_offsets = torch.empty(n + 1, dtype=torch.int64)
    _call("by_latent", len(offsets) - 1, indices, offsets, n, order, rows, latent_offsets)
    return order, rows, latent_offsets


def spread(indices: Tensor, offsets: Tensor, values: Tensor, dense: Tensor) -> None:
    """The rows of a code as the rows of `dense` (B, n), fp32 or bfloat16. Offsets count from the first row's entry."""
    _, is_bf16 = _table(dense, "spread")
    _call("spread", len(dense), indices, offsets, _float(values, "values"), dense.shape[1], dense, is_bf16)


def collect(indices: Tensor, offsets: Tensor, dense: Tensor) -> Tensor:
    """(nnz,) fp32: the entries of `dense` (B, n) at a code's places."""
    dense, is_bf16 = _table(dense, "collect")
    out = torch.empty(len(indices))
    _call("collect", len(dense), indices, offsets, dense, is_bf16, dense.shape[1], out)
    return out


# Dense rows -------------------------------------------------------------------------------------------------------


def residual(target: Tensor, rebuilt: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """error (B, d) = target - (rebuilt + bias), all fp32, and the square of its norm by row (B,)."""
    rows = tuple(_float(tensor, "residual") for tensor in (target, rebuilt, bias))
    error, squares = torch.empty_like(rows[0]), torch.empty(len(target))
    _call("residual", *target.shape, *rows, error, squares)
    return error, squares


def residual_grad(error: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """(B, d) -2 weight[b] error[b], and its sum over rows (d,)."""
    grad, sums = torch.empty_like(error), torch.empty(error.shape[1])
    _call("residual_grad", *error.shape, _float(error, "error"), _float(weight, "weight"), grad, sums)
    return grad, sums


def row_sum(weight: Tensor, table: Tensor) -> Tensor:
    """(d,): the sum of the rows of `table` (n, d), times a weight (n,) each."""
    out = torch.empty(table.shape[1])
    _call("row_sum", *table.shape, _float(weight, "weight"), _float(table, "table"), out)
    return out


# Optimizer -------------------------------------------------------------------------------------------------------


def row_norms(grad: Tensor, rows: Tensor, constrained: bool) -> tuple[Tensor, Tensor | None]:
    """Squares (n,) fp64 of the gradient's rows, projected if `constrained`; and then the dots (n,) with the rows."""
    squares = torch.empty(len(grad), dtype=torch.float64)
    dots = torch.empty(len(grad)) if constrained else None
    _call("row_norms", *grad.shape, _float(grad, "grad"), _float(rows, "rows"), constrained, squares, dots)
    return squares, dots


def row_adam(
    rows: Tensor,
    grad: Tensor,
    mean: Tensor,
    square: Tensor,
    dots: Tensor | None,
    *,
    clip: float,
    betas: tuple[float, float],
    eps: float,
    step_size: float,
    root: float,
    rounded: tuple[Tensor, Tensor, Tensor] | None = None,
) -> None:
    """Adam in place on rows (n, d), after projection if there are dots; renormalises those rows. See row_adam.cpp."""
    scalars = (clip, *betas, eps, step_size, root)
    shadow = rounded or (None, None, None)
    _call("row_adam", *rows.shape, rows, _float(grad, "grad"), mean, square, dots, *map(float, scalars), *shadow)
