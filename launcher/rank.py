"""One rank under a launcher that starts ranks anew: a stop on request must not look like a failure.

`python -m launcher.rank train RUN ...` is `python -m mpotrain train RUN ...` with one difference:
torchrun, told to start ranks again after a failure, takes exit code 85 for one. Here a stop on
request exits with 0; the outcome file of the run folder says what it was.
"""

from __future__ import annotations

import os
import sys
from typing import NoReturn

from mpotrain.cli import main
from mpotrain.errors import EXIT_DONE, EXIT_STOPPED


def entry() -> NoReturn:
    """Run the command line of mpotrain and end this process."""
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # As `mpotrain.cli.entry`: threads of back ends must not abort a process that is done.
    os._exit(EXIT_DONE if code == EXIT_STOPPED else code)


if __name__ == "__main__":
    entry()
