"""A warning that comes before a rank can obey it does not end the rank."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc (Linux)")
def test_sigusr1_is_ignored_from_the_first_line_on() -> None:
    # The modules of the command line take their time here.
    code = (
        "import runpy, sys, types; slow = types.ModuleType('mpotrain.cli');\n"
        "def entry():\n    print('in', flush=True); sys.stdin.readline(); print('out')\n"
        "slow.entry = entry; sys.modules['mpotrain.cli'] = slow\n"
        "runpy.run_module('mpotrain', run_name='__main__')"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"in\n"
        os.kill(process.pid, signal.SIGUSR1)
        assert process.communicate(b"\n")[0] == b"out\n"
    assert process.returncode == 0
