"""`python -m mpotrain` is the command line; launchers start it with `-m` or `--module`."""

import sys

from mpotrain.cli import main

if __name__ == "__main__":
    sys.exit(main())
