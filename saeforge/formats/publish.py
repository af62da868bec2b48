"""`push`: the SAEs of a RUN, their figures and a model card into a repository of the HuggingFace hub, in one commit."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from saeforge import formats
from saeforge.errors import CheckpointError, ConfigError, SaeforgeError
from saeforge.formats.card import MARK, Shared, as_json, model_card, without_folders
from saeforge.formats.hub import no_answer
from saeforge.sae import META_FILE, WEIGHTS_FILE
from saeforge.sae import load as load_own

CARD = "README.md"
EVALUATION = "evaluation.json"
OWN = "native"
_REPO = re.compile(r"[\w.-]+/[\w.-]+")
_HEAD = re.compile(r"\A---\s*\n.*?\n---\s*(\n|\Z)", re.DOTALL)
_UNSAFE = re.compile(r"(^|/)(\.{0,2})(/|$)|\\")


@dataclass(frozen=True)
class Pushed:
    """What was, or would be, uploaded.

    Attributes:
        repo: `USER/NAME`.
        location: what `saeforge.load` takes: of the SAE, or the folder of several.
        sizes: of the files, in bytes, by their place in the repository.
        card: the model card.
        members: folders of the SAEs below the one that was pushed to; [""] for a single SAE.
        commit: address of the commit; None where nothing was uploaded.
        notes: what the user should know.
    """

    repo: str
    location: str
    sizes: dict[str, int]
    card: str
    members: list[str]
    commit: str | None = None
    notes: list[str] = field(default_factory=list)


def push(
    run: str | Path,
    repo: str,
    *,
    path: str = "",
    revision: str | None = None,
    private: bool = False,
    license: str | None = None,
    format: str = OWN,
    message: str | None = None,
    dry_run: bool = False,
) -> Pushed:
    """Uploads the SAE of a RUN folder, or all SAEs of a sweep, to the HuggingFace hub, in one commit.

    The repository is made if there is none. Absolute paths of this disk in what the SAEs say of their origin are cut to
    their last names. A README.md there that saeforge did not make stays.

    Args:
        run: RUN folder, or an `sae/` folder.
        repo: `USER/NAME` of a model repository.
        path: folder inside it; default: its top.
        revision: branch, made if there is none; default: main.
        private: make the repository private; refused where it is public already.
        license: identifier for the card, like `apache-2.0`.
        format: of the files: native, or what `saeforge export --to` takes.
        message: of the commit.
        dry_run: collect and check everything, upload nothing.

    Raises:
        CheckpointError: no SAE there, or a damaged one.
        ConfigError: no such repository name, folder or format; not logged in, or not allowed.
        SaeforgeError: the hub cannot be reached or refuses.
    """
    if not _REPO.fullmatch(repo) or ".." in repo or "--" in repo:
        raise ConfigError(f"repo {repo!r}: expected USER/NAME of letters, digits, '-', '_' and '.'")
    path = path.strip("/")
    if path and _UNSAFE.search(path):
        raise ConfigError(f"path {path!r}: expected a folder inside the repository like layer_12/topk, without '..'")
    places = _places(Path(run))
    members = [_shared(name, folder) for name, folder in places.items()]
    card = model_card(members, repo=repo, folder=path, revision=revision, license=license)
    location = "/".join(part for part in (f"hf://{repo}{f'@{revision}' if revision else ''}", path) if part)
    with tempfile.TemporaryDirectory() as work:
        files: dict[str, bytes | Path] = {}
        for member, (name, folder) in zip(members, places.items(), strict=True):
            for file, content in _files(member, folder, format, Path(work) / (name or "sae")).items():
                files["/".join(part for part in (path, name, file) if part)] = content
        files["/".join(part for part in (path, CARD) if part)] = card.encode()
        pushed = Pushed(repo, location, _sizes(files), card, list(places))
        if dry_run:
            return pushed
        said = message or f"Upload {len(members)} SAE{'s' if len(members) > 1 else ''} with saeforge"
        return _upload(pushed, files, path, revision, private, said)


def card_of(run: str | Path, *, repo: str | None = None, path: str = "", license: str | None = None) -> str:
    """The model card of a RUN, as `push` would write it; needs no network.

    Args:
        run: RUN folder, or an `sae/` folder.
        repo: for the lines of use; default: a place to fill in.
        path: folder inside it.
        license: identifier for the card.

    Raises:
        CheckpointError: no SAE there, or a damaged one.
    """
    members = [_shared(name, folder) for name, folder in _places(Path(run)).items()]
    return model_card(members, repo=repo or "USER/NAME", folder=path.strip("/"), license=license)


def write_card(card: str, place: Path) -> Path:
    """Writes a card whole, or not at all.

    Raises:
        CheckpointError: the disk refused.
    """
    part = place.with_name(f".{place.name}.part-{os.getpid()}")
    try:
        part.write_text(card, encoding="utf-8")
        part.replace(place)
    except OSError as error:
        raise CheckpointError(f"could not write {place}: {error}; choose another --out") from error
    finally:
        part.unlink(missing_ok=True)
    return place


def _places(run: Path) -> dict[str, Path]:
    """Name below the card, and folder, of each SAE of a RUN."""
    if not (run / META_FILE).is_file() and not (run / "sae" / META_FILE).is_file():
        several = {file.parents[1].name: file.parent for file in sorted(run.glob(f"*/sae/{META_FILE}"))}
        if several:
            return several
    if (run / "sae" / META_FILE).is_file():
        return {"": run / "sae"}
    if run.is_dir() and not (run / META_FILE).is_file() and not (run / "checkpoints").is_dir():
        raise CheckpointError(f"no SAE of saeforge in {run}; another tool's becomes a RUN by `saeforge import`")
    return {"": run}


def _shared(name: str, folder: Path) -> Shared:
    """An SAE that was read whole, so that nothing damaged is shared, and its figures."""
    sae = load_own(folder)
    sae.meta = without_folders(sae.meta)
    place = folder.parent / EVALUATION
    if folder.name != "sae" or not place.is_file():
        return Shared(name, sae, None)
    try:
        evaluation = json.loads(place.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{place} is damaged ({error}); run `saeforge evaluate {folder.parent}` again") from error
    if not isinstance(evaluation, dict):
        raise CheckpointError(f"{place} holds no figures; run `saeforge evaluate {folder.parent}` again")
    return Shared(name, sae, without_folders(evaluation))


def _files(member: Shared, folder: Path, format: str, work: Path) -> dict[str, bytes | Path]:
    """What goes up for one SAE."""
    found: dict[str, bytes | Path]
    if format == OWN:
        found = {META_FILE: as_json(json.loads((folder / META_FILE).read_bytes())), WEIGHTS_FILE: folder / WEIGHTS_FILE}
    else:
        written = formats.write(member.sae, work, format)
        found = {str(p.relative_to(written)): p for p in sorted(written.rglob("*")) if p.is_file()}
    if member.evaluation is not None:
        found[EVALUATION] = as_json(member.evaluation)
    return found


def _sizes(files: dict[str, bytes | Path]) -> dict[str, int]:
    return {name: len(part) if isinstance(part, bytes) else part.stat().st_size for name, part in files.items()}


def _upload(
    pushed: Pushed, files: dict[str, bytes | Path], path: str, revision: str | None, private: bool, message: str
) -> Pushed:
    repo, notes = pushed.repo, []
    with hub_errors(repo) as hub:
        if hub.get_token() is None:
            raise ConfigError(
                f"{repo}: not logged in to the hub; `hf auth login`, or set HF_TOKEN to a token that writes"
            )
        api = hub.HfApi()
        api.create_repo(repo, private=private, exist_ok=True)
        if private and not api.repo_info(repo).private:
            raise ConfigError(f"{repo} is public already, and --private was asked for; choose another --repo")
        if revision is not None:
            api.create_branch(repo, branch=revision, exist_ok=True)
        card = "/".join(part for part in (path, CARD) if part)
        if api.file_exists(repo, card, revision=revision):
            there = Path(api.hf_hub_download(repo, card, revision=revision)).read_text(encoding="utf-8")
            # The hub makes one of front matter alone with a new repository's license; a person's has a text.
            if MARK not in there and _HEAD.sub("", there).strip():
                del files[card]
                notes.append(
                    f"{card} of {repo} was not made here and stays; `saeforge card` prints the one for this RUN"
                )
        operations = [
            hub.CommitOperationAdd(name, content if isinstance(content, bytes) else str(content))
            for name, content in files.items()
        ]
        done = api.create_commit(repo, operations, commit_message=message, revision=revision)
        commit = str(done.commit_url)
    return Pushed(repo, pushed.location, _sizes(files), pushed.card, pushed.members, commit, notes)


@contextmanager
def hub_errors(repo: str) -> Iterator[Any]:
    """The package huggingface_hub, its errors in one line that says what to do.

    Raises:
        ConfigError: it is not installed; not logged in, not allowed, no such repository.
        SaeforgeError: the hub cannot be reached, or fails.
    """
    try:
        import huggingface_hub as hub
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
    except ImportError as error:
        raise ConfigError(f"{repo}: needs the package huggingface_hub; pip install 'saeforge[hub]'") from error
    failures: tuple[type[BaseException], ...] = (*no_answer(), RuntimeError, ValueError)
    try:
        yield hub
    except failures as error:
        cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ is not None else error
        if isinstance(cause, HFValidationError):
            raise ConfigError(f"{repo}: {_line(cause)}") from error
        if isinstance(cause, OfflineModeIsEnabled):
            raise ConfigError(f"{repo}: HF_HUB_OFFLINE is set; unset it to reach the hub, or use --dry-run") from error
        if isinstance(cause, HfHubHTTPError):
            raise _refusal(repo, cause.response.status_code, cause) from error
        if isinstance(cause, RuntimeError | ValueError):
            raise SaeforgeError(f"{repo}: the upload failed ({_line(cause)}); nothing was committed") from error
        raise SaeforgeError(
            f"{repo}: the hub cannot be reached ({_line(cause)}); check the network and try again"
        ) from error


def _refusal(repo: str, status: int, error: Exception) -> SaeforgeError:
    if status == 401:
        return ConfigError(f"{repo}: the hub does not know this token; `hf auth login`, or set HF_TOKEN to a valid one")
    if status == 403:
        return ConfigError(
            f"{repo}: this token may not write there ({_line(error)}); use one that may write for "
            f"{repo.split('/')[0]}, or another --repo"
        )
    if status == 404:
        return ConfigError(
            f"{repo}: the hub has no such repository for this token; check the name and `hf auth whoami`"
        )
    return SaeforgeError(f"{repo}: the hub refuses ({_line(error)}); nothing was committed, try again later")


def _line(error: BaseException) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:200]
