"""Sparse autoencoders for language models: train, judge, read and steer."""

__version__ = "0.1.0"
