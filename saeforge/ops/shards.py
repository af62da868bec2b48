"""Latents shared out over ranks: each holds some of the dictionary, all see the same rows.

Rank r of a latent group of n holds the latents from r F/n up to (r + 1) F/n, with their encoder and decoder rows and
optimizer state. Inside `latents_over(shard)` the functions of `saeforge.ops` work on the rank's own latents, and
exchange what a choice or a sum over all latents needs, never weights or their gradients. What a rank hands over in a
step of B rows, d wide, with values of v bytes (4 in fp32) and a decoder product of c bytes (2 in bf16, else v):

    top-k           gather   B min(k, F/n) v    values of a row's own k largest; multi_k once more with k
    batch top-k     sum      8 (3 * 2^11 + F)   counts of `across.largest` in fp32, for each choice; gather 8; sum 4
    decode          sum      B d c              the partial reconstructions; as often as rows were cut (multi_k 2,
                                                Matryoshka one a prefix), and once more for a gate's own
    pre-bias        sum      d v                the gradient of what is subtracted from the input
    AuxK            sum      B d c              beside the decode, while any latent is dead
                    gather   B min(k_aux, m) c  while more are dead than k_aux; m is the most dead latents of a rank
    mean_entries    sum      v                  a penalty that sums over latents
    RowAdam's clip  sum      8                  the squared norm of gradients
    target_l0       sum      8                  how many latents were active
    dead latents    gather   8                  how many each rank has, whenever they are listed

A read-out sums 16 bytes and, for a wandb logger, a histogram; a validation the L0 of its rows (8 each) and, at its end,
gathers each latent's count. Thresholds need no exchange to choose. Rows of a code are ragged here, so that a step reads
how many entries there are from the device, top-k's too. Every rank computes the same loss, to the bit, as it comes of
the same sums.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saeforge.errors import ConfigError
from saeforge.ops.group import Group


@dataclass(frozen=True)
class Shard:
    """The latents of one rank.

    Attributes:
        group: the ranks that hold the dictionary together.
        first: its first latent. last: the one behind its last.
        d_sae: number of latents of all ranks.
    """

    group: Group
    first: int
    last: int
    d_sae: int

    @classmethod
    def of(cls, d_sae: int, group: Group) -> Shard:
        """The share of this rank of a group: equal, contiguous, in the order of ranks.

        Raises:
            ConfigError: latents that do not divide among the ranks.
        """
        if d_sae % group.size:
            raise ConfigError(
                f"d_sae = {d_sae} does not divide among {group.size} ranks of latents; make it a multiple of them"
            )
        here = d_sae // group.size
        return cls(group, group.rank * here, (group.rank + 1) * here, d_sae)

    def __len__(self) -> int:
        return self.last - self.first

    def own_of_largest(self, table: Tensor, k: int, largest: Callable[[Tensor, int], Tensor]) -> Tensor:
        """Which of this rank's candidates are among the k largest of each row over all ranks.

        Ties go to the lowest latent, as shards are contiguous and candidates ascend.

        Args:
            table: (B, w) candidates of this rank in the order of their latents; -inf where there is none.
            k: at most `w * group.size`.
            largest: (B, n), k -> (B, k) places of each row's k largest, ties to the lowest place.

        Returns:
            (B, w) bool.
        """
        n_rows, width = table.shape
        together = self.group.gather(table).transpose(0, 1).reshape(n_rows, -1)
        chosen = torch.zeros_like(together, dtype=torch.bool).scatter_(1, largest(together, k), True)
        return chosen[:, self.group.rank * width : (self.group.rank + 1) * width]


_state = threading.local()


def current() -> Shard | None:
    """The shard that this thread works on; None where one device holds all latents."""
    found: Shard | None = getattr(_state, "shard", None)
    return found


@contextmanager
def latents_over(shard: Shard | None) -> Iterator[None]:
    """Weights, codes and everything else that has one entry a latent hold those of the shard, inside."""
    before, _state.shard = current(), None if shard is None or shard.group.size == 1 else shard
    try:
        yield
    finally:
        _state.shard = before


def sum_over_latents(tensor: Tensor, wire: torch.dtype | None = None) -> Tensor:
    """The sum over the ranks of a latent group of what each computed from its own latents; itself outside of one.

    Its gradient is that of every rank's own share: all ranks compute the same loss from the sum.

    Args:
        tensor: of one shape on all ranks.
        wire: type in which it travels; None is its own.
    """
    shard = current()
    if shard is None:
        return tensor
    out: Tensor = _Sum.apply(tensor, shard.group, wire)
    return out


def for_latents(tensor: Tensor) -> Tensor:
    """A tensor that all ranks hold alike, where a rank's own latents read it: its gradient is the sum over the ranks.

    For products with weights outside `encode`, whose `shift` and input have that gradient anyway.
    """
    shard = current()
    if shard is None:
        return tensor
    out: Tensor = _Spread.apply(tensor, shard.group)
    return out


def summed(tensor: Tensor, group: Group, wire: torch.dtype | None) -> Tensor:
    """`sum_over_latents` without a gradient."""
    return group.sum(tensor if wire is None else tensor.to(wire)).to(tensor.dtype)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Group, wire: torch.dtype | None) -> Tensor:
        return summed(tensor, group, wire)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0], None, None


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.group.sum(grads[0]), None
