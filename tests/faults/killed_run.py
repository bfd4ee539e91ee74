"""A run that logs the samples of every step and can kill itself at a point of a save.

usage: killed_run.py RUN LEDGER [POINT STEP]
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mpotrain import pretrain, start
from mpotrain.batch import Batch
from mpotrain.checkpoint.store import CheckpointStore
from mpotrain.config import load_config
from mpotrain.engine.local import LocalEngine


def main() -> int:
    """Train; die by SIGKILL at POINT of the save of STEP where they are given."""
    run, ledger = Path(sys.argv[1]), Path(sys.argv[2])
    point, step = (sys.argv[3], int(sys.argv[4])) if len(sys.argv) > 3 else ("", -1)
    current = {"step": -1}
    make_step, save = LocalEngine.step, CheckpointStore.save

    def logged_step(self: Any, microbatches: Sequence[Batch], **named: Any) -> Any:
        samples = [int(i) for batch in microbatches for i in batch.sample_ids]
        tokens = [batch.inputs.sum().item() for batch in microbatches]
        with ledger.open("a") as file:
            file.write(json.dumps([named["step"], samples, tokens]) + "\n")
        return make_step(self, microbatches, **named)

    def killed_save(self: Any, position: Any, tensors: Any) -> Any:
        current["step"] = position.step
        return save(self, position, tensors)

    def on_point(name: str) -> None:
        if name == point and current["step"] == step:
            os.kill(os.getpid(), signal.SIGKILL)

    class Store(CheckpointStore):
        def __init__(self, *args: Any, **named: Any) -> None:
            super().__init__(*args, **(named | {"on_point": on_point}))

    LocalEngine.step = logged_step  # type: ignore[method-assign]
    CheckpointStore.save = killed_save  # type: ignore[method-assign]
    start.CheckpointStore = Store  # type: ignore[misc]
    return pretrain.train(load_config(run))


if __name__ == "__main__":
    sys.exit(main())
