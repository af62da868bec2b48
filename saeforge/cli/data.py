"""`saeforge data inspect|verify|import`: look at a dataset, check every byte of it, make one of stored activations."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from saeforge.cli.parsing import PARSER_MODE, OneLineParser, configure_jsonargparse, dispatch
from saeforge.errors import ConfigError

INTERRUPTED = 130
DAMAGED = 1

HELP = """usage: saeforge data COMMAND ... [options]

Datasets of activations: what is in one, whether it is whole, and how to make one of activations stored elsewhere.

commands:
  inspect PATH               a card: model, sites, splits, statistics, norms, texts, sample rows
  verify PATH                read every byte; one line for each bad block, exit code 1 if there is one
  import SOURCE... --out P   from .npy, .safetensors, plain tars of .npy, or the Arrow folder that SAELens caches

options:
  -h, --help  this text; `saeforge data COMMAND --help` for a command's options"""


def run(argv: Sequence[str]) -> int:
    """Runs the command.

    Args:
        argv: arguments after `saeforge data`.

    Returns:
        Exit code.
    """
    commands: dict[str, Callable[[list[str]], int]] = {"inspect": _inspect, "verify": _verify, "import": _import}
    return dispatch("data", commands, HELP, argv)


def _make_parser(command: str, description: str) -> OneLineParser:
    configure_jsonargparse()
    parser = OneLineParser(
        prog=f"saeforge data {command}", description=description, parser_mode=PARSER_MODE, allow_abbrev=False
    )
    parser.add_argument("-c", "--config", action="config", help="YAML file with any of the options below.")
    return parser


def _inspect(argv: list[str]) -> int:
    parser = _make_parser("inspect", "Show what a dataset holds, or how far it is if it is still being made.")
    parser.add_argument("path", type=str, help="The dataset's folder or URL.")
    parser.add_argument("--sites", type=list[str] | None, default=None, help="Only these sites: '[resid_post.3]'.")
    parser.add_argument("--samples", type=int, default=5, help="Rows to show in the text that they come from.")
    parser.add_argument(
        "--decode",
        type=str,
        default="auto",
        help="Show samples as text, with the model's tokenizer: true, false, or auto (if it is on this machine).",
    )
    parser.add_argument(
        "--trust_remote_code",
        type=bool,
        default=False,
        help="Run Python code that comes with the tokenizer; read it first.",
    )
    parser.add_argument("--json", action="store_true", help="Print the JSON instead.")
    options = parser.parse_args(argv)
    if options.samples < 0:
        raise ConfigError(f"samples = {options.samples}: expected at least 0")
    if options.decode not in ("auto", "true", "false"):
        raise ConfigError(f"decode = {options.decode!r}: expected auto, true or false")

    from saeforge.cli.data_card import card_lines, decoder
    from saeforge.data.card import describe_dataset

    facts = describe_dataset(options.path, sites=options.sites, samples=options.samples)
    if options.json:
        print(json.dumps(facts, indent=2, ensure_ascii=False))
        return 0
    trust = options.trust_remote_code
    decode = decoder(facts["model"], options.decode, trust_remote_code=trust) if facts.get("samples") else None
    for line in card_lines(facts, decode):
        print(line)
    return 0


def _verify(argv: list[str]) -> int:
    parser = _make_parser("verify", "Read every byte of a dataset; exit 1 and a line for each bad block if any is bad.")
    parser.add_argument("path", type=str, help="The dataset's folder or URL.")
    parser.add_argument("--sites", type=list[str] | None, default=None, help="Only these sites: '[resid_post.3]'.")
    parser.add_argument("--json", action="store_true", help="Print the findings as JSON.")
    options = parser.parse_args(argv)

    from dataclasses import asdict

    from saeforge.data.verify import verify_dataset

    size = 0

    def seen(done: int, total: int) -> None:
        nonlocal size
        size = total
        show(done, total)

    with _bar("verifying", bytes_=True) as show:
        findings = verify_dataset(options.path, sites=options.sites, progress=seen)
    if options.json:
        content = {"path": options.path, "ok": not findings, "findings": [asdict(finding) for finding in findings]}
        print(json.dumps(content, indent=2, ensure_ascii=False))
    elif findings:
        for finding in findings:
            print(" ".join(str(finding).split()))
    else:
        print(f"{options.path}: all is well ({size / 2**20:,.1f} MiB of shards read)")
    return DAMAGED if findings else 0


def _import(argv: list[str]) -> int:
    parser = _make_parser(
        "import",
        "Make a dataset of activations stored elsewhere; the same command goes on with an interrupted one.",
    )
    parser.add_argument(
        "sources",
        type=str,
        nargs="+",
        help="Files, globs or folders: .npy and tar members (rows, d) or (contexts, length, d), .safetensors, or the "
        "Arrow folder of SAELens' CacheActivationsRunner (needs saeforge[parquet]).",
    )
    parser.add_argument("--out", type=str, help="Folder of the dataset.", required=True)
    parser.add_argument(
        "--key", type=str | None, default=None, help="Tensor or tar member to take (* matches), or Arrow column."
    )
    parser.add_argument(
        "--site",
        type=str | None,
        default=None,
        help="Where the activations come from: model.layers.6:out, as in the HuggingFace model; default: the Arrow "
        "column, else array:out.",
    )
    parser.add_argument("--model", type=str | None, default=None, help="Name of the model, to be recorded.")
    parser.add_argument(
        "--dtype",
        type=str,
        default="auto",
        help="float32 or bfloat16; auto keeps bfloat16 and stores all else as float32, which holds float16 exactly.",
    )
    parser.add_argument(
        "--validation_share", type=float, default=0.1, help="Share of the rows held out, in whole contexts; 0 for none."
    )
    parser.add_argument("--shuffle", type=bool, default=True, help="false keeps the order of the rows.")
    parser.add_argument("--seed", type=int, default=0, help="Of the shuffle.")
    parser.add_argument(
        "--skip_token_ids",
        type=list[int],
        default=[],
        help="Leave out the rows of these tokens, where the source has token ids: '[50256]' for GPT-2's BOS.",
    )
    parser.add_argument(
        "--bucket_rows", type=int | None, default=None, help="Rows in memory at once, a power of two; default: 1 GiB."
    )
    parser.add_argument("--overwrite", type=bool, default=False, help="Replace another import in the same folder.")
    parser.add_argument("--json", action="store_true", help="Print what was made as JSON.")
    options = parser.parse_args(argv)

    from saeforge.cli.data_card import card_lines
    from saeforge.data.card import describe_dataset
    from saeforge.data.imports import import_activations

    try:
        with _bar("importing rows") as show:
            import_activations(
                options.sources,
                options.out,
                key=options.key,
                site=options.site,
                dtype=options.dtype,
                model=options.model,
                validation_share=options.validation_share,
                shuffle=options.shuffle,
                seed=options.seed,
                skip_token_ids=options.skip_token_ids,
                bucket_rows=options.bucket_rows,
                overwrite=options.overwrite,
                note=lambda text: print(f"note: {text}", file=sys.stderr),
                progress=show,
            )
    except KeyboardInterrupt:
        print("saeforge: stopped; the same command goes on where this one was", file=sys.stderr)
        return INTERRUPTED
    facts = describe_dataset(options.out, samples=0)
    print(json.dumps(facts, indent=2, ensure_ascii=False) if options.json else "\n".join(card_lines(facts, None)))
    return 0


@contextmanager
def _bar(what: str, *, bytes_: bool = False) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on stderr, where that is a terminal."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    count = DownloadColumn(binary_units=True) if bytes_ else MofNCompleteColumn()
    columns = (TextColumn(what), BarColumn(), count, TimeRemainingColumn(compact=True), TextColumn("left"))
    hidden = not sys.stderr.isatty()
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=hidden) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
