"""`saeforge features build|show|search|list|concepts|export RUN`: read the latents of a trained SAE."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from saeforge.cli.parsing import PARSER_MODE, OneLineParser, configure_jsonargparse, dispatch, plain_text
from saeforge.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

INTERRUPTED = 130

HELP = """usage: saeforge features COMMAND RUN [options]

What fires the latents of a trained SAE, and which concept they are.

commands:
  build RUN            find what fires every latent: RUN/features.sqlite (resumable)
  show RUN LATENT      one latent: statistics, strongest contexts, samples by strength
  search RUN "WORDS"   latents that fire around these words, or are labelled with them
  list RUN             latents by density, count, max, ...
  concepts RUN         which latent is which label of labelled texts
  export RUN           all latents in the files that Neuronpedia imports

options:
  -h, --help  this text; `saeforge features COMMAND --help` for a command's options"""


def run(argv: Sequence[str]) -> int:
    """Runs the command.

    Args:
        argv: arguments after `saeforge features`.

    Returns:
        Exit code.
    """
    commands: dict[str, Callable[[list[str]], int]] = {
        "build": _build,
        "show": _show,
        "search": _search,
        "list": _list,
        "concepts": _concepts,
        "export": _export,
    }
    return dispatch("features", commands, HELP, argv)


def make_parser(command: str, description: str) -> OneLineParser:
    """A parser with what the commands share: `--config` and RUN."""
    configure_jsonargparse()
    parser = OneLineParser(prog=f"saeforge features {command}", description=description, parser_mode=PARSER_MODE)
    parser.add_argument("-c", "--config", action="config", help="YAML file with any of the options below.")
    parser.add_argument("run", type=str, help="RUN folder (runs/<name>).")
    return parser


def _concepts(argv: list[str]) -> int:
    code: int = importlib.import_module("saeforge.cli.concepts").run(argv)
    return code


def _build(argv: list[str]) -> int:
    parser = make_parser("build", "Find what fires every latent; writes RUN/features.sqlite, resumable.")
    parser.add_argument("--data", type=str | None, default=None, help="Dataset; default: the one it was trained on.")
    parser.add_argument("--split", type=str, default="all", help="train, validation or all, of the dataset.")
    parser.add_argument(
        "--texts",
        type=str | None,
        default=None,
        help="Read text with the model instead of a dataset: demo, stdlib, a folder of text files or a .jsonl file.",
    )
    parser.add_argument("--max_tokens", type=int | None, default=None, help="Read at most so many tokens.")
    parser.add_argument("--model", type=str | None, default=None, help="Where the model is now, if it moved.")
    parser.add_argument(
        "--trust_remote_code",
        type=bool,
        default=False,
        help="Run Python code that comes with the model; read it first.",
    )
    parser.add_argument("--seed", type=int, default=0, help="Of the samples by strength.")
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda, ...")
    parser.add_argument("--overwrite", action="store_true", help="Replace features that were built with other options.")
    parser.add_argument("--json", action="store_true", help="Print what was done as JSON.")
    options = parser.parse_args(argv)

    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from saeforge.features.build import build_features, describe

    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    hidden = not sys.stderr.isatty()
    try:
        with Progress(*columns, console=Console(stderr=True), transient=True, disable=hidden) as progress:
            task = progress.add_task("statistics", total=None)
            built = build_features(
                options.run,
                data=options.data,
                split=options.split,
                texts=options.texts,
                max_tokens=options.max_tokens,
                model=options.model,
                trust_remote_code=options.trust_remote_code,
                seed=options.seed,
                device=options.device,
                overwrite=options.overwrite,
                on_progress=lambda stage, done, total: progress.update(
                    task, description=stage, completed=done, total=total
                ),
            )
    except KeyboardInterrupt:
        print("saeforge: stopped; the same command goes on", file=sys.stderr)
        return INTERRUPTED
    if options.json:
        print(json.dumps(describe(built), indent=2))
    elif built.reused:
        print(f"already built: {built.path} ({built.latents:,} latents, {built.tokens:,} tokens)")
    else:
        print(f"{built.fired:,} of {built.latents:,} latents fired in {built.tokens:,} tokens")
        print(f"{built.examples:,} examples written to {built.path}")
    return 0


def _show(argv: list[str]) -> int:
    parser = make_parser("show", "Show one latent: statistics, strongest contexts, samples by strength.")
    parser.add_argument("latent", type=int, help="Number of the latent.")
    parser.add_argument("--top", type=int, default=10, help="Strongest contexts to show, at most 20.")
    parser.add_argument("--samples", type=int, default=5, help="Samples to show of each range, at most 5.")
    parser.add_argument("--around", type=int, default=12, help="Tokens to show on both sides, at most 24.")
    parser.add_argument("--json", action="store_true", help="Print the JSON instead.")
    options = parser.parse_args(argv)
    for name in ("top", "samples", "around"):
        if options[name] < 0:
            raise ConfigError(f"{name} = {options[name]}: expected at least 0")

    from dataclasses import asdict

    from saeforge.features.store import FeatureStore
    from saeforge.features.terminal import header, render

    with FeatureStore.open(options.run) as store:
        feature = store.latent(options.latent)
        top = store.top(options.latent, options.top)
        samples = [part[: options.samples] for part in store.samples(options.latent)]
        d_sae = store.d_sae
    if options.json:
        content = {
            **asdict(feature),
            "top": [asdict(example) for example in top],
            "samples": [[asdict(example) for example in part] for part in samples],
        }
        print(json.dumps(content, indent=2, ensure_ascii=False))
        return 0
    console = _console()
    colour = console.is_terminal and not console.no_color
    for line in header(feature, d_sae):
        console.print(line, markup=False, highlight=False)
    groups = [("strongest contexts", top)]
    names = ["the octave of the maximum", *(f"{2**n} times weaker" for n in range(1, len(samples) - 1)), "weaker still"]
    groups += [(f"samples: {name}", part) for name, part in zip(names, samples, strict=True)]
    for name, examples in groups:
        if examples:
            console.print(f"\n{name}", markup=False, highlight=False, style="bold")
        for example in examples:
            console.print(
                render(example, feature.max, colour=colour, around=options.around),
                highlight=False,
                soft_wrap=not colour,
            )
    return 0


def _search(argv: list[str]) -> int:
    parser = make_parser("search", "Find latents by the words on and around which they fire, and by their labels.")
    parser.add_argument("query", type=str, help='Words, all of which must occur; "in quotes" they stand side by side.')
    parser.add_argument("--limit", type=int, default=10, help="Most latents to list.")
    parser.add_argument("--json", action="store_true", help="Print the JSON instead of the table.")
    options = parser.parse_args(list(map(plain_text, argv)))
    _check_limit(options.limit)

    from dataclasses import asdict

    from rich.text import Text

    from saeforge.features.store import FeatureStore

    with FeatureStore.open(options.run) as store:
        hits = store.search(options.query, options.limit)
        features = [store.latent(hit.latent) for hit in hits]
    if options.json:
        print(json.dumps([asdict(hit) for hit in hits], indent=2, ensure_ascii=False))
        return 0
    if not hits:
        print(f"no latent fires around {options.query!r} in its strongest contexts")
        return 0
    rows = [
        (str(hit.latent), f"{100 * feature.density:.3g}%", Text(hit.labels), Text(" ".join(hit.snippet.split())))
        for hit, feature in zip(hits, features, strict=True)
    ]
    _print_table(("latent", "density", "labels", "where"), rows)
    return 0


def _list(argv: list[str]) -> int:
    parser = make_parser("list", "List latents that fired.")
    parser.add_argument(
        "--sort", type=str, default="density", help="latent, count, density, mean, max, p99 or documents."
    )
    parser.add_argument("--limit", type=int, default=20, help="Most latents to list.")
    parser.add_argument("--json", action="store_true", help="Print the JSON instead of the table.")
    options = parser.parse_args(argv)
    _check_limit(options.limit)

    from dataclasses import asdict

    from rich.text import Text

    from saeforge.features.store import FeatureStore
    from saeforge.features.terminal import mark

    with FeatureStore.open(options.run) as store:
        features = store.ranked(options.sort, options.limit)
        best = [store.top(feature.latent, 1)[0] for feature in features]
    if options.json:
        print(json.dumps([asdict(feature) for feature in features], indent=2, ensure_ascii=False))
        return 0
    rows = []
    for feature, example in zip(features, best, strict=True):
        window = slice(max(example.centre - 4, 0), example.centre + 5)
        text = mark(example.tokens[window], example.values[window])
        numbers = (f"{100 * feature.density:.3g}%", f"{feature.max:.4g}", f"{feature.documents:,}")
        labels = ", ".join(label["label"] for label in feature.labels[:2])
        rows.append((str(feature.latent), *numbers, Text(labels), Text(" ".join(text.split()))))
    _print_table(("latent", "density", "max", "documents", "labels", "strongest"), rows)
    return 0


def _export(argv: list[str]) -> int:
    parser = make_parser("export", "Write all latents of RUN/features.sqlite in the files of another tool.")
    parser.add_argument("--to", type=str, default="neuronpedia", help="neuronpedia: what it imports in bulk.")
    parser.add_argument("--out", type=str | None, default=None, help="Folder; default: RUN/exports/neuronpedia.")
    names = {
        "model_id": "Name of the model there, for example gemma-2-2b; default: the last part of its name.",
        "source_set": "Name of the set of SAEs; with the layer, 12-SET, that of this one. Default: the RUN's.",
        "release": "Name of the release; default: that of the set.",
        "title": "Of the release, for people.",
        "creator": "Who made it.",
        "creator_id": "The user there that owns the rows; default: that of a fresh instance.",
        "url": "Of the release.",
        "dataset": "Name of the text that was read.",
        "hf_repo": "Repository of the weights on the HuggingFace hub.",
        "hf_folder": "Folder of the weights in it.",
    }
    for name, text in names.items():
        parser.add_argument(f"--{name}", type=str | None, default=None, help=text)
    parser.add_argument("--layer", type=int | None, default=None, help="Default: the layer in the site's name.")
    parser.add_argument("--model", type=str | None, default=None, help="Where the model is now, if it moved.")
    parser.add_argument(
        "--trust_remote_code",
        type=bool,
        default=False,
        help="Run Python code that comes with the model; read it first.",
    )
    options = parser.parse_args(argv)
    if options.to != "neuronpedia":
        raise ConfigError(f"--to {options.to}: expected neuronpedia; weights are written by `saeforge export`")

    from pathlib import Path

    from saeforge.features.neuronpedia import export

    source = export(
        options.run,
        options.out or Path(options.run) / "exports" / "neuronpedia",
        layer=options.layer,
        model=options.model,
        trust_remote_code=options.trust_remote_code,
        **{name: options[name] for name in names},
    )
    print(f"written to {source}; put it at v1/{source.parent.name}/{source.name} of the bucket that Neuronpedia reads")
    return 0


def _check_limit(limit: int) -> None:
    if limit < 1:
        raise ConfigError(f"limit = {limit}: expected at least 1")


def _console() -> Console:
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 110)


def _print_table(names: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    from rich.table import Table

    table = Table()
    for name in names:
        table.add_column(name, justify="right" if name in ("latent", "density", "max", "documents") else "left")
    for row in rows:
        table.add_row(*row)
    _console().print(table)
