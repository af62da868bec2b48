"""What the environment asks for: `SAEFORGE_OPS`.

`auto` (the default) takes the fastest implementation; `reference` multiplies dense matrices and uses torch's top-k;
`stock` gathers with PyTorch's own operations; `native` asks for the C++ kernels (CPU), `triton` for those of GPUs.
"""

from __future__ import annotations

import os

from saeforge.errors import ConfigError

_WISHES = ("auto", "reference", "stock", "native", "triton")


def wish() -> str:
    """The value of SAEFORGE_OPS, or "auto".

    Raises:
        ConfigError: an unknown name.
    """
    asked = os.environ.get("SAEFORGE_OPS") or "auto"
    if asked not in _WISHES:
        raise ConfigError(f"SAEFORGE_OPS={asked}: expected {', '.join(_WISHES[:-1])} or {_WISHES[-1]}; unset it")
    return asked
