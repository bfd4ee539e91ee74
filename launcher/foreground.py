"""A launcher of ranks as a child of this process, and signals that reach its ranks.

torchrun and DeepSpeed's launcher die of SIGUSR1, and kill ranks half a minute after SIGTERM. Here
they run in a session of their own, so that neither a terminal nor a batch system reaches them, and
what this process is sent goes to the ranks alone: these save and leave, and the launcher ends after
them.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import queue
import signal
import subprocess
from collections.abc import Callable
from types import FrameType

import psutil

from launcher.commands import Command
from launcher.launch_error import LaunchError
from launcher.surroundings import without_ranks

FORWARDED = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
LAUNCHERS = ("torch.distributed.run", "deepspeed.launcher.launch")
"""Modules whose children are ranks."""
POLL_SECONDS = 0.2
PATIENCE = 3
"""Ctrl-C so often: the first asks ranks to stop, the second kills them, this one ends all."""
PR_SET_PDEATHSIG = 1

Pass = Callable[[psutil.Process, signal.Signals], bool]
"""Hands a signal on to the ranks of a launcher; False: there are none yet, ask again."""


def run_in_place(command: Command) -> int:
    """Become a command: signals, terminal and exit code are its own from here on.

    Raises:
        LaunchError: it cannot be run.
    """
    environment = without_ranks(os.environ) | dict(command.environment)
    try:
        os.execvpe(command.argv[0], command.argv, environment)
    except OSError as error:
        raise _not_run(command, error) from error


def run_and_pass(command: Command, pass_on: Pass) -> int:
    """Run a launcher of ranks to its end, and pass signals on to its ranks.

    Args:
        command: the launcher.
        pass_on: how signals reach the ranks.

    Returns:
        Its exit code; 128 and the number of the signal that killed it.

    Raises:
        LaunchError: it cannot be run.
    """
    received: queue.SimpleQueue[signal.Signals] = queue.SimpleQueue()

    def receive(number: int, frame: FrameType | None) -> None:
        received.put(signal.Signals(number))

    # nohup has SIGHUP ignored: then the run shall outlive its terminal.
    is_kept = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    numbers = [number for number in FORWARDED if number != signal.SIGHUP or not is_kept]
    before = {number: signal.signal(number, receive) for number in numbers}
    try:
        child = _start(command)
        code = _wait(child, received, pass_on)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
    return code if code >= 0 else 128 - code


def pass_to_ranks(launcher: psutil.Process, number: signal.Signals) -> bool:
    """Send a signal to the ranks of a launcher, and not to what these have started themselves.

    Args:
        launcher: torchrun or DeepSpeed's launcher, or a container around it.
        number: the signal; SIGHUP is about a terminal that ranks do not have: they get SIGTERM.

    Returns:
        Whether there were any ranks.
    """
    number = signal.SIGTERM if number == signal.SIGHUP else number
    ranks = _ranks(launcher)
    for rank in ranks:
        with contextlib.suppress(psutil.NoSuchProcess):
            rank.send_signal(number)
    return bool(ranks)


def _ranks(launcher: psutil.Process) -> list[psutil.Process]:
    try:
        # Parents come before their children: the last that is a launcher is inside the container.
        family = [launcher, *launcher.children(recursive=True)]
        innermost = [process for process in family if _is_launcher(process)][-1:]
        return [rank for process in innermost for rank in process.children()]
    except psutil.NoSuchProcess:
        return []


def _is_launcher(process: psutil.Process) -> bool:
    try:
        return any(module in process.cmdline() for module in LAUNCHERS)
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return False


def _start(command: Command) -> subprocess.Popen[bytes]:
    libc = ctypes.CDLL(None)

    def prepare() -> None:
        # Between fork and exec: a child that ignores the warning before the end of a job, and
        # that does not outlive this process.
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)

    try:
        return subprocess.Popen(
            command.argv,
            env=without_ranks(os.environ) | dict(command.environment),
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=prepare,
        )
    except OSError as error:
        raise _not_run(command, error) from error


def _wait(
    child: subprocess.Popen[bytes], received: queue.SimpleQueue[signal.Signals], pass_on: Pass
) -> int:
    pending: list[signal.Signals] = []
    interrupts = 0
    while True:
        with contextlib.suppress(queue.Empty):
            pending.append(received.get_nowait())
            if pending[-1] == signal.SIGINT:
                interrupts += 1
            if interrupts >= PATIENCE:
                child.terminate()
        if pending and child.poll() is None and pass_on(psutil.Process(child.pid), pending[0]):
            pending.pop(0)
        with contextlib.suppress(subprocess.TimeoutExpired):
            return child.wait(timeout=POLL_SECONDS)


def _not_run(command: Command, error: OSError) -> LaunchError:
    return LaunchError(f"{command.argv[0]}: cannot be run ({error.strerror or error})")
