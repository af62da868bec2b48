"""Activations with a known truth: sparse features that fire by a published law, added up in too few dimensions."""

from saeforge.data.synthetic.config import PRESETS, SMALL, SYNTH_SAE_BENCH_16K, SyntheticConfig
from saeforge.data.synthetic.files import SyntheticFiles, write_rows
from saeforge.data.synthetic.sample import Activity
from saeforge.data.synthetic.source import SyntheticSource
from saeforge.data.synthetic.truth import Truth

__all__ = [
    "PRESETS",
    "SMALL",
    "SYNTH_SAE_BENCH_16K",
    "Activity",
    "SyntheticConfig",
    "SyntheticFiles",
    "SyntheticSource",
    "Truth",
    "write_rows",
]
