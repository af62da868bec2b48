"""Datasets of activations that others stored: `saeforge data import` and `import_activations`."""

from saeforge.data.imports.run import import_activations

__all__ = ["import_activations"]
