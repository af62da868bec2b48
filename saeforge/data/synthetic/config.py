"""The law of synthetic activations as one frozen record, and the published one."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from typing import Any

from saeforge.errors import ConfigError


@dataclass(frozen=True)
class SyntheticConfig:
    """How synthetic activations are made, after SynthSAEBench (Chanin and Garriga-Alonso 2026, arXiv 2602.14687).

    A row is `sum_i a_i w_i + b`: unit directions `w_i` of `features` features in `d_in` dimensions, of which few fire.

    Attributes:
        features: number of true features; feature 0 is the most frequent one.
        d_in: width of the activations.
        max_rate: share of rows on which feature 0 fires.
        min_rate: share for the last feature.
        zipf: rates fall from one to the other as rank^-zipf.
        roots: trees of the hierarchy; 0: features know nothing of each other's firing but their correlation.
        branching: children of each feature that is not a leaf; a child fires only where its parent does.
        depth: levels below the roots. Trees take the most frequent features, level by level; the others are free.
        exclusive: of siblings that would fire together one, drawn uniformly, does.
        scale_by_parent: a child's magnitude is multiplied by its parent's magnitude over that one's mean.
        correlation_rank: firing is a Gaussian per feature above a threshold; the Gaussians share so many factors.
        correlation_scale: standard deviation of the loadings on these factors.
        first_magnitude: mean magnitude of feature 0 where it fires.
        last_magnitude: that of the last feature; linear in between.
        magnitude_spread: a feature's magnitudes scatter with standard deviation |N(m, s)|: this is (m, s).
        orthogonal_steps: steps of Adam that lower the squared cosines between directions.
        orthogonal_lr: their learning rate.
        bias_norm: norm of b.
        seed: of everything.

    Raises:
        ConfigError: a law that cannot be.
    """

    features: int = 16_384
    d_in: int = 768
    max_rate: float = 0.4
    min_rate: float = 5e-4
    zipf: float = 0.5
    roots: int = 128
    branching: int = 4
    depth: int = 3
    exclusive: bool = True
    scale_by_parent: bool = True
    correlation_rank: int = 25
    correlation_scale: float = 0.1
    first_magnitude: float = 5.0
    last_magnitude: float = 4.0
    magnitude_spread: tuple[float, float] = (0.5, 0.5)
    orthogonal_steps: int = 100
    orthogonal_lr: float = 3e-4
    bias_norm: float = 0.5
    seed: int = 42

    def __post_init__(self) -> None:
        for name in ("features", "d_in", "branching"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} = {getattr(self, name)}: expected a positive number")
        for name in ("roots", "depth", "correlation_rank", "orthogonal_steps", "seed", "bias_norm"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} = {getattr(self, name)}: expected 0 or a positive number")
        if not 0 < self.min_rate <= self.max_rate < 1:
            raise ConfigError(
                f"min_rate = {self.min_rate}, max_rate = {self.max_rate}: expected 0 < min_rate <= max_rate < 1"
            )
        if self.in_trees > self.features:
            raise ConfigError(
                f"{self.roots} trees of depth {self.depth} with {self.branching} children each need {self.in_trees} "
                f"features, there are {self.features}; lower roots or depth"
            )
        if min(self.first_magnitude, self.last_magnitude) <= 0 or min(self.magnitude_spread) < 0:
            raise ConfigError("magnitudes must be positive, and their spread not negative")

    @property
    def level_sizes(self) -> list[int]:
        """Features of each level of the trees, roots first."""
        return [self.roots * self.branching**level for level in range(self.depth + 1)] if self.roots else []

    @property
    def in_trees(self) -> int:
        """Features that belong to a tree: the first ones."""
        return sum(self.level_sizes)

    @property
    def fingerprint(self) -> str:
        """Changes with every field."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**asdict(self), "magnitude_spread": list(self.magnitude_spread)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> SyntheticConfig:
        """Reads `to_json` back.

        Raises:
            ConfigError: an unknown field.
        """
        unknown = sorted(data.keys() - {field.name for field in fields(cls)})
        if unknown:
            raise ConfigError(f"a synthetic configuration has no field {unknown[0]!r}")
        return cls(**{**data, "magnitude_spread": tuple(data.get("magnitude_spread", (0.5, 0.5)))})


#: SynthSAEBench-16k as published: 16,384 features, 10,880 of them in trees, about 34 active on a row.
SYNTH_SAE_BENCH_16K = SyntheticConfig()

#: An eighth of it, for a CPU: the same shares of features in trees, roots and levels; trained with a quarter as many
#: latents as features, as the large one is. The learning rate keeps a step's length against a coordinate's.
SMALL = SyntheticConfig(features=2048, d_in=256, roots=16, orthogonal_lr=3e-4 * (768 / 256) ** 0.5)

PRESETS = {"small": SMALL, "16k": SYNTH_SAE_BENCH_16K}
