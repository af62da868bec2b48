"""`whole`: the SAE that several ranks hold together, on the host of those that want it."""

from __future__ import annotations

import torch
from torch import Tensor

from saeforge.ops import Shard
from saeforge.sae import SAE

#: Bytes that a rank sends at a time: an SAE may be wider than the memory of any one device.
CHUNK_BYTES = 1 << 26


def whole(part: SAE, shard: Shard, device: torch.device, *, kept: bool) -> SAE | None:
    """Puts the parts of an SAE (`SAE.part`) together; every rank of the shard's group must call it.

    Args:
        part: of this rank, on any device.
        shard: its latents.
        device: that the group exchanges tensors of.
        kept: whether this rank wants the SAE; others hold no more than a chunk of it.

    Returns:
        The SAE on the CPU, or None.
    """
    cut = {name: getattr(part, name) for name in ("W_enc", "b_enc", "W_dec", "threshold")}
    joined = {name: None if own is None else _joined(own, shard, device, kept=kept) for name, own in cut.items()}
    if not kept:
        return None
    assert joined["W_dec"] is not None
    return SAE(
        joined["W_enc"],
        joined["b_enc"],
        joined["W_dec"],
        part.b_dec.cpu(),
        rule=part.rule,
        threshold=joined["threshold"],
        k=part.k,
        W_skip=None if part.W_skip is None else part.W_skip.cpu(),
        meta=part.meta,
        copy=False,
    )


def _joined(own: Tensor, shard: Shard, device: torch.device, *, kept: bool) -> Tensor | None:
    """(d_sae, ...) of the ranks' (d_sae / n, ...)."""
    out = torch.empty(shard.d_sae, *own.shape[1:], dtype=own.dtype) if kept else None
    rows = max(1, CHUNK_BYTES // max(1, own[:1].nbytes))
    for start in range(0, len(own), rows):
        chunks = shard.group.gather(own[start : start + rows].to(device))
        if out is not None:
            out.view(shard.group.size, *own.shape)[:, start : start + rows] = chunks
    return out
