"""Activations as SAELens caches them: a folder of HuggingFace `datasets`, `data-*.arrow` files in stream format.

A row of the table is a sequence: a column named after the hook holds `[context, d]` floats (the extension type Array2D,
stored as lists of lists), `token_ids` its tokens if they were kept. Files are memory-mapped, so that only what is read
is in memory. pyarrow is an optional dependency, and `datasets` is not needed.
"""

from __future__ import annotations

import importlib
import json
import warnings
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from saeforge.data.foreign import TORCH_DTYPES
from saeforge.errors import ConfigError, DatasetError

TOKENS = "token_ids"
END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"
DTYPES = {"halffloat": "float16", "float": "float32", "double": "float64"}


def arrow_files(folder: Path) -> list[Path]:
    """Return the data files of a folder in order, as its `state.json` lists them.

    Raises:
        DatasetError: a file is missing, or the cache was interrupted while it was made.
    """
    if (folder / ".tmp_shards").exists():
        raise DatasetError(f"{folder} holds .tmp_shards: SAELens was interrupted while it cached; let it finish first")
    found = sorted(folder.glob("*.arrow"))
    state = folder / "state.json"
    if not state.is_file():
        return found
    try:
        listed = [folder / str(item["filename"]) for item in json.loads(state.read_bytes())["_data_files"]]
    except (ValueError, KeyError, TypeError) as error:
        raise DatasetError(f"{state} is damaged ({error!r}); cache the activations again") from error
    for path in listed:
        if not path.is_file():
            raise DatasetError(f"{path} is missing, {state.name} lists it; copy the whole folder")
    return listed


class ArrowArray:
    """The sequences of one Arrow file.

    Args:
        path: the file.
        column: name of the column with the activations; None: the only one that holds some.

    Attributes:
        name: the column. rows: sequences times their length. d: width. context: rows of a sequence.
        dtype: "float32", "float16" or "float64".

    Raises:
        ConfigError: pyarrow is not installed. DatasetError: truncated or damaged, no such column, another shape.
    """

    def __init__(self, path: Path, column: str | None = None) -> None:
        self.path = path
        self._pa = _pyarrow()
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(size - len(END_OF_STREAM), 0))
            if file.read() != END_OF_STREAM:  # pyarrow takes a file that ends between two batches for a whole one
                raise DatasetError(f"{path} lacks the mark of its end: truncated, or not in Arrow's stream format")
        schema = self._batches[0]
        types = {field.name: getattr(field.type, "storage_type", field.type) for field in schema}
        columns = {name: kind for name, kind in types.items() if _is_array(self._pa, kind)}
        if column is None and len(columns) != 1:
            raise DatasetError(f"{path} has {len(columns)} columns of activations ({', '.join(columns)}); give --key")
        if column is not None and column not in columns:
            raise DatasetError(f"{path} has no column of activations {column!r}; it has: {', '.join(columns)}")
        self.name = column or next(iter(columns))
        self.dtype = DTYPES[str(columns[self.name].value_type.value_type)]
        self._starts = np.cumsum([0, *(batch.num_rows for batch in self._batches[1])])
        self.context, self.d = self._shape(schema)
        self.rows = int(self._starts[-1]) * self.context
        self.has_tokens = TOKENS in schema.names

    @property
    def where(self) -> str:
        """For messages."""
        return f"{self.path}, {self.name}"

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Return rows start to stop, (rows, d), in the dtype of the file.

        Raises:
            DatasetError: sequences of different lengths, missing values.
        """
        parts = []
        for batch, first, last in self._sequences(start, stop):
            array = _storage(self._batches[1][batch].column(self.name)).slice(first, last - first)
            inner = array.flatten()
            values = inner.flatten()
            count = last - first
            if array.null_count or inner.null_count or values.null_count:
                raise DatasetError(f"{self.where}: missing values in sequences {first} to {last} of batch {batch}")
            even = len(inner) == count * self.context and len(values) == count * self.context * self.d
            lengths = (array, self.context), (inner, self.d)
            if not even or any(set(a.value_lengths().unique().to_pylist()) != {n} for a, n in lengths):
                raise DatasetError(f"{self.where}: sequences are not all of shape ({self.context}, {self.d})")
            parts.append(values.to_numpy(zero_copy_only=True).reshape(-1, self.d))
        return self._cut(parts, start, stop)

    def tokens(self, start: int, stop: int) -> np.ndarray | None:
        """Return the token ids of rows start to stop, or None where they were not kept."""
        if not self.has_tokens:
            return None
        parts = []
        for batch, first, last in self._sequences(start, stop):
            values = self._batches[1][batch].column(TOKENS).slice(first, last - first).flatten()
            if values.null_count or len(values) != (last - first) * self.context:
                raise DatasetError(f"{self.path}, {TOKENS}: expected {self.context} tokens in every sequence")
            parts.append(values.to_numpy(zero_copy_only=False).reshape(-1, 1))
        return self._cut(parts, start, stop).numpy()[:, 0]

    @cached_property
    def _batches(self) -> tuple[Any, list[Any]]:
        """The schema and the record batches; they refer to the memory map, nothing is read yet."""
        try:
            with self._pa.ipc.open_stream(self._pa.memory_map(str(self.path))) as stream:
                batches = list(stream)
            for batch in batches:
                batch.validate()
            return stream.schema, batches
        except (self._pa.ArrowInvalid, OSError, EOFError) as error:
            raise DatasetError(f"{self.path} is no whole Arrow stream file ({error}); cache it again") from error

    def _shape(self, schema: Any) -> tuple[int, int]:
        """The shape of a sequence: that of the first one."""
        for batch in self._batches[1]:
            if batch.num_rows:
                inner = _storage(batch.column(self.name)).slice(0, 1).flatten()
                if len(inner) and len(inner.slice(0, 1).flatten()):
                    return len(inner), len(inner.slice(0, 1).flatten())
                break
        raise DatasetError(f"{self.where}: no sequence, or an empty one")

    def _sequences(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """Batch, first and last-plus-one sequence in it, of what covers rows start to stop."""
        first, last = start // self.context, -(-stop // self.context)
        found = []
        for batch in range(int(np.searchsorted(self._starts, first, side="right")) - 1, len(self._starts) - 1):
            low, high = int(self._starts[batch]), int(self._starts[batch + 1])
            if low >= last:
                break
            if high > max(first, low):
                found.append((batch, max(first, low) - low, min(last, high) - low))
        return found

    def _cut(self, parts: list[np.ndarray], start: int, stop: int) -> torch.Tensor:
        whole = parts[0] if len(parts) == 1 else np.concatenate(parts)
        skip = start % self.context
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given NumPy array is not writable", UserWarning)  # only read here
            return torch.from_numpy(whole[skip : skip + stop - start])


def _is_array(pa: Any, kind: Any) -> bool:
    """Whether a column holds lists of lists of floats."""
    lists = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    for _ in range(2):
        if not any(is_list(kind) for is_list in lists):
            return False
        kind = kind.value_type
    return str(kind) in DTYPES and DTYPES[str(kind)] in TORCH_DTYPES


def _storage(column: Any) -> Any:
    """The plain lists below an extension type, which pyarrow knows if `datasets` was imported in this process."""
    return getattr(column, "storage", column)


def _pyarrow() -> Any:
    try:
        pyarrow = importlib.import_module("pyarrow")
        importlib.import_module("pyarrow.ipc")
    except ImportError as error:
        raise ConfigError("reading Arrow needs pyarrow; pip install 'saeforge[parquet]'") from error
    return pyarrow
