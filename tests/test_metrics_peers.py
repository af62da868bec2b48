"""Wrong or incomparable numbers that leading tools report, each written out as they compute it, beside ours."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from saeforge.evaluation.effect import summarise
from saeforge.evaluation.passes import compare
from saeforge.metrics import Reconstruction, ReconstructionMetrics
from saeforge.ops import SparseCode

F64 = torch.float64


def measure(x: Tensor, x_hat: Tensor, batch: int = 100) -> Reconstruction:
    metrics = ReconstructionMetrics(x.shape[1], 3, pivot=x.mean(0))
    for a, b in zip(x.split(batch), x_hat.split(batch), strict=True):
        metrics.update(a, b, SparseCode.from_dense(torch.ones(len(a), 3)))
    return metrics.compute()


def noisy(n: int, d: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Rows around a mean, whose scale drifts, and a reconstruction of them."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=g, dtype=F64) * torch.linspace(0.2, 3, n, dtype=F64)[:, None] + 1
    return x, 0.9 * x + 0.3 * torch.randn(n, d, generator=g, dtype=F64)


def test_saebench_explained_variance_measures_the_spread_about_zero() -> None:
    """It averages x^2 where x is meant, over all dimensions: predicting the mean of N(3, 1) explains 0.88 there."""
    x = torch.randn(4096, 64, generator=torch.Generator().manual_seed(0), dtype=F64) + 3
    x_hat = x.mean(0).expand_as(x)
    error, square = (x - x_hat).square().sum(1).mean(), x.square().sum(1).mean()
    theirs = 1 - error / (square - x.square().mean(0).mean().square())
    assert theirs.item() == pytest.approx(0.882, abs=0.005)
    found = measure(x, x_hat)
    assert found.fvu == pytest.approx(1, rel=1e-12)
    assert found.ev_legacy == pytest.approx(0, abs=1e-12)
    assert found.ev_centered == pytest.approx(0, abs=1e-12)


def test_saebench_mse_shrinks_with_the_batch() -> None:
    """It divides by the number of tokens twice."""
    x, x_hat = noisy(1024, 8)
    error = (x - x_hat).square().sum(1)
    theirs = {batch: sum(part.sum() / batch**2 for part in error.split(batch)) / (1024 / batch) for batch in (64, 256)}
    assert theirs[64] == pytest.approx(4 * theirs[256])
    for batch in (64, 256):
        assert measure(x, x_hat, batch).mse == pytest.approx(error.mean().item(), rel=1e-12)


def test_a_mean_per_batch_makes_fvu_depend_on_the_batch() -> None:
    """sparsify, llamascopium: mu and the ratio of each batch, then the mean of ratios."""
    x, x_hat = noisy(1024, 8)

    def theirs(batch: int) -> float:
        parts = zip(x.split(batch), x_hat.split(batch), strict=True)
        return sum(float((a - b).square().sum() / (a - a.mean(0)).square().sum()) for a, b in parts) / (1024 / batch)

    assert theirs(4) > 1.2 * theirs(1024)
    ours = [measure(x, x_hat, batch).fvu for batch in (4, 1024)]
    assert ours == pytest.approx([theirs(1024)] * 2, rel=1e-12)


def test_a_bias_from_ratios_of_batches_depends_on_the_batch() -> None:
    """SAELens, SAEBench and dictionary_learning average |x_hat|^2 / x.x_hat over batches."""
    x, x_hat = noisy(1024, 8)

    def theirs(batch: int) -> float:
        parts = zip(x.split(batch), x_hat.split(batch), strict=True)
        return sum(float(b.square().sum() / (a * b).sum()) for a, b in parts) / (1024 / batch)

    assert abs(theirs(4) - theirs(1024)) > 0.01
    ours = [measure(x, x_hat, batch).reconstruction_bias for batch in (4, 1024)]
    assert ours == pytest.approx([theirs(1024)] * 2, rel=1e-12)


def test_the_centred_explained_variance_does_not_see_a_constant_bias() -> None:
    """dictionary_learning and NVIDIA: the residual's mean is subtracted. Kept as ev_centered, for comparison."""
    x, x_hat = noisy(2000, 16)
    biased = measure(x, x_hat + 5)
    assert biased.ev_centered == pytest.approx(measure(x, x_hat).ev_centered, rel=1e-12)
    assert biased.fvu > measure(x, x_hat).fvu + 1


def test_legacy_explained_variance_hangs_on_tokens_near_the_mean() -> None:
    """A mean of ratios: one token in a thousand, close to the mean and off by 1, turns it; fvu hardly moves."""
    x = torch.randn(1000, 16, generator=torch.Generator().manual_seed(0), dtype=F64)
    x_hat = 0.9 * x
    before = measure(x, x_hat)
    x[0] = x[1:].mean(0) + 1e-3
    x_hat[0] = x[0] + 0.25
    after = measure(x, x_hat)
    assert before.ev_legacy > 0.9
    assert after.ev_legacy < -10
    assert after.fvu == pytest.approx(before.fvu, abs=1e-3)


def test_relative_to_zero_a_large_mean_hides_the_error() -> None:
    """OpenAI's normalised MSE: predicting the mean of N(10, 1) has an error of 0.01."""
    x = torch.randn(4000, 32, generator=torch.Generator().manual_seed(0), dtype=F64) + 10
    found = measure(x, x.mean(0).expand_as(x))
    assert found.nmse_raw == pytest.approx(1 / 101, rel=0.02)
    assert found.fvu == pytest.approx(1)
    assert found.cosine > 0.99


def test_the_variance_of_all_scalars_includes_differences_between_dimensions() -> None:
    """NVIDIA's normalised MSE and mlsae's FVU: predicting the mean looks good where dimensions' means differ."""
    x = torch.randn(4000, 32, generator=torch.Generator().manual_seed(0), dtype=F64)
    x = x + torch.arange(32, dtype=F64)
    found = measure(x, x.mean(0).expand_as(x))
    assert found.nmse_global == pytest.approx(1 / (1 + (32**2 - 1) / 12), rel=0.02)
    assert found.fvu == pytest.approx(1)


def test_scaled_inputs_beside_unscaled_outputs_would_be_seen() -> None:
    """SAELens once compared the two. In one unit, whichever, ratios are the same and mse has its square."""
    x, x_hat = noisy(500, 8)
    raw, scaled = measure(x, x_hat), measure(4 * x, 4 * x_hat)
    for name in ("fvu", "cosine", "l2_ratio", "reconstruction_bias", "ev_legacy", "ev_centered", "nmse_raw"):
        assert getattr(scaled, name) == pytest.approx(getattr(raw, name), rel=1e-12), name
    assert scaled.mse == pytest.approx(16 * raw.mse)
    assert measure(4 * x, x_hat).l2_ratio < 0.3


def test_a_probability_that_underflows_spoils_the_logarithm_of_a_softmax() -> None:
    """SAEBench and SAELens: 0 * (-inf - -inf) is NaN, for the whole token. Log-softmax stays finite."""
    original, spliced = torch.tensor([[0.0, 1.0, -200.0]]), torch.tensor([[0.5, 1.0, -300.0]])
    p, q = original.softmax(1), spliced.softmax(1)
    assert (p * (p.log() - q.log())).sum(1).isnan().all()
    exact = (p.double() * (original.double().log_softmax(1) - spliced.double().log_softmax(1))).sum()
    assert float(compare(original, spliced, torch.tensor([0]))[0, 2]) == pytest.approx(float(exact), rel=1e-5)


def test_the_ce_score_is_at_most_one_and_no_mean_of_ratios() -> None:
    """llamascopium's downstream_loss_ratio is the inverse, above 1 for a worse SAE, and a mean over batches."""
    # Per document: tokens, then sums over them: loss of the original; loss, KL and agreement of SAE, zero and mean.
    documents = {0: [10, 20, 25, 1, 9, 100, 1, 0, 100, 1, 0], 1: [90, 180, 360, 1, 50, 540, 1, 0, 540, 1, 0]}
    sums = {number: np.array(row, dtype=np.float64) for number, row in documents.items()}
    found = summarise(sums, dict.fromkeys(sums), {}, seed=0).overall
    assert found.ce_score_zero is not None
    assert found.ce_score_zero == pytest.approx((640 - 385) / (640 - 200))
    assert found.delta_ce == pytest.approx((385 - 200) / 100)
    theirs = np.mean([(zero - original) / (zero - sae) for _, original, sae, _, _, zero, *_ in documents.values()])
    assert theirs > 1.5
    of_ratios = np.mean([(zero - sae) / (zero - original) for _, original, sae, _, _, zero, *_ in documents.values()])
    assert abs(of_ratios - found.ce_score_zero) > 0.1
