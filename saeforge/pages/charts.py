"""The chart set: lines, bars, points on a frontier, intervals, and sparks the height of a line of text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from saeforge.pages.frame import COLOURS, Axes, Key, View, figure, marker, plot_area
from saeforge.pages.markup import Markup, data, join, number, percent, tag
from saeforge.pages.scales import Scale

#: A small chart is drawn as large as it is shown beside two others; a large one beside one other.
SMALL, LARGE = (380.0, 240.0), (540.0, 360.0)


@dataclass(frozen=True)
class Series:
    """Points of a line: x and y, equally many, x ascending."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: int = 0
    dashed: bool = False


@dataclass(frozen=True)
class Point:
    """A run on a frontier: where it lies, and what its tooltip says."""

    name: str
    x: float
    y: float
    series: str
    details: Sequence[tuple[str, str]] = ()
    low: float | None = None
    high: float | None = None


def lines(
    title: str,
    series: Sequence[Series],
    axes: Axes,
    *,
    note: object = None,
    log: bool = False,
    zero: bool = False,
    keyed: bool = True,
) -> Markup:
    """Curves over a common axis.

    Args:
        title: what is shown.
        series: at least one with a finite value.
        axes: labels.
        note: below the title.
        log: shows the logarithmic view first. It exists where all values are above 0 and more than a tenth apart.
        zero: the linear view begins at 0.
        keyed: has a legend of its own.
    """
    (left, right), (bottom, top) = plot_area(*SMALL)
    values = [y for each in series for y in each.y if math.isfinite(y)]
    x = Scale.of([x for each in series for x in each.x], left, right, zero=True, room=0.0)
    scales = {"linear": Scale.of(values, bottom, top, zero=zero)}
    if min(values) > 0 and max(values) > 1.1 * min(values):
        scales["log"] = Scale.of(values, bottom, top, log=True)
    order = sorted(scales, key=lambda name: (name == "log") != log)
    views = [View(name, x, scales[name], join(_path(each, x, scales[name]) for each in series)) for name in order]
    shared: list[list[float]] = []
    content = []
    for each in series:
        own = [_short(value) for value in each.x]
        if own not in shared:
            shared.append(own)
        heights = [_short(y) if math.isfinite(y) else None for y in each.y]
        content.append({"name": each.name, "colour": each.colour % COLOURS, "x": shared.index(own), "y": heights})
    last = [f"{each.name}: {number(each.y[-1])} at the end" for each in series]
    return figure(
        title,
        views,
        axes,
        {"kind": "lines", "x": shared, "series": content, "x_label": axes.x},
        size=SMALL,
        keys=[Key(each.name, each.colour, each.dashed) for each in series] if keyed else [],
        note=note,
        summary=f"{title} over {axes.x}. {'; '.join(last[:12])}.",
    )


def _short(value: float) -> float:
    return float(f"{value:.5g}")


def _path(series: Series, x: Scale, y: Scale) -> Markup:
    steps, pen = [], "M"
    points = []
    for value_x, value_y in zip(series.x, series.y, strict=True):
        if not math.isfinite(value_y) or (y.log and value_y <= 0):
            pen = "M"
            continue
        points.append((x.at(value_x), y.at(value_y)))
        steps.append(f"{pen}{points[-1][0]:.1f} {points[-1][1]:.1f}")
        pen = "L"
    drawn = [tag("path", d="".join(steps), class_="line dashed" if series.dashed else "line")]
    if len(points) <= 24:  # few enough to be measurements of their own
        drawn += [tag("circle", cx=px, cy=py, r=2.4, class_="dot") for px, py in points]
    return tag("g", drawn, class_=f"series c{series.colour % COLOURS}", data_series=series.name)


@dataclass(frozen=True)
class Bars:
    """A histogram: edges (n + 1), counts (n), and what one of the counted things is called."""

    edges: Sequence[float]
    counts: Sequence[int]
    unit: str
    labels: Sequence[str] = field(default=())


def bars(title: str, content: Bars, axes: Axes, *, note: object = None, colour: int = 0) -> Markup:
    """A histogram, with a logarithmic view of its counts where they differ by more than tenfold."""
    (left, right), (bottom, top) = plot_area(*SMALL)
    total = sum(content.counts) or 1
    x = Scale(content.edges[0], content.edges[-1], left, right)
    filled = [count for count in content.counts if count]
    scales = {"linear": Scale(0.0, max(filled, default=1) * 1.06, bottom, top)}
    if filled and max(filled) > 10 * min(filled):
        scales["log"] = Scale(0.6, max(filled) * 1.5, bottom, top, True)
    items = []
    for low, high, count, label in zip(content.edges, content.edges[1:], content.counts, content.labels, strict=False):
        rows = [[content.unit, f"{count:,}"], ["share", percent(count / total)]]
        items.append({"x": [low, high], "y": count, "title": label, "rows": rows})
    views = [View(name, x, y, _columns(content, x, y, bottom, colour, items)) for name, y in scales.items()]
    return figure(
        title,
        views,
        axes,
        {"kind": "bars", "items": items},
        size=SMALL,
        note=note,
        summary=f"Histogram of {title}: {total:,} {content.unit} in {len(content.counts)} bins.",
    )


def _columns(content: Bars, x: Scale, y: Scale, bottom: float, colour: int, items: list[dict[str, object]]) -> Markup:
    drawn = []
    gap = 1.0 if len(content.counts) > 1 else 0.0
    for item, low, high, count in zip(items, content.edges, content.edges[1:], content.counts, strict=False):
        if not count:
            continue
        left, right, top = x.at(low) + gap / 2, x.at(high) - gap / 2, y.at(count)
        if len(content.counts) == 1:  # one bar as broad as the plot would look like an area
            middle, width = (left + right) / 2, (right - left) / 12
            left, right = middle - width / 2, middle + width / 2
        title = tag("title", f"{item['title']}: {count:,} {content.unit}")
        shape = {"x": left, "y": top, "width": max(right - left, 0.8), "height": bottom - top, "rx": 1.5}
        drawn.append(tag("rect", title, class_="column", **shape))
    return tag("g", drawn, class_=f"series c{colour % COLOURS}")


def frontier(
    title: str,
    points: Sequence[Point],
    axes: Axes,
    *,
    colours: dict[str, int],
    note: object = None,
    legend: bool = True,
) -> Markup:
    """Runs as points, those of one series joined in the order of x; both views have a logarithmic x.

    Args:
        title: what is shown.
        points: at least one, x above 0.
        axes: labels.
        colours: number of the colour and marker of each series.
        note: below the title.
        legend: whether it has one of its own.
    """
    (left, right), (bottom, top) = plot_area(*LARGE)
    heights = [value for p in points for value in (p.y, p.low, p.high) if value is not None]
    x = Scale.of([p.x for p in points], left, right, log=True, room=0.08)
    scales = {"linear": Scale.of(heights, bottom, top, room=0.07)}
    if min(heights) > 0:
        scales = {"log": Scale.of(heights, bottom, top, log=True, room=0.08), **scales}
    views = [View(name, x, y, _runs(points, x, y, colours)) for name, y in scales.items()]
    items = [
        {
            "x": [p.x],
            "y": p.y,
            "title": p.name,
            "series": p.series,
            "colour": colours[p.series] % COLOURS,
            "rows": [list(row) for row in p.details],
        }
        for p in points
    ]
    keys = [Key(name, colour, shape="marker") for name, colour in colours.items()] if legend else []
    return figure(
        title,
        views,
        Axes(axes.x, axes.y, x.powers_of_two(), axes.format_x),
        {"kind": "points", "items": items},
        size=LARGE,
        keys=keys,
        note=note,
        summary=f"{title}: {len(points)} runs; the table below has their figures.",
        class_="large",
    )


def _runs(points: Sequence[Point], x: Scale, y: Scale, colours: dict[str, int]) -> Markup:
    groups = []
    for name, colour in colours.items():
        own = sorted((p for p in points if p.series == name), key=lambda p: p.x)
        path = "".join(f"{'L' if i else 'M'}{x.at(p.x):.1f} {y.at(p.y):.1f}" for i, p in enumerate(own))
        drawn = [tag("path", d=path, class_="line thin")] if len(own) > 1 else []
        for p in own:
            place = x.at(p.x)
            if p.low is not None and p.high is not None and (p.low > 0 or not y.log):
                drawn.append(tag("line", x1=place, x2=place, y1=y.at(p.low), y2=y.at(p.high), class_="whisker"))
            title = tag("title", "; ".join([p.name, *(f"{key} {value}" for key, value in p.details)]))
            drawn.append(marker(colour, place, y.at(p.y), 5.5, title=title))
        groups.append(tag("g", drawn, class_=f"series c{colour % COLOURS}", data_series=name))
    return join(groups)


@dataclass(frozen=True)
class Interval:
    """A figure with its interval, and what its tooltip adds."""

    name: str
    value: float
    low: float | None
    high: float | None
    details: Sequence[tuple[str, str]] = ()


def intervals(title: str, rows: Sequence[Interval], x_label: str, *, note: object = None) -> Markup:
    """Figures one below the other, each a dot on its interval."""
    step, top, left = 20.0, 6.0, 96.0
    width, height = SMALL[0], top + step * len(rows) + 38.0
    bounds = [value for row in rows for value in (row.value, row.low, row.high) if value is not None]
    x = Scale.of(bounds, left, width - 14.0, zero=True)
    y = Scale(0.0, float(len(rows)), top, top + step * len(rows))
    bottom = top + step * len(rows)
    drawn: list[Markup] = []
    items = []
    for value in x.ticks(4):
        drawn.append(tag("line", x1=x.at(value), x2=x.at(value), y1=top, y2=bottom, class_="grid"))
        drawn.append(tag("text", number(value, 3), x=x.at(value), y=bottom + 15, class_="tick middle"))
    for i, row in enumerate(rows):
        middle = y.at(i + 0.5)
        name = row.name if len(row.name) <= 13 else f"{row.name[:12]}\N{HORIZONTAL ELLIPSIS}"
        drawn.append(tag("text", name, x=left - 9, y=middle, dy="0.32em", class_="name end"))
        told = number(row.value, 3)
        if row.low is not None and row.high is not None:
            drawn.append(tag("line", x1=x.at(row.low), x2=x.at(row.high), y1=middle, y2=middle, class_="whisker wide"))
            told += f" [{number(row.low, 3)}, {number(row.high, 3)}]"
        title_tag = tag("title", f"{row.name}: {told}")
        drawn.append(tag("circle", title_tag, cx=x.at(row.value), cy=middle, r=4.2, class_="mark"))
        details = [[x_label, told], *(list(detail) for detail in row.details)]
        items.append({"x": [row.value], "y": i + 0.5, "title": row.name, "rows": details})
    drawn.append(tag("text", x_label, x=(left + width) / 2, y=height - 5, class_="axis middle"))
    svg = tag(
        "svg",
        tag("g", drawn, class_="series c0"),
        tag("g", class_="hover"),
        viewBox=f"0 0 {width:g} {height:g}",
        class_="plot",
        data_view="linear",
        role="img",
        tabindex="0",
        aria_label=f"{title}: " + "; ".join(f"{row.name} {number(row.value, 3)}" for row in rows),
    )
    content = data({"kind": "points", "items": items, "views": {"linear": [x.to_json(), y.to_json()]}})
    head = tag("figcaption", tag("div", tag("h3", title), tag("p", note) if note else None))
    return tag("figure", head, svg, content, class_="chart")


def spark(counts: Sequence[int], label: str, *, width: float = 84.0, height: float = 22.0) -> Markup:
    """A histogram the height of a line of text; counts by their square root, so that rare values are seen."""
    most = math.sqrt(max(counts, default=0)) or 1.0
    step = width / max(len(counts), 1)
    drawn = [
        tag(
            "rect",
            x=i * step + 0.5,
            y=height - max(1.5, height * math.sqrt(count) / most),
            width=max(step - 1, 0.8),
            height=max(1.5, height * math.sqrt(count) / most),
            rx=1,
        )
        for i, count in enumerate(counts)
        if count
    ]
    return tag("svg", drawn, viewBox=f"0 0 {width:g} {height:g}", class_="spark", role="img", aria_label=label)
