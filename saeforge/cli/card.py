"""`saeforge card RUN`: the model card of what a run trained."""

from __future__ import annotations

from collections.abc import Sequence

from saeforge.cli.parsing import PARSER_MODE, OneLineParser, configure_jsonargparse


def make_parser() -> OneLineParser:
    """The parser of `saeforge card`."""
    configure_jsonargparse()
    parser = OneLineParser(
        prog="saeforge card",
        description="Print the model card that `saeforge push` would upload with a RUN.",
        parser_mode=PARSER_MODE,
    )
    parser.add_argument("-c", "--config", action="config", help="YAML file with any of the options below.")
    parser.add_argument("run", type=str, help="RUN folder (runs/<name>), or an sae/ folder.")
    parser.add_argument("--repo", type=str | None, default=None, help="USER/NAME, for the lines of use.")
    parser.add_argument("--path", type=str, default="", help="Folder inside the repository.")
    parser.add_argument("--license", type=str | None, default=None, help="Like apache-2.0.")
    parser.add_argument("--out", type=str | None, default=None, help="File to write; default: print.")
    return parser


def run(argv: Sequence[str]) -> int:
    """Runs `saeforge card`.

    Args:
        argv: arguments after `saeforge card`.

    Returns:
        Exit code.
    """
    options = make_parser().parse_args(list(argv))

    from pathlib import Path

    from saeforge.formats.publish import card_of, write_card

    card = card_of(options.run, repo=options.repo, path=options.path, license=options.license)
    if options.out is None:
        print(card)
    else:
        print(f"written to {write_card(card, Path(options.out))}")
    return 0
