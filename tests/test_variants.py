"""Variants: losses and gradients of the papers, their initialisation, constraints and schedules, and an exact fold."""

from __future__ import annotations

import copy
import io
import math
import threading
from typing import Any

import pytest
import torch
from torch import Tensor

from saeforge.data.moments import Moments
from saeforge.errors import ConfigError, SaeforgeError
from saeforge.ops import Group, SparseCode
from saeforge.optim import RowAdam
from saeforge.variants import Batch, DataStatistics, Gated, L1ReLU, RunSettings, TopK, Variant
from saeforge.variants.start import geometric_median, random_unit_rows
from tests import oracle

F64 = torch.float64
D, D_SAE, ROWS = 6, 24, 15
CLASSES: list[type[Variant]] = [L1ReLU, TopK, Gated]
OPTIONS: dict[type[Variant], dict[str, Any]] = {
    L1ReLU: {"l1": 0.7},
    TopK: {"k": 4, "k_aux": 3},
    Gated: {"l1": 0.3},
}


def rows(n: int = 400, d: int = D, seed: int = 1) -> Tensor:
    """Anisotropic float64 rows far from the origin."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, dtype=F64, generator=generator) * torch.linspace(0.5, 4, d, dtype=F64) + 3.0


def statistics(x: Tensor, target: Tensor | None = None) -> DataStatistics:
    first = Moments.of(x.numpy()).statistics()
    return DataStatistics(first, first if target is None else Moments.of(target.numpy()).statistics())


def build(cls: type[Variant], *, seed: int = 0, dtype: torch.dtype = F64, d_out: int = D, **options: Any) -> Variant:
    """A bound variant with random parameters (none zero, decoder rows not of norm 1) and scale 1."""
    variant = cls(D, d_out, d_sae=D_SAE, **{**OPTIONS[cls], **options}).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in variant.parameters():
            parameter.copy_(torch.randn(parameter.shape, dtype=F64, generator=generator) * 0.5)
    if isinstance(variant, TopK):
        variant.mse_of_mean.fill_(1.7)
    variant.to(dtype)
    variant.bind(RunSettings(100, 50, dtype))
    return variant


def oracle_terms(
    variant: Variant, batch: Batch, l1: float, dead: Tensor | None = None
) -> tuple[dict[str, Tensor], ...]:
    """Terms, the latents, and all gradients of the sum of the terms, in float64 from the papers' formulas."""
    p = {name: value.detach().double().clone().requires_grad_() for name, value in variant.named_parameters()}
    x, target = batch.x.double() * variant.scale.double(), batch.target.double() * variant.target_scale.double()
    weight = None if batch.weight is None else batch.weight.double()
    if isinstance(variant, L1ReLU):
        terms, f = oracle.l1_relu(p, x, target, l1=l1, pre_bias=variant.pre_bias, weight=weight)
    elif isinstance(variant, Gated):
        terms, f = oracle.gated(p, x, target, l1=l1, pre_bias=variant.pre_bias, weight=weight)
    else:
        assert isinstance(variant, TopK)
        terms, f = oracle.topk(
            p,
            x,
            target,
            k=variant.k,
            mse_of_mean=variant.mse_of_mean.item(),
            aux=variant.auxk.coefficient,
            k_aux=variant.auxk.k,
            dead=torch.zeros(D_SAE, dtype=torch.bool) if dead is None else dead,
            pre_bias=variant.pre_bias,
            weight=weight,
        )
    torch.stack(list(terms.values())).sum().backward()
    gradients = {name: torch.zeros_like(value) if value.grad is None else value.grad for name, value in p.items()}
    return {k: v.detach() for k, v in terms.items()}, {"f": f.detach()}, gradients


def assert_equals_oracle(variant: Variant, batch: Batch, *, rtol: float, dead: Tensor | None = None) -> None:
    l1 = float(getattr(variant, "l1", 0.0))
    truth, latents, gradients = oracle_terms(variant, batch, l1, dead)
    variant.zero_grad()
    out = variant.step(batch, {"l1": l1})
    assert out.terms.keys() == truth.keys()
    torch.testing.assert_close(out.code.to_dense().double(), latents["f"], rtol=rtol, atol=rtol)
    for name, value in truth.items():
        torch.testing.assert_close(out.terms[name].double(), value, rtol=rtol, atol=rtol, msg=f"term {name}")
    torch.stack(list(out.terms.values())).sum().backward()
    for name, parameter in variant.named_parameters():
        found = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        bound = rtol * max(1.0, gradients[name].abs().max().item())
        torch.testing.assert_close(found.double(), gradients[name], rtol=0, atol=bound, msg=f"gradient of {name}")


# Loss terms and gradients -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["auto", "reference", "stock", "native"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("cls", CLASSES)
def test_terms_and_every_gradient_equal_the_dense_oracle(
    cls: type[Variant], weighted: bool, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAEFORGE_OPS", mode)
    x = rows(ROWS)
    weight = torch.rand(ROWS, dtype=F64) if weighted else None
    if weight is not None:
        weight[2] = 0
    for dtype, rtol in ((F64, 1e-10), (torch.float32, 1e-5)):
        assert_equals_oracle(build(cls, dtype=dtype), Batch(x, x, weight), rtol=rtol)


def test_l1_relu_with_a_pre_encoder_bias_equals_the_dense_oracle() -> None:
    x = rows(ROWS)
    assert_equals_oracle(build(L1ReLU, pre_bias=True), Batch(x, x), rtol=1e-10)


@pytest.mark.parametrize("mode", ["auto", "reference", "stock"])
@pytest.mark.parametrize("dead", [None, [3, 7, 8]])
def test_multi_topk_is_the_sum_of_two_top_k_losses(
    dead: list[int] | None, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one encoder product, one selection and one gradient of each weight (Gao et al. 2024, section 5.4)."""
    monkeypatch.setenv("SAEFORGE_OPS", mode)
    x = rows(ROWS)
    for dtype, rtol in ((F64, 1e-10), (torch.float32, 1e-5)):
        variant = build(TopK, dtype=dtype, multi_k=2, multi_k_weight=0.25)
        assert isinstance(variant, TopK)
        mask = torch.zeros(D_SAE, dtype=torch.bool)
        if dead is not None:
            mask[dead] = True
            variant.tokens_since_fired[mask] = 50
            variant.list_dead()
        p = {name: value.detach().double().clone().requires_grad_() for name, value in variant.named_parameters()}
        shared: dict[str, Any] = {"mse_of_mean": variant.mse_of_mean.item(), "k_aux": variant.auxk.k, "dead": mask}
        narrow, f = oracle.topk(p, x, x, k=variant.k, aux=variant.auxk.coefficient, **shared)
        wide, _ = oracle.topk(p, x, x, k=2 * variant.k, aux=0.0, **shared)
        truth = {**narrow, "multi_mse": 0.25 * wide["mse"]}
        torch.stack(list(truth.values())).sum().backward()
        out = variant.step(Batch(x, x), {})
        assert out.terms.keys() == truth.keys()
        assert out.code.k == variant.k
        torch.testing.assert_close(out.code.to_dense().double(), f.detach(), rtol=rtol, atol=rtol)
        for name, value in truth.items():
            torch.testing.assert_close(out.terms[name].double(), value.detach(), rtol=rtol, atol=rtol, msg=name)
        torch.stack(list(out.terms.values())).sum().backward()
        for name, parameter in variant.named_parameters():
            truth_of, found = p[name].grad, parameter.grad
            assert truth_of is not None
            assert found is not None
            bound = rtol * max(1.0, truth_of.abs().max().item())
            torch.testing.assert_close(found.double(), truth_of, rtol=0, atol=bound, msg=name)


def test_k_falls_linearly_and_stays() -> None:
    variant = TopK(D, D, d_sae=D_SAE, k=2, k_start=8, k_anneal_share=0.5)
    schedule = variant.schedules(100)["k"]
    assert [schedule(step) for step in (0, 25, 50, 99)] == [8, 5, 2, 2]
    assert TopK(D, D, d_sae=D_SAE, k=2).schedules(100) == {}
    built = build(TopK, k=2, k_start=8)
    assert built.step(Batch(rows(ROWS), rows(ROWS)), {"k": 5}).code.k == 5
    wrong: list[dict[str, Any]] = [
        {"k_start": 0},
        {"k_start": D_SAE + 1},
        {"k_anneal_share": 2.0},
        {"multi_k": 1},
        {"multi_k": D_SAE},
    ]
    for options in wrong:
        with pytest.raises(ConfigError, match="expected"):
            TopK(D, D, d_sae=D_SAE, k=2, **options)


@pytest.mark.parametrize("cls", CLASSES)
def test_scaled_inputs_and_a_transcoder_of_other_width_equal_the_dense_oracle(cls: type[Variant]) -> None:
    x, target = rows(ROWS), rows(ROWS, 4, seed=2) - 7
    options: dict[str, Any] = {} if cls is L1ReLU else {"pre_bias": False}
    variant = build(cls, d_out=4, **options)
    variant.set_scale(statistics(x, target))
    assert variant.scale.item() != variant.target_scale.item()
    out = variant.step(Batch(x, target), {"l1": 0.1})
    assert_equals_oracle(variant, Batch(x, target), rtol=1e-10)
    p = dict(variant.named_parameters())
    x_hat = (out.code.to_dense() @ p["W_dec"] + p["b_dec"]) / variant.target_scale
    torch.testing.assert_close(out.counters["squared_error"], (target - x_hat).square().sum().detach())  # raw units


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("n_dead", [0, 1, 3, 10, D_SAE])  # none, fewer than k_aux, exactly, more, all
def test_auxk_of_the_dead_latents_equals_the_dense_oracle(n_dead: int, weighted: bool) -> None:
    variant = build(TopK, aux=0.5)
    dead = torch.zeros(D_SAE, dtype=torch.bool)
    dead[torch.randperm(D_SAE)[:n_dead]] = True
    variant.tokens_since_fired[dead] = 50  # dead_after_tokens: exactly at the limit counts
    variant.tokens_since_fired[~dead] = 49
    assert torch.equal(variant.dead(), dead)
    variant.list_dead()
    assert torch.equal(variant.dead_latents(), dead.nonzero()[:, 0])
    x, weight = rows(ROWS), torch.rand(ROWS, dtype=F64) if weighted else None
    assert_equals_oracle(variant, Batch(x, x, weight), rtol=1e-10, dead=dead)
    aux = variant.step(Batch(x, x, weight), {}).terms["aux"].item()
    assert (aux > 0) == (n_dead > 0)


def test_auxk_ties_go_to_the_lowest_dead_latent() -> None:
    variant = build(TopK, aux=0.5, k_aux=3)
    assert isinstance(variant, TopK)
    dead = torch.zeros(D_SAE, dtype=torch.bool)
    dead[[5, 9, 12, 17, 20]] = True
    with torch.no_grad():
        variant.W_enc[dead], variant.b_enc[dead] = variant.W_enc[5].clone(), 100.0  # all tie, and all would fire
    variant.tokens_since_fired[dead] = 10**6
    variant.list_dead()
    x = rows(ROWS)
    assert_equals_oracle(variant, Batch(x, x), rtol=1e-10, dead=dead)


def test_auxk_of_a_perfect_reconstruction_or_a_single_row_is_zero_not_nan() -> None:
    variant = build(TopK, aux=0.5)
    variant.tokens_since_fired.fill_(10**6)
    variant.list_dead()
    x = rows(1)
    assert variant.step(Batch(x, x), {}).terms["aux"].item() == 0
    variant.eval()
    assert isinstance(variant, TopK)
    with torch.no_grad():
        variant.W_dec.zero_()
        variant.b_dec.copy_(x[0])
    assert variant.step(Batch(x.expand(5, -1), x.expand(5, -1)), {}).terms["aux"].item() == 0


def test_auxk_trains_only_dead_rows_of_the_decoder_and_not_its_bias_through_the_target() -> None:
    variant = build(TopK, aux=0.5)
    assert isinstance(variant, TopK)
    variant.tokens_since_fired[:5] = 10**6
    variant.list_dead()
    x = rows(ROWS)
    variant.step(Batch(x, x), {}).terms["aux"].backward()
    assert variant.W_dec.grad is not None
    assert variant.W_dec.grad[:5].any()
    assert not variant.W_dec.grad[5:].any()


def test_gated_stop_gradients() -> None:
    x = rows(ROWS)
    untouched = {
        "mse": ["b_gate"],
        "l1": ["W_dec", "r_mag", "b_mag"],
        "aux": ["W_dec", "r_mag", "b_mag"],
    }
    touched = {"mse": ["W_dec", "W_gate", "r_mag", "b_mag"], "l1": ["W_gate", "b_gate"], "aux": ["W_gate", "b_gate"]}
    for term, names in untouched.items():
        variant = build(Gated)
        variant.step(Batch(x, x), {"l1": 0.3}).terms[term].backward()
        gradients = {name: parameter.grad for name, parameter in variant.named_parameters()}
        for name in names:
            gradient = gradients[name]
            assert gradient is None or gradient.abs().max() < 1e-12, f"{term} reaches {name}"
        for name in touched[term]:
            gradient = gradients[name]
            assert gradient is not None, f"{term} misses {name}"
            assert gradient.any(), f"{term} misses {name}"


@pytest.mark.parametrize("cls", CLASSES)
def test_bf16_product_changes_the_loss_only_by_rounding(cls: type[Variant]) -> None:
    x = rows(256).float()
    variant = cls(D, D, d_sae=D_SAE, **OPTIONS[cls])
    variant.initialise(statistics(x.double()), x, x, torch.Generator().manual_seed(0))
    totals = []
    for dtype in (torch.float32, torch.bfloat16):
        variant.bind(RunSettings(100, 50, dtype))
        out = variant.step(Batch(x, x), {"l1": 0.1})
        assert all(term.dtype == torch.float32 for term in out.terms.values())
        totals.append(sum(term.item() for term in out.terms.values()))
    assert totals[0] != totals[1]
    assert totals[1] == pytest.approx(totals[0], rel=0.02)


# Several ranks ----------------------------------------------------------------------------------------------------


class ThreadGroup(Group):
    """Ranks as threads of this process: sums through a barrier, as all-reduce would."""

    def __init__(self, size: int, rank: int, slots: list[Tensor], barrier: threading.Barrier) -> None:
        super().__init__(size, rank)
        self.slots, self.lock = slots, barrier

    def sum(self, tensor: Tensor) -> Tensor:
        self.slots[self.rank] = tensor.detach()
        self.lock.wait()
        total = torch.stack(self.slots).sum(0)
        self.lock.wait()
        return total


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("cls", CLASSES)
def test_the_mean_over_two_ranks_is_the_loss_and_gradient_of_the_whole_batch(
    cls: type[Variant], weighted: bool
) -> None:
    x = rows(ROWS + 1)
    weight = torch.rand(len(x), dtype=F64) if weighted else None
    options: dict[str, Any] = {"aux": 0.5} if cls is TopK else {}

    def fresh() -> Variant:
        variant = build(cls, **options)
        variant.tokens_since_fired[::3] = 10**6
        variant.list_dead()
        return variant

    def run(variant: Variant, part: slice, losses: list[Tensor]) -> None:
        out = variant.step(Batch(x[part], x[part], None if weight is None else weight[part]), {"l1": 0.3})
        loss = torch.stack(list(out.terms.values())).sum()
        loss.backward()
        variant.observe(out.code)
        losses.append(loss.detach())

    whole, whole_loss = fresh(), list[Tensor]()
    run(whole, slice(None), whole_loss)
    slots, barrier = [torch.zeros(())] * 2, threading.Barrier(2, timeout=30)
    ranks, losses = [fresh(), fresh()], list[Tensor]()
    for rank, variant in enumerate(ranks):
        variant.bind(RunSettings(100, 50, F64, ThreadGroup(2, rank, slots, barrier)))
    parts = [slice(0, len(x) // 2), slice(len(x) // 2, None)]
    threads = [threading.Thread(target=run, args=(v, p, losses)) for v, p in zip(ranks, parts, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.testing.assert_close(torch.stack(losses).mean(), whole_loss[0], rtol=1e-12, atol=0)
    for (name, a), b, c in zip(whole.named_parameters(), ranks[0].parameters(), ranks[1].parameters(), strict=True):
        assert a.grad is not None
        assert b.grad is not None
        assert c.grad is not None
        torch.testing.assert_close((b.grad + c.grad) / 2, a.grad, rtol=1e-10, atol=1e-12, msg=name)
    for variant in ranks:
        assert torch.equal(variant.firing_counts, whole.firing_counts)
        assert torch.equal(variant.tokens_since_fired, whole.tokens_since_fired)


# Initialisation ---------------------------------------------------------------------------------------------------


def initialised(cls: type[Variant], x: Tensor, target: Tensor | None = None, **options: Any) -> Variant:
    target = x if target is None else target
    variant = cls(x.shape[1], target.shape[1], d_sae=64, **{**OPTIONS[cls], **options}).double()
    stats = statistics(x, None if target is x else target)
    variant.initialise(stats, x, target, torch.Generator().manual_seed(5))
    variant.bind(RunSettings(100, 50, F64))
    return variant


def test_l1_relu_starts_tied_with_rows_of_the_asked_norm_and_zero_biases() -> None:
    p = dict(initialised(L1ReLU, rows(), decoder_init_norm=0.25).named_parameters())
    torch.testing.assert_close(p["W_dec"].norm(dim=1), torch.full((64,), 0.25, dtype=F64), rtol=1e-6, atol=0)
    assert torch.equal(p["W_enc"], p["W_dec"])
    assert not p["b_enc"].any()
    assert not p["b_dec"].any()


def test_gated_starts_tied_with_unit_rows_and_everything_else_zero() -> None:
    p = dict(initialised(Gated, rows()).named_parameters())
    torch.testing.assert_close(p["W_dec"].norm(dim=1), torch.ones(64, dtype=F64), rtol=1e-6, atol=0)
    assert torch.equal(p["W_gate"], p["W_dec"])
    assert not any(p[name].any() for name in ("b_gate", "r_mag", "b_mag", "b_dec"))


def test_topk_starts_with_unit_rows_the_geometric_median_and_norm_preserving_probes() -> None:
    x = rows(1000, 32)
    x[0] += 1e4  # an outlier moves the mean, not the geometric median
    variant = initialised(TopK, x, k=5, encoder_init="unit_probes")
    p = dict(variant.named_parameters())
    torch.testing.assert_close(p["W_dec"].norm(dim=1), torch.ones(64, dtype=F64), rtol=1e-6, atol=0)
    ratio = p["W_enc"] / p["W_dec"]
    torch.testing.assert_close(ratio, ratio[0, 0].expand_as(ratio))  # tied up to one scalar
    assert not p["b_enc"].any()
    median = oracle.geometric_median(x * variant.scale)
    torch.testing.assert_close(p["b_dec"].detach(), median, rtol=1e-4, atol=1e-5)

    def mean_norm(probes: Tensor) -> float:
        at = (p["b_dec"] + probes) / variant.scale
        code = variant.step(Batch(at, at), {}).code
        return (code.to_dense() @ p["W_dec"]).norm(dim=1).mean().item()

    generator = torch.Generator().manual_seed(5)
    random_unit_rows(64, 32, generator)
    assert mean_norm(random_unit_rows(256, 32, generator)) == pytest.approx(1, rel=1e-6)
    assert mean_norm(random_unit_rows(4096, 32, torch.Generator().manual_seed(77))) == pytest.approx(1, rel=0.05)


def test_topk_least_squares_start_reconstructs_best_of_all_factors() -> None:
    x = rows(1000, 32)
    variant = initialised(TopK, x, k=5)
    p = dict(variant.named_parameters())
    ratio = p["W_enc"] / p["W_dec"]
    torch.testing.assert_close(ratio, ratio[0, 0].expand_as(ratio))

    def error(factor: float) -> float:
        with torch.no_grad():
            p["W_enc"].mul_(factor)
            found = variant.step(Batch(x, x), {}).terms["mse"].item()
            p["W_enc"].div_(factor)
        return found

    best = error(1.0)
    assert all(error(factor) > best for factor in (0.5, 0.9, 0.99, 1.01, 1.1, 2.0))
    tied = dict(initialised(TopK, x, k=5, encoder_init="tied").named_parameters())
    assert torch.equal(tied["W_enc"], tied["W_dec"])


def test_topk_predicting_the_mean_has_mse_exactly_one() -> None:
    x = rows()
    variant = initialised(TopK, x, aux=0)
    assert isinstance(variant, TopK)
    with torch.no_grad():
        variant.W_dec.zero_()
        variant.b_dec.copy_(x.mean(0) * variant.scale)
    assert variant.step(Batch(x, x), {}).terms["mse"].item() == pytest.approx(1, rel=1e-10)


def test_topk_transcoder_centres_its_encoder_on_the_mean_input() -> None:
    x, target = rows(), rows(d=4, seed=2)
    variant = initialised(TopK, x, target, pre_bias=False)
    assert isinstance(variant, TopK)
    torch.testing.assert_close(
        variant.W_enc @ (x.mean(0) * variant.scale) + variant.b_enc, torch.zeros(64, dtype=F64), rtol=0, atol=1e-12
    )
    assert variant.W_enc.shape == (64, D)
    assert variant.W_dec.shape == (64, 4)


@pytest.mark.parametrize("dimensions", [1, 3])
def test_geometric_median_minimises_the_sum_of_distances(dimensions: int) -> None:
    x = torch.randn(101, dimensions, dtype=F64).exp()
    found, truth = geometric_median(x), oracle.geometric_median(x)

    def total(at: Tensor) -> float:
        return (x - at).norm(dim=1).sum().item()

    assert total(found) <= total(truth) * (1 + 1e-6)
    assert total(found) < total(x.mean(0)) * 0.999


@pytest.mark.parametrize("cls", CLASSES)
def test_initialisation_is_a_function_of_its_arguments_alone(cls: type[Variant]) -> None:
    x = rows()
    first = initialised(cls, x)
    torch.manual_seed(123)
    torch.randn(10)
    second = initialised(cls, x)
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("kind", ["rms", "sqrt_d", "none"])
def test_input_scale_makes_the_promised_norm(cls: type[Variant], kind: str) -> None:
    x = rows()
    variant = initialised(cls, x, input_scale=kind)
    scaled = variant.scaled(Batch(x, x))[0]
    measured = {
        "rms": scaled.square().sum(1).mean().item(),
        "sqrt_d": scaled.norm(dim=1).mean().item() / math.sqrt(D),
        "none": variant.scale.item(),
    }
    assert measured[kind] == pytest.approx(1, rel=1e-12)


# Constraint, schedules, counting ----------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", CLASSES)
def test_decoder_rows_keep_norm_one_under_row_adam_exactly_where_the_paper_says(cls: type[Variant]) -> None:
    x = rows()
    variant = initialised(cls, x)
    optimizer = RowAdam(variant.param_groups(), lr=1e-2)
    for _ in range(5):
        optimizer.zero_grad()
        torch.stack(list(variant.step(Batch(x, x), {"l1": 0.1}).terms.values())).sum().backward()
        optimizer.step()
    norms = dict(variant.named_parameters())["W_dec"].detach().norm(dim=1)
    if cls is L1ReLU:
        assert (norms - 0.1).abs().max() > 1e-3
    else:
        torch.testing.assert_close(norms, torch.ones_like(norms), rtol=1e-12, atol=0)
    listed = [id(p) for group in variant.param_groups() for p in group["params"]]
    assert sorted(listed) == sorted(id(p) for p in variant.parameters())


def slope(weight: Tensor) -> Tensor:
    """The gradient of a weight that has one."""
    assert weight.grad is not None
    return weight.grad


def test_free_decoder_norms_measure_latents_along_unit_rows() -> None:
    """The loss is that of unit rows and an encoder lengthened by theirs; lengths trade off without a gradient."""
    x = rows()[:ROWS]
    free, unit = (build(TopK, decoder_norm=norm, aux=0.5) for norm in ("free", "unit"))
    assert isinstance(free, TopK)
    assert isinstance(unit, TopK)
    with torch.no_grad():
        norm = free.W_dec.norm(dim=1)
        unit.W_enc.copy_(free.W_enc * norm[:, None])
        unit.b_enc.copy_(free.b_enc * norm)
        unit.W_dec.copy_(free.W_dec / norm[:, None])
        unit.b_dec.copy_(free.b_dec)
    losses = []
    for variant in (free, unit):
        variant.tokens_since_fired[[1, 5]] = 50
        variant.list_dead()
        out = variant.step(Batch(x, x), {})
        assert out.terms["aux"] > 0
        losses.append(torch.stack(list(out.terms.values())).sum())
        losses[-1].backward()
    torch.testing.assert_close(losses[0], losses[1])
    enc, bias, dec, b_dec = (slope(weight) for weight in (free.W_enc, free.b_enc, free.W_dec, free.b_dec))
    torch.testing.assert_close(enc, slope(unit.W_enc) * norm[:, None])
    torch.testing.assert_close(b_dec, slope(unit.b_dec))
    # A longer row with a shorter encoder is the same latent.
    along = (dec * free.W_dec).sum(1) - (enc * free.W_enc).sum(1) - bias * free.b_enc
    torch.testing.assert_close(along, torch.zeros_like(along), atol=1e-12, rtol=0)
    torch.testing.assert_close(free.fold().W_dec, unit.fold().W_dec)
    torch.testing.assert_close(free.fold().W_enc, unit.fold().W_enc)


def test_free_rows_start_short_and_are_reset_to_the_length_of_the_others() -> None:
    x = rows()
    variant = build(TopK, decoder_norm="free")
    assert isinstance(variant, TopK)
    variant.initialise(statistics(x), x, x, torch.Generator().manual_seed(0))
    torch.testing.assert_close(variant.W_dec.norm(dim=1), torch.full((D_SAE,), 0.1, dtype=F64))
    assert torch.equal(variant.W_enc, variant.W_dec)
    assert not variant.b_dec.any()
    assert all(group["constraint"] is None for group in variant.param_groups())
    with torch.no_grad():
        variant.W_dec[5:].mul_(3)
    variant.reset_latents_(torch.tensor([0, 1]), x[:2], x[:2])
    others = variant.W_dec[2:].norm(dim=1).mean()
    torch.testing.assert_close(variant.W_dec[:2].norm(dim=1), others.expand(2))


@pytest.mark.parametrize("cls", [TopK, Gated])
def test_constrain_restores_unit_rows_after_any_other_optimizer(cls: type[Variant]) -> None:
    variant = build(cls)
    before = {name: value.detach().clone() for name, value in variant.named_parameters()}
    variant.constrain_()
    for name, value in variant.named_parameters():
        expected = before[name] / before[name].norm(dim=1, keepdim=True) if name == "W_dec" else before[name]
        torch.testing.assert_close(value.detach(), expected, rtol=1e-14, atol=0)


def test_schedules_and_recipes_are_those_of_the_papers() -> None:
    l1 = L1ReLU(D, D, d_sae=8, l1=5.0).schedules(1000)["l1"]
    assert [l1(step) for step in (0, 25, 50, 51, 999)] == [0.0, 2.5, 5.0, 5.0, 5.0]  # over the first 5%
    gate = Gated(D, D, d_sae=8, l1=0.2, l1_warmup_share=0.5).schedules(10)["l1"]
    assert [gate(step) for step in (0, 1, 5, 9)] == pytest.approx([0, 0.04, 0.2, 0.2])
    assert Gated(D, D, d_sae=8, l1=0.2).schedules(10)["l1"](0) == 0.2
    assert TopK(D, D, d_sae=8, k=2).schedules(10) == {}
    recipe = L1ReLU(D, D).recipe(1000)
    assert (recipe.lr, recipe.betas, recipe.decay_steps, recipe.max_grad_norm) == (5e-5, (0.9, 0.999), 200, 1.0)
    recipe = TopK(D, D, d_sae=2**16).recipe(1000)
    assert recipe.lr == pytest.approx(1e-4)  # 2e-4 at 2^14 latents, falling with the square root
    assert (recipe.eps, recipe.warmup_steps, recipe.decay_steps) == (6.25e-10, 0, 0)
    recipe = Gated(D, D).recipe(100_000)
    assert (recipe.lr, recipe.betas, recipe.warmup_steps) == (3e-4, (0.0, 0.999), 1000)


def test_k_aux_defaults_to_the_power_of_two_near_half_the_width() -> None:
    widths = {1: 1, 2: 1, 384: 256, 768: 512, 1024: 512, 4096: 2048}
    found = {}
    for d in widths:
        variant = TopK(d, d, d_sae=8, k=1)
        found[d] = variant.auxk.k
    assert found == widths


def test_silent_latents_are_counted_in_tokens_and_fired_ones_start_again() -> None:
    variant = build(L1ReLU)
    code = SparseCode.from_dense(torch.eye(4, D_SAE))
    variant.observe(code)
    variant.observe(SparseCode.from_dense(torch.zeros(46, D_SAE)))
    assert variant.tokens_since_fired.tolist() == [46] * 4 + [50] * (D_SAE - 4)
    assert variant.dead().tolist() == [False] * 4 + [True] * (D_SAE - 4)
    variant.observe(code.with_values(torch.tensor([1.0, 0.0, -1.0, 0.0])))  # selected with value 0 is silent
    assert variant.tokens_since_fired.tolist()[:5] == [0, 50, 0, 50, 54]
    assert variant.firing_counts.tolist()[:5] == [2, 1, 2, 1, 0]


# Fold -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["rms", "sqrt_d", "none"])
@pytest.mark.parametrize("transcoder", [False, True])
@pytest.mark.parametrize("cls", CLASSES)
def test_the_folded_sae_has_the_same_latents_and_reconstruction_on_raw_rows(
    cls: type[Variant], transcoder: bool, kind: str
) -> None:
    x = rows()
    target = rows(d=4, seed=2) * 30 if transcoder else x
    options: dict[str, Any] = {"pre_bias": False} if transcoder and cls is not L1ReLU else {}
    variant = initialised(cls, x, target, input_scale=kind, **options)
    optimizer = RowAdam(variant.param_groups(), lr=1e-2)
    for _ in range(4):
        optimizer.zero_grad()
        torch.stack(list(variant.step(Batch(x, target), {"l1": 0.02}).terms.values())).sum().backward()
        optimizer.step()
    with torch.no_grad():
        for name, parameter in variant.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * (0.1 if kind == "rms" else 0.5))
            elif cls is L1ReLU and name == "W_dec":
                parameter.mul_(torch.rand(len(parameter), 1, dtype=F64) + 0.5)
                parameter[3] = 0  # a latent without a direction
    _, latents, _ = oracle_terms(variant, Batch(x, target), 0.0)
    f = latents["f"]
    p = {name: value.detach() for name, value in variant.named_parameters()}
    expected = (f @ p["W_dec"] + p["b_dec"]) / variant.target_scale
    sae = variant.fold()
    code = sae.encode(x)
    assert 0 < (f != 0).double().mean() < 1
    assert torch.equal(code.to_dense() != 0, f != 0)
    torch.testing.assert_close(sae(x), expected, rtol=1e-9, atol=1e-9)
    raw = f[:, :, None] * p["W_dec"] / variant.target_scale  # each latent's own part of the output, not only their sum
    torch.testing.assert_close(code.to_dense()[:, :, None] * sae.W_dec, raw, rtol=1e-9, atol=1e-9)
    if sae.rule == "threshold":
        norms = sae.W_dec.norm(dim=1)[p["W_dec"].norm(dim=1) > 0]
        torch.testing.assert_close(norms, torch.ones_like(norms))


def test_a_fold_shares_no_memory_with_the_variant() -> None:
    for cls in CLASSES:
        variant = build(cls)
        sae, before = variant.fold(), {k: v.clone() for k, v in variant.fold().state_dict().items()}
        with torch.no_grad():
            for parameter in variant.parameters():
                parameter.add_(1)
        assert all(torch.equal(value, before[name]) for name, value in sae.state_dict().items())


# Objects and errors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", CLASSES)
def test_copies_pickles_and_state_dicts_are_the_same_variant(cls: type[Variant]) -> None:
    variant = build(cls)
    variant.tokens_since_fired[::2] = 7
    file = io.BytesIO()
    torch.save(variant, file)
    file.seek(0)
    twin = build(cls, seed=9)
    twin.load_state_dict(variant.state_dict())
    x = rows(ROWS)
    expected = variant.step(Batch(x, x), {"l1": 0.3}).terms
    for other in (copy.deepcopy(variant), torch.load(file, weights_only=False), twin):
        assert other.arguments == variant.arguments
        assert torch.equal(other.tokens_since_fired, variant.tokens_since_fired)
        terms = other.step(Batch(x, x), {"l1": 0.3}).terms
        assert {k: v.item() for k, v in terms.items()} == {k: v.item() for k, v in expected.items()}


def test_arguments_record_what_was_given_and_the_defaults() -> None:
    assert TopK(6, d_out=6, d_sae=32, k=4).arguments == {
        "d_in": 6,
        "d_out": 6,
        "d_sae": 32,
        "k": 4,
        "k_start": None,
        "k_anneal_share": 0.1,
        "multi_k": None,
        "multi_k_weight": 1 / 8,
        "aux": 1 / 32,
        "encoder_init": "least_squares",
        "k_aux": None,
        "pre_bias": True,
        "input_scale": "rms",
        "decoder_norm": "unit",
    }


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        (TopK, {"d_sae": 0}, "d_sae = 0"),
        (TopK, {"d_sae": 8, "k": 9}, "k = 9 with d_sae = 8"),
        (TopK, {"k": 0}, "k = 0"),
        (TopK, {"aux": -1.0}, "aux = -1.0"),
        (TopK, {"k_aux": 0}, "k_aux = 0"),
        (L1ReLU, {"l1": -1.0}, "l1 = -1.0"),
        (L1ReLU, {"l1_warmup_share": 1.5}, "l1_warmup_share = 1.5"),
        (L1ReLU, {"decoder_init_norm": 0.0}, "decoder_init_norm = 0.0"),
        (Gated, {"l1": -0.1}, "l1 = -0.1"),
        (Gated, {"input_scale": "layer_norm"}, "input_scale 'layer_norm'"),
    ],
)
def test_wrong_options_are_named(cls: type[Variant], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        cls(6, 6, **options)


@pytest.mark.parametrize("cls", [TopK, Gated])
def test_a_transcoder_with_pre_bias_is_refused(cls: type[Variant]) -> None:
    x, target = rows(), rows(seed=2)
    with pytest.raises(ConfigError, match="pre_bias"):
        initialised(cls, x, target)


@pytest.mark.parametrize("cls", CLASSES)
def test_activations_that_are_all_zero_are_refused(cls: type[Variant]) -> None:
    with pytest.raises(SaeforgeError, match="all zero"):
        initialised(cls, torch.zeros(100, D, dtype=F64))


def test_an_unknown_argument_is_pythons_own_error() -> None:
    with pytest.raises(TypeError, match="width"):
        TopK(6, 6, width=3)  # type: ignore[call-arg]


@pytest.mark.parametrize("cls", CLASSES)
def test_a_fold_shares_no_memory_with_the_weights(cls: type[Variant]) -> None:
    """It keeps what it computed, without another copy; training goes on all the same."""
    variant = build(cls)
    places = {tensor.untyped_storage().data_ptr() for tensor in (*variant.parameters(), *variant.buffers())}
    sae = variant.fold()
    assert all(tensor.untyped_storage().data_ptr() not in places for tensor in sae.buffers())
