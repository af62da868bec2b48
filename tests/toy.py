"""A small activation dataset with sparse structure, for tests that train."""

from __future__ import annotations

from pathlib import Path

import torch

from saeforge.data.writer import write_dataset

D_IN = 32


def toy_rows(n: int, *, seed: int = 0) -> torch.Tensor:
    """(n, 32) sparse combinations of 96 fixed directions, plus a mean."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(96, D_IN, generator=generator), dim=1)
    mean = torch.randn(D_IN, generator=generator)
    generator.manual_seed(seed + 1)
    strengths = torch.rand(n, 96, generator=generator) * (torch.rand(n, 96, generator=generator) < 0.04)
    return strengths @ directions + 0.5 * mean


def toy_dataset(root: Path, *, rows: int = 8192) -> Path:
    """Writes `rows` training and 2,048 validation rows."""
    write_dataset(root, {"train": toy_rows(rows), "validation": toy_rows(2048, seed=1)}, dtype="float32")
    return root
