"""What a start of ranks must know of the SLURM job it belongs to."""

from __future__ import annotations

from dataclasses import dataclass

from mpotrain.parallel.environment import FIRST_PORT, NUM_PORTS


@dataclass(frozen=True)
class JobFacts:
    """One life of a job.

    Attributes:
        job_id: as SLURM prints it.
        life: number of this life, counted from 0 over all jobs of the run.
        nodes: names of the nodes in the order of their ranks.
        master_address: address of the first node (its NodeAddr: a name need not resolve).
        master_port: port at which ranks meet.
        folder: working directory of the ranks, an absolute path: that of the submission.
    """

    job_id: str
    life: int
    nodes: tuple[str, ...]
    master_address: str
    master_port: int
    folder: str

    @property
    def rendezvous_id(self) -> str:
        """What tells the ranks of this life from those of any other."""
        return f"{self.job_id}.{self.life}"


def master_port(job_id: str, life: int) -> int:
    """Return the port at which the ranks of a life meet.

    Ranks of the life before may still hold theirs, so the port moves with the life; it lies below
    the ports that the kernel gives to outgoing connections.

    Args:
        job_id: as SLURM prints it; of an array job `123_4`.
        life: number of the life.
    """
    number = int("".join(filter(str.isdigit, job_id)) or "0")
    return FIRST_PORT + (number * 31 + life * 7) % NUM_PORTS
