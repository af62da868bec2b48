"""Probing, probe perturbation and controls as rows for people; all of it is in the JSON."""

from __future__ import annotations

from saeforge.evaluation.judge import Evaluation
from saeforge.evaluation.probing import ProbeScore
from saeforge.evaluation.table import MOST_LABELS

PROBING_COLUMNS = ("probe on document means", "accuracy", "AUROC")
TPP_COLUMNS = ("latents ablated", "TPP score", "own probe", "others")
_BY_LABEL_N = 10


def probing_rows(result: Evaluation) -> list[tuple[str, ...]]:
    """Means over labels, as `PROBING_COLUMNS`; none without probes."""
    if result.labelled.probing is None:
        return []
    mean = result.labelled.probing.mean
    named = [
        *((f"{k} latent{'s' if k > 1 else ''}", score) for k, score in mean.latents.items()),
        *((f"{k} dimension{'s' if k > 1 else ''}", score) for k, score in mean.residual_top.items()),
        ("difference of means", mean.difference_of_means),
        ("all dimensions", mean.residual),
    ]
    return [(name, str(score.accuracy), str(score.auroc)) for name, score in named]


def tpp_rows(result: Evaluation) -> list[tuple[str, ...]]:
    """Means over labels, as `TPP_COLUMNS`; none without them."""
    if result.labelled.tpp is None:
        return []
    rows: list[tuple[str, ...]] = []
    for n, at in result.labelled.tpp.mean.items():
        name = str(n) if at.ablated == n else f"{n} ({at.ablated:.1f})"  # in brackets: how many had an effect
        rows.append((name, str(at.score), f"{at.intended.value:+.3f}", f"{at.unintended.value:+.3f}"))
    return rows


def probing_label_rows(result: Evaluation) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Columns, and accuracies by label; no rows without probes or with too many labels."""
    probing, tpp = result.labelled.probing, result.labelled.tpp
    if probing is None:
        return (), []
    ks = list(probing.mean.latents)
    n = _BY_LABEL_N if tpp is not None and _BY_LABEL_N in tpp.mean else None
    last = () if n is None else (f"TPP {n}",)
    columns = ("label", "documents", "latent", *(f"k = {k}" for k in ks), "means", "all", *last)
    if len(probing.by_label) > MOST_LABELS:
        return columns, []
    rows = []
    for name, label in probing.by_label.items():
        scores = (*label.scores.latents.values(), label.scores.difference_of_means, label.scores.residual)
        halves = probing.settings["documents"][name]
        tail = () if tpp is None or n is None else (f"{tpp.by_label[name].at[n].score.value:+.3f}",)
        rows.append(
            (
                name,
                f"{halves['train']:,} / {halves['test']:,}",
                str(label.chosen_latents[0]),
                *(f"{score.accuracy.value:.3f}" for score in scores),
                *tail,
            )
        )
    return columns, rows


def control_rows(result: Evaluation) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Columns, and each figure of the SAE beside that of its controls; no rows without controls."""
    if not result.controls:
        return (), []
    columns = [_figures(one) for one in (result, *result.controls.values())]
    names = list(dict.fromkeys(name for column in columns for name in column))
    rows = [(name, *(column.get(name, "-") for column in columns)) for name in names]
    return ("", "SAE", *result.controls), rows


def _figures(result: Evaluation) -> dict[str, str]:
    """What an SAE and its controls are compared by."""
    found = {"L0": f"{result.metrics.l0_mean:.1f}", "FVU": f"{result.metrics.fvu:.4f}"}
    if result.effect is not None:
        found["ΔCE"] = f"{result.effect.overall.delta_ce:+.4f}"
        found["KL"] = f"{result.effect.overall.kl_sae:.4f}"
    if result.labelled.probing is not None:
        mean = result.labelled.probing.mean
        found |= {f"accuracy, {k} latent{'s' if k > 1 else ''}": _accuracy(s) for k, s in mean.latents.items()}
        found |= {f"accuracy, {k} dimension{'s' if k > 1 else ''}": _accuracy(s) for k, s in mean.residual_top.items()}
        found["accuracy, difference of means"] = _accuracy(mean.difference_of_means)
        found["accuracy, all dimensions"] = _accuracy(mean.residual)
    if result.labelled.tpp is not None:
        found |= {f"TPP, {n} latents": f"{at.score.value:+.3f}" for n, at in result.labelled.tpp.mean.items()}
    return found


def _accuracy(score: ProbeScore) -> str:
    return f"{score.accuracy.value:.3f}"


def probing_notes(result: Evaluation) -> list[str]:
    """What a reader of these tables should know."""
    found = []
    labelled = result.labelled
    if labelled.reason is not None:
        what = "probing" if labelled.probing is None else "targeted probe perturbation"
        found.append(f"no {what}: {labelled.reason}")
    if labelled.probing is not None:
        if labelled.probing.settings["left_out"]:
            names = ", ".join(labelled.probing.settings["left_out"])
            found.append(f"labels with too few documents for a probe of their own: {names}")
        if len(labelled.probing.by_label) > MOST_LABELS:
            found.append(f"probes of {len(labelled.probing.by_label)} labels are too many to show; the JSON has them")
        if labelled.probing.unconverged:
            found.append(f"solvers stopped before their tolerance: {', '.join(labelled.probing.unconverged)}")
    found += [f"{name}: {words}" for name, words in result.definitions.items()]
    if any(control.about["dataset"] != result.about["dataset"] for control in result.controls.values()):
        found.append("a control on another model has no ΔCE here: it would be of that model")
    return found
