"""What a latent writes to the logits of the model that it belongs to: W_dec W_U, one batch of latents at a time.

The convention is that of SAEDashboard: the decoder's row times the unembedding as it stands, without the final norm.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from saeforge.errors import ConfigError
from saeforge.sae import SAE

BINS = 50
ROWS = 10


@dataclass(frozen=True)
class Logits:
    """Of a batch of latents (n, ...).

    Attributes:
        top, bottom: token ids (n, ROWS), largest and smallest first. top_values, bottom_values: their logits.
        centres, heights: (n, BINS) histogram over the vocabulary, bins of equal width from the least to the largest.
    """

    top: Tensor
    top_values: Tensor
    bottom: Tensor
    bottom_values: Tensor
    centres: Tensor
    heights: Tensor


class Unembedding:
    """The logits of latents.

    Args:
        model: a causal language model of transformers.
        sae: whose decoder writes in that model's residual stream.

    Raises:
        ConfigError: the model has no unembedding, or of another width than the decoder.
    """

    def __init__(self, model: nn.Module, sae: SAE) -> None:
        head = model.get_output_embeddings()  # type: ignore[operator]
        if head is None:
            raise ConfigError("this model has no unembedding, so that latents have no logits")
        self._W_U: Tensor = head.weight.detach()  # (vocabulary, d)
        self._W_dec = sae.W_dec
        if self._W_U.shape[1] != sae.d_out:
            raise ConfigError(
                f"the decoder is {sae.d_out} wide and the unembedding {self._W_U.shape[1]}: this SAE does not write in "
                "the residual stream, and its latents have no logits"
            )

    def __call__(self, first: int, last: int) -> Logits:
        """The logits of latents first to last - 1."""
        logits = (self._W_dec[first:last].to(self._W_U.device, torch.float32) @ self._W_U.float().T).cpu()
        n = min(ROWS, logits.shape[1])
        top, bottom = logits.topk(n), logits.topk(n, largest=False)
        least, largest = logits.amin(1, keepdim=True), logits.amax(1, keepdim=True)
        width = (largest - least) / BINS
        # A row of equal logits has bins of no width: all of it stands in the first.
        bins = ((logits - least) / width.clamp_min(torch.finfo(torch.float32).tiny)).long().clamp_max_(BINS - 1)
        heights = torch.zeros(len(logits), BINS, dtype=torch.long).scatter_add_(1, bins, torch.ones_like(bins))
        centres = least + width * (torch.arange(BINS) + 0.5)
        return Logits(top.indices, top.values, bottom.indices, bottom.values, centres, heights)
