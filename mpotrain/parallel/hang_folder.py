"""What the ranks of a hanging run leave for people, and how they tell each other (no torch).

`hangs/<time>-step<N>/` in the run folder has `rank-<R>.txt` (where every thread of that rank
stands) and `rank-<R>.trace.json` (its last collectives). The rank that notices first names that
folder in `hangs/life-<id>.json`, where the others find it; the id is that of one start, so that
nothing of an earlier one counts.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpotrain.durable import publish, tmp_path, write_durably
from mpotrain.parallel.flight import recorded_collectives, waiting_collectives

HANGS = "hangs"
"""Folder of all hangs in the run folder."""
KEPT = 10
"""Hangs that are kept; each holds some hundred KiB of every rank."""
SUMMARY = "summary.txt"
"""File of a hang with one line about it, by the rank that records the end of the run."""


@dataclass(frozen=True)
class Hang:
    """A run that made no progress for too long, as one of its ranks sees it.

    Attributes:
        folder: where the ranks write what they know.
        step: steps done.
        phase: what this rank was doing.
        seconds: how long it waited.
        answered: ranks that wrote where they stand; the others are stopped, dead or cut off.
        size: number of ranks.
    """

    folder: Path
    step: int
    phase: str
    seconds: float
    answered: tuple[int, ...]
    size: int

    def describe(self) -> str:
        """Return what happened as one line of text."""
        silent = [rank for rank in range(self.size) if rank not in self.answered]
        text = (
            f"no progress for {self.seconds / 60:.1f} minutes after step {self.step} "
            f"({self.phase}); where the threads stand is in {self.folder}"
        )
        if not silent:
            return text
        shown = ", ".join(map(str, silent[:8])) + (", ..." if len(silent) > 8 else "")
        return f"{text}; no answer from {len(silent)} of {self.size} ranks: {shown}"


class HangFolder:
    """The files of a hang in one run folder, for one rank of one start.

    Attributes:
        life: id of this start, the same on all ranks; None as long as they have not met.
    """

    def __init__(self, run_folder: Path, rank: int) -> None:
        self.life: str | None = None
        self._hangs = run_folder / HANGS
        self._rank = rank

    def forget_old(self, keep: int = KEPT) -> None:
        """Delete all but the newest hangs of earlier starts; for one rank, before anything hangs.

        Args:
            keep: how many to keep.
        """
        with contextlib.suppress(OSError):  # no hang yet, or nothing that could be mended here
            # Their names begin with the time.
            folders = sorted(path for path in self._hangs.iterdir() if path.is_dir())
            for folder in folders[: max(len(folders) - keep, 0)]:
                shutil.rmtree(folder, ignore_errors=True)
            for marker in self._hangs.glob("life-*.json"):
                named = self._named_in(marker)
                if named is None or not named.is_dir():
                    marker.unlink()

    def named(self) -> Path | None:
        """Return the folder that some rank of this start has named; None where nobody hangs."""
        return None if self.life is None else self._named_in(self._marker(self.life))

    def name(self, step: int) -> Path:
        """Name a folder for this hang, or return the one that another rank has named just before.

        Raises:
            OSError: the run folder cannot be written.
        """
        folder = self._hangs / f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-step{step}"
        folder.mkdir(parents=True, exist_ok=True)
        if self.life is None:
            return folder
        marker = self._marker(self.life)
        draft = tmp_path(marker)
        draft.write_text(json.dumps({"folder": folder.name, "rank": self._rank}) + "\n")
        try:
            os.link(draft, marker)  # whole, and only where there is none
            draft.unlink()
        except FileExistsError:
            draft.unlink()
        except OSError:  # a file system without hard links: the last one counts
            draft.rename(marker)
        chosen = self.named() or folder
        if chosen != folder:
            with contextlib.suppress(OSError):
                folder.rmdir()
        return chosen

    def write(self, folder: Path, facts: Sequence[str]) -> None:
        """Write where this rank's threads stand, and its last collectives.

        Args:
            folder: what `name` or `named` returned.
            facts: lines at the head of the text.

        Raises:
            OSError: the folder cannot be written.
        """
        folder.mkdir(parents=True, exist_ok=True)
        recorded = recorded_collectives()
        waiting = waiting_collectives(recorded) or ["none that torch knows of"]
        lines = [*facts, "", "collectives that have not ended:", *(f"  {w}" for w in waiting), ""]
        trace = {"rank": self._rank, "recorders": recorded}
        write_durably(folder / f"rank-{self._rank}.trace.json", json.dumps(trace).encode())
        self._write_stacks(folder / f"rank-{self._rank}.txt", lines)

    def answered(self, folder: Path) -> tuple[int, ...]:
        """Return the ranks that have written all they have to say, in order."""
        found = []
        with contextlib.suppress(OSError):
            for path in folder.glob("rank-*.txt"):
                number = path.stem.removeprefix("rank-")
                if number.isdigit():
                    found.append(int(number))
        return tuple(sorted(found))

    def summarize(self, folder: Path, text: str) -> bool:
        """Write the summary of a hang; return False where some rank has done so.

        A rank that was stopped and comes back much later must not speak for the run.
        """
        try:
            with (folder / SUMMARY).open("x", encoding="utf-8") as file:
                file.write(f"{text}\n")
        except FileExistsError:
            return False
        return True

    def _write_stacks(self, path: Path, lines: Sequence[str]) -> None:
        unfinished = tmp_path(path)
        with unfinished.open("w", encoding="utf-8") as file:
            file.write("\n".join(lines) + "\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
            os.fsync(file.fileno())
        publish(unfinished, path)

    def _named_in(self, marker: Path) -> Path | None:
        try:
            name = json.loads(marker.read_bytes())["folder"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return self._hangs / Path(str(name)).name

    def _marker(self, life: str) -> Path:
        return self._hangs / f"life-{life}.json"


class Pulse:
    """One file that every rank touches while it makes progress, so that those who wait can see it.

    A rank that waits for another one's long work (a checkpoint that rank 0 publishes) makes no
    progress of its own, but it does not hang. Times of the file are only compared with each other,
    never with a clock.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen = self._time()

    def touch(self) -> None:
        """Say that this rank makes progress; does nothing where there is no run folder yet."""
        with contextlib.suppress(OSError):
            descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                os.utime(descriptor)
                self._seen = os.fstat(descriptor).st_mtime_ns
            finally:
                os.close(descriptor)

    def moved(self) -> bool:
        """Return whether another rank has touched the file since the last look or touch."""
        seen, self._seen = self._seen, self._time()
        return self._seen is not None and seen != self._seen

    def _time(self) -> int | None:
        try:
            # Over NFS only an open asks the server for the true time.
            descriptor = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            return os.fstat(descriptor).st_mtime_ns
        finally:
            os.close(descriptor)


def wait_until(condition: Callable[[], Any], seconds: float, interval: float = 0.2) -> bool:
    """Wait until `condition()` is true, at most `seconds`; return whether it came true."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() >= end:
            return False
        time.sleep(interval)
    return True
