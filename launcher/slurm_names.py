"""Names in a form that SLURM takes literally: jobs and log files."""

from __future__ import annotations

import re
from pathlib import Path

LOGS = "logs"
"""Folder of the logs in a run folder."""
MAX_NAME = 64


def job_name(name: str) -> str:
    """Return a name of a job that squeue prints in one word.

    Args:
        name: any text; what is neither letter nor digit nor one of `.+=@-` becomes `_`.
    """
    plain = re.sub(r"[^\w.+=@-]", "_", name)
    return plain[:MAX_NAME].lstrip("-") or "mpotrain"


def log_pattern(folder: Path) -> str:
    """Return the log of a job as a file pattern of sbatch.

    Args:
        folder: run folder; it must hold no backslash, at which SLURM stops replacing `%j`.

    Returns:
        `FOLDER/logs/%j.log`, percent signs of the folder doubled.
    """
    return str(folder).replace("%", "%%") + f"/{LOGS}/%j.log"


def log_path(folder: Path, job_id: str) -> Path:
    """Return the log file of a job.

    Args:
        folder: run folder.
        job_id: as SLURM prints it.
    """
    return folder / LOGS / f"{job_id}.log"
