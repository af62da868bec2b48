"""Reads an offline wandb run back: the LevelDB-style log of protobuf records that `wandb sync` uploads."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

BLOCK, HEADER = 32768, 7


def records(file: Path) -> Iterator[Any]:
    """All records of a run's file."""
    data, position, parts = file.read_bytes(), HEADER, b""
    assert data[:4] in (b":W&B", b"")  # nothing yet
    while position + HEADER <= len(data):
        left = BLOCK - position % BLOCK
        if left < HEADER:  # too short for a header: padding
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + HEADER])
        parts += data[position + HEADER : position + HEADER + length]
        position += HEADER + length
        if position > len(data):
            return  # still being written
        if kind in (1, 4):  # a full record, or the last part of one
            record = wandb_internal_pb2.Record()  # type: ignore[attr-defined]  # generated without stubs
            record.ParseFromString(parts)
            parts = b""
            yield record


def each_run(run: Path, *, finished: bool) -> Iterator[tuple[Any, set[str], dict[str, Any]]]:
    """Of every offline run below RUN/wandb its record (name, group ...), the names in its history, and its config.

    Args:
        run: RUN folder.
        finished: wait for the last record of each, as wandb's service writes on after a run was finished.
    """
    for file in (run / "wandb").glob("offline-run-*/*.wandb"):
        end = time.monotonic() + 30
        while finished and not any(record.HasField("exit") for record in records(file)):
            assert time.monotonic() < end, f"{file} was never finished"
            time.sleep(0.05)
        about = None
        history: set[str] = set()
        config: dict[str, Any] = {}
        for record in records(file):
            if record.HasField("run"):
                about = record.run
            history |= {item.key or item.nested_key[0] for item in record.history.item}
            config |= {item.key: json.loads(item.value_json) for item in record.config.update}
        yield about, history, config


def contents(run: Path) -> tuple[set[str], dict[str, Any]]:
    """Names in the history of the only offline run, and its config."""
    ((_, history, config),) = each_run(run, finished=False)
    return history, config
