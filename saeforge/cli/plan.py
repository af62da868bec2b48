"""`saeforge plan`: memory, time and traffic of a run before it is started, for any number of devices."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Literal

from saeforge import scaling
from saeforge.cli.parsing import PARSER_MODE, OneLineParser, configure_jsonargparse
from saeforge.errors import ConfigError
from saeforge.scaling import DEVICES, Device, Plan, Shape

_MOST_DEVICES = 512
#: Which field of `Device` an option overrides.
_OVERRIDES = ("tflops", "bandwidth", "link", "network", "memory", "per_node")


def make_parser() -> OneLineParser:
    """The parser of `saeforge plan`; names may be written with hyphens too."""
    configure_jsonargparse()
    parser = OneLineParser(
        prog="saeforge plan",
        description="Memory of a device, floor of a step, traffic, tokens/s and disk GB/s, by arithmetic: for data "
        "parallelism (trainer.strategy ddp) and for latents shared out over devices (latent_parallel).",
        parser_mode=PARSER_MODE,
        allow_abbrev=False,
    )
    parser.add_argument("-c", "--config", action="config", help="YAML file with any of the options below.")
    parser.add_argument("--d_in", type=int, required=True, help="Width of the activations.")
    parser.add_argument("--d_sae", type=int, required=True, help="Latents.")
    parser.add_argument("--k", type=int, required=True, help="Active latents of a token.")
    parser.add_argument("--d_out", type=int | None, default=None, help="Width of another target (a transcoder).")
    parser.add_argument("--batch", type=int, default=4096, help="Tokens of a step, over all devices together.")
    parser.add_argument(
        "--devices", type=int, default=8, help=f"The table goes up to so many, {_MOST_DEVICES} at most."
    )
    parser.add_argument("--gpu", type=Literal[tuple(DEVICES)], default="h200", help="Kind of device; cpu is one, too.")
    parser.add_argument(
        "--precision", type=Literal[scaling.PRECISIONS], default="bf16-mixed", help="As trainer.precision."
    )
    parser.add_argument(
        "--latent_ranks", type=int | None, default=None, help="Devices that share the latents; a node's."
    )
    parser.add_argument("--block_rows", type=int | None, default=None, help="Of the dataset (`saeforge data inspect`).")
    parser.add_argument("--tflops", type=float | None, default=None, help="TFLOP/s of a product in --precision.")
    parser.add_argument("--bandwidth", type=float | None, default=None, help="GB/s of a device's memory.")
    parser.add_argument("--link", type=float | None, default=None, help="GB/s from device to device, one direction.")
    parser.add_argument("--network", type=float | None, default=None, help="GB/s of a device to another node.")
    parser.add_argument("--memory", type=float | None, default=None, help="GB of a device.")
    parser.add_argument("--per_node", type=int | None, default=None, help="Devices of a node.")
    parser.add_argument("--json", action="store_true", help="Print JSON instead of tables.")
    return parser


def run(argv: Sequence[str]) -> int:
    """Runs the command.

    Args:
        argv: arguments after `saeforge plan`.

    Returns:
        Exit code.
    """
    given = make_parser().parse_args([_underscored(word) for word in argv]).as_dict()
    if not 1 <= given["devices"] <= _MOST_DEVICES:
        raise ConfigError(f"devices = {given['devices']}: expected 1 to {_MOST_DEVICES}")
    shape = Shape(
        given["d_in"],
        given["d_sae"],
        given["k"],
        given["batch"],
        given["d_out"],
        given["precision"],
        block_rows=given["block_rows"],
    )
    device = _device(given)
    plans = [
        scaling.plan(shape, layout, device)
        for count in _counts(given["devices"])
        for layout in dict.fromkeys(
            scaling.layout_of(kind, count, device, given["latent_ranks"]) for kind in scaling.LAYOUTS
        )
    ]
    if given["json"]:
        print(json.dumps(as_json(shape, device, plans), indent=2))
    else:
        print("\n".join(as_text(shape, device, plans)))
    return 0


def as_json(shape: Shape, device: Device, plans: Sequence[Plan]) -> dict[str, object]:
    """Everything that the tables say, in bytes, seconds and GB/s."""
    return {
        "shape": asdict(shape),
        "device": asdict(device),
        "plans": [{**asdict(each), "layout": {"name": each.layout.name, **asdict(each.layout)}} for each in plans],
        "assumptions": scaling.assumptions(device),
    }


def as_text(shape: Shape, device: Device, plans: Sequence[Plan]) -> list[str]:
    """A table of all plans, the parts of the first and of the last ones, and what they rest on."""
    rows = [("devices", "layout", "GB a device", "step ms", "limit", "tokens/s", "exchange MB", "disk GB/s")]
    for each in plans:
        rows.append(
            (
                str(each.layout.devices),
                each.layout.name,
                f"{each.memory['peak'] / 1e9:.1f}{'' if each.fits else ' (too much)'}",
                _figure(1e3 * each.seconds["step"]),
                each.limit.replace("_", " "),
                f"{each.tokens_per_second:,.0f}",
                f"{sum(each.traffic.values()) / 1e6:,.1f}",
                _figure(each.disk),
            )
        )
    most = plans[-1].layout.devices
    shown = [each for each in plans if each.layout.devices == most]
    lines = [
        f"d_in {shape.d_in:,}, d_sae {shape.d_sae:,}, k {shape.k}, {shape.batch:,} tokens a step, {shape.precision}, "
        f"{device.name}",
        "",
        *_aligned(rows),
    ]
    for title, unit, scale, of in (
        (f"memory of each of {most} devices", "GB", 1e9, [each.memory for each in shown]),
        ("floor of a step", "ms", 1e-3, [each.seconds for each in shown]),
        ("handed to the collectives of a step by each", "MB", 1e6, [each.traffic for each in shown]),
    ):
        table = [(title, *(f"{each.layout.name}, {unit}" for each in shown))]
        table += [(name.replace("_", " "), *(_figure(part[name] / scale) for part in of)) for name in of[0]]
        lines += ["", *_aligned(table)]
    return [*lines, "", "assumptions", *(f"  {line}" for line in scaling.assumptions(device))]


def _figure(value: float) -> str:
    return "0" if value == 0 else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    words = {0: str.ljust, **({1: str.ljust, 4: str.ljust} if len(rows[0]) == 8 else {})}
    return [
        "  ".join(
            words.get(at, str.rjust)(cell, width) for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def _device(given: dict[str, object]) -> Device:
    """The device of that name with what was overridden."""
    device, values = DEVICES[str(given["gpu"])], {name: given[name] for name in _OVERRIDES if given[name] is not None}
    for name, value in values.items():
        if not isinstance(value, int | float) or value <= 0:
            raise ConfigError(f"{name} = {value}: expected a positive number")
    if "tflops" in values and given["precision"] != "bf16-mixed":
        values["tflops_fp32"] = values.pop("tflops")
    return replace(device, **values)  # type: ignore[arg-type]  # checked above


def _counts(most: int) -> list[int]:
    """1, 2, 4 ... and `most` itself."""
    powers = [1 << power for power in range(most.bit_length()) if 1 << power < most]
    return [*powers, most]


def _underscored(word: str) -> str:
    name, equals, value = word.partition("=")
    return f"--{name[2:].replace('-', '_')}{equals}{value}" if word.startswith("--") else word
