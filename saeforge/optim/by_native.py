"""A step of RowAdam by the C++ kernels, on the CPU."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor

from saeforge.ops import Group, native, shadow
from saeforge.optim.job import Job


def takes(job: Job) -> bool:
    """Whether the kernels are here, wanted, and work on this parameter."""
    return native.takes(job.parameter, job.grad) and job.plain


def step(jobs: list[Job], states: MutableMapping[Tensor, Any], max_grad_norm: float | None, latents: Group) -> None:
    """One step of all parameters; see `RowAdam`."""
    total, of_shard, dots = 0.0, 0.0, []
    for job in jobs:
        if max_grad_norm is not None or job.constrained:
            squares, along = native.row_norms(job.rows(job.grad), job.rows(job.parameter), job.constrained)
            if job.shared_out:
                of_shard += float(squares.sum())
            else:
                total += float(squares.sum())
            dots.append(along)
        else:
            dots.append(None)
    clip = 1.0
    if max_grad_norm is not None:
        if latents.size > 1:
            total += float(latents.sum(torch.tensor(of_shard, dtype=torch.float64)))
        # As torch.nn.utils.clip_grad_norm_; a norm that is NaN must not become a clip of 1.
        clip = max_grad_norm / (total**0.5 + 1e-6)
        clip = 1.0 if clip > 1 else clip
    for job, along in zip(jobs, dots, strict=True):
        parameter, group, state = job.parameter, job.group, states[job.parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        state["step"] += 1
        count, (beta1, beta2) = float(state["step"]), group["betas"]
        copy = shadow.to_update(parameter)
        copy = copy if copy is not None and copy.residual is not None else None  # else it is made again when needed
        native.row_adam(
            job.rows(parameter),
            job.rows(job.grad),
            job.rows(state["exp_avg"]),
            job.rows(state["exp_avg_sq"]),
            along,
            clip=clip,
            betas=(beta1, beta2),
            eps=group["eps"],
            step_size=group["lr"] / (1 - beta1**count),
            root=(1 - beta2**count) ** 0.5,
            rounded=None if copy is None else copy.parts(),
        )
        torch.autograd.graph.increment_version(parameter)
        if copy is not None:
            shadow.updated(parameter, copy)
