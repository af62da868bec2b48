"""A folder of bytes by the hash of what they are, with a size cap: what came over the network need not come twice.

Environment: SAEFORGE_CACHE (else $XDG_CACHE_HOME/saeforge, ~/.cache/saeforge), SAEFORGE_CACHE_GB (50; 0 turns it off).
Several processes may share it: entries appear whole (temporary name, rename), are checked when they are read, and one
that vanishes is a miss. The entries that were not used for longest go first.
"""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import re
import shutil
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from saeforge.data.checksum import crc32 as checksum
from saeforge.data.storage import fill, hash_file
from saeforge.errors import ConfigError

GB = 10**9
SLACK = 20  # room is made until 1/20 of the cap is free, so that not each entry has to look for some
LOOK = 100  # after writing 1/100 of the cap the folder is looked through: other processes write to it too
KEY = re.compile(r"[0-9a-f]{64}(-[0-9]+-[0-9]+)?")  # of a whole file, or of a block: offset and bytes
STALE_SECONDS = 86_400  # of temporary files that a killed process left


class Cache:
    """Entries by key, at most `cap` bytes of them.

    Args:
        folder: made when first needed; None with a cap of 0.
        cap: bytes; 0: nothing is kept.
    """

    def __init__(self, folder: Path | None, cap: int) -> None:
        self.folder, self.cap = folder, cap
        self._lock = threading.Lock()
        self._bytes: int | None = None  # in the folder, as far as this process knows
        self._unseen = 0  # written by this process since it last looked
        self._broken = False

    @classmethod
    def from_environment(cls) -> Cache:
        """Return the cache that the environment asks for.

        Raises:
            ConfigError: SAEFORGE_CACHE_GB is no number, or negative.
        """
        cap = int(number_from("SAEFORGE_CACHE_GB", 50) * GB)
        if cap == 0:
            return cls(None, 0)
        home = os.environ.get("SAEFORGE_CACHE")
        if home:
            return cls(Path(home), cap)
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        return cls(Path(base) / "saeforge", cap)

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "cap": self.cap}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["folder"], state["cap"])  # type: ignore[misc]

    def load(self, key: str, memory: memoryview, crc32: int) -> bool:
        """Fill `memory` from an entry; False if there is none, or one with other content, which is removed."""
        path = self._path(key)
        if path is None:
            return False
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except OSError:
            return False
        try:
            if os.fstat(descriptor).st_size == len(memory):
                fill(descriptor, 0, memory)
                if checksum(memory) == crc32:
                    self._touch(path)
                    return True
        except (OSError, EOFError):
            pass  # a damaged disk is a reason not to trust the entry
        finally:
            os.close(descriptor)
        self._remove(path)
        return False

    def store(self, key: str, memory: memoryview) -> None:
        """Keep some bytes; a full or unwritable disk is a warning, once, and nothing is kept from then on."""
        path = self._path(key)
        if path is None or self._broken or len(memory) > self.cap:
            return
        try:
            self._make_room(len(memory))
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_name(f"{path.name}.part-{os.getpid()}-{threading.get_ident()}")
            try:
                part.write_bytes(memory)
                part.replace(path)
            finally:
                part.unlink(missing_ok=True)
        except FileNotFoundError:
            self._bytes = None  # somebody removed the cache just now; it is made again with the next entry
        except OSError as error:
            self.give_up(error)

    def link(self, sha256: str, path: Path) -> bool:
        """Put an entry, a whole file, at `path` too; False if there is none, or a damaged one, which is removed."""
        entry = self._path(sha256)
        if entry is None:
            return False
        try:
            _link_or_copy(entry, path)
        except OSError:
            path.unlink(missing_ok=True)
            return False
        if hash_file(path) == sha256:
            self._touch(entry)
            return True
        path.unlink()
        self._remove(entry)
        return False

    def adopt(self, sha256: str, path: Path) -> None:
        """Keep a whole file that stands in a `workplace`; warns like `store`."""
        entry = self._path(sha256)
        size = path.stat().st_size
        if entry is None or self._broken or size > self.cap:
            return
        try:
            self._make_room(size)
            entry.parent.mkdir(parents=True, exist_ok=True)
            part = entry.with_name(f"{entry.name}.part-{os.getpid()}-{threading.get_ident()}")
            try:
                _link_or_copy(path, part)
                part.replace(entry)
            finally:
                part.unlink(missing_ok=True)  # where both names were one file already, replace leaves it
        except FileNotFoundError:
            self._bytes = None  # somebody removed the cache just now; it is made again with the next entry
        except OSError as error:
            self.give_up(error)

    @contextlib.contextmanager
    def workplace(self) -> Iterator[Path]:
        """Give an empty folder for this once, on the cache's own disk where there is one."""
        with contextlib.ExitStack() as stack:
            place: str | None = None
            if self.folder is not None and self.usable:
                try:
                    (self.folder / "work").mkdir(parents=True, exist_ok=True)
                    place = stack.enter_context(_temporary_folder(self.folder / "work"))
                except OSError as error:
                    self.give_up(error)
            yield Path(place or stack.enter_context(_temporary_folder(None)))

    def _path(self, key: str) -> Path | None:
        # Hashes come from manifests, which come from anywhere: what is none must not become a path.
        if self.folder is None or not self.cap or not KEY.fullmatch(key):
            return None
        return self.folder / "entries" / key[:2] / key

    def _touch(self, path: Path) -> None:
        with contextlib.suppress(OSError):  # removed by another process, or a cache that may only be read
            os.utime(path)

    def _remove(self, path: Path) -> None:
        with contextlib.suppress(OSError):
            path.unlink()

    def _make_room(self, size: int) -> None:
        """Remove what was not used for longest, until `size` bytes more fit."""
        with self._lock:
            self._unseen += size
            if self._bytes is not None and self._bytes + size <= self.cap and self._unseen <= self.cap // LOOK:
                self._bytes += size
                return
            self._bytes = self._evict(size) + size
            self._unseen = size

    def _evict(self, size: int) -> int:
        """Return the bytes that the folder holds after looking through it, and removing what is too much."""
        assert self.folder is not None
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / ".lock").open("w") as lock:
            with contextlib.suppress(OSError):  # a network disk without locks: two may remove the same, no harm
                fcntl.flock(lock, fcntl.LOCK_EX)
            now = time.time()
            total = 0
            entries: list[tuple[float, int, Path]] = []
            for folder in (self.folder / "entries").glob("*"):
                for found in os.scandir(folder):
                    with contextlib.suppress(OSError):
                        stat = found.stat()
                        if ".part-" not in found.name:
                            entries.append((stat.st_mtime, stat.st_size, Path(found)))
                        elif now - stat.st_mtime > STALE_SECONDS:
                            Path(found).unlink()
                            continue
                        total += stat.st_size
            for folder in (self.folder / "work").glob("*"):
                with contextlib.suppress(OSError):
                    if now - folder.stat().st_mtime > STALE_SECONDS:
                        shutil.rmtree(folder)
            if total + size > self.cap:
                for _, count, path in sorted(entries, key=lambda entry: entry[0]):
                    if total + size <= self.cap - self.cap // SLACK:
                        break
                    self._remove(path)
                    total -= count
            return total

    @property
    def usable(self) -> bool:
        """Whether entries are kept here."""
        return self.folder is not None and self.cap > 0 and not self._broken

    def give_up(self, error: OSError) -> None:
        """Keep nothing from now on, and say so."""
        self._broken = True
        warnings.warn(
            f"the cache {self.folder} cannot be written ({error.strerror}): reading goes on without it; free some "
            "space, set SAEFORGE_CACHE to another folder, or SAEFORGE_CACHE_GB=0",
            stacklevel=2,
        )


def _temporary_folder(parent: Path | None) -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="saeforge-", dir=parent, ignore_cleanup_errors=True)


def _link_or_copy(old: Path, new: Path) -> None:
    """Give a file a second name; some disks, and files of other users, allow only a copy."""
    try:
        new.hardlink_to(old)
    except FileNotFoundError:
        raise
    except OSError:
        shutil.copyfile(old, new)


def number_from(variable: str, default: float) -> float:
    """Return the number that an environment variable holds, or the default.

    Raises:
        ConfigError: it is no number, or negative.
    """
    text = os.environ.get(variable)
    if not text:
        return default
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not value >= 0 or math.isinf(value):
        raise ConfigError(f"{variable}={text}: expected a number, 0 or more")
    return value
