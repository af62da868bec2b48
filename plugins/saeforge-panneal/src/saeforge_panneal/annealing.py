"""The pace of p, and the factor that keeps the penalty as strong as it was when p falls."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from saeforge.errors import CheckpointError


def level(step: int, total_steps: int, *, start: int, updates: int) -> int:
    """How many of the updates have happened before this step: 0 up to `start`, then one more every so many steps.

    They are spread evenly over what follows `start`, and the last level lasts as long as the others.
    (dictionary_learning puts the last update behind the last step, so that nothing is trained at p_end.) None is
    skipped while there are no more updates than steps from `start` on.
    """
    if step < start or total_steps <= start:
        return 0
    return min(updates, 1 + (step - start) * updates // (total_steps - start))


def p_at(level: int, *, p_start: float, p_end: float, updates: int) -> float:
    """p at a level from 0 to `updates`."""
    return p_start + (p_end - p_start) * level / updates


class Strength(nn.Module):
    """A factor of the coefficient: at each change of p it is multiplied by mean(L at the old p) / mean(L at the new p).

    Both means are over the same recent batches, so the penalty does not jump (Karvonen et al. 2024, arXiv 2408.00113,
    section 3.2). All state lies on the device and in checkpoints; the host reads it once after a load, never in a step.

    Args:
        length: batches that are remembered.
    """

    factor: Tensor
    p: Tensor
    next_p: Tensor
    seen: Tensor
    now: Tensor
    later: Tensor

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length, self._loaded = length, False
        self.register_buffer("factor", torch.ones((), dtype=torch.float64))
        self.register_buffer("p", torch.zeros((), dtype=torch.float64))  # of the last batch; 0 before the first
        self.register_buffer("next_p", torch.zeros((), dtype=torch.float64))  # at which `later` was computed
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("now", torch.zeros(length, dtype=torch.float64))
        self.register_buffer("later", torch.zeros(length, dtype=torch.float64))

    @torch.no_grad()
    def renew(self, p: float) -> Tensor:
        """Takes the p of the coming batch; returns the factor, a scalar fp64 tensor.

        Until a batch with an active latent has been seen there is nothing to compare, and the factor stays.

        Raises:
            CheckpointError: a resumed run whose p is neither the checkpoint's nor the one that was to follow.
        """
        if self._loaded:
            self._check_resumed(p)
            self._loaded = False
        now, later = self.now.sum(), self.later.sum()  # of equally many batches
        changed = (self.p != p) & (self.p != 0) & (now > 0) & (later > 0)
        self.factor.mul_(torch.where(changed, now / torch.where(later > 0, later, 1.0), 1.0))
        keep = self.p == p
        self.now.mul_(keep)
        self.later.mul_(keep)
        self.seen.mul_(keep)
        self.p.fill_(p)
        return self.factor.clone()

    @torch.no_grad()
    def remember(self, now: Tensor, later: Tensor, next_p: float) -> None:
        """Adds a batch: its penalty at this p, and what it would be at `next_p`; scalars over all ranks."""
        place = (self.seen % self.length).reshape(1)
        self.now.index_copy_(0, place, now.to(self.now).reshape(1))
        self.later.index_copy_(0, place, later.to(self.later).reshape(1))
        self.seen += 1
        self.next_p.fill_(next_p)

    def _check_resumed(self, p: float) -> None:
        """The remembered batches say nothing of any other p, and the penalty's strength would jump unnoticed."""
        before, following = float(self.p), float(self.next_p)
        if before and not any(math.isclose(p, known, rel_tol=1e-6) for known in (before, following)):
            raise CheckpointError(
                f"the checkpoint was annealed to p = {before:.3g}, this run's length puts p at {p:.3g}; resume with "
                "the same data.tokens or trainer.max_steps, or start a new --run"
            )

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._loaded = True
