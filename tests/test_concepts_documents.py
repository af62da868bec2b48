"""Labelled documents: what is refused, how they are halved, which label meets which."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from saeforge.errors import ConfigError
from saeforge.lm.labelled import Comparison, make_comparisons, read_labelled
from saeforge.lm.text import Document

LABELS = ("english", "french", "spanish")


def make_texts(*, split: bool, n: int = 20) -> list[Document]:
    """n documents of each label."""
    return [
        Document(f"{label} {i}", f"{label} text {i}", label, ("train" if i % 2 else "test") if split else None)
        for label in LABELS
        for i in range(n)
    ]


def test_a_split_of_the_documents_own_is_kept() -> None:
    texts = make_texts(split=True)
    found = read_labelled(texts)
    assert found.split_by == "documents"
    assert [document.split == "train" for document in texts] == found.train.tolist()
    assert found.labels == LABELS
    assert [found.labels[i] for i in found.label] == [document.label for document in texts]


def test_a_drawn_split_halves_each_label_and_depends_on_seed_and_text_alone() -> None:
    texts = make_texts(split=False, n=21)
    found = read_labelled(texts, seed=1)
    assert found.split_by == "hash"
    assert found.counts() == {label: {"train": 11, "test": 10} for label in LABELS}
    backwards = read_labelled(texts[::-1], seed=1)
    train = {text for text, first in zip(found.texts, found.train, strict=True) if first}
    assert train == {text for text, first in zip(backwards.texts, backwards.train, strict=True) if first}
    assert not np.array_equal(found.train, read_labelled(texts, seed=2).train)


def test_the_demo_passages_have_16_labels_in_two_halves() -> None:
    found = read_labelled("demo")
    assert len(found.labels) == 16
    assert min(min(halves.values()) for halves in found.counts().values()) >= 8
    assert {"french", "python", "golden_gate_bridge"} <= set(found.labels)


def test_folders_and_files_are_read(tmp_path: Path) -> None:
    texts = make_texts(split=False, n=16)
    for document in texts:
        path = tmp_path / "folder" / str(document.label) / f"{document.name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(document.text)
    lines = [json.dumps({"text": document.text, "label": document.label}) for document in texts]
    (tmp_path / "texts.jsonl").write_text("\n".join(lines))
    folder, file = read_labelled(str(tmp_path / "folder")), read_labelled(str(tmp_path / "texts.jsonl"))
    assert folder.counts() == file.counts() == {label: {"train": 8, "test": 8} for label in LABELS}


def test_a_text_that_comes_twice_counts_once() -> None:
    texts = make_texts(split=False)
    found = read_labelled([*texts, *texts[:3]])
    assert (found.duplicates, len(found.texts)) == (3, len(texts))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda texts: [replace(texts[0], label=None), *texts[1:]], "1 of 60 documents have no label"),
        (lambda texts: [replace(texts[0], split="train"), *texts[1:]], "1 of 60 documents have a split"),
        (lambda texts: [replace(texts[0], text=texts[-1].text), *texts[1:]], "are the same text"),
        (lambda texts: texts[:20], "all documents have the label 'english'"),
    ],
)
def test_unusable_texts_are_refused(change: object, message: str) -> None:
    assert callable(change)
    with pytest.raises(ConfigError, match=message):
        read_labelled(change(make_texts(split=False)))


def test_one_text_in_both_halves_is_refused() -> None:
    texts = make_texts(split=True)
    with pytest.raises(ConfigError, match="are the same text"):
        read_labelled([*texts, replace(texts[0], split="train", name="copy")])


def test_empty_documents_are_named() -> None:
    texts = make_texts(split=False)
    texts[3], texts[30] = replace(texts[3], text=""), replace(texts[30], text=" \n")
    with pytest.raises(ConfigError, match="english 3 is empty"):
        read_labelled(texts)


def test_too_few_documents_of_a_label_matter_only_if_it_is_used() -> None:
    found = read_labelled(make_texts(split=True)[:-5])
    with pytest.raises(ConfigError, match=r"label 'spanish' has \d different \w+ documents, at least 8"):
        found.used_by(make_comparisons(found.labels))
    used = found.used_by(make_comparisons(found.labels, against=["french=english"]))
    assert set(used.counts()) == {"english", "french"}
    assert {used.labels[i] for i in used.label} == {"english", "french"}


def test_shuffling_keeps_the_halves_and_the_number_of_each_label_in_them() -> None:
    found = read_labelled(make_texts(split=True, n=30))
    shuffled = found.shuffle(3)
    assert shuffled.counts() == found.counts()
    assert np.array_equal(shuffled.train, found.train)
    assert np.mean(shuffled.label == found.label) < 0.6
    assert shuffled.shuffled == 3


@pytest.mark.parametrize(
    ("wanted", "against", "expected"),
    [
        (None, [], [(0, (1, 2)), (1, (0, 2)), (2, (0, 1))]),
        (["french"], [], [(1, (0, 2))]),
        (None, ["french=spanish"], [(1, (2,))]),
        (["spanish", "french"], ["french= spanish , english"], [(2, (0, 1)), (1, (2, 0))]),
    ],
)
def test_comparisons(
    wanted: Sequence[str] | None, against: Sequence[str], expected: list[tuple[int, tuple[int, ...]]]
) -> None:
    assert make_comparisons(LABELS, wanted=wanted, against=against) == [Comparison(*row) for row in expected]


@pytest.mark.parametrize(
    ("wanted", "against", "message"),
    [
        (["latin"], [], "there is no label 'latin' in the texts; they have english, french, spanish"),
        (None, ["french=latin"], "there is no label 'latin'"),
        (None, ["french"], "expected LABEL=OTHER,OTHER"),
        (None, ["french="], "expected LABEL=OTHER,OTHER"),
        (None, ["french=french,english"], "cannot be told from itself"),
        (None, ["french=spanish", "french=english"], "names 'french' twice"),
        (["english"], ["french=spanish"], "not among the labels asked for"),
    ],
)
def test_impossible_comparisons_are_refused(wanted: list[str] | None, against: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_comparisons(LABELS, wanted=wanted, against=against)
