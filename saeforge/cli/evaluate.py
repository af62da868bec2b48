"""`saeforge evaluate RUN`: a table for people, RUN/evaluation.json for programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from saeforge.cli.parsing import PARSER_MODE, OneLineParser, configure_jsonargparse

if TYPE_CHECKING:
    from rich.progress import TaskID


def make_parser() -> OneLineParser:
    """The parser of `saeforge evaluate`."""
    configure_jsonargparse()
    parser = OneLineParser(
        prog="saeforge evaluate",
        description="Judge a trained SAE on held-out activations, and by the loss of its language model with the "
        "reconstruction spliced in; writes RUN/evaluation.json and prints tables.",
        parser_mode=PARSER_MODE,
    )
    parser.add_argument("-c", "--config", action="config", help="YAML file with any of the options below.")
    parser.add_argument("run", type=str, help="RUN folder (runs/<name>) or an sae/ folder.")
    parser.add_argument("--data", type=str | None, default=None, help="Dataset; default: the one it was trained on.")
    parser.add_argument(
        "--against",
        type=str | None,
        default=None,
        help="Another RUN of the same site, like another seed: how far the decoders agree.",
    )
    parser.add_argument("--split", type=str, default="validation", help="validation or train.")
    parser.add_argument(
        "--max_tokens", type=int | None, default=None, help="Read at most so many tokens, in whole blocks."
    )
    parser.add_argument(
        "--batch_size", type=int, default=4096, help="Rows at a time; the result does not depend on it."
    )
    parser.add_argument(
        "--effect",
        type=str,
        default="auto",
        help="Judge by the model's predictions: true, false, or auto (if the model and the texts are there).",
    )
    parser.add_argument("--effect_tokens", type=int, default=50_000, help="Predictions to score, in whole contexts.")
    parser.add_argument(
        "--batch_contexts", type=int | None, default=None, help="Contexts at a time; default: as many as fit."
    )
    parser.add_argument("--model", type=str | None, default=None, help="Where the model is now, if it moved.")
    parser.add_argument(
        "--trust_remote_code",
        type=bool,
        default=False,
        help="Run Python code that comes with the model; read it first.",
    )
    parser.add_argument("--seed", type=int, default=0, help="Of the bootstrap, and of what is sampled.")
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
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.table import Table

    from saeforge.evaluation import evaluate
    from saeforge.evaluation.table import LABEL_COLUMNS, elsewhere_rows, label_rows, notes, summary_rows, weight_rows

    units = {"activations": "batches of activations", "model": "contexts through the model"}
    columns = (
        TextColumn("evaluating"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.description}"),
        TimeRemainingColumn(compact=True),
        TextColumn("left"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        tasks: dict[str, TaskID] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = progress.add_task(units[what], total=total)
            progress.update(tasks[what], completed=done)

        result = evaluate(
            options.run,
            data=options.data,
            against=options.against,
            split=options.split,
            max_tokens=options.max_tokens,
            batch_size=options.batch_size,
            effect=options.effect,
            effect_tokens=options.effect_tokens,
            batch_contexts=options.batch_contexts,
            model=options.model,
            trust_remote_code=options.trust_remote_code,
            seed=options.seed,
            device=options.device,
            on_progress=show,
        )
    if options.json:
        print(json.dumps(result.to_json(), indent=2))
        return 0
    console = Console(width=None if sys.stdout.isatty() else 110)
    about = f"{options.run}: {result.about['sae']['d_sae']:,} latents at {result.about['site']}"
    for title, rows in (
        (about, summary_rows(result)),
        ("the same reconstruction by other tools' definitions", elsewhere_rows(result)),
        ("latents as directions", weight_rows(result)),
    ):
        table = Table(title=title)
        for name in ("metric", "value", "remark"):
            table.add_column(name, justify="right" if name == "value" else "left")
        for row in rows:
            table.add_row(*row)
        console.print(table)
    by_label = label_rows(result)
    if by_label:
        table = Table(title="effect on the model, by label")
        for name in LABEL_COLUMNS:
            table.add_column(name, justify="left" if name == "label" else "right")
        for values in by_label:
            table.add_row(*values)
        console.print(table)
    for note in notes(result):
        print(f"note: {note}")
    if result.path is not None:
        print(f"written to {result.path}")
    return 0
