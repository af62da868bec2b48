"""Labelled documents for the concept table: where they come from, their two halves, which label against which."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from saeforge.errors import ConfigError
from saeforge.lm.text import Document, open_text, read_passages

MIN_DOCUMENTS = 8  # of a label in a half: with fewer, an interval over documents says nothing


@dataclass(frozen=True)
class LabelledTexts:
    """Documents with labels, in two halves: latents are chosen on `train` and judged on the rest.

    Attributes:
        texts: documents.
        names: of the documents.
        labels: names of the labels, sorted.
        label: int (documents,), index into `labels`.
        train: bool (documents,).
        source: what was opened.
        split_by: "documents" if they said it themselves, "hash" if it was drawn here.
        duplicates: documents left out because another one has the same text.
        shuffled: seed with which the labels were shuffled, or None.
    """

    texts: tuple[str, ...]
    names: tuple[str, ...]
    labels: tuple[str, ...]
    label: np.ndarray
    train: np.ndarray
    source: str
    split_by: str
    duplicates: int
    shuffled: int | None = None

    def shuffle(self, seed: int) -> LabelledTexts:
        """Permute the labels over the documents of each half: what is found then is chance."""
        rng = np.random.default_rng(seed)
        label = self.label.copy()
        for half in (self.train, ~self.train):
            label[half] = rng.permutation(label[half])
        return replace(self, label=label, shuffled=seed)

    def used_by(self, comparisons: Sequence[Comparison]) -> LabelledTexts:
        """The documents that comparisons need; labels keep their numbers.

        Raises:
            ConfigError: a label has too few documents in a half.
        """
        needed = sorted({label for one in comparisons for label in (one.label, *one.against)})
        keep = np.isin(self.label, needed)
        chosen = np.flatnonzero(keep).tolist()
        result = replace(
            self,
            texts=tuple(self.texts[i] for i in chosen),
            names=tuple(self.names[i] for i in chosen),
            label=self.label[keep],
            train=self.train[keep],
        )
        for name, halves in result.counts().items():
            for half, count in halves.items():
                if count < MIN_DOCUMENTS:
                    raise ConfigError(
                        f"texts {self.source}: label {name!r} has {count} different {half} documents, at least "
                        f"{MIN_DOCUMENTS} are needed; add some, or leave the label out"
                    )
        return result

    def counts(self) -> dict[str, dict[str, int]]:
        """Documents of each label in each half."""
        return {
            self.labels[i]: {
                "train": int(np.count_nonzero(self.train & (self.label == i))),
                "test": int(np.count_nonzero(~self.train & (self.label == i))),
            }
            for i in np.unique(self.label).tolist()
        }


@dataclass(frozen=True)
class Comparison:
    """A label against others.

    Attributes:
        label: index of the label.
        against: indices of the others.
    """

    label: int
    against: tuple[int, ...]

    def members(self, label: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which documents are positive and which negative, given the label of each."""
        return label == self.label, np.isin(label, self.against)


def read_labelled(texts: str | Sequence[Document], *, seed: int = 0) -> LabelledTexts:
    """Read documents with labels and split them in two halves.

    Args:
        texts: "demo" for the passages that ship with saeforge, a folder (the label is the subfolder), a `.jsonl` file
            (fields text, label and if wanted split, name), or documents.
        seed: of the split, where documents do not say theirs: within each label they are ordered by a hash of seed and
            text, and every other one is train.

    Raises:
        ConfigError: no labels or only one, an empty document, a split for some documents only, one text with two labels
            or in both halves.
    """
    if not isinstance(texts, str):
        source, found = "documents", list(texts)
    elif texts == "demo":
        source, found = "demo", read_passages()
    else:
        opened = open_text(texts)
        source, found = texts, [opened[i] for i in range(len(opened))]
    without = sum(document.label is None for document in found)
    if without:
        raise ConfigError(
            f"texts {source}: {without:,} of {len(found):,} documents have no label; give each a field `label`, or use "
            "one subfolder per label"
        )
    empty = [document.name for document in found if not document.text.strip()]
    if empty:
        raise ConfigError(f"texts {source}: {empty[0]} is empty; remove it")
    given = sum(document.split is not None for document in found)
    if given not in (0, len(found)):
        raise ConfigError(
            f"texts {source}: {given:,} of {len(found):,} documents have a split; give one to all of them or to none"
        )
    first: dict[str, Document] = {}
    for document in found:
        other = first.setdefault(document.text, document)
        if (other.label, other.split) != (document.label, document.split):
            raise ConfigError(
                f"texts {source}: {other.name} ({other.label}, {other.split}) and {document.name} ({document.label}, "
                f"{document.split}) are the same text; keep one of them"
            )
    kept = list(first.values())
    labels = tuple(sorted({str(document.label) for document in kept}))
    label = np.array([labels.index(str(document.label)) for document in kept], dtype=np.int32)
    train = np.array([document.split == "train" for document in kept]) if given else _halve(kept, label, seed)
    result = LabelledTexts(
        texts=tuple(document.text for document in kept),
        names=tuple(document.name for document in kept),
        labels=labels,
        label=label,
        train=train,
        source=source,
        split_by="documents" if given else "hash",
        duplicates=len(found) - len(kept),
    )
    if len(labels) < 2:
        raise ConfigError(
            f"texts {source}: all documents have the label {labels[0]!r}; a concept needs others beside it"
        )
    return result


def make_comparisons(
    labels: Sequence[str], *, wanted: Sequence[str] | None = None, against: Sequence[str] = ()
) -> list[Comparison]:
    """Which label is told from which others.

    Args:
        labels: all of them.
        wanted: rows of the table; None: those that `against` names, or if it names none, all.
        against: "french=spanish,italian": french is told from these only; a label not named is told from all others.

    Raises:
        ConfigError: an unknown label, a label against itself or named twice, or a malformed text.
    """
    special: dict[int, tuple[int, ...]] = {}
    for text in against:
        name, equals, others = text.partition("=")
        if not equals or not others:
            raise ConfigError(f"against {text!r}: expected LABEL=OTHER,OTHER, for example french=spanish,italian")
        label = _find(name, labels)
        if label in special:
            raise ConfigError(f"against names {name.strip()!r} twice; give all the others in one list")
        special[label] = tuple(dict.fromkeys(_find(other, labels) for other in others.split(",")))
        if label in special[label]:
            raise ConfigError(f"against {text!r}: a label cannot be told from itself")
    if wanted is not None:
        rows = list(dict.fromkeys(_find(name, labels) for name in wanted))
        lost = [labels[label] for label in special if label not in rows]
        if lost:
            raise ConfigError(f"against names {lost[0]!r}, which is not among the labels asked for; add it there")
    else:
        rows = list(special) or list(range(len(labels)))
    return [Comparison(row, special.get(row, tuple(i for i in range(len(labels)) if i != row))) for row in rows]


def _find(name: str, labels: Sequence[str]) -> int:
    if name.strip() not in labels:
        raise ConfigError(f"there is no label {name.strip()!r} in the texts; they have {', '.join(labels)}")
    return list(labels).index(name.strip())


def _halve(documents: Sequence[Document], label: np.ndarray, seed: int) -> np.ndarray:
    """Every other document of each label, in an order that depends on seed and text alone, is train."""
    digests = np.array([hashlib.sha256(f"{seed}:{document.text}".encode()).hexdigest() for document in documents])
    train = np.zeros(len(documents), dtype=bool)
    for i, count in Counter(label.tolist()).items():
        members = np.flatnonzero(label == i)
        train[members[np.argsort(digests[members])][: (count + 1) // 2]] = True
    return train
