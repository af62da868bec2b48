"""Dense autograd references of the three variants, written from the papers' formulas: no sparse code, no saeforge.

Parameters are plain tensors by name, all rows are in scaled units, every term carries its coefficient. Slow and obvious
on purpose: whatever saeforge computes must equal this.
"""

from __future__ import annotations

import torch
from torch import Tensor

Params = dict[str, Tensor]
Terms = dict[str, Tensor]


def mean_over_rows(per_row: Tensor, weight: Tensor | None) -> Tensor:
    """Mean over (B,), weighted if weights are given."""
    return per_row.mean() if weight is None else (per_row * weight).sum() / weight.sum()


def lowest_index_top_k(pre: Tensor, k: int) -> Tensor:
    """(B, n) bool mask of the k largest of each row; a stable sort leaves equal values in the order of their index."""
    order = torch.sort(pre.detach(), dim=1, descending=True, stable=True).indices[:, :k]
    return torch.zeros_like(pre, dtype=torch.bool).scatter(1, order, True)


def l1_relu(
    p: Params, x: Tensor, target: Tensor, *, l1: float, pre_bias: bool = False, weight: Tensor | None = None
) -> tuple[Terms, Tensor]:
    """Conerly et al. 2024: `f = ReLU(W_enc x + b_enc)`, `|x - x_hat|^2 + l1 sum_i f_i |w_dec_i|`. Returns terms, f."""
    centred = x - p["b_dec"] if pre_bias else x
    f = torch.relu(centred @ p["W_enc"].T + p["b_enc"])
    x_hat = f @ p["W_dec"] + p["b_dec"]
    penalty = (f * p["W_dec"].pow(2).sum(1).sqrt()).sum(1)
    return {
        "mse": mean_over_rows((target - x_hat).pow(2).sum(1), weight),
        "l1": l1 * mean_over_rows(penalty, weight),
    }, f


def topk(
    p: Params,
    x: Tensor,
    target: Tensor,
    *,
    k: int,
    mse_of_mean: float,
    aux: float,
    k_aux: int,
    dead: Tensor,
    pre_bias: bool = True,
    weight: Tensor | None = None,
) -> tuple[Terms, Tensor]:
    """Gao et al. 2024: `f = ReLU(TopK(W_enc (x - b_dec) + b_enc))`; AuxK: dead latents rebuild the detached error.

    AuxK is normalised by the batch variance of the error (openai/sparse_autoencoder's `normalized_mse`).
    """
    pre = (x - p["b_dec"] if pre_bias else x) @ p["W_enc"].T + p["b_enc"]
    f = torch.relu(pre) * lowest_index_top_k(pre, k)
    x_hat = f @ p["W_dec"] + p["b_dec"]
    terms = {"mse": mean_over_rows((target - x_hat).pow(2).sum(1), weight) / mse_of_mean}
    if aux > 0:
        error = (target - x_hat).detach()
        n_dead = int(dead.sum())
        if n_dead == 0:
            return {**terms, "aux": torch.zeros((), dtype=x.dtype)}, f
        dead_pre = torch.where(dead, pre, -torch.inf)
        chosen = lowest_index_top_k(dead_pre, min(k_aux, n_dead))
        f_aux = torch.relu(torch.where(chosen, pre, 0.0))
        w = torch.ones(len(x), dtype=x.dtype) if weight is None else weight
        centre = (error * w[:, None]).sum(0) / w.sum()
        variance = mean_over_rows((error - centre).pow(2).sum(1), weight)
        terms["aux"] = aux * mean_over_rows((error - f_aux @ p["W_dec"]).pow(2).sum(1), weight) / variance
    return terms, f


def gated(
    p: Params, x: Tensor, target: Tensor, *, l1: float, pre_bias: bool = True, weight: Tensor | None = None
) -> tuple[Terms, Tensor]:
    """Rajamanoharan et al. 2024, equations 6 to 8, with the encoder weights tied through exp(r_mag)."""
    pi = (x - p["b_dec"] if pre_bias else x) @ p["W_gate"].T
    pi_gate = pi + p["b_gate"]
    f_gate = (pi_gate > 0).to(x.dtype)  # a step: no gradient
    f_mag = torch.relu(torch.exp(p["r_mag"]) * pi + p["b_mag"])
    f = f_gate * f_mag
    x_hat = f @ p["W_dec"] + p["b_dec"]
    via_gate = torch.relu(pi_gate) @ p["W_dec"].detach() + p["b_dec"].detach()
    return {
        "mse": mean_over_rows((target - x_hat).pow(2).sum(1), weight),
        "l1": l1 * mean_over_rows(torch.relu(pi_gate).sum(1), weight),
        "aux": mean_over_rows((target - via_gate).pow(2).sum(1), weight),
    }, f


def geometric_median(x: Tensor, steps: int = 400) -> Tensor:
    """Minimiser of the sum of distances to the rows of (n, d), by L-BFGS on the objective itself."""
    guess = x.double().mean(0).clone().requires_grad_()
    optimizer = torch.optim.LBFGS([guess], max_iter=steps, line_search_fn="strong_wolfe", tolerance_grad=1e-12)

    def closure() -> Tensor:
        optimizer.zero_grad()
        total = (x.double() - guess).norm(dim=1).sum()
        total.backward()
        return total

    optimizer.step(closure)  # type: ignore[arg-type, unused-ignore]
    return guess.detach()
