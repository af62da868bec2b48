"""`Group`: the one door through which anything looks across devices. A no-op on a single device."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


class Group:
    """The ranks that share a global batch.

    Variants and metrics never call torch.distributed: whatever needs a figure of the whole batch asks its group.
    """

    def __init__(self, size: int = 1, rank: int = 0) -> None:
        self.size = size
        self.rank = rank

    @classmethod
    def world(cls) -> Group:
        """All ranks of the initialised default process group, or a group of one."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_world_size(), dist.get_rank())
        return cls()

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over ranks, as a new tensor without gradient; the tensor itself (detached) on one device."""
        tensor = tensor.detach()
        if self.size > 1:
            tensor = tensor.clone()
            dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
        return tensor

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean over ranks, as a new tensor without gradient."""
        return self.sum(tensor) / self.size if self.size > 1 else tensor.detach()

    def minimum(self, tensor: Tensor) -> Tensor:
        """The least over ranks, entry by entry, as a new tensor without gradient; the tensor itself on one device."""
        tensor = tensor.detach()
        if self.size > 1:
            tensor = tensor.clone()
            dist.all_reduce(tensor, op=dist.ReduceOp.MIN)
        return tensor

    def gather(self, tensor: Tensor) -> Tensor:
        """(size, ...): the tensors of all ranks, which have the same shape, in their order."""
        if self.size == 1:
            return tensor.detach()[None]
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(parts, tensor.detach().contiguous())
        return torch.stack(parts)

    def barrier(self) -> None:
        """Waits for all ranks."""
        if self.size > 1:
            dist.barrier()

    def agree(self, flag: bool, device: torch.device | str = "cpu") -> bool:
        """True on every rank if `flag` is true on any."""
        if self.size == 1:
            return flag
        return bool(self.sum(torch.tensor(float(flag), device=device)).item())
