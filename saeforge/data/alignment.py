"""Whether the rows of several datasets are the same tokens in the same order, so that they may stand side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from saeforge.data.manifest import sha256_json
from saeforge.data.shards import ActivationDataset
from saeforge.errors import DatasetError


def check_aligned(datasets: Sequence[ActivationDataset]) -> None:
    """Row i must be the same token in all datasets whose rows stand side by side.

    Raises:
        DatasetError: naming what differs.
    """
    first = datasets[0]
    for other in datasets[1:]:
        if other.fingerprint == first.fingerprint:
            continue
        one, two = first.manifest, other.manifest
        differences = [
            f"{name}: {before} and {now}"
            for name, before, now in [
                ("tokens", *(_digest(m.packing.get("files")) for m in (one, two))),
                ("tokenizer", *(m.tokenizer.get("name") for m in (one, two))),
                ("shuffle", one.shuffle, two.shuffle),
                *(
                    (f"{field} of {split}", *(getattr(m.splits.get(split), field, None) for m in (one, two)))
                    for split in dict.fromkeys([*one.splits, *two.splits])
                    for field in ("block_rows", "n_blocks", "outlier_rows")
                ),
            ]
            if before != now
        ]
        same_blocks = not any("block" in difference for difference in differences)
        if one.alignment_sha256 == two.alignment_sha256 and same_blocks:
            continue
        advice = "harvest both with the same text, tokenizer, n_tokens, seed and bucket_rows"
        if any("outlier" in difference for difference in differences):
            advice += ", and max_norm null, since each model has outliers of its own"
        raise DatasetError(
            f"{first.location} and {other.location} are not row by row the same tokens "
            f"({'; '.join(differences) or 'provenance of the rows'}); {advice}"
        )


def _digest(value: Any) -> str:
    return sha256_json(value)[:12]
