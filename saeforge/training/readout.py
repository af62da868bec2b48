"""`ReadOut`: running sums of a run's figures on the device, read by the host once every N steps."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from saeforge.errors import SaeforgeError
from saeforge.ops import Group
from saeforge.variants import StepOutput


class ReadOut:
    """Sums of loss, terms and counters since the last reading.

    Nothing is read from the device in a step: `self.log` costs 230 to 300 us a key and step, and every `.item()`
    stalls a GPU [style A2.1].
    """

    def __init__(self) -> None:
        self._names: list[str] = []
        self._sums: Tensor | None = None

    @torch.no_grad()
    def add(self, loss: Tensor, out: StepOutput) -> None:
        """Adds one step of this rank."""
        code = out.code
        active = torch.count_nonzero(code.values[: code.nnz])  # a third of the time of (values != 0).sum()
        figures: dict[str, Tensor] = {"steps": torch.ones_like(loss), "loss": loss.detach()}
        figures |= {f"term/{name}": term.detach() for name, term in out.terms.items()}
        figures |= {f"counter/{name}": value for name, value in out.counters.items()}
        figures |= {"rows": torch.full_like(loss, code.n_rows), "active": active}
        packed = torch.stack([value.to(torch.float64) for value in figures.values()])
        if self._sums is None:
            self._names, self._sums = list(figures), packed
        else:
            self._sums += packed

    def read(self, group: Group, latents: Group | None = None) -> dict[str, float]:
        """Means per step (loss, terms) and sums (counters, rows, active) over all ranks since the last reading.

        Every rank must call it.

        Args:
            group: the ranks that share a batch.
            latents: those that share out the latents, if some do: each has added its own active ones, and the same of
                everything else.

        Raises:
            SaeforgeError: a loss that is not finite.
        """
        if self._sums is None:
            return {}
        if latents is not None and latents.size > 1:
            active = self._names.index("active")
            self._sums[active] = latents.sum(self._sums[active])
        values = dict(zip(self._names, group.sum(self._sums).tolist(), strict=True))
        self._sums = None
        steps = values.pop("steps")
        for name in values:
            if name == "loss" or name.startswith("term/"):
                values[name] /= steps
        if not math.isfinite(values["loss"]):
            terms = ", ".join(f"{name[5:]} = {value:g}" for name, value in values.items() if name.startswith("term/"))
            raise SaeforgeError(
                f"the loss is {values['loss']} ({terms}) within the last {steps / group.size:.0f} steps; "
                "lower model.lr, or check the activations; the last checkpoint is intact"
            )
        return values
