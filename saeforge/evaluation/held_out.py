"""The stored texts that an SAE is judged on with its model, and which predictions of the next token are scored."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from saeforge.data.manifest import Manifest
from saeforge.errors import ConfigError
from saeforge.lm.capture import TokenBatch
from saeforge.lm.pack import open_stored

_CONTEXTS_AT_ONCE = 1024


@dataclass(frozen=True)
class ScoredBatch:
    """A batch of contexts with what is spliced and what is scored in it; indices are into the flattened batch.

    Attributes:
        batch: what the model gets.
        kept: int64, the kept tokens: where the SAE stands in for the model's activations.
        predicting: int64, the positions whose predictions are scored.
        targets: int64, the tokens that they should predict.
        documents: the document number of each.
    """

    batch: TokenBatch
    kept: torch.Tensor
    predicting: torch.Tensor
    targets: torch.Tensor
    documents: np.ndarray


class HeldOutTexts:
    """The stored contexts of one split, up to a budget of scored predictions.

    A prediction is scored where both the predicting token and the next one are kept (so neither is special, padding or
    a dropped first token) and stand in one segment.

    Contexts come in their stored order, which is a seeded shuffle: the first ones are a random sample.

    Args:
        root: the dataset's folder or URL. manifest: its manifest.
        split: "validation" or "train".
        budget: predictions to score; the context that reaches it is used whole.

    Attributes:
        n_contexts: contexts used. n_all: contexts of the split.
        tokens: predictions scored.
        longest: tokens of the longest context used.
        documents: records (id, name, label, split) by document number.

    Raises:
        ConfigError: the dataset was made without texts, or they leave nothing to score.
        DatasetError: the texts are damaged or lost.
    """

    def __init__(self, root: str | Path, manifest: Manifest, split: str, *, budget: int) -> None:
        if not manifest.packing or split not in manifest.packing["splits"]:
            raise ConfigError(f"{root} holds activations without their texts; harvest with `saeforge harvest`")
        stored = open_stored(root, manifest.packing, [split])
        self.contexts = stored.contexts[split]
        self.n_all = len(self.contexts)
        self.n_contexts, self.tokens = self._within(budget)
        if self.tokens == 0:
            raise ConfigError(f"the {split} texts of {root} hold no two kept tokens side by side; nothing to predict")
        self.longest = int(np.diff(self.contexts.offsets[: self.n_contexts + 1]).max())
        self.documents: dict[int, dict[str, Any]] = {record["id"]: record for record in stored.documents}

    def batches(self, contexts_at_once: int) -> Iterator[ScoredBatch]:
        """Yield the contexts in batches."""
        for start in range(0, self.n_contexts, contexts_at_once):
            stop = min(start + contexts_at_once, self.n_contexts)
            stored = self.contexts.batch(start, stop)
            scored = self._scored(start, stop)
            flat = np.arange(self.contexts.offsets[start], self.contexts.offsets[stop])[scored]
            context = np.searchsorted(self.contexts.offsets, flat, side="right") - 1
            width = stored.batch.input_ids.shape[1]
            predicting = (context - start) * width + flat - self.contexts.offsets[context]
            yield ScoredBatch(
                stored.batch,
                stored.kept,
                torch.from_numpy(predicting),
                torch.from_numpy(np.asarray(self.contexts.arrays["tokens"][flat + 1], dtype=np.int64)),
                np.asarray(self.contexts.arrays["documents"][flat], dtype=np.int64),
            )

    def _scored(self, start: int, stop: int) -> np.ndarray:
        """Return for each stored token of some contexts whether its prediction of the next one is scored."""
        first, last = int(self.contexts.offsets[start]), int(self.contexts.offsets[stop])
        keep = np.asarray(self.contexts.arrays["keep"][first:last])
        within = np.asarray(self.contexts.arrays["within"][first:last])
        scored = np.zeros(last - first, dtype=bool)
        # A new segment, and so a new context, begins with 0 in `within`.
        scored[:-1] = keep[:-1] & keep[1:] & (within[1:] != 0)
        return scored

    def _within(self, budget: int) -> tuple[int, int]:
        """Return how many contexts the budget takes, and how many predictions they hold."""
        tokens = 0
        for start in range(0, self.n_all, _CONTEXTS_AT_ONCE):
            stop = min(start + _CONTEXTS_AT_ONCE, self.n_all)
            starts = self.contexts.offsets[start:stop] - self.contexts.offsets[start]
            reached = tokens + np.cumsum(np.add.reduceat(self._scored(start, stop), starts, dtype=np.int64))
            if reached[-1] >= budget:
                last = int(np.searchsorted(reached, budget))
                return start + last + 1, int(reached[last])
            tokens = int(reached[-1])
        return self.n_all, tokens
