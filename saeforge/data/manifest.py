"""The manifest of an activation dataset: what `manifest.json` says, as dataclasses, with strict reading.

Format `saeforge-acts`, version 1 (docs/dataset-format.md). A reader of version N reads every version from 1 to N and
ignores keys that it does not know; a dataset of a newer version is refused. The file carries a checksum of itself, so
that a damaged manifest is an error and never a wrong offset.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import secrets
import socket
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from saeforge.data.moments import Moments, Statistics
from saeforge.data.site_names import parse_alias
from saeforge.errors import DatasetError

__all__ = [
    "FORMAT_VERSION",
    "BlockRecord",
    "Manifest",
    "Moments",
    "ShardRecord",
    "SiteRecord",
    "SplitRecord",
    "Statistics",
]

FORMAT = "saeforge-acts"
FORMAT_VERSION = 1
COMPATIBILITY = "readers of version N read versions 1 to N and ignore unknown keys; newer versions are refused"
SPLITS = ("train", "validation")
ITEM_BYTES = {"bfloat16": 2, "float32": 4}

T = TypeVar("T")


@dataclass(frozen=True)
class BlockRecord:
    """One block: where its payload lies in the shard file, in bytes, its rows and the crc32 of the payload."""

    offset: int
    nbytes: int
    rows: int
    crc32: int


@dataclass(frozen=True)
class ShardRecord:
    """One tar file of a family: its name inside the family's folder, size in bytes, sha256 and blocks in order."""

    file: str
    nbytes: int
    sha256: str
    blocks: tuple[BlockRecord, ...]


@dataclass(frozen=True)
class SplitRecord:
    """One split: rows of every block, number of blocks, and what was kept of the text but is not stored.

    Attributes:
        block_rows: rows of every block.
        n_blocks: blocks of the split.
        dropped_rows: rows that filled no last block (of a bucket, or of the split).
        outlier_rows: rows left out for their norm, or for that of a row of their group.
    """

    block_rows: int
    n_blocks: int
    dropped_rows: int
    outlier_rows: int = 0


@dataclass(frozen=True)
class SiteRecord:
    """One harvested site.

    Attributes:
        id: `module.path:in` or `module.path:out`.
        module_path: path of the module in the HuggingFace model.
        where: "in" (first input of the module) or "out" (its output).
        d: width of a row.
        dtype: logical dtype, "bfloat16" (stored as its bits, `<u2`) or "float32".
        folder: folder of the tar family below the root.
        statistics: of the train split.
        shards: shards by split, in block order.
        alias: the name that the user asked for, when it was another one.
    """

    id: str
    module_path: str
    where: str
    d: int
    dtype: str
    folder: str
    statistics: Statistics
    shards: dict[str, tuple[ShardRecord, ...]]
    alias: str | None = None

    @property
    def row_bytes(self) -> int:
        """Bytes of one stored row."""
        return self.d * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class Manifest:
    """All of `manifest.json`. The dictionaries are provenance, shown to people and copied into SAEs.

    Attributes:
        splits: "train" and, unless it was asked for without, "validation".
        sites: the harvested sites, row-aligned with each other and with `rows`.
        rows: shards of the provenance table by split.
        alignment_sha256: equal for datasets whose rows are the same tokens in the same order.
        outliers: which norms were too large: `max_norm`, the pilot sample, and per site its median, threshold and the
            rows over it; empty where none were left out.
    """

    saeforge_version: str
    config_sha256: str
    alignment_sha256: str
    splits: dict[str, SplitRecord]
    sites: tuple[SiteRecord, ...]
    rows: dict[str, tuple[ShardRecord, ...]]
    model: dict[str, Any] = field(default_factory=dict)
    tokenizer: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, Any] = field(default_factory=dict)
    text: dict[str, Any] = field(default_factory=dict)
    packing: dict[str, Any] = field(default_factory=dict)
    shuffle: dict[str, Any] = field(default_factory=dict)
    outliers: dict[str, Any] = field(default_factory=dict)
    format: str = FORMAT
    format_version: int = FORMAT_VERSION
    compatibility: str = COMPATIBILITY

    def site(self, name: str | None, *, root: str | Path) -> SiteRecord:
        """Return the site called `name` (its id, module path, folder or alias); None is the only site.

        Raises:
            DatasetError: no such site, or several sites and no name.
        """
        known = ", ".join(site.id for site in self.sites)
        if name is None:
            if len(self.sites) == 1:
                return self.sites[0]
            raise DatasetError(f"{root} holds several sites, name one of them: {known}")
        names = {name, f"{name}:out"}
        found = [site for site in self.sites if {site.id, site.folder, site.alias} & names]
        if not found and (place := parse_alias(name)) is not None:  # resid_post.3 is blocks.3.hook_resid_post
            found = [site for site in self.sites if site.alias is not None and parse_alias(site.alias) == place]
        if len(found) != 1:
            raise DatasetError(f"{root} holds no site {name!r}; it holds: {known}")
        return found[0]

    def to_json(self) -> dict[str, Any]:
        """Return the manifest as plain JSON values, with blocks as `[offset, nbytes, rows, crc32]`."""
        data = dataclasses.asdict(self)
        # Later additions are left out where they say nothing, so that older manifests keep their fingerprint.
        additions = [(data, "outliers")]
        additions += [(split, "outlier_rows") for split in data["splits"].values()]
        additions += [(site["statistics"], "norm_histogram") for site in data["sites"]]
        for holder, key in additions:
            if holder[key] in (None, 0, {}):
                del holder[key]
        for family in [*(site["shards"] for site in data["sites"]), data["rows"]]:
            for split, shards in family.items():
                family[split] = [shard_to_json(shard) for shard in shards]
        return dict(json.loads(json.dumps(data)))

    @property
    def fingerprint(self) -> str:
        """The sha256 of the canonical JSON: equal manifests, equal fingerprints."""
        return sha256_json(self.to_json())

    def save(self, path: Path) -> None:
        """Write the manifest with its checksum, atomically."""
        data = self.to_json()
        write_json(path, {**data, "sha256": sha256_json(data)})

    @classmethod
    def load(cls, path: Path) -> Manifest:
        """Read and check a manifest.

        Raises:
            DatasetError: the file is missing, damaged, of a newer version, or not a manifest.
        """
        if not path.is_file():
            raise no_manifest(path.parent)
        return cls.parse(path.read_bytes(), str(path))

    @classmethod
    def parse(cls, content: bytes, path: str) -> Manifest:
        """Read and check a manifest's content; `path` is for messages.

        Raises:
            DatasetError: as `load`.
        """
        try:
            data = json.loads(content)
        except ValueError as error:
            raise DatasetError(f"{path} is damaged, not readable as JSON ({error}); harvest it again") from error
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise DatasetError(f"{path} is not a manifest of the format {FORMAT}")
        version = data.get("format_version")
        if not isinstance(version, int) or not 1 <= version <= FORMAT_VERSION:
            raise DatasetError(
                f"{path} has format version {version!r}, this saeforge reads 1 to {FORMAT_VERSION}; upgrade saeforge"
            )
        if sha256_json({key: value for key, value in data.items() if key != "sha256"}) != data.get("sha256"):
            raise DatasetError(f"{path} is damaged: its checksum does not match; restore it or harvest again")
        try:
            manifest = cls._from_json(data)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DatasetError(f"{path} lacks or garbles a field ({error!r}); harvest again") from error
        manifest._check(path)
        return manifest

    @classmethod
    def _from_json(cls, data: dict[str, Any]) -> Manifest:
        def family(shards: dict[str, list[dict[str, Any]]]) -> dict[str, tuple[ShardRecord, ...]]:
            return {split: tuple(shard_from_json(shard) for shard in items) for split, items in shards.items()}

        sites = [
            pick(
                SiteRecord,
                {**site, "statistics": pick(Statistics, site["statistics"]), "shards": family(site["shards"])},
            )
            for site in data["sites"]
        ]
        splits = {name: pick(SplitRecord, split) for name, split in data["splits"].items()}
        return pick(cls, {**data, "sites": tuple(sites), "splits": splits, "rows": family(data["rows"])})

    def _check(self, path: str) -> None:
        """Check that counts agree, so that readers can do arithmetic instead of checks."""
        for name, split in self.splits.items():
            for label, family in [*((site.id, site.shards) for site in self.sites), ("rows", self.rows)]:
                blocks = [block for shard in family[name] for block in shard.blocks]
                if len(blocks) != split.n_blocks or any(block.rows != split.block_rows for block in blocks):
                    raise DatasetError(f"{path}: blocks of {label}, split {name}, do not add up; harvest again")


def no_manifest(folder: str | Path) -> DatasetError:
    """Return the error for a folder or URL without a manifest."""
    return DatasetError(
        f"no manifest.json in {folder}: expected a finished activation dataset; "
        f"run `saeforge harvest --out {folder} ...` (an interrupted harvest goes on with the same command)"
    )


def pick(cls: type[T], data: dict[str, Any]) -> T:
    """Build a dataclass from the keys of `data` that it knows."""
    names = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    return cls(**{key: value for key, value in data.items() if key in names})


def shard_to_json(shard: dict[str, Any]) -> dict[str, Any]:
    """Return a shard (as `dataclasses.asdict` gives it) with its blocks as short lists."""
    blocks = [[block["offset"], block["nbytes"], block["rows"], block["crc32"]] for block in shard["blocks"]]
    return {**shard, "blocks": blocks}


def shard_from_json(data: dict[str, Any]) -> ShardRecord:
    """Read back `shard_to_json`."""
    blocks = tuple(BlockRecord(*(int(v) for v in block)) for block in data["blocks"])
    return ShardRecord(str(data["file"]), int(data["nbytes"]), str(data["sha256"]), blocks)


def sha256_json(data: Any) -> str:
    """Return the sha256 of the canonical JSON of `data` (sorted keys, no spaces)."""
    text = json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def write_json(path: Path, data: Any) -> None:
    """Write JSON so that a crash leaves the old file or the new one (temporary name, fsync, rename, fsync)."""
    part = part_path(path)
    text = json.dumps(data, indent=None if len(str(data)) > 20_000 else 1, allow_nan=False)
    try:
        with part.open("w") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        part.rename(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


def part_path(path: Path) -> Path:
    """Return a temporary name beside `path`, of this process alone among all hosts that share the folder."""
    return path.with_name(f"{path.name}.part-{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}")


def fsync_folder(path: Path) -> None:
    """Make renames inside a folder durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
