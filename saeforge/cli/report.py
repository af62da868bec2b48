"""`saeforge report RUN [RUN ...]`: a page about runs, in one HTML file."""

from __future__ import annotations

from collections.abc import Sequence

from saeforge.cli.parsing import PARSER_MODE, OneLineParser, configure_jsonargparse


def make_parser() -> OneLineParser:
    """The parser of `saeforge report`."""
    configure_jsonargparse()
    parser = OneLineParser(
        prog="saeforge report",
        description="Write a page about one run, or a comparison of several: one HTML file that loads nothing.",
        parser_mode=PARSER_MODE,
    )
    parser.add_argument("-c", "--config", action="config", help="YAML file with any of the options below.")
    parser.add_argument(
        "runs", type=str, nargs="+", help="RUN folders (runs/<name>); that of a sweep stands for all of its SAEs."
    )
    parser.add_argument(
        "--out",
        type=str | None,
        default=None,
        help="File; default: RUN/report.html, of several runs report.html in the folder that holds them all.",
    )
    parser.add_argument("--latents", type=int, default=24, help="Most latents to show in their contexts; 0: none.")
    parser.add_argument("--contexts", type=int, default=4, help="Strongest contexts of each latent.")
    parser.add_argument("--open", action="store_true", help="Open it in the browser.")
    return parser


def run(argv: Sequence[str]) -> int:
    """Runs the command.

    Args:
        argv: arguments after `saeforge report`.

    Returns:
        Exit code.
    """
    options = make_parser().parse_args(list(argv))

    from saeforge.pages.run_report import report

    path = report(*options.runs, out=options.out, latents=options.latents, contexts=options.contexts)
    print(path)
    if options.open:
        import webbrowser

        if not webbrowser.open(path.resolve().as_uri()):
            print("no browser was found to open it with")
    return 0
