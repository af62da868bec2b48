"""Items of one split as the harvest sees them: their inputs, which tokens are rows, and where each row comes from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from saeforge.errors import ConfigError, DatasetError
from saeforge.lm.capture import ItemBatch
from saeforge.lm.pack import ContextBatch
from saeforge.lm.tokens import NO_POSITION

MakeInputs = Callable[[list[int]], Mapping[str, Any]]
Keep = torch.Tensor | Callable[[Mapping[str, Any]], torch.Tensor] | None


class Items:
    """The items of one split in their final order: contexts for the harvest.

    Args:
        inputs: makes the model's inputs.
        keep: which tokens to store.
        order: uint32 item numbers.
        counts: uint32 rows that each of them keeps.
        tokens: of an item; None if they differ.
    """

    def __init__(
        self, inputs: MakeInputs, keep: Keep, order: np.ndarray, counts: np.ndarray, tokens: int | None
    ) -> None:
        self.inputs = inputs
        self.keep = keep
        self.order = order
        self.tokens = tokens
        self.kept_before = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])

    def __len__(self) -> int:
        return len(self.order)

    @property
    def kept_rows(self) -> int:
        """Kept tokens of the split."""
        return int(self.kept_before[-1])

    def batch(self, start: int, stop: int) -> ContextBatch[ItemBatch]:
        """Return items `start` to `stop` of the order.

        Raises:
            DatasetError: the inputs are not those that were counted.
        """
        numbers = self.order[start:stop]
        made = make_inputs(self.inputs, numbers.tolist())
        if callable(self.keep):
            mask = mask_of(self.keep, made, len(numbers))
        else:
            assert self.tokens is not None
            row = np.ones(self.tokens, dtype=bool) if self.keep is None else self.keep.numpy()
            mask = np.broadcast_to(row, (len(numbers), self.tokens))
        changed = np.flatnonzero(mask.sum(axis=1) != np.diff(self.kept_before[start : stop + 1]))
        if len(changed):
            raise DatasetError(
                f"item {numbers[changed[0]]} keeps {mask[changed[0]].sum()} tokens now, and another number when it was "
                "counted; inputs must be the same at each call"
            )
        place, position = np.nonzero(mask)
        ids = made.get("input_ids")
        if isinstance(ids, torch.Tensor) and ids.shape == mask.shape:
            tokens = ids.cpu().numpy()[mask]
        else:
            tokens = np.full(len(place), NO_POSITION)
        rows = np.stack([numbers[place], position, tokens, numbers[place]], axis=1).astype(np.uint32)
        kept = torch.from_numpy(np.flatnonzero(mask))
        return ContextBatch(ItemBatch(made, len(numbers), mask.shape[1]), kept, rows)


def make_inputs(inputs: MakeInputs, numbers: list[int]) -> Mapping[str, Any]:
    """Return the model's keyword arguments for some items.

    Raises:
        ConfigError: the function returned something else.
    """
    made = inputs(numbers)
    if not isinstance(made, Mapping) or not all(isinstance(key, str) for key in made):
        raise ConfigError(
            f"inputs returned {type(made).__name__}: expected the model's keyword arguments, such as a dict with "
            "pixel_values or input_ids"
        )
    return made


def mask_of(keep: Callable[[Mapping[str, Any]], torch.Tensor], made: Mapping[str, Any], items: int) -> np.ndarray:
    """Return the bool (items, tokens) mask that a function makes."""
    mask = keep(made)
    if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool or mask.dim() != 2 or len(mask) != items:
        found = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise ConfigError(f"keep returned {found} for {items} items: expected a bool tensor (items, tokens)")
    return mask.cpu().numpy()
