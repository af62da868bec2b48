"""What the tests of the Triton kernels need: an interpreter that runs beside their NumPy, and poisoned memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor


def mend() -> None:
    """Triton 3.6 counts loops by `int(array of one element)`, which NumPy 2.4 refuses."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched


def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that a kernel should write begins as NaN, or as a large number."""
    empty = torch.empty

    def poisoned(*shape: Any, **kwargs: Any) -> Tensor:
        made = empty(*shape, **kwargs)
        return made.fill_(float("nan") if made.dtype.is_floating_point else 2**30)

    monkeypatch.setattr(torch, "empty", poisoned)
