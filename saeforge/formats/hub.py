"""`hf://USER/NAME[@REVISION][/FOLDER or FILE]`: the files of one SAE from the HuggingFace hub, into its own cache."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from saeforge.data.web import HUB
from saeforge.errors import CheckpointError
from saeforge.formats.base import Format


def fetch(location: str, formats: Sequence[Format]) -> Path:
    """Downloads what the formats read of a folder of a model repository, and nothing else of it.

    Args:
        location: `hf://USER/NAME[@REVISION][/PATH]`.
        formats: whose files are wanted.

    Returns:
        The folder, or the file that PATH names, in the cache of huggingface_hub.

    Raises:
        CheckpointError: a location of another shape, no such repository or folder, no network, no huggingface_hub.
    """
    found = HUB.fullmatch(location.removeprefix("hf://").rstrip("/"))
    if found is None or found[1] or ".." in PurePosixPath(location).parts:
        raise CheckpointError(f"{location}: expected hf://USER/NAME, hf://USER/NAME@REVISION/FOLDER, without '..'")
    _, name, revision, inside = found.groups()
    try:
        from huggingface_hub import HfApi, hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
    except ImportError as error:
        raise CheckpointError(f"{location}: needs the package huggingface_hub; pip install 'saeforge[hub]'") from error
    patterns = [pattern for format in formats for pattern in format.files]
    failures: tuple[type[BaseException], ...] = (*no_answer(), HFValidationError, ValueError)
    try:
        files = HfApi().list_repo_files(name, revision=revision)
        wanted = _wanted(files, inside or "", patterns)
        if not wanted:
            raise CheckpointError(_nothing(location, files, inside or ""))
        places = [Path(hf_hub_download(name, file, revision=revision)) for file in wanted]
    except failures as error:
        # What the hub answers is so; where it does not answer, what was fetched before serves.
        answered = isinstance(error, HfHubHTTPError) and error.response.status_code < 500
        snapshot = None if answered else _cached(name, revision)
        files = [] if snapshot is None else sorted(f.relative_to(snapshot).as_posix() for f in snapshot.rglob("*.*"))
        wanted = _wanted(files, inside or "", patterns)
        if snapshot is None or not wanted:
            reason = " ".join(str(error).split())[:300]
            raise CheckpointError(
                f"{location}: the hub does not give it ({reason}); check name, login and network"
            ) from error
        if not isinstance(error, OfflineModeIsEnabled):  # which asks for just this
            warnings.warn(f"{location}: the hub cannot be reached; the copy in its cache is used", stacklevel=2)
        places = [snapshot / file for file in wanted]
    if inside in files:
        return places[wanted.index(inside)]
    up = len(PurePosixPath(wanted[0]).relative_to(inside or ".").parts)
    return places[0].parents[up - 1]


def no_answer() -> tuple[type[BaseException], ...]:
    """What the hub raises where it does not answer, and what its answers that are errors derive from.

    The package that huggingface_hub is built on (httpx, requests before version 1) has errors of its own for that.
    """
    from huggingface_hub.errors import HfHubHTTPError

    return (OSError, *(base for base in HfHubHTTPError.__bases__ if issubclass(base, BaseException)))


def _cached(name: str, revision: str | None) -> Path | None:
    """The folder of a repository's revision (branch, tag, commit or its beginning) in the cache; None without one."""
    from huggingface_hub import constants, scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repos = scan_cache_dir(constants.HF_HUB_CACHE).repos
    except CacheNotFound:
        return None
    wanted = revision or "main"
    for repo in repos:
        if repo.repo_type == "model" and repo.repo_id == name:
            for known in repo.revisions:
                if wanted in known.refs or (len(wanted) >= 7 and known.commit_hash.startswith(wanted)):
                    return Path(known.snapshot_path)
    return None


def _wanted(files: Sequence[str], inside: str, patterns: Sequence[str]) -> list[str]:
    """The files to download: those in the folder that a pattern names, or the one file, and JSON and YAML beside it."""
    if inside in files:
        beside = PurePosixPath(inside).parent
        return [
            f for f in files if f == inside or (PurePosixPath(f).parent == beside and f.endswith((".json", ".yaml")))
        ]
    wanted = []
    for file in files:
        if ".." in PurePosixPath(file).parts or (inside and not file.startswith(f"{inside}/")):
            continue
        rest = PurePosixPath(file).relative_to(inside or ".")
        # A pattern has as many parts as what it names: `*` does not reach into folders, as it would in fnmatch.
        for pattern in map(PurePosixPath, patterns):
            parts = list(zip(rest.parts, pattern.parts, strict=False))
            if len(rest.parts) == len(pattern.parts) and all(fnmatchcase(part, like) for part, like in parts):
                wanted.append(file)
                break
    return wanted


def _nothing(location: str, files: Sequence[str], inside: str) -> str:
    folders = sorted({str(PurePosixPath(file).parent) for file in files if file.startswith(inside)} - {"."})
    some = f"; it has the folders {', '.join(folders[:5])}{', ...' if len(folders) > 5 else ''}" if folders else ""
    return f"{location} holds no SAE's files{some}; give the folder, or the file, of one SAE"
