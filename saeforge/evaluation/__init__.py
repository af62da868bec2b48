"""Judging a trained SAE."""

from saeforge.evaluation.comparison import agreement
from saeforge.evaluation.effect import Effect, EffectMetrics
from saeforge.evaluation.judge import Control, Evaluation, evaluate

__all__ = ["Control", "Effect", "EffectMetrics", "Evaluation", "agreement", "evaluate"]
