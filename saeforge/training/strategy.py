"""`LatentParallel`: a mesh of ranks, data x latents. Those of one row train on the same rows of the batch.

With n ranks of latents each holds d_sae / n of them, with their optimizer state; `saeforge.ops.shards` says what they
exchange. The ranks of a column hold the same latents and have different rows: DDP averages their gradients. Where there
is one rank of data, nothing about weights travels at all.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel

from saeforge.errors import ConfigError
from saeforge.ops import Group
from saeforge.training import parts
from saeforge.training.mesh import Mesh

# torch 2.13 renames the option that keeps ranks from sending each other equal buffers in every forward.
_NEW_NAME = "forward_sync_buffers" in inspect.signature(DistributedDataParallel.__init__).parameters
#: What DDP is told here: every rank computes the same buffers, and gradients need no memory of their own.
DDP_OPTIONS: dict[str, Any] = {
    "gradient_as_bucket_view": True,
    "forward_sync_buffers" if _NEW_NAME else "broadcast_buffers": False,
}


def mesh_of(trainer: Trainer) -> Mesh:
    """That of a run, once its processes have met; of any other strategy than `LatentParallel` all ranks share rows."""
    strategy = trainer.strategy
    return strategy.mesh if isinstance(strategy, LatentParallel) else Mesh(Group.world())


class LatentParallel(DDPStrategy):
    """Latents shared out over ranks, beside data parallelism: `trainer.strategy: latent_parallel`.

    Ranks r n .. r n + n - 1 hold a dictionary together, so that those are neighbours which exchange most.

    Args:
        latents: ranks that share out the latents of an SAE; the number of processes divided by it share the rows of
            a batch. Null: all processes.
        kwargs: those of Lightning's DDPStrategy.

    Raises:
        ConfigError: no positive number.
    """

    def __init__(self, latents: int | None = None, **kwargs: Any) -> None:
        super().__init__(**{**DDP_OPTIONS, **kwargs})
        if latents is not None and latents < 1:
            raise ConfigError(f"trainer.latents = {latents}: expected a positive number of ranks, or null for all")
        self.latents = latents
        self.mesh = Mesh()

    def sizes(self, world: int) -> tuple[int, int]:
        """Ranks of data and of latents among so many.

        Raises:
            ConfigError: they do not divide.
        """
        latents = world if self.latents is None else self.latents
        if world % latents:
            raise ConfigError(
                f"trainer.latents = {latents} does not divide {world} processes (trainer.devices times "
                "trainer.num_nodes); set it to a divisor of them"
            )
        return world // latents, latents

    def setup_distributed(self) -> None:
        """Lets the processes meet, and makes the groups of the mesh."""
        super().setup_distributed()
        rank, (data, latents) = dist.get_rank(), self.sizes(dist.get_world_size())
        table = torch.arange(data * latents).view(data, latents)
        # Every process takes part in making every group, in one order.
        columns = [dist.new_group(column, timeout=self._timeout) for column in table.T.tolist()]
        rows = [dist.new_group(row, timeout=self._timeout) for row in table.tolist()]
        own = columns[rank % latents], rows[rank // latents]
        devices = DeviceMesh.from_group(
            list(own), self.root_device.type, mesh=table, mesh_dim_names=("data", "latents")
        )
        self._ddp_kwargs["process_group"] = own[0]
        self.mesh = Mesh(Group.of(own[0]), Group.of(own[1]), devices)

    def setup(self, trainer: Trainer) -> None:
        """Wraps the module.

        Raises:
            ConfigError: something else than a fit.
        """
        if trainer.state.fn != TrainerFn.FITTING:
            raise ConfigError("trainer.strategy = latent_parallel is for training; judge its SAE on one device")
        super().setup(trainer)

    def configure_ddp(self) -> None:
        """Nothing where no other rank holds these latents."""
        if self.mesh.data.size > 1:
            super().configure_ddp()

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Every rank writes its latents, then the first one the file that names them: see `parts`."""
        if parts.PARTS in checkpoint:
            path = Path(filepath)
            name = self.broadcast(parts.new_name(path))
            parts.write(checkpoint[parts.PARTS], path, name, self.mesh)
            checkpoint[parts.PARTS] = name
        super().save_checkpoint(checkpoint, filepath, storage_options)
