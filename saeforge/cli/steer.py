"""`saeforge steer RUN --edit 123=clamp:0 --prompt "..."`: plain and steered text side by side."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from saeforge.cli.parsing import PARSER_MODE, OneLineParser, configure_jsonargparse, plain_text
from saeforge.errors import ConfigError

if TYPE_CHECKING:
    from saeforge.steering import Audit


def make_parser() -> OneLineParser:
    """The parser of `saeforge steer`."""
    configure_jsonargparse()
    parser = OneLineParser(
        prog="saeforge steer",
        description="Generate text with latents edited, beside the plain text of the same model and seed.",
        parser_mode=PARSER_MODE,
    )
    parser.add_argument("-c", "--config", action="config", help="YAML file with any of the options below.")
    parser.add_argument("run", type=str, help="RUN folder (runs/<name>) or an sae/ folder.")
    parser.add_argument(
        "--edit",
        type=list[str],
        default=[],
        metavar="EDIT",
        help="LATENT=clamp:VALUE[max|p99][:active], LATENT=scale:FACTOR or LATENT=add:VALUE[max|p99]; give it again "
        "for more latents (in a file: a list).",
    )
    parser.add_argument(
        "--prompt",
        type=list[str],
        default=[],
        metavar="TEXT",
        help="Text to continue; give it again for more (in a file: a list).",
    )
    parser.add_argument(
        "--where",
        type=Literal["all", "prompt", "generated"],
        default="all",
        help="Which tokens are edited; special tokens never are.",
    )
    parser.add_argument("--max_new_tokens", type=int, default=60, help="Most tokens to write after each prompt.")
    parser.add_argument("--temperature", type=float, default=0.8, help="Of the sampling.")
    parser.add_argument("--top_p", type=float, default=1.0, help="Sample from the likeliest tokens of this share.")
    parser.add_argument("--seed", type=int, default=0, help="Of the sampling; the same for plain and steered text.")
    parser.add_argument("--greedy", action="store_true", help="The most likely token each time, instead of sampling.")
    parser.add_argument("--model", type=str | None, default=None, help="Where the model is now, if it moved.")
    parser.add_argument(
        "--trust_remote_code",
        type=bool,
        default=False,
        help="Run Python code that comes with the model; read it first.",
    )
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda, ...")
    parser.add_argument("--json", action="store_true", help="Print JSON instead of the table.")
    return parser


def run(argv: Sequence[str]) -> int:
    """Runs the command.

    Args:
        argv: arguments after `saeforge steer`.

    Returns:
        Exit code.
    """
    options = make_parser().parse_args(_RepeatedOptions.gather(argv))
    if not options.edit:
        raise ConfigError("nothing to edit; give --edit, like --edit 123=clamp:0 (latents: `saeforge features search`)")
    if not options.prompt:
        raise ConfigError('nothing to continue; give --prompt "some text"')

    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from saeforge.lm.device import resolve_device
    from saeforge.lm.generate import generate
    from saeforge.lm.origin import origin_of
    from saeforge.sae import load
    from saeforge.steering import format_edits, parse_edits, steer

    edits = parse_edits(options.edit)
    device = resolve_device(options.device)
    sae = load(options.run, device=device)
    origin = origin_of(sae, model=options.model, trust_remote_code=options.trust_remote_code)
    settings = {key: options[key] for key in ("max_new_tokens", "temperature", "top_p", "seed", "greedy")}
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task(f"loading {origin.model}", total=None)
        causal = origin.load_causal(device=device)

        def texts(name: str) -> list[str]:
            progress.update(task, description=f"writing {name} text", completed=0, total=len(options.prompt))
            found = generate(
                causal, options.prompt, on_progress=lambda done, _: progress.update(task, completed=done), **settings
            )
            return [continuation.text for continuation in found]

        # First the one that can be refused: then nobody waits for the other in vain.
        with steer(
            causal.model, sae, edits, where=options.where, scales=options.run, tokenizer=causal.tokenizer
        ) as steering:
            steered = texts("steered")
        plain = texts("plain")
    audit = steering.audit()
    if options.json:
        result = {
            "run": options.run,
            "model": origin.model,
            "site": origin.site.id,
            "edits": format_edits(edits),
            "where": options.where,
            "sampling": settings,
            "texts": [
                {"prompt": prompt, "plain": before, "steered": after}
                for prompt, before, after in zip(options.prompt, plain, steered, strict=True)
            ],
            "audit": audit.to_json(),
        }
        print(json.dumps(result, indent=2, ensure_ascii=False))
        return 0
    console = Console(width=None if sys.stdout.isatty() else 110, highlight=False)
    console.print(_table(options.prompt, plain, steered, f"{origin.model} at {origin.site.id}"))
    for line in _audit_lines(audit):
        console.print(line, markup=False, soft_wrap=True)
    return 0


class _RepeatedOptions(argparse.ArgumentParser):
    """Reads the options that may be given again.

    jsonargparse would want `--edit+`, and would read a prompt like `[sic]` or `${HOME}` as more than text.
    """

    @classmethod
    def gather(cls, argv: Sequence[str]) -> list[str]:
        """Return the arguments with each of these options once, a list in JSON of all that it was given."""
        parser = cls(add_help=False, allow_abbrev=False)
        for name in ("--edit", "--prompt"):
            parser.add_argument(name, action="append")
        found, rest = parser.parse_known_args(list(argv))
        for name, texts in vars(found).items():
            if texts is not None:
                rest.append(f"--{name}={json.dumps(list(map(plain_text, texts)), ensure_ascii=False)}")
        return rest

    def error(self, message: str) -> NoReturn:
        """Raises ConfigError with the message in one line."""
        raise ConfigError(message)


def _table(prompts: Sequence[str], plain: Sequence[str], steered: Sequence[str], title: str) -> Any:
    """The two texts of each prompt side by side, the prompt dimmed."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title), show_lines=True, expand=True)
    for name in ("plain", "steered"):
        table.add_column(name, ratio=1)
    for prompt, *pair in zip(prompts, plain, steered, strict=True):
        table.add_row(*(Text.assemble((prompt, "dim"), text) for text in pair))
    return table


def _audit_lines(audit: Audit) -> list[str]:
    """What the edits did, for people."""
    lines = [
        f"{audit.touched:,} of {audit.selected:,} tokens touched ({audit.where}), |delta|/|x| "
        f"{audit.relative_change:.3g} there"
    ]
    lines += [
        f"latent {number} ({latent.edit}): mean {latent.before:.3g} -> {latent.after:.3g}"
        for number, latent in audit.latents.items()
    ]
    if audit.touched == 0:
        lines.append("note: no token was touched: the edits found nothing to change in these texts")
    return lines
