"""The crosscoder: the papers' losses and gradients, an exact fold, and what is known to be shared found as shared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import saeforge_crosscoder as reading
import torch
from saeforge_crosscoder import Crosscoder
from torch import Tensor

import saeforge
from saeforge.data.moments import Moments, Statistics
from saeforge.errors import ConfigError
from saeforge.variants import Batch, DataStatistics, RunSettings

F64 = torch.float64
WIDTHS, D_SAE, ROWS, K = (5, 3), 24, 40, 4
D = sum(WIDTHS)


def rows(n: int = ROWS) -> Tensor:
    """Two sources of other width, mean and size."""
    generator = torch.Generator().manual_seed(1)
    shared = torch.randn(n, D, dtype=F64, generator=generator)
    return shared * torch.tensor([1.0] * 5 + [20.0] * 3, dtype=F64) + torch.tensor([2.0] * 5 + [-30.0] * 3, dtype=F64)


def statistics(x: Tensor) -> DataStatistics:
    parts = tuple(Moments.of(part.contiguous().numpy()).statistics() for part in x.split(WIDTHS, dim=1))
    both = Statistics.beside(parts)
    return DataStatistics(both, both, parts, parts)


def build(x: Tensor, *, dead: bool = False, randomise: bool = True, **options: Any) -> Crosscoder:
    variant = Crosscoder(D, D, d_sae=D_SAE, **{"k": K, "k_aux": 3, **options}).double()
    variant.bind(RunSettings(100, 50, F64, sources=WIDTHS, target_sources=WIDTHS))
    variant.initialise(statistics(x), x, x, torch.Generator().manual_seed(0))
    if randomise:
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for parameter in variant.parameters():
                parameter.copy_(torch.randn(parameter.shape, dtype=F64, generator=generator) * 0.5)
    if dead:
        variant.tokens_since_fired[: D_SAE // 2] = 1000
        variant.list_dead()
    return variant


# Losses and gradients -----------------------------------------------------------------------------------------------


def norms(w: Tensor) -> list[Tensor]:
    return [part.pow(2).sum(1).sqrt() for part in w.split(WIDTHS, dim=1)]


def dense(variant: Crosscoder, x: Tensor, *, l1: float) -> tuple[dict[str, Tensor], Tensor, dict[str, Tensor]]:
    """Terms, latents, gradients; written from the papers' formulas over dense tensors."""
    p = {name: value.detach().clone().requires_grad_() for name, value in variant.named_parameters()}
    parts = x.split(WIDTHS, dim=1)
    scales = {"sqrt_d": lambda s: s.shape[1] ** 0.5 / s.norm(dim=1).mean(), "none": lambda s: 1.0}[variant.input_scale]
    scaled = torch.cat([part * scales(part) for part in parts], 1)
    pre = scaled @ p["W_enc"].T + p["b_enc"]
    if variant.sparsity == "l1":
        f = pre.relu()
    else:
        weight: Any = {
            "sum": lambda: sum(norms(p["W_dec"])),
            "joint": lambda: p["W_dec"].norm(dim=1),
            "none": lambda: torch.ones(D_SAE, dtype=F64),
        }[variant.selection_weight]()
        flat = (pre * weight).detach().flatten()
        mask = torch.zeros_like(flat, dtype=torch.bool)
        mask[flat.topk(K * len(x)).indices] = True
        f = pre.relu() * mask.view_as(pre)
    error = scaled - f @ p["W_dec"] - p["b_dec"]
    variances = [part.var(0, correction=0).sum() for part in scaled.split(WIDTHS, dim=1)]
    total, n = sum(variances), len(WIDTHS)
    terms: dict[str, Tensor] = {}
    for number, part in enumerate(error.split(WIDTHS, dim=1)):
        value = part.pow(2).sum(1).mean()
        if variant.source_loss == "variance":
            value = value / variances[number] * total / n
        terms[f"mse_{number}"] = value / total if variant.sparsity == "batch_topk" else value
    if variant.sparsity == "l1":
        terms["l1"] = l1 * (f * sum(norms(p["W_dec"]))).sum(1).mean()
    elif variant.auxk.coefficient > 0:
        terms["aux"] = torch.zeros((), dtype=F64)
        dead = variant.dead()
        if dead.any():
            dead_pre = torch.where(dead, pre, -torch.inf)
            kept = torch.zeros_like(pre, dtype=torch.bool).scatter(1, dead_pre.topk(3, dim=1).indices, True)
            root = variant.source_weight.sqrt()
            rebuilt = (torch.where(kept, pre, 0.0).relu() @ p["W_dec"]) * root
            left = error.detach() * root
            variance = (left - left.mean(0)).pow(2).sum()
            terms["aux"] = variant.auxk.coefficient * (left - rebuilt).pow(2).sum() / variance
    torch.stack(list(terms.values())).sum().backward()
    return terms, f, {name: value.grad for name, value in p.items() if value.grad is not None}


@pytest.mark.parametrize("source_loss", ["variance", "scale"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dead": True},
        {"selection_weight": "joint"},
        {"selection_weight": "none", "aux": 0.0},
        {"sparsity": "l1", "l1": 0.3},
        {"input_scale": "none"},
    ],
    ids=str,
)
def test_terms_and_gradients_equal_the_dense_formula(options: dict[str, Any], source_loss: str) -> None:
    x = rows()
    variant = build(x, source_loss=source_loss, **options)
    truth, latents, gradients = dense(variant, x, l1=0.3)
    out = variant.step(Batch(x, x), {"l1": 0.3})
    assert out.terms.keys() == truth.keys()
    torch.testing.assert_close(out.code.to_dense(), latents, rtol=1e-9, atol=1e-10)
    for name, value in truth.items():
        torch.testing.assert_close(out.terms[name], value, rtol=1e-9, atol=1e-10, msg=name)
    torch.stack(list(out.terms.values())).sum().backward()
    for name, parameter in variant.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-9, atol=1e-10, msg=name)


def test_under_variance_each_source_starts_at_its_share_whatever_its_size() -> None:
    x = rows(4000)
    terms = []
    for factor in (1.0, 1000.0):
        y = torch.cat([x[:, :5], x[:, 5:] * factor], 1)
        variant = build(y, randomise=False)
        with torch.no_grad():
            variant.W_dec.zero_()
        out = variant.step(Batch(y, y), {})
        terms.append([out.terms[f"mse_{number}"].item() for number in (0, 1)])
        torch.testing.assert_close(out.counters["squared_error"], (y - y.mean(0)).square().sum(), rtol=1e-6, atol=0)
    assert terms[0] == pytest.approx([0.5, 0.5], rel=1e-6)  # nothing but the mean: FVU 1, over two sources
    assert terms[1] == pytest.approx(terms[0], rel=1e-6)


@pytest.mark.parametrize("options", [{}, {"sparsity": "l1"}, {"selection_weight": "none"}], ids=str)
def test_the_fold_is_the_variant_above_its_threshold(options: dict[str, Any]) -> None:
    x = rows(200)
    variant = build(x, **options)
    with torch.no_grad():
        for _ in range(3):
            variant.step(Batch(x, x), {"l1": 0.0})
    sae = variant.fold()
    scaled = x * variant.scale
    pre = scaled @ variant.W_enc.T + variant.b_enc
    if variant.sparsity == "l1":
        f = pre.relu()
    else:
        weights = sum(norms(variant.W_dec)) if variant.selection_weight == "sum" else torch.ones(D_SAE, dtype=F64)
        assert variant.threshold.value > 0
        f = torch.where(pre * weights > variant.threshold.value, pre, 0.0)
    expected = (f @ variant.W_dec + variant.b_dec) / variant.target_scale
    torch.testing.assert_close(sae(x), expected.detach(), rtol=1e-9, atol=1e-9)
    active = sae.encode(x).to_dense() != 0
    assert torch.equal(active, f != 0)
    if variant.sparsity == "batch_topk":
        # Every step had the same rows, so the threshold is the value of the last one chosen, which rounding decides.
        assert K * len(x) - 1 <= int(active.sum()) <= K * len(x)


def test_gradients_are_finite_and_rows_without_decoder_are_never_chosen_for_their_length() -> None:
    x = rows()
    variant = build(x)
    with torch.no_grad():
        variant.W_dec[:3] = 0
        variant.b_enc[:3] = 1e4
    out = variant.step(Batch(x, x), {})
    torch.stack(list(out.terms.values())).sum().backward()
    assert all(
        bool(torch.isfinite(parameter.grad).all()) for parameter in variant.parameters() if parameter.grad is not None
    )
    assert not bool((out.code.indices < 3).any())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sparsity": "topk"}, "sparsity 'topk': expected 'batch_topk' or 'l1'"),
        ({"selection_weight": "max"}, "selection_weight 'max'"),
        ({"source_loss": "mean"}, "source_loss 'mean': expected 'variance' or 'scale'"),
        ({"k": 0}, "k = 0"),
        ({"k": 25}, "k = 25 with d_sae = 24"),
        ({"k": 4, "l1": -1.0}, "l1 = -1"),
        ({"k": 4, "aux": -1.0}, "aux = -1"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Crosscoder(D, D, d_sae=D_SAE, **options)


# Model diffing ------------------------------------------------------------------------------------------------------

N_FEATURES, WIDTH = 24, 24


def two_models(n: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows of two models with 24 orthonormal features: 8 in the first alone, 8 in both, 8 in the second alone.

    Four of the shared ones have the same direction in both, four another one. The second model is 10 times as large.
    """
    generator = torch.Generator().manual_seed(5)
    first = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator)).Q
    second = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator)).Q
    second[8:12] = first[8:12]
    first, second = first.clone(), second.clone()
    first[16:], second[:8] = 0, 0
    generator.manual_seed(seed)
    fires = torch.rand(n, N_FEATURES, generator=generator) < 0.08
    f = fires * (1 + torch.rand(n, N_FEATURES, generator=generator))
    return f @ first + 0.3, 10 * (f @ second) - 2, first, second


@pytest.fixture(scope="module")
def trained() -> saeforge.SAE:
    first, second, *_ = two_models(20_000)
    return saeforge.train(
        [first, second],
        variant="crosscoder",
        d_sae=48,
        k=2,
        tokens=512 * 1500,
        batch_size=512,
        lr=3e-3,
        progress=False,
    )


def test_latents_live_in_the_models_that_have_their_feature(trained: saeforge.SAE) -> None:
    *_, first, second = two_models(2)
    truth = torch.nn.functional.normalize(torch.cat([first, 10 * second], 1), dim=1)
    decoder = torch.nn.functional.normalize(trained.W_dec, dim=1)
    cosine, latents = (truth @ decoder.T).max(1)
    assert (cosine > 0.9).float().mean() > 0.8
    found = cosine > 0.9
    share = reading.relative_norms(trained)[latents, 1]
    difference = reading.norm_difference(trained)[latents]
    assert (share[:8][found[:8]] < 0.1).all()
    assert (share[16:][found[16:]] > 0.9).all()
    assert ((share[8:16] - 0.5).abs()[found[8:16]] < 0.1).all()
    assert (difference[:8][found[:8]] < 0.1).all()
    assert (difference[16:][found[16:]] > 0.9).all()
    same = reading.decoder_cosines(trained)[latents]
    assert (same[8:12][found[8:12]] > 0.9).all()
    assert (same[12:16][found[12:16]].abs() < 0.6).all()


def test_inference_has_the_batch_s_mean_number_of_latents(trained: saeforge.SAE) -> None:
    first, second, *_ = two_models(8192, seed=9)
    code = trained.encode(torch.cat([first, second], 1))
    assert float(code.l0().float().mean()) == pytest.approx(2.0, rel=0.02)


def test_norms_are_in_units_of_each_source(trained: saeforge.SAE) -> None:
    assert reading.source_widths(trained) == (WIDTH, WIDTH)
    raw, scaled = reading.source_norms(trained, unit="raw"), reading.source_norms(trained)
    first, second, *_ = two_models(20_000)
    rms = torch.stack([rows.square().sum(1).mean().sqrt() for rows in (first, second)])
    torch.testing.assert_close(raw / scaled, rms.expand(48, 2), rtol=0.02, atol=0)  # of the training rows: 9 in 10
    with pytest.raises(ConfigError, match="unit 'l2'"):
        reading.source_norms(trained, unit="l2")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="source 2: this crosscoder has 2"):
        reading.decoder_cosines(trained, 0, 2)


def test_an_sae_of_one_site_has_no_sources() -> None:
    one = saeforge.train(two_models(2048)[0], d_sae=48, k=2, tokens=512, batch_size=64, progress=False)
    with pytest.raises(ConfigError, match="reads one site"):
        reading.relative_norms(one)


def test_it_is_saved_and_loaded_without_this_package(trained: saeforge.SAE, tmp_path: Path) -> None:
    loaded = saeforge.load(trained.save(tmp_path / "sae"))
    assert loaded.rule == "threshold"
    assert torch.equal(reading.relative_norms(loaded), reading.relative_norms(trained))
    assert loaded.meta["variant"]["name"] == "crosscoder"


def test_a_resumed_variant_goes_on_to_the_same_threshold() -> None:
    x = rows()
    variant, other = build(x), build(x)
    with torch.no_grad():
        variant.step(Batch(x, x), {})
    other.load_state_dict(variant.state_dict())
    y = rows() * 0.5
    for each in (variant, other):
        with torch.no_grad():
            each.step(Batch(y, y), {})
    assert torch.equal(variant.threshold.value, other.threshold.value)
    assert variant.threshold.value > 0


@pytest.mark.parametrize("options", [{}, {"sparsity": "l1"}, {"selection_weight": "joint"}], ids=str)
def test_it_starts_from_its_own_fold(options: dict[str, Any]) -> None:
    x = rows(200)
    variant, other = build(x, **options), build(x, randomise=False, **options)
    with torch.no_grad():
        variant.step(Batch(x, x), {"l1": 0.0})
    sae = variant.fold()
    other.unfold_(sae)
    for name, tensor in other.fold().state_dict().items():
        torch.testing.assert_close(tensor, sae.state_dict()[name], rtol=1e-9, atol=1e-12, msg=name)
    if variant.sparsity == "batch_topk":
        with pytest.raises(ConfigError, match="starts from SAEs with thresholds of 0"):
            build(x, sparsity="l1").unfold_(sae)
