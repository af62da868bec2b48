"""`saeforge push RUN --repo USER/NAME`: an SAE, its figures and its card into a repository of the hub."""

from __future__ import annotations

from collections.abc import Sequence

from saeforge.cli.parsing import PARSER_MODE, OneLineParser, configure_jsonargparse


def make_parser() -> OneLineParser:
    """The parser of `saeforge push`."""
    configure_jsonargparse()
    parser = OneLineParser(
        prog="saeforge push",
        description="Upload the SAE of a RUN, or all SAEs of a sweep, with their figures and a model card to a model "
        "repository of the HuggingFace hub, in one commit. Needs huggingface_hub and a login (`hf auth login`).",
        parser_mode=PARSER_MODE,
    )
    parser.add_argument("-c", "--config", action="config", help="YAML file with any of the options below.")
    parser.add_argument("run", type=str, help="RUN folder (runs/<name>), or an sae/ folder.")
    parser.add_argument("--repo", type=str, required=True, help="USER/NAME; made if there is none.")
    parser.add_argument("--path", type=str, default="", help="Folder inside the repository; default: its top.")
    parser.add_argument("--revision", type=str | None, default=None, help="Branch, made if there is none.")
    parser.add_argument("--private", action="store_true", help="Make the repository private.")
    parser.add_argument("--license", type=str | None, default=None, help="For the card, like apache-2.0.")
    parser.add_argument(
        "--format", type=str, default="native", help="Of the files: native, saelens, sparsify or dictionary_learning."
    )
    parser.add_argument("--message", type=str | None, default=None, help="Of the commit.")
    parser.add_argument("--dry-run", action="store_true", help="Print the card and the files; touch no network.")
    return parser


def run(argv: Sequence[str]) -> int:
    """Runs `saeforge push`.

    Args:
        argv: arguments after `saeforge push`.

    Returns:
        Exit code.
    """
    options = make_parser().parse_args(list(argv))

    from saeforge.cli.data_card import size
    from saeforge.formats.publish import push

    pushed = push(
        options.run,
        options.repo,
        path=options.path,
        revision=options.revision,
        private=options.private,
        license=options.license,
        format=options.format,
        message=options.message,
        dry_run=options.dry_run,
    )
    if pushed.commit is None:
        print(pushed.card)
    for name, count in pushed.sizes.items():
        print(f"{name}  {size(count)}")
    for note in pushed.notes:
        print(f"note: {note}")
    if pushed.commit is None:
        print(f"nothing was uploaded (--dry-run); it would be at {pushed.location}")
    else:
        print(f"pushed: {pushed.commit}")
        names = [f"{pushed.location}/{name}" if name else pushed.location for name in pushed.members]
        print(f'saeforge.load("{names[0]}")' + (f" and {len(names) - 1} more" if names[1:] else ""))
    return 0
