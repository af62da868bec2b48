"""`saeforge variants`: which kinds of autoencoder there are, who ships them, and whether they work."""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Sequence
from dataclasses import asdict

from saeforge.errors import PluginError
from saeforge.registry import VARIANTS, PluginGroup, PluginRecord

_COLUMNS = ("name", "distribution", "version", "status", "class")


def run(argv: Sequence[str], group: PluginGroup = VARIANTS) -> int:
    """Print the table of variants. Without `--check` no plugin, and so no torch, is imported.

    Returns:
        0, or 1 if `--check` found a variant that is broken or has a contested name.
    """
    args = _parser().parse_args(argv)
    if args.check:
        _load_all(group)
    records, problems = group.records(), group.warnings()
    if args.json:
        print(json.dumps({"variants": [asdict(r) for r in records], "warnings": problems}, indent=2))
    else:
        print("\n".join([*_table(records), *(f"warning: {problem}" for problem in problems)]))
    return int(args.check and any(r.status in ("broken", "clash") for r in records))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("saeforge variants", description=__doc__.partition(": ")[2])
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument(
        "--check", action="store_true", help="import each variant and check it; exit code 1 if one is unusable"
    )
    return parser


def _load_all(group: PluginGroup) -> None:
    """Load every variant, so that its record tells how that went."""
    for name in sorted({record.name for record in group.records()}):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the table says the same under the name
            try:
                group.load(name)
            except PluginError:
                continue  # the record keeps the reason, and `run` prints it


def _table(records: Sequence[PluginRecord]) -> list[str]:
    rows = [_COLUMNS]
    for r in records:
        rows.append((r.name, r.distribution or "(this process)", r.version or "-", r.status, r.class_path))
    widths = [max(len(row[column]) for row in rows) for column in range(len(_COLUMNS))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    for position in reversed(range(len(records))):
        if records[position].error:
            lines.insert(position + 2, f"  {records[position].error}")
    return lines
