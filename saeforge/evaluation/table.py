"""An evaluation as rows for people; all of it is in the JSON."""

from __future__ import annotations

from saeforge.evaluation.effect import EffectMetrics
from saeforge.evaluation.judge import Evaluation

LABEL_COLUMNS = ("label", "documents", "tokens", "ΔCE", "95% interval", "score/zero", "score/mean", "KL", "top-1")
#: More labels than this (the modules of the standard library) are left to the JSON.
MOST_LABELS = 40
#: A bootstrap over fewer is known to be too narrow.
FEW_DOCUMENTS = 20
_LABELS_SHOWN = 12


def summary_rows(result: Evaluation) -> list[tuple[str, str, str]]:
    """Name, value, remark; the effect on the model first."""
    rows = []
    if result.effect is not None:
        e = result.effect.overall
        rows += [
            ("ΔCE", f"{e.delta_ce:+.4f}", f"nats per token{_range(e, 'delta_ce')}; loss {e.ce_original:.3f} without"),
            ("CE score, zero", _number(e.ce_score_zero, 4), f"1 is no loss, 0 the site zeroed (loss {e.ce_zero:.3f})"),
            (
                "CE score, mean",
                _number(e.ce_score_mean, 4),
                f"1 is no loss, 0 the site at its mean (loss {e.ce_mean:.3f})",
            ),
            (
                "KL",
                f"{e.kl_sae:.4f}",
                f"nats per token{_range(e, 'kl_sae')}; zero {e.kl_zero:.2f}, mean {e.kl_mean:.2f}",
            ),
            ("top-1 agreement", f"{e.top1_sae:.4f}", f"of {e.tokens:,} predictions in {e.documents:,} documents"),
        ]
    m = result.metrics
    share = 100 / result.d_sae
    held_out = result.about["split"] != "train"
    return [
        *rows,
        ("tokens", f"{m.tokens:,}", "of held-out documents" if held_out else "of TRAINING documents"),
        ("L0", f"{m.l0_mean:.2f}", f"p5 {m.l0_p5}, p50 {m.l0_p50}, p95 {m.l0_p95}"),
        ("FVU", f"{m.fvu:.4f}", "share of variance not explained; 0 is perfect, 1 predicts the mean"),
        ("cosine", f"{m.cosine:.4f}", ""),
        ("reconstruction bias", f"{m.reconstruction_bias:.4f}", "below 1 is shrinkage"),
        ("dead latents", f"{m.dead:,}", f"{m.dead * share:.1f}% never fired in {m.tokens:,} tokens"),
        ("dense latents", f"{m.dense_10pct:,}", f"fired on over 10% of tokens; {m.dense_1pct:,} on over 1%"),
    ]


def label_rows(result: Evaluation) -> list[tuple[str, ...]]:
    """A row for each of the labels with most tokens, as `LABEL_COLUMNS`; none without labels or with too many."""
    labels = {} if result.effect is None else result.effect.by_label
    if not 1 < len(labels) <= MOST_LABELS:
        return []
    shown = list(labels.items())[:_LABELS_SHOWN]
    rows: list[tuple[str, ...]] = [
        (
            label,
            f"{e.documents:,}",
            f"{e.tokens:,}",
            f"{e.delta_ce:+.3f}",
            _range(e, "delta_ce").strip(),
            _number(e.ce_score_zero, 3),
            _number(e.ce_score_mean, 3),
            f"{e.kl_sae:.3f}",
            f"{e.top1_sae:.3f}",
        )
        for label, e in shown
    ]
    rest = list(labels.values())[_LABELS_SHOWN:]
    if rest:
        tokens = sum(e.tokens for e in rest)

        def mean(name: str) -> str:
            return f"{sum(getattr(e, name) * e.tokens for e in rest) / tokens:.3f}"

        figures = (f"{float(mean('delta_ce')):+.3f}", "", "", "", mean("kl_sae"), mean("top1_sae"))
        rows.append((f"{len(rest)} others", f"{sum(e.documents for e in rest):,}", f"{tokens:,}", *figures))
    return rows


def notes(result: Evaluation) -> list[str]:
    """What a reader of the tables should know."""
    found = []
    if result.effect is None:
        found.append(f"the effect on the model was not measured: {result.effect_reason}")
    else:
        if len(result.effect.by_label) > MOST_LABELS:
            found.append(f"{len(result.effect.by_label)} labels are too many to show; the JSON has them")
        if result.effect.overall.documents < FEW_DOCUMENTS:
            found.append(f"{result.effect.overall.documents} documents only: intervals over so few are too narrow")
    if not result.about["trained_on_this_dataset"]:
        found.append("this is not the dataset that the SAE was trained on")
    return found


def _number(value: float | None, digits: int) -> str:
    return "undefined" if value is None else f"{value:.{digits}f}"


def _range(metrics: EffectMetrics, name: str) -> str:
    """` [low, high]`, or nothing where there is no interval."""
    bounds = metrics.intervals[name]
    return "" if bounds is None else f" [{bounds[0]:.3f}, {bounds[1]:.3f}]"
