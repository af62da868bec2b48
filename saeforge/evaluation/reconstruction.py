"""What can be said of an SAE from stored activations alone, without the language model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from saeforge.data.loader import ValidationLoader
from saeforge.data.shard_source import ShardSource
from saeforge.metrics import Firing, Reconstruction, ReconstructionMetrics
from saeforge.metrics.conventions import RECONSTRUCTION as CONVENTIONS
from saeforge.sae import SAE

__all__ = ["CONVENTIONS", "Measured", "measure_reconstruction"]


@dataclass(frozen=True)
class Measured:
    """The result of `measure_reconstruction`.

    Attributes:
        metrics: of reconstruction and sparsity.
        firing: how often latents fired.
        alive: (d_sae,) bool, latents that fired.
    """

    metrics: Reconstruction
    firing: Firing
    alive: Tensor


def measure_reconstruction(
    sae: SAE,
    source: ShardSource,
    split: str,
    *,
    max_tokens: int | None = None,
    batch_size: int = 4096,
    on_progress: Callable[[int, int], None] | None = None,
) -> Measured:
    """Encode and decode stored activations.

    Args:
        sae: on its device.
        source: the dataset.
        split: which has blocks.
        max_tokens: read at most so many (whole blocks, at least one); None: all.
        batch_size: rows at a time; the result does not depend on it.
        on_progress: called with (batches done, batches in all).
    """
    pair = source.pairs[0]
    mean = torch.tensor(pair.statistics(source)[1].mean)
    norms = sae.W_dec.norm(dim=1)
    sums = ReconstructionMetrics(sae.d_out, sae.d_sae, pivot=mean, decoder_norms=norms, device=sae.device)
    loader = ValidationLoader(source, batch_size, max_rows=max_tokens, split=split)
    for done, rows in enumerate(loader, start=1):
        batch = pair.batch(rows)
        x = batch.x.to(sae.device).float()
        code = sae.encode(x)
        sums.update(batch.target.to(sae.device), sae.decode(code, x), code)
        if on_progress is not None:
            on_progress(done, len(loader))
    metrics = sums.compute()
    documents = _documents(source, split, metrics.tokens // source.block_rows(split))
    return Measured(metrics, sums.firing(documents), sums.counts > 0)


def _documents(source: ShardSource, split: str, blocks: int) -> int | None:
    """Return how many documents the rows of the first blocks are from; None for activations without their texts."""
    dataset = source.datasets[0]
    if not dataset.manifest.packing:
        return None  # the table of rows then numbers rows, not documents
    seen = np.empty(0, dtype=np.uint32)
    for block in range(blocks):
        seen = np.union1d(seen, dataset.read_rows(split, block)[:, 0])
    return len(seen)
