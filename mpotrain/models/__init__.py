"""Whole networks: forward(batch) -> LossOutput."""
