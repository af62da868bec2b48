"""Judging a trained SAE."""

from saeforge.evaluation.comparison import agreement
from saeforge.evaluation.effect import Effect, EffectMetrics
from saeforge.evaluation.judge import Evaluation, evaluate

__all__ = ["Effect", "EffectMetrics", "Evaluation", "agreement", "evaluate"]
