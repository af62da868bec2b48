"""The page of several runs: the frontier of L0, FVU and effect, a table to sort, what differs, curves."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from saeforge.features.store import FeatureStore
from saeforge.pages import judgement
from saeforge.pages.charts import Point, Series, frontier, lines
from saeforge.pages.frame import COLOURS, Axes, Key, legend, swatch
from saeforge.pages.latents import Group, cards, choose
from saeforge.pages.markup import Markup, join, number, percent, tag
from saeforge.pages.page import Section, header, missing, mono
from saeforge.pages.runs import Run
from saeforge.pages.single import site_of


@dataclass(frozen=True)
class Column:
    """A column of the table of runs.

    Attributes:
        name: its head.
        value: of a run; None is shown as a dash and sorted last.
        interval: of it.
        digits: significant ones.
        sign: with a plus.
        best: "low", "high", or "" where neither is better.
        told: what it means.
    """

    name: str
    value: Callable[[Run], float | None]
    told: str
    interval: Callable[[Run], tuple[float, float] | None] = lambda run: None
    digits: int = 3
    sign: bool = False
    best: str = ""


def _dead(run: Run) -> float | None:
    dead = run.metric("dead")
    return None if dead is None or not run.d_sae else dead / run.d_sae


COLUMNS = (
    Column("latents", lambda run: run.d_sae, "width of the SAE", digits=7),
    Column("L0", lambda run: run.metric("l0_mean"), "latents active on a held-out token, mean"),
    Column("FVU", lambda run: run.metric("fvu"), "share of the variance not explained", best="low"),
    Column(
        "ΔCE",
        lambda run: run.effect("delta_ce"),
        "loss of the model with the reconstruction in place, minus its own; nats per token",
        lambda run: run.effect_interval("delta_ce"),
        sign=True,
        best="low",
    ),
    Column("CE score (mean)", lambda run: run.effect("ce_score_mean"), "1 is no loss, 0 the mean of all", best="high"),
    Column("KL", lambda run: run.effect("kl_sae"), "of the model's predictions, nats per token", best="low"),
    Column("top-1", lambda run: run.effect("top1_sae"), "share of predictions that stay", best="high"),
    Column("dead", _dead, "share of latents that never fired on held-out tokens"),
    Column("over 10%", lambda run: run.metric("dense_10pct"), "latents that fire on over 10% of tokens"),
    Column("decoder cosine", lambda run: _spread(run, "decoder_nearest"), "with the nearest other latent, mean"),
)  # fmt: skip


def _spread(run: Run, name: str) -> float | None:
    found = ((run.evaluation or {}).get("weights") or {}).get(name)
    value = found.get("mean") if isinstance(found, dict) else None
    return value if isinstance(value, int | float) else None


def variant_colours(runs: Sequence[Run]) -> dict[str, int]:
    """A colour and marker for each variant, in the order in which they come."""
    return {variant: i for i, variant in enumerate(dict.fromkeys(run.variant for run in runs))}


def run_style(runs: Sequence[Run]) -> dict[str, tuple[int, bool]]:
    """Colour and dashes of each run's curves."""
    return {run.name: (i % COLOURS, (i // COLOURS) % 2 == 1) for i, run in enumerate(runs)}


def head(runs: Sequence[Run], title: str) -> Markup:
    """How many of what, on what."""
    sites = list(dict.fromkeys(filter(None, map(site_of, runs))))
    models = list(dict.fromkeys(filter(None, ((run.card.get("model") or {}).get("name") for run in runs))))
    variants = list(variant_colours(runs))
    parts: list[object] = [f"{len(runs)} autoencoders: ", ", ".join(variants)]
    if sites:
        parts.append(", at ")
        parts += _listed(sites)
    if models:
        parts.append(" of ")
        parts += _listed(models)
    tokens = {(run.card.get("training") or {}).get("tokens") for run in runs}
    if len(tokens) == 1 and None not in tokens:
        parts.append(f", trained on {number(tokens.pop())} tokens each")
    return header("saeforge · comparison", title, join([*parts, "."]))


def _listed(names: Sequence[str], most: int = 4) -> list[object]:
    shown: list[object] = []
    for i, name in enumerate(names[:most]):
        shown += ([", "] if i else []) + [mono(name)]
    return [*shown, f" and {len(names) - most} more"] if len(names) > most else shown


def frontiers(runs: Sequence[Run]) -> Section:
    """FVU and ΔCE over L0."""
    colours = variant_colours(runs)
    charts = []
    for title, unit, value, interval in (
        ("FVU over L0", "FVU", lambda run: run.metric("fvu"), lambda run: None),
        (
            "ΔCE over L0",
            "ΔCE, nats per token",
            lambda run: run.effect("delta_ce"),
            lambda run: run.effect_interval("delta_ce"),
        ),
    ):
        points = []
        for run in runs:
            x, y = run.metric("l0_mean"), value(run)
            if x is not None and y is not None and x > 0 and math.isfinite(y):
                low, high = interval(run) or (None, None)
                points.append(Point(run.name, x, y, run.variant, _details(run), low, high))
        if points:
            told = "lower and further left is better"
            told += "; lines are 95% intervals over documents" if points[0].low is not None else ""
            shown = {name: colour for name, colour in colours.items() if any(p.series == name for p in points)}
            charts.append(frontier(title, points, Axes("L0", unit), colours=shown, note=told, legend=False))
    unjudged = [run for run in runs if run.evaluation is None]
    body: list[object] = []
    if charts:
        keys = [Key(name, colour, shape="marker") for name, colour in colours.items()]
        body = [legend(keys) if len(keys) > 1 else None, tag("div", charts, class_="charts wide")]
    if len(charts) == 1:
        body.append(
            missing(
                "None of these runs has its effect on the model measured; with the model at hand:",
                "saeforge evaluate RUN",
            )
        )
    if unjudged:
        body.append(_to_judge(unjudged))
    lede = "Sparser codes reconstruct less: runs are compared along the frontier, never by one figure."
    return Section("frontier", "Frontier", body, lede)


def _to_judge(runs: Sequence[Run]) -> Markup:
    lines_of = [tag("br") if i else None for i in range(len(runs))]
    commands = [
        part for br, run in zip(lines_of, runs, strict=True) for part in (br, mono(f"saeforge evaluate {run.path}"))
    ]
    return tag("p", f"Not judged yet ({len(runs)}): ", tag("br"), commands, class_="missing")


def _details(run: Run) -> list[tuple[str, str]]:
    rows = [("variant", run.variant), ("latents", number(run.d_sae)), ("L0", number(run.metric("l0_mean"), 3))]
    rows.append(("FVU", number(run.metric("fvu"), 3)))
    delta, bounds = run.effect("delta_ce"), run.effect_interval("delta_ce")
    if delta is not None:
        shown = f" [{number(bounds[0], 3)}, {number(bounds[1], 3)}]" if bounds else ""
        rows.append(("ΔCE", number(delta, 3, sign=True) + shown))
    dead = _dead(run)
    return [*rows, ("dead", percent(dead))] if dead is not None else rows


def table(runs: Sequence[Run]) -> Section:
    """All runs with their figures; heads sort."""
    colours = variant_colours(runs)
    columns = [column for column in COLUMNS if any(column.value(run) is not None for run in runs)]
    best: dict[str, float] = {}
    for column in columns:
        found = [value for run in runs if (value := column.value(run)) is not None]
        if column.best and len(set(found)) > 1:
            best[column.name] = min(found) if column.best == "low" else max(found)
    rows = []
    for run in runs:
        key = Key(run.variant, colours[run.variant], shape="marker")
        cells = [tag("th", run.name, scope="row"), tag("td", swatch(key), run.variant, class_="left")]
        for column in columns:
            value, bounds = column.value(run), column.interval(run)
            shown = percent(value) if column.name == "dead" else number(value, column.digits, sign=column.sign)
            span = f" [{number(bounds[0], column.digits)}, {number(bounds[1], column.digits)}]" if bounds else None
            cells.append(
                tag(
                    "td",
                    tag("span", shown, class_="best" if value is not None and value == best.get(column.name) else None),
                    tag("span", span, class_="range") if span else None,
                    data_sort="" if value is None else repr(float(value)),
                )
            )
        rows.append(tag("tr", cells))
    names = [("run", "its folder"), ("variant", "kind of autoencoder"), *((c.name, c.told) for c in columns)]
    heads = [
        tag("th", tag("button", name, type="button", title=told), scope="col", class_="left" if i < 2 else None)
        for i, (name, told) in enumerate(names)
    ]
    content = tag("table", tag("thead", tag("tr", heads)), tag("tbody", rows), class_="sortable")
    defined = tag("details", tag("summary", "What the columns are"), _terms([(c.name, c.told) for c in columns]))
    body = [tag("div", content, class_="scroll", tabindex="0", role="region", aria_label="runs"), defined]
    lede = "On documents held out from training. A column's head sorts; the best figure of a column is bold."
    return Section("runs", "Runs", body, lede)


def _terms(entries: Sequence[tuple[str, str]]) -> Markup:
    return tag("dl", [part for name, told in entries for part in (tag("dt", name), tag("dd", told))])


def differences(runs: Sequence[Run]) -> Section:
    """Settings in which the runs differ, one row a run; folded away those of some variants only, and those of all.

    What only one variant has an option for makes no difference by being absent elsewhere.
    """
    flat = [settings_of(run) for run in runs]
    names = list(dict.fromkeys(name for each in flat for name in each))
    having = {name: [each[name] for each in flat if name in each] for name in names}
    differing = [name for name in names if len({repr(value) for value in having[name]}) > 1]
    alike = [(name, having[name][0]) for name in names if name not in differing and having[name][0] is not None]
    body: list[object] = []
    if differing:
        rows = [
            [run.name, *(_shown(each.get(name)) for name in differing)] for run, each in zip(runs, flat, strict=True)
        ]
        body.append(tag("div", judgement.table(None, ("run", *differing), rows), class_="narrow"))
    else:
        body.append(tag("p", "In nothing that is recorded.", class_="missing"))
    for told, kept in (
        ("What all have in common", [each for each in alike if len(having[each[0]]) == len(runs)]),
        ("Options of some variants, equal where they are", [e for e in alike if len(having[e[0]]) < len(runs)]),
    ):
        if kept:
            entries = [(name, _shown(value)) for name, value in kept]
            body.append(tag("details", tag("summary", f"{told} ({len(kept)})"), _terms(entries)))
    return Section("settings", "In what they differ", body, short="Settings")


def _shown(value: Any) -> str:
    if value is None:
        return "\N{EN DASH}"
    return f"{value:g}" if isinstance(value, float) else str(value)


def settings_of(run: Run) -> dict[str, Any]:
    """What an SAE was made with: variant and options as its card has them, then the run's own settings.

    Of a sweep the settings of its entry count over the base's; values that a grid names are in the card where they are
    options of the variant, and else in the SAE's name.
    """
    found: dict[str, Any] = {"variant": run.variant}
    found |= {name: value for name, value in run.options.items() if name not in ("d_in", "d_out")}
    config = run.config.get("model") or {}
    entry = (config.get("sweep") or {}).get(run.member) or {}
    skipped = {"variant", "sweep", "grid"}
    model = {name: value for name, value in config.items() if name not in skipped}
    model |= {name: value for name, value in entry.items() if name in model}
    found |= {f"model.{name}": value for name, value in model.items()}
    data = run.config.get("data") or {}
    found |= {f"data.{name}": value for name, value in data.items() if not isinstance(value, dict)}
    found["site"], found["model"] = site_of(run), (run.card.get("model") or {}).get("name")
    found["dataset"] = str(run.card.get("dataset"))[:12] if run.card.get("dataset") else None
    found |= {f"training.{name}": value for name, value in (run.card.get("training") or {}).items()}
    seed = run.config.get("seed_everything")
    return found if seed is None else {**found, "seed_everything": seed}


def curves(runs: Sequence[Run]) -> Section | None:
    """Curves of all runs over each other; None if no run has any."""
    style = run_style(runs)
    logged = [run for run in runs if run.curves is not None]
    if not logged:
        return None
    drawn = []
    for name, title, unit, options in (
        ("train/fvu", "FVU, training", "FVU", {"log": True}),
        ("val/fvu", "FVU, validation", "FVU", {"log": True}),
        ("model/delta_ce", "ΔCE, validation", "nats per token", {"log": True}),
        ("train/l0", "L0", "latents", {"log": True}),
        ("train/dead", "Dead latents", "latents", {"zero": True}),
    ):
        series = []
        for run in logged:
            assert run.curves is not None
            found = run.curves.of(name)
            if found is not None:
                series.append(Series(run.name, *found, colour=style[run.name][0], dashed=style[run.name][1]))
        if series:
            axis = next(run.curves.x_label for run in logged if run.curves is not None)
            drawn.append(
                (lines(title, series, Axes(axis, unit, whole=unit == "latents"), keyed=False, **options), series)
            )
    keys = [Key(run.name, *style[run.name]) for run in logged]
    body = [legend(keys) if len(keys) > 1 else None, tag("div", [chart for chart, _ in drawn], class_="charts")]
    return Section("curves", "Training", body, "A name in the legend hides its curves in all charts.")


def densities(runs: Sequence[Run]) -> Section | None:
    """The histograms of all judged runs side by side."""
    colours = variant_colours(runs)
    drawn = [judgement.density_histogram(run, title=run.name, colour=colours[run.variant]) for run in runs]
    drawn = [chart for chart in drawn if chart is not None]
    if not drawn:
        return None
    body = tag(
        "details", tag("summary", f"{len(drawn)} histograms"), tag("div", drawn, class_="charts"), open=len(drawn) <= 12
    )
    return Section(
        "density",
        "How often latents fire",
        body,
        "Latents by the share of held-out tokens on which they fire.",
        "Density",
    )


def latents(runs: Sequence[Run], most: int, contexts: int) -> Section | None:
    """Some latents of each run that has features, folded away."""
    if most == 0:
        return None
    each = max(2, most // len(runs))
    body: list[object] = []
    for i, run in enumerate(runs):
        if not run.has_features:
            body.append(
                missing(f"{run.name}: to see its latents in their contexts:", f"saeforge features build {run.path}")
            )
            continue
        with FeatureStore.open(run.path) as store:
            groups: list[Group] = choose(store, each)
            shown = [
                join([tag("h3", f"{group.title} ({len(group.latents)})"), tag("p", group.rule, class_="small"),
                      cards(store, group, contexts=contexts, prefix=f"run{i}-")])
                for group in groups
            ]  # fmt: skip
        body.append(tag("details", tag("summary", run.name), shown))
    return Section("latents", "Latents", body, "A few of each run that has features; a run's own report has more.")
