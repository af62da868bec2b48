"""Benchmarks that a user runs: variants on synthetic activations, judged by their known features."""
