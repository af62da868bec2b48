"""What an SAE is judged by: sums over tokens, the geometry of its weights, its agreement with another one.

`ReconstructionMetrics` accumulates; `weight_figures` and `match_rows` need no data. `conventions` says what each number
means and where other tools differ.
"""

from saeforge.metrics.matching import Agreement, match_rows
from saeforge.metrics.reconstruction import (
    DENSITY_EDGES,
    Firing,
    Reconstruction,
    ReconstructionMetrics,
    density_histogram,
)
from saeforge.metrics.spread import Spread
from saeforge.metrics.weights import WeightFigures, weight_figures

__all__ = [
    "DENSITY_EDGES",
    "Agreement",
    "Firing",
    "Reconstruction",
    "ReconstructionMetrics",
    "Spread",
    "WeightFigures",
    "density_histogram",
    "match_rows",
    "weight_figures",
]
