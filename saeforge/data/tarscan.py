"""Plain tars of `.npy` members, found by seeking from header to header.

A tar has no index and no checksum of its data, and Python's and webdataset's readers take a damaged header for the end
of the file. Here every header's checksum counts, and the end is only the mark that says so, with nothing behind it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from saeforge.data.foreign import PICKLES, Headers, Span, npy_span
from saeforge.errors import DatasetError

_MAX_EXTENSION = 2**20
_TAR = 512
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")


def scan_tar(path: Path, key: str | None = None) -> list[Span]:
    """Return the rows of a tar of `.npy` members, (d,), (rows, d) or (contexts, length, d), from headers alone.

    Args:
        path: the tar file, not compressed.
        key: take only members whose name matches this pattern, for example `*.acts.npy`.

    Raises:
        DatasetError: pickles, members that cannot be read, no `.npy` member, a damaged or truncated file.
    """
    spans = []
    with Headers(path) as file:
        for name, offset, size in tar_members(file, path):
            base = name.rpartition("/")[2]
            if refused := PICKLES.get(Path(base).suffix.lower()):
                raise DatasetError(f"{path}, {name}: {refused}")
            if base.endswith(".npy") and (key is None or fnmatchcase(base, key)):
                spans.append(npy_span(file, path, name, offset, size, dims=(1, 2, 3)))
    if not spans:
        wanted = "no .npy member" if key is None else f"no .npy member called {key}"
        raise DatasetError(f"{path} holds {wanted}; expected a tar of .npy arrays, (rows, d) or (d,)")
    return spans


def tar_members(file: Headers, path: Path) -> Iterator[tuple[str, int, int]]:
    """Yield name, payload offset and payload size of every regular file of a tar, seeking from header to header.

    Raises:
        DatasetError: a header's checksum is wrong, the end is missing, or a member is of a kind that holds no data.
    """
    position, last = 0, "the start"
    names: str | None = None
    sizes: int | None = None
    while True:
        header = file.read(position, _TAR, short=True)
        if not position and header.startswith(_COMPRESSED):
            raise DatasetError(f"{path} is compressed, which cannot be read by offset; unpack it first")
        if len(header) < _TAR:
            raise DatasetError(
                f"{path} ends after {last} without the mark of its end: truncated, rows are missing; copy it again"
            )
        if not header.strip(b"\0"):
            _check_end(file, path, position, last)
            return
        name, kind, size = _tar_header(header, path, last)
        payload = position + _TAR
        position = payload + -(-size // _TAR) * _TAR
        if position > file.size:
            raise DatasetError(f"{path}, {name}: {position - file.size} bytes are missing: truncated; copy it again")
        if kind in "xgLK":  # pax and GNU extensions: they describe the member that follows
            if size > _MAX_EXTENSION:
                raise DatasetError(f"{path}, {name}: an extension header of {size} bytes; damaged")
            data = file.read(payload, size)
            if kind == "L":
                names = data.rstrip(b"\0").decode("utf-8", "replace")
            elif kind in "xg":
                records = _pax_records(data, path, name)
                if (kind == "g" and {"path", "size"} & records.keys()) or any(
                    k.startswith("GNU.sparse") for k in records
                ):
                    raise DatasetError(f"{path}, {name}: a kind of tar that is not read here; pack it with plain `tar`")
                names = records.get("path", names)
                sizes = int(records["size"]) if "size" in records else sizes
            continue
        if names is not None:
            name = names
        if sizes is not None:
            size, position = sizes, payload + -(-sizes // _TAR) * _TAR
            if position > file.size:
                raise DatasetError(
                    f"{path}, {name}: {position - file.size} bytes are missing: truncated; copy it again"
                )
        names = sizes = None
        if kind == "5":
            continue
        if kind not in "0\0":
            raise DatasetError(f"{path}, {name}: a link or a special file (tar type {kind!r}); expected plain files")
        last = name
        yield name, payload, size


def _tar_header(header: bytes, path: Path, last: str) -> tuple[str, str, int]:
    """Return name, type and size."""
    where = f"{path}: the tar header after {last}"
    try:
        stored = int(header[148:156].split(b"\0")[0].strip() or b"0", 8)
    except ValueError:
        stored = -1
    actual = sum(header) - sum(header[148:156]) + 8 * ord(" ")
    if stored != actual:
        raise DatasetError(f"{where} is damaged, or the file is no tar; copy it again")
    field = header[124:136]
    try:
        binary = field[0] & 0x80  # GNU: sizes from 8 GiB on in base 256
        size = int.from_bytes(field[1:]) if binary else int(field.strip(b"\0 ") or b"0", 8)
    except ValueError as error:
        raise DatasetError(f"{where} gives no size; copy the file again") from error
    name = header[:100].split(b"\0")[0].decode("utf-8", "replace")
    prefix = header[345:500].split(b"\0")[0].decode("utf-8", "replace") if header[257:263] == b"ustar\0" else ""
    return f"{prefix}/{name}" if prefix else name, chr(header[156]), size


def _pax_records(data: bytes, path: Path, name: str) -> dict[str, str]:
    """Parse `LENGTH key=value` lines."""
    records = {}
    while data.strip(b"\0"):
        match = re.match(rb"(\d{1,9}) ([^=]+)=", data)
        length = int(match[1]) if match else 0
        if match is None or not match.end() < length <= len(data) or data[length - 1 : length] != b"\n":
            raise DatasetError(f"{path}, {name}: damaged extension header; copy the file again")
        records[match[2].decode("utf-8", "replace")] = data[match.end() : length - 1].decode("utf-8", "replace")
        data = data[length:]
    return records


def _check_end(file: Headers, path: Path, position: int, last: str) -> None:
    """Behind the mark of the end only zeros may follow: a zeroed header would else hide every later member."""
    if file.size - position < 2 * _TAR:
        raise DatasetError(f"{path} ends after {last} with half of its end mark: truncated; copy it again")
    while position < file.size:
        data = file.read(position, min(2**20, file.size - position))
        if data.strip(b"\0"):
            raise DatasetError(
                f"{path}: data follows the mark of the end after {last}: a damaged header, or tars glued together "
                "(unpack and pack them into one)"
            )
        position += len(data)
