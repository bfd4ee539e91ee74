"""Starts runs of mpotrain: on this machine, on several hosts, on a SLURM cluster (no torch)."""
