"""`ShardSource`: activation datasets on disk or behind a URL as a source of blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

from saeforge.data.alignment import check_aligned
from saeforge.data.choice import Choice, Place, SitesWanted, choose
from saeforge.data.manifest import Manifest, SiteRecord, sha256_json
from saeforge.data.shards import ActivationDataset, load_manifest
from saeforge.data.source import Pair, Rows, describe_part, sample_blocks
from saeforge.data.storage import open_storage
from saeforge.errors import DatasetError


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
