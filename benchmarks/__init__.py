"""Measurements against what people use today: ``python -m benchmarks.NAME``."""
