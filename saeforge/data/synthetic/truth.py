"""The truth behind synthetic activations: directions, rates, magnitudes, trees, correlations."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from saeforge.data.synthetic.config import SyntheticConfig
from saeforge.data.synthetic.random import normals

#: Every feature's own noise keeps at least this share of the variance of its Gaussian.
MIN_OWN_VARIANCE = 0.01


@dataclass(frozen=True)
class Truth:
    """What an SAE should find; all on the CPU, feature by feature.

    Attributes:
        config: the law.
        directions: (features, d_in) float32 unit rows.
        bias: (d_in,) float32.
        rates: (features,) float64, the share of rows on which a feature should fire.
        thresholds: (features,) float64: it fires where its Gaussian is above, if its parent does. Raised rates of
            children make up for the rows where the parent is silent or a sibling wins, up to a rate of 1.
        loadings: (features, rank) float64 on the shared factors.
        means: (features,) float64 magnitudes where a feature fires. spreads: (features,) their standard deviations.
        parents: (features,) int64; -1 for roots and free features.
    """

    config: SyntheticConfig
    directions: Tensor
    bias: Tensor
    rates: np.ndarray
    thresholds: np.ndarray
    loadings: np.ndarray
    means: np.ndarray
    spreads: np.ndarray
    parents: np.ndarray

    @classmethod
    def of(cls, config: SyntheticConfig) -> Truth:
        """Draws the truth; a pure function of the configuration."""
        n, seed = config.features, config.seed
        rates, parents = _rates(config), _parents(config)
        directions = torch.from_numpy(normals(n * config.d_in, seed, 0).reshape(n, config.d_in)).float()
        directions = spread_directions(directions, config.orthogonal_steps, config.orthogonal_lr)
        bias = torch.from_numpy(normals(config.d_in, seed, 1))
        loadings = normals(n * config.correlation_rank, seed, 2).reshape(n, -1) * config.correlation_scale
        shared = np.square(loadings).sum(axis=1, keepdims=True)
        most = 1 - MIN_OWN_VARIANCE
        loadings *= np.where(shared > most, np.sqrt(most / np.maximum(shared, most)), 1.0)
        centre, width = config.magnitude_spread
        return cls(
            config=config,
            directions=directions,
            bias=(bias / bias.norm() * config.bias_norm).float(),
            rates=rates,
            thresholds=-torch.special.ndtri(torch.from_numpy(_raised(rates, parents, config))).numpy(),
            loadings=loadings,
            means=np.linspace(config.first_magnitude, config.last_magnitude, n),
            spreads=np.abs(centre + width * normals(n, seed, 3)),
            parents=parents,
        )

    def children(self) -> np.ndarray:
        """Features that have a parent, ascending."""
        children: np.ndarray = np.flatnonzero(self.parents >= 0)
        return children


def _rates(config: SyntheticConfig) -> np.ndarray:
    """Zipf's law, shifted and scaled to run from max_rate to min_rate."""
    law = np.arange(1, config.features + 1, dtype=np.float64) ** -config.zipf
    if law[0] == law[-1]:
        return np.full(config.features, config.max_rate)
    span = (law - law[-1]) / (law[0] - law[-1])
    rates: np.ndarray = config.min_rate + (config.max_rate - config.min_rate) * span
    return rates


def _parents(config: SyntheticConfig) -> np.ndarray:
    """Trees breadth first: the children of the j-th feature of a level are the j-th group of the next one."""
    parents = np.full(config.features, -1, dtype=np.int64)
    start = 0
    for above, size in zip(config.level_sizes, config.level_sizes[1:], strict=False):
        first = start + above
        parents[first : first + size] = start + np.arange(size) // config.branching
        start = first
    return parents


def _raised(rates: np.ndarray, parents: np.ndarray, config: SyntheticConfig) -> np.ndarray:
    """Rates before parents and siblings take their share.

    A child has its rate over its parent's (it fires there only), times one plus the siblings that it expects to compete
    with, at most 1. This is the published rule: where children ask for more than their parent has, the rest is lost.
    """
    has = parents >= 0
    above = np.where(has, rates[parents], 1.0)
    raised = rates / above
    if config.exclusive:
        together = np.bincount(parents[has], weights=rates[has], minlength=len(rates))
        others = np.where(has, together[parents] - rates, 0.0)
        raised *= 1 + np.maximum(others, 0.0) / above
    return np.minimum(raised, 1.0)


def spread_directions(rows: Tensor, steps: int, lr: float) -> Tensor:
    """Unit rows with smaller cosines between them: Adam on `sum_{i != j} (w_i.w_j)^2 + n sum_i (|w_i|^2 - 1)^2`.

    The gradient is `4 (W (W'W) - |w_i|^2 w_i + n (|w_i|^2 - 1) w_i)`, so no (n, n) product is made.

    Args:
        rows: (n, d), any lengths.
        steps: of Adam.
        lr: its learning rate.

    Returns:
        (n, d) float32 unit rows.
    """
    # In float64: near-zero gradients divided by their own size are what Adam steps by at the start.
    w = (rows.double() / rows.double().norm(dim=1, keepdim=True)).requires_grad_()
    adam = torch.optim.Adam([w], lr=lr)
    for _ in range(steps):
        with torch.no_grad():
            squares = w.square().sum(1, keepdim=True)
            w.grad = 4 * (w @ (w.T @ w) + (len(w) * (squares - 1) - squares) * w)
        adam.step()
    spread: Tensor = w.detach() / w.detach().norm(dim=1, keepdim=True)
    return spread.float()
