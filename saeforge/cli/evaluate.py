"""`saeforge evaluate RUN`: a table for people, RUN/evaluation.json for programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

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
    parser.add_argument(
        "--probe",
        type=str,
        default="auto",
        help="Judge by labelled documents, with k-sparse probing and targeted probe perturbation (scikit-learn): true, "
        "false, or auto (if there are labels).",
    )
    parser.add_argument(
        "--probe_texts",
        type=str | None,
        default=None,
        help="Labelled texts for that, run through the model: demo, a folder with a subfolder per label, or a .jsonl "
        "file; default: the dataset's own documents.",
    )
    parser.add_argument("--probe_tokens", type=int, default=200_000, help="Stored activations to fit probes on.")
    parser.add_argument(
        "--controls",
        type=Literal["pca", "random_decoder", "reinit"],
        nargs="+",
        default=[],
        help="Judge these beside it: PCA of rank L0; topk with its decoder frozen at random directions; topk on the "
        "same model with fresh weights (harvests the text anew). They stay in RUN/controls.",
    )
    parser.add_argument(
        "--control_tokens",
        type=int,
        default=1_000_000,
        help="Tokens that a control is trained on, or as many as the SAE was, if that is less.",
    )
    parser.add_argument(
        "--control_lr", type=float | None, default=None, help="Their learning rate; default: topk's recipe."
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
    from saeforge.evaluation.judge import one_of_three
    from saeforge.evaluation.labelled_table import (
        PROBING_COLUMNS,
        TPP_COLUMNS,
        control_rows,
        probing_label_rows,
        probing_notes,
        probing_rows,
        tpp_rows,
    )
    from saeforge.evaluation.table import LABEL_COLUMNS, elsewhere_rows, label_rows, notes, summary_rows, weight_rows

    units = {
        "activations": "batches of activations",
        "model": "contexts through the model",
        "documents": "blocks of labelled documents",
        "texts": "labelled contexts through the model",
        "probes": "labels probed",
        "perturbations": "labels perturbed",
    }
    controls = None
    if options.controls:
        from saeforge.controls import make_controls

        for name in ("effect", "probe"):
            one_of_three(name, options[name])  # before minutes of work
        controls = make_controls(
            options.run,
            list(dict.fromkeys(options.controls)),
            data=options.data,
            split=options.split,
            tokens=options.control_tokens,
            lr=options.control_lr,
            model=options.model,
            trust_remote_code=options.trust_remote_code,
            seed=options.seed,
            device=options.device,
            on_control=lambda name: print(f"making the control {name}", file=sys.stderr, flush=True),
        )
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
                name, _, unit = what.rpartition(": ")  # a control's name stands before what is done
                tasks[what] = progress.add_task(f"{name}: {units[unit]}" if name else units[unit], total=total)
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
            probe=options.probe,
            probe_texts=options.probe_texts,
            probe_tokens=options.probe_tokens,
            controls=controls,
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
    for title, columns_of, values_of in (
        ("effect on the model, by label", LABEL_COLUMNS, label_rows(result)),
        ("which label a document has: held out, mean over labels", PROBING_COLUMNS, probing_rows(result)),
        ("accuracy by label", *probing_label_rows(result)),
        ("drop of accuracy when a label's latents are ablated", TPP_COLUMNS, tpp_rows(result)),
        ("beside controls", *control_rows(result)),
    ):
        if not values_of:
            continue
        table = Table(title=title)
        for at, name in enumerate(columns_of):
            table.add_column(name, justify="right" if at else "left")
        for values in values_of:
            table.add_row(*values)
        console.print(table)
    for note in [*notes(result), *probing_notes(result)]:
        print(f"note: {note}")
    if result.path is not None:
        print(f"written to {result.path}")
    return 0
