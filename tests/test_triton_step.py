"""Whole steps and RowAdam through the Triton kernels; on a GPU, or in Triton's interpreter (see `test_triton.py`)."""

from __future__ import annotations

import copy
import importlib.util
import os
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from saeforge.data.batch import Batch
from saeforge.ops import Above, Group, TopK, decode, encode, engine, gpu, shadow
from saeforge.ops.dispatch import choose
from saeforge.ops.select import top_k
from saeforge.optim import RowAdam, by_triton
from saeforge.optim.job import Job
from saeforge.variants import Gated as GatedVariant
from saeforge.variants import L1ReLU
from saeforge.variants import TopK as TopKVariant
from saeforge.variants.base import Variant
from saeforge.variants.contract import RunSettings
from tests.interpreter import mend, poison

INTERPRETED = gpu.interpreted()
DEVICE = "cpu" if INTERPRETED else "cuda"
if INTERPRETED and importlib.util.find_spec("triton"):
    mend()
pytestmark = (
    [] if INTERPRETED else [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
)


@pytest.fixture(autouse=True)
def _triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAEFORGE_OPS", "triton")
    poison(monkeypatch)


# Whole steps -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("select", [TopK(3), Above(0.2), Above(9e9), TopK(16)])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_encode_and_decode_through_the_kernels(select: Any, dtype: torch.dtype | None) -> None:
    sizes = {"x": (6, 8), "w": (16, 8), "b": (16,), "s": (8,), "dec": (16, 8)}
    leaves = {name: torch.randn(size, device=DEVICE) for name, size in sizes.items()}

    def gradients(mode: str) -> dict[str, Tensor]:
        os.environ["SAEFORGE_OPS"] = mode
        t = {name: value.clone().requires_grad_() for name, value in leaves.items()}
        code = encode(t["x"], t["w"], t["b"], select, shift=t["s"], dtype=dtype)
        if mode == "triton" and code.nnz:
            assert choose(code, torch.float32, code.values, t["w"]) is gpu.kernels()
        out = decode(code.with_values(code.values.tanh()), t["dec"], dtype=dtype)
        (out.square().sum() + code.values.square().sum()).backward()
        grads = {name: value.grad for name, value in t.items() if value.grad is not None}
        return {"out": out.detach(), **grads}

    ours, truth = gradients("triton"), gradients("reference")
    assert ours.keys() == truth.keys()
    # In bf16 the reference rounds the values and rows of its products, the kernels only tables.
    tolerance = 1e-5 if dtype is None else 3e-2
    for name, expected in truth.items():
        scale = float(expected.abs().max()) + 1e-6
        torch.testing.assert_close(ours[name] / scale, expected / scale, rtol=0, atol=tolerance, msg=name)


VARIANTS = {
    "topk": lambda: TopKVariant(8, 8, d_sae=24, k=4, k_aux=3),
    "l1_relu": lambda: L1ReLU(8, 8, d_sae=24),
    "gated": lambda: GatedVariant(8, 8, d_sae=24),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_step_of_each_variant_equals_the_reference(name: str) -> None:
    made: Variant = VARIANTS[name]()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.5)
    made.tokens_since_fired[::3] = 10**9  # some are dead: AuxK
    x = torch.randn(10, 8, device=DEVICE)
    schedule = {key: value(5) for key, value in made.schedules(10).items()}

    def gradients(mode: str) -> dict[str, Tensor]:
        os.environ["SAEFORGE_OPS"] = mode
        variant = copy.deepcopy(made).to(DEVICE)
        variant.bind(RunSettings(total_steps=10))
        out = variant.step(Batch(x, x), schedule)
        sum(out.terms.values(), torch.zeros((), device=DEVICE)).backward()
        grads = {key: value.grad for key, value in variant.named_parameters() if value.grad is not None}
        return {**out.terms, **grads, "l0": out.code.l0().float()}

    ours, truth = gradients("triton"), gradients("reference")
    assert ours.keys() == truth.keys()
    for key, expected in truth.items():
        torch.testing.assert_close(ours[key], expected, rtol=1e-5, atol=1e-5, msg=key)


# RowAdam ---------------------------------------------------------------------------------------------------------


def parameters(d: int) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    shapes = [(7, d), (7, d), (7,), ()]
    made = [torch.randn(shape, generator=generator) for shape in shapes]
    made[0] /= made[0].norm(dim=1, keepdim=True)
    return [nn.Parameter(value.to(DEVICE)) for value in made]


def row_adam(p: list[nn.Parameter], **kwargs: Any) -> RowAdam:
    groups: list[dict[str, Any]] = [{"params": p[:1], "constraint": "unit_norm"}, {"params": p[1:]}]
    return RowAdam(groups, **{"lr": 1e-2, "betas": (0.8, 0.99), **kwargs})


def set_gradients(p: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for value in p:
        value.grad = (torch.randn(value.shape, generator=generator) * (0.01 if step % 3 else 5)).to(DEVICE)


@pytest.mark.parametrize("max_grad_norm", [1.0, None])
@pytest.mark.parametrize("d", [5, 1500])
def test_fused_steps_equal_separate_operations(
    max_grad_norm: float | None, d: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    fused, separate = parameters(d), parameters(d)
    ours, theirs = (row_adam(p, max_grad_norm=max_grad_norm) for p in (fused, separate))
    copies = [shadow.of(p) for p in fused[:2]]
    versions = [p._version for p in fused]
    for step in range(9 if INTERPRETED else 200):
        set_gradients(fused, step)
        set_gradients(separate, step)
        assert by_triton.takes([Job(p, p.grad, ours.param_groups[0]) for p in fused if p.grad is not None])
        ours.step()
        monkeypatch.setenv("SAEFORGE_OPS", "stock")
        theirs.step()
        monkeypatch.setenv("SAEFORGE_OPS", "triton")
    for a, b in zip(fused, separate, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)
        assert torch.equal(ours.state[a]["step"], theirs.state[b]["step"])
    for p, made in zip(fused, copies, strict=False):
        assert torch.equal(made.rounded, p.detach().bfloat16())
        assert shadow.of(p) is made
    assert all(p._version > before for p, before in zip(fused, versions, strict=True))


class _Others(Group):
    """A group whose other rank says one number."""

    def __init__(self, said: Tensor) -> None:
        super().__init__(2, 0)
        self._said = said

    def _all_reduce(self, tensor: Tensor, kind: Any) -> Tensor:
        return tensor + self._said


def test_the_rows_of_another_rank_count_in_the_norm_that_clips() -> None:
    whole = parameters(6)
    set_gradients(whole, 3)
    grads = [p.grad.double() for p in whole if p.grad is not None]
    along = (grads[0] * whole[0].double()).sum(1, keepdim=True) * whole[0].double()
    theirs = torch.stack([(grads[0] - along)[4:], grads[1][4:]]).square().sum() + grads[2][4:].square().sum()
    own = [nn.Parameter(p.detach()[:4].clone() if p.ndim else p.detach().clone()) for p in whole]
    for p, of_all in zip(own, whole, strict=True):
        assert of_all.grad is not None
        p.grad = of_all.grad[:4].clone() if p.ndim else of_all.grad.clone()
    row_adam(whole).step()
    optimizer = row_adam(own)
    optimizer.share_out(own[:3], _Others(theirs.detach()))
    optimizer.step()
    for p, of_all in zip(own, whole, strict=True):
        torch.testing.assert_close(p, of_all[:4] if p.ndim else of_all, rtol=2e-5, atol=2e-6)
        mean = optimizer.state[p]["exp_avg"]
        assert mean.norm() < 1  # it was clipped: gradients are 5 long


def test_a_gradient_that_is_not_a_number_shows() -> None:
    p = parameters(5)
    set_gradients(p, 1)
    assert p[2].grad is not None
    p[2].grad[3] = float("nan")
    row_adam(p).step()
    assert all(bool(value.isnan().all()) for value in p)


def test_its_state_resumes_to_the_bit() -> None:
    straight, first = parameters(6), parameters(6)
    ours, interrupted = row_adam(straight), row_adam(first)
    for step in range(6):
        set_gradients(straight, step)
        ours.step()
        if step < 3:
            set_gradients(first, step)
            interrupted.step()
    second = [nn.Parameter(p.detach().clone()) for p in first]
    resumed = row_adam(second, lr=0.5)
    resumed.load_state_dict(copy.deepcopy(interrupted.state_dict()))
    for step in range(3, 6):
        set_gradients(second, step)
        resumed.step()
    assert all(torch.equal(a, b) for a, b in zip(straight, second, strict=True))


def test_a_learning_rate_on_the_device_and_a_beta_of_zero() -> None:
    number, tensor = parameters(5), parameters(5)
    for p, lr in ((number, 0.25), (tensor, torch.tensor(0.25, device=DEVICE))):
        optimizer = row_adam(p, betas=(0.0, 0.9))
        for group in optimizer.param_groups:
            group["lr"] = lr
        set_gradients(p, 3)
        optimizer.step()
    assert all(torch.equal(a, b) and bool(a.isfinite().all()) for a, b in zip(number, tensor, strict=True))


@pytest.mark.skipif(INTERPRETED, reason="takes a GPU")
def test_a_step_never_waits_for_the_device() -> None:
    variant = TopKVariant(64, 64, d_sae=2048, k=8, aux=0.0).to(DEVICE)
    with torch.no_grad():
        for parameter in variant.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.1)
    variant.bind(RunSettings(compute_dtype=torch.bfloat16))
    optimizer = RowAdam(variant.param_groups())
    x = torch.randn(256, 64, device=DEVICE)

    def step() -> None:
        out = variant.step(Batch(x, x), {})
        optimizer.zero_grad()
        out.terms["mse"].backward()
        optimizer.step()
        variant.observe(out.code)

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_encoder_reads_the_copy_that_the_optimizer_wrote() -> None:
    p = parameters(8)
    rounded = engine._lowered(p[0], torch.bfloat16)
    set_gradients(p, 0)
    row_adam(p).step()
    assert engine._lowered(p[0], torch.bfloat16) is rounded
    assert torch.equal(rounded, p[0].detach().bfloat16())


def test_the_public_top_k_goes_through_the_kernels() -> None:
    pre = torch.randn(3, 50, device=DEVICE)
    values, indices = top_k(pre, 5)
    assert values.dtype == torch.float32
    assert torch.equal(indices, pre.topk(5).indices.sort(dim=1).values)


def test_the_copy_is_rounded_to_the_nearest_with_ties_to_even() -> None:
    odd = [1 + 1 / 256, 1 + 3 / 256, -1 - 1 / 256, 3.4e38, 1e-40, 0.0, float("inf"), float("nan"), 1 + 1 / 255]
    p = nn.Parameter(torch.tensor(odd, device=DEVICE))
    made = shadow.of(p)
    made.rounded.fill_(7)
    p.grad = torch.zeros_like(p)
    RowAdam([p]).step()
    assert torch.equal(made.rounded.nan_to_num(5), p.detach().bfloat16().nan_to_num(5))
    assert bool(made.rounded.isnan().any())
