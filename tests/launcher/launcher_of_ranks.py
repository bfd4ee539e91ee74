"""Stands in for torchrun and DeepSpeed's launchers: two ranks that stop when they are asked to.

Run as the interpreter of a cluster file: `launcher_of_ranks.py -m torch.distributed.run ...`. Notes
are files in the folder that FAKE_NOTES names.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

NOTES = Path(os.environ["FAKE_NOTES"])
RUN = Path(os.environ["FAKE_RUN"])


def note(name: str) -> None:
    (NOTES / name).touch()


def rank(number: str) -> int:
    caught: list[int] = []
    for signum in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(signum, lambda num, frame: caught.append(num))
    note(f"rank{number}-ready")
    while not caught:
        time.sleep(0.02)
    note(f"rank{number}-{signal.Signals(caught[0]).name}")
    return 85


def launcher() -> int:
    def ended(number: int, frame: object) -> None:
        note(f"launcher-{signal.Signals(number).name}")
        for child in ranks:
            child.kill()
        sys.exit(1)

    ranks: list[subprocess.Popen[bytes]] = []
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, ended)
    if "deepspeed.launcher.runner" in sys.argv:
        note("launcher-ready")
        while not (RUN / "stop").exists():
            time.sleep(0.02)
    else:
        ranks += [
            subprocess.Popen([sys.executable, __file__, "rank", str(number)]) for number in range(2)
        ]
        if 85 not in [child.wait() for child in ranks]:
            return 1
    if "FAKE_OUTCOME" in os.environ:
        (RUN / "outcome.json").write_text(os.environ["FAKE_OUTCOME"])
    return 1


if __name__ == "__main__":
    (NOTES / "argv.json").write_text(json.dumps(sys.argv[1:])) if "-m" in sys.argv else None
    sys.exit(rank(sys.argv[2]) if sys.argv[1] == "rank" else launcher())
