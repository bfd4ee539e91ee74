"""Ranks, worlds and how a global batch is laid out over them."""
