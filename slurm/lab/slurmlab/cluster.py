"""A whole lab: start it, look at it, take it away without leaving anything."""

from __future__ import annotations

import contextlib
import getpass
import os
import shlex
import shutil
import signal
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path

from slurmlab import daemons, locks, network, processes
from slurmlab.configuration import write_configuration
from slurmlab.nodes import Node, node_shells, stop_node
from slurmlab.settings import (
    PACKAGES,
    LabError,
    Place,
    Settings,
    check_folder,
    default_folder,
    missing_programs,
    read_record,
    short_host,
    write_record,
)

NUM_SLOTS = 200
"""Networks 10.99.1.0/24 .. 10.99.200.0/24, and as many ranges of ports."""
START_SECONDS = 60.0
"""How long nodes may take to register."""
BAD_STATES = ("down", "unk", "drain", "fail", "*")
"""Parts of the state of a node that can run no job."""


class Lab:
    """A lab that has been started.

    Attributes:
        settings: what kind of cluster it is.
        place: where it lives.
    """

    def __init__(self, settings: Settings, place: Place) -> None:
        self.settings = settings
        self.place = place

    @classmethod
    def open(cls, folder: Path | None) -> Lab:
        """Return the lab in `folder` (or in the default one)."""
        return cls(*read_record(check_folder(folder or default_folder())))

    def node(self, name: str) -> Node:
        """Return one node by its name."""
        return Node(self.settings, self.place, name)

    def nodes(self) -> list[Node]:
        """Return all nodes in order."""
        return [self.node(f"node{index}") for index in range(1, self.settings.num_nodes + 1)]

    def environment(self) -> dict[str, str]:
        """Return the variables that make SLURM's commands talk to this lab."""
        return {
            "SLURM_CONF": str(self.place.conf),
            "LAB_DIR": str(self.place.folder),
            "LAB_MODE": self.settings.mode,
            "LAB_NODES": str(self.settings.num_nodes),
            "LAB_LOCAL": str(self.place.local),
        }

    def exports(self) -> str:
        """Return lines of shell that set `environment`."""
        pairs = self.environment().items()
        return "\n".join(f"export {name}={shlex.quote(value)}" for name, value in pairs)

    def client(self, argv: Sequence[str], seconds: float = 10.0) -> str:
        """Return the output of one of SLURM's commands, empty where it failed."""
        environment = os.environ | {"SLURM_CONF": str(self.place.conf)}
        try:
            done = subprocess.run(
                argv, env=environment, capture_output=True, text=True, timeout=seconds, check=False
            )
        except subprocess.TimeoutExpired:
            return ""
        return done.stdout if done.returncode == 0 else ""

    def num_ready(self) -> int:
        """Return how many nodes can run jobs."""
        states = self.client(["sinfo", "-h", "-N", "-p", "main", "-o", "%T"], 3.0).split()
        return sum(not any(bad in state for bad in BAD_STATES) for state in states)

    def is_ready(self) -> bool:
        """Return whether slurmctld answers and every node can run jobs."""
        if not daemons.controllers(self.place.conf):
            return False
        return self.num_ready() == self.settings.num_nodes

    def status(self) -> str:
        """Return a table of the nodes and one of the queue.

        Raises:
            LabError: slurmctld does not answer.
        """
        nodes = self.client(["sinfo", "-N", "-p", "main", "-o", "%.10N %.12T %E"])
        if not nodes:
            raise LabError(f"slurmctld does not answer; see {self.place.folder}/log")
        return nodes + "\n" + self.client(["squeue", "-o", "%.10i %.9P %.20j %.10T %.8M %.15N %r"])

    def restart_controller(self, number: signal.Signals) -> None:
        """Stop slurmctld with a signal and start it again; jobs run on."""
        daemons.stop_controller(self.place.conf, number)
        daemons.start_controller(self.settings, self.place)
        if not processes.wait_until(lambda: bool(self.num_ready()), START_SECONDS, every=0.1):
            raise LabError("slurmctld started but shows no usable node")

    def mend(self) -> None:
        """Undo every fault that was played, and wait until all nodes can run jobs.

        Raises:
            LabError: some node did not come back.
        """
        if not daemons.controllers(self.place.conf):
            daemons.start_controller(self.settings, self.place)
        for node in self.nodes():
            node.mend()
        if not self.is_ready():
            for node in self.nodes():
                node.register()
        if not processes.wait_until(self.is_ready, START_SECONDS, every=0.1):
            raise LabError(f"not all nodes came back\n{self.status()}")


def lock_of(folder: Path) -> Path:
    """Return the lock file of the lab in `folder`; beside it, since the folder comes and goes."""
    return folder.with_name(folder.name + ".lock")


def up(folder: Path, settings: Settings) -> Lab:
    """Start a lab, unless just this one runs and is well; one of another shape is taken down.

    Raises:
        LabError: with the reason and the ends of the logs; nothing is left running then.
    """
    folder = check_folder(folder)
    problems = settings.problems()
    missing = missing_programs(settings)
    if missing:
        problems.append(
            f"missing: {', '.join(missing)}. As root, run slurm/lab/install.sh, which does: "
            f"apt-get install --no-install-recommends {' '.join(PACKAGES)}"
        )
    if problems:
        raise LabError("\n".join(problems))
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locks.held(lock_of(folder)):
        with contextlib.suppress(LabError):
            lab = Lab(*read_record(folder))
            if lab.settings == settings and lab.is_ready():
                return lab
        _remove(folder)
        try:
            return _start(folder, settings)
        except BaseException:
            _stop(folder)
            raise


def _start(folder: Path, settings: Settings) -> Lab:
    for name in ("state", "spool", "log", "run", "local"):
        (folder / name).mkdir(parents=True)
    with locks.held(locks.MACHINE_LOCK):  # until the daemons hold the ports themselves
        place = _claim(folder, settings)
        write_record(settings, place)
        write_configuration(settings, place)
        if settings.auth == "munge":
            daemons.start_munged(place)
        daemons.start_controller(settings, place)
        lab = Lab(settings, place)
        for node in lab.nodes():
            node.boot()
    if not processes.wait_until(lab.is_ready, START_SECONDS, every=0.1):
        logs = sorted((folder / "log").glob("*.log"))
        ends = "\n".join(daemons.tail(log) for log in logs)
        raise LabError(f"not all nodes registered in {START_SECONDS:.0f} s\n{ends}")
    return lab


def _claim(folder: Path, settings: Settings) -> Place:
    host = short_host()
    first = sum(os.fsencode(folder)) % NUM_SLOTS
    for step in range(NUM_SLOTS):
        slot = (first + step) % NUM_SLOTS + 1
        if settings.mode == "netns":
            place = Place(folder=folder, slot=slot, control_address=f"10.99.{slot}.254", host=host)
            free = network.make_bridge(place)
        else:
            place = Place(folder=folder, slot=slot, control_address=_address_of(host), host=host)
            free = _ports_free(settings, place)
        if free:
            return place
    raise LabError(f"all {NUM_SLOTS} networks or port ranges for labs are taken")


def _address_of(host: str) -> str:
    try:
        return socket.gethostbyname(host)
    except OSError:
        return "127.0.0.1"


def _ports_free(settings: Settings, place: Place) -> bool:
    ports = [place.node_port(index) for index in range(1, settings.num_nodes + 1)]
    for port in (place.control_port, *ports):
        with socket.socket() as probe:
            # As SLURM does; without it the closed connections of a lab before would count.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", port))
            except OSError:
                return False
    return True


def down(folder: Path) -> None:
    """Stop everything that belongs to the lab in `folder` and delete the folder.

    Works as well where the folder or parts of it are gone already, and twice.
    """
    folder = check_folder(folder)
    if not folder.parent.is_dir():
        return
    with locks.held(lock_of(folder)):
        _remove(folder)
        lock_of(folder).unlink(missing_ok=True)


def _remove(folder: Path) -> None:
    _stop(folder)
    if folder.exists():
        shutil.rmtree(folder)


def _stop(folder: Path) -> None:
    conf = folder / "slurm.conf"
    if conf.exists() and daemons.controllers(conf):
        # So that waiting srun and salloc hear of it, and the jobs of mode multi end.
        with contextlib.suppress(LabError):
            command = ["scancel", "-f", "-s", "KILL", "-u", getpass.getuser()]
            Lab(*read_record(folder)).client(command, 5.0)
    if node_shells(folder):
        stop_node(folder)
    _stop_jobs(conf)
    processes.stop(processes.find_program("slurmd", str(conf)))
    daemons.stop_controller(conf)
    daemons.stop_munged(folder)
    _stop_jobs(conf)
    for bridge in network.bridges_of(folder):
        network.remove_bridge(bridge)


def _stop_jobs(conf: Path) -> None:
    # What ran on a node of mode multi and outlived its slurmd: the steps, the batch scripts and
    # their children, which only their environment tells from others. Namespaces leave none.
    def belongs(process: processes.Process) -> bool:
        variables = processes.environment(process.pid)
        if variables.get("SLURM_CONF") != str(conf):
            return False
        return process.name == "slurmstepd" or "SLURMD_NODENAME" in variables

    own = os.getpid()
    leftover = [process for process in processes.find(belongs) if process.pid != own]
    processes.stop(leftover, signal.SIGKILL)
