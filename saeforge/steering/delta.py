"""What edits do to activations: x + (f' - f) @ W_dec, over the edited latents alone.

The SAE's error cancels in this form, exactly: what is not edited is not reconstructed either [eval 4.2].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from saeforge.errors import ConfigError
from saeforge.lm.origin import check_one_site
from saeforge.ops import SparseCode
from saeforge.sae import SAE
from saeforge.steering.edits import Add, Clamp, Edit, Scale
from saeforge.steering.scales import LatentScales


@dataclass(frozen=True)
class Delta:
    """Edits of an SAE's latents, made ready. Every edit is `slope * f + offset`, some only where f fires.

    Attributes:
        sae: of which the latents are.
        latents: (E,) int64.
        slope: (E,). offset: (E,). when_active: bool (E,).
        W_enc: (E, d_in). b_enc: (E,). threshold: (E,); all None where the SAE's own `encode` is asked.
        W_dec: (E, d_out), fp32 as all others.
        slots: (d_sae,) place of each latent among the edited ones, E for the rest.
        changes: whether any of it can change anything.
    """

    sae: SAE
    latents: Tensor
    slope: Tensor
    offset: Tensor
    when_active: Tensor
    W_enc: Tensor | None
    b_enc: Tensor | None
    threshold: Tensor | None
    W_dec: Tensor
    slots: Tensor
    changes: bool

    @classmethod
    def of(
        cls, sae: SAE, edits: Mapping[int, Edit], scales: LatentScales | None, *, transcoders: bool = False
    ) -> Delta:
        """Prepare edits, on the SAE's device.

        Args:
            sae: of which the latents are.
            edits: by latent.
            scales: sizes of units.
            transcoders: the caller adds the change where a transcoder writes.

        Raises:
            ConfigError: no such latent, a unit whose size is not known, or an SAE that writes elsewhere than it reads.
        """
        check_one_site(sae)
        target, site = sae.meta.get("target"), sae.meta.get("site")
        elsewhere = target and site and any(target[key] != site[key] for key in ("module_path", "where"))
        if not transcoders and (sae.W_skip is not None or elsewhere or sae.d_in != sae.d_out):
            raise ConfigError("steering: this is a transcoder, which writes elsewhere than it reads; give a plain SAE")
        for latent in edits:
            if not 0 <= latent < sae.d_sae:
                raise ConfigError(f"latent {latent}: the SAE has {sae.d_sae} latents, 0 to {sae.d_sae - 1}")
        lines = [_line(latent, edit, scales) for latent, edit in edits.items()]
        # Not as inference tensors, even if the caller is in inference mode: a later pass may want gradients.
        with torch.inference_mode(False), torch.no_grad():
            device, alone = sae.device, sae.rule == "threshold"
            latents = torch.tensor(list(edits), dtype=torch.int64, device=device)
            slots = torch.full((sae.d_sae,), len(edits), dtype=torch.int64, device=device)
            slots[latents] = torch.arange(len(edits), device=device)
            return cls(
                sae=sae,
                latents=latents,
                slope=torch.tensor([line[0] for line in lines], device=device, dtype=torch.float32),
                offset=torch.tensor([line[1] for line in lines], device=device, dtype=torch.float32),
                when_active=torch.tensor([line[2] for line in lines], device=device, dtype=torch.bool),
                W_enc=sae.W_enc[latents].float() if alone else None,
                b_enc=sae.b_enc[latents].float() if alone else None,
                threshold=sae.threshold[latents].float() if sae.threshold is not None else None,
                W_dec=sae.W_dec[latents].float(),
                slots=slots,
                changes=any(slope != 0 or offset != 0 for slope, offset, _ in lines),
            )

    def values(self, x: Tensor) -> Tensor:
        """Return the edited latents' values under the SAE's rule, fp32 (rows, E), of activations (rows, d_in)."""
        if self.W_enc is not None and self.threshold is not None:  # each latent decides for itself
            pre = F.linear(x.float(), self.W_enc, self.b_enc)
            return torch.where(pre > self.threshold, pre, torch.zeros_like(pre))
        return self.values_of(self.sae.encode(x))  # which are the k largest takes all of them

    def values_of(self, code: SparseCode) -> Tensor:
        """Return the edited latents' values, fp32 (rows, E), of a code of the SAE's; differentiable in its values."""
        n = code.nnz
        values = torch.zeros(code.n_rows, len(self.latents) + 1, device=code.values.device)
        places = code.rows(), self.slots[code.indices[:n]]
        return values.index_put(places, code.values[:n].float())[:, :-1]

    def change(self, f: Tensor) -> Tensor:
        """Return f' - f, (rows, E), of values f."""
        change = self.slope * f + self.offset
        return torch.where(self.when_active & (f == 0), torch.zeros_like(f), change)


def _line(latent: int, edit: Edit, scales: LatentScales | None) -> tuple[float, float, bool]:
    """Return slope, offset and condition of an edit: f' - f = slope * f + offset."""
    if isinstance(edit, Scale):
        return edit.factor - 1, 0.0, False
    value = edit.value
    if edit.unit != "abs":
        if scales is None:
            raise ConfigError(
                f"edit {latent}={edit}: what 1{edit.unit} is stands in the features of a RUN; give scales=RUN after "
                "`saeforge features build RUN`, or an absolute value"
            )
        value *= scales.size(latent, edit.unit)
    match edit:
        case Clamp():
            return -1.0, value, edit.when_active
        case Add():
            return 0.0, value, False
