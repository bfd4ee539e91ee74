"""The environment that a start inherits, without what belongs to other starts."""

from __future__ import annotations

from collections.abc import Mapping

from launcher.cluster_problems import OWN_VARIABLES

CLIENT_VARIABLES = frozenset({"SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_CLUSTERS", "SLURM_JWT"})
"""SLURM's variables that say which cluster this machine belongs to."""
SUBMISSION_VARIABLES = frozenset({"SBATCH_WAIT", "SBATCH_ARRAY_INX"})
"""Options of sbatch that make another thing of a submission: sbatch would wait for the end of the
job, or submit an array. Others (SBATCH_ACCOUNT, ...) are a person's defaults."""


def without_ranks(environ: Mapping[str, str]) -> dict[str, str]:
    """Return an environment without the place of this process in a world of ranks.

    Args:
        environ: usually `os.environ`.
    """
    return {key: value for key, value in environ.items() if key not in OWN_VARIABLES}


def without_job(environ: Mapping[str, str]) -> dict[str, str]:
    """Return an environment without the SLURM job that it belongs to, and without ranks.

    sbatch hands its environment on. What describes another job there (`SLURM_MEM_PER_NODE`,
    `SLURM_CPUS_PER_TASK`, ...) would be taken by srun for options of the new one.

    Args:
        environ: usually `os.environ`.
    """
    return {
        key: value
        for key, value in without_ranks(environ).items()
        if key in CLIENT_VARIABLES
        or not (
            key in SUBMISSION_VARIABLES or key.startswith(("SLURM_", "SLURMD_", "PMI_", "PMIX_"))
        )
    }
