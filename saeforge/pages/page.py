"""The template: one HTML file with everything in it, which reaches for nothing.

A content security policy forbids what the file does not hold itself: no address is ever loaded, and no script runs but
the one below, by its digest. Style and script are `page.css` and `page.js`, beside this file.
"""

from __future__ import annotations

import base64
import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources

from saeforge.pages.markup import Markup, join, tag, text

#: An icon of its own, or the browser would ask the server for one: three active latents of nine.
_ICON = (
    "data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 16 16'%3E%3Cg fill='%230f8a86'%3E"
    "%3Crect x='1' y='1' width='4' height='4' rx='1'/%3E%3Crect x='11' y='6' width='4' height='4' rx='1'/%3E"
    "%3Crect x='6' y='11' width='4' height='4' rx='1'/%3E%3C/g%3E%3C/svg%3E"
)


@dataclass(frozen=True)
class Section:
    """A part of a page.

    Attributes:
        anchor: its id.
        title: of the heading, and in the bar.
        body: below it.
        lede: a sentence between them.
        short: in the bar, where the title is long.
    """

    anchor: str
    title: str
    body: object
    lede: object = None
    short: str | None = None


def page(title: str, head: Markup, sections: Sequence[Section], *, foot: object = None) -> str:
    """A whole document.

    Args:
        title: of the window and the bar.
        head: what stands above the sections.
        sections: in order.
        foot: the last line.
    """
    css, js = asset("page.css"), asset("page.js")
    policy = (
        f"default-src 'none'; style-src '{_digest(css)}'; script-src '{_digest(js)}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    links = [tag("a", each.short or each.title, href=f"#{each.anchor}") for each in sections]
    theme = tag("button", "Theme", type="button", class_="theme", title="light or dark")
    bar = tag(
        "div", tag("div", tag("b", title), tag("nav", links, aria_label="parts"), theme, class_="wrap"), class_="bar"
    )
    body = [
        tag(
            "section",
            tag("h2", each.title, id=f"{each.anchor}-title"),
            tag("p", each.lede, class_="lede") if each.lede else None,
            each.body,
            id=each.anchor,
            aria_labelledby=f"{each.anchor}-title",
        )
        for each in sections
    ]
    document = tag(
        "html",
        tag(
            "head",
            tag("meta", charset="utf-8"),
            tag("meta", http_equiv="Content-Security-Policy", content=Markup(policy)),
            tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
            tag("meta", name="referrer", content="no-referrer"),
            tag("meta", name="generator", content="saeforge"),
            tag("meta", name="color-scheme", content="light dark"),
            tag("title", f"{title} · saeforge"),
            tag("link", rel="icon", href=Markup(_ICON)),
            tag("style", Markup(css)),
        ),
        tag(
            "body",
            tag("a", "to the content", href="#content", class_="skip"),
            bar,
            tag("main", head, body, id="content", class_="wrap"),
            tag("footer", tag("div", foot, class_="wrap")),
            tag("script", Markup(js)),
        ),
        lang="en",
    )
    return f"<!DOCTYPE html>\n{document}\n"


@functools.cache
def asset(name: str) -> str:
    """Text of a file beside this one."""
    return resources.files("saeforge.pages").joinpath(name).read_text(encoding="utf-8")


def _digest(content: str) -> Markup:
    digest = hashlib.sha256(content.encode()).digest()
    return Markup(f"sha256-{base64.b64encode(digest).decode()}")


def missing(what: str, command: str) -> Markup:
    """A note in the place of something that a command would make."""
    return tag("p", f"{what} ", tag("code", command), class_="missing")


def definitions(summary: str, entries: dict[str, str]) -> Markup:
    """Folded away: names and what they mean."""
    rows = [part for name, told in entries.items() for part in (tag("dt", name), tag("dd", told))]
    return tag("details", tag("summary", summary), tag("dl", rows))


def tiles(entries: Sequence[tuple[str, str, object]]) -> Markup:
    """Large figures: name, value, remark."""
    return tag(
        "dl",
        [
            tag("div", tag("dt", name), tag("dd", value, class_="value"), tag("dd", note, class_="note"))
            for name, value, note in entries
        ],
        class_="tiles",
    )


def facts(groups: Sequence[tuple[str, Sequence[tuple[str, object]]]]) -> Markup:
    """Columns of names and values; a value of None leaves its row out."""
    columns = []
    for title, rows in groups:
        entries = [(tag("dt", name), tag("dd", value)) for name, value in rows if value is not None]
        if entries:
            columns.append(tag("div", tag("h3", title), tag("dl", [join(pair) for pair in entries])))
    return tag("div", columns, class_="facts")


def header(kicker: str, title: str, lede: object, body: object = None) -> Markup:
    """The head of a page."""
    return tag(
        "header",
        tag("p", kicker, class_="kicker"),
        tag("h1", title),
        tag("p", lede, class_="lede"),
        body,
        class_="top",
    )


def mono(value: object) -> Markup:
    """A name as it is typed."""
    return tag("code", text(value))
