"""Metrics: each definition against a naive computation over the whole set, whatever the batches."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from saeforge.metrics import Agreement, Firing, Reconstruction, ReconstructionMetrics, WeightFigures, conventions
from saeforge.ops import Group, SparseCode

ROOT = Path(__file__).parents[1]
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


def accumulate(
    x: Tensor, x_hat: Tensor, f: Tensor, batch: int, pivot: Tensor | None = None, norms: Tensor | None = None
) -> ReconstructionMetrics:
    metrics = ReconstructionMetrics(x.shape[1], f.shape[1], pivot=pivot, decoder_norms=norms)
    for a, b, c in zip(x.split(batch), x_hat.split(batch), f.split(batch), strict=True):
        metrics.update(a, b, SparseCode.from_dense(c))
    return metrics


def measure(
    x: Tensor, x_hat: Tensor, f: Tensor, batch: int, pivot: Tensor | None = None, norms: Tensor | None = None
) -> Reconstruction:
    return accumulate(x, x_hat, f, batch, pivot, norms).compute()


def naive(x: np.ndarray, x_hat: np.ndarray, f: np.ndarray, pivot: np.ndarray, rows: np.ndarray) -> dict[str, float]:
    """Numpy over the whole set, one line for each definition."""
    r, active = x - x_hat, f != 0
    error, square, about = (r**2).sum(1), (x**2).sum(1), ((x - pivot) ** 2).sum(1)
    l0 = sorted(int(row.sum()) for row in active)
    norms, norms_hat = np.sqrt((x**2).sum(1)), np.sqrt((x_hat**2).sum(1))
    fires = active.mean(0)
    return {
        "tokens": len(x),
        "l0_mean": float(np.mean(l0)),
        "l0_p5": l0[math.ceil(0.05 * len(x)) - 1],
        "l0_p50": l0[math.ceil(0.50 * len(x)) - 1],
        "l0_p95": l0[math.ceil(0.95 * len(x)) - 1],
        "l1": float((np.abs(f) * rows).sum(1).mean()),
        "fvu": float((r**2).sum() / ((x - x.mean(0)) ** 2).sum()),
        "mse": float((r**2).sum(1).mean()),
        "mse_per_dim": float((r**2).mean()),
        "cosine": float(((x * x_hat).sum(1) / (norms * norms_hat)).mean()),
        "l2_ratio": float((norms_hat / norms).mean()),
        "reconstruction_bias": float((x_hat**2).sum() / (x * x_hat).sum()),
        "ev_legacy": float((1 - error / about).mean()),
        "ev_centered": float(1 - r.var(0).sum() / x.var(0).sum()),
        "nmse_raw": float((error / square).mean()),
        "nmse_global": float((r**2).mean() / x.var()),
        "dead": int((fires == 0).sum()),
        "rare_1e_5": int((fires < 1e-5).sum()),
        "rare_1e_6": int((fires < 1e-6).sum()),
        "dense_1pct": int((fires > 0.01).sum()),
        "dense_10pct": int((fires > 0.10).sum()),
        "firing_share_1pct": float(active[:, fires > 0.01].sum() / active.sum()),
        "firing_share_10pct": float(active[:, fires > 0.10].sum() / active.sum()),
    }


@pytest.mark.parametrize("about", [0.0, 2.5])
@pytest.mark.parametrize("batch", [7, 256, 4096])
def test_every_metric_equals_its_definition_for_any_batch_size(batch: int, about: float) -> None:
    x, x_hat, f = data()
    pivot, norms = torch.full((D,), about, dtype=F64), torch.linspace(0.5, 2, D_SAE, dtype=F64)
    found = dataclasses.asdict(measure(x, x_hat, f, batch, pivot, norms))
    expected = naive(x.numpy(), x_hat.numpy(), f.numpy(), pivot.numpy(), norms.numpy())
    assert found.keys() == expected.keys()
    assert 3 <= expected["dead"] < expected["dense_10pct"] < expected["dense_1pct"] < D_SAE
    for name, value in expected.items():
        if isinstance(value, int):
            assert found[name] == value, name
        else:
            assert found[name] == pytest.approx(value, rel=1e-12), name


def test_merged_accumulators_equal_one() -> None:
    x, x_hat, f = data()
    whole, *parts = [
        ReconstructionMetrics(D, D_SAE, pivot=torch.ones(D), decoder_norms=torch.ones(D_SAE)) for _ in range(4)
    ]
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
    metrics = accumulate(x, x_hat, f, N, torch.ones(D), torch.ones(D_SAE))
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
    with pytest.raises(ValueError, match="no rows"):
        ReconstructionMetrics(2, 3).firing()
    found = measure(torch.zeros(4, 2), torch.zeros(4, 2), torch.zeros(4, 3), 4)
    for name in ("fvu", "reconstruction_bias", "ev_centered", "nmse_global", "firing_share_1pct"):
        assert math.isnan(getattr(found, name)), name


def test_what_was_not_given_is_nan_also_after_a_merge() -> None:
    x, x_hat, f = data()
    without = accumulate(x, x_hat, f, N)
    assert math.isnan(without.compute().l1)
    assert math.isnan(without.compute().ev_legacy)
    given = accumulate(x, x_hat, f, N, torch.zeros(D), torch.ones(D_SAE))
    assert not math.isnan(given.compute().l1 + given.compute().ev_legacy)
    given.merge(without)
    assert math.isnan(given.compute().l1)
    assert math.isnan(given.compute().ev_legacy)


def test_rows_are_not_changed() -> None:
    """Also where they are float64 already, and where target and reconstruction are one tensor."""
    x = data()[0]
    kept = x.clone()
    found = measure(x, x, torch.ones(N, 2), N, torch.ones(D))
    assert torch.equal(x, kept)
    assert (found.fvu, found.mse, found.ev_legacy) == (0, 0, 1)


def test_by_hand() -> None:
    """Two tokens of two dimensions: x = (1, 0), (3, 4); x_hat = (1, 0), (3, 0); values 2 and -1, -3."""
    x, x_hat = torch.tensor([[1.0, 0.0], [3.0, 4.0]]), torch.tensor([[1.0, 0.0], [3.0, 0.0]])
    f = torch.tensor([[2.0, 0.0, 0.0], [-1.0, -3.0, 0.0]])
    found = measure(x, x_hat, f, 1, torch.tensor([1.0, 1.0]), torch.tensor([1.0, 2.0, 5.0]))
    assert (found.l0_mean, found.l0_p5, found.l0_p95) == (1.5, 1, 2)
    assert found.l1 == (2 + 1 + 3 * 2) / 2
    assert (found.mse, found.mse_per_dim) == (16 / 2, 16 / 2 / 2)
    assert found.fvu == 16 / ((1 + 1) + (4 + 4))  # mu = (2, 2)
    assert found.cosine == pytest.approx((1 + 9 / 15) / 2)
    assert found.l2_ratio == pytest.approx((1 + 3 / 5) / 2)
    assert found.reconstruction_bias == pytest.approx((1 + 9) / (1 + 9))
    assert found.ev_legacy == pytest.approx(((1 - 0 / 1) + (1 - 16 / 13)) / 2)
    assert found.ev_centered == pytest.approx(1 - (0 + 4) / (1 + 4))
    assert found.nmse_raw == pytest.approx((0 + 16 / 25) / 2)
    assert found.nmse_global == pytest.approx(4 / 2.5)  # (1, 0, 3, 4) has variance 2.5, r has mean square 4
    assert (found.dead, found.dense_10pct, found.firing_share_10pct) == (1, 2, 1)


def test_the_histogram_of_l0_has_each_token_once_in_bins_of_one_whole_width() -> None:
    f = torch.ones(300, 200).tril(-1)  # L0 0, 1, ..., 199, 200, 200, ...
    firing = accumulate(torch.ones(300, 2), torch.ones(300, 2), f, 64).firing()
    assert firing.l0_edges == tuple(range(0, 205, 4))  # 201 levels in at most 60 bins
    assert firing.l0_tokens == (4,) * 50 + (100,)
    alike = accumulate(torch.ones(5, 2), torch.ones(5, 2), f[7:8].repeat(5, 1), 5).firing()
    assert (alike.l0_edges, alike.l0_tokens) == ((7, 8), (5,))


def test_shares_of_firings_weigh_latents_by_their_rate() -> None:
    f = torch.zeros(200, 4)
    f[:100, 0] = f[:10, 1] = f[:2, 2] = 1.0  # rates 0.5, 0.05, 0.01
    found = measure(torch.ones(200, 2), torch.ones(200, 2), f, 64)
    assert (found.dense_10pct, found.dense_1pct, found.rare_1e_5) == (1, 2, 1)
    assert found.firing_share_10pct == 100 / 112
    assert found.firing_share_1pct == 110 / 112


def test_rare_latents_are_those_below_a_share_of_the_tokens() -> None:
    metrics = accumulate(torch.ones(4, 2), torch.ones(4, 2), torch.ones(4, 6), 4)
    metrics.sums[0] = 2_000_000  # as many tokens, in no time
    metrics.counts = torch.tensor([0, 1, 2, 19, 20, 21])
    assert (metrics.compute().rare_1e_5, metrics.compute().rare_1e_6, metrics.compute().dead) == (4, 2, 1)


def test_density_has_each_living_latent_in_one_bin_and_the_dead_in_none() -> None:
    f = torch.zeros(1000, 5)
    f[:, 0] = f[:100, 1] = f[:1, 2] = f[:101, 3] = 1.0  # rates 1, 0.1, 0.001, 0.101
    firing = accumulate(torch.ones(1000, 2), torch.ones(1000, 2), f, 300).firing(documents=60)
    assert (firing.tokens, firing.dead, sum(firing.latents)) == (1000, 1, 4)
    assert len(firing.log10_edges) == len(firing.latents) + 1
    by_left_edge = dict(zip(firing.log10_edges, firing.latents, strict=False))
    assert by_left_edge[-3.0] == 1  # on an edge: the bin at its right
    assert by_left_edge[-1.0] == 2
    assert by_left_edge[-0.25] == 1  # the last one has both its edges


def test_the_bound_of_the_dead_counts_documents_not_tokens() -> None:
    """1,000 tokens of 60 documents: a latent that fires in 5% of documents would be silent in all with p = 0.046."""
    metrics = accumulate(torch.ones(1000, 2), torch.ones(1000, 2), torch.zeros(1000, 2), 300)
    assert metrics.firing(60).dead_bound == 0.05
    assert (1 - 0.05) ** 60 < 0.05
    assert metrics.firing(2).dead_bound == 1
    assert metrics.firing(None).dead_bound is None


def test_two_ranks_give_what_one_gives(tmp_path: Path) -> None:
    """Two processes over gloo, unequal shares of rows."""
    worker = [sys.executable, "-m", "tests.metrics_worker", str(tmp_path / "store")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    ranks = [
        subprocess.Popen([*worker, str(rank), str(tmp_path / f"{rank}.json")], env=environment, cwd=ROOT)
        for rank in range(2)
    ]
    assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    one = dataclasses.asdict(measure(*data(), 256, torch.ones(D), torch.ones(D_SAE)))
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        for name, value in one.items():
            exact = isinstance(value, int)
            assert found[name] == (value if exact else pytest.approx(value, rel=1e-12)), name


def test_every_figure_has_one_convention() -> None:
    for result, texts in (
        (Reconstruction, conventions.RECONSTRUCTION),
        (Firing, conventions.FIRING),
        (WeightFigures, conventions.WEIGHTS),
        (Agreement, conventions.AGREEMENT),
    ):
        assert conventions.names(texts) == {field.name for field in dataclasses.fields(result)}


def test_the_documentation_has_every_figure() -> None:
    rows = [line for line in (ROOT / "docs" / "metrics.md").read_text().splitlines() if line.startswith("| `")]
    named = {name for row in rows for name in re.findall(r"`([^`]+)`", row.split(" | ")[0])}
    for texts in (conventions.RECONSTRUCTION, conventions.FIRING, conventions.WEIGHTS, conventions.AGREEMENT):
        assert conventions.names(texts) <= named
