"""What latents know of labels: the concept table, k-sparse probing and probe perturbation, each beside its controls."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from saeforge.pages.judgement import MOST_LABELS, note, table
from saeforge.pages.markup import Markup, join, number, tag
from saeforge.pages.page import definitions
from saeforge.pages.runs import Run


def _estimate(found: Any, *, sign: bool = False) -> Markup:
    """A cell of a figure with its bounds, as `{value, low, high}`; a dash for what was not measured."""
    if not isinstance(found, dict):
        return tag("td", _share(found, sign=sign))
    low, high = (_share(found.get(bound), sign=sign) for bound in ("low", "high"))
    return tag("td", _share(found.get("value"), sign=sign), tag("span", f" [{low}, {high}]", class_="range"))


def _share(found: Any, *, sign: bool = False) -> str:
    """A share, or a difference of shares, with three places; a dash for what is not there."""
    if not isinstance(found, int | float):
        return number(None)
    return f"{found:{'+' if sign else ''}.3f}".replace("-", "\N{MINUS SIGN}")


def _link(latent: int, shown: Collection[int]) -> Markup:
    """A cell with a latent's number, which leads to the latent if the page shows it."""
    return tag("td", tag("a", str(latent), href=f"#latent-{latent}") if latent in shown else str(latent))


def _value(found: Any, *path: str) -> str:
    for key in path:
        found = found.get(key) if isinstance(found, dict) else None
    return _share(found)


def concepts(run: Run, shown: Collection[int] = ()) -> Markup | None:
    """The concept table: each label's latent on held-out documents, beside random latents, means and a probe.

    `shown`: latents that the page has a card of.
    """
    if run.concepts is None:
        return None
    found = run.concepts.get("concepts") or []
    with_control = any(row.get("control") for row in found)
    heads: list[object] = ["label", "latent", "token AUROC", "random (control)"]
    heads += ["other model (control)"] if with_control else []
    heads += ["difference of means", "probe", "document AUROC", "active on label"]
    rows: list[list[object]] = []
    failed = {failure["claim"] for row in found for failure in row.get("failures") or ()}
    for row in sorted(found, key=lambda row: -row["top"][0]["score"]["token_auroc"]["value"]):
        best, fails = row["top"][0]["score"], row.get("failures") or ()
        name = join([row["label"], tag("span", " *", class_="fails") if fails else None])
        cells: list[object] = [
            name,
            _link(row["latent"], shown),
            _estimate(best["token_auroc"]),
            _value(row, "random", "token_auroc", "value"),
        ]
        cells += [_value(row, "control", "token_auroc", "value")] if with_control else []
        cells += [
            _value(row, "difference_of_means", "token_auroc", "value"),
            _value(row, "probe", "token_auroc", "value"),
            _value(best, "document_auroc", "value"),
            _share(best.get("active_on_label")),
        ]
        rows.append(cells)
    told = None
    if failed:
        words = {
            "random": "its lower bound is not above the upper bound of the best random latents",
            "control": "its lower bound is not above the upper bound of the control's best latent",
            "difference_of_means": "it is more than 0.05 below the difference of means",
        }
        reasons = "; or ".join(words.get(claim, claim) for claim in sorted(failed))
        told = tag("p", tag("span", "*", class_="fails"), f" fails a claim: {reasons}.", class_="small")
    parts = [table(None, heads, rows), told]
    parts += [tag("p", line, class_="small") for line in run.concepts.get("notes") or ()]
    parts.append(definitions("How these are defined", run.concepts.get("conventions") or {}))
    return join(parts)


def probing(run: Run, shown: Collection[int] = ()) -> Markup | None:
    """k-sparse probing: means over labels, beside the activations' own probes, and by label.

    `shown`: latents that the page has a card of.
    """
    found = (run.evaluation or {}).get("probing")
    if not isinstance(found, dict):
        return None
    mean = found["mean"]
    kinds = [(f"{k} latent{'s' if k != '1' else ''}", score, "strong") for k, score in mean["latents"].items()]
    kinds += [
        (f"{k} dimension{'s' if k != '1' else ''} (control)", s, "control") for k, s in mean["residual_top"].items()
    ]
    kinds += [("difference of means (control)", mean["difference_of_means"], "control")]
    kinds += [("all dimensions (control)", mean["residual"], "control")]
    rows: list[list[object]] = [[name, _estimate(s["accuracy"]), _estimate(s["auroc"])] for name, s, _ in kinds]
    labels = found.get("by_label") or {}
    ks = list(mean["latents"])
    by_label: list[list[object]] = []
    for name, each in list(labels.items())[:MOST_LABELS]:
        scores = each["scores"]
        by_label.append(
            [
                name,
                _link(each["chosen_latents"][0], shown),
                *(_value(scores, "latents", k, "accuracy", "value") for k in ks),
                _value(scores, "difference_of_means", "accuracy", "value"),
                _value(scores, "residual", "accuracy", "value"),
            ]
        )
    heads = ("label", "first latent", *(f"k = {k}" for k in ks), "means (control)", "all dimensions (control)")
    return join(
        [
            table(
                f"k-sparse probing, mean over {len(labels)} labels",
                ("probe on document means", "balanced accuracy", "AUROC"),
                rows,
                classes=[kind for _, _, kind in kinds],
            ),
            table("Balanced accuracy by label", heads, by_label) if by_label else None,
            definitions("How these are defined", found.get("conventions") or {}),
        ]
    )


def perturbation(run: Run) -> Markup | None:
    """Targeted probe perturbation: what ablating a label's latents does to its probe, and to the others'."""
    found = (run.evaluation or {}).get("tpp")
    if not isinstance(found, dict):
        return None
    rows: list[list[object]] = [
        [
            f"{n}" if each.get("ablated") == int(n) else f"{n} ({number(each.get('ablated'), 3)} with effect)",
            _estimate(each["score"], sign=True),
            _estimate(each["intended"], sign=True),
            _estimate(each["unintended"], sign=True),
        ]
        for n, each in found["mean"].items()
    ]
    heads = ("latents ablated", "score", "drop of the label's own probe", "drop of the others' (side effect)")
    return join(
        [
            table("Targeted probe perturbation, mean over labels", heads, rows),
            definitions("How these are defined", found.get("conventions") or {}),
        ]
    )


def further(run: Run, known: set[str]) -> Markup | None:
    """Parts of an evaluation that this page has no table of its own for: their figures, with their conventions."""
    parts: list[Markup | None] = []
    for key, found in (run.evaluation or {}).items():
        if key in known or not isinstance(found, dict):
            continue
        told = found.get("conventions") if isinstance(found.get("conventions"), dict) else {}
        rows: list[list[object]] = [
            [name, number(value), note((told or {}).get(name))] for name, value in _figures(found, "conventions")
        ]
        if rows:
            parts.append(table(key.replace("_", " "), ("figure", "value", ""), rows[:60]))
            parts.append(definitions("How these are defined", told) if told else None)
    return join(parts) if parts else None


def _figures(found: dict[str, Any], *left_out: str, prefix: str = "") -> list[tuple[str, float]]:
    rows: list[tuple[str, float]] = []
    for name, value in found.items():
        if name in left_out:
            continue
        if isinstance(value, dict):
            rows += _figures(value, *left_out, prefix=f"{prefix}{name} ")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            rows.append((f"{prefix}{name}", value))
    return rows
