"""Which norms are too large: thresholds from a fixed sample of the training contexts, the same for every process.

Some tokens have activations of a hundred times the usual norm (attention sinks, at random positions in Qwen3); they
spoil the scale and the loss of an SAE. A threshold from each batch would make rows depend on the batching.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from saeforge.errors import ConfigError
from saeforge.harvest.buckets import row_norms
from saeforge.lm.capture import Capture
from saeforge.lm.pack import ContextSource

PILOT_CONTEXTS = 64


def pilot_batches(n_contexts: int, batch_contexts: int) -> list[tuple[int, int]]:
    """Return the ranges of contexts that the pilot reads: up to 64 (or a batch's worth, if less), spread evenly.

    Contexts stand in seeded order, so that these are a seeded sample, whatever the buckets.
    """
    size = min(batch_contexts, PILOT_CONTEXTS)
    if n_contexts <= PILOT_CONTEXTS:
        return [(at, min(at + size, n_contexts)) for at in range(0, n_contexts, size)]
    count = PILOT_CONTEXTS // size
    return [(start, start + size) for start in (i * n_contexts // count for i in range(count))]


def measure_pilot(
    capture: Capture,
    contexts: ContextSource,
    dtypes: Mapping[str, torch.dtype],
    *,
    batch_contexts: int,
    max_norm: float,
) -> dict[str, Any]:
    """Return the median norm of the pilot sample and the threshold of each site, as plain JSON values.

    Args:
        capture: entered.
        contexts: of the train split.
        dtypes: what is stored for each site.
        batch_contexts: contexts per forward pass.
        max_norm: thresholds are so many times the median.

    Raises:
        ConfigError: a median is 0, so that no multiple of it tells an outlier.
        DatasetError: an activation is NaN or infinite.
    """
    batches = pilot_batches(len(contexts), batch_contexts)
    parts = [row_norms(capture, contexts, first, last, dtypes) for first, last in batches]
    sites = {}
    for site in dtypes:
        norms = np.concatenate([part[site] for part in parts]).astype(np.float64)
        median = float(np.median(norms))
        if not 0 < median < np.inf:
            raise ConfigError(f"site {site}: the median norm of {len(norms)} tokens is {median}; give --max_norm null")
        sites[site] = {"median": median, "threshold": max_norm * median}
    return {
        "max_norm": max_norm,
        "pilot_contexts": [list(batch) for batch in batches],
        "pilot_rows": len(norms),
        "sites": sites,
    }
