"""The folder of a dataset while it is made: its card, who works in it, and what a restart finds."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from saeforge.data.manifest import sha256_json, write_json
from saeforge.errors import ConfigError, DatasetError

CARD = "dataset.json"


class DatasetFolder:
    """A folder and its card (`dataset.json`).

    Args:
        root: the folder.
        identity: options that decide which bytes are written.

    Attributes:
        card: JSON values; `plan`, `model`, `tokenizer` and `runs` are added by the harvest.
        sha256: of the identity.
    """

    def __init__(self, root: Path, identity: dict[str, Any]) -> None:
        self.root = root
        self.identity = identity
        self.sha256 = sha256_json(identity)
        self.card: dict[str, Any] = {}

    @contextlib.contextmanager
    def claim(self, *, overwrite: bool) -> Iterator[None]:
        """Lock the folder, read or write its card, and hold it for the length of the harvest.

        Args:
            overwrite: remove a dataset of other options.

        Raises:
            ConfigError: another dataset or other files are in the way.
            DatasetError: another process is at work here.
        """
        self._refuse_strangers()
        fresh = not self.root.exists()
        self.root.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.root / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise DatasetError(
                    f"another harvest is writing to {self.root}; wait for it or choose another --out"
                ) from error
            self._read_card(overwrite=overwrite)
            yield
        except Exception:
            if fresh and "plan" not in self.card:  # nothing came of it: leave no trace of a mistyped command
                shutil.rmtree(self.root)
            raise
        finally:
            os.close(descriptor)

    def save(self, status: str) -> None:
        """Write the card."""
        self.card["status"] = status
        write_json(self.root / CARD, self.card)

    def mixed_versions(self) -> list[dict[str, str]]:
        """Return the versions of earlier runs that differ from the last one's."""
        runs = self.card["runs"]
        return [run for number, run in enumerate(runs[:-1]) if run != runs[-1] and run not in runs[:number]]

    def _refuse_strangers(self) -> None:
        """Never write among files that no harvest made."""
        if self.root.is_dir() and not (self.root / CARD).exists():
            others = sorted(path.name for path in self.root.iterdir() if path.name != ".lock")
            if others and not all(name.startswith(f"{CARD}.part-") for name in others):
                raise ConfigError(f"{self.root} holds other files ({others[0]}) and no dataset; choose another --out")
        elif self.root.exists() and not self.root.is_dir():
            raise ConfigError(f"{self.root} is a file; choose a folder as --out")

    def _read_card(self, *, overwrite: bool) -> None:
        path = self.root / CARD
        if path.exists():
            try:
                found = json.loads(path.read_bytes())
                options = found["config"]
            except (ValueError, KeyError, TypeError) as error:
                raise DatasetError(f"{path} is damaged; remove {self.root} or choose another --out") from error
            if found.get("config_sha256") == self.sha256:
                self.card = found
                return
            # A try that failed before its first bucket (a wrong path, too little text) is in nobody's way.
            begun = (self.root / "manifest.json").exists() or any((self.root / "index").glob("*.json"))
            if begun and not overwrite:
                different = sorted(k for k in {*options, *self.identity} if options.get(k) != self.identity.get(k))
                raise ConfigError(
                    f"{self.root} holds a dataset made with other options ({', '.join(different)} differ); "
                    "give --overwrite true to replace it, or another --out"
                )
            self._remove(found)
        self.card = {"format": "saeforge-acts", "config": self.identity, "config_sha256": self.sha256}
        self.save("harvesting")

    def _remove(self, card: dict[str, Any]) -> None:
        """Remove the files of a dataset, the manifest first, so that a crash leaves no false promise."""
        (self.root / "manifest.json").unlink(missing_ok=True)
        for name in ("index", "rows", "tokens", *card.get("folders", [])):
            inside = self.root / name
            if inside.is_dir() and inside.parent == self.root:
                shutil.rmtree(inside)


def available_memory() -> int:
    """Return the bytes of memory that can be used without swapping, within the limit of a container."""
    try:
        text = Path("/proc/meminfo").read_text()
        free = next(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        # Not Linux: half of what is installed.
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
    except (OSError, ValueError):
        return free  # no limit ("max"), or no control groups
    return min(free, max(limit - used, 0))
