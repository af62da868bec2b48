"""Activations in files that others wrote: `.npy` and `.safetensors` (tars of `.npy`: tarscan.py).

Only headers are parsed here, by strict parsers that run nothing and guess nothing: what they find is a list of spans,
rows that lie one after another in a file, which are then read by offset. A header whose numbers do not add up to the
bytes that are there is an error, so that a damaged or truncated file never becomes fewer rows.
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from saeforge.errors import DatasetError

TORCH_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
}
#: `.npy` has no bfloat16: it is written as its bits, or by ml_dtypes as two raw bytes.
NPY_DTYPES = {
    "<f4": "float32",
    "<f2": "float16",
    "<f8": "float64",
    "<u2": "bfloat16",
    "|V2": "bfloat16",
    "<V2": "bfloat16",
}
SAFETENSORS_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}
WANTED = "expected float32, float16, float64, or bfloat16 (in .npy as uint16 bits)"

_FIELD = r"'descr': '[^']*'|'fortran_order': (?:True|False)|'shape': \([0-9, ]*\)"
_NPY_FIELDS = re.compile(rf"\{{ ?(?:(?:{_FIELD}),? ?){{3}}\}}\s*")
_MAX_NPY_HEADER = 2**16
_MAX_SAFETENSORS_HEADER = 100_000_000  # the limit of the format


@dataclass(frozen=True, slots=True)
class Span:
    """Rows that lie one after another in a file.

    Attributes:
        path: the file.
        name: tar member or tensor in it; empty if the file is the array.
        offset: of the first row's first byte.
        rows: how many.
        d: width of a row.
        dtype: "float32", "float16", "float64" or "bfloat16".
        context: rows of one context, where the array had a dimension for them.
    """

    path: Path
    name: str
    offset: int
    rows: int
    d: int
    dtype: str
    context: int | None = None

    @property
    def where(self) -> str:
        """For messages."""
        return f"{self.path}, {self.name}" if self.name else str(self.path)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.d * TORCH_DTYPES[self.dtype].itemsize


def read_rows(descriptor: int, span: Span, start: int, memory: memoryview) -> None:
    """Read rows of a span from row `start` on, until `memory` is full.

    Args:
        descriptor: of the open file.
        span: what to read.
        start: first row.
        memory: bytes to fill, see `memory_of`.

    Raises:
        DatasetError: the file became shorter, or cannot be read.
    """
    position = span.offset + start * span.row_bytes
    done = 0
    while done < len(memory):  # the kernel may return less than asked, and at most 2 GiB at once
        try:
            count = os.preadv(descriptor, [memory[done:]], position + done)
        except OSError as error:
            raise DatasetError(f"{span.where}: cannot be read ({error.strerror}); check the disk") from error
        if count == 0:
            raise DatasetError(
                f"{span.where}: the file ends {len(memory) - done} bytes early; it was changed meanwhile"
            )
        done += count


def memory_of(x: torch.Tensor) -> memoryview:
    """Return the bytes of a contiguous CPU tensor, to read into."""
    memory: memoryview = x.view(torch.uint8).numpy().reshape(-1).data
    return memory


def first_bad_row(x: torch.Tensor) -> int | None:
    """Return the first row that holds NaN or an infinity, or None."""
    # A sum is many times faster than isfinite and cannot hide a NaN or Inf; it may overflow, so it only asks.
    if math.isfinite(x.sum(dtype=torch.float32 if x.dtype == torch.float16 else None).item()):
        return None
    bad = (~torch.isfinite(x)).any(dim=1).nonzero()
    return int(bad[0]) if len(bad) else None


def scan_npy(path: Path) -> Span:
    """Return the rows of a `.npy` file of shape (rows, d) or (contexts, length, d).

    Raises:
        DatasetError: another shape or dtype, pickled objects, a damaged or truncated file.
    """
    with Headers(path) as file:
        return npy_span(file, path, "", 0, file.size, dims=(2, 3))


def scan_safetensors(path: Path, key: str | None = None) -> list[Span]:
    """Return the rows of a `.safetensors` file: of the tensors whose name matches `key`, or of its activations.

    Args:
        path: the file.
        key: name of a tensor, or a pattern with `*`; None: every tensor, which must then be one of activations.

    Raises:
        DatasetError: no such tensor; one of another shape or dtype; a damaged or truncated file.
    """
    with Headers(path) as file:
        try:
            (length,) = struct.unpack("<Q", file.read(0, 8))
            if length > min(_MAX_SAFETENSORS_HEADER, file.size - 8):
                raise ValueError(f"a header of {length} bytes")
            tensors: dict[str, Any] = json.loads(file.read(8, length))
            tensors.pop("__metadata__", None)
            table = [
                (
                    name,
                    str(t["dtype"]),
                    [int(n) for n in t["shape"]],
                    int(t["data_offsets"][0]),
                    int(t["data_offsets"][1]),
                )
                for name, t in tensors.items()
            ]
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, struct.error) as error:
            raise DatasetError(f"{path} is no whole .safetensors file ({error}); make it again") from error
        end = max((stop for *_, stop in table), default=0)
        if 8 + length + end != file.size:
            raise DatasetError(
                f"{path} has {file.size} bytes, its header says {8 + length + end}: truncated or damaged; make it again"
            )
    names = sorted(name for name, *_ in table)
    chosen = [name for name in names if key is None or fnmatchcase(name, key)]
    if not chosen:
        raise DatasetError(f"{path} holds no tensor {key!r}; it holds: {_shown(names)}")
    spans = []
    for name, stored, shape, start, stop in sorted(table):
        if name not in chosen:
            continue
        where = f"{path}, {name}"
        others = f"; the file holds {_shown(names)}: name what you want with --key" if key is None else ""
        if stored not in SAFETENSORS_DTYPES:
            raise DatasetError(f"{where}: dtype {stored}, {WANTED}{others}")
        dtype = SAFETENSORS_DTYPES[stored]
        if len(shape) not in (2, 3) or min(shape) < 1:
            raise DatasetError(f"{where}: shape {tuple(shape)}, expected (rows, d) or (contexts, length, d){others}")
        if start < 0 or stop - start != math.prod(shape) * TORCH_DTYPES[dtype].itemsize:
            raise DatasetError(f"{where}: its shape {tuple(shape)} and its bytes differ: damaged; make the file again")
        spans.append(_span(path, name, 8 + length + start, shape, dtype))
    return spans


_PICKLE_REASON = (
    "is a pickle, and reading one runs whatever code is in it; if you trust it, load it yourself with "
    "torch.load(..., weights_only=True) and store the tensor with numpy.save or safetensors.torch.save_file"
)
PICKLES = dict.fromkeys((".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib"), _PICKLE_REASON)


def npy_span(file: Headers, path: Path, name: str, offset: int, size: int, *, dims: tuple[int, ...]) -> Span:
    """Parse the header of a `.npy` array that fills `size` bytes from `offset` on."""
    where = f"{path}, {name}" if name else str(path)
    start = file.read(offset, min(12, size))
    if start[:6] != b"\x93NUMPY" or len(start) < 12:
        raise DatasetError(f"{where} does not begin like a .npy file: damaged, or another format")
    major = start[6]
    if major not in (1, 2, 3) or start[7] != 0:
        raise DatasetError(f"{where}: .npy version {start[6]}.{start[7]}, expected 1.0, 2.0 or 3.0")
    prefix = 10 if major == 1 else 12
    length = prefix + int.from_bytes(start[8:prefix], "little")
    if length > min(_MAX_NPY_HEADER + 12, size):
        raise DatasetError(f"{where}: a .npy header of {length} bytes; damaged")
    text = file.read(offset + prefix, length - prefix).decode("latin-1")
    parsed = _parse_npy(text)
    if parsed is None:
        raise DatasetError(f"{where}: a .npy header that is damaged, or of a structured dtype; {WANTED}")
    descr, fortran, shape = parsed
    if descr.endswith("O"):
        raise DatasetError(f"{where}: pickled Python objects; {_PICKLE_REASON}")
    if descr not in NPY_DTYPES:
        raise DatasetError(f"{where}: dtype {descr}, {WANTED}, little-endian")
    if len(shape) not in dims or min(shape) < 1:
        kinds = {1: "(d,)", 2: "(rows, d)", 3: "(contexts, length, d)"}
        raise DatasetError(f"{where}: shape {tuple(shape)}, expected {' or '.join(kinds[n] for n in dims)}")
    if fortran and len(shape) > 1:
        raise DatasetError(f"{where} is in Fortran order; store numpy.ascontiguousarray of it")
    dtype = NPY_DTYPES[descr]
    expected = length + math.prod(shape) * TORCH_DTYPES[dtype].itemsize
    if expected != size:
        raise DatasetError(
            f"{where} has {size} bytes, its header says {expected} (shape {tuple(shape)}, {dtype}): "
            "truncated or damaged; make it again"
        )
    return _span(path, name, offset + length, shape, dtype)


@functools.lru_cache(maxsize=256)  # a tar has many members, and most of their headers are equal
def _parse_npy(text: str) -> tuple[str, bool, tuple[int, ...]] | None:
    """Return descr, fortran_order and shape of a `.npy` header, or None if it is none, or of a structured dtype."""
    if not _NPY_FIELDS.fullmatch(text) or any(text.count(f"'{f}':") != 1 for f in ("descr", "fortran_order", "shape")):
        return None
    shape = text.partition("'shape': (")[2].partition(")")[0].replace(" ", "").split(",")
    return (
        text.partition("'descr': '")[2].partition("'")[0],
        "'fortran_order': True" in text,
        tuple(int(n) for n in shape if n),
    )


def _span(path: Path, name: str, offset: int, shape: Sequence[int], dtype: str) -> Span:
    rows, d = math.prod(shape[:-1]), shape[-1]
    return Span(path, name, offset, rows, d, dtype, shape[1] if len(shape) == 3 else None)


def _shown(names: list[str]) -> str:
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")


class Headers:
    """A file whose headers are read; most of them come from one read of the page that holds them."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> Headers:
        try:
            self._descriptor = os.open(self.path, os.O_RDONLY)
        except OSError as error:
            raise DatasetError(f"{self.path}: cannot be opened ({error.strerror}); check the path") from error
        self.size = os.fstat(self._descriptor).st_size
        self._page, self._at = b"", 0
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)

    def read(self, position: int, length: int, *, short: bool = False) -> bytes:
        """Return `length` bytes; fewer only at the end of the file and if `short` allows it."""
        inside = position - self._at
        if not (0 <= inside and inside + length <= len(self._page)):
            try:
                self._page = os.pread(self._descriptor, max(length, 1024), position)
            except OSError as error:
                raise DatasetError(f"{self.path}: cannot be read ({error.strerror}); check the disk") from error
            self._at, inside = position, 0
        data = self._page[inside : inside + length]
        if len(data) < length and not short:
            raise DatasetError(f"{self.path}: the file ends at byte {self.size}, in the middle of a header: truncated")
        return data
