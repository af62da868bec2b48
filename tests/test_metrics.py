"""Metrics: each definition against a naive computation over the whole set, whatever the batches."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from saeforge.metrics import Reconstruction, ReconstructionMetrics
from saeforge.ops import Group, SparseCode

N, D, D_SAE = 1000, 8, 40
F64 = torch.float64


def data(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Target, reconstruction, dense latents with dead and with dense columns and ragged rows."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(N, D, generator=g, dtype=F64) + torch.linspace(-3, 5, D, dtype=F64)
    x_hat = x * 0.9 + torch.randn(N, D, generator=g, dtype=F64) * 0.3 + 0.1
    rates = torch.logspace(-3.5, 0, D_SAE, dtype=F64)
    f = torch.randn(N, D_SAE, generator=g, dtype=F64) * (torch.rand(N, D_SAE, generator=g, dtype=F64) < rates)
    f[:, :3] = 0
    return x, x_hat, f


def measure(x: Tensor, x_hat: Tensor, f: Tensor, batch: int, pivot: Tensor | None = None) -> Reconstruction:
    metrics = ReconstructionMetrics(x.shape[1], f.shape[1], pivot=pivot)
    for a, b, c in zip(x.split(batch), x_hat.split(batch), f.split(batch), strict=True):
        metrics.update(a, b, SparseCode.from_dense(c))
    return metrics.compute()


def naive(x: np.ndarray, x_hat: np.ndarray, f: np.ndarray) -> dict[str, float]:
    """Numpy over the whole set, one line for each definition."""
    r, active = x - x_hat, f != 0
    l0 = sorted(int(row.sum()) for row in active)
    norms, norms_hat = np.sqrt((x**2).sum(1)), np.sqrt((x_hat**2).sum(1))
    fires = active.mean(0)
    return {
        "tokens": len(x),
        "l0_mean": float(np.mean(l0)),
        "l0_p5": l0[math.ceil(0.05 * len(x)) - 1],
        "l0_p50": l0[math.ceil(0.50 * len(x)) - 1],
        "l0_p95": l0[math.ceil(0.95 * len(x)) - 1],
        "fvu": float((r**2).sum() / ((x - x.mean(0)) ** 2).sum()),
        "mse": float((r**2).sum(1).mean()),
        "cosine": float(((x * x_hat).sum(1) / (norms * norms_hat)).mean()),
        "l2_ratio": float((norms_hat / norms).mean()),
        "reconstruction_bias": float((x_hat**2).sum() / (x * x_hat).sum()),
        "dead": int((fires == 0).sum()),
        "dense_1pct": int((fires > 0.01).sum()),
        "dense_10pct": int((fires > 0.10).sum()),
    }


@pytest.mark.parametrize("with_pivot", [False, True])
@pytest.mark.parametrize("batch", [7, 256, 4096])
def test_every_metric_equals_its_definition_for_any_batch_size(batch: int, with_pivot: bool) -> None:
    x, x_hat, f = data()
    pivot = torch.full((D,), 2.5, dtype=F64) if with_pivot else None
    found = dataclasses.asdict(measure(x, x_hat, f, batch, pivot))
    expected = naive(x.numpy(), x_hat.numpy(), f.numpy())
    assert found.keys() == expected.keys()
    assert 3 <= expected["dead"] < expected["dense_10pct"] < expected["dense_1pct"] < D_SAE
    for name, value in expected.items():
        if isinstance(value, int):
            assert found[name] == value, name
        else:
            assert found[name] == pytest.approx(value, rel=1e-12), name


def test_merged_accumulators_equal_one() -> None:
    x, x_hat, f = data()
    whole, parts = ReconstructionMetrics(D, D_SAE), [ReconstructionMetrics(D, D_SAE) for _ in range(3)]
    whole.update(x, x_hat, SparseCode.from_dense(f))
    for part, rows in zip(parts, (slice(0, 1), slice(1, 700), slice(700, None)), strict=True):
        part.update(x[rows], x_hat[rows], SparseCode.from_dense(f[rows]))
    parts[0].merge(parts[1])
    parts[0].merge(parts[2])
    for name, value in dataclasses.asdict(whole.compute()).items():
        assert dataclasses.asdict(parts[0].compute())[name] == pytest.approx(value, rel=1e-12), name


def test_merging_sums_about_different_pivots_is_refused() -> None:
    one, other = ReconstructionMetrics(D, D_SAE), ReconstructionMetrics(D, D_SAE, pivot=torch.ones(D))
    with pytest.raises(ValueError, match="pivot"):
        one.merge(other)


def test_reduce_adds_the_sums_of_all_ranks() -> None:
    class Doubling(Group):
        def sum(self, tensor: Tensor) -> Tensor:
            return tensor * 2

    x, x_hat, f = data()
    metrics = ReconstructionMetrics(D, D_SAE)
    metrics.update(x, x_hat, SparseCode.from_dense(f))
    once = dataclasses.asdict(metrics.compute())
    metrics.reduce(Doubling(2))
    twice = dataclasses.asdict(metrics.compute())
    assert twice.pop("tokens") == 2 * once.pop("tokens")
    assert twice == pytest.approx(once, rel=1e-12)


def test_predicting_the_mean_has_fvu_one() -> None:
    """Two leading tools report an explained variance of 0.88 here: they measure the spread about zero."""
    x = torch.randn(4096, 64, dtype=F64) + 3
    none = torch.zeros(4096, 5)
    found = measure(x, x.mean(0).expand_as(x), none, 100)
    assert found.fvu == pytest.approx(1, rel=1e-12)
    assert found.l0_mean == found.l0_p95 == 0
    assert found.dead == 5


def test_a_constant_bias_of_the_reconstruction_raises_fvu() -> None:
    """The centred explained variance of dictionary_learning is blind to it."""
    x = torch.randn(2000, 16, dtype=F64)
    spread = (x - x.mean(0)).square().sum() / len(x)
    found = measure(x, x + 2.0, torch.ones(2000, 3), 64)
    assert found.fvu == pytest.approx(16 * 4 / spread.item(), rel=1e-10)


@pytest.mark.parametrize("with_pivot", [False, True])
def test_a_large_mean_does_not_cancel(with_pivot: bool) -> None:
    x = torch.randn(5000, 16, dtype=F64) + 1e4
    x_hat = x + 0.5 * torch.randn(5000, 16, dtype=F64)
    pivot = torch.full((16,), 1e4) if with_pivot else None
    expected = ((x - x_hat).square().sum() / (x - x.mean(0)).square().sum()).item()
    assert measure(x, x_hat, torch.ones(5000, 3), 128, pivot).fvu == pytest.approx(
        expected, rel=1e-11 if with_pivot else 1e-6
    )


@pytest.mark.parametrize("n", [1, 2, 19, 20, 21, 24, 30, 50, 99, 100, 101])
def test_percentiles_are_nearest_rank(n: int) -> None:
    """The smallest value with at least the given share of tokens at or below it; row i has L0 = i + 1."""
    f = torch.tril(torch.ones(n, n))[torch.randperm(n)]
    found = measure(torch.ones(n, 2), torch.ones(n, 2), f, 8)
    ranks = [-(-percent * n // 100) for percent in (5, 50, 95)]
    assert [found.l0_p5, found.l0_p50, found.l0_p95] == ranks
    assert ranks == [int(np.percentile(np.arange(1, n + 1), p, method="inverted_cdf")) for p in (5, 50, 95)]


def test_a_value_of_zero_is_not_active_and_dense_means_more_than_the_share() -> None:
    f = torch.zeros(100, 4)
    f[:10, 0] = f[:11, 1] = f[:1, 2] = f[:2, 3] = -1.0
    code = SparseCode.from_dense(f)
    silent = SparseCode(torch.zeros(100), torch.zeros(100, dtype=torch.int64), torch.arange(101), 4, 1)
    metrics = ReconstructionMetrics(2, 4)
    metrics.update(torch.ones(100, 2), torch.ones(100, 2), code)
    found = metrics.compute()
    assert (found.dense_10pct, found.dense_1pct, found.dead) == (1, 3, 0)
    metrics = ReconstructionMetrics(2, 4)
    metrics.update(torch.ones(100, 2), torch.ones(100, 2), silent)
    assert (metrics.compute().l0_mean, metrics.compute().dead) == (0, 4)


def test_rows_of_zeros_do_not_spoil_the_means() -> None:
    x = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    found = measure(x, torch.tensor([[1.0, 0.0], [3.0, 4.0]]), torch.ones(2, 3), 2)
    assert found.cosine == pytest.approx(0.5)
    assert math.isfinite(found.l2_ratio)
    assert found.l2_ratio < 1e6


def test_degenerate_sets_are_nan_or_an_error_never_a_wrong_number() -> None:
    with pytest.raises(ValueError, match="no rows"):
        ReconstructionMetrics(2, 3).compute()
    found = measure(torch.zeros(4, 2), torch.zeros(4, 2), torch.zeros(4, 3), 4)
    assert math.isnan(found.fvu)
    assert math.isnan(found.reconstruction_bias)
