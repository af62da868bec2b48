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
        "--to", type=str, required=True, metavar="FORMAT", help="saelens, sparsify, dictionary_learning or native."
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
    sae = formats.load(options.run)
    formats.write(sae, out, options.to)
    print(f"{sae} written to {out} as {options.to}")
    return 0
