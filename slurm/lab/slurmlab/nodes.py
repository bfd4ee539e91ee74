"""Boot the nodes of a lab, and play what befalls nodes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from slurmlab import network, processes
from slurmlab.daemons import run_daemon
from slurmlab.processes import Process
from slurmlab.settings import LabError, Place, Settings

PROGRAM = Path(__file__).resolve().parent.parent
"""What python runs to become a node: the folder with __main__.py."""
INIT_WORD = "__node"
"""Command of the program that makes it process 1 of a node."""


class Node:
    """One virtual node, running or not.

    Attributes:
        settings: of its lab.
        place: of its lab.
        index: number, from 1.
        name: as SLURM calls it.
    """

    def __init__(self, settings: Settings, place: Place, name: str) -> None:
        self.settings = settings
        self.place = place
        self.name = name
        known = {f"node{index}": index for index in range(1, settings.num_nodes + 1)}
        if name not in known:
            raise LabError(f"no node {name!r}: this lab has node1 to node{settings.num_nodes}")
        self.index = known[name]

    def boot(self) -> None:
        """Start the node unless it runs."""
        (self.place.folder / "spool" / self.name).mkdir(parents=True, exist_ok=True)
        if self.settings.mode == "multi":
            self.start_slurmd()
        elif not self._shells():
            network.plug(self.place, self.index)
            self._boot_namespaces()

    def _boot_namespaces(self) -> None:
        enter = ["nsenter", f"--net=/run/netns/{self.place.network_name(self.index)}"]
        apart = ["--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        init = [sys.executable, str(PROGRAM), INIT_WORD, str(self.place.folder), str(self.index)]
        with (self.place.folder / "log" / f"{self.name}.log").open("ab") as log:
            subprocess.Popen(
                [*enter, "unshare", *apart, *init],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def kill(self) -> None:
        """Cut the power: the cable goes dead first, so that nobody hears the processes end."""
        self._needs_namespaces()
        self.cut()
        self.crash()

    def crash(self) -> None:
        """Kill every process at once; the network stays, so peers see their connections reset."""
        self._needs_namespaces()
        stop_node(self.place.folder, self.index)

    def cut(self) -> None:
        """Unplug the network cable."""
        self._needs_namespaces()
        network.set_cable(self.place, self.index, up=False)

    def heal(self) -> None:
        """Plug the network cable in and have slurmd register at once."""
        self._needs_namespaces()
        network.set_cable(self.place, self.index, up=True)
        time.sleep(0.3)  # the bridge forwards nothing before it has seen the link come up
        self.register()

    def freeze(self) -> None:
        """Stop (SIGSTOP) every process, as a kernel that hangs would."""
        self._needs_namespaces()
        for _ in range(3):  # what was forked between look and signal is caught the next time
            processes.send(self.inhabitants(), signal.SIGSTOP)

    def thaw(self) -> None:
        """Let frozen processes go on."""
        self._needs_namespaces()
        processes.send(self.inhabitants(), signal.SIGCONT)

    def mend(self) -> None:
        """Undo whatever was done to the node, and nothing where all is well."""
        if self.settings.mode == "multi" or not self._shells():
            self.boot()
            return
        self.thaw()
        self.start_slurmd()
        if not network.cable_is_up(self.place, self.index):
            self.heal()

    def register(self) -> None:
        """Have slurmd report to slurmctld now; by itself it does so up to 40 s later.

        One that is about to start reports anyway.
        """
        ready = [one for one in self.slurmd() if processes.catches(one.pid, signal.SIGHUP)]
        processes.send(ready, signal.SIGHUP)

    def slurmd(self) -> list[Process]:
        """Return the slurmd of the node, if it runs."""
        return processes.find_program("slurmd", str(self.place.conf), self.name)

    def kill_slurmd(self) -> None:
        """Kill slurmd alone; job steps live on."""
        processes.stop(self.slurmd(), signal.SIGKILL)

    def start_slurmd(self) -> None:
        """Start slurmd unless it runs."""
        if self.slurmd():
            return
        argv = ["slurmd", "-f", str(self.place.conf), "-N", self.name]
        inside = self.enter_argv() if self.settings.mode == "netns" else []
        run_daemon([*inside, *argv], self.place.folder / "log" / f"slurmd-{self.name}.log")

    def execute(self, argv: Sequence[str]) -> None:
        """Become a command inside the node; returns only by raising."""
        self._needs_namespaces()
        command = [*self.enter_argv(), f"--wd={Path.cwd()}", "--", *argv]
        environment = os.environ | {"SLURM_CONF": str(self.place.conf)}
        os.execvpe(command[0], command, environment)

    def enter_argv(self) -> list[str]:
        """Return the start of a command line that runs the rest inside the node."""
        return ["nsenter", f"--target={self._init().pid}", "--net", "--uts", "--pid", "--mount"]

    def inhabitants(self) -> list[Process]:
        """Return all processes of the node, its process 1 aside."""
        init = self._init()
        return [one for one in processes.same_pid_namespace(init.pid) if one.pid != init.pid]

    def _init(self) -> Process:
        shells = {process.pid for process in self._shells()}
        found = processes.find(lambda process: process.parent in shells)
        if not found:
            raise LabError(f"{self.name} is not running; start it with: start {self.name}")
        return found[0]

    def _shells(self) -> list[Process]:
        return node_shells(self.place.folder, self.index)

    def _needs_namespaces(self) -> None:
        if self.settings.mode != "netns":
            raise LabError("this lab runs in mode multi, where nodes have no network of their own")


def node_shells(folder: Path, index: int | None = None) -> list[Process]:
    """Return the `unshare` processes that hold the nodes (or one node) of a lab together."""
    words = [INIT_WORD, str(folder)]
    found = processes.find_program("unshare", *words)
    return [one for one in found if index is None or one.argv[-1] == str(index)]


def stop_node(folder: Path, index: int | None = None) -> None:
    """Kill all processes of one node, or of all nodes of a lab."""
    shells = node_shells(folder, index)
    numbers = {process.pid for process in shells}
    inits = processes.find(lambda process: process.parent in numbers)
    # With process 1 the kernel kills all others of its PID namespace before it lets it go.
    processes.stop(inits, signal.SIGKILL)
    processes.stop(shells, signal.SIGKILL)
