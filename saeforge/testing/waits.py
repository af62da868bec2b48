"""A step must not make the host wait for the device: found without a GPU, by refusing what would wait on one."""

from __future__ import annotations

import sys
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from saeforge import ops
from saeforge.testing.case import Case
from saeforge.testing.outcome import CheckFailed

#: Operations whose result's size or value depends on what is in a tensor.
WAITING = {
    "_local_scalar_dense",
    "_unique2",
    "bincount",
    "equal",
    "is_nonzero",
    "masked_select",
    "nonzero",
    "repeat_interleave",
    "unique_consecutive",
    "unique_dim",
}
#: Methods that hand numbers to the host without an operation that a dispatcher would see.
READING = {"tolist", "numpy", "cpu", "__array__"}
_HOME = Path(ops.__file__).parents[1]
_TORCH = Path(torch.__file__).parent


@dataclass(frozen=True)
class Wait:
    """One operation that would wait.

    Attributes:
        operation: its name.
        file: of the nearest code that is not torch's. line: there. function: there.
    """

    operation: str
    file: Path
    line: int
    function: str

    @property
    def in_engine(self) -> bool:
        """Whether saeforge's own engine, not the variant, asked."""
        return self.file.is_relative_to(_HOME / "ops") or self.file == _HOME / "variants" / "base.py"

    @property
    def on_host(self) -> bool:
        """Whether the number is a host's copy: a code reads its nnz from the device (`cpu()`) once at most."""
        return self.operation == "_local_scalar_dense" and self.in_engine and self.function == "nnz"

    def __str__(self) -> str:
        return f"{self.operation} at {self.file.name}:{self.line}"


def _wait(operation: str) -> Wait:
    frame = sys._getframe(2)
    while frame.f_back is not None:
        path = Path(frame.f_code.co_filename)
        if not path.is_relative_to(_TORCH) and path != Path(__file__):
            break
        frame = frame.f_back
    return Wait(operation, Path(frame.f_code.co_filename), frame.f_lineno, frame.f_code.co_name)


class _Functions(TorchFunctionMode):
    def __init__(self, waits: list[Wait]) -> None:
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in READING:
            self.waits.append(_wait(f"Tensor.{func.__name__}"))
        return func(*args, **(kwargs or {}))


class NoWaiting(TorchDispatchMode):
    """Notes what would make the host wait if the tensors were on a device.

    Args:
        refuse: raise at the first one.

    Attributes:
        waits: those seen.
    """

    def __init__(self, *, refuse: bool = True) -> None:
        super().__init__()
        self.refuse = refuse
        self.waits: list[Wait] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        sized = name == "repeat_interleave" and kwargs.get("output_size") is not None
        masked = name in ("index", "index_put", "index_put_", "_index_put_impl_") and any(
            isinstance(index, Tensor) and index.dtype == torch.bool for index in args[1]
        )
        if (name in WAITING and not sized) or masked:
            wait = _wait(f"{name} with a mask" if masked else name)
            self.waits.append(wait)
            if self.refuse:
                raise AssertionError(f"{wait} reads from the device")
        return func(*args, **kwargs)


def host_waits(case: Case) -> None:
    """No operation of a step reads from the device, but the engine's own where rows have different numbers of latents.

    The scheduled value that target_l0 steers is a tensor here, as under it.
    """
    variant, batch = deepcopy(case.variant(torch.float32)), case.batch(dtype=torch.float32)
    schedule = case.schedule(variant)
    if variant.sparsity_schedule is not None:
        name = variant.sparsity_schedule
        schedule[name] = torch.tensor(schedule[name])
    variant.dead_latents()
    variant.observed()
    with NoWaiting(refuse=False) as seen, _Functions(seen.waits):
        out = variant.step(batch, schedule)
        torch.stack(list(out.terms.values())).sum().backward()
    waits = [wait for wait in seen.waits if not wait.on_host]
    own = [wait for wait in waits if out.code.k is not None or not wait.in_engine]
    if own:
        raise CheckFailed(
            f"a step reads from the device: {own[0]}, so that a GPU runs dry at every step; use torch.where, masks as "
            "factors and tensor schedules instead of item(), boolean indices, nonzero and if"
        )
