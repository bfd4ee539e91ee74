"""`python -m mpotrain` is the command line; launchers start it with `-m` or `--module`."""

from mpotrain.cli import entry

if __name__ == "__main__":
    entry()
