"""Whether the Triton kernels of GPUs are here and wanted. Importing this imports no triton."""

from __future__ import annotations

import functools
import importlib
import logging
import os
from types import ModuleType

import torch
from torch import Tensor

from saeforge.errors import ConfigError
from saeforge.ops.wish import wish

_FLOATS = (torch.float32, torch.bfloat16)


@functools.cache
def _module() -> ModuleType | None:
    try:
        return importlib.import_module("saeforge.ops.triton_kernels")
    except Exception as error:  # a triton that does not fit torch or the driver fails in its own ways
        logging.getLogger("saeforge.ops").warning(
            "no Triton kernels (%s: %s): PyTorch's own operations take their place, which is slower",
            type(error).__name__,
            error,
        )
        return None


def kernels() -> ModuleType:
    """The package of kernels.

    Raises:
        ConfigError: triton cannot be imported.
    """
    found = _module()
    if found is None:
        raise ConfigError("SAEFORGE_OPS=triton, but triton cannot be imported; the log says why")
    return found


def interpreted() -> bool:
    """Whether Triton runs its kernels in Python, on CPU tensors; a setting that must stand before it is imported."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes")


def takes(*tensors: Tensor) -> bool:
    """Whether the kernels are wanted and can work on these: fp32 or bfloat16 on a GPU, or interpreted on the CPU.

    Raises:
        ConfigError: SAEFORGE_OPS asks for them, and triton cannot be imported.
    """
    asked = wish()
    if asked not in ("auto", "triton") or not all(tensor.dtype in _FLOATS for tensor in tensors):
        return False
    devices = {tensor.device.type for tensor in tensors}
    if devices != {"cuda"} and not (asked == "triton" and devices == {"cpu"} and interpreted()):
        return False
    return (kernels() if asked == "triton" else _module()) is not None
