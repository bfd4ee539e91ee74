"""One writer for each checkpoint folder, even when a job is started twice (no torch)."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import socket
from pathlib import Path

from mpotrain.errors import CheckpointError

LOCK_NAME = ".writer"
"""File whose lock says that a live process writes into the folder."""

logger = logging.getLogger(__name__)


class FolderLock:
    """An advisory lock that ends with its process, however that dies.

    A POSIX record lock is used: it works over NFS, and forked data-loader workers do not inherit
    it. Stores in the same process do not exclude each other.

    Attributes:
        folder: the folder that is locked.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._handle: int | None = None

    def acquire(self) -> None:
        """Take the lock; taking it again changes nothing.

        Raises:
            CheckpointError: another live process holds it.
        """
        if self._handle is not None:
            return
        handle = os.open(self.folder / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(handle, 200, 0).decode(errors="replace").strip() or "unknown"
            if error.errno in (errno.EACCES, errno.EAGAIN):
                os.close(handle)
                raise CheckpointError(
                    f"{self.folder}: another live process writes checkpoints here ({holder}): "
                    "stop it, or use another run folder"
                ) from error
            logger.warning("%s: this file system has no locks (%s)", self.folder, error)
        holder = f"process {os.getpid()} on {socket.gethostname()}\n"
        with contextlib.suppress(OSError):  # a full disk; the lock holds without its text
            os.ftruncate(handle, 0)
            os.pwrite(handle, holder.encode(), 0)
        self._handle = handle

    def release(self) -> None:
        """Give the lock back."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None
