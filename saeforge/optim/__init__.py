"""Optimizers for weights that are stored one latent per row."""

from saeforge.optim.row_adam import RowAdam

__all__ = ["RowAdam"]
