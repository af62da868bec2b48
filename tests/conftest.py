"""What every test gets: a seed, and the state of the process as the test before it found it."""

from __future__ import annotations

import os
import random
import sys
import warnings
from collections.abc import Iterator

import pytest

# No test may reach a model hub or a tracking server, however pytest was started.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
# Tiny shapes gain nothing from threads and lose a hundredfold where two of them share one busy core.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def _restore_process() -> Iterator[None]:
    """Environment, working directory, argv, sys.path, warning filters and wandb's run end as they began."""
    environment, folder, argv, path = dict(os.environ), os.getcwd(), list(sys.argv), list(sys.path)  # noqa: PTH109
    with warnings.catch_warnings():
        yield
    wandb = sys.modules.get("wandb")
    if getattr(wandb, "run", None) is not None:  # a logger never closes its run, and the next one would warn of it
        wandb.finish()  # type: ignore[union-attr]
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv[:], sys.path[:] = argv, path


@pytest.fixture(autouse=True)
def _restore_torch() -> Iterator[None]:
    """Seeds; afterwards torch's dtype, threads, determinism and process group are as before.

    A test that imports no torch does not make this fixture import it: the tests of the light modules stay quick.
    """
    random.seed(0)
    if "torch" in sys.modules:
        _seed()
        before = _torch_state()
    else:
        before = None
    yield
    if "torch" in sys.modules:
        _reset_torch(before)


def _seed() -> None:
    import numpy as np
    import torch

    torch.manual_seed(0)
    np.random.seed(0)


def _torch_state() -> dict[str, object]:
    import torch

    return {
        "dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "grad": torch.is_grad_enabled(),
    }


def _reset_torch(before: dict[str, object] | None) -> None:
    import torch
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
    if before is None:  # this test imported torch; what it set was set over torch's own defaults
        before = {"dtype": torch.float32, "threads": None, "deterministic": False, "grad": True}
    torch.set_default_dtype(before["dtype"])  # type: ignore[arg-type]
    torch.set_grad_enabled(bool(before["grad"]))
    torch.use_deterministic_algorithms(bool(before["deterministic"]))
    if isinstance(before["threads"], int) and torch.get_num_threads() != before["threads"]:
        torch.set_num_threads(before["threads"])
