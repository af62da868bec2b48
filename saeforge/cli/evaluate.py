"""`saeforge evaluate RUN`: a table for people, RUN/evaluation.json for programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from saeforge.cli.parsing import PARSER_MODE, OneLineParser, configure_jsonargparse


def make_parser() -> OneLineParser:
    """The parser of `saeforge evaluate`."""
    configure_jsonargparse()
    parser = OneLineParser(
        prog="saeforge evaluate",
        description="Judge a trained SAE on held-out activations; writes RUN/evaluation.json and prints a table.",
        parser_mode=PARSER_MODE,
    )
    parser.add_argument("-c", "--config", action="config", help="YAML file with any of the options below.")
    parser.add_argument("run", type=str, help="RUN folder (runs/<name>) or an sae/ folder.")
    parser.add_argument("--data", type=str | None, default=None, help="Dataset; default: the one it was trained on.")
    parser.add_argument("--split", type=str, default="validation", help="validation or train.")
    parser.add_argument(
        "--max_tokens", type=int | None, default=None, help="Read at most so many tokens, in whole blocks."
    )
    parser.add_argument(
        "--batch_size", type=int, default=4096, help="Rows at a time; the result does not depend on it."
    )
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda, ...")
    parser.add_argument("--json", action="store_true", help="Print the JSON instead of the table.")
    return parser


def run(argv: Sequence[str]) -> int:
    """Runs the command.

    Args:
        argv: arguments after `saeforge evaluate`.

    Returns:
        Exit code.
    """
    options = make_parser().parse_args(list(argv))

    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.table import Table

    from saeforge.evaluation import evaluate

    columns = (TextColumn("evaluating"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("", total=None)
        result = evaluate(
            options.run,
            data=options.data,
            split=options.split,
            max_tokens=options.max_tokens,
            batch_size=options.batch_size,
            device=options.device,
            on_progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    if options.json:
        print(json.dumps(result.to_json(), indent=2))
        return 0
    table = Table(title=f"{options.run}: {result.about['sae']['d_sae']:,} latents at {result.about['site']}")
    for name in ("metric", "value", "remark"):
        table.add_column(name, justify="right" if name == "value" else "left")
    for row in result.rows():
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 110).print(table)
    if not result.about["trained_on_this_dataset"]:
        print("note: this is not the dataset that the SAE was trained on")
    if result.path is not None:
        print(f"written to {result.path}")
    return 0
