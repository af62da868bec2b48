"""Labelled passages: every file of the folder is whole, balanced, and free of text that two passages share."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from saeforge.demo import passages_path

FILES = sorted(passages_path().glob("*.jsonl"))
LANGUAGES = ("english", "french", "german", "spanish", "italian", "portuguese")
THEMES = ("golden_gate_bridge", "cooking", "law", "astronomy", "sycophantic_praise")
PROSE = LANGUAGES + THEMES
RUN = 8  # words that no two passages may share in a row


@dataclass(frozen=True)
class Passage:
    label: str
    split: str
    text: str
    place: str  # file and line, for the message of a failed assertion


def read_passages() -> list[Passage]:
    """Every line of every file, its keys and types checked on the way."""
    passages = []
    for path in FILES:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            place = f"{path.name}:{number}"
            entry = json.loads(line)
            assert set(entry) == {"label", "split", "text"}, place
            assert all(isinstance(value, str) for value in entry.values()), place
            passages.append(Passage(entry["label"], entry["split"], entry["text"], place))
    return passages


@pytest.fixture(scope="module")
def passages() -> list[Passage]:
    return read_passages()


def words(text: str) -> list[str]:
    """Words as a reader tells them apart: without case, punctuation and layout, numbers included."""
    return re.findall(r"\w+", text.casefold())


def shared_runs(passages: list[Passage], split_words: Callable[[str], list[str]]) -> list[str]:
    """Runs of `RUN` words that stand in two passages, each with both places."""
    first: dict[tuple[str, ...], str] = {}
    shared = []
    for passage in passages:
        tokens = split_words(passage.text)
        for run in {tuple(tokens[i : i + RUN]) for i in range(len(tokens) - RUN + 1)}:
            other = first.setdefault(run, passage.place)
            if other != passage.place:
                shared.append(f"{other} and {passage.place}: {' '.join(run)}")
    return shared


def test_the_prose_labels_are_there() -> None:
    assert {path.stem for path in FILES} >= set(PROSE)


@pytest.mark.parametrize("label", [path.stem for path in FILES])
def test_file_is_whole(label: str, passages: list[Passage]) -> None:
    mine = [p for p in passages if p.place.startswith(f"{label}.jsonl:")]
    assert {p.label for p in mine} == {label}
    assert {p.split for p in mine} == {"train", "test"}
    assert len(mine) >= 40
    assert 2 * sum(p.split == "test" for p in mine) == len(mine)
    wrong = {p.place: len(p.text.split()) for p in mine if not 40 <= len(p.text.split()) <= 100}
    assert not wrong, "40 to 100 words are asked for"
    untidy = [p.place for p in mine if p.text != p.text.strip() or "\ufffd" in p.text or "\r" in p.text]
    assert not untidy


def test_no_passage_stands_twice(passages: list[Passage]) -> None:
    places: dict[str, list[str]] = {}
    for p in passages:
        places.setdefault(" ".join(words(p.text)), []).append(p.place)
    assert not [where for where in places.values() if len(where) > 1]


def test_no_two_passages_share_a_run_of_words(passages: list[Passage]) -> None:
    assert not shared_runs(passages, lambda text: text.casefold().split())
    # Punctuation must not hide a stock phrase in prose. In code it is what tells two lines apart, so it counts there.
    assert not shared_runs([p for p in passages if p.label in PROSE], words)


def test_the_check_of_runs_finds_one() -> None:
    phrase = "the rain began before breakfast and did not stop"
    pair = [Passage("a", "train", f"Well, {phrase}.", "a:1"), Passage("a", "test", phrase.upper(), "a:2")]
    assert len(shared_runs(pair, words)) == 2


def test_no_two_prose_passages_open_alike(passages: list[Passage]) -> None:
    openings: dict[tuple[str, ...], list[str]] = {}
    for p in passages:
        if p.label in PROSE:
            openings.setdefault(tuple(words(p.text)[:5]), []).append(p.place)
    assert not [where for where in openings.values() if len(where) > 1]


@pytest.mark.parametrize("label", [label for label in LANGUAGES if label != "english"])
def test_other_languages_hold_no_english(label: str, passages: list[Passage]) -> None:
    # Words that are English only: none is spelled like this in the five other languages.
    english = {"the", "of", "and", "with", "that", "this", "which", "from", "they", "there", "what", "you", "have"}
    found = {p.place: english & set(words(p.text)) for p in passages if p.label == label}
    assert not {place: hits for place, hits in found.items() if hits}


TRAITS: dict[str, Callable[[str], bool]] = {
    "question mark": lambda text: "?" in text,
    "exclamation mark": lambda text: "!" in text,
    "quotation mark": lambda text: '"' in text,
    "digit": lambda text: any(c.isdigit() for c in text),
    "line break": lambda text: "\n" in text,
    "letter": lambda text: text.split("\n")[0].endswith(","),
    "script": lambda text: re.match(r"[A-Z][A-Z ]+: ", text) is not None,
    "question and answer": lambda text: text.startswith(("Q: ", "Question: ")),
}


@pytest.mark.parametrize("trait", TRAITS)
def test_formats_do_not_tell_a_theme(trait: str, passages: list[Passage]) -> None:
    """In each theme about the same share of passages has a trait, so that none can be told by its formatting."""
    shares = {}
    for theme in THEMES:
        texts = [p.text for p in passages if p.label == theme]
        shares[theme] = sum(map(TRAITS[trait], texts)) / len(texts)
    assert min(shares.values()) > 0, shares
    assert max(shares.values()) - min(shares.values()) <= 0.15, shares


def test_themes_are_equally_long(passages: list[Passage]) -> None:
    means = []
    for theme in THEMES:
        lengths = [len(p.text.split()) for p in passages if p.label == theme]
        means.append(sum(lengths) / len(lengths))
    assert max(means) - min(means) <= 5, means
