"""Activations: the dataset on disk, its order, and the batches that reach a training step."""
