"""Who runs the launcher."""

from __future__ import annotations

import getpass
import os
import platform


def user_name() -> str:
    """Return the name of this user; its number where the machine knows no name."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


def user_and_host() -> str:
    """Return `user@host`, for files that say who wanted something."""
    return f"{user_name()}@{platform.node()}"
