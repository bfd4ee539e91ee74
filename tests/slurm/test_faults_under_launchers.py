"""Ranks that torchrun or DeepSpeed's launcher starts come back as those of srun do."""

from __future__ import annotations

import re

import pytest
from slurm.cluster_faults import PREEMPTED, RANK_KILLED, Fault, ranks_of
from slurm.scenario import NO_CHECK, Make, Point, full, require_equal

TORCHRUN = ('launcher = "torchrun"',)
STARTS_ANEW = ("[lives]", "worker_restarts = 1")
"""The last lines of a cluster file: torchrun mends one failure inside a life."""
LAUNCHERS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "torchrun": (TORCHRUN, ()),
    "torchrun, worker_restarts=1": (TORCHRUN, STARTS_ANEW),
    "deepspeed": (('launcher = "deepspeed"',), ()),
}


@full
@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize("fault", [RANK_KILLED, PREEMPTED], ids=lambda fault: str(fault.name))
def test_faults(make: Make, undisturbed: list[Point], fault: Fault, launcher: str) -> None:
    top, last = LAUNCHERS[launcher]
    is_mended_inside = last == STARTS_ANEW and fault is RANK_KILLED
    scenario = make(NO_CHECK, *top, *fault.cluster, *last)
    scenario.submit()
    scenario.wait_for_step(90)
    before = ranks_of(scenario)
    assert len(before) == 4
    loss = scenario.disturb(lambda: fault.play(scenario), needs_life=not is_mended_inside)
    after = ranks_of(scenario)
    scenario.wait_until_done()
    require_equal(scenario.curve(), undisturbed)
    lives = len(scenario.events("started"))
    assert lives == 1 if is_mended_inside else lives >= 2
    assert not set(before) & set(after)
    if fault is PREEMPTED:
        assert scenario.lost_steps() == 0
    steps = loss.steps
    if is_mended_inside:
        (resumed,) = re.findall(r"^resuming \w+ at step (\d+)", scenario.log(), re.MULTILINE)
        steps = loss.reached - int(resumed)
    print(f"| {fault.name} | {launcher} | {lives} | {loss.seconds:.0f} s | {steps} steps |")
