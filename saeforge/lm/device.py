"""The torch device that a command runs on."""

from __future__ import annotations

import torch

from saeforge.errors import ConfigError


def resolve_device(device: str) -> str:
    """Return a device that exists; "auto" is cuda if there is one, else cpu.

    Raises:
        ConfigError: it does not.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"device {device!r} cannot be used here ({reason}); try auto or cpu") from error
    return device
