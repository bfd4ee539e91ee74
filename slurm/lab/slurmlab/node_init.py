"""Process 1 of a node (netns): set the place up, start slurmd, then collect orphans for ever."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
from pathlib import Path
from typing import NoReturn

from slurmlab.settings import read_record


def run_node(folder: Path, index: int) -> NoReturn:
    """Be node `index` of the lab in `folder`; runs inside its namespaces and never returns."""
    _, place = read_record(folder)
    socket.sethostname(f"node{index}")
    os.chdir("/")
    _mount("--bind", str(place.hosts), "/etc/hosts")
    # Shared memory and local storage are no node's business but its own.
    for path in ("/dev/shm", str(place.local)):
        _mount("-t", "tmpfs", "-o", "mode=1777", "tmpfs", path)
    subprocess.run(["slurmd", "-f", str(place.conf), "-N", f"node{index}"], check=True)
    # Blocked only now: slurmd would have inherited it.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    while True:
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        signal.sigtimedwait({signal.SIGCHLD}, 1.0)


def _mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True)
