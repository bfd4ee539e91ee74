"""`python -m mpotrain` is the command line; launchers start it with `-m` or `--module`."""

import signal

# A warning of the batch system may come while a rank still imports its libraries, and would end
# it; one that comes later is heard (`mpotrain.train.signals`), and batch systems repeat it.
if hasattr(signal, "SIGUSR1"):
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)

from mpotrain.cli import entry

if __name__ == "__main__":
    entry()
