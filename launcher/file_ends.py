"""Reading the end of files that may be gigabytes long, and go on growing meanwhile."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

BLOCK_BYTES = 1 << 16
"""Bytes that are read at a time, from the end towards the start."""


def lines_backwards(path: Path, max_bytes: int) -> Iterator[bytes]:
    """Yield the complete lines of a file, the last one first, without their line ends.

    What stands behind the last line end is being written, or was torn by a kill, and is no line.

    Args:
        path: the file.
        max_bytes: how far to read back from the end; a line that begins before that is left out.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        position = file.seek(0, os.SEEK_END)
        start = max(0, position - max_bytes)
        rest: list[bytes] = []  # pieces of the line at the front of what was read, last one first
        torn = True
        while position > start:
            begin = max(start, position - BLOCK_BYTES)
            file.seek(begin)
            block = file.read(position - begin)
            position = begin
            pieces = block.split(b"\n")
            if len(pieces) == 1:
                rest.append(block)
                continue
            rest.append(pieces[-1])
            if not torn:
                yield b"".join(reversed(rest))
            torn = False
            yield from reversed(pieces[1:-1])
            rest = [pieces[0]]
        if position == 0 and rest and not torn:
            yield b"".join(reversed(rest))


def offset_of_last_lines(path: Path, count: int) -> int:
    """Return where the last `count` lines of a file begin, in bytes from its start.

    A last line without a line end counts as a line.

    Args:
        path: the file.
        count: number of lines; 0 gives the end of the file.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        end = position = file.seek(0, os.SEEK_END)
        if count <= 0:
            return end
        left = count
        while position > 0:
            begin = max(0, position - BLOCK_BYTES)
            file.seek(begin)
            block = file.read(position - begin)
            at = len(block)
            if position == end and block.endswith(b"\n"):
                at -= 1  # it ends the last line and begins none
            while (at := block.rfind(b"\n", 0, at)) >= 0:
                left -= 1
                if left == 0:
                    return begin + at + 1
            position = begin
    return 0
