"""What scripts/check_evaluation.py compares, by which definitions the numbers differ, and its verdict."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from saelens_definitions import CE, KL, QUALITY, SHRINKAGE, SPARSITY

#: Of the same definition: read from activations stored in bf16, and computed in another order.
SAME = 1e-4
#: Of its own definition, computed here from the live model.
DEFINED = 1e-5
SETTINGS = {
    "alone": "each text alone, as harvested",
    "packed": "packed as SAELens packs them",
    "special": "`exclude_special_tokens=False`",
}
#: What makes a number another one.
REASONS = {
    "norm": "Σ\\|f\\| without the norm of the latent's decoder row",
    "mean": "spread about the mean of the batch, not of the train split",
    "ratio": "mean of the batches' ratios, not the ratio of the sums",
    "BOS": "the ablation zeroes special tokens too; ours leaves them the model's activations. Without biases nothing "
    "is left then: every CE is the logarithm of the vocabulary",
    "last": "KL also at the last token of a context, where there is no next one to predict",
    "texts": "texts in a context see one another and positions go on; the last, incomplete batch is left out",
    "across": "predictions across texts: of the BOS of the next one, and at the last token of each",
    "special": "special tokens are reconstructed, replaced and scored like all others",
}


@dataclass(frozen=True)
class Row:
    """A figure of both.

    Attributes:
        theirs: group and name in what `run_evals` returns.
        ours: where it is in evaluation.json; None: it is not.
        reasons: why numbers differ though the texts are the same; none: it is the same definition.
        of: what packing changes: "activations", "predictions" or "weights".
    """

    theirs: str
    ours: str | None
    reasons: tuple[str, ...] = ()
    of: str = "activations"

    def why(self, setting: str, *, unit_decoder: bool) -> tuple[str, ...]:
        """Keys of `REASONS` in a setting; "norm" is none with unit decoder rows."""
        reasons = tuple(reason for reason in self.reasons if not (reason == "norm" and unit_decoder))
        if setting == "alone" or self.of == "weights":
            return reasons
        more = ("texts",) + (("across",) if self.of == "predictions" else ())
        return reasons + more + (("special",) if setting == "special" else ())


EFFECT = "effect.overall."
ROWS = (
    Row(SPARSITY + "l0", "metrics.l0_mean"),
    Row(SPARSITY + "l1", "metrics.l1", ("norm",)),
    Row(QUALITY + "explained_variance", "1 - metrics.fvu"),
    Row(QUALITY + "explained_variance_legacy", "metrics.ev_legacy", ("mean",)),
    Row(QUALITY + "mse", "metrics.mse"),
    Row(QUALITY + "cossim", "metrics.cosine"),
    Row(SHRINKAGE + "l2_norm_in", None),
    Row(SHRINKAGE + "l2_norm_out", None),
    Row(SHRINKAGE + "l2_ratio", "metrics.l2_ratio"),
    Row(SHRINKAGE + "relative_reconstruction_bias", "metrics.reconstruction_bias", ("ratio",)),
    Row(CE + "ce_loss_without_sae", EFFECT + "ce_original", of="predictions"),
    Row(CE + "ce_loss_with_sae", EFFECT + "ce_sae", of="predictions"),
    Row(CE + "ce_loss_with_ablation", EFFECT + "ce_zero", ("BOS",), of="predictions"),
    Row(CE + "ce_loss_score", EFFECT + "ce_score_zero", ("BOS",), of="predictions"),
    Row(KL + "kl_div_with_sae", EFFECT + "kl_sae", ("last",), of="predictions"),
    Row(KL + "kl_div_with_ablation", EFFECT + "kl_zero", ("BOS", "last"), of="predictions"),
    Row(KL + "kl_div_score", None, ("BOS", "last"), of="predictions"),
    Row("feature_density == 0", "metrics.dead"),
    Row("encoder_norm", "weights.encoder_norm.mean", of="weights"),
    Row("encoder_decoder_cosine_sim", "weights.encoder_decoder.mean", of="weights"),
    Row("encoder_bias", "weights.encoder_bias.mean", of="weights"),
)


@dataclass(frozen=True)
class Judged:
    """A row's numbers in one setting: `apart` is ours from theirs, `off` theirs from its definition here, relative."""

    row: Row
    why: tuple[str, ...]
    ours: float | None
    theirs: float
    apart: float | None
    off: float

    @property
    def fails(self) -> bool:
        """Whether a promise at the top of the file is broken; NaN breaks it."""
        same = self.why or self.apart is None or self.apart <= SAME
        return not (same and self.off <= DEFINED)


def relative(a: float, b: float) -> float:
    """|a - b| / |b|; 0 where both are 0."""
    return 0.0 if a == b else abs(a - b) / abs(b) if b else float("inf")


def judge(
    own: dict[str, Any], theirs: dict[str, float], here: dict[str, float], setting: str, *, unit_decoder: bool
) -> list[Judged]:
    """All rows of one setting.

    Args:
        own: evaluation.json.
        theirs: of `run_evals`, by group and name.
        here: by SAELens's definitions.
        setting: key of `SETTINGS`.
        unit_decoder: the decoder's rows have norm 1.
    """
    judged = []
    for row in ROWS:
        value = None
        if row.ours is not None:
            value = 1 - named(own, row.ours[4:]) if row.ours.startswith("1 - ") else named(own, row.ours)
        number = theirs[row.theirs]
        apart = None if value is None else relative(value, number)
        why = row.why(setting, unit_decoder=unit_decoder)
        judged.append(Judged(row, why, value, number, apart, relative(here[row.theirs], number)))
    return judged


def miscounted(own: dict[str, Any], alone: dict[str, float], *, block: int) -> int:
    """How many of tokens and predictions are not the same ones; a dataset holds whole blocks, the rest is left out."""
    missing = alone["tokens"] - own["metrics"]["tokens"]
    return (not 0 <= missing < block) + (own["effect"]["overall"]["tokens"] != alone["predictions"])


def named(values: dict[str, Any], path: str) -> Any:
    """`a.b.c` of nested values."""
    for part in path.split("."):
        values = values[part]
    return values
