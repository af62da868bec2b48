"""The few lines that a finished harvest prints."""

from __future__ import annotations

from pathlib import Path

from saeforge.data.manifest import Manifest


def summary(manifest: Manifest, root: Path) -> str:
    """Return rows, sizes and statistics of a dataset, and what to do next, in lines for people."""
    model, packing = manifest.model, manifest.packing
    counts = packing["counts"]
    depth = f", {model['layers_loaded']} of {model['layers']} layers" if model["layers"] else ""
    lines = [
        f"model       {model['name']} ({model['class']}, {model['dtype']}{depth})",
        f"text        {manifest.text['source']}: {counts['kept_tokens']:,} tokens kept of {counts['text_tokens']:,}",
        f"packing     {packing['rule']}",
    ]
    if manifest.text["n_tokens"] - counts["kept_tokens"] >= manifest.shuffle["group_rows"]:
        lines.append(f"            the text ran out before n_tokens = {manifest.text['n_tokens']:,}")
    if counts.get("ungrouped"):
        lines.append(f"            {counts['ungrouped']:,} tokens filled no group of {manifest.shuffle['group_rows']}")
    for name, split in manifest.splits.items():
        rows = split.n_blocks * split.block_rows
        lines.append(
            f"{name:<11} {rows:,} rows in {split.n_blocks:,} blocks of {split.block_rows:,} "
            f"({split.dropped_rows:,} left over, {split.outlier_rows:,} outliers)"
        )
    for site in manifest.sites:
        size = sum(shard.nbytes for shards in site.shards.values() for shard in shards)
        s = site.statistics
        lines.append(
            f"site        {site.id}: width {site.d}, {site.dtype}, {size / 2**20:,.1f} MiB; "
            f"norm mean {s.mean_norm:.4g}, rms {s.mean_square_norm**0.5:.4g}, max {s.max_norm:.4g}"
        )
    lines.append(f"where       {root}")
    return "\n".join(lines)
