"""From text, or other inputs, to a dataset of activations: `saeforge harvest`, `harvest` and `harvest_inputs`."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from saeforge.harvest.config import HarvestConfig

if TYPE_CHECKING:
    from saeforge.data.manifest import Manifest
    from saeforge.harvest.inputs import harvest_inputs as harvest_inputs

__all__ = ["HarvestConfig", "harvest", "harvest_inputs"]


def harvest(config: HarvestConfig | None = None, **options: Any) -> Manifest:
    """Run a language model over text and store its activations; continue where an earlier call stopped.

    Args:
        config: a configuration, or None and its fields as keywords.
        options: fields of `HarvestConfig`, replacing those of `config`.

    Returns:
        The manifest of the finished dataset; open it with `saeforge.data.shards.ActivationDataset`.

    Raises:
        ConfigError: an option, the model, a site or the text is wrong.
        DatasetError: too few tokens, NaN activations, or another dataset is in the way.
        SaeforgeError: the disk is full.
    """
    from saeforge.harvest.run import run_harvest  # torch and transformers load here, not when options are parsed

    return run_harvest(HarvestConfig.build(config, options))


def __getattr__(name: str) -> Any:
    if name == "harvest_inputs":
        from saeforge.harvest.inputs import harvest_inputs  # torch again

        return harvest_inputs
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class _CallableModule(ModuleType):
    """This package, callable: importing it binds `saeforge.harvest` to the package, over the function of that name."""

    def __call__(self, config: HarvestConfig | None = None, **options: Any) -> Manifest:
        return harvest(config, **options)


sys.modules[__name__].__class__ = _CallableModule
