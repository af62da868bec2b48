"""Benchmarks that a user runs: variants on synthetic activations, judged by their known features."""

from saeforge.benchmark.run import bench_synthetic

__all__ = ["bench_synthetic"]
