"""How a run goes on after each way in which a life can end."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from launcher.job_state import JobState
from launcher.lives import LifeEnd, decide
from launcher.policies import LivesConfig

POLICY = LivesConfig(lives_without_progress=3, max_lives=10)


def end(**facts: Any) -> LifeEnd:
    base: dict[str, Any] = {
        "start_step": 10,
        "end_step": 20,
        "lives": 1,
        "fruitless_before": 0,
        "nodes": ("n1", "n2"),
    }
    return LifeEnd(**(base | facts))


def resume(reason: str, **facts: Any) -> LifeEnd:
    return end(outcome="resume", reason=reason, detail=f"because of {reason}", **facts)


@pytest.mark.parametrize(
    ("life", "kind", "ways", "counts"),
    [
        (end(outcome="done"), "finish", (), False),
        (end(outcome="held"), "finish", (), False),
        (end(outcome="done", job=JobState("COMPLETING")), "finish", (), False),
        (resume("SIGUSR1", warned=True), "restart", ("requeue", "resubmit"), True),
        (resume("TIME_LIMIT"), "restart", ("requeue", "resubmit"), True),
        (resume("SIGTERM"), "restart", ("requeue", "resubmit"), False),
        (resume("LOST_RANK"), "restart", ("requeue", "resubmit"), True),
        (resume("HUNG"), "restart", ("requeue", "resubmit"), True),
        (resume("STOP_FILE"), "stop", (), False),
        (resume("SIGINT"), "stop", (), False),
        (end(interrupted=True), "stop", (), False),
        (end(stop_file=True), "stop", (), False),
        (resume("SIGUSR1", warned=True, stop_file=True), "stop", (), False),
        (end(outcome="failed", retry=False), "give_up", (), True),
        (end(outcome="failed", retry=True), "restart", ("requeue", "resubmit"), True),
        (end(), "restart", ("requeue", "resubmit"), True),
        (end(job=JobState("")), "restart", ("requeue", "resubmit"), True),
        (end(dead_nodes=("n2",)), "restart", ("resubmit", "requeue"), True),
        (end(preempted=True), "restart", ("requeue", "resubmit"), False),
        (end(terminated=True), "restart", ("requeue", "resubmit"), False),
        (end(job=JobState("COMPLETING", "None"), terminated=True), "stop", (), False),
        (end(job=JobState("CANCELLED", "None")), "stop", (), False),
        (resume("SIGTERM", job=JobState("COMPLETING", "None")), "stop", (), False),
        (end(job=JobState("PENDING", "BeginTime")), "stop", (), False),
        (
            end(job=JobState("COMPLETING", "TimeLimit"), terminated=True),
            "restart",
            ("requeue", "resubmit"),
            True,
        ),
        (end(bad_nodes=("n2",), preflight="n2: slow"), "restart", ("requeue", "resubmit"), True),
    ],
)
def test_every_way_to_end(life: LifeEnd, kind: str, ways: tuple[str, ...], counts: bool) -> None:
    decision = decide(life, POLICY)
    assert (decision.kind, decision.ways) == (kind, ways)
    assert life.counts is counts
    assert decision.reason


def test_gives_up_after_failed_lives_without_progress() -> None:
    stuck = end(end_step=10, fruitless_before=2, outcome="failed", detail="RuntimeError: boom")
    decision = decide(stuck, POLICY)
    assert decision.kind == "give_up"
    for part in ("3 failed lives", "nothing newer than 10", "lives_without_progress=3", "boom"):
        assert part in decision.reason
    assert decide(dataclasses.replace(stuck, fruitless_before=1), POLICY).kind == "restart"
    assert decide(dataclasses.replace(stuck, end_step=11), POLICY).kind == "restart"


@pytest.mark.parametrize(
    ("facts", "kind"),
    [
        ({}, "give_up"),
        ({"has_trained": True}, "restart"),
        ({"end_step": 20}, "restart"),
        ({"last_step": 12}, "restart"),
        ({"last_step": 10}, "give_up"),
        ({"start_step": None, "end_step": None, "last_step": 0}, "give_up"),
        ({"start_step": None, "end_step": None, "last_step": 1}, "restart"),
        ({"has_trained": True, "exit_code": 3}, "give_up"),
        ({"has_trained": True, "exit_code": None}, "give_up"),
    ],
)
def test_bad_input_is_tried_again_where_training_shows_that_it_was_good(
    facts: dict[str, Any], kind: str
) -> None:
    bad = {"end_step": 10, "outcome": "failed", "retry": False, "exit_code": 2, "detail": "gone"}
    life = end(**(bad | facts))
    decision = decide(life, POLICY)
    assert decision.kind == kind
    assert life.counts
    assert life.fruitless == (0 if life.progressed else 1)
    assert ("missing mount" in decision.reason) is (kind == "restart")
    assert "gone" in decision.reason


def test_bad_input_that_stays_is_given_up() -> None:
    facts = {"outcome": "failed", "retry": False, "exit_code": 2, "has_trained": True}
    decision = decide(end(end_step=10, fruitless_before=2, **facts), POLICY)
    assert decision.kind == "give_up"
    for part in ("3 failed lives", "missing mount"):
        assert part in decision.reason


def test_no_checkpoint_at_all_is_no_progress_and_the_first_one_is() -> None:
    assert end(start_step=None, end_step=None, fruitless_before=2).fruitless == 3
    assert end(start_step=None, end_step=0, fruitless_before=2).fruitless == 0
    assert (
        "no checkpoint at all"
        in decide(end(start_step=None, end_step=None, fruitless_before=2), POLICY).reason
    )


def test_preemptions_without_progress_never_give_up() -> None:
    taken = resume("SIGTERM", end_step=10, fruitless_before=2)
    assert decide(taken, POLICY).kind == "restart"
    assert taken.fruitless == 2


def test_warned_lives_without_a_step_count() -> None:
    assert decide(resume("SIGUSR1", end_step=10, fruitless_before=2), POLICY).kind == "give_up"


def test_a_hopeless_run_is_stopped_on_request_all_the_same() -> None:
    assert decide(end(end_step=10, fruitless_before=5, stop_file=True), POLICY).kind == "stop"


def test_lives_are_bounded() -> None:
    assert decide(resume("SIGUSR1", lives=9), POLICY).kind == "restart"
    decision = decide(resume("SIGUSR1", lives=10), POLICY)
    assert decision.kind == "give_up"
    assert "max_lives=10" in decision.reason


def test_without_requeue_nothing_comes_back() -> None:
    policy = LivesConfig(requeue=False)
    assert decide(resume("SIGUSR1"), policy).kind == "stop"
    assert decide(end(), policy).kind == "give_up"
    assert "lives.requeue is false" in decide(end(), policy).reason
    assert decide(end(outcome="done"), policy).kind == "finish"


def test_resubmission_is_for_failures() -> None:
    policy = LivesConfig(restart="resubmit")
    assert decide(end(), policy).ways == ("resubmit", "requeue")
    assert decide(resume("SIGUSR1"), policy).ways[0] == "requeue"


def test_a_new_job_is_tried_once_where_more_nodes_are_lost_than_known() -> None:
    lost = end(end_step=10, dead_nodes=("n2",))
    assert decide(lost, POLICY).ways == ("resubmit", "requeue")
    again = dataclasses.replace(lost, fruitless_before=1)
    assert decide(again, POLICY).ways == ("requeue", "resubmit")
    assert decide(dataclasses.replace(again, end_step=11), POLICY).ways[0] == "resubmit"


def test_excludes_dead_and_bad_nodes_but_never_all() -> None:
    assert decide(end(dead_nodes=("n2",)), POLICY).exclude == ("n2",)
    assert decide(end(bad_nodes=("n1",), dead_nodes=("n2",)), POLICY).exclude == ("n2", "n1")
    assert decide(end(bad_nodes=("n1", "n2")), POLICY).exclude == ()
    # A single bad node cannot be told from a bad setting; another one is worth a try.
    assert decide(end(nodes=("n1",), bad_nodes=("n1",)), POLICY).exclude == ("n1",)


def test_the_reason_names_what_was_seen() -> None:
    text = end(killed="the ranks did not stop", dead_nodes=("n2",)).text
    assert "the ranks did not stop" in text
    assert "without a word" in text
    assert "no answer from n2" in text
