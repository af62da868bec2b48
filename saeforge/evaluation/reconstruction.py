"""What can be said of an SAE from stored activations alone, without the language model."""

from __future__ import annotations

from collections.abc import Callable

import torch

from saeforge.data.loader import ValidationLoader
from saeforge.data.source import ShardSource
from saeforge.metrics import Reconstruction, ReconstructionMetrics
from saeforge.sae import SAE

#: What each number means, kept beside the numbers: the field's definitions differ under the same names.
CONVENTIONS = {
    "l0": "latents != 0 of a token; mean and 5th, 50th, 95th percentile (nearest rank)",
    "fvu": "sum |x - x_hat|^2 / sum |x - mu|^2, mu the mean over all evaluated tokens",
    "mse": "mean over tokens of |x - x_hat|^2, summed over dimensions, raw units",
    "cosine": "mean over tokens of cos(x, x_hat)",
    "l2_ratio": "mean over tokens of |x_hat| / |x|",
    "reconstruction_bias": "sum |x_hat|^2 / sum x.x_hat (Rajamanoharan et al. 2024, eq. 10); below 1 is shrinkage",
    "dead": "latents that fired on no evaluated token; such a latent's rate is below 3 / tokens with 95% confidence",
    "dense_1pct, dense_10pct": "latents that fired on more than 1% and 10% of the evaluated tokens",
    "tokens": "documents of the named split only; special tokens and padding are not in the dataset",
}


def measure_reconstruction(
    sae: SAE,
    source: ShardSource,
    split: str,
    *,
    max_tokens: int | None = None,
    batch_size: int = 4096,
    on_progress: Callable[[int, int], None] | None = None,
) -> Reconstruction:
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
    metrics = ReconstructionMetrics(sae.d_out, sae.d_sae, pivot=mean, device=sae.device)
    loader = ValidationLoader(source, batch_size, max_rows=max_tokens, split=split)
    for done, rows in enumerate(loader, start=1):
        batch = pair.batch(rows)
        x = batch.x.to(sae.device).float()
        code = sae.encode(x)
        metrics.update(batch.target.to(sae.device), sae.decode(code, x), code)
        if on_progress is not None:
            on_progress(done, len(loader))
    return metrics.compute()
