"""The Triton kernels against float64, on a GPU; and in Triton's interpreter on the CPU, with smaller shapes.

Triton decides at its import whether it interprets, so `test_triton_interpreter.py` runs this file in its own process.
"""

from __future__ import annotations

import importlib.util
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from saeforge.ops import SparseCode, gpu, stock
from tests.interpreter import mend, poison

INTERPRETED = gpu.interpreted()
DEVICE = "cpu" if INTERPRETED else "cuda"
if INTERPRETED and importlib.util.find_spec("triton"):
    mend()
pytestmark = (
    [] if INTERPRETED else [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
)
examples = settings(
    max_examples=12 if INTERPRETED else 60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
#: Wide enough that a row takes several slices of columns, and programs.
WIDTH = 600 if INTERPRETED else 1200
#: Of rows to select from. Each width may compile a kernel anew on a GPU: only some there.
WIDTHS = st.integers(1, 90) if INTERPRETED else st.sampled_from([1, 2, 17, 90, 1000, 4099, 9008])
DTYPES = st.sampled_from([torch.float32, torch.bfloat16])
SEEDS = st.integers(0, 2**16)


@pytest.fixture(autouse=True)
def _triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAEFORGE_OPS", "triton")
    poison(monkeypatch)


@pytest.fixture
def kernels() -> ModuleType:
    return gpu.kernels()


def random_code(seed: int, n_rows: int, d_sae: int, share: float, *, k: int | None = None, tail: int = 0) -> SparseCode:
    """Rows of different length, some empty, or of k entries; `tail` entries of rubbish behind."""
    generator = torch.Generator().manual_seed(seed)
    chance = torch.rand(n_rows, d_sae, generator=generator)
    if k is None:
        mask = chance < share * (torch.rand(n_rows, 1, generator=generator) < 0.8)
    else:
        mask = torch.zeros(n_rows, d_sae, dtype=torch.bool).scatter(1, chance.topk(k, dim=1).indices, True)
    indices = mask.nonzero(as_tuple=True)[1]
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), mask.sum(1).cumsum(0)])
    values = torch.cat([torch.randn(len(indices), generator=generator), torch.full((tail,), float("nan"))])
    indices = torch.cat([indices, torch.full((tail,), 10**9)])
    return SparseCode(values.to(DEVICE), indices.to(DEVICE), offsets.to(DEVICE), d_sae, k)


def check_products(kernels: ModuleType, code: SparseCode, d: int, dtype: torch.dtype) -> None:
    values = code.values[: code.nnz]
    table, rows = torch.randn(code.d_sae, d, device=DEVICE).to(dtype), torch.randn(code.n_rows, d, device=DEVICE)
    dense = torch.zeros(code.n_rows, code.d_sae, dtype=torch.float64, device=DEVICE)
    at = (code.rows(), code.indices[: code.nnz])
    dense[at] = values.double()
    # fp32 sums of n terms: their error grows like n at worst, and terms are of order 1.
    close = {"rtol": 1e-5, "atol": 2e-6 * (d + code.nnz) ** 0.5}
    out = kernels.gather_sum(code, values, table)
    torch.testing.assert_close(out.double(), dense @ table.double(), **close)
    assert torch.equal(out, kernels.gather_sum(code, values, table))
    dots = kernels.row_dots(code, rows, table)
    torch.testing.assert_close(dots.double(), (rows.double() @ table.double().T)[at], **close)
    low = rows.to(dtype)
    grad = kernels.scatter_outer(code, values, low)
    torch.testing.assert_close(grad.double(), dense.T @ low.double(), **close)
    assert torch.equal(grad, kernels.scatter_outer(code, values, low))
    assert all(x.dtype == torch.float32 and x.is_contiguous() for x in (out, dots, grad))


@examples
@given(
    n_rows=st.integers(0, 6),
    d_sae=st.integers(1, 40),
    d=st.sampled_from([1, 5, 64, WIDTH]),
    share=st.sampled_from([0.0, 0.1, 0.6, 1.0]),
    tail=st.integers(0, 3),
    dtype=DTYPES,
    seed=SEEDS,
)
@example(n_rows=3, d_sae=30, d=WIDTH, share=0.5, tail=2, dtype=torch.bfloat16, seed=1)
def test_products_of_ragged_codes_equal_float64(
    kernels: ModuleType, n_rows: int, d_sae: int, d: int, share: float, tail: int, dtype: torch.dtype, seed: int
) -> None:
    check_products(kernels, random_code(seed, n_rows, d_sae, share, tail=tail), d, dtype)


@pytest.mark.parametrize("k", [1, 7, 20])
def test_products_of_codes_with_constant_k(kernels: ModuleType, k: int) -> None:
    n_rows, d_sae = (5, 20) if INTERPRETED else (512, 4096)
    check_products(kernels, random_code(3, n_rows, d_sae, 0, k=k), WIDTH, torch.bfloat16)


@pytest.mark.parametrize("n_rows", [7, 16, 40])
def test_a_latent_active_in_most_rows_is_summed_by_blocks(
    kernels: ModuleType, n_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    import saeforge.ops.triton_kernels.products as products

    if INTERPRETED:
        monkeypatch.setattr(products, "BLOCK_ENTRIES", 8)
    else:
        n_rows *= 100
    code = random_code(n_rows, n_rows, 9, 0.2)
    matrix = code.to_dense()
    matrix[:, 4] = torch.randn(n_rows, device=DEVICE)
    check_products(kernels, SparseCode.from_dense(matrix), 5, torch.float32)


def check_top_k(kernels: ModuleType, pre: Tensor, k: int, **options: Any) -> None:
    values, indices = kernels.top_k(pre, k, **options)
    # In order: NaN before every number, both zeros equal, the lowest index first among equals.
    comparable = torch.nan_to_num(pre.double(), nan=1e308, posinf=1e307, neginf=-1e307)
    expected = torch.sort(comparable, dim=1, descending=True, stable=True).indices[:, :k].sort(dim=1).values
    assert torch.equal(indices, expected)
    torch.testing.assert_close(values, pre.gather(1, indices).float(), rtol=0, atol=0, equal_nan=True)


@examples
@given(
    n_rows=st.integers(0, 4),
    n=WIDTHS,
    k_share=st.floats(0, 1),
    levels=st.sampled_from([1, 3, 10**4]),
    odd=st.sampled_from([0.0, 0.2]),
    tile=st.sampled_from([8, 2048]),
    dtype=DTYPES,
    seed=SEEDS,
)
@example(n_rows=2, n=90, k_share=0.04, levels=10**4, odd=0.0, tile=8, dtype=torch.float32, seed=1)
@example(n_rows=2, n=90, k_share=0.04, levels=10**4, odd=0.0, tile=8, dtype=torch.bfloat16, seed=1)
@example(n_rows=2, n=90, k_share=1.0, levels=3, odd=0.2, tile=8, dtype=torch.float32, seed=1)
def test_top_k_takes_the_largest_and_among_equals_the_lowest_index(
    kernels: ModuleType, n_rows: int, n: int, k_share: float, levels: int, odd: float, tile: int, dtype: torch.dtype,
    seed: int,
) -> None:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    pre = torch.randint(-levels, levels, (n_rows, n), generator=generator).float()
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 1e-40, -1e-40])
    drawn = special[torch.randint(0, len(special), pre.shape, generator=generator)]
    pre = torch.where(torch.rand(pre.shape, generator=generator) < odd, drawn, pre).to(dtype).to(DEVICE)
    check_top_k(kernels, pre, max(1, round(k_share * n)), tile=tile)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_with_more_candidates_than_there_is_room_for(kernels: ModuleType, dtype: torch.dtype) -> None:
    n = 90 if INTERPRETED else 9000
    pre = torch.zeros(4, n)
    pre[1, n - 20 :] = 1
    pre[2] = torch.arange(n) % 2
    pre[3, ::2] = -0.0
    for k in (1, 5, 40):
        check_top_k(kernels, pre.to(dtype).to(DEVICE), k, tile=16)


@pytest.mark.skipif(INTERPRETED, reason="takes a GPU")
@pytest.mark.parametrize(
    ("rows", "n", "k"), [(300, 65536, 100), (8, 1 << 20, 512), (64, 65536, 4096), (64, 40000, 16384)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_top_k_at_the_sizes_of_training(kernels: ModuleType, rows: int, n: int, k: int, dtype: torch.dtype) -> None:
    check_top_k(kernels, torch.randn(rows, n, device=DEVICE).to(dtype), k)


@examples
@given(
    n_rows=st.integers(0, 5),
    n=WIDTHS,
    per_latent=st.booleans(),
    at=st.sampled_from([-5.0, 0.0, 1.0, 9.0]),
    dtype=DTYPES,
    seed=SEEDS,
)
@example(n_rows=2, n=1100, per_latent=True, at=0.0, dtype=torch.bfloat16, seed=0)
def test_above_takes_all_that_exceeds_the_threshold(
    kernels: ModuleType, n_rows: int, n: int, per_latent: bool, at: float, dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    pre = torch.randn(n_rows, n, generator=generator).to(dtype).to(DEVICE)
    pre[:, ::7] = float("nan")
    pre[:, 1::7] = 0
    threshold = torch.full((n if per_latent else 1,), at, device=DEVICE)
    threshold[0] = 0
    values, indices, counts = kernels.above(pre, threshold)
    expected = stock.above(pre, threshold)
    torch.testing.assert_close(values, expected[0].float(), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(indices, expected[1])
    assert torch.equal(counts, expected[2])
