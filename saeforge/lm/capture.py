"""Read activations at sites during a forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import nn

from saeforge.errors import ConfigError
from saeforge.lm.hooks import See, attach
from saeforge.lm.sites import Site


@dataclass(frozen=True)
class TokenBatch:
    """What a base model gets: int64 tensors (contexts, length).

    Attributes:
        input_ids: token ids, right-padded.
        attention_mask: 1 for tokens, 0 for padding; None for packed contexts.
        position_ids: restart at each segment of a packed context; None leaves them to the model.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor | None = None
    position_ids: torch.Tensor | None = None


class Capture:
    """Hooks on sites; a context manager, so that they never outlive their use.

    Usage:
        with Capture(model, sites) as capture:
            activations = capture(batch)  # {site id: (contexts, length, d)}
    """

    def __init__(self, model: nn.Module, sites: Sequence[Site]) -> None:
        self.model = model
        self.sites = tuple(sites)
        self._found: dict[str, torch.Tensor] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> Capture:
        for site in self.sites:
            self._handles.append(attach(self.model, site, self._reader(site)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._found.clear()

    @torch.inference_mode()
    def __call__(self, batch: TokenBatch) -> dict[str, torch.Tensor]:
        """Run the model and return each site's activations, (contexts, length, d), on the model's device.

        Raises:
            ConfigError: a site did not run, or did not yield one row per token.
        """
        device = next(self.model.parameters()).device
        arguments = {
            name: value.to(device, non_blocking=True)
            for name in ("input_ids", "attention_mask", "position_ids")
            if (value := getattr(batch, name)) is not None
        }
        self._found.clear()
        self.model(**arguments)
        shape = batch.input_ids.shape
        result: dict[str, torch.Tensor] = {}
        for site in self.sites:
            x = self._found.pop(site.id, None)
            if x is None:
                raise ConfigError(f"site {site.id}: the module did not run in a forward pass; choose another site")
            if x.dim() not in (2, 3) or x.numel() % shape.numel() or (x.dim() == 3 and x.shape[:2] != shape):
                raise ConfigError(
                    f"site {site.id}: activations of shape {tuple(x.shape)} are not one row per token of "
                    f"{tuple(shape)}; choose another site"
                )
            result[site.id] = x.reshape(*shape, -1)
        return result

    def _reader(self, site: Site) -> See:
        """Return what keeps the site's tensor; a module that runs twice in one pass is ambiguous."""

        def keep(x: torch.Tensor) -> None:
            if site.id in self._found:
                raise ConfigError(f"site {site.id}: the module runs more than once in a forward pass; choose another")
            self._found[site.id] = x.clone()  # later modules may add to it in place

        return keep
