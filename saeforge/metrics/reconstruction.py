"""Metrics of reconstruction and sparsity, as sums: exact for any batch size and any number of ranks.

An accumulator holds float64 sums only; `update` adds rows, `merge` adds another accumulator, `reduce` adds ranks and
`compute` divides once. Averages of per-batch ratios, which depend on the batch size, do not occur.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.linalg import vecdot

from saeforge.errors import ConfigError
from saeforge.ops import Group, Shard, SparseCode

#: Edges of the density histogram, log10 of the share of tokens on which a latent fires.
DENSITY_EDGES = tuple(quarter / 4 for quarter in range(-28, 1))
#: Most bins of the histogram of L0, which are whole numbers wide.
L0_BINS = 60

# Rows of a piece on a CPU, 1 MiB a copy in float64: 2,048 rows of 768 take 11 ms, in one piece 87 ms, most of it page
# faults. On a GPU a piece costs launches, so there it is all rows at once.
_PIECE_ELEMENTS = 1 << 17


@dataclass(frozen=True)
class Reconstruction:
    """The result of `ReconstructionMetrics.compute`; `conventions.RECONSTRUCTION` defines each. NaN is undefined."""

    tokens: int
    l0_mean: float
    l0_p5: int
    l0_p50: int
    l0_p95: int
    l1: float
    fvu: float
    mse: float
    mse_per_dim: float
    cosine: float
    l2_ratio: float
    reconstruction_bias: float
    ev_legacy: float
    ev_centered: float
    nmse_raw: float
    nmse_global: float
    dead: int
    rare_1e_5: int
    rare_1e_6: int
    dense_1pct: int
    dense_10pct: int
    firing_share_1pct: float
    firing_share_10pct: float


@dataclass(frozen=True)
class Firing:
    """How often latents fire; `conventions.FIRING` defines each."""

    tokens: int
    documents: int | None
    dead: int
    dead_bound: float | None
    log10_edges: tuple[float, ...]
    latents: tuple[int, ...]
    l0_edges: tuple[int, ...]
    l0_tokens: tuple[int, ...]


class ReconstructionMetrics:
    """Accumulates what can be judged from activations alone.

    Args:
        d: width of the target.
        d_sae: number of latents.
        pivot: (d,) a guess of the mean, like that of the train split. Sums are taken about it, since
            sum |x|^2 - |sum x|^2 / n cancels when the mean is large against the spread. Any value gives the same
            figures but for `ev_legacy`, whose ratios need a mean beforehand: without a pivot it is NaN.
        decoder_norms: (d_sae,) for `l1`, which is NaN without.
        device: where rows are.
        shard: of ranks that share out the latents, this one's: codes and `decoder_norms` are those of its own latents,
            rows and reconstructions the same on all of them. `update` then exchanges the L0 of each row (8 B bytes),
            and `reduce` joins the rest.

    Raises:
        ConfigError: a shard of another number of latents.
    """

    def __init__(
        self,
        d: int,
        d_sae: int,
        *,
        pivot: Tensor | None = None,
        decoder_norms: Tensor | None = None,
        device: torch.device | str = "cpu",
        shard: Shard | None = None,
    ) -> None:
        if shard is not None and shard.d_sae != d_sae:
            raise ConfigError(f"d_sae = {d_sae}, but the shard is one of {shard.d_sae} latents; give the number of all")
        self.shard = shard
        self.pivot = torch.zeros(d, dtype=torch.float64, device=device)
        if pivot is not None:
            self.pivot.copy_(pivot)
        self.norms = None if decoder_norms is None else decoder_norms.detach().to(device=device, dtype=torch.float64)
        self.d, self.d_sae = d, d_sae
        # Over tokens: 1, |x - p|^2, |r|^2, |x_hat|^2, x.x_hat, cos, |x_hat|/|x|, 1 - |r|^2/|x - p|^2, |r|^2/|x|^2, L1.
        self.sums = torch.zeros(10, dtype=torch.float64, device=device)
        # What was not given makes its figure NaN, after any merge.
        self.sums[7] = math.nan if pivot is None else 0.0
        self.sums[9] = math.nan if self.norms is None else 0.0
        # Over tokens: x - p and r, by dimension.
        self.vectors = torch.zeros(2, d, dtype=torch.float64, device=device)
        self.l0_histogram = torch.zeros(d_sae + 1, dtype=torch.int64, device=device)
        here = d_sae if shard is None else len(shard)
        self.counts = torch.zeros(here, dtype=torch.int64, device=device)

    @torch.no_grad()
    def update(self, target: Tensor, reconstruction: Tensor, code: SparseCode) -> None:
        """Adds rows: target and reconstruction (B, d) in raw units, and their code. Nothing waits for the device.

        A code of ragged rows has its number of entries read, as everywhere.
        """
        rows = max(1, _PIECE_ELEMENTS // self.d) if target.device.type == "cpu" else max(1, len(target))
        for x, x_hat in zip(target.split(rows), reconstruction.split(rows), strict=True):
            self._add(x.double(), x_hat.double())
        if self.norms is not None:
            values, indices = code.values[: code.nnz], code.indices[: code.nnz]
            self.sums[9] += values.abs().double().dot(self.norms[indices])
        l0 = code.l0() if self.shard is None else self.shard.group.sum(code.l0())
        self.l0_histogram.index_add_(0, l0, torch.ones_like(l0))
        self.counts += code.active_counts()

    def _add(self, x: Tensor, x_hat: Tensor) -> None:
        dot, square, square_hat = vecdot(x, x_hat), vecdot(x, x), vecdot(x_hat, x_hat)
        residual = x - x_hat
        error = vecdot(residual, residual)
        centred = x - self.pivot
        spread = vecdot(centred, centred)
        columns = (
            torch.ones_like(dot),
            spread,
            error,
            square_hat,
            dot,
            _ratio(dot, (square * square_hat).sqrt()),
            _ratio(square_hat, square).sqrt(),
            torch.where(spread > 0, 1 - _ratio(error, spread), 0.0),
            _ratio(error, square),
        )
        self.sums[:9] += torch.stack(columns).sum(1)
        self.vectors[0] += centred.sum(0)
        self.vectors[1] += residual.sum(0)

    def merge(self, other: ReconstructionMetrics) -> None:
        """Adds everything another accumulator has seen.

        Raises:
            ValueError: another pivot, or other latents; the sums would not belong together.
        """
        if not torch.equal(self.pivot, other.pivot) or self.counts.shape != other.counts.shape:
            raise ValueError("merge() needs two accumulators with the same pivot and latents")
        self.sums += other.sums
        self.vectors += other.vectors
        self.l0_histogram += other.l0_histogram
        self.counts += other.counts

    def reduce(self, group: Group) -> None:
        """Adds all ranks' sums; afterwards every rank holds the total, of all latents where they are shared out.

        Args:
            group: the ranks that saw other rows.
        """
        if self.shard is not None:
            self.sums[9] = self.shard.group.sum(self.sums[9])
            self.counts = self.shard.group.gather(self.counts).flatten()
            self.shard = None
        self.sums = group.sum(self.sums)
        self.vectors = group.sum(self.vectors)
        self.l0_histogram = group.sum(self.l0_histogram)
        self.counts = group.sum(self.counts)

    def compute(self) -> Reconstruction:
        """The metrics of everything seen so far.

        Raises:
            ValueError: nothing was seen, or a rank has seen its own latents only.
        """
        self._check_whole()
        n, spread, error, square_hat, dot, cosine, ratio, legacy, raw, l1 = self.sums.tolist()
        if n == 0:
            raise ValueError("no rows were seen; update() first")
        shift, bias = self.vectors / n
        variance = spread - n * float(shift.square().sum())
        mean = self.pivot + shift
        about_grand_mean = variance + n * float((mean - mean.mean()).square().sum())
        cumulative = self.l0_histogram.cumsum(0)

        def percentile(percent: int) -> int:
            # Nearest rank: the smallest L0 that this share of tokens does not exceed.
            rank = -(-percent * int(n) // 100)
            return int(torch.searchsorted(cumulative, torch.tensor(rank, device=cumulative.device)))

        levels = torch.arange(self.d_sae + 1, dtype=torch.float64, device=self.sums.device)
        firings = int(self.counts.sum())
        dense = {percent: self.counts * 100 > percent * int(n) for percent in (1, 10)}
        return Reconstruction(
            tokens=int(n),
            l0_mean=float((self.l0_histogram * levels).sum() / n),
            l0_p5=percentile(5),
            l0_p50=percentile(50),
            l0_p95=percentile(95),
            l1=l1 / n,
            fvu=_share(error, variance),
            mse=error / n,
            mse_per_dim=error / n / self.d,
            cosine=cosine / n,
            l2_ratio=ratio / n,
            reconstruction_bias=square_hat / dot if dot else math.nan,
            ev_legacy=legacy / n,
            ev_centered=1 - _share(error - n * float(bias.square().sum()), variance),
            nmse_raw=raw / n,
            nmse_global=_share(error, about_grand_mean),
            dead=int((self.counts == 0).sum()),
            rare_1e_5=int((self.counts * 100_000 < int(n)).sum()),
            rare_1e_6=int((self.counts * 1_000_000 < int(n)).sum()),
            dense_1pct=int(dense[1].sum()),
            dense_10pct=int(dense[10].sum()),
            firing_share_1pct=_share(int(self.counts[dense[1]].sum()), firings),
            firing_share_10pct=_share(int(self.counts[dense[10]].sum()), firings),
        )

    def _check_whole(self) -> None:
        if self.shard is not None:
            raise ValueError("reduce() first: the latents of the other ranks are not counted yet")

    def firing(self, documents: int | None = None) -> Firing:
        """How often latents fired.

        Args:
            documents: that the tokens came from, where that is known.

        Raises:
            ValueError: see `compute`.
        """
        self._check_whole()
        n = int(self.sums[0])
        if n == 0:
            raise ValueError("no rows were seen; update() first")
        latents = density_histogram(self.counts, n)
        dead = self.d_sae - int(latents.sum())
        bound = min(1.0, 3 / documents) if documents else None
        return Firing(n, documents, dead, bound, DENSITY_EDGES, tuple(latents.tolist()), *self._l0_bins())

    def _l0_bins(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Edges and tokens of a histogram of L0, from the least to the greatest that occurs."""
        counts = self.l0_histogram.cpu()
        occurring = counts.nonzero().flatten()
        low, high = int(occurring[0]), int(occurring[-1])
        width = -(-(high - low + 1) // L0_BINS)
        tokens = [int(part.sum()) for part in counts[low : high + 1].split(width)]
        return tuple(low + width * i for i in range(len(tokens) + 1)), tuple(tokens)


def density_histogram(counts: Tensor, tokens: int) -> Tensor:
    """Histogram over latents of log10(share of tokens on which one fires), on the CPU; sums over shards of latents.

    Args:
        counts: (d_sae,) int64, tokens on which each fired; a latent that never did is in no bin.
        tokens: in all, at least 1.

    Returns:
        int64, one bin less than `DENSITY_EDGES`: a bin has its left edge, the first also what is below, the last also
        what is 1.
    """
    alive = counts[counts > 0].double().cpu() / tokens
    # 10.0**-3 and 1 / 1000 are the same float, so that a rate on an edge falls to its right.
    edges = torch.tensor([10.0**edge for edge in DENSITY_EDGES], dtype=torch.float64)
    bins = len(edges) - 1
    found = (torch.bucketize(alive, edges, right=True) - 1).clamp(0, bins - 1)
    return torch.bincount(found, minlength=bins)


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    """part / whole, 0 where whole is 0."""
    return torch.where(whole > 0, part / torch.where(whole > 0, whole, 1.0), 0.0)


def _share(part: float, whole: float) -> float:
    return part / whole if whole > 0 else math.nan
