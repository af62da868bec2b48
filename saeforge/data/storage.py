"""Where the bytes of a dataset lie: a folder or a URL, behind one small interface, and the folder's side of it.

`open_storage` takes a path, `file://`, or one of the remote schemes, which `saeforge.data.remote` reads through fsspec.
Whatever a storage cannot give exactly is a DatasetError that names the shard and the block.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from saeforge.data.checksum import crc32
from saeforge.errors import DatasetError

REMOTE_SCHEMES = ("s3", "gs", "gcs", "hf", "http", "https", "memory")
PICKLES = (".pth", ".pt", ".pkl", ".pickle", ".ckpt", ".bin")


@dataclass(frozen=True)
class Extent:
    """Some bytes of a shard, and what proves that they are the right ones.

    Attributes:
        file: name below the dataset's folder.
        offset: where they start in the file.
        crc32: of the bytes.
        shard_sha256: of the whole file: with the offset, the name of these bytes wherever they lie.
        block: number of the block within the file, for messages.
    """

    file: str
    offset: int
    crc32: int
    shard_sha256: str
    block: int


class ReadCounts:
    """What reading has cost so far, summed over threads.

    Attributes:
        retries: reads that were tried again.
        origin_bytes: bytes that came from the dataset's own place (disk or network).
        cache_bytes: bytes that came from the local cache of a remote dataset.
    """

    def __init__(self) -> None:
        self.retries = self.origin_bytes = self.cache_bytes = 0
        self._lock = threading.Lock()

    def add(self, *, retries: int = 0, origin_bytes: int = 0, cache_bytes: int = 0) -> None:
        """Count some more."""
        with self._lock:
            self.retries += retries
            self.origin_bytes += origin_bytes
            self.cache_bytes += cache_bytes

    def __getstate__(self) -> dict[str, int]:
        return {"retries": self.retries, "origin_bytes": self.origin_bytes, "cache_bytes": self.cache_bytes}

    def __setstate__(self, state: dict[str, int]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()


class Storage(ABC):
    """The files of one dataset, by their names below its folder (`rows/train-000000.tar`).

    Safe in several threads, after a fork, and after pickling.

    Attributes:
        location: absolute path, or URL without a password in it: what opens the same dataset again.
        counts: what reading has cost.
    """

    location: str
    counts: ReadCounts

    def name(self, file: str) -> str:
        """Return the path or URL of a file, for people."""
        return f"{self.location}/{file}"

    @abstractmethod
    def check(self) -> None:
        """Raise DatasetError if there is nothing at this place."""

    @abstractmethod
    def sizes(self, files: Sequence[str]) -> list[int | None]:
        """Return the size in bytes of each file, None where there is no such file.

        Raises:
            DatasetError: the place cannot be asked.
        """

    @abstractmethod
    def read_file(self, file: str) -> bytes | None:
        """Return a small file as it is now, never from a cache; None if there is no such file.

        Raises:
            DatasetError: it cannot be read.
        """

    @abstractmethod
    def read(self, file: str, offset: int, memory: memoryview, where: str) -> None:
        """Fill `memory` with the bytes from `offset` on, as they are, unchecked and uncached.

        Args:
            file: its name.
            offset: first byte.
            memory: bytes to fill, all of them.
            where: what is read, for messages.

        Raises:
            DatasetError: missing, too short, or unreadable.
        """

    @abstractmethod
    def read_block(self, extent: Extent, memory: memoryview) -> None:
        """Fill `memory` with a block and check its crc32.

        Raises:
            DatasetError: bytes are missing or damaged; names the shard and the block.
        """

    @abstractmethod
    def local_files(self, folder: str, files: Mapping[str, str]) -> AbstractContextManager[Path]:
        """Give a local folder that holds the named files of `folder`, whole and checked.

        What is opened or memory-mapped inside the context stays readable after it.

        Args:
            folder: below the dataset's.
            files: sha256 by file name.

        Raises:
            DatasetError: a file is missing or damaged.
        """

    def where(self, file: str, block: int) -> str:
        """Return the name of a block, for people."""
        return f"{self.name(file)}, block {block}"


class LocalStorage(Storage):
    """A folder. No file is kept open between reads: an open costs microseconds, a read of a block milliseconds.

    Args:
        root: the folder.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.location = str(root.resolve())
        self.counts = ReadCounts()

    def name(self, file: str) -> str:
        """As the user wrote it."""
        return str(self.root / file)

    def check(self) -> None:
        """See `Storage.check`."""
        if not self.root.is_dir():
            raise DatasetError(
                f"no activation dataset at {self.root}: no such folder; run `saeforge harvest --out {self.root} ...`"
            )

    def sizes(self, files: Sequence[str]) -> list[int | None]:
        """See `Storage.sizes`."""

        def size(file: str) -> int | None:
            try:
                return (self.root / file).stat().st_size
            except FileNotFoundError:
                return None
            except OSError as error:
                raise _unreadable(self.name(file), error) from error

        return [size(file) for file in files]

    def read_file(self, file: str) -> bytes | None:
        """See `Storage.read_file`."""
        try:
            return (self.root / file).read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise _unreadable(self.name(file), error) from error

    def read(self, file: str, offset: int, memory: memoryview, where: str) -> None:
        """See `Storage.read`."""
        try:
            descriptor = os.open(self.root / file, os.O_RDONLY)
        except FileNotFoundError as error:
            raise DatasetError(f"{where}: the shard is missing; restore it or harvest again") from error
        except OSError as error:
            raise _unreadable(where, error) from error
        try:
            fill(descriptor, offset, memory)
        except EOFError as error:
            raise DatasetError(f"{where}: the file ends {error} bytes early; restore or harvest again") from error
        except OSError as error:
            raise _unreadable(where, error) from error
        finally:
            os.close(descriptor)
        self.counts.add(origin_bytes=len(memory))

    def read_block(self, extent: Extent, memory: memoryview) -> None:
        """See `Storage.read_block`."""
        where = self.where(extent.file, extent.block)
        self.read(extent.file, extent.offset, memory, where)
        if crc32(memory) != extent.crc32:
            raise DatasetError(f"{where}: checksum mismatch, the data is damaged; restore it or harvest again")

    @contextlib.contextmanager
    def local_files(self, folder: str, files: Mapping[str, str]) -> Iterator[Path]:
        """See `Storage.local_files`."""
        for file, sha256 in files.items():
            path = self.root / folder / file
            try:
                digest = hash_file(path)
            except FileNotFoundError as error:
                raise DatasetError(f"{path} is missing; restore it, or harvest again") from error
            except OSError as error:
                raise _unreadable(str(path), error) from error
            if digest != sha256:
                raise DatasetError(f"{path} is damaged; restore it, or harvest again")
        yield self.root / folder


def open_storage(location: str | Path) -> Storage:
    """Return the storage behind a path or URL; nothing is read yet.

    Args:
        location: a folder, `file://...`, or a URL of one of `REMOTE_SCHEMES`.

    Raises:
        DatasetError: another scheme, a shell pipe, a pickle, or a package that the scheme needs is missing.
    """
    text = str(location)
    if text.startswith("pipe:"):
        raise DatasetError(f"{text!r}: saeforge runs no shell commands to read data; give a folder, {_allowed()}")
    if text.rstrip("/").lower().endswith(PICKLES) and not Path(text).is_dir():
        raise DatasetError(
            f"{text}: saeforge does not open pickles (they can run code); store the rows as .npy or .safetensors and "
            "use `saeforge data import`"
        )
    scheme, separator, rest = text.partition("://")
    if not separator:
        return LocalStorage(Path(text))
    if scheme == "file":
        return LocalStorage(Path(rest.removeprefix("localhost")))
    if scheme not in REMOTE_SCHEMES:
        raise DatasetError(f"{text}: cannot read {scheme}://; give a folder, {_allowed()}")
    from saeforge.data.remote import RemoteStorage

    return RemoteStorage(text)


def hash_file(path: Path) -> str:
    """Return the sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fill(descriptor: int, offset: int, memory: memoryview) -> None:
    """Read from a file into memory until it is full.

    Raises:
        EOFError: the file ends before; says how many bytes are missing.
    """
    done = 0
    while done < len(memory):  # the kernel may return less than asked, and at most 2 GiB at once
        count = os.preadv(descriptor, [memory[done:]], offset + done)
        if count == 0:
            raise EOFError(len(memory) - done)
        done += count


def _allowed() -> str:
    return "or a URL that starts with " + ", ".join(f"{scheme}://" for scheme in ("file", *REMOTE_SCHEMES))


def _unreadable(where: str, error: OSError) -> DatasetError:
    return DatasetError(f"{where}: cannot be read ({error.strerror}); check the disk or the mount")
