"""Names of local files as people give them: paths, globs, and braces as webdataset knows them."""

from __future__ import annotations

import glob
import re
from collections.abc import Sequence
from pathlib import Path

from saeforge.errors import ConfigError

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_MAX_NAMES = 1_000_000


def expand(names: Sequence[str | Path]) -> list[Path]:
    """Return the files and folders that names stand for; a glob's matches are sorted.

    Args:
        names: paths; `*`, `?` and `[...]` match existing ones; `{000..009}` and `{a,b}` name each of them.

    Raises:
        ConfigError: a file is missing, a glob matches nothing; `pipe:` (which runs commands) or another URL.
    """
    found: list[Path] = []
    for given in names:
        text = str(given)
        if text.startswith("pipe:"):
            raise ConfigError(
                f"{text}: pipe: runs a shell command and is refused; store its output in files and name those"
            )
        if re.match(r"[a-z][a-z0-9+.-]*://", text, re.IGNORECASE):
            raise ConfigError(f"{text}: expected local files here; download them first")
        if isinstance(given, Path) or Path(text).exists():
            expanded = [text]
        else:
            expanded = _expand_braces(text)
        for name in expanded:
            if Path(name).exists():
                found.append(Path(name))
            elif glob.has_magic(name):
                matches = sorted(glob.glob(name))  # noqa: PTH207 (absolute patterns and relative ones alike)
                if not matches:
                    raise ConfigError(f"{name} matches no file; check the path")
                found += map(Path, matches)
            else:
                raise ConfigError(f"{name}: no such file or folder; check the path")
    if not found:
        raise ConfigError("no file was named; expected paths of files or folders")
    return found


def _expand_braces(text: str) -> list[str]:
    match = _BRACES.search(text)
    if match is None:
        return [text]
    inside = match[1]
    if numbers := _RANGE.fullmatch(inside):
        first, last = int(numbers[1]), int(numbers[2])
        if last < first or last - first > _MAX_NAMES:
            raise ConfigError(f"{text}: {{{inside}}} is no range from a smaller to a larger number")
        width = len(numbers[1])
        parts = [f"{number:0{width}d}" for number in range(first, last + 1)]
    elif "," in inside:
        parts = inside.split(",")
    else:
        raise ConfigError(f"{text}: {{{inside}}} is neither a range (000..009) nor a list (a,b)")
    return [name for part in parts for name in _expand_braces(text[: match.start()] + part + text[match.end() :])]
