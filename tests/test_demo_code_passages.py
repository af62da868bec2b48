"""Labelled passages of code and data: each is what its label says, and no label hangs on one habit of writing."""

from __future__ import annotations

import ast
import json
import re
import sqlite3
from collections import Counter
from collections.abc import Callable
from html.parser import HTMLParser

import pytest

from saeforge.demo import passages_path

CODE = ("python", "c", "html", "json", "sql")
VOID = frozenset("area base br col embed hr img input link meta source track wbr".split())
CLOSER = {"{": "}", "(": ")", "[": "]"}
C_NOISE = re.compile(r"""/\*.*?\*/|//[^\n]*|"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])+'""", re.DOTALL)
SQL_NOISE = re.compile(r"""/\*.*?\*/|--[^\n]*|'(?:[^']|'')*'""", re.DOTALL)
SQL_VERBS = frozenset(
    """alter analyze begin close comment commit create declare delete drop end explain fetch grant insert merge open
    pragma reindex return revoke rollback savepoint select start truncate update values with""".split()
)


def read_texts(label: str) -> list[str]:
    lines = (passages_path() / f"{label}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines]


def check_nesting(code: str) -> None:
    """Raises ValueError unless every bracket is closed by its own kind, in order."""
    expected: list[str] = []
    for char in code:
        if char in CLOSER:
            expected.append(CLOSER[char])
        elif char in CLOSER.values() and (not expected or expected.pop() != char):
            raise ValueError(f"{char!r} closes nothing")
    if expected:
        raise ValueError(f"{expected[-1]!r} is missing")


class TagChecker(HTMLParser):
    """Raises ValueError at an end tag that does not match; `open` holds the tags not yet closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen += 1
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            raise ValueError(f"</{tag}> closes nothing")


def check_python(text: str) -> None:
    if not ast.parse(text).body:
        raise ValueError("no statement")


def check_c(text: str) -> None:
    code = C_NOISE.sub(" ", text)
    check_nesting(code)
    if ";" not in code or '"' in re.sub(r'#include "[^"\n]*"', "", code):
        raise ValueError("no statement, or a string that is not closed")


def check_html(text: str) -> None:
    checker = TagChecker()
    checker.feed(text)
    checker.close()
    if checker.open or not checker.seen:
        raise ValueError(f"tags left open: {checker.open}, tags seen: {checker.seen}")


def check_json(text: str) -> None:
    if not isinstance(json.loads(text), dict | list):
        raise ValueError("a document of one bare value")


def check_sql(text: str) -> None:
    code = SQL_NOISE.sub("''", text)
    if not sqlite3.complete_statement(text):
        raise ValueError("the last statement is not complete")
    for statement in filter(None, map(str.strip, code.split(";"))):
        check_nesting(statement)
        verb = statement.removeprefix("''").split()[0].lower()  # a comment before it has become ''
        if verb not in SQL_VERBS:
            raise ValueError(f"a statement begins with {verb!r}")


CHECKS: dict[str, Callable[[str], None]] = {
    "python": check_python, "c": check_c, "html": check_html, "json": check_json, "sql": check_sql
}  # fmt: skip


@pytest.mark.parametrize("label", CODE)
def test_every_passage_is_well_formed(label: str) -> None:
    wrong = {}
    for number, text in enumerate(read_texts(label), start=1):
        try:
            CHECKS[label](text)
        except (ValueError, SyntaxError) as problem:  # a JSONDecodeError is a ValueError
            wrong[number] = str(problem)
    assert not wrong


@pytest.mark.parametrize(
    ("label", "broken"),
    [
        ("python", "def f(:\n    pass"),
        ("python", "# only a comment"),
        ("c", "int f(void) { return (1; }"),
        ("c", 'puts("a);'),
        ("html", "<p><b>bold</p></b>"),
        ("html", "<ul><li>one</li>"),
        ("html", "no tag at all"),
        ("json", "{'single': 1}"),
        ("json", "3"),
        ("sql", "SELECT 1"),
        ("sql", "SELECT (1; SELECT 2);"),
        ("sql", "PLEASE SELECT 1;"),
    ],
)
def test_the_checks_refuse_what_is_broken(label: str, broken: str) -> None:
    with pytest.raises((ValueError, SyntaxError)):
        CHECKS[label](broken)


@pytest.mark.parametrize("label", CODE)
def test_no_word_stands_in_every_passage(label: str) -> None:
    """A latent of one token must not be able to name a label; bare punctuation is the label's own grammar."""
    texts = read_texts(label)
    counts = Counter(word for text in texts for word in set(re.findall(r"\w{2,}", text.casefold())))
    word, most = counts.most_common(1)[0]
    assert most <= 0.9 * len(texts), f"{word} stands in {most} of {len(texts)}"


@pytest.mark.parametrize("label", CODE)
def test_layout_varies(label: str) -> None:
    """Indentation by two, by four and by tabs, lines with none, and no opening line that many share."""
    texts = read_texts(label)
    openings = Counter(text.splitlines()[0].strip() for text in texts if len(text.splitlines()[0].split()) > 1)
    assert max(openings.values()) <= 2, openings.most_common(3)
    steps = Counter(re.findall(r"^(\t|  (?! )|    (?! ))", "\n".join(texts), re.MULTILINE))
    assert set(steps) == {"\t", "  ", "    "}, steps


@pytest.mark.parametrize(("label", "mark"), [("python", "#"), ("c", "/*"), ("html", "<!--"), ("sql", "--")])
def test_comments_are_few(label: str, mark: str) -> None:
    texts = read_texts(label)
    assert 0 < sum(mark in text for text in texts) <= len(texts) / 3
