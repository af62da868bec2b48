"""An evaluation as rows for people; all of it is in the JSON."""

from __future__ import annotations

import math

from saeforge.evaluation.effect import EffectMetrics
from saeforge.evaluation.judge import Evaluation
from saeforge.metrics import Spread

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
    return [*rows, *_activation_rows(result)]


def _activation_rows(result: Evaluation) -> list[tuple[str, str, str]]:
    m, firing, share = result.metrics, result.firing, 100 / result.d_sae
    where = "of held-out documents" if result.about["split"] != "train" else "of TRAINING documents"
    of = "" if firing.documents is None else f"{firing.documents:,} "
    bound = "" if firing.dead_bound is None else f"; each fires in under {firing.dead_bound:.2g} of documents"
    shares = (
        f"{_percent(m.firing_share_10pct)} of all firings; over 1%: {m.dense_1pct:,}, {_percent(m.firing_share_1pct)}"
    )
    return [
        ("tokens", f"{m.tokens:,}", where.replace("of ", f"of {of}", 1)),
        ("L0", f"{m.l0_mean:.2f}", f"p5 {m.l0_p5}, p50 {m.l0_p50}, p95 {m.l0_p95}"),
        ("L1", f"{m.l1:.4g}", "of values times the norm of their decoder row"),
        ("FVU", f"{m.fvu:.4f}", "of the variance, not explained; 0 is perfect, 1 predicts the mean of all"),
        ("MSE", f"{m.mse:.4g}", f"summed over dimensions; {m.mse_per_dim:.4g} a dimension"),
        ("cosine", f"{m.cosine:.4f}", "mean over tokens; high where activations have a large mean"),
        ("l2 ratio", f"{m.l2_ratio:.4f}", "mean over tokens of |x̂| / |x|"),
        ("reconstruction bias", f"{m.reconstruction_bias:.4f}", "below 1 is shrinkage"),
        ("dead latents", f"{m.dead:,}", f"{m.dead * share:.1f}% never fired in {m.tokens:,} tokens{bound}"),
        ("dense latents", f"{m.dense_10pct:,}", f"fired on over 10% of tokens, {shares}"),
    ]


def elsewhere_rows(result: Evaluation) -> list[tuple[str, str, str]]:
    """The same reconstruction under the definitions of other tools: name, value, who reports it."""
    m = result.metrics
    return [
        ("ev_legacy", f"{m.ev_legacy:.4f}", "SAELens, SAEBench and Neuronpedia: mean over tokens of ratios"),
        ("ev_centered", f"{m.ev_centered:.4f}", "dictionary_learning, NVIDIA: blind to a constant bias"),
        ("nmse_raw", f"{m.nmse_raw:.4f}", "OpenAI: relative to zero, not to the mean"),
        ("nmse_global", f"{m.nmse_global:.4f}", "NVIDIA, mlsae: relative to the variance of all scalars"),
    ]


def weight_rows(result: Evaluation) -> list[tuple[str, str, str]]:
    """The geometry of the weights, and the agreement with another SAE: name, value, remark."""
    w, rows = result.weights, []
    few = "" if w.sampled == w.latents else f" ({w.sampled:,} of {w.latents:,} latents, drawn at random)"
    twins = "" if w.decoder_twins is None else f"; {_percent(w.decoder_twins)} of latents have one of 0.9{few}"
    for name, spread, remark in (
        ("decoder norm", w.decoder_norm, ""),
        ("decoder cosine", w.decoder_nearest, f"with the nearest other latent{twins}"),
        ("encoder cosine", w.encoder_nearest, f"with the nearest other latent{few}"),
        ("encoder · decoder", w.encoder_decoder, "cosine of a latent's two rows"),
    ):
        if spread is not None:
            rows.append((name, f"{spread.p50:.4g}", _spread(spread, remark)))
    a = result.against
    if a is not None:
        kind = "one-to-one" if a.method == "hungarian" else "mutual nearest"
        rows.append(("agreement", _percent(a.shared), f"of latents have a {kind} partner of cosine 0.7"))
        if a.cosine is not None:
            rows.append(("agreement, pairs", f"{a.cosine.p50:.4f}", _spread(a.cosine, f"{a.pairs:,} pairs")))
        rows.append(
            (
                "agreement, nearest",
                f"{a.nearest_a.p50:.4f}",
                _spread(a.nearest_a, f"by chance {a.chance:.3f} on average"),
            )
        )
    return rows


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


def _percent(share: float) -> str:
    return "undefined" if math.isnan(share) else f"{100 * share:.1f}%"


def _spread(spread: Spread, remark: str) -> str:
    return f"median; mean {spread.mean:.4g}, p5 {spread.p5:.4g}, p95 {spread.p95:.4g}{f'; {remark}' if remark else ''}"
