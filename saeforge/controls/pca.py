"""PCA as an SAE: the best linear reconstruction with as many numbers a token."""

from __future__ import annotations

import torch

from saeforge.data.shard_source import ShardSource
from saeforge.errors import ConfigError
from saeforge.sae import SAE


def pca(source: ShardSource, rank: int, *, max_rows: int | None = None) -> SAE:
    """The first principal components of training rows as an SAE: two latents for each, one a sign.

    Its reconstruction is mean + sum over the components of ((x - mean) . u) u, exact in the span; its L0 is the rank.

    Args:
        source: with one pair, of an SAE.
        rank: components, at most d.
        max_rows: training rows to fit on, at most (whole blocks, at least one); None: all.

    Raises:
        ConfigError: a transcoder, or an impossible rank.
    """
    pair = source.pairs[0]
    if pair.inputs != pair.targets:
        raise ConfigError("PCA reconstructs what it reads, a transcoder something else; leave the control pca out")
    d = pair.widths(source)[0]
    if not 1 <= rank <= d:
        raise ConfigError(f"rank = {rank}: expected 1 to {d}, the width of the activations")
    mean = torch.tensor(pair.statistics(source)[0].mean, dtype=torch.float64)
    blocks = source.n_blocks("train")
    if max_rows is not None:
        blocks = min(blocks, max(1, max_rows // source.block_rows("train")))
    scatter = torch.zeros(d, d, dtype=torch.float64)
    for block in range(blocks):
        rows = pair.batch(source.read_block("train", block)).x.double() - mean
        scatter.addmm_(rows.T, rows)
    components = torch.linalg.eigh(scatter).eigenvectors[:, -rank:].T
    both = torch.cat([components, -components])
    return SAE(
        both.float(),
        -(both @ mean).float(),
        both.float(),
        mean.float(),
        rule="threshold",
        threshold=torch.zeros(2 * rank),
        meta=dict(pair.identity),
    )
