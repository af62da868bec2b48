"""A step of RowAdam by the Triton kernels, on a GPU. The host reads nothing from the device."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor

from saeforge.ops import Group, gpu, shadow
from saeforge.optim.job import Job


def takes(jobs: list[Job]) -> bool:
    """Whether the kernels are here, wanted, and work on these parameters, all on one device."""
    tensors = [tensor for job in jobs for tensor in (job.parameter, job.grad)]
    if not all(job.plain for job in jobs) or len({tensor.device for tensor in tensors}) > 1 or not gpu.takes(*tensors):
        return False
    longest: int = gpu.kernels().LONGEST_ROW
    return all(job.rows(job.parameter).shape[1] <= longest for job in jobs if job.constrained)


def step(jobs: list[Job], states: MutableMapping[Tensor, Any], max_grad_norm: float | None, latents: Group) -> None:
    """One step of all parameters; see `RowAdam`."""
    kernels = gpu.kernels()
    # One buffer, so that one sum over it gives the global norm.
    counts = [kernels.programs(job.rows(job.parameter), job.constrained) for job in jobs]
    squares = torch.empty(sum(counts), device=jobs[0].parameter.device)
    dots = [
        kernels.row_norms(job.rows(job.grad), job.rows(job.parameter), job.constrained, part)
        if max_grad_norm is not None or job.constrained
        else None
        for job, part in zip(jobs, squares.split(counts), strict=True)
    ]
    total = None if max_grad_norm is None else squares.sum(dtype=torch.float64)
    if total is not None and latents.size > 1:
        parts = list(zip(jobs, squares.split(counts), strict=True))
        own, others = (
            torch.cat([squares.new_zeros(1), *(part for job, part in parts if job.shared_out is shared)])
            for shared in (True, False)
        )
        total = latents.sum(own.sum(dtype=torch.float64)) + others.sum(dtype=torch.float64)
    for job, along in zip(jobs, dots, strict=True):
        parameter, group, state = job.parameter, job.group, states[job.parameter]
        if not state:
            # On the device, as torch's fused Adam keeps it.
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        numbers = kernels.scalars(
            state["step"], total, lr=group["lr"], betas=group["betas"], max_grad_norm=max_grad_norm
        )
        copy = shadow.to_update(parameter)
        kernels.row_adam(
            job.rows(parameter),
            job.rows(job.grad),
            job.rows(state["exp_avg"]),
            job.rows(state["exp_avg_sq"]),
            along,
            numbers,
            betas=group["betas"],
            eps=group["eps"],
            rounded=None if copy is None else copy.rounded,
        )
        torch.autograd.graph.increment_version(parameter)
        if copy is not None:
            shadow.updated(parameter, copy)
