"""Memory for weight gradients that goes round.

A gradient of hundreds of MB is freed after each step and wanted again in the next. The C library gives such blocks back
to the system, and a fresh one costs a page fault every 4 KiB: 10 ms for 38 MB, more than computing what is in it.
"""

from __future__ import annotations

import weakref

import numpy as np
import torch
from torch import Tensor

#: Smaller tensors are left to torch: glibc keeps blocks up to 32 MiB by itself once one was freed.
SMALLEST = 1 << 22

_free: dict[int, list[np.ndarray]] = {}


def empty(*shape: int) -> Tensor:
    """An uninitialised fp32 tensor on the CPU; its memory comes back when nothing refers to it any more."""
    n = int(np.prod(shape))
    if 4 * n < SMALLEST:
        return torch.empty(shape)
    waiting = _free.setdefault(n, [])
    block = waiting.pop() if waiting else np.empty(n, dtype=np.float32)
    lent = block[:]  # torch holds this view, and lets go of it together with the last tensor over it
    weakref.finalize(lent, _give_back, block).atexit = False
    return torch.from_numpy(lent).view(shape)


def release() -> None:
    """Hands what is not in use back to the system; called at the end of a run."""
    _free.clear()


def _give_back(block: np.ndarray) -> None:
    _free.setdefault(len(block), []).append(block)
