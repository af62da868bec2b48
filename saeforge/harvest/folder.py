"""The folder of a dataset while it is made: its card, who works in it, and what a restart finds.

Several processes may work in one folder, on one host or many. Each holds a share of `.lock` for as long as it harvests
(so that nobody replaces the dataset under it), `.claims/alone` while it prepares, edits the card or writes the
manifest, and `.claims/<split>-<bucket>` while it makes a bucket.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from saeforge.data.manifest import sha256_json, write_json
from saeforge.errors import ConfigError, DatasetError
from saeforge.harvest.locks import take

CARD = "dataset.json"
LOCK = ".lock"
CLAIMS = ".claims"
PATIENCE = 1.0


class DatasetFolder:
    """A folder and its card (`dataset.json`).

    Args:
        root: the folder.
        identity: options that decide which bytes are written.

    Attributes:
        card: JSON values; `plan`, `model`, `tokenizer` and `runs` are added by the harvest.
        sha256: of the identity.

    Raises:
        ConfigError: the folder holds other files, or is a file.
    """

    def __init__(self, root: Path, identity: dict[str, Any]) -> None:
        self.root = root
        self.identity = identity
        self.sha256 = sha256_json(identity)
        self.card: dict[str, Any] = {}
        self._fresh = False
        self._refuse_strangers()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Be the only process that prepares, edits the card or writes the manifest; wait while another one is."""
        descriptor = self._wait_to_be_alone()
        try:
            yield
        except Exception:
            if self._fresh and "plan" not in self.card:  # nothing came of it: leave no trace of a mistyped command
                shutil.rmtree(self.root, ignore_errors=True)  # another process may just be coming in
            raise
        finally:
            os.close(descriptor)

    @contextlib.contextmanager
    def joined(self, *, overwrite: bool) -> Iterator[None]:
        """Read or write the card, and hold a share of the folder. To be entered alone.

        Args:
            overwrite: remove a dataset of other options.

        Raises:
            ConfigError: another dataset is in the way.
            DatasetError: other processes are at work on it.
        """
        sole = take(self.root / LOCK)
        descriptor = take(self.root / LOCK, shared=True) if sole is None else sole
        if descriptor is None:
            raise self._busy()
        try:
            self._read_card(overwrite=overwrite, sole=sole is not None)
            fcntl.flock(descriptor, fcntl.LOCK_SH)  # nobody can take it in between, as nobody else is here
            yield
        finally:
            os.close(descriptor)

    @contextlib.contextmanager
    def claim(self, split: str, bucket: int) -> Iterator[bool]:
        """Be the only process that makes a bucket; whoever gets its claim must look whether it is there already.

        Yields:
            Whether this process has the claim, or another one that is alive.
        """
        path = self.root / CLAIMS / f"{split}-{bucket:06d}"
        descriptor = take(path)
        if descriptor is None:
            yield False
            return
        try:
            yield True
            path.unlink(missing_ok=True)  # from now on the record speaks for the bucket
        finally:
            os.close(descriptor)

    def save(self, status: str) -> None:
        """Write the card."""
        self.card["status"] = status
        write_json(self.root / CARD, self.card)

    def reread(self) -> None:
        """Read the card again, which other processes may have edited."""
        self.card = json.loads((self.root / CARD).read_bytes())

    def register(self, versions: dict[str, str]) -> None:
        """Add this run's versions to the card: `runs` holds each set of versions once, that of the last run last."""
        self.card["runs"] = [*(run for run in self.card.get("runs", []) if run != versions), versions]

    def remove_parts(self) -> None:
        """Remove what a killed process left of files that are written alone."""
        for folder in (self.root, self.root / "tokens"):
            for stale in folder.glob("*.part-*"):
                stale.unlink(missing_ok=True)

    def _refuse_strangers(self) -> None:
        """Never write among files that no harvest made."""
        if self.root.is_dir() and not (self.root / CARD).exists():
            others = sorted(path.name for path in self.root.iterdir() if path.name not in (LOCK, CLAIMS))
            if others and not all(name.startswith(f"{CARD}.part-") for name in others):
                raise ConfigError(f"{self.root} holds other files ({others[0]}) and no dataset; choose another --out")
        elif self.root.exists() and not self.root.is_dir():
            raise ConfigError(f"{self.root} is a file; choose a folder as --out")

    def _wait_to_be_alone(self) -> int:
        """Return the descriptor of the lock, in a folder that is there."""
        patient_until = time.monotonic() + PATIENCE
        said = False
        while True:
            self._fresh = not self.root.exists()
            try:
                (self.root / CLAIMS).mkdir(parents=True, exist_ok=True)
                descriptor = take(self.root / CLAIMS / "alone", wait=said)
            except FileNotFoundError:
                continue  # who made the folder failed, and removed it
            if descriptor is not None:
                return descriptor
            if time.monotonic() < patient_until:  # most of what is done alone is done at once
                time.sleep(0.05)
                continue
            print(f"harvest: waiting for the process that prepares {self.root}", file=sys.stderr, flush=True)
            said = True

    def _busy(self) -> DatasetError:
        return DatasetError(f"another harvest is writing to {self.root}; wait for it or choose another --out")

    def _read_card(self, *, overwrite: bool, sole: bool) -> None:
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
            if not sole:
                raise self._busy()
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
