"""`saeforge variants`: which kinds of autoencoder there are, who ships them, and whether they work."""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from saeforge.errors import ConfigError, PluginError
from saeforge.registry import VARIANTS, PluginGroup, PluginRecord

if TYPE_CHECKING:
    from saeforge.testing import Report

_COLUMNS = ("name", "distribution", "version", "status", "class")


def run(argv: Sequence[str], group: PluginGroup = VARIANTS) -> int:
    """Print the table of variants. Without `--check` no plugin, and so no torch, is imported.

    With it, each variant is loaded and goes through the conformance kit (docs/conformance.md).

    Returns:
        0, or 1 if `--check` found a variant that is broken, has a contested name, or fails a check.

    Raises:
        ConfigError: a name that no variant has.
    """
    args = _parser().parse_args(argv)
    check = args.check or args.full
    wanted = args.names or sorted({record.name for record in group.records()})
    for name in args.names:
        if not any(record.name == name for record in group.records()):
            raise ConfigError(f"unknown {group.kind} {name!r}; `saeforge variants` lists those that there are")
    if check:
        _load_all(group, wanted)
    records, problems = [r for r in group.records() if r.name in wanted], group.warnings()
    reports = _reports(group, records, full=args.full) if check and group.base == VARIANTS.base else {}
    if args.json:
        variants: list[dict[str, Any]] = [asdict(r) for r in records]
        for variant in variants:
            if variant["name"] in reports:
                variant["checks"] = [
                    {"check": o.check, "status": o.status, "message": o.message, "seconds": round(o.seconds, 3)}
                    for o in reports[variant["name"]].outcomes
                ]
        print(json.dumps({"variants": variants, "warnings": problems}, indent=2))
    else:
        lines = [*_table(records), *(f"warning: {problem}" for problem in problems)]
        print("\n".join([*lines, *(["", *_checks(reports)] if reports else [])]))
    unusable = any(r.status in ("broken", "clash") for r in records)
    return int(check and (unusable or not all(report.ok for report in reports.values())))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("saeforge variants", description=__doc__.partition(": ")[2])
    parser.add_argument("names", nargs="*", metavar="NAME", help="only these; default: all")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument(
        "--check",
        action="store_true",
        help="import each variant and run the quick checks of docs/conformance.md; exit code 1 if one fails",
    )
    parser.add_argument("--full", action="store_true", help="run all checks, also those that train or start processes")
    return parser


def _load_all(group: PluginGroup, names: Sequence[str]) -> None:
    """Load every variant, so that its record tells how that went."""
    for name in names:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the table says the same under the name
            try:
                group.load(name)
            except PluginError:
                continue  # the record keeps the reason, and `run` prints it


def _reports(group: PluginGroup, records: Sequence[PluginRecord], *, full: bool) -> dict[str, Report]:
    """What the kit says of each variant that could be loaded."""
    from saeforge.testing import CHECKS, QUICK, conformance

    checks = tuple(CHECKS) if full else QUICK
    usable = [r.name for r in records if r.status in ("ok", "incompatible")]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a version that does not fit; the table has it
        return {name: conformance(group.load(name), checks=checks) for name in usable}


def _checks(reports: dict[str, Report]) -> list[str]:
    """Variant by check, then the first failure of each variant, and why checks were left out."""
    from saeforge.testing import MARK

    names = [outcome.check for outcome in max(reports.values(), key=lambda report: len(report.outcomes)).outcomes]
    width = max(len("variant"), *(len(name) for name in reports))
    lines = ["  ".join(["variant".ljust(width), *names])]
    for name, report in reports.items():
        found = {outcome.check: MARK[outcome.status] for outcome in report.outcomes}
        cells = [found.get(check, " ").center(len(check)) for check in names]
        lines.append("  ".join([name.ljust(width), *cells]).rstrip())
    for report in reports.values():
        lines += [f"{MARK['failed']} {outcome.message}" for outcome in report.failed[:1]]
    reasons: dict[str, list[str]] = {}
    for name, report in reports.items():
        for outcome in report.outcomes:
            if outcome.status == "left out":
                reasons.setdefault(f"{outcome.check}: {outcome.message}", []).append(name)
    return [*lines, *(f"{MARK['left out']} {reason} ({', '.join(names)})" for reason, names in reasons.items())]


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
