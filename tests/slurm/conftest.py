"""Fixtures of the tests on a SLURM lab."""

from __future__ import annotations

import sys

from slurm.lab_fixture import PROGRAM, fresh_lab, lab
from slurm.run_fixtures import data, make, undisturbed

# The lab is a program, not an installed package; its own modules are tested as well.
sys.path.insert(0, str(PROGRAM))

__all__ = ["data", "fresh_lab", "lab", "make", "undisturbed"]
