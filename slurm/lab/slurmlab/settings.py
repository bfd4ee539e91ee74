"""What a lab is made of: the settings a person chooses and the place they are put in."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shutil
import socket
import tempfile
from pathlib import Path
from typing import Any, Literal, get_args

Mode = Literal["netns", "multi"]
Authentication = Literal["munge", "none"]

MAX_FOLDER_LENGTH = 60
"""Longer folders would push the sockets of job steps past the 107 bytes of a Unix address."""
MAX_NODES: dict[Mode, int] = {"netns": 200, "multi": 31}
"""Addresses of a /24 network, or ports of one slot."""
PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge", "iproute2", "util-linux")


class LabError(Exception):
    """Something the person at the keyboard has to know or mend."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What kind of cluster to start.

    Attributes:
        num_nodes: virtual nodes, named node1 .. nodeN.
        mode: `netns` (root: every node has its own network, PID, UTS and mount namespace) or
            `multi` (any user: several slurmd on one host, told apart by port).
        cpus: CPUs each node claims to have, whatever the machine has.
        memory: MiB each node claims to have.
        gpus: pretended GPUs of a node (`gres/gpu`), 0 for none.
        auth: `munge` with a key of its own, or `none`.
        node_timeout: seconds of silence after which a node is DOWN and its jobs are requeued.
        kill_wait: seconds between SIGTERM and SIGKILL at the time limit.
        requeue_delay: seconds before a requeued job may start again; SLURM wants at least 5.
        grace: seconds between SIGTERM and SIGKILL for a pre-empted job.
        extra: further lines of slurm.conf.
    """

    num_nodes: int = 2
    mode: Mode = "netns"
    cpus: int = 8
    memory: int = 8000
    gpus: int = 0
    auth: Authentication = "munge"
    node_timeout: int = 8
    kill_wait: int = 5
    requeue_delay: int = 5
    grace: int = 10
    extra: tuple[str, ...] = ()

    def problems(self) -> list[str]:
        """Return every reason why no such cluster can be started."""
        found = []
        most = MAX_NODES[self.mode]
        if not 1 <= self.num_nodes <= most:
            found.append(f"{self.num_nodes} nodes asked for; mode {self.mode} has 1 to {most}")
        if self.requeue_delay < 5:
            found.append("the requeue delay must be at least 5 s (life of a job credential)")
        for name in ("cpus", "memory", "node_timeout", "kill_wait"):
            if getattr(self, name) < 1:
                found.append(f"{name.replace('_', '-')} must be at least 1")
        for name in ("gpus", "grace"):
            if getattr(self, name) < 0:
                found.append(f"{name} must not be negative")
        return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
    """Where one lab lives: its folder, and the slot that keeps its addresses from all others'.

    Attributes:
        folder: everything the lab writes, but munge's files.
        slot: number that chooses the network 10.99.slot.0/24 (netns) or the ports (multi).
        control_address: address of slurmctld.
        host: short name of this machine.
    """

    folder: Path
    slot: int
    control_address: str
    host: str

    @property
    def conf(self) -> Path:
        """Path of slurm.conf."""
        return self.folder / "slurm.conf"

    @property
    def hosts(self) -> Path:
        """The /etc/hosts that nodes and slurmctld see."""
        return self.folder / "hosts"

    @property
    def local(self) -> Path:
        """Where every node mounts its own storage (netns)."""
        return self.folder / "local"

    @property
    def munge(self) -> Path:
        """Folder of munged; outside `folder` since munged wants all parents world-searchable."""
        return munge_folder(self.folder)

    @property
    def bridge(self) -> str:
        """Name of the network bridge that the nodes are plugged into (netns)."""
        return f"slab{self.slot}"

    @property
    def control_port(self) -> int:
        """Port of slurmctld, below the range that the kernel gives out by itself."""
        return 24000 + self.slot

    def node_address(self, index: int) -> str:
        """Address of node `index` (1-based) in netns mode."""
        return f"10.99.{self.slot}.{index}"

    def node_port(self, index: int) -> int:
        """Port of the slurmd of node `index` (1-based) in multi mode."""
        return 25000 + 32 * self.slot + index

    def network_name(self, index: int) -> str:
        """Name of the network namespace of node `index`."""
        return f"{self.bridge}-n{index}"

    def cable(self, index: int) -> str:
        """Name of the bridge's end of the cable to node `index`."""
        return f"{self.bridge}n{index}"


def munge_folder(folder: Path) -> Path:
    """Return where the munged of the lab in `folder` keeps key and socket."""
    return Path("/tmp") / f"slurm-lab-munge-{hashlib.sha1(os.fsencode(folder)).hexdigest()[:12]}"


def default_folder() -> Path:
    """Return $LAB_DIR, or a folder of this user's in the folder for temporary files."""
    chosen = os.environ.get("LAB_DIR")
    return Path(chosen) if chosen else Path(tempfile.gettempdir()) / f"slurm-lab-{os.getuid()}"


def check_folder(folder: Path) -> Path:
    """Return `folder` as absolute path.

    Raises:
        LabError: SLURM or the kernel could not work with such a path, or it is another user's.
    """
    folder = Path(os.path.abspath(folder))  # noqa: PTH100 - a link must stay a link, see below
    if not re.fullmatch(r"[\w./+-]+", str(folder), re.ASCII):
        raise LabError(f"{folder}: slurm.conf cannot hold a path with such characters")
    if len(str(folder)) > MAX_FOLDER_LENGTH:
        raise LabError(
            f"{folder} is longer than {MAX_FOLDER_LENGTH} characters: sockets inside would not fit "
            "into a Unix address; choose a shorter --dir"
        )
    try:
        status = folder.lstat()
    except FileNotFoundError:
        return folder
    if not folder.is_dir() or folder.is_symlink() or status.st_uid != os.getuid():
        raise LabError(f"{folder} exists and is not a folder of yours; choose another --dir")
    if any(folder.iterdir()) and not (folder / "lab.json").exists():
        raise LabError(f"{folder} holds other things than a lab; choose another --dir")
    return folder


def missing_programs(settings: Settings) -> list[str]:
    """Return the programs a lab needs and this machine lacks."""
    names = ["slurmctld", "slurmd", "sbatch", "sinfo", "scancel"]
    if settings.auth == "munge":
        names.append("munged")
    if settings.mode == "netns":
        names += ["ip", "unshare", "nsenter"]
    return [name for name in names if shutil.which(name) is None]


def short_host() -> str:
    """Return the name of this machine without its domain."""
    return socket.gethostname().split(".", 1)[0]


def write_record(settings: Settings, place: Place) -> None:
    """Note the lab in its folder, so that later commands find it."""
    record = {"settings": dataclasses.asdict(settings), "place": dataclasses.asdict(place)}
    partial = place.folder / "lab.json.tmp"
    partial.write_text(json.dumps(record, indent=2, default=str) + "\n", encoding="utf-8")
    partial.replace(place.folder / "lab.json")


def read_record(folder: Path) -> tuple[Settings, Place]:
    """Return what `write_record` noted.

    Raises:
        LabError: no lab lives there, or its record is not whole.
    """
    path = folder / "lab.json"
    try:
        record: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
        chosen, where = record["settings"], record["place"]
        chosen["extra"] = tuple(chosen["extra"])
        where["folder"] = Path(where["folder"])
        settings = Settings(**chosen)
        if settings.mode not in get_args(Mode):
            raise ValueError(settings.mode)
        return settings, Place(**where)
    except FileNotFoundError:
        raise LabError(f"no lab in {folder}; start one with: up N") from None
    except (ValueError, KeyError, TypeError) as error:
        raise LabError(f"{path} is not a lab's record ({error!r}); remove it with: down") from error
