"""The arrays that an import reads: what is in the files and folders that were named."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from saeforge.data.foreign import PICKLES, TORCH_DTYPES, Span, memory_of, read_rows, scan_npy, scan_safetensors
from saeforge.data.imports.arrow import ArrowArray, arrow_files
from saeforge.data.local import expand
from saeforge.data.tarscan import scan_tar
from saeforge.errors import ConfigError, DatasetError

SUFFIXES = (".npy", ".safetensors", ".tar", ".arrow")


class ForeignArray(Protocol):
    """Rows in a file of another format."""

    @property
    def path(self) -> Path:
        """The file."""

    @property
    def name(self) -> str:
        """Member, tensor or column."""

    @property
    def where(self) -> str:
        """For messages."""

    @property
    def rows(self) -> int:
        """How many."""

    @property
    def d(self) -> int:
        """Width."""

    @property
    def dtype(self) -> str:
        """ "float32", "float16", "float64" or "bfloat16"."""

    @property
    def context(self) -> int | None:
        """Rows of a context, where there are contexts."""

    @property
    def has_tokens(self) -> bool:
        """Whether the token of each row is known."""

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Rows start to stop."""

    def tokens(self, start: int, stop: int) -> np.ndarray | None:
        """Their token ids, where known."""


@dataclass(frozen=True, slots=True)
class SpanArray:
    """A span of a file as `ForeignArray`."""

    span: Span
    path: Path
    name: str
    rows: int
    d: int
    dtype: str
    context: int | None

    @classmethod
    def of(cls, span: Span) -> SpanArray:
        """Return the array of a span."""
        return cls(span, span.path, span.name, span.rows, span.d, span.dtype, span.context)

    @property
    def where(self) -> str:
        """For messages."""
        return self.span.where

    @property
    def has_tokens(self) -> bool:
        """No: there is nothing but numbers."""
        return False

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Return rows start to stop in the dtype of the file."""
        out = torch.empty(stop - start, self.d, dtype=TORCH_DTYPES[self.dtype])
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            read_rows(descriptor, self.span, start, memory_of(out))
        finally:
            os.close(descriptor)
        return out

    def tokens(self, start: int, stop: int) -> None:
        """Unknown."""
        return None


def open_arrays(sources: Sequence[str | Path], key: str | None = None) -> list[ForeignArray]:
    """Find the arrays of activations in files and folders, in the order given; only headers are read.

    Args:
        sources: files, globs, braces (`{000..009}`), or folders of such files.
        key: tensor of a `.safetensors`, member of a tar (both may be patterns), or column of an Arrow file.

    Raises:
        ConfigError: nothing there, a format that is not read, pyarrow missing.
        DatasetError: a damaged file; arrays of different widths; the same file twice.
    """
    files: list[Path] = []
    for source in expand(sources):
        inside = _folder_files(source) if source.is_dir() else [source]
        files += inside
    arrays: list[ForeignArray] = []
    seen: set[Path] = set()
    for path in files:
        if path.resolve() in seen:
            raise DatasetError(f"{path} is given twice; its rows would stand on both sides of the split")
        seen.add(path.resolve())
        suffix = path.suffix.lower()
        if suffix in PICKLES:
            raise ConfigError(f"{path} {PICKLES[suffix]}")
        if suffix == ".npy":
            arrays.append(SpanArray.of(scan_npy(path)))
        elif suffix == ".safetensors":
            arrays += map(SpanArray.of, scan_safetensors(path, key))
        elif suffix == ".tar":
            arrays += map(SpanArray.of, scan_tar(path, key))
        elif suffix == ".arrow":
            arrays.append(ArrowArray(path, key))
        else:
            raise ConfigError(f"{path}: expected {', '.join(SUFFIXES)} or a folder that SAELens cached activations in")
    widths = {array.d: array for array in arrays}
    if len(widths) > 1:
        one, other = list(widths.values())[:2]
        raise DatasetError(
            f"{one.where} is {one.d} wide, {other.where} {other.d}; import one width at a time (--key chooses arrays)"
        )
    return arrays


def _folder_files(folder: Path) -> list[Path]:
    if (folder / "manifest.json").is_file():
        raise ConfigError(f"{folder} is a dataset of saeforge already; nothing to import")
    if (folder / "state.json").is_file() or any(folder.glob("*.arrow")):
        return arrow_files(folder)
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in (*SUFFIXES, *PICKLES))
    if len({path.suffix.lower() for path in files}) != 1:
        kinds = ", ".join(sorted({path.suffix for path in files})) or "no such file"
        raise ConfigError(f"{folder}: expected files of one kind, {', '.join(SUFFIXES)}; it holds {kinds}")
    return files
