"""`saeforge features concepts RUN`: a table for people, RUN/concepts.json for programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from saeforge.cli.parsing import PARSER_MODE, OneLineParser, configure_jsonargparse

if TYPE_CHECKING:
    from saeforge.features.concepts import ConceptTable

WIDTH = 110


def make_parser() -> OneLineParser:
    """The parser of `saeforge features concepts`."""
    configure_jsonargparse()
    parser = OneLineParser(
        prog="saeforge features concepts",
        description="Find the latent of each label on one half of labelled documents and judge it on the other half, "
        "beside controls; writes RUN/concepts.json and prints a table.",
        parser_mode=PARSER_MODE,
    )
    parser.add_argument("-c", "--config", action="config", help="YAML file with any of the options below.")
    parser.add_argument("run", type=str, help="RUN folder (runs/<name>) or an sae/ folder.")
    parser.add_argument(
        "--texts",
        type=str,
        default="demo",
        help="demo (the passages that ship with saeforge), a folder with a subfolder per label, or a .jsonl file.",
    )
    parser.add_argument("--control", type=str | None, default=None, help="RUN of an SAE of a re-initialised model.")
    parser.add_argument("--labels", type=str | None, default=None, help="Rows of the table: french,python,...")
    parser.add_argument(
        "--against",
        type=str,
        action="append",
        default=[],
        help="Tell a label from these only: french=spanish,italian,portuguese. May be given several times.",
    )
    parser.add_argument(
        "--choose_by",
        type=Literal["token", "document"],
        default="token",
        help="AUROC on the train documents by which latents are chosen.",
    )
    parser.add_argument("--probe", type=bool, default=True, help="Fit the logistic probe (scikit-learn).")
    parser.add_argument("--random_draws", type=int, default=3, help="How many sets of d_sae random latents.")
    parser.add_argument("--resamples", type=int, default=1000, help="Of the bootstrap over documents.")
    parser.add_argument("--seed", type=int, default=0, help="Of splits, random latents and resamples.")
    parser.add_argument(
        "--shuffle_labels", type=int | None, default=None, help="Shuffle the labels with this seed: shows chance."
    )
    parser.add_argument("--model", type=str | None, default=None, help="Where the model is now, if it moved.")
    parser.add_argument("--context_length", type=int | None, default=None, help="Longest context, in tokens.")
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda, ...")
    parser.add_argument("--json", action="store_true", help="Print the JSON instead of the table.")
    return parser


def run(argv: Sequence[str]) -> int:
    """Runs the command.

    Args:
        argv: arguments after `saeforge features concepts`.

    Returns:
        Exit code.
    """
    options = make_parser().parse_args(list(argv))

    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from saeforge.features.concepts import concept_table

    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("reading", total=None)
        table = concept_table(
            options.run,
            options.texts,
            control=options.control,
            labels=None if options.labels is None else options.labels.split(","),
            against=options.against,
            choose_by=options.choose_by,
            probe=options.probe,
            random_draws=options.random_draws,
            resamples=options.resamples,
            seed=options.seed,
            shuffle_labels=options.shuffle_labels,
            model=options.model,
            context_length=options.context_length,
            device=options.device,
            on_progress=lambda what, done, total: progress.update(task, description=what, completed=done, total=total),
        )
    if options.json:
        print(json.dumps(table.to_json(), indent=2))
        return 0
    show(table, title=options.run)
    return 0


def show(table: ConceptTable, *, title: str) -> None:
    """Prints the table, the claims that fail and the notes."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    grid = Table(
        box=box.SIMPLE_HEAD,
        title=f"{title}: {table.about['sae']['d_sae']:,} latents, L0 {table.about['l0']:.1f}, held out",
    )
    for name, justify in (
        ("label", "left"),
        ("latent", "right"),
        ("token AUROC", "left"),
        ("doc\nAUROC", "right"),
        ("doc\nAP", "right"),
        ("doc\nF1", "right"),
        ("random", "right"),
        ("means", "right"),
        ("probe", "right"),
        ("control", "right"),
    ):
        grid.add_column(name, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    for concept in table.concepts:
        mine = concept.sae
        others = (concept.random, concept.difference_of_means, concept.probe, concept.control)
        grid.add_row(
            f"{concept.label} *" if concept.failures else concept.label,
            str(concept.latent),
            str(mine.token_auroc),
            f"{mine.document_auroc.value:.3f}",
            f"{mine.document_average_precision:.3f}",
            f"{mine.document_f1:.3f}",
            *("-" if other is None else f"{other.token_auroc.value:.3f}" for other in others),
        )
    Console(width=None if sys.stdout.isatty() else WIDTH).print(grid)
    print("random, means, probe, control: token AUROC of the best random latents, the difference of means, a logistic")
    print("probe, and the control's best latent; all chosen or fitted on train documents, all figures held out")
    for failure in table.failures():
        print(f"* {failure}")
    for note in table.notes:
        print(f"note: {note}")
    if table.path is not None:
        print(f"written to {table.path}")
