"""Errors that are meant for people, and the exit codes of the command line.

Every error that a user can cause derives from `MpotrainError`: its text says what was wrong,
where (file and dotted key, tensor name, rank) and what to do. The command line prints it without
a traceback and leaves with its `exit_code`.
"""

from __future__ import annotations

EXIT_DONE = 0
"""The command did what it was asked to do."""
EXIT_CRASH = 1
"""An unexpected exception: a bug or a broken machine, with its traceback."""
EXIT_BAD_INPUT = 2
"""Bad configuration, data, checkpoint or command line; `plan` found problems."""
EXIT_ANOMALY = 3
"""Training stopped by the policy for NaN, infinity and loss spikes."""
EXIT_STORAGE = 4
"""A file could not be written (disk full, no permission); what was complete before is intact."""
EXIT_STOPPED = 85
"""Stopped on request (signal or stop file) after a checkpoint: run the same command to go on."""
EXIT_HUNG = 86
"""Ended by the watchdog because no rank made progress: run the same command to go on."""


class MpotrainError(Exception):
    """Base of all errors that a user can cause and mend."""

    exit_code: int = EXIT_BAD_INPUT


class ConfigError(MpotrainError):
    """One or more mistakes in a run file or in overrides.

    Attributes:
        problems: one line for each mistake, with file and dotted key.
    """

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        super().__init__("\n".join(problems))


class SpecError(MpotrainError, ValueError):
    """A factorization that cannot exist: modes, bonds or sizes do not fit."""


class DataError(MpotrainError):
    """Missing, truncated, changed or unsuitable training data or tokenizer."""


class CheckpointError(MpotrainError):
    """No usable checkpoint, or one that does not belong to this run or model."""


class ParallelError(MpotrainError):
    """The processes that were started do not fit the run (world size, environment)."""


class LostRankError(ParallelError):
    """Another rank cannot be reached any more, or never came: it failed, was killed, or is cut off.

    Nothing is wrong with the run itself, so another start may help.
    """

    exit_code = EXIT_CRASH


class AnomalyError(MpotrainError):
    """Too many skipped steps: loss or gradients are not finite, or the loss explodes."""

    exit_code = EXIT_ANOMALY


class StorageError(MpotrainError):
    """Writing failed: disk full, quota, permission. Earlier complete files are intact."""

    exit_code = EXIT_STORAGE
