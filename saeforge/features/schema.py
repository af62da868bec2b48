"""The tables of `features.sqlite` and how they are written (docs/features-schema.md)."""

from __future__ import annotations

import json
import sqlite3
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

FORMAT = "saeforge-features"
FORMAT_VERSION = 1
COMPATIBILITY = "readers of version N read versions 1 to N and ignore unknown tables, columns and keys"

TABLES = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE latents (
    latent INTEGER PRIMARY KEY,
    count INTEGER NOT NULL,
    density REAL NOT NULL,
    mean REAL NOT NULL,
    max REAL NOT NULL,
    p99 REAL NOT NULL,
    documents INTEGER NOT NULL,
    histogram TEXT NOT NULL
);
CREATE TABLE examples (
    latent INTEGER NOT NULL,
    kind TEXT NOT NULL,
    range INTEGER NOT NULL,
    rank INTEGER NOT NULL,
    value REAL NOT NULL,
    document INTEGER NOT NULL,
    position INTEGER NOT NULL,
    window BLOB NOT NULL,
    PRIMARY KEY (latent, kind, range, rank)
) WITHOUT ROWID;
CREATE TABLE documents (id INTEGER PRIMARY KEY, name TEXT NOT NULL, label TEXT, split TEXT);
CREATE TABLE labels (
    latent INTEGER NOT NULL,
    label TEXT NOT NULL,
    source TEXT NOT NULL,
    score REAL,
    detail TEXT,
    PRIMARY KEY (source, latent, label)
) WITHOUT ROWID;
CREATE INDEX labels_of_latent ON labels (latent);
CREATE VIRTUAL TABLE search USING fts5 (labels, words, contexts);
"""


class Label(NamedTuple):
    """What a latent is said to be.

    Attributes:
        latent: its number.
        label: the words.
        score: how sure, in the source's own measure, or None.
        detail: plain JSON values that the source wants to keep, or None.
    """

    latent: int
    label: str
    score: float | None = None
    detail: dict[str, Any] | None = None


def pack_window(tokens: Sequence[str], values: Sequence[float | None], centre: int) -> bytes:
    """Return the stored form of a window: zlib over JSON.

    Args:
        tokens: text of each token.
        values: activation of each token; None where none is stored.
        centre: index of the token that the example is about.
    """
    text = json.dumps({"tokens": tokens, "values": values, "centre": centre}, ensure_ascii=False, separators=(",", ":"))
    return zlib.compress(text.encode("utf-8", "surrogatepass"), 3)


def unpack_window(blob: bytes) -> tuple[list[str], list[float | None], int]:
    """Return tokens, values and centre of a stored window."""
    content = json.loads(zlib.decompress(blob).decode("utf-8", "surrogatepass"))
    return content["tokens"], content["values"], content["centre"]


def create(path: Path) -> sqlite3.Connection:
    """Create an empty store; it is nothing until it is renamed, so that speed goes before safety here."""
    connection = sqlite3.connect(path)
    connection.executescript("PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF;" + TABLES)
    return connection


def write_labels(connection: sqlite3.Connection, source: str, labels: Iterable[Label]) -> None:
    """Replace all labels of a source, and what is found by them."""
    connection.execute("DELETE FROM labels WHERE source = ?", (source,))
    connection.executemany(
        "INSERT OR REPLACE INTO labels (latent, label, source, score, detail) VALUES (?, ?, ?, ?, ?)",
        (
            (x.latent, x.label, source, x.score, None if x.detail is None else json.dumps(x.detail, allow_nan=False))
            for x in labels
        ),
    )
    connection.execute(
        "UPDATE search SET labels = (SELECT coalesce(group_concat(label, ' | '), '') FROM labels "
        "WHERE labels.latent = search.rowid) WHERE labels != '' OR rowid IN (SELECT latent FROM labels)"
    )
