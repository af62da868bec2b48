"""The C++ kernels: exact choices, right sums, the same bits on one thread and on many, and a fallback that says so."""

from __future__ import annotations

import gc
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from saeforge.errors import ConfigError
from saeforge.ops import Above, SparseCode, TopK, dense, encode, native, residual, screen, shadow, stock
from saeforge.ops.native import build, pool
from saeforge.ops.native import products as native_products
from saeforge.ops.select import top_k
from saeforge.sae import SAE

pytestmark = pytest.mark.skipif(not native.wanted(), reason="no C++ compiler here")
BF16 = torch.bfloat16


def levels(n_rows: int, n: int, count: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Few different values, so that nearly all rows tie; with zeros of both signs and infinities."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-count, count, (n_rows, n), generator=generator).to(dtype)
    values[values == 1] = -0.0
    values[values == count - 1] = float("inf")
    return values


@settings(max_examples=120, deadline=None)
@given(
    n_rows=st.integers(0, 6),
    n=st.integers(1, 400),
    share=st.floats(0, 1),
    count=st.integers(1, 40),
    dtype=st.sampled_from([BF16, torch.float32]),
    seed=st.integers(0, 2**16),
)
def test_top_k_equals_the_stock_one(
    n_rows: int, n: int, share: float, count: int, dtype: torch.dtype, seed: int
) -> None:
    k = min(n, max(1, round(share * n)))
    pre = levels(n_rows, n, count, dtype, seed)
    values, indices = native.top_k(pre, k)
    expected = pre.double().argsort(dim=1, descending=True, stable=True)[:, :k].sort(1).values
    assert torch.equal(indices, expected)
    assert torch.equal(values, pre.gather(1, expected).float())
    if k < n:
        assert torch.equal(indices, stock.top_k(pre, k)[1])


@pytest.mark.parametrize("dtype", [BF16, torch.float32])
@pytest.mark.parametrize("k", [1, 7, 40, 100, 500, 4999])
def test_top_k_of_long_rows_equals_the_stock_one(k: int, dtype: torch.dtype) -> None:
    pre = torch.randn(4, 5000, generator=torch.Generator().manual_seed(k)).to(dtype)
    pre[1] = 1 / pre[1]  # keys far apart
    pre[2, ::2] = pre[2, 0]
    pre[3] = -1.0
    values, indices = native.top_k(pre, k)
    expected = pre.argsort(dim=1, descending=True, stable=True)[:, :k].sort(1).values
    assert torch.equal(indices, expected)
    assert torch.equal(values, pre.gather(1, expected).float())


@pytest.mark.parametrize("dtype", [BF16, torch.float32])
@pytest.mark.parametrize("sign", [0, 1])
def test_a_nan_of_either_sign_is_selected_and_stays_nan(dtype: torch.dtype, sign: int) -> None:
    pre = torch.randn(3, 300)
    pre[1, 200] = torch.tensor(np.float32(np.nan)).abs().copysign(torch.tensor(-1.0 if sign else 1.0))
    values, indices = native.top_k(pre.to(dtype), 5)
    assert indices[1].tolist().count(200) == 1
    assert values[1].isnan().sum() == 1
    assert native.above(pre.to(dtype), torch.tensor([0.0]))[0].isnan().sum() == 1
    assert stock.above(pre.to(dtype), torch.tensor([0.0]))[0].isnan().sum() == 1


@settings(max_examples=60, deadline=None)
@given(
    n_rows=st.integers(0, 6),
    n=st.integers(1, 200),
    per_latent=st.booleans(),
    dtype=st.sampled_from([BF16, torch.float32]),
    seed=st.integers(0, 2**16),
)
def test_above_equals_the_stock_one(n_rows: int, n: int, per_latent: bool, dtype: torch.dtype, seed: int) -> None:
    pre = levels(n_rows, n, 6, dtype, seed)
    generator = torch.Generator().manual_seed(seed)
    threshold = torch.randint(-6, 6, (n if per_latent else 1,), generator=generator).float()
    for found, expected in zip(native.above(pre, threshold), stock.above(pre, threshold), strict=True):
        assert torch.equal(found, expected.to(found.dtype))


def code_of(matrix: Tensor, tail: int) -> SparseCode:
    code = SparseCode.from_dense(matrix)
    values = torch.cat([code.values, torch.full((tail,), float("nan"))])
    indices = torch.cat([code.indices, torch.full((tail,), 10**9)])
    return SparseCode(values, indices, code.offsets, code.d_sae)


@settings(max_examples=80, deadline=None)
@given(
    n_rows=st.integers(1, 9),
    n=st.integers(1, 40),
    d=st.integers(1, 70),
    density=st.sampled_from([0.0, 0.05, 0.3, 1.0]),
    tail=st.integers(0, 3),
    low=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_products_equal_float64_matrices(
    n_rows: int, n: int, d: int, density: float, tail: int, low: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    matrix = torch.randn(n_rows, n) * (torch.rand(n_rows, n) < density)
    code = code_of(matrix, tail)
    table, rows = torch.randn(n, d), torch.randn(n_rows, d)
    table = table.bfloat16() if low else table
    values = code.values[: code.nnz]
    ids, columns = matrix.nonzero(as_tuple=True)
    truth = {
        "gather_sum": matrix.double() @ table.double(),
        "row_dots": (rows.double() @ table.double().T)[ids, columns],
        "scatter_outer": matrix.double().T @ rows.double(),
    }
    for ops in (native_products, dense):
        exact = 2e-2 if ops is dense and low else 1e-5  # dense products round their result to the type of the table
        found = {
            "gather_sum": ops.gather_sum(code, values, table),
            "row_dots": ops.row_dots(code, rows, table),
            "scatter_outer": ops.scatter_outer(code, values, rows),
        }
        for name, expected in truth.items():
            assert found[name].dtype == torch.float32
            scale = max(1.0, expected.abs().max().item() if expected.numel() else 1.0)
            torch.testing.assert_close(found[name].double(), expected, rtol=0, atol=exact * scale, msg=name)


def test_the_number_of_threads_changes_no_bit() -> None:
    x, weight = torch.randn(300, 64), torch.randn(500, 64)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            values, indices = native.top_k(torch.linspace(-3, 3, 150_000).sin().view(300, 500), 7)
            code = SparseCode(values.flatten(), indices.flatten(), torch.arange(0, 2101, 7), 500, 7)
            parts = [
                values,
                indices,
                *code.by_latent(),
                native_products.gather_sum(code, code.values, weight),
                native_products.row_dots(code, x, weight),
                native_products.scatter_outer(code, code.values, x),
                *native.residual(x, x.flip(0), weight[0]),
                *native.residual_grad(x, x[:, 0]),
                native.row_sum(x[:, 1], x),
            ]
            results.append(parts)
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize(("n_rows", "d"), [(0, 3), (1, 1), (150, 67)])
def test_a_residual_equals_autograd_in_float64(n_rows: int, d: int) -> None:
    generator = torch.Generator().manual_seed(d)
    shapes = [(n_rows, d), (n_rows, d), (d,), (n_rows,)]
    target, rebuilt, bias, weight = (torch.randn(shape, generator=generator) for shape in shapes)
    found: list[list[Tensor]] = []
    for dtype in (torch.float32, torch.float64):  # the kernels; plain autograd
        leaves = [part.detach().to(dtype).requires_grad_() for part in (target, rebuilt, bias)]
        error, squares = residual(*leaves)
        assert not error.requires_grad
        (squares * weight.to(dtype)).sum().backward()
        found.append([error, squares.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)])
    assert len(found[0]) == len(found[1]) == 5
    for ours, exact in zip(*found, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("n", "d"), [(1, 3), (63, 16), (201, 37)])
def test_a_sum_of_rows_equals_a_product_in_float64(n: int, d: int) -> None:
    weight, table = torch.randn(n), torch.randn(n, d)
    found, exact = native.row_sum(weight, table).double(), weight.double() @ table.double()
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-5)


def test_a_tensor_that_a_kernel_would_misread_is_refused() -> None:
    code = SparseCode(torch.ones(2), torch.tensor([0, 1]), torch.tensor([0, 1, 2]), 3, 1)
    with pytest.raises(ValueError, match="float32 or bfloat16"):
        native.gather_sum(code.indices, code.offsets, code.values, torch.randn(3, 4, dtype=torch.float64))
    with pytest.raises(ValueError, match="contiguous"):
        native.gather_sum(torch.zeros(4, dtype=torch.int64)[::2], code.offsets, code.values, torch.randn(3, 4))


# Screening --------------------------------------------------------------------------------------------------------


@pytest.fixture
def _screened(monkeypatch: pytest.MonkeyPatch) -> None:
    """Screens everything, however small, also where the processor multiplies bfloat16 in software."""
    monkeypatch.setattr(screen, "SMALLEST", 0)
    monkeypatch.setattr(screen, "fast_bf16", lambda: True)


@pytest.mark.usefixtures("_screened")
@settings(max_examples=80, deadline=None)
@given(
    n_rows=st.integers(1, 12),
    n=st.integers(2, 300),
    d=st.integers(1, 90),
    size=st.sampled_from([1e-20, 1e-3, 1.0, 1e6]),
    bias=st.sampled_from([None, 0.0, 1.0, 100.0]),
    shared=st.sampled_from([0.0, 1.0, 30.0]),
    seed=st.integers(0, 2**16),
)
def test_screened_selections_are_those_of_full_precision(
    n_rows: int, n: int, d: int, size: float, bias: float | None, shared: float, seed: int
) -> None:
    torch.manual_seed(seed)
    # A shared direction makes all pre-activations large and nearly equal: what bfloat16 cannot tell apart.
    x = size * (torch.randn(n_rows, d) + shared)
    weight = torch.randn(n, d) + shared
    b = None if bias is None else size * bias * torch.randn(n)
    exact = x.double() @ weight.double().T + (0 if b is None else b.double())
    # What fp32 itself cannot tell apart.
    noise = 2e-6 * (x.double().norm(dim=1)[:, None] * weight.double().norm(dim=1) + (0 if b is None else b.abs()))
    k = max(1, n // 7)
    assert screen.applies(x, weight)
    code = encode(x, weight, b, TopK(k))
    chosen = torch.zeros_like(exact, dtype=torch.bool)
    chosen[code.rows(), code.indices] = True
    least = torch.where(chosen, exact - noise, torch.inf).min(1).values
    assert not (~chosen & (exact - noise > least[:, None] + 2 * noise)).any()
    torch.testing.assert_close(code.values.double(), exact[chosen], rtol=0, atol=float(noise.max()), check_dtype=False)
    for threshold in (0.0, torch.linspace(-1, 2, n) * size * d**0.5):
        bound = torch.as_tensor(threshold, dtype=torch.float64)
        above = encode(x, weight, b, Above(threshold)).to_dense() != 0
        assert above[exact > bound + noise].all()
        assert not above[exact <= bound - noise].any()


@pytest.mark.usefixtures("_screened")
def test_a_screened_row_does_not_depend_on_the_rows_beside_it() -> None:
    x, weight, b = torch.randn(50, 40), torch.randn(200, 40), torch.randn(200)
    for select in (TopK(9), Above(20.0)):  # three deviations: few candidates in every row
        whole = encode(x, weight, b, select).to_dense()
        assert torch.equal(torch.cat([encode(x[[i]], weight, b, select).to_dense() for i in range(50)]), whole)


@pytest.mark.usefixtures("_screened")
def test_screening_is_left_where_its_bounds_would_be_loose_or_worthless() -> None:
    x, weight = torch.randn(8, 40), torch.randn(200, 40)
    assert screen.applies(x, weight)
    long = weight.clone()
    long[3] *= 50
    assert not screen.applies(x, long)
    assert not screen.applies(x.double(), weight.double())
    x[2, 5] = float("inf")
    assert encode(x, weight, None, TopK(5)).nnz == 40  # no bound is finite: the fp32 product decides
    many = encode(torch.randn(8, 40), weight, None, Above(0.0))  # half of all: not one by one
    assert 600 < many.nnz < 1000


# Shadows and memory -----------------------------------------------------------------------------------------------


def test_a_shadow_follows_every_kind_of_change() -> None:
    weight = torch.nn.Parameter(torch.randn(6, 5))

    def holds() -> bool:
        made = shadow.of(weight)
        assert made.residual is not None
        assert made.norm is not None
        low = weight.detach().bfloat16()
        torch.testing.assert_close(made.norm, weight.detach().norm(dim=1))
        torch.testing.assert_close(made.residual, (weight.detach() - low.float()).norm(dim=1))
        return torch.equal(made.rounded, low)

    assert holds()
    first = shadow.of(weight).rounded
    with torch.no_grad():
        weight.add_(1)
    assert holds()
    weight.detach().mul_(3)
    assert holds()
    assert shadow.of(weight).rounded is first
    weight.data = torch.randn(6, 5)
    assert holds()
    weight.data = torch.randn(4, 5)
    assert holds()
    with torch.inference_mode():
        assert torch.equal(shadow.of(torch.ones(2, 2)).rounded, torch.ones(2, 2, dtype=BF16))


def test_a_shadow_dies_with_its_weight() -> None:
    before = len(shadow._shadows)
    weight = torch.nn.Parameter(torch.randn(6, 5))
    shadow.of(weight)
    assert len(shadow._shadows) == before + 1
    del weight
    gc.collect()
    assert len(shadow._shadows) == before


def test_a_gradients_memory_goes_round_only_when_nobody_holds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "SMALLEST", 0)
    pool.release()
    first = pool.empty(7, 3)
    place, view = first.data_ptr(), first[2:4]
    del first
    assert pool.empty(7, 3).data_ptr() != place  # the view is still there
    view.fill_(1)
    del view
    assert pool.empty(7, 3).data_ptr() == place or pool.empty(7, 3).data_ptr() == place
    pool.release()


def test_the_gradient_of_a_weight_is_the_buffer_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "SMALLEST", 0)
    lent: list[int] = []
    empty = pool.empty

    def noted(*shape: int) -> Tensor:
        tensor = empty(*shape)
        lent.append(tensor.data_ptr())
        return tensor

    monkeypatch.setattr(pool, "empty", noted)
    weight = torch.nn.Parameter(torch.randn(9, 4))
    for _ in range(3):
        weight.grad = None
        encode(torch.randn(5, 4), weight, None, TopK(1)).values.sum().backward()
        assert weight.grad is not None
        assert weight.grad.data_ptr() == lent[-1]  # not a copy
    assert len(set(lent)) <= 2
    pool.release()


# Building ---------------------------------------------------------------------------------------------------------


def test_without_a_compiler_the_log_says_what_to_do_and_the_step_still_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SAEFORGE_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    build.library.cache_clear()
    try:
        with caplog.at_level(logging.WARNING, "saeforge.ops"):
            x, weight = torch.randn(5, 4), torch.randn(9, 4)
            expected = top_k(F.linear(x, weight), 2)[1]
            assert torch.equal(encode(x, weight, None, TopK(2)).indices.view(5, 2), expected)
        assert len(caplog.records) == 1
        assert "no-such-compiler" in caplog.text
        assert "set CXX" in caplog.text
        monkeypatch.setenv("SAEFORGE_OPS", "native")
        with pytest.raises(ConfigError, match="do not compile"):
            encode(x, weight, None, TopK(2))
    finally:
        build.library.cache_clear()


def test_a_compiler_that_fails_is_quoted_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler = tmp_path / "bad-c++"
    compiler.write_text(
        "#!/bin/sh\n[ \"$1\" = --version ] && exit 0\necho 'error: flux capacitor missing' >&2\nexit 1\n"
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("SAEFORGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(build.BuildError, match="flux capacitor missing"):
        build.load()
    assert list((tmp_path / "cache" / "native").iterdir()) == []


def test_a_damaged_library_in_the_cache_is_made_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SAEFORGE_CACHE", str(tmp_path))
    build.load()
    (made,) = (tmp_path / "native").glob("*.so")
    broken = tmp_path / "second" / "native" / made.name
    broken.parent.mkdir(parents=True)
    broken.write_bytes(made.read_bytes()[:1000])
    monkeypatch.setenv("SAEFORGE_CACHE", str(tmp_path / "second"))
    assert Path(build.load()._name) in broken.parent.iterdir()
    assert broken.read_bytes() == made.read_bytes()


def test_an_sae_encodes_the_same_latents_with_and_without_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(40, 16)
    sae = SAE(torch.randn(64, 16), torch.randn(64), torch.randn(64, 16), torch.randn(16), rule="topk", k=6)
    ours = sae.encode(x)
    monkeypatch.setenv("SAEFORGE_OPS", "stock")
    other = sae.encode(x)
    assert torch.equal(ours.indices, other.indices)
    torch.testing.assert_close(sae.decode(ours), sae.decode(other))
