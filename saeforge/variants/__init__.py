"""SAE variants. The class paths `saeforge.variants.TopK` etc. are stable: configs and checkpoints name them."""

from saeforge.data.batch import Batch
from saeforge.sae import SAE
from saeforge.schedules import anneal, ramp
from saeforge.variants.auxk import AuxK
from saeforge.variants.base import Variant
from saeforge.variants.batch_threshold import BatchThreshold
from saeforge.variants.contract import (
    DataStatistics,
    OwnEncoder,
    Recipe,
    Resampled,
    RunSettings,
    ScheduleValues,
    StartsFrom,
    StepOutput,
    Unfolded,
)
from saeforge.variants.gated import Gated
from saeforge.variants.l1_relu import L1ReLU
from saeforge.variants.sharding import shard_
from saeforge.variants.start import (
    InputScale,
    check_pre_bias,
    geometric_median,
    least_squares_factor,
    mean_norm_of_others,
    random_rows,
    random_unit_rows,
)
from saeforge.variants.topk import TopK
from saeforge.variants.unit_decoder import DecoderNorm, UnitDecoder

__all__ = [
    "SAE",
    "AuxK",
    "Batch",
    "BatchThreshold",
    "DataStatistics",
    "DecoderNorm",
    "Gated",
    "InputScale",
    "L1ReLU",
    "OwnEncoder",
    "Recipe",
    "Resampled",
    "RunSettings",
    "ScheduleValues",
    "StartsFrom",
    "StepOutput",
    "TopK",
    "Unfolded",
    "UnitDecoder",
    "Variant",
    "anneal",
    "check_pre_bias",
    "geometric_median",
    "least_squares_factor",
    "mean_norm_of_others",
    "ramp",
    "random_rows",
    "random_unit_rows",
    "shard_",
]
