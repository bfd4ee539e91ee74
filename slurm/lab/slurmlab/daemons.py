"""Start and stop munged and slurmctld."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

from slurmlab import processes
from slurmlab.settings import LabError, Place, Settings, munge_folder

BIND_HOSTS = 'mount --bind "$0" /etc/hosts && exec "$@"'
"""Shell text that runs a program with the file $0 in place of /etc/hosts."""


def run_daemon(argv: Sequence[str], log: Path) -> None:
    """Run a program that puts itself into the background.

    Raises:
        LabError: it ended with an error.
    """
    done = subprocess.run(
        argv,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        start_new_session=True,
    )
    if done.returncode:
        raise LabError(f"{shlex.join(argv)} failed: {done.stderr.strip()}\n{tail(log)}")


def tail(log: Path, lines: int = 8) -> str:
    """Return the last lines of a log under its name."""
    try:
        text = log.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return f"{log}: not written"
    return "\n".join([f"{log}:", *("  " + line for line in text.splitlines()[-lines:])])


def start_munged(place: Place) -> None:
    """Start a munged that only this lab knows the key of."""
    folder = place.munge
    _remove_munge_folder(place.folder)
    folder.mkdir()
    folder.chmod(0o755)  # whatever the umask: munged and its clients must get through
    descriptor = os.open(folder / "key", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as key:
        key.write(os.urandom(128))
    files = {"key-file": "key", "socket": "sock", "pid-file": "pid", "seed-file": "seed"}
    options = [f"--{option}={folder}/{name}" for option, name in files.items()]
    log = folder / "log"
    run_daemon(["munged", *options, f"--log-file={log}", "--origin=127.0.0.1"], log)


def munged_processes(folder: Path) -> list[processes.Process]:
    """Return the munged of the lab in `folder`."""
    return processes.find_program("munged", f"--key-file={munge_folder(folder)}/key")


def stop_munged(folder: Path) -> None:
    """Stop the munged of the lab in `folder` and remove its files."""
    processes.stop(munged_processes(folder))
    _remove_munge_folder(folder)


def _remove_munge_folder(folder: Path) -> None:
    path = munge_folder(folder)
    if not path.exists() and not path.is_symlink():
        return
    if path.is_symlink() or path.lstat().st_uid != os.getuid():
        raise LabError(f"{path} belongs to another user; choose another --dir")
    shutil.rmtree(path)


def start_controller(settings: Settings, place: Place) -> None:
    """Start slurmctld.

    It listens on the address that its host name stands for. In netns mode that is to be the
    bridge's address and no other, so it gets the lab's hosts file in a mount namespace of its own.
    """
    argv = ["slurmctld", "-f", str(place.conf)]
    if settings.mode == "netns":
        argv = ["unshare", "--mount", "sh", "-c", BIND_HOSTS, str(place.hosts), *argv]
    run_daemon(argv, place.folder / "log" / "slurmctld.log")


def controllers(conf: Path) -> list[processes.Process]:
    """Return the slurmctld that serves `conf`."""
    return processes.find_program("slurmctld", str(conf))


def stop_controller(conf: Path, number: signal.Signals = signal.SIGTERM) -> None:
    """Stop slurmctld; SIGTERM lets it save its state, SIGKILL may bring back an older one."""
    processes.stop(controllers(conf), number, patience=5.0)
