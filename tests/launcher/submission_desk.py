"""A desk from which runs are submitted to a SLURM made of fakes."""

import os
from pathlib import Path

import pytest
from launch_fakes import CLUSTER_FILE, RUN_FILE, make_fake

from launcher import cli


class Desk:
    """A working directory with a run file, a cluster file and a SLURM made of fakes."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.bin = folder / "bin"
        self.sbatch = make_fake(self.bin, "sbatch", output="4711\n")
        self.queue = make_fake(self.bin, "squeue")
        make_fake(self.bin, "scontrol", output="JobId=12 JobName=other\n")
        (folder / "run.toml").write_text(RUN_FILE)
        (folder / "cluster.toml").write_text(CLUSTER_FILE)
        self.run = folder / "runs" / "small"
        self.launch = self.run / "launch"
        monkeypatch.chdir(folder)
        monkeypatch.setenv("PATH", f"{self.bin}{os.pathsep}{os.environ['PATH']}")

    def slurm(self, *arguments: str) -> int:
        return cli.main(["slurm", "run.toml", "--cluster", "cluster.toml", *arguments])

    def in_queue(self, job: str, state: str) -> None:
        self.queue = make_fake(self.bin, "squeue", output=f"{job}|{job}|{state}|small|node1|None\n")
