"""Sparse codes: the right latents, ties to the lowest index, and gradients equal to dense autograd."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from saeforge.errors import ConfigError
from saeforge.ops import (
    Above,
    BatchTopK,
    Group,
    Selection,
    SparseCode,
    TopK,
    decode,
    decode_beside,
    dense,
    encode,
    encode_beside,
    engine,
    pick,
    row_norms,
    stock,
)
from saeforge.ops.dispatch import choose
from saeforge.ops.native import products as native_products
from saeforge.ops.select import top_k

MODES = ["auto", "reference", "stock", "native"]
F64 = torch.float64


def brute_top_k(pre: Tensor, k: int) -> list[list[int]]:
    """The k largest of each row, largest first, lowest index first among equals; then by index."""
    return [sorted(sorted(range(len(row)), key=lambda i: (-row[i], i))[:k]) for row in pre.tolist()]


def code_rows(code: SparseCode) -> list[list[int]]:
    offsets = code.offsets.tolist()
    return [code.indices[a:b].tolist() for a, b in itertools.pairwise(offsets)]


def ragged(n_rows: int = 6, d_sae: int = 11, tail: int = 0) -> SparseCode:
    """Rows of different length, the second and the last empty; `tail` entries of rubbish behind."""
    generator = torch.Generator().manual_seed(3)
    matrix = torch.randn(n_rows, d_sae, generator=generator, dtype=F64)
    matrix = matrix * (torch.rand(n_rows, d_sae, generator=generator) < 0.4)
    matrix[1] = matrix[-1] = 0
    code = SparseCode.from_dense(matrix)
    if tail:
        junk = torch.full((tail,), float("nan"), dtype=F64)
        code = SparseCode(
            torch.cat([code.values, junk]),
            torch.cat([code.indices, torch.full((tail,), 10**9)]),
            code.offsets,
            code.d_sae,
        )
    return code


@settings(max_examples=150, deadline=None)
@given(
    n_rows=st.integers(0, 7),
    n=st.integers(1, 24),
    k_share=st.floats(0, 1),
    levels=st.integers(1, 5),
    dtype=st.sampled_from([torch.bfloat16, torch.float32, torch.float64]),
    seed=st.integers(0, 2**16),
)
def test_top_k_takes_the_largest_and_among_equals_the_lowest_index(
    n_rows: int, n: int, k_share: float, levels: int, dtype: torch.dtype, seed: int
) -> None:
    k = max(1, round(k_share * n))
    generator = torch.Generator().manual_seed(seed)
    pre = torch.randint(-levels, levels, (n_rows, n), generator=generator).to(dtype)  # few values: nearly all rows tie
    values, indices = top_k(pre, k)
    assert indices.tolist() == brute_top_k(pre, k)
    assert torch.equal(values, pre.gather(1, indices).to(values.dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_tied_rows_in_a_wide_bf16_product_match_brute_force(dtype: torch.dtype) -> None:
    pre = (torch.randn(300, 200) * 4).round().to(dtype)
    assert top_k(pre, 20)[1].tolist() == brute_top_k(pre, 20)


@settings(max_examples=100, deadline=None)
@given(
    n_rows=st.integers(0, 7),
    n=st.integers(1, 24),
    share=st.floats(0.02, 1),
    levels=st.integers(1, 30),
    lonely=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_batch_top_k_takes_the_largest_of_the_batch_and_among_equals_the_lowest_latent_then_row(
    n_rows: int, n: int, share: float, levels: int, lonely: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    pre = torch.randint(-levels, levels, (n_rows, n), generator=generator).double()
    if lonely:
        pre[:1] += 100  # one row has nearly all of the largest: more than it offers at first
    k = share * n
    code = encode(pre, torch.eye(n, dtype=F64), None, BatchTopK(k))
    total = round(k * n_rows)
    entries = sorted((-pre[row, latent].item(), latent, row) for row in range(n_rows) for latent in range(n))
    expected = [[] for _ in range(n_rows)]  # type: list[list[int]]
    for _, latent, row in entries[:total]:
        expected[row].append(latent)
    assert code_rows(code) == [sorted(row) for row in expected]
    assert code.nnz == total


def test_batch_top_k_remembers_how_many_offers_were_enough() -> None:
    select, pre = BatchTopK(1), torch.zeros(64, 100)
    pre[0] = 1.0  # 64 of the largest are in one row
    weight, products = torch.eye(100), 0
    linear = torch.nn.functional.linear

    def counted(*args: Any) -> Tensor:
        nonlocal products
        products += 1
        return linear(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.F, "linear", counted)
        for _ in range(2):
            assert encode(pre, weight, None, select).l0().tolist() == [64] + [0] * 63
    assert products == 6 + 1  # 4, 8, 16, 32 and 64 offers were all taken, then all 100 were enough
    with pytest.raises(ConfigError, match="k = 101"):
        encode(pre, weight, None, BatchTopK(101))


def test_batch_top_k_offers_less_again_where_rows_take_less() -> None:
    select, weight = BatchTopK(1), torch.eye(100)
    uneven, even = torch.zeros(64, 100), torch.zeros(64, 100)
    uneven[0] = 1.0
    even[:, 7] = 1.0
    pre = torch.randn(64, 100, generator=torch.Generator().manual_seed(0))
    expected = encode(pre, weight, None, select).values
    offered = []
    for batch in [uneven] + [even] * 500:
        assert encode(batch, weight, None, select).nnz == 64
        offered.append(select.rows(batch)[2][0].item())
    assert offered[0] == 100
    assert offered[-1] == 4
    assert sorted(set(offered), reverse=True) == [100, 64, 32, 16, 8, 4]
    assert torch.equal(encode(pre, weight, None, select).values, expected)


def test_rows_of_one_value_keep_the_first_k_latents() -> None:
    for value in (-1.0, 0.0, 2.5, float("-inf")):
        assert top_k(torch.full((3, 9), value), 4)[1].tolist() == [[0, 1, 2, 3]] * 3


def test_positive_and_negative_zero_tie() -> None:
    assert top_k(torch.tensor([[-0.0, 0.0, -0.0, 0.0]]), 2)[1].tolist() == [[0, 1]]


@pytest.mark.parametrize("select", [TopK(3), TopK(10), Above(0.0), Above(torch.linspace(-1, 1, 10, dtype=F64))])
@pytest.mark.parametrize("rows_per_chunk", [1, 2, 5, 100])
def test_chunks_of_rows_do_not_change_the_code(
    select: Selection, rows_per_chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weight = torch.randn(7, 4, dtype=F64), torch.randn(10, 4, dtype=F64)
    pre = (x @ weight.T).tolist()
    monkeypatch.setattr(engine, "_chunk_rows", lambda *_: rows_per_chunk)
    code = encode(x, weight, None, select)
    if isinstance(select, TopK):
        expected = brute_top_k(x @ weight.T, select.k)
    else:
        assert isinstance(select, Above)
        bound = torch.as_tensor(select.threshold, dtype=F64).expand(10).tolist()
        expected = [[i for i in range(10) if row[i] > bound[i]] for row in pre]
    assert code_rows(code) == expected
    flat = torch.tensor([row[i] for row, kept in zip(pre, expected, strict=True) for i in kept], dtype=F64)
    torch.testing.assert_close(code.values, flat, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("k", [None, 1, 4, 13])
@pytest.mark.parametrize("shifted", [True, False])
def test_encode_and_decode_gradients_equal_dense_autograd(
    mode: str, k: int | None, shifted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAEFORGE_OPS", mode)
    monkeypatch.setattr(dense, "_CHUNK_ELEMENTS", 2 * 13)  # the dense primitives in chunks of two rows
    d_sae, d_in, d_out, rows = 13, 5, 4, 9
    leaves = {
        "x": torch.randn(rows, d_in, dtype=F64),
        "w": torch.randn(d_sae, d_in, dtype=F64),
        "b": torch.randn(d_sae, dtype=F64) - 0.5,
        "s": torch.randn(d_in, dtype=F64),
        "dec": torch.randn(d_sae, d_out, dtype=F64),
        "bd": torch.randn(d_out, dtype=F64),
    }
    weights_of_loss = torch.randn(rows, d_out, dtype=F64)

    def gradients(sparse: bool) -> dict[str, Tensor | None]:
        t = {name: value.clone().requires_grad_() for name, value in leaves.items()}
        shift = t["s"] if shifted else None
        if sparse:
            code = encode(t["x"], t["w"], t["b"], Above(0.0) if k is None else TopK(k), shift=shift)
            assert code.k == k
            out = decode(code.with_values(code.values.tanh()), t["dec"], t["bd"])
            penalty = code.values.square().sum()
        else:
            pre = (t["x"] - shift if shift is not None else t["x"]) @ t["w"].T + t["b"]
            if k is None:
                mask = pre > 0
            else:
                mask = torch.zeros_like(pre, dtype=torch.bool)
                for row, kept in enumerate(brute_top_k(pre.detach(), k)):
                    mask[row, kept] = True
            kept_pre = torch.where(mask, pre, 0.0)
            out = kept_pre.tanh() @ t["dec"] + t["bd"]
            penalty = kept_pre.square().sum()
        loss = (out * weights_of_loss).sum() + out.square().sum() + penalty
        loss.backward()
        return {"loss": loss.detach(), **{name: value.grad for name, value in t.items()}}

    ours, truth = gradients(True), gradients(False)
    assert (ours["s"] is None) == (not shifted)
    for name, expected in truth.items():
        if expected is not None:
            torch.testing.assert_close(ours[name], expected, rtol=1e-10, atol=1e-10, msg=f"gradient of {name}")


@pytest.mark.parametrize("mode", ["reference", "stock"])
def test_gradcheck_against_finite_differences(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAEFORGE_OPS", mode)
    shapes = [(4, 3), (6, 3), (6,), (3,), (6, 2), (2,)]
    inputs = [torch.randn(shape, dtype=F64, requires_grad=True) for shape in shapes]

    def run(select: Selection) -> Callable[..., Tensor]:
        return lambda x, w, b, s, dec, bd: decode(encode(x, w, b, select, shift=s), dec, bd)

    assert torch.autograd.gradcheck(run(TopK(2)), inputs)
    assert torch.autograd.gradcheck(run(Above(0.0)), inputs)


@pytest.mark.parametrize("tail", [0, 3])
def test_dense_and_stock_products_are_equal_on_ragged_and_empty_rows(tail: int) -> None:
    code = ragged(tail=tail)
    matrix = code.to_dense()
    values, table, rows = code.values[: code.nnz], torch.randn(11, 4, dtype=F64), torch.randn(6, 4, dtype=F64)
    ids, columns = matrix.nonzero(as_tuple=True)
    truth = {
        "gather_sum": matrix @ table,
        "row_dots": (rows @ table.T)[ids, columns],
        "scatter_outer": matrix.T @ rows,
    }
    for kind in (dense, stock):
        torch.testing.assert_close(kind.gather_sum(code, values, table), truth["gather_sum"])
        torch.testing.assert_close(kind.row_dots(code, rows, table), truth["row_dots"])
        torch.testing.assert_close(kind.scatter_outer(code, values, rows), truth["scatter_outer"])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("n_rows", [0, 5])
def test_a_batch_without_any_active_latent_decodes_to_the_bias_and_has_zero_gradients(
    mode: str, n_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAEFORGE_OPS", mode)
    x, weight = torch.randn(n_rows, 3), torch.randn(8, 3, requires_grad=True)
    bias = torch.full((8,), -1e6, requires_grad=True)
    table, b_dec = torch.randn(8, 2, requires_grad=True), torch.randn(2)
    code = encode(x, weight, bias, Above(0.0), shift=torch.zeros(3))
    out = decode(code, table, b_dec)
    assert code.nnz == 0
    assert torch.equal(out, b_dec.expand(n_rows, 2))
    (out.sum() + code.values.sum()).backward()
    for leaf in (weight, bias, table):
        assert leaf.grad is not None
        assert not leaf.grad.any()
    assert code.l0().tolist() == [0] * n_rows
    assert code.active_counts().tolist() == [0] * 8


@pytest.mark.parametrize("mode", MODES)
def test_buffers_longer_than_the_code_are_ignored_everywhere(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAEFORGE_OPS", mode)
    exact, long = ragged(), ragged(tail=4)
    table = torch.randn(11, 3, dtype=F64)
    assert long.nnz == exact.nnz < long.values.numel()
    assert torch.equal(long.to_dense(), exact.to_dense())
    assert torch.equal(long.l0(), exact.l0())
    assert torch.equal(long.active_counts(), exact.active_counts())
    assert torch.equal(long.rows(), exact.rows())
    assert all(torch.equal(a, b) for a, b in zip(long.by_latent(), exact.by_latent(), strict=True))
    assert torch.equal(decode(long, table), decode(exact, table))


def test_dense_round_trip_is_exact_and_differentiable() -> None:
    matrix = torch.randn(5, 7) * (torch.rand(5, 7) < 0.5)
    code = SparseCode.from_dense(matrix)
    assert torch.equal(code.to_dense(), matrix)
    assert code.n_rows == 5
    assert code_rows(code) == [row.nonzero()[:, 0].tolist() for row in matrix]
    values = code.values.clone().requires_grad_()
    code.with_values(values).to_dense().mul(torch.arange(35.0).reshape(5, 7)).sum().backward()
    assert values.grad is not None
    assert torch.equal(values.grad, torch.arange(35.0).reshape(5, 7)[matrix != 0])


def test_by_latent_is_the_stable_transpose() -> None:
    code = ragged()
    order, rows, offsets = code.by_latent()
    pairs = list(zip(code.indices.tolist(), code.rows().tolist(), strict=True))
    assert order.tolist() == sorted(range(len(pairs)), key=lambda entry: (pairs[entry][0], entry))
    assert rows.tolist() == [pairs[entry][1] for entry in order.tolist()]
    assert offsets.tolist() == [sum(latent < i for latent, _ in pairs) for i in range(code.d_sae + 1)]


def test_an_entry_of_value_zero_is_not_active_and_a_negative_one_is() -> None:
    code = SparseCode(torch.tensor([0.0, -2.0, 0.0]), torch.tensor([1, 2, 1]), torch.tensor([0, 2, 3]), 4)
    assert code.l0().tolist() == [1, 0]
    assert code.active_counts().tolist() == [0, 0, 1, 0]


def test_auto_chooses_dense_products_only_for_dense_codes() -> None:
    matrix = torch.zeros(10, 200)
    matrix[:, :5] = 1
    sparse = SparseCode.from_dense(matrix)
    assert choose(sparse, torch.float32, sparse.values) is native_products
    assert choose(sparse, F64, sparse.values.double()) is stock
    matrix[:, :50] = 1
    dense_code = SparseCode.from_dense(matrix)
    assert choose(dense_code, torch.float32, dense_code.values) is dense


@pytest.mark.parametrize("mode", ["auto", "stock"])  # auto: products of a dense code in bf16
def test_bf16_product_keeps_values_and_gradients_in_the_type_of_the_input(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAEFORGE_OPS", mode)
    x, weight = torch.randn(6, 32), torch.randn(20, 32, requires_grad=True)
    code = encode(x, weight, None, TopK(20), dtype=torch.bfloat16)
    assert code.values.dtype == torch.float32
    assert torch.equal(code.values, code.values.bfloat16().float())  # the product came out of a bf16 kernel
    torch.testing.assert_close(code.to_dense(), x @ weight.T, rtol=0.05, atol=0.3)
    code.values.sum().backward()
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32
    relative, absolute = (0.02, 0.05) if mode == "auto" else (1e-6, 1e-5)
    torch.testing.assert_close(weight.grad, x.sum(0).expand(20, 32), rtol=relative, atol=absolute)


def test_the_graph_of_a_step_is_freed_without_the_garbage_collector() -> None:
    def live() -> int:
        return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())

    def step() -> None:
        weight = torch.randn(9, 4, requires_grad=True)
        code = encode(torch.randn(5, 4), weight, None, Above(0.0))
        decode(code, torch.randn(9, 4, requires_grad=True)).sum().backward()

    step()
    gc.collect()
    gc.disable()
    try:
        before = live()
        for _ in range(3):
            step()
        assert live() == before
    finally:
        gc.enable()


def test_one_sort_of_the_pattern_serves_both_weight_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAEFORGE_OPS", "stock")
    sorts, argsort = [], torch.argsort

    def counting(*args: Any, **kwargs: Any) -> Tensor:
        sorts.append(1)
        return argsort(*args, **kwargs)

    monkeypatch.setattr(torch, "argsort", counting)
    code = encode(torch.randn(5, 4), torch.randn(9, 4, requires_grad=True), None, Above(0.0))
    decode(code.with_values(code.values.relu()), torch.randn(9, 4, requires_grad=True)).sum().backward()
    assert len(sorts) == 1


def test_wrong_k_is_named() -> None:
    with pytest.raises(ConfigError, match="k = 0"):
        TopK(0)
    with pytest.raises(ConfigError, match="k = 9 is larger than the 8 latents"):
        encode(torch.randn(2, 3), torch.randn(8, 3), None, TopK(9))


def test_an_unknown_saeforge_ops_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAEFORGE_OPS", "fast")
    with pytest.raises(ConfigError, match="SAEFORGE_OPS=fast"):
        choose(ragged(), F64)


def test_a_group_of_one_returns_detached_tensors() -> None:
    group, value = Group(), torch.ones(3, requires_grad=True)
    assert torch.equal(group.sum(value), torch.ones(3))
    assert not group.sum(value).requires_grad
    assert not group.mean(value).requires_grad
    assert group.agree(True)
    assert not group.agree(False)


@settings(max_examples=120, deadline=None)
@given(
    n_rows=st.integers(1, 9),
    d_in=st.integers(1, 20),
    d_sae=st.integers(1, 40),
    k=st.one_of(st.none(), st.floats(0, 1)),  # None: a threshold, with ragged and empty rows
    n_beside=st.integers(0, 5),
    ties=st.booleans(),
    low=st.booleans(),
    mode=st.sampled_from(MODES),
    seed=st.integers(0, 2**16),
)
def test_random_steps_have_the_gradients_of_float64_autograd(
    n_rows: int,
    d_in: int,
    d_sae: int,
    k: float | None,
    n_beside: int,
    ties: bool,
    low: bool,
    mode: str,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    select: Selection = Above(0.3) if k is None else TopK(min(d_sae, max(1, round(k * d_sae))))
    leaves = {
        name: torch.randint(-2, 3, shape).float() if ties else torch.randn(shape)
        for name, shape in {"x": (n_rows, d_in), "w": (d_sae, d_in), "b": (d_sae,), "s": (d_in,)}.items()
    }
    leaves["dec"] = torch.randn(d_sae, 6)
    beside = torch.randperm(d_sae)[:n_beside] if n_beside else None
    weight = torch.randn(n_rows, 6)
    dtype = torch.bfloat16 if low else None

    t = {name: value.clone().requires_grad_() for name, value in leaves.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAEFORGE_OPS", mode)
        code, pre = encode_beside(t["x"], t["w"], t["b"], select, beside, shift=t["s"], dtype=dtype)
        others = None if beside is None else pre.relu()
        out, other = decode_beside(code.with_values(code.values.relu()), t["dec"], beside, others, dtype=dtype)
        loss = (out * weight).sum() + (pick(row_norms(t["dec"]), code) * code.values).sum()
        loss = loss + (0.0 if beside is None else other.square().sum())
        loss.backward()

    exact = {name: value.double().requires_grad_() for name, value in leaves.items()}
    all_pre = (exact["x"] - exact["s"]) @ exact["w"].T + exact["b"]
    chosen = torch.zeros(n_rows, d_sae, dtype=torch.bool)
    chosen[code.rows(), code.indices[: code.nnz]] = True
    if ties and not low:  # integers: products are exact, and so is the choice
        if k is None:
            assert torch.equal(chosen, all_pre > 0.3)
        else:
            assert code_rows(code) == brute_top_k(all_pre.detach(), select.k or 0)
    kept = torch.where(chosen, all_pre, 0.0)
    total = ((kept.relu() @ exact["dec"]) * weight.double()).sum() + (kept * exact["dec"].norm(dim=1)).sum()
    if beside is not None:
        total = total + (all_pre[:, beside].relu() @ exact["dec"][beside]).square().sum()
    total.backward()
    tolerance = 0.06 if low else 2e-5
    for name, leaf in exact.items():
        assert leaf.grad is not None
        found = t[name].grad
        assert found is not None
        scale = max(1.0, leaf.grad.abs().max().item(), float(leaf.grad.norm()))
        torch.testing.assert_close(found.double(), leaf.grad, rtol=0, atol=tolerance * scale, msg=f"{name}, {mode}")


@pytest.mark.parametrize("d_sae", [1, 1000, 12_288, 131_072, 1 << 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_chunk_of_pre_activations_is_bounded_at_a_million_latents(d_sae: int, dtype: torch.dtype) -> None:
    x, weight = torch.empty(4096, 2), torch.empty(d_sae, 1)
    rows = engine._chunk_rows(x, weight, dtype)
    assert rows >= 1
    assert rows * d_sae * dtype.itemsize <= 1 << 28
    if d_sae <= 131_072:
        assert rows >= 256  # fewer make the product slow
