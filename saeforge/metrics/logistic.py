"""Logistic probes: the linear classifier that latents and directions are measured by, with scikit-learn."""

from __future__ import annotations

import importlib.util
import warnings
from dataclasses import dataclass

import numpy as np

from saeforge.errors import ConfigError

PROBE_ITERATIONS = 300


@dataclass(frozen=True)
class Probe:
    """A logistic probe on columns as they are (not standardised).

    Attributes:
        direction: (d,); a row's score is its product with this, plus `offset`.
        offset: a row is called positive where its score is above 0.
        converged: whether the solver reached its tolerance.
    """

    direction: np.ndarray
    offset: float
    converged: bool

    def score(self, x: np.ndarray) -> np.ndarray:
        """Log-odds float64 (rows,) of rows (rows, d)."""
        return np.asarray(x.astype(np.float64) @ self.direction.astype(np.float64) + self.offset)


def check_probe() -> None:
    """Say how to get scikit-learn if it is missing.

    Raises:
        ConfigError: it is.
    """
    if importlib.util.find_spec("sklearn") is None:
        raise ConfigError(
            "the logistic probe needs scikit-learn: pip install 'saeforge[probe]', or leave the probe out with "
            "--probe false"
        )


def fit_probe(x: np.ndarray, positive: np.ndarray, *, c: float) -> Probe:
    """Fit a logistic regression with L2 penalty, both classes weighted equally (scikit-learn, lbfgs).

    Args:
        x: float (rows, d); each column is standardised first, and the probe is given for columns as they are.
        positive: bool (rows,), with both values.
        c: inverse strength of the penalty on the standardised columns.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    mean, spread = x.mean(0), x.std(0)
    spread[spread == 0] = 1
    model = LogisticRegression(C=c, class_weight="balanced", max_iter=PROBE_ITERATIONS)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.fit((x - mean) / spread, positive)
    converged = True
    for warning in caught:
        if issubclass(warning.category, ConvergenceWarning):
            converged = False  # callers tell it
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    direction = model.coef_[0] / spread
    return Probe(direction, float(model.intercept_[0] - direction @ mean), converged)
