"""SAE variants. The class paths `saeforge.variants.TopK` etc. are stable: configs and checkpoints name them."""

from saeforge.data.batch import Batch
from saeforge.sae import SAE
from saeforge.schedules import ramp
from saeforge.variants.auxk import AuxK
from saeforge.variants.base import (
    DataStatistics,
    InputScale,
    OwnEncoder,
    Recipe,
    Resampled,
    RunSettings,
    ScheduleValues,
    StartsFrom,
    StepOutput,
    Unfolded,
    Variant,
    check_pre_bias,
    geometric_median,
    mean_norm_of_others,
    random_unit_rows,
)
from saeforge.variants.gated import Gated
from saeforge.variants.l1_relu import L1ReLU
from saeforge.variants.topk import TopK

__all__ = [
    "SAE",
    "AuxK",
    "Batch",
    "DataStatistics",
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
    "Variant",
    "check_pre_bias",
    "geometric_median",
    "mean_norm_of_others",
    "ramp",
    "random_unit_rows",
]
