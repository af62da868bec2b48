"""Writing a store: from arrays of pointers and windows to one SQLite file, renamed when it is complete."""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from saeforge.data.manifest import fsync_folder
from saeforge.errors import DatasetError
from saeforge.features import schema
from saeforge.features.aggregate import LOWEST_OCTAVE, RANGES, Aggregate, unpack_keys
from saeforge.features.pieces import Pieces
from saeforge.features.schema import Label
from saeforge.features.sources import RowSource
from saeforge.features.store import STORE_FILE
from saeforge.features.windows import REACH, Windows

SLACK = 4  # tokens beside a window that are decoded with it, for characters that its borders cut
LATENTS_AT_ONCE = 256


def write_store(
    folder: Path,
    aggregate: Aggregate,
    examples: dict[str, np.ndarray],
    windows: Windows,
    source: RowSource,
    meta: dict[str, Any],
    on_progress: Callable[[int, int], None],
) -> Path:
    """Write `features.sqlite`; labels of a store that it replaces are kept if they are of the same SAE.

    Args:
        folder: RUN.
        aggregate: statistics of all latents.
        examples: from `Aggregate.examples`.
        windows: of these examples.
        source: what was read.
        meta: what the table `meta` says beside the format.
        on_progress: called with (latents done, in all).

    Raises:
        DatasetError: the disk refused.
    """
    path = folder / STORE_FILE
    part = path.with_name(f".{path.name}.part-{os.getpid()}")
    part.unlink(missing_ok=True)
    try:
        connection = schema.create(part)
        try:
            labels = _labels_of(path, str(meta["identity"]["sae"]))
            _write_tables(connection, aggregate, examples, windows, source, meta, labels, on_progress)
            connection.commit()
        finally:
            connection.close()
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(path)
        fsync_folder(folder)
    except sqlite3.OperationalError as error:
        raise DatasetError(f"could not write {path} ({error}); free space, then the same command goes on") from error
    finally:
        part.unlink(missing_ok=True)
    return path


def _write_tables(
    connection: sqlite3.Connection,
    aggregate: Aggregate,
    examples: dict[str, np.ndarray],
    windows: Windows,
    source: RowSource,
    meta: dict[str, Any],
    labels: dict[str, list[Label]],
    on_progress: Callable[[int, int], None],
) -> None:
    content = {
        "format": schema.FORMAT,
        "format_version": schema.FORMAT_VERSION,
        "compatibility": schema.COMPATIBILITY,
        "d_sae": aggregate.d_sae,
        "ranges": RANGES,
        "reach": REACH,
        "examples": len(examples["latent"]),
        "documents_exact": aggregate.documents_exact,
        **meta,
    }
    connection.executemany(
        "INSERT INTO meta VALUES (?, ?)",
        [(key, json.dumps(value, ensure_ascii=False, allow_nan=False)) for key, value in content.items()],
    )
    connection.executemany(
        "INSERT INTO documents VALUES (?, ?, ?, ?)", [(d.id, d.name, d.label, d.split) for d in source.documents]
    )
    columns = (
        np.arange(aggregate.d_sae),
        aggregate.count,
        aggregate.count / max(aggregate.rows, 1),
        aggregate.mean(),
        aggregate.largest.astype(np.float64),
        aggregate.quantile(0.99),
        aggregate.documents(),
    )
    histograms = [
        json.dumps({int(e) + LOWEST_OCTAVE: int(line[e]) for e in np.flatnonzero(line)}) for line in aggregate.octaves()
    ]
    connection.executemany(
        "INSERT INTO latents VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        zip(*(column.tolist() for column in columns), histograms, strict=True),
    )
    starts = np.searchsorted(examples["latent"], np.arange(aggregate.d_sae + 1))
    pieces = Pieces(source.tokenizer)
    for first in range(0, aggregate.d_sae, LATENTS_AT_ONCE):
        last = min(first + LATENTS_AT_ONCE, aggregate.d_sae)
        _write_examples(connection, examples, windows, source, pieces, int(starts[first]), int(starts[last]))
        on_progress(last, aggregate.d_sae)
    # The silent ones have no text, but may have labels from elsewhere.
    connection.execute(
        "INSERT INTO search (rowid, labels, words, contexts) SELECT latent, '', '', '' FROM latents WHERE count = 0"
    )
    for name, rows in labels.items():
        schema.write_labels(connection, name, rows)


def _write_examples(
    connection: sqlite3.Connection,
    examples: dict[str, np.ndarray],
    windows: Windows,
    source: RowSource,
    pieces: Pieces,
    first: int,
    last: int,
) -> None:
    """Write the examples of some latents, and for each of these latents the text by which it is found."""
    rows: list[tuple[Any, ...]] = []
    texts: dict[int, tuple[list[str], list[str]]] = {}
    documents, positions = unpack_keys(examples["key"][first:last])
    columns = [examples[name][first:last].tolist() for name in ("latent", "range", "rank", "value")]
    places = [column[first:last].tolist() for column in (windows.segment, windows.position, windows.length)]
    offsets = (windows.offsets[first : last + 1] - windows.offsets[first]).tolist()
    activations = _short(windows.values[windows.offsets[first] : windows.offsets[last]])
    for latent, kind, rank, value, document, position, segment, start, length, offset in zip(
        *columns, documents.tolist(), positions.tolist(), *places, offsets[:-1], strict=True
    ):
        before, behind = source.tokens.slack(segment, start, length, SLACK)
        ids = source.tokens.tokens(segment, start - before, before + length + behind)
        tokens = pieces(ids)[before : before + length]
        centre = position - start
        window = schema.pack_window(tokens, activations[offset : offset + length], centre)
        rows.append((latent, "top" if kind < 0 else "range", kind, rank, value, document, position, window))
        if kind < 0:
            words, contexts = texts.setdefault(latent, ([], []))
            words.append(_word(tokens, centre))
            contexts.append("".join(tokens))
    connection.executemany("INSERT INTO examples VALUES (?, ?, ?, ?, ?, ?, ?, ?)", rows)
    connection.executemany(
        "INSERT INTO search (rowid, labels, words, contexts) VALUES (?, '', ?, ?)",
        [(latent, _clean(" ".join(words)), _clean("\n".join(contexts))) for latent, (words, contexts) in texts.items()],
    )


def _short(values: np.ndarray) -> list[float | None]:
    """Return activations with six digits, and None for NaN: more digits would only make the file larger."""
    result: list[float | None] = [0] * len(values)
    known = np.flatnonzero((values != 0) & ~np.isnan(values))
    exact = values[known].astype(np.float64)
    scale = 10.0 ** (5 - np.floor(np.log10(np.abs(exact))))
    for place, value in zip(known.tolist(), (np.round(exact * scale) / scale).tolist(), strict=True):
        result[place] = value
    for place in np.flatnonzero(np.isnan(values)).tolist():
        result[place] = None
    return result


def _word(tokens: list[str], centre: int) -> str:
    """Return the word that a token is part of: up to the spaces to both sides."""
    before = "".join(tokens[: centre + 1])
    left = before.rstrip()
    start = max(left.rfind(space) for space in " \n\t\r") + 1
    return (before[start:] + "".join(tokens[centre + 1 :])).split(maxsplit=1)[0] if left else before.strip()


def _clean(text: str) -> str:
    """Return text that SQLite can store: no lone surrogates, which no UTF-8 has."""
    return text.encode("utf-8", "replace").decode()


def _labels_of(path: Path, sae: str) -> dict[str, list[Label]]:
    """Return the labels of the store that is about to be replaced, unless they are of another SAE."""
    if not path.is_file():
        return {}
    connection = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)
    try:
        (identity,) = connection.execute("SELECT value FROM meta WHERE key = 'identity'").fetchone()
        if json.loads(identity)["sae"] != sae:
            return {}
        labels: dict[str, list[Label]] = {}
        for source, latent, label, score, detail in connection.execute(
            "SELECT source, latent, label, score, detail FROM labels"
        ):
            labels.setdefault(source, []).append(Label(latent, label, score, json.loads(detail) if detail else None))
        return labels
    except (sqlite3.DatabaseError, TypeError, KeyError, ValueError):
        return {}  # a damaged store has nothing to keep: that is why it is replaced
    finally:
        connection.close()
