"""Sparse autoencoders for language models: train, judge, read and steer.

Names are imported when first used, so that `import saeforge` costs nothing and `saeforge.load` needs torch and
safetensors alone.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from saeforge.benchmark import bench_synthetic as bench_synthetic
    from saeforge.cli.fit import fit as fit
    from saeforge.controls import make_controls as make_controls
    from saeforge.errors import SaeforgeError as SaeforgeError
    from saeforge.evaluation import agreement as agreement
    from saeforge.evaluation import evaluate as evaluate
    from saeforge.features import FeatureStore as FeatureStore
    from saeforge.features import build_features as build_features
    from saeforge.features.concepts import concept_table as concept_table
    from saeforge.formats import load as load
    from saeforge.formats.publish import push as push
    from saeforge.harvest import harvest as harvest
    from saeforge.harvest.inputs import harvest_inputs as harvest_inputs
    from saeforge.pages.run_report import report as report
    from saeforge.sae import SAE as SAE
    from saeforge.steering import Add as Add
    from saeforge.steering import Clamp as Clamp
    from saeforge.steering import Scale as Scale
    from saeforge.steering import Splice as Splice
    from saeforge.steering import attached as attached
    from saeforge.steering import steer as steer
    from saeforge.training.train import train as train

_PUBLIC = {
    "Add": "saeforge.steering",
    "Clamp": "saeforge.steering",
    "FeatureStore": "saeforge.features",
    "SAE": "saeforge.sae",
    "SaeforgeError": "saeforge.errors",
    "Scale": "saeforge.steering",
    "Splice": "saeforge.steering",
    "agreement": "saeforge.evaluation",
    "attached": "saeforge.steering",
    "bench_synthetic": "saeforge.benchmark",
    "build_features": "saeforge.features",
    "concept_table": "saeforge.features.concepts",
    "evaluate": "saeforge.evaluation",
    "fit": "saeforge.cli.fit",
    "harvest": "saeforge.harvest",
    "harvest_inputs": "saeforge.harvest.inputs",
    "load": "saeforge.formats",
    "make_controls": "saeforge.controls",
    "push": "saeforge.formats.publish",
    "report": "saeforge.pages.run_report",
    "steer": "saeforge.steering",
    "train": "saeforge.training.train",
}

__all__ = [
    "SAE",
    "Add",
    "Clamp",
    "FeatureStore",
    "SaeforgeError",
    "Scale",
    "Splice",
    "agreement",
    "attached",
    "bench_synthetic",
    "build_features",
    "concept_table",
    "evaluate",
    "fit",
    "harvest",
    "harvest_inputs",
    "load",
    "make_controls",
    "push",
    "report",
    "steer",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'saeforge' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
