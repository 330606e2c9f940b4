"""Benchmarks that another model judges."""
