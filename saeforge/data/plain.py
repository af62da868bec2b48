"""`PlainTarSource`: training on plain webdataset tars of `.npy` members, without a manifest.

A compatibility path for data that others wrote: no checksums, statistics from a sample, and a position in it holds only
while the files stay as they are. `saeforge data import` makes a real dataset of the same files.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch

from saeforge.data.foreign import TORCH_DTYPES, Span, first_bad_row, memory_of, read_rows
from saeforge.data.layout import MIN_ROWS, choose_block_rows
from saeforge.data.local import expand
from saeforge.data.moments import Moments, Statistics
from saeforge.data.source import Pair, Rows
from saeforge.data.tarscan import scan_tar
from saeforge.errors import ConfigError, DatasetError

STATISTICS_ROWS = 2**18
RUN_ROWS = 256  # rows read in one place for statistics and samples


class PlainTarSource:
    """The `.npy` members of tars as one array of rows, cut into equal blocks: a `BlockSource`.

    Members are (rows, d) or (d,) of float32, float16, float64 or bfloat16 (its bits as uint16), any number of rows
    each. Rows are handed out as bfloat16 where all members are, else as float32.

    Args:
        paths: local tar files: names, globs, or webdataset's braces (`acts-{000000..000009}.tar`).
        key: take only members whose name matches this pattern, for example `*.acts.npy`.
        validation_share: share of the members held out: the last ones, and more if they have fewer than 2,048 rows.

    Attributes:
        spans: by split, the members. d: width of a row.

    Raises:
        ConfigError: no such file, `pipe:` or another URL, a wrong option.
        DatasetError: a truncated or damaged tar or member, pickles, members of different widths, too few rows.
    """

    def __init__(
        self, paths: str | Path | Sequence[str | Path], *, key: str | None = None, validation_share: float = 0.1
    ) -> None:
        if not 0 <= validation_share < 1:
            raise ConfigError(f"validation_share = {validation_share}: expected 0 to less than 1")
        names = [paths] if isinstance(paths, str | Path) else list(paths)
        self.files = expand(names)
        for path in self.files:
            if not path.is_file():
                raise ConfigError(f"{path} is a folder; expected tar files, for example {path}/*.tar")
        if len({path.resolve() for path in self.files}) < len(self.files):
            raise ConfigError("a tar is given twice; name each once")
        self._sizes = {path: path.stat().st_size for path in self.files}
        spans = [span for path in self.files for span in scan_tar(path, key)]
        for span in spans:
            if span.d != spans[0].d:
                raise DatasetError(
                    f"{span.where} is {span.d} wide, {spans[0].where} {spans[0].d}; expected one width (name the "
                    "members to take by a pattern, for example *.acts.npy)"
                )
        self.spans = _split(spans, validation_share)
        self.d = spans[0].d
        self._dtype = torch.bfloat16 if {span.dtype for span in spans} == {"bfloat16"} else torch.float32
        self.widths: tuple[int, ...] = (self.d,)
        self.dtypes: tuple[torch.dtype, ...] = (self._dtype,)
        self.unit = 1
        self._ends = {split: list(accumulate(span.rows for span in part)) for split, part in self.spans.items()}
        self._block_rows: dict[str, int] = {}
        for split, ends in self._ends.items():
            if ends[-1] < MIN_ROWS:
                raise DatasetError(
                    f"split {split} has {ends[-1]:,} rows, at least {MIN_ROWS:,} are needed; give more files"
                )
            self._block_rows[split] = choose_block_rows(ends[-1], self.d * self._dtype.itemsize, split=split)
        self.fingerprint = self._fingerprint(key, validation_share)
        self.statistics: tuple[Statistics, ...] = (self._statistics(),)
        # Evaluation and features open "dataset_path" as a dataset, which this is not: they ask for one by name.
        identity = {"model": None, "site": None, "target": None, "dataset": self.fingerprint}
        self.pairs: tuple[Pair, ...] = (Pair("", (0,), (0,), identity),)
        warnings.warn(
            f"{names[0]}: plain tars without a manifest have no checksums, and a run resumes exactly only while the "
            "files stay the same; to have both, convert them with `saeforge data import`",
            UserWarning,
            stacklevel=2,
        )

    def n_blocks(self, split: str) -> int:
        """See `BlockSource`; rows that do not fill a last block are left out."""
        return self._ends[split][-1] // self._block_rows[split] if split in self._ends else 0

    def block_rows(self, split: str) -> int:
        """See `BlockSource`."""
        if split not in self._block_rows:
            raise DatasetError(f"no split {split!r}; there are: {', '.join(self._block_rows)}")
        return self._block_rows[split]

    def read_block(self, split: str, index: int, into: Rows | None = None) -> Rows:
        """See `BlockSource`; values are checked to be finite at every read.

        Raises:
            DatasetError: NaN or infinite values, or a file that changed; names the file, the member and the row.
        """
        rows = self.block_rows(split)
        if not 0 <= index < self.n_blocks(split):
            raise IndexError(f"block {index} of split {split}: expected 0 to {self.n_blocks(split) - 1}")
        out = torch.empty(rows, self.d, dtype=self._dtype) if into is None else into[0]
        if out.shape != (rows, self.d) or out.dtype != self._dtype or not out.is_contiguous() or out.is_cuda:
            raise ValueError(f"expected a contiguous CPU tensor ({rows}, {self.d}) of {self._dtype}")
        self._read(split, index * rows, out)
        return (out,)

    def sample(self, rows: int) -> Rows:
        """See `BlockSource`."""
        return (torch.cat(list(self._spread("train", rows))),)

    def counters(self) -> dict[str, float]:
        """See `BlockSource`."""
        return {}

    def close(self) -> None:
        """See `BlockSource`: nothing is held."""

    def _read(self, split: str, start: int, out: torch.Tensor) -> None:
        """Fill `out` with rows of a split from row `start` on."""
        spans, ends = self.spans[split], self._ends[split]
        at = bisect_right(ends, start)
        inside = start - (ends[at - 1] if at else 0)
        memory, row_bytes = memory_of(out), self.d * out.dtype.itemsize
        done = 0
        with ExitStack() as stack:
            path, descriptor = None, -1
            while done < len(out):
                span = spans[at]
                if span.path != path:
                    path, descriptor = span.path, self._open(span, stack)
                end = min(done + span.rows - inside, len(out))
                if TORCH_DTYPES[span.dtype] == out.dtype:
                    read_rows(descriptor, span, inside, memory[done * row_bytes : end * row_bytes])
                else:
                    raw = torch.empty(end - done, self.d, dtype=TORCH_DTYPES[span.dtype])
                    read_rows(descriptor, span, inside, memory_of(raw))
                    out[done:end].copy_(raw)
                done, at, inside = end, at + 1, 0
        if (bad := first_bad_row(out)) is not None:
            at = bisect_right(ends, start + bad)
            row = start + bad - (ends[at - 1] if at else 0)
            raise DatasetError(f"{spans[at].where}, row {row}: NaN or infinite values; make it again without them")

    def _open(self, span: Span, stack: ExitStack) -> int:
        try:
            descriptor = os.open(span.path, os.O_RDONLY)
        except OSError as error:
            raise DatasetError(f"{span.where}: cannot be opened ({error.strerror}); restore the file") from error
        stack.callback(os.close, descriptor)
        if os.fstat(descriptor).st_size != self._sizes[span.path]:
            raise DatasetError(f"{span.where}: the file changed its size since it was opened; start again")
        return descriptor

    def _spread(self, split: str, rows: int) -> Iterator[torch.Tensor]:
        """Yield about `rows` rows of a split in runs that are spread evenly; all of them if there are no more."""
        total = self._ends[split][-1]
        if rows >= total:
            starts = np.arange(0, total, RUN_ROWS)
        else:
            starts = np.linspace(0, total - min(rows, RUN_ROWS), num=max(1, rows // RUN_ROWS)).astype(np.int64)
        for start in starts:
            out = torch.empty(min(rows, RUN_ROWS, total - int(start)), self.d, dtype=self._dtype)
            self._read(split, int(start), out)
            yield out

    def _statistics(self) -> Statistics:
        """Of a fixed sample of at most 262,144 training rows."""
        moments = Moments.empty(self.d)
        for part in self._spread("train", STATISTICS_ROWS):
            moments = moments.merge(Moments.of(part.float().numpy()))
        return moments.statistics()

    def _fingerprint(self, key: str | None, validation_share: float) -> str:
        """Of the files' names and sizes and of all that their headers say; not of the data itself."""
        digest = hashlib.sha256(repr((key, validation_share)).encode())
        digest.update(repr([(path.name, size) for path, size in self._sizes.items()]).encode())
        for spans in self.spans.values():
            for span in spans:
                digest.update(repr((span.name, span.offset, span.rows, span.d, span.dtype)).encode())
        return digest.hexdigest()


def _split(spans: list[Span], share: float) -> dict[str, list[Span]]:
    """Hold out the last members: this share of them, and as many more as the rows of a split need."""
    if not share:
        return {"train": spans}
    held_out = max(1, round(share * len(spans)))
    rows = sum(span.rows for span in spans[-held_out:])
    while rows < MIN_ROWS and held_out < len(spans):
        held_out += 1
        rows += spans[-held_out].rows
    total = sum(span.rows for span in spans)
    if rows >= total or (rows > total // 2 and held_out > round(share * len(spans))):
        raise DatasetError(
            f"{total:,} rows in {len(spans):,} member(s) are too few to hold some out (whole members, at "
            f"least {MIN_ROWS:,} rows); give more files, or use `saeforge data import`, which splits inside members"
        )
    return {"train": spans[:-held_out], "validation": spans[-held_out:]}
