"""`mpotrain train` in which a step goes wrong; a watchdog that is patient until then.

usage: hung_run.py MODE SECONDS train RUN [key=value ...]

Imports, the start of an engine and its first steps take long on a loaded machine, so SECONDS, the
timeout of the watchdog, count from step 4 on, or from the first where all are slow. In step 4

- `stop`: rank RANK_THAT_HANGS stops itself with SIGSTOP;
- `parted`: that rank waits in a collective that no other rank enters;
- `held`: that rank never gives the interpreter back;
- `slow`: every step takes half of SECONDS on that rank, and so does every saved tensor.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from mpotrain import launch
from mpotrain.cli import entry
from mpotrain.engine.deepspeed import DeepSpeedEngine
from mpotrain.parallel import watchdog
from mpotrain.parallel.watchdog import Watchdog

MODE, SECONDS = sys.argv[1], float(sys.argv[2])
HANGING = int(os.environ.get("RANK_THAT_HANGS", "1"))
STEP = 3
GRACE = 15.0 if MODE == "parted" else 5.0
"""Where a rank cannot answer, the other one would wait in vain."""
ARMED = threading.Event()


class LatePatience(Watchdog):
    """Has the timeout of the test late."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named, grace=GRACE)

    def beat(self, phase: str, step: int | None = None) -> None:
        begin = 0 if MODE == "slow" else STEP
        if step is not None and step >= begin and phase.startswith("step"):
            self._timeout = min(self._timeout, SECONDS)
        super().beat(phase, step)

    def _arm(self) -> None:
        super()._arm()
        if self._timeout <= SECONDS:
            ARMED.set()


def go_wrong(world: Any, group: Any, step: int) -> None:
    """Do on the rank that hangs what MODE says."""
    if world.rank != HANGING:
        return
    if MODE == "slow":
        time.sleep(SECONDS / 2)
    elif step == STEP and MODE == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif step == STEP and MODE == "parted":
        dist.all_reduce(torch.ones(3, 4), group=group)
    elif step == STEP and MODE == "held":
        ARMED.wait()  # the watching thread must have seen its new timeout
        ctypes.PyDLL(None).sleep(1000)


def main() -> None:
    """Patch the engine, and run the command line."""
    make_step, export_state = DeepSpeedEngine.step, DeepSpeedEngine.export_state
    groups: list[Any] = []

    def step(self: Any, microbatches: Any, **named: Any) -> Any:
        if not groups:
            groups.append(dist.new_group(list(range(self.world.size)), group_desc="own"))
        go_wrong(self.world, groups[0], named["step"])
        return make_step(self, microbatches, **named)

    def slowly_exported(self: Any) -> Iterator[Any]:
        for number, tensor in enumerate(export_state(self)):
            if MODE == "slow" and number < 3:
                time.sleep(SECONDS / 2)
            yield tensor

    DeepSpeedEngine.step = step  # type: ignore[method-assign]
    DeepSpeedEngine.export_state = slowly_exported  # type: ignore[method-assign]
    watchdog.END_SECONDS = 7.0 if MODE == "held" else 10.0
    launch.Watchdog = LatePatience  # type: ignore[misc,assignment]
    del sys.argv[1:3]
    entry()


if __name__ == "__main__":
    main()
