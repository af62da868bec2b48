"""What an SAE has to beat: PCA of its rank, a frozen random decoder, an SAE of a model with fresh weights."""

from saeforge.controls.make import CONTROLS, make_controls
from saeforge.controls.pca import pca
from saeforge.controls.trained import moving_adam, train_topk

__all__ = ["CONTROLS", "make_controls", "moving_adam", "pca", "train_topk"]
