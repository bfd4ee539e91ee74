"""Behind the deepspeed launcher a worker watches two processes; behind others only its parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[3]

WORKER = """
import os, time
from pathlib import Path
from mpotrain.parallel.watch import watch_parent
folder = Path(os.environ["FOLDER"])
watch_parent(lambda: (folder / "orphaned").touch(), interval=0.05)
(folder / "ready").touch()
time.sleep(300)
"""
NODE = """
import os, subprocess, sys, time
subprocess.Popen([sys.executable, "-c", os.environ["WORKER"]])
time.sleep(300)
"""
COMMAND = """
import os, subprocess, sys, time
subprocess.Popen([sys.executable, "-c", os.environ["NODE"], os.environ["NODE_NAME"]])
time.sleep(300)
"""


def wait_for(path: Path, seconds: float = 60) -> bool:
    end = time.monotonic() + seconds
    while not path.exists():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


@pytest.mark.parametrize(
    ("command", "node", "notices"),
    [
        ("bin/deepspeed", "deepspeed.launcher.launch", True),
        ("bash", "deepspeed.launcher.launch", False),
        ("bin/deepspeed", "torch.distributed.run", False),
    ],
)
def test_the_command_behind_a_node_launcher(
    tmp_path: Path, command: str, node: str, notices: bool
) -> None:
    programs = {"FOLDER": str(tmp_path), "WORKER": WORKER, "NODE": NODE, "NODE_NAME": node}
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, command],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)} | programs, start_new_session=True,
    )  # fmt: skip
    try:
        assert wait_for(tmp_path / "ready")
        time.sleep(0.3)
        assert not (tmp_path / "orphaned").exists()
        process.kill()
        process.wait()
        assert wait_for(tmp_path / "orphaned", 60 if notices else 1) == notices
    finally:
        os.killpg(process.pid, signal.SIGKILL)
