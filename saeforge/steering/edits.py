"""Edits of latents and their one grammar: `123=clamp:0`, `456=scale:4`, `789=add:0.5p99`.

    LATENT=clamp:VALUE[UNIT][:active]    the latent gets this value; with `:active` only where it fires
    LATENT=scale:FACTOR                  its value times FACTOR; where it does not fire nothing changes
    LATENT=add:VALUE[UNIT]               its value plus VALUE, everywhere

UNIT is `max` or `p99`, the latent's own maximum or the 99th percentile of its non-zero values; without one the value is
absolute, in the units of the latent's activation.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, cast, get_args

from saeforge.errors import ConfigError

Unit = Literal["abs", "max", "p99"]

_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_EDIT = re.compile(rf"(?P<kind>\w+):(?P<value>{_NUMBER})(?P<unit>abs|max|p99)?(?P<active>:active)?")
_FORMS = "clamp:VALUE[max|p99][:active], scale:FACTOR or add:VALUE[max|p99], like 123=clamp:0 or 789=add:0.5p99"


@dataclass(frozen=True)
class Clamp:
    """The latent gets a value, at every token or only where it fires.

    Attributes:
        value: also negative, which no encoder would give.
        unit: what 1 means.
        when_active: leave tokens alone where the latent does not fire.
    """

    value: float
    unit: Unit = "abs"
    when_active: bool = False

    def __post_init__(self) -> None:
        _check(self.value, self.unit)

    def __str__(self) -> str:
        return f"clamp:{_amount(self.value, self.unit)}{':active' if self.when_active else ''}"


@dataclass(frozen=True)
class Scale:
    """The latent's value is multiplied; 1 changes nothing, 0 silences it."""

    factor: float

    def __post_init__(self) -> None:
        _check(self.factor, "abs")

    def __str__(self) -> str:
        return f"scale:{_amount(self.factor, 'abs')}"


@dataclass(frozen=True)
class Add:
    """A value is added to the latent's, whether it fires or not: the decoder's row, `value` times, at every token.

    Attributes:
        value: what is added.
        unit: what 1 means.
    """

    value: float
    unit: Unit = "abs"

    def __post_init__(self) -> None:
        _check(self.value, self.unit)

    def __str__(self) -> str:
        return f"add:{_amount(self.value, self.unit)}"


Edit = Clamp | Scale | Add
Edits = Mapping[int, Edit] | Iterable[str]


def parse_edit(text: str) -> tuple[int, Edit]:
    """Return latent and edit of one `LATENT=EDIT`.

    Raises:
        ConfigError: it is not of the grammar.
    """
    latent, equals, rest = text.strip().partition("=")
    if not equals or not latent.strip().isascii() or not latent.strip().isdigit():
        raise ConfigError(f"edit {text!r}: expected LATENT=EDIT with the latent's number, like 123=clamp:0")
    found = _EDIT.fullmatch(rest.strip())
    if found is None:
        raise ConfigError(f"edit {text!r}: expected {_FORMS}")
    kind, value, active = found["kind"], float(found["value"]), found["active"]
    unit = cast(Unit, found["unit"] or "abs")
    edit: Edit
    if kind == "clamp":
        edit = Clamp(value, unit, active is not None)
    elif active is not None:
        raise ConfigError(f"edit {text!r}: only clamp takes :active")
    elif kind == "add":
        edit = Add(value, unit)
    elif kind == "scale":
        if found["unit"] is not None:
            raise ConfigError(f"edit {text!r}: scale takes a plain factor, without {unit}")
        edit = Scale(value)
    else:
        raise ConfigError(f"edit {text!r}: unknown kind {kind!r}; expected {_FORMS}")
    return int(latent), edit


def parse_edits(edits: Edits) -> dict[int, Edit]:
    """Return edits by latent, from objects or from texts of the grammar.

    Args:
        edits: `{123: Clamp(0)}`, or `["123=clamp:0", "456=scale:4"]`.

    Raises:
        ConfigError: not of the grammar, or two edits of one latent.
    """
    if isinstance(edits, Mapping):
        for latent, edit in edits.items():
            if isinstance(latent, bool) or not isinstance(latent, int) or not isinstance(edit, Edit):
                raise ConfigError(
                    f"edits: {latent!r}: {edit!r} given; expected a latent's number and a Clamp, Scale or Add"
                )
        return dict(edits)
    result: dict[int, Edit] = {}
    for text in [edits] if isinstance(edits, str) else edits:
        if not isinstance(text, str):
            raise ConfigError(f"edits: {text!r} given; expected texts like '123=clamp:0', or a dict of latent to edit")
        latent, edit = parse_edit(text)
        if latent in result:
            raise ConfigError(f"latent {latent} is edited twice ({result[latent]} and {edit}); give it one edit")
        result[latent] = edit
    return result


def format_edits(edits: Mapping[int, Edit]) -> list[str]:
    """Return the texts that `parse_edits` reads back."""
    return [f"{latent}={edit}" for latent, edit in edits.items()]


def _check(value: float, unit: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ConfigError(f"an edit's value is {value!r}; expected a finite number")
    if unit not in get_args(Unit):
        raise ConfigError(f"an edit's unit is {unit!r}; expected one of {', '.join(get_args(Unit))}")


def _amount(value: float, unit: Unit) -> str:
    """Return the shortest text that reads back as the same number."""
    return repr(float(value)).removesuffix(".0") + ("" if unit == "abs" else unit)
