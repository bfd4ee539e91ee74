"""A run on the lab survives what a cluster does to it, and ends as one that was left alone.

Continuous integration plays the faults that cost most when they are handled wrongly; all others
take `MPOTRAIN_LAB=full` in the environment.
"""

from __future__ import annotations

import os
import signal

import pytest
from slurm.cluster_faults import FAULTS, SLOW, Fault, ranks_on
from slurm.scenario import NO_CHECK, RANKS, STEPS, Make, Point, full, require_equal


def test_one_command_trains_over_two_nodes(undisturbed: list[Point]) -> None:
    assert len(undisturbed) == STEPS
    first = sum(loss for _, loss, _ in undisturbed[:20])
    last = sum(loss for _, loss, _ in undisturbed[-20:])
    assert last < 0.97 * first


def test_three_warnings_of_the_time_limit(make: Make, undisturbed: list[Point]) -> None:
    scenario = make(NO_CHECK, RANKS)
    job_id = scenario.submit()
    for life in range(3):
        scenario.wait_for_step(60 * (life + 1))
        # What SLURM sends at --signal=B:USR1@N, to the batch script alone.
        scenario.lab.run(["scancel", "--signal=USR1", "--batch", job_id])
        scenario.wait_for_event("requeued", life + 1)
    scenario.wait_until_done()
    require_equal(scenario.curve(), undisturbed)
    started = scenario.events("started")
    assert [event["life"] for event in started] == [0, 1, 2, 3]
    assert {event["job_id"] for event in started} == {job_id}
    # Nothing was computed twice: every life began where the one before had stopped.
    assert scenario.lost_steps() == 0


@pytest.mark.parametrize(
    "fault",
    [pytest.param(fault, id=fault.name, marks=() if fault.in_short else full) for fault in FAULTS],
)
def test_faults(make: Make, undisturbed: list[Point], fault: Fault) -> None:
    scenario = make(NO_CHECK, RANKS, *fault.cluster, overrides=fault.overrides)
    scenario.submit()
    scenario.wait_for_step(90)
    loss = scenario.disturb(lambda: fault.play(scenario), needs_life=fault.needs_life)
    fault.mend(scenario)
    scenario.wait_until_done()
    require_equal(scenario.curve(), undisturbed)
    lives = len(scenario.events("started"))
    assert lives >= 2 if fault.needs_life else lives == 1
    print(f"| {fault.name} | {lives} lives | {loss.seconds:.0f} s | {loss.steps} steps |")


def test_gives_up_where_no_life_gets_anywhere(make: Make) -> None:
    one_rank = ("nodes = 1", "ranks_per_node = 1")
    scenario = make(NO_CHECK, *one_rank, overrides=["checkpoint.every=100000"])
    scenario.submit()
    for life in range(3):
        scenario.wait_for_event("started", life + 1)
        scenario.wait_for_fresh_step()
        os.kill(ranks_on(scenario, scenario.nodes()[0])[0], signal.SIGKILL)
        scenario.wait_for_event("ended", life + 1)
    scenario.wait_for_event("gave_up", 1)
    (end,) = scenario.events("gave_up")
    assert "3 failed lives one after another without progress" in end["detail"]
    scenario.lab.wait_for(lambda: not scenario.lab.queue(), 60, "the job to leave the queue")
    shown = scenario.launcher("status", str(scenario.folder)).stdout
    assert "gave up" in shown


@full
def test_the_time_limit_itself(make: Make) -> None:
    """SLURM's own clock: one minute for each life, of which the last half is for the checkpoint."""
    steps = ("train.steps=1000",)
    whole = make(NO_CHECK, overrides=steps)
    whole.submit()
    whole.wait_until_done(600)
    # On a busy machine a life may end before its first step: such lives are not to be counted here.
    scenario = make(
        NO_CHECK, 'time = "1:00"', "[lives]", "warning_seconds = 30", "grace_seconds = 20",
        "lives_without_progress = 20", overrides=steps,
    )  # fmt: skip
    scenario.submit()
    scenario.wait_until_done(1200)
    require_equal(scenario.curve(), whole.curve())
    assert len(scenario.events("warned")) >= 3
    assert len(scenario.events("requeued")) == len(scenario.events("warned"))
    assert scenario.lost_steps() == 0


@full
def test_a_life_that_is_cut_off_leaves_its_successor_alone(
    make: Make, undisturbed: list[Point]
) -> None:
    """SLURM gives all nodes of a life up, which knows nothing of it; then a rank of it fails."""
    scenario = make(NO_CHECK, overrides=SLOW)
    job_id = scenario.submit()
    scenario.wait_for_step(90)
    nodes = scenario.nodes()
    for node in nodes:
        scenario.lab.slurmd_kill(node)
    lab = scenario.lab
    lab.wait_for(lambda: lab.restarts(job_id) == 1, 90, "the requeue")
    lab.wait_state(job_id, "RUNNING")
    for pid in ranks_on(scenario, nodes[-1]):
        os.kill(pid, signal.SIGKILL)
    scenario.wait_until_done(500)
    require_equal(scenario.curve(), undisturbed)
    assert lab.restarts(job_id) == 1, scenario.events()
    assert not set(scenario.events("started")[-1]["nodes"]) & set(nodes)
