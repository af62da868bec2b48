"""`Group`: the one door through which anything looks across devices. A no-op on a single device."""

from __future__ import annotations

from collections import Counter
from typing import Any, ClassVar, Literal

import torch
import torch.distributed as dist
from torch import Tensor

Kind = Literal["sum", "minimum"]


class Group:
    """The ranks that share a global batch, or the latents of a dictionary.

    Variants and metrics never call torch.distributed: whatever needs a figure of the whole batch asks its group.

    Args:
        size: number of ranks.
        rank: this one's place among them.
        handle: torch.distributed's group; None is the default one, of all processes.

    Attributes:
        sent: bytes that this rank has handed over, by kind of exchange: "sum", "minimum", "gather", "copy". Of b bytes
            a ring of n ranks sends 2 b (n - 1) / n for a sum or a minimum, b (n - 1) for a gather, b for a copy.
        entered: collectives that this process has entered, over all groups. Where a run stands still, the rank that the
            others wait for has entered fewer.
    """

    entered: ClassVar[int] = 0

    def __init__(self, size: int = 1, rank: int = 0, handle: Any = None) -> None:
        self.size = size
        self.rank = rank
        self.sent: Counter[str] = Counter()
        self._handle = handle

    @classmethod
    def world(cls) -> Group:
        """All ranks of the initialised default process group, or a group of one."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_world_size(), dist.get_rank())
        return cls()

    @classmethod
    def of(cls, handle: Any) -> Group:
        """The ranks of a process group that this process belongs to (`torch.distributed.new_group`, a device mesh)."""
        return cls(dist.get_world_size(handle), dist.get_rank(handle), handle)

    def __deepcopy__(self, memo: dict[int, Any]) -> Group:
        """Itself: a copy of a variant talks to the same ranks."""
        return self

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over ranks, as a new tensor without gradient; the tensor itself (detached) on one device."""
        return self._reduced(tensor.detach(), "sum")

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean over ranks, as a new tensor without gradient."""
        return self.sum(tensor) / self.size if self.size > 1 else tensor.detach()

    def minimum(self, tensor: Tensor) -> Tensor:
        """The least over ranks, entry by entry, as a new tensor without gradient; the tensor itself on one device."""
        return self._reduced(tensor.detach(), "minimum")

    def gather(self, tensor: Tensor) -> Tensor:
        """(size, ...): the tensors of all ranks, which have the same shape, in their order."""
        tensor = tensor.detach()
        if self.size == 1:
            return tensor[None]
        self._count("gather", tensor)
        return self._all_gather(tensor)

    def copy_(self, tensor: Tensor) -> Tensor:
        """Makes a contiguous tensor of any type that of the first rank, in place, and returns it."""
        if self.size > 1:
            if self.rank == 0:
                self._count("copy", tensor)
            self._broadcast(tensor.detach().view(-1).view(torch.uint8))  # gloo does not know every type
        return tensor

    def barrier(self) -> None:
        """Waits for all ranks."""
        if self.size > 1:
            Group.entered += 1
            dist.barrier(self._handle)

    def agree(self, flag: bool, device: torch.device | str = "cpu") -> bool:
        """True on every rank if `flag` is true on any."""
        if self.size == 1:
            return flag
        return bool(self.sum(torch.tensor(float(flag), device=device)).item())

    def times(self, other: Group) -> Group:
        """The ranks of both: this group's within each rank of `other`, where the two are the sides of a mesh."""
        if self.size == 1:
            return other
        return self if other.size == 1 else _Mesh(self, other)

    def _reduced(self, tensor: Tensor, kind: Kind) -> Tensor:
        if self.size == 1:
            return tensor
        self._count(kind, tensor)
        return self._all_reduce(tensor, kind)

    def _count(self, kind: str, tensor: Tensor) -> None:
        self.sent[kind] += tensor.numel() * tensor.element_size()

    def _all_reduce(self, tensor: Tensor, kind: Kind) -> Tensor:
        tensor = tensor.clone(memory_format=torch.contiguous_format)
        Group.entered += 1
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM if kind == "sum" else dist.ReduceOp.MIN, group=self._handle)
        return tensor

    def _all_gather(self, tensor: Tensor) -> Tensor:
        parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(self.size)]
        Group.entered += 1
        dist.all_gather(parts, tensor.contiguous(), group=self._handle)
        return torch.stack(parts)

    def _broadcast(self, tensor: Tensor) -> None:
        Group.entered += 1
        dist.broadcast(tensor, group=self._handle, group_src=0)


class _Mesh(Group):
    """Two groups that cross: what it exchanges goes over one and then over the other, and is counted there."""

    def __init__(self, inner: Group, outer: Group) -> None:
        super().__init__(inner.size * outer.size, outer.rank * inner.size + inner.rank)
        self.inner, self.outer = inner, outer

    def _reduced(self, tensor: Tensor, kind: Kind) -> Tensor:
        if kind == "sum":
            return self.outer.sum(self.inner.sum(tensor))
        return self.outer.minimum(self.inner.minimum(tensor))

    def gather(self, tensor: Tensor) -> Tensor:
        return self.outer.gather(self.inner.gather(tensor)).flatten(0, 1)

    def copy_(self, tensor: Tensor) -> Tensor:
        return self.inner.copy_(self.outer.copy_(tensor))

    def barrier(self) -> None:
        self.inner.barrier()
        self.outer.barrier()
