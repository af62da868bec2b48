"""What there is to know of a dataset, finished or still being made: the facts of `saeforge data inspect`."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from saeforge.data.manifest import Manifest, SiteRecord
from saeforge.data.moments import Moments, Statistics
from saeforge.data.shards import ActivationDataset, load_manifest
from saeforge.data.storage import LocalStorage, Storage, open_storage
from saeforge.errors import DatasetError

OUTLIER_TIMES = 6.0
HISTOGRAM_BLOCKS = 8
AROUND = 8
MAX_OUTLIERS = 8


def describe_dataset(path: str | Path, *, sites: Sequence[str] | None = None, samples: int = 5) -> dict[str, Any]:
    """Return what is known of a dataset.

    Args:
        path: its folder or URL.
        sites: names of the sites to describe; None for all.
        samples: validation rows (training rows where there are none) to show in their text.

    Returns:
        JSON values. `status` is "finished", or what the dataset's card says; then `progress` says how far it is and
        nothing about statistics is known.

    Raises:
        DatasetError: no dataset there, a damaged manifest, no such site.
    """
    storage = open_storage(path)
    if storage.read_file("manifest.json") is None:
        return _unfinished(path, storage)
    manifest = load_manifest(storage)
    chosen = manifest.sites if sites is None else tuple(manifest.site(name, root=path) for name in sites)
    return {
        "path": str(path),
        "status": "finished",
        "fingerprint": manifest.fingerprint,
        "format_version": manifest.format_version,
        "model": manifest.model,
        "tokenizer": manifest.tokenizer,
        "versions": manifest.versions,
        "splits": {
            name: {
                "rows": split.n_blocks * split.block_rows,
                "blocks": split.n_blocks,
                "block_rows": split.block_rows,
                "dropped_rows": split.dropped_rows,
                "outlier_rows": split.outlier_rows,
            }
            for name, split in manifest.splits.items()
        },
        "sites": [_site(path, site) for site in chosen],
        "rows_bytes": sum(shard.nbytes for shards in manifest.rows.values() for shard in shards),
        "text": manifest.text,
        "packing": {key: value for key, value in manifest.packing.items() if key != "files"},
        "shuffle": manifest.shuffle,
        "outliers": manifest.outliers,
        "labels": _labels(storage),
        "samples": _samples(path, storage, manifest, chosen[0], samples) if samples else [],
    }


def _site(path: str | Path, site: SiteRecord) -> dict[str, Any]:
    shards = [shard for family in site.shards.values() for shard in family]
    return {
        "id": site.id,
        "alias": site.alias,
        "d": site.d,
        "dtype": site.dtype,
        "shards": len(shards),
        "bytes": sum(shard.nbytes for shard in shards),
        "statistics": _statistics(path, site),
    }


def _statistics(path: str | Path, site: SiteRecord) -> dict[str, Any]:
    s = site.statistics
    mean, variance = np.array(s.mean), np.array(s.variance)
    total = float(variance.sum())
    order = np.argsort(-variance, kind="stable")
    rms = np.sqrt(mean**2 + variance)
    typical = float(np.median(rms))
    large = [int(i) for i in np.argsort(-rms, kind="stable") if rms[i] > OUTLIER_TIMES * typical]
    histogram, seen = s.norm_histogram, s.count
    if histogram is None:  # made before histograms were kept
        histogram, seen = _histogram_of_blocks(path, site)
    return {
        "rows": s.count,
        "mean_norm": s.mean_norm,
        "rms_norm": math.sqrt(s.mean_square_norm),
        "max_norm": s.max_norm,
        "median_norm": s.median_norm,
        "mean_share": float(mean @ mean) / s.mean_square_norm if s.mean_square_norm else 0.0,
        "variance_share": {
            str(n): float(variance[order[:n]].sum()) / total for n in (1, 4, 16) if total and n < site.d
        },
        "outlier_dimensions": [
            {
                "dimension": i,
                "mean": float(mean[i]),
                "std": math.sqrt(variance[i]),
                "times_median": float(rms[i]) / typical if typical else math.inf,
            }
            for i in large[:MAX_OUTLIERS]
            if typical
        ],
        "outlier_dimensions_count": len(large) if typical else 0,
        "norm_histogram": histogram,
        "norm_histogram_rows": seen,
    }


def _histogram_of_blocks(path: str | Path, site: SiteRecord) -> tuple[list[list[int]], int]:
    """Count the norms of a few training blocks."""
    dataset = ActivationDataset.open(path, site=site.id)
    moments = Moments.empty(dataset.d)
    for block in {int(i) for i in np.linspace(0, dataset.n_blocks("train") - 1, num=HISTOGRAM_BLOCKS)}:
        moments = moments.merge(Moments.of(dataset.read_block("train", block).float().numpy()))
    statistics: Statistics = moments.statistics()
    return statistics.norm_histogram or [], statistics.count


def _labels(storage: Storage) -> list[dict[str, Any]]:
    """Documents and kept tokens by label, most tokens first."""
    content = storage.read_file("tokens/documents.jsonl")
    if content is None:
        return []
    labels: dict[str | None, dict[str, Any]] = {}
    for line in content.splitlines():
        document = json.loads(line)
        label = document.get("label")
        entry = labels.setdefault(label, {"label": label, "documents": 0, "tokens": 0, "tokens_by_split": {}})
        entry["documents"] += 1
        entry["tokens"] += document["kept"]
        by_split = entry["tokens_by_split"]
        by_split[document["split"]] = by_split.get(document["split"], 0) + document["kept"]
    return sorted(labels.values(), key=lambda entry: (-entry["tokens"], str(entry["label"])))


def _samples(
    path: str | Path, storage: Storage, manifest: Manifest, site: SiteRecord, count: int
) -> list[dict[str, Any]]:
    """The first row of blocks spread over a split, with its norm, where it comes from, and the tokens around it."""
    dataset = ActivationDataset.open(path, site=site.id)
    split = "validation" if dataset.n_blocks("validation") else "train"
    names = _document_names(storage)
    known = bool(manifest.packing) or manifest.text.get("token_ids") is True
    found = []
    blocks = np.linspace(0, dataset.n_blocks(split) - 1, num=min(count, dataset.n_blocks(split)))
    for block in dict.fromkeys(int(i) for i in blocks):
        document, position, token, context = (int(v) for v in dataset.read_rows(split, block)[0])
        before, after = _around(storage, split, document, position, context)
        norm = float(dataset.read_block(split, block)[0].double().norm())
        found.append(
            {
                "split": split,
                "block": block,
                "row": 0,
                "norm": norm,
                "document": document,
                "name": names.get(document) or _source_file(manifest, document),
                "position": position,
                "context": context,
                "token": token if known else None,
                "before": before,
                "after": after,
            }
        )
    return found


def _document_names(storage: Storage) -> dict[int, str]:
    content = storage.read_file("tokens/documents.jsonl")
    documents = map(json.loads, content.splitlines()) if content else ()
    return {int(document["id"]): str(document["name"]) for document in documents}


def _source_file(manifest: Manifest, context: int) -> str | None:
    """The imported file that a context stands in."""
    found = None
    for source in manifest.text.get("sources", []):
        if source["first_context"] <= context:
            found = str(source["file"])
    return found


def _around(storage: Storage, split: str, document: int, position: int, context: int) -> tuple[list[int], list[int]]:
    """Token ids of the same document before and after a row, in its context; empty where no tokens are stored here."""
    if not isinstance(storage, LocalStorage):
        return [], []
    folder = storage.root / "tokens"
    names = ("offsets", "documents", "positions", "keep", "tokens")
    if not all((folder / f"{split}.{name}.npy").is_file() for name in names):
        return [], []
    arrays = {name: np.load(folder / f"{split}.{name}.npy", mmap_mode="r") for name in names}
    start, stop = (int(i) for i in arrays["offsets"][context : context + 2])
    documents, positions, keep, tokens = (np.asarray(arrays[name][start:stop]) for name in names[1:])
    mine = np.flatnonzero(documents == document)
    here = np.flatnonzero((documents == document) & (positions == position) & keep)
    if not len(here):
        raise DatasetError(f"{folder}: no token {position} of document {document} in context {context}; harvest again")
    at = int(np.searchsorted(mine, here[0]))
    return tokens[mine[max(at - AROUND, 0) : at]].tolist(), tokens[mine[at + 1 : at + 1 + AROUND]].tolist()


def _unfinished(path: str | Path, storage: Storage) -> dict[str, Any]:
    """How far a dataset is that has a card but no manifest yet."""
    content = storage.read_file("dataset.json")
    if content is None or not isinstance(storage, LocalStorage):
        raise DatasetError(
            f"no activation dataset at {path}: neither manifest.json nor dataset.json; make one with "
            "`saeforge harvest` or `saeforge data import`"
        )
    try:
        card = json.loads(content)
        plan = card.get("plan") or {}
        total = {name: int(split["kept_rows"]) for name, split in plan.get("splits", {}).items()}
        status = str(card["status"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DatasetError(f"{path}/dataset.json is damaged ({error!r}); start again with another --out") from error
    done = dict.fromkeys(total, 0)
    newest = 0.0
    for record in sorted((storage.root / "index").glob("*.json")):
        split = record.name.rpartition("-")[0]
        start, stop = json.loads(record.read_bytes())["rows"]
        done[split] = done.get(split, 0) + stop - start
        newest = max(newest, record.stat().st_mtime)
    return {
        "path": str(path),
        "status": "interrupted or in work" if status == "finished" else status,
        "model": card.get("model") or {},
        "sites": [{key: site[key] for key in ("id", "alias", "d", "dtype")} for site in plan.get("sites", [])],
        "progress": {"rows_done": done, "rows_planned": total, "last_written": newest or None},
        "bytes": sum(file.stat().st_size for file in storage.root.glob("*/*.tar")),
    }
