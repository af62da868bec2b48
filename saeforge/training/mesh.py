"""`Mesh`: a rank's place among those of a run, by rows of the batch and by latents."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch.distributed.device_mesh import DeviceMesh

from saeforge.ops import Group


@dataclass(frozen=True)
class Mesh:
    """The two groups of ranks that this one belongs to; of one on a single device.

    Attributes:
        data: ranks with other rows of the batch and the same latents.
        latents: ranks with other latents and the same rows.
        devices: both as torch sees them, with dimensions `data` and `latents`; None where latents are not shared out.
    """

    data: Group = field(default_factory=Group)
    latents: Group = field(default_factory=Group)
    devices: DeviceMesh | None = None
