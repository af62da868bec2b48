"""BatchTopK against a dense autograd reference in float64, and what it promises of sparsity."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from saeforge_batchtopk import BatchTopKSAE
from torch import Tensor

import saeforge
from saeforge.errors import ConfigError
from saeforge.variants import Batch, RunSettings

D, D_SAE, ROWS = 8, 24, 40


def build(dtype: torch.dtype = torch.float64, **options: Any) -> BatchTopKSAE:
    """With random weights and scale 1."""
    variant = BatchTopKSAE(D, D, **{"d_sae": D_SAE, "k": 2.5, "k_aux": 3, "aux": 0.5, **options}).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in variant.parameters():
            parameter.copy_(torch.randn(parameter.shape, dtype=torch.float64, generator=generator) * 0.5)
    variant.mse_of_mean.fill_(1.7)
    variant.to(dtype).bind(RunSettings(100, 50, dtype))
    return variant


def rows(n: int = ROWS) -> Tensor:
    return torch.randn(n, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def dense(
    p: dict[str, Tensor], x: Tensor, k: float, dead: Tensor, *, k_aux: int = 3
) -> tuple[dict[str, Tensor], Tensor]:
    """The paper's formulas, nothing of saeforge."""
    pre = (x - p["b_dec"]) @ p["W_enc"].T + p["b_enc"]
    best = pre.detach().flatten().argsort(descending=True, stable=True)[: round(k * len(x))]
    chosen = torch.zeros(pre.numel(), dtype=torch.bool).scatter(0, best, True).view_as(pre)
    f = torch.relu(pre) * chosen
    error = x - (f @ p["W_dec"] + p["b_dec"])
    terms = {"mse": error.pow(2).sum(1).mean() / 1.7, "aux": torch.zeros((), dtype=x.dtype)}
    if dead.any():
        held = error.detach()
        among = torch.where(dead, pre, -torch.inf).detach().topk(min(k_aux, int(dead.sum())), dim=1).indices
        values = torch.relu(pre) * torch.zeros_like(pre).scatter(1, among, 1.0)
        variance = (held - held.mean(0)).pow(2).sum(1).mean()
        terms["aux"] = 0.5 * (held - values @ p["W_dec"]).pow(2).sum(1).mean() / variance
    return terms, f


@pytest.mark.parametrize("mode", ["auto", "reference", "stock"])
@pytest.mark.parametrize("dead", [[], [3, 7, 8, 11]])
def test_terms_latents_and_gradients_equal_the_dense_formulas(
    dead: list[int], mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAEFORGE_OPS", mode)
    for dtype, rtol in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        variant, mask = build(dtype), torch.zeros(D_SAE, dtype=torch.bool)
        mask[dead] = True
        variant.tokens_since_fired[mask] = 50
        variant.list_dead()
        p = {name: value.detach().double().clone().requires_grad_() for name, value in variant.named_parameters()}
        truth, f = dense(p, rows(), 2.5, mask)
        torch.stack(list(truth.values())).sum().backward()
        out = variant.step(Batch(rows(), rows()), {})
        torch.testing.assert_close(out.code.to_dense().double(), f.detach(), rtol=rtol, atol=rtol)
        for name, value in truth.items():
            torch.testing.assert_close(out.terms[name].double(), value.detach(), rtol=rtol, atol=rtol)
        torch.stack(list(out.terms.values())).sum().backward()
        for name, parameter in variant.named_parameters():
            bound = rtol * max(1.0, p[name].grad.abs().max().item())  # type: ignore[union-attr]
            torch.testing.assert_close(parameter.grad.double(), p[name].grad, rtol=0, atol=bound)  # type: ignore[union-attr]


def test_k_times_the_batch_are_active_at_any_k_of_the_schedule() -> None:
    variant = build(k=2, k_start=6, k_anneal_share=0.5)
    schedule = variant.schedules(100)["k"]
    assert [schedule(step) for step in (0, 25, 50, 99)] == [6, 4, 2, 2]
    assert variant.step(Batch(rows(), rows()), {"k": 4.0}).code.nnz == 4 * ROWS
    assert build().schedules(100) == {}


def sparse_data(n: int, *, seed: int = 0) -> Tensor:
    """Rows of a dictionary of 64 directions in 32 dimensions, about 3 active."""
    generator = torch.Generator().manual_seed(5)
    directions = torch.nn.functional.normalize(torch.randn(64, 32, generator=generator), dim=1)
    generator.manual_seed(seed)
    active = torch.rand(n, 64, generator=generator) < 3 / 64
    return (active * (0.5 + torch.rand(n, 64, generator=generator))) @ directions


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_in_use_as_many_latents_are_active_as_were_asked_for(precision: str) -> None:
    """The folded SAE on rows it never saw: within 2% of k, and it loads without the plugin."""
    sae = saeforge.train(
        sparse_data(1 << 15), variant=BatchTopKSAE, k=3, d_sae=96, lr=2e-3, tokens=1 << 19, batch_size=512,
        precision=precision, progress=False,
    )  # fmt: skip
    held_out = sparse_data(1 << 14, seed=1)
    assert sae.rule == "threshold"
    assert sae.encode(held_out).l0().float().mean().item() == pytest.approx(3, rel=0.02)
    error = (sae(held_out) - held_out).square().sum() / (held_out - held_out.mean(0)).square().sum()
    assert error < 0.12


def test_it_starts_from_its_own_fold() -> None:
    variant = build(torch.float32)
    variant.constrain_()
    variant.threshold.value.fill_(0.3)
    sae = variant.fold()
    other = build(torch.float32)
    other.unfold_(sae)
    again = other.fold()
    torch.testing.assert_close(again.W_enc, sae.W_enc)
    torch.testing.assert_close(again.b_enc, sae.b_enc, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(again.threshold, sae.threshold)
    with pytest.raises(ConfigError, match="one threshold for all"):
        other.unfold_(saeforge.SAE(sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec, rule="topk", k=2))


@pytest.mark.parametrize("options", [{"k": 0}, {"k": 25}, {"k_start": 30}, {"k_anneal_share": 1.5}, {"aux": -1}])
def test_wrong_options_are_named(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        build(**options)
