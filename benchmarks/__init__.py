"""Benchmarks: what the layers, models and engines cost, against dense twins and other libraries."""
