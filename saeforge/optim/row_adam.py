"""`RowAdam`: project, clip, Adam and renormalise, in that order, as a drop-in `torch.optim.Optimizer`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saeforge.errors import ConfigError
from saeforge.ops import native, shadow

_CONSTRAINTS = (None, "unit_norm")
# Without torch's wrapper: once any plain Adam exists it runs the step hooks, which `RowAdam.step` has run already.
_adam_step = inspect.unwrap(torch.optim.Adam.step)


class _Job(NamedTuple):
    """One parameter of a step, as rows."""

    parameter: Tensor
    grad: Tensor
    group: dict[str, Any]

    @property
    def constrained(self) -> bool:
        return bool(self.group["constraint"] == "unit_norm")

    def rows(self, tensor: Tensor) -> Tensor:
        return tensor.detach().reshape(len(tensor), -1) if tensor.ndim > 1 else tensor.detach().reshape(1, -1)


class RowAdam(torch.optim.Adam):
    """Adam that knows the constraint of each parameter group.

    One step does, over all groups together:

    1. project: in groups with `constraint: "unit_norm"`, the part of each row's gradient along the row is removed
       (Bricken et al. 2023, "Towards Monosemanticity");
    2. clip: gradients are scaled so that their global L2 norm is at most `max_grad_norm` (after projection: the part
       that cannot act must not use up the budget, as in dictionary_learning);
    3. Adam;
    4. renormalise: rows of constrained groups go back to norm 1; and the weights' bfloat16 copies are written.

    On the CPU that is two passes over memory, one for the norm and one for all the rest while a row is in the cache;
    gradients are left as they are. Elsewhere they are separate operations, with torch's fused Adam.

    Args:
        params: parameters or groups; a group may carry `constraint: "unit_norm" | None`.
        lr: learning rate.
        betas: Adam's decay rates.
        eps: Adam's epsilon.
        max_grad_norm: bound of the global gradient norm, or None for no clipping.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 3e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        max_grad_norm: float | None = 1.0,
    ) -> None:
        if max_grad_norm is not None and max_grad_norm <= 0:
            raise ConfigError(f"max_grad_norm = {max_grad_norm}: expected a positive number, or null for no clipping")
        super().__init__(params, lr=lr, betas=betas, eps=eps, fused=True)
        self.max_grad_norm = max_grad_norm

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; `constraint` is None if not given.

        Raises:
            ConfigError: an unknown constraint.
        """
        if param_group.setdefault("constraint", None) not in _CONSTRAINTS:
            raise ConfigError(f"constraint {param_group['constraint']!r}: expected 'unit_norm' or None")
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One optimizer step; see the class.

        Args:
            closure: re-evaluates the model and returns the loss (as torch's optimizers).
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        jobs = [
            _Job(parameter, parameter.grad, group)
            for group in self.param_groups
            for parameter in group["params"]
            if parameter.grad is not None
        ]
        if jobs and all(map(_native, jobs)):
            self._fused_step(jobs)
        else:
            self._separate_steps(jobs)
        return loss

    def _fused_step(self, jobs: list[_Job]) -> None:
        """By the CPU kernels."""
        total, dots = 0.0, []
        for job in jobs:
            if self.max_grad_norm is not None or job.constrained:
                squares, along = native.row_norms(job.rows(job.grad), job.rows(job.parameter), job.constrained)
                total += float(squares.sum())
                dots.append(along)
            else:
                dots.append(None)
        clip = 1.0
        if self.max_grad_norm is not None:
            # As torch.nn.utils.clip_grad_norm_; a norm that is NaN must not become a clip of 1.
            clip = self.max_grad_norm / (total**0.5 + 1e-6)
            clip = 1.0 if clip > 1 else clip
        for job, along in zip(jobs, dots, strict=True):
            parameter, group, state = job.parameter, job.group, self.state[job.parameter]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
            state["step"] += 1
            count, (beta1, beta2) = float(state["step"]), group["betas"]
            copy = shadow.to_update(parameter)
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

    def _separate_steps(self, jobs: list[_Job]) -> None:
        """By torch's operations."""
        for job in jobs:
            if job.constrained:
                project_rows_(job.grad, job.parameter)
        if self.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_([job.parameter for job in jobs], self.max_grad_norm, foreach=True)
        _adam_step(self)
        for job in jobs:
            if job.constrained:
                unit_rows_(job.parameter)


def _native(job: _Job) -> bool:
    tensors = (job.parameter, job.grad)
    return native.takes(*tensors) and all(t.dtype == torch.float32 and t.is_contiguous() for t in tensors)


def project_rows_(grad: Tensor, rows: Tensor) -> None:
    """Removes from each gradient row its part along the (unit) row, in place. Both (n, d)."""
    grad.addcmul_((grad * rows).sum(1, keepdim=True), rows, value=-1)


def unit_rows_(rows: Tensor) -> None:
    """Scales each row of (n, d) to norm 1, in place; a row of zeros stays."""
    rows.div_(rows.norm(dim=1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny))
