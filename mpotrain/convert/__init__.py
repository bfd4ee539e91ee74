"""Trained models taken over into new runs: other formats, other architectures."""
