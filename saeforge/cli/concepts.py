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
        nargs="+",
        default=[],
        help="Tell a label from these only: french=spanish,italian,portuguese. Takes several.",
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
    parser.add_argument(
        "--trust_remote_code",
        type=bool,
        default=False,
        help="Run Python code that comes with the model; read it first.",
    )
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
    options = make_parser().parse_args(_gather(argv, "--against"))

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
            trust_remote_code=options.trust_remote_code,
            context_length=options.context_length,
            device=options.device,
            on_progress=lambda what, done, total: progress.update(task, description=what, completed=done, total=total),
        )
    if options.json:
        print(json.dumps(table.to_json(), indent=2))
        return 0
    show(table, title=options.run)
    return 0


def _gather(argv: Sequence[str], name: str) -> list[str]:
    """Put the values of a repeated option together at the end.

    argparse would keep the values of the last one only, and take a RUN that stands behind them for one more.
    """
    values: list[str] = []
    rest: list[str] = []
    before = ""  # "name": its first value comes next; "value": another may
    for word in argv:
        if word == name:
            before = "name"
        elif word.startswith(f"{name}="):
            values.append(word.removeprefix(f"{name}="))
            before = "value"
        elif not word.startswith("-") and (before == "name" or (before == "value" and "=" in word)):
            values.append(word)
            before = "value"
        else:
            rest.append(word)
            before = ""
    return [*rest, name, *values] if values or name in argv else rest


def show(table: ConceptTable, *, title: str) -> None:
    """Prints the table, the claims that fail and the notes."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    grid = Table(
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
        title=f"{title}: {table.about['sae']['d_sae']:,} latents, L0 {table.about['l0']:.1f}, held out",
    )
    for name, justify in (
        ("label", "left"),
        ("latent", "right"),
        ("token AUROC", "left"),
        ("doc\nAUROC", "right"),
        ("doc\nrand", "right"),
        ("doc\nAP", "right"),
        ("doc\nF1", "right"),
        ("rand", "right"),
        ("means", "right"),
        ("probe", "right"),
        ("ctrl", "right"),
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
            f"{concept.random.document_auroc.value:.3f}",
            f"{mine.document_average_precision:.3f}",
            f"{mine.document_f1:.3f}",
            *("-" if other is None else f"{other.token_auroc.value:.3f}" for other in others),
        )
    Console(width=None if sys.stdout.isatty() else WIDTH).print(grid)
    print(
        "rand, means, probe, ctrl: token AUROC of the best random latents, the difference of means, a logistic probe,"
    )
    print(
        "the control's best latent; doc rand: document AUROC of the best random latents. All chosen or fitted on train"
    )
    print("documents, all figures held out")
    for failure in table.failures():
        print(f"* {failure}")
    for note in table.notes:
        print(f"note: {note}")
    if table.path is not None:
        print(f"written to {table.path}")
