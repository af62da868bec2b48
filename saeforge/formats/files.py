"""Reading files of strangers: plain tensors and JSON or one clear error; nothing in them is ever run."""

from __future__ import annotations

import json
import math
import pickle
import warnings
import zipfile
import zlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError, safe_open
from torch import Tensor

from saeforge.errors import CheckpointError

#: A configuration is a few kilobytes; what is larger is no configuration.
LARGEST_JSON = 16 << 20
#: An archive may unpack to so many times its size; up to `SMALL` bytes to anything.
LARGEST_GROWTH, SMALL = 100, 1 << 28
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        CheckpointError: missing, too large, or no JSON object.
    """
    _of_a_configuration(path)
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is no JSON ({_line(error)}); fetch it again") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} holds a JSON {type(found).__name__}, expected an object")
    return found


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file, of plain values: a tag that would make an object is refused.

    Raises:
        CheckpointError: missing, too large, or no YAML mapping.
    """
    _of_a_configuration(path)
    try:
        text = path.read_bytes()
        # Ten lines of them stand for a billion values as soon as one is printed.
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=yaml.SafeLoader)):
            raise ValueError("it has aliases")
        found = yaml.safe_load(text)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise CheckpointError(f"{path} is no plain YAML ({_line(error)}); fetch it again") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} holds a YAML {type(found).__name__}, expected a mapping")
    return {str(key): value for key, value in found.items()}


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file.

    Raises:
        CheckpointError: missing or damaged.
    """
    _there(path)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{path} is no safetensors file, or a damaged one ({_line(error)})") from error


def read_torch(path: Path) -> dict[str, Any]:
    """The dictionary that `torch.save` wrote, of tensors and plain values.

    `weights_only` admits a fixed list of tensor types; any other object in the file, and so any code, is refused.

    Raises:
        CheckpointError: missing, damaged, or with anything else in it.
    """
    _there(path)
    _check_size(path)
    try:
        with warnings.catch_warnings():  # about pickle protocols, before it refuses or reads the file
            warnings.simplefilter("ignore", UserWarning)
            found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} holds more than tensors, and none of it was run ({_line(error)}); save its state_dict alone"
        ) from error
    except (OSError, ValueError, RuntimeError, EOFError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise CheckpointError(f"{path} is no file of torch.save, or a damaged one ({_line(error)})") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} holds a {type(found).__name__}, expected a dictionary of tensors")
    return {str(name): value for name, value in found.items()}


def read_npz(path: Path) -> dict[str, Tensor]:
    """All arrays of an .npz file; arrays of Python objects, which numpy would unpickle, are refused.

    Raises:
        CheckpointError: missing, damaged, or with such objects.
    """
    import numpy as np

    _there(path)
    _check_size(path)
    try:
        with path.open("rb") as opened:  # by us: numpy leaves it open where it is damaged
            file = np.load(opened, allow_pickle=False)
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise ValueError("it is a single array")
            return {name: torch.from_numpy(np.ascontiguousarray(file[name])) for name in file.files}
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error, MemoryError) as error:
        raise CheckpointError(f"{path} is no .npz of plain arrays, or a damaged one ({_line(error)})") from error


def take(
    path: Path, found: Mapping[str, Any], names: Collection[str], *, optional: Collection[str] = ()
) -> dict[str, Tensor]:
    """The tensors that a format knows; scalars and vectors and matrices of floats.

    Args:
        path: for messages.
        found: what the file holds.
        names: that must be there.
        optional: that may be there, of any type.

    Raises:
        CheckpointError: one is missing, or is no tensor of floats, or the file holds more: reading on would mean to
            leave out something that the other tool uses.
    """
    missing = sorted(set(names) - found.keys())
    more = sorted(found.keys() - set(names) - set(optional))
    if missing or more:
        faults = [f"lacks {', '.join(missing)}"] if missing else []
        faults += [f"has {', '.join(more)} too, which is not known here"] if more else []
        raise CheckpointError(f"{path} {' and '.join(faults)}; expected {', '.join(sorted(names))}")
    for name in names:
        if not isinstance(found[name], Tensor) or found[name].dtype not in FLOATS:
            kind = found[name].dtype if isinstance(found[name], Tensor) else type(found[name]).__name__
            raise CheckpointError(f"{path}: {name} is {kind}, expected a tensor of floats")
        if not _is_whole(found[name]):
            raise CheckpointError(
                f"{path}: {name} is no plain tensor (sparse, without data, or a few values said to be many); save it "
                "as a contiguous one"
            )
    return {name: found[name] for name in names}


def shaped(path: Path, name: str, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The tensor, if it has that shape.

    Raises:
        CheckpointError: it has another.
    """
    if tuple(tensor.shape) != shape:
        raise CheckpointError(f"{path}: {name} has shape {tuple(tensor.shape)}, expected {shape}")
    return tensor


def matrix(path: Path, name: str, tensor: Tensor) -> Tensor:
    """The tensor, if it is a matrix.

    Raises:
        CheckpointError: it is none.
    """
    if tensor.ndim != 2 or 0 in tensor.shape:
        raise CheckpointError(f"{path}: {name} has shape {tuple(tensor.shape)}, expected a matrix")
    return tensor


def number(path: Path, config: Mapping[str, Any], key: str, kind: type[int] | type[float]) -> Any:
    """A number of a configuration; True is none.

    Raises:
        CheckpointError: missing, or something else.
    """
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, (int,) if kind is int else (int, float)):
        raise CheckpointError(f"{path}: {key} is {value!r}, expected {'a whole number' if kind is int else 'a number'}")
    try:
        finite = math.isfinite(value)
    except OverflowError:  # a whole number that no float holds
        finite = False
    if not finite:
        raise CheckpointError(f"{path}: {key} is {str(value)[:20]}, expected a finite number")
    return kind(value)


def _is_whole(tensor: Tensor) -> bool:
    """Whether each of its values stands in the file: a stride of 0 would have a kilobyte fill the memory."""
    plain = tensor.layout == torch.strided and tensor.device.type != "meta"
    return plain and tensor.untyped_storage().nbytes() >= tensor.numel() * tensor.element_size()


def _check_size(path: Path) -> None:
    """Refuses an archive that would grow a hundredfold: weights hardly compress.

    Raises:
        CheckpointError: it would.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            whole = sum(part.file_size for part in archive.infolist())
    except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError):
        return  # no archive, or a damaged one: whoever reads it says so
    if whole > LARGEST_GROWTH * path.stat().st_size and whole > SMALL:
        raise CheckpointError(
            f"{path} has {path.stat().st_size:,} bytes and unpacks to {whole:,}; no weights are like that"
        )


def _of_a_configuration(path: Path) -> None:
    _there(path)
    if path.stat().st_size > LARGEST_JSON:
        raise CheckpointError(f"{path} has {path.stat().st_size:,} bytes; a configuration has a few thousand")


def _there(path: Path) -> None:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; give the folder that holds it, whole")


def _line(error: BaseException) -> str:
    """The first sentence of a message; torch's run over a page and advise to unpickle."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text.split(". ")[0][:200]
