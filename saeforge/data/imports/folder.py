"""The folder that an import writes to: its card, and who works in it."""

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


@contextlib.contextmanager
def claim(
    root: Path, identity: dict[str, Any], plan: dict[str, Any], modified: dict[str, int], *, overwrite: bool
) -> Iterator[dict[str, Any]]:
    """Lock the folder, check or write its card, and hold it while the import runs."""
    card_path = root / CARD
    if root.exists() and not root.is_dir():
        raise ConfigError(f"{root} is a file; choose a folder as --out")
    if root.is_dir() and not card_path.exists():
        strangers = sorted(path.name for path in root.iterdir() if not path.name.startswith((".lock", f"{CARD}.part-")))
        if strangers:
            raise ConfigError(f"{root} holds other files ({strangers[0]}) and no dataset; choose another --out")
    root.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(root / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DatasetError(f"another process is writing to {root}; wait for it or choose another --out") from error
        card = {
            "format": "saeforge-acts",
            "config": identity,
            "config_sha256": sha256_json(identity),
            "folders": [identity["site"]["id"].replace(":", ".")],
            "model": {"name": identity["model"]} if identity["model"] else {},
            "plan": plan,
            "modified": modified,
        }
        if card_path.exists():
            try:
                found = json.loads(card_path.read_bytes())
                options = dict(found["config"])
            except (ValueError, KeyError, TypeError) as error:
                raise DatasetError(f"{card_path} is damaged; remove {root} or choose another --out") from error
            other = sorted(k for k in {*options, *identity} if options.get(k) != identity.get(k))
            if overwrite and found.get("modified") != modified:
                other.append("the files' times")
            begun = (root / "manifest.json").exists() or any((root / "index").glob("*.json"))
            if other and begun and not overwrite:
                raise ConfigError(
                    f"{root} holds a dataset made with other options or sources ({', '.join(other)}); give --overwrite "
                    "true to replace it, or another --out"
                )
            if other:
                (root / "manifest.json").unlink(missing_ok=True)  # first, so that a crash leaves no false promise
                for name in ("index", "rows", "tokens", *found.get("folders", [])):
                    inside = root / name
                    if inside.is_dir() and inside.parent == root:
                        shutil.rmtree(inside)
            elif begun:
                card["modified"] = found.get("modified")
        if not (root / "manifest.json").exists():
            write_json(card_path, {**card, "status": "importing"})
        yield card
    finally:
        os.close(descriptor)
