"""`saeforge harvest`: options to `HarvestConfig`, errors to one line."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, set_parsing_settings

from saeforge.errors import ConfigError
from saeforge.harvest import HarvestConfig, harvest


class OneLineParser(ArgumentParser):
    """A parser whose errors are one line instead of a page of usage."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise ConfigError with the message in one line."""
        raise ConfigError(re.sub(r"\s+", " ", message).strip()) from ex


def make_parser() -> ArgumentParser:
    """Return the parser of `saeforge harvest`."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = OneLineParser(
        prog="saeforge harvest",
        description="Run a language model over text and store its activations as webdataset shards.",
        parser_mode="omegaconf+",
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
    parser = make_parser()
    parsed = parser.parse_args(list(argv))
    options: dict[str, Any] = {key: value for key, value in parsed.as_dict().items() if key != "config"}
    try:
        harvest(**options)
    except KeyboardInterrupt:
        print("saeforge: stopped; the same command goes on where this one was", file=sys.stderr)
        return 130
    return 0
