"""The dense twin of a variant: same weights, same loss, as dense matrices through plain autograd.

Every product is whole (B, d_sae): what a good dense implementation costs, and, in fp32, the oracle of our losses. Under
bf16 all products run in bf16 autocast. AuxK is left out: no latent is dead in a benchmark.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from saeforge.variants import Batch, Gated, L1ReLU, TopK, Variant

#: Variants of our plugins are known by name: a benchmark of another one runs without them.
BatchTopKSAE = JumpReLU = Matryoshka = Any

#: Loss and the (B, d_sae) latents.
Dense = tuple[Tensor, Tensor]


def topk(sae: TopK, x: Tensor, schedule: Mapping[str, float]) -> Dense:
    """See `saeforge.variants.TopK`."""
    pre = F.linear(x - sae.b_dec, sae.W_enc, sae.b_enc)
    values, indices = torch.topk(pre, sae.k, sorted=False)
    f = torch.zeros_like(pre).scatter(1, indices, values.relu())
    return squared_error(sae, x, f).mean() / sae.mse_of_mean, f


def l1_relu(sae: L1ReLU, x: Tensor, schedule: Mapping[str, float]) -> Dense:
    """See `saeforge.variants.L1ReLU`."""
    f = F.linear(x, sae.W_enc, sae.b_enc).relu()
    penalty = (f @ sae.W_dec.norm(dim=1)).float().mean()
    return squared_error(sae, x, f).mean() + schedule["l1"] * penalty, f


def gated(sae: Gated, x: Tensor, schedule: Mapping[str, float]) -> Dense:
    """See `saeforge.variants.Gated`."""
    pi = F.linear(x - sae.b_dec, sae.W_gate)
    gate = pi + sae.b_gate
    f = (gate > 0) * (sae.r_mag.exp() * pi + sae.b_mag).relu()
    through_gate = gate.relu()
    aux = (x - (through_gate @ sae.W_dec.detach() + sae.b_dec.detach())).square().sum(1)
    penalty = through_gate.sum(1).mean()
    return squared_error(sae, x, f).mean() + aux.mean() + schedule["l1"] * penalty, f


class _Jump(torch.autograd.Function):
    """z 1[z > theta] and 1[z > theta] of (B, d_sae), with the pseudo-gradients of a rectangle."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, theta: Tensor, bandwidth: float) -> tuple[Tensor, Tensor]:
        active = (z > theta).to(z.dtype)
        ctx.save_for_backward(z, theta, active)
        ctx.bandwidth = bandwidth
        return z * active, active

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        z, theta, active = ctx.saved_tensors
        inside = (z - theta).abs() < ctx.bandwidth / 2
        return grads[0] * active, -((theta * grads[0] + grads[1]) * inside).sum(0) / ctx.bandwidth, None


def jumprelu(sae: JumpReLU, x: Tensor, schedule: Mapping[str, float]) -> Dense:
    """See `saeforge_jumprelu.JumpReLU`: loss "step", a rectangle, gradients to thresholds alone."""
    z = F.linear(x - sae.b_dec, sae.W_enc, sae.b_enc)
    f, active = _Jump.apply(z, sae.thresholds().to(z.dtype), sae.bandwidth)
    return squared_error(sae, x, f).mean() + schedule["sparsity"] * active.sum(1).float().mean(), f


def batch_latents(sae: BatchTopKSAE | Matryoshka, x: Tensor) -> Tensor:
    """(B, d_sae) of which k * B are active; one top-k of the flattened batch, as the paper's code and SAELens do it."""
    pre = F.linear(x - sae.b_dec, sae.W_enc, sae.b_enc)
    values, indices = torch.topk(pre.flatten(), round(sae.k * len(x)), sorted=False)
    return torch.zeros_like(pre).flatten().scatter(0, indices, values.relu()).view_as(pre)


def batchtopk(sae: BatchTopKSAE, x: Tensor, schedule: Mapping[str, float]) -> Dense:
    """See `saeforge_batchtopk.BatchTopKSAE`."""
    f = batch_latents(sae, x)
    return squared_error(sae, x, f).mean() / sae.mse_of_mean, f


def matryoshka(sae: Matryoshka, x: Tensor, schedule: Mapping[str, float]) -> Dense:
    """See `saeforge_matryoshka.Matryoshka`: group by group, so that each decoder row is multiplied once."""
    f, rebuilt, total, start = batch_latents(sae, x), sae.b_dec, 0.0, 0
    for end in sae.ends.tolist():
        rebuilt = rebuilt + f[:, start:end] @ sae.W_dec[start:end]
        total, start = total + (x - rebuilt).square().sum(1).mean(), end
    return total / len(sae.ends) / sae.mse_of_mean, f


def squared_error(sae: TopK | L1ReLU | Gated | JumpReLU | BatchTopKSAE, x: Tensor, f: Tensor) -> Tensor:
    """(B,) of the reconstruction from (B, d_sae) latents."""
    return (x - (f @ sae.W_dec + sae.b_dec)).square().sum(1)


LOSSES: dict[str, Callable[..., Dense]] = {
    "TopK": topk,
    "L1ReLU": l1_relu,
    "Gated": gated,
    "JumpReLU": jumprelu,
    "BatchTopKSAE": batchtopk,
    "Matryoshka": matryoshka,
}


def dense_forward(sae: Variant, rows: Tensor, schedule: Mapping[str, float]) -> Dense:
    """Loss with its graph, and latents, of one batch of raw rows."""
    x, _ = sae.scaled(Batch(rows, rows))
    with torch.autocast("cpu", torch.bfloat16, enabled=sae.run.compute_dtype == torch.bfloat16):
        found: Dense = LOSSES[type(sae).__name__](sae, x, schedule)
    return found


def dense_step(sae: Variant, rows: Tensor, schedule: Mapping[str, float]) -> Tensor:
    """The loss of one batch; notes who fired, with the cheapest dense operation that tells (a maximum, no count)."""
    loss, f = dense_forward(sae, rows, schedule)
    with torch.no_grad():
        sae.tokens_since_fired += len(rows)
        sae.tokens_since_fired.masked_fill_(f.amax(0) > 0, 0)
    return loss
