"""What all charts have in common: the figure around them, axes, the legend, and the data for the page's script.

A chart is finished SVG, drawn here: it is there without a script, on paper, and in a reader's own tool. The script adds
the tooltip, the keyboard, and the buttons, from the data block that stands beside the SVG.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from saeforge.pages.markup import Markup, data, tag
from saeforge.pages.scales import Scale, tick

#: Colours that tell series apart (`--s0` and so on in page.css); further ones repeat them, with other dashes.
COLOURS = 8
#: Room around the plot, in the SVG's own units: for the labels of both axes.
LEFT, RIGHT, TOP, BOTTOM = 42.0, 12.0, 24.0, 36.0


@dataclass(frozen=True)
class Key:
    """One entry of a legend.

    Attributes:
        name: what it says.
        colour: number of its colour and marker.
        dashed: drawn with dashes.
        shape: "line", or "marker".
    """

    name: str
    colour: int
    dashed: bool = False
    shape: str = "line"


@dataclass(frozen=True)
class View:
    """One way to draw a chart: "linear" or "log", with the scales that the script needs to find a value again."""

    name: str
    x: Scale
    y: Scale
    marks: Markup


@dataclass(frozen=True)
class Axes:
    """Labels of the axes, and ticks where the scale's own will not do.

    Attributes:
        x, y: what is measured.
        x_ticks: where ticks stand.
        format_x: their labels.
        whole: y counts something, and has whole ticks.
    """

    x: str
    y: str
    x_ticks: Sequence[float] | None = None
    format_x: Callable[[float], str] = field(default=tick)
    whole: bool = False


def plot_area(width: float, height: float) -> tuple[tuple[float, float], tuple[float, float]]:
    """Where the plot lies: (left, right), (bottom, top)."""
    return (LEFT, width - RIGHT), (height - BOTTOM, TOP)


def figure(
    title: str,
    views: Sequence[View],
    axes: Axes,
    content: dict[str, Any],
    *,
    size: tuple[float, float],
    keys: Sequence[Key] = (),
    note: object = None,
    summary: str = "",
    class_: str = "",
) -> Markup:
    """A chart with its caption, legend, buttons and data.

    Args:
        title: what is shown.
        views: the first is the one that shows; a second one gets a pair of buttons.
        axes: labels.
        content: for the script; `views` is added.
        size: of the SVG, in its own units.
        keys: of the legend; a single series needs none.
        note: below the title.
        summary: what a screen reader says.
        class_: more classes.
    """
    content = {**content, "views": {view.name: [view.x.to_json(), view.y.to_json()] for view in views}}
    buttons = (
        tag(
            "div",
            [
                tag("button", view.name, type="button", data_view=view.name, aria_pressed="true" if i == 0 else "false")
                for i, view in enumerate(views)
            ],
            class_="modes",
            role="group",
            aria_label=f"scale of {title}",
        )
        if len(views) > 1
        else None
    )
    head = tag("figcaption", tag("div", tag("h3", title), tag("p", note) if note else None), buttons)
    drawn = [_drawing(view, axes, size, hidden=i > 0, summary=summary or title) for i, view in enumerate(views)]
    return tag(
        "figure", head, drawn, legend(keys) if len(keys) > 1 else None, data(content), class_=f"chart {class_}".strip()
    )


def legend(keys: Sequence[Key]) -> Markup:
    """Names beside their colours; with the script, buttons that hide and show."""
    return tag(
        "div",
        [
            tag(
                "button",
                swatch(key),
                tag("span", key.name),
                type="button",
                data_series=key.name,
                aria_pressed="true",
                class_="key",
            )
            for key in keys
        ],
        class_="legend",
    )


def swatch(key: Key) -> Markup:
    """A short line, or a marker, of a series."""
    if key.shape == "marker":
        inner = marker(key.colour, 9, 7, 4.5)
    else:
        inner = tag("path", d="M1 7H17", class_="line dashed" if key.dashed else "line")
    return tag("svg", inner, viewBox="0 0 18 14", class_=f"swatch c{key.colour % COLOURS}", aria_hidden="true")


def marker(kind: int, x: float, y: float, r: float, **attributes: Any) -> Markup:
    """One of eight shapes of about equal area: colour alone must not tell series apart."""
    shapes = (
        None,
        [(-0.89, -0.89), (0.89, -0.89), (0.89, 0.89), (-0.89, 0.89)],
        [(0, -1.25), (1.25, 0), (0, 1.25), (-1.25, 0)],
        [(0, -1.25), (1.2, 0.85), (-1.2, 0.85)],
        [(0, 1.25), (1.2, -0.85), (-1.2, -0.85)],
        [(0, -1.35), (0.4, -0.4), (1.35, 0), (0.4, 0.4), (0, 1.35), (-0.4, 0.4), (-1.35, 0), (-0.4, -0.4)],
        [(0.6, -1.04), (1.2, 0), (0.6, 1.04), (-0.6, 1.04), (-1.2, 0), (-0.6, -1.04)],
        [(-1.1, -0.7), (1.1, -0.7), (1.1, 0.7), (-1.1, 0.7)],
    )  # fmt: skip
    corners = shapes[kind % len(shapes)]
    attributes = {"class_": "mark", **attributes}
    if corners is None:
        return tag("circle", attributes.pop("title", None), cx=float(x), cy=float(y), r=float(r), **attributes)
    points = " ".join(f"{x + r * dx:.2f},{y + r * dy:.2f}" for dx, dy in corners)
    return tag("polygon", attributes.pop("title", None), points=points, **attributes)


def _drawing(view: View, axes: Axes, size: tuple[float, float], *, hidden: bool, summary: str) -> Markup:
    width, height = size
    (left, right), (bottom, _) = plot_area(width, height)
    rows = [(view.y.at(value), tick(value)) for value in view.y.ticks(4) if not axes.whole or value == round(value)]
    columns = [(view.x.at(value), axes.format_x(value)) for value in axes.x_ticks or view.x.ticks(5)]
    grid = [tag("line", x1=left, x2=right, y1=y, y2=y, class_="grid") for y, _ in rows]
    base = tag("line", x1=left, x2=right, y1=bottom, y2=bottom, class_="base")
    labels = [tag("text", label, x=left - 7, y=y, dy="0.32em", class_="tick end") for y, label in rows]
    labels += [tag("text", label, x=x, y=bottom + 15, class_="tick middle") for x, label in columns]
    labels.append(tag("text", axes.x, x=(left + right) / 2, y=height - 4, class_="axis middle"))
    labels.append(tag("text", axes.y, x=0, y=11, class_="axis"))
    return tag(
        "svg",
        grid,
        base,
        labels,
        tag("g", view.marks, class_="marks"),
        tag("g", class_="hover"),
        viewBox=f"0 0 {width:g} {height:g}",
        class_="plot",
        data_view=view.name,
        role="img",
        tabindex="0",
        aria_label=summary,
        hidden=hidden,
    )
