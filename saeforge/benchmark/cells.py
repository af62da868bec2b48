"""Finished runs of a benchmark, saved one by one, so that the same command goes on after an interruption."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from saeforge.errors import ConfigError


class Cells:
    """Records in one JSON file.

    Args:
        path: of the file; made with the first record.
        header: what all records share; a file with another one is not gone on with.

    Raises:
        ConfigError: the file is damaged, or holds runs of another setting.
    """

    def __init__(self, path: str | Path, header: dict[str, Any]) -> None:
        self.path = Path(path)
        self.content: dict[str, Any] = {"header": header, "cells": []}
        if self.path.exists():
            try:
                self.content = json.loads(self.path.read_text())
                held = self.content["header"]
            except (ValueError, KeyError) as error:
                raise ConfigError(f"{self.path} is damaged ({error}); remove it or write elsewhere") from error
            wanted = json.loads(json.dumps(header))
            for key in wanted.keys() | held.keys():
                if held.get(key) != wanted.get(key):
                    raise ConfigError(
                        f"{self.path} holds runs with {key} = {held.get(key)}, this one has {wanted.get(key)}; "
                        "remove it or write elsewhere"
                    )

    def of(self, **key: Any) -> list[dict[str, Any]]:
        """Records with these values, in the order in which they were made."""
        cells: list[dict[str, Any]] = self.content["cells"]
        return [cell for cell in cells if all(cell[name] == value for name, value in key.items())]

    def add(self, record: dict[str, Any]) -> None:
        """Saves a record: under a temporary name, synced, then renamed."""
        self.content["cells"].append(record)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_name(f".{self.path.name}.part-{os.getpid()}")
        with part.open("w") as file:
            file.write(json.dumps(self.content, indent=1) + "\n")
            file.flush()
            os.fsync(file.fileno())
        part.replace(self.path)
