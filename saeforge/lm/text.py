"""Where text comes from: files, the running Python's standard library, or the demo text that ships with saeforge."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import sysconfig
import tokenize
import zlib
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from saeforge.demo import passages_path, text_path
from saeforge.errors import ConfigError

# Not written to be read: tests with broken encodings and syntax, vendored wheels, generated tables.
_STDLIB_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "_vendor", "_bundled"}

# Of the demo text's documents from the standard library; the samples of a label are about 100,000 characters.
_DEMO_LIBRARY_SIZE = 200_000
_DEMO_LIBRARY_PIECE = 1000
_DEMO_LIBRARY_SKIPPED = {"encodings", "pydoc_data", "lib2to3", "idlelib"}  # tables, and programs of their own

#: A document that shares this many words, or tokens of the demo model, in a row with another one holds a part of it.
COPIED_RUN = 13


@dataclass(frozen=True)
class Document:
    """One text, with a name that stays the same from run to run, and perhaps a label and a split.

    Attributes:
        text: of a conversation, its messages as JSON: what tells it from others.
        split: "train" or "test" where the source says so. Documents with split "test" are never harvested.
        messages: of a conversation; a chat template makes text of them.
    """

    name: str
    text: str
    label: str | None
    split: str | None = None
    messages: tuple[Mapping[str, Any], ...] | None = None

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing but white space in it."""
        parts = [self.text] if self.messages is None else [message["content"] for message in self.messages]
        return not any(part.strip() for part in parts)


class TextSource(Protocol):
    """Documents by number, so that they can be taken in any order."""

    def __len__(self) -> int:
        """Return the number of documents."""

    def __getitem__(self, index: int) -> Document:
        """Return one document."""


def open_text(text: str, *, conversations: bool = False) -> TextSource:
    """Open a source of text.

    Args:
        text: "demo", "stdlib", a folder of text files, or a `.jsonl` file.
        conversations: whether documents may have messages in place of a text.

    Raises:
        ConfigError: there is no such source, or it holds no documents.
    """
    if text == "stdlib":
        return StandardLibrary()
    if text == "demo":
        return DemoText()
    path = Path(text).expanduser()
    if path.is_dir():
        return TextFolder(path)
    if path.suffix == ".jsonl" and path.is_file():
        return JsonLines(path, conversations=conversations)
    if path.exists():
        raise ConfigError(f"text {text!r} is neither a folder nor a .jsonl file; give one of them, demo, or stdlib")
    raise ConfigError(f"text {text!r} does not exist; give a folder of text files, a .jsonl file, demo, or stdlib")


class TextFolder:
    """All files below a folder, UTF-8; the label is the first subfolder, or the file's stem at the top."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.files = sorted(
            path
            for path in root.rglob("*")
            if path.is_file() and not any(part.startswith(".") for part in path.relative_to(root).parts)
        )
        if not self.files:
            raise ConfigError(f"text folder {root} holds no files")

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Document:
        path = self.files[index]
        name = path.relative_to(self.root)
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ConfigError(
                f"text file {path} is not UTF-8 ({error.reason} at byte {error.start}); convert or move it"
            ) from error
        return Document(name.as_posix(), text, name.parts[0] if len(name.parts) > 1 else path.stem)


class StandardLibrary:
    """The .py files of the running Python's standard library; the label is the top module or package."""

    def __init__(self) -> None:
        self.root = Path(sysconfig.get_path("stdlib"))
        found = []
        for folder, subfolders, files in os.walk(self.root):
            subfolders[:] = [name for name in subfolders if name not in _STDLIB_SKIPPED]  # site-packages can be huge
            found += [Path(folder, name) for name in files if name.endswith(".py")]
        self.files = sorted(found)
        if not self.files:
            raise ConfigError(
                f"text stdlib: this Python keeps no .py files in {self.root}; give a folder of text instead"
            )

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Document:
        path = self.files[index]
        name = path.relative_to(self.root)
        with tokenize.open(path) as file:  # obeys the encoding that the source declares
            text = file.read()
        return Document(name.as_posix(), text, name.parts[0].removesuffix(".py"))


class JsonLines:
    """One JSON object per line with a string `text`, and if wanted `label`, `name` and `split`; read by offset.

    Args:
        path: the file.
        conversations: also take lines with `messages` (a list of objects with strings `role` and `content`).
    """

    def __init__(self, path: Path, *, conversations: bool = False) -> None:
        self.path = path
        self.conversations = conversations
        self.offsets: list[tuple[int, int]] = []
        position = 0
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    self.offsets.append((number, position))
                position += len(line)
        if not self.offsets:
            raise ConfigError(f"text {path} is empty")

    def __len__(self) -> int:
        return len(self.offsets)

    def __getitem__(self, index: int) -> Document:
        number, position = self.offsets[index]
        with self.path.open("rb") as file:
            file.seek(position)
            line = file.readline()
        try:
            data = json.loads(line)
        except ValueError as error:
            raise ConfigError(f"text {self.path}, line {number}: not JSON ({error})") from error
        place = f"text {self.path}, line {number}"
        messages = None
        if isinstance(data, dict) and "messages" in data:
            if not self.conversations:
                raise ConfigError(f"{place}: a conversation (`messages`); only a harvest reads them, give `text` here")
            messages = _check_messages(data, place)
            data["text"] = json.dumps(messages, sort_keys=True, ensure_ascii=False)
        if not isinstance(data, dict) or not isinstance(data.get("text"), str):
            or_else = " or with `messages`" if self.conversations else ""
            raise ConfigError(f"{place}: expected an object with a string field `text`{or_else}")
        label, split = data.get("label"), data.get("split")
        if split not in (None, "train", "test"):
            raise ConfigError(f"text {self.path}, line {number}: split {split!r}, expected train or test")
        name = str(data.get("name", f"line {number}"))
        return Document(name, data["text"], None if label is None else str(label), split, messages)


def _check_messages(data: dict[str, Any], place: str) -> tuple[Mapping[str, Any], ...]:
    """Return the messages of a line, or say what is wrong with them."""
    messages = data["messages"]
    if "text" in data:
        raise ConfigError(f"{place}: both `text` and `messages`; give one of them")
    if not isinstance(messages, list) or not messages:
        raise ConfigError(f"{place}: expected `messages` to be a list of at least one message")
    for message in messages:
        if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise ConfigError(f"{place}: expected each message to be an object with strings `role` and `content`")
    return tuple(messages)


class DemoText:
    """Languages and code in equal parts, from what is there without a download.

    The train passages of `saeforge.demo`, documents of every language and kind of code that its language model wrote,
    and pieces of the standard library, label "python", about twice as much of them as of one label's samples. All are
    short, so that any number of them, taken at random, has something of every label. A piece of the library that
    shares `COPIED_RUN` words or tokens in a row with a test passage is left out; the samples were chosen so.

    Raises:
        ConfigError: the samples or the demo model's tokenizer are missing, or the samples are damaged.
    """

    def __init__(self) -> None:
        passages = read_passages()
        self.documents = [passage for passage in passages if passage.split == "train"]
        self.documents += read_samples()
        self.documents += _library_pieces([passage.text for passage in passages if passage.split == "test"])

    def __len__(self) -> int:
        return len(self.documents)

    def __getitem__(self, index: int) -> Document:
        return self.documents[index]


def read_passages() -> list[Document]:
    """The labelled passages that ship with saeforge, both splits; see `saeforge.demo.passages_path`."""
    found = []
    for path in sorted(passages_path().glob("*.jsonl")):
        lines = JsonLines(path)
        for number in range(len(lines)):
            passage = lines[number]
            found.append(Document(f"passage/{path.stem}/{number + 1}", passage.text, passage.label, passage.split))
    return found


def read_samples() -> list[Document]:
    """The documents that the demo model wrote, by label; see `saeforge.demo.text_path`.

    Raises:
        ConfigError: the file is missing or damaged.
    """
    path = text_path()
    if not path.is_file():
        raise ConfigError(f"text demo: {path} is missing; reinstall saeforge, or run scripts/sample_demo_text.py")
    try:
        lines = gzip.decompress(path.read_bytes()).decode("utf-8").splitlines()
        return [Document(data["name"], data["text"], data["label"]) for data in map(json.loads, lines)]
    except (OSError, EOFError, ValueError, KeyError, TypeError, zlib.error) as error:
        raise ConfigError(f"text demo: {path} is damaged ({error}); reinstall saeforge") from error


def words(text: str) -> list[str]:
    """Words as a reader tells them apart: without case, punctuation and layout, numbers included."""
    return re.findall(r"\w+", text.casefold())


def runs(units: Sequence[Hashable], length: int = COPIED_RUN) -> set[tuple[Hashable, ...]]:
    """All runs of `length` neighbouring words, or tokens."""
    return {tuple(units[start : start + length]) for start in range(len(units) - length + 1)}


def _library_pieces(test_passages: Sequence[str]) -> list[Document]:
    """One piece of each of some modules, modules and pieces chosen by the hash of the module's name."""
    from saeforge.lm.load import load_tokenizer  # torch and transformers load here

    tokenizer = load_tokenizer("demo")

    def runs_of(texts: Sequence[str]) -> list[set[tuple[Hashable, ...]]]:
        ids = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        return [runs(words(text)) | runs(tokens) for text, tokens in zip(texts, ids, strict=True)]

    library = StandardLibrary()
    modules = sorted(
        (hashlib.sha256(name.encode()).digest(), index, name)
        for index, name in enumerate(path.relative_to(library.root).as_posix() for path in library.files)
        if name.split("/")[0] not in _DEMO_LIBRARY_SKIPPED
    )
    forbidden = set().union(*runs_of(test_passages))
    pieces: list[Document] = []
    size = 0
    for digest, index, name in modules:
        if size >= _DEMO_LIBRARY_SIZE:
            break
        piece = _piece_of(library[index].text, int.from_bytes(digest[:8], "big") / 2**64)
        if piece.strip() and forbidden.isdisjoint(runs_of([piece])[0]):
            pieces.append(Document(f"stdlib/{name}", piece, "python"))
            size += len(piece)
    return pieces


def _piece_of(text: str, place: float) -> str:
    """Whole lines, about as many characters as a piece has, from `place` (0 to 1) on."""
    start = int(place * max(0, len(text) - _DEMO_LIBRARY_PIECE))
    start = text.rfind("\n", 0, start) + 1
    end = start + _DEMO_LIBRARY_PIECE
    return text[start : end if end >= len(text) else text.rfind("\n", start, end) + 1 or end]
