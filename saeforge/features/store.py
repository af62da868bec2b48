"""`FeatureStore`: what `saeforge features build` found, read from RUN/features.sqlite."""

from __future__ import annotations

import json
import re
import sqlite3
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from saeforge.errors import ConfigError, DatasetError
from saeforge.features.schema import FORMAT, FORMAT_VERSION, Label, unpack_window, write_labels

STORE_FILE = "features.sqlite"
SAE_FILE = "sae.json"  # as in saeforge.sae, which would load torch only to show a latent
COLUMNS = ("latent", "count", "density", "mean", "max", "p99", "documents")


@dataclass(frozen=True)
class Feature:
    """Statistics of one latent.

    Attributes:
        count: tokens on which it is active (value != 0).
        density: count over all tokens read.
        mean, max: of the non-zeros. p99: their 99th percentile, within 1/32.
        documents: in how many documents it fires.
        histogram: exponent e -> activations from 2^e to 2^(e + 1).
        labels: (source, label, score, detail), best first.
    """

    latent: int
    count: int
    density: float
    mean: float
    max: float
    p99: float
    documents: int
    histogram: dict[int, int]
    labels: list[dict[str, Any]]


@dataclass(frozen=True)
class Example:
    """One activation of a latent, in its text.

    Attributes:
        kind: "top", or "range" for a sample.
        range: -1 for "top"; else 0 for the octave of the maximum, 1 for the one below, ...; the last holds the rest.
        rank: from 0.
        value: the activation.
        document: its name. label, split: of the document.
        position: of the token in its document.
        tokens: text of each token of the window.
        values: activation of each token of the window; None where none is stored.
        centre: index of the token with this activation.
    """

    latent: int
    kind: str
    range: int
    rank: int
    value: float
    document: str
    label: str | None
    split: str | None
    position: int
    tokens: list[str]
    values: list[float | None]
    centre: int


@dataclass(frozen=True)
class Hit:
    """A latent that a search found, with where the words stand (marked by ⟦ and ⟧)."""

    latent: int
    score: float
    labels: str
    snippet: str


class FeatureStore:
    """The features of a run; a context manager.

    Usage:
        store = FeatureStore.open("runs/quickstart")
        store.latent(123).density
        for example in store.top(123):
            print(example.value, "".join(example.tokens))
        store.search("def __init__")
    """

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        """Use `open`."""
        self.path = path
        self._db = connection
        self.meta: dict[str, Any] = {
            key: json.loads(value) for key, value in self._db.execute("SELECT key, value FROM meta")
        }
        self.d_sae = int(self.meta["d_sae"])

    @classmethod
    def open(cls, run: str | Path) -> FeatureStore:
        """Open the features of a RUN.

        Raises:
            DatasetError: not built, damaged, of a newer version, or of another SAE than the run's.
        """
        run = Path(run)
        path = run / STORE_FILE
        if not run.is_dir():
            raise DatasetError(f"{run} does not exist; expected a RUN folder (runs/<name>)")
        if not path.is_file():
            unfinished = progress_file(run).is_file()
            state = "is not finished; the same command goes on" if unfinished else "is not there"
            raise DatasetError(f"{path} {state}: saeforge features build {run}")
        connection = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)
        try:
            store = cls(path, connection)
            store._check_meta(run)
        except (sqlite3.DatabaseError, KeyError, ValueError) as error:
            connection.close()
            raise DatasetError(f"{path} is damaged ({error}); build it again with --overwrite") from error
        except DatasetError:
            connection.close()
            raise
        return store

    def _check_meta(self, run: Path) -> None:
        version = self.meta["format_version"]
        if self.meta["format"] != FORMAT or not isinstance(version, int):
            raise DatasetError(f"{self.path} is not a store of features; build it again with --overwrite")
        if version > FORMAT_VERSION:
            raise DatasetError(
                f"{self.path} has format {version}, this saeforge reads up to {FORMAT_VERSION}; upgrade it"
            )
        if sae_digest(run) not in (None, self.meta["sae_digest"]):
            raise DatasetError(
                f"{self.path} belongs to another SAE than the one in {run}: saeforge features build {run} --overwrite"
            )

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def __enter__(self) -> FeatureStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def latent(self, latent: int) -> Feature:
        """Return the statistics of a latent.

        Raises:
            ConfigError: there is no such latent.
        """
        self._check(latent)
        (row,) = self._query(f"SELECT {', '.join(COLUMNS)}, histogram FROM latents WHERE latent = ?", (latent,))
        labels = self._query(
            "SELECT source, label, score, detail FROM labels WHERE latent = ? ORDER BY score DESC, source, label",
            (latent,),
        )
        histogram = {int(octave): count for octave, count in json.loads(row[-1]).items()}
        found = [
            {"source": source, "label": label, "score": score, "detail": json.loads(detail) if detail else None}
            for source, label, score, detail in labels
        ]
        values: dict[str, Any] = dict(zip(COLUMNS, row[:-1], strict=True))
        return Feature(**values, histogram=histogram, labels=found)

    def top(self, latent: int, n: int = 20) -> list[Example]:
        """Return the strongest contexts of a latent, at most one of each segment, strongest first."""
        return self._examples(latent, "top", min(n, int(self.meta["examples"])))

    def samples(self, latent: int) -> list[list[Example]]:
        """Return random activations of a latent by range: of the octave of its maximum, of the one below, ..."""
        ranges: list[list[Example]] = [[] for _ in range(int(self.meta["ranges"]))]
        for example in self._examples(latent, "range", -1):
            ranges[example.range].append(example)
        return ranges

    def search(self, query: str, limit: int = 20) -> list[Hit]:
        """Return the latents that fire around these words, or are labelled with them, best first.

        Args:
            query: words, all of which must occur; "words in quotes" stand side by side. Labels count most, then the
                words on which a latent fires, then those around them.
            limit: most latents to return.

        Raises:
            ConfigError: no word in the query.
        """
        found = self._query(
            "SELECT rowid, -bm25(search, 10.0, 5.0, 1.0) AS score, labels, snippet(search, -1, '⟦', '⟧', '…', 24) "
            "FROM search WHERE search MATCH ? ORDER BY score DESC, rowid LIMIT ?",
            (_fts_query(query), min(limit, self.d_sae)),
        )
        return [Hit(*row) for row in found]

    def ranked(self, sort: str = "density", limit: int = 20) -> list[Feature]:
        """Return the latents that come first by a column; never-firing ones are left out.

        Raises:
            ConfigError: no such column.
        """
        if sort not in COLUMNS:
            raise ConfigError(f"sort {sort!r}: expected one of {', '.join(COLUMNS)}")
        order = "latent" if sort == "latent" else f"{sort} DESC, latent"
        rows = self._query(
            f"SELECT latent FROM latents WHERE count > 0 ORDER BY {order} LIMIT ?", (min(limit, self.d_sae),)
        )
        return [self.latent(latent) for (latent,) in rows]

    def labelled(self) -> list[tuple[int, str]]:
        """Return the latents that have labels, best score first: for each label of each source its best one."""
        rows = self._query("SELECT latent, source, label FROM labels ORDER BY score DESC, source, label, latent")
        best: dict[tuple[str, str], int] = {}
        for latent, source, label in rows:
            best.setdefault((source, label), latent)
        return [(latent, label) for (_, label), latent in best.items()]

    def column(self, name: str) -> np.ndarray:
        """Return a column of all latents, float64 (d_sae,).

        Raises:
            ConfigError: no such column.
        """
        if name not in COLUMNS:
            raise ConfigError(f"column {name!r}: expected one of {', '.join(COLUMNS)}")
        rows = self._query(f"SELECT {name} FROM latents ORDER BY latent")
        return np.array([value for (value,) in rows], dtype=np.float64)

    def add_labels(self, source: str, rows: Iterable[Label | tuple[int, str, float | None]]) -> None:
        """Store labels, in place of all that this source gave before.

        Args:
            source: who says so, for example "concepts".
            rows: (latent, label, score) or `Label`.

        Raises:
            ConfigError: a latent that the SAE does not have.
            DatasetError: the file cannot be written.
        """
        labels = [Label(*row) for row in rows]
        for label in labels:
            self._check(label.latent)
        try:
            connection = sqlite3.connect(self.path, timeout=30)
            try:
                with connection:
                    write_labels(connection, source, labels)
            finally:
                connection.close()
        except sqlite3.OperationalError as error:
            raise DatasetError(f"could not write labels to {self.path} ({error}); free space and try again") from error

    def _query(self, sql: str, values: tuple[Any, ...] = ()) -> list[Any]:
        """Return all rows of a query.

        Raises:
            DatasetError: the file is damaged.
        """
        try:
            return self._db.execute(sql, values).fetchall()
        except sqlite3.DatabaseError as error:
            raise DatasetError(f"{self.path} is damaged ({error}); build it again with --overwrite") from error

    def _check(self, latent: int) -> None:
        if not 0 <= latent < self.d_sae:
            raise ConfigError(f"there is no latent {latent}: this SAE has {self.d_sae:,}, 0 to {self.d_sae - 1}")

    def _examples(self, latent: int, kind: str, limit: int) -> list[Example]:
        self._check(latent)
        names = ("range", "rank", "value", "document", "label", "split", "position")
        rows = self._query(
            "SELECT range, rank, value, name, label, split, position, window FROM examples "
            "LEFT JOIN documents ON documents.id = document WHERE latent = ? AND kind = ? ORDER BY range, rank LIMIT ?",
            (latent, kind, limit),
        )
        examples = []
        for *row, window in rows:
            values: dict[str, Any] = dict(zip(names, row, strict=True))
            try:
                tokens, activations, centre = unpack_window(window)
            except (zlib.error, ValueError, KeyError) as error:
                raise DatasetError(f"{self.path} is damaged ({error}); build it again with --overwrite") from error
            examples.append(Example(latent, kind, **values, tokens=tokens, values=activations, centre=centre))
        return examples


def progress_file(run: Path) -> Path:
    """Return where an unfinished build keeps what it has."""
    return run / f".{STORE_FILE}.progress.npz"


def sae_digest(run: Path) -> str | None:
    """Return what tells a run's SAE from others at a glance, or None if the folder holds no SAE."""
    for folder in (run / "sae", run):
        if (folder / SAE_FILE).is_file():
            return str(json.loads((folder / SAE_FILE).read_text()).get("vectors_sha256"))
    return None


def _fts_query(query: str) -> str:
    """Return a query that FTS5 understands whatever was typed: each word quoted, what has no letter or digit left out.

    Raises:
        ConfigError: no word is left.
    """
    words = [quoted or plain for quoted, plain in re.findall(r'"([^"]*)"|([^\s"]+)', query.replace("\0", " "))]
    words = [word for word in words if any(char.isalnum() for char in word)]
    if not words:
        raise ConfigError(f"nothing to search for in {query!r}: give at least one word with a letter or digit")
    return " ".join(f'"{word}"' for word in words)
