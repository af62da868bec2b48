"""What 1 means in the units `max` and `p99`: each latent's own maximum and 99th percentile."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from saeforge.errors import ConfigError
from saeforge.features.store import STORE_FILE, FeatureStore


@dataclass(frozen=True)
class LatentScales:
    """Sizes of latents.

    Attributes:
        max: each latent's greatest value.
        p99: the 99th percentile of its non-zero values.
    """

    max: Mapping[int, float] = field(default_factory=dict)
    p99: Mapping[int, float] = field(default_factory=dict)

    def size(self, latent: int, unit: Literal["max", "p99"]) -> float:
        """Return what 1 means for a latent in a unit.

        Raises:
            ConfigError: it is not known, or not above 0.
        """
        size = (self.max if unit == "max" else self.p99).get(latent)
        if size is None:
            raise ConfigError(
                f"latent {latent}: its {unit} is not known (it may never have fired); give an absolute value, or build "
                "features over more text"
            )
        if not 0 < size < float("inf"):
            raise ConfigError(f"latent {latent}: its {unit} is {size:g}, expected above 0; give an absolute value")
        return size


def read_scales(run: str | Path, latents: Iterable[int]) -> LatentScales:
    """Read latents' sizes from the features of a RUN.

    Args:
        run: RUN folder, or the sae/ folder inside one.
        latents: which.

    Raises:
        DatasetError: there are no features, or they are damaged, or of another SAE than the run's.
        ConfigError: no such latent.
    """
    run = Path(run)
    if run.name == "sae" and not (run / STORE_FILE).exists():
        run = run.parent
    with FeatureStore.open(run) as store:
        found = {latent: store.latent(latent) for latent in latents}
    fired = {latent: feature for latent, feature in found.items() if feature.count > 0}
    return LatentScales(
        {latent: feature.max for latent, feature in fired.items()},
        {latent: feature.p99 for latent, feature in fired.items()},
    )
