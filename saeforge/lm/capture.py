"""Read activations at sites during a forward pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol

import torch
from torch import nn

from saeforge.errors import ConfigError
from saeforge.lm.hooks import See, attach
from saeforge.lm.sites import Site


class ModelBatch(Protocol):
    """What one forward pass gets: items of equally many tokens."""

    @property
    def shape(self) -> tuple[int, int | None]:
        """Items, and tokens of each at the sites; None where only the model knows."""

    def arguments(self) -> Mapping[str, Any]:
        """Keyword arguments of the model."""


@dataclass(frozen=True)
class TokenBatch:
    """What a base model of text gets: int64 tensors (contexts, length).

    Attributes:
        input_ids: token ids, right-padded.
        attention_mask: 1 for tokens, 0 for padding; None for packed contexts.
        position_ids: restart at each segment of a packed context; None leaves them to the model.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor | None = None
    position_ids: torch.Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Contexts and their length."""
        contexts, length = self.input_ids.shape
        return contexts, length

    def arguments(self) -> dict[str, torch.Tensor]:
        """Return those that are given."""
        given = {name: getattr(self, name) for name in ("input_ids", "attention_mask", "position_ids")}
        return {name: value for name, value in given.items() if value is not None}


@dataclass(frozen=True)
class ItemBatch:
    """What any other model gets: images, spectrograms, proteins.

    Attributes:
        inputs: keyword arguments of the model; floating tensors are given to it in its own precision.
        items: how many there are.
        tokens: of each item at the sites (patches, frames), padding included; None: as many as the sites yield.
    """

    inputs: Mapping[str, Any]
    items: int
    tokens: int | None = None

    @property
    def shape(self) -> tuple[int, int | None]:
        """Items and tokens."""
        return self.items, self.tokens

    def arguments(self) -> Mapping[str, Any]:
        """Return the inputs."""
        return self.inputs


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
    def __call__(self, batch: ModelBatch) -> dict[str, torch.Tensor]:
        """Run the model and return each site's activations, (items, tokens, d), on the device of the site's layer.

        Raises:
            ConfigError: a site did not run, or did not yield one row per token.
        """
        device, dtype = input_place(self.model)

        def place(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            return value.to(device, dtype if value.is_floating_point() else None, non_blocking=True)

        self._found.clear()
        self.model(**{name: place(value) for name, value in batch.arguments().items()})
        items, tokens = batch.shape
        result: dict[str, torch.Tensor] = {}
        for site in self.sites:
            x = self._found.pop(site.id, None)
            if x is None:
                raise ConfigError(f"site {site.id}: the module did not run in a forward pass; choose another site")
            result[site.id] = x = _as_rows(site, x, items, tokens)
            tokens = x.shape[1]  # known now, and the same at all sites: their rows stand side by side
        return result

    def _reader(self, site: Site) -> See:
        """Return what keeps the site's tensor; a module that runs twice in one pass is ambiguous."""

        def keep(x: torch.Tensor) -> None:
            if site.id in self._found:
                raise ConfigError(f"site {site.id}: the module runs more than once in a forward pass; choose another")
            self._found[site.id] = x.clone()  # later modules may add to it in place

        return keep


def input_place(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Return the device that a model's inputs go to, and the precision of its weights.

    A model over several devices takes its inputs where its first layer works. Weights that are kept elsewhere until
    they are used stand on the device "meta", which is no place for inputs: accelerate's hook on the layer knows one.
    """
    found: torch.device | None = None
    dtype: torch.dtype | None = None
    for module in model.modules():
        hook = getattr(module, "_hf_hook", None)
        for part in getattr(hook, "hooks", [hook]):
            where = getattr(part, "execution_device", None)
            if found is None and where is not None:
                found = torch.device("cuda", where) if isinstance(where, int) else torch.device(where)
        for parameter in module.parameters(recurse=False):
            if found is None and parameter.device.type != "meta":
                found = parameter.device
            if dtype is None and parameter.is_floating_point():
                dtype = parameter.dtype
        if found is not None and dtype is not None:
            break
    return found or torch.device("cpu"), dtype or torch.float32


def _as_rows(site: Site, x: torch.Tensor, items: int, tokens: int | None) -> torch.Tensor:
    """Return a site's tensor as (items, tokens, d); experts and some layers see the tokens of all items in one row."""
    whole = x.dim() == 3 and len(x) == items and tokens in (None, x.shape[1])
    flat = x.dim() == 2 and len(x) % items == 0 and tokens in (None, len(x) // items)
    if not (whole or flat):
        expected = f"{items} x {'any number' if tokens is None else tokens}"
        raise ConfigError(
            f"site {site.id}: activations of shape {tuple(x.shape)} are not one row per token of {expected} "
            "(items x tokens); choose another site"
        )
    return x.reshape(items, -1, x.shape[-1])
