"""Collects labelled text for the demo language model from the files of the machine that it runs on.

Python from the interpreter's own library, C from the system's headers, HTML, JSON and SQL from installed packages, and
languages from translated manual pages. Called by `train_demo_lm.py --collect`.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path

SYSTEM = (Path("/usr/share"), Path("/usr/lib"))
#: Label: (file patterns, what brings more of it). Python's library is a place of its own.
CODE = {
    "c": (("*.h",), "libc6-dev, linux-libc-dev, libssl-dev, libicu-dev"),
    "html": (("*.html", "*.htm"), "sqlite3-doc, postgresql-doc, python3-doc, nodejs-doc"),
    "json": (("*.json",), "npm, iso-codes, python3-botocore"),
    "sql": (("*.sql",), "postgresql-contrib, postgis, mediawiki, dbconfig-common, roundcube-core, phppgadmin"),
}
MANUALS = {
    "french": "fr",
    "german": "de",
    "italian": "it",
    "japanese": "ja",
    "portuguese": "pt*",
    "russian": "ru",
    "spanish": "es",
}
SMALLEST = 500_000  # bytes; less is too little for a label
LONGEST_FILE = 40_000  # characters taken of one file, so that no single one makes a label
LONGEST_LINE = 300  # minified files teach nothing
SHORTEST_PARAGRAPH = 60  # characters; of a manual page, whose headings and options say little
ROFF = {r"\-": "-", r"\(em": "—", r"\(aq": "'", r"\(cq": "\u2019", r"\e": "\\", r"\ ": " "}


def collect(out: Path, limit: int) -> None:
    """Writes `<label>.txt` for what this machine has, and SOURCES.json (label: files), and says what is missing.

    Args:
        out: Folder to write; made if missing. Its files of the same names are replaced.
        limit: Bytes at most of each label.
    """
    out.mkdir(parents=True, exist_ok=True)
    library = Path(sysconfig.get_path("stdlib"))
    places: dict[str, tuple[Iterable[Path], str]] = {"python": (_python_files(library), "python3")}
    for label, (patterns, packages) in CODE.items():
        roots = (Path("/usr/include"),) if label == "c" else (*SYSTEM, Path(sysconfig.get_path("purelib")), library)
        files = {path for root in roots for pattern in patterns for path in root.rglob(pattern)}
        places[label] = files, packages
    for label, code in MANUALS.items():
        places[label] = set(Path("/usr/share/man").glob(f"{code}/man*/*.gz")), f"manpages-{code[:2]}, debian-handbook"

    sources = {}
    for label, (files, packages) in places.items():
        size, sources[label] = _write_label(out / f"{label}.txt", files, limit)
        print(f"{label:<12} {size / 1e3:8.0f} kB of {len(sources[label])} files")
        if size < SMALLEST:
            print(f"{'':<12} less than {SMALLEST // 1000} kB; Debian packages with more: {packages}", file=sys.stderr)
    (out / "SOURCES.json").write_text(json.dumps(sources, indent=1) + "\n", encoding="utf-8")


def _python_files(library: Path) -> list[Path]:
    left_out = {"site-packages", "dist-packages", "test", "tests", "idlelib", "encodings", "lib2to3", "__pycache__"}
    return [path for path in library.rglob("*.py") if not left_out & set(path.relative_to(library).parts)]


def _write_label(target: Path, files: Iterable[Path], limit: int) -> tuple[int, list[str]]:
    """Writes files in the order of their paths' hashes (a mix, and the same one each time) until there is enough."""
    size, used, seen = 0, [], set()
    partial = target.with_suffix(".partial")
    with partial.open("w", encoding="utf-8") as stream:
        for path in sorted(files, key=lambda path: hashlib.sha256(str(path).encode()).digest()):
            text = _file_text(path)
            if not text or text in seen or size >= limit:
                continue
            seen.add(text)
            used.append(str(path))
            size += len(text.encode())
            stream.write(text + "\n\n")
    partial.replace(target) if used else partial.unlink()
    return size, used


def _file_text(path: Path) -> str:
    """The start of a file, or nothing where it is no readable text of ordinary lines."""
    if not path.is_file():  # packages leave dangling links
        return ""
    data = path.read_bytes()
    try:
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")
    except UnicodeDecodeError:
        return ""
    if path.suffix == ".gz":
        text = manual_text(text)
    if "\0" in text or (max(map(len, text.splitlines()), default=0) > LONGEST_LINE and path.suffix != ".gz"):
        return ""
    if len(text) > LONGEST_FILE:
        text = text[: text.rfind("\n", 0, LONGEST_FILE) + 1]
    return text.strip()


def manual_text(source: str) -> str:
    """The prose of a manual page's roff source: paragraphs on one line, separated by blank lines."""
    paragraphs: list[list[str]] = [[]]
    for line in source.splitlines():
        if line.startswith((".", "'")):
            if not re.match(r"[.'] *(B|I|BR|IR|RB|RI|BI|IB|SM|SB|Nm|Fl|Ar|Pa|Xr|Em|Sy)\b", line):
                paragraphs.append([])
                continue
            line = line.split(maxsplit=1)[1] if " " in line else ""
            line = line.replace('"', "")
        line = re.sub(r"\\f(\[\w*\]|\(..|.)|\\s[-+]?\d|\\[&/,|^%:c]", "", line)
        for escape, character in ROFF.items():
            line = line.replace(escape, character)
        paragraphs[-1].append(line)
    joined = (" ".join(" ".join(lines).split()) for lines in paragraphs)
    # What is left of tables, macros and authors' lists has escapes, or hardly a word.
    return "\n\n".join(text for text in joined if len(text) >= SHORTEST_PARAGRAPH and "\\" not in text)
