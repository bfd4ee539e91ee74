"""The error of starts and submissions that cannot be."""

from __future__ import annotations

from mpotrain.errors import MpotrainError


class LaunchError(MpotrainError):
    """A run that cannot be started or submitted here: a missing program, a job in the way."""
