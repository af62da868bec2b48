"""SAEs of other tools: read theirs, write ours, without those tools installed.

A format is a plugin of the group `saeforge.formats`. Nothing here unpickles: `.pt` files are read with
`weights_only=True`, `.npz` files without pickle, JSON and safetensors as what they are.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from saeforge.errors import CheckpointError, ConfigError
from saeforge.formats.stored import Stored
from saeforge.sae import META_FILE, SAE
from saeforge.sae import load as load_own

if TYPE_CHECKING:
    import torch

    from saeforge.formats.base import Format

AUTO = "auto"


def load(path: str | Path, *, device: str | torch.device = "cpu") -> SAE:
    """The SAE of a RUN folder, an `sae/` folder, or a folder or file that another tool wrote.

    Args:
        path: on disk, or `hf://USER/NAME[@REVISION][/FOLDER]`.
        device: where its weights go.

    Raises:
        CheckpointError: no SAE there, a damaged one, or one of a format that is not known.
        ConfigError: an SAE that the plain `SAE` cannot express; the message says why.
    """
    folder = Path(path)
    if str(path).startswith("hf://"):
        return read(path).to(device)
    if folder.exists() and not _is_native(folder) and any(f.recognises(folder) for f in _formats()[0].values()):
        return read(path).to(device)
    return load_own(folder, device=device)  # which says best what is missing


def read(path: str | Path, format: str = AUTO) -> SAE:
    """Reads an SAE in a format.

    Args:
        path: on disk, or `hf://USER/NAME[@REVISION][/FOLDER]`.
        format: name of a format, or "auto": the one that recognises the path.

    Returns:
        The SAE, on the CPU, in float32; `meta["imported"]` says where it came from, in that tool's words.

    Raises:
        CheckpointError: missing, damaged, or recognised by no format.
        ConfigError: what it computes cannot be expressed; the message says why.
    """
    name, place, chosen = _located(path, format)
    sae = chosen.read(place)
    sae.meta.setdefault("imported", {}).update(format=name, path=str(path))
    return sae


def write(sae: SAE, path: str | Path, format: str) -> Path:
    """Writes an SAE in a format.

    Args:
        sae: to be written.
        path: the folder; made, and must hold no files of another SAE.
        format: name of a format that writes.

    Returns:
        The folder.

    Raises:
        ConfigError: the format only reads, or cannot express this SAE; the message says why.
        CheckpointError: the folder is not empty, or the disk refused.
    """
    chosen = _format(format)
    folder = _free(path)
    chosen.check(sae)
    return _whole(folder, lambda part: chosen.write(sae, part))


def write_set(saes: Iterable[SAE], path: str | Path, format: str) -> Path:
    """Writes the SAEs of all layers of a model in a format that holds them together.

    Args:
        saes: gone through several times: a list, or `Stored`, which loads them one at a time.
        path: the folder; made, and must hold no files of another SAE.
        format: name of such a format: circuit-tracer.

    Returns:
        The folder.

    Raises:
        ConfigError: the format holds one SAE only, or cannot express these; the message says why.
        CheckpointError: the folder is not empty, or the disk refused.
    """
    from saeforge.formats.base import SetFormat

    chosen = _format(format)
    if not isinstance(chosen, SetFormat):
        raise ConfigError(f"{chosen.title} holds one SAE in a folder; write each in a folder of its own")
    folder = _free(path)
    chosen.check_set(saes)
    return _whole(folder, lambda part: chosen.write_set(saes, part))


def holds_sets(format: str) -> bool:
    """Whether a folder of that format holds the SAEs of all layers together."""
    from saeforge.formats.base import SetFormat

    return isinstance(_format(format), SetFormat)


def notes(sae: SAE, format: str) -> list[str]:
    """What a person should know who loads this SAE where the format is from; [] mostly."""
    return _format(format).notes(sae)


def _free(path: str | Path) -> Path:
    folder = Path(path)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder} already holds something; choose another --out or empty it")
    return folder


def _whole(folder: Path, write: Callable[[Path], None]) -> Path:
    """Writes into a folder beside, then renames it: nobody finds half of an export."""
    part = folder.with_name(f".{folder.name}.part-{os.getpid()}")
    try:
        part.mkdir(parents=True)
        write(part)
        part.replace(folder)  # over an empty folder too
    except (OSError, RuntimeError, SafetensorError) as error:  # torch reports a full disk as RuntimeError
        raise CheckpointError(f"could not write {folder}: {error}; free space or choose another folder") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder


def _located(path: str | Path, name: str) -> tuple[str, Path, Format]:
    """The format and the place on disk; a place on the hub is fetched first."""
    chosen = None if name == AUTO else _format(name)
    if str(path).startswith("hf://"):
        from saeforge.formats import hub

        place = hub.fetch(str(path), [chosen] if chosen else list(_formats()[0].values()))
    else:
        place = Path(path)
    if not place.exists():
        raise CheckpointError(f"{path} does not exist; expected a folder or file that holds an SAE")
    if chosen is not None:
        return name, place, chosen
    known, broken = _formats()
    found = {name: format for name, format in known.items() if format.recognises(place)}
    if len(found) == 1:
        return next((name, place, format) for name, format in found.items())
    if found:
        raise CheckpointError(f"{path} looks like {' and like '.join(found)}; say which with --from")
    raise CheckpointError(
        f"{path} is in no known format ({', '.join(known)}); give the folder that holds the weights, or --from"
        + "".join(f"; {line}" for line in broken)
    )


def _format(name: str) -> Format:
    from saeforge.registry import FORMATS

    format: Format = FORMATS.load(name)()
    return format


def _formats() -> tuple[dict[str, Format], list[str]]:
    """Every format that loads, and one line for each that does not: a broken plugin hides no other format."""
    from saeforge.errors import PluginError
    from saeforge.registry import FORMATS

    found, broken = {}, []
    for name in dict.fromkeys(record.name for record in FORMATS.records()):
        try:
            found[name] = _format(name)
        except PluginError as error:
            broken.append(str(error))
    return found, broken


def _is_native(folder: Path) -> bool:
    """Whether it is a folder of saeforge's own; without an import of any other format, that is."""
    return (
        (folder / META_FILE).exists() or any(folder.glob(f"sae/{META_FILE}")) or any(folder.glob(f"*/sae/{META_FILE}"))
    )


__all__ = ["AUTO", "Stored", "holds_sets", "load", "notes", "read", "write", "write_set"]
