"""Metrics of reconstruction and sparsity, as sums: exact for any batch size and any number of ranks.

An accumulator holds float64 sums only; `update` adds rows, `merge` adds another accumulator, `reduce` adds ranks and
`compute` divides once. Averages of per-batch ratios, which depend on the batch size, do not occur.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saeforge.ops import Group, SparseCode


@dataclass(frozen=True)
class Reconstruction:
    """The result of `ReconstructionMetrics.compute`; the definitions are in that class's docstring."""

    tokens: int
    l0_mean: float
    l0_p5: int
    l0_p50: int
    l0_p95: int
    fvu: float
    mse: float
    cosine: float
    l2_ratio: float
    reconstruction_bias: float
    dead: int
    dense_1pct: int
    dense_10pct: int


class ReconstructionMetrics:
    """Accumulates what can be judged from activations alone.

    With target x, reconstruction x_hat, residual r = x - x_hat, all in raw units, over n tokens:

    * L0: number of latents != 0 of a token; mean, and the 5th, 50th, 95th percentile (nearest rank);
    * FVU = sum |r|^2 / sum |x - mu|^2 with mu the mean over everything seen, not over a batch;
    * mse = sum |r|^2 / n (summed over dimensions); cosine = mean cos(x, x_hat); l2_ratio = mean |x_hat| / |x|
      (a token without direction counts as 0 in both);
    * reconstruction_bias = sum |x_hat|^2 / sum x.x_hat (Rajamanoharan et al. 2024, eq. 10); below 1 is shrinkage;
    * dead: latents that never fired (a rate below 3/n with 95% confidence, if tokens were independent);
      dense_1pct, dense_10pct: latents that fired on more than 1% and 10% of tokens.

    Args:
        d: width of the target.
        d_sae: number of latents.
        pivot: (d,) a guess of the mean; sums are taken about it, since sum |x|^2 - |sum x|^2 / n cancels when the
            mean is large against the spread. Any value is correct.
    """

    def __init__(self, d: int, d_sae: int, *, pivot: Tensor | None = None, device: torch.device | str = "cpu") -> None:
        self.pivot = torch.zeros(d, dtype=torch.float64, device=device)
        if pivot is not None:
            self.pivot.copy_(pivot)
        self.d_sae = d_sae
        # n, sum |x - p|^2, sum |r|^2, sum |x_hat|^2, sum x.x_hat, sum cos, sum |x_hat|/|x|, then sum (x - p) (d)
        self.sums = torch.zeros(7 + d, dtype=torch.float64, device=device)
        self.l0_histogram = torch.zeros(d_sae + 1, dtype=torch.int64, device=device)
        self.counts = torch.zeros(d_sae, dtype=torch.int64, device=device)

    @torch.no_grad()
    def update(self, target: Tensor, reconstruction: Tensor, code: SparseCode) -> None:
        """Adds rows: target and reconstruction (B, d), and their code."""
        x, x_hat = target.double(), reconstruction.double()
        centred = x - self.pivot
        square, square_hat, dot = x.square().sum(1), x_hat.square().sum(1), (x * x_hat).sum(1)
        tiny = torch.finfo(torch.float64).tiny
        self.sums += torch.cat(
            [
                torch.stack(
                    [
                        torch.tensor(float(len(x)), dtype=torch.float64, device=x.device),
                        centred.square().sum(),
                        (x - x_hat).square().sum(),
                        square_hat.sum(),
                        dot.sum(),
                        (dot / (square * square_hat).sqrt().clamp_min(tiny)).sum(),
                        torch.where(square > 0, (square_hat / square.clamp_min(tiny)).sqrt(), 0.0).sum(),
                    ]
                ),
                centred.sum(0),
            ]
        )
        self.l0_histogram += torch.bincount(code.l0(), minlength=self.d_sae + 1)
        self.counts += code.active_counts()

    def merge(self, other: ReconstructionMetrics) -> None:
        """Adds everything another accumulator has seen.

        Raises:
            ValueError: another pivot; the sums would not belong together.
        """
        if not torch.equal(self.pivot, other.pivot):
            raise ValueError("merge() needs two accumulators with the same pivot")
        self.sums += other.sums
        self.l0_histogram += other.l0_histogram
        self.counts += other.counts

    def reduce(self, group: Group) -> None:
        """Adds all ranks' sums; afterwards every rank holds the total."""
        self.sums = group.sum(self.sums)
        self.l0_histogram = group.sum(self.l0_histogram)
        self.counts = group.sum(self.counts)

    def compute(self) -> Reconstruction:
        """The metrics of everything seen so far.

        Raises:
            ValueError: nothing was seen.
        """
        n, spread, residual, square_hat, dot, cosine, ratio = self.sums[:7].tolist()
        if n == 0:
            raise ValueError("no rows were seen; update() first")
        variance = spread - self.sums[7:].square().sum().item() / n
        cumulative = self.l0_histogram.cumsum(0)

        def percentile(percent: int) -> int:
            rank = -(
                -percent * int(n) // 100
            )  # nearest rank: the smallest L0 that this share of tokens does not exceed
            return int(torch.searchsorted(cumulative, torch.tensor(rank, device=cumulative.device)))

        levels = torch.arange(self.d_sae + 1, dtype=torch.float64, device=self.sums.device)
        return Reconstruction(
            tokens=int(n),
            l0_mean=float((self.l0_histogram * levels).sum() / n),
            l0_p5=percentile(5),
            l0_p50=percentile(50),
            l0_p95=percentile(95),
            fvu=residual / variance if variance > 0 else float("nan"),
            mse=residual / n,
            cosine=cosine / n,
            l2_ratio=ratio / n,
            reconstruction_bias=square_hat / dot if dot else float("nan"),
            dead=int((self.counts == 0).sum()),
            dense_1pct=int((self.counts > 0.01 * n).sum()),
            dense_10pct=int((self.counts > 0.10 * n).sum()),
        )
