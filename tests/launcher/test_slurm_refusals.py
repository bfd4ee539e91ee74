"""What SLURM says: which words are a refusal, which may pass, and what is asked again."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from launcher import slurm_control
from launcher.restart import PATIENCE_SECONDS
from launcher.slurm_call import Reply, job_id_of
from launcher.slurm_control import SlurmControl

UPGRADE_SECONDS = 3600.0
AWAY = "Unable to contact slurm controller (connect failure)"
NEVER_SENT = (
    AWAY,
    "error: If munged is up, restart with --num-threads=10 error: Munge encode failed: Failed to "
    'access "/run/munge/munge.socket.2": Permission denied',
    "error: Slurm backup controller in standby mode",
    "fatal: Could not establish a configuration source",
    "Unable to create job record, try again",
)
PERHAPS_SENT = (
    "Invalid authentication credential",
    "Protocol authentication error",
    "Transport endpoint is not connected",
    "error: Munge decode failed: Invalid credential",
    "Socket timed out on send/recv operation",
    "Zero Bytes were transmitted or received",
    "has not answered within 20 s",
    "Incompatible versions of client and server code",
    "Slurm internal error, contact system administrator",
)
UNKNOWN = "words of a later version"
REFUSALS = (
    "Requested operation is presently disabled for job 100",
    "Access/permission denied for job 100",
    "Invalid job id specified",
    "Only batch jobs are accepted or processed for job 100",
    "Job/step already completing or completed for job 100",
    "Job is pending execution for job 100",
    "Requested operation not supported on this system",
    "Invalid account or account/partition combination specified",
    "Invalid partition name specified",
    "Invalid qos specification",
    "Requested node configuration is not available",
    "Requested partition configuration not available now",
    "Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)",
    "User's group not permitted to use this partition",
    "Requested time limit is invalid (missing or exceeds some limit)",
    "Node count specification invalid",
    "System submissions disabled",
)


@pytest.mark.parametrize("problem", NEVER_SENT)
def test_what_was_never_sent_may_be_sent_again(problem: str) -> None:
    assert Reply(problem=problem).is_unsent
    assert Reply(problem=problem).may_pass


@pytest.mark.parametrize("problem", [*PERHAPS_SENT, UNKNOWN])
def test_what_is_not_known_for_a_refusal_may_pass(problem: str) -> None:
    assert Reply(problem=problem).may_pass
    # sbatch would queue a second job.
    assert not Reply(problem=problem).is_unsent


@pytest.mark.parametrize("problem", REFUSALS)
def test_refusals_are_final(problem: str) -> None:
    assert not Reply(problem=f"scontrol: {problem}").may_pass
    assert not Reply(problem=problem).is_unsent


def test_success_is_neither() -> None:
    assert not Reply("100").may_pass


class Away:
    """A controller that fails until a time, under a clock that only waiting moves.

    Attributes:
        now: the clock.
        asked: verbs that were asked for.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, problem: str, until: float) -> None:
        self.now, self._problem, self._until = 0.0, problem, until
        self.asked: list[str] = []
        clock = SimpleNamespace(monotonic=lambda: self.now)
        monkeypatch.setattr(slurm_control, "time", clock)
        monkeypatch.setattr(slurm_control, "call", self._call)
        self.control = SlurmControl("100", "100", sleep=self._sleep)

    def _sleep(self, seconds: float) -> None:
        self.now += seconds

    def _call(self, argv: Sequence[str], **_: Any) -> Reply:
        if "show" in argv:
            return Reply("JobId=100 Requeue=1 Restarts=0 BatchFlag=1")
        self.asked.append(argv[0] if argv[0] == "sbatch" else argv[1])
        return Reply(problem=self._problem) if self.now < self._until else Reply("101\n")


@pytest.mark.parametrize("problem", [*NEVER_SENT, *PERHAPS_SENT])
def test_a_requeue_outlasts_an_upgrade(monkeypatch: pytest.MonkeyPatch, problem: str) -> None:
    away = Away(monkeypatch, problem, UPGRADE_SECONDS)
    assert away.control.requeue(PATIENCE_SECONDS, 0).ok


def test_a_requeue_that_is_refused_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    away = Away(monkeypatch, REFUSALS[0], UPGRADE_SECONDS)
    assert not away.control.requeue(PATIENCE_SECONDS, 0).ok
    assert away.asked == ["requeue"]


def test_nodes_do_not_wait_hours_for_what_nobody_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    away = Away(monkeypatch, UNKNOWN, 1e9)
    assert not away.control.requeue(PATIENCE_SECONDS, 0).ok
    assert 600 <= away.now <= 660


def test_patience_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    away = Away(monkeypatch, AWAY, 1e9)
    assert away.control.requeue(PATIENCE_SECONDS, 0).problem == AWAY
    assert PATIENCE_SECONDS <= away.now <= PATIENCE_SECONDS + 60


@pytest.mark.parametrize("problem", NEVER_SENT)
def test_a_submission_outlasts_an_upgrade(monkeypatch: pytest.MonkeyPatch, problem: str) -> None:
    away = Away(monkeypatch, problem, UPGRADE_SECONDS)
    assert away.control.submit(("sbatch",), {}, PATIENCE_SECONDS, 0) == ("101", "")


@pytest.mark.parametrize("problem", PERHAPS_SENT)
def test_a_submission_without_an_answer_is_not_repeated(
    monkeypatch: pytest.MonkeyPatch, problem: str
) -> None:
    away = Away(monkeypatch, problem, UPGRADE_SECONDS)
    assert away.control.submit(("sbatch",), {}, PATIENCE_SECONDS, 0) == (None, problem)
    assert away.asked == ["sbatch"]


@pytest.mark.parametrize("restarts", ["Restarts=1", "Restarts=12"])
def test_a_life_is_overtaken_where_slurm_has_started_the_job_again(
    monkeypatch: pytest.MonkeyPatch, restarts: str
) -> None:
    line = f"JobId=100 JobName=x Restarts=9 y Requeue=1 {restarts} BatchFlag=1 Reboot=0"
    monkeypatch.setattr(slurm_control, "call", lambda argv: Reply(line))
    control, count = SlurmControl("100", "100"), int(restarts.partition("=")[2])
    assert control.own_life(count).ok
    assert control.own_life(count + 1).ok
    assert control.own_life(count - 1).problem == slurm_control.OVERTAKEN


@pytest.mark.parametrize(
    "answer",
    ["101\n", "101;cluster\n", "Maintenance on the 3rd\n\n 101 \n", "7 jobs are left\n101;c\n"],
)
def test_the_job_id_is_found_behind_news(monkeypatch: pytest.MonkeyPatch, answer: str) -> None:
    assert job_id_of(answer) == "101"
    monkeypatch.setattr(slurm_control, "call", lambda argv, **_: Reply(answer))
    assert SlurmControl("100", "100").submit(("sbatch",), {}, 0.0, 0) == ("101", "")


def test_an_answer_without_a_job_id_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm_control, "call", lambda argv, **_: Reply("12 jobs\n"))
    job_id, problem = SlurmControl("100", "100").submit(("sbatch",), {}, 0.0, 0)
    assert job_id is None
    assert "12 jobs" in problem
