"""Reading latents: what text fires them, and which concept they are.

Names are imported when first used, so that a store is opened and shown without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from saeforge.features.build import Built as Built
    from saeforge.features.build import build_features as build_features
    from saeforge.features.schema import Label as Label
    from saeforge.features.store import Example as Example
    from saeforge.features.store import Feature as Feature
    from saeforge.features.store import FeatureStore as FeatureStore
    from saeforge.features.store import Hit as Hit

_HOMES = {
    "Built": "build",
    "Example": "store",
    "Feature": "store",
    "FeatureStore": "store",
    "Hit": "store",
    "Label": "schema",
    "build_features": "build",
}

__all__ = ["Built", "Example", "Feature", "FeatureStore", "Hit", "Label", "build_features"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'saeforge.features' has no attribute {name!r}")
    return getattr(importlib.import_module(f"saeforge.features.{_HOMES[name]}"), name)
