"""Training that waits in the middle of a step, so that a signal finds it there.

usage: held_run.py RUN_FILE STEP

In step STEP (counted from 0) it writes a file `held` beside the run file and waits for `go-on`.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from mpotrain import pretrain
from mpotrain.config import load_config
from mpotrain.engine.local import LocalEngine


def main() -> int:
    """Train, and wait in one step."""
    run, held_step = Path(sys.argv[1]), int(sys.argv[2])
    make_step = LocalEngine.step

    def held(self: LocalEngine, *args: Any, **named: Any) -> Any:
        if named["step"] == held_step:
            (run.parent / "held").touch()
            while not (run.parent / "go-on").exists():
                time.sleep(0.01)
        return make_step(self, *args, **named)

    LocalEngine.step = held  # type: ignore[method-assign]
    return pretrain.train(load_config(run))


if __name__ == "__main__":
    sys.exit(main())
