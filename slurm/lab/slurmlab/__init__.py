"""A SLURM cluster of virtual nodes on one machine, with faults to play. Standard library only."""
