"""Sparse crosscoders: one dictionary over several sites or models, and what its decoders say of each."""

from saeforge_crosscoder.reading import (
    decoder_cosines,
    norm_difference,
    relative_norms,
    source_norms,
    source_widths,
)
from saeforge_crosscoder.variant import Crosscoder

__all__ = [
    "Crosscoder",
    "decoder_cosines",
    "norm_difference",
    "relative_norms",
    "source_norms",
    "source_widths",
]
