"""One request for a range of a file on the web, and what its answers mean; the hub's files by their web addresses."""

from __future__ import annotations

import re
from typing import Any

from saeforge.errors import DatasetError

WORTH_ANOTHER_TRY = {408, 425, 429}  # and all of 5xx
HUB = re.compile(r"(?:(datasets|spaces)/)?([^/@]+/[^/@]+)(?:@(refs/(?:convert|pr)/[^/]+|[^/]+))?(?:/(.+))?")


class Missing(Exception):
    """There is no such file."""


class Refused(Exception):
    """Asking again will not help; the text says what to do."""


def no_package(location: str, package: str) -> DatasetError:
    """Return the error for a scheme whose package is not installed."""
    scheme = location.partition("://")[0]
    return DatasetError(f"{location}: {scheme}:// needs the package {package}; pip install {package}")


def on_the_hub(path: str, location: str) -> tuple[str, dict[str, str]]:
    """Return the web address of a folder in a repository, and who asks.

    fsspec's own way would ask the hub's API about each block before reading it, and soon be told to slow down.
    """
    try:
        from huggingface_hub import get_token, hf_hub_url
    except ImportError as error:
        raise no_package(location, "huggingface_hub") from error
    found = HUB.fullmatch(path)
    if found is None:
        raise DatasetError(f"{location}: expected hf://datasets/USER/NAME or hf://datasets/USER/NAME@REVISION/FOLDER")
    kind, name, revision, folder = found.groups()
    url = hf_hub_url(
        name, f"{folder}/x" if folder else "x", repo_type=kind.rstrip("s") if kind else None, revision=revision
    )
    token = get_token()
    return url.removesuffix("/x"), {"Authorization": f"Bearer {token}"} if token else {}


async def get_range(
    files: Any, url: str, headers: dict[str, str], offset: int, count: int | None, timeout: float
) -> tuple[bytes, int]:
    """Ask for a range of a file, or for all of it as it is now, past every proxy's memory.

    Args:
        files: fsspec's file system for the web, which owns the session.
        url: of the file.
        headers: to be sent; changed.
        offset: first byte.
        count: bytes; None for the whole file.
        timeout: seconds for all of it; 0: as long as it takes.

    Returns:
        The bytes, and the size of the whole file.

    Raises:
        Missing: no such file.
        Refused: an answer that will not change.
        OSError, aiohttp.ClientError: one that may.
    """
    import aiohttp

    if count is None:
        headers["Cache-Control"] = "no-cache"
    else:
        headers["Range"] = f"bytes={offset}-{offset + count - 1}"
    session = await files.set_session()
    limit = aiohttp.ClientTimeout(total=timeout)
    async with session.get(files.encode_url(url), headers=headers, timeout=limit) as response:
        status = response.status
        said = re.fullmatch(r"bytes (?:(\d+)-(\d+)|\*)/(\d+)", response.headers.get("Content-Range", ""))
        if status in (404, 410):
            raise Missing(f"HTTP {status}")
        if status == 416 and said:
            if offset == 0:
                return b"", int(said[3])
            raise Refused(f"the file ends at byte {said[3]}, {offset + (count or 0)} are needed; restore it")
        if status in WORTH_ANOTHER_TRY or status >= 500:
            raise OSError(f"HTTP {status}")
        if status in (401, 403):
            raise Refused(f"HTTP {status}: not allowed; log in first (http: ~/.netrc, hf: `hf auth login`)")
        if count is None and status == 200:
            content = await response.read()
            return content, len(content)
        if status == 200:
            raise Refused(
                "the server ignores ranges and sends whole files; use one that knows them (nginx, caddy, any object "
                "store), or download the dataset"
            )
        if status != 206 or not said or count is None:
            raise Refused(f"the server answers HTTP {status} without the range that was asked for")
        if said[1] is None or int(said[1]) != offset:
            raise OSError(f"the server sent bytes from {said[1]} on, asked for {offset}")
        return await response.read(), int(said[3])
