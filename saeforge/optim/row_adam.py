"""`RowAdam`: project, clip, Adam and renormalise, in that order, as a drop-in `torch.optim.Optimizer`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from saeforge.errors import ConfigError
from saeforge.ops import Group
from saeforge.optim import by_native, by_triton
from saeforge.optim.job import Job

_CONSTRAINTS = (None, "unit_norm")
# Without torch's wrapper: once any plain Adam exists it runs the step hooks, which `RowAdam.step` has run already.
_adam_step = inspect.unwrap(torch.optim.Adam.step)


class RowAdam(torch.optim.Adam):
    """Adam that knows the constraint of each parameter group.

    One step does, over all groups together:

    1. project: in groups with `constraint: "unit_norm"`, the part of each row's gradient along the row is removed
       (Bricken et al. 2023, "Towards Monosemanticity");
    2. clip: gradients are scaled so that their global L2 norm is at most `max_grad_norm` (after projection: the part
       that cannot act must not use up the budget, as in dictionary_learning);
    3. Adam;
    4. renormalise: rows of constrained groups go back to norm 1; and the weights' bfloat16 copies are written.

    That is two passes over memory, one for the norm and one for all the rest while a row is in the cache (CPU) or in
    registers (GPU, without waiting for it); gradients are left as they are. Where neither's kernels work, and in
    other types than fp32, they are separate operations, with torch's fused Adam.

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
        self._latents, self._shared_out = Group(), frozenset[int]()

    def share_out(self, parameters: Iterable[Tensor], latents: Group) -> None:
        """The rows of these parameters are one rank's of a latent group; the norm that clips is that of all its rows.

        All other parameters, and their gradients, are the same on every rank of the group, and count once. The ranks
        add equal numbers, so they clip alike.
        """
        self._latents, self._shared_out = latents, frozenset(map(id, parameters))

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
            Job(parameter, parameter.grad, group, id(parameter) in self._shared_out)
            for group in self.param_groups
            for parameter in group["params"]
            if parameter.grad is not None
        ]
        if jobs and all(map(by_native.takes, jobs)):
            by_native.step(jobs, self.state, self.max_grad_norm, self._latents)
        elif jobs and by_triton.takes(jobs):
            by_triton.step(jobs, self.state, self.max_grad_norm, self._latents)
        else:
            self._separate_steps(jobs)
        return loss

    def _separate_steps(self, jobs: list[Job]) -> None:
        """By torch's operations."""
        for job in jobs:
            if job.constrained:
                project_rows_(job.grad, job.parameter)
        parameters = [job.parameter for job in jobs]
        if self.max_grad_norm is not None and self._latents.size > 1:
            own, others = (
                torch.nn.utils.get_total_norm([job.grad for job in jobs if job.shared_out is shared]).double()
                for shared in (True, False)
            )
            total = (self._latents.sum(own.square()) + others.square()).sqrt().to(jobs[0].grad.dtype)
            torch.nn.utils.clip_grads_with_norm_(parameters, self.max_grad_norm, total, foreach=True)
        elif self.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(parameters, self.max_grad_norm, foreach=True)
        _adam_step(self)
        for job in jobs:
            if job.constrained:
                unit_rows_(job.parameter)


def project_rows_(grad: Tensor, rows: Tensor) -> None:
    """Removes from each gradient row its part along the (unit) row, in place. Both (n, d)."""
    grad.addcmul_((grad * rows).sum(1, keepdim=True), rows, value=-1)


def unit_rows_(rows: Tensor) -> None:
    """Scales each row of (n, d) to norm 1, in place; a row of zeros stays."""
    rows.div_(rows.norm(dim=1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny))
