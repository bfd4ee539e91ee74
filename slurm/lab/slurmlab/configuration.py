"""The files SLURM reads: slurm.conf, gres.conf, cgroup.conf and the nodes' /etc/hosts."""

from __future__ import annotations

import getpass
import os
import re
import stat
import subprocess
import time
from pathlib import Path

from slurmlab.settings import LabError, Place, Settings

CHARACTER_DEVICES = ("null", "zero", "full", "random", "urandom", "tty")
"""Stand-ins for GPUs where no device may be made; SLURM only looks at them."""


def write_configuration(settings: Settings, place: Place) -> None:
    """Write every file that the daemons and clients of this lab read."""
    devices = gpu_devices(settings.gpus, place.folder / "dev")
    place.conf.write_text(slurm_conf(settings, place, user=getpass.getuser()), encoding="utf-8")
    place.hosts.write_text(hosts_file(settings, place), encoding="utf-8")
    (place.folder / "cgroup.conf").write_text(cgroup_conf(slurm_version()), encoding="utf-8")
    if devices:
        lines = [f"Name=gpu File={device} Flags=nvidia_gpu_env\n" for device in devices]
        (place.folder / "gres.conf").write_text("".join(lines), encoding="utf-8")


def slurm_conf(settings: Settings, place: Place, *, user: str) -> str:
    """Return slurm.conf: no cgroups, no accounting, and all timers short."""
    socket = f"socket={place.munge}/sock," if settings.auth == "munge" else ""
    folder = place.folder
    lines = [
        "ClusterName=lab",
        f"SlurmctldHost={place.host}({place.control_address})",
        f"SlurmctldPort={place.control_port}",
        f"SlurmUser={user}",
        f"SlurmdUser={user}",
        f"AuthType=auth/{settings.auth}",
        f"CredType=cred/{settings.auth}",
        # The credential's life is also the delay before a requeued job may start again.
        f"AuthInfo={socket}cred_expire={settings.requeue_delay}",
        f"StateSaveLocation={folder}/state",
        f"SlurmdSpoolDir={folder}/spool/%n",
        f"SlurmctldPidFile={folder}/run/slurmctld.pid",
        f"SlurmdPidFile={folder}/run/slurmd-%n.pid",
        f"SlurmctldLogFile={folder}/log/slurmctld.log",
        f"SlurmdLogFile={folder}/log/slurmd-%n.log",
        "MailProg=/bin/true",
        "MpiDefault=none",
        "ProctrackType=proctrack/linuxproc",
        "TaskPlugin=task/none",
        "JobCompType=jobcomp/filetxt",
        f"JobCompLoc={folder}/log/jobcomp.txt",
        "SelectType=select/cons_tres",
        "SelectTypeParameters=CR_Core",
        "SlurmdParameters=config_overrides",
        "ReturnToService=2",
        "JobRequeue=1",
        f"SlurmdTimeout={settings.node_timeout}",
        f"KillWait={settings.kill_wait}",
        "MessageTimeout=5",
        "TCPTimeout=2",
        "EioTimeout=5",
        "BatchStartTimeout=5",
        "UnkillableStepTimeout=30",
        # Nothing but slurmctld remembers finished jobs here, so it must for a while.
        "MinJobAge=3600",
        # Job ids of a lab started anew must not meet the logs of the one before.
        f"FirstJobId={int(time.time()) % 800_000 + 1000}",
        "SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1",
        "PreemptType=preempt/partition_prio",
        "PreemptMode=REQUEUE",
    ]
    if settings.mode == "netns":
        # slurmctld sees the lab's hosts file, where its host is the bridge's address.
        lines.append("CommunicationParameters=NoCtldInAddrAny")
    if settings.gpus:
        lines.append("GresTypes=gpu")
    lines += [node_line(settings, place, index) for index in range(1, settings.num_nodes + 1)]
    partition = "Nodes=ALL MaxTime=INFINITE State=UP"
    lines += [
        f"PartitionName=main {partition} Default=YES PriorityTier=10 PreemptMode=OFF",
        f"PartitionName=low {partition} PriorityTier=1 PreemptMode=REQUEUE"
        f" GraceTime={settings.grace}",
        *settings.extra,
    ]
    return "\n".join(lines) + "\n"


def node_line(settings: Settings, place: Place, index: int) -> str:
    """Return the line of slurm.conf for node `index`."""
    if settings.mode == "netns":
        where = f"NodeAddr={place.node_address(index)} Port=6818"
    else:
        where = (
            f"NodeHostname={place.host} NodeAddr={place.control_address}"
            f" Port={place.node_port(index)}"
        )
    gres = f" Gres=gpu:{settings.gpus}" if settings.gpus else ""
    size = f"CPUs={settings.cpus} RealMemory={settings.memory}"
    return f"NodeName=node{index} {where} {size}{gres} State=UNKNOWN"


def hosts_file(settings: Settings, place: Place) -> str:
    """Return the /etc/hosts of the nodes (netns)."""
    lines = ["127.0.0.1 localhost", f"{place.control_address} {place.host}"]
    for index in range(1, settings.num_nodes + 1):
        lines.append(f"{place.node_address(index)} node{index}")
    return "\n".join(lines) + "\n"


def cgroup_conf(version: tuple[int, int]) -> str:
    """Return cgroup.conf; newer slurmd touch cgroups unless told not to."""
    if version >= (24, 5):
        return "CgroupPlugin=disabled\n"
    if version >= (22, 5):  # the word above is not known yet; this one asks no systemd
        return "IgnoreSystemd=yes\n"
    return ""


def slurm_version() -> tuple[int, int]:
    """Return year and month of the slurmd on this machine, such as (22, 5)."""
    text = subprocess.run(["slurmd", "-V"], capture_output=True, text=True, check=True).stdout
    match = re.search(r"(\d+)\.(\d+)", text)
    if match is None:
        raise LabError(f"cannot read a version from 'slurmd -V': {text!r}")
    return int(match[1]), int(match[2])


def gpu_devices(count: int, folder: Path) -> list[Path]:
    """Return one character device for each pretended GPU, made in `folder` where that is allowed.

    Raises:
        LabError: devices may not be made here and there are fewer stand-ins than GPUs.
    """
    if not count:
        return []
    folder.mkdir(exist_ok=True)
    try:
        for index in range(count):
            os.mknod(folder / f"gpu{index}", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    except PermissionError:
        known = [Path("/dev") / name for name in CHARACTER_DEVICES]
        usable = [path for path in known if path.is_char_device()]
        if len(usable) < count:
            raise LabError(f"only root can pretend more than {len(usable)} GPUs a node") from None
        return usable[:count]
    return [folder / f"gpu{index}" for index in range(count)]
