"""Checkpoints that any engine in any layout can read."""
