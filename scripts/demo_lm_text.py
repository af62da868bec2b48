"""Labelled text for the demo language model: reading it, holding documents out, and the batches of training.

A folder of labelled text holds `<label>.txt` files or `<label>/` folders of `.txt` files: UTF-8, passages separated by
a blank line. Other files are ignored.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from saeforge.errors import ConfigError, DatasetError

#: Characters of one document: about as many tokens as the model reads at once.
DOCUMENT_SIZE = 1000
#: Shorter passages and lines (headings, braces, copyright lines) may recur anywhere; longer ones count as copies.
COPY_SIZE = 60
#: A label is read at most this many times as often as the text as a whole.
MOST_REPEATED = 4.0
#: A sixth of English prose. No keywords of programming languages, no frequent words of other languages.
ENGLISH = frozenset("the of to that it be are this which you can was were has have its their they would should".split())
BLANK_LINE = re.compile(r"\n[ \t\r]*\n")


@dataclass(frozen=True)
class Document:
    """A run of neighbouring passages of one file."""

    label: str
    text: str
    held_out: bool


def read_documents(folders: Iterable[Path], held_out: float = 0.05) -> list[Document]:
    """The documents of labelled folders, without copies.

    A document is held out by the hash of its text, so that the choice stays the same when other text is added. A
    passage that stands under two labels is left out of both, a second copy under one label is left out, and so is a
    held-out document that is mostly made of lines that the training documents hold too. Where there is a label
    "english", English prose is left out of the others: untranslated passages, and comments that stand by themselves.

    Args:
        folders: Labelled folders; text under the same label in several folders is joined.
        held_out: Share of the documents that are held out, between 0 and 1.

    Raises:
        ConfigError: If a folder is missing, or a label has no training or no held-out document.
        DatasetError: If a file is not UTF-8.
    """
    grouped = [
        (label, passages, _share(label, passages) < held_out)
        for label, path in _label_files(folders)
        for passages in _group(_passages(path))
    ]
    labels_of: dict[str, set[str]] = {}
    for label, passages, _ in grouped:
        for passage in passages:
            labels_of.setdefault(_plain(passage), set()).add(label)

    with_english = any(label == "english" for label, _, _ in grouped)
    documents, seen = [], set()
    for label, passages, held in grouped:
        kept = []
        for passage in passages:
            plain = _plain(passage)
            if with_english and label != "english" and is_english(passage):
                continue
            if len(plain) >= COPY_SIZE:
                if plain in seen or len(labels_of[plain]) > 1:
                    continue
                seen.add(plain)
            kept.append(passage)
        if kept:
            documents.append(Document(label, "\n\n".join(kept), held))

    trained = {line for document in documents if not document.held_out for line in _long_lines(document.text)}
    documents = [document for document in documents if not (document.held_out and _is_copy(document.text, trained))]
    for label in sorted({document.label for document in documents}):
        sides = {document.held_out for document in documents if document.label == label}
        if len(sides) < 2:
            raise ConfigError(
                f"label '{label}' has too little text to hold {held_out:.0%} of its documents out: "
                f"expected at least 100 kB; add text, or remove the label"
            )
    return documents


def labels(documents: Iterable[Document]) -> list[str]:
    """The labels, sorted."""
    return sorted({document.label for document in documents})


def spread(documents: Sequence[Document], limit: int) -> list[Document]:
    """Of each label about `limit` bytes, in documents taken evenly from its text."""
    chosen = []
    for label in labels(documents):
        own = [document for document in documents if document.label == label]
        stride = max(1.0, sum(len(document.text.encode()) for document in own) / limit)
        chosen += [own[int(i * stride)] for i in range(max(1, int(len(own) / stride)))]
    return chosen


def fingerprint(documents: Iterable[Document]) -> str:
    """SHA-256 over labels, sides and texts, in order."""
    digest = hashlib.sha256()
    for document in documents:
        digest.update(f"{document.label}\0{document.held_out}\0{document.text}\0".encode())
    return digest.hexdigest()


def is_english(passage: str) -> bool:
    """Whether a passage is English prose; markup never is."""
    words = re.findall(r"\w+", passage.lower())
    return "</" not in passage and len(words) >= 6 and sum(word in ENGLISH for word in words) >= 0.12 * len(words)


def _label_files(folders: Iterable[Path]) -> list[tuple[str, Path]]:
    found = []
    for folder in folders:
        if not folder.is_dir():
            raise ConfigError(f"no folder {folder}: expected a folder of <label>.txt files or <label>/ folders")
        for path in sorted(folder.iterdir()):
            if path.is_dir():
                found += [(path.name, file) for file in sorted(path.rglob("*.txt"))]
            elif path.suffix == ".txt":
                found.append((path.stem, path))
    if not found:
        raise ConfigError(f"no text in {', '.join(map(str, folders))}: expected <label>.txt or <label>/*.txt")
    return found


def _passages(path: Path) -> Iterator[str]:
    """The passages of a file; one longer than a document is cut, at the end of a line or a word where it can be."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        problem = f"{error.reason} at byte {error.start}"
        raise DatasetError(f"{path} is not UTF-8 ({problem}): convert or remove it") from error
    for passage in BLANK_LINE.split(text):
        rest = passage.strip("\r\n")
        while len(rest) > DOCUMENT_SIZE:
            cut = max(rest.rfind("\n", DOCUMENT_SIZE // 2, DOCUMENT_SIZE), 0) or rest.rfind(" ", 1, DOCUMENT_SIZE)
            cut = cut if cut > 0 else DOCUMENT_SIZE
            yield rest[:cut]
            rest = rest[cut:].lstrip("\n")
        if rest.strip():
            yield rest


def _group(passages: Iterable[str]) -> Iterator[list[str]]:
    group: list[str] = []
    for passage in passages:
        if group and sum(map(len, group)) + len(passage) > DOCUMENT_SIZE:
            yield group
            group = []
        group.append(passage)
    if group:
        yield group


def _share(label: str, passages: list[str]) -> float:
    """Where the document stands between 0 and 1, by its hash."""
    digest = hashlib.sha256("\0".join([label, *passages]).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _plain(text: str) -> str:
    return " ".join(text.split())


def _long_lines(text: str) -> list[str]:
    return [plain for line in text.splitlines() if len(plain := _plain(line)) >= COPY_SIZE // 2]


def _is_copy(text: str, trained: set[str]) -> bool:
    lines = _long_lines(text)
    return sum(len(line) for line in lines if line in trained) > sum(map(len, lines)) / 2


class Sampler:
    """Batches of windows over each label's training documents; only the counters `used` are state.

    A label's share is its number of tokens to the power of `temperature`, capped by MOST_REPEATED. Its windows come
    without replacement, epoch by epoch, each epoch with another phase. Every second one is moved back to the beginning
    of a document: that is where a model begins that is given BOS.
    """

    def __init__(
        self, streams: dict[str, np.ndarray], *, bos: int, context: int, temperature: float, seed: int
    ) -> None:
        self.streams, self.context, self.seed = streams, context, seed
        self.used = dict.fromkeys(streams, 0)
        self.shares = label_shares([len(stream) for stream in streams.values()], temperature)
        self._starts = {label: np.flatnonzero(stream == bos) for label, stream in streams.items()}
        self._epochs: dict[str, tuple[int, np.ndarray]] = {}

    def batch(self, step: int, sequences: int) -> np.ndarray:
        """int64 [sequences, context + 1]; the same for the same step and counters."""
        names = list(self.streams)
        rng = np.random.default_rng([self.seed, 0, step])
        return np.stack([self._window(names[i]) for i in rng.choice(len(names), sequences, p=self.shares)])

    def _window(self, label: str) -> np.ndarray:
        stream = self.streams[label]
        epoch, index = divmod(self.used[label], -(-len(stream) // self.context))
        self.used[label] += 1
        start = self._epoch(label, epoch)[index]
        return stream.take(np.arange(start, start + self.context + 1), mode="wrap").astype(np.int64)

    def _epoch(self, label: str, epoch: int) -> np.ndarray:
        if self._epochs.get(label, (-1,))[0] != epoch:
            size, bos = len(self.streams[label]), self._starts[label]
            rng = np.random.default_rng([self.seed, 1 + list(self.streams).index(label), epoch])
            starts = np.arange(0, size, self.context)
            starts = rng.permutation((starts + rng.integers(self.context)) % size)
            at_bos = bos[np.searchsorted(bos, starts, side="right") - 1]
            self._epochs[label] = epoch, np.where(rng.random(len(starts)) < 0.5, at_bos, starts)
        return self._epochs[label][1]


def label_shares(sizes: Sequence[int], temperature: float) -> np.ndarray:
    """The share of each label in a batch, from its number of tokens."""
    tokens = np.asarray(sizes, dtype=float)
    limit = MOST_REPEATED * tokens / tokens.sum()
    shares = tokens**temperature / (tokens**temperature).sum()
    while (over := shares > limit * (1 + 1e-9)).any():  # what is cut goes to the others
        capped = over | np.isclose(shares, limit)
        shares[capped] = limit[capped]
        shares[~capped] *= (1 - shares[capped].sum()) / shares[~capped].sum()
    return shares
