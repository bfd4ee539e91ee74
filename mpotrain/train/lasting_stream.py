"""Output that may lose its reader while the run goes on: a closed terminal, a pipe that ended."""

from __future__ import annotations

import errno
import io
import os
from typing import TextIO

GONE = frozenset({errno.EIO, errno.EPIPE})
"""What writing fails with once the terminal is closed, or the reader of the pipe has left."""


class LastingStream(io.TextIOBase):
    """A text stream that goes silent for ever when its reader is gone, and raises nothing.

    What a person sees must not end a run, least of all the run that saves because its terminal was
    closed or because Ctrl-C has ended `tee` as well.
    """

    def __init__(self, stream: TextIO) -> None:
        """Stand before a stream.

        Args:
            stream: the stream of a file descriptor, which leads nowhere once the reader is gone,
                so that what waits in buffers fails nobody else either.
        """
        self._stream = stream

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """The encoding of the stream."""
        return self._stream.encoding

    def isatty(self) -> bool:
        """Whether the stream leads to a terminal."""
        return self._stream.isatty()

    def fileno(self) -> int:
        """Return the file descriptor of the stream."""
        return self._stream.fileno()

    def writable(self) -> bool:
        """Whether it can be written to: always."""
        return True

    def write(self, text: str) -> int:
        """Write a text, or nothing if nobody can read it any more.

        Raises:
            OSError: for any other reason.
        """
        try:
            return self._stream.write(text)
        except OSError as error:
            self._lose(error)
            return len(text)

    def flush(self) -> None:
        """Let the reader see what was written, if there is one.

        Raises:
            OSError: for any other reason.
        """
        try:
            self._stream.flush()
        except OSError as error:
            self._lose(error)

    def _lose(self, error: OSError) -> None:
        if error.errno not in GONE:
            raise error
        nowhere = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(nowhere, self._stream.fileno())
        finally:
            os.close(nowhere)
