"""Distributed pretraining of language models whose weight matrices are tensor networks."""

__version__ = "0.1.0"
