"""`saeforge export RUN --to FORMAT`: a trained SAE in the files of another tool."""

from __future__ import annotations

from collections.abc import Sequence

from saeforge.cli.parsing import PARSER_MODE, OneLineParser, configure_jsonargparse


def make_parser() -> OneLineParser:
    """The parser of `saeforge export`."""
    configure_jsonargparse()
    parser = OneLineParser(
        prog="saeforge export",
        description="Write a trained SAE in the files of another tool, which need not be installed.",
        parser_mode=PARSER_MODE,
    )
    parser.add_argument("-c", "--config", action="config", help="YAML file with any of the options below.")
    parser.add_argument("run", type=str, help="RUN folder (runs/<name>), an sae/ folder, or another tool's.")
    parser.add_argument(
        "--to",
        type=str,
        required=True,
        metavar="FORMAT",
        help="saelens, sparsify, dictionary_learning, native, or circuit-tracer (RUN: a transcoder of every layer).",
    )
    parser.add_argument("--out", type=str | None, default=None, help="Folder; default: RUN/exports/FORMAT.")
    return parser


def run(argv: Sequence[str]) -> int:
    """Runs the command.

    Args:
        argv: arguments after `saeforge export`.

    Returns:
        Exit code.
    """
    options = make_parser().parse_args(list(argv))

    from pathlib import Path

    from saeforge import formats
    from saeforge.errors import ConfigError

    if options.out is None and options.run.startswith("hf://"):
        raise ConfigError(f"{options.run} is not on this disk; say with --out where its export goes")
    out = Path(options.out or Path(options.run) / "exports" / options.to)
    if formats.holds_sets(options.to):
        saes = formats.Stored(options.run)
        formats.write_set(saes, out, options.to)
        sae, written = saes[0], f"{len(saes)} SAEs like {saes[0]}"
    else:
        sae = formats.load(options.run)
        formats.write(sae, out, options.to)
        written = str(sae)
    print(f"{written} written to {out} as {options.to}")
    for note in formats.notes(sae, options.to):
        print(f"note: {note}")
    return 0
