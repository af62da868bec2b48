"""Checkpoints without a layout: what ranks hold of the latents is written by each of them and read by rows.

Where latents are shared out, RUN/checkpoints/last.ckpt holds all that has no latents and names a folder beside it,
last.ckpt.parts-<token>, that torch.distributed.checkpoint wrote: of every tensor with a row for each latent (weights,
moments, averages, counters) its shape and rows, whoever held them. The folder is renamed into place when it is whole,
and the file replaced after it: a killed run leaves the file of before with its own folder. Where every rank has all
latents the file holds everything. Either is read on any layout, each rank taking the rows that it will hold.
"""

from __future__ import annotations

import copy
import glob
import json
import os
import pickle
import shutil
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import StorageMeta, TensorStorageMetadata
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from saeforge.errors import CheckpointError
from saeforge.ops import Group
from saeforge.training.mesh import Mesh

#: Of a checkpoint: the tensors by their place (JSON), until they are written; then the name of their folder.
PARTS = "latent_parts"

#: Where a tensor lies in a checkpoint: keys of dicts and places in lists.
Place = tuple[str | int, ...]
Result = TypeVar("Result")


def take_out(checkpoint: dict[str, Any], places: Iterable[Place]) -> dict[str, Tensor]:
    """Takes tensors out of a checkpoint, by the name that they get in the folder.

    What lies above them is copied: an optimizer gives out the very dicts that it works with.
    """
    parts = {}
    for place in places:
        node: Any = checkpoint
        for key in place[:-1]:
            node[key] = copy.copy(node[key])
            node = node[key]
        parts[json.dumps(place)] = node.pop(place[-1])
    return parts


def write(parts: dict[str, Tensor], path: Path, name: str, mesh: Mesh) -> None:
    """Writes the parts of all ranks into the folder `name` beside a checkpoint; every rank must call it.

    Args:
        parts: this rank's rows; ranks of data hold equal ones, and share the writing.
        path: of the checkpoint. name: of the folder, from `new_name`.
        mesh: of the run.

    Raises:
        CheckpointError: the disk refused; the previous checkpoint is intact.
    """
    assert mesh.devices is not None
    unfinished, first = path.with_name(f".{name}.part"), mesh.data.rank == mesh.latents.rank == 0
    whole = {key: _distributed(rows, mesh.devices) for key, rows in parts.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        planner = dcp.DefaultSavePlanner(flatten_state_dict=False)
        dcp.save(whole, storage_writer=dcp.FileSystemWriter(unfinished), planner=planner)
        if first:
            unfinished.rename(path.with_name(name))
    except (dcp.api.CheckpointException, OSError, RuntimeError) as error:
        if first:
            shutil.rmtree(unfinished, ignore_errors=True)
        raise CheckpointError(
            f"could not write the checkpoint {path}: {_reason(error)}; free space and resume with --ckpt_path last"
        ) from error


def new_name(path: Path) -> str:
    """A name for a folder that no checkpoint has yet; one rank makes it for all."""
    return f"{path.name}.parts-{os.urandom(4).hex()}"


def remove_others(path: Path, kept: str | None) -> None:
    """Removes the folders beside a checkpoint that it does not name (any more), and what was never finished."""
    name = glob.escape(path.name)
    for found in (*path.parent.glob(f"{name}.parts-*"), *path.parent.glob(f".{name}.parts-*.part")):
        if found.name != kept:
            shutil.rmtree(found, ignore_errors=True)  # it costs space alone, and the next checkpoint tries again


def put_in(checkpoint: dict[str, Any], folder: Path, mesh: Mesh) -> None:
    """Reads what a folder holds back to its place in the checkpoint: all rows, or those of this rank's latents.

    Raises:
        CheckpointError: damaged, or latents that do not divide among the ranks.
    """

    def read() -> None:
        reader = _Reader(folder)
        into = {
            key: _room(meta, mesh)
            for key, meta in reader.read_metadata().state_dict_metadata.items()
            if isinstance(meta, TensorStorageMetadata)
        }
        with warnings.catch_warnings():  # each rank reads for itself, which is meant
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            planner = dcp.DefaultLoadPlanner(flatten_state_dict=False)
            dcp.load(into, storage_reader=reader, planner=planner, no_dist=True)
        for key, tensor in into.items():
            node: Any = checkpoint
            *above, last = json.loads(key)
            for step in above:
                node = node[step]
            node[last] = tensor.to_local() if isinstance(tensor, DTensor) else tensor

    _checked(read, folder)


def own_rows(checkpoint: dict[str, Any], places: Iterable[Place], latents: Group) -> None:
    """Cuts the tensors of a checkpoint that holds all latents to the rows of this rank.

    Raises:
        CheckpointError: latents that do not divide among the ranks.
    """
    for place in places:
        node: Any = checkpoint
        for key in place[:-1]:
            node = node[key]
        here = _share(node[place[-1]].shape[0], latents)
        node[place[-1]] = node[place[-1]][latents.rank * here : (latents.rank + 1) * here].clone()


def _share(n: int, latents: Group) -> int:
    if n % latents.size:
        raise CheckpointError(
            f"the checkpoint's {n} latents do not divide among {latents.size} ranks; set trainer.latents to a divisor"
        )
    return n // latents.size


def _distributed(rows: Tensor, devices: DeviceMesh) -> DTensor:
    """The tensor that these are a rank's rows of."""
    return DTensor.from_local(rows.detach(), devices, [Replicate(), Shard(0)], run_check=False)


def _room(meta: TensorStorageMetadata, mesh: Mesh) -> Tensor:
    """Memory on the host for a stored tensor, or for this rank's rows of it."""
    n, *rest = meta.size
    rows = torch.empty(_share(n, mesh.latents), *rest, dtype=meta.properties.dtype)
    if mesh.latents.size == 1:
        return rows
    given = mesh.devices
    assert given is not None
    # The same ranks, but the rows stay on the host, whatever the ranks' devices are.
    host = DeviceMesh.from_group(given.get_all_groups(), "cpu", mesh=given.mesh, mesh_dim_names=given.mesh_dim_names)
    return _distributed(rows, host)


class _Reader(dcp.FileSystemReader):
    """One that makes nothing but descriptions of tensors out of the folder's pickled file."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
        with (Path(self.path) / ".metadata").open("rb") as file:
            metadata = _Unpickler(file).load()
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


_OF_TENSORS = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")
_OF_PATHS = ("pathlib", "pathlib._local")


class _Unpickler(pickle.Unpickler):
    """Classes that describe tensors, files' names and torch's types; nothing else is as much as imported."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch.serialization", "_get_layout"):  # of a name, without effect
            return super().find_class(module, name)
        if module in (*_OF_TENSORS, *_OF_PATHS, "torch") and "." not in name:
            found = super().find_class(module, name)
            described = isinstance(found, type) and found.__module__ == module
            if found is torch.Size or isinstance(found, torch.dtype) or (module != "torch" and described):
                return found
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def _checked(read: Callable[[], Result], folder: Path) -> Result:
    try:
        return read()
    except CheckpointError:
        raise
    except Exception as error:  # torch, zip and pickle raise their own, undocumented set of types
        raise CheckpointError(
            f"the checkpoint's part {folder} cannot be read ({_reason(error)}); give another checkpoint"
        ) from error


def _reason(error: BaseException) -> str:
    """The first cause, in a line: torch wraps what each rank raised."""
    if isinstance(error, dcp.api.CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return (" ".join(str(error).split()) or type(error).__name__)[:300]
