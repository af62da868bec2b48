"""Where blocks come from: one small interface, and two sources behind it (shards on disk, tensors in memory)."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from saeforge.data.alignment import check_aligned
from saeforge.data.batch import Batch
from saeforge.data.choice import Choice, Place, SitesWanted, choose
from saeforge.data.manifest import Manifest, SiteRecord, sha256_json
from saeforge.data.moments import Moments, Statistics
from saeforge.data.plan import permutation
from saeforge.data.shards import ActivationDataset, load_manifest
from saeforge.data.storage import open_storage
from saeforge.errors import ConfigError, DatasetError

MIN_BLOCK_ROWS = 16

#: Tensors side by side, (rows, width) each: row i of all of them belongs to one token.
Rows = tuple[Tensor, ...]


@dataclass(frozen=True)
class Pair:
    """What one SAE learns from a source.

    Attributes:
        name: of the SAE among those that train together; "" where there is one.
        inputs: numbers of the tensors that it reads, side by side: one, or several for a crosscoder.
        targets: numbers of those that it reconstructs; the same ones for an SAE, others for a transcoder.
        identity: where the rows come from (model, site, target, dataset), as plain JSON values.
        unit: neighbouring rows that belong together (`BlockSource.unit`).
    """

    name: str
    inputs: tuple[int, ...]
    targets: tuple[int, ...]
    identity: dict[str, Any]
    unit: int = 1

    def batch(self, rows: Rows) -> Batch:
        """The batch of this SAE; `target` is the same tensor as `x` where it reconstructs its input."""
        x = _beside([rows[number] for number in self.inputs])
        target = x if self.targets == self.inputs else _beside([rows[number] for number in self.targets])
        if self.unit == 1:
            return Batch(x, target)
        return Batch(x, target, group=torch.arange(len(x), device=x.device) // self.unit)

    def widths(self, source: BlockSource) -> tuple[int, int]:
        """d_in and d_out."""
        d_in, d_out = (sum(source.widths[number] for number in numbers) for numbers in (self.inputs, self.targets))
        return d_in, d_out

    def statistics(self, source: BlockSource) -> tuple[Statistics, Statistics]:
        """Of the input and of the target."""
        x, target = (
            Statistics.beside([source.statistics[number] for number in numbers])
            for numbers in (self.inputs, self.targets)
        )
        return x, target


def _beside(parts: Sequence[Tensor]) -> Tensor:
    """(rows, sum of widths); a single part is itself."""
    if len(parts) == 1:
        return parts[0]
    dtype = parts[0].dtype if all(part.dtype == parts[0].dtype for part in parts) else torch.float32
    return torch.cat([part.to(dtype) for part in parts], dim=1)


class BlockSource(Protocol):
    """Blocks of activation rows, all of one split equally long. Reading is safe from several threads at once.

    Attributes:
        widths: of each tensor of a block. dtypes: of each.
        statistics: of the training rows of each.
        pairs: which tensors train which SAE.
        unit: neighbouring rows that belong together and stay so, a power of two; 1: none do.
        fingerprint: changes whenever the data does.
    """

    widths: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]
    statistics: tuple[Statistics, ...]
    pairs: tuple[Pair, ...]
    unit: int
    fingerprint: str

    def n_blocks(self, split: str) -> int:
        """Number of blocks of "train" or "validation"; 0 if there is no such split."""

    def block_rows(self, split: str) -> int:
        """Rows of every block of a split."""

    def read_block(self, split: str, index: int, into: Rows | None = None) -> Rows:
        """The tensors of a block, on the CPU.

        Args:
            split: "train" or "validation".
            index: of the block.
            into: memory of these shapes and dtypes that receives the rows; None: the source's own, or new.
        """

    def sample(self, rows: int) -> Rows:
        """About `rows` training rows spread over the data, the same at every call and on every rank."""

    def counters(self) -> dict[str, float]:
        """What reading has met so far, for the logger: retries, bytes from a cache; empty if nothing can happen."""

    def close(self) -> None:
        """Lets go of what the source holds (a model, a lock); called once, when training is over."""


def empty_rows(source: BlockSource, rows: int, *, device: torch.device | None = None, pinned: bool = False) -> Rows:
    """Memory for `rows` rows of a source."""
    return tuple(
        torch.empty(rows, width, dtype=dtype, device=device, pin_memory=pinned)
        for width, dtype in zip(source.widths, source.dtypes, strict=True)
    )


def sample_blocks(source: BlockSource, rows: int) -> Rows:
    """About `rows` training rows: the first ones of at most 256 blocks that are spread evenly."""
    n_blocks, block_rows = source.n_blocks("train"), source.block_rows("train")
    chosen = np.linspace(0, n_blocks - 1, num=min(n_blocks, 256)).astype(int)
    take = max(1, min(block_rows, -(-rows // len(chosen))))
    parts = [source.read_block("train", block) for block in dict.fromkeys(int(block) for block in chosen)]
    return tuple(torch.cat([part[:take] for part in tensors]) for tensors in zip(*parts, strict=True))


class ShardSource:
    """Activation datasets on disk: one, or several of the same tokens in the same order.

    Args:
        path: the dataset's folder or URL; None where `input` and `target` name theirs.
        input: site to read (may be omitted if the dataset has one), or a list of sites side by side; see
            `saeforge.data.choice`.
        target: what to reconstruct (a transcoder), in the same way; None: the input.
        sites: instead of `input` and `target`, the sites that train an SAE each; names or patterns like `resid_post.*`.

    Raises:
        ConfigError: an input and target that do not fit each other.
        DatasetError: missing or damaged dataset, unknown site, datasets whose rows are not the same tokens.
    """

    def __init__(
        self,
        path: str | None,
        *,
        input: SitesWanted = None,
        target: SitesWanted = None,
        sites: Sequence[str] = (),
    ) -> None:
        manifests: dict[str, Manifest] = {}

        def load(folder: str) -> Manifest:
            if folder not in manifests:
                manifests[folder] = load_manifest(open_storage(folder))
            return manifests[folder]

        if sites and path is not None:
            wanted = [Place(path, load(path).site(site, root=path)) for site in match_sites(path, sites)]
            choices: tuple[Choice, ...] = tuple(Choice((place,), (place,)) for place in wanted)
        else:
            choices = choose(path, input, target, load)
        places = {place.key: place for choice in choices for place in (*choice.inputs, *choice.targets)}
        numbers = {key: number for number, key in enumerate(places)}
        self.datasets = [ActivationDataset.open(place.path, site=place.site.id) for place in places.values()]
        check_aligned(self.datasets)
        first = self.datasets[0]
        self.manifest = first.manifest
        fingerprints = list(dict.fromkeys(dataset.fingerprint for dataset in self.datasets))
        self.fingerprint = fingerprints[0] if len(fingerprints) == 1 else sha256_json(fingerprints)
        self.unit = int(self.manifest.shuffle.get("group_rows", 1))
        self.widths = tuple(dataset.d for dataset in self.datasets)
        self.dtypes = tuple(dataset.dtype for dataset in self.datasets)
        self.statistics = tuple(dataset.site.statistics for dataset in self.datasets)
        self.pairs = tuple(
            self._pair(*(tuple(numbers[place.key] for place in part) for part in (choice.inputs, choice.targets)))
            for choice in choices
        )
        if len(self.pairs) > 1:
            named = [short_name(self.datasets[pair.inputs[0]].site) for pair in self.pairs]
            self.pairs = tuple(replace(pair, name=name) for pair, name in zip(self.pairs, named, strict=True))

    def _pair(self, inputs: tuple[int, ...], targets: tuple[int, ...]) -> Pair:
        """One SAE, with what it will remember of its data."""
        used = [self.datasets[number] for number in dict.fromkeys(inputs + targets)]
        first, fingerprints = used[0], {dataset.fingerprint for dataset in used}
        common = {"dataset": self.fingerprint, "dataset_path": first.location}
        if len(inputs) == len(targets) == len(fingerprints) == 1:
            site, target = (describe_site(self.datasets[number].site) for number in inputs + targets)
            model = first.manifest.model
            described: dict[str, Any] = {
                "model": model,
                "site": site,
                "target": None if targets == inputs else target,
                **common,
            }
        else:
            models = [dataset.manifest.model for dataset in used]
            described = {
                "model": models[0] if all(model == models[0] for model in models) else None,
                "site": None,
                "target": None,
                "sources": [self._part(number) for number in inputs],
                "targets": None if targets == inputs else [self._part(number) for number in targets],
                **common,
            }
        return Pair("", inputs, targets, described, self.unit)

    def _part(self, number: int) -> dict[str, Any]:
        dataset = self.datasets[number]
        return {
            **describe_part(dataset.d, dataset.site.statistics),
            "model": dataset.manifest.model,
            "site": describe_site(dataset.site),
            "dataset": dataset.fingerprint,
            "dataset_path": dataset.location,
        }

    def n_blocks(self, split: str) -> int:
        """See `BlockSource`."""
        return self.datasets[0].n_blocks(split)

    def block_rows(self, split: str) -> int:
        """See `BlockSource`."""
        return self.datasets[0].block_rows(split)

    def read_block(self, split: str, index: int, into: Rows | None = None) -> Rows:
        """See `BlockSource`; checksums are verified at every read."""
        places = into or (None,) * len(self.datasets)
        pairs = zip(self.datasets, places, strict=True)
        return tuple(dataset.read_block(split, index, place) for dataset, place in pairs)

    def sample(self, rows: int) -> Rows:
        """See `BlockSource`."""
        return sample_blocks(self, rows)

    def counters(self) -> dict[str, float]:
        """See `BlockSource`."""
        counts = [dataset.counts for dataset in self.datasets]
        return {
            "retries": sum(count.retries for count in counts),
            "cache_gb": sum(count.cache_bytes for count in counts) / 1e9,
        }

    def close(self) -> None:
        """See `BlockSource`; no file is open."""


class TensorSource:
    """Rows in memory; the last share of a seeded permutation of blocks is held out for validation.

    Args:
        x: (n, d_in) tensor, array, or an iterable of such chunks; a tuple of these: sources side by side.
        target: (n, d_out) for a transcoder, in the same ways, or None.
        validation_share: share of rows held out.
        lanes: lanes of the plan that will read this; blocks are sized for it.
        unit: so many consecutive rows belong together and stay so when rows are shuffled: 1, 2, 4, 8 or 16.

    Raises:
        ConfigError: wrong shape, type or unit. DatasetError: NaN or infinite values, too few rows.
    """

    def __init__(
        self,
        x: Any,
        target: Any = None,
        *,
        validation_share: float = 0.1,
        lanes: int = 8,
        unit: int = 1,
    ) -> None:
        if unit not in (1, 2, 4, 8, 16):
            raise ConfigError(f"group_rows = {unit}: expected 1, 2, 4, 8 or 16")
        if not 0 <= validation_share < 1:
            raise ConfigError(f"validation_share = {validation_share}: expected a share from 0 up to, not including, 1")
        inputs = _sources(x, "X")
        targets = () if target is None else _sources(target, "target")
        self.x = inputs[0]
        if targets and len(targets[0]) != len(self.x):
            raise ConfigError(f"X has {len(self.x)} rows and target {len(targets[0])}; expected one target row per row")
        self.unit = unit
        self._tensors = inputs + targets
        self.widths = tuple(tensor.shape[1] for tensor in self._tensors)
        self.dtypes = tuple(tensor.dtype for tensor in self._tensors)
        rows = MIN_BLOCK_ROWS
        if len(self.x) < 2 * rows * lanes:
            raise DatasetError(f"X has {len(self.x)} rows; training needs at least {2 * rows * lanes} ({lanes} lanes)")
        while rows * 2 * 16 * lanes <= len(self.x) and rows * 2 * self.x[0].nbytes <= 1 << 24:
            rows *= 2
        total = len(self.x) // rows
        held_out = max(1, round(validation_share * total)) if validation_share else 0
        if held_out >= total:
            raise ConfigError(
                f"validation_share = {validation_share} leaves none of {total} blocks to train on; lower it"
            )
        order = [int(block) for block in permutation(total, 0, 2)]
        self._blocks = {"train": order[: total - held_out], "validation": order[total - held_out :]}
        self._rows = rows
        self.statistics = self._statistics()
        shapes = [(tuple(tensor.shape), str(tensor.dtype)) for tensor in inputs]
        digest = hashlib.sha256(repr(shapes[0] if len(shapes) == 1 else shapes).encode())
        for tensor in self._tensors:
            digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
        self.fingerprint = digest.hexdigest()
        identity: dict[str, Any] = {"model": None, "site": None, "target": None, "dataset": self.fingerprint}
        reads = tuple(range(len(inputs)))
        writes = tuple(range(len(inputs), len(self._tensors))) or reads
        if len(reads) > 1 or len(writes) > 1:
            described = [describe_part(*part) for part in zip(self.widths, self.statistics, strict=True)]
            identity["sources"] = described[: len(reads)]
            identity["targets"] = described[len(reads) :] or None
        self.pairs: tuple[Pair, ...] = (Pair("", reads, writes, identity, unit),)

    def n_blocks(self, split: str) -> int:
        """See `BlockSource`."""
        return len(self._blocks[split])

    def block_rows(self, split: str) -> int:
        """See `BlockSource`."""
        return self._rows

    def read_block(self, split: str, index: int, into: Rows | None = None) -> Rows:
        """See `BlockSource`; without `into`, views of the rows in memory."""
        start = self._blocks[split][index] * self._rows
        views = tuple(tensor[start : start + self._rows] for tensor in self._tensors)
        if into is None:
            return views
        for rows, place in zip(views, into, strict=True):
            place.copy_(rows)
        return into

    def sample(self, rows: int) -> Rows:
        """See `BlockSource`."""
        return sample_blocks(self, rows)

    def counters(self) -> dict[str, float]:
        """See `BlockSource`."""
        return {}

    def close(self) -> None:
        """See `BlockSource`; nothing is held but memory."""

    def _statistics(self) -> tuple[Statistics, ...]:
        moments = [Moments.empty(width) for width in self.widths]
        for index in range(self.n_blocks("train")):
            for which, rows in enumerate(self.read_block("train", index)):
                moments[which] = moments[which].merge(Moments.of(rows.float().numpy()))
        return tuple(part.statistics() for part in moments)


def describe_part(d: int, statistics: Statistics) -> dict[str, Any]:
    """What an SAE of several sources remembers of each: its width, and the root mean square norm of its rows."""
    return {"d": d, "rms_norm": math.sqrt(statistics.mean_square_norm)}


def match_sites(path: str, patterns: Sequence[str]) -> list[str]:
    """Ids of the sites of a dataset that have a name (id, alias, folder) like one of `patterns`, in its order.

    Raises:
        DatasetError: no site is like one of them.
    """
    manifest = load_manifest(open_storage(path))
    names = {site.id: {site.id, f"{site.module_path}", site.folder, site.alias or site.id} for site in manifest.sites}
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for several in names.values() for name in several):
            raise DatasetError(f"{path} holds no site like {pattern!r}; it holds: {', '.join(names)}")
    return [i for i, several in names.items() if any(fnmatchcase(name, p) for name in several for p in patterns)]


def describe_site(site: SiteRecord) -> dict[str, Any]:
    """What an SAE remembers of the site that it was trained on."""
    return {"id": site.id, "module_path": site.module_path, "where": site.where, "d": site.d, "dtype": site.dtype}


def short_name(site: SiteRecord) -> str:
    """A name for a folder and for a logger: what the user called the site, or its id without the colon."""
    return (site.alias or site.id).replace(":", ".")


def _sources(data: Any, name: str) -> Rows:
    """One tensor, or those of a tuple, equally long."""
    if not isinstance(data, tuple):
        return (_rows(data, name),)
    if not data:
        raise ConfigError(f"{name} is an empty list; give at least one source")
    parts = tuple(_rows(part, f"{name}[{number}]") for number, part in enumerate(data))
    for number, part in enumerate(parts):
        if len(part) != len(parts[0]):
            raise ConfigError(
                f"{name}[{number}] has {len(part)} rows, {name}[0] {len(parts[0])}: sources side by side need one row "
                "of each per token; chunks of one source are given as an iterator, iter([...])"
            )
    return parts


def _rows(data: Any, name: str) -> Tensor:
    """A finite (n, d) CPU tensor of floats from a tensor, an array, or an iterable of either."""
    if isinstance(data, np.ndarray):
        with warnings.catch_warnings():
            # A memory map opened for reading: nothing here writes to it.
            warnings.filterwarnings("ignore", "The given NumPy array is not writable", UserWarning)
            data = torch.from_numpy(np.ascontiguousarray(data))
    if not isinstance(data, Tensor):
        if not isinstance(data, Iterable) or isinstance(data, (str, bytes, Mapping)):
            raise ConfigError(f"{name} is a {type(data).__name__}; expected a tensor, an array, or an iterator of them")
        parts = [_rows(part, f"{name} chunk {number}") for number, part in enumerate(data)]
        if not parts:
            raise DatasetError(f"{name} yielded nothing; expected chunks of shape (rows, d_in)")
        for number, part in enumerate(parts):
            if part.shape[1] != parts[0].shape[1]:
                raise ConfigError(f"{name} chunk {number} is {part.shape[1]} wide, the first {parts[0].shape[1]}")
        data = torch.cat(parts)
    assert isinstance(data, Tensor)
    if data.ndim != 2:
        raise ConfigError(f"{name} has shape {tuple(data.shape)}; expected (rows, d_in): flatten leading dimensions")
    if not data.is_floating_point():
        raise ConfigError(f"{name} holds {data.dtype}; expected floating point activations")
    data = data.detach().cpu()
    rows: Tensor = data if data.dtype in (torch.bfloat16, torch.float32) else data.float()
    for start in range(0, len(rows), 1 << 16):
        bad = (~torch.isfinite(rows[start : start + (1 << 16)])).any(1).nonzero()
        if len(bad):
            raise DatasetError(f"{name} row {start + int(bad[0])} holds NaN or infinite values; remove such rows")
    return rows.contiguous()
