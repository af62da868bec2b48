"""Where text comes from: a folder of files, a .jsonl file, or the running Python's own standard library."""

from __future__ import annotations

import json
import os
import sysconfig
import tokenize
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from saeforge.errors import ConfigError

# Not written to be read: tests with broken encodings and syntax, vendored wheels, generated tables.
_STDLIB_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "_vendor", "_bundled"}


@dataclass(frozen=True)
class Document:
    """One text, with a name that stays the same from run to run, and perhaps a label and a split.

    Attributes:
        split: "train" or "test" where the source says so. Documents with split "test" are never harvested.
    """

    name: str
    text: str
    label: str | None
    split: str | None = None


class TextSource(Protocol):
    """Documents by number, so that they can be taken in any order."""

    def __len__(self) -> int:
        """Return the number of documents."""

    def __getitem__(self, index: int) -> Document:
        """Return one document."""


def open_text(text: str) -> TextSource:
    """Open a source of text.

    Args:
        text: "stdlib", a folder of text files, or a `.jsonl` file.

    Raises:
        ConfigError: there is no such source, or it holds no documents.
    """
    if text == "stdlib":
        return StandardLibrary()
    path = Path(text).expanduser()
    if path.is_dir():
        return TextFolder(path)
    if path.suffix == ".jsonl" and path.is_file():
        return JsonLines(path)
    if path.exists():
        raise ConfigError(f"text {text!r} is neither a folder nor a .jsonl file; give one of them, or stdlib")
    raise ConfigError(f"text {text!r} does not exist; give a folder of text files, a .jsonl file, or stdlib")


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
    """One JSON object per line with a string `text`, and if wanted `label`, `name` and `split`; read by offset."""

    def __init__(self, path: Path) -> None:
        self.path = path
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
        if not isinstance(data, dict) or not isinstance(data.get("text"), str):
            raise ConfigError(f"text {self.path}, line {number}: expected an object with a string field `text`")
        label, split = data.get("label"), data.get("split")
        if split not in (None, "train", "test"):
            raise ConfigError(f"text {self.path}, line {number}: split {split!r}, expected train or test")
        name = str(data.get("name", f"line {number}"))
        return Document(name, data["text"], None if label is None else str(label), split)
