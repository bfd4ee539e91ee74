"""A process under a watchdog, for tests of how it ends (no torch, so that it starts at once).

usage: watched_process.py FOLDER RANK SIZE TIMEOUT ACTION...

Actions run one after the other: `beat:SECONDS` works for a time with a beat every 0.05 s, `wait:S`
makes no progress for a time, `silent:N` works N times 0.05 s without a beat, `hold:S` keeps the
interpreter to itself for a time, `hurry:S` becomes impatient, `end:S` shortens the timer in C,
`grace:S` changes the time for other ranks to answer,
`say:NAME` writes a file, `until:NAME` works until there is such a file, `print:N` prints N bytes.
"""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Callable
from pathlib import Path

from mpotrain.parallel import watchdog as module
from mpotrain.parallel.hang_folder import Hang
from mpotrain.parallel.watchdog import Watchdog


def where_it_waits(seconds: float) -> None:
    """Stand where a stack dump shows this name."""
    time.sleep(seconds)


class Watched:
    """A process of one run folder that does what its command line says."""

    def __init__(self, folder: Path, rank: int, size: int, timeout: float) -> None:
        self.folder, self.rank = folder, rank
        self.dog = Watchdog(
            timeout or None, folder, rank=rank, size=size, on_hang=self.record, grace=30.0,
            has_ended=(folder / "ends.txt").exists,
        )  # fmt: skip

    def record(self, hang: Hang) -> None:
        with (self.folder / "ends.txt").open("a") as file:
            file.write(f"{self.rank} {hang.answered} {hang.step} {hang.describe()}\n")

    def beat(self, seconds: str) -> None:
        end = time.monotonic() + float(seconds)
        self.work(lambda: time.monotonic() < end)

    def until(self, name: str) -> None:
        self.work(lambda: not (self.folder / name).exists())

    def work(self, goes_on: Callable[[], bool]) -> None:
        while goes_on():
            self.dog.beat("working", 7)
            time.sleep(0.05)

    def wait(self, seconds: str) -> None:
        self.dog.beat("waiting for nobody", 7)
        where_it_waits(float(seconds))

    def silent(self, number: str) -> None:
        # Sleeps end while a process is suspended: many short ones need time of its own.
        for _ in range(int(number)):
            time.sleep(0.05)

    def hold(self, seconds: str) -> None:
        ctypes.PyDLL(None).sleep(int(seconds))

    def hurry(self, seconds: str) -> None:
        self.dog.hurry(float(seconds))

    def end(self, seconds: str) -> None:
        module.END_SECONDS = float(seconds)

    def grace(self, seconds: str) -> None:
        self.dog._grace = float(seconds)

    def print(self, number: str) -> None:
        print("x" * int(number), flush=True)

    def say(self, name: str) -> None:
        (self.folder / name).touch()


def main() -> None:
    """Do what the command line says."""
    folder, rank, size, timeout = sys.argv[1:5]
    watched = Watched(Path(folder), int(rank), int(size), float(timeout))
    with watched.dog:
        watched.dog.met("life")
        for action in sys.argv[5:]:
            name, _, value = action.partition(":")
            getattr(watched, name)(value)
    print("the end", flush=True)


if __name__ == "__main__":
    main()
