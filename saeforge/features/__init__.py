"""Reading latents: what text fires them, and which concept they are."""

from saeforge.features.build import Built, build_features
from saeforge.features.schema import Label
from saeforge.features.store import Example, Feature, FeatureStore, Hit

__all__ = ["Built", "Example", "Feature", "FeatureStore", "Hit", "Label", "build_features"]
