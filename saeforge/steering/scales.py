"""What 1 means in the units `max` and `p99`: each latent's own maximum and 99th percentile."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from saeforge.errors import ConfigError

STORE = "features.sqlite"


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
    """Read latents' sizes from a RUN's feature store.

    Args:
        run: RUN folder, or the sae/ folder inside one.
        latents: which; those that the store does not know are left out.

    Raises:
        ConfigError: there is no store, or it is damaged.
    """
    run = Path(run)
    path = run.parent / STORE if run.name == "sae" and not (run / STORE).exists() else run / STORE
    if not path.is_file():
        raise ConfigError(f"units max and p99 need {path}, which does not exist; run `saeforge features build {run}`")
    rows: list[tuple[int, float | None, float | None]] = []
    try:
        with contextlib.closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as store:
            for latent in latents:
                rows += store.execute("SELECT latent, max, p99 FROM latents WHERE latent = ?", (latent,))
    except sqlite3.Error as error:
        raise ConfigError(f"{path} cannot be read ({error}); run `saeforge features build {run}` again") from error
    return LatentScales(
        {latent: largest for latent, largest, _ in rows if largest is not None},
        {latent: p99 for latent, _, p99 in rows if p99 is not None},
    )
