"""`BatchThreshold`: the threshold that stands for a selection over the batch once there is no batch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from saeforge.ops import Group, shards


class BatchThreshold(nn.Module):
    """The mean over recent steps of the least value that was active (Bussmann et al. 2024, arXiv 2412.06410, eq. 5).

    Implementations disagree on how recent, and an SAE in use is as sparse as this is right: a long memory lags behind
    weights that still move (dictionary_learning: decay 0.999 from step 1,000 on; SAELens: 0.99). Here it is the last 5%
    of the run, at most 1,000 steps and at least 10.

    Attributes:
        value: the threshold, a scalar in the units of the values it follows; 0 until something was active.
    """

    value: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("value", torch.zeros(()))

    @torch.no_grad()
    def follow(self, values: Tensor, group: Group, total_steps: int) -> None:
        """One step; nothing waits for the device.

        Args:
            values: (nnz,) what the selection compared; those that are not positive were not active.
            group: the ranks that share the batch; those that share out latents are asked, too.
            total_steps: of the run.
        """
        values = values.detach()
        least = torch.where(values > 0, values, torch.inf).amin() if len(values) else self.value.new_tensor(torch.inf)
        shard = shards.current()
        group = group if shard is None else shard.group.times(group)
        least = group.minimum(least.to(self.value.dtype))
        moved = torch.lerp(self.value, least, 1 / min(1000, max(10, total_steps // 20)))
        moved = torch.where(self.value > 0, moved, least)
        self.value.copy_(torch.where(least.isfinite(), moved, self.value))
