"""HTML that is escaped by construction: strings become text, and only `Markup` becomes markup.

What a page shows comes from datasets, file names and configurations, and is hostile until proven otherwise: it may
close a script, turn the reading direction round, or hold bytes that no document may contain.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Iterable
from typing import Any

#: What has no closing tag.
_VOID = {"br", "hr", "input", "link", "meta"}
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
#: Characters that turn the direction of what follows, hide themselves, or are forbidden in HTML -> what is shown.
_SHOWN = {
    **{code: chr(0x2400 + code) for code in range(0x20)},  # pictures of the control characters
    0x09: "\N{RIGHTWARDS ARROW TO BAR}",
    0x0A: "\N{RETURN SYMBOL}",
    0x7F: "\N{SYMBOL FOR DELETE}",
    **dict.fromkeys(range(0x80, 0xA0), _REPLACEMENT),
    **{
        code: f"\N{LEFT WHITE TORTOISE SHELL BRACKET}U+{code:04X}\N{RIGHT WHITE TORTOISE SHELL BRACKET}"
        for code in (0x061C, 0x200E, 0x200F, 0x2028, 0x2029, *range(0x202A, 0x202F), *range(0x2066, 0x206A), 0xFEFF)
    },
    **dict.fromkeys(range(0xD800, 0xE000), _REPLACEMENT),  # lone surrogates, which UTF-8 has no bytes for
    **dict.fromkeys(
        [*range(0xFDD0, 0xFDF0), *(plane + low for plane in range(0, 0x110000, 0x10000) for low in (0xFFFE, 0xFFFF))],
        _REPLACEMENT,
    ),
}


class Markup(str):
    """Text that is HTML already. Made by `tag`, `join` and `svg.py` alone."""

    __slots__ = ()


def text(value: object) -> Markup:
    """Text as it may stand anywhere in a document, attributes in double quotes included.

    Control characters and those that change the reading direction are shown, not obeyed.
    """
    if isinstance(value, Markup):
        return value
    return Markup(html.escape(visible(str(value)), quote=True))


def visible(value: str) -> str:
    """Text with what cannot be seen, or must not be obeyed, made visible."""
    return value.translate(_SHOWN)


def join(parts: Iterable[object]) -> Markup:
    """Parts one after the other; None is left out."""
    return Markup("".join(text(part) for part in parts if part is not None))


def tag(name: str, /, *content: object, **attributes: Any) -> Markup:
    """An element.

    Args:
        name: of the element.
        content: `Markup`, anything else as text, or lists of those; None is left out.
        attributes: `class_` is class, other underscores are hyphens; None and False leave an attribute out, True gives
            it without a value.
    """
    head = name
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        key = key.rstrip("_").replace("_", "-")
        head += f" {key}" if value is True else f' {key}="{text(_plain(value))}"'
    if name in _VOID:
        return Markup(f"<{head}>")
    inner = join(part for each in content for part in (each if isinstance(each, list | tuple) else (each,)))
    return Markup(f"<{head}>{inner}</{name}>")


def _plain(value: object) -> object:
    """Coordinates with as many digits as can be seen."""
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else value


def data(content: object, /, **attributes: Any) -> Markup:
    """A block of JSON for the page's script, which nothing inside can end.

    Raises:
        ValueError: a number that JSON has no word for.
    """
    written = json.dumps(content, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for char in "<>&":  # only inside strings; \u003c is the same string to a reader of JSON
        written = written.replace(char, f"\\u{ord(char):04x}")
    return tag("script", Markup(written), type="application/json", **attributes)


def number(value: float | None, digits: int = 4, *, sign: bool = False) -> str:
    """A figure for people: so many significant digits, thousands apart, a true minus; a dash for what is undefined."""
    if value is None or not math.isfinite(value):
        return "\N{EN DASH}"
    if isinstance(value, int) or value == 0:
        shown = f"{int(value):,}"
    elif not 1e-4 <= abs(value) < 1e6:
        mantissa, exponent = f"{value:.{max(digits - 2, 0)}e}".split("e")
        shown = f"{mantissa}e{int(exponent)}"
    else:
        places = max(0, digits - 1 - math.floor(math.log10(abs(value))))
        shown = f"{value:,.{places}f}"
    if sign and value > 0:
        shown = f"+{shown}"
    return shown.replace("-", "\N{MINUS SIGN}")


def percent(share: float | None, digits: int = 3) -> str:
    """A share as a percentage."""
    if share is None or not math.isfinite(share):
        return "\N{EN DASH}"
    return f"{100 * share:.{digits}g}%" if abs(share) >= 1e-4 or share == 0 else f"{number(100 * share, 2)}%"
