"""What a steering has done: sums kept on the device while it runs, read on demand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from saeforge.steering.edits import Edit


@dataclass(frozen=True)
class LatentAudit:
    """One edited latent.

    Attributes:
        edit: in the grammar of edits.
        before: mean value over the selected tokens, zeros included.
        after: mean of the value that took its place.
    """

    edit: str
    before: float
    after: float


@dataclass(frozen=True)
class Audit:
    """What was done at one site. A token counts each time that it passes: without a cache, in every step.

    Attributes:
        site: its name.
        where: which tokens were asked for.
        tokens: that passed, padding and special ones included.
        selected: of these, those that could be edited.
        touched: of these, those that an edit changed.
        relative_change: |x' - x| / |x|, mean over the touched tokens; 0 if there is none.
        latents: the edited ones.
    """

    site: str
    where: str
    tokens: int
    selected: int
    touched: int
    relative_change: float
    latents: dict[int, LatentAudit]

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


@dataclass(frozen=True)
class Tally:
    """The sums behind an `Audit`.

    Attributes:
        counts: tokens, selected, touched.
        relative: sum of |x' - x| / |x|.
        before: (E,) sums over selected tokens. after: likewise.
    """

    counts: Tensor
    relative: Tensor
    before: Tensor
    after: Tensor

    @classmethod
    def empty(cls, n_edits: int, device: torch.device) -> Tally:
        """Return sums of nothing."""
        exact = torch.float32 if device.type == "mps" else torch.float64  # Apple's devices have no float64
        with torch.inference_mode(False):  # they outlive the mode that the caller is in
            return cls(
                torch.zeros(3, dtype=torch.int64, device=device),
                torch.zeros((), dtype=exact, device=device),
                torch.zeros(n_edits, dtype=exact, device=device),
                torch.zeros(n_edits, dtype=exact, device=device),
            )

    @torch.no_grad()
    def add(self, selected: Tensor, touched: Tensor, f: Tensor, change: Tensor, delta: Tensor, x: Tensor) -> None:
        """Count one pass: bool (rows, 1) twice, values and their change (rows, E), what is added to x (rows, d)."""
        exact = self.before.dtype
        self.counts[0] += selected.numel()
        self.counts[1] += selected.sum()
        self.counts[2] += touched.sum()
        # Chosen, not multiplied: what stands at padding may be NaN.
        kept = torch.where(selected, f, torch.zeros_like(f)).to(exact)
        self.before.add_(kept.sum(0))
        self.after.add_((kept + change).sum(0))
        norm = x.float().norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        ratio = delta.norm(dim=1, keepdim=True) / norm
        self.relative.add_(torch.where(touched, ratio, torch.zeros_like(ratio)).to(exact).sum())

    def read(self, edits: Mapping[int, Edit], site: str, where: str) -> Audit:
        """Return the means."""
        tokens, selected, touched = (int(n) for n in self.counts.tolist())
        before, after = ((sums / max(selected, 1)).tolist() for sums in (self.before, self.after))
        latents = {
            latent: LatentAudit(str(edit), *values)
            for (latent, edit), *values in zip(edits.items(), before, after, strict=True)
        }
        return Audit(site, where, tokens, selected, touched, float(self.relative) / max(touched, 1), latents)
