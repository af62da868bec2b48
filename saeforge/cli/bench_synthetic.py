"""`saeforge bench-synthetic`: variants on activations with known features, at the same L0."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

from saeforge.cli.parsing import PARSER_MODE, OneLineParser, configure_jsonargparse
from saeforge.errors import ConfigError

#: Options that may be given several times; the parser behind takes them as one list.
_REPEATED = ("set", "knob")


def make_parser() -> OneLineParser:
    """The parser of `saeforge bench-synthetic`."""
    configure_jsonargparse()
    parser = OneLineParser(
        prog="saeforge bench-synthetic",
        description="Train variants on synthetic activations and judge them by the features behind these, at equal L0; "
        "writes OUT/results.json after every run, OUT/report.md and OUT/plot.svg. The same command goes on after an "
        "interruption.",
        parser_mode=PARSER_MODE,
        allow_abbrev=False,
    )
    parser.add_argument("-c", "--config", action="config", help="YAML file with any of the options below.")
    parser.add_argument("--variants", type=list[str] | None, default=None, help="Names; default: all installed ones.")
    parser.add_argument("--preset", type=str, default="small", help="small (two CPU cores) or 16k (SynthSAEBench-16k).")
    parser.add_argument("--out", type=str, default="bench-synthetic", help="Folder.")
    parser.add_argument("--l0", type=list[float] | None, default=None, help="Wanted L0; default: the preset's.")
    parser.add_argument("--seeds", type=int, default=3, help="Runs of everything.")
    parser.add_argument(
        "--set", type=list[str], default=[], help="VARIANT.OPTION=VALUE (YAML); may be given several times."
    )
    parser.add_argument(
        "--knob",
        type=list[str],
        default=[],
        help="VARIANT=OPTION sets L0 itself, VARIANT=OPTION:START is a penalty that starts there, "
        "VARIANT=OPTION:START:rising a target; may be given several times. Needed for unusual names only.",
    )
    parser.add_argument(
        "--data", type=str | None, default=None, help="Rows on disk; default: they are made while training."
    )
    parser.add_argument("--samples", type=int | None, default=None, help="Rows of a run; default: the preset's.")
    parser.add_argument("--batch_size", type=int | None, default=None, help="Rows of a step; default: the preset's.")
    parser.add_argument("--d_sae", type=int | None, default=None, help="Latents; default: the preset's.")
    parser.add_argument("--lr", type=float | None, default=None, help="Constant rate; default: the preset's.")
    parser.add_argument("--precision", type=str | None, default=None, help="32-true or bf16-mixed.")
    return parser


def run(argv: Sequence[str]) -> int:
    """Runs the command.

    Args:
        argv: arguments after `saeforge bench-synthetic`.

    Returns:
        Exit code.
    """
    parsed = make_parser().parse_args(_gathered(argv)).as_dict()
    parsed.pop("config", None)
    settings, knobs = _settings(parsed.pop("set")), dict(_pair(text, "--knob") for text in parsed.pop("knob"))

    from rich.console import Console
    from rich.table import Table

    from saeforge.benchmark import bench_synthetic
    from saeforge.benchmark.report import table

    def show(record: dict[str, Any]) -> None:
        print(
            f"{record['variant']:12} seed {record['seed']}  setting {record['value']:.5g}  L0 {record['l0']:.2f}  "
            f"F1 {record['f1']:.4f}  MCC {record['mcc']:.4f}  EV {record['explained_variance']:.4f}  "
            f"dead {record['dead']}  {record['seconds']:.0f} s",
            flush=True,
        )

    summaries = bench_synthetic(**parsed, options=settings, knobs=knobs, progress=sys.stderr.isatty(), on_run=show)
    heading, *rows = table(summaries)
    printed = Table()
    for number, name in enumerate(heading):
        printed.add_column(name, justify="left" if number == 0 else "right")
    for row in rows:
        printed.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 200).print(printed)
    print(f"written to {parsed['out']}/report.md, plot.svg and results.json")
    missing = [f"{each.variant} seed {seed} at L0 {each.target:g}" for each in summaries for seed in each.missing]
    if missing:
        print(f"note: no run near the wanted L0: {', '.join(missing)}")
    return 0


def _gathered(argv: Sequence[str]) -> list[str]:
    """The arguments with every `--set a --set b` as one list, in the parser's own notation."""
    rest: list[str] = []
    found: dict[str, list[str]] = {name: [] for name in _REPEATED}
    words = iter(argv)
    for word in words:
        name, equals, value = word.removeprefix("--").partition("=")
        if word.startswith("--") and name in found:
            if not equals and (value := next(words, "")) == "":
                raise ConfigError(f"--{name} needs a value")
            found[name].append(value)
        else:
            rest.append(word)
    return rest + [f"--{name}={json.dumps(values)}" for name, values in found.items() if values]


def _pair(text: str, option: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name or not value:
        form = "VARIANT=OPTION[:START[:rising]]" if option == "--knob" else "VARIANT.OPTION=VALUE"
        raise ConfigError(f"{option} {text!r}: expected {form}")
    return name, value


def _settings(texts: Sequence[str]) -> dict[str, dict[str, Any]]:
    """`topk.aux=0` -> {"topk": {"aux": 0}}; values are YAML."""
    import yaml

    settings: dict[str, dict[str, Any]] = {}
    for text in texts:
        name, value = _pair(text, "--set")
        variant, dot, option = name.partition(".")
        if not dot or not option:
            raise ConfigError(f"--set {text!r}: expected VARIANT.OPTION=VALUE")
        try:
            settings.setdefault(variant, {})[option] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ConfigError(f"--set {text!r}: the value is no YAML") from error
    return settings
