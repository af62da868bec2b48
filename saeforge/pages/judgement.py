"""What `evaluation.json` says, as tables and charts: each figure beside its controls and its definition."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from saeforge.pages.charts import Bars, Interval, bars, intervals
from saeforge.pages.frame import Axes
from saeforge.pages.markup import Markup, join, number, percent, tag
from saeforge.pages.page import definitions
from saeforge.pages.runs import Run

#: Labels drawn; those with most tokens come first in the JSON.
MOST_LABELS = 12
_RECONSTRUCTION = (
    ("FVU", "fvu", "share of the variance not explained; 0 is perfect, 1 predicts the mean of all tokens"),
    ("L0", "l0_mean", "latents active on a token, mean"),
    ("L1", "l1", "mean over tokens of activations times the norm of their decoder row"),
    ("MSE", "mse", "mean over tokens, summed over dimensions, raw units"),
    ("cosine", "cosine", "mean over tokens; high for any activations with a large mean"),
    ("l2 ratio", "l2_ratio", "mean over tokens of reconstruction norm by activation norm"),
    ("reconstruction bias", "reconstruction_bias", "below 1 is shrinkage"),
)
_ELSEWHERE = (
    ("ev_legacy", "SAELens, SAEBench and Neuronpedia: mean over tokens of ratios"),
    ("ev_centered", "dictionary_learning, NVIDIA: blind to a constant bias"),
    ("nmse_raw", "OpenAI: relative to zero, not to the mean"),
    ("nmse_global", "NVIDIA, mlsae: relative to the variance of all scalars"),
)
_WEIGHTS = (
    ("decoder norm", "decoder_norm", "raw units"),
    ("decoder cosine", "decoder_nearest", "with the nearest other latent"),
    ("encoder cosine", "encoder_nearest", "with the nearest other latent"),
    ("encoder · decoder", "encoder_decoder", "cosine of a latent's two rows"),
)


def table(
    caption: str | None, columns: Sequence[object], rows: Sequence[Sequence[object]], *, classes: Sequence[str] = ()
) -> Markup:
    """A table whose rows begin with their name; cells may be `td` elements of their own.

    Args:
        caption: above it.
        columns: heads.
        rows: cells.
        classes: of each row, where they have one.
    """
    body = []
    for i, (name, *cells) in enumerate(rows):
        each = [cell if isinstance(cell, Markup) and cell.startswith("<td") else tag("td", cell) for cell in cells]
        body.append(tag("tr", tag("th", name, scope="row"), each, class_=(classes[i] or None) if classes else None))
    head = tag("thead", tag("tr", [tag("th", column, scope="col") for column in columns]))
    content = tag("table", head, tag("tbody", body))
    box = tag("div", content, class_="scroll", tabindex="0", role="region", aria_label=caption or "table")
    return join([tag("h3", caption) if caption else None, box])


def note(content: object) -> Markup:
    """A cell of words."""
    return tag("td", content, class_="note")


def within(value: float | None, bounds: Sequence[float] | None, digits: int = 3, *, sign: bool = False) -> Markup:
    """A figure with its interval."""
    shown = number(value, digits, sign=sign)
    if value is None or not bounds:
        return tag("td", shown)
    low, high = (number(bound, digits, sign=sign) for bound in bounds)
    return tag("td", shown, tag("span", f" [{low}, {high}]", class_="range"))


def effect(run: Run) -> Markup | None:
    """The model's loss with the reconstruction in place, between the model as it is and the ablations."""
    found = (run.evaluation or {}).get("effect")
    if not isinstance(found, dict):
        return None
    overall = found["overall"]
    original = overall["ce_original"]
    bounds = overall.get("intervals") or {}
    rows: list[list[object]] = [["the activations themselves", number(original), "0", "0", "1", "1", "1"]]
    for name, told in (
        ("sae", "their reconstruction"),
        ("mean", "their mean (control)"),
        ("zero", "zeros (control)"),
    ):
        loss = overall[f"ce_{name}"]
        scores = (overall["ce_score_mean"], overall["ce_score_zero"]) if name == "sae" else (None, None)
        if name != "sae":
            scores = (0 if name == "mean" else None, 0 if name == "zero" else None)
        rows.append(
            [
                told,
                within(loss, bounds.get(f"ce_{name}"), 4),
                within(loss - original, bounds.get("delta_ce") if name == "sae" else None, 3, sign=True),
                number(overall[f"kl_{name}"], 3),
                number(overall[f"top1_{name}"], 3),
                number(scores[0]),
                number(scores[1]),
            ]
        )
    heads = ("in the site's place", "loss", "ΔCE", "KL", "top-1 kept", "CE score (mean)", "CE score (zero)")
    classes = ("", "strong", "control", "control")
    told = f"{number(overall['tokens'])} predictions in {number(overall['documents'])} held-out documents"
    parts = [
        table(f"Effect on the model: {told}", heads, rows, classes=classes),
        definitions("How these are defined", found.get("conventions") or {}),
    ]
    return join(parts)


def effect_by_label(run: Run) -> Markup | None:
    """ΔCE of each label's documents, with intervals."""
    found = (run.evaluation or {}).get("effect")
    labels = (found or {}).get("by_label") or {}
    if len(labels) < 2:
        return None
    shown = list(labels.items())[:MOST_LABELS]
    rows = []
    for name, each in sorted(shown, key=lambda item: item[1]["delta_ce"]):
        low, high = (each.get("intervals") or {}).get("delta_ce") or (None, None)
        details = [("documents", number(each["documents"])), ("predictions", number(each["tokens"]))]
        details.append(("loss of the model", number(each["ce_original"], 3)))
        rows.append(Interval(name, each["delta_ce"], low, high, details))
    rest = f"; {len(labels) - len(shown)} more in evaluation.json" if len(labels) > len(shown) else ""
    return intervals("ΔCE by label", rows, "ΔCE, nats per token", note=f"95% intervals over documents{rest}")


def reconstruction(run: Run) -> Markup | None:
    """Reconstruction and sparsity, the same by other tools' definitions, and the weights."""
    if run.evaluation is None:
        return None
    found = run.evaluation
    metrics = found["metrics"]
    rows: list[list[object]] = [[name, number(metrics.get(key)), note(told)] for name, key, told in _RECONSTRUCTION]
    d_sae = run.d_sae or found["sae"]["d_sae"]
    firing = found.get("firing") or {}
    bound = firing.get("dead_bound")
    silent = f"never fired in {number(metrics['tokens'])} tokens"
    if bound is not None:
        silent += f"; such a latent fires in less than {percent(bound)} of documents (95%)"
    rows.append(["dead latents", number(metrics["dead"]), note(f"{percent(metrics['dead'] / d_sae)} {silent}")])
    share = metrics.get("firing_share_10pct")
    rows.append(
        [
            "dense latents",
            number(metrics["dense_10pct"]),
            note(f"fire on over 10% of tokens; {percent(share)} of all firings"),
        ]
    )
    where = f"{number(metrics['tokens'])} tokens of the {found.get('split')} split"
    parts: list[Markup] = [
        table(f"Reconstruction and sparsity: {where}", ("figure", "value", ""), rows),
        definitions("How these are defined", {**found.get("conventions", {}), **(firing.get("conventions") or {})}),
    ]
    others: list[list[object]] = [[name, number(metrics.get(name)), note(told)] for name, told in _ELSEWHERE]
    parts.append(table("The same by other tools' definitions", ("figure", "value", ""), others))
    weights = found.get("weights") or {}
    spread: list[list[object]] = [
        [name, *(number(weights[key][part]) for part in ("mean", "p5", "p50", "p95")), note(told)]
        for name, key, told in _WEIGHTS
        if isinstance(weights.get(key), dict)
    ]
    if spread:
        parts.append(table("Latents as directions", ("figure", "mean", "p5", "median", "p95", ""), spread))
        parts.append(definitions("How these are defined", weights.get("conventions") or {}))
    return join(parts)


def controls(run: Run) -> Markup | None:
    """This SAE beside the controls that were judged as it was; None if none were."""
    found = (run.evaluation or {}).get("controls")
    if not isinstance(found, dict) or not found:
        return None
    rows: list[list[object]] = []
    told = {}
    for name, each in (("this SAE", run.evaluation or {}), *found.items()):
        metrics = each.get("metrics") or {}
        overall = (each.get("effect") or {}).get("overall") or {}
        one = ((each.get("probing") or {}).get("mean") or {}).get("latents") or {}
        rows.append(
            [
                name.replace("_", " "),
                number(metrics.get("l0_mean"), 3),
                number(metrics.get("fvu"), 3),
                within(overall.get("delta_ce"), (overall.get("intervals") or {}).get("delta_ce"), sign=True),
                number(overall.get("kl_sae"), 3),
                number(overall.get("top1_sae"), 3),
                number(((one.get("1") or {}).get("accuracy") or {}).get("value"), 3),
            ]
        )
        if isinstance(each.get("definition"), str):
            told[name] = each["definition"]
    heads = ("", "L0", "FVU", "ΔCE", "KL", "top-1 kept", "probe of 1 latent")
    classes = ["strong", *("control" for _ in found)]
    parts = [table("Beside controls, judged in the same way", heads, rows, classes=classes)]
    return join([*parts, definitions("What the controls are", told) if told else None])


def against(run: Run) -> Markup | None:
    """The agreement with another SAE, if one was named."""
    found = (run.evaluation or {}).get("against")
    if not isinstance(found, dict):
        return None
    other = (run.evaluation or {}).get("against_sae") or "another SAE"
    rows: list[list[object]] = [
        ["shared latents", percent(found["shared"]), note(f"pairs with a cosine of at least 0.7 ({found['method']})")],
        ["nearest cosine, mean", number(found["nearest_a"]["mean"]), note("of a latent with any of the other SAE's")],
        ["by chance (control)", number(found["chance"]), note("with as many random directions in the other's place")],
    ]
    told = table(f"Agreement with {other}", ("figure", "value", ""), rows, classes=("", "", "control"))
    return join([told, definitions("How these are defined", found.get("conventions") or {})])


def l0_histogram(run: Run) -> Markup | None:
    """Active latents of a token; None for an evaluation made before this was kept."""
    firing = (run.evaluation or {}).get("firing") or {}
    edges, counts = firing.get("l0_edges"), firing.get("l0_tokens")
    if not edges or not counts:
        return None
    step = edges[1] - edges[0]
    labels = [f"L0 {low}" if step == 1 else f"L0 {low} to {low + step - 1}" for low in edges[:-1]]
    m = (run.evaluation or {})["metrics"]
    told = f"mean {number(m['l0_mean'])}, p5 {m['l0_p5']}, median {m['l0_p50']}, p95 {m['l0_p95']}"
    if len(counts) == 1 and step == 1:
        told = f"every token has {edges[0]} active latents"
    if step == 1:  # a bar of one level has its label below its middle
        every = -(-len(counts) // 6)
        ticks = [low + 0.5 for low in edges[:-1] if low % every == 0] if len(counts) > 1 else [edges[0] + 0.5]
        axes = Axes("active latents of a token", "tokens", ticks, lambda middle: f"{middle - 0.5:g}")
    else:
        axes = Axes("active latents of a token", "tokens")
    return bars("L0", Bars(edges, counts, "tokens", labels), axes, note=told)


def density_histogram(run: Run, *, title: str = "Density", colour: int = 0) -> Markup | None:
    """Latents by the share of tokens on which they fire."""
    firing = (run.evaluation or {}).get("firing") or {}
    edges, counts = firing.get("log10_edges"), firing.get("latents")
    if not edges or not counts:
        return None
    filled = [i for i, count in enumerate(counts) if count]
    if not filled:
        return None
    first, last = max(0, min(filled[0], len(counts) - 8)), filled[-1]  # two decades at least, else it looks flat
    edges, counts = edges[first : last + 2], counts[first : last + 1]
    labels = [f"on {percent(10**low)} to {percent(10**high)} of tokens" for low, high in itertools.pairwise(edges)]
    dead = firing.get("dead") or 0
    told = f"{number(sum(counts))} latents fired, {number(dead)} never"
    ticks = [edge for edge in edges if edge == round(edge)]
    axes = Axes("share of tokens on which a latent fires", "latents", ticks, lambda edge: percent(10**edge, 2))
    return bars(title, Bars(edges, counts, "latents", labels), axes, note=told, colour=colour)
