"""Buckets are written behind the forward passes: while the model makes one bucket, the one before goes to disk."""

from __future__ import annotations

import contextlib
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from saeforge.data.writer import DatasetWriter
from saeforge.harvest.buckets import BucketRows
from saeforge.harvest.progress import HarvestProgress


class Behind:
    """Writes one bucket at a time on a thread; a context manager, which waits for the last on the way out.

    Args:
        writer: of the dataset.
        progress: told of each bucket that is committed.
    """

    def __init__(self, writer: DatasetWriter, progress: HarvestProgress) -> None:
        self._writer = writer
        self._progress = progress
        self._pool = ThreadPoolExecutor(1)
        self._last: tuple[Future[None], int] | None = None

    def __enter__(self) -> Behind:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.wait()
        finally:
            self._pool.shutdown()  # what is begun is brought to its end, also after Ctrl-C

    def write(self, claim: contextlib.ExitStack, split: str, bucket: int, made: BucketRows) -> None:
        """Begin to write a bucket, after the one before.

        Args:
            claim: of the bucket; closed when it is committed.
            split: its split.
            bucket: its index.
            made: its rows, which nobody may change any more.

        Raises:
            SaeforgeError: the one before could not be written.
        """
        with claim:  # given back if the one before failed
            self.wait()
            tokens = len(made.provenance) + made.dropped
            self._last = self._pool.submit(self._write, claim.pop_all(), split, bucket, made), tokens

    def wait(self) -> None:
        """Wait until what was given is committed, and raise what went wrong with it."""
        if self._last is not None:
            (future, rows), self._last = self._last, None
            future.result()
            self._progress.bucket_done(rows)

    def _write(self, claim: contextlib.ExitStack, split: str, bucket: int, made: BucketRows) -> None:
        with claim:
            write_rows(self._writer, split, bucket, made)


def write_rows(writer: DatasetWriter, split: str, bucket: int, made: BucketRows) -> None:
    """Write and commit the rows of a bucket."""
    writer.write_bucket(split, bucket, made.data, made.provenance, outlier_rows=made.dropped, outliers=made.outliers)
