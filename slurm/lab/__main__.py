"""A real SLURM cluster of virtual nodes on one machine: `python slurm/lab up 2`."""

from __future__ import annotations

import sys

from slurmlab.cli import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
