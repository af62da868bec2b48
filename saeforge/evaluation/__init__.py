"""Judging a trained SAE."""

from saeforge.evaluation.shards import Evaluation, evaluate

__all__ = ["Evaluation", "evaluate"]
