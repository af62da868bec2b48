"""The pace of p, and the factor that keeps the penalty as strong as it was when p falls."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def level(step: int, total_steps: int, *, start: int, updates: int) -> int:
    """How many of the updates have happened before this step: 0 up to `start`, then one more every so many steps.

    They are spread evenly over what follows `start`, and the last level lasts as long as the others.
    (dictionary_learning puts the last update on the last step, so that nothing is trained at p_end.)
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
    section 3.2). All state lies on the device and in checkpoints; nothing here is read by the host.

    Args:
        length: batches that are remembered.
    """

    factor: Tensor
    p: Tensor
    seen: Tensor
    now: Tensor
    later: Tensor

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length
        self.register_buffer("factor", torch.ones((), dtype=torch.float64))
        self.register_buffer("p", torch.zeros((), dtype=torch.float64))  # of the last batch; 0 before the first
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("now", torch.zeros(length, dtype=torch.float64))
        self.register_buffer("later", torch.zeros(length, dtype=torch.float64))

    @torch.no_grad()
    def renew(self, p: float) -> Tensor:
        """Takes the p of the coming batch; returns the factor, a scalar fp32 tensor.

        Until a batch with an active latent has been seen there is nothing to compare, and the factor stays.
        """
        now, later = self.now.sum(), self.later.sum()  # of equally many batches
        changed = (self.p != p) & (self.p != 0) & (now > 0) & (later > 0)
        self.factor.mul_(torch.where(changed, now / torch.where(later > 0, later, 1.0), 1.0))
        keep = self.p == p
        self.now.mul_(keep)
        self.later.mul_(keep)
        self.seen.mul_(keep)
        self.p.fill_(p)
        return self.factor.float()

    @torch.no_grad()
    def remember(self, now: Tensor, later: Tensor) -> None:
        """Adds a batch: its penalty at this p, and what it would be at the next; scalars over all ranks."""
        place = (self.seen % self.length).reshape(1)
        self.now.index_copy_(0, place, now.to(self.now).reshape(1))
        self.later.index_copy_(0, place, later.to(self.later).reshape(1))
        self.seen += 1
