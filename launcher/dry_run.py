"""Commands as people can read them, and paste them into a shell."""

from __future__ import annotations

import shlex

from launcher.commands import Command

WIDTH = 100


def shell_text(command: Command) -> str:
    """Return a command as lines of a POSIX shell, quoted where it needs to be.

    Args:
        command: the command.
    """
    words = [f"{name}={shlex.quote(value)}" for name, value in command.environment.items()]
    words += [shlex.quote(argument) for argument in command.argv]
    lines, line = [], ""
    for word in words:
        if line and len(line) + len(word) > WIDTH:
            lines.append(line)
            line = "   "
        line = f"{line} {word}" if line else word
    return " \\\n".join([*lines, line])
