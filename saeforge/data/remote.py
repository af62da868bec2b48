"""A dataset behind a URL: ranges through fsspec, tried again with back-off, checked, and kept in a local cache.

Environment: SAEFORGE_READ_TRIES (5), SAEFORGE_READ_WAIT (0.5 s before the first retry, doubled each time, with jitter),
SAEFORGE_READ_TIMEOUT (60 s for one request). Credentials are those of the package behind the scheme (s3fs, gcsfs), of
`hf auth login`, and for http of a ~/.netrc.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

from saeforge.data.cache import Cache, number_from
from saeforge.data.checksum import crc32 as checksum
from saeforge.data.storage import Extent, ReadCounts, Storage
from saeforge.data.web import Missing, Refused, get_range, no_package, on_the_hub
from saeforge.errors import DatasetError

T = TypeVar("T")
PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "hf": "huggingface_hub", "http": "aiohttp", "https": "aiohttp"}
CHUNK_BYTES = 1 << 23  # of a file that is downloaded whole
SIZES_AT_ONCE = 16
LONGEST_WAIT = 30.0
WEB = ("http", "https", "hf")  # asked by our own requests, so that no answer but the true one counts


@dataclass(frozen=True)
class Patience:
    """How long to go on when the network does not answer.

    Attributes:
        tries: requests for one thing at most.
        wait: seconds before the second try; doubled for each one after, 30 at most, times 0.5 to 1.5 at random.
        timeout: seconds for one request; 0: as long as it takes.
    """

    tries: int = 5
    wait: float = 0.5
    timeout: float = 60.0

    @classmethod
    def from_environment(cls) -> Patience:
        """Read SAEFORGE_READ_TRIES, SAEFORGE_READ_WAIT and SAEFORGE_READ_TIMEOUT.

        Raises:
            ConfigError: one is no number, or negative.
        """
        default = cls()
        return cls(
            max(1, int(number_from("SAEFORGE_READ_TRIES", default.tries))),
            number_from("SAEFORGE_READ_WAIT", default.wait),
            number_from("SAEFORGE_READ_TIMEOUT", default.timeout),
        )


class WrongContent(Exception):
    """The bytes came, but they are not those that the manifest describes."""


class RemoteStorage(Storage):
    """A URL of one of `saeforge.data.storage.REMOTE_SCHEMES`.

    Args:
        url: of the dataset's folder.
        patience: None reads it from the environment.
        cache: None takes the one that the environment names; `Cache(None, 0)` is none at all.

    Raises:
        DatasetError: a query in the URL, or the package for the scheme is missing.
    """

    def __init__(self, url: str, *, patience: Patience | None = None, cache: Cache | None = None) -> None:
        self.scheme, _, rest = url.partition("://")
        if not rest.strip("/") or re.search(r"[?#]", rest):
            raise DatasetError(f"{url}: expected the address of a dataset's folder, without ? or #")
        # A name and password are for reading, not for messages, checkpoints or published SAEs.
        host, slash, path = rest.rstrip("/").partition("/")
        shown = host.rpartition("@")[2] if self.scheme in ("http", "https") else host
        self.location = f"{self.scheme}://{shown}{slash}{path}"
        self._url = url.rstrip("/")
        self._headers: dict[str, str] = {}
        if self.scheme == "hf":
            self._url, self._headers = on_the_hub(rest.rstrip("/"), self.location)
        self.counts = ReadCounts()
        self.patience = patience or Patience.from_environment()
        self.cache = cache or Cache.from_environment()
        self._lock = threading.Lock()
        self._filesystem: tuple[int, Any] | None = None
        self._files()  # a missing package is told now

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_lock": None, "_filesystem": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    def check(self) -> None:
        """A URL shows what it is when it is read."""

    def sizes(self, files: Sequence[str]) -> list[int | None]:
        """See `Storage.sizes`; a server that sends whole files only is refused here."""
        with ThreadPoolExecutor(SIZES_AT_ONCE, thread_name_prefix="saeforge-size") as pool:
            return list(pool.map(self._size, files))

    def read_file(self, file: str) -> bytes | None:
        """See `Storage.read_file`."""
        try:
            content = self._patiently(self.name(file), lambda: self._fetch(file, 0, None))
        except Missing:
            return None
        self.counts.add(origin_bytes=len(content))
        return bytes(content)

    def read(self, file: str, offset: int, memory: memoryview, where: str) -> None:
        """See `Storage.read`."""
        self._read(file, offset, memory, where, None)

    def read_block(self, extent: Extent, memory: memoryview) -> None:
        """See `Storage.read_block`; from the cache if it is there and right, else from the origin."""
        key = f"{extent.shard_sha256}-{extent.offset}-{len(memory)}"
        if self.cache.load(key, memory, extent.crc32):
            self.counts.add(cache_bytes=len(memory))
            return
        self._read(extent.file, extent.offset, memory, self.where(extent.file, extent.block), extent.crc32)
        self.cache.store(key, memory)

    @contextlib.contextmanager
    def local_files(self, folder: str, files: Mapping[str, str]) -> Iterator[Path]:
        """See `Storage.local_files`: linked from the cache, or downloaded for this once where there is none."""
        for file in files:
            if Path(file).name != file:  # a manifest from somewhere must not choose where files are written
                raise DatasetError(f"{self.location}: the manifest names the file {file!r}; harvest again")
        with contextlib.ExitStack() as stack:
            place = stack.enter_context(self.cache.workplace())
            try:
                self._bring(folder, files, place)
            except OSError as error:
                if not self.cache.usable:
                    raise _no_room(self.location, place, error) from error
                self.cache.give_up(error)
                place = stack.enter_context(self.cache.workplace())  # on another disk now
                try:
                    self._bring(folder, files, place)
                except OSError as again:
                    raise _no_room(self.location, place, again) from again
            yield place

    def _bring(self, folder: str, files: Mapping[str, str], place: Path) -> None:
        """Put the files into a local folder; a file that came with wrong content comes once more.

        Raises:
            OSError: they cannot be written.
            DatasetError: they cannot be read.
        """
        for file, sha256 in files.items():
            name = f"{folder}/{file}"
            if self.cache.link(sha256, place / file):
                self.counts.add(cache_bytes=(place / file).stat().st_size)
                continue
            if self._download(name, place / file) != sha256:
                self.counts.add(retries=1)
                if self._download(name, place / file) != sha256:
                    raise DatasetError(
                        f"{self.name(name)} is damaged (its sha256 does not match, twice); restore it, or harvest again"
                    )
            self.cache.adopt(sha256, place / file)

    def _download(self, file: str, path: Path) -> str:
        """Fetch a whole file and return its sha256."""
        size = self._size(file)
        if size is None:
            raise DatasetError(f"{self.name(file)} is missing; restore it, or harvest again")
        digest = hashlib.sha256()
        with path.open("wb") as out:
            for start in range(0, size, CHUNK_BYTES):
                memory = memoryview(bytearray(min(CHUNK_BYTES, size - start)))
                self.read(file, start, memory, self.name(file))
                digest.update(memory)
                out.write(memory)
        return digest.hexdigest()

    def _size(self, file: str) -> int | None:
        def ask() -> int:
            if self.scheme in WEB:
                return int(self._http(file, 0, 1)[1])
            size = self._in_time(lambda: self._files().info(self._path(file)))["size"]
            if size is None:
                raise Refused("its size is not told")
            return int(size)

        try:
            return self._patiently(self.name(file), ask)
        except Missing:
            return None

    def _read(self, file: str, offset: int, memory: memoryview, where: str, crc32: int | None) -> None:
        def ask() -> None:
            content = self._fetch(file, offset, len(memory))
            if len(content) != len(memory):
                raise OSError(f"{len(content)} bytes came, {len(memory)} were asked for")
            self.counts.add(origin_bytes=len(content))
            if crc32 is not None and checksum(content) != crc32:
                raise WrongContent("checksum mismatch, the data is damaged")
            memory[:] = content

        try:
            self._patiently(where, ask)
        except Missing as error:
            raise DatasetError(f"{where}: the file is missing ({error}); restore it, or harvest again") from error

    def _patiently(self, where: str, ask: Callable[[], T]) -> T:
        """Ask until there is an answer; wrong content is asked for once more only.

        Raises:
            Missing: no such file.
            DatasetError: no answer, or none that is right.
        """
        chance = random.Random()  # jitter; the global generator belongs to the training run
        for attempt in range(1, self.patience.tries + 1):
            try:
                return ask()
            except (Missing, DatasetError):
                raise
            except (FileNotFoundError, IsADirectoryError) as error:
                raise Missing(str(error)) from error
            except (Refused, PermissionError) as error:
                raise DatasetError(f"{where}: {error or 'permission denied'}") from error
            except Exception as error:  # each package behind fsspec has exceptions of its own
                wrong = isinstance(error, WrongContent)
                if attempt == (min(2, self.patience.tries) if wrong else self.patience.tries):
                    cause = f"{error} ({type(error).__name__})" if not wrong else str(error)
                    times = "once" if attempt == 1 else f"{attempt} times"
                    advice = "restore it or harvest again" if wrong else "check the address and the network"
                    raise DatasetError(f"{where}: cannot be read, tried {times}: {cause}; {advice}") from error
            self.counts.add(retries=1)
            wait = min(self.patience.wait * 2 ** (attempt - 1), LONGEST_WAIT)
            time.sleep(wait * (0.5 + chance.random()))
        raise AssertionError("unreachable")

    def _fetch(self, file: str, offset: int, count: int | None) -> memoryview:
        """Return `count` bytes from `offset` on, or the whole file."""
        if self.scheme in WEB:
            return memoryview(self._http(file, offset, count)[0])
        path, end = self._path(file), None if count is None else offset + count
        return memoryview(self._in_time(lambda: self._files().cat_file(path, start=offset, end=end)))

    def _http(self, file: str, offset: int, count: int | None) -> tuple[bytes, int]:
        """Return some bytes of a file and the size of all of it; only a true answer to the range will do."""
        from fsspec.asyn import sync  # type: ignore[import-untyped]

        files = self._files()
        headers = {**self._headers, "Accept-Encoding": "identity"}
        answer: tuple[bytes, int] = sync(
            files.loop, get_range, files, self._path(file), headers, offset, count, self.patience.timeout
        )
        return answer

    def _in_time(self, ask: Callable[[], Any]) -> Any:
        """Call a function that may hang, for so long."""
        result: list[Any] = []

        def run() -> None:
            try:
                result.append((True, ask()))
            except BaseException as error:
                result.append((False, error))

        thread = threading.Thread(target=run, daemon=True, name="saeforge-remote")
        thread.start()
        thread.join(self.patience.timeout or None)
        if not result:
            raise TimeoutError(f"no answer within {self.patience.timeout:g} s")
        good, value = result[0]
        if not good:
            raise value
        return value

    def _path(self, file: str) -> str:
        if self.scheme in WEB:
            return f"{self._url}/{quote(file)}"
        return str(self._files()._strip_protocol(f"{self._url}/{file}"))

    def _files(self) -> Any:
        """The file system of this process: its connections and its thread do not survive a fork."""
        with self._lock:
            if self._filesystem is None or self._filesystem[0] != os.getpid():
                import fsspec  # type: ignore[import-untyped]

                options: dict[str, Any] = {"skip_instance_cache": True, "use_listings_cache": False}
                if self.scheme in WEB:
                    options["client_kwargs"] = {"trust_env": True}  # proxies, and passwords from ~/.netrc
                try:
                    made = fsspec.filesystem("https" if self.scheme in WEB else self.scheme, **options)
                except ImportError as error:
                    raise no_package(self.location, PACKAGES.get(self.scheme, "fsspec")) from error
                self._filesystem = (os.getpid(), made)
            return self._filesystem[1]


def _no_room(location: str, place: Path, error: OSError) -> DatasetError:
    return DatasetError(
        f"the tokens of {location} cannot be stored in {place.parent}: {error.strerror}; free some space, or set "
        "SAEFORGE_CACHE to a folder with more"
    )
