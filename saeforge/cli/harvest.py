"""`saeforge harvest`: options to `HarvestConfig`, errors to one line."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from jsonargparse import ArgumentParser

from saeforge.cli.parsing import PARSER_MODE, OneLineParser, configure_jsonargparse
from saeforge.harvest import HarvestConfig, harvest


def make_parser() -> ArgumentParser:
    """Return the parser of `saeforge harvest`."""
    configure_jsonargparse()
    parser = OneLineParser(
        prog="saeforge harvest",
        description="Run a language model over text and store its activations as webdataset shards.",
        parser_mode=PARSER_MODE,
        allow_abbrev=False,  # or a typo that happens to be a prefix would be taken for an option
    )
    parser.add_argument("-c", "--config", action="config", help="YAML file with any of the options below.")
    parser.add_class_arguments(HarvestConfig, None)
    return parser


def run(argv: Sequence[str]) -> int:
    """Run the command.

    Args:
        argv: arguments after `saeforge harvest`.

    Returns:
        Exit code.
    """
    parsed = make_parser().parse_args(list(argv)).as_dict()
    try:
        harvest(**{key: value for key, value in parsed.items() if key != "config"})
    except KeyboardInterrupt:
        print("saeforge: stopped; the same command goes on where this one was", file=sys.stderr)
        return 130
    return 0
