"""Matryoshka SAEs against a dense autograd reference in float64: one reconstruction after the other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from saeforge_matryoshka import Matryoshka
from saeforge_matryoshka.prefixes import group_ends, random_ends
from torch import Tensor

import saeforge
from saeforge.errors import ConfigError
from saeforge.variants import Batch, RunSettings

D, D_SAE, ROWS = 8, 24, 40


def build(dtype: torch.dtype = torch.float64, **options: Any) -> Matryoshka:
    """With random weights and scale 1."""
    given = {"d_sae": D_SAE, "k": 3, "k_aux": 3, "aux": 0.5, **options}
    if not given.get("random_prefixes"):
        given.setdefault("groups", [3, 5, 6])
    variant = Matryoshka(D, D, **given).double()
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
    p: dict[str, Tensor], x: Tensor, dead: Tensor, ends: list[int], weights: list[float], selection: str
) -> tuple[dict[str, Tensor], Tensor]:
    """The paper's formulas, nothing of saeforge: every prefix decoded by itself."""
    pre = (x - p["b_dec"]) @ p["W_enc"].T + p["b_enc"]
    flat = pre.detach().flatten() if selection == "batch_topk" else pre.detach()
    best = flat.argsort(dim=-1, descending=True, stable=True)[..., : 3 * (len(x) if flat.ndim == 1 else 1)]
    f = torch.relu(pre) * torch.zeros_like(flat).scatter(-1, best, 1.0).view_as(pre)
    errors = [x - (f[:, :end] @ p["W_dec"][:end] + p["b_dec"]) for end in ends]
    mse = sum(w * error.pow(2).sum(1).mean() for w, error in zip(weights, errors, strict=True))
    terms = {"mse": torch.as_tensor(mse) / sum(weights) / 1.7, "aux": torch.zeros((), dtype=x.dtype)}
    if dead.any():
        held = errors[-1].detach()
        among = torch.where(dead, pre, -torch.inf).detach().topk(min(3, int(dead.sum())), dim=1).indices
        values = torch.relu(pre) * torch.zeros_like(pre).scatter(1, among, 1.0)
        variance = (held - held.mean(0)).pow(2).sum(1).mean()
        terms["aux"] = 0.5 * (held - values @ p["W_dec"]).pow(2).sum(1).mean() / variance
    return terms, f


@pytest.mark.parametrize("mode", ["auto", "reference", "stock"])
@pytest.mark.parametrize("selection", ["batch_topk", "topk"])
@pytest.mark.parametrize(("dead", "weights"), [([], None), ([3, 7, 8, 11], [1.0, 0.5, 0.0, 2.0])])
def test_terms_latents_and_gradients_equal_the_dense_formulas(
    dead: list[int], weights: list[float] | None, selection: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAEFORGE_OPS", mode)
    for dtype, rtol in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        variant, mask = build(dtype, selection=selection, group_weights=weights), torch.zeros(D_SAE, dtype=torch.bool)
        mask[dead] = True
        variant.tokens_since_fired[mask] = 50
        variant.list_dead()
        p = {name: value.detach().double().clone().requires_grad_() for name, value in variant.named_parameters()}
        truth, f = dense(p, rows(), mask, [3, 8, 14, 24], weights or [1.0] * 4, selection)
        torch.stack(list(truth.values())).sum().backward()
        out = variant.step(Batch(rows(), rows()), {})
        torch.testing.assert_close(out.code.to_dense().double(), f.detach(), rtol=rtol, atol=rtol)
        whole = rows() - (f.detach() @ p["W_dec"] + p["b_dec"]).detach()
        torch.testing.assert_close(out.counters["squared_error"].double(), whole.pow(2).sum(), rtol=rtol, atol=rtol)
        for name, value in truth.items():
            torch.testing.assert_close(out.terms[name].double(), value.detach(), rtol=rtol, atol=rtol)
        torch.stack(list(out.terms.values())).sum().backward()
        for name, parameter in variant.named_parameters():
            bound = rtol * max(1.0, p[name].grad.abs().max().item())  # type: ignore[union-attr]
            torch.testing.assert_close(parameter.grad.double(), p[name].grad, rtol=0, atol=bound)  # type: ignore[union-attr]


def test_groups_are_widths_or_shares_and_the_rest_is_a_last_one() -> None:
    assert group_ends(None, 4096) == (128, 384, 896, 1920, 4096)
    assert group_ends([1 / 16, 1 / 16, 1 / 8, 1 / 4, 1 / 2], 4096) == (256, 512, 1024, 2048, 4096)
    assert group_ends([100, 200], 4096) == (100, 300, 4096)
    for wrong in ([], [0], [0.5, 0.6], [100, 0.5], [5000], [0.0001]):
        with pytest.raises(ConfigError, match="groups"):
            group_ends(wrong, 4096)


def test_random_prefixes_follow_their_law_and_are_the_same_on_every_rank() -> None:
    generator = torch.Generator().manual_seed(0)
    ends = torch.stack([random_ends(5, 1000, 0.5, generator) for _ in range(2000)])
    assert (ends[:, -1] == 1000).all()
    assert (ends.diff(dim=1) > 0).all()
    short = torch.stack([random_ends(5, 1000, 2.0, generator) for _ in range(2000)])
    assert short[:, :-1].double().mean() < 0.5 * ends[:, :-1].double().mean()
    one, two = (build(random_prefixes=4, d_sae=500) for _ in range(2))
    assert torch.equal(one._prefixes(), two._prefixes())
    first = one._prefixes()
    one.observe(one.step(Batch(rows(), rows()), {}).code)
    two.load_state_dict(one.state_dict())
    assert not torch.equal(one._prefixes(), first)
    assert torch.equal(one._prefixes(), two._prefixes())  # and after a resume


def nested_data(n: int, *, seed: int = 0) -> Tensor:
    """Four frequent directions and, beside one of them, 60 rare ones."""
    generator = torch.Generator().manual_seed(5)
    directions = torch.nn.functional.normalize(torch.randn(64, 32, generator=generator), dim=1)
    generator.manual_seed(seed)
    law = torch.cat([torch.full((4,), 0.5), torch.full((60,), 0.02)])
    active = torch.rand(n, 64, generator=generator) < law
    return (active * (0.5 + torch.rand(n, 64, generator=generator))) @ directions


def test_inner_dictionaries_reconstruct_and_the_whole_does_too() -> None:
    """An inner prefix alone explains far more of the rows than the same latents of a plain dictionary would."""
    shared: dict[str, Any] = {"k": 4, "d_sae": 96, "lr": 2e-3, "tokens": 1 << 19, "batch_size": 512, "progress": False}
    data, held_out = nested_data(1 << 15), nested_data(1 << 13, seed=1)
    explained = {}
    for name, groups in (("nested", [8]), ("plain", [96])):
        sae = saeforge.train(data, variant=Matryoshka, groups=groups, **shared)
        dense_code = sae.encode(held_out).to_dense()
        variance = (held_out - held_out.mean(0)).square().sum()
        inner = dense_code[:, :8] @ sae.W_dec[:8] + sae.b_dec
        explained[name] = 1 - (held_out - inner).square().sum() / variance
        assert 1 - (held_out - sae(held_out)).square().sum() / variance > 0.7
        assert sae.encode(held_out).l0().float().mean().item() == pytest.approx(4, rel=0.03)
    assert explained["nested"] > 0.3
    assert explained["nested"] > 2 * explained["plain"]


@pytest.mark.parametrize("selection", ["batch_topk", "topk"])
def test_it_starts_from_its_own_fold(selection: str) -> None:
    variant, other = (build(torch.float32, selection=selection) for _ in range(2))
    variant.constrain_()
    variant.threshold.value.fill_(0.3)
    sae = variant.fold()
    other.unfold_(sae)
    again = other.fold()
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        torch.testing.assert_close(getattr(again, name), getattr(sae, name), atol=1e-5, rtol=1e-5)
    assert again.rule == sae.rule
    if sae.threshold is not None:
        torch.testing.assert_close(again.threshold, sae.threshold)
    with pytest.raises(ConfigError, match="selection"):
        build(torch.float32, selection={"topk": "batch_topk", "batch_topk": "topk"}[selection]).unfold_(sae)


@pytest.mark.parametrize(
    "options",
    [{"k": 0}, {"selection": "all"}, {"group_weights": [1.0]}, {"random_prefixes": 1}, {"groups": [30]}, {"aux": -1}],
)
def test_wrong_options_are_named(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        build(**options)
